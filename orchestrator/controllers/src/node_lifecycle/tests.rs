use serde_json::{Value, json};

use super::evict::{Step, Zone, plan, zone};
use super::health::{desired_taints, not_ready_status, unknown_status};
use super::*;

fn node(ready: &str, taints: Value) -> Node {
    serde_json::from_value(json!({
        "metadata": { "name": "n" }, "spec": { "taints": taints },
        "status": { "conditions": [{ "type": "Ready", "status": ready }] },
    }))
    .expect("a Node")
}

fn pod(tolerations: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": { "name": "p" }, "spec": { "containers": [], "tolerations": tolerations },
        "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] },
    }))
    .expect("a Pod")
}

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().expect("a time")
}

fn later(seconds: i64) -> Timestamp {
    now() + jiff::SignedDuration::from_secs(seconds)
}

#[test]
fn a_silent_node_becomes_unknown_once() {
    let mut node = node("True", json!([]));
    node.status = unknown_status(&node, now());
    let ready = node::condition(&node, "Ready").expect("Ready");
    assert_eq!(
        (ready.status.as_str(), ready.reason.as_deref()),
        ("Unknown", Some("NodeStatusUnknown"))
    );
    let pressure = node::condition(&node, "DiskPressure").expect("DiskPressure");
    assert_eq!(pressure.reason.as_deref(), Some("NodeStatusNeverUpdated"));
    assert_eq!(unknown_status(&node, later(1)), None);
}

#[test]
fn taints_follow_the_condition_and_leave_others_alone() {
    let own = json!([{ "key": "mine", "effect": "NoExecute" }]);
    let keys = |taints: Option<Vec<k8s_openapi::api::core::v1::Taint>>| {
        taints.map(|taints| {
            taints.iter().map(|one| format!("{}:{}", one.key, one.effect)).collect::<Vec<_>>()
        })
    };
    let mut lost = node("Unknown", own.clone());
    let taints = desired_taints(&lost, Driving::Begin, now());
    let expected = [
        "mine:NoExecute",
        "node.kubernetes.io/unreachable:NoSchedule",
        "node.kubernetes.io/unreachable:NoExecute",
    ];
    assert_eq!(keys(taints.clone()), Some(expected.map(str::to_owned).to_vec()));
    lost.spec.get_or_insert_default().taints = taints;
    assert_eq!(
        desired_taints(&lost, Driving::Begin, later(9)),
        None,
        "the time of the first stays"
    );
    lost.status = node("True", json!([])).status;
    assert_eq!(
        keys(desired_taints(&lost, Driving::Begin, now())),
        Some(vec!["mine:NoExecute".to_owned()])
    );
    assert_eq!(
        keys(desired_taints(&node("False", json!([])), Driving::Begin, now())).map(|all| all.len()),
        Some(2)
    );
}

#[test]
fn a_cordoned_node_is_tainted() {
    let mut cordoned = node("True", json!([]));
    cordoned.spec.get_or_insert_default().unschedulable = Some(true);
    let taints = desired_taints(&cordoned, Driving::Begin, now()).expect("a taint");
    assert_eq!(
        (taints[0].key.as_str(), taints[0].effect.as_str()),
        ("node.kubernetes.io/unschedulable", "NoSchedule")
    );
}

#[test]
fn tolerations_decide_when_a_pod_goes() {
    let lost = node(
        "Unknown",
        json!([
            { "key": "node.kubernetes.io/unreachable", "effect": "NoSchedule" },
            { "key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z" },
        ]),
    );
    let default = json!([{ "key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
                           "tolerationSeconds": 300 }]);
    let own = json!([{ "key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 60 }]);
    let forever = json!([{ "operator": "Exists" }]);
    let fast = Some(Duration::from_secs(4));
    for (tolerations, default_wait, at, expected) in [
        (json!([]), None, 0, Step::Evict),
        (default.clone(), None, 0, Step::Later(Duration::from_secs(300))),
        (default.clone(), None, 300, Step::Evict),
        (default.clone(), fast, 1, Step::Later(Duration::from_secs(3))),
        (default, fast, 4, Step::Evict),
        // Somebody's own wish counts.
        (own, fast, 4, Step::Later(Duration::from_secs(56))),
        (forever, fast, 1000, Step::Stay),
    ] {
        assert_eq!(
            plan(&lost, &pod(tolerations.clone()), default_wait, later(at)),
            expected,
            "{tolerations}"
        );
    }
    assert_eq!(plan(&node("True", json!([])), &pod(json!([])), None, now()), Step::Stay);
}

#[test]
fn nothing_moves_when_nearly_all_nodes_are_lost() {
    let nodes = |ready: usize, lost: usize| {
        let ready = (0..ready).map(|_| Arc::new(node("True", json!([]))));
        let lost = (0..lost).map(|_| Arc::new(node("Unknown", json!([]))));
        ready.chain(lost).collect::<Vec<_>>()
    };
    for (ready, lost, expected) in [
        (2, 1, Zone::Normal),
        (1, 1, Zone::Normal),
        (1, 2, Zone::Normal),
        (0, 0, Zone::Normal),
        (0, 1, Zone::Full),
        (0, 3, Zone::Full),
        (1, 3, Zone::Partial),
        (3, 3, Zone::Normal),
    ] {
        assert_eq!(zone(&nodes(ready, lost), |_| false), expected, "{ready} ready, {lost} lost");
    }
    assert_eq!(zone(&nodes(2, 0), |_| true), Zone::Full, "told by their silence alone");
}

#[test]
fn when_no_node_is_alive_pods_are_not_driven_out_and_their_time_begins_anew() {
    let lost = node(
        "Unknown",
        json!([
            { "key": "node.kubernetes.io/unreachable", "effect": "NoSchedule" },
            { "key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z" },
        ]),
    );
    let effects = |driving| {
        desired_taints(&lost, driving, later(9))
            .map(|taints| taints.iter().map(|one| one.effect.clone()).collect::<Vec<_>>().join(","))
    };
    assert_eq!(effects(Driving::Stop).as_deref(), Some("NoSchedule"));
    assert_eq!(effects(Driving::Continue), None, "what has begun goes on");
    let fresh = node("Unknown", json!([]));
    let begun = desired_taints(&fresh, Driving::Continue, now()).expect("a taint");
    assert_eq!(begun.len(), 1, "nothing new begins");

    let grace = Duration::from_secs(8);
    let start = Instant::now();
    let mut disruption = Disruption::default();
    let mut at = |zone, seconds| disruption.see(zone, start + Duration::from_secs(seconds), grace);
    assert_eq!(at(Zone::Normal, 0), (Driving::Begin, None));
    assert_eq!(at(Zone::Partial, 0), (Driving::Continue, None));
    assert_eq!(at(Zone::Full, 0), (Driving::Stop, None));
    assert_eq!(at(Zone::Normal, 60), (Driving::Continue, Some(grace)), "the first is back");
    assert_eq!(at(Zone::Normal, 65), (Driving::Continue, Some(Duration::from_secs(3))));
    assert_eq!(at(Zone::Normal, 68), (Driving::Begin, None));
}

#[test]
fn pods_of_a_silent_node_are_not_ready() {
    let mut silent = pod(json!([]));
    silent.status = not_ready_status(&silent, now());
    assert!(!pod::is_ready(&silent));
    assert_eq!(not_ready_status(&silent, now()), None);
}
