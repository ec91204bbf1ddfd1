//! Conditions and taints of a node by what is known of it. Pure.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Node, NodeCondition, NodeStatus, Pod, PodCondition, PodStatus, Taint,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use orch_api::{node, pod, taint};

/// Conditions that the node itself reports.
const REPORTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];
const NO_SCHEDULE: &str = "NoSchedule";
const NO_EXECUTE: &str = "NoExecute";
/// Taints that follow a condition.
const BY_CONDITION: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];

/// What becomes of the taints that drive pods from lost nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Driving {
    /// A lost node gets them.
    Begin,
    /// Those that are there stay, no node gets new ones.
    Continue,
    /// They go, and with them the time that pods have already tolerated them.
    Stop,
}

fn ready_status(node: &Node) -> &str {
    // A node that never said anything is not ready, and not lost either.
    node::condition(node, "Ready").map_or("False", |condition| condition.status.as_str())
}

/// Whether the node is known to be silent.
pub(super) fn is_unknown(node: &Node) -> bool {
    ready_status(node) == "Unknown"
}

/// The status of a silent node, or nothing if it says so already.
pub(super) fn unknown_status(node: &Node, now: Timestamp) -> Option<NodeStatus> {
    let mut status = node.status.clone().unwrap_or_default();
    let conditions = status.conditions.get_or_insert_default();
    let mut changed = false;
    for kind in REPORTED {
        match conditions.iter_mut().find(|condition| condition.type_ == kind) {
            Some(condition) if condition.status == "Unknown" => {}
            Some(condition) => {
                condition.status = "Unknown".to_owned();
                condition.reason = Some("NodeStatusUnknown".to_owned());
                condition.message = Some("Kubelet stopped posting node status.".to_owned());
                condition.last_transition_time = Some(Time(now));
                changed = true;
            }
            None => {
                conditions.push(NodeCondition {
                    type_: kind.to_owned(),
                    status: "Unknown".to_owned(),
                    reason: Some("NodeStatusNeverUpdated".to_owned()),
                    message: Some("Kubelet never posted node status.".to_owned()),
                    last_heartbeat_time: node.metadata.creation_timestamp.clone(),
                    last_transition_time: Some(Time(now)),
                });
                changed = true;
            }
        }
    }
    changed.then_some(status)
}

/// The node's taints as they should be, or nothing if they are. Others' taints stay.
pub(super) fn desired_taints(node: &Node, driving: Driving, now: Timestamp) -> Option<Vec<Taint>> {
    let spec = node.spec.clone().unwrap_or_default();
    let current = spec.taints.clone().unwrap_or_default();
    let ready = ready_status(node);
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    let lost = match ready {
        "False" => Some(taint::NOT_READY),
        "Unknown" => Some(taint::UNREACHABLE),
        _ => None,
    };
    if let Some(key) = lost {
        wanted.push((key, NO_SCHEDULE));
        let drives = |found: &Taint| {
            let key = found.key.as_str();
            found.effect == NO_EXECUTE && (key == taint::NOT_READY || key == taint::UNREACHABLE)
        };
        let driven = match driving {
            Driving::Begin => true,
            Driving::Continue => current.iter().any(drives),
            Driving::Stop => false,
        };
        if driven {
            wanted.push((key, NO_EXECUTE));
        }
    }
    for (condition, key) in BY_CONDITION {
        if node::condition(node, condition).is_some_and(|found| found.status == "True") {
            wanted.push((key, NO_SCHEDULE));
        }
    }
    if spec.unschedulable == Some(true) {
        wanted.push((taint::UNSCHEDULABLE, NO_SCHEDULE));
    }
    let ours = |found: &Taint| {
        let key = found.key.as_str();
        match found.effect.as_str() {
            NO_EXECUTE => key == taint::NOT_READY || key == taint::UNREACHABLE,
            NO_SCHEDULE => {
                [taint::NOT_READY, taint::UNREACHABLE, taint::UNSCHEDULABLE].contains(&key)
                    || BY_CONDITION.iter().any(|(_, by)| *by == key)
            }
            _ => false,
        }
    };
    let is_wanted = |found: &Taint| wanted.contains(&(found.key.as_str(), found.effect.as_str()));
    let mut taints: Vec<Taint> =
        current.iter().filter(|found| !ours(found) || is_wanted(found)).cloned().collect();
    for (key, effect) in wanted {
        if !taints.iter().any(|found| found.key == key && found.effect == effect) {
            taints.push(Taint {
                key: key.to_owned(),
                effect: effect.to_owned(),
                value: None,
                // Tolerations count from here.
                time_added: Some(Time(now)),
            });
        }
    }
    (taints != current).then_some(taints)
}

/// The status of a pod whose node is silent, or nothing if it is not ready anyway.
pub(super) fn not_ready_status(pod: &Pod, now: Timestamp) -> Option<PodStatus> {
    if !pod::is_ready(pod) || pod::is_terminal(pod) {
        return None;
    }
    let mut status = pod.status.clone()?;
    let ready: &mut PodCondition =
        status.conditions.as_mut()?.iter_mut().find(|condition| condition.type_ == "Ready")?;
    ready.status = "False".to_owned();
    ready.reason = Some("NodeNotReady".to_owned());
    ready.last_transition_time = Some(Time(now));
    Some(status)
}
