//! The watch cache: all objects of a resource in memory, with their recent history.
//!
//! ```text
//!  etcd ── one watch on /registry/ ──> Feed ──> Cache /registry/core/pods/   ──> Snapshot   (lists)
//!                                          └──> Cache /registry/core/nodes/  ──> Watcher    (watches)
//! ```
//!
//! **One watch for all resources.** etcd pays for every watch on every write, and it can only say "you have seen
//! everything up to revision R" in ways that older versions get wrong. With one watch over all that we store, nearly
//! every revision shows up on it, so [`Feed::fresh`] is a quorum read and a wait; see there for the rest.
//!
//! **No queue per watcher.** A cache keeps its recent events in one ring, and a [`Watcher`] is a place in that ring:
//! an event costs one push and one wake, however many watch, and a watcher that sleeps costs nothing. Its bound is the
//! ring's: one that falls behind by a whole ring overflows, its client comes back with the last revision it saw.
//!
//! **Revisions.** A cache is true at [`Cache::revision`]: it holds the effect of every event up to there and of none
//! after. After a gap in the store's history (etcd away for longer than [`HISTORY`](crate::compaction::HISTORY)) a
//! cache lists again and makes up the events from the difference. Watchers that were there go on over the gap; a new
//! one that starts from inside of it is [`TooOld`], because what happened there is unknown.
//!
//! Start reading at [`Cache`], then [`feed`](Feed), `history`, [`Watcher`].

mod event;
mod feed;
mod history;
mod object;
mod watcher;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use imbl::OrdMap;
use parking_lot::RwLock;
use tokio::sync::watch;
use tracing::{info, warn};

pub use event::{Event, EventKind};
pub use feed::{Feed, Stale};
use history::History;
pub use object::{Index, Meta, Object};
pub use watcher::{TooOld, WatchFrom, WatchItem, Watcher};

use crate::store::{Page, Revision, StoreEvent};

/// Waits between two tries to list.
const LIST_RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What a cache holds.
#[derive(Clone)]
pub struct CacheConfig {
    /// Keys that belong to it: `/registry/core/pods/`. Ends with a slash, or `pods` would be `podsecurity` too.
    pub prefix: String,
    /// Reads what the cache needs to know of an object. It gets the stored bytes.
    pub index: Index,
    /// Events kept at most. A watcher may fall behind by as many. See [`CacheConfig::RING`].
    pub ring: usize,
}

impl CacheConfig {
    /// A ring for most resources. Events older than 75 s leave it anyway once it holds more than a few; 8192 of them
    /// are a hundred a second, some 20 MB of pods.
    pub const RING: usize = 8192;

    /// The defaults for a prefix.
    pub fn new(prefix: impl Into<String>, index: Index) -> Self {
        Self { prefix: prefix.into(), index, ring: Self::RING }
    }
}

/// The objects below one prefix.
pub struct Cache {
    config: CacheConfig,
    feed: Arc<Feed>,
    state: RwLock<State>,
    /// Number of the newest event; wakes the watchers.
    head: watch::Sender<u64>,
    ready: watch::Sender<bool>,
}

struct State {
    objects: OrdMap<Arc<str>, Arc<Object>>,
    /// `objects` is true at this revision. 0 = not loaded.
    revision: Revision,
    history: History,
    /// Events that arrived before the first list did.
    early: Vec<StoreEvent>,
}

/// All objects at one revision. Cheap to make and to clone; it does not change any more.
#[derive(Clone)]
pub struct Snapshot {
    /// The revision at which it is true.
    pub revision: Revision,
    objects: OrdMap<Arc<str>, Arc<Object>>,
}

impl Snapshot {
    /// The object with this key.
    pub fn get(&self, key: &str) -> Option<&Arc<Object>> {
        self.objects.get(key)
    }

    /// Objects whose keys start with `prefix`, from `start` on (inclusive), in order of their keys.
    pub fn range<'a>(
        &'a self,
        prefix: &'a str,
        start: Option<&str>,
    ) -> impl Iterator<Item = &'a Arc<Object>> {
        let from = start.filter(|start| *start > prefix).unwrap_or(prefix);
        self.objects
            .range::<_, str>((std::ops::Bound::Included(from), std::ops::Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(_, object)| object)
    }

    /// All objects in order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.objects.iter().map(|(_, object)| object)
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

impl Cache {
    /// Starts to fill a cache, and keeps it up to date until the feed is cancelled.
    pub fn start(feed: &Arc<Feed>, config: CacheConfig) -> Arc<Cache> {
        debug_assert!(config.prefix.ends_with('/'), "{} would match siblings", config.prefix);
        let cache = Arc::new(Cache {
            state: RwLock::new(State {
                objects: OrdMap::new(),
                revision: 0,
                history: History::unloaded(config.ring),
                early: Vec::new(),
            }),
            config,
            feed: feed.clone(),
            head: watch::Sender::new(0),
            ready: watch::Sender::new(false),
        });
        feed.adopt(&cache);
        cache
    }

    /// Waits for the first list. `false` = the feed was cancelled before.
    pub async fn ready(&self) -> bool {
        let mut ready = self.ready.subscribe();
        tokio::select! {
            done = ready.wait_for(|ready| *ready) => done.is_ok(),
            () = self.feed.cancelled() => false,
        }
    }

    /// Whether the first list is done.
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Follows the number of the newest event: it changes whenever the objects do.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.head.subscribe()
    }

    /// The number of the newest event; the same number means the same objects, once the cache is ready.
    pub fn newest_event(&self) -> u64 {
        *self.head.borrow()
    }

    /// The keys it holds.
    pub fn prefix(&self) -> &str {
        &self.config.prefix
    }

    /// The revision at which the cache is true; 0 before it is ready.
    pub fn revision(&self) -> Revision {
        let fed = self.feed.revision();
        self.state.read().at(fed)
    }

    /// Waits until the cache is not older than the store was when this was called: what is read from it afterwards is
    /// as good as a read from the store.
    ///
    /// # Errors
    /// [`Stale`] when the store is out of reach or the cache has not caught up after `limit`.
    pub async fn fresh(&self, limit: Duration) -> Result<Revision, Stale> {
        self.feed
            .within(limit, async {
                self.loaded().await?;
                self.feed.fresh().await
            })
            .await
    }

    /// Waits until the cache is not older than `revision`, for at most `limit`.
    ///
    /// # Errors
    /// [`Stale::Behind`] with the revision the cache is at, when it does not get there.
    pub async fn wait_for(&self, revision: Revision, limit: Duration) -> Result<(), Stale> {
        self.feed
            .within(limit, async {
                self.loaded().await?;
                self.feed.wait_for(revision).await
            })
            .await
    }

    async fn loaded(&self) -> Result<(), Stale> {
        if self.ready().await { Ok(()) } else { Err(Stale::Cancelled) }
    }

    /// The object with this key, as old as the cache.
    pub fn get(&self, key: &str) -> Option<Arc<Object>> {
        self.state.read().objects.get(key).cloned()
    }

    /// All objects now.
    pub fn snapshot(&self) -> Snapshot {
        let fed = self.feed.revision();
        let state = self.state.read();
        Snapshot { revision: state.at(fed), objects: state.objects.clone() }
    }

    /// Follows the changes after some revision.
    ///
    /// # Errors
    /// [`TooOld`] when the cache does not know all of them any more.
    pub fn watch(self: &Arc<Self>, from: WatchFrom) -> Result<Watcher, TooOld> {
        let fed = self.feed.revision();
        let state = self.state.read();
        let after = match from {
            WatchFrom::Now => state.at(fed),
            WatchFrom::Revision(revision) => revision,
        };
        let cursor = state.history.after(after)?;
        Ok(Watcher::new(self.clone(), self.head.subscribe(), cursor, after))
    }

    /// All objects and, without a gap, what happens to them afterwards.
    pub fn snapshot_and_watch(self: &Arc<Self>) -> (Snapshot, Watcher) {
        let fed = self.feed.revision();
        let state = self.state.read();
        let revision = state.at(fed);
        let snapshot = Snapshot { revision, objects: state.objects.clone() };
        (
            snapshot,
            Watcher::new(self.clone(), self.head.subscribe(), state.history.head(), revision),
        )
    }

    /// The first list, with all that happened meanwhile. `false` = it is from before a gap in the feed; list again.
    fn load(&self, page: Page) -> bool {
        let mut state = self.state.write();
        // Looked at under the lock: either we see the gap here, or the feed sees our old revision there.
        if page.revision < self.feed.gap_end() {
            return false;
        }
        let mut objects = OrdMap::new();
        for kv in page.items {
            if let Some(object) = self.object(&kv.key, &kv.value, kv.mod_revision) {
                objects.insert(object.key.clone(), object);
            }
        }
        state.objects = objects;
        state.revision = page.revision;
        state.history = History::new(page.revision, self.config.ring);
        let early = std::mem::take(&mut state.early);
        info!(
            prefix = self.config.prefix,
            revision = page.revision,
            objects = state.objects.len(),
            "cache loaded"
        );
        self.append(&mut state, early);
        let head = state.history.head();
        drop(state);
        self.wake(head);
        self.ready.send_replace(true);
        true
    }

    /// The events of one batch, in order.
    fn apply(&self, events: Vec<StoreEvent>) {
        let mut state = self.state.write();
        if state.revision == 0 {
            state.early.extend(events);
            return;
        }
        self.append(&mut state, events);
        let head = state.history.head();
        drop(state);
        self.wake(head);
    }

    fn append(&self, state: &mut State, events: Vec<StoreEvent>) {
        // What the list showed already. A revision comes whole, in one batch, so this drops nothing that is new.
        let seen = state.revision;
        for event in events.into_iter().filter(|event| event.revision > seen) {
            state.revision = event.revision;
            if let Some(event) = self.event(state, event) {
                state.history.push(event);
            }
        }
    }

    /// Takes one change over into the objects.
    fn event(&self, state: &mut State, event: StoreEvent) -> Option<Arc<Event>> {
        match event.value {
            Some(value) => {
                let object = self.object(&event.key, &value, event.revision)?;
                let previous = state.objects.insert(object.key.clone(), object.clone());
                let kind = if previous.is_some() { EventKind::Modified } else { EventKind::Added };
                Some(Arc::new(Event::new(kind, object, previous)))
            }
            None => {
                let previous = state.objects.remove(event.key.as_str())?;
                let last = Arc::new(previous.at(event.revision));
                Some(Arc::new(Event::new(EventKind::Deleted, last, Some(previous))))
            }
        }
    }

    /// A list after a gap in the feed that began after `from`: makes up the events that lead over it.
    fn resync(&self, from: Revision, page: Page) {
        let mut state = self.state.write();
        // A cache that was loaded late may be ahead of the feed.
        let from = from.max(state.revision);
        let mut gone = state.objects.clone();
        let mut changed = Vec::new();
        for kv in page.items {
            let known = gone.remove(kv.key.as_str());
            if known.is_none_or(|known| known.revision != kv.mod_revision) {
                changed.push(StoreEvent {
                    created: kv.create_revision == kv.mod_revision,
                    key: kv.key,
                    value: Some(kv.value),
                    revision: kv.mod_revision,
                });
            }
        }
        // When they were deleted nobody knows, only that it was inside of the gap. Each gets a revision of its own that
        // no change has: a client that goes away between two of them comes back with a revision from inside the gap
        // and is sent to list again, while the end of the gap is only ever seen by those who have all of it.
        let used: HashSet<Revision> = changed.iter().map(|event| event.revision).collect();
        let mut free = (from + 1..=page.revision).rev().filter(|revision| !used.contains(revision));
        let deleted = gone.iter().map(|(key, _)| StoreEvent {
            key: key.to_string(),
            value: None,
            revision: free.next().unwrap_or(from + 1),
            created: false,
        });
        let mut events: Vec<_> = deleted.chain(changed).collect();
        events.sort_by_key(|event| event.revision);
        info!(
            prefix = self.config.prefix,
            from,
            to = page.revision,
            changes = events.len(),
            "cache listed again"
        );
        state.history.gap(from, page.revision);
        for event in events {
            if let Some(event) = self.event(&mut state, event) {
                state.history.push(event);
            }
        }
        state.revision = page.revision;
        let head = state.history.head();
        drop(state);
        self.wake(head);
    }

    /// Whether the objects are older than the end of a gap.
    fn needs_resync(&self, gap_end: Revision) -> bool {
        let revision = self.state.read().revision;
        revision != 0 && revision < gap_end
    }

    fn wake(&self, head: u64) {
        self.head.send_if_modified(|known| std::mem::replace(known, head) != head);
    }

    fn object(&self, key: &str, value: &[u8], revision: Revision) -> Option<Arc<Object>> {
        match Object::new(key, value, revision, &self.config.index) {
            Ok(object) => Some(Arc::new(object)),
            Err(error) => {
                // One broken object shall not take the whole resource away.
                warn!(key, revision, error, "the stored object cannot be read, it stays invisible");
                None
            }
        }
    }
}

impl State {
    /// The revision at which the objects are true, when the feed was at `fed` a moment *before* the lock was taken:
    /// the feed counts a revision only after all caches have it.
    fn at(&self, fed: Revision) -> Revision {
        if self.revision == 0 { 0 } else { self.revision.max(fed) }
    }
}
