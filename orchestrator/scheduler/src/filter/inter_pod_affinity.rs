//! `InterPodAffinity`, the required part: three counts per topology pair, made once per pod; a node then costs as
//! much as the pod has terms (upstream, `plugins/interpodaffinity/filtering.go`).

use std::collections::HashMap;

use super::{Cycle, Reasons};
use crate::cluster::Cluster;
use crate::node_info::NodeInfo;
use crate::pod_info::PodInfo;
use crate::terms::AffinityTerm;

/// Pods by (topology key, value) of their node.
type Pairs<'a> = HashMap<(&'a str, &'a str), i64>;

#[derive(Debug, Default)]
pub(super) struct Counts<'a> {
    /// Existing pods whose anti-affinity speaks of the incoming pod.
    repelled_by: Pairs<'a>,
    /// Existing pods that match all affinity terms of the incoming pod.
    attracted_to: Pairs<'a>,
    /// Existing pods that match an anti-affinity term of the incoming pod.
    repelled_from: Pairs<'a>,
}

fn note<'a>(pairs: &mut Pairs<'a>, term: &'a AffinityTerm, node: &'a NodeInfo) {
    if let Some(value) = node.labels.get(&term.topology_key) {
        *pairs.entry((&term.topology_key, value)).or_default() += 1;
    }
}

pub(super) fn count<'a>(cluster: &'a Cluster, pod: &'a PodInfo) -> Counts<'a> {
    let mut counts = Counts::default();
    let own_labels = cluster.namespace_labels(&pod.namespace);
    for node in cluster.repelling_nodes() {
        for existing in node.repelling.values() {
            for term in &existing.anti_affinity {
                if term.matches(&pod.namespace, own_labels, &pod.labels) {
                    note(&mut counts.repelled_by, term, node);
                }
            }
        }
    }
    if pod.affinity.is_empty() && pod.anti_affinity.is_empty() {
        return counts;
    }
    for node in cluster.nodes() {
        for existing in node.pods.values() {
            let labels = cluster.namespace_labels(&existing.namespace);
            let matches =
                |term: &&AffinityTerm| term.matches(&existing.namespace, labels, &existing.labels);
            if !pod.affinity.is_empty() && pod.affinity.iter().all(|term| matches(&term)) {
                for term in &pod.affinity {
                    note(&mut counts.attracted_to, term, node);
                }
            }
            for term in pod.anti_affinity.iter().filter(matches) {
                note(&mut counts.repelled_from, term, node);
            }
        }
    }
    counts
}

/// Whether the pod is one of those its own affinity asks for: the first of a group may start anywhere.
fn matches_own_terms(cluster: &Cluster, pod: &PodInfo) -> bool {
    let labels = cluster.namespace_labels(&pod.namespace);
    pod.affinity.iter().all(|term| term.matches(&pod.namespace, labels, &pod.labels))
}

pub(super) fn filter(cycle: &Cycle<'_>, node: &NodeInfo) -> Result<(), Reasons> {
    let counts = &cycle.affinity;
    let at = |pairs: &Pairs<'_>, term: &AffinityTerm| {
        let value = node.labels.get(&term.topology_key)?;
        pairs.get(&(term.topology_key.as_str(), value.as_str())).copied()
    };
    let pod = cycle.pod;
    let near = pod.affinity.iter().all(|term| at(&counts.attracted_to, term).is_some());
    let first_of_its_kind = || {
        counts.attracted_to.is_empty()
            && pod.affinity.iter().all(|term| node.labels.contains_key(&term.topology_key))
            && matches_own_terms(cycle.cluster, pod)
    };
    if !near && !first_of_its_kind() {
        return Err(vec!["node(s) didn't match pod affinity rules".into()]);
    }
    if pod.anti_affinity.iter().any(|term| at(&counts.repelled_from, term).is_some()) {
        return Err(vec!["node(s) didn't match pod anti-affinity rules".into()]);
    }
    let repelled = counts
        .repelled_by
        .keys()
        .any(|(key, value)| node.labels.get(*key).is_some_and(|own| own == value));
    if repelled {
        return Err(vec!["node(s) didn't satisfy existing pods anti-affinity rules".into()]);
    }
    Ok(())
}
