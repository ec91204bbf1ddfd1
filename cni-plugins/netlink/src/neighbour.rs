//! Neighbours (ARP, NDP) and forwarding entries (bridge, VXLAN).

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::address::{family_of, parse_ip};
use crate::socket::{attribute, read_u16, read_u32};
use crate::{MacBytes, Netlink, NetlinkError, mac_text};

const HEADER_BYTES: usize = 12;
const LINK_AT: usize = 4;
const STATE_AT: usize = 8;
/// `NUD_PERMANENT` (`linux/neighbour.h`).
const STATE_PERMANENT: u16 = 0x80;
/// `NDA_DST` and `NDA_LLADDR` (`linux/neighbour.h`).
const ATTRIBUTE_DST: u16 = 1;
const ATTRIBUTE_MAC: u16 = 2;

/// Which MAC an address has on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Index of the link.
    pub link: u32,
    /// The address.
    pub ip: IpAddr,
    /// Its MAC.
    pub mac: MacBytes,
    /// Never asked for again, never forgotten.
    pub permanent: bool,
}

/// Where frames for a MAC go: to an underlay address, on a VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdbEntry {
    /// Index of the link.
    pub link: u32,
    /// The MAC.
    pub mac: MacBytes,
    /// Underlay address, on a VXLAN device.
    pub dst: Option<IpAddr>,
}

impl Netlink {
    /// Neighbours on a link whose MAC is known.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn neighbours(&self, link: u32) -> Result<Vec<Neighbour>, NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.attributes.push(NeighbourAttribute::IfIndex(link));
        let request = || format!("list neighbours on link {link}");
        let read = |payload: &[u8]| {
            Ok(parse_neighbour(payload).filter(|neighbour| neighbour.link == link))
        };
        self.dump(RouteNetlinkMessage::GetNeighbour(message), request, read)
    }

    /// The neighbour with this address on a link, if its MAC is known.
    ///
    /// # Errors
    /// If the kernel cannot be asked, as those before 5.0 cannot for a single one.
    pub fn neighbour(&self, link: u32, ip: IpAddr) -> Result<Option<Neighbour>, NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family_of(ip);
        message.header.ifindex = link;
        message.attributes.push(address(ip));
        let request = || format!("get neighbour {ip} on link {link}");
        let mut found = None;
        let asked = self.ask(RouteNetlinkMessage::GetNeighbour(message), request, |payload| {
            found = parse_neighbour(payload);
            Ok(())
        });
        match asked {
            Err(error) if error.is_not_found() => Ok(None),
            asked => asked.map(|()| found),
        }
    }

    /// Forwarding entries of a device.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn fdb(&self, link: u32) -> Result<Vec<FdbEntry>, NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = link;
        let request = || format!("list forwarding entries of link {link}");
        let read = |payload: &[u8]| Ok(parse_fdb(payload).filter(|entry| entry.link == link));
        match self.dump(RouteNetlinkMessage::GetNeighbour(message), request, read) {
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(Vec::new()),
            result => result,
        }
    }

    /// Adds or changes a neighbour.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn replace_neighbour(&self, neighbour: &Neighbour) -> Result<(), NetlinkError> {
        let request = || format!("set neighbour {} on link {}", neighbour.ip, neighbour.link);
        self.change(NLM_F_CREATE | NLM_F_REPLACE, put_neighbour_message(neighbour), request)
    }

    /// Forgets the neighbour with this address; the MAC does not matter, and one that is missing is fine.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_neighbour(&self, neighbour: &Neighbour) -> Result<(), NetlinkError> {
        let request = || format!("remove neighbour {} from link {}", neighbour.ip, neighbour.link);
        match self.change(
            0,
            RouteNetlinkMessage::DelNeighbour(neighbour_message(neighbour)),
            request,
        ) {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }

    /// Sends frames for a MAC to one place, instead of where they went.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn replace_fdb(&self, entry: &FdbEntry) -> Result<(), NetlinkError> {
        let request =
            || format!("set forwarding entry {} on link {}", mac_text(entry.mac), entry.link);
        self.change(
            NLM_F_CREATE | NLM_F_REPLACE,
            RouteNetlinkMessage::NewNeighbour(fdb_message(entry)),
            request,
        )
    }

    /// Removes a forwarding entry; one that is missing is removed already.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_fdb(&self, entry: &FdbEntry) -> Result<(), NetlinkError> {
        let request =
            || format!("remove forwarding entry {} from link {}", mac_text(entry.mac), entry.link);
        match self.change(0, RouteNetlinkMessage::DelNeighbour(fdb_message(entry)), request) {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }
}

fn address(ip: IpAddr) -> NeighbourAttribute {
    NeighbourAttribute::Destination(match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    })
}

pub(crate) fn put_neighbour_message(neighbour: &Neighbour) -> RouteNetlinkMessage {
    let mut message = neighbour_message(neighbour);
    message.header.state =
        if neighbour.permanent { NeighbourState::Permanent } else { NeighbourState::Reachable };
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()));
    RouteNetlinkMessage::NewNeighbour(message)
}

pub(crate) fn neighbour_message(neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family_of(neighbour.ip);
    message.header.ifindex = neighbour.link;
    message.attributes.push(address(neighbour.ip));
    message
}

pub(crate) fn fdb_message(entry: &FdbEntry) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = entry.link;
    message.header.state = NeighbourState::Permanent;
    // The entry is the VXLAN device's own, not one of a bridge that it may be a port of.
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(entry.mac.to_vec()));
    message.attributes.extend(entry.dst.map(address));
    message
}

fn read_mac(attributes: &[u8]) -> Option<MacBytes> {
    attribute(attributes, ATTRIBUTE_MAC)?.try_into().ok()
}

pub(crate) fn parse_neighbour(payload: &[u8]) -> Option<Neighbour> {
    let attributes = payload.get(HEADER_BYTES..)?;
    Some(Neighbour {
        link: read_u32(payload, LINK_AT)?,
        ip: attribute(attributes, ATTRIBUTE_DST).and_then(parse_ip)?,
        mac: read_mac(attributes)?,
        permanent: read_u16(payload, STATE_AT)? & STATE_PERMANENT != 0,
    })
}

pub(crate) fn parse_fdb(payload: &[u8]) -> Option<FdbEntry> {
    let attributes = payload.get(HEADER_BYTES..)?;
    Some(FdbEntry {
        link: read_u32(payload, LINK_AT)?,
        mac: read_mac(attributes)?,
        dst: attribute(attributes, ATTRIBUTE_DST).and_then(parse_ip),
    })
}
