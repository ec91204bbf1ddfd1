//! Field checks: unknown and duplicate fields, wrong JSON types (API concepts, "Field validation").

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Value, json};

use crate::table::{Facts, FieldType, Shape, TypeId};

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// `unknown field "spec.foo"`.
    pub unknown: Vec<String>,
    /// `json: cannot unmarshal string into Go struct field Pod.spec.replicas of type int32`.
    pub invalid: Vec<String>,
}

/// Compares an object with its type.
#[must_use]
pub fn check(facts: &Facts, id: TypeId, object: &Value) -> Findings {
    let mut findings = Findings::default();
    let kind =
        facts.get(id).kind.as_ref().map_or("object", |(_, _, kind)| kind.as_str()).to_owned();
    message(facts, id, object, "", &kind, &mut findings);
    findings
}

fn join(path: &str, part: &str) -> String {
    if path.is_empty() { part.to_owned() } else { format!("{path}.{part}") }
}

fn message(
    facts: &Facts,
    id: TypeId,
    value: &Value,
    path: &str,
    kind: &str,
    findings: &mut Findings,
) {
    let Value::Object(map) = value else {
        wrong(value, path, kind, "object", findings);
        return;
    };
    for (key, value) in map {
        match facts.field(id, key) {
            None => findings.unknown.push(format!("unknown field {:?}", join(path, key))),
            Some(field) => check_value(facts, &field.kind, value, &join(path, key), kind, findings),
        }
    }
}

fn check_value(
    facts: &Facts,
    expected: &FieldType,
    value: &Value,
    path: &str,
    kind: &str,
    findings: &mut Findings,
) {
    if value.is_null() {
        return;
    }
    let good = match expected {
        FieldType::String | FieldType::Bytes => value.is_string(),
        FieldType::Time | FieldType::MicroTime => value
            .as_str()
            .is_some_and(|text| text.is_empty() || text.parse::<jiff::Timestamp>().is_ok()),
        FieldType::Bool => value.is_boolean(),
        FieldType::Int32 => value.as_i64().is_some_and(|number| i32::try_from(number).is_ok()),
        FieldType::Int64 => value.is_i64() || value.is_u64(),
        FieldType::Float => value.is_number(),
        FieldType::Quantity => value.is_string() || value.is_number(),
        FieldType::IntOrString => value.is_string() || value.is_i64() || value.is_u64(),
        FieldType::Raw | FieldType::Fields => value.is_object(),
        FieldType::Message(id) => match &facts.get(*id).shape {
            Shape::Fields(_) => {
                message(facts, *id, value, path, kind, findings);
                true
            }
            Shape::NamedList(list) => {
                check_value(facts, list, value, path, kind, findings);
                true
            }
        },
        FieldType::List(item) => match value {
            Value::Array(items) => {
                for (index, value) in items.iter().enumerate() {
                    check_value(facts, item, value, &format!("{path}[{index}]"), kind, findings);
                }
                true
            }
            _ => false,
        },
        FieldType::Map(item) => match value {
            Value::Object(map) => {
                for (key, value) in map {
                    check_value(facts, item, value, &join(path, key), kind, findings);
                }
                true
            }
            _ => false,
        },
    };
    if !good {
        wrong(value, path, kind, go_name(expected), findings);
    }
}

fn go_name(expected: &FieldType) -> &'static str {
    match expected {
        FieldType::String => "string",
        FieldType::Bool => "bool",
        FieldType::Int32 => "int32",
        FieldType::Int64 => "int64",
        FieldType::Float => "float64",
        FieldType::Bytes => "[]byte",
        FieldType::Quantity => "resource.Quantity",
        FieldType::IntOrString => "intstr.IntOrString",
        FieldType::Time => "v1.Time",
        FieldType::MicroTime => "v1.MicroTime",
        FieldType::Raw | FieldType::Fields | FieldType::Message(_) => "object",
        FieldType::List(_) => "list",
        FieldType::Map(_) => "map[string]",
    }
}

fn wrong(value: &Value, path: &str, kind: &str, expected: &str, findings: &mut Findings) {
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    findings.invalid.push(format!(
        "json: cannot unmarshal {found} into Go struct field {} of type {expected}",
        join(kind, path)
    ));
}

/// Removes unknown fields, and fields that are null: both are never stored.
pub fn prune(facts: &Facts, id: TypeId, object: &mut Value) {
    let Value::Object(map) = object else { return };
    map.retain(|key, value| !value.is_null() && facts.field(id, key).is_some());
    for (key, value) in map.iter_mut() {
        if let Some(field) = facts.field(id, key) {
            prune_value(facts, &field.kind, value);
        }
    }
}

fn prune_value(facts: &Facts, kind: &FieldType, value: &mut Value) {
    match (kind, value) {
        (FieldType::Message(id), value @ Value::Object(_)) => prune(facts, *id, value),
        (FieldType::List(item), Value::Array(items)) => {
            items.iter_mut().for_each(|value| prune_value(facts, item, value))
        }
        (FieldType::Map(item), Value::Object(map)) => {
            for value in map.values_mut() {
                if value.is_null() && **item == FieldType::String {
                    *value = json!("");
                }
                prune_value(facts, item, value);
            }
        }
        _ => {}
    }
}

/// Fields that a JSON text names twice: `duplicate field "spec.x"`. A broken text has none.
#[must_use]
pub fn duplicates(text: &[u8]) -> Vec<String> {
    serde_json::from_slice::<Tree>(text).map(|tree| tree.found("")).unwrap_or_default()
}

/// A JSON value that keeps the keys seen twice.
enum Tree {
    Leaf,
    List(Vec<Tree>),
    Object(Vec<(String, Tree)>),
}

impl Tree {
    fn found(&self, path: &str) -> Vec<String> {
        match self {
            Self::Leaf => Vec::new(),
            Self::List(items) => items
                .iter()
                .enumerate()
                .flat_map(|(index, item)| item.found(&format!("{path}[{index}]")))
                .collect(),
            Self::Object(pairs) => {
                let mut seen = HashSet::new();
                let mut all = Vec::new();
                for (key, value) in pairs {
                    let here = join(path, key);
                    if !seen.insert(key) {
                        all.push(format!("duplicate field {here:?}"));
                    }
                    all.extend(value.found(&here));
                }
                all
            }
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Tree;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_bool<E>(self, _: bool) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_str<E>(self, _: &str) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_unit<E>(self) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tree, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Tree::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Tree::Object(pairs))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts;

    #[test]
    fn unknown_and_wrong_fields_are_named_with_their_path() {
        let pod = facts().kind("", "v1", "Pod").expect("Pod");
        let object = json!({ "apiVersion": "v1", "kind": "Pod", "spec": {
            "containers": [{ "name": "a", "imagee": "x", "ports": [{ "containerPort": "80" }] }],
            "nodeSelector": { "a": 1 },
        }, "foo": 1 });
        let findings = check(facts(), pod, &object);
        assert_eq!(
            findings.unknown,
            ["unknown field \"spec.containers[0].imagee\"", "unknown field \"foo\""]
        );
        assert_eq!(
            findings.invalid,
            [
                "json: cannot unmarshal string into Go struct field Pod.spec.containers[0].ports[0].containerPort of type int32",
                "json: cannot unmarshal number into Go struct field Pod.spec.nodeSelector.a of type string",
            ]
        );
        let mut pruned = object;
        prune(facts(), pod, &mut pruned);
        assert!(
            pruned.get("foo").is_none() && pruned["spec"]["containers"][0].get("imagee").is_none()
        );
    }

    #[test]
    fn duplicates_are_found_at_any_depth() {
        let text = br#"{"a":1,"b":[{"c":1,"c":2}],"a":2}"#;
        assert_eq!(duplicates(text), ["duplicate field \"b[0].c\"", "duplicate field \"a\""]);
        assert_eq!(duplicates(b"{broken"), Vec::<String>::new());
    }
}
