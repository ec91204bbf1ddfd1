//! Programming many remote nodes at once: the agent's way against the bare messages in one pipeline.
//!
//! The kernel works on netlink messages in the thread that sends them, so this thread's CPU time is what they cost, however
//! busy the machine is; the wall clock says the same on an idle one.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use cni_netlink::{Netlink, RouteFilter};
use ipnetwork::IpNetwork;
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
use orch_netagent::mac::Mac;
use orch_netagent::overlay::{Path, Peer, Peers};

use crate::world::{self, Node, Underlay};

/// One datagram to the kernel.
const DATAGRAM_BYTES: usize = 32 * 1024;
/// `NLMSG_ERROR`, which also carries an acknowledgement.
const MESSAGE_ERROR: u16 = 2;

/// `count` remote nodes.
fn peers(count: u16) -> Peers {
    let peer = |number: u16| {
        let [high, low] = number.to_be_bytes();
        let base = Ipv4Addr::new(10, 128 + high, low, 0);
        let subnet = IpNetwork::new(base.into(), 24).expect("24 is a prefix length");
        let public_ip = Ipv4Addr::new(198, 18, high, low).into();
        (subnet, Peer { subnet, public_ip, path: Path::Vxlan(Mac([2, 0, 0, 1, high, low])) })
    };
    (0..count).map(peer).collect()
}

/// Time of the wall clock, and of this thread's CPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Took {
    pub(crate) wall: Duration,
    pub(crate) cpu: Duration,
}

impl Took {
    fn measure(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Self> {
        let (wall, cpu) = (Instant::now(), thread_cpu_time()?);
        work()?;
        Ok(Self { wall: wall.elapsed(), cpu: thread_cpu_time()?.saturating_sub(cpu) })
    }
}

fn thread_cpu_time() -> anyhow::Result<Duration> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(Duration::from(time))
}

/// What the two ways took.
pub(crate) struct Both {
    /// Bare messages, one acknowledgement.
    pub(crate) pipeline: Took,
    /// The agent's way: read the tables, compare, batches that name each refused change.
    pub(crate) agent: Took,
}

/// Programs `count` peers in two fresh nodes; `agent_first` says in which order.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn program(underlay: &Underlay, count: u16, agent_first: bool) -> anyhow::Result<Both> {
    let peers = peers(count);
    let in_a_node = |number: u8, agent: bool| -> anyhow::Result<Took> {
        let node = Node::new(underlay, number, PathBuf::new())?;
        // The clock runs in the thread that works, which `run` starts.
        node.netns.run(|| {
            let netlink = Netlink::open()?;
            let device = node.device(&netlink)?;
            let took = if agent {
                Took::measure(|| world::program(&netlink, device, &peers))?
            } else {
                Took::measure(|| pipeline(device, &peers))?
            };
            let held = (
                netlink.fdb(device)?.len(),
                netlink.neighbours(device)?.len(),
                netlink.routes(&RouteFilter::default())?.len(),
            );
            let count = usize::from(count);
            ensure!(held.0 >= count && held.1 >= count && held.2 >= count, "held: {held:?}");
            Ok(took)
        })
    };
    if agent_first {
        let agent = in_a_node(1, true)?;
        Ok(Both { agent, pipeline: in_a_node(2, false)? })
    } else {
        let pipeline = in_a_node(1, false)?;
        Ok(Both { pipeline, agent: in_a_node(2, true)? })
    }
}

/// All messages behind each other, and one acknowledgement at the end.
fn pipeline(device: u32, peers: &Peers) -> anyhow::Result<()> {
    let socket = Socket::new(NETLINK_ROUTE).context("open a netlink socket")?;
    socket.connect(&SocketAddr::new(0, 0)).context("connect to the kernel")?;
    // In the agent's order: what a route leads to is there before the route.
    let mut ordered = [const { Vec::new() }; 3];
    for peer in peers.values() {
        for (list, message) in ordered.iter_mut().zip(messages(device, peer)?) {
            list.push(message);
        }
    }
    let messages: Vec<RouteNetlinkMessage> = ordered.into_iter().flatten().collect();
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
fn messages(device: u32, peer: &Peer) -> anyhow::Result<[RouteNetlinkMessage; 3]> {
    let (IpAddr::V4(gateway), IpAddr::V4(node), Path::Vxlan(mac)) =
        (peer.gateway(), peer.public_ip, peer.path)
    else {
        bail!("{peer:?} is not reached in VXLAN over IPv4");
    };
    let entry = |family: AddressFamily, flags: NeighbourFlags, ip: Ipv4Addr| {
        let mut message = NeighbourMessage::default();
        message.header.family = family;
        message.header.ifindex = device;
        message.header.state = NeighbourState::Permanent;
        message.header.flags = flags;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)),
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
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
    Ok([
        entry(AddressFamily::Bridge, NeighbourFlags::Own, node),
        entry(AddressFamily::Inet, NeighbourFlags::empty(), gateway),
        RouteNetlinkMessage::NewRoute(route),
    ])
}
