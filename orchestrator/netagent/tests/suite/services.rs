//! Services on the real kernel: a node with two pods on a bridge, and a client outside; all of them with both families.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::support::netns::Netns;
use orch_netagent::services::model::{Endpoint, Port, Protocol};
use orch_netagent::services::proxy::Proxy;
use orch_netagent::services::ruleset::Networks;
use orch_netagent::sysctl;

pub(crate) const CLUSTER_IP: &str = "10.96.3.4:80";
pub(crate) const CLUSTER_IP_V6: &str = "[fd00:10:96::304]:80";
const NODE_PORT: &str = "192.0.2.1:30080";
const NODE_PORT_V6: &str = "[2001:db8::1]:30080";

pub(crate) struct World {
    client: Netns,
    pub(crate) node: Netns,
    pub(crate) pods: Vec<Netns>,
    proxy: Option<Proxy>,
}

impl World {
    pub(crate) fn new() -> Self {
        let (client, node) = (Netns::new("client"), Netns::new("node"));
        node.ip(&format!("link add eth0 type veth peer name eth0 netns {}", client.name));
        for (host, last) in [(&node, 1), (&client, 9)] {
            host.ip(&format!("address add 192.0.2.{last}/24 dev eth0"));
            host.ip(&format!("address add 2001:db8::{last}/64 dev eth0 nodad"));
            host.ip("link set eth0 up");
        }
        node.ip("route add default via 192.0.2.9");
        node.ip("-6 route add default via 2001:db8::9");
        node.ip("link add cni0 address 02:00:00:00:00:01 type bridge");
        node.ip("address add 10.244.1.1/24 dev cni0");
        node.ip("address add fd00:10:244:1::1/64 dev cni0 nodad");
        node.ip("link set cni0 up");
        let pods = [2, 3].map(|last| {
            let pod = Netns::new("pod");
            node.ip(&format!("link add veth{last} type veth peer name eth0 netns {}", pod.name));
            node.ip(&format!("link set veth{last} up master cni0"));
            node.ip(&format!("link set veth{last} type bridge_slave hairpin on"));
            pod.ip(&format!("address add 10.244.1.{last}/24 dev eth0"));
            pod.ip(&format!("address add fd00:10:244:1::{last}/64 dev eth0 nodad"));
            pod.ip("link set eth0 up");
            pod.ip("route add default via 10.244.1.1");
            pod.ip("-6 route add default via fd00:10:244:1::1");
            pod.serve_tcp6(&format!("pod{last}"), 8081);
            pod.serve_udp6(&format!("pod{last}"), 8081);
            pod.serve_tcp(&format!("pod{last}"), 8080);
            pod.serve_udp(&format!("pod{last}"), 8080);
            pod
        });
        let report = node.within(|| sysctl::ensure(&["eth0", "cni0"], Some("eth0")));
        assert!(report.errors.is_empty(), "{:?}", report.errors);
        client.serve_tcp("client", 7000);
        Self { client, node, pods: pods.into(), proxy: Some(Proxy::default()) }
    }

    /// Puts the ports in force.
    pub(crate) fn apply(&mut self, ports: &[Port]) -> bool {
        let ports = ports.to_vec();
        let mut proxy = self.proxy.take().expect("one at a time");
        let (proxy, changed) = self.node.within(move || {
            let networks = [
                ("10.244.0.0/16", "10.96.0.0/12", "10.96.0.10"),
                ("fd00:10:244::/48", "fd00:10:96::/112", "fd00:10:96::a"),
            ]
            .map(|(cluster, service, dns_ip)| Networks {
                cluster: cluster.parse().expect("CIDR"),
                service: service.parse().expect("CIDR"),
                dns_ip: dns_ip.parse().expect("address"),
            });
            let changed = proxy.apply(&ports, &networks).expect("nft");
            (proxy, changed)
        });
        self.proxy = Some(proxy);
        changed
    }

    fn verify(&mut self) -> bool {
        let mut proxy = self.proxy.take().expect("one at a time");
        let (proxy, intact) = self.node.within(move || {
            let intact = proxy.verify().expect("nft");
            (proxy, intact)
        });
        self.proxy = Some(proxy);
        intact
    }
}

pub(crate) fn web(protocol: Protocol, endpoints: &[(u8, bool)]) -> Port {
    Port {
        id: format!("default/web/{protocol}/80"),
        protocol,
        cluster_ips: vec![Ipv4Addr::new(10, 96, 3, 4).into()],
        port: 80,
        node_port: Some(30080),
        external_ips: vec![Ipv4Addr::new(198, 51, 100, 7).into()],
        balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        external_local: false,
        internal_local: false,
        affinity: None,
        endpoints: endpoints
            .iter()
            .map(|(last, local)| endpoint(Ipv4Addr::new(10, 244, 1, *last).into(), *local))
            .collect(),
    }
}

pub(crate) fn endpoint(ip: IpAddr, local: bool) -> Endpoint {
    let port = if ip.is_ipv4() { 8080 } else { 8081 };
    Endpoint { ip, port, local, ready: true, near: true }
}

/// The same Service with both families.
pub(crate) fn dual(protocol: Protocol, endpoints: &[(u8, bool)]) -> Port {
    let mut port = web(protocol, endpoints);
    port.cluster_ips.push("fd00:10:96::304".parse().expect("address"));
    port.external_ips.push("2001:db8:7::7".parse().expect("address"));
    port.endpoints.extend(endpoints.iter().map(|(last, local)| {
        let ip = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, u16::from(*last));
        endpoint(ip.into(), *local)
    }));
    port
}

/// Who answered, over many connections.
pub(crate) fn answers(from: &Netns, address: &str) -> BTreeSet<String> {
    (0..24)
        .map(|_| from.ask(address).unwrap_or_else(|error| panic!("{address}: {error}")))
        .collect()
}

pub(crate) fn set(texts: &[&str]) -> BTreeSet<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

pub(crate) const BOTH: &[(u8, bool)] = &[(2, true), (3, true)];

#[test]
fn a_cluster_ip_balances_for_pods_for_the_node_and_for_the_pod_itself() {
    let mut world = World::new();
    assert!(world.apply(&[web(Protocol::Tcp, BOTH)]));
    assert!(!world.apply(&[web(Protocol::Tcp, BOTH)]), "a second run changes nothing");
    // To itself a pod comes masqueraded as the bridge, to others as itself.
    assert_eq!(answers(&world.pods[0], CLUSTER_IP), set(&["pod2 10.244.1.1", "pod3 10.244.1.2"]));
    assert_eq!(answers(&world.node, CLUSTER_IP), set(&["pod2 10.244.1.1", "pod3 10.244.1.1"]));
}

#[test]
fn a_node_port_answers_outside_on_the_node_and_at_loopback() {
    let mut world = World::new();
    world.apply(&[web(Protocol::Tcp, BOTH)]);
    let masqueraded = set(&["pod2 10.244.1.1", "pod3 10.244.1.1"]);
    assert_eq!(answers(&world.client, NODE_PORT), masqueraded);
    assert_eq!(answers(&world.node, NODE_PORT), masqueraded);
    assert_eq!(answers(&world.node, "127.0.0.1:30080"), masqueraded);
    world.client.ip("route add 198.51.100.7 via 192.0.2.1");
    assert_eq!(answers(&world.client, "198.51.100.7:80"), masqueraded, "externalIPs");
}

#[test]
fn external_traffic_policy_local_keeps_the_client_and_stays_on_the_node() {
    let mut world = World::new();
    let mut port = web(Protocol::Tcp, &[(2, true), (3, false)]);
    port.external_local = true;
    world.apply(&[port]);
    assert_eq!(answers(&world.client, NODE_PORT), set(&["pod2 192.0.2.9"]));
    assert_eq!(
        answers(&world.pods[1], NODE_PORT).len(),
        2,
        "inside the cluster the policy does not apply"
    );
}

#[test]
fn without_endpoints_a_connection_is_refused_at_once() {
    let mut world = World::new();
    world.apply(&[web(Protocol::Tcp, &[])]);
    for (from, address) in [
        (&world.pods[0], CLUSTER_IP),
        (&world.node, CLUSTER_IP),
        (&world.client, NODE_PORT),
        (&world.pods[0], "10.96.77.77:1"),
    ] {
        let error = from.ask(address).expect_err(address);
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
    // The sender itself is told by EPERM, or by the ICMP message that came back before it asked.
    let error = world.node.ask_udp(CLUSTER_IP).expect_err("UDP").kind();
    assert!(matches!(error, ErrorKind::PermissionDenied | ErrorKind::ConnectionRefused), "{error}");
    let error = world.pods[0].ask_udp(CLUSTER_IP).expect_err("UDP").kind();
    assert_eq!(error, ErrorKind::ConnectionRefused);
}

#[test]
fn a_busy_udp_flow_moves_when_its_endpoint_goes() {
    let mut world = World::new();
    world.apply(&[web(Protocol::Udp, &[(2, true)])]);
    let (send, receive) = std::sync::mpsc::channel::<()>();
    let (answer, answered) = std::sync::mpsc::channel();
    // One socket for all: the flow in conntrack stays the same.
    let client = world.client.spawn(move || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
        socket.connect(NODE_PORT).expect("connect");
        while receive.recv().is_ok() {
            let mut buffer = [0; 64];
            let length = socket.send(b"?").and_then(|_| socket.recv(&mut buffer));
            let text = length.map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned());
            answer.send(text).expect("the test waits");
        }
    });
    let ask = || {
        send.send(()).expect("the client runs");
        answered.recv().expect("an outcome")
    };
    assert_eq!(ask().expect("answer"), "pod2 10.244.1.1");
    world.apply(&[web(Protocol::Udp, &[(3, true)])]);
    assert_eq!(ask().expect("answer"), "pod3 10.244.1.1");
    // The change happens while no agent runs; the next one finds the flow.
    world.proxy = Some(Proxy::default());
    world.apply(&[web(Protocol::Udp, &[(2, true)])]);
    assert_eq!(ask().expect("answer"), "pod2 10.244.1.1");
    drop(send);
    client.join().expect("the client ends");
}

#[test]
fn udp_follows_its_endpoints() {
    let mut world = World::new();
    world.apply(&[web(Protocol::Udp, &[(2, true)])]);
    assert_eq!(world.pods[1].ask_udp(CLUSTER_IP).expect("answer"), "pod2 10.244.1.3");
    world.apply(&[web(Protocol::Udp, &[(3, true)])]);
    assert_eq!(world.client.ask_udp(NODE_PORT).expect("answer"), "pod3 10.244.1.1");
}

#[test]
fn session_affinity_brings_a_client_back_and_survives_a_change() {
    let mut world = World::new();
    let mut port = web(Protocol::Tcp, BOTH);
    port.affinity = Some(Duration::from_secs(60));
    world.apply(&[port.clone()]);
    let first = answers(&world.client, NODE_PORT);
    assert_eq!(first.len(), 1, "{first:?}");
    let mut other = web(Protocol::Tcp, BOTH);
    other.id = "default/other/tcp/81".to_owned();
    other.port = 81;
    other.node_port = None;
    assert!(world.apply(&[port, other]));
    assert_eq!(answers(&world.client, NODE_PORT), first);
}

#[test]
fn pods_leave_the_cluster_under_the_nodes_address() {
    let mut world = World::new();
    world.apply(&[]);
    assert_eq!(world.pods[0].ask("192.0.2.9:7000").expect("answer"), "client 192.0.2.1");
    assert_eq!(world.pods[0].ask("10.244.1.3:8080").expect("answer"), "pod3 10.244.1.2");
    assert_eq!(world.node.ask("10.244.1.3:8080").expect("answer"), "pod3 10.244.1.1");
}

#[test]
fn a_table_that_somebody_flushed_is_noticed_and_put_back() {
    let mut world = World::new();
    world.apply(&[web(Protocol::Tcp, BOTH)]);
    assert!(world.verify());
    assert!(world.verify(), "traffic and counters are no change");
    world.node.within(|| crate::support::netns::run("nft", "flush chain ip orch services"));
    assert!(!world.verify());
    assert!(world.apply(&[web(Protocol::Tcp, BOTH)]));
    assert_eq!(answers(&world.client, NODE_PORT).len(), 2);
}

#[test]
fn ipv6_services_answer_pods_the_node_itself_and_clients_outside() {
    let mut world = World::new();
    assert!(world.apply(&[dual(Protocol::Tcp, BOTH)]));
    assert!(!world.apply(&[dual(Protocol::Tcp, BOTH)]), "a second run changes nothing");
    assert!(world.verify(), "both tables are as written");
    let seen = set(&["pod2 fd00:10:244:1::1", "pod3 fd00:10:244:1::2"]);
    assert_eq!(answers(&world.pods[0], CLUSTER_IP_V6), seen, "to itself masqueraded");
    let masqueraded = set(&["pod2 fd00:10:244:1::1", "pod3 fd00:10:244:1::1"]);
    assert_eq!(answers(&world.node, CLUSTER_IP_V6), masqueraded);
    assert_eq!(answers(&world.client, NODE_PORT_V6), masqueraded);
    assert_eq!(answers(&world.node, NODE_PORT_V6), masqueraded);
    world.client.ip("-6 route add 2001:db8:7::7 via 2001:db8::1");
    assert_eq!(answers(&world.client, "[2001:db8:7::7]:80"), masqueraded, "externalIPs");
    // IPv4 beside it.
    assert_eq!(answers(&world.pods[0], CLUSTER_IP), set(&["pod2 10.244.1.1", "pod3 10.244.1.2"]));
    let error = world.pods[0].ask("[fd00:10:96::7777]:1").expect_err("no Service");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    world.apply(&[dual(Protocol::Tcp, &[])]);
    for (from, address) in [(&world.pods[0], CLUSTER_IP_V6), (&world.client, NODE_PORT_V6)] {
        let error = from.ask(address).expect_err(address);
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
}

#[test]
fn ipv6_keeps_the_client_with_local_and_brings_it_back_with_affinity() {
    let mut world = World::new();
    let mut port = dual(Protocol::Tcp, &[(2, true), (3, false)]);
    port.external_local = true;
    world.apply(&[port]);
    assert_eq!(answers(&world.client, NODE_PORT_V6), set(&["pod2 2001:db8::9"]));
    let mut port = dual(Protocol::Tcp, BOTH);
    port.affinity = Some(Duration::from_secs(60));
    world.apply(&[port]);
    let first = answers(&world.pods[0], CLUSTER_IP_V6);
    assert_eq!(first.len(), 1, "{first:?}");
}

#[test]
fn ipv6_udp_follows_its_endpoints_and_forgets_former_ones() {
    let mut world = World::new();
    world.apply(&[dual(Protocol::Udp, &[(2, true)])]);
    let answer = world.pods[1].ask_udp(CLUSTER_IP_V6).expect("answer");
    assert_eq!(answer, "pod2 fd00:10:244:1::3");
    // The same socket address again and again: one flow in conntrack.
    let ask = |world: &World| {
        world.client.within(|| {
            let socket = std::net::UdpSocket::bind("[2001:db8::9]:5555").expect("bind");
            socket.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
            socket.connect(NODE_PORT_V6).expect("connect");
            let mut buffer = [0; 64];
            let length = socket.send(b"?").and_then(|_| socket.recv(&mut buffer)).expect("answer");
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        })
    };
    assert_eq!(ask(&world), "pod2 fd00:10:244:1::1");
    world.apply(&[dual(Protocol::Udp, &[(3, true)])]);
    assert_eq!(ask(&world), "pod3 fd00:10:244:1::1");
}

#[test]
fn a_load_balancers_address_is_open_to_its_source_ranges_alone() {
    let mut world = World::new();
    world.client.ip("route add 198.51.100.0/24 via 192.0.2.1");
    world.client.ip("address add 192.0.2.99/24 dev eth0");
    let mut port = web(Protocol::Tcp, BOTH);
    port.balancer_ips = vec![Ipv4Addr::new(198, 51, 100, 8).into()];
    port.source_ranges = vec!["192.0.2.9/32".parse().expect("CIDR")];
    world.apply(&[port]);
    assert_eq!(answers(&world.client, "198.51.100.8:80").len(), 2);
    assert_eq!(answers(&world.client, "198.51.100.7:80").len(), 2, "externalIPs are no balancer's");
    world.client.ip("route replace 198.51.100.0/24 via 192.0.2.1 src 192.0.2.99");
    let error = world.client.ask("198.51.100.8:80").expect_err("not in the range").kind();
    assert!(matches!(error, ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
    assert_eq!(answers(&world.client, NODE_PORT).len(), 2, "the ranges are not for node ports");
}

#[test]
fn external_addresses_without_endpoints_are_refused_at_once() {
    let mut world = World::new();
    world.client.ip("route add 198.51.100.0/24 via 192.0.2.1");
    let mut port = web(Protocol::Tcp, &[]);
    port.balancer_ips = vec![Ipv4Addr::new(198, 51, 100, 8).into()];
    world.apply(&[port]);
    for address in ["198.51.100.7:80", "198.51.100.8:80"] {
        for from in [&world.client, &world.pods[0]] {
            let error = from.ask(address).expect_err(address);
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
        }
    }
}

#[test]
fn local_near_and_leaving_endpoints_are_chosen_as_the_service_says() {
    let mut world = World::new();
    let mut port = web(Protocol::Tcp, &[(2, true), (3, false)]);
    port.internal_local = true;
    world.apply(&[port.clone()]);
    assert_eq!(answers(&world.pods[1], CLUSTER_IP), set(&["pod2 10.244.1.3"]), "local");
    assert_eq!(answers(&world.client, NODE_PORT).len(), 2, "internal only");

    port.internal_local = false;
    port.endpoints[0].near = false;
    world.apply(&[port.clone()]);
    assert_eq!(answers(&world.pods[0], CLUSTER_IP), set(&["pod3 10.244.1.2"]), "near");

    // The near one leaves: rather a far one that is ready.
    port.endpoints[0].near = true;
    port.endpoints[1].ready = false;
    world.apply(&[port.clone()]);
    assert_eq!(answers(&world.pods[1], CLUSTER_IP), set(&["pod2 10.244.1.3"]), "ready");
    // Both leave: they serve to the end.
    port.endpoints[0].ready = false;
    world.apply(&[port]);
    assert_eq!(answers(&world.pods[1], CLUSTER_IP).len(), 2, "terminating");
}
