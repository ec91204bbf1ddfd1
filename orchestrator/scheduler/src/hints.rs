//! Which change could help which unschedulable pod. A hint may be wrong in one direction only: it may wake a pod in
//! vain, never leave one asleep that fits now.

use crate::cluster::Cluster;
use crate::filter::{Plugin, Plugins, fits_alone};
use crate::node_info::NodeInfo;
use crate::pod_info::PodInfo;
use crate::terms::AffinityTerm;

const BY_OTHER_PODS: &[Plugin] = &[Plugin::PodTopologySpread, Plugin::InterPodAffinity];

/// A node came, or changed in a way that placement depends on. `relabelled`: its labels are new.
pub(crate) fn node_changed(
    node: &NodeInfo,
    relabelled: bool,
    pod: &PodInfo,
    rejected_by: Plugins,
) -> bool {
    // New labels move the borders between topology domains, also for other nodes.
    (relabelled && rejected_by.any(BY_OTHER_PODS)) || fits_alone(pod, node)
}

/// A node is gone: the emptiest domain may be gone with it.
pub(crate) fn node_removed(rejected_by: Plugins) -> bool {
    rejected_by.contains(Plugin::PodTopologySpread)
}

/// A pod came to a node, or changed there.
pub(crate) fn pod_added(
    cluster: &Cluster,
    other: &PodInfo,
    pod: &PodInfo,
    rejected_by: Plugins,
) -> bool {
    (rejected_by.contains(Plugin::InterPodAffinity) && any_matches(cluster, &pod.affinity, other))
        || (rejected_by.contains(Plugin::PodTopologySpread) && spreads_with(pod, other))
}

/// A pod left the node (absent when that is gone too), or changed there.
pub(crate) fn pod_removed(
    cluster: &Cluster,
    node: Option<&NodeInfo>,
    other: &PodInfo,
    pod: &PodInfo,
    rejected_by: Plugins,
) -> bool {
    (rejected_by.any(&[Plugin::NodeResourcesFit, Plugin::NodePorts])
        && node.is_some_and(|node| fits_alone(pod, node)))
        || (rejected_by.contains(Plugin::InterPodAffinity)
            && (any_matches(cluster, &pod.anti_affinity, other)
                || any_matches(cluster, &other.anti_affinity, pod)
                // With the last of its kind gone, the pod may be the first.
                || any_matches(cluster, &pod.affinity, other)))
        || (rejected_by.contains(Plugin::PodTopologySpread) && spreads_with(pod, other))
}

fn any_matches(cluster: &Cluster, terms: &[AffinityTerm], other: &PodInfo) -> bool {
    let labels = cluster.namespace_labels(&other.namespace);
    terms.iter().any(|term| term.matches(&other.namespace, labels, &other.labels))
}

fn spreads_with(pod: &PodInfo, other: &PodInfo) -> bool {
    pod.namespace == other.namespace
        && pod.spread.iter().any(|constraint| constraint.selector.matches(&other.labels))
}
