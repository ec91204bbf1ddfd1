use serde_json::{Value, json};

use super::*;
use crate::testing::{cluster, node, place, pod, requesting};

fn placed(
    nodes: &[std::sync::Arc<orch_api::k8s_openapi::api::core::v1::Node>],
    new: Value,
) -> String {
    place(&cluster(nodes, &[]), &pod("new", new)).expect("it fits")
}

#[test]
fn the_emptier_node_wins() {
    let nodes = [node("a", json!({})), node("b", json!({}))];
    let busy = pod("old", requesting(json!({ "cpu": "2", "memory": "4Gi" })));
    let cluster = cluster(&nodes, &[("a", busy)]);
    assert_eq!(
        place(&cluster, &pod("new", requesting(json!({ "cpu": "1", "memory": "1Gi" })))),
        Ok("b".to_owned())
    );
}

#[test]
fn pods_that_request_nothing_spread_too() {
    let nodes = [node("a", json!({})), node("b", json!({}))];
    let cluster = cluster(&nodes, &[("a", pod("old", json!({})))]);
    assert_eq!(place(&cluster, &pod("new", json!({}))), Ok("b".to_owned()));
}

#[test]
fn the_evenly_filled_node_wins_over_a_lopsided_one() {
    let nodes = [node("a", json!({})), node("b", json!({}))];
    let cluster = cluster(
        &nodes,
        &[
            ("a", pod("1", requesting(json!({ "cpu": "3", "memory": "1Gi" })))),
            ("b", pod("2", requesting(json!({ "cpu": "2", "memory": "3Gi" })))),
        ],
    );
    let new = pod("new", requesting(json!({ "cpu": "500m", "memory": "1Gi" })));
    let cycle = Cycle::new(&cluster, &new);
    let nodes: Vec<&NodeInfo> =
        ["a", "b"].into_iter().filter_map(|name| cluster.node(name)).collect();
    let scores = resources::balanced(&cycle, &nodes).expect("scores");
    assert!(scores[1] > scores[0], "{scores:?}");
}

#[test]
fn a_soft_taint_keeps_pods_away_while_there_is_another_node() {
    let soft = json!({ "spec": { "taints": [{ "key": "k", "effect": "PreferNoSchedule" }] } });
    assert_eq!(placed(&[node("a", soft.clone()), node("b", json!({}))], json!({})), "b");
    assert_eq!(placed(&[node("a", soft)], json!({})), "a");
}

#[test]
fn preferred_node_affinity_decides_between_equals() {
    let fast = json!({ "metadata": { "labels": { "disk": "ssd" } } });
    let preference = json!({ "spec": { "affinity": { "nodeAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [
        { "weight": 5, "preference": { "matchExpressions": [{ "key": "disk", "operator": "In", "values": ["ssd"] }] } },
    ] } } } });
    assert_eq!(placed(&[node("a", json!({})), node("b", fast)], preference), "b");
}

#[test]
fn preferred_inter_pod_affinity_attracts_and_repels() {
    let nodes = [node("a", json!({})), node("b", json!({}))];
    // Both nodes carry one pod, so that nothing else tells them apart.
    let web = pod("1", json!({ "metadata": { "labels": { "app": "web" } } }));
    let cluster = cluster(&nodes, &[("a", web), ("b", pod("2", json!({})))]);
    let prefers = |kind: &str| {
        pod(
            "new",
            json!({ "spec": { "affinity": { kind: { "preferredDuringSchedulingIgnoredDuringExecution": [{
                "weight": 10, "podAffinityTerm": {
                    "topologyKey": "kubernetes.io/hostname", "labelSelector": { "matchLabels": { "app": "web" } } },
            }] } } } }),
        )
    };
    assert_eq!(place(&cluster, &prefers("podAffinity")), Ok("a".to_owned()));
    assert_eq!(place(&cluster, &prefers("podAntiAffinity")), Ok("b".to_owned()));
}

#[test]
fn pods_of_one_owner_spread_over_hosts_and_zones() {
    let sized = |name: &str| {
        let owner = json!([{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs", "controller": true }]);
        pod(name, json!({ "metadata": { "ownerReferences": owner } }))
    };
    let names = ["a1", "a2", "b1", "b2"];
    let mut cluster = cluster(&names.map(|name| node(name, json!({}))), &[]);
    let mut zones = Vec::new();
    let mut hosts = Vec::new();
    for index in 0..4 {
        let new = sized(&format!("web-{index}"));
        let host = place(&cluster, &new).expect("it fits");
        cluster.set_pod(&host, &new);
        zones.push(host[..1].to_owned());
        hosts.push(host);
    }
    assert_ne!(zones[0], zones[1], "{hosts:?}");
    hosts.sort();
    assert_eq!(hosts, names);
}

#[test]
fn pods_of_one_service_spread_without_an_owner() {
    let nodes = [node("a", json!({})), node("b", json!({}))];
    let web = |name: &str| pod(name, json!({ "metadata": { "labels": { "app": "web" } } }));
    // The plain pods on b make a the emptier node; the Service says b all the same.
    let cluster_of = |service: bool| {
        let big = pod("2", requesting(json!({ "cpu": "300m", "memory": "400Mi" })));
        let mut cluster = cluster(&nodes, &[("a", web("1")), ("b", big)]);
        if service {
            let labels = [("app".to_owned(), "web".to_owned())].into();
            cluster.set_service("default", "web", Some(orch_api::Selector::from_labels(&labels)));
        }
        cluster
    };
    assert_eq!(place(&cluster_of(false), &web("new")), Ok("a".to_owned()));
    assert_eq!(place(&cluster_of(true), &web("new")), Ok("b".to_owned()));
}

#[test]
fn soft_spread_constraints_choose_the_emptier_domain() {
    let nodes = [node("a1", json!({})), node("a2", json!({})), node("b1", json!({}))];
    let web = |name: &str| pod(name, json!({ "metadata": { "labels": { "app": "web" } } }));
    let other = |name: &str| pod(name, requesting(json!({ "cpu": "100m", "memory": "200Mi" })));
    let cluster = cluster(
        &nodes,
        &[("a1", web("1")), ("a2", other("2")), ("b1", other("3")), ("b1", other("4"))],
    );
    let new = pod(
        "new",
        json!({
            "metadata": { "labels": { "app": "web" } },
            "spec": { "topologySpreadConstraints": [{
                "maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": { "matchLabels": { "app": "web" } } }] },
        }),
    );
    assert_eq!(place(&cluster, &new), Ok("b1".to_owned()));
}

#[test]
fn a_node_that_has_the_image_is_preferred() {
    let image =
        |size: i64| json!({ "status": { "images": [{ "names": ["web:1"], "sizeBytes": size }] } });
    let large = 900 * 1024 * 1024;
    assert_eq!(placed(&[node("a", json!({})), node("b", image(large))], json!({})), "b");
    let cluster = cluster(&[node("a", json!({})), node("b", image(1))], &[]);
    let new = pod("new", json!({}));
    let nodes: Vec<&NodeInfo> = cluster.nodes().collect();
    assert_eq!(super::node::images(&Cycle::new(&cluster, &new), &nodes), Some(vec![0, 0]));
}
