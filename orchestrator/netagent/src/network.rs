//! The network configuration in etcd: flannel's JSON, its defaults, its checks
//! (`../shared/reference/networking.md` §3.1).

use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use serde::{Deserialize, Serialize};

/// Backend that flannel takes when the configuration names none. We refuse it: it is a debugging aid.
const FLANNEL_DEFAULT_BACKEND: &str = "udp";
/// Backend that this agent speaks.
pub const VXLAN: &str = "vxlan";
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

/// A checked network configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The network that node subnets are cut from.
    pub network: Ipv4Network,
    /// Prefix length of one node's subnet.
    pub subnet_len: u8,
    /// First subnet that may be leased.
    pub subnet_min: Ipv4Addr,
    /// Last subnet that may be leased.
    pub subnet_max: Ipv4Addr,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port of VXLAN.
    pub port: u16,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Wire {
    #[serde(rename = "EnableIPv4", default, skip_serializing_if = "Option::is_none")]
    enable_ipv4: Option<bool>,
    #[serde(rename = "EnableIPv6", default, skip_serializing_if = "Option::is_none")]
    enable_ipv6: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    network: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subnet_len: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subnet_min: Option<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subnet_max: Option<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backend: Option<Backend>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Backend {
    #[serde(rename = "Type", default)]
    kind: Option<String>,
    #[serde(rename = "VNI", alias = "vni", default)]
    vni: Option<u32>,
    #[serde(rename = "Port", alias = "port", default)]
    port: Option<u16>,
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
        Self::checked(network, Some(subnet_len), None, None, vni, port)
    }

    /// Reads what is in etcd.
    ///
    /// # Errors
    /// Names the key and what would be right.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        let wire: Wire =
            serde_json::from_slice(json).map_err(|error| ConfigError::Decode(error.to_string()))?;
        if wire.enable_ipv4 == Some(false) {
            return Err(field(
                "EnableIPv4",
                "must be true: this agent has no IPv6-only network yet",
            ));
        }
        let text =
            wire.network.ok_or_else(|| field("Network", "is missing, e.g. \"10.244.0.0/16\""))?;
        let network: Ipv4Network =
            text.parse().map_err(|_| field("Network", format!("{text:?} is no IPv4 CIDR")))?;
        let kind = wire.backend.as_ref().and_then(|backend| backend.kind.as_deref());
        let kind = kind.unwrap_or(FLANNEL_DEFAULT_BACKEND);
        if kind != VXLAN {
            return Err(field(
                "Backend.Type",
                format!(
                    "{kind:?} is not supported: set {{\"Type\":\"vxlan\"}} (an absent backend means udp)"
                ),
            ));
        }
        let vni =
            wire.backend.as_ref().and_then(|backend| backend.vni).unwrap_or(orch_config::VXLAN_VNI);
        let port = wire.backend.as_ref().and_then(|backend| backend.port).filter(|port| *port != 0);
        Self::checked(
            network,
            wire.subnet_len,
            wire.subnet_min,
            wire.subnet_max,
            vni,
            port.unwrap_or(orch_config::VXLAN_PORT),
        )
    }

    fn checked(
        network: Ipv4Network,
        len: Option<u8>,
        min: Option<Ipv4Addr>,
        max: Option<Ipv4Addr>,
        vni: u32,
        port: u16,
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
        if vni == 0 || vni >= 1 << 24 {
            return Err(field("Backend.VNI", format!("{vni} must be between 1 and 16777215")));
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
        Ok(Self { network, subnet_len, subnet_min, subnet_max, vni, port })
    }

    /// The JSON to put into etcd.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let backend =
            Backend { kind: Some(VXLAN.to_owned()), vni: Some(self.vni), port: Some(self.port) };
        let wire = Wire {
            enable_ipv4: None,
            enable_ipv6: None,
            network: Some(self.network.to_string()),
            subnet_len: Some(self.subnet_len),
            subnet_min: Some(self.subnet_min),
            subnet_max: Some(self.subnet_max),
            backend: Some(backend),
        };
        serde_json::to_vec(&wire).expect("plain data has a JSON form")
    }

    /// Every subnet that may be leased, in order.
    pub fn subnets(&self) -> impl Iterator<Item = Ipv4Network> + use<> {
        let len = self.subnet_len;
        let (first, last) = (self.subnet_min.to_bits(), self.subnet_max.to_bits());
        (first..=last).step_by(1 << (32 - len)).map(move |base| {
            Ipv4Network::new(Ipv4Addr::from_bits(base), len).expect("the length was checked")
        })
    }

    /// Whether `subnet` is one of [`NetworkConfig::subnets`].
    #[must_use]
    pub fn allows(&self, subnet: Ipv4Network) -> bool {
        subnet.prefix() == self.subnet_len
            && subnet.ip() == subnet.network()
            && (self.subnet_min..=self.subnet_max).contains(&subnet.ip())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<NetworkConfig, ConfigError> {
        NetworkConfig::parse(json.as_bytes())
    }

    #[test]
    fn flannels_defaults_fill_what_is_not_said() {
        let config =
            parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#).expect("valid");
        assert_eq!(config.subnet_len, 24);
        assert_eq!(config.subnet_min, Ipv4Addr::new(10, 5, 1, 0));
        assert_eq!(config.subnet_max, Ipv4Addr::new(10, 5, 255, 0));
        assert_eq!((config.vni, config.port), (1, 8472));
        let small =
            parse(r#"{"Network":"10.5.0.0/24","Backend":{"Type":"vxlan","VNI":7,"Port":0}}"#)
                .expect("valid");
        assert_eq!((small.subnet_len, small.vni, small.port), (26, 7, 8472));
        assert_eq!(small.subnets().count(), 3, "the first of the four is skipped");
    }

    #[test]
    fn an_absent_backend_is_refused_with_the_way_out() {
        let error = parse(r#"{"Network":"10.5.0.0/16"}"#).expect_err("udp");
        assert!(error.to_string().contains(r#"set {"Type":"vxlan"}"#), "{error}");
    }

    #[test]
    fn limits_must_be_bases_of_subnets_in_the_network() {
        for bad in [
            r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.7","Backend":{"Type":"vxlan"}}"#,
            r#"{"Network":"10.5.0.0/16","SubnetMax":"10.6.0.0","Backend":{"Type":"vxlan"}}"#,
            r#"{"Network":"10.5.0.0/16","SubnetLen":17,"Backend":{"Type":"vxlan"}}"#,
            r#"{"Network":"10.5.0.0/29","Backend":{"Type":"vxlan"}}"#,
            r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.8.0","Backend":{"Type":"vxlan"}}"#,
        ] {
            assert!(matches!(parse(bad), Err(ConfigError::Field { .. })), "{bad}");
        }
    }

    #[test]
    fn what_we_write_reads_back_equal() {
        let config =
            NetworkConfig::new("10.244.0.0/16".parse().expect("CIDR"), 24, 1, 8472).expect("valid");
        assert_eq!(NetworkConfig::parse(&config.to_json()), Ok(config));
    }
}
