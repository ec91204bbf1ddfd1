//! What a node's network agent wrote about itself, as far as it is shown here. The file is JSON, so an agent of another
//! version is read as well.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// `net-status.json` of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct NetStatus {
    /// Name of the node.
    pub(super) node: String,
    /// Its address on the underlay.
    pub(super) node_ip: String,
    /// Seconds since the epoch at the last change.
    pub(super) changed_at: u64,
    /// `unknown`, `healthy`, or why etcd is away.
    pub(super) etcd: String,
    /// The pod network.
    pub(super) network: Option<String>,
    /// This node's subnet.
    pub(super) subnet: Option<String>,
    /// The IPv6 pod network.
    pub(super) network_v6: Option<String>,
    /// This node's IPv6 subnet.
    pub(super) subnet_v6: Option<String>,
    /// How packets get to other nodes.
    pub(super) mode: Option<String>,
    /// The VXLAN device.
    pub(super) device: Option<Device>,
    /// Remote nodes that are programmed.
    pub(super) peers: Vec<Peer>,
    /// Services in the kernel.
    pub(super) services: Services,
    /// The part of it that sockets do.
    pub(super) connect_time: ConnectTime,
    /// NetworkPolicies in the kernel.
    pub(super) policy: Policy,
    /// The short way of packets whose flow is known.
    pub(super) fast_path: FastPath,
    /// Packets larger than 64 KiB.
    pub(super) big_tcp: BigTcp,
    /// What is wrong and wants a person.
    pub(super) problems: Vec<String>,
}

/// Services at connect time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ConnectTime {
    pub(super) in_force: bool,
    pub(super) problem: Option<String>,
}

/// NetworkPolicies in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Policy {
    /// `off`, `auto` or `on`; empty for an agent that knows no policies.
    pub(super) mode: String,
    pub(super) enforced: bool,
    pub(super) endpoints: usize,
    pub(super) problems: Vec<String>,
}

/// The short way of packets whose flow is known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct FastPath {
    pub(super) on: bool,
    pub(super) links: usize,
    pub(super) problem: Option<String>,
}

/// Packets larger than 64 KiB before they are cut into frames.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct BigTcp {
    /// `auto`, `on` or `off`; empty for an agent that knows it not, or has no network yet.
    pub(super) setting: String,
    pub(super) on: bool,
    pub(super) size: u32,
    pub(super) links: usize,
    /// Why it is off.
    pub(super) why: Option<String>,
    pub(super) problem: Option<String>,
}

/// The VXLAN device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) vtep_mac: String,
    pub(super) mtu: u32,
    pub(super) vni: u32,
    pub(super) port: u16,
}

/// A remote node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Peer {
    pub(super) subnet: String,
    pub(super) public_ip: String,
    pub(super) vtep_mac: String,
}

/// Services in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Services {
    pub(super) ports: usize,
    pub(super) endpoints: usize,
    pub(super) in_force: bool,
}

impl NetStatus {
    /// Reads a node's file; `None` if there is none, or it is not ours.
    pub(super) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_of_another_version_is_read_too() {
        let text =
            r#"{"node":"n","peers":[{"publicIp":"192.0.2.2","new":1}],"subnet":null,"more":{}}"#;
        let status: NetStatus = serde_json::from_str(text).expect("readable");
        assert_eq!((status.node.as_str(), status.peers.len()), ("n", 1));
        assert_eq!(status.peers[0].public_ip, "192.0.2.2");
    }
}
