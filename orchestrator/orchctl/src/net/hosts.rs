//! Which nodes can be looked into from here: all of a lab's, or the host that the command runs on.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cni_netlink::NetNs;
use orch_config::Paths;

use super::status::NetStatus;
use crate::lab::{self, Lab};
use crate::output;

/// Everything that can be looked into from here, and where its leases are.
pub(super) struct Hosts {
    lab: Option<Lab>,
    etcd: EtcdFlags,
}

/// Where etcd is, for hosts that are no lab's.
#[derive(clap::Args, Clone, Default)]
pub(super) struct EtcdFlags {
    /// etcd client URLs; without it those of the lab, or those that this host's agent was started with
    #[arg(long = "etcd", value_delimiter = ',', value_name = "URL")]
    urls: Vec<String>,
    /// Folder with etcd-ca.crt, etcd-client.crt and etcd-client.key; without it the agent's
    #[arg(long, value_name = "DIR")]
    etcd_pki: Option<PathBuf>,
}

/// One node.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// Its name.
    pub(super) name: String,
    /// Its files.
    pub(super) paths: Paths,
    /// Its namespace; `None` is the one of this process.
    pub(super) netns: Option<PathBuf>,
    /// Its address on the underlay, where that is known without asking it.
    pub(super) address: Option<Ipv4Addr>,
    /// PID of its agent.
    pub(super) agent: Option<i32>,
    /// How to run a command there, in front of it.
    pub(super) prefix: String,
    /// How to start its agent again.
    pub(super) restart: String,
}

impl Host {
    /// Opens its namespace.
    ///
    /// # Errors
    /// The node is down.
    pub(super) fn open(&self) -> anyhow::Result<NetNs> {
        match &self.netns {
            None => Ok(NetNs::current()?),
            Some(path) if NetNs::is_nsfs(path) => Ok(NetNs::open(path)?),
            Some(_) => Err(output::hinted(
                format!("start it with `{}`", self.restart),
                format!("{} is down: it has no network namespace", self.name),
            )),
        }
    }
}

impl Hosts {
    /// The lab in `dir`, else this host.
    ///
    /// # Errors
    /// The lab's record is damaged.
    pub(super) fn find(dir: &Path, etcd: EtcdFlags) -> anyhow::Result<Self> {
        Ok(Self { lab: Lab::open(dir)?, etcd })
    }

    /// All nodes.
    ///
    /// # Errors
    /// There is neither a lab nor an agent's trace on this host.
    pub(super) fn all(&self) -> anyhow::Result<Vec<Host>> {
        let Some(lab) = &self.lab else { return this_host().map(|host| vec![host]) };
        let daemons = lab::daemons(lab);
        let host = |name: String| -> anyhow::Result<Host> {
            let orchctl = match lab.dir.to_str() {
                Some(lab::DEFAULT_DIR) => "orchctl".to_owned(),
                _ => format!("orchctl --lab-dir {}", lab.dir.display()),
            };
            Ok(Host {
                paths: lab.paths(&name),
                netns: Some(lab.netns(&name)),
                address: Some(lab.address(&name)?),
                agent: daemons.iter().find(|one| one.name == name).and_then(|one| one.pid),
                prefix: format!("{orchctl} lab exec {name} -- "),
                restart: format!("{orchctl} lab restart {name}"),
                name,
            })
        };
        lab.node_names().into_iter().map(host).collect()
    }

    /// Those that were asked for; all if none was named.
    ///
    /// # Errors
    /// There is no such node here.
    pub(super) fn chosen(all: &[Host], name: Option<&str>) -> anyhow::Result<Vec<Host>> {
        let Some(name) = name else { return Ok(all.to_vec()) };
        match all.iter().find(|host| host.name == name) {
            Some(host) => Ok(vec![host.clone()]),
            None => {
                let known: Vec<_> = all.iter().map(|host| host.name.as_str()).collect();
                Err(output::usage(format!(
                    "node {name:?} cannot be looked into from here; there are: {}",
                    known.join(", ")
                )))
            }
        }
    }

    /// Where etcd is, and with which certificates.
    ///
    /// # Errors
    /// It is not known.
    pub(super) fn etcd(&self) -> anyhow::Result<(Vec<String>, PathBuf)> {
        let (urls, pki) = match &self.lab {
            Some(lab) => (lab.etcd_urls()?, lab.paths("server").pki()),
            None => {
                (agent_process().map(|agent| agent.etcd).unwrap_or_default(), Paths::new("/").pki())
            }
        };
        let urls = if self.etcd.urls.is_empty() { urls } else { self.etcd.urls.clone() };
        if urls.is_empty() {
            return Err(output::hinted(
                "name its URLs with --etcd",
                "it is not known where etcd is: no lab is here, and no agent runs on this host",
            ));
        }
        Ok((urls, self.etcd.etcd_pki.clone().unwrap_or(pki)))
    }
}

fn this_host() -> anyhow::Result<Host> {
    let agent = agent_process();
    let root = agent.as_ref().map_or_else(|| PathBuf::from("/"), |agent| agent.root.clone());
    let paths = Paths::new(root);
    let status = NetStatus::read(&paths.net_status());
    if agent.is_none() && status.is_none() {
        return Err(output::hinted(
            "start a lab with `make up`, name one with --lab-dir, or run this on a node",
            "there is no lab here, and this host has no agent",
        ));
    }
    let name = match (&agent, &status) {
        (Some(agent), _) if !agent.node_name.is_empty() => agent.node_name.clone(),
        (_, Some(status)) => status.node.clone(),
        _ => nix::unistd::gethostname().context("name of this host")?.to_string_lossy().into(),
    };
    Ok(Host {
        name,
        paths,
        netns: None,
        address: status.and_then(|status| status.node_ip.parse().ok()),
        agent: agent.map(|agent| agent.pid),
        prefix: String::new(),
        restart: "orchestrator agent … (as the service manager of this host starts it)".to_owned(),
    })
}

/// A running agent, as its command line tells.
struct AgentProcess {
    pid: i32,
    node_name: String,
    root: PathBuf,
    etcd: Vec<String>,
}

fn agent_process() -> Option<AgentProcess> {
    let entries = std::fs::read_dir("/proc").ok()?;
    entries.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let words: Vec<String> = line
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        // The nodes of a lab are no agents of this host.
        let own = std::fs::metadata("/proc/self/ns/net").ok()?;
        let theirs = std::fs::metadata(entry.path().join("ns/net")).ok()?;
        use std::os::unix::fs::MetadataExt as _;
        (own.ino() == theirs.ino()).then(|| parse_agent(pid, &words)).flatten()
    })
}

fn parse_agent(pid: i32, words: &[String]) -> Option<AgentProcess> {
    let program = Path::new(words.first()?).file_name()?.to_str()?;
    if program != "orchestrator" || words.get(1)? != "agent" {
        return None;
    }
    let flag = |name: &str| {
        words.iter().enumerate().find_map(|(at, word)| match word.strip_prefix(name) {
            Some("") => words.get(at + 1).cloned(),
            Some(rest) => rest.strip_prefix('=').map(str::to_owned),
            None => None,
        })
    };
    Some(AgentProcess {
        pid,
        node_name: flag("--node-name").unwrap_or_default(),
        root: flag("--root").map_or_else(|| PathBuf::from("/"), PathBuf::from),
        etcd: flag("--etcd")
            .map(|urls| urls.split(',').map(str::to_owned).collect())
            .unwrap_or_default(),
    })
}

/// # Errors
/// Without root, which namespaces and packet sockets need.
pub(super) fn need_root(what: &str) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(output::hinted("run it with sudo", format!("this needs root: it {what}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_known_by_its_command_line() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let agent = parse_agent(
            7,
            &words("/usr/bin/orchestrator agent --node-name n1 --etcd=https://a:1,https://b:1"),
        )
        .expect("an agent");
        assert_eq!((agent.pid, agent.node_name.as_str()), (7, "n1"));
        assert_eq!(agent.root, Path::new("/"));
        assert_eq!(agent.etcd, ["https://a:1", "https://b:1"]);
        assert!(parse_agent(7, &words("orchestrator server")).is_none());
        assert!(parse_agent(7, &words("vim agent")).is_none());
    }
}
