//! gzip for large answers (RFC 9110 §8.4.1.3), for clients that take it.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderValue, Response, StatusCode, header};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use orch_client::{Body, full_body};

/// Smaller bodies are not worth the time; upstream's value.
const THRESHOLD_BYTES: u64 = 128 * 1024;

/// Compresses a body that is large and known as a whole; streams pass through.
pub(crate) async fn large(response: Response<Body>, accepted: bool) -> Response<Body> {
    let size = response.body().size_hint().exact().unwrap_or(0);
    if !accepted || size < THRESHOLD_BYTES || response.status() != StatusCode::OK {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let Ok(collected) = body.collect().await else {
        return Response::from_parts(parts, full_body(bytes::Bytes::new()));
    };
    let bytes = collected.to_bytes();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    match encoder.write_all(&bytes).and_then(|()| encoder.finish()) {
        Ok(packed) => {
            parts.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            parts.headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
            Response::from_parts(parts, full_body(packed.into()))
        }
        Err(_) => Response::from_parts(parts, full_body(bytes)),
    }
}
