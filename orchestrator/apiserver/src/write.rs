//! create, update, patch, delete: every change is a compare-and-swap on the store.

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use orch_api::{ApiError, defaults, validate};
use orch_client::Body;
use orch_facts::{facts, strategic};
use orch_store::{Revision, StoreError, splice_resource_version};
use serde_json::{Value, json};

use crate::read::{self, store_error};
use crate::request::Query;
use crate::resources::Resource;
use crate::state::{Shared, Stored};
use crate::strategy::{self, Part};
use crate::{admission, decode, managed, respond};

/// How often a patch is tried on a newer object before the client is told of the conflict.
const PATCH_TRIES: usize = 5;
/// How often a made-up name is tried.
const NAME_TRIES: usize = 8;
const PATCH_TYPES: &str = "application/apply-patch+yaml, application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json";

/// The parts of a write request that handlers need.
pub(crate) struct Call<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) stored: &'a Stored,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) query: &'a Query,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a Bytes,
}

/// An object as it is in the store.
pub(crate) struct Current {
    pub(crate) object: Value,
    pub(crate) bytes: Bytes,
    pub(crate) revision: Revision,
}

fn encode(object: &Value) -> Result<Bytes, ApiError> {
    serde_json::to_vec(object).map(Bytes::from).map_err(ApiError::internal)
}

/// An object as it is answered: with its resource version, unless it has none because it was not stored.
fn answer(
    code: StatusCode,
    bytes: Bytes,
    revision: Option<Revision>,
    warnings: &[String],
) -> Response<Body> {
    let bytes = match revision {
        Some(revision) => splice_resource_version(&bytes, revision),
        None => bytes,
    };
    let mut response = respond::bytes(code, bytes);
    respond::warn(&mut response, warnings);
    response
}

/// A change that was made, or would have been.
pub(crate) struct Done {
    pub(crate) object: Value,
    pub(crate) revision: Revision,
    bytes: Bytes,
    warnings: Vec<String>,
}

impl Done {
    pub(crate) fn answer(self) -> Response<Body> {
        answer(StatusCode::OK, self.bytes, Some(self.revision), &self.warnings)
    }
}

impl Call<'_> {
    fn resource(&self) -> &'static Resource {
        self.stored.resource
    }

    fn dry_run(&self) -> Result<bool, ApiError> {
        match self.query.get("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => Err(ApiError::bad_request(format!(
                "dryRun {other:?} is not supported; supported values: \"All\""
            ))),
        }
    }

    fn key(&self) -> String {
        self.resource().key(self.namespace, self.name)
    }

    fn invalid(&self, name: &str, errors: &[orch_api::FieldError]) -> ApiError {
        ApiError::invalid(self.resource().group, self.resource().kind, name, errors)
    }

    /// The object now.
    pub(crate) async fn current(&self) -> Result<Current, ApiError> {
        let (found, _) =
            self.shared.store.get(&self.key()).await.map_err(|error| store_error(&error))?;
        let found = found.ok_or_else(|| {
            ApiError::not_found(self.resource().group, self.resource().plural, self.name)
        })?;
        Ok(Current {
            object: read::parse(&found.value)?,
            bytes: found.value,
            revision: found.mod_revision,
        })
    }

    /// POST of a new object.
    pub(crate) async fn create(&self) -> Result<Response<Body>, ApiError> {
        let resource = self.resource();
        let decoded = decode::object(
            self.headers,
            self.query,
            self.body,
            resource.group,
            resource.version,
            resource.kind,
        )?;
        let mut warnings = decoded.warnings;
        warnings.extend(admission::warnings(resource));
        self.create_object(&decoded.object, None, &warnings).await
    }

    /// Stores a new object; `owners` are its managed fields.
    async fn create_object(
        &self,
        given: &Value,
        owners: Option<&Value>,
        warnings: &[String],
    ) -> Result<Response<Body>, ApiError> {
        let resource = self.resource();
        let dry_run = self.dry_run()?;
        let mut tries = 0;
        loop {
            tries += 1;
            let mut object = given.clone();
            strategy::prepare_create(resource, self.namespace, &mut object)?;
            defaults::apply(resource.group, resource.kind, &mut object);
            admission::create(self.shared, resource, &mut object).await?;
            // Admission's own additions have defaults too.
            defaults::apply(resource.group, resource.kind, &mut object);
            strategy::drop_nulls(&mut object);
            let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            let mut errors = validate::create(resource.group, resource.kind, &object);
            // Addresses and ports are given out one at a time.
            let _lock = if resource.plural == "services" {
                Some(self.shared.allocation.lock().await)
            } else {
                None
            };
            if resource.plural == "services" && errors.is_empty() {
                errors.extend(crate::services::allocate(self.shared, &mut object, None).await?);
            }
            if !errors.is_empty() {
                return Err(self.invalid(&name, &errors));
            }
            if let Some(owners) = owners {
                object["metadata"]["managedFields"] = owners.clone();
            }
            let bytes = encode(&object)?;
            if dry_run {
                return Ok(answer(StatusCode::CREATED, bytes, None, warnings));
            }
            match self
                .shared
                .store
                .create(&resource.key(self.namespace, &name), bytes.clone(), None)
                .await
            {
                Ok(revision) => {
                    self.settle(revision).await;
                    return Ok(answer(StatusCode::CREATED, bytes, Some(revision), warnings));
                }
                Err(StoreError::AlreadyExists) => {
                    let generated = given["metadata"]["name"].as_str().is_none_or(str::is_empty);
                    if !generated || tries == NAME_TRIES {
                        return Err(ApiError::already_exists(
                            resource.group,
                            resource.plural,
                            &name,
                        ));
                    }
                }
                Err(error) => return Err(store_error(&error)),
            }
        }
    }

    /// Services are allocated from the cache, so the next one must see this one.
    async fn settle(&self, revision: Revision) {
        if self.resource().plural == "services" {
            let _ = self.stored.cache.wait_for(revision, std::time::Duration::from_secs(3)).await;
        }
    }

    /// PUT.
    pub(crate) async fn update(&self, part: Part) -> Result<Response<Body>, ApiError> {
        let resource = self.resource();
        let decoded = decode::object(
            self.headers,
            self.query,
            self.body,
            resource.group,
            resource.version,
            resource.kind,
        )?;
        let named = decoded.object["metadata"]["name"].as_str().unwrap_or_default();
        if !named.is_empty() && named != self.name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({named}) does not match the name on the URL ({})",
                self.name
            )));
        }
        let current = self.current().await?;
        self.check_version(&decoded.object, &current)?;
        match self.store_change(part, current, decoded.object, decoded.warnings).await {
            Err(Change::Conflict) => {
                Err(ApiError::modified(resource.group, resource.plural, self.name))
            }
            Err(Change::Refused(error)) => Err(error),
            Ok(done) => Ok(done.answer()),
        }
    }

    /// The client's resource version and uid, where it names them.
    fn check_version(&self, object: &Value, current: &Current) -> Result<(), ApiError> {
        let resource = self.resource();
        let meta = &object["metadata"];
        if let Some(version) = meta["resourceVersion"]
            .as_str()
            .filter(|version| !version.is_empty() && *version != "0")
            && version != current.revision.to_string()
        {
            return Err(ApiError::modified(resource.group, resource.plural, self.name));
        }
        if let Some(uid) = meta["uid"].as_str().filter(|uid| !uid.is_empty())
            && current.object["metadata"]["uid"] != *uid
        {
            let why = format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                current.object["metadata"]["uid"].as_str().unwrap_or_default()
            );
            return Err(ApiError::conflict(resource.group, resource.plural, self.name, &why));
        }
        Ok(())
    }

    /// Checks and stores a change of `current` that is no apply.
    pub(crate) async fn store_change(
        &self,
        part: Part,
        current: Current,
        object: Value,
        warnings: Vec<String>,
    ) -> Result<Done, Change> {
        let requested = object["metadata"]["managedFields"].clone();
        self.store_owned(part, current, object, Owners::After { requested }, warnings).await
    }

    async fn store_owned(
        &self,
        part: Part,
        current: Current,
        mut object: Value,
        owners: Owners,
        warnings: Vec<String>,
    ) -> Result<Done, Change> {
        let resource = self.resource();
        strategy::prepare_update(resource, part, &current.object, &mut object);
        let _lock = if resource.plural == "services" {
            Some(self.shared.allocation.lock().await)
        } else {
            None
        };
        if part == Part::Main {
            defaults::apply(resource.group, resource.kind, &mut object);
            strategy::drop_nulls(&mut object);
            // The spec may differ only by a default that is written now: that is no change of the generation.
            if object["spec"] == current.object["spec"]
                && resource.generation
                && resource.plural != "endpointslices"
            {
                object["metadata"]["generation"] = current.object["metadata"]["generation"].clone();
            }
            let mut errors =
                validate::update(resource.group, resource.kind, &object, &current.object);
            if resource.plural == "services" && errors.is_empty() {
                errors.extend(
                    crate::services::allocate(self.shared, &mut object, Some(&current.object))
                        .await?,
                );
            }
            if !errors.is_empty() {
                return Err(self.invalid(self.name, &errors).into());
            }
        }
        strategy::drop_nulls(&mut object);
        let owners = match owners {
            Owners::Given(owners) => Some(owners),
            Owners::After { requested } => {
                let manager = managed::manager(self.headers, self.query)?;
                let writer = managed::Writer { resource, part, manager };
                writer.update(&current.object, &object, &requested)?
            }
        };
        match (owners, object["metadata"].as_object_mut()) {
            (Some(owners), Some(meta)) => {
                meta.insert("managedFields".to_owned(), owners);
            }
            (None, Some(meta)) => {
                meta.shift_remove("managedFields");
            }
            (_, None) => {}
        }
        let released = strategy::is_released(&object);
        // As values: the order of fields is no difference.
        let same = object == current.object;
        let bytes = if same { current.bytes.clone() } else { encode(&object)? };
        if (same && !released) || self.dry_run()? {
            return Ok(Done { object, revision: current.revision, bytes, warnings });
        }
        let outcome = if released {
            self.shared.store.delete(&self.key(), current.revision).await
        } else {
            self.shared.store.update(&self.key(), bytes.clone(), current.revision, None).await
        };
        match outcome {
            Ok(revision) => {
                self.settle(revision).await;
                Ok(Done { object, revision, bytes, warnings })
            }
            Err(StoreError::Conflict { .. }) => Err(Change::Conflict),
            Err(error) => Err(store_error(&error).into()),
        }
    }

    /// PATCH with an applied configuration.
    async fn apply(&self, part: Part) -> Result<Response<Body>, ApiError> {
        let resource = self.resource();
        let Some(manager) = self.query.get("fieldManager") else {
            let error =
                orch_api::FieldError::required("fieldManager", "is required for apply patch");
            return Err(ApiError::invalid("meta.k8s.io", "PatchOptions", "", &[error]));
        };
        let force = self.query.flag("force");
        let manager = manager.to_owned();
        managed::manager(self.headers, self.query)?;
        // JSON is YAML too.
        let mut headers = self.headers.clone();
        let yaml = http::HeaderValue::from_static("application/yaml");
        headers.insert(http::header::CONTENT_TYPE, yaml);
        let (group, version) = (resource.group, resource.version);
        let mut decoded =
            decode::object(&headers, self.query, self.body, group, version, resource.kind)?;
        let meta = &mut decoded.object["metadata"];
        if meta["managedFields"].as_array().is_some_and(|list| !list.is_empty()) {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        let named = meta["name"].as_str().unwrap_or_default();
        if !named.is_empty() && named != self.name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({named}) does not match the name on the URL ({})",
                self.name
            )));
        }
        if !meta.is_object() {
            *meta = json!({});
        }
        meta["name"] = json!(self.name);
        if resource.namespaced {
            meta["namespace"] = json!(self.namespace);
        }
        decoded.warnings.extend(admission::warnings(resource));
        let writer = managed::Writer { resource, part, manager };
        for _ in 0..PATCH_TRIES {
            let current = match self.current().await {
                Err(error) if error.code == 404 && part == Part::Main => {
                    let owners = writer.first(&decoded.object)?;
                    let made =
                        self.create_object(&decoded.object, Some(&owners), &decoded.warnings).await;
                    match made {
                        // Somebody was quicker: it is a change now.
                        Err(error) if error.reason == "AlreadyExists" => continue,
                        made => return made,
                    }
                }
                current => current?,
            };
            self.check_version(&decoded.object, &current)?;
            let mut config = decoded.object.clone();
            if part == Part::Status {
                config["metadata"] = json!({});
                if let Some(map) = config.as_object_mut() {
                    map.retain(|key, _| matches!(key.as_str(), "metadata" | "status"));
                }
            }
            let mut object = writer.apply(&current.object, &config, force)?;
            let owners = object["metadata"]["managedFields"].take();
            let warnings = decoded.warnings.clone();
            match self.store_owned(part, current, object, Owners::Given(owners), warnings).await {
                Err(Change::Conflict) => {}
                Err(Change::Refused(error)) => return Err(error),
                Ok(done) => return Ok(done.answer()),
            }
        }
        Err(ApiError::modified(resource.group, resource.plural, self.name))
    }

    /// PATCH: applied to the newest object, again when that changed meanwhile.
    pub(crate) async fn patch(&self, part: Part) -> Result<Response<Body>, ApiError> {
        let resource = self.resource();
        if decode::media_type(self.headers) == "application/apply-patch+yaml" {
            return self.apply(part).await;
        }
        let patch = Patch::parse(self.headers, self.body)?;
        for _ in 0..PATCH_TRIES {
            let current = self.current().await?;
            let mut base = current.object.clone();
            base["metadata"]["resourceVersion"] = json!(current.revision.to_string());
            let mut object = patch.apply(resource, self.name, base)?;
            self.check_version(&object, &current)?;
            let warnings = decode::recheck(
                self.query,
                &mut object,
                resource.group,
                resource.version,
                resource.kind,
            )?;
            if object["metadata"]["name"] != current.object["metadata"]["name"] {
                return Err(ApiError::bad_request("a patch cannot change the name of an object"));
            }
            match self.store_change(part, current, object, warnings).await {
                Err(Change::Conflict) => {}
                Err(Change::Refused(error)) => return Err(error),
                Ok(done) => return Ok(done.answer()),
            }
        }
        Err(ApiError::modified(resource.group, resource.plural, self.name))
    }

    /// DELETE of one object.
    pub(crate) async fn delete(&self) -> Result<Response<Body>, ApiError> {
        let options = DeleteOptions::parse(self.headers, self.query, self.body)?;
        self.delete_with(&options).await
    }

    /// Deletes by parsed options; also what eviction and deletion of collections do.
    pub(crate) async fn delete_with(
        &self,
        options: &DeleteOptions,
    ) -> Result<Response<Body>, ApiError> {
        let resource = self.resource();
        for _ in 0..PATCH_TRIES {
            let current = self.current().await?;
            options.check(resource, self.name, &current)?;
            let mut object = current.object.clone();
            let grace = strategy::grace_seconds(resource, &object, options.grace_seconds);
            let dependents_finalizer = match options.propagation.as_deref() {
                Some("Foreground") => Some("foregroundDeletion"),
                Some("Orphan") => Some("orphan"),
                _ => None,
            };
            if let Some(finalizer) = dependents_finalizer {
                let list = &mut object["metadata"]["finalizers"];
                if !list.is_array() {
                    *list = json!([]);
                }
                if let Some(list) = list.as_array_mut()
                    && !list.iter().any(|item| item == finalizer)
                {
                    list.push(json!(finalizer));
                }
            }
            let meta = &mut object["metadata"];
            let first = !meta["deletionTimestamp"].is_string();
            let remaining = meta["deletionGracePeriodSeconds"].as_i64();
            if first || remaining.is_none_or(|remaining| grace < remaining) {
                let end = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(grace);
                meta["deletionTimestamp"] = json!(end.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
                meta["deletionGracePeriodSeconds"] = json!(grace);
                if first && resource.generation {
                    meta["generation"] = json!(meta["generation"].as_i64().unwrap_or(1) + 1);
                }
            }
            if resource.plural == "namespaces" {
                object["status"]["phase"] = json!("Terminating");
            }
            let bytes = encode(&object)?;
            let released = strategy::is_released(&object);
            if options.dry_run || self.dry_run()? {
                return Ok(if released {
                    respond::json(StatusCode::OK, &deleted(resource, &object))
                } else {
                    answer(StatusCode::OK, bytes, Some(current.revision), &[])
                });
            }
            let outcome = if released {
                self.shared.store.delete(&self.key(), current.revision).await
            } else if bytes == current.bytes {
                Ok(current.revision)
            } else {
                self.shared.store.update(&self.key(), bytes.clone(), current.revision, None).await
            };
            match outcome {
                Ok(revision) => {
                    self.settle(revision).await;
                    return Ok(if released {
                        respond::json(StatusCode::OK, &deleted(resource, &object))
                    } else {
                        answer(StatusCode::OK, bytes, Some(revision), &[])
                    });
                }
                Err(StoreError::Conflict { current: None }) => {
                    return Err(ApiError::not_found(resource.group, resource.plural, self.name));
                }
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(store_error(&error)),
            }
        }
        Err(ApiError::modified(resource.group, resource.plural, self.name))
    }

    /// DELETE of a collection: each matching object by the same options.
    pub(crate) async fn delete_collection(&self) -> Result<Response<Body>, ApiError> {
        let options = DeleteOptions::parse(self.headers, self.query, self.body)?;
        let mut items = Vec::new();
        for (namespace, name) in read::matching(self.stored, self.namespace, self.query).await? {
            let call = Call { namespace: &namespace, name: &name, ..*self };
            if let Ok(current) = call.current().await {
                items.push(current.object);
            }
            match call.delete_with(&options).await {
                Err(error) if error.code != 404 => return Err(error),
                _ => {}
            }
        }
        let resource = self.resource();
        let list = json!({
            "kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(),
            "metadata": { "resourceVersion": self.stored.cache.revision().to_string() }, "items": items,
        });
        Ok(respond::json(StatusCode::OK, &list))
    }
}

/// Where the managed fields of a changed object come from.
enum Owners {
    /// They are worked out from the change; `requested` is what the client sent.
    After { requested: Value },
    /// An apply has worked them out.
    Given(Value),
}

/// Why a change was not stored.
pub(crate) enum Change {
    /// The object changed meanwhile.
    Conflict,
    Refused(ApiError),
}

impl From<ApiError> for Change {
    fn from(error: ApiError) -> Self {
        Self::Refused(error)
    }
}

/// The answer to a deletion that is done.
fn deleted(resource: &Resource, object: &Value) -> Value {
    let mut details = json!({
        "name": object["metadata"]["name"], "kind": resource.plural, "uid": object["metadata"]["uid"],
    });
    if !resource.group.is_empty() {
        details["group"] = json!(resource.group);
    }
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details })
}

/// A parsed patch body.
enum Patch {
    Json(json_patch::Patch),
    Merge(Value),
    Strategic(Value),
}

impl Patch {
    fn parse(headers: &HeaderMap, body: &Bytes) -> Result<Self, ApiError> {
        let value = || -> Result<Value, ApiError> {
            serde_json::from_slice(body)
                .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))
        };
        match decode::media_type(headers).as_str() {
            "application/json-patch+json" => serde_json::from_slice(body)
                .map(Self::Json)
                .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}"))),
            "application/merge-patch+json" => value().map(Self::Merge),
            "application/strategic-merge-patch+json" => value().map(Self::Strategic),
            _ => Err(ApiError::unsupported_media_type(PATCH_TYPES)),
        }
    }

    fn apply(&self, resource: &Resource, name: &str, mut base: Value) -> Result<Value, ApiError> {
        match self {
            Self::Json(patch) => {
                json_patch::patch(&mut base, patch).map_err(|error| {
                    let field = orch_api::FieldError::invalid(
                        "patch",
                        &json!(patch.to_string()),
                        error.to_string(),
                    );
                    ApiError::invalid(resource.group, resource.kind, name, &[field])
                })?;
                Ok(base)
            }
            Self::Merge(patch) => {
                json_patch::merge(&mut base, patch);
                Ok(base)
            }
            Self::Strategic(patch) => {
                match facts().kind(resource.group, resource.version, resource.kind) {
                    Some(known) => strategic::apply(facts(), known, base, patch.clone())
                        .map_err(|error| ApiError::bad_request(error.to_string())),
                    None => Err(ApiError::unsupported_media_type(
                        "application/json-patch+json, application/merge-patch+json",
                    )),
                }
            }
        }
    }
}

/// How to delete (meta/v1 `DeleteOptions`), from body and query.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeleteOptions {
    grace_seconds: Option<i64>,
    propagation: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    dry_run: bool,
}

impl DeleteOptions {
    fn parse(headers: &HeaderMap, query: &Query, body: &Bytes) -> Result<Self, ApiError> {
        let mut options = Self::from_value(&decode::optional(headers, body)?)?;
        if let Some(seconds) = query.number("gracePeriodSeconds")? {
            options.grace_seconds = Some(seconds);
        }
        if let Some(policy) = query.get("propagationPolicy") {
            options.propagation = Some(policy.to_owned());
        }
        options.checked()
    }

    /// From an object in JSON.
    pub(crate) fn from_value(value: &Value) -> Result<Self, ApiError> {
        let text =
            |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let orphan = value["orphanDependents"]
            .as_bool()
            .map(|orphan| if orphan { "Orphan" } else { "Background" });
        let mut dry_run = false;
        for item in value["dryRun"].as_array().into_iter().flatten() {
            match item.as_str() {
                Some("All") => dry_run = true,
                _ => {
                    return Err(ApiError::bad_request(format!(
                        "dryRun {item} is not supported; supported values: \"All\""
                    )));
                }
            }
        }
        Self {
            dry_run,
            grace_seconds: value["gracePeriodSeconds"].as_i64(),
            propagation: text(&value["propagationPolicy"]).or(orphan.map(str::to_owned)),
            uid: text(&value["preconditions"]["uid"]),
            resource_version: text(&value["preconditions"]["resourceVersion"]),
        }
        .checked()
    }

    fn checked(self) -> Result<Self, ApiError> {
        match self.propagation.as_deref() {
            None | Some("Background" | "Foreground" | "Orphan") => Ok(self),
            Some(other) => Err(ApiError::bad_request(format!(
                "propagationPolicy {other:?} is not one of \"Foreground\", \"Background\", \"Orphan\""
            ))),
        }
    }

    fn check(&self, resource: &Resource, name: &str, current: &Current) -> Result<(), ApiError> {
        let fail = |what: &str, asked: &str, found: &str| {
            let why = format!(
                "Precondition failed: {what} in precondition: {asked}, {what} in object meta: {found}"
            );
            ApiError::conflict(resource.group, resource.plural, name, &why)
        };
        if let Some(uid) = &self.uid {
            let found = current.object["metadata"]["uid"].as_str().unwrap_or_default();
            if uid != found {
                return Err(fail("UID", uid, found));
            }
        }
        if let Some(version) = &self.resource_version
            && *version != current.revision.to_string()
        {
            return Err(fail("ResourceVersion", version, &current.revision.to_string()));
        }
        Ok(())
    }
}
