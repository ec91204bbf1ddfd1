//! What differs between kinds when objects are written: what a client may not set, how spec and status are kept
//! apart, what is filled in.

use jiff::Timestamp;
use orch_api::{ApiError, names};
use serde_json::{Map, Value, json};

use crate::resources::Resource;

/// Fields of the metadata that only the server sets.
const SYSTEM_FIELDS: [&str; 7] = [
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "namespace",
    "name",
];

/// Now, in seconds, as API objects carry it.
pub(crate) fn now() -> Value {
    json!(Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

fn remove(object: &mut Value, key: &str) {
    if let Some(map) = object.as_object_mut() {
        map.shift_remove(key);
    }
}

fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    match object["metadata"].as_object_mut() {
        Some(map) => map,
        None => unreachable!("an object was put there just now"),
    }
}

/// Makes a client's object one that can be stored as new.
///
/// # Errors
/// Namespace or name do not agree with the URL, or are missing.
pub(crate) fn prepare_create(
    resource: &Resource,
    namespace: &str,
    object: &mut Value,
) -> Result<(), ApiError> {
    let meta = metadata(object);
    let text = |meta: &Map<String, Value>, key: &str| {
        meta.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    if !text(meta, "resourceVersion").is_empty() {
        return Err(ApiError::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    if resource.namespaced {
        let found = text(meta, "namespace");
        if !found.is_empty() && found != namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        meta.insert("namespace".to_owned(), json!(namespace));
    } else {
        meta.shift_remove("namespace");
    }
    let (name, base) = (text(meta, "name"), text(meta, "generateName"));
    if name.is_empty() && !base.is_empty() {
        meta.insert("name".to_owned(), json!(names::generate_name(&base)));
    }
    for key in [
        "resourceVersion",
        "selfLink",
        "managedFields",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
    ] {
        meta.shift_remove(key);
    }
    meta.insert("uid".to_owned(), json!(uuid::Uuid::new_v4().to_string()));
    meta.insert("creationTimestamp".to_owned(), now());
    if resource.generation {
        meta.insert("generation".to_owned(), json!(1));
    }
    if resource.status && resource.plural != "nodes" {
        remove(object, "status");
    }
    match (resource.group, resource.plural) {
        ("", "pods") => {
            let class = pod_qos(object);
            object["status"] = json!({ "phase": "Pending", "qosClass": class });
        }
        ("", "namespaces") => {
            object["spec"] = json!({ "finalizers": ["kubernetes"] });
            object["status"] = json!({ "phase": "Active" });
        }
        ("", "services") => object["status"] = json!({ "loadBalancer": {} }),
        ("", "secrets") => encode_string_data(object),
        ("apps", _) => object["status"] = json!({}),
        _ => {}
    }
    Ok(())
}

/// `stringData` of a Secret is written into `data`, encoded.
fn encode_string_data(object: &mut Value) {
    use base64::Engine as _;
    let Some(strings) = object["stringData"].as_object().cloned() else {
        remove(object, "stringData");
        return;
    };
    if !object["data"].is_object() {
        object["data"] = json!({});
    }
    for (key, value) in strings {
        let encoded =
            base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or_default());
        object["data"][key] = json!(encoded);
    }
    remove(object, "stringData");
}

fn pod_qos(object: &Value) -> &'static str {
    serde_json::from_value(object["spec"].clone())
        .map_or("BestEffort", |spec| orch_api::pod::qos_class(&spec))
}

/// Part of an object that a write is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// All but the status.
    Main,
    /// Only the status.
    Status,
    /// Only a pod's containers for debugging.
    Ephemeral,
    /// The server's own change (binding, finalize): all as given.
    All,
}

/// Makes a client's change of `old` one that can be stored: system fields stay, spec and status keep apart, the
/// generation counts changes of the spec.
pub(crate) fn prepare_update(resource: &Resource, part: Part, old: &Value, new: &mut Value) {
    if part == Part::Status {
        let status = new["status"].take();
        let requested = new["metadata"].take();
        *new = old.clone();
        new["status"] = status;
        // Who writes a status may note something beside it; only a Deployment's labels are none of its business.
        for key in ["labels", "annotations"] {
            if (resource.plural, key) == ("deployments", "labels") {
                continue;
            }
            match requested.get(key).filter(|map| map.is_object()) {
                Some(map) => new["metadata"][key] = map.clone(),
                None => {
                    metadata(new).shift_remove(key);
                }
            }
        }
        return;
    }
    if part == Part::Ephemeral {
        let containers = new["spec"]["ephemeralContainers"].take();
        *new = old.clone();
        new["spec"]["ephemeralContainers"] = containers;
        if new["spec"]["ephemeralContainers"] != old["spec"]["ephemeralContainers"] {
            let generation = old["metadata"]["generation"].as_i64().unwrap_or(1) + 1;
            new["metadata"]["generation"] = json!(generation);
        }
        return;
    }
    let meta = metadata(new);
    for key in ["resourceVersion", "selfLink", "managedFields"] {
        meta.shift_remove(key);
    }
    for key in SYSTEM_FIELDS {
        match old["metadata"].get(key) {
            Some(value) => {
                meta.insert(key.to_owned(), value.clone());
            }
            None => {
                meta.shift_remove(key);
            }
        }
    }
    if part == Part::Main && resource.status {
        match old.get("status") {
            Some(status) => new["status"] = status.clone(),
            None => remove(new, "status"),
        }
    }
    match (resource.group, resource.plural) {
        ("", "namespaces") if part == Part::Main => new["spec"] = old["spec"].clone(),
        // What was asked for, and by whom, stays what was approved.
        ("certificates.k8s.io", _) => new["spec"] = old["spec"].clone(),
        ("", "secrets") => encode_string_data(new),
        ("", "services") => drop_type_fields(&old["spec"], &mut new["spec"]),
        _ => {}
    }
    if resource.generation && part == Part::Main {
        let changed = if resource.plural == "endpointslices" {
            ["endpoints", "ports", "addressType"].iter().any(|key| new[*key] != old[*key])
        } else {
            new["spec"] != old["spec"]
        };
        if changed {
            let generation = old["metadata"]["generation"].as_i64().unwrap_or(1) + 1;
            new["metadata"]["generation"] = json!(generation);
        }
    }
}

/// Takes away what belongs to the type that a Service had, where a client changed the type alone.
fn drop_type_fields(old: &Value, new: &mut Value) {
    let kind = |spec: &Value| spec["type"].as_str().unwrap_or("ClusterIP").to_owned();
    let (before, after) = (kind(old), kind(new));
    if before == after {
        return;
    }
    let outside = |kind: &str| matches!(kind, "NodePort" | "LoadBalancer");
    let mut gone = Vec::new();
    if outside(&before) && !outside(&after) {
        gone.extend(["externalTrafficPolicy", "healthCheckNodePort"]);
        for port in new["ports"].as_array_mut().into_iter().flatten() {
            remove(port, "nodePort");
        }
    }
    if before == "LoadBalancer" {
        gone.extend(["allocateLoadBalancerNodePorts", "loadBalancerClass"]);
    }
    if after == "ExternalName" {
        gone.push("internalTrafficPolicy");
    }
    if before == "ExternalName" {
        gone.push("externalName");
    }
    for field in gone {
        if new[field] == old[field] {
            remove(new, field);
        }
    }
}

/// Removes fields that are null: nobody can tell them from absent ones, and clients send both.
pub(crate) fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Whether nothing keeps an object whose deletion was asked for.
pub(crate) fn is_released(object: &Value) -> bool {
    let empty = |list: &Value| list.as_array().is_none_or(Vec::is_empty);
    let meta = &object["metadata"];
    meta["deletionTimestamp"].is_string()
        && empty(&meta["finalizers"])
        && meta["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
        && (object["kind"] != "Namespace" || empty(&object["spec"]["finalizers"]))
}

/// Seconds a pod is given to end; other kinds end at once.
pub(crate) fn grace_seconds(resource: &Resource, object: &Value, asked: Option<i64>) -> i64 {
    if (resource.group, resource.plural) != ("", "pods") {
        return 0;
    }
    let scheduled = object["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty());
    let ended = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if !scheduled || ended {
        return 0;
    }
    let wanted = asked.or(object["spec"]["terminationGracePeriodSeconds"].as_i64()).unwrap_or(30);
    // A negative number means "quickly", which is not "by force".
    if wanted < 0 { 1 } else { wanted }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::find;

    #[test]
    fn a_client_cannot_set_what_is_the_servers() {
        let pods = find("", "v1", "pods").expect("pods");
        let mut pod = json!({ "metadata": { "generateName": "web-", "uid": "mine", "generation": 9 },
                              "spec": {}, "status": { "phase": "Running" } });
        prepare_create(pods, "shop", &mut pod).expect("prepared");
        assert_eq!(pod["status"]["phase"], "Pending");
        assert_eq!(
            (&pod["metadata"]["namespace"], &pod["metadata"]["generation"]),
            (&json!("shop"), &json!(1))
        );
        assert_ne!(pod["metadata"]["uid"], "mine");
        assert!(pod["metadata"]["name"].as_str().is_some_and(|name| name.len() == 9));
        assert!(prepare_create(pods, "other", &mut pod).is_err());
    }

    #[test]
    fn spec_and_status_are_kept_apart_and_generation_counts_the_spec() {
        let deployments = find("apps", "v1", "deployments").expect("deployments");
        let old = json!({ "metadata": { "name": "a", "uid": "u", "generation": 1 }, "spec": { "replicas": 1 }, "status": { "replicas": 1 } });
        let mut new = json!({ "metadata": { "name": "b", "labels": { "x": "y" } }, "spec": { "replicas": 2 }, "status": { "replicas": 7 } });
        prepare_update(deployments, Part::Main, &old, &mut new);
        assert_eq!(new["status"]["replicas"], 1);
        assert_eq!(
            new["metadata"],
            json!({ "labels": { "x": "y" }, "uid": "u", "generation": 2, "name": "a" })
        );
        let mut status = json!({ "metadata": { "name": "a" }, "spec": { "replicas": 5 }, "status": { "replicas": 5 } });
        prepare_update(deployments, Part::Status, &old, &mut status);
        assert_eq!(
            (&status["spec"]["replicas"], &status["status"]["replicas"]),
            (&json!(1), &json!(5))
        );
        assert_eq!(status["metadata"]["generation"], 1);
    }

    #[test]
    fn a_status_may_come_with_notes_beside_it() {
        let services = find("", "v1", "services").expect("services");
        let old = json!({ "metadata": { "name": "a", "labels": { "l": "1" } }, "spec": { "type": "ClusterIP" } });
        let mut new = json!({ "metadata": { "name": "b", "annotations": { "x": "y" } }, "spec": {}, "status": { "s": 1 } });
        prepare_update(services, Part::Status, &old, &mut new);
        let expected = json!({ "metadata": { "name": "a", "annotations": { "x": "y" } },
                               "spec": { "type": "ClusterIP" }, "status": { "s": 1 } });
        assert_eq!(new, expected);
        let deployments = find("apps", "v1", "deployments").expect("deployments");
        let mut new = json!({ "metadata": { "labels": { "l": "2" } }, "status": {} });
        prepare_update(deployments, Part::Status, &old, &mut new);
        assert_eq!(new["metadata"]["labels"], json!({ "l": "1" }));
    }

    #[test]
    fn a_service_of_another_type_loses_what_belonged_to_the_old_one() {
        let services = find("", "v1", "services").expect("services");
        let old = json!({ "metadata": {}, "spec": { "type": "NodePort", "externalTrafficPolicy": "Cluster",
            "internalTrafficPolicy": "Cluster", "ports": [{ "port": 80, "nodePort": 30080 }] } });
        let mut new = old.clone();
        new["spec"]["type"] = json!("ExternalName");
        new["spec"]["externalName"] = json!("a.b");
        let mut named = new.clone();
        prepare_update(services, Part::Main, &old, &mut named);
        let expected =
            json!({ "type": "ExternalName", "externalName": "a.b", "ports": [{ "port": 80 }] });
        assert_eq!(named["spec"], expected);
        let mut back = named.clone();
        back["spec"]["type"] = json!("ClusterIP");
        prepare_update(services, Part::Main, &named, &mut back);
        assert_eq!(back["spec"], json!({ "type": "ClusterIP", "ports": [{ "port": 80 }] }));
    }

    #[test]
    fn grace_is_for_running_pods_only() {
        let pods = find("", "v1", "pods").expect("pods");
        let pod = json!({ "spec": { "nodeName": "a", "terminationGracePeriodSeconds": 7 }, "status": { "phase": "Running" } });
        assert_eq!(grace_seconds(pods, &pod, None), 7);
        assert_eq!(grace_seconds(pods, &pod, Some(0)), 0);
        assert_eq!(grace_seconds(pods, &pod, Some(-1)), 1, "negative is quick, not by force");
        assert_eq!(grace_seconds(pods, &json!({ "spec": {} }), None), 0);
    }
}
