//! Admission: what a new object must meet besides its own rules, and what it is given.
//!
//! NamespaceLifecycle, ServiceAccount, Priority ([`priority`]), DefaultTolerationSeconds (Kubernetes, "Admission Control in
//! Kubernetes").

mod priority;

use orch_api::{ApiError, names, taint};
use serde_json::{Value, json};

use crate::read::{parse, store_error};
use crate::resources::{self, Resource};
use crate::state::Shared;

/// Where a pod finds its ServiceAccount's token.
const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Lifetime of that token: an hour and a little, upstream's value.
const TOKEN_SECONDS: i64 = 3607;
/// How long pods stay on a node that is away.
const TOLERATION_SECONDS: i64 = 300;
/// Namespaces that are always there.
pub(crate) const SYSTEM_NAMESPACES: [&str; 4] =
    ["default", "kube-node-lease", "kube-public", "kube-system"];

/// Checks and completes a new object.
pub(crate) async fn create(
    shared: &Shared,
    resource: &Resource,
    object: &mut Value,
) -> Result<(), ApiError> {
    if resource.namespaced {
        namespace_lifecycle(shared, resource, object).await?;
    }
    if (resource.group, resource.plural) == ("", "pods") {
        service_account(shared, object).await?;
        priority::pod(shared, object).await?;
        default_tolerations(object);
    }
    update(shared, resource, object)
}

/// Checks an object as it is going to be stored, new or changed.
///
/// # Errors
/// It does not go with the others that are there.
pub(crate) fn update(shared: &Shared, resource: &Resource, object: &Value) -> Result<(), ApiError> {
    match resource.plural {
        resources::PRIORITY_CLASSES => priority::class(shared, object),
        _ => Ok(()),
    }
}

async fn namespace_lifecycle(
    shared: &Shared,
    resource: &Resource,
    object: &Value,
) -> Result<(), ApiError> {
    let name = object["metadata"]["namespace"].as_str().unwrap_or_default();
    let Some(namespaces) = resources::find("", "v1", "namespaces") else {
        return Err(ApiError::internal("there is no namespaces resource"));
    };
    let key = namespaces.key("", name);
    let cached = shared.stored("", "namespaces").and_then(|stored| stored.cache.get(&key));
    let namespace = match cached {
        Some(object) => parse(&object.bytes)?,
        // The cache may be a moment behind: the store knows.
        None => match shared.store.get(&key).await.map_err(|error| store_error(&error))?.0 {
            Some(found) => parse(&found.value)?,
            None => return Err(ApiError::not_found("", "namespaces", name)),
        },
    };
    if namespace["metadata"]["deletionTimestamp"].is_string() {
        let why = format!(
            "unable to create new content in namespace {name} because it is being terminated"
        );
        let object_name = object["metadata"]["name"].as_str().unwrap_or_default();
        let mut error = ApiError::refused(resource.group, resource.plural, object_name, &why);
        if let Some(details) = &mut error.details {
            details["causes"] = json!([{ "reason": "NamespaceTerminating", "field": "metadata.namespace",
                                         "message": format!("namespace {name} is being terminated") }]);
        }
        return Err(error);
    }
    Ok(())
}

async fn service_account(shared: &Shared, pod: &mut Value) -> Result<(), ApiError> {
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
    let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let name = pod["spec"]["serviceAccountName"]
        .as_str()
        .filter(|name| !name.is_empty())
        .unwrap_or("default")
        .to_owned();
    let Some(accounts) = resources::find("", "v1", "serviceaccounts") else {
        return Err(ApiError::internal("there is no serviceaccounts resource"));
    };
    let (found, _) = shared
        .store
        .get(&accounts.key(&namespace, &name))
        .await
        .map_err(|error| store_error(&error))?;
    let Some(found) = found else {
        let why = format!(
            "error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"
        );
        return Err(ApiError::refused("", "pods", &pod_name, &why));
    };
    let account = parse(&found.value)?;
    pod["spec"]["serviceAccountName"] = json!(name);
    pod["spec"]["serviceAccount"] = json!(name);
    let automount = pod["spec"]["automountServiceAccountToken"]
        .as_bool()
        .or(account["automountServiceAccountToken"].as_bool())
        .unwrap_or(true);
    if automount {
        mount_token(pod);
    }
    Ok(())
}

/// Adds the projected volume with token, authority and namespace, and mounts it into every container that has
/// nothing there.
fn mount_token(pod: &mut Value) {
    let volume = names::generate_name("kube-api-access-");
    let mut used = false;
    for list in ["initContainers", "containers"] {
        let containers = pod["spec"].get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            let mounted = container["volumeMounts"]
                .as_array()
                .is_some_and(|mounts| mounts.iter().any(|mount| mount["mountPath"] == TOKEN_PATH));
            if mounted {
                continue;
            }
            if !container["volumeMounts"].is_array() {
                container["volumeMounts"] = json!([]);
            }
            if let Some(mounts) = container["volumeMounts"].as_array_mut() {
                mounts.push(json!({ "name": volume, "readOnly": true, "mountPath": TOKEN_PATH }));
                used = true;
            }
        }
    }
    if !used {
        return;
    }
    if !pod["spec"]["volumes"].is_array() {
        pod["spec"]["volumes"] = json!([]);
    }
    if let Some(volumes) = pod["spec"]["volumes"].as_array_mut() {
        volumes.push(json!({
            "name": volume,
            "projected": { "defaultMode": 0o644, "sources": [
                { "serviceAccountToken": { "expirationSeconds": TOKEN_SECONDS, "path": "token" } },
                { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
                { "downwardAPI": { "items": [{ "path": "namespace",
                    "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" } }] } },
            ] },
        }));
    }
}

fn default_tolerations(pod: &mut Value) {
    let spec = &mut pod["spec"];
    if !spec["tolerations"].is_array() {
        spec["tolerations"] = json!([]);
    }
    let Some(list) = spec["tolerations"].as_array_mut() else { return };
    for key in [taint::NOT_READY, taint::UNREACHABLE] {
        let covered = list.iter().any(|toleration| {
            let effect = toleration["effect"].as_str().unwrap_or_default();
            let own = toleration["key"].as_str().unwrap_or_default();
            (own == key || own.is_empty()) && (effect.is_empty() || effect == "NoExecute")
        });
        if !covered {
            list.push(json!({ "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_gets_its_token_once() {
        let mut pod = json!({ "spec": { "containers": [{ "name": "a" }, { "name": "b",
            "volumeMounts": [{ "name": "own", "mountPath": TOKEN_PATH }] }] } });
        mount_token(&mut pod);
        assert_eq!(pod["spec"]["volumes"].as_array().map(Vec::len), Some(1));
        assert!(pod["spec"].get("initContainers").is_none(), "nothing else is added");
        assert_eq!(pod["spec"]["containers"][0]["volumeMounts"][0]["mountPath"], TOKEN_PATH);
        assert_eq!(pod["spec"]["containers"][1]["volumeMounts"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn tolerations_are_added_unless_they_are_there() {
        let mut pod = json!({ "spec": { "tolerations": [{ "key": taint::NOT_READY, "operator": "Exists" }] } });
        default_tolerations(&mut pod);
        assert_eq!(pod["spec"]["tolerations"].as_array().map(Vec::len), Some(2));
        let once = pod.clone();
        default_tolerations(&mut pod);
        assert_eq!(pod, once);
    }
}
