use serde_json::{Value, json};

use super::*;
use crate::testing::{merge, node, raw_pod, requesting};

fn state(nodes: &[&str]) -> State {
    let mut state = State::new("default-scheduler", 1);
    for name in nodes {
        state.node_changed(None, Some(&node(name, json!({}))));
    }
    state
}

fn on(name: &str, host: &str, mut over: Value) -> Arc<Pod> {
    merge(&mut over, json!({ "spec": { "nodeName": host } }));
    raw_pod(name, over)
}

/// Runs all turns that are due; the nodes chosen, and the messages.
fn turns(state: &mut State) -> Vec<(String, Result<String, String>)> {
    let now = Instant::now();
    std::iter::from_fn(|| state.attempt(now))
        .map(|attempt| match attempt {
            Attempt::Bind { pod, node } => (pod.name().to_owned(), Ok(node)),
            Attempt::Unschedulable { pod, why } => (pod.name().to_owned(), Err(why.to_string())),
        })
        .collect()
}

fn names(turns: &[(String, Result<String, String>)]) -> Vec<&str> {
    turns.iter().map(|(name, _)| name.as_str()).collect()
}

fn cpu(amount: &str) -> Value {
    requesting(json!({ "cpu": amount }))
}

#[tokio::test(start_paused = true)]
async fn an_assumed_pod_takes_its_place_at_once() {
    let mut state = state(&["a"]);
    state.pod_changed(None, Some(&raw_pod("1", cpu("3"))));
    state.pod_changed(None, Some(&raw_pod("2", cpu("3"))));
    let turns = turns(&mut state);
    assert_eq!(turns[0], ("1".to_owned(), Ok("a".to_owned())));
    assert_eq!(turns[1].1, Err("0/1 nodes are available: 1 Insufficient cpu.".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_failed_binding_gives_the_place_back_and_another_pod_takes_it() {
    let mut state = state(&["a"]);
    state.pod_changed(None, Some(&raw_pod("1", cpu("3"))));
    let Some(Attempt::Bind { pod, .. }) = state.attempt(Instant::now()) else { panic!("it fits") };
    state.pod_changed(None, Some(&raw_pod("2", cpu("3"))));
    assert!(turns(&mut state)[0].1.is_err());
    state.bind_failed(&pod, Instant::now());
    assert_eq!(turns(&mut state), [("2".to_owned(), Ok("a".to_owned()))]);
    tokio::time::advance(std::time::Duration::from_secs(1)).await;
    assert_eq!(names(&turns(&mut state)), ["1"], "after its back-off");
}

#[tokio::test(start_paused = true)]
async fn a_binding_that_was_lost_but_took_place_is_not_done_again() {
    let mut state = state(&["a", "b"]);
    let waiting = raw_pod("1", cpu("3"));
    state.pod_changed(None, Some(&waiting));
    let Some(Attempt::Bind { pod, node }) = state.attempt(Instant::now()) else {
        panic!("it fits")
    };
    state.bind_failed(&pod, Instant::now());
    state.pod_changed(Some(&waiting), Some(&on("1", &node, cpu("3"))));
    tokio::time::advance(std::time::Duration::from_secs(60)).await;
    assert!(turns(&mut state).is_empty() && state.queue().is_empty());
    assert_eq!(state.cluster().node(&node).expect("the node").requested.cpu_milli, 3000);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_leaves_wakes_those_that_waited_for_its_room() {
    let mut state = state(&["a"]);
    let old = on("old", "a", cpu("3"));
    state.pod_changed(None, Some(&old));
    state.pod_changed(None, Some(&raw_pod("new", cpu("3"))));
    state.pod_changed(None, Some(&raw_pod("giant", cpu("30"))));
    assert_eq!(turns(&mut state).len(), 2);
    state.pod_changed(Some(&old), None);
    assert_eq!(turns(&mut state), [("new".to_owned(), Ok("a".to_owned()))], "the giant sleeps on");
}

#[tokio::test(start_paused = true)]
async fn a_finished_pod_gives_its_room_back() {
    let mut state = state(&["a"]);
    let job = on("job", "a", cpu("3"));
    state.pod_changed(None, Some(&job));
    state.pod_changed(None, Some(&raw_pod("new", cpu("3"))));
    assert!(turns(&mut state)[0].1.is_err());
    let mut over = cpu("3");
    merge(&mut over, json!({ "status": { "phase": "Succeeded" } }));
    state.pod_changed(Some(&job), Some(&on("job", "a", over)));
    assert_eq!(names(&turns(&mut state)), ["new"]);
}

#[tokio::test(start_paused = true)]
async fn node_changes_wake_only_pods_that_fit_there_now_and_heartbeats_none() {
    let mut state = state(&[]);
    state.pod_changed(
        None,
        Some(&raw_pod("1", json!({ "spec": { "nodeSelector": { "disk": "ssd" } } }))),
    );
    assert_eq!(turns(&mut state)[0].1, Err("no nodes available to schedule pods".to_owned()));
    let plain = node("a", json!({}));
    state.node_changed(None, Some(&plain));
    assert!(turns(&mut state).is_empty());
    let beat =
        node("a", json!({ "status": { "conditions": [{ "type": "Ready", "status": "True" }] } }));
    state.node_changed(Some(&plain), Some(&beat));
    assert!(turns(&mut state).is_empty());
    let labelled = node("a", json!({ "metadata": { "labels": { "disk": "ssd" } } }));
    state.node_changed(Some(&beat), Some(&labelled));
    assert_eq!(turns(&mut state), [("1".to_owned(), Ok("a".to_owned()))]);
}

#[tokio::test(start_paused = true)]
async fn an_affinity_that_comes_true_wakes_the_pod_even_before_the_other_is_bound() {
    let mut state = state(&["a"]);
    let near = json!({ "spec": { "affinity": { "podAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [
        { "topologyKey": "kubernetes.io/hostname", "labelSelector": { "matchLabels": { "app": "db" } } }] } } } });
    state.pod_changed(None, Some(&raw_pod("web", near)));
    assert!(turns(&mut state)[0].1.is_err());
    state.pod_changed(
        None,
        Some(&raw_pod("db", json!({ "metadata": { "labels": { "app": "db" } } }))),
    );
    assert_eq!(names(&turns(&mut state)), ["db", "web"]);
}

#[tokio::test(start_paused = true)]
async fn an_anti_affinity_that_ends_wakes_the_pod() {
    let mut state = state(&["a"]);
    let hermit = json!({ "spec": { "affinity": { "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [
        { "topologyKey": "kubernetes.io/hostname", "labelSelector": {} }] } } } });
    let old = on("old", "a", hermit);
    state.pod_changed(None, Some(&old));
    state.pod_changed(None, Some(&raw_pod("new", json!({}))));
    assert!(turns(&mut state)[0].1.is_err());
    state.pod_changed(Some(&old), None);
    assert_eq!(names(&turns(&mut state)), ["new"]);
}

#[tokio::test(start_paused = true)]
async fn pods_of_other_schedulers_and_terminating_ones_are_left_alone() {
    let mut state = state(&["a"]);
    state.pod_changed(None, Some(&raw_pod("1", json!({ "spec": { "schedulerName": "mine" } }))));
    let terminating = json!({ "metadata": { "deletionTimestamp": "2026-01-01T00:00:00Z" } });
    state.pod_changed(None, Some(&raw_pod("2", terminating)));
    assert!(turns(&mut state).is_empty() && state.queue().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_pod_made_anew_under_its_name_is_another_pod() {
    let mut state = state(&["a"]);
    let old = on("web-0", "a", cpu("3"));
    state.pod_changed(None, Some(&old));
    let mut over = cpu("3");
    merge(&mut over, json!({ "metadata": { "uid": "second" } }));
    state.pod_changed(Some(&old), Some(&raw_pod("web-0", over)));
    assert_eq!(turns(&mut state), [("web-0".to_owned(), Ok("a".to_owned()))]);
}
