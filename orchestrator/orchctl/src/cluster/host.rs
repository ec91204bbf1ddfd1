//! What is on this host: daemons, files, programs. Everything is below one root, so that many hosts fit on a machine.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use orch_config::Paths;
use serde::{Deserialize, Serialize};

use super::config::{Config, Supervisor, Timers};
use crate::lab::process::Daemon;
use crate::lab::{CNI_PLUGINS, programs};
use crate::output;

/// Grace that a daemon gets before SIGKILL.
const STOP_GRACE: Duration = Duration::from_secs(15);
/// Where packages put programs that nobody calls by hand.
const LIBEXEC: &str = "/usr/lib/orch";
/// Where units of systemd go that no package brought.
const UNIT_DIR: &str = "/etc/systemd/system";
const PACKAGED_UNIT_DIRS: [&str; 2] = ["/lib/systemd/system", "/usr/lib/systemd/system"];
const SERVER_UNIT: &str = include_str!("../../../../packaging/systemd/orch-server.service");
const AGENT_UNIT: &str = include_str!("../../../../packaging/systemd/orch-agent.service");

/// One of the two daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Server,
    Agent,
}

impl Part {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Agent => "agent",
        }
    }

    fn unit(self) -> String {
        format!("orch-{}.service", self.name())
    }

    fn unit_text(self) -> &'static str {
        match self {
            Self::Server => SERVER_UNIT,
            Self::Agent => AGENT_UNIT,
        }
    }
}

/// What `init` and `join` put on this host besides orch's own folders; `reset` takes it away again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Installed {
    pub(crate) files: BTreeSet<PathBuf>,
    pub(crate) folders: BTreeSet<PathBuf>,
    /// Kernel settings before the agent's first start: path below `/proc/sys` and value.
    pub(crate) sysctls: std::collections::BTreeMap<String, String>,
}

/// This host.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) paths: Paths,
}

/// Writes beside the target and renames, so that a reader never sees half a file.
pub(crate) fn write_file(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let context = || format!("write {}", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)
        .with_context(context)?;
    file.write_all(text.as_bytes()).with_context(context)?;
    file.sync_all().with_context(context)?;
    fs::rename(&temporary, path).with_context(context)
}

/// A program of ours: beside `orchctl`, or where a package puts it.
pub(crate) fn program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("path of orchctl")?;
    let beside = own.parent().map(Path::to_owned);
    beside
        .into_iter()
        .chain([PathBuf::from(LIBEXEC), PathBuf::from("/usr/bin")])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            output::hinted(
                "install the orch packages (`make deb`), or run orchctl from target/orch (`make build`)",
                format!("{name} is neither beside orchctl nor in {LIBEXEC}"),
            )
        })
}

impl Host {
    pub(crate) fn new(root: &Path) -> anyhow::Result<Self> {
        let root =
            std::path::absolute(root).with_context(|| format!("--root {}", root.display()))?;
        Ok(Self { paths: Paths::new(root) })
    }

    pub(crate) fn is_whole_machine(&self) -> bool {
        self.paths.root() == Path::new("/")
    }

    /// Whether systemd keeps the daemons of this host.
    pub(crate) fn uses_systemd(&self, config: &Config) -> anyhow::Result<bool> {
        let runs = Path::new("/run/systemd/system").is_dir();
        match config.supervisor {
            Supervisor::Auto => Ok(runs && self.is_whole_machine()),
            Supervisor::Processes => Ok(false),
            Supervisor::Systemd if runs && self.is_whole_machine() => Ok(true),
            Supervisor::Systemd => bail!(
                "supervisor: systemd, but {}",
                if runs { "--root is not /" } else { "systemd does not run here" }
            ),
        }
    }

    pub(crate) fn daemon(&self, part: Part) -> Daemon {
        Daemon::new(part.name(), &self.paths.run(), &self.paths.log())
    }

    /// PID of a daemon that runs.
    pub(crate) fn pid(&self, part: Part, config: &Config) -> Option<i32> {
        if self.uses_systemd(config).unwrap_or(false) {
            let out = Command::new("systemctl")
                .args(["show", "--property=MainPID", "--value", &part.unit()])
                .output()
                .ok()?;
            let pid = String::from_utf8_lossy(&out.stdout).trim().parse().ok()?;
            return (pid > 0).then_some(pid);
        }
        self.daemon(part).pid()
    }

    /// Command line of a daemon.
    pub(crate) fn arguments(&self, part: Part, config: &Config) -> anyhow::Result<Vec<String>> {
        let mut all = vec![part.name().to_owned()];
        let mut flag = |name: &str, value: String| all.extend([format!("--{name}"), value]);
        flag("root", self.paths.root().to_string_lossy().into_owned());
        match part {
            Part::Server => {
                flag("advertise-address", config.address()?.to_string());
                flag("port", config.control_plane.port.to_string());
                flag("etcd-member", config.node.name.clone());
                if !config.control_plane.etcd_members.is_empty() {
                    flag("etcd-peers", config.control_plane.etcd_members.join(","));
                }
                if !config.control_plane.cert_sans.is_empty() {
                    flag("tls-san", config.control_plane.cert_sans.join(","));
                }
                if config.control_plane.etcd_joins {
                    all.push("--etcd-join".to_owned());
                }
                all.extend(["--restrict-etcd".to_owned(), "--elect".to_owned()]);
            }
            Part::Agent => {
                flag("node-name", config.node.name.clone());
                flag("node-ip", config.address()?.to_string());
                flag("engine", config.engine.socket.to_string_lossy().into_owned());
                let etcd = if config.cluster.etcd.is_empty() {
                    vec![config.own_etcd()?]
                } else {
                    config.cluster.etcd.clone()
                };
                flag("etcd", etcd.join(","));
                flag("pause-binary", program("orch-pause")?.to_string_lossy().into_owned());
                if !config.dns.upstream.is_empty() {
                    let upstream: Vec<String> =
                        config.dns.upstream.iter().map(ToString::to_string).collect();
                    flag("upstream-dns", upstream.join(","));
                }
            }
        }
        if config.timers == Timers::Fast {
            all.push("--fast-failover".to_owned());
        }
        Ok(all)
    }

    /// Starts a daemon unless it runs.
    pub(crate) fn start(&self, part: Part, config: &Config) -> anyhow::Result<()> {
        let orchestrator = program("orchestrator")?;
        let arguments = self.arguments(part, config)?;
        if !self.uses_systemd(config)? {
            let daemon = self.daemon(part);
            return match daemon.pid() {
                Some(_) => Ok(()),
                None => daemon.start(&orchestrator, &arguments, None),
            };
        }
        self.install_unit(part, &orchestrator)?;
        let line: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
        let environment = format!(
            "# Written by orchctl from {}; change that and run orchctl again.\nORCH_ARGS={}\n",
            super::config::path(&self.paths).display(),
            line.join(" ")
        );
        write_file(&self.environment(part), &environment, 0o644)?;
        systemctl(&["daemon-reload"])?;
        systemctl(&["enable", "--now", &part.unit()])
    }

    /// Ends a daemon and starts it again.
    pub(crate) fn restart(&self, part: Part, config: &Config) -> anyhow::Result<()> {
        self.stop(part, config)?;
        self.start(part, config)
    }

    fn environment(&self, part: Part) -> PathBuf {
        self.paths.etc().join(format!("{}.env", part.name()))
    }

    fn install_unit(&self, part: Part, orchestrator: &Path) -> anyhow::Result<()> {
        let name = part.unit();
        if PACKAGED_UNIT_DIRS.iter().any(|folder| Path::new(folder).join(&name).is_file()) {
            return Ok(());
        }
        let text =
            part.unit_text().replace("/usr/bin/orchestrator", &orchestrator.to_string_lossy());
        let path = Path::new(UNIT_DIR).join(name);
        write_file(&path, &text, 0o644)?;
        self.record(|installed| {
            installed.files.insert(path);
        })
    }

    /// Ends a daemon. Nothing to do when it does not run.
    pub(crate) fn stop(&self, part: Part, config: &Config) -> anyhow::Result<()> {
        if !self.uses_systemd(config)? {
            return self.daemon(part).stop(STOP_GRACE);
        }
        let known = Command::new("systemctl")
            .args(["cat", &part.unit()])
            .output()
            .is_ok_and(|out| out.status.success());
        if known { systemctl(&["disable", "--now", &part.unit()]) } else { Ok(()) }
    }

    /// Ends the etcd of this host, which outlives the server on purpose.
    pub(crate) fn stop_etcd(&self) -> anyhow::Result<()> {
        orch_store::managed::stop(&self.paths.etcd_data(), STOP_GRACE).context("stop etcd")
    }

    /// The last words of a daemon, for error messages.
    pub(crate) fn log_tail(&self, part: Part, config: &Config) -> String {
        if self.uses_systemd(config).unwrap_or(false) {
            return format!("; see journalctl -u {}", part.unit());
        }
        self.daemon(part).log_tail()
    }

    fn record_path(&self) -> PathBuf {
        self.paths.lib().join("installed.json")
    }

    /// What was put on this host.
    pub(crate) fn installed(&self) -> Installed {
        fs::read(self.record_path())
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    pub(crate) fn record(&self, change: impl FnOnce(&mut Installed)) -> anyhow::Result<()> {
        let before = self.installed();
        let mut after = before.clone();
        change(&mut after);
        if after == before && self.record_path().exists() {
            return Ok(());
        }
        write_file(&self.record_path(), &serde_json::to_string_pretty(&after)?, 0o600)
    }

    /// Remembers which folders are not there yet, and the kernel settings that the agent is going to change.
    pub(crate) fn record_before(&self) -> anyhow::Result<()> {
        if self.record_path().exists() {
            return Ok(());
        }
        let folders: BTreeSet<PathBuf> = [
            self.paths.cni_bin_dir(),
            self.paths.cni_conf_dir(),
            self.paths.cni_data_dir(),
            self.paths.cni_cache_dir(),
            self.paths.etc(),
            self.paths.lib(),
            self.paths.run(),
            self.paths.log(),
        ]
        .iter()
        .flat_map(|path| path.ancestors().map(Path::to_owned).collect::<Vec<_>>())
        .filter(|path| path.starts_with(self.paths.root()) && !path.exists())
        .collect();
        self.record(|installed| {
            installed.folders = folders;
            installed.sysctls = sysctls();
        })
    }

    /// Puts the CNI plugins where the runtime looks for them: those that are missing, and those that we put there.
    pub(crate) fn install_plugins(&self) -> anyhow::Result<()> {
        let folder = self.paths.cni_bin_dir();
        let ours = self.installed().files;
        let wanted: Vec<PathBuf> = CNI_PLUGINS
            .iter()
            .map(|name| folder.join(name))
            .filter(|path| !path.exists() || ours.contains(path))
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let multicall = program("cni-plugins")?;
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let base = folder.join(".cni-plugins");
        fs::copy(&multicall, &base).with_context(|| format!("copy {}", multicall.display()))?;
        fs::set_permissions(&base, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("change {}", base.display()))?;
        // Written down first: what is there and not recorded would stay for ever.
        self.record(|installed| installed.files.extend(wanted.iter().cloned()))?;
        for link in &wanted {
            let _ = fs::remove_file(link);
            fs::hard_link(&base, link).with_context(|| format!("link {}", link.display()))?;
        }
        fs::remove_file(&base).with_context(|| format!("remove {}", base.display()))
    }
}

/// Folders and files of kernel settings that the agent may change; per network namespace.
const SYSCTLS: [&str; 4] =
    ["net/ipv4/ip_forward", "net/ipv4/conf/all", "net/bridge", "net/ipv6/conf/all/forwarding"];

/// Also one, with the kernel's default: it is not there before conntrack is.
const LIBERAL: (&str, &str) = ("net/netfilter/nf_conntrack_tcp_be_liberal", "0");

/// The settings below [`SYSCTLS`], and [`LIBERAL`], as they are now.
fn sysctls() -> std::collections::BTreeMap<String, String> {
    let root = Path::new("/proc/sys");
    let files = SYSCTLS.iter().flat_map(|key| {
        let path = root.join(key);
        match fs::read_dir(&path) {
            Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
            Err(_) => vec![path],
        }
    });
    let (liberal, default) = LIBERAL;
    let value = fs::read_to_string(root.join(liberal));
    let value = value.map_or_else(|_| default.to_owned(), |value| value.trim().to_owned());
    files
        .filter_map(|path| {
            let value = fs::read_to_string(&path).ok()?.trim().to_owned();
            Some((path.strip_prefix(root).ok()?.to_string_lossy().into_owned(), value))
        })
        .chain([(liberal.to_owned(), value)])
        .collect()
}

fn systemctl(args: &[&str]) -> anyhow::Result<()> {
    let out = Command::new("systemctl").args(args).output().context("run systemctl")?;
    if !out.status.success() {
        bail!("systemctl {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

/// Whether a program is on the PATH that daemons get.
pub(crate) fn on_path(name: &str) -> bool {
    std::env::split_paths(&programs::search_path())
        .any(|folder| programs::is_executable(&folder.join(name)))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn the_record_keeps_what_was_there_before() {
        let root = tempfile::tempdir().expect("a folder");
        let host = Host::new(root.path()).expect("host");
        fs::create_dir_all(host.paths.cni_conf_dir()).expect("there before");
        host.record_before().expect("recorded");
        let installed = host.installed();
        assert!(installed.folders.contains(&host.paths.cni_bin_dir()));
        assert!(!installed.folders.contains(&host.paths.cni_conf_dir()));
        fs::create_dir_all(host.paths.cni_bin_dir()).expect("made");
        host.record_before().expect("again");
        assert_eq!(host.installed(), installed, "a second start does not forget the first");
    }

    #[test]
    fn a_server_of_a_file_has_the_flags_of_the_file() {
        let host = Host::new(Path::new("/srv/a")).expect("host");
        let mut config = Config::default();
        config.node.name = "a".to_owned();
        config.node.address = Some(Ipv4Addr::new(10, 0, 0, 1));
        config.control_plane.cert_sans = vec!["api.example".to_owned()];
        config.timers = Timers::Fast;
        let line = host.arguments(Part::Server, &config).expect("arguments").join(" ");
        assert_eq!(
            line,
            "server --root /srv/a --advertise-address 10.0.0.1 --port 6443 --etcd-member a --tls-san api.example \
             --restrict-etcd --elect --fast-failover"
        );
    }
}
