//! Writing a pod's status to the API server, only where it differs.

use std::sync::Arc;

use orch_api::k8s_openapi::api::core::v1::{Pod, PodStatus};
use orch_client::{Api, Client, Error, Patch};
use serde_json::{Value, json};

/// The pod as the API server had it last: by the watch, or by the answer to our own write.
#[derive(Clone)]
pub(crate) struct Latest {
    pub(crate) pod: Arc<Pod>,
}

fn version(pod: &Pod) -> u64 {
    pod.metadata
        .resource_version
        .as_deref()
        .and_then(|version| version.parse().ok())
        .unwrap_or_default()
}

impl Latest {
    /// Takes over a newer one.
    pub(crate) fn see(&mut self, pod: &Arc<Pod>) {
        if version(pod) >= version(&self.pod) {
            self.pod = pod.clone();
        }
    }

    /// Sends the status if it is another one. A pod that is gone needs none.
    ///
    /// # Errors
    /// The API server does not answer, or refuses.
    pub(crate) async fn report(
        &mut self,
        client: &Client,
        status: &PodStatus,
    ) -> Result<(), Error> {
        if self.pod.status.as_ref() == Some(status) {
            return Ok(());
        }
        let namespace = self.pod.metadata.namespace.as_deref().unwrap_or_default();
        let name = self.pod.metadata.name.clone().unwrap_or_default();
        let patch = patch(&self.pod, status);
        match Api::<Pod>::namespaced(client.clone(), namespace)
            .patch_status(&name, &Patch::Merge(patch))
            .await
        {
            Ok(pod) => {
                self.see(&Arc::new(pod));
                Ok(())
            }
            // Gone, or another pod of that name.
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// A merge patch for the status; the UID makes it fail for a later pod of the same name.
fn patch(pod: &Pod, status: &PodStatus) -> Value {
    let old = serde_json::to_value(&pod.status).unwrap_or_default();
    let mut new = serde_json::to_value(status).unwrap_or_default();
    if let (Some(old), Some(new)) = (old.as_object(), new.as_object_mut()) {
        for key in old.keys() {
            if !new.contains_key(key) {
                new.insert(key.clone(), Value::Null);
            }
        }
    }
    json!({ "metadata": { "uid": pod.metadata.uid }, "status": new })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_went_is_removed_by_the_patch() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "uid": "u" }, "status": { "phase": "Pending", "reason": "Old" },
        }))
        .expect("a pod");
        let status = PodStatus { phase: Some("Running".to_owned()), ..PodStatus::default() };
        let patch = patch(&pod, &status);
        assert_eq!(
            patch,
            json!({ "metadata": { "uid": "u" }, "status": { "phase": "Running", "reason": null } })
        );
    }
}
