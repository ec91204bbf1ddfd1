//! Who asks, and whether they may.
//!
//! Authentication: client certificates (common name = user, organisations = groups) and ServiceAccount tokens
//! (JWT, ES256). Authorisation is coarse in this version: `system:masters` may do all, agents what agents need,
//! everybody who is known may ask what the server offers and who they are. RBAC objects come later; until then a
//! ServiceAccount may do nothing else, which is what a cluster without role bindings gives it too.

use http::HeaderMap;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use orch_api::ApiError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::request::{RequestInfo, Verb};

/// Who sends a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) groups: Vec<String>,
}

impl User {
    pub(crate) fn new(name: &str, groups: &[&str]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        groups.push("system:authenticated".to_owned());
        Self { name: name.to_owned(), uid: String::new(), groups }
    }

    pub(crate) fn anonymous() -> Self {
        Self {
            name: "system:anonymous".to_owned(),
            uid: String::new(),
            groups: vec!["system:unauthenticated".to_owned()],
        }
    }

    fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|mine| mine == group)
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
    pub(crate) pod: Option<Bound>,
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

    /// Whether a token for these audiences is one for this server. Bootstrap tokens name none.
    pub(crate) fn is_audience(&self, audiences: &[String]) -> bool {
        audiences.is_empty() || audiences.contains(&self.issuer)
    }

    pub(crate) fn issue(
        &self,
        namespace: &str,
        account: Bound,
        pod: Option<Bound>,
        audiences: Vec<String>,
        seconds: i64,
    ) -> Result<String, ApiError> {
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
                pod,
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
        (claims.sub == expected).then_some(TokenSubject {
            namespace: claims.kubernetes.namespace,
            account: claims.kubernetes.serviceaccount,
            pod: claims.kubernetes.pod,
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
        user
    }
}

/// What an agent may do: (resource, subresource, verbs). Empty subresource = the object itself.
const AGENT_RULES: &[(&str, &str, &[Verb])] = &[
    ("nodes", "", &[Verb::Get, Verb::List, Verb::Watch, Verb::Create, Verb::Update, Verb::Patch]),
    ("nodes", "status", &[Verb::Update, Verb::Patch]),
    ("pods", "", &[Verb::Get, Verb::List, Verb::Watch, Verb::Delete]),
    ("pods", "status", &[Verb::Update, Verb::Patch]),
    ("leases", "", &[Verb::Get, Verb::Create, Verb::Update, Verb::Patch]),
    ("events", "", &[Verb::Create, Verb::Update, Verb::Patch]),
    ("configmaps", "", &[Verb::Get, Verb::List, Verb::Watch]),
    ("secrets", "", &[Verb::Get]),
    ("serviceaccounts", "", &[Verb::Get]),
    ("serviceaccounts", "token", &[Verb::Create]),
    ("services", "", &[Verb::Get, Verb::List, Verb::Watch]),
    ("endpointslices", "", &[Verb::Get, Verb::List, Verb::Watch]),
    ("namespaces", "", &[Verb::Get, Verb::List, Verb::Watch]),
    ("certificatesigningrequests", "", &[Verb::Get, Verb::Create, Verb::Watch]),
    ("networkpolicies", "", &[Verb::Get, Verb::List, Verb::Watch]),
];

/// Whether `user` may do what `info` says.
pub(crate) fn allowed(user: &User, info: &RequestInfo) -> bool {
    if user.is_in("system:masters") {
        return true;
    }
    // How a new node learns the cluster's authority, before it has any credentials (kubeadm's discovery).
    if info.verb == Verb::Get
        && (info.resource.as_str(), info.subresource.as_str()) == ("configmaps", "")
        && (info.namespace.as_str(), info.name.as_str()) == ("kube-public", "cluster-info")
    {
        return true;
    }
    if !user.is_in("system:authenticated") {
        return false;
    }
    // All that a bootstrap token is good for: to ask for a certificate and to fetch it, and to fetch the authorities'
    // keys, which are encrypted with a key that only the join command of a control plane carries.
    if user.is_in(crate::certificates::BOOTSTRAPPERS) {
        let handover = info.verb == Verb::Get
            && (info.resource.as_str(), info.subresource.as_str()) == ("secrets", "")
            && (info.namespace.as_str(), info.name.as_str()) == ("kube-system", "orch-certs");
        return handover
            || info.resource == crate::certificates::PLURAL
                && info.subresource.is_empty()
                && matches!(info.verb, Verb::Create | Verb::Get);
    }
    let self_review = info.resource.starts_with("selfsubject") && info.verb == Verb::Create;
    if self_review {
        return true;
    }
    user.is_in("system:nodes")
        && AGENT_RULES.iter().any(|(resource, subresource, verbs)| {
            *resource == info.resource
                && *subresource == info.subresource
                && verbs.contains(&info.verb)
        })
}

/// The rules of `user` as a `SelfSubjectRulesReview` tells them.
pub(crate) fn rules(user: &User) -> Value {
    let mut resources = Vec::new();
    if user.is_in("system:masters") {
        resources.push(json!({ "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"] }));
    } else if user.is_in("system:nodes") {
        for (resource, subresource, verbs) in AGENT_RULES {
            let verbs: Vec<&str> = verbs.iter().map(|verb| verb.as_str()).collect();
            let groups: Vec<&str> = crate::resources::RESOURCES
                .iter()
                .filter(|known| known.plural == *resource)
                .map(|known| known.group)
                .collect();
            let name = match *subresource {
                "" => (*resource).to_owned(),
                subresource => format!("{resource}/{subresource}"),
            };
            resources.push(json!({ "verbs": verbs, "apiGroups": groups, "resources": [name] }));
        }
    }
    let reviews = ["selfsubjectaccessreviews", "selfsubjectrulesreviews"];
    resources.push(
        json!({ "verbs": ["create"], "apiGroups": ["authorization.k8s.io"], "resources": reviews }),
    );
    resources.push(json!({ "verbs": ["create"], "apiGroups": ["authentication.k8s.io"],
                           "resources": ["selfsubjectreviews"] }));
    let paths = if user.is_in("system:masters") {
        vec!["*"]
    } else {
        vec![
            "/api",
            "/api/*",
            "/apis",
            "/apis/*",
            "/healthz",
            "/livez",
            "/openapi/*",
            "/readyz",
            "/version",
        ]
    };
    json!({ "resourceRules": resources, "nonResourceRules": [{ "verbs": ["get"], "nonResourceURLs": paths }],
            "incomplete": false })
}

/// The user that `user` wants to act as by the `Impersonate-*` headers (Kubernetes, "User impersonation"), or `user`.
///
/// # Errors
/// 403 for who may not, 400 for headers that name groups of nobody.
pub(crate) fn impersonated(user: User, headers: &HeaderMap) -> Result<User, ApiError> {
    let texts = |name: &str| -> Vec<String> {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .map(str::to_owned)
            .collect()
    };
    let groups = texts("impersonate-group");
    let uid = texts("impersonate-uid").pop();
    let Some(name) = texts("impersonate-user").pop().filter(|name| !name.is_empty()) else {
        let named = headers.keys().any(|key| key.as_str().starts_with("impersonate-"));
        return if named {
            Err(ApiError::bad_request(
                "Impersonate-User is missing beside other Impersonate headers",
            ))
        } else {
            Ok(user)
        };
    };
    if !user.is_in("system:masters") {
        return Err(ApiError::forbidden(&user.name, "impersonate", "", "users", "", &name));
    }
    if name == "system:anonymous" && groups.is_empty() {
        return Ok(User::anonymous());
    }
    let mut groups: Vec<&str> = groups.iter().map(String::as_str).collect();
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let of_namespace = account.map(|(namespace, _)| format!("system:serviceaccounts:{namespace}"));
    if let (true, Some(of_namespace)) = (groups.is_empty(), &of_namespace) {
        groups.extend(["system:serviceaccounts", of_namespace]);
    }
    groups.retain(|group| *group != "system:authenticated");
    let mut user = User::new(&name, &groups);
    user.uid = uid.unwrap_or_default();
    Ok(user)
}

/// Whether `user` may read a path that names no resource.
pub(crate) fn path_allowed(user: &User, path: &str) -> bool {
    if user.is_in("system:masters") {
        return true;
    }
    let public = matches!(path, "/healthz" | "/livez" | "/readyz" | "/version" | "/version/");
    let known = path == "/api"
        || path == "/apis"
        || path.starts_with("/api/")
        || path.starts_with("/apis/")
        || path.starts_with("/openapi/")
        || path.starts_with("/.well-known/")
        || path.starts_with("/openid/");
    public || (known && user.is_in("system:authenticated"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(verb: Verb, resource: &str, subresource: &str) -> RequestInfo {
        RequestInfo {
            verb,
            resource: resource.to_owned(),
            subresource: subresource.to_owned(),
            ..RequestInfo::default()
        }
    }

    #[test]
    fn only_masters_act_as_others() {
        let mut headers = HeaderMap::new();
        headers.insert(
            "impersonate-user",
            "system:serviceaccount:shop:till".parse().expect("a header"),
        );
        let acting =
            impersonated(User::new("admin", &["system:masters"]), &headers).expect("allowed");
        assert_eq!(acting.name, "system:serviceaccount:shop:till");
        assert_eq!(
            acting.groups,
            ["system:serviceaccounts", "system:serviceaccounts:shop", "system:authenticated"]
        );
        assert_eq!(impersonated(acting, &headers).expect_err("refused").code, 403);
        headers.clear();
        headers.insert("impersonate-group", "system:masters".parse().expect("a header"));
        assert!(impersonated(User::new("admin", &["system:masters"]), &headers).is_err());
    }

    #[test]
    fn rights_by_table() {
        let admin = User::new("admin", &["system:masters"]);
        let agent = User::new("system:node:a", &["system:nodes"]);
        let account = User::new("system:serviceaccount:a:b", &["system:serviceaccounts"]);
        let newcomer = User::new("system:bootstrap:abcdef", &["system:bootstrappers"]);
        let mut public = info(Verb::Get, "configmaps", "");
        (public.namespace, public.name) = ("kube-public".to_owned(), "cluster-info".to_owned());
        assert!(allowed(&User::anonymous(), &public));
        public.name = "other".to_owned();
        assert!(!allowed(&User::anonymous(), &public));
        for (user, verb, resource, subresource, expected) in [
            (&admin, Verb::Delete, "nodes", "", true),
            (&agent, Verb::Patch, "pods", "status", true),
            (&agent, Verb::Create, "pods", "", false),
            (&agent, Verb::List, "secrets", "", false),
            (&account, Verb::Get, "pods", "", false),
            (&newcomer, Verb::Create, "certificatesigningrequests", "", true),
            (&newcomer, Verb::Update, "certificatesigningrequests", "approval", false),
            (&newcomer, Verb::Get, "secrets", "", false),
            (&agent, Verb::Create, "certificatesigningrequests", "", true),
            (&account, Verb::Create, "selfsubjectaccessreviews", "", true),
            (&User::anonymous(), Verb::Create, "selfsubjectreviews", "", false),
        ] {
            assert_eq!(
                allowed(user, &info(verb, resource, subresource)),
                expected,
                "{} {verb:?} {resource}",
                user.name
            );
        }
        assert!(
            path_allowed(&User::anonymous(), "/readyz")
                && !path_allowed(&User::anonymous(), "/api")
        );
        assert!(!path_allowed(&account, "/metrics"));
    }
}
