//! The compiler: a world in, peer classes and decision tables out.
//!
//! 1. [`crate::select`]: which policies select which endpoint, in the order in which they are asked; endpoints with equal
//!    selections (and equal named ports, where these are asked for) share a *template*. Only policies that select some
//!    endpoint go on.
//! 2. `group`: every prefix that is known (pods, nodes, blocks and their exceptions) gets its *traits*: which peer lists
//!    of the rules it is in, and what the port names of egress rules mean there. Prefixes with equal traits are a group.
//!    One lookup of an address then answers pods and blocks together; exceptions need no negative logic.
//! 3. `decide`: for each template and group the rules become rows over protocol × port ([`crate::rows`]).
//! 4. [`crate::number`] gives the groups class numbers, those of the previous output where it can.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use crate::cluster::Tier;
use crate::index::QueryIndex;
use crate::number;
use crate::prefix::{Prefix, PrefixMap};
use crate::rows::{Named, Rule, Stage, rows};
use crate::select::{Endpoints, Source, TemplateKey, port_names, resolve, rules_of, select};
use crate::spec::{Namespaces, PeerSpec, PortSpec, Query};
use crate::table::{Class, Direction, Ports, Row, Rows, RuleId, Table, Verdict};
use crate::world::{Name, PeerKind, PodFacts, PortName, World};

/// What an address is to the policies of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Peer {
    pub class: Class,
    pub kind: PeerKind,
}

/// Names a policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyId {
    /// A NetworkPolicy.
    Namespaced(Name),
    /// A ClusterNetworkPolicy.
    Cluster(String),
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespaced(name) => write!(f, "policy {name}"),
            Self::Cluster(name) => write!(f, "ClusterNetworkPolicy {name}"),
        }
    }
}

/// Names what decided.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleRef {
    pub policy: PolicyId,
    pub direction: Direction,
    /// Place in the policy's list; `None`: the policy isolates the endpoint, and no rule of any policy allows.
    pub index: Option<u32>,
    /// The rule's own name, where rules can have one.
    pub name: Option<String>,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.index, &self.name) {
            (Some(index), Some(name)) => {
                write!(f, "rule {} ({name}) of {}", index + 1, self.policy)
            }
            (Some(index), None) => write!(f, "rule {} of {}", index + 1, self.policy),
            (None, _) => write!(f, "{} isolates it", self.policy),
        }
    }
}

/// What the data plane of one node shall hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Compiled {
    /// By longest match; an address without entry is [`Class::OUTSIDE`].
    pub peers: BTreeMap<Prefix, Peer>,
    /// The table of each pod of this node; equal tables are one.
    pub endpoints: BTreeMap<Name, Arc<Table>>,
    /// Names of the numbers in the tables.
    pub rules: BTreeMap<RuleId, RuleRef>,
    /// Numbers at and above were never used. An agent that starts over with maps of an earlier life sets these above
    /// all that is in them.
    pub next_class: Class,
    pub next_rule: RuleId,
}

/// A policy's part for one direction.
struct Part<'a> {
    /// Number of "isolated by this policy"; ClusterNetworkPolicies isolate nobody.
    isolates: Option<RuleId>,
    rules: Vec<Rule<'a>>,
}

/// What decides about a prefix; equal traits are one group. Group 0 is that of addresses without entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Traits<'a> {
    kind: PeerKind,
    /// Peer lists that contain it, ascending.
    lists: Vec<usize>,
    ports: Vec<Named<'a>>,
}

/// Rows of one template and direction: those of the outside and those of groups that differ from it.
pub(crate) struct Decisions {
    pub(crate) outside: Rc<Rows>,
    pub(crate) groups: HashMap<usize, Rc<Rows>>,
}

impl Decisions {
    pub(crate) fn of(&self, group: usize) -> &Rows {
        self.groups.get(&group).unwrap_or(&self.outside)
    }
}

/// Prefixes by group.
pub(crate) struct Groups {
    /// Every known prefix with its group.
    pub(crate) prefixes: PrefixMap<usize>,
    pub(crate) kinds: Vec<PeerKind>,
}

/// Compiles the world for its node. `previous` is the last output: it gives class and rule numbers, so that what did not
/// change stays equal, and an unchanged table stays the same allocation. A first run takes the default.
#[must_use]
pub fn compile(world: &World, previous: &Compiled) -> Compiled {
    let owners = owners(world);
    let (templates, endpoints) = select(world);
    let (parts, lists, rules, next_rule) = intern(world, &templates, previous);
    let (groups, traits) = group(world, &owners, &parts, &lists);
    let members = Members::new(traits, lists.len());
    let decisions: Vec<[Decisions; 2]> =
        templates.iter().map(|template| decide(template, &parts, &members)).collect();

    let pairs = endpoints.iter().filter_map(|(name, template)| {
        Some((previous.endpoints.get(*name)?, &decisions[*template]))
    });
    let (classes, next_class) = number::number(&groups, pairs, previous);
    let peers = peers(&groups, &classes);
    let endpoints = assemble(&endpoints, &decisions, &classes, previous);
    Compiled { peers, endpoints, rules, next_class, next_rule }
}

/// The pod that has each address now.
fn owners(world: &World) -> BTreeMap<IpAddr, (&Name, &PodFacts)> {
    let mut owners: BTreeMap<IpAddr, (&Name, &PodFacts)> = BTreeMap::new();
    for (name, pod) in world.pods.iter().filter(|(_, pod)| pod.is_selectable()) {
        for ip in &pod.ips {
            let rank = |pod: &PodFacts| (!pod.leaving, pod.created);
            let owner = owners.entry(*ip).or_insert((name, pod));
            if rank(pod) > rank(owner.1) {
                *owner = (name, pod);
            }
        }
    }
    owners
}

type Parts<'a> = HashMap<(Source<'a>, Direction), Part<'a>>;
/// Distinct peer lists with the port names that egress rules ask of their members.
type Lists<'a> = Vec<(&'a [PeerSpec], BTreeSet<&'a PortName>)>;

/// Numbers the rules of all policies in use and finds equal peer lists.
fn intern<'a>(
    world: &'a World,
    templates: &[TemplateKey<'a>],
    previous: &Compiled,
) -> (Parts<'a>, Lists<'a>, BTreeMap<RuleId, RuleRef>, RuleId) {
    let known: HashMap<&RuleRef, RuleId> =
        previous.rules.iter().map(|(id, rule)| (rule, *id)).collect();
    let mut next = previous.next_rule.max(RuleId(RuleId::NO_POLICY.0 + 1));
    let mut rules = BTreeMap::new();
    let mut number = |rule: RuleRef| {
        let id = known.get(&rule).copied().unwrap_or_else(|| {
            let id = next;
            next = RuleId(next.0 + 1);
            id
        });
        rules.insert(id, rule);
        id
    };
    let mut parts: Parts<'a> = HashMap::new();
    let mut lists: Lists<'a> = Vec::new();
    let mut places: HashMap<&'a [PeerSpec], usize> = HashMap::new();
    let used: BTreeSet<(Source<'_>, Direction)> = templates
        .iter()
        .flat_map(|template| {
            let ingress = template.ingress.iter().map(|source| (*source, Direction::Ingress));
            ingress.chain(template.egress.iter().map(|source| (*source, Direction::Egress)))
        })
        .collect();
    for (source, direction) in used {
        let (policy, stage) = match source {
            Source::Namespaced(name) => (PolicyId::Namespaced(name.clone()), Stage::Namespaced),
            Source::Cluster(name) => {
                let stage = match world.cluster_policies[name].tier {
                    Tier::Admin => Stage::Admin,
                    Tier::Baseline => Stage::Baseline,
                };
                (PolicyId::Cluster(name.to_owned()), stage)
            }
        };
        let reference = |index, name: Option<&String>| RuleRef {
            policy: policy.clone(),
            direction,
            index,
            name: name.cloned(),
        };
        let isolates = (stage == Stage::Namespaced).then(|| number(reference(None, None)));
        let mut part = Part { isolates, rules: Vec::new() };
        for (index, (name, action, spec)) in (0_u32..).zip(rules_of(world, source, direction)) {
            let list = spec.peers.as_deref().map(|peers| {
                let place = *places.entry(peers).or_insert_with(|| {
                    lists.push((peers, BTreeSet::new()));
                    lists.len() - 1
                });
                if direction == Direction::Egress {
                    lists[place].1.extend(port_names(std::iter::once(spec)));
                }
                place
            });
            let (id, ports) = (number(reference(Some(index), name)), spec.ports.as_deref());
            part.rules.push(Rule { id, stage, action, list, ports });
        }
        parts.insert((source, direction), part);
    }
    (parts, lists, rules, next)
}

/// Finds the peer lists of prefixes.
#[derive(Default)]
struct Finder<'a> {
    /// Blocks by their prefix: list, and number of the block.
    blocks: PrefixMap<Vec<(usize, usize)>>,
    /// Numbers of the blocks that except a prefix.
    excepts: PrefixMap<Vec<usize>>,
    /// Pod peers: list, and place of the namespace condition.
    pods: QueryIndex<'a, (usize, usize)>,
    conditions: Vec<&'a Namespaces>,
    /// Node peers with their lists, and labels of the nodes that have an address.
    nodes: Vec<(usize, &'a Query)>,
    hosts: HashMap<IpAddr, Vec<Option<&'a BTreeMap<String, String>>>>,
    /// Which conditions hold, by namespace.
    holding: HashMap<&'a str, Vec<bool>>,
}

impl<'a> Finder<'a> {
    fn new(world: &'a World, lists: &Lists<'a>) -> Self {
        let mut finder = Self::default();
        let mut conditions: HashMap<&Namespaces, usize> = HashMap::new();
        let mut count = 0;
        for (list, (peers, _)) in lists.iter().enumerate() {
            for peer in *peers {
                match peer {
                    PeerSpec::Block { cidr, except } => {
                        finder.blocks.entry(*cidr).push((list, count));
                        for inner in except {
                            finder.excepts.entry(*inner).push(count);
                        }
                        count += 1;
                    }
                    PeerSpec::Nodes(query) => finder.nodes.push((list, query)),
                    PeerSpec::Pods { namespaces, pods } => {
                        let place = *conditions.entry(namespaces).or_insert_with(|| {
                            finder.conditions.push(namespaces);
                            finder.conditions.len() - 1
                        });
                        finder.pods.insert(pods.as_ref(), (list, place));
                    }
                }
            }
        }
        for (node, ips) in world.nodes.iter().filter(|_| !finder.nodes.is_empty()) {
            for ip in ips {
                finder.hosts.entry(*ip).or_default().push(world.node_labels.get(node));
            }
        }
        let holds = |namespace: &str, condition: &&Namespaces| match condition {
            Namespaces::Own(own) => own == namespace,
            Namespaces::Matching(query) => {
                world.namespaces.get(namespace).is_some_and(|labels| query.matches(labels))
            }
        };
        for name in world.pods.keys() {
            finder.holding.entry(&name.namespace).or_insert_with(|| {
                finder
                    .conditions
                    .iter()
                    .map(|condition| holds(&name.namespace, condition))
                    .collect()
            });
        }
        finder
    }

    /// Lists with the prefix, ascending and each once.
    fn lists(&self, prefix: Prefix, owner: Option<(&Name, &PodFacts)>) -> Vec<usize> {
        let mut all = Vec::new();
        let excepted: Vec<usize> =
            self.excepts.around(prefix).flat_map(|(_, blocks)| blocks).copied().collect();
        for (list, block) in self.blocks.around(prefix).flat_map(|(_, blocks)| blocks) {
            if !excepted.contains(block) {
                all.push(*list);
            }
        }
        if let Some((name, pod)) = owner {
            let holding = &self.holding[name.namespace.as_str()];
            let matching = self.pods.matching(&pod.labels);
            all.extend(matching.filter(|(_, place)| holding[*place]).map(|(list, _)| *list));
        }
        let hosts =
            self.hosts.get(&prefix.addr()).filter(|_| prefix == Prefix::host(prefix.addr()));
        let none = BTreeMap::new();
        for labels in hosts.into_iter().flatten().map(|labels| labels.unwrap_or(&none)) {
            all.extend(
                self.nodes.iter().filter(|(_, query)| query.matches(labels)).map(|(list, _)| *list),
            );
        }
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// All known prefixes with their groups, and the traits of these.
fn group<'a>(
    world: &'a World,
    owners: &BTreeMap<IpAddr, (&'a Name, &'a PodFacts)>,
    parts: &Parts<'a>,
    lists: &Lists<'a>,
) -> (Groups, Vec<Traits<'a>>) {
    let finder = Finder::new(world, lists);
    // Names that egress rules to everyone ask for.
    let everyone: BTreeSet<&PortName> = parts
        .iter()
        .filter(|((_, direction), _)| *direction == Direction::Egress)
        .flat_map(|(_, part)| part.rules.iter().filter(|rule| rule.list.is_none()))
        .filter_map(|rule| rule.ports)
        .flatten()
        .filter_map(|port| match port {
            PortSpec::Named(name) => Some(name),
            PortSpec::Range(..) => None,
        })
        .collect();

    let mut kinds: BTreeMap<Prefix, PeerKind> = BTreeMap::new();
    for peer in lists.iter().flat_map(|(peers, _)| peers.iter()) {
        if let PeerSpec::Block { cidr, except } = peer {
            kinds.extend(
                std::iter::once(cidr).chain(except).map(|prefix| (*prefix, PeerKind::Outside)),
            );
        }
    }
    for (prefix, kind) in &mut kinds {
        if world.pod_ranges.iter().any(|range| range.contains(*prefix)) {
            *kind = PeerKind::UnknownPod;
        }
    }
    kinds.extend(world.pod_ranges.iter().map(|range| (*range, PeerKind::UnknownPod)));
    kinds.extend(owners.keys().map(|ip| (Prefix::host(*ip), PeerKind::Pod)));
    for (node, ips) in &world.nodes {
        let kind = if *node == world.node { PeerKind::LocalNode } else { PeerKind::RemoteNode };
        kinds.extend(ips.iter().map(|ip| (Prefix::host(*ip), kind)));
    }

    let mut places: HashMap<Traits<'a>, usize> = HashMap::new();
    let mut prefixes: PrefixMap<usize> = PrefixMap::default();
    // Wider prefixes come first.
    for (prefix, kind) in kinds {
        let owner = match kind {
            PeerKind::Pod => owners.get(&prefix.addr()).copied(),
            _ => None,
        };
        let lists_here = finder.lists(prefix, owner);
        let ports = owner.map_or_else(Vec::new, |(_, pod)| {
            let asked = lists_here.iter().flat_map(|list| lists[*list].1.iter().copied());
            resolve(asked.chain(everyone.iter().copied()).collect(), pod)
        });
        let here = Traits { kind, lists: lists_here, ports };
        if here == Traits::default() && prefixes.longest(prefix).is_none() {
            continue;
        }
        let next = places.len() + 1;
        *prefixes.entry(prefix) = *places.entry(here).or_insert(next);
    }
    let mut traits: Vec<_> = places.into_iter().collect();
    traits.sort_unstable_by_key(|(_, place)| *place);
    let traits: Vec<_> = std::iter::once(Traits::default())
        .chain(traits.into_iter().map(|(traits, _)| traits))
        .collect();
    let kinds = traits.iter().map(|traits| traits.kind).collect();
    (Groups { prefixes, kinds }, traits)
}

/// The groups seen from the rules.
struct Members<'a> {
    /// Groups of each peer list.
    of_list: Vec<Vec<usize>>,
    /// Groups whose members have port names that are asked for.
    named: Vec<usize>,
    traits: Vec<Traits<'a>>,
}

impl<'a> Members<'a> {
    fn new(traits: Vec<Traits<'a>>, lists: usize) -> Self {
        let mut of_list = vec![Vec::new(); lists];
        for (group, traits) in traits.iter().enumerate() {
            for list in &traits.lists {
                of_list[*list].push(group);
            }
        }
        let named =
            |(group, traits): (usize, &Traits<'_>)| (!traits.ports.is_empty()).then_some(group);
        Self { of_list, named: traits.iter().enumerate().filter_map(named).collect(), traits }
    }
}

/// Ingress and egress of a template.
fn decide(template: &TemplateKey<'_>, parts: &Parts<'_>, members: &Members<'_>) -> [Decisions; 2] {
    Direction::BOTH.map(|direction| {
        let policies = match direction {
            Direction::Ingress => &template.ingress,
            Direction::Egress => &template.egress,
        };
        let chosen: Vec<&Part<'_>> =
            policies.iter().map(|source| &parts[&(*source, direction)]).collect();
        if chosen.is_empty() {
            let open = Verdict { allow: true, rule: RuleId::NO_POLICY };
            return Decisions { outside: Rc::new([(Ports::ANY, open)]), groups: HashMap::new() };
        }
        let rules: Vec<&Rule<'_>> = chosen.iter().flat_map(|part| &part.rules).collect();
        let isolates = chosen.iter().find_map(|part| part.isolates);
        decide_rules(&rules, isolates, direction, &template.ports, members)
    })
}

/// The rules of all policies that select a template, in the order in which they are asked. NetworkPolicies are in the
/// order of their names: the first that allows is named.
fn decide_rules(
    rules: &[&Rule<'_>],
    isolates: Option<RuleId>,
    direction: Direction,
    own_ports: &[Named<'_>],
    members: &Members<'_>,
) -> Decisions {
    // Rules that mean each group, by their places; those for everyone come to all of them.
    let mut touched: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut everyone = Vec::new();
    for (place, rule) in rules.iter().enumerate() {
        match rule.list {
            Some(list) => {
                for group in &members.of_list[list] {
                    touched.entry(*group).or_default().push(place);
                }
            }
            None => everyone.push(place),
        }
    }
    let asks_names = direction == Direction::Egress
        && rules
            .iter()
            .filter_map(|rule| rule.ports)
            .flatten()
            .any(|port| matches!(port, PortSpec::Named(_)));
    let rows_of = |places: &[usize], peer_ports: &[Named<'_>]| -> Rc<Rows> {
        let ports = if direction == Direction::Ingress { own_ports } else { peer_ports };
        rows(places.iter().map(|place| rules[*place]), isolates, ports).into()
    };
    let outside = rows_of(&everyone, &[]);
    let mut groups = HashMap::new();
    // Many groups meet the same rules.
    let mut seen: HashMap<(Vec<usize>, &[Named<'_>]), Rc<Rows>> = HashMap::new();
    if asks_names {
        for group in &members.named {
            touched.entry(*group).or_default();
        }
    }
    for (group, mut places) in touched {
        let ports = if asks_names { members.traits[group].ports.as_slice() } else { &[] };
        places.extend(&everyone);
        places.sort_unstable();
        let rows = seen
            .entry((places, ports))
            .or_insert_with_key(|(places, ports)| rows_of(places, ports));
        if *rows != outside {
            groups.insert(group, Rc::clone(rows));
        }
    }
    Decisions { outside, groups }
}

/// The entries that say something their surrounding does not.
fn peers(groups: &Groups, classes: &[Class]) -> BTreeMap<Prefix, Peer> {
    let mut all: PrefixMap<Peer> = PrefixMap::default();
    // Wider prefixes come first.
    for (prefix, group) in groups.prefixes.sorted() {
        let peer = Peer { class: classes[*group], kind: groups.kinds[*group] };
        if all.longest(prefix) != Some(&peer) {
            *all.entry(prefix) = peer;
        }
    }
    all.sorted().into_iter().map(|(prefix, peer)| (prefix, *peer)).collect()
}

fn assemble(
    endpoints: &Endpoints<'_>,
    decisions: &[[Decisions; 2]],
    classes: &[Class],
    previous: &Compiled,
) -> BTreeMap<Name, Arc<Table>> {
    // Equal contents become one allocation, that of the previous output where it had it.
    let mut shared: HashMap<Arc<Table>, ()> =
        previous.endpoints.values().map(|table| (Arc::clone(table), ())).collect();
    let tables: Vec<Arc<Table>> = decisions
        .iter()
        .map(|both| {
            let mut rows = Vec::new();
            for (direction, decisions) in Direction::BOTH.into_iter().zip(both) {
                let mut add = |class, part: &Rows| {
                    rows.extend(part.iter().map(|(ports, verdict)| Row {
                        class,
                        direction,
                        ports: *ports,
                        verdict: *verdict,
                    }));
                };
                add(Class::OUTSIDE, &decisions.outside);
                for (group, part) in &decisions.groups {
                    add(classes[*group], part);
                }
            }
            let table = Arc::new(Table::new(rows));
            match shared.get_key_value(&table) {
                Some((known, ())) => Arc::clone(known),
                None => {
                    shared.insert(Arc::clone(&table), ());
                    table
                }
            }
        })
        .collect();
    endpoints.iter().map(|(name, place)| ((*name).clone(), Arc::clone(&tables[*place]))).collect()
}
