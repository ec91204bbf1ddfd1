use orch_cri::Container as Found;
use serde_json::{Value, json};

use super::*;
use crate::api::PodRef;
use crate::labels;

fn pod(spec: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": { "name": "web", "namespace": "shop", "uid": "u1", "generation": 3 },
        "spec": spec,
        "status": { "conditions": [{ "type": "PodScheduled", "status": "True" }] },
    }))
    .expect("a pod")
}

fn found(pod: &Pod, name: &str, attempt: u32, state: State) -> Found {
    Found {
        id: format!("{name}-{attempt}"),
        labels: labels::labels(&PodRef::of(pod), name, attempt),
        state,
        pid: 0,
        created_nanos: 0,
        started_at: "2026-01-01T00:00:01.5Z".to_owned(),
        finished_at: "2026-01-01T00:00:02Z".to_owned(),
        image_id: "sha256:1".to_owned(),
        tty: false,
        stop_signal: String::new(),
    }
}

fn exited(code: i64) -> State {
    State::Exited { code, oom_killed: false, error: String::new() }
}

fn look(
    pod: &Pod,
    found: Vec<Found>,
    waiting: &[(&str, &str)],
    healthy: &[&str],
    ending: bool,
) -> PodStatus {
    let ids: BTreeSet<String> = healthy.iter().map(|&id| id.to_owned()).collect();
    let waiting = waiting
        .iter()
        .map(|(name, reason)| {
            ((*name).to_owned(), Waiting { reason: (*reason).to_owned(), message: String::new() })
        })
        .collect();
    let facts = Facts {
        node_ips: &["192.168.0.1".parse().expect("an address")],
        pod_ips: &["10.244.1.2".parse().expect("an address")],
        waiting: &waiting,
        started: &ids,
        ready: &ids,
        messages: &BTreeMap::new(),
        engine: "docker",
        ending,
        failure: None,
        now: "2026-01-01T00:01:00Z".parse().expect("a time"),
    };
    status(pod, &Observed::from_containers(found), &facts)
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a PodCondition {
    status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == kind)
        .expect("the condition")
}

#[test]
fn a_healthy_pod_is_running_and_ready() {
    let pod = pod(json!({ "containers": [{ "name": "a" }] }));
    let all = vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 2, State::Running)];
    let status = look(&pod, all, &[], &["a-2"], false);
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.pod_ip.as_deref(), Some("10.244.1.2"));
    assert_eq!(status.observed_generation, Some(3));
    for kind in
        ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"]
    {
        assert_eq!(condition(&status, kind).status, "True", "{kind}");
    }
    let container = &status.container_statuses.as_ref().expect("statuses")[0];
    assert_eq!(
        (container.restart_count, container.ready, container.started),
        (2, true, Some(true))
    );
    assert_eq!(container.container_id.as_deref(), Some("docker://a-2"));
}

#[test]
fn an_unready_container_is_named() {
    let pod = pod(json!({ "containers": [{ "name": "a" }] }));
    let all = vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 0, State::Running)];
    let status = look(&pod, all, &[], &[], false);
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(
        condition(&status, "Ready").message.as_deref(),
        Some("containers with unready status: [a]")
    );
}

#[test]
fn a_waiting_crash_shows_its_last_end() {
    let pod = pod(json!({ "containers": [{ "name": "a" }] }));
    let all = vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 1, exited(3))];
    let status = look(&pod, all, &[("a", "CrashLoopBackOff")], &[], false);
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let container = &status.container_statuses.as_ref().expect("statuses")[0];
    let waiting =
        container.state.as_ref().and_then(|state| state.waiting.as_ref()).expect("waiting");
    assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
    let last =
        container.last_state.as_ref().and_then(|state| state.terminated.as_ref()).expect("an end");
    assert_eq!((last.exit_code, last.reason.as_deref()), (3, Some("Error")));
}

#[test]
fn phases_by_policy_and_exit_code() {
    for (policy, code, ending, phase) in [
        ("Never", 0, false, "Succeeded"),
        ("Never", 1, false, "Failed"),
        ("OnFailure", 0, false, "Succeeded"),
        ("OnFailure", 1, false, "Running"),
        ("Always", 0, false, "Running"),
        ("Always", 0, true, "Succeeded"),
        ("Always", 137, true, "Failed"),
    ] {
        let pod = pod(json!({ "restartPolicy": policy, "containers": [{ "name": "a" }] }));
        let status = look(&pod, vec![found(&pod, "a", 0, exited(code))], &[], &[], ending);
        assert_eq!(status.phase.as_deref(), Some(phase), "{policy} {code} ending: {ending}");
    }
}

#[test]
fn a_new_pod_is_pending_with_its_reason() {
    let pod = pod(json!({ "containers": [{ "name": "a" }, { "name": "b" }] }));
    let status = look(&pod, Vec::new(), &[("a", "ErrImagePull")], &[], false);
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    let reasons: Vec<_> = status
        .container_statuses
        .iter()
        .flatten()
        .filter_map(|container| container.state.as_ref()?.waiting.as_ref()?.reason.as_deref())
        .collect();
    assert_eq!(reasons, ["ErrImagePull", "ContainerCreating"]);
}

#[test]
fn a_second_look_changes_nothing() {
    let mut pod = pod(json!({ "containers": [{ "name": "a" }] }));
    let all = vec![found(&pod, "POD", 0, State::Running), found(&pod, "a", 0, State::Running)];
    let first = look(&pod, all.clone(), &[], &["a-0"], false);
    pod.status = Some(first.clone());
    assert_eq!(look(&pod, all, &[], &["a-0"], false), first);
}
