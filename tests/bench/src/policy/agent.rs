//! The agent with a big cluster: how long from the API server's event until a change is in force, what is rewritten, what
//! memory it takes, and how long the compiler alone needs.
//!
//! In a process of its own, because memory is a process's. The API server is in it, too, filled before memory is looked at
//! for the first time.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use orch_ebpf_loader::{Maps, install};
use orch_ebpf_maps::state;
use orch_netagent::Mode;
use orch_netagent::policy::world::{Cluster, Local, Reader};
use orch_netagent::{EtcdConfig, Options, run};
use orch_policy::{Compiled, compile};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tests_fake_api::FakeServer;
use tokio_util::sync::CancellationToken;

use crate::objects;
use crate::process::memory_mib;
use crate::world::{Files, Node};

const PODS: usize = 1000;
/// Pods on the node that is looked at: a full node.
pub(crate) const LOCAL: usize = 100;
const POLICIES: usize = 500;
/// A pod of the node, of the first application: its label is its own affair. It is watched itself.
const OWN: (usize, usize) = (1, 1);
/// A pod elsewhere that a policy of the node's pods lets in, and one of these.
const PEER: (usize, usize) = (200, 14);
const COMPILATIONS: usize = 9;
const PATIENCE: Duration = Duration::from_secs(60);
/// Nothing is written any more when nothing was for this long.
const QUIET: Duration = Duration::from_millis(60);

/// What was found.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) compile_millis: f64,
    /// Until everything is in force, with the caches filled over the API.
    pub(crate) start_millis: f64,
    /// By which the process grew with the agent.
    pub(crate) agent_mib: f64,
    pub(crate) policy_edits: Vec<f64>,
    pub(crate) label_changes: Vec<f64>,
    pub(crate) peer_changes: Vec<f64>,
    /// Rows that the change of a pod's own label wrote, and that of a pod whom policies let in.
    pub(crate) label_rows: usize,
    pub(crate) peer_rows: usize,
}

/// Everything; `changes` of each kind.
pub(crate) fn measure(changes: usize) -> anyhow::Result<Found> {
    let compile_millis = compilation()?;
    let node = Node::new()?;
    let files = Files::new()?;
    let links = node.ports(LOCAL)?;
    let server = FakeServer::new();
    for object in objects::namespaces() {
        let path =
            format!("/api/v1/namespaces/{}", object["metadata"]["name"].as_str().unwrap_or(""));
        server.put(&path, object);
    }
    for place in 0..10 {
        let name = format!("node{place}");
        let address = Ipv4Addr::new(192, 0, 2, 10 + place);
        let object = json!({"metadata": {"name": name}, "spec": {}, "status": {"addresses": [
            {"type": "InternalIP", "address": address},
        ]}});
        server.put(&format!("/api/v1/nodes/{name}"), object);
    }
    let mut maps = install(&files.pins)?;
    for place in 0..PODS {
        let (path, object, ip) = objects::cluster_pod(place, LOCAL);
        server.put(&path, object);
        if let Some(link) = links.get(place) {
            files.plug(&mut maps, &format!("pod{place}"), *link, ip, [2, 0, 0, 0, 0, 1])?;
        }
    }
    for place in 0..POLICIES {
        let (path, object) = objects::cluster_policy(place);
        server.put(&path, object);
    }
    let before = memory_mib("VmRSS")?;
    let cancel = CancellationToken::new();
    let options = Options {
        node_name: "node0".to_owned(),
        // Nobody listens there: leases are not what is measured.
        etcd: EtcdConfig {
            endpoints: vec!["http://127.0.0.1:9".to_owned()],
            ..EtcdConfig::default()
        },
        client: server.client(),
        paths: files.paths.clone(),
        policy: Mode::On,
        ..Options::default()
    };
    let seen = Seen { maps, links };
    std::thread::scope(|scope| {
        let stop = cancel.clone();
        let started = Instant::now();
        let agent = node.netns.start(scope, move || -> anyhow::Result<()> {
            // Workers are threads of this one, and so in its namespace.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            Ok(runtime.block_on(run(options, stop))?)
        });
        let outcome = (|| {
            seen.wait("everything is in force", |rows| {
                rows.iter().all(|(state, _)| *state == state::READY)
            })?;
            let start_millis = millis(started.elapsed());
            seen.settle()?;
            let agent_mib = memory_mib("VmRSS")? - before;
            let policy_edits = policy_edits(&server, &seen, changes)?;
            let ((own, first), (peer, second)) = (OWN, PEER);
            let (label_changes, label_rows) =
                relabel(&server, &seen, changes, (own, "app", ["app1", "app0"]), first)?;
            let (peer_changes, peer_rows) =
                relabel(&server, &seen, changes, (peer, "pod", ["none", "pod200"]), second)?;
            Ok(Found {
                compile_millis,
                start_millis,
                agent_mib,
                policy_edits,
                label_changes,
                peer_changes,
                label_rows,
                peer_rows,
            })
        })();
        cancel.cancel();
        let ended = agent.finish();
        let found: anyhow::Result<Found> = outcome;
        ended.context("the agent")?;
        found
    })
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The compiler alone, from what was read of the API's objects.
fn compilation() -> anyhow::Result<f64> {
    let mut cluster = Cluster::default();
    for object in objects::namespaces() {
        cluster.namespaces.push(Arc::new(serde_json::from_value(object)?));
    }
    for place in 0..PODS {
        cluster.pods.push(Arc::new(serde_json::from_value(objects::cluster_pod(place, LOCAL).1)?));
    }
    for place in 0..POLICIES {
        cluster.policies.push(Arc::new(serde_json::from_value(objects::cluster_policy(place).1)?));
    }
    let local = Local { node: "node0".to_owned(), ..Local::default() };
    let times = (0..COMPILATIONS).map(|_| {
        let begun = Instant::now();
        let mut reader = Reader::default();
        reader.read(&cluster, &local);
        std::hint::black_box(compile(reader.world(), &Compiled::default()));
        millis(begun.elapsed())
    });
    Ok(crate::median(times))
}

/// Rows as packets meet them: state and generation.
struct Seen {
    maps: Maps,
    links: Vec<u32>,
}

type Rows = Vec<(u8, u32)>;

impl Seen {
    fn rows(&self) -> anyhow::Result<Rows> {
        self.links
            .iter()
            .map(|link| {
                let row = self.maps.endpoint(*link)?.context("the row is gone")?;
                Ok((row.state, row.generation))
            })
            .collect()
    }

    fn wait(&self, what: &str, is_so: impl Fn(&Rows) -> bool) -> anyhow::Result<()> {
        let begun = Instant::now();
        while !is_so(&self.rows()?) {
            if begun.elapsed() > PATIENCE {
                bail!("not within {PATIENCE:?}: {what}");
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Until nothing is written any more.
    fn settle(&self) -> anyhow::Result<Rows> {
        let mut before = self.rows()?;
        loop {
            std::thread::sleep(QUIET);
            let now = self.rows()?;
            if now == before {
                return Ok(now);
            }
            before = now;
        }
    }

    /// From now until the row of a pod is another one.
    fn until_changed(&self, place: usize, before: &Rows) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let link = *self.links.get(place).ok_or_else(|| anyhow!("pod{place} is not here"))?;
        loop {
            let row = self.maps.endpoint(link)?.context("the row is gone")?;
            if row.generation != before[place].1 {
                return Ok(millis(begun.elapsed()));
            }
            if begun.elapsed() > PATIENCE {
                bail!("no change reached the row of pod{place}");
            }
        }
    }
}

/// A policy of the node's pods gets another port, again and again.
fn policy_edits(server: &FakeServer, seen: &Seen, count: usize) -> anyhow::Result<Vec<f64>> {
    let (path, _) = objects::cluster_policy(0);
    (0..count)
        .map(|round| {
            let before = seen.settle()?;
            server.change(&path, |policy| {
                policy["spec"]["ingress"][0]["ports"][0]["port"] = json!(81 + round);
            });
            // The policy's subject: app0 is every pod whose number divided by 7 is a multiple of 5.
            seen.until_changed(0, &before)
        })
        .collect()
}

/// A pod's label has one value and the other by turns. Gives times until `watched` has another row, and how many rows the
/// last change wrote.
fn relabel(
    server: &FakeServer,
    seen: &Seen,
    count: usize,
    (pod, label, values): (usize, &str, [&str; 2]),
    watched: usize,
) -> anyhow::Result<(Vec<f64>, usize)> {
    let (path, _, _) = objects::cluster_pod(pod, LOCAL);
    let (mut times, mut written) = (Vec::new(), 0);
    for round in 0..count {
        let before = seen.settle()?;
        server.change(&path, |pod| pod["metadata"]["labels"][label] = json!(values[round % 2]));
        times.push(seen.until_changed(watched, &before)?);
        let after = seen.settle()?;
        written = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    }
    Ok((times, written))
}
