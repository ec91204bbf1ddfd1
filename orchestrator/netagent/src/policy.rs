//! NetworkPolicy on this node: from what the API server says to what the eBPF maps hold.
//!
//! ```text
//! pods, namespaces, policies, nodes ──> world ──> orch_policy::compile ──> engine ──> maps
//! `policy` plugin ──> socket ──> task (ADD is answered once the endpoint's row is in force)
//! links and addresses of the node ──> node ──> programs on the ways out, `addresses`
//! ```
//!
//! Start reading in `task`, which says when to look, and `look`, which does. The maps and programs outlive the agent; one
//! that starts takes them over and changes nothing before it knows the whole cluster.

pub mod engine;
pub mod explain;
pub mod node;
pub mod rows;
pub mod strays;
pub mod world;

mod adopt;
pub(crate) mod caches;
mod connections;
mod keys;
mod look;
pub(crate) mod metrics;
pub(crate) mod socket;
pub(crate) mod start;
pub(crate) mod task;
mod waiting;

use std::path::PathBuf;

use orch_config::Paths;

pub(crate) use adopt::cni;

/// Name of the plugin's executable.
pub const PLUGIN: &str = "policy";

/// Where the plugin keeps what DEL has to know.
#[must_use]
pub fn state_dir(paths: &Paths) -> PathBuf {
    paths.run().join("policy")
}

/// Where the agent says what the numbers of rules in flow events mean.
#[must_use]
pub fn rules_file(paths: &Paths) -> PathBuf {
    state_dir(paths).join("rules.json")
}

/// Where the agent listens for the plugin.
#[must_use]
pub fn socket_path(paths: &Paths) -> PathBuf {
    paths.run().join("policy.sock")
}

/// The plugin's part of the CNI configuration list.
#[must_use]
pub fn plugin_conf(paths: &Paths) -> serde_json::Value {
    serde_json::json!({
        "type": PLUGIN,
        "root": paths.root(),
        "stateDir": state_dir(paths),
        "socket": socket_path(paths),
    })
}
