//! `PodTopologySpread`, the `DoNotSchedule` part (upstream, `plugins/podtopologyspread/filtering.go`).

use std::collections::HashMap;

use super::{Cycle, Reasons, hard_taint, has_required_affinity};
use crate::cluster::Cluster;
use crate::node_info::NodeInfo;
use crate::pod_info::PodInfo;
use crate::terms::SpreadConstraint;

/// The counts of one constraint.
#[derive(Debug)]
struct Domains<'a> {
    constraint: &'a SpreadConstraint,
    pods: HashMap<&'a str, i64>,
    fewest: i64,
    includes_itself: bool,
}

#[derive(Debug, Default)]
pub(super) struct Counts<'a>(Vec<Domains<'a>>);

/// Pods of the namespace on this node that the constraint counts.
pub(crate) fn counted(constraint: &SpreadConstraint, pod: &PodInfo, node: &NodeInfo) -> i64 {
    let counts = |existing: &PodInfo| {
        existing.namespace == pod.namespace
            && !orch_api::pod::is_terminating(&existing.pod)
            && constraint.selector.matches(&existing.labels)
    };
    node.pods.values().map(|existing| i64::from(counts(existing))).sum()
}

/// Whether a node's pods count for the constraint at all.
pub(crate) fn includes(constraint: &SpreadConstraint, pod: &PodInfo, node: &NodeInfo) -> bool {
    (!constraint.honor_affinity || has_required_affinity(pod, node))
        && (!constraint.honor_taints || hard_taint(pod, node).is_none())
}

pub(super) fn count<'a>(cluster: &'a Cluster, pod: &'a PodInfo) -> Counts<'a> {
    let hard: Vec<&SpreadConstraint> =
        pod.spread.iter().filter(|constraint| constraint.hard).collect();
    let domains = hard.iter().map(|constraint| {
        let mut pods: HashMap<&str, i64> = HashMap::new();
        for node in cluster.nodes() {
            let all_keys = hard.iter().all(|other| node.labels.contains_key(&other.topology_key));
            if all_keys
                && includes(constraint, pod, node)
                && let Some(value) = node.labels.get(&constraint.topology_key)
            {
                *pods.entry(value).or_default() += counted(constraint, pod, node);
            }
        }
        let fewest = if pods.len() < constraint.min_domains {
            0
        } else {
            pods.values().copied().min().unwrap_or_default()
        };
        let includes_itself = constraint.selector.matches(&pod.labels);
        Domains { constraint, pods, fewest, includes_itself }
    });
    Counts(domains.collect())
}

pub(super) fn filter(cycle: &Cycle<'_>, node: &NodeInfo) -> Result<(), Reasons> {
    for domains in &cycle.spread.0 {
        let Some(value) = node.labels.get(&domains.constraint.topology_key) else {
            return Err(vec![
                "node(s) didn't match pod topology spread constraints (missing required label)"
                    .into(),
            ]);
        };
        let here = domains.pods.get(value.as_str()).copied().unwrap_or_default();
        if here + i64::from(domains.includes_itself) - domains.fewest > domains.constraint.max_skew
        {
            return Err(vec!["node(s) didn't match pod topology spread constraints".into()]);
        }
    }
    Ok(())
}
