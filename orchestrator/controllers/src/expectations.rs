//! What a controller did and its cache does not show yet: until it does, counting would count wrong.
//!
//! After "create three pods" the cache still shows none for some milliseconds; a second look in that time would create
//! three more. So creations are awaited by number and deletions by UID before pods are counted again.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// What did not show up after this long never will (an event lost in a relist); count anew.
const TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Debug)]
struct Expected {
    creations: usize,
    deletions: HashSet<String>,
    since: Instant,
}

/// By UID of the owner.
#[derive(Debug, Default)]
pub(crate) struct Expectations {
    by_owner: Mutex<HashMap<String, Expected>>,
}

impl Expectations {
    /// Whether the cache shows all that was done for this owner.
    pub(crate) fn are_met(&self, owner: &str) -> bool {
        let mut by_owner = self.by_owner.lock();
        let met = by_owner.get(owner).is_none_or(|expected| {
            (expected.creations == 0 && expected.deletions.is_empty())
                || expected.since.elapsed() >= TIMEOUT
        });
        if met {
            by_owner.remove(owner);
        }
        met
    }

    fn change(&self, owner: &str, change: impl FnOnce(&mut Expected)) {
        let mut by_owner = self.by_owner.lock();
        let expected = by_owner.entry(owner.to_owned()).or_insert_with(|| Expected {
            creations: 0,
            deletions: HashSet::new(),
            since: Instant::now(),
        });
        change(expected);
    }

    /// Said before the request: the event may be there before the answer.
    pub(crate) fn expect_creations(&self, owner: &str, count: usize) {
        self.change(owner, |expected| expected.creations += count);
    }

    pub(crate) fn expect_deletion(&self, owner: &str, uid: &str) {
        self.change(owner, |expected| {
            expected.deletions.insert(uid.to_owned());
        });
    }

    /// One was seen, or failed.
    pub(crate) fn created(&self, owner: &str) {
        if let Some(expected) = self.by_owner.lock().get_mut(owner) {
            expected.creations = expected.creations.saturating_sub(1);
        }
    }

    /// It was seen, or failed.
    pub(crate) fn deleted(&self, owner: &str, uid: &str) {
        if let Some(expected) = self.by_owner.lock().get_mut(owner) {
            expected.deletions.remove(uid);
        }
    }

    pub(crate) fn forget(&self, owner: &str) {
        self.by_owner.lock().remove(owner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn work_waits_until_all_was_seen_or_the_time_is_over() {
        let expectations = Expectations::default();
        assert!(expectations.are_met("rs"));
        expectations.expect_creations("rs", 2);
        expectations.expect_deletion("rs", "pod");
        expectations.created("rs");
        expectations.created("rs");
        assert!(!expectations.are_met("rs"));
        expectations.deleted("rs", "pod");
        assert!(expectations.are_met("rs"));
        expectations.expect_creations("rs", 1);
        assert!(!expectations.are_met("rs"));
        tokio::time::advance(TIMEOUT).await;
        assert!(expectations.are_met("rs"));
    }
}
