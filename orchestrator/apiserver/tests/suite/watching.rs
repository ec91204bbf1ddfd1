//! Lists and watches over HTTPS: resource versions, pages, selectors, bookmarks, load.

use std::collections::BTreeMap;

use crate::support::{Cluster, Watch, config_map, delete, get, merge, post, version};
use orch_store::Store as _;
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn labelled(name: &str, label: &str) -> Value {
    json!({ "metadata": { "name": name, "labels": { "tier": label } } })
}

fn names(list: &Value) -> Vec<&str> {
    list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|item| item["metadata"]["name"].as_str())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_one_revision_and_versions_are_kept() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    for index in 0..7 {
        post(client, MAPS, &config_map(&format!("m{index}"), &json!({}))).await;
    }
    let (_, first) = get(client, &format!("{MAPS}?limit=3")).await;
    assert_eq!(names(&first), ["m0", "m1", "m2"]);
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    // What changes meanwhile is not seen by the later pages.
    delete(client, &format!("{MAPS}/m5"), &json!({})).await;
    post(client, MAPS, &config_map("m3a", &json!({}))).await;
    let mut all = Vec::new();
    let mut token = first["metadata"]["continue"].as_str().map(str::to_owned);
    while let Some(next) = token {
        let (code, page) = get(client, &format!("{MAPS}?limit=3&continue={next}")).await;
        assert_eq!((code, version(&page)), (200, version(&first)));
        all.extend(names(&page).into_iter().map(str::to_owned));
        token = page["metadata"]["continue"].as_str().map(str::to_owned);
    }
    assert_eq!(all, ["m3", "m4", "m5", "m6"]);

    let (_, now) = get(client, MAPS).await;
    assert!(names(&now).contains(&"m3a") && !names(&now).contains(&"m5"), "a list is never old");
    let at = version(&first);
    let (_, exact) =
        get(client, &format!("{MAPS}?resourceVersion={at}&resourceVersionMatch=Exact")).await;
    assert!(names(&exact).contains(&"m5"));
    assert_eq!(get(client, &format!("{MAPS}?resourceVersion=0")).await.0, 200);
    let (code, future) = get(client, &format!("{MAPS}?resourceVersion=999999")).await;
    assert_eq!((code, &future["reason"]), (504, &json!("Timeout")));
    for query in [
        "resourceVersionMatch=Exact",
        "resourceVersion=0&resourceVersionMatch=Exact",
        "resourceVersion=x",
        "limit=x",
        "continue=rubbish",
    ] {
        assert_eq!(get(client, &format!("{MAPS}?{query}")).await.0, 400, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_continues_where_a_list_ended() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    post(client, MAPS, &labelled("a", "x")).await;
    let (_, list) = get(client, MAPS).await;
    let at = version(&list);
    let mut all = Watch::open(client, &format!("{MAPS}?watch=1&resourceVersion={at}")).await;
    let selecting = format!("{MAPS}?watch=1&resourceVersion={at}&labelSelector=tier%3Dy");
    let mut some = Watch::open(client, &selecting).await;
    merge(client, &format!("{MAPS}/a"), &json!({ "metadata": { "labels": { "tier": "y" } } }))
        .await;
    merge(client, &format!("{MAPS}/a"), &json!({ "data": { "k": "v" } })).await;
    merge(client, &format!("{MAPS}/a"), &json!({ "metadata": { "labels": { "tier": "x" } } }))
        .await;
    delete(client, &format!("{MAPS}/a"), &json!({})).await;
    let mut versions = Vec::new();
    for expected in ["MODIFIED", "MODIFIED", "MODIFIED", "DELETED"] {
        let (kind, name, version) = all.event().await;
        assert_eq!((kind.as_str(), name.as_str()), (expected, "a"));
        versions.push(version);
    }
    assert!(versions.is_sorted() && versions[3] > versions[2], "a deletion has its own revision");
    // It enters and leaves the selection.
    for expected in ["ADDED", "MODIFIED", "DELETED"] {
        assert_eq!(some.event().await.0, expected);
    }
    // From the past: everything after that revision once more.
    let mut again = Watch::open(client, &format!("{MAPS}?watch=1&resourceVersion={at}")).await;
    for version in versions {
        assert_eq!(again.event().await.2, version);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_list_sends_the_state_a_bookmark_and_goes_on() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    post(client, MAPS, &config_map("a", &json!({}))).await;
    let query =
        "watch=1&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan";
    let mut watch = Watch::open(client, &format!("{MAPS}?{query}")).await;
    assert_eq!(watch.event().await.0, "ADDED");
    let bookmark = watch.next().await.expect("a bookmark");
    assert_eq!(bookmark["type"], "BOOKMARK");
    assert_eq!(bookmark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    post(client, MAPS, &config_map("b", &json!({}))).await;
    let (kind, name, at) = watch.event().await;
    assert_eq!((kind.as_str(), name.as_str()), ("ADDED", "b"));
    assert!(at > version(&bookmark["object"]));
    // Without what it needs it is refused, never ignored.
    let (code, status) = get(client, &format!("{MAPS}?watch=1&sendInitialEvents=true")).await;
    assert_eq!((code, &status["reason"]), (422, &json!("Invalid")));
    // A watch that ends says how far it came.
    let mut short = Watch::open(
        client,
        &format!("{MAPS}?watch=1&allowWatchBookmarks=true&timeoutSeconds=1&resourceVersion={at}"),
    )
    .await;
    let (kind, _, last) = short.event().await;
    assert!(kind == "BOOKMARK" && last >= at);
    assert_eq!(short.next().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_is_gone_is_410() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    // The history starts with the server.
    let mut watch = Watch::open(client, &format!("{MAPS}?watch=1&resourceVersion=1")).await;
    post(client, MAPS, &config_map("a", &json!({}))).await;
    let (_, list) = get(client, MAPS).await;
    let line = watch.next().await.expect("an event");
    // Revision 1 is an empty etcd: nothing happened before the server came.
    assert_eq!(line["type"], "ADDED");
    let at = version(&list);
    let (_, page) = get(client, &format!("{MAPS}?limit=1")).await;
    assert!(page["metadata"].get("continue").is_none());
    post(client, MAPS, &config_map("b", &json!({}))).await;
    let (_, page) = get(client, &format!("{MAPS}?limit=1")).await;
    let token = page["metadata"]["continue"].as_str().expect("a token").to_owned();
    post(client, MAPS, &config_map("c", &json!({}))).await;
    cluster.compact().await;
    let exact = format!("{MAPS}?resourceVersion={at}&resourceVersionMatch=Exact");
    let (code, status) = get(client, &exact).await;
    assert_eq!((code, &status["reason"]), (410, &json!("Expired")));
    let (code, status) = get(client, &format!("{MAPS}?limit=1&continue={token}")).await;
    assert_eq!(code, 410);
    // It comes with a way to go on.
    let next = status["metadata"]["continue"].as_str().expect("another token");
    let (code, rest) = get(client, &format!("{MAPS}?continue={next}")).await;
    assert_eq!((code, names(&rest)), (200, vec!["b", "c"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_knows_no_history_and_says_so() {
    let mut cluster = Cluster::start().await;
    post(&cluster.client(), MAPS, &config_map("a", &json!({}))).await;
    let (_, list) = get(&cluster.client(), MAPS).await;
    let early = version(&list);
    for index in 0..3 {
        post(&cluster.client(), MAPS, &config_map(&format!("m{index}"), &json!({}))).await;
    }
    let client = &cluster.client();
    let mut open = Watch::open(client, &format!("{MAPS}?watch=1")).await;
    assert_eq!(open.event().await.1, "a");
    cluster.stop_server().await;
    while open.next().await.is_some() {}
    cluster.start_server().await;
    cluster.wait_ready().await;
    let client = &cluster.client();
    assert_eq!(names(&get(client, MAPS).await.1).len(), 4, "nothing is lost");
    let mut old = Watch::open(client, &format!("{MAPS}?watch=1&resourceVersion={early}")).await;
    let line = old.next().await.expect("a line");
    assert_eq!((&line["type"], &line["object"]["code"]), (&json!("ERROR"), &json!(410)));
    assert_eq!(old.next().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_watchers_see_every_change_of_many_writers_in_one_order() {
    const WRITERS: usize = 8;
    const EACH: usize = 25;
    let cluster = Cluster::start().await;
    let client = cluster.client();
    let mut watchers = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let mut watch = Watch::open(&client, &format!("{MAPS}?watch=1")).await;
        watchers.spawn(async move {
            let mut seen = Vec::new();
            let mut state = BTreeMap::new();
            while seen.len() < WRITERS * EACH * 2 {
                let (kind, name, version) = watch.event().await;
                seen.push(version);
                if kind == "DELETED" {
                    state.remove(&name);
                } else {
                    state.insert(name, version);
                }
            }
            assert!(seen.is_sorted(), "events come in the order of their revisions");
            assert!(state.is_empty(), "{state:?}");
            seen
        });
    }
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let client = client.clone();
        writers.spawn(async move {
            for index in 0..EACH {
                let name = format!("w{writer}-{index}");
                let (code, made) = post(&client, MAPS, &config_map(&name, &json!({}))).await;
                assert_eq!(code, 201, "{made}");
                assert_eq!(delete(&client, &format!("{MAPS}/{name}"), &json!({})).await.0, 200);
            }
        });
    }
    writers.join_all().await;
    let mut all = watchers.join_all().await;
    let first = all.pop().expect("a watcher");
    assert!(all.iter().all(|other| *other == first), "all see the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn both_forms_of_events_are_one_object() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let newer = "/apis/events.k8s.io/v1/namespaces/default/events";
    let stored = "/api/v1/namespaces/default/events";
    let mut watch = Watch::open(client, &format!("{newer}?watch=1")).await;
    let event = json!({ "metadata": { "name": "e", "namespace": "default" }, "eventTime": "2026-01-02T03:04:05.000006Z",
        "regarding": { "kind": "Pod", "namespace": "default", "name": "p" }, "reason": "Started", "note": "text",
        "type": "Normal", "action": "Start", "reportingController": "c", "reportingInstance": "c-1" });
    let (code, made) = post(client, newer, &event).await;
    assert_eq!((code, &made["note"]), (201, &json!("text")), "{made}");
    assert_eq!(watch.next().await.expect("an event")["object"]["regarding"]["name"], "p");
    let (_, list) = get(client, &format!("{stored}?fieldSelector=involvedObject.name%3Dp")).await;
    assert_eq!(list["items"][0]["message"], "text");
    let (_, list) = get(client, &format!("{newer}?fieldSelector=regarding.name%3Dp")).await;
    assert_eq!((&list["apiVersion"], names(&list)), (&json!("events.k8s.io/v1"), vec!["e"]));
    let key = "/registry/core/events/default/e";
    let (kept, _) = cluster.store().await.get(key).await.expect("etcd answers");
    assert_ne!(kept.expect("the event").lease, 0, "events do not stay for ever");
}
