//! Answers: JSON or YAML, errors as `Status`, and which form a client asked for.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use orch_api::ApiError;
use orch_client::{Body, full_body};
use serde_json::Value;

/// Form of an object in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The object itself.
    Object,
    /// meta.k8s.io/v1 Table.
    Table,
    /// meta.k8s.io/v1 `PartialObjectMetadata`: metadata only.
    Metadata,
}

/// How answers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writing {
    Json,
    Yaml,
}

/// A body that this server has made as one JSON document; what it passes on for others is theirs.
#[derive(Debug, Clone, Copy)]
struct Own;

/// Picks the first form of the Accept header that this server has (RFC 9110 §12.5.1, in the order given, as
/// Kubernetes clients mean it).
///
/// # Errors
/// 406: there is none.
pub(crate) fn negotiate(headers: &HeaderMap) -> Result<Form, ApiError> {
    chosen(headers, true).map(|(form, _)| form)
}

/// The same for a stream of events: there is no YAML of one (upstream neither).
///
/// # Errors
/// 406: there is none.
pub(crate) fn negotiate_stream(headers: &HeaderMap) -> Result<Form, ApiError> {
    chosen(headers, false).map(|(form, _)| form)
}

/// Whether a client rather reads YAML than JSON.
pub(crate) fn prefers_yaml(headers: &HeaderMap) -> bool {
    chosen(headers, true).is_ok_and(|(_, writing)| writing == Writing::Yaml)
}

fn chosen(headers: &HeaderMap, with_yaml: bool) -> Result<(Form, Writing), ApiError> {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("*/*");
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let writing = match parts.next().unwrap_or_default() {
            "application/json" | "application/*" | "*/*" | "" => Writing::Json,
            "application/yaml" if with_yaml => Writing::Yaml,
            _ => continue,
        };
        let parameters: Vec<(&str, &str)> = parts.filter_map(|part| part.split_once('=')).collect();
        let get =
            |key: &str| parameters.iter().find(|(name, _)| *name == key).map(|(_, value)| *value);
        match (get("as"), get("g"), get("v")) {
            (None, _, _) => return Ok((Form::Object, writing)),
            (Some("Table"), Some("meta.k8s.io"), Some("v1")) => return Ok((Form::Table, writing)),
            (
                Some("PartialObjectMetadata" | "PartialObjectMetadataList"),
                Some("meta.k8s.io"),
                Some("v1"),
            ) => {
                return Ok((Form::Metadata, writing));
            }
            _ => {}
        }
    }
    let yaml = if with_yaml { ", application/yaml" } else { "" };
    Err(ApiError::not_acceptable(&format!(
        "application/json{yaml}, application/json;as=Table;g=meta.k8s.io;v=v1"
    )))
}

/// An answer of this server in YAML; what is no JSON document of its own stays as it is.
pub(crate) async fn in_yaml(mut response: Response<Body>) -> Response<Body> {
    if response.extensions_mut().remove::<Own>().is_none() {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let bytes = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let text = serde_json::from_slice::<Value>(&bytes)
        .map_err(ApiError::internal)
        .and_then(|value| serde_saphyr::to_string(&value).map_err(ApiError::internal));
    match text {
        Ok(text) => {
            let yaml = HeaderValue::from_static("application/yaml");
            parts.headers.insert(header::CONTENT_TYPE, yaml);
            Response::from_parts(parts, full_body(text.into()))
        }
        Err(failure) => error(&failure),
    }
}

pub(crate) fn json(code: StatusCode, value: &Value) -> Response<Body> {
    bytes(code, serde_json::to_vec(value).unwrap_or_default().into())
}

pub(crate) fn bytes(code: StatusCode, body: Bytes) -> Response<Body> {
    let mut response = Response::new(full_body(body));
    *response.status_mut() = code;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.extensions_mut().insert(Own);
    response
}

pub(crate) fn text(code: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full_body(body.into()));
    *response.status_mut() = code;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

pub(crate) fn error(error: &ApiError) -> Response<Body> {
    let code = StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(code, &error.to_status());
    if let Some(seconds) = error.retry_after_seconds()
        && let Ok(value) = HeaderValue::from_str(&seconds.to_string())
    {
        response.headers_mut().insert(header::RETRY_AFTER, value);
    }
    response
}

/// Adds a warning that kubectl prints (RFC 7234 §5.5, code 299).
pub(crate) fn warn(response: &mut Response<Body>, warnings: &[String]) {
    for warning in warnings {
        let escaped: String = warning.chars().filter(|c| !c.is_control()).collect();
        let escaped = escaped.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{escaped}\"")) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(accept: &str) -> Result<Form, u16> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_str(accept).expect("a header"));
        negotiate(&headers).map_err(|error| error.code)
    }

    #[test]
    fn forms_by_table() {
        for (accept, expected) in [
            ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", Ok(Form::Table)),
            (
                "application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json",
                Ok(Form::Object),
            ),
            ("application/vnd.kubernetes.protobuf,application/json", Ok(Form::Object)),
            (
                "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
                Ok(Form::Metadata),
            ),
            ("*/*", Ok(Form::Object)),
            ("application/vnd.kubernetes.protobuf", Err(406)),
            ("application/yaml", Ok(Form::Object)),
        ] {
            assert_eq!(form(accept), expected, "{accept}");
        }
    }

    #[test]
    fn yaml_is_for_who_asks_for_it_first() {
        for (accept, expected) in [
            ("application/yaml", true),
            ("application/vnd.kubernetes.protobuf,application/yaml,application/json", true),
            ("application/json,application/yaml", false),
            ("*/*", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            assert_eq!(prefers_yaml(&headers), expected, "{accept}");
        }
        assert!(!prefers_yaml(&HeaderMap::new()));
    }
}
