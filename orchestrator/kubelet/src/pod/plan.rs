//! What to do next for a pod: a pure function from what is there and what is wanted.
//!
//! The rules are the kubelet's: a dead sandbox is replaced with all that was in it, init containers run one after
//! the other, restart policy and back-off decide about what ended.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use orch_api::k8s_openapi::api::core::v1::{Container, Pod};
use orch_cri::State;

use crate::api::{self, PodRef};
use crate::labels;
use crate::pod::backoff::Backoff;
use crate::pod::container::spec_hash;
use crate::pod::observe::{Instance, Observed};

/// Why a container waits, as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// A running container that has to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kill {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) why: String,
    /// Seconds it gets, where that is not the pod's own number.
    pub(crate) grace_seconds: Option<i64>,
}

/// Why a running container has to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unhealthy {
    pub(crate) why: String,
    /// The probe's `terminationGracePeriodSeconds`.
    pub(crate) grace_seconds: Option<i64>,
}

/// A container to make and start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) name: String,
    pub(crate) attempt: u32,
}

/// What to do now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) kill: Vec<Kill>,
    /// Containers that never ran, or that newer attempts made useless.
    pub(crate) remove: Vec<String>,
    /// The attempt of a sandbox to make, after everything else of the pod has ended.
    pub(crate) sandbox: Option<u32>,
    pub(crate) start: Vec<Start>,
    pub(crate) waiting: BTreeMap<String, Waiting>,
    /// When to look again although nothing happened.
    pub(crate) wake: Option<Duration>,
}

impl Plan {
    /// Nothing is to be done now.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.kill.is_empty()
            && self.remove.is_empty()
            && self.sandbox.is_none()
            && self.start.is_empty()
    }

    fn wake_in(&mut self, delay: Duration) {
        self.wake = Some(self.wake.map_or(delay, |earlier| earlier.min(delay)));
    }
}

/// What is known beyond the pod and the engine.
pub(crate) struct Knowledge<'a> {
    /// The newest sandbox has its network.
    pub(crate) network_ready: bool,
    /// Containers that a probe or a hook wants ended, by ID.
    pub(crate) unhealthy: &'a BTreeMap<String, Unhealthy>,
    /// Containers whose startup probe passed, or that have none, by ID.
    pub(crate) started: &'a BTreeSet<String>,
    /// Containers that are being ended just now.
    pub(crate) busy: &'a BTreeSet<String>,
    pub(crate) backoff: &'a Backoff,
    pub(crate) now: Timestamp,
}

/// Dead instances of a container that are kept: the last one is `lastState`, and its log is `--previous`.
const KEPT_INSTANCES: usize = 2;

/// The next steps for a pod that is to run.
pub(crate) fn plan(pod: &Pod, observed: &Observed, known: &Knowledge<'_>) -> Plan {
    let mut plan = Plan::default();
    for instances in observed.containers.values() {
        let useless =
            instances.iter().skip(KEPT_INSTANCES).filter(|old| !old.container.is_running());
        plan.remove.extend(useless.map(|old| old.id().to_owned()));
    }
    plan.remove.extend(observed.sandboxes.iter().skip(1).map(|old| old.id().to_owned()));

    let Some(sandbox) = observed.running_sandbox().filter(|_| known.network_ready) else {
        return replace_sandbox(pod, observed, known, plan);
    };
    let sandbox = sandbox.id();
    let initialized = match plan_init(pod, observed, known, sandbox, &mut plan) {
        Init::Done => true,
        Init::Waiting => false,
        Init::Failed => {
            for instance in observed.instances().filter(|instance| instance.container.is_running())
            {
                kill(&mut plan, known, instance, "the pod's init container failed".to_owned());
            }
            return plan;
        }
    };
    for container in api::app_containers(pod) {
        if initialized {
            let latest = observed.latest(&container.name);
            plan_container(pod, container, latest, known, &mut plan);
        } else {
            let reason = "PodInitializing".to_owned();
            plan.waiting.insert(container.name.clone(), Waiting { reason, message: String::new() });
        }
    }
    for container in api::ephemeral_containers(pod) {
        let latest = observed.latest(&container.name);
        let ended =
            latest.is_some_and(|found| matches!(found.container.state, State::Exited { .. }));
        if !ended {
            start_or_wait(pod, &container, latest, false, known, &mut plan);
        }
    }
    plan
}

/// There is no sandbox to run in: end what is left of the old one and make a new one, unless the pod is done.
fn replace_sandbox(pod: &Pod, observed: &Observed, known: &Knowledge<'_>, mut plan: Plan) -> Plan {
    for instance in observed.instances().filter(|instance| instance.container.is_running()) {
        kill(&mut plan, known, instance, "its sandbox ended".to_owned());
    }
    if observed.instances().any(|instance| instance.container.is_running()) {
        return plan;
    }
    if !wants_to_run(pod, observed) {
        return plan;
    }
    let attempt = observed.sandbox().map_or(0, |old| old.attempt + 1);
    // What was made for a sandbox that never worked.
    let unused = observed.instances().filter(|instance| instance.container.state == State::Created);
    plan.remove.extend(unused.map(|instance| instance.id().to_owned()));
    plan.remove.extend(observed.sandbox().map(|old| old.id().to_owned()));
    plan.sandbox = Some(attempt);
    if let Some(first) = api::init_containers(pod).next() {
        plan.start.push(next_attempt(first, observed.latest(&first.name)));
        return plan;
    }
    let observed = observed.clone();
    for container in api::app_containers(pod) {
        plan_container(pod, container, observed.latest(&container.name), known, &mut plan);
    }
    plan
}

/// Whether any container would start in a new sandbox.
fn wants_to_run(pod: &Pod, observed: &Observed) -> bool {
    api::app_containers(pod).any(|container| {
        match observed.latest(&container.name).map(|old| &old.container.state) {
            None | Some(State::Created | State::Running) => true,
            Some(State::Exited { code, .. }) => should_restart(pod, container, *code),
        }
    }) && !init_failed(pod, observed)
}

fn init_failed(pod: &Pod, observed: &Observed) -> bool {
    api::restart_policy(pod) == "Never"
        && api::init_containers(pod).filter(|container| !api::is_sidecar(container)).any(
            |container| {
                matches!(observed.latest(&container.name).map(|old| &old.container.state),
                Some(State::Exited { code, .. }) if *code != 0)
            },
        )
}

enum Init {
    Done,
    Waiting,
    Failed,
}

fn plan_init(
    pod: &Pod,
    observed: &Observed,
    known: &Knowledge<'_>,
    sandbox: &str,
    plan: &mut Plan,
) -> Init {
    // Once an app container exists here, the init containers are history; sidecars still have to be kept up.
    let past = api::app_containers(pod).any(|container| {
        observed.latest(&container.name).is_some_and(|instance| instance.is_in(sandbox))
    });
    let mut result = Init::Done;
    for container in api::init_containers(pod) {
        let latest = observed.latest(&container.name);
        let here = latest.filter(|instance| instance.is_in(sandbox));
        if api::is_sidecar(container) {
            plan_container(pod, container, latest, known, plan);
            let up = here.is_some_and(|instance| {
                instance.container.is_running() && known.started.contains(instance.id())
            });
            if up || past {
                continue;
            }
        } else if past {
            continue;
        } else {
            match here.map(|instance| &instance.container.state) {
                Some(State::Exited { code: 0, .. }) => continue,
                Some(State::Exited { .. }) if api::restart_policy(pod) == "Never" => {
                    return Init::Failed;
                }
                _ => start_or_wait(pod, container, latest, here.is_none(), known, plan),
            }
        }
        result = Init::Waiting;
        break;
    }
    if matches!(result, Init::Waiting) {
        for later in api::init_containers(pod) {
            let none_here =
                !observed.latest(&later.name).is_some_and(|instance| instance.is_in(sandbox));
            if none_here && !plan.start.iter().any(|start| start.name == later.name) {
                let reason = "PodInitializing".to_owned();
                plan.waiting
                    .entry(later.name.clone())
                    .or_insert(Waiting { reason, message: String::new() });
            }
        }
    }
    result
}

fn plan_container(
    pod: &Pod,
    container: &Container,
    latest: Option<&Instance>,
    known: &Knowledge<'_>,
    plan: &mut Plan,
) {
    let Some(instance) = latest else {
        plan.start.push(Start { name: container.name.clone(), attempt: 0 });
        return;
    };
    match &instance.container.state {
        State::Running => {
            if let Some(unhealthy) = known.unhealthy.get(instance.id()) {
                kill(plan, known, instance, unhealthy.why.clone());
                if let Some(kill) = plan.kill.iter_mut().find(|kill| kill.id == instance.id()) {
                    kill.grace_seconds = unhealthy.grace_seconds;
                }
            } else if instance.container.label(labels::SPEC_HASH) != spec_hash(container) {
                kill(
                    plan,
                    known,
                    instance,
                    format!("Container {} definition changed", container.name),
                );
            }
        }
        State::Exited { code, .. } if !should_restart(pod, container, *code) => {}
        _ => start_or_wait(pod, container, latest, false, known, plan),
    }
}

/// Starts the next attempt, or says how long it has to wait. `fresh`: the old attempts belong to another sandbox.
fn start_or_wait(
    pod: &Pod,
    container: &Container,
    latest: Option<&Instance>,
    fresh: bool,
    known: &Knowledge<'_>,
    plan: &mut Plan,
) {
    match latest.map(|instance| (&instance.container.state, instance)) {
        Some((State::Running, _)) => {}
        Some((State::Created, instance)) => {
            if !known.busy.contains(instance.id()) {
                plan.remove.push(instance.id().to_owned());
                plan.start.push(Start { name: container.name.clone(), attempt: instance.attempt });
            }
        }
        Some((State::Exited { .. }, instance)) if !fresh => {
            let ended = api::parse_time(&instance.container.finished_at).unwrap_or(known.now);
            match known.backoff.remaining(&container.name, ended, known.now) {
                Some((left, delay)) => {
                    let PodRef { namespace, name, uid } = PodRef::of(pod);
                    let message = format!(
                        "back-off {} restarting failed container={} pod={name}_{namespace}({uid})",
                        go_duration(delay),
                        container.name
                    );
                    let reason = "CrashLoopBackOff".to_owned();
                    plan.waiting.insert(container.name.clone(), Waiting { reason, message });
                    plan.wake_in(left);
                }
                None => plan.start.push(next_attempt(container, latest)),
            }
        }
        _ => plan.start.push(next_attempt(container, latest)),
    }
}

fn next_attempt(container: &Container, latest: Option<&Instance>) -> Start {
    let attempt = latest.map_or(0, |instance| match instance.container.state {
        // It never ran: its number is free again once it is removed.
        State::Created => instance.attempt,
        _ => instance.attempt + 1,
    });
    Start { name: container.name.clone(), attempt }
}

fn should_restart(pod: &Pod, container: &Container, code: i64) -> bool {
    match container.restart_policy.as_deref().unwrap_or(api::restart_policy(pod)) {
        "Always" => true,
        "OnFailure" => code != 0,
        _ => false,
    }
}

fn kill(plan: &mut Plan, known: &Knowledge<'_>, instance: &Instance, why: String) {
    let id = instance.id().to_owned();
    if !known.busy.contains(&id) && !plan.kill.iter().any(|kill| kill.id == id) {
        plan.kill.push(Kill {
            id,
            name: instance.container.label(labels::CONTAINER).to_owned(),
            why,
            grace_seconds: None,
        });
    }
}

/// As Go prints a duration of whole seconds: `10s`, `2m40s`.
fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
