//! The cluster as names. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use crate::services::model::{Protocol, service_key, slice_owner};

/// A named port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRecord {
    /// Its name; ports without one have no SRV record.
    pub name: String,
    /// Its transport.
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
}

/// One endpoint of a headless Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// Its address.
    pub ip: IpAddr,
    /// Its label below the Service's name: the pod's hostname, else the address with dashes.
    pub hostname: String,
    /// Its named ports.
    pub ports: BTreeSet<PortRecord>,
}

/// What a Service's name leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Records {
    /// Its cluster IPs and named ports.
    Cluster(Vec<IpAddr>, BTreeSet<PortRecord>),
    /// Its ready endpoints.
    Headless(Vec<Backend>),
    /// Another name.
    External(String),
}

/// All names of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Zone {
    /// By namespace and name.
    pub services: HashMap<(String, String), Records>,
    /// Names of namespaces: they exist as empty names.
    pub namespaces: HashSet<String>,
    /// Names of addresses, without the domain.
    pub reverse: HashMap<IpAddr, Vec<String>>,
}

/// What the zone is called and what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// `cluster.local`.
    pub name: String,
    /// Addresses of the DNS server.
    pub dns_ips: Vec<IpAddr>,
    /// Networks whose addresses nobody else can name.
    pub networks: Vec<IpNetwork>,
}

/// Builds the zone.
#[must_use]
pub fn desired_zone(
    services: &[Arc<Service>],
    slices: &[Arc<EndpointSlice>],
    namespaces: &[Arc<Namespace>],
) -> Zone {
    let mut by_service: HashMap<(&str, &str), Vec<&EndpointSlice>> = HashMap::new();
    for slice in slices {
        if let Some(owner) = slice_owner(slice) {
            by_service.entry(owner).or_default().push(slice);
        }
    }
    let mut zone = Zone {
        namespaces: namespaces
            .iter()
            .filter_map(|namespace| namespace.metadata.name.clone())
            .collect(),
        ..Zone::default()
    };
    for service in services {
        let (namespace, name) = service_key(service);
        let slices = by_service.get(&(namespace, name)).map_or(&[][..], Vec::as_slice);
        let Some(records) = records(service, slices) else { continue };
        let base = format!("{name}.{namespace}.svc");
        match &records {
            Records::Cluster(ips, _) => {
                for ip in ips {
                    zone.reverse.entry(*ip).or_default().push(base.clone());
                }
            }
            Records::Headless(backends) => {
                for backend in backends {
                    zone.reverse
                        .entry(backend.ip)
                        .or_default()
                        .push(format!("{}.{base}", backend.hostname));
                }
            }
            Records::External(_) => {}
        }
        zone.services.insert((namespace.to_owned(), name.to_owned()), records);
    }
    zone.reverse.values_mut().for_each(|names| names.sort_unstable());
    zone
}

fn records(service: &Service, slices: &[&EndpointSlice]) -> Option<Records> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return Some(Records::External(spec.external_name.clone()?));
    }
    if spec.cluster_ip.as_deref() == Some("None") {
        return Some(Records::Headless(backends(
            slices,
            spec.publish_not_ready_addresses == Some(true),
        )));
    }
    let texts = spec.cluster_ips.iter().flatten().chain(spec.cluster_ip.iter());
    let ips: BTreeSet<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
    if ips.is_empty() {
        return None;
    }
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        let name = port.name.clone().filter(|name| !name.is_empty())?;
        let protocol = Protocol::parse(port.protocol.as_deref())?;
        Some(PortRecord { name, protocol, port: u16::try_from(port.port).ok()? })
    });
    Some(Records::Cluster(ips.into_iter().collect(), ports.collect()))
}

fn backends(slices: &[&EndpointSlice], publish_not_ready: bool) -> Vec<Backend> {
    let mut found: BTreeMap<(IpAddr, String), BTreeSet<PortRecord>> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.address_type != "FQDN") {
        let ports: BTreeSet<PortRecord> = slice
            .ports
            .iter()
            .flatten()
            .filter_map(|port| {
                let name = port.name.clone().filter(|name| !name.is_empty())?;
                let protocol = Protocol::parse(port.protocol.as_deref())?;
                Some(PortRecord { name, protocol, port: u16::try_from(port.port?).ok()? })
            })
            .collect();
        for endpoint in slice.endpoints.iter().flatten() {
            let ready = endpoint
                .conditions
                .as_ref()
                .and_then(|conditions| conditions.ready)
                .unwrap_or(true);
            if !ready && !publish_not_ready {
                continue;
            }
            for ip in endpoint.addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok())
            {
                let named = endpoint.hostname.clone().filter(|hostname| !hostname.is_empty());
                let hostname = named.unwrap_or_else(|| ip.to_string().replace(['.', ':'], "-"));
                found.entry((ip, hostname)).or_default().extend(ports.iter().cloned());
            }
        }
    }
    found.into_iter().map(|((ip, hostname), ports)| Backend { ip, hostname, ports }).collect()
}
