//! A cluster on real hosts: bring it up, let it grow, look after it, take it apart.
//!
//! [`init`] and [`join`] make hosts part of a cluster, [`reset`] undoes both; [`preflight`] looks before they leap.
//! [`token`], [`discovery`], [`csr`] and [`handover`] are how a new host and a cluster come to trust each other. [`etcd`],
//! [`cert`], [`nodes`] and [`doctor`] are for the days after. What a host is told stands in [`config`]; what is on it, and how
//! it is started and stopped, in [`host`].

mod cert;
mod config;
mod csr;
mod discovery;
mod doctor;
pub(crate) mod etcd;
mod handover;
mod host;
mod init;
pub(crate) mod join;
mod leave;
mod nodes;
mod preflight;
mod reset;
mod token;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use anyhow::Context as _;
use orch_client::Client;
use serde_json::{Value, json};

#[cfg(test)]
pub(crate) use self::config::DOCUMENTED;
use self::config::{Config, Supervisor, Timers};
use self::host::Host;
use crate::output;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Make this host the first control plane of a new cluster
    Init(Box<init::Flags>),
    /// Make this host a worker, or a further control plane, of a cluster
    Join(Box<join::Flags>),
    /// Take this host out of its cluster and leave it as it was before
    Reset(reset::Flags),
    /// Bootstrap tokens, with which hosts join
    #[command(subcommand)]
    Token(token::Command),
    /// The store: members, health, snapshots
    #[command(subcommand)]
    Etcd(etcd::Command),
    /// Certificates of this host: when they end, and new ones
    #[command(subcommand)]
    Cert(cert::Command),
    /// Let no new pods onto a node
    Cordon(nodes::NodeFlag),
    /// Let pods onto a node again
    Uncordon(nodes::NodeFlag),
    /// Move all pods away from a node, for maintenance
    Drain(nodes::DrainFlags),
    /// Add or remove taints: `taint node-1 key=value:NoSchedule`, `taint node-1 key-`
    Taint(nodes::TaintFlags),
    /// Look for what is wrong with this host and its cluster, and say what mends it
    Doctor(doctor::Flags),
    /// Settings of this host
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the administrator's kubeconfig, or make one for somebody else
    Kubeconfig(cert::KubeconfigFlags),
    /// Versions of orchctl and of the cluster
    #[command(after_help = "Example: orchctl version -o json")]
    Version {
        /// Do not ask the cluster
        #[arg(long)]
        client: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Print the completions of a shell
    #[command(after_help = "Example: orchctl completion bash > /etc/bash_completion.d/orchctl")]
    Completion { shell: clap_complete::Shell },
}

#[derive(clap::Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the settings that are in force on this host
    #[command(after_help = "Example: orchctl config view -o json")]
    View {
        /// Prefix of every path, as given to init or join
        #[arg(long, default_value = "/", value_name = "DIR")]
        root: PathBuf,
        #[command(flatten)]
        format: Format,
    },
    /// Print all settings with their defaults and what they mean
    #[command(after_help = "Example: orchctl config defaults > config.yaml")]
    Defaults,
    /// Check a file of settings
    #[command(after_help = "Example: orchctl config check config.yaml")]
    Check { file: PathBuf },
}

/// How data is printed.
#[derive(clap::Args, Debug, Clone, Copy)]
pub(crate) struct Format {
    /// Print data for programs
    #[arg(short, long, value_enum, default_value_t = Kind::Text)]
    output: Kind,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Json,
    Yaml,
}

impl Format {
    /// `data` for programs, or what `text` prints for people.
    pub(crate) fn print(
        self,
        data: &Value,
        text: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        match self.output {
            Kind::Text => text(),
            Kind::Json => output::line(&serde_json::to_string_pretty(data)?),
            Kind::Yaml => {
                output::line(serde_saphyr::to_string(data).context("write YAML")?.trim_end())
            }
        }
    }
}

/// What `init` and `join` have in common. A flag overrides the file, and is written into it.
#[derive(clap::Args)]
pub(crate) struct HostFlags {
    /// Settings to start from; without it those in /etc/orch/config.yaml, if there are any
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Prefix of every path, so that several hosts can live on one machine
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// Name of the node; without it the host's name
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Address by which other hosts reach this one; without it that of the default route
    #[arg(long, value_name = "ADDRESS")]
    address: Option<Ipv4Addr>,
    /// Unix socket of the Docker engine
    #[arg(long, value_name = "SOCKET")]
    engine: Option<PathBuf>,
    /// Resolvers for names outside the cluster
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    upstream_dns: Vec<IpAddr>,
    /// How fast failures are acted upon
    #[arg(long, value_enum)]
    timers: Option<Timers>,
    /// How daemons are kept running
    #[arg(long, value_enum)]
    supervisor: Option<Supervisor>,
    /// Go on in spite of these failed checks
    #[arg(long, value_name = "CHECK", value_delimiter = ',')]
    ignore_preflight: Vec<String>,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl HostFlags {
    /// The settings: file, then flags.
    fn config(&self, host: &Host) -> anyhow::Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::read(path)?
                .with_context(|| format!("there is no file {}", path.display()))?,
            None => Config::read(&config::path(&host.paths))?.unwrap_or_default(),
        };
        if let Some(name) = &self.node_name {
            config.node.name.clone_from(name);
        }
        config.node.address = self.address.or(config.node.address);
        if let Some(socket) = &self.engine {
            config.engine.socket = std::path::absolute(socket)
                .with_context(|| format!("--engine {}", socket.display()))?;
        }
        if !self.upstream_dns.is_empty() {
            config.dns.upstream.clone_from(&self.upstream_dns);
        }
        config.timers = self.timers.unwrap_or(config.timers);
        config.supervisor = self.supervisor.unwrap_or(config.supervisor);
        Ok(config)
    }
}

/// The kubeconfig that `init` made on this host, for commands that name none.
pub(crate) fn admin_kubeconfig() -> PathBuf {
    orch_config::Paths::new("/").pki().join("admin.conf")
}

/// Runs one command; returns the exit code. `connect` is called by those that talk to the API server.
pub(crate) async fn run(
    command: Command,
    connect: impl Fn() -> anyhow::Result<Client>,
) -> anyhow::Result<u8> {
    let done = |()| 0;
    match command {
        Command::Init(flags) => init::run(*flags).await.map(done),
        Command::Join(flags) => join::run(*flags).await.map(done),
        Command::Reset(flags) => reset::run(flags).await.map(done),
        Command::Token(command) => token::run(command, connect).await.map(done),
        Command::Etcd(command) => etcd::run(command).await,
        Command::Cert(command) => cert::run(command).await,
        Command::Cordon(flags) => nodes::cordon(&connect()?, &flags, true).await.map(done),
        Command::Uncordon(flags) => nodes::cordon(&connect()?, &flags, false).await.map(done),
        Command::Drain(flags) => nodes::drain(&connect()?, &flags).await.map(done),
        Command::Taint(flags) => nodes::taint(&connect()?, &flags).await.map(done),
        Command::Doctor(flags) => doctor::run(flags, connect().ok()).await,
        Command::Config(command) => settings(command).map(done),
        Command::Kubeconfig(flags) => cert::kubeconfig(&flags).map(done),
        Command::Version { client, format } => version(client, format, connect).await.map(done),
        Command::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut crate::command(), "orchctl", &mut text);
            std::io::stdout().write_all(&text)?;
            Ok(0)
        }
    }
}

fn settings(command: ConfigCommand) -> anyhow::Result<()> {
    match command {
        ConfigCommand::View { root, format } => {
            let host = Host::new(&root)?;
            let path = config::path(&host.paths);
            let config = Config::read(&path)?.ok_or_else(|| {
                output::hinted(
                    "`orchctl init` or `orchctl join` write it; `orchctl config defaults` prints the defaults",
                    format!("there is no {}", path.display()),
                )
            })?;
            format.print(&serde_json::to_value(&config)?, || {
                output::line(config.to_yaml()?.trim_end())
            })
        }
        ConfigCommand::Defaults => output::line(config::DOCUMENTED.trim_end()),
        ConfigCommand::Check { file } => {
            Config::read(&file)?.with_context(|| format!("there is no file {}", file.display()))?;
            eprintln!("{} is good", file.display());
            Ok(())
        }
    }
}

async fn version(
    client_only: bool,
    format: Format,
    connect: impl Fn() -> anyhow::Result<Client>,
) -> anyhow::Result<()> {
    let mut data =
        json!({ "client": orch_config::VERSION, "kubernetes": orch_config::KUBERNETES_VERSION });
    if !client_only {
        let server: Value = crate::kube::wire::get(&connect()?, "/version").await?;
        data["server"] = server["gitVersion"].clone();
    }
    format.print(&data, || {
        output::line(&format!(
            "orchctl {} (Kubernetes API {})",
            orch_config::VERSION,
            orch_config::KUBERNETES_VERSION
        ))?;
        match data["server"].as_str() {
            Some(server) => output::line(&format!("server {server}")),
            None => Ok(()),
        }
    })
}
