//! `orchctl lab`: many nodes on this one machine, each a network namespace with an agent of its own.
//!
//! This file reads the command line and prints. [`layout`] says where a lab keeps its things, [`fleet`] brings hosts
//! up and down, [`net`] makes namespaces and links, [`engine`] runs the containers' engine, [`demo`] shows the
//! example and [`mod@bench`] measures.

mod bench;
mod demo;
pub(crate) mod engine;
mod fleet;
mod layout;
mod net;
pub(crate) mod process;
pub(crate) mod programs;

use std::path::{Path, PathBuf};

use anyhow::bail;
use ipnetwork::Ipv4Network;

use crate::cluster::Format;
use crate::output;

pub(crate) use fleet::{CNI_PLUGINS, daemons};
pub(crate) use layout::{DEFAULT_DIR, Lab};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Start the lab, or what of it does not run
    #[command(after_help = "Example: orchctl lab up --nodes 5")]
    Up {
        /// Number of nodes
        #[arg(long, default_value_t = 3)]
        nodes: u8,
        /// Number of control planes, each with a server and a member of etcd; 3 outlast the loss of one
        #[arg(long, default_value_t = 1)]
        control_planes: u8,
        /// Network that joins the nodes; two labs on one machine need different ones
        #[arg(long, value_name = "CIDR", env = "ORCH_LAB_UNDERLAY", default_value = layout::DEFAULT_UNDERLAY)]
        underlay: Ipv4Network,
        /// Upstream's failure timers (a dead node is noticed after 50 s, its pods move after 5 min) instead of the
        /// lab's short ones
        #[arg(long)]
        default_timings: bool,
        /// Whether agents enforce NetworkPolicies; one that runs keeps what it was started with until `lab restart`
        #[arg(long)]
        policy: Option<layout::Policy>,
        /// How pods reach Services; an agent that runs keeps what it was started with until `lab restart`
        #[arg(long)]
        services: Option<layout::Services>,
    },
    /// End the lab and remove everything it made
    #[command(after_help = "Example: orchctl lab down")]
    Down,
    /// What runs, where it logs and how much memory it takes
    #[command(after_help = "Example: orchctl lab status -o json")]
    Status {
        #[command(flatten)]
        format: Format,
    },
    /// Crash a host: a node with all its containers, `server`, `etcd` or `engine`; one of several control planes with
    /// its etcd
    #[command(after_help = "Example: orchctl lab kill node-3")]
    Kill {
        host: String,
        /// Only the agent's process: the node's pods and packets go on
        #[arg(long)]
        agent_only: bool,
    },
    /// Start a host again (a running daemon is stopped first): a node, a server or `engine`
    #[command(after_help = "Example: orchctl lab restart node-3")]
    Restart { host: String },
    /// Cut a node or a server off from the network that joins the hosts
    #[command(after_help = "Example: orchctl lab partition node-2")]
    Partition { host: String },
    /// Undo `partition`
    #[command(after_help = "Example: orchctl lab heal node-2")]
    Heal { host: String },
    /// Lose the state of all control planes, put it back from a snapshot on the first one, and let the others join anew; the
    /// nodes are left alone
    #[command(after_help = "Example: orchctl lab restore etcd.db\n\
        A snapshot is saved with: orchctl etcd snapshot save etcd.db --root $DIR/server --endpoints https://172.30.0.10:2379")]
    Restore {
        /// What `orchctl etcd snapshot save` wrote
        file: PathBuf,
    },
    /// Print the path of the administrator's kubeconfig
    #[command(after_help = "Example: export KUBECONFIG=$(orchctl lab kubeconfig)")]
    Kubeconfig,
    /// Run a command in a host's network namespace; `underlay` is a host too
    #[command(after_help = "Example: orchctl lab exec node-1 -- ip route")]
    Exec {
        host: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Deploy the example and show it answering from different nodes
    #[command(after_help = "Example: orchctl lab demo")]
    Demo,
    /// Measure pod start against plain Docker, and the memory of idle daemons
    #[command(after_help = "Example: orchctl lab bench --rounds 20")]
    Bench {
        /// Pods to start; the median counts
        #[arg(long, default_value_t = 20)]
        rounds: usize,
        #[command(flatten)]
        format: Format,
    },
}

/// Runs one command; returns the exit code.
pub(crate) async fn run(command: Command, dir: &Path) -> anyhow::Result<u8> {
    match command {
        Command::Up { nodes, control_planes, underlay, default_timings, policy, services } => {
            need_root("makes network namespaces and starts a Docker engine")?;
            let fast = !default_timings;
            let config = layout::Config { control_planes, nodes, underlay, fast, policy, services };
            let lab = Lab::new(dir, config)?;
            fleet::up(&lab).await?;
        }
        Command::Down => {
            need_root("ends daemons and removes network namespaces")?;
            fleet::down(dir).await?;
        }
        Command::Status { format } => return status(&Lab::require(dir)?, format),
        Command::Kill { host, agent_only } => {
            let lab = open(dir, "ends daemons")?;
            let said = if agent_only {
                fleet::kill_agent(&lab, &host)?
            } else {
                fleet::kill(&lab, &host).await?
            };
            eprintln!("{said}");
        }
        Command::Restart { host } => {
            let lab = open(dir, "starts daemons in network namespaces")?;
            eprintln!("{}", fleet::restart(&lab, &host).await?);
        }
        Command::Partition { host } => {
            net::set_partitioned(&open(dir, "changes links")?, &host, true)?;
            eprintln!("{host} is cut off; `orchctl lab heal {host}` joins it again");
        }
        Command::Heal { host } => {
            net::set_partitioned(&open(dir, "changes links")?, &host, false)?;
            eprintln!("{host} is joined again");
        }
        Command::Restore { file } => {
            fleet::restore(&open(dir, "starts daemons in network namespaces")?, &file).await?;
        }
        Command::Kubeconfig => {
            output::line(&Lab::require(dir)?.kubeconfig().display().to_string())?
        }
        Command::Exec { host, command } => {
            let lab = open(dir, "enters network namespaces")?;
            if host != net::UNDERLAY {
                lab.address(&host)?;
            }
            let netns = lab.netns(&host);
            if !cni_netlink::NetNs::is_nsfs(&netns) {
                return Err(output::hinted(
                    format!("`orchctl lab restart {host}` starts it"),
                    format!("{host} is down: it has no network namespace"),
                ));
            }
            let code = process::run_in(&netns, &command)?;
            return Ok(u8::try_from(code).unwrap_or(u8::MAX));
        }
        Command::Demo => {
            let lab = open(dir, "reaches the lab's Docker engine")?;
            demo::run(&lab).await?;
        }
        Command::Bench { rounds, format } => {
            if rounds == 0 {
                return Err(output::usage("--rounds 0 measures nothing: name at least 1"));
            }
            bench::run(&open(dir, "reaches the lab's Docker engine")?, rounds, format).await?;
        }
    }
    Ok(0)
}

fn open(dir: &Path, why: &str) -> anyhow::Result<Lab> {
    need_root(why)?;
    Lab::require(dir)
}

fn need_root(why: &str) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(output::hinted("run it with sudo", format!("this needs root: it {why}")))
}

/// Resident memory of a process.
fn resident(pid: Option<i32>) -> Option<u64> {
    pid.and_then(|pid| u32::try_from(pid).ok()).and_then(orch_telemetry::resident_bytes)
}

fn mebibytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(String::new, |bytes| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)))
}

/// Resident memory of a process for people.
pub(crate) fn memory(pid: Option<i32>) -> String {
    mebibytes(resident(pid))
}

/// Prints all processes; 1 as exit code when one is down.
fn status(lab: &Lab, format: Format) -> anyhow::Result<u8> {
    let all = daemons(lab);
    let down: Vec<&str> =
        all.iter().filter(|one| one.pid.is_none()).map(|one| one.name.as_str()).collect();
    let address = |name: &str| lab.address(name).ok().map(|address| address.to_string());
    let data = all.iter().map(|one| {
        serde_json::json!({ "host": one.name, "address": address(&one.name), "pid": one.pid, "log": one.log })
    });
    format.print(&data.collect(), || {
        let rows = all.iter().map(|one| {
            vec![
                one.name.clone(),
                address(&one.name).unwrap_or_else(|| "-".to_owned()),
                one.pid.map_or_else(|| "down".to_owned(), |pid| format!("running, PID {pid}")),
                memory(one.pid),
                one.log.display().to_string(),
            ]
        });
        output::table(&["HOST", "ADDRESS", "STATE", "MEMORY", "LOG"], rows)
    })?;
    if down.is_empty() {
        return Ok(0);
    }
    eprintln!("hint: {} down; `orchctl lab up` starts what does not run", down.join(", "));
    Ok(1)
}

/// Fails with one message when the lab's engine does not answer.
async fn engine_of(lab: &Lab) -> anyhow::Result<bollard::Docker> {
    if engine::daemon(lab).pid().is_none() {
        bail!("the lab's Docker engine is down; `orchctl lab restart engine` starts it");
    }
    crate::image::connect(&lab.engine_socket()).await
}
