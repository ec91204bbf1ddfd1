//! Making links.

use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};

use super::{Link, parse_link};
use crate::{MacBytes, Netlink, NetlinkError};

/// A bridge to make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bridge {
    /// Name.
    pub name: String,
    /// MTU.
    pub mtu: Option<u32>,
    /// MAC. One that is given stays; else a bridge takes the lowest of its ports, and changes with them.
    pub mac: Option<MacBytes>,
    /// Group: with it, unlike with an alias, the link is marked from its first moment on.
    pub group: Option<u32>,
    /// Whether it looks at VLAN tags.
    pub vlan_filtering: bool,
    /// Switched on at once.
    pub up: bool,
}

/// A veth pair to make.
#[derive(Debug, Clone, Default)]
pub struct VethPair<'a> {
    /// Name of the near end.
    pub name: String,
    /// Name of the far end.
    pub peer_name: String,
    /// Namespace of the far end; `None` is this one.
    pub peer_netns: Option<BorrowedFd<'a>>,
    /// Index of the bridge that the near end is a port of.
    pub master: Option<u32>,
    /// MTU of both ends.
    pub mtu: Option<u32>,
    /// MAC of the near end.
    pub mac: Option<MacBytes>,
    /// MAC of the far end.
    pub peer_mac: Option<MacBytes>,
    /// Group of the near end: with it, unlike with an alias, the link is marked from its first moment on.
    pub group: Option<u32>,
    /// Near end switched on at once. The far end cannot be: the kernel answers `ENOTCONN`, its peer is not there yet.
    pub up: bool,
}

/// An intermediate functional block to make: what goes out by it comes in where it was redirected from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IfbDevice {
    /// Name.
    pub name: String,
    /// MTU.
    pub mtu: Option<u32>,
    /// Group.
    pub group: Option<u32>,
}

/// A VXLAN device to make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VxlanDevice {
    /// Name.
    pub name: String,
    /// Identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Underlay address of this end.
    pub local: Option<IpAddr>,
    /// Index of the underlay's link.
    pub underlay_index: Option<u32>,
    /// MAC; given at creation, so that udev has no time to choose one.
    pub mac: Option<MacBytes>,
    /// MTU.
    pub mtu: Option<u32>,
    /// Whether it learns from what it receives. Always said, because the kernel's default is yes.
    pub learning: bool,
}

impl Netlink {
    /// Makes a bridge.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if the name is taken.
    pub fn create_bridge(&self, bridge: &Bridge) -> Result<Link, NetlinkError> {
        let mut info = vec![LinkInfo::Kind(InfoKind::Bridge)];
        if bridge.vlan_filtering {
            info.push(LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::VlanFiltering(true)])));
        }
        let mut message = new_link_message(&bridge.name, bridge.mtu, bridge.mac, bridge.up);
        message.attributes.extend(bridge.group.map(LinkAttribute::Group));
        message.attributes.push(LinkAttribute::LinkInfo(info));
        self.create(message, &bridge.name, "bridge")
    }

    /// Makes a veth pair and returns its near end.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if one of the names is taken.
    pub fn create_veth(&self, pair: &VethPair<'_>) -> Result<Link, NetlinkError> {
        let mut peer = new_link_message(&pair.peer_name, pair.mtu, pair.peer_mac, false);
        peer.attributes
            .extend(pair.peer_netns.map(|netns| LinkAttribute::NetNsFd(netns.as_raw_fd())));
        let mut message = new_link_message(&pair.name, pair.mtu, pair.mac, pair.up);
        message.attributes.extend(pair.master.map(LinkAttribute::Controller));
        message.attributes.extend(pair.group.map(LinkAttribute::Group));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.create(message, &pair.name, "veth pair")
    }

    /// Makes an intermediate functional block, switched on.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if the name is taken.
    pub fn create_ifb(&self, device: &IfbDevice) -> Result<Link, NetlinkError> {
        let mut message = new_link_message(&device.name, device.mtu, None, true);
        message.attributes.extend(device.group.map(LinkAttribute::Group));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]));
        self.create(message, &device.name, "IFB device")
    }

    /// Makes a VXLAN device.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if the name is taken, or another device has the VNI on this port.
    pub fn create_vxlan(&self, device: &VxlanDevice) -> Result<Link, NetlinkError> {
        let mut data = vec![
            InfoVxlan::Id(device.vni),
            InfoVxlan::Port(device.port),
            InfoVxlan::Learning(device.learning),
        ];
        data.extend(device.underlay_index.map(InfoVxlan::Link));
        data.extend(device.local.map(|local| match local {
            IpAddr::V4(local) => InfoVxlan::Local(local),
            IpAddr::V6(local) => InfoVxlan::Local6(local),
        }));
        let mut message = new_link_message(&device.name, device.mtu, device.mac, false);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(data)),
        ]));
        self.create(message, &device.name, "VXLAN device")
    }

    fn create(&self, message: LinkMessage, name: &str, what: &str) -> Result<Link, NetlinkError> {
        let request = || format!("create {what} {name}");
        let master = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Controller(master) => Some(*master),
            _ => None,
        });
        let mut made = None;
        // From 6.2 on the kernel says what it has made, if asked to: without that the question comes second, and
        // waits for whatever the new link has set in motion.
        let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO;
        self.get(flags, RouteNetlinkMessage::NewLink(message), request, |payload| {
            made = parse_link(payload);
            Ok(())
        })?;
        if let Some(made) = made.filter(|made| made.name == name) {
            // It says so before it puts the link under its master.
            return Ok(Link { master, ..made });
        }
        self.link(name)?.ok_or_else(|| NetlinkError::Kernel {
            request: request(),
            errno: libc::ENODEV,
            message: Some("somebody removed it at once".to_owned()),
        })
    }
}

fn new_link_message(name: &str, mtu: Option<u32>, mac: Option<MacBytes>, up: bool) -> LinkMessage {
    let mut message = LinkMessage::default();
    if up {
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
    }
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.extend(mtu.map(LinkAttribute::Mtu));
    message.attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
    message
}
