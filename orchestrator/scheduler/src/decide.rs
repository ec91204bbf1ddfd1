//! Placing one pod: filter, score, choose. Pure, but for the dice that break ties.

use std::borrow::Cow;
use std::collections::BTreeMap;

use rand::Rng;

use crate::cluster::Cluster;
use crate::filter::{Cycle, Plugin, Plugins, Reasons};
use crate::node_info::NodeInfo;
use crate::pod_info::PodInfo;
use crate::score::score;

/// Below this many nodes all are looked at (upstream, `minFeasibleNodesToFind`).
const MIN_FEASIBLE: usize = 100;
/// Share of nodes to find at least, in per cent.
const MIN_PERCENT: usize = 5;

/// Why a pod fits nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Diagnosis {
    nodes: usize,
    reasons: BTreeMap<Cow<'static, str>, usize>,
    /// The plugins that rejected nodes: only what they look at can help.
    pub rejected_by: Plugins,
}

impl Diagnosis {
    fn note(&mut self, plugin: Plugin, reasons: Reasons) {
        self.rejected_by.insert(plugin);
        for reason in reasons {
            *self.reasons.entry(reason).or_default() += 1;
        }
    }
}

impl std::fmt::Display for Diagnosis {
    /// `0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no nodes available to schedule pods");
        }
        // Upstream sorts the finished texts, counts and all.
        let mut texts: Vec<String> =
            self.reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        texts.sort();
        write!(f, "0/{} nodes are available: {}.", self.nodes, texts.join(", "))
    }
}

/// How many feasible nodes are enough to choose from: all of a small cluster, 5 % of a very large one.
fn enough(nodes: usize) -> usize {
    if nodes < MIN_FEASIBLE {
        return nodes;
    }
    let percent = (50_usize.saturating_sub(nodes / 125)).max(MIN_PERCENT);
    (nodes * percent / 100).max(MIN_FEASIBLE)
}

/// Chooses a node for the pod. `start` is where the search begins; it moves on so that in large clusters all nodes
/// get their turn.
///
/// # Errors
/// Why no node is fit.
pub fn decide<'a>(
    cluster: &'a Cluster,
    pod: &PodInfo,
    start: &mut usize,
    dice: &mut impl Rng,
) -> Result<&'a str, Diagnosis> {
    let cycle = Cycle::new(cluster, pod);
    let mut diagnosis = Diagnosis { nodes: cluster.node_count(), ..Diagnosis::default() };
    let mut feasible: Vec<&'a NodeInfo> = Vec::new();
    let slots = cluster.slots();
    let wanted = enough(cluster.node_count());

    if let Some(named) = named_nodes(pod) {
        // The pod names its nodes, as those of a DaemonSet do: no need to ask the others.
        for node in named.iter().filter_map(|name| cluster.node(name)) {
            if cycle.filter(node).is_ok() {
                feasible.push(node);
            }
        }
    }
    if feasible.is_empty() {
        let mut looked_at = 0;
        for offset in 0..slots.len() {
            let node = &slots[(*start + offset) % slots.len()];
            looked_at += 1;
            if node.node.is_none() {
                continue;
            }
            match cycle.filter(node) {
                Ok(()) => feasible.push(node),
                Err((plugin, reasons)) => diagnosis.note(plugin, reasons),
            }
            if feasible.len() >= wanted {
                break;
            }
        }
        if !slots.is_empty() {
            *start = (*start + looked_at) % slots.len();
        }
    }
    match feasible.as_slice() {
        [] => Err(diagnosis),
        [only] => Ok(&only.name),
        many => Ok(&best(many, &score(&cycle, many), dice).name),
    }
}

/// The only nodes that the required node affinity can match, when every term of it names some.
fn named_nodes(pod: &PodInfo) -> Option<Vec<&String>> {
    let terms = pod.node_terms.as_ref()?;
    let named: Option<Vec<&[String]>> = terms.iter().map(|term| term.named_nodes()).collect();
    let mut names: Vec<&String> = named?.into_iter().flatten().collect();
    names.sort();
    names.dedup();
    Some(names)
}

fn best<'a>(nodes: &[&'a NodeInfo], scores: &[i64], dice: &mut impl Rng) -> &'a NodeInfo {
    let highest = scores.iter().copied().max().unwrap_or_default();
    let top: Vec<&NodeInfo> = nodes
        .iter()
        .zip(scores)
        .filter(|(_, score)| **score == highest)
        .map(|(node, _)| *node)
        .collect();
    top[dice.random_range(0..top.len())]
}

#[cfg(test)]
mod tests;
