//! The network configuration in etcd: flannel's JSON, its defaults, its checks
//! (`../shared/reference/networking.md` §3.1).

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Backend that flannel takes when the configuration names none. We refuse it: it is a debugging aid.
const FLANNEL_DEFAULT_BACKEND: &str = "udp";
/// Backend whose packets travel in VXLAN.
pub const VXLAN: &str = "vxlan";
/// Backend whose packets travel as they are, over a link that the nodes share.
pub const HOST_GW: &str = "host-gw";
/// Bytes VXLAN takes from the underlay MTU when the outer header is IPv4: inner Ethernet 14 + VXLAN 8 + UDP 8 + outer
/// IPv4 20 (RFC 7348 §5).
pub const VXLAN_OVERHEAD_IPV4: u32 = 50;
/// The same when the outer header is IPv6, of 40 bytes.
pub const VXLAN_OVERHEAD_IPV6: u32 = 70;
/// Limits of the IPv6 network, flannel's.
const DEFAULT_IPV6_SUBNET_LEN: u8 = 64;
const MAX_IPV6_NETWORK_LEN: u8 = 124;
const MAX_IPV6_SUBNET_LEN: u8 = 126;
/// Prefix length of a node's subnet in a network of /22 or wider.
const DEFAULT_SUBNET_LEN: u8 = 24;
/// Longest prefix of the whole network.
const MAX_NETWORK_LEN: u8 = 28;
/// Longest prefix of one node's subnet.
const MAX_SUBNET_LEN: u8 = 30;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not JSON, or a wrong type.
    #[error("decode the network configuration: {0}")]
    Decode(String),
    /// A field's value.
    #[error("network configuration: {field}: {problem}")]
    Field {
        /// Name of the JSON key.
        field: &'static str,
        /// What is wrong with it and what would be right.
        problem: String,
    },
}

fn field(field: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Field { field, problem: problem.into() }
}

/// A checked network configuration. It has at least one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The IPv4 network; `None` where there is IPv6 alone.
    pub v4: Option<Ipv4Config>,
    /// The IPv6 network, in dual stack or alone.
    pub v6: Option<Ipv6Config>,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port of VXLAN.
    pub port: u16,
    /// How packets get to another node.
    pub mode: Mode,
    /// Whether packets of known flows take the short way through a node (eBPF). A key of ours in `Backend`, which flannel
    /// does not read.
    pub fast_path: Switch,
    /// Whether packets of pods are larger than 64 KiB before they are cut into frames (BIG TCP). Likewise ours.
    pub big_tcp: Switch,
}

/// The IPv4 half of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Config {
    /// The network that node subnets are cut from.
    pub network: Ipv4Network,
    /// Prefix length of one node's subnet.
    pub subnet_len: u8,
    /// First subnet that may be leased.
    pub subnet_min: Ipv4Addr,
    /// Last subnet that may be leased.
    pub subnet_max: Ipv4Addr,
}

/// The IPv6 half of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Config {
    /// The network that node subnets are cut from.
    pub network: Ipv6Network,
    /// Prefix length of one node's subnet.
    pub subnet_len: u8,
    /// First subnet that may be leased.
    pub subnet_min: Ipv6Addr,
    /// Last subnet that may be leased.
    pub subnet_max: Ipv6Addr,
}

impl Ipv6Config {
    fn checked(
        network: Ipv6Network,
        len: Option<u8>,
        min: Option<Ipv6Addr>,
        max: Option<Ipv6Addr>,
    ) -> Result<Self, ConfigError> {
        let prefix = network.prefix();
        let network =
            Ipv6Network::new(network.network(), prefix).expect("a network's own prefix is valid");
        if prefix > MAX_IPV6_NETWORK_LEN {
            return Err(field(
                "IPv6Network",
                format!("{network} is too small: /{MAX_IPV6_NETWORK_LEN} or wider"),
            ));
        }
        let default = if prefix <= 62 { DEFAULT_IPV6_SUBNET_LEN } else { prefix + 2 };
        let subnet_len = len.unwrap_or(default);
        if subnet_len > MAX_IPV6_SUBNET_LEN || subnet_len < prefix + 2 {
            return Err(field(
                "IPv6SubnetLen",
                format!("{subnet_len} must be between {} and {MAX_IPV6_SUBNET_LEN}", prefix + 2),
            ));
        }
        let size = 1_u128 << (128 - subnet_len);
        let first = network.network().to_bits();
        let check = |name: &'static str, address: Ipv6Addr| {
            if !network.contains(address) || !address.to_bits().is_multiple_of(size) {
                return Err(field(
                    name,
                    format!("{address} must be the base of a /{subnet_len} inside {network}"),
                ));
            }
            Ok(address)
        };
        let subnet_min = check("IPv6SubnetMin", min.unwrap_or(Ipv6Addr::from_bits(first + size)))?;
        let last = network.broadcast().to_bits() - (size - 1);
        let subnet_max = check("IPv6SubnetMax", max.unwrap_or(Ipv6Addr::from_bits(last)))?;
        if subnet_min > subnet_max {
            return Err(field(
                "IPv6SubnetMin",
                format!("{subnet_min} is above IPv6SubnetMax {subnet_max}"),
            ));
        }
        Ok(Self { network, subnet_len, subnet_min, subnet_max })
    }

    /// The first `count` subnets that may be leased, in order.
    pub fn subnets(&self, count: usize) -> impl Iterator<Item = Ipv6Network> + use<> {
        let Self { subnet_len, subnet_min, subnet_max, .. } = *self;
        let size = 1_u128 << (128 - subnet_len);
        let bases = (0..count as u128).map(move |number| subnet_min.to_bits() + number * size);
        bases.take_while(move |base| *base <= subnet_max.to_bits()).map(move |base| {
            Ipv6Network::new(Ipv6Addr::from_bits(base), subnet_len).expect("the length was checked")
        })
    }

    /// Whether `subnet` is one that may be leased.
    #[must_use]
    pub fn allows(&self, subnet: Ipv6Network) -> bool {
        subnet.prefix() == self.subnet_len
            && subnet.ip() == subnet.network()
            && (self.subnet_min..=self.subnet_max).contains(&subnet.ip())
    }
}

impl Ipv4Config {
    fn checked(
        network: Ipv4Network,
        len: Option<u8>,
        min: Option<Ipv4Addr>,
        max: Option<Ipv4Addr>,
    ) -> Result<Self, ConfigError> {
        let network = Ipv4Network::new(network.network(), network.prefix())
            .expect("a network's own prefix is valid");
        if network.prefix() > MAX_NETWORK_LEN {
            return Err(field(
                "Network",
                format!("{network} is too small: /{MAX_NETWORK_LEN} or wider"),
            ));
        }
        let default =
            if network.prefix() <= 22 { DEFAULT_SUBNET_LEN } else { network.prefix() + 2 };
        let subnet_len = len.unwrap_or(default);
        if subnet_len > MAX_SUBNET_LEN || subnet_len < network.prefix() + 2 {
            return Err(field(
                "SubnetLen",
                format!(
                    "{subnet_len} must be between {} and {MAX_SUBNET_LEN}",
                    network.prefix() + 2
                ),
            ));
        }
        let size = 1_u32 << (32 - subnet_len);
        let first = network.network().to_bits();
        let check = |name: &'static str, address: Ipv4Addr| {
            if !network.contains(address) || !address.to_bits().is_multiple_of(size) {
                return Err(field(
                    name,
                    format!("{address} must be the base of a /{subnet_len} inside {network}"),
                ));
            }
            Ok(address)
        };
        // The first subnet is skipped: its base is the network's own address.
        let subnet_min = check("SubnetMin", min.unwrap_or(Ipv4Addr::from_bits(first + size)))?;
        let last = network.broadcast().to_bits() - (size - 1);
        let subnet_max = check("SubnetMax", max.unwrap_or(Ipv4Addr::from_bits(last)))?;
        if subnet_min > subnet_max {
            return Err(field(
                "SubnetMin",
                format!("{subnet_min} is above SubnetMax {subnet_max}"),
            ));
        }
        Ok(Self { network, subnet_len, subnet_min, subnet_max })
    }

    /// Every subnet that may be leased, in order.
    pub fn subnets(&self) -> impl Iterator<Item = Ipv4Network> + use<> {
        let len = self.subnet_len;
        let (first, last) = (self.subnet_min.to_bits(), self.subnet_max.to_bits());
        (first..=last).step_by(1 << (32 - len)).map(move |base| {
            Ipv4Network::new(Ipv4Addr::from_bits(base), len).expect("the length was checked")
        })
    }

    /// Whether `subnet` is one of [`Ipv4Config::subnets`].
    #[must_use]
    pub fn allows(&self, subnet: Ipv4Network) -> bool {
        subnet.prefix() == self.subnet_len
            && subnet.ip() == subnet.network()
            && (self.subnet_min..=self.subnet_max).contains(&subnet.ip())
    }
}

/// How packets get to another node. One setting for the whole network: `Backend` in the configuration.
///
/// The VXLAN device exists in every mode. What a node receives does not depend on its mode, so the nodes may take up a
/// new one each at its own time, and no packet of a peer that has not done so yet is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// `{"Type":"vxlan"}`: in VXLAN.
    #[default]
    Vxlan,
    /// `{"Type":"vxlan","DirectRouting":true}`: as they are to nodes on the same link, in VXLAN to others.
    DirectRouting,
    /// `{"Type":"host-gw"}`: as they are; all nodes share a link. Pods get the whole MTU.
    HostGw,
}

impl Mode {
    /// Its name on command lines and in status files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vxlan => VXLAN,
            Self::DirectRouting => "direct-routing",
            Self::HostGw => HOST_GW,
        }
    }

    /// The backend's name in the configuration and in leases.
    #[must_use]
    pub fn backend(self) -> &'static str {
        match self {
            Self::Vxlan | Self::DirectRouting => VXLAN,
            Self::HostGw => HOST_GW,
        }
    }

    /// MTU of pods on an underlay of this MTU. A pod has one MTU for both families: the smaller one, where a packet may
    /// travel `over_ipv6`.
    #[must_use]
    pub fn pod_mtu(self, underlay_mtu: u32, over_ipv6: bool) -> u32 {
        match self {
            Self::Vxlan | Self::DirectRouting if over_ipv6 => {
                underlay_mtu.saturating_sub(VXLAN_OVERHEAD_IPV6)
            }
            Self::Vxlan | Self::DirectRouting => underlay_mtu.saturating_sub(VXLAN_OVERHEAD_IPV4),
            Self::HostGw => underlay_mtu,
        }
    }
}

/// Whether the nodes do what not each of them can: `FastPath` and `BigTCP` in the backend's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Switch {
    /// Where a node can; one that cannot is as well. The key is absent.
    #[default]
    Auto,
    /// On every node; one that cannot has a problem. `true`.
    On,
    /// Nowhere. `false`.
    Off,
}

impl Switch {
    /// As the configuration has it.
    #[must_use]
    pub fn from_key(key: Option<bool>) -> Self {
        match key {
            None => Self::Auto,
            Some(true) => Self::On,
            Some(false) => Self::Off,
        }
    }

    /// As it is put into the configuration.
    #[must_use]
    pub fn key(self) -> Option<bool> {
        match self {
            Self::Auto => None,
            Self::On => Some(true),
            Self::Off => Some(false),
        }
    }

    /// As it is named on command lines and in status files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }

    /// Whether nodes that can have it are to have it.
    #[must_use]
    pub fn is_wanted(self) -> bool {
        self != Self::Off
    }
}

/// What is read: keys in lower case, as flannel's decoder does not mind the case.
#[derive(Debug, Deserialize)]
struct Read {
    #[serde(default)]
    enableipv4: Option<bool>,
    #[serde(default)]
    enableipv6: bool,
    #[serde(default)]
    ipv6network: Option<String>,
    #[serde(default)]
    ipv6subnetlen: Option<u8>,
    #[serde(default)]
    ipv6subnetmin: Option<Ipv6Addr>,
    #[serde(default)]
    ipv6subnetmax: Option<Ipv6Addr>,
    #[serde(default)]
    network: Option<String>,
    #[serde(default)]
    subnetlen: Option<u8>,
    #[serde(default)]
    subnetmin: Option<Ipv4Addr>,
    #[serde(default)]
    subnetmax: Option<Ipv4Addr>,
    #[serde(default)]
    backend: ReadBackend,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ReadBackend {
    #[serde(rename = "type")]
    kind: Option<String>,
    vni: Option<u32>,
    port: Option<u16>,
    directrouting: bool,
    fastpath: Option<bool>,
    bigtcp: Option<bool>,
}

/// What is written.
#[derive(Debug, Serialize)]
struct Written {
    #[serde(flatten)]
    v4: Option<WrittenIpv4>,
    #[serde(rename = "EnableIPv4", skip_serializing_if = "Option::is_none")]
    enable_ipv4: Option<bool>,
    #[serde(flatten)]
    v6: Option<WrittenIpv6>,
    #[serde(rename = "Backend")]
    backend: WrittenBackend,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct WrittenIpv4 {
    network: Ipv4Network,
    subnet_len: u8,
    subnet_min: Ipv4Addr,
    subnet_max: Ipv4Addr,
}

#[derive(Debug, Serialize)]
struct WrittenIpv6 {
    #[serde(rename = "EnableIPv6")]
    enable: bool,
    #[serde(rename = "IPv6Network")]
    network: Ipv6Network,
    #[serde(rename = "IPv6SubnetLen")]
    subnet_len: u8,
    #[serde(rename = "IPv6SubnetMin")]
    subnet_min: Ipv6Addr,
    #[serde(rename = "IPv6SubnetMax")]
    subnet_max: Ipv6Addr,
}

#[derive(Debug, Serialize)]
struct WrittenBackend {
    #[serde(rename = "Type")]
    kind: &'static str,
    #[serde(rename = "VNI")]
    vni: u32,
    #[serde(rename = "Port")]
    port: u16,
    #[serde(rename = "DirectRouting", skip_serializing_if = "std::ops::Not::not")]
    direct_routing: bool,
    #[serde(rename = "FastPath", skip_serializing_if = "Option::is_none")]
    fast_path: Option<bool>,
    #[serde(rename = "BigTCP", skip_serializing_if = "Option::is_none")]
    big_tcp: Option<bool>,
}

fn check_vni(vni: u32) -> Result<(), ConfigError> {
    if vni == 0 || vni >= 1 << 24 {
        return Err(field("Backend.VNI", format!("{vni} must be between 1 and 16777215")));
    }
    Ok(())
}

/// Lowers the keys of an object and of the objects in it.
fn lower_keys(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let lower = |(key, value): (String, Value)| (key.to_lowercase(), lower_keys(value));
            Value::Object(fields.into_iter().map(lower).collect())
        }
        other => other,
    }
}

impl NetworkConfig {
    /// A VXLAN network with flannel's defaults for everything that is not given.
    ///
    /// # Errors
    /// If the lengths do not fit.
    pub fn new(
        network: Ipv4Network,
        subnet_len: u8,
        vni: u32,
        port: u16,
    ) -> Result<Self, ConfigError> {
        check_vni(vni)?;
        let v4 = Some(Ipv4Config::checked(network, Some(subnet_len), None, None)?);
        let (fast_path, big_tcp) = (Switch::default(), Switch::default());
        Ok(Self { v4, v6: None, vni, port, mode: Mode::default(), fast_path, big_tcp })
    }

    /// Reads what is in etcd.
    ///
    /// # Errors
    /// Names the key and what would be right.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        let decode = |error: serde_json::Error| ConfigError::Decode(error.to_string());
        let value: Value = serde_json::from_slice(json).map_err(decode)?;
        let read = Read::deserialize(lower_keys(value)).map_err(decode)?;
        let backend = read.backend;
        let mode = match backend.kind.as_deref().unwrap_or(FLANNEL_DEFAULT_BACKEND) {
            VXLAN if backend.directrouting => Mode::DirectRouting,
            VXLAN => Mode::Vxlan,
            HOST_GW => Mode::HostGw,
            kind => {
                return Err(field(
                    "Backend.Type",
                    format!(
                        "{kind:?} is not supported: set {{\"Type\":\"vxlan\"}} or {{\"Type\":\"host-gw\"}} (an absent backend means udp)"
                    ),
                ));
            }
        };
        let vni = backend.vni.unwrap_or(crate::VXLAN_VNI);
        check_vni(vni)?;
        let port = backend.port.filter(|port| *port != 0).unwrap_or(crate::VXLAN_PORT);
        let v4 = if read.enableipv4 != Some(false) {
            let text = read
                .network
                .ok_or_else(|| field("Network", "is missing, e.g. \"10.244.0.0/16\""))?;
            let network =
                text.parse().map_err(|_| field("Network", format!("{text:?} is no IPv4 CIDR")))?;
            let v4 = Ipv4Config::checked(network, read.subnetlen, read.subnetmin, read.subnetmax);
            Some(v4?)
        } else if read.enableipv6 {
            None
        } else {
            return Err(field("EnableIPv6", "must be true where EnableIPv4 is false"));
        };
        let v6 = if read.enableipv6 {
            let text = read
                .ipv6network
                .ok_or_else(|| field("IPv6Network", "is missing, e.g. \"fd00:10:244::/48\""))?;
            let network = text
                .parse()
                .map_err(|_| field("IPv6Network", format!("{text:?} is no IPv6 CIDR")))?;
            let v6 = Ipv6Config::checked(
                network,
                read.ipv6subnetlen,
                read.ipv6subnetmin,
                read.ipv6subnetmax,
            );
            Some(v6?)
        } else {
            None
        };
        let (fast_path, big_tcp) =
            (Switch::from_key(backend.fastpath), Switch::from_key(backend.bigtcp));
        Ok(Self { v4, v6, vni, port, mode, fast_path, big_tcp })
    }

    /// The same with another mode.
    #[must_use]
    pub fn with_mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// The JSON to put into etcd.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let wire = Written {
            v4: self.v4.map(|v4| WrittenIpv4 {
                network: v4.network,
                subnet_len: v4.subnet_len,
                subnet_min: v4.subnet_min,
                subnet_max: v4.subnet_max,
            }),
            enable_ipv4: self.v4.is_none().then_some(false),
            v6: self.v6.map(|v6| WrittenIpv6 {
                enable: true,
                network: v6.network,
                subnet_len: v6.subnet_len,
                subnet_min: v6.subnet_min,
                subnet_max: v6.subnet_max,
            }),
            backend: WrittenBackend {
                kind: self.mode.backend(),
                vni: self.vni,
                port: self.port,
                direct_routing: self.mode == Mode::DirectRouting,
                fast_path: self.fast_path.key(),
                big_tcp: self.big_tcp.key(),
            },
        };
        serde_json::to_vec(&wire).expect("plain data has a JSON form")
    }
}

#[cfg(test)]
mod tests;
