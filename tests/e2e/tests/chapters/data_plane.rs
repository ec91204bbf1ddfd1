//! The data plane changes under running pods: maps of another layout, the short way, no room for new connections.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests_e2e::eventually;
use tests_e2e::flood::{Count, Flood};
use tests_e2e::load::get;
use tests_e2e::stream::Streams;
use tests_e2e::testlab::TestLab;

use super::network::services_and_dns;
use super::overlay::{findings, type_in};
use super::policy::{FRONT, NEIGHBOUR, Shop, egress, ingress, pod_netns};

const SOON: Duration = Duration::from_secs(60);
/// A flood says nothing unless it has so many.
const ENOUGH: u64 = 2000;

/// To the pod `web`, from one that may and one that may not.
struct Floods {
    allowed: Flood,
    denied: Flood,
}

impl Floods {
    fn start(lab: &TestLab, web: &str) -> anyhow::Result<Self> {
        let to = pod_netns(lab, "node-1", "shop/web")?;
        let from = |node, pod| Flood::start(&pod_netns(lab, node, pod)?, &to, web.parse()?);
        Ok(Self { allowed: from("node-2", FRONT)?, denied: from("node-1", NEIGHBOUR)? })
    }

    fn stop(self, what: &str) -> anyhow::Result<()> {
        let (allowed, denied) = (self.allowed.stop()?, self.denied.stop()?);
        eprintln!("{what}: {allowed:?} of what is allowed, {denied:?} of what is not");
        ensure!(allowed.sent > ENOUGH && denied.sent > ENOUGH, "no flood: {allowed:?} {denied:?}");
        ensure!(denied.arrived == 0, "{what}: {denied:?} of what policy forbids");
        ensure!(allowed.arrived == allowed.sent, "{what}: {allowed:?} of what policy allows");
        Ok(())
    }
}

/// The agent of a build whose maps have another layout takes over a node with pods: as if the programs and maps that are
/// there were the former build's. What the policy forbids does not pass at any moment, nothing of what it allows is lost, also if
/// the agent is killed in the middle of it.
pub(super) fn another_layout(lab: &TestLab) -> anyhow::Result<()> {
    let shop = Shop::open(lab)?;
    let web = shop.web.as_str();
    let front = json!({"podSelector": {"matchLabels": {"app": "front"}}});
    shop.policy("web", json!({"podSelector": {}, "ingress": [{"from": [front]}]}))?;
    let wanted = [(FRONT, web, 80, true), (NEIGHBOUR, web, 80, false)];
    shop.expect("one peer", &wanted)?;

    let floods = Floods::start(lab, web)?;
    take_over(lab, None)?;
    floods.stop("another layout")?;
    shop.expect("as before", &wanted)?;
    // How far a take-over has come when the agent is killed.
    for share in [0.1, 0.5, 0.9] {
        let floods = Floods::start(lab, web)?;
        take_over(lab, Some(share))?;
        floods.stop("another layout, and the agent is killed in the middle")?;
    }
    shop.expect("as before", &wanted)?;
    shop.remove_policy("web")?;
    shop.expect("without policies", &[(FRONT, web, 80, true), (NEIGHBOUR, web, 80, true)])?;
    shop.close()
}

/// Makes what node-1 has the former layout's and starts its agent; with `killed`, that one is killed after this share of the
/// time that a take-over needs, and another one goes on.
fn take_over(lab: &TestLab, killed: Option<f64>) -> anyhow::Result<()> {
    const NODE: &str = "node-1";
    let (former, current) = layouts(lab, NODE)?;
    let kill_agent = || kill(Pid::from_raw(lab.pid(NODE)?), Signal::SIGKILL).context("kill");
    kill_agent()?;
    std::fs::rename(&current, &former).context("make it the former one")?;
    let restart = || lab.orchctl(&["lab", "restart", NODE], SOON)?.ok().map(drop);
    restart()?;
    let start = Instant::now();
    while !current.exists() {
        ensure!(start.elapsed() < SOON, "the agent makes no maps of its own layout");
        std::thread::yield_now();
    }
    if let Some(share) = killed {
        // From the first map to the last pod.
        let needed = Duration::from_millis(400);
        std::thread::sleep(needed.mul_f64(share));
        kill_agent()?;
        std::thread::sleep(Duration::from_millis(300));
        restart()?;
    }
    eventually("the former programs are gone", SOON, || {
        ensure!(!former.exists(), "{} is there", former.display());
        Ok(())
    })
}

/// Folders of the pins: one that another layout would have, and the one in use.
fn layouts(lab: &TestLab, node: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
    let folder = lab.dir.join(node).join("sys/fs/bpf/orch");
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok()) {
            return Ok((folder.join("v0"), path));
        }
    }
    bail!("no maps in {}", folder.display())
}

/// The kernel of node-1 can remember no more connections. What is known goes on, what is new is dropped and counted, what a
/// policy forbids does not pass, and the doctor names the command that makes room.
pub(super) fn conntrack_full(lab: &TestLab) -> anyhow::Result<()> {
    let shop = Shop::open(lab)?;
    let outcome = fill_conntrack(lab, &shop);
    let removed = shop.remove_policy("web");
    outcome.and(removed)?;
    shop.close()
}

fn fill_conntrack(lab: &TestLab, shop: &Shop<'_>) -> anyhow::Result<()> {
    let web = shop.web.as_str();
    let front = json!({"podSelector": {"matchLabels": {"app": "front"}}});
    shop.policy("web", json!({"podSelector": {}, "ingress": [{"from": [front]}]}))?;
    shop.expect("one peer", &[(FRONT, web, 80, true), (NEIGHBOUR, web, 80, false)])?;
    let to = pod_netns(lab, "node-1", "shop/web")?;
    let known = Streams::start(&pod_netns(lab, "node-2", FRONT)?, &to, web.parse()?)?;

    let full = FullTable::of(lab, "node-1")?;
    shop.expect("no new connection", &[(FRONT, web, 80, false)])?;
    let denied = Flood::start(&pod_netns(lab, "node-1", NEIGHBOUR)?, &to, web.parse()?)?;
    let found = findings(lab)?;
    let denied = denied.stop()?;
    ensure!(denied.sent > 0 && denied.arrived == 0, "{denied:?} of what policy forbids");
    let finding = found.iter().find(|one| one["check"] == "conntrack" && one["node"] == "node-1");
    let finding = finding.with_context(|| format!("the doctor does not say it: {found:#?}"))?;
    let problem = finding["problem"].as_str().unwrap_or_default();
    ensure!(!problem.contains("(0 packets"), "what was dropped is not counted: {problem}");
    type_in(lab, finding["fix"].as_str().context("a command")?)?;
    shop.expect("there is room", &[(FRONT, web, 80, true)])?;
    let report = known.stop()?;
    ensure!(report.tcp_gap < Duration::from_secs(2), "a known connection stood still: {report:?}");
    ensure!(report.udp_gap < Duration::from_secs(2), "a known flow stood still: {report:?}");
    drop(full);
    Ok(())
}

/// As many connections as the kernel takes, until it is dropped. The limit is one for all namespaces, so it is lowered to
/// more than the others have.
struct FullTable<'a> {
    lab: &'a TestLab,
    node: &'static str,
    former_limit: String,
}

impl<'a> FullTable<'a> {
    const LIMIT: &'static str = "/proc/sys/net/netfilter/nf_conntrack_max";
    const FLOWS: u32 = 4000;

    fn of(lab: &'a TestLab, node: &'static str) -> anyhow::Result<Self> {
        // Of two strangers; the kernel makes no room by forgetting those that were answered.
        let flow = "-A -t 600 -u SEEN_REPLY,ASSURED -s 198.18.0.1 -d 198.18.0.2 -r 198.18.0.2 -q 198.18.0.1 -p udp";
        let lines: String = (1..=Self::FLOWS)
            .map(|port| {
                format!(
                    "{flow} --sport {port} --dport 9 --reply-port-src 9 --reply-port-dst {port}\n"
                )
            })
            .collect();
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(lines.as_bytes())?;
        let former_limit = std::fs::read_to_string(Self::LIMIT).context(Self::LIMIT)?;
        let this = Self { lab, node, former_limit };
        let name = file.path().to_str().context("a name")?;
        lab.on(node, &["conntrack", "-R", name])?;
        std::fs::write(Self::LIMIT, Self::FLOWS.to_string()).context(Self::LIMIT)?;
        Ok(this)
    }
}

impl Drop for FullTable<'_> {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(Self::LIMIT, &self.former_limit) {
            eprintln!("{} is still low: {error}", Self::LIMIT);
        }
        let _ = self.lab.on(self.node, &["conntrack", "-D", "-s", "198.18.0.1"]);
    }
}

/// Policies, Services and names are the same with the fast path, which really carries what goes from node to node.
pub(super) fn fast_path(lab: &TestLab) -> anyhow::Result<()> {
    let shop = Shop::open(lab)?;
    let set = |to| {
        let words = ["net", "config", "set", "--fast-path", to, "--wait", "30"];
        lab.orchctl(&words, SOON)?.ok().map(drop)
    };
    let outcome = (|| {
        set("off")?;
        let (sent, by_device) = flood_between_nodes(&shop)?;
        ensure!(by_device >= sent, "of {sent} packets only {by_device} took the VXLAN device");
        set("on")?;
        let (sent, by_device) = flood_between_nodes(&shop)?;
        ensure!(by_device < sent / 4, "of {sent} packets {by_device} took the long way");
        let (web, service) = (shop.web.as_str(), shop.service.as_str());
        ingress(&shop, web, service)?;
        egress(&shop, web, service)?;
        services_and_dns(lab)?;
        for node in ["node-1", "node-2", "node-3"] {
            get(lab.node(node, 30080)?, "/").with_context(|| format!("the NodePort of {node}"))?;
        }
        // Switched off under traffic.
        let streams = Streams::start(
            &pod_netns(lab, "node-2", FRONT)?,
            &pod_netns(lab, "node-1", "shop/web")?,
            web.parse()?,
        )?;
        set("off")?;
        let report = streams.stop()?;
        ensure!(report.tcp_gap < Duration::from_secs(2), "a connection stood still: {report:?}");
        let (sent, by_device) = flood_between_nodes(&shop)?;
        ensure!(by_device >= sent, "of {sent} packets only {by_device} took the VXLAN device");
        shop.close()
    })();
    // The next chapter's lab is as it comes.
    outcome.and(set("auto"))
}

/// Datagrams from node-2 to node-1, all of which arrive: how many there were, and how many of them the VXLAN device sent.
fn flood_between_nodes(shop: &Shop<'_>) -> anyhow::Result<(u64, u64)> {
    let by_device = || -> anyhow::Result<u64> {
        let text =
            shop.lab.on("node-2", &["ip", "-j", "-s", "link", "show", "dev", "vxlan-orch"])?;
        let links: Value = serde_json::from_str(&text).context("ip -j")?;
        links[0]["stats64"]["tx"]["packets"].as_u64().with_context(|| format!("no number: {text}"))
    };
    let to = pod_netns(shop.lab, "node-1", "shop/web")?;
    let before = by_device()?;
    let from = pod_netns(shop.lab, "node-2", FRONT)?;
    let flood = Flood::start(&from, &to, shop.web.parse()?)?;
    std::thread::sleep(Duration::from_secs(3));
    let Count { sent, arrived } = flood.stop()?;
    ensure!(sent > ENOUGH && arrived == sent, "{arrived} of {sent} arrived");
    Ok((sent, by_device()? - before))
}
