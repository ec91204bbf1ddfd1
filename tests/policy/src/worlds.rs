//! Random clusters, small enough that everything meets everything, and the questions to ask about them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, Namespace, Pod, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer,
    NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    LabelSelector, LabelSelectorRequirement, ObjectMeta, Time,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proptest::collection::vec;
use proptest::option::{self, weighted};
use proptest::prelude::{BoxedStrategy, Just, Strategy, any, prop_oneof};
use proptest::sample::{select, subsequence};
use serde_json::{Value, json};

use crate::oracle::{Cluster, Traffic, addresses};

pub const NAMESPACES: [&str; 3] = ["x", "y", "z"];
pub const NODES: [&str; 2] = ["one", "two"];
const KEYS: [&str; 3] = ["app", "tier", "ns"];
const VALUES: [&str; 3] = ["a", "b", "c"];
const PORT_NAMES: [&str; 3] = ["web", "dns", "none"];
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
const PORTS: [u16; 8] = [1, 53, 80, 81, 443, 8080, 30000, 65535];

/// Blocks around, beside and inside the pods' addresses. Written with host bits in two places: they do not count.
const CIDRS: [&str; 18] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.244.0.0/16",
    "10.244.1.0/24",
    "10.244.2.7/24",
    "10.244.1.0/29",
    "10.244.1.4/30",
    "10.244.1.2/32",
    "10.244.2.3/32",
    "172.31.0.0/24",
    "172.31.0.11/32",
    "192.0.2.0/24",
    "192.0.2.128/25",
    "192.0.2.77/32",
    "::/0",
    "fd00:10:244::/48",
    "fd00:10:244:1::9/64",
    "fd00:10:244:1::2/128",
];

/// Addresses of no pod.
const OUTSIDE: [&str; 9] = [
    "10.244.1.77",
    "10.244.9.9",
    "10.0.0.1",
    "192.0.2.1",
    "192.0.2.77",
    "192.0.2.200",
    "203.0.113.9",
    "fd00:10:244:1::77",
    "2001:db8::1",
];

fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    let one = (select(&KEYS[..]), select(&VALUES[..]));
    vec(one, 0..3).prop_map(|list| {
        list.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    })
}

fn selector() -> impl Strategy<Value = LabelSelector> {
    let values = subsequence(&VALUES[..], 1..=2);
    let expression = (select(&KEYS[..]), 0..4, values).prop_map(|(key, operator, values)| {
        let values: Vec<String> = values.into_iter().map(str::to_owned).collect();
        let (operator, values) = match operator {
            0 => ("In", Some(values)),
            1 => ("NotIn", Some(values)),
            2 => ("Exists", None),
            _ => ("DoesNotExist", None),
        };
        LabelSelectorRequirement { key: key.to_owned(), operator: operator.to_owned(), values }
    });
    prop_oneof![
        2 => Just(LabelSelector::default()),
        4 => labels().prop_map(|labels| LabelSelector { match_labels: Some(labels), ..Default::default() }),
        3 => (option::of(labels()), vec(expression, 1..3)).prop_map(|(match_labels, expressions)| {
            LabelSelector { match_labels, match_expressions: Some(expressions) }
        }),
    ]
}

fn block() -> impl Strategy<Value = IPBlock> {
    (select(&CIDRS[..]), option::of(vec(select(&CIDRS[..]), 0..3))).prop_map(|(cidr, except)| {
        let inside = |inner: &&str| {
            inner.contains(':') == cidr.contains(':') && length(inner) > length(cidr)
        };
        // An exception that lies elsewhere is not valid; it would have no effect either, and is kept at times.
        let except =
            except.map(|list| list.into_iter().filter(inside).map(str::to_owned).collect());
        IPBlock { cidr: cidr.to_owned(), except }
    })
}

fn length(cidr: &str) -> u8 {
    cidr.split_once('/').and_then(|(_, length)| length.parse().ok()).expect("a good CIDR")
}

fn peer() -> impl Strategy<Value = NetworkPolicyPeer> {
    let pods = |pods| NetworkPolicyPeer { pod_selector: Some(pods), ..Default::default() };
    let namespaces =
        |all| NetworkPolicyPeer { namespace_selector: Some(all), ..Default::default() };
    prop_oneof![
        3 => selector().prop_map(pods),
        3 => selector().prop_map(namespaces),
        3 => (selector(), selector()).prop_map(|(namespaces, pods)| NetworkPolicyPeer {
            namespace_selector: Some(namespaces),
            pod_selector: Some(pods),
            ip_block: None,
        }),
        4 => block().prop_map(|block| NetworkPolicyPeer { ip_block: Some(block), ..Default::default() }),
    ]
}

fn policy_port() -> impl Strategy<Value = NetworkPolicyPort> {
    let number = prop_oneof![3 => select(&PORTS[..]), 1 => any::<u16>()];
    let range = (number.clone(), any::<u16>()).prop_map(|(first, more)| {
        let last = first.saturating_add(more >> (first % 16));
        (Some(IntOrString::Int(first.into())), Some(i32::from(last)))
    });
    let port = prop_oneof![
        2 => Just((None, None)),
        4 => number.prop_map(|number| (Some(IntOrString::Int(number.into())), None)),
        3 => range,
        3 => select(&PORT_NAMES[..]).prop_map(|name| (Some(IntOrString::String(name.to_owned())), None)),
    ];
    (option::of(select(&PROTOCOLS[..])), port).prop_map(|(protocol, (port, end_port))| {
        NetworkPolicyPort { protocol: protocol.map(str::to_owned), port, end_port }
    })
}

fn rule() -> impl Strategy<Value = (Option<Vec<NetworkPolicyPeer>>, Option<Vec<NetworkPolicyPort>>)>
{
    (weighted(0.85, vec(peer(), 0..4)), weighted(0.6, vec(policy_port(), 0..4)))
}

fn policy() -> impl Strategy<Value = NetworkPolicy> {
    let types = prop_oneof![
        3 => Just(None),
        1 => Just(Some(vec![])),
        2 => Just(Some(vec!["Ingress".to_owned()])),
        2 => Just(Some(vec!["Egress".to_owned()])),
        2 => Just(Some(vec!["Egress".to_owned(), "Ingress".to_owned()])),
    ];
    let rules = || option::of(vec(rule(), 0..4));
    (select(&NAMESPACES[..]), selector(), types, rules(), rules()).prop_map(
        |(namespace, pods, policy_types, ingress, egress)| {
            let ingress = ingress.map(|rules| {
                let rule = |(from, ports)| NetworkPolicyIngressRule { from, ports };
                rules.into_iter().map(rule).collect()
            });
            let egress = egress.map(|rules| {
                rules.into_iter().map(|(to, ports)| NetworkPolicyEgressRule { ports, to }).collect()
            });
            let spec =
                NetworkPolicySpec { pod_selector: Some(pods), policy_types, ingress, egress };
            NetworkPolicy { metadata: meta(namespace, ""), spec: Some(spec) }
        },
    )
}

/// A ClusterNetworkPolicy without name. One peer in some dozens cannot be understood.
fn cluster_policy() -> impl Strategy<Value = Value> {
    let pods = || {
        prop_oneof![
            selector().prop_map(|namespaces| json!({"namespaces": namespaces})),
            (selector(), selector()).prop_map(|(namespaces, pods)| {
                json!({"pods": {"namespaceSelector": namespaces, "podSelector": pods}})
            }),
        ]
        .boxed()
    };
    let unknown = Just(json!({"future": {}}));
    let source = prop_oneof![40 => pods(), 1 => unknown.clone()].boxed();
    let destination = prop_oneof![
        20 => pods(),
        15 => vec(select(&CIDRS[..]), 1..4).prop_map(|list| json!({"networks": list})),
        5 => selector().prop_map(|nodes| json!({"nodes": nodes})),
        1 => unknown,
        1 => Just(json!({"domainNames": ["example.com"]})),
    ]
    .boxed();
    let number = || prop_oneof![3 => select(&PORTS[..]), 1 => 1..=u16::MAX];
    let port = prop_oneof![
        number().prop_map(|number| json!({"number": number})),
        (number(), any::<u16>()).prop_map(|(start, more)| {
            let start = start.min(u16::MAX - 1);
            let end = start.saturating_add(1).saturating_add(more >> (start % 16));
            json!({"range": {"start": start, "end": end}})
        }),
    ];
    let protocol = prop_oneof![
        5 => (select(&["tcp", "udp", "sctp"][..]), port)
            .prop_map(|(protocol, port)| json!({protocol: {"destinationPort": port}})),
        1 => select(&PORT_NAMES[..]).prop_map(|name| json!({"destinationNamedPort": name})),
    ];
    let protocols = weighted(0.6, vec(protocol, 1..4)).boxed();
    let rule = |key: &'static str, peer: BoxedStrategy<Value>| {
        let action = select(&["Accept", "Deny", "Pass"][..]);
        (action, vec(peer, 1..4), protocols.clone()).prop_map(move |(action, peers, protocols)| {
            let mut rule = json!({"action": action, key: peers});
            if let Some(protocols) = protocols {
                rule["protocols"] = json!(protocols);
            }
            rule
        })
    };
    let tier = select(&["Admin", "Baseline"][..]);
    let rules = (vec(rule("from", source), 0..4), vec(rule("to", destination), 0..4));
    (tier, 0..4, pods(), rules).prop_map(|(tier, priority, subject, (ingress, egress))| {
        json!({"spec": {"tier": tier, "priority": priority, "subject": subject,
            "ingress": ingress, "egress": egress}})
    })
}

fn meta(namespace: &str, name: &str) -> ObjectMeta {
    ObjectMeta {
        namespace: Some(namespace.to_owned()),
        name: Some(name.to_owned()),
        ..Default::default()
    }
}

fn container() -> impl Strategy<Value = Container> {
    let port = (option::of(select(&PORT_NAMES[..2])), select(&PROTOCOLS[..]), select(&PORTS[..]))
        .prop_map(|(name, protocol, number)| ContainerPort {
            name: name.map(str::to_owned),
            protocol: (protocol != "TCP").then(|| protocol.to_owned()),
            container_port: number.into(),
            ..Default::default()
        });
    vec(port, 0..4).prop_map(|ports| Container { ports: Some(ports), ..Default::default() })
}

/// A pod without name and address.
fn pod() -> impl Strategy<Value = Pod> {
    let init = container().prop_flat_map(|container| {
        any::<bool>().prop_map(move |always| Container {
            restart_policy: always.then(|| "Always".to_owned()),
            ..container.clone()
        })
    });
    let phase = select(&["Running", "Running", "Running", "Pending", "Succeeded", "Failed"][..]);
    let containers = (vec(container(), 1..3), option::of(vec(init, 0..2)));
    let kind = (weighted(0.1, Just(true)), phase, weighted(0.9, any::<bool>()));
    (select(&NAMESPACES[..]), labels(), select(&NODES[..]), containers, kind).prop_map(
        |(namespace, labels, node, (containers, init_containers), (host_network, phase, dual))| {
            let spec = PodSpec {
                node_name: Some(node.to_owned()),
                host_network,
                containers,
                init_containers,
                ..Default::default()
            };
            // One family or two; `None` has no address yet.
            let ips = dual.map(|dual| vec![PodIP::default(); 1 + usize::from(dual)]);
            let status =
                PodStatus { phase: Some(phase.to_owned()), pod_ips: ips, ..Default::default() };
            let metadata = ObjectMeta { labels: Some(labels), ..meta(namespace, "") };
            Pod { metadata, spec: Some(spec), status: Some(status) }
        },
    )
}

/// Gives names and addresses by the place in the list; host-network pods have their node's.
fn settle(
    mut pods: Vec<Pod>,
    mut policies: Vec<NetworkPolicy>,
    mut cluster_policies: Vec<Value>,
    labels: Vec<BTreeMap<String, String>>,
) -> Cluster {
    let nodes = node_addresses();
    for (place, pod) in (1_u8..).zip(&mut pods) {
        pod.metadata.name = Some(format!("p{place}"));
        let spec = pod.spec.as_ref().expect("made with spec");
        let node = NODES.iter().position(|node| Some(*node) == spec.node_name.as_deref());
        let node = node.expect("one of the nodes");
        let host = spec.host_network == Some(true);
        let subnet = u8::try_from(node + 1).expect("few nodes");
        let own = [
            IpAddr::from(Ipv4Addr::new(10, 244, subnet, place)),
            IpAddr::from(Ipv6Addr::new(0xfd00, 0x10, 0x244, subnet.into(), 0, 0, 0, place.into())),
        ];
        let status = pod.status.as_mut().expect("made with status");
        let ips = status.pod_ips.iter_mut().flatten();
        for (ip, own) in ips.zip(if host { [nodes[node].1[0]; 2] } else { own }) {
            ip.ip = own.to_string();
        }
        status.pod_ip = status.pod_ips.iter().flatten().next().map(|ip| ip.ip.clone());
    }
    for (place, policy) in policies.iter_mut().enumerate() {
        policy.metadata.name = Some(format!("n{place}"));
    }
    for (place, policy) in cluster_policies.iter_mut().enumerate() {
        policy["metadata"] = json!({"name": format!("c{place}")});
    }
    let mut labels = labels.into_iter();
    let namespaces = NAMESPACES.iter().zip(labels.by_ref()).map(|(name, labels)| Namespace {
        metadata: ObjectMeta {
            name: Some((*name).to_owned()),
            labels: Some(labels),
            creation_timestamp: Some(Time(jiff::Timestamp::UNIX_EPOCH)),
            ..Default::default()
        },
        ..Default::default()
    });
    let namespaces = namespaces.collect();
    let node_labels = NODES.iter().map(|name| (*name).to_owned()).zip(labels).collect();
    Cluster { namespaces, pods, policies, cluster_policies, nodes, node_labels }
}

/// Underlay and overlay address of each node.
fn node_addresses() -> Vec<(String, Vec<IpAddr>)> {
    (0_u8..)
        .zip(NODES)
        .map(|(place, name)| {
            let underlay = IpAddr::from(Ipv4Addr::new(172, 31, 0, 10 + place));
            let overlay = IpAddr::from(Ipv4Addr::new(10, 244, place + 1, 0));
            (name.to_owned(), vec![underlay, overlay])
        })
        .collect()
}

/// A cluster of at most so many pods and policies.
pub fn cluster(pods: usize, policies: usize) -> impl Strategy<Value = Cluster> {
    let labels = vec(labels(), NAMESPACES.len() + NODES.len());
    // Half of the clusters have none of the newer kind.
    let newer = prop_oneof![Just(vec![]), vec(cluster_policy(), 1..4)];
    (vec(pod(), 1..=pods), vec(policy(), 0..=policies), newer, labels)
        .prop_map(|(pods, policies, newer, labels)| settle(pods, policies, newer, labels))
}

/// Something that happens.
#[derive(Debug, Clone)]
pub enum Change {
    Label(usize, BTreeMap<String, String>),
    RelabelNamespace(usize, BTreeMap<String, String>),
    Phase(usize, &'static str),
    DeletePod(usize),
    Add(Box<NetworkPolicy>),
    Edit(usize, Box<NetworkPolicy>),
    Delete(usize),
    AddCluster(Value),
    EditCluster(usize, Value),
    DeleteCluster(usize),
}

/// One change.
pub fn change() -> impl Strategy<Value = Change> {
    let place = || 0..100_usize;
    prop_oneof![
        (place(), labels()).prop_map(|(place, labels)| Change::Label(place, labels)),
        (place(), labels()).prop_map(|(place, labels)| Change::RelabelNamespace(place, labels)),
        (place(), select(&["Running", "Succeeded"][..]))
            .prop_map(|(place, phase)| Change::Phase(place, phase)),
        place().prop_map(Change::DeletePod),
        policy().prop_map(|policy| Change::Add(Box::new(policy))),
        (place(), policy()).prop_map(|(place, policy)| Change::Edit(place, Box::new(policy))),
        place().prop_map(Change::Delete),
        cluster_policy().prop_map(Change::AddCluster),
        (place(), cluster_policy()).prop_map(|(place, policy)| Change::EditCluster(place, policy)),
        place().prop_map(Change::DeleteCluster),
    ]
}

impl Change {
    /// The cluster after it.
    #[must_use]
    pub fn apply(&self, cluster: &Cluster) -> Cluster {
        let mut next = cluster.clone();
        let (pods, policies) = (next.pods.len(), next.policies.len());
        let newer = next.cluster_policies.len();
        match self {
            Self::Label(place, labels) if pods > 0 => {
                next.pods[place % pods].metadata.labels = Some(labels.clone());
            }
            Self::RelabelNamespace(place, labels) => {
                let place = place % next.namespaces.len();
                next.namespaces[place].metadata.labels = Some(labels.clone());
            }
            Self::Phase(place, phase) if pods > 0 => {
                if let Some(status) = &mut next.pods[place % pods].status {
                    status.phase = Some((*phase).to_owned());
                }
            }
            Self::DeletePod(place) if pods > 1 => {
                next.pods.remove(place % pods);
            }
            Self::Add(policy) => {
                let mut policy = policy.as_ref().clone();
                let taken =
                    next.policies.iter().filter_map(|policy| policy.metadata.name.as_deref());
                policy.metadata.name = Some(free_name("new", taken));
                next.policies.push(policy);
            }
            Self::Edit(place, policy) if policies > 0 => {
                let old = &mut next.policies[place % policies];
                // A policy stays in its namespace under its name.
                old.spec = policy.spec.clone();
            }
            Self::Delete(place) if policies > 0 => {
                next.policies.remove(place % policies);
            }
            Self::AddCluster(policy) => {
                let mut policy = policy.clone();
                let taken = next.cluster_policies.iter().map(|policy| &policy["metadata"]["name"]);
                let name = free_name("newc", taken.filter_map(Value::as_str));
                policy["metadata"] = json!({"name": name});
                next.cluster_policies.push(policy);
            }
            Self::EditCluster(place, policy) if newer > 0 => {
                next.cluster_policies[place % newer]["spec"] = policy["spec"].clone();
            }
            Self::DeleteCluster(place) if newer > 0 => {
                next.cluster_policies.remove(place % newer);
            }
            _ => {}
        }
        next
    }
}

/// A name that no object has yet: a cluster holds one object of a name.
fn free_name<'a>(prefix: &str, taken: impl Iterator<Item = &'a str>) -> String {
    let taken: BTreeSet<&str> = taken.collect();
    let mut names = (0..=taken.len()).map(|number| format!("{prefix}{number}"));
    names.find(|name| !taken.contains(name.as_str())).expect("more names than objects")
}

/// All addresses worth asking about.
#[must_use]
pub fn interesting_addresses(cluster: &Cluster) -> BTreeSet<IpAddr> {
    let pods = cluster.pods.iter().flat_map(addresses);
    let nodes = cluster.nodes.iter().flat_map(|(_, list)| list.iter().copied());
    let outside = OUTSIDE.iter().map(|ip| ip.parse().expect("a good address"));
    pods.chain(nodes).chain(outside).collect()
}

/// Protocols and ports worth asking about: those in the objects, and their neighbours.
#[must_use]
pub fn interesting_traffic(cluster: &Cluster) -> Vec<Traffic> {
    let mut ports: BTreeSet<u16> = PORTS.into_iter().chain([0, 79, 82, 1024]).collect();
    for policy in &cluster.policies {
        let spec = policy.spec.clone().unwrap_or_default();
        let ingress = spec.ingress.into_iter().flatten().filter_map(|rule| rule.ports);
        let egress = spec.egress.into_iter().flatten().filter_map(|rule| rule.ports);
        for port in ingress.chain(egress).flatten() {
            let first = match port.port {
                Some(IntOrString::Int(first)) => Some(first),
                _ => None,
            };
            for edge in first.into_iter().chain(port.end_port) {
                ports.extend((edge - 1..=edge + 1).filter_map(|port| u16::try_from(port).ok()));
            }
        }
    }
    for policy in &cluster.cluster_policies {
        let lists = ["ingress", "egress"].map(|list| policy["spec"][list].as_array());
        let protocols =
            lists.into_iter().flatten().flatten().filter_map(|rule| rule["protocols"].as_array());
        for protocol in protocols.flatten() {
            let named = ["tcp", "udp", "sctp"].map(|key| &protocol[key]["destinationPort"]);
            let edges = named
                .iter()
                .flat_map(|port| [&port["number"], &port["range"]["start"], &port["range"]["end"]]);
            for edge in edges.filter_map(Value::as_u64) {
                let near = edge.saturating_sub(1)..=edge + 1;
                ports.extend(near.filter_map(|port| u16::try_from(port).ok()));
            }
        }
    }
    let with_ports = PROTOCOLS
        .iter()
        .flat_map(|protocol| ports.iter().map(|port| Traffic { protocol, port: *port }));
    with_ports.chain([Traffic { protocol: "ICMP", port: 0 }]).collect()
}

/// Labels by namespace, for a map that wants them.
#[must_use]
pub fn namespace_labels(cluster: &Cluster) -> BTreeMap<String, BTreeMap<String, String>> {
    cluster
        .namespaces
        .iter()
        .map(|namespace| {
            let meta = &namespace.metadata;
            (meta.name.clone().unwrap_or_default(), meta.labels.clone().unwrap_or_default())
        })
        .collect()
}
