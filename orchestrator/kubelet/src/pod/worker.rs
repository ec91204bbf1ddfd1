//! The task of one pod: looks, plans, acts, reports, and waits until something happens.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use orch_api::k8s_openapi::api::core::v1::{Pod, PodStatus};
use orch_cri::{Credentials, State};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::api::{self, PodRef};
use crate::context::Context;
use crate::labels;
use crate::pod::backoff::Backoff;
use crate::pod::env::References;
use crate::pod::network_state::Connected;
use crate::pod::observe::{Observed, observe};
use crate::pod::plan::{self, Kill, Knowledge, Plan, Unhealthy, Waiting};
use crate::pod::report::Latest;
use crate::pod::{message, status, stop};
use crate::probe::Prober;
use crate::volume::token::Tokens;

/// A pod is looked at this often even if nothing happens (kubelet's syncFrequency).
const RESYNC: Duration = Duration::from_secs(60);
/// First and longest wait after an error.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(15);
/// Steps taken in a row before the worker takes a breath: more means that it makes no progress.
const STEPS_AT_ONCE: u32 = 8;

/// What is wanted of a pod on this node.
#[derive(Clone)]
pub(crate) enum Wanted {
    /// The API server has it.
    Exists(Arc<Pod>),
    /// The API server does not have it: whatever is left of it has to go.
    Gone,
}

/// Why a step did not succeed; it is tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Engine(#[from] orch_cri::Error),
    #[error(transparent)]
    Api(Box<orch_client::Error>),
    #[error("{0}")]
    Other(String),
}

impl From<orch_client::Error> for Error {
    fn from(error: orch_client::Error) -> Self {
        Self::Api(Box::new(error))
    }
}

/// What follows a step.
pub(super) enum Next {
    /// Look again at once.
    Again,
    /// Look again when something happens, or after this time.
    Wait(Duration),
    /// There is nothing left to do for this pod, ever.
    Done,
}

/// State of one pod's task. Everything in it can be lost: the engine and the API have what counts.
pub(crate) struct Worker {
    pub(super) cx: Arc<Context>,
    pub(super) pod_ref: PodRef,
    pub(super) wanted: watch::Receiver<Wanted>,
    pub(super) wake: Arc<Notify>,
    pub(super) latest: Option<Latest>,
    pub(super) backoff: Backoff,
    pub(super) prober: Prober,
    pub(super) tokens: Tokens,
    /// The sandbox's place in the network.
    pub(super) connected: Option<Connected>,
    /// Why containers could not be started at the last try, and when the next one is due.
    pub(super) refused: BTreeMap<String, (Waiting, Instant)>,
    /// When the volumes may be tried again, after they could not be made.
    pub(super) mounts_after: Option<Instant>,
    /// No new sandbox before this time, and how long that was for.
    pub(super) sandbox_after: Option<(Instant, Duration)>,
    pub(super) references: Option<References>,
    pub(super) credentials: Vec<Credentials>,
    pub(super) volumes_due: Instant,
    pub(super) messages: BTreeMap<String, String>,
    pub(super) busy: BTreeSet<String>,
    pub(super) kills: JoinSet<(String, Result<(), orch_cri::Error>)>,
    /// Containers whose postStart hook runs.
    pub(super) held: BTreeSet<String>,
    pub(super) hooks: JoinSet<(String, String, Result<(), String>)>,
    /// Containers whose postStart hook failed.
    pub(super) spoilt: BTreeMap<String, String>,
    /// When its end began.
    pub(super) ending_since: Option<Instant>,
    last_waiting: BTreeMap<String, Waiting>,
}

impl Worker {
    pub(crate) fn new(
        cx: Arc<Context>,
        pod_ref: PodRef,
        wanted: watch::Receiver<Wanted>,
        wake: Arc<Notify>,
    ) -> Self {
        let connected = Connected::read(&cx.pod_folder(&pod_ref.uid));
        let volumes_due = Instant::now() + cx.options.volume_refresh;
        Self {
            prober: Prober::new(wake.clone()),
            cx,
            pod_ref,
            wanted,
            wake,
            latest: None,
            backoff: Backoff::default(),
            tokens: Tokens::default(),
            connected,
            refused: BTreeMap::new(),
            mounts_after: None,
            sandbox_after: None,
            references: None,
            credentials: Vec::new(),
            volumes_due,
            messages: BTreeMap::new(),
            busy: BTreeSet::new(),
            kills: JoinSet::new(),
            held: BTreeSet::new(),
            hooks: JoinSet::new(),
            spoilt: BTreeMap::new(),
            ending_since: None,
            last_waiting: BTreeMap::new(),
        }
    }

    /// Works until the pod is gone, or `stop`, which leaves its containers as they are.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let (mut retry, mut steps) = (FIRST_RETRY, 0);
        loop {
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = self.step() => outcome,
            };
            let wait = match outcome {
                Ok(Next::Done) => return,
                Ok(Next::Again) if steps < STEPS_AT_ONCE => {
                    steps += 1;
                    continue;
                }
                Ok(Next::Again) => FIRST_RETRY,
                Ok(Next::Wait(wait)) => {
                    retry = FIRST_RETRY;
                    wait
                }
                Err(error) => {
                    warn!(pod = %self.pod_ref, %error, retry_in = ?retry, "pod not in step");
                    let wait = retry;
                    retry = (retry * 2).min(LONGEST_RETRY);
                    wait
                }
            };
            steps = 0;
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.wake.notified() => {}
                changed = self.wanted.changed() => if changed.is_err() { return },
                Some(ended) = self.kills.join_next() => self.kill_ended(ended),
                Some(ended) = self.hooks.join_next() => self.hook_ended(ended),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn kill_ended(
        &mut self,
        ended: Result<(String, Result<(), orch_cri::Error>), tokio::task::JoinError>,
    ) {
        match ended {
            Ok((id, outcome)) => {
                self.busy.remove(&id);
                if let Err(error) = outcome {
                    warn!(pod = %self.pod_ref, container = id, %error, "container not ended yet");
                }
            }
            Err(error) => {
                warn!(pod = %self.pod_ref, %error, "a kill broke off");
                self.busy.clear();
            }
        }
    }

    fn hook_ended(
        &mut self,
        ended: Result<(String, String, Result<(), String>), tokio::task::JoinError>,
    ) {
        let Ok((id, name, outcome)) = ended else {
            self.held.clear();
            return;
        };
        self.held.remove(&id);
        if let Err(why) = outcome {
            let message = format!("PostStartHook failed: {why}");
            if let Some(latest) = &self.latest {
                self.cx.events.container(
                    &latest.pod,
                    &name,
                    "Warning",
                    "FailedPostStartHook",
                    &message,
                );
            }
            self.spoilt.insert(id, "FailedPostStartHook".to_owned());
        }
    }

    /// The pod as the API server has it.
    pub(super) fn pod(&mut self) -> Option<Arc<Pod>> {
        let Wanted::Exists(pod) = self.wanted.borrow_and_update().clone() else { return None };
        match &mut self.latest {
            Some(latest) => latest.see(&pod),
            None => self.latest = Some(Latest { pod }),
        }
        self.latest.as_ref().map(|latest| latest.pod.clone())
    }

    async fn step(&mut self) -> Result<Next, Error> {
        let Some(pod) = self.pod() else {
            return self.end(None).await;
        };
        if orch_api::pod::is_terminating(&pod) {
            return self.end(Some(pod)).await;
        }
        let observed = observe(self.cx.runtime(), &self.pod_ref.uid).await?;
        if orch_api::pod::is_terminal(&pod) {
            return self.settle(&pod, &observed).await;
        }
        if time_left(&pod).is_some_and(|left| left.is_zero()) {
            return self.fail(&pod, &observed).await;
        }
        self.look(&pod, &observed).await;
        let plan = self.plan(&pod, &observed);
        self.tell_waiting(&pod, &plan);
        let acts = !(plan.start.is_empty() && plan.sandbox.is_none());
        self.kill(&pod, &observed, &plan.kill);
        self.remove(&plan).await?;
        let mut wait = plan.wake.unwrap_or(RESYNC).min(RESYNC);
        if let Some(left) = time_left(&pod) {
            wait = wait.min(left);
        }
        if acts {
            // A new pod first says that it is seen; that costs the start nothing, as both go on at once.
            let status = self.status(&pod, &observed, &plan);
            let (client, latest) = (self.cx.client(), self.latest.clone());
            let first = async move {
                let mut latest = latest?;
                latest.report(&client, &status).await.ok()?;
                Some(latest)
            };
            let (told, started) = tokio::join!(first, self.start(&pod, &observed, &plan));
            if let (Some(told), Some(latest)) = (told, &mut self.latest) {
                latest.see(&told.pod);
            }
            match started? {
                None => return Ok(Next::Again),
                Some(due) => wait = wait.min(due),
            }
        }
        // What the steps above changed.
        let pod = self.latest.as_ref().map_or(pod, |latest| latest.pod.clone());
        let observed =
            if acts { observe(self.cx.runtime(), &self.pod_ref.uid).await? } else { observed };
        self.look(&pod, &observed).await;
        let plan = self.plan(&pod, &observed);
        let status = self.status(&pod, &observed, &plan);
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            self.conclude(&pod, &observed).await?;
        } else {
            self.send(&status).await?;
        }
        if self.latest.as_ref().is_some_and(|latest| orch_api::pod::is_terminal(&latest.pod)) {
            return Ok(Next::Again);
        }
        self.refresh_volumes(&pod, &observed).await;
        if crate::volume::has_live_content(&pod) {
            wait = wait.min(
                self.volumes_due.saturating_duration_since(Instant::now())
                    + Duration::from_millis(10),
            );
        }
        Ok(Next::Wait(wait))
    }

    /// Updates what the worker knows about the containers: probes, last words, the sandbox's network.
    async fn look(&mut self, pod: &Arc<Pod>, observed: &Observed) {
        let folder = self.cx.pod_folder(&self.pod_ref.uid);
        for container in api::all_containers(pod).cloned().chain(api::ephemeral_containers(pod)) {
            for instance in observed.containers.get(&container.name).into_iter().flatten() {
                let ended = matches!(instance.container.state, State::Exited { .. });
                if ended && !self.messages.contains_key(instance.id()) {
                    let text =
                        message::read(self.cx.runtime(), &folder, &container, instance).await;
                    self.messages.insert(instance.id().to_owned(), text);
                }
            }
        }
        let alive: BTreeSet<&str> = observed.instances().map(|instance| instance.id()).collect();
        self.messages.retain(|id, _| alive.contains(id.as_str()));
        self.spoilt.retain(|id, _| alive.contains(id.as_str()));
        if self.connected.is_none() {
            self.connected = Connected::read(&folder);
        }
        let ips = self.ips(observed);
        self.prober.update(&self.cx, pod, observed, &ips, &self.held);
    }

    /// Addresses of the running sandbox.
    pub(super) fn ips(&self, observed: &Observed) -> Vec<std::net::IpAddr> {
        let sandbox = observed.running_sandbox();
        let connected = self
            .connected
            .as_ref()
            .filter(|known| sandbox.is_some_and(|found| found.id() == known.sandbox));
        connected.map(|known| known.ips.clone()).unwrap_or_default()
    }

    fn started(&self, pod: &Pod, observed: &Observed) -> BTreeSet<String> {
        let mut started = self.prober.started(pod, observed);
        started.retain(|id| !self.held.contains(id));
        started
    }

    fn plan(&self, pod: &Pod, observed: &Observed) -> Plan {
        let mut unhealthy = self.prober.unhealthy(pod, observed);
        unhealthy.extend(
            self.spoilt
                .iter()
                .map(|(id, why)| (id.clone(), Unhealthy { why: why.clone(), grace_seconds: None })),
        );
        let known = Knowledge {
            network_ready: !self.ips(observed).is_empty(),
            unhealthy: &unhealthy,
            started: &self.started(pod, observed),
            busy: &self.busy,
            backoff: &self.backoff,
            now: Timestamp::now(),
        };
        plan::plan(pod, observed, &known)
    }

    /// An event for each container that begins to wait for its back-off.
    fn tell_waiting(&mut self, pod: &Pod, plan: &Plan) {
        for (name, waiting) in &plan.waiting {
            let before = self.last_waiting.get(name).map(|waiting| &waiting.reason);
            if waiting.reason == "CrashLoopBackOff" && before != Some(&waiting.reason) {
                let message =
                    format!("Back-off restarting failed container {name} in pod {}", self.pod_ref);
                self.cx.events.container(pod, name, "Warning", "BackOff", &message);
            }
        }
        self.last_waiting.clone_from(&plan.waiting);
    }

    /// Ends containers beside the worker, so that the others go on.
    fn kill(&mut self, pod: &Arc<Pod>, observed: &Observed, kills: &[Kill]) {
        let ip = self.ips(observed).first().copied();
        for kill in kills {
            let seconds = kill.grace_seconds.unwrap_or_else(|| api::grace_seconds(pod));
            let grace = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
            let Some(instance) =
                observed.instances().find(|instance| instance.id() == kill.id).cloned()
            else {
                continue;
            };
            let message = if kill.why.starts_with("Container ") {
                kill.why.clone()
            } else {
                format!("Stopping container {}: {}", kill.name, kill.why)
            };
            self.cx.events.container(pod, &kill.name, "Normal", "Killing", &message);
            self.busy.insert(kill.id.clone());
            let (cx, pod, id) = (self.cx.clone(), pod.clone(), kill.id.clone());
            self.kills.spawn(async move {
                let outcome = stop::stop(&cx, &pod, &instance, ip, stop::fixed(grace)).await;
                (id, outcome)
            });
        }
    }

    async fn remove(&mut self, plan: &Plan) -> Result<(), Error> {
        for id in &plan.remove {
            let is_sandbox = self
                .cx
                .runtime()
                .inspect(id)
                .await?
                .map(|found| found.label(labels::CONTAINER) == labels::SANDBOX);
            match is_sandbox {
                Some(true) => self.disconnect(id).await?,
                Some(false) => self.cx.runtime().remove(id).await?,
                None => {}
            }
        }
        Ok(())
    }

    /// Removes a sandbox with its network.
    pub(super) async fn disconnect(&mut self, id: &str) -> Result<(), Error> {
        crate::pod::start::remove_sandbox(&self.cx, &self.pod_ref, id)
            .await
            .map_err(Error::Other)?;
        if self.connected.as_ref().is_some_and(|known| known.sandbox == id) {
            self.connected = None;
            Connected::forget(&self.cx.pod_folder(&self.pod_ref.uid));
        }
        Ok(())
    }

    fn waiting(&self, plan: &Plan) -> BTreeMap<String, Waiting> {
        let mut waiting = plan.waiting.clone();
        // Only what is to start still waits: one that never restarts is over with its first failure.
        let wanted = |name: &String| plan.start.iter().any(|start| start.name == *name);
        let refused = self.refused.iter().filter(|(name, _)| wanted(name));
        waiting.extend(refused.map(|(name, (waiting, _))| (name.clone(), waiting.clone())));
        waiting
    }

    fn status(&self, pod: &Pod, observed: &Observed, plan: &Plan) -> PodStatus {
        self.status_with(pod, observed, &self.waiting(plan), false, None)
    }

    pub(super) fn status_with(
        &self,
        pod: &Pod,
        observed: &Observed,
        waiting: &BTreeMap<String, Waiting>,
        ending: bool,
        failure: Option<(&str, &str)>,
    ) -> PodStatus {
        let facts = status::Facts {
            node_ips: &[self.cx.options.node_ip],
            pod_ips: &self.ips(observed),
            waiting,
            started: &self.started(pod, observed),
            ready: &self.prober.ready(pod, observed),
            messages: &self.messages,
            engine: self.cx.engine,
            ending,
            failure,
            now: Timestamp::now(),
        };
        status::status(pod, observed, &facts)
    }

    /// All that decides about the pod has ended: sidecars end too, and then the end is told.
    async fn conclude(&mut self, pod: &Arc<Pod>, observed: &Observed) -> Result<(), Error> {
        self.prober.stop();
        self.end_containers(Some(pod), observed).await?;
        let observed = observe(self.cx.runtime(), &self.pod_ref.uid).await?;
        self.last_words(pod, &observed).await;
        let status = self.status_with(pod, &observed, &BTreeMap::new(), false, None);
        self.send(&status).await
    }

    pub(super) async fn send(&mut self, status: &PodStatus) -> Result<(), Error> {
        let client = self.cx.client();
        if let Some(latest) = &mut self.latest {
            latest.report(&client, status).await?;
        }
        Ok(())
    }

    /// The pod has reached its end: nothing of it runs any more, its address is free, its containers stay for their
    /// logs.
    async fn settle(&mut self, pod: &Arc<Pod>, observed: &Observed) -> Result<Next, Error> {
        self.prober.stop();
        if observed.sandboxes.is_empty()
            && !observed.instances().any(|instance| instance.container.is_running())
        {
            return Ok(Next::Wait(RESYNC));
        }
        debug!(pod = %self.pod_ref, "ended pod is tidied up");
        self.end_containers(Some(pod), observed).await?;
        for sandbox in &observed.sandboxes {
            self.disconnect(sandbox.id()).await?;
        }
        Ok(Next::Again)
    }

    /// The pod ran longer than it may.
    async fn fail(&mut self, pod: &Arc<Pod>, observed: &Observed) -> Result<Next, Error> {
        let message = "Pod was active on the node longer than the specified deadline";
        self.cx.events.pod(pod, "Normal", "DeadlineExceeded", message);
        self.prober.stop();
        self.end_containers(Some(pod), observed).await?;
        let observed = observe(self.cx.runtime(), &self.pod_ref.uid).await?;
        let failure = Some(("DeadlineExceeded", message));
        let status = self.status_with(pod, &observed, &BTreeMap::new(), true, failure);
        self.send(&status).await?;
        Ok(Next::Again)
    }
}

/// What is left of `activeDeadlineSeconds`, in whole seconds.
fn time_left(pod: &Pod) -> Option<Duration> {
    let seconds = pod.spec.as_ref()?.active_deadline_seconds?;
    let began = pod.status.as_ref()?.start_time.as_ref()?.0;
    let left = began.as_second().saturating_add(seconds) - Timestamp::now().as_second();
    Some(Duration::from_secs(u64::try_from(left).unwrap_or(0)))
}
