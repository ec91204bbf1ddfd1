//! `orchestrator server`: the control plane in one process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use ipnetwork::{Ipv4Network, Ipv6Network};
use orch_config::Paths;
use orch_pki::{ClusterPki, ServerNames};
use orch_store::{EtcdConfig, EtcdStore};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::parts::Parts;

/// How long the server waits for etcd between two words about it.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// Name of the Lease that picks the process whose scheduler works.
const SCHEDULER_LEASE: &str = "kube-scheduler";

/// Flags of `orchestrator server`.
#[derive(clap::Args)]
pub(crate) struct Flags {
    /// Prefix of every path, so that several hosts can live on one machine
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// Address under which agents and clients reach this server
    #[arg(long)]
    advertise_address: Ipv4Addr,
    /// TCP port of the API
    #[arg(long, default_value_t = orch_config::API_SERVER_PORT)]
    port: u16,
    /// etcd client URLs; without them the server runs an etcd of its own
    #[arg(long = "etcd", value_delimiter = ',', conflicts_with = "etcd_member")]
    etcd: Vec<String>,
    /// Name of the server's own etcd among the members of a cluster; without it that etcd is alone for good
    #[arg(long, value_name = "NAME")]
    etcd_member: Option<String>,
    /// Names and peer URLs of all members at the start: `a=https://10.0.0.1:2380,b=…`; without it only this one
    #[arg(long, value_name = "NAME=URL", value_delimiter = ',', value_parser = peer, requires = "etcd_member")]
    etcd_peers: Vec<(String, String)>,
    /// The own etcd joins members that run already
    #[arg(long, requires = "etcd_peers")]
    etcd_join: bool,
    /// Give network agents no more of etcd than the network's keys; their certificates say who they are
    #[arg(long)]
    restrict_etcd: bool,
    /// Further names and addresses for the server's certificate
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    tls_san: Vec<String>,
    /// Several servers share the work: controllers and scheduler work in the one that holds the Lease
    #[arg(long)]
    elect: bool,
    /// Network that ClusterIPs come from
    #[arg(long, default_value = orch_config::SERVICE_CIDR)]
    service_cidr: Ipv4Network,
    /// The same for IPv6, for Services that ask for it; agents serve it once the pod network has IPv6
    #[arg(long, default_value = orch_config::SERVICE_CIDR_V6)]
    service_cidr_v6: Ipv6Network,
    /// Short failure timers: a dead node is noticed in seconds and its pods move at once. For labs; on a busy or
    /// flaky network it moves pods that were only slow to answer
    #[arg(long)]
    fast_failover: bool,
}

pub(crate) async fn run(flags: Flags, stop: CancellationToken) -> anyhow::Result<()> {
    let paths = Paths::new(&flags.root);
    let pki = open_pki(&flags, &paths)?;
    let endpoints = if flags.etcd.is_empty() {
        let url = format!("https://{}:{}", flags.advertise_address, orch_config::ETCD_CLIENT_PORT);
        let etcd = orch_store::managed::Options {
            data_dir: paths.etcd_data(),
            log_file: paths.log().join("etcd.log"),
            client_urls: vec![url.clone()],
            tls: Some(orch_store::managed::Tls {
                cert: pki.path("etcd-server.crt"),
                key: pki.path("etcd-server.key"),
                client_ca: pki.path("etcd-ca.crt"),
            }),
            membership: membership(&flags),
            // The pods' subnets and all objects hang on it: it goes on while the server is upgraded.
            keep_running_on_exit: true,
        };
        orch_store::managed::spawn(etcd, stop.clone()).await.context("run etcd")?;
        vec![url]
    } else {
        flags.etcd.clone()
    };
    // Only the own etcd can have been restored here; where etcd is somebody else's, so are its snapshots.
    let own_data = flags.etcd.is_empty().then(|| paths.etcd_data());
    let Some(store) = connect(&pki, endpoints.clone(), own_data, &stop).await? else {
        return Ok(());
    };
    if flags.restrict_etcd {
        restrict(&pki, endpoints).await?;
    }

    let server = orch_apiserver::ApiServer::start(api_options(&flags, &pki, store)?, stop.clone())
        .await
        .context("start the API server")?;
    let identity = format!("{}_{}", flags.advertise_address, uuid::Uuid::new_v4());
    let controllers = orch_controllers::Options {
        cluster_ca: pki.read("ca.crt")?,
        signers: Some(orch_controllers::Signers { cluster: pki.ca(), etcd: pki.etcd_ca() }),
        leader_identity: flags.elect.then(|| identity.clone()),
        ..if flags.fast_failover {
            orch_controllers::Options::fast()
        } else {
            orch_controllers::Options::default()
        }
    };
    // What they may, the roles of the same names say.
    let client = |user: &str| server.client(user, &[]);
    let (controller_client, scheduler_client) =
        (client("system:kube-controller-manager"), client("system:kube-scheduler"));
    let mut parts = Parts::new(stop.clone());
    parts.spawn("controllers", orch_controllers::run(controller_client, controllers, stop.clone()));
    if flags.elect {
        let scheduler =
            elected_scheduler(scheduler_client, identity, flags.fast_failover, stop.clone());
        parts.spawn("scheduler", scheduler);
    } else {
        let scheduler = orch_scheduler::Options::default();
        parts.spawn("scheduler", orch_scheduler::run(scheduler_client, scheduler, stop.clone()));
    }
    // For whoever uses it on this host: orchctl goes on at another server while this one is down.
    let follower = crate::members::Follower {
        client: server.client("system:apiserver", &["system:masters"]),
        kubeconfig: pki.path("admin.conf"),
        etcd: None,
    };
    if follower.kubeconfig.exists() {
        let follow = follower.run(stop.clone());
        parts.spawn("watch on the cluster's servers", async {
            follow.await;
            anyhow::Ok(())
        });
    }
    parts.spawn("API server", server.serve(stop));
    parts.join().await
}

/// The scheduler, whenever this process holds its Lease.
async fn elected_scheduler(
    client: orch_client::Client,
    identity: String,
    fast: bool,
    stop: CancellationToken,
) -> Result<(), orch_scheduler::Error> {
    while !stop.is_cancelled() {
        let election = orch_reconcile::Election::new("kube-system", SCHEDULER_LEASE, &identity);
        let election = if fast { election.fast() } else { election };
        let outcome =
            orch_reconcile::lead(client.clone(), election, stop.clone(), |client, leading| {
                orch_scheduler::run(client, orch_scheduler::Options::default(), leading)
            });
        if let Some(outcome) = outcome.await {
            return outcome;
        }
    }
    Ok(())
}

/// `NAME=URL`.
fn peer(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, url)) if !name.is_empty() && url.starts_with("https://") => {
            Ok((name.to_owned(), url.to_owned()))
        }
        _ => Err("expected NAME=https://ADDRESS:2380".to_owned()),
    }
}

fn membership(flags: &Flags) -> Option<orch_store::managed::Membership> {
    let name = flags.etcd_member.clone()?;
    let own = format!("https://{}:{}", flags.advertise_address, orch_config::ETCD_PEER_PORT);
    let initial = if flags.etcd_peers.is_empty() {
        vec![(name.clone(), own.clone())]
    } else {
        flags.etcd_peers.clone()
    };
    Some(orch_store::managed::Membership { name, peer_url: own, initial, joining: flags.etcd_join })
}

fn open_pki(flags: &Flags, paths: &Paths) -> anyhow::Result<ClusterPki> {
    let names = ServerNames::new(
        IpAddr::V4(flags.advertise_address),
        IpAddr::V4(orch_config::kubernetes_service_ip(flags.service_cidr)),
        orch_config::CLUSTER_DOMAIN,
        &flags.tls_san,
    );
    ClusterPki::ensure(&paths.pki(), &names.addresses, &names.names)
        .context("open the cluster's certificates")
}

fn etcd_config(pki: &ClusterPki, endpoints: Vec<String>) -> anyhow::Result<EtcdConfig> {
    Ok(EtcdConfig {
        endpoints,
        ca_pem: Some(pki.read("etcd-ca.crt")?),
        cert_pem: Some(pki.read("etcd-client.crt")?),
        key_pem: Some(pki.read("etcd-client.key")?),
    })
}

/// Closes etcd to everything that a network agent does not need.
async fn restrict(pki: &ClusterPki, endpoints: Vec<String>) -> anyhow::Result<()> {
    let mut admin = orch_store::admin::Admin::connect(&etcd_config(pki, endpoints)?).await?;
    let prefix = format!("{}/", orch_config::ETCD_NETWORK_PREFIX);
    admin
        .restrict(orch_pki::ETCD_ROOT_USER, orch_pki::ETCD_NETWORK_USER, &prefix)
        .await
        .context("restrict what network agents may do in etcd")
}

/// Waits for etcd and says so; `None` when the process is to stop.
async fn connect(
    pki: &ClusterPki,
    endpoints: Vec<String>,
    own_data: Option<PathBuf>,
    stop: &CancellationToken,
) -> anyhow::Result<Option<Arc<EtcdStore>>> {
    let config = etcd_config(pki, endpoints.clone())?;
    let restored = match &own_data {
        Some(data) => orch_store::epoch::begun(data)
            .with_context(|| format!("read the epoch in {}", data.display()))?,
        None => None,
    };
    let answer = || async {
        let store = EtcdStore::connect(config.clone()).await?.enter_epoch(restored).await?;
        let revision = orch_store::Store::revision(&store).await?;
        Ok::<_, orch_store::StoreError>((store, revision))
    };
    loop {
        let error = match answer().await {
            Ok((store, revision)) => {
                info!(revision, "etcd answers");
                if let (Some(data), Some(_)) = (&own_data, restored) {
                    info!("its data is from a snapshot: clients list everything again");
                    orch_store::epoch::entered(data)
                        .with_context(|| format!("remove the epoch from {}", data.display()))?;
                }
                return Ok(Some(Arc::new(store)));
            }
            Err(error) => error,
        };
        tracing::warn!(endpoints = endpoints.join(","), %error, "waiting for etcd");
        tokio::select! {
            () = stop.cancelled() => return Ok(None),
            () = tokio::time::sleep(STORE_RETRY) => {}
        }
    }
}

fn api_options(
    flags: &Flags,
    pki: &ClusterPki,
    store: Arc<EtcdStore>,
) -> anyhow::Result<orch_apiserver::Options> {
    Ok(orch_apiserver::Options {
        store,
        listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, flags.port)),
        advertise: IpAddr::V4(flags.advertise_address),
        tls_cert_pem: pki.read("apiserver.crt")?,
        tls_key_pem: pki.read("apiserver.key")?,
        client_ca_pem: pki.read("ca.crt")?,
        kubelet_client_cert_pem: pki.read("apiserver-kubelet-client.crt")?,
        kubelet_client_key_pem: pki.read("apiserver-kubelet-client.key")?,
        service_account_key_pem: pki.read("sa.key")?,
        service_account_issuer: format!(
            "https://kubernetes.default.svc.{}",
            orch_config::CLUSTER_DOMAIN
        ),
        service_cidr: flags.service_cidr,
        service_cidr_v6: Some(flags.service_cidr_v6),
        node_port_range: 30000..=32767,
        dns_ip: orch_config::DNS_IP,
        dns_ip_v6: Some(orch_config::dns_ip_v6(flags.service_cidr_v6)),
    })
}
