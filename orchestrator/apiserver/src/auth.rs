//! Who asks: client certificates (common name = user, organisations = groups), ServiceAccount tokens (JWT, ES256),
//! bootstrap tokens. Who comes with none of them is `system:anonymous`. What they may is [`crate::authz`]'s business.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use orch_api::ApiError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::read;
use crate::state::Shared;

/// Who sends a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) groups: Vec<String>,
    /// What else is known, such as the pod whose token it is.
    pub(crate) extra: BTreeMap<String, Vec<String>>,
}

/// Name of everybody who is not known.
pub(crate) const ANONYMOUS: &str = "system:anonymous";
/// Group of everybody who is known.
pub(crate) const AUTHENTICATED: &str = "system:authenticated";
/// Group of everybody who is not.
pub(crate) const UNAUTHENTICATED: &str = "system:unauthenticated";
/// Group of the agents.
const NODES: &str = "system:nodes";
/// How long the tokens of an object outlive the end of its grace period, if it is still there (upstream's).
const ENDING: SignedDuration = SignedDuration::from_secs(60);

impl User {
    pub(crate) fn new(name: &str, groups: &[&str]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        groups.push(AUTHENTICATED.to_owned());
        Self { name: name.to_owned(), groups, ..Self::default() }
    }

    pub(crate) fn anonymous() -> Self {
        Self {
            name: ANONYMOUS.to_owned(),
            groups: vec![UNAUTHENTICATED.to_owned()],
            ..Self::default()
        }
    }

    pub(crate) fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|mine| mine == group)
    }

    /// The name of the node whose agent this is.
    pub(crate) fn node(&self) -> Option<&str> {
        let name = self.name.strip_prefix("system:node:").filter(|name| !name.is_empty())?;
        self.is_in(NODES).then_some(name)
    }
}

/// Subject of a client certificate that TLS has verified.
pub(crate) fn user_of_certificate(der: &[u8]) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups: Vec<&str> =
        subject.iter_organization().filter_map(|part| part.as_str().ok()).collect();
    Some(User::new(&name, &groups))
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    aud: Vec<String>,
    exp: i64,
    iat: i64,
    nbf: i64,
    #[serde(rename = "kubernetes.io")]
    kubernetes: KubernetesClaims,
}

#[derive(Debug, Serialize, Deserialize)]
struct KubernetesClaims {
    namespace: String,
    serviceaccount: Bound,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<Bound>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<Bound>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<Bound>,
}

/// Kinds of objects that a token can be bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BoundKind {
    Pod,
    Secret,
    Node,
}

impl BoundKind {
    /// By its name in the API.
    pub(crate) fn parse(kind: &str) -> Option<Self> {
        match kind {
            "Pod" => Some(Self::Pod),
            "Secret" => Some(Self::Secret),
            "Node" => Some(Self::Node),
            _ => None,
        }
    }

    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Pod => "pods",
            Self::Secret => "secrets",
            Self::Node => "nodes",
        }
    }
}

/// An object that a token is bound to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Bound {
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// Issues and checks ServiceAccount tokens.
pub(crate) struct Authenticator {
    issuer: String,
    encoding: EncodingKey,
    decoding: DecodingKey,
}

/// What a valid token says.
pub(crate) struct TokenSubject {
    pub(crate) namespace: String,
    pub(crate) account: Bound,
    /// What it ends with, besides its account.
    pub(crate) bound: Option<(BoundKind, Bound)>,
    pub(crate) audiences: Vec<String>,
}

impl Authenticator {
    /// # Errors
    /// The key is no EC P-256 key in PKCS#8 PEM.
    pub(crate) fn new(
        issuer: &str,
        key_pem: &str,
        public_pem: &str,
    ) -> Result<Self, jsonwebtoken::errors::Error> {
        Ok(Self {
            issuer: issuer.to_owned(),
            encoding: EncodingKey::from_ec_pem(key_pem.as_bytes())?,
            decoding: DecodingKey::from_ec_pem(public_pem.as_bytes())?,
        })
    }

    pub(crate) fn issuer(&self) -> &str {
        &self.issuer
    }

    pub(crate) fn issue(
        &self,
        namespace: &str,
        account: Bound,
        bound: Option<(BoundKind, Bound)>,
        audiences: Vec<String>,
        seconds: i64,
    ) -> Result<String, ApiError> {
        let of = |wanted| bound.as_ref().filter(|(kind, _)| *kind == wanted).map(|(_, one)| one);
        let now = Timestamp::now().as_second();
        let claims = Claims {
            iss: self.issuer.clone(),
            sub: format!("system:serviceaccount:{namespace}:{}", account.name),
            aud: audiences,
            exp: now + seconds,
            iat: now,
            nbf: now,
            kubernetes: KubernetesClaims {
                namespace: namespace.to_owned(),
                serviceaccount: account,
                pod: of(BoundKind::Pod).cloned(),
                secret: of(BoundKind::Secret).cloned(),
                node: of(BoundKind::Node).cloned(),
            },
        };
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &self.encoding)
            .map_err(|error| ApiError::internal(format!("sign a token: {error}")))
    }

    /// Signature, issuer and time; whether the account still exists is asked by the caller.
    pub(crate) fn verify(&self, token: &str) -> Option<TokenSubject> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[&self.issuer]);
        validation.validate_aud = false;
        validation.validate_nbf = true;
        let claims =
            jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation).ok()?.claims;
        let expected = format!(
            "system:serviceaccount:{}:{}",
            claims.kubernetes.namespace, claims.kubernetes.serviceaccount.name
        );
        let KubernetesClaims { namespace, serviceaccount, pod, secret, node } = claims.kubernetes;
        let bound = [(BoundKind::Pod, pod), (BoundKind::Secret, secret), (BoundKind::Node, node)];
        (claims.sub == expected).then(|| TokenSubject {
            namespace,
            account: serviceaccount,
            bound: bound.into_iter().find_map(|(kind, one)| Some((kind, one?))),
            audiences: claims.aud,
        })
    }
}

impl TokenSubject {
    pub(crate) fn user(&self) -> User {
        let mut user = User::new(
            &format!("system:serviceaccount:{}:{}", self.namespace, self.account.name),
            &["system:serviceaccounts", &format!("system:serviceaccounts:{}", self.namespace)],
        );
        user.uid.clone_from(&self.account.uid);
        let (prefix, bound) = match &self.bound {
            Some((BoundKind::Pod, bound)) => ("pod", bound),
            Some((BoundKind::Node, bound)) => ("node", bound),
            Some((BoundKind::Secret, _)) | None => return user,
        };
        for (key, value) in [("name", &bound.name), ("uid", &bound.uid)] {
            let key = format!("authentication.kubernetes.io/{prefix}-{key}");
            user.extra.insert(key, vec![value.clone()]);
        }
        user
    }
}

/// Whether an object that a token is bound to is that very one still, and not one of the same name that came later. One
/// that ends may need its tokens to do so; [`ENDING`] after it should have ended they are worthless.
fn stands(object: &Value, uid: &str, now: Timestamp) -> bool {
    let meta = &object["metadata"];
    let ends = meta["deletionTimestamp"].as_str().and_then(|time| time.parse::<Timestamp>().ok());
    meta["uid"] == uid && ends.is_none_or(|ends| ends + ENDING > now)
}

/// Who has sent a token, if the token is valid and its account (and what else it is bound to) are still there; and for
/// whom it is meant.
pub(crate) fn user_of_token(shared: &Shared, token: &str) -> Option<(User, Vec<String>)> {
    if let Some(user) = crate::certificates::user_of_bootstrap_token(shared, token) {
        // These are for this server only.
        return Some((user, vec![shared.authenticator.issuer().to_owned()]));
    }
    let subject = shared.authenticator.verify(token)?;
    let now = Timestamp::now();
    let exists = |plural: &str, bound: &Bound| -> bool {
        let Some(stored) = shared.stored("", plural) else { return false };
        let key = stored.resource.key(&subject.namespace, &bound.name);
        stored
            .cache
            .get(&key)
            .and_then(|object| read::parse(&object.bytes).ok())
            .is_some_and(|object| stands(&object, &bound.uid, now))
    };
    let good = exists("serviceaccounts", &subject.account)
        && subject.bound.as_ref().is_none_or(|(kind, bound)| exists(kind.plural(), bound));
    good.then(|| (subject.user(), subject.audiences))
}

/// The sender of a request to this server: a token that was made for somebody else is none.
pub(crate) fn user_of_bearer(shared: &Shared, token: &str) -> Option<User> {
    let (user, audiences) = user_of_token(shared, token)?;
    audiences.iter().any(|audience| audience == shared.authenticator.issuer()).then_some(user)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_token_ends_with_what_it_is_bound_to() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().expect("a time");
        let object =
            |ends: Option<&str>| json!({ "metadata": { "uid": "1", "deletionTimestamp": ends } });
        assert!(stands(&object(None), "1", now));
        assert!(!stands(&object(None), "2", now), "another one of the same name");
        assert!(stands(&object(Some("2026-01-01T00:02:00Z")), "1", now), "it may end in peace");
        assert!(stands(&object(Some("2026-01-01T00:00:01Z")), "1", now));
        assert!(!stands(&object(Some("2026-01-01T00:00:00Z")), "1", now));
    }
}
