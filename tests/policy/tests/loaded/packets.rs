//! Real packets between pods on two nodes against the oracle: the agent's engine on the kernel's maps, programs on the pods'
//! links, sockets in the pods. Policies and labels change step by step; before and after each step every pod asks every
//! other one over TCP and UDP, and connections that are open are judged again. Needs root; says so without.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cni_netlink::{AddressOptions, Bridge, NetNs, Netlink, NetlinkError, Route, VethPair};
use ipnetwork::{IpNetwork, Ipv4Network};
use k8s_openapi::api::core::v1::{Pod, PodIP};
use nix::sched::{CloneFlags, unshare};
use orch_api::cluster_policy::ClusterNetworkPolicy;
use orch_ebpf_loader::{Announcement, Hook, Maps, Pins, PodRef, attach, install};
use orch_ebpf_maps::{Endpoint, state};
use orch_netagent::policy::engine::Engine;
use orch_netagent::policy::world::{self, Local, Reader};
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;
use tests_policy::oracle::{Cluster, EGRESS, INGRESS, Traffic, addresses};
use tests_policy::worlds::{NODES, cluster};

/// Policies of one run; `TRUTH_POLICIES` says another number.
const POLICIES: usize = 200;
/// That many apply at one time.
const AT_ONCE: usize = 5;
const PODS: usize = 8;
/// What pods serve: ports that policies name, and one that none does.
const PORTS: [u16; 4] = [53, 80, 8080, 9999];
/// What is allowed has arrived by then, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is denied was sent before what is allowed; it would arrive within this after it.
const GRACE: Duration = Duration::from_millis(20);

/// One node: its programs and what the agent has of it.
struct Node {
    netns: NetNs,
    bridge: u32,
    pins: Pins,
    engine: Engine,
    reader: Reader,
    local: Local,
}

/// Two nodes with their pods, and what these serve.
struct Lab {
    root: std::path::PathBuf,
    nodes: Vec<Node>,
    pods: Vec<NetNs>,
    cluster: Cluster,
    /// By pod and port.
    listeners: Vec<Vec<TcpListener>>,
    receivers: Vec<Vec<UdpSocket>>,
}

/// A connection that was opened, with its accepted end.
struct Open {
    from: usize,
    to: usize,
    port: u16,
    near: TcpStream,
    far: TcpStream,
}

fn net(ip: Ipv4Addr, prefix: u8) -> IpNetwork {
    IpNetwork::V4(Ipv4Network::new(ip, prefix).expect("a prefix length"))
}

/// Work in a namespace that cannot fail, or the test does.
fn within<T: Send>(netns: &NetNs, work: impl FnOnce() -> T + Send) -> T {
    netns.run(|| Ok::<T, NetlinkError>(work())).expect("the namespace is there")
}

fn new_netns() -> NetNs {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a namespace");
        NetNs::current().expect("its own")
    });
    thread.join().expect("no panic")
}

fn node_of(place: usize) -> usize {
    place % NODES.len()
}

fn ip_of(place: usize) -> Ipv4Addr {
    let last = u8::try_from(place + 1).expect("few");
    Ipv4Addr::new(10, 244, u8::try_from(node_of(place) + 1).expect("few"), last + 1)
}

/// How programs are on links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Links {
    Tcx,
    /// As on kernels before 6.6.
    Filters,
}

impl Node {
    fn new(root: &std::path::Path, place: usize, links: Links) -> Self {
        let netns = new_netns();
        let pins = Pins::below(&root.join(NODES[place]));
        let pins = if links == Links::Filters { pins.without_tcx() } else { pins };
        let engine = Engine::new(install(&pins).expect("installed")).expect("taken over");
        let netlink = Netlink::open_in(&netns).expect("a socket");
        within(&netns, || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("forwarding");
            let _ = std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        });
        let bridge = Bridge { name: "cni0".to_owned(), up: true, ..Bridge::default() };
        let bridge = netlink.create_bridge(&bridge).expect("a bridge").index;
        let gateway = Ipv4Addr::new(10, 244, u8::try_from(place + 1).expect("few"), 1);
        netlink.add_address(bridge, net(gateway, 24), &AddressOptions::default()).expect("gateway");
        let local = Local {
            node: NODES[place].to_owned(),
            pod_network: "10.244.0.0/16".parse().ok(),
            ..Local::default()
        };
        Self { netns, bridge, pins, engine, reader: Reader::default(), local }
    }

    /// A pod's link with the programs, as the plugin makes it.
    fn plug(&mut self, place: usize, pod: &Pod) -> NetNs {
        let netns = new_netns();
        let node = Netlink::open_in(&self.netns).expect("a socket");
        let mac = [2, 0, 0, 0, 1, u8::try_from(place).expect("few")];
        let name = format!("veth{place}");
        let link = node
            .create_veth(&VethPair {
                name: name.clone(),
                peer_name: "eth0".to_owned(),
                peer_netns: Some(netns.as_fd()),
                master: Some(self.bridge),
                peer_mac: Some(mac),
                up: true,
                ..VethPair::default()
            })
            .expect("a veth")
            .index;
        within(&self.netns, || {
            for hook in [Hook::FromPod, Hook::ToPod] {
                attach(&self.pins, &name, link, hook).expect("attached");
            }
        });
        let inside = Netlink::open_in(&netns).expect("a socket");
        let eth0 = inside.link("eth0").expect("asked").expect("there").index;
        inside.set_up(eth0).expect("up");
        let ip = ip_of(place);
        inside.add_address(eth0, net(ip, 24), &AddressOptions::default()).expect("an address");
        let [a, b, c, _] = ip.octets();
        let via = Some(IpAddr::V4(Ipv4Addr::new(a, b, c, 1)));
        inside.add_route(&Route { via, link: Some(eth0), ..Route::default() }).expect("a route");
        let row = Endpoint {
            uid: link,
            addr: ip.to_bits().to_be(),
            mac,
            state: state::PENDING,
            ..Endpoint::default()
        };
        let mut maps = Maps::open(&self.pins).expect("pinned");
        maps.insert_endpoint(link, row).expect("inserted");
        let meta = &pod.metadata;
        let pod = PodRef {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: None,
        };
        self.local.endpoints.push(Announcement {
            ifindex: link,
            uid: link,
            addr: ip,
            addr6: None,
            pod: Some(pod),
        });
        netns
    }

    /// As the agent does it after each event.
    fn look(&mut self, cluster: &world::Cluster) -> usize {
        let changed = self.reader.read(cluster, &self.local);
        let report =
            self.engine.look(&self.reader, changed, &self.local.endpoints).expect("a look");
        assert!(report.locked.is_empty(), "{:?}", report.locked);
        report.written
    }
}

/// Pods and policies drawn as the other tests draw them, by a fixed seed.
struct Drawn {
    runner: TestRunner,
}

impl Drawn {
    fn next(&mut self) -> Cluster {
        cluster(PODS, AT_ONCE).new_tree(&mut self.runner).expect("a cluster").current()
    }

    /// So many policies, and none is drawn in vain.
    fn policies(&mut self, count: usize) -> Vec<k8s_openapi::api::networking::v1::NetworkPolicy> {
        let mut all = Vec::new();
        while all.len() < count {
            all.extend(self.next().policies);
        }
        all.truncate(count);
        all
    }

    /// Pods that run, with labels and named ports as they were drawn, and with addresses that are reached here.
    fn pods(&mut self) -> Vec<Pod> {
        let mut all: Vec<Pod> = Vec::new();
        while all.len() < PODS {
            all.extend(self.next().pods);
        }
        all.truncate(PODS);
        for (place, pod) in all.iter_mut().enumerate() {
            pod.metadata.name = Some(format!("p{}", place + 1));
            let spec = pod.spec.as_mut().expect("made with spec");
            spec.host_network = None;
            spec.node_name = Some(NODES[node_of(place)].to_owned());
            let ip = ip_of(place).to_string();
            let status = pod.status.as_mut().expect("made with status");
            status.phase = Some("Running".to_owned());
            status.pod_ip = Some(ip.clone());
            status.pod_ips = Some(vec![PodIP { ip }]);
        }
        all
    }
}

impl Lab {
    fn new(drawn: &mut Drawn, links: Links) -> Self {
        let root = tempfile::tempdir().expect("a folder").keep();
        let mut nodes: Vec<Node> =
            (0..NODES.len()).map(|place| Node::new(&root, place, links)).collect();
        let mut cluster = drawn.next();
        cluster.policies.clear();
        cluster.cluster_policies.clear();
        cluster.pods = drawn.pods();
        join(&nodes);
        let pods: Vec<NetNs> = cluster
            .pods
            .iter()
            .enumerate()
            .map(|(place, pod)| nodes[node_of(place)].plug(place, pod))
            .collect();
        let serve = |place: usize, port: u16| {
            within(&pods[place], || {
                let tcp = TcpListener::bind((ip_of(place), port)).expect("bound");
                let udp = UdpSocket::bind((ip_of(place), port)).expect("bound");
                tcp.set_nonblocking(true).expect("set");
                udp.set_nonblocking(true).expect("set");
                (tcp, udp)
            })
        };
        let (mut listeners, mut receivers) = (Vec::new(), Vec::new());
        for place in 0..PODS {
            let (tcp, udp) = PORTS.iter().map(|port| serve(place, *port)).unzip();
            listeners.push(tcp);
            receivers.push(udp);
        }
        Self { root, nodes, pods, cluster, listeners, receivers }
    }

    fn look(&mut self) {
        let cluster = world::Cluster {
            pods: self.cluster.pods.iter().cloned().map(Arc::new).collect(),
            namespaces: self.cluster.namespaces.iter().cloned().map(Arc::new).collect(),
            policies: self.cluster.policies.iter().cloned().map(Arc::new).collect(),
            cluster_policies: self.cluster.cluster_policies.iter().map(read).collect(),
            ..world::Cluster::default()
        };
        // Each waits for the kernel; they are two nodes.
        std::thread::scope(|scope| {
            for node in &mut self.nodes {
                let cluster = &cluster;
                scope.spawn(move || node.look(cluster));
            }
        });
    }

    /// Gives every pod's link its programs anew, as an upgrade does.
    fn replace_programs(&self) {
        for node in &self.nodes {
            // Equal ones, but others to the kernel.
            for hook in [Hook::FromPod, Hook::ToPod] {
                let pin = node.pins.folder().join("programs").join(hook.program());
                std::fs::remove_file(pin).expect("pinned");
            }
            within(&node.netns, || install(&node.pins).map(drop).expect("pinned again"));
            for made in &node.local.endpoints {
                within(&node.netns, || {
                    let name = nix::net::if_::if_indextoname(made.ifindex).expect("there");
                    let name = name.to_str().expect("text");
                    for hook in [Hook::FromPod, Hook::ToPod] {
                        attach(&node.pins, name, made.ifindex, hook).expect("attached");
                    }
                });
            }
        }
    }

    /// What both ends say in the oracle's words.
    fn is_allowed(&self, from: usize, to: usize, protocol: &'static str, port: u16) -> bool {
        let (source, target) = (&self.cluster.pods[from], &self.cluster.pods[to]);
        let traffic = Traffic { protocol, port };
        let ip = |pod: &Pod| addresses(pod)[0];
        self.cluster.end(source, EGRESS, ip(target), traffic).allowed
            && self.cluster.end(target, INGRESS, ip(source), traffic).allowed
    }

    /// All questions: who, whom, at which port; first those whose answer is no.
    fn questions(&self, protocol: &'static str) -> Vec<(usize, usize, u16, bool)> {
        let mut all: Vec<_> = (0..PODS)
            .flat_map(|from| (0..PODS).map(move |to| (from, to)))
            .filter(|(from, to)| from != to)
            .flat_map(|(from, to)| PORTS.map(|port| (from, to, port)))
            .map(|(from, to, port)| (from, to, port, self.is_allowed(from, to, protocol, port)))
            .collect();
        all.sort_by_key(|question| question.3);
        all
    }

    fn describe(&self, what: &str) -> String {
        let policies = serde_json::to_string(&self.cluster.policies).expect("JSON");
        let pods: Vec<_> = self
            .cluster
            .pods
            .iter()
            .map(|pod| (&pod.metadata.namespace, &pod.metadata.labels))
            .collect();
        format!(
            "{what}\npods: {pods:?}\nnamespaces: {:?}\npolicies: {policies}",
            self.cluster.namespaces
        )
    }

    /// Datagrams that tell who sent them to whom. Gives how many arrived, and how many did not.
    fn ask_udp(&self, step: u32) -> [usize; 2] {
        let questions = self.questions("UDP");
        // Flows of their own for each step.
        let senders: Vec<UdpSocket> = (0..PODS)
            .map(|place| {
                within(&self.pods[place], || UdpSocket::bind((ip_of(place), 0)).expect("bound"))
            })
            .collect();
        for (from, to, port, _) in &questions {
            let text = format!("{step} {from} {to} {port}");
            senders[*from].send_to(text.as_bytes(), (ip_of(*to), *port)).expect("sent");
        }
        let wanted: BTreeSet<String> = questions
            .iter()
            .filter(|(.., allowed)| *allowed)
            .map(|(from, to, port, _)| format!("{step} {from} {to} {port}"))
            .collect();
        let mut arrived = BTreeSet::new();
        let start = Instant::now();
        let collect = |arrived: &mut BTreeSet<String>| {
            let mut buffer = [0; 64];
            for socket in self.receivers.iter().flatten() {
                while let Ok(length) = socket.recv(&mut buffer) {
                    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                    arrived.insert(text);
                }
            }
        };
        while !arrived.is_superset(&wanted) && start.elapsed() < PATIENCE {
            collect(&mut arrived);
            std::thread::yield_now();
        }
        std::thread::sleep(GRACE);
        collect(&mut arrived);
        let lost: Vec<_> = wanted.difference(&arrived).collect();
        let passed: Vec<_> = arrived.difference(&wanted).collect();
        assert!(
            lost.is_empty() && passed.is_empty(),
            "{}",
            self.describe(&format!("UDP, step from to port: lost {lost:?}, passed {passed:?}"))
        );
        [arrived.len(), questions.len() - arrived.len()]
    }

    /// Connections. Those that came about are given, too.
    fn ask_tcp(&self) -> ([usize; 2], Vec<Open>) {
        let questions = self.questions("TCP");
        let mut dialled = Vec::new();
        for (from, to, port, allowed) in &questions {
            let target = SocketAddr::from((ip_of(*to), *port));
            let near = within(&self.pods[*from], || dial(target));
            dialled.push((*from, *to, *port, *allowed, near));
        }
        let mut accepted: BTreeMap<(usize, u16, SocketAddr), TcpStream> = BTreeMap::new();
        let wanted = questions.iter().filter(|(.., allowed)| *allowed).count();
        let start = Instant::now();
        let accept = |accepted: &mut BTreeMap<(usize, u16, SocketAddr), TcpStream>| {
            for (to, listeners) in self.listeners.iter().enumerate() {
                for (listener, port) in listeners.iter().zip(PORTS) {
                    while let Ok((far, peer)) = listener.accept() {
                        accepted.insert((to, port, peer), far);
                    }
                }
            }
        };
        while accepted.len() < wanted && start.elapsed() < PATIENCE {
            accept(&mut accepted);
            std::thread::yield_now();
        }
        std::thread::sleep(GRACE);
        accept(&mut accepted);
        let mut open = Vec::new();
        let mut counts = [0; 2];
        for (from, to, port, allowed, near) in dialled {
            let own = near.local_addr().expect("bound");
            let far = accepted.remove(&(to, port, own));
            assert_eq!(
                far.is_some(),
                allowed,
                "{}",
                self.describe(&format!("TCP {from} to {to}, port {port}"))
            );
            counts[usize::from(far.is_none())] += 1;
            if let Some(far) = far {
                far.set_nonblocking(true).expect("set");
                open.push(Open { from, to, port, near, far });
            }
        }
        assert!(accepted.is_empty(), "connections that nobody opened: {accepted:?}");
        (counts, open)
    }

    /// What is open goes on if a new connection would be allowed, and else is cut. Gives how many were cut.
    fn assert_judged_again(&self, open: Vec<Open>) -> usize {
        let mut cut = 0;
        let mut waiting = Vec::new();
        for mut one in open {
            one.near.write_all(b"x").expect("into the socket's buffer");
            if self.is_allowed(one.from, one.to, "TCP", one.port) {
                waiting.push(one);
            } else {
                // Read after the others have arrived.
                waiting.insert(0, one);
            }
        }
        let start = Instant::now();
        for one in waiting.iter_mut().rev() {
            let allowed = self.is_allowed(one.from, one.to, "TCP", one.port);
            let mut byte = [0];
            let mut arrived = one.far.read(&mut byte).is_ok();
            while allowed && !arrived && start.elapsed() < PATIENCE {
                std::thread::yield_now();
                arrived = one.far.read(&mut byte).is_ok();
            }
            let Open { from, to, port, .. } = one;
            let what = format!("open TCP {from} to {to}, port {port}");
            assert!(arrived || !allowed, "lost: {}", self.describe(&what));
            assert!(allowed || !arrived, "went on: {}", self.describe(&what));
            cut += usize::from(!allowed);
        }
        cut
    }
}

fn read(policy: &serde_json::Value) -> Arc<ClusterNetworkPolicy> {
    Arc::new(serde_json::from_value(policy.clone()).expect("a policy"))
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in NODES {
            let _ = nix::mount::umount(&self.root.join(node).join("sys/fs/bpf"));
        }
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// A wire between the nodes, with the program on both ends, and routes to each other's pods.
fn join(nodes: &[Node]) {
    let [one, other] = nodes else { panic!("two nodes") };
    let netlink = Netlink::open_in(&one.netns).expect("a socket");
    let pair = VethPair {
        name: "eth0".to_owned(),
        peer_name: "eth0".to_owned(),
        peer_netns: Some(other.netns.as_fd()),
        up: true,
        ..VethPair::default()
    };
    netlink.create_veth(&pair).expect("a wire");
    for (place, node) in nodes.iter().enumerate() {
        let netlink = Netlink::open_in(&node.netns).expect("a socket");
        let eth0 = netlink.link("eth0").expect("asked").expect("there").index;
        netlink.set_up(eth0).expect("up");
        let [own, there] = [place, 1 - place].map(|place| u8::try_from(place + 1).expect("few"));
        let address = net(Ipv4Addr::new(192, 0, 2, own), 24);
        netlink.add_address(eth0, address, &AddressOptions::default()).expect("an address");
        let route = Route {
            dst: net(Ipv4Addr::new(10, 244, there, 0), 24),
            via: Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, there))),
            link: Some(eth0),
            ..Route::default()
        };
        netlink.add_route(&route).expect("a route");
        within(&node.netns, || {
            attach(&node.pins, "eth0", eth0, Hook::ToWire).expect("attached");
        });
    }
}

/// A connection on its way. It ends with a reset, so that nothing of it lingers.
fn dial(target: SocketAddr) -> TcpStream {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt,
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None).expect("a socket");
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&fd, sockopt::Linger, &linger).expect("set");
    let SocketAddr::V4(target) = target else { panic!("IPv4") };
    let begun = connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn::from(target));
    assert!(matches!(begun, Ok(()) | Err(nix::errno::Errno::EINPROGRESS)), "{begun:?}");
    TcpStream::from(fd)
}

#[test]
fn real_packets_between_pods_pass_as_the_oracle_says_before_and_after_each_change() {
    let given = std::env::var("TRUTH_POLICIES").ok();
    let total = given.map_or(POLICIES, |text| text.parse().expect("TRUTH_POLICIES is a number"));
    assert_truth(total, Links::Tcx);
}

#[test]
fn real_packets_pass_so_too_where_programs_are_filters() {
    assert_truth(POLICIES / 4, Links::Filters);
}

fn assert_truth(total: usize, links: Links) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("ignored: needs root");
        return;
    }
    let (sums, cut) = in_mounts(move || {
        let start = Instant::now();
        let mut drawn = Drawn { runner: TestRunner::deterministic() };
        let mut lab = Lab::new(&mut drawn, links);
        let (mut sums, mut cut, mut used, mut tiers) = ([0; 2], 0, 0, 0);
        let mut open = Vec::new();
        let mut step = 0;
        while used < total {
            if step % 3 == 2 {
                // Somebody else's labels, and a namespace's.
                let other = drawn.next();
                let place = step as usize % PODS;
                lab.cluster.pods[place].metadata.labels = other.pods[0].metadata.labels.clone();
                lab.cluster.namespaces = other.namespaces;
            } else {
                lab.cluster.policies = drawn.policies(AT_ONCE.min(total - used));
                used += lab.cluster.policies.len();
                for (place, policy) in lab.cluster.policies.iter_mut().enumerate() {
                    policy.metadata.name = Some(format!("n{step}-{place}"));
                }
                // The tiers around them: in every other step there are some.
                lab.cluster.cluster_policies = drawn.next().cluster_policies;
                tiers += lab.cluster.cluster_policies.len();
            }
            lab.look();
            cut += lab.assert_judged_again(std::mem::take(&mut open));
            let udp = lab.ask_udp(step);
            let (tcp, now_open) = lab.ask_tcp();
            open = now_open;
            sums = [sums[0] + udp[0] + tcp[0], sums[1] + udp[1] + tcp[1]];
            step += 1;
        }
        eprintln!(
            "{used} policies and {tiers} of the cluster's in {step} steps, {} passed, {} did not, {cut} open connections were cut, all as the oracle says, in {:.1} s",
            sums[0],
            sums[1],
            start.elapsed().as_secs_f64()
        );
        assert!(tiers > step as usize / 2, "{tiers} policies of the cluster's");
        (sums, cut)
    });
    assert!(
        sums.iter().all(|sum| *sum > total * 10) && cut > total / 10,
        "a run that says nothing: {sums:?}, {cut}"
    );
}

/// Ends a flood also when its test has failed.
struct StopAll<'a>(&'a [AtomicBool; 2]);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|stop| stop.store(true, Ordering::Relaxed));
    }
}

/// Datagrams of one sender to one receiver, as fast as a receiver on a busy machine can follow; how many were sent.
fn flood(from: &NetNs, source: Ipv4Addr, target: SocketAddr, stop: &AtomicBool) -> u64 {
    within(from, || {
        let socket = UdpSocket::bind((source, 0)).expect("bound");
        let mut sent = 0;
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..10 {
                socket.send_to(b"flood", target).expect("sent");
                sent += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        sent
    })
}

/// Datagrams that arrive until it is over, and a while after.
fn drain(socket: &UdpSocket, stop: &AtomicBool) -> u64 {
    let (mut count, mut quiet) = (0, Instant::now());
    let mut buffer = [0; 16];
    while !stop.load(Ordering::Relaxed) || quiet.elapsed() < Duration::from_millis(200) {
        match socket.recv(&mut buffer) {
            Ok(_) => (count, quiet) = (count + 1, Instant::now()),
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
    count
}

#[test]
fn under_flood_changes_let_nothing_through_that_both_deny_and_lose_nothing_that_both_allow() {
    assert_no_gap(Links::Tcx);
}

#[test]
fn under_flood_no_change_of_filters_opens_or_loses_anything() {
    assert_no_gap(Links::Filters);
}

fn assert_no_gap(links: Links) {
    const CHANGES: u32 = 25;
    if !nix::unistd::geteuid().is_root() {
        eprintln!("ignored: needs root");
        return;
    }
    in_mounts(move || {
        let mut lab = Lab::new(&mut Drawn { runner: TestRunner::deterministic() }, links);
        for (place, pod) in lab.cluster.pods.iter_mut().enumerate() {
            pod.metadata.namespace = Some("x".to_owned());
            pod.metadata.labels = Some([("pod".to_owned(), format!("p{place}"))].into());
        }
        for node in &mut lab.nodes {
            for one in &mut node.local.endpoints {
                one.pod.as_mut().expect("a pod").namespace = "x".to_owned();
            }
        }
        // p0 to p1 is allowed and p0 to p2 is denied before and after each change, for other reasons each time.
        let policies = |round: u32| {
            let select =
                |place: u32| serde_json::json!({"matchLabels": {"pod": format!("p{place}")}});
            let wide = serde_json::json!([{}]);
            let narrow = serde_json::json!([{
                "from": [{"podSelector": select(0)}],
                "ports": [{"protocol": "UDP", "port": 8080}, {"protocol": "UDP", "port": 20_000 + round}],
            }]);
            let nothing = serde_json::json!([]);
            let other =
                serde_json::json!([{"ports": [{"protocol": "UDP", "port": 30_000 + round}]}]);
            let is_even = round.is_multiple_of(2);
            let rules = [
                (1, if is_even { wide } else { narrow }),
                (2, if is_even { nothing } else { other }),
            ];
            let policy = |(place, ingress)| {
                serde_json::from_value(serde_json::json!({
                    "metadata": {"namespace": "x", "name": format!("to-p{place}")},
                    "spec": {"podSelector": select(place), "ingress": ingress},
                }))
                .expect("a policy")
            };
            rules.into_iter().map(policy).collect::<Vec<_>>()
        };
        lab.cluster.policies = policies(0);
        lab.look();
        let port_at = PORTS.iter().position(|port| *port == 8080).expect("served");
        for place in [1, 2] {
            let socket = &lab.receivers[place][port_at];
            nix::sys::socket::setsockopt(
                socket,
                nix::sys::socket::sockopt::RcvBufForce,
                &(16 << 20),
            )
            .expect("set");
        }
        let stop = [AtomicBool::new(false), AtomicBool::new(false)];
        let pods = std::mem::take(&mut lab.pods);
        let target = |place: usize| SocketAddr::from((ip_of(place), 8080));
        let [allowed, denied] = std::thread::scope(|scope| {
            let _stop = StopAll(&stop);
            let sockets =
                [1, 2].map(|place| lab.receivers[place][port_at].try_clone().expect("a clone"));
            let halves = [1, 2].map(|place| {
                let (netns, stop) = (&pods[0], &stop[0]);
                scope.spawn(move || flood(netns, ip_of(0), target(place), stop))
            });
            let arrived = sockets.map(|socket| {
                let stop = &stop[1];
                scope.spawn(move || drain(&socket, stop))
            });
            for round in 1..=CHANGES {
                lab.cluster.policies = policies(round);
                lab.look();
                // An upgrade changes the program of each link in place. The kernel checks programs for a second.
                if round % 5 == 1 {
                    lab.replace_programs();
                }
            }
            stop[0].store(true, Ordering::Relaxed);
            let sent = halves.map(|half| half.join().expect("no panic"));
            stop[1].store(true, Ordering::Relaxed);
            let arrived = arrived.map(|half| half.join().expect("no panic"));
            [(sent[0], arrived[0]), (sent[1], arrived[1])]
        });
        eprintln!(
            "{CHANGES} changes: {} of {} arrived, and {} of {}",
            allowed.1, allowed.0, denied.1, denied.0
        );
        assert!(allowed.0 > 1000 && denied.0 > 1000, "no flood: {allowed:?}, {denied:?}");
        assert_eq!(allowed.1, allowed.0, "what both allow is not lost");
        assert_eq!(denied.1, 0, "what both deny does not pass");
    });
}

/// Runs in a mount namespace of its own, with the threads that it starts.
fn in_mounts<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).expect("a namespace of its own");
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .expect("private mounts");
        work()
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
