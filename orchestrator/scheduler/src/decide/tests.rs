use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::*;
use crate::testing::{cluster, node, place, pod, requesting};

#[test]
fn the_message_counts_nodes_by_reason_and_sorts_the_texts() {
    let nodes = [
        node("a", json!({ "status": { "allocatable": { "cpu": "1" } } })),
        node(
            "b",
            json!({ "spec": { "taints": [{ "key": "k", "value": "v", "effect": "NoSchedule" }] } }),
        ),
        node(
            "c",
            json!({ "spec": { "taints": [{ "key": "k", "value": "v", "effect": "NoSchedule" }] } }),
        ),
        node("d", json!({ "spec": { "unschedulable": true } })),
    ];
    let message = place(&cluster(&nodes, &[]), &pod("new", requesting(json!({ "cpu": "2" }))))
        .expect_err("no fit");
    assert_eq!(
        message,
        "0/4 nodes are available: 1 Insufficient cpu, 1 node(s) were unschedulable, 2 node(s) had untolerated taint \
         {k: v}."
    );
    assert_eq!(
        place(&cluster(&[], &[]), &pod("new", json!({}))).expect_err("no nodes"),
        "no nodes available to schedule pods"
    );
}

#[test]
fn a_pod_that_names_its_node_goes_there_and_is_refused_in_full_when_it_cannot() {
    let named = |name: &str| {
        pod(
            "new",
            json!({ "spec": { "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{ "matchFields": [{ "key": "metadata.name", "operator": "In", "values": [name] }] }]
            } } } } }),
        )
    };
    let nodes = [
        node("a", json!({})),
        node("b", json!({})),
        node("c", json!({ "spec": { "unschedulable": true } })),
    ];
    let cluster = cluster(&nodes, &[]);
    assert_eq!(place(&cluster, &named("b")), Ok("b".to_owned()));
    assert_eq!(
        place(&cluster, &named("c")).expect_err("cordoned"),
        "0/3 nodes are available: 1 node(s) were unschedulable, 2 node(s) didn't match Pod's node affinity/selector."
    );
}

#[test]
fn a_removed_node_takes_no_pods_even_while_some_are_left_on_it() {
    let mut cluster =
        cluster(&[node("a", json!({})), node("b", json!({}))], &[("a", pod("old", json!({})))]);
    cluster.remove_node("a");
    assert_eq!(cluster.node_count(), 1);
    assert_eq!(place(&cluster, &pod("new", json!({}))), Ok("b".to_owned()));
    cluster.remove_pod("old");
    cluster.remove_node("b");
    assert!(cluster.slots().is_empty());
}

#[test]
fn five_thousand_pods_fill_a_thousand_nodes_evenly() {
    let mut cluster = Cluster::default();
    for index in 0..1000 {
        let zone = format!("z{}", index % 3);
        let over = json!({ "metadata": { "labels": { "topology.kubernetes.io/zone": zone } } });
        cluster.set_node(node(&format!("n{index}"), over));
    }
    let mut dice = StdRng::seed_from_u64(7);
    let mut start = 0;
    let mut per_node: HashMap<String, i64> = HashMap::new();
    for index in 0..5000 {
        let new = pod(&format!("p{index}"), requesting(json!({ "cpu": "800m", "memory": "1Gi" })));
        let host = decide(&cluster, &new, &mut start, &mut dice).expect("it fits").to_owned();
        cluster.assume(&host, &new);
        *per_node.entry(host).or_default() += 1;
    }
    // 4 CPUs hold exactly five pods of 0.8: every node is full, and nothing more fits.
    assert!(per_node.len() == 1000 && per_node.values().all(|count| *count == 5));
    let one_more = pod("late", requesting(json!({ "cpu": "1m" })));
    assert_eq!(
        place(&cluster, &one_more).expect_err("full"),
        "0/1000 nodes are available: 1000 Insufficient cpu."
    );
}

#[derive(Debug, Clone)]
struct Wish {
    milli_cpu: i64,
    memory_mib: i64,
    app: u8,
    /// Keeps away from this app on the same host or in the same zone.
    away_from: Option<(u8, bool)>,
    port: Option<u16>,
}

fn wish() -> impl Strategy<Value = Wish> {
    let away = proptest::option::weighted(0.3, (0..4_u8, any::<bool>()));
    (0..1500_i64, 0..3000_i64, 0..4_u8, away, proptest::option::weighted(0.2, 8000..8003_u16))
        .prop_map(|(milli_cpu, memory_mib, app, away_from, port)| Wish {
            milli_cpu,
            memory_mib,
            app,
            away_from,
            port,
        })
}

fn wished(index: usize, wish: &Wish) -> Arc<PodInfo> {
    let mut spec = requesting(
        json!({ "cpu": format!("{}m", wish.milli_cpu), "memory": format!("{}Mi", wish.memory_mib) }),
    );
    spec["metadata"] = json!({ "labels": { "app": wish.app.to_string() } });
    if let Some(port) = wish.port {
        spec["spec"]["containers"][0]["ports"] = json!([{ "containerPort": 80, "hostPort": port }]);
    }
    if let Some((app, zone)) = wish.away_from {
        let key = if zone { "topology.kubernetes.io/zone" } else { "kubernetes.io/hostname" };
        spec["spec"]["affinity"] = json!({ "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [
            { "topologyKey": key, "labelSelector": { "matchLabels": { "app": app.to_string() } } }] } });
    }
    pod(&format!("p{index}"), spec)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_node_is_overfilled_and_no_anti_affinity_is_broken(
        wishes in proptest::collection::vec(wish(), 1..40),
        leavers in proptest::collection::vec(any::<bool>(), 40),
        seed in any::<u64>(),
    ) {
        let names = ["a1", "a2", "b1", "b2", "c1"];
        let mut cluster = cluster(&names.map(|name| node(name, Value::Object(serde_json::Map::new()))), &[]);
        let mut dice = StdRng::seed_from_u64(seed);
        let mut placed: Vec<(usize, &str)> = Vec::new();
        for (index, wish) in wishes.iter().enumerate() {
            let new = wished(index, wish);
            let Ok(host) = decide(&cluster, &new, &mut 0, &mut dice).map(str::to_owned) else { continue };
            cluster.assume(&host, &new);
            placed.push((index, names.into_iter().find(|name| **name == *host).expect("a known node")));
            if leavers[index] {
                let (gone, _) = placed.swap_remove(index % placed.len());
                cluster.remove_pod(&format!("p{gone}"));
            }
        }
        for name in names {
            let here: Vec<&Wish> = placed.iter().filter(|(_, host)| *host == name).map(|(index, _)| &wishes[*index]).collect();
            prop_assert!(here.iter().map(|wish| wish.milli_cpu).sum::<i64>() <= 4000);
            prop_assert!(here.iter().map(|wish| wish.memory_mib).sum::<i64>() <= 8192);
            let mut ports: Vec<u16> = here.iter().filter_map(|wish| wish.port).collect();
            let all = ports.len();
            ports.sort_unstable();
            ports.dedup();
            prop_assert_eq!(ports.len(), all);
            let info = cluster.node(name).expect("the node");
            prop_assert_eq!(info.requested.cpu_milli, here.iter().map(|wish| wish.milli_cpu).sum::<i64>());
            prop_assert_eq!(info.pods.len(), here.len());
        }
        for (one, host) in &placed {
            let Some((app, zone)) = wishes[*one].away_from else { continue };
            for (other, other_host) in &placed {
                let near = if zone { host[..1] == other_host[..1] } else { host == other_host };
                prop_assert!(one == other || !near || wishes[*other].app != app, "{} and {}", one, other);
            }
        }
    }
}
