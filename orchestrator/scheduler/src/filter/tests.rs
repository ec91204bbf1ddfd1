use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::testing::{cluster, node, pod, requesting};

/// The verdict on one node among others, as the text of the reasons; "" = fit.
fn verdict(cluster: &Cluster, pod: &PodInfo, node: &str) -> String {
    let node = cluster.node(node).expect("the node");
    match Cycle::new(cluster, pod).filter(node) {
        Ok(()) => String::new(),
        Err((_, reasons)) => reasons.join(", "),
    }
}

fn alone(node_over: Value, pod_over: Value) -> String {
    let cluster = cluster(&[node("a", node_over)], &[]);
    verdict(&cluster, &pod("new", pod_over), "a")
}

#[test]
fn a_cordoned_node_takes_only_pods_that_tolerate_it() {
    let cordoned = json!({ "spec": { "unschedulable": true } });
    assert_eq!(alone(cordoned.clone(), json!({})), "node(s) were unschedulable");
    let tolerant = json!({ "spec": { "tolerations": [{ "key": "node.kubernetes.io/unschedulable", "operator": "Exists" }] } });
    assert_eq!(alone(cordoned, tolerant), "");
}

#[test]
fn taints_by_table() {
    let taint = |effect: &str| json!({ "spec": { "taints": [{ "key": "gpu", "value": "yes", "effect": effect }] } });
    let tolerating = |toleration: Value| json!({ "spec": { "tolerations": [toleration] } });
    let refused = "node(s) had untolerated taint {gpu: yes}";
    for (effect, toleration, expected) in [
        ("NoSchedule", json!({ "key": "other", "operator": "Exists" }), refused),
        ("NoExecute", json!({ "key": "gpu", "value": "no" }), refused),
        ("NoExecute", json!({ "key": "gpu", "value": "yes" }), ""),
        ("NoSchedule", json!({ "operator": "Exists" }), ""),
        (
            "NoSchedule",
            json!({ "key": "gpu", "operator": "Exists", "effect": "NoExecute" }),
            refused,
        ),
        ("PreferNoSchedule", json!({ "key": "other" }), ""),
    ] {
        assert_eq!(
            alone(taint(effect), tolerating(toleration.clone())),
            expected,
            "{effect} {toleration}"
        );
    }
}

#[test]
fn node_affinity_by_table() {
    let labelled = json!({ "metadata": { "labels": { "disk": "ssd", "size": "10" } } });
    let term = |expressions: Value, fields: Value| {
        json!({ "spec": { "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{ "matchExpressions": expressions, "matchFields": fields }] } } } } })
    };
    let expression = |key: &str, operator: &str, values: &[&str]| {
        term(json!([{ "key": key, "operator": operator, "values": values }]), json!([]))
    };
    let name = |operator: &str, value: &str| {
        term(
            json!([]),
            json!([{ "key": "metadata.name", "operator": operator, "values": [value] }]),
        )
    };
    for (pod, fits) in [
        (json!({ "spec": { "nodeSelector": { "disk": "ssd" } } }), true),
        (json!({ "spec": { "nodeSelector": { "disk": "ssd", "absent": "" } } }), false),
        (expression("disk", "In", &["hdd", "ssd"]), true),
        (expression("disk", "NotIn", &["ssd"]), false),
        (expression("absent", "NotIn", &["x"]), true),
        (expression("disk", "Exists", &[]), true),
        (expression("disk", "DoesNotExist", &[]), false),
        (expression("size", "Gt", &["9"]), true),
        (expression("size", "Lt", &["10"]), false),
        (expression("disk", "Gt", &["9"]), false),
        (expression("size", "Gt", &["x"]), false),
        (expression("size", "Like", &["1"]), false),
        (name("In", "a"), true),
        (name("In", "b"), false),
        (name("NotIn", "b"), true),
        (term(json!([]), json!([])), false),
    ] {
        let expected = if fits { "" } else { "node(s) didn't match Pod's node affinity/selector" };
        assert_eq!(alone(labelled.clone(), pod.clone()), expected, "{pod}");
    }
}

#[test]
fn host_ports_conflict_by_port_protocol_and_overlapping_address() {
    let with = |name: &str, ip: &str, port: i32, protocol: &str| {
        let ports =
            json!([{ "containerPort": 80, "hostPort": port, "hostIP": ip, "protocol": protocol }]);
        pod(name, json!({ "spec": { "containers": [{ "name": "c", "ports": ports }] } }))
    };
    let taken = with("old", "127.0.0.1", 80, "TCP");
    let cluster = cluster(&[node("a", json!({}))], &[("a", taken)]);
    for (ip, port, protocol, fits) in [
        ("127.0.0.1", 80, "TCP", false),
        ("", 80, "TCP", false),
        ("0.0.0.0", 80, "TCP", false),
        ("10.0.0.1", 80, "TCP", true),
        ("", 81, "TCP", true),
        ("", 80, "UDP", true),
    ] {
        let expected =
            if fits { "" } else { "node(s) didn't have free ports for the requested pod ports" };
        assert_eq!(
            verdict(&cluster, &with("new", ip, port, protocol), "a"),
            expected,
            "{ip}:{port}/{protocol}"
        );
    }
}

#[test]
fn resources_by_table() {
    let small = json!({ "status": { "allocatable": { "pods": "2", "example.com/gpu": "1" } } });
    let used = pod("old", requesting(json!({ "cpu": "3", "memory": "1Gi" })));
    let cluster = cluster(&[node("a", small)], &[("a", used)]);
    for (requests, expected) in [
        (json!({}), ""),
        (json!({ "cpu": "1" }), ""),
        (json!({ "cpu": "1001m" }), "Insufficient cpu"),
        (json!({ "memory": "7Gi" }), ""),
        (json!({ "cpu": "2", "memory": "8Gi" }), "Insufficient cpu, Insufficient memory"),
        (json!({ "ephemeral-storage": "11Gi" }), "Insufficient ephemeral-storage"),
        (json!({ "example.com/gpu": "1" }), ""),
        (json!({ "example.com/gpu": "2" }), "Insufficient example.com/gpu"),
        (json!({ "example.com/none": "1" }), "Insufficient example.com/none"),
    ] {
        assert_eq!(
            verdict(&cluster, &pod("new", requesting(requests.clone())), "a"),
            expected,
            "{requests}"
        );
    }
}

#[test]
fn a_full_node_takes_no_more_pods_and_an_overcommitted_one_only_pods_that_request_nothing() {
    let small = |pods: &str| {
        node("a", json!({ "status": { "allocatable": { "cpu": "1", "pods": pods } } }))
    };
    let used = || vec![("a", pod("old", requesting(json!({ "cpu": "2" }))))];
    let new = pod("new", json!({}));
    assert_eq!(verdict(&cluster(&[small("1")], &used()), &new, "a"), "Too many pods");
    assert_eq!(verdict(&cluster(&[small("2")], &used()), &new, "a"), "");
}

fn term(key: &str, app: &str) -> Value {
    json!({ "topologyKey": key, "labelSelector": { "matchLabels": { "app": app } } })
}

fn with_affinity(name: &str, app: &str, kind: &str, term: Value) -> Arc<PodInfo> {
    pod(
        name,
        json!({
            "metadata": { "labels": { "app": app } },
            "spec": { "affinity": { kind: { "requiredDuringSchedulingIgnoredDuringExecution": [term] } } },
        }),
    )
}

fn app(name: &str, app: &str) -> Arc<PodInfo> {
    pod(name, json!({ "metadata": { "labels": { "app": app } } }))
}

const ZONE: &str = "topology.kubernetes.io/zone";
const HOST: &str = "kubernetes.io/hostname";

#[test]
fn affinity_wants_the_same_place_and_the_first_of_its_kind_may_start_anywhere() {
    let nodes = [node("a1", json!({})), node("a2", json!({})), node("b1", json!({}))];
    let not_near = "node(s) didn't match pod affinity rules";

    let near_db = with_affinity("new", "web", "podAffinity", term(ZONE, "db"));
    let empty = cluster(&nodes, &[]);
    assert_eq!(verdict(&empty, &near_db, "a1"), not_near);
    let with_db = cluster(&nodes, &[("a1", app("db", "db"))]);
    assert_eq!(verdict(&with_db, &near_db, "a2"), "");
    assert_eq!(verdict(&with_db, &near_db, "b1"), not_near);

    let near_itself = with_affinity("new", "web", "podAffinity", term(HOST, "web"));
    assert_eq!(verdict(&empty, &near_itself, "b1"), "");
    let with_web = cluster(&nodes, &[("a1", app("first", "web"))]);
    assert_eq!(verdict(&with_web, &near_itself, "b1"), not_near);
    assert_eq!(verdict(&with_web, &near_itself, "a1"), "");
}

#[test]
fn anti_affinity_holds_in_both_directions() {
    let nodes = [node("a1", json!({})), node("a2", json!({})), node("b1", json!({}))];
    let away_from_web = with_affinity("new", "db", "podAntiAffinity", term(ZONE, "web"));
    let with_web = cluster(&nodes, &[("a1", app("old", "web"))]);
    assert_eq!(
        verdict(&with_web, &away_from_web, "a2"),
        "node(s) didn't match pod anti-affinity rules"
    );
    assert_eq!(verdict(&with_web, &away_from_web, "b1"), "");

    let hermit = with_affinity("old", "db", "podAntiAffinity", term(HOST, "web"));
    let with_hermit = cluster(&nodes, &[("a1", hermit)]);
    let web = app("new", "web");
    assert_eq!(
        verdict(&with_hermit, &web, "a1"),
        "node(s) didn't satisfy existing pods anti-affinity rules"
    );
    assert_eq!(verdict(&with_hermit, &web, "a2"), "");
}

#[test]
fn affinity_terms_speak_of_the_namespaces_they_name() {
    let other = |name: &str| {
        pod(name, json!({ "metadata": { "namespace": "shop", "labels": { "app": "web" } } }))
    };
    let mut cluster = cluster(&[node("a", json!({}))], &[("a", other("old"))]);
    cluster.set_namespace("shop", Some([("team".to_owned(), "x".to_owned())].into()));
    for (over, speaks) in [
        (json!({}), false),
        (json!({ "namespaces": ["shop"] }), true),
        (json!({ "namespaceSelector": {} }), true),
        (json!({ "namespaceSelector": { "matchLabels": { "team": "x" } } }), true),
        (json!({ "namespaceSelector": { "matchLabels": { "team": "y" } } }), false),
    ] {
        let mut term = term(HOST, "web");
        crate::testing::merge(&mut term, over.clone());
        let pod = with_affinity("new", "db", "podAntiAffinity", term);
        assert_eq!(!verdict(&cluster, &pod, "a").is_empty(), speaks, "{over}");
    }
}

#[test]
fn match_label_keys_narrow_a_term_to_the_pods_own_revision() {
    let revision = |name: &str, hash: &str| {
        let mut term = term(HOST, "web");
        term["matchLabelKeys"] = json!(["hash"]);
        pod(
            name,
            json!({
                "metadata": { "labels": { "app": "web", "hash": hash } },
                "spec": { "affinity": { "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [term] } } },
            }),
        )
    };
    let cluster = cluster(&[node("a", json!({}))], &[("a", revision("old", "1"))]);
    assert_ne!(verdict(&cluster, &revision("same", "1"), "a"), "");
    assert_eq!(verdict(&cluster, &revision("next", "2"), "a"), "");
}

fn spread(over: Value) -> Arc<PodInfo> {
    let mut constraint = json!({
        "maxSkew": 1, "topologyKey": ZONE, "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": { "matchLabels": { "app": "web" } },
    });
    crate::testing::merge(&mut constraint, over);
    pod(
        "new",
        json!({ "metadata": { "labels": { "app": "web" } }, "spec": { "topologySpreadConstraints": [constraint] } }),
    )
}

#[test]
fn topology_spread_keeps_the_skew() {
    let bare = node("c1", json!({ "metadata": { "labels": null } }));
    let nodes = [node("a1", json!({})), node("a2", json!({})), node("b1", json!({})), bare];
    let cluster = cluster(&nodes, &[("a1", app("1", "web")), ("a2", app("2", "db"))]);
    let refused = "node(s) didn't match pod topology spread constraints";
    let pod = spread(json!({}));
    assert_eq!(verdict(&cluster, &pod, "a2"), refused);
    assert_eq!(verdict(&cluster, &pod, "b1"), "");
    assert_eq!(verdict(&cluster, &pod, "c1"), format!("{refused} (missing required label)"));
    assert_eq!(verdict(&cluster, &spread(json!({ "maxSkew": 2 })), "a2"), "");
    assert_eq!(
        verdict(&cluster, &spread(json!({ "whenUnsatisfiable": "ScheduleAnyway" })), "a2"),
        ""
    );
    // With fewer domains than asked for, the emptiest counts as 0.
    assert_eq!(verdict(&cluster, &spread(json!({ "minDomains": 3, "maxSkew": 1 })), "b1"), "");
}

#[test]
fn topology_spread_leaves_out_nodes_that_the_pod_cannot_use() {
    let tainted = json!({ "spec": { "taints": [{ "key": "k", "effect": "NoSchedule" }] } });
    let cluster =
        cluster(&[node("a1", json!({})), node("b1", tainted)], &[("a1", app("1", "web"))]);
    // Taints count only when asked for (nodeTaintsPolicy), so the empty tainted zone blocks.
    assert_ne!(verdict(&cluster, &spread(json!({})), "a1"), "");
    assert_eq!(verdict(&cluster, &spread(json!({ "nodeTaintsPolicy": "Honor" })), "a1"), "");
}
