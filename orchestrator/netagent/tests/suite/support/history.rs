//! What etcd remembers of who held which subnet.

use std::collections::BTreeMap;

use etcd_client::{Client, EventType, WatchOptions};
use ipnetwork::Ipv4Network;

use super::overlay::PREFIX;

/// etcd's revision.
pub async fn revision(client: &mut Client) -> i64 {
    client.get("x", None).await.expect("get").header().expect("header").revision()
}

/// From this revision on no subnet goes from one node to another without a deletion in between, and those that are held
/// in the end overlap nowhere.
pub async fn assert_no_subnet_was_held_twice(client: &mut Client, from: i64) {
    let now = revision(client).await;
    let options = WatchOptions::new().with_prefix().with_start_revision(from);
    let mut watch = client.watch(format!("{PREFIX}/subnets/"), Some(options)).await.expect("watch");
    let mut holders = BTreeMap::new();
    let mut seen = 0;
    // The history ends at `now`; a key beyond it tells that all of it was read.
    client.put(format!("{PREFIX}/subnets/end"), "", None).await.expect("put");
    while seen <= now {
        let message = watch.message().await.expect("history").expect("open");
        assert_eq!(message.compact_revision(), 0, "the history is gone");
        for event in message.events() {
            let kv = event.kv().expect("a key");
            seen = seen.max(kv.mod_revision());
            let key = kv.key_str().expect("text").to_owned();
            if event.event_type() == EventType::Delete {
                holders.remove(&key);
                continue;
            }
            let Ok(value) = serde_json::from_slice::<serde_json::Value>(kv.value()) else {
                continue;
            };
            let holder = value["BackendData"]["VtepMAC"].clone();
            let before = holders.insert(key.clone(), holder.clone());
            assert!(before.is_none() || before == Some(holder), "{key} has two holders");
        }
    }
    client.delete(format!("{PREFIX}/subnets/end"), None).await.expect("delete");
    let mut subnets: Vec<Ipv4Network> = holders
        .keys()
        .filter_map(|key| key.rsplit('/').next()?.replace('-', "/").parse().ok())
        .collect();
    subnets.sort_unstable();
    assert!(subnets.windows(2).all(|two| !two[0].overlaps(two[1])), "{subnets:?}");
}
