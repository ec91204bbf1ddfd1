//! Who owns which field (Kubernetes, "Server-Side Apply"): sets of fields as `managedFields` holds them, and what
//! merging, comparing and pruning by them means. Pure; who may write what is decided by the API server.
//!
//! A set is a tree whose steps are written as on the wire: `f:NAME` a field, `k:{…}` an element of a list by its keys,
//! `v:…` an element of a list that is a set.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use crate::table::{Facts, Field, FieldType, Shape, TypeId};

/// Types that are owned as a whole: their parts make no sense apart (`+structType=atomic` in the Go sources).
const ATOMIC_TYPES: [&str; 16] = [
    "ConfigMapKeySelector",
    "FileKeySelector",
    "LabelSelector",
    "LocalObjectReference",
    "NodeSelector",
    "NodeSelectorTerm",
    "ObjectFieldSelector",
    "ObjectReference",
    "OwnerReference",
    "ResourceFieldSelector",
    "RoleRef",
    "SecretKeySelector",
    "SecretReference",
    "Subject",
    "TypedLocalObjectReference",
    "TypedObjectReference",
];

/// A set of fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet {
    /// Whether the place itself is in the set, not only what is below.
    member: bool,
    below: BTreeMap<String, FieldSet>,
}

impl FieldSet {
    fn leaf() -> Self {
        Self { member: true, below: BTreeMap::new() }
    }

    /// From a `fieldsV1` object.
    #[must_use]
    pub fn parse(fields: &Value) -> Self {
        fn node(fields: &Value) -> FieldSet {
            let Some(map) = fields.as_object().filter(|map| !map.is_empty()) else {
                return FieldSet::leaf();
            };
            let below = map
                .iter()
                .filter(|(step, _)| *step != ".")
                .map(|(step, fields)| (step.clone(), node(fields)))
                .collect();
            FieldSet { member: map.contains_key("."), below }
        }
        let mut set = node(fields);
        set.member = false;
        set
    }

    /// As a `fieldsV1` object.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.member && !self.below.is_empty() {
            map.insert(".".to_owned(), json!({}));
        }
        for (step, set) in &self.below {
            map.insert(step.clone(), set.to_json());
        }
        Value::Object(map)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.member && self.below.values().all(Self::is_empty)
    }

    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut out = self.clone();
        out.member |= other.member;
        for (step, set) in &other.below {
            let merged = out.below.get(step).map_or_else(|| set.clone(), |own| own.union(set));
            out.below.insert(step.clone(), merged);
        }
        out
    }

    /// What is in this set and not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let below = self
            .below
            .iter()
            .map(|(step, set)| {
                let rest = other.below.get(step).map_or_else(|| set.clone(), |o| set.difference(o));
                (step.clone(), rest)
            })
            .filter(|(_, set)| !set.is_empty())
            .collect();
        Self { member: self.member && !other.member, below }
    }

    /// What is in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let below = self
            .below
            .iter()
            .filter_map(|(step, set)| {
                let common = set.intersection(other.below.get(step)?);
                (!common.is_empty()).then(|| (step.clone(), common))
            })
            .collect();
        Self { member: self.member && other.member, below }
    }

    /// The set without what is below a path of steps.
    pub fn remove(&mut self, path: &[&str]) {
        match path {
            [] => {}
            [last] => {
                self.below.remove(*last);
            }
            [first, rest @ ..] => {
                if let Some(set) = self.below.get_mut(*first) {
                    set.remove(rest);
                    set.member = false;
                    if set.is_empty() {
                        self.below.remove(*first);
                    }
                }
            }
        }
    }

    /// The set with nothing but what is below one step.
    pub fn retain(&mut self, step: &str) {
        self.below.retain(|known, _| known == step);
    }

    /// The set with one more place, at the top.
    pub fn insert(&mut self, step: &str) {
        self.below.entry(step.to_owned()).or_default().member = true;
    }

    /// The places as people write them: `.spec.containers[name="a"].image`.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        fn collect(set: &FieldSet, path: &str, out: &mut Vec<String>) {
            if set.member {
                out.push(path.to_owned());
            }
            for (step, set) in &set.below {
                collect(set, &format!("{path}{}", readable(step)), out);
            }
        }
        let mut out = Vec::new();
        collect(self, "", &mut out);
        out
    }
}

fn readable(step: &str) -> String {
    let (kind, rest) = step.split_once(':').unwrap_or(("", step));
    match kind {
        "f" => format!(".{rest}"),
        "k" => {
            let mut text = String::new();
            let keys: Value = serde_json::from_str(rest).unwrap_or(Value::Null);
            for (key, value) in keys.as_object().into_iter().flatten() {
                let comma = if text.is_empty() { "" } else { "," };
                let _ = write!(text, "{comma}{key}={value}");
            }
            format!("[{text}]")
        }
        "v" => format!("[={rest}]"),
        _ => format!("[{rest}]"),
    }
}

/// How a value is owned.
enum Granularity<'a> {
    Whole,
    Struct(TypeId),
    Map(&'a FieldType),
    /// A list whose elements are known by their keys.
    Keyed(&'a FieldType),
    Set,
}

/// What is known of a value: its type, and the field it stands in.
#[derive(Clone, Copy)]
struct Place<'a> {
    kind: &'a FieldType,
    field: Option<&'a Field>,
}

impl<'a> Place<'a> {
    fn granularity(self, facts: &Facts) -> Granularity<'a> {
        let atomic = self.field.is_some_and(|field| field.atomic_map);
        match self.kind {
            FieldType::Message(id) if !atomic => {
                let known = facts.get(*id);
                let short = known.name.rsplit('.').next().unwrap_or_default();
                match known.shape {
                    Shape::Fields(_) if !ATOMIC_TYPES.contains(&short) => Granularity::Struct(*id),
                    _ => Granularity::Whole,
                }
            }
            FieldType::Map(value) if !atomic => Granularity::Map(value),
            FieldType::List(item) => {
                match self.field.and_then(|field| field.list_type.as_deref()) {
                    Some("map") => Granularity::Keyed(item),
                    Some("set") => Granularity::Set,
                    _ => Granularity::Whole,
                }
            }
            _ => Granularity::Whole,
        }
    }

    fn child(self, facts: &'a Facts, granularity: &Granularity<'a>, name: &str) -> Option<Self> {
        match granularity {
            Granularity::Struct(id) => {
                facts.field(*id, name).map(|field| Self { kind: &field.kind, field: Some(field) })
            }
            Granularity::Map(kind) | Granularity::Keyed(kind) => Some(Self { kind, field: None }),
            _ => None,
        }
    }

    /// The step to an element of a keyed list.
    fn key_step(self, facts: &Facts, item: &Value) -> String {
        let mut keys = BTreeMap::new();
        for key in self.field.map_or(&[][..], |field| &field.list_keys) {
            let default = || {
                let FieldType::List(kind) = self.kind else { return None };
                let FieldType::Message(id) = **kind else { return None };
                facts.field(id, key)?.default.clone()
            };
            if let Some(value) = item.get(key).cloned().or_else(default) {
                keys.insert(key.clone(), value);
            }
        }
        format!("k:{}", json!(keys))
    }
}

fn empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// All fields that an object has.
#[must_use]
pub fn fields_of(facts: &Facts, id: TypeId, object: &Value) -> FieldSet {
    let mut set = fields(facts, Some(Place { kind: &FieldType::Message(id), field: None }), object);
    set.member = false;
    set
}

fn fields(facts: &Facts, place: Option<Place<'_>>, value: &Value) -> FieldSet {
    let (Some(place), false) = (place, empty(value)) else { return FieldSet::leaf() };
    let granularity = place.granularity(facts);
    match (&granularity, value) {
        (Granularity::Struct(_) | Granularity::Map(_), Value::Object(map)) => {
            let below = map
                .iter()
                .map(|(key, value)| {
                    let child = place.child(facts, &granularity, key);
                    (format!("f:{key}"), fields(facts, child, value))
                })
                .collect();
            FieldSet { member: false, below }
        }
        (Granularity::Keyed(kind), Value::Array(list)) => {
            let below = list
                .iter()
                .map(|item| {
                    let mut set = fields(facts, Some(Place { kind, field: None }), item);
                    set.member = true;
                    (place.key_step(facts, item), set)
                })
                .collect();
            FieldSet { member: false, below }
        }
        (Granularity::Set, Value::Array(list)) => {
            let below = list.iter().map(|item| (format!("v:{item}"), FieldSet::leaf())).collect();
            FieldSet { member: false, below }
        }
        _ => FieldSet::leaf(),
    }
}

/// The fields of `new` that `old` does not have, or has with another value.
#[must_use]
pub fn changed(facts: &Facts, id: TypeId, old: &Value, new: &Value) -> FieldSet {
    let place = Place { kind: &FieldType::Message(id), field: None };
    let mut set = differing(facts, Some(place), Some(old), new);
    set.member = false;
    set
}

fn differing(
    facts: &Facts,
    place: Option<Place<'_>>,
    old: Option<&Value>,
    new: &Value,
) -> FieldSet {
    let Some(old) = old else { return fields(facts, place, new) };
    if old == new {
        return FieldSet::default();
    }
    let (Some(place), false) = (place, empty(new)) else { return FieldSet::leaf() };
    let granularity = place.granularity(facts);
    let below: BTreeMap<String, FieldSet> = match (&granularity, new) {
        (Granularity::Struct(_) | Granularity::Map(_), Value::Object(map)) => map
            .iter()
            .map(|(key, value)| {
                let child = place.child(facts, &granularity, key);
                (format!("f:{key}"), differing(facts, child, old.get(key), value))
            })
            .collect(),
        (Granularity::Keyed(kind), Value::Array(list)) => list
            .iter()
            .map(|item| {
                let step = place.key_step(facts, item);
                let before = old
                    .as_array()
                    .into_iter()
                    .flatten()
                    .find(|before| place.key_step(facts, before) == step);
                let mut set = differing(facts, Some(Place { kind, field: None }), before, item);
                set.member = before.is_none();
                (step, set)
            })
            .collect(),
        (Granularity::Set, Value::Array(list)) => list
            .iter()
            .filter(|item| !old.as_array().is_some_and(|old| old.contains(item)))
            .map(|item| (format!("v:{item}"), FieldSet::leaf()))
            .collect(),
        _ => return FieldSet::leaf(),
    };
    FieldSet {
        member: false,
        below: below.into_iter().filter(|(_, set)| !set.is_empty()).collect(),
    }
}

/// `live` with the fields of `config` in it.
#[must_use]
pub fn merge(facts: &Facts, id: TypeId, live: Value, config: &Value) -> Value {
    merged(facts, Some(Place { kind: &FieldType::Message(id), field: None }), live, config)
}

fn merged(facts: &Facts, place: Option<Place<'_>>, live: Value, config: &Value) -> Value {
    let Some(place) = place else { return config.clone() };
    let granularity = place.granularity(facts);
    match (&granularity, live, config) {
        (
            Granularity::Struct(_) | Granularity::Map(_),
            Value::Object(mut live),
            Value::Object(config),
        ) => {
            for (key, value) in config {
                let child = place.child(facts, &granularity, key);
                let value = match live.get_mut(key) {
                    Some(before) => merged(facts, child, before.take(), value),
                    None => value.clone(),
                };
                live.insert(key.clone(), value);
            }
            Value::Object(live)
        }
        (Granularity::Keyed(kind), Value::Array(live), Value::Array(config)) => {
            let kind: &FieldType = kind;
            let step = |item: &Value| place.key_step(facts, item);
            let join = |live: &Value, config: &Value| {
                merged(facts, Some(Place { kind, field: None }), live.clone(), config)
            };
            Value::Array(interleave(&live, config, step, join))
        }
        (Granularity::Set, Value::Array(live), Value::Array(config)) => {
            Value::Array(interleave(&live, config, Value::to_string, |_, config| config.clone()))
        }
        (_, _, config) => config.clone(),
    }
}

/// The elements of both in the order of `config`; what only `live` has stays before what it stood before.
fn interleave(
    live: &[Value],
    config: &[Value],
    step: impl Fn(&Value) -> String,
    join: impl Fn(&Value, &Value) -> Value,
) -> Vec<Value> {
    let live_steps: Vec<String> = live.iter().map(&step).collect();
    let wanted: BTreeSet<String> = config.iter().map(&step).collect();
    let mut out = Vec::new();
    let mut next = 0;
    for item in config {
        let own = step(item);
        match live_steps.iter().position(|known| *known == own) {
            Some(place) => {
                while next <= place {
                    if !wanted.contains(&live_steps[next]) {
                        out.push(live[next].clone());
                    }
                    next += 1;
                }
                out.push(join(&live[place], item));
            }
            None => out.push(item.clone()),
        }
    }
    let rest = live.iter().zip(&live_steps).skip(next);
    out.extend(rest.filter(|(_, step)| !wanted.contains(*step)).map(|(item, _)| item.clone()));
    out
}

/// Takes out of `object` what is in `last` and in nobody's hands (`keep`) any more.
pub fn prune(facts: &Facts, id: TypeId, object: &mut Value, last: &FieldSet, keep: &FieldSet) {
    cut(facts, Some(Place { kind: &FieldType::Message(id), field: None }), object, last, keep);
}

fn cut(
    facts: &Facts,
    place: Option<Place<'_>>,
    value: &mut Value,
    last: &FieldSet,
    keep: &FieldSet,
) {
    let Some(place) = place else { return };
    let granularity = place.granularity(facts);
    for (step, set) in &last.below {
        let kept = keep.below.get(step).filter(|kept| !kept.is_empty());
        if let (Some(name), Some(map)) = (step.strip_prefix("f:"), value.as_object_mut()) {
            match kept {
                None => {
                    map.shift_remove(name);
                }
                Some(kept) => {
                    if let Some(value) = map.get_mut(name) {
                        cut(facts, place.child(facts, &granularity, name), value, set, kept);
                    }
                }
            }
        } else if let Some(list) = value.as_array_mut() {
            let is_it = |item: &Value| match granularity {
                Granularity::Keyed(_) => place.key_step(facts, item) == *step,
                _ => format!("v:{item}") == *step,
            };
            match kept {
                None => list.retain(|item| !is_it(item)),
                Some(kept) => {
                    if let Some(item) = list.iter_mut().find(|item| is_it(item)) {
                        let whole = item.clone();
                        cut(facts, place.child(facts, &granularity, ""), item, set, kept);
                        // What is kept of an element is nothing without its keys.
                        for key in place.field.map_or(&[][..], |field| &field.list_keys) {
                            if let (Some(map), Some(value)) = (item.as_object_mut(), whole.get(key))
                            {
                                map.entry(key.clone()).or_insert_with(|| value.clone());
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts;

    fn deployment() -> TypeId {
        facts().kind("apps", "v1", "Deployment").expect("Deployment")
    }

    fn pod_template(containers: &Value) -> Value {
        json!({ "spec": { "template": { "spec": { "containers": containers } } } })
    }

    #[test]
    fn sets_are_read_and_written_as_on_the_wire() {
        let object = json!({ "metadata": { "labels": { "a": "b" } }, "spec": { "replicas": 2, "selector": {
            "matchLabels": { "a": "b" } }, "template": { "spec": { "containers": [
            { "name": "c", "image": "x", "ports": [{ "containerPort": 80 }] }] } } } });
        let set = fields_of(facts(), deployment(), &object);
        let wire = json!({
            "f:metadata": { "f:labels": { "f:a": {} } },
            "f:spec": { "f:replicas": {}, "f:selector": {}, "f:template": { "f:spec": { "f:containers": {
                "k:{\"name\":\"c\"}": { ".": {}, "f:image": {}, "f:name": {}, "f:ports": {
                    "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": { ".": {}, "f:containerPort": {} } } } } } } },
        });
        assert_eq!(set.to_json(), wire);
        assert_eq!(FieldSet::parse(&wire), set);
        assert!(
            set.paths().contains(&".spec.template.spec.containers[name=\"c\"].image".to_owned())
        );
        assert!(set.difference(&set).is_empty() && set.intersection(&set) == set);
        assert_eq!(set.union(&set), set);
    }

    #[test]
    fn merging_goes_by_keys_and_keeps_what_is_the_others() {
        let live = pod_template(
            &json!([{ "name": "a", "image": "1", "env": [{ "name": "X", "value": "1" }] },
                                        { "name": "side", "image": "s" }]),
        );
        let config =
            pod_template(&json!([{ "name": "new", "image": "n" }, { "name": "a", "image": "2" }]));
        let both = merge(facts(), deployment(), live.clone(), &config);
        let expected = pod_template(&json!([{ "name": "new", "image": "n" },
            { "name": "a", "image": "2", "env": [{ "name": "X", "value": "1" }] }, { "name": "side", "image": "s" }]));
        assert_eq!(both, expected);
        let paths = changed(facts(), deployment(), &live, &both).paths();
        let containers = ".spec.template.spec.containers";
        assert_eq!(
            paths,
            [
                format!("{containers}[name=\"a\"].image"),
                format!("{containers}[name=\"new\"]"),
                format!("{containers}[name=\"new\"].image"),
                format!("{containers}[name=\"new\"].name"),
            ]
        );
    }

    #[test]
    fn pruning_takes_what_nobody_holds_with_its_defaults() {
        let mut object = pod_template(&json!([
            { "name": "a", "image": "1", "imagePullPolicy": "Always", "resources": { "limits": { "cpu": "1" } } },
            { "name": "b", "image": "2", "imagePullPolicy": "Always" }]));
        let last = fields_of(
            facts(),
            deployment(),
            &pod_template(&json!([
            { "name": "a", "image": "1", "resources": { "limits": { "cpu": "1" } } }, { "name": "b", "image": "2" }])),
        );
        let keep = fields_of(
            facts(),
            deployment(),
            &pod_template(&json!([{ "name": "a", "image": "1" }])),
        );
        prune(facts(), deployment(), &mut object, &last, &keep);
        assert_eq!(
            object,
            pod_template(&json!([{ "name": "a", "image": "1", "imagePullPolicy": "Always" }]))
        );
    }
}
