//! The kernel's own news: somebody deleted our device, a route, a neighbour, or the underlay changed.
//!
//! An event only says "look". Those that agree with what is wanted say nothing new: our own changes, and the coming and
//! going of pods' interfaces, cost no look.

use std::net::IpAddr;
use std::sync::Arc;

use futures::StreamExt as _;
use ipnetwork::IpNetwork;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use parking_lot::Mutex;
use rtnetlink::MulticastGroup;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::ROUTE_PROTOCOL;
use super::plan::{Hop, WantedPeers};
use crate::mac::Mac;

/// Links whose changes concern us.
#[derive(Debug, Default, Clone)]
pub(super) struct Interest {
    /// Index of each device of ours, and what the kernel is to hold of the peers behind it.
    pub(super) devices: Vec<(u32, Arc<WantedPeers>)>,
    /// Index of the underlay's link.
    pub(super) underlay: Option<u32>,
    /// Their names: a link that is made again has a new index.
    pub(super) names: Vec<String>,
}

/// Notifies about changes that may concern us, until cancelled or the socket breaks.
pub(super) async fn watch(
    interest: Arc<Mutex<Interest>>,
    look: Arc<Notify>,
    cancel: CancellationToken,
) -> std::io::Result<()> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv6Ifaddr,
    ];
    let (connection, _handle, mut messages) = rtnetlink::new_multicast_connection(&groups)?;
    let mut connection = std::pin::pin!(connection);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = &mut connection => return Err(std::io::Error::other("the netlink connection ended")),
            message = messages.next() => match message {
                Some((message, _)) => {
                    let concerns = match &message.payload {
                        NetlinkPayload::InnerMessage(message) => concerns(message, &interest.lock()),
                        // Lost messages (ENOBUFS) show as an error or an overrun: look.
                        _ => true,
                    };
                    if concerns {
                        look.notify_one();
                    }
                }
                None => return Err(std::io::Error::other("the netlink connection ended")),
            },
        }
    }
}

fn concerns(message: &RouteNetlinkMessage, interest: &Interest) -> bool {
    let peers =
        |index: u32| interest.devices.iter().find(|(one, _)| *one == index).map(|(_, peers)| peers);
    let ours = |index: u32| peers(index).is_some();
    let either = |index: u32| ours(index) || Some(index) == interest.underlay;
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            either(link.header.index)
                || link.attributes.iter().any(|attribute| {
                    matches!(attribute, LinkAttribute::IfName(name) if interest.names.contains(name))
                })
        }
        RouteNetlinkMessage::NewNeighbour(neighbour) => {
            peers(neighbour.header.ifindex).is_some_and(|peers| concerns_neighbour(neighbour, peers, true))
        }
        RouteNetlinkMessage::DelNeighbour(neighbour) => {
            peers(neighbour.header.ifindex).is_some_and(|peers| concerns_neighbour(neighbour, peers, false))
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            either(address.header.index)
        }
        RouteNetlinkMessage::NewRoute(route) => match hop(route) {
            Some(hop) if is_ours(route) => wanted_route(&hop, interest) != Some(&hop),
            Some(hop) => is_in_the_way(&hop, interest),
            None => false,
        },
        RouteNetlinkMessage::DelRoute(route) => match hop(route) {
            Some(hop) if is_ours(route) => wanted_route(&hop, interest) == Some(&hop),
            Some(hop) => is_in_the_way(&hop, interest),
            None => false,
        },
        _ => false,
    }
}

/// Our route to the same destination.
fn wanted_route<'a>(hop: &Hop, interest: &'a Interest) -> Option<&'a Hop> {
    interest.devices.iter().find_map(|(_, peers)| peers.routes.get(&hop.subnet))
}

fn is_in_the_way(hop: &Hop, interest: &Interest) -> bool {
    interest.devices.iter().any(|(_, peers)| peers.is_in_the_way(hop))
}

fn is_ours(route: &RouteMessage) -> bool {
    u8::from(route.header.protocol) == ROUTE_PROTOCOL
}

/// Whether a neighbour or FDB entry of our device, new or removed, is at odds with what must be there.
fn concerns_neighbour(message: &NeighbourMessage, want: &WantedPeers, new: bool) -> bool {
    let mut ip = None;
    let mut mac: Option<Mac> = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                ip = Some(IpAddr::V4(*address));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                ip = Some(IpAddr::V6(*address));
            }
            // The family of a forwarding entry is "bridge", which does not tell the family of its address.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                ip = (<[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from).ok())
                    .or_else(|| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from).ok());
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = bytes.as_slice().try_into().ok().map(Mac);
            }
            _ => {}
        }
    }
    let Some(ip) = ip else { return false };
    if message.header.family == AddressFamily::Bridge {
        let wanted = mac.is_some_and(|mac| want.forwarding.get(&mac) == Some(&ip));
        return wanted != new;
    }
    let permanent = message.header.state == NeighbourState::Permanent;
    match want.neighbours.get(&ip) {
        // One that goes is told twice, the first time as a change to "failed" without its MAC.
        Some(wanted) => !(new && permanent && mac == Some(*wanted)),
        // What the kernel finds out by itself comes and goes.
        None => new && permanent,
    }
}

/// A route of the main table.
fn hop(route: &RouteMessage) -> Option<Hop> {
    if route.header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let everywhere = match route.header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let mut hop = Hop { subnet: IpNetwork::from(everywhere), via: None, link: None, metric: None };
    let mut destination = everywhere;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = (*ip).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = (*ip).into(),
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => hop.via = Some((*ip).into()),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => hop.via = Some((*ip).into()),
            RouteAttribute::Oif(link) => hop.link = Some(*link),
            RouteAttribute::Priority(metric) => hop.metric = Some(*metric),
            _ => {}
        }
    }
    hop.subnet = IpNetwork::new(destination, route.header.destination_prefix_length).ok()?;
    Some(hop)
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::RouteProtocol;

    use super::super::{Path, Peer, Peers};
    use super::*;

    const DEVICE: u32 = 9;

    fn interest() -> Interest {
        let subnet: IpNetwork = "10.244.3.0/24".parse().expect("CIDR");
        let peer = Peer {
            subnet,
            public_ip: IpAddr::from([192, 0, 2, 3]),
            path: Path::Vxlan(Mac([2, 0, 0, 0, 0, 3])),
        };
        Interest {
            devices: vec![(
                DEVICE,
                Arc::new(WantedPeers::new(&Peers::from([(subnet, peer)]), DEVICE, 2)),
            )],
            underlay: Some(2),
            names: Vec::new(),
        }
    }

    fn route(protocol: u8, third: u8, link: u32) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::from(protocol);
        message.header.destination_prefix_length = 24;
        let base = [10, 244, third, 0].into();
        message.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet(base)),
            RouteAttribute::Gateway(RouteAddress::Inet(base)),
            RouteAttribute::Oif(link),
        ];
        message
    }

    #[test]
    fn what_agrees_with_what_is_wanted_is_no_news() {
        let look = |message: RouteNetlinkMessage| concerns(&message, &interest());
        let ours = |third, link| route(ROUTE_PROTOCOL, third, link);
        assert!(!look(RouteNetlinkMessage::NewRoute(ours(3, DEVICE))), "our own change");
        assert!(look(RouteNetlinkMessage::DelRoute(ours(3, DEVICE))), "somebody removed it");
        assert!(look(RouteNetlinkMessage::NewRoute(ours(3, 7))), "it leads elsewhere");
        assert!(look(RouteNetlinkMessage::NewRoute(ours(4, DEVICE))), "nobody has that subnet");
        assert!(!look(RouteNetlinkMessage::DelRoute(ours(4, DEVICE))), "and so it may go");
        assert!(look(RouteNetlinkMessage::NewRoute(route(4, 3, 7))), "a foreign one in the way");
        assert!(look(RouteNetlinkMessage::DelRoute(route(4, 3, 7))), "and its end");
        assert!(!look(RouteNetlinkMessage::NewRoute(route(4, 9, 7))), "another business");
    }

    #[test]
    fn neighbours_and_forwarding_entries_likewise() {
        let message = |family, node: [u8; 4], mac: u8, state| {
            let mut message = NeighbourMessage::default();
            message.header.family = family;
            message.header.ifindex = DEVICE;
            message.header.state = state;
            message.attributes = vec![
                NeighbourAttribute::Destination(NeighbourAddress::Inet(node.into())),
                NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, mac]),
            ];
            message
        };
        let look = |message| concerns(&message, &interest());
        for (family, node) in
            [(AddressFamily::Inet, [10, 244, 3, 0]), (AddressFamily::Bridge, [192, 0, 2, 3])]
        {
            let right = message(family, node, 3, NeighbourState::Permanent);
            let wrong = message(family, node, 4, NeighbourState::Permanent);
            assert!(!look(RouteNetlinkMessage::NewNeighbour(right.clone())));
            assert!(look(RouteNetlinkMessage::DelNeighbour(right)));
            assert!(look(RouteNetlinkMessage::NewNeighbour(wrong.clone())));
            // A next hop that loses its neighbour has none, whichever it was.
            let loses = family == AddressFamily::Inet;
            assert_eq!(look(RouteNetlinkMessage::DelNeighbour(wrong)), loses);
        }
    }
}
