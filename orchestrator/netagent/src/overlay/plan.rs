//! From what the kernel holds to what it must hold. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::{Device, Path, Peers, ROUTE_PROTOCOL};
use crate::mac::Mac;

/// `IP6_RT_PRIO_USER` (`linux/ipv6_route.h`).
const IPV6_METRIC: u32 = 1024;

/// The device as the kernel holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenDevice {
    /// Index of the link.
    pub index: u32,
    /// Its VXLAN attributes, if it is a VXLAN device at all: those that cannot be changed in place.
    pub vxlan: Option<SeenVxlan>,
    /// MAC.
    pub mac: Mac,
    /// MTU.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Its addresses.
    pub addresses: Vec<IpNetwork>,
}

/// Attributes that are fixed at creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenVxlan {
    /// Identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Local address.
    pub local: Option<IpAddr>,
    /// Index of the underlay's link.
    pub underlay: Option<u32>,
    /// Whether it learns from what it receives. It must not: peers are what etcd says.
    pub learning: bool,
}

/// A route, as far as it says where packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hop {
    /// Destination.
    pub subnet: IpNetwork,
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Index of the link.
    pub link: Option<u32>,
    /// Metric: none in IPv4, 1024 in IPv6, where the kernel puts it in if nobody names one.
    pub metric: Option<u32>,
}

impl Hop {
    /// The metric of our routes of its family.
    #[must_use]
    pub fn own_metric(subnet: IpNetwork) -> Option<u32> {
        subnet.is_ipv6().then_some(IPV6_METRIC)
    }
}

/// What the kernel holds of peers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SeenPeers {
    /// Permanent neighbours on our device.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// FDB entries of our device.
    pub forwarding: BTreeMap<Mac, BTreeSet<IpAddr>>,
    /// Routes of our protocol, on whatever link.
    pub routes: BTreeSet<Hop>,
    /// Routes of others, with their protocol.
    pub foreign: BTreeSet<(Hop, u8)>,
}

impl SeenPeers {
    /// Forgets the routes of the other family.
    pub fn keep_family(&mut self, ipv4: bool) {
        self.routes.retain(|hop| hop.subnet.is_ipv4() == ipv4);
        self.foreign.retain(|(hop, _)| hop.subnet.is_ipv4() == ipv4);
    }
}

/// What the kernel must hold of peers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WantedPeers {
    /// Node of each VTEP.
    pub forwarding: BTreeMap<Mac, IpAddr>,
    /// VTEP of each next hop on our device.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Routes by destination.
    pub routes: BTreeMap<IpNetwork, Hop>,
    /// The lengths of their destinations.
    lengths: BTreeSet<u8>,
}

impl WantedPeers {
    /// The entries of these peers; `device` and `underlay` are indices of links.
    #[must_use]
    pub fn new(peers: &Peers, device: u32, underlay: u32) -> Self {
        let mut want = Self::default();
        for peer in peers.values() {
            let link = match peer.path {
                Path::Vxlan(mac) => {
                    // Two nodes of one MAC cannot both be reached; the first one keeps it, and the lease keeper shouts.
                    want.forwarding.entry(mac).or_insert(peer.public_ip);
                    want.neighbours.insert(peer.gateway(), mac);
                    device
                }
                Path::Direct => underlay,
            };
            let hop = Hop {
                subnet: peer.subnet,
                via: Some(peer.gateway()),
                link: Some(link),
                metric: Hop::own_metric(peer.subnet),
            };
            want.routes.insert(peer.subnet, hop);
            want.lengths.insert(peer.subnet.prefix());
        }
        want
    }

    /// Whether a route takes packets for a peer: to its subnet, as good as ours, or to a part of it.
    #[must_use]
    pub fn is_in_the_way(&self, hop: &Hop) -> bool {
        self.lengths.iter().filter(|length| **length <= hop.subnet.prefix()).any(|length| {
            let around =
                IpNetwork::new(hop.subnet.ip(), *length).expect("shorter than a valid one");
            let subnet = IpNetwork::new(around.network(), *length).expect("the same length");
            self.routes.contains_key(&subnet)
                && (hop.subnet.prefix() > *length
                    || hop.metric.unwrap_or(0) <= Hop::own_metric(hop.subnet).unwrap_or(0))
        })
    }
}

impl From<&WantedPeers> for SeenPeers {
    /// What the kernel holds after the wanted was applied.
    fn from(want: &WantedPeers) -> Self {
        Self {
            neighbours: want.neighbours.clone(),
            forwarding: want
                .forwarding
                .iter()
                .map(|(mac, node)| (*mac, BTreeSet::from([*node])))
                .collect(),
            routes: want.routes.values().copied().collect(),
            foreign: BTreeSet::new(),
        }
    }
}

/// One change of the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceStep {
    /// Remove a link that cannot become ours.
    Delete(u32),
    /// Make it.
    Create,
    /// Set the MAC.
    SetMac,
    /// Set the MTU.
    SetMtu,
    /// Remove an address.
    DeleteAddress(IpNetwork),
    /// Add our address.
    AddAddress,
    /// Bring it up.
    SetUp,
}

/// One change of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerStep {
    /// Frames for this MAC go to that node.
    PutForwarding(Mac, IpAddr),
    /// This next hop has that MAC.
    PutNeighbour(IpAddr, Mac),
    /// Packets to this subnet go there; nobody has a route to it.
    AddRoute(Hop),
    /// Packets to this subnet go there instead of where our former route led.
    PutRoute(Hop),
    /// Remove a route.
    DeleteRoute(Hop),
    /// Remove a neighbour.
    DeleteNeighbour(IpAddr),
    /// Remove an FDB entry.
    DeleteForwarding(Mac, IpAddr),
}

/// Steps that make the device right.
#[must_use]
pub fn plan_device(seen: Option<&SeenDevice>, want: &Device) -> Vec<DeviceStep> {
    let fixed = SeenVxlan {
        vni: want.vni,
        port: want.port,
        local: Some(want.local),
        underlay: Some(want.underlay),
        learning: false,
    };
    let Some(seen) = seen else {
        return vec![DeviceStep::Create, DeviceStep::AddAddress, DeviceStep::SetUp];
    };
    if seen.vxlan.as_ref() != Some(&fixed) {
        return vec![
            DeviceStep::Delete(seen.index),
            DeviceStep::Create,
            DeviceStep::AddAddress,
            DeviceStep::SetUp,
        ];
    }
    let mut steps = Vec::new();
    if seen.mac != want.mac {
        steps.push(DeviceStep::SetMac);
    }
    if seen.mtu != want.mtu {
        steps.push(DeviceStep::SetMtu);
    }
    let address = IpNetwork::from(want.address);
    // The kernel gives links addresses of their own, and each family has its device.
    let other = |other: &&IpNetwork| {
        **other != address
            && other.is_ipv4() == address.is_ipv4()
            && !matches!(other, IpNetwork::V6(other) if other.ip().is_unicast_link_local())
    };
    if !seen.addresses.contains(&address) {
        steps.push(DeviceStep::AddAddress);
    }
    steps
        .extend(seen.addresses.iter().filter(other).map(|other| DeviceStep::DeleteAddress(*other)));
    if !seen.up {
        steps.push(DeviceStep::SetUp);
    }
    steps
}

/// Steps that make the peers right, in an order in which no packet meets a half-made peer: what a route leads to is
/// there before the route, and goes after it; a node that moves has its new place before its old one goes.
#[must_use]
pub fn plan_peers(seen: &SeenPeers, want: &WantedPeers) -> Vec<PeerStep> {
    let mut steps = Vec::new();
    for hop in seen.routes.iter().filter(|hop| !want.routes.contains_key(&hop.subnet)) {
        steps.push(PeerStep::DeleteRoute(*hop));
    }
    for (mac, node) in &want.forwarding {
        if seen.forwarding.get(mac).is_none_or(|nodes| !nodes.contains(node) || nodes.len() != 1) {
            steps.push(PeerStep::PutForwarding(*mac, *node));
        }
    }
    for (gateway, mac) in &want.neighbours {
        if seen.neighbours.get(gateway) != Some(mac) {
            steps.push(PeerStep::PutNeighbour(*gateway, *mac));
        }
    }
    // A route of somebody else to the very subnet would be replaced by ours. It is not ours to replace.
    let taken: BTreeSet<IpNetwork> = seen
        .foreign
        .iter()
        .filter(|(hop, _)| hop.metric.unwrap_or(0) == Hop::own_metric(hop.subnet).unwrap_or(0))
        .map(|(hop, _)| hop.subnet)
        .collect();
    let replaced: BTreeSet<IpNetwork> = seen
        .routes
        .iter()
        .filter(|hop| hop.metric == Hop::own_metric(hop.subnet))
        .map(|hop| hop.subnet)
        .collect();
    for (subnet, hop) in &want.routes {
        if seen.routes.contains(hop) || taken.contains(subnet) {
            continue;
        }
        let put = if replaced.contains(subnet) { PeerStep::PutRoute } else { PeerStep::AddRoute };
        steps.push(put(*hop));
    }
    // Our former ones to the same subnet: another link, another metric. The replaced one is gone already, which is fine.
    let former = |hop: &&Hop| want.routes.get(&hop.subnet).is_some_and(|right| right != *hop);
    steps.extend(seen.routes.iter().filter(former).map(|hop| PeerStep::DeleteRoute(*hop)));
    for gateway in seen.neighbours.keys().filter(|gateway| !want.neighbours.contains_key(*gateway))
    {
        steps.push(PeerStep::DeleteNeighbour(*gateway));
    }
    for (mac, nodes) in &seen.forwarding {
        match want.forwarding.get(mac) {
            None => steps.extend(nodes.iter().map(|node| PeerStep::DeleteForwarding(*mac, *node))),
            // A replaced entry took the place of one old one; the others are still there.
            Some(right) if nodes.len() > 1 => {
                let wrong = nodes.iter().filter(|node| *node != right);
                steps.extend(wrong.map(|node| PeerStep::DeleteForwarding(*mac, *node)));
            }
            Some(_) => {}
        }
    }
    steps
}

/// Routes of others that take packets for our peers, in words for people.
#[must_use]
pub fn conflicts(seen: &SeenPeers, want: &WantedPeers) -> Vec<String> {
    let in_the_way = seen
        .foreign
        .iter()
        .filter(|(hop, protocol)| *protocol != ROUTE_PROTOCOL && want.is_in_the_way(hop));
    let words = |(hop, protocol): &(Hop, u8)| {
        let via = hop.via.map(|via| format!(" via {via}")).unwrap_or_default();
        let link = hop.link.map(|link| format!(" on link {link}")).unwrap_or_default();
        format!(
            "a route that is not ours takes packets for another node's pods: {}{via}{link} (protocol {protocol}); see `ip route show {}`, and remove it with `ip route delete {}{via}`",
            hop.subnet, hop.subnet, hop.subnet
        )
    };
    in_the_way.map(words).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use std::net::Ipv4Addr;

    use ipnetwork::Ipv4Network;

    use super::super::Peer;
    use super::*;

    const DEVICE: u32 = 9;
    const UNDERLAY: u32 = 2;

    fn ip(octets: [u8; 4]) -> IpAddr {
        octets.into()
    }

    fn net(third: u8) -> IpNetwork {
        IpNetwork::V4(Ipv4Network::new(Ipv4Addr::new(10, 244, third, 0), 24).expect("CIDR"))
    }

    fn wanted(peers: &Peers) -> WantedPeers {
        WantedPeers::new(peers, DEVICE, UNDERLAY)
    }

    fn peer(third: u8, mac: u8, node: u8) -> (IpNetwork, Peer) {
        let subnet = net(third);
        let peer = Peer {
            subnet,
            public_ip: ip([192, 0, 2, node]),
            // Every third node is on our link.
            path: if third % 3 == 2 {
                Path::Direct
            } else {
                Path::Vxlan(Mac([2, 0, 0, 0, 0, mac]))
            },
        };
        (subnet, peer)
    }

    /// What the kernel holds after the steps.
    fn carry_out(mut seen: SeenPeers, steps: &[PeerStep]) -> SeenPeers {
        for step in steps {
            match step {
                PeerStep::PutForwarding(mac, node) => {
                    // `replace` writes over the first destination of the MAC.
                    let nodes = seen.forwarding.entry(*mac).or_default();
                    if !nodes.contains(node) {
                        if nodes.len() == 1 {
                            nodes.clear();
                        }
                        nodes.insert(*node);
                    }
                }
                PeerStep::PutNeighbour(gateway, mac) => {
                    seen.neighbours.insert(*gateway, *mac);
                }
                PeerStep::AddRoute(hop) => {
                    let rival =
                        |other: &Hop| other.subnet == hop.subnet && other.metric == hop.metric;
                    assert!(!seen.routes.iter().any(rival), "the kernel refuses it");
                    seen.routes.insert(*hop);
                }
                PeerStep::PutRoute(hop) => {
                    // `replace` writes over the first route of the same destination and metric.
                    let rival =
                        |other: &&Hop| other.subnet == hop.subnet && other.metric == hop.metric;
                    let first = seen.routes.iter().find(rival).copied();
                    if let Some(first) = first {
                        seen.routes.remove(&first);
                    }
                    seen.routes.insert(*hop);
                }
                PeerStep::DeleteRoute(hop) => drop(seen.routes.remove(hop)),
                PeerStep::DeleteNeighbour(gateway) => drop(seen.neighbours.remove(gateway)),
                PeerStep::DeleteForwarding(mac, node) => {
                    let nodes = seen.forwarding.get_mut(mac).expect("it was seen");
                    nodes.remove(node);
                    if nodes.is_empty() {
                        seen.forwarding.remove(mac);
                    }
                }
            }
        }
        seen
    }

    #[test]
    fn a_new_peer_has_its_route_last_and_a_lost_one_loses_it_first() {
        let want = wanted(&Peers::from([peer(3, 2, 2)]));
        let steps = plan_peers(&SeenPeers::default(), &want);
        assert!(matches!(
            steps.as_slice(),
            [PeerStep::PutForwarding(..), PeerStep::PutNeighbour(..), PeerStep::AddRoute(..)]
        ));
        let seen = carry_out(SeenPeers::default(), &steps);
        assert!(matches!(
            plan_peers(&seen, &WantedPeers::default()).as_slice(),
            [
                PeerStep::DeleteRoute(..),
                PeerStep::DeleteNeighbour(..),
                PeerStep::DeleteForwarding(..)
            ]
        ));
    }

    #[test]
    fn a_device_of_other_attributes_is_made_again_and_a_downed_one_brought_up() {
        let want = Device {
            name: "vxlan-orch".to_owned(),
            vni: 1,
            port: 8472,
            local: ip([192, 0, 2, 1]),
            underlay: 2,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            address: ip([10, 244, 1, 0]),
        };
        let mut seen = SeenDevice {
            index: DEVICE,
            vxlan: Some(SeenVxlan {
                vni: 1,
                port: 8472,
                local: Some(want.local),
                underlay: Some(2),
                learning: false,
            }),
            mac: want.mac,
            mtu: 1450,
            up: true,
            addresses: vec![want.address.into()],
        };
        assert_eq!(plan_device(Some(&seen), &want), []);
        seen.up = false;
        assert_eq!(plan_device(Some(&seen), &want), [DeviceStep::SetUp]);
        seen.vxlan.as_mut().expect("set").learning = true;
        assert_eq!(
            plan_device(Some(&seen), &want)[..2],
            [DeviceStep::Delete(DEVICE), DeviceStep::Create]
        );
    }

    fn peers() -> impl Strategy<Value = Peers> {
        // MACs belong to nodes, so they are as distinct as subnets.
        prop::collection::btree_map(0_u8..12, 0_u8..12, 0..10).prop_map(|nodes| {
            nodes.into_iter().map(|(third, node)| peer(third, third, node)).collect()
        })
    }

    proptest! {
        #[test]
        fn one_plan_is_enough_from_any_state(
            want in peers(),
            neighbours in prop::collection::btree_map(0_u8..12, 0_u8..12, 0..10),
            forwarding in prop::collection::btree_map(0_u8..12, prop::collection::btree_set(0_u8..12, 1..3), 0..10),
            routes in prop::collection::btree_set((0_u8..12, 0_u8..12, 8_u32..11, prop::option::of(1_u32..3)), 0..10),
        ) {
            let seen = SeenPeers {
                neighbours: neighbours
                    .into_iter()
                    .map(|(third, mac)| (ip([10, 244, third, 0]), Mac([2, 0, 0, 0, 0, mac])))
                    .collect(),
                forwarding: forwarding
                    .into_iter()
                    .map(|(mac, nodes)| {
                        let nodes = nodes.into_iter().map(|node| ip([192, 0, 2, node])).collect();
                        (Mac([2, 0, 0, 0, 0, mac]), nodes)
                    })
                    .collect(),
                routes: routes
                    .into_iter()
                    .map(|(third, via, link, metric)| Hop {
                        subnet: net(third),
                        via: Some(ip([10, 244, via, 0])),
                        link: Some(link),
                        metric,
                    })
                    .collect(),
                foreign: BTreeSet::new(),
            };
            let want = wanted(&want);
            let steps = plan_peers(&seen, &want);
            let after = carry_out(seen, &steps);
            prop_assert_eq!(plan_peers(&after, &want), vec![]);
            prop_assert_eq!(after, SeenPeers::from(&want));
        }
    }

    #[test]
    fn a_foreign_route_is_reported_and_never_replaced() {
        let (subnet, peer) = peer(3, 3, 3);
        let want = wanted(&Peers::from([(subnet, peer)]));
        let hop = |cidr: &str, metric| Hop {
            subnet: cidr.parse().expect("CIDR"),
            via: None,
            link: Some(7),
            metric,
        };
        let routes = |seen: &SeenPeers| {
            let steps = plan_peers(seen, &want);
            steps.iter().filter(|step| matches!(step, PeerStep::AddRoute(_))).count()
        };
        for (foreign, reported, put) in [
            (hop("10.244.3.0/24", None), 1, 0),
            (hop("10.244.3.0/24", Some(100)), 0, 1),
            (hop("10.244.3.128/25", Some(100)), 1, 1),
            (hop("10.244.0.0/16", None), 0, 1),
            (hop("10.244.4.0/24", None), 0, 1),
        ] {
            let seen = SeenPeers { foreign: [(foreign, 4)].into(), ..SeenPeers::default() };
            assert_eq!(conflicts(&seen, &want).len(), reported, "{foreign:?}");
            assert_eq!(routes(&seen), put, "{foreign:?}");
        }
    }
}
