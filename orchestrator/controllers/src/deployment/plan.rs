//! From a Deployment and its ReplicaSets to the next steps and the status. Pure.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};

use super::{revision, rolling, status};

#[derive(Debug, PartialEq)]
pub(super) enum Step {
    Create(ReplicaSet),
    /// Writes a changed ReplicaSet; what it is now says its resource version.
    Update {
        set: ReplicaSet,
        scaled_from: Option<i32>,
    },
    Delete(ReplicaSet),
    /// Writes the revision onto the Deployment.
    SetRevision(String),
}

#[derive(Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    pub(super) status: DeploymentStatus,
    /// When the progress deadline has to be looked at.
    pub(super) check_after: Option<Duration>,
}

pub(super) fn is_recreate(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref());
    strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate")
}

/// `old_pods`: for `Recreate`, whether pods of old revisions exist.
pub(super) fn plan(
    deployment: &Deployment,
    mut sets: Vec<ReplicaSet>,
    old_pods: bool,
    now: Timestamp,
) -> Plan {
    sets.sort_by_cached_key(revision::age);
    let newest = revision::newest(deployment, &sets)
        .and_then(|newest| sets.iter().position(|set| std::ptr::eq(set, newest)));
    let newest = newest.map(|at| sets.remove(at));
    let old = sets;
    let mut steps = if deployment.metadata.deletion_timestamp.is_some() {
        // Only told as it is; its ReplicaSets are the garbage collector's.
        Vec::new()
    } else {
        steps(deployment, newest.as_ref(), &old, old_pods)
    };
    let created = steps.iter().find_map(|step| match step {
        Step::Create(set) => Some(set),
        _ => None,
    });
    let status = status::desired(deployment, newest.as_ref(), created, &old, now);
    if deployment.metadata.deletion_timestamp.is_none() && status::is_complete(deployment, &status)
    {
        steps.extend(superfluous(deployment, &old).into_iter().map(Step::Delete));
    }
    let check_after = status::deadline(deployment, &status)
        .map(|deadline| deadline.duration_since(now).unsigned_abs() + Duration::from_millis(100));
    Plan { steps, status, check_after }
}

fn steps(
    deployment: &Deployment,
    newest: Option<&ReplicaSet>,
    old: &[ReplicaSet],
    old_pods: bool,
) -> Vec<Step> {
    let Some(spec) = &deployment.spec else { return Vec::new() };
    let wanted = rolling::wanted(deployment);
    let (surge, _) = rolling::surge_and_unavailable(deployment);
    let number = old.iter().map(revision::number).max().unwrap_or(0) + 1;
    let paused = spec.paused == Some(true);
    let all: Vec<&ReplicaSet> = newest.into_iter().chain(old).collect();
    if paused || rolling::is_scaling(deployment, &all) {
        let sizes = rolling::scale(deployment, newest, &all);
        return all
            .iter()
            .zip(sizes)
            .filter_map(|(set, size)| resized(set, size, wanted, wanted + surge))
            .collect();
    }
    let mut steps = Vec::new();
    let old_size: i32 = old.iter().map(rolling::replicas).sum();
    // `Recreate`: first all old pods end.
    if is_recreate(deployment) && (old_size > 0 || old_pods) {
        steps.extend(old.iter().filter_map(|set| resized(set, 0, wanted, wanted)));
        return steps;
    }
    let size = |now: i32| {
        if is_recreate(deployment) {
            wanted
        } else {
            rolling::new_replicas(deployment, now, now + old_size)
        }
    };
    let revision = match newest {
        None => {
            let mut set = revision::new_set(deployment, spec);
            revision::annotate(&mut set, deployment, number);
            revision::annotate_scale(&mut set, wanted, wanted + surge);
            if let Some(spec) = &mut set.spec {
                spec.replicas = Some(size(0));
            }
            steps.push(Step::Create(set));
            number
        }
        Some(found) => {
            let mut set = found.clone();
            let before = rolling::replicas(found);
            let mut changed = revision::annotate(&mut set, deployment, number);
            changed |= revision::annotate_scale(&mut set, wanted, wanted + surge);
            if let Some(set) = &mut set.spec {
                changed |= set.min_ready_seconds != spec.min_ready_seconds;
                set.min_ready_seconds = spec.min_ready_seconds;
                changed |= size(before) != before;
                set.replicas = Some(size(before));
            }
            let revision = revision::number(&set);
            if changed {
                let scaled_from = (size(before) != before).then_some(before);
                steps.push(Step::Update { set, scaled_from });
            }
            revision
        }
    };
    let noted = revision::annotation(&deployment.metadata, revision::REVISION);
    if noted != Some(revision.to_string().as_str()) {
        steps.push(Step::SetRevision(revision.to_string()));
    }
    // One direction at a time: with the new pods counted first, never too few run.
    let grew = steps
        .iter()
        .any(|step| matches!(step, Step::Create(_) | Step::Update { scaled_from: Some(_), .. }));
    if !grew && !is_recreate(deployment) && old_size > 0 {
        let sizes = rolling::scale_down_old(deployment, newest, old);
        steps.extend(
            old.iter()
                .zip(sizes)
                .filter(|(set, size)| rolling::replicas(set) != *size)
                .filter_map(|(set, size)| resized(set, size, wanted, wanted + surge)),
        );
    }
    steps
}

/// The step that makes a ReplicaSet this big; a new note of the Deployment's size alone is one for active ones only.
fn resized(set: &ReplicaSet, size: i32, desired: i32, max: i32) -> Option<Step> {
    let before = rolling::replicas(set);
    let mut changed = set.clone();
    let noted = revision::annotate_scale(&mut changed, desired, max);
    if before == size && (!noted || before == 0) {
        return None;
    }
    if let Some(spec) = &mut changed.spec {
        spec.replicas = Some(size);
    }
    Some(Step::Update { set: changed, scaled_from: (before != size).then_some(before) })
}

/// Old ReplicaSets beyond the history, lowest revision first.
fn superfluous(deployment: &Deployment, old: &[ReplicaSet]) -> Vec<ReplicaSet> {
    let limit = deployment.spec.as_ref().and_then(|spec| spec.revision_history_limit);
    let Some(limit) = limit.and_then(|limit| usize::try_from(limit).ok()) else {
        return Vec::new();
    };
    let mut old: Vec<&ReplicaSet> =
        old.iter().filter(|set| set.metadata.deletion_timestamp.is_none()).collect();
    old.sort_by_key(|set| revision::number(set));
    let many = old.len().saturating_sub(limit);
    old.into_iter()
        .take(many)
        .filter(|set| {
            let status = set.status.clone().unwrap_or_default();
            rolling::replicas(set) == 0
                && status.replicas == 0
                && status.observed_generation >= set.metadata.generation
        })
        .cloned()
        .collect()
}
