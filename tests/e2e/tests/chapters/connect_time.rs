//! Services at connect time, as a lab has them; and the agent of one node without them.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use cni_netlink::NetNs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests_e2e::eventually;
use tests_e2e::testlab::{TestLab, underlay};

use super::network::services_and_dns;
use super::policy::{FRONT, NEIGHBOUR, Shop, pod_netns};

const SOON: Duration = Duration::from_secs(60);
/// Patience with one connection; one that policy forbids takes as long.
const LIMIT: Duration = Duration::from_secs(2);
/// How long a server waits for a datagram before it looks at its connections.
const TICK: Duration = Duration::from_millis(1);
/// Where the pod is whose sockets are looked at.
const NODE: &str = "node-1";
/// The Service's port, and that of its endpoints.
const PORT: u16 = 700;
const ENDPOINT_PORT: u16 = 7700;

/// A pod's TCP connection to a cluster IP has its endpoint from the start: the endpoint is the other end of its socket, and
/// conntrack hears of no cluster IP, while `getpeername` says the Service's. Endpoints that go get no new connection and no
/// further datagram, connections outlive the agent, and policies are about the endpoint.
pub(super) fn connect_time(lab: &TestLab) -> anyhow::Result<()> {
    let shop = Shop::open(lab)?;
    let outcome = (|| {
        eventually("the node says that its sockets choose", SOON, || choose(lab, true))?;
        let client = Client(NetNs::open(&pod_netns(lab, NODE, NEIGHBOUR)?)?);
        let near = Server::start(&pod_netns(lab, NODE, "shop/web")?)?;
        let far = Server::start(&pod_netns(lab, "node-2", FRONT)?)?;
        let service = service(lab, "None")?;
        endpoints(lab, &[&near, &far])?;
        let both = [near.address, far.address];
        let mut held =
            eventually("both endpoints are chosen when a socket connects", SOON, || {
                let connections = client.connect_often(service)?;
                for wanted in both {
                    ensure!(
                        connections.iter().any(|one| one.endpoint == wanted),
                        "{connections:?}"
                    );
                }
                let to_far = connections.into_iter().find(|one| one.endpoint == far.address);
                to_far.context("a connection to the far endpoint")
            })?;
        let sockets = eventually("both endpoints are chosen when sockets send", SOON, || {
            let sockets: Vec<UdpSocket> =
                (0..20).map(|_| client.datagrams()).collect::<Result<_, _>>()?;
            let asked = sockets.iter().map(|socket| who_answers(socket, service));
            let asked = asked.collect::<anyhow::Result<Vec<_>>>()?;
            ensure!(both.iter().all(|wanted| asked.contains(wanted)), "{asked:?}");
            Ok(sockets)
        })?;
        let translated = translated(lab, service)?;
        let connections = client.connect_often(service)?;
        ensure!(connections.iter().all(|one| both.contains(&one.endpoint)), "{connections:?}");
        for socket in &sockets {
            let first = who_answers(socket, service)?;
            ensure!(who_answers(socket, service)? == first, "a socket keeps its endpoint");
            who_answers(&client.datagrams()?, service)?;
        }
        // Entries from before the programs may end meanwhile.
        let after = self::translated(lab, service)?;
        ensure!(after <= translated, "conntrack has the cluster IP: {translated}, then {after}");

        self::service(lab, "ClientIP")?;
        eventually("the pod comes back to one endpoint", SOON, || {
            let connections = client.connect_often(service)?;
            let first = connections.first().context("none")?.endpoint;
            ensure!(connections.iter().all(|one| one.endpoint == first), "{connections:?}");
            Ok(())
        })?;
        self::service(lab, "None")?;

        endpoints(lab, &[&near])?;
        let only_near = || {
            let connections = client.connect_often(service)?;
            ensure!(connections.iter().all(|one| one.endpoint == near.address), "{connections:?}");
            for socket in &sockets {
                let endpoint = who_answers(socket, service)?;
                ensure!(endpoint == near.address, "a datagram to {endpoint}");
            }
            Ok(())
        };
        eventually("the endpoint that went gets no connection", SOON, only_near)?;
        kill(Pid::from_raw(lab.pid(NODE)?), Signal::SIGKILL).context("kill the agent")?;
        only_near().context("without an agent")?;
        restart(lab)?;
        only_near().context("after the agent")?;
        held.echo().context("the connection that outlived its endpoint and the agent")?;

        policies(&shop, &client, service, &near)?;

        start_agent(lab, "nftables")?;
        eventually("the node says that its sockets do not choose", SOON, || choose(lab, false))?;
        let connection = client.connect(service)?;
        ensure!(connection.endpoint == service, "not translated: {connection:?}");
        services_and_dns(lab)
    })();
    // The next chapter's lab is as it comes.
    outcome.and(start_agent(lab, "auto")).and(shop.close())
}

/// A policy names the endpoint's pod; it knows no Service's address.
fn policies(
    shop: &Shop<'_>,
    client: &Client,
    service: SocketAddr,
    near: &Server,
) -> anyhow::Result<()> {
    let way_out = |to: &str| {
        let to = json!([{"podSelector": {"matchLabels": {"app": to}}}]);
        let subject = json!({"matchLabels": {"app": "neighbour"}});
        let egress = json!([{"to": to}]);
        let spec = json!({"podSelector": subject, "policyTypes": ["Egress"], "egress": egress});
        shop.policy("way-out", spec)
    };
    way_out("front")?;
    eventually("the policy forbids the endpoint", SOON, || match client.connect(service) {
        Ok(connection) => bail!("{connection:?}"),
        Err(_) => Ok(()),
    })?;
    way_out("web")?;
    eventually("the policy allows the endpoint", SOON, || {
        let connection = client.connect(service)?;
        ensure!(connection.endpoint == near.address, "{connection:?}");
        Ok(())
    })?;
    shop.remove_policy("way-out")
}

/// Starts the agent of the node anew, with this word for `--services`.
fn start_agent(lab: &TestLab, services: &str) -> anyhow::Result<()> {
    let underlay = underlay();
    let words = ["lab", "up", "--nodes", "3", "--underlay", &underlay, "--services", services];
    lab.orchctl(&words, SOON)?.ok()?;
    restart(lab)
}

fn restart(lab: &TestLab) -> anyhow::Result<()> {
    lab.orchctl(&["lab", "restart", NODE], SOON)?.ok().map(drop)
}

/// How many flows to the Service's address the node's conntrack knows.
fn translated(lab: &TestLab, service: SocketAddr) -> anyhow::Result<usize> {
    let ip = service.ip().to_string();
    let listed = lab.on(NODE, &["conntrack", "-L", "--orig-dst", &ip])?;
    Ok(listed.lines().filter(|line| line.contains(&ip)).count())
}

/// Whether sockets of the node's pods choose.
fn choose(lab: &TestLab, wanted: bool) -> anyhow::Result<()> {
    // Its exit code is about the whole lab.
    let text = lab.orchctl(&["net", "status", "-o", "json"], SOON)?.text();
    let nodes: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let mut nodes = nodes.as_array().context("a list")?.iter();
    let node = nodes.find(|node| node["name"] == NODE).context("no node")?;
    let said = &node["status"]["connectTime"];
    ensure!(said["inForce"] == wanted && said["problem"].is_null(), "{said}");
    Ok(())
}

/// A Service without selector.
fn service(lab: &TestLab, affinity: &str) -> anyhow::Result<SocketAddr> {
    let object = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "direct"},
        "spec": {"sessionAffinity": affinity, "ports": [
            {"name": "tcp", "port": PORT},
            {"name": "udp", "port": PORT, "protocol": "UDP"},
        ]},
    });
    lab.apply(&object.to_string())?;
    let made = lab.json(&["service", "-n", "shop", "direct"])?;
    let ip = made["spec"]["clusterIP"].as_str().context("a ClusterIP")?;
    Ok(SocketAddr::new(ip.parse()?, PORT))
}

/// Makes these its endpoints.
fn endpoints(lab: &TestLab, servers: &[&Server]) -> anyhow::Result<()> {
    let addresses: Vec<_> =
        servers.iter().map(|one| json!({"addresses": [one.address.ip()]})).collect();
    let object = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "namespace": "shop", "name": "direct",
            "labels": {"kubernetes.io/service-name": "direct"},
        },
        "ports": [
            {"name": "tcp", "port": ENDPOINT_PORT},
            {"name": "udp", "port": ENDPOINT_PORT, "protocol": "UDP"},
        ],
        "endpoints": addresses,
    });
    lab.apply(&object.to_string()).map(drop)
}

/// A pod's namespace, from which the test connects.
struct Client(NetNs);

/// A connection of the pod.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    /// Its other end, as the kernel has it.
    endpoint: SocketAddr,
}

impl Client {
    fn connect(&self, service: SocketAddr) -> anyhow::Result<Connection> {
        let (stream, sockets) = self.0.run(|| -> anyhow::Result<_> {
            let stream = TcpStream::connect_timeout(&service, LIMIT)?;
            let sockets = std::fs::read_to_string("/proc/thread-self/net/tcp")?;
            Ok((stream, sockets))
        })?;
        stream.set_read_timeout(Some(LIMIT))?;
        let named = stream.peer_addr()?;
        ensure!(named == service, "getpeername says {named}, not {service}");
        let own = stream.local_addr()?;
        let pairs = sockets.lines().filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            Some((address(words.next()?)?, address(words.next()?)?))
        });
        let found = pairs.into_iter().find(|(local, other)| *local == own && other.port() != 0);
        let (_, endpoint) = found.with_context(|| format!("no socket at {own}: {sockets}"))?;
        let mut connection = Connection { stream, endpoint };
        connection.echo()?;
        Ok(connection)
    }

    /// A UDP socket of the pod that is not connected.
    fn datagrams(&self) -> anyhow::Result<UdpSocket> {
        let socket = self.0.run(|| -> anyhow::Result<_> { Ok(UdpSocket::bind("0.0.0.0:0")?) })?;
        socket.set_read_timeout(Some(LIMIT))?;
        Ok(socket)
    }

    fn connect_often(&self, service: SocketAddr) -> anyhow::Result<Vec<Connection>> {
        (0..20).map(|_| self.connect(service)).collect()
    }
}

impl Connection {
    fn echo(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(b"?").context("send")?;
        self.stream.read_exact(&mut [0]).context("receive")
    }
}

/// Asks by a datagram; the endpoint names itself, and the answer has to come from where the question went.
fn who_answers(socket: &UdpSocket, service: SocketAddr) -> anyhow::Result<SocketAddr> {
    socket.send_to(b"?", service).context("send")?;
    let mut text = [0; 64];
    let (length, from) = socket.recv_from(&mut text).context("receive")?;
    ensure!(from == service, "an answer from {from}, not from {service}");
    std::str::from_utf8(&text[..length])?.parse().context("an address")
}

/// An address of `/proc/net/tcp`: `0100007F:0050`, the first part as the machine has the number.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let ip = u32::from_str_radix(ip, 16).ok()?;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some(SocketAddr::from((ip.to_ne_bytes(), port)))
}

/// A server in a pod's namespace that sends back what it gets, and its own address to whoever sends a datagram.
struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(netns: &Path) -> anyhow::Result<Self> {
        let (listener, datagrams, address) = NetNs::open(netns)?.run(|| -> anyhow::Result<_> {
            let netlink = cni_netlink::Netlink::open()?;
            let link = netlink.link("eth0")?.context("no eth0")?;
            let addresses = netlink.addresses(link.index)?;
            let ip = addresses.iter().map(|one| one.ip()).find(|ip| ip.is_ipv4());
            let ip = ip.context("no IPv4 address")?;
            let address = SocketAddr::new(ip, ENDPOINT_PORT);
            Ok((TcpListener::bind(address)?, UdpSocket::bind(address)?, address))
        })?;
        listener.set_nonblocking(true)?;
        datagrams.set_read_timeout(Some(TICK))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            serve(&listener, &datagrams, &address.to_string(), &stopped);
        });
        Ok(Self { address, stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// One thread for all connections: each is asked now and then.
fn serve(listener: &TcpListener, datagrams: &UdpSocket, own: &str, stop: &AtomicBool) {
    let mut streams: Vec<TcpStream> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                streams.push(stream);
            }
        }
        streams.retain_mut(|stream| {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(0) => false,
                Ok(_) => stream.write_all(&byte).is_ok(),
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            }
        });
        // Waits for one for a tick.
        if let Ok((_, from)) = datagrams.recv_from(&mut [0; 8]) {
            // The way back may be closed.
            let _ = datagrams.send_to(own.as_bytes(), from);
        }
    }
}
