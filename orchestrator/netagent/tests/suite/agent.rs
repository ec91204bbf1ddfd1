//! The whole agent on the real kernel: two nodes and a server on an underlay, a real etcd, an API server in memory.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::Etcd;
use crate::support::api::{FakeApi, NAMESPACES, NODES, SERVICES, SLICES};
use crate::support::netns::Netns;
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use orch_config::Paths;
use orch_netagent::files::{SubnetEnv, write_atomic};
use orch_netagent::status::NetStatus;
use orch_netagent::{EtcdConfig, Options, run};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(30);
const CLUSTER_IP: &str = "10.96.3.4:80";

#[track_caller]
fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

struct World {
    server: Netns,
    client: Netns,
    nodes: Vec<Node>,
    etcd: Etcd,
    api: FakeApi,
    _underlay: Netns,
}

struct Node {
    netns: Netns,
    name: String,
    folder: TempDir,
    agent: Option<Agent>,
}

struct Agent {
    kill: CancellationToken,
    stop: CancellationToken,
    thread: JoinHandle<()>,
}

impl World {
    /// The addresses are 192.0.2.1 and .2 for the nodes, .3 for the server and .9 for a client outside.
    fn new() -> Self {
        let underlay = Netns::new("underlay");
        underlay.ip("link add br0 type bridge");
        underlay.ip("link set br0 up");
        underlay.within(|| {
            let _ = std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        });
        let join = |netns: &Netns, last: u8| {
            underlay.ip(&format!("link add u{last} type veth peer name eth0 netns {}", netns.name));
            underlay.ip(&format!("link set u{last} up master br0"));
            netns.ip(&format!("address add 192.0.2.{last}/24 dev eth0"));
            netns.ip("link set eth0 up");
            if last != 9 {
                netns.ip("route add default via 192.0.2.9");
            }
        };
        let (server, client) = (Netns::new("server"), Netns::new("client"));
        join(&server, 3);
        join(&client, 9);
        let nodes = [1, 2].map(|last| {
            let netns = Netns::new("node");
            join(&netns, last);
            // What a fresh kernel says; the agent must change it.
            netns.within(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("sysctl"));
            let folder = tempfile::tempdir().expect("temporary folder");
            Node { netns, name: format!("node-{last}"), folder, agent: None }
        });
        server.serve_tcp("api", 6443);
        let etcd = server.within(|| Etcd::start_at(Ipv4Addr::new(192, 0, 2, 3)));
        let api = FakeApi::default();
        api.put(NAMESPACES, json!({"metadata": {"name": "default"}}));
        for node in &nodes {
            api.put(NODES, json!({"metadata": {"name": node.name}, "spec": {}}));
        }
        service(&api, "kubernetes", "10.96.0.1", 443, None);
        slice(&api, "kubernetes", 6443, &[json!({"addresses": ["192.0.2.3"]})]);
        service(&api, "web", "10.96.3.4", 80, Some(30080));
        Self { server, client, nodes: nodes.into(), etcd, api, _underlay: underlay }
    }

    fn start(&mut self, index: usize) {
        let (api, url) = (self.api.clone(), self.etcd.url.clone());
        let node = &mut self.nodes[index];
        assert!(node.agent.is_none());
        let options = Options {
            node_name: node.name.clone(),
            node_ip: Ipv4Addr::new(192, 0, 2, u8::try_from(index + 1).expect("small")),
            etcd: EtcdConfig { endpoints: vec![url], ..EtcdConfig::default() },
            client: api.client(),
            paths: Paths::new(node.folder.path()),
            upstream_dns: vec![Ipv4Addr::new(192, 0, 2, 3).into()],
            ..Options::default()
        };
        let (kill, stop) = (CancellationToken::new(), CancellationToken::new());
        let (killed, stopped) = (kill.clone(), stop.clone());
        let thread = node.netns.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("runtime");
            runtime.block_on(async {
                tokio::select! {
                    () = killed.cancelled() => {}
                    outcome = run(options, stopped) => outcome.expect("the agent ends well"),
                }
            });
        });
        node.agent = Some(Agent { kill, stop, thread });
    }

    fn restart_etcd(&mut self) {
        // It starts in the namespace of the thread that starts it.
        let mut etcd = std::mem::replace(&mut self.etcd, Etcd::none());
        self.etcd = self.server.within(move || {
            etcd.resume();
            etcd
        });
    }

    /// Starts both and attaches a pod to each.
    fn up(&mut self) -> [Netns; 2] {
        self.start(0);
        self.start(1);
        let pods = [0, 1].map(|index| self.nodes[index].attach(2));
        for (index, pod) in pods.iter().enumerate() {
            pod.serve_tcp(&format!("pod{}", index + 1), 8080);
            pod.serve_udp(&format!("pod{}", index + 1), 8080);
        }
        pods
    }

    /// Endpoints of the Service `web`: indices of the nodes whose first pod serves.
    fn serve(&self, ready: &[usize], terminating: &[usize]) {
        let endpoint = |index: &usize, ready: bool| {
            json!({
                "addresses": [self.nodes[*index].pod_ip(2)],
                "nodeName": self.nodes[*index].name,
                "conditions": {"ready": ready, "serving": true, "terminating": !ready},
            })
        };
        let endpoints: Vec<Value> = ready
            .iter()
            .map(|index| endpoint(index, true))
            .chain(terminating.iter().map(|index| endpoint(index, false)))
            .collect();
        slice(&self.api, "web", 8080, &endpoints);
    }
}

fn service(api: &FakeApi, name: &str, ip: &str, port: u16, node_port: Option<u16>) {
    let spec = json!({
        "clusterIP": ip,
        "clusterIPs": [ip],
        "ports": [{"name": "http", "port": port, "protocol": "TCP", "nodePort": node_port}],
    });
    api.put(SERVICES, json!({"metadata": {"name": name, "namespace": "default"}, "spec": spec}));
}

fn slice(api: &FakeApi, service: &str, port: u16, endpoints: &[Value]) {
    let labels = json!({"kubernetes.io/service-name": service});
    api.put(
        SLICES,
        json!({
            "metadata": {"name": format!("{service}-1"), "namespace": "default", "labels": labels},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
            "endpoints": endpoints,
        }),
    );
}

impl Node {
    fn paths(&self) -> Paths {
        Paths::new(self.folder.path())
    }

    fn subnet_file(&self) -> PathBuf {
        self.paths().subnet_env()
    }

    fn env(&self) -> SubnetEnv {
        eventually("the node has a subnet", || SubnetEnv::observe(&self.subnet_file()))
    }

    fn subnet(&self) -> ipnetwork::Ipv4Network {
        self.env().ipv4.expect("the network has IPv4").1
    }

    fn status(&self) -> NetStatus {
        NetStatus::read(&self.paths().net_status()).unwrap_or_default()
    }

    fn pod_ip(&self, last: u8) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.subnet().network().to_bits() + u32::from(last))
    }

    /// What the CNI plugins do.
    fn attach(&self, last: u8) -> Netns {
        let env = self.env();
        let gateway = self.pod_ip(1);
        if self.netns.ip("-br link").lines().all(|line| !line.starts_with("cni0")) {
            self.netns.ip(&format!(
                "link add cni0 address 02:00:00:00:00:01 mtu {} type bridge",
                env.mtu
            ));
            self.netns.ip(&format!("address add {gateway}/24 dev cni0"));
            self.netns.ip("link set cni0 up");
        }
        let pod = Netns::new("pod");
        let host = format!("veth{last}");
        self.netns.ip(&format!(
            "link add {host} mtu {0} type veth peer name eth0 mtu {0} netns {1}",
            env.mtu, pod.name
        ));
        self.netns.ip(&format!("link set {host} up master cni0"));
        self.netns.ip(&format!("link set {host} type bridge_slave hairpin on"));
        pod.ip(&format!("address add {}/24 dev eth0", self.pod_ip(last)));
        pod.ip("link set eth0 up");
        pod.ip(&format!("route add default via {gateway}"));
        pod
    }

    /// As `kill -9`: nothing is told to anybody.
    fn kill(&mut self) {
        let agent = self.agent.take().expect("it runs");
        agent.kill.cancel();
        agent.thread.join().expect("the thread ends");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(agent) = node.agent.take() {
                agent.stop.cancel();
                let ended = agent.thread.join();
                assert!(ended.is_ok() || std::thread::panicking(), "the agent ends well");
            }
        }
    }
}

fn answers(from: &Netns, address: &str, count: usize) -> BTreeSet<String> {
    (0..count)
        .map(|_| from.ask(address).unwrap_or_else(|error| panic!("{address}: {error}")))
        .collect()
}

fn set(texts: &[String]) -> BTreeSet<String> {
    texts.iter().cloned().collect()
}

/// Asks the cluster's DNS.
fn resolve(from: &Netns, name: &str, over_tcp: bool) -> std::io::Result<Message> {
    let mut query = Message::query();
    query.metadata.id = 7;
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name.parse::<Name>().expect("a name"), RecordType::A));
    let bytes = query.to_vec().expect("encoded");
    let server: SocketAddr = "10.96.0.10:53".parse().expect("address");
    let answer = from.within(move || -> std::io::Result<Vec<u8>> {
        let limit = Some(Duration::from_secs(2));
        let mut buffer = vec![0; 4096];
        if over_tcp {
            let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(2))?;
            stream.set_read_timeout(limit)?;
            stream.write_all(&u16::try_from(bytes.len()).expect("short").to_be_bytes())?;
            stream.write_all(&bytes)?;
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            buffer.truncate(usize::from(u16::from_be_bytes(length)));
            stream.read_exact(&mut buffer)?;
        } else {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(limit)?;
            socket.connect(server)?;
            socket.send(&bytes)?;
            let length = socket.recv(&mut buffer)?;
            buffer.truncate(length);
        }
        Ok(buffer)
    })?;
    Ok(Message::from_vec(&answer).expect("a DNS message"))
}

fn addresses(message: &Message) -> Vec<String> {
    let ip = |record: &hickory_proto::rr::Record| match &record.data {
        RData::A(a) => Some(a.0.to_string()),
        _ => None,
    };
    message.answers.iter().filter_map(ip).collect()
}

/// Sends a datagram that must not be cut, and returns the answer.
fn unfragmented(to: SocketAddr, length: usize) -> std::io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let never = libc::IP_PMTUDISC_DO;
    let length_of_option = libc::socklen_t::try_from(size_of_val(&never)).expect("small");
    // SAFETY: the option is an int, and pointer and length are those of a living one.
    let set = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const never).cast(),
            length_of_option,
        )
    };
    if set != 0 {
        return Err(std::io::Error::last_os_error());
    }
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.send_to(&vec![0; length], to)?;
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Requests in an endless row, about 100 per second, and how many of them failed.
struct Traffic {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU32>,
    thread: JoinHandle<Vec<String>>,
}

impl Traffic {
    fn start(from: &Netns, address: &str) -> Self {
        let address: SocketAddr = address.parse().expect("address");
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (stopped, counted) = (stop.clone(), count.clone());
        let thread = from.spawn(move || {
            let mut failures = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let started = Instant::now();
                let asked = (|| {
                    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
                    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
                    let mut text = String::new();
                    stream.read_to_string(&mut text)?;
                    if text.is_empty() { Err(std::io::Error::other("no answer")) } else { Ok(()) }
                })();
                if let Err(error) = asked {
                    failures.push(format!("{error} after {:?}", started.elapsed()));
                }
                counted.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
            failures
        });
        Self { stop, count, thread }
    }

    fn failures(self) -> (u32, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let failures = self.thread.join().expect("the client ends");
        (self.count.load(Ordering::Relaxed), failures)
    }
}

#[test]
fn pods_reach_each_other_services_names_and_the_outside() {
    let mut world = World::new();
    let [first, second] = world.up();
    let (one, two) = (world.nodes[0].pod_ip(2), world.nodes[1].pod_ip(2));
    let node_of = |index: usize| world.nodes[index].subnet().network();

    // Pod to pod, without translation, also in full-sized packets.
    eventually("pod to pod", || first.ask(&format!("{two}:8080")).ok());
    assert_eq!(first.ask(&format!("{two}:8080")).expect("pod to pod"), format!("pod2 {one}"));
    assert_eq!(second.ask(&format!("{one}:8080")).expect("pod to pod"), format!("pod1 {two}"));
    let mtu = world.nodes[0].env().mtu;
    assert_eq!(mtu, 1450);
    let full = first.within({
        let to = SocketAddr::new(two.into(), 8080);
        move || unfragmented(to, usize::try_from(mtu).expect("small") - 28)
    });
    assert_eq!(full.expect("a full-sized packet"), format!("pod2 {one}"));
    // A node to a pod of another node: from its overlay address.
    assert_eq!(
        world.nodes[0].netns.ask(&format!("{two}:8080")).expect("node to pod"),
        format!("pod2 {}", node_of(0))
    );

    world.serve(&[0, 1], &[]);
    eventually("the Service answers", || first.ask(CLUSTER_IP).ok());
    let gateway = world.nodes[0].pod_ip(1);
    // To itself a pod comes under the bridge's address, to others under its own.
    assert_eq!(
        answers(&first, CLUSTER_IP, 24),
        set(&[format!("pod1 {gateway}"), format!("pod2 {one}")])
    );
    assert_eq!(
        answers(&world.nodes[0].netns, CLUSTER_IP, 24),
        set(&[format!("pod1 {gateway}"), format!("pod2 {}", node_of(0))])
    );
    eventually("the second node knows the Service", || second.ask(CLUSTER_IP).ok());
    for node in ["192.0.2.1", "192.0.2.2"] {
        for from in [&world.client, &first, &second, &world.nodes[0].netns, &world.nodes[1].netns] {
            assert_eq!(
                answers(from, &format!("{node}:30080"), 24).len(),
                2,
                "{node} from {}",
                from.name
            );
        }
    }

    // The API server is outside of the pod network: masqueraded.
    assert_eq!(second.ask("10.96.0.1:443").expect("API server"), "api 192.0.2.2");
    assert_eq!(world.nodes[1].netns.ask("10.96.0.1:443").expect("API server"), "api 192.0.2.2");

    eventually("DNS answers", || resolve(&first, "web.default.svc.cluster.local.", false).ok());
    for over_tcp in [false, true] {
        for from in [&first, &second, &world.nodes[0].netns] {
            let answer = resolve(from, "web.default.svc.cluster.local.", over_tcp).expect("answer");
            assert_eq!(addresses(&answer), ["10.96.3.4"]);
        }
        let denied =
            resolve(&first, "nobody.default.svc.cluster.local.", over_tcp).expect("answer");
        assert_eq!(denied.metadata.response_code, ResponseCode::NXDomain);
    }

    for (index, node) in world.nodes.iter().enumerate() {
        let subnet = node.subnet().to_string();
        let mirrored = || {
            let object = world.api.get(NODES, &node.name)?;
            (object["spec"]["podCIDR"] == json!(subnet)
                && object["spec"]["podCIDRs"] == json!([subnet]))
            .then_some(())
        };
        eventually("podCIDR is mirrored", mirrored);
        assert!(node.paths().cni_conf_dir().join("10-orch.conflist").exists());
        let status = eventually("the status is whole", || {
            let status = node.status();
            (status.dns.is_some() && status.peers.len() == 1 && status.services.in_force)
                .then_some(status)
        });
        assert_eq!((status.etcd.as_str(), status.subnet), ("healthy", Some(subnet)));
        assert_eq!(status.peers[0].public_ip, format!("192.0.2.{}", 2 - index));
        assert_eq!(status.services.ports, 2);
        assert!(status.problems.is_empty(), "{:?}", status.problems);
    }
    assert_eq!(world.server.ip("-br link show type vxlan"), "");
}

#[test]
fn names_outside_are_asked_of_the_resolvers_outside() {
    let mut world = World::new();
    world.server.spawn(|| {
        let socket = UdpSocket::bind("0.0.0.0:53").expect("bind");
        let mut buffer = [0; 1500];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            let Ok(mut message) = Message::from_vec(&buffer[..length]) else { continue };
            message.metadata.message_type = hickory_proto::op::MessageType::Response;
            let name = message.queries[0].name().clone();
            let ip = RData::A(hickory_proto::rr::rdata::A(Ipv4Addr::new(198, 51, 100, 7)));
            message.add_answer(hickory_proto::rr::Record::from_rdata(name, 60, ip));
            let _ = socket.send_to(&message.to_vec().expect("encoded"), client);
        }
    });
    world.start(0);
    let pod = world.nodes[0].attach(2);
    for over_tcp in [false, true] {
        let answer =
            eventually("an answer from outside", || resolve(&pod, "example.org.", over_tcp).ok());
        assert_eq!(addresses(&answer), ["198.51.100.7"]);
    }
}

#[test]
fn a_rollout_loses_no_request_and_changes_are_in_force_within_tens_of_milliseconds() {
    let mut world = World::new();
    let [first, _second] = world.up();
    world.serve(&[0], &[]);
    for from in [&first, &world.client] {
        let address = if from.name == first.name { CLUSTER_IP } else { "192.0.2.2:30080" };
        eventually("the Service answers", || from.ask(address).ok());
    }
    let inside = Traffic::start(&first, CLUSTER_IP);
    let outside = Traffic::start(&world.client, "192.0.2.2:30080");
    let mut delays = Vec::new();
    for round in 0..20 {
        // As a rolling update does: both, then the old one terminating, then gone.
        let (new, old) = ((round + 1) % 2, round % 2);
        world.serve(&[new, old], &[]);
        std::thread::sleep(Duration::from_millis(60));
        world.serve(&[new], &[old]);
        let changed = Instant::now();
        let expected = format!("dnat to {}:8080", world.nodes[new].pod_ip(2));
        eventually("the change is in force", || {
            let rules = crate::support::netns::run(
                "ip",
                &format!(
                    "netns exec {} nft list chain ip orch svc-default/web/tcp/80",
                    world.nodes[0].netns.name
                ),
            );
            rules.contains(&expected).then_some(())
        });
        delays.push(changed.elapsed());
        world.serve(&[new], &[]);
        std::thread::sleep(Duration::from_millis(40));
    }
    for traffic in [inside, outside] {
        let (count, failures) = traffic.failures();
        assert!(count > 50, "{count} requests");
        assert_eq!(failures, Vec::<String>::new(), "of {count}");
    }
    delays.sort();
    assert!(delays[delays.len() / 2] < Duration::from_millis(250), "{delays:?}");
}

#[test]
fn a_killed_agent_leaves_no_gap_and_comes_back_while_etcd_and_the_api_server_are_away() {
    let mut world = World::new();
    let [first, second] = world.up();
    world.serve(&[0, 1], &[]);
    for pod in [&first, &second] {
        eventually("the Service answers", || pod.ask(CLUSTER_IP).ok());
    }
    let subnet = world.nodes[0].subnet();
    let two = world.nodes[1].pod_ip(2);
    let traffic = [
        Traffic::start(&first, CLUSTER_IP),
        Traffic::start(&first, &format!("{two}:8080")),
        Traffic::start(&second, CLUSTER_IP),
    ];

    world.nodes[0].kill();
    world.etcd.stop();
    world.api.set_away(true);
    world.start(0);
    eventually("it says what it waits for", || {
        let status = world.nodes[0].status();
        (status.etcd.contains("etcd") && status.services.in_force).then_some(())
    });
    std::thread::sleep(Duration::from_millis(500));

    world.api.set_away(false);
    world.serve(&[1], &[]);
    eventually("services follow without etcd", || {
        (answers(&first, CLUSTER_IP, 12).len() == 1).then_some(())
    });
    world.restart_etcd();
    eventually("etcd is back", || (world.nodes[0].status().etcd == "healthy").then_some(()));
    assert_eq!(world.nodes[0].subnet(), subnet);
    for traffic in traffic {
        let (count, failures) = traffic.failures();
        assert!(count > 50, "{count} requests");
        assert_eq!(failures, Vec::<String>::new(), "of {count}");
    }
}

#[test]
fn names_are_late_while_the_agent_starts_again_but_never_denied() {
    let mut world = World::new();
    world.start(0);
    let pod = world.nodes[0].attach(2);
    let name = "web.default.svc.cluster.local.";
    eventually("DNS answers", || resolve(&pod, name, false).ok());
    world.nodes[0].kill();
    for from in [&pod, &world.nodes[0].netns] {
        let error = resolve(from, name, false).expect_err("nobody is there").kind();
        assert_eq!(error, std::io::ErrorKind::WouldBlock, "silence, not a refusal");
    }
    world.start(0);
    let answer = eventually("DNS answers", || resolve(&pod, name, false).ok());
    assert_eq!(addresses(&answer), ["10.96.3.4"], "the first answer is the right one");
}

#[test]
fn after_a_reboot_pods_wait_for_the_overlay_and_the_node_has_its_subnet_again() {
    let mut world = World::new();
    let paths = world.nodes[0].paths();
    let conflist = paths.cni_conf_dir().join("10-orch.conflist");
    let former = SubnetEnv {
        ipv4: Some((
            "10.244.0.0/16".parse().expect("CIDR"),
            "10.244.77.0/24".parse().expect("CIDR"),
        )),
        ipv6: None,
        mtu: 1450,
    };
    write_atomic(&paths.subnet_env(), former.render().as_bytes()).expect("written");
    write_atomic(&conflist, b"{}").expect("written");
    world.etcd.stop();
    world.start(0);
    eventually("the configuration is withdrawn", || (!conflist.exists()).then_some(()));
    eventually("it says what it waits for", || {
        world.nodes[0].status().etcd.contains("etcd").then_some(())
    });
    assert!(!conflist.exists());
    world.restart_etcd();
    eventually("the configuration is back", || conflist.exists().then_some(()));
    assert_eq!(world.nodes[0].env(), former);
    assert!(world.nodes[0].netns.ip("-br link").contains("vxlan-orch"));
}

#[test]
fn damage_to_the_overlay_is_mended() {
    let mut world = World::new();
    let [first, _second] = world.up();
    let (two, far) = (world.nodes[1].pod_ip(2), world.nodes[1].subnet());
    let target = format!("{two}:8080");
    eventually("pod to pod", || first.ask(&target).ok());
    let node = &world.nodes[0].netns;
    for damage in [
        format!("route delete {far}"),
        format!("neighbour delete {} dev vxlan-orch", far.network()),
        "link set vxlan-orch down".to_owned(),
        "link set vxlan-orch mtu 1300".to_owned(),
        "link delete vxlan-orch".to_owned(),
        "address flush dev vxlan-orch".to_owned(),
    ] {
        node.ip(&damage);
        eventually(&damage, || {
            let link = node.ip("-o link show");
            (first.ask(&target).is_ok()
                && link.contains("vxlan-orch")
                && !link.contains("mtu 1300"))
            .then_some(())
        });
    }
    let entry = node.bridge("fdb show dev vxlan-orch");
    assert_eq!(entry.lines().filter(|line| line.contains("dst 192.0.2.2")).count(), 1, "{entry}");
    // A node that leaves is forgotten, in etcd's watch as in the kernel.
    world.nodes[1].kill();
    let url = world.etcd.url.clone();
    let key = format!("/coreos.com/network/subnets/{}-24", far.network());
    world.server.within(move || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let mut client = etcd_client::Client::connect([url], None).await.expect("connect");
            client.delete(key, None).await.expect("delete");
        });
    });
    let node = &world.nodes[0].netns;
    eventually("the route goes", || {
        (!node.ip("route show").contains(&far.to_string())).then_some(())
    });
    eventually("the rest goes", || {
        let rest =
            node.bridge("fdb show dev vxlan-orch") + &node.ip("neighbour show dev vxlan-orch");
        (!rest.contains("192.0.2.2") && !rest.contains(&far.network().to_string())).then_some(())
    });
}
