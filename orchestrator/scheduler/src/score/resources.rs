//! Scores by CPU and memory: the emptiest node, and the node where both fill up evenly.

use super::{MAX, Scores};
use crate::filter::Cycle;
use crate::node_info::NodeInfo;

/// The mean share of CPU and memory that stays free with the pod on the node.
pub(super) fn least_allocated(cycle: &Cycle<'_>, nodes: &[&NodeInfo]) -> Option<Scores> {
    let pod = cycle.pod;
    let score = |node: &&NodeInfo| {
        let free = [
            (node.scored_milli_cpu, pod.scored_milli_cpu, node.allocatable.cpu_milli),
            (node.scored_memory_bytes, pod.scored_memory_bytes, node.allocatable.memory_bytes),
        ]
        .map(|(used, wanted, have)| {
            let left = have.saturating_sub(used).saturating_sub(wanted);
            // Bytes times a hundred stay far below what 128 bits hold.
            (have > 0)
                .then(|| (i128::from(left.max(0)) * i128::from(MAX) / i128::from(have)) as i64)
        });
        let known: Vec<i64> = free.into_iter().flatten().collect();
        known.iter().sum::<i64>() / i64::try_from(known.len()).unwrap_or(1).max(1)
    };
    Some(nodes.iter().map(score).collect())
}

/// The smaller the difference between the used shares of CPU and memory, the better. Pods that request neither
/// have no say.
pub(super) fn balanced(cycle: &Cycle<'_>, nodes: &[&NodeInfo]) -> Option<Scores> {
    let want = &cycle.pod.requests;
    if want.cpu_milli == 0 && want.memory_bytes == 0 {
        return None;
    }
    let score = |node: &&NodeInfo| {
        let share = |used: i64, wanted: i64, have: i64| {
            (have > 0).then(|| (used.saturating_add(wanted) as f64 / have as f64).min(1.0))
        };
        let cpu = share(node.requested.cpu_milli, want.cpu_milli, node.allocatable.cpu_milli);
        let memory =
            share(node.requested.memory_bytes, want.memory_bytes, node.allocatable.memory_bytes);
        let deviation = cpu.zip(memory).map_or(0.0, |(cpu, memory)| (cpu - memory).abs() / 2.0);
        ((1.0 - deviation) * MAX as f64) as i64
    };
    Some(nodes.iter().map(score).collect())
}
