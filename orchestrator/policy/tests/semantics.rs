//! What each field of a NetworkPolicy does, case by case, in words of the API. `tests/policy` asks at random; here each
//! case has a name.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use orch_policy::{
    Class, Compiled, Direction, Name, PeerKind, Plan, PodFacts, Policy, Prefix, World, compile,
};
use serde_json::{Value, json};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const ICMP: u8 = 1;

/// Three namespaces; `x/web` serves 8080 as "web" on this node, `x/client`, `y/client` and `z/other` are elsewhere.
struct Cluster {
    world: World,
}

impl Cluster {
    fn new() -> Self {
        let mut cluster = Self { world: World { node: "here".to_owned(), ..World::default() } };
        for (namespace, team) in [("x", "red"), ("y", "red"), ("z", "blue")] {
            let labels = [("kubernetes.io/metadata.name", namespace), ("team", team)];
            let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
            cluster.world.namespaces.insert(namespace.to_owned(), BTreeMap::from(labels));
        }
        cluster.world.pod_ranges = vec![Prefix::parse("10.244.0.0/16").expect("a range")];
        cluster.pod("x/web", "here", "10.244.1.2", json!({"app": "web"}));
        cluster.pod("x/client", "there", "10.244.2.2", json!({"app": "client"}));
        cluster.pod("y/client", "there", "10.244.2.3", json!({"app": "client"}));
        cluster.pod("z/other", "there", "10.244.2.4", json!({"app": "other"}));
        cluster
    }

    fn pod(&mut self, name: &str, node: &str, ip: &str, labels: Value) {
        let ports = json!([
            {"name": "web", "containerPort": 8080},
            {"name": "dns", "containerPort": 53, "protocol": "UDP"}
        ]);
        self.pod_with(
            name,
            node,
            ip,
            labels,
            json!({"containers": [{"name": "c", "ports": ports}]}),
        );
    }

    fn pod_with(&mut self, path: &str, node: &str, ip: &str, labels: Value, mut spec: Value) {
        spec["nodeName"] = json!(node);
        let pod = json!({
            "metadata": {"labels": labels},
            "spec": spec,
            "status": {"podIP": ip, "podIPs": [{"ip": ip}]}
        });
        let pod = serde_json::from_value(pod).expect("a pod");
        self.world.pods.insert(name(path), PodFacts::from_api(&pod));
    }

    fn policy(&mut self, path: &str, spec: Value) {
        let name = name(path);
        let policy =
            json!({"metadata": {"namespace": name.namespace, "name": name.name}, "spec": spec});
        let policy = serde_json::from_value(policy).expect("a policy");
        self.world.policies.insert(name, Policy::from_api(&policy));
    }

    /// What the world is with one policy on `x/web`.
    fn with(spec: Value) -> Self {
        let mut cluster = Self::new();
        cluster.policy("x/one", spec);
        cluster
    }

    fn compile(&self) -> Compiled {
        compile(&self.world, &Compiled::default())
    }

    fn allows(&self, direction: Direction, other: &str, protocol: u8, port: u16) -> bool {
        let other: IpAddr = other.parse().expect("an address");
        let compiled = self.compile();
        let judged = compiled.judge(&name("x/web"), direction, other, protocol, port);
        judged.expect("x/web is an endpoint").allow
    }

    /// Which of the pods, and of an outside address, may send to port 80.
    fn sources(&self) -> Vec<&'static str> {
        let all = [
            ("x/client", "10.244.2.2"),
            ("y/client", "10.244.2.3"),
            ("z/other", "10.244.2.4"),
            ("outside", "192.0.2.1"),
        ];
        let may = |(_, ip): &(_, &str)| self.allows(Direction::Ingress, ip, TCP, 80);
        all.iter().filter(|one| may(one)).map(|(name, _)| *name).collect()
    }
}

fn name(path: &str) -> Name {
    let (namespace, name) = path.split_once('/').expect("namespace/name");
    Name::new(namespace, name)
}

#[test]
fn a_pod_without_policy_is_open_both_ways() {
    let cluster = Cluster::new();
    assert_eq!(cluster.sources(), ["x/client", "y/client", "z/other", "outside"]);
    assert!(cluster.allows(Direction::Egress, "192.0.2.1", UDP, 53));
    assert!(cluster.allows(Direction::Ingress, "10.244.9.9", ICMP, 0), "an unknown pod");
}

#[test]
fn an_empty_policy_denies_ingress_and_leaves_egress_alone() {
    for spec in [json!({}), json!({"podSelector": {}}), json!({"podSelector": {}, "ingress": []})] {
        let cluster = Cluster::with(spec);
        assert!(cluster.sources().is_empty());
        assert!(!cluster.allows(Direction::Ingress, "192.0.2.1", ICMP, 0), "no ping either");
        assert!(cluster.allows(Direction::Egress, "192.0.2.1", TCP, 80));
    }
}

#[test]
fn egress_without_types_is_meant_only_by_egress_rules() {
    let ingress = |spec| Cluster::with(spec).allows(Direction::Ingress, "192.0.2.1", TCP, 80);
    let egress = |spec| Cluster::with(spec).allows(Direction::Egress, "192.0.2.1", TCP, 80);
    assert!(egress(json!({"podSelector": {}, "egress": []})));
    assert!(!egress(json!({"podSelector": {}, "egress": [{"ports": [{"port": 443}]}]})));
    assert!(!egress(json!({"podSelector": {}, "policyTypes": ["Egress"]})));
    assert!(ingress(json!({"podSelector": {}, "policyTypes": ["Egress"]})));
    // Rules of a direction that is not listed have no effect.
    let listed = json!({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}], "egress": [{"ports": []}]});
    assert!(egress(listed.clone()) && ingress(listed));
}

#[test]
fn an_empty_rule_allows_everything() {
    let cluster = Cluster::with(json!({"podSelector": {}, "ingress": [{}]}));
    assert_eq!(cluster.sources().len(), 4);
    assert!(cluster.allows(Direction::Ingress, "192.0.2.1", ICMP, 0));
    let cluster = Cluster::with(json!({"podSelector": {}, "ingress": [{"from": [], "ports": []}]}));
    assert_eq!(cluster.sources().len(), 4);
}

#[test]
fn peers_mean_what_they_say() {
    let sources = |from: Value| {
        Cluster::with(json!({"podSelector": {}, "ingress": [{"from": from}]})).sources()
    };
    let client = json!({"matchLabels": {"app": "client"}});
    let red = json!({"matchLabels": {"team": "red"}});
    assert_eq!(
        sources(json!([{"podSelector": client}])),
        ["x/client"],
        "the policy's own namespace"
    );
    assert_eq!(sources(json!([{"namespaceSelector": red}])), ["x/client", "y/client"]);
    assert_eq!(
        sources(json!([{"namespaceSelector": {}}])),
        ["x/client", "y/client", "z/other"],
        "no outside"
    );
    let both =
        json!([{"podSelector": client, "namespaceSelector": {"matchLabels": {"team": "blue"}}}]);
    assert!(sources(both).is_empty(), "one item: both must hold");
    let either =
        json!([{"podSelector": client}, {"namespaceSelector": {"matchLabels": {"team": "blue"}}}]);
    assert_eq!(sources(either), ["x/client", "z/other"], "two items: one must hold");
    let absent = json!([{"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "NotIn", "values": ["red"]}]}}]);
    assert_eq!(sources(absent), ["z/other"]);
}

#[test]
fn blocks_mean_addresses_also_of_pods() {
    let sources = |from: Value| {
        Cluster::with(json!({"podSelector": {}, "ingress": [{"from": from}]})).sources()
    };
    assert_eq!(sources(json!([{"ipBlock": {"cidr": "0.0.0.0/0"}}])).len(), 4);
    assert_eq!(sources(json!([{"ipBlock": {"cidr": "10.244.2.3/32"}}])), ["y/client"]);
    let except = json!([{"ipBlock": {"cidr": "10.244.2.0/24", "except": ["10.244.2.2/31"]}}]);
    assert_eq!(sources(except), ["z/other"]);
    // An exception belongs to its item: another item may allow the address.
    let again = json!([
        {"ipBlock": {"cidr": "10.244.2.0/24", "except": ["10.244.2.2/31"]}},
        {"podSelector": {"matchLabels": {"app": "client"}}}
    ]);
    assert_eq!(sources(again), ["x/client", "z/other"]);
    let inside = json!([
        {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.244.2.0/24"]}},
        {"ipBlock": {"cidr": "10.244.2.4/32"}}
    ]);
    assert_eq!(sources(inside), ["z/other"]);
    assert!(sources(json!([{"ipBlock": {"cidr": "::/0"}}])).is_empty(), "the other family");
}

#[test]
fn what_cannot_be_understood_allows_nothing() {
    let sources = |from: Value| {
        Cluster::with(json!({"podSelector": {}, "ingress": [{"from": from}]})).sources()
    };
    assert!(sources(json!([{}])).is_empty(), "a peer without selector is not everyone");
    assert!(sources(json!([{"ipBlock": {"cidr": "nonsense"}}])).is_empty());
    assert!(
        sources(json!([{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["nonsense"]}}])).is_empty()
    );
    let odd = json!([{"podSelector": {"matchExpressions": [{"key": "app", "operator": "Like", "values": ["c"]}]}}]);
    assert!(sources(odd).is_empty());
    let ports = |ports: Value| {
        Cluster::with(json!({"podSelector": {}, "ingress": [{"ports": ports}]})).sources()
    };
    assert!(ports(json!([{"protocol": "GRE"}])).is_empty());
    assert!(ports(json!([{"port": 80, "endPort": 79}])).is_empty());
    assert!(ports(json!([{"port": "web", "endPort": 90}])).is_empty());
    assert!(ports(json!([{"endPort": 90}])).is_empty());
    // A policy whose own selector cannot be understood selects everyone.
    let odd = json!({"podSelector": {"matchExpressions": [{"key": "app", "operator": "Like"}]}});
    assert!(Cluster::with(odd).sources().is_empty());
}

#[test]
fn ports_protocols_and_ranges() {
    let cluster = Cluster::with(json!({"podSelector": {}, "ingress": [{"ports": [
        {"port": 80},
        {"protocol": "UDP", "port": 1000, "endPort": 2000},
        {"protocol": "SCTP"}
    ]}]}));
    let allows = |protocol, port| cluster.allows(Direction::Ingress, "192.0.2.1", protocol, port);
    assert!(allows(TCP, 80) && !allows(TCP, 79) && !allows(TCP, 81));
    assert!(!allows(UDP, 80), "an absent protocol is TCP");
    assert!(allows(UDP, 1000) && allows(UDP, 1500) && allows(UDP, 2000));
    assert!(!allows(UDP, 999) && !allows(UDP, 2001) && !allows(TCP, 1500));
    assert!(allows(SCTP, 1) && allows(SCTP, 65535), "a protocol without port has all");
    assert!(!allows(ICMP, 0), "rules with ports mean no other protocol");
}

#[test]
fn an_sctp_policy_isolates_for_tcp_too() {
    let cluster = Cluster::with(
        json!({"podSelector": {}, "ingress": [{"ports": [{"protocol": "SCTP", "port": 80}]}]}),
    );
    assert!(!cluster.allows(Direction::Ingress, "192.0.2.1", TCP, 80));
    assert!(cluster.allows(Direction::Ingress, "192.0.2.1", SCTP, 80));
}

#[test]
fn named_ingress_ports_are_the_selected_pods_own() {
    let cluster = Cluster::with(json!({"podSelector": {}, "ingress": [{"ports": [
        {"port": "web"}, {"port": "absent"}, {"protocol": "TCP", "port": "dns"}
    ]}]}));
    assert!(cluster.allows(Direction::Ingress, "192.0.2.1", TCP, 8080));
    assert!(!cluster.allows(Direction::Ingress, "192.0.2.1", TCP, 80));
    assert!(!cluster.allows(Direction::Ingress, "192.0.2.1", TCP, 53), "the name is UDP's");
    assert!(!cluster.allows(Direction::Ingress, "192.0.2.1", UDP, 53), "the rule is TCP's");
}

#[test]
fn named_egress_ports_are_looked_up_at_each_destination() {
    let mut cluster =
        Cluster::with(json!({"podSelector": {}, "egress": [{"ports": [{"port": "web"}]}]}));
    // Same labels, other number.
    let ports = json!([{"name": "web", "containerPort": 9000}]);
    let spec = json!({"containers": [{"name": "c", "ports": ports}]});
    cluster.pod_with("x/other", "there", "10.244.2.9", json!({"app": "client"}), spec);
    let allows = |ip, port| cluster.allows(Direction::Egress, ip, TCP, port);
    assert!(allows("10.244.2.2", 8080) && !allows("10.244.2.2", 9000));
    assert!(allows("10.244.2.9", 9000) && !allows("10.244.2.9", 8080));
    assert!(!allows("192.0.2.1", 8080), "outside addresses have no names");
}

#[test]
fn a_name_means_the_ports_of_all_containers_and_sidecars() {
    let mut cluster =
        Cluster::with(json!({"podSelector": {}, "ingress": [{"ports": [{"port": "m"}]}]}));
    let port = |number: u16| json!([{"name": "m", "containerPort": number}]);
    let spec = json!({
        "containers": [{"name": "a", "ports": port(1)}, {"name": "b", "ports": port(2)}],
        "initContainers": [
            {"name": "side", "restartPolicy": "Always", "ports": port(3)},
            {"name": "first", "ports": port(4)}
        ]
    });
    cluster.pod_with("x/web", "here", "10.244.1.2", json!({}), spec);
    let open: Vec<u16> =
        (0..6).filter(|port| cluster.allows(Direction::Ingress, "192.0.2.1", TCP, *port)).collect();
    assert_eq!(open, [1, 2, 3]);
}

#[test]
fn policies_add_up() {
    let mut cluster = Cluster::with(json!({"podSelector": {}}));
    assert!(cluster.sources().is_empty());
    let client = json!([{"podSelector": {"matchLabels": {"app": "client"}}}]);
    cluster.policy("x/two", json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": client, "ports": [{"port": 80}]}]}));
    cluster.policy(
        "x/three",
        json!({"podSelector": {"matchLabels": {"app": "nobody"}}, "ingress": [{}]}),
    );
    cluster.policy("y/four", json!({"podSelector": {}, "ingress": [{}]}));
    assert_eq!(
        cluster.sources(),
        ["x/client"],
        "other pods' and other namespaces' policies do not count"
    );
    assert!(!cluster.allows(Direction::Ingress, "10.244.2.2", TCP, 81));
}

#[test]
fn host_network_pods_are_neither_subject_nor_peer() {
    let mut cluster = Cluster::with(
        json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]}),
    );
    let spec = json!({"hostNetwork": true, "containers": [{"name": "c"}]});
    cluster.pod_with("x/host", "here", "172.31.0.1", json!({}), spec);
    cluster.world.nodes.insert("here".to_owned(), vec![IpAddr::from([172, 31, 0, 1])]);
    cluster.world.nodes.insert("there".to_owned(), vec![IpAddr::from([172, 31, 0, 2])]);
    assert!(
        !cluster.allows(Direction::Ingress, "172.31.0.1", TCP, 80),
        "the exemption is the data plane's"
    );
    let compiled = cluster.compile();
    assert!(!compiled.endpoints.contains_key(&name("x/host")));
    let kind = |ip: &str| compiled.peer(ip.parse().expect("an address")).kind;
    assert_eq!(kind("172.31.0.1"), PeerKind::LocalNode);
    assert_eq!(kind("172.31.0.2"), PeerKind::RemoteNode);
    assert_eq!(kind("10.244.2.2"), PeerKind::Pod);
    assert_eq!(kind("10.244.7.7"), PeerKind::UnknownPod);
    assert_eq!(kind("192.0.2.1"), PeerKind::Outside);
}

#[test]
fn finished_pods_and_pods_without_address_are_no_peers() {
    let mut cluster = Cluster::with(
        json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]}),
    );
    assert_eq!(cluster.sources(), ["x/client", "y/client", "z/other"]);
    cluster.world.pods.get_mut(&name("x/client")).expect("is there").finished = true;
    cluster.world.pods.get_mut(&name("y/client")).expect("is there").ips.clear();
    assert_eq!(cluster.sources(), ["z/other"]);
    // A pod of this node is an endpoint before it has an address.
    cluster.world.pods.get_mut(&name("x/web")).expect("is there").ips.clear();
    assert_eq!(cluster.sources(), ["z/other"]);
}

#[test]
fn a_reused_address_is_its_present_owners() {
    let client = json!([{"podSelector": {"matchLabels": {"app": "client"}}}]);
    let mut cluster = Cluster::with(json!({"podSelector": {}, "ingress": [{"from": client}]}));
    cluster.pod("x/late", "there", "10.244.2.2", json!({"app": "other"}));
    cluster.world.pods.get_mut(&name("x/late")).expect("is there").created = 100;
    assert!(cluster.sources().is_empty(), "the younger has it");
    cluster.world.pods.get_mut(&name("x/late")).expect("is there").leaving = true;
    assert_eq!(cluster.sources(), ["x/client"], "who leaves has it no longer");
}

#[test]
fn a_pod_of_an_unknown_namespace_matches_no_namespace_selector() {
    let from = json!([{"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "DoesNotExist"}]}}, {"namespaceSelector": {}}]);
    let mut cluster = Cluster::with(json!({"podSelector": {}, "ingress": [{"from": from}]}));
    cluster.world.namespaces.remove("y");
    assert_eq!(cluster.sources(), ["x/client", "z/other"]);
}

#[test]
fn ipv6_is_judged_like_ipv4() {
    let except = json!({"ipBlock": {"cidr": "fd00::/8", "except": ["fd00:1::/32"]}});
    let mut cluster = Cluster::with(
        json!({"podSelector": {}, "egress": [{"to": [except, {"podSelector": {}}]}]}),
    );
    cluster.pod("x/six", "there", "fd00:1::6", json!({}));
    let allows = |ip| cluster.allows(Direction::Egress, ip, TCP, 80);
    assert!(allows("fd00:2::1") && !allows("fd00:1::1") && allows("fd00:1::6"));
    assert!(!allows("2001:db8::1") && allows("10.244.2.2") && !allows("192.0.2.1"));
}

#[test]
fn the_deciding_rule_is_named() {
    let client = json!([{"podSelector": {"matchLabels": {"app": "client"}}}]);
    let mut cluster = Cluster::with(json!({"podSelector": {}, "ingress": [
        {"from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]},
        {"from": client, "ports": [{"port": 80}]}
    ]}));
    cluster.policy("x/another", json!({"podSelector": {}, "policyTypes": ["Ingress"]}));
    let compiled = cluster.compile();
    let decided = |direction, ip: &str, port| {
        let ip = ip.parse().expect("an address");
        let judged = compiled.judge(&name("x/web"), direction, ip, TCP, port).expect("an endpoint");
        judged.decided_by.map(|rule| (rule.policy.to_string(), rule.index))
    };
    let one = "policy x/one".to_owned();
    assert_eq!(decided(Direction::Ingress, "10.244.2.2", 80), Some((one.clone(), Some(1))));
    assert_eq!(decided(Direction::Ingress, "192.0.2.9", 80), Some((one, Some(0))));
    assert_eq!(
        decided(Direction::Ingress, "10.244.2.2", 81),
        Some(("policy x/another".to_owned(), None))
    );
    assert_eq!(decided(Direction::Egress, "10.244.2.2", 81), None, "no policy speaks about egress");
}

#[test]
fn equal_endpoints_share_one_table() {
    let mut cluster =
        Cluster::with(json!({"podSelector": {}, "ingress": [{"ports": [{"port": "web"}]}]}));
    for place in 10..20 {
        cluster.pod(
            &format!("x/replica{place}"),
            "here",
            &format!("10.244.1.{place}"),
            json!({"app": "web"}),
        );
    }
    let compiled = cluster.compile();
    let table = &compiled.endpoints[&name("x/web")];
    assert_eq!(compiled.endpoints.len(), 11);
    assert!(compiled.endpoints.values().all(|other| Arc::ptr_eq(table, other)));
}

#[test]
fn policies_of_other_nodes_pods_make_no_classes() {
    let mut cluster = Cluster::new();
    let from = json!([{"podSelector": {"matchLabels": {"app": "other"}}}]);
    cluster.policy("z/there", json!({"podSelector": {}, "ingress": [{"from": from}]}));
    let compiled = cluster.compile();
    let pods: std::collections::BTreeSet<Class> = compiled
        .peers
        .values()
        .filter(|peer| peer.kind == PeerKind::Pod)
        .map(|peer| peer.class)
        .collect();
    assert_eq!(pods.len(), 1, "nothing on this node tells the pods apart");
}

#[test]
fn a_relabelled_pod_moves_alone() {
    let client = json!([{"podSelector": {"matchLabels": {"app": "client"}}}]);
    let mut cluster = Cluster::with(
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": client}]}),
    );
    for place in 10..20 {
        cluster.pod(
            &format!("x/c{place}"),
            "there",
            &format!("10.244.2.{place}"),
            json!({"app": "client"}),
        );
        cluster.pod(
            &format!("x/o{place}"),
            "there",
            &format!("10.244.3.{place}"),
            json!({"app": "other"}),
        );
    }
    let before = cluster.compile();
    cluster.world.pods.get_mut(&name("x/c12")).expect("is there").labels.clear();
    let after = compile(&cluster.world, &before);
    let plan = Plan::new(&before, &after);
    assert_eq!(plan.set.len(), 1, "{plan:?}");
    assert!(plan.before.is_empty() && plan.tables.is_empty() && plan.unset.is_empty(), "{plan:?}");
    assert!(Arc::ptr_eq(&before.endpoints[&name("x/web")], &after.endpoints[&name("x/web")]));
}

#[test]
fn a_new_pod_of_a_known_kind_is_one_entry() {
    let mut cluster =
        Cluster::with(json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}));
    let before = cluster.compile();
    cluster.pod("x/new", "there", "10.244.2.50", json!({"app": "new"}));
    let plan = Plan::new(&before, &compile(&cluster.world, &before));
    assert_eq!((plan.set.len(), plan.before.len(), plan.tables.len()), (1, 0, 0), "{plan:?}");
}

#[test]
fn an_edited_policy_rewrites_the_tables_of_its_pods_only() {
    let mut cluster = Cluster::with(
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"ports": [{"port": 80}]}]}),
    );
    cluster.pod("x/beside", "here", "10.244.1.9", json!({"app": "beside"}));
    cluster.policy("x/two", json!({"podSelector": {"matchLabels": {"app": "beside"}}}));
    let before = cluster.compile();
    cluster.policy("x/one", json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"ports": [{"port": 81}]}]}));
    let after = compile(&cluster.world, &before);
    let plan = Plan::new(&before, &after);
    let published: Vec<&Name> =
        plan.before.iter().chain(&plan.tables).flat_map(|one| &one.endpoints).collect();
    assert_eq!(published, [&name("x/web")]);
    assert!(plan.set.is_empty());
    assert_eq!(before.rules, after.rules, "rule numbers stay");
}

/// Found by a random world: the block was written before its exception, which for a moment was allowed with it.
#[test]
fn an_exception_is_never_open_while_its_block_is_written() {
    let mut cluster = Cluster::with(json!({"podSelector": {}, "egress": [
        {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 443}]}
    ]}));
    let before = cluster.compile();
    let block = json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}});
    cluster.policy(
        "x/one",
        json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [block]}]}),
    );
    let after = compile(&cluster.world, &before);
    let plan = Plan::new(&before, &after);
    assert!(plan.set.len() > 1, "{plan:?}");
    let mut maps = before;
    for publish in &plan.before {
        for name in &publish.endpoints {
            maps.endpoints.insert(name.clone(), Arc::clone(&publish.table));
        }
    }
    for (prefix, peer) in &plan.set {
        maps.peers.insert(*prefix, *peer);
        let inside = IpAddr::from([10, 1, 2, 3]);
        let judged = maps.judge(&name("x/web"), Direction::Egress, inside, TCP, 80);
        assert!(!judged.expect("an endpoint").allow, "after {prefix}");
    }
}

/// An agent that starts over finds maps full of an earlier life's numbers: it takes none of them.
#[test]
fn a_new_life_starts_above_the_numbers_it_found() {
    let cluster =
        Cluster::with(json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}));
    let found = Compiled {
        next_class: Class(700),
        next_rule: orch_policy::RuleId(90),
        ..Compiled::default()
    };
    let compiled = compile(&cluster.world, &found);
    assert!(compiled.peers.values().all(|peer| peer.class >= Class(700)));
    assert!(compiled.rules.keys().all(|rule| rule.0 >= 90));
}
