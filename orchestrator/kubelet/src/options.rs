//! What the kubelet is told at its start.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use orch_client::Client;
use orch_config::Paths;
use orch_cri::{DockerRuntime, Runtime};

/// Everything that differs between nodes and machines. The defaults are upstream's.
#[derive(Clone)]
pub struct Options {
    pub node_name: String,
    pub node_ip: IpAddr,
    pub paths: Paths,
    pub client: Client,
    pub runtime: Arc<dyn Runtime>,
    /// ClusterIP of the cluster's DNS, for pods' `resolv.conf`.
    pub dns_ip: IpAddr,
    /// The same for pods that have IPv6 alone.
    pub dns_ip_v6: Option<IpAddr>,
    pub cluster_domain: String,
    /// Resolver configuration of the node, for `dnsPolicy: Default`.
    pub resolv_conf: PathBuf,
    pub serving_cert_pem: String,
    pub serving_key_pem: String,
    /// CA of the clients that may use the kubelet's API.
    pub client_ca_pem: String,
    pub listen_port: u16,
    /// Container whose network namespace is the node's: host-network pods join it. None: the machine is the node.
    pub anchor_container: Option<String>,
    pub node_labels: BTreeMap<String, String>,
    pub pause_image: String,
    /// Program that the sandbox image is made of, when the engine does not have the image.
    pub pause_binary: PathBuf,
    /// Pods that start at the same time.
    pub parallel_starts: usize,
    pub max_pods: u32,
    /// Upper bounds for what the node offers, where several nodes share one machine.
    pub cpu_milli_limit: Option<i64>,
    pub memory_bytes_limit: Option<i64>,
    pub lease_renew: Duration,
    pub lease_duration: Duration,
    /// How often conditions are looked at; they are reported when they change.
    pub status_check: Duration,
    /// How often the status is reported although nothing changed.
    pub status_report: Duration,
    /// How often all containers are listed, in case an event was lost.
    pub relist: Duration,
    /// How often volumes from the API are refreshed.
    pub volume_refresh: Duration,
    /// Metrics of other parts of this process, in Prometheus' text format: `/metrics` shows them behind the kubelet's.
    pub more_metrics: Option<fn() -> String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            node_ip: Ipv4Addr::LOCALHOST.into(),
            paths: Paths::new("/"),
            client: Client::new(NoServer),
            runtime: Arc::new(DockerRuntime::new(Path::new("/var/run/docker.sock"), "")),
            dns_ip: orch_config::DNS_IP.into(),
            dns_ip_v6: None,
            cluster_domain: orch_config::CLUSTER_DOMAIN.to_owned(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            serving_cert_pem: String::new(),
            serving_key_pem: String::new(),
            client_ca_pem: String::new(),
            listen_port: orch_config::KUBELET_PORT,
            anchor_container: None,
            node_labels: BTreeMap::new(),
            pause_image: format!("orch/pause:{}", orch_config::VERSION),
            pause_binary: PathBuf::from("/usr/lib/orch/orch-pause"),
            // More gains nothing on two cores (reference/lab-baselines.md §3.1).
            parallel_starts: 4,
            max_pods: 110,
            cpu_milli_limit: None,
            memory_bytes_limit: None,
            lease_renew: Duration::from_secs(10),
            lease_duration: Duration::from_secs(40),
            status_check: Duration::from_secs(10),
            status_report: Duration::from_secs(300),
            relist: Duration::from_secs(10),
            volume_refresh: Duration::from_secs(45),
            more_metrics: None,
        }
    }
}

impl Options {
    /// Short timers, for labs in which the loss of a node should be seen within seconds.
    #[must_use]
    pub fn fast() -> Self {
        Self {
            lease_renew: Duration::from_secs(2),
            lease_duration: Duration::from_secs(8),
            status_check: Duration::from_secs(2),
            relist: Duration::from_secs(5),
            volume_refresh: Duration::from_secs(20),
            ..Self::default()
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
        Err(orch_client::Error::Config("the kubelet was started without an API server".to_owned()))
    }
}
