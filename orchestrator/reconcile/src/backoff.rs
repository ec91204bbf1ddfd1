//! Delays that grow with each failure, with jitter so that many clients do not come back at the same moment.

use std::time::Duration;

use rand::Rng as _;

/// Part of a delay that is left to chance.
const JITTER: f64 = 0.2;

/// Doubling delays between two bounds.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// The delay before the next try; the one after it is twice as long.
    pub fn next_delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (self.next * 2).min(self.longest);
        delay.mul_f64(1.0 + rand::rng().random_range(0.0..JITTER))
    }

    /// It worked: begin anew.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_longest_and_start_again_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(300));
        let bounds = [(100, 120), (200, 240), (300, 360), (300, 360)];
        for (least, most) in bounds {
            let delay = backoff.next_delay().as_millis();
            assert!((least..=most).contains(&delay), "{delay} ms is not within {least}..={most}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= Duration::from_millis(120));
    }
}
