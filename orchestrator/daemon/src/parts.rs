//! The parts of a daemon: tasks with a name that live and end together.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// How long the parts may take to end once they were told to; whoever started us may wait little longer.
const GRACE: Duration = Duration::from_secs(10);

/// The running parts.
pub(crate) struct Parts {
    tasks: JoinSet<(&'static str, anyhow::Result<()>)>,
    running: BTreeSet<&'static str>,
    stop: CancellationToken,
}

impl Parts {
    /// None yet; `stop` is what ends them.
    pub(crate) fn new(stop: CancellationToken) -> Self {
        Self { tasks: JoinSet::new(), running: BTreeSet::new(), stop }
    }

    /// Starts one.
    pub(crate) fn spawn<E>(
        &mut self,
        name: &'static str,
        work: impl Future<Output = Result<(), E>> + Send + 'static,
    ) where
        E: Into<anyhow::Error> + 'static,
    {
        self.running.insert(name);
        self.tasks.spawn(async move { (name, work.await.map_err(Into::into)) });
    }

    /// Waits for all of them. The first one that ends ends the others: half a daemon is worse than a restarted one.
    ///
    /// # Errors
    /// The first failure.
    pub(crate) async fn join(mut self) -> anyhow::Result<()> {
        let mut first = Ok(());
        loop {
            let ended = if self.stop.is_cancelled() {
                match tokio::time::timeout(GRACE, self.tasks.join_next()).await {
                    Ok(ended) => ended,
                    Err(_) => {
                        let parts: Vec<_> = self.running.into_iter().collect();
                        warn!(
                            parts = parts.join(", "),
                            "not ended {} s after the signal",
                            GRACE.as_secs()
                        );
                        return first;
                    }
                }
            } else {
                tokio::select! {
                    ended = self.tasks.join_next() => ended,
                    () = self.stop.cancelled() => continue,
                }
            };
            let failure = match ended {
                None => return first,
                Some(Ok((part, outcome))) => {
                    self.running.remove(part);
                    match outcome {
                        Ok(()) if self.stop.is_cancelled() => {
                            info!(part, "stopped");
                            continue;
                        }
                        Ok(()) => anyhow::anyhow!("the {part} ended on its own"),
                        Err(error) => error.context(format!("the {part} failed")),
                    }
                }
                Some(Err(error)) => anyhow::anyhow!("a part panicked: {error}"),
            };
            self.stop.cancel();
            error!("{failure:#}");
            if first.is_ok() {
                first = Err(failure);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_part_that_fails_ends_the_others() {
        let stop = CancellationToken::new();
        let mut parts = Parts::new(stop.clone());
        let told = stop.clone();
        parts.spawn("patient part", async move {
            told.cancelled().await;
            anyhow::Ok(())
        });
        parts.spawn("weak part", async { Err(anyhow::anyhow!("no strength")) });
        let error = parts.join().await.expect_err("a failure");
        assert_eq!(format!("{error:#}"), "the weak part failed: no strength");
        assert!(stop.is_cancelled());
    }

    #[tokio::test]
    async fn a_part_that_ends_unasked_is_a_failure_and_one_that_was_asked_is_not() {
        let mut parts = Parts::new(CancellationToken::new());
        parts.spawn("short part", async { anyhow::Ok(()) });
        let error = parts.join().await.expect_err("a failure").to_string();
        assert_eq!(error, "the short part ended on its own");

        let stop = CancellationToken::new();
        stop.cancel();
        let mut parts = Parts::new(stop);
        parts.spawn("short part", async { anyhow::Ok(()) });
        parts.join().await.expect("it was asked to end");
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_that_does_not_end_does_not_keep_the_process() {
        let stop = CancellationToken::new();
        let mut parts = Parts::new(stop.clone());
        parts.spawn("deaf part", std::future::pending::<anyhow::Result<()>>());
        stop.cancel();
        parts.join().await.expect("given up");
    }
}
