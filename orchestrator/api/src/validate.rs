//! Validation of objects, with upstream's messages for what people get wrong.
//!
//! Works on JSON after [`crate::defaults`]; types were checked before. Each kind has a module; this one has what
//! all share.

mod cluster;
mod cluster_policy;
mod config;
mod network;
mod pod;
mod rbac;
mod service;
mod workload;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;

use crate::status::{FieldError, FieldErrorKind};
use crate::{Selector, names, priority};

/// Upper bound of all annotations of an object together.
const ANNOTATIONS_LIMIT_BYTES: usize = 256 * 1024;

/// What is wrong with a new object.
#[must_use]
pub fn create(group: &str, kind: &str, object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    metadata(group, kind, &object["metadata"], &mut errors);
    kind_rules(group, kind, object, &Value::Null, &mut errors);
    if (group, kind) == ("", "Pod") && items(&object["spec"]["ephemeralContainers"]).count() > 0 {
        errors.push(FieldError::forbidden("spec.ephemeralContainers", "cannot be set on create"));
    }
    errors
}

/// What is wrong with a change of a pod by its subresource `ephemeralContainers`.
#[must_use]
pub fn ephemeral_containers(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    pod::ephemeral_containers(new, old, &mut errors);
    errors
}

/// What is wrong with a change.
#[must_use]
pub fn update(group: &str, kind: &str, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    metadata(group, kind, &new["metadata"], &mut errors);
    no_new_finalizers(&new["metadata"], &old["metadata"], &mut errors);
    match (group, kind) {
        // Few fields may change, and those are checked there; old pods need not follow new rules.
        ("", "Pod") => {
            pod::update(new, old, &mut errors);
            return errors;
        }
        ("apps", "Deployment" | "ReplicaSet") => {
            immutable(
                "spec.selector",
                &new["spec"]["selector"],
                &old["spec"]["selector"],
                &mut errors,
            );
        }
        ("", "Service") => service::update(new, old, &mut errors),
        ("", "ConfigMap" | "Secret") => config::update(kind, new, old, &mut errors),
        ("", "Node") => cluster::node_update(new, old, &mut errors),
        (priority::GROUP, "PriorityClass") => {
            cluster::priority_class_update(new, old, &mut errors);
        }
        (rbac::GROUP, "RoleBinding" | "ClusterRoleBinding") => rbac::update(new, old, &mut errors),
        ("discovery.k8s.io", "EndpointSlice") => {
            immutable("addressType", &new["addressType"], &old["addressType"], &mut errors);
        }
        _ => {}
    }
    kind_rules(group, kind, new, old, &mut errors);
    errors
}

/// `old` is null for a new object.
fn kind_rules(group: &str, kind: &str, object: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    match (group, kind) {
        ("", "Pod") => pod::spec(&object["spec"], "spec", errors),
        ("apps", "Deployment") => workload::deployment(object, errors),
        ("apps", "ReplicaSet") => workload::replica_set(object, errors),
        ("", "Service") => service::service(object, old, errors),
        ("", "ConfigMap") => config::config_map(object, errors),
        ("", "Secret") => config::secret(object, errors),
        ("", "Node") => cluster::node(object, errors),
        ("", "Event") => cluster::event(object, errors),
        ("", "Endpoints") => network::endpoints(object, errors),
        ("discovery.k8s.io", "EndpointSlice") => network::endpoint_slice(object, errors),
        ("coordination.k8s.io", "Lease") => cluster::lease(object, errors),
        (priority::GROUP, "PriorityClass") => cluster::priority_class(object, errors),
        ("networking.k8s.io", "NetworkPolicy") => network::network_policy(object, errors),
        (crate::cluster_policy::GROUP, "ClusterNetworkPolicy") => {
            cluster_policy::policy(object, errors);
        }
        (rbac::GROUP, kind) => rbac::rules(kind, object, errors),
        _ => {}
    }
}

/// The items of a list with their places; nothing for what is no list.
fn items(list: &Value) -> impl Iterator<Item = (usize, &Value)> {
    list.as_array().into_iter().flatten().enumerate()
}

fn immutable(field: &str, new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    if new != old {
        errors.push(FieldError::invalid(field, new, "field is immutable"));
    }
}

fn one_of(value: &Value, field: &str, allowed: &[&str], errors: &mut Vec<FieldError>) {
    if let Some(text) = value.as_str()
        && !allowed.contains(&text)
    {
        errors.push(FieldError::not_supported(field, value, allowed));
    }
}

fn at_least(least: i64, value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    if value.as_i64().is_some_and(|number| number < least) {
        errors.push(FieldError::invalid(
            field,
            value,
            format!("must be greater than or equal to {least}"),
        ));
    }
}

fn too_long(field: &str, limit_bytes: usize) -> FieldError {
    let detail = format!("may not be more than {limit_bytes} bytes");
    FieldError { field: field.to_owned(), kind: FieldErrorKind::TooLong, detail }
}

fn metadata(group: &str, kind: &str, meta: &Value, errors: &mut Vec<FieldError>) {
    let name = meta["name"].as_str().unwrap_or_default();
    if name.is_empty() {
        errors.push(FieldError::required("metadata.name", "name or generateName is required"));
    } else {
        let check = match (group, kind) {
            ("", "Namespace") => names::is_dns1123_label(name),
            ("", "Service") => names::is_dns1035_label(name),
            (rbac::GROUP, _) => names::is_path_segment(name),
            _ => names::is_dns1123_subdomain(name),
        };
        if let Err(why) = check {
            errors.push(FieldError::invalid("metadata.name", &meta["name"], why));
        }
    }
    labels(&meta["labels"], "metadata.labels", errors);
    annotations(&meta["annotations"], "metadata.annotations", errors);
    owners(&meta["ownerReferences"], errors);
    for (index, finalizer) in items(&meta["finalizers"]) {
        if let Err(why) = names::is_qualified_name(finalizer.as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid(
                format!("metadata.finalizers[{index}]"),
                finalizer,
                why,
            ));
        }
    }
}

/// Who deletes an object has to see its end: nobody may hold it who did not hold it before.
fn no_new_finalizers(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    if !old["deletionTimestamp"].is_string() {
        return;
    }
    let has = |wanted: &Value| items(&old["finalizers"]).any(|(_, found)| found == wanted);
    let added: Vec<String> = items(&new["finalizers"])
        .filter(|(_, finalizer)| !has(finalizer))
        .map(|(_, finalizer)| finalizer.to_string())
        .collect();
    if !added.is_empty() {
        let detail = format!(
            "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
            added.join(", ")
        );
        errors.push(FieldError::forbidden("metadata.finalizers", detail));
    }
}

fn owners(list: &Value, errors: &mut Vec<FieldError>) {
    let mut managing = Vec::new();
    for (index, owner) in items(list) {
        for (field, empty) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            if owner[field].as_str().is_none_or(str::is_empty) {
                let path = format!("metadata.ownerReferences[{index}].{field}");
                errors.push(FieldError::invalid(path, &Value::String(String::new()), empty));
            }
        }
        if owner["controller"] == true {
            managing.push(owner);
        }
    }
    if let [first, second, ..] = managing.as_slice() {
        let text = |owner: &Value, key: &str| owner[key].as_str().unwrap_or_default().to_owned();
        let detail = format!(
            "Only one reference can have Controller set to true. Found \"true\" in references for {}/{} and {}/{}",
            text(first, "kind"),
            text(first, "name"),
            text(second, "kind"),
            text(second, "name")
        );
        errors.push(FieldError::invalid("metadata.ownerReferences", list, detail));
    }
}

fn annotations(map: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let mut size = 0;
    for (key, value) in map.as_object().into_iter().flatten() {
        // Capitals are allowed in the prefix too, for the sake of old annotations.
        if let Err(why) = names::is_qualified_name(&key.to_lowercase()) {
            errors.push(FieldError::invalid(path, &Value::String(key.clone()), why));
        }
        size += key.len() + value.as_str().map_or(0, str::len);
    }
    if size > ANNOTATIONS_LIMIT_BYTES {
        errors.push(too_long(path, ANNOTATIONS_LIMIT_BYTES));
    }
}

fn labels(map: &Value, path: &str, errors: &mut Vec<FieldError>) {
    for (key, value) in map.as_object().into_iter().flatten() {
        label(key, value, path, errors);
    }
}

fn label(key: &str, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    if let Err(why) = names::is_qualified_name(key) {
        errors.push(FieldError::invalid(path, &Value::String(key.to_owned()), why));
    }
    if let Err(why) = names::is_label_value(value.as_str().unwrap_or_default()) {
        errors.push(FieldError::invalid(path, value, why));
    }
}

/// Checks a label selector, and reads it if it is good.
fn label_selector(value: &Value, field: &str, errors: &mut Vec<FieldError>) -> Option<Selector> {
    let before = errors.len();
    labels(&value["matchLabels"], &format!("{field}.matchLabels"), errors);
    for (index, expression) in items(&value["matchExpressions"]) {
        let at = format!("{field}.matchExpressions[{index}]");
        let values = expression["values"].as_array().map_or(0, Vec::len);
        match expression["operator"].as_str().unwrap_or_default() {
            "In" | "NotIn" if values == 0 => {
                let detail = "must be specified when `operator` is 'In' or 'NotIn'";
                errors.push(FieldError::required(format!("{at}.values"), detail));
            }
            "Exists" | "DoesNotExist" if values > 0 => {
                let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                errors.push(FieldError::forbidden(format!("{at}.values"), detail));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => {
                let detail = "not a valid selector operator";
                errors.push(FieldError::invalid(
                    format!("{at}.operator"),
                    &expression["operator"],
                    detail,
                ));
            }
        }
        if let Err(why) = names::is_qualified_name(expression["key"].as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid(format!("{at}.key"), &expression["key"], why));
        }
        for (place, value) in items(&expression["values"]) {
            if let Err(why) = names::is_label_value(value.as_str().unwrap_or_default()) {
                errors.push(FieldError::invalid(format!("{at}.values[{place}]"), value, why));
            }
        }
    }
    if errors.len() > before {
        return None;
    }
    match serde_json::from_value::<LabelSelector>(value.clone()) {
        Ok(selector) => Selector::from_label_selector(&selector).ok(),
        Err(error) => {
            errors.push(FieldError::invalid(field, value, error.to_string()));
            None
        }
    }
}

#[cfg(test)]
mod tests;
