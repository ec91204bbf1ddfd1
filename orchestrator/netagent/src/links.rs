//! The kernel's news of links and their addresses, as a reason to look.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use rtnetlink::MulticastGroup;
use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(2);

/// Notifies of what these groups tell; a broken socket is a reason to look, and is opened again.
pub(crate) async fn watch(
    groups: impl AsRef<[MulticastGroup]>,
    look: Arc<Notify>,
    cancel: CancellationToken,
) {
    while !cancel.is_cancelled() {
        match rtnetlink::new_multicast_connection(groups.as_ref()) {
            Ok((connection, _handle, mut messages)) => {
                let mut connection = std::pin::pin!(connection);
                loop {
                    tokio::select! {
                        () = cancel.cancelled() => return,
                        () = &mut connection => break,
                        message = messages.next() => {
                            if message.is_none() {
                                break;
                            }
                            look.notify_one();
                        }
                    }
                }
                warn!("the kernel's news of links were cut off; looking now and then instead");
            }
            Err(error) => {
                warn!(%error, "the kernel's news of links are not heard; looking now and then instead");
            }
        }
        look.notify_one();
        tokio::select! {
            () = cancel.cancelled() => {}
            () = sleep(RETRY) => {}
        }
    }
}
