//! The fast path on two nodes joined by VXLAN: what passes by the long way, what does not, and that policies and Services
//! hold. Needs root; says so without.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use cni_netlink::Netlink;
use cni_nftables::Nft;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
};
use orch_ebpf_loader::{ClassMap, Hook, Maps, Pins, RuleTable, attach, install, links_with};
use orch_ebpf_maps::{
    ADDRESS_SERVICE, ClassKey, Config, Endpoint, ISOLATED_EGRESS, ISOLATED_INGRESS, state,
};
use orch_netagent::fast_path::{self, FastPath, Wanted};
use orch_netagent::network::NetworkConfig;
use orch_netagent::policy;
use orch_netagent::services::model::{Endpoint as Backend, Port, Protocol};
use orch_netagent::services::proxy::Proxy;
use orch_netagent::services::ruleset::Networks;
use orch_netagent::sysctl;
use tempfile::TempDir;

use crate::support::netns::{Netns, run};
use crate::support::overlay::{self, Pod, eventually, join};
use crate::support::stream::Streams;

const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 3, 4);
const SERVICE_PORT: u16 = 80;
const ECHO_PORT: u16 = 9000;
/// Longer than anything that a wrong decision would survive.
const ROUNDS: u32 = 400;
/// Packets of the pod that would be another node.
const FORGED: usize = 40;
const LIMIT: Duration = Duration::from_secs(3);

struct Host {
    netns: Netns,
    folder: TempDir,
    pods: Vec<Pod>,
}

struct World {
    underlay: Netns,
    hosts: [Host; 2],
}

impl Drop for Host {
    fn drop(&mut self) {
        // Whoever copied the mounts just then keeps it busy.
        let folder = self.folder.path().join("sys/fs/bpf");
        let _ = nix::mount::umount2(&folder, nix::mount::MntFlags::MNT_DETACH);
    }
}

impl Host {
    fn new(underlay: &Netns, number: u8) -> Self {
        let (netns, other) = (Netns::new("node"), 3 - number);
        join(underlay, &netns, number);
        netns.ip(&format!(
            "link add vxlan-orch mtu 1450 address 02:00:00:00:01:0{number} type vxlan id 1 dstport 8472 local 192.0.2.{number} dev eth0 nolearning"
        ));
        netns.ip(&format!("address add 10.244.{number}.0/32 dev vxlan-orch"));
        netns.ip("link set vxlan-orch up");
        netns.ip(&format!(
            "neighbour add 10.244.{other}.0 lladdr 02:00:00:00:01:0{other} dev vxlan-orch nud permanent"
        ));
        netns.bridge(&format!(
            "fdb add 02:00:00:00:01:0{other} dev vxlan-orch dst 192.0.2.{other} self permanent"
        ));
        netns.ip(&format!(
            "route add 10.244.{other}.0/24 via 10.244.{other}.0 dev vxlan-orch onlink"
        ));
        let subnet = format!("10.244.{number}.0/24").parse().expect("CIDR");
        let pods = [2, 3].map(|last| Pod::attach(&netns, subnet, 1450, last)).into();
        let report = netns.within(|| sysctl::ensure(&["eth0", "vxlan-orch"], None));
        assert!(report.errors.is_empty(), "{:?}", report.errors);
        let host = Self { netns, folder: tempfile::tempdir().expect("a folder"), pods };
        host.nft(
            "table ip seen {
                counter packets-seen { }
                chain forward {
                    type filter hook forward priority -200;
                    counter name packets-seen
                }
            }
",
        );
        host.enforce();
        host
    }

    fn pins(&self) -> Pins {
        Pins::below(self.folder.path())
    }

    fn maps(&self) -> Maps {
        Maps::open(&self.pins()).expect("pinned")
    }

    /// As plugin and agent do it, with no policy that selects the pods.
    fn enforce(&self) {
        let pins = self.pins();
        let rows: Vec<(String, Endpoint)> = self
            .pods
            .iter()
            .map(|pod| {
                let mac = pod.netns.within(|| {
                    let netlink = Netlink::open().expect("a socket");
                    netlink.link("eth0").expect("asked").expect("there").mac
                });
                let addr = pod.ip.to_bits().to_be();
                let row =
                    Endpoint { uid: addr, addr, mac, state: state::READY, ..Endpoint::default() };
                (format!("veth{}", pod.ip.octets()[3]), row)
            })
            .collect();
        self.netns.within(move || {
            let mut maps = install(&pins).expect("installed");
            maps.put_address(ClassKey::new(Ipv4Addr::new(10, 96, 0, 0), 12), ADDRESS_SERVICE)
                .expect("put");
            maps.set_settings(Config::new(8472, false)).expect("set");
            for (name, row) in rows {
                let index = nix::net::if_::if_nametoindex(name.as_str()).expect("made");
                maps.insert_endpoint(index, row).expect("inserted");
                for hook in [Hook::FromPod, Hook::ToPod] {
                    attach(&pins, &name, index, hook).expect("attached");
                }
            }
            for name in ["vxlan-orch", "eth0"] {
                let wire = nix::net::if_::if_nametoindex(name).expect("made");
                attach(&pins, name, wire, Hook::ToWire).expect("attached");
            }
        });
    }

    fn wanted(&self) -> Wanted {
        let config =
            NetworkConfig::new("10.244.0.0/16".parse().expect("CIDR"), 24, 1, 8472).expect("valid");
        let pods = self.maps().endpoints().expect("read").into_iter().map(|(index, _)| index);
        let pods = pods.collect();
        self.netns.within(move || {
            let netlink = Netlink::open().expect("a socket");
            let (links, shaped) = fast_path::observe_links(&netlink).expect("asked");
            fast_path::desired(&config, &links, &pods, &shaped)
        })
    }

    /// Makes it so; how many steps that took.
    fn ensure(&self, want: Wanted) -> usize {
        let pins = self.pins();
        self.netns.within(move || FastPath::default().ensure(&pins, &want).expect("made"))
    }

    fn nft(&self, script: &str) {
        let script = script.to_owned();
        self.netns.within(move || Nft::default().apply(&script).expect("nft"));
    }

    /// Packets that the node has forwarded the long way.
    fn forwarded(&self) -> u64 {
        let text = run(
            "ip",
            &format!("netns exec {} nft list counter ip seen packets-seen", self.netns.name),
        );
        let packets = text.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
        packets.and_then(|count| count.parse().ok()).expect(&text)
    }

    /// Closes a pod from now on, both ways: what it sends on its own is a flow of its own.
    fn isolate(&self, pod: usize) {
        let (index, row) = self.row(pod);
        let mut maps = self.maps();
        let classes = ClassMap::build(std::iter::empty()).expect("built");
        let rules = RuleTable::build(std::iter::empty()).expect("built");
        maps.put_class_map(7, &classes).expect("put");
        maps.put_table(7, &rules).expect("put");
        let flags = ISOLATED_INGRESS | ISOLATED_EGRESS;
        let closed = Endpoint { flags, generation: 7, class_map: 7, table: 7, ..row };
        maps.update_endpoint(index, closed).expect("written");
    }

    fn row(&self, pod: usize) -> (u32, Endpoint) {
        let addr = self.pods[pod].ip.to_bits().to_be();
        let rows: BTreeMap<_, _> = self.maps().endpoints().expect("read").into_iter().collect();
        rows.into_iter().find(|(_, row)| row.addr == addr).expect("a row")
    }
}

impl World {
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("ignored: needs root");
            return None;
        }
        let underlay = Netns::new("underlay");
        underlay.ip("link add br0 type bridge");
        underlay.ip("link set br0 up");
        underlay.within(|| {
            let _ = std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        });
        let hosts = [1, 2].map(|number| Host::new(&underlay, number));
        Some(Self { underlay, hosts })
    }

    fn switch_on(&self) {
        for host in &self.hosts {
            assert!(host.ensure(host.wanted()) > 0);
        }
    }

    /// Packets that both nodes forward the long way while the streams get this many answers each.
    fn forwarded_during(&self, streams: &Streams, answers: u32) -> u64 {
        let count = || self.hosts.iter().map(Host::forwarded).sum::<u64>();
        let before = count();
        for _ in 0..answers / 3 {
            streams.go_on();
        }
        count() - before
    }
}

/// A server in a pod that sends back what it gets, each connection in a thread of its own.
fn serve_echo(pod: &Pod) {
    let (ready, started) = std::sync::mpsc::channel();
    pod.netns.spawn(move || {
        let listener = TcpListener::bind(("0.0.0.0", ECHO_PORT)).expect("bind");
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
fn connect_from(pod: &Pod, port: u16, to: SocketAddrV4) -> TcpStream {
    pod.netns.within(move || {
        let fd: OwnedFd =
            socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).expect("socket");
        setsockopt(&fd, sockopt::ReuseAddr, &true).expect("set");
        bind(fd.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port)).expect("bind");
        connect(fd.as_raw_fd(), &SockaddrIn::from(to)).expect("connect");
        let stream = TcpStream::from(fd);
        stream.set_read_timeout(Some(LIMIT)).expect("set");
        stream.set_nodelay(true).expect("set");
        stream
    })
}

/// Sends a number and gets it back.
fn echo(stream: &mut TcpStream, number: u32) -> std::io::Result<()> {
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
    let Some(world) = World::new() else { return };
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
    let Some(world) = World::new() else { return };
    let [one, other] = &world.hosts;
    let server = other.pods[0].ip;
    serve_echo(&other.pods[0]);
    let port = Port {
        id: "default/echo/tcp/80".to_owned(),
        protocol: Protocol::Tcp,
        cluster_ips: vec![SERVICE.into()],
        port: SERVICE_PORT,
        node_port: None,
        external_ips: Vec::new(),
        balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        external_local: false,
        internal_local: false,
        affinity: None,
        endpoints: vec![Backend {
            ip: server.into(),
            port: ECHO_PORT,
            local: false,
            ready: true,
            near: false,
        }],
    };
    one.netns.within(move || {
        let networks = Networks {
            cluster: "10.244.0.0/16".parse().expect("CIDR"),
            service: "10.96.0.0/12".parse().expect("CIDR"),
            dns_ip: Ipv4Addr::new(10, 96, 0, 10).into(),
        };
        Proxy::default().apply(&[port], &[networks]).expect("nft");
    });
    world.switch_on();
    let client = &one.pods[0];
    let (service, direct) =
        (SocketAddrV4::new(SERVICE, SERVICE_PORT), SocketAddrV4::new(server, ECHO_PORT));
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
    let Some(world) = World::new() else { return };
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
    let Some(world) = World::new() else { return };
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
            socket.send_to(&forged([2, 0, 0, 0, 1, 2]), "192.0.2.9:8472").expect("sent");
        });
    }
    let (gap, stream) = streams.longest_gap();
    assert!(gap < Duration::from_secs(1), "{stream} stood still for {gap:?}");
    let mut buffer = [0; 256];
    let arrived = std::iter::from_fn(|| trap.recv(&mut buffer).ok()).count();
    assert_eq!(arrived, FORGED, "its own packets, and no other");
}

/// Unmounts when dropped, also by a test that failed.
struct Mounted(PathBuf);

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
    eventually("it is on unasked: on the VXLAN device and the underlay's link", || {
        (node.status().fast_path.links == 2 && has_rule()).then_some(())
    });
    assert_eq!(links_with(&pins, Hook::FastEnter).expect("read").len(), 2);
    configure(r#","FastPath":false"#);
    eventually("nothing of it is left", || {
        let links = links_with(&pins, Hook::FastLeave).expect("read");
        (!node.status().fast_path.on && links.is_empty() && !has_rule()).then_some(())
    });
}
