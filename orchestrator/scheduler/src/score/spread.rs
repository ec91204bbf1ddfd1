//! `PodTopologySpread`, the `ScheduleAnyway` part (upstream, `plugins/podtopologyspread/scoring.go`).
//!
//! A pod without constraints of its own is spread over hosts and zones with its siblings: the pods of the same
//! owner, or, without an owner, those that its Services select. Siblings of an owner are counted per node as they
//! come and go, so the default costs one look per node.

use std::collections::{HashMap, HashSet};

use orch_api::Selector;

use super::{MAX, Scores};
use crate::filter::{Cycle, counted, includes};
use crate::node_info::NodeInfo;
use crate::terms::{HOSTNAME, SpreadConstraint, ZONE};

/// Upstream's system default: hosts may differ by 3, zones by 5.
const DEFAULT_SKEW: [(&str, i64); 2] = [(HOSTNAME, 3), (ZONE, 5)];

enum Group {
    Owner(std::sync::Arc<str>),
    Selected,
}

pub(super) fn score(cycle: &Cycle<'_>, nodes: &[&NodeInfo]) -> Option<Scores> {
    let pod = cycle.pod;
    let explicit = !pod.spread.is_empty();
    let (constraints, group) = if explicit {
        (
            pod.spread.iter().filter(|constraint| !constraint.hard).cloned().collect(),
            Group::Selected,
        )
    } else {
        default_constraints(cycle)
    };
    if constraints.is_empty() {
        return None;
    }
    let count = |constraint: &SpreadConstraint, node: &NodeInfo| match &group {
        Group::Owner(owner) => node.owners.get(owner).copied().unwrap_or_default(),
        Group::Selected => counted(constraint, pod, node),
    };
    // Own constraints leave out nodes without the labels; the defaults score every node.
    let has_keys = |node: &NodeInfo| {
        !explicit
            || constraints
                .iter()
                .all(|constraint| node.labels.contains_key(&constraint.topology_key))
    };
    let mut totals = vec![0.0_f64; nodes.len()];
    for constraint in &constraints {
        let key = constraint.topology_key.as_str();
        let feasible: HashSet<&str> = nodes
            .iter()
            .filter(|node| has_keys(node))
            .filter_map(|node| node.labels.get(key).map(String::as_str))
            .collect();
        let mut domains: HashMap<&str, i64> = HashMap::new();
        if key != HOSTNAME && !feasible.is_empty() {
            for node in cycle.cluster.nodes() {
                if let Some(value) =
                    node.labels.get(key).filter(|value| feasible.contains(value.as_str()))
                    && has_keys(node)
                    && includes(constraint, pod, node)
                {
                    *domains.entry(value).or_default() += count(constraint, node);
                }
            }
        }
        // A constraint with many domains says more than one with few.
        let weight = (feasible.len() as f64 + 2.0).ln();
        for (total, node) in totals.iter_mut().zip(nodes) {
            if let Some(value) = node.labels.get(key) {
                let pods = if key == HOSTNAME {
                    count(constraint, node)
                } else {
                    domains.get(value.as_str()).copied().unwrap_or_default()
                };
                *total += pods as f64 * weight + (constraint.max_skew - 1) as f64;
            }
        }
    }
    Some(normalize(&totals, |index| has_keys(nodes[index])))
}

/// Few pods become a high score; nodes outside get none.
fn normalize(totals: &[f64], counts: impl Fn(usize) -> bool) -> Scores {
    let inside = || {
        totals
            .iter()
            .enumerate()
            .filter(|(index, _)| counts(*index))
            .map(|(_, total)| total.round() as i64)
    };
    let (least, most) = (inside().min().unwrap_or_default(), inside().max().unwrap_or_default());
    let score = |(index, total): (usize, &f64)| {
        if !counts(index) {
            0
        } else if most == 0 {
            MAX
        } else {
            MAX * (most + least - total.round() as i64) / most
        }
    };
    totals.iter().enumerate().map(score).collect()
}

fn default_constraints(cycle: &Cycle<'_>) -> (Vec<SpreadConstraint>, Group) {
    let make = |selector: &Selector| {
        let constraint = |(key, max_skew): (&str, i64)| SpreadConstraint {
            max_skew,
            topology_key: key.to_owned(),
            hard: false,
            min_domains: 1,
            honor_affinity: true,
            honor_taints: false,
            selector: selector.clone(),
        };
        DEFAULT_SKEW.into_iter().map(constraint).collect()
    };
    if let Some(owner) = &cycle.pod.owner {
        return (make(&Selector::nothing()), Group::Owner(owner.clone()));
    }
    // With several Services the first one decides; upstream asks for all of their selectors at once.
    match cycle.cluster.selecting_services(cycle.pod).next() {
        Some(selector) => (make(selector), Group::Selected),
        None => (Vec::new(), Group::Selected),
    }
}
