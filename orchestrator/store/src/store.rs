//! The contract of a store.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

/// A point in the store's history. Every write makes a new one, greater than all before it.
pub type Revision = i64;

/// A key with its value at some revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// Full key, such as `/registry/core/pods/default/web-0`.
    pub key: String,
    /// The stored bytes.
    pub value: Bytes,
    /// Revision at which the key came to be.
    pub create_revision: Revision,
    /// Revision of the last write; what [`Store::update`] and [`Store::delete`] compare with.
    pub mod_revision: Revision,
    /// Lease the key hangs on; 0 = lives until it is deleted.
    pub lease: i64,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Keys in ascending order.
    pub items: Vec<KeyValue>,
    /// Revision at which the list is true. The next page is read at this one.
    pub revision: Revision,
    /// Whether keys are left after the last item.
    pub more: bool,
    /// How many.
    pub remaining: i64,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreEvent {
    /// The key that changed.
    pub key: String,
    /// Its new value; `None` = deleted. There is no previous value: the one reader of events, the cache, knows what
    /// it held before, and etcd would have to read each one from disk to tell.
    pub value: Option<Bytes>,
    /// Revision of the change.
    pub revision: Revision,
    /// Whether the key is new.
    pub created: bool,
}

/// A key without meaning of its own, which writers renew with every decision that must not cross another one's: of two
/// that decided from the same state, the second one is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// Its full key.
    pub key: String,
    /// Revision at which it was read, before the decision; 0 = it is absent.
    pub revision: Revision,
}

/// What a watch delivers at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    /// All events up to and including this revision have been delivered with this batch.
    pub revision: Revision,
    /// In order of revision. A revision is never split over two batches. Empty = progress only.
    pub events: Vec<StoreEvent>,
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// [`Store::create`] on a key that is there.
    #[error("the key exists already")]
    AlreadyExists,
    /// The key is at another revision than the one expected, or gone.
    #[error("the key has changed: {}", match current { Some(kv) => format!("it is at revision {} now", kv.mod_revision), None => "it is gone".to_owned() })]
    Conflict {
        /// What is there instead.
        current: Option<KeyValue>,
    },
    /// [`Store::write_guarded`]: another writer renewed the guard meanwhile. What was decided before has to be decided
    /// again.
    #[error("another server decided meanwhile")]
    Overtaken,
    /// The history asked for is gone.
    #[error("the revision has been compacted; history starts at {oldest}")]
    Compacted {
        /// First revision that is left; 0 = the store did not say.
        oldest: Revision,
    },
    /// The revision asked for has not happened yet.
    #[error("the revision lies in the future")]
    Future,
    /// The value does not fit into one write.
    #[error("the value is too large for the store: {0}")]
    TooLarge(String),
    /// The store is out of reach, without a leader, full or too slow. A write that ends like this may have happened.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// What must be a mistake of ours or of the set-up.
    #[error("store: {0}")]
    Internal(String),
}

impl StoreError {
    /// Whether trying again later may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, StoreError::Unavailable(_))
    }
}

/// A revisioned key-value store.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The newest state of a key, and the store's revision at that time.
    async fn get(&self, key: &str) -> Result<(Option<KeyValue>, Revision), StoreError>;

    /// Keys that start with `prefix`, from the full key `start` on (inclusive), at most `limit` (0 = all), as they were
    /// `at` a revision (`None` = now).
    ///
    /// # Errors
    /// [`StoreError::Compacted`] and [`StoreError::Future`] when `at` cannot be served.
    async fn list(
        &self,
        prefix: &str,
        start: Option<&str>,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<Page, StoreError>;

    /// Writes a key that must be absent. With a `ttl` the key goes away by itself, not earlier than that.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`].
    async fn create(
        &self,
        key: &str,
        value: Bytes,
        ttl: Option<Duration>,
    ) -> Result<Revision, StoreError>;

    /// Replaces a key that must be at revision `expected`.
    ///
    /// # Errors
    /// [`StoreError::Conflict`].
    async fn update(
        &self,
        key: &str,
        value: Bytes,
        expected: Revision,
        ttl: Option<Duration>,
    ) -> Result<Revision, StoreError>;

    /// Writes a key that must be at revision `expected` (0 = absent), and renews `guard` in the same transaction if nobody
    /// has done so since it was read.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] and [`StoreError::Conflict`] as for [`Store::create`] and [`Store::update`];
    /// [`StoreError::Overtaken`] if only the guard differs.
    async fn write_guarded(
        &self,
        key: &str,
        value: Bytes,
        expected: Revision,
        guard: &Guard,
    ) -> Result<Revision, StoreError>;

    /// Deletes a key that must be at revision `expected`; returns the revision of the deletion.
    ///
    /// # Errors
    /// [`StoreError::Conflict`].
    async fn delete(&self, key: &str, expected: Revision) -> Result<Revision, StoreError>;

    /// Writes a key whatever is there, only to make an event (see [`cache::Feed::fresh`](crate::cache::Feed::fresh)).
    async fn touch(&self, key: &str) -> Result<Revision, StoreError>;

    /// All changes below `prefix` from revision `from` on (inclusive), complete and in order. The stream ends with an
    /// error item when it breaks; the reader then watches again from where it got to.
    ///
    /// # Errors
    /// [`StoreError::Compacted`], at once or as an item, when history from there on is gone.
    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<WatchBatch, StoreError>>, StoreError>;

    /// The newest revision, by a quorum read: not older than any write that was answered before the call.
    async fn revision(&self) -> Result<Revision, StoreError>;

    /// Forgets history before `at`. Doing it twice is fine.
    async fn compact(&self, at: Revision) -> Result<(), StoreError>;

    /// Whether the store can serve reads and writes now.
    async fn healthy(&self) -> Result<(), StoreError>;
}

/// The first key after all keys that start with `prefix`; "\0" (etcd's "no end") when there is none.
pub fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_of_pods_ends_before_podsx() {
        let end = prefix_end("/registry/core/pods/");
        assert_eq!(end, b"/registry/core/pods0");
        assert!(end.as_slice() < b"/registry/core/podsx/a".as_slice());
        assert_eq!(prefix_end(""), [0]);
    }
}
