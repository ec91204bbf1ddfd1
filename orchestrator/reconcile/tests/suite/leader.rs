//! One leads, whatever happens to the others, to its connection or to itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, Response};
use orch_api::k8s_openapi::api::core::v1::ConfigMap;
use orch_client::{Api, Body, Client, Error, Transport};
use orch_reconcile::{Election, lead};
use parking_lot::Mutex;
use serde_json::json;
use tests_fake_api::FakeServer;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/scheduler";

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

fn election(identity: &str) -> Election {
    Election::new("kube-system", "scheduler", identity)
}

fn holder(server: &FakeServer) -> Option<String> {
    let lease = server.get(LEASE);
    lease.and_then(|lease| lease["spec"]["holderIdentity"].as_str().map(str::to_owned))
}

fn candidate(
    server: &FakeServer,
    identity: &str,
    cancel: &CancellationToken,
) -> tokio::task::JoinHandle<Option<()>> {
    let work = |_, leading: CancellationToken| async move { leading.cancelled().await };
    tokio::spawn(lead(server.client(), election(identity), cancel.clone(), work))
}

#[tokio::test(start_paused = true)]
async fn one_leads_and_the_next_takes_over() {
    let server = FakeServer::new();
    let (first, second) = (CancellationToken::new(), CancellationToken::new());
    let a = candidate(&server, "a", &first);
    eventually("a leads", || holder(&server).as_deref() == Some("a")).await;
    let b = candidate(&server, "b", &second);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(holder(&server).as_deref(), Some("a"), "renewed for a minute");
    first.cancel();
    a.await.expect("a ended");
    eventually("b leads", || holder(&server).as_deref() == Some("b")).await;
    // Another one steals the Lease: b notices and stops.
    server.change(LEASE, |lease| lease["spec"]["holderIdentity"] = json!("c"));
    assert_eq!(b.await.expect("b ended"), None);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_somebody_annotated_is_still_held() {
    let server = FakeServer::new();
    let cancel = CancellationToken::new();
    let a = candidate(&server, "a", &cancel);
    eventually("a leads", || holder(&server).as_deref() == Some("a")).await;
    for round in 0..200 {
        server.change(LEASE, |lease| {
            lease["metadata"]["annotations"] = json!({ "seen": round.to_string() })
        });
        tokio::time::sleep(Duration::from_millis(97)).await;
    }
    assert!(!a.is_finished(), "it leads on");
}

/// A connection that is slow, and then swallows everything.
struct Bad {
    server: Client,
    /// 0 = good, 1 = answers come after 9 s, 2 = nothing arrives any more.
    state: AtomicU8,
}

struct Shared(Arc<Bad>);

#[async_trait]
impl Transport for Shared {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        let slow = request.method() != Method::GET;
        match self.0.state.load(Ordering::SeqCst) {
            1 if slow => {
                let answer = self.0.server.stream(request).await;
                tokio::time::sleep(Duration::from_secs(9)).await;
                self.0.state.store(2, Ordering::SeqCst);
                answer
            }
            2 => std::future::pending().await,
            _ => self.0.server.stream(request).await,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_stops_before_the_next_begins_even_when_its_last_answer_came_late() {
    let server = FakeServer::new();
    let bad = Arc::new(Bad { server: server.client(), state: AtomicU8::new(0) });
    let stopped = Arc::new(Mutex::new(None));
    let (client, cancel, note) =
        (Client::new(Shared(bad.clone())), CancellationToken::new(), stopped.clone());
    tokio::spawn(lead(client, election("a"), cancel.clone(), |_, leading| async move {
        leading.cancelled().await;
        *note.lock() = Some(Instant::now());
    }));
    eventually("a leads", || holder(&server).as_deref() == Some("a")).await;
    let _b = candidate(&server, "b", &cancel);
    bad.state.store(1, Ordering::SeqCst);
    eventually("b leads", || holder(&server).as_deref() == Some("b")).await;
    let stopped = stopped.lock().expect("a has stopped");
    assert!(stopped < Instant::now());
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_stood_still_changes_nothing_when_it_wakes_up() {
    let server = FakeServer::new();
    let outcome = Arc::new(Mutex::new(None));
    let (note, cancel) = (outcome.clone(), CancellationToken::new());
    let work = |client: Client, _| async move {
        let api = Api::<ConfigMap>::namespaced(client, "default");
        let make = |name: &str| -> ConfigMap {
            serde_json::from_value(json!({ "metadata": { "name": name } })).expect("a ConfigMap")
        };
        api.create(&make("while-leading")).await.expect("it leads");
        // The clock goes on, and nothing else of this process does.
        tokio::time::advance(Duration::from_secs(20)).await;
        let refused = api.create(&make("too-late")).await;
        *note.lock() = Some((refused.map(drop), api.get_opt("while-leading").await.is_ok()));
    };
    lead(server.client(), election("a"), cancel, work).await;
    let (refused, reads) = outcome.lock().take().expect("the work ended");
    let error = refused.expect_err("a change after the end of the Lease");
    assert_eq!(error.to_string(), "nothing was sent");
    assert!(error.is_transient() && reads);
    assert!(server.get("/api/v1/namespaces/default/configmaps/too-late").is_none());
}
