//! Programming many remote nodes at once: the agent's way against the bare messages in one pipeline.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use cni_netlink::{Change, Netlink, RouteFilter};
use ipnetwork::Ipv4Network;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::world::{Node, Peer, Underlay, apply};

/// One datagram to the kernel.
const DATAGRAM_BYTES: usize = 32 * 1024;
/// `NLMSG_ERROR`, which also carries an acknowledgement.
const MESSAGE_ERROR: u16 = 2;

/// `count` remote nodes.
fn peers(count: u16) -> Vec<Peer> {
    let peer = |number: u16| {
        let [high, low] = number.to_be_bytes();
        Peer {
            subnet: Ipv4Network::new(Ipv4Addr::new(10, 128 + high, low, 0), 24)
                .expect("24 is a prefix length"),
            node: Ipv4Addr::new(198, 18, high, low),
            mac: [2, 0, 0, 1, high, low],
        }
    };
    (0..count).map(peer).collect()
}

/// What the two ways took.
pub(crate) struct Took {
    /// Bare messages, one acknowledgement.
    pub(crate) pipeline: Duration,
    /// The agent's way: read the tables, then batches that name each refused change.
    pub(crate) agent: Duration,
}

/// Programs `count` peers in two fresh nodes.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn program(underlay: &Underlay, number: u8, count: u16) -> anyhow::Result<Took> {
    let peers = peers(count);
    let bare = Node::new(underlay, number)?;
    let index = bare.device(&Netlink::open_in(&bare.netns)?)?;
    let started = Instant::now();
    bare.netns.run(|| pipeline(index, &peers))?;
    let pipeline = started.elapsed();

    let ours = Node::new(underlay, number + 1)?;
    let netlink = Netlink::open_in(&ours.netns)?;
    let index = ours.device(&netlink)?;
    let started = Instant::now();
    let seen = (
        netlink.neighbours(index)?.len(),
        netlink.fdb(index)?.len(),
        netlink.routes(&RouteFilter::default())?.len(),
    );
    let changes: Vec<Change> = peers.iter().flat_map(|peer| peer.changes(index)).collect();
    apply(&netlink, &changes)?;
    let agent = started.elapsed();
    ensure!(seen.0 == 0, "a fresh device has neighbours: {seen:?}");
    let held = (netlink.fdb(index)?.len(), netlink.neighbours(index)?.len());
    ensure!(held.0 >= usize::from(count) && held.1 >= usize::from(count), "held: {held:?}");
    Ok(Took { pipeline, agent })
}

/// All messages behind each other, and one acknowledgement at the end.
fn pipeline(device: u32, peers: &[Peer]) -> anyhow::Result<()> {
    let socket = Socket::new(NETLINK_ROUTE).context("open a netlink socket")?;
    socket.connect(&SocketAddr::new(0, 0)).context("connect to the kernel")?;
    let messages: Vec<RouteNetlinkMessage> =
        peers.iter().flat_map(|peer| messages(device, peer)).collect();
    let last = messages.len().saturating_sub(1);
    let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
    for (at, message) in messages.into_iter().enumerate() {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE;
        if at == last {
            header.flags |= NLM_F_ACK;
        }
        header.sequence_number = u32::try_from(at)?;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = datagram.len();
        datagram.resize(start + message.buffer_len(), 0);
        message.serialize(&mut datagram[start..]);
        if datagram.len() > DATAGRAM_BYTES - 256 || at == last {
            socket.send(&datagram, 0).context("send to the kernel")?;
            datagram.clear();
        }
    }
    let mut answer = Vec::with_capacity(DATAGRAM_BYTES);
    socket.recv(&mut answer, 0).context("receive from the kernel")?;
    let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    let code =
        answer.get(16..20).map(|code| i32::from_ne_bytes([code[0], code[1], code[2], code[3]]));
    if kind != Some(MESSAGE_ERROR) || code != Some(0) {
        bail!("the kernel refused a message: {code:?}");
    }
    Ok(())
}

/// Forwarding entry, neighbour and route of one peer.
fn messages(device: u32, peer: &Peer) -> [RouteNetlinkMessage; 3] {
    let gateway = peer.subnet.network();
    let entry = |family: AddressFamily, flags: NeighbourFlags, ip: Ipv4Addr| {
        let mut message = NeighbourMessage::default();
        message.header.family = family;
        message.header.ifindex = device;
        message.header.state = NeighbourState::Permanent;
        message.header.flags = flags;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)),
            NeighbourAttribute::LinkLayerAddress(peer.mac.to_vec()),
        ];
        RouteNetlinkMessage::NewNeighbour(message)
    };
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.destination_prefix_length = peer.subnet.prefix();
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::Static;
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unicast;
    route.header.flags = RouteFlags::Onlink;
    route.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(gateway)),
        RouteAttribute::Gateway(RouteAddress::Inet(gateway)),
        RouteAttribute::Oif(device),
    ];
    [
        entry(AddressFamily::Bridge, NeighbourFlags::Own, peer.node),
        entry(AddressFamily::Inet, NeighbourFlags::empty(), gateway),
        RouteNetlinkMessage::NewRoute(route),
    ]
}
