//! Forgetting UDP flows to endpoints that are gone.
//!
//! A UDP flow has no end: conntrack would go on sending a busy client's packets to an address that nobody has any
//! more. TCP clients get a reset and connect anew.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use tracing::{debug, warn};

use super::model::{Port, Protocol};

/// A destination and the endpoint that served it.
pub(super) type Flow = (Ipv4Addr, Ipv4Addr);

/// Every pair of frontend and endpoint over UDP.
pub(super) fn udp_flows(ports: &[Port], node_ip: Ipv4Addr) -> BTreeSet<Flow> {
    let udp = ports.iter().filter(|port| port.protocol == Protocol::Udp);
    udp.flat_map(|port| {
        let node = port.node_port.map(|_| node_ip);
        let frontends: Vec<Ipv4Addr> =
            port.cluster_ips.iter().chain(&port.external_ips).copied().chain(node).collect();
        port.pool(false)
            .into_iter()
            .flat_map(move |endpoint| frontends.clone().into_iter().map(move |ip| (ip, endpoint.ip)))
    })
    .collect()
}

/// Deletes the flows' entries with the `conntrack` tool. Where it is missing, they time out (30 to 120 s).
pub(super) fn forget(gone: &BTreeSet<Flow>) {
    for (frontend, endpoint) in gone {
        let status = Command::new("conntrack")
            .args(["-D", "-p", "udp", "--orig-dst", &frontend.to_string(), "--dst-nat", &endpoint.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        match status {
            // Exit 1 is "nothing to delete".
            Ok(_) => debug!(%frontend, %endpoint, "UDP flows forgotten"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                warn!("the program conntrack is missing: UDP flows to removed endpoints live until they time out");
                return;
            }
            Err(error) => warn!(%error, "cannot run conntrack"),
        }
    }
}
