//! Watch streams: one JSON event per line (API concepts, "Efficient detection of changes").

use bytes::{Bytes, BytesMut};
use futures::stream::{self, Stream, StreamExt as _};
use http_body_util::BodyExt as _;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::api::Kind;
use crate::{Body, Error};

/// One event of a watch.
#[derive(Debug, Clone)]
pub enum WatchEvent<K> {
    Added(K),
    Modified(K),
    Deleted(K),
    /// Nothing changed up to this resource version; `initial_events_end` closes the first part of a watch-list.
    Bookmark {
        resource_version: String,
        initial_events_end: bool,
    },
}

/// The lines of a streaming body, without their ends.
pub fn lines(body: Body) -> impl Stream<Item = Result<Bytes, Error>> + Send {
    let state = (body, BytesMut::new(), false);
    stream::unfold(state, |(mut body, mut buffer, mut ended)| async move {
        loop {
            if let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line = buffer.split_to(end + 1).freeze();
                return Some((Ok(line.slice(..end)), (body, buffer, ended)));
            }
            if ended {
                let rest = buffer.split().freeze();
                return (!rest.is_empty()).then_some((Ok(rest), (body, buffer, ended)));
            }
            match body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => {
                    buffer.clear();
                    return Some((
                        Err(Error::transport("the stream broke", error)),
                        (body, buffer, true),
                    ));
                }
                None => ended = true,
            }
        }
    })
}

#[derive(serde::Deserialize)]
struct Raw<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

pub(crate) fn events<K: Kind>(
    body: Body,
) -> impl Stream<Item = Result<WatchEvent<K>, Error>> + Send {
    lines(body).filter_map(|line| async move {
        match line {
            Ok(line) if line.is_empty() => None,
            Ok(line) => Some(parse(&line)),
            Err(error) => Some(Err(error)),
        }
    })
}

fn parse<K: Kind>(line: &[u8]) -> Result<WatchEvent<K>, Error> {
    let decode =
        |source| Error::Decode { request: format!("watch {}", K::URL_PATH_SEGMENT), source };
    let raw: Raw<'_> = serde_json::from_slice(line).map_err(decode)?;
    let object = || serde_json::from_str::<K>(raw.object.get()).map_err(decode);
    match raw.kind {
        "ADDED" => Ok(WatchEvent::Added(object()?)),
        "MODIFIED" => Ok(WatchEvent::Modified(object()?)),
        "DELETED" => Ok(WatchEvent::Deleted(object()?)),
        "BOOKMARK" => {
            let value: Value = serde_json::from_str(raw.object.get()).map_err(decode)?;
            let metadata = &value["metadata"];
            Ok(WatchEvent::Bookmark {
                resource_version: metadata["resourceVersion"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
                initial_events_end: metadata["annotations"]["k8s.io/initial-events-end"] == "true",
            })
        }
        _ => Err(Error::from_status(500, raw.object.get().as_bytes())),
    }
}

#[cfg(test)]
mod tests {
    use orch_api::k8s_openapi::api::core::v1::Pod;

    use super::*;

    #[tokio::test]
    async fn events_split_over_frames_are_put_together() {
        let text = "{\"type\":\"ADDED\",\"object\":{\"metadata\":{\"name\":\"a\"}}}\n{\"type\":\"BOOKMARK\",\"object\":{\"metadata\":{\"resourceVersion\":\"7\"}}}\n{\"type\":\"ERROR\",\"object\":{\"code\":410,\"reason\":\"Expired\",\"message\":\"too old\"}}\n";
        for size in [1, 7, 1000] {
            let pieces: Vec<_> = text
                .as_bytes()
                .chunks(size)
                .map(|piece| {
                    Ok::<_, std::convert::Infallible>(http_body::Frame::data(
                        Bytes::copy_from_slice(piece),
                    ))
                })
                .collect();
            let body = http_body_util::StreamBody::new(stream::iter(pieces));
            let body = body.map_err(|never| match never {}).boxed_unsync();
            let seen: Vec<_> = events::<Pod>(body).collect().await;
            assert!(
                matches!(&seen[0], Ok(WatchEvent::Added(pod)) if pod.metadata.name.as_deref() == Some("a"))
            );
            assert!(
                matches!(&seen[1], Ok(WatchEvent::Bookmark { resource_version, .. }) if resource_version == "7")
            );
            assert!(matches!(&seen[2], Err(error) if error.is_gone()));
            assert_eq!(seen.len(), 3);
        }
    }
}
