//! What the end-to-end suite is made of: a lab of its own, a command-line client of the cluster, a packet capture
//! in the underlay and a client that counts failed requests. The story itself is in `tests/story.rs`.

pub mod capture;
pub mod flood;
pub mod load;
pub mod shell;
pub mod stream;
pub mod testlab;

use std::time::{Duration, Instant};

use anyhow::bail;

/// Asks `check` again until it gives a value, at most for `limit`; the last reason is in the error.
///
/// # Errors
/// The time is over.
pub fn eventually<T>(
    what: &str,
    limit: Duration,
    mut check: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let reason = match check() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if Instant::now() > deadline {
            bail!("{what} did not become true within {limit:?}: {reason:#}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
