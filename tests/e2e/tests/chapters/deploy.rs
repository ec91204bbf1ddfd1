//! Deploying the example and looking at it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tests_e2e::eventually;
use tests_e2e::testlab::{TestLab, underlay};

use super::{nodeinfo, ready_pods};

const SOON: Duration = Duration::from_secs(30);

pub(super) fn demo(lab: &TestLab) -> anyhow::Result<()> {
    let limit = Duration::from_secs(120);
    let shown = lab.orchctl(&["lab", "demo"], limit)?.ok()?;
    let shown = format!("{}{}", shown.text(), shown.stderr);
    let answering =
        ["node-1", "node-2", "node-3"].iter().filter(|node| shown.contains(**node)).count();
    ensure!(answering >= 2, "the demo shows fewer than two nodes:\n{shown}");
    ensure!(shown.contains("KUBECONFIG"), "the demo does not say how to go on:\n{shown}");
    nodeinfo(lab, 3, SOON)?;
    let started = Instant::now();
    lab.orchctl(&["lab", "demo"], limit)?.ok()?;
    ensure!(
        started.elapsed() < Duration::from_secs(20),
        "the second time took {:?}",
        started.elapsed()
    );
    Ok(())
}

pub(super) fn up_again(lab: &TestLab) -> anyhow::Result<()> {
    let before = nodeinfo(lab, 3, SOON)?;
    lab.orchctl(&["lab", "up", "--nodes", "3", "--underlay", &underlay()], SOON)?.ok()?;
    let after = nodeinfo(lab, 3, SOON)?;
    ensure!(before == after, "pods changed: {before:?} {after:?}");
    Ok(())
}

pub(super) fn get_describe_and_logs(lab: &TestLab) -> anyhow::Result<()> {
    let pods = nodeinfo(lab, 3, SOON)?;
    let wide = lab.ok(&["get", "pods", "-o", "wide"])?;
    for pod in &pods {
        ensure!(wide.contains(&pod.ip) && wide.contains(&pod.node), "{wide}");
    }
    let nodes = lab.ok(&["get", "nodes"])?;
    ensure!(nodes.lines().filter(|line| line.contains(" Ready ")).count() == 3, "{nodes}");
    let described = lab.ok(&["describe", "pod", &pods[0].name])?;
    for word in ["nodeinfo:v1", "Scheduled", "Started", &pods[0].node, &pods[0].ip] {
        ensure!(described.contains(word), "{word} is not in:\n{described}");
    }
    let logs = lab.ok(&["logs", &pods[0].name])?;
    ensure!(logs.contains("serving on port 8080"), "{logs:?}");
    Ok(())
}

pub(super) fn exec(lab: &TestLab) -> anyhow::Result<()> {
    const MEGABYTES: usize = 4 << 20;
    let pod = nodeinfo(lab, 3, SOON)?.remove(0).name;
    let sent: Vec<u8> =
        (0..MEGABYTES).map(|at| u8::try_from(at * 31 % 251).unwrap_or_default()).collect();
    let got = lab.run(&["exec", "-i", &pod, "--", "/nodeinfo", "cat"], &sent, SOON)?.ok()?;
    ensure!(got.stdout == sent, "sent {} bytes, got {} other ones", sent.len(), got.stdout.len());
    let ended = lab.run(&["exec", &pod, "--", "/nodeinfo", "exit", "7"], b"", SOON)?;
    ensure!(
        ended.status.code() == Some(7),
        "exit code {:?}: {}",
        ended.status.code(),
        ended.stderr
    );
    let missing = lab.fails(&["exec", &pod, "--", "/no-such-program"], "")?;
    ensure!(missing.contains("no-such-program"), "{missing}");
    Ok(())
}

pub(super) fn kubectl_tour(lab: &TestLab) -> anyhow::Result<()> {
    lab.ok(&["create", "namespace", "tour"])?;
    eventually("the namespace's ServiceAccount", SOON, || {
        lab.ok(&["-n", "tour", "get", "serviceaccount", "default"])
    })?;
    lab.ok(&["-n", "tour", "create", "configmap", "settings", "--from-literal=a=1"])?;
    lab.ok(&["-n", "tour", "create", "secret", "generic", "password", "--from-literal=b=2"])?;
    lab.ok(&["-n", "tour", "create", "deployment", "web", "--image=nodeinfo:v1", "--replicas=2"])?;
    lab.ok(&["-n", "tour", "rollout", "status", "deployment/web", "--timeout=60s"])?;
    lab.ok(&["-n", "tour", "label", "deployment", "web", "tier=front"])?;
    lab.ok(&["-n", "tour", "annotate", "deployment", "web", "note=x"])?;
    lab.ok(&["-n", "tour", "patch", "deployment", "web", "-p", r#"{"spec":{"replicas":1}}"#])?;
    lab.ok(&["-n", "tour", "expose", "deployment", "web", "--port=80", "--target-port=8080"])?;
    lab.ok(&[
        "-n",
        "tour",
        "wait",
        "deployment/web",
        "--for=condition=Available",
        "--timeout=60s",
    ])?;
    lab.ok(&["-n", "tour", "rollout", "restart", "deployment/web"])?;
    lab.ok(&["-n", "tour", "rollout", "status", "deployment/web", "--timeout=60s"])?;
    lab.ok(&["-n", "tour", "rollout", "history", "deployment/web"])?;
    lab.ok(&["-n", "tour", "rollout", "undo", "deployment/web"])?;
    lab.ok(&["-n", "tour", "rollout", "status", "deployment/web", "--timeout=60s"])?;
    let all = lab.ok(&["-n", "tour", "get", "all"])?;
    ensure!(all.contains("deployment.apps/web") && all.contains("service/web"), "{all}");
    ensure!(lab.ok(&["explain", "deployment.spec.replicas"])?.contains("integer"), "explain");
    ensure!(lab.ok(&["api-resources"])?.contains("networkpolicies"), "api-resources");
    ensure!(lab.ok(&["get", "events", "-n", "tour"])?.contains("ScalingReplicaSet"), "events");
    ensure!(lab.ok(&["version"])?.contains("v1.36"), "version");

    lab.apply("apiVersion: v1\nkind: Pod\nmetadata: {name: tools}\nspec: {terminationGracePeriodSeconds: 0, containers: [{name: main, image: 'tools:v1', command: [sleep, '3600']}]}\n")?;
    lab.ok(&["wait", "pod/tools", "--for=condition=Ready", "--timeout=60s"])?;
    let folder = tempfile::tempdir()?;
    let (sent, back) = (folder.path().join("sent"), folder.path().join("back"));
    std::fs::write(&sent, vec![b'c'; 1 << 20])?;
    let (sent, back) = (sent.to_string_lossy(), back.to_string_lossy());
    lab.ok(&["cp", &sent, "tools:/copied"])?;
    lab.ok(&["cp", "tools:/copied", &back])?;
    ensure!(std::fs::read(back.as_ref())?.len() == 1 << 20, "cp there and back");
    lab.ok(&["delete", "pod", "tools", "--timeout=30s"])?;

    lab.ok(&["delete", "namespace", "tour", "--timeout=60s"])?;
    ensure!(
        lab.fails(&["get", "namespace", "tour"], "")?.contains("not found"),
        "the namespace is gone"
    );
    Ok(())
}

pub(super) fn volumes(lab: &TestLab) -> anyhow::Result<()> {
    lab.apply(include_str!("manifests/volumes.yaml"))?;
    let pod = ready_pods(lab, "app=volumes", 1, SOON)?.remove(0);
    let logs = eventually("the pod's output", SOON, || {
        let logs = lab.ok(&["logs", "volumes"])?;
        ensure!(logs.contains("labels"), "{logs:?}");
        Ok(logs)
    })?;
    for line in [
        "from-init",
        &format!("env hello world, open sesame, ip {}", pod.ip),
        "file hello, open sesame, greeting",
        "labels app=\"volumes\"",
        "volumes",
    ] {
        ensure!(logs.contains(line), "{line:?} is not in {logs:?}");
    }
    // A change of the ConfigMap reaches the running pod.
    lab.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {greeting: changed, other: unused}\n")?;
    eventually("the changed file", Duration::from_secs(90), || {
        let file = lab.ok(&["exec", "volumes", "--", "cat", "/config/greeting"])?;
        ensure!(file.contains("changed"), "{file:?}");
        Ok(())
    })?;
    lab.ok(&["delete", "pod", "volumes"])?;
    lab.ok(&["delete", "configmap", "settings"])?;
    lab.ok(&["delete", "secret", "password"])?;
    Ok(())
}

pub(super) fn probes(lab: &TestLab) -> anyhow::Result<()> {
    lab.apply(include_str!("manifests/probes.yaml"))?;
    eventually("a restart by the liveness probe", SOON, || {
        let pod = lab.json(&["pod", "restarted"])?;
        let count =
            pod["status"]["containerStatuses"][0]["restartCount"].as_i64().unwrap_or_default();
        ensure!(count >= 1, "{pod}");
        Ok(())
    })?;
    let addresses = |ready: bool| {
        eventually(&format!("an endpoint with ready {ready}"), SOON, || {
            let slices =
                lab.json(&["endpointslices", "-l", "kubernetes.io/service-name=waiting"])?;
            let endpoint = slices["items"][0]["endpoints"][0].clone();
            ensure!(endpoint["conditions"]["ready"] == ready, "{slices}");
            Ok(())
        })
    };
    addresses(false)?;
    lab.ok(&["exec", "waiting", "--", "touch", "/www/ready"])?;
    addresses(true)?;
    lab.ok(&["exec", "waiting", "--", "rm", "/www/ready"])?;
    addresses(false)?;
    for object in [["pod", "restarted"], ["pod", "waiting"], ["service", "waiting"]] {
        lab.ok(&["delete", object[0], object[1]]).with_context(|| object.join("/"))?;
    }
    Ok(())
}
