//! `orchestrator agent`: what runs on every node.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use orch_config::Paths;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::members;
use crate::parts::Parts;

/// After this time the start is over: caches are full, the overlay stands.
const START: Duration = Duration::from_secs(60);
/// File below the node's folder of state that keeps where etcd is.
const ETCD_MEMBERS: &str = "etcd-members";
/// And this often memory is looked after again.
const TIDY: Duration = Duration::from_secs(10 * 60);

/// Flags of `orchestrator agent`.
#[derive(clap::Args)]
pub(crate) struct Flags {
    /// Prefix of every path, so that several hosts can live on one machine
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// Name of the Node object
    #[arg(long)]
    node_name: String,
    /// The node's address in the underlay
    #[arg(long)]
    node_ip: Ipv4Addr,
    /// Link that carries the pod network, by name or address; several: the first that fits. Without it, the link that has
    /// the node's address, else that of the default route
    #[arg(long, value_delimiter = ',')]
    iface: Vec<String>,
    /// The same by regular expression, for a name or an address; asked after --iface
    #[arg(long)]
    iface_regex: Vec<regex::Regex>,
    /// Address at which other nodes reach this one, if it is not one of the link's own (NAT)
    #[arg(long)]
    public_ip: Option<Ipv4Addr>,
    /// The same for IPv6, in a dual-stack network
    #[arg(long)]
    public_ipv6: Option<Ipv6Addr>,
    /// Unix socket of the Docker engine
    #[arg(long, default_value = "/var/run/docker.sock")]
    engine: PathBuf,
    /// etcd client URLs for the subnet lease
    #[arg(long = "etcd", value_delimiter = ',', required = true)]
    etcd: Vec<String>,
    /// Program of the sandbox image
    #[arg(long)]
    pause_binary: PathBuf,
    /// Container whose network namespace is this node's (lab): host-network pods join it
    #[arg(long)]
    anchor_container: Option<String>,
    /// DNS servers for names outside the cluster
    #[arg(long, value_delimiter = ',')]
    upstream_dns: Vec<std::net::IpAddr>,
    /// Enforce NetworkPolicies: `auto` does it where the kernel can, `on` starts no pod without
    #[arg(long, value_name = "off|auto|on", env = "ORCH_POLICY", default_value_t = orch_netagent::Mode::Auto)]
    policy: orch_netagent::Mode,
    /// How pods reach Services: `nftables` translates packets; `ebpf` also gives sockets of pods their backend
    /// when they connect (TCP) or send (UDP), on machines with cgroups v2 and Linux 5.14; `auto` does so where it can
    #[arg(long, value_name = "nftables|auto|ebpf", env = "ORCH_SERVICES", default_value = "auto", value_parser = orch_netagent::services::connect_time::parse_mode)]
    services: orch_netagent::Mode,
    /// Short failure timers, as for `orchestrator server`
    #[arg(long)]
    fast_failover: bool,
}

pub(crate) async fn run(flags: Flags, stop: CancellationToken) -> anyhow::Result<()> {
    orch_telemetry::share_heaps();
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "the agent needs root: it makes network devices and mounts; start it as root or as a system service"
        );
    }
    let paths = Paths::new(&flags.root);
    let pki = paths.pki();
    let read = |name: &str| {
        let path = pki.join(name);
        std::fs::read_to_string(&path).with_context(|| {
            format!(
                "read {}; `orchctl lab up` or `orchctl join` puts the agent's certificates there",
                path.display()
            )
        })
    };
    let client = orch_client::Client::from_kubeconfig(&pki.join("kubelet.conf"))
        .with_context(|| format!("read {}", pki.join("kubelet.conf").display()))?;
    let etcd_file = paths.lib().join(ETCD_MEMBERS);
    let etcd_known = members::known_etcd(&etcd_file, &flags.etcd);
    let (etcd, etcd_members) = tokio::sync::watch::channel(etcd_known.clone());
    let follower = members::Follower {
        client: client.clone(),
        kubeconfig: pki.join("kubelet.conf"),
        etcd: Some((etcd, etcd_file)),
    };
    let domain = orch_config::CLUSTER_DOMAIN.to_owned();
    let pause_image = format!("orch/pause:{}", orch_config::VERSION);

    let service_cidr_v6 = orch_config::SERVICE_CIDR_V6.parse().context("service CIDR")?;
    let network = orch_netagent::Options {
        node_name: flags.node_name.clone(),
        node_ip: flags.node_ip,
        etcd: orch_netagent::EtcdConfig {
            endpoints: etcd_known,
            ca_pem: Some(read("etcd-ca.crt")?),
            cert_pem: Some(read("etcd-client.crt")?),
            key_pem: Some(read("etcd-client.key")?),
            members: Some(etcd_members),
        },
        interface: orch_netagent::overlay::interface::Choice {
            names: flags.iface,
            patterns: flags.iface_regex,
        },
        public_ip: flags.public_ip,
        public_ipv6: flags.public_ipv6,
        client: client.clone(),
        paths: paths.clone(),
        service_cidr: orch_config::SERVICE_CIDR.parse().context("service CIDR")?,
        service_cidr_v6: Some(service_cidr_v6),
        dns_ip: orch_config::DNS_IP,
        cluster_domain: domain.clone(),
        upstream_dns: flags.upstream_dns,
        policy: flags.policy,
        services: flags.services,
        ..orch_netagent::Options::default()
    };
    let runtime = orch_cri::DockerRuntime::new(&flags.engine, &flags.node_name);
    let kubelet = orch_kubelet::Options {
        node_name: flags.node_name.clone(),
        node_ip: flags.node_ip.into(),
        paths,
        client,
        runtime: Arc::new(runtime),
        dns_ip: orch_config::DNS_IP.into(),
        dns_ip_v6: Some(orch_config::dns_ip_v6(service_cidr_v6).into()),
        cluster_domain: domain,
        serving_cert_pem: read("kubelet.crt")?,
        serving_key_pem: read("kubelet.key")?,
        client_ca_pem: read("ca.crt")?,
        anchor_container: flags.anchor_container,
        pause_image,
        pause_binary: flags.pause_binary,
        more_metrics: Some(orch_netagent::metrics::render),
        ..if flags.fast_failover {
            orch_kubelet::Options::fast()
        } else {
            orch_kubelet::Options::default()
        }
    };
    info!(node = flags.node_name, ip = %flags.node_ip, "agent starts");
    let mut parts = Parts::new(stop.clone());
    parts.spawn("network agent", orch_netagent::run(network, stop.clone()));
    let follow = follower.run(stop.clone());
    parts.spawn("watch on the cluster's members", async {
        follow.await;
        anyhow::Ok(())
    });
    parts.spawn("kubelet", orch_kubelet::run(kubelet, stop.clone()));
    let (outcome, ()) = tokio::join!(parts.join(), give_memory_back(stop));
    outcome
}

/// Gives memory back that only the start needed, or a burst of changes.
async fn give_memory_back(stop: CancellationToken) {
    let mut wait = START;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        match orch_telemetry::release_memory() {
            Ok(bytes) => debug!(code_bytes = bytes, "unused memory was given back"),
            Err(error) => debug!(%error, "unused memory is kept"),
        }
        wait = TIDY;
    }
}
