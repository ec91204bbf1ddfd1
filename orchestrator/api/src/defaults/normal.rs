//! The stored form of what may be written in several ways: nulls and quantities.

use serde_json::Value;

use super::{each, inside};
use crate::Quantity;

/// Removes fields that are `null`: a null field is an absent one.
pub(super) fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, field| !field.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Writes the quantities of a pod spec in their canonical form: `0.5` and `500m` are one value, and `cpu: 1` is a
/// number in YAML that has to become a text.
pub(super) fn pod_quantities(spec: &mut Value) {
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        each(spec, list, |container| {
            inside(container, "resources", resources);
            each(container, "env", |env| {
                inside(env, "valueFrom", |source| inside(source, "resourceFieldRef", divisor));
            });
        });
    }
    inside(spec, "resources", resources);
    inside(spec, "overhead", quantities);
    each(spec, "volumes", |volume| {
        inside(volume, "emptyDir", |source| {
            if let Some(limit) = source.get_mut("sizeLimit") {
                quantity(limit);
            }
        });
        inside(volume, "downwardAPI", items);
        inside(volume, "projected", |source| {
            each(source, "sources", |part| inside(part, "downwardAPI", items));
        });
    });
}

fn items(source: &mut Value) {
    each(source, "items", |item| inside(item, "resourceFieldRef", divisor));
}

/// An absent divisor is stored as `0`, which means 1.
fn divisor(field: &mut Value) {
    super::set(field, "divisor", Value::String("0".to_owned()));
    if let Some(divisor) = field.get_mut("divisor") {
        quantity(divisor);
    }
}

fn resources(resources: &mut Value) {
    inside(resources, "limits", quantities);
    inside(resources, "requests", quantities);
}

/// Quantities by name. What is finer than a thousandth is rounded up.
pub(super) fn quantities(map: &mut Value) {
    map.as_object_mut().into_iter().flatten().for_each(|(_, value)| quantity(value));
}

/// What is no quantity stays as it is, for validation to name.
fn quantity(value: &mut Value) {
    let text = match &*value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return,
    };
    if let Ok(parsed) = Quantity::parse(&text) {
        *value = Value::String(parsed.rounded_to_milli().to_string());
    }
}
