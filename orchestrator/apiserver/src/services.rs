//! ClusterIPs and node ports: given out from the cache, so that no two Services share one.
//!
//! Several servers may do so at a time. Each write that takes an address or a port renews one key in the store, the guard,
//! and happens only if nobody renewed it since the cache was looked at; who is overtaken chooses again. Nothing has to be
//! given back then: what is taken is what the Services say. (Upstream has an object per address and a loop that repairs
//! them.) The lock of this process only saves it from overtaking itself.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use ipnetwork::Ipv4Network;
use orch_api::{ApiError, FieldError};
use orch_store::Guard;
use rand::Rng as _;
use serde_json::{Value, json};

use crate::read::{self, store_error};
use crate::state::Shared;

/// Renewed by every write that takes an address or a port. No resource lies below `ranges`.
const GUARD: &str = "/registry/ranges/services";

/// What other Services hold.
#[derive(Debug, Default, PartialEq)]
struct Taken {
    addresses: BTreeSet<Ipv4Addr>,
    node_ports: BTreeSet<u16>,
}

impl Taken {
    fn add(&mut self, service: &Value) {
        self.addresses.extend(
            service["spec"]["clusterIP"].as_str().and_then(|ip| ip.parse::<Ipv4Addr>().ok()),
        );
        self.node_ports.extend(node_ports(service));
    }

    fn of(service: &Value) -> Self {
        let mut taken = Self::default();
        taken.add(service);
        taken
    }

    fn holds(&self, other: &Self) -> bool {
        self.addresses.is_superset(&other.addresses)
            && self.node_ports.is_superset(&other.node_ports)
    }
}

/// What [`allocate`] came to.
pub(crate) struct Allocation {
    pub(crate) errors: Vec<FieldError>,
    /// Something new was taken: the Service has to be written with this guard.
    pub(crate) guard: Option<Guard>,
}

/// Fills in addresses and ports of a Service; `old` is the Service before the change.
pub(crate) async fn allocate(
    shared: &Shared,
    service: &mut Value,
    old: Option<&Value>,
) -> Result<Allocation, ApiError> {
    let Some(stored) = shared.stored("", "services") else {
        return Err(ApiError::internal("no services resource"));
    };
    // The guard first: whatever was taken until then is in a cache that is fresh afterwards.
    let (guard, _) = shared.store.get(GUARD).await.map_err(|error| store_error(&error))?;
    let guard =
        Guard { key: GUARD.to_owned(), revision: guard.map_or(0, |guard| guard.mod_revision) };
    read::fresh(stored).await?;
    let own = stored.resource.key(
        service["metadata"]["namespace"].as_str().unwrap_or_default(),
        service["metadata"]["name"].as_str().unwrap_or_default(),
    );
    let mut taken = Taken::default();
    for object in stored.cache.snapshot().iter().filter(|object| *object.key != *own) {
        taken.add(&read::parse(&object.bytes)?);
    }
    let (cidr, range) = (shared.options.service_cidr, &shared.options.node_port_range);
    let errors = complete(service, old, &taken, cidr, range);
    let before = old.map(Taken::of).unwrap_or_default();
    let takes = !before.holds(&Taken::of(service));
    Ok(Allocation { errors, guard: takes.then_some(guard) })
}

fn node_ports(service: &Value) -> impl Iterator<Item = u16> {
    service["spec"]["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|port| port["nodePort"].as_u64())
        .filter_map(|port| u16::try_from(port).ok())
        .filter(|port| *port > 0)
}

/// Pure but for the dice: what a Service gets, given what is taken.
fn complete(
    service: &mut Value,
    old: Option<&Value>,
    taken: &Taken,
    cidr: Ipv4Network,
    range: &RangeInclusive<u16>,
) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let kind = service["spec"]["type"].as_str().unwrap_or("ClusterIP").to_owned();
    if kind == "ExternalName" {
        if let Some(spec) = service["spec"].as_object_mut() {
            for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                spec.shift_remove(key);
            }
        }
        return errors;
    }
    cluster_ip(service, old, taken, cidr, &mut errors);
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        assign_node_ports(service, old, taken, range, &mut errors);
    } else {
        for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
            if let Some(port) = port.as_object_mut() {
                port.shift_remove("nodePort");
            }
        }
    }
    errors
}

fn cluster_ip(
    service: &mut Value,
    old: Option<&Value>,
    taken: &Taken,
    cidr: Ipv4Network,
    errors: &mut Vec<FieldError>,
) {
    let spec = &mut service["spec"];
    let named = [&spec["clusterIP"], &spec["clusterIPs"][0]]
        .into_iter()
        .filter_map(Value::as_str)
        .find(|ip| !ip.is_empty())
        .map(str::to_owned);
    let before = old
        .and_then(|old| old["spec"]["clusterIP"].as_str())
        .filter(|ip| !ip.is_empty())
        .map(str::to_owned);
    let chosen = match named.or(before.clone()) {
        Some(ip) if ip == "None" => ip,
        Some(ip) => {
            let parsed: Option<Ipv4Addr> = ip.parse().ok();
            match parsed {
                Some(address) if taken.addresses.contains(&address) => errors.push(FieldError::invalid(
                    "spec.clusterIPs",
                    &json!([ip]),
                    format!("failed to allocate IP {ip}: provided IP is already allocated"),
                )),
                Some(address) if cidr.contains(address) => {}
                // The address it already has stays good when the range was changed.
                _ if before.as_deref() == Some(&ip) => {}
                _ => errors.push(FieldError::invalid(
                    "spec.clusterIPs",
                    &json!([ip]),
                    format!("failed to allocate IP {ip}: the provided IP is not in the valid range. The range of valid IPs is {cidr}"),
                )),
            }
            ip
        }
        None => match free_address(taken, cidr) {
            Some(address) => address.to_string(),
            None => {
                errors.push(FieldError::forbidden(
                    "spec.clusterIP",
                    format!("the range {cidr} is full"),
                ));
                return;
            }
        },
    };
    spec["clusterIP"] = json!(chosen);
    spec["clusterIPs"] = json!([chosen]);
    if !spec["ipFamilies"].is_array() {
        spec["ipFamilies"] = json!(["IPv4"]);
    }
    if !spec["ipFamilyPolicy"].is_string() {
        spec["ipFamilyPolicy"] = json!("SingleStack");
    }
}

/// A free address, from a random place on. The first 256 (or 1/16 of the range) are left to those who name one.
fn free_address(taken: &Taken, cidr: Ipv4Network) -> Option<Ipv4Addr> {
    let size = 1_u64 << (32 - cidr.prefix());
    let reserved = (size / 16).clamp(0, 256).max(2);
    let usable = size.checked_sub(reserved + 1).filter(|usable| *usable > 0)?;
    let start = rand::rng().random_range(0..usable);
    let base = u64::from(cidr.network().to_bits()) + reserved;
    (0..usable)
        .map(|step| base + (start + step) % usable)
        .filter_map(|bits| u32::try_from(bits).ok().map(Ipv4Addr::from_bits))
        .find(|address| !taken.addresses.contains(address))
}

fn assign_node_ports(
    service: &mut Value,
    old: Option<&Value>,
    taken: &Taken,
    range: &RangeInclusive<u16>,
    errors: &mut Vec<FieldError>,
) {
    let mut own: BTreeSet<u16> = node_ports(service).collect();
    for (index, port) in service["spec"]["ports"].as_array_mut().into_iter().flatten().enumerate() {
        let field = format!("spec.ports[{index}].nodePort");
        let named = port["nodePort"].as_u64().filter(|port| *port > 0);
        if let Some(named) = named {
            let number = u16::try_from(named).ok().filter(|number| range.contains(number));
            match number {
                None => errors.push(FieldError::invalid(
                    field,
                    &port["nodePort"],
                    format!("provided port is not in the valid range. The range of valid ports is {}-{}", range.start(), range.end()),
                )),
                Some(number) if taken.node_ports.contains(&number) => {
                    errors.push(FieldError::invalid(field, &port["nodePort"], "provided port is already allocated"));
                }
                Some(_) => {}
            }
            continue;
        }
        // A port that the client left out keeps the number it had.
        let before = old
            .and_then(|old| old["spec"]["ports"].as_array())
            .into_iter()
            .flatten()
            .find(|before| before["port"] == port["port"] && before["protocol"] == port["protocol"])
            .and_then(|before| before["nodePort"].as_u64())
            .and_then(|before| u16::try_from(before).ok())
            .filter(|before| *before > 0 && !own.contains(before));
        let size = u32::from(range.end() - range.start()) + 1;
        let start = rand::rng().random_range(0..size);
        let free = (0..size)
            .filter_map(|step| {
                u16::try_from(u32::from(*range.start()) + (start + step) % size).ok()
            })
            .find(|number| !taken.node_ports.contains(number) && !own.contains(number));
        match before.or(free) {
            Some(number) => {
                own.insert(number);
                port["nodePort"] = json!(number);
            }
            None => errors.push(FieldError::forbidden(field, "all node ports are taken")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(service: &mut Value, old: Option<&Value>, taken: &Taken) -> Vec<String> {
        let cidr = "10.96.0.0/12".parse().expect("a network");
        complete(service, old, taken, cidr, &(30000..=30002))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn an_address_is_given_kept_and_never_given_twice() {
        let mut service = json!({ "spec": { "type": "ClusterIP" } });
        assert!(run(&mut service, None, &Taken::default()).is_empty());
        let ip: Ipv4Addr =
            service["spec"]["clusterIP"].as_str().expect("an address").parse().expect("IPv4");
        let mut other = json!({ "spec": { "clusterIP": ip.to_string() } });
        let taken = Taken { addresses: [ip].into(), node_ports: BTreeSet::new() };
        assert!(run(&mut other, None, &taken)[0].contains("already allocated"));
        let mut again = json!({ "spec": {} });
        assert!(run(&mut again, Some(&service), &Taken::default()).is_empty());
        assert_eq!(again["spec"]["clusterIP"], service["spec"]["clusterIP"]);
        let mut headless = json!({ "spec": { "clusterIP": "None" } });
        assert!(run(&mut headless, None, &Taken::default()).is_empty());
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    }

    #[test]
    fn node_ports_run_out_with_a_clear_word() {
        let ports = |count: i64| {
            (0..count).map(|n| json!({ "port": 80 + n, "protocol": "TCP" })).collect::<Vec<_>>()
        };
        let mut service = json!({ "spec": { "type": "NodePort", "ports": ports(3) } });
        assert!(run(&mut service, None, &Taken::default()).is_empty());
        let mut numbers: Vec<u16> = node_ports(&service).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [30000, 30001, 30002]);
        let mut many = json!({ "spec": { "type": "NodePort", "ports": ports(4) } });
        assert!(run(&mut many, None, &Taken::default())[0].contains("all node ports are taken"));
        let mut taken =
            json!({ "spec": { "type": "NodePort", "ports": [{ "port": 80, "nodePort": 30001 }] } });
        let others = Taken { addresses: BTreeSet::new(), node_ports: [30001].into() };
        assert!(run(&mut taken, None, &others)[0].contains("already allocated"));
    }
}
