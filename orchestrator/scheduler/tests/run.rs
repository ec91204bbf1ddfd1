//! The whole task against a server in memory.

use std::time::{Duration, Instant};

use orch_scheduler::{Options, run};
use serde_json::{Value, json};
use tests_fake_api::FakeServer;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

fn pod_path(name: &str) -> String {
    format!("/api/v1/namespaces/shop/pods/{name}")
}

fn node(server: &FakeServer, name: &str, cpu: &str) {
    let resources = json!({ "cpu": cpu, "memory": "8Gi", "pods": "110" });
    server.put(
        &format!("/api/v1/nodes/{name}"),
        json!({ "metadata": { "labels": { "kubernetes.io/hostname": name } },
                "status": { "capacity": resources, "allocatable": resources,
                            "conditions": [{ "type": "Ready", "status": "True" }] } }),
    );
}

fn pod(server: &FakeServer, name: &str, cpu: &str) {
    server.put(
        &pod_path(name),
        json!({ "spec": { "schedulerName": "default-scheduler",
                          "containers": [{ "name": "a", "resources": { "requests": { "cpu": cpu } } }] },
                "status": { "phase": "Pending" } }),
    );
}

fn node_of(server: &FakeServer, pod: &str) -> Option<String> {
    let found = server.get(&pod_path(pod))?;
    found["spec"]["nodeName"].as_str().map(str::to_owned)
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

struct Scheduler {
    cancel: CancellationToken,
    task: JoinHandle<Result<(), orch_scheduler::Error>>,
}

impl Scheduler {
    fn start(server: &FakeServer) -> Self {
        let cancel = CancellationToken::new();
        let task = tokio::spawn(run(server.client(), Options::default(), cancel.clone()));
        Self { cancel, task }
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.expect("no panic").expect("it was told to stop");
    }
}

#[tokio::test]
async fn a_pod_is_bound_within_milliseconds() {
    let server = FakeServer::new();
    for n in 0..10 {
        node(&server, &format!("n{n}"), "4");
    }
    let scheduler = Scheduler::start(&server);
    pod(&server, "first", "100m");
    eventually("the first is bound", || node_of(&server, "first").is_some()).await;
    let mut waits = Vec::new();
    for n in 0..20 {
        let (name, started) = (format!("p{n}"), Instant::now());
        pod(&server, &name, "100m");
        eventually("it is bound", || node_of(&server, &name).is_some()).await;
        waits.push(started.elapsed());
    }
    waits.sort();
    assert!(waits[10] < Duration::from_millis(50), "the median is {:?}", waits[10]);
    scheduler.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_fits_nowhere_says_why_and_is_bound_when_there_is_room() {
    let server = FakeServer::new();
    node(&server, "small", "1");
    pod(&server, "big", "3");
    let scheduler = Scheduler::start(&server);
    let condition = || -> Value {
        let found = server.get(&pod_path("big")).unwrap_or_default();
        found["status"]["conditions"][0].clone()
    };
    eventually("the condition says why", || condition()["reason"] == "Unschedulable").await;
    assert_eq!(condition()["message"], "0/1 nodes are available: 1 Insufficient cpu.");
    eventually("an event says it too", || {
        let events = server.list("/api/v1/namespaces/shop/events");
        events.iter().any(|event| event["reason"] == "FailedScheduling")
    })
    .await;
    node(&server, "large", "8");
    eventually("it is bound", || node_of(&server, "big").as_deref() == Some("large")).await;
    scheduler.stop().await;
}

#[tokio::test(start_paused = true)]
async fn pods_left_by_an_outage_are_bound_after_it() {
    let server = FakeServer::new();
    node(&server, "n", "8");
    let scheduler = Scheduler::start(&server);
    pod(&server, "a", "1");
    eventually("a is bound", || node_of(&server, "a").is_some()).await;
    server.fail_next(5);
    server.disconnect();
    pod(&server, "b", "1");
    pod(&server, "c", "1");
    eventually("both are bound", || {
        node_of(&server, "b").is_some() && node_of(&server, "c").is_some()
    })
    .await;
    scheduler.stop().await;
}
