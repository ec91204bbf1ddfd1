//! Which pod is next.
//!
//! A waiting pod is in one of four places: *active* (ready to be tried, by priority, then by age), *backing off*
//! after a failure (1 s, doubling to 10 s), *unschedulable* until something changes that could help it, or *gated*
//! by its own scheduling gates. Time is an argument; nothing here waits.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::filter::Plugins;
use crate::pod_info::{PodInfo, Uid};

const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MOST: Duration = Duration::from_secs(10);
/// A pod is tried again after this long even if nothing that should help it has happened: a net below the hints.
const LEFTOVER_AFTER: Duration = Duration::from_secs(5 * 60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Active {
        turn: u64,
    },
    /// `strict` pods wait their time out even when nothing else is to do.
    BackingOff {
        until: Instant,
        strict: bool,
    },
    Unschedulable {
        since: Instant,
    },
    Gated,
    /// Handed out by [`Queue::pop`].
    InHand,
}

#[derive(Debug)]
struct Entry {
    pod: Arc<PodInfo>,
    attempts: u32,
    failed_at: Option<Instant>,
    rejected_by: Plugins,
    place: Place,
}

/// The waiting pods.
#[derive(Debug, Default)]
pub struct Queue {
    entries: HashMap<Uid, Entry>,
    active: BTreeSet<(Reverse<i32>, u64, Uid)>,
    backing_off: BTreeSet<(Instant, Uid)>,
    unschedulable: BTreeSet<(Instant, Uid)>,
    turns: u64,
}

impl Queue {
    /// How many pods wait, wherever.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no pod waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds a pod, or takes note of a change to one that waits. Only a change that placement depends on gives it
    /// another try.
    pub fn set(&mut self, pod: Arc<PodInfo>) {
        let gated = pod.gates().next().is_some();
        let uid = pod.uid.clone();
        let Some(entry) = self.entries.get_mut(&uid) else {
            let entry = Entry {
                pod,
                attempts: 0,
                failed_at: None,
                rejected_by: Plugins::default(),
                place: Place::Gated,
            };
            self.entries.insert(uid.clone(), entry);
            if !gated {
                self.activate(&uid);
            }
            return;
        };
        let same = entry.pod.schedules_like(&pod);
        let place = entry.place;
        if same || place == Place::InHand {
            entry.pod = pod;
            return;
        }
        // The priority is part of the place in the heap, so leave with the old one.
        self.leave(&uid);
        if let Some(entry) = self.entries.get_mut(&uid) {
            entry.pod = pod;
            entry.place = Place::Gated;
        }
        if !gated {
            self.activate(&uid);
        }
    }

    /// Forgets a pod: it is bound, or gone.
    pub fn remove(&mut self, uid: &str) {
        self.leave(uid);
        self.entries.remove(uid);
    }

    /// The pod as last seen, while it waits.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<&Arc<PodInfo>> {
        self.entries.get(uid).map(|entry| &entry.pod)
    }

    fn leave(&mut self, uid: &str) {
        let Some(entry) = self.entries.get(uid) else { return };
        match entry.place {
            Place::Active { turn } => {
                self.active.remove(&(Reverse(entry.pod.priority), turn, entry.pod.uid.clone()));
            }
            Place::BackingOff { until, .. } => {
                self.backing_off.remove(&(until, entry.pod.uid.clone()));
            }
            Place::Unschedulable { since } => {
                self.unschedulable.remove(&(since, entry.pod.uid.clone()));
            }
            Place::Gated | Place::InHand => {}
        }
    }

    fn activate(&mut self, uid: &str) {
        self.leave(uid);
        self.turns += 1;
        let turn = self.turns;
        if let Some(entry) = self.entries.get_mut(uid) {
            entry.place = Place::Active { turn };
            self.active.insert((Reverse(entry.pod.priority), turn, entry.pod.uid.clone()));
        }
    }

    fn back_off(&mut self, uid: &str, strict: bool) {
        self.leave(uid);
        if let Some(entry) = self.entries.get_mut(uid)
            && let Some(failed_at) = entry.failed_at
        {
            let until = failed_at + backoff(entry.attempts);
            entry.place = Place::BackingOff { until, strict };
            self.backing_off.insert((until, entry.pod.uid.clone()));
        }
    }

    /// The next pod to try: from the active ones, or, when there are none, the one that has waited out most of its
    /// back-off.
    pub fn pop(&mut self, now: Instant) -> Option<Arc<PodInfo>> {
        self.flush(now);
        let uid = match self.active.pop_first() {
            Some((_, _, uid)) => uid,
            None => {
                let early = |(_, uid): &&(Instant, Uid)| {
                    self.entries.get(uid).is_some_and(|entry| {
                        matches!(entry.place, Place::BackingOff { strict: false, .. })
                    })
                };
                let key = self.backing_off.iter().find(early)?.clone();
                self.backing_off.remove(&key);
                key.1
            }
        };
        let entry = self.entries.get_mut(&uid)?;
        entry.place = Place::InHand;
        entry.attempts += 1;
        Some(entry.pod.clone())
    }

    /// The pod fits nowhere: it waits until something happens that one of these plugins looks at.
    pub fn unschedulable(&mut self, uid: &str, rejected_by: Plugins, now: Instant) {
        self.leave(uid);
        if let Some(entry) = self.entries.get_mut(uid) {
            entry.failed_at = Some(now);
            entry.rejected_by = rejected_by;
            entry.place = Place::Unschedulable { since: now };
            self.unschedulable.insert((now, entry.pod.uid.clone()));
        }
    }

    /// The attempt failed for a reason outside the pod, such as a binding that did not reach the API server: it is
    /// tried again after its back-off.
    pub fn retry(&mut self, uid: &str, now: Instant) {
        if let Some(entry) = self.entries.get_mut(uid) {
            entry.failed_at = Some(now);
            self.back_off(uid, true);
        }
    }

    /// Something happened: every unschedulable pod that it could help leaves its place.
    pub fn wake(&mut self, mut helps: impl FnMut(&PodInfo, Plugins) -> bool) {
        let entries = &self.entries;
        let woken: Vec<Uid> = self
            .unschedulable
            .iter()
            .filter(|(_, uid)| {
                entries.get(uid).is_some_and(|entry| helps(&entry.pod, entry.rejected_by))
            })
            .map(|(_, uid)| uid.clone())
            .collect();
        for uid in woken {
            self.back_off(&uid, false);
        }
    }

    /// Moves pods whose time has come to the active ones.
    fn flush(&mut self, now: Instant) {
        while let Some((until, uid)) = self.backing_off.first().cloned() {
            if until > now {
                break;
            }
            self.activate(&uid);
        }
        while let Some((since, uid)) = self.unschedulable.first().cloned() {
            if since + LEFTOVER_AFTER > now {
                break;
            }
            self.activate(&uid);
        }
    }

    /// When to call [`Queue::pop`] again if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let leftover = self.unschedulable.first().map(|(since, _)| *since + LEFTOVER_AFTER);
        let backing_off = self.backing_off.first().map(|(until, _)| *until);
        backing_off.into_iter().chain(leftover).min()
    }
}

fn backoff(attempts: u32) -> Duration {
    let doublings = attempts.saturating_sub(1).min(10);
    BACKOFF_FIRST.saturating_mul(1 << doublings).min(BACKOFF_MOST)
}

#[cfg(test)]
mod tests;
