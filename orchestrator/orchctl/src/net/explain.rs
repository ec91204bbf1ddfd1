//! `orchctl net explain`: whether policies allow a connection, and which of them says so.
//!
//! Two answers: the compiler's, from what the API server has now, which knows the names; and that of the programs on the
//! nodes, which the agents run on the connection's first packet. They differ while a change is on its way; when they go on
//! to differ, that is a defect, and it is said.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::bail;
use orch_api::cluster_policy::ClusterNetworkPolicy;
use orch_api::k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use orch_api::k8s_openapi::api::networking::v1::NetworkPolicy;
use orch_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orch_client::{Api, Client, Kind, ListParams};
use orch_ebpf_loader::{Connection, Explanation};
use orch_policy::{
    ClusterPolicy, Compiled, Direction, Name, PodFacts, Policy, Prefix, Protocol, World, compile,
};
use serde::Serialize;

use super::hosts::{Host, Hosts};
use super::{Format, print_json};
use crate::output;

/// The agent loads programs for the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A port with its protocol: `80`, `53/udp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Port {
    protocol: Protocol,
    number: u16,
}

impl std::str::FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let wrong = || format!("{text:?} is no port: use `80`, `53/udp` or `9000/sctp`");
        Ok(Self {
            protocol: Protocol::parse(Some(&protocol.to_uppercase())).ok_or_else(wrong)?,
            number: number.parse().map_err(|_| wrong())?,
        })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        };
        write!(f, "{protocol} {}", self.number)
    }
}

/// One end of the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Pod {
        name: Name,
        node: String,
        ip: IpAddr,
    },
    /// A node, or a pod that has its node's address.
    Node {
        node: String,
        ip: IpAddr,
    },
    Outside(IpAddr),
}

impl End {
    fn ip(&self) -> IpAddr {
        match self {
            Self::Pod { ip, .. } | Self::Node { ip, .. } | Self::Outside(ip) => *ip,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { name, ip, .. } => write!(f, "pod {name} ({ip})"),
            Self::Node { node, ip } => write!(f, "node {node} ({ip})"),
            Self::Outside(ip) => write!(f, "{ip}"),
        }
    }
}

/// What one end says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Said {
    end: String,
    direction: &'static str,
    allowed: bool,
    because: String,
    /// What the node's programs did, if they could be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    programs: Option<Ran>,
}

/// The programs' answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", untagged)]
enum Ran {
    Did {
        #[serde(flatten)]
        explanation: Explanation,
        /// Whether it is what the compiler says.
        agrees: bool,
    },
    NotAsked {
        #[serde(rename = "notAsked")]
        why: String,
    },
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAsked { why } => write!(f, "its node's programs were not asked: {why}"),
            Self::Did { explanation: Explanation { passed, reason, rule }, agrees } => {
                let verdict = if *passed { "pass" } else { "drop" };
                write!(f, "its node's programs {verdict} the first packet ({reason}")?;
                if let Some(rule) = rule {
                    write!(f, ", {rule}")?;
                }
                f.write_str(")")?;
                if *agrees {
                    return Ok(());
                }
                f.write_str(
                    ". THE TWO DISAGREE: ask again in a second; if they still do, see the agent's log",
                )
            }
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Explained {
    from: String,
    to: String,
    port: String,
    allowed: bool,
    ends: Vec<Said>,
}

/// Prints the answer; 1 as exit code when the connection is denied.
pub(super) async fn run(
    hosts: &Hosts,
    client: &Client,
    from: &str,
    to: &str,
    port: Port,
    namespace: &str,
    format: Option<Format>,
) -> anyhow::Result<u8> {
    let world = read(client).await?;
    let (from, to) = (find(&world, from, namespace)?, find(&world, to, namespace)?);
    let mut ends = explain(&world, &from, &to, port);
    // Without a node to look into, the compiler's answer is one, too.
    let known = hosts.all().unwrap_or_default();
    for (said, (end, other)) in ends.iter_mut().zip([(&from, &to), (&to, &from)]) {
        said.programs = ask(&known, end, other, port, said);
    }
    let explained = Explained {
        allowed: ends.iter().all(|said| said.allowed),
        from: from.to_string(),
        to: to.to_string(),
        port: port.to_string(),
        ends,
    };
    if format == Some(Format::Json) {
        print_json(&explained)?;
    } else {
        let verdict = |allowed| if allowed { "allowed" } else { "denied" };
        let Explained { from, to, port, allowed, ends } = &explained;
        output::line(&format!("{from} to {to}, {port}: {}", verdict(*allowed)))?;
        for said in ends {
            output::line(&format!(
                "- {} of {}: {}, {}",
                said.direction,
                said.end,
                verdict(said.allowed),
                said.because
            ))?;
            if let Some(programs) = &said.programs {
                output::line(&format!("  {programs}"))?;
            }
        }
    }
    Ok(u8::from(!explained.allowed))
}

/// Has the end's node run its programs; `None` where there is nothing to run.
fn ask(known: &[Host], end: &End, other: &End, port: Port, said: &Said) -> Option<Ran> {
    let End::Pod { name, node, .. } = end else { return None };
    let not_asked = |why: &str| Some(Ran::NotAsked { why: why.to_owned() });
    if end.ip() == other.ip() {
        return None;
    }
    // A host that is no lab has one node, whatever its name.
    let host = known.iter().find(|host| host.name == *node).or_else(|| match known {
        [one] if one.netns.is_none() => Some(one),
        _ => None,
    });
    let Some(host) = host else { return not_asked("it cannot be looked into from here") };
    let connection = Connection {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        incoming: said.direction == "ingress",
        peer: other.ip(),
        protocol: port.protocol.number(),
        port: port.number,
        from_node: matches!(other, End::Node { node: other, .. } if other == node),
    };
    match orch_ebpf_loader::explain(&host.paths.run().join("policy.sock"), &connection, PATIENCE) {
        Ok(explanation) => {
            let agrees = explanation.passed == said.allowed;
            Some(Ran::Did { explanation, agrees })
        }
        Err(error) => Some(Ran::NotAsked { why: format!("{:#}", anyhow::Error::from(error)) }),
    }
}

async fn list<K: Kind>(client: &Client) -> anyhow::Result<Vec<K>> {
    Ok(Api::<K>::all(client.clone()).list(&ListParams::default()).await?.items)
}

/// The cluster as the compiler reads it, for no node yet.
async fn read(client: &Client) -> anyhow::Result<World> {
    let name = |meta: &ObjectMeta| {
        Name::new(
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
        )
    };
    let pods = list::<Pod>(client).await?;
    let namespaces = list::<Namespace>(client).await?;
    let policies = list::<NetworkPolicy>(client).await?;
    let cluster_policies = list::<ClusterNetworkPolicy>(client).await?;
    let nodes = list::<Node>(client).await?;
    Ok(World {
        node: String::new(),
        pods: pods.iter().map(|pod| (name(&pod.metadata), PodFacts::from_api(pod))).collect(),
        namespaces: namespaces
            .into_iter()
            .map(|one| {
                let meta = one.metadata;
                (meta.name.unwrap_or_default(), meta.labels.unwrap_or_default())
            })
            .collect(),
        policies: policies
            .iter()
            .map(|policy| (name(&policy.metadata), Policy::from_api(policy)))
            .collect(),
        cluster_policies: cluster_policies
            .iter()
            .map(|policy| {
                let name = policy.metadata.name.clone().unwrap_or_default();
                (name, ClusterPolicy::from_api(policy))
            })
            .collect(),
        nodes: nodes.iter().map(addresses).collect::<BTreeMap<_, _>>(),
        node_labels: nodes
            .iter()
            .map(|node| {
                let meta = &node.metadata;
                (meta.name.clone().unwrap_or_default(), meta.labels.clone().unwrap_or_default())
            })
            .collect(),
        pod_ranges: Prefix::parse(orch_config::POD_CIDR).into_iter().collect(),
    })
}

fn addresses(node: &Node) -> (String, Vec<IpAddr>) {
    let told = node.status.as_ref().and_then(|status| status.addresses.as_deref());
    let ips = told.unwrap_or_default().iter().filter_map(|one| one.address.parse().ok());
    (node.metadata.name.clone().unwrap_or_default(), ips.collect())
}

/// A pod by its name or address, or any other address.
fn find(world: &World, text: &str, namespace: &str) -> anyhow::Result<End> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        if let Some((node, _)) = world.nodes.iter().find(|(_, ips)| ips.contains(&ip)) {
            return Ok(End::Node { node: node.clone(), ip });
        }
        let owner = world.pods.iter().find(|(_, pod)| !pod.finished && pod.ips.contains(&ip));
        return Ok(match owner {
            Some((name, pod)) => End::Pod { name: name.clone(), node: pod.node.clone(), ip },
            None => End::Outside(ip),
        });
    }
    let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
    let name = Name::new(namespace, name);
    let Some(pod) = world.pods.get(&name) else {
        return Err(output::hinted(
            format!("list what is there with `orchctl get pods -n {namespace}`"),
            format!("pod {:?} is absent from namespace {namespace:?}", name.name),
        ));
    };
    let Some(ip) = pod.ips.first().copied() else { bail!("pod {name} has no address yet") };
    Ok(if pod.host_network {
        End::Node { node: pod.node.clone(), ip }
    } else {
        End::Pod { name, node: pod.node.clone(), ip }
    })
}

/// What both ends say. A connection passes if both allow it.
fn explain(world: &World, from: &End, to: &End, port: Port) -> Vec<Said> {
    let own_node = |pod: &End, other: &End| matches!((pod, other), (End::Pod { node, .. }, End::Node { node: other, .. }) if node == other);
    [(from, to, Direction::Egress), (to, from, Direction::Ingress)]
        .into_iter()
        .map(|(end, other, direction)| {
            let (allowed, because) = match end {
                _ if from.ip() == to.ip() => (true, "a pod always reaches itself".to_owned()),
                _ if own_node(end, other) => {
                    (true, "a pod and its own node always reach each other".to_owned())
                }
                End::Pod { name, node, .. } => {
                    let world = World { node: node.clone(), ..world.clone() };
                    let compiled = compile(&world, &Compiled::default());
                    judge(&compiled, name, direction, other.ip(), port)
                }
                End::Node { .. } => (true, "policies are for pods with an own address".to_owned()),
                End::Outside(_) => (true, "policies are for pods".to_owned()),
            };
            let direction = match direction {
                Direction::Ingress => "ingress",
                Direction::Egress => "egress",
            };
            Said { end: end.to_string(), direction, allowed, because, programs: None }
        })
        .collect()
}

fn judge(
    compiled: &Compiled,
    pod: &Name,
    direction: Direction,
    peer: IpAddr,
    port: Port,
) -> (bool, String) {
    let said = compiled.judge(pod, direction, peer, port.protocol.number(), port.number);
    let Some(said) = said else {
        return (false, "the pod has ended, or is on no node".to_owned());
    };
    let because = match said.decided_by {
        None => "no policy selects it in this direction".to_owned(),
        Some(rule) => match rule.index {
            Some(_) => format!("by {rule}"),
            None => format!("{} selects it, and no rule of any policy allows this", rule.policy),
        },
    };
    (said.allow, because)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn world() -> World {
        let pod = |name: &str, node: &str, ip: &str, host: bool| {
            let value = json!({
                "metadata": {"namespace": "shop", "name": name, "labels": {"app": name}},
                "spec": {"nodeName": node, "hostNetwork": host, "containers": []},
                "status": {"podIP": ip},
            });
            let pod: Pod = serde_json::from_value(value).expect("a pod");
            (Name::new("shop", name), PodFacts::from_api(&pod))
        };
        let policy = |name: &str, spec: Value| {
            let value = json!({"metadata": {"namespace": "shop", "name": name}, "spec": spec});
            let policy: NetworkPolicy = serde_json::from_value(value).expect("a policy");
            (Name::new("shop", name), Policy::from_api(&policy))
        };
        World {
            pods: [
                pod("web", "one", "10.244.1.2", false),
                pod("front", "two", "10.244.2.2", false),
                pod("proxy", "one", "192.0.2.1", true),
            ]
            .into(),
            namespaces: [("shop".to_owned(), BTreeMap::new())].into(),
            policies: [
                policy("deny", json!({"podSelector": {}})),
                policy(
                    "web",
                    json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{
                        "from": [{"podSelector": {"matchLabels": {"app": "front"}}}],
                        "ports": [{"port": 80}],
                    }]}),
                ),
            ]
            .into(),
            nodes: [
                ("one".to_owned(), vec![IpAddr::from([192, 0, 2, 1])]),
                ("two".to_owned(), vec![IpAddr::from([192, 0, 2, 2])]),
            ]
            .into(),
            ..World::default()
        }
    }

    fn ask(from: &str, to: &str, port: &str) -> Vec<(bool, String)> {
        let world = world();
        let find = |text| super::find(&world, text, "shop").expect("found");
        let said = explain(&world, &find(from), &find(to), port.parse().expect("a port"));
        said.into_iter().map(|said| (said.allowed, said.because)).collect()
    }

    #[test]
    fn the_deciding_policy_is_named() {
        let said = ask("front", "web", "80");
        assert_eq!(said[0], (true, "no policy selects it in this direction".to_owned()));
        assert_eq!(said[1], (true, "by rule 1 of policy shop/web".to_owned()));
        let said = ask("front", "10.244.1.2", "81/udp");
        let why = "policy shop/deny selects it, and no rule of any policy allows this";
        assert_eq!(said[1], (false, why.to_owned()));
        assert!(!ask("8.8.8.8", "web", "80")[1].0);
    }

    #[test]
    fn the_clusters_policies_come_before_and_after_those_of_namespaces() {
        let policy = |name: &str, tier: &str, rule: Value| {
            let value = json!({"metadata": {"name": name}, "spec": {"tier": tier, "priority": 1,
            "subject": {"namespaces": {}}, "ingress": [rule.clone()], "egress": [{
                "action": rule["action"], "to": [{"networks": ["8.8.8.0/24"]}],
            }]}});
            let policy: ClusterNetworkPolicy = serde_json::from_value(value).expect("a policy");
            (name.to_owned(), ClusterPolicy::from_api(&policy))
        };
        let rule = json!({"name": "not-telnet", "action": "Deny", "from": [{"namespaces": {}}],
            "protocols": [{"tcp": {"destinationPort": {"number": 23}}}]});
        let all = json!({"action": "Deny", "from": [{"namespaces": {}}]});
        let mut world = world();
        world.cluster_policies =
            [policy("guard", "Admin", rule), policy("rest", "Baseline", all)].into();
        let ask = |from, to, port: &str| {
            let find = |text| super::find(&world, text, "shop").expect("found");
            explain(&world, &find(from), &find(to), port.parse().expect("a port"))
        };
        let because = |said: &Said| (said.allowed, said.because.clone());
        let telnet = ask("front", "web", "23");
        let why = "by rule 1 (not-telnet) of ClusterNetworkPolicy guard";
        assert_eq!(because(&telnet[1]), (false, why.to_owned()));
        let why = "by rule 1 of policy shop/web";
        assert_eq!(
            because(&ask("front", "web", "80")[1]),
            (true, why.to_owned()),
            "not the baseline"
        );
        let out = ask("web", "8.8.8.8", "443");
        let why = "by rule 1 of ClusterNetworkPolicy guard";
        assert_eq!(because(&out[0]), (false, why.to_owned()));
    }

    #[test]
    fn nodes_reach_their_own_pods_and_host_pods_are_their_nodes() {
        assert!(ask("proxy", "web", "81")[1].0);
        assert!(!ask("192.0.2.2", "web", "81")[1].0, "another node is not exempt");
        assert!(ask("web", "front", "80")[0].0 && !ask("web", "front", "80")[1].0);
    }

    #[test]
    fn ports_are_read() {
        assert_eq!("53/udp".parse::<Port>().expect("a port").to_string(), "UDP 53");
        for bad in ["web", "80/icmp", "70000", ""] {
            assert!(bad.parse::<Port>().is_err(), "{bad}");
        }
    }
}
