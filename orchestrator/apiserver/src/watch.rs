//! watch and watch-list (API concepts, "Efficient detection of changes", "Streaming lists").

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::StatusCode;
use http_body_util::{BodyExt as _, StreamBody};
use orch_api::ApiError;
use orch_client::Body;
use orch_store::cache::{EventKind, Object, WatchFrom, WatchItem, Watcher};
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::read::{self, Filter, fresh, scope};
use crate::request::Query;
use crate::resources::Resource;
use crate::respond::{self, Form};
use crate::state::{Shared, Stored};
use crate::table;

/// A watch without `timeoutSeconds` ends after a random time, so that clients do not all come back at once.
const DEFAULT_SECONDS: std::ops::Range<u64> = 1800..3600;
/// How often a bookmark says how far the watch has come.
const BOOKMARK_PERIOD: Duration = Duration::from_secs(60);

/// A watch stream: what it still has to send, then what happens.
struct Stream {
    watcher: Watcher,
    pending: VecDeque<Bytes>,
    resource: &'static Resource,
    filter: Filter,
    scope: String,
    form: Form,
    include: String,
    bookmarks: bool,
    deadline: Instant,
    stop: CancellationToken,
    /// Whether this server lost its store, so that nothing would come any more.
    lost: tokio::sync::watch::Receiver<bool>,
    columns_sent: bool,
    ended: bool,
}

/// GET with `watch`.
pub(crate) async fn watch(
    shared: &Shared,
    stored: &Stored,
    namespace: &str,
    query: &Query,
    form: Form,
) -> Result<http::Response<Body>, ApiError> {
    let lost = shared.feed.lost();
    if *lost.borrow() {
        // The client goes to another server, if there is one.
        return Err(ApiError::service_unavailable(
            "etcd does not answer, so nothing can be watched",
        ));
    }
    let filter = Filter::parse(stored.resource, query)?;
    let initial = query.get("sendInitialEvents").map(|value| value == "true");
    let bookmarks = query.flag("allowWatchBookmarks");
    check_initial(initial, query)?;
    let version = query.get("resourceVersion");
    let scope = scope(stored.resource, namespace);
    let seconds = query
        .number("timeoutSeconds")?
        .and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|s| *s > 0);
    let seconds = seconds.unwrap_or_else(|| rand::rng().random_range(DEFAULT_SECONDS));

    let from_state = match (initial, version) {
        (Some(wanted), _) => wanted,
        (None, None | Some("0")) => true,
        (None, Some(_)) => false,
    };
    if from_state && initial == Some(true) {
        match version {
            None => fresh(stored).await?,
            Some(version) => wait(stored, version).await?,
        }
    }
    let (watcher, snapshot) = if from_state {
        if !stored.cache.ready().await {
            return Err(ApiError::service_unavailable("the server is stopping"));
        }
        let (snapshot, watcher) = stored.cache.snapshot_and_watch();
        (watcher, Some(snapshot))
    } else {
        let from = match version {
            None | Some("0") => WatchFrom::Now,
            Some(version) => {
                let revision = version.parse().map_err(|_| {
                    ApiError::bad_request(format!(
                        "Invalid value: {version:?}: resourceVersion is no number"
                    ))
                })?;
                WatchFrom::Revision(revision)
            }
        };
        match stored.cache.watch(from) {
            Ok(watcher) => (watcher, None),
            // The stream itself is fine, its one event says that the history is gone.
            Err(too_old) => {
                let error = ApiError::expired(too_old.to_string());
                let line = event_line("ERROR", &error.to_status());
                return Ok(streaming(stream::iter([Ok(http_body::Frame::data(line))])));
            }
        }
    };
    let mut stream = Stream {
        watcher,
        pending: VecDeque::new(),
        resource: stored.resource,
        filter,
        scope,
        form,
        include: query.get("includeObject").unwrap_or("Metadata").to_owned(),
        bookmarks,
        deadline: Instant::now() + Duration::from_secs(seconds),
        stop: shared.stop.clone(),
        lost,
        columns_sent: false,
        ended: false,
    };
    if bookmarks {
        stream.watcher.bookmark_every(BOOKMARK_PERIOD);
    }
    if let Some(snapshot) = snapshot {
        let objects: Vec<Arc<Object>> = snapshot
            .range(&stream.scope, None)
            .filter(|object| stream.filter.matches(&object.meta))
            .cloned()
            .collect();
        for object in objects {
            let line = stream.line(EventKind::Added, &object);
            stream.pending.push_back(line);
        }
        if initial == Some(true) {
            let line = stream.bookmark(snapshot.revision, true);
            stream.pending.push_back(line);
        }
    }
    let frames = stream::unfold(stream, |mut stream| async move {
        let line = stream.next().await?;
        Some((Ok(http_body::Frame::data(line)), stream))
    });
    Ok(streaming(frames))
}

/// The rules of `sendInitialEvents`; unknown combinations are refused, because a client that is ignored waits for
/// ever.
fn check_initial(initial: Option<bool>, query: &Query) -> Result<(), ApiError> {
    let matching = query.get("resourceVersionMatch");
    let refuse = |why: &str| {
        let mut error = ApiError::invalid(
            "meta.k8s.io",
            "ListOptions",
            "",
            &[orch_api::FieldError::forbidden("sendInitialEvents", why)],
        );
        error.code = 422;
        Err(error)
    };
    match (initial, matching) {
        (None, Some(_)) => refuse(
            "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
        ),
        (Some(_), None) => refuse(
            "resourceVersionMatch must be set to NotOlderThan when sendInitialEvents is provided",
        ),
        (Some(_), Some(other)) if other != "NotOlderThan" => {
            refuse("resourceVersionMatch must be NotOlderThan")
        }
        _ => Ok(()),
    }
}

async fn wait(stored: &Stored, version: &str) -> Result<(), ApiError> {
    let revision = version.parse().map_err(|_| {
        ApiError::bad_request(format!("Invalid value: {version:?}: resourceVersion is no number"))
    })?;
    stored
        .cache
        .wait_for(revision, Duration::from_secs(3))
        .await
        .map_err(|_| ApiError::too_large_resource_version(revision, stored.cache.revision()))
}

fn streaming<S>(frames: S) -> http::Response<Body>
where
    S: futures::Stream<
            Item = Result<http_body::Frame<Bytes>, Box<dyn std::error::Error + Send + Sync>>,
        > + Send
        + 'static,
{
    let mut response = respond::bytes(StatusCode::OK, Bytes::new());
    *response.body_mut() = StreamBody::new(frames).boxed_unsync();
    response
}

fn event_line(kind: &str, object: &Value) -> Bytes {
    let mut line =
        serde_json::to_vec(&json!({ "type": kind, "object": object })).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

/// Waits until the store is lost.
async fn lost(feed: &mut tokio::sync::watch::Receiver<bool>) {
    if feed.wait_for(|lost| *lost).await.is_err() {
        // The feed is gone: the server stops, and that is noticed elsewhere.
        std::future::pending::<()>().await;
    }
}

impl Stream {
    /// The next line; `None` ends the stream.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(line) = self.pending.pop_front() {
                return Some(line);
            }
            if self.ended {
                return None;
            }
            let item = tokio::select! {
                item = self.watcher.next() => item?,
                () = tokio::time::sleep_until(self.deadline) => {
                    // The last bookmark lets the client come back without a gap.
                    self.ended = true;
                    if self.bookmarks {
                        let position = self.watcher.position();
                        return Some(self.bookmark(position, false));
                    }
                    return None;
                }
                () = self.stop.cancelled() => return None,
                () = lost(&mut self.lost) => return None,
            };
            match item {
                WatchItem::Event(event) => {
                    if !event.object.key.starts_with(&self.scope) {
                        continue;
                    }
                    if let Some(kind) = event.seen_by(|object| self.filter.matches(&object.meta)) {
                        return Some(match self.form {
                            Form::Object => event.encoded(kind),
                            Form::Metadata => event
                                .variant("metadata", kind, |object| metadata_line(kind, object)),
                            Form::Table => {
                                let object = event.object_as(kind).clone();
                                self.line(kind, &object)
                            }
                        });
                    }
                }
                WatchItem::Bookmark(revision) => return Some(self.bookmark(revision, false)),
                // The client comes back with the last revision it saw.
                WatchItem::Overflow => return None,
            }
        }
    }

    fn line(&mut self, kind: EventKind, object: &Object) -> Bytes {
        match self.form {
            Form::Object => {
                let parts: [&[u8]; 5] = [
                    b"{\"type\":\"",
                    kind.as_str().as_bytes(),
                    b"\",\"object\":",
                    &object.bytes,
                    b"}\n",
                ];
                parts.concat().into()
            }
            Form::Metadata => metadata_line(kind, object),
            Form::Table => {
                let value = read::parse(&object.bytes).unwrap_or(Value::Null);
                let meta = json!({ "resourceVersion": object.revision.to_string() });
                let rows = vec![table::row(self.resource, value, &self.include)];
                // Column definitions are wanted in the first table only.
                let table = table::table(
                    self.resource,
                    rows,
                    &meta,
                    !std::mem::replace(&mut self.columns_sent, true),
                );
                event_line(kind.as_str(), &table)
            }
        }
    }

    fn bookmark(&self, revision: i64, initial_end: bool) -> Bytes {
        let mut meta =
            json!({ "resourceVersion": revision.to_string(), "creationTimestamp": null });
        if initial_end {
            meta["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
        }
        let (kind, version) = match self.form {
            Form::Object => (self.resource.kind, self.resource.api_version()),
            Form::Metadata => ("PartialObjectMetadata", "meta.k8s.io/v1".to_owned()),
            Form::Table => {
                let row = json!({ "cells": [], "object": { "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta } });
                let table = json!({ "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": { "resourceVersion": revision.to_string() },
                                    "columnDefinitions": null, "rows": [row] });
                return event_line("BOOKMARK", &table);
            }
        };
        event_line("BOOKMARK", &json!({ "kind": kind, "apiVersion": version, "metadata": meta }))
    }
}

fn metadata_line(kind: EventKind, object: &Object) -> Bytes {
    event_line(kind.as_str(), &table::partial(&read::parse(&object.bytes).unwrap_or(Value::Null)))
}
