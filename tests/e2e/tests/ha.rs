//! Three control planes, of which any one may go: killed, cut off, or standing still. Under a writer that counts what was
//! acknowledged and two clients of a Service, in one lab whose chapters follow each other.

#[path = "ha/disaster.rs"]
mod disaster;
#[path = "ha/writer.rs"]
mod writer;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use libtest_mimic::{Arguments, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests_e2e::eventually;
use tests_e2e::load::Load;
use tests_e2e::testlab::TestLab;

use crate::writer::Writer;

const SERVERS: [&str; 3] = ["server", "server-2", "server-3"];
const SOON: Duration = Duration::from_secs(60);
/// Issue 6: the API answers again within this time.
const API_BACK: Duration = Duration::from_secs(10);
const LEASES: [&str; 2] = ["kube-controller-manager", "kube-scheduler"];

type Chapter = (&'static str, fn(&TestLab) -> anyhow::Result<()>);

const CHAPTERS: &[Chapter] = &[
    ("three_control_planes_are_members_and_endpoints", all_are_there),
    ("the_leader_of_etcd_may_be_killed", leader_killed),
    ("each_control_plane_may_be_killed_in_turn", each_killed),
    ("the_leader_of_etcd_may_be_cut_off", leader_cut_off),
    ("a_leader_that_stood_still_does_not_act_when_it_goes_on", leader_paused),
    ("all_control_planes_come_back_from_a_snapshot_under_running_pods", disaster::all_state_lost),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    if arguments.list {
        libtest_mimic::run(&arguments, trials(None)).exit();
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!(
            "error: this test needs root: it starts a lab of network namespaces and containers"
        );
        return ExitCode::FAILURE;
    }
    let lab = match TestLab::up_with_peers() {
        Ok(lab) => Box::leak(Box::new(lab)),
        Err(error) => {
            eprintln!("error: the lab does not come up: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = libtest_mimic::run(&arguments, trials(Some(lab)));
    if outcome.has_failed() {
        eprintln!("{}", lab.logs());
    }
    if std::env::var_os("ORCH_E2E_KEEP").is_some() {
        eprintln!("the lab stays up in {}", lab.dir.display());
        return outcome.exit_code();
    }
    if let Err(error) = lab.down() {
        eprintln!("error: the lab left something behind: {error:#}");
        return ExitCode::FAILURE;
    }
    outcome.exit_code()
}

fn trials(lab: Option<&'static TestLab>) -> Vec<Trial> {
    let trial = |(name, run): &Chapter| {
        let run = *run;
        Trial::test(*name, move || match lab {
            Some(lab) => run(lab).map_err(|error| format!("{error:#}").into()),
            None => Ok(()),
        })
    };
    CHAPTERS.iter().map(trial).collect()
}

fn addresses(lab: &TestLab) -> anyhow::Result<Vec<String>> {
    let slice = lab.json(&["endpointslice", "kubernetes"])?;
    let endpoints = slice["endpoints"].as_array().cloned().unwrap_or_default();
    let address = |one: &serde_json::Value| one["addresses"][0].as_str().map(str::to_owned);
    Ok(endpoints.iter().filter_map(address).collect())
}

/// `default/kubernetes` names so many servers.
fn servers(lab: &TestLab, count: usize) -> anyhow::Result<()> {
    eventually(&format!("default/kubernetes names {count} servers"), SOON, || {
        let found = addresses(lab)?;
        ensure!(found.len() == count, "{found:?}");
        Ok(())
    })
}

/// State of etcd's members as `orchctl etcd status` at one of the servers shows it: name and state.
fn members(lab: &TestLab, at: &str) -> anyhow::Result<Vec<(String, String)>> {
    let root = lab.dir.join(at).to_string_lossy().into_owned();
    let url = etcd_url(lab, at)?;
    let out = lab.orchctl(&["etcd", "status", "--root", &root, "--endpoints", &url], SOON)?;
    // Its exit code is 1 while a member is down.
    let table = out.text();
    let rows = table.lines().skip(1).filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    });
    Ok(rows.collect())
}

fn etcd_url(lab: &TestLab, server: &str) -> anyhow::Result<String> {
    let record = std::fs::read_to_string(lab.dir.join("lab.json")).context("read lab.json")?;
    let record: serde_json::Value = serde_json::from_str(&record).context("lab.json")?;
    let underlay = record["underlay"].as_str().context("underlay")?;
    let network = underlay.rsplit_once('.').context("an IPv4 network")?.0;
    let last = SERVERS.iter().position(|one| *one == server).context("a server")?;
    Ok(format!("https://{network}.{}:2379", if last == 0 { 10 } else { 201 + last }))
}

fn leader(lab: &TestLab) -> anyhow::Result<&'static str> {
    eventually("etcd has a leader", SOON, || {
        for at in SERVERS {
            let found = members(lab, at).unwrap_or_default();
            if let Some((name, _)) = found.iter().find(|(_, state)| state == "leader") {
                return SERVERS.into_iter().find(|one| one == name).context("an unknown member");
            }
        }
        bail!("no member says so")
    })
}

fn holder(lab: &TestLab, lease: &str) -> anyhow::Result<String> {
    let lease = lab.json(&["-n", "kube-system", "lease", lease])?;
    Ok(lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned())
}

fn ready_pods(lab: &TestLab, count: usize) -> anyhow::Result<()> {
    eventually(&format!("{count} ready pods"), SOON, || {
        let pods = lab.pods("app=nodeinfo")?;
        let ready = pods.iter().filter(|pod| pod.ready && !pod.leaving).count();
        ensure!(ready == count && pods.len() == count, "{pods:#?}");
        Ok(())
    })
}

fn lab_does(lab: &TestLab, what: &str, host: &str) -> anyhow::Result<()> {
    lab.orchctl(&["lab", what, host], SOON)?.ok().map(drop)
}

fn all_are_there(lab: &TestLab) -> anyhow::Result<()> {
    lab.orchctl(&["lab", "demo"], Duration::from_secs(120))?.ok()?;
    servers(lab, 3)?;
    let found = members(lab, "server")?;
    let states = |state: &str| found.iter().filter(|(_, one)| one == state).count();
    ensure!((states("leader"), states("follower")) == (1, 2), "{found:?}");
    for lease in LEASES {
        ensure!(!holder(lab, lease)?.is_empty(), "nobody leads {lease}");
    }
    Ok(())
}

/// Takes a control plane away and brings it back, under load. In between the cluster has to do its work.
fn without(
    lab: &TestLab,
    server: &str,
    away: impl FnOnce() -> anyhow::Result<()>,
    back: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let app = lab.json(&["service", "nodeinfo"])?;
    let cluster_ip = app["spec"]["clusterIP"].as_str().context("a ClusterIP")?;
    let inside = Load::start(Some(lab.netns("node-1")), format!("{cluster_ip}:80").parse()?, 20);
    let outside = Load::start(None, lab.node("node-2", 30080)?, 20);
    let writer = Writer::start(lab.kubeconfig())?;
    let outcome = (|| {
        writer.written(Duration::from_secs(5)).context("before")?;
        let begun = Instant::now();
        away()?;
        let gone = begun.elapsed();
        let took = writer.written(API_BACK + Duration::from_secs(5)).context("the API is away")?;
        eprintln!(
            "  {server} is away ({gone:.1?} to do that): a write is acknowledged after {took:.1?}"
        );
        // Somebody leads: what is asked for happens.
        lab.ok(&["scale", "deployment/nodeinfo", "--replicas=4"])?;
        ready_pods(lab, 4)?;
        servers(lab, 2)?;
        back()?;
        servers(lab, 3)?;
        lab.ok(&["scale", "deployment/nodeinfo", "--replicas=3"])?;
        ready_pods(lab, 3)?;
        eventually("etcd's members follow", SOON, || {
            let found = members(lab, server)?;
            let good = found.iter().filter(|(_, state)| state == "leader" || state == "follower");
            ensure!(good.count() == 3, "{found:?}");
            Ok(())
        })
    })();
    let (inside, outside, written) = (inside.stop()?, outside.stop()?, writer.stop()?);
    outcome?;
    eprintln!(
        "  {} writes acknowledged, {} not, longest time without {:.1?}; {} requests to the Service, slowest {:.1?}",
        written.acknowledged.len(),
        written.failed,
        written.longest_gap,
        inside.asked + outside.asked,
        inside.slowest.max(outside.slowest),
    );
    written.all_are_there(lab)?;
    ensure!(written.longest_gap <= API_BACK, "the API was away for {:?}", written.longest_gap);
    inside.clean(100).context("through the ClusterIP")?;
    outside.clean(100).context("through the node port")
}

fn killed(lab: &TestLab, server: &str) -> anyhow::Result<()> {
    without(lab, server, || lab_does(lab, "kill", server), || lab_does(lab, "restart", server))
}

fn leader_killed(lab: &TestLab) -> anyhow::Result<()> {
    killed(lab, leader(lab)?)
}

fn each_killed(lab: &TestLab) -> anyhow::Result<()> {
    SERVERS.into_iter().try_for_each(|server| killed(lab, server).context(server))
}

fn leader_cut_off(lab: &TestLab) -> anyhow::Result<()> {
    let server = leader(lab)?;
    without(lab, server, || lab_does(lab, "partition", server), || lab_does(lab, "heal", server))
}

/// Each node runs pods and is Ready.
fn followed_elsewhere(lab: &TestLab) -> anyhow::Result<()> {
    let nodes: Vec<String> = lab.pods("app=nodeinfo")?.into_iter().map(|pod| pod.node).collect();
    for node in ["node-1", "node-2", "node-3"] {
        ensure!(nodes.iter().any(|one| one == node), "no pod on {node}: {nodes:?}");
        let ready = lab.json(&["node", node])?;
        let conditions = ready["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ready = conditions.iter().find(|one| one["type"] == "Ready").context("Ready")?;
        ensure!(ready["status"] == "True", "{node}: {ready}");
    }
    Ok(())
}

fn leader_paused(lab: &TestLab) -> anyhow::Result<()> {
    let before = holder(lab, LEASES[0])?;
    let address = before.split('_').next().context("ADDRESS_UUID")?;
    let server = SERVERS
        .into_iter()
        .find(|server| etcd_url(lab, server).is_ok_and(|url| url.contains(&format!("/{address}:"))))
        .with_context(|| format!("{before} is no server of the lab"))?;
    let pid = Pid::from_raw(lab.pid(server)?);
    kill(pid, Signal::SIGSTOP).context("stop the server")?;
    let outcome = (|| {
        eventually("another one leads", SOON, || {
            let now = holder(lab, LEASES[0])?;
            ensure!(now != before && !now.is_empty(), "{now}");
            Ok(())
        })?;
        lab.ok(&["scale", "deployment/nodeinfo", "--replicas=5"])?;
        // Also on the nodes that watched at the server that stands still.
        ready_pods(lab, 5)?;
        followed_elsewhere(lab)
    })();
    kill(pid, Signal::SIGCONT).context("continue the server")?;
    outcome?;
    // What the paused one knew was three pods; had it acted on that, two would be gone and others in their place.
    let pods = lab.pods("app=nodeinfo")?;
    servers(lab, 3)?;
    eventually("the server says that it lost the Lease", SOON, || {
        let log = lab.dir.join(server).join("var/log/orch/server.log");
        let text =
            std::fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))?;
        ensure!(text.contains("the lease is lost"), "not yet");
        Ok(())
    })?;
    ready_pods(lab, 5)?;
    let mut same = lab.pods("app=nodeinfo")?;
    same.retain(|pod| pods.iter().any(|one| one.uid == pod.uid));
    ensure!(same.len() == 5, "pods changed");
    ensure!(holder(lab, LEASES[0])? != before, "it leads again under its old name");
    lab.ok(&["scale", "deployment/nodeinfo", "--replicas=3"])?;
    ready_pods(lab, 3)
}
