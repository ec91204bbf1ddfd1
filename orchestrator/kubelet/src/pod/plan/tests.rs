use orch_cri::Container as Found;
use serde_json::{Value, json};

use super::*;

fn pod(spec: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": { "name": "web", "namespace": "shop", "uid": "u1" },
        "spec": spec,
    }))
    .expect("a pod")
}

fn web() -> Pod {
    pod(json!({ "containers": [{ "name": "a", "image": "web:1" }] }))
}

fn now() -> Timestamp {
    "2026-01-01T01:00:00Z".parse().expect("a time")
}

/// A container of the engine, made from the pod's own definition.
fn found(pod: &Pod, name: &str, attempt: u32, state: State) -> Found {
    let mut labels = crate::labels::labels(&PodRef::of(pod), name, attempt);
    labels.insert(labels::SANDBOX_ID.to_owned(), "POD-0".to_owned());
    if let Some(container) = api::all_containers(pod).find(|container| container.name == name) {
        labels.insert(labels::SPEC_HASH.to_owned(), spec_hash(container));
    }
    Found {
        id: format!("{name}-{attempt}"),
        labels,
        state,
        pid: 0,
        created_nanos: i64::from(attempt),
        started_at: String::new(),
        finished_at: now().to_string(),
        image_id: String::new(),
        tty: false,
        stop_signal: String::new(),
    }
}

fn exited(code: i64) -> State {
    State::Exited { code, oom_killed: false, error: String::new() }
}

#[derive(Default)]
struct World {
    unhealthy: BTreeMap<String, Unhealthy>,
    started: BTreeSet<String>,
    busy: BTreeSet<String>,
    backoff: Backoff,
}

impl World {
    fn plan(&self, pod: &Pod, found: Vec<Found>) -> Plan {
        let known = Knowledge {
            network_ready: true,
            unhealthy: &self.unhealthy,
            started: &self.started,
            busy: &self.busy,
            backoff: &self.backoff,
            now: now(),
        };
        plan(pod, &Observed::from_containers(found), &known)
    }
}

fn start(name: &str, attempt: u32) -> Start {
    Start { name: name.to_owned(), attempt }
}

#[test]
fn a_new_pod_gets_a_sandbox_and_its_containers() {
    let plan = World::default().plan(&web(), Vec::new());
    assert_eq!((plan.sandbox, plan.start), (Some(0), vec![start("a", 0)]));
}

#[test]
fn a_running_pod_needs_nothing_even_if_the_agent_is_new() {
    let pod = web();
    let found = vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 3, State::Running)];
    assert!(World::default().plan(&pod, found).is_empty());
}

#[test]
fn a_dead_sandbox_first_ends_its_containers_and_is_then_replaced() {
    let pod = web();
    let sandbox = found(&pod, "POD", 0, exited(137));
    let plan =
        World::default().plan(&pod, vec![sandbox.clone(), found(&pod, "a", 0, State::Running)]);
    assert_eq!(plan.kill.iter().map(|kill| kill.id.as_str()).collect::<Vec<_>>(), ["a-0"]);
    assert_eq!(plan.sandbox, None);
    let plan = World::default().plan(&pod, vec![sandbox, found(&pod, "a", 0, exited(137))]);
    assert_eq!((plan.sandbox, plan.start), (Some(1), vec![start("a", 1)]));
    assert_eq!(plan.remove, ["POD-0"]);
}

#[test]
fn what_ended_for_good_stays_ended() {
    for (policy, code, restarts) in [
        ("Always", 0, true),
        ("Always", 1, true),
        ("OnFailure", 0, false),
        ("OnFailure", 1, true),
        ("Never", 0, false),
        ("Never", 1, false),
    ] {
        let pod = pod(json!({ "restartPolicy": policy, "containers": [{ "name": "a" }] }));
        let sandbox = found(&pod, "POD", 0, State::Running);
        let plan = World::default().plan(&pod, vec![sandbox, found(&pod, "a", 0, exited(code))]);
        assert_eq!(!plan.is_empty(), restarts, "{policy} after {code}");
        let plan = World::default().plan(&pod, vec![found(&pod, "a", 0, exited(code))]);
        assert_eq!(plan.sandbox.is_some(), restarts, "{policy} after {code}, sandbox gone");
    }
}

#[test]
fn a_crash_loop_waits_and_says_so() {
    let pod = web();
    let mut world = World::default();
    world.backoff.next("a", now());
    let plan = world
        .plan(&pod, vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 1, exited(1))]);
    assert!(plan.is_empty());
    assert_eq!(plan.wake, Some(Duration::from_secs(10)));
    assert_eq!(
        plan.waiting["a"],
        Waiting {
            reason: "CrashLoopBackOff".to_owned(),
            message: "back-off 10s restarting failed container=a pod=web_shop(u1)".to_owned(),
        }
    );
}

#[test]
fn init_containers_run_one_after_the_other() {
    let pod = pod(json!({
        "initContainers": [{ "name": "one" }, { "name": "two" }],
        "containers": [{ "name": "a" }],
    }));
    let world = World::default();
    let sandbox = found(&pod, "POD", 0, State::Running);
    assert_eq!(world.plan(&pod, Vec::new()).start, [start("one", 0)]);
    let one = found(&pod, "one", 0, State::Running);
    let plan = world.plan(&pod, vec![sandbox.clone(), one]);
    assert!(plan.is_empty());
    assert_eq!(plan.waiting["a"].reason, "PodInitializing");
    let one = found(&pod, "one", 0, exited(0));
    assert_eq!(world.plan(&pod, vec![sandbox.clone(), one.clone()]).start, [start("two", 0)]);
    let two = found(&pod, "two", 0, exited(0));
    assert_eq!(world.plan(&pod, vec![sandbox, one, two]).start, [start("a", 0)]);
}

#[test]
fn a_failed_init_container_ends_a_pod_that_never_restarts() {
    let pod = pod(json!({
        "restartPolicy": "Never",
        "initContainers": [{ "name": "one" }],
        "containers": [{ "name": "a" }],
    }));
    let one = found(&pod, "one", 0, exited(2));
    assert!(
        World::default()
            .plan(&pod, vec![found(&pod, "POD", 0, State::Running), one.clone()])
            .is_empty()
    );
    assert!(World::default().plan(&pod, vec![one]).is_empty());
}

#[test]
fn a_sidecar_holds_the_others_back_until_it_has_started() {
    let pod = pod(json!({
        "initContainers": [{ "name": "proxy", "restartPolicy": "Always" }],
        "containers": [{ "name": "a" }],
    }));
    let mut world = World::default();
    let all = vec![found(&pod, "POD", 0, State::Running), found(&pod, "proxy", 0, State::Running)];
    assert!(world.plan(&pod, all.clone()).is_empty());
    world.started.insert("proxy-0".to_owned());
    assert_eq!(world.plan(&pod, all).start, [start("a", 0)]);
}

#[test]
fn an_unhealthy_container_is_killed_once() {
    let pod = web();
    let mut world = World::default();
    let why = "failed liveness probe".to_owned();
    world.unhealthy.insert("a-0".to_owned(), Unhealthy { why, grace_seconds: Some(5) });
    let all = vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 0, State::Running)];
    let kill = world.plan(&pod, all.clone()).kill;
    assert_eq!(kill.iter().map(|kill| kill.grace_seconds).collect::<Vec<_>>(), [Some(5)]);
    world.busy.insert("a-0".to_owned());
    assert!(world.plan(&pod, all).is_empty());
}

#[test]
fn a_new_image_replaces_the_container() {
    let old = web();
    let pod = pod(json!({ "containers": [{ "name": "a", "image": "web:2" }] }));
    let all = vec![found(&pod, "POD", 0, State::Running), found(&old, "a", 0, State::Running)];
    assert_eq!(World::default().plan(&pod, all).kill.len(), 1);
}

#[test]
fn a_container_that_was_made_but_never_started_is_made_anew() {
    let pod = web();
    let all = vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 2, State::Created)];
    let plan = World::default().plan(&pod, all);
    assert_eq!((plan.remove, plan.start), (vec!["a-2".to_owned()], vec![start("a", 2)]));
}

#[test]
fn only_the_last_two_instances_are_kept() {
    let pod = web();
    let mut all = vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 3, State::Running)];
    all.extend((0..3).map(|attempt| found(&pod, "a", attempt, exited(1))));
    let mut plan = World::default().plan(&pod, all);
    plan.remove.sort();
    assert_eq!(plan.remove, ["a-0", "a-1"]);
}

#[test]
fn a_container_for_debugging_starts_beside_the_others_and_never_again() {
    let pod = pod(json!({ "containers": [{ "name": "a" }],
                          "ephemeralContainers": [{ "name": "debug", "targetContainerName": "a" }] }));
    let mut all = vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 0, State::Running)];
    assert_eq!(World::default().plan(&pod, all.clone()).start, [start("debug", 0)]);
    all.push(found(&pod, "debug", 0, State::Running));
    assert!(World::default().plan(&pod, all.clone()).is_empty());
    all.pop();
    all.push(found(&pod, "debug", 0, exited(1)));
    assert!(World::default().plan(&pod, all).is_empty());
}
