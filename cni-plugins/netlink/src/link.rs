//! Links: what there is. Making them is in `create.rs`, changing them in `change.rs`, ports of bridges are in `port.rs`, sizes
//! of packets in `sizes.rs`.

mod change;
mod create;
mod port;
mod sizes;

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage};

use crate::address::parse_ip;
use crate::socket::{attribute, read_u16, read_u32, text};
use crate::{MacBytes, Netlink, NetlinkError};

pub(crate) use change::{alias_message, arp_notify_message, mac_message, up_message};
pub use create::{Bridge, IfbDevice, VethPair, VxlanDevice};
use port::parse_port;
#[cfg(test)]
pub(crate) use port::parse_vlans;
pub use port::{BridgePort, PortVlan};
pub use sizes::PacketSizes;

const HEADER_BYTES: usize = 16;
const INDEX_AT: usize = 4;
const FLAGS_AT: usize = 8;
/// Longest name of a link, without the zero byte.
const NAME_MAX_BYTES: usize = 15;

// Attributes inside `IFLA_LINKINFO` and below (`linux/if_link.h`, `linux/if_bridge.h`).
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const INFO_PORT_DATA: u16 = 5;
const BRIDGE_VLAN_FILTERING: u16 = 7;
const VXLAN_ID: u16 = 1;
const VXLAN_LINK: u16 = 3;
const VXLAN_LOCAL: u16 = 4;
const VXLAN_LEARNING: u16 = 7;
const VXLAN_PORT: u16 = 15;
const VXLAN_LOCAL6: u16 = 17;

/// A link as the kernel holds it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Index, unique in its namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// MAC; zeros where there is none.
    pub mac: MacBytes,
    /// MTU.
    pub mtu: u32,
    /// How large packets may be before they are cut into frames.
    pub sizes: PacketSizes,
    /// Whether it is switched on (`IFF_UP`).
    pub up: bool,
    /// Whether it could carry packets now: for a veth, whether both ends are up.
    pub carrier: bool,
    /// Whether somebody asked for all frames.
    pub promiscuous: bool,
    /// Whether it takes all multicast frames.
    pub all_multicast: bool,
    /// Packets that may wait at its way out.
    pub queue_length: u32,
    /// Index of the bridge, or other link, that it is a port of.
    pub master: Option<u32>,
    /// Index of the other end of a veth pair, or of the link below.
    pub peer: Option<u32>,
    /// Free text, up to 255 bytes.
    pub alias: Option<String>,
    /// Group that it was put into; 0 is the default one.
    pub group: u32,
    /// Set for the port of a bridge.
    pub port: Option<BridgePort>,
}

/// What a link is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum LinkKind {
    /// A bridge.
    Bridge {
        /// Whether it looks at VLAN tags.
        vlan_filtering: bool,
    },
    /// One end of a veth pair.
    Veth,
    /// A VXLAN device.
    Vxlan(Vxlan),
    /// Another kind, by the kernel's name for it.
    Other(String),
    /// A physical link, or the loopback.
    #[default]
    Plain,
}

/// Attributes of a VXLAN device that are fixed at creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// Identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Underlay address of this end.
    pub local: Option<IpAddr>,
    /// Index of the underlay's link.
    pub underlay_index: Option<u32>,
    /// Whether it learns from what it receives.
    pub learning: bool,
}

impl Netlink {
    /// The link of a name, or `None`.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        if name.is_empty() || name.len() > NAME_MAX_BYTES {
            return Ok(None);
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.get_link(message, || format!("get link {name}"))
    }

    /// The link of an index, or `None`.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn link_at(&self, index: u32) -> Result<Option<Link>, NetlinkError> {
        self.get_link(link_message(index), || format!("get link {index}"))
    }

    fn get_link(
        &self,
        mut message: LinkMessage,
        request: impl Fn() -> String,
    ) -> Result<Option<Link>, NetlinkError> {
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let mut link = None;
        let result = self.ask(RouteNetlinkMessage::GetLink(message), request, |payload| {
            link = Some(parse_link(payload).ok_or("a link without name")?);
            Ok(())
        });
        match result {
            Ok(()) => Ok(link),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All links.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        self.dump_links(None)
    }

    /// Ports of a bridge.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn ports(&self, bridge: u32) -> Result<Vec<Link>, NetlinkError> {
        self.dump_links(Some(bridge))
    }

    fn dump_links(&self, master: Option<u32>) -> Result<Vec<Link>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        message.attributes.extend(master.map(LinkAttribute::Controller));
        let read = |payload: &[u8]| {
            let link = parse_link(payload).ok_or("a link without name")?;
            Ok(Some(link).filter(|link| master.is_none() || link.master == master))
        };
        self.dump(RouteNetlinkMessage::GetLink(message), || "list links".to_owned(), read)
    }
}

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

pub(crate) fn parse_link(payload: &[u8]) -> Option<Link> {
    let flags = LinkFlags::from_bits_retain(read_u32(payload, FLAGS_AT)?);
    let attributes = payload.get(HEADER_BYTES..)?;
    let number = |kind: u16| attribute(attributes, kind).and_then(|value| read_u32(value, 0));
    let info = attribute(attributes, libc::IFLA_LINKINFO).unwrap_or_default();
    let master = number(libc::IFLA_MASTER).filter(|master| *master != 0);
    Some(Link {
        index: read_u32(payload, INDEX_AT)?,
        name: attribute(attributes, libc::IFLA_IFNAME).and_then(text)?,
        kind: parse_kind(info),
        mac: attribute(attributes, libc::IFLA_ADDRESS)
            .and_then(|mac| mac.try_into().ok())
            .unwrap_or_default(),
        mtu: number(libc::IFLA_MTU).unwrap_or_default(),
        sizes: PacketSizes::parse(attributes),
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        promiscuous: flags.contains(LinkFlags::Promisc),
        all_multicast: flags.contains(LinkFlags::Allmulti),
        queue_length: number(libc::IFLA_TXQLEN).unwrap_or_default(),
        master,
        peer: number(libc::IFLA_LINK).filter(|peer| *peer != 0),
        alias: attribute(attributes, libc::IFLA_IFALIAS).and_then(text),
        group: number(libc::IFLA_GROUP).unwrap_or_default(),
        port: attribute(info, INFO_PORT_DATA).filter(|_| master.is_some()).map(parse_port),
    })
}

fn byte(attributes: &[u8], kind: u16) -> Option<u8> {
    attribute(attributes, kind)?.first().copied()
}

fn parse_kind(info: &[u8]) -> LinkKind {
    let Some(kind) = attribute(info, INFO_KIND).and_then(text) else { return LinkKind::Plain };
    let data = attribute(info, INFO_DATA).unwrap_or_default();
    match kind.as_str() {
        "bridge" => {
            LinkKind::Bridge { vlan_filtering: byte(data, BRIDGE_VLAN_FILTERING) == Some(1) }
        }
        "veth" => LinkKind::Veth,
        "vxlan" => LinkKind::Vxlan(Vxlan {
            vni: attribute(data, VXLAN_ID).and_then(|vni| read_u32(vni, 0)).unwrap_or_default(),
            port: attribute(data, VXLAN_PORT)
                .and_then(|port| read_u16(port, 0))
                .map_or(0, u16::from_be),
            local: attribute(data, VXLAN_LOCAL)
                .or_else(|| attribute(data, VXLAN_LOCAL6))
                .and_then(parse_ip),
            underlay_index: attribute(data, VXLAN_LINK)
                .and_then(|link| read_u32(link, 0))
                .filter(|link| *link != 0),
            learning: byte(data, VXLAN_LEARNING) == Some(1),
        }),
        _ => LinkKind::Other(kind),
    }
}
