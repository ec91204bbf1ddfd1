//! How long the compiler takes for 1,000 pods × 500 policies, from the API's objects and after one change, and what comes
//! out. `cargo bench -p orch-policy`; prints medians and the worst of all rounds.
#![expect(clippy::print_stdout, reason = "the numbers are the output")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use orch_api::k8s_openapi::api::core::v1::{Container, ContainerPort, Pod, PodSpec, PodStatus};
use orch_api::k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer,
    NetworkPolicyPort, NetworkPolicySpec,
};
use orch_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use orch_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use orch_policy::{Class, Compiled, Name, Plan, PodFacts, Policy, Prefix, World, compile};

const PODS: usize = 1000;
const POLICIES: usize = 500;
const NAMESPACES: usize = 50;
const ROUNDS: usize = 15;

/// How alike the pods are.
#[derive(Clone, Copy)]
enum Shape {
    /// Replicas of five applications in each namespace.
    Replicas,
    /// Every pod has a label of its own that a policy asks for.
    Unique,
}

fn labels(list: &[(&str, String)]) -> BTreeMap<String, String> {
    list.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
}

fn equal(list: &[(&str, String)]) -> LabelSelector {
    LabelSelector { match_labels: Some(labels(list)), match_expressions: None }
}

fn meta(namespace: usize, name: String) -> ObjectMeta {
    ObjectMeta { namespace: Some(format!("ns{namespace}")), name: Some(name), ..Default::default() }
}

fn pod(place: usize, nodes: usize) -> Pod {
    let namespace = place % NAMESPACES;
    let app = place / NAMESPACES % 5;
    let list = [("app", format!("app{app}")), ("pod", format!("pod{place}"))];
    let port = |name: &str, number| ContainerPort {
        name: Some(name.to_owned()),
        container_port: number,
        ..Default::default()
    };
    let ports =
        Some(vec![port("web", 8080 + i32::from(app.is_multiple_of(2))), port("metrics", 9090)]);
    let node = place % nodes;
    let ip = Ipv4Addr::from(
        0x0af4_0000
            + (u32::try_from(node).expect("few") << 8) * 8
            + u32::try_from(place).expect("few")
            + 2,
    );
    Pod {
        metadata: ObjectMeta {
            labels: Some(labels(&list)),
            ..meta(namespace, format!("pod{place}"))
        },
        spec: Some(PodSpec {
            node_name: Some(format!("node{node}")),
            containers: vec![Container { ports, ..Default::default() }],
            ..Default::default()
        }),
        status: Some(PodStatus { pod_ip: Some(ip.to_string()), ..Default::default() }),
    }
}

/// Ten in a namespace: each has a pod peer, a namespace peer, a block with an exception, a port, a range, a name.
fn policy(place: usize, shape: Shape) -> NetworkPolicy {
    let namespace = place % NAMESPACES;
    let app = place / NAMESPACES;
    let port = |port: IntOrString, end_port| NetworkPolicyPort {
        protocol: None,
        port: Some(port),
        end_port,
    };
    let pods = |selector| NetworkPolicyPeer { pod_selector: Some(selector), ..Default::default() };
    let single = match shape {
        Shape::Replicas => equal(&[("app", format!("app{}", (app + 1) % 5))]),
        Shape::Unique => equal(&[("pod", format!("pod{}", place * 2))]),
    };
    let elsewhere = NetworkPolicyPeer {
        namespace_selector: Some(equal(&[("team", format!("team{}", place % 10))])),
        pod_selector: Some(single.clone()),
        ip_block: None,
    };
    let block = NetworkPolicyPeer {
        ip_block: Some(IPBlock {
            cidr: format!("172.{}.0.0/16", place % 200),
            except: Some(vec![format!("172.{}.{}.0/24", place % 200, place / 200)]),
        }),
        ..Default::default()
    };
    let first = i32::try_from(place).expect("few") + 1000;
    let ingress = vec![
        NetworkPolicyIngressRule {
            from: Some(vec![pods(single.clone()), elsewhere.clone()]),
            ports: Some(vec![
                port(IntOrString::Int(80), None),
                port(IntOrString::String("web".to_owned()), None),
            ]),
        },
        NetworkPolicyIngressRule {
            from: Some(vec![block.clone()]),
            ports: Some(vec![port(IntOrString::Int(first), Some(first + 500))]),
        },
    ];
    let egress = vec![NetworkPolicyEgressRule {
        to: Some(vec![elsewhere, block]),
        ports: Some(vec![
            port(IntOrString::String("metrics".to_owned()), None),
            port(IntOrString::Int(443), None),
        ]),
    }];
    let subject = match shape {
        Shape::Replicas => equal(&[("app", format!("app{}", app % 5))]),
        Shape::Unique => LabelSelector::default(),
    };
    NetworkPolicy {
        metadata: meta(namespace, format!("policy{place}")),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(subject),
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            ingress: Some(ingress),
            egress: Some(egress),
        }),
    }
}

fn name(meta: &ObjectMeta) -> Name {
    Name::new(
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}

fn world(pods: &[Pod], policies: &[NetworkPolicy]) -> World {
    World {
        node: "node0".to_owned(),
        pods: pods.iter().map(|pod| (name(&pod.metadata), PodFacts::from_api(pod))).collect(),
        namespaces: (0..NAMESPACES)
            .map(|place| (format!("ns{place}"), labels(&[("team", format!("team{}", place % 10))])))
            .collect(),
        policies: policies
            .iter()
            .map(|policy| (name(&policy.metadata), Policy::from_api(policy)))
            .collect(),
        nodes: BTreeMap::from([("node0".to_owned(), vec![IpAddr::from([172, 31, 0, 1])])]),
        pod_ranges: Prefix::parse("10.244.0.0/16").into_iter().collect(),
        ..World::default()
    }
}

fn measured<T>(mut work: impl FnMut() -> T) -> (Duration, Duration) {
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            std::hint::black_box(work());
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    (times[ROUNDS / 2], times[ROUNDS - 1])
}

fn print(what: &str, (median, worst): (Duration, Duration)) {
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    println!("  {what:<44} median {:>8.2} ms   worst {:>8.2} ms", millis(median), millis(worst));
}

fn describe(compiled: &Compiled) {
    let tables: BTreeMap<*const orch_policy::Table, usize> =
        compiled.endpoints.values().map(|table| (Arc::as_ptr(table), table.rows().len())).collect();
    let classes: BTreeSet<Class> = compiled.peers.values().map(|peer| peer.class).collect();
    println!(
        "  {} endpoints, {} tables, {} rows (largest {}), {} prefixes in {} classes",
        compiled.endpoints.len(),
        tables.len(),
        tables.values().sum::<usize>(),
        tables.values().max().copied().unwrap_or_default(),
        compiled.peers.len(),
        classes.len(),
    );
}

fn main() {
    let cases = [
        ("replicas, one node of 30", Shape::Replicas, 30),
        ("replicas, all pods on the node", Shape::Replicas, 1),
        ("every pod another, one node of 30", Shape::Unique, 30),
        ("every pod another, all pods on the node", Shape::Unique, 1),
    ];
    for (title, shape, nodes) in cases {
        println!("{PODS} pods × {POLICIES} policies: {title}");
        let pods: Vec<Pod> = (0..PODS).map(|place| pod(place, nodes)).collect();
        let policies: Vec<NetworkPolicy> =
            (0..POLICIES).map(|place| policy(place, shape)).collect();
        let base = world(&pods, &policies);
        let compiled = compile(&base, &Compiled::default());
        describe(&compiled);
        print(
            "from the API's objects",
            measured(|| compile(&world(&pods, &policies), &Compiled::default())),
        );

        let mut relabelled = base.clone();
        let moved =
            relabelled.pods.get_mut(&name(&pods[NAMESPACES].metadata)).expect("a pod of the world");
        moved.labels.insert("app".to_owned(), "app4".to_owned());
        moved.labels.insert("pod".to_owned(), "pod0".to_owned());
        print(
            "a label of one pod changed, with the plan",
            measured(|| Plan::new(&compiled, &compile(&relabelled, &compiled))),
        );
        let plan = Plan::new(&compiled, &compile(&relabelled, &compiled));
        println!(
            "    writes {} prefixes, {} of the tables",
            plan.set.len() + plan.unset.len(),
            plan.before.len() + plan.tables.len()
        );

        let mut edited = base.clone();
        let mut changed = policies[0].clone();
        changed.spec.as_mut().expect("made with spec").ingress = None;
        edited.policies.insert(name(&changed.metadata), Policy::from_api(&changed));
        print(
            "one policy changed, with the plan",
            measured(|| Plan::new(&compiled, &compile(&edited, &compiled))),
        );
        let plan = Plan::new(&compiled, &compile(&edited, &compiled));
        println!(
            "    writes {} prefixes, {} of the tables",
            plan.set.len() + plan.unset.len(),
            plan.before.len() + plan.tables.len()
        );
    }
}
