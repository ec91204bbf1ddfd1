//! The network agent: everything one node needs so that pods, Services and names work on it.
//!
//! [`run`] starts one task for each part and keeps them running; start reading there, in [`agent`](run).
//!
//! - [`lease`] holds the node's subnet in etcd and follows those of the other nodes (flannel's schema).
//! - [`overlay`] makes the VXLAN device, and route, neighbour and FDB entry of every other node, equal to the leases.
//! - [`services`] writes Services and the pod network's masquerade into one nftables table.
//! - [`dns`] answers the cluster's names on this node.
//! - [`policy`] enforces NetworkPolicies with eBPF programs.
//! - [`fast_path`] lets packets of known flows pass by the kernel's long way.
//! - [`big_tcp`] lets pods send packets larger than 64 KiB.
//! - [`metrics`] counts for Prometheus.
//! - [`files`] tells CNI plugins (`subnet.env`, the configuration list), `node` the API server (`podCIDR`), and
//!   [`status`] people what there is.
//!
//! What is in the kernel outlives the agent. A part that loses its source (etcd, the API server) keeps what it has; a
//! part that starts compares before it writes.

pub mod big_tcp;
pub mod dns;
pub mod fast_path;
pub mod files;
pub mod lease;
pub mod mac;
pub mod metrics;
pub mod overlay;
pub mod policy;
pub mod services;
pub mod status;
pub mod sysctl;

mod agent;
mod links;
mod mode;
mod node;
mod options;

pub use agent::{Error, run};
pub use lease::EtcdConfig;
pub use mode::Mode;
pub use options::Options;
/// The network configuration in etcd, which is a word of all programs.
pub use orch_config::network;

/// An error and its causes as one sentence.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some errors repeat their cause in their own words.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
