//! The keyed work queue: a key that is added often is worked on once, and by one worker at a time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Delay after the first failure of a key; mostly a conflict with a change that the cache gets in a moment.
const FIRST_DELAY: Duration = Duration::from_millis(5);
const LONGEST_DELAY: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct State<T> {
    /// In order of arrival; each key is in `waiting` too.
    ready: VecDeque<T>,
    /// Keys to work on, whether in `ready` or held back because a worker has them.
    waiting: HashSet<T>,
    working: HashSet<T>,
    /// By time; an entry counts only if `delayed` says the same time.
    timers: BinaryHeap<Reverse<(Instant, u64)>>,
    timer_keys: HashMap<u64, T>,
    delayed: HashMap<T, (Instant, u64)>,
    sequence: u64,
    failures: HashMap<T, u32>,
    closed: bool,
}

/// Keys waiting for work. Shared by those who add and those who take.
#[derive(Debug)]
pub struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Notify,
}

impl<T: Clone + Eq + Hash> Default for Queue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Clone + Eq + Hash> Queue<T> {
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: Mutex::new(State {
                ready: VecDeque::new(),
                waiting: HashSet::new(),
                working: HashSet::new(),
                timers: BinaryHeap::new(),
                timer_keys: HashMap::new(),
                delayed: HashMap::new(),
                sequence: 0,
                failures: HashMap::new(),
                closed: false,
            }),
            changed: Notify::new(),
        }
    }

    /// Work on `key`; if a worker has it, again after that.
    pub fn add(&self, key: T) {
        if self.state.lock().add(key) {
            self.changed.notify_one();
        }
    }

    /// Work on `key` when `delay` has passed, or sooner if it was to be sooner already.
    pub fn add_after(&self, key: T, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let at = Instant::now() + delay;
        let mut state = self.state.lock();
        if state.delayed.get(&key).is_some_and(|(sooner, _)| *sooner <= at) {
            return;
        }
        let sequence = state.sequence;
        state.sequence += 1;
        if let Some((_, replaced)) = state.delayed.insert(key.clone(), (at, sequence)) {
            state.timer_keys.remove(&replaced);
        }
        state.timer_keys.insert(sequence, key);
        state.timers.push(Reverse((at, sequence)));
        drop(state);
        self.changed.notify_one();
    }

    /// Work on `key` after a delay that doubles with each call until [`Queue::forget`].
    pub fn add_rate_limited(&self, key: T) {
        let failures = {
            let mut state = self.state.lock();
            let failures = state.failures.entry(key.clone()).or_default();
            *failures += 1;
            *failures
        };
        let factor = 2_u32.checked_pow(failures - 1).unwrap_or(u32::MAX);
        self.add_after(key, FIRST_DELAY.saturating_mul(factor).min(LONGEST_DELAY));
    }

    /// The key has no failures any more.
    pub fn forget(&self, key: &T) {
        self.state.lock().failures.remove(key);
    }

    /// How often the key failed in a row.
    #[must_use]
    pub fn failures(&self, key: &T) -> u32 {
        self.state.lock().failures.get(key).copied().unwrap_or(0)
    }

    /// The next key; give it back with [`Queue::done`]. None when the queue is closed.
    ///
    /// # Cancel safety
    /// Safe: a key is taken only when it is returned.
    pub async fn next(&self) -> Option<T> {
        loop {
            let changed = self.changed.notified();
            let deadline = {
                let mut state = self.state.lock();
                if state.closed {
                    return None;
                }
                state.promote(Instant::now());
                if let Some(key) = state.take() {
                    // One notification may have stood for several keys.
                    if !state.ready.is_empty() {
                        self.changed.notify_one();
                    }
                    return Some(key);
                }
                state.timers.peek().map(|Reverse((at, _))| *at)
            };
            match deadline {
                Some(at) => tokio::select! {
                    () = changed => {}
                    () = tokio::time::sleep_until(at) => {}
                },
                None => changed.await,
            }
        }
    }

    /// The worker has finished with the key.
    pub fn done(&self, key: &T) {
        let mut state = self.state.lock();
        state.working.remove(key);
        if state.waiting.contains(key) {
            state.ready.push_back(key.clone());
            self.changed.notify_one();
        }
    }

    /// Ends all workers' waiting.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_waiters();
        // A worker that is just about to wait gets this one.
        self.changed.notify_one();
    }

    /// Keys ready or being worked on, without delayed ones.
    #[must_use]
    pub fn len(&self) -> usize {
        let state = self.state.lock();
        state.waiting.len() + state.working.difference(&state.waiting).count()
    }

    /// Whether nothing is ready or being worked on.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T: Clone + Eq + Hash> State<T> {
    /// True if a worker can take it now.
    fn add(&mut self, key: T) -> bool {
        if self.closed || !self.waiting.insert(key.clone()) || self.working.contains(&key) {
            return false;
        }
        self.ready.push_back(key);
        true
    }

    fn promote(&mut self, now: Instant) {
        while let Some(Reverse((at, sequence))) = self.timers.peek().copied() {
            let live = self.timer_keys.contains_key(&sequence);
            if live && at > now {
                return;
            }
            self.timers.pop();
            if let Some(key) = self.timer_keys.remove(&sequence) {
                self.delayed.remove(&key);
                self.add(key);
            }
        }
    }

    fn take(&mut self) -> Option<T> {
        let key = self.ready.pop_front()?;
        self.waiting.remove(&key);
        self.working.insert(key.clone());
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    async fn now<T: Clone + Eq + Hash>(queue: &Queue<T>) -> Option<T> {
        tokio::time::timeout(Duration::from_millis(1), queue.next()).await.ok().flatten()
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_added_often_is_worked_on_once_and_by_one_worker_at_a_time() {
        let queue = Queue::new();
        queue.add("a");
        queue.add("a");
        assert_eq!(now(&queue).await, Some("a"));
        queue.add("a");
        assert_eq!(now(&queue).await, None, "another worker has it");
        queue.done(&"a");
        assert_eq!(now(&queue).await, Some("a"), "what came meanwhile is not lost");
        queue.done(&"a");
        assert_eq!(now(&queue).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_sooner_of_two_delays_counts_and_the_key_comes_once() {
        let queue = Queue::new();
        queue.add_after("a", LONG);
        queue.add_after("a", Duration::from_secs(1));
        queue.add_after("a", LONG);
        let started = Instant::now();
        assert_eq!(queue.next().await, Some("a"));
        assert_eq!(started.elapsed().as_secs(), 1);
        queue.done(&"a");
        tokio::time::sleep(LONG * 2).await;
        assert_eq!(now(&queue).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sleeping_worker_is_woken_by_a_shorter_delay() {
        let queue = Arc::new(Queue::new());
        queue.add_after("late", LONG);
        let worker = tokio::spawn({
            let queue = queue.clone();
            async move { queue.next().await }
        });
        tokio::task::yield_now().await;
        queue.add_after("soon", Duration::from_secs(1));
        assert_eq!(worker.await.expect("worker"), Some("soon"));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_wait_longer_each_time_until_forgotten() {
        let queue = Queue::new();
        let mut waits = Vec::new();
        for _ in 0..14 {
            queue.add_rate_limited("a");
            let started = Instant::now();
            assert_eq!(queue.next().await, Some("a"));
            queue.done(&"a");
            waits.push(started.elapsed().as_millis());
        }
        assert_eq!(&waits[..4], &[5, 10, 20, 40]);
        assert_eq!(waits[13], LONGEST_DELAY.as_millis());
        queue.forget(&"a");
        assert_eq!(queue.failures(&"a"), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn closing_ends_all_workers() {
        let queue = Arc::new(Queue::<u8>::new());
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let queue = queue.clone();
                tokio::spawn(async move { queue.next().await })
            })
            .collect();
        tokio::task::yield_now().await;
        queue.close();
        for worker in workers {
            assert_eq!(worker.await.expect("worker"), None);
        }
        assert_eq!(queue.next().await, None);
    }
}
