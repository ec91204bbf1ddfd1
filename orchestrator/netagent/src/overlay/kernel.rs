//! Reading and writing the overlay in the kernel, through rtnetlink, in the namespace of the calling thread.

use std::net::{IpAddr, Ipv4Addr};

use cni_netlink::{
    AddressOptions, Change, FdbEntry, LinkKind, Neighbour, Netlink, NetlinkError, Route,
    RouteFilter, VxlanDevice,
};

use super::plan::{DeviceStep, Hop, PeerStep, SeenDevice, SeenPeers, SeenVxlan, plan_device};
use super::{Device, ROUTE_PROTOCOL};
use crate::mac::Mac;

/// Why the kernel does not hold the wanted overlay.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// No link has the node's address.
    #[error("no link has the node address {0}: is the underlay up, and --node-ip right?")]
    NoUnderlay(Ipv4Addr),
    /// No link is as the operator says.
    #[error("no link with an IPv4 address fits --iface or --iface-regex: {0}")]
    NoSuchUnderlay(String),
    /// Another VXLAN device has the port or the identifier.
    #[error(
        "make {device}: another VXLAN device uses UDP port {port} or VNI {vni} here (flannel.1 of a flanneld?); remove it with `ip link delete NAME`"
    )]
    Occupied {
        /// Our device.
        device: String,
        /// Its port.
        port: u16,
        /// Its identifier.
        vni: u32,
        /// The kernel's words.
        source: NetlinkError,
    },
    /// A step failed.
    #[error("{step}")]
    Step {
        /// The step.
        step: String,
        /// The kernel's words.
        source: NetlinkError,
    },
    /// Entries of peers were refused.
    #[error("{count} of {all} changes were refused, the first: {first}")]
    Refused {
        /// How many.
        count: usize,
        /// Of how many.
        all: usize,
        /// The kernel's words on the first.
        first: NetlinkError,
    },
    /// A dump failed.
    #[error("read {what} from the kernel")]
    Observe {
        /// What was read.
        what: &'static str,
        /// The kernel's words.
        source: NetlinkError,
    },
    /// The device vanished while it was set up.
    #[error("{0} vanished while it was set up")]
    Vanished(String),
}

fn observing(what: &'static str) -> impl Fn(NetlinkError) -> OverlayError {
    move |source| OverlayError::Observe { what, source }
}

/// Makes the device right; returns its index and how many steps that took.
///
/// # Errors
/// At the first step that fails; what was done stays, and the next call goes on from there.
pub fn ensure_device(netlink: &Netlink, device: &Device) -> Result<(u32, usize), OverlayError> {
    let seen = observe_device(netlink, &device.name)?;
    let steps = plan_device(seen.as_ref(), device);
    for step in &steps {
        apply_device(netlink, device, step)?;
    }
    let index = match seen {
        Some(seen) if !steps.contains(&DeviceStep::Create) => seen.index,
        _ => device_index(netlink, device)?,
    };
    Ok((index, steps.len()))
}

/// Removes a VXLAN device, if there is one; says how many steps that took.
///
/// # Errors
/// If the kernel refuses.
pub fn remove_device(netlink: &Netlink, name: &str) -> Result<usize, OverlayError> {
    let link = netlink.link(name).map_err(observing("links"))?;
    let Some(link) = link.filter(|link| matches!(link.kind, LinkKind::Vxlan(_))) else {
        return Ok(0);
    };
    let failed = |source| OverlayError::Step { step: format!("delete {name}"), source };
    netlink.delete_link(link.index).map_err(failed)?;
    Ok(1)
}

fn device_index(netlink: &Netlink, device: &Device) -> Result<u32, OverlayError> {
    let link = netlink.link(&device.name).map_err(observing("links"))?;
    link.map(|link| link.index).ok_or_else(|| OverlayError::Vanished(device.name.clone()))
}

/// Reads the device.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn observe_device(netlink: &Netlink, name: &str) -> Result<Option<SeenDevice>, OverlayError> {
    let Some(link) = netlink.link(name).map_err(observing("links"))? else { return Ok(None) };
    let addresses = netlink.addresses(link.index).map_err(observing("addresses"))?;
    let vxlan = match &link.kind {
        LinkKind::Vxlan(vxlan) => Some(SeenVxlan {
            vni: vxlan.vni,
            port: vxlan.port,
            local: vxlan.local,
            underlay: vxlan.underlay_index,
            learning: vxlan.learning,
        }),
        _ => None,
    };
    Ok(Some(SeenDevice {
        index: link.index,
        vxlan,
        mac: Mac(link.mac),
        mtu: link.mtu,
        up: link.up,
        addresses,
    }))
}

/// Reads what the kernel holds of peers.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn observe_peers(netlink: &Netlink, device: u32) -> Result<SeenPeers, OverlayError> {
    let mut seen = SeenPeers::default();
    for neighbour in netlink.neighbours(device).map_err(observing("neighbours"))? {
        if neighbour.permanent {
            seen.neighbours.insert(neighbour.ip, Mac(neighbour.mac));
        }
    }
    for entry in netlink.fdb(device).map_err(observing("forwarding entries"))? {
        if let Some(node) = entry.dst {
            seen.forwarding.entry(Mac(entry.mac)).or_default().insert(node);
        }
    }
    for route in netlink.routes(&RouteFilter::default()).map_err(observing("routes"))? {
        let hop = Hop { subnet: route.dst, via: route.via, link: route.link, metric: route.metric };
        if route.protocol == ROUTE_PROTOCOL {
            seen.routes.insert(hop);
        } else {
            seen.foreign.insert((hop, route.protocol));
        }
    }
    Ok(seen)
}

fn apply_device(netlink: &Netlink, device: &Device, step: &DeviceStep) -> Result<(), OverlayError> {
    let failed = |text: &str| {
        let step = format!("{text} {}", device.name);
        move |source| OverlayError::Step { step, source }
    };
    match step {
        DeviceStep::Delete(index) => netlink.delete_link(*index).map_err(failed("delete")),
        DeviceStep::Create => {
            let vxlan = VxlanDevice {
                name: device.name.clone(),
                vni: device.vni,
                port: device.port,
                local: Some(device.local),
                underlay_index: Some(device.underlay),
                mac: Some(device.mac.0),
                mtu: Some(device.mtu),
                learning: false,
            };
            netlink.create_vxlan(&vxlan).map(drop).map_err(|source| {
                if source.is_exists() {
                    OverlayError::Occupied {
                        device: device.name.clone(),
                        port: device.port,
                        vni: device.vni,
                        source,
                    }
                } else {
                    failed("make")(source)
                }
            })
        }
        DeviceStep::SetMac => netlink
            .set_mac(device_index(netlink, device)?, device.mac.0)
            .map_err(failed("set the MAC of")),
        DeviceStep::SetMtu => netlink
            .set_mtu(device_index(netlink, device)?, device.mtu)
            .map_err(failed("set the MTU of")),
        DeviceStep::AddAddress => {
            // Nobody else has it: there is nothing to detect.
            let options = AddressOptions { nodad: true, no_prefix_route: false };
            netlink
                .add_address(device_index(netlink, device)?, device.address.into(), &options)
                .map_err(failed("add the address of"))
        }
        DeviceStep::DeleteAddress(address) => netlink
            .delete_address(device_index(netlink, device)?, *address)
            .map_err(failed("remove an old address of")),
        DeviceStep::SetUp => {
            netlink.set_up(device_index(netlink, device)?).map_err(failed("bring up"))
        }
    }
}

/// Carries out the steps in one batch.
///
/// # Errors
/// If some were refused; the others are made.
pub fn apply_peers(netlink: &Netlink, device: u32, steps: &[PeerStep]) -> Result<(), OverlayError> {
    let changes: Vec<Change> = steps.iter().map(|step| change(device, step)).collect();
    let failed =
        |source| OverlayError::Step { step: "change the peers' entries".to_owned(), source };
    let refused = netlink.apply(&changes).map_err(failed)?;
    let count = refused.len();
    match refused.into_iter().next() {
        Some(first) => Err(OverlayError::Refused { count, all: changes.len(), first: first.error }),
        None => Ok(()),
    }
}

fn change(device: u32, step: &PeerStep) -> Change {
    let forwarding =
        |mac: &Mac, node: &IpAddr| FdbEntry { link: device, mac: mac.0, dst: Some(*node) };
    let neighbour = |gateway: &IpAddr, mac: &Mac| Neighbour {
        link: device,
        ip: *gateway,
        mac: mac.0,
        permanent: true,
    };
    let route = |hop: &Hop| Route {
        dst: hop.subnet,
        via: hop.via,
        link: hop.link,
        // No address of our device covers the next hop.
        onlink: hop.link == Some(device),
        metric: hop.metric,
        protocol: ROUTE_PROTOCOL,
        ..Route::default()
    };
    match step {
        PeerStep::PutForwarding(mac, node) => Change::PutFdb(forwarding(mac, node)),
        PeerStep::PutNeighbour(gateway, mac) => Change::PutNeighbour(neighbour(gateway, mac)),
        PeerStep::AddRoute(hop) => Change::AddRoute(route(hop)),
        PeerStep::PutRoute(hop) => Change::PutRoute(route(hop)),
        PeerStep::DeleteRoute(hop) => Change::DeleteRoute(route(hop)),
        PeerStep::DeleteNeighbour(gateway) => {
            Change::DeleteNeighbour(neighbour(gateway, &Mac([0; 6])))
        }
        PeerStep::DeleteForwarding(mac, node) => Change::DeleteFdb(forwarding(mac, node)),
    }
}
