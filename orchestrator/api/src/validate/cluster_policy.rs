//! `ClusterNetworkPolicy`: the rules that upstream's custom resource has in its schema.

use serde_json::Value;

use super::network::{parse_cidr, too_many};
use super::{items, label_selector, one_of};
use crate::status::FieldError;

/// Rules of a direction, peers and protocols of a rule, and networks and names of a peer.
const LIMIT: usize = 25;
const PRIORITY_LIMIT: i64 = 1000;
const NAME_LIMIT_CHARS: usize = 100;
const AT_LEAST_ONE: &str = "must have at least one item";
const POD_PEERS: [&str; 2] = ["namespaces", "pods"];
const EGRESS_PEERS: [&str; 5] = ["namespaces", "pods", "nodes", "networks", "domainNames"];
const PROTOCOLS: [&str; 4] = ["tcp", "udp", "sctp", "destinationNamedPort"];

pub(super) fn policy(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    required(spec, "tier", "spec", errors);
    one_of(&spec["tier"], "spec.tier", &["Admin", "Baseline"], errors);
    match spec["priority"].as_i64() {
        None => errors.push(FieldError::required("spec.priority", "")),
        Some(priority) if !(0..=PRIORITY_LIMIT).contains(&priority) => {
            let detail = format!("must be between 0 and {PRIORITY_LIMIT}");
            errors.push(FieldError::invalid("spec.priority", &spec["priority"], detail));
        }
        Some(_) => {}
    }
    one_field(&spec["subject"], "spec.subject", &POD_PEERS, errors);
    pods(&spec["subject"], "spec.subject", errors);
    for (list, peers) in [("ingress", "from"), ("egress", "to")] {
        limit(&spec[list], &format!("spec.{list}"), errors);
        for (index, rule) in items(&spec[list]) {
            self::rule(rule, peers, &format!("spec.{list}[{index}]"), errors);
        }
    }
}

fn rule(rule: &Value, peers: &str, at: &str, errors: &mut Vec<FieldError>) {
    if rule["name"].as_str().is_some_and(|name| name.chars().count() > NAME_LIMIT_CHARS) {
        let detail = format!("may not be more than {NAME_LIMIT_CHARS} characters");
        errors.push(FieldError::invalid(format!("{at}.name"), &rule["name"], detail));
    }
    required(rule, "action", at, errors);
    one_of(&rule["action"], &format!("{at}.action"), &["Accept", "Deny", "Pass"], errors);
    let field = format!("{at}.{peers}");
    limit(&rule[peers], &field, errors);
    if !rule[peers].is_array() {
        errors.push(FieldError::required(field.clone(), AT_LEAST_ONE));
    }
    not_empty(&rule[peers], &field, errors);
    let known: &[&str] = if peers == "from" { &POD_PEERS } else { &EGRESS_PEERS };
    for (index, peer) in items(&rule[peers]) {
        self::peer(peer, known, rule, &format!("{field}[{index}]"), errors);
    }
    let field = format!("{at}.protocols");
    limit(&rule["protocols"], &field, errors);
    not_empty(&rule["protocols"], &field, errors);
    for (index, protocol) in items(&rule["protocols"]) {
        self::protocol(protocol, &format!("{field}[{index}]"), errors);
    }
}

fn peer(peer: &Value, known: &[&str], rule: &Value, at: &str, errors: &mut Vec<FieldError>) {
    one_field(peer, at, known, errors);
    pods(peer, at, errors);
    let is_place = ["nodes", "networks", "domainNames"].iter().any(|key| !peer[*key].is_null());
    let is_named = |(_, protocol): (usize, &Value)| !protocol["destinationNamedPort"].is_null();
    if is_place && items(&rule["protocols"]).any(is_named) {
        let detail = "has no named ports, and a protocol of the rule is `destinationNamedPort`";
        errors.push(FieldError::forbidden(at, detail));
    }
    if !peer["nodes"].is_null() {
        label_selector(&peer["nodes"], &format!("{at}.nodes"), errors);
    }
    let field = format!("{at}.networks");
    set(&peer["networks"], &field, errors);
    for (index, network) in items(&peer["networks"]) {
        if network.as_str().and_then(parse_cidr).is_none() {
            let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            errors.push(FieldError::invalid(format!("{field}[{index}]"), network, detail));
        }
    }
    let field = format!("{at}.domainNames");
    set(&peer["domainNames"], &field, errors);
    for (index, name) in items(&peer["domainNames"]) {
        if !name.as_str().is_some_and(is_domain_name) {
            let detail = "must be a name of at least two labels, the first of which may be *";
            errors.push(FieldError::invalid(format!("{field}[{index}]"), name, detail));
        }
    }
    if !peer["domainNames"].is_null() && rule["action"] != "Accept" {
        let detail = "is for rules whose action is Accept";
        errors.push(FieldError::forbidden(field, detail));
    }
}

/// The two forms of selecting pods.
fn pods(value: &Value, at: &str, errors: &mut Vec<FieldError>) {
    if !value["namespaces"].is_null() {
        label_selector(&value["namespaces"], &format!("{at}.namespaces"), errors);
    }
    for key in ["namespaceSelector", "podSelector"] {
        if !value["pods"][key].is_null() {
            label_selector(&value["pods"][key], &format!("{at}.pods.{key}"), errors);
        }
    }
    if value["pods"].is_object() && value["pods"]["podSelector"].is_null() {
        errors.push(FieldError::required(format!("{at}.pods.podSelector"), ""));
    }
}

fn protocol(protocol: &Value, at: &str, errors: &mut Vec<FieldError>) {
    one_field(protocol, at, &PROTOCOLS, errors);
    for key in &PROTOCOLS[..3] {
        if !protocol[*key].is_object() {
            continue;
        }
        let field = format!("{at}.{key}");
        required(&protocol[*key], "destinationPort", &field, errors);
        let port = &protocol[*key]["destinationPort"];
        if port.is_null() {
            continue;
        }
        let field = format!("{field}.destinationPort");
        one_field(port, &field, &["number", "range"], errors);
        number(&port["number"], &format!("{field}.number"), errors);
        let range = &port["range"];
        if range.is_null() {
            continue;
        }
        for end in ["start", "end"] {
            required(range, end, &format!("{field}.range"), errors);
            number(&range[end], &format!("{field}.range.{end}"), errors);
        }
        if range["start"].as_i64() >= range["end"].as_i64() {
            let detail = "start port must be less than end port";
            errors.push(FieldError::invalid(format!("{field}.range"), range, detail));
        }
    }
}

fn number(port: &Value, field: &str, errors: &mut Vec<FieldError>) {
    if port.as_i64().is_some_and(|number| !(1..=65535).contains(&number)) {
        errors.push(FieldError::invalid(field, port, "must be between 1 and 65535, inclusive"));
    }
}

fn required(value: &Value, key: &str, at: &str, errors: &mut Vec<FieldError>) {
    if value[key].is_null() || value[key] == "" {
        errors.push(FieldError::required(format!("{at}.{key}"), ""));
    }
}

/// Exactly one of the fields is there.
fn one_field(value: &Value, at: &str, known: &[&str], errors: &mut Vec<FieldError>) {
    if known.iter().filter(|key| !value[**key].is_null()).count() != 1 {
        let detail = format!("must have exactly one of {}", known.join(", "));
        errors.push(FieldError::invalid(at, value, detail));
    }
}

fn limit(list: &Value, field: &str, errors: &mut Vec<FieldError>) {
    if list.as_array().is_some_and(|list| list.len() > LIMIT) {
        errors.push(too_many(field.to_owned(), LIMIT));
    }
}

/// To leave a list out means something else than to give none.
fn not_empty(list: &Value, field: &str, errors: &mut Vec<FieldError>) {
    if list.as_array().is_some_and(Vec::is_empty) {
        errors.push(FieldError::invalid(field, list, AT_LEAST_ONE));
    }
}

/// A list in which nothing is twice.
fn set(list: &Value, field: &str, errors: &mut Vec<FieldError>) {
    limit(list, field, errors);
    not_empty(list, field, errors);
    let all = list.as_array().map(Vec::as_slice).unwrap_or_default();
    for (index, item) in all.iter().enumerate() {
        if all[..index].contains(item) {
            errors.push(FieldError::duplicate(format!("{field}[{index}]"), item));
        }
    }
}

/// `*.` at most once and in front; then labels of letters, digits, and inside of them dashes and underscores; a final dot may
/// be there.
fn is_domain_name(name: &str) -> bool {
    let name = name.strip_prefix("*.").unwrap_or(name);
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_label = |label: &str| {
        let is_end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        is_end(label.chars().next())
            && is_end(label.chars().last())
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
    };
    name.contains('.') && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn wrong(spec: Value) -> Vec<String> {
        let mut errors = Vec::new();
        policy(&json!({ "spec": spec }), &mut errors);
        errors.into_iter().map(|error| error.field).collect()
    }

    fn with(rule: Value) -> Value {
        json!({ "tier": "Admin", "priority": 5, "subject": {"namespaces": {}}, "egress": [rule] })
    }

    #[test]
    fn what_the_schema_refuses_is_refused() {
        let good = json!({ "action": "Deny", "to": [{"networks": ["10.0.0.0/8", "fd00::/8"]}],
            "protocols": [{"tcp": {"destinationPort": {"range": {"start": 1, "end": 9}}}}] });
        assert!(wrong(with(good)).is_empty());
        let subject = json!({ "tier": "Top", "priority": 1001, "subject": {} });
        assert_eq!(wrong(subject), ["spec.tier", "spec.priority", "spec.subject"]);
        let rule = "spec.egress[0]";
        for (field, bad) in [
            (".to", json!({ "action": "Deny", "to": [] })),
            (".action", json!({ "action": "Allow", "to": [{"namespaces": {}}] })),
            (".to[0]", json!({ "action": "Deny", "to": [{}] })),
            (".to[0]", json!({ "action": "Deny", "to": [{"nodes": {}, "namespaces": {}}] })),
            (".to[0].networks[0]", json!({ "action": "Deny", "to": [{"networks": ["10.0.0.0"]}] })),
            (".to[0].domainNames", json!({ "action": "Deny", "to": [{"domainNames": ["a.b"]}] })),
            (
                ".protocols",
                json!({ "action": "Accept", "to": [{"namespaces": {}}], "protocols": [] }),
            ),
            (".to[0].networks", json!({ "action": "Deny", "to": [{"networks": []}] })),
            (
                ".to[0].networks[1]",
                json!({ "action": "Deny", "to": [{"networks": ["10.0.0.0/8", "10.0.0.0/8"]}] }),
            ),
            (".to[0].domainNames", json!({ "action": "Accept", "to": [{"domainNames": []}] })),
            (
                ".to[0].domainNames[1]",
                json!({ "action": "Accept", "to": [{"domainNames": ["*.a.b", "a.*.b"]}] }),
            ),
            (
                ".to[0]",
                json!({ "action": "Deny", "to": [{"nodes": {}}], "protocols": [{"destinationNamedPort": "web"}] }),
            ),
            (
                ".protocols[0].udp.destinationPort",
                json!({ "action": "Deny", "to": [{"namespaces": {}}], "protocols": [{"udp": {}}] }),
            ),
            (
                ".protocols[0].tcp.destinationPort.range",
                json!({ "action": "Deny", "to": [{"namespaces": {}}],
                    "protocols": [{"tcp": {"destinationPort": {"range": {"start": 9, "end": 9}}}}] }),
            ),
        ] {
            assert_eq!(wrong(with(bad)), [format!("{rule}{field}")]);
        }
        let mut ingress = with(json!({}));
        ingress["egress"] = json!([]);
        ingress["ingress"] = json!([{ "action": "Deny", "from": [{"networks": ["10.0.0.0/8"]}] }]);
        assert_eq!(wrong(ingress), ["spec.ingress[0].from[0]"]);
    }
}
