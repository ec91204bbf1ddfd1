//! The overlay under faults: it explains them, heals them, and carries streams through them.

use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use cni_netlink::{NetNs, Netlink};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests_e2e::stream::Streams;
use tests_e2e::testlab::{Pod, TestLab};
use tests_e2e::{eventually, shell};

use super::nodeinfo;

const SOON: Duration = Duration::from_secs(60);
/// Issue 4: after a fault, streams go on within this time.
const STREAM_GAP: Duration = Duration::from_secs(5);
/// How long etcd is away for the agents. `ORCH_CHAOS_ETCD_SECS=120` tests what the issue names.
const ETCD_AWAY_SECS: u64 = 10;
/// The node that suffers.
const NODE: &str = "node-2";
const DEVICE: &str = "vxlan-orch";
const SUBNETS: &str = "/coreos.com/network/subnets/";

/// The doctor's findings: (node, check, problem, fix).
pub(super) fn findings(lab: &TestLab) -> anyhow::Result<Vec<Value>> {
    let output = lab.orchctl(&["net", "doctor", "-o", "json"], SOON)?;
    let text = output.text();
    let document: Value =
        serde_json::from_str(&text).with_context(|| format!("{text}\n{}", output.stderr))?;
    let list = document["findings"].as_array().cloned().context("findings")?;
    ensure!(
        output.status.success() == list.is_empty(),
        "exit code {} with {list:#?}",
        output.status
    );
    Ok(list)
}

fn well(lab: &TestLab) -> anyhow::Result<()> {
    let found = findings(lab)?;
    ensure!(found.is_empty(), "{found:#?}");
    Ok(())
}

fn etcdctl(lab: &TestLab, words: &[&str]) -> anyhow::Result<String> {
    let all = super::network::etcdctl_words(lab)?;
    let mut all: Vec<&str> = all.iter().map(String::as_str).collect();
    all.extend(words);
    lab.on("server", &all)
}

/// Key of a node's lease, and its value.
fn lease(lab: &TestLab, node: &str) -> anyhow::Result<(String, Value)> {
    let address = lab.node(node, 0)?.ip().to_string();
    let listed = etcdctl(lab, &["get", "--prefix", SUBNETS])?;
    let lines: Vec<&str> = listed.lines().collect();
    for pair in lines.chunks(2) {
        let [key, value] = pair else { continue };
        let value: Value = serde_json::from_str(value)?;
        if value["PublicIP"] == address.as_str() {
            return Ok(((*key).to_owned(), value));
        }
    }
    bail!("{node} has no lease:\n{listed}")
}

/// Subnet of a node as CIDR.
fn subnet(lab: &TestLab, node: &str) -> anyhow::Result<String> {
    let (key, _) = lease(lab, node)?;
    Ok(key.trim_start_matches(SUBNETS).replace('-', "/"))
}

/// Runs a command of the doctor as a person would type it.
pub(super) fn type_in(lab: &TestLab, line: &str) -> anyhow::Result<()> {
    let mut command = Command::new("sh");
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", lab.programs().display())).args(["-c", line]);
    shell::run(&mut command, b"", SOON)?.ok().map(drop)
}

/// Holds an agent still, so that it does not mend what a test breaks.
struct Frozen(Pid);

impl Frozen {
    fn new(lab: &TestLab, node: &str) -> anyhow::Result<Self> {
        let pid = Pid::from_raw(lab.pid(node)?);
        kill(pid, Signal::SIGSTOP).context("stop the agent")?;
        Ok(Self(pid))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// One fault.
struct Fault {
    name: &'static str,
    check: &'static str,
    /// Host on which it is made.
    on: &'static str,
    /// Command that breaks it.
    harm: String,
    /// Command that undoes it where the doctor knows no command.
    undo: &'static str,
}

pub(super) fn doctor(lab: &TestLab) -> anyhow::Result<()> {
    nodeinfo(lab, 3, SOON)?;
    eventually("a healthy lab has no findings", SOON, || well(lab))?;
    let other = subnet(lab, "node-1")?;
    let (_, value) = lease(lab, "node-1")?;
    let mac = value["BackendData"]["VtepMAC"].as_str().context("a MAC")?.to_owned();
    let (base, _) = other.split_once('/').context("a CIDR")?;
    let half = format!("{base}/25");
    let fault = |name, check, harm: String| Fault { name, check, on: NODE, harm, undo: "" };
    let faults = [
        fault("an MTU that does not fit", "mtu", format!("ip link set {DEVICE} mtu 1400")),
        fault("a missing route", "route", format!("ip route delete {other}")),
        fault("a foreign route", "route", format!("ip route add {half} dev lo")),
        fault(
            "a stale neighbour",
            "neighbour",
            format!("ip neighbour replace {base} lladdr 02:00:00:00:00:99 dev {DEVICE} nud permanent"),
        ),
        fault(
            "a stale forwarding entry",
            "fdb",
            format!("bridge fdb replace {mac} dev {DEVICE} dst 192.0.2.99 self permanent"),
        ),
        fault("forwarding off", "ip-forward", "sysctl -qw net.ipv4.ip_forward=0".to_owned()),
        fault(
            "a strict rp_filter",
            "rp-filter",
            "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1".to_owned(),
        ),
        fault(
            "a firewall that forwards nothing",
            "firewall",
            "nft add table ip stranger; nft add chain ip stranger forward '{ type filter hook forward priority 0; policy drop; }'"
                .to_owned(),
        ),
        fault(
            "a firewall that takes no VXLAN",
            "firewall",
            "nft add table inet stranger; nft add chain inet stranger in '{ type filter hook input priority 0; }'; nft add rule inet stranger in udp dport 8472 drop"
                .to_owned(),
        ),
        // Between the nodes, where no node's rules show it: only packets do.
        Fault {
            name: "UDP 8472 blocked on the way",
            check: "unreachable",
            on: "underlay",
            harm: "nft add table bridge stranger; nft add chain bridge stranger f '{ type filter hook forward priority 0; }'; nft add rule bridge stranger f udp dport 8472 drop"
                .to_owned(),
            undo: "nft delete table bridge stranger",
        },
        fault("a device that is down", "device", format!("ip link set {DEVICE} down")),
        fault("a missing device", "device", format!("ip link delete {DEVICE}")),
        fault(
            "a device on the wrong port",
            "device",
            format!(
                "ip link delete {DEVICE}; ip link add {DEVICE} type vxlan id 1 dstport 4789 local {} dev eth0 nolearning && ip link set {DEVICE} up",
                lab.node(NODE, 0)?.ip()
            ),
        ),
    ];
    for fault in &faults {
        suffer(lab, fault).with_context(|| fault.name)?;
    }
    checksum_offload(lab).context("checksum offload switched off")?;
    doubled_subnet(lab, &half).context("a doubled subnet")?;
    lost_lease(lab).context("a lost lease")?;
    dead_agent(lab).context("a dead agent")
}

/// Makes a fault, has it found on the right node, mends it with the command that the doctor names.
fn suffer(lab: &TestLab, fault: &Fault) -> anyhow::Result<()> {
    let frozen = Frozen::new(lab, NODE)?;
    lab.on(fault.on, &["sh", "-c", &fault.harm])?;
    let found = findings(lab);
    if !fault.undo.is_empty() {
        lab.on(fault.on, &["sh", "-c", fault.undo])?;
    }
    let found = found?;
    let this = found
        .iter()
        .find(|one| one["check"] == fault.check && (one["node"] == NODE || fault.on != NODE))
        .with_context(|| format!("not found; instead: {found:#?}"))?;
    if fault.undo.is_empty() {
        type_in(lab, this["fix"].as_str().context("a command")?)?;
        let still = findings(lab)?;
        ensure!(
            !still.iter().any(|one| one["problem"] == this["problem"]),
            "`{}` did not mend it: {still:#?}",
            this["fix"]
        );
    }
    drop(frozen);
    let _ = lab.on(
        NODE,
        &["sh", "-c", "nft delete table ip stranger; nft delete table inet stranger; true"],
    );
    eventually("the lab is well again", SOON, || well(lab))
}

/// ethtool is not on every machine, so this is its ioctl.
fn checksum_offload(lab: &TestLab) -> anyhow::Result<()> {
    #[repr(C)]
    struct EthtoolValue {
        cmd: u32,
        data: u32,
    }
    const ETHTOOL_SET_TX_CHECKSUM: u32 = 0x17;
    let set = |on: bool| {
        NetNs::open(lab.netns(NODE))?.run(|| -> anyhow::Result<()> {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            let mut value = EthtoolValue { cmd: ETHTOOL_SET_TX_CHECKSUM, data: on.into() };
            // SAFETY: all-zero bytes are a valid `ifreq`, which is plain data.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_data = (&raw mut value).cast();
            // SAFETY: the request points to `value`, which outlives the call and is a `struct ethtool_value`.
            let done =
                unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
            ensure!(done == 0, "{}", std::io::Error::last_os_error());
            Ok(())
        })
    };
    set(false)?;
    let found = findings(lab);
    set(true)?;
    let found = found?;
    ensure!(
        found.iter().any(|one| one["check"] == "checksum-offload" && one["node"] == NODE),
        "{found:#?}"
    );
    eventually("the lab is well again", SOON, || well(lab))
}

fn doubled_subnet(lab: &TestLab, half: &str) -> anyhow::Result<()> {
    let key = format!("{SUBNETS}{}", half.replace('/', "-"));
    etcdctl(lab, &["put", &key, r#"{"PublicIP":"192.0.2.9","PublicIPv6":null}"#])?;
    let found = findings(lab);
    etcdctl(lab, &["del", &key])?;
    let found = found?;
    let this = found.iter().find(|one| one["check"] == "duplicate-subnet");
    let this = this.with_context(|| format!("not found; instead: {found:#?}"))?;
    ensure!(this["fix"].as_str().is_some_and(|fix| fix.contains(&key)), "{this:#}");
    eventually("the lab is well again", SOON, || well(lab))
}

/// Deleted while the agent cannot see it; when it can, it gets the same subnet again.
fn lost_lease(lab: &TestLab) -> anyhow::Result<()> {
    let (key, before) = lease(lab, NODE)?;
    let frozen = Frozen::new(lab, NODE)?;
    etcdctl(lab, &["del", &key])?;
    let found = findings(lab)?;
    ensure!(found.iter().any(|one| one["check"] == "lease" && one["node"] == NODE), "{found:#?}");
    drop(frozen);
    eventually("the node has its subnet again", SOON, || {
        let (again, after) = lease(lab, NODE)?;
        ensure!(again == key && after == before, "{again}: {after}");
        well(lab)
    })
}

fn dead_agent(lab: &TestLab) -> anyhow::Result<()> {
    lab.orchctl(&["lab", "kill", NODE, "--agent-only"], SOON)?.ok()?;
    let found = findings(lab);
    let fix = found.as_ref().ok().and_then(|found| {
        let this = found.iter().find(|one| one["check"] == "agent" && one["node"] == NODE)?;
        this["fix"].as_str().map(str::to_owned)
    });
    match fix {
        Some(fix) => type_in(lab, &fix)?,
        None => {
            lab.orchctl(&["lab", "restart", NODE], SOON)?.ok()?;
            bail!("a dead agent is not found: {found:#?}");
        }
    }
    eventually("the lab is well again", SOON, || well(lab))
}

/// Follows a packet on one node and between two, and says where one is lost.
pub(super) fn trace(lab: &TestLab) -> anyhow::Result<()> {
    let (from, to) = across(lab)?;
    let trace = |from: &str, to: &str| -> anyhow::Result<Value> {
        let output = lab.orchctl(&["net", "trace", from, to, "-o", "json"], SOON)?;
        serde_json::from_str(&output.text()).with_context(|| output.stderr)
    };
    let whole = trace(&from.name, &to.name)?;
    ensure!(whole["lost"].is_null() && whole["answered"] == 3, "{whole:#}");
    let links: Vec<&str> = whole["hops"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|hop| hop["link"].as_str())
        .collect();
    ensure!(links.len() == 10 && links[0] == "eth0" && links[2] == "cni0", "{links:?}");
    for hop in whole["hops"].as_array().into_iter().flatten() {
        ensure!(hop["seen"] == json!({"requests": 3, "replies": 3}), "{hop:#}");
    }
    // Lost between the nodes.
    let block = "nft add table bridge stranger; nft add chain bridge stranger f '{ type filter hook forward priority 0; }'; nft add rule bridge stranger f udp dport 8472 drop";
    lab.on("underlay", &["sh", "-c", block])?;
    let broken = trace(&from.name, &to.name);
    lab.on("underlay", &["nft", "delete", "table", "bridge", "stranger"])?;
    let broken = broken?;
    let lost = broken["lost"].as_str().context("lost")?;
    let expected =
        format!("the request was lost between eth0 of {} and eth0 of {}", from.node, to.node);
    ensure!(lost.starts_with(&expected), "{lost}");

    // On one node.
    lab.ok(&["scale", "deployment/nodeinfo", "--replicas=6"])?;
    let pods = nodeinfo(lab, 6, SOON)?;
    let pair = pods
        .iter()
        .find_map(|a| pods.iter().find(|b| a.name != b.name && a.node == b.node).map(|b| (a, b)));
    let (a, b) = pair.context("two pods of one node among six on three nodes")?;
    let local = trace(&a.name, &b.name)?;
    ensure!(local["lost"].is_null() && local["answered"] == 3, "{local:#}");
    ensure!(local["hops"].as_array().map(Vec::len) == Some(5), "{local:#}");
    lab.ok(&["scale", "deployment/nodeinfo", "--replicas=3"])?;
    nodeinfo(lab, 3, SOON).map(drop)
}

/// A pod that is not on [`NODE`] and one that is.
fn across(lab: &TestLab) -> anyhow::Result<(Pod, Pod)> {
    let pods = nodeinfo(lab, 3, SOON)?;
    let there = pods.iter().find(|pod| pod.node == NODE).context("a pod on node-2")?;
    let here = pods.iter().find(|pod| pod.node != NODE).context("a pod elsewhere")?;
    Ok((here.clone(), there.clone()))
}

/// The pinned namespace of a pod: the one that has its address.
fn pod_netns(lab: &TestLab, pod: &Pod) -> anyhow::Result<PathBuf> {
    let folder = lab.dir.join(&pod.node).join("run/orch/netns");
    for entry in std::fs::read_dir(&folder)?.flatten().filter(|entry| NetNs::is_nsfs(entry.path()))
    {
        let netlink = Netlink::open_in(&NetNs::open(entry.path())?)?;
        for link in netlink.links()? {
            let addresses = netlink.addresses(link.index)?;
            if addresses.iter().any(|address| address.ip().to_string() == pod.ip) {
                return Ok(entry.path());
            }
        }
    }
    bail!("no namespace of {} has {}", pod.node, pod.ip)
}

/// What was put below `subnets/` since a revision, in order: (key, public IP), or `None` for a delete.
fn history(lab: &TestLab, revision: i64) -> anyhow::Result<Vec<(String, Option<String>)>> {
    let mut all = super::network::etcdctl_words(lab)?;
    all.splice(0..0, ["timeout".to_owned(), "2".to_owned()]);
    let mut words: Vec<&str> = all.iter().map(String::as_str).collect();
    let revision = revision.to_string();
    words.extend(["watch", "--prefix", SUBNETS, "--rev", &revision]);
    let mut args = vec!["lab", "exec", "server", "--"];
    args.extend(words);
    // `timeout` ends it, which is no failure.
    let text = lab.orchctl(&args, SOON)?.text();
    let mut events = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        match line {
            "PUT" => {
                let key = lines.next().context("a key")?.to_owned();
                let value: Value = serde_json::from_str(lines.next().context("a value")?)?;
                events.push((key, value["PublicIP"].as_str().map(str::to_owned)));
            }
            "DELETE" => {
                events.push((lines.next().context("a key")?.to_owned(), None));
                lines.next();
            }
            _ => {}
        }
    }
    Ok(events)
}

fn revision(lab: &TestLab) -> anyhow::Result<i64> {
    let answer: Value = serde_json::from_str(&etcdctl(lab, &["get", "/", "-w", "json"])?)?;
    answer["header"]["revision"].as_i64().context("a revision")
}

/// No subnet changes hands without being free in between.
fn held_once(events: &[(String, Option<String>)]) -> anyhow::Result<()> {
    let mut holders = std::collections::BTreeMap::new();
    for (key, holder) in events {
        match holder {
            None => drop(holders.remove(key)),
            Some(holder) => {
                let before = holders.insert(key, holder);
                if let Some(before) = before.filter(|before| *before != holder) {
                    bail!("{key} went from {before} to {holder}: {events:#?}");
                }
            }
        }
    }
    Ok(())
}

/// Streams between pods of two nodes go on through everything that can happen to the overlay, and the kernel's state
/// is as it must be afterwards.
pub(super) fn chaos(lab: &TestLab) -> anyhow::Result<()> {
    let (from, to) = across(lab)?;
    let (other, own) = (subnet(lab, &from.node)?, subnet(lab, NODE)?);
    let (_, value) = lease(lab, &from.node)?;
    let mac = value["BackendData"]["VtepMAC"].as_str().context("a MAC")?.to_owned();
    let vtep = lab.node(&from.node, 0)?.ip().to_string();
    let base = other.split('/').next().unwrap_or_default().to_owned();
    let mut since = revision(lab)?;
    let on_node = |line: &str| lab.on(NODE, &["sh", "-c", line]).map(drop);
    type Step<'a> = (&'a str, Box<dyn Fn() -> anyhow::Result<()> + 'a>);
    let steps: Vec<Step<'_>> = vec![
        ("our route is deleted", Box::new(|| on_node(&format!("ip route delete {other}")))),
        (
            "our neighbour is deleted",
            Box::new(|| on_node(&format!("ip neighbour delete {base} dev {DEVICE}"))),
        ),
        (
            "our forwarding entry is deleted",
            Box::new(|| on_node(&format!("bridge fdb delete {mac} dev {DEVICE} dst {vtep} self"))),
        ),
        ("our device is deleted", Box::new(|| on_node(&format!("ip link delete {DEVICE}")))),
        ("our device goes down", Box::new(|| on_node(&format!("ip link set {DEVICE} down")))),
        (
            "our device goes down and up",
            Box::new(|| on_node(&format!("ip link set {DEVICE} down; ip link set {DEVICE} up"))),
        ),
        (
            "the underlay goes down and up",
            Box::new(|| on_node("ip link set eth0 down; ip link set eth0 up")),
        ),
        (
            "the agent is killed",
            Box::new(|| {
                kill(Pid::from_raw(lab.pid(NODE)?), Signal::SIGKILL)?;
                lab.orchctl(&["lab", "restart", NODE], SOON)?.ok().map(drop)
            }),
        ),
        (
            "etcd is away for the agents",
            Box::new(|| {
                // For them alone: what the rest of the cluster does without etcd is another chapter.
                let block = "nft add table ip stranger; nft add chain ip stranger in '{ type filter hook input priority 0; }'; nft add rule ip stranger in iifname eth0 tcp dport 2379 drop";
                lab.on("server", &["sh", "-c", block])?;
                let secs = std::env::var("ORCH_CHAOS_ETCD_SECS").ok();
                let secs = secs.and_then(|text| text.parse().ok()).unwrap_or(ETCD_AWAY_SECS);
                std::thread::sleep(Duration::from_secs(secs));
                lab.on("server", &["nft", "delete", "table", "ip", "stranger"]).map(drop)
            }),
        ),
        (
            "etcd is compacted under the watch",
            Box::new(|| {
                let frozen = Frozen::new(lab, NODE)?;
                // Something that the agent misses; of the one subnet that no node gets.
                let key = format!("{SUBNETS}10.244.0.0-24");
                etcdctl(lab, &["put", &key, r#"{"PublicIP":"192.0.2.9","PublicIPv6":null}"#])?;
                etcdctl(lab, &["del", &key])?;
                let now = revision(lab)?.to_string();
                etcdctl(lab, &["compact", &now])?;
                drop(frozen);
                Ok(())
            }),
        ),
        (
            "the lease ends while the agent is stopped",
            Box::new(|| {
                let frozen = Frozen::new(lab, NODE)?;
                let (key, _) = lease(lab, NODE)?;
                let held = etcdctl(lab, &["get", &key, "-w", "json"])?;
                let held: Value = serde_json::from_str(&held)?;
                let id = held["kvs"][0]["lease"].as_i64().context("an etcd lease")?;
                etcdctl(lab, &["lease", "revoke", &format!("{id:x}")])?;
                drop(frozen);
                eventually("the node has its subnet again", SOON, || {
                    ensure!(subnet(lab, NODE)? == own, "another subnet");
                    Ok(())
                })
            }),
        ),
    ];
    for (name, step) in &steps {
        let streams = Streams::start(
            &pod_netns(lab, &from)?,
            &pod_netns(lab, &to)?,
            to.ip.parse().context("an address")?,
        )?;
        let outcome =
            step().and_then(|()| eventually("the kernel holds what it must", SOON, || well(lab)));
        // Long enough for the streams to show that they go on.
        std::thread::sleep(Duration::from_secs(1));
        let report = streams.stop().with_context(|| (*name).to_owned())?;
        outcome.with_context(|| (*name).to_owned())?;
        eprintln!(
            "    {name}: longest gap of TCP {:?}, of UDP {:?}",
            report.tcp_gap, report.udp_gap
        );
        ensure!(
            report.tcp_gap < STREAM_GAP && report.udp_gap < STREAM_GAP,
            "{name}: the streams stood still: {report:?}"
        );
        if !name.contains("compacted") {
            held_once(&history(lab, since)?)?;
        }
        since = revision(lab)?;
    }
    changed_mtu(lab)
}

/// The overlay follows the MTU of the underlay, down and up.
fn changed_mtu(lab: &TestLab) -> anyhow::Result<()> {
    for (underlay, overlay) in [("1400", "mtu 1350"), ("1500", "mtu 1450")] {
        lab.on(NODE, &["ip", "link", "set", "eth0", "mtu", underlay])?;
        eventually("the overlay follows", SOON, || {
            let link = lab.on(NODE, &["ip", "-o", "link", "show", DEVICE])?;
            ensure!(link.contains(overlay), "{link}");
            let env = lab.dir.join(NODE).join("run/orch/subnet.env");
            let env = std::fs::read_to_string(env)?;
            ensure!(env.contains(&overlay.replace("mtu ", "FLANNEL_MTU=")), "{env}");
            Ok(())
        })?;
    }
    eventually("the lab is well again", SOON, || well(lab))
}
