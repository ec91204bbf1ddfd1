//! Rules of Deployments and ReplicaSets.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{annotations, at_least, label_selector, labels};
use crate::status::FieldError;

pub(super) fn deployment(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    common(spec, errors);
    strategy(&spec["strategy"], errors);
    at_least(0, &spec["revisionHistoryLimit"], "spec.revisionHistoryLimit", errors);
    at_least(0, &spec["progressDeadlineSeconds"], "spec.progressDeadlineSeconds", errors);
    let ready = spec["minReadySeconds"].as_i64().unwrap_or(0);
    if spec["progressDeadlineSeconds"].as_i64().is_some_and(|deadline| deadline <= ready) {
        let field = "spec.progressDeadlineSeconds";
        let detail = "must be greater than minReadySeconds";
        errors.push(FieldError::invalid(field, &spec["progressDeadlineSeconds"], detail));
    }
}

pub(super) fn replica_set(object: &Value, errors: &mut Vec<FieldError>) {
    common(&object["spec"], errors);
}

fn common(spec: &Value, errors: &mut Vec<FieldError>) {
    at_least(0, &spec["replicas"], "spec.replicas", errors);
    at_least(0, &spec["minReadySeconds"], "spec.minReadySeconds", errors);
    let template = &spec["template"];
    if spec["selector"].is_null() {
        errors.push(FieldError::required("spec.selector", ""));
    } else if let Some(selector) = label_selector(&spec["selector"], "spec.selector", errors) {
        let own: BTreeMap<String, String> =
            serde_json::from_value(template["metadata"]["labels"].clone()).unwrap_or_default();
        if selector.is_everything() {
            let detail = "empty selector is invalid for deployment";
            errors.push(FieldError::invalid("spec.selector", &spec["selector"], detail));
        } else if !selector.matches(&own) {
            let detail = "`selector` does not match template `labels`";
            let field = "spec.template.metadata.labels";
            errors.push(FieldError::invalid(field, &template["metadata"]["labels"], detail));
        }
    }
    labels(&template["metadata"]["labels"], "spec.template.labels", errors);
    annotations(&template["metadata"]["annotations"], "spec.template.annotations", errors);
    super::pod::spec(&template["spec"], "spec.template.spec", errors);
    let restart = &template["spec"]["restartPolicy"];
    if matches!(restart.as_str(), Some("Never" | "OnFailure")) {
        errors.push(FieldError::not_supported(
            "spec.template.spec.restartPolicy",
            restart,
            &["Always"],
        ));
    }
    if !template["spec"]["activeDeadlineSeconds"].is_null() {
        let detail = "activeDeadlineSeconds in ReplicaSet is not Supported";
        errors.push(FieldError::forbidden("spec.template.spec.activeDeadlineSeconds", detail));
    }
    if !template["spec"]["ephemeralContainers"].is_null() {
        let detail = "ephemeral containers not allowed in pod template";
        errors.push(FieldError::forbidden("spec.template.spec.ephemeralContainers", detail));
    }
}

fn strategy(strategy: &Value, errors: &mut Vec<FieldError>) {
    let at = "spec.strategy";
    match strategy["type"].as_str() {
        Some("RollingUpdate") => {
            let rolling = &strategy["rollingUpdate"];
            for field in ["maxUnavailable", "maxSurge"] {
                count_or_percent(&rolling[field], &format!("{at}.rollingUpdate.{field}"), errors);
            }
            let zero = |value: &Value| *value == 0 || *value == "0%";
            if zero(&rolling["maxUnavailable"]) && zero(&rolling["maxSurge"]) {
                let detail = "may not be 0 when `maxSurge` is 0";
                let field = format!("{at}.rollingUpdate.maxUnavailable");
                errors.push(FieldError::invalid(field, &rolling["maxUnavailable"], detail));
            }
            let share = rolling["maxUnavailable"].as_str().and_then(|text| text.strip_suffix('%'));
            if share
                .and_then(|digits| digits.parse::<u32>().ok())
                .is_some_and(|percent| percent > 100)
            {
                let field = format!("{at}.rollingUpdate.maxUnavailable");
                errors.push(FieldError::invalid(
                    field,
                    &rolling["maxUnavailable"],
                    "must not be greater than 100%",
                ));
            }
        }
        Some("Recreate") => {
            if !strategy["rollingUpdate"].is_null() {
                let detail = "may not be specified when strategy `type` is 'Recreate'";
                errors.push(FieldError::forbidden(format!("{at}.rollingUpdate"), detail));
            }
        }
        _ => {
            let allowed = ["Recreate", "RollingUpdate"];
            errors.push(FieldError::not_supported(
                format!("{at}.type"),
                &strategy["type"],
                &allowed,
            ));
        }
    }
}

fn count_or_percent(value: &Value, field: &str, errors: &mut Vec<FieldError>) {
    match value {
        Value::Null => {}
        Value::String(text) => {
            let digits = text.strip_suffix('%').unwrap_or_default();
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                let detail = "must be an integer or percentage (e.g '5%%')";
                errors.push(FieldError::invalid(field, value, detail));
            }
        }
        _ => at_least(0, value, field, errors),
    }
}
