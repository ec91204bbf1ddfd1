//! Requests to the API server whose answers stay JSON: the command line prints what the server says and needs no
//! type for it.

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, header};
use orch_client::{Client, Error};
use serde_json::Value;

pub(crate) const JSON: &str = "application/json";
/// RFC 7386.
pub(crate) const MERGE_PATCH: &str = "application/merge-patch+json";

/// The part of a URL behind `?`.
#[derive(Debug, Default)]
pub(crate) struct Query(String);

impl Query {
    pub(crate) fn add(&mut self, key: &str, value: &str) {
        if !self.0.is_empty() {
            self.0.push('&');
        }
        self.0.push_str(&encode(key));
        self.0.push('=');
        self.0.push_str(&encode(value));
    }

    /// The path with this query behind it.
    pub(crate) fn append_to(&self, path: &str) -> String {
        if self.0.is_empty() { path.to_owned() } else { format!("{path}?{}", self.0) }
    }
}

/// Percent-encoding of everything but RFC 3986's unreserved characters.
pub(crate) fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// GET of an object or a list.
pub(crate) async fn get(client: &Client, path: &str) -> anyhow::Result<Value> {
    get_as(client, path, JSON).await
}

/// GET in another representation, for example a table.
pub(crate) async fn get_as(
    client: &Client,
    path: &str,
    accept: &'static str,
) -> anyhow::Result<Value> {
    Ok(request(client, Method::GET, path, accept, None).await?)
}

/// GET of an object that may be absent.
pub(crate) async fn get_opt(client: &Client, path: &str) -> anyhow::Result<Option<Value>> {
    match request(client, Method::GET, path, JSON, None).await {
        Ok(value) => Ok(Some(value)),
        // Only the object: an absent namespace or resource is a mistake that should be told.
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Sends a body and returns the answer.
pub(crate) async fn send(
    client: &Client,
    method: Method,
    path: &str,
    content_type: &'static str,
    body: &Value,
) -> anyhow::Result<Value> {
    let bytes = serde_json::to_vec(body).context("encode the request")?;
    Ok(request(client, method, path, JSON, Some((content_type, bytes.into()))).await?)
}

async fn request(
    client: &Client,
    method: Method,
    path: &str,
    accept: &'static str,
    body: Option<(&'static str, Bytes)>,
) -> Result<Value, Error> {
    let mut request = Request::builder()
        .method(method.clone())
        .uri(path)
        .header(header::ACCEPT, HeaderValue::from_static(accept))
        .body(Bytes::new())
        .map_err(|error| Error::Config(format!("path {path:?}: {error}")))?;
    if let Some((content_type, bytes)) = body {
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        *request.body_mut() = bytes;
    }
    let response = client.stream_ok(request).await?;
    warn_of(response.headers());
    let bytes = http_body_util::BodyExt::collect(response.into_body())
        .await
        .map_err(|source| Error::Transport { context: "the answer broke off".to_owned(), source })?
        .to_bytes();
    serde_json::from_slice(&bytes)
        .map_err(|source| Error::Decode { request: format!("{method} {path}"), source })
}

/// Passes on the server's warnings (API concepts, "Warnings": `Warning: 299 - "text"`).
fn warn_of(headers: &http::HeaderMap) {
    for value in headers.get_all(header::WARNING) {
        if let Some(text) = value.to_str().ok().and_then(|value| value.splitn(3, ' ').nth(2)) {
            eprintln!("warning: {}", text.trim_matches('"').replace("\\\"", "\""));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_percent_encoded() {
        let mut query = Query::default();
        assert_eq!(query.append_to("/api/v1/pods"), "/api/v1/pods");
        query.add("labelSelector", "app in (a,b)");
        query.add("x", "ü");
        assert_eq!(
            query.append_to("/api/v1/pods"),
            "/api/v1/pods?labelSelector=app%20in%20%28a%2Cb%29&x=%C3%BC"
        );
    }
}
