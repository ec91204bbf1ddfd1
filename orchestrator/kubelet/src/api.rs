//! Short cuts into the API's types.

use std::fmt;

use jiff::Timestamp;
use orch_api::k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, PodSpec};
use orch_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// Which pod it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct PodRef {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

impl PodRef {
    pub(crate) fn of(pod: &Pod) -> Self {
        Self {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
        }
    }
}

impl fmt::Display for PodRef {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.namespace, self.name)
    }
}

/// The spec; a pod without one has no containers.
pub(crate) fn spec(pod: &Pod) -> PodSpec {
    pod.spec.clone().unwrap_or_default()
}

pub(crate) fn init_containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten())
}

pub(crate) fn app_containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    pod.spec.iter().flat_map(|spec| spec.containers.iter())
}

pub(crate) fn all_containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    init_containers(pod).chain(app_containers(pod))
}

/// Containers that were added to look into a running pod. They never restart, and the pod's life is none of theirs.
pub(crate) fn ephemeral_containers(pod: &Pod) -> impl Iterator<Item = Container> {
    let all = pod.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten());
    all.map(|found| {
        // Their type has the same fields and one of its own.
        let found = found.clone();
        Container {
            args: found.args,
            command: found.command,
            env: found.env,
            env_from: found.env_from,
            image: found.image,
            image_pull_policy: found.image_pull_policy,
            name: found.name,
            security_context: found.security_context,
            stdin: found.stdin,
            stdin_once: found.stdin_once,
            termination_message_path: found.termination_message_path,
            termination_message_policy: found.termination_message_policy,
            tty: found.tty,
            volume_devices: found.volume_devices,
            volume_mounts: found.volume_mounts,
            working_dir: found.working_dir,
            restart_policy: Some("Never".to_owned()),
            ..Container::default()
        }
    })
}

/// The container of an ephemeral one's `targetContainerName`.
pub(crate) fn ephemeral_target<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    let mut all = pod.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten());
    all.find(|found| found.name == name)?
        .target_container_name
        .as_deref()
        .filter(|target| !target.is_empty())
}

/// A container of the pod, of whichever kind.
pub(crate) fn find_container(pod: &Pod, name: &str) -> Option<Container> {
    let named = all_containers(pod).find(|container| container.name == name).cloned();
    named.or_else(|| ephemeral_containers(pod).find(|container| container.name == name))
}

/// What the API server was told last about a container.
pub(crate) fn container_status<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let init = status.init_container_statuses.iter().flatten();
    let apps = status.container_statuses.iter().flatten();
    let debug = status.ephemeral_container_statuses.iter().flatten();
    init.chain(apps).chain(debug).find(|status| status.name == name)
}

/// An init container that keeps running beside the others (Kubernetes, "Sidecar Containers").
pub(crate) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

pub(crate) fn restart_policy(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()).unwrap_or("Always")
}

pub(crate) fn is_host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

/// The seconds that containers get to end, by the deletion or else by the spec.
pub(crate) fn grace_seconds(pod: &Pod) -> i64 {
    let wanted = pod
        .metadata
        .deletion_grace_period_seconds
        .filter(|_| pod.metadata.deletion_timestamp.is_some());
    let by_spec = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    wanted.or(by_spec).unwrap_or(30).max(0)
}

/// A time as the engine writes it; its zero time (year 1) is none.
pub(crate) fn parse_time(text: &str) -> Option<Timestamp> {
    if text.is_empty() || text.starts_with("0001-") {
        return None;
    }
    text.parse().ok()
}

/// Seconds are all that the API keeps of a time.
pub(crate) fn time(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}
