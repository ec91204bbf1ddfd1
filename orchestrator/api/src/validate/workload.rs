//! Rules of Deployments, ReplicaSets and NetworkPolicies.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;

use crate::status::FieldError;
use crate::{Selector, names};

pub(super) fn deployment(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    common(spec, errors);
    let strategy = &spec["strategy"];
    match strategy["type"].as_str() {
        Some("RollingUpdate") => {
            let rolling = &strategy["rollingUpdate"];
            let at = "spec.strategy.rollingUpdate";
            for field in ["maxUnavailable", "maxSurge"] {
                count_or_percent(&rolling[field], &format!("{at}.{field}"), errors);
            }
            let zero = |value: &Value| *value == 0 || *value == "0%" || *value == "0";
            if zero(&rolling["maxUnavailable"]) && zero(&rolling["maxSurge"]) {
                errors.push(FieldError::invalid(
                    format!("{at}.maxUnavailable"),
                    &rolling["maxUnavailable"],
                    "may not be 0 when `maxSurge` is 0",
                ));
            }
        }
        Some("Recreate") if !strategy["rollingUpdate"].is_null() => {
            errors.push(FieldError::forbidden(
                "spec.strategy.rollingUpdate",
                "may not be specified when strategy `type` is 'Recreate'",
            ))
        }
        Some("Recreate") | None => {}
        Some(_) => {
            errors.push(FieldError::not_supported(
                "spec.strategy.type",
                &strategy["type"],
                &["Recreate", "RollingUpdate"],
            ));
        }
    }
    let (deadline, ready) =
        (spec["progressDeadlineSeconds"].as_i64(), spec["minReadySeconds"].as_i64().unwrap_or(0));
    if deadline.is_some_and(|deadline| deadline <= ready) {
        errors.push(FieldError::invalid(
            "spec.progressDeadlineSeconds",
            &spec["progressDeadlineSeconds"],
            "must be greater than minReadySeconds",
        ));
    }
}

pub(super) fn replica_set(object: &Value, errors: &mut Vec<FieldError>) {
    common(&object["spec"], errors);
}

fn common(spec: &Value, errors: &mut Vec<FieldError>) {
    for field in ["replicas", "minReadySeconds", "revisionHistoryLimit"] {
        if spec[field].as_i64().is_some_and(|number| number < 0) {
            errors.push(FieldError::invalid(
                format!("spec.{field}"),
                &spec[field],
                "must be greater than or equal to 0",
            ));
        }
    }
    let selector = selector(&spec["selector"], "spec.selector", errors);
    let template = &spec["template"];
    let labels: BTreeMap<String, String> =
        serde_json::from_value(template["metadata"]["labels"].clone()).unwrap_or_default();
    if let Some(selector) = selector {
        if selector.is_everything() {
            errors.push(FieldError::invalid(
                "spec.selector",
                &spec["selector"],
                "empty selector is invalid for deployment",
            ));
        } else if !selector.matches(&labels) {
            errors.push(FieldError::invalid(
                "spec.template.metadata.labels",
                &template["metadata"]["labels"],
                "`selector` does not match template `labels`",
            ));
        }
    }
    for (key, value) in template["metadata"]["labels"].as_object().into_iter().flatten() {
        super::label(key, value, "spec.template.metadata.labels", errors);
    }
    super::pod::spec(&template["spec"], "spec.template.spec", errors);
    let restart = &template["spec"]["restartPolicy"];
    if restart.as_str().is_some_and(|policy| policy != "Always") {
        errors.push(FieldError::not_supported(
            "spec.template.spec.restartPolicy",
            restart,
            &["Always"],
        ));
    }
}

fn selector(value: &Value, field: &str, errors: &mut Vec<FieldError>) -> Option<Selector> {
    if value.is_null() {
        errors.push(FieldError::required(field, ""));
        return None;
    }
    let parsed: LabelSelector = match serde_json::from_value(value.clone()) {
        Ok(parsed) => parsed,
        Err(error) => {
            errors.push(FieldError::invalid(field, value, error.to_string()));
            return None;
        }
    };
    for (key, value) in parsed.match_labels.iter().flatten() {
        if let Err(why) = names::is_qualified_name(key).and_then(|()| names::is_label_value(value))
        {
            errors.push(FieldError::invalid(
                format!("{field}.matchLabels"),
                &Value::String(key.clone()),
                why,
            ));
        }
    }
    match Selector::from_label_selector(&parsed) {
        Ok(selector) => Some(selector),
        Err(error) => {
            errors.push(FieldError::invalid(format!("{field}.matchExpressions"), value, error.0));
            None
        }
    }
}

fn count_or_percent(value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    let good = match value {
        Value::Null => true,
        Value::Number(number) => number.as_i64().is_some_and(|number| number >= 0),
        Value::String(text) => text
            .strip_suffix('%')
            .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())),
        _ => false,
    };
    if !good {
        errors.push(FieldError::invalid(
            field,
            value,
            "must be an integer or percentage (e.g '5%')",
        ));
    }
}

pub(super) fn network_policy(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    for (index, kind) in spec["policyTypes"].as_array().into_iter().flatten().enumerate() {
        if !matches!(kind.as_str(), Some("Ingress" | "Egress")) {
            errors.push(FieldError::not_supported(
                format!("spec.policyTypes[{index}]"),
                kind,
                &["Egress", "Ingress"],
            ));
        }
    }
    for (list, peers) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in spec[list].as_array().into_iter().flatten().enumerate() {
            for (place, peer) in rule[peers].as_array().into_iter().flatten().enumerate() {
                let at = format!("spec.{list}[{index}].{peers}[{place}]");
                let (block, others) = (
                    !peer["ipBlock"].is_null(),
                    !peer["podSelector"].is_null() || !peer["namespaceSelector"].is_null(),
                );
                if block && others {
                    errors.push(FieldError::forbidden(
                        at,
                        "may not specify both ipBlock and another peer",
                    ));
                } else if !block && !others {
                    errors.push(FieldError::required(at, "must specify a peer"));
                }
            }
        }
    }
}
