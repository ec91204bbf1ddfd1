//! `InterPodAffinity`, the preferred part (upstream, `plugins/interpodaffinity/scoring.go`).

use std::collections::HashMap;

use super::{MAX, Scores};
use crate::filter::Cycle;
use crate::node_info::NodeInfo;
use crate::pod_info::PodInfo;
use crate::terms::AffinityTerm;

/// What a required affinity term of an existing pod counts for a pod that it matches (`hardPodAffinityWeight`).
const HARD_AFFINITY_WEIGHT: i64 = 1;

/// Adds up, per topology pair, what the pod's preferred terms say about the pods there, and what those pods' terms
/// say about it.
pub(super) fn score(cycle: &Cycle<'_>, nodes: &[&NodeInfo]) -> Option<Scores> {
    let (cluster, pod) = (cycle.cluster, cycle.pod);
    let own_labels = cluster.namespace_labels(&pod.namespace);
    let mut pairs: HashMap<(&str, &str), i64> = HashMap::new();

    for node in cluster.opinionated_nodes() {
        for existing in node.opinionated.values() {
            let required = existing.affinity.iter().map(|term| (HARD_AFFINITY_WEIGHT, term));
            let preferred =
                existing.preferred_affinity.iter().map(|(weight, term)| (*weight, term));
            for (weight, term) in required.chain(preferred) {
                if term.matches(&pod.namespace, own_labels, &pod.labels)
                    && let Some(value) = node.labels.get(&term.topology_key)
                {
                    *pairs.entry((&term.topology_key, value)).or_default() += weight;
                }
            }
        }
    }
    if !pod.preferred_affinity.is_empty() {
        for node in cluster.nodes() {
            for (weight, term) in &pod.preferred_affinity {
                if let Some(value) = node.labels.get(&term.topology_key) {
                    let matching =
                        node.pods.values().filter(|existing| speaks_of(cycle, term, existing));
                    let count = i64::try_from(matching.count()).unwrap_or(i64::MAX);
                    *pairs.entry((&term.topology_key, value)).or_default() += weight * count;
                }
            }
        }
    }
    if pairs.is_empty() {
        return None;
    }
    let sum = |node: &&NodeInfo| -> i64 {
        let here = pairs
            .iter()
            .filter(|((key, value), _)| node.labels.get(*key).is_some_and(|own| own == value));
        here.map(|(_, weight)| weight).sum()
    };
    let mut scores: Scores = nodes.iter().map(sum).collect();
    let (least, most) = (scores.iter().copied().min()?, scores.iter().copied().max()?);
    for score in &mut scores {
        *score = if most > least { MAX * (*score - least) / (most - least) } else { 0 };
    }
    Some(scores)
}

fn speaks_of(cycle: &Cycle<'_>, term: &AffinityTerm, existing: &PodInfo) -> bool {
    let labels = cycle.cluster.namespace_labels(&existing.namespace);
    term.matches(&existing.namespace, labels, &existing.labels)
}
