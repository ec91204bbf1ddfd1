//! Endpoints that somebody writes by hand, for a Service without selector, as EndpointSlices: those are what nodes read.
//! Pure (upstream's endpointslicemirroring controller).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orch_api::meta;

use super::slices::Step;
use super::{MANAGED_BY, SERVICE_NAME, label};
use crate::context::{name, namespace};

pub(super) const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
/// Label of Endpoints that are not to be mirrored: their owner writes slices too.
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Annotation of Endpoints that old programs elect their leader with.
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
/// Annotations that say something about the Endpoints object alone.
const OWN_ANNOTATIONS: [&str; 3] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    "endpoints.kubernetes.io/last-change-trigger-time",
    "endpoints.kubernetes.io/over-capacity",
];
/// Endpoints per slice and subset (upstream's maxEndpointsPerSubset).
const MOST: usize = 1000;
/// Longest base of a slice's name: dash and hash fit into a DNS subdomain.
const BASE_MOST: usize = 253 - 9;

pub(super) fn is_mirror(slice: &EndpointSlice) -> bool {
    label(slice, MANAGED_BY) == Some(MANAGER)
}

fn is_mirrored(endpoints: &Endpoints) -> bool {
    let meta = &endpoints.metadata;
    let skip = meta.labels.as_ref().and_then(|labels| labels.get(SKIP));
    let leader = meta.annotations.as_ref().is_some_and(|all| all.contains_key(LEADER));
    skip.is_none_or(|skip| skip != "true") && !leader && meta.deletion_timestamp.is_none()
}

/// Family, and per port name, protocol, number and application protocol.
type Group = (&'static str, Vec<(String, String, i32, Option<String>)>);

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..Default::default() }),
        hostname: address.hostname.clone().filter(|hostname| !hostname.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

fn groups(subsets: &[EndpointSubset]) -> BTreeMap<Group, Vec<Endpoint>> {
    let mut groups: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    for subset in subsets {
        let ports = subset.ports.iter().flatten().map(|port| {
            (
                port.name.clone().unwrap_or_default(),
                port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                port.port,
                port.app_protocol.clone(),
            )
        });
        let mut ports: Vec<_> = ports.collect();
        ports.sort();
        let ready = subset.addresses.iter().flatten().map(|address| (address, true));
        let not_ready = subset.not_ready_addresses.iter().flatten().map(|address| (address, false));
        for (address, ready) in ready.chain(not_ready) {
            let family = match address.ip.parse::<IpAddr>() {
                Ok(IpAddr::V4(_)) => "IPv4",
                Ok(IpAddr::V6(_)) => "IPv6",
                Err(_) => continue,
            };
            let list = groups.entry((family, ports.clone())).or_default();
            if list.len() < MOST {
                list.push(endpoint(address, ready));
            }
        }
    }
    groups
}

fn slice(endpoints: &Endpoints, group: &Group, list: Vec<Endpoint>) -> EndpointSlice {
    let own = name(&endpoints.metadata);
    let uid = endpoints.metadata.uid.as_deref().unwrap_or_default();
    // FNV-1a: the same content finds the same slice again.
    let hash = format!("{uid}/{group:?}")
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let base: String = own.chars().take(BASE_MOST).collect();
    let mut labels = endpoints.metadata.labels.clone().unwrap_or_default();
    labels.remove(SKIP);
    labels.insert(SERVICE_NAME.to_owned(), own.to_owned());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    let mut annotations = endpoints.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|key, _| !OWN_ANNOTATIONS.contains(&key.as_str()));
    let ports = group.1.iter().map(|(name, protocol, port, app_protocol)| EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*port),
        app_protocol: app_protocol.clone(),
    });
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(format!("{base}-{hash:08x}")),
            namespace: Some(namespace(&endpoints.metadata).to_owned()),
            labels: Some(labels),
            annotations: (!annotations.is_empty()).then_some(annotations),
            owner_references: Some(vec![meta::controller_reference(endpoints)]),
            ..ObjectMeta::default()
        },
        address_type: group.0.to_owned(),
        ports: Some(ports.collect()),
        endpoints: Some(list),
    }
}

/// From the mirrors there are to those there should be; none without Endpoints or for Endpoints that are not mirrored.
pub(super) fn plan(endpoints: Option<&Endpoints>, current: &[Arc<EndpointSlice>]) -> Vec<Step> {
    let wanted: Vec<EndpointSlice> = endpoints
        .filter(|endpoints| is_mirrored(endpoints))
        .map(|endpoints| {
            let groups = groups(endpoints.subsets.as_deref().unwrap_or_default()).into_iter();
            groups.map(|(group, list)| slice(endpoints, &group, list)).collect()
        })
        .unwrap_or_default();
    let is_wanted =
        |old: &EndpointSlice| wanted.iter().any(|new| new.metadata.name == old.metadata.name);
    let gone: Vec<Step> =
        current.iter().filter(|old| !is_wanted(old)).map(|old| Step::Delete(old.clone())).collect();
    let mut steps = Vec::new();
    for mut new in wanted {
        match current.iter().find(|old| old.metadata.name == new.metadata.name) {
            None => steps.push(Step::Create(new)),
            Some(old) => {
                let (labels, annotations) =
                    (new.metadata.labels.take(), new.metadata.annotations.take());
                let same = old.metadata.labels == labels
                    && old.metadata.annotations.clone().unwrap_or_default()
                        == annotations.clone().unwrap_or_default()
                    && old.endpoints.clone().unwrap_or_default()
                        == new.endpoints.clone().unwrap_or_default();
                if !same {
                    new.metadata = old.metadata.clone();
                    (new.metadata.labels, new.metadata.annotations) = (labels, annotations);
                    steps.push(Step::Update(new));
                }
            }
        }
    }
    steps.extend(gone);
    steps
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn endpoints(meta: Value, subsets: Value) -> Endpoints {
        let mut all = json!({ "metadata": { "name": "db", "namespace": "shop", "uid": "e" }, "subsets": subsets });
        for (key, value) in meta.as_object().into_iter().flatten() {
            all["metadata"][key] = value.clone();
        }
        serde_json::from_value(all).expect("Endpoints")
    }

    fn created(steps: Vec<Step>) -> Vec<Arc<EndpointSlice>> {
        let made = steps.into_iter().map(|step| match step {
            Step::Create(slice) => Arc::new(slice),
            other => panic!("{other:?}"),
        });
        made.collect()
    }

    #[test]
    fn hand_written_endpoints_become_slices_by_family_and_follow() {
        let subsets = json!([{ "addresses": [{ "ip": "192.0.2.7" }, { "ip": "2001:db8::7" }],
            "notReadyAddresses": [{ "ip": "192.0.2.8" }], "ports": [{ "port": 5432, "protocol": "TCP" }] }]);
        let first = endpoints(json!({ "labels": { "app": "db" } }), subsets);
        let slices = created(plan(Some(&first), &[]));
        assert_eq!(slices.len(), 2, "one per family");
        let four = slices.iter().find(|slice| slice.address_type == "IPv4").expect("IPv4");
        assert_eq!(label(four, SERVICE_NAME), Some("db"));
        assert_eq!(label(four, MANAGED_BY), Some(MANAGER));
        assert_eq!(label(four, "app"), Some("db"));
        let ready: Vec<_> = four
            .endpoints
            .iter()
            .flatten()
            .map(|one| (one.addresses[0].as_str(), one.conditions.as_ref().and_then(|c| c.ready)))
            .collect();
        assert_eq!(ready, [("192.0.2.7", Some(true)), ("192.0.2.8", Some(false))]);
        assert_eq!(plan(Some(&first), &slices), [], "a second look changes nothing");

        let moved = json!([{ "addresses": [{ "ip": "192.0.2.9" }], "ports": [{ "port": 5432, "protocol": "TCP" }] }]);
        let steps = plan(Some(&endpoints(json!({ "labels": { "app": "db" } }), moved)), &slices);
        assert!(
            matches!(&steps[..], [Step::Update(four), Step::Delete(_)]
                if four.endpoints.iter().flatten().all(|one| one.addresses == ["192.0.2.9"])),
            "{steps:?}"
        );
        assert_eq!(plan(None, &slices).len(), 2, "they go with the Endpoints");
    }

    #[test]
    fn endpoints_whose_owner_writes_slices_are_left_alone() {
        let subsets = json!([{ "addresses": [{ "ip": "192.0.2.7" }], "ports": [{ "port": 1 }] }]);
        let skip = endpoints(json!({ "labels": { (SKIP): "true" } }), subsets.clone());
        assert_eq!(plan(Some(&skip), &[]), []);
        let leader = endpoints(json!({ "annotations": { (LEADER): "{}" } }), subsets);
        assert_eq!(plan(Some(&leader), &[]), []);
    }
}
