//! The compiler's tables, read in user space, against the oracle.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::oracle::{Cluster, EGRESS, INGRESS, Side, Traffic, addresses};
use crate::worlds::{
    NODES, change, cluster, interesting_addresses, interesting_traffic, namespace_labels,
};
use k8s_openapi::api::core::v1::Pod;
use orch_api::cluster_policy::ClusterNetworkPolicy;
use orch_policy::{
    Class, ClusterPolicy, Compiled, Direction, Moves, Name, Plan, PodFacts, Policy, PolicyId,
    Prefix, Publish, World, compile,
};
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, Strategy, proptest};
use proptest::strategy::ValueTree;

fn name_of(meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Name {
    Name::new(
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}

/// What the agent of the node would hand to the compiler.
fn world(cluster: &Cluster, node: &str) -> World {
    World {
        node: node.to_owned(),
        pods: cluster
            .pods
            .iter()
            .map(|pod| (name_of(&pod.metadata), PodFacts::from_api(pod)))
            .collect(),
        namespaces: namespace_labels(cluster),
        policies: cluster
            .policies
            .iter()
            .map(|policy| (name_of(&policy.metadata), Policy::from_api(policy)))
            .collect(),
        nodes: cluster.nodes.iter().cloned().collect(),
        cluster_policies: cluster
            .cluster_policies
            .iter()
            .map(|value| {
                let policy: ClusterNetworkPolicy =
                    serde_json::from_value(value.clone()).expect("a policy");
                let name = policy.metadata.name.clone().unwrap_or_default();
                (name, ClusterPolicy::from_api(&policy))
            })
            .collect(),
        node_labels: cluster.node_labels.clone(),
        pod_ranges: ["10.244.1.0/24", "10.244.2.0/24", "fd00:10:244:1::/64"]
            .iter()
            .filter_map(|text| Prefix::parse(text))
            .collect(),
    }
}

fn number(protocol: &str) -> u8 {
    match protocol {
        "TCP" => 6,
        "UDP" => 17,
        "SCTP" => 132,
        _ => 1,
    }
}

const SIDES: [(Side, Direction); 2] = [(INGRESS, Direction::Ingress), (EGRESS, Direction::Egress)];

/// Every question about a node's pods: pod, side, other end, traffic.
fn questions<'a>(
    cluster: &'a Cluster,
    others: &'a [IpAddr],
    traffic: &'a [Traffic],
) -> impl Iterator<Item = (&'a Pod, (Side, Direction), IpAddr, Traffic)> {
    cluster.pods.iter().flat_map(move |pod| {
        SIDES.into_iter().flat_map(move |side| {
            others.iter().flat_map(move |other| {
                traffic.iter().map(move |traffic| (pod, side, *other, *traffic))
            })
        })
    })
}

/// Asks everything; panics with the first difference. Gives the number of questions.
fn assert_equal(cluster: &Cluster, node: &str, compiled: &Compiled) -> usize {
    let others: Vec<IpAddr> = interesting_addresses(cluster).into_iter().collect();
    let traffic = interesting_traffic(cluster);
    let mut count = 0;
    for (pod, (side, direction), other, traffic) in questions(cluster, &others, &traffic) {
        let name = name_of(&pod.metadata);
        let is_here = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node);
        let judged =
            compiled.judge(&name, direction, other, number(traffic.protocol), traffic.port);
        if !is_here || !crate::oracle::is_networked(pod) {
            assert!(judged.is_none(), "{name} is no endpoint of {node}");
            continue;
        }
        let judged = judged.expect("an endpoint has a table for every packet");
        let answer = cluster.end(pod, side, other, traffic);
        let what =
            || format!("{name} {direction} {other} {traffic:?}: {judged:?}, oracle: {answer:?}");
        assert_eq!(judged.allow, answer.allowed, "{}", what());
        match judged.decided_by {
            None => {
                assert!(answer.isolated_by.is_empty() && answer.decided_by.is_none(), "{}", what())
            }
            Some(rule) => {
                assert_eq!(rule.direction, direction, "{}", what());
                let policy = match &rule.policy {
                    PolicyId::Namespaced(name) => name.to_string(),
                    PolicyId::Cluster(name) => {
                        let place = rule.index.map(|index| (name.clone(), index as usize));
                        assert_eq!(answer.decided_by, place, "{}", what());
                        count += 1;
                        continue;
                    }
                };
                assert_eq!(answer.decided_by, None, "{}", what());
                match rule.index {
                    // All rules that allow may be named; a rule for everything goes before one for a port.
                    Some(index) => {
                        assert!(
                            answer.allowed_by.contains(&(policy, index as usize)),
                            "{}",
                            what()
                        );
                    }
                    None => {
                        assert!(!judged.allow && answer.isolated_by.contains(&policy), "{}", what())
                    }
                }
            }
        }
        count += 1;
    }
    count
}

/// Plans executed against a model of the maps.
#[derive(Clone, Default)]
struct Maps(Compiled);

impl Maps {
    fn publish(&mut self, publish: &Publish, mut look: impl FnMut(&Self)) {
        for endpoint in &publish.endpoints {
            self.0.endpoints.insert(endpoint.clone(), Arc::clone(&publish.table));
            look(self);
        }
    }

    /// Executes a plan and looks after each single write.
    fn execute(&mut self, plan: &Plan, mut look: impl FnMut(&Self)) {
        for publish in &plan.before {
            self.publish(publish, &mut look);
        }
        for (prefix, peer) in &plan.set {
            self.0.peers.insert(*prefix, *peer);
            look(self);
        }
        for publish in &plan.tables {
            self.publish(publish, &mut look);
        }
        for prefix in &plan.unset {
            self.0.peers.remove(prefix);
            look(self);
        }
        for name in &plan.gone {
            self.0.endpoints.remove(name);
        }
    }
}

/// Every case asks tens of thousands of questions: `PROPTEST_CASES` (by default 256) is meant for smaller ones.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig { cases: (default.cases / 10).max(256), ..default }
}

proptest! {
    #![proptest_config(config())]

    /// Both nodes of random clusters: all their pods × all addresses × protocols and ports.
    #[test]
    fn fuzz_tables_say_what_the_oracle_says(cluster in cluster(8, 6)) {
        for node in NODES {
            let compiled = compile(&world(&cluster, node), &Compiled::default());
            assert_equal(&cluster, node, &compiled);
        }
    }

    /// Outputs that follow each other stay right, whatever numbers they took over.
    #[test]
    fn fuzz_a_history_of_changes_stays_right(start in cluster(6, 4), changes in vec(change(), 1..6)) {
        let mut cluster = start;
        let mut compiled = compile(&world(&cluster, "one"), &Compiled::default());
        let mut maps = Maps::default();
        maps.execute(&Plan::new(&Compiled::default(), &compiled), |_| {});
        for change in changes {
            cluster = change.apply(&cluster);
            let next = compile(&world(&cluster, "one"), &compiled);
            assert_equal(&cluster, "one", &next);
            maps.execute(&Plan::new(&compiled, &next), |_| {});
            assert_eq!(maps.0.peers, next.peers, "the plan leads to the output");
            assert_eq!(maps.0.endpoints, next.endpoints, "the plan leads to the output");
            let again = compile(&world(&cluster, "one"), &next);
            assert!(Plan::new(&next, &again).is_empty(), "nothing changed, so there is nothing to write");
            compiled = next;
        }
    }

    /// Whose flows are not judged again after a change decides everything as before.
    #[test]
    fn fuzz_a_change_that_is_not_felt_decides_nothing_otherwise(
        start in cluster(5, 4),
        changes in vec(change(), 1..4),
    ) {
        let before = compile(&world(&start, "one"), &Compiled::default());
        let end = changes.iter().fold(start.clone(), |cluster, change| change.apply(&cluster));
        let after = compile(&world(&end, "one"), &before);
        let moves = Moves::between(&before.peers, &after.peers);
        let others: Vec<IpAddr> =
            interesting_addresses(&start).union(&interesting_addresses(&end)).copied().collect();
        let mut traffic = interesting_traffic(&end);
        traffic.extend(interesting_traffic(&start));
        for (pod, (_, direction), other, traffic) in questions(&start, &others, &traffic) {
            let name = name_of(&pod.metadata);
            let tables = (before.endpoints.get(&name), after.endpoints.get(&name));
            let (Some(old), Some(new)) = tables else { continue };
            if moves.are_felt(old, new) {
                continue;
            }
            let judge = |compiled: &Compiled| {
                let protocol = number(traffic.protocol);
                let judged = compiled.judge(&name, direction, other, protocol, traffic.port);
                judged.map(|judged| (judged.allow, judged.rule))
            };
            assert_eq!(judge(&before), judge(&after), "{name} {direction} {other} {traffic:?}");
        }
    }

    /// While a plan runs, each endpoint decides as before or as after, write by write.
    #[test]
    fn fuzz_no_write_of_a_plan_shows(start in cluster(5, 4), changes in vec(change(), 1..4)) {
        let before = compile(&world(&start, "one"), &Compiled::default());
        let end = changes.iter().fold(start.clone(), |cluster, change| change.apply(&cluster));
        let after = compile(&world(&end, "one"), &before);
        let others: Vec<IpAddr> =
            interesting_addresses(&start).union(&interesting_addresses(&end)).copied().collect();
        // Few ports: each write is followed by all questions.
        let mut traffic = interesting_traffic(&end);
        traffic.extend(interesting_traffic(&start));
        traffic.dedup();
        let traffic: Vec<Traffic> = traffic.iter().step_by(7).copied().collect();
        let judge = |compiled: &Compiled, name: &Name, direction, other, traffic: Traffic| {
            compiled
                .judge(name, direction, other, number(traffic.protocol), traffic.port)
                .map(|judged| judged.allow)
        };
        let mut maps = Maps(before.clone());
        maps.execute(&Plan::new(&before, &after), |maps| {
            for (pod, (_, direction), other, traffic) in questions(&start, &others, &traffic) {
                let name = name_of(&pod.metadata);
                let old = judge(&before, &name, direction, other, traffic);
                let new = judge(&after, &name, direction, other, traffic);
                let now = judge(&maps.0, &name, direction, other, traffic);
                // An endpoint without old or new table is closed or gone.
                if let (Some(old), Some(new), Some(now)) = (old, new, now) {
                    assert!(now == old || now == new, "{name} {direction} {other} {traffic:?}: {now}");
                }
            }
        });
        assert_eq!(maps.0.peers, after.peers);
        assert_eq!(maps.0.endpoints, after.endpoints);
    }
}

/// A class number never comes to mean something else while a table or an address still has the old meaning.
#[test]
fn numbers_are_not_used_again() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut compiled = Compiled::default();
    let mut retired: BTreeMap<Class, usize> = BTreeMap::new();
    for round in 0..100 {
        let cluster = cluster(8, 6).new_tree(&mut runner).expect("a cluster").current();
        let next = compile(&world(&cluster, "one"), &compiled);
        let used = |compiled: &Compiled| {
            compiled
                .peers
                .values()
                .map(|peer| peer.class)
                .collect::<std::collections::BTreeSet<_>>()
        };
        for class in used(&next) {
            assert!(!retired.contains_key(&class), "round {round}: {class:?} came back");
            assert!(class < next.next_class);
        }
        for class in used(&compiled).difference(&used(&next)) {
            retired.insert(*class, round);
        }
        compiled = next;
    }
}

#[test]
fn a_cluster_holds_one_policy_of_a_name() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let start = cluster(3, 3).new_tree(&mut runner).expect("a cluster").current();
    for _ in 0..200 {
        let changes = vec(change(), 8..20).new_tree(&mut runner).expect("changes").current();
        let end = changes.iter().fold(start.clone(), |cluster, change| change.apply(&cluster));
        let world = world(&end, "one");
        assert_eq!(world.policies.len(), end.policies.len(), "after {changes:?}");
        assert_eq!(world.cluster_policies.len(), end.cluster_policies.len(), "after {changes:?}");
    }
}

#[test]
fn the_oracle_and_the_worlds_have_something_to_say() {
    // Worlds in which everything is allowed or everything is denied would test nothing.
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut allowed, mut denied, mut questions_asked) = (0_usize, 0_usize, 0_usize);
    for _ in 0..50 {
        let cluster = cluster(8, 6).new_tree(&mut runner).expect("a cluster").current();
        let others: Vec<IpAddr> = interesting_addresses(&cluster).into_iter().collect();
        let traffic = interesting_traffic(&cluster);
        for (pod, (side, _), other, traffic) in questions(&cluster, &others, &traffic) {
            if crate::oracle::is_networked(pod) && !addresses(pod).is_empty() {
                let answer = cluster.end(pod, side, other, traffic);
                if !answer.isolated_by.is_empty() {
                    *(if answer.allowed { &mut allowed } else { &mut denied }) += 1;
                }
                questions_asked += 1;
            }
        }
    }
    let share = |part: usize| part * 100 / questions_asked;
    assert!(share(allowed) >= 5 && share(denied) >= 5, "{allowed} + {denied} of {questions_asked}");
}
