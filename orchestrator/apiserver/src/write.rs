//! create and update: every change is a compare-and-swap on the store. Patches and applies are in [`patch`], deletions
//! in [`delete`].

mod delete;
mod patch;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use orch_api::{ApiError, defaults, validate};
use orch_client::Body;
use orch_store::{Revision, StoreError, splice_resource_version};
use serde_json::Value;

pub(crate) use delete::DeleteOptions;

use crate::auth::User;
use crate::authz::guard;
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
/// How often a Service's addresses are chosen again when other servers chose meanwhile. Each time one of them got through,
/// so this many means as many Services within some 10 ms.
const ALLOCATION_TRIES: usize = 64;
/// Events are kept for an hour, upstream's value; etcd removes them.
const EVENT_LIFETIME: Duration = Duration::from_secs(3600);

/// The parts of a write request that handlers need.
pub(crate) struct Call<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) user: &'a User,
    pub(crate) stored: &'a Stored,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) query: &'a Query,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a Bytes,
}

/// An object as it is in the store.
#[derive(Clone)]
pub(crate) struct Current {
    pub(crate) object: Value,
    pub(crate) bytes: Bytes,
    pub(crate) revision: Revision,
}

fn lifetime(resource: &Resource) -> Option<Duration> {
    ((resource.group, resource.plural) == ("", "events")).then_some(EVENT_LIFETIME)
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

    fn guarded<'b>(&'b self, name: &'b str) -> guard::Write<'b> {
        guard::Write {
            shared: self.shared,
            user: self.user,
            resource: self.resource(),
            namespace: self.namespace,
            name,
        }
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
        self.create_object(&decoded.object, None, &decoded.warnings).await
    }

    /// Stores a new object; `owners` are its managed fields.
    pub(super) async fn create_object(
        &self,
        given: &Value,
        owners: Option<&Value>,
        warnings: &[String],
    ) -> Result<Response<Body>, ApiError> {
        let resource = self.resource();
        let dry_run = self.dry_run()?;
        let (mut tries, mut allocations) = (0, 0);
        loop {
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
            let mut guard = None;
            if resource.plural == "services" && errors.is_empty() {
                let allocation = crate::services::allocate(self.shared, &mut object, None).await?;
                errors.extend(allocation.errors);
                guard = allocation.guard;
            }
            if !errors.is_empty() {
                return Err(self.invalid(&name, &errors));
            }
            self.guarded(&name).create(&object).await?;
            if let Some(owners) = owners {
                object["metadata"]["managedFields"] = owners.clone();
            }
            let bytes = encode(&object)?;
            if dry_run {
                return Ok(answer(StatusCode::CREATED, bytes, None, warnings));
            }
            let (store, key) = (&self.shared.store, resource.key(self.namespace, &name));
            let outcome = match &guard {
                Some(guard) => store.write_guarded(&key, bytes.clone(), 0, guard).await,
                None => store.create(&key, bytes.clone(), lifetime(resource)).await,
            };
            match outcome {
                Ok(revision) => {
                    self.settle(revision).await;
                    return Ok(answer(StatusCode::CREATED, bytes, Some(revision), warnings));
                }
                Err(StoreError::Overtaken) if allocations < ALLOCATION_TRIES => allocations += 1,
                Err(StoreError::AlreadyExists) => {
                    tries += 1;
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
            let _ = self.stored.cache.wait_for(revision, Duration::from_secs(3)).await;
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
        object: Value,
        owners: Owners,
        warnings: Vec<String>,
    ) -> Result<Done, Change> {
        if self.resource().plural == "services" {
            for _ in 0..ALLOCATION_TRIES {
                let (current, owners) = (current.clone(), owners.clone());
                let done =
                    self.store_once(part, current, object.clone(), owners, &warnings).await?;
                if let Some(done) = done {
                    return Ok(done);
                }
            }
        }
        self.store_once(part, current, object, owners, &warnings).await?.ok_or(Change::Conflict)
    }

    /// `None` when another server gave out addresses meanwhile: they have to be chosen again.
    async fn store_once(
        &self,
        part: Part,
        current: Current,
        mut object: Value,
        owners: Owners,
        warnings: &[String],
    ) -> Result<Option<Done>, Change> {
        let resource = self.resource();
        strategy::prepare_update(resource, part, &current.object, &mut object);
        let mut guard = None;
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
                let allocation =
                    crate::services::allocate(self.shared, &mut object, Some(&current.object))
                        .await?;
                errors.extend(allocation.errors);
                guard = allocation.guard;
            }
            if !errors.is_empty() {
                return Err(self.invalid(self.name, &errors).into());
            }
        }
        if part == Part::Ephemeral {
            defaults::apply(resource.group, resource.kind, &mut object);
            let errors = validate::ephemeral_containers(&object, &current.object);
            if !errors.is_empty() {
                return Err(self.invalid(self.name, &errors).into());
            }
        }
        strategy::drop_nulls(&mut object);
        admission::update(self.shared, resource, &object)?;
        self.guarded(self.name).update(part, &current.object, &object).await?;
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
        let warnings = warnings.to_vec();
        if (same && !released) || self.dry_run()? {
            return Ok(Some(Done { object, revision: current.revision, bytes, warnings }));
        }
        let (store, key, at) = (&self.shared.store, self.key(), current.revision);
        let outcome = match &guard {
            _ if released => store.delete(&key, at).await,
            Some(guard) => store.write_guarded(&key, bytes.clone(), at, guard).await,
            None => store.update(&key, bytes.clone(), at, lifetime(resource)).await,
        };
        match outcome {
            Ok(revision) => {
                self.settle(revision).await;
                Ok(Some(Done { object, revision, bytes, warnings }))
            }
            Err(StoreError::Overtaken) => Ok(None),
            Err(StoreError::Conflict { .. }) => Err(Change::Conflict),
            Err(error) => Err(store_error(&error).into()),
        }
    }
}

/// Where the managed fields of a changed object come from.
#[derive(Clone)]
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
