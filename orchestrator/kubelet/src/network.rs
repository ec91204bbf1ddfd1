//! The pod network as the kubelet uses it: a sandbox gets addresses through CNI, and gives them back.

pub(crate) mod netns;

use std::net::IpAddr;
use std::path::PathBuf;

use async_trait::async_trait;
use cni_invoke::{Attachment, Cni};
use cni_spec::{AttachmentId, ContainerId, IfName};
use orch_api::Quantity;
use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_config::Paths;
use serde_json::{Map, Value, json};

use crate::api::{self, PodRef};

/// Name of the pod's interface.
const IFNAME: &str = "eth0";

/// What a limit of bandwidth may be, in bits a second: 1k to 1P, as upstream.
const BANDWIDTH_RANGE: std::ops::RangeInclusive<i64> = 1_000..=1_000_000_000_000_000;
/// Smallest burst: some full frames, or large ones would never pass.
const BURST_MIN_BITS: i64 = 64 * 1024 * 8;
/// Largest burst: the plugin's bound of 4 GB.
const BURST_MAX_BITS: i64 = 8 * (u32::MAX as i64);

/// A sandbox's place in the pod network.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) sandbox: String,
    pub(crate) netns: PathBuf,
    pub(crate) pod: PodRef,
    pub(crate) ports: Vec<Value>,
    /// `None` is without limits.
    pub(crate) bandwidth: Option<Value>,
}

impl Place {
    pub(crate) fn new(pod: &PodRef, sandbox: &str, netns: PathBuf) -> Self {
        Self {
            sandbox: sandbox.to_owned(),
            netns,
            pod: pod.clone(),
            ports: Vec::new(),
            bandwidth: None,
        }
    }

    /// With the host ports and the bandwidth limits of the pod.
    pub(crate) fn with_ports(mut self, pod: &Pod) -> Self {
        self.bandwidth = bandwidth(pod);
        self.ports = api::app_containers(pod)
            .flat_map(|container| container.ports.iter().flatten())
            .filter_map(|port| {
                let host_port = port.host_port.filter(|port| *port > 0)?;
                Some(json!({
                    "hostPort": host_port,
                    "containerPort": port.container_port,
                    "protocol": port.protocol.as_deref().unwrap_or("TCP").to_lowercase(),
                    "hostIP": port.host_ip.as_deref().unwrap_or_default(),
                }))
            })
            .collect();
        self
    }
}

/// The limits of a pod's annotations `kubernetes.io/ingress-bandwidth` and `…/egress-bandwidth`, in bits a second, as
/// the capability `bandwidth` has them. One that cannot be read is no limit, as upstream.
fn bandwidth(pod: &Pod) -> Option<Value> {
    let annotations = pod.metadata.annotations.as_ref()?;
    let mut limits = Map::new();
    for direction in ["ingress", "egress"] {
        let text = annotations.get(&format!("kubernetes.io/{direction}-bandwidth"));
        let Some(text) = text else { continue };
        match Quantity::parse(text).map(|rate| rate.value()) {
            Ok(rate) if BANDWIDTH_RANGE.contains(&rate) => {
                limits.insert(format!("{direction}Rate"), json!(rate));
                // A tenth of a second at full speed. Upstream's burst of half a gigabyte makes the limit one that
                // most transfers never meet.
                limits.insert(
                    format!("{direction}Burst"),
                    json!((rate / 10).clamp(BURST_MIN_BITS, BURST_MAX_BITS)),
                );
            }
            _ => tracing::warn!(
                pod = pod.metadata.name.as_deref().unwrap_or_default(),
                annotation = format!("kubernetes.io/{direction}-bandwidth"),
                value = text,
                "this is no bandwidth from 1k to 1P, and no limit is set"
            ),
        }
    }
    (!limits.is_empty()).then_some(Value::Object(limits))
}

/// Connects sandboxes. A trait, so that tests need neither root nor plugins.
#[async_trait]
pub(crate) trait PodNetwork: Send + Sync {
    /// Whether a sandbox could be connected now, else what is missing.
    async fn ready(&self) -> Result<(), String>;

    /// Holds the network namespace of a process open under a path of its own.
    async fn pin(&self, pid: i32, sandbox: &str) -> Result<PathBuf, String>;

    /// Connects a sandbox and returns its addresses; connects nothing if it fails.
    async fn add(&self, place: &Place) -> Result<Vec<IpAddr>, String>;

    /// Disconnects a sandbox and lets its namespace go; safe to repeat.
    async fn remove(&self, place: &Place) -> Result<(), String>;

    /// Frees what sandboxes other than these hold.
    async fn collect(&self, valid: Vec<String>) -> Result<(), String>;

    /// Where a sandbox's namespace is, or would be, held open.
    fn netns_path(&self, sandbox: &str) -> PathBuf;

    /// Sandboxes whose namespace is held open, for finding those that are gone.
    async fn pinned(&self) -> Vec<String>;
}

/// The real one: plugins by the CNI specification.
pub(crate) struct CniNetwork {
    paths: Paths,
}

impl CniNetwork {
    pub(crate) fn new(paths: Paths) -> Self {
        Self { paths }
    }

    fn cni(&self) -> Cni {
        Cni {
            conf_dir: self.paths.cni_conf_dir(),
            bin_dirs: vec![self.paths.cni_bin_dir()],
            cache_dir: self.paths.cni_cache_dir(),
        }
    }
}

/// Plugins are child processes of synchronous code: they run beside the async workers.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| format!("the CNI call broke off: {error}"))?
}

fn attachment(place: &Place) -> Attachment {
    let args = [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", &place.pod.namespace),
        ("K8S_POD_NAME", &place.pod.name),
        ("K8S_POD_INFRA_CONTAINER_ID", &place.sandbox),
        ("K8S_POD_UID", &place.pod.uid),
    ];
    let mut capabilities = Map::new();
    if !place.ports.is_empty() {
        capabilities.insert("portMappings".to_owned(), Value::Array(place.ports.clone()));
    }
    if let Some(bandwidth) = &place.bandwidth {
        capabilities.insert("bandwidth".to_owned(), bandwidth.clone());
    }
    Attachment {
        container_id: place.sandbox.clone(),
        netns: place.netns.to_string_lossy().into_owned(),
        ifname: IFNAME.to_owned(),
        args: args.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        capabilities,
    }
}

fn attachment_id(sandbox: &str) -> Result<AttachmentId, String> {
    let container_id = ContainerId::new(sandbox).map_err(|error| error.to_string())?;
    let ifname = IfName::new(IFNAME).map_err(|error| error.to_string())?;
    Ok(AttachmentId { container_id, ifname })
}

#[async_trait]
impl PodNetwork for CniNetwork {
    async fn ready(&self) -> Result<(), String> {
        let folder = self.paths.cni_conf_dir();
        let cni = self.cni();
        let loaded =
            blocking(move || cni.load().map(drop).map_err(|error| error.to_string())).await;
        loaded.map_err(|error| {
            format!(
                "the pod network is not configured in {} ({error}); the network agent writes it once it has a subnet",
                folder.display()
            )
        })?;
        let subnet = self.paths.subnet_env();
        if subnet.exists() {
            return Ok(());
        }
        Err(format!(
            "this node has no subnet lease yet ({} is missing); see whether etcd answers and the log of the network agent",
            subnet.display()
        ))
    }

    async fn pin(&self, pid: i32, sandbox: &str) -> Result<PathBuf, String> {
        let target = self.netns_path(sandbox);
        let made = target.clone();
        blocking(move || {
            netns::pin(pid, &made).map_err(|error| format!("hold network namespace open: {error}"))
        })
        .await?;
        Ok(target)
    }

    async fn add(&self, place: &Place) -> Result<Vec<IpAddr>, String> {
        let cni = self.cni();
        let attachment = attachment(place);
        blocking(move || {
            let list = cni.load().map_err(|error| error.to_string())?;
            match cni.add(&list, &attachment) {
                Ok(result) => {
                    let ips: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.ip()).collect();
                    if ips.is_empty() {
                        Err("the CNI plugins gave the pod no address".to_owned())
                    } else {
                        Ok(ips)
                    }
                }
                Err(error) => {
                    // CNI spec §2: after a failed ADD, DEL releases what plugins before the failing one took.
                    if let Err(left) = cni.del(&list, &attachment) {
                        tracing::warn!(%left, "DEL after a failed ADD");
                    }
                    Err(error.to_string())
                }
            }
        })
        .await
    }

    async fn remove(&self, place: &Place) -> Result<(), String> {
        let cni = self.cni();
        let attachment = attachment(place);
        blocking(move || {
            let released = match cni.load() {
                Ok(list) => cni.del(&list, &attachment).map_err(|error| error.to_string()),
                // Without a configuration nothing was added either.
                Err(_) => Ok(()),
            };
            let unpinned =
                netns::unpin(&PathBuf::from(&attachment.netns)).map_err(|error| error.to_string());
            released.and(unpinned)
        })
        .await
    }

    async fn collect(&self, valid: Vec<String>) -> Result<(), String> {
        let cni = self.cni();
        blocking(move || {
            let list = cni.load().map_err(|error| error.to_string())?;
            // One that is left out would lose its address: rather none is freed.
            let valid: Vec<AttachmentId> =
                valid.iter().map(|id| attachment_id(id)).collect::<Result<_, _>>()?;
            cni.gc(&list, &valid).map_err(|error| error.to_string())
        })
        .await
    }

    fn netns_path(&self, sandbox: &str) -> PathBuf {
        self.paths.netns_dir().join(sandbox)
    }

    async fn pinned(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.paths.netns_dir()).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        // What is not named after a container was put there by somebody else.
        names
            .filter(|name| name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(annotations: Value) -> Option<Value> {
        let pod = json!({"metadata": {"name": "p", "annotations": annotations}});
        bandwidth(&serde_json::from_value(pod).expect("a pod"))
    }

    #[test]
    fn bandwidth_annotations_become_limits_and_nonsense_none() {
        assert_eq!(
            limits(json!({"kubernetes.io/ingress-bandwidth": "10M"})),
            Some(json!({"ingressRate": 10_000_000, "ingressBurst": 1_000_000}))
        );
        assert_eq!(
            limits(json!({"kubernetes.io/egress-bandwidth": "1k"})),
            Some(json!({"egressRate": 1000, "egressBurst": BURST_MIN_BITS}))
        );
        for text in ["fast", "1", "2P", "-5M"] {
            assert_eq!(limits(json!({"kubernetes.io/egress-bandwidth": text})), None, "{text}");
        }
        assert_eq!(limits(Value::Null), None);
    }
}
