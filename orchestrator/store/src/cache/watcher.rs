//! Following a cache.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::Cache;
use super::event::Event;
use crate::store::Revision;

/// Events taken from the ring at once: few wakes and locks in a burst, and still little memory per watcher.
const CHUNK: usize = 64;

/// Where a watch starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchFrom {
    /// Events after this revision.
    Revision(Revision),
    /// Events from now on.
    Now,
}

/// The cache does not know all events after the revision asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too old resource version: {asked} ({oldest})")]
pub struct TooOld {
    /// What was asked for.
    pub asked: Revision,
    /// The oldest revision that would have been all right.
    pub oldest: Revision,
}

/// What a watcher gets.
#[derive(Debug, Clone)]
pub enum WatchItem {
    /// A change.
    Event(Arc<Event>),
    /// No change, but all up to this revision has been delivered. Only with [`Watcher::bookmark_every`].
    Bookmark(Revision),
    /// The watcher was too slow, and events were lost to it. Nothing comes after this.
    Overflow,
}

/// A place in the history of a cache.
pub struct Watcher {
    cache: Arc<Cache>,
    head: watch::Receiver<u64>,
    /// Number of the next event to take from the ring.
    cursor: u64,
    /// Events up to here are none of ours. A watch may start ahead of the cache.
    after: Revision,
    /// Events up to here have been delivered.
    position: Revision,
    taken: VecDeque<Arc<Event>>,
    bookmarks: Option<Interval>,
    over: bool,
}

impl Watcher {
    pub(super) fn new(
        cache: Arc<Cache>,
        head: watch::Receiver<u64>,
        cursor: u64,
        after: Revision,
    ) -> Self {
        Self {
            cache,
            head,
            cursor,
            after,
            position: after,
            taken: VecDeque::new(),
            bookmarks: None,
            over: false,
        }
    }

    /// Makes [`next`](Self::next) tell the position now and then.
    pub fn bookmark_every(&mut self, period: Duration) {
        let mut interval = tokio::time::interval_at(Instant::now() + period, period);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.bookmarks = Some(interval);
    }

    /// The newest revision up to which all events have been delivered: what a bookmark carries.
    pub fn position(&mut self) -> Revision {
        // Read before the ring: the feed counts a revision only after its events are in all rings.
        let revision = self.cache.revision();
        if self.taken.is_empty()
            && !self.over
            && self.cache.state.read().history.head() == self.cursor
        {
            self.position = self.position.max(revision);
        }
        self.position
    }

    /// The next item; `None` when the cache has ended, or after an overflow.
    ///
    /// # Cancel safety
    /// Nothing is lost when it is dropped.
    pub async fn next(&mut self) -> Option<WatchItem> {
        loop {
            if let Some(item) = self.try_next() {
                return Some(item);
            }
            if self.over {
                return None;
            }
            let bookmark = async {
                match &mut self.bookmarks {
                    Some(interval) => interval.tick().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = self.head.changed() => changed.ok()?,
                () = self.cache.feed.cancelled() => return None,
                _ = bookmark => return Some(WatchItem::Bookmark(self.position())),
            }
        }
    }

    /// The next event if there is one already.
    pub fn try_next(&mut self) -> Option<WatchItem> {
        loop {
            while let Some(event) = self.taken.pop_front() {
                if event.revision > self.after {
                    self.position = self.position.max(event.revision);
                    return Some(WatchItem::Event(event));
                }
            }
            if self.over {
                return None;
            }
            self.head.mark_unchanged();
            let state = self.cache.state.read();
            let Some(events) = state.history.read(self.cursor, CHUNK) else {
                self.over = true;
                return Some(WatchItem::Overflow);
            };
            self.taken.extend(events.cloned());
            self.cursor += self.taken.len() as u64;
            if self.taken.is_empty() {
                return None;
            }
        }
    }
}
