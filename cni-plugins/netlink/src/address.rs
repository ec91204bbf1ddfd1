//! Addresses of links.

use std::net::IpAddr;

use ipnetwork::{IpNetwork, Ipv4Network};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::socket::{attribute, read_u32};
use crate::{Netlink, NetlinkError};

const HEADER_BYTES: usize = 8;

/// How an address is added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddressOptions {
    /// IPv6: usable at once, without the second or two of duplicate address detection.
    pub nodad: bool,
    /// No route to the address' own subnet.
    pub no_prefix_route: bool,
}

pub(crate) fn family_of(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// An address of four or sixteen bytes.
pub(crate) fn parse_ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

impl Netlink {
    /// Addresses of a link, of both families, with their prefixes. A link that is gone has none.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn addresses(&self, link: u32) -> Result<Vec<IpNetwork>, NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.index = link;
        let read = |payload: &[u8]| {
            if read_u32(payload, 4) != Some(link) {
                return Ok(None);
            }
            parse_address(payload)
                .map(Some)
                .ok_or_else(|| "an address without its bytes".to_owned())
        };
        match self.dump(
            RouteNetlinkMessage::GetAddress(message),
            || format!("list addresses of link {link}"),
            read,
        ) {
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(Vec::new()),
            result => result,
        }
    }

    /// Adds an address.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if the link has it.
    pub fn add_address(
        &self,
        link: u32,
        address: IpNetwork,
        options: &AddressOptions,
    ) -> Result<(), NetlinkError> {
        let message = new_address_message(link, address, options);
        self.change(NLM_F_CREATE | NLM_F_EXCL, RouteNetlinkMessage::NewAddress(message), || {
            format!("add address {address} to link {link}")
        })
    }

    /// Removes an address; one that is missing is removed already.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_address(&self, link: u32, address: IpNetwork) -> Result<(), NetlinkError> {
        let request = || format!("remove address {address} from link {link}");
        match self.change(0, RouteNetlinkMessage::DelAddress(message(link, address)), request) {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }
}

/// The message that adds an address.
pub(crate) fn new_address_message(
    link: u32,
    address: IpNetwork,
    options: &AddressOptions,
) -> AddressMessage {
    let mut message = message(link, address);
    let mut flags = AddressFlags::empty();
    if options.nodad {
        flags |= AddressFlags::Nodad;
    }
    if options.no_prefix_route {
        flags |= AddressFlags::Noprefixroute;
    }
    if !flags.is_empty() {
        message.header.flags = AddressHeaderFlags::from_bits_truncate((flags.bits() & 0xff) as u8);
        message.attributes.push(AddressAttribute::Flags(flags));
    }
    if let IpNetwork::V4(v4) = address
        && v4.prefix() <= 30
    {
        message.attributes.push(AddressAttribute::Broadcast(v4.broadcast()));
    }
    message
}

fn message(link: u32, address: IpNetwork) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family_of(address.ip());
    message.header.prefix_len = address.prefix();
    message.header.index = link;
    if address.ip().is_loopback() {
        message.header.scope = AddressScope::Host;
    }
    message.attributes =
        vec![AddressAttribute::Local(address.ip()), AddressAttribute::Address(address.ip())];
    message
}

pub(crate) fn parse_address(payload: &[u8]) -> Option<IpNetwork> {
    let prefix = *payload.get(1)?;
    let attributes = payload.get(HEADER_BYTES..)?;
    // On a point-to-point link IFA_ADDRESS is the peer's; IFA_LOCAL is always ours, but IPv6 often leaves it out.
    let address = attribute(attributes, libc::IFA_LOCAL)
        .or_else(|| attribute(attributes, libc::IFA_ADDRESS))?;
    match parse_ip(address)? {
        IpAddr::V4(ip) => Ipv4Network::new(ip, prefix).ok().map(IpNetwork::V4),
        ip @ IpAddr::V6(_) => IpNetwork::new(ip, prefix).ok(),
    }
}
