//! The one thing a way to the API server must do.

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;

use crate::Error;

/// A streaming body.
pub type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// Carries requests to the API server.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Sends one request; its URI has path and query only.
    async fn send(&self, request: http::Request<Bytes>) -> Result<http::Response<Body>, Error>;
}

/// A body of one piece.
#[must_use]
pub fn full_body(bytes: Bytes) -> Body {
    http_body_util::Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// No body.
#[must_use]
pub fn empty_body() -> Body {
    full_body(Bytes::new())
}
