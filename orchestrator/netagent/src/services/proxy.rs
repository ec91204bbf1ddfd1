//! Keeps the kernel's table equal to the Services.
//!
//! The first change is applied at once, the next ones are gathered for a moment; the script holds only what differs,
//! and is one transaction. Now and then the table is read back: if somebody flushed or changed it, it is written anew.
//!
//! Nothing is taken away on a guess. Until the caches are filled, a table that a former run left stays as it is; where
//! there is none, masquerade alone is set up. Translations of established flows are conntrack's and outlive every
//! change of rules, so a replaced table drops nobody.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cni_nftables::{Family, Nft, NftError, Table};
use ipnetwork::{Ipv4Network, Ipv6Network};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use orch_reconcile::Informer;
use tokio::sync::{Notify, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::conntrack;
use super::model::{HealthCheck, Place, Port, Protocol, desired_health_checks, desired_ports};
use super::ruleset::{Networks, TABLE, desired_table};
use crate::chain;
use crate::lease::Network;
use crate::status::{NetStatus, ServiceStatus};

/// Changes within this time after an application are applied together: a transaction costs the kernel a grace period.
const GATHER: Duration = Duration::from_millis(20);
/// How often the table is read back.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// The Service through which agents and pods reach the API server.
const KUBERNETES: &str = "default/kubernetes/";

/// Label of a Node that says in which zone it is.
const ZONE: &str = "topology.kubernetes.io/zone";

/// The tables in the kernel, one of each family, and what we know of them.
#[derive(Debug, Default)]
pub struct Proxy {
    nft: Nft,
    applied: Vec<Applied>,
    /// Whether this run has written the tables.
    ours: bool,
    /// UDP ports whose flows were looked after.
    udp: Option<Vec<Port>>,
}

#[derive(Debug)]
struct Applied {
    table: Table,
    /// What the kernel says of it.
    listing: Option<String>,
}

impl Proxy {
    /// Makes the kernel hold the tables of `ports`, one for each family in `networks`; false if it did already.
    ///
    /// # Errors
    /// If nft refuses. What was in force before still is; the next call writes the whole tables.
    pub fn apply(&mut self, ports: &[Port], networks: &[Networks]) -> Result<bool, NftError> {
        let changed =
            self.write(networks.iter().map(|networks| desired_table(ports, networks)).collect())?;
        // The rules first: a flow that is forgotten too early would be made anew by the old ones.
        self.forget_stale_flows(ports);
        Ok(changed)
    }

    /// While Services are not known: leaves a table that a former run made, else sets up masquerade alone.
    ///
    /// # Errors
    /// If nft cannot be run or refuses.
    pub fn prepare(&mut self, networks: &[Networks]) -> Result<bool, NftError> {
        let bare: Vec<Table> =
            networks.iter().map(|networks| desired_table(&[], networks)).collect();
        // The first of them speaks for all: they are written together.
        if !self.ours
            && let Some(first) = bare.first()
            && self.nft.listing(first)?.is_some()
        {
            return Ok(false);
        }
        self.write(bare)
    }

    /// All tables in one transaction.
    fn write(&mut self, want: Vec<Table>) -> Result<bool, NftError> {
        let mut script = String::new();
        for table in &want {
            script += &match self.applied(table.family) {
                Some(applied) => table.update_script(&applied.table),
                None => table.replace_script(),
            };
        }
        if self.applied.is_empty() || self.applied.len() > want.len() {
            for family in [Family::Ip, Family::Ip6] {
                if !want.iter().any(|table| table.family == family) {
                    script += &self.removal(family)?;
                }
            }
        }
        if script.is_empty() {
            return Ok(false);
        }
        let outcome = self.nft.apply(&script);
        crate::metrics::nft_applied(outcome.is_ok());
        let before = std::mem::take(&mut self.applied);
        outcome?;
        for table in want {
            // What did not change is not asked for again.
            let known = before.iter().find(|applied| applied.table == table);
            let listing = match known {
                Some(applied) => applied.listing.clone(),
                None => self.nft.listing(&table)?,
            };
            self.applied.push(Applied { table, listing });
        }
        self.ours = true;
        Ok(true)
    }

    fn applied(&self, family: Family) -> Option<&Applied> {
        self.applied.iter().find(|applied| applied.table.family == family)
    }

    /// A script that removes our table of a family that has no Services any more; empty if there is none.
    fn removal(&self, family: Family) -> Result<String, NftError> {
        let there = self.nft.listing(&Table::new(family, TABLE))?.is_some();
        Ok(if there { format!("delete table {family} {TABLE}\n") } else { String::new() })
    }

    fn forget_stale_flows(&mut self, ports: &[Port]) {
        let udp: Vec<Port> =
            ports.iter().filter(|port| port.protocol == Protocol::Udp).cloned().collect();
        if self.udp.as_ref() == Some(&udp) {
            return;
        }
        // Ports that went away have no endpoint any more.
        let former =
            self.udp.iter().flatten().filter(|before| !udp.iter().any(|port| port.id == before.id));
        let without = former.map(|port| Port { endpoints: Vec::new(), ..port.clone() });
        let look: Vec<Port> = udp.iter().cloned().chain(without).collect();
        match conntrack::forget_stale(&look) {
            Ok(0) => {}
            Ok(count) => debug!(count, "UDP flows to former endpoints forgotten"),
            Err(error) => {
                warn!(%error, "UDP flows to former endpoints are not forgotten; they end when they are idle for 30 s");
            }
        }
        self.udp = Some(udp);
    }

    /// Looks whether the kernel still holds what was applied; if not, the next [`Proxy::apply`] writes it anew.
    ///
    /// # Errors
    /// If nft cannot be asked.
    pub fn verify(&mut self) -> Result<bool, NftError> {
        let mut intact = !self.applied.is_empty();
        for applied in &self.applied {
            intact &= self.nft.listing(&applied.table)? == applied.listing;
        }
        if !intact {
            self.applied.clear();
        }
        Ok(intact)
    }
}

/// Follows the cluster and keeps the table right.
pub(crate) struct Follower {
    pub(crate) services: Informer<Service>,
    pub(crate) slices: Informer<EndpointSlice>,
    pub(crate) network: watch::Receiver<Option<Network>>,
    /// The pod network until etcd tells it.
    pub(crate) cluster: Ipv4Network,
    pub(crate) service_cidr: Ipv4Network,
    pub(crate) service_cidr_v6: Option<Ipv6Network>,
    /// One of each family that has Services, IPv4 first.
    pub(crate) dns_ips: Vec<IpAddr>,
    pub(crate) node_name: String,
    /// The own Node alone, for its zone.
    pub(crate) nodes: Informer<Node>,
    /// What load balancers are told.
    pub(crate) health: watch::Sender<BTreeMap<u16, HealthCheck>>,
    /// What is in force, for the socket programs.
    pub(crate) in_force: watch::Sender<Option<Arc<Vec<Port>>>>,
    pub(crate) status: Arc<watch::Sender<NetStatus>>,
    /// Somebody removed the table.
    pub(crate) firewall: Arc<Notify>,
}

impl Follower {
    /// Runs until cancelled. The table stays in force.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let mut proxy = Proxy::default();
        let mut known_api = Vec::new();
        let (mut services, mut slices) = (self.services.changed(), self.slices.changed());
        let mut nodes = self.nodes.changed();
        let mut check = interval(CHECK_INTERVAL);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut complained = None;
        let mut verify = false;
        let caches = (self.services.clone(), self.slices.clone());
        let mut synced =
            std::pin::pin!(async move { tokio::join!(caches.0.synced(), caches.1.synced()) });
        let mut known = false;
        while !cancel.is_cancelled() {
            services.borrow_and_update();
            slices.borrow_and_update();
            nodes.borrow_and_update();
            let networks = self.networks();
            let ports = known.then(|| Arc::new(self.ports(&mut known_api)));
            let check_first = std::mem::take(&mut verify);
            let counts = ports.as_deref().map(|ports| counts(ports));
            let wanted = ports.clone();
            let work = move || {
                let ports = wanted.as_ref().map(|ports| ports.as_slice());
                let outcome = look(&mut proxy, ports, &networks, check_first);
                (proxy, outcome)
            };
            // The work is not safe to drop half-way, so it is waited for; it takes milliseconds.
            let (back, outcome) = match tokio::task::spawn_blocking(work).await {
                Ok(done) => done,
                Err(error) => {
                    error!(%error, "the service proxy panicked");
                    return;
                }
            };
            proxy = back;
            if let (Some(ports), Ok(_)) = (ports, &outcome) {
                self.in_force.send_if_modified(|before| {
                    let changed = before.as_ref() != Some(&ports);
                    *before = Some(ports);
                    changed
                });
            }
            let mut pause = GATHER;
            let mut again = false;
            match &outcome {
                Ok(looked) => {
                    if looked.was_damaged {
                        warn!(
                            table = super::ruleset::TABLE,
                            "somebody changed our nftables table; it was written anew"
                        );
                    }
                    if let (true, Some(counts)) = (looked.changed, &counts) {
                        debug!(
                            ports = counts.ports,
                            endpoints = counts.endpoints,
                            "services are in force"
                        );
                    }
                    if complained.take().is_some() {
                        info!("services follow the cluster again");
                    }
                }
                Err(error) => {
                    let text = chain(error);
                    if complained.as_ref() != Some(&text) {
                        error!(error = text, "services do not follow the cluster; trying again");
                        complained = Some(text);
                    }
                    pause = RETRY;
                    again = true;
                }
            }
            self.report(counts, outcome.is_ok());
            tokio::select! {
                () = cancel.cancelled() => break,
                () = sleep(pause) => {}
            }
            if again {
                continue;
            }
            tokio::select! {
                () = cancel.cancelled() => break,
                _ = &mut synced, if !known => {
                    info!("services and endpoints are known");
                    known = true;
                }
                changed = services.changed() => if changed.is_err() { break },
                changed = slices.changed() => if changed.is_err() { break },
                changed = nodes.changed() => if changed.is_err() { break },
                changed = self.network.changed() => if changed.is_err() { break },
                () = self.firewall.notified() => verify = true,
                _ = check.tick() => verify = true,
            }
        }
    }

    fn ports(&self, known_api: &mut Vec<Port>) -> Vec<Port> {
        let node = self.nodes.get("", &self.node_name);
        let zone = node.as_ref().and_then(|node| node.metadata.labels.as_ref()?.get(ZONE));
        let place = Place { node: &self.node_name, zone: zone.map(String::as_str) };
        let (services, slices) = (self.services.list(), self.slices.list());
        let mut ports = desired_ports(&services, &slices, place, &self.dns_ips);
        keep_api_endpoints(&mut ports, known_api);
        let checks = desired_health_checks(&services, &slices, &self.node_name);
        self.health.send_if_modified(|health| {
            let changed = *health != checks;
            *health = checks;
            changed
        });
        ports
    }

    /// What the rules name, one for each family that has Services.
    fn networks(&mut self) -> Vec<Networks> {
        let network = self.network.borrow_and_update();
        let config = network.as_ref().map(|network| &network.config);
        if let Some(v4) = config.and_then(|config| config.v4) {
            self.cluster = v4.network;
        }
        let cluster_v6 = config.and_then(|config| config.v6).map(|v6| v6.network);
        let dns_ip = |v6| self.dns_ips.iter().copied().find(|ip| ip.is_ipv6() == v6);
        let v4 = dns_ip(false).map(|dns_ip| Networks {
            cluster: self.cluster.into(),
            service: self.service_cidr.into(),
            dns_ip,
        });
        // Without a pod network of the family no Service has an endpoint there.
        let v6 = self.service_cidr_v6.zip(dns_ip(true)).zip(cluster_v6);
        let v6 = v6.map(|((service, dns_ip), cluster)| Networks {
            cluster: cluster.into(),
            service: service.into(),
            dns_ip,
        });
        v4.into_iter().chain(v6).collect()
    }

    fn report(&self, counts: Option<ServiceStatus>, in_force: bool) {
        self.status.send_if_modified(|status| {
            let before = status.services.clone();
            if let Some(counts) = counts {
                status.services = counts;
            }
            status.services.in_force = in_force;
            status.services != before
        });
    }
}

fn counts(ports: &[Port]) -> ServiceStatus {
    let endpoints = ports.iter().map(|port| port.endpoints.len()).sum();
    ServiceStatus { ports: ports.len(), endpoints, in_force: false }
}

/// What one look found.
#[derive(Debug, Default)]
struct Looked {
    changed: bool,
    was_damaged: bool,
}

fn look(
    proxy: &mut Proxy,
    ports: Option<&[Port]>,
    networks: &[Networks],
    check_first: bool,
) -> Result<Looked, NftError> {
    let was_damaged = check_first && !proxy.applied.is_empty() && !proxy.verify()?;
    let changed = match ports {
        Some(ports) => proxy.apply(ports, networks)?,
        None => proxy.prepare(networks)?,
    };
    Ok(Looked { changed, was_damaged })
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
    use std::net::Ipv4Addr;

    use super::super::model::{Endpoint, Protocol};
    use super::*;

    fn port(id: &str, endpoints: Vec<Endpoint>) -> Port {
        Port {
            id: id.to_owned(),
            protocol: Protocol::Tcp,
            cluster_ips: vec![Ipv4Addr::new(10, 96, 0, 1).into()],
            port: 443,
            node_port: None,
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            external_local: false,
            internal_local: false,
            affinity: None,
            endpoints,
        }
    }

    #[test]
    fn the_api_server_keeps_its_last_known_endpoints_and_others_do_not() {
        let endpoint = Endpoint {
            ip: Ipv4Addr::new(192, 0, 2, 1).into(),
            port: 6443,
            local: false,
            ready: true,
            near: true,
        };
        let mut known = Vec::new();
        for id in ["default/kubernetes/tcp/443", "default/web/tcp/80"] {
            keep_api_endpoints(&mut [port(id, vec![endpoint])], &mut known);
            let mut later = [port(id, Vec::new())];
            keep_api_endpoints(&mut later, &mut known);
            assert_eq!(later[0].endpoints.is_empty(), id.contains("web"), "{id}");
        }
    }
}
