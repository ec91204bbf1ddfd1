//! A node's pods on a real Docker Engine, with the network made by a CNI plugin of this test.

#[path = "../../../cri/tests/engine/mod.rs"]
mod engine;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Instant;

use futures::{SinkExt as _, StreamExt as _};
use orch_cri::{ContainerSpec, DockerRuntime, ExecSpec, NetworkMode};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use self::engine::{Engine, tool};
use super::*;
use crate::manager::Manager;
use crate::network::CniNetwork;
use crate::server::stream::{self, Session};
use crate::server::websocket::Protocol;
use crate::source::Pods;

const IMAGE: &str = "orch-test/tool:kubelet";
const POD_IP: &str = "10.9.9.5";
/// Pods started for the median.
const STARTS: usize = 5;

/// Gives every sandbox the same address, on `lo`, and notes who has it.
const PLUGIN: &str = r#"#!/bin/sh -e
conf=$(cat)
held=$(dirname "$0")/held
mkdir -p "$held"
case "$CNI_COMMAND" in
ADD)
    nsenter --net="$CNI_NETNS" ip address add 10.9.9.5/32 dev lo
    : >"$held/$CNI_CONTAINERID"
    echo '{"cniVersion":"1.1.0","ips":[{"address":"10.9.9.5/32"}]}' ;;
DEL) rm -f "$held/$CNI_CONTAINERID" ;;
GC)
    for file in "$held"/*; do
        case "$conf" in *"$(basename "$file")"*) ;; *) rm -f "$file" ;; esac
    done ;;
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.1.0"]}' ;;
esac
"#;

struct Node {
    runtime: Arc<DockerRuntime>,
    api: FakeApi,
    cx: Arc<Context>,
    pods: watch::Sender<Pods>,
    manager: JoinHandle<()>,
    stop: CancellationToken,
    root: tempfile::TempDir,
    _engine: Arc<Engine>,
}

impl Node {
    async fn new(name: &str) -> Option<Self> {
        let engine = Engine::get()?;
        let runtime = Arc::new(DockerRuntime::new(engine.socket(), name));
        runtime.import_program(IMAGE, tool()).await.expect("imported");
        let root = tempfile::tempdir().expect("a folder");
        let paths = orch_config::Paths::new(root.path());
        for folder in [paths.cni_conf_dir(), paths.cni_bin_dir(), paths.run(), paths.pods_dir()] {
            std::fs::create_dir_all(folder).expect("a folder");
        }
        let conf = json!({ "cniVersion": "1.1.0", "name": "test", "plugins": [{ "type": "one" }] });
        std::fs::write(paths.cni_conf_dir().join("10-test.conflist"), conf.to_string())
            .expect("written");
        let plugin = paths.cni_bin_dir().join("one");
        std::fs::write(&plugin, PLUGIN).expect("written");
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).expect("a mode");
        std::fs::write(paths.subnet_env(), "").expect("written");
        let api = FakeApi { pod: Arc::default(), objects: Arc::default(), asked: Arc::default() };
        let options = Options {
            node_name: name.to_owned(),
            client: Client::new(api.clone()),
            runtime: runtime.clone(),
            pause_image: IMAGE.to_owned(),
            relist: Duration::from_secs(60),
            anchor_container: Some(format!("{name}-anchor")),
            paths: paths.clone(),
            ..Options::default()
        };
        let cx = Arc::new(Context::new(
            options,
            Arc::new(CniNetwork::new(paths)),
            Machine { memory_bytes: 8 << 30, ..Machine::default() },
        ));
        let mut node = Self {
            runtime,
            api,
            cx,
            pods: watch::channel(None).0,
            manager: tokio::spawn(async {}),
            stop: CancellationToken::new(),
            root,
            _engine: engine,
        };
        node.start_agent();
        Some(node)
    }

    fn start_agent(&mut self) {
        self.stop = CancellationToken::new();
        let manager = Manager::new(self.cx.clone(), self.pods.subscribe(), self.stop.clone());
        self.manager = tokio::spawn(manager.run());
    }

    async fn stop_agent(&mut self) {
        self.stop.cancel();
        (&mut self.manager).await.expect("the manager ends");
    }

    fn apply(&self, uid: &str, spec: &Value) {
        let pod = json!({
            "metadata": { "name": "web", "namespace": "shop", "uid": uid, "resourceVersion": "1" },
            "spec": spec, "status": { "phase": "Pending" },
        });
        *self.api.pod.lock() = Some(pod.clone());
        self.see(pod);
    }

    /// Hands a state of the pod to the agent, as its watch does.
    fn see(&self, pod: Value) {
        let pod: Pod = serde_json::from_value(pod).expect("a pod");
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        self.pods.send_replace(Some(Arc::new([(uid, Arc::new(pod))].into())));
    }

    fn status(&self) -> Value {
        self.api.pod.lock().as_ref().map(|pod| pod["status"].clone()).unwrap_or_default()
    }

    fn is_ready(&self) -> bool {
        let conditions = self.status()["conditions"].as_array().cloned().unwrap_or_default();
        conditions
            .iter()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    }

    async fn ids(&self) -> Vec<String> {
        let mut ids: Vec<String> = self
            .runtime
            .list(&[])
            .await
            .expect("a list")
            .into_iter()
            .map(|container| container.id)
            .collect();
        ids.sort();
        ids
    }

    async fn app(&self) -> Container {
        let found = self.runtime.list(&[(labels::CONTAINER, "a")]).await.expect("a list");
        found.into_iter().find(Container::is_running).expect("a running container")
    }

    /// Runs a command over a WebSocket, as `kubectl exec -i` does; returns stdout and the final status.
    async fn exec(&self, words: &[&str], stdin: Option<Vec<u8>>) -> (Vec<u8>, Value) {
        let spec = ExecSpec {
            command: [&["/program"], words].concat().into_iter().map(str::to_owned).collect(),
            stdin: stdin.is_some(),
            stdout: true,
            stderr: true,
            tty: false,
        };
        let session = Session::Exec(self.app().await.id, spec);
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let server = WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
        let client = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
        let (mut sink, mut source) = client.split();
        let feed = async {
            for piece in stdin.iter().flat_map(|all| all.chunks(32 * 1024)) {
                let message = Message::Binary([&[0], piece].concat().into());
                sink.send(message).await.expect("sent");
            }
            sink.send(Message::Binary(vec![255, 0].into())).await.expect("sent");
        };
        let read = async {
            let (mut out, mut status) = (Vec::new(), Value::Null);
            while let Some(Ok(message)) = source.next().await {
                match message {
                    Message::Binary(bytes) if bytes[0] == 1 => out.extend_from_slice(&bytes[1..]),
                    Message::Binary(bytes) if bytes[0] == 3 => {
                        status = serde_json::from_slice(&bytes[1..]).expect("a status");
                    }
                    _ => {}
                }
            }
            (out, status)
        };
        let ((), (), result) =
            tokio::join!(stream::run(&self.cx, server, Protocol::V5, session), feed, read);
        result
    }

    async fn delete(&self, grace: i64) {
        let mut pod = self.api.pod.lock().clone().expect("the pod");
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        pod["metadata"]["resourceVersion"] = json!("1000");
        self.see(pod);
        patiently("gone from the API", async || self.api.pod.lock().is_none()).await;
        self.pods.send_replace(Some(Arc::default()));
    }

    fn held(&self) -> Vec<String> {
        let folder = self.cx.options.paths.cni_bin_dir().join("held");
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

/// A loaded machine starts a container in seconds.
async fn patiently(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("did not happen: {what}");
}

fn app() -> Value {
    json!({
        "terminationGracePeriodSeconds": 1,
        "containers": [{
            "name": "a", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
            "env": [
                { "name": "COLOUR", "value": "green" },
                { "name": "IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
            ],
            "resources": { "limits": { "cpu": "500m", "memory": "64Mi" } },
            "volumeMounts": [
                { "name": "settings", "mountPath": "/settings" },
                { "name": "secret", "mountPath": "/secret" },
                { "name": "shared", "mountPath": "/shared" },
            ],
        }],
        "volumes": [
            { "name": "settings", "configMap": { "name": "settings" } },
            { "name": "secret", "secret": { "secretName": "key" } },
            { "name": "shared", "emptyDir": {} },
        ],
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_lives_on_docker_from_its_start_to_its_end() {
    let Some(mut node) = Node::new("test-kubelet-life").await else { return };
    node.api.objects.lock().extend([
        ("/configmaps/settings".to_owned(), json!({ "data": { "greeting": "hello" } })),
        ("/secrets/key".to_owned(), json!({ "data": { "key": "c2VjcmV0" } })),
    ]);
    // What another node has on the same engine is none of this agent's business.
    let other = DockerRuntime::new(node._engine.socket(), "test-kubelet-other");
    let spec = ContainerSpec {
        name: "orch-test-other".to_owned(),
        image: IMAGE.to_owned(),
        labels: labels::labels(
            &PodRef { namespace: "x".to_owned(), name: "x".to_owned(), uid: "x".to_owned() },
            "a",
            0,
        ),
        ..ContainerSpec::default()
    };
    let foreign = other.create(&spec).await.expect("created");
    other.start(&foreign).await.expect("started");

    node.apply("u-life", &app());
    patiently("ready", async || node.is_ready()).await;
    assert_eq!(node.status()["podIP"], POD_IP);
    assert_eq!(node.held().len(), 1);
    let text = async |words: &[&str]| {
        String::from_utf8(node.exec(words, None).await.0).expect("text").trim_end().to_owned()
    };
    assert_eq!(text(&["env", "COLOUR"]).await, "green");
    assert_eq!(text(&["env", "IP"]).await, POD_IP);
    assert_eq!(text(&["read", "/settings/greeting"]).await, "hello");
    assert_eq!(text(&["read", "/secret/key"]).await, "secret");
    assert!(text(&["read", "/etc/hosts"]).await.contains("10.9.9.5\tweb"));
    assert!(text(&["read", "/etc/resolv.conf"]).await.starts_with("nameserver 10.96.0.10"));
    // The sandbox's namespace is the container's.
    assert!(text(&["read", "/proc/net/fib_trie"]).await.contains(POD_IP));

    let sent: Vec<u8> =
        (0..4_000_003_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (received, status) = node.exec(&["cat"], Some(sent.clone())).await;
    assert!(received == sent, "{} bytes of {} came back", received.len(), sent.len());
    assert_eq!(status["status"], "Success");
    let (_, status) = node.exec(&["exit", "7"], None).await;
    assert_eq!(status["details"]["causes"][0]["message"], "7");

    let before = node.ids().await;
    node.stop_agent().await;
    // Left by a crash between ADD and the next look: no sandbox has this name.
    let leaked = node.cx.options.paths.cni_bin_dir().join("held").join("leaked");
    std::fs::write(&leaked, "").expect("written");
    node.start_agent();
    patiently("the leaked address is free", async || !leaked.exists()).await;
    assert_eq!(node.ids().await, before, "a new agent leaves the containers alone");
    assert_eq!(node.held().len(), 1);

    node.runtime.kill(&node.app().await.id, "SIGKILL").await.expect("killed");
    patiently("restarted", async || {
        let status = &node.status()["containerStatuses"][0];
        status["restartCount"] == 1
            && status["lastState"]["terminated"]["exitCode"] == 137
            && status["ready"] == true
    })
    .await;

    node.delete(1).await;
    assert_eq!(node.ids().await, Vec::<String>::new());
    assert_eq!(node.held(), Vec::<String>::new());
    let left = |folder: std::path::PathBuf| std::fs::read_dir(folder).map_or(0, Iterator::count);
    assert_eq!(left(node.cx.options.paths.netns_dir()), 0, "no namespace is held open");
    assert_eq!(left(node.cx.options.paths.pods_dir()), 0);
    let foreign_state = other.inspect(&foreign).await.expect("an answer").expect("a container");
    assert!(foreign_state.is_running(), "another node's container is left alone");
    other.remove(&foreign).await.expect("removed");
    node.stop_agent().await;
    assert!(node.root.path().exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_network_pod_is_in_the_namespace_of_the_nodes_anchor() {
    let Some(mut node) = Node::new("test-kubelet-host").await else { return };
    let anchor = ContainerSpec {
        name: "test-kubelet-host-anchor".to_owned(),
        image: IMAGE.to_owned(),
        ..ContainerSpec::default()
    };
    let anchor = node.runtime.create(&anchor).await.expect("created");
    node.runtime.start(&anchor).await.expect("started");
    let mut spec = app();
    spec["hostNetwork"] = json!(true);
    spec["volumes"] = json!([]);
    spec["containers"][0]["volumeMounts"] = json!([]);
    spec["containers"][0]["readinessProbe"] = json!({ "tcpSocket": { "port": 1 } });
    spec["containers"][0]["livenessProbe"] =
        json!({ "exec": { "command": ["/program", "env", "COLOUR"] } });
    node.apply("u-host", &spec);
    patiently("running", async || node.status()["phase"] == "Running").await;
    assert_eq!(node.status()["podIP"], node.cx.options.node_ip.to_string());
    assert!(!node.is_ready(), "nobody listens on port 1");
    let netns = async |id: &str| {
        let pid = node.runtime.inspect(id).await.expect("an answer").expect("a container").pid;
        std::fs::read_link(format!("/proc/{pid}/ns/net")).expect("a namespace")
    };
    assert_eq!(netns(&node.app().await.id).await, netns(&anchor).await);
    assert_eq!(node.held(), Vec::<String>::new(), "CNI is not for the node's own network");
    node.delete(0).await;
    assert_eq!(node.ids().await, [anchor.as_str()]);
    node.runtime.remove(&anchor).await.expect("removed");
    node.stop_agent().await;
}

/// The price of a pod beside that of its two containers: printed, and only a gross excess fails, as other work on the
/// machine moves both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_costs_little_more_than_its_two_containers() {
    let Some(mut node) = Node::new("test-kubelet-cost").await else { return };
    let spec = json!({ "terminationGracePeriodSeconds": 0, "containers": [
        { "name": "a", "image": IMAGE, "imagePullPolicy": "IfNotPresent" },
    ] });
    let (mut plain, mut pods) = (Vec::new(), Vec::new());
    for round in 0..STARTS {
        let begun = Instant::now();
        let container = |name: &str, network: NetworkMode| ContainerSpec {
            name: format!("orch-test-cost-{name}-{round}"),
            image: IMAGE.to_owned(),
            network,
            ..ContainerSpec::default()
        };
        let first = container("first", NetworkMode::None);
        let first = node.runtime.create(&first).await.expect("created");
        node.runtime.start(&first).await.expect("started");
        let second = container("second", NetworkMode::Container(first.clone()));
        let second = node.runtime.create(&second).await.expect("created");
        node.runtime.start(&second).await.expect("started");
        plain.push(begun.elapsed());
        for id in [&second, &first] {
            node.runtime.remove(id).await.expect("removed");
        }

        let begun = Instant::now();
        node.apply(&format!("u-{round}"), &spec);
        patiently("ready", async || node.is_ready()).await;
        pods.push(begun.elapsed());
        node.delete(0).await;
    }
    plain.sort();
    pods.sort();
    let (plain, pod) = (plain[STARTS / 2], pods[STARTS / 2]);
    let ratio = pod.as_secs_f64() / plain.as_secs_f64();
    let _ = writeln!(
        std::io::stderr(),
        "pod until Ready {} ms, its two containers alone {} ms: {ratio:.2}",
        pod.as_millis(),
        plain.as_millis()
    );
    assert!(ratio < 3.0, "{pods:?}");
    node.stop_agent().await;
}
