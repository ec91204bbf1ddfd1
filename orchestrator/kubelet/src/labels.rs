//! Names and labels that tie an engine's container to its pod. They are all the agent needs to find its pods again
//! after a restart.

use std::collections::BTreeMap;

use crate::api::PodRef;

pub(crate) const POD_NAME: &str = "io.kubernetes.pod.name";
pub(crate) const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub(crate) const POD_UID: &str = "io.kubernetes.pod.uid";
pub(crate) const CONTAINER: &str = "io.kubernetes.container.name";
/// How often this container, or sandbox, of the pod was made before: the restart count survives in it.
pub(crate) const ATTEMPT: &str = "orch.attempt";
/// Hash of what the container was made from; another one in the pod means it has to be made anew.
pub(crate) const SPEC_HASH: &str = "orch.spec-hash";
/// ID of the sandbox a container was made for.
pub(crate) const SANDBOX_ID: &str = "orch.sandbox";
/// The sandbox's container name, as the field has it.
pub(crate) const SANDBOX: &str = "POD";

/// The engine refuses a second container of one name, so two agents, or one that lost its memory, cannot make the
/// same attempt twice.
pub(crate) fn container_name(pod: &PodRef, container: &str, attempt: u32) -> String {
    format!("k8s_{container}_{}_{}_{}_{attempt}", pod.name, pod.namespace, pod.uid)
}

pub(crate) fn labels(pod: &PodRef, container: &str, attempt: u32) -> BTreeMap<String, String> {
    [
        (POD_NAME, pod.name.clone()),
        (POD_NAMESPACE, pod.namespace.clone()),
        (POD_UID, pod.uid.clone()),
        (CONTAINER, container.to_owned()),
        (ATTEMPT, attempt.to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}
