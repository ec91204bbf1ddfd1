//! The one watch on the store that fills all caches.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use parking_lot::RwLock;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::{Cache, LIST_RETRY};
use crate::store::{Page, Revision, Store, StoreError, StoreEvent, WatchBatch};

/// How long the watch may take to show a revision before we make it (see [`Feed::fresh`]). An event takes about 1 ms,
/// 12 at the 99th percentile.
const FENCE_AFTER: Duration = Duration::from_millis(50);
/// Key of the fences, below the root: no resource has an empty group.
const FENCE_KEY: &str = ".fence";
/// Waits between two tries to watch.
const WATCH_RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// A watch that is broken for this long is lost: what the caches hold may be old. Longer than a restart of etcd takes and than
/// its elections.
const LOST_AFTER: Duration = Duration::from_secs(10);
/// A new watch that lives for this long works.
const STEADY: Duration = Duration::from_secs(3);
/// Batches taken at once when they come faster than we work: one wake of the watchers for all of them.
const CHUNK: usize = 64;

/// Why a cache is not as new as asked for.
#[derive(Debug, thiserror::Error)]
pub enum Stale {
    /// It did not get there in time.
    #[error("the cache is at revision {at}")]
    Behind {
        /// Where it is.
        at: Revision,
    },
    /// The store cannot tell what is newest.
    #[error(transparent)]
    Store(StoreError),
    /// The feed has ended.
    #[error("the cache has been stopped")]
    Cancelled,
}

/// One watch on all keys below a root, and the caches it fills.
pub struct Feed {
    store: Arc<dyn Store>,
    root: String,
    /// All caches hold the effect of all events up to this revision.
    applied: watch::Sender<Revision>,
    caches: RwLock<BTreeMap<String, Arc<Cache>>>,
    /// The watch is complete from here on; a list that is older than this cannot be continued by it.
    gap_end: AtomicI64,
    /// Whether the watch is broken for longer than [`LOST_AFTER`].
    lost: watch::Sender<bool>,
    cancel: CancellationToken,
    tasks: TaskTracker,
    /// Callers of [`Self::fresh`] so far.
    arrivals: AtomicU64,
    served: Mutex<Served>,
    /// Revision of the newest fence.
    fence: Mutex<Revision>,
}

/// The newest quorum read.
#[derive(Default)]
struct Served {
    /// It began after this many callers had arrived.
    arrivals: u64,
    revision: Revision,
}

impl Feed {
    /// Starts to watch all keys below `root` (`/registry/`) until cancelled.
    pub fn start(
        store: Arc<dyn Store>,
        root: impl Into<String>,
        cancel: CancellationToken,
    ) -> Arc<Feed> {
        let feed = Arc::new(Feed {
            store,
            root: root.into(),
            applied: watch::Sender::new(0),
            caches: RwLock::default(),
            gap_end: AtomicI64::new(0),
            lost: watch::Sender::new(false),
            cancel,
            tasks: TaskTracker::new(),
            arrivals: AtomicU64::new(0),
            served: Mutex::default(),
            fence: Mutex::new(0),
        });
        let running = feed.clone();
        feed.tasks.spawn(async move {
            running.cancel.run_until_cancelled(running.run()).await;
            // They hold the feed, and the feed holds them.
            running.caches.write().clear();
        });
        feed
    }

    /// Waits until all tasks of the feed have ended. They do when it is cancelled.
    pub async fn ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// The revision that all caches have reached; 0 before the store was seen.
    pub fn revision(&self) -> Revision {
        *self.applied.borrow()
    }

    /// Whether the caches stand still because the store cannot be watched, for longer than a restart of it takes. Whoever
    /// reads from here may then read old things for ever, and does better somewhere else.
    pub fn lost(&self) -> watch::Receiver<bool> {
        self.lost.subscribe()
    }

    /// Waits until all caches are at least as new as the store is now.
    ///
    /// A quorum read tells the store's revision R, then the watch has to get there. It does so by itself, unless R is
    /// somebody else's write outside of our root (a node's subnet lease): no event of ours will ever carry R or more.
    /// Asking etcd for its progress would answer that, but before 3.4.25 and 3.5.8 the answer may overtake events that
    /// are still on their way (etcd issue 15220; KEP-2340), and Debian's 3.4.23 is such a one. So we make an event
    /// ourselves, a *fence*: events arrive in order on every version, hence when it arrives, all before it have.
    /// Deletions count like any other event. It costs one small write per foreign write, only if somebody reads.
    ///
    /// Concurrent callers share reads and fences.
    ///
    /// # Errors
    /// [`Stale::Store`] when the store cannot be asked.
    pub async fn fresh(&self) -> Result<Revision, Stale> {
        let ticket = self.arrivals.fetch_add(1, Ordering::SeqCst) + 1;
        let revision = {
            let mut served = self.served.lock().await;
            // A read serves all who came before it began.
            if served.arrivals < ticket {
                let arrivals = self.arrivals.load(Ordering::SeqCst);
                let revision = self.store.revision().await.map_err(Stale::Store)?;
                *served = Served { arrivals, revision };
            }
            served.revision
        };
        if tokio::time::timeout(FENCE_AFTER, self.reach(revision)).await.is_err() {
            let mut fence = self.fence.lock().await;
            if *fence < revision && self.revision() < revision {
                *fence = self
                    .store
                    .touch(&format!("{}{FENCE_KEY}", self.root))
                    .await
                    .map_err(Stale::Store)?;
                debug!(revision, fence = *fence, "fence written");
            }
            drop(fence);
            self.reach(revision).await;
        }
        Ok(revision)
    }

    /// Waits until all caches have reached `revision`.
    pub(super) async fn wait_for(&self, revision: Revision) -> Result<(), Stale> {
        if tokio::time::timeout(FENCE_AFTER, self.reach(revision)).await.is_err() {
            // It may be a revision that no event of ours carries.
            self.fresh().await?;
            self.reach(revision).await;
        }
        Ok(())
    }

    async fn reach(&self, revision: Revision) {
        let mut applied = self.applied.subscribe();
        applied.wait_for(|at| *at >= revision).await.expect("we hold the sender");
    }

    /// Runs a wait with a deadline, and ends it with the feed.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        wait: impl Future<Output = Result<T, Stale>>,
    ) -> Result<T, Stale> {
        tokio::select! {
            biased;
            done = tokio::time::timeout(limit, wait) => done.unwrap_or(Err(Stale::Behind { at: self.revision() })),
            () = self.cancel.cancelled() => Err(Stale::Cancelled),
        }
    }

    pub(super) async fn cancelled(&self) {
        self.cancel.cancelled().await;
    }

    pub(super) fn gap_end(&self) -> Revision {
        self.gap_end.load(Ordering::SeqCst)
    }

    /// Takes a new cache in: its events are collected from now on, so a list that begins now continues seamlessly.
    pub(super) fn adopt(self: &Arc<Self>, cache: &Arc<Cache>) {
        self.caches.write().insert(cache.prefix().to_owned(), cache.clone());
        let (feed, cache) = (self.clone(), cache.clone());
        self.tasks.spawn(async move {
            let load = async {
                while !cache.load(feed.list(&cache).await) {
                    debug!(prefix = cache.prefix(), "the list is older than the watch, list again");
                }
            };
            feed.cancel.run_until_cancelled(load).await;
        });
    }

    async fn list(&self, cache: &Cache) -> Page {
        let mut pause = LIST_RETRY.0;
        loop {
            match self.store.list(cache.prefix(), None, 0, None).await {
                Ok(page) => return page,
                Err(error) => warn!(prefix = cache.prefix(), %error, "list for the cache"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LIST_RETRY.1);
        }
    }

    async fn run(&self) {
        let mut position = self.rebase(0).await;
        let mut pause = WATCH_RETRY.0;
        let mut broken = None;
        loop {
            let error = match self.store.watch(&self.root, position + 1).await {
                Ok(stream) => {
                    let mut chunks = stream.ready_chunks(CHUNK);
                    loop {
                        // A member without leader takes a watch and ends it at once: only time or an event tells.
                        let next = match broken {
                            Some(_) => tokio::time::timeout(STEADY, chunks.next()).await,
                            None => Ok(chunks.next().await),
                        };
                        let works = match &next {
                            Ok(Some(chunk)) => chunk.iter().any(Result::is_ok),
                            Ok(None) => false,
                            Err(_) => true,
                        };
                        if works && broken.take().is_some() {
                            self.lost.send_replace(false);
                        }
                        let Ok(next) = next else { continue };
                        let Some(chunk) = next else {
                            break StoreError::Unavailable("the watch has ended".to_owned());
                        };
                        let (batches, error) = split(chunk);
                        if !batches.is_empty() {
                            position = self.dispatch(batches).max(position);
                            pause = WATCH_RETRY.0;
                        }
                        if let Some(error) = error {
                            break error;
                        }
                    }
                }
                Err(error) => error,
            };
            if let StoreError::Compacted { oldest } = error {
                warn!(position, oldest, "history is gone, all caches are listed again");
                position = self.rebase(position).await;
                continue;
            }
            let since = *broken.get_or_insert_with(Instant::now);
            if since.elapsed() >= LOST_AFTER && !self.lost.send_replace(true) {
                warn!(position, %error, "the store is lost: watches on the caches end");
            }
            info!(position, %error, "the watch on the store broke, it goes on where it was");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(WATCH_RETRY.1);
        }
    }

    /// Begins anew at the store's present, over a gap that starts after `from`.
    async fn rebase(&self, from: Revision) -> Revision {
        let mut pause = WATCH_RETRY.0;
        let end = loop {
            match self.store.revision().await {
                Ok(revision) => break revision,
                Err(error) => warn!(%error, "read the store's revision"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(WATCH_RETRY.1);
        };
        // Said before the caches are looked at: one that is loaded meanwhile with an older list sees it and lists again.
        self.gap_end.store(end, Ordering::SeqCst);
        let caches: Vec<_> = self.caches.read().values().cloned().collect();
        for cache in caches {
            if cache.needs_resync(end) {
                let page = self.list(&cache).await;
                cache.resync(from, page);
            }
        }
        self.applied.send_replace(end);
        end
    }

    /// Hands the events out to the caches; returns the revision reached.
    fn dispatch(&self, batches: Vec<WatchBatch>) -> Revision {
        let mut shares: Vec<(Arc<Cache>, Vec<StoreEvent>)> = Vec::new();
        let mut revision = 0;
        for batch in batches {
            revision = batch.revision.max(revision);
            for event in batch.events {
                let Some(cache) = self.cache_of(&event.key) else { continue };
                match shares.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &cache)) {
                    Some((_, events)) => events.push(event),
                    None => shares.push((cache, vec![event])),
                }
            }
        }
        for (cache, events) in shares {
            cache.apply(events);
        }
        // Last: who sees this revision finds its effects everywhere.
        self.applied.send_if_modified(|at| {
            let newer = *at < revision;
            *at = revision.max(*at);
            newer
        });
        revision
    }

    fn cache_of(&self, key: &str) -> Option<Arc<Cache>> {
        let caches = self.caches.read();
        // Prefixes end in a slash and none lies below another, so it is the last one not after the key.
        let (prefix, cache) =
            caches.range::<str, _>((Bound::Unbounded, Bound::Included(key))).next_back()?;
        key.starts_with(prefix.as_str()).then(|| cache.clone())
    }
}

/// The batches before the first error, and the error.
fn split(chunk: Vec<Result<WatchBatch, StoreError>>) -> (Vec<WatchBatch>, Option<StoreError>) {
    let mut batches = Vec::with_capacity(chunk.len());
    for item in chunk {
        match item {
            Ok(batch) => batches.push(batch),
            Err(error) => return (batches, Some(error)),
        }
    }
    (batches, None)
}
