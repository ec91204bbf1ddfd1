//! The Docker backend against a real engine, which the tests start themselves ([`engine`]).

mod engine;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use orch_cri::{
    Container, ContainerSpec, DockerRuntime, EventKind, ExecSpec, LogQuery, Mount, NetworkMode,
    Runtime as _, State,
};
use tokio::io::AsyncWriteExt as _;

use crate::engine::{Engine, tool};

const IMAGE: &str = "orch-test/tool:cri";

struct Bench {
    docker: DockerRuntime,
    engine: Arc<Engine>,
}

impl Bench {
    async fn new(engine: Arc<Engine>, node: &str) -> Self {
        let docker = DockerRuntime::new(engine.socket(), node);
        docker.import_program(IMAGE, tool()).await.expect("imported");
        let bench = Self { docker, engine };
        bench.clear().await;
        bench
    }

    /// Removes what this test's node has.
    async fn clear(&self) {
        for container in self.docker.list(&[]).await.expect("a list") {
            self.docker.remove(&container.id).await.expect("removed");
        }
    }

    async fn start(&self, spec: &ContainerSpec) -> String {
        let id = self.docker.create(spec).await.expect("created");
        self.docker.start(&id).await.expect("started");
        id
    }

    async fn ended(&self, id: &str) -> Container {
        for _ in 0..500 {
            let found = self.docker.inspect(id).await.expect("an answer").expect("a container");
            if !found.is_running() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{id} does not end");
    }

    async fn exec(&self, id: &str, words: &[&str], stdin: Option<&[u8]>) -> (Vec<u8>, i64) {
        let spec = ExecSpec {
            command: [&["/program"], words].concat().into_iter().map(str::to_owned).collect(),
            stdin: stdin.is_some(),
            stdout: true,
            stderr: true,
            tty: false,
        };
        let session = self.docker.exec(id, &spec).await.expect("a session");
        let (mut input, mut output) = (session.input, session.output);
        let feed = async {
            if let Some(bytes) = stdin {
                input.write_all(bytes).await.expect("written");
                input.shutdown().await.expect("closed");
            }
        };
        let read = async {
            let mut all = Vec::new();
            while let Some(piece) = output.next().await {
                all.extend_from_slice(&piece.expect("a piece").into_bytes());
            }
            all
        };
        let ((), all) = tokio::join!(feed, read);
        loop {
            let state = self.docker.exec_state(&session.id).await.expect("a state");
            if !state.running {
                return (all, state.exit_code);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn spec(name: &str, args: &[&str]) -> ContainerSpec {
    ContainerSpec {
        name: format!("orch-test-{name}"),
        image: IMAGE.to_owned(),
        args: args.iter().map(|&word| word.to_owned()).collect(),
        labels: BTreeMap::from([("orch.test".to_owned(), name.to_owned())]),
        ..ContainerSpec::default()
    }
}

#[tokio::test]
async fn a_container_runs_is_seen_and_goes() {
    let Some(engine) = Engine::get() else { return };
    let bench = Bench::new(engine, "test-cri-life").await;
    let mut events = bench.docker.events().await.expect("events");
    let mut wanted = spec("life", &[]);
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("note"), "from the host").expect("written");
    wanted.mounts.push(Mount {
        source: folder.path().to_string_lossy().into_owned(),
        target: "/data".to_owned(),
        read_only: true,
        ..Mount::default()
    });
    wanted.env.push("COLOUR=green".to_owned());
    let id = bench.start(&wanted).await;
    let seen = events.next().await.expect("an event").expect("an event");
    assert_eq!((seen.container.as_str(), seen.kind), (id.as_str(), EventKind::Started));

    let found = bench.docker.list(&[("orch.test", "life")]).await.expect("a list");
    assert_eq!(found.len(), 1);
    assert!(found[0].is_running() && found[0].pid > 0 && found[0].created_nanos > 0);
    assert!(
        DockerRuntime::new(bench.engine.socket(), "another-node")
            .list(&[])
            .await
            .expect("a list")
            .is_empty()
    );

    assert_eq!(bench.exec(&id, &["env", "COLOUR"], None).await, (b"green\n".to_vec(), 0));
    assert_eq!(
        bench.exec(&id, &["read", "/data/note"], None).await,
        (b"from the host".to_vec(), 0)
    );
    assert_eq!(bench.exec(&id, &["exit", "7"], None).await.1, 7);

    let mut log = bench.docker.logs(&id, &LogQuery::default()).await.expect("a log");
    let mut text = Vec::new();
    while let Some(piece) = log.next().await {
        text.extend_from_slice(&piece.expect("a piece").into_bytes());
    }
    let text = String::from_utf8(text).expect("text");
    assert!(text.contains("to stdout\n") && text.contains("to stderr\n"), "{text}");

    bench.docker.kill(&id, "SIGKILL").await.expect("killed");
    assert!(matches!(bench.ended(&id).await.state, State::Exited { code: 137, .. }));
    bench.docker.kill(&id, "SIGKILL").await.expect("nothing to kill is fine");
    bench.docker.remove(&id).await.expect("removed");
    bench.docker.remove(&id).await.expect("nothing to remove is fine");
    assert_eq!(bench.docker.inspect(&id).await.expect("an answer"), None);
}

#[tokio::test]
async fn megabytes_go_through_a_command_both_ways() {
    let Some(engine) = Engine::get() else { return };
    let bench = Bench::new(engine, "test-cri-pipe").await;
    let id = bench.start(&spec("pipe", &[])).await;
    let sent: Vec<u8> =
        (0..4_000_003_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (received, code) = bench.exec(&id, &["cat"], Some(&sent)).await;
    assert_eq!(code, 0);
    assert!(received == sent, "{} bytes of {} came back", received.len(), sent.len());
    bench.clear().await;
}

#[tokio::test]
async fn a_container_is_created_before_its_sandbox_runs_and_joins_it() {
    let Some(engine) = Engine::get() else { return };
    let bench = Bench::new(engine, "test-cri-join").await;
    let sandbox = bench.docker.create(&spec("sandbox", &[])).await.expect("created");
    let mut joiner = spec("joiner", &[]);
    joiner.network = NetworkMode::Container(sandbox.clone());
    joiner.ipc_of = Some(sandbox.clone());
    let joiner = bench.docker.create(&joiner).await.expect("created");
    bench.docker.start(&sandbox).await.expect("started");
    bench.docker.start(&joiner).await.expect("started");
    let netns = async |id: &str| {
        let pid = bench.docker.inspect(id).await.expect("an answer").expect("a container").pid;
        std::fs::read_link(format!("/proc/{pid}/ns/net")).expect("a namespace")
    };
    assert_eq!(netns(&sandbox).await, netns(&joiner).await);
    bench.clear().await;
}

#[tokio::test]
async fn what_is_missing_has_a_name() {
    let Some(engine) = Engine::get() else { return };
    let docker = DockerRuntime::new(engine.socket(), "test-cri-missing");
    assert_eq!(docker.image("orch-test/none:1").await.expect("an answer"), None);
    let mut wanted = spec("none", &[]);
    wanted.image = "orch-test/none:1".to_owned();
    assert!(docker.create(&wanted).await.expect_err("no image").is_not_found());
    let away = DockerRuntime::new(Path::new("/nonexistent/docker.sock"), "n");
    let error = away.info().await.expect_err("nobody there");
    assert!(error.is_unavailable() && error.to_string().contains("start it"), "{error}");
}
