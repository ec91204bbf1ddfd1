//! Scaling, and changing the version under load.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tests_e2e::eventually;
use tests_e2e::load::Load;
use tests_e2e::testlab::TestLab;

use super::nodeinfo;

const SOON: Duration = Duration::from_secs(60);

pub(super) fn scale(lab: &TestLab) -> anyhow::Result<()> {
    for count in [6, 2, 3] {
        lab.ok(&["scale", "deployment/nodeinfo", &format!("--replicas={count}")])?;
        nodeinfo(lab, count, SOON)?;
    }
    Ok(())
}

/// The Service answers 50 requests a second, half by NodePort from outside and half by ClusterIP from a node, while
/// every pod is replaced.
pub(super) fn rollout_loses_no_request(lab: &TestLab) -> anyhow::Result<()> {
    let before = nodeinfo(lab, 3, SOON)?;
    let service = lab.json(&["service", "nodeinfo"])?;
    let cluster_ip: Ipv4Addr =
        service["spec"]["clusterIP"].as_str().context("a ClusterIP")?.parse()?;
    let outside = Load::start(None, lab.node("node-1", 30080)?, 25);
    let inside = Load::start(Some(lab.netns("node-2")), SocketAddr::from((cluster_ip, 80)), 25);

    // Any change of the template is a new version; this one is what `kubectl rollout restart` does.
    let manifest = include_str!("../../../../examples/nodeinfo.yaml").replace(
        "    metadata:\n      labels:",
        "    metadata:\n      annotations:\n        version: \"2\"\n      labels:",
    );
    lab.apply(&manifest)?;
    let after = eventually("three new pods", SOON, || {
        let pods = lab.pods("app=nodeinfo")?;
        let new = pods.iter().filter(|pod| before.iter().all(|old| old.uid != pod.uid));
        ensure!(pods.len() == 3 && new.filter(|pod| pod.ready).count() == 3, "{pods:#?}");
        Ok(pods)
    })?;
    // The last ones to leave have left; what a client still sees of them it has seen by now.
    let tail = std::time::Instant::now();
    eventually("a second of the new version", SOON, || {
        ensure!(tail.elapsed() > Duration::from_secs(1), "wait");
        Ok(())
    })?;
    outside.stop()?.clean(100).context("by NodePort from outside")?;
    inside.stop()?.clean(100).context("by ClusterIP from a node")?;
    ensure!(after.iter().all(|pod| pod.restarts == 0), "{after:#?}");
    Ok(())
}
