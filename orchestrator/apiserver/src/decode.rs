//! Request bodies: JSON, YAML or protobuf in, a checked JSON object out.

use bytes::Bytes;
use http::{HeaderMap, header};
use orch_api::ApiError;
use orch_facts::{facts, protobuf, strict};
use serde_json::{Value, json};

use crate::request::Query;

const ACCEPTED: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";

/// How unknown and duplicate fields are met (API concepts, "Field validation").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

/// A decoded object and what there is to warn of.
pub(crate) struct Decoded {
    pub(crate) object: Value,
    pub(crate) warnings: Vec<String>,
}

/// The media type of a body; a missing one means JSON.
pub(crate) fn media_type(headers: &HeaderMap) -> String {
    let value =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if media.is_empty() { "application/json".to_owned() } else { media }
}

/// Decodes a body of a given kind. `kind` may be absent from the body; when it is there it must agree.
///
/// # Errors
/// 415 for other media types, 400 for what is no such object.
pub(crate) fn object(
    headers: &HeaderMap,
    query: &Query,
    body: &Bytes,
    group: &str,
    version: &str,
    kind: &str,
) -> Result<Decoded, ApiError> {
    let validation = match query.get("fieldValidation") {
        None | Some("Warn") => FieldValidation::Warn,
        Some("Ignore") => FieldValidation::Ignore,
        Some("Strict") => FieldValidation::Strict,
        Some(other) => {
            return Err(ApiError::bad_request(format!(
                "fieldValidation {other:?} is not one of \"Ignore\", \"Warn\", \"Strict\""
            )));
        }
    };
    let (mut object, duplicates) = raw(headers, body)?;
    if !object.is_object() {
        return Err(ApiError::bad_request(format!("the body of the request is no {kind} object")));
    }
    let api_version =
        if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    for (field, expected) in [("apiVersion", api_version.as_str()), ("kind", kind)] {
        match object[field].as_str() {
            None | Some("") => {}
            Some(found) if found == expected => {}
            Some(found) => {
                return Err(ApiError::bad_request(format!(
                    "the {field} in the data ({found}) does not match the expected {field} ({expected})"
                )));
            }
        }
    }
    object["apiVersion"] = json!(api_version);
    object["kind"] = json!(kind);
    let warnings = match facts().kind(group, version, kind) {
        Some(known) => check((known, version, kind), &mut object, duplicates, validation)?,
        None => Vec::new(),
    };
    Ok(Decoded { object, warnings })
}

/// Checks an object that was put together (a patch result) by the same rules.
///
/// # Errors
/// As [`object`].
pub(crate) fn recheck(
    query: &Query,
    object: &mut Value,
    group: &str,
    version: &str,
    kind: &str,
) -> Result<Vec<String>, ApiError> {
    let validation = match query.get("fieldValidation") {
        Some("Strict") => FieldValidation::Strict,
        Some("Ignore") => FieldValidation::Ignore,
        _ => FieldValidation::Warn,
    };
    match facts().kind(group, version, kind) {
        Some(known) => check((known, version, kind), object, Vec::new(), validation),
        None => Ok(Vec::new()),
    }
}

/// Checks an object by what is known of its type, and takes away what is not; returns what to warn of.
fn check(
    (known, version, kind): (orch_facts::TypeId, &str, &str),
    object: &mut Value,
    duplicates: Vec<String>,
    validation: FieldValidation,
) -> Result<Vec<String>, ApiError> {
    let findings = strict::check(facts(), known, object);
    if let Some(first) = findings.invalid.first() {
        return Err(ApiError::bad_request(format!(
            "{kind} in version {version:?} cannot be handled as a {kind}: {first}"
        )));
    }
    let unknown: Vec<String> = findings.unknown.into_iter().chain(duplicates).collect();
    if validation == FieldValidation::Strict && !unknown.is_empty() {
        let all = unknown.join(", ");
        return Err(ApiError::bad_request(format!("strict decoding error: {all}")));
    }
    strict::prune(facts(), known, object);
    Ok(if validation == FieldValidation::Warn { unknown } else { Vec::new() })
}

/// The body as JSON, whatever its media type, with the duplicate fields of a JSON text.
fn raw(headers: &HeaderMap, body: &Bytes) -> Result<(Value, Vec<String>), ApiError> {
    match media_type(headers).as_str() {
        "application/vnd.kubernetes.protobuf" => {
            protobuf::decode(facts(), body).map(|object| (object, Vec::new())).map_err(|error| {
                ApiError::bad_request(format!("the protobuf body cannot be decoded: {error}"))
            })
        }
        "application/json" => {
            let object = serde_json::from_slice(body).map_err(|error| {
                ApiError::bad_request(format!("the object provided is unrecognized: {error}"))
            })?;
            Ok((object, strict::duplicates(body)))
        }
        "application/yaml" | "application/x-yaml" | "text/yaml" => {
            yaml(body).map(|object| (object, Vec::new()))
        }
        _ => Err(ApiError::unsupported_media_type(ACCEPTED)),
    }
}

/// YAML as JSON.
///
/// # Errors
/// 400 when it is none.
pub(crate) fn yaml(body: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(body)
        .map_err(|_| ApiError::bad_request("the YAML body is no UTF-8"))?;
    serde_saphyr::from_str(text)
        .map_err(|error| ApiError::bad_request(format!("the body is no YAML: {error}")))
}

/// A small object that is optional (`DeleteOptions`): `Null` for an empty body.
///
/// # Errors
/// 400 or 415 for what cannot be decoded.
pub(crate) fn optional(headers: &HeaderMap, body: &Bytes) -> Result<Value, ApiError> {
    if body.is_empty() { Ok(Value::Null) } else { raw(headers, body).map(|(object, _)| object) }
}
