//! Restart back-off: 10 s, doubled up to 5 min, forgotten after 10 min without a restart (kubelet's defaults).

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);
const FORGET_AFTER: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy)]
struct Entry {
    delay: Duration,
    last: Timestamp,
}

/// Delays by key. The first failure costs nothing; from then on each one doubles the wait.
#[derive(Debug, Clone, Default)]
pub(crate) struct Backoff {
    entries: BTreeMap<String, Entry>,
}

impl Backoff {
    /// How long to wait yet, and the whole delay, after a failure at `failed`.
    pub(crate) fn remaining(
        &self,
        key: &str,
        failed: Timestamp,
        now: Timestamp,
    ) -> Option<(Duration, Duration)> {
        let entry = self.entries.get(key)?;
        if since(failed, entry.last) > FORGET_AFTER {
            return None;
        }
        let waited = since(now, failed);
        entry
            .delay
            .checked_sub(waited)
            .filter(|left| !left.is_zero())
            .map(|left| (left, entry.delay))
    }

    /// Notes another try.
    pub(crate) fn next(&mut self, key: &str, now: Timestamp) {
        let delay = match self.entries.get(key) {
            Some(entry) if since(now, entry.last) <= FORGET_AFTER => (entry.delay * 2).min(LONGEST),
            _ => FIRST,
        };
        self.entries.insert(key.to_owned(), Entry { delay, last: now });
    }

    pub(crate) fn forget(&mut self, key: &str) {
        self.entries.remove(key);
    }
}

fn since(later: Timestamp, earlier: Timestamp) -> Duration {
    later.duration_since(earlier).try_into().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a time")
    }

    #[test]
    fn the_first_restart_is_free_and_the_delay_doubles_up_to_five_minutes() {
        let mut backoff = Backoff::default();
        let mut now = 1000;
        assert_eq!(backoff.remaining("a", at(now), at(now)), None);
        backoff.next("a", at(now));
        let mut delays = Vec::new();
        for _ in 0..7 {
            let (left, delay) = backoff.remaining("a", at(now), at(now)).expect("has to wait");
            assert_eq!(left, delay);
            delays.push(delay.as_secs());
            now += i64::try_from(delay.as_secs()).expect("small");
            assert_eq!(
                backoff.remaining("a", at(now) - delay, at(now)),
                None,
                "waited long enough"
            );
            backoff.next("a", at(now));
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn ten_quiet_minutes_are_a_fresh_start() {
        let mut backoff = Backoff::default();
        backoff.next("a", at(0));
        backoff.next("a", at(20));
        assert_eq!(backoff.remaining("a", at(700), at(700)), None);
        backoff.next("a", at(700));
        assert_eq!(
            backoff.remaining("a", at(700), at(700)).map(|(_, delay)| delay.as_secs()),
            Some(10)
        );
    }
}
