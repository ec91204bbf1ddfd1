//! Where a lab keeps its things and which names and addresses it gives out. No I/O but reading and writing
//! `lab.json`, which records what `up` was asked for; what runs is asked of the kernel and the engine.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use ipnetwork::Ipv4Network;
use orch_config::Paths;
use serde::{Deserialize, Serialize};

/// Folder of the lab where none is named.
pub const DEFAULT_DIR: &str = "/var/lib/orch/lab";
/// Network that joins the hosts of the lab where none is named.
pub const DEFAULT_UNDERLAY: &str = "172.30.0.0/24";
/// Link of the machine itself into the underlay.
pub const HOST_LINK: &str = "orch-lab";
/// Name of the host that runs the control plane.
pub const SERVER: &str = "server";
/// A bridge has 1,023 ports and the underlay is a /24; Docker is slow long before that.
const MAX_NODES: u8 = 100;

/// Offsets of addresses in the underlay network.
const HOST_OFFSET: u32 = 1;
const SERVER_OFFSET: u32 = 10;
const NODE_OFFSET: u32 = 10;

/// What `lab up` was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub nodes: u8,
    pub underlay: Ipv4Network,
    /// Short failure timers, so that a killed node is noticed in seconds.
    pub fast: bool,
}

impl Config {
    /// # Errors
    /// The numbers do not fit together.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.nodes == 0 || self.nodes > MAX_NODES {
            bail!("--nodes {} is out of range: a lab has 1 to {MAX_NODES} nodes", self.nodes);
        }
        if self.underlay.prefix() > 24 {
            bail!("--underlay {} is too small: use a /24 or larger", self.underlay);
        }
        Ok(())
    }
}

/// A lab: its folder and its configuration.
#[derive(Debug, Clone)]
pub struct Lab {
    pub dir: PathBuf,
    pub config: Config,
}

impl Lab {
    /// The lab that `up` made in `dir`; `None` where there is none.
    ///
    /// # Errors
    /// `lab.json` is there but cannot be read.
    pub fn open(dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = dir.join("lab.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let config = serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged; `orchctl lab down` removes the lab", path.display()))?;
        Ok(Some(Self { dir: dir.to_owned(), config }))
    }

    /// The lab in `dir`, or an error that says how to make one.
    ///
    /// # Errors
    /// There is none.
    pub fn require(dir: &Path) -> anyhow::Result<Self> {
        Self::open(dir)?.with_context(|| {
            format!("there is no lab in {}; start one with `make up` or `orchctl lab up`", dir.display())
        })
    }

    /// # Errors
    /// `lab.json` cannot be written.
    pub fn save(&self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.dir).with_context(|| format!("create {}", self.dir.display()))?;
        let path = self.dir.join("lab.json");
        fs::write(&path, format!("{}\n", serde_json::to_string_pretty(&self.config)?))
            .with_context(|| format!("write {}", path.display()))
    }

    pub fn node_names(&self) -> Vec<String> {
        (1..=self.config.nodes).map(|number| format!("node-{number}")).collect()
    }

    /// The server and all nodes.
    pub fn host_names(&self) -> Vec<String> {
        std::iter::once(SERVER.to_owned()).chain(self.node_names()).collect()
    }

    /// Address of a host in the underlay.
    ///
    /// # Errors
    /// The lab has no such host.
    pub fn address(&self, host: &str) -> anyhow::Result<Ipv4Addr> {
        let offset = match host {
            "host" => HOST_OFFSET,
            SERVER => SERVER_OFFSET,
            _ => host
                .strip_prefix("node-")
                .and_then(|number| number.parse::<u32>().ok())
                .filter(|number| (1..=u32::from(self.config.nodes)).contains(number))
                .map(|number| NODE_OFFSET + number)
                .with_context(|| {
                    format!("the lab has no host {host:?}; its hosts are {}", self.host_names().join(", "))
                })?,
        };
        Ok(Ipv4Addr::from_bits(self.config.underlay.network().to_bits() + offset))
    }

    /// Root prefix of a host's own paths.
    pub fn paths(&self, host: &str) -> Paths {
        Paths::new(self.dir.join(host))
    }

    pub fn run(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Where a network namespace is pinned.
    pub fn netns(&self, host: &str) -> PathBuf {
        self.run().join("netns").join(host)
    }

    pub fn engine_socket(&self) -> PathBuf {
        self.run().join("docker.sock")
    }

    /// Name of the container whose network namespace is the node's.
    pub fn anchor(&self, node: &str) -> String {
        format!("orch-lab-{node}")
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// URL of the API server.
    pub fn api_url(&self) -> anyhow::Result<String> {
        Ok(format!("https://{}:{}", self.address(SERVER)?, orch_config::API_SERVER_PORT))
    }

    /// URL of the etcd that the server runs.
    pub fn etcd_url(&self) -> anyhow::Result<String> {
        Ok(format!("https://{}:{}", self.address(SERVER)?, orch_config::ETCD_CLIENT_PORT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab(nodes: u8) -> Lab {
        let underlay = DEFAULT_UNDERLAY.parse().expect("a constant");
        Lab { dir: PathBuf::from("/lab"), config: Config { nodes, underlay, fast: true } }
    }

    #[test]
    fn hosts_have_distinct_addresses_inside_the_underlay() {
        let lab = lab(MAX_NODES);
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
    fn zero_nodes_are_refused() {
        assert!(lab(0).config.check().is_err());
        assert!(lab(3).config.check().is_ok());
    }
}
