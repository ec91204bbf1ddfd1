//! The parts of the agent and how they are wired.
//!
//! ```text
//! etcd ──> lease keeper ──> network ──┬─> overlay ──> kernel, subnet.env, CNI configuration
//!                                     ├─> proxy (the pod network's CIDR)
//!                                     └─> podCIDR of the Node object
//! API server ──> informers ──┬─> proxy ──> nftables
//!                            ├─> zone ──> DNS server
//!                            └─> policy ──> eBPF maps
//! every part ──> status file
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::{Namespace, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use orch_client::ListParams;
use orch_reconcile::Informers;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::big_tcp::BigTcp;
use crate::dns::forward::Forwarder;
use crate::dns::server::{Server, resolvers};
use crate::dns::zone::Domain;
use crate::files::{FileError, SubnetEnv};
use crate::lease::{EtcdHealth, Identity, Keeper, Network};
use crate::overlay::task::Overlay;
use crate::overlay::{NftNews, interface, nft_events};
use crate::services::proxy::Follower;
use crate::status::{NetStatus, write_changes};
use crate::{Options, dns, mac, node, policy, services as service_plane};

/// The parts get this long to finish what they are doing; all of it is short.
const GRACE: Duration = Duration::from_secs(5);
/// Port of DNS.
const DNS_PORT: u16 = 53;

/// Why the agent could not start, or ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VTEP's MAC is neither readable nor writable.
    #[error("keep the MAC of the VTEP")]
    Mac(#[source] FileError),
    /// A part ended on its own.
    #[error("the network agent's {0} ended on its own")]
    PartEnded(&'static str),
    /// A part panicked.
    #[error("a part of the network agent panicked: {0}")]
    PartPanicked(String),
}

/// Runs the agent in the network namespace of the process until cancelled. What it made in the kernel stays.
///
/// An absent etcd or API server is no error: the agent says so in its log and its status, keeps the data plane as it
/// is, and goes on trying.
///
/// # Errors
/// If the node's files cannot be written, or a part failed in a way that it should not.
pub async fn run(options: Options, cancel: CancellationToken) -> Result<(), Error> {
    let paths = &options.paths;
    let vtep_mac =
        mac::ensure(&paths.lib().join("vtep-mac"), &options.node_name).map_err(Error::Mac)?;
    let Some((public_ip, public_ipv6)) = public_addresses(&options, &cancel).await else {
        return Ok(());
    };
    let identity = Identity { public_ip, vtep_mac, public_ipv6 };
    // Informers and parts end together, also when one of them fails.
    let stop = cancel.child_token();
    let _stop_all = stop.clone().drop_guard();
    let informers = Informers::new(options.client.clone(), stop.clone());
    let (services, slices) = (informers.of::<Service>(), informers.of::<EndpointSlice>());

    let (network, network_known) = watch::channel(None);
    let (health, etcd_health) = watch::channel(EtcdHealth::Unknown);
    let (zone, zone_known) = watch::channel(None);
    let status = Arc::new(watch::Sender::new(NetStatus {
        node: options.node_name.clone(),
        node_ip: options.node_ip.to_string(),
        etcd: etcd_text(&EtcdHealth::Unknown),
        ..NetStatus::default()
    }));
    // What the last run knew counts until etcd answers.
    let known = SubnetEnv::observe(&paths.subnet_env()).and_then(|env| env.ipv4);
    let cluster = match known {
        Some((network, _)) => network,
        None => options.network.v4.map_or(options.service_cidr, |v4| v4.network),
    };

    let policy = policy::start::Start::new(options.policy, paths).await;
    status.send_modify(|status| status.policy = policy.status());

    let mut parts: JoinSet<&'static str> = JoinSet::new();
    let keeper = Keeper {
        etcd: options.etcd.clone(),
        prefix: options.etcd_prefix.clone(),
        default_config: options.network.clone(),
        identity,
        subnet_env: paths.subnet_env(),
        network,
        health,
    };
    spawn(&mut parts, "subnet lease", keeper.run(stop.clone()));
    let big_tcp = Arc::new(BigTcp::new(paths.clone(), status.clone()));
    let overlay = Overlay {
        device_name: options.device.clone(),
        node_ip: options.node_ip,
        interface: options.interface.clone(),
        service_cidr: options.service_cidr,
        identity,
        paths: paths.clone(),
        policy: policy.enforced,
        big_tcp: big_tcp.clone(),
    };
    overlay.withdraw_stale_configuration();
    let news = NftNews::default();
    let task =
        overlay.run(network_known.clone(), status.clone(), news.overlay.clone(), stop.clone());
    spawn(&mut parts, "overlay", task);
    spawn(&mut parts, "BIG TCP", big_tcp.follow(stop.clone()));
    spawn(&mut parts, "watch on nftables", nft_events::follow(news.clone(), stop.clone()));
    let own_node = ListParams {
        field_selector: Some(format!("metadata.name={}", options.node_name)),
        ..ListParams::default()
    };
    let nodes = informers.selected::<Node>(&own_node);
    let (in_force, ports_in_force) = watch::channel(None);
    let (health, health_checks) = watch::channel(BTreeMap::new());
    let follower = Follower {
        services: services.clone(),
        slices: slices.clone(),
        network: network_known.clone(),
        cluster,
        service_cidr: options.service_cidr,
        service_cidr_v6: options.service_cidr_v6,
        dns_ips: options.dns_ips(),
        node_name: options.node_name.clone(),
        nodes: nodes.clone(),
        health,
        in_force,
        status: status.clone(),
        firewall: news.services,
    };
    spawn(&mut parts, "service proxy", follower.run(stop.clone()));
    let connect_time = service_plane::connect_time::Task {
        mode: options.services,
        paths: paths.clone(),
        ports: ports_in_force,
        status: status.clone(),
    };
    spawn(&mut parts, "services at connect time", connect_time.run(stop.clone()));
    let task = service_plane::health::serve(health_checks, stop.clone());
    spawn(&mut parts, "health checks of load balancers", task);
    let mirror = node::mirror(
        options.client.clone(),
        nodes,
        options.node_name.clone(),
        network_known.clone(),
        stop.clone(),
    );
    spawn(&mut parts, "podCIDR mirror", mirror);
    if policy.enforced {
        let task = policy::task::Task {
            node_name: options.node_name.clone(),
            paths: paths.clone(),
            caches: policy::caches::Caches::new(&informers),
            network: network_known.clone(),
            cluster,
            cluster6: None,
            vxlan_port: options.network.port,
            service_cidr: options.service_cidr,
            dns_ips: options.dns_ips(),
            status: status.clone(),
        };
        spawn(&mut parts, "policy", task.run(policy, stop.clone()));
    }

    let names =
        dns::task::follow(services, slices, informers.of::<Namespace>(), zone, stop.clone());
    spawn(&mut parts, "zone", names);
    let domain = Domain {
        name: options.cluster_domain.clone(),
        dns_ips: options.dns_ips(),
        networks: [IpNetwork::V4(cluster), options.service_cidr.into()]
            .into_iter()
            .chain(options.service_cidr_v6.map(IpNetwork::V6))
            .collect(),
    };
    let forwarder = Arc::new(Forwarder::new(upstream(&options)));
    for ip in options.dns_ips() {
        let server = Server {
            address: SocketAddr::new(ip, DNS_PORT),
            domain: domain.clone(),
            zone: zone_known.clone(),
            forwarder: forwarder.clone(),
            status: status.clone(),
        };
        spawn(&mut parts, "DNS", serve_dns(ip, server, network_known.clone(), stop.clone()));
    }
    spawn(&mut parts, "etcd health", report_health(etcd_health, status.clone(), stop.clone()));
    spawn(
        &mut parts,
        "status file",
        write_changes(paths.net_status(), status.subscribe(), stop.clone()),
    );
    join(parts, &cancel, &stop).await
}

/// Serves DNS at one address; at that of IPv6 once the pod network has IPv6.
async fn serve_dns(
    ip: IpAddr,
    server: Server,
    mut network: watch::Receiver<Option<Network>>,
    stop: CancellationToken,
) {
    if ip.is_ipv6() {
        let has_ipv6 = |network: &Option<Network>| {
            network.as_ref().is_some_and(|network| network.config.v6.is_some())
        };
        let has_come = tokio::select! {
            () = stop.cancelled() => return,
            waited = network.wait_for(has_ipv6) => waited.is_ok(),
        };
        if !has_come {
            return stop.cancelled().await;
        }
    }
    dns::task::serve(ip, server, stop).await;
}

/// Where other nodes send to; `None` if cancelled. A link that the operator chose may come up after the agent.
async fn public_addresses(
    options: &Options,
    cancel: &CancellationToken,
) -> Option<(Ipv4Addr, Option<Ipv6Addr>)> {
    let mut told = false;
    loop {
        let netlink = cni_netlink::Netlink::open();
        let problem = match netlink.as_ref().map(|netlink| {
            interface::find(netlink, &options.interface, options.node_ip, &options.device)
        }) {
            Ok(Ok(underlay)) => {
                let own =
                    if options.interface.is_given() { underlay.local } else { options.node_ip };
                return Some((
                    options.public_ip.unwrap_or(own),
                    options.public_ipv6.or(underlay.local_ipv6),
                ));
            }
            Ok(Err(error)) => crate::chain(&error),
            Err(error) => crate::chain(error),
        };
        if !options.interface.is_given() {
            // The overlay says so itself, and goes on when the link is there.
            return Some((options.public_ip.unwrap_or(options.node_ip), options.public_ipv6));
        }
        if !std::mem::replace(&mut told, true) {
            warn!(problem, "waiting for the link that carries the overlay");
        }
        tokio::select! {
            () = cancel.cancelled() => return None,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
}

fn spawn(
    parts: &mut JoinSet<&'static str>,
    name: &'static str,
    part: impl Future<Output = ()> + Send + 'static,
) {
    parts.spawn(async move {
        part.await;
        name
    });
}

/// Waits for the end of all parts; the first one that ends unasked ends the others.
async fn join(
    mut parts: JoinSet<&'static str>,
    cancel: &CancellationToken,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let mut outcome = Ok(());
    let first = tokio::select! {
        () = cancel.cancelled() => None,
        ended = parts.join_next() => ended,
    };
    match first {
        Some(Ok(name)) if !cancel.is_cancelled() => outcome = Err(Error::PartEnded(name)),
        Some(Err(error)) => outcome = Err(Error::PartPanicked(error.to_string())),
        _ => {}
    }
    stop.cancel();
    let all = async { while parts.join_next().await.is_some() {} };
    if timeout(GRACE, all).await.is_err() {
        warn!(parts = parts.len(), "parts of the network agent did not end in time");
    }
    info!("the network agent ends; the data plane stays as it is");
    outcome
}

fn upstream(options: &Options) -> Vec<SocketAddr> {
    if !options.upstream_dns.is_empty() {
        return options.upstream_dns.iter().map(|ip| SocketAddr::new(*ip, DNS_PORT)).collect();
    }
    let file = &options.resolv_conf;
    let found = match std::fs::read_to_string(file) {
        Ok(text) => resolvers(&text, &options.dns_ips()),
        Err(error) => {
            warn!(file = %file.display(), %error, "the node's resolvers are not known");
            Vec::new()
        }
    };
    if found.is_empty() {
        warn!(file = %file.display(), "there is no resolver: pods resolve names of the cluster only");
    }
    found
}

async fn report_health(
    mut health: watch::Receiver<EtcdHealth>,
    status: Arc<watch::Sender<NetStatus>>,
    cancel: CancellationToken,
) {
    loop {
        let text = etcd_text(&health.borrow_and_update());
        status.send_if_modified(|status| {
            let changed = status.etcd != text;
            status.etcd = text;
            changed
        });
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = health.changed() => if changed.is_err() { return },
        }
    }
}

fn etcd_text(health: &EtcdHealth) -> String {
    match health {
        EtcdHealth::Unknown => "unknown".to_owned(),
        EtcdHealth::Healthy => "healthy".to_owned(),
        EtcdHealth::Away(why) => why.clone(),
    }
}
