//! The loop: keys from a queue, one call of a reconciler for each, and what its outcome means for the queue.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::Queue;

/// What will not go away by itself is looked at again this late; a change of the object comes sooner.
const PERMANENT_DELAY: Duration = Duration::from_secs(60);
/// Failures in a row after which a transient error is worth a warning: conflicts are daily business.
const WARN_AFTER: u32 = 8;
/// Work that is under way when the loop is told to stop gets this long.
const GRACE: Duration = Duration::from_secs(2);

/// What comes after a reconciliation that worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Action {
    requeue: Option<Duration>,
}

impl Action {
    /// Nothing, until something changes.
    #[must_use]
    pub fn done() -> Self {
        Self { requeue: None }
    }

    /// Another look after this time, for what no event tells.
    #[must_use]
    pub fn requeue(after: Duration) -> Self {
        Self { requeue: Some(after) }
    }

    /// When the next look is due, if one is.
    #[must_use]
    pub fn after(self) -> Option<Duration> {
        self.requeue
    }
}

/// Whether the same step may work later, without anybody changing anything.
pub trait Transient {
    fn is_transient(&self) -> bool;
}

impl Transient for orch_client::Error {
    fn is_transient(&self) -> bool {
        self.is_transient()
    }
}

/// Makes the world agree with one object. Called again for the same key it does nothing.
pub trait Reconciler: Send + Sync + 'static {
    type Error: std::error::Error + Transient + Send + 'static;

    /// For logs.
    const NAME: &'static str;

    /// Looks at the object named by `key`, which may be gone, and at what belongs to it.
    fn reconcile(&self, key: &str) -> impl Future<Output = Result<Action, Self::Error>> + Send;
}

/// Works on the keys of `queue` with `workers` tasks until cancelled.
pub async fn run<R: Reconciler>(
    reconciler: Arc<R>,
    queue: Arc<Queue<String>>,
    workers: usize,
    cancel: CancellationToken,
) {
    let mut tasks = JoinSet::new();
    for _ in 0..workers {
        tasks.spawn(work(reconciler.clone(), queue.clone()));
    }
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            ended = tasks.join_next() => match ended {
                // A panic of one key must not end the work on all others.
                Some(Err(panic)) => {
                    error!(controller = R::NAME, %panic, "a reconciliation panicked");
                    tasks.spawn(work(reconciler.clone(), queue.clone()));
                }
                Some(Ok(())) => {}
                None => break,
            }
        }
    }
    queue.close();
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, all).await.is_err() {
        warn!(controller = R::NAME, tasks = tasks.len(), "work is still under way at the end");
    }
}

/// Gives the key back even when the work on it panics.
struct Taken<'a> {
    queue: &'a Queue<String>,
    key: String,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.queue.add_after(self.key.clone(), PERMANENT_DELAY);
        }
        self.queue.done(&self.key);
    }
}

async fn work<R: Reconciler>(reconciler: Arc<R>, queue: Arc<Queue<String>>) {
    while let Some(key) = queue.next().await {
        let taken = Taken { queue: &queue, key };
        let key = &taken.key;
        match reconciler.reconcile(key).await {
            Ok(action) => {
                queue.forget(key);
                if let Some(delay) = action.requeue {
                    queue.add_after(key.clone(), delay);
                }
            }
            Err(error) if error.is_transient() => {
                queue.add_rate_limited(key.clone());
                let failures = queue.failures(key);
                let error = &error as &dyn std::error::Error;
                if failures < WARN_AFTER {
                    debug!(controller = R::NAME, key, failures, error, "trying again");
                } else {
                    warn!(controller = R::NAME, key, failures, error, "trying again");
                }
            }
            Err(error) => {
                queue.forget(key);
                queue.add_after(key.clone(), PERMANENT_DELAY);
                let error = &error as &dyn std::error::Error;
                warn!(controller = R::NAME, key, error, "cannot be reconciled as it is");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("not yet")]
    struct NotYet;

    impl Transient for NotYet {
        fn is_transient(&self) -> bool {
            true
        }
    }

    #[derive(Default)]
    struct ThirdTime {
        calls: AtomicU32,
    }

    impl Reconciler for ThirdTime {
        type Error = NotYet;
        const NAME: &'static str = "third-time";

        async fn reconcile(&self, key: &str) -> Result<Action, NotYet> {
            let call = self.calls.fetch_add(1, Ordering::SeqCst);
            match (key, call) {
                ("panics", 0) => panic!("of the test"),
                ("fails", 0 | 1) => Err(NotYet),
                _ => Ok(Action::done()),
            }
        }
    }

    async fn calls_for(key: &str) -> u32 {
        let (queue, cancel) = (Arc::new(Queue::new()), CancellationToken::new());
        let reconciler = Arc::new(ThirdTime::default());
        queue.add(key.to_owned());
        let running = tokio::spawn(run(reconciler.clone(), queue, 2, cancel.clone()));
        tokio::time::sleep(PERMANENT_DELAY * 2).await;
        cancel.cancel();
        running.await.expect("the loop");
        reconciler.calls.load(Ordering::SeqCst)
    }

    #[tokio::test(start_paused = true)]
    async fn a_transient_failure_is_tried_again_until_it_works() {
        assert_eq!(calls_for("fails").await, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_ends_neither_the_loop_nor_the_key() {
        assert_eq!(calls_for("panics").await, 2);
    }
}
