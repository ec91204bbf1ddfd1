//! Packets of pods larger than 64 KiB: where they may be, that they arrive, and that they are small again before a way needs
//! it. Needs root.

use std::net::IpAddr;

use cni_netlink::Netlink;
use orch_config::Paths;
use orch_netagent::big_tcp::{LARGEST, PLAIN};
use serde_json::json;

use crate::support::bulk::{Bulk, mean_packet};
use crate::support::netns::Netns;
use crate::support::overlay::{Node, PREFIX, Pod, World, eventually};
use crate::support::two_nodes::{self, Host, Shape};

/// A node that is not on the others' link, so that they reach it in VXLAN only.
const FAR_SUBNET: &str = "10.244.7.0";
const FAR_LEASE: &str = r#"{"PublicIP":"198.51.100.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:07"}}"#;

/// Both sizes of a link.
fn sizes(netns: &Netns, link: &str) -> [u32; 2] {
    let link = link.to_owned();
    netns.within(move || {
        let netlink = Netlink::open().expect("a socket");
        let sizes = netlink.link(&link).expect("asked").expect("there").sizes;
        [sizes.gso, sizes.gro]
    })
}

fn set_sizes(netns: &Netns, links: &[&str], bytes: u32) {
    let links: Vec<String> = links.iter().map(|link| (*link).to_owned()).collect();
    netns.within(move || {
        let netlink = Netlink::open().expect("a socket");
        for link in links {
            let index = netlink.link(&link).expect("asked").expect("there").index;
            netlink.set_packet_sizes(index, bytes).expect("set");
        }
    });
}

/// What the runtime writes down of a pod that it has attached.
fn remember(node: &Node, pod: &Pod) {
    let cached = json!({
        "kind": "cniCacheV1", "containerId": pod.netns.name, "ifName": "eth0", "networkName": "orch",
        "netns": format!("/run/netns/{}", pod.netns.name),
    });
    let results = Paths::new(node.folder.path()).cni_cache_dir().join("results");
    std::fs::create_dir_all(&results).expect("made");
    let file = results.join(format!("orch-{}-eth0", pod.netns.name));
    std::fs::write(file, cached.to_string()).expect("written");
}

fn configure(world: &World, backend: &str) {
    world.configure(&format!(
        r#"{{"Network":"10.244.0.0/16","SubnetMin":"10.244.100.0","SubnetMax":"10.244.199.0","Backend":{backend}}}"#
    ));
}

fn far_node_comes(world: &World) {
    world.etcdctl(&["put", &format!("{PREFIX}/subnets/{FAR_SUBNET}-24"), FAR_LEASE]);
}

fn far_node_goes(world: &World) {
    world.etcdctl(&["del", &format!("{PREFIX}/subnets/{FAR_SUBNET}-24")]);
}

fn has_far_route(node: &Node) -> bool {
    !node.netns.ip(&format!("route show {FAR_SUBNET}/24")).is_empty()
}

/// Links that packets of the node's one pod pass.
fn all_sizes(node: &Node, pod: &Pod, host_end: &str) -> Vec<[u32; 2]> {
    vec![sizes(&pod.netns, "eth0"), sizes(&node.netns, host_end), sizes(&node.netns, "cni0")]
}

#[track_caller]
fn become_large(node: &Node, pod: &Pod, host_end: &str) {
    eventually("all links take large packets", || {
        let all = all_sizes(node, pod, host_end);
        let status = node.status().big_tcp;
        (all.iter().all(|one| *one == [LARGEST; 2]) && status.on && status.why.is_none())
            .then_some(())
    });
}

#[test]
fn packets_are_large_while_all_nodes_are_on_one_link_and_plain_before_one_is_not() {
    let world = World::new();
    configure(&world, r#"{"Type":"vxlan","DirectRouting":true}"#);
    let hosts = [1, 2].map(|last| world.host(last));
    // The switch and its ports bear them; so whoever made the nodes' links has set these.
    set_sizes(&world.underlay, &["br0", "u1", "u2"], LARGEST);
    hosts.iter().for_each(|host| set_sizes(host, &["eth0"], LARGEST));
    let mut last = 0;
    let mut nodes = hosts.map(|host| {
        last += 1;
        world.node_in(host, last, |_| {})
    });
    let pods = [0, 1].map(|at| {
        let pod = nodes[at].pod(2);
        remember(&nodes[at], &pod);
        pod
    });
    for (node, pod) in nodes.iter().zip(&pods) {
        become_large(node, pod, "veth2");
    }
    let [one, other] = &pods;
    let flows = [(one, other), (other, one)]
        .map(|(from, to)| Bulk::between(&from.netns, &to.netns, IpAddr::V4(to.ip)));
    let have_large = |what: &str| {
        for pod in &pods {
            eventually(what, || (mean_packet(&pod.netns, "eth0") > PLAIN.into()).then_some(()));
        }
    };
    have_large("packets are large");

    far_node_comes(&world);
    for (node, pod) in nodes.iter().zip(&pods) {
        eventually("the far node has a route", || has_far_route(node).then_some(()));
        assert_eq!(sizes(&pod.netns, "eth0"), [PLAIN; 2], "before there is such a route");
        assert!(all_sizes(node, pod, "veth2").iter().all(|one| *one == [PLAIN; 2]));
        let why = eventually("it is said why", || node.status().big_tcp.why);
        assert_eq!(why, format!("VXLAN to 198.51.100.7 ({FAR_SUBNET}/24)"));
        // Connections that live do not go on with what would have to be cut in software.
        eventually("packets are plain, but not cut into frames", || {
            let mean = mean_packet(&pod.netns, "eth0");
            (8192 < mean && mean <= PLAIN.into()).then_some(())
        });
    }
    flows.iter().for_each(Bulk::goes_on);

    far_node_goes(&world);
    for (node, pod) in nodes.iter().zip(&pods) {
        become_large(node, pod, "veth2");
    }
    have_large("packets are large again, in connections that live");
    for flow in flows {
        let gap = flow.longest_gap();
        eprintln!("longest gap: {gap:?}");
        assert!(gap.as_secs() < 1, "a connection stood still for {gap:?}");
    }

    // What somebody else changes, and pods that come.
    set_sizes(&nodes[0].netns, &["veth2"], PLAIN);
    let new = nodes[0].pod(3);
    remember(&nodes[0], &new);
    for (pod, host_end) in [(&pods[0], "veth2"), (&new, "veth3")] {
        become_large(&nodes[0], pod, host_end);
    }

    // An agent that was away finds out before it makes the route.
    nodes[0].kill();
    far_node_comes(&world);
    eventually("the other node has the route", || has_far_route(&nodes[1]).then_some(()));
    assert_eq!(sizes(&pods[0].netns, "eth0"), [LARGEST; 2]);
    nodes[0].start();
    eventually("the far node has a route", || has_far_route(&nodes[0]).then_some(()));
    for pod in [&pods[0], &new] {
        assert_eq!(sizes(&pod.netns, "eth0"), [PLAIN; 2]);
    }
    assert_eq!(sizes(&nodes[0].netns, "eth0"), [LARGEST; 2], "another's setting");
}

#[test]
fn the_networks_setting_is_followed_and_a_link_that_takes_less_is_named() {
    let world = World::new();
    configure(&world, r#"{"Type":"host-gw","BigTCP":true}"#);
    let node = world.node(1);
    let pods = [2, 3].map(|last| {
        let pod = node.pod(last);
        remember(&node, &pod);
        pod
    });
    let refused = eventually("it is a problem", || node.status().big_tcp.problem);
    assert_eq!(refused, "BIG TCP is not on: eth0 takes 65536 bytes");
    assert_eq!(sizes(&pods[0].netns, "eth0"), [PLAIN; 2]);
    set_sizes(&node.netns, &["eth0"], LARGEST);
    become_large(&node, &pods[0], "veth2");

    // One with a limit sends plain packets, and gets large ones by its queue.
    let shaped = node.pod(4);
    node.netns.tc("qdisc add dev veth4 root tbf rate 400mbit burst 1mb latency 25ms");
    remember(&node, &shaped);
    eventually("the pod is seen to", || (node.status().big_tcp.pods == 3).then_some(()));
    assert_eq!(sizes(&shaped.netns, "eth0"), [PLAIN; 2]);
    assert_eq!(sizes(&node.netns, "veth4"), [LARGEST; 2]);
    let flow = Bulk::between(&pods[1].netns, &shaped.netns, IpAddr::V4(shaped.ip));
    flow.goes_on();
    let gap = flow.longest_gap();
    assert!(gap.as_secs() < 1, "the queue stood still for {gap:?}");

    let flow = Bulk::between(&pods[0].netns, &pods[1].netns, IpAddr::V4(pods[1].ip));
    let mean = || mean_packet(&pods[0].netns, "eth0");
    eventually("packets are large", || (mean() > PLAIN.into()).then_some(()));
    configure(&world, r#"{"Type":"host-gw","BigTCP":false}"#);
    eventually("all is plain", || {
        let all = all_sizes(&node, &pods[0], "veth2");
        let off = node.status().big_tcp.why == Some("set so".to_owned());
        (off && all.iter().all(|one| *one == [PLAIN; 2])).then_some(())
    });
    eventually("and not cut into frames", || {
        let mean = mean();
        (8192 < mean && mean <= PLAIN.into()).then_some(())
    });
    let gap = flow.longest_gap();
    assert!(gap.as_secs() < 1, "the connection stood still for {gap:?}");
}

/// How much is sent while packets are counted: each `goes_on` is several packets of any size.
const COUNTED: usize = 30;

#[test]
fn large_packets_are_judged_and_take_the_fast_path_as_others_do() {
    let Some(world) = two_nodes::World::new(Shape::DUAL_DIRECT) else { return };
    set_sizes(&world.underlay, &["br0", "u1", "u2"], LARGEST);
    for host in &world.hosts {
        set_sizes(&host.netns, &["eth0", "cni0", "veth2", "veth3"], LARGEST);
        host.pods.iter().for_each(|pod| set_sizes(&pod.netns, &["eth0"], LARGEST));
    }
    let [one, other] = &world.hosts;
    let from = &one.pods[0];
    let flows = |v6| {
        [(other, 0), (one, 1)]
            .map(|(host, pod)| Bulk::between(&from.netns, &host.pods[pod].netns, host.ip(pod, v6)))
    };
    let large = flows(false);
    let forwarded = || {
        let count = || world.hosts.iter().map(Host::forwarded).sum::<u64>();
        eventually("packets are large", || {
            (mean_packet(&from.netns, "eth0") > PLAIN.into()).then_some(())
        });
        let before = count();
        for _ in 0..COUNTED {
            large.iter().for_each(Bulk::goes_on);
        }
        count() - before
    };
    let long = forwarded();
    world.switch_on();
    let short = forwarded();
    // IPv6 has plain sizes: routers do not take larger ones.
    let plain = flows(true);
    plain.iter().for_each(Bulk::goes_on);
    for flow in large.into_iter().chain(plain) {
        let gap = flow.longest_gap();
        assert!(gap.as_secs() < 1, "a connection stood still for {gap:?}");
    }
    eprintln!("{long} packets the long way, then {short}");
    assert!(short * 4 < long, "{long}, {short}");
}
