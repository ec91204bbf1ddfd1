//! Caches against a server that comes and goes.

use std::time::Duration;

use orch_api::k8s_openapi::api::core::v1::{Event, ObjectReference, Pod};
use orch_client::ListParams;
use orch_reconcile::{Change, EventRecorder, Informer, Informers};
use serde_json::json;
use tests_fake_api::FakeServer;
use tokio_util::sync::CancellationToken;

const PODS: &str = "/api/v1/pods";

fn path(name: &str) -> String {
    format!("/api/v1/namespaces/shop/pods/{name}")
}

fn put(server: &FakeServer, name: &str, app: &str) {
    server.put(&path(name), json!({ "metadata": { "labels": { "app": app } } }));
}

fn names(informer: &Informer<Pod>) -> Vec<String> {
    informer.list().iter().filter_map(|pod| pod.metadata.name.clone()).collect()
}

fn told(change: &Change<Pod>) -> String {
    let name = |pod: &Pod| pod.metadata.name.clone().unwrap_or_default();
    match (&change.old, &change.new) {
        (None, Some(new)) => format!("+{}", name(new)),
        (Some(old), None) => format!("-{}", name(old)),
        (_, Some(new)) => format!("~{}", name(new)),
        (None, None) => String::new(),
    }
}

/// Waits until `what` holds; time is paused, so this costs nothing.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

#[tokio::test(start_paused = true)]
async fn a_cache_follows_the_server_and_tells_each_change_once() {
    let server = FakeServer::new();
    put(&server, "a", "web");
    let informers = Informers::new(server.client(), CancellationToken::new());
    let pods = informers.of::<Pod>();
    let mut changes = pods.subscribe();
    pods.synced().await;
    put(&server, "b", "web");
    put(&server, "a", "db");
    server.remove(&path("b"));
    let mut seen = Vec::new();
    for _ in 0..4 {
        seen.push(told(&changes.recv().await.expect("a change")));
    }
    assert_eq!(seen, ["+a", "+b", "~a", "-b"]);
    assert_eq!(names(&pods), ["a"]);
    let late = informers.of::<Pod>().subscribe().recv().await.map(|change| told(&change));
    assert_eq!(late.as_deref(), Some("+a"), "a late subscriber gets what is there");
    let lists = server.requests().iter().filter(|(_, path)| path == PODS).count();
    assert_eq!(lists, 2, "one list and one watch, however many ask");
}

#[tokio::test(start_paused = true)]
async fn what_happened_during_a_broken_watch_is_seen() {
    let server = FakeServer::new();
    put(&server, "a", "web");
    let pods = Informers::new(server.client(), CancellationToken::new()).of::<Pod>();
    pods.synced().await;
    server.fail_next(3);
    server.disconnect();
    put(&server, "b", "web");
    eventually("b is seen", || names(&pods) == ["a", "b"]).await;
}

#[tokio::test(start_paused = true)]
async fn deletions_that_the_server_forgot_are_found_by_listing_again() {
    let server = FakeServer::new();
    put(&server, "a", "web");
    put(&server, "b", "web");
    let pods = Informers::new(server.client(), CancellationToken::new()).of::<Pod>();
    let mut changes = pods.subscribe();
    pods.synced().await;
    // Nothing of this is in the history when the watch begins again.
    server.disconnect();
    server.remove(&path("a"));
    server.remove(&path("b"));
    put(&server, "b", "web");
    server.compact();
    eventually("a is gone", || names(&pods) == ["b"]).await;
    let mut seen = Vec::new();
    while let Ok(change) = changes.try_recv() {
        seen.push(told(&change));
    }
    assert_eq!(seen, ["+a", "+b", "-a", "-b", "+b"], "another object of the same name is another");
}

#[tokio::test(start_paused = true)]
async fn a_selector_sees_objects_come_and_go_as_they_match() {
    let server = FakeServer::new();
    put(&server, "a", "web");
    put(&server, "b", "db");
    let informers = Informers::new(server.client(), CancellationToken::new());
    let params = ListParams { label_selector: Some("app=web".to_owned()), ..ListParams::default() };
    let pods = informers.selected::<Pod>(&params);
    pods.synced().await;
    assert_eq!(names(&pods), ["a"]);
    put(&server, "b", "web");
    put(&server, "a", "db");
    eventually("b took the place of a", || names(&pods) == ["b"]).await;
}

#[tokio::test(start_paused = true)]
async fn objects_are_found_by_owner() {
    let server = FakeServer::new();
    let owner = |uid: &str| json!([{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": uid, "controller": true }]);
    server.put(&path("a"), json!({ "metadata": { "ownerReferences": owner("u1") } }));
    server.put(&path("b"), json!({}));
    let pods = Informers::new(server.client(), CancellationToken::new()).of::<Pod>();
    pods.synced().await;
    let names = |pods: Vec<std::sync::Arc<Pod>>| {
        pods.iter().filter_map(|pod| pod.metadata.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(pods.owned_by("u1")), ["a"]);
    assert_eq!(names(pods.orphans_in("shop")), ["b"]);
    server.change(&path("a"), |pod| pod["metadata"]["ownerReferences"] = owner("u2"));
    eventually("the index moved", || pods.owned_by("u1").is_empty()).await;
    assert_eq!(names(pods.owned_by("u2")), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn subscribers_learn_that_the_cache_ended() {
    let cancel = CancellationToken::new();
    let pods = Informers::new(FakeServer::new().client(), cancel.clone()).of::<Pod>();
    let mut changes = pods.subscribe();
    pods.synced().await;
    cancel.cancel();
    assert!(changes.recv().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn the_same_event_counts_up() {
    let server = FakeServer::new();
    let recorder = EventRecorder::new(server.client(), "kubelet", "node-1");
    let pod = ObjectReference {
        kind: Some("Pod".to_owned()),
        namespace: Some("shop".to_owned()),
        name: Some("web".to_owned()),
        uid: Some("u".to_owned()),
        ..ObjectReference::default()
    };
    for _ in 0..3 {
        recorder.event(&pod, "Warning", "BackOff", "Back-off restarting failed container");
    }
    recorder.event(&pod, "Normal", "Pulled", "Container image is there");
    let events = || server.list("/api/v1/namespaces/shop/events");
    eventually("two events", || events().len() == 2).await;
    let back_off =
        events().into_iter().find(|event| event["reason"] == "BackOff").expect("BackOff");
    assert_eq!((&back_off["count"], &back_off["source"]["host"]), (&json!(3), &json!("node-1")));
    let typed: Event = serde_json::from_value(back_off).expect("a core/v1 Event");
    assert_eq!(typed.involved_object.name.as_deref(), Some("web"));
}
