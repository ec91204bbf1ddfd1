//! Leases for keys that go away by themselves.
//!
//! A lease per key would cost etcd one more raft entry per Event and a heap of leases to watch over. Keys that expire
//! at about the same time share one, as in Kubernetes (`storage/etcd3/lease_manager.go`).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::LeaseClient;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::store::StoreError;

/// A lease takes new keys for this part of its TTL, and lives longer by it, so no key goes early.
const REUSE_PART: u32 = 20;
/// At most this long: an hour's Events shall not live a day longer.
const REUSE_AT_MOST: Duration = Duration::from_secs(60);
/// Keys on one lease; etcd deletes all of an expired lease in one go.
const KEYS_AT_MOST: usize = 1000;

#[derive(Clone)]
pub(super) struct Leases {
    client: LeaseClient,
    /// The lease in use for each TTL. TTLs are few: one per resource that has any.
    current: Arc<Mutex<HashMap<Duration, Lease>>>,
}

struct Lease {
    id: i64,
    reuse_until: Instant,
    keys: usize,
}

impl Leases {
    pub(super) fn new(client: LeaseClient) -> Self {
        Self { client, current: Arc::default() }
    }

    /// A lease on which a key lives for at least `ttl`.
    pub(super) async fn of(&self, ttl: Duration) -> Result<i64, StoreError> {
        // Held over the grant on purpose: those who come meanwhile want that same lease.
        let mut current = self.current.lock().await;
        if let Some(lease) = current.get_mut(&ttl)
            && lease.keys < KEYS_AT_MOST
            && Instant::now() < lease.reuse_until
        {
            lease.keys += 1;
            return Ok(lease.id);
        }
        let reuse = (ttl / REUSE_PART).min(REUSE_AT_MOST);
        let seconds = (ttl + reuse).as_secs_f64().ceil() as i64;
        let before = Instant::now();
        let mut client = self.client.clone();
        let id = super::call(client.grant(seconds.max(1), None)).await?.id();
        current.insert(ttl, Lease { id, reuse_until: before + reuse, keys: 1 });
        Ok(id)
    }
}
