//! What every store has to do. A new implementation passes `suite` and is done.

use std::time::Duration;

use crate::support::{Etcd, within};
use bytes::Bytes;
use futures::StreamExt as _;
use orch_store::{EtcdStore, Guard, Store, StoreError, StoreEvent};

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_a_store() {
    let etcd = Etcd::start().await;
    suite(etcd.store().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_a_store_also_after_a_restore() {
    let etcd = Etcd::start().await;
    let before = etcd.store().await;
    let old = before.create("/kept", value("1"), None).await.expect("create");
    let store = etcd.store().await.enter_epoch(Some(1_000_000)).await.expect("an epoch");
    let (found, now) = store.get("/kept").await.expect("get");
    let found = found.expect("it is there");
    assert!(found.mod_revision > 1_000_000 && now > found.mod_revision, "{found:?} at {now}");
    // What was known before is no version of what is there now, whatever etcd counts.
    match store.update("/kept", value("2"), old, None).await {
        Err(StoreError::Conflict { current: Some(current) }) => assert_eq!(current, found),
        other => panic!("{other:?}"),
    }
    let gone = |error: &StoreError| matches!(error, StoreError::Compacted { oldest: 1_000_001 });
    assert!(store.watch("/kept", old).await.is_err_and(|error| gone(&error)));
    assert!(store.list("/kept", None, 0, Some(old)).await.is_err_and(|error| gone(&error)));
    store.compact(old).await.expect("nothing to compact");

    // Every server finds the epoch in etcd, and none goes back to an earlier one.
    let another = etcd.store().await.enter_epoch(None).await.expect("the epoch");
    let stale = etcd.store().await.enter_epoch(Some(7)).await.expect("the epoch");
    for store in [&another, &stale] {
        assert_eq!(store.get("/kept").await.expect("get").0.as_ref(), Some(&found));
    }
    suite(store).await;
}

async fn suite<S: Store>(store: S) {
    writes_compare_and_swap(&store).await;
    of_two_decisions_from_one_state_the_second_is_refused(&store).await;
    lists_come_in_pages_of_one_revision(&store).await;
    prefixes_keep_apart(&store).await;
    a_watch_tells_all_in_order(&store).await;
    a_batch_keeps_a_revision_whole(&store).await;
    keys_with_a_ttl_go_away(&store).await;
    large_values_are_refused_clearly(&store).await;
    one_of_many_writers_wins(&store).await;
    compacted_history_is_gone(&store).await;
    store.healthy().await.expect("healthy");
}

fn value(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn writes_compare_and_swap(store: &dyn Store) {
    let key = "/cas/a";
    let created = store.create(key, value("1"), None).await.expect("create");
    assert!(matches!(store.create(key, value("x"), None).await, Err(StoreError::AlreadyExists)));
    let (found, now) = store.get(key).await.expect("get");
    let found = found.expect("it is there");
    assert_eq!(
        (found.value, found.create_revision, found.mod_revision),
        (value("1"), created, created)
    );
    assert!(now >= created);

    let updated = store.update(key, value("2"), created, None).await.expect("update");
    assert!(updated > created);
    match store.update(key, value("3"), created, None).await {
        Err(StoreError::Conflict { current: Some(current) }) => {
            assert_eq!((current.value, current.mod_revision), (value("2"), updated));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        store.delete(key, created).await,
        Err(StoreError::Conflict { current: Some(_) })
    ));
    let deleted = store.delete(key, updated).await.expect("delete");
    assert!(deleted > updated);
    assert!(matches!(
        store.delete(key, updated).await,
        Err(StoreError::Conflict { current: None })
    ));
    assert!(matches!(
        store.update(key, value("4"), updated, None).await,
        Err(StoreError::Conflict { current: None })
    ));
    // "At revision 0" must not mean "absent": an update never creates.
    assert!(matches!(
        store.update(key, value("4"), 0, None).await,
        Err(StoreError::Conflict { current: None })
    ));
    assert_eq!(store.get(key).await.expect("get").0, None);
    let again = store.create(key, value("5"), None).await.expect("create again");
    assert_eq!(store.get(key).await.expect("get").0.expect("there").create_revision, again);
    assert!(store.revision().await.expect("revision") >= again);
}

async fn of_two_decisions_from_one_state_the_second_is_refused(store: &dyn Store) {
    let at = |revision| Guard { key: "/guarded/.guard".to_owned(), revision };
    let first = store.write_guarded("/guarded/a", value("1"), 0, &at(0)).await.expect("the first");
    let (guard, _) = store.get("/guarded/.guard").await.expect("get");
    assert_eq!(guard.expect("renewed").mod_revision, first, "in the same transaction");

    // Decided before the first one was known.
    let second = store.write_guarded("/guarded/b", value("1"), 0, &at(0)).await;
    assert!(matches!(second, Err(StoreError::Overtaken)), "{second:?}");
    assert_eq!(store.get("/guarded/b").await.expect("get").0, None, "nothing is written");

    let again = store.write_guarded("/guarded/b", value("1"), 0, &at(first)).await.expect("again");
    let exists = store.write_guarded("/guarded/b", value("2"), 0, &at(again)).await;
    assert!(matches!(exists, Err(StoreError::AlreadyExists)), "{exists:?}");
    let stale = store.write_guarded("/guarded/a", value("2"), again, &at(again)).await;
    match stale {
        Err(StoreError::Conflict { current: Some(current) }) => {
            assert_eq!(current.mod_revision, first);
        }
        other => panic!("{other:?}"),
    }
    store.write_guarded("/guarded/a", value("2"), first, &at(again)).await.expect("an update");
}

async fn lists_come_in_pages_of_one_revision(store: &dyn Store) {
    for number in 0..1203 {
        store.create(&format!("/many/{number:04}"), value("v"), None).await.expect("create");
    }
    let all = store.list("/many/", None, 0, None).await.expect("list");
    assert_eq!((all.items.len(), all.more, all.remaining), (1203, false, 0));
    assert!(all.items.is_sorted_by(|a, b| a.key < b.key));

    let first = store.list("/many/", None, 700, None).await.expect("first page");
    assert_eq!((first.items.len(), first.more, first.remaining), (700, true, 503));
    // What happens between two pages does not show.
    let gone = &all.items[1000];
    store.delete(&gone.key, gone.mod_revision).await.expect("delete");
    store.create("/many/zzzz", value("v"), None).await.expect("create");
    let next = format!("{}\0", first.items[699].key);
    let second =
        store.list("/many/", Some(&next), 700, Some(first.revision)).await.expect("second page");
    assert_eq!((second.items.len(), second.more, second.revision), (503, false, first.revision));
    let keys: Vec<_> = first.items.iter().chain(&second.items).map(|kv| &kv.key).collect();
    assert_eq!(keys, all.items.iter().map(|kv| &kv.key).collect::<Vec<_>>());

    let from = store.list("/many/", Some("/many/1200"), 0, None).await.expect("from a key on");
    assert_eq!(
        from.items.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>(),
        ["/many/1200", "/many/1201", "/many/1202", "/many/zzzz"]
    );
    let now = store.revision().await.expect("revision");
    assert!(matches!(
        store.list("/many/", None, 0, Some(now + 1000)).await,
        Err(StoreError::Future)
    ));
}

async fn prefixes_keep_apart(store: &dyn Store) {
    store.create("/apart/pods/a", value("1"), None).await.expect("create");
    store.create("/apart/podsx/a", value("2"), None).await.expect("create");
    let page = store.list("/apart/pods/", None, 0, None).await.expect("list");
    assert_eq!(page.items.len(), 1);
    assert_eq!(store.list("/apart/none/", None, 0, None).await.expect("list").items, []);
}

async fn a_watch_tells_all_in_order(store: &dyn Store) {
    let first = store.create("/watch/a", value("1"), None).await.expect("create");
    let second = store.update("/watch/a", value("2"), first, None).await.expect("update");
    store.create("/watchx/a", value("x"), None).await.expect("create");
    // From the past on, and from where it starts into the future.
    let mut stream = store.watch("/watch/", first).await.expect("watch");
    let third = store.delete("/watch/a", second).await.expect("delete");
    let fourth = store.create("/watch/a", value("3"), None).await.expect("create");
    let event = |value: Option<&str>, revision, created| StoreEvent {
        key: "/watch/a".to_owned(),
        value: value.map(self::value),
        revision,
        created,
    };
    let want = [
        event(Some("1"), first, true),
        event(Some("2"), second, false),
        event(None, third, false),
        event(Some("3"), fourth, true),
    ];
    let mut seen = Vec::new();
    while seen.len() < want.len() {
        let batch = within(stream.next()).await.expect("it goes on").expect("batch");
        assert!(batch.events.last().is_none_or(|last| last.revision == batch.revision));
        seen.extend(batch.events);
    }
    assert_eq!(seen, want);
}

async fn a_batch_keeps_a_revision_whole(store: &dyn Store) {
    // Keys of one lease go in one revision.
    let ttl = Some(Duration::from_secs(1));
    let mut last = 0;
    for number in 0..300 {
        last = store.create(&format!("/whole/{number}"), value("v"), ttl).await.expect("create");
    }
    let mut stream = store.watch("/whole/", last + 1).await.expect("watch");
    let (mut deleted, mut position) = (0, last);
    while deleted < 300 {
        let batch = within(stream.next()).await.expect("it goes on").expect("batch");
        let Some(first) = batch.events.first() else { continue };
        assert!(first.revision > position, "a revision came in two parts");
        position = batch.revision;
        deleted += batch.events.len();
    }
}

async fn keys_with_a_ttl_go_away(store: &dyn Store) {
    let short =
        store.create("/ttl/short", value("v"), Some(Duration::from_secs(1))).await.expect("create");
    let kept =
        store.create("/ttl/kept", value("v"), Some(Duration::from_secs(1))).await.expect("create");
    store
        .update("/ttl/kept", value("w"), kept, None)
        .await
        .expect("an update without a TTL takes it away");
    let mut stream = store.watch("/ttl/", short + 1).await.expect("watch");
    let gone = within(async {
        loop {
            let batch = stream.next().await.expect("it goes on").expect("batch");
            if let Some(event) = batch.events.into_iter().find(|event| event.value.is_none()) {
                return event.key;
            }
        }
    });
    assert_eq!(gone.await, "/ttl/short");
    assert!(store.get("/ttl/kept").await.expect("get").0.is_some());
}

async fn large_values_are_refused_clearly(store: &dyn Store) {
    let fits = Bytes::from(vec![b'x'; 1 << 20]);
    store.create("/large/fits", fits, None).await.expect("1 MiB fits");
    let too_large = Bytes::from(vec![b'x'; 2 << 20]);
    let error = store.create("/large/no", too_large, None).await.expect_err("2 MiB do not");
    assert!(matches!(error, StoreError::TooLarge(_)), "{error:?}");
    // Far more than a client's default limit of 4 MiB in one list.
    for number in 0..8 {
        store
            .create(&format!("/large/{number}"), Bytes::from(vec![b'x'; 1 << 20]), None)
            .await
            .expect("create");
    }
    assert_eq!(store.list("/large/", None, 0, None).await.expect("list").items.len(), 9);
}

async fn one_of_many_writers_wins(store: &dyn Store) {
    let created = store.create("/race", value("0"), None).await.expect("create");
    let tries =
        (0..16).map(|writer| store.update("/race", value(&writer.to_string()), created, None));
    let done = futures::future::join_all(tries).await;
    assert_eq!(done.iter().filter(|done| done.is_ok()).count(), 1);
    assert!(
        done.iter()
            .all(|done| matches!(done, Ok(_) | Err(StoreError::Conflict { current: Some(_) })))
    );
}

async fn compacted_history_is_gone(store: &dyn Store) {
    let first = store.create("/old", value("1"), None).await.expect("create");
    let second = store.update("/old", value("2"), first, None).await.expect("update");
    store.compact(second).await.expect("compact");
    store.compact(second).await.expect("compact again");
    assert!(matches!(
        store.list("/old", None, 0, Some(first)).await,
        Err(StoreError::Compacted { .. })
    ));
    let now = store
        .list("/old", None, 0, Some(second))
        .await
        .expect("the compacted revision itself is there");
    assert_eq!(now.items[0].value, value("2"));
    let error = match store.watch("/old", first).await {
        Err(error) => error,
        Ok(mut stream) => {
            within(stream.next()).await.expect("an item").expect_err("history is gone")
        }
    };
    assert!(matches!(error, StoreError::Compacted { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_outlast_a_restart_of_etcd() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let revision = store.create("/a", value("1"), None).await.expect("create");
    let mut stream = store.watch("/a", revision + 1).await.expect("watch");
    etcd.kill();
    let broken = within(stream.next()).await.expect("the broken watch says so");
    assert!(broken.expect_err("broken").is_transient());
    assert!(within(stream.next()).await.is_none(), "and ends");
    let (found, _) = store.get("/a").await.expect("the same connection works on the new process");
    assert_eq!(found.expect("it was written").mod_revision, revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_away_is_unavailable() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    etcd.cancel.cancel();
    orch_store::managed::stop(&etcd.options.data_dir, Duration::from_secs(5)).expect("stop");
    let error = within(store.create("/a", value("1"), None)).await.expect_err("nobody is there");
    assert!(error.is_transient(), "{error:?}");
    let error = within(store.healthy()).await.expect_err("nobody is there");
    assert!(error.is_transient(), "{error:?}");
}

#[tokio::test]
async fn a_wrong_endpoint_is_no_outage() {
    let config = orch_store::EtcdConfig { endpoints: vec![":::".to_owned()], ..Default::default() };
    let Err(error) = EtcdStore::connect(config).await else { panic!("it cannot connect") };
    assert!(!error.is_transient(), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_keeps_recent_history_only() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let first = store.create("/a", value("1"), None).await.expect("create");
    let second = store.update("/a", value("2"), first, None).await.expect("update");
    let cancel = tokio_util::sync::CancellationToken::new();
    let history = Duration::from_millis(200);
    let compactor = tokio::spawn(orch_store::compaction::run(
        std::sync::Arc::new(store.clone()),
        history,
        cancel.clone(),
    ));
    within(async {
        let mut revision = second;
        while store.list("/a", None, 0, Some(first)).await.is_ok() {
            revision = store.update("/a", value("3"), revision, None).await.expect("update");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    cancel.cancel();
    within(compactor).await.expect("compactor");
    let now = store.revision().await.expect("revision");
    store.list("/a", None, 0, Some(now)).await.expect("the present is there");
}
