//! Forgetting UDP flows that lead to endpoints that are gone.
//!
//! A UDP flow has no end: conntrack would go on sending a busy client's packets to an address that nobody has any
//! more. TCP clients get a reset and connect anew.
//!
//! The look is at the kernel's whole table, not at what changed since the last time, so that what an agent missed
//! while it was down is cleaned up as well.

use std::io;

use cni_nftables::{Flow, forget_flows_that};

use super::model::{Port, Protocol};

const IPPROTO_UDP: u8 = 17;

/// Deletes the UDP flows to the frontends of `ports` that lead elsewhere than to their endpoints; says how many.
///
/// # Errors
/// If the kernel cannot be asked.
pub(super) fn forget_stale(ports: &[Port]) -> io::Result<usize> {
    if !ports.iter().any(|port| port.protocol == Protocol::Udp) {
        return Ok(0);
    }
    let mut gone = 0;
    for ipv4 in [true, false] {
        if ports.iter().any(|port| port.in_family(!ipv4).is_some()) {
            gone += forget_flows_that(ipv4, |flow| is_stale(flow, ports))?;
        }
    }
    Ok(gone)
}

/// Whether a flow is UDP and goes to a frontend of ours, but not to one of its endpoints. Pure.
fn is_stale(flow: &Flow, ports: &[Port]) -> bool {
    if flow.protocol != IPPROTO_UDP {
        return false;
    }
    let (ip, port) = (flow.to.ip(), flow.to.port());
    let v6 = ip.is_ipv6();
    let translated = flow.to != flow.answers;
    let udp = ports.iter().filter(|candidate| candidate.protocol == Protocol::Udp);
    udp.filter_map(|candidate| candidate.in_family(v6)).any(|candidate| {
        let outside = candidate.external_ips.iter().chain(&candidate.balancer_ips);
        let at_address = candidate.port == port
            && candidate.cluster_ips.iter().chain(outside).any(|own| *own == ip);
        // Any of the node's addresses; a flow to the same port elsewhere is not translated.
        let at_node = candidate.node_port == Some(port) && translated;
        let leads_to = |flow: &Flow| {
            let pool =
                if candidate.endpoints.is_empty() { Vec::new() } else { candidate.pool(false) };
            let local = candidate.pool(true);
            pool.iter()
                .chain(&local)
                .any(|one| one.ip == flow.answers.ip() && one.port == flow.answers.port())
        };
        // An untranslated flow is from before the Service had an endpoint: it now keeps the client from it.
        let lost = translated || !candidate.endpoints.is_empty();
        (at_address || at_node) && lost && !leads_to(flow)
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::super::model::Endpoint;
    use super::*;

    fn dns(endpoints: &[u8]) -> Port {
        let endpoint = |last: &u8| Endpoint {
            ip: Ipv4Addr::new(10, 244, 1, *last).into(),
            port: 5353,
            local: true,
            ready: true,
            near: true,
        };
        Port {
            id: "default/dns/udp/53".to_owned(),
            protocol: Protocol::Udp,
            cluster_ips: vec![Ipv4Addr::new(10, 96, 3, 4).into()],
            port: 53,
            node_port: Some(30053),
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            external_local: false,
            internal_local: false,
            affinity: None,
            endpoints: endpoints.iter().map(endpoint).collect(),
        }
    }

    fn flow(frontend: &str, backend: &str) -> Flow {
        let at = |text: &str| text.parse().expect("address");
        Flow::new(IPPROTO_UDP, at(frontend), at(backend))
    }

    #[test]
    fn flows_to_former_endpoints_are_stale_and_those_to_present_ones_are_not() {
        let ports = [dns(&[2])];
        for frontend in ["10.96.3.4:53", "192.0.2.1:30053", "127.0.0.1:30053"] {
            assert!(!is_stale(&flow(frontend, "10.244.1.2:5353"), &ports), "{frontend}");
            assert!(is_stale(&flow(frontend, "10.244.1.9:5353"), &ports), "{frontend}");
        }
        assert!(
            is_stale(&flow("10.96.3.4:53", "10.244.1.2:5353"), &[dns(&[])]),
            "the last endpoint is gone"
        );
    }

    #[test]
    fn an_untranslated_flow_is_stale_once_there_is_an_endpoint() {
        let early = flow("10.96.3.4:53", "10.96.3.4:53");
        assert!(is_stale(&early, &[dns(&[2])]));
        assert!(!is_stale(&early, &[dns(&[])]));
    }

    #[test]
    fn flows_of_others_are_left_alone() {
        let ports = [dns(&[2])];
        assert!(!is_stale(&flow("10.96.3.4:54", "10.244.1.9:5353"), &ports), "another port");
        assert!(!is_stale(&flow("8.8.8.8:53", "8.8.8.8:53"), &ports));
        assert!(
            !is_stale(&flow("192.0.2.9:30053", "192.0.2.9:30053"), &ports),
            "somebody's own port of that number"
        );
    }
}
