//! Watches: history first, then what comes.

use std::collections::VecDeque;
use std::convert::Infallible;

use bytes::Bytes;
use futures::stream;
use http::{Request, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use orch_client::Body;
use serde_json::{Value, json};

use super::request::{Options, Target};
use super::{Entry, FakeServer, Refusal, refuse};

struct Watch {
    server: FakeServer,
    target: Target,
    options: Options,
    revision: u64,
    ready: VecDeque<Bytes>,
    changed: tokio::sync::watch::Receiver<(u64, u64)>,
    connection: u64,
}

pub(super) fn start(
    server: &FakeServer,
    request: &Request<Bytes>,
) -> Result<(StatusCode, Body), Refusal> {
    let path = request.uri().path();
    let Some(target) = Target::of_path(path) else {
        return refuse(StatusCode::NOT_FOUND, "NotFound", path.to_owned());
    };
    let options = Options::parse(request)?;
    let from = options.resource_version.as_deref().unwrap_or("0").parse().unwrap_or(0);
    {
        let mut state = server.state.lock();
        if state.failures > 0 {
            state.failures -= 1;
            return refuse(
                StatusCode::INTERNAL_SERVER_ERROR,
                "InternalError",
                "by the test".into(),
            );
        }
        if from < state.oldest {
            return refuse(StatusCode::GONE, "Expired", "too old resource version".into());
        }
    }
    let mut changed = server.changed.subscribe();
    let connection = changed.borrow_and_update().1;
    let watch = Watch {
        server: server.clone(),
        target,
        options,
        revision: from,
        ready: VecDeque::new(),
        changed,
        connection,
    };
    let lines = stream::unfold(watch, |mut watch| async move {
        let line = watch.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(line)), watch))
    });
    Ok((StatusCode::OK, StreamBody::new(lines).map_err(|never| match never {}).boxed_unsync()))
}

impl Watch {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(line) = self.ready.pop_front() {
                return Some(line);
            }
            if self.changed.borrow_and_update().1 != self.connection {
                return None;
            }
            self.read();
            if self.ready.is_empty() {
                self.changed.changed().await.ok()?;
            }
        }
    }

    fn read(&mut self) {
        let state = self.server.state.lock();
        let (revision, target) = (self.revision, &self.target);
        let news = state.history.iter();
        let news = news.filter(|one| one.revision > revision && target.contains(&one.target));
        let lines: Vec<Bytes> = news.filter_map(|entry| self.line(entry)).collect();
        self.revision = state.revision;
        drop(state);
        self.ready.extend(lines);
    }

    /// By what the selector sees: an object that stops matching is deleted for this watch.
    fn line(&self, entry: &Entry) -> Option<Bytes> {
        let seen =
            |object: &Option<Value>| object.clone().filter(|object| self.options.matches(object));
        let (kind, mut object) = match (seen(&entry.old), seen(&entry.new)) {
            (None, Some(new)) => ("ADDED", new),
            (Some(_), Some(new)) => ("MODIFIED", new),
            (Some(old), None) => ("DELETED", old),
            (None, None) => return None,
        };
        object["metadata"]["resourceVersion"] = json!(entry.revision.to_string());
        Some(format!("{}\n", json!({ "type": kind, "object": object })).into())
    }
}
