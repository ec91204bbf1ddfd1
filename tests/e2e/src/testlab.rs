//! A lab of the suite's own, beside one that may be running on the same machine.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::shell::{self, Output};

/// The suite's own underlay; another lab on this machine has another one.
const UNDERLAY: &str = "172.31.240.0/24";
/// Long enough for everything that is not expected to be slow.
const LIMIT: Duration = Duration::from_secs(60);

/// The command-line client that the story is told with.
#[derive(Debug, Clone)]
pub enum Client {
    /// A stock kubectl of one version.
    Kubectl(PathBuf),
    /// Ours, where there is no kubectl.
    Orchctl,
}

/// A running lab.
pub struct TestLab {
    pub dir: PathBuf,
    programs: PathBuf,
    pub client: Client,
    home: tempfile::TempDir,
}

impl TestLab {
    /// Starts a lab with three nodes.
    ///
    /// # Errors
    /// The programs are not built or the lab does not come up.
    pub fn up() -> anyhow::Result<Self> {
        let lab = Self::start(find_client(), &[])?;
        lab.build_tools()?;
        Ok(lab)
    }

    /// Starts a lab with three control planes and three nodes. Its client is ours, which knows all servers: a kubeconfig
    /// names only one to kubectl.
    ///
    /// # Errors
    /// As [`TestLab::up`].
    pub fn up_with_peers() -> anyhow::Result<Self> {
        Self::start(Client::Orchctl, &["--control-planes", "3"])
    }

    fn start(client: Client, flags: &[&str]) -> anyhow::Result<Self> {
        let programs = programs()?;
        let lab = Self {
            // Short: socket paths below it must fit into 108 bytes.
            dir: lab_dir(),
            programs,
            client,
            home: tempfile::tempdir().context("make a home folder")?,
        };
        // What a run that was killed left behind.
        lab.orchctl(&["lab", "down"], Duration::from_secs(120))?.ok()?;
        let underlay = underlay();
        let mut words = vec!["lab", "up", "--nodes", "3", "--underlay", &underlay];
        words.extend(flags);
        let up = lab.orchctl(&words, Duration::from_secs(300))?;
        if let Err(error) = up.ok() {
            eprintln!("{}", lab.logs());
            return Err(error);
        }
        Ok(lab)
    }

    /// An image with a shell and the usual small tools: one static busybox and a link for each of its names.
    fn build_tools(&self) -> anyhow::Result<()> {
        const BUSYBOX: &str = "/bin/busybox";
        let names = shell::run(Command::new(BUSYBOX).arg("--list"), b"", LIMIT)
            .context("the package busybox-static is missing; `make deps` installs it")?
            .ok()?
            .text();
        let folder = tempfile::tempdir().context("make a folder")?;
        let bin = folder.path().join("bin");
        std::fs::create_dir(&bin)?;
        std::fs::copy(BUSYBOX, bin.join("busybox"))?;
        for name in names.lines().filter(|name| *name != "busybox") {
            std::os::unix::fs::symlink("busybox", bin.join(name))?;
        }
        std::fs::create_dir(folder.path().join("tmp"))?;
        std::fs::write(
            folder.path().join("Dockerfile"),
            "FROM scratch\nCOPY bin /bin\nCOPY tmp /tmp\nCMD [\"sh\"]\n",
        )?;
        let path = folder.path().to_string_lossy().into_owned();
        self.orchctl(&["image", "build", &path, "--tag", "tools:v1"], LIMIT)?.ok().map(drop)
    }

    /// Folder with `orchctl` and the other programs.
    #[must_use]
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// Runs `orchctl` on this lab.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn orchctl(&self, args: &[&str], limit: Duration) -> anyhow::Result<Output> {
        let mut command = Command::new(self.programs.join("orchctl"));
        command.env("KUBECONFIG", self.kubeconfig()).arg("--lab-dir").arg(&self.dir).args(args);
        shell::run(&mut command, b"", limit)
    }

    /// Runs the client (kubectl where there is one).
    ///
    /// # Errors
    /// It does not end in time.
    pub fn run(&self, args: &[&str], stdin: &[u8], limit: Duration) -> anyhow::Result<Output> {
        let mut command = match &self.client {
            Client::Kubectl(path) => self.kubectl(path),
            Client::Orchctl => {
                let mut command = Command::new(self.programs.join("orchctl"));
                command.arg("--lab-dir").arg(&self.dir);
                command
            }
        };
        command.env("KUBECONFIG", self.kubeconfig()).args(args);
        shell::run(&mut command, stdin, limit)
    }

    /// A call of one kubectl, without its arguments yet.
    #[must_use]
    pub fn kubectl(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        // A cache of its own: discovery of another cluster at the same address must not be believed.
        command.env("HOME", self.home.path()).env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// The client, if it is kubectl, and the oldest kubectl beside it, which may speak other protocols.
    #[must_use]
    pub fn kubectls(&self) -> Vec<PathBuf> {
        let Client::Kubectl(client) = &self.client else { return Vec::new() };
        let oldest = versions_beside(client).into_iter().next().map(|(_, path)| path);
        let oldest = oldest.filter(|oldest| oldest != client);
        std::iter::once(client.clone()).chain(oldest).collect()
    }

    /// Standard output of a call of the client that must succeed.
    ///
    /// # Errors
    /// It fails.
    pub fn ok(&self, args: &[&str]) -> anyhow::Result<String> {
        Ok(self.run(args, b"", LIMIT)?.ok()?.text())
    }

    /// What the client says when it has to fail.
    ///
    /// # Errors
    /// It succeeds.
    pub fn fails(&self, args: &[&str], stdin: &str) -> anyhow::Result<String> {
        self.run(args, stdin.as_bytes(), LIMIT)?.failed()
    }

    /// Applies a manifest.
    ///
    /// # Errors
    /// It is refused.
    pub fn apply(&self, manifest: &str) -> anyhow::Result<String> {
        Ok(self.run(&["apply", "-f", "-"], manifest.as_bytes(), LIMIT)?.ok()?.text())
    }

    /// Objects as JSON: `json(&["pods", "-l", "app=web"])`.
    ///
    /// # Errors
    /// There are none, or the call fails.
    pub fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let mut words = vec!["get"];
        words.extend(args);
        words.extend(["-o", "json"]);
        serde_json::from_str(&self.ok(&words)?).context("JSON from `get`")
    }

    /// The pods behind a label selector.
    ///
    /// # Errors
    /// The call fails.
    pub fn pods(&self, selector: &str) -> anyhow::Result<Vec<Pod>> {
        let list = self.json(&["pods", "-l", selector])?;
        Ok(list["items"].as_array().into_iter().flatten().map(Pod::from_json).collect())
    }

    /// Runs a command in a host's namespace, by `lab exec`.
    ///
    /// # Errors
    /// It fails.
    pub fn on(&self, host: &str, words: &[&str]) -> anyhow::Result<String> {
        let mut args = vec!["lab", "exec", host, "--"];
        args.extend(words);
        Ok(self.orchctl(&args, LIMIT)?.ok()?.text())
    }

    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// Where the namespace of a host (or `underlay`) is pinned.
    #[must_use]
    pub fn netns(&self, host: &str) -> PathBuf {
        self.dir.join("run/netns").join(host)
    }

    /// Address of a node in the underlay, with a port.
    ///
    /// # Errors
    /// There is no such node.
    pub fn node(&self, name: &str, port: u16) -> anyhow::Result<SocketAddr> {
        let node = self.json(&["node", name])?;
        let address = node["status"]["addresses"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|address| address["type"] == "InternalIP")
            .and_then(|address| address["address"].as_str())
            .with_context(|| format!("{name} has no InternalIP"))?;
        Ok(SocketAddr::from((address.parse::<Ipv4Addr>()?, port)))
    }

    /// PID of a host's daemon, from its PID file.
    ///
    /// # Errors
    /// There is none.
    pub fn pid(&self, host: &str) -> anyhow::Result<i32> {
        let name = if host.starts_with("server") { "server" } else { "agent" };
        let path = self.dir.join(host).join("run/orch").join(format!("{name}.pid"));
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        text.split_whitespace().next().context("an empty PID file")?.parse().context("PID")
    }

    /// All logs of the lab's daemons.
    #[must_use]
    pub fn log_files(&self) -> Vec<PathBuf> {
        log_files(&self.dir, 4)
    }

    /// The ends of all logs, for the reader of a failure.
    #[must_use]
    pub fn logs(&self) -> String {
        const LINES: usize = 40;
        let mut text = String::new();
        for path in self.log_files() {
            let content = std::fs::read(&path).unwrap_or_default();
            let content = String::from_utf8_lossy(&content);
            let lines: Vec<_> = content.lines().collect();
            text += &format!("--- the end of {}\n", path.display());
            for line in &lines[lines.len().saturating_sub(LINES)..] {
                text += line;
                text.push('\n');
            }
        }
        text
    }

    /// Ends the lab.
    ///
    /// # Errors
    /// Something of it is left.
    pub fn down(&self) -> anyhow::Result<()> {
        self.orchctl(&["lab", "down"], Duration::from_secs(120))?.ok().map(drop)
    }
}

/// The network that joins the lab's hosts; `ORCH_E2E_UNDERLAY` names another one.
#[must_use]
pub fn underlay() -> String {
    std::env::var("ORCH_E2E_UNDERLAY").unwrap_or_else(|_| UNDERLAY.to_owned())
}

fn log_files(folder: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && depth > 0 && name != "docker" && name != "pods" && !path.is_symlink() {
            found.extend(log_files(&path, depth - 1));
        } else if path.extension().is_some_and(|extension| extension == "log") {
            found.push(path);
        }
    }
    found
}

/// A pod as the story needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    pub name: String,
    pub uid: String,
    pub node: String,
    pub ip: String,
    pub ready: bool,
    pub leaving: bool,
    pub restarts: i64,
    pub container_ids: Vec<String>,
}

impl Pod {
    fn from_json(pod: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let statuses = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Self {
            name: text(&pod["metadata"]["name"]),
            uid: text(&pod["metadata"]["uid"]),
            node: text(&pod["spec"]["nodeName"]),
            ip: text(&pod["status"]["podIP"]),
            ready: conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"),
            leaving: !pod["metadata"]["deletionTimestamp"].is_null(),
            restarts: statuses.iter().filter_map(|one| one["restartCount"].as_i64()).sum(),
            container_ids: statuses.iter().map(|one| text(&one["containerID"])).collect(),
        }
    }
}

/// A stock kubectl: the newest `kubectl.1.NN` beside the one on the PATH (which may only choose between them),
/// else the one on the PATH itself. `KUBECTL` names another one; `KUBECTL=orchctl` tells the story without.
/// Folder of the suite's lab.
#[must_use]
pub fn lab_dir() -> PathBuf {
    std::env::var_os("ORCH_E2E_DIR")
        .map_or_else(|| PathBuf::from("/var/lib/orch/e2e"), PathBuf::from)
}

/// The folder with `orchctl` and the other programs.
///
/// # Errors
/// They are not built.
pub fn programs() -> anyhow::Result<PathBuf> {
    let programs = std::env::var_os("ORCH_BIN").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/orch")),
        PathBuf::from,
    );
    if !programs.join("orchctl").is_file() {
        bail!("{} has no orchctl: run `make build`, or `make test-e2e`", programs.display());
    }
    Ok(programs)
}

/// The newest kubectl there is, or what `KUBECTL` says.
#[must_use]
pub fn find_client() -> Client {
    if let Some(named) = std::env::var_os("KUBECTL") {
        return if named == "orchctl" { Client::Orchctl } else { Client::Kubectl(named.into()) };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let Some(kubectl) =
        std::env::split_paths(&path).map(|dir| dir.join("kubectl")).find(|path| path.is_file())
    else {
        return Client::Orchctl;
    };
    let newest = versions_beside(&kubectl).pop().map(|(_, path)| path);
    Client::Kubectl(newest.unwrap_or(kubectl))
}

/// The programs `kubectl.1.NN` in the folder of a kubectl, by version.
fn versions_beside(kubectl: &Path) -> Vec<(u32, PathBuf)> {
    let real = kubectl.canonicalize().unwrap_or_else(|_| kubectl.to_owned());
    let minor = |path: &Path| -> Option<u32> {
        path.file_name()?.to_str()?.strip_prefix("kubectl.1.")?.parse().ok()
    };
    let beside =
        real.parent().and_then(|dir| std::fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    let mut versions: Vec<_> =
        beside.filter_map(|entry| Some((minor(&entry.path())?, entry.path()))).collect();
    versions.sort();
    versions
}
