//! Plugins that are killed: whatever they leave, one GC removes it, and nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use tests_conformance::{Bed, Result, borrowed, with_result};
use tests_netns::{Pod, address, connect, gateway};

use super::{Row, rows};

pub(crate) const ROWS: &[Row] = rows![
    random_kills_leave_nothing_that_one_gc_does_not_remove,
    a_kill_at_every_system_call_of_add_is_undone_by_del,
    a_kill_at_every_system_call_of_add_is_undone_by_gc,
    a_kill_at_every_system_call_of_del_is_finished_by_del,
];

/// How many calls the random test makes; the long run has 500.
const ROUNDS: &str = "CNI_FAULT_ROUNDS";
const DEFAULT_ROUNDS: u32 = 120;
/// Repeats a run: the seed that a failure names.
const SEED: &str = "CNI_FAULT_SEED";
/// Kills come within this time after the start: longer than an ADD takes, so some are not killed.
const KILL_WITHIN: Duration = Duration::from_millis(12);
/// With everything that leaves something on the host.
const KEYS: fn() -> Value = || json!({"ipMasq": true, "macspoofchk": true});

fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// A container that lives, with the result of its ADD.
type Alive = (Pod, Value);

/// `bridge` and what podman's list has behind it.
fn chain(t: &Bed, pod: Option<&Pod>) -> Vec<Value> {
    let number =
        pod.and_then(|pod| pod.id.strip_prefix("pod")?.parse::<u16>().ok()).unwrap_or_default();
    let behind = [
        json!({"type": "portmap", "runtimeConfig": {"portMappings": [
            {"hostPort": 20_000 + number, "containerPort": 80, "protocol": "tcp"},
        ]}}),
        json!({"type": "firewall", "ingressPolicy": "same-bridge"}),
        json!({
            "type": "tuning", "mtu": 1400, "sysctl": {"net.core.somaxconn": "499"},
            "dataDir": t.state.path().join("tuning"),
        }),
    ];
    let bridge = t.conf_with(KEYS());
    let behind = behind.map(|mut conf| {
        conf["cniVersion"] = bridge["cniVersion"].clone();
        conf["name"] = bridge["name"].clone();
        conf
    });
    std::iter::once(bridge).chain(behind).collect()
}

/// One verb for all plugins of the chain, one of which may be killed. `None` if it was, else the last document.
fn maybe_killed(
    t: &Bed,
    random: &mut StdRng,
    variables: &[(&str, &str)],
    chain: &[Value],
) -> Result<Option<Value>> {
    let adds = variables.contains(&("CNI_COMMAND", "ADD"));
    let victim = random.random_bool(0.6).then(|| random.random_range(0..chain.len()));
    let mut document = Value::Null;
    for (at, conf) in chain.iter().enumerate() {
        let mut conf = conf.clone();
        if adds && at > 0 {
            conf["prevResult"] = document;
        }
        let plugin = conf["type"].as_str().context("type")?;
        let mut child = t.start(plugin, variables, &conf)?;
        if victim == Some(at) {
            thread::sleep(random.random_range(Duration::ZERO..KILL_WITHIN));
            child.kill()?;
        }
        let output = child.wait_with_output()?;
        if output.status.code().is_none() {
            return Ok(None);
        }
        document = match output.stdout.as_slice() {
            [] => Value::Null,
            text => serde_json::from_slice(text)?,
        };
        ensure!(output.status.success(), "{plugin} {variables:?}: {document}");
    }
    Ok(Some(document))
}

fn random_kills_leave_nothing_that_one_gc_does_not_remove(t: &Bed) -> Result {
    let seed = number(SEED).unwrap_or_else(rand::random);
    let rounds = number(ROUNDS).unwrap_or(DEFAULT_ROUNDS);
    let mut random = StdRng::seed_from_u64(seed);
    random_kills(t, &mut random, rounds)
        .with_context(|| format!("{SEED}={seed} {ROUNDS}={rounds} repeats the choices"))
}

fn random_kills(t: &Bed, random: &mut StdRng, rounds: u32) -> Result {
    let mut alive: Vec<Alive> = Vec::new();
    // Containers that the runtime has given up; some keep their namespace, and so their link.
    let mut lost: Vec<Pod> = Vec::new();
    let mut killed = 0;
    for round in 0..rounds {
        let step = || format!("round {round}");
        match random.random_range(0..10) {
            0..6 => {
                let pod = t.pod()?;
                let variables = t.variables("ADD", &pod);
                let chain = chain(t, Some(&pod));
                match maybe_killed(t, random, &borrowed(&variables), &chain).with_context(step)? {
                    Some(result) => alive.push((pod, result)),
                    None => {
                        killed += 1;
                        lost.push(pod);
                    }
                }
            }
            6..9 if !alive.is_empty() => {
                let at = random.random_range(0..alive.len());
                let (pod, result) = alive.swap_remove(at);
                let mut chain = chain(t, Some(&pod));
                chain.reverse();
                if random.random_bool(0.5) {
                    chain = chain.iter().map(|conf| with_result(conf, &result)).collect();
                }
                let variables = t.variables("DEL", &pod);
                let done =
                    maybe_killed(t, random, &borrowed(&variables), &chain).with_context(step)?;
                killed += u32::from(done.is_none());
                lost.push(pod);
            }
            _ => {
                let mut chain = chain(t, None);
                for conf in &mut chain {
                    conf["cni.dev/valid-attachments"] = valid(&alive);
                }
                let variables = [("CNI_COMMAND", "GC")];
                let done = maybe_killed(t, random, &variables, &chain).with_context(step)?;
                killed += u32::from(done.is_none());
            }
        }
        if lost.len() > 5 {
            lost.swap_remove(random.random_range(0..lost.len()));
        }
    }
    ensure!(killed > rounds / 8, "only {killed} of {rounds} were killed");

    gc(t, &alive)?;
    let once = Host::observe(t)?;
    once.has_only(&alive)?;
    gc(t, &alive)?;
    let twice = Host::observe(t)?;
    ensure!(once == twice, "a second GC changed\n{once:?} to\n{twice:?}");
    for (pod, result) in &alive {
        for conf in chain(t, Some(pod)) {
            t.attachment("CHECK", pod, &with_result(&conf, result))?.success()?;
        }
        connect(&pod.netns, &t.host, gateway(result)?)?;
        connect(&t.host, &pod.netns, address(result, 0)?)?;
    }
    alive.clear();
    gc(t, &alive)?;
    let host = Host::observe(t)?;
    let tables = ["cni_portmap", "cni_firewall"].map(|table| host.rules.contains(table));
    ensure!(tables == [false; 2], "with the last container its rules go: {}", host.rules);
    host.has_only(&alive)
}

fn valid(alive: &[Alive]) -> Value {
    alive.iter().map(|(pod, _)| json!({"containerID": pod.id, "ifname": "eth0"})).collect()
}

fn gc(t: &Bed, alive: &[Alive]) -> Result {
    for mut conf in chain(t, None) {
        conf["cni.dev/valid-attachments"] = valid(alive);
        t.call(conf["type"].as_str().context("type")?, "GC", &[], &conf)?.success()?;
    }
    Ok(())
}

/// All that plugins leave on a host.
#[derive(Debug, PartialEq, Eq)]
struct Host {
    veths: Vec<String>,
    leases: BTreeSet<String>,
    rules: String,
    /// Paths with the text of each file.
    files: Vec<(String, String)>,
}

impl Host {
    fn observe(t: &Bed) -> Result<Self> {
        let mut files = Vec::new();
        read_files(t.state.path(), &mut files)?;
        files.sort();
        Ok(Self {
            veths: t.veths()?.into_iter().map(|link| link.name).collect(),
            leases: t.leases()?.iter().map(ToString::to_string).collect(),
            rules: t.nft("list ruleset")?,
            files,
        })
    }

    /// Addresses, links, rules and files are those of these containers.
    fn has_only(&self, alive: &[Alive]) -> Result {
        let want: BTreeSet<String> = alive
            .iter()
            .map(|(_, result)| Ok(address(result, 0)?.to_string()))
            .collect::<Result<_>>()?;
        ensure!(self.leases == want, "leases {:?} instead of {want:?}", self.leases);
        ensure!(self.veths.len() == alive.len(), "{} veths for {}", self.veths.len(), alive.len());
        let chains = self.rules.matches("ether saddr").count();
        ensure!(chains == alive.len(), "{chains} spoof checks for {}: {}", alive.len(), self.rules);
        // Those of portmap are about what has come by a mapped port, wherever it goes.
        let masquerade = |line: &&str| line.contains("masquerade") && line.contains("daddr");
        let masquerades = self.rules.lines().filter(masquerade).count();
        ensure!(masquerades == usize::from(!alive.is_empty()), "masquerade: {}", self.rules);
        // Whatever a plugin writes down about a container has its ID.
        let ids: BTreeSet<&str> = alive.iter().map(|(pod, _)| pod.id.as_str()).collect();
        let rules = ("nftables".to_owned(), self.rules.clone());
        for (path, text) in self.files.iter().chain([&rules]) {
            for word in [path, text].iter().flat_map(|text| {
                text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| is_pod(w))
            }) {
                ensure!(ids.contains(word), "{path} is about {word}, which is gone: {text}");
            }
        }
        Ok(())
    }
}

fn is_pod(word: &str) -> bool {
    word.strip_prefix("pod").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

fn read_files(folder: &Path, files: &mut Vec<(String, String)>) -> Result {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            read_files(&path, files)?;
        } else {
            let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
            files.push((path.display().to_string(), text));
        }
    }
    Ok(())
}

fn has_strace() -> bool {
    let there = Command::new("strace").arg("-V").output().is_ok();
    if !there {
        eprintln!("skipped: strace is not installed");
    }
    there
}

/// Kinds of system calls that change something, or wait for who does.
const KILL_AT: &str = "trace=sendto,sendmsg,write,openat,mkdir,link,linkat,unlink,unlinkat,rename,renameat,renameat2,setns,flock,fsync,clone,clone3,vfork";

/// Runs a call under strace, which kills it when it enters the n-th system call that changes something. `false` if it
/// has fewer than that.
fn killed_at(t: &Bed, at: u32, command: &str, pod: &Pod, conf: &Value) -> Result<bool> {
    let inject = KILL_AT.replacen("trace=", "inject=", 1) + &format!(":signal=KILL:when={at}");
    let observer = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", KILL_AT, "-e", &inject];
    let stdin = conf.to_string();
    let variables = t.variables(command, pod);
    let reply = t.raw_under(&observer, "bridge", &borrowed(&variables), stdin.as_bytes())?;
    Ok(!reply.ok)
}

/// For every system call of a kind that changes something: attach, be killed there, clear up, compare.
fn kill_sweep(
    t: &Bed,
    command: &str,
    prepare: impl Fn(&Pod, &Value) -> Result,
    clear: impl Fn(&Pod, &Value) -> Result,
) -> Result {
    if !has_strace() {
        return Ok(());
    }
    let conf = t.conf_with(KEYS());
    let first = t.pod()?;
    let result = t.add(&first, &conf)?;
    let alive = [(first, result)];
    let mut kills = 0;
    for at in 1.. {
        let pod = t.pod()?;
        prepare(&pod, &conf)?;
        let killed = killed_at(t, at, command, &pod, &conf)?;
        clear(&pod, &conf).with_context(|| format!("{command} killed at call {at}"))?;
        ensure!(pod.eth0()?.is_none(), "{command} killed at call {at}: eth0 is left");
        Host::observe(t)?
            .has_only(&alive)
            .with_context(|| format!("{command} killed at call {at}"))?;
        if !killed {
            break;
        }
        kills += 1;
    }
    ensure!(kills > 10, "only {kills} calls");
    let (pod, result) = &alive[0];
    t.attachment("CHECK", pod, &with_result(&conf, result))?.success().map(drop)
}

fn a_kill_at_every_system_call_of_add_is_undone_by_del(t: &Bed) -> Result {
    kill_sweep(t, "ADD", |_, _| Ok(()), |pod, conf| t.del(pod, conf))
}

fn a_kill_at_every_system_call_of_add_is_undone_by_gc(t: &Bed) -> Result {
    // The first pod of this host is the one that lives.
    let gc = |_: &Pod, conf: &Value| -> Result {
        let mut conf = conf.clone();
        conf["cni.dev/valid-attachments"] = json!([{"containerID": "pod0", "ifname": "eth0"}]);
        t.call("bridge", "GC", &[], &conf)?.success().map(drop)
    };
    kill_sweep(t, "ADD", |_, _| Ok(()), gc)
}

fn a_kill_at_every_system_call_of_del_is_finished_by_del(t: &Bed) -> Result {
    kill_sweep(t, "DEL", |pod, conf| t.add(pod, conf).map(drop), |pod, conf| t.del(pod, conf))
}
