//! The ring of recent events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::event::Event;
use super::watcher::TooOld;
use crate::store::Revision;

/// Events are kept at least this long while the ring has room: a client that lost its connection, or that a rolling
/// restart sent to another server, comes back within it (Kubernetes keeps 75 s too).
const KEEP: Duration = Duration::from_secs(75);
/// This many are kept however old they are.
const KEEP_AT_LEAST: usize = 128;

/// Events are numbered from 1 on; the ring holds `first..head()`.
pub(super) struct History {
    events: VecDeque<(Instant, Arc<Event>)>,
    first: u64,
    capacity: usize,
    /// All events after this revision are in the ring.
    floor: Revision,
    /// `(from, to)`: what happened after `from` and before `to` is unknown; the ring leads from one to the other.
    gaps: Vec<(Revision, Revision)>,
}

impl History {
    /// A history that begins after `floor`.
    pub(super) fn new(floor: Revision, capacity: usize) -> Self {
        // Number 0 is left out: who got it from an unloaded history has missed the first list.
        Self {
            events: VecDeque::new(),
            first: 1,
            capacity: capacity.max(1),
            floor,
            gaps: Vec::new(),
        }
    }

    /// A history that knows nothing yet: every revision is too old for it.
    pub(super) fn unloaded(capacity: usize) -> Self {
        Self { first: 0, ..Self::new(Revision::MAX, capacity) }
    }

    /// Number that the next event will get.
    pub(super) fn head(&self) -> u64 {
        self.first + self.events.len() as u64
    }

    pub(super) fn push(&mut self, event: Arc<Event>) {
        let now = Instant::now();
        self.events.push_back((now, event));
        while self.events.len() > self.capacity
            || (self.events.len() > KEEP_AT_LEAST.min(self.capacity)
                && self.events.front().is_some_and(|(at, _)| now.duration_since(*at) > KEEP))
        {
            if let Some((_, dropped)) = self.events.pop_front() {
                self.first += 1;
                self.floor = self.floor.max(dropped.revision);
            }
        }
        let floor = self.floor;
        self.gaps.retain(|(_, to)| *to > floor);
    }

    pub(super) fn gap(&mut self, from: Revision, to: Revision) {
        self.gaps.push((from, to));
    }

    /// Number of the first event after `revision`.
    pub(super) fn after(&self, revision: Revision) -> Result<u64, TooOld> {
        let in_gap = self.gaps.iter().find(|(from, to)| *from < revision && revision < *to);
        if revision < self.floor || in_gap.is_some() {
            let oldest = in_gap.map_or(self.floor, |(_, to)| *to);
            return Err(TooOld { asked: revision, oldest });
        }
        Ok(self.first + self.events.partition_point(|(_, event)| event.revision <= revision) as u64)
    }

    /// Up to `limit` events from number `cursor` on; `None` = they are not in the ring any more.
    pub(super) fn read(
        &self,
        cursor: u64,
        limit: usize,
    ) -> Option<impl Iterator<Item = &Arc<Event>>> {
        let skip = cursor.checked_sub(self.first)?;
        let skip = usize::try_from(skip).ok()?.min(self.events.len());
        Some(self.events.range(skip..).take(limit).map(|(_, event)| event))
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::EventKind;
    use super::super::object::{Index, Meta, Object};
    use super::*;

    fn event(revision: Revision) -> Arc<Event> {
        let index: Index = Arc::new(|_| Ok(Meta::default()));
        let object = Object::new("/a", b"{}", revision, &index).expect("object");
        Arc::new(Event::new(EventKind::Modified, Arc::new(object), None))
    }

    fn revisions(history: &History, after: Revision) -> Vec<Revision> {
        let cursor = history.after(after).expect("not too old");
        history.read(cursor, usize::MAX).expect("in the ring").map(|event| event.revision).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn old_events_leave_when_newer_ones_come_but_some_always_stay() {
        let mut history = History::new(0, 1000);
        for revision in 1..=500 {
            history.push(event(revision));
        }
        assert_eq!(revisions(&history, 0).len(), 500);
        tokio::time::advance(KEEP + Duration::from_secs(1)).await;
        history.push(event(501));
        let kept = Revision::try_from(KEEP_AT_LEAST).expect("small");
        assert_eq!(
            history.after(501 - kept - 1).err().map(|too_old| too_old.oldest),
            Some(501 - kept)
        );
        assert_eq!(revisions(&history, 501 - kept).len(), KEEP_AT_LEAST);
        assert_eq!(revisions(&history, 500), [501]);
        assert_eq!(revisions(&history, 501), [0; 0]);
    }

    #[test]
    fn numbers_go_on_and_tell_who_lost_events() {
        let mut history = History::new(0, 2);
        let start = history.head();
        for revision in 1..=3 {
            history.push(event(revision));
        }
        assert_eq!(history.head(), start + 3);
        assert!(history.read(start, 10).is_none());
        assert!(history.read(start + 1, 10).is_some());
        assert!(History::unloaded(2).after(0).is_err());
    }

    #[test]
    fn a_gap_is_forgotten_with_its_events() {
        let mut history = History::new(0, 2);
        history.push(event(1));
        history.gap(1, 10);
        history.push(event(9));
        assert_eq!(history.after(5), Err(TooOld { asked: 5, oldest: 10 }));
        assert_eq!(revisions(&history, 1), [9]);
        assert_eq!(revisions(&history, 10), [0; 0]);
        for revision in [11, 12, 13] {
            history.push(event(revision));
        }
        assert!(history.gaps.is_empty());
        assert_eq!(revisions(&history, 11), [12, 13]);
    }
}
