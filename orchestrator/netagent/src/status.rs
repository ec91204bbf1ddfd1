//! What the agent knows of the network, for `orchctl status`: a JSON file, written whole whenever it changed.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::files::{FileError, write_atomic};

/// Changes within this time are written together.
const GATHER: Duration = Duration::from_millis(200);

/// The network as this node sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetStatus {
    /// Name of the node.
    pub node: String,
    /// Its address on the underlay.
    pub node_ip: String,
    /// Seconds since the epoch at the last change.
    pub changed_at: u64,
    /// `unknown`, `healthy`, or why etcd is away.
    pub etcd: String,
    /// The pod network.
    pub network: Option<String>,
    /// This node's subnet.
    pub subnet: Option<String>,
    /// The IPv6 pod network.
    pub network_v6: Option<String>,
    /// This node's IPv6 subnet.
    pub subnet_v6: Option<String>,
    /// How packets get to other nodes: `vxlan`, `direct-routing` or `host-gw`.
    pub mode: Option<String>,
    /// The VXLAN device.
    pub device: Option<DeviceStatus>,
    /// Remote nodes that are programmed.
    pub peers: Vec<PeerStatus>,
    /// Services in the kernel.
    pub services: ServiceStatus,
    /// The part of it that sockets do.
    pub connect_time: ConnectTimeStatus,
    /// NetworkPolicies in the kernel.
    pub policy: PolicyStatus,
    /// The short way of packets whose flow is known.
    pub fast_path: FastPathStatus,
    /// Packets larger than 64 KiB.
    pub big_tcp: BigTcpStatus,
    /// Address of the DNS server, once it has names.
    pub dns: Option<String>,
    /// What is wrong and wants a person.
    pub problems: Vec<String>,
}

/// The VXLAN device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DeviceStatus {
    /// Name of the link.
    pub name: String,
    /// Its MAC.
    pub vtep_mac: String,
    /// Its MTU, which is that of pods.
    pub mtu: u32,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
}

/// A remote node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerStatus {
    /// Its subnet.
    pub subnet: String,
    /// Its address on the underlay.
    pub public_ip: String,
    /// MAC of its VTEP.
    pub vtep_mac: String,
}

/// Services in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// Service ports.
    pub ports: usize,
    /// Their endpoints.
    pub endpoints: usize,
    /// Whether the kernel holds the last known state.
    pub in_force: bool,
}

/// Services at connect time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectTimeStatus {
    /// Whether sockets of pods get their endpoint, from maps that follow the Services.
    pub in_force: bool,
    /// What is wrong and wants a person.
    pub problem: Option<String>,
}

/// NetworkPolicies in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyStatus {
    /// What the node was told: `off`, `auto` or `on`.
    pub mode: String,
    /// Whether programs judge this node's pods.
    pub enforced: bool,
    /// Pods of this node that are judged.
    pub endpoints: usize,
    /// Policies of the cluster.
    pub policies: usize,
    /// Grows with every change of what applies to a pod.
    pub revision: u64,
    /// What is wrong and wants a person.
    pub problems: Vec<String>,
}

/// The short way of packets whose flow is known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FastPathStatus {
    /// Whether this node is to have it.
    pub on: bool,
    /// Links that have it.
    pub links: usize,
    /// Why it is not as it must be.
    pub problem: Option<String>,
}

/// Packets larger than 64 KiB before they are cut into frames.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BigTcpStatus {
    /// The setting that is followed: `auto`, `on` or `off`; empty until there is a network.
    pub setting: String,
    /// Whether this node has it.
    pub on: bool,
    /// Bytes of the largest packets; 0 if that is not known.
    pub size: u32,
    /// Pods whose links have been seen to.
    pub pods: usize,
    /// Why it is off.
    pub why: Option<String>,
    /// Why it is not as it must be.
    pub problem: Option<String>,
}

impl NetStatus {
    /// Reads a node's file.
    ///
    /// # Errors
    /// If there is none, or it is not ours.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError::Read { path: path.to_owned(), source };
        let text = std::fs::read(path).map_err(failed)?;
        serde_json::from_slice(&text).map_err(|error| failed(error.into()))
    }
}

/// Writes the file after each change until cancelled.
pub(crate) async fn write_changes(
    path: std::path::PathBuf,
    mut status: watch::Receiver<NetStatus>,
    cancel: CancellationToken,
) {
    let mut last = NetStatus::default();
    loop {
        let mut now = status.borrow_and_update().clone();
        crate::metrics::status_changed(&now);
        now.changed_at = last.changed_at;
        if now != last {
            now.changed_at =
                SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let text = serde_json::to_vec_pretty(&now).expect("plain data has a JSON form");
            if let Err(error) = write_atomic(&path, &text) {
                warn!(error = %crate::chain(&error), "the network status is not written");
            }
            last = now;
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = status.changed() => if changed.is_err() { return },
        }
        sleep(GATHER).await;
    }
}
