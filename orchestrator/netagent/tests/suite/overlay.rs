//! The overlay of several nodes on the real kernel and a real etcd: modes, damage, firewalls, changes at run time.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::netns::{Netns, run};
use crate::support::overlay::{Node, Pod, VXLAN, World, eventually};
use crate::support::stream::Streams;
use orch_netagent::overlay::interface::Choice;

/// A TCP connection and pings between two pods, in both directions.
fn streams(one: &Pod, other: &Pod) -> Streams {
    let streams = Streams::between([(&one.netns, one.ip.into()), (&other.netns, other.ip.into())]);
    streams.go_on();
    streams
}

fn reach(from: &Pod, to: &Pod) {
    eventually(&format!("{} to {}", from.ip, to.ip), || from.reaches(to).then_some(()));
}

fn route_to(node: &Node, other: &Node) -> String {
    node.netns.ip(&format!("route show {}", other.subnet())).trim().to_owned()
}

/// Packets that the rules of a chain of ours have dropped.
fn dropped(node: &Node, chain: &str) -> u64 {
    let text = node.nft(&format!("list chain ip orch-overlay {chain}"));
    let mut words = text.split_whitespace();
    let mut sum = 0;
    while let Some(word) = words.next() {
        if word == "packets" {
            sum += words.next().and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    sum
}

fn iptables(netns: &Netns, words: &str) -> String {
    run("ip", &format!("netns exec {} iptables-nft {words}", netns.name))
}

const DIRECT: &str = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.100.0","SubnetMax":"10.244.199.0","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.100.0","SubnetMax":"10.244.199.0","Backend":{"Type":"host-gw"}}"#;

#[test]
fn the_mode_changes_under_a_running_connection() {
    let world = World::new();
    world.configure(VXLAN);
    let nodes = [world.node(1), world.node(2)];
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&pods[0], &pods[1]);
    let streams = streams(&pods[0], &pods[1]);
    for (config, backend, device, mtu) in [
        (DIRECT, "vxlan", "eth0", 1450),
        (HOST_GW, "host-gw", "eth0", 1500),
        (VXLAN, "vxlan", "vxlan-orch", 1450),
        (HOST_GW, "host-gw", "eth0", 1500),
        (VXLAN, "vxlan", "vxlan-orch", 1450),
    ] {
        world.configure(config);
        for (one, other) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
            eventually(&format!("routes over {device} for {config}"), || {
                let route = route_to(one, other);
                (route.contains(&format!("dev {device}"))
                    && one.env().mtu == mtu
                    && world.lease(&one.key())["BackendType"] == backend)
                    .then_some(())
            });
        }
        assert!(pods[0].reaches(&pods[1]) && pods[1].reaches(&pods[0]), "{config}");
        streams.go_on();
    }
    let gap = streams.longest_gap();
    assert!(gap.0 < Duration::from_secs(1), "{gap:?}");
}

#[test]
fn nodes_on_another_link_are_reached_in_vxlan_and_host_gw_says_which_it_cannot_reach() {
    let world = World::new();
    world.configure(DIRECT);
    let near = [world.node(1), world.node(2)];
    // Behind a router: the server, on the network 198.51.100.0/24.
    let far = Netns::new("far");
    world.server.within(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("sysctl"));
    world.server.ip(&format!("link add far type veth peer name eth0 netns {}", far.name));
    world.server.ip("address add 198.51.100.3/24 dev far");
    world.server.ip("link set far up");
    far.ip("address add 198.51.100.1/24 dev eth0");
    far.ip("link set eth0 up");
    far.ip("route add default via 198.51.100.3");
    for node in &near {
        node.netns.ip("route add 198.51.100.0/24 via 192.0.2.3");
    }
    let far = world.node_in(far, 9, |options| options.node_ip = Ipv4Addr::new(198, 51, 100, 1));
    let pods = [near[0].pod(2), near[1].pod(2), far.pod(2)];
    for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2)] {
        reach(&pods[from], &pods[to]);
    }
    assert!(route_to(&near[0], &near[1]).contains("via 192.0.2.2 dev eth0"));
    assert!(route_to(&near[0], &far).contains("dev vxlan-orch"));
    world.configure(HOST_GW);
    eventually("the loss is told", || {
        // Its lease still names a VTEP, so nothing is lost; a flanneld's would not.
        let lease = world.lease(&far.key());
        (lease["BackendType"] == "host-gw").then_some(())
    });
    reach(&pods[0], &pods[2]);
    let key = "/coreos.com/network/subnets/10.244.250.0-24";
    let foreign = r#"{"PublicIP":"198.51.100.77","PublicIPv6":null,"BackendType":"host-gw"}"#;
    world.etcdctl(&["put", key, foreign]);
    eventually("the problem is told", || {
        let problems = near[0].status().problems;
        problems.iter().any(|text| text.contains("10.244.250.0/24")).then_some(())
    });
    world.etcdctl(&["del", key]);
    eventually("and its end", || near[0].status().problems.is_empty().then_some(()));
}

#[test]
fn only_nodes_are_heard_on_the_vxlan_port_and_pods_send_nothing_there() {
    let world = World::new();
    let nodes = [world.node(1), world.node(2)];
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&pods[0], &pods[1]);
    let lease = world.lease(&nodes[0].key());
    let mac = lease["BackendData"]["VtepMAC"].as_str().expect("a MAC").to_owned();

    // A host that is no node knows all that a node knows, and takes the place of the second one.
    let stranger = world.host(66);
    let (ours, theirs) = (nodes[0].subnet(), nodes[1].subnet());
    let forged = Ipv4Addr::from_bits(theirs.network().to_bits() + 9);
    stranger.ip("link add vx type vxlan id 1 dstport 8472 local 192.0.2.66 dev eth0 nolearning");
    stranger.ip(&format!("address add {forged}/32 dev vx"));
    stranger.ip("link set vx up");
    stranger.ip(&format!("neighbour add {} lladdr {mac} dev vx nud permanent", ours.network()));
    stranger.bridge(&format!("fdb add {mac} dev vx dst 192.0.2.1 self permanent"));
    stranger.ip(&format!("route add {ours} via {} dev vx onlink src {forged}", ours.network()));
    let target = SocketAddr::new(pods[0].ip.into(), 9999);
    let inside = pods[0].netns.within(move || UdpSocket::bind(target).expect("bind"));
    inside.set_read_timeout(Some(Duration::from_millis(500))).expect("set");
    let send = |from: &Netns, to: SocketAddr| {
        from.within(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
            for _ in 0..3 {
                let _ = socket.send_to(b"forged", to);
            }
        });
    };
    let before = dropped(&nodes[0], "input");
    send(&stranger, target);
    assert!(inside.recv(&mut [0; 16]).is_err(), "nothing comes through");
    assert_eq!(dropped(&nodes[0], "input") - before, 3);
    // The same from a node comes through: it is not the port that is closed.
    send(&pods[1].netns, target);
    inside.recv(&mut [0; 16]).expect("a datagram of a pod");

    // A pod to its own node, to another one, and to another one's overlay address.
    let before = [dropped(&nodes[0], "input"), dropped(&nodes[0], "forward")];
    send(&pods[0].netns, "192.0.2.1:8472".parse().expect("address"));
    send(&pods[0].netns, "192.0.2.2:8472".parse().expect("address"));
    assert_eq!(dropped(&nodes[0], "input") - before[0], 3, "its own node");
    assert_eq!(dropped(&nodes[0], "forward") - before[1], 3, "another node");
    let before = dropped(&nodes[1], "input");
    send(&pods[0].netns, SocketAddr::new(theirs.network().into(), 8472));
    eventually("the other node drops it", || {
        (dropped(&nodes[1], "input") - before == 3).then_some(())
    });

    // Sources that are not of this node's subnet.
    let before = dropped(&nodes[0], "prerouting");
    pods[0].netns.ip("address add 10.244.99.9/32 dev eth0");
    let to = SocketAddr::new(pods[1].ip.into(), 9999);
    pods[0].netns.within(move || {
        let socket = UdpSocket::bind("10.244.99.9:0").expect("bind");
        for _ in 0..3 {
            let _ = socket.send_to(b"forged", to);
        }
    });
    eventually("forged sources are dropped", || {
        (dropped(&nodes[0], "prerouting") - before == 3).then_some(())
    });
    reach(&pods[0], &pods[1]);

    // A node that joins is heard, one that leaves is not any more.
    let mut third = world.node(5);
    let pod = third.pod(2);
    reach(&pod, &pods[0]);
    let key = third.key();
    third.kill();
    world.etcdctl(&["del", &format!("/coreos.com/network/subnets/{key}")]);
    eventually("it is forgotten", || {
        (!nodes[0].nft("list set ip orch-overlay nodes").contains("192.0.2.5")).then_some(())
    });
}

#[test]
fn a_flushed_ruleset_is_back_at_once_and_so_is_a_changed_one() {
    let world = World::new();
    let nodes = [world.node(1), world.node(2)];
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&pods[0], &pods[1]);
    let list = || nodes[0].nft("-s list table ip orch-overlay");
    eventually("the services' table", || {
        (!nodes[0].nft("list table ip orch").is_empty()).then_some(())
    });
    let whole = list();
    assert!(whole.contains("192.0.2.2"), "{whole}");
    for damage in [
        "flush ruleset",
        "delete table ip orch-overlay",
        "flush chain ip orch-overlay input",
        "delete table ip orch",
    ] {
        nodes[0].nft(damage);
        let start = Instant::now();
        eventually(damage, || {
            (list() == whole && !nodes[0].nft("list table ip orch").is_empty()).then_some(())
        });
        // The look without a reason comes every 30 s, that of Services every 10 s.
        assert!(start.elapsed() < Duration::from_secs(5), "{damage}: {:?}", start.elapsed());
    }
}

#[test]
fn a_forward_chain_that_drops_lets_the_pod_network_pass() {
    let world = World::new();
    let nodes = [world.node(1), world.node(2)];
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&pods[0], &pods[1]);
    let node = &nodes[0].netns;
    assert!(
        !iptables(node, "-S").contains("orch pod network"),
        "nothing drops, nothing is written"
    );
    let ours = |chain: &str| {
        iptables(node, "-S")
            .lines()
            .filter(|rule| {
                rule.starts_with(&format!("-A {chain} ")) && rule.contains("orch pod network")
            })
            .count()
    };
    iptables(node, "-P FORWARD DROP");
    eventually("the rules are there", || (ours("FORWARD") == 2).then_some(()));
    reach(&pods[0], &pods[1]);
    reach(&pods[1], &pods[0]);

    // Docker comes, and comes again.
    for _ in 0..2 {
        iptables(node, "-F FORWARD");
        let _ = Command::new("ip")
            .args(["netns", "exec", &node.name, "iptables-nft", "-N", "DOCKER-USER"])
            .output();
        iptables(node, "-I FORWARD -j DOCKER-USER");
        iptables(node, "-P FORWARD DROP");
        eventually("the rules are in Docker's chain for others", || {
            (ours("DOCKER-USER") == 2 && ours("FORWARD") == 0).then_some(())
        });
        reach(&pods[0], &pods[1]);
        reach(&pods[1], &pods[0]);
    }
    assert!(nodes[0].status().problems.is_empty(), "{:?}", nodes[0].status().problems);
}

#[test]
fn routes_are_told_apart_by_who_made_them() {
    let world = World::new();
    let nodes = [world.node(1), world.node(2)];
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&pods[0], &pods[1]);
    let node = &nodes[0].netns;
    let far = nodes[1].subnet();
    let right = route_to(&nodes[0], &nodes[1]);
    assert!(right.contains("proto 111"), "{right}");
    // Ours by their protocol: of a node that is gone, by another link, with another metric.
    for stale in [
        "10.244.201.0/24 via 192.0.2.3 dev eth0 proto 111".to_owned(),
        format!("{far} via 192.0.2.3 dev eth0 proto 111 metric 7"),
        format!("{far} dev eth0 proto 111 metric 9"),
    ] {
        node.ip(&format!("route add {stale}"));
        eventually(&stale, || {
            let all = node.ip("route show");
            (all.lines().filter(|line| line.contains("proto 111")).count() == 1
                && route_to(&nodes[0], &nodes[1]) == right)
                .then_some(())
        });
    }
    node.ip(&format!("route replace {far} via 192.0.2.3 dev eth0 proto 111"));
    eventually("a route of ours that leads elsewhere", || {
        (route_to(&nodes[0], &nodes[1]) == right).then_some(())
    });
    // Those of others stay, and are told.
    let part = Ipv4Addr::from_bits(far.network().to_bits() + 128);
    let foreign = format!("{part}/25 via 192.0.2.3 dev eth0");
    node.ip(&format!("route add {foreign}"));
    eventually("the conflict is told", || {
        let problems = nodes[0].status().problems;
        problems.iter().any(|text| text.contains(&format!("{part}/25"))).then_some(())
    });
    assert!(node.ip("route show").contains(&format!("{part}/25")));
    node.ip(&format!("route delete {foreign}"));
    eventually("its end is told", || nodes[0].status().problems.is_empty().then_some(()));
    // One in the very place of ours, before there was ours.
    node.ip("route add 10.244.222.0/24 via 192.0.2.3 dev eth0");
    let lease = r#"{"PublicIP":"192.0.2.50","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:00:00:00:00:50"}}"#;
    world.etcdctl(&["put", "/coreos.com/network/subnets/10.244.222.0-24", lease]);
    eventually("the conflict is told", || {
        let problems = nodes[0].status().problems;
        problems.iter().any(|text| text.contains("10.244.222.0/24")).then_some(())
    });
    assert!(node.ip("route show 10.244.222.0/24").contains("192.0.2.3"));
    node.ip("route delete 10.244.222.0/24");
    eventually("ours takes the place", || {
        node.ip("route show 10.244.222.0/24").contains("vxlan-orch").then_some(())
    });
}

#[test]
fn the_underlays_mtu_is_followed_and_links_that_went_down_come_back() {
    let world = World::new();
    let nodes = [world.node(1), world.node(2)];
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&pods[0], &pods[1]);
    let node = &nodes[0].netns;
    for (underlay, overlay) in [(1400, 1350), (1500, 1450)] {
        node.ip(&format!("link set eth0 mtu {underlay}"));
        eventually("the MTU follows", || {
            (node.ip("link show vxlan-orch").contains(&format!("mtu {overlay} "))
                && nodes[0].env().mtu == overlay)
                .then_some(())
        });
    }
    for (mode, link) in [(VXLAN, "vxlan-orch"), (VXLAN, "eth0"), (DIRECT, "eth0")] {
        world.configure(mode);
        let device = if mode == DIRECT { "dev eth0" } else { "dev vxlan-orch" };
        eventually("the mode", || route_to(&nodes[0], &nodes[1]).contains(device).then_some(()));
        let streams = streams(&pods[0], &pods[1]);
        node.ip(&format!("link set {link} down"));
        std::thread::sleep(Duration::from_millis(300));
        if link == "eth0" {
            node.ip("link set eth0 up");
        }
        let start = Instant::now();
        reach(&pods[0], &pods[1]);
        assert!(start.elapsed() < Duration::from_secs(5), "{link}: {:?}", start.elapsed());
        streams.go_on();
        assert!(streams.longest_gap().0 < Duration::from_secs(5));
    }
}

#[test]
fn the_configuration_changes_at_run_time() {
    let world = World::new();
    world.configure(VXLAN);
    let nodes = [world.node(1), world.node(2)];
    {
        let pods = [nodes[0].pod(2), nodes[1].pod(2)];
        reach(&pods[0], &pods[1]);
        // Another port and another VNI: the devices are made again.
        world.configure(
            r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.100.0","SubnetMax":"10.244.199.0","Backend":{"Type":"vxlan","VNI":9,"Port":4789}}"#,
        );
        for node in &nodes {
            eventually("the device has the new port", || {
                let device = node.netns.ip("-d link show type vxlan");
                (device.contains("dstport 4789") && device.contains("id 9 ")).then_some(())
            });
        }
        reach(&pods[0], &pods[1]);
        assert!(nodes[0].nft("list table ip orch-overlay").contains("udp dport 4789"));
        // One that nobody can follow changes nothing, and is told.
        let subnet = nodes[0].subnet();
        for bad in ["{", r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipsec"}}"#] {
            world.configure(bad);
            eventually("the problem is told", || {
                let problems = nodes[0].status().problems;
                problems.iter().any(|text| text.contains("configuration")).then_some(())
            });
            assert_eq!(nodes[0].subnet(), subnet);
            reach(&pods[0], &pods[1]);
        }
        // A node that joins meanwhile is followed all the same.
        world.etcdctl(&["del", "/coreos.com/network/config"]);
        std::thread::sleep(Duration::from_millis(300));
    }
    // Another network with limits: everybody gets a new subnet, and gives the old one back.
    world.configure(
        r#"{"Network":"10.55.0.0/16","SubnetLen":26,"SubnetMin":"10.55.3.0","SubnetMax":"10.55.3.128","Backend":{"Type":"vxlan"}}"#,
    );
    for node in &nodes {
        eventually("a subnet of the new network", || {
            let subnet = node.subnet();
            (subnet.prefix() == 26 && subnet.network().octets()[..3] == [10, 55, 3]).then_some(())
        });
        eventually("no problem is left", || node.status().problems.is_empty().then_some(()));
        node.netns.ip("link delete cni0");
        node.netns.ip("link delete veth2");
    }
    eventually("the old keys are gone", || {
        let keys = world.subnet_keys();
        (keys.len() == 2 && keys.iter().all(|key| key.starts_with("10.55.3."))).then_some(())
    });
    let pods = [nodes[0].pod(3), nodes[1].pod(3)];
    reach(&pods[0], &pods[1]);
    reach(&pods[1], &pods[0]);
}

#[test]
fn the_underlay_is_chosen_by_name_pattern_or_address() {
    let world = World::new();
    // A second network between the nodes, which is the one to use.
    let second = Netns::new("second");
    second.ip("link add br0 type bridge");
    second.ip("link set br0 up");
    second.within(|| {
        let _ = std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
    });
    let hosts = [1_u8, 2, 4].map(|last| {
        let host = world.host(last);
        second.ip(&format!("link add u{last} type veth peer name fast0 netns {}", host.name));
        second.ip(&format!("link set u{last} up master br0"));
        host.ip(&format!("address add 203.0.113.{last}/24 dev fast0"));
        host.ip("link set fast0 up");
        host
    });
    let choices = [
        Choice { names: vec!["eno1".to_owned(), "fast0".to_owned()], patterns: Vec::new() },
        Choice { names: Vec::new(), patterns: vec![regex::Regex::new("^fast").expect("regex")] },
        Choice { names: vec!["203.0.113.4".to_owned()], patterns: Vec::new() },
    ];
    let lasts = [1, 2, 4];
    let nodes: Vec<Node> = hosts
        .into_iter()
        .zip(choices)
        .zip(lasts)
        .map(|((host, interface), last)| {
            world.node_in(host, last, |options| options.interface = interface)
        })
        .collect();
    let pods: Vec<Pod> = nodes.iter().map(|node| node.pod(2)).collect();
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        reach(&pods[from], &pods[to]);
    }
    for (node, last) in nodes.iter().zip(lasts) {
        let device = node.netns.ip("-d link show vxlan-orch");
        assert!(device.contains(&format!("local 203.0.113.{last} dev fast0")), "{device}");
        assert_eq!(world.lease(&node.key())["PublicIP"], format!("203.0.113.{last}"));
    }
}

#[test]
fn a_node_behind_a_translated_address_is_reached_at_its_public_one() {
    let world = World::new();
    let near = world.node(1);
    // One to one translation at the server: 192.0.2.80 outside is 198.51.100.1 inside.
    let inside = Netns::new("inside");
    world.server.within(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("sysctl"));
    world.server.ip(&format!("link add in0 type veth peer name eth0 netns {}", inside.name));
    world.server.ip("address add 198.51.100.3/24 dev in0");
    world.server.ip("link set in0 up");
    world.server.ip("address add 192.0.2.80/32 dev eth0");
    inside.ip("address add 198.51.100.1/24 dev eth0");
    inside.ip("link set eth0 up");
    inside.ip("route add default via 198.51.100.3");
    for rule in [
        "add table ip t",
        "add chain ip t pre { type nat hook prerouting priority -100; }",
        "add chain ip t post { type nat hook postrouting priority 100; }",
        "add rule ip t pre ip daddr 192.0.2.80 dnat to 198.51.100.1",
        "add rule ip t post ip saddr 198.51.100.1 ip daddr != 192.0.2.3 snat to 192.0.2.80",
    ] {
        let args: Vec<&str> = ["netns", "exec", &world.server.name, "nft", rule].into();
        assert!(Command::new("ip").args(&args).status().expect("nft").success(), "{rule}");
    }
    let hidden = world.node_in(inside, 8, |options| {
        options.node_ip = Ipv4Addr::new(198, 51, 100, 1);
        options.public_ip = Some(Ipv4Addr::new(192, 0, 2, 80));
    });
    let pods = [near.pod(2), hidden.pod(2)];
    reach(&pods[1], &pods[0]);
    reach(&pods[0], &pods[1]);
    assert_eq!(world.lease(&hidden.key())["PublicIP"], "192.0.2.80");
}
