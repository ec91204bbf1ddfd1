//! Paths, queries and bodies.

use bytes::Bytes;
use http::{Request, header};
use orch_api::Selector;
use serde_json::{Value, json};

use super::{RESOURCES, Refusal, refuse};

/// An object, or a collection if it has no name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    pub(super) base: String,
    pub(super) plural: String,
    pub(super) namespace: Option<String>,
    pub(super) name: Option<String>,
    pub(super) subresource: Option<String>,
}

impl Target {
    pub(super) fn of_path(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (base, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => (format!("/api/{version}"), rest),
            ["apis", group, version, rest @ ..] => (format!("/apis/{group}/{version}"), rest),
            _ => return None,
        };
        let own = |text: &str| Some(text.to_owned());
        let (namespace, rest) = match rest {
            ["namespaces", _, "status" | "finalize"] | ["namespaces"] | ["namespaces", _] => {
                (None, rest)
            }
            ["namespaces", namespace, rest @ ..] => (own(namespace), rest),
            rest => (None, rest),
        };
        let (plural, name, subresource) = match rest {
            [plural] => (plural, None, None),
            [plural, name] => (plural, own(name), None),
            [plural, name, sub] => (plural, own(name), own(sub)),
            _ => return None,
        };
        Some(Self { base, plural: (*plural).to_owned(), namespace, name, subresource })
    }

    pub(super) fn without_subresource(&self) -> Self {
        Self { subresource: None, ..self.clone() }
    }

    /// Whether this collection has the object `key`.
    pub(super) fn contains(&self, key: &Self) -> bool {
        self.base == key.base
            && self.plural == key.plural
            && (self.namespace.is_none() || self.namespace == key.namespace)
    }

    /// Fills in what the path says.
    pub(super) fn complete(&self, object: &mut Value) {
        object["metadata"]["name"] = json!(self.name);
        if let Some(namespace) = &self.namespace {
            object["metadata"]["namespace"] = json!(namespace);
        }
        let found = RESOURCES
            .iter()
            .find(|(base, plural, ..)| *base == self.base && *plural == self.plural);
        if let Some((base, _, kind, _)) = found {
            let version = base.trim_start_matches("/apis/").trim_start_matches("/api/");
            object["apiVersion"] = json!(version);
            object["kind"] = json!(kind);
        }
    }
}

/// Query and body of a request.
#[derive(Debug)]
pub(super) struct Options {
    labels: Selector,
    fields: Vec<(String, String)>,
    pub(super) resource_version: Option<String>,
    pub(super) content_type: String,
    pub(super) body: Value,
}

impl Options {
    pub(super) fn parse(request: &Request<Bytes>) -> Result<Self, Refusal> {
        let bad = |message: String| Refusal {
            code: http::StatusCode::BAD_REQUEST,
            reason: "BadRequest",
            message,
            cause: None,
        };
        let body = if request.body().is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(request.body()).map_err(|error| bad(error.to_string()))?
        };
        let content_type = request.headers().get(header::CONTENT_TYPE);
        let content_type = content_type.and_then(|value| value.to_str().ok()).unwrap_or_default();
        let mut options = Self {
            labels: Selector::everything(),
            fields: Vec::new(),
            resource_version: None,
            content_type: content_type.to_owned(),
            body,
        };
        for pair in request.uri().query().unwrap_or_default().split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decoded(value);
            match key {
                "labelSelector" => {
                    options.labels =
                        Selector::parse(&value).map_err(|error| bad(error.to_string()))?;
                }
                "fieldSelector" => {
                    for one in value.split(',') {
                        let Some((field, wanted)) = one.split_once('=') else {
                            return refuse(http::StatusCode::BAD_REQUEST, "BadRequest", value);
                        };
                        options.fields.push((field.to_owned(), wanted.to_owned()));
                    }
                }
                "resourceVersion" => options.resource_version = Some(value),
                _ => {}
            }
        }
        Ok(options)
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let labels = serde_json::from_value(object["metadata"]["labels"].clone());
        let fields = self.fields.iter().all(|(field, wanted)| {
            let pointer = format!("/{}", field.replace('.', "/"));
            object.pointer(&pointer).and_then(Value::as_str).unwrap_or_default() == wanted
        });
        fields && self.labels.matches(&labels.unwrap_or_default())
    }
}

fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A strategic merge of `status.conditions`: by their type. Other lists are replaced.
pub(super) fn merge_conditions(object: &Value, patch: &mut Value) {
    let Some(changes) = patch["status"]["conditions"].as_array().cloned() else { return };
    let mut all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    for change in changes {
        match all.iter_mut().find(|one| one["type"] == change["type"]) {
            Some(one) => json_patch::merge(one, &change),
            None => all.push(change),
        }
    }
    patch["status"]["conditions"] = json!(all);
}

pub(super) fn discovery(path: &str) -> Option<Value> {
    if path == "/apis" {
        let mut versions: Vec<&str> =
            RESOURCES.iter().filter_map(|(base, ..)| base.strip_prefix("/apis/")).collect();
        versions.dedup();
        let groups: Vec<Value> = versions
            .iter()
            .map(|version| {
                json!({ "name": version.split('/').next(), "preferredVersion": { "groupVersion": version } })
            })
            .collect();
        return Some(json!({ "groups": groups }));
    }
    let resources: Vec<Value> = RESOURCES
        .iter()
        .filter(|(base, ..)| *base == path)
        .map(|(_, plural, kind, namespaced)| {
            json!({ "name": plural, "kind": kind, "namespaced": namespaced,
                    "verbs": ["create", "delete", "deletecollection", "get", "list", "watch"] })
        })
        .collect();
    (!resources.is_empty()).then(|| json!({ "resources": resources }))
}
