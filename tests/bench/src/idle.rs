//! What the agent costs when it has nothing to do and the network has many nodes: memory and CPU.
//!
//! In a process of its own, because both are a process's. It starts etcd in the node's namespace, writes the leases, runs
//! the agent until all nodes are programmed, gives back what only the start needed, as the daemon does, and looks.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use orch_config::Paths;
use orch_netagent::status::NetStatus;
use orch_netagent::{EtcdConfig, Options, run};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::process::{cpu_time, memory_mib};
use crate::world::{Node, Underlay};

const PATIENCE: Duration = Duration::from_secs(60);
/// After the last node is programmed, and of watching.
const SETTLE: Duration = Duration::from_secs(5);
const WATCH: Duration = Duration::from_secs(20);
const PEER: &str = "unix://peer:0";
const CONFIG: &str = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;

/// What was found.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Idle {
    /// Memory of the process.
    pub(crate) resident_mib: f64,
    /// The part that is no file's: heaps and stacks.
    pub(crate) anonymous_mib: f64,
    /// Share of a core.
    pub(crate) cpu_percent: f64,
}

/// Starts this program anew for it.
///
/// # Errors
/// It failed.
pub(crate) fn measure() -> anyhow::Result<Idle> {
    let output = Command::new(std::env::current_exe()?)
        .arg("--idle")
        .stderr(Stdio::inherit())
        .output()
        .context("start this program for the idle agent")?;
    ensure!(output.status.success(), "the idle agent: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Killed when dropped.
struct Etcd {
    child: Child,
    url: String,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Etcd {
    /// In the namespace of the calling thread.
    fn start(folder: &Path) -> anyhow::Result<Self> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let url = format!("http://127.0.0.1:{port}");
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.join("etcd"))
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            // A socket in its folder: no port to be taken by somebody else.
            .current_dir(folder)
            .args(["--listen-peer-urls", PEER, "--initial-advertise-peer-urls", PEER])
            .args(["--initial-cluster", &format!("default={PEER}"), "--unsafe-no-fsync"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start etcd; is it installed?")?;
        let etcd = Self { child, url };
        let begun = Instant::now();
        while etcd.ctl(&["endpoint", "health"]).is_err() {
            ensure!(begun.elapsed() < PATIENCE, "etcd does not serve");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(etcd)
    }

    fn ctl(&self, words: &[&str]) -> anyhow::Result<()> {
        let status = Command::new("etcdctl")
            .args(["--endpoints", &self.url])
            .args(words)
            .env("ETCDCTL_API", "3")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("start etcdctl; is it installed?")?;
        ensure!(status.success(), "etcdctl {words:?}: {status}");
        Ok(())
    }

    /// Leases as other nodes hold them.
    fn fill(&self, prefix: &str, count: u16) -> anyhow::Result<()> {
        self.ctl(&["put", &format!("{prefix}/config"), CONFIG])?;
        for number in 0..count {
            let [high, low] = number.to_be_bytes();
            let key = format!("{prefix}/subnets/10.{}.{low}.0-24", 128 + high);
            let lease = json!({
                "PublicIP": Ipv4Addr::new(198, 18, high, low),
                "PublicIPv6": null,
                "BackendType": "vxlan",
                "BackendData": {"VNI": 1, "VtepMAC": format!("02:00:00:01:{high:02x}:{low:02x}")},
            });
            self.ctl(&["put", &key, &lease.to_string()])?;
        }
        Ok(())
    }
}

/// The measurement itself, with `count` other nodes.
///
/// # Errors
/// There is no etcd, or the agent does not get there.
pub(crate) fn found(count: u16) -> anyhow::Result<Idle> {
    orch_telemetry::share_heaps();
    let folder = tempfile::tempdir()?;
    // Alive as long as the node, whose link ends in it.
    let underlay = Underlay::new()?;
    let node = Node::new(&underlay, 1, folder.path().to_owned())?;
    let prefix = orch_config::ETCD_NETWORK_PREFIX;
    let etcd = node.netns.run(|| Etcd::start(folder.path()))?;
    node.netns.run(|| etcd.fill(prefix, count))?;
    let paths = Paths::new(folder.path());
    let options = Options {
        node_name: "node-1".to_owned(),
        node_ip: node.address(),
        etcd: EtcdConfig { endpoints: vec![etcd.url.clone()], ..EtcdConfig::default() },
        paths: paths.clone(),
        upstream_dns: vec![node.address().into()],
        ..Options::default()
    };
    let cancel = CancellationToken::new();
    std::thread::scope(|scope| {
        let stop = cancel.clone();
        let agent = node.netns.start(scope, move || -> anyhow::Result<()> {
            // As the daemon has it; workers are threads of this one, and so in its namespace.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            Ok(runtime.block_on(run(options, stop))?)
        });
        let outcome = watch(&paths, count);
        cancel.cancel();
        agent.finish().context("the agent")?;
        outcome
    })
}

fn watch(paths: &Paths, count: u16) -> anyhow::Result<Idle> {
    let begun = Instant::now();
    let all = |status: NetStatus| status.peers.len() == usize::from(count);
    while !NetStatus::read(&paths.net_status()).is_ok_and(all) {
        if begun.elapsed() > PATIENCE {
            bail!("not all nodes are programmed within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(SETTLE);
    orch_telemetry::release_memory()?;
    let before = cpu_time();
    std::thread::sleep(WATCH);
    let cpu = cpu_time() - before;
    Ok(Idle {
        resident_mib: memory_mib("VmRSS")?,
        anonymous_mib: memory_mib("RssAnon")?,
        cpu_percent: 100.0 * cpu.as_secs_f64() / WATCH.as_secs_f64(),
    })
}
