//! Links, addresses, routes, neighbours, forwarding entries and network namespaces of the kernel: a small
//! synchronous layer over rtnetlink.
//!
//! [`Netlink`] is one socket in one namespace. What it makes is described by a plain struct ([`Bridge`],
//! [`VethPair`], [`VxlanDevice`], [`Route`] …), sent as one message, and read back where the kernel chose something
//! (index, MAC). What it reads comes as [`Link`], [`Route`], [`Neighbour`] …; a dump that the kernel reports as
//! interrupted is read again, because a reconciler that trusts half a dump deletes live entries. Many changes of
//! tables at once go through [`Netlink::apply`]. [`NetNs`] opens
//! namespaces and runs work inside one, on a thread of its own. Every error carries the kernel's number and its
//! own words ([`NetlinkError`]).
//!
//! Deciding what the kernel should hold is left to the callers. Start reading at `socket.rs`.

mod address;
mod batch;
mod error;
#[cfg(test)]
mod fuzz;
mod link;
mod mac;
mod neighbour;
mod netfilter;
mod netns;
mod qdisc;
mod removal;
mod route;
mod socket;

pub use address::AddressOptions;
pub use batch::{Change, Refused};
pub use error::NetlinkError;
pub use link::{
    Bridge, BridgePort, IfbDevice, Link, LinkKind, PacketSizes, PortVlan, VethPair, Vxlan,
    VxlanDevice,
};
pub use mac::{mac_text, parse_mac, parse_unicast_mac};
pub use neighbour::{FdbEntry, Neighbour};
pub use netfilter::{nft_chain_exists, nft_ip_chain_exists, nft_ip6_chain_exists};
pub use netns::{NetNs, Started};
pub use qdisc::{SeenTokenBucket, TokenBucket};
pub use route::{Route, RouteFilter};
pub use socket::Netlink;

/// A MAC as the kernel keeps it.
pub type MacBytes = [u8; 6];
