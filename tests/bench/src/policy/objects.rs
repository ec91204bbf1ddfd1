//! What the API server would say, and the same rules in nftables' language.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::world::{CLIENT, SERVER};

/// Policies that share many rules.
const RULES_PER_POLICY: usize = 100;
/// Addresses and ports of rules that never match: every rule has its own.
const FIRST_PORT: usize = 20_000;
const NAMESPACES: usize = 50;

/// Name of a namespace.
pub(crate) fn namespace(place: usize) -> String {
    format!("ns{place}")
}

pub(crate) fn namespace_object(place: usize) -> Value {
    json!({"metadata": {"name": namespace(place), "labels": {"team": format!("team{}", place % 10)}}})
}

/// All namespaces of the big cluster.
pub(crate) fn namespaces() -> impl Iterator<Item = Value> {
    (0..NAMESPACES).map(namespace_object)
}

/// A pod of the first namespace.
pub(crate) fn pod(name: &str, node: &str, ip: Ipv4Addr, labels: &[(&str, &str)]) -> Value {
    let labels: serde_json::Map<String, Value> =
        labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    json!({
        "metadata": {"namespace": namespace(0), "name": name, "labels": labels},
        "spec": {"nodeName": node, "containers": []},
        "status": {"podIP": ip, "phase": "Running"},
    })
}

fn stranger(place: usize) -> Ipv4Addr {
    let [high, low] = u16::try_from(place).unwrap_or(u16::MAX).to_be_bytes();
    Ipv4Addr::new(172, 16, high, low)
}

/// So many rules for each direction, in policies of some; the last one is the one that matches.
pub(crate) fn many_rules(count: usize) -> Vec<Value> {
    let mut policies = Vec::new();
    for (direction, peers, subject, other) in
        [("Ingress", "from", "server", "client"), ("Egress", "to", "client", "server")]
    {
        let never = (1..count).map(|place| {
            json!({
                peers: [{"ipBlock": {"cidr": format!("{}/32", stranger(place))}}],
                "ports": [{"port": FIRST_PORT + place}],
            })
        });
        let matching = json!({peers: [{"podSelector": {"matchLabels": {"app": other}}}]});
        let rules: Vec<Value> = never.chain([matching]).collect();
        for (place, rules) in rules.chunks(RULES_PER_POLICY).enumerate() {
            policies.push(json!({
                "metadata": {"namespace": namespace(0), "name": format!("{subject}-{place}")},
                "spec": {
                    "podSelector": {"matchLabels": {"app": subject}},
                    "policyTypes": [direction],
                    direction.to_lowercase(): rules,
                },
            }));
        }
    }
    policies
}

/// The frame of both: what is known passes, and what nothing allows is dropped.
fn table(sets: &str, rules: &str) -> String {
    format!(
        "table ip bench {{\n{sets}\nchain forward {{\ntype filter hook forward priority 0; policy drop;\n\
         ct state established,related accept\n{rules}}}\n}}\n"
    )
}

/// The rules as elements of one set.
pub(crate) fn set_script(count: usize) -> String {
    let mut elements = format!("{CLIENT} . {SERVER}");
    for place in 1..count {
        let _ = write!(elements, ", {} . {SERVER}", stranger(place));
    }
    table(
        &format!("set allowed {{ type ipv4_addr . ipv4_addr; elements = {{ {elements} }} }}"),
        "ip saddr . ip daddr @allowed accept\n",
    )
}

/// The rules as rules.
pub(crate) fn linear_script(count: usize) -> String {
    let mut rules = String::new();
    for place in 1..count {
        let port = FIRST_PORT + place;
        let _ = writeln!(
            rules,
            "ip saddr {} ip daddr {SERVER} tcp dport {port} accept",
            stranger(place)
        );
    }
    let _ = writeln!(rules, "ip saddr {CLIENT} ip daddr {SERVER} accept");
    table("", &rules)
}

/// Pods of a big cluster: replicas of five applications in each namespace, so that many are alike, and each with a label
/// of its own. Gives path, object and address; the first `local` are node0's and in the first namespace.
pub(crate) fn cluster_pod(place: usize, local: usize) -> (String, Value, Ipv4Addr) {
    let space = if place < local { 0 } else { place % NAMESPACES };
    let (namespace, name) = (namespace(space), format!("pod{place}"));
    let node = if place < local { 0 } else { 1 + place % 9 };
    let [high, low] = u16::try_from(place + 2).unwrap_or(u16::MAX).to_be_bytes();
    let ip = Ipv4Addr::new(10, 244, 8 * u8::try_from(node).unwrap_or(0) + high, low);
    let object = json!({
        "metadata": {"namespace": namespace, "name": name, "labels": {
            "app": format!("app{}", place / 7 % 5), "pod": format!("pod{place}"),
        }},
        "spec": {"nodeName": format!("node{node}"), "containers": [{
            "name": "main", "image": "registry/app:1", "ports": [
                {"name": "web", "containerPort": 8080 + place % 2}, {"name": "metrics", "containerPort": 9090},
            ],
        }]},
        "status": {"podIP": ip, "podIPs": [{"ip": ip}], "phase": "Running"},
    });
    (format!("/api/v1/namespaces/{namespace}/pods/{name}"), object, ip)
}

/// A policy of the big cluster: ten in each namespace, each with a pod peer, a namespace peer, a block with an
/// exception, a number, a range and a name.
pub(crate) fn cluster_policy(place: usize) -> (String, Value) {
    let (namespace, name) = (namespace(place % NAMESPACES), format!("policy{place}"));
    let app = place / NAMESPACES;
    let single = json!({"matchLabels": {"pod": format!("pod{}", place * 2)}});
    let team = json!({"matchLabels": {"team": format!("team{}", place % 10)}});
    let elsewhere = json!({"namespaceSelector": team, "podSelector": single});
    let block = json!({"ipBlock": {
        "cidr": format!("172.{}.0.0/16", place % 200),
        "except": [format!("172.{}.{}.0/24", place % 200, place / 200)],
    }});
    let first = 1000 + place;
    let object = json!({
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "podSelector": {"matchLabels": {"app": format!("app{}", app % 5)}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [{"podSelector": single}, elsewhere], "ports": [{"port": 80}, {"port": "web"}]},
                {"from": [block], "ports": [{"port": first, "endPort": first + 500}]},
            ],
            "egress": [{"to": [elsewhere, block], "ports": [{"port": "metrics"}, {"port": 443}]}],
        },
    });
    (format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/{name}"), object)
}
