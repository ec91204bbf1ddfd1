//! What the program at a pod's way out should make of a frame, byte by byte, written from the RFCs (791, 768, 793, 792, 826)
//! and from what ebpf/progs says it does. Shares nothing with the C.

mod ipv6;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use ipv6::link_local;

/// The pod behind the link, and what it may reach.
#[derive(Debug, Clone)]
pub struct Sender {
    pub mac: [u8; 6],
    pub ip: Ipv4Addr,
    pub ip6: Ipv6Addr,
    /// Whether policy allows it to send there: address, IP protocol, destination port (0 for what has none).
    pub may_reach: fn(IpAddr, u8, u16) -> bool,
    /// Ports of first fragments by source, destination, id and protocol.
    fragments: HashMap<(Ipv4Addr, Ipv4Addr, u16, u8), (u16, u16)>,
    /// The same of IPv6, where the protocol is known from the first fragment only: protocol and ports by source,
    /// destination and id.
    fragments6: HashMap<(Ipv6Addr, Ipv6Addr, u32), (u8, u16, u16)>,
    /// What was let out: destination, protocol, both ports.
    flows: HashSet<(IpAddr, u8, u16, u16)>,
}

/// What follows from an IP payload.
enum Transport {
    Ports(u16, u16),
    /// An ICMP error; what it quotes begins at this place.
    Error(usize),
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const ECHO: u16 = 8;

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn ip_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(Ipv4Addr::from(octets))
}

/// Start of the payload of the IPv4 packet at `at`, if its header is whole.
fn payload_of(frame: &[u8], at: usize) -> Option<usize> {
    let header = frame.get(at..at + 20)?;
    let length = usize::from(header[0] & 0x0f) * 4;
    (header[0] >> 4 == 4 && length >= 20).then_some(at + length)
}

/// Ports, and what stands for them in an echo: its id on the side that asks.
fn transport(frame: &[u8], at: usize, protocol: u8) -> Option<Transport> {
    match protocol {
        TCP => {
            frame.get(at + 13)?;
            Some(Transport::Ports(be16(frame, at)?, be16(frame, at + 2)?))
        }
        UDP | SCTP => Some(Transport::Ports(be16(frame, at)?, be16(frame, at + 2)?)),
        ICMP => {
            let id = be16(frame, at + 4)?;
            Some(match frame[at] {
                8 => Transport::Ports(id, ECHO),
                0 => Transport::Ports(ECHO, id),
                3 | 11 | 12 => Transport::Error(at + 8),
                _ => Transport::Ports(0, 0),
            })
        }
        _ => Some(Transport::Ports(0, 0)),
    }
}

impl Sender {
    /// A pod that has sent nothing yet.
    #[must_use]
    pub fn new(
        mac: [u8; 6],
        ip: Ipv4Addr,
        ip6: Ipv6Addr,
        may_reach: fn(IpAddr, u8, u16) -> bool,
    ) -> Self {
        let (fragments, fragments6, flows) = (HashMap::new(), HashMap::new(), HashSet::new());
        Self { mac, ip, ip6, may_reach, fragments, fragments6, flows }
    }

    /// Whether the frame gets out. What cannot be read does not, and tags of VLANs are no pod's.
    pub fn passes(&mut self, frame: &[u8]) -> bool {
        if frame.get(6..12) != Some(&self.mac[..]) {
            return false;
        }
        let passes = match be16(frame, 12) {
            Some(0x0800) => self.passes_ip(frame),
            Some(0x0806) => self.passes_arp(frame),
            Some(0x86dd) => self.passes_ipv6(frame),
            _ => None,
        };
        passes.unwrap_or(false)
    }

    /// Who asks or answers has to be itself; one that looks whether its address is free has none yet.
    fn passes_arp(&self, frame: &[u8]) -> Option<bool> {
        let (mac, ip) = (frame.get(22..28)?, ip_at(frame, 28)?);
        Some(mac == self.mac && (ip == self.ip || ip.is_unspecified()))
    }

    fn passes_ip(&mut self, frame: &[u8]) -> Option<bool> {
        let payload = payload_of(frame, 14)?;
        let (id, position, protocol) = (be16(frame, 18)?, be16(frame, 20)?, frame[23]);
        let (from, to) = (ip_at(frame, 26)?, ip_at(frame, 30)?);
        let key = (from, to, id, protocol);
        let found = if position & 0x1fff != 0 {
            let (source, target) = *self.fragments.get(&key)?;
            Transport::Ports(source, target)
        } else {
            let found = transport(frame, payload, protocol)?;
            if position & 0x2000 != 0 {
                let ports = match found {
                    Transport::Ports(source, target) => (source, target),
                    Transport::Error(_) => (0, 0),
                };
                self.fragments.insert(key, ports);
            }
            found
        };
        if from != self.ip {
            return Some(false);
        }
        let (source, target) = match found {
            Transport::Ports(source, target) => (source, target),
            Transport::Error(at) if self.answers(frame, at) => return Some(true),
            Transport::Error(_) => (0, 0),
        };
        Some(self.begins(to.into(), protocol, source, target))
    }

    /// Only what has ports is judged by port. What passes is remembered.
    fn begins(&mut self, to: IpAddr, protocol: u8, source: u16, target: u16) -> bool {
        let port = if matches!(protocol, TCP | UDP | SCTP) { target } else { 0 };
        let passes = (self.may_reach)(to, protocol, port);
        if passes {
            self.flows.insert((to, protocol, source, target));
        }
        passes
    }

    /// An error about a packet that came as the answer to one that was let out.
    fn answers(&self, frame: &[u8], at: usize) -> bool {
        let quoted = || {
            let payload = payload_of(frame, at)?;
            // A later part has no ports.
            if be16(frame, at + 6)? & 0x1fff != 0 {
                return None;
            }
            let protocol = frame[at + 9];
            let (from, to) = (ip_at(frame, at + 12)?, ip_at(frame, at + 16)?);
            // Eight bytes are quoted at least: ports are among them.
            let known = if protocol == TCP { UDP } else { protocol };
            match transport(frame, payload, known)? {
                Transport::Ports(source, target) => Some((from, to, protocol, source, target)),
                Transport::Error(_) => None,
            }
        };
        let Some((from, to, protocol, source, target)) = quoted() else { return false };
        to == self.ip && self.flows.contains(&(from.into(), protocol, target, source))
    }
}
