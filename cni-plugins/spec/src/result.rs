//! What ADD answers: one internal form, one serialiser per version.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use crate::{Error, Version, code, or_default};

/// The result of ADD, and `prevResult`.
///
/// Keys that are not known here are kept in `extra`, so that what another plugin of the chain wrote survives.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct AddResult {
    /// Interfaces on both sides.
    #[serde(default, deserialize_with = "or_default")]
    pub interfaces: Vec<Interface>,
    /// Addresses.
    #[serde(default, deserialize_with = "or_default")]
    pub ips: Vec<IpConfig>,
    /// Routes in the container.
    #[serde(default, deserialize_with = "or_default")]
    pub routes: Vec<Route>,
    /// Name service.
    #[serde(default, deserialize_with = "or_default")]
    pub dns: Dns,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// An interface that ADD made or found.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address, or empty.
    #[serde(default, deserialize_with = "or_default")]
    pub mac: String,
    /// Its MTU (from 1.1.0).
    #[serde(default)]
    pub mtu: Option<u32>,
    /// `CNI_NETNS` for one in the container, empty for one on the host.
    #[serde(default, deserialize_with = "or_default")]
    pub sandbox: String,
    /// Path of a socket to the interface (from 1.1.0), or empty.
    #[serde(default, rename = "socketPath", deserialize_with = "or_default")]
    pub socket_path: String,
    /// PCI address (from 1.1.0), or empty.
    #[serde(default, rename = "pciID", deserialize_with = "or_default")]
    pub pci_id: String,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct IpConfig {
    /// Index into the result's `interfaces`. Some plugins leave it out or say -1.
    #[serde(default, deserialize_with = "interface_index")]
    pub interface: Option<usize>,
    /// Address with the length of its prefix.
    #[serde(deserialize_with = "cidr")]
    pub address: IpNetwork,
    /// The default gateway of the subnet.
    #[serde(default, deserialize_with = "optional_ip")]
    pub gateway: Option<IpAddr>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Route {
    /// Where to.
    #[serde(deserialize_with = "cidr")]
    pub dst: IpNetwork,
    /// By which gateway; without one, the gateway of an address of the same family.
    #[serde(default, deserialize_with = "optional_ip")]
    pub gw: Option<IpAddr>,
    /// Path MTU (from 1.1.0, as all that follow).
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Maximal TCP segment to advertise.
    #[serde(default)]
    pub advmss: Option<u32>,
    /// Metric.
    #[serde(default)]
    pub priority: Option<u32>,
    /// Routing table.
    #[serde(default)]
    pub table: Option<u32>,
    /// 0 global, 253 link, 254 host.
    #[serde(default)]
    pub scope: Option<u8>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Name service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Dns {
    /// Servers, in order.
    #[serde(default, deserialize_with = "or_default")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, deserialize_with = "or_default")]
    pub domain: String,
    /// Domains to search, in order.
    #[serde(default, deserialize_with = "or_default")]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(default, deserialize_with = "or_default")]
    pub options: Vec<String>,
}

fn interface_index<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    let index: Option<i64> = Option::deserialize(deserializer)?;
    Ok(index.and_then(|index| usize::try_from(index).ok()))
}

fn cidr<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpNetwork, D::Error> {
    parse_cidr(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

fn optional_ip<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    match Option::<String>::deserialize(deserializer)?.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text
            .parse()
            .map(Some)
            .map_err(|_| serde::de::Error::custom(format!("\"{text}\" is not an IP address"))),
    }
}

/// Reads `ADDRESS/LENGTH`; host bits are kept. A bare address is refused: its prefix is a guess.
///
/// # Errors
/// Says what is wrong, for people.
pub fn parse_cidr(text: &str) -> Result<IpNetwork, String> {
    let wrong =
        || format!("\"{text}\" is not an address with a prefix length, such as 10.1.0.0/16");
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    // `u8` takes a leading `+`, and CIDR does not.
    if prefix.is_empty() || !prefix.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let (address, prefix) =
        (address.parse().map_err(|_| wrong())?, prefix.parse().map_err(|_| wrong())?);
    IpNetwork::new(address, prefix).map_err(|_| wrong())
}

impl Dns {
    /// Nothing is set; then results leave `dns` out.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// As in configurations and results.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut map = Map::new();
        put_list(&mut map, "nameservers", &self.nameservers);
        put_text(&mut map, "domain", &self.domain);
        put_list(&mut map, "search", &self.search);
        put_list(&mut map, "options", &self.options);
        Value::Object(map)
    }
}

fn put_list(map: &mut Map<String, Value>, key: &str, list: &[String]) {
    if !list.is_empty() {
        map.insert(key.to_owned(), json!(list));
    }
}

fn put_text(map: &mut Map<String, Value>, key: &str, text: &str) {
    if !text.is_empty() {
        map.insert(key.to_owned(), json!(text));
    }
}

fn put<T: serde::Serialize>(map: &mut Map<String, Value>, key: &str, value: Option<T>) {
    if let Some(value) = value {
        map.insert(key.to_owned(), json!(value));
    }
}

impl Interface {
    fn to_value(&self, version: Version) -> Value {
        let mut map = Map::new();
        map.insert("name".to_owned(), json!(self.name));
        put_text(&mut map, "mac", &self.mac);
        if version >= Version::V1_1_0 {
            put(&mut map, "mtu", self.mtu);
        }
        put_text(&mut map, "sandbox", &self.sandbox);
        if version >= Version::V1_1_0 {
            put_text(&mut map, "socketPath", &self.socket_path);
            put_text(&mut map, "pciID", &self.pci_id);
        }
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}

impl IpConfig {
    /// An address without more.
    #[must_use]
    pub fn new(address: IpNetwork) -> Self {
        Self { interface: None, address, gateway: None, extra: Map::new() }
    }

    fn to_value(&self, version: Version) -> Value {
        let mut map = Map::new();
        if version < Version::V1_0_0 {
            map.insert("version".to_owned(), json!(if self.address.is_ipv4() { "4" } else { "6" }));
        }
        put(&mut map, "interface", self.interface);
        map.insert("address".to_owned(), json!(self.address.to_string()));
        put(&mut map, "gateway", self.gateway);
        // 1.0.0 dropped `version`; one that came in with an older result is not to go out again.
        map.extend(
            self.extra
                .iter()
                .filter(|(key, _)| *key != "version")
                .map(|(k, v)| (k.clone(), v.clone())),
        );
        Value::Object(map)
    }
}

impl Route {
    /// A route without more.
    #[must_use]
    pub fn new(dst: IpNetwork, gw: Option<IpAddr>) -> Self {
        let extra = Map::new();
        Self { dst, gw, mtu: None, advmss: None, priority: None, table: None, scope: None, extra }
    }

    fn to_value(&self, version: Version) -> Value {
        let mut map = Map::new();
        map.insert("dst".to_owned(), json!(self.dst.to_string()));
        put(&mut map, "gw", self.gw);
        if version >= Version::V1_1_0 {
            put(&mut map, "mtu", self.mtu);
            put(&mut map, "advmss", self.advmss);
            put(&mut map, "priority", self.priority);
            put(&mut map, "table", self.table);
            put(&mut map, "scope", self.scope);
        }
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}

/// One family's half of a result before 0.3.0.
#[derive(Deserialize)]
struct OldIp {
    #[serde(deserialize_with = "cidr")]
    ip: IpNetwork,
    #[serde(default, deserialize_with = "optional_ip")]
    gateway: Option<IpAddr>,
    #[serde(default, deserialize_with = "or_default")]
    routes: Vec<Route>,
}

/// A result before 0.3.0.
#[derive(Deserialize)]
struct OldResult {
    #[serde(default)]
    ip4: Option<OldIp>,
    #[serde(default)]
    ip6: Option<OldIp>,
    #[serde(default, deserialize_with = "or_default")]
    dns: Dns,
}

impl AddResult {
    /// Reads a result; its own `cniVersion` counts, or `version` if it has none.
    ///
    /// # Errors
    /// Code 6 naming what does not fit, code 1 if its version is not known.
    pub fn from_value(value: &Value, version: Version) -> Result<Self, Error> {
        let decode =
            |error: serde_json::Error| Error::new(code::DECODE, format!("decode result: {error}"));
        let map = value
            .as_object()
            .ok_or_else(|| Error::new(code::DECODE, "decode result: it is not an object"))?;
        let version = if map.contains_key("cniVersion") { Version::of_conf(map)? } else { version };
        if version < Version::V0_3_0 {
            return OldResult::deserialize(value).map(Self::from_old).map_err(decode);
        }
        let mut result = Self::deserialize(value).map_err(decode)?;
        result.extra.remove("cniVersion");
        for ip in &mut result.ips {
            ip.extra.remove("version");
        }
        Ok(result)
    }

    /// Addresses that are not of an interface of the host, with their subnets.
    ///
    /// # Errors
    /// Code 7 if one is of an interface that the result does not have.
    pub fn container_addresses(&self) -> Result<Vec<IpNetwork>, Error> {
        let mut found = Vec::new();
        for ip in &self.ips {
            let on_host = match ip.interface {
                None => false,
                Some(index) => match self.interfaces.get(index) {
                    Some(interface) => interface.sandbox.is_empty(),
                    None => {
                        let msg = format!(
                            "\"prevResult\": the address {} is of interface {index}, and there are {}",
                            ip.address,
                            self.interfaces.len()
                        );
                        return Err(Error::new(code::INVALID_CONFIG, msg));
                    }
                },
            };
            if !on_host {
                found.push(ip.address);
            }
        }
        Ok(found)
    }

    fn from_old(old: OldResult) -> Self {
        let mut result = Self { dns: old.dns, ..Self::default() };
        for half in [old.ip4, old.ip6].into_iter().flatten() {
            result.ips.push(IpConfig { gateway: half.gateway, ..IpConfig::new(half.ip) });
            result.routes.extend(half.routes);
        }
        result
    }

    /// The document for stdout, in the form of a version.
    ///
    /// # Errors
    /// Code 1 if the version cannot say it: before 0.3.0 a result had to have an address.
    pub fn to_value(&self, version: Version) -> Result<Value, Error> {
        let mut map = Map::new();
        map.insert("cniVersion".to_owned(), json!(version.as_str()));
        if version < Version::V0_3_0 {
            self.put_old(&mut map, version)?;
        } else {
            let lists: [(&str, Vec<Value>); 3] = [
                ("interfaces", self.interfaces.iter().map(|one| one.to_value(version)).collect()),
                ("ips", self.ips.iter().map(|one| one.to_value(version)).collect()),
                ("routes", self.routes.iter().map(|one| one.to_value(version)).collect()),
            ];
            for (key, list) in lists {
                if !list.is_empty() {
                    map.insert(key.to_owned(), Value::Array(list));
                }
            }
        }
        if !self.dns.is_empty() {
            map.insert("dns".to_owned(), self.dns.to_value());
        }
        for (key, value) in &self.extra {
            map.entry(key.clone()).or_insert_with(|| value.clone());
        }
        Ok(Value::Object(map))
    }

    fn put_old(&self, map: &mut Map<String, Value>, version: Version) -> Result<(), Error> {
        if self.ips.is_empty() {
            return Err(Error::new(
                code::INCOMPATIBLE_VERSION,
                format!(
                    "\"cniVersion\" is \"{version}\", whose results cannot be without an address"
                ),
            ));
        }
        for (key, v4) in [("ip4", true), ("ip6", false)] {
            // One address per family: the first, as in the reference.
            let Some(ip) = self.ips.iter().find(|ip| ip.address.is_ipv4() == v4) else { continue };
            let mut half = Map::new();
            half.insert("ip".to_owned(), json!(ip.address.to_string()));
            put(&mut half, "gateway", ip.gateway);
            let routes: Vec<Value> = self
                .routes
                .iter()
                .filter(|route| route.dst.is_ipv4() == v4)
                .map(|route| route.to_value(version))
                .collect();
            if !routes.is_empty() {
                half.insert("routes".to_owned(), Value::Array(routes));
            }
            map.insert(key.to_owned(), Value::Object(half));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
