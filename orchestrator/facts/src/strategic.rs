//! Strategic merge patch (Kubernetes, "Strategic Merge Patch"): lists of objects are merged by a key, others are
//! replaced, and directives say what to delete, replace or keep.

use serde_json::{Map, Value};

use crate::table::{Facts, Field, FieldType, Shape, TypeId};

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM_PRIMITIVE: &str = "$deleteFromPrimitiveList/";
const ELEMENT_ORDER: &str = "$setElementOrder/";

/// A patch that cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("unknown patch directive {0:?}; known are \"replace\", \"merge\" and \"delete\"")]
    Directive(String),
    #[error("map: {item} does not contain declared merge key: {key}")]
    NoMergeKey { item: String, key: String },
    #[error("a patch is an object, not {0}")]
    NoObject(String),
}

/// Applies `patch` to `original`, both of the type `id`.
///
/// # Errors
/// The patch has an unknown directive, or a list element without its merge key.
pub fn apply(facts: &Facts, id: TypeId, original: Value, patch: Value) -> Result<Value, Error> {
    let Value::Object(patch) = patch else { return Err(Error::NoObject(patch.to_string())) };
    let original = match original {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    Ok(merge(facts, Some(id), original, patch)?.map_or(Value::Null, Value::Object))
}

/// What the directive of an object says.
enum Directive {
    Merge,
    Replace,
    Delete,
}

fn directive(patch: &Map<String, Value>) -> Result<Directive, Error> {
    match patch.get(DIRECTIVE) {
        None => Ok(Directive::Merge),
        Some(Value::String(text)) if text == "merge" => Ok(Directive::Merge),
        Some(Value::String(text)) if text == "replace" => Ok(Directive::Replace),
        Some(Value::String(text)) if text == "delete" => Ok(Directive::Delete),
        Some(other) => {
            Err(Error::Directive(other.as_str().map_or_else(|| other.to_string(), str::to_owned)))
        }
    }
}

/// Merges objects; `None` = deleted by a directive. Without a type all is merged as plain JSON.
fn merge(
    facts: &Facts,
    id: Option<TypeId>,
    mut original: Map<String, Value>,
    mut patch: Map<String, Value>,
) -> Result<Option<Map<String, Value>>, Error> {
    match directive(&patch)? {
        Directive::Delete => return Ok(None),
        Directive::Replace => {
            patch.shift_remove(DIRECTIVE);
            return Ok(Some(plain(patch)));
        }
        Directive::Merge => {
            patch.shift_remove(DIRECTIVE);
        }
    }
    if let Some(Value::Array(keep)) = patch.shift_remove(RETAIN_KEYS) {
        original.retain(|key, _| keep.iter().any(|kept| kept == key));
    }
    let mut orders = Vec::new();
    let keys: Vec<String> = patch.keys().cloned().collect();
    for key in keys {
        let Some(value) = patch.shift_remove(&key) else { continue };
        if let Some(field) = key.strip_prefix(DELETE_FROM_PRIMITIVE) {
            if let (Some(Value::Array(list)), Value::Array(gone)) =
                (original.get_mut(field), &value)
            {
                list.retain(|item| !gone.contains(item));
            }
        } else if let Some(field) = key.strip_prefix(ELEMENT_ORDER) {
            orders.push((field.to_owned(), value));
        } else if value.is_null() {
            original.shift_remove(&key);
        } else {
            let field = id.and_then(|id| facts.field(id, &key));
            let before = original.get(&key).cloned();
            match merge_value(facts, field, before, value)? {
                Some(merged) => {
                    original.insert(key, merged);
                }
                None => {
                    original.shift_remove(&key);
                }
            }
        }
    }
    for (name, order) in orders {
        let field = id.and_then(|id| facts.field(id, &name));
        if let (Some(Value::Array(list)), Value::Array(order)) = (original.get_mut(&name), order) {
            sort(list, &order, field.and_then(|field| field.merge_key.as_deref()));
        }
    }
    Ok(Some(original))
}

fn merge_value(
    facts: &Facts,
    field: Option<&Field>,
    before: Option<Value>,
    patch: Value,
) -> Result<Option<Value>, Error> {
    match (before, patch) {
        (before, Value::Object(patch)) => {
            let before = match before {
                Some(Value::Object(map)) => map,
                _ => Map::new(),
            };
            let replaces = field.is_some_and(|field| field.strategy.as_deref() == Some("replace"));
            if replaces {
                return Ok(Some(Value::Object(plain(patch))));
            }
            let id = field.and_then(|field| match &field.kind {
                FieldType::Message(id) if matches!(facts.get(*id).shape, Shape::Fields(_)) => {
                    Some(*id)
                }
                _ => None,
            });
            Ok(merge(facts, id, before, patch)?.map(Value::Object))
        }
        (before, Value::Array(patch)) => {
            let merges = field
                .and_then(|field| field.strategy.as_deref())
                .is_some_and(|strategy| strategy.split(',').any(|part| part == "merge"));
            let before = match before {
                Some(Value::Array(list)) => list,
                _ => Vec::new(),
            };
            let Some(field) = field.filter(|_| merges) else {
                return Ok(Some(Value::Array(plain_list(patch))));
            };
            merge_list(facts, field, before, patch).map(|list| Some(Value::Array(list)))
        }
        (_, other) => Ok(Some(other)),
    }
}

fn merge_list(
    facts: &Facts,
    field: &Field,
    mut list: Vec<Value>,
    patch: Vec<Value>,
) -> Result<Vec<Value>, Error> {
    let Some(key) = field.merge_key.as_deref() else {
        // A list of plain values is a set.
        for item in patch {
            if !list.contains(&item) {
                list.push(item);
            }
        }
        return Ok(list);
    };
    let item_type = match &field.kind {
        FieldType::List(item) => match **item {
            FieldType::Message(id) => Some(id),
            _ => None,
        },
        _ => None,
    };
    // `{"$patch": "replace"}` as an element replaces the whole list by the others.
    let replaces = patch.iter().any(|item| {
        item[DIRECTIVE] == "replace" && item.as_object().is_some_and(|map| map.len() == 1)
    });
    if replaces {
        return Ok(plain_list(
            patch.into_iter().filter(|item| item[DIRECTIVE] != "replace").collect(),
        ));
    }
    for item in patch {
        let Value::Object(item) = item else { continue };
        let Some(wanted) = item.get(key).cloned() else {
            return Err(Error::NoMergeKey {
                item: Value::Object(item).to_string(),
                key: key.to_owned(),
            });
        };
        let place = list.iter().position(|old| old.get(key) == Some(&wanted));
        let before = match place.map(|place| list[place].clone()) {
            Some(Value::Object(map)) => map,
            _ => Map::new(),
        };
        match (merge(facts, item_type, before, item)?, place) {
            (Some(merged), Some(place)) => list[place] = Value::Object(merged),
            (Some(merged), None) => list.push(Value::Object(merged)),
            (None, _) => list.retain(|old| old.get(key) != Some(&wanted)),
        }
    }
    Ok(list)
}

/// Brings the elements that `order` names into its order; the others keep their places relative to what stood
/// before them.
fn sort(list: &mut Vec<Value>, order: &[Value], key: Option<&str>) {
    let identity = |item: &Value| key.map_or_else(|| item.clone(), |key| item[key].clone());
    let wanted: Vec<Value> = order.iter().map(identity).collect();
    let mut named: Vec<Option<Value>> = vec![None; wanted.len()];
    let mut rest: Vec<(usize, Value)> = Vec::new();
    for (index, item) in list.drain(..).enumerate() {
        match wanted.iter().position(|want| *want == identity(&item)) {
            Some(place) if named[place].is_none() => named[place] = Some(item),
            _ => rest.push((index, item)),
        }
    }
    let mut sorted: Vec<Value> = named.into_iter().flatten().collect();
    for (index, item) in rest {
        sorted.insert(index.min(sorted.len()), item);
    }
    *list = sorted;
}

/// An object as it is stored: without nulls and directives.
fn plain(patch: Map<String, Value>) -> Map<String, Value> {
    patch
        .into_iter()
        .filter(|(key, value)| {
            !value.is_null()
                && key != DIRECTIVE
                && key != RETAIN_KEYS
                && !key.starts_with(DELETE_FROM_PRIMITIVE)
                && !key.starts_with(ELEMENT_ORDER)
        })
        .map(|(key, value)| (key, plain_value(value)))
        .collect()
}

fn plain_value(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(plain(map)),
        Value::Array(list) => Value::Array(plain_list(list)),
        other => other,
    }
}

fn plain_list(list: Vec<Value>) -> Vec<Value> {
    list.into_iter().filter(|item| item[DIRECTIVE] != "delete").map(plain_value).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::facts;

    fn patched(original: Value, patch: Value) -> Value {
        let id = facts().kind("apps", "v1", "Deployment").expect("Deployment");
        apply(facts(), id, original, patch).expect("a patch")
    }

    fn containers(list: Value) -> Value {
        json!({ "spec": { "template": { "spec": { "containers": list } } } })
    }

    #[test]
    fn containers_are_merged_by_name() {
        let before = containers(
            json!([{ "name": "a", "image": "1", "args": ["x"] }, { "name": "b", "image": "1" }]),
        );
        let after = patched(
            before.clone(),
            containers(json!([{ "name": "b", "image": "2" }, { "name": "c" }])),
        );
        let list = &after["spec"]["template"]["spec"]["containers"];
        assert_eq!(
            list,
            &json!([{ "name": "a", "image": "1", "args": ["x"] }, { "name": "b", "image": "2" }, { "name": "c" }])
        );
        let after =
            patched(before.clone(), containers(json!([{ "name": "a", "$patch": "delete" }])));
        assert_eq!(
            after["spec"]["template"]["spec"]["containers"],
            json!([{ "name": "b", "image": "1" }])
        );
        let after = patched(before, containers(json!([{ "$patch": "replace" }, { "name": "z" }])));
        assert_eq!(after["spec"]["template"]["spec"]["containers"], json!([{ "name": "z" }]));
    }

    #[test]
    fn orders_retained_keys_and_nulls_are_followed() {
        let before = containers(json!([{ "name": "a" }, { "name": "b" }, { "name": "c" }]));
        let patch = json!({ "spec": { "template": { "spec": {
            "$setElementOrder/containers": [{ "name": "c" }, { "name": "a" }, { "name": "b" }],
            "containers": [{ "name": "b", "image": "2" }] } } } });
        let after = patched(before, patch);
        assert_eq!(
            after["spec"]["template"]["spec"]["containers"],
            json!([{ "name": "c" }, { "name": "a" }, { "name": "b", "image": "2" }])
        );

        let before = json!({ "spec": { "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1 } }, "paused": true } });
        let patch = json!({ "spec": { "strategy": { "$retainKeys": ["type"], "type": "Recreate" }, "paused": null } });
        assert_eq!(
            patched(before, patch),
            json!({ "spec": { "strategy": { "type": "Recreate" } } })
        );
    }

    #[test]
    fn lists_without_a_merge_key_are_replaced_and_finalizers_are_a_set() {
        let before = containers(json!([{ "name": "a", "args": ["x", "y"] }]));
        let after = patched(before, containers(json!([{ "name": "a", "args": ["z"] }])));
        assert_eq!(after["spec"]["template"]["spec"]["containers"][0]["args"], json!(["z"]));

        let before = json!({ "metadata": { "finalizers": ["a", "b"] } });
        let after = patched(
            before,
            json!({ "metadata": { "finalizers": ["c"], "$deleteFromPrimitiveList/finalizers": ["a"] } }),
        );
        let mut finalizers: Vec<String> =
            serde_json::from_value(after["metadata"]["finalizers"].clone()).expect("texts");
        finalizers.sort();
        assert_eq!(finalizers, ["b", "c"]);
    }

    #[test]
    fn mistakes_are_named() {
        let id = facts().kind("apps", "v1", "Deployment").expect("Deployment");
        let error = apply(facts(), id, json!({}), containers(json!([{ "image": "x" }])))
            .expect_err("no key")
            .to_string();
        assert_eq!(error, "map: {\"image\":\"x\"} does not contain declared merge key: name");
        let error = apply(facts(), id, json!({}), json!({ "$patch": "explode" }))
            .expect_err("unknown")
            .to_string();
        assert!(error.starts_with("unknown patch directive \"explode\""));
    }

    proptest! {
        #[test]
        fn fuzz_applying_a_patch_twice_changes_nothing_more(names in proptest::collection::vec("[a-d]", 0..4), images in proptest::collection::vec("[a-z]{1,3}", 4)) {
            let list: Vec<Value> = names.iter().zip(&images).map(|(name, image)| json!({ "name": name, "image": image })).collect();
            let patch = containers(json!(list));
            let once = patched(containers(json!([{ "name": "a", "image": "old" }])), patch.clone());
            prop_assert_eq!(patched(once.clone(), patch), once);
        }
    }
}
