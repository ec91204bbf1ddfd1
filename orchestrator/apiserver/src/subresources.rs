//! scale, binding, eviction, token, finalize.

use http::{Method, Response, StatusCode};
use orch_api::{ApiError, Selector};
use orch_client::Body;
use serde_json::{Value, json};

use crate::auth::{Bound, BoundKind};
use crate::authz::restrict;
use crate::strategy::Part;
use crate::write::{Call, Change, DeleteOptions};
use crate::{decode, respond};

/// Lifetime of a token whose request names none, and its bounds.
const TOKEN_SECONDS: i64 = 3600;
const TOKEN_SECONDS_MIN: i64 = 600;
const TOKEN_SECONDS_MAX: i64 = 86_400;
const RETRIES: usize = 5;

/// autoscaling/v1 Scale of an object.
fn scale_of(object: &Value, revision: i64) -> Value {
    let meta = &object["metadata"];
    let selector = serde_json::from_value(object["spec"]["selector"].clone())
        .ok()
        .and_then(|parsed| Selector::from_label_selector(&parsed).ok())
        .map(|parsed| parsed.to_string())
        .unwrap_or_default();
    json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": { "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"],
                      "resourceVersion": revision.to_string(), "creationTimestamp": meta["creationTimestamp"] },
        "spec": { "replicas": object["spec"]["replicas"].as_i64().unwrap_or(0) },
        "status": { "replicas": object["status"]["replicas"].as_i64().unwrap_or(0), "selector": selector },
    })
}

/// GET, PUT and PATCH of `scale`.
pub(crate) async fn scale(call: &Call<'_>, method: &Method) -> Result<Response<Body>, ApiError> {
    let resource = call.stored.resource;
    for _ in 0..RETRIES {
        let current = call.current().await?;
        let scale = scale_of(&current.object, current.revision);
        if *method == Method::GET {
            return Ok(respond::json(StatusCode::OK, &scale));
        }
        let wanted = if *method == Method::PATCH {
            let mut wanted = scale.clone();
            match decode::media_type(call.headers).as_str() {
                "application/json-patch+json" => {
                    let patch: json_patch::Patch =
                        serde_json::from_slice(call.body).map_err(|error| {
                            ApiError::bad_request(format!("error decoding patch: {error}"))
                        })?;
                    json_patch::patch(&mut wanted, &patch)
                        .map_err(|error| ApiError::bad_request(error.to_string()))?;
                }
                // A Scale has no lists: strategic and plain merge are the same.
                "application/merge-patch+json" | "application/strategic-merge-patch+json" => {
                    let patch: Value = serde_json::from_slice(call.body).map_err(|error| {
                        ApiError::bad_request(format!("error decoding patch: {error}"))
                    })?;
                    json_patch::merge(&mut wanted, &patch);
                }
                _ => {
                    return Err(ApiError::unsupported_media_type(
                        "application/merge-patch+json, application/json-patch+json",
                    ));
                }
            }
            wanted
        } else {
            decode::object(call.headers, call.query, call.body, "autoscaling", "v1", "Scale")?
                .object
        };
        let version =
            wanted["metadata"]["resourceVersion"].as_str().filter(|version| !version.is_empty());
        if version.is_some_and(|version| version != current.revision.to_string()) {
            return Err(ApiError::modified(resource.group, resource.plural, call.name));
        }
        let replicas = &wanted["spec"]["replicas"];
        // Go leaves a zero out.
        if replicas.as_i64().map_or(!replicas.is_null(), |replicas| replicas < 0) {
            let error = orch_api::FieldError::invalid(
                "spec.replicas",
                replicas,
                "must be greater than or equal to 0",
            );
            return Err(ApiError::invalid("autoscaling", "Scale", call.name, &[error]));
        }
        let mut object = current.object.clone();
        object["spec"]["replicas"] = json!(replicas.as_i64().unwrap_or(0));
        match call.store_change(Part::Main, current, object, Vec::new()).await {
            Ok(done) => {
                return Ok(respond::json(StatusCode::OK, &scale_of(&done.object, done.revision)));
            }
            Err(Change::Conflict) => {}
            Err(Change::Refused(error)) => return Err(error),
        }
    }
    Err(ApiError::modified(resource.group, resource.plural, call.name))
}

fn success() -> Response<Body> {
    respond::json(
        StatusCode::CREATED,
        &json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201 }),
    )
}

/// POST of `pods/NAME/binding`: gives a pod its node, once.
pub(crate) async fn bind(call: &Call<'_>) -> Result<Response<Body>, ApiError> {
    let binding = decode::object(call.headers, call.query, call.body, "", "v1", "Binding")?.object;
    let node = binding["target"]["name"].as_str().unwrap_or_default().to_owned();
    if node.is_empty() {
        return Err(ApiError::invalid(
            "",
            "Binding",
            call.name,
            &[orch_api::FieldError::required("target.name", "")],
        ));
    }
    for _ in 0..RETRIES {
        let current = call.current().await?;
        if let Some(uid) = binding["metadata"]["uid"].as_str().filter(|uid| !uid.is_empty())
            && current.object["metadata"]["uid"] != *uid
        {
            return Err(ApiError::conflict(
                "",
                "pods/binding",
                call.name,
                "the pod is another one now",
            ));
        }
        if current.object["metadata"]["deletionTimestamp"].is_string() {
            let why = format!("pod {} is being deleted, cannot be assigned to a host", call.name);
            return Err(ApiError::conflict("", "pods/binding", call.name, &why));
        }
        if let Some(bound) =
            current.object["spec"]["nodeName"].as_str().filter(|bound| !bound.is_empty())
        {
            let why = format!("pod {} is already assigned to node {bound:?}", call.name);
            return Err(ApiError::conflict("", "pods/binding", call.name, &why));
        }
        let mut object = current.object.clone();
        object["spec"]["nodeName"] = json!(node);
        for (key, value) in binding["metadata"]["annotations"].as_object().into_iter().flatten() {
            object["metadata"]["annotations"][key] = value.clone();
        }
        set_condition(&mut object["status"], "PodScheduled", "True");
        match call.store_change(Part::All, current, object, Vec::new()).await {
            Ok(_) => return Ok(success()),
            Err(Change::Conflict) => {}
            Err(Change::Refused(error)) => return Err(error),
        }
    }
    Err(ApiError::modified("", "pods", call.name))
}

fn set_condition(status: &mut Value, kind: &str, value: &str) {
    if !status["conditions"].is_array() {
        status["conditions"] = json!([]);
    }
    let condition = json!({ "type": kind, "status": value, "lastProbeTime": null, "lastTransitionTime": crate::strategy::now() });
    if let Some(list) = status["conditions"].as_array_mut() {
        list.retain(|old| old["type"] != kind);
        list.push(condition);
    }
}

/// POST of `pods/NAME/eviction`. There are no PodDisruptionBudgets yet, so nothing forbids it.
pub(crate) async fn evict(call: &Call<'_>) -> Result<Response<Body>, ApiError> {
    let eviction =
        decode::object(call.headers, call.query, call.body, "policy", "v1", "Eviction")?.object;
    call.delete_with(&DeleteOptions::from_value(&eviction["deleteOptions"])?).await?;
    Ok(success())
}

/// PUT of `namespaces/NAME/finalize`.
pub(crate) async fn finalize(call: &Call<'_>) -> Result<Response<Body>, ApiError> {
    let wanted = decode::object(call.headers, call.query, call.body, "", "v1", "Namespace")?.object;
    let current = call.current().await?;
    let mut object = current.object.clone();
    object["spec"] = if wanted["spec"].is_object() { wanted["spec"].clone() } else { json!({}) };
    match call.store_change(Part::All, current, object, Vec::new()).await {
        Ok(done) => Ok(done.answer()),
        Err(Change::Conflict) => Err(ApiError::modified("", "namespaces", call.name)),
        Err(Change::Refused(error)) => Err(error),
    }
}

/// POST of `serviceaccounts/NAME/token` (authentication.k8s.io/v1 `TokenRequest`).
pub(crate) async fn token(call: &Call<'_>) -> Result<Response<Body>, ApiError> {
    let mut request = decode::object(
        call.headers,
        call.query,
        call.body,
        "authentication.k8s.io",
        "v1",
        "TokenRequest",
    )?
    .object;
    let account = call.current().await?.object;
    let spec = &request["spec"];
    let seconds = spec["expirationSeconds"].as_i64().unwrap_or(TOKEN_SECONDS);
    if seconds < TOKEN_SECONDS_MIN {
        let error = orch_api::FieldError::invalid(
            "spec.expirationSeconds",
            &json!(seconds),
            "may not specify a duration less than 10 minutes",
        );
        return Err(ApiError::invalid("authentication.k8s.io", "TokenRequest", "", &[error]));
    }
    let seconds = seconds.min(TOKEN_SECONDS_MAX);
    let authenticator = &call.shared.authenticator;
    let mut audiences: Vec<String> = spec["audiences"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    if audiences.is_empty() {
        audiences.push(authenticator.issuer().to_owned());
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let bound = bound_object(call, &spec["boundObjectRef"]).await?;
    if let Some(node) = call.user.node() {
        let named = spec["boundObjectRef"]["uid"].as_str().is_some_and(|uid| !uid.is_empty());
        let pod = bound.as_ref().filter(|(kind, _)| *kind == BoundKind::Pod).map(|(_, pod)| pod);
        restrict::token(node, pod, named)
            .map_err(|why| ApiError::refused("", "serviceaccounts", call.name, why))?;
    }
    let bound = bound.map(|(kind, object)| {
        let meta = &object["metadata"];
        (kind, Bound { name: text(&meta["name"]), uid: text(&meta["uid"]) })
    });
    let account = Bound { name: call.name.to_owned(), uid: text(&account["metadata"]["uid"]) };
    let token = authenticator.issue(call.namespace, account, bound, audiences.clone(), seconds)?;
    let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    request["metadata"] = json!({ "name": call.name, "namespace": call.namespace, "creationTimestamp": crate::strategy::now() });
    request["spec"]["audiences"] = json!(audiences);
    request["spec"]["expirationSeconds"] = json!(seconds);
    request["status"] = json!({ "token": token, "expirationTimestamp": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string() });
    Ok(respond::json(StatusCode::CREATED, &request))
}

/// The object that a token is to be bound to, if any: with that it ends.
async fn bound_object(
    call: &Call<'_>,
    bound: &Value,
) -> Result<Option<(BoundKind, Value)>, ApiError> {
    let text = |key: &str| bound[key].as_str().unwrap_or_default();
    let kind = match (text("apiVersion"), text("kind")) {
        ("", "") => return Ok(None),
        ("v1", kind) => BoundKind::parse(kind),
        _ => None,
    };
    let Some(kind) = kind else {
        return Err(ApiError::bad_request(format!(
            "cannot bind token to object of type {}, Kind={}: tokens are bound to v1 Pods, Secrets and Nodes",
            text("apiVersion"),
            text("kind")
        )));
    };
    let plural = kind.plural();
    let Some(stored) = call.shared.stored("", plural) else {
        return Err(ApiError::internal(format!("no {plural} resource")));
    };
    let object = Call { stored, name: text("name"), ..*call }.current().await?.object;
    let uid = object["metadata"]["uid"].as_str().unwrap_or_default();
    let wanted = text("uid");
    if !wanted.is_empty() && wanted != uid {
        let why = "the UID in the bound object reference does not match";
        return Err(ApiError::conflict("", plural, text("name"), why));
    }
    if kind == BoundKind::Pod && object["spec"]["serviceAccountName"] != call.name {
        return Err(ApiError::bad_request(format!(
            "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name.",
            call.name
        )));
    }
    Ok(Some((kind, object)))
}
