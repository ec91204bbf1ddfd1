//! What policy is decided from: pods, namespaces, nodes and policies, read once from the API's objects.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use orch_api::k8s_openapi::api::core::v1::{Container, Pod};

use crate::cluster::ClusterPolicy;
use crate::prefix::Prefix;
use crate::spec::Policy;

/// A namespaced name: of a pod or of a policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Name {
    pub namespace: String,
    pub name: String,
}

impl Name {
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Transport protocols that a policy can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// By its name in the API; absent is TCP.
    #[must_use]
    pub fn parse(name: Option<&str>) -> Option<Self> {
        match name {
            None | Some("TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }

    /// IANA's protocol number, as in the IP header.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// What a policy calls a named port: the name counts together with the protocol.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortName {
    pub protocol: Protocol,
    pub name: String,
}

/// What policy needs to know of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodFacts {
    pub node: String,
    pub labels: BTreeMap<String, String>,
    pub ips: Vec<IpAddr>,
    /// Numbers of its named ports. Two containers may use one name: then the name means both.
    pub ports: BTreeMap<PortName, Vec<u16>>,
    /// It has its node's addresses: it is neither subject nor peer, its traffic is the node's.
    pub host_network: bool,
    /// Succeeded or Failed: its address may be another's already.
    pub finished: bool,
    /// It is being deleted: another pod with its address is the present owner.
    pub leaving: bool,
    /// Creation in seconds; the younger of two owners has the address.
    pub created: i64,
}

impl PodFacts {
    #[must_use]
    pub fn from_api(pod: &Pod) -> Self {
        let spec = pod.spec.as_ref();
        let status = pod.status.as_ref();
        let phase = status.and_then(|status| status.phase.as_deref());
        let mut ips: Vec<IpAddr> = status
            .iter()
            .flat_map(|status| {
                let more = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
                status.pod_ip.as_deref().into_iter().chain(more)
            })
            .filter_map(|ip| ip.parse().ok())
            .collect();
        ips.sort_unstable();
        ips.dedup();
        Self {
            node: spec.and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            ips,
            ports: spec.map(named_ports).unwrap_or_default(),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or_default(),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
            leaving: pod.metadata.deletion_timestamp.is_some(),
            created: pod.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        }
    }

    /// Whether selectors can mean it at all.
    pub(crate) fn is_selectable(&self) -> bool {
        !self.host_network && !self.finished
    }
}

/// Ports of containers and of sidecars, which serve as long as these.
fn named_ports(
    spec: &orch_api::k8s_openapi::api::core::v1::PodSpec,
) -> BTreeMap<PortName, Vec<u16>> {
    let is_sidecar = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(is_sidecar);
    let mut all: BTreeMap<PortName, Vec<u16>> = BTreeMap::new();
    for port in spec.containers.iter().chain(sidecars).flat_map(|one| one.ports.iter().flatten()) {
        let (Some(name), Some(protocol), Ok(number)) = (
            port.name.as_deref().filter(|name| !name.is_empty()),
            Protocol::parse(port.protocol.as_deref()),
            u16::try_from(port.container_port),
        ) else {
            continue;
        };
        let numbers = all.entry(PortName { protocol, name: name.to_owned() }).or_default();
        if let Err(place) = numbers.binary_search(&number) {
            numbers.insert(place, number);
        }
    }
    all
}

/// What an address is, beside its class; the data plane keeps it as flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum PeerKind {
    /// Neither pod nor node.
    #[default]
    Outside,
    /// A pod of this cluster.
    Pod,
    /// In the cluster's pod range, but of no pod we know: never taken for the outside world.
    UnknownPod,
    /// This node, also its host-network pods. Traffic between it and its own pods is exempt from policy, where the
    /// packet was born here (the data plane knows that, the address alone proves nothing).
    LocalNode,
    /// Another node; not exempt.
    RemoteNode,
}

/// All that decides on one node. The caller keeps it up to date from its caches and compiles again after a change.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// Whose pods are the endpoints.
    pub node: String,
    pub pods: BTreeMap<Name, PodFacts>,
    /// Labels by name. A pod whose namespace is missing here matches no namespace selector.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pub policies: BTreeMap<Name, Policy>,
    /// ClusterNetworkPolicies by name.
    pub cluster_policies: BTreeMap<String, ClusterPolicy>,
    /// Addresses of nodes, those on the overlay included, by the node's name.
    pub nodes: BTreeMap<String, Vec<IpAddr>>,
    /// Labels of nodes by name; one that is missing has none.
    pub node_labels: BTreeMap<String, BTreeMap<String, String>>,
    /// Ranges that pod addresses come from.
    pub pod_ranges: Vec<Prefix>,
}
