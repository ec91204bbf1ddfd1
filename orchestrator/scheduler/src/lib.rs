//! Which node a pod runs on: filter → score → bind (Kubernetes, "Scheduling Framework").
//!
//! Start at [`decide()`], the pure choice over a [`Cluster`] picture; [`mod@filter`] and [`mod@score`] hold the plugins,
//! [`queue`] which pod is next and what wakes a pod that fits nowhere, [`run()`] the task that feeds all of it from
//! the API server and binds. What a pod requests is worked out in `orch-api`; caches are `orch-reconcile`'s.

mod cluster;
mod decide;
mod filter;
mod hints;
mod node_info;
mod pod_info;
mod queue;
mod report;
mod run;
mod score;
mod state;
mod terms;

pub use cluster::Cluster;
pub use decide::{Diagnosis, decide};
pub use filter::{Cycle, Plugin, Plugins, Reasons};
pub use node_info::NodeInfo;
pub use pod_info::{PodInfo, Uid};
pub use queue::Queue;
pub use run::{Error, Options, run};
pub use score::score;
pub use state::{Attempt, State};

#[cfg(test)]
mod testing;
