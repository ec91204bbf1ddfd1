//! IPv6 (RFC 8200), its extension headers and fragments (RFC 7112, 6946), ICMPv6 (RFC 4443) and what a pod may say to its link
//! (RFC 4861, 3810).

use std::net::Ipv6Addr;

use super::{SCTP, Sender, TCP, Transport, UDP, be16};

const ICMPV6: u8 = 58;
const ECHO: u16 = 128;
/// "Up to six extension headers are looked behind."
const MOST_HEADERS: usize = 6;
/// "A pod's options of discovery": more than that nobody sends.
const MOST_OPTIONS: usize = 4;

/// What is behind the IPv6 header.
struct Payload {
    protocol: u8,
    at: usize,
    /// Id, and whether something comes before it.
    fragment: Option<(u32, bool)>,
}

/// The address that a link has by its MAC (RFC 4291, appendix A).
#[must_use]
pub fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

fn ip_at(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some(octets.into())
}

/// Both addresses and the payload of the packet at `at`; `None` if it cannot be read, or hides what it is.
fn read(bytes: &[u8], at: usize) -> Option<(Ipv6Addr, Ipv6Addr, Payload)> {
    let header = bytes.get(at..at + 40)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let payload = walk(bytes, header[6], at + 40)?;
    Some((ip_at(bytes, at + 8)?, ip_at(bytes, at + 24)?, payload))
}

fn walk(bytes: &[u8], first: u8, at: usize) -> Option<Payload> {
    let mut payload = Payload { protocol: first, at, fragment: None };
    for _ in 0..=MOST_HEADERS {
        if !matches!(payload.protocol, 0 | 43 | 44 | 51 | 60) {
            return Some(payload);
        }
        let header = bytes.get(payload.at..payload.at + 8)?;
        let length = usize::from(header[1]);
        match payload.protocol {
            44 => {
                if payload.fragment.is_some() {
                    return None;
                }
                let position = be16(header, 2)?;
                let id = u32::from_be_bytes(header[4..8].try_into().ok()?);
                // The whole of a datagram in one fragment is none.
                let is_part = position & 0xfff9 != 0;
                payload.fragment = is_part.then_some((id, position & 0xfff8 != 0));
                payload.at += 8;
            }
            // Another destination comes after this one.
            43 if header[3] != 0 => return None,
            51 => payload.at += (length + 2) * 4,
            _ => payload.at += (length + 1) * 8,
        }
        payload.protocol = header[0];
        if payload.fragment.is_some_and(|(_, is_later)| is_later) {
            return Some(payload);
        }
    }
    None
}

fn transport(bytes: &[u8], at: usize, protocol: u8) -> Option<Transport> {
    match protocol {
        TCP => {
            bytes.get(at + 13)?;
            Some(Transport::Ports(be16(bytes, at)?, be16(bytes, at + 2)?))
        }
        UDP | SCTP => Some(Transport::Ports(be16(bytes, at)?, be16(bytes, at + 2)?)),
        ICMPV6 => {
            let id = be16(bytes, at + 4)?;
            Some(match bytes[at] {
                128 => Transport::Ports(id, ECHO),
                129 => Transport::Ports(ECHO, id),
                1..=4 => Transport::Error(at + 8),
                _ => Transport::Ports(0, 0),
            })
        }
        _ => Some(Transport::Ports(0, 0)),
    }
}

impl Sender {
    fn is_own(&self, ip: Ipv6Addr) -> bool {
        ip == self.ip6 || ip == link_local(self.mac)
    }

    pub(super) fn passes_ipv6(&mut self, frame: &[u8]) -> Option<bool> {
        let (from, to, payload) = read(frame, 14)?;
        if !self.is_own(from) && !from.is_unspecified() {
            return Some(false);
        }
        let (protocol, found) = match payload.fragment {
            Some((id, true)) => {
                let (protocol, source, target) = *self.fragments6.get(&(from, to, id))?;
                (protocol, Transport::Ports(source, target))
            }
            Some((id, false)) => {
                let found = transport(frame, payload.at, payload.protocol)?;
                let (source, target) = match found {
                    Transport::Ports(source, target) => (source, target),
                    Transport::Error(_) => (0, 0),
                };
                self.fragments6.insert((from, to, id), (payload.protocol, source, target));
                (payload.protocol, found)
            }
            None => (payload.protocol, transport(frame, payload.at, payload.protocol)?),
        };
        let is_later = payload.fragment.is_some_and(|(_, is_later)| is_later);
        if protocol == ICMPV6 && !is_later && matches!(frame[payload.at], 130..=137 | 143) {
            return Some(self.tells_its_link(frame, &payload, from).unwrap_or(false));
        }
        // Neighbours are no peers of any policy.
        if from != self.ip6 {
            return Some(false);
        }
        let (source, target) = match found {
            Transport::Ports(source, target) => (source, target),
            Transport::Error(at) if self.answers6(frame, at) => return Some(true),
            Transport::Error(_) => (0, 0),
        };
        Some(self.begins(to.into(), protocol, source, target))
    }

    /// Neighbour discovery and multicast membership: for itself alone, and never as a router. Not in parts (RFC 6980).
    fn tells_its_link(&self, frame: &[u8], payload: &Payload, from: Ipv6Addr) -> Option<bool> {
        let Payload { at, fragment, .. } = *payload;
        if fragment.is_some() {
            return Some(false);
        }
        let kind = frame[at];
        let options = match kind {
            131 | 132 | 143 => return Some(true),
            133 => at + 8,
            135 | 136 => {
                let target = ip_at(frame, at + 8)?;
                if (kind == 136 || from.is_unspecified()) && !self.is_own(target) {
                    return Some(false);
                }
                at + 24
            }
            _ => return Some(false),
        };
        if frame[14 + 7] != 255 {
            return Some(false);
        }
        let mut rest = frame.get(options..).unwrap_or_default();
        for _ in 0..MOST_OPTIONS {
            let Some(option) = rest.get(..8) else { return Some(true) };
            if matches!(option[0], 1 | 2) && option[2..] != self.mac || option[1] == 0 {
                return Some(false);
            }
            rest = rest.get(usize::from(option[1]) * 8..).unwrap_or_default();
        }
        Some(false)
    }

    /// An error about a packet that came as the answer to one that was let out.
    fn answers6(&self, frame: &[u8], at: usize) -> bool {
        let quoted = || {
            let (from, to, payload) = read(frame, at)?;
            if payload.fragment.is_some_and(|(_, is_later)| is_later) {
                return None;
            }
            let protocol = payload.protocol;
            // So much is quoted at least that ports are among it.
            let known = if protocol == TCP { UDP } else { protocol };
            match transport(frame, payload.at, known)? {
                Transport::Ports(source, target) => Some((from, to, protocol, source, target)),
                Transport::Error(_) => None,
            }
        };
        let Some((from, to, protocol, source, target)) = quoted() else { return false };
        to == self.ip6 && self.flows.contains(&(from.into(), protocol, target, source))
    }
}
