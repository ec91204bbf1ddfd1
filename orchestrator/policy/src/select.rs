//! Which policies are asked about which endpoint, and in which order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use crate::cluster::{ClusterPolicy, RuleAction, Tier};
use crate::index::QueryIndex;
use crate::rows::Named;
use crate::spec::{PortSpec, RuleSpec};
use crate::table::Direction;
use crate::world::{Name, PodFacts, PortName, World};

/// A policy that is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Source<'a> {
    Cluster(&'a str),
    Namespaced(&'a Name),
}

/// Which policies select an endpoint, and its own numbers of the port names in their ingress rules.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct TemplateKey<'a> {
    pub(crate) ingress: Vec<Source<'a>>,
    pub(crate) egress: Vec<Source<'a>>,
    pub(crate) ports: Vec<Named<'a>>,
}

pub(crate) type Endpoints<'a> = Vec<(&'a Name, usize)>;

/// Endpoints of the node with the place of their template.
pub(crate) fn select(world: &World) -> (Vec<TemplateKey<'_>>, Endpoints<'_>) {
    let mut subjects: HashMap<&str, QueryIndex<'_, &Name>> = HashMap::new();
    for (name, policy) in &world.policies {
        subjects.entry(&name.namespace).or_default().insert(policy.subject.as_ref(), name);
    }
    let cluster = in_order(&world.cluster_policies);
    let mut places: HashMap<Rc<TemplateKey<'_>>, usize> = HashMap::new();
    let mut endpoints = Vec::new();
    let local = |pod: &PodFacts| pod.node == world.node && pod.is_selectable();
    for (name, pod) in world.pods.iter().filter(|(_, pod)| local(pod)) {
        let mut selecting: Vec<&Name> = subjects
            .get(name.namespace.as_str())
            .map(|index| index.matching(&pod.labels).copied().collect())
            .unwrap_or_default();
        selecting.sort_unstable();
        let namespace = world.namespaces.get(&name.namespace);
        let over: Vec<_> = cluster
            .iter()
            .filter(|(_, policy)| policy.selects(namespace, &pod.labels))
            .copied()
            .collect();
        let ingress = speakers(world, &over, &selecting, Direction::Ingress);
        let asked = ingress.iter().flat_map(|source| rules_of(world, *source, Direction::Ingress));
        let key = TemplateKey {
            ports: resolve(port_names(asked.map(|(_, _, spec)| spec)), pod),
            egress: speakers(world, &over, &selecting, Direction::Egress),
            ingress,
        };
        let next = places.len();
        endpoints.push((name, *places.entry(Rc::new(key)).or_insert(next)));
    }
    let mut templates: Vec<_> = places.into_iter().collect();
    templates.sort_unstable_by_key(|(_, place)| *place);
    let templates = templates.into_iter();
    (
        templates.map(|(key, _)| Rc::into_inner(key).expect("the map was the one owner")).collect(),
        endpoints,
    )
}

/// ClusterNetworkPolicies in the order in which they are asked.
fn in_order(policies: &BTreeMap<String, ClusterPolicy>) -> Vec<(&str, &ClusterPolicy)> {
    let mut all: Vec<_> = policies.iter().map(|(name, policy)| (name.as_str(), policy)).collect();
    all.sort_by_key(|(name, policy)| (policy.tier, policy.priority, *name));
    all
}

/// Who of the policies that select a pod has a say in a direction, in order. NetworkPolicies have the last word, so nobody
/// asks the baseline behind one.
fn speakers<'a>(
    world: &'a World,
    cluster: &[(&'a str, &'a ClusterPolicy)],
    namespaced: &[&'a Name],
    direction: Direction,
) -> Vec<Source<'a>> {
    let of = |tier: Tier| {
        let speaks = move |(_, policy): &&(&str, &ClusterPolicy)| {
            let rules = match direction {
                Direction::Ingress => &policy.ingress,
                Direction::Egress => &policy.egress,
            };
            policy.tier == tier && !rules.is_empty()
        };
        cluster.iter().filter(speaks).map(|(name, _)| Source::Cluster(name))
    };
    let isolating = namespaced.iter().copied().filter(|name| match direction {
        Direction::Ingress => world.policies[*name].ingress.is_some(),
        Direction::Egress => world.policies[*name].egress.is_some(),
    });
    let mut all: Vec<_> = of(Tier::Admin).collect();
    let before = all.len();
    all.extend(isolating.map(Source::Namespaced));
    if all.len() == before {
        all.extend(of(Tier::Baseline));
    }
    all
}

/// Rules of a policy in a direction, with their names and what they do.
pub(crate) fn rules_of<'a>(
    world: &'a World,
    source: Source<'a>,
    direction: Direction,
) -> Vec<(Option<&'a String>, RuleAction, &'a RuleSpec)> {
    match source {
        Source::Namespaced(name) => {
            let policy = &world.policies[name];
            let rules = match direction {
                Direction::Ingress => policy.ingress.as_deref(),
                Direction::Egress => policy.egress.as_deref(),
            };
            let rules = rules.unwrap_or_default().iter();
            rules.map(|rule| (None, RuleAction::Accept, rule)).collect()
        }
        Source::Cluster(name) => {
            let policy = &world.cluster_policies[name];
            let rules = match direction {
                Direction::Ingress => &policy.ingress,
                Direction::Egress => &policy.egress,
            };
            rules.iter().map(|rule| (rule.name.as_ref(), rule.action, &rule.spec)).collect()
        }
    }
}

/// Port names that rules ask for, in order and each once.
pub(crate) fn port_names<'a>(rules: impl Iterator<Item = &'a RuleSpec>) -> BTreeSet<&'a PortName> {
    rules
        .filter_map(|rule| rule.ports.as_deref())
        .flatten()
        .filter_map(|port| match port {
            PortSpec::Named(name) => Some(name),
            PortSpec::Range(..) => None,
        })
        .collect()
}

pub(crate) fn resolve<'a>(names: BTreeSet<&'a PortName>, pod: &'a PodFacts) -> Vec<Named<'a>> {
    names
        .into_iter()
        .filter_map(|name| pod.ports.get(name).map(|numbers| (name, numbers.as_slice())))
        .collect()
}
