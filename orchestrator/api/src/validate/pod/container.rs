//! Rules of containers: images, ports, environment, mounts, resources, probes.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::super::{at_least, items, one_of};
use super::volume::relative_path;
use crate::status::FieldError;
use crate::{Quantity, names};

/// All containers of a spec; `volumes` are the names of its volumes.
pub(super) fn containers(
    spec: &Value,
    path: &str,
    volumes: &BTreeSet<String>,
    errors: &mut Vec<FieldError>,
) {
    if spec["containers"].as_array().is_none_or(Vec::is_empty) {
        errors.push(FieldError::required(format!("{path}.containers"), ""));
    }
    let (mut seen, mut host_ports) = (BTreeSet::new(), BTreeSet::new());
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for (index, item) in items(&spec[list]) {
            let at = format!("{path}.{list}[{index}]");
            let name = item["name"].as_str().unwrap_or_default();
            if name.is_empty() {
                errors.push(FieldError::required(format!("{at}.name"), ""));
            } else if let Err(why) = names::is_dns1123_label(name) {
                errors.push(FieldError::invalid(format!("{at}.name"), &item["name"], why));
            } else if !seen.insert(name.to_owned()) {
                errors.push(FieldError::duplicate(format!("{at}.name"), &item["name"]));
            }
            let sidecar = item["restartPolicy"] == "Always";
            if list == "ephemeralContainers" {
                ephemeral(item, spec, &at, errors);
            }
            if list == "initContainers" && !sidecar {
                for handler in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
                    if !item[handler].is_null() {
                        let detail =
                            "may not be set for init containers without restartPolicy=Always";
                        errors.push(FieldError::forbidden(format!("{at}.{handler}"), detail));
                    }
                }
            }
            container(item, &at, volumes, errors);
            // One-shot init containers are gone when the others start.
            let together = list == "containers" || sidecar;
            ports(
                item,
                &at,
                spec["hostNetwork"] == true,
                together.then_some(&mut host_ports),
                errors,
            );
        }
    }
}

/// What a container for debugging may not have, and whom it looks at.
fn ephemeral(item: &Value, spec: &Value, at: &str, errors: &mut Vec<FieldError>) {
    for field in
        ["lifecycle", "livenessProbe", "ports", "readinessProbe", "resources", "startupProbe"]
    {
        let set = match &item[field] {
            Value::Object(map) => !map.is_empty(),
            Value::Array(list) => !list.is_empty(),
            _ => false,
        };
        if set {
            let detail = "cannot be set for an Ephemeral Container";
            errors.push(FieldError::forbidden(format!("{at}.{field}"), detail));
        }
    }
    let target = &item["targetContainerName"];
    let known = ["containers", "initContainers"]
        .iter()
        .any(|list| items(&spec[*list]).any(|(_, container)| container["name"] == *target));
    if target.as_str().is_some_and(|target| !target.is_empty()) && !known {
        errors.push(FieldError::not_found(format!("{at}.targetContainerName"), target));
    }
}

fn container(
    container: &Value,
    at: &str,
    volumes: &BTreeSet<String>,
    errors: &mut Vec<FieldError>,
) {
    image(container, at, errors);
    let policies = ["Always", "IfNotPresent", "Never"];
    one_of(&container["imagePullPolicy"], &format!("{at}.imagePullPolicy"), &policies, errors);
    let policies = ["FallbackToLogsOnError", "File"];
    one_of(
        &container["terminationMessagePolicy"],
        &format!("{at}.terminationMessagePolicy"),
        &policies,
        errors,
    );
    environment(container, at, errors);
    mounts(container, at, volumes, errors);
    resources(&container["resources"], &format!("{at}.resources"), errors);
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if container[name].is_object() {
            probe(&container[name], name, &format!("{at}.{name}"), errors);
        }
    }
    for hook in ["postStart", "preStop"] {
        let hook_at = format!("{at}.lifecycle.{hook}");
        if container["lifecycle"][hook].is_object() {
            handler(
                &container["lifecycle"][hook],
                &["exec", "httpGet", "sleep", "tcpSocket"],
                &hook_at,
                errors,
            );
        }
    }
    let context = &container["securityContext"];
    super::id(&context["runAsUser"], &format!("{at}.securityContext.runAsUser"), errors);
    super::id(&context["runAsGroup"], &format!("{at}.securityContext.runAsGroup"), errors);
    if context["privileged"] == true && context["allowPrivilegeEscalation"] == false {
        let detail = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
        errors.push(FieldError::invalid(format!("{at}.securityContext"), context, detail));
    }
}

/// The image must be there, and be a name that some registry could know. Upstream leaves the second part to the
/// kubelet; it is told here, where the one who made the mistake is still listening.
pub(super) fn image(container: &Value, at: &str, errors: &mut Vec<FieldError>) {
    let field = format!("{at}.image");
    let image = container["image"].as_str().unwrap_or_default();
    if image.is_empty() {
        errors.push(FieldError::required(field, ""));
    } else if image.trim() != image {
        let detail = "must not have leading or trailing whitespace";
        errors.push(FieldError::invalid(field, &container["image"], detail));
    } else if let Err(why) = image_reference(image) {
        errors.push(FieldError::invalid(field, &container["image"], why));
    }
}

/// The grammar of image references (distribution, `reference`): `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`.
fn image_reference(image: &str) -> Result<(), &'static str> {
    const FORM: &str = "invalid image reference, must look like [HOST[:PORT]/]NAME[:TAG][@DIGEST]";
    let (rest, digest) =
        image.split_once('@').map_or((image, None), |(rest, digest)| (rest, Some(digest)));
    if let Some(digest) = digest {
        let (algorithm, hash) = digest.split_once(':').ok_or(FORM)?;
        if algorithm.is_empty() || hash.len() < 32 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err("invalid image reference, the digest must look like sha256:HEX");
        }
    }
    let (path, name) =
        rest.rsplit_once('/').map_or((None, rest), |(path, name)| (Some(path), name));
    let (name, tag) = name.split_once(':').map_or((name, None), |(name, tag)| (name, Some(tag)));
    if let Some(tag) = tag {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let good = tag.len() <= 128
            && tag.bytes().next().is_some_and(word)
            && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
        if !good {
            return Err(
                "invalid image reference, a tag has at most 128 of [A-Za-z0-9_.-] and starts with [A-Za-z0-9_]",
            );
        }
    }
    let mut parts: Vec<&str> = path.map_or_else(Vec::new, |path| path.split('/').collect());
    // The first part is a host if it looks like one, and may then have capitals and a port.
    if parts.first().is_some_and(|first| {
        first.contains(['.', ':']) || *first == "localhost" || has_capital(first)
    }) {
        let host = parts.remove(0);
        let good = !host.is_empty()
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b));
        if !good {
            return Err(FORM);
        }
    }
    for part in parts.into_iter().chain([name]) {
        if has_capital(part) {
            return Err("invalid image reference, the repository name must be lowercase");
        }
        let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = part.as_bytes();
        let good = bytes.first().is_some_and(alphanumeric)
            && bytes.last().is_some_and(alphanumeric)
            && bytes.iter().all(|b| alphanumeric(b) || b"._-".contains(b));
        if !good {
            return Err(FORM);
        }
    }
    Ok(())
}

fn has_capital(text: &str) -> bool {
    text.bytes().any(|b| b.is_ascii_uppercase())
}

fn ports(
    container: &Value,
    at: &str,
    host_network: bool,
    mut host_ports: Option<&mut BTreeSet<String>>,
    errors: &mut Vec<FieldError>,
) {
    let mut port_names = BTreeSet::new();
    for (index, port) in items(&container["ports"]) {
        let field = |name: &str| format!("{at}.ports[{index}].{name}");
        if let Some(name) = port["name"].as_str().filter(|name| !name.is_empty()) {
            if let Err(why) = port_name(name) {
                errors.push(FieldError::invalid(field("name"), &port["name"], why));
            } else if !port_names.insert(name) {
                errors.push(FieldError::duplicate(field("name"), &port["name"]));
            }
        }
        port_number(&port["containerPort"], &field("containerPort"), errors);
        one_of(&port["protocol"], &field("protocol"), &["SCTP", "TCP", "UDP"], errors);
        if port["hostPort"].as_i64().unwrap_or(0) == 0 {
            continue;
        }
        port_number(&port["hostPort"], &field("hostPort"), errors);
        if host_network && port["hostPort"] != port["containerPort"] {
            let detail = "must match `hostPort` when `hostNetwork` is true";
            errors.push(FieldError::invalid(
                field("containerPort"),
                &port["containerPort"],
                detail,
            ));
        }
        if let Some(taken) = &mut host_ports {
            let (protocol, ip) = (
                port["protocol"].as_str().unwrap_or("TCP"),
                port["hostIP"].as_str().unwrap_or_default(),
            );
            let text = format!("{protocol}/{ip}/{}", port["hostPort"]);
            if !taken.insert(text.clone()) {
                errors.push(FieldError::duplicate(field("hostPort"), &json!(text)));
            }
        }
    }
}

/// A port number.
pub(in super::super) fn port_number(value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    if !value.as_i64().is_some_and(|port| (1..=65535).contains(&port)) {
        let shown = if value.is_null() { &json!(0) } else { value };
        errors.push(FieldError::invalid(field, shown, "must be between 1 and 65535, inclusive"));
    }
}

/// A port's name (IANA service name).
pub(in super::super) fn port_name(name: &str) -> Result<(), &'static str> {
    if name.len() > 15 {
        Err("must be no more than 15 characters")
    } else if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        Err("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)")
    } else if !name.bytes().any(|b| b.is_ascii_lowercase()) {
        Err("must contain at least one letter (a-z)")
    } else if name.contains("--") {
        Err("must not contain consecutive hyphens")
    } else if name.starts_with('-') || name.ends_with('-') {
        Err("must not begin or end with a hyphen")
    } else {
        Ok(())
    }
}

/// A port by number or by name.
pub(in super::super) fn port_or_name(value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    match value.as_str() {
        Some(name) => {
            if let Err(why) = port_name(name) {
                errors.push(FieldError::invalid(field, value, why));
            }
        }
        None => port_number(value, field, errors),
    }
}

/// Fields of a pod that a variable can be taken from.
const ENV_FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

fn environment(container: &Value, at: &str, errors: &mut Vec<FieldError>) {
    for (index, env) in items(&container["env"]) {
        let at = format!("{at}.env[{index}]");
        let name = env["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.push(FieldError::required(format!("{at}.name"), ""));
        } else if !name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=') {
            let detail = "a valid environment variable name must consist only of printable ASCII characters other than '='";
            errors.push(FieldError::invalid(format!("{at}.name"), &env["name"], detail));
        }
        if env["valueFrom"].is_null() {
            continue;
        }
        let source = &env["valueFrom"];
        let source_at = format!("{at}.valueFrom");
        let kinds =
            ["configMapKeyRef", "fieldRef", "fileKeyRef", "resourceFieldRef", "secretKeyRef"];
        let set = kinds.iter().filter(|kind| !source[**kind].is_null()).count();
        if env["value"].as_str().is_some_and(|value| !value.is_empty()) {
            let detail = "may not be specified when `value` is not empty";
            errors.push(FieldError::invalid(source_at.clone(), &json!(""), detail));
        } else if set == 0 {
            let detail = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`";
            errors.push(FieldError::invalid(source_at.clone(), &json!(""), detail));
        } else if set > 1 {
            let detail = "may not have more than one field specified at a time";
            errors.push(FieldError::invalid(source_at.clone(), &json!(""), detail));
        }
        for kind in ["configMapKeyRef", "secretKeyRef"] {
            if !source[kind].is_null() {
                required_text(&source[kind], "name", &format!("{source_at}.{kind}"), errors);
                required_text(&source[kind], "key", &format!("{source_at}.{kind}"), errors);
            }
        }
        if !source["fieldRef"].is_null() {
            field_ref(&source["fieldRef"], &format!("{source_at}.fieldRef"), &ENV_FIELDS, errors);
        }
        if !source["resourceFieldRef"].is_null() {
            required_text(
                &source["resourceFieldRef"],
                "resource",
                &format!("{source_at}.resourceFieldRef"),
                errors,
            );
        }
    }
    for (index, source) in items(&container["envFrom"]) {
        let at = format!("{at}.envFrom[{index}]");
        let set: Vec<&str> = ["configMapRef", "secretRef"]
            .into_iter()
            .filter(|kind| !source[*kind].is_null())
            .collect();
        match set.as_slice() {
            [] => errors.push(FieldError::invalid(
                at,
                &json!(""),
                "must specify one of: `configMapRef` or `secretRef`",
            )),
            [kind] => required_text(&source[*kind], "name", &format!("{at}.{kind}"), errors),
            _ => errors.push(FieldError::invalid(
                at,
                &json!(""),
                "may not have more than one field specified at a time",
            )),
        }
    }
}

pub(super) fn required_text(object: &Value, key: &str, at: &str, errors: &mut Vec<FieldError>) {
    if object[key].as_str().is_none_or(str::is_empty) {
        errors.push(FieldError::required(format!("{at}.{key}"), ""));
    }
}

/// A reference to a field of the pod; labels and annotations by key are always allowed.
pub(super) fn field_ref(
    reference: &Value,
    at: &str,
    allowed: &[&str],
    errors: &mut Vec<FieldError>,
) {
    let path = reference["fieldPath"].as_str().unwrap_or_default();
    if path.is_empty() {
        errors.push(FieldError::required(format!("{at}.fieldPath"), ""));
        return;
    }
    let subscripted = ["metadata.annotations['", "metadata.labels['"]
        .iter()
        .any(|prefix| path.strip_prefix(prefix).is_some_and(|rest| rest.ends_with("']")));
    if !subscripted && !allowed.contains(&path) {
        errors.push(FieldError::not_supported(
            format!("{at}.fieldPath"),
            &reference["fieldPath"],
            allowed,
        ));
    }
}

fn mounts(container: &Value, at: &str, volumes: &BTreeSet<String>, errors: &mut Vec<FieldError>) {
    let mut targets = BTreeSet::new();
    for (index, mount) in items(&container["volumeMounts"]) {
        let at = format!("{at}.volumeMounts[{index}]");
        let name = mount["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.push(FieldError::required(format!("{at}.name"), ""));
        } else if !volumes.contains(name) {
            errors.push(FieldError::not_found(format!("{at}.name"), &mount["name"]));
        }
        let target = mount["mountPath"].as_str().unwrap_or_default();
        if target.is_empty() {
            errors.push(FieldError::required(format!("{at}.mountPath"), ""));
        } else if !targets.insert(target) {
            errors.push(FieldError::invalid(
                format!("{at}.mountPath"),
                &mount["mountPath"],
                "must be unique",
            ));
        }
        for field in ["subPath", "subPathExpr"] {
            if let Some(path) = mount[field].as_str().filter(|path| !path.is_empty()) {
                relative_path(path, &mount[field], &format!("{at}.{field}"), errors);
            }
        }
        let set = |field: &str| mount[field].as_str().is_some_and(|path| !path.is_empty());
        if set("subPath") && set("subPathExpr") {
            let detail = "subPathExpr and subPath are mutually exclusive";
            errors.push(FieldError::invalid(
                format!("{at}.subPathExpr"),
                &mount["subPathExpr"],
                detail,
            ));
        }
        let modes = ["Bidirectional", "HostToContainer", "None"];
        one_of(&mount["mountPropagation"], &format!("{at}.mountPropagation"), &modes, errors);
    }
}

/// Resources every node knows; others carry a domain.
fn is_known_resource(name: &str) -> bool {
    matches!(name, "cpu" | "memory" | "ephemeral-storage")
        || name.starts_with("hugepages-")
        || name.contains('/')
}

fn resources(resources: &Value, at: &str, errors: &mut Vec<FieldError>) {
    let parse = |value: &Value| Quantity::parse(value.as_str().unwrap_or_default());
    for list in ["limits", "requests"] {
        for (name, quantity) in resources[list].as_object().into_iter().flatten() {
            let field = format!("{at}.{list}[{name}]");
            let shown = Value::String(name.clone());
            if let Err(why) = names::is_qualified_name(name) {
                errors.push(FieldError::invalid(field.clone(), &shown, why));
            } else if !is_known_resource(name) {
                let detail = "must be a standard resource for containers";
                errors.push(FieldError::invalid(field.clone(), &shown, detail));
            }
            let amount = match parse(quantity) {
                Ok(amount) => amount,
                Err(error) => {
                    errors.push(FieldError::invalid(field, quantity, error.to_string()));
                    continue;
                }
            };
            if amount.is_negative() {
                errors.push(FieldError::invalid(
                    field,
                    quantity,
                    "must be greater than or equal to 0",
                ));
                continue;
            }
            let whole = name.contains('/') || name.starts_with("hugepages-");
            if whole && amount != Quantity::from_value(amount.value()) {
                errors.push(FieldError::invalid(field, quantity, "must be an integer"));
                continue;
            }
            if list == "limits" {
                continue;
            }
            // What cannot be over-committed is requested in full.
            let limit = &resources["limits"][name];
            match parse(limit) {
                Ok(limit_amount) if whole && limit_amount != amount => {
                    let detail = format!(
                        "must be equal to {name} limit of {}",
                        limit.as_str().unwrap_or_default()
                    );
                    errors.push(FieldError::invalid(format!("{at}.requests"), quantity, detail));
                }
                Ok(limit_amount) if amount > limit_amount => {
                    let detail = format!(
                        "must be less than or equal to {name} limit of {}",
                        limit.as_str().unwrap_or_default()
                    );
                    errors.push(FieldError::invalid(format!("{at}.requests"), quantity, detail));
                }
                Err(_) if whole && limit.is_null() => {
                    let detail = "Limit must be set for non overcommitable resources";
                    errors.push(FieldError::required(format!("{at}.limits"), detail));
                }
                _ => {}
            }
        }
    }
}

fn probe(probe: &Value, kind: &str, at: &str, errors: &mut Vec<FieldError>) {
    handler(probe, &["exec", "httpGet", "tcpSocket", "grpc"], at, errors);
    for name in [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        at_least(0, &probe[name], &format!("{at}.{name}"), errors);
    }
    at_least(
        1,
        &probe["terminationGracePeriodSeconds"],
        &format!("{at}.terminationGracePeriodSeconds"),
        errors,
    );
    if kind == "readinessProbe" {
        if !probe["terminationGracePeriodSeconds"].is_null() {
            let detail = "must not be set for readinessProbes";
            let field = format!("{at}.terminationGracePeriodSeconds");
            errors.push(FieldError::invalid(
                field,
                &probe["terminationGracePeriodSeconds"],
                detail,
            ));
        }
    } else if probe["successThreshold"].as_i64().unwrap_or(1) != 1 {
        errors.push(FieldError::invalid(
            format!("{at}.successThreshold"),
            &probe["successThreshold"],
            "must be 1",
        ));
    }
}

/// A probe's or hook's one action.
fn handler(object: &Value, kinds: &[&str], at: &str, errors: &mut Vec<FieldError>) {
    let mut set = kinds.iter().filter(|kind| !object[**kind].is_null());
    if set.next().is_none() {
        errors.push(FieldError::required(at, "must specify a handler type"));
    }
    for kind in set {
        errors.push(FieldError::forbidden(
            format!("{at}.{kind}"),
            "may not specify more than 1 handler type",
        ));
    }
    if object["exec"].is_object() && object["exec"]["command"].as_array().is_none_or(Vec::is_empty)
    {
        errors.push(FieldError::required(format!("{at}.exec.command"), ""));
    }
    let http = &object["httpGet"];
    if http.is_object() {
        required_text(http, "path", &format!("{at}.httpGet"), errors);
        port_or_name(&http["port"], &format!("{at}.httpGet.port"), errors);
        one_of(&http["scheme"], &format!("{at}.httpGet.scheme"), &["HTTP", "HTTPS"], errors);
    }
    if object["tcpSocket"].is_object() {
        port_or_name(&object["tcpSocket"]["port"], &format!("{at}.tcpSocket.port"), errors);
    }
    if object["grpc"].is_object() {
        port_number(&object["grpc"]["port"], &format!("{at}.grpc.port"), errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_references_by_table() {
        for good in [
            "web",
            "web:v1",
            "library/web:1.0_a-b",
            "host:5000/team/web",
            "Host.example:5000/web",
            "localhost/web",
            "a__b/c.d-e",
            "web@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "orch/pause:0.1.0",
        ] {
            assert_eq!(image_reference(good), Ok(()), "{good}");
        }
        for bad in [
            "two words",
            "Web",
            "team/Web:v1",
            "web:",
            "web:a b",
            "/web",
            "web/",
            "a//b",
            "web@sha256",
            "web:v1:v2",
            "-web",
        ] {
            assert!(image_reference(bad).is_err(), "{bad}");
        }
    }
}
