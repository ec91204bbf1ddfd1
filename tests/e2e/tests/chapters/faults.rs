//! Things die; traffic between running pods goes on, and the cluster converges.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests_e2e::eventually;
use tests_e2e::load::Load;
use tests_e2e::testlab::{Pod, TestLab};

use super::nodeinfo;

const SOON: Duration = Duration::from_secs(60);
/// Issue 2: pods of a killed node run elsewhere within this time, with the lab's fast timers.
const REPLACED: Duration = Duration::from_secs(40);

/// Kills something with SIGKILL under traffic between pods, and has it come back.
fn under_traffic(
    lab: &TestLab,
    kill: impl FnOnce() -> anyhow::Result<()>,
    back: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let before = nodeinfo(lab, 3, SOON)?;
    // From one node to a pod on another one, and through the Service from outside.
    let target =
        before.iter().find(|pod| pod.node != "node-1").context("a pod that is not on node-1")?;
    let direct = Load::start(Some(lab.netns("node-1")), format!("{}:8080", target.ip).parse()?, 20);
    let service = Load::start(None, lab.node("node-2", 30080)?, 20);
    let outcome = kill().and_then(|()| {
        // Long enough for everything that might notice to notice.
        let dead = Instant::now();
        eventually("three seconds without it", SOON, || {
            ensure!(dead.elapsed() > Duration::from_secs(3), "wait");
            Ok(())
        })?;
        back()
    });
    let converged = outcome.and_then(|()| {
        let after = nodeinfo(lab, 3, SOON)?;
        ensure!(same(&before, &after), "pods changed:\n{before:#?}\n{after:#?}");
        // It really works again: something new can be made.
        lab.ok(&["scale", "deployment/nodeinfo", "--replicas=4"])?;
        nodeinfo(lab, 4, SOON)?;
        lab.ok(&["scale", "deployment/nodeinfo", "--replicas=3"])?;
        nodeinfo(lab, 3, SOON)
    });
    let (direct, service) = (direct.stop()?, service.stop()?);
    converged?;
    direct.clean(60).context("from node to pod")?;
    service.clean(60).context("through the Service")
}

fn same(before: &[Pod], after: &[Pod]) -> bool {
    let ids = |pods: &[Pod]| {
        let mut ids: Vec<_> = pods
            .iter()
            .map(|pod| (pod.uid.clone(), pod.container_ids.clone(), pod.ip.clone()))
            .collect();
        ids.sort();
        ids
    };
    ids(before) == ids(after)
}

fn kill_daemon(lab: &TestLab, host: &str) -> anyhow::Result<()> {
    kill(Pid::from_raw(lab.pid(host)?), Signal::SIGKILL)
        .with_context(|| format!("kill the daemon of {host}"))
}

pub(super) fn agent_killed(lab: &TestLab) -> anyhow::Result<()> {
    under_traffic(
        lab,
        || kill_daemon(lab, "node-2"),
        || lab.orchctl(&["lab", "restart", "node-2"], SOON)?.ok().map(drop),
    )?;
    ready(lab, 3)
}

pub(super) fn server_killed(lab: &TestLab) -> anyhow::Result<()> {
    under_traffic(
        lab,
        || kill_daemon(lab, "server"),
        || lab.orchctl(&["lab", "restart", "server"], SOON)?.ok().map(drop),
    )
}

pub(super) fn etcd_killed(lab: &TestLab) -> anyhow::Result<()> {
    // The server has to start it again by itself.
    under_traffic(
        lab,
        || lab.orchctl(&["lab", "kill", "etcd"], SOON)?.ok().map(drop),
        || eventually("the API answers", SOON, || lab.ok(&["get", "nodes"]).map(drop)),
    )
}

fn ready(lab: &TestLab, count: usize) -> anyhow::Result<()> {
    eventually(&format!("{count} nodes Ready"), SOON, || {
        let nodes = lab.ok(&["get", "nodes"])?;
        ensure!(nodes.lines().filter(|line| line.contains(" Ready ")).count() == count, "{nodes}");
        Ok(())
    })
}

pub(super) fn node_killed(lab: &TestLab) -> anyhow::Result<()> {
    lab.ok(&["scale", "deployment/nodeinfo", "--replicas=6"])?;
    let before = nodeinfo(lab, 6, SOON)?;
    ensure!(before.iter().any(|pod| pod.node == "node-3"), "no pod is on node-3: {before:#?}");
    let subnet = |node: &str| -> anyhow::Result<String> {
        Ok(lab.json(&["node", node])?["spec"]["podCIDR"].as_str().context("a podCIDR")?.to_owned())
    };
    let had = subnet("node-3")?;

    lab.orchctl(&["lab", "kill", "node-3"], SOON)?.ok()?;
    let dead = Instant::now();
    eventually("six ready pods on the other nodes", REPLACED, || {
        let pods = lab.pods("app=nodeinfo")?;
        let alive =
            pods.iter().filter(|pod| pod.ready && !pod.leaving && pod.node != "node-3").count();
        if alive < 6 {
            bail!("{alive} of 6: {pods:#?}");
        }
        Ok(())
    })?;
    eprintln!("pods of the killed node ran elsewhere after {:.1?}", dead.elapsed());
    // The Service has forgotten them too.
    for _ in 0..30 {
        tests_e2e::load::get(lab.node("node-1", 30080)?, "/")
            .context("the Service still sends to a dead node")?;
    }

    lab.orchctl(&["lab", "restart", "node-3"], SOON)?.ok()?;
    ready(lab, 3)?;
    ensure!(subnet("node-3")? == had, "node-3 had {had} and has {}", subnet("node-3")?);
    lab.ok(&["scale", "deployment/nodeinfo", "--replicas=3"])?;
    nodeinfo(lab, 3, SOON)?;
    // The returned node takes pods and reaches the others.
    lab.ok(&["scale", "deployment/nodeinfo", "--replicas=6"])?;
    let pods = nodeinfo(lab, 6, SOON)?;
    let returned =
        pods.iter().find(|pod| pod.node == "node-3").context("no pod on the returned node")?;
    let other = pods.iter().find(|pod| pod.node != "node-3").context("a pod elsewhere")?;
    let url = format!("http://{}:8080/", other.ip);
    let answer = lab.ok(&["exec", &returned.name, "--", "/nodeinfo", "fetch", &url])?;
    ensure!(answer.contains(&other.name), "{answer:?}");
    Ok(())
}
