//! Checks before a host becomes part of a cluster: what is missing, and what to do about it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use serde::Serialize;

use super::config::Config;
use super::host::{self, Host, Part};
use crate::image;

/// Least free space for images, logs and etcd.
const DISK_NEEDED_BYTES: u64 = 1 << 30;
const DISK_WANTED_BYTES: u64 = 5 << 30;
/// Memory below which a control plane is short of breath.
const MEMORY_WANTED_KB: u64 = 1_000_000;
/// Oldest kernel that the overlay and nftables are tested on.
const KERNEL: (u32, u32) = (5, 10);
/// Oldest Docker API.
const ENGINE_API: (u32, u32) = (1, 41);

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    Ok,
    Warning,
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) check: &'static str,
    pub(crate) level: Level,
    pub(crate) detail: String,
    /// What mends it; empty when nothing needs mending.
    pub(crate) remedy: String,
}

impl Finding {
    pub(crate) fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, detail: detail.into(), remedy: String::new() }
    }

    pub(crate) fn warning(
        check: &'static str,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { check, level: Level::Warning, detail: detail.into(), remedy: remedy.into() }
    }

    pub(crate) fn error(
        check: &'static str,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { check, level: Level::Error, detail: detail.into(), remedy: remedy.into() }
    }
}

/// All checks for what `config` makes of this host.
pub(crate) async fn run(host: &Host, config: &Config) -> Vec<Finding> {
    let mut findings = vec![root(), kernel(), programs(config)];
    findings.extend(kernel_features());
    findings.push(address(config));
    findings.push(networks(config));
    findings.extend(ports(host, config));
    if config.node.agent {
        findings.extend(engine(config).await);
        findings.push(cgroups());
        findings.push(swap());
    }
    findings.push(disk(host));
    findings.push(memory(config));
    findings.push(clock());
    findings
}

fn root() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::ok("user", "root")
    } else {
        Finding::error("user", "not root", "run orchctl as root: sudo orchctl …")
    }
}

/// `MAJOR.MINOR` at the start of a text.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|byte: char| !byte.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel() -> Finding {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    match version(&release) {
        Some(found) if found >= KERNEL => Finding::ok("kernel", release),
        _ => Finding::error(
            "kernel",
            release,
            format!("use Linux {}.{} or newer", KERNEL.0, KERNEL.1),
        ),
    }
}

fn programs(config: &Config) -> Finding {
    let mut needed = vec![("nft", "nftables", "rules for Services")];
    if config.is_control_plane() {
        needed.push(("etcd", "etcd-server", "the state of the cluster"));
    }
    let missing: Vec<&(&str, &str, &str)> =
        needed.iter().filter(|(name, _, _)| !host::on_path(name)).collect();
    if missing.is_empty() {
        let names: Vec<&str> = needed.iter().map(|(name, _, _)| *name).collect();
        return Finding::ok("programs", names.join(", "));
    }
    let names: Vec<String> =
        missing.iter().map(|(name, _, what)| format!("{name} ({what})")).collect();
    let packages: Vec<&str> = missing.iter().map(|(_, package, _)| *package).collect();
    Finding::error(
        "programs",
        format!("missing: {}", names.join(", ")),
        format!("apt-get install {}", packages.join(" ")),
    )
}

/// Makes one of each thing that the network agent makes, in a network namespace that goes with its thread.
fn kernel_features() -> Vec<Finding> {
    let trial = std::thread::spawn(|| -> Result<Vec<Finding>, String> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| format!("unshare: {error}"))?;
        let run = |program: &str, args: &[&str]| -> Result<(), String> {
            let out = Command::new(program)
                .args(args)
                .env("PATH", crate::lab::programs::search_path())
                .output()
                .map_err(|error| format!("{program}: {error}"))?;
            if out.status.success() {
                return Ok(());
            }
            Err(String::from_utf8_lossy(&out.stderr).trim().to_owned())
        };
        let link = |what: &'static str, args: &[&str]| match run("ip", args) {
            Ok(()) => Finding::ok(what, "the kernel has it"),
            Err(why) => Finding::error(
                what,
                why,
                format!("modprobe {what}; install iproute2 and a kernel with this driver"),
            ),
        };
        let mut findings = vec![
            link(
                "vxlan",
                &[
                    "link",
                    "add",
                    "orch-try0",
                    "type",
                    "vxlan",
                    "id",
                    "1",
                    "dstport",
                    "8472",
                    "local",
                    "127.0.0.1",
                ],
            ),
            link("bridge", &["link", "add", "orch-try1", "type", "bridge"]),
            link(
                "veth",
                &["link", "add", "orch-try2", "type", "veth", "peer", "name", "orch-try3"],
            ),
        ];
        let rules = "add table ip orch-try; \
                     add chain ip orch-try a { type nat hook prerouting priority -100; }; \
                     add rule ip orch-try a ct state new meta mark set 1; \
                     add chain ip orch-try b { type nat hook postrouting priority 100; }; \
                     add rule ip orch-try b masquerade";
        findings.push(match run("nft", &[rules]) {
            Ok(()) => Finding::ok("nftables", "NAT and conntrack work"),
            Err(why) => Finding::error(
                "nftables",
                why.lines().next().unwrap_or_default(),
                "apt-get install nftables; modprobe nf_tables nft_chain_nat nf_conntrack",
            ),
        });
        Ok(findings)
    });
    match trial.join() {
        Ok(Ok(findings)) => findings,
        Ok(Err(why)) => vec![Finding::error(
            "namespaces",
            why,
            "orch needs network namespaces: run as root, on a kernel with CONFIG_NET_NS",
        )],
        Err(_) => vec![Finding::error("namespaces", "the check broke off", "run orchctl again")],
    }
}

fn address(config: &Config) -> Finding {
    let Ok(address) = config.address() else {
        return Finding::error("address", "none", "name one with --address");
    };
    if UdpSocket::bind((address, 0)).is_ok() {
        Finding::ok("address", address.to_string())
    } else {
        Finding::error(
            "address",
            format!("{address} is not an address of this host"),
            "name one of `ip -brief address` with --address",
        )
    }
}

/// No network of this host may be one that pods or Services are going to have.
fn networks(config: &Config) -> Finding {
    let Ok(addresses) = nix::ifaddrs::getifaddrs() else {
        return Finding::warning("networks", "the host's addresses cannot be read", "");
    };
    let addresses: Vec<_> = addresses.collect();
    for (what, cidr) in [("pod", orch_config::POD_CIDR), ("Service", orch_config::SERVICE_CIDR)] {
        let Ok(cidr) = cidr.parse::<ipnetwork::Ipv4Network>() else { continue };
        for interface in &addresses {
            let Some(ip) = interface
                .address
                .as_ref()
                .and_then(|address| address.as_sockaddr_in().map(nix::sys::socket::SockaddrIn::ip))
            else {
                continue;
            };
            let ours = [orch_config::POD_BRIDGE, orch_config::VXLAN_DEVICE]
                .contains(&interface.interface_name.as_str())
                || ip == orch_config::DNS_IP;
            if cidr.contains(ip) && !ours && Some(ip) != config.node.address {
                return Finding::error(
                    "networks",
                    format!("{ip} on {} is in the {what} network {cidr}", interface.interface_name),
                    "give that link another network: pods and Services would hide it",
                );
            }
        }
    }
    if config.node.address.is_some_and(|ip| {
        [orch_config::POD_CIDR, orch_config::SERVICE_CIDR]
            .iter()
            .filter_map(|cidr| cidr.parse::<ipnetwork::Ipv4Network>().ok())
            .any(|cidr| cidr.contains(ip))
    }) {
        return Finding::error(
            "networks",
            "the host's own address is in the pod or Service network",
            "use an underlay outside of 10.244.0.0/16 and 10.96.0.0/12",
        );
    }
    Finding::ok("networks", "no overlap with pods and Services")
}

fn ports(host: &Host, config: &Config) -> Vec<Finding> {
    let mut wanted = Vec::new();
    // What runs already has its ports.
    if config.is_control_plane() && host.pid(Part::Server, config).is_none() {
        wanted.push((config.control_plane.port, "API server"));
        if orch_store::managed::pid(&host.paths.etcd_data()).is_none() {
            wanted.push((orch_config::ETCD_CLIENT_PORT, "etcd"));
            wanted.push((orch_config::ETCD_PEER_PORT, "etcd peers"));
        }
    }
    let agent_runs = host.pid(Part::Agent, config).is_some();
    if config.node.agent && !agent_runs {
        wanted.push((orch_config::KUBELET_PORT, "kubelet API"));
    }
    let taken: Vec<String> = wanted
        .iter()
        .filter(|(port, _)| !is_free(*port))
        .map(|(port, what)| format!("{port} ({what})"))
        .collect();
    let mut findings = vec![if taken.is_empty() {
        let ports: Vec<String> = wanted.iter().map(|(port, _)| port.to_string()).collect();
        let free = if ports.is_empty() { "ours".to_owned() } else { ports.join(", ") };
        Finding::ok("ports", free)
    } else {
        Finding::error(
            "ports",
            format!("taken: {}", taken.join(", ")),
            "see who has them with `ss -lntp`; end that program, or choose another --port for the API",
        )
    }];
    if config.node.agent
        && !agent_runs
        && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, orch_config::VXLAN_PORT)).is_err()
        && !Path::new("/sys/class/net").join(orch_config::VXLAN_DEVICE).exists()
    {
        findings.push(Finding::error(
            "vxlan port",
            format!("UDP {} is taken", orch_config::VXLAN_PORT),
            "another overlay (flannel, docker swarm) uses it: remove it first",
        ));
    }
    findings
}

fn is_free(port: u16) -> bool {
    // The listener sets SO_REUSEADDR: connections that linger are no owners.
    TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).is_ok()
}

async fn engine(config: &Config) -> Vec<Finding> {
    let socket = config.engine.socket.as_path();
    let docker = match image::connect(socket).await {
        Ok(docker) => docker,
        Err(error) => {
            return vec![Finding::error(
                "engine",
                format!("{error:#}").lines().next().unwrap_or_default(),
                "apt-get install docker.io && systemctl start docker, or name the socket with --engine",
            )];
        }
    };
    let (info, about) = match (docker.info().await, docker.version().await) {
        (Ok(info), Ok(about)) => (info, about),
        (Err(error), _) | (_, Err(error)) => {
            return vec![Finding::error("engine", error.to_string(), "see the engine's log")];
        }
    };
    let api = about.api_version.unwrap_or_default();
    let name = format!(
        "Docker {} (API {api}), {} driver",
        info.server_version.clone().unwrap_or_default(),
        info.driver.clone().unwrap_or_default()
    );
    let mut findings = vec![match version(&api) {
        Some(found) if found >= ENGINE_API => Finding::ok("engine", name),
        _ => Finding::error("engine", name, "install Docker Engine 20.10 or newer"),
    }];
    findings.push(if info.live_restore_enabled == Some(true) {
        Finding::ok("live-restore", "pods survive a restart of the engine")
    } else {
        Finding::warning(
            "live-restore",
            "off: a restart of the engine ends all pods",
            r#"put {"live-restore": true} into /etc/docker/daemon.json and reload: systemctl reload docker"#,
        )
    });
    findings
}

fn cgroups() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Finding::ok("cgroups", "v2");
    }
    let missing: Vec<&str> = ["cpu", "memory", "pids"]
        .into_iter()
        .filter(|name| !Path::new("/sys/fs/cgroup").join(name).exists())
        .collect();
    if missing.is_empty() {
        Finding::ok("cgroups", "v1")
    } else {
        Finding::error(
            "cgroups",
            format!("controllers not mounted: {}", missing.join(", ")),
            "mount cgroup2 on /sys/fs/cgroup, or boot with cgroup_enable=memory",
        )
    }
}

fn swap() -> Finding {
    let text = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    if text.lines().count() <= 1 {
        return Finding::ok("swap", "off");
    }
    Finding::warning(
        "swap",
        "on: memory limits of pods are not what they say",
        "swapoff -a, and remove swap from /etc/fstab",
    )
}

fn disk(host: &Host) -> Finding {
    let folder = host.paths.lib();
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let Ok(stat) = nix::sys::statvfs::statvfs(existing) else {
        return Finding::warning("disk", format!("{} cannot be asked", existing.display()), "");
    };
    // Types of these numbers differ between architectures.
    #[expect(clippy::useless_conversion, reason = "c_ulong is not u64 everywhere")]
    let free = u64::from(stat.blocks_available()) * u64::from(stat.fragment_size());
    let detail = format!("{:.1} GB free below {}", free as f64 / 1e9, folder.display());
    let remedy = "make room: images, logs and etcd live there";
    match free {
        DISK_WANTED_BYTES.. => Finding::ok("disk", detail),
        DISK_NEEDED_BYTES.. => Finding::warning("disk", detail, remedy),
        _ => Finding::error("disk", detail, remedy),
    }
}

fn memory(config: &Config) -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok())
        .unwrap_or(0);
    let detail = format!("{} MB", total / 1000);
    if total >= MEMORY_WANTED_KB || !config.is_control_plane() {
        Finding::ok("memory", detail)
    } else {
        Finding::warning("memory", detail, "give a control plane 1 GB or more")
    }
}

/// Whether somebody keeps the clock right: certificates and leases need it.
fn clock() -> Finding {
    // SAFETY: `timex` is plain numbers, for which zero is a value; adjtimex(2) with modes 0 only reads.
    let state = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        if libc::adjtimex(&mut timex) < 0 { None } else { Some(timex.status) }
    };
    match state {
        Some(status) if status & libc::STA_UNSYNC == 0 => Finding::ok("clock", "synchronised"),
        Some(_) => Finding::warning(
            "clock",
            "no time service keeps it right",
            "apt-get install systemd-timesyncd or chrony",
        ),
        None => Finding::warning("clock", "its state cannot be read", ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_start_of_a_text() {
        assert_eq!(version("6.18.0-1-amd64"), Some((6, 18)));
        assert_eq!(version("1.41"), Some((1, 41)));
        assert!(version("1.9") < version("1.41"));
        assert_eq!(version("linux"), None);
    }

    #[test]
    fn a_taken_port_is_named_with_its_use() {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a port");
        let mut config = Config::default();
        config.node.agent = false;
        config.control_plane.port = listener.local_addr().expect("bound").port();
        let root = tempfile::tempdir().expect("a folder");
        let found = ports(&Host::new(root.path()).expect("host"), &config);
        assert_eq!(found[0].level, Level::Error);
        assert!(found[0].detail.contains("(API server)"), "{}", found[0].detail);
    }

    #[test]
    fn an_address_of_another_host_is_refused() {
        let mut config = Config::default();
        config.node.address = Some(Ipv4Addr::LOCALHOST);
        assert_eq!(address(&config).level, Level::Ok);
        config.node.address = Some(Ipv4Addr::new(192, 0, 2, 7));
        assert_eq!(address(&config).level, Level::Error);
    }
}
