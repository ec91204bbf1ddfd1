//! The pod's status as the API shows it: a pure function from what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;
use orch_api::k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodStatus,
};
use orch_cri::State;

use crate::api;
use crate::pod::observe::{Instance, Observed};
use crate::pod::plan::Waiting;

/// Exit code of a container that could not be started.
const START_ERROR_CODE: i32 = 128;

/// What the status tells that is not in the pod or the engine.
pub(crate) struct Facts<'a> {
    pub(crate) node_ips: &'a [IpAddr],
    /// Empty until the sandbox has its network.
    pub(crate) pod_ips: &'a [IpAddr],
    pub(crate) waiting: &'a BTreeMap<String, Waiting>,
    /// Containers whose startup probe passed, or that have none, by ID.
    pub(crate) started: &'a BTreeSet<String>,
    /// Containers whose readiness probe holds, or that have none, by ID.
    pub(crate) ready: &'a BTreeSet<String>,
    /// What ended containers left to say, by ID.
    pub(crate) messages: &'a BTreeMap<String, String>,
    /// Scheme of container IDs.
    pub(crate) engine: &'a str,
    /// Nothing will be started any more: the pod is being deleted, or is past its deadline.
    pub(crate) ending: bool,
    /// Fixed failure of the whole pod.
    pub(crate) failure: Option<(&'a str, &'a str)>,
    pub(crate) now: Timestamp,
}

/// The whole status. Conditions of others and times of unchanged ones are taken over from the pod's own.
pub(crate) fn status(pod: &Pod, observed: &Observed, facts: &Facts<'_>) -> PodStatus {
    let old = pod.status.clone().unwrap_or_default();
    let statuses =
        |containers: &mut dyn Iterator<Item = &Container>, init: bool| -> Vec<ContainerStatus> {
            containers
                .map(|container| container_status(pod, container, observed, facts, init))
                .collect()
        };
    let init = statuses(&mut api::init_containers(pod), true);
    let apps = statuses(&mut api::app_containers(pod), false);
    let debug: Vec<_> = api::ephemeral_containers(pod)
        .map(|container| container_status(pod, &container, observed, facts, false))
        .map(|status| ContainerStatus { ready: false, ..status })
        .collect();
    // A pod that reached its end stays there.
    let phase = match old.phase.as_deref() {
        Some(done @ ("Succeeded" | "Failed")) => done.to_owned(),
        _ if facts.failure.is_some() => "Failed".to_owned(),
        _ => phase(pod, &init, &apps, facts.ending).to_owned(),
    };
    let host = api::is_host_network(pod);
    let ips = if host && observed.sandbox().is_some() { facts.node_ips } else { facts.pod_ips };
    // Addresses stay visible when the sandbox of a finished pod is gone.
    let (pod_ip, pod_ips) =
        if ips.is_empty() && observed.running_sandbox().is_none() && is_done(&phase) {
            (old.pod_ip.clone(), old.pod_ips.clone())
        } else {
            (
                ips.first().map(IpAddr::to_string),
                (!ips.is_empty())
                    .then(|| ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
            )
        };
    let conditions = conditions(pod, observed, facts, &phase, &init, &apps);
    let has_init = !init.is_empty();
    PodStatus {
        conditions: Some(conditions),
        container_statuses: Some(apps),
        ephemeral_container_statuses: (!debug.is_empty()).then_some(debug),
        host_ip: facts.node_ips.first().map(IpAddr::to_string),
        host_ips: Some(facts.node_ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect()),
        init_container_statuses: has_init.then_some(init),
        observed_generation: pod.metadata.generation,
        phase: Some(phase),
        pod_ip,
        pod_ips,
        qos_class: Some(
            pod.spec.as_ref().map_or("BestEffort", orch_api::pod::qos_class).to_owned(),
        ),
        reason: facts.failure.map(|(reason, _)| reason.to_owned()).or(old.reason.clone()),
        message: facts.failure.map(|(_, message)| message.to_owned()).or(old.message.clone()),
        start_time: Some(old.start_time.clone().unwrap_or_else(|| api::time(facts.now))),
        ..old
    }
}

fn is_done(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}

/// As upstream's `getPhase`.
fn phase(
    pod: &Pod,
    init: &[ContainerStatus],
    apps: &[ContainerStatus],
    ending: bool,
) -> &'static str {
    let policy = if ending { "Never" } else { api::restart_policy(pod) };
    let mut pending_init = false;
    for (container, status) in api::init_containers(pod).zip(init) {
        if api::is_sidecar(container) {
            pending_init |= status.started != Some(true) && apps.iter().all(never_ran);
            continue;
        }
        match status.state.as_ref().and_then(|state| state.terminated.as_ref()) {
            Some(end) if end.exit_code == 0 => {}
            Some(_) if policy == "Never" => return "Failed",
            _ => pending_init = true,
        }
    }
    let (mut waiting, mut running, mut stopped, mut succeeded) = (0, 0, 0, 0);
    for status in apps {
        let state = status.state.clone().unwrap_or_default();
        if state.running.is_some() {
            running += 1;
        } else if let Some(end) = state.terminated.or_else(|| status.last_state.clone()?.terminated)
        {
            stopped += 1;
            succeeded += usize::from(end.exit_code == 0);
        } else {
            waiting += 1;
        }
    }
    if ending && running == 0 && (stopped > 0 || waiting > 0) {
        // What never started did not succeed.
        return if succeeded == stopped && waiting == 0 { "Succeeded" } else { "Failed" };
    }
    if (pending_init && running == 0 && stopped == 0) || waiting > 0 {
        return "Pending";
    }
    if running > 0 {
        return "Running";
    }
    match policy {
        "Always" if stopped > 0 => "Running",
        _ if stopped > 0 && stopped == succeeded => "Succeeded",
        "Never" if stopped > 0 => "Failed",
        "OnFailure" if stopped > 0 => "Running",
        _ => "Pending",
    }
}

fn never_ran(status: &ContainerStatus) -> bool {
    status.container_id.is_none()
}

fn container_status(
    pod: &Pod,
    container: &Container,
    observed: &Observed,
    facts: &Facts<'_>,
    init: bool,
) -> ContainerStatus {
    let instances = observed.containers.get(&container.name).map(Vec::as_slice).unwrap_or_default();
    let latest = instances.first();
    let waiting = facts.waiting.get(&container.name).filter(|_| !facts.ending);
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        ..ContainerStatus::default()
    };
    let mut last = instances.get(1).and_then(|instance| terminated(instance, facts));
    let state = match latest {
        None => waiting_state(waiting, default_wait(pod)),
        Some(instance) => {
            status.container_id = Some(format!("{}://{}", facts.engine, instance.id()));
            status.image_id = format!("{}://{}", facts.engine, instance.container.image_id);
            status.restart_count = i32::try_from(instance.attempt).unwrap_or(i32::MAX);
            match &instance.container.state {
                State::Created => waiting_state(waiting, "ContainerCreating"),
                State::Running => ContainerState {
                    running: Some(ContainerStateRunning {
                        started_at: api::parse_time(&instance.container.started_at).map(api::time),
                    }),
                    ..ContainerState::default()
                },
                State::Exited { .. } => {
                    let end = terminated(instance, facts);
                    if waiting.is_some() {
                        last = end;
                        waiting_state(waiting, "ContainerCreating")
                    } else {
                        ContainerState { terminated: end, ..ContainerState::default() }
                    }
                }
            }
        }
    };
    let running = latest.filter(|instance| instance.container.is_running());
    let started = running.is_some_and(|instance| facts.started.contains(instance.id()));
    status.started = Some(started);
    status.ready = if init && !api::is_sidecar(container) {
        state.terminated.as_ref().is_some_and(|end| end.exit_code == 0)
    } else {
        started && running.is_some_and(|instance| facts.ready.contains(instance.id()))
    };
    status.last_state = Some(
        last.map(|end| ContainerState { terminated: Some(end), ..ContainerState::default() })
            .unwrap_or_default(),
    );
    status.state = Some(state);
    status
}

fn default_wait(pod: &Pod) -> &'static str {
    if api::init_containers(pod).next().is_some() { "PodInitializing" } else { "ContainerCreating" }
}

fn waiting_state(waiting: Option<&Waiting>, default: &str) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(
                waiting.map_or_else(|| default.to_owned(), |waiting| waiting.reason.clone()),
            ),
            message: waiting
                .map(|waiting| waiting.message.clone())
                .filter(|message| !message.is_empty()),
        }),
        ..ContainerState::default()
    }
}

fn terminated(instance: &Instance, facts: &Facts<'_>) -> Option<ContainerStateTerminated> {
    let State::Exited { code, oom_killed, error } = &instance.container.state else { return None };
    let code = i32::try_from(*code).unwrap_or(255);
    let reason = match (code, oom_killed, error.is_empty()) {
        (_, _, false)
            if instance.container.started_at.is_empty()
                || is_zero(&instance.container.started_at) =>
        {
            "StartError"
        }
        (_, true, _) => "OOMKilled",
        (0, ..) => "Completed",
        _ => "Error",
    };
    // The runtime's word for it, whatever number the engine gives it (CRI, containerd).
    let code = if reason == "StartError" { START_ERROR_CODE } else { code };
    let message = facts.messages.get(instance.id()).filter(|text| !text.is_empty());
    Some(ContainerStateTerminated {
        container_id: Some(format!("{}://{}", facts.engine, instance.id())),
        exit_code: code,
        finished_at: api::parse_time(&instance.container.finished_at).map(api::time),
        started_at: api::parse_time(&instance.container.started_at).map(api::time),
        reason: Some(reason.to_owned()),
        message: message.cloned().or_else(|| Some(error.clone()).filter(|error| !error.is_empty())),
        signal: None,
    })
}

fn is_zero(time: &str) -> bool {
    api::parse_time(time).is_none()
}

fn conditions(
    pod: &Pod,
    observed: &Observed,
    facts: &Facts<'_>,
    phase: &str,
    init: &[ContainerStatus],
    apps: &[ContainerStatus],
) -> Vec<PodCondition> {
    let old = pod.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let done = is_done(phase);
    let names = |list: &mut dyn Iterator<Item = &ContainerStatus>| {
        list.map(|status| status.name.as_str()).collect::<Vec<_>>().join(" ")
    };
    let network = observed.running_sandbox().is_some()
        && (!facts.pod_ips.is_empty() || api::is_host_network(pod));
    let unfinished =
        names(&mut init.iter().zip(api::init_containers(pod)).filter_map(|(status, container)| {
            let fine = if api::is_sidecar(container) {
                status.started == Some(true)
            } else {
                status.ready
            };
            (!fine).then_some(status)
        }));
    let begun = apps.iter().any(|app| !never_ran(app));
    let initialized = unfinished.is_empty() || begun;
    let unready = names(&mut apps.iter().filter(|status| !status.ready));
    let containers_ready = if phase == "Succeeded" {
        Err(("PodCompleted", String::new()))
    } else if phase == "Failed" {
        Err(("PodFailed", String::new()))
    } else if !unready.is_empty() {
        Err(("ContainersNotReady", format!("containers with unready status: [{unready}]")))
    } else {
        Ok(())
    };
    let gates = pod.spec.as_ref().and_then(|spec| spec.readiness_gates.clone()).unwrap_or_default();
    let closed: Vec<_> = gates
        .iter()
        .filter(|gate| {
            !old.iter().any(|condition| condition.type_ == gate.condition_type && condition.status == "True")
        })
        .map(|gate| format!("corresponding condition of pod readiness gate \"{}\" does not exist or is not True.", gate.condition_type))
        .collect();
    let ready = match &containers_ready {
        Ok(()) if !closed.is_empty() => Err(("ReadinessGatesNotReady", closed.join(", "))),
        other => other.clone(),
    };
    let initialized = if initialized {
        if done && phase == "Succeeded" { Ok(Some("PodCompleted")) } else { Ok(None) }
    } else {
        Err((
            "ContainersNotInitialized",
            format!("containers with incomplete status: [{unfinished}]"),
        ))
    };
    type Verdict = Result<Option<&'static str>, (&'static str, String)>;
    let ours: [(&str, Verdict); 4] = [
        ("PodReadyToStartContainers", if network { Ok(None) } else { Err(("", String::new())) }),
        ("Initialized", initialized),
        ("Ready", ready.map(|()| None)),
        ("ContainersReady", containers_ready.map(|()| None)),
    ];
    let mut all = Vec::new();
    for (kind, verdict) in ours {
        let (status, reason, message) = match verdict {
            Ok(reason) => ("True", reason.unwrap_or_default(), String::new()),
            Err((reason, message)) => ("False", reason, message),
        };
        let before = old.iter().find(|condition| condition.type_ == kind);
        let unchanged = before.filter(|condition| condition.status == status);
        all.push(PodCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()).filter(|reason| !reason.is_empty()),
            message: Some(message).filter(|message| !message.is_empty()),
            last_transition_time: unchanged
                .and_then(|condition| condition.last_transition_time.clone())
                .or_else(|| Some(api::time(facts.now))),
            last_probe_time: None,
            observed_generation: pod.metadata.generation,
        });
    }
    let foreign = old.into_iter().filter(|condition| {
        !matches!(
            condition.type_.as_str(),
            "PodReadyToStartContainers" | "Initialized" | "Ready" | "ContainersReady"
        )
    });
    all.extend(foreign);
    all
}

#[cfg(test)]
#[path = "status/tests.rs"]
mod tests;
