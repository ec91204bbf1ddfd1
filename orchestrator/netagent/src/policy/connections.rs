//! Connections of a pod that the programs do not know: it had them already when policy came to it, or they were forgotten
//! (the map of flows is full and gives up what was idle longest). Only the pod's sockets tell who opened them: without this,
//! a server that may not open connections would be cut off from the clients that it is answering.
//!
//! TCP alone: UDP has no state to ask for. What is told to the programs counts as judged by a former policy, so the next
//! packet of it is judged as the connection that it belongs to.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use cni_netlink::{NetNs, NetlinkError};
use orch_ebpf_loader::{Announcement, Error, Maps};
use orch_ebpf_maps::{Direction, FLOW_EITHER, Flow, FlowKey, Leg, in_key};
use tracing::warn;

/// `TCP_ESTABLISHED` to `TCP_CLOSE_WAIT` but for those that begin, and `TCP_LAST_ACK` to `TCP_CLOSING`: data or its
/// acknowledgement may still come (include/net/tcp_states.h).
const OPEN: [u8; 6] = [1, 4, 5, 8, 9, 11];
const LISTEN: u8 = 10;
const TCP: u8 = 6;

/// A connection of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Connection {
    own: SocketAddr,
    other: SocketAddr,
    /// Whether the other side opened it.
    comes_in: bool,
}

/// Tells the programs what the pod's namespace has open; a failure is a log line, the pod then has what a new one has.
pub(super) fn take_over(maps: &mut Maps, netns: &str, made: &Announcement) {
    match observe(netns, &made.addresses().collect::<Vec<_>>()) {
        Ok(open) => {
            if let Err(error) = tell(maps, made, &open) {
                let error = crate::chain(&error);
                warn!(%error, "connections of a running pod may be cut: the programs do not know them");
            }
        }
        Err(error) => {
            let error = crate::chain(&error);
            warn!(%error, "connections of a running pod may be cut: its sockets cannot be read");
        }
    }
}

fn observe(netns: &str, own: &[IpAddr]) -> Result<HashSet<Connection>, NetlinkError> {
    // One of the two may be missing, where a family is off.
    let tables = NetNs::open(netns)?.run(|| {
        let read = |name| std::fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        Ok::<_, NetlinkError>(["tcp", "tcp6"].map(|name| read(name).unwrap_or_default()))
    })?;
    Ok(parse(&tables.concat(), own))
}

/// From the kernel's table of sockets: `sl local_address rem_address st …`.
fn parse(text: &str, own: &[IpAddr]) -> HashSet<Connection> {
    let sockets: Vec<(SocketAddr, SocketAddr, u8)> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (local, remote) = (address(words.next()?)?, address(words.next()?)?);
            Some((local, remote, u8::from_str_radix(words.next()?, 16).ok()?))
        })
        .collect();
    let listens: HashSet<u16> = sockets
        .iter()
        .filter(|(local, _, state)| {
            *state == LISTEN && (local.ip().is_unspecified() || own.contains(&local.ip()))
        })
        .map(|(local, ..)| local.port())
        .collect();
    sockets
        .iter()
        .filter(|(local, _, state)| OPEN.contains(state) && own.contains(&local.ip()))
        .map(|(own, other, _)| Connection {
            own: *own,
            other: *other,
            comes_in: listens.contains(&own.port()),
        })
        .collect()
}

/// `0100007F:1F90`: one or four of the machine's words in hexadecimal, and the port. Sockets of IPv6 have IPv4 connections,
/// too.
fn address(text: &str) -> Option<SocketAddr> {
    let (words, port) = text.split_once(':')?;
    let word = |place: usize| {
        let word = words.get(8 * place..8 * place + 8)?;
        Some(u32::from_str_radix(word, 16).ok()?.to_ne_bytes())
    };
    let ip = match words.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut bytes = [0; 16];
            for place in 0..4 {
                bytes[4 * place..4 * place + 4].copy_from_slice(&word(place)?);
            }
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

fn tell(maps: &mut Maps, made: &Announcement, open: &HashSet<Connection>) -> Result<(), Error> {
    let generation = maps.endpoint(made.ifindex)?.map_or(0, |row| row.generation);
    for one in open {
        let direction = if one.comes_in { Direction::Ingress } else { Direction::Egress };
        let (family, remote) = in_key(one.other.ip());
        let key = FlowKey {
            uid: made.uid,
            remote,
            local_port: one.own.port().to_be(),
            remote_port: one.other.port().to_be(),
            protocol: TCP,
            family,
            ..FlowKey::default()
        };
        // What the programs saw begin, they know better: also of a connection that policy cut, which is not to come back as
        // one that the other side opened.
        let is_sure = |leg: &Leg| leg.is_open != 0 && leg.flags & FLOW_EITHER == 0;
        if maps.flow(&key)?.is_some_and(|flow| flow.legs.iter().any(is_sure)) {
            continue;
        }
        let flow = Flow::opened(direction, generation.wrapping_sub(1));
        maps.put_flow(key, flow)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn sockets_of_both_families_are_connections_by_who_opened_them() {
        let text = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0201F40A:1F90 0702F40A:9C40 01 00000000:00000000 00:00000000 00000000     0        0 2 1
   2: 0201F40A:9C41 0702F40A:0050 01 00000000:00000000 00:00000000 00000000     0        0 3 1
   3: 0201F40A:9C42 0702F40A:0050 02 00000000:00000000 00:00000000 00000000     0        0 4 1
   4: 0100007F:1F90 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 5 1
   0: 00000000000000000000000000000000:01BB 00000000000000000000000000000000:0000 0A 0 0
   1: 0000000000000000FFFF00000201F40A:01BB 0000000000000000FFFF00000702F40A:9C43 08 0 0
   2: 000000FD000000000000000001000000:01BB 000000FD000000000000000002000000:9C43 01 0 0
";
        let own: IpAddr = "10.244.1.2".parse().expect("an address");
        let own6: IpAddr = "fd00::1".parse().expect("an address");
        let connection = |own, own_port, other: &str, other_port, comes_in| Connection {
            own: SocketAddr::new(own, own_port),
            other: SocketAddr::new(other.parse().expect("an address"), other_port),
            comes_in,
        };
        let wanted = HashSet::from([
            connection(own, 8080, "10.244.2.7", 40000, true),
            connection(own, 40001, "10.244.2.7", 80, false),
            connection(own, 443, "10.244.2.7", 40003, true),
            connection(own6, 443, "fd00::2", 40003, true),
        ]);
        assert_eq!(parse(text, &[own, own6]), wanted);
    }
}
