//! An API server of lists, watches and merge patches, in memory, below the real client.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use futures::channel::mpsc;
use futures::{StreamExt as _, stream};
use http::{Method, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use orch_client::{Body, Client, Error, Transport, full_body};
use parking_lot::Mutex;
use serde_json::{Value, json};

#[derive(Clone, Default)]
pub struct FakeApi {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By collection path, then by namespace and name.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// Version, collection, key, line.
    log: Vec<(u64, String, String, Bytes)>,
    watchers: Vec<(String, Option<String>, mpsc::UnboundedSender<Bytes>)>,
    away: bool,
}

pub const SERVICES: &str = "/api/v1/services";
pub const NAMESPACES: &str = "/api/v1/namespaces";
pub const NODES: &str = "/api/v1/nodes";
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";

impl FakeApi {
    pub fn client(&self) -> Client {
        Client::new(self.clone())
    }

    pub fn put(&self, collection: &str, object: Value) {
        self.state.lock().put(collection, object);
    }

    pub fn get(&self, collection: &str, name: &str) -> Option<Value> {
        self.state.lock().objects.get(collection)?.get(name).cloned()
    }

    /// Away: watches end, and every request fails.
    pub fn set_away(&self, away: bool) {
        let mut state = self.state.lock();
        state.away = away;
        if away {
            state.watchers.clear();
        }
    }
}

impl State {
    fn put(&mut self, collection: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let key = key(&object);
        let known = self
            .objects
            .entry(collection.to_owned())
            .or_default()
            .insert(key.clone(), object.clone());
        let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
        let line = Bytes::from(format!("{}\n", json!({"type": kind, "object": object})));
        self.log.push((self.version, collection.to_owned(), key.clone(), line.clone()));
        self.watchers.retain(|(watched, name, sender)| {
            let concerns = watched == collection && name.as_ref().is_none_or(|name| *name == key);
            !concerns || sender.unbounded_send(line.clone()).is_ok()
        });
    }
}

fn key(object: &Value) -> String {
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default();
    if text("namespace").is_empty() {
        text("name").to_owned()
    } else {
        format!("{}/{}", text("namespace"), text("name"))
    }
}

#[async_trait::async_trait]
impl Transport for FakeApi {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        let mut state = self.state.lock();
        if state.away {
            return Err(Error::Transport {
                context: "the test's API server is away".to_owned(),
                source: "away".into(),
            });
        }
        let path = request.uri().path();
        let query: BTreeMap<&str, &str> = request
            .uri()
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let name = query
            .get("fieldSelector")
            .and_then(|text| text.strip_prefix("metadata.name%3D"))
            .map(str::to_owned);
        if request.method() == Method::PATCH {
            let (collection, name) = path.rsplit_once('/').expect("a name");
            let mut object = state.objects[collection][name].clone();
            let patch: Value = serde_json::from_slice(request.body()).expect("JSON");
            merge(&mut object, &patch);
            state.put(collection, object.clone());
            return Ok(Response::new(full_body(object.to_string().into())));
        }
        let concerns = |key: &String| name.as_ref().is_none_or(|name| name == key);
        if query.contains_key("watch") {
            let since: u64 =
                query.get("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or_default();
            let (sender, receiver) = mpsc::unbounded();
            for (version, collection, key, line) in &state.log {
                if *version > since && collection == path && concerns(key) {
                    let _ = sender.unbounded_send(line.clone());
                }
            }
            state.watchers.push((path.to_owned(), name, sender));
            let frames = receiver.map(|line| Ok::<_, Infallible>(Frame::data(line)));
            let body = StreamBody::new(frames.chain(stream::empty()));
            return Ok(Response::new(body.map_err(|never| match never {}).boxed_unsync()));
        }
        let objects = state.objects.get(path).into_iter().flatten();
        let items: Vec<&Value> =
            objects.filter(|(key, _)| concerns(key)).map(|(_, object)| object).collect();
        let list =
            json!({"metadata": {"resourceVersion": state.version.to_string()}, "items": items});
        Ok(Response::new(full_body(list.to_string().into())))
    }
}

fn merge(object: &mut Value, patch: &Value) {
    match (object, patch) {
        (Value::Object(object), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(object.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (object, patch) => *object = patch.clone(),
    }
}
