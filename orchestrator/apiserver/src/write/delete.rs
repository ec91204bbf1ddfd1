//! DELETE of objects and collections.

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use orch_api::ApiError;
use orch_client::Body;
use orch_store::StoreError;
use serde_json::{Value, json};

use super::{Call, Current, PATCH_TRIES, answer, encode};
use crate::read::{self, store_error};
use crate::request::Query;
use crate::resources::Resource;
use crate::{decode, respond, strategy};

impl Call<'_> {
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
            if let Some(propagation) = options.propagation.as_deref() {
                propagate(&mut object["metadata"], propagation);
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
                return Ok(if released && !resource.answers_deleted {
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
                self.shared
                    .store
                    .update(&self.key(), bytes.clone(), current.revision, super::lifetime(resource))
                    .await
            };
            match outcome {
                Ok(revision) => {
                    self.settle(revision).await;
                    return Ok(if released && !resource.answers_deleted {
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

/// Leaves the one finalizer that the wanted propagation needs: who asks again may ask otherwise.
fn propagate(meta: &mut Value, propagation: &str) {
    let wanted = match propagation {
        "Foreground" => Some("foregroundDeletion"),
        "Orphan" => Some("orphan"),
        _ => None,
    };
    let mut list = meta["finalizers"].as_array().cloned().unwrap_or_default();
    let before = list.len();
    list.retain(|one| {
        wanted.is_some_and(|wanted| one == wanted)
            || (one != "foregroundDeletion" && one != "orphan")
    });
    match wanted {
        Some(wanted) if !list.iter().any(|one| one == wanted) => list.push(json!(wanted)),
        _ if list.len() == before => return,
        _ => {}
    }
    meta["finalizers"] = json!(list);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_again_may_ask_for_another_propagation() {
        let after = |finalizers: Value, propagation: &str| {
            let mut meta = json!({ "finalizers": finalizers });
            propagate(&mut meta, propagation);
            meta["finalizers"].clone()
        };
        for (before, propagation, expected) in [
            (json!(["x/y"]), "Foreground", json!(["x/y", "foregroundDeletion"])),
            (json!(["orphan", "x/y"]), "Foreground", json!(["x/y", "foregroundDeletion"])),
            (json!(["foregroundDeletion"]), "Orphan", json!(["orphan"])),
            (json!(["foregroundDeletion", "x/y"]), "Background", json!(["x/y"])),
            (json!(["foregroundDeletion"]), "Foreground", json!(["foregroundDeletion"])),
        ] {
            assert_eq!(after(before.clone(), propagation), expected, "{before} {propagation}");
        }
        let mut bare = json!({});
        propagate(&mut bare, "Background");
        assert_eq!(bare, json!({}));
    }
}
