//! What the network agent is told at its start.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use async_trait::async_trait;
use ipnetwork::{Ipv4Network, Ipv6Network};
use orch_client::Client;
use orch_config::Paths;

use crate::network::NetworkConfig;
use crate::overlay::interface::Choice;
use crate::{EtcdConfig, Mode};

/// Everything that differs between nodes and clusters. The defaults are the cluster's.
#[derive(Clone)]
pub struct Options {
    /// Name of the Node object.
    pub node_name: String,
    /// The node's address on the underlay.
    pub node_ip: Ipv4Addr,
    /// Where the subnet leases are.
    pub etcd: EtcdConfig,
    /// Prefix of the network's keys there.
    pub etcd_prefix: String,
    /// Written to etcd if there is no network configuration yet.
    pub network: NetworkConfig,
    /// The API server: Services, endpoints, namespaces, the own Node.
    pub client: Client,
    /// The node's files.
    pub paths: Paths,
    /// Name of the VXLAN device.
    pub device: String,
    /// Link that carries the overlay; if nothing is said, the one that has `node_ip`, else that of the default route.
    pub interface: Choice,
    /// Where other nodes send to, if that is no address of the link (a NAT between). Else it is the link's: `node_ip`,
    /// unless `interface` chooses a link that does not have it.
    pub public_ip: Option<Ipv4Addr>,
    /// The same for IPv6; else the link's first global address.
    pub public_ipv6: Option<Ipv6Addr>,
    /// Where cluster IPs come from.
    pub service_cidr: Ipv4Network,
    /// The same for IPv6; in force while the pod network has IPv6.
    pub service_cidr_v6: Option<Ipv6Network>,
    /// Address of the node's DNS server, the cluster IP of `kube-dns`. The one of IPv6 follows from its network.
    pub dns_ip: Ipv4Addr,
    /// Domain of the cluster's names.
    pub cluster_domain: String,
    /// Resolvers for all other names; without one, those of `resolv_conf`.
    pub upstream_dns: Vec<IpAddr>,
    /// Resolver configuration of the node.
    pub resolv_conf: PathBuf,
    /// Whether NetworkPolicies are enforced. With `Auto`, only if the plugin is installed, too; with `On`, no pod starts without.
    pub policy: Mode,
    /// Whether pods reach Services by a choice at connect time; else packets are translated.
    pub services: Mode,
}

impl Options {
    /// The DNS server's addresses, IPv4 first.
    #[must_use]
    pub fn dns_ips(&self) -> Vec<IpAddr> {
        let v6 = self.service_cidr_v6.map(orch_config::dns_ip_v6);
        [IpAddr::V4(self.dns_ip)].into_iter().chain(v6.map(IpAddr::V6)).collect()
    }
}

impl Default for Options {
    fn default() -> Self {
        let cidr = |text: &str| text.parse().expect("the cluster's constants are CIDRs");
        let network = NetworkConfig::new(
            cidr(orch_config::POD_CIDR),
            orch_config::NODE_SUBNET_LEN,
            orch_config::VXLAN_VNI,
            orch_config::VXLAN_PORT,
        );
        Self {
            node_name: String::new(),
            node_ip: Ipv4Addr::LOCALHOST,
            etcd: EtcdConfig::default(),
            etcd_prefix: orch_config::ETCD_NETWORK_PREFIX.to_owned(),
            network: network.expect("the cluster's constants are a network"),
            client: Client::new(NoServer),
            paths: Paths::new("/"),
            device: orch_config::VXLAN_DEVICE.to_owned(),
            interface: Choice::default(),
            public_ip: None,
            public_ipv6: None,
            service_cidr: cidr(orch_config::SERVICE_CIDR),
            service_cidr_v6: orch_config::SERVICE_CIDR_V6.parse().ok(),
            dns_ip: orch_config::DNS_IP,
            cluster_domain: orch_config::CLUSTER_DOMAIN.to_owned(),
            upstream_dns: Vec::new(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            policy: Mode::default(),
            services: Mode::default(),
        }
    }
}

/// Stands where an API server has to be named.
struct NoServer;

#[async_trait]
impl orch_client::Transport for NoServer {
    async fn send(
        &self,
        _request: http::Request<bytes::Bytes>,
    ) -> Result<http::Response<orch_client::Body>, orch_client::Error> {
        Err(orch_client::Error::Config(
            "the network agent was started without an API server".to_owned(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_clusters() {
        let options = Options::default();
        assert_eq!(options.network.v4.expect("IPv4").network.to_string(), "10.244.0.0/16");
        assert!(options.service_cidr.contains(options.dns_ip));
    }
}
