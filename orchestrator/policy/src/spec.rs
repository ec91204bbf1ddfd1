//! `NetworkPolicy` (networking.k8s.io/v1) as a checked type: empty, absent and unreadable lists stay three things.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};

use orch_api::Selector;
use orch_api::k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort,
};
use orch_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use orch_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::prefix::Prefix;
use crate::world::{PortName, Protocol};

/// A label selector that can be compared and found by a label it asks for.
#[derive(Debug, Clone)]
pub(crate) struct Query {
    selector: Selector,
    /// The selector in full, for equality: `Selector` itself has no order and no hash.
    text: String,
    /// One key with the values of which one must be there, if the selector asks for such a thing.
    anchor: Option<(String, Vec<String>)>,
}

impl Query {
    /// `None` for a selector that cannot be understood.
    pub(crate) fn parse(selector: &LabelSelector) -> Option<Self> {
        let parsed = Selector::from_label_selector(selector).ok()?;
        let one_of = selector
            .match_expressions
            .iter()
            .flatten()
            .find(|expression| expression.operator == "In")
            .map(|expression| {
                (expression.key.clone(), expression.values.clone().unwrap_or_default())
            });
        let equal = selector.match_labels.iter().flatten().next();
        let anchor = equal.map(|(key, value)| (key.clone(), vec![value.clone()])).or(one_of);
        Some(Self { text: format!("{parsed:?}"), selector: parsed, anchor })
    }

    pub(crate) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.selector.matches(labels)
    }

    pub(crate) fn anchor(&self) -> Option<(&str, &[String])> {
        self.anchor.as_ref().map(|(key, values)| (key.as_str(), values.as_slice()))
    }
}

impl PartialEq for Query {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Query {}

impl Hash for Query {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

/// Whose pods a peer means.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Namespaces {
    /// Those of the policy's namespace.
    Own(String),
    Matching(Query),
}

/// One item of `from` or `to`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum PeerSpec {
    Pods {
        namespaces: Namespaces,
        pods: Option<Query>,
    },
    Block {
        cidr: Prefix,
        except: Vec<Prefix>,
    },
    /// Addresses of nodes.
    Nodes(Query),
}

/// What one item of `ports` means.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum PortSpec {
    /// First and last port.
    Range(Protocol, u16, u16),
    Named(PortName),
}

/// One rule of one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RuleSpec {
    /// `None`: everyone. An empty list, left by peers that cannot be understood: no one.
    pub(crate) peers: Option<Vec<PeerSpec>>,
    /// `None`: every port of every protocol. An empty list: none.
    pub(crate) ports: Option<Vec<PortSpec>>,
}

/// A policy, read. What cannot be understood (the API server refuses it, so it is a newer API's) allows nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `None`: a selector that cannot be understood. It selects every pod of the namespace.
    pub(crate) subject: Option<Query>,
    /// Rules by direction; `None`: the policy does not speak about this direction.
    pub(crate) ingress: Option<Vec<RuleSpec>>,
    pub(crate) egress: Option<Vec<RuleSpec>>,
}

impl Policy {
    #[must_use]
    pub fn from_api(policy: &NetworkPolicy) -> Self {
        let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
        // A policy without spec selects all pods of its namespace for ingress, as an empty spec does.
        let spec = policy.spec.clone().unwrap_or_default();
        let ingress = || {
            let rules = spec.ingress.iter().flatten();
            rules
                .map(|rule| rule_spec(namespace, rule.from.as_ref(), rule.ports.as_ref()))
                .collect()
        };
        let egress = || {
            let rules = spec.egress.iter().flatten();
            rules.map(|rule| rule_spec(namespace, rule.to.as_ref(), rule.ports.as_ref())).collect()
        };
        let types = spec.policy_types.as_deref().unwrap_or_default();
        let (has_ingress, has_egress) = if types.is_empty() {
            (true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()))
        } else {
            let has = |name| types.iter().any(|kind| kind == name);
            (has("Ingress"), has("Egress"))
        };
        Self {
            subject: Query::parse(&spec.pod_selector.clone().unwrap_or_default()),
            ingress: has_ingress.then(ingress),
            egress: has_egress.then(egress),
        }
    }
}

/// An empty list means the same as none: everyone, every port.
fn rule_spec(
    namespace: &str,
    peers: Option<&Vec<NetworkPolicyPeer>>,
    ports: Option<&Vec<NetworkPolicyPort>>,
) -> RuleSpec {
    let peers = peers.filter(|list| !list.is_empty());
    let ports = ports.filter(|list| !list.is_empty());
    RuleSpec {
        peers: peers
            .map(|list| list.iter().filter_map(|peer| peer_spec(namespace, peer)).collect()),
        ports: ports.map(|list| list.iter().filter_map(port_spec).collect()),
    }
}

/// `None` matches nothing: a peer without any selector is not "everyone".
fn peer_spec(namespace: &str, peer: &NetworkPolicyPeer) -> Option<PeerSpec> {
    match (&peer.namespace_selector, &peer.pod_selector, &peer.ip_block) {
        (None, None, Some(block)) => block_spec(block),
        (None, Some(pods), None) => Some(PeerSpec::Pods {
            namespaces: Namespaces::Own(namespace.to_owned()),
            pods: Some(Query::parse(pods)?),
        }),
        (Some(namespaces), pods, None) => Some(PeerSpec::Pods {
            namespaces: Namespaces::Matching(Query::parse(namespaces)?),
            pods: match pods {
                Some(pods) => Some(Query::parse(pods)?),
                None => None,
            },
        }),
        _ => None,
    }
}

fn block_spec(block: &IPBlock) -> Option<PeerSpec> {
    let except = block.except.iter().flatten().map(|text| Prefix::parse(text));
    Some(PeerSpec::Block {
        cidr: Prefix::parse(&block.cidr)?,
        // One exception that cannot be read could be any address: then the block is none at all.
        except: except.collect::<Option<Vec<_>>>()?,
    })
}

fn port_spec(port: &NetworkPolicyPort) -> Option<PortSpec> {
    let protocol = Protocol::parse(port.protocol.as_deref())?;
    match (&port.port, port.end_port) {
        (None, None) => Some(PortSpec::Range(protocol, 0, u16::MAX)),
        (Some(IntOrString::Int(first)), last) => {
            let first = u16::try_from(*first).ok()?;
            let last = last.map_or(Some(first), |last| u16::try_from(last).ok())?;
            (first <= last).then_some(PortSpec::Range(protocol, first, last))
        }
        (Some(IntOrString::String(name)), None) => {
            Some(PortSpec::Named(PortName { protocol, name: name.clone() }))
        }
        _ => None,
    }
}
