//! Probes: one task per probe of a running container, from the node's network to the pod's address.
//!
//! [`Prober`] owns the tasks of one pod and keeps their results; [`check`](handler::check) is one try.

pub(crate) mod handler;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use orch_api::k8s_openapi::api::core::v1::{Container, Pod, Probe};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::api;
use crate::context::Context;
use crate::pod::observe::Observed;
use crate::pod::plan::Unhealthy;
use crate::probe::handler::{Miss, Target};

/// A container that has run for less is at its start.
const NEW_FOR: Duration = Duration::from_secs(2);
/// Waits before the early tries of a new container's probe; together less than the shortest period.
const EARLY_TRIES: [Duration; 5] = [
    Duration::from_millis(10),
    Duration::from_millis(40),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
];

/// What a probe is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

type Key = (String, Kind);

/// Results by container ID: `true` passed, `false` failed its threshold; absent is not known yet.
type Results = Arc<Mutex<BTreeMap<Key, bool>>>;

/// The probes of one pod.
pub(crate) struct Prober {
    tasks: BTreeMap<Key, CancellationToken>,
    running: JoinSet<()>,
    results: Results,
    wake: Arc<Notify>,
}

impl Prober {
    pub(crate) fn new(wake: Arc<Notify>) -> Self {
        Self { tasks: BTreeMap::new(), running: JoinSet::new(), results: Results::default(), wake }
    }

    /// Starts the probes of running containers and ends those of others. Containers in `held` (their start hook
    /// still runs) are not probed yet.
    pub(crate) fn update(
        &mut self,
        cx: &Arc<Context>,
        pod: &Arc<Pod>,
        observed: &Observed,
        pod_ips: &[IpAddr],
        held: &BTreeSet<String>,
    ) {
        while self.running.try_join_next().is_some() {}
        self.adopt(pod, observed);
        let mut wanted: BTreeMap<Key, Container> = BTreeMap::new();
        for container in api::all_containers(pod) {
            let Some(instance) =
                observed.latest(&container.name).filter(|found| found.container.is_running())
            else {
                continue;
            };
            let id = instance.id().to_owned();
            if held.contains(&id) {
                continue;
            }
            let startup_passed =
                container.startup_probe.is_none() || self.passed(&id, Kind::Startup);
            for kind in [Kind::Startup, Kind::Liveness, Kind::Readiness] {
                let due = if kind == Kind::Startup { !startup_passed } else { startup_passed };
                if due && kind.of(container).is_some() {
                    wanted.insert((id.clone(), kind), container.clone());
                }
            }
        }
        self.tasks.retain(|key, stop| {
            let keep = wanted.contains_key(key);
            if !keep {
                stop.cancel();
            }
            keep
        });
        let alive: BTreeSet<&str> = observed.instances().map(|instance| instance.id()).collect();
        self.results.lock().retain(|(id, _), _| alive.contains(id.as_str()));
        for (key, container) in wanted {
            let Some(probe) = key.1.of(&container).cloned() else { continue };
            if self.tasks.contains_key(&key) {
                continue;
            }
            let stop = CancellationToken::new();
            self.tasks.insert(key.clone(), stop.clone());
            let started = observed
                .latest(&container.name)
                .and_then(|found| api::parse_time(&found.container.started_at));
            let task = Task {
                cx: cx.clone(),
                pod: pod.clone(),
                target: Target {
                    container,
                    container_id: key.0.clone(),
                    ip: pod_ips.first().copied(),
                },
                kind: key.1,
                probe,
                age: started.map_or(Duration::ZERO, |at| {
                    jiff::Timestamp::now().duration_since(at).try_into().unwrap_or_default()
                }),
                results: self.results.clone(),
                wake: self.wake.clone(),
            };
            self.running.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = task.run() => {}
                }
            });
        }
    }

    /// Takes over what the former agent told about containers that still run: until their probes have run again,
    /// they are as ready as they were, so that a restart of the agent takes no pod out of its Services.
    fn adopt(&self, pod: &Pod, observed: &Observed) {
        let mut results = self.results.lock();
        for container in api::all_containers(pod) {
            let Some(id) = observed
                .latest(&container.name)
                .filter(|found| found.container.is_running())
                .map(|found| found.id())
            else {
                continue;
            };
            let Some(told) = api::container_status(pod, &container.name)
                .filter(|told| told.container_id.as_deref().is_some_and(|told| told.ends_with(id)))
            else {
                continue;
            };
            for (kind, held) in
                [(Kind::Startup, told.started == Some(true)), (Kind::Readiness, told.ready)]
            {
                if held && kind.of(container).is_some() {
                    results.entry((id.to_owned(), kind)).or_insert(true);
                }
            }
        }
    }

    pub(crate) fn stop(&mut self) {
        self.tasks.values().for_each(CancellationToken::cancel);
        self.tasks.clear();
    }

    fn result(&self, id: &str, kind: Kind) -> Option<bool> {
        self.results.lock().get(&(id.to_owned(), kind)).copied()
    }

    fn passed(&self, id: &str, kind: Kind) -> bool {
        self.result(id, kind) == Some(true)
    }

    /// Running containers that count as started: no startup probe, or one that passed.
    pub(crate) fn started(&self, pod: &Pod, observed: &Observed) -> BTreeSet<String> {
        self.select(pod, observed, Kind::Startup)
    }

    /// Running containers that count as ready: no readiness probe, or one that holds.
    pub(crate) fn ready(&self, pod: &Pod, observed: &Observed) -> BTreeSet<String> {
        self.select(pod, observed, Kind::Readiness)
    }

    fn select(&self, pod: &Pod, observed: &Observed, kind: Kind) -> BTreeSet<String> {
        api::all_containers(pod)
            .filter_map(|container| {
                let id = observed
                    .latest(&container.name)
                    .filter(|found| found.container.is_running())?
                    .id();
                (kind.of(container).is_none() || self.passed(id, kind)).then(|| id.to_owned())
            })
            .collect()
    }

    /// Running containers that a probe wants ended.
    pub(crate) fn unhealthy(&self, pod: &Pod, observed: &Observed) -> BTreeMap<String, Unhealthy> {
        let mut all = BTreeMap::new();
        for container in api::all_containers(pod) {
            let Some(instance) = observed.latest(&container.name) else { continue };
            for kind in [Kind::Startup, Kind::Liveness] {
                if self.result(instance.id(), kind) == Some(false) {
                    let why = format!(
                        "Container {} failed {} probe, will be restarted",
                        container.name,
                        kind.name().to_lowercase()
                    );
                    let grace_seconds =
                        kind.of(container).and_then(|probe| probe.termination_grace_period_seconds);
                    all.insert(instance.id().to_owned(), Unhealthy { why, grace_seconds });
                }
            }
        }
        all
    }
}

struct Task {
    cx: Arc<Context>,
    pod: Arc<Pod>,
    target: Target,
    kind: Kind,
    probe: Probe,
    /// How long the container ran already when the task began.
    age: Duration,
    results: Results,
    wake: Arc<Notify>,
}

fn seconds(value: Option<i32>, default: u32) -> Duration {
    let value = value
        .and_then(|value| u32::try_from(value).ok())
        .filter(|value| *value > 0)
        .unwrap_or(default);
    Duration::from_secs(value.into())
}

impl Task {
    async fn run(self) {
        let delay = Duration::from_secs(
            u64::try_from(self.probe.initial_delay_seconds.unwrap_or(0)).unwrap_or(0),
        );
        tokio::time::sleep(delay.saturating_sub(self.age)).await;
        let (period, timeout) =
            (seconds(self.probe.period_seconds, 10), seconds(self.probe.timeout_seconds, 1));
        let mut tally = Tally::new(&self.probe, self.kind);
        if self.is_new() && self.answers_soon(timeout).await && self.count(&mut tally, true) {
            return;
        }
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let outcome = match tokio::time::timeout(
                timeout,
                handler::check(&self.cx, &self.target, &self.probe),
            )
            .await
            {
                Ok(outcome) => outcome,
                Err(_) => Err(Miss::Failed(format!("no answer within {} s", timeout.as_secs()))),
            };
            if let Err(Miss::Unasked(why)) = &outcome {
                debug!(container = self.target.container_id, why, "probe not tried");
                continue;
            }
            if let Err(Miss::Failed(why)) = &outcome {
                let message = format!("{} probe failed: {why}", self.kind.name());
                self.cx.events.container(
                    &self.pod,
                    &self.target.container.name,
                    "Warning",
                    "Unhealthy",
                    &message,
                );
            }
            if self.count(&mut tally, outcome.is_ok()) {
                return;
            }
        }
    }

    /// Counts one try and tells the worker a new verdict. Returns whether the probe has done its work.
    fn count(&self, tally: &mut Tally, passed: bool) -> bool {
        let Some(verdict) = tally.count(passed) else { return false };
        let key = (self.target.container_id.clone(), self.kind);
        let before = self.results.lock().insert(key, verdict);
        if before != Some(verdict) {
            self.wake.notify_one();
        }
        self.kind == Kind::Startup && verdict
    }

    /// Whether the container began just now and a cheap probe waits for it to serve.
    fn is_new(&self) -> bool {
        self.kind != Kind::Liveness
            && self.probe.exec.is_none()
            && self.probe.initial_delay_seconds.unwrap_or(0) == 0
            && self.age < NEW_FOR
    }

    /// A server listens a moment after its start: a few early tries, which count only if they succeed, spare it the
    /// wait for the second period.
    async fn answers_soon(&self, timeout: Duration) -> bool {
        for wait in EARLY_TRIES {
            tokio::time::sleep(wait).await;
            let check = handler::check(&self.cx, &self.target, &self.probe);
            if matches!(tokio::time::timeout(timeout, check).await, Ok(Ok(()))) {
                return true;
            }
        }
        false
    }
}

/// Counts in a row against the thresholds.
struct Tally {
    successes: i32,
    failures: i32,
    success_threshold: i32,
    failure_threshold: i32,
}

impl Tally {
    fn new(probe: &Probe, kind: Kind) -> Self {
        // Only readiness may ask for more than one success (API validation).
        let successes =
            if kind == Kind::Readiness { probe.success_threshold.unwrap_or(1).max(1) } else { 1 };
        Self {
            successes: 0,
            failures: 0,
            success_threshold: successes,
            failure_threshold: probe.failure_threshold.unwrap_or(3).max(1),
        }
    }

    /// The verdict, once a threshold is reached.
    fn count(&mut self, passed: bool) -> Option<bool> {
        if passed {
            self.failures = 0;
            self.successes = self.successes.saturating_add(1);
            (self.successes >= self.success_threshold).then_some(true)
        } else {
            self.successes = 0;
            self.failures = self.failures.saturating_add(1);
            (self.failures >= self.failure_threshold).then_some(false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_count_in_a_row() {
        let probe =
            Probe { success_threshold: Some(2), failure_threshold: Some(3), ..Probe::default() };
        let mut tally = Tally::new(&probe, Kind::Readiness);
        let verdicts: Vec<_> = [true, false, true, true, false, false, true, false, false, false]
            .into_iter()
            .map(|passed| tally.count(passed))
            .collect();
        let (yes, no) = (Some(true), Some(false));
        assert_eq!(verdicts, [None, None, None, yes, None, None, None, None, None, no]);
        let mut tally = Tally::new(&probe, Kind::Liveness);
        assert_eq!(tally.count(true), Some(true));
    }
}
