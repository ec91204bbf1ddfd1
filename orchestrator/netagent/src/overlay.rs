//! The VXLAN device and what this node knows of every remote node.
//!
//! Per remote node that is reached in VXLAN: an FDB entry (VTEP MAC → node address), a permanent neighbour (subnet base →
//! VTEP MAC) and an onlink route (subnet via its base), flannel's shape. Per remote node that is reached directly: a
//! route via its underlay address. [`plan`] compares what the kernel holds with what the leases say; [`kernel`] reads and
//! writes it; `task` does that whenever something may have changed: from a dump when the kernel's state is in question,
//! from what was applied before when only a lease changed, so that an event costs what it changes.
//!
//! Ours are: everything on our device, and routes with our protocol number. Nothing else is touched; a foreign route
//! that stands in the way is reported. [`interface`] finds the underlay; [`closed`] is the firewall around the overlay
//! and [`forward`] its way through that of others.

pub mod closed;
mod events;
pub mod forward;
pub mod interface;
pub mod kernel;
pub(crate) mod nft_events;
pub mod plan;
pub(crate) mod task;

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::lease::{Identity, Network};
use crate::mac::Mac;
use crate::network::Mode;

pub use nft_events::NftNews;

/// Protocol number of our routes: says in `ip route` who made them, and to us which we may remove. Free in iproute2's
/// rt_protos.
pub const ROUTE_PROTOCOL: u8 = 0x6f;

/// The device as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Address of this node on the underlay.
    pub local: IpAddr,
    /// Index of the underlay's link.
    pub underlay: u32,
    /// MAC of this node's VTEP.
    pub mac: Mac,
    /// MTU.
    pub mtu: u32,
    /// Base of this node's subnet; with the longest prefix, so that no broadcast routes appear.
    pub address: IpAddr,
}

/// A remote node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its subnet.
    pub subnet: IpNetwork,
    /// Its address on the underlay.
    pub public_ip: IpAddr,
    /// How packets get there.
    pub path: Path,
}

/// How packets get to a remote node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// In VXLAN, to the VTEP of this MAC.
    Vxlan(Mac),
    /// As they are, over the underlay's link.
    Direct,
}

impl Peer {
    /// Next hop of the route to its subnet: the address of its device, or of the node itself.
    #[must_use]
    pub fn gateway(&self) -> IpAddr {
        match self.path {
            Path::Vxlan(_) => self.subnet.network(),
            Path::Direct => self.public_ip,
        }
    }
}

/// Remote nodes by their subnet.
pub type Peers = BTreeMap<IpNetwork, Peer>;

/// The remote nodes that the leases name, of both families and without ourselves, and those of them that cannot be reached
/// in this network's mode: `on_link` are the networks of the underlay's link.
#[must_use]
pub fn desired_peers(
    network: &Network,
    me: &Identity,
    on_link: &[IpNetwork],
) -> (Peers, Vec<String>) {
    let mode = network.config.mode;
    let mut unreachable = Vec::new();
    let mut peers = Peers::new();
    for lease in network.leases.values() {
        let Some(value) = &lease.value else { continue };
        let (vtep, vtep_v6) = (value.vtep(), value.vtep_ipv6());
        let own = lease.key == network.own
            || vtep.is_some_and(|data| data.vtep_mac == me.vtep_mac)
            || value.public_ip == me.public_ip;
        if own || !value.forwards() {
            continue;
        }
        // Only where this node has a part in it itself.
        let v4 = lease.key.v4.filter(|_| network.own.v4.is_some());
        let v4 = v4.map(|subnet| (IpNetwork::V4(subnet), IpAddr::V4(value.public_ip), vtep));
        let v6 = lease.key.v6.zip(value.public_ipv6).filter(|_| network.own.v6.is_some());
        let v6 = v6.map(|(subnet, ip)| (IpNetwork::V6(subnet), IpAddr::V6(ip), vtep_v6));
        for (subnet, public_ip, vtep) in v4.into_iter().chain(v6) {
            let neighbour = || on_link.iter().any(|link| link.contains(public_ip));
            let vxlan = vtep
                .filter(|data| data.vni == network.config.vni)
                .map(|data| Path::Vxlan(data.vtep_mac));
            let path = if mode != Mode::Vxlan && neighbour() { Some(Path::Direct) } else { vxlan };
            match path {
                Some(path) => drop(peers.insert(subnet, Peer { subnet, public_ip, path })),
                // In a network of VXLAN a node of another backend belongs to another network.
                None if mode == Mode::HostGw => unreachable.push(format!(
                    "{subnet}: its node {public_ip} is on no link of this node, and mode host-gw has no other way; set the backend to {{\"Type\":\"vxlan\",\"DirectRouting\":true}}"
                )),
                None => {}
            }
        }
    }
    (peers, unreachable)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use ipnetwork::Ipv4Network;

    use super::*;
    use crate::lease::{Lease, LeaseValue, SubnetKey, VxlanData};
    use crate::network::NetworkConfig;

    #[test]
    fn own_leases_and_those_of_other_backends_and_networks_are_no_peers() {
        let me = Identity {
            public_ip: Ipv4Addr::new(192, 0, 2, 1),
            vtep_mac: Mac([2, 0, 0, 0, 0, 1]),
            public_ipv6: None,
        };
        let lease = |third: u8, host: u8, vni: u32, backend: &str| {
            let v4 = Ipv4Network::new(Ipv4Addr::new(10, 244, third, 0), 24).expect("CIDR");
            let data = VxlanData { vni, vtep_mac: Mac([2, 0, 0, 0, 0, host]) };
            let mut value = LeaseValue::vxlan(Ipv4Addr::new(192, 0, 2, host), data);
            value.backend_type = Some(backend.to_owned());
            let key = SubnetKey { v4: Some(v4), v6: None };
            (key, Lease { key, value: Some(value), mod_revision: 1, etcd_lease: 1 })
        };
        let network = Network {
            config: NetworkConfig::new("10.244.0.0/16".parse().expect("CIDR"), 24, 1, 8472)
                .expect("valid"),
            own: "10.244.1.0-24".parse().expect("a key"),
            leases: [
                lease(1, 1, 1, "vxlan"),
                lease(2, 2, 1, "vxlan"),
                lease(3, 3, 7, "vxlan"),
                lease(4, 4, 1, "host-gw"),
                lease(5, 1, 1, "vxlan"),
                lease(6, 6, 1, "wireguard"),
            ]
            .into(),
            config_problem: None,
        };
        let (peers, _) = desired_peers(&network, &me, &[]);
        // A node of ours that has taken up another mode already is still reached in VXLAN.
        assert_eq!(
            peers.keys().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.244.2.0/24", "10.244.4.0/24"]
        );
        // .2 and .3 are on our link, whatever their VNI; .4 is not.
        let on_link = ["192.0.2.0/30".parse().expect("CIDR")];
        for (mode, unreachable) in [(Mode::DirectRouting, 0), (Mode::HostGw, 0)] {
            let network =
                Network { config: network.config.clone().with_mode(mode), ..network.clone() };
            let (peers, lost) = desired_peers(&network, &me, &on_link);
            let paths: Vec<_> = peers
                .values()
                .map(|peer| (peer.public_ip.to_string(), peer.path == Path::Direct))
                .collect();
            assert_eq!(
                paths,
                [(2, true), (3, true), (4, false)]
                    .map(|(last, direct)| (format!("192.0.2.{last}"), direct)),
                "{mode:?}"
            );
            assert_eq!(lost.len(), unreachable);
        }
    }
}
