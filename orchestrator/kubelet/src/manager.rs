//! Gives every pod of the node its worker, and wakes workers when the engine says that something happened.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::PathBuf;
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
/// Wait for the engine and the network before addresses are collected.
const COLLECT_RETRY: Duration = Duration::from_secs(1);
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
    /// Lists under way. They run beside the manager, so that a new pod does not wait for them.
    lists: JoinSet<Result<Vec<Container>, orch_cri::Error>>,
    tidying: JoinSet<()>,
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
            lists: JoinSet::new(),
            tidying: JoinSet::new(),
            stop,
        }
    }

    pub(crate) async fn run(mut self) {
        let (signals, mut received) = mpsc::channel(EVENT_BACKLOG);
        // Dropped with this function, which ends them.
        let mut helpers = JoinSet::new();
        helpers.spawn(listen(self.cx.clone(), signals));
        helpers.spawn(collect(self.cx.clone()));
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
                    Signal::Relist => self.list(),
                },
                _ = relist.tick() => self.list(),
                Some(found) = self.lists.join_next() => match found {
                    Ok(Ok(found)) => self.compare(found),
                    // The node's condition says so; pods are left alone.
                    Ok(Err(error)) => debug!(%error, "containers not listed"),
                    Err(error) => warn!(%error, "listing containers broke off"),
                },
                Some(_) = self.tidying.join_next() => {}
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

    /// Lists all containers of the node; [`Manager::compare`] follows.
    fn list(&mut self) {
        self.assign();
        // One may have begun before what is asked about happened; a third adds nothing.
        if self.lists.len() < 2 {
            let cx = self.cx.clone();
            self.lists.spawn(async move { cx.runtime().list(&[]).await });
        }
    }

    /// Wakes the workers of pods that look different, finds pods nobody wants, and tidies up.
    fn compare(&mut self, found: Vec<Container>) {
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
        if self.tidying.is_empty() {
            let folders = self.unused_folders(&found, &pods);
            self.tidying.spawn(tidy(self.cx.clone(), found, folders));
        }
    }

    /// Folders of pods that are gone. A UID never comes back, so they stay unused.
    fn unused_folders(
        &self,
        found: &[Container],
        pods: &BTreeMap<String, Arc<Pod>>,
    ) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.cx.options.paths.pods_dir()).into_iter().flatten();
        let unused = entries.flatten().filter(|entry| {
            let uid = entry.file_name().to_string_lossy().into_owned();
            !pods.contains_key(&uid)
                && !self.workers.contains_key(&uid)
                && !found.iter().any(|container| container.label(labels::POD_UID) == uid)
        });
        unused.map(|entry| entry.path()).collect()
    }
}

/// Frees networks and folders that nothing refers to, such as after the engine lost its containers.
async fn tidy(cx: Arc<Context>, found: Vec<Container>, folders: Vec<PathBuf>) {
    for sandbox in cx.network.pinned().await {
        if found.iter().any(|container| container.id == sandbox) {
            continue;
        }
        let unknown = PodRef { namespace: String::new(), name: String::new(), uid: String::new() };
        // The list is older than a sandbox that starts just now.
        let absent = matches!(cx.runtime().inspect(&sandbox).await, Ok(None));
        let place = Place::new(&unknown, &sandbox, cx.network.netns_path(&sandbox));
        if absent && let Err(error) = cx.network.remove(&place).await {
            warn!(sandbox, error, "network of a lost sandbox not released");
        }
    }
    let removed = tokio::task::spawn_blocking(move || {
        for folder in folders {
            if let Err(error) = volume::remove(&folder) {
                warn!(error, "folder of a former pod not removed");
            }
        }
    });
    if let Err(error) = removed.await {
        warn!(%error, "removing folders of former pods broke off");
    }
}

/// Frees, once, the addresses of sandboxes that no longer exist, as a crash or a reboot leaves them (CNI spec 1.1.0
/// §2, GC).
async fn collect(cx: Arc<Context>) {
    loop {
        {
            // No sandbox may be connected between the list and the collection.
            let Ok(_all) = cx.starts.acquire_many(cx.all_starts()).await else { return };
            let sandboxes = cx.runtime().list(&[(labels::CONTAINER, labels::SANDBOX)]).await;
            if let (Ok(sandboxes), Ok(())) = (sandboxes, cx.network.ready().await) {
                let valid = sandboxes.into_iter().map(|sandbox| sandbox.id).collect();
                if let Err(error) = cx.network.collect(valid).await {
                    warn!(error, "addresses of former pods not freed; the next start tries again");
                }
                return;
            }
        }
        tokio::time::sleep(COLLECT_RETRY).await;
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
