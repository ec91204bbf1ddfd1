//! `orchestrator server`: the control plane in one process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use ipnetwork::Ipv4Network;
use orch_config::Paths;
use orch_pki::ClusterPki;
use orch_store::{EtcdConfig, EtcdStore};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::parts::Parts;

/// How long the server waits for etcd between two words about it.
const STORE_RETRY: Duration = Duration::from_secs(1);

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
    #[arg(long = "etcd", value_delimiter = ',')]
    etcd: Vec<String>,
    /// Network that ClusterIPs come from
    #[arg(long, default_value = orch_config::SERVICE_CIDR)]
    service_cidr: Ipv4Network,
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
            // The pods' subnets and all objects hang on it: it goes on while the server is upgraded.
            keep_running_on_exit: true,
        };
        orch_store::managed::spawn(etcd, stop.clone()).await.context("run etcd")?;
        vec![url]
    } else {
        flags.etcd.clone()
    };
    let Some(store) = connect(&pki, endpoints, &stop).await? else { return Ok(()) };

    let server = orch_apiserver::ApiServer::start(api_options(&flags, &pki, store)?, stop.clone())
        .await
        .context("start the API server")?;
    let controllers = orch_controllers::Options {
        cluster_ca: pki.read("ca.crt")?,
        ..if flags.fast_failover {
            orch_controllers::Options::fast()
        } else {
            orch_controllers::Options::default()
        }
    };
    let client = |user: &str| server.client(user, &["system:masters"]);
    let (controller_client, scheduler_client) =
        (client("system:kube-controller-manager"), client("system:kube-scheduler"));
    let mut parts = Parts::new(stop.clone());
    parts.spawn("controllers", orch_controllers::run(controller_client, controllers, stop.clone()));
    let scheduler = orch_scheduler::Options::default();
    parts.spawn("scheduler", orch_scheduler::run(scheduler_client, scheduler, stop.clone()));
    parts.spawn("API server", server.serve(stop));
    parts.join().await
}

fn open_pki(flags: &Flags, paths: &Paths) -> anyhow::Result<ClusterPki> {
    let addresses = [
        IpAddr::V4(flags.advertise_address),
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V4(orch_config::kubernetes_service_ip(flags.service_cidr)),
    ];
    let mut names: Vec<String> =
        ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
            .map(str::to_owned)
            .into();
    names.push(format!("kubernetes.default.svc.{}", orch_config::CLUSTER_DOMAIN));
    ClusterPki::ensure(&paths.pki(), &addresses, &names).context("open the cluster's certificates")
}

/// Waits for etcd and says so; `None` when the process is to stop.
async fn connect(
    pki: &ClusterPki,
    endpoints: Vec<String>,
    stop: &CancellationToken,
) -> anyhow::Result<Option<Arc<EtcdStore>>> {
    let config = EtcdConfig {
        endpoints: endpoints.clone(),
        ca_pem: Some(pki.read("etcd-ca.crt")?),
        cert_pem: Some(pki.read("etcd-client.crt")?),
        key_pem: Some(pki.read("etcd-client.key")?),
    };
    loop {
        let error = match EtcdStore::connect(config.clone()).await {
            Ok(store) => match orch_store::Store::revision(&store).await {
                Ok(revision) => {
                    info!(revision, "etcd answers");
                    return Ok(Some(Arc::new(store)));
                }
                Err(error) => error,
            },
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
        node_port_range: 30000..=32767,
        dns_ip: orch_config::DNS_IP,
    })
}
