//! Rules of Services.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::pod::{port_number, port_or_name};
use super::{items, labels, one_of};
use crate::names;
use crate::status::FieldError;

const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
pub(super) const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
/// A client stays with its backend for at most a day.
const AFFINITY_SECS_MOST: i64 = 24 * 60 * 60;

/// `old` is the Service before a change, and null for a new one. What the type no longer allows is tolerated while it
/// is as it was: the API server takes it away.
pub(super) fn service(object: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let (spec, before) = (&object["spec"], &old["spec"]);
    let kind = spec["type"].as_str().unwrap_or("ClusterIP");
    if !TYPES.contains(&kind) {
        errors.push(FieldError::not_supported("spec.type", &spec["type"], &TYPES));
    }
    labels(&spec["selector"], "spec.selector", errors);
    if kind == "ExternalName" {
        external_name(spec, errors);
    } else {
        cluster_ip(spec, kind, errors);
    }
    ports(spec, before, kind, errors);
    for (field, allowed) in [
        ("sessionAffinity", ["ClientIP", "None"]),
        ("externalTrafficPolicy", ["Cluster", "Local"]),
        ("internalTrafficPolicy", ["Cluster", "Local"]),
    ] {
        one_of(&spec[field], &format!("spec.{field}"), &allowed, errors);
    }
    let timeout = &spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"];
    if timeout.as_i64().is_some_and(|seconds| !(1..=AFFINITY_SECS_MOST).contains(&seconds)) {
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        let detail = format!("must be greater than 0 and less than {AFFINITY_SECS_MOST}");
        errors.push(FieldError::invalid(field, timeout, detail));
    }
    let policy = &spec["externalTrafficPolicy"];
    if policy.is_string()
        && policy != &before["externalTrafficPolicy"]
        && !matches!(kind, "NodePort" | "LoadBalancer")
    {
        let external_ips = items(&spec["externalIPs"]).next().is_some();
        if !external_ips {
            let detail = "may only be set for externally-accessible services";
            errors.push(FieldError::invalid("spec.externalTrafficPolicy", policy, detail));
        }
    }
    for (index, ip) in items(&spec["externalIPs"]) {
        let usable = ip
            .as_str()
            .and_then(|ip| ip.parse::<IpAddr>().ok())
            .is_some_and(|ip| !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast());
        if !usable {
            let detail = "must be a valid IP address that other hosts can reach";
            errors.push(FieldError::invalid(format!("spec.externalIPs[{index}]"), ip, detail));
        }
    }
    let distributions = ["PreferClose", "PreferSameNode", "PreferSameZone"];
    one_of(&spec["trafficDistribution"], "spec.trafficDistribution", &distributions, errors);
    source_ranges(spec, kind, errors);
    let policies = ["PreferDualStack", "RequireDualStack", "SingleStack"];
    one_of(&spec["ipFamilyPolicy"], "spec.ipFamilyPolicy", &policies, errors);
    for (index, family) in items(&spec["ipFamilies"]) {
        one_of(family, &format!("spec.ipFamilies[{index}]"), &["IPv4", "IPv6"], errors);
    }
}

fn source_ranges(spec: &Value, kind: &str, errors: &mut Vec<FieldError>) {
    let field = "spec.loadBalancerSourceRanges";
    for (index, range) in items(&spec["loadBalancerSourceRanges"]) {
        if kind != "LoadBalancer" {
            errors.push(FieldError::forbidden(
                field,
                "may only be used when `type` is 'LoadBalancer'",
            ));
            return;
        }
        let usable = range.as_str().is_some_and(|text| is_cidr(text.trim()));
        if !usable {
            let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            errors.push(FieldError::invalid(format!("{field}[{index}]"), range, detail));
        }
    }
}

fn is_cidr(text: &str) -> bool {
    let Some((ip, prefix)) = text.split_once('/') else { return false };
    let most = match ip.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    prefix.parse::<u8>().is_ok_and(|prefix| prefix <= most)
}

fn external_name(spec: &Value, errors: &mut Vec<FieldError>) {
    let name = spec["externalName"].as_str().unwrap_or_default();
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.is_empty() {
        errors.push(FieldError::required("spec.externalName", ""));
    } else if let Err(why) = names::is_dns1123_subdomain(name) {
        errors.push(FieldError::invalid("spec.externalName", &spec["externalName"], why));
    }
}

fn cluster_ip(spec: &Value, kind: &str, errors: &mut Vec<FieldError>) {
    let ip = spec["clusterIP"].as_str().unwrap_or_default();
    if ip == "None" {
        if kind != "ClusterIP" {
            let detail = format!("may not be set to 'None' for {kind} services");
            errors.push(FieldError::invalid("spec.clusterIPs[0]", &spec["clusterIP"], detail));
        }
    } else if !ip.is_empty() && ip.parse::<IpAddr>().is_err() {
        let detail = "must be empty, 'None', or a valid IP address";
        errors.push(FieldError::invalid("spec.clusterIPs[0]", &spec["clusterIP"], detail));
    }
    let list = &spec["clusterIPs"];
    if !ip.is_empty() && list.is_array() && list[0] != spec["clusterIP"] {
        errors.push(FieldError::invalid(
            "spec.clusterIPs",
            list,
            "first value must match `clusterIP`",
        ));
    }
}

fn ports(spec: &Value, before: &Value, kind: &str, errors: &mut Vec<FieldError>) {
    let count = spec["ports"].as_array().map_or(0, Vec::len);
    if count == 0 && spec["clusterIP"] != "None" && kind != "ExternalName" {
        errors.push(FieldError::required("spec.ports", ""));
    }
    let (mut names_seen, mut numbers, mut node_ports) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (index, port) in items(&spec["ports"]) {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let name = port["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            if count > 1 {
                errors.push(FieldError::required(field("name"), ""));
            }
        } else if let Err(why) = names::is_dns1123_label(name) {
            errors.push(FieldError::invalid(field("name"), &port["name"], why));
        } else if !names_seen.insert(name) {
            errors.push(FieldError::duplicate(field("name"), &port["name"]));
        }
        port_number(&port["port"], &field("port"), errors);
        if !port["targetPort"].is_null() {
            port_or_name(&port["targetPort"], &field("targetPort"), errors);
        }
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        one_of(&port["protocol"], &field("protocol"), &PROTOCOLS, errors);
        if !numbers.insert((protocol, port["port"].as_i64())) {
            let shown = json!({ "protocol": protocol, "port": port["port"] });
            errors.push(FieldError::duplicate(format!("spec.ports[{index}]"), &shown));
        }
        let node_port = port["nodePort"].as_i64().unwrap_or(0);
        if node_port == 0 {
            continue;
        }
        if matches!(kind, "ClusterIP" | "ExternalName") {
            if items(&before["ports"]).any(|(_, old)| old["nodePort"] == port["nodePort"]) {
                continue;
            }
            let detail = format!("may not be used when `type` is '{kind}'");
            errors.push(FieldError::forbidden(field("nodePort"), detail));
        } else if !node_ports.insert((protocol, node_port)) {
            errors.push(FieldError::duplicate(field("nodePort"), &port["nodePort"]));
        }
    }
}

/// A cluster IP stays as long as the Service has one. An absent one means "as it is".
pub(super) fn update(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let ip = |object: &Value| {
        let external = object["spec"]["type"] == "ExternalName";
        let ip = object["spec"]["clusterIP"].as_str().unwrap_or_default().to_owned();
        (!external && !ip.is_empty()).then_some(ip)
    };
    if let (Some(before), Some(after)) = (ip(old), ip(new))
        && before != after
    {
        errors.push(FieldError::invalid(
            "spec.clusterIPs[0]",
            &json!(after),
            "may not change once set",
        ));
    }
}
