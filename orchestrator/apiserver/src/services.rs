//! ClusterIPs and node ports: given out from the cache, so that no two Services share one.
//!
//! Several servers may do so at a time. Each write that takes an address or a port renews one key in the store, the guard,
//! and happens only if nobody renewed it since the cache was looked at; who is overtaken chooses again. Nothing has to be
//! given back then: what is taken is what the Services say. (Upstream has an object per address and a loop that repairs
//! them.) The lock of this process only saves it from overtaking itself.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnetwork::IpNetwork;
use orch_api::{ApiError, FieldError};
use orch_store::Guard;
use rand::Rng as _;
use serde_json::{Value, json};

use crate::families::{self, Ranges};
use crate::read::{self, store_error};
use crate::state::Shared;

/// Renewed by every write that takes an address or a port. No resource lies below `ranges`.
const GUARD: &str = "/registry/ranges/services";

/// What other Services hold.
#[derive(Debug, Default, PartialEq)]
struct Taken {
    addresses: BTreeSet<IpAddr>,
    node_ports: BTreeSet<u16>,
}

impl Taken {
    fn add(&mut self, service: &Value) {
        let spec = &service["spec"];
        let listed = spec["clusterIPs"].as_array().into_iter().flatten();
        let ips = listed.chain([&spec["clusterIP"]]).filter_map(Value::as_str);
        self.addresses.extend(ips.filter_map(|ip| ip.parse::<IpAddr>().ok()));
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
    let options = &shared.options;
    let ranges: Vec<IpNetwork> = [IpNetwork::V4(options.service_cidr)]
        .into_iter()
        .chain(options.service_cidr_v6.map(IpNetwork::V6))
        .collect();
    let errors = complete(service, old, &taken, &ranges, &options.node_port_range);
    let before = old.map(Taken::of).unwrap_or_default();
    let takes = !before.holds(&Taken::of(service));
    Ok(Allocation { errors, guard: takes.then_some(guard) })
}

fn node_ports(service: &Value) -> impl Iterator<Item = u16> {
    service["spec"]["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| &port["nodePort"])
        .chain([&service["spec"]["healthCheckNodePort"]])
        .filter_map(Value::as_u64)
        .filter_map(|port| u16::try_from(port).ok())
        .filter(|port| *port > 0)
}

/// Pure but for the dice: what a Service gets, given what is taken.
fn complete(
    service: &mut Value,
    old: Option<&Value>,
    taken: &Taken,
    ranges: &Ranges,
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
    let before = old.map_or(&Value::Null, |old| &old["spec"]);
    families::complete(&mut service["spec"], before, &taken.addresses, ranges, &mut errors);
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        assign_node_ports(service, old, taken, range, &mut errors);
    } else {
        for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
            if let Some(port) = port.as_object_mut() {
                port.shift_remove("nodePort");
            }
        }
    }
    health_check_port(&mut service["spec"], before, taken, range, &mut errors);
    errors
}

fn assign_node_ports(
    service: &mut Value,
    old: Option<&Value>,
    taken: &Taken,
    range: &RangeInclusive<u16>,
    errors: &mut Vec<FieldError>,
) {
    let mut own: BTreeSet<u16> = node_ports(service).collect();
    let none_wanted = service["spec"]["type"] == "LoadBalancer"
        && service["spec"]["allocateLoadBalancerNodePorts"] == false;
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
        if none_wanted {
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
        match before.or_else(|| free_port(taken, &own, range)) {
            Some(number) => {
                own.insert(number);
                port["nodePort"] = json!(number);
            }
            None => errors.push(FieldError::forbidden(field, "all node ports are taken")),
        }
    }
}

fn free_port(taken: &Taken, own: &BTreeSet<u16>, range: &RangeInclusive<u16>) -> Option<u16> {
    let size = u32::from(range.end() - range.start()) + 1;
    let start = rand::rng().random_range(0..size);
    (0..size)
        .filter_map(|step| u16::try_from(u32::from(*range.start()) + (start + step) % size).ok())
        .find(|number| !taken.node_ports.contains(number) && !own.contains(number))
}

/// Where load balancers ask whether a node can serve: only with `externalTrafficPolicy: Local` do nodes differ.
fn health_check_port(
    spec: &mut Value,
    old: &Value,
    taken: &Taken,
    range: &RangeInclusive<u16>,
    errors: &mut Vec<FieldError>,
) {
    const FIELD: &str = "spec.healthCheckNodePort";
    let wanted = spec["type"] == "LoadBalancer" && spec["externalTrafficPolicy"] == "Local";
    let number = |spec: &Value| spec["healthCheckNodePort"].as_u64().filter(|port| *port > 0);
    let (named, before) = (number(spec), number(old));
    if !wanted {
        if named.is_some() && named != before {
            let detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
            errors.push(FieldError::invalid(FIELD, &spec["healthCheckNodePort"], detail));
        } else if let Some(spec) = spec.as_object_mut() {
            spec.shift_remove("healthCheckNodePort");
        }
        return;
    }
    let own: BTreeSet<u16> = node_ports(&json!({ "spec": spec })).collect();
    match (named, before) {
        (Some(named), Some(before)) if named != before => {
            errors.push(FieldError::invalid(FIELD, &json!(named), "field is immutable"));
        }
        (Some(named), _) => {
            let number = u16::try_from(named).ok();
            if number.is_none_or(|number| taken.node_ports.contains(&number)) {
                let detail = "provided port is already allocated";
                errors.push(FieldError::invalid(FIELD, &json!(named), detail));
            }
        }
        (None, Some(before)) => spec["healthCheckNodePort"] = json!(before),
        (None, None) => match free_port(taken, &own, range) {
            Some(number) => spec["healthCheckNodePort"] = json!(number),
            None => errors.push(FieldError::forbidden(FIELD, "all node ports are taken")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(service: &mut Value, old: Option<&Value>, taken: &Taken) -> Vec<String> {
        let ranges = ["10.96.0.0/12".parse().expect("a network")];
        complete(service, old, taken, &ranges, &(30000..=30002))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn an_address_is_given_kept_and_never_given_twice() {
        let mut service = json!({ "spec": { "type": "ClusterIP" } });
        assert!(run(&mut service, None, &Taken::default()).is_empty());
        let ip: IpAddr =
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

    #[test]
    fn a_load_balancer_asks_nodes_at_a_port_of_its_own_if_they_differ() {
        let spec = json!({ "type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "allocateLoadBalancerNodePorts": false, "ports": [{ "port": 80, "protocol": "TCP" }] });
        let mut service = json!({ "spec": spec });
        assert!(run(&mut service, None, &Taken::default()).is_empty());
        let port = service["spec"]["healthCheckNodePort"].as_u64().expect("a port");
        assert!((30000..=30002).contains(&port), "{port}");
        assert!(service["spec"]["ports"][0]["nodePort"].is_null(), "it wants none");
        let mut same = json!({ "spec": spec });
        assert!(run(&mut same, Some(&service), &Taken::default()).is_empty());
        assert_eq!(same["spec"]["healthCheckNodePort"], port);
        let mut everywhere = service.clone();
        everywhere["spec"]["externalTrafficPolicy"] = json!("Cluster");
        assert!(run(&mut everywhere, Some(&service), &Taken::default()).is_empty());
        assert!(everywhere["spec"]["healthCheckNodePort"].is_null());
    }
}
