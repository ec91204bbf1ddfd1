//! Rules of Services and EndpointSlices.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

use super::pod::port_number;
use crate::names;
use crate::status::FieldError;

const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
/// Endpoints of one slice.
const ENDPOINTS_LIMIT: usize = 1000;

pub(super) fn service(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    let kind = spec["type"].as_str().unwrap_or("ClusterIP");
    if !TYPES.contains(&kind) {
        errors.push(FieldError::not_supported("spec.type", &spec["type"], &TYPES));
    }
    if kind == "ExternalName" {
        if spec["externalName"].as_str().is_none_or(str::is_empty) {
            errors.push(FieldError::required("spec.externalName", ""));
        }
        return;
    }
    let ports = spec["ports"].as_array().map_or(&[][..], Vec::as_slice);
    let headless = spec["clusterIP"] == "None";
    if ports.is_empty() && !headless {
        errors.push(FieldError::required("spec.ports", ""));
    }
    let (mut names_seen, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let name = port["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            if ports.len() > 1 {
                errors.push(FieldError::required(field("name"), ""));
            }
        } else if let Err(why) = names::is_dns1123_label(name) {
            errors.push(FieldError::invalid(field("name"), &port["name"], why));
        } else if !names_seen.insert(name) {
            errors.push(FieldError::duplicate(field("name"), &port["name"]));
        }
        port_number(&port["port"], &field("port"), errors);
        if port["targetPort"].is_i64() || port["targetPort"].is_u64() {
            port_number(&port["targetPort"], &field("targetPort"), errors);
        }
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        if !PROTOCOLS.contains(&protocol) {
            errors.push(FieldError::not_supported(
                field("protocol"),
                &port["protocol"],
                &PROTOCOLS,
            ));
        }
        if !numbers.insert((protocol, port["port"].as_i64())) {
            errors.push(FieldError::duplicate(format!("spec.ports[{index}]"), port));
        }
        if kind == "ClusterIP" && port["nodePort"].as_i64().unwrap_or(0) != 0 {
            errors.push(FieldError::forbidden(
                field("nodePort"),
                "may not be used when `type` is 'ClusterIP'",
            ));
        }
    }
    if let Some(ip) = spec["clusterIP"].as_str().filter(|ip| !ip.is_empty() && *ip != "None")
        && ip.parse::<IpAddr>().is_err()
    {
        errors.push(FieldError::invalid(
            "spec.clusterIP",
            &spec["clusterIP"],
            "must be empty, 'None', or a valid IP address",
        ));
    }
    if headless && kind != "ClusterIP" {
        errors.push(FieldError::invalid(
            "spec.clusterIPs[0]",
            &spec["clusterIP"],
            format!("may not be set to 'None' for {kind} services"),
        ));
    }
    for (field, allowed) in [
        ("sessionAffinity", ["ClientIP", "None"]),
        ("externalTrafficPolicy", ["Cluster", "Local"]),
        ("internalTrafficPolicy", ["Cluster", "Local"]),
    ] {
        if let Some(value) = spec[field].as_str().filter(|value| !value.is_empty())
            && !allowed.contains(&value)
        {
            errors.push(FieldError::not_supported(format!("spec.{field}"), &spec[field], &allowed));
        }
    }
    for (key, value) in spec["selector"].as_object().into_iter().flatten() {
        super::label(key, value, "spec.selector", errors);
    }
}

pub(super) fn update(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let (before, after) = (&old["spec"]["clusterIP"], &new["spec"]["clusterIP"]);
    let external = |object: &Value| object["spec"]["type"] == "ExternalName";
    if !external(new)
        && !external(old)
        && before.as_str().is_some_and(|ip| !ip.is_empty())
        && before != after
    {
        errors.push(FieldError::invalid("spec.clusterIPs[0]", after, "may not change once set"));
    }
}

pub(super) fn endpoint_slice(object: &Value, errors: &mut Vec<FieldError>) {
    let kind = object["addressType"].as_str().unwrap_or_default();
    if kind.is_empty() {
        errors.push(FieldError::required("addressType", ""));
    } else if !["FQDN", "IPv4", "IPv6"].contains(&kind) {
        errors.push(FieldError::not_supported(
            "addressType",
            &object["addressType"],
            &["FQDN", "IPv4", "IPv6"],
        ));
    }
    let endpoints = object["endpoints"].as_array().map_or(&[][..], Vec::as_slice);
    if endpoints.len() > ENDPOINTS_LIMIT {
        errors.push(FieldError {
            field: "endpoints".to_owned(),
            kind: crate::status::FieldErrorKind::TooMany,
            detail: format!("must have at most {ENDPOINTS_LIMIT} items"),
        });
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let addresses = endpoint["addresses"].as_array().map_or(&[][..], Vec::as_slice);
        if addresses.is_empty() {
            errors.push(FieldError::required(
                format!("endpoints[{index}].addresses"),
                "must contain at least 1 address",
            ));
        }
        for (place, address) in addresses.iter().enumerate() {
            let parsed: Option<IpAddr> = address.as_str().and_then(|text| text.parse().ok());
            let good = match kind {
                "IPv4" => parsed.is_some_and(|ip| ip.is_ipv4()),
                "IPv6" => parsed.is_some_and(|ip| ip.is_ipv6()),
                _ => true,
            };
            if !good {
                let field = format!("endpoints[{index}].addresses[{place}]");
                errors.push(FieldError::invalid(
                    field,
                    address,
                    format!("must be a valid {kind} address"),
                ));
            }
        }
    }
}
