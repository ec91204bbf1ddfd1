//! Rules of pod specs, in pods and in templates.

mod container;
mod placement;
mod volume;

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

pub(super) use container::{port_number, port_or_name};

use super::{at_least, items, label, one_of};
use crate::names;
use crate::status::FieldError;

/// Checks a pod spec at `path`.
pub(super) fn spec(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let field = |name: &str| format!("{path}.{name}");
    let volumes = volume::volumes(spec, &field("volumes"), errors);
    container::containers(spec, path, &volumes, errors);
    one_of(
        &spec["restartPolicy"],
        &field("restartPolicy"),
        &["Always", "OnFailure", "Never"],
        errors,
    );
    let dns = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    one_of(&spec["dnsPolicy"], &field("dnsPolicy"), &dns, errors);
    at_least(
        0,
        &spec["terminationGracePeriodSeconds"],
        &field("terminationGracePeriodSeconds"),
        errors,
    );
    if let Some(seconds) = spec["activeDeadlineSeconds"].as_i64()
        && !(1..=i64::from(i32::MAX)).contains(&seconds)
    {
        let detail = format!("must be between 1 and {}, inclusive", i32::MAX);
        errors.push(FieldError::invalid(
            field("activeDeadlineSeconds"),
            &spec["activeDeadlineSeconds"],
            detail,
        ));
    }
    for (name, check) in [
        ("hostname", names::is_dns1123_label as fn(&str) -> Result<(), String>),
        ("subdomain", names::is_dns1123_label),
        ("serviceAccountName", names::is_dns1123_subdomain),
        ("nodeName", names::is_dns1123_subdomain),
        ("priorityClassName", names::is_dns1123_subdomain),
        ("runtimeClassName", names::is_dns1123_subdomain),
    ] {
        if let Some(text) = spec[name].as_str().filter(|text| !text.is_empty())
            && let Err(why) = check(text)
        {
            errors.push(FieldError::invalid(field(name), &spec[name], why));
        }
    }
    for (key, value) in spec["nodeSelector"].as_object().into_iter().flatten() {
        label(key, value, &field("nodeSelector"), errors);
    }
    placement::tolerations(&spec["tolerations"], &field("tolerations"), errors);
    placement::affinity(&spec["affinity"], &field("affinity"), errors);
    placement::spread(
        &spec["topologySpreadConstraints"],
        &field("topologySpreadConstraints"),
        errors,
    );
    host_aliases(spec, path, errors);
    dns_config(spec, path, errors);
    security_context(&spec["securityContext"], &field("securityContext"), errors);
    let mut gates = BTreeSet::new();
    for (index, gate) in items(&spec["schedulingGates"]) {
        let at = format!("{path}.schedulingGates[{index}]");
        let name = gate["name"].as_str().unwrap_or_default();
        if let Err(why) = names::is_qualified_name(name) {
            errors.push(FieldError::invalid(at, &gate["name"], why));
        } else if !gates.insert(name) {
            errors.push(FieldError::duplicate(at, &gate["name"]));
        }
    }
    if !gates.is_empty() && spec["nodeName"].as_str().is_some_and(|name| !name.is_empty()) {
        errors.push(FieldError::forbidden(
            field("nodeName"),
            "cannot be set until all schedulingGates have been cleared",
        ));
    }
}

fn host_aliases(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    for (index, alias) in items(&spec["hostAliases"]) {
        let at = format!("{path}.hostAliases[{index}]");
        if alias["ip"].as_str().is_none_or(|ip| ip.parse::<IpAddr>().is_err()) {
            let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            errors.push(FieldError::invalid(format!("{at}.ip"), &alias["ip"], detail));
        }
        for (place, name) in items(&alias["hostnames"]) {
            if let Err(why) = names::is_dns1123_subdomain(name.as_str().unwrap_or_default()) {
                errors.push(FieldError::invalid(format!("{at}.hostnames[{place}]"), name, why));
            }
        }
    }
}

/// Resolvers and search domains that the system's resolver library takes.
const NAMESERVERS_LIMIT: usize = 3;
const SEARCHES_LIMIT: usize = 32;

fn dns_config(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let config = &spec["dnsConfig"];
    let servers = config["nameservers"].as_array().map_or(0, Vec::len);
    if spec["dnsPolicy"] == "None" && servers == 0 {
        let (at, detail) = if config.is_null() {
            (format!("{path}.dnsConfig"), "must provide `dnsConfig` when `dnsPolicy` is None")
        } else {
            (
                format!("{path}.dnsConfig.nameservers"),
                "must provide at least one DNS nameserver when `dnsPolicy` is None",
            )
        };
        errors.push(FieldError::required(at, detail));
    }
    if servers > NAMESERVERS_LIMIT {
        let detail = format!("must not have more than {NAMESERVERS_LIMIT} nameservers");
        errors.push(FieldError::invalid(
            format!("{path}.dnsConfig.nameservers"),
            &config["nameservers"],
            detail,
        ));
    }
    for (index, server) in items(&config["nameservers"]) {
        if server.as_str().is_none_or(|ip| ip.parse::<IpAddr>().is_err()) {
            let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            errors.push(FieldError::invalid(
                format!("{path}.dnsConfig.nameservers[{index}]"),
                server,
                detail,
            ));
        }
    }
    if config["searches"].as_array().is_some_and(|searches| searches.len() > SEARCHES_LIMIT) {
        let detail = format!("must not have more than {SEARCHES_LIMIT} search paths");
        errors.push(FieldError::invalid(
            format!("{path}.dnsConfig.searches"),
            &config["searches"],
            detail,
        ));
    }
}

fn security_context(context: &Value, at: &str, errors: &mut Vec<FieldError>) {
    for name in ["runAsUser", "runAsGroup", "fsGroup"] {
        id(&context[name], &format!("{at}.{name}"), errors);
    }
    for (index, group) in items(&context["supplementalGroups"]) {
        id(group, &format!("{at}.supplementalGroups[{index}]"), errors);
    }
    let policies = ["Always", "OnRootMismatch"];
    one_of(
        &context["fsGroupChangePolicy"],
        &format!("{at}.fsGroupChangePolicy"),
        &policies,
        errors,
    );
    let mut names_seen = BTreeSet::new();
    for (index, sysctl) in items(&context["sysctls"]) {
        let field = format!("{at}.sysctls[{index}].name");
        let name = sysctl["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.push(FieldError::required(field, ""));
        } else if !names_seen.insert(name) {
            errors.push(FieldError::duplicate(field, &sysctl["name"]));
        }
    }
}

/// A user or group number.
fn id(value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    if let Some(number) = value.as_i64()
        && !(0..=i64::from(i32::MAX)).contains(&number)
    {
        let detail = format!("must be between 0 and {}, inclusive", i32::MAX);
        errors.push(FieldError::invalid(field, value, detail));
    }
}

const UPDATE_FORBIDDEN: &str = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

/// Of an existing pod only few fields may change.
pub(super) fn update(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let (before, after) = (&old["spec"], &new["spec"]);
    for list in ["containers", "initContainers"] {
        let count = |spec: &Value| spec[list].as_array().map_or(0, Vec::len);
        if count(before) != count(after) {
            errors.push(FieldError::forbidden(
                format!("spec.{list}"),
                "pod updates may not add or remove containers",
            ));
            return;
        }
    }
    // What may change is put back as it was; what differs then, may not.
    let mut rest = after.clone();
    for list in ["containers", "initContainers"] {
        for (index, item) in items(&before[list]) {
            container::image(&after[list][index], &format!("spec.{list}[{index}]"), errors);
            if let Some(changed) = rest.get_mut(list).and_then(|items| items.get_mut(index)) {
                copy(changed, item, "image");
            }
        }
    }
    active_deadline(before, after, errors);
    copy(&mut rest, before, "activeDeadlineSeconds");
    let grace = |spec: &Value| spec["terminationGracePeriodSeconds"].as_i64();
    if grace(before).is_some_and(|seconds| seconds < 0) && grace(after) == Some(1) {
        copy(&mut rest, before, "terminationGracePeriodSeconds");
    }
    let contained = |list: &str, one: &Value, other: &Value| {
        items(&one[list]).all(|(_, item)| items(&other[list]).any(|(_, same)| same == item))
    };
    // Tolerations may only be added, apart from how long they last.
    if contained("tolerations", before, after) {
        placement::tolerations(&after["tolerations"], "spec.tolerations", errors);
        copy(&mut rest, before, "tolerations");
    }
    if contained("schedulingGates", after, before) {
        copy(&mut rest, before, "schedulingGates");
    } else {
        let added = items(&after["schedulingGates"])
            .filter(|(_, gate)| !items(&before["schedulingGates"]).any(|(_, old)| old == *gate))
            .map(|(_, gate)| gate["name"].as_str().unwrap_or_default().to_owned())
            .collect::<Vec<_>>();
        let detail = format!(
            "only deletion is allowed, but found new scheduling gates {:?}",
            added.join(", ")
        );
        errors.push(FieldError::forbidden("spec.schedulingGates", detail));
        return;
    }
    // A pod that is still gated may be pointed at fewer nodes.
    if items(&before["schedulingGates"]).next().is_some() {
        let narrowed = before["nodeSelector"]
            .as_object()
            .into_iter()
            .flatten()
            .all(|(key, value)| after["nodeSelector"].get(key) == Some(value));
        if narrowed {
            copy(&mut rest, before, "nodeSelector");
        }
        let node_affinity = |spec: &Value| spec["affinity"]["nodeAffinity"].clone();
        if node_affinity(before).is_null() {
            if let Some(affinity) = rest.get_mut("affinity").and_then(Value::as_object_mut) {
                affinity.shift_remove("nodeAffinity");
            }
            if rest["affinity"].as_object().is_some_and(serde_json::Map::is_empty) {
                copy(&mut rest, before, "affinity");
            }
        }
    }
    if rest != *before {
        errors.push(FieldError::forbidden("spec", UPDATE_FORBIDDEN));
    }
}

/// A change by the subresource `ephemeralContainers`: more may come, nothing else changes.
pub(super) fn ephemeral_containers(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let path = "spec.ephemeralContainers";
    let (before, after) =
        (&old["spec"]["ephemeralContainers"], &new["spec"]["ephemeralContainers"]);
    for (_, item) in items(before) {
        let name = item["name"].as_str().unwrap_or_default();
        match items(after).find(|(_, other)| other["name"] == item["name"]) {
            Some((_, other)) if other == item => {}
            Some(_) => {
                let detail = format!("existing ephemeral containers {name:?} may not be changed");
                errors.push(FieldError::forbidden(path, detail));
            }
            None => {
                let detail = format!("existing ephemeral containers {name:?} may not be removed");
                errors.push(FieldError::forbidden(path, detail));
            }
        }
    }
    let mut found = Vec::new();
    let volumes = volume::volumes(&new["spec"], "spec.volumes", &mut found);
    container::containers(&new["spec"], "spec", &volumes, &mut found);
    // The others were judged when they came.
    errors.extend(found.into_iter().filter(|error| error.field.starts_with(path)));
}

fn active_deadline(before: &Value, after: &Value, errors: &mut Vec<FieldError>) {
    let field = "activeDeadlineSeconds";
    match (before[field].as_i64(), after[field].as_i64()) {
        (None, Some(seconds)) if seconds < 0 => {
            errors.push(FieldError::invalid(
                format!("spec.{field}"),
                &after[field],
                "must be greater than or equal to 0",
            ));
        }
        (Some(old), Some(new)) if new > old => {
            errors.push(FieldError::invalid(
                format!("spec.{field}"),
                &after[field],
                "must be less than or equal to previous value",
            ));
        }
        (Some(_), None) => {
            errors.push(FieldError::invalid(
                format!("spec.{field}"),
                &Value::Null,
                "must not update from a positive integer to nil value",
            ));
        }
        _ => {}
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
