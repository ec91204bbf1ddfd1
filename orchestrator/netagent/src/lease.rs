//! Subnet leases in etcd, flannel's schema (`../shared/reference/networking.md` §3.1, §3.2, §3.8).
//!
//! [`SubnetKey`] and [`LeaseValue`] are the wire; `choose` decides purely which subnet a node takes;
//! [`Registry`] carries that out with transactions; `keep` is the task that holds the lease for the life of the
//! agent and tells the others what the network looks like.
//!
//! Stricter than flannel, and compatible with it: a key is only ever written with a compare; the *same* etcd
//! lease is kept alive, so peers see no event from a renewal; a lost race or a lost key leads to a new
//! acquisition, never to an exit; nobody asks for the TTL of other nodes' keys.

mod choose;
mod keep;
mod registry;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};

pub use choose::{Choice, Identity, choose};
pub use keep::{EtcdHealth, Keeper, Network};
pub use registry::{EtcdConfig, Registry, RegistryError};

use crate::mac::Mac;

/// All leases under a prefix, for the command line.
///
/// # Errors
/// If etcd is away.
pub async fn list(etcd: &EtcdConfig, prefix: &str) -> Result<Leases, RegistryError> {
    Ok(Registry::connect(etcd, prefix).await?.list().await?.0)
}

/// All leases of a network by their key.
pub type Leases = BTreeMap<SubnetKey, Lease>;

/// The last part of a lease's key: `10.5.52.0-24`, with `&<v6>-<len>` behind it in dual stack. Where there is IPv6 alone,
/// the first half is flannel's word for nothing, `0.0.0.0-0`. One half at least is a subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubnetKey {
    /// The node's IPv4 subnet.
    pub v4: Option<Ipv4Network>,
    /// The node's IPv6 subnet.
    pub v6: Option<Ipv6Network>,
}

impl SubnetKey {
    /// Whether pods that have addresses of one may stay under the other: it has the same IPv4 subnet or, where one of them
    /// has none, the same IPv6 subnet.
    #[must_use]
    pub fn is_kin(&self, other: &Self) -> bool {
        match (self.v4, other.v4) {
            (Some(own), Some(other)) => own == other,
            _ => self.v6.is_some() && self.v6 == other.v6,
        }
    }
}

impl fmt::Display for SubnetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.v4 {
            Some(v4) => write!(f, "{}-{}", v4.ip(), v4.prefix())?,
            None => f.write_str(NO_IPV4)?,
        }
        match self.v6 {
            Some(v6) => write!(f, "&{}-{}", v6.ip(), v6.prefix()),
            None => Ok(()),
        }
    }
}

/// First half of a key without IPv4.
const NO_IPV4: &str = "0.0.0.0-0";

/// A key under `subnets/` that is no subnet.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no subnet key; expected e.g. 10.5.52.0-24")]
pub struct BadKey(String);

impl FromStr for SubnetKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        let bad = || BadKey(text.to_owned());
        let (v4, v6) = match text.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (text, None),
        };
        let part = |part: &str| {
            part.rsplit_once('-').map(|(ip, len)| format!("{ip}/{len}")).ok_or_else(bad)
        };
        let v6 = v6.map(|v6| part(v6)?.parse().map_err(|_| bad())).transpose()?;
        if v4 == NO_IPV4 && v6.is_some() {
            return Ok(Self { v4: None, v6 });
        }
        let v4: Ipv4Network = part(v4)?.parse().map_err(|_| bad())?;
        Ok(Self { v4: Some(v4), v6 })
    }
}

/// The JSON value of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseValue {
    /// Address of the node on the underlay.
    #[serde(rename = "PublicIP")]
    pub public_ip: Ipv4Addr,
    /// The same for IPv6; written as `null` if there is none, as flannel does.
    #[serde(rename = "PublicIPv6", default)]
    pub public_ipv6: Option<Ipv6Addr>,
    /// `vxlan` and others; absent in a reservation.
    #[serde(rename = "BackendType", default, skip_serializing_if = "Option::is_none")]
    pub backend_type: Option<String>,
    /// The backend's own data.
    #[serde(rename = "BackendData", default, skip_serializing_if = "Option::is_none")]
    pub backend_data: Option<BackendData>,
    /// The same of the IPv6 device.
    #[serde(rename = "BackendV6Data", default, skip_serializing_if = "Option::is_none")]
    pub backend_v6_data: Option<BackendData>,
}

/// The data of a node's backend: small where it is VXLAN's, which a network has a thousand times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BackendData {
    /// Of a VXLAN node.
    Vxlan(VxlanData),
    /// Of another backend.
    Other(Box<serde_json::Value>),
}

impl BackendData {
    fn vxlan(&self) -> Option<VxlanData> {
        match self {
            Self::Vxlan(data) => Some(*data),
            Self::Other(_) => None,
        }
    }
}

/// `BackendData` of the VXLAN backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VxlanData {
    /// Network identifier.
    #[serde(rename = "VNI")]
    pub vni: u32,
    /// MAC of the node's VXLAN device.
    #[serde(rename = "VtepMAC")]
    pub vtep_mac: Mac,
}

impl LeaseValue {
    /// The value of a VXLAN node.
    #[must_use]
    pub fn vxlan(public_ip: Ipv4Addr, data: VxlanData) -> Self {
        Self {
            public_ip,
            public_ipv6: None,
            backend_type: Some(crate::network::VXLAN.to_owned()),
            backend_data: Some(BackendData::Vxlan(data)),
            backend_v6_data: None,
        }
    }

    /// The value of a node of ours. It names its VTEP whatever the backend: the MAC tells whose the lease is, and peers
    /// that still use VXLAN find the node. A flanneld of the backend `host-gw` does not look at the data.
    #[must_use]
    pub fn node(backend: &str, public_ip: Ipv4Addr, data: VxlanData) -> Self {
        Self { backend_type: Some(backend.to_owned()), ..Self::vxlan(public_ip, data) }
    }

    /// The VXLAN data, if this is a VXLAN lease that can be read.
    #[must_use]
    pub fn vxlan_data(&self) -> Option<VxlanData> {
        self.vtep().filter(|_| self.backend_type.as_deref() == Some(crate::network::VXLAN))
    }

    /// The node's VTEP: in a lease of the backend `vxlan`, and in every lease of ours.
    #[must_use]
    pub fn vtep(&self) -> Option<VxlanData> {
        let known = [crate::network::VXLAN, crate::network::HOST_GW];
        if !self.backend_type.as_deref().is_some_and(|kind| known.contains(&kind)) {
            return None;
        }
        self.backend_data.as_ref()?.vxlan()
    }

    /// The same with the node's IPv6 side.
    #[must_use]
    pub fn with_ipv6(self, public_ipv6: Ipv6Addr, data: VxlanData) -> Self {
        Self {
            public_ipv6: Some(public_ipv6),
            backend_v6_data: Some(BackendData::Vxlan(data)),
            ..self
        }
    }

    /// The VTEP of the node's IPv6 device.
    #[must_use]
    pub fn vtep_ipv6(&self) -> Option<VxlanData> {
        self.backend_v6_data.as_ref()?.vxlan().filter(|_| self.forwards())
    }

    /// Whether packets for the subnet can be sent to the node as they are: it runs a backend whose nodes forward them.
    #[must_use]
    pub fn forwards(&self) -> bool {
        let known = [crate::network::VXLAN, crate::network::HOST_GW];
        self.backend_type.as_deref().is_some_and(|kind| known.contains(&kind))
    }
}

/// One key under `subnets/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The subnet.
    pub key: SubnetKey,
    /// Who holds it; `None` if the value cannot be read. The subnet is taken all the same.
    pub value: Option<LeaseValue>,
    /// etcd's revision of the last change, for compares.
    pub mod_revision: i64,
    /// The etcd lease it hangs on; 0 for a reservation, which has none.
    pub etcd_lease: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_flannels() {
        for text in ["10.5.52.0-24", "10.5.52.0-24&fc00:0:0:3::-64"] {
            let key: SubnetKey = text.parse().expect(text);
            assert_eq!(key.v4, "10.5.52.0/24".parse().ok());
        }
        let dual: SubnetKey = "10.5.52.0-24&fc00::3:0-112".parse().expect("dual stack");
        assert_eq!(dual.to_string(), "10.5.52.0-24&fc00::3:0-112");
        let alone: SubnetKey = "0.0.0.0-0&fc00:0:0:3::-64".parse().expect("IPv6 alone");
        assert_eq!((alone.v4, alone.to_string().as_str()), (None, "0.0.0.0-0&fc00:0:0:3::-64"));
        for bad in ["", "10.5.52.0", "10.5.52.0-33", "10.5.52.0/24", "x-24", "10.5.52.0-24&nope"] {
            assert!(bad.parse::<SubnetKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn values_are_flannels_to_the_byte() {
        let mac: Mac = "aa:bb:cc:00:11:22".parse().expect("MAC");
        let value =
            LeaseValue::vxlan(Ipv4Addr::new(192, 0, 2, 1), VxlanData { vni: 1, vtep_mac: mac });
        let json = serde_json::to_string(&value).expect("JSON");
        assert_eq!(
            json,
            r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"aa:bb:cc:00:11:22"}}"#
        );
        assert_eq!(serde_json::from_str::<LeaseValue>(&json).expect("reads back"), value);
    }

    #[test]
    fn data_of_other_backends_is_read_and_kept() {
        let json = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"Port":51820,"PublicKey":"x"}}"#;
        let value: LeaseValue = serde_json::from_str(json).expect("readable");
        assert_eq!(value.vtep(), None);
        assert_eq!(serde_json::to_string(&value).expect("JSON"), json);
    }

    #[test]
    fn leases_of_other_backends_have_no_vxlan_data() {
        let json = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}"#;
        assert_eq!(serde_json::from_str::<LeaseValue>(json).expect("readable").vxlan_data(), None);
        let reservation = r#"{"PublicIP":"192.0.2.1"}"#;
        assert_eq!(
            serde_json::from_str::<LeaseValue>(reservation).expect("readable").vxlan_data(),
            None
        );
    }
}
