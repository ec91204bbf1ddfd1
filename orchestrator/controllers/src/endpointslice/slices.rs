//! Backends into EndpointSlices: one set per address family and ports, at most a hundred endpoints each. Pure.
//!
//! An endpoint stays in the slice it is in, so that a pod that comes or goes changes one slice. Names are made from
//! what a slice holds: a slice that the cache does not show yet is not created twice under another name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orch_api::meta;

use super::plan::{Backend, Port};
use super::{MANAGED_BY, MANAGER, SERVICE_NAME, owned_by};
use crate::context::{name, namespace};

/// Endpoints per slice (upstream's default).
const MOST: usize = 100;
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Longest base of a slice's name, so that dash and suffix fit into a DNS label… a Service's name is one itself.
const BASE_MOST: usize = 63 - 9;

#[derive(Debug, PartialEq)]
pub(super) enum Step {
    Create(EndpointSlice),
    Update(EndpointSlice),
    Delete(Arc<EndpointSlice>),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Group {
    family: &'static str,
    ports: Vec<Port>,
}

fn families(service: &Service) -> BTreeSet<&'static str> {
    let spec = service.spec.as_ref();
    let named = spec.and_then(|spec| spec.ip_families.clone()).unwrap_or_default();
    let mut all: BTreeSet<_> =
        named.iter().map(|family| if family == "IPv6" { "IPv6" } else { "IPv4" }).collect();
    if all.is_empty() {
        all.insert("IPv4");
    }
    all
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// For whom an endpoint is meant, by `trafficDistribution`: for its own zone, or its own node. Nodes judge whether that
/// leaves anybody without one. Who is not ready is meant for nobody.
fn hints(service: &Service, backend: &Backend) -> Option<EndpointHints> {
    let wish = service.spec.as_ref()?.traffic_distribution.as_deref()?;
    let same_node = wish == "PreferSameNode";
    if !backend.ready || !(same_node || matches!(wish, "PreferClose" | "PreferSameZone")) {
        return None;
    }
    let zones = backend.zone.clone().map(|name| vec![ForZone { name }]);
    let nodes = backend.node.clone().filter(|_| same_node).map(|name| vec![ForNode { name }]);
    (zones.is_some() || nodes.is_some())
        .then_some(EndpointHints { for_nodes: nodes, for_zones: zones })
}

fn endpoint(service: &Service, backend: &Backend, address: IpAddr) -> Endpoint {
    Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(backend.ready),
            serving: Some(backend.serving),
            terminating: Some(backend.terminating),
        }),
        hostname: backend.hostname.clone(),
        node_name: backend.node.clone(),
        target_ref: Some(backend.reference.clone()),
        zone: backend.zone.clone(),
        hints: hints(service, backend),
        ..Endpoint::default()
    }
}

fn group_of(slice: &EndpointSlice) -> Group {
    let ports = slice.ports.iter().flatten().map(|port| Port {
        name: port.name.clone().unwrap_or_default(),
        protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
        port: port.port.unwrap_or(0),
        app_protocol: port.app_protocol.clone(),
    });
    let family = if slice.address_type == "IPv6" { "IPv6" } else { "IPv4" };
    Group { family, ports: sorted(ports.collect()) }
}

fn sorted(mut ports: Vec<Port>) -> Vec<Port> {
    ports.sort();
    ports
}

/// What identifies an endpoint in a slice.
fn identity(endpoint: &Endpoint) -> (String, String) {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.clone());
    (uid.unwrap_or_default(), endpoint.addresses.first().cloned().unwrap_or_default())
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    for reserved in [SERVICE_NAME, MANAGED_BY, HEADLESS] {
        labels.remove(reserved);
    }
    labels.insert(SERVICE_NAME.to_owned(), name(&service.metadata).to_owned());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    if service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()) == Some("None") {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    labels
}

fn new_slice(service: &Service, group: &Group, taken: &mut BTreeSet<String>) -> EndpointSlice {
    let service_name = name(&service.metadata);
    let base: String = service_name.chars().take(BASE_MOST).collect();
    let mut number = 0_u32;
    let slice_name = loop {
        // FNV-1a over Service, group and number.
        let uid = service.metadata.uid.as_deref().unwrap_or_default();
        let text = format!("{uid}/{group:?}/{number}");
        let hash = text
            .bytes()
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let candidate = format!("{base}-{hash:08x}");
        if taken.insert(candidate.clone()) {
            break candidate;
        }
        number += 1;
    };
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(slice_name),
            namespace: Some(namespace(&service.metadata).to_owned()),
            labels: Some(labels(service)),
            owner_references: Some(vec![meta::controller_reference(service)]),
            ..ObjectMeta::default()
        },
        address_type: group.family.to_owned(),
        ports: Some(
            group
                .ports
                .iter()
                .map(|port| EndpointPort {
                    name: Some(port.name.clone()),
                    protocol: Some(port.protocol.clone()),
                    port: Some(port.port),
                    app_protocol: port.app_protocol.clone(),
                })
                .collect(),
        ),
        endpoints: Some(Vec::new()),
    }
}

/// From the slices there are to those there should be.
pub(super) fn plan(
    service: &Service,
    backends: &[Backend],
    current: &[Arc<EndpointSlice>],
) -> Vec<Step> {
    let families = families(service);
    let mut wanted: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    for backend in backends {
        for family in &families {
            let address = backend.addresses.iter().find(|ip| self::family(**ip) == *family);
            if let Some(address) = address {
                let group = Group { family, ports: sorted(backend.ports.clone()) };
                wanted.entry(group).or_default().push(endpoint(service, backend, *address));
            }
        }
    }
    // One empty slice says "we looked, there is none".
    for family in families {
        if !wanted.keys().any(|group| group.family == family) {
            wanted.insert(Group { family, ports: Vec::new() }, Vec::new());
        }
    }
    let mut taken: BTreeSet<String> =
        current.iter().map(|slice| name(&slice.metadata).to_owned()).collect();
    let mut steps = Vec::new();
    for (group, endpoints) in wanted {
        let same: Vec<_> = current
            .iter()
            .filter(|slice| owned_by(service, slice) && group_of(slice) == group)
            .collect();
        steps.extend(fill(service, &group, endpoints, &same, &mut taken));
    }
    // Slices of other ports, families or an earlier Service of this name, after their successors are there.
    let kept: BTreeSet<&str> = steps
        .iter()
        .filter_map(|step| match step {
            Fill::Keep(name) => Some(name.as_str()),
            Fill::Do(step) => match step.as_ref() {
                Step::Update(slice) => Some(name(&slice.metadata)),
                _ => None,
            },
        })
        .collect();
    let gone: Vec<Step> = current
        .iter()
        .filter(|slice| !kept.contains(name(&slice.metadata)))
        .map(|slice| Step::Delete(slice.clone()))
        .collect();
    let done = steps.into_iter().filter_map(|step| match step {
        Fill::Do(step) => Some(*step),
        Fill::Keep(_) => None,
    });
    done.chain(gone).collect()
}

enum Fill {
    Keep(String),
    Do(Box<Step>),
}

/// Spreads the endpoints of one group over its slices.
fn fill(
    service: &Service,
    group: &Group,
    endpoints: Vec<Endpoint>,
    current: &[&Arc<EndpointSlice>],
    taken: &mut BTreeSet<String>,
) -> Vec<Fill> {
    let mut left: HashMap<_, _> = endpoints.iter().map(|one| (identity(one), one)).collect();
    let mut slices: Vec<(Option<&EndpointSlice>, EndpointSlice)> = Vec::new();
    for slice in current {
        let stay = slice.endpoints.iter().flatten().filter_map(|old| left.remove(&identity(old)));
        let mut new = EndpointSlice::clone(slice);
        new.endpoints = Some(stay.take(MOST).cloned().collect());
        new.metadata.labels = Some(labels(service));
        slices.push((Some(slice), new));
    }
    // In the order of the pods, so that the same input gives the same slices.
    let mut rest = endpoints.iter().filter(|one| left.contains_key(&identity(one))).peekable();
    for (_, slice) in &mut slices {
        let list = slice.endpoints.get_or_insert_default();
        while list.len() < MOST
            && let Some(endpoint) = rest.next()
        {
            list.push(endpoint.clone());
        }
    }
    while rest.peek().is_some() || slices.is_empty() {
        let mut slice = new_slice(service, group, taken);
        slice.endpoints = Some(rest.by_ref().take(MOST).cloned().collect());
        slices.push((None, slice));
    }
    let filled = slices.iter().any(|(_, slice)| slice.endpoints.iter().any(|all| !all.is_empty()));
    let mut empty_kept = filled;
    let mut steps = Vec::new();
    for (old, slice) in slices {
        let empty = slice.endpoints.as_ref().is_none_or(Vec::is_empty);
        match old {
            // Left out of what is kept: deleted.
            Some(_) if empty && empty_kept => {}
            Some(old) if is_same(old, &slice) => {
                steps.push(Fill::Keep(name(&slice.metadata).to_owned()));
            }
            Some(_) => steps.push(Fill::Do(Box::new(Step::Update(slice)))),
            None => steps.push(Fill::Do(Box::new(Step::Create(slice)))),
        }
        empty_kept |= empty;
    }
    steps
}

fn is_same(old: &EndpointSlice, new: &EndpointSlice) -> bool {
    let list = |slice: &EndpointSlice| slice.endpoints.clone().unwrap_or_default();
    old.metadata.labels == new.metadata.labels && list(old) == list(new)
}
