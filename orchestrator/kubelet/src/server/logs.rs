//! `/containerLogs`: a container's output as a stream that ends with the container.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, future, stream};
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use orch_cri::{Container, LogQuery};

use crate::context::Context;
use crate::server::path::LogOptions;
use crate::server::{Body, text};

pub(super) async fn answer(
    cx: &Arc<Context>,
    container: &Container,
    options: &LogOptions,
) -> Response<Body> {
    let query = LogQuery {
        follow: options.follow,
        timestamps: options.timestamps,
        tail: options.tail_lines,
        since: options.since.map(|since| since.as_second()),
    };
    let output = match cx.runtime().logs(&container.id, &query).await {
        Ok(output) => output,
        Err(error) if error.is_unavailable() => {
            return text(StatusCode::SERVICE_UNAVAILABLE, &error.to_string());
        }
        Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    };
    // The last piece is cut where the limit is reached.
    let mut left = options.limit_bytes.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let pieces = output
        .map(|piece| piece.map(|piece| piece.into_bytes()))
        .scan((), move |(), piece| {
            let cut = match (&mut left, piece) {
                (Some(0), _) => None,
                (Some(left), Ok(piece)) => {
                    let piece = piece.slice(..piece.len().min(*left));
                    *left -= piece.len();
                    Some(Ok(piece))
                }
                (_, piece) => Some(piece),
            };
            future::ready(cut)
        })
        .map(|piece| match piece {
            Ok(bytes) => Ok(Frame::data(bytes)),
            Err(error) => Err(Box::<dyn std::error::Error + Send + Sync>::from(error)),
        });
    // An empty first frame makes the head of the answer go out before the first line.
    let pieces = stream::once(future::ready(Ok(Frame::data(Bytes::new())))).chain(pieces);
    let mut answer = Response::new(StreamBody::new(pieces).boxed_unsync());
    answer
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
    answer
}
