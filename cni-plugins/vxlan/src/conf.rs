//! The plugin's configuration.

use std::path::PathBuf;

use cni_spec::IfName;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Keys of flannel's CNI plugin, and `device`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Conf {
    /// The node's lease.
    #[serde(default = "subnet_file")]
    pub subnet_file: PathBuf,
    /// Folder of the address leases (`host-local`'s, unless `ipam` names another) and of what was delegated.
    #[serde(default = "data_dir")]
    pub data_dir: PathBuf,
    /// Configuration of the delegate, as far as it does not follow from the lease.
    #[serde(default)]
    pub delegate: Option<Map<String, Value>>,
    /// Configuration of the IPAM plugin, likewise.
    #[serde(default)]
    pub ipam: Option<Map<String, Value>>,
    /// The VXLAN device, for STATUS.
    #[serde(default)]
    pub device: Option<IfName>,
}

fn subnet_file() -> PathBuf {
    PathBuf::from("/run/orch/subnet.env")
}

fn data_dir() -> PathBuf {
    PathBuf::from("/var/lib/cni/networks")
}
