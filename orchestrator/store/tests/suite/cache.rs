//! The watch cache over a real etcd.

use std::sync::Arc;
use std::time::Duration;

use crate::support::{
    Cuttable, Etcd, LIMIT, PODS, cache, create, events_until, index, key, object, within,
};
use futures::StreamExt as _;
use orch_store::Store;
use orch_store::cache::{
    Cache, CacheConfig, EventKind, Feed, Stale, WatchFrom, WatchItem, Watcher,
};
use tokio_util::sync::CancellationToken;

use EventKind::{Added, Deleted, Modified};

const RING: usize = 1000;

struct Set {
    etcd: Etcd,
    store: Arc<Cuttable>,
    feed: Arc<Feed>,
    cache: Arc<Cache>,
    cancel: CancellationToken,
}

async fn set(ring: usize) -> Set {
    let etcd = Etcd::start().await;
    let store = Cuttable::new(etcd.store().await);
    let cancel = CancellationToken::new();
    let feed = Feed::start(store.clone(), "/registry/", cancel.clone());
    let cache = cache(&feed, ring).await;
    Set { etcd, store, feed, cache, cancel }
}

impl Set {
    async fn fresh(&self) -> i64 {
        self.cache.fresh(LIMIT).await.expect("fresh")
    }

    fn names(&self) -> Vec<String> {
        self.cache.snapshot().iter().map(|object| object.meta.name.clone()).collect()
    }

    fn watch(&self, from: WatchFrom) -> Watcher {
        self.cache.watch(from).expect("not too old")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_shows_what_is_stored_with_its_version() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let before = create(&store, "before", "x").await;
    let cancel = CancellationToken::new();
    let feed = Feed::start(Arc::new(store.clone()), "/registry/", cancel.clone());
    let cache = cache(&feed, RING).await;
    let after = create(&store, "after", "x").await;
    cache.wait_for(after, LIMIT).await.expect("it arrives");

    for (name, revision) in [("before", before), ("after", after)] {
        let found = cache.get(&key(name)).expect("it is there");
        let json: serde_json::Value = serde_json::from_slice(&found.bytes).expect("JSON");
        assert_eq!(json["metadata"]["resourceVersion"], revision.to_string());
        assert_eq!((found.revision, found.meta.labels["app"].as_str()), (revision, "x"));
    }
    let snapshot = cache.snapshot();
    store.delete(&key("after"), after).await.expect("delete");
    cache.fresh(LIMIT).await.expect("fresh");
    assert_eq!(cache.get(&key("after")).map(|object| object.revision), None);
    // A snapshot does not change any more.
    assert_eq!(
        snapshot.iter().map(|object| object.meta.name.as_str()).collect::<Vec<_>>(),
        ["after", "before"]
    );
    let page: Vec<_> =
        snapshot.range(PODS, Some(&key("b"))).map(|object| object.meta.name.as_str()).collect();
    assert_eq!(page, ["before"]);

    cancel.cancel();
    within(feed.ended()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fresh_sees_every_write_also_deletes_and_foreign_ones() {
    let set = set(RING).await;
    for round in 0..100 {
        let name = format!("pod-{round}");
        let created = create(&*set.store, &name, "x").await;
        assert!(set.fresh().await >= created);
        assert!(set.cache.get(&key(&name)).is_some(), "round {round}: the creation shows");
        set.store.delete(&key(&name), created).await.expect("delete");
        set.fresh().await;
        assert!(set.cache.get(&key(&name)).is_none(), "round {round}: the deletion shows");
    }
    // A write elsewhere makes a revision that no event of ours carries.
    for _ in 0..3 {
        let foreign =
            set.store.touch("/coreos.com/network/subnets/10.244.1.0-24").await.expect("put");
        set.cache.wait_for(foreign, LIMIT).await.expect("a revision that has happened");
        assert!(set.cache.revision() >= foreign);
        let foreign =
            set.store.touch("/coreos.com/network/subnets/10.244.1.0-24").await.expect("put");
        assert!(set.fresh().await >= foreign);
    }
    let now = set.fresh().await;
    match set.cache.wait_for(now + 1000, Duration::from_millis(300)).await {
        Err(Stale::Behind { at }) => assert!(at >= now),
        other => panic!("a revision that has not happened: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_readers_share_the_work() {
    let set = set(RING).await;
    let before = set.store.revision().await.expect("revision");
    set.store.touch("/foreign").await.expect("put");
    let readers = (0..200).map(|_| set.cache.fresh(LIMIT));
    for done in within(futures::future::join_all(readers)).await {
        assert!(done.expect("fresh") > before);
    }
    let fences = set.store.revision().await.expect("revision") - before - 1;
    assert_eq!(fences, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn sibling_prefixes_do_not_mix() {
    let set = set(RING).await;
    let other = Cache::start(&set.feed, CacheConfig::new("/registry/core/podsx/", index()));
    assert!(within(other.ready()).await);
    let mut watcher = set.watch(WatchFrom::Now);
    set.store
        .create("/registry/core/podsx/default/b", object("b", "x"), None)
        .await
        .expect("create");
    set.store
        .create("/registry/core/pods2/default/c", object("c", "x"), None)
        .await
        .expect("create");
    let last = create(&*set.store, "a", "x").await;
    assert_eq!(events_until(&mut watcher, last).await, [(Added, "a".to_owned(), last)]);
    assert_eq!(set.names(), ["a"]);
    assert_eq!(
        other.snapshot().iter().map(|object| object.meta.name.as_str()).collect::<Vec<_>>(),
        ["b"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_see_all_events_in_order_from_any_point() {
    let set = set(RING).await;
    let start = set.cache.revision();
    let mut want = Vec::new();
    let mut live = set.watch(WatchFrom::Now);
    for name in ["a", "b"] {
        let created = create(&*set.store, name, "1").await;
        let updated =
            set.store.update(&key(name), object(name, "2"), created, None).await.expect("update");
        let deleted = set.store.delete(&key(name), updated).await.expect("delete");
        want.extend([
            (Added, name.to_owned(), created),
            (Modified, name.to_owned(), updated),
            (Deleted, name.to_owned(), deleted),
        ]);
    }
    let last = want[5].2;
    assert_eq!(events_until(&mut live, last).await, want);
    assert_eq!(live.position(), last);
    for skip in 0..5 {
        let from = if skip == 0 { start } else { want[skip - 1].2 };
        let mut again = set.watch(WatchFrom::Revision(from));
        assert_eq!(events_until(&mut again, last).await, want[skip..], "after {from}");
    }
    // From the future on: what the client says it knows already is not told again.
    let mut ahead = set.watch(WatchFrom::Revision(last + 1));
    create(&*set.store, "c", "1").await;
    let next = create(&*set.store, "d", "1").await;
    assert_eq!(events_until(&mut ahead, next).await, [(Added, "d".to_owned(), next)]);
    let before =
        set.cache.watch(WatchFrom::Revision(start - 1)).err().expect("before the first list");
    assert_eq!((before.asked, before.oldest), (start - 1, start));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_gets_the_previous_object_for_its_selector() {
    let set = set(RING).await;
    let (snapshot, mut watcher) = set.cache.snapshot_and_watch();
    assert!(snapshot.is_empty());
    let created = create(&*set.store, "a", "blue").await;
    let red = set.store.update(&key("a"), object("a", "red"), created, None).await.expect("update");
    let red2 = set.store.update(&key("a"), object("a", "red"), red, None).await.expect("update");
    let blue = set.store.update(&key("a"), object("a", "blue"), red2, None).await.expect("update");
    set.store.delete(&key("a"), blue).await.expect("delete");
    let mut seen = Vec::new();
    for _ in 0..5 {
        let Some(WatchItem::Event(event)) = within(watcher.next()).await else {
            panic!("no event")
        };
        let kind = event.seen_by(|object| object.meta.labels["app"] == "red");
        seen.push(kind.map(|kind| {
            let line: serde_json::Value =
                serde_json::from_slice(&event.encoded(kind)).expect("JSON");
            let metadata = &line["object"]["metadata"];
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            (
                text(&line["type"]),
                text(&metadata["labels"]["app"]),
                text(&metadata["resourceVersion"]),
            )
        }));
    }
    let line =
        |kind: &str, revision: i64| Some((kind.to_owned(), "red".to_owned(), revision.to_string()));
    // One that leaves the selector is shown as it was, with the revision at which it left.
    assert_eq!(
        seen,
        [None, line("ADDED", red), line("MODIFIED", red2), line("DELETED", blue), None]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_encoded_once() {
    let set = set(RING).await;
    let (mut one, mut two) = (set.watch(WatchFrom::Now), set.watch(WatchFrom::Now));
    let revision = create(&*set.store, "a", "x").await;
    let (Some(WatchItem::Event(first)), Some(WatchItem::Event(second))) =
        (within(one.next()).await, within(two.next()).await)
    else {
        panic!("no events")
    };
    assert_eq!(first.encoded(Added).as_ptr(), second.encoded(Added).as_ptr());
    assert_eq!(
        String::from_utf8_lossy(&first.encoded(Added)),
        format!(
            "{{\"type\":\"ADDED\",\"object\":{{\"kind\":\"Pod\",\"metadata\":{{\"resourceVersion\":\"{revision}\",\"name\":\"a\",\"labels\":{{\"app\":\"x\"}}}}}}}}\n"
        )
    );
    let table = first.variant("table", Added, |object| object.meta.name.clone().into());
    assert_eq!(table, "a");
    assert_eq!(second.variant("table", Added, |_| panic!("made twice")), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_watcher_overflows_and_old_revisions_are_too_old() {
    let set = set(10).await;
    let start = set.cache.revision();
    let mut slow = set.watch(WatchFrom::Now);
    let mut revisions = Vec::new();
    for number in 0..11 {
        revisions.push(create(&*set.store, &format!("pod-{number}"), "x").await);
    }
    set.fresh().await;
    assert!(matches!(within(slow.next()).await, Some(WatchItem::Overflow)));
    assert!(within(slow.next()).await.is_none());
    let too_old =
        set.cache.watch(WatchFrom::Revision(start)).err().expect("it fell out of the ring");
    assert_eq!(too_old.oldest, revisions[0]);
    assert_eq!(
        too_old.to_string(),
        format!("too old resource version: {start} ({})", revisions[0])
    );
    let mut rest = set.watch(WatchFrom::Revision(revisions[0]));
    assert_eq!(events_until(&mut rest, revisions[10]).await.len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn bookmarks_advance_without_events_and_never_overtake_them() {
    let set = set(RING).await;
    let mut watcher = set.watch(WatchFrom::Now);
    watcher.bookmark_every(Duration::from_millis(50));
    let elsewhere =
        set.store.create("/registry/core/nodes/a", object("a", "x"), None).await.expect("create");
    loop {
        match within(watcher.next()).await {
            Some(WatchItem::Bookmark(revision)) if revision >= elsewhere => break,
            Some(WatchItem::Bookmark(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    let (store, writer) = (set.store.clone(), CancellationToken::new());
    let stop = writer.clone();
    let writing = tokio::spawn(async move {
        let mut number = 0;
        while !stop.is_cancelled() {
            create(&*store, &format!("pod-{number}"), "x").await;
            number += 1;
        }
        number
    });
    watcher.bookmark_every(Duration::from_micros(200));
    let (mut told, mut events, mut bookmarks) = (0, 0, 0);
    while events < 300 {
        match within(watcher.next()).await {
            Some(WatchItem::Event(event)) => {
                assert!(event.revision > told, "a bookmark overtook an event");
                events += 1;
            }
            Some(WatchItem::Bookmark(revision)) => {
                told = revision;
                bookmarks += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    writer.cancel();
    assert!(writing.await.expect("writer") >= 300);
    assert!(bookmarks > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_watch_goes_on_without_listing_again() {
    let set = set(RING).await;
    let start = set.cache.revision();
    let mut watcher = set.watch(WatchFrom::Now);
    let created = create(&*set.store, "a", "1").await;
    set.fresh().await;
    set.store.cut();
    let updated =
        set.store.update(&key("a"), object("a", "2"), created, None).await.expect("update");
    let deleted = set.store.delete(&key("a"), updated).await.expect("delete");
    set.store.mend();
    let want = [
        (Added, "a".to_owned(), created),
        (Modified, "a".to_owned(), updated),
        (Deleted, "a".to_owned(), deleted),
    ];
    assert_eq!(events_until(&mut watcher, deleted).await, want);
    // The history is whole, also for those who come later.
    let mut late = set.watch(WatchFrom::Revision(start));
    assert_eq!(events_until(&mut late, deleted).await, want);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_compaction_the_cache_lists_again_and_watchers_go_on() {
    let set = set(RING).await;
    let mut old = Vec::new();
    for name in ["changed", "deleted-1", "deleted-2", "kept", "replaced"] {
        old.push(create(&*set.store, name, "1").await);
    }
    let before = set.fresh().await;
    let mut watcher = set.watch(WatchFrom::Now);
    set.store.cut();
    let added = create(&*set.store, "added", "1").await;
    let changed = set
        .store
        .update(&key("changed"), object("changed", "2"), old[0], None)
        .await
        .expect("update");
    for (name, revision) in [("deleted-1", old[1]), ("deleted-2", old[2]), ("replaced", old[4])] {
        set.store.delete(&key(name), revision).await.expect("delete");
    }
    let short = create(&*set.store, "short", "1").await;
    set.store.delete(&key("short"), short).await.expect("delete");
    let replaced = create(&*set.store, "replaced", "2").await;
    let latest = set.store.touch("/registry/other").await.expect("put");
    set.store.compact(latest).await.expect("compact");
    assert_eq!(set.cache.revision(), before, "nothing has come through");
    set.store.mend();

    assert!(set.fresh().await >= latest);
    let end = set.cache.snapshot().revision;
    assert_eq!(set.names(), ["added", "changed", "kept", "replaced"]);
    // Those who were there are led over the gap, in order.
    let last = create(&*set.store, "last", "1").await;
    let seen = events_until(&mut watcher, last).await;
    assert!(seen.is_sorted_by(|a, b| a.2 < b.2), "{seen:?}");
    let mut kinds: Vec<_> = seen.iter().map(|(kind, name, _)| (name.as_str(), *kind)).collect();
    kinds.sort_by_key(|(name, _)| *name);
    assert_eq!(
        kinds,
        [
            ("added", Added),
            ("changed", Modified),
            ("deleted-1", Deleted),
            ("deleted-2", Deleted),
            ("last", Added),
            ("replaced", Modified),
        ]
    );
    for (name, revision) in [("added", added), ("changed", changed), ("replaced", replaced)] {
        assert!(
            seen.iter().any(|event| event.1 == name && event.2 == revision),
            "{name}: the true revision"
        );
    }
    // Who knows the state before the gap or after it is led on; who knows one inside of it has to list.
    let mut from_before = set.watch(WatchFrom::Revision(before));
    assert_eq!(events_until(&mut from_before, last).await, seen);
    let mut from_end = set.watch(WatchFrom::Revision(end));
    assert_eq!(events_until(&mut from_end, last).await, [(Added, "last".to_owned(), last)]);
    for inside in [before + 1, short, replaced] {
        let too_old =
            set.cache.watch(WatchFrom::Revision(inside)).err().expect("inside of the gap");
        assert_eq!(too_old.oldest, end);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_of_etcd_loses_and_doubles_nothing() {
    let set = set(100_000).await;
    let start = set.cache.revision();
    let mut watcher = set.watch(WatchFrom::Now);
    let stop = CancellationToken::new();
    let (store, stopped) = (set.store.clone(), stop.clone());
    // Writers do not care about errors: whatever etcd took counts.
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (store, stopped) = (store.clone(), stopped.clone());
            tokio::spawn(async move {
                let mut number = 0;
                while !stopped.is_cancelled() {
                    number += 1;
                    let name = format!("pod-{writer}-{number}");
                    let Ok(created) = store.create(&key(&name), object(&name, "1"), None).await
                    else {
                        continue;
                    };
                    let Ok(updated) =
                        store.update(&key(&name), object(&name, "2"), created, None).await
                    else {
                        continue;
                    };
                    if number % 2 == 0 {
                        let _ = store.delete(&key(&name), updated).await;
                    }
                }
            })
        })
        .collect();
    for _ in 0..3 {
        let before = set.cache.revision();
        let moved = async {
            while set.cache.revision() < before + 200 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(moved).await;
        set.etcd.kill();
    }
    within(set.store.get("/")).await.expect("etcd is back");
    stop.cancel();
    for writer in writers {
        within(writer).await.expect("writer");
    }
    let last = create(&*set.store, "last", "1").await;
    let seen = events_until(&mut watcher, last).await;

    let mut history = set.store.inner.watch(PODS, start + 1).await.expect("etcd's own history");
    let mut want = Vec::new();
    while want.last().is_none_or(|(_, _, revision)| *revision < last) {
        for event in within(history.next()).await.expect("it goes on").expect("batch").events {
            let kind = match &event.value {
                None => Deleted,
                Some(_) if event.created => Added,
                Some(_) => Modified,
            };
            want.push((
                kind,
                event.key.rsplit('/').next().unwrap_or_default().to_owned(),
                event.revision,
            ));
        }
    }
    assert_eq!(seen.len(), want.len());
    assert_eq!(seen, want);
    let stored = set.store.list(PODS, None, 0, None).await.expect("list");
    let snapshot = set.cache.snapshot();
    let cached: Vec<_> =
        snapshot.iter().map(|object| (object.key.to_string(), object.revision)).collect();
    assert_eq!(
        cached,
        stored.items.into_iter().map(|kv| (kv.key, kv.mod_revision)).collect::<Vec<_>>()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_loads_while_the_world_moves_misses_nothing() {
    let set = set(RING).await;
    let (store, stop) = (set.store.clone(), CancellationToken::new());
    let stopped = stop.clone();
    let writing = tokio::spawn(async move {
        let mut number = 0;
        while !stopped.is_cancelled() {
            number += 1;
            let key = format!("/registry/apps/things/{number:06}");
            store.create(&key, object(&number.to_string(), "x"), None).await.expect("create");
        }
        number
    });
    for round in 0..20 {
        // A cache of a prefix replaces the one before it.
        let cache = Cache::start(&set.feed, CacheConfig::new("/registry/apps/things/", index()));
        assert!(within(cache.ready()).await);
        cache.fresh(LIMIT).await.expect("fresh");
        let snapshot = cache.snapshot();
        let stored =
            set.store.list(cache.prefix(), None, 0, Some(snapshot.revision)).await.expect("list");
        assert_eq!(snapshot.len(), stored.items.len(), "round {round}");
        let same = snapshot
            .iter()
            .zip(&stored.items)
            .all(|(a, b)| *a.key == *b.key && a.revision == b.mod_revision);
        assert!(same, "round {round}");
    }
    stop.cancel();
    assert!(writing.await.expect("writer") > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_watchers_get_every_event() {
    const WATCHERS: usize = 1000;
    const EVENTS: usize = 100;
    let set = set(RING).await;
    let watchers: Vec<_> = (0..WATCHERS)
        .map(|_| {
            let mut watcher = set.watch(WatchFrom::Now);
            tokio::spawn(async move {
                let mut bytes = 0;
                for _ in 0..EVENTS {
                    match within(watcher.next()).await {
                        Some(WatchItem::Event(event)) => bytes += event.encoded(event.kind).len(),
                        other => panic!("{other:?}"),
                    }
                }
                bytes
            })
        })
        .collect();
    let started = std::time::Instant::now();
    for number in 0..EVENTS {
        create(&*set.store, &format!("pod-{number}"), "x").await;
    }
    for watcher in watchers {
        assert!(watcher.await.expect("watcher") > 0);
    }
    eprintln!("{EVENTS} writes to {WATCHERS} watchers in {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_broken_object_does_not_hide_the_others() {
    let set = set(RING).await;
    set.store.create(&key("broken"), "{".into(), None).await.expect("create");
    create(&*set.store, "sound", "x").await;
    set.fresh().await;
    assert_eq!(set.names(), ["sound"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_ends_with_the_feed() {
    let set = set(RING).await;
    let mut watcher = set.watch(WatchFrom::Now);
    set.cancel.cancel();
    assert!(within(watcher.next()).await.is_none());
    within(set.feed.ended()).await;
    assert!(matches!(set.cache.fresh(LIMIT).await, Err(Stale::Cancelled)));
    let late = Cache::start(&set.feed, CacheConfig::new("/registry/core/nodes/", index()));
    assert!(!within(late.ready()).await);
}
