//! OpenAPI v3 documents: what `kubectl` needs for apply, create, explain, diff and edit.
//!
//! Schemas come from the table, with the merge keys and list types that clients merge by; descriptions are short,
//! because the facts hold no texts.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::table::{Facts, Field, FieldType, Shape, TypeId};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";
const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";
const INT_OR_STRING: &str = "io.k8s.apimachinery.pkg.util.intstr.IntOrString";
const RAW: &str = "io.k8s.apimachinery.pkg.runtime.RawExtension";

/// A resource of a document.
#[derive(Debug, Clone)]
pub struct ResourceDescription {
    pub group: String,
    pub version: String,
    pub kind: String,
    pub plural: String,
    pub namespaced: bool,
    pub verbs: Vec<String>,
    pub status: bool,
    pub scale: bool,
}

/// The document of one group-version.
#[must_use]
pub fn v3_document(facts: &Facts, resources: &[ResourceDescription]) -> Value {
    let mut schemas = Schemas { facts, done: BTreeMap::new(), queue: BTreeSet::new() };
    let mut paths = Map::new();
    for resource in resources {
        let Some(id) = facts.kind(&resource.group, &resource.version, &resource.kind) else {
            continue;
        };
        schemas.queue.insert(id);
        add_paths(facts, resource, id, &mut paths);
        let list_name = format!("{}List", facts.get(id).name);
        schemas.done.insert(list_name, list_schema(facts, resource, id));
    }
    schemas.queue.extend(facts.kind_anywhere("DeleteOptions"));
    schemas.queue.extend(facts.kind_anywhere("Status"));
    while let Some(id) = schemas.queue.pop_first() {
        schemas.add(id);
    }
    let mut all = schemas.done;
    all.insert(format!("{META}.Time"), json!({ "type": "string", "format": "date-time" }));
    all.insert(format!("{META}.MicroTime"), json!({ "type": "string", "format": "date-time" }));
    all.insert(format!("{META}.FieldsV1"), json!({ "type": "object" }));
    all.insert(format!("{META}.Patch"), json!({ "type": "object" }));
    all.insert(RAW.to_owned(), json!({ "type": "object" }));
    all.insert(
        QUANTITY.to_owned(),
        json!({ "oneOf": [{ "type": "string" }, { "type": "number" }] }),
    );
    all.insert(
        INT_OR_STRING.to_owned(),
        json!({ "oneOf": [{ "type": "integer" }, { "type": "string" }], "format": "int-or-string" }),
    );
    all.insert(
        format!("{META}.ListMeta"),
        json!({ "type": "object", "properties": {
            "continue": { "type": "string" }, "remainingItemCount": { "type": "integer", "format": "int64" },
            "resourceVersion": { "type": "string" }, "selfLink": { "type": "string" } } }),
    );
    json!({
        "openapi": "3.0.0",
        "info": { "title": "Kubernetes", "version": "v1.36.0" },
        "paths": paths,
        "components": { "schemas": all },
    })
}

struct Schemas<'a> {
    facts: &'a Facts,
    done: BTreeMap<String, Value>,
    queue: BTreeSet<TypeId>,
}

impl Schemas<'_> {
    fn add(&mut self, id: TypeId) {
        let facts = self.facts;
        let known = facts.get(id);
        if self.done.contains_key(&known.name) {
            return;
        }
        let short = known.name.rsplit('.').next().unwrap_or_default();
        let mut schema = match &known.shape {
            Shape::NamedList(list) => self.value(list),
            Shape::Fields(_) => {
                let fields = facts.fields(id);
                let properties: Map<String, Value> =
                    fields.iter().map(|field| (field.json.clone(), self.property(field))).collect();
                let required: Vec<&str> = fields
                    .iter()
                    .filter(|field| field.required)
                    .map(|field| field.json.as_str())
                    .collect();
                let mut schema = json!({ "type": "object", "properties": properties });
                if !required.is_empty() {
                    schema["required"] = json!(required);
                }
                schema
            }
        };
        schema["description"] = json!(format!("{short} of the Kubernetes API."));
        if let Some((group, version, kind)) = &known.kind {
            let group = if kind == "DeleteOptions" || kind == "Status" { "" } else { group };
            schema["x-kubernetes-group-version-kind"] =
                json!([{ "group": group, "version": version, "kind": kind }]);
        }
        self.done.insert(known.name.clone(), schema);
    }

    fn property(&mut self, field: &Field) -> Value {
        let mut schema = self.value(&field.kind);
        let object = match schema.as_object_mut() {
            Some(object) => object,
            None => return schema,
        };
        if let Some(default) = &field.default {
            object.insert("default".to_owned(), default.clone());
        }
        let mut extension = |key: &str, value: Value| {
            object.insert(format!("x-kubernetes-{key}"), value);
        };
        if let Some(key) = &field.merge_key {
            extension("patch-merge-key", json!(key));
        }
        if let Some(strategy) = &field.strategy {
            extension("patch-strategy", json!(strategy));
        }
        if let Some(kind) = &field.list_type {
            extension("list-type", json!(kind));
        }
        if !field.list_keys.is_empty() {
            extension("list-map-keys", json!(field.list_keys));
        }
        if field.atomic_map {
            extension("map-type", json!("atomic"));
        }
        schema
    }

    fn value(&mut self, kind: &FieldType) -> Value {
        // A reference with extensions beside it must be wrapped (OpenAPI 3.0, "Reference Object").
        let reference =
            |name: &str| json!({ "allOf": [{ "$ref": format!("#/components/schemas/{name}") }] });
        match kind {
            FieldType::String => json!({ "type": "string" }),
            FieldType::Bool => json!({ "type": "boolean" }),
            FieldType::Int32 => json!({ "type": "integer", "format": "int32" }),
            FieldType::Int64 => json!({ "type": "integer", "format": "int64" }),
            FieldType::Float => json!({ "type": "number", "format": "double" }),
            FieldType::Bytes => json!({ "type": "string", "format": "byte" }),
            FieldType::Quantity => reference(QUANTITY),
            FieldType::IntOrString => reference(INT_OR_STRING),
            FieldType::Time => reference(&format!("{META}.Time")),
            FieldType::MicroTime => reference(&format!("{META}.MicroTime")),
            FieldType::Raw => reference(RAW),
            FieldType::Fields => reference(&format!("{META}.FieldsV1")),
            FieldType::Message(id) => {
                self.queue.insert(*id);
                reference(&self.facts.get(*id).name)
            }
            FieldType::List(item) => json!({ "type": "array", "items": self.value(item) }),
            FieldType::Map(value) => {
                json!({ "type": "object", "additionalProperties": self.value(value) })
            }
        }
    }
}

fn list_schema(facts: &Facts, resource: &ResourceDescription, id: TypeId) -> Value {
    json!({
        "type": "object",
        "description": format!("A list of {} objects.", resource.kind),
        "required": ["items"],
        "properties": {
            "apiVersion": { "type": "string" },
            "kind": { "type": "string" },
            "metadata": { "allOf": [{ "$ref": format!("#/components/schemas/{META}.ListMeta") }] },
            "items": { "type": "array", "items": { "allOf": [{ "$ref": format!("#/components/schemas/{}", facts.get(id).name) }] } },
        },
        "x-kubernetes-group-version-kind":
            [{ "group": resource.group, "version": resource.version, "kind": format!("{}List", resource.kind) }],
    })
}

fn add_paths(
    facts: &Facts,
    resource: &ResourceDescription,
    id: TypeId,
    paths: &mut Map<String, Value>,
) {
    let root = if resource.group.is_empty() {
        format!("/api/{}", resource.version)
    } else {
        format!("/apis/{}/{}", resource.group, resource.version)
    };
    let scope = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
    let collection = format!("{root}{scope}/{}", resource.plural);
    let name = facts.get(id).name.clone();
    let mut of_collection = Map::new();
    for (verb, method, action) in [
        ("list", "get", "list"),
        ("create", "post", "post"),
        ("deletecollection", "delete", "deletecollection"),
    ] {
        if resource.verbs.iter().any(|known| known == verb) {
            of_collection.insert(method.to_owned(), operation(resource, &name, action, method));
        }
    }
    of_collection.insert("parameters".to_owned(), path_parameters(resource, false));
    paths.insert(collection.clone(), Value::Object(of_collection));
    let mut of_object = Map::new();
    for (verb, method) in
        [("get", "get"), ("update", "put"), ("patch", "patch"), ("delete", "delete")]
    {
        if resource.verbs.iter().any(|known| known == verb) {
            of_object.insert(method.to_owned(), operation(resource, &name, method, method));
        }
    }
    if of_object.is_empty() {
        return;
    }
    of_object.insert("parameters".to_owned(), path_parameters(resource, true));
    if resource.status {
        let mut status = of_object.clone();
        status.shift_remove("delete");
        paths.insert(format!("{collection}/{{name}}/status"), Value::Object(status));
    }
    paths.insert(format!("{collection}/{{name}}"), Value::Object(of_object));
}

fn path_parameters(resource: &ResourceDescription, object: bool) -> Value {
    let parameter = |name: &str| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } });
    let mut all = Vec::new();
    if object {
        all.push(parameter("name"));
    }
    if resource.namespaced {
        all.push(parameter("namespace"));
    }
    Value::Array(all)
}

fn operation(resource: &ResourceDescription, name: &str, action: &str, method: &str) -> Value {
    let schema =
        |name: &str| json!({ "schema": { "$ref": format!("#/components/schemas/{name}") } });
    let query =
        |name: &str, kind: &str| json!({ "name": name, "in": "query", "schema": { "type": kind } });
    let answer = if action == "list" { format!("{name}List") } else { name.to_owned() };
    let mut operation = json!({
        "operationId": format!("{action}{}{}", resource.kind, if resource.namespaced { "Namespaced" } else { "" }),
        "responses": { "200": { "description": "OK", "content": { "application/json": schema(&answer) } } },
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": { "group": resource.group, "version": resource.version, "kind": resource.kind },
    });
    let mut parameters = Vec::new();
    if matches!(method, "post" | "put" | "patch") {
        for name in ["dryRun", "fieldManager", "fieldValidation"] {
            parameters.push(query(name, "string"));
        }
        if method == "patch" {
            parameters.push(query("force", "boolean"));
        }
        operation["requestBody"] = if method == "patch" {
            let patch = schema(&format!("{META}.Patch"));
            json!({ "content": {
                "application/apply-patch+yaml": patch,
                "application/json-patch+json": patch,
                "application/merge-patch+json": patch,
                "application/strategic-merge-patch+json": patch,
            } })
        } else {
            json!({ "required": true, "content": { "application/json": schema(name) } })
        };
    } else if action == "list" {
        for name in ["continue", "fieldSelector", "labelSelector", "resourceVersion"] {
            parameters.push(query(name, "string"));
        }
        parameters.push(query("limit", "integer"));
        parameters.push(query("watch", "boolean"));
    } else if method == "delete" {
        operation["requestBody"] =
            json!({ "content": { "application/json": schema(&format!("{META}.DeleteOptions")) } });
    }
    operation["parameters"] = Value::Array(parameters);
    operation
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts;

    fn document() -> Value {
        let resource = ResourceDescription {
            group: "apps".to_owned(),
            version: "v1".to_owned(),
            kind: "Deployment".to_owned(),
            plural: "deployments".to_owned(),
            namespaced: true,
            verbs: ["create", "get", "list", "patch", "update", "delete"]
                .map(str::to_owned)
                .to_vec(),
            status: true,
            scale: true,
        };
        v3_document(facts(), &[resource])
    }

    #[test]
    fn every_reference_leads_to_a_schema() {
        let document = document();
        let text = document.to_string();
        let schemas = document["components"]["schemas"].as_object().expect("schemas");
        for rest in text.split("#/components/schemas/").skip(1) {
            let name = rest.split('"').next().expect("a name");
            assert!(schemas.contains_key(name), "{name} is missing");
        }
    }

    #[test]
    fn the_keys_that_clients_merge_by_are_there() {
        let document = document();
        let containers = &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]
            ["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(containers["x-kubernetes-patch-strategy"], "merge");
        let patch =
            &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
        assert!(
            patch["requestBody"]["content"]["application/strategic-merge-patch+json"].is_object()
        );
        assert!(
            patch["parameters"]
                .as_array()
                .expect("parameters")
                .iter()
                .any(|one| one["name"] == "fieldValidation")
        );
    }
}
