//! The parsed form of what a pod demands of nodes and of other pods. Parsed once per pod, matched many times.

use std::collections::BTreeMap;

use orch_api::Selector;
use orch_api::k8s_openapi::api::core::v1::{
    NodeSelectorRequirement, NodeSelectorTerm, PodAffinityTerm, TopologySpreadConstraint,
};

/// Label every node carries with its own name as the value.
pub(crate) const HOSTNAME: &str = "kubernetes.io/hostname";
/// Label of a node's zone.
pub(crate) const ZONE: &str = "topology.kubernetes.io/zone";

pub(crate) type Labels = BTreeMap<String, String>;

/// One term of a node selector: labels and `metadata.name` must match. A term that says nothing, or that cannot be
/// understood, matches no node (Kubernetes, "Node affinity").
#[derive(Debug, Clone)]
pub(crate) struct NodeTerm {
    labels: Option<Selector>,
    /// `(In, values)` over the node's name.
    names: Vec<(bool, Vec<String>)>,
}

impl NodeTerm {
    pub(crate) fn parse(term: &NodeSelectorTerm) -> Self {
        let expressions = term.match_expressions.as_deref().unwrap_or_default();
        let fields = term.match_fields.as_deref().unwrap_or_default();
        let nothing = Self { labels: None, names: Vec::new() };
        if expressions.is_empty() && fields.is_empty() {
            return nothing;
        }
        let mut labels = Selector::everything();
        for NodeSelectorRequirement { key, operator, values } in expressions {
            if labels.require(key, operator, values.as_deref().unwrap_or_default()).is_err() {
                return nothing;
            }
        }
        let mut names = Vec::new();
        for NodeSelectorRequirement { key, operator, values } in fields {
            let within = match operator.as_str() {
                "In" => true,
                "NotIn" => false,
                _ => return nothing,
            };
            if key != "metadata.name" {
                return nothing;
            }
            names.push((within, values.clone().unwrap_or_default()));
        }
        Self { labels: Some(labels), names }
    }

    pub(crate) fn matches(&self, node: &str, node_labels: &Labels) -> bool {
        self.labels.as_ref().is_some_and(|labels| labels.matches(node_labels))
            && self
                .names
                .iter()
                .all(|(within, names)| names.iter().any(|name| name == node) == *within)
    }

    /// The only nodes that can match, when the term names them.
    pub(crate) fn named_nodes(&self) -> Option<&[String]> {
        self.names.iter().find(|(within, _)| *within).map(|(_, names)| names.as_slice())
    }
}

/// One term of inter-pod affinity: which pods, in which namespaces, and what counts as the same place.
#[derive(Debug, Clone)]
pub(crate) struct AffinityTerm {
    selector: Selector,
    namespaces: Vec<String>,
    namespace_selector: Selector,
    pub(crate) topology_key: String,
}

impl AffinityTerm {
    /// `namespace` and `labels` are those of the pod that carries the term.
    pub(crate) fn parse(term: &PodAffinityTerm, namespace: &str, labels: &Labels) -> Self {
        let mut selector = parse_selector(term.label_selector.as_ref());
        let keys = |keys: &Option<Vec<String>>, operator: &str, selector: &mut Selector| {
            for key in keys.iter().flatten() {
                if let Some(value) = labels.get(key) {
                    // A label value always makes a valid requirement.
                    let _ = selector.require(key, operator, std::slice::from_ref(value));
                }
            }
        };
        keys(&term.match_label_keys, "In", &mut selector);
        keys(&term.mismatch_label_keys, "NotIn", &mut selector);
        let mut namespaces = term.namespaces.clone().unwrap_or_default();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.push(namespace.to_owned());
        }
        Self {
            selector,
            namespaces,
            namespace_selector: parse_selector(term.namespace_selector.as_ref()),
            topology_key: term.topology_key.clone(),
        }
    }

    /// Whether a pod with these labels, in this namespace, is one the term speaks of.
    pub(crate) fn matches(
        &self,
        namespace: &str,
        namespace_labels: &Labels,
        labels: &Labels,
    ) -> bool {
        (self.namespaces.iter().any(|name| name == namespace)
            || self.namespace_selector.matches(namespace_labels))
            && self.selector.matches(labels)
    }
}

/// An absent selector matches nothing, an empty one everything; one that cannot be understood, nothing.
fn parse_selector(
    selector: Option<&orch_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector>,
) -> Selector {
    selector
        .and_then(|selector| Selector::from_label_selector(selector).ok())
        .unwrap_or_else(Selector::nothing)
}

/// One topology spread constraint.
#[derive(Debug, Clone)]
pub(crate) struct SpreadConstraint {
    pub(crate) max_skew: i64,
    pub(crate) topology_key: String,
    pub(crate) hard: bool,
    pub(crate) min_domains: usize,
    pub(crate) honor_affinity: bool,
    pub(crate) honor_taints: bool,
    pub(crate) selector: Selector,
}

impl SpreadConstraint {
    pub(crate) fn parse(constraint: &TopologySpreadConstraint, labels: &Labels) -> Self {
        let mut selector = parse_selector(constraint.label_selector.as_ref());
        for key in constraint.match_label_keys.iter().flatten() {
            if let Some(value) = labels.get(key) {
                // A label value always makes a valid requirement.
                let _ = selector.require(key, "In", std::slice::from_ref(value));
            }
        }
        Self {
            max_skew: i64::from(constraint.max_skew),
            topology_key: constraint.topology_key.clone(),
            hard: constraint.when_unsatisfiable == "DoNotSchedule",
            min_domains: constraint.min_domains.and_then(|n| usize::try_from(n).ok()).unwrap_or(1),
            honor_affinity: constraint.node_affinity_policy.as_deref() != Some("Ignore"),
            honor_taints: constraint.node_taints_policy.as_deref() == Some("Honor"),
            selector,
        }
    }
}
