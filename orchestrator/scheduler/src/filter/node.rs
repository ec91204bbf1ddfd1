//! Filters that look at the node alone: cordon, name, taints, affinity, ports.

use orch_api::k8s_openapi::api::core::v1::Taint;
use orch_api::taint;

use super::{Cycle, Reasons};
use crate::node_info::NodeInfo;
use crate::pod_info::PodInfo;

fn verdict(ok: bool, reason: &'static str) -> Result<(), Reasons> {
    if ok { Ok(()) } else { Err(vec![reason.into()]) }
}

/// A cordoned node takes only pods that tolerate the taint which goes with it.
pub(super) fn is_schedulable(pod: &PodInfo, node: &NodeInfo) -> bool {
    !node.unschedulable || {
        let cordoned = Taint {
            key: taint::UNSCHEDULABLE.to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        taint::tolerates(&pod.tolerations, &cordoned)
    }
}

pub(super) fn unschedulable(cycle: &Cycle<'_>, node: &NodeInfo) -> Result<(), Reasons> {
    verdict(is_schedulable(cycle.pod, node), "node(s) were unschedulable")
}

pub(super) fn is_named(pod: &PodInfo, node: &NodeInfo) -> bool {
    let wanted = orch_api::pod::node_name(&pod.pod);
    wanted.is_empty() || wanted == node.name
}

pub(super) fn name(cycle: &Cycle<'_>, node: &NodeInfo) -> Result<(), Reasons> {
    verdict(is_named(cycle.pod, node), "node(s) didn't match the requested node name")
}

/// The first taint that keeps the pod away.
pub(crate) fn hard_taint<'a>(pod: &PodInfo, node: &'a NodeInfo) -> Option<&'a Taint> {
    node.taints.iter().find(|taint| {
        matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute")
            && !taint::tolerates(&pod.tolerations, taint)
    })
}

pub(super) fn taints(cycle: &Cycle<'_>, node: &NodeInfo) -> Result<(), Reasons> {
    match hard_taint(cycle.pod, node) {
        None => Ok(()),
        Some(taint) => {
            let value = taint.value.as_deref().unwrap_or_default();
            Err(vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key).into()])
        }
    }
}

/// `nodeSelector` and required node affinity.
pub(crate) fn has_required_affinity(pod: &PodInfo, node: &NodeInfo) -> bool {
    pod.node_selector.matches(&node.labels)
        && pod
            .node_terms
            .as_ref()
            .is_none_or(|terms| terms.iter().any(|term| term.matches(&node.name, &node.labels)))
}

pub(super) fn affinity(cycle: &Cycle<'_>, node: &NodeInfo) -> Result<(), Reasons> {
    verdict(
        has_required_affinity(cycle.pod, node),
        "node(s) didn't match Pod's node affinity/selector",
    )
}

pub(super) fn has_free_ports(pod: &PodInfo, node: &NodeInfo) -> bool {
    !pod.host_ports.iter().any(|port| node.host_ports.iter().any(|taken| taken.conflicts(port)))
}

pub(super) fn ports(cycle: &Cycle<'_>, node: &NodeInfo) -> Result<(), Reasons> {
    verdict(
        has_free_ports(cycle.pod, node),
        "node(s) didn't have free ports for the requested pod ports",
    )
}
