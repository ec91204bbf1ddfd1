//! May this packet pass? Answered from the API's objects alone.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// A whole cluster, as the API shows it.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    pub pods: Vec<Pod>,
    pub namespaces: Vec<Namespace>,
    pub policies: Vec<NetworkPolicy>,
    /// ClusterNetworkPolicies, as JSON: read by whoever asks.
    pub cluster_policies: Vec<serde_json::Value>,
    /// Nodes and their addresses.
    pub nodes: Vec<(String, Vec<IpAddr>)>,
    /// Labels of nodes.
    pub node_labels: BTreeMap<String, BTreeMap<String, String>>,
}

/// Which side of the connection is asked: the words of `policyTypes`.
pub type Side = &'static str;
pub const INGRESS: Side = "Ingress";
pub const EGRESS: Side = "Egress";

/// What is sent: the API's word for the protocol ("TCP", "UDP", "SCTP", or any other word for any other protocol), and
/// the destination port, if the protocol has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    pub protocol: &'static str,
    pub port: u16,
}

/// The answer of one end, with everything that speaks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub allowed: bool,
    /// Policies that isolate the pod on this side, as `namespace/name`.
    pub isolated_by: Vec<String>,
    /// Every rule that allows, as policy and place in its list.
    pub allowed_by: Vec<(String, usize)>,
    /// The ClusterNetworkPolicy's rule that decides; the others are not asked then.
    pub decided_by: Option<(String, usize)>,
}

/// A rule of either direction: its peers and its ports.
type Sided<'a> = (Option<&'a Vec<NetworkPolicyPeer>>, Option<&'a Vec<NetworkPolicyPort>>);

impl Cluster {
    /// Whether policy at `subject` lets traffic of a connection with `other` pass. For ingress `other` is the source, for
    /// egress the destination.
    ///
    /// "Policy tiers are evaluated in the following order: Admin tier, NetworkPolicy tier, Baseline tier." "v1.NetworkPolicy
    /// always makes a final decision for selected pods." "If a given connection wasn't allowed or denied by any of the
    /// tiers, the default kubernetes policy is applied, which says that all pods can communicate with each other."
    #[must_use]
    pub fn end(&self, subject: &Pod, side: Side, other: IpAddr, traffic: Traffic) -> Answer {
        let by_tier = |tier| {
            let (policy, place, allowed) = self.tier(tier, subject, side, other, traffic)?;
            let decided_by = Some((policy, place));
            Some(Answer { allowed, isolated_by: vec![], allowed_by: vec![], decided_by })
        };
        by_tier("Admin").unwrap_or_else(|| {
            let answer = self.namespaced(subject, side, other, traffic);
            let is_final = !answer.isolated_by.is_empty();
            if is_final { answer } else { by_tier("Baseline").unwrap_or(answer) }
        })
    }

    /// What NetworkPolicies say.
    fn namespaced(&self, subject: &Pod, side: Side, other: IpAddr, traffic: Traffic) -> Answer {
        let (isolated_by, allowed_by) = (vec![], vec![]);
        let mut answer = Answer { allowed: false, isolated_by, allowed_by, decided_by: None };
        for policy in &self.policies {
            if !self.selects(policy, subject) || !speaks_about(policy, side) {
                continue;
            }
            let name = path(policy.metadata.namespace.as_deref(), policy.metadata.name.as_deref());
            answer.isolated_by.push(name.clone());
            let Some(spec) = &policy.spec else { continue };
            // The two directions have equal rules under different names.
            let rules: Vec<Sided<'_>> = if side == INGRESS {
                let rules = spec.ingress.iter().flatten();
                rules.map(|rule| (rule.from.as_ref(), rule.ports.as_ref())).collect()
            } else {
                let rules = spec.egress.iter().flatten();
                rules.map(|rule| (rule.to.as_ref(), rule.ports.as_ref())).collect()
            };
            for (place, (peers, ports)) in rules.iter().enumerate() {
                // "If this field is empty or missing, this rule matches all sources/destinations."
                let peer_fits = peers.is_none_or(|peers| {
                    peers.is_empty() || peers.iter().any(|peer| self.is_peer(policy, peer, other))
                });
                // "If this field is empty or missing, this rule matches all ports (traffic not restricted by port)."
                let receiver = if side == INGRESS { Some(subject) } else { self.pod_at(other) };
                let port_fits = ports.is_none_or(|ports| {
                    ports.is_empty() || ports.iter().any(|port| is_port(port, receiver, traffic))
                });
                if peer_fits && port_fits {
                    answer.allowed_by.push((name.clone(), place));
                }
            }
        }
        answer.allowed = answer.isolated_by.is_empty() || !answer.allowed_by.is_empty();
        answer
    }

    /// Whether a connection comes about: both ends have to allow it. An end that is no pod allows everything. A pod and
    /// its own node always reach each other, and a pod itself.
    #[must_use]
    pub fn connects(&self, source: IpAddr, destination: IpAddr, traffic: Traffic) -> bool {
        let (from, to) = (self.pod_at(source), self.pod_at(destination));
        if source == destination
            || from.is_some_and(|pod| self.is_node_of(pod, destination))
            || to.is_some_and(|pod| self.is_node_of(pod, source))
        {
            return true;
        }
        from.is_none_or(|pod| self.end(pod, EGRESS, destination, traffic).allowed)
            && to.is_none_or(|pod| self.end(pod, INGRESS, source, traffic).allowed)
    }

    /// The pod that has an address of its own now: not one in its node's network, not one that has ended.
    #[must_use]
    pub fn pod_at(&self, address: IpAddr) -> Option<&Pod> {
        self.pods.iter().find(|pod| is_networked(pod) && addresses(pod).contains(&address))
    }

    fn is_node_of(&self, pod: &Pod, address: IpAddr) -> bool {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
        self.nodes.iter().any(|(name, list)| Some(name) == node && list.contains(&address))
    }

    /// "podSelector selects the pods to which this NetworkPolicy object applies", in its own namespace.
    fn selects(&self, policy: &NetworkPolicy, pod: &Pod) -> bool {
        let everything = LabelSelector::default();
        let spec = policy.spec.as_ref();
        let selector = spec.and_then(|spec| spec.pod_selector.as_ref()).unwrap_or(&everything);
        is_networked(pod)
            && policy.metadata.namespace == pod.metadata.namespace
            && pod_has_labels(pod, selector)
    }

    fn is_peer(&self, policy: &NetworkPolicy, peer: &NetworkPolicyPeer, other: IpAddr) -> bool {
        if let Some(block) = &peer.ip_block {
            return peer.pod_selector.is_none()
                && peer.namespace_selector.is_none()
                && in_block(block, other);
        }
        let Some(pod) = self.pod_at(other) else { return false };
        match (&peer.namespace_selector, &peer.pod_selector) {
            (None, None) => false,
            // "Otherwise it selects the pods matching podSelector in the policy's own namespace."
            (None, Some(pods)) => {
                pod.metadata.namespace == policy.metadata.namespace && pod_has_labels(pod, pods)
            }
            // "Otherwise it selects all pods in the namespaces selected by namespaceSelector."
            (Some(namespaces), None) => self.in_namespaces(pod, namespaces),
            (Some(namespaces), Some(pods)) => {
                self.in_namespaces(pod, namespaces) && pod_has_labels(pod, pods)
            }
        }
    }

    fn in_namespaces(&self, pod: &Pod, selector: &LabelSelector) -> bool {
        self.namespaces.iter().any(|namespace| {
            namespace.metadata.name == pod.metadata.namespace
                && has_labels(selector, |key| {
                    namespace.metadata.labels.as_ref().and_then(|labels| labels.get(key))
                })
        })
    }
}

fn path(namespace: Option<&str>, name: Option<&str>) -> String {
    format!("{}/{}", namespace.unwrap_or_default(), name.unwrap_or_default())
}

/// "If this field is not specified, it will default based on the existence of ingress or egress rules; policies that
/// contain an egress section are assumed to affect egress, and all policies (whether or not they contain an ingress
/// section) are assumed to affect ingress."
fn speaks_about(policy: &NetworkPolicy, side: Side) -> bool {
    let Some(spec) = &policy.spec else { return side == INGRESS };
    match spec.policy_types.as_deref().unwrap_or_default() {
        [] => side == INGRESS || spec.egress.iter().flatten().next().is_some(),
        types => types.iter().any(|one| one == side),
    }
}

/// Has an address of its own and still runs.
#[must_use]
pub fn is_networked(pod: &Pod) -> bool {
    let host = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !host && phase != Some("Succeeded") && phase != Some("Failed")
}

/// All addresses in the pod's status.
#[must_use]
pub fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return vec![] };
    let listed = status.pod_ips.iter().flatten().map(|ip| &ip.ip);
    status.pod_ip.iter().chain(listed).filter_map(|ip| ip.parse().ok()).collect()
}

fn pod_has_labels(pod: &Pod, selector: &LabelSelector) -> bool {
    has_labels(selector, |key| pod.metadata.labels.as_ref().and_then(|all| all.get(key)))
}

/// matchLabels and matchExpressions are ANDed; an empty selector matches all objects.
fn has_labels<'a>(selector: &LabelSelector, label: impl Fn(&str) -> Option<&'a String>) -> bool {
    for (key, value) in selector.match_labels.iter().flatten() {
        if label(key) != Some(value) {
            return false;
        }
    }
    for requirement in selector.match_expressions.iter().flatten() {
        let listed = |value: &String| requirement.values.iter().flatten().any(|one| one == value);
        let holds = match (requirement.operator.as_str(), label(&requirement.key)) {
            ("Exists", found) => found.is_some(),
            ("DoesNotExist", found) => found.is_none(),
            ("In", Some(value)) => listed(value),
            ("In", None) => false,
            ("NotIn", Some(value)) => !listed(value),
            ("NotIn", None) => true,
            (other, _) => panic!("worlds have no operator {other}"),
        };
        if !holds {
            return false;
        }
    }
    true
}

fn in_block(block: &IPBlock, address: IpAddr) -> bool {
    in_cidr(&block.cidr, address)
        && !block.except.iter().flatten().any(|inner| in_cidr(inner, address))
}

pub(crate) fn in_cidr(cidr: &str, address: IpAddr) -> bool {
    let (base, length) = cidr.split_once('/').expect("worlds have good CIDRs");
    let length: u32 = length.parse().expect("worlds have good CIDRs");
    // The bits in which both differ, first bit first, are all behind the length.
    let first_difference = match (base.parse().expect("worlds have good CIDRs"), address) {
        (IpAddr::V4(base), IpAddr::V4(ip)) => (u32::from(base) ^ u32::from(ip)).leading_zeros(),
        (IpAddr::V6(base), IpAddr::V6(ip)) => (u128::from(base) ^ u128::from(ip)).leading_zeros(),
        _ => return false,
    };
    first_difference >= length
}

/// Whether one item of `ports` means the traffic. Named ports are looked up at the receiver.
fn is_port(port: &NetworkPolicyPort, receiver: Option<&Pod>, traffic: Traffic) -> bool {
    // "If not specified, this field defaults to TCP."
    if port.protocol.as_deref().unwrap_or("TCP") != traffic.protocol {
        return false;
    }
    match (&port.port, port.end_port) {
        // "If this field is not provided, this matches all port names and numbers."
        (None, _) => true,
        (Some(IntOrString::Int(first)), None) => *first == i32::from(traffic.port),
        // "The range of ports from port to endPort if set, inclusive."
        (Some(IntOrString::Int(first)), Some(last)) => {
            (*first..=last).contains(&i32::from(traffic.port))
        }
        (Some(IntOrString::String(name)), _) => {
            receiver.is_some_and(|pod| serves(pod, name, traffic))
        }
    }
}

pub(crate) fn serves(pod: &Pod, name: &str, traffic: Traffic) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|container| container.restart_policy.as_deref() == Some("Always"));
    spec.containers.iter().chain(sidecars).any(|container| {
        container.ports.iter().flatten().any(|port| {
            port.name.as_deref() == Some(name)
                && port.protocol.as_deref().unwrap_or("TCP") == traffic.protocol
                && port.container_port == i32::from(traffic.port)
        })
    })
}
