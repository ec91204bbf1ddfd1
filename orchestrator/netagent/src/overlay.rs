//! The VXLAN device and what it knows of every remote node.
//!
//! Per remote node: an FDB entry (VTEP MAC → node address), a permanent neighbour (subnet base → VTEP MAC) and an
//! onlink route (subnet via its base), flannel's shape. [`plan`] compares what the kernel holds with what the leases
//! say; [`kernel`] reads and writes it; [`task`] does that whenever something may have changed.
//!
//! Ours are: everything on our device, and routes with our protocol number. Nothing else is touched.

mod events;
pub mod kernel;
pub mod plan;
pub(crate) mod task;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;

use crate::lease::{Identity, Network};
use crate::mac::Mac;

/// Bytes VXLAN takes from the underlay MTU when the outer header is IPv4: inner Ethernet 14 + VXLAN 8 + UDP 8 + outer
/// IPv4 20 (RFC 7348 §5).
pub const VXLAN_OVERHEAD_IPV4: u32 = 50;
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
    pub local: Ipv4Addr,
    /// Index of the underlay's link.
    pub underlay: u32,
    /// MAC of this node's VTEP.
    pub mac: Mac,
    /// MTU.
    pub mtu: u32,
    /// Base of this node's subnet; a /32, so that no broadcast routes appear.
    pub address: Ipv4Addr,
}

/// A remote node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its subnet.
    pub subnet: Ipv4Network,
    /// MAC of its VTEP.
    pub vtep_mac: Mac,
    /// Its address on the underlay.
    pub public_ip: Ipv4Addr,
}

impl Peer {
    /// Next hop of the route to its subnet: the address of its device.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.subnet.network()
    }
}

/// Remote nodes by their subnet.
pub type Peers = BTreeMap<Ipv4Network, Peer>;

/// The remote nodes that the leases name: VXLAN nodes of our VNI, without ourselves.
#[must_use]
pub fn desired_peers(network: &Network, me: &Identity) -> Peers {
    let peers = network.leases.values().filter_map(|lease| {
        let value = lease.value.as_ref()?;
        let data = value.vxlan_data().filter(|data| data.vni == network.config.vni)?;
        let own = lease.key.v4 == network.own
            || data.vtep_mac == me.vtep_mac
            || value.public_ip == me.public_ip;
        (!own).then_some((
            lease.key.v4,
            Peer { subnet: lease.key.v4, vtep_mac: data.vtep_mac, public_ip: value.public_ip },
        ))
    });
    peers.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Lease, LeaseValue, SubnetKey, VxlanData};
    use crate::network::NetworkConfig;

    #[test]
    fn own_leases_and_those_of_other_backends_and_networks_are_no_peers() {
        let me =
            Identity { public_ip: Ipv4Addr::new(192, 0, 2, 1), vtep_mac: Mac([2, 0, 0, 0, 0, 1]) };
        let lease = |third: u8, host: u8, vni: u32, backend: &str| {
            let v4 = Ipv4Network::new(Ipv4Addr::new(10, 244, third, 0), 24).expect("CIDR");
            let data = VxlanData { vni, vtep_mac: Mac([2, 0, 0, 0, 0, host]) };
            let mut value = LeaseValue::vxlan(Ipv4Addr::new(192, 0, 2, host), data);
            value.backend_type = Some(backend.to_owned());
            (
                v4,
                Lease {
                    key: SubnetKey { v4, v6: None },
                    value: Some(value),
                    mod_revision: 1,
                    etcd_lease: 1,
                },
            )
        };
        let network = Network {
            config: NetworkConfig::new("10.244.0.0/16".parse().expect("CIDR"), 24, 1, 8472)
                .expect("valid"),
            own: "10.244.1.0/24".parse().expect("CIDR"),
            leases: [
                lease(1, 1, 1, "vxlan"),
                lease(2, 2, 1, "vxlan"),
                lease(3, 3, 7, "vxlan"),
                lease(4, 4, 1, "host-gw"),
                lease(5, 1, 1, "vxlan"),
            ]
            .into(),
        };
        let peers = desired_peers(&network, &me);
        assert_eq!(peers.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.244.2.0/24"]);
    }
}
