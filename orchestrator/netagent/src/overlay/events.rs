//! The kernel's own news: somebody deleted our device, a route, a neighbour, or the underlay changed.
//!
//! An event only says "look". Which ones may concern us is a question of links, so that the coming and going of pods'
//! interfaces costs no look.

use std::sync::Arc;

use futures::StreamExt as _;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::RouteAttribute;
use parking_lot::Mutex;
use rtnetlink::MulticastGroup;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::ROUTE_PROTOCOL;

/// Links whose changes concern us.
#[derive(Debug, Default, Clone)]
pub(super) struct Interest {
    /// Index of our device.
    pub(super) device: Option<u32>,
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
    let ours = |index: u32| Some(index) == interest.device;
    let either = |index: u32| ours(index) || Some(index) == interest.underlay;
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            either(link.header.index)
                || link.attributes.iter().any(|attribute| {
                    matches!(attribute, LinkAttribute::IfName(name) if interest.names.contains(name))
                })
        }
        RouteNetlinkMessage::NewNeighbour(neighbour) | RouteNetlinkMessage::DelNeighbour(neighbour) => {
            ours(neighbour.header.ifindex)
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            either(address.header.index)
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            u8::from(route.header.protocol) == ROUTE_PROTOCOL
                || route.attributes.iter().any(|attribute| {
                    matches!(attribute, RouteAttribute::Oif(link) if ours(*link))
                })
        }
        _ => false,
    }
}
