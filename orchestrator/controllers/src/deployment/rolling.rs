//! How many replicas each ReplicaSet gets: rolling update, and scaling in proportion. Pure arithmetic (upstream,
//! `deployment/util` and `rolling.go`).

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::revision::{self, DESIRED, MAX, annotation};

pub(super) fn wanted(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1).max(0)
}

pub(super) fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1).max(0)
}

pub(super) fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

fn scaled_value(value: &IntOrString, total: i32, round_up: bool) -> i32 {
    match value {
        IntOrString::Int(number) => (*number).max(0),
        IntOrString::String(text) => {
            let percent = text.trim().strip_suffix('%').and_then(|text| text.parse().ok());
            let product = percent.unwrap_or(0_i64).max(0) * i64::from(total);
            let value = if round_up { (product + 99) / 100 } else { product / 100 };
            i32::try_from(value).unwrap_or(i32::MAX)
        }
    }
}

/// Pods above the wanted number, and pods that may be missing, during an update. Never both zero: nothing would move.
pub(super) fn surge_and_unavailable(deployment: &Deployment) -> (i32, i32) {
    let total = wanted(deployment);
    let strategy = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref());
    if strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate") {
        return (0, 0);
    }
    let quarter = IntOrString::String("25%".to_owned());
    let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
    let surge = rolling.and_then(|rolling| rolling.max_surge.as_ref()).unwrap_or(&quarter);
    let missing = rolling.and_then(|rolling| rolling.max_unavailable.as_ref()).unwrap_or(&quarter);
    let (surge, mut missing) =
        (scaled_value(surge, total, true), scaled_value(missing, total, false));
    if surge == 0 && missing == 0 {
        missing = 1;
    }
    (surge, missing.min(total))
}

/// Replicas for the newest ReplicaSet: all that fit below the surge.
pub(super) fn new_replicas(deployment: &Deployment, newest: i32, all: i32) -> i32 {
    let wanted = wanted(deployment);
    if newest >= wanted {
        return wanted;
    }
    let room = wanted + surge_and_unavailable(deployment).0 - all;
    newest + room.clamp(0, wanted - newest)
}

/// Replicas for the old ReplicaSets (sorted by age), as changes of `old`: first what does not work anyway, then as
/// many as availability allows.
pub(super) fn scale_down_old(
    deployment: &Deployment,
    newest: Option<&ReplicaSet>,
    old: &[ReplicaSet],
) -> Vec<i32> {
    let mut sizes: Vec<i32> = old.iter().map(replicas).collect();
    let all: i32 = sizes.iter().sum::<i32>() + newest.map_or(0, replicas);
    let least = wanted(deployment) - surge_and_unavailable(deployment).1;
    let starting = newest.map_or(0, |set| (replicas(set) - available(set)).max(0));
    let mut most = all - least - starting;
    if most <= 0 {
        return sizes;
    }
    for (size, set) in sizes.iter_mut().zip(old) {
        let broken = (*size - available(set)).clamp(0, most);
        *size -= broken;
        most -= broken;
    }
    let running: i32 = old.iter().map(available).sum::<i32>() + newest.map_or(0, available);
    let mut spare = running - least;
    for size in &mut sizes {
        let gone = (*size).min(spare.max(0));
        *size -= gone;
        spare -= gone;
    }
    sizes
}

/// Whether `replicas` of the Deployment was changed since its ReplicaSets were scaled.
pub(super) fn is_scaling(deployment: &Deployment, sets: &[&ReplicaSet]) -> bool {
    sets.iter().filter(|set| replicas(set) > 0).any(|set| {
        annotation(&set.metadata, DESIRED)
            .and_then(|text| text.parse::<i32>().ok())
            .is_some_and(|desired| desired != wanted(deployment))
    })
}

/// Replicas for all ReplicaSets after the Deployment was scaled, outside of a rollout step: the one that runs gets
/// all; amid a rollout each gets its part, so that a bad new revision does not grow alone.
pub(super) fn scale(
    deployment: &Deployment,
    newest: Option<&ReplicaSet>,
    sets: &[&ReplicaSet],
) -> Vec<i32> {
    let wanted = wanted(deployment);
    let mut sizes: Vec<i32> = sets.iter().map(|set| replicas(set)).collect();
    let is_newest =
        |set: &ReplicaSet| newest.is_some_and(|newest| newest.metadata.uid == set.metadata.uid);
    let active: Vec<usize> = (0..sets.len()).filter(|at| sizes[*at] > 0).collect();
    if active.len() <= 1 {
        let only = active.first().copied().or_else(|| {
            (0..sets.len()).max_by_key(|at| (is_newest(sets[*at]), revision::age(sets[*at])))
        });
        if let Some(only) = only {
            sizes[only] = wanted;
        }
        return sizes;
    }
    let saturated = newest.is_some_and(|set| {
        let desired = annotation(&set.metadata, DESIRED).and_then(|text| text.parse().ok());
        replicas(set) == wanted && desired == Some(wanted) && available(set) == wanted
    });
    if saturated {
        for (size, set) in sizes.iter_mut().zip(sets) {
            if !is_newest(set) {
                *size = 0;
            }
        }
        return sizes;
    }
    if super::plan::is_recreate(deployment) {
        return sizes;
    }
    let surge = surge_and_unavailable(deployment).0;
    let allowed = if wanted > 0 { wanted + surge } else { 0 };
    let to_add = allowed - sizes.iter().sum::<i32>();
    let mut order = active;
    order.sort_by_key(|at| {
        let (size, age) = (std::cmp::Reverse(sizes[*at]), revision::age(sets[*at]));
        // Of equal ones the newer grows, and the older shrinks.
        let age_rank = age.0.map_or(0, |created| created.as_second());
        (size, if to_add > 0 { -age_rank } else { age_rank }, age.1)
    });
    let mut added = 0;
    for at in &order {
        let size = sizes[*at];
        let part = fraction(size, sets[*at], wanted, wanted + surge);
        let left = to_add - added;
        let part = if to_add > 0 { part.min(left) } else { part.max(left) };
        sizes[*at] = size + part;
        added += part;
    }
    if let Some(first) = order.first() {
        sizes[*first] += to_add - added;
    }
    for size in &mut sizes {
        *size = (*size).max(0);
    }
    sizes
}

/// The change that keeps a ReplicaSet's share of the Deployment when its size changes.
fn fraction(size: i32, set: &ReplicaSet, wanted: i32, max: i32) -> i32 {
    if wanted == 0 {
        return -size;
    }
    let noted = annotation(&set.metadata, MAX).and_then(|text| text.parse::<i64>().ok());
    let status = set.status.as_ref().map_or(0, |status| status.replicas);
    let Some(before) = noted.or(Some(i64::from(status))).filter(|before| *before > 0) else {
        return 0;
    };
    let product = i64::from(size) * i64::from(max);
    // Rounded to the nearest.
    let new = (2 * product + before) / (2 * before);
    i32::try_from(new).unwrap_or(i32::MAX) - size
}
