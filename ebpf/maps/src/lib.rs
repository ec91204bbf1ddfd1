//! What the eBPF programs, the agent and the `policy` plugin share, in Rust.
//!
//! Twins of the structs in `ebpf/progs/include/maps.h`, which says how they work together; a test of the loader compares
//! the two through BTF. [`Reason`] is the twin of `reasons.h`. Types only.
//!
//! Addresses and ports are in network byte order in the kernel; the constructors take Rust's types.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

mod reason;
mod services;

pub use reason::{Direction, Loss, Reason};
pub use services::{
    Backend, BackendKey, Frontend, FrontendKey, MAX_BACKENDS, MAX_FRONTENDS, MAX_POD_NAMESPACES,
    Member, SERVICES_VERSION,
};

/// Part of the pin folder's name: programs and maps of one layout belong together.
pub const LAYOUT_VERSION: u32 = 4;
/// Endpoints of one node.
pub const MAX_ENDPOINTS: u32 = 4096;
/// Numbers of rule tables are below this; 0 stands for none.
pub const MAX_TABLES: u32 = 8192;
/// Numbers of class maps are below this; 0 stands for none.
pub const MAX_CLASS_MAPS: u32 = 64;
/// Entries of one class map.
pub const MAX_CLASS_ENTRIES: u32 = 262_144;
/// Entries of one rule table.
pub const MAX_RULE_ENTRIES: u32 = 262_144;
/// Class of an address that no entry covers.
pub const CLASS_NONE: u32 = 0;
/// Prefix length of a rule for all protocols and ports.
pub const ANY_PROTOCOL: u32 = 40;
/// Prefix length of a rule for all ports of one protocol.
pub const ANY_PORT: u32 = 48;
/// Prefix length of a rule for one port.
pub const ONE_PORT: u32 = 64;

/// States of an [`Endpoint`].
pub mod state {
    /// Made by the plugin; nobody has said what applies.
    pub const PENDING: u8 = 1;
    /// The agent has said what applies.
    pub const READY: u8 = 2;
    /// Its policy does not fit into maps.
    pub const LOCKED: u8 = 3;
}

/// [`Endpoint::flags`]: policies apply to what comes to the pod.
pub const ISOLATED_INGRESS: u8 = 0x01;
/// [`Endpoint::flags`]: policies apply to what the pod sends.
pub const ISOLATED_EGRESS: u8 = 0x02;

/// [`Address::flags`]: this node's own.
pub const ADDRESS_NODE: u32 = 0x01;
/// [`Address::flags`]: gets translated, and is judged after that.
pub const ADDRESS_SERVICE: u32 = 0x02;
/// [`Address::flags`]: another node of the cluster.
pub const ADDRESS_REMOTE_NODE: u32 = 0x04;

/// In a packet's mark, by a rule of nftables: its connection is known and not translated.
pub const MARK_PLAIN: u32 = 0x0200;

/// One pod.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Endpoint {
    /// New for every attachment.
    pub uid: u32,
    /// 1..=65535: stands for the endpoint in packet marks.
    pub slot: u32,
    /// Grows with every change of what applies.
    pub generation: u32,
    /// Number in `class_maps`.
    pub class_map: u32,
    /// Number in `tables`.
    pub table: u32,
    /// IPv4 address of the pod, network byte order; 0 if it has none.
    pub addr: u32,
    /// MAC of the pod's end.
    pub mac: [u8; 6],
    /// One of [`state`].
    pub state: u8,
    /// [`ISOLATED_INGRESS`], [`ISOLATED_EGRESS`].
    pub flags: u8,
    /// Of the policies that are in force.
    pub revision: u64,
    /// IPv6 address of the pod; 0 if it has none.
    pub addr6: [u8; 16],
}

/// Value of `endpoints`: an endpoint, and by what a program knows that it has read it whole (`maps.h` says why).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointRow {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The key: index of the host end of its veth.
    pub link: u32,
    /// Zero.
    pub pad: u32,
    /// Of all before it.
    pub check: u64,
}

/// Weights of a row's words in [`EndpointRow::check`].
const ROW_WEIGHTS: [u64; 8] = [
    0x9e37_79b9_7f4a_7c15,
    0xbf58_476d_1ce4_e5b9,
    0x94d0_49bb_1331_11eb,
    0xd6e8_feb8_6659_fd93,
    0xa076_1d64_78bd_642f,
    0xe703_7ed1_a0b4_28db,
    0x8ebc_6af0_9c88_c6e3,
    0x5899_65cc_7537_4cc3,
];

impl EndpointRow {
    /// The row of an endpoint behind a link.
    #[must_use]
    pub fn new(link: u32, endpoint: Endpoint) -> Self {
        let pair = |low: u32, high: u32| {
            let ([a, b, c, d], [e, f, g, h]) = (low.to_ne_bytes(), high.to_ne_bytes());
            u64::from_ne_bytes([a, b, c, d, e, f, g, h])
        };
        let [a, b, c, d, e, f] = endpoint.mac;
        let mut halves = endpoint.addr6.as_chunks().0.iter().map(|half| u64::from_ne_bytes(*half));
        let words = [
            pair(endpoint.uid, endpoint.slot),
            pair(endpoint.generation, endpoint.class_map),
            pair(endpoint.table, endpoint.addr),
            u64::from_ne_bytes([a, b, c, d, e, f, endpoint.state, endpoint.flags]),
            endpoint.revision,
            halves.next().unwrap_or_default(),
            halves.next().unwrap_or_default(),
            pair(link, 0),
        ];
        let check = words
            .iter()
            .zip(ROW_WEIGHTS)
            .fold(0_u64, |sum, (word, weight)| sum.wrapping_add(word.wrapping_mul(weight)));
        Self { endpoint, link, pad: 0, check }
    }
}

/// Bits of a [`ClassKey`] before the address.
pub const FAMILY_BITS: u32 = 32;
/// Number of IPv4 in keys.
pub const FAMILY_IPV4: u8 = 4;
/// Number of IPv6 in keys.
pub const FAMILY_IPV6: u8 = 6;

/// An address as keys have it, with the number of its family. IPv4 is the first four bytes.
#[must_use]
pub fn in_key(addr: IpAddr) -> (u8, [u8; 16]) {
    match addr {
        IpAddr::V4(addr) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&addr.octets());
            (FAMILY_IPV4, bytes)
        }
        IpAddr::V6(addr) => (FAMILY_IPV6, addr.octets()),
    }
}

/// The address that a key has.
#[must_use]
pub fn from_key(family: u8, bytes: [u8; 16]) -> IpAddr {
    let [a, b, c, d, ..] = bytes;
    if family == FAMILY_IPV6 {
        Ipv6Addr::from(bytes).into()
    } else {
        Ipv4Addr::new(a, b, c, d).into()
    }
}

/// Key of a class map and of `addresses`. The value of a class map is the peer class, a `u32`.
///
/// In aya's `LpmTrie<K, V>` it is a `Key<AddressData>`: prefix length and data.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassKey {
    /// [`FAMILY_BITS`] and 0..=32 or 0..=128 of the address.
    pub prefix_len: u32,
    /// Family and address.
    pub data: AddressData,
}

/// An address of one of the families.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressData {
    /// [`FAMILY_IPV4`] or [`FAMILY_IPV6`].
    pub family: u32,
    /// As [`in_key`] makes it.
    pub addr: [u8; 16],
}

impl ClassKey {
    /// The key of a network.
    #[must_use]
    pub fn new(network: impl Into<IpAddr>, prefix_len: u8) -> Self {
        let (family, addr) = in_key(network.into());
        let data = AddressData { family: family.into(), addr };
        Self { prefix_len: FAMILY_BITS + u32::from(prefix_len), data }
    }

    /// The key of one address.
    #[must_use]
    pub fn host(addr: impl Into<IpAddr>) -> Self {
        let addr = addr.into();
        Self::new(addr, if addr.is_ipv4() { 32 } else { 128 })
    }

    /// The network and its prefix length.
    #[must_use]
    pub fn network(self) -> (IpAddr, u32) {
        let family =
            if self.data.family == u32::from(FAMILY_IPV6) { FAMILY_IPV6 } else { FAMILY_IPV4 };
        (from_key(family, self.data.addr), self.prefix_len.saturating_sub(FAMILY_BITS))
    }
}

/// Key of a rule table without the prefix length.
///
/// A lookup finds the longest prefix; class and direction are always whole, so prefix lengths are [`ANY_PROTOCOL`],
/// [`ANY_PORT`], or up to [`ONE_PORT`] for a prefix of ports. A class either has no entry at all in a direction, and then
/// [`CLASS_NONE`] is asked, or all its answers are its own: it then has an [`ANY_PROTOCOL`] entry. Nothing found means
/// denied.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleKey {
    /// 40..=64.
    pub prefix_len: u32,
    /// The peer's class.
    pub peer_class: u32,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// IP protocol; 0 with [`ANY_PROTOCOL`].
    pub protocol: u8,
    /// Destination port, network byte order; 0 with [`ANY_PORT`].
    pub port: u16,
}

impl RuleKey {
    /// Every protocol and port.
    #[must_use]
    pub fn any(peer_class: u32, direction: Direction) -> Self {
        let direction = direction as u8;
        Self { prefix_len: ANY_PROTOCOL, peer_class, direction, protocol: 0, port: 0 }
    }

    /// Every port of one protocol.
    #[must_use]
    pub fn protocol(peer_class: u32, direction: Direction, protocol: u8) -> Self {
        Self { prefix_len: ANY_PORT, protocol, ..Self::any(peer_class, direction) }
    }

    /// Ports whose first `bits` bits are those of `port`; the others have to be 0 in it.
    #[must_use]
    pub fn ports(peer_class: u32, direction: Direction, protocol: u8, port: u16, bits: u8) -> Self {
        let prefix_len = ANY_PORT + u32::from(bits.min(16));
        Self { prefix_len, port: port.to_be(), ..Self::protocol(peer_class, direction, protocol) }
    }
}

/// What a rule says.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Dropped.
    Deny = 0,
    /// Passes.
    Allow = 1,
}

/// Value of a rule table.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Which policy and rule decided, as the compiler numbers them; 0 = none (the default of an isolated pod).
    pub id: u32,
    /// [`Action`] as a number.
    pub action: u8,
    /// Zero.
    pub pad: [u8; 3],
}

impl Rule {
    /// A rule.
    #[must_use]
    pub fn new(id: u32, action: Action) -> Self {
        Self { id, action: action as u8, pad: [0; 3] }
    }
}

/// What an address is to this node.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Address {
    /// [`ADDRESS_NODE`], [`ADDRESS_SERVICE`], [`ADDRESS_REMOTE_NODE`].
    pub flags: u32,
}

/// A flow as one endpoint sees it: one key for its packets in both directions.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FlowKey {
    /// Of the endpoint.
    pub uid: u32,
    /// The other end, as [`in_key`] makes it.
    pub remote: [u8; 16],
    /// Port of the endpoint, network byte order.
    pub local_port: u16,
    /// Port of the other end.
    pub remote_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Of the addresses.
    pub family: u8,
    /// Which of its addresses the endpoint has there: 0 for the one that it was given.
    pub local: u8,
    /// Zero.
    pub pad: u8,
}

/// [`Leg::flags`]: a TCP connection whose beginning was not seen, allowed as long as both sides may open it.
pub const FLOW_EITHER: u8 = 0x02;

/// What is known of a flow that was opened in one direction.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leg {
    /// When its last packet passed, by the programs' clock; 0 if none has since user space told of the flow.
    pub last: u32,
    /// Of the endpoint, when the flow was judged.
    pub generation: u32,
    /// All that were seen.
    pub tcp_flags: u8,
    /// Bit 0: the destination gets translated; the packets are judged again after that. [`FLOW_EITHER`].
    pub flags: u8,
    /// 0: nobody has opened it in this direction.
    pub is_open: u8,
    /// Zero.
    pub pad: u8,
}

impl Flow {
    /// One that was opened in this direction, before the programs saw anything of it.
    #[must_use]
    pub fn opened(direction: Direction, generation: u32) -> Self {
        let mut flow = Self::default();
        flow.legs[direction as usize] = Leg { generation, is_open: 1, ..Leg::default() };
        flow
    }
}

/// What is known of a flow, by the [`Direction`] in which it was opened.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flow {
    /// Both sides may open the same flow.
    pub legs: [Leg; 2],
}

/// A flow was dropped, or opened.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// `CLOCK_MONOTONIC`.
    pub time_ns: u64,
    /// Of the endpoint.
    pub uid: u32,
    /// Host end of its veth.
    pub ifindex: u32,
    /// Source, as [`in_key`] makes it.
    pub saddr: [u8; 16],
    /// Destination.
    pub daddr: [u8; 16],
    /// Source port, network byte order.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// IP protocol.
    pub protocol: u8,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// [`Reason`] as a number.
    pub reason: u8,
    /// Of the addresses; 0 if the packet was none of IP.
    pub family: u8,
    /// The rule that decided, 0 if none.
    pub rule: u32,
    /// Class of the other end.
    pub peer_class: u32,
}

/// The agent's settings.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// [`LAYOUT_VERSION`] once the agent has filled everything.
    pub version: u32,
    /// Network byte order.
    pub vxlan_port: u16,
    /// Whether programs of a build with another layout are behind ours, and know the pods that we do not yet.
    pub has_former: u8,
    /// Zero.
    pub pad: u8,
}

impl Config {
    /// Of an overlay with this port.
    #[must_use]
    pub const fn new(vxlan_port: u16, has_former: bool) -> Self {
        let (vxlan_port, has_former) = (vxlan_port.to_be(), has_former as u8);
        Self { version: LAYOUT_VERSION, vxlan_port, has_former, pad: 0 }
    }
}

#[cfg(feature = "aya")]
mod pod {
    use super::{
        Address, AddressData, Backend, BackendKey, Config, Endpoint, EndpointRow, Event, Flow,
        FlowKey, Frontend, FrontendKey, Leg, Member, Rule,
    };

    macro_rules! pod {
        ($($name:ident)+) => { $(
            // SAFETY: `repr(C)`, of integers only, and without implicit padding, which the layout test checks.
            unsafe impl aya::Pod for $name {}
        )+ };
    }
    pod!(Address AddressData Config Endpoint EndpointRow Event Flow FlowKey Leg Rule);
    pod!(Backend BackendKey Frontend FrontendKey Member);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_keys_have_whole_prefixes() {
        assert_eq!(RuleKey::any(7, Direction::Egress).prefix_len, 40);
        let https = RuleKey::ports(7, Direction::Ingress, 6, 443, 16);
        assert_eq!((https.prefix_len, https.port), (ONE_PORT, 443_u16.to_be()));
        assert_eq!(RuleKey::ports(7, Direction::Ingress, 6, 0x8000, 1).prefix_len, 49);
    }

    #[test]
    fn a_class_key_reads_back() {
        let key = ClassKey::new(Ipv4Addr::new(10, 244, 1, 0), 24);
        assert_eq!(key.network(), ("10.244.1.0".parse().expect("an address"), 24));
        assert_eq!(key.prefix_len, 56, "the family counts");
        let key = ClassKey::host(Ipv6Addr::LOCALHOST);
        assert_eq!(key.network(), (Ipv6Addr::LOCALHOST.into(), 128));
    }
}
