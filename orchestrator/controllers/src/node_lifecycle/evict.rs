//! Which pods a node's `NoExecute` taints drive out, and when. Pure.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use orch_api::{node, pod, taint};

const NO_EXECUTE: &str = "NoExecute";
/// What admission gives to pods that say nothing; an administrator's other wish for lost nodes takes its place.
const DEFAULT_SECONDS: i64 = 300;
/// From this share of lost nodes on, and more than [`DISRUPTED_LEAST`], no more pods are driven out.
const DISRUPTED_PERCENT: usize = 55;
const DISRUPTED_LEAST: usize = 2;

fn driving(node: &Node) -> impl Iterator<Item = &Taint> {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    taints.into_iter().flatten().filter(|taint| taint.effect == NO_EXECUTE)
}

/// Whether the node has taints that drive pods out.
pub(super) fn drives_out(node: &Node) -> bool {
    driving(node).next().is_some()
}

/// How much of the cluster is lost (upstream's zone states, for clusters of up to 50 nodes in one zone).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Zone {
    /// Few nodes are lost, and their pods move.
    Normal,
    /// So many are lost that all their pods would move onto the few nodes that are left: no more begin to.
    Partial,
    /// No node is alive: it is rather the control plane that sees none of them. Nothing moves.
    Full,
}

/// `silent`: whether a node fell silent, also when that is not written yet.
pub(super) fn zone(nodes: &[Arc<Node>], silent: impl Fn(&Node) -> bool) -> Zone {
    let lost = nodes.iter().filter(|found| !node::is_ready(found) || silent(found)).count();
    if lost > 0 && lost == nodes.len() {
        Zone::Full
    } else if lost > DISRUPTED_LEAST && lost * 100 >= nodes.len() * DISRUPTED_PERCENT {
        Zone::Partial
    } else {
        Zone::Normal
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Stay,
    Evict,
    Later(Duration),
}

/// `default_wait` takes the place of admission's default toleration of a lost node.
pub(super) fn plan(node: &Node, pod: &Pod, default_wait: Option<Duration>, now: Timestamp) -> Step {
    if pod::is_terminal(pod) {
        return Step::Stay;
    }
    let spec = pod.spec.as_ref();
    let tolerations = spec.and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
    let mut first: Option<Timestamp> = None;
    for taint in driving(node) {
        let all: Vec<&Toleration> =
            tolerations.iter().filter(|one| taint::covers(one, taint)).collect();
        if all.is_empty() {
            return Step::Evict;
        }
        // The shortest of those that end; one without an end alone tolerates for ever.
        let wait = all.iter().filter_map(|one| wait_of(one, taint, default_wait)).min();
        let Some(wait) = wait else { continue };
        let since = taint.time_added.as_ref().map_or(now, |time| time.0);
        let end = since.checked_add(wait).unwrap_or(Timestamp::MAX);
        first = Some(first.map_or(end, |first| first.min(end)));
    }
    match first {
        None => Step::Stay,
        Some(end) if end <= now => Step::Evict,
        Some(end) => Step::Later(end.duration_since(now).unsigned_abs()),
    }
}

fn wait_of(
    toleration: &Toleration,
    taint: &Taint,
    default_wait: Option<Duration>,
) -> Option<SignedDuration> {
    let seconds = toleration.toleration_seconds?.max(0);
    let lost = [taint::NOT_READY, taint::UNREACHABLE].contains(&taint.key.as_str());
    let by_admission =
        lost && seconds == DEFAULT_SECONDS && toleration.key.as_deref() == Some(&taint.key);
    match default_wait.filter(|_| by_admission) {
        Some(wait) => SignedDuration::try_from(wait).ok(),
        None => Some(SignedDuration::from_secs(seconds)),
    }
}
