//! NetworkPolicy on this node: from what the API server says to what the eBPF maps hold.
//!
//! ```text
//! pods, namespaces, policies, nodes ──> world ──> orch_policy::compile ──> engine ──> maps
//! `policy` plugin ──> socket ──> task (ADD is answered once the endpoint's row is in force)
//! links and addresses of the node ──> node ──> programs on the ways out, `addresses`
//! ```
//!
//! Start reading in `task`, which says when to look. The maps and programs outlive the agent; one that starts takes them
//! over and changes nothing before it knows the whole cluster.

pub mod engine;
pub mod explain;
pub mod node;
pub mod rows;
pub mod world;

mod adopt;
pub(crate) mod caches;
mod connections;
mod look;
pub(crate) mod metrics;
pub(crate) mod socket;
pub(crate) mod start;
pub(crate) mod task;
mod waiting;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use orch_config::Paths;

/// Whether the node enforces NetworkPolicies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// It does not; what an earlier run put into the kernel is taken out.
    #[default]
    Off,
    /// It does if the kernel can and the plugin is installed.
    Auto,
    /// It does; without, no pod starts.
    On,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Off, Self::Auto, Self::On];

    /// As in flags.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Auto => "auto",
            Self::On => "on",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| format!("{text:?} is none of off, auto, on"))
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_read_back() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert!("yes".parse::<Mode>().is_err());
    }
}
