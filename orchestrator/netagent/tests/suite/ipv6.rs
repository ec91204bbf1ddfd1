//! Overlays that carry IPv6, beside IPv4 or alone.

use std::net::{Ipv6Addr, UdpSocket};
use std::time::Duration;

use crate::support::api::{FakeApi, NAMESPACES, SERVICES, SLICES};
use crate::support::netns::Netns;
use crate::support::overlay::{Node, Pod, VXLAN, World, eventually};
use crate::support::stream::Streams;
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde_json::json;

fn reach(from: &Pod, to: &Pod) {
    eventually(&format!("{} to {}", from.ip, to.ip), || from.reaches(to).then_some(()));
}

/// A node whose underlay has both families.
fn node(world: &World, last: u8) -> Node {
    let host = world.host(last);
    host.ip(&format!("address add 2001:db8::{last}/64 dev eth0 nodad"));
    world.node_in(host, last, |_| {})
}

/// IPv6 between two pods: the answer names the client, so that translation on the way would show.
fn reach_ipv6(from: &Netns, from_ip: Ipv6Addr, to: Ipv6Addr) {
    eventually(&format!("{from_ip} to {to}"), || {
        let answer = from.ask(&format!("[{to}]:8081")).ok()?;
        (answer == format!("pod {from_ip}")).then_some(())
    });
}

const DUAL: &str = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.100.0","SubnetMax":"10.244.199.0","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;

#[test]
fn dual_stack_carries_both_families_and_comes_and_goes_under_a_running_connection() {
    let world = World::new();
    world.configure(VXLAN);
    let nodes = [node(&world, 1), node(&world, 2)];
    let before = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&before[0], &before[1]);
    let streams = Streams::between([
        (&before[0].netns, before[0].ip.into()),
        (&before[1].netns, before[1].ip.into()),
    ]);
    streams.go_on();
    let subnets = [nodes[0].subnet(), nodes[1].subnet()];

    world.configure(DUAL);
    for node in &nodes {
        eventually("an IPv6 subnet", || node.env().ipv6.map(drop));
    }
    assert_eq!([nodes[0].subnet(), nodes[1].subnet()], subnets, "IPv4 stays");
    assert_eq!(world.subnet_keys().len(), 2, "one key for each node");
    let (network, own) = nodes[0].env().ipv6.expect("dual stack");
    assert_eq!(network.to_string(), "fd00:10:244::/48");
    let key = format!("{}-24&{}-64", subnets[0].network(), own.network());
    let lease = world.lease(&key);
    assert_eq!(lease["PublicIPv6"], "2001:db8::1");
    assert_ne!(lease["BackendV6Data"]["VtepMAC"], lease["BackendData"]["VtepMAC"]);
    assert_eq!(nodes[0].env().mtu, 1430, "70 bytes less");

    let pods = [nodes[0].pod(5), nodes[1].pod(5)];
    let ips = [0, 1].map(|index| {
        let (_, subnet) = nodes[index].env().ipv6.expect("dual stack");
        pods[index].add_ipv6(&nodes[index].netns, subnet, 5)
    });
    reach_ipv6(&pods[0].netns, ips[0], ips[1]);
    reach_ipv6(&pods[1].netns, ips[1], ips[0]);
    reach(&pods[0], &pods[1]);
    // To the outside under the node's address.
    world.server.ip("address add 2001:db8::3/64 dev eth0 nodad");
    world.server.serve_tcp6("outside", 8081);
    eventually("masqueraded", || {
        let answer = pods[0].netns.ask("[2001:db8::3]:8081").ok()?;
        (answer == "outside 2001:db8::1").then_some(())
    });
    // The second device and its firewall are looked after as the first one is.
    for damage in
        ["link delete vxlan-orch-v6", "-6 route flush proto 111", "link set vxlan-orch-v6 down"]
    {
        nodes[0].netns.ip(damage);
        reach_ipv6(&pods[0].netns, ips[0], ips[1]);
    }
    assert!(nodes[0].nft("list table ip6 orch-overlay").contains("2001:db8::2"));
    // Directly, and back.
    world.configure(&DUAL.replace(r#""vxlan""#, r#""host-gw""#));
    eventually("IPv6 goes directly, too", || {
        let routes = nodes[0].netns.ip("-6 route show proto 111");
        routes.contains("via 2001:db8::2 dev eth0").then_some(())
    });
    reach_ipv6(&pods[0].netns, ips[0], ips[1]);
    reach_ipv6(&pods[1].netns, ips[1], ips[0]);
    assert!(nodes[0].status().problems.is_empty(), "{:?}", nodes[0].status().problems);

    world.configure(VXLAN);
    for node in &nodes {
        eventually("IPv6 is gone", || {
            let left = node.netns.ip("-6 route show proto 111")
                + &node.netns.ip("-br link show type vxlan")
                + &node.nft("list tables ip6");
            (node.env().ipv6.is_none()
                && !left.contains("fd00")
                && !left.contains("-v6")
                && !left.contains("orch-overlay"))
            .then_some(())
        });
    }
    let gap = streams.longest_gap();
    assert!(gap.0 < Duration::from_secs(1), "{gap:?}");
    assert!(world.subnet_keys().iter().all(|key| !key.contains('&')));
}

#[test]
fn a_dual_stack_node_of_flannels_is_reached_in_both_families() {
    let world = World::new();
    world.configure(DUAL);
    let ours = node(&world, 1);
    let pod = ours.pod(2);
    let (_, subnet) = eventually("an IPv6 subnet", || ours.env().ipv6);
    let pod_ip = pod.add_ipv6(&ours.netns, subnet, 2);

    // By hand, as flanneld does it.
    let theirs = world.host(13);
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        let file = format!("/proc/sys/net/{setting}");
        theirs.within(move || std::fs::write(file, "1").expect("sysctl"));
    }
    theirs.ip("address add 2001:db8::13/64 dev eth0 nodad");
    let (v4, v6): (Ipv4Network, Ipv6Network) =
        ("10.244.200.0/24".parse().expect("CIDR"), "fd00:10:244:c8::/64".parse().expect("CIDR"));
    let key = format!("{}-24&{}-64", ours.subnet().network(), subnet.network());
    let lease = world.lease(&key);
    for (device, local, base, mac, field, ip, peer) in [
        (
            "flannel.1",
            "192.0.2.13",
            "10.244.200.0/32",
            "5e:00:00:00:00:04",
            "BackendData",
            "PublicIP",
            IpNetwork::V4(ours.subnet()),
        ),
        (
            "flannel-v6.1",
            "2001:db8::13",
            "fd00:10:244:c8::/128",
            "5e:00:00:00:00:06",
            "BackendV6Data",
            "PublicIPv6",
            IpNetwork::V6(subnet),
        ),
    ] {
        theirs.ip(&format!("link add {device} address {mac} mtu 1430 type vxlan id 1 dstport 8472 local {local} dev eth0 nolearning"));
        theirs.ip(&format!("address add {base} dev {device} nodad"));
        theirs.ip(&format!("link set {device} up"));
        let vtep = lease[field]["VtepMAC"].as_str().expect("a MAC");
        let node = lease[ip].as_str().expect("an address");
        let gateway = peer.network();
        theirs.ip(&format!("neighbour replace {gateway} lladdr {vtep} dev {device} nud permanent"));
        theirs.bridge(&format!("fdb replace {vtep} dev {device} dst {node} self permanent"));
        theirs.ip(&format!("route replace {peer} via {gateway} dev {device} onlink"));
    }
    let value = r#"{"PublicIP":"192.0.2.13","PublicIPv6":"2001:db8::13","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:00:00:00:00:04"},"BackendV6Data":{"VNI":1,"VtepMAC":"5e:00:00:00:00:06"}}"#;
    let key = format!("/coreos.com/network/subnets/{}-24&{}-64", v4.network(), v6.network());
    world.etcdctl(&["put", &key, value]);
    let other = Pod::attach(&theirs, v4, 1430, 2);
    let other_ip = other.add_ipv6(&theirs, v6, 2);
    reach(&pod, &other);
    reach(&other, &pod);
    reach_ipv6(&pod.netns, pod_ip, other_ip);
    reach_ipv6(&other.netns, other_ip, pod_ip);
}

const ALONE: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;

/// A pod with an IPv6 address and no other.
fn ipv6_pod(node: &Node, last: u8) -> (Netns, Ipv6Addr) {
    let (_, subnet) = node.env().ipv6.expect("an IPv6 subnet");
    Pod::attach_ipv6(&node.netns, subnet, node.env().mtu, last)
}

#[test]
fn an_overlay_of_ipv6_alone_carries_traffic_and_outlives_damage() {
    let world = World::new();
    world.configure(ALONE);
    let nodes = [node(&world, 1), node(&world, 2)];
    for node in &nodes {
        let env = node.env();
        assert!(env.ipv4.is_none() && env.ipv6.is_some(), "{env:?}");
        assert_eq!(env.mtu, 1430, "70 bytes less");
    }
    let keys = world.subnet_keys();
    assert!(keys.len() == 2 && keys.iter().all(|key| key.starts_with("0.0.0.0-0&")), "{keys:?}");
    let pods = [ipv6_pod(&nodes[0], 2), ipv6_pod(&nodes[1], 2)];
    reach_ipv6(&pods[0].0, pods[0].1, pods[1].1);
    reach_ipv6(&pods[1].0, pods[1].1, pods[0].1);
    // The one device is that of IPv6, and nothing of IPv4 is left.
    for node in &nodes {
        let left = node.netns.ip("-br link show type vxlan") + &node.netns.ip("route show");
        assert!(left.contains("vxlan-orch-v6"), "{left}");
        assert!(!left.contains("vxlan-orch ") && !left.contains("10.244."), "{left}");
        assert!(!node.nft("list tables ip").contains("orch-overlay"));
        assert!(node.status().problems.is_empty(), "{:?}", node.status().problems);
    }
    world.server.ip("address add 2001:db8::3/64 dev eth0 nodad");
    world.server.serve_tcp6("outside", 8081);
    eventually("masqueraded", || {
        let answer = pods[0].0.ask("[2001:db8::3]:8081").ok()?;
        (answer == "outside 2001:db8::1").then_some(())
    });
    let streams =
        Streams::between([(&pods[0].0, pods[0].1.into()), (&pods[1].0, pods[1].1.into())]);
    streams.go_on();
    for damage in
        ["-6 route flush proto 111", "link set vxlan-orch-v6 down", "link delete vxlan-orch-v6"]
    {
        nodes[0].netns.ip(damage);
        streams.go_on();
    }
    let gap = streams.longest_gap();
    assert!(gap.0 < Duration::from_secs(5), "{gap:?}");
}

#[test]
fn from_dual_stack_to_ipv6_alone_and_back_the_ipv6_subnets_and_streams_stay() {
    let world = World::new();
    world.configure(DUAL);
    let mut nodes = [node(&world, 1), node(&world, 2)];
    for node in &nodes {
        eventually("both subnets", || node.env().ipv4.zip(node.env().ipv6).map(drop));
    }
    let subnets = [nodes[0].env().ipv6, nodes[1].env().ipv6];
    let pods = [ipv6_pod(&nodes[0], 2), ipv6_pod(&nodes[1], 2)];
    reach_ipv6(&pods[0].0, pods[0].1, pods[1].1);
    let streams =
        Streams::between([(&pods[0].0, pods[0].1.into()), (&pods[1].0, pods[1].1.into())]);
    streams.go_on();

    world.configure(ALONE);
    for node in &nodes {
        eventually("IPv4 is gone", || {
            let left = node.netns.ip("-br link show type vxlan") + &node.netns.ip("route show");
            (node.env().ipv4.is_none()
                && !left.contains("vxlan-orch ")
                && !left.contains("10.244."))
            .then_some(())
        });
    }
    streams.go_on();
    assert_eq!([nodes[0].env().ipv6, nodes[1].env().ipv6], subnets);
    eventually("the keys say so", || {
        let keys = world.subnet_keys();
        (keys.len() == 2 && keys.iter().all(|key| key.starts_with("0.0.0.0-0&"))).then_some(())
    });
    // An agent that starts again keeps what it has.
    nodes[0].kill();
    nodes[0].start();
    eventually("it is back", || (nodes[0].status().etcd == "healthy").then_some(()));
    streams.go_on();
    assert_eq!(nodes[0].env().ipv6, subnets[0]);
    let gap = streams.longest_gap();
    assert!(gap.0 < Duration::from_secs(1), "{gap:?}");

    world.configure(VXLAN);
    for node in &nodes {
        eventually("IPv4 alone", || {
            let env = node.env();
            (env.ipv4.is_some() && env.ipv6.is_none()).then_some(())
        });
    }
    eventually("one key for each", || {
        let keys = world.subnet_keys();
        (keys.len() == 2 && keys.iter().all(|key| key.starts_with("10.244."))).then_some(())
    });
    for node in &nodes {
        node.netns.ip("link delete cni0");
        node.netns.ip("link delete veth2");
    }
    let pods = [nodes[0].pod(3), nodes[1].pod(3)];
    reach(&pods[0], &pods[1]);
}

#[test]
fn a_node_without_ipv6_says_that_it_cannot_take_part_in_ipv6_alone() {
    let world = World::new();
    world.configure(ALONE);
    let with = node(&world, 1);
    let without = world.node(2);
    assert!(with.env().ipv6.is_some());
    eventually("it says so", || {
        let etcd = without.status().etcd;
        etcd.contains("IPv6").then_some(())
    });
    assert!(!without.subnet_file().exists() && without.runs());
    // A change of the configuration lets it in.
    world.configure(DUAL);
    eventually("it has a subnet", || without.env().ipv4.map(drop));
    eventually("and is well", || (without.status().etcd == "healthy").then_some(()));
}

#[test]
fn dual_stack_services_and_names_answer_pods_of_both_nodes() {
    let world = World::new();
    world.configure(DUAL);
    let api = FakeApi::default();
    api.put(NAMESPACES, json!({"metadata": {"name": "default"}}));
    let nodes = [1, 2].map(|last| {
        let host = world.host(last);
        host.ip(&format!("address add 2001:db8::{last}/64 dev eth0 nodad"));
        world.node_in(host, last, |options| options.client = api.client())
    });
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    let ips = [0, 1].map(|index| {
        let (_, subnet) = eventually("an IPv6 subnet", || nodes[index].env().ipv6);
        pods[index].add_ipv6(&nodes[index].netns, subnet, 2)
    });
    api.put(
        SERVICES,
        json!({"metadata": {"name": "web", "namespace": "default"}, "spec": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 31000,
            "clusterIP": "10.96.3.4",
            "clusterIPs": ["10.96.3.4", "fd00:10:96::304"],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}],
        }}),
    );
    let slice = |family: &str, ip: String, port: u16| {
        api.put(
            SLICES,
            json!({
                "metadata": {"name": format!("web-{family}"), "namespace": "default",
                             "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": family,
                "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
                "endpoints": [{"addresses": [ip], "nodeName": "node-2",
                               "targetRef": {"kind": "Pod", "name": "web-1"}}],
            }),
        );
    };
    slice("IPv4", pods[1].ip.to_string(), 8080);
    slice("IPv6", ips[1].to_string(), 8081);

    // From another node the pod sees the client itself, in either family.
    for (address, client) in
        [("10.96.3.4:80", pods[0].ip.to_string()), ("[fd00:10:96::304]:80", ips[0].to_string())]
    {
        eventually(address, || {
            (pods[0].netns.ask(address).ok()? == format!("pod {client}")).then_some(())
        });
    }
    world.server.ip("address add 2001:db8::3/64 dev eth0 nodad");
    eventually("the node port keeps the client", || {
        let answer = world.server.ask("[2001:db8::2]:30080").ok()?;
        (answer == "pod 2001:db8::3").then_some(())
    });
    // Names, asked over IPv6.
    let answers = pods[0].netns.within(|| {
        let mut query = Message::query();
        let name = Name::from_ascii("web.default.svc.cluster.local.").expect("a name");
        query.add_query(Query::query(name, RecordType::AAAA));
        let socket = UdpSocket::bind("[::]:0").expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(3))).expect("timeout");
        socket.send_to(&query.to_vec().expect("a query"), "[fd00:10:96::a]:53").expect("send");
        let mut buffer = [0; 1500];
        let (length, _) = socket.recv_from(&mut buffer).expect("an answer");
        let response = Message::from_vec(&buffer[..length]).expect("a message");
        response.answers.iter().map(|one| one.data.to_string()).collect::<Vec<_>>()
    });
    assert_eq!(answers, ["fd00:10:96::304"]);
    // A load balancer learns which node can serve.
    for (address, status, count) in [
        ("192.0.2.1:31000", "HTTP/1.1 503", 0),
        ("192.0.2.2:31000", "HTTP/1.1 200", 1),
        ("[2001:db8::2]:31000", "HTTP/1.1 200", 1),
    ] {
        let answer = eventually(address, || world.server.http(address).ok());
        assert!(answer.starts_with(status), "{address}: {answer}");
        assert!(answer.contains(&format!("\"localEndpoints\":{count}")), "{address}: {answer}");
    }
    // Without IPv6 in the pod network there is no table for it.
    world.configure(VXLAN);
    eventually("the IPv6 table is gone", || {
        let tables = nodes[0].nft("list tables ip6");
        (!tables.lines().any(|line| line == "table ip6 orch")).then_some(())
    });
    assert_eq!(
        pods[0].netns.ask("10.96.3.4:80").expect("IPv4 goes on"),
        format!("pod {}", pods[0].ip)
    );
}
