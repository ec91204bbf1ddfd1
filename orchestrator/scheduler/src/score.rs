//! Score plugins: which of the nodes that can take a pod suits it best.
//!
//! Each plugin gives every feasible node 0 to 100; the total is their weighted sum, with upstream's weights
//! (`apis/config/v1/default_plugins.go`).

use crate::filter::Cycle;
use crate::node_info::NodeInfo;

mod inter_pod_affinity;
mod node;
mod resources;
mod spread;

/// The best score of one plugin.
pub(crate) const MAX: i64 = 100;

/// Scores of one plugin, one per feasible node.
type Scores = Vec<i64>;
type Score = fn(&Cycle<'_>, &[&NodeInfo]) -> Option<Scores>;

/// Name, weight, function. A plugin that has nothing to say about the pod returns `None`.
const SCORES: &[(&str, i64, Score)] = &[
    ("TaintToleration", 3, node::taints),
    ("NodeAffinity", 2, node::affinity),
    ("NodeResourcesFit", 1, resources::least_allocated),
    ("PodTopologySpread", 2, spread::score),
    ("InterPodAffinity", 2, inter_pod_affinity::score),
    ("NodeResourcesBalancedAllocation", 1, resources::balanced),
    ("ImageLocality", 1, node::images),
];

/// Total score of each node.
#[must_use]
pub fn score(cycle: &Cycle<'_>, nodes: &[&NodeInfo]) -> Vec<i64> {
    let mut totals = vec![0; nodes.len()];
    for (_, weight, plugin) in SCORES {
        for (total, score) in totals.iter_mut().zip(plugin(cycle, nodes).unwrap_or_default()) {
            *total += weight * score;
        }
    }
    totals
}

/// Stretches scores to 0…100 by the largest one; `reverse` makes the largest the worst.
fn normalize(scores: &mut [i64], reverse: bool) {
    let largest = scores.iter().copied().max().unwrap_or_default();
    for score in scores {
        let share = if largest == 0 { 0 } else { MAX * *score / largest };
        *score = if reverse { MAX - share } else { share };
    }
}

#[cfg(test)]
mod tests;
