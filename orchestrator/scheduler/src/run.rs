//! The task: caches of the API server feed [`State`]; its attempts become bindings, conditions and events.

use std::sync::Arc;
use std::time::Duration;

use orch_api::k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use orch_client::{Client, Error as ClientError};
use orch_reconcile::{EventRecorder, Informers};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::pod_info::PodInfo;
use crate::report::{self, Unscheduled};
use crate::state::{Attempt, State};

/// Bindings under way at most; with more, the next pod waits. Enough to keep the API server busy, few enough for
/// failed ones to be noticed before much was built on them.
const BINDINGS_MOST: usize = 64;
/// What is under way when the scheduler is told to stop gets this long.
const GRACE: Duration = Duration::from_secs(2);

/// What a scheduler may be told.
#[derive(Debug, Clone)]
pub struct Options {
    /// Pods with this `schedulerName` are its own.
    pub scheduler_name: String,
    /// Host name for the events it writes.
    pub host: String,
}

impl Default for Options {
    fn default() -> Self {
        Self { scheduler_name: "default-scheduler".to_owned(), host: String::new() }
    }
}

/// Why the scheduler ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caches of the API server's objects stopped.
    #[error("the cache of {0} ended")]
    CacheEnded(&'static str),
}

/// What a background task reports back.
enum Done {
    Bound,
    BindFailed(Arc<PodInfo>, ClientError),
    Reported,
}

/// Schedules pods until cancelled.
///
/// # Errors
/// A cache ended although nobody asked it to.
pub async fn run(client: Client, options: Options, cancel: CancellationToken) -> Result<(), Error> {
    let caches = cancel.child_token();
    let _stop_caches = caches.clone().drop_guard();
    let informers = Informers::new(client.clone(), caches);
    let (node_cache, pod_cache) = (informers.of::<Node>(), informers.of::<Pod>());
    let (namespace_cache, service_cache) = (informers.of::<Namespace>(), informers.of::<Service>());
    let (mut nodes, mut pods) = (node_cache.subscribe(), pod_cache.subscribe());
    let (mut namespaces, mut services) = (namespace_cache.subscribe(), service_cache.subscribe());
    let synced = async {
        tokio::join!(
            node_cache.synced(),
            pod_cache.synced(),
            namespace_cache.synced(),
            service_cache.synced()
        );
    };
    tokio::select! {
        () = synced => {}
        () = cancel.cancelled() => return Ok(()),
    }
    info!("the scheduler's caches are filled");

    let events = EventRecorder::new(client.clone(), &options.scheduler_name, &options.host);
    let mut state = State::new(&options.scheduler_name, rand::random());
    let mut tasks: JoinSet<Done> = JoinSet::new();
    let mut bindings = 0_usize;
    loop {
        // All that is known already comes before the next decision.
        while let Ok(change) = nodes.try_recv() {
            state.node_changed(change.old.as_ref(), change.new.as_ref());
        }
        while let Ok(change) = namespaces.try_recv() {
            state.namespace_changed(change.old.as_ref(), change.new.as_ref());
        }
        while let Ok(change) = services.try_recv() {
            state.service_changed(change.old.as_ref(), change.new.as_ref());
        }
        while let Ok(change) = pods.try_recv() {
            pod_changed(&mut state, change.old.as_ref(), change.new.as_ref(), &client, &mut tasks);
        }
        if bindings < BINDINGS_MOST
            && let Some(attempt) = state.attempt(Instant::now())
        {
            match attempt {
                Attempt::Bind { pod, node } => {
                    bindings += 1;
                    tasks.spawn(bind(client.clone(), events.clone(), pod, node));
                }
                Attempt::Unschedulable { pod, why } => {
                    let message = why.to_string();
                    debug!(pod = pod.key(), message, "the pod fits nowhere");
                    events.event(&report::reference(&pod), "Warning", "FailedScheduling", &message);
                    report_unscheduled(&mut tasks, &client, pod, "Unschedulable", message);
                }
            }
            // Deciding never waits; let others have the thread.
            tokio::task::yield_now().await;
            while let Some(Ok(done)) = tasks.try_join_next() {
                finish(&mut state, done, &mut bindings, &mut tasks, &client);
            }
            if cancel.is_cancelled() {
                break;
            }
            continue;
        }
        let deadline = if bindings < BINDINGS_MOST { state.queue().next_deadline() } else { None };
        tokio::select! {
            // The caches end with us: being told to stop comes before "a cache ended".
            biased;
            () = cancel.cancelled() => break,
            change = nodes.recv() => {
                let change = change.ok_or(Error::CacheEnded("nodes"))?;
                state.node_changed(change.old.as_ref(), change.new.as_ref());
            }
            change = pods.recv() => {
                let change = change.ok_or(Error::CacheEnded("pods"))?;
                pod_changed(&mut state, change.old.as_ref(), change.new.as_ref(), &client, &mut tasks);
            }
            change = namespaces.recv() => {
                let change = change.ok_or(Error::CacheEnded("namespaces"))?;
                state.namespace_changed(change.old.as_ref(), change.new.as_ref());
            }
            change = services.recv() => {
                let change = change.ok_or(Error::CacheEnded("services"))?;
                state.service_changed(change.old.as_ref(), change.new.as_ref());
            }
            Some(done) = tasks.join_next() => {
                if let Ok(done) = done {
                    finish(&mut state, done, &mut bindings, &mut tasks, &client);
                }
            }
            () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
        }
    }
    if tokio::time::timeout(GRACE, async { while tasks.join_next().await.is_some() {} })
        .await
        .is_err()
    {
        warn!(tasks = tasks.len(), "the scheduler stops with requests under way");
    }
    Ok(())
}

fn pod_changed(
    state: &mut State,
    old: Option<&Arc<Pod>>,
    new: Option<&Arc<Pod>>,
    client: &Client,
    tasks: &mut JoinSet<Done>,
) {
    state.pod_changed(old, new);
    let waiting =
        new.and_then(|pod| state.queue().get(pod.metadata.uid.as_deref().unwrap_or_default()));
    if let Some(pod) = waiting.filter(|pod| pod.gates().next().is_some()) {
        let message = "Scheduling is blocked due to non-empty scheduling gates".to_owned();
        report_unscheduled(tasks, client, pod.clone(), "SchedulingGated", message);
    }
}

fn report_unscheduled(
    tasks: &mut JoinSet<Done>,
    client: &Client,
    pod: Arc<PodInfo>,
    reason: &'static str,
    message: String,
) {
    let client = client.clone();
    tasks.spawn(async move {
        report::set_unscheduled(client, pod, Unscheduled { reason, message }).await;
        Done::Reported
    });
}

async fn bind(client: Client, events: EventRecorder, pod: Arc<PodInfo>, node: String) -> Done {
    match report::bind(client, &pod, &node).await {
        Ok(()) => {
            info!(pod = pod.key(), node, "scheduled");
            let message = format!("Successfully assigned {} to {node}", pod.key());
            events.event(&report::reference(&pod), "Normal", "Scheduled", &message);
            Done::Bound
        }
        Err(error) => Done::BindFailed(pod, error),
    }
}

fn finish(
    state: &mut State,
    done: Done,
    bindings: &mut usize,
    tasks: &mut JoinSet<Done>,
    client: &Client,
) {
    match done {
        Done::Reported => {}
        Done::Bound => *bindings -= 1,
        Done::BindFailed(pod, error) => {
            *bindings -= 1;
            state.bind_failed(&pod, Instant::now());
            // A pod that is gone or bound by somebody else is no error; its cache says so soon.
            if !error.is_not_found() && !error.is_conflict() {
                warn!(pod = pod.key(), error = &error as &dyn std::error::Error, "bind the pod");
                report_unscheduled(
                    tasks,
                    client,
                    pod,
                    "SchedulerError",
                    format!("binding rejected: {error}"),
                );
            }
        }
    }
}
