//! Questions that are answered and never stored: who am I, whose token is this, may they do that
//! (authentication.k8s.io, authorization.k8s.io).

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use orch_api::{ApiError, FieldError};
use orch_client::Body;
use serde_json::{Value, json};

use crate::auth::{self, User};
use crate::authz::{self, Attributes, ResourceTarget, Rule};
use crate::request::{Query, RequestInfo};
use crate::resources::Review;
use crate::state::Shared;
use crate::{decode, respond};

/// POST of a review.
///
/// # Errors
/// The question makes no sense.
pub(crate) async fn answer(
    shared: &Shared,
    user: &User,
    review: &Review,
    info: &RequestInfo,
    (headers, query, body): (&HeaderMap, &Query, &Bytes),
) -> Result<Response<Body>, ApiError> {
    let mut object = decode::object(headers, query, body, review.group, "v1", review.kind)?.object;
    let spec = &object["spec"];
    object["status"] = match review.kind {
        "SelfSubjectReview" => json!({ "userInfo": user_info(user) }),
        "TokenReview" => token(shared, spec),
        "SelfSubjectRulesReview" => {
            let namespace = spec["namespace"].as_str().unwrap_or_default();
            if namespace.is_empty() {
                return Err(ApiError::bad_request("no namespace on request"));
            }
            rules(authz::rules_of(shared, user, namespace).await?)
        }
        kind => {
            let errors = wrong(kind, spec, &info.namespace);
            if !errors.is_empty() {
                return Err(ApiError::invalid(review.group, kind, "", &errors));
            }
            let about =
                if kind == "SelfSubjectAccessReview" { user.clone() } else { subject(spec) };
            access(shared, &about, spec).await?
        }
    };
    if !object["metadata"].is_object() {
        object["metadata"] = json!({ "creationTimestamp": null });
    }
    Ok(respond::json(StatusCode::CREATED, &object))
}

fn user_info(user: &User) -> Value {
    let mut info = json!({ "username": user.name, "groups": user.groups });
    if !user.uid.is_empty() {
        info["uid"] = json!(user.uid);
    }
    if !user.extra.is_empty() {
        info["extra"] = json!(user.extra);
    }
    info
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn token(shared: &Shared, spec: &Value) -> Value {
    let text = spec["token"].as_str().unwrap_or_default();
    let mut asked = texts(&spec["audiences"]);
    if asked.is_empty() {
        asked.push(shared.authenticator.issuer().to_owned());
    }
    let Some((found, meant)) = auth::user_of_token(shared, text) else {
        return json!({ "user": {}, "error": "the token is not valid" });
    };
    asked.retain(|audience| meant.contains(audience));
    if asked.is_empty() {
        return json!({ "user": {}, "error": format!("token audiences {meant:?} is invalid for the target audiences") });
    }
    json!({ "authenticated": true, "user": user_info(&found), "audiences": asked })
}

/// The subject of a (Local)SubjectAccessReview: exactly what it says.
fn subject(spec: &Value) -> User {
    let extra: BTreeMap<String, Vec<String>> = spec["extra"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, values)| (key.clone(), texts(values)))
        .collect();
    User {
        name: spec["user"].as_str().unwrap_or_default().to_owned(),
        uid: spec["uid"].as_str().unwrap_or_default().to_owned(),
        groups: texts(&spec["groups"]),
        extra,
    }
}

/// Pure: why an access review cannot be answered. `namespace` is that of the URL.
fn wrong(kind: &str, spec: &Value, namespace: &str) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    if resource.is_object() && path.is_object() {
        let why = "cannot be specified in combination with resourceAttributes";
        errors.push(FieldError::invalid("spec.nonResourceAttributes", path, why));
    }
    if !resource.is_object() && !path.is_object() {
        let why = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
        errors.push(FieldError::invalid("spec.resourceAttributes", resource, why));
    }
    if kind != "SelfSubjectAccessReview"
        && spec["user"].as_str().is_none_or(str::is_empty)
        && texts(&spec["groups"]).is_empty()
    {
        let why = "at least one of user or group must be specified";
        errors.push(FieldError::invalid("spec.user", &json!(""), why));
    }
    if kind == "LocalSubjectAccessReview" {
        if path.is_object() {
            let why = "disallowed on this kind of request";
            errors.push(FieldError::invalid("spec.nonResourceAttributes", path, why));
        }
        let found = &resource["namespace"];
        if resource.is_object() && found != namespace {
            let why = format!("must match metadata.namespace: {namespace}");
            errors.push(FieldError::invalid("spec.resourceAttributes.namespace", found, why));
        }
    }
    errors
}

async fn access(shared: &Shared, user: &User, spec: &Value) -> Result<Value, ApiError> {
    fn text<'a>(of: &'a Value, key: &str) -> &'a str {
        of[key].as_str().unwrap_or_default()
    }
    let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    let selector = field_selector(&resource["fieldSelector"]);
    let asked = if resource.is_object() {
        let target = ResourceTarget {
            group: text(resource, "group"),
            resource: text(resource, "resource"),
            subresource: text(resource, "subresource"),
            namespace: text(resource, "namespace"),
            name: text(resource, "name"),
            field_selector: &selector,
        };
        Attributes::resource(text(resource, "verb"), target)
    } else {
        Attributes::path(text(path, "verb"), text(path, "path"))
    };
    let decision = authz::authorize(shared, user, &asked).await?;
    let mut status = json!({ "allowed": decision.is_allowed() });
    let reason = decision.reason();
    if !reason.is_empty() {
        status["reason"] = json!(reason);
    }
    Ok(status)
}

/// The selector of a review as the text of a request.
fn field_selector(attributes: &Value) -> String {
    if let Some(raw) = attributes["rawSelector"].as_str() {
        return raw.to_owned();
    }
    let requirements = attributes["requirements"].as_array().into_iter().flatten();
    let parts = requirements.filter_map(|one| {
        let operator = match one["operator"].as_str()? {
            "In" => "=",
            "NotIn" => "!=",
            _ => return None,
        };
        // One value is all that a field selector can say.
        match texts(&one["values"]).as_slice() {
            [value] => Some(format!("{}{operator}{value}", one["key"].as_str()?)),
            _ => None,
        }
    });
    parts.collect::<Vec<_>>().join(",")
}

fn rules(found: authz::Rules) -> Value {
    let (mut resources, mut paths) = (Vec::<Rule>::new(), Vec::<Rule>::new());
    for rule in found.rules {
        let list = if rule.urls.is_empty() { &mut resources } else { &mut paths };
        if !list.contains(&rule) {
            list.push(rule);
        }
    }
    let mut status = json!({ "resourceRules": resources, "nonResourceRules": paths, "incomplete": found.incomplete });
    if !found.errors.is_empty() {
        status["evaluationError"] = json!(found.errors.join(", "));
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_that_make_no_sense_are_named() {
        let fields = |kind: &str, spec: Value| -> Vec<String> {
            wrong(kind, &spec, "shop").into_iter().map(|error| error.field).collect()
        };
        let resource = json!({ "verb": "get", "resource": "pods", "namespace": "shop" });
        let path = json!({ "verb": "get", "path": "/x" });
        let user = "jane";
        for (kind, spec, expected) in [
            ("SelfSubjectAccessReview", json!({ "resourceAttributes": resource }), vec![]),
            ("SelfSubjectAccessReview", json!({}), vec!["spec.resourceAttributes"]),
            (
                "SubjectAccessReview",
                json!({ "resourceAttributes": resource, "nonResourceAttributes": path, "user": user }),
                vec!["spec.nonResourceAttributes"],
            ),
            ("SubjectAccessReview", json!({ "nonResourceAttributes": path }), vec!["spec.user"]),
            (
                "SubjectAccessReview",
                json!({ "nonResourceAttributes": path, "groups": ["g"] }),
                vec![],
            ),
            (
                "LocalSubjectAccessReview",
                json!({ "resourceAttributes": resource, "user": user }),
                vec![],
            ),
            (
                "LocalSubjectAccessReview",
                json!({ "nonResourceAttributes": path, "user": user }),
                vec!["spec.nonResourceAttributes"],
            ),
            (
                "LocalSubjectAccessReview",
                json!({ "resourceAttributes": { "namespace": "bank" }, "user": user }),
                vec!["spec.resourceAttributes.namespace"],
            ),
        ] {
            assert_eq!(fields(kind, spec.clone()), expected, "{kind} {spec}");
        }
    }

    #[test]
    fn a_selector_is_read_in_both_its_forms() {
        assert_eq!(field_selector(&json!({ "rawSelector": "spec.nodeName=a" })), "spec.nodeName=a");
        let parts = json!({ "requirements": [
            { "key": "spec.nodeName", "operator": "In", "values": ["a"] },
            { "key": "status.phase", "operator": "NotIn", "values": ["Failed"] },
            { "key": "x", "operator": "Exists" },
        ] });
        assert_eq!(field_selector(&parts), "spec.nodeName=a,status.phase!=Failed");
    }
}
