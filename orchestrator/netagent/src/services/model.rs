//! Services as the data plane sees them. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

/// Label that ties an EndpointSlice to its Service.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Upstream's default for ClientIP affinity.
const DEFAULT_AFFINITY: Duration = Duration::from_secs(10_800);

/// Transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// The API's spelling; absent means TCP.
    #[must_use]
    pub fn parse(text: Option<&str>) -> Option<Self> {
        match text.unwrap_or("TCP") {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// One address that serves a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its port.
    pub port: u16,
    /// Whether it is on this node.
    pub local: bool,
    /// False: it is going away, and serves only while there is no ready one.
    pub ready: bool,
}

/// One port of one Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// `namespace/service/protocol/port`: unique, and fit for the name of a chain.
    pub id: String,
    /// Transport.
    pub protocol: Protocol,
    /// The cluster IPs (IPv4).
    pub cluster_ips: Vec<Ipv4Addr>,
    /// The port at them.
    pub port: u16,
    /// The port at every node.
    pub node_port: Option<u16>,
    /// `externalIPs` and the load balancer's addresses.
    pub external_ips: Vec<Ipv4Addr>,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `sessionAffinity: ClientIP` with its time-out.
    pub affinity: Option<Duration>,
    /// Every usable endpoint, sorted.
    pub endpoints: Vec<Endpoint>,
}

impl Port {
    /// Endpoints for traffic of one policy: the ready ones, else those that still serve while they terminate.
    #[must_use]
    pub fn pool(&self, local_only: bool) -> Vec<Endpoint> {
        let candidates =
            || self.endpoints.iter().filter(|endpoint| endpoint.local || !local_only).copied();
        let ready: Vec<Endpoint> = candidates().filter(|endpoint| endpoint.ready).collect();
        if ready.is_empty() { candidates().collect() } else { ready }
    }
}

/// Every port of every Service that the data plane serves, sorted by id.
///
/// Headless and ExternalName Services live in DNS alone. `dns_ip` is answered by the node itself and so has no
/// rules either.
#[must_use]
pub fn desired_ports(
    services: &[Arc<Service>],
    slices: &[Arc<EndpointSlice>],
    node_name: &str,
    dns_ip: Ipv4Addr,
) -> Vec<Port> {
    let mut by_service: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
    for slice in slices {
        if let Some(owner) = slice_owner(slice) {
            by_service.entry(owner).or_default().push(slice);
        }
    }
    let mut ports: Vec<Port> = services
        .iter()
        .flat_map(|service| {
            let key = service_key(service);
            let slices = by_service.get(&key).map_or(&[][..], Vec::as_slice);
            service_ports(service, slices, node_name, dns_ip)
        })
        .collect();
    ports.sort_by(|a, b| a.id.cmp(&b.id));
    ports
}

/// Namespace and name of a Service.
#[must_use]
pub fn service_key(service: &Service) -> (&str, &str) {
    (
        service.metadata.namespace.as_deref().unwrap_or_default(),
        service.metadata.name.as_deref().unwrap_or_default(),
    )
}

/// Namespace and name of the Service that a slice belongs to.
#[must_use]
pub fn slice_owner(slice: &EndpointSlice) -> Option<(&str, &str)> {
    let name = slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    Some((slice.metadata.namespace.as_deref().unwrap_or_default(), name))
}

fn service_ports(
    service: &Service,
    slices: &[&EndpointSlice],
    node_name: &str,
    dns_ip: Ipv4Addr,
) -> Vec<Port> {
    let Some(spec) = &service.spec else { return Vec::new() };
    if spec.type_.as_deref() == Some("ExternalName") {
        return Vec::new();
    }
    let cluster_ips = ipv4s(spec.cluster_ips.iter().flatten().chain(spec.cluster_ip.iter()));
    if cluster_ips.is_empty() || cluster_ips.contains(&dns_ip) {
        return Vec::new();
    }
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let balancer_ips =
        balancer.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten();
    let external = ipv4s(
        spec.external_ips.iter().flatten().chain(balancer_ips.filter_map(|one| one.ip.as_ref())),
    );
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config =
            spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let seconds = config
            .and_then(|config| config.timeout_seconds)
            .and_then(|secs| u64::try_from(secs).ok());
        seconds.map_or(DEFAULT_AFFINITY, Duration::from_secs)
    });
    let (namespace, name) = service_key(service);
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        let protocol = Protocol::parse(port.protocol.as_deref())?;
        let number = u16::try_from(port.port).ok()?;
        let label = port.name.clone().unwrap_or_default();
        Some(Port {
            id: format!("{namespace}/{name}/{protocol}/{number}"),
            protocol,
            cluster_ips: cluster_ips.clone(),
            port: number,
            node_port: port
                .node_port
                .and_then(|port| u16::try_from(port).ok())
                .filter(|port| *port != 0),
            external_ips: external.clone(),
            external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            affinity,
            endpoints: endpoints(slices, &label, protocol, node_name),
        })
    });
    ports.collect()
}

fn ipv4s<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<Ipv4Addr> {
    let unique: BTreeSet<Ipv4Addr> = texts.filter_map(|text| text.parse().ok()).collect();
    unique.into_iter().collect()
}

fn endpoints(
    slices: &[&EndpointSlice],
    port_name: &str,
    protocol: Protocol,
    node_name: &str,
) -> Vec<Endpoint> {
    // The same address may be in two slices while it moves from one to the other; ready in one is ready.
    let mut found: BTreeMap<(Ipv4Addr, u16), Endpoint> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.address_type == "IPv4") {
        let number = slice.ports.iter().flatten().find_map(|port| {
            let same = port.name.as_deref().unwrap_or_default() == port_name
                && Protocol::parse(port.protocol.as_deref()) == Some(protocol);
            same.then_some(port.port?)
        });
        let Some(port) = number.and_then(|number| u16::try_from(number).ok()) else { continue };
        for endpoint in slice.endpoints.iter().flatten() {
            let conditions = endpoint.conditions.as_ref();
            // "nil should be interpreted as true" (API reference of EndpointConditions).
            let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
            let serving = conditions.and_then(|conditions| conditions.serving).unwrap_or(ready);
            let terminating =
                conditions.and_then(|conditions| conditions.terminating).unwrap_or(false);
            let leaving_but_serving = serving && terminating;
            if !ready && !leaving_but_serving {
                continue;
            }
            let local = endpoint.node_name.as_deref() == Some(node_name);
            for ip in endpoint.addresses.iter().filter_map(|address| address.parse().ok()) {
                let entry = found.entry((ip, port)).or_insert(Endpoint { ip, port, local, ready });
                entry.ready |= ready;
                entry.local |= local;
            }
        }
    }
    found.into_values().collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    pub(crate) const DNS_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

    pub(crate) fn service(value: serde_json::Value) -> Arc<Service> {
        Arc::new(serde_json::from_value(value).expect("a Service"))
    }

    pub(crate) fn slice(value: serde_json::Value) -> Arc<EndpointSlice> {
        Arc::new(serde_json::from_value(value).expect("an EndpointSlice"))
    }

    fn web(spec: serde_json::Value) -> Arc<Service> {
        service(json!({"metadata": {"name": "web", "namespace": "default"}, "spec": spec}))
    }

    fn web_slice(name: &str, endpoints: serde_json::Value) -> Arc<EndpointSlice> {
        slice(json!({
            "metadata": {"name": name, "namespace": "default", "labels": {SERVICE_NAME: "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": endpoints,
        }))
    }

    fn ports(services: &[Arc<Service>], slices: &[Arc<EndpointSlice>]) -> Vec<Port> {
        desired_ports(services, slices, "node-1", DNS_IP)
    }

    #[test]
    fn ready_endpoints_of_all_slices_serve_the_port_of_their_name() {
        let service = web(json!({
            "clusterIP": "10.96.3.4",
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "other", "port": 81}],
        }));
        let slices = [
            web_slice(
                "a",
                json!([
                    {"addresses": ["10.244.1.2"], "nodeName": "node-1", "conditions": {"ready": true}},
                    {"addresses": ["10.244.1.9"], "conditions": {"ready": false, "serving": false}},
                ]),
            ),
            web_slice("b", json!([{"addresses": ["10.244.2.2"], "nodeName": "node-2"}])),
        ];
        let ports = ports(&[service], &slices);
        assert_eq!(ports.len(), 2);
        let http = &ports[0];
        assert_eq!(http.id, "default/web/tcp/80");
        assert_eq!(http.node_port, Some(30080));
        let seen: Vec<_> =
            http.endpoints.iter().map(|one| (one.ip.to_string(), one.local)).collect();
        assert_eq!(seen, [("10.244.1.2".to_owned(), true), ("10.244.2.2".to_owned(), false)]);
        assert!(ports[1].endpoints.is_empty(), "no slice has a port named other");
    }

    #[test]
    fn terminating_endpoints_serve_only_while_none_is_ready() {
        let service =
            web(json!({"clusterIP": "10.96.3.4", "ports": [{"name": "http", "port": 80}]}));
        let leaving = json!({
            "addresses": ["10.244.1.2"],
            "conditions": {"ready": false, "serving": true, "terminating": true},
        });
        let alone = ports(std::slice::from_ref(&service), &[web_slice("a", json!([leaving]))]);
        assert_eq!(alone[0].pool(false).len(), 1);
        let relieved =
            ports(&[service], &[web_slice("a", json!([leaving, {"addresses": ["10.244.2.2"]}]))]);
        let pool = relieved[0].pool(false);
        assert_eq!(pool.iter().map(|one| one.ip.to_string()).collect::<Vec<_>>(), ["10.244.2.2"]);
    }

    #[test]
    fn headless_external_name_and_the_dns_service_have_no_rules() {
        let services = [
            web(json!({"clusterIP": "None", "ports": [{"port": 80}]})),
            web(json!({"type": "ExternalName", "externalName": "example.org"})),
            web(json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53, "protocol": "UDP"}]})),
        ];
        assert_eq!(ports(&services, &[]), []);
    }
}
