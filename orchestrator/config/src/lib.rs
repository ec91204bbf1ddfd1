//! Names, numbers and paths that every part of orch agrees on.
//!
//! Nothing here does I/O. [`Paths`] derives every path from one root prefix, so that many nodes can live on
//! one machine (`--root`); the constants are the cluster defaults of Kubernetes and flannel.
//! [`network`] is flannel's network configuration, which etcd holds for all nodes. Start with [`Paths`].

pub mod network;

mod paths;

pub use paths::Paths;

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};

/// Version of orch itself.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Version that `/version` and the kubelet report: the Kubernetes API level this tree speaks.
pub const KUBERNETES_VERSION: &str = "v1.36.0+orch";

/// TCP port of the API server.
pub const API_SERVER_PORT: u16 = 6443;
/// TCP port of the agent's kubelet API.
pub const KUBELET_PORT: u16 = 10250;
/// TCP port on which etcd serves clients.
pub const ETCD_CLIENT_PORT: u16 = 2379;

/// TCP port on which members of etcd serve each other.
pub const ETCD_PEER_PORT: u16 = 2380;

/// VXLAN network identifier of the pod network (flannel's default).
pub const VXLAN_VNI: u32 = 1;
/// UDP port of the overlay: flannel's Linux default, not IANA's 4789.
pub const VXLAN_PORT: u16 = 8472;
/// Name of the VXLAN device. No dot: sysctl paths use dots as separators.
pub const VXLAN_DEVICE: &str = "vxlan-orch";
/// Comment of the rules that accept the pod network's packets in a firewall of others; they are found again by it.
pub const FIREWALL_COMMENT: &str = "orch pod network";
/// Bridge that the pods of a node are attached to.
pub const POD_BRIDGE: &str = "cni0";

/// etcd prefix of the subnet leases, flannel's.
pub const ETCD_NETWORK_PREFIX: &str = "/coreos.com/network";
/// Domain of the cluster's DNS names.
pub const CLUSTER_DOMAIN: &str = "cluster.local";

/// Network that node subnets are cut from.
pub const POD_CIDR: &str = "10.244.0.0/16";
/// Prefix length of one node's subnet.
pub const NODE_SUBNET_LEN: u8 = 24;
/// Network that ClusterIPs are allocated from.
pub const SERVICE_CIDR: &str = "10.96.0.0/12";
/// Network that the IPv6 ClusterIPs of Services are allocated from that ask for one. They lead somewhere once the pod
/// network has IPv6.
pub const SERVICE_CIDR_V6: &str = "fd00:10:96::/112";
/// ClusterIP of the cluster's DNS Service.
pub const DNS_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// First ClusterIP of the Service network: the address of `default/kubernetes`.
#[must_use]
pub fn kubernetes_service_ip(service_cidr: Ipv4Network) -> Ipv4Addr {
    Ipv4Addr::from_bits(service_cidr.network().to_bits() + 1)
}

/// IPv6 ClusterIP of the cluster's DNS Service: at the same place as the IPv4 one is by default.
#[must_use]
pub fn dns_ip_v6(service_cidr: Ipv6Network) -> Ipv6Addr {
    Ipv6Addr::from_bits(service_cidr.network().to_bits() + 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubernetes_service_has_the_first_address() {
        let cidr: Ipv4Network = SERVICE_CIDR.parse().expect("a constant CIDR");
        assert_eq!(kubernetes_service_ip(cidr), Ipv4Addr::new(10, 96, 0, 1));
    }
}
