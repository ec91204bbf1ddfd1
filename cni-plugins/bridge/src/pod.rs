//! The pod's side: its interface, addresses and routes.

use cni_netlink::{AddressOptions, Link, LinkKind, NetNs, Netlink, Route, RouteFilter};
use cni_spec::{AddResult, IfName};
use ipnetwork::IpNetwork;

use crate::conf::Settings;
use crate::kernel::{KernelError, write_sysctl};
use crate::plan::pod_routes;

/// The pod's interface as it was set up, and a socket in its namespace.
pub(crate) struct Pod {
    pub(crate) link: Link,
    netlink: Netlink,
}

/// Gives the interface what IPAM gave, and switches it on.
pub(crate) fn set_up(
    netns: &NetNs,
    ifname: &IfName,
    settings: &Settings,
    lease: &AddResult,
) -> Result<Pod, KernelError> {
    netns.run(|| {
        let netlink = Netlink::open()?;
        let vanished = || KernelError::Vanished(ifname.to_string());
        let link = netlink.link(ifname.as_str())?.ok_or_else(vanished)?;
        if settings.keep_down {
            return Ok(Pod { link, netlink });
        }
        set_sysctls(ifname, settings, lease)?;
        for ip in &lease.ips {
            let nodad = !settings.detect_duplicates;
            let options = AddressOptions { nodad, ..AddressOptions::default() };
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
        Ok(Pod { link: Link { up: true, ..link }, netlink })
    })
}

fn set_sysctls(ifname: &IfName, settings: &Settings, lease: &AddResult) -> Result<(), KernelError> {
    if lease.ips.iter().any(|ip| ip.address.is_ipv4()) {
        write_sysctl(&format!("net/ipv4/conf/{ifname}/arp_notify"), "1")?;
    }
    if lease.ips.iter().any(|ip| ip.address.is_ipv6()) {
        write_sysctl(&format!("net/ipv6/conf/{ifname}/disable_ipv6"), "0")?;
        if !settings.detect_duplicates {
            // For the link-local address, which the kernel adds; ours says it itself.
            write_sysctl(&format!("net/ipv6/conf/{ifname}/accept_dad"), "0")?;
        }
        write_sysctl(&format!("net/ipv6/conf/{ifname}/ndisc_notify"), "1")?;
    }
    Ok(())
}

impl Pod {
    /// Tells the neighbours where the pod's addresses are now: who knew one of them as another pod's would send to a
    /// dead MAC for as long as it believes in it. The kernel did so when the interface went up, but then the bridge
    /// may not have passed frames of the port yet; a MAC that is set, to what it is, makes it do so again. A packet
    /// socket of our own would do as well, but closing one takes the kernel some ten milliseconds.
    pub(crate) fn announce(&self) -> Result<(), KernelError> {
        Ok(self.netlink.set_mac(self.link.index, self.link.mac)?)
    }
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
