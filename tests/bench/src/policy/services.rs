//! What the way through a Service adds to a connection: nftables as the agent writes it, with few and with many Services.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cni_nftables::Nft;
use orch_netagent::services::model::{Place, desired_ports};
use orch_netagent::services::ruleset::{Networks, desired_table};
use serde_json::json;

use crate::connect::{connects, with_sink};
use crate::world::{CLIENT, Node, Pod};

/// The server is where the node has to route to, so that answers come back through it.
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 3);
const PORT: u16 = 80;

/// A node whose Services all lead to one pod.
pub(crate) struct Site {
    _node: Node,
    client: Pod,
    server: Pod,
    count: usize,
}

fn cluster_ip(place: usize) -> Ipv4Addr {
    let [high, low] = u16::try_from(place).unwrap_or(u16::MAX).to_be_bytes();
    Ipv4Addr::new(10, 96, 1 + high, low)
}

impl Site {
    pub(crate) fn new(count: usize) -> anyhow::Result<Self> {
        let node = Node::new()?;
        let (client, server) = (node.pod(CLIENT, true)?, node.pod(SERVER, false)?);
        let (mut services, mut slices) = (Vec::new(), Vec::new());
        for place in 0..count {
            let (name, ip) = (format!("s{place}"), cluster_ip(place));
            let service = json!({
                "metadata": {"namespace": "default", "name": name},
                "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": PORT, "protocol": "TCP"}]},
            });
            let slice = json!({
                "metadata": {"namespace": "default", "name": name,
                    "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4",
                "ports": [{"port": 8080, "protocol": "TCP"}],
                "endpoints": [{"addresses": [SERVER], "conditions": {"ready": true}}],
            });
            services.push(Arc::new(serde_json::from_value(service)?));
            slices.push(Arc::new(serde_json::from_value(slice)?));
        }
        let place = Place { node: "node0", zone: None };
        let ports = desired_ports(&services, &slices, place, &[orch_config::DNS_IP.into()]);
        let networks = Networks {
            cluster: "10.244.0.0/16".parse()?,
            service: orch_config::SERVICE_CIDR.parse()?,
            dns_ip: orch_config::DNS_IP.into(),
        };
        let script = desired_table(&ports, &networks).replace_script();
        node.netns.run(|| -> anyhow::Result<()> { Ok(Nft::default().apply(&script)?) })?;
        Ok(Self { _node: node, client, server, count })
    }

    /// Microseconds of a connection: direct, and through Services by turns.
    pub(crate) fn measure(&self, time: Duration) -> anyhow::Result<[f64; 2]> {
        let micros =
            |times: Vec<Duration>| crate::median(times.iter().map(|time| time.as_secs_f64() * 1e6));
        with_sink(&self.server.netns, IpAddr::V4(SERVER), |direct| {
            let service = |turn: usize| SocketAddr::new(cluster_ip(turn % self.count).into(), PORT);
            // In halves, so that what else the machine does meets both.
            let mut sums = [0.0; 2];
            for _ in 0..2 {
                sums[0] += micros(connects(&self.client.netns, |_| direct, time / 4)?) / 2.0;
                sums[1] += micros(
                    connects(&self.client.netns, service, time / 4).context("through a Service")?,
                ) / 2.0;
            }
            Ok(sums)
        })
    }
}
