//! `/etc/orch/config.yaml`: what this host is told about itself. Read and checked whole before anything is done;
//! unknown fields are errors.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use orch_config::Paths;
use serde::{Deserialize, Serialize};

use crate::output;

/// Version of the file's schema.
const API_VERSION: &str = "orch.dev/v1";
const KIND: &str = "HostConfiguration";

/// The settings with their defaults and what they mean; also the reference in the docs.
pub(crate) const DOCUMENTED: &str = include_str!("config.yaml");

/// What a host does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    /// API server, scheduler, controllers and a member of etcd
    ControlPlane,
    /// Runs pods
    Worker,
}

/// How daemons are kept running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Supervisor {
    /// systemd where it runs and the root is `/`, else as detached processes
    #[default]
    Auto,
    /// Units of systemd
    Systemd,
    /// Detached processes with PID files
    Processes,
}

/// How fast failures are acted upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Timers {
    /// Upstream's: a dead node is noticed after 50 s, its pods move after 5 min
    #[default]
    Upstream,
    /// A dead node is noticed in seconds and its pods move at once
    Fast,
}

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Config {
    api_version: String,
    kind: String,
    #[serde(default = "control_plane")]
    pub(crate) role: Role,
    #[serde(default)]
    pub(crate) node: Node,
    #[serde(default)]
    pub(crate) control_plane: ControlPlane,
    #[serde(default)]
    pub(crate) cluster: Cluster,
    #[serde(default)]
    pub(crate) engine: Engine,
    #[serde(default)]
    pub(crate) dns: Dns,
    #[serde(default)]
    pub(crate) timers: Timers,
    #[serde(default)]
    pub(crate) supervisor: Supervisor,
}

fn control_plane() -> Role {
    Role::ControlPlane
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) address: Option<Ipv4Addr>,
    /// Whether this host runs pods.
    pub(crate) agent: bool,
}

impl Default for Node {
    fn default() -> Self {
        Self { name: String::new(), address: None, agent: true }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct ControlPlane {
    pub(crate) port: u16,
    pub(crate) cert_sans: Vec<String>,
    /// Names and peer URLs of etcd's members when this one was made, `NAME=URL`.
    pub(crate) etcd_members: Vec<String>,
    /// This host's etcd joined others.
    pub(crate) etcd_joins: bool,
}

impl Default for ControlPlane {
    fn default() -> Self {
        Self {
            port: orch_config::API_SERVER_PORT,
            cert_sans: Vec::new(),
            etcd_members: Vec::new(),
            etcd_joins: false,
        }
    }
}

/// The cluster as this host found it when it joined.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Cluster {
    /// URLs of the API servers.
    pub(crate) servers: Vec<String>,
    /// Client URLs of etcd, for the subnet lease.
    pub(crate) etcd: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Engine {
    pub(crate) socket: PathBuf,
}

impl Default for Engine {
    fn default() -> Self {
        Self { socket: PathBuf::from("/var/run/docker.sock") }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Dns {
    pub(crate) upstream: Vec<IpAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            role: Role::ControlPlane,
            node: Node::default(),
            control_plane: ControlPlane::default(),
            cluster: Cluster::default(),
            engine: Engine::default(),
            dns: Dns::default(),
            timers: Timers::default(),
            supervisor: Supervisor::default(),
        }
    }
}

/// Where the file is.
pub(crate) fn path(paths: &Paths) -> PathBuf {
    paths.etc().join("config.yaml")
}

impl Config {
    /// The file at `path`; `None` when there is none.
    ///
    /// # Errors
    /// It cannot be read, or says something that is not in the schema.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text).with_context(|| path.display().to_string()).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let config: Self = serde_saphyr::from_str(text).map_err(|error| {
            output::hinted("`orchctl config defaults` prints all settings", error.to_string())
        })?;
        if config.api_version != API_VERSION || config.kind != KIND {
            bail!("apiVersion and kind have to be {API_VERSION} and {KIND}");
        }
        if !config.node.name.is_empty() {
            check_name(&config.node.name)?;
        }
        if config.control_plane.port == 0 {
            bail!("controlPlane.port has to be a port");
        }
        for url in config.cluster.servers.iter().chain(&config.cluster.etcd) {
            if !url.starts_with("https://") {
                bail!("cluster: {url} is no https:// URL");
            }
        }
        Ok(config)
    }

    /// Fills in what this machine says: its name and the address of its default route.
    ///
    /// # Errors
    /// The name is unusable, or there is no address to choose.
    pub(crate) fn complete(&mut self) -> anyhow::Result<()> {
        if self.node.name.is_empty() {
            let host = nix::unistd::gethostname().context("read the host's name")?;
            self.node.name = host.to_string_lossy().to_ascii_lowercase();
        }
        check_name(&self.node.name)?;
        if self.node.address.is_none() {
            self.node.address = Some(default_address()?);
        }
        Ok(())
    }

    /// The host's address, after [`Config::complete`].
    pub(crate) fn address(&self) -> anyhow::Result<Ipv4Addr> {
        self.node.address.context("node.address is not set")
    }

    /// URL of the API server that runs here.
    pub(crate) fn own_url(&self) -> anyhow::Result<String> {
        Ok(format!("https://{}:{}", self.address()?, self.control_plane.port))
    }

    /// Client URL of the etcd that runs here.
    pub(crate) fn own_etcd(&self) -> anyhow::Result<String> {
        Ok(format!("https://{}:{}", self.address()?, orch_config::ETCD_CLIENT_PORT))
    }

    pub(crate) fn is_control_plane(&self) -> bool {
        self.role == Role::ControlPlane
    }

    pub(crate) fn to_yaml(&self) -> anyhow::Result<String> {
        serde_saphyr::to_string(self).context("write YAML")
    }

    /// Writes the file, whole or not at all.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = format!(
            "# What this host is told about itself; `orchctl config defaults` explains every setting.\n{}",
            self.to_yaml()?
        );
        super::host::write_file(path, &text, 0o644)
    }
}

/// A name that a Node object and a host in DNS may have (RFC 1123).
fn check_name(name: &str) -> anyhow::Result<()> {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let fine = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|byte| good(byte) || byte == b'-' || byte == b'.')
        && name.bytes().next().is_some_and(good)
        && name.bytes().last().is_some_and(good);
    if fine {
        return Ok(());
    }
    Err(output::hinted(
        "name the node with --node-name, in lower-case letters, digits and dashes",
        format!("{name:?} is no name for a node (RFC 1123)"),
    ))
}

/// The address from which this host would talk to the world. Nothing is sent.
fn default_address() -> anyhow::Result<Ipv4Addr> {
    let found = || -> std::io::Result<IpAddr> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        // TEST-NET-1 (RFC 5737): only the route matters.
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        Ok(socket.local_addr()?.ip())
    };
    match found() {
        Ok(IpAddr::V4(address)) if !address.is_loopback() && !address.is_unspecified() => {
            Ok(address)
        }
        _ => Err(output::hinted(
            "name the address by which other hosts reach this one: --address 10.0.0.1",
            "this host has no default route from which its address could be read",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_settings_are_the_defaults() {
        let documented = Config::parse(DOCUMENTED).expect("the file parses");
        assert_eq!(documented, Config::default());
        // Every setting has a line.
        let all = Config::default().to_yaml().expect("YAML");
        for line in all.lines() {
            let key = line.trim().split(':').next().unwrap_or_default();
            assert!(DOCUMENTED.contains(&format!("{key}:")), "{key} is not documented");
        }
    }

    #[test]
    fn what_is_written_reads_back_and_the_rest_is_refused() {
        let mut config = Config::default();
        config.node.name = "a-1".to_owned();
        config.node.address = Some(Ipv4Addr::new(10, 0, 0, 1));
        config.cluster.servers = vec!["https://10.0.0.1:6443".to_owned()];
        assert_eq!(Config::parse(&config.to_yaml().expect("YAML")).expect("read"), config);

        for (text, why) in [
            ("apiVersion: orch.dev/v1\nkind: HostConfiguration\nnodes: {}\n", "nodes"),
            ("apiVersion: v1\nkind: HostConfiguration\n", "apiVersion"),
            ("apiVersion: orch.dev/v1\nkind: HostConfiguration\nnode: {name: A_B}\n", "RFC 1123"),
            ("apiVersion: orch.dev/v1\nkind: HostConfiguration\nrole: boss\n", "boss"),
            (
                "apiVersion: orch.dev/v1\nkind: HostConfiguration\ncluster: {servers: ['http://x']}\n",
                "https",
            ),
        ] {
            let error = format!("{:#}", Config::parse(text).expect_err(text));
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
