//! Policies between pods that have IPv6 addresses, with real packets: neighbour discovery, TCP, UDP and ping over a bridge
//! whose ports have the programs. Needs root; says so without.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use nix::sched::{CloneFlags, setns, unshare};
use orch_ebpf_loader::{Announcement, Hook, Maps, Pins, PodRef, attach, install};
use orch_ebpf_maps::{ADDRESS_NODE, ClassKey, Direction, Endpoint, Reason, state};
use orch_netagent::policy::engine::Engine;
use orch_netagent::policy::world::{Cluster, Local, Reader, desired_addresses};
use serde_json::{Value, json};

/// A packet that is allowed arrives in microseconds; one that waits for a neighbour is sent again after a second.
const PATIENCE: Duration = Duration::from_secs(3);
/// What is denied is waited for this long: the first packet is there in microseconds.
const IMPATIENCE: Duration = Duration::from_millis(400);
const PODS: [&str; 3] = ["web", "front", "stranger"];
const NODE: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 1);
const PORT: u16 = 8080;

/// A pod: a process in a network namespace of its own.
struct Sandbox {
    holder: Child,
    ifindex: u32,
    addr: Ipv6Addr,
    uid: u32,
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl Sandbox {
    fn new(place: u16) -> Self {
        let own = std::fs::read_link("/proc/thread-self/ns/net").expect("read");
        let holder = Command::new("unshare").args(["--net", "sleep", "120"]).spawn();
        let holder = holder.expect("unshare starts");
        let path = format!("/proc/{}/ns/net", holder.id());
        let deadline = Instant::now() + PATIENCE;
        while std::fs::read_link(&path).is_ok_and(|now| now == own) {
            assert!(Instant::now() < deadline, "a namespace of its own");
            std::thread::yield_now();
        }
        let (host, inside, pid) = (format!("veth{place}"), "eth0", holder.id().to_string());
        let mac = format!("02:00:00:00:01:{place:02x}");
        ip(&[
            "link", "add", &host, "type", "veth", "peer", "name", inside, "address", &mac, "netns",
            &pid,
        ]);
        ip(&["link", "set", &host, "master", "cni0", "up"]);
        let addr = Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, place + 2);
        let sandbox = Self {
            ifindex: nix::net::if_::if_nametoindex(host.as_str()).expect("made"),
            holder,
            addr,
            uid: 100 + u32::from(place),
        };
        sandbox.inside(move || {
            ip(&["link", "set", "lo", "up"]);
            ip(&["address", "add", &format!("{addr}/64"), "dev", "eth0", "nodad"]);
            ip(&["link", "set", "eth0", "up"]);
        });
        sandbox
    }

    /// Does something in the pod's namespace, on a thread of its own.
    fn inside<T: Send + 'static>(&self, what: impl FnOnce() -> T + Send + 'static) -> T {
        let path = format!("/proc/{}/ns/net", self.holder.id());
        let thread = std::thread::spawn(move || {
            let namespace = File::open(path).expect("the pod's namespace");
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("entered");
            what()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn listen(&self) -> (TcpListener, UdpSocket) {
        let addr = SocketAddr::from((self.addr, PORT));
        self.inside(move || {
            let udp = UdpSocket::bind(addr).expect("bound");
            udp.set_read_timeout(Some(PATIENCE)).expect("set");
            (TcpListener::bind(addr).expect("bound"), udp)
        })
    }

    fn connects(&self, to: Ipv6Addr, patience: Duration) -> Option<TcpStream> {
        let to = SocketAddr::from((to, PORT));
        self.inside(move || TcpStream::connect_timeout(&to, patience).ok())
    }

    /// Whether an echo request is answered.
    fn pings(&self, to: Ipv6Addr) -> bool {
        let from = self.addr;
        self.inside(move || {
            let kind = nix::sys::socket::SockType::Raw;
            let protocol = nix::sys::socket::SockProtocol::IcmpV6;
            let family = nix::sys::socket::AddressFamily::Inet6;
            let flags = nix::sys::socket::SockFlag::empty();
            let raw =
                nix::sys::socket::socket(family, kind, flags, protocol).expect("a raw socket");
            // Reads and writes as one of UDP does.
            let socket = UdpSocket::from(raw);
            socket.set_read_timeout(Some(IMPATIENCE)).expect("set");
            socket.send_to(&[128, 0, 0, 0, 0, 7, 0, 1], (to, 0)).expect("sent");
            let mut answer = [0; 64];
            let deadline = Instant::now() + PATIENCE;
            while let Ok((_, peer)) = socket.recv_from(&mut answer) {
                // Neighbour discovery is heard, too.
                if answer[0] == 129 && peer.ip() == to {
                    return true;
                }
                assert!(Instant::now() < deadline, "{from}: only noise");
            }
            false
        })
    }
}

struct World {
    root: PathBuf,
    pins: Pins,
    engine: Engine,
    reader: Reader,
    cluster: Cluster,
    local: Local,
    pods: Vec<Sandbox>,
}

impl World {
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces of its own");
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .expect("private mounts");
        ip(&["link", "add", "cni0", "type", "bridge"]);
        ip(&["address", "add", &format!("{NODE}/64"), "dev", "cni0", "nodad"]);
        ip(&["link", "set", "cni0", "up"]);
        let root = tempfile::tempdir().expect("a folder").keep();
        let pins = Pins::below(&root);
        let mut maps = install(&pins).expect("installed");
        // As the plugin does with the gateway of each pod.
        maps.put_address(ClassKey::host(NODE), ADDRESS_NODE).expect("put");
        let pods: Vec<Sandbox> = (0..3).map(Sandbox::new).collect();
        for (place, pod) in pods.iter().enumerate() {
            let closed = Endpoint {
                uid: pod.uid,
                addr6: pod.addr.octets(),
                mac: [2, 0, 0, 0, 1, u8::try_from(place).expect("few")],
                state: state::PENDING,
                ..Endpoint::default()
            };
            maps.insert_endpoint(pod.ifindex, closed).expect("inserted");
            for hook in [Hook::FromPod, Hook::ToPod] {
                attach(&pins, &format!("veth{place}"), pod.ifindex, hook).expect("attached");
            }
        }
        let announced = pods.iter().zip(PODS).map(|(pod, name)| Announcement {
            ifindex: pod.ifindex,
            uid: pod.uid,
            addr: std::net::Ipv4Addr::UNSPECIFIED,
            addr6: Some(pod.addr),
            pod: Some(PodRef { namespace: "shop".to_owned(), name: name.to_owned(), uid: None }),
        });
        let local = Local {
            node: "one".to_owned(),
            addresses: vec![NODE.into()],
            endpoints: announced.collect(),
            pod_network6: "fd00:244::/32".parse().ok(),
            ..Local::default()
        };
        let engine = Engine::new(Maps::open(&pins).expect("pinned")).expect("taken over");
        let reader = Reader::default();
        Self { root, pins, engine, reader, cluster: Cluster::default(), local, pods }
    }

    /// The API server tells of the pods and of these policies.
    fn tell(&mut self, policies: &[Value]) {
        let pod = |name: &&str| {
            let value = json!({
                "metadata": {"namespace": "shop", "name": name, "labels": {"app": name}},
                "spec": {"nodeName": "one", "containers": []},
            });
            Arc::new(serde_json::from_value::<Pod>(value).expect("a pod"))
        };
        let namespace = json!({"metadata": {"name": "shop"}});
        let policy = |spec: &Value| {
            let value = json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": spec});
            Arc::new(serde_json::from_value::<NetworkPolicy>(value).expect("a policy"))
        };
        self.cluster = Cluster {
            namespaces: vec![Arc::new(
                serde_json::from_value::<Namespace>(namespace).expect("one"),
            )],
            pods: PODS.iter().map(pod).collect(),
            policies: policies.iter().map(policy).collect(),
            ..Cluster::default()
        };
        let changed = self.reader.read(&self.cluster, &self.local);
        let addresses = desired_addresses(self.reader.world(), &self.cluster, &self.local);
        self.engine.set_addresses(&addresses, 8472).expect("written");
        self.engine.look(&self.reader, changed, &self.local.endpoints).expect("a look");
    }

    fn count(&self, direction: Direction, reason: Reason) -> u64 {
        let all = Maps::open(&self.pins).expect("pinned").counters().expect("read");
        all.iter().find(|(d, r, _)| (*d, *r) == (direction, reason)).map_or(0, |(_, _, n)| *n)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.root.join("sys/fs/bpf"));
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn ip(words: &[&str]) {
    let done = Command::new("ip").args(words).status();
    assert!(done.expect("ip starts").success(), "ip {words:?}");
}

fn story(mut w: World) {
    let (tcp, udp) = w.pods[0].listen();
    let web = w.pods[0].addr;
    assert!(w.pods[1].connects(web, IMPATIENCE).is_none(), "nobody has said what applies");
    assert!(TcpStream::connect_timeout(&(web, PORT).into(), PATIENCE).is_ok());
    drop(tcp.accept().expect("the node comes through, over neighbour discovery"));

    w.tell(&[]);
    assert!(w.pods[2].connects(web, PATIENCE).is_some() && w.pods[2].pings(web), "no policy");
    drop(tcp.accept().expect("accepted"));

    let only_front = json!({
        "podSelector": {"matchLabels": {"app": "web"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "front"}}}]}],
    });
    w.tell(&[only_front]);
    let mut client = w.pods[1].connects(web, PATIENCE).expect("front may");
    let (mut server, from) = tcp.accept().expect("accepted");
    assert_eq!(from.ip(), w.pods[1].addr, "the client's own address");
    client.write_all(b"ask").expect("sent");
    let mut text = [0; 3];
    server.read_exact(&mut text).expect("the question");
    assert!(w.pods[1].pings(web), "front may ping, too");
    let send = |w: &World, pod: usize, word: &'static [u8]| {
        let from = SocketAddr::from((w.pods[pod].addr, 0));
        w.pods[pod].inside(move || {
            let socket = UdpSocket::bind(from).expect("bound");
            // In parts: more than the link takes at once.
            let mut datagram = vec![0; 4000];
            datagram[..word.len()].copy_from_slice(word);
            socket.send_to(&datagram, (web, PORT)).expect("sent");
        });
    };
    send(&w, 2, b"stranger");
    send(&w, 1, b"front");
    let mut datagram = vec![0; 5000];
    let (length, from) = udp.recv_from(&mut datagram).expect("front's datagram");
    assert_eq!(
        (length, from.ip()),
        (4000, w.pods[1].addr.into()),
        "and the stranger's is not there"
    );
    let before = w.count(Direction::Ingress, Reason::Policy);
    assert!(w.pods[2].connects(web, IMPATIENCE).is_none() && !w.pods[2].pings(web), "a stranger");
    assert!(w.count(Direction::Ingress, Reason::Policy) > before, "by policy");

    // By its own address it is somebody else's word; by the link-local one it is nobody's.
    w.tell(&[json!({"podSelector": {"matchLabels": {"app": "web"}}})]);
    client.write_all(b"ask").expect("sent into the wall");
    server.set_read_timeout(Some(IMPATIENCE)).expect("set");
    assert!(server.read(&mut text).is_err(), "what is no longer allowed ends");
    w.tell(&[json!({
        "podSelector": {"matchLabels": {"app": "web"}},
        "ingress": [{"from": [{"ipBlock": {"cidr": "fd00:244:1::/64", "except": [format!("{}/128", w.pods[2].addr)]}}]}],
    })]);
    assert!(w.pods[1].connects(web, PATIENCE).is_some(), "inside of the block");
    assert!(w.pods[2].connects(web, IMPATIENCE).is_none(), "excepted");
    w.pods[2].inside(|| {
        ip(&[
            "address",
            "add",
            "fd00:244:1::99/64",
            "dev",
            "eth0",
            "nodad",
            "preferred_lft",
            "forever",
        ])
    });
    let forged = SocketAddr::from((Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 0x99), 0));
    w.pods[2].inside(move || {
        let socket = UdpSocket::bind(forged).expect("bound");
        socket.send_to(b"forged", (web, PORT)).expect("sent");
    });
    udp.set_read_timeout(Some(IMPATIENCE)).expect("set");
    assert!(udp.recv_from(&mut datagram).is_err(), "an address that is not the pod's");
    assert!(w.count(Direction::Egress, Reason::Spoof) > 0);
}

#[test]
fn policies_hold_between_pods_with_ipv6_addresses() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("ignored: needs root");
        return;
    }
    // A namespace belongs to a thread.
    let thread = std::thread::spawn(|| story(World::new()));
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
