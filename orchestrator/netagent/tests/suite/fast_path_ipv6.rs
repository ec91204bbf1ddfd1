//! The fast path for IPv6, beside IPv4 and alone: the same as for IPv4, and what is IPv6's own. Needs root; says so without.

use std::ffi::CString;
use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use orch_ebpf_loader::{Hook, links_with};
use orch_netagent::fast_path::{self, Wanted};
use orch_netagent::policy;
use serde_json::Value;

use crate::fast_path::{ECHO_PORT, Mounted, connect_from, echo, serve_echo};
use crate::support::netns::{Netns, run};
use crate::support::overlay::{self, Pod, eventually};
use crate::support::stream::Streams;
use crate::support::two_nodes::{Host, Shape, World};

const DEVICE: &str = "vxlan-orch-v6";
/// A datagram between these nodes is there in microseconds.
const IMPATIENCE: Duration = Duration::from_millis(200);
/// `ETHTOOL_STXCSUM` (`linux/ethtool.h`).
const ETHTOOL_SET_TX_CHECKSUM: u32 = 0x17;

fn streams(world: &World, from: usize, to: [usize; 2], v6: bool) -> Streams {
    let (one, other) = (&world.hosts[0], &world.hosts[to[0]]);
    Streams::between([
        (&one.pods[from].netns, one.ip(from, v6)),
        (&other.pods[to[1]].netns, other.ip(to[1], v6)),
    ])
}

/// Packets that a device has sent and received.
fn packets(host: &Host, device: &str) -> [u64; 2] {
    let text = host.netns.ip(&format!("-j -s link show dev {device}"));
    let links: Value = serde_json::from_str(&text).expect("JSON");
    ["tx", "rx"].map(|way| links[0]["stats64"][way]["packets"].as_u64().expect("a number"))
}

/// Switched on and off under streams: what goes the long way, and that nothing stands still.
fn passes_by(world: &World, what: &str, to: [usize; 2], v6: bool) {
    let streams = streams(world, 0, to, v6);
    streams.go_on();
    let long = world.forwarded_during(&streams, 90);
    world.switch_on();
    let by_device = || world.hosts.iter().flat_map(|host| packets(host, DEVICE)).sum::<u64>();
    let before = by_device();
    let short = world.forwarded_during(&streams, 90);
    let by_device = by_device() - before;
    for host in &world.hosts {
        host.ensure(Wanted::default());
        for hook in Hook::FAST_PATH {
            assert_eq!(links_with(&host.pins(), hook).expect("read"), [0_u32; 0]);
        }
        let tables = run("ip", &format!("netns exec {} nft list tables", host.netns.name));
        assert!(!tables.contains(fast_path::TABLE), "{tables}");
    }
    let again = world.forwarded_during(&streams, 90);
    let (gap, stream) = streams.longest_gap();
    eprintln!("{what}: {long} packets, then {short}, then {again}; {gap:?} without an answer");
    assert!(short * 4 < long && short * 4 < again, "{what}: {long}, {short}, {again}");
    assert!(by_device * 2 < long, "{what}: {by_device} of {long} packets took the device");
    assert!(gap < Duration::from_secs(1), "{what}: {stream} stood still for {gap:?}");
}

#[test]
fn packets_of_ipv6_flows_pass_by_the_long_way_beside_ipv4() {
    let Some(world) = World::new(Shape::DUAL) else { return };
    passes_by(&world, "IPv6 between nodes", [1, 0], true);
    passes_by(&world, "IPv4 between the same nodes", [1, 0], false);
    passes_by(&world, "IPv6 on one node", [0, 1], true);
}

#[test]
fn packets_of_ipv6_flows_pass_by_the_long_way_without_ipv4() {
    let Some(world) = World::new(Shape::IPV6) else { return };
    passes_by(&world, "IPv6 alone, between nodes", [1, 0], true);
    passes_by(&world, "IPv6 alone, on one node", [0, 1], true);
}

#[test]
fn packets_of_both_families_pass_by_the_long_way_to_nodes_that_are_reached_directly() {
    let Some(world) = World::new(Shape::DUAL_DIRECT) else { return };
    passes_by(&world, "IPv6 to a direct peer", [1, 0], true);
    passes_by(&world, "IPv4 to a direct peer", [1, 0], false);
}

/// Whether a link leaves checksums to whoever comes behind it: as `ethtool -K LINK tx off`, but without the tool.
fn compute_checksums(netns: &Netns, link: &'static str) {
    #[repr(C)]
    struct EthtoolValue {
        cmd: u32,
        data: u32,
    }
    netns.within(move || {
        let socket = UdpSocket::bind("[::]:0").expect("a socket");
        let mut value = EthtoolValue { cmd: ETHTOOL_SET_TX_CHECKSUM, data: 0 };
        // SAFETY: all-zero bytes are a valid `ifreq`, which is plain data.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let name = CString::new(link).expect("a name");
        for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: the request points to `value`, which outlives the call and has the layout of `struct ethtool_value`.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
        assert_eq!(done, 0, "{}", Errno::last());
    });
}

/// Datagrams that came to this node with a wrong checksum.
fn checksum_errors(netns: &Netns) -> u64 {
    let text = netns.within(|| std::fs::read_to_string("/proc/thread-self/net/snmp6"));
    let text = text.expect("read");
    let line = text.lines().find_map(|line| line.strip_prefix("Udp6InCsumErrors"));
    line.and_then(|count| count.trim().parse().ok()).expect("a number")
}

/// The other node's device looks at the outer checksum, as every VXLAN device does over IPv6.
#[test]
fn the_outer_checksum_is_right_whoever_makes_the_inner_one() {
    for by_pod in [true, false] {
        let Some(world) = World::new(Shape::IPV6) else { return };
        let [one, other] = &world.hosts;
        if by_pod {
            compute_checksums(&one.pods[0].netns, "eth0");
        } else {
            compute_checksums(&one.netns, "eth0");
        }
        // So the other one's device takes off what the programs put around.
        assert!(one.ensure(one.wanted()) > 0);
        let streams = streams(&world, 0, [1, 0], true);
        for _ in 0..10 {
            streams.go_on();
            assert_eq!(checksum_errors(&other.netns), 0, "by the pod: {by_pod}");
        }
        let before = [packets(one, DEVICE)[0], packets(other, DEVICE)[1]];
        for _ in 0..50 {
            streams.go_on();
        }
        let after = [packets(one, DEVICE)[0], packets(other, DEVICE)[1]];
        let [sent, received] = [after[0] - before[0], after[1] - before[1]];
        assert!(sent * 4 < received, "{sent} sent by the device, {received} received by one");
        assert_eq!(checksum_errors(&other.netns), 0, "by the pod: {by_pod}");
        let (gap, stream) = streams.longest_gap();
        assert!(gap < Duration::from_secs(1), "{stream} stood still for {gap:?}");
    }
}

#[test]
fn a_policy_cuts_an_ipv6_flow_that_takes_the_short_way() {
    for shape in [Shape::IPV6, Shape::DUAL] {
        let Some(world) = World::new(shape) else { return };
        let [one, other] = &world.hosts;
        for pod in [&one.pods[1], &other.pods[0]] {
            serve_echo(pod);
        }
        world.switch_on();
        for (host, pod) in [(other, 0), (one, 1)] {
            let to = SocketAddr::new(host.ip(pod, true), ECHO_PORT);
            let mut stream = connect_from(&one.pods[0], 6000, to);
            for round in 0..20 {
                echo(&mut stream, round).expect("nothing forbids it");
            }
            let before = host.forwarded();
            for round in 0..20 {
                echo(&mut stream, round).expect("nothing forbids it");
            }
            assert!(host.forwarded() - before < 20, "it takes the short way");
            host.isolate(pod);
            assert!(echo(&mut stream, 99).is_err(), "the next packet feels it");
        }
    }
}

/// A datagram socket in each of two pods, the first one connected to the second one.
fn datagrams(from: &Pod, to: &Pod, at: Ipv6Addr) -> [UdpSocket; 2] {
    let far = to.netns.within(move || UdpSocket::bind((at, 0)).expect("bind"));
    let at = far.local_addr().expect("bound");
    let near = from.netns.within(move || {
        let near = UdpSocket::bind("[::]:0").expect("bind");
        near.connect(at).expect("a route");
        near
    });
    far.set_read_timeout(Some(IMPATIENCE)).expect("set");
    near.set_read_timeout(Some(IMPATIENCE)).expect("set");
    [near, far]
}

/// Whether a datagram of this many bytes arrives. What is answered keeps both directions known.
fn arrives(near: &UdpSocket, far: &UdpSocket, bytes: usize) -> bool {
    let mut buffer = [0; 2000];
    // Of a datagram that came too late for the one who waited.
    far.set_nonblocking(true).expect("set");
    while far.recv(&mut buffer).is_ok() {}
    far.set_nonblocking(false).expect("set");
    if let Err(error) = near.send(&vec![1; bytes]) {
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{error}");
        return false;
    }
    match far.recv_from(&mut buffer) {
        Ok((length, from)) => {
            assert_eq!(length, bytes);
            far.send_to(&[1], from).expect("sent");
            near.recv(&mut buffer).expect("the answer");
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
            false
        }
    }
}

/// Waits until datagrams of this flow take the short way through all nodes that count.
fn becomes_short(hosts: &[Host], near: &UdpSocket, far: &UdpSocket) {
    eventually("the flow is known", || {
        let count = || hosts.iter().map(Host::forwarded).sum::<u64>();
        let before = count();
        (arrives(near, far, 1) && count() == before).then_some(())
    });
}

#[test]
fn each_node_takes_one_hop_and_the_last_one_is_the_kernels() {
    let Some(world) = World::new(Shape::IPV6) else { return };
    let [one, other] = &world.hosts;
    world.switch_on();
    let [near, far] = datagrams(&one.pods[0], &other.pods[0], other.ips6[0]);
    let with = |hops: i32| {
        becomes_short(&world.hosts, &near, &far);
        setsockopt(&near, sockopt::Ipv6Ttl, &hops).expect("set");
        let arrived = arrives(&near, &far, 1);
        setsockopt(&near, sockopt::Ipv6Ttl, &64).expect("set");
        arrived
    };
    // Two nodes forward it.
    for (hops, arrived) in [(3, true), (2, false), (1, false)] {
        assert_eq!(with(hops), arrived, "{hops} hops");
    }
    // On one node it is not forwarded.
    let [near, far] = datagrams(&one.pods[0], &one.pods[1], one.ips6[1]);
    becomes_short(&world.hosts[..1], &near, &far);
    setsockopt(&near, sockopt::Ipv6Ttl, &1).expect("set");
    assert!(arrives(&near, &far, 1));
}

#[test]
fn a_pod_hears_that_a_packet_is_too_big_though_its_flow_is_known() {
    let Some(world) = World::new(Shape::IPV6) else { return };
    let [one, other] = &world.hosts;
    // As of a pod from before the overlay had IPv6.
    one.pods[0].netns.ip("link set eth0 mtu 1500");
    for link in ["veth2", "veth3", "cni0"] {
        one.netns.ip(&format!("link set {link} mtu 1500"));
    }
    world.switch_on();
    let [near, far] = datagrams(&one.pods[0], &other.pods[0], other.ips6[0]);
    becomes_short(&world.hosts, &near, &far);
    // IPv6 and UDP have 48 bytes. The kernel does not cut what may not be cut.
    setsockopt(&near, sockopt::Ipv6DontFrag, &true).expect("set");
    assert!(arrives(&near, &far, 1430 - 48), "just fits");
    becomes_short(&world.hosts, &near, &far);
    assert!(!arrives(&near, &far, 1431 - 48), "too big for the way");
    let to = other.ips6[0];
    eventually("the pod knows how big it may be", || {
        let route = one.pods[0].netns.ip(&format!("-6 route get {to}"));
        route.contains("mtu 1430").then_some(())
    });
}

#[test]
fn the_agent_follows_the_families_of_the_network() {
    let world = overlay::World::new();
    let configure = |families: &str| {
        world.configure(&format!(r#"{{{families},"Backend":{{"Type":"vxlan"}}}}"#));
    };
    let (v4, v6) =
        (r#""Network":"10.244.0.0/16""#, r#""EnableIPv6":true,"IPv6Network":"fd00:10:244::/48""#);
    configure(&format!("{v4},{v6}"));
    let host = world.host(1);
    host.ip("address add 2001:db8::1/64 dev eth0 nodad");
    let node = world.node_in(host, 1, |options| {
        options.policy = orch_netagent::Mode::Auto;
        let plugins = options.paths.cni_bin_dir();
        std::fs::create_dir_all(&plugins).expect("made");
        std::fs::write(plugins.join(policy::PLUGIN), "").expect("written");
    });
    let _mounted = Mounted(node.folder.path().join("sys/fs/bpf"));
    let becomes = |what: &str, rules: [bool; 2], links: usize| {
        eventually(what, || {
            let has_rule = |family| node.nft(&format!("list tables {family}"));
            let has_rule = ["ip", "ip6"].map(|family| {
                has_rule(family)
                    .lines()
                    .any(|line| line == format!("table {family} {}", fast_path::TABLE))
            });
            (has_rule == rules && node.status().fast_path.links == links).then_some(())
        });
    };
    becomes("both, on two devices and the underlay's link", [true, true], 3);
    configure(v4);
    becomes("IPv4 alone", [true, false], 2);
    configure(&format!(r#""EnableIPv4":false,{v6}"#));
    becomes("IPv6 alone", [false, true], 2);
}
