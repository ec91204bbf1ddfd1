//! Nodes to measure in: two pods on one bridge, and something that judges what they send, or nothing. All vanishes with
//! the process.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;
use std::sync::Arc;

use anyhow::{Context as _, anyhow, ensure};
use cni_netlink::{AddressOptions, Bridge, MacBytes, NetNs, Netlink, Route, VethPair};
use cni_nftables::Nft;
use ipnetwork::{IpNetwork, Ipv4Network};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use orch_config::Paths;
use orch_ebpf_loader::{Announcement, Hook, Kept, Maps, Pins, PodRef, attach, install};
use orch_ebpf_maps::{Endpoint, Reason, state};
use orch_netagent::fast_path::{self, FastPath};
use orch_netagent::network::NetworkConfig;
use orch_netagent::policy::engine::Engine;
use orch_netagent::policy::world::{Cluster, Local, Reader};
use orch_netagent::policy::{PLUGIN, state_dir};
use orch_netagent::services::ruleset::{self, Networks};
use tempfile::TempDir;

use crate::load::Way;
use crate::objects;
use crate::programs::{End, packets};

/// The pods of a node: the one that opens connections, and the one that serves.
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 3);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
/// As on a node whose underlay is Ethernet.
const MTU: u32 = 1450;

/// What judges a node's pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Judge {
    Nobody,
    /// The programs, with so many rules in each direction.
    Programs(usize),
    /// Nobody, on a node with the rules for Services, which bridged packets meet (`br_netfilter`), as the agent sets it.
    Rules,
    /// The programs and the fast path beside these rules: what a node has unless it is told otherwise.
    Fast(usize),
    /// One nftables set of so many addresses with ports.
    Set(usize),
    /// So many nftables rules, one after the other.
    Linear(usize),
}

/// A namespace, alive as long as this value.
pub(crate) fn new_netns() -> anyhow::Result<NetNs> {
    let made = std::thread::spawn(|| -> anyhow::Result<NetNs> {
        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace: is this root?")?;
        up(&Netlink::open()?, "lo")?;
        Ok(NetNs::current()?)
    });
    made.join().map_err(|_| anyhow!("the thread that makes namespaces panicked"))?
}

/// From here on what this process mounts is seen by nobody else. Before threads are started.
pub(crate) fn leave_mounts() -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace: is this root?")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("private mounts")
}

fn up(netlink: &Netlink, name: &str) -> anyhow::Result<u32> {
    let link = netlink.link(name)?.with_context(|| format!("there is no link {name}"))?;
    netlink.set_up(link.index)?;
    Ok(link.index)
}

fn cidr(ip: Ipv4Addr, prefix: u8) -> anyhow::Result<IpNetwork> {
    Ok(IpNetwork::V4(Ipv4Network::new(ip, prefix)?))
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

/// A node with a bridge.
pub(crate) struct Node {
    pub(crate) netns: NetNs,
    bridge: u32,
}

impl Node {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let netns = new_netns()?;
        set(&netns, "ipv4/ip_forward", "1")?;
        set(&netns, "bridge/bridge-nf-call-iptables", "0")?;
        let netlink = Netlink::open_in(&netns)?;
        let bridge = netlink.create_bridge(&Bridge {
            name: "cni0".to_owned(),
            mtu: Some(MTU),
            up: true,
            ..Bridge::default()
        })?;
        netlink.add_address(bridge.index, cidr(GATEWAY, 24)?, &AddressOptions::default())?;
        Ok(Self { netns, bridge: bridge.index })
    }

    /// A pod on the bridge, or on a link of its own where the node routes to it.
    pub(crate) fn pod(&self, ip: Ipv4Addr, bridged: bool) -> anyhow::Result<Pod> {
        let netns = new_netns()?;
        let node = Netlink::open_in(&self.netns)?;
        let last = ip.octets()[3];
        let (name, mac) = (format!("veth{last}"), [2, 0, 0, 0, 0, last]);
        let link = node.create_veth(&VethPair {
            name: name.clone(),
            peer_name: "eth0".to_owned(),
            peer_netns: Some(netns.as_fd()),
            master: bridged.then_some(self.bridge),
            mtu: Some(MTU),
            peer_mac: Some(mac),
            up: true,
            ..VethPair::default()
        })?;
        let inside = Netlink::open_in(&netns)?;
        let eth0 = up(&inside, "eth0")?;
        inside.add_address(eth0, cidr(ip, 24)?, &AddressOptions::default())?;
        let [a, b, c, _] = ip.octets();
        let gateway = Ipv4Addr::new(a, b, c, 1);
        if !bridged {
            node.add_address(link.index, cidr(gateway, 24)?, &AddressOptions::default())?;
        }
        inside.add_route(&Route {
            via: Some(IpAddr::V4(gateway)),
            link: Some(eth0),
            ..Route::default()
        })?;
        Ok(Pod { netns, link: link.index, name, mac, ip })
    }

    /// Ports of the bridge without anything behind them, for pods that send nothing; their indexes.
    pub(crate) fn ports(&self, count: usize) -> anyhow::Result<Vec<u32>> {
        let netlink = Netlink::open_in(&self.netns)?;
        (0..count)
            .map(|place| {
                let pair = VethPair {
                    name: format!("quiet{place}"),
                    peer_name: format!("void{place}"),
                    master: Some(self.bridge),
                    ..VethPair::default()
                };
                let link = netlink.create_veth(&pair)?;
                // The agent takes a link that is no port for a way out.
                let peer = netlink.link(&pair.peer_name)?.context("the peer")?;
                netlink.set_master(peer.index, Some(self.bridge))?;
                Ok(link.index)
            })
            .collect()
    }
}

/// A pod.
pub(crate) struct Pod {
    pub(crate) netns: NetNs,
    link: u32,
    name: String,
    mac: MacBytes,
    ip: Ipv4Addr,
}

/// A node's files in a folder of their own, with what the agent looks for.
pub(crate) struct Files {
    _folder: TempDir,
    pub(crate) paths: Paths,
    pub(crate) pins: Pins,
}

impl Files {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let paths = Paths::new(folder.path());
        std::fs::create_dir_all(paths.cni_bin_dir())?;
        // Only whether it is there counts: no runtime calls it here.
        std::fs::write(paths.cni_bin_dir().join(PLUGIN), "")?;
        Ok(Self { pins: Pins::below(folder.path()), paths, _folder: folder })
    }

    /// Makes an endpoint as the plugin does.
    pub(crate) fn plug(
        &self,
        maps: &mut Maps,
        name: &str,
        ifindex: u32,
        ip: Ipv4Addr,
        mac: MacBytes,
    ) -> anyhow::Result<Announcement> {
        let row = Endpoint {
            uid: ifindex,
            addr: ip.to_bits().to_be(),
            mac,
            state: state::PENDING,
            ..Endpoint::default()
        };
        let pod = PodRef { namespace: objects::namespace(0), name: name.to_owned(), uid: None };
        let made = Announcement { ifindex, uid: row.uid, addr: ip, addr6: None, pod: Some(pod) };
        Kept::of(&state_dir(&self.paths), "orch").write(name, "eth0", &made)?;
        maps.insert_endpoint(ifindex, row)?;
        Ok(made)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // Goes with the mount namespace at the latest; the folder can be removed only without it.
        let _ = nix::mount::umount(&self.paths.root().join("sys/fs/bpf"));
    }
}

/// A node with two pods and a judge.
pub(crate) struct Site {
    node: Node,
    client: Pod,
    server: Pod,
    files: Option<Files>,
}

impl Site {
    pub(crate) fn new(judge: Judge) -> anyhow::Result<Self> {
        let node = Node::new()?;
        let (client, server) = (node.pod(CLIENT, true)?, node.pod(SERVER, true)?);
        let mut site = Self { node, client, server, files: None };
        match judge {
            Judge::Nobody => {}
            Judge::Programs(rules) => site.enforce(rules)?,
            Judge::Rules => site.make_rules()?,
            Judge::Fast(rules) => {
                site.make_rules()?;
                site.enforce(rules)?;
                site.make_fast()?;
            }
            Judge::Set(rules) => site.filter(&objects::set_script(rules))?,
            Judge::Linear(rules) => site.filter(&objects::linear_script(rules))?,
        }
        Ok(site)
    }

    pub(crate) fn way(&self) -> Way<'_> {
        Way { from: &self.client.netns, to: &self.server.netns, address: IpAddr::V4(SERVER) }
    }

    /// nftables sees what a bridge forwards through `br_netfilter`.
    fn filter(&self, script: &str) -> anyhow::Result<()> {
        let netns = &self.node.netns;
        set(netns, "bridge/bridge-nf-call-iptables", "1")?;
        netns.run(|| Ok(Nft::default().apply(script)?))
    }

    /// As plugin and agent do it.
    fn enforce(&mut self, rules: usize) -> anyhow::Result<()> {
        let files = Files::new()?;
        let mut maps = install(&files.pins)?;
        let mut local = Local {
            node: "node0".to_owned(),
            pod_network: Some("10.244.0.0/16".parse()?),
            ..Local::default()
        };
        let mut cluster = Cluster {
            namespaces: vec![Arc::new(serde_json::from_value(objects::namespace_object(0))?)],
            ..Cluster::default()
        };
        for (name, pod) in [("client", &self.client), ("server", &self.server)] {
            let made = files.plug(&mut maps, name, pod.link, pod.ip, pod.mac)?;
            local.endpoints.push(made);
            let object = objects::pod(name, "node0", pod.ip, &[("app", name)]);
            cluster.pods.push(Arc::new(serde_json::from_value(object)?));
            self.node.netns.run(|| -> anyhow::Result<()> {
                attach(&files.pins, &pod.name, pod.link, Hook::FromPod)?;
                attach(&files.pins, &pod.name, pod.link, Hook::ToPod)?;
                Ok(())
            })?;
        }
        for object in objects::many_rules(rules) {
            cluster.policies.push(Arc::new(serde_json::from_value(object)?));
        }
        let mut reader = Reader::default();
        reader.read(&cluster, &local);
        let report = Engine::new(maps)?.look(&reader, true, &local.endpoints)?;
        ensure!(report.locked.is_empty(), "the rules do not fit: {:?}", report.locked);
        self.files = Some(files);
        Ok(())
    }

    fn make_rules(&self) -> anyhow::Result<()> {
        let networks = Networks {
            cluster: "10.244.0.0/16".parse()?,
            service: orch_config::SERVICE_CIDR.parse()?,
            dns_ip: orch_config::DNS_IP.into(),
        };
        self.filter(&ruleset::desired_table(&[], &networks).replace_script())
    }

    /// As the agent does it.
    fn make_fast(&self) -> anyhow::Result<()> {
        let pins = &self.files.as_ref().context("no programs")?.pins;
        let config = NetworkConfig::new(
            "10.244.0.0/16".parse()?,
            24,
            orch_config::VXLAN_VNI,
            orch_config::VXLAN_PORT,
        )?;
        let (links, shaped) = fast_path::observe_links(&Netlink::open_in(&self.node.netns)?)?;
        let pods = BTreeSet::from([self.client.link, self.server.link]);
        let wanted = fast_path::desired(&config, &links, &pods, &shaped);
        self.node.netns.run(|| Ok(FastPath::default().ensure(pins, &wanted).map(drop)?))
    }

    /// Nanoseconds that the programs take for each packet of a connection; nothing where there are none.
    pub(crate) fn packets(&self) -> anyhow::Result<Vec<(&'static str, f64)>> {
        let Some(files) = &self.files else { return Ok(Vec::new()) };
        let end = |pod: &Pod| End { link: pod.link, mac: pod.mac, ip: pod.ip };
        packets(&files.pins, &self.node.netns, end(&self.client), end(&self.server))
    }

    /// Whether the judge has judged: packets went through the programs' tables.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let Some(files) = &self.files else { return Ok(()) };
        let counters = Maps::open(&files.pins)?.counters()?;
        for wanted in [Reason::Allowed, Reason::Established] {
            let seen = counters.iter().filter(|(_, reason, _)| *reason == wanted);
            ensure!(seen.count() == 2, "not judged in both directions: {counters:?}");
        }
        Ok(())
    }
}
