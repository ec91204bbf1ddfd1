//! What the scheduler needs to know of a pod, worked out once when the pod is first seen.

use std::sync::Arc;

use orch_api::k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Toleration};
use orch_api::pod::Resources;
use orch_api::{Quantity, Selector};

use crate::terms::{AffinityTerm, Labels, NodeTerm, SpreadConstraint};

/// A container that requests no CPU counts as this much when nodes are compared, so that such pods spread too
/// (upstream, `util/pod_resources.go`).
const DEFAULT_MILLI_CPU: i64 = 100;
/// The same for memory: 200 MiB.
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

/// Identity of a pod: its UID.
pub type Uid = Arc<str>;

/// A port a pod takes on its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostPort {
    pub(crate) ip: String,
    pub(crate) port: i32,
    pub(crate) protocol: String,
}

impl HostPort {
    /// Same port and protocol, and the addresses overlap.
    pub(crate) fn conflicts(&self, other: &Self) -> bool {
        let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0" || ip == "::";
        self.port == other.port
            && self.protocol == other.protocol
            && (any(&self.ip) || any(&other.ip) || self.ip == other.ip)
    }
}

/// A pod in the form the plugins read.
#[derive(Debug)]
pub struct PodInfo {
    pub(crate) uid: Uid,
    pub(crate) pod: Arc<Pod>,
    pub(crate) namespace: String,
    pub(crate) labels: Labels,
    pub(crate) priority: i32,
    pub(crate) requests: Resources,
    /// CPU and memory with defaults for containers that request none; for scores only.
    pub(crate) scored_milli_cpu: i64,
    pub(crate) scored_memory_bytes: i64,
    pub(crate) host_ports: Vec<HostPort>,
    pub(crate) tolerations: Vec<Toleration>,
    pub(crate) node_selector: Selector,
    /// Required node affinity: one of the terms must match.
    pub(crate) node_terms: Option<Vec<NodeTerm>>,
    pub(crate) preferred_node_terms: Vec<(i64, NodeTerm)>,
    pub(crate) affinity: Vec<AffinityTerm>,
    pub(crate) anti_affinity: Vec<AffinityTerm>,
    /// Preferred affinity, with negative weights for anti-affinity.
    pub(crate) preferred_affinity: Vec<(i64, AffinityTerm)>,
    pub(crate) spread: Vec<SpreadConstraint>,
    /// UID of the managing owner; pods of one owner are spread by default.
    pub(crate) owner: Option<Arc<str>>,
    pub(crate) images: Vec<String>,
}

impl PodInfo {
    /// Reads a pod.
    #[must_use]
    pub fn new(pod: Arc<Pod>) -> Self {
        let none = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&none);
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        let affinity = spec.affinity.clone().unwrap_or_default();
        let node_affinity = affinity.node_affinity.unwrap_or_default();
        let pod_affinity = affinity.pod_affinity.unwrap_or_default();
        let pod_anti_affinity = affinity.pod_anti_affinity.unwrap_or_default();
        let term = |term| AffinityTerm::parse(term, &namespace, &labels);
        let attract = pod_affinity
            .preferred_during_scheduling_ignored_during_execution
            .iter()
            .flatten()
            .map(|preferred| (i64::from(preferred.weight), term(&preferred.pod_affinity_term)));
        let repel = pod_anti_affinity
            .preferred_during_scheduling_ignored_during_execution
            .iter()
            .flatten()
            .map(|preferred| (-i64::from(preferred.weight), term(&preferred.pod_affinity_term)));
        let (scored_milli_cpu, scored_memory_bytes) = scored_requests(spec);
        Self {
            uid: pod.metadata.uid.as_deref().unwrap_or_default().into(),
            priority: spec.priority.unwrap_or_default(),
            requests: orch_api::pod::requests(spec),
            scored_milli_cpu,
            scored_memory_bytes,
            host_ports: host_ports(spec),
            tolerations: spec.tolerations.clone().unwrap_or_default(),
            node_selector: spec
                .node_selector
                .as_ref()
                .map_or_else(Selector::everything, Selector::from_labels),
            node_terms: node_affinity
                .required_during_scheduling_ignored_during_execution
                .map(|required| required.node_selector_terms.iter().map(NodeTerm::parse).collect()),
            preferred_node_terms: node_affinity
                .preferred_during_scheduling_ignored_during_execution
                .iter()
                .flatten()
                .map(|preferred| {
                    (i64::from(preferred.weight), NodeTerm::parse(&preferred.preference))
                })
                .collect(),
            affinity: pod_affinity
                .required_during_scheduling_ignored_during_execution
                .iter()
                .flatten()
                .map(term)
                .collect(),
            anti_affinity: pod_anti_affinity
                .required_during_scheduling_ignored_during_execution
                .iter()
                .flatten()
                .map(term)
                .collect(),
            preferred_affinity: attract.chain(repel).collect(),
            spread: spec
                .topology_spread_constraints
                .iter()
                .flatten()
                .map(|constraint| SpreadConstraint::parse(constraint, &labels))
                .collect(),
            owner: orch_api::meta::controller_of(&pod.metadata)
                .map(|owner| owner.uid.as_str().into()),
            images: containers(spec)
                .filter_map(|container| container.image.as_deref().map(normalized_image))
                .collect(),
            namespace,
            labels,
            pod,
        }
    }

    /// Name of the pod.
    #[must_use]
    pub fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    /// `namespace/name`, for people.
    #[must_use]
    pub fn key(&self) -> String {
        orch_api::meta::key(&self.pod.metadata)
    }

    /// Names of the gates that hold the pod back.
    pub(crate) fn gates(&self) -> impl Iterator<Item = &str> {
        let spec = self.pod.spec.as_ref();
        let gates = spec.and_then(|spec| spec.scheduling_gates.as_ref());
        gates.into_iter().flatten().map(|gate| gate.name.as_str())
    }

    /// Whether anything changed that a placement depends on.
    pub(crate) fn schedules_like(&self, other: &Self) -> bool {
        self.labels == other.labels && self.pod.spec == other.pod.spec
    }
}

fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.init_containers.iter().flatten().chain(&spec.containers)
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let ports =
        sidecars.chain(&spec.containers).flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            Some(HostPort {
                ip: port.host_ip.clone().unwrap_or_default(),
                port: number,
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
            })
        })
        .collect()
}

fn scored_requests(spec: &PodSpec) -> (i64, i64) {
    let request = |container: &Container, name: &str| {
        let requests = container.resources.as_ref()?.requests.as_ref()?;
        Quantity::parse(&requests.get(name)?.0).ok()
    };
    let of = |container: &Container| {
        (
            request(container, "cpu").map_or(DEFAULT_MILLI_CPU, |cpu| cpu.milli()),
            request(container, "memory").map_or(DEFAULT_MEMORY_BYTES, |memory| memory.value()),
        )
    };
    let (mut cpu, mut memory) = (0_i64, 0_i64);
    for container in &spec.containers {
        let (more_cpu, more_memory) = of(container);
        cpu = cpu.saturating_add(more_cpu);
        memory = memory.saturating_add(more_memory);
    }
    for container in spec.init_containers.iter().flatten() {
        let (step_cpu, step_memory) = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            cpu = cpu.saturating_add(step_cpu);
            memory = memory.saturating_add(step_memory);
        } else {
            cpu = cpu.max(step_cpu);
            memory = memory.max(step_memory);
        }
    }
    if let Some(overhead) = &spec.overhead {
        let overhead = Resources::from_map(overhead);
        cpu = cpu.saturating_add(overhead.cpu_milli);
        memory = memory.saturating_add(overhead.memory_bytes);
    }
    (cpu, memory)
}

/// An image name with its tag: `web` is `web:latest`.
pub(crate) fn normalized_image(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or_default();
    if last.contains([':', '@']) { image.to_owned() } else { format!("{image}:latest") }
}
