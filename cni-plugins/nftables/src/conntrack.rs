//! What conntrack remembers: forgetting flows, being lenient with them, and how full its table is.
//!
//! NAT decides once per flow, and conntrack goes on with it: a flow that led to a pod that is gone leads there for as
//! long as its client keeps sending. Who changes what a flow should lead to makes the kernel forget it.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::netfilter::exchange;
use crate::wire::{attribute, message, put, put_nested};

/// How many flows there are, and how many there may be; the number is that of the calling thread's namespace, the limit
/// is one for all.
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
const LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_…` (`linux/netfilter/nfnetlink_conntrack.h`).
const UPDATE: u16 = 0x0100;
const GET: u16 = 0x0101;
const DELETE: u16 = 0x0102;
const GET_COUNTERS: u16 = 0x0104;
const FLAG_REQUEST: u16 = 0x1;
const FLAG_ACK: u16 = 0x4;
const FLAG_DUMP: u16 = 0x300;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const PROTOCOL_INFO: u16 = 4;
const ID: u16 = 12;
const FILTER: u16 = 25;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const IP_V4_SOURCE: u16 = 1;
const IP_V4_DESTINATION: u16 = 2;
const IP_V6_SOURCE: u16 = 3;
const IP_V6_DESTINATION: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const PROTOCOL_SOURCE_PORT: u16 = 2;
const PROTOCOL_DESTINATION_PORT: u16 = 3;
/// `CTA_PROTOINFO_…`: what conntrack knows of a TCP connection, and flags of each of its directions.
const INFO_TCP: u16 = 1;
const INFO_TCP_FLAGS: [u16; 2] = [4, 5];
/// `IP_CT_TCP_FLAG_BE_LIBERAL`.
const BE_LIBERAL: u8 = 0x08;
const TCP: u8 = 6;
/// `CTA_STATS_DROP`: packets that would have begun a flow.
const COUNTER_DROP: u16 = 10;
const FILTER_ORIGINAL_FLAGS: u16 = 1;
const FILTER_REPLY_FLAGS: u16 = 2;
const FILTER_BY_SOURCE: u32 = 1;
const FILTER_BY_PROTOCOL: u32 = 1 << 3;
const FILTER_BY_DESTINATION_PORT: u32 = 1 << 5;

/// Which flows are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flows {
    /// Those that pods or clients began to this port of this host, at this address or at any.
    To {
        /// Number of the protocol.
        protocol: u8,
        /// Address, or every one of the family.
        address: IpAddr,
        /// Port.
        port: u16,
    },
    /// Those that this address answers.
    AnsweredBy(IpAddr),
}

/// A flow of the kernel's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// Number of its protocol.
    pub protocol: u8,
    /// What its client sends to.
    pub to: SocketAddr,
    /// Who answers; the same if nothing was translated.
    pub answers: SocketAddr,
    /// The original tuple as the kernel wrote it, to name the flow in a deletion.
    tuple: Vec<u8>,
    /// Tells this flow from a later one of the same tuple.
    id: Option<[u8; 4]>,
}

impl Flow {
    /// One as it would look in the table.
    #[must_use]
    pub fn new(protocol: u8, to: SocketAddr, answers: SocketAddr) -> Self {
        Self { protocol, to, answers, tuple: Vec::new(), id: None }
    }
}

impl Flows {
    fn address(&self) -> IpAddr {
        match self {
            Self::To { address, .. } | Self::AnsweredBy(address) => *address,
        }
    }

    fn has(&self, flow: &Flow) -> bool {
        match self {
            Self::To { protocol, address, port } => {
                (*protocol, *port) == (flow.protocol, flow.to.port())
                    && (address.is_unspecified() || *address == flow.to.ip())
            }
            Self::AnsweredBy(address) => *address == flow.answers.ip(),
        }
    }

    /// The same for the kernel, so that it does not send the whole table. Kernels before 5.8 do, so the answer is looked
    /// through all the same.
    fn filter(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let (original, reply) = match self {
            Self::To { protocol, port, .. } => {
                put_nested(&mut out, TUPLE_ORIGINAL, |out| {
                    put_nested(out, TUPLE_PROTOCOL, |out| {
                        put(out, PROTOCOL_NUMBER, &[*protocol]);
                        put(out, PROTOCOL_DESTINATION_PORT, &port.to_be_bytes());
                    });
                });
                (FILTER_BY_PROTOCOL | FILTER_BY_DESTINATION_PORT, 0)
            }
            Self::AnsweredBy(address) => {
                put_nested(&mut out, TUPLE_REPLY, |out| {
                    put_nested(out, TUPLE_IP, |out| match address {
                        IpAddr::V4(address) => put(out, IP_V4_SOURCE, &address.octets()),
                        IpAddr::V6(address) => put(out, IP_V6_SOURCE, &address.octets()),
                    });
                });
                (0, FILTER_BY_SOURCE)
            }
        };
        put_nested(&mut out, FILTER, |out| {
            put(out, FILTER_ORIGINAL_FLAGS, &u32::to_ne_bytes(original));
            put(out, FILTER_REPLY_FLAGS, &u32::to_ne_bytes(reply));
        });
        out
    }
}

/// How full the table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Flows of this namespace.
    pub flows: u64,
    /// So many may there be in each.
    pub limit: u64,
    /// Packets dropped in this namespace because they would have been one more.
    pub dropped: u64,
}

impl Usage {
    /// That of the calling thread's namespace; `None` without conntrack.
    #[must_use]
    pub fn observe() -> Option<Self> {
        let number = |file| fs::read_to_string(file).ok()?.trim().parse().ok();
        Some(Self { flows: number(COUNT)?, limit: number(LIMIT)?, dropped: dropped().ok()? })
    }

    /// Whether at least so much of the table is taken. A limit of 0 is none.
    #[must_use]
    pub const fn is_taken(&self, percent: u64) -> bool {
        self.limit > 0 && self.flows.saturating_mul(100) >= self.limit.saturating_mul(percent)
    }
}

/// The sum of what each CPU counted.
fn dropped() -> io::Result<u64> {
    let request = message(GET_COUNTERS, FLAG_REQUEST | FLAG_DUMP, 1, (0, 0), &[]);
    let mut sum = 0;
    exchange(&open()?, &request, 1, &mut |counters| {
        let count = attribute(counters, COUNTER_DROP).and_then(|count| count.first_chunk());
        sum += count.map_or(0, |count| u64::from(u32::from_be_bytes(*count)));
    })?;
    Ok(sum)
}

/// Makes the kernel forget flows, in the namespace of the calling thread; says how many. A kernel without conntrack has
/// none.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn forget_flows(which: &[Flows]) -> io::Result<usize> {
    let mut gone = 0;
    for ipv4 in [true, false] {
        let same: Vec<&Flows> =
            which.iter().filter(|one| one.address().is_ipv4() == ipv4).collect();
        let Some(first) = same.first() else { continue };
        // Each look walks the whole table, which takes the kernel milliseconds, so there is one for all.
        let filter = if same.len() == 1 { first.filter() } else { Vec::new() };
        gone += forget(ipv4, &filter, |flow| same.iter().any(|flows| flows.has(flow)))?;
    }
    Ok(gone)
}

/// The same for the flows of a family that somebody else judges.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn forget_flows_that(ipv4: bool, stale: impl Fn(&Flow) -> bool) -> io::Result<usize> {
    forget(ipv4, &[], stale)
}

/// Makes the kernel bear that it has not seen all packets of the TCP connections that it knows now, as long as each of them
/// lives: what `nf_conntrack_tcp_be_liberal` says to all. In the namespace of the calling thread; says how many there are.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn bear_gaps() -> io::Result<usize> {
    let mut done = 0;
    for ipv4 in [true, false] {
        done += for_each(ipv4, &[], |flow| flow.protocol == TCP, be_liberal)?;
    }
    Ok(done)
}

fn forget(ipv4: bool, filter: &[u8], stale: impl Fn(&Flow) -> bool) -> io::Result<usize> {
    for_each(ipv4, filter, stale, delete)
}

/// Does something with those flows of a family that are wanted; says for how many it was done.
fn for_each(
    ipv4: bool,
    filter: &[u8],
    wanted: impl Fn(&Flow) -> bool,
    act: impl Fn(&Socket, u8, &Flow, u32) -> io::Result<bool>,
) -> io::Result<usize> {
    if fs::read(COUNT).is_ok_and(|count| count.trim_ascii() == b"0") {
        return Ok(0);
    }
    let socket = open()?;
    // `AF_INET`, `AF_INET6`.
    let family = if ipv4 { 2 } else { 10 };
    let mut sequence = 1;
    let mut done = 0;
    for flow in list(&socket, family, filter, wanted, sequence)? {
        sequence += 1;
        done += usize::from(act(&socket, family, &flow, sequence)?);
    }
    Ok(done)
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn list(
    socket: &Socket,
    family: u8,
    filter: &[u8],
    wanted: impl Fn(&Flow) -> bool,
    sequence: u32,
) -> io::Result<Vec<Flow>> {
    let request = message(GET, FLAG_REQUEST | FLAG_DUMP, sequence, (family, 0), filter);
    let mut found = Vec::new();
    let listed = exchange(socket, &request, sequence, &mut |payload| {
        found.extend(parse(payload).filter(&wanted));
    });
    match listed {
        // The answer to a message of a part of netfilter that the kernel does not have.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
        Ok(_) => Ok(found),
    }
}

/// False: the flow was gone already.
fn delete(socket: &Socket, family: u8, flow: &Flow, sequence: u32) -> io::Result<bool> {
    let mut attributes = named(flow);
    if let Some(id) = flow.id {
        put(&mut attributes, ID, &id);
    }
    change(socket, DELETE, family, &attributes, sequence)
}

/// False: the flow was gone already.
fn be_liberal(socket: &Socket, family: u8, flow: &Flow, sequence: u32) -> io::Result<bool> {
    let mut attributes = named(flow);
    put_nested(&mut attributes, PROTOCOL_INFO, |out| {
        put_nested(out, INFO_TCP, |out| {
            for direction in INFO_TCP_FLAGS {
                // `struct nf_ct_tcp_flags`: flags, and which of them are meant.
                put(out, direction, &[BE_LIBERAL; 2]);
            }
        });
    });
    change(socket, UPDATE, family, &attributes, sequence)
}

fn named(flow: &Flow) -> Vec<u8> {
    let mut attributes = Vec::new();
    put_nested(&mut attributes, TUPLE_ORIGINAL, |out| out.extend(&flow.tuple));
    attributes
}

fn change(
    socket: &Socket,
    kind: u16,
    family: u8,
    attributes: &[u8],
    sequence: u32,
) -> io::Result<bool> {
    let request = message(kind, FLAG_REQUEST | FLAG_ACK, sequence, (family, 0), attributes);
    match exchange(socket, &request, sequence, &mut |_| {}) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn parse(entry: &[u8]) -> Option<Flow> {
    let original = attribute(entry, TUPLE_ORIGINAL)?;
    let reply = attribute(entry, TUPLE_REPLY)?;
    let to = ip(original, IP_V4_DESTINATION, IP_V6_DESTINATION)?;
    let answers = ip(reply, IP_V4_SOURCE, IP_V6_SOURCE)?;
    Some(Flow {
        protocol: *attribute(attribute(original, TUPLE_PROTOCOL)?, PROTOCOL_NUMBER)?.first()?,
        to: SocketAddr::new(to, port(original, PROTOCOL_DESTINATION_PORT)),
        answers: SocketAddr::new(answers, port(reply, PROTOCOL_SOURCE_PORT)),
        tuple: original.to_vec(),
        id: attribute(entry, ID).and_then(|id| id.first_chunk().copied()),
    })
}

/// 0 for protocols without.
fn port(tuple: &[u8], which: u16) -> u16 {
    let port = attribute(tuple, TUPLE_PROTOCOL).and_then(|protocol| attribute(protocol, which));
    port.and_then(|port| port.first_chunk()).map_or(0, |port| u16::from_be_bytes(*port))
}

fn ip(tuple: &[u8], v4: u16, v6: u16) -> Option<IpAddr> {
    let ip = attribute(tuple, TUPLE_IP)?;
    let four = attribute(ip, v4).and_then(|ip| ip.first_chunk::<4>());
    let six = attribute(ip, v6).and_then(|ip| ip.first_chunk::<16>());
    match (four, six) {
        (Some(four), _) => Some(Ipv4Addr::from(*four).into()),
        (None, Some(six)) => Some(Ipv6Addr::from(*six).into()),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(protocol: u8, to: &str, answers: &str) -> Flow {
        Flow::new(protocol, to.parse().expect("address"), answers.parse().expect("address"))
    }

    #[test]
    fn only_the_flows_that_are_meant_are_found() {
        let dns = Flows::To { protocol: 17, address: Ipv4Addr::UNSPECIFIED.into(), port: 53 };
        assert!(dns.has(&flow(17, "192.0.2.1:53", "10.1.0.2:53")));
        assert!(!dns.has(&flow(6, "192.0.2.1:53", "10.1.0.2:53")));
        assert!(!dns.has(&flow(17, "192.0.2.1:54", "10.1.0.2:53")));
        let there =
            Flows::To { protocol: 17, address: Ipv4Addr::new(192, 0, 2, 9).into(), port: 53 };
        assert!(!there.has(&flow(17, "192.0.2.1:53", "10.1.0.2:53")));
        let pod = Flows::AnsweredBy(Ipv4Addr::new(10, 1, 0, 2).into());
        assert!(pod.has(&flow(6, "192.0.2.1:80", "10.1.0.2:53")));
        assert!(!pod.has(&flow(6, "10.1.0.2:80", "10.1.0.3:53")));
    }

    #[test]
    fn damaged_entries_are_none() {
        assert!(parse(&[8, 0, 1, 0, 1, 2, 3, 4]).is_none());
        assert!(parse(&[]).is_none());
    }
}
