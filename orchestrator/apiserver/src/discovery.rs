//! What the server offers: aggregated and plain discovery, OpenAPI v3, `/version`.

use std::sync::LazyLock;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use orch_client::{Body, empty_body};
use orch_facts::{facts, openapi, openapi_v2};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::resources::{self, REVIEWS, Resource, VERBS};
use crate::respond;

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
/// The git version that `/version` reports; kubectl parses it as a semantic version.
const GIT_VERSION: &str = "v1.36.0+orch";

/// A document with its hash, made once.
struct Document {
    bytes: Bytes,
    hash: String,
}

impl Document {
    fn new(value: &Value) -> Self {
        Self::of(serde_json::to_vec(value).unwrap_or_default().into())
    }

    fn of(bytes: Bytes) -> Self {
        let hash =
            Sha256::digest(&bytes).iter().take(16).map(|byte| format!("{byte:02X}")).collect();
        Self { bytes, hash }
    }

    /// The document, or 304 when the client has it.
    fn answer(&self, headers: &HeaderMap, content_type: &'static str) -> Response<Body> {
        let tag = format!("\"{}\"", self.hash);
        let known = headers
            .get(header::IF_NONE_MATCH)
            .is_some_and(|value| value.as_bytes() == tag.as_bytes());
        let mut response = respond::bytes(StatusCode::OK, self.bytes.clone());
        if known {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            *response.body_mut() = empty_body();
        }
        let map = response.headers_mut();
        map.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        map.insert(header::VARY, HeaderValue::from_static("Accept"));
        if let Ok(tag) = HeaderValue::from_str(&tag) {
            map.insert(header::ETAG, tag);
        }
        response
    }
}

fn wants_aggregated(headers: &HeaderMap) -> bool {
    let accept =
        headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    accept.split(',').any(|range| {
        let mut parts = range.split(';').map(str::trim);
        parts.next() == Some("application/json") && {
            let parts: Vec<&str> = parts.collect();
            parts.contains(&"g=apidiscovery.k8s.io")
                && parts.contains(&"v=v2")
                && parts.contains(&"as=APIGroupDiscoveryList")
        }
    })
}

static CORE: LazyLock<Document> = LazyLock::new(|| Document::new(&aggregated(&[""])));
static GROUPS: LazyLock<Document> =
    LazyLock::new(|| Document::new(&aggregated(&resources::groups())));

/// `/api` and `/apis`.
pub(crate) fn root(path: &str, headers: &HeaderMap, server: &str) -> Response<Body> {
    if wants_aggregated(headers) {
        return if path == "/api" { &CORE } else { &GROUPS }.answer(headers, AGGREGATED);
    }
    let value = if path == "/api" {
        json!({ "kind": "APIVersions", "versions": ["v1"],
                "serverAddressByClientCIDRs": [{ "clientCIDR": "0.0.0.0/0", "serverAddress": server }] })
    } else {
        let groups: Vec<Value> = resources::groups().into_iter().map(group).collect();
        json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })
    };
    respond::json(StatusCode::OK, &value)
}

fn group(name: &str) -> Value {
    let version = resources::version(name);
    let version = json!({ "groupVersion": format!("{name}/{version}"), "version": version });
    json!({ "name": name, "versions": [version], "preferredVersion": version })
}

/// `/apis/GROUP`.
pub(crate) fn one_group(name: &str) -> Option<Response<Body>> {
    resources::groups().contains(&name).then(|| {
        let mut value = group(name);
        value["kind"] = json!("APIGroup");
        value["apiVersion"] = json!("v1");
        respond::json(StatusCode::OK, &value)
    })
}

fn scope(namespaced: bool) -> &'static str {
    if namespaced { "Namespaced" } else { "Cluster" }
}

fn kind(group: &str, version: &str, kind: &str) -> Value {
    json!({ "group": group, "version": version, "kind": kind })
}

/// All subresources of a resource: name, group, version, kind, verbs.
fn subresources(
    resource: &Resource,
) -> Vec<(&'static str, &'static str, &'static str, &'static str, Vec<&'static str>)> {
    let mut all = Vec::new();
    if resource.status {
        all.push((
            "status",
            resource.group,
            resource.version,
            resource.kind,
            vec!["get", "patch", "update"],
        ));
    }
    if resource.scale {
        all.push(("scale", "autoscaling", "v1", "Scale", vec!["get", "patch", "update"]));
    }
    for sub in resource.subresources {
        all.push((sub.name, sub.group, sub.version, sub.kind, sub.verbs.to_vec()));
    }
    all.sort_by_key(|sub| sub.0);
    all
}

/// apidiscovery.k8s.io/v2 `APIGroupDiscoveryList`.
fn aggregated(groups: &[&str]) -> Value {
    let items: Vec<Value> = groups
        .iter()
        .map(|group| {
            let mut list: Vec<Value> = resources::offered()
                .filter(|resource| resource.group == *group)
                .map(|resource| {
                    let mut value = json!({
                        "resource": resource.plural,
                        "responseKind": kind(resource.group, resource.version, resource.kind),
                        "scope": scope(resource.namespaced),
                        "singularResource": resource.singular,
                        "verbs": VERBS,
                    });
                    if !resource.short_names.is_empty() {
                        value["shortNames"] = json!(resource.short_names);
                    }
                    if !resource.categories.is_empty() {
                        value["categories"] = json!(resource.categories);
                    }
                    let subs: Vec<Value> = subresources(resource)
                        .into_iter()
                        .map(|(name, group, version, sub_kind, verbs)| {
                            json!({ "subresource": name, "responseKind": kind(group, version, sub_kind), "verbs": verbs })
                        })
                        .collect();
                    if !subs.is_empty() {
                        value["subresources"] = json!(subs);
                    }
                    value
                })
                .collect();
            list.extend(REVIEWS.iter().filter(|review| review.group == *group).map(|review| {
                json!({ "resource": review.plural, "responseKind": kind(review.group, "v1", review.kind),
                        "scope": scope(review.namespaced), "singularResource": review.singular, "verbs": ["create"] })
            }));
            let mut meta = json!({ "creationTimestamp": null });
            if !group.is_empty() {
                meta["name"] = json!(group);
            }
            json!({ "metadata": meta, "versions": [{ "version": resources::version(group), "freshness": "Current", "resources": list }] })
        })
        .collect();
    json!({ "kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items })
}

/// `/api/v1` and `/apis/GROUP/v1`: the plain form, which `kubectl drain` still reads.
pub(crate) fn group_version(group: &str, version: &str) -> Option<Response<Body>> {
    let known = group.is_empty() || resources::groups().contains(&group);
    if !known || version != resources::version(group) {
        return None;
    }
    let mut list = Vec::new();
    for resource in resources::offered().filter(|resource| resource.group == group) {
        let mut value = json!({
            "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
            "kind": resource.kind, "verbs": VERBS,
        });
        if !resource.short_names.is_empty() {
            value["shortNames"] = json!(resource.short_names);
        }
        if !resource.categories.is_empty() {
            value["categories"] = json!(resource.categories);
        }
        list.push(value);
        for (name, sub_group, sub_version, sub_kind, verbs) in subresources(resource) {
            let mut value = json!({
                "name": format!("{}/{name}", resource.plural), "singularName": "", "namespaced": resource.namespaced,
                "kind": sub_kind, "verbs": verbs,
            });
            if sub_group != resource.group {
                value["group"] = json!(sub_group);
                value["version"] = json!(sub_version);
            }
            list.push(value);
        }
    }
    for review in REVIEWS.iter().filter(|review| review.group == group) {
        list.push(
            json!({ "name": review.plural, "singularName": review.singular, "namespaced": review.namespaced,
                          "kind": review.kind, "verbs": ["create"] }),
        );
    }
    let group_version =
        if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Some(respond::json(
        StatusCode::OK,
        &json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list }),
    ))
}

fn describe(group: &str) -> Vec<openapi::ResourceDescription> {
    let stored = resources::offered().filter(|resource| resource.group == group).map(|resource| {
        openapi::ResourceDescription {
            group: resource.group.to_owned(),
            version: resource.version.to_owned(),
            kind: resource.kind.to_owned(),
            plural: resource.plural.to_owned(),
            namespaced: resource.namespaced,
            verbs: VERBS.iter().map(|verb| (*verb).to_owned()).collect(),
            status: resource.status,
            scale: resource.scale,
        }
    });
    let reviews = REVIEWS.iter().filter(|review| review.group == group).map(|review| {
        openapi::ResourceDescription {
            group: review.group.to_owned(),
            version: "v1".to_owned(),
            kind: review.kind.to_owned(),
            plural: review.plural.to_owned(),
            namespaced: review.namespaced,
            verbs: vec!["create".to_owned()],
            status: false,
            scale: false,
        }
    });
    stored.chain(reviews).collect()
}

/// OpenAPI documents by their path below `/openapi/v3/`.
static OPENAPI: LazyLock<Vec<(String, Document)>> = LazyLock::new(|| {
    std::iter::once("")
        .chain(resources::groups())
        .map(|group| {
            let path = match group {
                "" => "api/v1".to_owned(),
                group => format!("apis/{group}/{}", resources::version(group)),
            };
            (path, Document::new(&openapi::v3_document(facts(), &describe(group))))
        })
        .collect()
});

/// `/openapi/v3` and below.
pub(crate) fn openapi_v3(path: &str, headers: &HeaderMap) -> Option<Response<Body>> {
    let rest = path.strip_prefix("/openapi/v3")?.trim_matches('/');
    if rest.is_empty() {
        let paths: serde_json::Map<String, Value> = OPENAPI
            .iter()
            .map(|(path, document)| {
                let url = format!("/openapi/v3/{path}?hash={}", document.hash);
                (path.clone(), json!({ "serverRelativeURL": url }))
            })
            .collect();
        return Some(respond::json(StatusCode::OK, &json!({ "paths": paths })));
    }
    OPENAPI
        .iter()
        .find(|(path, _)| path == rest)
        .map(|(_, document)| document.answer(headers, "application/json"))
}

/// The version 2 document as JSON and as protobuf.
static OPENAPI_V2: LazyLock<(Document, Document)> = LazyLock::new(|| {
    let all: Vec<_> = std::iter::once("").chain(resources::groups()).flat_map(describe).collect();
    (
        Document::new(&openapi_v2::json_document(&all)),
        Document::of(openapi_v2::protobuf_document(&all).into()),
    )
});

/// `/openapi/v2`.
pub(crate) fn openapi_v2(headers: &HeaderMap) -> Response<Body> {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    if accept.is_some_and(|accept| accept.contains("proto-openapi.spec.v2")) {
        OPENAPI_V2.1.answer(headers, "application/com.github.proto-openapi.spec.v2.v1.0+protobuf")
    } else {
        OPENAPI_V2.0.answer(headers, "application/json")
    }
}

/// `/version`.
pub(crate) fn version() -> Response<Body> {
    respond::json(
        StatusCode::OK,
        &json!({
            "major": "1", "minor": "36", "gitVersion": GIT_VERSION, "gitCommit": "", "gitTreeState": "clean",
            "buildDate": "2026-01-01T00:00:00Z", "goVersion": "none (rust)", "compiler": "rustc",
            "platform": format!("linux/{}", match std::env::consts::ARCH { "x86_64" => "amd64", "aarch64" => "arm64", other => other }),
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_discovery_name_the_same_resources() {
        let document = aggregated(&[""]);
        let names: Vec<&str> = document["items"][0]["versions"][0]["resources"]
            .as_array()
            .expect("resources")
            .iter()
            .filter_map(|resource| resource["resource"].as_str())
            .collect();
        assert!(names.contains(&"pods") && names.contains(&"nodes"));
        let groups = aggregated(&resources::groups());
        assert_eq!(groups["items"].as_array().map(Vec::len), Some(resources::groups().len()));
        assert!(group_version("apps", "v1").is_some() && group_version("apps", "v2").is_none());
        let alpha = "policy.networking.k8s.io";
        assert!(group_version(alpha, "v1alpha2").is_some() && group_version(alpha, "v1").is_none());
    }

    #[test]
    fn the_accept_header_decides_on_the_form() {
        let mut headers = HeaderMap::new();
        assert!(!wants_aggregated(&headers));
        let accept = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json";
        headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
        assert!(!wants_aggregated(&headers));
        headers.insert(header::ACCEPT, HeaderValue::from_static(AGGREGATED));
        assert!(wants_aggregated(&headers));
    }
}
