//! Gives every pod of the node its worker, and wakes workers when the engine says that something happened.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_cri::{Container, Event};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::api::PodRef;
use crate::context::Context;
use crate::labels;
use crate::network::Place;
use crate::pod::worker::{Wanted, Worker};
use crate::source::Pods;
use crate::volume;

/// Wait before the engine's event stream is opened again.
const EVENTS_RETRY: Duration = Duration::from_secs(1);
/// Events on their way to the manager: it only sets flags, so a few suffice; if it is full the stream waits.
const EVENT_BACKLOG: usize = 64;

struct Handle {
    wanted: watch::Sender<Wanted>,
    wake: Arc<Notify>,
    /// Hash of what the engine had of the pod at the last relist.
    seen: u64,
}

/// What reaches the manager from the engine.
enum Signal {
    Event(Event),
    /// Events may have been lost: list everything.
    Relist,
}

pub(crate) struct Manager {
    cx: Arc<Context>,
    pods: watch::Receiver<Pods>,
    workers: BTreeMap<String, Handle>,
    tasks: JoinSet<String>,
    /// Pods whose worker is done while the API server still has them, because somebody's finalizer holds them.
    finished: BTreeSet<String>,
    stop: CancellationToken,
}

impl Manager {
    pub(crate) fn new(
        cx: Arc<Context>,
        pods: watch::Receiver<Pods>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            cx,
            pods,
            workers: BTreeMap::new(),
            tasks: JoinSet::new(),
            finished: BTreeSet::new(),
            stop,
        }
    }

    pub(crate) async fn run(mut self) {
        let (signals, mut received) = mpsc::channel(EVENT_BACKLOG);
        let (cx, stop) = (self.cx.clone(), self.stop.clone());
        let mut listener = JoinSet::new();
        listener.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = listen(cx, signals) => {}
            }
        });
        let mut relist = tokio::time::interval(self.cx.options.relist);
        relist.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => break,
                changed = self.pods.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    self.assign();
                }
                Some(signal) = received.recv() => match signal {
                    Signal::Event(event) => self.wake(&event),
                    Signal::Relist => self.relist().await,
                },
                _ = relist.tick() => self.relist().await,
                Some(ended) = self.tasks.join_next() => self.ended(ended),
            }
        }
        // Workers stop on the same token; containers stay as they are.
        while self.tasks.join_next().await.is_some() {}
    }

    /// Starts workers for new pods, and tells the others what changed.
    fn assign(&mut self) {
        let Some(pods) = self.pods.borrow_and_update().clone() else { return };
        self.finished.retain(|uid| pods.contains_key(uid));
        for (uid, handle) in &self.workers {
            let wanted = match pods.get(uid) {
                Some(pod) => Wanted::Exists(pod.clone()),
                None => Wanted::Gone,
            };
            handle.wanted.send_if_modified(|old| {
                let same = match (&*old, &wanted) {
                    (Wanted::Gone, Wanted::Gone) => true,
                    (Wanted::Exists(old), Wanted::Exists(new)) => Arc::ptr_eq(old, new),
                    _ => false,
                };
                if !same {
                    *old = wanted;
                }
                !same
            });
        }
        for (uid, pod) in pods.iter() {
            if !self.workers.contains_key(uid) && !self.finished.contains(uid) {
                self.spawn(PodRef::of(pod), Wanted::Exists(pod.clone()));
            }
        }
    }

    fn spawn(&mut self, pod: PodRef, wanted: Wanted) {
        debug!(%pod, uid = pod.uid, "worker starts");
        let (sender, receiver) = watch::channel(wanted);
        let wake = Arc::new(Notify::new());
        let uid = pod.uid.clone();
        let worker = Worker::new(self.cx.clone(), pod, receiver, wake.clone());
        let stop = self.stop.clone();
        self.workers.insert(uid.clone(), Handle { wanted: sender, wake, seen: 0 });
        self.tasks.spawn(async move {
            worker.run(stop).await;
            uid
        });
    }

    fn ended(&mut self, ended: Result<String, tokio::task::JoinError>) {
        match ended {
            Ok(uid) => {
                self.workers.remove(&uid);
                let known = self.pods.borrow().as_ref().is_some_and(|pods| pods.contains_key(&uid));
                if known {
                    self.finished.insert(uid);
                }
            }
            // Without its worker the pod would be forgotten: the next relist or change starts another one.
            Err(error) => {
                warn!(%error, "a pod's worker broke off");
                self.workers.retain(|_, handle| !handle.wanted.is_closed());
            }
        }
    }

    fn wake(&self, event: &Event) {
        let uid = event.labels.get(labels::POD_UID);
        if let Some(handle) = uid.and_then(|uid| self.workers.get(uid)) {
            handle.wake.notify_one();
        }
    }

    /// Wakes the workers of pods that look different, finds pods nobody wants, and tidies up.
    async fn relist(&mut self) {
        self.assign();
        let found = match self.cx.runtime().list(&[]).await {
            Ok(found) => found,
            // The node's condition says so; pods are left alone.
            Err(error) => return debug!(%error, "containers not listed"),
        };
        let Some(pods) = self.pods.borrow().clone() else { return };
        let mut by_pod: BTreeMap<String, Vec<&Container>> = BTreeMap::new();
        for container in &found {
            by_pod.entry(container.label(labels::POD_UID).to_owned()).or_default().push(container);
        }
        for (uid, handle) in &mut self.workers {
            let seen = fingerprint(by_pod.get(uid).map(Vec::as_slice).unwrap_or_default());
            if seen != handle.seen {
                handle.seen = seen;
                handle.wake.notify_one();
            }
        }
        for (uid, containers) in &by_pod {
            let orphan =
                !pods.contains_key(uid) && !self.workers.contains_key(uid) && !uid.is_empty();
            if let Some(first) = containers.first().filter(|_| orphan) {
                let pod = PodRef {
                    namespace: first.label(labels::POD_NAMESPACE).to_owned(),
                    name: first.label(labels::POD_NAME).to_owned(),
                    uid: uid.clone(),
                };
                info!(%pod, "containers of a pod that no longer exists");
                self.spawn(pod, Wanted::Gone);
            }
        }
        self.tidy(&found, &pods).await;
    }

    /// Frees networks and folders that nothing refers to, such as after the engine lost its containers.
    async fn tidy(&self, found: &[Container], pods: &BTreeMap<String, Arc<Pod>>) {
        // A start under way has a sandbox that this list may not have.
        let quiet = self.cx.starts.available_permits() == self.cx.options.parallel_starts.max(1);
        if !quiet {
            return;
        }
        for sandbox in self.cx.network.pinned().await {
            if !found.iter().any(|container| container.id == sandbox) {
                let unknown =
                    PodRef { namespace: String::new(), name: String::new(), uid: String::new() };
                let still_absent = matches!(self.cx.runtime().inspect(&sandbox).await, Ok(None));
                let place = Place::new(&unknown, &sandbox, self.cx.network.netns_path(&sandbox));
                if still_absent && let Err(error) = self.cx.network.remove(&place).await {
                    warn!(sandbox, error, "network of a lost sandbox not released");
                }
            }
        }
        let Ok(folders) = std::fs::read_dir(self.cx.options.paths.pods_dir()) else { return };
        for folder in folders.flatten() {
            let uid = folder.file_name().to_string_lossy().into_owned();
            let used = pods.contains_key(&uid)
                || self.workers.contains_key(&uid)
                || found.iter().any(|container| container.label(labels::POD_UID) == uid);
            if !used && let Err(error) = volume::remove(&folder.path()) {
                warn!(uid, error, "folder of a former pod not removed");
            }
        }
    }
}

fn fingerprint(containers: &[&Container]) -> u64 {
    let mut parts: Vec<_> =
        containers.iter().map(|container| (&container.id, container.is_running())).collect();
    parts.sort();
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

/// Passes the engine's events on, for ever; a stream that broke may have lost some.
async fn listen(cx: Arc<Context>, out: mpsc::Sender<Signal>) {
    loop {
        match cx.runtime().events().await {
            Ok(mut events) => {
                // What happened before the stream began.
                if out.send(Signal::Relist).await.is_err() {
                    return;
                }
                while let Some(event) = events.next().await {
                    match event {
                        Ok(event) => {
                            if out.send(Signal::Event(event)).await.is_err() {
                                return;
                            }
                        }
                        Err(error) => {
                            debug!(%error, "the engine's events broke off");
                            break;
                        }
                    }
                }
            }
            Err(error) => debug!(%error, "no events from the engine"),
        }
        tokio::time::sleep(EVENTS_RETRY).await;
    }
}
