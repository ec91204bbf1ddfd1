//! An API server in memory, for tests: enough of list, watch, writes, deletion and discovery that controllers cannot
//! tell the difference, and a few ways to make it fail.
//!
//! Objects are plain JSON under their path: `/api/v1/namespaces/shop/pods/web`.

mod request;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use orch_client::{Body, Client, Error, Transport, full_body};
use parking_lot::Mutex;
use serde_json::{Value, json};

use request::{Options, Target};

/// Kinds of the fake's discovery: base path, plural, kind, whether namespaced.
const RESOURCES: [(&str, &str, &str, bool); 20] = [
    ("/api/v1", "configmaps", "ConfigMap", true),
    ("/api/v1", "endpoints", "Endpoints", true),
    ("/api/v1", "events", "Event", true),
    ("/api/v1", "namespaces", "Namespace", false),
    ("/api/v1", "nodes", "Node", false),
    ("/api/v1", "pods", "Pod", true),
    ("/api/v1", "secrets", "Secret", true),
    ("/api/v1", "serviceaccounts", "ServiceAccount", true),
    ("/api/v1", "services", "Service", true),
    ("/apis/apps/v1", "deployments", "Deployment", true),
    ("/apis/apps/v1", "replicasets", "ReplicaSet", true),
    ("/apis/coordination.k8s.io/v1", "leases", "Lease", true),
    ("/apis/discovery.k8s.io/v1", "endpointslices", "EndpointSlice", true),
    ("/apis/networking.k8s.io/v1", "networkpolicies", "NetworkPolicy", true),
    (
        "/apis/policy.networking.k8s.io/v1alpha2",
        "clusternetworkpolicies",
        "ClusterNetworkPolicy",
        false,
    ),
    ("/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings", "ClusterRoleBinding", false),
    ("/apis/rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", false),
    ("/apis/rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding", true),
    ("/apis/rbac.authorization.k8s.io/v1", "roles", "Role", true),
    ("/apis/scheduling.k8s.io/v1", "priorityclasses", "PriorityClass", false),
];

/// One change, as watches see it.
#[derive(Debug, Clone)]
struct Entry {
    revision: u64,
    target: Target,
    old: Option<Value>,
    new: Option<Value>,
}

#[derive(Debug)]
struct State {
    revision: u64,
    objects: BTreeMap<Target, Value>,
    history: Vec<Entry>,
    /// Watches from before this revision are too old.
    oldest: u64,
    failures: usize,
    requests: Vec<(Method, String)>,
    uids: u64,
}

/// The server. Clones are the same server.
#[derive(Clone)]
pub struct FakeServer {
    state: Arc<Mutex<State>>,
    /// Revision and number of disconnections.
    changed: Arc<tokio::sync::watch::Sender<(u64, u64)>>,
}

impl Default for FakeServer {
    fn default() -> Self {
        Self::new()
    }
}

/// An answer that is no success.
#[derive(Debug)]
struct Refusal {
    code: StatusCode,
    reason: &'static str,
    message: String,
    cause: Option<&'static str>,
}

fn refuse<T>(code: StatusCode, reason: &'static str, message: String) -> Result<T, Refusal> {
    Err(Refusal { code, reason, message, cause: None })
}

impl FakeServer {
    /// An empty server.
    #[must_use]
    pub fn new() -> Self {
        let state = State {
            revision: 1,
            objects: BTreeMap::new(),
            history: Vec::new(),
            oldest: 0,
            failures: 0,
            requests: Vec::new(),
            uids: 0,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            changed: Arc::new(tokio::sync::watch::channel((1, 0)).0),
        }
    }

    #[must_use]
    pub fn client(&self) -> Client {
        Client::new(self.clone())
    }

    /// The object at a path.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<Value> {
        self.state.lock().objects.get(&Target::of_path(path)?).cloned()
    }

    /// All objects of a collection, for example `/api/v1/pods`.
    #[must_use]
    pub fn list(&self, path: &str) -> Vec<Value> {
        let Some(target) = Target::of_path(path) else { return Vec::new() };
        let state = self.state.lock();
        let found = state.objects.iter().filter(|(key, _)| target.contains(key));
        found.map(|(_, object)| object.clone()).collect()
    }

    /// Makes or replaces an object as it is given, as a client with all powers would.
    ///
    /// # Panics
    /// If the path is none of an object.
    pub fn put(&self, path: &str, object: Value) {
        let target = Target::of_path(path).filter(|target| target.name.is_some());
        let target = target.expect("a path of an object");
        let mut state = self.state.lock();
        let mut object = object;
        target.complete(&mut object);
        if !object["metadata"]["uid"].is_string() {
            let old = state.objects.get(&target).map(|old| old["metadata"]["uid"].clone());
            object["metadata"]["uid"] = old.unwrap_or_else(|| json!(state.new_uid()));
        }
        state.store(target, Some(object));
        self.tell(&state);
    }

    /// Changes an object in place.
    ///
    /// # Panics
    /// If it does not exist.
    pub fn change(&self, path: &str, change: impl FnOnce(&mut Value)) {
        let mut object = self.get(path).expect("an object to change");
        change(&mut object);
        self.put(path, object);
    }

    /// Removes an object at once.
    pub fn remove(&self, path: &str) {
        if let Some(target) = Target::of_path(path) {
            let mut state = self.state.lock();
            state.store(target, None);
            self.tell(&state);
        }
    }

    /// Answers the next requests with an internal error.
    pub fn fail_next(&self, requests: usize) {
        self.state.lock().failures = requests;
    }

    /// Ends all watches.
    pub fn disconnect(&self) {
        self.changed.send_modify(|(_, disconnections)| *disconnections += 1);
    }

    /// Forgets the history: watches that begin again are too late.
    pub fn compact(&self) {
        let mut state = self.state.lock();
        state.history.clear();
        state.oldest = state.revision;
    }

    /// Requests so far: method and path.
    #[must_use]
    pub fn requests(&self) -> Vec<(Method, String)> {
        self.state.lock().requests.clone()
    }

    fn tell(&self, state: &State) {
        self.changed.send_modify(|(revision, _)| *revision = state.revision);
    }

    fn handle(&self, request: &Request<Bytes>) -> Result<(StatusCode, Value), Refusal> {
        let path = request.uri().path();
        let mut state = self.state.lock();
        if state.failures > 0 {
            state.failures -= 1;
            return refuse(
                StatusCode::INTERNAL_SERVER_ERROR,
                "InternalError",
                "by the test".into(),
            );
        }
        if let Some(answer) = request::discovery(path) {
            return Ok((StatusCode::OK, answer));
        }
        let not_found = || Refusal {
            code: StatusCode::NOT_FOUND,
            reason: "NotFound",
            message: format!("{path} not found"),
            cause: None,
        };
        let target = Target::of_path(path).ok_or_else(not_found)?;
        let options = Options::parse(request)?;
        let outcome = match (request.method(), &target.name) {
            (&Method::GET, None) => Ok((StatusCode::OK, state.list(&target, &options))),
            (&Method::GET, Some(_)) => {
                let found = state.objects.get(&target.without_subresource());
                found.cloned().map(|found| (StatusCode::OK, found)).ok_or_else(not_found)
            }
            (&Method::POST, None) => state.create(&target, options.body),
            (&Method::POST, Some(_)) => state.create_below(&target, &options.body),
            (&Method::PUT, Some(_)) => state.replace(&target, options.body),
            (&Method::PATCH, Some(_)) => state.patch(&target, &options),
            (&Method::DELETE, Some(_)) => state.delete(&target, &options.body),
            (&Method::DELETE, None) => {
                let all = state.objects.keys().filter(|key| target.contains(key)).cloned();
                for key in all.collect::<Vec<_>>() {
                    state.delete(&key, &options.body)?;
                }
                Ok((StatusCode::OK, json!({ "kind": "Status" })))
            }
            _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", path.to_owned()),
        };
        self.tell(&state);
        outcome
    }
}

fn now() -> Value {
    json!(jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

/// Whether nothing keeps an object whose deletion was asked for.
fn is_released(object: &Value) -> bool {
    let empty = |list: &Value| list.as_array().is_none_or(Vec::is_empty);
    let meta = &object["metadata"];
    meta["deletionTimestamp"].is_string()
        && empty(&meta["finalizers"])
        && meta["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
        && (object["kind"] != "Namespace" || empty(&object["spec"]["finalizers"]))
}

impl State {
    fn new_uid(&mut self) -> String {
        self.uids += 1;
        format!("uid-{}", self.uids)
    }

    /// Stores or removes, and notes it in the history.
    fn store(&mut self, target: Target, object: Option<Value>) -> Value {
        self.revision += 1;
        let old = self.objects.get(&target).cloned();
        let mut new = object;
        if let Some(new) = &mut new {
            new["metadata"]["resourceVersion"] = json!(self.revision.to_string());
            self.objects.insert(target.clone(), new.clone());
        } else {
            self.objects.remove(&target);
        }
        let entry = Entry { revision: self.revision, target, old, new: new.clone() };
        self.history.push(entry);
        new.unwrap_or(Value::Null)
    }

    fn list(&self, target: &Target, options: &Options) -> Value {
        let all = self.objects.iter().filter(|(key, _)| target.contains(key));
        let items: Vec<&Value> =
            all.map(|(_, object)| object).filter(|object| options.matches(object)).collect();
        json!({ "metadata": { "resourceVersion": self.revision.to_string() }, "items": items })
    }

    /// Whether the namespace of a new object is on its way out; one that does not exist is no obstacle.
    fn is_terminating(&self, target: &Target) -> bool {
        let namespace = Target {
            base: "/api/v1".to_owned(),
            plural: "namespaces".to_owned(),
            namespace: None,
            name: target.namespace.clone(),
            subresource: None,
        };
        let found = self.objects.get(&namespace);
        found.is_some_and(|found| found["metadata"]["deletionTimestamp"].is_string())
    }

    fn create(
        &mut self,
        target: &Target,
        mut object: Value,
    ) -> Result<(StatusCode, Value), Refusal> {
        if self.is_terminating(target) {
            let message = "the namespace is being terminated".to_owned();
            let cause = Some("NamespaceTerminating");
            return Err(Refusal {
                code: StatusCode::FORBIDDEN,
                reason: "Forbidden",
                message,
                cause,
            });
        }
        let meta = &object["metadata"];
        let name = match meta["name"].as_str() {
            Some(name) => name.to_owned(),
            None => orch_api::names::generate_name(meta["generateName"].as_str().unwrap_or("x-")),
        };
        let target = Target { name: Some(name.clone()), ..target.clone() };
        if self.objects.contains_key(&target) {
            return refuse(StatusCode::CONFLICT, "AlreadyExists", format!("{name} already exists"));
        }
        target.complete(&mut object);
        object["metadata"]["uid"] = json!(self.new_uid());
        object["metadata"]["creationTimestamp"] = now();
        object["metadata"]["generation"] = json!(1);
        match target.plural.as_str() {
            "pods" => object["status"] = json!({ "phase": "Pending" }),
            "namespaces" => object["spec"] = json!({ "finalizers": ["kubernetes"] }),
            _ => {}
        }
        Ok((StatusCode::CREATED, self.store(target, Some(object))))
    }

    fn create_below(
        &mut self,
        target: &Target,
        body: &Value,
    ) -> Result<(StatusCode, Value), Refusal> {
        let key = target.without_subresource();
        let mut object = self.current(&key)?;
        match target.subresource.as_deref() {
            Some("binding") => {
                if object["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty()) {
                    return refuse(StatusCode::CONFLICT, "Conflict", "already assigned".into());
                }
                object["spec"]["nodeName"] = body["target"]["name"].clone();
                self.store(key, Some(object));
                Ok((StatusCode::CREATED, json!({ "kind": "Status" })))
            }
            Some("eviction") => self.delete(&key, &Value::Null),
            _ => refuse(StatusCode::NOT_FOUND, "NotFound", "no such subresource".into()),
        }
    }

    fn current(&self, target: &Target) -> Result<Value, Refusal> {
        self.objects.get(target).cloned().ok_or_else(|| Refusal {
            code: StatusCode::NOT_FOUND,
            reason: "NotFound",
            message: format!("{} {:?} not found", target.plural, target.name),
            cause: None,
        })
    }

    fn replace(&mut self, target: &Target, new: Value) -> Result<(StatusCode, Value), Refusal> {
        let key = target.without_subresource();
        let old = self.current(&key)?;
        for field in ["resourceVersion", "uid"] {
            let asked = new["metadata"][field].as_str().filter(|asked| !asked.is_empty());
            if asked.is_some_and(|asked| old["metadata"][field] != asked) {
                return refuse(StatusCode::CONFLICT, "Conflict", format!("{field} differs"));
            }
        }
        let mut stored = match target.subresource.as_deref() {
            Some("status") => json_with(old.clone(), "status", new["status"].clone()),
            Some("finalize") => json_with(old.clone(), "spec", new["spec"].clone()),
            _ => {
                let mut stored = new;
                for field in ["uid", "creationTimestamp", "deletionTimestamp", "generation"] {
                    stored["metadata"][field] = old["metadata"][field].clone();
                }
                if !old["status"].is_null() {
                    stored["status"] = old["status"].clone();
                }
                if stored["spec"] != old["spec"] {
                    let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
                    stored["metadata"]["generation"] = json!(generation);
                }
                stored
            }
        };
        stored["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
        if is_released(&stored) {
            self.store(key, None);
            return Ok((StatusCode::OK, stored));
        }
        if stored == old {
            return Ok((StatusCode::OK, old));
        }
        Ok((StatusCode::OK, self.store(key, Some(stored))))
    }

    fn patch(
        &mut self,
        target: &Target,
        options: &Options,
    ) -> Result<(StatusCode, Value), Refusal> {
        let mut object = self.current(&target.without_subresource())?;
        match options.content_type.as_str() {
            "application/json-patch+json" => {
                let bad = |error: &dyn std::fmt::Display| Refusal {
                    code: StatusCode::UNPROCESSABLE_ENTITY,
                    reason: "Invalid",
                    message: error.to_string(),
                    cause: None,
                };
                let patch: json_patch::Patch =
                    serde_json::from_value(options.body.clone()).map_err(|error| bad(&error))?;
                json_patch::patch(&mut object, &patch).map_err(|error| bad(&error))?;
            }
            "application/strategic-merge-patch+json" => {
                let mut patch = options.body.clone();
                request::merge_conditions(&object, &mut patch);
                json_patch::merge(&mut object, &patch);
            }
            _ => json_patch::merge(&mut object, &options.body),
        }
        self.replace(target, object)
    }

    fn delete(&mut self, target: &Target, options: &Value) -> Result<(StatusCode, Value), Refusal> {
        let mut object = self.current(target)?;
        for field in ["uid", "resourceVersion"] {
            let asked = options["preconditions"][field].as_str();
            if asked.is_some_and(|asked| object["metadata"][field] != asked) {
                return refuse(StatusCode::CONFLICT, "Conflict", format!("{field} differs"));
            }
        }
        let finalizer = match options["propagationPolicy"].as_str() {
            Some("Foreground") => Some("foregroundDeletion"),
            Some("Orphan") => Some("orphan"),
            _ => None,
        };
        let meta = &mut object["metadata"];
        if let Some(finalizer) = finalizer {
            let mut list = meta["finalizers"].as_array().cloned().unwrap_or_default();
            if !list.iter().any(|one| one == finalizer) {
                list.push(json!(finalizer));
            }
            meta["finalizers"] = json!(list);
        }
        let running = target.plural == "pods"
            && object["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty())
            && !matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        let grace = if running { options["gracePeriodSeconds"].as_i64().unwrap_or(30) } else { 0 };
        let meta = &mut object["metadata"];
        if !meta["deletionTimestamp"].is_string() {
            meta["deletionTimestamp"] = now();
        }
        meta["deletionGracePeriodSeconds"] = json!(grace);
        if is_released(&object) {
            self.store(target.clone(), None);
            return Ok((StatusCode::OK, json!({ "kind": "Status" })));
        }
        Ok((StatusCode::OK, self.store(target.clone(), Some(object))))
    }
}

fn json_with(mut object: Value, field: &str, value: Value) -> Value {
    object[field] = value;
    object
}

#[async_trait]
impl Transport for FakeServer {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        // As over a wire: never an answer before the caller was let go once.
        tokio::task::yield_now().await;
        let path = request.uri().path().to_owned();
        self.state.lock().requests.push((request.method().clone(), path));
        let outcome = if request.uri().query().is_some_and(|query| query.contains("watch=true")) {
            watch::start(self, &request)
        } else {
            self.handle(&request).map(|(code, body)| (code, full_body(body.to_string().into())))
        };
        let (code, body) = outcome.unwrap_or_else(|refusal| {
            let status = json!({ "kind": "Status", "status": "Failure", "code": refusal.code.as_u16(),
                                 "reason": refusal.reason, "message": refusal.message,
                                 "details": { "causes": [{ "reason": refusal.cause }] } });
            (refusal.code, full_body(status.to_string().into()))
        });
        let mut response = Response::new(body);
        *response.status_mut() = code;
        Ok(response)
    }
}
