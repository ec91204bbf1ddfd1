//! Forgetting UDP flows that lead to endpoints that are gone.
//!
//! A UDP flow has no end: conntrack would go on sending a busy client's packets to an address that nobody has any
//! more. TCP clients get a reset and connect anew.
//!
//! The look is at the kernel's whole table, not at what changed since the last time, so that what an agent missed
//! while it was down is cleaned up as well. It talks to the kernel itself (`linux/netfilter/nfnetlink_conntrack.h`):
//! the `conntrack` tool is not everywhere, and it deletes by address where ports decide.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};

use super::model::{Port, Protocol};

/// Messages: `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_…`.
const GET: u16 = 0x0101;
const DELETE: u16 = 0x0102;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const FLAG_REQUEST: u16 = 0x1;
const FLAG_ACK: u16 = 0x4;
const FLAG_DUMP: u16 = 0x300;
/// Attributes, `CTA_…`.
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const IP_V4_SRC: u16 = 1;
const IP_V4_DST: u16 = 2;
const IP_V6_SRC: u16 = 3;
const IP_V6_DST: u16 = 4;
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_UDP: u8 = 17;
/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADER: usize = 16;
const GENERIC: usize = 4;

/// A UDP flow of the kernel's table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Flow {
    /// What the client sent to.
    frontend: SocketAddr,
    /// Who answers: the endpoint, or the frontend itself if nothing was translated.
    backend: SocketAddr,
    /// The original tuple as the kernel wrote it, to name the flow in a deletion.
    tuple: Vec<u8>,
    /// Tells this flow from a later one of the same tuple.
    id: Option<[u8; 4]>,
}

/// Deletes the UDP flows to the frontends of `ports` that lead elsewhere than to their endpoints; says how many.
///
/// # Errors
/// If the kernel cannot be asked.
pub(super) fn forget_stale(ports: &[Port]) -> io::Result<usize> {
    if !ports.iter().any(|port| port.protocol == Protocol::Udp) {
        return Ok(0);
    }
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    let mut gone = 0;
    for family in [AF_INET, AF_INET6] {
        let has = |port: &Port| port.in_family(family == AF_INET6).is_some();
        if !ports.iter().any(has) {
            continue;
        }
        let flows = dump(&socket, family)?;
        for flow in flows.iter().filter(|flow| is_stale(flow, ports)) {
            gone += usize::from(delete(&socket, family, flow)?);
        }
    }
    Ok(gone)
}

/// Whether a flow goes to a frontend of ours, but not to one of its endpoints. Pure.
fn is_stale(flow: &Flow, ports: &[Port]) -> bool {
    let (ip, port) = (flow.frontend.ip(), flow.frontend.port());
    let v6 = ip.is_ipv6();
    let translated = flow.frontend != flow.backend;
    let udp = ports.iter().filter(|candidate| candidate.protocol == Protocol::Udp);
    udp.filter_map(|candidate| candidate.in_family(v6)).any(|candidate| {
        let outside = candidate.external_ips.iter().chain(&candidate.balancer_ips);
        let at_address = candidate.port == port
            && candidate.cluster_ips.iter().chain(outside).any(|own| *own == ip);
        // Any of the node's addresses; a flow to the same port elsewhere is not translated.
        let at_node = candidate.node_port == Some(port) && translated;
        let leads_to = |flow: &Flow| {
            let pool =
                if candidate.endpoints.is_empty() { Vec::new() } else { candidate.pool(false) };
            let local = candidate.pool(true);
            pool.iter()
                .chain(&local)
                .any(|one| one.ip == flow.backend.ip() && one.port == flow.backend.port())
        };
        // An untranslated flow is from before the Service had an endpoint: it now keeps the client from it.
        let lost = translated || !candidate.endpoints.is_empty();
        (at_address || at_node) && lost && !leads_to(flow)
    })
}

fn dump(socket: &Socket, family: u8) -> io::Result<Vec<Flow>> {
    socket.send(&message(GET, family, FLAG_REQUEST | FLAG_DUMP, &[]), 0)?;
    let mut flows = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for (kind, payload) in messages(&datagram) {
            match kind {
                DONE => return Ok(flows),
                ERROR => error_of(payload)?,
                _ => flows.extend(payload.get(GENERIC..).and_then(parse)),
            }
        }
    }
}

/// False: the flow was gone already.
fn delete(socket: &Socket, family: u8, flow: &Flow) -> io::Result<bool> {
    let mut attributes = Vec::new();
    put(&mut attributes, TUPLE_ORIG | NESTED, &flow.tuple);
    if let Some(id) = flow.id {
        put(&mut attributes, ID, &id);
    }
    socket.send(&message(DELETE, family, FLAG_REQUEST | FLAG_ACK, &attributes), 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for (kind, payload) in messages(&datagram) {
            if kind == ERROR {
                return match error_of(payload) {
                    Ok(()) => Ok(true),
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
                    Err(error) => Err(error),
                };
            }
        }
    }
}

fn message(kind: u16, family: u8, flags: u16, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + GENERIC + attributes.len()).expect("one tuple is short");
    let mut out = Vec::with_capacity(HEADER + GENERIC + attributes.len());
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    // Sequence and port: the socket has one request at a time.
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&[family, 0, 0, 0]);
    out.extend_from_slice(attributes);
    out
}

fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("one tuple is short");
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The messages of a datagram: kind and payload. Ends at the first that is cut off.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
        let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
        let payload = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

fn error_of(payload: &[u8]) -> io::Result<()> {
    match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::other("a netlink error without a code")),
    }
}

/// An entry's attributes; `None` if it is no UDP.
fn parse(entry: &[u8]) -> Option<Flow> {
    let orig = attribute(entry, TUPLE_ORIG)?;
    let reply = attribute(entry, TUPLE_REPLY)?;
    let protocol = attribute(attribute(orig, TUPLE_PROTO)?, PROTO_NUM)?;
    if protocol != [IPPROTO_UDP] {
        return None;
    }
    let end = |tuple: &[u8], [v4, v6]: [u16; 2], port: u16| {
        let ip = attribute(tuple, TUPLE_IP)?;
        let ip = match (attribute(ip, v4), attribute(ip, v6)) {
            (Some(ip), _) => IpAddr::from(Ipv4Addr::from(*ip.first_chunk::<4>()?)),
            (None, ip) => IpAddr::from(Ipv6Addr::from(*ip?.first_chunk::<16>()?)),
        };
        let port: [u8; 2] = *attribute(attribute(tuple, TUPLE_PROTO)?, port)?.first_chunk()?;
        Some(SocketAddr::new(ip, u16::from_be_bytes(port)))
    };
    Some(Flow {
        frontend: end(orig, [IP_V4_DST, IP_V6_DST], PROTO_DST_PORT)?,
        backend: end(reply, [IP_V4_SRC, IP_V6_SRC], PROTO_SRC_PORT)?,
        tuple: orig.to_vec(),
        id: attribute(entry, ID).and_then(|id| id.first_chunk().copied()),
    })
}

#[cfg(test)]
mod tests {
    use super::super::model::Endpoint;
    use super::*;

    fn dns(endpoints: &[u8]) -> Port {
        let endpoint = |last: &u8| Endpoint {
            ip: Ipv4Addr::new(10, 244, 1, *last).into(),
            port: 5353,
            local: true,
            ready: true,
            near: true,
        };
        Port {
            id: "default/dns/udp/53".to_owned(),
            protocol: Protocol::Udp,
            cluster_ips: vec![Ipv4Addr::new(10, 96, 3, 4).into()],
            port: 53,
            node_port: Some(30053),
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            external_local: false,
            internal_local: false,
            affinity: None,
            endpoints: endpoints.iter().map(endpoint).collect(),
        }
    }

    fn flow(frontend: &str, backend: &str) -> Flow {
        let at = |text: &str| text.parse().expect("address");
        Flow { frontend: at(frontend), backend: at(backend), tuple: Vec::new(), id: None }
    }

    #[test]
    fn flows_to_former_endpoints_are_stale_and_those_to_present_ones_are_not() {
        let ports = [dns(&[2])];
        for frontend in ["10.96.3.4:53", "192.0.2.1:30053", "127.0.0.1:30053"] {
            assert!(!is_stale(&flow(frontend, "10.244.1.2:5353"), &ports), "{frontend}");
            assert!(is_stale(&flow(frontend, "10.244.1.9:5353"), &ports), "{frontend}");
        }
        assert!(
            is_stale(&flow("10.96.3.4:53", "10.244.1.2:5353"), &[dns(&[])]),
            "the last endpoint is gone"
        );
    }

    #[test]
    fn an_untranslated_flow_is_stale_once_there_is_an_endpoint() {
        let early = flow("10.96.3.4:53", "10.96.3.4:53");
        assert!(is_stale(&early, &[dns(&[2])]));
        assert!(!is_stale(&early, &[dns(&[])]));
    }

    #[test]
    fn flows_of_others_are_left_alone() {
        let ports = [dns(&[2])];
        assert!(!is_stale(&flow("10.96.3.4:54", "10.244.1.9:5353"), &ports), "another port");
        assert!(!is_stale(&flow("8.8.8.8:53", "8.8.8.8:53"), &ports));
        assert!(
            !is_stale(&flow("192.0.2.9:30053", "192.0.2.9:30053"), &ports),
            "somebody's own port of that number"
        );
    }

    #[test]
    fn damaged_messages_end_the_reading() {
        assert_eq!(messages(&[1, 2, 3]).count(), 0);
        assert_eq!(attributes(&[200, 0, 1, 0, 5]).count(), 0);
        // A length of zero must not go round in circles.
        assert_eq!(messages(&[0; 32]).count(), 0);
        assert_eq!(attributes(&[0; 8]).count(), 0);
        assert!(parse(&[8, 0, 1, 0, 1, 2, 3, 4]).is_none());
    }
}
