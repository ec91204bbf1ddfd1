//! Nodes that run the agent for the sake of its overlay, on one underlay with a real etcd. There is no API server: the
//! overlay does not need one.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnetwork::{Ipv4Network, Ipv6Network};
use orch_config::Paths;
use orch_netagent::files::SubnetEnv;
use orch_netagent::status::NetStatus;
use orch_netagent::{EtcdConfig, Options, run};
use serde_json::Value;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::Etcd;
use super::netns::Netns;

const LIMIT: Duration = Duration::from_secs(30);
pub const PREFIX: &str = "/coreos.com/network";

/// Asks again until there is an answer, and says how long that took.
#[track_caller]
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub struct World {
    pub underlay: Netns,
    pub server: Netns,
    pub etcd: Etcd,
}

/// What a world's network is unless a test says otherwise. Nodes get subnets between 100 and 199 at random: what a test
/// writes by hand lies outside.
pub const VXLAN: &str = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.100.0","SubnetMax":"10.244.199.0","Backend":{"Type":"vxlan"}}"#;

impl World {
    /// etcd is at 192.0.2.3.
    pub fn new() -> Self {
        let underlay = Netns::new("underlay");
        underlay.ip("link add br0 type bridge");
        underlay.ip("link set br0 up");
        underlay.within(|| {
            let _ = std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        });
        let server = Netns::new("server");
        join(&underlay, &server, 3);
        let etcd = server.within(|| Etcd::start_at(Ipv4Addr::new(192, 0, 2, 3)));
        let world = Self { underlay, server, etcd };
        world.configure(VXLAN);
        world
    }

    /// A host with the address 192.0.2.`last` and nothing else.
    pub fn host(&self, last: u8) -> Netns {
        let netns = Netns::new("node");
        join(&self.underlay, &netns, last);
        netns
    }

    /// A node of ours.
    pub fn node(&self, last: u8) -> Node {
        self.node_with(last, |_| {})
    }

    /// A node of ours with other options.
    pub fn node_with(&self, last: u8, change: impl FnOnce(&mut Options)) -> Node {
        self.node_in(self.host(last), last, change)
    }

    /// A node of ours on a host that is there.
    pub fn node_in(&self, netns: Netns, last: u8, change: impl FnOnce(&mut Options)) -> Node {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut options = Options {
            node_name: format!("node-{last}"),
            node_ip: Ipv4Addr::new(192, 0, 2, last),
            etcd: EtcdConfig { endpoints: vec![self.etcd.url.clone()], ..EtcdConfig::default() },
            paths: Paths::new(folder.path()),
            upstream_dns: vec![Ipv4Addr::new(192, 0, 2, 3).into()],
            ..Options::default()
        };
        change(&mut options);
        let mut node = Node { netns, folder, options, agent: None };
        node.start();
        node
    }

    /// Runs etcdctl and returns what it prints.
    #[track_caller]
    pub fn etcdctl(&self, words: &[&str]) -> String {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.server.name, "etcdctl", "--endpoints", &self.etcd.url])
            .args(words)
            .env("ETCDCTL_API", "3")
            .output()
            .expect("etcdctl is installed");
        assert!(
            output.status.success(),
            "etcdctl {words:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Writes the network's configuration.
    pub fn configure(&self, json: &str) {
        self.etcdctl(&["put", &format!("{PREFIX}/config"), json]);
    }

    /// Keys below `subnets/`, without the folder.
    pub fn subnet_keys(&self) -> Vec<String> {
        let folder = format!("{PREFIX}/subnets/");
        let keys = self.etcdctl(&["get", "--prefix", &folder, "--keys-only"]);
        keys.lines().filter_map(|key| key.strip_prefix(&folder)).map(str::to_owned).collect()
    }

    /// Value of a lease.
    pub fn lease(&self, key: &str) -> Value {
        let key = format!("{PREFIX}/subnets/{key}");
        serde_json::from_str(&self.etcdctl(&["get", &key, "--print-value-only"])).expect("JSON")
    }

    pub fn restart_etcd(&mut self) {
        // It starts in the namespace of the thread that starts it.
        let mut etcd = std::mem::replace(&mut self.etcd, Etcd::none());
        self.etcd = self.server.within(move || {
            etcd.resume();
            etcd
        });
    }
}

/// Joins a namespace to the underlay as 192.0.2.`last`.
pub fn join(underlay: &Netns, netns: &Netns, last: u8) {
    underlay.ip(&format!("link add u{last} type veth peer name eth0 netns {}", netns.name));
    underlay.ip(&format!("link set u{last} up master br0"));
    netns.ip(&format!("address add 192.0.2.{last}/24 dev eth0"));
    netns.ip("link set eth0 up");
}

pub struct Node {
    pub netns: Netns,
    pub folder: TempDir,
    pub options: Options,
    agent: Option<Agent>,
}

struct Agent {
    kill: CancellationToken,
    stop: CancellationToken,
    thread: JoinHandle<()>,
}

impl Node {
    pub fn start(&mut self) {
        assert!(self.agent.is_none());
        let options = self.options.clone();
        let (kill, stop) = (CancellationToken::new(), CancellationToken::new());
        let (killed, stopped) = (kill.clone(), stop.clone());
        let thread = self.netns.spawn(move || {
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
        self.agent = Some(Agent { kill, stop, thread });
    }

    /// As `kill -9`: nothing is told to anybody.
    pub fn kill(&mut self) {
        let agent = self.agent.take().expect("it runs");
        agent.kill.cancel();
        agent.thread.join().expect("the thread ends");
    }

    /// Whether the agent has not ended.
    pub fn runs(&self) -> bool {
        self.agent.as_ref().is_some_and(|agent| !agent.thread.is_finished())
    }

    pub fn subnet_file(&self) -> PathBuf {
        Paths::new(self.folder.path()).subnet_env()
    }

    pub fn env(&self) -> SubnetEnv {
        eventually("the node has a subnet", || SubnetEnv::observe(&self.subnet_file()))
    }

    /// Its IPv4 subnet.
    pub fn subnet(&self) -> Ipv4Network {
        self.env().ipv4.expect("the network has IPv4").1
    }

    pub fn status(&self) -> NetStatus {
        NetStatus::read(&Paths::new(self.folder.path()).net_status()).unwrap_or_default()
    }

    /// Key of its lease.
    pub fn key(&self) -> String {
        self.env().key().to_string()
    }

    /// Runs `nft` in it; what it prints, or nothing if it fails.
    pub fn nft(&self, words: &str) -> String {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.netns.name, "nft"])
            .args(words.split_whitespace())
            .output()
            .expect("nft is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A pod with the address `last` of the node's subnet, which answers "NAME CLIENT" on port 8080.
    pub fn pod(&self, last: u8) -> Pod {
        Pod::attach(&self.netns, self.subnet(), self.env().mtu, last)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.stop.cancel();
            let ended = agent.thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the agent ends well");
        }
    }
}

/// A pod, attached as the CNI plugins do it.
pub struct Pod {
    pub netns: Netns,
    pub ip: Ipv4Addr,
}

impl Pod {
    pub fn attach(node: &Netns, subnet: Ipv4Network, mtu: u32, last: u8) -> Self {
        let (base, length) = (subnet.network().to_bits(), subnet.prefix());
        let address = |last: u8| Ipv4Addr::from_bits(base + u32::from(last));
        let gateway = address(1);
        if !node.ip("-br link").lines().any(|line| line.starts_with("cni0")) {
            node.ip(&format!("link add cni0 address 02:00:00:00:00:01 mtu {mtu} type bridge"));
            node.ip(&format!("address add {gateway}/{length} dev cni0"));
            node.ip("link set cni0 up");
        }
        let netns = Netns::new("pod");
        let host = format!("veth{last}");
        node.ip(&format!(
            "link add {host} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
            netns.name
        ));
        node.ip(&format!("link set {host} up master cni0"));
        netns.ip(&format!("address add {}/{length} dev eth0", address(last)));
        netns.ip("link set eth0 up");
        netns.ip(&format!("route add default via {gateway}"));
        netns.serve_tcp("pod", 8080);
        Self { netns, ip: address(last) }
    }

    /// One that has an address of the node's IPv6 subnet and no other, where it answers on port 8081.
    pub fn attach_ipv6(node: &Netns, subnet: Ipv6Network, mtu: u32, last: u8) -> (Netns, Ipv6Addr) {
        let address = |last: u8| Ipv6Addr::from_bits(subnet.network().to_bits() + u128::from(last));
        let (gateway, length) = (address(1), subnet.prefix());
        if !node.ip("-br link").lines().any(|line| line.starts_with("cni0")) {
            node.ip(&format!("link add cni0 address 02:00:00:00:00:01 mtu {mtu} type bridge"));
            node.ip(&format!("address add {gateway}/{length} dev cni0 nodad"));
            node.ip("link set cni0 up");
        }
        let netns = Netns::new("pod");
        node.ip(&format!(
            "link add veth{last} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
            netns.name
        ));
        node.ip(&format!("link set veth{last} up master cni0"));
        netns.ip(&format!("address add {}/{length} dev eth0 nodad", address(last)));
        netns.ip("link set eth0 up");
        netns.ip(&format!("-6 route add default via {gateway}"));
        netns.serve_tcp6("pod", 8081);
        (netns, address(last))
    }

    /// Gives it an address of the node's IPv6 subnet, where it answers on port 8081.
    pub fn add_ipv6(&self, node: &Netns, subnet: Ipv6Network, last: u8) -> Ipv6Addr {
        let address = |last: u8| Ipv6Addr::from_bits(subnet.network().to_bits() + u128::from(last));
        let (gateway, length) = (address(1), subnet.prefix());
        node.ip(&format!("address replace {gateway}/{length} dev cni0 nodad"));
        self.netns.ip(&format!("address add {}/{length} dev eth0 nodad", address(last)));
        self.netns.ip(&format!("-6 route add default via {gateway}"));
        self.netns.serve_tcp6("pod", 8081);
        address(last)
    }

    /// Asks the other pod; true if it answers and sees our own address.
    pub fn reaches(&self, other: &Self) -> bool {
        self.netns
            .ask(&format!("{}:8080", other.ip))
            .is_ok_and(|answer| answer == format!("pod {}", self.ip))
    }
}
