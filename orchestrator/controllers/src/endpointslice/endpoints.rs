//! The Endpoints object of a Service: deprecated, and still read by many. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Service,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::plan::{Backend, Port};
use crate::context::{name, namespace};

/// Addresses of one object (upstream's maxCapacity); more are left out, with a note.
const MOST: usize = 1000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const MANAGER: &str = "endpoint-controller";
const HEADLESS: &str = "service.kubernetes.io/headless";

pub(super) fn is_ours(endpoints: &Endpoints) -> bool {
    let labels = endpoints.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(MANAGED_BY)).is_some_and(|manager| manager == MANAGER)
}

/// `current` keeps what others wrote into its metadata.
pub(super) fn desired(
    service: &Service,
    backends: &[Backend],
    current: Option<&Endpoints>,
) -> Endpoints {
    let spec = service.spec.as_ref();
    let publish = spec.and_then(|spec| spec.publish_not_ready_addresses) == Some(true);
    let headless = spec.and_then(|spec| spec.cluster_ip.as_deref()) == Some("None");
    let six = spec.and_then(|spec| spec.ip_families.as_ref()?.first().map(|one| one == "IPv6"));
    let mut by_ports: BTreeMap<Vec<Port>, (Vec<EndpointAddress>, Vec<EndpointAddress>)> =
        BTreeMap::new();
    let mut wanted: Vec<&Backend> =
        backends.iter().filter(|backend| publish || !backend.terminating).collect();
    let over = wanted.len() > MOST;
    // Ready ones are worth more than others.
    wanted.sort_by_key(|backend| !backend.ready);
    wanted.truncate(MOST);
    for backend in wanted {
        // A Service with ports leads nowhere in a pod that has none of them.
        let has_ports = spec.is_some_and(|spec| spec.ports.iter().flatten().next().is_some());
        if has_ports && backend.ports.is_empty() {
            continue;
        }
        let address = backend.addresses.iter().find(|ip| ip.is_ipv6() == six.unwrap_or(false));
        let Some(address) = address else { continue };
        let address = EndpointAddress {
            ip: address.to_string(),
            hostname: backend.hostname.clone(),
            node_name: backend.node.clone(),
            target_ref: Some(backend.reference.clone()),
        };
        let mut ports = backend.ports.clone();
        ports.sort();
        let (ready, not_ready) = by_ports.entry(ports).or_default();
        if backend.ready { ready.push(address) } else { not_ready.push(address) }
    }
    let subsets: Vec<EndpointSubset> = by_ports
        .into_iter()
        .map(|(ports, (ready, not_ready))| EndpointSubset {
            addresses: sorted(ready),
            not_ready_addresses: sorted(not_ready),
            ports: (!ports.is_empty()).then(|| ports.into_iter().map(port).collect()),
        })
        .collect();
    let mut meta = current.map(|current| current.metadata.clone()).unwrap_or_else(|| ObjectMeta {
        name: Some(name(&service.metadata).to_owned()),
        namespace: Some(namespace(&service.metadata).to_owned()),
        ..ObjectMeta::default()
    });
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    if headless {
        labels.insert(HEADLESS.to_owned(), String::new());
    } else {
        labels.remove(HEADLESS);
    }
    meta.labels = Some(labels);
    let mut annotations = meta.annotations.take().unwrap_or_default();
    annotations.remove(OVER_CAPACITY);
    if over {
        annotations.insert(OVER_CAPACITY.to_owned(), "truncated".to_owned());
    }
    meta.annotations = (!annotations.is_empty()).then_some(annotations);
    Endpoints { metadata: meta, subsets: (!subsets.is_empty()).then_some(subsets) }
}

fn sorted(mut addresses: Vec<EndpointAddress>) -> Option<Vec<EndpointAddress>> {
    addresses.sort_by(|a, b| a.ip.cmp(&b.ip));
    (!addresses.is_empty()).then_some(addresses)
}

fn port(port: Port) -> EndpointPort {
    EndpointPort {
        name: (!port.name.is_empty()).then_some(port.name),
        protocol: Some(port.protocol),
        port: port.port,
        app_protocol: port.app_protocol,
    }
}

pub(super) fn is_same(a: &Endpoints, b: &Endpoints) -> bool {
    let subsets = |endpoints: &Endpoints| endpoints.subsets.clone().unwrap_or_default();
    subsets(a) == subsets(b)
        && a.metadata.labels == b.metadata.labels
        && a.metadata.annotations.clone().unwrap_or_default()
            == b.metadata.annotations.clone().unwrap_or_default()
}
