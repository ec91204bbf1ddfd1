//! Subnets, packets, Services and names.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use tests_e2e::capture::Capture;
use tests_e2e::eventually;
use tests_e2e::testlab::TestLab;

use super::{nodeinfo, ready_pods};

const SOON: Duration = Duration::from_secs(30);

pub(super) fn three_nodes_are_ready_with_a_subnet_each(lab: &TestLab) -> anyhow::Result<()> {
    let nodes = lab.json(&["nodes"])?;
    let nodes = nodes["items"].as_array().context("items")?;
    ensure!(nodes.len() == 3, "{} nodes", nodes.len());
    let subnets: BTreeSet<_> =
        nodes.iter().filter_map(|node| node["spec"]["podCIDR"].as_str()).collect();
    ensure!(subnets.len() == 3, "three nodes have the subnets {subnets:?}");

    // The same in etcd, as flannel and its tools read it.
    let words = etcdctl_words(lab)?;
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    words.extend(["get", "--prefix", "/coreos.com/network/subnets/"]);
    let leases = lab.on("server", &words)?;
    for subnet in subnets {
        let key = format!("/coreos.com/network/subnets/{}", subnet.replace('/', "-"));
        ensure!(leases.contains(&key), "{key} is not in etcd:\n{leases}");
    }
    ensure!(leases.contains(r#""BackendType":"vxlan""#), "not flannel's values:\n{leases}");
    Ok(())
}

/// etcdctl with what it needs to reach the lab's etcd.
pub(super) fn etcdctl_words(lab: &TestLab) -> anyhow::Result<Vec<String>> {
    let pki = lab.dir.join("server/etc/orch/pki");
    let file = |name: &str| pki.join(name).to_string_lossy().into_owned();
    let mut words = ["env", "ETCDCTL_API=3", "etcdctl", "--endpoints"].map(str::to_owned).to_vec();
    words.push(format!("https://{}:2379", server_address(lab)?));
    for (flag, name) in
        [("--cacert", "etcd-ca.crt"), ("--cert", "etcd-client.crt"), ("--key", "etcd-client.key")]
    {
        words.extend([flag.to_owned(), file(name)]);
    }
    Ok(words)
}

fn server_address(lab: &TestLab) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(lab.kubeconfig())?;
    let (_, rest) = text.split_once("https://").context("a server in the kubeconfig")?;
    Ok(rest.split(':').next().unwrap_or_default().to_owned())
}

/// Every pod fetches from every other one; between nodes all of it is VXLAN, and nothing is fragmented.
pub(super) fn pods_reach_pods(lab: &TestLab) -> anyhow::Result<()> {
    let pods = nodeinfo(lab, 3, SOON)?;
    let nodes: BTreeSet<_> = pods.iter().map(|pod| &pod.node).collect();
    ensure!(nodes.len() > 1, "all pods are on {nodes:?}");
    let capture = Capture::start(&lab.netns("underlay"))?;
    for from in &pods {
        for to in pods.iter().filter(|to| to.name != from.name) {
            let url = format!("http://{}:8080/", to.ip);
            let answer = lab.ok(&["exec", &from.name, "--", "/nodeinfo", "fetch", &url])?;
            ensure!(
                answer.contains(&to.name),
                "{} asked {} and got {answer:?}",
                from.name,
                to.name
            );
        }
    }
    let (from, to) = pods
        .iter()
        .flat_map(|from| pods.iter().map(move |to| (from, to)))
        .find(|(from, to)| from.node != to.node)
        .context("pods on two nodes")?;
    let url = format!("http://{}:8080/bytes/1048576", to.ip);
    let megabyte =
        lab.run(&["exec", &from.name, "--", "/nodeinfo", "fetch", &url], b"", SOON)?.ok()?;
    // `fetch` may end its output with a line break.
    ensure!(
        (1_048_576..=1_048_577).contains(&megabyte.stdout.len()),
        "{} bytes of 1 MiB",
        megabyte.stdout.len()
    );
    // From the node itself, whose address is not a pod's.
    let answer = lab
        .on(&from.node, &["curl", "-sS", "--max-time", "5", &format!("http://{}:8080/", to.ip)])?;
    ensure!(answer.contains(&to.name), "{} asked {} and got {answer:?}", from.node, to.name);
    lab.apply(include_str!("manifests/pinger.yaml"))?;
    ready_pods(lab, "app=pinger", 1, SOON)?;
    for to in &pods {
        let ping = lab.ok(&["exec", "pinger", "--", "ping", "-c", "2", "-W", "2", &to.ip])?;
        ensure!(ping.contains(" 0% packet loss"), "{ping}");
    }
    lab.ok(&["delete", "pod", "pinger"])?;

    let seen = capture.stop()?;
    ensure!(
        seen.vxlan > 20 && seen.vxlan_bytes > 1 << 20,
        "the megabyte was not in VXLAN packets: {seen:?}"
    );
    ensure!(seen.fragments == 0 && seen.bare == 0, "{seen:?}");
    ensure!(seen.longest <= 65_535, "{seen:?}");
    for pod in &pods {
        // The pods' MTU leaves room for the outer headers.
        let links = lab.on(&pod.node, &["ip", "-o", "link", "show", "master", "cni0"])?;
        ensure!(links.lines().all(|line| line.contains("mtu 1450")), "{links}");
    }
    Ok(())
}

pub(super) fn services_and_dns(lab: &TestLab) -> anyhow::Result<()> {
    let pods = nodeinfo(lab, 3, SOON)?;
    let service = lab.json(&["service", "nodeinfo"])?;
    let cluster_ip = service["spec"]["clusterIP"].as_str().context("a ClusterIP")?;
    let asking = &pods[0];
    for name in ["nodeinfo.default.svc.cluster.local", "nodeinfo.default.svc", "nodeinfo"] {
        let answer = lab.ok(&["exec", &asking.name, "--", "/nodeinfo", "resolve", name])?;
        ensure!(answer.contains(cluster_ip), "{name} is {answer:?}, not {cluster_ip}");
    }
    // Every pod answers, the asking one among them: it reaches itself through its Service.
    let answers = eventually("all pods answer through the Service", SOON, || {
        let answers = lab.ok(&[
            "exec",
            &asking.name,
            "--",
            "/nodeinfo",
            "fetch",
            "http://nodeinfo.default.svc.cluster.local/",
            "40",
        ])?;
        match pods.iter().find(|pod| !answers.contains(&pod.name)) {
            Some(missing) => bail!("{} never answered:\n{answers}", missing.name),
            None => Ok(answers),
        }
    })?;
    ensure!(
        answers.lines().filter(|line| line.contains("Container Hostname")).count() == 40,
        "{answers}"
    );
    // From every node, by ClusterIP and by NodePort of every node.
    for node in ["node-1", "node-2", "node-3"] {
        let by_ip =
            lab.on(node, &["curl", "-sS", "--max-time", "5", &format!("http://{cluster_ip}/")])?;
        ensure!(by_ip.contains("Container Hostname"), "{node}: {by_ip:?}");
        let body = tests_e2e::load::get(lab.node(node, 30080)?, "/")
            .with_context(|| format!("NodePort of {node}"))?;
        ensure!(body.contains("Container Hostname"), "{node}: {body:?}");
    }
    Ok(())
}

pub(super) fn kubernetes_service(lab: &TestLab) -> anyhow::Result<()> {
    for node in ["node-1", "node-2", "node-3"] {
        let answer =
            lab.on(node, &["curl", "-sSk", "--max-time", "5", "https://10.96.0.1/version"])?;
        ensure!(answer.contains("gitVersion"), "{node}: {answer:?}");
    }
    lab.apply(include_str!("manifests/api-client.yaml"))?;
    let token = eventually("a pod that reaches the API server", SOON, || {
        let logs = lab.ok(&["logs", "api-client"])?;
        let (_, token) = logs.split_once("connected\n").with_context(|| format!("{logs:?}"))?;
        ensure!(token.split('.').count() == 3, "no token in {logs:?}");
        Ok(token.trim().to_owned())
    })?;
    // The token says who the pod is; what it may do, a role says.
    let header = format!("Authorization: Bearer {token}");
    let ask = |what: &str| {
        let url = format!("https://10.96.0.1/api/v1/namespaces/default/{what}");
        lab.on("node-1", &["curl", "-sSk", "--max-time", "5", "-H", &header, &url])
    };
    let answer = ask("configmaps")?;
    for word in ["system:serviceaccount:default:default", "Forbidden"] {
        ensure!(answer.contains(word), "{word:?} is not in {answer}");
    }
    lab.apply(include_str!("manifests/api-client-role.yaml"))?;
    eventually("the pod's account reads ConfigMaps", SOON, || {
        let answer = ask("configmaps")?;
        ensure!(answer.contains("ConfigMapList"), "{answer}");
        Ok(())
    })?;
    let answer = ask("secrets")?;
    ensure!(answer.contains("Forbidden"), "{answer}");
    lab.ok(&["delete", "pod", "api-client"])?;
    for kind in ["rolebinding", "role"] {
        lab.ok(&["delete", kind, "api-client"])?;
    }
    Ok(())
}
