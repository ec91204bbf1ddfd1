//! NetworkPolicies, as the one who writes them meets them: real pods on three nodes, and what reaches what.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests_e2e::eventually;
use tests_e2e::stream::Streams;
use tests_e2e::testlab::TestLab;

const SOON: Duration = Duration::from_secs(30);
/// A policy is in force within this time (the promise is 100 ms on the node; this is a busy machine and `kubectl`).
const IN_FORCE: Duration = Duration::from_secs(5);

const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];

/// Pods of the chapter: `namespace/name`.
pub(super) const FRONT: &str = "shop/front";
pub(super) const NEIGHBOUR: &str = "shop/neighbour";
const GUEST: &str = "guests/guest";

pub(super) struct Shop<'a> {
    pub(super) lab: &'a TestLab,
    /// Address of the pod `web`.
    pub(super) web: String,
    /// Its Service.
    pub(super) service: String,
}

impl<'a> Shop<'a> {
    pub(super) fn open(lab: &'a TestLab) -> anyhow::Result<Self> {
        lab.apply(include_str!("manifests/policy.yaml"))?;
        for (namespace, name) in [FRONT, NEIGHBOUR, GUEST, "shop/web"].map(split) {
            eventually(&format!("{namespace}/{name} runs"), SOON, || {
                let pod = lab.json(&["pod", "-n", namespace, name])?;
                ensure!(pod["status"]["phase"] == "Running", "{}", pod["status"]);
                Ok(())
            })?;
        }
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let web = lab.json(&["pod", "-n", "shop", "web"])?;
        let service = lab.json(&["service", "-n", "shop", "web"])?;
        Ok(Self {
            lab,
            web: text(&web["status"]["podIP"]).context("an address")?,
            service: text(&service["spec"]["clusterIP"]).context("a ClusterIP")?,
        })
    }

    /// Whether a pod gets an answer.
    fn passes(&self, from: &str, host: &str, port: u16) -> anyhow::Result<bool> {
        let (namespace, name) = split(from);
        let script = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 1 {host} {port}");
        let words = ["exec", "-n", namespace, name, "--", "sh", "-c", &script];
        let run = self.lab.run(&words, b"", SOON)?;
        Ok(run.status.success() && run.text().trim().ends_with("ok"))
    }

    /// Waits until each of these is as it should be.
    pub(super) fn expect(
        &self,
        what: &str,
        wanted: &[(&str, &str, u16, bool)],
    ) -> anyhow::Result<()> {
        eventually(what, IN_FORCE, || {
            for (from, host, port, passes) in wanted {
                let seen = self.passes(from, host, *port)?;
                ensure!(seen == *passes, "{from} to {host}:{port} passes: {seen}");
            }
            Ok(())
        })
    }

    pub(super) fn policy(&self, name: &str, spec: Value) -> anyhow::Result<()> {
        let object = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "shop", "name": name}, "spec": spec,
        });
        self.lab.apply(&object.to_string()).map(drop)
    }

    pub(super) fn remove_policy(&self, name: &str) -> anyhow::Result<()> {
        self.lab.ok(&["delete", "networkpolicy", "-n", "shop", name]).map(drop)
    }

    /// TCP segments that the pod `web` got. Its answers to pods that are gone by now come back as ICMP errors of its
    /// node, so packets of all kinds would be too many.
    fn received(&self) -> anyhow::Result<u64> {
        let words = ["exec", "-n", "shop", "web", "--", "grep", "^Tcp:", "/proc/net/snmp"];
        let text = self.lab.ok(&words)?;
        let mut lines = text.lines().map(str::split_whitespace);
        let (names, values) = (lines.next(), lines.next());
        let found = names.zip(values).and_then(|(names, values)| {
            names
                .zip(values)
                .find(|(name, _)| *name == "InSegs")
                .and_then(|(_, value)| value.parse().ok())
        });
        found.with_context(|| format!("not snmp: {text}"))
    }

    pub(super) fn close(&self) -> anyhow::Result<()> {
        self.lab.ok(&["delete", "namespace", "shop", "guests"]).map(drop)
    }
}

fn split(pod: &str) -> (&str, &str) {
    pod.split_once('/').unwrap_or(("default", pod))
}

pub(super) fn policies(lab: &TestLab) -> anyhow::Result<()> {
    let shop = Shop::open(lab)?;
    let (web, service) = (shop.web.as_str(), shop.service.as_str());
    shop.expect(
        "without policies everything passes",
        &[
            (FRONT, web, 80, true),
            (NEIGHBOUR, web, 80, true),
            (GUEST, web, 8000, true),
            (GUEST, service, 80, true),
        ],
    )?;
    ingress(&shop, web, service)?;
    egress(&shop, web, service)?;
    agent_killed_under_policy(&shop, web)?;
    tiers(&shop, web)?;
    shop.expect(
        "without policies everything passes again",
        &[(FRONT, web, 80, true), (NEIGHBOUR, web, 80, true), (GUEST, web, 80, true)],
    )?;
    shop.close()
}

pub(super) fn ingress(shop: &Shop<'_>, web: &str, service: &str) -> anyhow::Result<()> {
    shop.policy("deny", json!({"podSelector": {}, "policyTypes": ["Ingress"]}))?;
    shop.expect(
        "default deny",
        &[
            (FRONT, web, 80, false),
            (NEIGHBOUR, web, 80, false),
            (GUEST, web, 80, false),
            (FRONT, service, 80, false),
        ],
    )?;
    // Nodes reach their own pods whatever policies say: probes come from there.
    let url = format!("http://{web}/");
    let from_node = shop.lab.on("node-1", &["curl", "-sS", "--max-time", "5", &url])?;
    ensure!(from_node.trim() == "ok", "{from_node}");

    let front = json!({"podSelector": {"matchLabels": {"app": "front"}}});
    let to_web = json!({"matchLabels": {"app": "web"}});
    shop.policy(
        "web",
        json!({"podSelector": to_web, "ingress": [{"from": [front], "ports": [{"port": 80}]}]}),
    )?;
    shop.expect(
        "one peer on one port",
        &[
            (FRONT, web, 80, true),
            (FRONT, service, 80, true),
            (FRONT, web, 81, false),
            (NEIGHBOUR, web, 80, false),
            (NEIGHBOUR, service, 80, false),
            (GUEST, web, 80, false),
        ],
    )?;
    // A label is enough to become that peer, and to cease to be it.
    shop.lab.ok(&["label", "pod", "-n", "shop", "neighbour", "--overwrite", "app=front"])?;
    shop.expect("a pod with the peer's label", &[(NEIGHBOUR, web, 80, true)])?;
    shop.lab.ok(&["label", "pod", "-n", "shop", "neighbour", "--overwrite", "app=neighbour"])?;
    shop.expect("and without it", &[(NEIGHBOUR, web, 80, false)])?;

    let guests = json!({"namespaceSelector": {"matchLabels": {"team": "guests"}}});
    shop.policy(
        "web",
        json!({"podSelector": to_web, "ingress": [{
            "from": [guests], "ports": [{"port": 8000, "endPort": 8005}, {"port": "shop-web"}],
        }]}),
    )?;
    shop.expect(
        "a namespace, a range of ports and a named port",
        &[
            (GUEST, web, 8000, true),
            (GUEST, web, 8005, true),
            (GUEST, web, 8010, false),
            (GUEST, web, 81, true),
            (GUEST, web, 80, false),
            (FRONT, web, 8000, false),
        ],
    )?;

    let pod = shop.lab.json(&["pod", "-n", "guests", "guest"])?;
    let guest = pod["status"]["podIP"].as_str().context("an address")?;
    let block = json!({"cidr": "10.244.0.0/16", "except": [format!("{guest}/32")]});
    shop.policy(
        "web",
        json!({"podSelector": to_web, "ingress": [{"from": [{"ipBlock": block}]}]}),
    )?;
    shop.expect(
        "a block with an exception",
        &[(FRONT, web, 81, true), (NEIGHBOUR, web, 80, true), (GUEST, web, 80, false)],
    )?;
    shop.remove_policy("web")?;
    shop.expect("default deny again", &[(FRONT, web, 80, false), (NEIGHBOUR, web, 80, false)])?;
    shop.remove_policy("deny")
}

pub(super) fn egress(shop: &Shop<'_>, web: &str, service: &str) -> anyhow::Result<()> {
    shop.policy("deny", json!({"podSelector": {}, "policyTypes": ["Egress"]}))?;
    shop.expect(
        "no way out, not through a Service either",
        &[
            (FRONT, web, 80, false),
            (FRONT, service, 80, false),
            (NEIGHBOUR, web, 80, false),
            (NEIGHBOUR, service, 80, false),
            // It is not of the namespace, and replies are no way out.
            (GUEST, web, 80, true),
        ],
    )?;
    let to_web = json!({"podSelector": {"matchLabels": {"app": "web"}}});
    shop.policy(
        "web",
        json!({"podSelector": {}, "policyTypes": ["Egress"],
               "egress": [{"to": [to_web], "ports": [{"port": 80}]}]}),
    )?;
    shop.expect(
        "one destination, by its address, its Service and its name",
        &[
            (FRONT, web, 80, true),
            (FRONT, service, 80, true),
            (FRONT, "web.shop.svc.cluster.local", 80, true),
            (NEIGHBOUR, service, 80, true),
            (FRONT, web, 81, false),
        ],
    )?;
    shop.remove_policy("web")?;
    shop.remove_policy("deny")
}

/// Leaves the policy `deny` in force.
fn agent_killed_under_policy(shop: &Shop<'_>, web: &str) -> anyhow::Result<()> {
    let front = json!({"podSelector": {"matchLabels": {"app": "front"}}});
    shop.policy("deny", json!({"podSelector": {}, "ingress": [{"from": [front]}]}))?;
    let wanted = [(FRONT, web, 80, true), (NEIGHBOUR, web, 80, false), (GUEST, web, 80, false)];
    shop.expect("one peer", &wanted)?;
    let streams = Streams::start(
        &pod_netns(shop.lab, "node-2", FRONT)?,
        &pod_netns(shop.lab, "node-1", "shop/web")?,
        web.parse()?,
    )?;
    let host = "node-1";
    kill(Pid::from_raw(shop.lab.pid(host)?), Signal::SIGKILL).context("kill the agent")?;
    let dead = Instant::now();
    // `exec` needs the agent: what the dead node's pod gets is asked from the other ones.
    while dead.elapsed() < Duration::from_secs(3) {
        ensure!(!shop.passes(GUEST, web, 80)?, "open without an agent");
        ensure!(shop.passes(FRONT, web, 80)?, "closed without an agent");
    }
    shop.lab.orchctl(&["lab", "restart", host], SOON)?.ok()?;
    let back = Instant::now();
    while back.elapsed() < Duration::from_secs(3) {
        ensure!(!shop.passes(GUEST, web, 80)?, "open while the agent starts");
        ensure!(shop.passes(FRONT, web, 80)?, "closed while the agent starts");
    }
    let report = streams.stop()?;
    ensure!(report.tcp_gap < Duration::from_secs(2), "a connection stood still: {report:?}");
    eventually("exec works again", SOON, || shop.passes(NEIGHBOUR, web, 80).map(drop))?;
    shop.expect("one peer", &wanted)
}

/// With the policy `deny` in force, which lets the front in; takes it away.
fn tiers(shop: &Shop<'_>, web: &str) -> anyhow::Result<()> {
    let cluster_policy = |name: &str, tier: &str, rules: Value| {
        let object = json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
            "metadata": {"name": name},
            "spec": {"tier": tier, "priority": 10, "subject": {"pods": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}},
                "podSelector": {"matchLabels": {"app": "web"}},
            }}, "ingress": rules},
        });
        shop.lab.apply(&object.to_string()).map(drop)
    };
    let pods = |app: &str| json!([{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": app}}}}]);
    let web_port = json!([{"tcp": {"destinationPort": {"number": 80}}}]);
    let neighbour = json!({"action": "Accept", "from": pods("neighbour"), "protocols": web_port});
    let front = json!({"name": "not-front", "action": "Deny", "from": pods("front")});
    cluster_policy("guard", "Admin", json!([neighbour, front]))?;
    shop.expect(
        "the administrator's rules go before those of the namespace",
        &[(NEIGHBOUR, web, 80, true), (NEIGHBOUR, web, 81, false), (FRONT, web, 80, false)],
    )?;
    let listed = shop.lab.ok(&["get", "clusternetworkpolicies"])?;
    ensure!(listed.contains("Admin") && listed.contains("guard"), "{listed}");

    shop.lab.ok(&["delete", "cnp", "guard"])?;
    let guests = json!([{"namespaces": {"matchLabels": {"team": "guests"}}}]);
    cluster_policy("rest", "Baseline", json!([{"action": "Deny", "from": guests}]))?;
    shop.expect(
        "the namespace's policy has the last word",
        &[(FRONT, web, 80, true), (NEIGHBOUR, web, 80, false), (GUEST, web, 80, false)],
    )?;
    shop.remove_policy("deny")?;
    shop.expect(
        "the baseline is for pods without policies",
        &[(FRONT, web, 80, true), (NEIGHBOUR, web, 80, true), (GUEST, web, 80, false)],
    )?;
    shop.lab.ok(&["delete", "cnp", "rest"]).map(drop)
}

/// The network namespace of a pod, found by its address.
pub(super) fn pod_netns(
    lab: &TestLab,
    node: &str,
    pod: &str,
) -> anyhow::Result<std::path::PathBuf> {
    let (namespace, name) = split(pod);
    let object = lab.json(&["pod", "-n", namespace, name])?;
    let ip = object["status"]["podIP"].as_str().context("an address")?;
    for entry in std::fs::read_dir(lab.dir.join(node).join("run/orch/netns"))? {
        let path = entry?.path();
        let netns = cni_netlink::NetNs::open(&path)?;
        let found: anyhow::Result<bool> = netns.run(|| {
            let netlink = cni_netlink::Netlink::open()?;
            let Some(link) = netlink.link("eth0")? else { return Ok(false) };
            let addresses = netlink.addresses(link.index)?;
            Ok(addresses.iter().any(|address| address.ip().to_string() == ip))
        });
        if found? {
            return Ok(path);
        }
    }
    bail!("no namespace of {node} has {ip}")
}

/// What happens to the agents while pods are being started.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    None,
    Paused,
    Killed,
}

/// Pods whose first act is to send, under a policy that allows them nothing: 72 of them, or 216 with `ORCH_CHAOS`.
pub(super) fn closed_before_open(lab: &TestLab) -> anyhow::Result<()> {
    const PODS: usize = 24;
    const SENT_BY_POD: usize = 10;
    let shop = Shop::open(lab)?;
    let script = format!(
        "i=0; while [ $i -lt {SENT_BY_POD} ]; do nc -w 1 {} 80 < /dev/null & i=$((i+1)); done; wait; exit 0",
        shop.web
    );
    let senders = || -> anyhow::Result<Vec<Value>> {
        let pods = lab.json(&["pods", "-n", "shop", "-l", "app=sender"])?;
        Ok(pods["items"].as_array().context("items")?.clone())
    };
    let round = |trouble: Trouble| -> anyhow::Result<u64> {
        let before = shop.received()?;
        let pods: Vec<Value> = (0..PODS)
            .map(|place| {
                json!({
                    "apiVersion": "v1", "kind": "Pod",
                    "metadata": {
                        "namespace": "shop", "name": format!("sender-{place}"), "labels": {"app": "sender"},
                    },
                    "spec": {
                        "terminationGracePeriodSeconds": 0, "restartPolicy": "Never",
                        "nodeName": NODES[place % NODES.len()],
                        "containers": [{"name": "main", "image": "tools:v1", "command": ["sh", "-c", script]}],
                    },
                })
            })
            .collect();
        lab.apply(&json!({"apiVersion": "v1", "kind": "List", "items": pods}).to_string())?;
        match trouble {
            Trouble::None => {}
            Trouble::Paused => pause_agents(lab)?,
            Trouble::Killed => kill_agents(lab)?,
        }
        eventually("the senders are done", Duration::from_secs(120), || {
            let pods = senders()?;
            let done = pods.iter().filter(|pod| pod["status"]["phase"] == "Succeeded").count();
            ensure!(done == PODS, "{done} of {} pods", pods.len());
            Ok(())
        })?;
        let after = shop.received()?;
        lab.ok(&["delete", "pods", "-n", "shop", "-l", "app=sender"])?;
        eventually("the senders are gone", SOON, || {
            let pods = senders()?;
            ensure!(pods.is_empty(), "{} pods", pods.len());
            Ok(())
        })?;
        Ok(after - before)
    };
    let open = round(Trouble::None)?;
    let sent = (PODS * SENT_BY_POD) as u64;
    ensure!(
        open >= sent,
        "without a policy {sent} connections reach the pod; it got {open} segments"
    );
    let sender = json!({"matchLabels": {"app": "sender"}});
    shop.policy("silent", json!({"podSelector": sender, "policyTypes": ["Egress"]}))?;
    let times_each = if std::env::var_os("ORCH_CHAOS").is_some() { 3 } else { 1 };
    for turn in 0..times_each {
        for trouble in [Trouble::None, Trouble::Paused, Trouble::Killed] {
            let got = round(trouble)?;
            ensure!(got == 0, "round {turn}, agents {trouble:?}: {got} segments passed");
        }
    }
    shop.remove_policy("silent")?;
    shop.close()
}

/// Stops every agent for a moment, some times, while pods are being started.
fn pause_agents(lab: &TestLab) -> anyhow::Result<()> {
    for turn in 1..=3 {
        for node in NODES {
            kill(Pid::from_raw(lab.pid(node)?), Signal::SIGSTOP).context("pause an agent")?;
        }
        let stopped = Instant::now();
        let outcome = eventually("a pause", SOON, || {
            ensure!(stopped.elapsed() > Duration::from_millis(150 * turn), "wait");
            Ok(())
        });
        for node in NODES {
            kill(Pid::from_raw(lab.pid(node)?), Signal::SIGCONT).context("go on")?;
        }
        outcome?;
    }
    Ok(())
}

/// Kills every agent while pods are being started, and starts it again.
fn kill_agents(lab: &TestLab) -> anyhow::Result<()> {
    for node in NODES {
        kill(Pid::from_raw(lab.pid(node)?), Signal::SIGKILL).context("kill an agent")?;
        lab.orchctl(&["lab", "restart", node], SOON)?.ok()?;
    }
    Ok(())
}
