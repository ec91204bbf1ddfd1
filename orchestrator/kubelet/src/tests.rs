//! Pods from the API to the engine and back, over an engine, a network and an API server in memory.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, Response};
use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_client::{Body, Client, Transport, full_body};
use orch_cri::{Container, FakeRuntime, Runtime as _};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::Options;
use crate::api::PodRef;
use crate::context::Context;
use crate::labels;
use crate::network::{Place, PodNetwork};
use crate::node::machine::Machine;
use crate::pod::worker::{Wanted, Worker};

/// Sandboxes that are connected.
#[derive(Clone, Default)]
struct FakeNetwork {
    connected: Arc<Mutex<BTreeSet<String>>>,
    broken: Arc<Mutex<bool>>,
    /// How often it failed.
    failures: Arc<Mutex<usize>>,
}

#[async_trait]
impl PodNetwork for FakeNetwork {
    async fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    async fn pin(&self, _pid: i32, sandbox: &str) -> Result<PathBuf, String> {
        Ok(self.netns_path(sandbox))
    }

    async fn add(&self, place: &Place) -> Result<Vec<IpAddr>, String> {
        if *self.broken.lock() {
            *self.failures.lock() += 1;
            return Err("no subnet".to_owned());
        }
        self.connected.lock().insert(place.sandbox.clone());
        Ok(vec!["10.244.1.5".parse().expect("an address")])
    }

    async fn remove(&self, place: &Place) -> Result<(), String> {
        self.connected.lock().remove(&place.sandbox);
        Ok(())
    }

    async fn collect(&self, valid: Vec<String>) -> Result<(), String> {
        self.connected.lock().retain(|sandbox| valid.contains(sandbox));
        Ok(())
    }

    fn netns_path(&self, sandbox: &str) -> PathBuf {
        PathBuf::from("/none").join(sandbox)
    }

    async fn pinned(&self) -> Vec<String> {
        self.connected.lock().iter().cloned().collect()
    }
}

/// One pod behind an API: status patches are merged, a delete is noted.
#[derive(Clone)]
struct FakeApi {
    pod: Arc<Mutex<Option<Value>>>,
    objects: Arc<Mutex<Vec<(String, Value)>>>,
    /// Paths of all requests but those for the pod.
    asked: Arc<Mutex<Vec<String>>>,
}

#[async_trait]
impl Transport for FakeApi {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, orch_client::Error> {
        let path = request.uri().path().to_owned();
        let answer = |code: u16, value: Value| {
            let mut response = Response::new(full_body(Bytes::from(value.to_string())));
            *response.status_mut() = http::StatusCode::from_u16(code).expect("a code");
            response
        };
        let mut pod = self.pod.lock();
        if path.contains("/pods/web") {
            let Some(current) = pod.as_mut() else {
                return Ok(answer(404, json!({ "code": 404, "reason": "NotFound" })));
            };
            match *request.method() {
                Method::PATCH => {
                    let patch: Value = serde_json::from_slice(request.body()).expect("a patch");
                    for (key, value) in patch["status"].as_object().expect("a status") {
                        if value.is_null() {
                            current["status"].as_object_mut().map(|status| status.remove(key));
                        } else {
                            current["status"][key] = value.clone();
                        }
                    }
                    let version: u64 = current["metadata"]["resourceVersion"]
                        .as_str()
                        .and_then(|text| text.parse().ok())
                        .unwrap_or(0);
                    current["metadata"]["resourceVersion"] = json!((version + 1).to_string());
                    return Ok(answer(200, current.clone()));
                }
                Method::DELETE => {
                    *pod = None;
                    return Ok(answer(200, json!({})));
                }
                _ => return Ok(answer(200, current.clone())),
            }
        }
        self.asked.lock().push(path.clone());
        if path.ends_with("/services") {
            return Ok(answer(200, json!({ "items": [] })));
        }
        if let Some((_, object)) =
            self.objects.lock().iter().find(|(known, _)| path.ends_with(known.as_str()))
        {
            return Ok(answer(200, object.clone()));
        }
        Ok(answer(404, json!({ "code": 404, "reason": "NotFound", "message": "not found" })))
    }
}

struct World {
    runtime: FakeRuntime,
    network: FakeNetwork,
    api: FakeApi,
    cx: Arc<Context>,
    wanted: watch::Sender<Wanted>,
    wake: Arc<Notify>,
    pod: Arc<Pod>,
    worker: JoinHandle<()>,
    stop: CancellationToken,
    _root: tempfile::TempDir,
}

const UID: &str = "u-1";

impl World {
    fn new(spec: Value) -> Self {
        let root = tempfile::tempdir().expect("a folder");
        let runtime = FakeRuntime::with_images(&["pause", "web:1"]);
        let network = FakeNetwork::default();
        let pod = json!({
            "metadata": { "name": "web", "namespace": "shop", "uid": UID, "resourceVersion": "1", "generation": 1 },
            "spec": spec, "status": { "phase": "Pending" },
        });
        let api = FakeApi {
            pod: Arc::new(Mutex::new(Some(pod.clone()))),
            objects: Arc::default(),
            asked: Arc::default(),
        };
        let options = Options {
            node_name: "node-1".to_owned(),
            paths: orch_config::Paths::new(root.path()),
            client: Client::new(api.clone()),
            runtime: Arc::new(runtime.clone()),
            pause_image: "pause".to_owned(),
            ..Options::default()
        };
        let cx = Arc::new(Context::new(options, Arc::new(network.clone()), Machine::default()));
        let pod: Arc<Pod> = Arc::new(serde_json::from_value(pod).expect("a pod"));
        let (wanted, wake, stop) = (
            watch::channel(Wanted::Exists(pod.clone())).0,
            Arc::new(Notify::new()),
            CancellationToken::new(),
        );
        let mut world = Self {
            runtime,
            network,
            api,
            cx,
            wanted,
            wake,
            pod,
            worker: tokio::spawn(async {}),
            stop,
            _root: root,
        };
        world.start_agent();
        world
    }

    fn start_agent(&mut self) {
        self.stop = CancellationToken::new();
        let worker = Worker::new(
            self.cx.clone(),
            PodRef::of(&self.pod),
            self.wanted.subscribe(),
            self.wake.clone(),
        );
        self.worker = tokio::spawn(worker.run(self.stop.clone()));
    }

    async fn stop_agent(&mut self) {
        self.stop.cancel();
        (&mut self.worker).await.expect("the worker ends");
    }

    fn status(&self) -> Value {
        self.api.pod.lock().as_ref().map(|pod| pod["status"].clone()).unwrap_or_default()
    }

    fn phase(&self) -> String {
        self.status()["phase"].as_str().unwrap_or_default().to_owned()
    }

    fn is_ready(&self) -> bool {
        let status = self.status();
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        conditions
            .iter()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    }

    async fn containers(&self, name: &str) -> Vec<Container> {
        let mut all = self.runtime.list(&[(labels::CONTAINER, name)]).await.expect("a list");
        all.sort_by_key(|container| container.created_nanos);
        all
    }

    /// Deletes the pod as the API server does it: a timestamp, and the grace period.
    fn delete(&self, grace: i64) {
        let mut value = self.api.pod.lock().clone().expect("the pod");
        value["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        value["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        value["metadata"]["resourceVersion"] = json!("1000");
        let pod: Pod = serde_json::from_value(value).expect("a pod");
        self.wanted.send_replace(Wanted::Exists(Arc::new(pod)));
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..400 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("did not happen: {what}");
}

fn web() -> Value {
    json!({ "containers": [{ "name": "a", "image": "web:1", "imagePullPolicy": "IfNotPresent" }] })
}

mod docker;

#[tokio::test]
async fn a_pod_becomes_ready_with_an_address() {
    let world = World::new(web());
    eventually("ready", async || world.is_ready()).await;
    assert_eq!(world.status()["podIP"], "10.244.1.5");
    assert_eq!(world.phase(), "Running");
    assert_eq!(world.network.connected.lock().len(), 1);
}

#[tokio::test]
async fn a_restarted_agent_leaves_the_containers_alone() {
    let mut world = World::new(web());
    eventually("ready", async || world.is_ready()).await;
    let before = world.containers("a").await;
    world.stop_agent().await;
    let looked = world.runtime.asked().lists;
    world.start_agent();
    // Once to see what is there, and again to see what came of it.
    eventually("it has looked", async || world.runtime.asked().lists > looked).await;
    world.wake.notify_one();
    eventually("it has looked again", async || world.runtime.asked().lists > looked + 1).await;
    assert_eq!(world.containers("a").await, before);
    assert!(world.is_ready());
}

#[tokio::test]
async fn a_restarted_agent_keeps_a_ready_pod_ready_until_its_probe_says_otherwise() {
    let mut spec = web();
    spec["containers"][0]["readinessProbe"] =
        json!({ "exec": { "command": ["check"] }, "periodSeconds": 1, "failureThreshold": 2 });
    let mut world = World::new(spec);
    eventually("ready", async || world.is_ready()).await;
    world.stop_agent().await;
    let pod = world.api.pod.lock().clone().expect("the pod");
    world
        .wanted
        .send_replace(Wanted::Exists(Arc::new(serde_json::from_value(pod).expect("a pod"))));
    world.runtime.set_exec_exit_code(1);
    let probed = world.runtime.asked().execs;
    world.start_agent();
    eventually("it has probed", async || world.runtime.asked().execs > probed).await;
    assert!(world.is_ready(), "one failure is not two");
    eventually("not ready", async || !world.is_ready()).await;
}

#[tokio::test]
async fn a_pod_is_over_only_when_its_sidecars_have_ended() {
    let mut spec = web();
    spec["restartPolicy"] = json!("Never");
    spec["initContainers"] = json!([{ "name": "side", "image": "web:1", "restartPolicy": "Always",
                                      "imagePullPolicy": "IfNotPresent" }]);
    let world = World::new(spec);
    eventually("ready", async || world.is_ready()).await;
    world.runtime.exit(&world.containers("a").await[0].id, 0);
    world.wake.notify_one();
    eventually("over", async || {
        let status = world.status();
        let over = status["phase"] == "Succeeded";
        let side = &status["initContainerStatuses"][0]["state"];
        assert!(!over || side["terminated"].is_object(), "over with {side}");
        over
    })
    .await;
    assert_eq!(world.containers("side").await.len(), 1, "it is not started again");
}

#[tokio::test]
async fn volumes_that_cannot_be_made_are_tried_at_their_own_pace() {
    let mut spec = web();
    spec["volumes"] = json!([{ "name": "v", "configMap": { "name": "late" } }]);
    let world = World::new(spec);
    let tries = || world.api.asked.lock().iter().filter(|path| path.ends_with("/late")).count();
    eventually("tried", async || tries() > 0).await;
    // The engine tells of each sandbox that is made and removed, and that wakes the worker.
    for _ in 0..50 {
        world.wake.notify_one();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(tries() <= 2, "{} tries in half a second", tries());
    let map = json!({ "metadata": { "name": "late" }, "data": {} });
    world.api.objects.lock().push(("/configmaps/late".to_owned(), map));
    eventually("ready", async || world.is_ready()).await;
}

#[tokio::test]
async fn a_crash_restarts_the_container_and_counts() {
    let world = World::new(web());
    eventually("ready", async || world.is_ready()).await;
    let id = world.containers("a").await[0].id.clone();
    world.runtime.exit(&id, 3);
    world.wake.notify_one();
    eventually("restarted", async || {
        let status = &world.status()["containerStatuses"][0];
        status["restartCount"] == 1
            && status["lastState"]["terminated"]["exitCode"] == 3
            && status["ready"] == true
    })
    .await;
}

#[tokio::test]
async fn a_dead_sandbox_is_replaced_with_all_that_was_in_it() {
    let world = World::new(web());
    eventually("ready", async || world.is_ready()).await;
    let sandbox = world.containers("POD").await[0].id.clone();
    world.runtime.exit(&sandbox, 137);
    world.wake.notify_one();
    eventually("a new sandbox", async || {
        let sandboxes = world.containers("POD").await;
        sandboxes.len() == 1
            && sandboxes[0].id != sandbox
            && world.containers("a").await.iter().any(Container::is_running)
    })
    .await;
    eventually("ready again", async || world.is_ready()).await;
    assert_eq!(world.network.connected.lock().len(), 1, "the old sandbox is disconnected");
}

#[tokio::test]
async fn a_deleted_pod_leaves_nothing_behind() {
    let world = World::new(web());
    eventually("ready", async || world.is_ready()).await;
    world.delete(5);
    eventually("gone from the API", async || world.api.pod.lock().is_none()).await;
    assert!(world.runtime.list(&[]).await.expect("a list").is_empty());
    assert!(world.network.connected.lock().is_empty());
    assert!(!world.cx.pod_folder(UID).exists());
}

#[tokio::test]
async fn a_pod_that_vanished_from_the_api_is_ended() {
    let world = World::new(web());
    eventually("ready", async || world.is_ready()).await;
    world.wanted.send_replace(Wanted::Gone);
    eventually("nothing runs", async || world.runtime.list(&[]).await.expect("a list").is_empty())
        .await;
}

#[tokio::test]
async fn an_image_that_cannot_be_had_is_said_in_the_status() {
    let mut spec = web();
    spec["containers"][0]["image"] = json!("nowhere:1");
    let world = World::new(spec);
    eventually("the reason", async || {
        world.status()["containerStatuses"][0]["state"]["waiting"]["reason"] == "ErrImagePull"
    })
    .await;
    eventually("the back-off", async || {
        world.status()["containerStatuses"][0]["state"]["waiting"]["reason"] == "ImagePullBackOff"
    })
    .await;
    assert_eq!(world.phase(), "Pending");
    assert_eq!(world.runtime.pulls(), ["nowhere:1"]);
}

#[tokio::test]
async fn a_missing_config_map_holds_the_container_back_until_it_exists() {
    let mut spec = web();
    spec["containers"][0]["envFrom"] = json!([{ "configMapRef": { "name": "settings" } }]);
    let world = World::new(spec);
    eventually("the reason", async || {
        let waiting = &world.status()["containerStatuses"][0]["state"]["waiting"];
        waiting["reason"] == "CreateContainerConfigError"
            && waiting["message"] == "configmap \"settings\" not found"
    })
    .await;
    let map = json!({ "metadata": { "name": "settings" }, "data": { "A": "1" } });
    world.api.objects.lock().push(("/configmaps/settings".to_owned(), map));
    eventually("ready", async || world.is_ready()).await;
    let id = world.containers("a").await[0].id.clone();
    assert!(world.runtime.spec(&id).expect("a spec").env.contains(&"A=1".to_owned()));
}

#[tokio::test]
async fn a_network_that_fails_is_tried_again_and_leaves_no_sandbox() {
    let world = World::new(web());
    // The start may have been faster than this test; then the sandbox is thrown away to force another one.
    *world.network.broken.lock() = true;
    for sandbox in world.containers("POD").await {
        world.runtime.remove(&sandbox.id).await.expect("removed");
    }
    world.wake.notify_one();
    eventually("it has failed", async || *world.network.failures.lock() > 0).await;
    *world.network.broken.lock() = false;
    eventually("ready", async || world.is_ready()).await;
    assert_eq!(world.containers("POD").await.len(), 1);
}

#[tokio::test]
async fn a_finished_job_pod_succeeds_and_frees_its_address() {
    let mut spec = web();
    spec["restartPolicy"] = json!("Never");
    let world = World::new(spec);
    eventually("running", async || world.phase() == "Running").await;
    let id = world.containers("a").await[0].id.clone();
    world.runtime.exit(&id, 0);
    world.wake.notify_one();
    eventually("succeeded", async || world.phase() == "Succeeded").await;
    eventually("no sandbox", async || world.containers("POD").await.is_empty()).await;
    assert!(world.network.connected.lock().is_empty());
    assert_eq!(world.containers("a").await.len(), 1, "kept for its log");
}

#[tokio::test]
async fn pods_are_left_alone_while_the_engine_is_away() {
    let mut spec = web();
    spec["containers"][0]["livenessProbe"] =
        json!({ "exec": { "command": ["check"] }, "periodSeconds": 1, "failureThreshold": 1 });
    let world = World::new(spec);
    eventually("ready", async || world.is_ready()).await;
    world.runtime.set_down(true);
    let asked = world.runtime.asked();
    world.wake.notify_one();
    eventually("agent and probe were left without an answer, more than once", async || {
        let now = world.runtime.asked();
        now.lists > asked.lists && now.execs > asked.execs + 1
    })
    .await;
    assert!(world.is_ready(), "nothing is concluded from silence");
    world.runtime.set_down(false);
    let asked = world.runtime.asked();
    world.wake.notify_one();
    eventually("both have looked again", async || {
        let now = world.runtime.asked();
        now.lists > asked.lists && now.execs > asked.execs
    })
    .await;
    let containers = world.containers("a").await;
    assert!(containers.len() == 1 && containers[0].is_running());
}

#[tokio::test]
async fn a_failing_liveness_probe_restarts_the_container() {
    let mut spec = web();
    spec["containers"][0]["livenessProbe"] =
        json!({ "exec": { "command": ["check"] }, "periodSeconds": 1, "failureThreshold": 1 });
    let world = World::new(spec);
    eventually("running", async || world.phase() == "Running").await;
    world.runtime.set_exec_exit_code(1);
    eventually("restarted", async || world.containers("a").await.len() == 2).await;
    world.runtime.set_exec_exit_code(0);
}

#[tokio::test]
async fn readiness_follows_its_probe() {
    let mut spec = web();
    spec["containers"][0]["readinessProbe"] =
        json!({ "exec": { "command": ["check"] }, "periodSeconds": 1, "failureThreshold": 1 });
    let world = World::new(spec);
    world.runtime.set_exec_exit_code(1);
    eventually("running", async || world.phase() == "Running").await;
    eventually("it has probed", async || world.runtime.asked().execs > 0).await;
    assert!(!world.is_ready());
    world.runtime.set_exec_exit_code(0);
    eventually("ready", async || world.is_ready()).await;
    world.runtime.set_exec_exit_code(1);
    eventually("not ready", async || !world.is_ready()).await;
}
