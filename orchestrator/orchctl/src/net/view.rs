//! What one node's kernel, files and processes show. Only reading happens here.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd as _;
use std::process::Command;

use super::status::NetStatus;
use anyhow::Context as _;
use cni_netlink::{FdbEntry, Link, LinkKind, Neighbour, Netlink, Route, RouteFilter, Vxlan};
use ipnetwork::{IpNetwork, Ipv4Network};

use super::hosts::Host;
use super::leases::{LeaseView, Leases};

/// Name of the bridge that pods hang on.
const BRIDGE: &str = orch_config::POD_BRIDGE;
/// Longest name of a link (`IFNAMSIZ` less the zero byte).
const LINK_NAME_BYTES: usize = 15;

/// One node as it is.
#[derive(Debug, Clone, Default)]
pub(super) struct View {
    /// Its name.
    pub(super) node: String,
    /// Its address on the underlay.
    pub(super) address: Option<Ipv4Addr>,
    /// PID of its agent.
    pub(super) agent: Option<i32>,
    /// What its agent says.
    pub(super) status: Option<NetStatus>,
    /// Name that its VXLAN device should have.
    pub(super) device_name: String,
    /// `FLANNEL_MTU` of `subnet.env`.
    pub(super) env_mtu: Option<u32>,
    /// `FLANNEL_SUBNET` of `subnet.env`.
    pub(super) env_subnet: Option<Ipv4Network>,
    /// All links.
    pub(super) links: Vec<Link>,
    /// Addresses by the index of their link.
    pub(super) addresses: Vec<(u32, IpNetwork)>,
    /// Routes of the main table.
    pub(super) routes: Vec<Route>,
    /// Neighbours on the VXLAN devices.
    pub(super) neighbours: Vec<Neighbour>,
    /// Their forwarding entries.
    pub(super) fdb: Vec<FdbEntry>,
    /// Kernel settings by their path below `/proc/sys/net`.
    pub(super) sysctls: BTreeMap<String, String>,
    /// Whether the VXLAN device hands checksums to the kernel's offload; `None` if it cannot be asked.
    pub(super) tx_checksum: Option<bool>,
    /// All rules of nftables, and so of `iptables-nft`, as nft's JSON.
    pub(super) nft: String,
    /// The filter table of the older iptables, where it has one, as `iptables-save` writes it.
    pub(super) iptables: String,
    /// How full conntrack's table is, where there is one.
    pub(super) conntrack: Option<cni_nftables::Usage>,
    /// Version of the kernel.
    pub(super) kernel: (u32, u32),
    /// What could not be read, and why.
    pub(super) unreadable: Vec<String>,
}

impl View {
    /// The node's own lease.
    pub(super) fn lease<'a>(&self, leases: &'a Leases) -> Option<&'a LeaseView> {
        let status = self.status.as_ref();
        let mac = status.and_then(|status| status.device.as_ref()).map(|one| one.vtep_mac.as_str());
        let subnet = status.and_then(|status| status.subnet.as_ref()?.parse().ok());
        leases.of(self.address, mac, subnet)
    }

    /// Whether the kernel tracks as many connections as it may, or just forgot one: new ones are dropped.
    pub(super) fn is_conntrack_full(&self) -> bool {
        self.conntrack.is_some_and(|usage| usage.is_taken(99))
    }

    /// A link by its name.
    pub(super) fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Name of a link.
    pub(super) fn name_of(&self, index: Option<u32>) -> &str {
        let found = index.and_then(|index| self.links.iter().find(|link| link.index == index));
        found.map_or("?", |link| link.name.as_str())
    }

    /// The VXLAN device.
    pub(super) fn device(&self) -> Option<&Link> {
        self.link(&self.device_name)
    }

    /// What the VXLAN device is made of.
    pub(super) fn vxlan(&self) -> Option<&Vxlan> {
        self.vxlan_of(true)
    }

    /// Name that the VXLAN device of a family should have.
    pub(super) fn device_name_of(&self, ipv4: bool) -> String {
        if ipv4 {
            return self.device_name.clone();
        }
        let name: String = self.device_name.chars().take(LINK_NAME_BYTES - 3).collect();
        format!("{name}-v6")
    }

    /// The VXLAN device of a family.
    pub(super) fn device_of(&self, ipv4: bool) -> Option<&Link> {
        self.link(&self.device_name_of(ipv4))
    }

    /// What the VXLAN device of a family is made of.
    pub(super) fn vxlan_of(&self, ipv4: bool) -> Option<&Vxlan> {
        match &self.device_of(ipv4)?.kind {
            LinkKind::Vxlan(vxlan) => Some(vxlan),
            _ => None,
        }
    }

    /// The node's address of a family on the underlay.
    pub(super) fn address_of(&self, ipv4: bool) -> Option<IpAddr> {
        if ipv4 {
            return self.address.map(IpAddr::V4);
        }
        self.vxlan_of(false).and_then(|vxlan| vxlan.local)
    }

    /// The bridge of the pods.
    pub(super) fn bridge(&self) -> Option<&Link> {
        self.link(BRIDGE)
    }

    /// The link that has the node's address.
    pub(super) fn underlay(&self) -> Option<&Link> {
        let address = IpAddr::V4(self.address?);
        let (index, _) = self.addresses.iter().find(|(_, found)| found.ip() == address)?;
        self.links.iter().find(|link| link.index == *index)
    }

    /// Route that the kernel takes to an address: the longest prefix, then the lowest metric.
    pub(super) fn route_to(&self, ip: impl Into<IpAddr>) -> Option<&Route> {
        let ip = ip.into();
        let fits = |route: &&Route| route.dst.contains(ip);
        self.routes
            .iter()
            .filter(fits)
            .max_by_key(|route| (route.dst.prefix(), std::cmp::Reverse(route.metric.unwrap_or(0))))
    }
}

/// Looks at a node. What cannot be read is noted and leaves its part empty.
///
/// # Errors
/// Its namespace cannot be entered.
pub(super) fn observe(host: &Host) -> anyhow::Result<View> {
    let status = NetStatus::read(&host.paths.net_status());
    let env = std::fs::read_to_string(host.paths.subnet_env()).unwrap_or_default();
    let env = |name: &str| {
        env.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=').map(str::to_owned))
    };
    let device_name = status
        .as_ref()
        .and_then(|status| status.device.as_ref())
        .map_or_else(|| orch_config::VXLAN_DEVICE.to_owned(), |device| device.name.clone());
    let mut view = View {
        node: host.name.clone(),
        address: host
            .address
            .or_else(|| status.as_ref().and_then(|status| status.node_ip.parse().ok())),
        agent: host.agent,
        status,
        device_name,
        env_mtu: env("FLANNEL_MTU").and_then(|text| text.parse().ok()),
        env_subnet: env("FLANNEL_SUBNET").and_then(|text| text.parse().ok()),
        kernel: kernel_version(),
        ..View::default()
    };
    let netns = host.open()?;
    netns.run(|| -> anyhow::Result<()> {
        look_inside(&mut view).with_context(|| format!("look into {}", host.name))
    })?;
    Ok(view)
}

/// In the node's namespace, on a thread of its own.
fn look_inside(view: &mut View) -> anyhow::Result<()> {
    let netlink = Netlink::open()?;
    view.links = netlink.links()?;
    for link in &view.links {
        let found = netlink.addresses(link.index)?;
        view.addresses.extend(found.into_iter().map(|address| (link.index, address)));
    }
    view.routes = netlink.routes(&RouteFilter::default())?;
    for device in [true, false].map(|ipv4| view.device_of(ipv4).map(|link| link.index)) {
        let Some(device) = device else { continue };
        view.neighbours.extend(netlink.neighbours(device)?);
        view.fdb.extend(netlink.fdb(device)?);
    }
    if view.device().is_some() {
        view.tx_checksum = tx_checksum(&view.device_name);
    }
    let mut keys = vec![
        "ipv4/ip_forward".to_owned(),
        "ipv4/conf/all/rp_filter".to_owned(),
        "ipv6/conf/all/forwarding".to_owned(),
    ];
    let underlay = view.underlay().map(|link| link.name.clone());
    for link in [Some(view.device_name.clone()), underlay, Some(BRIDGE.to_owned())] {
        for setting in ["rp_filter", "forwarding"] {
            keys.extend(link.as_ref().map(|link| format!("ipv4/conf/{link}/{setting}")));
        }
    }
    for key in keys {
        // `/proc/sys/net` is that of the thread's namespace; a link that is missing has no settings.
        if let Ok(value) = std::fs::read_to_string(format!("/proc/sys/net/{key}")) {
            view.sysctls.insert(key, value.trim().to_owned());
        }
    }
    view.conntrack = cni_nftables::Usage::observe();
    match nft_ruleset() {
        Ok(ruleset) => view.nft = ruleset,
        Err(error) => view.unreadable.push(format!("the firewall's rules: {error:#}")),
    }
    // Asking creates the tables in the kernel, so it is done only where they are.
    let legacy = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names");
    if legacy.is_ok_and(|names| names.lines().any(|name| name == "filter"))
        && let Ok(output) = Command::new("iptables-legacy-save").args(["-t", "filter"]).output()
    {
        view.iptables = String::from_utf8_lossy(&output.stdout).into_owned();
    }
    Ok(())
}

fn nft_ruleset() -> anyhow::Result<String> {
    let output = Command::new("nft")
        .args(["-j", "list", "ruleset"])
        .output()
        .context("run nft; is the package nftables installed?")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::bail!("nft list ruleset: {}", said.lines().next().unwrap_or("failed"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `ETHTOOL_GTXCSUM` (`linux/ethtool.h`).
const ETHTOOL_GET_TX_CHECKSUM: u32 = 0x16;

/// Whether a link computes checksums late (or in hardware), as ethtool asks it.
fn tx_checksum(link: &str) -> Option<bool> {
    #[repr(C)]
    struct EthtoolValue {
        cmd: u32,
        data: u32,
    }
    let name = CString::new(link).ok()?;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    let mut value = EthtoolValue { cmd: ETHTOOL_GET_TX_CHECKSUM, data: 0 };
    // SAFETY: all-zero bytes are a valid `ifreq`, which is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()).take(libc::IFNAMSIZ - 1) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request points to `value`, which outlives the call and has the layout of `struct ethtool_value`.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    (done == 0).then_some(value.data != 0)
}

fn kernel_version() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|part| part.trim().parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
