//! Namespaces to measure in: nodes on one underlay, pods on their bridges, and the two overlays.
//!
//! One is made by hand with `ip` and `bridge`, as flanneld makes it. The other is made by the agent's own plan, with its
//! closed underlay, masquerade and (empty) Services. Bridges and pods are the same for both. All vanishes with the
//! process.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, anyhow, bail};
use cni_netlink::{AddressOptions, Bridge, MacBytes, NetNs, Netlink, Route, VethPair, VxlanDevice};
use cni_nftables::{Chain, Family, Hook as NftHook, Nft, Table};
use ipnetwork::{IpNetwork, Ipv4Network};
use nix::sched::{CloneFlags, unshare};
use orch_ebpf_loader::{Hook, Pins, attach, install};
use orch_ebpf_maps::{Config, Endpoint, state};
use orch_netagent::big_tcp::LARGEST;
use orch_netagent::fast_path::{self, FastPath};
use orch_netagent::lease::{Identity, Leases, Network, SubnetKey};
use orch_netagent::mac::Mac;
use orch_netagent::network::{Mode, NetworkConfig};
use orch_netagent::overlay::kernel::{apply_peers, observe_peers};
use orch_netagent::overlay::plan::{WantedPeers, plan_peers};
use orch_netagent::overlay::{Path, Peer, Peers, closed};
use orch_netagent::services::ruleset::{self, Networks};

/// Ethernet's MTU, and what VXLAN leaves of it.
const UNDERLAY_MTU: u32 = 1500;
const OVERLAY_MTU: u32 = 1450;
const VNI: u32 = 1;
const PORT: u16 = 8472;
/// Host ends of the pods' links.
const POD_LINKS: [&str; 2] = ["p2", "p3"];

/// A namespace, alive as long as this value.
pub(crate) fn new_netns() -> anyhow::Result<NetNs> {
    let made = std::thread::spawn(|| -> anyhow::Result<NetNs> {
        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace: is this root?")?;
        up(&Netlink::open()?, "lo")?;
        Ok(NetNs::current()?)
    });
    made.join().map_err(|_| anyhow!("the thread that makes namespaces panicked"))?
}

fn up(netlink: &Netlink, name: &str) -> anyhow::Result<u32> {
    let link = netlink.link(name)?.with_context(|| format!("there is no link {name}"))?;
    netlink.set_up(link.index)?;
    Ok(link.index)
}

fn cidr(ip: Ipv4Addr, prefix: u8) -> anyhow::Result<IpNetwork> {
    Ok(IpNetwork::V4(Ipv4Network::new(ip, prefix)?))
}

/// What of the agent's work a node has.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Parts {
    /// Its tables of nftables.
    pub(crate) rules: bool,
    /// Routes over the underlay's link instead of VXLAN.
    pub(crate) direct: bool,
    /// The fast path.
    pub(crate) fast: bool,
}

/// A host with pods.
pub(crate) struct Node {
    number: u8,
    /// Its files.
    root: PathBuf,
    pub(crate) netns: NetNs,
    pub(crate) pods: Vec<Pod>,
}

/// A pod.
pub(crate) struct Pod {
    pub(crate) netns: NetNs,
    pub(crate) ip: Ipv4Addr,
}

/// The network that joins the nodes.
pub(crate) struct Underlay(NetNs);

impl Underlay {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let netns = new_netns()?;
        let netlink = Netlink::open_in(&netns)?;
        let bridge = Bridge {
            name: "br0".to_owned(),
            mtu: Some(UNDERLAY_MTU),
            up: true,
            ..Bridge::default()
        };
        netlink.create_bridge(&bridge)?;
        set(&netns, "bridge/bridge-nf-call-iptables", "0")?;
        Ok(Self(netns))
    }
}

/// Writes a setting of a namespace; one that the kernel does not know is off anyway.
fn set(netns: &NetNs, key: &str, value: &str) -> anyhow::Result<()> {
    netns.run(|| -> anyhow::Result<()> {
        let path = format!("/proc/sys/net/{key}");
        match std::fs::write(&path, value) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("write {path}"))
            }
            _ => Ok(()),
        }
    })
}

impl Node {
    /// A node with two pods on its bridge. `number` makes its addresses.
    pub(crate) fn new(underlay: &Underlay, number: u8, root: PathBuf) -> anyhow::Result<Self> {
        let netns = new_netns()?;
        set(&netns, "ipv4/ip_forward", "1")?;
        // Nothing is filtered here, and the same holds for both overlays.
        set(&netns, "bridge/bridge-nf-call-iptables", "0")?;
        let outside = Netlink::open_in(&underlay.0)?;
        let bridge = outside.link("br0")?.context("br0")?;
        outside.create_veth(&VethPair {
            name: format!("u{number}"),
            peer_name: "eth0".to_owned(),
            peer_netns: Some(netns.as_fd()),
            master: Some(bridge.index),
            mtu: Some(UNDERLAY_MTU),
            up: true,
            ..VethPair::default()
        })?;
        let inside = Netlink::open_in(&netns)?;
        let eth0 = up(&inside, "eth0")?;
        let mut node = Self { number, root, netns, pods: Vec::new() };
        inside.add_address(eth0, cidr(node.address(), 24)?, &AddressOptions::default())?;
        let cni0 = inside.create_bridge(&Bridge {
            name: "cni0".to_owned(),
            mtu: Some(OVERLAY_MTU),
            up: true,
            ..Bridge::default()
        })?;
        let gateway = Ipv4Addr::new(10, 244, number, 1);
        inside.add_address(cni0.index, cidr(gateway, 24)?, &AddressOptions::default())?;
        for (host, name) in [2, 3].into_iter().zip(POD_LINKS) {
            node.pods.push(node.pod(&inside, cni0.index, gateway, host, name)?);
        }
        Ok(node)
    }

    fn pod(
        &self,
        node: &Netlink,
        bridge: u32,
        gateway: Ipv4Addr,
        host: u8,
        name: &str,
    ) -> anyhow::Result<Pod> {
        let netns = new_netns()?;
        node.create_veth(&VethPair {
            name: name.to_owned(),
            peer_name: "eth0".to_owned(),
            peer_netns: Some(netns.as_fd()),
            master: Some(bridge),
            mtu: Some(OVERLAY_MTU),
            up: true,
            ..VethPair::default()
        })?;
        let inside = Netlink::open_in(&netns)?;
        let eth0 = up(&inside, "eth0")?;
        let ip = Ipv4Addr::new(10, 244, self.number, host);
        inside.add_address(eth0, cidr(ip, 24)?, &AddressOptions::default())?;
        inside.add_route(&Route {
            via: Some(IpAddr::V4(gateway)),
            link: Some(eth0),
            ..Route::default()
        })?;
        Ok(Pod { netns, ip })
    }

    /// Its address on the underlay.
    pub(crate) fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, self.number)
    }

    fn subnet(&self) -> Ipv4Network {
        Ipv4Network::new(Ipv4Addr::new(10, 244, self.number, 0), 24).expect("24 is a prefix length")
    }

    fn mac(&self) -> MacBytes {
        [2, 0, 0, 0, 1, self.number]
    }

    /// VXLAN towards another node as flanneld makes it, command by command.
    pub(crate) fn join_by_hand(&self, other: &Self) -> anyhow::Result<()> {
        let (own, base, there) = (self.address(), other.subnet().network(), other.address());
        let (mac, other_mac, subnet) = (text(self.mac()), text(other.mac()), other.subnet());
        let lines = [
            format!(
                "ip link add flannel.1 mtu {OVERLAY_MTU} address {mac} type vxlan id {VNI} dstport {PORT} local {own} dev eth0 nolearning"
            ),
            format!("ip address add {}/32 dev flannel.1", self.subnet().network()),
            "ip link set flannel.1 up".to_owned(),
            format!("ip neighbour replace {base} lladdr {other_mac} dev flannel.1 nud permanent"),
            format!("bridge fdb replace {other_mac} dev flannel.1 dst {there} self permanent"),
            format!("ip route replace {subnet} via {base} dev flannel.1 onlink"),
        ];
        self.netns.run(|| lines.iter().try_for_each(|line| run(line)))
    }

    /// A rule that asks for the state of connections, as masquerade and Services do: the kernel tracks them from now on.
    pub(crate) fn track(&self) -> anyhow::Result<()> {
        let mut table = Table::new(Family::Ip, "tracked");
        let rule = "ct state invalid counter drop".to_owned();
        table.chain("forward", Chain::base("filter", NftHook::Forward, 0, [rule]));
        self.netns.run(|| Ok(Nft::default().apply(&table.replace_script())?))
    }

    /// The same as the agent makes it.
    pub(crate) fn join_by_agent(&self, other: &Self, parts: Parts) -> anyhow::Result<()> {
        let netlink = Netlink::open_in(&self.netns)?;
        let device = self.device(&netlink)?;
        let peers = Peers::from([other.as_peer(parts.direct)]);
        program(&netlink, device, &peers)?;
        if !parts.rules {
            return Ok(());
        }
        let network = Network {
            config: NetworkConfig::new("10.244.0.0/16".parse()?, 24, VNI, PORT)?,
            own: SubnetKey { v4: Some(self.subnet()), v6: None },
            leases: Leases::new(),
            config_problem: None,
        };
        let me =
            Identity { public_ip: self.address(), vtep_mac: Mac(self.mac()), public_ipv6: None };
        let networks = Networks {
            cluster: "10.244.0.0/16".parse()?,
            service: orch_config::SERVICE_CIDR.parse()?,
            dns_ip: orch_config::DNS_IP.into(),
        };
        let tables = [
            closed::desired_table(&network, &me, &peers),
            Some(ruleset::desired_table(&[], &networks)),
        ];
        self.netns.run(|| -> anyhow::Result<()> {
            for table in tables.iter().flatten() {
                Nft::default().apply(&table.replace_script())?;
            }
            Ok(())
        })?;
        if parts.fast { self.make_fast(&netlink, network.config, parts.direct) } else { Ok(()) }
    }

    /// Sizes of packets as the agent sets them; those of the underlay as whoever makes one that bears them.
    pub(crate) fn enlarge(&self, underlay: &Underlay) -> anyhow::Result<()> {
        let port = format!("u{}", self.number);
        let mut all = vec![(&underlay.0, "br0"), (&underlay.0, port.as_str())];
        all.extend(["eth0", "cni0"].into_iter().chain(POD_LINKS).map(|link| (&self.netns, link)));
        all.extend(self.pods.iter().map(|pod| (&pod.netns, "eth0")));
        for (netns, name) in all {
            let netlink = Netlink::open_in(netns)?;
            let link = netlink.link(name)?.with_context(|| format!("there is no link {name}"))?;
            netlink.set_packet_sizes(link.index, LARGEST)?;
        }
        Ok(())
    }

    /// The programs of NetworkPolicy (no policy selects the pods), and the fast path.
    fn make_fast(
        &self,
        netlink: &Netlink,
        mut config: NetworkConfig,
        direct: bool,
    ) -> anyhow::Result<()> {
        config.mode = if direct { Mode::DirectRouting } else { Mode::Vxlan };
        let folder = Pins::below(&self.root);
        let mut pods = BTreeMap::new();
        for (pod, name) in self.pods.iter().zip(POD_LINKS) {
            let link = netlink.link(name)?.with_context(|| format!("there is no link {name}"))?;
            let inside = Netlink::open_in(&pod.netns)?.link("eth0")?.context("eth0")?;
            let endpoint = Endpoint {
                uid: link.index,
                addr: pod.ip.to_bits().to_be(),
                mac: inside.mac,
                state: state::READY,
                ..Endpoint::default()
            };
            pods.insert(link.index, (name, endpoint));
        }
        let (links, shaped) = fast_path::observe_links(netlink)?;
        let indexes = pods.keys().copied().collect();
        let wanted = fast_path::desired(&config, &links, &indexes, &shaped);
        self.netns.run(|| -> anyhow::Result<()> {
            let mut maps = install(&folder)?;
            maps.set_settings(Config::new(PORT, false))?;
            for (index, (name, endpoint)) in pods {
                maps.insert_endpoint(index, endpoint)?;
                for hook in [Hook::FromPod, Hook::ToPod] {
                    attach(&folder, name, index, hook)?;
                }
            }
            FastPath::default().ensure(&folder, &wanted)?;
            Ok(())
        })
    }

    /// This node as others see it.
    fn as_peer(&self, direct: bool) -> (IpNetwork, Peer) {
        let subnet = IpNetwork::V4(self.subnet());
        let path = if direct { Path::Direct } else { Path::Vxlan(Mac(self.mac())) };
        (subnet, Peer { subnet, public_ip: IpAddr::V4(self.address()), path })
    }

    /// Makes the agent's device; its index.
    pub(crate) fn device(&self, netlink: &Netlink) -> anyhow::Result<u32> {
        let device = netlink.create_vxlan(&VxlanDevice {
            name: "vxlan-orch".to_owned(),
            vni: VNI,
            port: PORT,
            local: Some(IpAddr::V4(self.address())),
            underlay_index: Some(netlink.link("eth0")?.context("eth0")?.index),
            mac: Some(self.mac()),
            mtu: Some(OVERLAY_MTU),
            learning: false,
        })?;
        let base = cidr(self.subnet().network(), 32)?;
        netlink.add_address(device.index, base, &AddressOptions::default())?;
        netlink.set_up(device.index)?;
        Ok(device.index)
    }
}

/// Makes the kernel hold these peers, as the agent does it: read, compare, write in one batch.
pub(crate) fn program(netlink: &Netlink, device: u32, peers: &Peers) -> anyhow::Result<()> {
    let underlay = netlink.link("eth0")?.context("eth0")?.index;
    let want = WantedPeers::new(peers, device, underlay);
    let steps = plan_peers(&observe_peers(netlink, device)?, &want);
    Ok(apply_peers(netlink, device, &steps)?)
}

fn text(mac: MacBytes) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn run(line: &str) -> anyhow::Result<()> {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .output()
        .with_context(|| format!("run `{line}`; is iproute2 installed?"))?;
    if !output.status.success() {
        bail!("`{line}`: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
