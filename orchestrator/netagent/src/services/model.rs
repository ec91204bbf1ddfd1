//! Services as the data plane sees them. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint as SliceEndpoint, EndpointSlice};

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
    pub ip: IpAddr,
    /// Its port.
    pub port: u16,
    /// Whether it is on this node.
    pub local: bool,
    /// False: it is going away, and serves only while there is no ready one.
    pub ready: bool,
    /// False: `trafficDistribution` prefers others, and there are some.
    pub near: bool,
}

/// Where we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// Name of the Node object.
    pub node: &'a str,
    /// Its label `topology.kubernetes.io/zone`.
    pub zone: Option<&'a str>,
}

/// One port of one Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// `namespace/service/protocol/port`: unique, and fit for the name of a chain.
    pub id: String,
    /// Transport.
    pub protocol: Protocol,
    /// The cluster IPs: at most one of each family.
    pub cluster_ips: Vec<IpAddr>,
    /// The port at them.
    pub port: u16,
    /// The port at every node.
    pub node_port: Option<u16>,
    /// `externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// The load balancer's addresses.
    pub balancer_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges`: who may come to the load balancer's addresses; empty is everybody.
    pub source_ranges: Vec<IpNetwork>,
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
    ///
    /// "Local" is a promise and beats `trafficDistribution`, which is a wish.
    #[must_use]
    pub fn pool(&self, local_only: bool) -> Vec<Endpoint> {
        let candidates =
            || self.endpoints.iter().filter(|endpoint| endpoint.local || !local_only).copied();
        let ready: Vec<Endpoint> = candidates()
            .filter(|endpoint| endpoint.ready && (endpoint.near || local_only))
            .collect();
        if ready.is_empty() { candidates().collect() } else { ready }
    }

    /// The same port as it is in one family; `None` if the Service has no address there.
    #[must_use]
    pub fn in_family(&self, v6: bool) -> Option<Self> {
        let of = |ips: &[IpAddr]| ips.iter().copied().filter(|ip| ip.is_ipv6() == v6).collect();
        let cluster_ips: Vec<IpAddr> = of(&self.cluster_ips);
        (!cluster_ips.is_empty()).then(|| Self {
            cluster_ips,
            external_ips: of(&self.external_ips),
            balancer_ips: of(&self.balancer_ips),
            endpoints: self
                .endpoints
                .iter()
                .copied()
                .filter(|one| one.ip.is_ipv6() == v6)
                .collect(),
            ..self.clone()
        })
    }
}

/// Every port of every Service that the data plane serves, sorted by id.
///
/// Headless and ExternalName Services live in DNS alone. `dns_ips` are answered by the node itself and so have no
/// rules either.
#[must_use]
pub fn desired_ports(
    services: &[Arc<Service>],
    slices: &[Arc<EndpointSlice>],
    place: Place<'_>,
    dns_ips: &[IpAddr],
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
            service_ports(service, slices, place, dns_ips)
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

/// Whether traffic for a Service is translated at all: headless and ExternalName Services are names only.
fn is_translated(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| {
        spec.type_.as_deref() != Some("ExternalName")
            && !addresses(spec.cluster_ips.iter().flatten().chain(spec.cluster_ip.iter()))
                .is_empty()
    })
}

fn service_ports(
    service: &Service,
    slices: &[&EndpointSlice],
    place: Place<'_>,
    dns_ips: &[IpAddr],
) -> Vec<Port> {
    let Some(spec) = service.spec.as_ref().filter(|_| is_translated(service)) else {
        return Vec::new();
    };
    let cluster_ips = addresses(spec.cluster_ips.iter().flatten().chain(spec.cluster_ip.iter()));
    if cluster_ips.iter().any(|ip| dns_ips.contains(ip)) {
        return Vec::new();
    }
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config =
            spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let seconds = config
            .and_then(|config| config.timeout_seconds)
            .and_then(|secs| u64::try_from(secs).ok());
        seconds.map_or(DEFAULT_AFFINITY, Duration::from_secs)
    });
    let ranges = spec.load_balancer_source_ranges.iter().flatten();
    let source_ranges: BTreeSet<IpNetwork> =
        ranges.filter_map(|range| range.trim().parse().ok()).collect();
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
            external_ips: addresses(spec.external_ips.iter().flatten()),
            balancer_ips: balancer_ips(service),
            source_ranges: source_ranges.iter().copied().collect(),
            external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            affinity,
            endpoints: endpoints(slices, &label, protocol, place),
        })
    });
    ports.collect()
}

/// `ipMode: Proxy` says that the load balancer wants to see the traffic even if it comes from inside.
fn balancer_ips(service: &Service) -> Vec<IpAddr> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten();
    addresses(
        ingress
            .filter(|one| one.ip_mode.as_deref() != Some("Proxy"))
            .filter_map(|one| one.ip.as_ref()),
    )
}

fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<IpAddr> {
    let unique: BTreeSet<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
    unique.into_iter().collect()
}

/// What an endpoint's hints say to us.
#[derive(Debug, Clone, Copy)]
struct Hints {
    /// Whether they name this node; `None`: they name no node.
    node: Option<bool>,
    /// The same for the zone.
    zone: Option<bool>,
}

impl Hints {
    fn of(endpoint: &SliceEndpoint, place: Place<'_>) -> Self {
        let hints = endpoint.hints.as_ref();
        let nodes = hints.and_then(|hints| hints.for_nodes.as_ref()).filter(|all| !all.is_empty());
        let zones = hints.and_then(|hints| hints.for_zones.as_ref()).filter(|all| !all.is_empty());
        Self {
            node: nodes.map(|nodes| nodes.iter().any(|one| one.name == place.node)),
            zone: zones.map(|all| all.iter().any(|one| Some(one.name.as_str()) == place.zone)),
        }
    }
}

fn endpoints(
    slices: &[&EndpointSlice],
    port_name: &str,
    protocol: Protocol,
    place: Place<'_>,
) -> Vec<Endpoint> {
    // The same address may be in two slices while it moves from one to the other; ready in one is ready.
    let mut found: BTreeMap<(IpAddr, u16), (Endpoint, Hints)> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.address_type != "FQDN") {
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
            let local = endpoint.node_name.as_deref() == Some(place.node);
            let parsed = endpoint.addresses.iter().filter_map(|address| address.parse().ok());
            for ip in parsed.filter(|ip: &IpAddr| is_of(*ip, &slice.address_type)) {
                let (entry, hints) = found.entry((ip, port)).or_insert((
                    Endpoint { ip, port, local, ready, near: true },
                    Hints::of(endpoint, place),
                ));
                if ready && !entry.ready {
                    *hints = Hints::of(endpoint, place);
                }
                entry.ready |= ready;
                entry.local |= local;
            }
        }
    }
    let mut found: Vec<(Endpoint, Hints)> = found.into_values().collect();
    for v6 in [false, true] {
        prefer_near(&mut found, v6);
    }
    found.into_iter().map(|(endpoint, _)| endpoint).collect()
}

fn is_of(ip: IpAddr, address_type: &str) -> bool {
    ip.is_ipv6() == (address_type == "IPv6")
}

/// Hints count only if every ready endpoint has some, and some name us: else somebody could be left with none, or one
/// endpoint with all. The node's before the zone's. (The same rule as kube-proxy's.)
fn prefer_near(found: &mut [(Endpoint, Hints)], v6: bool) {
    for hint in [|hints: &Hints| hints.node, |hints: &Hints| hints.zone] {
        let ready = found.iter().filter(|(one, _)| one.ready && one.ip.is_ipv6() == v6);
        let all: Option<Vec<bool>> = ready.map(|(_, hints)| hint(hints)).collect();
        if all.is_some_and(|all| all.contains(&true)) {
            for (endpoint, hints) in found.iter_mut().filter(|(one, _)| one.ip.is_ipv6() == v6) {
                endpoint.near = hint(hints) == Some(true);
            }
            return;
        }
    }
}

/// Services with a `healthCheckNodePort`: the port, and how many of its endpoints are on this node.
///
/// Load balancers ask there which nodes can serve a Service with `externalTrafficPolicy: Local`.
#[must_use]
pub fn desired_health_checks(
    services: &[Arc<Service>],
    slices: &[Arc<EndpointSlice>],
    node_name: &str,
) -> BTreeMap<u16, HealthCheck> {
    let checked = services.iter().filter_map(|service| {
        let spec = service.spec.as_ref()?;
        let wanted = spec.type_.as_deref() == Some("LoadBalancer")
            && spec.external_traffic_policy.as_deref() == Some("Local");
        let port = u16::try_from(spec.health_check_node_port?).ok()?;
        if !wanted || port == 0 {
            return None;
        }
        let (namespace, name) = service_key(service);
        let local: BTreeSet<&String> = slices
            .iter()
            .filter(|slice| slice_owner(slice) == Some((namespace, name)))
            .flat_map(|slice| slice.endpoints.iter().flatten())
            .filter(|endpoint| endpoint.node_name.as_deref() == Some(node_name))
            .filter(|endpoint| {
                endpoint.conditions.as_ref().and_then(|all| all.ready).unwrap_or(true)
            })
            // A pod has an address in each family.
            .filter_map(|endpoint| {
                let target = endpoint.target_ref.as_ref().and_then(|target| target.name.as_ref());
                target.or(endpoint.addresses.first())
            })
            .collect();
        let check = HealthCheck {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            local: local.len(),
        };
        Some((port, check))
    });
    checked.collect()
}

/// What a health check tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// Namespace of the Service.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Ready endpoints on this node.
    pub local: usize,
}

#[cfg(test)]
pub(crate) mod tests;
