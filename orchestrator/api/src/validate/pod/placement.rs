//! Rules of what a pod demands of its place: tolerations, affinity, spreading.

use serde_json::Value;

use super::super::{items, label_selector, one_of};
use crate::names;
use crate::status::FieldError;

const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "PreferNoSchedule"];

pub(super) fn tolerations(list: &Value, at: &str, errors: &mut Vec<FieldError>) {
    for (index, toleration) in items(list) {
        let at = format!("{at}[{index}]");
        let key = toleration["key"].as_str().unwrap_or_default();
        if !key.is_empty()
            && let Err(why) = names::is_qualified_name(key)
        {
            errors.push(FieldError::invalid(format!("{at}.key"), &toleration["key"], why));
        }
        let operator = toleration["operator"].as_str().unwrap_or_default();
        let effect = toleration["effect"].as_str().unwrap_or_default();
        if key.is_empty() && operator != "Exists" {
            let detail = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            errors.push(FieldError::invalid(
                format!("{at}.operator"),
                &toleration["operator"],
                detail,
            ));
        }
        if !toleration["tolerationSeconds"].is_null() && effect != "NoExecute" {
            let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            errors.push(FieldError::invalid(format!("{at}.effect"), &toleration["effect"], detail));
        }
        match operator {
            "" | "Equal" => {
                if let Err(why) =
                    names::is_label_value(toleration["value"].as_str().unwrap_or_default())
                {
                    errors.push(FieldError::invalid(
                        format!("{at}.operator"),
                        &toleration["value"],
                        why,
                    ));
                }
            }
            "Exists" => {
                if toleration["value"].as_str().is_some_and(|value| !value.is_empty()) {
                    let detail = "value must be empty when `operator` is 'Exists'";
                    errors.push(FieldError::invalid(format!("{at}.operator"), toleration, detail));
                }
            }
            _ => {
                let field = format!("{at}.operator");
                errors.push(FieldError::not_supported(
                    field,
                    &toleration["operator"],
                    &["Equal", "Exists"],
                ));
            }
        }
        if !effect.is_empty() {
            one_of(&toleration["effect"], &format!("{at}.effect"), &EFFECTS, errors);
        }
    }
}

pub(super) fn affinity(affinity: &Value, at: &str, errors: &mut Vec<FieldError>) {
    let required = "requiredDuringSchedulingIgnoredDuringExecution";
    let preferred = "preferredDuringSchedulingIgnoredDuringExecution";

    let node = &affinity["nodeAffinity"];
    let node_at = format!("{at}.nodeAffinity");
    if !node[required].is_null() {
        let terms_at = format!("{node_at}.{required}.nodeSelectorTerms");
        let terms = &node[required]["nodeSelectorTerms"];
        if items(terms).next().is_none() {
            errors.push(FieldError::required(
                terms_at.clone(),
                "must have at least one node selector term",
            ));
        }
        for (index, term) in items(terms) {
            node_term(term, &format!("{terms_at}[{index}]"), errors);
        }
    }
    for (index, term) in items(&node[preferred]) {
        let at = format!("{node_at}.{preferred}[{index}]");
        weight(term, &at, errors);
        node_term(&term["preference"], &format!("{at}.preference"), errors);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        for (index, term) in items(&affinity[kind][required]) {
            pod_term(term, &format!("{at}.{kind}.{required}[{index}]"), errors);
        }
        for (index, term) in items(&affinity[kind][preferred]) {
            let at = format!("{at}.{kind}.{preferred}[{index}]");
            weight(term, &at, errors);
            pod_term(&term["podAffinityTerm"], &format!("{at}.podAffinityTerm"), errors);
        }
    }
}

fn weight(term: &Value, at: &str, errors: &mut Vec<FieldError>) {
    if !term["weight"].as_i64().is_some_and(|weight| (1..=100).contains(&weight)) {
        errors.push(FieldError::invalid(
            format!("{at}.weight"),
            &term["weight"],
            "must be in the range 1-100",
        ));
    }
}

fn node_term(term: &Value, at: &str, errors: &mut Vec<FieldError>) {
    for (index, requirement) in items(&term["matchExpressions"]) {
        let at = format!("{at}.matchExpressions[{index}]");
        let values = requirement["values"].as_array().map_or(0, Vec::len);
        match requirement["operator"].as_str().unwrap_or_default() {
            "In" | "NotIn" if values == 0 => {
                let detail = "must be specified when `operator` is 'In' or 'NotIn'";
                errors.push(FieldError::required(format!("{at}.values"), detail));
            }
            "Exists" | "DoesNotExist" if values > 0 => {
                let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                errors.push(FieldError::forbidden(format!("{at}.values"), detail));
            }
            "Gt" | "Lt" if values != 1 => {
                let detail = "must be specified single value when `operator` is 'Lt' or 'Gt'";
                errors.push(FieldError::required(format!("{at}.values"), detail));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            _ => {
                let detail = "not a valid selector operator";
                errors.push(FieldError::invalid(
                    format!("{at}.operator"),
                    &requirement["operator"],
                    detail,
                ));
            }
        }
        if let Err(why) = names::is_qualified_name(requirement["key"].as_str().unwrap_or_default())
        {
            errors.push(FieldError::invalid(format!("{at}.key"), &requirement["key"], why));
        }
    }
    for (index, requirement) in items(&term["matchFields"]) {
        let at = format!("{at}.matchFields[{index}]");
        if !matches!(requirement["operator"].as_str(), Some("In" | "NotIn")) {
            let detail = "not a valid selector operator";
            errors.push(FieldError::invalid(
                format!("{at}.operator"),
                &requirement["operator"],
                detail,
            ));
        } else if requirement["values"].as_array().map_or(0, Vec::len) != 1 {
            let detail =
                "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
            errors.push(FieldError::required(format!("{at}.values"), detail));
        }
        if requirement["key"] != "metadata.name" {
            let detail = "not a valid field selector key";
            errors.push(FieldError::invalid(format!("{at}.key"), &requirement["key"], detail));
        }
    }
}

fn pod_term(term: &Value, at: &str, errors: &mut Vec<FieldError>) {
    for field in ["labelSelector", "namespaceSelector"] {
        if !term[field].is_null() {
            label_selector(&term[field], &format!("{at}.{field}"), errors);
        }
    }
    for (index, namespace) in items(&term["namespaces"]) {
        if let Err(why) = names::is_dns1123_label(namespace.as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid(format!("{at}.namespaces[{index}]"), namespace, why));
        }
    }
    topology_key(term, at, "can not be empty", errors);
}

fn topology_key(object: &Value, at: &str, empty: &str, errors: &mut Vec<FieldError>) {
    let key = object["topologyKey"].as_str().unwrap_or_default();
    if key.is_empty() {
        errors.push(FieldError::required(format!("{at}.topologyKey"), empty));
    } else if let Err(why) = names::is_qualified_name(key) {
        errors.push(FieldError::invalid(format!("{at}.topologyKey"), &object["topologyKey"], why));
    }
}

pub(super) fn spread(list: &Value, at: &str, errors: &mut Vec<FieldError>) {
    let actions = ["DoNotSchedule", "ScheduleAnyway"];
    for (index, constraint) in items(list) {
        let at = format!("{at}[{index}]");
        if constraint["maxSkew"].as_i64().unwrap_or(0) <= 0 {
            errors.push(FieldError::invalid(
                format!("{at}.maxSkew"),
                &constraint["maxSkew"],
                "must be greater than zero",
            ));
        }
        topology_key(constraint, &at, "can not be empty", errors);
        if !constraint["whenUnsatisfiable"].as_str().is_some_and(|action| actions.contains(&action))
        {
            let field = format!("{at}.whenUnsatisfiable");
            errors.push(FieldError::not_supported(
                field,
                &constraint["whenUnsatisfiable"],
                &actions,
            ));
        }
        if !constraint["minDomains"].is_null() {
            if constraint["minDomains"].as_i64().unwrap_or(0) <= 0 {
                let field = format!("{at}.minDomains");
                errors.push(FieldError::invalid(
                    field,
                    &constraint["minDomains"],
                    "must be greater than zero",
                ));
            }
            if constraint["whenUnsatisfiable"] != "DoNotSchedule" {
                let detail = "can only use minDomains if whenUnsatisfiable=DoNotSchedule, not ScheduleAnyway";
                errors.push(FieldError::invalid(
                    format!("{at}.minDomains"),
                    &constraint["minDomains"],
                    detail,
                ));
            }
        }
        for field in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            one_of(&constraint[field], &format!("{at}.{field}"), &["Honor", "Ignore"], errors);
        }
        if !constraint["labelSelector"].is_null() {
            label_selector(&constraint["labelSelector"], &format!("{at}.labelSelector"), errors);
        }
    }
}
