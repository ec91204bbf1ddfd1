//! Forgetting flows.
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

/// How many flows there are.
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_…` (`linux/netfilter/nfnetlink_conntrack.h`).
const GET: u16 = 0x0101;
const DELETE: u16 = 0x0102;
const FLAG_REQUEST: u16 = 0x1;
const FLAG_ACK: u16 = 0x4;
const FLAG_DUMP: u16 = 0x300;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const FILTER: u16 = 25;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const IP_V4_SOURCE: u16 = 1;
const IP_V4_DESTINATION: u16 = 2;
const IP_V6_SOURCE: u16 = 3;
const IP_V6_DESTINATION: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const PROTOCOL_DESTINATION_PORT: u16 = 3;
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
struct Flow {
    protocol: u8,
    /// What its client sends to.
    to: SocketAddr,
    /// Who answers.
    answers: IpAddr,
    /// The original tuple as the kernel wrote it, to name the flow in a deletion.
    tuple: Vec<u8>,
    /// Tells this flow from a later one of the same tuple.
    id: Option<[u8; 4]>,
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
            Self::AnsweredBy(address) => *address == flow.answers,
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

/// Makes the kernel forget flows, in the namespace of the calling thread; says how many. A kernel without conntrack has
/// none.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn forget_flows(which: &[Flows]) -> io::Result<usize> {
    if which.is_empty() {
        return Ok(0);
    }
    // The number is that of the calling thread's namespace.
    if fs::read(COUNT).is_ok_and(|count| count.trim_ascii() == b"0") {
        return Ok(0);
    }
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    let mut gone = 0;
    let mut sequence = 0;
    for v4 in [true, false] {
        let same: Vec<&Flows> = which.iter().filter(|one| one.address().is_ipv4() == v4).collect();
        let Some(first) = same.first() else { continue };
        sequence += 1;
        // Each look walks the whole table, which takes the kernel milliseconds, so there is one for all.
        let filter = if same.len() == 1 { first.filter() } else { Vec::new() };
        for flow in list(&socket, first.address(), &filter, &same, sequence)? {
            sequence += 1;
            gone += usize::from(delete(&socket, first.address(), &flow, sequence)?);
        }
    }
    Ok(gone)
}

fn family(address: IpAddr) -> u8 {
    // `AF_INET`, `AF_INET6`.
    if address.is_ipv4() { 2 } else { 10 }
}

fn list(
    socket: &Socket,
    address: IpAddr,
    filter: &[u8],
    which: &[&Flows],
    sequence: u32,
) -> io::Result<Vec<Flow>> {
    let request = message(GET, FLAG_REQUEST | FLAG_DUMP, sequence, (family(address), 0), filter);
    let mut found = Vec::new();
    let listed = exchange(socket, &request, sequence, &mut |payload| {
        found.extend(parse(payload).filter(|flow| which.iter().any(|flows| flows.has(flow))));
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
fn delete(socket: &Socket, address: IpAddr, flow: &Flow, sequence: u32) -> io::Result<bool> {
    let mut attributes = Vec::new();
    put_nested(&mut attributes, TUPLE_ORIGINAL, |out| out.extend(&flow.tuple));
    if let Some(id) = flow.id {
        put(&mut attributes, ID, &id);
    }
    let request =
        message(DELETE, FLAG_REQUEST | FLAG_ACK, sequence, (family(address), 0), &attributes);
    match exchange(socket, &request, sequence, &mut |_| {}) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn parse(entry: &[u8]) -> Option<Flow> {
    let original = attribute(entry, TUPLE_ORIGINAL)?;
    let reply = attribute(entry, TUPLE_REPLY)?;
    let protocol = attribute(original, TUPLE_PROTOCOL)?;
    let port = attribute(protocol, PROTOCOL_DESTINATION_PORT)
        .and_then(|port| port.first_chunk())
        .map_or(0, |port| u16::from_be_bytes(*port));
    let to = ip(original, IP_V4_DESTINATION, IP_V6_DESTINATION)?;
    Some(Flow {
        protocol: *attribute(protocol, PROTOCOL_NUMBER)?.first()?,
        to: SocketAddr::new(to, port),
        answers: ip(reply, IP_V4_SOURCE, IP_V6_SOURCE)?,
        tuple: original.to_vec(),
        id: attribute(entry, ID).and_then(|id| id.first_chunk().copied()),
    })
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
        Flow {
            protocol,
            to: to.parse().expect("address"),
            answers: answers.parse().expect("address"),
            tuple: Vec::new(),
            id: None,
        }
    }

    #[test]
    fn only_the_flows_that_are_meant_are_found() {
        let dns = Flows::To { protocol: 17, address: Ipv4Addr::UNSPECIFIED.into(), port: 53 };
        assert!(dns.has(&flow(17, "192.0.2.1:53", "10.1.0.2")));
        assert!(!dns.has(&flow(6, "192.0.2.1:53", "10.1.0.2")));
        assert!(!dns.has(&flow(17, "192.0.2.1:54", "10.1.0.2")));
        let there =
            Flows::To { protocol: 17, address: Ipv4Addr::new(192, 0, 2, 9).into(), port: 53 };
        assert!(!there.has(&flow(17, "192.0.2.1:53", "10.1.0.2")));
        let pod = Flows::AnsweredBy(Ipv4Addr::new(10, 1, 0, 2).into());
        assert!(pod.has(&flow(6, "192.0.2.1:80", "10.1.0.2")));
        assert!(!pod.has(&flow(6, "10.1.0.2:80", "10.1.0.3")));
    }

    #[test]
    fn damaged_entries_are_none() {
        assert!(parse(&[8, 0, 1, 0, 1, 2, 3, 4]).is_none());
        assert!(parse(&[]).is_none());
    }
}
