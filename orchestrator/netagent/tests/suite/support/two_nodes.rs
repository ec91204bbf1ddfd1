//! Two nodes with two pods each, made by hand, whose pods' policies are enforced and select none of them: what the fast path
//! is tried on. Needs root.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cni_netlink::Netlink;
use cni_nftables::Nft;
use ipnetwork::Ipv6Network;
use orch_ebpf_loader::{ClassMap, Hook, Maps, Pins, RuleTable, attach, install};
use orch_ebpf_maps::{
    ADDRESS_SERVICE, ClassKey, Config, Endpoint, ISOLATED_EGRESS, ISOLATED_INGRESS, state,
};
use orch_netagent::fast_path::{self, FastPath, Wanted};
use orch_netagent::network::{Ipv6Config, NetworkConfig};
use orch_netagent::sysctl;
use tempfile::TempDir;

use super::netns::{Netns, run};
use super::overlay::{Pod, join};
use super::stream::Streams;

/// The host parts of the pods' addresses, and in the names of their links.
const PODS: [u8; 2] = [2, 3];

/// What the pod network has, and how nodes reach each other.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub v4: bool,
    pub v6: bool,
    pub is_direct: bool,
}

impl Shape {
    pub const IPV4: Self = Self { v4: true, v6: false, is_direct: false };
    pub const IPV6: Self = Self { v4: false, v6: true, is_direct: false };
    pub const DUAL: Self = Self { v4: true, v6: true, is_direct: false };
    pub const DUAL_DIRECT: Self = Self { is_direct: true, ..Self::DUAL };

    /// As the overlay has it: the shorter of both.
    pub fn mtu(self) -> u32 {
        if self.v6 { 1430 } else { 1450 }
    }

    fn network(self) -> NetworkConfig {
        let network = "10.244.0.0/16".parse().expect("CIDR");
        let mut config = NetworkConfig::new(network, 24, 1, 8472).expect("valid");
        if !self.v4 {
            config.v4 = None;
        }
        config.v6 = self.v6.then(|| Ipv6Config {
            network: "fd00:10:244::/48".parse().expect("CIDR"),
            subnet_len: 64,
            subnet_min: "fd00:10:244:1::".parse().expect("an address"),
            subnet_max: "fd00:10:244:ffff::".parse().expect("an address"),
        });
        config
    }
}

pub struct Host {
    pub netns: Netns,
    pub pods: Vec<Pod>,
    /// The pods' IPv6 addresses, where there are.
    pub ips6: Vec<Ipv6Addr>,
    folder: TempDir,
    shape: Shape,
}

pub struct World {
    pub underlay: Netns,
    pub hosts: [Host; 2],
}

impl Drop for Host {
    fn drop(&mut self) {
        // Whoever copied the mounts just then keeps it busy.
        let folder = self.folder.path().join("sys/fs/bpf");
        let _ = nix::mount::umount2(&folder, nix::mount::MntFlags::MNT_DETACH);
    }
}

impl Host {
    fn new(underlay: &Netns, number: u8, shape: Shape) -> Self {
        let netns = Netns::new("node");
        join(underlay, &netns, number);
        let mut host = Self {
            netns,
            pods: Vec::new(),
            ips6: Vec::new(),
            folder: tempfile::tempdir().expect("a folder"),
            shape,
        };
        let mut links = vec!["eth0"];
        if shape.v4 {
            let name = "vxlan-orch";
            host.reach_other(name, number, ["192.0.2.", "10.244.", ".0/32", ".0/24"]);
            links.push(name);
        }
        if shape.v6 {
            let name = "vxlan-orch-v6";
            host.netns.ip(&format!("address add 2001:db8::{number}/64 dev eth0 nodad"));
            host.reach_other(name, number, ["2001:db8::", "fd00:10:244:", "::/128", "::/64"]);
            links.push(name);
        }
        host.attach_pods(number);
        let sysctls = links.clone();
        let report =
            host.netns.within(move || sysctl::ensure(&sysctls, shape.v6.then_some("eth0")));
        assert!(report.errors.is_empty(), "{:?}", report.errors);
        host.nft(
            "table inet seen {
                counter packets-seen { }
                chain forward {
                    type filter hook forward priority -200;
                    meta l4proto { tcp, udp } counter name packets-seen
                }
            }
",
        );
        host.enforce(&links);
        host
    }

    /// The device of one family, and the other node's subnet behind it or behind its address.
    fn reach_other(&self, device: &str, number: u8, [node, pods, base, subnet]: [&str; 4]) {
        let (netns, other, mtu) = (&self.netns, 3 - number, self.shape.mtu());
        let family = if node.contains(':') { 6 } else { 4 };
        let mac = |number: u8| format!("02:00:00:00:0{family}:0{number}");
        netns.ip(&format!(
            "link add {device} mtu {mtu} address {} type vxlan id 1 dstport 8472 local {node}{number} dev eth0 nolearning",
            mac(number)
        ));
        netns.ip(&format!("address add {pods}{number}{base} dev {device} nodad"));
        netns.ip(&format!("link set {device} up"));
        if self.shape.is_direct {
            netns.ip(&format!("route add {pods}{other}{subnet} via {node}{other} dev eth0 onlink"));
            return;
        }
        let gateway = format!("{pods}{other}{}", base.split('/').next().expect("a base"));
        netns.ip(&format!(
            "neighbour add {gateway} lladdr {} dev {device} nud permanent",
            mac(other)
        ));
        netns.bridge(&format!(
            "fdb add {} dev {device} dst {node}{other} self permanent",
            mac(other)
        ));
        netns.ip(&format!("route add {pods}{other}{subnet} via {gateway} dev {device} onlink"));
    }

    fn attach_pods(&mut self, number: u8) {
        let (netns, mtu) = (&self.netns, self.shape.mtu());
        let subnet6: Ipv6Network = format!("fd00:10:244:{number}::/64").parse().expect("CIDR");
        for last in PODS {
            if self.shape.v4 {
                let subnet = format!("10.244.{number}.0/24").parse().expect("CIDR");
                let pod = Pod::attach(netns, subnet, mtu, last);
                if self.shape.v6 {
                    self.ips6.push(pod.add_ipv6(netns, subnet6, last));
                }
                self.pods.push(pod);
            } else {
                let (pod, ip) = Pod::attach_ipv6(netns, subnet6, mtu, last);
                self.ips6.push(ip);
                self.pods.push(Pod { netns: pod, ip: Ipv4Addr::UNSPECIFIED });
            }
        }
    }

    pub fn pins(&self) -> Pins {
        Pins::below(self.folder.path())
    }

    fn maps(&self) -> Maps {
        Maps::open(&self.pins()).expect("pinned")
    }

    /// As plugin and agent do it, with no policy that selects the pods.
    fn enforce(&self, wires: &[&str]) {
        let pins = self.pins();
        let ips6 = self.ips6.iter().copied().map(Some).chain(std::iter::repeat(None));
        let rows: Vec<(String, Endpoint)> = self
            .pods
            .iter()
            .zip(ips6)
            .zip(PODS)
            .map(|((pod, ip6), last)| {
                let mac = pod.netns.within(|| {
                    let netlink = Netlink::open().expect("a socket");
                    netlink.link("eth0").expect("asked").expect("there").mac
                });
                let row = Endpoint {
                    uid: last.into(),
                    addr: pod.ip.to_bits().to_be(),
                    addr6: ip6.map_or([0; 16], |ip| ip.octets()),
                    mac,
                    state: state::READY,
                    ..Endpoint::default()
                };
                (format!("veth{last}"), row)
            })
            .collect();
        let wires: Vec<String> = wires.iter().map(|name| (*name).to_owned()).collect();
        self.netns.within(move || {
            let mut maps = install(&pins).expect("installed");
            let services6: Ipv6Addr = "fd00:10:96::".parse().expect("an address");
            for services in
                [ClassKey::new(Ipv4Addr::new(10, 96, 0, 0), 12), ClassKey::new(services6, 112)]
            {
                maps.put_address(services, ADDRESS_SERVICE).expect("put");
            }
            maps.set_settings(Config::new(8472, false)).expect("set");
            let index = |name: &str| nix::net::if_::if_nametoindex(name).expect("made");
            for (name, row) in rows {
                maps.insert_endpoint(index(&name), row).expect("inserted");
                for hook in [Hook::FromPod, Hook::ToPod] {
                    attach(&pins, &name, index(&name), hook).expect("attached");
                }
            }
            for name in wires {
                attach(&pins, &name, index(&name), Hook::ToWire).expect("attached");
            }
        });
    }

    pub fn wanted(&self) -> Wanted {
        let config = self.shape.network();
        let pods = self.maps().endpoints().expect("read").into_iter().map(|(index, _)| index);
        let pods = pods.collect();
        self.netns.within(move || {
            let netlink = Netlink::open().expect("a socket");
            let (links, shaped) = fast_path::observe_links(&netlink).expect("asked");
            fast_path::desired(&config, &links, &pods, &shaped)
        })
    }

    /// Makes it so; how many steps that took.
    pub fn ensure(&self, want: Wanted) -> usize {
        let pins = self.pins();
        self.netns.within(move || FastPath::default().ensure(&pins, &want).expect("made"))
    }

    pub fn nft(&self, script: &str) {
        let script = script.to_owned();
        self.netns.within(move || Nft::default().apply(&script).expect("nft"));
    }

    /// Packets of TCP and UDP that the node has forwarded the long way.
    pub fn forwarded(&self) -> u64 {
        let text = run(
            "ip",
            &format!("netns exec {} nft list counter inet seen packets-seen", self.netns.name),
        );
        let packets = text.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
        packets.and_then(|count| count.parse().ok()).expect(&text)
    }

    /// Closes a pod from now on, both ways: what it sends on its own is a flow of its own.
    pub fn isolate(&self, pod: usize) {
        let link = format!("veth{}", PODS[pod]);
        let index = self.netns.within(move || nix::net::if_::if_nametoindex(link.as_str()));
        let index = index.expect("made");
        let mut maps = self.maps();
        let rows: BTreeMap<_, _> = maps.endpoints().expect("read").into_iter().collect();
        let classes = ClassMap::build(std::iter::empty()).expect("built");
        let rules = RuleTable::build(std::iter::empty()).expect("built");
        maps.put_class_map(7, &classes).expect("put");
        maps.put_table(7, &rules).expect("put");
        let flags = ISOLATED_INGRESS | ISOLATED_EGRESS;
        let closed = Endpoint { flags, generation: 7, class_map: 7, table: 7, ..rows[&index] };
        maps.update_endpoint(index, closed).expect("written");
    }

    /// Address of a pod, in the family that is asked for.
    pub fn ip(&self, pod: usize, v6: bool) -> IpAddr {
        if v6 { self.ips6[pod].into() } else { self.pods[pod].ip.into() }
    }
}

impl World {
    /// `None` without root.
    pub fn new(shape: Shape) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("ignored: needs root");
            return None;
        }
        let underlay = Netns::new("underlay");
        underlay.ip("link add br0 type bridge");
        underlay.ip("link set br0 up");
        underlay.within(|| {
            for tables in ["iptables", "ip6tables"] {
                let file = format!("/proc/sys/net/bridge/bridge-nf-call-{tables}");
                let _ = std::fs::write(file, "0");
            }
        });
        let hosts = [1, 2].map(|number| Host::new(&underlay, number, shape));
        Some(Self { underlay, hosts })
    }

    pub fn switch_on(&self) {
        for host in &self.hosts {
            assert!(host.ensure(host.wanted()) > 0);
        }
    }

    /// Packets that both nodes forward the long way while the streams get this many answers each.
    pub fn forwarded_during(&self, streams: &Streams, answers: u32) -> u64 {
        let count = || self.hosts.iter().map(Host::forwarded).sum::<u64>();
        let before = count();
        for _ in 0..answers / 3 {
            streams.go_on();
        }
        count() - before
    }
}
