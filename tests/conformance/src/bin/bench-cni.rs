//! `make bench-cni`: our plugins, the reference's and a bare-netlink floor, by turns in one run.
//!
//! `bench-cni [ROUNDS]`. Ours are those of `$ORCH_BIN`, the reference's those of `$CNI_REFERENCE` (Debian's folder
//! without it). Both are timed from the start of the process to its end, the floor in this process: it is what the
//! kernel takes for the same objects. A machine has neighbours, so look at ratios, and at minima.

#![allow(clippy::print_stdout, reason = "the table is what this program is for")]

use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use cni_netlink::{AddressOptions, Bridge, Netlink, Route, VethPair};
use serde_json::{Value, json};
use tests_netns::{Pod, Testbed};

const REFERENCE: &str = "CNI_REFERENCE";
const DEBIANS: &str = "/usr/lib/cni";
const DEFAULT_ROUNDS: usize = 12;
/// Pods that are on the bridge already.
const CROWDS: [usize; 3] = [0, 50, 200];
const PARALLEL: usize = 30;
const PARALLEL_ROUNDS: usize = 3;

fn main() -> Result<()> {
    let rounds = match std::env::args().nth(1) {
        Some(text) => text.parse().with_context(|| format!("rounds: {text:?} is not a number"))?,
        None => DEFAULT_ROUNDS,
    };
    ensure!(rounds > 0, "rounds: at least 1");
    let folder = std::env::var_os(REFERENCE).map_or(DEBIANS.into(), PathBuf::from);
    let reference = folder.join("bridge").exists().then_some(folder);
    match &reference {
        Some(folder) => println!("reference: {}", folder.display()),
        None => println!(
            "no reference plugins: install containernetworking-plugins, or set {REFERENCE}"
        ),
    }
    println!("{rounds} rounds by turns; milliseconds, median (minimum)\n");
    println!(
        "{:28} {:>15} {:>17} {:>13} {:>6}  goal",
        "", "ours", "reference", "bare netlink", "ratio"
    );
    for masquerade in [false, true] {
        sequential(reference.as_deref(), masquerade, rounds)?;
    }
    parallel(reference.as_deref())?;
    println!();
    footprint(reference.as_deref())
}

/// Host, plugins and configuration of one of those that are compared.
struct Subject {
    host: Testbed,
    conf: Value,
    /// Who was there before the rounds.
    crowd: Vec<Pod>,
}

impl Subject {
    fn new(plugins: Option<&Path>, masquerade: bool) -> Result<Self> {
        let host = match plugins {
            Some(folder) => Testbed::with_plugins(folder)?,
            None => Testbed::new()?,
        };
        let mut conf = host.conf(&["10.88.0.0/16"]);
        // The newest version that both speak.
        conf["cniVersion"] = json!("1.0.0");
        conf["ipMasq"] = json!(masquerade);
        Ok(Self { host, conf, crowd: Vec::new() })
    }

    fn crowd(&mut self, size: usize) -> Result<()> {
        while self.crowd.len() < size {
            let pod = self.host.pod()?;
            self.call("ADD", &pod)?;
            self.crowd.push(pod);
        }
        Ok(())
    }

    fn start(&self, command: &str, pod: &Pod) -> Result<Child> {
        start(&self.host, &[], command, pod, &self.conf)
    }

    /// How long a call takes, start and end of its process included, and nothing else of this program: the thread is in
    /// the host already when the clock starts.
    fn call(&self, command: &str, pod: &Pod) -> Result<Duration> {
        let netns = pod.path();
        let stdin = self.conf.to_string();
        let mut call = Command::new(self.host.plugins.join("bridge"));
        call.env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", &netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.host.plugins)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let (took, output) = self.host.host.run(|| -> Result<_> {
            let begun = Instant::now();
            let mut child = call.spawn().context("run the plugin")?;
            let _ = child.stdin.take().context("stdin")?.write_all(stdin.as_bytes());
            let output = child.wait_with_output()?;
            Ok((begun.elapsed(), output))
        })?;
        succeeded(command, &output)?;
        Ok(took)
    }
}

fn start(
    host: &Testbed,
    observer: &[&str],
    command: &str,
    pod: &Pod,
    conf: &Value,
) -> Result<Child> {
    let netns = pod.path();
    let variables = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", pod.id.as_str()),
        ("CNI_NETNS", &netns),
        ("CNI_IFNAME", "eth0"),
    ];
    host.start_under(observer, "bridge", &variables, conf)
}

fn succeeded(command: &str, output: &Output) -> Result<()> {
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{command}: {text}");
    Ok(())
}

/// The same objects by netlink alone: pair, address, route; and the pair's end.
struct Floor {
    host: Testbed,
    bridge: u32,
    next: u32,
    crowd: Vec<Pod>,
}

impl Floor {
    fn new() -> Result<Self> {
        let host = Testbed::new()?;
        let made = Bridge { name: "cni0".into(), up: true, ..Bridge::default() };
        let bridge = host.netlink.create_bridge(&made)?.index;
        let gateway = "10.88.0.1/16".parse()?;
        host.netlink.add_address(bridge, gateway, &AddressOptions::default())?;
        Ok(Self { host, bridge, next: 1, crowd: Vec::new() })
    }

    fn crowd(&mut self, size: usize) -> Result<()> {
        while self.crowd.len() < size {
            let pod = self.host.pod()?;
            self.add(&pod)?;
            self.crowd.push(pod);
        }
        Ok(())
    }

    fn add(&mut self, pod: &Pod) -> Result<(Duration, u32)> {
        self.next += 1;
        let [.., high, low] = self.next.to_be_bytes();
        let address = format!("10.88.{high}.{low}/16").parse()?;
        let begun = Instant::now();
        let link = self.host.netlink.create_veth(&VethPair {
            name: format!("veth{}", self.next),
            peer_name: "eth0".to_owned(),
            peer_netns: Some(pod.netns.as_fd()),
            master: Some(self.bridge),
            up: true,
            ..VethPair::default()
        })?;
        let inside = Netlink::open_in(&pod.netns)?;
        let eth0 = inside.link("eth0")?.context("eth0")?.index;
        inside.set_up(eth0)?;
        inside.add_address(eth0, address, &AddressOptions::default())?;
        let via = Some("10.88.0.1".parse()?);
        inside.add_route(&Route { via, link: Some(eth0), ..Route::default() })?;
        Ok((begun.elapsed(), link.index))
    }

    fn del(&self, link: u32) -> Result<Duration> {
        let begun = Instant::now();
        self.host.netlink.delete_link(link)?;
        Ok(begun.elapsed())
    }
}

/// Times of one kind of call.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort();
        sorted.get(sorted.len() / 2).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
    }

    fn min(&self) -> f64 {
        self.0.iter().min().map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
    }

    fn text(&self) -> String {
        if self.0.is_empty() {
            return "-".to_owned();
        }
        format!("{:.1} ({:.1})", self.median(), self.min())
    }
}

fn row(name: &str, [ours, reference, floor]: [&Times; 3], goal: Option<f64>) {
    let ratio = ours.median() / reference.median();
    let ratio_text = if ratio.is_nan() { "-".to_owned() } else { format!("{ratio:.2}") };
    let bound = floor.median() / reference.median();
    let goal = match goal {
        Some(goal) if ratio.is_nan() => format!("{goal:.2}"),
        Some(goal) if ratio <= goal => format!("{goal:.2} met"),
        Some(goal) if bound > goal => format!("{goal:.2} missed; bare netlink: {bound:.2}"),
        Some(goal) => format!("{goal:.2} missed"),
        None => String::new(),
    };
    println!(
        "{name:28} {:>15} {:>17} {:>13} {ratio_text:>6}  {goal}",
        ours.text(),
        reference.text(),
        floor.text()
    );
}

/// ADD and DEL one after the other beside more and more pods.
fn sequential(reference: Option<&Path>, masquerade: bool, rounds: usize) -> Result<()> {
    let mut ours = Subject::new(None, masquerade)?;
    let mut theirs = reference.map(|folder| Subject::new(Some(folder), masquerade)).transpose()?;
    let mut floor = Floor::new()?;
    for size in CROWDS {
        ours.crowd(size)?;
        theirs.as_mut().map_or(Ok(()), |theirs| theirs.crowd(size))?;
        floor.crowd(size)?;
        let [mut add, mut del] = [(); 2].map(|()| <[Times; 3]>::default());
        // The first round makes bridges, folders and rules, and counts for none.
        for round in 0..=rounds {
            let pods = [ours.host.pod()?, floor.host.pod()?];
            let mut add_once = [Some(ours.call("ADD", &pods[0])?), None, None];
            let mut del_once = [Some(ours.call("DEL", &pods[0])?), None, None];
            if let Some(theirs) = &theirs {
                let pod = theirs.host.pod()?;
                add_once[1] = Some(theirs.call("ADD", &pod)?);
                del_once[1] = Some(theirs.call("DEL", &pod)?);
            }
            let (took, link) = floor.add(&pods[1])?;
            add_once[2] = Some(took);
            del_once[2] = Some(floor.del(link)?);
            if round > 0 {
                for (times, once) in [(&mut add, add_once), (&mut del, del_once)] {
                    times.iter_mut().zip(once).for_each(|(times, once)| times.0.extend(once));
                }
            }
        }
        let masq = if masquerade { ", ipMasq" } else { "" };
        let [a, b, c] = &add;
        row(
            &format!("ADD, {size} pods{masq}"),
            [a, b, c],
            Some(if masquerade { 0.17 } else { 0.33 }),
        );
        let [a, b, c] = &del;
        row(&format!("DEL, {size} pods{masq}"), [a, b, c], Some(0.67));
    }
    Ok(())
}

/// Many ADDs at once on a bridge that is not there yet: time until the last one has answered.
fn parallel(reference: Option<&Path>) -> Result<()> {
    let [mut ours, mut theirs] = [(); 2].map(|()| Times::default());
    for _ in 0..PARALLEL_ROUNDS {
        ours.0.push(at_once(&Subject::new(None, false)?)?);
        if let Some(folder) = reference {
            theirs.0.push(at_once(&Subject::new(Some(folder), false)?)?);
        }
    }
    row(&format!("{PARALLEL} ADDs at once, in all"), [&ours, &theirs, &Times::default()], None);
    Ok(())
}

fn at_once(subject: &Subject) -> Result<Duration> {
    let pods: Vec<Pod> = (0..PARALLEL).map(|_| subject.host.pod()).collect::<Result<_>>()?;
    let begun = Instant::now();
    let children: Vec<Child> =
        pods.iter().map(|pod| subject.start("ADD", pod)).collect::<Result<_>>()?;
    for child in children {
        succeeded("ADD", &child.wait_with_output()?)?;
    }
    Ok(begun.elapsed())
}

/// Memory, system calls and size: numbers that no neighbour changes.
fn footprint(reference: Option<&Path>) -> Result<()> {
    let ours = Subject::new(None, false)?;
    let theirs = reference.map(|folder| Subject::new(Some(folder), false)).transpose()?;
    let both = |of: &dyn Fn(&Subject) -> Result<String>| -> Result<(String, String)> {
        Ok((of(&ours)?, theirs.as_ref().map_or(Ok("-".to_owned()), of)?))
    };
    println!("{:42} {:>10} {:>12}  goal", "", "ours", "reference");
    let line = |name: &str, (ours, theirs): (String, String), goal: &str| {
        println!("{name:42} {ours:>10} {theirs:>12}  {goal}");
    };
    line("peak RSS of ADD, KiB (process of bridge)", both(&peak_rss)?, "8192");
    line("system calls of ADD (all processes)", both(&system_calls)?, "150");
    line("bytes of bridge, host-local and loopback", both(&size)?, "6291456 for all plugins");
    Ok(())
}

/// Highest of several calls. The kernel keeps the mark while the process lives, so it is looked at until the end.
fn peak_rss(subject: &Subject) -> Result<String> {
    let mut peak = 0;
    for _ in 0..5 {
        let pod = subject.host.pod()?;
        let child = subject.start("ADD", &pod)?;
        let status = format!("/proc/{}/status", child.id());
        let program = subject.host.plugins.join("bridge");
        loop {
            let text = fs::read_to_string(&status).unwrap_or_default();
            let mark = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let Some(mark) = mark else { break };
            let kib: u64 = mark.trim().trim_end_matches(" kB").trim().parse().unwrap_or(0);
            // Between fork and exec the mark is ours.
            let is_plugin = fs::read_link(format!("/proc/{}/exe", child.id()))
                .is_ok_and(|exe| same_file(&exe, &program));
            if is_plugin {
                peak = peak.max(kib);
            }
        }
        succeeded("ADD", &child.wait_with_output()?)?;
        subject.call("DEL", &pod)?;
    }
    Ok(peak.to_string())
}

fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    a == b || identity(a).is_some_and(|one| identity(b) == Some(one))
}

fn system_calls(subject: &Subject) -> Result<String> {
    let strace = Command::new("strace").arg("-V").stdout(Stdio::null()).status();
    if !strace.is_ok_and(|status| status.success()) {
        return Ok("no strace".to_owned());
    }
    let log = subject.host.state.path().join("strace");
    let path = log.to_str().context("path")?;
    let pod = subject.host.pod()?;
    let observer = ["strace", "-f", "-qq", "-e", "signal=none", "-o", path];
    let child = start(&subject.host, &observer, "ADD", &pod, &subject.conf)?;
    succeeded("ADD", &child.wait_with_output()?)?;
    // A call that another thread interrupts has a second line.
    let text = fs::read_to_string(&log)?;
    let calls = text.lines().filter(|line| !line.contains("resumed>")).count();
    Ok(calls.to_string())
}

fn size(subject: &Subject) -> Result<String> {
    use std::os::unix::fs::MetadataExt as _;
    let mut files = std::collections::BTreeMap::new();
    for name in ["bridge", "host-local", "loopback"] {
        let meta = fs::metadata(subject.host.plugins.join(name))?;
        // Ours are one file under several names.
        files.insert((meta.dev(), meta.ino()), meta.len());
    }
    Ok(files.values().sum::<u64>().to_string())
}
