//! `NodeResourcesFit`: the pod's requests fit into what the node has left.

use super::{Cycle, Reasons};
use crate::node_info::NodeInfo;
use crate::pod_info::PodInfo;

/// Everything the node has too little of. A node that is over-committed already still takes a pod that requests
/// nothing of what is short.
pub(super) fn shortages(pod: &PodInfo, node: &NodeInfo) -> Reasons {
    let (want, used, have) = (&pod.requests, &node.requested, &node.allocatable);
    let short = |want: i64, used: i64, have: i64| want > 0 && want > have.saturating_sub(used);
    let mut reasons = Reasons::new();
    if short(1, i64::try_from(node.pods.len()).unwrap_or(i64::MAX), have.pods) {
        reasons.push("Too many pods".into());
    }
    if short(want.cpu_milli, used.cpu_milli, have.cpu_milli) {
        reasons.push("Insufficient cpu".into());
    }
    if short(want.memory_bytes, used.memory_bytes, have.memory_bytes) {
        reasons.push("Insufficient memory".into());
    }
    if short(want.ephemeral_bytes, used.ephemeral_bytes, have.ephemeral_bytes) {
        reasons.push("Insufficient ephemeral-storage".into());
    }
    for (name, want) in &want.extended {
        let of = |map: &std::collections::BTreeMap<String, i64>| {
            map.get(name).copied().unwrap_or_default()
        };
        if short(*want, of(&used.extended), of(&have.extended)) {
            reasons.push(format!("Insufficient {name}").into());
        }
    }
    reasons
}

pub(super) fn fit(cycle: &Cycle<'_>, node: &NodeInfo) -> Result<(), Reasons> {
    let reasons = shortages(cycle.pod, node);
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}
