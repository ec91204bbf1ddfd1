//! A host with pods, made of network namespaces, and the real plugin executable run in it.
//!
//! [`Testbed`] is a host of its own: a namespace, a folder for `CNI_PATH`, a folder for state. [`Testbed::pod`] makes
//! containers, which are namespaces too. Everything vanishes with the values: namespaces are only held open, never
//! bound to a name.
//!
//! The executable is `$ORCH_BIN/cni-plugins`, else the newest of what `make build` and `cargo build` made. Needs root.

use std::fs;
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use cni_netlink::{Link, NetNs, Netlink, VethPair};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Names under which the executable is put on `CNI_PATH`.
const PLUGINS: &[&str] = &[
    "bandwidth",
    "bridge",
    "firewall",
    "host-local",
    "loopback",
    "policy",
    "portmap",
    "static",
    "tuning",
    "vxlan",
];
/// How long a connection may take that is expected to work.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A host.
pub struct Testbed {
    /// The folder on `CNI_PATH`.
    pub plugins: PathBuf,
    /// Keeps that folder where it is ours.
    _links: Option<TempDir>,
    /// Folder for leases and the like.
    pub state: TempDir,
    /// Its namespace.
    pub host: NetNs,
    /// Links of the host.
    pub netlink: Netlink,
    pods: AtomicU32,
}

/// A container.
pub struct Pod {
    /// Container ID.
    pub id: String,
    /// Its namespace.
    pub netns: NetNs,
}

/// What a plugin answered.
#[derive(Debug)]
pub struct Answer {
    /// Whether it exited with 0.
    pub ok: bool,
    /// The document on stdout; `Null` if it wrote nothing.
    pub document: Value,
    /// What it said to people.
    pub stderr: String,
}

impl Answer {
    /// The document of a success.
    ///
    /// # Errors
    /// If the plugin failed.
    pub fn success(self) -> anyhow::Result<Value> {
        if !self.ok {
            bail!("the plugin failed: {} {}", self.document, self.stderr);
        }
        Ok(self.document)
    }

    /// Code and message of a failure.
    ///
    /// # Errors
    /// If the plugin succeeded, or failed without an error document.
    pub fn failure(self) -> anyhow::Result<(u64, String)> {
        let code = self.document["code"].as_u64();
        match (self.ok, code) {
            (false, Some(code)) => {
                Ok((code, self.document["msg"].as_str().unwrap_or_default().to_owned()))
            }
            _ => bail!("no failure: {} {}", self.document, self.stderr),
        }
    }
}

/// Starts a program, as CNI's library does: a copy that another thread has just made may still be open for writing in a
/// child of a third one that is about to run something else.
///
/// # Errors
/// If it cannot be run.
pub fn spawn(command: &mut Command) -> anyhow::Result<Child> {
    let mut tries = 0;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < 100 => {
                tries += 1;
                thread::sleep(Duration::from_millis(10));
            }
            started => return started.with_context(|| format!("run {command:?}")),
        }
    }
}

/// A fresh namespace, made by a thread that ends at once: the open file keeps it.
///
/// # Errors
/// Without the privilege.
pub fn new_netns() -> anyhow::Result<NetNs> {
    let made = thread::spawn(|| -> anyhow::Result<NetNs> {
        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace: is this root?")?;
        Ok(NetNs::current()?)
    });
    made.join().map_err(|_| anyhow!("the thread that makes namespaces panicked"))?
}

/// The multi-call executable under test.
fn executable() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("ORCH_BIN") {
        return Ok(PathBuf::from(dir).join("cni-plugins"));
    }
    let own = std::env::current_exe().context("find the test's own executable")?;
    // <target>/<profile>/deps/<test>
    let profile = own.ancestors().nth(2).context("the test's executable is in no target folder")?;
    let mut places = vec![profile.join("cni-plugins")];
    places.extend(profile.parent().map(|target| target.join("orch/cni-plugins")));
    let age = |path: &PathBuf| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let newest = places.iter().filter(|path| path.is_file()).max_by_key(|path| age(path));
    newest.cloned().with_context(|| {
        format!("no cni-plugins in {places:?}: run `make build` or `cargo build -p cni-plugins`")
    })
}

impl Testbed {
    /// A host with nothing but `lo`.
    ///
    /// # Errors
    /// Without root, or if the executable is not built.
    pub fn new() -> anyhow::Result<Self> {
        let path = tempfile::tempdir().context("make a folder for plugins")?;
        let executable = executable()?;
        for name in PLUGINS {
            let to = path.path().join(name);
            // Hard links, as they are installed; of a copy where the folder is on another file system.
            let first = Some(path.path().join(PLUGINS[0])).filter(|first| first.exists());
            fs::hard_link(first.as_ref().unwrap_or(&executable), &to)
                .or_else(|_| fs::copy(&executable, &to).map(drop))
                .with_context(|| format!("put {} on CNI_PATH", executable.display()))?;
        }
        Self::with(path.path().to_owned(), Some(path))
    }

    /// A host with somebody else's plugins on `CNI_PATH`.
    ///
    /// # Errors
    /// Without root.
    pub fn with_plugins(folder: &Path) -> anyhow::Result<Self> {
        Self::with(folder.to_owned(), None)
    }

    fn with(plugins: PathBuf, links: Option<TempDir>) -> anyhow::Result<Self> {
        let host = new_netns()?;
        let netlink = Netlink::open_in(&host)?;
        let lo = netlink.link("lo")?.context("no lo")?;
        netlink.set_up(lo.index)?;
        let state = tempfile::tempdir().context("make a folder for state")?;
        Ok(Self { plugins, _links: links, state, host, netlink, pods: AtomicU32::new(0) })
    }

    /// A container.
    ///
    /// # Errors
    /// Without root.
    pub fn pod(&self) -> anyhow::Result<Pod> {
        let id = format!("pod{}", self.pods.fetch_add(1, Ordering::Relaxed));
        Ok(Pod { id, netns: new_netns()? })
    }

    /// Configuration of the network `net`: bridge `cni0` as default gateway of `ranges`.
    pub fn conf(&self, ranges: &[&str]) -> Value {
        let ranges: Vec<Value> =
            ranges.iter().map(|subnet| json!([{ "subnet": subnet }])).collect();
        json!({
            "cniVersion": "1.1.0",
            "name": "net",
            "type": "bridge",
            "bridge": "cni0",
            "isDefaultGateway": true,
            "mtu": 1450,
            "ipam": {"type": "host-local", "ranges": ranges, "dataDir": self.state.path().join("leases")},
        })
    }

    /// Starts a plugin on this host.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn start(
        &self,
        plugin: &str,
        variables: &[(&str, &str)],
        conf: &Value,
    ) -> anyhow::Result<Child> {
        self.start_under(&[], plugin, variables, conf)
    }

    /// Starts a plugin as the argument of another program, which looks on.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn start_under(
        &self,
        observer: &[&str],
        plugin: &str,
        variables: &[(&str, &str)],
        conf: &Value,
    ) -> anyhow::Result<Child> {
        let plugin = self.plugins.join(plugin);
        let mut command = match observer.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(plugin);
                command
            }
            None => Command::new(plugin),
        };
        command
            .env("CNI_PATH", &self.plugins)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let stdin = conf.to_string();
        // A child is in the namespace of the thread that starts it.
        self.host.run(|| {
            let mut child = spawn(&mut command)?;
            // A plugin that fails before it reads closes the pipe.
            let _ = child.stdin.take().context("stdin")?.write_all(stdin.as_bytes());
            Ok(child)
        })
    }

    /// Calls a plugin and checks what holds of every answer: one document or none, success with exit code 0 only.
    ///
    /// # Errors
    /// If it cannot be run, or breaks the protocol.
    pub fn call(
        &self,
        plugin: &str,
        command: &str,
        variables: &[(&str, &str)],
        conf: &Value,
    ) -> anyhow::Result<Answer> {
        let variables: Vec<(&str, &str)> =
            [("CNI_COMMAND", command)].into_iter().chain(variables.iter().copied()).collect();
        let Output { status, stdout, stderr } = self
            .start(plugin, &variables, conf)?
            .wait_with_output()
            .with_context(|| format!("wait for {plugin}"))?;
        let document = if stdout.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&stdout)
                .with_context(|| format!("stdout: {}", String::from_utf8_lossy(&stdout)))?
        };
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        if !status.success() && document.get("code").is_none() {
            bail!("{plugin} {command} ended with {status} and no error: {document} {stderr}");
        }
        Ok(Answer { ok: status.success(), document, stderr })
    }

    /// A call about the attachment of a pod's `eth0`.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn attachment(&self, command: &str, pod: &Pod, conf: &Value) -> anyhow::Result<Answer> {
        let plugin = conf["type"].as_str().context("the configuration has no type")?;
        let netns = pod.path();
        let variables =
            [("CNI_CONTAINERID", pod.id.as_str()), ("CNI_NETNS", &netns), ("CNI_IFNAME", "eth0")];
        self.call(plugin, command, &variables, conf)
    }

    /// ADD that has to succeed.
    ///
    /// # Errors
    /// If it fails.
    pub fn add(&self, pod: &Pod, conf: &Value) -> anyhow::Result<Value> {
        self.attachment("ADD", pod, conf)?.success()
    }

    /// DEL that has to succeed.
    ///
    /// # Errors
    /// If it fails, or says something.
    pub fn del(&self, pod: &Pod, conf: &Value) -> anyhow::Result<()> {
        let answer = self.attachment("DEL", pod, conf)?.success()?;
        if !answer.is_null() {
            bail!("DEL answered {answer}");
        }
        Ok(())
    }

    /// GC with these valid pods.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn gc(&self, valid: &[&Pod], conf: &Value) -> anyhow::Result<Answer> {
        let mut conf = conf.clone();
        conf["cni.dev/valid-attachments"] =
            valid.iter().map(|pod| json!({"containerID": pod.id, "ifname": "eth0"})).collect();
        let plugin = conf["type"].as_str().context("the configuration has no type")?.to_owned();
        self.call(&plugin, "GC", &[], &conf)
    }

    /// The veth links of the host.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn veths(&self) -> anyhow::Result<Vec<Link>> {
        let links = self.netlink.links()?;
        Ok(links.into_iter().filter(|link| link.name.starts_with("veth")).collect())
    }

    /// The addresses that are leased.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn leases(&self) -> anyhow::Result<Vec<IpAddr>> {
        let folder = self.state.path().join("leases/net");
        let mut leases = Vec::new();
        if folder.is_dir() {
            for entry in fs::read_dir(folder)? {
                leases.extend(entry?.file_name().to_string_lossy().parse::<IpAddr>());
            }
        }
        Ok(leases)
    }

    /// Runs `nft` on the host and returns what it writes.
    ///
    /// # Errors
    /// If it fails.
    pub fn nft(&self, command: &str) -> anyhow::Result<String> {
        self.host.run(|| {
            let output =
                Command::new("nft").args(command.split(' ')).output().context("run nft")?;
            if !output.status.success() {
                bail!("nft {command}: {}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })
    }

    /// Another machine on a wire to this host: `outside` there, `uplink` here.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn outside(&self, uplink: &str, outside: &str) -> anyhow::Result<NetNs> {
        let other = new_netns()?;
        let near = self.netlink.create_veth(&VethPair {
            name: "uplink".to_owned(),
            peer_name: "outside".to_owned(),
            peer_netns: Some(other.as_fd()),
            up: true,
            ..VethPair::default()
        })?;
        let there = Netlink::open_in(&other)?;
        let far = there.link("outside")?.context("no far end")?;
        there.set_up(far.index)?;
        let options = cni_netlink::AddressOptions::default();
        self.netlink.add_address(near.index, uplink.parse()?, &options)?;
        there.add_address(far.index, outside.parse()?, &options)?;
        Ok(other)
    }
}

impl Pod {
    /// A path to the namespace.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_fd().as_raw_fd())
    }

    /// Its interface.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn eth0(&self) -> anyhow::Result<Option<Link>> {
        Ok(Netlink::open_in(&self.netns)?.link("eth0")?)
    }
}

/// The first address of a result, without its prefix.
///
/// # Errors
/// If there is none.
pub fn address(result: &Value, index: usize) -> anyhow::Result<IpAddr> {
    let text = result["ips"][index]["address"].as_str().context("the result has no address")?;
    Ok(text.split('/').next().unwrap_or_default().parse()?)
}

/// The first gateway of a result.
///
/// # Errors
/// If there is none.
pub fn gateway(result: &Value) -> anyhow::Result<IpAddr> {
    Ok(result["ips"][0]["gateway"].as_str().context("the result has no gateway")?.parse()?)
}

/// Opens a TCP connection to `to` from one namespace to another; returns from which address it came.
///
/// # Errors
/// If it is not established in time.
pub fn connect(from: &NetNs, server: &NetNs, to: IpAddr) -> anyhow::Result<IpAddr> {
    connect_within(from, server, to, CONNECT_TIMEOUT)
}

/// As [`connect`], with a time limit.
///
/// # Errors
/// If it is not established in time.
pub fn connect_within(
    from: &NetNs,
    server: &NetNs,
    to: IpAddr,
    limit: Duration,
) -> anyhow::Result<IpAddr> {
    let listener = server.run(|| -> anyhow::Result<TcpListener> {
        TcpListener::bind((to, 0)).with_context(|| format!("listen on {to}"))
    })?;
    let port = listener.local_addr()?.port();
    let _connection = from.run(|| -> anyhow::Result<TcpStream> {
        TcpStream::connect_timeout(&SocketAddr::new(to, port), limit)
            .with_context(|| format!("connect to {to}"))
    })?;
    // It is established, so it is in the queue.
    Ok(listener.accept()?.1.ip())
}
