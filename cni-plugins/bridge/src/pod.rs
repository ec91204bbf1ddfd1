//! The pod's side: its interface, addresses and routes.

use std::net::{IpAddr, Ipv6Addr};

use cni_netlink::{
    AddressOptions, Change, Link, LinkKind, MacBytes, NetNs, Netlink, Route, RouteFilter,
};
use cni_spec::{AddResult, IfName};
use ipnetwork::IpNetwork;

use crate::conf::Settings;
use crate::kernel::{KernelError, write_sysctl};
use crate::plan::pod_routes;
use crate::settle;

/// The pod's interface, and a socket in its namespace.
pub(crate) struct Pod {
    pub(crate) link: Link,
    netlink: Netlink,
}

impl Pod {
    /// The far end of a pair that was made just now with this MAC.
    pub(crate) fn new(
        netlink: Netlink,
        ifname: &IfName,
        port: &Link,
        mac: MacBytes,
    ) -> Result<Self, KernelError> {
        let vanished = || KernelError::Vanished(ifname.to_string());
        let link = Link {
            index: port.peer.ok_or_else(vanished)?,
            name: ifname.to_string(),
            mac,
            up: false,
            master: None,
            peer: Some(port.index),
            group: 0,
            port: None,
            ..port.clone()
        };
        Ok(Self { link, netlink })
    }

    /// Gives the interface what IPAM gave, and its MAC, and switches it on.
    pub(crate) fn set_up(
        mut self,
        netns: &NetNs,
        settings: &Settings,
        lease: &AddResult,
        mac: MacBytes,
    ) -> Result<Self, KernelError> {
        let mut changes = Vec::new();
        if mac != self.link.mac {
            changes.push(Change::SetMac { link: self.link.index, mac });
            self.link.mac = mac;
        }
        changes.extend(plan(self.link.index, settings, lease));
        if !lease.ips.iter().any(|ip| ip.address.is_ipv6()) {
            self.apply(&changes)?;
            self.link.up = true;
            return Ok(self);
        }
        // These switches of IPv6 are below `/proc` only, where everybody sees the namespace he is in.
        netns.run(|| {
            let switch = |key: &str| format!("net/ipv6/conf/{}/{key}", self.link.name);
            write_sysctl(&switch("disable_ipv6"), "0")?;
            if !settings.detect_duplicates {
                // For the link-local address, which the kernel adds; ours says it itself.
                write_sysctl(&switch("accept_dad"), "0")?;
            }
            self.apply(&changes)?;
            write_sysctl(&switch("ndisc_notify"), "1")?;
            self.link.up = true;
            Ok(self)
        })
    }

    fn apply(&self, changes: &[Change]) -> Result<(), KernelError> {
        for refused in self.netlink.apply(changes)? {
            // Several routes to one place are several ways to it.
            let route = matches!(changes.get(refused.index), Some(Change::AppendRoute(_)));
            if !(route && refused.error.is_exists()) {
                return Err(refused.error.into());
            }
        }
        Ok(())
    }

    /// Waits until neighbours find its IPv6 addresses.
    pub(crate) fn settle(
        &self,
        netns: &NetNs,
        settings: &Settings,
        ips: &[IpAddr],
    ) -> Result<(), KernelError> {
        let v6 = |ip: &IpAddr| match ip {
            IpAddr::V6(ip) => Some(*ip),
            IpAddr::V4(_) => None,
        };
        let ips: Vec<Ipv6Addr> = ips.iter().filter_map(v6).collect();
        if ips.is_empty() {
            return Ok(());
        }
        let name = self.link.name.as_str();
        netns.run(|| settle::wait(name, &ips, settings.detect_duplicates))
    }

    /// Tells the neighbours where the pod's addresses are now: who knew one of them as another pod's would send to a
    /// dead MAC for as long as it believes in it. Mostly nobody can know another one (`mac.rs`). A MAC that is set, to what it is, makes the kernel do so. When the
    /// interface went up would have been too early, since the bridge may not have passed frames of the port yet, and
    /// both are one too many: each goes to every pod of the bridge. A packet socket of our own would do as well, but
    /// closing one takes the kernel some ten milliseconds.
    pub(crate) fn announce(&self) -> Result<(), KernelError> {
        Ok(self.netlink.set_mac(self.link.index, self.link.mac)?)
    }
}

/// Pure. In the order the kernel wants: routes need a link that is up; an announcement is not to be made when it goes up,
/// and is to be made when a later plugin, or the pod itself, sets another MAC.
fn plan(link: u32, settings: &Settings, lease: &AddResult) -> Vec<Change> {
    let options =
        AddressOptions { nodad: !settings.detect_duplicates, ..AddressOptions::default() };
    let address = |address| Change::AddAddress { link, address, options: options.clone() };
    let mut changes: Vec<Change> = lease.ips.iter().map(|ip| address(ip.address)).collect();
    changes.push(Change::SetUp { link });
    changes.extend(pod_routes(lease, link).into_iter().map(Change::AppendRoute));
    if lease.ips.iter().any(|ip| ip.address.is_ipv4()) {
        changes.push(Change::SetArpNotify { link });
    }
    changes
}

/// What the pod has under this name.
#[derive(Debug)]
pub(crate) struct SeenPod {
    pub(crate) link: Link,
    pub(crate) addresses: Vec<IpNetwork>,
    /// Of all tables that are asked for.
    pub(crate) routes: Vec<Route>,
}

/// Reads it; `None` if there is no such link.
pub(crate) fn observe(
    netns: &NetNs,
    ifname: &IfName,
    tables: &[Option<u32>],
) -> Result<Option<SeenPod>, KernelError> {
    let netlink = Netlink::open_in(netns)?;
    let Some(link) = netlink.link(ifname.as_str())? else { return Ok(None) };
    let addresses = netlink.addresses(link.index)?;
    let mut routes = Vec::new();
    for table in tables {
        let filter =
            RouteFilter { link: Some(link.index), table: *table, ..RouteFilter::default() };
        routes.extend(netlink.routes(&filter)?);
    }
    Ok(Some(SeenPod { link, addresses, routes }))
}

/// Removes the pod's interface from its own side, for one whose host end has another name than ours: made by the
/// reference plugin, before we came. Returns whether there was one.
pub(crate) fn remove(netns: &NetNs, ifname: &IfName) -> Result<bool, KernelError> {
    let netlink = Netlink::open_in(netns)?;
    match netlink.link(ifname.as_str())? {
        Some(link) if link.kind == LinkKind::Veth => {
            Ok(netlink.delete_link_unawaited(link.index).map(|()| true)?)
        }
        _ => Ok(false),
    }
}
