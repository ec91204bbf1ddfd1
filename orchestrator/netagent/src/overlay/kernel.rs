//! Reading and writing the overlay in the kernel, through rtnetlink, in the namespace of the calling thread.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use cni_netlink::{
    AddressOptions, FdbEntry, Link, LinkKind, Neighbour, Netlink, NetlinkError, Route, RouteFilter,
    VxlanDevice,
};
use ipnetwork::{IpNetwork, Ipv4Network};

use super::plan::{
    DeviceStep, PeerStep, SeenDevice, SeenPeers, SeenVxlan, plan_device, plan_peers,
};
use super::{Device, Peers, ROUTE_PROTOCOL, VXLAN_OVERHEAD_IPV4};
use crate::mac::Mac;

/// Why the kernel does not hold the wanted overlay.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// No link has the node's address.
    #[error("no link has the node address {0}: is the underlay up, and --node-ip right?")]
    NoUnderlay(Ipv4Addr),
    /// The named underlay is missing.
    #[error("the underlay link {0} is missing")]
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

/// The link that carries the overlay's packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MTU.
    pub mtu: u32,
}

impl Underlay {
    /// MTU that is left for the overlay.
    #[must_use]
    pub fn overlay_mtu(&self) -> u32 {
        self.mtu.saturating_sub(VXLAN_OVERHEAD_IPV4)
    }
}

/// Finds the underlay: the named link, else the one that has the node's address.
///
/// # Errors
/// If there is none.
pub fn find_underlay(
    netlink: &Netlink,
    node_ip: Ipv4Addr,
    name: Option<&str>,
) -> Result<Underlay, OverlayError> {
    let underlay = |link: Link| Underlay { index: link.index, name: link.name, mtu: link.mtu };
    if let Some(name) = name {
        let link = netlink.link(name).map_err(observing("links"))?;
        return link.map(underlay).ok_or_else(|| OverlayError::NoSuchUnderlay(name.to_owned()));
    }
    for link in netlink.links().map_err(observing("links"))? {
        let addresses = netlink.addresses(link.index).map_err(observing("addresses"))?;
        if addresses.iter().any(|address| address.ip() == IpAddr::V4(node_ip)) {
            return Ok(underlay(link));
        }
    }
    Err(OverlayError::NoUnderlay(node_ip))
}

/// Makes device and peers right; returns the device's index and how many steps it took.
///
/// # Errors
/// At the first step that fails; what was done stays, and the next call goes on from there.
pub fn reconcile(
    netlink: &Netlink,
    device: &Device,
    peers: &Peers,
) -> Result<(u32, usize), OverlayError> {
    let seen = observe_device(netlink, &device.name)?;
    let device_steps = plan_device(seen.as_ref(), device);
    for step in &device_steps {
        apply_device(netlink, device, step)?;
    }
    let index = match seen {
        Some(seen) if !device_steps.contains(&DeviceStep::Create) => seen.index,
        _ => device_index(netlink, device)?,
    };
    let peer_steps = plan_peers(&observe_peers(netlink, index)?, peers, index);
    for step in &peer_steps {
        apply_peer(netlink, index, step)?;
    }
    Ok((index, device_steps.len() + peer_steps.len()))
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
            local: match vxlan.local {
                Some(IpAddr::V4(local)) => Some(local),
                _ => None,
            },
            underlay: vxlan.underlay_index,
            learning: vxlan.learning,
        }),
        _ => None,
    };
    let v4 = |address: IpNetwork| match address {
        IpNetwork::V4(address) => Some(address),
        IpNetwork::V6(_) => None,
    };
    Ok(Some(SeenDevice {
        index: link.index,
        vxlan,
        mac: Mac(link.mac),
        mtu: link.mtu,
        up: link.up,
        addresses: addresses.into_iter().filter_map(v4).collect(),
    }))
}

/// Reads what the kernel holds of peers.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn observe_peers(netlink: &Netlink, device: u32) -> Result<SeenPeers, OverlayError> {
    let mut seen = SeenPeers::default();
    for neighbour in netlink.neighbours(device).map_err(observing("neighbours"))? {
        if let IpAddr::V4(ip) = neighbour.ip
            && neighbour.permanent
        {
            seen.neighbours.insert(ip, Mac(neighbour.mac));
        }
    }
    for entry in netlink.fdb(device).map_err(observing("forwarding entries"))? {
        if let Some(IpAddr::V4(node)) = entry.dst {
            seen.forwarding.entry(Mac(entry.mac)).or_insert_with(BTreeSet::new).insert(node);
        }
    }
    let ours = RouteFilter { protocol: Some(ROUTE_PROTOCOL), ..RouteFilter::default() };
    for route in netlink.routes(&ours).map_err(observing("routes"))? {
        if let IpNetwork::V4(subnet) = route.dst {
            let via = match route.via {
                Some(IpAddr::V4(via)) => Some(via),
                _ => None,
            };
            seen.routes.insert(subnet, (via, route.link));
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
                local: Some(IpAddr::V4(device.local)),
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
            let address = IpNetwork::V4(Ipv4Network::from(device.address));
            netlink
                .add_address(device_index(netlink, device)?, address, &AddressOptions::default())
                .map_err(failed("add the address of"))
        }
        DeviceStep::DeleteAddress(address) => netlink
            .delete_address(device_index(netlink, device)?, IpNetwork::V4(*address))
            .map_err(failed("remove an old address of")),
        DeviceStep::SetUp => {
            netlink.set_up(device_index(netlink, device)?).map_err(failed("bring up"))
        }
    }
}

fn apply_peer(netlink: &Netlink, device: u32, step: &PeerStep) -> Result<(), OverlayError> {
    let forwarding = |mac: &Mac, node: &Ipv4Addr| FdbEntry {
        link: device,
        mac: mac.0,
        dst: Some(IpAddr::V4(*node)),
    };
    let neighbour = |gateway: &Ipv4Addr, mac: &Mac| Neighbour {
        link: device,
        ip: IpAddr::V4(*gateway),
        mac: mac.0,
        permanent: true,
    };
    let route = |subnet: &Ipv4Network| Route {
        dst: IpNetwork::V4(*subnet),
        via: Some(IpAddr::V4(subnet.network())),
        link: Some(device),
        onlink: true,
        protocol: ROUTE_PROTOCOL,
        ..Route::default()
    };
    let result = match step {
        PeerStep::PutForwarding(mac, node) => netlink.replace_fdb(&forwarding(mac, node)),
        PeerStep::PutNeighbour(gateway, mac) => netlink.replace_neighbour(&neighbour(gateway, mac)),
        PeerStep::PutRoute(subnet) => netlink.replace_route(&route(subnet)),
        PeerStep::DeleteRoute(subnet) => netlink.delete_route(&route(subnet)),
        PeerStep::DeleteNeighbour(gateway) => {
            netlink.delete_neighbour(&neighbour(gateway, &Mac([0; 6])))
        }
        PeerStep::DeleteForwarding(mac, node) => netlink.delete_fdb(&forwarding(mac, node)),
    };
    result.map_err(|source| OverlayError::Step { step: format!("{step:?}"), source })
}
