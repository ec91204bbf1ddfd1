//! Which pods are a ReplicaSet's: those it manages and selects, and those it selects that nobody manages.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use orch_api::meta;
use orch_client::Patch;
use serde_json::json;
use tracing::info;

use crate::context::{Context, name, namespace, uid};
use crate::error::{Failure, Step as _};

/// Takes what is ours, lets go what is not, and returns all that is.
pub(super) async fn claim(cx: &Context, set: &ReplicaSet) -> Result<Vec<Arc<Pod>>, Failure> {
    let ns = namespace(&set.metadata);
    let mut claimed = Vec::new();
    for pod in cx.pods.owned_by(uid(&set.metadata)) {
        // Named as an owner, but not the one that manages it.
        if super::owner(&pod.metadata).is_none_or(|(_, owner)| owner != uid(&set.metadata)) {
            continue;
        }
        if super::selects(set, &pod) {
            claimed.push(pod);
        } else if set.metadata.deletion_timestamp.is_none() {
            release(cx, set, &pod).await?;
        }
    }
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(claimed);
    }
    let mut confirmed = false;
    for pod in cx.pods.orphans_in(ns) {
        let wanted = pod.metadata.deletion_timestamp.is_none() && super::selects(set, &pod);
        if !wanted {
            continue;
        }
        // The cache may show a ReplicaSet that is gone; its pods must not be given to it.
        if !confirmed {
            let live = cx.api::<ReplicaSet>(ns).get_opt(name(&set.metadata)).await;
            let live = live.step(|| "look at the ReplicaSet before it adopts".to_owned())?;
            confirmed = live.is_some_and(|live| {
                live.metadata.uid == set.metadata.uid && live.metadata.deletion_timestamp.is_none()
            });
            if !confirmed {
                break;
            }
        }
        if let Some(pod) = adopt(cx, set, &pod).await? {
            claimed.push(pod);
        }
    }
    Ok(claimed)
}

async fn adopt(cx: &Context, set: &ReplicaSet, pod: &Pod) -> Result<Option<Arc<Pod>>, Failure> {
    let mut owners = pod.metadata.owner_references.clone().unwrap_or_default();
    owners.push(meta::controller_reference(set));
    // The UID is that of the pod we saw; another of the same name is not meant.
    let patch = json!({ "metadata": { "uid": pod.metadata.uid, "ownerReferences": owners,
                                      "resourceVersion": pod.metadata.resource_version } });
    let api = cx.api::<Pod>(namespace(&pod.metadata));
    match api.patch(name(&pod.metadata), &Patch::Merge(patch)).await {
        Ok(adopted) => {
            info!(pod = meta::key(&pod.metadata), replicaset = name(&set.metadata), "adopted");
            Ok(Some(Arc::new(adopted)))
        }
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error).step(|| format!("adopt pod {}", name(&pod.metadata))),
    }
}

async fn release(cx: &Context, set: &ReplicaSet, pod: &Pod) -> Result<(), Failure> {
    let owners = pod.metadata.owner_references.iter().flatten();
    let owners: Vec<_> = owners.filter(|owner| owner.uid != uid(&set.metadata)).collect();
    let patch = json!({ "metadata": { "uid": pod.metadata.uid, "ownerReferences": owners,
                                      "resourceVersion": pod.metadata.resource_version } });
    let api = cx.api::<Pod>(namespace(&pod.metadata));
    match api.patch(name(&pod.metadata), &Patch::Merge(patch)).await {
        Ok(_) => {
            info!(pod = meta::key(&pod.metadata), replicaset = name(&set.metadata), "released");
            Ok(())
        }
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error).step(|| format!("release pod {}", name(&pod.metadata))),
    }
}
