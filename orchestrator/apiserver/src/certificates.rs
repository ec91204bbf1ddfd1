//! CertificateSigningRequests (certificates.k8s.io/v1) and the bootstrap tokens that new nodes first speak with
//! (Kubernetes, "Authenticating with Bootstrap Tokens"). Who signs is the controllers' business; here is what only the
//! server can say: who asked.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use jiff::Timestamp;
use orch_api::{ApiError, bootstrap_token};
use serde_json::{Value, json};

use crate::auth::User;
use crate::request::Query;
use crate::state::Shared;
use crate::{decode, read};

/// Group of the API.
pub(crate) const GROUP: &str = "certificates.k8s.io";
/// Its one resource.
pub(crate) const PLURAL: &str = "certificatesigningrequests";
/// Group of everybody who comes with a bootstrap token.
pub(crate) const BOOTSTRAPPERS: &str = "system:bootstrappers";

/// A request to be stored as new: with the user who asks, whatever the client wrote there.
///
/// # Errors
/// The body is no CertificateSigningRequest.
pub(crate) fn request(
    user: &User,
    headers: &HeaderMap,
    query: &Query,
    body: &Bytes,
) -> Result<(HeaderMap, Bytes), ApiError> {
    let mut object =
        decode::object(headers, query, body, GROUP, "v1", "CertificateSigningRequest")?.object;
    if !object["spec"].is_object() {
        return Err(ApiError::bad_request("spec is missing"));
    }
    object["spec"]["username"] = json!(user.name);
    object["spec"]["groups"] = json!(user.groups);
    if let Some(spec) = object["spec"].as_object_mut() {
        spec.shift_remove("extra");
        spec.shift_remove("uid");
    }
    if !user.extra.is_empty() {
        object["spec"]["extra"] = json!(user.extra);
    }
    if !user.uid.is_empty() {
        object["spec"]["uid"] = json!(user.uid);
    }
    let mut headers = headers.clone();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok((headers, serde_json::to_vec(&object).map_err(ApiError::internal)?.into()))
}

/// `Approved,Issued`, as kubectl shows it.
pub(crate) fn condition(object: &Value) -> String {
    let conditions = object["status"]["conditions"].as_array();
    let has =
        |kind: &str| conditions.is_some_and(|list| list.iter().any(|one| one["type"] == kind));
    let mut said = Vec::new();
    if has("Denied") {
        said.push("Denied");
    } else if has("Approved") {
        said.push("Approved");
    } else {
        said.push("Pending");
    }
    if has("Failed") {
        said.push("Failed");
    }
    if object["status"]["certificate"].as_str().is_some_and(|pem| !pem.is_empty()) {
        said.push("Issued");
    }
    said.join(",")
}

/// The user of a bootstrap token `ID.SECRET`, if the token is known, meant for this and not expired.
pub(crate) fn user_of_bootstrap_token(shared: &Shared, token: &str) -> Option<User> {
    let (id, secret) = split(token)?;
    let stored = shared.stored("", "secrets")?;
    let key = stored.resource.key(bootstrap_token::NAMESPACE, &bootstrap_token::secret_name(id));
    let object = read::parse(&stored.cache.get(&key)?.bytes).ok()?;
    user(&object, id, secret, Timestamp::now())
}

/// Six and sixteen characters of `[a-z0-9]`.
fn split(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.split_once('.')?;
    let good = |text: &str, length| {
        text.len() == length
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    (good(id, 6) && good(secret, 16)).then_some((id, secret))
}

/// Pure: what the Secret says about the bearer of `secret`.
fn user(object: &Value, id: &str, secret: &str, now: Timestamp) -> Option<User> {
    let field = |name: &str| -> Option<String> {
        use base64::Engine as _;
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(object["data"][name].as_str()?)
            .ok()?;
        String::from_utf8(bytes).ok()
    };
    if object["type"] != bootstrap_token::TYPE
        || object["metadata"]["deletionTimestamp"].is_string()
        || field("token-id").as_deref() != Some(id)
        || !same(field("token-secret")?.as_bytes(), secret.as_bytes())
        || field("usage-bootstrap-authentication").as_deref() != Some("true")
    {
        return None;
    }
    // One without expiration is for ever, as upstream's; one that cannot be read is no token.
    if let Some(expiration) = field("expiration")
        && expiration.parse::<Timestamp>().ok()? <= now
    {
        return None;
    }
    let extra = field("auth-extra-groups").unwrap_or_default();
    let groups: Vec<&str> = std::iter::once(BOOTSTRAPPERS)
        .chain(extra.split(',').map(str::trim).filter(|group| {
            group.strip_prefix(BOOTSTRAPPERS).is_some_and(|rest| rest.starts_with(':'))
        }))
        .collect();
    Some(User::new(&format!("{}{id}", bootstrap_token::USER_PREFIX), &groups))
}

/// Compares without telling by its duration where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(expiration: &str) -> Value {
        use base64::Engine as _;
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        json!({ "type": "bootstrap.kubernetes.io/token", "data": {
            "token-id": encode("abcdef"), "token-secret": encode("0123456789abcdef"), "expiration": encode(expiration),
            "usage-bootstrap-authentication": encode("true"),
            "auth-extra-groups": encode("system:bootstrappers:orch:node,system:masters"),
        }})
    }

    #[test]
    fn a_token_gives_its_groups_and_never_others() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
        let (id, key) = split("abcdef.0123456789abcdef").expect("a token");
        let found = user(&secret("2026-01-01T00:00:01Z"), id, key, now).expect("a user");
        assert_eq!(found.name, "system:bootstrap:abcdef");
        assert_eq!(
            found.groups,
            ["system:bootstrappers", "system:bootstrappers:orch:node", "system:authenticated"]
        );
    }

    #[test]
    fn expired_foreign_and_malformed_tokens_are_refused() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
        let good = secret("2026-01-01T00:00:01Z");
        assert!(user(&secret("2026-01-01T00:00:00Z"), "abcdef", "0123456789abcdef", now).is_none());
        assert!(user(&secret("soon"), "abcdef", "0123456789abcdef", now).is_none());
        assert!(user(&good, "abcdef", "0123456789abcdeg", now).is_none());
        assert!(user(&good, "fedcba", "0123456789abcdef", now).is_none());
        let mut other = good.clone();
        other["type"] = json!("Opaque");
        assert!(user(&other, "abcdef", "0123456789abcdef", now).is_none());
        for text in
            ["", "abcdef", "abcdef.short", "ABCDEF.0123456789abcdef", "abcde/.0123456789abcdef"]
        {
            assert!(split(text).is_none(), "{text}");
        }
    }

    #[test]
    fn the_condition_reads_as_kubectls() {
        assert_eq!(condition(&json!({})), "Pending");
        let done =
            json!({ "status": { "conditions": [{ "type": "Approved" }], "certificate": "QUJD" } });
        assert_eq!(condition(&done), "Approved,Issued");
        assert_eq!(
            condition(&json!({ "status": { "conditions": [{ "type": "Denied" }] } })),
            "Denied"
        );
    }
}
