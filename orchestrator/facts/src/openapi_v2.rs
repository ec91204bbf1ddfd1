//! A small OpenAPI v2 document. It has no schemas: clients that ask for version 2 (kubectl below 1.29, and all that are
//! told of a kind they do not find in version 3) look only whether a patch takes `fieldValidation`, and go on with
//! their own types for the rest.
//!
//! On the wire it is the protobuf of gnostic's `openapi.v2.Document`; the numbers below are its fields.

use serde_json::{Map, Value, json};

use crate::openapi::ResourceDescription;

/// Query parameters of a patch.
const PARAMETERS: [(&str, &str); 4] = [
    ("dryRun", "string"),
    ("fieldManager", "string"),
    ("fieldValidation", "string"),
    ("force", "boolean"),
];

fn path(resource: &ResourceDescription) -> String {
    let root = if resource.group.is_empty() {
        format!("/api/{}", resource.version)
    } else {
        format!("/apis/{}/{}", resource.group, resource.version)
    };
    let namespace = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
    format!("{root}{namespace}/{}/{{name}}", resource.plural)
}

fn patchable(resources: &[ResourceDescription]) -> impl Iterator<Item = &ResourceDescription> {
    resources.iter().filter(|resource| resource.verbs.iter().any(|verb| verb == "patch"))
}

/// The document as JSON.
#[must_use]
pub fn json_document(resources: &[ResourceDescription]) -> Value {
    let parameters: Vec<Value> = PARAMETERS
        .iter()
        .map(|(name, kind)| json!({ "name": name, "in": "query", "type": kind }))
        .collect();
    let paths: Map<String, Value> = patchable(resources)
        .map(|resource| {
            let operation = json!({
                "parameters": parameters,
                "responses": { "200": { "description": "OK" } },
                "x-kubernetes-action": "patch",
                "x-kubernetes-group-version-kind":
                    { "group": resource.group, "version": resource.version, "kind": resource.kind },
            });
            (path(resource), json!({ "patch": operation }))
        })
        .collect();
    json!({ "swagger": "2.0", "info": { "title": "Kubernetes", "version": "v1.36.0" }, "paths": paths,
            "definitions": {} })
}

/// The document as protobuf.
#[must_use]
pub fn protobuf_document(resources: &[ResourceDescription]) -> Vec<u8> {
    let mut paths = Vec::new();
    for resource in patchable(resources) {
        let mut operation = Vec::new();
        for (name, kind) in PARAMETERS {
            // ParametersItem.parameter > Parameter.non_body_parameter > NonBodyParameter.query_parameter_sub_schema
            let query = [field(2, b"query"), field(4, name.as_bytes()), field(6, kind.as_bytes())];
            let parameter = field(1, &field(2, &field(3, &query.concat())));
            operation.extend(field(8, &parameter));
        }
        // ResponseCode{name, ResponseValue.response > Response.description}
        let response = [field(1, b"200"), field(2, &field(1, &field(1, b"OK")))].concat();
        operation.extend(field(9, &field(1, &response)));
        let kind = format!(
            "group: {:?}\nversion: {}\nkind: {}\n",
            resource.group, resource.version, resource.kind
        );
        for (name, yaml) in
            [("x-kubernetes-action", "patch\n"), ("x-kubernetes-group-version-kind", &kind)]
        {
            let any = field(2, yaml.as_bytes());
            operation.extend(field(13, &[field(1, name.as_bytes()), field(2, &any)].concat()));
        }
        let item = field(8, &operation);
        paths.extend(field(2, &[field(1, path(resource).as_bytes()), field(2, &item)].concat()));
    }
    let info = [field(1, b"Kubernetes"), field(2, b"v1.36.0")].concat();
    [field(1, b"2.0"), field(2, &info), field(8, &paths), field(9, b"")].concat()
}

/// A length-delimited protobuf field.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length > 0x7f {
        out.push(u8::try_from(length & 0x7f).unwrap_or_default() | 0x80);
        length >>= 7;
    }
    out.push(u8::try_from(length).unwrap_or_default());
    out.extend_from_slice(bytes);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_name_the_patch_of_a_kind() {
        let resource = ResourceDescription {
            group: "apps".to_owned(),
            version: "v1".to_owned(),
            kind: "Deployment".to_owned(),
            plural: "deployments".to_owned(),
            namespaced: true,
            verbs: vec!["patch".to_owned()],
            status: true,
            scale: true,
        };
        let path = "/apis/apps/v1/namespaces/{namespace}/deployments/{name}";
        let json = json_document(std::slice::from_ref(&resource));
        assert_eq!(
            json["paths"][path]["patch"]["x-kubernetes-group-version-kind"]["kind"],
            "Deployment"
        );
        let bytes = protobuf_document(&[resource]);
        let has = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(has(path) && has("fieldValidation") && has("kind: Deployment"));
        assert_eq!(field(1, &[b'x'; 200])[..3], [0x0a, 0xc8, 0x01]);
    }
}
