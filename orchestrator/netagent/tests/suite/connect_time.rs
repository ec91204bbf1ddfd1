//! Services at connect time, on the sockets of pods: the programs of the loader, driven by what the agent does.

use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use orch_config::Paths;
use orch_netagent::services::connect_time::{self, ConnectTime};
use orch_netagent::services::model::{Port, Protocol};

use crate::services::{BOTH, CLUSTER_IP, CLUSTER_IP_V6, World, answers, dual, set, web};
use crate::support::netns::Netns;

/// Patience with one answer.
const LIMIT: Duration = Duration::from_secs(3);

/// The socket programs of a node whose files are in a folder of the test.
struct Sockets {
    root: tempfile::TempDir,
    connect_time: ConnectTime,
}

impl Sockets {
    /// With these namespaces as the node's pods.
    fn new(pods: &[&Netns]) -> Self {
        let root = tempfile::tempdir().expect("a folder");
        let mut sockets = Self {
            connect_time: ConnectTime::install(&Paths::new(root.path())).expect("installed"),
            root,
        };
        sockets.know(pods);
        sockets
    }

    fn know(&mut self, pods: &[&Netns]) {
        let paths: Vec<_> =
            pods.iter().map(|pod| format!("/run/netns/{}", pod.name).into()).collect();
        self.connect_time.set_pods(&paths).expect("written");
    }

    fn apply(&mut self, port: &Port) -> usize {
        self.connect_time.apply(std::slice::from_ref(port)).expect("written")
    }

    /// What an agent does that starts again.
    fn restart(&mut self) {
        let again = ConnectTime::install(&Paths::new(self.root.path())).expect("taken over");
        self.connect_time = again;
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        let _ = connect_time::uninstall(&Paths::new(self.root.path()));
        let _ = nix::mount::umount(&self.root.path().join("sys/fs/bpf"));
    }
}

/// What a connected socket says of its other end.
fn peer_of(pod: &Netns, address: &str) -> String {
    let address = address.to_owned();
    pod.within(move || {
        let stream = std::net::TcpStream::connect(address).expect("connect");
        stream.peer_addr().expect("a peer").to_string()
    })
}

#[test]
fn sockets_of_pods_get_their_endpoint_at_connect_and_nobody_elses_do() {
    let world = World::new();
    let [first, second] = world.pods.as_slice() else { panic!("two pods") };
    // Who is not translated learns so at once.
    world.node.ip("route add unreachable 10.96.0.0/12");
    let mut sockets = Sockets::new(&[first, second]);
    let port = dual(Protocol::Tcp, BOTH);
    // There is no table of nftables here: who gets an answer has it from the socket programs.
    assert!(sockets.apply(&port) > 0);
    assert_eq!(sockets.apply(&port), 0);
    // A pod that reaches itself sees itself: nothing is masqueraded.
    assert_eq!(answers(first, CLUSTER_IP), set(&["pod2 10.244.1.2", "pod3 10.244.1.2"]));
    let seen = set(&["pod2 fd00:10:244:1::2", "pod3 fd00:10:244:1::2"]);
    assert_eq!(answers(first, CLUSTER_IP_V6), seen);
    // A socket of both families.
    assert_eq!(answers(first, "[::ffff:10.96.3.4]:80").len(), 2);
    assert_eq!(peer_of(first, CLUSTER_IP), CLUSTER_IP, "getpeername");
    assert_eq!(peer_of(first, CLUSTER_IP_V6), CLUSTER_IP_V6, "getpeername");
    assert_eq!(peer_of(first, "10.244.1.3:8080"), "10.244.1.3:8080");
    first.ask("10.96.3.4:81").expect_err("another port");
    world.node.ask(CLUSTER_IP).expect_err("the node is no pod");

    // The agent starts again; what is in force stays, and follows what changed meanwhile.
    sockets.restart();
    assert_eq!(answers(first, CLUSTER_IP).len(), 2);
    assert_eq!(sockets.apply(&port), 0);
    let one = dual(Protocol::Tcp, &[(3, true)]);
    sockets.apply(&one);
    assert_eq!(answers(second, CLUSTER_IP), set(&["pod3 10.244.1.3"]));
    sockets.know(&[second]);
    first.ask(CLUSTER_IP).expect_err("no pod any more");
    assert_eq!(answers(second, CLUSTER_IP).len(), 1);
    assert!(connect_time::uninstall(&Paths::new(sockets.root.path())).expect("removed"));
    // The kernel takes programs off a cgroup a moment after the last pin is gone: there are no pods for them by then.
    second.ask(CLUSTER_IP).expect_err("the programs are gone");
}

#[test]
fn connections_go_on_while_endpoints_change_and_programs_come_and_go() {
    let mut world = World::new();
    world.apply(&[web(Protocol::Tcp, BOTH)]);
    let mut sockets = Sockets::new(&[&world.pods[0], &world.pods[1]]);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let client = world.pods[0].spawn(move || {
        let mut count = 0;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            let mut stream = std::net::TcpStream::connect(CLUSTER_IP).expect("connect");
            let mut text = String::new();
            std::io::Read::read_to_string(&mut stream, &mut text).expect("an answer");
            assert!(text.starts_with("pod"), "{text}");
            count += 1;
        }
        count
    });
    for round in 0..20 {
        let endpoints = &BOTH[round % 2..];
        let port = web(Protocol::Tcp, endpoints);
        sockets.apply(&port);
        if round % 5 == 4 {
            sockets.connect_time.apply(&[]).expect("emptied");
            sockets.restart();
        }
    }
    drop(sockets);
    let (start, least) = (Instant::now(), Duration::from_millis(50));
    while start.elapsed() < least {
        std::thread::yield_now();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let count = client.join().expect("no connection failed");
    assert!(count > 50, "{count} connections");
}

/// A UDP socket of a pod that lives as long as the test, and is asked to send.
struct Talker {
    ask: Sender<SocketAddr>,
    answers: Receiver<std::io::Result<(String, SocketAddr)>>,
    _thread: JoinHandle<()>,
}

impl Talker {
    /// `connect`: what the socket is connected to, if it is.
    fn new(pod: &Netns, connect: Option<&'static str>, any: &'static str) -> Self {
        let ((ask, asked), (answer, answers)) = (channel::<SocketAddr>(), channel());
        let thread = pod.spawn(move || {
            let socket = UdpSocket::bind(any).expect("bind");
            socket.set_read_timeout(Some(LIMIT)).expect("timeout");
            if let Some(to) = connect {
                socket.connect(to).expect("connect");
            }
            for to in asked {
                let mut buffer = [0; 64];
                let got = socket.send_to(b"?", to).and_then(|_| socket.recv_from(&mut buffer));
                let text = got.map(|(length, from)| {
                    (String::from_utf8_lossy(&buffer[..length]).into_owned(), from)
                });
                if answer.send(text).is_err() {
                    return;
                }
            }
        });
        Self { ask, answers, _thread: thread }
    }

    fn unconnected(pod: &Netns) -> Self {
        Self::new(pod, None, "0.0.0.0:0")
    }

    /// Who answered; the answer came from where the question went.
    #[track_caller]
    fn ask(&self, to: &str) -> String {
        let to: SocketAddr = to.parse().expect("address");
        self.ask.send(to).expect("the socket is there");
        let (text, from) = self.answers.recv().expect("an outcome").expect("an answer");
        assert_eq!(from, to, "the source of {text}");
        text
    }

    fn is_refused(&self, to: &str) -> bool {
        self.ask.send(to.parse().expect("address")).expect("the socket is there");
        self.answers.recv().expect("an outcome").is_err()
    }
}

#[test]
fn a_udp_socket_keeps_its_endpoint_while_it_lives_and_hears_of_the_service_alone() {
    let world = World::new();
    let [first, second] = world.pods.as_slice() else { panic!("two pods") };
    // There is no table of nftables: who is not translated learns so at once.
    world.node.ip("route add unreachable 10.96.0.0/12");
    let mut sockets = Sockets::new(&[first, second]);
    sockets.apply(&dual(Protocol::Udp, BOTH));
    let talkers: Vec<Talker> = (0..24).map(|_| Talker::unconnected(first)).collect();
    let chosen: Vec<String> = talkers.iter().map(|one| one.ask(CLUSTER_IP)).collect();
    assert_eq!(
        chosen.iter().cloned().collect::<std::collections::BTreeSet<_>>(),
        set(&["pod2 10.244.1.2", "pod3 10.244.1.2"]),
        "sockets are spread"
    );
    for _ in 0..5 {
        for (talker, chosen) in talkers.iter().zip(&chosen) {
            assert_eq!(talker.ask(CLUSTER_IP), *chosen, "each keeps its own");
        }
    }
    // The same pod without its Service: the answer is its own, and the Service's are still the Service's.
    assert_eq!(talkers[0].ask("10.244.1.3:8080"), "pod3 10.244.1.2");
    assert_eq!(talkers[0].ask("10.244.1.2:8080"), "pod2 10.244.1.2");
    assert_eq!(talkers[0].ask(CLUSTER_IP), chosen[0]);

    // Another set with the same endpoint, written by another agent: nobody moves.
    sockets.restart();
    let mut more = dual(Protocol::Udp, BOTH);
    more.endpoints.push(crate::services::endpoint("10.244.1.77".parse().expect("address"), true));
    assert!(sockets.apply(&more) > 0);
    for (talker, chosen) in talkers.iter().zip(&chosen) {
        assert_eq!(talker.ask(CLUSTER_IP), *chosen, "kept over the change");
    }
    // Endpoints that go are left at the next datagram, and only they.
    sockets.apply(&dual(Protocol::Udp, &[(3, true)]));
    for talker in &talkers {
        assert_eq!(talker.ask(CLUSTER_IP), "pod3 10.244.1.2");
    }
    sockets.apply(&dual(Protocol::Udp, &[]));
    assert!(talkers[0].is_refused(CLUSTER_IP), "the last one is gone");

    sockets.apply(&dual(Protocol::Udp, BOTH));
    let six = Talker::new(first, None, "[::]:0");
    let chosen = six.ask(CLUSTER_IP_V6);
    assert!(chosen.ends_with(" fd00:10:244:1::2"), "{chosen}");
    assert_eq!(six.ask(CLUSTER_IP_V6), chosen);
    // A socket of both families.
    let chosen = six.ask("[::ffff:10.96.3.4]:80");
    assert!(chosen.ends_with(" 10.244.1.2"), "{chosen}");
    assert_eq!(six.ask("[::ffff:10.96.3.4]:80"), chosen);
    sockets.know(&[second]);
    assert!(talkers[0].is_refused(CLUSTER_IP), "no pod any more");
}

#[test]
fn a_udp_socket_that_asks_two_services_of_one_endpoint_hears_from_both() {
    const OTHER: &str = "10.96.3.5:80";
    let mut world = World::new();
    let mut sockets = Sockets::new(&[&world.pods[0], &world.pods[1]]);
    let one = web(Protocol::Udp, &[(2, true)]);
    let mut other = web(Protocol::Udp, &[(2, true)]);
    other.id = "default/other/udp/80".to_owned();
    other.cluster_ips = vec![OTHER.parse::<SocketAddr>().expect("address").ip()];
    other.node_port = None;
    other.external_ips.clear();
    world.apply(&[one.clone(), other.clone()]);
    sockets.connect_time.apply(&[one, other]).expect("written");
    let sources = world.pods[1].within(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
        socket.set_read_timeout(Some(LIMIT)).expect("timeout");
        for to in [CLUSTER_IP, OTHER] {
            socket.send_to(b"?", to).expect("sent");
        }
        let source = || {
            let (_, from) = socket.recv_from(&mut [0; 64]).expect("an answer");
            from.to_string()
        };
        std::collections::BTreeSet::from([source(), source()])
    });
    assert_eq!(sources, set(&[CLUSTER_IP, OTHER]));
}

#[test]
fn a_connected_udp_socket_stays_with_nftables_and_so_moves_without_noticing() {
    let mut world = World::new();
    let mut sockets = Sockets::new(&[&world.pods[0], &world.pods[1]]);
    let change = |world: &mut World, sockets: &mut Sockets, endpoints| {
        let port = web(Protocol::Udp, endpoints);
        world.apply(std::slice::from_ref(&port));
        sockets.apply(&port);
    };
    change(&mut world, &mut sockets, &[(2, true)]);
    let connected = Talker::new(&world.pods[1], Some(CLUSTER_IP), "0.0.0.0:0");
    let unconnected = Talker::unconnected(&world.pods[1]);
    // One that is connected names an address, too, which is where it may hear from.
    assert_eq!(connected.ask(CLUSTER_IP), "pod2 10.244.1.3");
    assert_eq!(unconnected.ask(CLUSTER_IP), "pod2 10.244.1.3");
    change(&mut world, &mut sockets, &[(3, true)]);
    // By nftables a pod reaches itself masqueraded; by its socket it does not.
    assert_eq!(connected.ask(CLUSTER_IP), "pod3 10.244.1.1");
    assert_eq!(unconnected.ask(CLUSTER_IP), "pod3 10.244.1.3");
}

#[test]
fn a_pod_comes_back_to_its_endpoint_until_that_goes_or_the_time_is_over() {
    let world = World::new();
    let [first, second] = world.pods.as_slice() else { panic!("two pods") };
    world.node.ip("route add unreachable 10.96.0.0/12");
    let mut sockets = Sockets::new(&[first, second]);
    let sticky = |limit: Duration, endpoints| {
        let mut port = dual(Protocol::Tcp, endpoints);
        port.affinity = Some(limit);
        port
    };
    let hour = Duration::from_secs(3600);
    sockets.apply(&sticky(hour, BOTH));
    let chosen = answers(first, CLUSTER_IP);
    assert_eq!(chosen.len(), 1, "{chosen:?}");
    assert_eq!(answers(first, CLUSTER_IP_V6).len(), 1);
    assert_eq!(peer_of(first, CLUSTER_IP), CLUSTER_IP, "getpeername");
    // The memory outlives the agent and changes that leave the endpoint.
    sockets.restart();
    let mut more = sticky(hour, BOTH);
    more.endpoints.push(crate::services::endpoint("10.244.1.77".parse().expect("address"), true));
    assert!(sockets.apply(&more) > 0);
    assert_eq!(answers(first, CLUSTER_IP), chosen);

    let (goes, stays) = if chosen == set(&["pod2 10.244.1.2"]) { (2, 3) } else { (3, 2) };
    let one = [(stays, true)];
    sockets.apply(&sticky(hour, &one));
    let moved = set(&[&format!("pod{stays} 10.244.1.2")]);
    assert_eq!(answers(first, CLUSTER_IP), moved, "pod{goes} went");
    sockets.apply(&sticky(hour, BOTH));
    assert_eq!(answers(first, CLUSTER_IP), moved, "and came back");

    // After a second of silence chance decides again, sooner or later for the other one.
    let short = Duration::from_secs(1);
    sockets.apply(&sticky(short, BOTH));
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        std::thread::sleep(short + Duration::from_millis(50));
        let answer = first.ask(CLUSTER_IP).expect("an answer");
        if !moved.contains(&answer) {
            break;
        }
        assert!(Instant::now() < deadline, "the pod never left {answer}");
    }
}

#[test]
fn programs_of_a_build_with_other_maps_go_when_this_one_comes() {
    let world = World::new();
    let [first, second] = world.pods.as_slice() else { panic!("two pods") };
    world.node.ip("route add unreachable 10.96.0.0/12");
    let mut sockets = Sockets::new(&[first, second]);
    sockets.apply(&dual(Protocol::Tcp, &[(2, true)]));
    let folder = sockets.root.path().join("sys/fs/bpf/orch");
    let own = std::fs::read_dir(&folder).expect("pins").flatten().next().expect("one").path();
    let former = folder.join("services-v0");
    std::fs::rename(&own, &former).expect("now they are another build's");

    sockets.restart();
    assert!(!former.exists() && own.exists());
    first.ask(CLUSTER_IP).expect_err("nobody translates by the former maps");
    sockets.know(&[first, second]);
    sockets.apply(&dual(Protocol::Tcp, &[(3, true)]));
    assert_eq!(answers(first, CLUSTER_IP), set(&["pod3 10.244.1.2"]));
}
