//! PriorityClasses (scheduling.k8s.io/v1): upstream's numbers and the two classes that every cluster has.

/// API group.
pub const GROUP: &str = "scheduling.k8s.io";
/// The two built-in classes: name, value, description.
pub const SYSTEM_CLASSES: [(&str, i64, &str); 2] = [
    (
        "system-cluster-critical",
        2_000_000_000,
        "For pods that the cluster needs, but that may move to another node.",
    ),
    (
        "system-node-critical",
        2_000_001_000,
        "For pods that their node needs: nothing is more important.",
    ),
];
/// Begin of the names that only those have.
pub const RESERVED_PREFIX: &str = "system-";
/// Highest value of a class that is not built in.
pub const HIGHEST: i64 = 1_000_000_000;
/// What a class says about preemption unless it says something else.
pub const PREEMPT: &str = "PreemptLowerPriority";
/// What a class may say about preemption.
pub const POLICIES: [&str; 2] = ["Never", PREEMPT];
