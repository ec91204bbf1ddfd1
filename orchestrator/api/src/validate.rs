//! Validation of objects, with upstream's messages for what people get wrong.
//!
//! Works on JSON after [`crate::defaults`]; types were checked before. Each kind has a module; this one has what
//! all share.

mod pod;
mod service;
mod workload;

use serde_json::Value;

use crate::names;
use crate::status::FieldError;

/// Upper bound of all annotations of an object together.
const ANNOTATIONS_LIMIT_BYTES: usize = 256 * 1024;
/// Upper bound of the data of a ConfigMap or Secret.
const DATA_LIMIT_BYTES: usize = 1024 * 1024;

/// What is wrong with a new object.
#[must_use]
pub fn create(group: &str, kind: &str, object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    metadata(group, kind, &object["metadata"], &mut errors);
    kind_rules(group, kind, object, &mut errors);
    errors
}

/// What is wrong with a change.
#[must_use]
pub fn update(group: &str, kind: &str, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    metadata(group, kind, &new["metadata"], &mut errors);
    match (group, kind) {
        ("", "Pod") => pod::update(new, old, &mut errors),
        ("apps", "Deployment" | "ReplicaSet") => {
            immutable(
                "spec.selector",
                &new["spec"]["selector"],
                &old["spec"]["selector"],
                &mut errors,
            );
            kind_rules(group, kind, new, &mut errors);
        }
        ("", "Service") => {
            service::update(new, old, &mut errors);
            kind_rules(group, kind, new, &mut errors);
        }
        ("", "ConfigMap" | "Secret") => {
            if old["immutable"] == true {
                for field in ["immutable", "data", "binaryData", "stringData"] {
                    if new[field] != old[field] && field != "stringData" {
                        errors.push(FieldError::forbidden(
                            field,
                            "field is immutable when `immutable` is set",
                        ));
                    }
                }
            }
            if kind == "Secret" {
                immutable("type", &new["type"], &old["type"], &mut errors);
            }
            kind_rules(group, kind, new, &mut errors);
        }
        ("discovery.k8s.io", "EndpointSlice") => {
            immutable("addressType", &new["addressType"], &old["addressType"], &mut errors);
            kind_rules(group, kind, new, &mut errors);
        }
        _ => kind_rules(group, kind, new, &mut errors),
    }
    errors
}

fn kind_rules(group: &str, kind: &str, object: &Value, errors: &mut Vec<FieldError>) {
    match (group, kind) {
        ("", "Pod") => pod::spec(&object["spec"], "spec", errors),
        ("apps", "Deployment") => workload::deployment(object, errors),
        ("apps", "ReplicaSet") => workload::replica_set(object, errors),
        ("", "Service") => service::service(object, errors),
        ("", "ConfigMap") => data(object, &["data", "binaryData"], errors),
        ("", "Secret") => data(object, &["data"], errors),
        ("discovery.k8s.io", "EndpointSlice") => service::endpoint_slice(object, errors),
        ("coordination.k8s.io", "Lease") => {
            if object["spec"]["leaseDurationSeconds"].as_i64().is_some_and(|seconds| seconds <= 0) {
                errors.push(FieldError::invalid(
                    "spec.leaseDurationSeconds",
                    &object["spec"]["leaseDurationSeconds"],
                    "must be greater than 0",
                ));
            }
        }
        ("networking.k8s.io", "NetworkPolicy") => workload::network_policy(object, errors),
        _ => {}
    }
}

fn immutable(field: &str, new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    if new != old {
        errors.push(FieldError::invalid(field, new, "field is immutable"));
    }
}

fn metadata(group: &str, kind: &str, meta: &Value, errors: &mut Vec<FieldError>) {
    let name = meta["name"].as_str().unwrap_or_default();
    if name.is_empty() {
        errors.push(FieldError::required("metadata.name", "name or generateName is required"));
    } else {
        let check = match (group, kind) {
            ("", "Namespace") => names::is_dns1123_label(name),
            ("", "Service") => names::is_dns1035_label(name),
            _ => names::is_dns1123_subdomain(name),
        };
        if let Err(why) = check {
            errors.push(FieldError::invalid("metadata.name", &meta["name"], why));
        }
    }
    for (key, value) in meta["labels"].as_object().into_iter().flatten() {
        label(key, value, "metadata.labels", errors);
    }
    let mut size = 0;
    for (key, value) in meta["annotations"].as_object().into_iter().flatten() {
        if let Err(why) = names::is_qualified_name(&key.to_lowercase()) {
            errors.push(FieldError::invalid(
                "metadata.annotations",
                &Value::String(key.clone()),
                why,
            ));
        }
        size += key.len() + value.as_str().map_or(0, str::len);
    }
    if size > ANNOTATIONS_LIMIT_BYTES {
        errors.push(FieldError {
            field: "metadata.annotations".to_owned(),
            kind: crate::status::FieldErrorKind::TooLong,
            detail: format!("may not be more than {ANNOTATIONS_LIMIT_BYTES} bytes"),
        });
    }
    for (index, owner) in meta["ownerReferences"].as_array().into_iter().flatten().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner[field].as_str().is_none_or(str::is_empty) {
                let path = format!("metadata.ownerReferences[{index}].{field}");
                errors.push(FieldError::invalid(
                    path,
                    &owner[field],
                    format!("{field} must not be empty"),
                ));
            }
        }
    }
    let controllers = meta["ownerReferences"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|o| o["controller"] == true);
    if controllers.count() > 1 {
        let detail = "Only one reference can have Controller set to true";
        errors.push(FieldError::invalid(
            "metadata.ownerReferences",
            &meta["ownerReferences"],
            detail,
        ));
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

fn data(object: &Value, fields: &[&str], errors: &mut Vec<FieldError>) {
    let mut size = 0;
    for field in fields {
        for (key, value) in object[*field].as_object().into_iter().flatten() {
            let good = !key.is_empty()
                && key.len() <= 253
                && key != "."
                && key != ".."
                && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
            if !good {
                errors.push(FieldError::invalid(
                    format!("{field}[{key}]"),
                    &Value::String(key.clone()),
                    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
                ));
            }
            size += value.as_str().map_or(0, str::len);
        }
    }
    if size > DATA_LIMIT_BYTES {
        errors.push(FieldError {
            field: String::new(),
            kind: crate::status::FieldErrorKind::TooLong,
            detail: format!("may not be more than {DATA_LIMIT_BYTES} bytes"),
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn texts(errors: &[FieldError]) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_good_pod_passes_and_common_mistakes_are_named() {
        let mut pod = json!({ "metadata": { "name": "a" }, "spec": { "containers": [{ "name": "a", "image": "web:v1" }] } });
        crate::defaults::apply("", "Pod", &mut pod);
        assert_eq!(create("", "Pod", &pod), []);

        let mut bad = json!({ "metadata": { "name": "A_b", "labels": { "x": "a b" } }, "spec": {
            "restartPolicy": "Sometimes",
            "containers": [
                { "name": "a", "image": "", "ports": [{ "containerPort": 70000 }],
                  "resources": { "requests": { "cpu": "2" }, "limits": { "cpu": "1" } },
                  "volumeMounts": [{ "name": "none", "mountPath": "/x" }] },
                { "name": "a", "image": "two words" },
            ],
        } });
        crate::defaults::apply("", "Pod", &mut bad);
        let found = texts(&create("", "Pod", &bad)).join("\n");
        for expected in [
            "metadata.name: Invalid value: \"A_b\"",
            "metadata.labels: Invalid value: \"a b\"",
            "spec.containers[0].image: Required value",
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
            "spec.containers[0].volumeMounts[0].name: Not found: \"none\"",
            "spec.containers[1].name: Duplicate value: \"a\"",
            "spec.restartPolicy: Unsupported value: \"Sometimes\"",
        ] {
            assert!(found.contains(expected), "{expected}\nis not in\n{found}");
        }
    }

    #[test]
    fn a_selector_must_match_its_template_and_stay() {
        let deployment = |label: &str| {
            let mut object = json!({ "metadata": { "name": "a" }, "spec": {
                "selector": { "matchLabels": { "app": "web" } },
                "template": { "metadata": { "labels": { "app": label } },
                              "spec": { "containers": [{ "name": "a", "image": "web:v1" }] } },
            } });
            crate::defaults::apply("apps", "Deployment", &mut object);
            object
        };
        assert_eq!(create("apps", "Deployment", &deployment("web")), []);
        let found = texts(&create("apps", "Deployment", &deployment("db")));
        assert!(found[0].contains("`selector` does not match template `labels`"), "{found:?}");
        let mut changed = deployment("web");
        changed["spec"]["selector"]["matchLabels"]["app"] = json!("other");
        let found = texts(&update("apps", "Deployment", &changed, &deployment("web")));
        assert!(found.iter().any(|text| text.contains("field is immutable")), "{found:?}");
    }

    #[test]
    fn of_a_running_pod_only_few_fields_may_change() {
        let old = json!({ "metadata": { "name": "a" }, "spec": { "containers": [{ "name": "a", "image": "web:v1" }] } });
        let mut image = old.clone();
        image["spec"]["containers"][0]["image"] = json!("web:v2");
        assert_eq!(update("", "Pod", &image, &old), []);
        let mut command = old.clone();
        command["spec"]["containers"][0]["command"] = json!(["x"]);
        assert!(
            texts(&update("", "Pod", &command, &old))[0]
                .contains("pod updates may not change fields other than")
        );
    }

    #[test]
    fn a_service_needs_good_ports() {
        let mut service = json!({ "metadata": { "name": "1web" }, "spec": { "ports": [{ "port": 0 }, { "port": 80 }] } });
        crate::defaults::apply("", "Service", &mut service);
        let found = texts(&create("", "Service", &service)).join("\n");
        for expected in [
            "metadata.name",
            "spec.ports[0].port: Invalid value: 0",
            "spec.ports[0].name: Required value",
        ] {
            assert!(found.contains(expected), "{found}");
        }
    }
}
