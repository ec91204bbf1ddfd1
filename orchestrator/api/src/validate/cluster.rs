//! Rules of Nodes, Leases, Events and PriorityClasses.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::network::parse_cidr;
use super::{at_least, immutable, items, one_of};
use crate::status::FieldError;
use crate::{Quantity, names, priority};

const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "PreferNoSchedule"];

pub(super) fn node(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    let mut seen = BTreeSet::new();
    for (index, taint) in items(&spec["taints"]) {
        let at = format!("spec.taints[{index}]");
        if let Err(why) = names::is_qualified_name(taint["key"].as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid(format!("{at}.key"), &taint["key"], why));
        }
        if let Err(why) = names::is_label_value(taint["value"].as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid(format!("{at}.value"), &taint["value"], why));
        }
        let effect = taint["effect"].as_str().unwrap_or_default();
        if effect.is_empty() {
            errors.push(FieldError::required(format!("{at}.effect"), ""));
        } else if !EFFECTS.contains(&effect) {
            errors.push(FieldError::not_supported(
                format!("{at}.effect"),
                &taint["effect"],
                &EFFECTS,
            ));
        }
        if !seen.insert((taint["key"].to_string(), effect)) {
            let mut duplicate = FieldError::duplicate(at, taint);
            duplicate.detail = "taints must be unique by key and effect pair".to_owned();
            errors.push(duplicate);
        }
    }
    for (index, cidr) in items(&spec["podCIDRs"]) {
        if parse_cidr(cidr.as_str().unwrap_or_default()).is_none() {
            let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            errors.push(FieldError::invalid(format!("spec.podCIDRs[{index}]"), cidr, detail));
        }
    }
    for list in ["capacity", "allocatable"] {
        for (name, quantity) in object["status"][list].as_object().into_iter().flatten() {
            let field = format!("status.{list}[{name}]");
            match Quantity::parse(quantity.as_str().unwrap_or_default()) {
                Ok(amount) if amount.is_negative() => {
                    errors.push(FieldError::invalid(
                        field,
                        quantity,
                        "must be greater than or equal to 0",
                    ));
                }
                Ok(_) => {}
                Err(error) => errors.push(FieldError::invalid(field, quantity, error.to_string())),
            }
        }
    }
}

pub(super) fn priority_class(object: &Value, errors: &mut Vec<FieldError>) {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let value = object["value"].as_i64().unwrap_or(0);
    one_of(&object["preemptionPolicy"], "preemptionPolicy", &priority::POLICIES, errors);
    if name.starts_with(priority::RESERVED_PREFIX) {
        let built_in = priority::SYSTEM_CLASSES.iter().any(|(known, number, _)| {
            (*known, *number) == (name, value) && object["globalDefault"] != true
        });
        if !built_in {
            errors.push(FieldError::forbidden(
                "metadata.name",
                "priority class names with 'system-' prefix are reserved for system use only",
            ));
        }
    } else if value > priority::HIGHEST {
        errors.push(FieldError::forbidden(
            "value",
            format!("maximum allowed value of a user defined priority is {}", priority::HIGHEST),
        ));
    }
}

/// Pods carry the number and the policy of their class: both stay what they were.
pub(super) fn priority_class_update(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    if new["value"].as_i64().unwrap_or(0) != old["value"].as_i64().unwrap_or(0) {
        errors.push(FieldError::forbidden("value", "may not be changed in an update."));
    }
    immutable("preemptionPolicy", &new["preemptionPolicy"], &old["preemptionPolicy"], errors);
}

/// A node keeps its pod network and its identity at the provider once it has them.
pub(super) fn node_update(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let (before, after) = (&old["spec"]["podCIDRs"], &new["spec"]["podCIDRs"]);
    if items(before).next().is_some() && before != after {
        errors.push(FieldError::forbidden(
            "spec.podCIDRs",
            "node updates may not change podCIDR except from \"\" to valid",
        ));
    }
    let (before, after) = (&old["spec"]["providerID"], &new["spec"]["providerID"]);
    if before.as_str().is_some_and(|id| !id.is_empty()) && before != after {
        errors.push(FieldError::forbidden(
            "spec.providerID",
            "node updates may not change providerID except from \"\" to valid",
        ));
    }
}

pub(super) fn lease(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    if spec["leaseDurationSeconds"].as_i64().is_some_and(|seconds| seconds <= 0) {
        let field = "spec.leaseDurationSeconds";
        errors.push(FieldError::invalid(
            field,
            &spec["leaseDurationSeconds"],
            "must be greater than 0",
        ));
    }
    at_least(0, &spec["leaseTransitions"], "spec.leaseTransitions", errors);
}

/// An event lives in the namespace of what it is about; for what has none, in `default`.
pub(super) fn event(object: &Value, errors: &mut Vec<FieldError>) {
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    let involved = object["involvedObject"]["namespace"].as_str().unwrap_or_default();
    let fits = if involved.is_empty() {
        matches!(namespace, "" | "default" | "kube-system")
    } else {
        namespace == involved
    };
    if !fits {
        let field = "involvedObject.namespace";
        errors.push(FieldError::invalid(field, &json!(involved), "does not match event.namespace"));
    }
    at_least(0, &object["count"], "count", errors);
}
