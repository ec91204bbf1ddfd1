//! From what the kernel holds to what it must hold. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;

use super::{Device, Peers};
use crate::mac::Mac;

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
    /// Its IPv4 addresses.
    pub addresses: Vec<Ipv4Network>,
}

/// Attributes that are fixed at creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenVxlan {
    /// Identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Local address.
    pub local: Option<Ipv4Addr>,
    /// Index of the underlay's link.
    pub underlay: Option<u32>,
    /// Whether it learns from what it receives. It must not: peers are what etcd says.
    pub learning: bool,
}

/// What the kernel holds of peers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SeenPeers {
    /// Permanent neighbours on our device.
    pub neighbours: BTreeMap<Ipv4Addr, Mac>,
    /// FDB entries of our device.
    pub forwarding: BTreeMap<Mac, BTreeSet<Ipv4Addr>>,
    /// Routes of our protocol: next hop and link.
    pub routes: BTreeMap<Ipv4Network, (Option<Ipv4Addr>, Option<u32>)>,
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
    DeleteAddress(Ipv4Network),
    /// Add our address.
    AddAddress,
    /// Bring it up.
    SetUp,
}

/// One change of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerStep {
    /// Frames for this MAC go to that node.
    PutForwarding(Mac, Ipv4Addr),
    /// This next hop has that MAC.
    PutNeighbour(Ipv4Addr, Mac),
    /// This subnet is behind its base address.
    PutRoute(Ipv4Network),
    /// Remove a route.
    DeleteRoute(Ipv4Network),
    /// Remove a neighbour.
    DeleteNeighbour(Ipv4Addr),
    /// Remove an FDB entry.
    DeleteForwarding(Mac, Ipv4Addr),
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
    let address = Ipv4Network::from(want.address);
    if !seen.addresses.contains(&address) {
        steps.push(DeviceStep::AddAddress);
    }
    steps.extend(
        seen.addresses
            .iter()
            .filter(|other| **other != address)
            .map(|other| DeviceStep::DeleteAddress(*other)),
    );
    if !seen.up {
        steps.push(DeviceStep::SetUp);
    }
    steps
}

/// Steps that make the peers right, in an order in which no packet meets a half-made peer: what a route leads to is
/// there before the route, and goes after it; a node that moves has its new place before its old one goes.
#[must_use]
pub fn plan_peers(seen: &SeenPeers, want: &Peers, device: u32) -> Vec<PeerStep> {
    let mut steps = Vec::new();
    for (subnet, _) in seen.routes.iter().filter(|(subnet, _)| !want.contains_key(*subnet)) {
        steps.push(PeerStep::DeleteRoute(*subnet));
    }
    let mut forwarding: BTreeMap<Mac, Ipv4Addr> = BTreeMap::new();
    let mut neighbours: BTreeMap<Ipv4Addr, Mac> = BTreeMap::new();
    for peer in want.values() {
        // Two nodes of one MAC cannot both be reached; the first one keeps it, and the lease keeper shouts.
        forwarding.entry(peer.vtep_mac).or_insert(peer.public_ip);
        neighbours.insert(peer.gateway(), peer.vtep_mac);
    }
    for (mac, node) in &forwarding {
        if seen.forwarding.get(mac).is_none_or(|nodes| !nodes.contains(node) || nodes.len() != 1) {
            steps.push(PeerStep::PutForwarding(*mac, *node));
        }
    }
    for (gateway, mac) in &neighbours {
        if seen.neighbours.get(gateway) != Some(mac) {
            steps.push(PeerStep::PutNeighbour(*gateway, *mac));
        }
    }
    for peer in want.values() {
        if seen.routes.get(&peer.subnet) != Some(&(Some(peer.gateway()), Some(device))) {
            steps.push(PeerStep::PutRoute(peer.subnet));
        }
    }
    for gateway in seen.neighbours.keys().filter(|gateway| !neighbours.contains_key(*gateway)) {
        steps.push(PeerStep::DeleteNeighbour(*gateway));
    }
    for (mac, nodes) in &seen.forwarding {
        match forwarding.get(mac) {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Peer;
    use super::*;

    const DEVICE: u32 = 9;

    fn peer(third: u8, mac: u8, node: u8) -> (Ipv4Network, Peer) {
        let subnet = Ipv4Network::new(Ipv4Addr::new(10, 244, third, 0), 24).expect("CIDR");
        let peer = Peer {
            subnet,
            vtep_mac: Mac([2, 0, 0, 0, 0, mac]),
            public_ip: Ipv4Addr::new(192, 0, 2, node),
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
                PeerStep::PutRoute(subnet) => {
                    seen.routes.insert(*subnet, (Some(subnet.network()), Some(DEVICE)));
                }
                PeerStep::DeleteRoute(subnet) => drop(seen.routes.remove(subnet)),
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
        let peers = Peers::from([peer(2, 2, 2)]);
        let steps = plan_peers(&SeenPeers::default(), &peers, DEVICE);
        assert!(matches!(
            steps.as_slice(),
            [PeerStep::PutForwarding(..), PeerStep::PutNeighbour(..), PeerStep::PutRoute(..)]
        ));
        let seen = carry_out(SeenPeers::default(), &steps);
        assert!(matches!(
            plan_peers(&seen, &Peers::new(), DEVICE).as_slice(),
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
            local: Ipv4Addr::new(192, 0, 2, 1),
            underlay: 2,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            address: Ipv4Addr::new(10, 244, 1, 0),
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
            routes in prop::collection::btree_map(0_u8..12, (0_u8..12, 8_u32..11), 0..10),
        ) {
            let seen = SeenPeers {
                neighbours: neighbours
                    .into_iter()
                    .map(|(third, mac)| (Ipv4Addr::new(10, 244, third, 0), Mac([2, 0, 0, 0, 0, mac])))
                    .collect(),
                forwarding: forwarding
                    .into_iter()
                    .map(|(mac, nodes)| {
                        let nodes = nodes.into_iter().map(|node| Ipv4Addr::new(192, 0, 2, node)).collect();
                        (Mac([2, 0, 0, 0, 0, mac]), nodes)
                    })
                    .collect(),
                routes: routes
                    .into_iter()
                    .map(|(third, (via, link))| {
                        let subnet = Ipv4Network::new(Ipv4Addr::new(10, 244, third, 0), 24).expect("CIDR");
                        (subnet, (Some(Ipv4Addr::new(10, 244, via, 0)), Some(link)))
                    })
                    .collect(),
            };
            let steps = plan_peers(&seen, &want, DEVICE);
            let after = carry_out(seen, &steps);
            prop_assert_eq!(plan_peers(&after, &want, DEVICE), vec![]);
            prop_assert_eq!(after.routes.len(), want.len());
        }
    }
}
