//! Forgets history, so that the store does not grow for ever.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::store::Store;

/// How long history is kept, as in Kubernetes: a client may page through a list, or come back to a watch, for at least
/// this long.
pub const HISTORY: Duration = Duration::from_secs(300);

/// Every `history`, forgets what was older than that, until cancelled. Several servers may do it to one store.
pub async fn run(store: Arc<dyn Store>, history: Duration, cancel: CancellationToken) {
    let mut known = None;
    loop {
        match store.revision().await {
            Ok(now) => {
                if let Some(at) = known.replace(now).filter(|at| *at < now) {
                    match store.compact(at).await {
                        Ok(()) => debug!(revision = at, "history compacted"),
                        Err(error) => warn!(revision = at, %error, "compact history"),
                    }
                }
            }
            Err(error) => warn!(%error, "read the revision to compact at"),
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(history) => {}
        }
    }
}
