//! The configuration: as it is written, and as it is meant.

use std::net::IpAddr;

use cni_spec::{AddResult, Error, code, or_default};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Deserializer};

use crate::condition;

/// Bit of the packet mark that says "masquerade this", as in the reference.
const MASQUERADE_BIT: u32 = 13;

/// Network configuration of `type: portmap`, with the keys of the reference plugin.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetConf {
    /// How. What was written for the reference plugin counts, `iptables` as well as `nftables`: the packets fare the same.
    pub backend: Option<String>,
    /// Connections that could not find their way back get the host's address: those from the container's own subnet,
    /// and from the host's loopback.
    #[serde(deserialize_with = "or_true")]
    pub snat: bool,
    /// All connections get the host's address.
    pub masq_all: bool,
    /// Which bit of the packet mark carries that decision from one hook to the other.
    pub mark_masq_bit: Option<u32>,
    /// A chain of iptables that would set the mark.
    pub external_set_mark_chain: Option<String>,
    /// Further matches for IPv4, in the language of nft; the usual ones of iptables are understood (`condition.rs`).
    #[serde(rename = "conditionsV4", deserialize_with = "or_default")]
    pub conditions_v4: Vec<String>,
    /// Likewise for IPv6.
    #[serde(rename = "conditionsV6", deserialize_with = "or_default")]
    pub conditions_v6: Vec<String>,
    /// Capability arguments.
    #[serde(deserialize_with = "or_default")]
    pub runtime_config: RuntimeConfig,
}

impl Default for NetConf {
    fn default() -> Self {
        Self {
            backend: None,
            snat: true,
            masq_all: false,
            mark_masq_bit: None,
            external_set_mark_chain: None,
            conditions_v4: Vec::new(),
            conditions_v6: Vec::new(),
            runtime_config: RuntimeConfig::default(),
        }
    }
}

/// `runtimeConfig`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuntimeConfig {
    /// What is to be forwarded.
    #[serde(deserialize_with = "or_default")]
    pub port_mappings: Vec<PortMapping>,
}

/// One entry of `portMappings`, unchecked.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortMapping {
    /// Port of the host.
    pub host_port: i64,
    /// Port in the container.
    pub container_port: i64,
    /// `tcp`, `udp` or `sctp`; TCP if empty.
    #[serde(deserialize_with = "or_default")]
    pub protocol: String,
    /// Address of the host; all if empty.
    #[serde(rename = "hostIP", deserialize_with = "or_default")]
    pub host_ip: String,
}

fn or_true<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(true))
}

/// A protocol with ports, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Protocol(pub(crate) u8);

impl Protocol {
    pub(crate) const TCP: Self = Self(6);
    pub(crate) const UDP: Self = Self(17);
    pub(crate) const SCTP: Self = Self(132);

    pub(crate) fn name(self) -> String {
        match self {
            Self::TCP => "tcp".to_owned(),
            Self::UDP => "udp".to_owned(),
            Self::SCTP => "sctp".to_owned(),
            Self(number) => number.to_string(),
        }
    }
}

/// What the rules look like; each answer has a table of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RuleOptions {
    pub(crate) masquerade_bit: u32,
    pub(crate) conditions_v4: String,
    pub(crate) conditions_v6: String,
}

/// What the configuration means; holds only what can be done.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) options: RuleOptions,
    pub(crate) snat: bool,
    pub(crate) masquerade_all: bool,
}

/// A mapping that can be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) protocol: Protocol,
    /// `None` is every address of the family.
    pub(crate) host_ip: Option<IpAddr>,
    pub(crate) host_port: u16,
    pub(crate) container_port: u16,
}

pub(crate) fn invalid(msg: impl Into<String>) -> Error {
    Error::new(code::INVALID_CONFIG, msg)
}

pub(crate) fn unsupported(msg: impl Into<String>) -> Error {
    Error::new(code::UNSUPPORTED_FIELD, msg)
}

impl NetConf {
    /// Checks everything but the mappings.
    pub(crate) fn settings(&self) -> Result<Settings, Error> {
        match self.backend.as_deref() {
            None | Some("" | "nftables" | "iptables") => {}
            Some(other) => {
                return Err(unsupported(format!(
                    "\"backend\" is \"{other}\" and has to be \"nftables\" or \"iptables\""
                )));
            }
        }
        let chain = self.external_set_mark_chain.as_deref().filter(|chain| !chain.is_empty());
        match (chain, self.mark_masq_bit) {
            (Some(_), Some(_)) => {
                return Err(invalid(
                    "\"externalSetMarkChain\" and \"markMasqBit\" are both set, and exclude each other",
                ));
            }
            (Some(chain), None) => {
                return Err(unsupported(format!(
                    "\"externalSetMarkChain\" is \"{chain}\", a chain of iptables, which this plugin does not use"
                )));
            }
            (None, _) => {}
        }
        let masquerade_bit = self.mark_masq_bit.unwrap_or(MASQUERADE_BIT);
        if masquerade_bit > 31 {
            return Err(invalid(format!(
                "\"markMasqBit\" is {masquerade_bit}, and a packet mark has the bits 0 to 31"
            )));
        }
        let options = RuleOptions {
            masquerade_bit,
            conditions_v4: condition::of_nft("conditionsV4", "ip", &self.conditions_v4)?,
            conditions_v6: condition::of_nft("conditionsV6", "ip6", &self.conditions_v6)?,
        };
        Ok(Settings { options, snat: self.snat, masquerade_all: self.masq_all })
    }

    /// The mappings, each once.
    pub(crate) fn mappings(&self) -> Result<Vec<Mapping>, Error> {
        let mut mappings: Vec<Mapping> = Vec::new();
        for entry in &self.runtime_config.port_mappings {
            let mapping = entry.check()?;
            if !mappings.contains(&mapping) {
                mappings.push(mapping);
            }
        }
        Ok(mappings)
    }
}

impl PortMapping {
    fn check(&self) -> Result<Mapping, Error> {
        let port = |key: &str, value: i64| {
            u16::try_from(value).ok().filter(|port| *port > 0).ok_or_else(|| {
                invalid(format!("\"portMappings\": \"{key}\" is {value} and has to be 1 to 65535"))
            })
        };
        let protocol = match self.protocol.to_ascii_lowercase().as_str() {
            "" | "tcp" => Protocol::TCP,
            "udp" => Protocol::UDP,
            "sctp" => Protocol::SCTP,
            other => {
                return Err(unsupported(format!(
                    "\"portMappings\": \"protocol\" is \"{other}\" and has to be \"tcp\", \"udp\" or \"sctp\""
                )));
            }
        };
        let host_ip = match self.host_ip.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| {
                invalid(format!(
                    "\"portMappings\": \"hostIP\" is \"{text}\", which is no IP address"
                ))
            })?),
        };
        if host_ip.is_some_and(|ip| ip.is_ipv6() && ip.is_loopback()) {
            return Err(unsupported(format!(
                "\"portMappings\": \"hostIP\" is \"{}\"; the kernel does not forward from the IPv6 loopback",
                self.host_ip
            )));
        }
        Ok(Mapping {
            protocol,
            host_ip,
            host_port: port("hostPort", self.host_port)?,
            container_port: port("containerPort", self.container_port)?,
        })
    }
}

/// The container's address of each family, with its subnet: the first that is not of an interface of the host.
pub(crate) fn container_addresses(result: &AddResult) -> Result<Vec<IpNetwork>, Error> {
    let mut found: Vec<IpNetwork> = Vec::new();
    for address in result.container_addresses()? {
        if !found.iter().any(|known| known.is_ipv4() == address.is_ipv4()) {
            found.push(address);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use cni_spec::Version;
    use serde_json::{Value, json};

    use super::*;

    fn conf(value: Value) -> NetConf {
        serde_json::from_value(value).expect("of the right types")
    }

    fn mappings(value: Value) -> Result<Vec<Mapping>, Error> {
        conf(json!({"runtimeConfig": {"portMappings": value}})).mappings()
    }

    #[test]
    fn mappings_are_checked_and_the_wrong_value_is_named() {
        let good = mappings(json!([
            {"hostPort": 80, "containerPort": 8080},
            {"hostPort": 80, "containerPort": 8080, "protocol": "TCP"},
            {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "192.0.2.1"},
        ]))
        .expect("good");
        assert_eq!(good.len(), 2, "the same one twice is one");
        for (entry, word) in [
            (json!({"hostPort": 0, "containerPort": 1}), "hostPort"),
            (json!({"hostPort": 65536, "containerPort": 1}), "65536"),
            (json!({"hostPort": 1, "containerPort": -1}), "containerPort"),
            (json!({"hostPort": 1, "containerPort": 1, "protocol": "icmp"}), "icmp"),
            (json!({"hostPort": 1, "containerPort": 1, "hostIP": "localhost"}), "localhost"),
            (json!({"hostPort": 1, "containerPort": 1, "hostIP": "::1"}), "::1"),
        ] {
            let error = mappings(json!([entry])).expect_err(word);
            assert!(error.msg.contains(word), "{error}");
        }
        assert_eq!(mappings(Value::Null).expect("none"), []);
    }

    #[test]
    fn options_that_need_iptables_are_refused_by_name() {
        let code_of = |value: Value| conf(value).settings().expect_err("refused").code;
        assert_eq!(code_of(json!({"backend": "pf"})), code::UNSUPPORTED_FIELD);
        conf(json!({"backend": "iptables"})).settings().expect("as written for the reference");
        assert_eq!(code_of(json!({"externalSetMarkChain": "X"})), code::UNSUPPORTED_FIELD);
        assert_eq!(
            code_of(json!({"externalSetMarkChain": "X", "markMasqBit": 3})),
            code::INVALID_CONFIG
        );
        assert_eq!(code_of(json!({"markMasqBit": 32})), code::INVALID_CONFIG);
        assert_eq!(code_of(json!({"conditionsV4": ["tcp", "dport 1\nflush ruleset"]})), 7);
        let settings = conf(json!({"markMasqBit": 3, "snat": null})).settings().expect("good");
        assert!(settings.snat);
        assert_eq!(settings.options.masquerade_bit, 3);
    }

    #[test]
    fn the_containers_addresses_are_the_first_of_each_family() {
        let result = json!({
            "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/x"}],
            "ips": [
                {"address": "10.1.0.1/24", "interface": 0},
                {"address": "10.1.0.2/24", "interface": 1},
                {"address": "10.1.0.3/24", "interface": 1},
                {"address": "fd00::2/64"},
            ],
        });
        let result = AddResult::from_value(&result, Version::LATEST).expect("good");
        let found: Vec<String> =
            container_addresses(&result).expect("good").iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.1.0.2/24", "fd00::2/64"]);
        let wrong = json!({"ips": [{"address": "10.1.0.1/24", "interface": 3}]});
        let wrong = AddResult::from_value(&wrong, Version::LATEST).expect("of the right types");
        assert_eq!(container_addresses(&wrong).expect_err("no such interface").code, 7);
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    proptest! {
        #[test]
        fn fuzz_a_mapping_of_any_values_is_read_or_refused(
            host in any::<i64>(), container in any::<i64>(), protocol in ".{0,8}", ip in "[0-9a-f.:]{0,20}",
        ) {
            let entry = json!({
                "hostPort": host, "containerPort": container, "protocol": protocol, "hostIP": ip,
            });
            let conf: NetConf =
                serde_json::from_value(json!({"runtimeConfig": {"portMappings": [entry]}}))
                    .expect("of the right types");
            let _ = conf.mappings();
        }
    }
}
