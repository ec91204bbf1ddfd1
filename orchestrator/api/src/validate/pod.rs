//! Rules of pod specs, in pods and in templates.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::status::FieldError;
use crate::{Quantity, names};

/// Checks a pod spec at `path`.
pub(super) fn spec(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let restart = ["Always", "OnFailure", "Never"];
    one_of(&spec["restartPolicy"], &format!("{path}.restartPolicy"), &restart, errors);
    let dns = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    one_of(&spec["dnsPolicy"], &format!("{path}.dnsPolicy"), &dns, errors);
    if spec["terminationGracePeriodSeconds"].as_i64().is_some_and(|seconds| seconds < 0) {
        let field = format!("{path}.terminationGracePeriodSeconds");
        errors.push(FieldError::invalid(
            field,
            &spec["terminationGracePeriodSeconds"],
            "must be greater than or equal to 0",
        ));
    }
    let volumes = volumes(spec, path, errors);
    let containers = spec["containers"].as_array().map_or(&[][..], Vec::as_slice);
    if containers.is_empty() {
        errors.push(FieldError::required(format!("{path}.containers"), ""));
    }
    let mut seen = BTreeSet::new();
    for list in ["initContainers", "containers"] {
        for (index, item) in spec[list].as_array().into_iter().flatten().enumerate() {
            let at = format!("{path}.{list}[{index}]");
            let name = item["name"].as_str().unwrap_or_default();
            if name.is_empty() {
                errors.push(FieldError::required(format!("{at}.name"), ""));
            } else if let Err(why) = names::is_dns1123_label(name) {
                errors.push(FieldError::invalid(format!("{at}.name"), &item["name"], why));
            } else if !seen.insert(name.to_owned()) {
                errors.push(FieldError::duplicate(format!("{at}.name"), &item["name"]));
            }
            container(item, &at, &volumes, errors);
            if list == "initContainers" && item["restartPolicy"].is_null() {
                for probe in ["livenessProbe", "readinessProbe", "startupProbe", "lifecycle"] {
                    if !item[probe].is_null() {
                        errors.push(FieldError::forbidden(
                            format!("{at}.{probe}"),
                            "may not be set for init containers without restartPolicy=Always",
                        ));
                    }
                }
            }
        }
    }
    for (index, toleration) in spec["tolerations"].as_array().into_iter().flatten().enumerate() {
        let at = format!("{path}.tolerations[{index}]");
        if !toleration["operator"].is_null() {
            one_of(
                &toleration["operator"],
                &format!("{at}.operator"),
                &["Equal", "Exists"],
                errors,
            );
        }
        if toleration["operator"] == "Exists"
            && toleration["value"].as_str().is_some_and(|value| !value.is_empty())
        {
            errors.push(FieldError::invalid(
                format!("{at}.operator"),
                toleration,
                "value must be empty when `operator` is 'Exists'",
            ));
        }
    }
    for (key, value) in spec["nodeSelector"].as_object().into_iter().flatten() {
        super::label(key, value, &format!("{path}.nodeSelector"), errors);
    }
}

fn one_of(value: &Value, field: &str, allowed: &[&str], errors: &mut Vec<FieldError>) {
    if let Some(text) = value.as_str()
        && !allowed.contains(&text)
    {
        errors.push(FieldError::not_supported(field, value, allowed));
    }
}

fn volumes(spec: &Value, path: &str, errors: &mut Vec<FieldError>) -> BTreeSet<String> {
    let mut names_seen = BTreeSet::new();
    for (index, volume) in spec["volumes"].as_array().into_iter().flatten().enumerate() {
        let at = format!("{path}.volumes[{index}]");
        let name = volume["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.push(FieldError::required(format!("{at}.name"), ""));
        } else if let Err(why) = names::is_dns1123_label(name) {
            errors.push(FieldError::invalid(format!("{at}.name"), &volume["name"], why));
        } else if !names_seen.insert(name.to_owned()) {
            errors.push(FieldError::duplicate(format!("{at}.name"), &volume["name"]));
        }
        let sources = volume.as_object().map_or(0, |map| {
            map.iter().filter(|(key, value)| *key != "name" && !value.is_null()).count()
        });
        if sources > 1 {
            errors
                .push(FieldError::forbidden(at.clone(), "may not specify more than 1 volume type"));
        }
        if volume["hostPath"].is_object()
            && volume["hostPath"]["path"].as_str().is_none_or(str::is_empty)
        {
            errors.push(FieldError::required(format!("{at}.hostPath.path"), ""));
        }
    }
    names_seen
}

fn container(
    container: &Value,
    at: &str,
    volumes: &BTreeSet<String>,
    errors: &mut Vec<FieldError>,
) {
    let image = container["image"].as_str().unwrap_or_default();
    if image.is_empty() {
        errors.push(FieldError::required(format!("{at}.image"), ""));
    } else if image.trim() != image {
        errors.push(FieldError::invalid(
            format!("{at}.image"),
            &container["image"],
            "must not have leading or trailing whitespace",
        ));
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    one_of(&container["imagePullPolicy"], &format!("{at}.imagePullPolicy"), &policies, errors);
    let mut port_names = BTreeSet::new();
    for (index, port) in container["ports"].as_array().into_iter().flatten().enumerate() {
        let field = |name: &str| format!("{at}.ports[{index}].{name}");
        port_number(&port["containerPort"], &field("containerPort"), errors);
        if port["hostPort"].as_i64().unwrap_or(0) != 0 {
            port_number(&port["hostPort"], &field("hostPort"), errors);
        }
        one_of(&port["protocol"], &field("protocol"), &["SCTP", "TCP", "UDP"], errors);
        if let Some(name) = port["name"].as_str().filter(|name| !name.is_empty()) {
            if name.len() > 15
                || names::is_dns1123_label(name).is_err()
                || !name.bytes().any(|b| b.is_ascii_lowercase())
            {
                errors.push(FieldError::invalid(field("name"), &port["name"], "must be an IANA_SVC_NAME (at most 15 characters, matching regex [a-z0-9]([a-z0-9-]*[a-z0-9])*, it must contain at least one letter [a-z], and hyphens cannot be adjacent to other hyphens): e.g. \"http\""));
            } else if !port_names.insert(name.to_owned()) {
                errors.push(FieldError::duplicate(field("name"), &port["name"]));
            }
        }
    }
    for (index, env) in container["env"].as_array().into_iter().flatten().enumerate() {
        let name = env["name"].as_str().unwrap_or_default();
        let field = format!("{at}.env[{index}].name");
        if name.is_empty() {
            errors.push(FieldError::required(field, ""));
        } else if name.contains('=') || name.chars().any(char::is_control) {
            errors.push(FieldError::invalid(field, &env["name"], "a valid environment variable name must consist only of printable ASCII characters other than '='"));
        }
        if !env["valueFrom"].is_null()
            && env["value"].as_str().is_some_and(|value| !value.is_empty())
        {
            errors.push(FieldError::invalid(
                format!("{at}.env[{index}].valueFrom"),
                &json!(""),
                "may not be specified when `value` is not empty",
            ));
        }
    }
    let mut mounts = BTreeSet::new();
    for (index, mount) in container["volumeMounts"].as_array().into_iter().flatten().enumerate() {
        let field = |name: &str| format!("{at}.volumeMounts[{index}].{name}");
        let name = mount["name"].as_str().unwrap_or_default();
        if !volumes.contains(name) {
            errors.push(FieldError::not_found(field("name"), &mount["name"]));
        }
        let target = mount["mountPath"].as_str().unwrap_or_default();
        if target.is_empty() {
            errors.push(FieldError::required(field("mountPath"), ""));
        } else if !mounts.insert(target.to_owned()) {
            errors.push(FieldError::invalid(
                field("mountPath"),
                &mount["mountPath"],
                "must be unique",
            ));
        }
        if mount["subPath"]
            .as_str()
            .is_some_and(|path| path.starts_with('/') || path.split('/').any(|part| part == ".."))
        {
            errors.push(FieldError::invalid(
                field("subPath"),
                &mount["subPath"],
                "must be a relative path without '..'",
            ));
        }
    }
    resources(&container["resources"], &format!("{at}.resources"), errors);
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = &container[name];
        if probe.is_object() {
            let handlers = ["exec", "httpGet", "tcpSocket", "grpc"]
                .iter()
                .filter(|handler| !probe[**handler].is_null())
                .count();
            let field = format!("{at}.{name}");
            if handlers == 0 {
                errors.push(FieldError::required(field, "must specify a handler type"));
            } else if handlers > 1 {
                errors
                    .push(FieldError::forbidden(field, "may not specify more than 1 handler type"));
            } else if name != "readinessProbe"
                && probe["successThreshold"].as_i64().unwrap_or(1) != 1
            {
                errors.push(FieldError::invalid(
                    format!("{field}.successThreshold"),
                    &probe["successThreshold"],
                    "must be 1",
                ));
            }
        }
    }
}

pub(super) fn port_number(value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    if !value.as_i64().is_some_and(|port| (1..=65535).contains(&port)) {
        errors.push(FieldError::invalid(field, value, "must be between 1 and 65535, inclusive"));
    }
}

fn resources(resources: &Value, at: &str, errors: &mut Vec<FieldError>) {
    for list in ["limits", "requests"] {
        for (name, quantity) in resources[list].as_object().into_iter().flatten() {
            let text = quantity.as_str().map_or_else(|| quantity.to_string(), str::to_owned);
            let field = format!("{at}.{list}[{name}]");
            match Quantity::parse(&text) {
                Err(error) => errors.push(FieldError::invalid(field, quantity, error.to_string())),
                Ok(parsed) if parsed.is_negative() => {
                    errors.push(FieldError::invalid(
                        field,
                        quantity,
                        "must be greater than or equal to 0",
                    ));
                }
                Ok(parsed) if list == "requests" => {
                    let limit = &resources["limits"][name];
                    let limit_text =
                        limit.as_str().map_or_else(|| limit.to_string(), str::to_owned);
                    if !limit.is_null()
                        && Quantity::parse(&limit_text).is_ok_and(|limit| parsed > limit)
                    {
                        errors.push(FieldError::invalid(
                            format!("{at}.requests"),
                            quantity,
                            format!("must be less than or equal to {name} limit of {limit_text}"),
                        ));
                    }
                }
                Ok(_) => {}
            }
        }
    }
}

/// Of an existing pod only few fields may change.
pub(super) fn update(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let mut probe = new["spec"].clone();
    let before = &old["spec"];
    for list in ["containers", "initContainers"] {
        for (index, item) in before[list].as_array().into_iter().flatten().enumerate() {
            if let Some(changed) = probe.get_mut(list).and_then(|items| items.get_mut(index)) {
                if changed["image"].as_str().is_some_and(str::is_empty) {
                    errors.push(FieldError::required(format!("spec.{list}[{index}].image"), ""));
                }
                copy(changed, item, "image");
            }
        }
    }
    for field in ["activeDeadlineSeconds", "terminationGracePeriodSeconds", "schedulingGates"] {
        copy(&mut probe, before, field);
    }
    // Tolerations may be added, never removed or changed.
    let kept = before["tolerations"]
        .as_array()
        .into_iter()
        .flatten()
        .all(|old| probe["tolerations"].as_array().into_iter().flatten().any(|new| new == old));
    if kept {
        copy(&mut probe, before, "tolerations");
    }
    if probe != *before {
        errors.push(FieldError::forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
}

fn copy(to: &mut Value, from: &Value, field: &str) {
    let Some(map) = to.as_object_mut() else { return };
    match from.get(field) {
        Some(value) => {
            map.insert(field.to_owned(), value.clone());
        }
        None => {
            map.shift_remove(field);
        }
    }
}
