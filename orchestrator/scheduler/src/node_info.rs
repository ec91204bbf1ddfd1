//! One node with the pods on it: what is used, and what is left.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use orch_api::k8s_openapi::api::core::v1::{Node, Taint};
use orch_api::pod::Resources;

use crate::pod_info::{HostPort, PodInfo, Uid};
use crate::terms::Labels;

/// A node as the plugins read it.
#[derive(Debug, Default)]
pub struct NodeInfo {
    pub(crate) name: String,
    /// Absent while pods are bound to a node that is not (or no longer) registered.
    pub(crate) node: Option<Arc<Node>>,
    pub(crate) labels: Labels,
    pub(crate) taints: Vec<Taint>,
    pub(crate) unschedulable: bool,
    pub(crate) allocatable: Resources,
    /// Size by image name.
    pub(crate) images: HashMap<String, i64>,
    pub(crate) pods: HashMap<Uid, Arc<PodInfo>>,
    pub(crate) requested: Resources,
    pub(crate) scored_milli_cpu: i64,
    pub(crate) scored_memory_bytes: i64,
    pub(crate) host_ports: Vec<HostPort>,
    /// Pods by managing owner, the terminating ones left out; keeps default spreading cheap.
    pub(crate) owners: BTreeMap<Arc<str>, i64>,
    /// The pods here that have required anti-affinity.
    pub(crate) repelling: HashMap<Uid, Arc<PodInfo>>,
    /// The pods here with terms that count for other pods' scores.
    pub(crate) opinionated: HashMap<Uid, Arc<PodInfo>>,
}

impl NodeInfo {
    pub(crate) fn named(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    pub(crate) fn set_node(&mut self, node: Arc<Node>) {
        let spec = node.spec.as_ref();
        self.labels = node.metadata.labels.clone().unwrap_or_default();
        self.taints = spec.and_then(|spec| spec.taints.clone()).unwrap_or_default();
        self.unschedulable = spec.and_then(|spec| spec.unschedulable).unwrap_or_default();
        self.allocatable = orch_api::node::allocatable(&node);
        self.images = node
            .status
            .iter()
            .flat_map(|status| status.images.iter().flatten())
            .flat_map(|image| {
                let size = image.size_bytes.unwrap_or_default();
                image.names.iter().flatten().map(move |name| (name.clone(), size))
            })
            .collect();
        self.node = Some(node);
    }

    pub(crate) fn add_pod(&mut self, pod: &Arc<PodInfo>) {
        self.requested.add(&pod.requests);
        self.scored_milli_cpu = self.scored_milli_cpu.saturating_add(pod.scored_milli_cpu);
        self.scored_memory_bytes = self.scored_memory_bytes.saturating_add(pod.scored_memory_bytes);
        self.host_ports.extend(pod.host_ports.iter().cloned());
        if let Some(owner) = counted_owner(pod) {
            *self.owners.entry(owner.clone()).or_default() += 1;
        }
        if !pod.anti_affinity.is_empty() {
            self.repelling.insert(pod.uid.clone(), pod.clone());
        }
        if !pod.affinity.is_empty() || !pod.preferred_affinity.is_empty() {
            self.opinionated.insert(pod.uid.clone(), pod.clone());
        }
        self.pods.insert(pod.uid.clone(), pod.clone());
    }

    pub(crate) fn remove_pod(&mut self, uid: &str) {
        let Some(pod) = self.pods.remove(uid) else { return };
        self.requested.subtract(&pod.requests);
        self.scored_milli_cpu -= pod.scored_milli_cpu;
        self.scored_memory_bytes -= pod.scored_memory_bytes;
        for port in &pod.host_ports {
            if let Some(index) = self.host_ports.iter().position(|taken| taken == port) {
                self.host_ports.swap_remove(index);
            }
        }
        if let Some(owner) = counted_owner(&pod)
            && let Some(count) = self.owners.get_mut(owner)
        {
            *count -= 1;
            if *count == 0 {
                self.owners.remove(owner);
            }
        }
        self.repelling.remove(uid);
        self.opinionated.remove(uid);
    }
}

fn counted_owner(pod: &PodInfo) -> Option<&Arc<str>> {
    pod.owner.as_ref().filter(|_| !orch_api::pod::is_terminating(&pod.pod))
}
