//! How large an IPv4 packet may be before it is cut into frames, one size for each link: beyond 64 KiB that is BIG TCP
//! (Linux 6.3).
//!
//! A TCP sender asks the link of its route (`gso`). Each link on the way cuts in software what is larger than it takes;
//! one that receives frames joins them up to `gro`. IPv6 has sizes of its own, which stay as they are.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkAttribute;

use super::link_message;
use crate::socket::{attribute, read_u32};
use crate::{Netlink, NetlinkError};

// `linux/if_link.h`.
const IFLA_TSO_MAX_SIZE: u16 = 59;
const IFLA_GSO_IPV4_MAX_SIZE: u16 = 63;
const IFLA_GRO_IPV4_MAX_SIZE: u16 = 64;

/// Sizes in bytes; 0 is what the kernel does not know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PacketSizes {
    /// Sent.
    pub gso: u32,
    /// Joined when received.
    pub gro: u32,
    /// The largest that can be set.
    pub limit: u32,
}

impl PacketSizes {
    /// That of every link without BIG TCP (`GSO_LEGACY_MAX_SIZE`).
    pub const PLAIN: u32 = 65_536;
    /// What links that are no hardware can take (`GSO_MAX_SIZE`): eight times as many bytes.
    pub const LARGEST: u32 = 8 * 65_535;

    pub(super) fn parse(attributes: &[u8]) -> Self {
        let number = |kind| attribute(attributes, kind).and_then(|value| read_u32(value, 0));
        Self {
            gso: number(IFLA_GSO_IPV4_MAX_SIZE).unwrap_or_default(),
            gro: number(IFLA_GRO_IPV4_MAX_SIZE).unwrap_or_default(),
            limit: number(IFLA_TSO_MAX_SIZE).unwrap_or_default(),
        }
    }

    /// Whether one of them is larger.
    #[must_use]
    pub fn exceed(self, bytes: u32) -> bool {
        self.gso.max(self.gro) > bytes
    }

    /// Whether one of them is smaller.
    #[must_use]
    pub fn fall_short_of(self, bytes: u32) -> bool {
        self.gso.min(self.gro) < bytes
    }

    /// Whether there is BIG TCP on this link.
    #[must_use]
    pub fn are_large(self) -> bool {
        self.exceed(Self::PLAIN)
    }
}

impl Netlink {
    /// Sets the sizes of a link. What the senders of connections that live were told before counts for them until they
    /// look their route up again.
    ///
    /// # Errors
    /// If the kernel refuses, as it does beyond the link's limit.
    pub fn set_packet_sizes(&self, index: u32, bytes: u32) -> Result<(), NetlinkError> {
        let mut message = link_message(index);
        message.attributes =
            vec![LinkAttribute::GsoIpv4MaxSize(bytes), LinkAttribute::GroIpv4MaxSize(bytes)];
        let request = || format!("set packet sizes of link {index} to {bytes}");
        self.change(0, RouteNetlinkMessage::SetLink(message), request)
    }
}
