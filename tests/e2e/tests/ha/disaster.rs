//! All control planes lose what they know; a snapshot on one host brings the cluster back.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures::StreamExt as _;
use http::Method;
use orch_client::Client;
use serde_json::{Value, json};
use tests_e2e::eventually;
use tests_e2e::load::{Conversation, Load};
use tests_e2e::testlab::TestLab;

use crate::{SERVERS, SOON, etcd_url, members, ready_pods, servers};

/// What a user made, or what was made for it. Leases, Events and endpoints change by themselves.
const KINDS: &str = "namespaces,nodes,pods,services,configmaps,secrets,serviceaccounts,deployments,replicasets,\
    roles,rolebindings,clusterroles";

/// All objects: which one it is, and what somebody wished of it.
fn objects(lab: &TestLab) -> anyhow::Result<BTreeMap<String, Value>> {
    let list = lab.json(&[KINDS, "--all-namespaces"])?;
    let items = list["items"].as_array().context("a list")?;
    ensure!(items.len() > 50, "{} objects are not all", items.len());
    let seen = items.iter().map(|item| {
        let meta = &item["metadata"];
        let name = format!("{} {}/{}", item["kind"], meta["namespace"], meta["name"]);
        let wished =
            ["spec", "data", "rules", "subjects", "roleRef"].map(|part| item[part].clone());
        (name, json!([meta["uid"], meta["labels"], wished]))
    });
    Ok(seen.collect())
}

fn same(before: &BTreeMap<String, Value>, now: &BTreeMap<String, Value>) -> anyhow::Result<()> {
    let differs: Vec<_> = before
        .keys()
        .chain(now.keys())
        .filter(|name| before.get(*name) != now.get(*name))
        .collect();
    ensure!(differs.is_empty(), "{differs:?} are not as in the snapshot");
    Ok(())
}

/// Containers of the app's pods, by the pod's UID.
fn containers(lab: &TestLab) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let pods = lab.pods("app=nodeinfo")?;
    Ok(pods.into_iter().map(|pod| (pod.uid, pod.container_ids)).collect())
}

/// The pinned namespaces of all pods of all nodes.
fn sandboxes(lab: &TestLab) -> BTreeSet<PathBuf> {
    let folder = |node: &str| lab.dir.join(node).join("run/orch/netns");
    let pinned = |node: &str| std::fs::read_dir(folder(node)).into_iter().flatten().flatten();
    ["node-1", "node-2", "node-3"].into_iter().flat_map(pinned).map(|entry| entry.path()).collect()
}

/// What runs at the time of the snapshot.
struct Running {
    containers: BTreeMap<String, Vec<String>>,
    sandboxes: BTreeSet<PathBuf>,
}

fn config_map(name: &str, value: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata: {{value: {value}}}\n"
    )
}

const LATER: &str = "apiVersion: v1
kind: Pod
metadata: {name: later}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: 'nodeinfo:v1', imagePullPolicy: Never}]
";

/// A Service that nobody knew before.
const AFTER: &str = "apiVersion: v1
kind: Service
metadata: {name: after}
spec:
  selector: {app: nodeinfo}
  ports: [{port: 80, targetPort: 8080}]
";

pub(crate) fn all_state_lost(lab: &TestLab) -> anyhow::Result<()> {
    ready_pods(lab, 3)?;
    lab.apply(&config_map("kept", "a"))?;
    lab.apply(&config_map("changed", "a"))?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("etcd.db").to_string_lossy().into_owned();
    let root = lab.dir.join("server").to_string_lossy().into_owned();
    let url = etcd_url(lab, "server")?;
    let before = objects(lab)?;
    let running = Running { containers: containers(lab)?, sandboxes: sandboxes(lab) };
    lab.orchctl(&["etcd", "snapshot", "save", &file, "--root", &root, "--endpoints", &url], SOON)?
        .ok()?;
    same(&before, &objects(lab)?).context("nothing may change while the snapshot is made")?;

    // What comes after it is forgotten. Agents and whoever else watches have seen it, and later versions than the snapshot's.
    lab.ok(&["delete", "configmap", "kept"])?;
    lab.apply(&config_map("changed", "b"))?;
    lab.apply(LATER)?;
    eventually("the later pod runs", SOON, || {
        let pod = lab.json(&["pod", "later"])?;
        ensure!(pod["status"]["phase"] == "Running", "{}", pod["status"]["phase"]);
        Ok(())
    })?;
    ensure!(sandboxes(lab).len() == running.sandboxes.len() + 1, "{:?}", sandboxes(lab));
    for number in 0..30 {
        lab.apply(&config_map("changed", &format!("c{number}")))?;
    }
    let stale = lab.json(&["configmap", "changed"])?;

    let app = lab.json(&["service", "nodeinfo"])?;
    let cluster_ip = app["spec"]["clusterIP"].as_str().context("a ClusterIP")?;
    let address = format!("{cluster_ip}:80").parse()?;
    let talk = Conversation::start(&lab.netns("node-1"), address)?;
    let load = Load::start(Some(lab.netns("node-2")), address, 20);
    let outcome = recovered(lab, &file, &before, &running, &stale);
    let (talk, load) = (talk.stop(), load.stop()?);
    outcome?;
    let talk = talk.context("one connection through the Service, all the time")?;
    eprintln!(
        "  {} answers over one connection, longest gap {:.1?}",
        talk.answers, talk.longest_gap
    );
    load.clean(100).context("requests to the Service, all the time")
}

/// What a client remembers is of another time: no version of what is there now, and nothing that a watch can go on from.
fn versions_do_not_go_back(lab: &TestLab, stale: &Value) -> anyhow::Result<()> {
    const MAPS: &str = "/api/v1/namespaces/default/configmaps";
    let client = Client::from_kubeconfig(&lab.kubeconfig())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let path = format!("{MAPS}/changed");
        let put = client.json::<Value>(Method::PUT, &path, "application/json", Some(stale)).await;
        let error = put.err().context("an update of a version that was lost is taken")?;
        ensure!(error.is_conflict(), "{error:?}");
        let version = stale["metadata"]["resourceVersion"].as_str().context("a version")?;
        let watch = format!("{MAPS}?watch=true&resourceVersion={version}");
        let response = client.stream_ok(http::Request::get(&watch).body(Bytes::new())?).await?;
        let lines = orch_client::lines(response.into_body());
        let first = std::pin::pin!(lines).next().await.context("an event")??;
        let event: Value = serde_json::from_slice(&first)?;
        ensure!(event["object"]["code"] == 410, "it has to list again: {event}");
        Ok(())
    })
}

fn recovered(
    lab: &TestLab,
    file: &str,
    before: &BTreeMap<String, Value>,
    running: &Running,
    stale: &Value,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let restore = lab.orchctl(&["lab", "restore", file], Duration::from_secs(180))?;
    eprintln!("  three control planes from one snapshot in {:.1?}", begun.elapsed());
    restore.ok()?;
    eventually("objects are as in the snapshot", SOON, || same(before, &objects(lab)?))?;
    servers(lab, 3)?;
    let found = members(lab, "server")?;
    let votes = found.iter().filter(|(_, state)| state == "leader" || state == "follower");
    ensure!(votes.count() == SERVERS.len(), "{found:?}");
    versions_do_not_go_back(lab, stale)?;

    // Agents that watched at later versions follow again: they forget a pod, start one, and learn a Service.
    eventually("the pod that came after the snapshot is ended", SOON, || {
        let left = sandboxes(lab);
        ensure!(left == running.sandboxes, "{left:?}");
        Ok(())
    })?;
    lab.apply(AFTER)?;
    let service = lab.json(&["service", "after"])?;
    let address = format!("{}:80", service["spec"]["clusterIP"].as_str().context("a ClusterIP")?);
    for node in ["node-1", "node-2", "node-3"] {
        eventually(&format!("{node} knows the new Service"), SOON, || {
            let (netns, address) = (lab.netns(node), address.parse()?);
            let asked = Load::start(Some(netns), address, 10);
            std::thread::sleep(Duration::from_millis(300));
            asked.stop()?.clean(1)
        })?;
    }
    lab.ok(&["scale", "deployment/nodeinfo", "--replicas=4"])?;
    ready_pods(lab, 4)?;
    let now = containers(lab)?;
    for (uid, ids) in &running.containers {
        ensure!(now.get(uid) == Some(ids), "containers of {uid}: {:?}, not {ids:?}", now.get(uid));
    }
    lab.ok(&["scale", "deployment/nodeinfo", "--replicas=3"])?;
    ready_pods(lab, 3)
}
