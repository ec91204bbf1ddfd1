//! Many changes of tables at once.
//!
//! An acknowledged request costs two system calls and a wake-up each. Here a datagram carries up to
//! [`CHANGES_PER_DATAGRAM`] changes and only the last one asks for an answer. Nothing is lost by that: the kernel
//! answers a refusal in any case, and the sequence number in it says which change it is about.

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;

use crate::neighbour::{fdb_message, neighbour_message, put_neighbour_message};
use crate::socket::append;
use crate::{
    AddressOptions, FdbEntry, MacBytes, Neighbour, Netlink, NetlinkError, Route, address, link,
    mac_text, route,
};

/// So many refusals still fit into a socket's default receive buffer (208 KiB; an answer takes about 1 KiB of it), so
/// that none is dropped even if the kernel refuses all.
const CHANGES_PER_DATAGRAM: usize = 128;

/// One change of a table or a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// As [`Netlink::add_address`].
    AddAddress {
        /// Index of the link.
        link: u32,
        /// With its prefix.
        address: IpNetwork,
        /// How.
        options: AddressOptions,
    },
    /// As [`Netlink::set_up`].
    SetUp {
        /// Index of the link.
        link: u32,
    },
    /// As [`Netlink::set_mac`].
    SetMac {
        /// Index of the link.
        link: u32,
        /// The MAC.
        mac: MacBytes,
    },
    /// As [`Netlink::set_alias`].
    SetAlias {
        /// Index of the link.
        link: u32,
        /// The text.
        alias: String,
    },
    /// From now on the kernel tells the IPv4 neighbours whenever the link goes up or its MAC is set: the sysctl
    /// `arp_notify`, without the walk through `/proc`, which takes longer the more namespaces have such a link.
    SetArpNotify {
        /// Index of the link.
        link: u32,
    },
    /// As [`Netlink::append_route`].
    AppendRoute(Route),
    /// As [`Netlink::add_route`].
    AddRoute(Route),
    /// As [`Netlink::replace_route`].
    PutRoute(Route),
    /// As [`Netlink::delete_route`].
    DeleteRoute(Route),
    /// As [`Netlink::replace_neighbour`].
    PutNeighbour(Neighbour),
    /// As [`Netlink::delete_neighbour`].
    DeleteNeighbour(Neighbour),
    /// As [`Netlink::replace_fdb`].
    PutFdb(FdbEntry),
    /// As [`Netlink::delete_fdb`].
    DeleteFdb(FdbEntry),
}

/// A change that the kernel refused.
#[derive(Debug)]
pub struct Refused {
    /// Its place among the changes.
    pub index: usize,
    /// The kernel's words.
    pub error: NetlinkError,
}

impl Change {
    fn is_removal(&self) -> bool {
        matches!(self, Self::DeleteRoute(_) | Self::DeleteNeighbour(_) | Self::DeleteFdb(_))
    }

    fn flags(&self) -> u16 {
        match self {
            Self::AddRoute(_) | Self::AddAddress { .. } => NLM_F_CREATE | NLM_F_EXCL,
            Self::AppendRoute(_) => NLM_F_CREATE | NLM_F_APPEND,
            Self::PutRoute(_) | Self::PutNeighbour(_) | Self::PutFdb(_) => {
                NLM_F_CREATE | NLM_F_REPLACE
            }
            Self::SetUp { .. }
            | Self::SetMac { .. }
            | Self::SetAlias { .. }
            | Self::SetArpNotify { .. }
            | Self::DeleteRoute(_)
            | Self::DeleteNeighbour(_)
            | Self::DeleteFdb(_) => 0,
        }
    }

    fn message(&self) -> RouteNetlinkMessage {
        match self {
            Self::AddAddress { link, address, options } => RouteNetlinkMessage::NewAddress(
                address::new_address_message(*link, *address, options),
            ),
            Self::SetUp { link } => RouteNetlinkMessage::SetLink(link::up_message(*link)),
            Self::SetMac { link, mac } => {
                RouteNetlinkMessage::SetLink(link::mac_message(*link, *mac))
            }
            Self::SetAlias { link, alias } => {
                RouteNetlinkMessage::SetLink(link::alias_message(*link, alias))
            }
            Self::SetArpNotify { link } => {
                RouteNetlinkMessage::SetLink(link::arp_notify_message(*link))
            }
            Self::AddRoute(route) | Self::AppendRoute(route) | Self::PutRoute(route) => {
                route::put_message(route)
            }
            Self::DeleteRoute(route) => route::delete_message(route),
            Self::PutNeighbour(neighbour) => put_neighbour_message(neighbour),
            Self::DeleteNeighbour(neighbour) => {
                RouteNetlinkMessage::DelNeighbour(neighbour_message(neighbour))
            }
            Self::PutFdb(entry) => RouteNetlinkMessage::NewNeighbour(fdb_message(entry)),
            Self::DeleteFdb(entry) => RouteNetlinkMessage::DelNeighbour(fdb_message(entry)),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::AddAddress { link, address, .. } => {
                format!("add address {address} to link {link}")
            }
            Self::SetUp { link } => format!("switch on link {link}"),
            Self::SetMac { link, mac } => format!("set MAC {} of link {link}", mac_text(*mac)),
            Self::SetAlias { link, .. } => format!("set alias of link {link}"),
            Self::SetArpNotify { link } => format!("set arp_notify of link {link}"),
            Self::AddRoute(route) => route::describe("add", route),
            Self::AppendRoute(route) => route::describe("append", route),
            Self::PutRoute(route) => route::describe("replace", route),
            Self::DeleteRoute(route) => route::describe("remove", route),
            Self::PutNeighbour(neighbour) => {
                format!("set neighbour {} on link {}", neighbour.ip, neighbour.link)
            }
            Self::DeleteNeighbour(neighbour) => {
                format!("remove neighbour {} from link {}", neighbour.ip, neighbour.link)
            }
            Self::PutFdb(entry) => {
                format!("set forwarding entry {} on link {}", mac_text(entry.mac), entry.link)
            }
            Self::DeleteFdb(entry) => {
                format!("remove forwarding entry {} from link {}", mac_text(entry.mac), entry.link)
            }
        }
    }
}

impl Netlink {
    /// Makes the changes in their order and returns those that the kernel refused; the others are made. Removing what is
    /// missing is no refusal.
    ///
    /// # Errors
    /// If the socket fails: then it is unknown which changes were made.
    pub fn apply(&self, changes: &[Change]) -> Result<Vec<Refused>, NetlinkError> {
        let mut refused = Vec::new();
        for (part, changes) in changes.chunks(CHANGES_PER_DATAGRAM).enumerate() {
            let count = u32::try_from(changes.len()).expect("a part is small");
            let request = || format!("change {count} entries");
            let encode = |datagram: &mut Vec<u8>, first: u32| {
                for (sequence, change) in (first..=u32::MAX).chain(0..).zip(changes) {
                    let last = sequence == first.wrapping_add(count - 1);
                    let flags = change.flags() | if last { NLM_F_ACK } else { 0 };
                    append(datagram, flags, sequence, change.message());
                }
            };
            for (place, errno, message) in self.pipeline(count, &request, encode)? {
                let change = &changes[place as usize];
                let error = NetlinkError::Kernel { request: change.describe(), errno, message };
                if !(change.is_removal() && error.is_not_found()) {
                    let index = part * CHANGES_PER_DATAGRAM + place as usize;
                    refused.push(Refused { index, error });
                }
            }
        }
        Ok(refused)
    }
}
