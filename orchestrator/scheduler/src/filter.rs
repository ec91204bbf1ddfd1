//! Filter plugins: whether a pod can run on a node at all, and if not, why, in upstream's words.
//!
//! Each plugin is a pure function of the [`Cycle`] (the pod, the cluster, and what was counted once for this pod)
//! and one node. The first plugin that objects ends the node's chances; it may name several reasons.

use std::borrow::Cow;

use crate::cluster::Cluster;
use crate::node_info::NodeInfo;
use crate::pod_info::PodInfo;

mod inter_pod_affinity;
mod node;
mod resources;
mod spread;

pub(crate) use node::{hard_taint, has_required_affinity};
pub(crate) use spread::{counted, includes};

/// The plugins that can reject a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Plugin {
    NodeUnschedulable,
    NodeName,
    TaintToleration,
    NodeAffinity,
    NodePorts,
    NodeResourcesFit,
    PodTopologySpread,
    InterPodAffinity,
}

/// A set of [`Plugin`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Plugins(u8);

impl Plugins {
    /// Adds one.
    pub fn insert(&mut self, plugin: Plugin) {
        self.0 |= 1 << plugin as u8;
    }

    /// Whether it is in the set.
    #[must_use]
    pub fn contains(self, plugin: Plugin) -> bool {
        self.0 & (1 << plugin as u8) != 0
    }

    /// Whether any of these is in the set.
    #[must_use]
    pub fn any(self, plugins: &[Plugin]) -> bool {
        plugins.iter().any(|plugin| self.contains(*plugin))
    }
}

/// Why a node is not fit for a pod; more than one where several resources are short.
pub type Reasons = Vec<Cow<'static, str>>;

/// One attempt to place one pod: the pod, the cluster, and the counts over the cluster that its plugins need.
#[derive(Debug)]
pub struct Cycle<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) pod: &'a PodInfo,
    affinity: inter_pod_affinity::Counts<'a>,
    spread: spread::Counts<'a>,
}

impl<'a> Cycle<'a> {
    /// Counts what the pod's own terms, and other pods' terms about it, need. Costs nothing per pod of the cluster
    /// unless such terms exist.
    #[must_use]
    pub fn new(cluster: &'a Cluster, pod: &'a PodInfo) -> Self {
        Self {
            cluster,
            pod,
            affinity: inter_pod_affinity::count(cluster, pod),
            spread: spread::count(cluster, pod),
        }
    }

    /// Runs the filters in upstream's order.
    ///
    /// # Errors
    /// The first plugin that rejects the node, and why.
    pub fn filter(&self, node: &NodeInfo) -> Result<(), (Plugin, Reasons)> {
        for (plugin, filter) in FILTERS {
            filter(self, node).map_err(|reasons| (*plugin, reasons))?;
        }
        Ok(())
    }
}

type Filter = fn(&Cycle<'_>, &NodeInfo) -> Result<(), Reasons>;

const FILTERS: &[(Plugin, Filter)] = &[
    (Plugin::NodeUnschedulable, node::unschedulable),
    (Plugin::NodeName, node::name),
    (Plugin::TaintToleration, node::taints),
    (Plugin::NodeAffinity, node::affinity),
    (Plugin::NodePorts, node::ports),
    (Plugin::NodeResourcesFit, resources::fit),
    (Plugin::PodTopologySpread, spread::filter),
    (Plugin::InterPodAffinity, inter_pod_affinity::filter),
];

/// Whether the node could take the pod as far as the node alone decides: everything but other pods' places.
pub(crate) fn fits_alone(pod: &PodInfo, node: &NodeInfo) -> bool {
    node.node.is_some()
        && node::is_schedulable(pod, node)
        && node::is_named(pod, node)
        && hard_taint(pod, node).is_none()
        && has_required_affinity(pod, node)
        && node::has_free_ports(pod, node)
        && resources::shortages(pod, node).is_empty()
}

#[cfg(test)]
mod tests;
