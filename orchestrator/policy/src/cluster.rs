//! `ClusterNetworkPolicy` (policy.networking.k8s.io/v1alpha2) as a checked type.
//!
//! What cannot be understood fails closed, as the API asks: an Accept rule then matches nothing, and any other rule denies
//! everything. Names in DNS as peers are among that: nobody here knows their addresses.

use std::collections::BTreeMap;

use orch_api::cluster_policy::{
    ClusterNetworkPolicy, Destination, NamespacedPod, Peer, Protocol as ApiProtocol, Subject,
};

use crate::prefix::Prefix;
use crate::spec::{Namespaces, PeerSpec, PortSpec, Query, RuleSpec};
use crate::world::{PortName, Protocol};

/// Before or after the NetworkPolicies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Tier {
    Admin,
    Baseline,
}

/// What a rule does with what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum RuleAction {
    Accept,
    Deny,
    /// The rest of the tier does not count.
    Pass,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClusterRule {
    pub(crate) name: Option<String>,
    pub(crate) action: RuleAction,
    pub(crate) spec: RuleSpec,
}

/// A policy, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterPolicy {
    pub(crate) tier: Tier,
    pub(crate) priority: i32,
    /// Conditions on namespace and pod. `None`: a subject that cannot be understood; it is every pod, and no rule accepts.
    subject: Option<(Query, Option<Query>)>,
    pub(crate) ingress: Vec<ClusterRule>,
    pub(crate) egress: Vec<ClusterRule>,
}

impl ClusterPolicy {
    #[must_use]
    pub fn from_api(policy: &ClusterNetworkPolicy) -> Self {
        let spec = &policy.spec;
        let subject = subject(&spec.subject);
        let is_known = subject.is_some();
        let ingress = spec.ingress.iter().flatten().map(|rule| {
            let peers = rule.from.iter().map(pod_peer).collect::<Option<Vec<_>>>();
            (&rule.name, &rule.action, peers, rule.protocols.as_deref())
        });
        let egress = spec.egress.iter().flatten().map(|rule| {
            let peers = rule.to.iter().map(egress_peer).collect::<Option<Vec<_>>>();
            (&rule.name, &rule.action, peers, rule.protocols.as_deref())
        });
        let read = |(name, action, peers, protocols): Parts<'_>| {
            let peers = peers.map(|peers| peers.concat()).filter(|_| is_known);
            rule(name.as_ref(), action, peers, protocols)
        };
        Self {
            tier: if spec.tier == "Baseline" { Tier::Baseline } else { Tier::Admin },
            priority: spec.priority,
            ingress: ingress.map(read).collect(),
            egress: egress.map(read).collect(),
            subject,
        }
    }

    /// Whether the policy is about a pod. A namespace that is not known has no labels to ask for.
    pub(crate) fn selects(
        &self,
        namespace: Option<&BTreeMap<String, String>>,
        pod: &BTreeMap<String, String>,
    ) -> bool {
        self.subject.as_ref().is_none_or(|(namespaces, pods)| {
            namespace.is_some_and(|labels| namespaces.matches(labels))
                && pods.as_ref().is_none_or(|query| query.matches(pod))
        })
    }
}

type Parts<'a> =
    (&'a Option<String>, &'a String, Option<Vec<Vec<PeerSpec>>>, Option<&'a [ApiProtocol]>);

fn subject(subject: &Subject) -> Option<(Query, Option<Query>)> {
    match (&subject.namespaces, &subject.pods) {
        (Some(namespaces), None) => Some((Query::parse(namespaces)?, None)),
        (None, Some(pods)) => {
            let both = (&pods.namespace_selector, &pods.pod_selector);
            Some((Query::parse(both.0)?, Some(Query::parse(both.1)?)))
        }
        _ => None,
    }
}

fn rule(
    name: Option<&String>,
    action: &str,
    peers: Option<Vec<PeerSpec>>,
    protocols: Option<&[ApiProtocol]>,
) -> ClusterRule {
    let name = name.filter(|name| !name.is_empty()).cloned();
    let action = match action {
        "Accept" => RuleAction::Accept,
        "Pass" => RuleAction::Pass,
        _ => RuleAction::Deny,
    };
    let ports = match protocols {
        None => Some(None),
        Some([]) => None,
        Some(list) => {
            list.iter().map(ports).collect::<Option<Vec<_>>>().map(|all| Some(all.concat()))
        }
    };
    match (peers.filter(|peers| !peers.is_empty()), ports) {
        (Some(peers), Some(ports)) => {
            ClusterRule { name, action, spec: RuleSpec { peers: Some(peers), ports } }
        }
        _ if action == RuleAction::Accept => {
            ClusterRule { name, action, spec: RuleSpec { peers: Some(Vec::new()), ports: None } }
        }
        _ => ClusterRule {
            name,
            action: RuleAction::Deny,
            spec: RuleSpec { peers: None, ports: None },
        },
    }
}

/// The two kinds of peers that ingress has, too.
fn pod_peer(peer: &Peer) -> Option<Vec<PeerSpec>> {
    let spec = match peer {
        Peer {
            namespaces: Some(namespaces),
            pods: None,
            nodes: None,
            networks: None,
            domain_names: None,
        } => {
            let namespaces = Namespaces::Matching(Query::parse(namespaces)?);
            PeerSpec::Pods { namespaces, pods: None }
        }
        Peer {
            namespaces: None,
            pods: Some(pods),
            nodes: None,
            networks: None,
            domain_names: None,
        } => {
            let NamespacedPod { namespace_selector, pod_selector } = pods;
            PeerSpec::Pods {
                namespaces: Namespaces::Matching(Query::parse(namespace_selector)?),
                pods: Some(Query::parse(pod_selector)?),
            }
        }
        _ => return None,
    };
    Some(vec![spec])
}

fn egress_peer(peer: &Peer) -> Option<Vec<PeerSpec>> {
    match peer {
        Peer {
            namespaces: None,
            pods: None,
            nodes: Some(nodes),
            networks: None,
            domain_names: None,
        } => Some(vec![PeerSpec::Nodes(Query::parse(nodes)?)]),
        Peer {
            namespaces: None,
            pods: None,
            nodes: None,
            networks: Some(list),
            domain_names: None,
        } => list
            .iter()
            .map(|text| Some(PeerSpec::Block { cidr: Prefix::parse(text)?, except: Vec::new() }))
            .collect(),
        other => pod_peer(other),
    }
}

fn ports(protocol: &ApiProtocol) -> Option<Vec<PortSpec>> {
    let ApiProtocol { tcp, udp, sctp, destination_named_port: named } = protocol;
    match (tcp, udp, sctp, named) {
        (Some(to), None, None, None) => Some(vec![range(Protocol::Tcp, to)?]),
        (None, Some(to), None, None) => Some(vec![range(Protocol::Udp, to)?]),
        (None, None, Some(to), None) => Some(vec![range(Protocol::Sctp, to)?]),
        (None, None, None, Some(name)) => Some(
            Protocol::ALL
                .map(|protocol| PortSpec::Named(PortName { protocol, name: name.clone() }))
                .into(),
        ),
        _ => None,
    }
}

fn range(protocol: Protocol, to: &Destination) -> Option<PortSpec> {
    let port = to.destination_port.as_ref()?;
    let (first, last) = match (&port.number, &port.range) {
        (Some(number), None) => (*number, *number),
        (None, Some(range)) => (range.start, range.end),
        _ => return None,
    };
    let (first, last) = (u16::try_from(first).ok()?, u16::try_from(last).ok()?);
    (first <= last).then_some(PortSpec::Range(protocol, first, last))
}
