//! The pod's side: its interface, addresses and routes.

use std::net::IpAddr;

use cni_netlink::{AddressOptions, Link, LinkKind, NetNs, Netlink, Route, RouteFilter, announce};
use cni_spec::{AddResult, IfName};
use ipnetwork::IpNetwork;

use crate::conf::Settings;
use crate::kernel::{KernelError, set_sysctl};
use crate::plan::pod_routes;

/// Gives the interface what IPAM gave, and switches it on.
pub(crate) fn set_up(
    netns: &NetNs,
    ifname: &IfName,
    settings: &Settings,
    lease: &AddResult,
) -> Result<Link, KernelError> {
    netns.run(|| {
        let netlink = Netlink::open()?;
        let vanished = || KernelError::Vanished(ifname.to_string());
        let link = netlink.link(ifname.as_str())?.ok_or_else(vanished)?;
        if settings.keep_down {
            return Ok(link);
        }
        if lease.ips.iter().any(|ip| ip.address.is_ipv6()) {
            set_sysctl(&format!("net/ipv6/conf/{ifname}/disable_ipv6"), "0")?;
            if !settings.detect_duplicates {
                // For the link-local address, which the kernel adds; ours says it itself.
                set_sysctl(&format!("net/ipv6/conf/{ifname}/accept_dad"), "0")?;
            }
            // Tells the neighbours of the new MAC of an address that was another pod's; IPv4 is announced by us.
            set_sysctl(&format!("net/ipv6/conf/{ifname}/ndisc_notify"), "1")?;
        }
        for ip in &lease.ips {
            let options =
                AddressOptions { nodad: !settings.detect_duplicates, ..AddressOptions::default() };
            netlink.add_address(link.index, ip.address, &options)?;
        }
        netlink.set_up(link.index)?;
        for route in pod_routes(lease, link.index) {
            // Several routes to one place are several ways to it.
            match netlink.append_route(&route) {
                Err(error) if error.is_exists() => {}
                other => other?,
            }
        }
        netlink.link_at(link.index)?.ok_or_else(vanished)
    })
}

/// Tells the bridge and the neighbours where the pod's IPv4 addresses are now.
pub(crate) fn announce_addresses(
    netns: &NetNs,
    link: &Link,
    lease: &AddResult,
) -> Result<(), KernelError> {
    let v4 = lease.ips.iter().filter_map(|ip| match ip.address.ip() {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    });
    let v4: Vec<_> = v4.collect();
    if v4.is_empty() {
        return Ok(());
    }
    netns.run(|| {
        for ip in v4 {
            announce(link.index, link.mac, ip)?;
        }
        Ok(())
    })
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
/// reference plugin, before we came.
pub(crate) fn remove(netns: &NetNs, ifname: &IfName) -> Result<(), KernelError> {
    let netlink = Netlink::open_in(netns)?;
    match netlink.link(ifname.as_str())? {
        Some(link) if link.kind == LinkKind::Veth => Ok(netlink.delete_link(link.index)?),
        _ => Ok(()),
    }
}
