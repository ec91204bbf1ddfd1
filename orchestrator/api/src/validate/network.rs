//! Rules of Endpoints, EndpointSlices and NetworkPolicies.

use std::net::IpAddr;

use serde_json::Value;

use super::pod::{port_number, port_or_name};
use super::service::PROTOCOLS;
use super::{items, label_selector, one_of};
use crate::names;
use crate::status::{FieldError, FieldErrorKind};

/// Endpoints and ports of one slice.
const ENDPOINTS_LIMIT: usize = 1000;
const PORTS_LIMIT: usize = 20_000;
/// Addresses of one endpoint.
const ADDRESSES_LIMIT: usize = 100;

/// An address that packets can be sent to from another host.
fn endpoint_ip(value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    let Some(ip) = value.as_str().and_then(|ip| ip.parse::<IpAddr>().ok()) else {
        let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
        errors.push(FieldError::invalid(field, value, detail));
        return;
    };
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let detail = if ip.is_unspecified() {
        "may not be unspecified"
    } else if ip.is_loopback() {
        "may not be in the loopback range (127.0.0.0/8, ::1/128)"
    } else if link_local {
        "may not be in the link-local range (169.254.0.0/16, fe80::/10)"
    } else if ip.is_multicast() {
        "may not be in the multicast range (224.0.0.0/4, ff00::/10)"
    } else {
        return;
    };
    errors.push(FieldError::invalid(field, value, detail));
}

pub(super) fn too_many(field: String, limit: usize) -> FieldError {
    FieldError {
        field,
        kind: FieldErrorKind::TooMany,
        detail: format!("must have at most {limit} items"),
    }
}

pub(super) fn endpoints(object: &Value, errors: &mut Vec<FieldError>) {
    for (index, subset) in items(&object["subsets"]) {
        let at = format!("subsets[{index}]");
        let any = |list: &str| items(&subset[list]).next().is_some();
        if !any("addresses") && !any("notReadyAddresses") {
            errors.push(FieldError::required(
                at.clone(),
                "must specify `addresses` or `notReadyAddresses`",
            ));
        }
        for list in ["addresses", "notReadyAddresses"] {
            for (place, address) in items(&subset[list]) {
                endpoint_ip(&address["ip"], &format!("{at}.{list}[{place}].ip"), errors);
            }
        }
        let count = subset["ports"].as_array().map_or(0, Vec::len);
        for (place, port) in items(&subset["ports"]) {
            let field = |name: &str| format!("{at}.ports[{place}].{name}");
            let name = port["name"].as_str().unwrap_or_default();
            if name.is_empty() {
                if count > 1 {
                    errors.push(FieldError::required(field("name"), ""));
                }
            } else if let Err(why) = names::is_dns1123_label(name) {
                errors.push(FieldError::invalid(field("name"), &port["name"], why));
            }
            port_number(&port["port"], &field("port"), errors);
            one_of(&port["protocol"], &field("protocol"), &PROTOCOLS, errors);
        }
    }
}

pub(super) fn endpoint_slice(object: &Value, errors: &mut Vec<FieldError>) {
    let types = ["FQDN", "IPv4", "IPv6"];
    let kind = object["addressType"].as_str().unwrap_or_default();
    if kind.is_empty() {
        errors.push(FieldError::required("addressType", ""));
    } else {
        one_of(&object["addressType"], "addressType", &types, errors);
    }
    if object["endpoints"].as_array().is_some_and(|list| list.len() > ENDPOINTS_LIMIT) {
        errors.push(too_many("endpoints".to_owned(), ENDPOINTS_LIMIT));
    }
    for (index, endpoint) in items(&object["endpoints"]) {
        let at = format!("endpoints[{index}]");
        match endpoint["addresses"].as_array().map_or(0, Vec::len) {
            0 => errors.push(FieldError::required(
                format!("{at}.addresses"),
                "must contain at least 1 address",
            )),
            count if count > ADDRESSES_LIMIT => {
                errors.push(too_many(format!("{at}.addresses"), ADDRESSES_LIMIT));
            }
            _ => {}
        }
        for (place, address) in items(&endpoint["addresses"]) {
            slice_address(kind, address, &format!("{at}.addresses[{place}]"), errors);
        }
        if let Some(hostname) = endpoint["hostname"].as_str()
            && let Err(why) = names::is_dns1123_label(hostname)
        {
            errors.push(FieldError::invalid(format!("{at}.hostname"), &endpoint["hostname"], why));
        }
    }
    slice_ports(&object["ports"], errors);
}

fn slice_address(kind: &str, address: &Value, field: &str, errors: &mut Vec<FieldError>) {
    let text = address.as_str().unwrap_or_default();
    let parsed = text.parse::<IpAddr>().ok();
    match kind {
        "IPv4" if !parsed.is_some_and(|ip| ip.is_ipv4()) => {
            errors.push(FieldError::invalid(field, address, "must be a valid IPv4 address"));
        }
        "IPv6" if !parsed.is_some_and(|ip| ip.is_ipv6()) => {
            errors.push(FieldError::invalid(field, address, "must be a valid IPv6 address"));
        }
        "IPv4" | "IPv6" => endpoint_ip(address, field, errors),
        "FQDN" => {
            if let Err(why) = names::is_dns1123_subdomain(text) {
                errors.push(FieldError::invalid(field, address, why));
            }
        }
        _ => {}
    }
}

fn slice_ports(ports: &Value, errors: &mut Vec<FieldError>) {
    if ports.as_array().is_some_and(|list| list.len() > PORTS_LIMIT) {
        errors.push(too_many("ports".to_owned(), PORTS_LIMIT));
    }
    let mut seen = std::collections::BTreeSet::new();
    for (index, port) in items(ports) {
        let name = port["name"].as_str().unwrap_or_default();
        if !name.is_empty()
            && let Err(why) = names::is_dns1123_label(name)
        {
            errors.push(FieldError::invalid(format!("ports[{index}].name"), &port["name"], why));
        }
        if !seen.insert(name) {
            errors.push(FieldError::duplicate(
                format!("ports[{index}].name"),
                &Value::String(name.to_owned()),
            ));
        }
        one_of(&port["protocol"], &format!("ports[{index}].protocol"), &PROTOCOLS, errors);
    }
}

pub(super) fn network_policy(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    if !spec["podSelector"].is_null() {
        label_selector(&spec["podSelector"], "spec.podSelector", errors);
    }
    for (list, peers) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in items(&spec[list]) {
            let at = format!("spec.{list}[{index}]");
            for (place, port) in items(&rule["ports"]) {
                policy_port(port, &format!("{at}.ports[{place}]"), errors);
            }
            for (place, peer) in items(&rule[peers]) {
                policy_peer(peer, &format!("{at}.{peers}[{place}]"), errors);
            }
        }
    }
    if spec["policyTypes"].as_array().is_some_and(|types| types.len() > 2) {
        let detail = "may not specify more than two policyTypes";
        errors.push(FieldError::invalid("spec.policyTypes", &spec["policyTypes"], detail));
        return;
    }
    for (index, kind) in items(&spec["policyTypes"]) {
        one_of(kind, &format!("spec.policyTypes[{index}]"), &["Egress", "Ingress"], errors);
    }
}

fn policy_port(port: &Value, at: &str, errors: &mut Vec<FieldError>) {
    one_of(&port["protocol"], &format!("{at}.protocol"), &PROTOCOLS, errors);
    if !port["port"].is_null() {
        port_or_name(&port["port"], &format!("{at}.port"), errors);
    }
    let Some(end) = port["endPort"].as_i64() else { return };
    let field = format!("{at}.endPort");
    let mut wrong =
        |detail| errors.push(FieldError::invalid(field.clone(), &port["endPort"], detail));
    match &port["port"] {
        Value::Null => wrong("may not be specified when `port` is not specified"),
        Value::String(_) => wrong("may not be specified when `port` is non-numeric"),
        start => {
            if start.as_i64().is_some_and(|start| end < start) {
                wrong("must be greater than or equal to `port`");
            }
            port_number(&port["endPort"], &field, errors);
        }
    }
}

fn policy_peer(peer: &Value, at: &str, errors: &mut Vec<FieldError>) {
    let mut others = 0;
    for field in ["podSelector", "namespaceSelector"] {
        if !peer[field].is_null() {
            others += 1;
            label_selector(&peer[field], &format!("{at}.{field}"), errors);
        }
    }
    let block = &peer["ipBlock"];
    if block.is_null() {
        if others == 0 {
            errors.push(FieldError::required(at, "must specify a peer"));
        }
        return;
    }
    if others > 0 {
        errors.push(FieldError::forbidden(at, "may not specify both ipBlock and another peer"));
    }
    let field = format!("{at}.ipBlock.cidr");
    let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
    let text = block["cidr"].as_str().unwrap_or_default();
    if text.is_empty() {
        errors.push(FieldError::required(field, ""));
        return;
    }
    let Some(outer) = parse_cidr(text) else {
        errors.push(FieldError::invalid(field, &block["cidr"], detail));
        return;
    };
    for (index, except) in items(&block["except"]) {
        let field = format!("{at}.ipBlock.except[{index}]");
        match parse_cidr(except.as_str().unwrap_or_default()) {
            None => errors.push(FieldError::invalid(field, except, detail)),
            Some(inner) if !strictly_within(inner, outer) => {
                let detail = "must be a strict subset of `cidr`";
                errors.push(FieldError::invalid(field, except, detail));
            }
            Some(_) => {}
        }
    }
}

/// Address bits from the left (IPv4 in the upper 32), length, and whether it is IPv6.
type Cidr = (u128, u32, bool);

pub(super) fn parse_cidr(text: &str) -> Option<Cidr> {
    let (address, length) = text.split_once('/')?;
    // `parse` would take a sign.
    let digits = length.bytes().all(|byte| byte.is_ascii_digit());
    let length: u32 = length.parse().ok().filter(|_| digits)?;
    match address.parse().ok()? {
        IpAddr::V4(ip) => (length <= 32).then(|| (u128::from(u32::from(ip)) << 96, length, false)),
        IpAddr::V6(ip) => (length <= 128).then(|| (u128::from(ip), length, true)),
    }
}

fn strictly_within(inner: Cidr, outer: Cidr) -> bool {
    let mask = u128::MAX.checked_shl(128 - outer.1).unwrap_or(0);
    inner.2 == outer.2 && inner.1 > outer.1 && (inner.0 & mask) == (outer.0 & mask)
}
