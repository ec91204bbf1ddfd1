//! Telling the user: the `PodScheduled` condition and the events of a pod.

use orch_api::k8s_openapi::api::core::v1::{ObjectReference, Pod};
use orch_client::{Api, Client, Error, Patch};
use serde_json::{Value, json};
use tracing::warn;

use crate::pod_info::PodInfo;

/// A pod that changes this often while a condition is written will be reported at its next attempt.
const CONFLICT_RETRIES: usize = 3;

/// Why a pod is not scheduled, for its condition.
#[derive(Debug, Clone)]
pub(crate) struct Unscheduled {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// The pod as the subject of an event.
pub(crate) fn reference(pod: &PodInfo) -> ObjectReference {
    let meta = &pod.pod.metadata;
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        ..ObjectReference::default()
    }
}

/// The patch that sets the condition, or nothing if it says so already.
fn condition_patch(pod: &Pod, why: &Unscheduled, now: jiff::Timestamp) -> Option<Value> {
    let current = orch_api::pod::condition(pod, "PodScheduled");
    let told = current.is_some_and(|condition| {
        condition.status == "False"
            && condition.reason.as_deref() == Some(why.reason)
            && condition.message.as_deref() == Some(why.message.as_str())
    });
    if told {
        return None;
    }
    let mut condition = json!({ "type": "PodScheduled", "status": "False", "reason": why.reason, "message": why.message });
    if current.is_none_or(|condition| condition.status != "False") {
        condition["lastTransitionTime"] = json!(now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
    }
    // The resource version keeps a late "not scheduled" from following a binding.
    Some(json!({
        "metadata": { "uid": pod.metadata.uid, "resourceVersion": pod.metadata.resource_version },
        "status": { "conditions": [condition] },
    }))
}

/// Writes the condition, unless the pod is bound or gone by now.
pub(crate) async fn set_unscheduled(
    client: Client,
    pod: std::sync::Arc<PodInfo>,
    why: Unscheduled,
) {
    if let Err(error) = write_condition(client, &pod, &why).await {
        warn!(
            pod = pod.key(),
            error = &error as &dyn std::error::Error,
            "write the PodScheduled condition"
        );
    }
}

async fn write_condition(client: Client, pod: &PodInfo, why: &Unscheduled) -> Result<(), Error> {
    let api: Api<Pod> = Api::namespaced(client, &pod.namespace);
    let mut current = Pod::clone(&pod.pod);
    for _ in 0..CONFLICT_RETRIES {
        let Some(patch) = condition_patch(&current, why, jiff::Timestamp::now()) else {
            return Ok(());
        };
        match api.patch_status(pod.name(), &Patch::Strategic(patch)).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) if error.is_conflict() => {}
            Err(error) => return Err(error),
        }
        match api.get(pod.name()).await {
            Ok(newer) if newer.metadata.uid != current.metadata.uid => return Ok(()),
            Ok(newer) if !orch_api::pod::node_name(&newer).is_empty() => return Ok(()),
            Ok(newer) => current = newer,
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Asks the API server to bind the pod.
pub(crate) async fn bind(client: Client, pod: &PodInfo, node: &str) -> Result<(), Error> {
    let body = json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": { "namespace": pod.namespace, "name": pod.name(), "uid": pod.pod.metadata.uid },
        "target": { "apiVersion": "v1", "kind": "Node", "name": node },
    });
    let api: Api<Pod> = Api::namespaced(client, &pod.namespace);
    let _: Value = api.create_subresource(pod.name(), "binding", &body).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(conditions: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "a", "uid": "u", "resourceVersion": "7" }, "status": { "conditions": conditions }
        }))
        .expect("a pod")
    }

    #[test]
    fn the_same_news_is_not_written_twice_and_the_time_is_that_of_the_change() {
        let why = Unscheduled { reason: "Unschedulable", message: "0/1".to_owned() };
        let now: jiff::Timestamp = "2026-01-02T03:04:05Z".parse().expect("a time");
        let first = condition_patch(&pod(json!([])), &why, now).expect("news");
        assert_eq!(first["metadata"]["resourceVersion"], "7");
        assert_eq!(first["status"]["conditions"][0]["lastTransitionTime"], "2026-01-02T03:04:05Z");

        let told = json!([{ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1" }]);
        assert_eq!(condition_patch(&pod(told.clone()), &why, now), None);

        let other = Unscheduled { message: "0/2".to_owned(), ..why };
        let second = condition_patch(&pod(told), &other, now).expect("news");
        assert_eq!(second["status"]["conditions"][0]["lastTransitionTime"], Value::Null);
    }
}
