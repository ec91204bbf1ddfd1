//! The overlay of several nodes on the real kernel and a real etcd: modes, damage, firewalls, changes at run time.

mod support;

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use orch_netagent::overlay::interface::Choice;
use support::netns::{Netns, run};
use support::overlay::{Node, Pod, World, eventually};

const ECHO_PORT: u16 = 7;

/// One TCP connection between two pods, a byte there and back every few milliseconds.
struct Stream {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<Duration>>,
}

impl Stream {
    fn start(from: &Pod, to: &Pod) -> Self {
        to.netns.spawn(|| {
            let listener = TcpListener::bind(("0.0.0.0", ECHO_PORT)).expect("bind");
            let mut byte = [0];
            for mut stream in listener.incoming().flatten() {
                while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
            }
        });
        let address = SocketAddr::new(to.ip.into(), ECHO_PORT);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let connect = move || TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok();
        let mut stream = eventually("a connection", || from.netns.within(connect));
        let thread = from.netns.spawn(move || {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            let mut longest = Duration::ZERO;
            let mut byte = [1];
            while !stopped.load(Ordering::Relaxed) {
                let asked = Instant::now();
                stream.write_all(&byte)?;
                stream.read_exact(&mut byte)?;
                longest = longest.max(asked.elapsed());
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(longest)
        });
        Self { stop, thread }
    }

    /// Ends it; the longest time without an answer.
    #[track_caller]
    fn longest_gap(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the thread ends").expect("the connection lives")
    }
}

fn reach(from: &Pod, to: &Pod) {
    eventually(&format!("{} to {}", from.ip, to.ip), || from.reaches(to).then_some(()));
}

fn route_to(node: &Node, other: &Node) -> String {
    node.netns.ip(&format!("route show {}", other.env().subnet)).trim().to_owned()
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

const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
const DIRECT: &str =
    r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;

#[test]
fn the_mode_changes_under_a_running_connection() {
    let world = World::new();
    world.configure(VXLAN);
    let nodes = [world.node(1), world.node(2)];
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&pods[0], &pods[1]);
    let streams = [Stream::start(&pods[0], &pods[1]), Stream::start(&pods[1], &pods[0])];
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
        std::thread::sleep(Duration::from_millis(300));
    }
    for stream in streams {
        let gap = stream.longest_gap();
        assert!(gap < Duration::from_secs(1), "{gap:?}");
    }
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
    let (ours, theirs) = (nodes[0].env().subnet, nodes[1].env().subnet);
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
    let far = nodes[1].env().subnet;
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
        let stream = Stream::start(&pods[0], &pods[1]);
        node.ip(&format!("link set {link} down"));
        std::thread::sleep(Duration::from_millis(300));
        if link == "eth0" {
            node.ip("link set eth0 up");
        }
        let start = Instant::now();
        reach(&pods[0], &pods[1]);
        assert!(start.elapsed() < Duration::from_secs(5), "{link}: {:?}", start.elapsed());
        assert!(stream.longest_gap() < Duration::from_secs(5));
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
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":9,"Port":4789}}"#,
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
        let subnet = nodes[0].env().subnet;
        for bad in ["{", r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipsec"}}"#] {
            world.configure(bad);
            eventually("the problem is told", || {
                let problems = nodes[0].status().problems;
                problems.iter().any(|text| text.contains("configuration")).then_some(())
            });
            assert_eq!(nodes[0].env().subnet, subnet);
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
            let subnet = node.env().subnet;
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

#[test]
fn a_node_that_returns_with_another_address_keeps_its_subnet_and_is_found() {
    let world = World::new();
    let (mut moving, other) = (world.node(1), world.node(2));
    let pods = [moving.pod(2), other.pod(2)];
    reach(&pods[0], &pods[1]);
    let subnet = moving.env().subnet;
    moving.kill();
    moving.netns.ip("address flush dev eth0");
    moving.netns.ip("address add 192.0.2.91/24 dev eth0");
    moving.options.node_ip = Ipv4Addr::new(192, 0, 2, 91);
    let start = Instant::now();
    moving.start();
    reach(&pods[1], &pods[0]);
    reach(&pods[0], &pods[1]);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(moving.env().subnet, subnet);
    assert_eq!(world.lease(&moving.key())["PublicIP"], "192.0.2.91");
    assert_eq!(world.subnet_keys().len(), 2);
}

/// IPv6 between two pods: the answer names the client, so that translation on the way would show.
fn reach_ipv6(from: &Netns, from_ip: Ipv6Addr, to: Ipv6Addr) {
    eventually(&format!("{from_ip} to {to}"), || {
        let answer = from.ask(&format!("[{to}]:8081")).ok()?;
        (answer == format!("pod {from_ip}")).then_some(())
    });
}

const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;

#[test]
fn dual_stack_carries_both_families_and_comes_and_goes_under_a_running_connection() {
    let world = World::new();
    world.configure(VXLAN);
    let nodes = [1_u8, 2].map(|last| {
        let host = world.host(last);
        host.ip(&format!("address add 2001:db8::{last}/64 dev eth0 nodad"));
        world.node_in(host, last, |_| {})
    });
    let before = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&before[0], &before[1]);
    let stream = Stream::start(&before[0], &before[1]);
    let subnets = [nodes[0].env().subnet, nodes[1].env().subnet];

    world.configure(DUAL);
    for node in &nodes {
        eventually("an IPv6 subnet", || node.env().ipv6.map(drop));
    }
    assert_eq!([nodes[0].env().subnet, nodes[1].env().subnet], subnets, "IPv4 stays");
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
    assert!(stream.longest_gap() < Duration::from_secs(1));
    assert!(world.subnet_keys().iter().all(|key| !key.contains('&')));
}

#[test]
fn a_dual_stack_node_of_flannels_is_reached_in_both_families() {
    let world = World::new();
    world.configure(DUAL);
    let host = world.host(1);
    host.ip("address add 2001:db8::1/64 dev eth0 nodad");
    let ours = world.node_in(host, 1, |_| {});
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
    let key = format!("{}-24&{}-64", ours.env().subnet.network(), subnet.network());
    let lease = world.lease(&key);
    for (device, local, base, mac, field, ip, peer) in [
        (
            "flannel.1",
            "192.0.2.13",
            "10.244.200.0/32",
            "5e:00:00:00:00:04",
            "BackendData",
            "PublicIP",
            IpNetwork::V4(ours.env().subnet),
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

#[test]
fn connections_outlive_an_outage_of_etcd_and_what_happened_meanwhile_is_caught_up() {
    let mut world = World::new();
    let nodes = [world.node(1), world.node(2)];
    let pods = [nodes[0].pod(2), nodes[1].pod(2)];
    reach(&pods[0], &pods[1]);
    let stream = Stream::start(&pods[0], &pods[1]);
    let outage = std::env::var("OUTAGE_SECONDS").ok().and_then(|text| text.parse().ok());
    world.etcd.stop();
    // Damage while etcd is away is mended from what is known.
    nodes[0].netns.ip("link delete vxlan-orch");
    eventually("mended without etcd", || {
        route_to(&nodes[0], &nodes[1]).contains("vxlan-orch").then_some(())
    });
    std::thread::sleep(Duration::from_secs(outage.unwrap_or(4)));
    assert!(nodes.iter().all(Node::runs));
    world.restart_etcd();
    for node in &nodes {
        eventually("etcd is back", || (node.status().etcd == "healthy").then_some(()));
    }
    let third = world.node(4);
    reach(&third.pod(2), &pods[0]);
    assert!(stream.longest_gap() < Duration::from_secs(5));
    assert_eq!(world.subnet_keys().len(), 3);
}
