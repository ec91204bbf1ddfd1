//! Keeps the kernel's table equal to the Services.
//!
//! The first change is applied at once, the next ones are gathered for a moment; the script holds only what differs,
//! and is one transaction. Now and then the table is read back: if somebody flushed or changed it, it is written anew.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use cni_nftables::{Nft, NftError, Table};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::conntrack::{self, Flow};
use super::model::{Port, desired_ports};
use super::ruleset::{Networks, TABLE, desired_table};
use crate::status::{NetStatus, ServiceStatus};

/// Changes within this time after an application are applied together: a transaction costs the kernel a grace period.
const GATHER: Duration = Duration::from_millis(50);
/// How often the table is read back.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// The Service through which agents and pods reach the API server.
const KUBERNETES: &str = "default/kubernetes/";

/// The table in the kernel, and what we know of it.
#[derive(Debug, Default)]
pub struct Proxy {
    nft: Nft,
    applied: Option<(Table, Option<String>)>,
    flows: BTreeSet<Flow>,
}

impl Proxy {
    /// Makes the kernel hold the table of `ports`; false if it did already.
    ///
    /// # Errors
    /// If nft refuses. What was in force before still is; the next call writes the whole table.
    pub fn apply(&mut self, ports: &[Port], networks: &Networks, node_ip: Ipv4Addr) -> Result<bool, NftError> {
        let want = desired_table(ports, networks);
        let script = match &self.applied {
            Some((applied, _)) => want.update_script(applied),
            None => want.replace_script(),
        };
        if script.is_empty() {
            return Ok(false);
        }
        if let Err(error) = self.nft.apply(&script) {
            self.applied = None;
            return Err(error);
        }
        let listing = self.nft.listing(&want)?;
        self.applied = Some((want, listing));
        let flows = conntrack::udp_flows(ports, node_ip);
        let gone: BTreeSet<Flow> = self.flows.difference(&flows).copied().collect();
        conntrack::forget(&gone);
        self.flows = flows;
        Ok(true)
    }

    /// Looks whether the kernel still holds what was applied; if not, the next [`Proxy::apply`] writes it anew.
    ///
    /// # Errors
    /// If nft cannot be asked.
    pub fn verify(&mut self) -> Result<bool, NftError> {
        let Some((table, listing)) = &self.applied else { return Ok(false) };
        let intact = self.nft.listing(table)? == *listing;
        if !intact {
            self.applied = None;
        }
        Ok(intact)
    }
}

/// The API server is never left without an endpoint: who would tell us of the next one? The last known ones stay.
fn keep_api_endpoints(ports: &mut [Port], known: &mut Vec<Port>) {
    for port in ports.iter_mut().filter(|port| port.id.starts_with(KUBERNETES)) {
        if port.endpoints.is_empty()
            && let Some(before) = known.iter().find(|before| before.id == port.id)
        {
            port.endpoints.clone_from(&before.endpoints);
        }
    }
    *known = ports.iter().filter(|port| port.id.starts_with(KUBERNETES)).cloned().collect();
}

#[cfg(test)]
mod tests {
    use super::super::model::{Endpoint, Protocol};
    use super::*;

    fn port(id: &str, endpoints: Vec<Endpoint>) -> Port {
        Port {
            id: id.to_owned(),
            protocol: Protocol::Tcp,
            cluster_ips: vec![Ipv4Addr::new(10, 96, 0, 1)],
            port: 443,
            node_port: None,
            external_ips: Vec::new(),
            external_local: false,
            internal_local: false,
            affinity: None,
            endpoints,
        }
    }

    #[test]
    fn the_api_server_keeps_its_last_known_endpoints_and_others_do_not() {
        let endpoint = Endpoint { ip: Ipv4Addr::new(192, 0, 2, 1), port: 6443, local: false, ready: true };
        let mut known = Vec::new();
        for id in ["default/kubernetes/tcp/443", "default/web/tcp/80"] {
            keep_api_endpoints(&mut [port(id, vec![endpoint])], &mut known);
            let mut later = [port(id, Vec::new())];
            keep_api_endpoints(&mut later, &mut known);
            assert_eq!(later[0].endpoints.is_empty(), id.contains("web"), "{id}");
        }
    }
}
