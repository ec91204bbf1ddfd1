//! Where a lab keeps its things and which names and addresses it gives out. No I/O but reading and writing
//! `lab.json`, which records what `up` was asked for; what runs is asked of the kernel and the engine.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use ipnetwork::Ipv4Network;
use orch_config::Paths;
use serde::{Deserialize, Serialize};

use crate::output;

/// Folder of the lab where none is named.
pub(crate) const DEFAULT_DIR: &str = "/var/lib/orch/lab";
/// Network that joins the hosts of the lab where none is named.
pub(crate) const DEFAULT_UNDERLAY: &str = "172.30.0.0/24";
/// Longest path of a lab: the longest socket below it must fit into the 107 bytes of `sockaddr_un`.
const MAX_DIR_BYTES: usize = 70;
/// File that makes a folder a lab.
const RECORD: &str = "lab.json";
/// Name of the host that runs the control plane; further ones are `server-2`, `server-3`, ….
pub(crate) const SERVER: &str = "server";
/// More members make etcd slower and no safer.
const MAX_CONTROL_PLANES: u8 = 5;
/// A bridge has 1,023 ports and the underlay is a /24; Docker is slow long before that.
const MAX_NODES: u8 = 100;

/// Offsets of addresses in the underlay network.
const HOST_OFFSET: u32 = 1;
const SERVER_OFFSET: u32 = 10;
const NODE_OFFSET: u32 = 10;
const FURTHER_SERVER_OFFSET: u32 = 200;

/// What `lab up` was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    #[serde(default = "one")]
    pub(crate) control_planes: u8,
    pub(crate) nodes: u8,
    pub(crate) underlay: Ipv4Network,
    /// Short failure timers, so that a killed node is noticed in seconds.
    pub(crate) fast: bool,
    /// What agents are told about NetworkPolicies when they start; without it, nothing.
    #[serde(default)]
    pub(crate) policy: Option<Policy>,
    /// The same of how pods reach Services.
    #[serde(default)]
    pub(crate) services: Option<Services>,
}

/// Whether agents enforce NetworkPolicies, as their flag `--policy` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Policy {
    Off,
    Auto,
    On,
}

impl Policy {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Auto => "auto",
            Self::On => "on",
        }
    }
}

/// How pods reach Services, as the agents' flag `--services` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Services {
    Nftables,
    Auto,
    Ebpf,
}

impl Services {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Auto => "auto",
            Self::Ebpf => "ebpf",
        }
    }
}

/// Labs of older versions have one control plane and do not say so.
fn one() -> u8 {
    1
}

impl Config {
    /// # Errors
    /// The numbers do not fit together.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if self.nodes == 0 || self.nodes > MAX_NODES {
            bail!("--nodes {} is out of range: a lab has 1 to {MAX_NODES} nodes", self.nodes);
        }
        if self.control_planes == 0 || self.control_planes > MAX_CONTROL_PLANES {
            bail!(
                "--control-planes {} is out of range: a lab has 1 to {MAX_CONTROL_PLANES}, and 3 outlast the loss of one",
                self.control_planes
            );
        }
        if self.underlay.prefix() > 24 {
            bail!("--underlay {} is too small: use a /24 or larger", self.underlay);
        }
        for (what, cidr) in [("pod", orch_config::POD_CIDR), ("Service", orch_config::SERVICE_CIDR)]
        {
            let cidr: Ipv4Network = cidr.parse().context("a constant of orch-config")?;
            if cidr.overlaps(self.underlay) {
                bail!(
                    "--underlay {} overlaps the {what} network {cidr}: choose another",
                    self.underlay
                );
            }
        }
        Ok(())
    }
}

impl Config {
    /// Whether a running lab of this configuration can become `wanted`: more nodes can be added.
    fn accepts(&self, wanted: &Self) -> Result<(), String> {
        if self.underlay != wanted.underlay {
            return Err(format!("the underlay {}, not {}", self.underlay, wanted.underlay));
        }
        if self.fast != wanted.fast {
            let timers = |fast| if fast { "the lab's short timers" } else { "upstream's timers" };
            return Err(format!("{}, not {}", timers(self.fast), timers(wanted.fast)));
        }
        if self.control_planes != wanted.control_planes {
            let (found, wanted) = (self.control_planes, wanted.control_planes);
            return Err(format!("{found} control planes, not {wanted}"));
        }
        if self.nodes > wanted.nodes {
            return Err(format!("{} nodes, not {}", self.nodes, wanted.nodes));
        }
        Ok(())
    }
}

fn absolute(dir: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(dir).with_context(|| format!("--lab-dir {}", dir.display()))
}

/// A lab: its folder and its configuration.
#[derive(Debug, Clone)]
pub(crate) struct Lab {
    pub(crate) dir: PathBuf,
    pub(crate) config: Config,
}

impl Lab {
    /// The lab that `up` made in `dir`; `None` where there is none.
    ///
    /// # Errors
    /// `lab.json` is there but cannot be read.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Option<Self>> {
        let dir = absolute(dir)?;
        let path = dir.join(RECORD);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let config = serde_json::from_str(&text).map_err(|error| {
            output::hinted(
                "`orchctl lab down` removes the lab",
                format!("{} is damaged: {error}", path.display()),
            )
        })?;
        Ok(Some(Self { dir, config }))
    }

    /// As [`Lab::open`], for ending the lab: a damaged record does not matter then.
    ///
    /// # Errors
    /// The folder's path is unusable.
    pub(crate) fn open_to_remove(dir: &Path) -> anyhow::Result<Option<Self>> {
        let dir = absolute(dir)?;
        if !dir.join(RECORD).exists() {
            return Ok(None);
        }
        if let Ok(Some(lab)) = Self::open(&dir) {
            return Ok(Some(lab));
        }
        let underlay = DEFAULT_UNDERLAY.parse().context("a constant")?;
        Ok(Some(Self {
            dir,
            config: Config {
                control_planes: MAX_CONTROL_PLANES,
                nodes: MAX_NODES,
                underlay,
                fast: true,
                policy: None,
                services: None,
            },
        }))
    }

    /// The lab in `dir`, or an error that says how to make one.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn require(dir: &Path) -> anyhow::Result<Self> {
        Self::open(dir)?.ok_or_else(|| {
            output::hinted(
                "start one with `make up` or `orchctl lab up`",
                format!("there is no lab in {}", dir.display()),
            )
        })
    }

    /// A lab to be made, or the one that is there if it is the same.
    ///
    /// # Errors
    /// The folder is in use for something else, or the lab in it is another one.
    pub(crate) fn new(dir: &Path, mut config: Config) -> anyhow::Result<Self> {
        config.check()?;
        let dir = absolute(dir)?;
        if dir.as_os_str().len() > MAX_DIR_BYTES {
            bail!(
                "--lab-dir {} is too long for the sockets below it: use at most {MAX_DIR_BYTES} bytes",
                dir.display()
            );
        }
        if let Some(before) = Self::open(&dir)? {
            before.config.accepts(&config).map_err(|why| {
                output::hinted(
                    "end it with `orchctl lab down` first, or make a second one with another --lab-dir and --underlay",
                    format!("there is already a lab in {} with {why}", dir.display()),
                )
            })?;
            config.policy = config.policy.or(before.config.policy);
            config.services = config.services.or(before.config.services);
        } else if fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_some()) {
            // `down` removes the whole folder, so nothing else may be in it.
            bail!(
                "{} is not empty and no lab: name an empty or a new folder with --lab-dir",
                dir.display()
            );
        }
        Ok(Self { dir, config })
    }

    /// # Errors
    /// `lab.json` cannot be written.
    pub(crate) fn save(&self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.dir).with_context(|| format!("create {}", self.dir.display()))?;
        let path = self.dir.join(RECORD);
        fs::write(&path, format!("{}\n", serde_json::to_string_pretty(&self.config)?))
            .with_context(|| format!("write {}", path.display()))
    }

    pub(crate) fn node_names(&self) -> Vec<String> {
        (1..=self.config.nodes).map(|number| format!("node-{number}")).collect()
    }

    /// The hosts with a server and an etcd.
    pub(crate) fn server_names(&self) -> Vec<String> {
        let further = (2..=self.config.control_planes).map(|number| format!("{SERVER}-{number}"));
        std::iter::once(SERVER.to_owned()).chain(further).collect()
    }

    /// Whether the control plane outlasts the loss of a host.
    pub(crate) fn has_peers(&self) -> bool {
        self.config.control_planes > 1
    }

    pub(crate) fn is_server(&self, host: &str) -> bool {
        self.server_names().iter().any(|name| name == host)
    }

    /// The servers and all nodes.
    pub(crate) fn host_names(&self) -> Vec<String> {
        self.server_names().into_iter().chain(self.node_names()).collect()
    }

    /// Address of a host in the underlay.
    ///
    /// # Errors
    /// The lab has no such host.
    pub(crate) fn address(&self, host: &str) -> anyhow::Result<Ipv4Addr> {
        let numbered = |prefix: &str, first: u8, last: u8| {
            host.strip_prefix(prefix)
                .and_then(|number| number.parse::<u8>().ok())
                .filter(|number| (first..=last).contains(number))
                .map(u32::from)
        };
        let offset = match host {
            "host" => HOST_OFFSET,
            SERVER => SERVER_OFFSET,
            _ => numbered("node-", 1, self.config.nodes)
                .map(|number| NODE_OFFSET + number)
                .or(numbered("server-", 2, self.config.control_planes)
                    .map(|number| FURTHER_SERVER_OFFSET + number))
                .with_context(|| {
                    format!(
                        "the lab has no host {host:?}; its hosts are {}",
                        self.host_names().join(", ")
                    )
                })?,
        };
        Ok(Ipv4Addr::from_bits(self.config.underlay.network().to_bits() + offset))
    }

    /// Root prefix of a host's own paths.
    pub(crate) fn paths(&self, host: &str) -> Paths {
        Paths::new(self.dir.join(host))
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Where a network namespace is pinned.
    pub(crate) fn netns(&self, host: &str) -> PathBuf {
        self.run().join("netns").join(host)
    }

    pub(crate) fn engine_socket(&self) -> PathBuf {
        self.run().join("docker.sock")
    }

    /// Short name of the lab, distinct for each folder: labs on one machine must not meet in names of links or
    /// containers. At most 13 bytes, because a link's name has 15.
    pub(crate) fn id(&self) -> String {
        if self.dir == Path::new(DEFAULT_DIR) {
            return "orch-lab".to_owned();
        }
        // FNV-1a: the same in every version, so that one binary removes what another one made.
        let hash =
            self.dir.as_os_str().as_encoded_bytes().iter().fold(0x811c_9dc5_u32, |hash, byte| {
                (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
            });
        format!("orch-{hash:08x}")
    }

    /// Link of the machine itself into the underlay.
    pub(crate) fn host_link(&self) -> String {
        self.id()
    }

    /// Name of the container whose network namespace is the node's.
    pub(crate) fn anchor(&self, node: &str) -> String {
        format!("{}-{node}", self.id())
    }

    /// Socket of the lab's containerd.
    pub(crate) fn containerd_socket(&self) -> PathBuf {
        self.run().join("containerd.sock")
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// URL of something that every server's host has at `port`.
    pub(crate) fn url(&self, server: &str, port: u16) -> anyhow::Result<String> {
        Ok(format!("https://{}:{port}", self.address(server)?))
    }

    fn urls(&self, port: u16) -> anyhow::Result<Vec<String>> {
        self.server_names().iter().map(|server| self.url(server, port)).collect()
    }

    /// URLs of the API servers.
    pub(crate) fn api_urls(&self) -> anyhow::Result<Vec<String>> {
        self.urls(orch_config::API_SERVER_PORT)
    }

    /// URLs of the etcds that the servers run.
    pub(crate) fn etcd_urls(&self) -> anyhow::Result<Vec<String>> {
        self.urls(orch_config::ETCD_CLIENT_PORT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab(nodes: u8) -> Lab {
        let underlay = DEFAULT_UNDERLAY.parse().expect("a constant");
        let config =
            Config { control_planes: 1, nodes, underlay, fast: true, policy: None, services: None };
        Lab { dir: PathBuf::from("/lab"), config }
    }

    #[test]
    fn hosts_have_distinct_addresses_inside_the_underlay() {
        let mut lab = lab(MAX_NODES);
        lab.config.control_planes = MAX_CONTROL_PLANES;
        let mut seen = std::collections::BTreeSet::new();
        for host in lab.host_names().iter().chain([&"host".to_owned()]) {
            let address = lab.address(host).expect("an address");
            assert!(lab.config.underlay.contains(address), "{address}");
            assert!(seen.insert(address), "{address} is given twice");
        }
    }

    #[test]
    fn an_unknown_host_is_named_together_with_the_known_ones() {
        let error = lab(2).address("node-3").expect_err("there are two nodes").to_string();
        assert_eq!(error, "the lab has no host \"node-3\"; its hosts are server, node-1, node-2");
    }

    #[test]
    fn a_lab_of_an_older_version_has_one_control_plane() {
        let text = r#"{ "nodes": 3, "underlay": "172.30.0.0/24", "fast": true }"#;
        let mut lab = lab(3);
        lab.config = serde_json::from_str(text).expect("its record");
        assert_eq!(lab.server_names(), [SERVER]);
        lab.config.control_planes = 3;
        assert_eq!(lab.server_names(), ["server", "server-2", "server-3"]);
        assert!(
            lab.is_server("server-3") && !lab.is_server("server-4") && !lab.is_server("node-1")
        );
        assert_eq!(lab.etcd_urls().expect("URLs")[2], "https://172.30.0.203:2379");
    }

    #[test]
    fn zero_nodes_and_overlapping_networks_are_refused() {
        assert!(lab(0).config.check().is_err());
        assert!(Config { control_planes: 0, ..lab(1).config }.check().is_err());
        assert!(lab(3).config.check().is_ok());
        let mut config = lab(1).config;
        for taken in ["10.244.7.0/24", "10.0.0.0/8", "10.100.0.0/16"] {
            config.underlay = taken.parse().expect("a CIDR");
            let error = config.check().expect_err(taken).to_string();
            assert!(error.contains("overlaps the"), "{error}");
        }
    }

    #[test]
    fn labs_in_different_folders_share_no_name() {
        let mut other = lab(1);
        other.dir = PathBuf::from("/lab2");
        assert_ne!(lab(1).host_link(), other.host_link());
        assert_ne!(lab(1).anchor("node-1"), other.anchor("node-1"));
        assert!(other.host_link().len() <= 15);
        other.dir = PathBuf::from(DEFAULT_DIR);
        assert_eq!(other.host_link(), "orch-lab");
    }

    #[test]
    fn a_folder_with_other_things_is_not_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = lab(1).config;
        fs::write(folder.path().join("thesis.txt"), "years of work").expect("write");
        let error = Lab::new(folder.path(), config.clone()).expect_err("not empty").to_string();
        assert!(error.contains("is not empty and no lab"), "{error}");

        fs::remove_file(folder.path().join("thesis.txt")).expect("remove");
        Lab::new(folder.path(), config.clone()).expect("empty").save().expect("save");
        let more = Config { nodes: 2, ..config.clone() };
        Lab::new(folder.path(), more).expect("nodes can be added");
        let other = Config { underlay: "192.168.7.0/24".parse().expect("a CIDR"), ..config };
        let error =
            output::describe(&Lab::new(folder.path(), other).expect_err("another underlay"));
        assert!(error.contains("already a lab") && error.contains("hint: end it"), "{error}");
    }

    #[test]
    fn a_damaged_lab_can_be_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(Lab::open_to_remove(folder.path()).expect("no error").is_none());
        fs::write(folder.path().join(RECORD), "{").expect("write");
        assert!(Lab::open(folder.path()).is_err());
        assert!(Lab::open_to_remove(folder.path()).expect("no error").is_some());
    }
}
