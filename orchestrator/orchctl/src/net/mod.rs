//! `orchctl net`: the pod network explained, from what nodes, kernel and etcd show.
//!
//! This file reads the command line and prints. [`hosts`] says which nodes can be looked into from here, [`view`] and
//! [`leases`] read, [`checks`] and [`firewall`] judge (pure), [`probe`] sends real packets and follows them,
//! [`doctor`] and [`trace`] put these together. [`config`] shows and changes the settings that all nodes follow.
//! [`explain`] asks the policy compiler, [`flows`] reads what the policy programs tell.

mod checks;
mod config;
mod doctor;
mod explain;
mod firewall;
mod flows;
mod hosts;
mod leases;
mod probe;
mod status;
mod trace;
mod view;

use std::path::Path;

use clap::ValueEnum;
use orch_client::Client;
use serde::Serialize;
use serde_json::json;

use crate::output;
use hosts::{EtcdFlags, Host, Hosts};
use status::NetStatus;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// What the network agents say of themselves: subnet, device, peers, Services, problems
    #[command(after_help = "Example: orchctl net status -o json")]
    Status(Flags),
    /// Who sends to whom: for each node what it holds of each other node
    #[command(after_help = "Example: orchctl net nodes")]
    Nodes(Flags),
    /// The subnet leases in etcd, with their lifetimes
    #[command(after_help = "Example: orchctl net leases")]
    Leases(Flags),
    /// The settings that all nodes follow: mode, network, VNI, port
    #[command(subcommand)]
    Config(config::Command),
    /// Look for what is wrong, on one node or on all, and say which command mends it; sends test packets
    #[command(after_help = "Example: orchctl net doctor node-2")]
    Doctor {
        /// The node; without it all that can be looked into from here
        node: Option<String>,
        #[command(flatten)]
        flags: Flags,
    },
    /// Follow a packet from one pod to another, link by link
    #[command(after_help = "Example: orchctl net trace web-0 kube-system/dns-1")]
    Trace {
        /// The pod that sends, `NAME` or `NAMESPACE/NAME`
        from: String,
        /// The pod that is sent to
        to: String,
        /// Namespace of pods that are named without one
        #[arg(short, long, default_value = "default")]
        namespace: String,
        /// Over IPv6, where the pods have both families
        #[arg(short = '6', long)]
        ipv6: bool,
        /// Format
        #[arg(short, long, value_enum)]
        output: Option<Format>,
    },
    /// Show connections that pods open and packets that NetworkPolicies drop, with the policy that decided
    #[command(after_help = "Example: orchctl net flows --follow --verdict dropped")]
    Flows(flows::Filter),
    /// Say whether NetworkPolicies allow a connection, and which of them decides
    #[command(after_help = "Example: orchctl net explain web-0 db-0 5432")]
    Explain {
        /// Who connects: a pod (`NAME` or `NAMESPACE/NAME`) or an address
        from: String,
        /// Who is connected to: the same; for a Service, one of its pods
        to: String,
        /// Destination port: `80`, `53/udp`
        port: explain::Port,
        /// Namespace of pods that are named without one
        #[arg(short, long, default_value = "default")]
        namespace: String,
        /// Format
        #[arg(short, long, value_enum)]
        output: Option<Format>,
    },
}

#[derive(clap::Args, Clone)]
pub(crate) struct Flags {
    #[command(flatten)]
    etcd: EtcdFlags,
    /// Format
    #[arg(short, long, value_enum)]
    output: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For programs
    Json,
}

/// Runs one command; returns the exit code. `client` is called only by what needs the API server.
///
/// # Errors
/// What was asked for cannot be looked at.
pub(crate) async fn run(
    command: Command,
    lab_dir: &Path,
    client: impl FnOnce() -> anyhow::Result<Client>,
) -> anyhow::Result<u8> {
    match command {
        Command::Status(flags) => show_status(&Hosts::find(lab_dir, flags.etcd)?, flags.output),
        Command::Nodes(flags) => show_nodes(&Hosts::find(lab_dir, flags.etcd)?, flags.output),
        Command::Leases(flags) => {
            list_leases(&Hosts::find(lab_dir, flags.etcd)?, flags.output).await.map(|()| 0)
        }
        Command::Config(command) => config::run(command, lab_dir).await,
        Command::Doctor { node, flags } => {
            let hosts = Hosts::find(lab_dir, flags.etcd)?;
            doctor::run(&hosts, node.as_deref(), flags.output).await
        }
        Command::Trace { from, to, namespace, ipv6, output } => {
            let hosts = Hosts::find(lab_dir, EtcdFlags::default())?;
            trace::run(&hosts, &client()?, &from, &to, &namespace, ipv6, output).await
        }
        Command::Flows(filter) => {
            let hosts = Hosts::find(lab_dir, EtcdFlags::default())?;
            flows::run(&hosts, &client()?, &filter).await.map(|()| 0)
        }
        Command::Explain { from, to, port, namespace, output } => {
            let hosts = Hosts::find(lab_dir, EtcdFlags::default())?;
            explain::run(&hosts, &client()?, &from, &to, port, &namespace, output).await
        }
    }
}

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    output::line(&serde_json::to_string_pretty(value)?)
}

/// What the agent of each node wrote; `None` where there is nothing.
fn statuses(hosts: &[Host]) -> Vec<(&Host, Option<NetStatus>)> {
    hosts.iter().map(|host| (host, NetStatus::read(&host.paths.net_status()))).collect()
}

/// 1 as exit code when an agent does not run or reports a problem.
fn show_status(hosts: &Hosts, format: Option<Format>) -> anyhow::Result<u8> {
    let hosts = hosts.all()?;
    let all = statuses(&hosts);
    let well = all.iter().all(|(host, status)| {
        host.agent.is_some()
            && status.as_ref().is_some_and(|status| {
                status.problems.is_empty()
                    && status.policy.problems.is_empty()
                    && status.etcd == "healthy"
            })
    });
    if format == Some(Format::Json) {
        let list: Vec<_> = all
            .iter()
            .map(|(host, status)| json!({"name": host.name, "agentPid": host.agent, "status": status}))
            .collect();
        print_json(&list)?;
        return Ok(u8::from(!well));
    }
    let dash = |text: Option<String>| {
        text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned())
    };
    let rows = all.iter().map(|(host, status)| {
        let status = status.as_ref();
        let device = status.and_then(|status| status.device.as_ref());
        vec![
            host.name.clone(),
            if host.agent.is_some() { "running" } else { "down" }.to_owned(),
            dash(status.map(|status| status.node_ip.clone())),
            dash(status.and_then(|status| status.subnet.clone())),
            dash(device.map(|device| {
                format!(
                    "{} (VNI {}, port {}, MTU {})",
                    device.name, device.vni, device.port, device.mtu
                )
            })),
            dash(device.map(|device| device.vtep_mac.clone())),
            dash(status.map(|status| status.peers.len().to_string())),
            dash(status.map(|status| {
                let (services, by_sockets) = (&status.services, status.connect_time.in_force);
                let stale = if services.in_force { "" } else { " (not in force)" };
                format!("{}{}{stale}", services.ports, if by_sockets { ", eBPF" } else { "" })
            })),
            dash(status.map(|status| status.policy.clone()).map(|policy| {
                match (policy.enforced, policy.mode.as_str()) {
                    (true, _) => format!("{} pods", policy.endpoints),
                    (false, "" | "off") => "off".to_owned(),
                    (false, _) => "not enforced".to_owned(),
                }
            })),
            dash(status.and_then(|status| big_tcp(&status.big_tcp))),
            dash(status.map(|status| status.etcd.clone())),
        ]
    });
    output::table(
        &[
            "NODE", "AGENT", "ADDRESS", "SUBNET", "DEVICE", "VTEP MAC", "PEERS", "SERVICES",
            "POLICY", "BIG TCP", "ETCD",
        ],
        rows,
    )?;
    for (host, status) in &all {
        let problems = status.iter().flat_map(|status| {
            let (fast_path, big_tcp) = (&status.fast_path.problem, &status.big_tcp.problem);
            let others = [fast_path, &status.connect_time.problem, big_tcp];
            let others = others.into_iter().flatten();
            status.problems.iter().chain(&status.policy.problems).chain(others)
        });
        for problem in problems {
            output::line(&format!("- {}: {problem}", host.name))?;
        }
    }
    if !well {
        eprintln!("hint: `orchctl net doctor` says what is wrong and how to mend it");
    }
    Ok(u8::from(!well))
}

/// Size of the largest packets, or why they are not larger than others'.
fn big_tcp(status: &status::BigTcp) -> Option<String> {
    match &status.why {
        _ if status.on => Some(format!("{} KiB", status.size.div_ceil(1024))),
        Some(why) => Some(format!("off: {why}")),
        None => None,
    }
}

fn show_nodes(hosts: &Hosts, format: Option<Format>) -> anyhow::Result<u8> {
    let hosts = hosts.all()?;
    let all = statuses(&hosts);
    let name_of = |address: &str| {
        let node = all
            .iter()
            .find(|(_, status)| status.as_ref().is_some_and(|status| status.node_ip == address));
        node.map_or("-", |(host, _)| host.name.as_str())
    };
    if format == Some(Format::Json) {
        let list: Vec<_> = all
            .iter()
            .map(|(host, status)| {
                let peers =
                    status.as_ref().map(|status| status.peers.as_slice()).unwrap_or_default();
                let peers: Vec<_> = peers
                    .iter()
                    .map(|peer| json!({"name": name_of(&peer.public_ip), "peer": peer}))
                    .collect();
                json!({"name": host.name, "peers": peers})
            })
            .collect();
        print_json(&list)?;
        return Ok(0);
    }
    let rows = all.iter().flat_map(|(host, status)| {
        let peers = status.as_ref().map(|status| status.peers.clone()).unwrap_or_default();
        peers.into_iter().map(|peer| {
            vec![
                host.name.clone(),
                name_of(&peer.public_ip).to_owned(),
                peer.subnet,
                peer.public_ip,
                peer.vtep_mac,
            ]
        })
    });
    output::table(&["NODE", "PEER", "SUBNET", "ADDRESS", "VTEP MAC"], rows)?;
    Ok(0)
}

async fn read_leases(hosts: &Hosts) -> anyhow::Result<leases::Leases> {
    let (urls, pki) = hosts.etcd()?;
    leases::read(&urls, &pki, orch_config::ETCD_NETWORK_PREFIX).await
}

async fn list_leases(hosts: &Hosts, format: Option<Format>) -> anyhow::Result<()> {
    let leases = read_leases(hosts).await?;
    if format == Some(Format::Json) {
        return print_json(&leases);
    }
    let mut networks: Vec<String> = leases.network.iter().map(ToString::to_string).collect();
    networks.extend(leases.network_v6.iter().map(ToString::to_string));
    output::line(&format!(
        "network {}, backend {}, VNI {}, UDP port {}",
        if networks.is_empty() { "-".to_owned() } else { networks.join(" and ") },
        leases.backend,
        leases.vni,
        leases.port
    ))?;
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let rows = leases.leases.iter().map(|lease| {
        let both = |a: Option<String>, b: Option<String>| {
            dash(match (a, b) {
                (Some(a), Some(b)) => Some(format!("{a}, {b}")),
                (a, b) => a.or(b),
            })
        };
        vec![
            both(
                lease.subnet.map(|net| net.to_string()),
                lease.subnet_v6.map(|net| net.to_string()),
            ),
            both(
                lease.public_ip.map(|ip| ip.to_string()),
                lease.public_ip_v6.map(|ip| ip.to_string()),
            ),
            lease.backend.clone().unwrap_or_else(|| "reservation".to_owned()),
            dash(lease.vtep_mac.clone()),
            lease.ttl_secs.map_or_else(|| "for ever".to_owned(), life),
            lease.mod_revision.to_string(),
        ]
    });
    output::table(&["SUBNET", "ADDRESS", "BACKEND", "VTEP MAC", "EXPIRES IN", "REVISION"], rows)
}

/// Seconds for people: `23h59m`.
fn life(secs: i64) -> String {
    match secs {
        ..=0 => "expired".to_owned(),
        1..120 => format!("{secs}s"),
        120..7200 => format!("{}m", secs / 60),
        _ => format!("{}h{:02}m", secs / 3600, secs % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn lifetimes_are_readable() {
        let text = |secs| super::life(secs);
        assert_eq!(
            [text(-1), text(90), text(600), text(86_340)],
            ["expired", "90s", "10m", "23h59m"]
        );
    }
}
