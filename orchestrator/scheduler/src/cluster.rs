//! The scheduler's picture of the cluster: nodes with their pods, kept up to date change by change.
//!
//! A pod that was given a node counts there at once (it is *assumed*), before the API server has confirmed the
//! binding; removing it takes that back when the binding fails.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use orch_api::k8s_openapi::api::core::v1::Node;
use orch_api::{Selector, meta};

use crate::node_info::NodeInfo;
use crate::pod_info::{PodInfo, Uid};
use crate::terms::Labels;

/// Nodes, the pods on them, and what else placements depend on.
#[derive(Debug, Default)]
pub struct Cluster {
    nodes: Vec<NodeInfo>,
    index: HashMap<String, usize>,
    /// Node by pod.
    placed: HashMap<Uid, String>,
    assumed: HashSet<Uid>,
    namespaces: HashMap<String, Labels>,
    /// Selector by namespace and name of the Service.
    services: BTreeMap<String, BTreeMap<String, Selector>>,
    /// Names of the nodes with pods that have required anti-affinity.
    repelling: BTreeSet<String>,
    /// Names of the nodes with pods whose affinity counts in the scores of others.
    opinionated: BTreeSet<String>,
    /// On how many nodes an image is.
    image_nodes: HashMap<String, i64>,
    registered: usize,
}

impl Cluster {
    /// All registered nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        self.nodes.iter().filter(|node| node.node.is_some())
    }

    pub(crate) fn slots(&self) -> &[NodeInfo] {
        &self.nodes
    }

    /// How many nodes are registered.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.registered
    }

    pub(crate) fn node(&self, name: &str) -> Option<&NodeInfo> {
        self.index.get(name).map(|index| &self.nodes[*index]).filter(|node| node.node.is_some())
    }

    /// Where a pod is, and the pod.
    pub(crate) fn pod(&self, uid: &str) -> Option<(&str, &Arc<PodInfo>)> {
        let node = self.placed.get(uid)?;
        let pod = self.nodes[*self.index.get(node)?].pods.get(uid)?;
        Some((node, pod))
    }

    pub(crate) fn repelling_nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        self.repelling.iter().filter_map(|name| self.node(name))
    }

    pub(crate) fn opinionated_nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        self.opinionated.iter().filter_map(|name| self.node(name))
    }

    pub(crate) fn namespace_labels(&self, namespace: &str) -> &Labels {
        static NONE: Labels = BTreeMap::new();
        self.namespaces.get(namespace).unwrap_or(&NONE)
    }

    pub(crate) fn image_node_count(&self, image: &str) -> i64 {
        self.image_nodes.get(image).copied().unwrap_or_default()
    }

    /// The Services' selectors that match a pod.
    pub(crate) fn selecting_services<'a>(
        &'a self,
        pod: &'a PodInfo,
    ) -> impl Iterator<Item = &'a Selector> {
        let services = self.services.get(&pod.namespace).into_iter().flat_map(BTreeMap::values);
        services.filter(|selector| selector.matches(&pod.labels))
    }

    fn slot(&mut self, name: &str) -> &mut NodeInfo {
        let index = *self.index.entry(name.to_owned()).or_insert_with(|| {
            self.nodes.push(NodeInfo::named(name));
            self.nodes.len() - 1
        });
        &mut self.nodes[index]
    }

    fn drop_if_empty(&mut self, name: &str) {
        let Some(&index) = self.index.get(name) else { return };
        if self.nodes[index].node.is_some() || !self.nodes[index].pods.is_empty() {
            return;
        }
        self.index.remove(name);
        self.nodes.swap_remove(index);
        if let Some(moved) = self.nodes.get(index) {
            self.index.insert(moved.name.clone(), index);
        }
    }

    fn count_images(&mut self, name: &str, change: i64) {
        let Some(&index) = self.index.get(name) else { return };
        for image in self.nodes[index].images.keys() {
            let count = self.image_nodes.entry(image.clone()).or_default();
            *count += change;
            if *count == 0 {
                self.image_nodes.remove(image);
            }
        }
    }

    /// Adds or replaces a node.
    pub fn set_node(&mut self, node: Arc<Node>) {
        let name = meta::key(&node.metadata);
        self.count_images(&name, -1);
        let slot = self.slot(&name);
        let new = slot.node.is_none();
        slot.set_node(node);
        self.registered += usize::from(new);
        self.count_images(&name, 1);
    }

    /// Removes a node; pods still bound to it stay known until they are deleted.
    pub fn remove_node(&mut self, name: &str) {
        self.count_images(name, -1);
        if let Some(&index) = self.index.get(name) {
            let slot = &mut self.nodes[index];
            self.registered -= usize::from(slot.node.is_some());
            slot.node = None;
            slot.images.clear();
        }
        self.drop_if_empty(name);
    }

    /// Puts a pod on a node, wherever it was before.
    pub fn set_pod(&mut self, node: &str, pod: &Arc<PodInfo>) {
        self.remove_pod(&pod.uid);
        self.slot(node).add_pod(pod);
        self.placed.insert(pod.uid.clone(), node.to_owned());
        self.note_affinity(node);
    }

    /// Counts a pod on the node that was chosen for it, until the API server confirms or refuses.
    pub fn assume(&mut self, node: &str, pod: &Arc<PodInfo>) {
        self.set_pod(node, pod);
        self.assumed.insert(pod.uid.clone());
    }

    /// Whether the pod is placed only by assumption.
    #[must_use]
    pub fn is_assumed(&self, uid: &str) -> bool {
        self.assumed.contains(uid)
    }

    /// Removes a pod; returns the name of its node.
    pub fn remove_pod(&mut self, uid: &str) -> Option<String> {
        self.assumed.remove(uid);
        let node = self.placed.remove(uid)?;
        self.slot(&node).remove_pod(uid);
        self.note_affinity(&node);
        self.drop_if_empty(&node);
        Some(node)
    }

    fn note_affinity(&mut self, name: &str) {
        let Some(&index) = self.index.get(name) else { return };
        let note = |set: &mut BTreeSet<String>, any: bool| {
            if !any {
                set.remove(name);
            } else if !set.contains(name) {
                set.insert(name.to_owned());
            }
        };
        note(&mut self.repelling, !self.nodes[index].repelling.is_empty());
        note(&mut self.opinionated, !self.nodes[index].opinionated.is_empty());
    }

    /// Adds, replaces or removes a namespace's labels.
    pub fn set_namespace(&mut self, name: &str, labels: Option<Labels>) {
        match labels {
            Some(labels) => {
                self.namespaces.insert(name.to_owned(), labels);
            }
            None => {
                self.namespaces.remove(name);
            }
        }
    }

    /// Adds, replaces or removes a Service's selector.
    pub fn set_service(&mut self, namespace: &str, name: &str, selector: Option<Selector>) {
        match selector {
            Some(selector) => {
                self.services
                    .entry(namespace.to_owned())
                    .or_default()
                    .insert(name.to_owned(), selector);
            }
            None => {
                if let Some(services) = self.services.get_mut(namespace) {
                    services.remove(name);
                    if services.is_empty() {
                        self.services.remove(namespace);
                    }
                }
            }
        }
    }
}
