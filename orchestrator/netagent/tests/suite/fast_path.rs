//! The fast path on two nodes joined by VXLAN: what passes by the long way, what does not, and that policies and Services
//! hold. Needs root; says so without.

use std::io::{Read as _, Write as _};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket,
};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use orch_ebpf_loader::{Hook, Pins, links_with};
use orch_netagent::fast_path::{self, Wanted};
use orch_netagent::policy;
use orch_netagent::services::model::{Endpoint as Backend, Port, Protocol};
use orch_netagent::services::proxy::Proxy;
use orch_netagent::services::ruleset::Networks;

use crate::support::netns::{Netns, run};
use crate::support::overlay::{self, Pod, eventually, join};
use crate::support::stream::Streams;
use crate::support::two_nodes::{Shape, World};

const SERVICE_PORT: u16 = 80;
pub(crate) const ECHO_PORT: u16 = 9000;
/// Longer than anything that a wrong decision would survive.
const ROUNDS: u32 = 400;
/// Packets of the pod that would be another node.
const FORGED: usize = 40;
const LIMIT: Duration = Duration::from_secs(3);

/// A server in a pod that sends back what it gets, in both families, each connection in a thread of its own.
pub(crate) fn serve_echo(pod: &Pod) {
    let (ready, started) = std::sync::mpsc::channel();
    pod.netns.spawn(move || {
        let listener = TcpListener::bind(("::", ECHO_PORT)).expect("bind");
        ready.send(()).expect("the test waits");
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut buffer = [0; 16];
                while stream.read_exact(&mut buffer).is_ok() && stream.write_all(&buffer).is_ok() {}
            });
        }
    });
    started.recv().expect("the server starts");
}

/// A connection from a port that another connection may have as well, to another address.
pub(crate) fn connect_from(pod: &Pod, port: u16, to: impl Into<SocketAddr>) -> TcpStream {
    let to = to.into();
    let (family, any) = if to.is_ipv4() {
        (AddressFamily::Inet, Ipv4Addr::UNSPECIFIED.into())
    } else {
        (AddressFamily::Inet6, Ipv6Addr::UNSPECIFIED.into())
    };
    pod.netns.within(move || {
        let fd: OwnedFd =
            socket(family, SockType::Stream, SockFlag::empty(), None).expect("socket");
        setsockopt(&fd, sockopt::ReuseAddr, &true).expect("set");
        let from = SockaddrStorage::from(SocketAddr::new(any, port));
        bind(fd.as_raw_fd(), &from).expect("bind");
        connect(fd.as_raw_fd(), &SockaddrStorage::from(to)).expect("connect");
        let stream = TcpStream::from(fd);
        stream.set_read_timeout(Some(LIMIT)).expect("set");
        stream.set_nodelay(true).expect("set");
        stream
    })
}

/// Sends a number and gets it back.
pub(crate) fn echo(stream: &mut TcpStream, number: u32) -> std::io::Result<()> {
    let mut message = [0; 16];
    message[..4].copy_from_slice(&number.to_be_bytes());
    stream.write_all(&message)?;
    let mut answer = [0; 16];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, message);
    Ok(())
}

#[test]
fn packets_of_known_flows_pass_by_the_long_way_between_nodes_and_on_one() {
    let Some(world) = World::new(Shape::IPV4) else { return };
    let [one, other] = &world.hosts;
    for (what, from, to) in [
        ("between nodes", &one.pods[0], &other.pods[0]),
        ("on one node", &one.pods[0], &one.pods[1]),
    ] {
        let streams =
            Streams::between([(&from.netns, IpAddr::V4(from.ip)), (&to.netns, IpAddr::V4(to.ip))]);
        streams.go_on();
        let long = world.forwarded_during(&streams, 150);
        world.switch_on();
        let short = world.forwarded_during(&streams, 150);
        for host in &world.hosts {
            host.ensure(Wanted::default());
            let (pins, rules) = (
                host.pins(),
                run("ip", &format!("netns exec {} nft list tables", host.netns.name)),
            );
            assert_eq!(links_with(&pins, Hook::FastEnter).expect("read"), [0_u32; 0]);
            assert_eq!(links_with(&pins, Hook::FastLeave).expect("read"), [0_u32; 0]);
            assert!(!rules.contains(fast_path::TABLE), "{rules}");
        }
        let again = world.forwarded_during(&streams, 150);
        let (gap, stream) = streams.longest_gap();
        eprintln!("{what}: {long} packets, then {short}, then {again}; {gap:?} without an answer");
        assert!(short * 4 < long && short * 4 < again, "{what}: {long}, {short}, {again}");
        assert!(gap < Duration::from_secs(1), "{what}: {stream} stood still for {gap:?}");
    }
}

#[test]
fn connections_to_a_service_and_to_its_endpoint_do_not_mix_even_from_one_port() {
    do_not_mix(Shape::IPV4, ["10.96.3.4", "10.244.0.0/16", "10.96.0.0/12", "10.96.0.10"]);
}

#[test]
fn connections_to_an_ipv6_service_and_to_its_endpoint_do_not_mix_even_from_one_port() {
    let services = ["fd00:10:96::304", "fd00:10:244::/48", "fd00:10:96::/112", "fd00:10:96::a"];
    do_not_mix(Shape::IPV6, services);
}

/// `words` are the Service's address, the networks of pods and of Services, and the address of DNS.
fn do_not_mix(shape: Shape, words: [&'static str; 4]) {
    let Some(world) = World::new(shape) else { return };
    let [one, other] = &world.hosts;
    let server = other.ip(0, shape.v6);
    let service: IpAddr = words[0].parse().expect("an address");
    serve_echo(&other.pods[0]);
    let port = Port {
        id: "default/echo/tcp/80".to_owned(),
        protocol: Protocol::Tcp,
        cluster_ips: vec![service],
        port: SERVICE_PORT,
        node_port: None,
        external_ips: Vec::new(),
        balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        external_local: false,
        internal_local: false,
        affinity: None,
        endpoints: vec![Backend {
            ip: server,
            port: ECHO_PORT,
            local: false,
            ready: true,
            near: false,
        }],
    };
    one.netns.within(move || {
        let networks = Networks {
            cluster: words[1].parse().expect("CIDR"),
            service: words[2].parse().expect("CIDR"),
            dns_ip: words[3].parse().expect("an address"),
        };
        Proxy::default().apply(&[port], &[networks]).expect("nft");
    });
    world.switch_on();
    let client = &one.pods[0];
    let (service, direct) =
        (SocketAddr::new(service, SERVICE_PORT), SocketAddr::new(server, ECHO_PORT));
    let plain = connect_from(client, 5001, direct);
    // The first of a pair has the tuple for itself; the second one gets another port from conntrack.
    let service_first = connect_from(client, 5000, service);
    let direct_second = connect_from(client, 5000, direct);
    let direct_first = connect_from(client, 5002, direct);
    let service_second = connect_from(client, 5002, service);
    let mut streams = [plain, service_first, direct_second, direct_first, service_second];
    for round in 0..ROUNDS {
        for (which, stream) in (0_u32..).zip(&mut streams) {
            echo(stream, round * 16 + which).unwrap_or_else(|error| {
                panic!("connection {which}, round {round}: {error}");
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let before = one.forwarded();
    for round in 0..100 {
        echo(&mut streams[0], round).expect("goes on");
    }
    assert!(one.forwarded() - before < 50, "what is not translated takes the short way");
    let before = one.forwarded();
    for round in 0..100 {
        echo(&mut streams[1], round).expect("goes on");
    }
    assert!(one.forwarded() - before >= 200, "what is translated goes the long way, both ways");
}

#[test]
fn a_policy_cuts_a_flow_that_takes_the_short_way() {
    let Some(world) = World::new(Shape::IPV4) else { return };
    let [one, other] = &world.hosts;
    for pod in [&one.pods[1], &other.pods[0]] {
        serve_echo(pod);
    }
    world.switch_on();
    for (host, pod) in [(other, 0), (one, 1)] {
        let to = SocketAddrV4::new(host.pods[pod].ip, ECHO_PORT);
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

/// A VXLAN packet whose inner frame is for that VTEP, less what a socket puts around it.
fn forged(vtep: [u8; 6]) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0, 0, 0, 1, 0];
    payload.extend(vtep);
    payload.extend([2, 0, 0, 0, 1, 1, 8, 0]);
    payload.extend([0x45; 64]);
    payload
}

#[test]
fn a_pod_cannot_draw_the_traffic_between_nodes_to_a_host_outside() {
    let Some(world) = World::new(Shape::IPV4) else { return };
    let [one, other] = &world.hosts;
    let outside = Netns::new("outside");
    join(&world.underlay, &outside, 9);
    let trap = outside.within(|| UdpSocket::bind("0.0.0.0:8472").expect("bind"));
    trap.set_read_timeout(Some(Duration::from_millis(200))).expect("set");
    world.switch_on();
    let streams = Streams::between([
        (&one.pods[0].netns, IpAddr::V4(one.pods[0].ip)),
        (&other.pods[0].netns, IpAddr::V4(other.pods[0].ip)),
    ]);
    for _ in 0..FORGED {
        streams.go_on();
        one.pods[1].netns.within(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
            socket.send_to(&forged([2, 0, 0, 0, 4, 2]), "192.0.2.9:8472").expect("sent");
        });
    }
    let (gap, stream) = streams.longest_gap();
    assert!(gap < Duration::from_secs(1), "{stream} stood still for {gap:?}");
    let mut buffer = [0; 256];
    let arrived = std::iter::from_fn(|| trap.recv(&mut buffer).ok()).count();
    assert_eq!(arrived, FORGED, "its own packets, and no other");
}

/// Whether conntrack bears packets that it does not expect, in this node's namespace.
fn is_liberal(netns: &Netns) -> bool {
    let file = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
    netns.within(move || std::fs::read_to_string(file)).expect("read").trim() == "1"
}

/// A server that reads as many bytes as it is told, each time, and says when it has them.
fn serve_sink(pod: &Pod) {
    let (ready, started) = std::sync::mpsc::channel();
    pod.netns.spawn(move || {
        let listener = TcpListener::bind(("0.0.0.0", ECHO_PORT)).expect("bind");
        ready.send(()).expect("the test waits");
        let (mut stream, _) = listener.accept().expect("a client");
        let mut length = [0; 8];
        while stream.read_exact(&mut length).is_ok() {
            let mut part = (&mut stream).take(u64::from_be_bytes(length));
            if std::io::copy(&mut part, &mut std::io::sink()).is_err()
                || stream.write_all(&[1]).is_err()
            {
                break;
            }
        }
    });
    started.recv().expect("the server starts");
}

/// Sends that many bytes and waits until they are there.
fn send_all(stream: &mut TcpStream, bytes: usize) -> std::io::Result<()> {
    stream.write_all(&u64::try_from(bytes).expect("fits").to_be_bytes())?;
    stream.write_all(&vec![0; bytes])?;
    stream.read_exact(&mut [0])
}

/// What a device has sent, in packets.
fn sent_by(netns: &Netns, device: &'static str) -> u64 {
    let all = netns.within(|| std::fs::read_to_string("/proc/thread-self/net/dev")).expect("read");
    let line = all.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    // Eight numbers of what it has received, then bytes and packets.
    let packets = line.expect("the device").split_whitespace().nth(9);
    packets.expect("a number").parse().expect("a number")
}

/// A server that hears that many bytes of a known pattern and answers, or hangs up.
fn serve_pattern(pod: &Pod) {
    let (ready, started) = std::sync::mpsc::channel();
    pod.netns.spawn(move || {
        let listener = TcpListener::bind(("0.0.0.0", ECHO_PORT)).expect("bind");
        ready.send(()).expect("the test waits");
        let (mut stream, _) = listener.accept().expect("a client");
        let (want, mut got) = (pattern(), vec![0; PATTERN_BYTES]);
        while stream.read_exact(&mut got).is_ok() && got == want && stream.write_all(&[1]).is_ok() {
        }
    });
    started.recv().expect("the server starts");
}

const PATTERN_BYTES: usize = 4 << 20;

/// No two words of it are alike, so nothing can be lost, doubled or swapped.
fn pattern() -> Vec<u8> {
    (0..u32::try_from(PATTERN_BYTES / 4).expect("fits")).flat_map(u32::to_be_bytes).collect()
}

/// Many segments in one packet get one VXLAN header, and whoever sends them on makes packets of them: the link, if it can, or the
/// kernel.
#[test]
fn large_packets_are_wrapped_whole_and_any_link_can_carry_them() {
    let Some(world) = World::new(Shape::IPV4) else { return };
    let [one, other] = &world.hosts;
    serve_pattern(&other.pods[0]);
    world.switch_on();
    let to = SocketAddrV4::new(other.pods[0].ip, ECHO_PORT);
    let mut stream = connect_from(&one.pods[0], 6000, to);
    let pattern = pattern();
    for (what, sizes) in [
        ("large packets on the wire", None),
        ("single ones", Some("gso_max_size 1500")),
        ("large ones again", Some("gso_max_size 65536")),
    ] {
        if let Some(sizes) = sizes {
            one.netns.ip(&format!("link set eth0 {sizes}"));
        }
        let (wire, device) = (sent_by(&one.netns, "eth0"), sent_by(&one.netns, "vxlan-orch"));
        for _ in 0..8 {
            stream.write_all(&pattern).expect("sent");
            stream.read_exact(&mut [0]).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        let wire = sent_by(&one.netns, "eth0") - wire;
        let device = sent_by(&one.netns, "vxlan-orch") - device;
        eprintln!("{what}: {wire} packets on the wire, {device} by the device");
        let segments = 8 * PATTERN_BYTES as u64 / 1450;
        if what == "single ones" {
            assert!(wire >= segments, "{what}: {wire} packets");
        } else {
            assert!(wire < segments / 4, "{what}: {wire} packets");
        }
        assert!(device < segments / 160, "{what}: {device} packets took the long way");
    }
}

/// Sends on behind the FIN of a client that has only asked, and so is the last to end the connection.
#[test]
fn conntrack_sees_the_end_of_a_connection_of_which_one_half_was_closed_before() {
    let Some(world) = World::new(Shape::IPV4) else { return };
    let [one, other] = &world.hosts;
    let (ready, started) = std::sync::mpsc::channel();
    other.pods[0].netns.spawn(move || {
        let listener = TcpListener::bind(("0.0.0.0", ECHO_PORT)).expect("bind");
        ready.send(()).expect("the test waits");
        for mut stream in listener.incoming().flatten() {
            stream.read_to_end(&mut Vec::new()).expect("its question");
            stream.write_all(&pattern()).expect("sent");
        }
    });
    started.recv().expect("the server starts");
    world.switch_on();
    let to = SocketAddrV4::new(other.pods[0].ip, ECHO_PORT);
    for port in 6000..6004 {
        let mut stream = connect_from(&one.pods[0], port, to);
        stream.write_all(b"all that you have").expect("sent");
        stream.shutdown(std::net::Shutdown::Write).expect("half closed");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("all of it");
        assert_eq!(got.len(), PATTERN_BYTES);
        drop(stream);
        for host in &world.hosts {
            let list = format!(
                "netns exec {} conntrack -L -p tcp --orig-port-src {port}",
                host.netns.name
            );
            eventually("conntrack has seen the last packet", || {
                run("ip", &list).contains("TIME_WAIT").then_some(())
            });
        }
    }
}

#[test]
fn conntrack_is_strict_again_without_the_fast_path_and_connections_of_it_go_on() {
    let Some(world) = World::new(Shape::IPV4) else { return };
    let [one, other] = &world.hosts;
    for host in &world.hosts {
        // As firewalls have it.
        host.nft(
            "table inet strict {
                chain forward {
                    type filter hook forward priority -190;
                    ct state invalid drop
                }
            }
",
        );
        assert!(!is_liberal(&host.netns));
    }
    serve_sink(&other.pods[0]);
    world.switch_on();
    assert!(is_liberal(&one.netns) && is_liberal(&other.netns));
    let to = SocketAddrV4::new(other.pods[0].ip, ECHO_PORT);
    let mut stream = connect_from(&one.pods[0], 6000, to);
    // More than any window, past conntrack.
    let before = one.forwarded();
    for _ in 0..64 {
        send_all(&mut stream, 1 << 20).expect("it goes on");
    }
    assert!(one.forwarded() - before < (64 << 20) / (1 << 16), "it takes the short way");
    // Another run than the one that switched it on.
    for host in &world.hosts {
        host.ensure(Wanted::default());
        assert!(!is_liberal(&host.netns), "as it was");
        assert_eq!(host.ensure(Wanted::default()), 0, "and nothing is left to do");
    }
    for _ in 0..4 {
        send_all(&mut stream, 1 << 20).expect("it goes on");
    }
    // What somebody else has set is left alone.
    one.netns.within(|| {
        let file = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
        std::fs::write(file, "1").expect("written");
    });
    one.ensure(one.wanted());
    one.ensure(Wanted::default());
    assert!(is_liberal(&one.netns), "it is not ours");
}

/// Unmounts when dropped, also by a test that failed.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn the_agent_follows_the_networks_setting() {
    let world = overlay::World::new();
    let configure = |more: &str| {
        world.configure(&format!(
            r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"vxlan"{more}}}}}"#
        ));
    };
    configure("");
    let node = world.node_with(1, |options| {
        options.policy = orch_netagent::Mode::Auto;
        let plugins = options.paths.cni_bin_dir();
        std::fs::create_dir_all(&plugins).expect("made");
        std::fs::write(plugins.join(policy::PLUGIN), "").expect("written");
    });
    let _mounted = Mounted(node.folder.path().join("sys/fs/bpf"));
    let pins = Pins::below(node.folder.path());
    let has_rule = || node.nft("list tables ip").contains(fast_path::TABLE);
    let has_table = || node.nft("list tables").contains(fast_path::TABLE);
    eventually("it is on unasked: on the VXLAN device and the underlay's link", || {
        (node.status().fast_path.links == 2 && has_rule()).then_some(())
    });
    assert_eq!(links_with(&pins, Hook::FastEnter).expect("read").len(), 2);
    assert!(is_liberal(&node.netns));
    configure(r#","FastPath":false"#);
    eventually("nothing of it is left", || {
        let links = links_with(&pins, Hook::FastLeave).expect("read");
        (!node.status().fast_path.on && links.is_empty() && !has_table()).then_some(())
    });
    assert!(!is_liberal(&node.netns));
}
