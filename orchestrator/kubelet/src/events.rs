//! Events about pods and the node.

use orch_api::k8s_openapi::api::core::v1::{ObjectReference, Pod};
use orch_reconcile::EventRecorder;

use crate::api::{self, PodRef};

/// Writes events as this node's kubelet.
#[derive(Clone)]
pub(crate) struct Events {
    recorder: EventRecorder,
    node: String,
}

impl Events {
    pub(crate) fn new(client: orch_client::Client, node: &str) -> Self {
        Self { recorder: EventRecorder::new(client, "kubelet", node), node: node.to_owned() }
    }

    /// About the pod as a whole.
    pub(crate) fn pod(&self, pod: &Pod, kind: &'static str, reason: &str, message: &str) {
        self.recorder.event(&pod_reference(pod, None), kind, reason, message);
    }

    /// About one container of the pod.
    pub(crate) fn container(
        &self,
        pod: &Pod,
        container: &str,
        kind: &'static str,
        reason: &str,
        message: &str,
    ) {
        self.recorder.event(&pod_reference(pod, Some(container)), kind, reason, message);
    }

    pub(crate) fn node(&self, kind: &'static str, reason: &str, message: &str) {
        let regarding = ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(self.node.clone()),
            // Upstream's habit: events about nodes carry the name as UID.
            uid: Some(self.node.clone()),
            ..ObjectReference::default()
        };
        self.recorder.event(&regarding, kind, reason, message);
    }
}

fn pod_reference(pod: &Pod, container: Option<&str>) -> ObjectReference {
    let PodRef { namespace, name, uid } = PodRef::of(pod);
    let field = container.map(|name| {
        let init = api::init_containers(pod).any(|container| container.name == name);
        format!("spec.{}{{{name}}}", if init { "initContainers" } else { "containers" })
    });
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(namespace),
        name: Some(name),
        uid: Some(uid),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: field,
    }
}
