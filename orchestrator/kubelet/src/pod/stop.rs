//! Ending a container in good order: preStop hook, stop signal, patience, SIGKILL.

use std::sync::Arc;
use std::time::Duration;

use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_cri::Error;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::api;
use crate::context::Context;
use crate::labels;
use crate::pod::observe::Instance;
use crate::probe::handler::{self, Target};

/// What is left at least after a preStop hook that took all the time (kubelet's).
const LEAST_AFTER_HOOK: Duration = Duration::from_secs(2);
/// How often an ending container is looked at. An inspection costs the engine under a millisecond.
const LOOK: Duration = Duration::from_millis(50);
/// After SIGKILL a process can still hang in the kernel; then it is tried again later.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// When patience ends; it may come closer while a container is being stopped.
pub(crate) type Deadline = watch::Receiver<Instant>;

/// A deadline that stays as it is.
pub(crate) fn fixed(grace: Duration) -> Deadline {
    watch::channel(Instant::now() + grace).1
}

/// Ends one container. Returns once it has ended.
///
/// # Errors
/// The engine does not answer, or the container survives SIGKILL.
pub(crate) async fn stop(
    cx: &Arc<Context>,
    pod: &Pod,
    instance: &Instance,
    pod_ip: Option<std::net::IpAddr>,
    mut deadline: Deadline,
) -> Result<(), Error> {
    let id = instance.id();
    let name = instance.container.label(labels::CONTAINER);
    let container = api::all_containers(pod).find(|container| container.name == name);
    let lifecycle = container.and_then(|container| container.lifecycle.as_ref());
    if let (Some(container), Some(pre_stop)) =
        (container, lifecycle.and_then(|lifecycle| lifecycle.pre_stop.as_ref()))
    {
        let target =
            Target { container: container.clone(), container_id: id.to_owned(), ip: pod_ip };
        tokio::select! {
            outcome = handler::hook(cx, &target, pre_stop) => if let Err(why) = outcome {
                let message = format!("PreStopHook failed: {why}");
                cx.events.container(pod, name, "Warning", "FailedPreStopHook", &message);
            },
            () = passed(&mut deadline) => {}
            outcome = ended(cx, id) => return outcome,
        }
    }
    let own = lifecycle.and_then(|lifecycle| lifecycle.stop_signal.clone());
    let signal = own.unwrap_or_else(|| match instance.container.stop_signal.as_str() {
        "" => "SIGTERM".to_owned(),
        image => image.to_owned(),
    });
    let least = Instant::now() + LEAST_AFTER_HOOK;
    let had_hook = lifecycle.is_some_and(|lifecycle| lifecycle.pre_stop.is_some());
    cx.runtime().kill(id, &signal).await?;
    tokio::select! {
        outcome = ended(cx, id) => return outcome,
        () = async {
            passed(&mut deadline).await;
            if had_hook {
                tokio::time::sleep_until(least).await;
            }
        } => {}
    }
    cx.runtime().kill(id, "SIGKILL").await?;
    match tokio::time::timeout(KILL_PATIENCE, ended(cx, id)).await {
        Ok(outcome) => outcome,
        Err(_) => {
            Err(Error::Engine { code: 500, message: format!("container {id} survives SIGKILL") })
        }
    }
}

/// Waits until the deadline, wherever it moves meanwhile.
async fn passed(deadline: &mut Deadline) {
    loop {
        let until = *deadline.borrow_and_update();
        tokio::select! {
            () = tokio::time::sleep_until(until) => return,
            changed = deadline.changed() => if changed.is_err() {
                // Nobody moves it any more.
                tokio::time::sleep_until(until).await;
                return;
            },
        }
    }
}

async fn ended(cx: &Arc<Context>, id: &str) -> Result<(), Error> {
    loop {
        match cx.runtime().inspect(id).await? {
            Some(container) if container.is_running() => tokio::time::sleep(LOOK).await,
            _ => return Ok(()),
        }
    }
}
