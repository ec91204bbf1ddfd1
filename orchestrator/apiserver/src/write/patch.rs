//! PATCH: JSON patch, merge patch, strategic merge patch and server-side apply.

use bytes::Bytes;
use http::{HeaderMap, Response};
use orch_api::ApiError;
use orch_client::Body;
use orch_facts::{facts, strategic};
use serde_json::{Value, json};

use super::{Call, Change, Owners, PATCH_TRIES};
use crate::authz::{self, Attributes, ResourceTarget};
use crate::resources::Resource;
use crate::strategy::Part;
use crate::{decode, managed};

/// Media types of patches.
const PATCH_TYPES: &str = "application/apply-patch+yaml, application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json";
impl Call<'_> {
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
        let writer = managed::Writer { resource, part, manager };
        for _ in 0..PATCH_TRIES {
            let current = match self.current().await {
                Err(error) if error.code == 404 && part == Part::Main => {
                    // The request was judged as a patch.
                    let target = ResourceTarget {
                        group,
                        resource: resource.plural,
                        namespace: self.namespace,
                        name: self.name,
                        ..ResourceTarget::default()
                    };
                    let asked = Attributes::resource("create", target);
                    authz::require(self.shared, self.user, &asked).await?;
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
