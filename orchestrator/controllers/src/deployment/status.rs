//! Status and conditions of a Deployment, as `kubectl rollout status` reads them. Pure.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::rolling;
use crate::context::name;

const AVAILABLE: &str = "Available";
const PROGRESSING: &str = "Progressing";
const REPLICA_FAILURE: &str = "ReplicaFailure";
const NEW_SET_AVAILABLE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";
const PAUSED: &str = "DeploymentPaused";

fn find<'a>(status: &'a DeploymentStatus, kind: &str) -> Option<&'a DeploymentCondition> {
    status.conditions.iter().flatten().find(|condition| condition.type_ == kind)
}

/// Whether all wanted replicas run the newest template, are available, and nothing else runs.
pub(super) fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = rolling::wanted(deployment);
    status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
        && status.available_replicas.unwrap_or(0) == wanted
        && status.observed_generation >= deployment.metadata.generation
}

fn progress_deadline(deployment: &Deployment) -> Option<SignedDuration> {
    let seconds = deployment.spec.as_ref()?.progress_deadline_seconds?;
    // The largest number stands for "no deadline".
    (seconds != i32::MAX).then(|| SignedDuration::from_secs(seconds.into()))
}

/// When a rollout that does not move counts as failed; nothing if none is under way.
pub(super) fn deadline(deployment: &Deployment, status: &DeploymentStatus) -> Option<Timestamp> {
    let limit = progress_deadline(deployment)?;
    let condition = find(status, PROGRESSING)?;
    let reason = condition.reason.as_deref().unwrap_or_default();
    if matches!(reason, NEW_SET_AVAILABLE | TIMED_OUT | PAUSED) {
        return None;
    }
    let moved = condition.last_update_time.as_ref().map(|time| time.0)?;
    moved.checked_add(limit).ok()
}

/// What is true now. `created` is the newest ReplicaSet when it is made in this step.
pub(super) fn desired(
    deployment: &Deployment,
    newest: Option<&ReplicaSet>,
    created: Option<&ReplicaSet>,
    old: &[ReplicaSet],
    now: Timestamp,
) -> DeploymentStatus {
    let before = deployment.status.clone().unwrap_or_default();
    let all = || newest.into_iter().chain(old);
    let sum = |number: &dyn Fn(&ReplicaSet) -> i32| all().map(number).sum::<i32>();
    let of_status = |set: &ReplicaSet| set.status.clone().unwrap_or_default();
    let zero_is_absent = |count: i32| (count > 0).then_some(count);
    let (size, available) = (sum(&rolling::replicas), sum(&rolling::available));
    let mut status = DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: zero_is_absent(sum(&|set| of_status(set).replicas)),
        updated_replicas: zero_is_absent(newest.map_or(0, |set| of_status(set).replicas)),
        ready_replicas: zero_is_absent(sum(&|set| of_status(set).ready_replicas.unwrap_or(0))),
        available_replicas: zero_is_absent(available),
        unavailable_replicas: zero_is_absent(size - available),
        terminating_replicas: zero_is_absent(sum(&|set| {
            of_status(set).terminating_replicas.unwrap_or(0)
        })),
        collision_count: before.collision_count,
        conditions: None,
    };
    let mut conditions = before.conditions.clone().unwrap_or_default();
    let missing = rolling::surge_and_unavailable(deployment).1;
    put(
        &mut conditions,
        if available >= rolling::wanted(deployment) - missing {
            condition(
                AVAILABLE,
                "True",
                "MinimumReplicasAvailable",
                "Deployment has minimum availability.".to_owned(),
            )
        } else {
            condition(
                AVAILABLE,
                "False",
                "MinimumReplicasUnavailable",
                "Deployment does not have minimum availability.".to_owned(),
            )
        },
        false,
        now,
    );
    progress(deployment, &before, &status, newest, created, &mut conditions, now);
    let failure = all()
        .flat_map(|set| of_status(set).conditions.unwrap_or_default())
        .find(|condition| condition.type_ == REPLICA_FAILURE && condition.status == "True");
    match failure {
        Some(failure) => put(
            &mut conditions,
            condition(
                REPLICA_FAILURE,
                "True",
                failure.reason.as_deref().unwrap_or_default(),
                failure.message.unwrap_or_default(),
            ),
            false,
            now,
        ),
        None => conditions.retain(|condition| condition.type_ != REPLICA_FAILURE),
    }
    status.conditions = Some(conditions);
    status
}

fn progress(
    deployment: &Deployment,
    before: &DeploymentStatus,
    status: &DeploymentStatus,
    newest: Option<&ReplicaSet>,
    created: Option<&ReplicaSet>,
    conditions: &mut Vec<DeploymentCondition>,
    now: Timestamp,
) {
    let Some(limit) = progress_deadline(deployment) else {
        conditions.retain(|condition| condition.type_ != PROGRESSING);
        return;
    };
    let current = find(before, PROGRESSING).cloned();
    let reason = current.as_ref().and_then(|found| found.reason.as_deref()).unwrap_or_default();
    let paused = deployment.spec.as_ref().and_then(|spec| spec.paused) == Some(true);
    if paused {
        let text = "Deployment is paused".to_owned();
        return put(conditions, condition(PROGRESSING, "Unknown", PAUSED, text), false, now);
    }
    if let Some(created) = created {
        let text = format!("Created new replica set {:?}", name(&created.metadata));
        let new = condition(PROGRESSING, "True", "NewReplicaSetCreated", text);
        return put(conditions, new, true, now);
    }
    if reason == PAUSED {
        let text = "Deployment is resumed".to_owned();
        let new = condition(PROGRESSING, "Unknown", "DeploymentResumed", text);
        return put(conditions, new, true, now);
    }
    let set = newest.map_or_else(
        || format!("Deployment {:?}", name(&deployment.metadata)),
        |set| format!("ReplicaSet {:?}", name(&set.metadata)),
    );
    if newest.is_some() && is_complete(deployment, status) {
        let text = format!("{set} has successfully progressed.");
        return put(
            conditions,
            condition(PROGRESSING, "True", NEW_SET_AVAILABLE, text),
            false,
            now,
        );
    }
    // A complete rollout stays complete when pods come and go later; only a new template begins another.
    let rolled_out = reason == NEW_SET_AVAILABLE
        && status.replicas.unwrap_or(0) == status.updated_replicas.unwrap_or(0);
    if rolled_out {
        return;
    }
    let moved = {
        let old = |status: &DeploymentStatus| {
            status.replicas.unwrap_or(0) - status.updated_replicas.unwrap_or(0)
        };
        status.updated_replicas > before.updated_replicas
            || old(status) < old(before)
            || status.ready_replicas > before.ready_replicas
            || status.available_replicas > before.available_replicas
    };
    if moved || current.is_none() || reason == NEW_SET_AVAILABLE {
        let text = format!("{set} is progressing.");
        return put(
            conditions,
            condition(PROGRESSING, "True", "ReplicaSetUpdated", text),
            true,
            now,
        );
    }
    let since = current.as_ref().and_then(|found| found.last_update_time.as_ref()).map(|t| t.0);
    let overdue =
        since.and_then(|since| since.checked_add(limit).ok()).is_some_and(|end| end <= now);
    if overdue && reason != TIMED_OUT {
        let text = format!("{set} has timed out progressing.");
        put(conditions, condition(PROGRESSING, "False", TIMED_OUT, text), true, now);
    }
}

fn condition(kind: &str, status: &str, reason: &str, message: String) -> DeploymentCondition {
    DeploymentCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_update_time: None,
        last_transition_time: None,
    }
}

/// Replaces the condition of this type. Unless `renew`, the same status for the same reason is no news.
fn put(
    conditions: &mut Vec<DeploymentCondition>,
    mut new: DeploymentCondition,
    renew: bool,
    now: Timestamp,
) {
    let at = conditions.iter().position(|condition| condition.type_ == new.type_);
    let old = at.map(|at| &conditions[at]);
    if !renew && old.is_some_and(|old| old.status == new.status && old.reason == new.reason) {
        return;
    }
    let same = old.filter(|old| old.status == new.status);
    new.last_update_time = Some(Time(now));
    new.last_transition_time =
        same.and_then(|old| old.last_transition_time.clone()).or(Some(Time(now)));
    match at {
        Some(at) => conditions[at] = new,
        None => conditions.push(new),
    }
}
