//! Notices when nothing could be seen of the cluster: this process was stopped, or the store behind the API did not
//! answer. Heartbeats of nodes cannot come in meanwhile, so their silence means nothing.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;

use crate::context::{Context, NODE_LEASES};

/// Between two looks, one small read of the store each.
pub(super) const PERIOD: Duration = Duration::from_secs(1);
/// A shorter pause costs a node less than one or two renewals of its Lease.
const PAUSE: Duration = Duration::from_secs(3);

/// How much of the time since the last look was a pause.
pub(super) fn pause(since_last: Duration) -> Option<Duration> {
    (since_last >= PAUSE).then(|| since_last - PERIOD)
}

/// Calls `alive` each time the store has answered.
pub(super) async fn run(cx: &Context, alive: impl Fn()) {
    let api = cx.api::<Lease>(NODE_LEASES);
    loop {
        // Not from a cache: the store itself has to answer. Whether there is such a Lease says nothing.
        if api.get_opt("pulse").await.is_ok() {
            alive();
        }
        tokio::time::sleep(PERIOD).await;
    }
}
