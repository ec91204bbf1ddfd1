//! How others check ServiceAccount tokens: the issuer's configuration and its public key (OpenID Connect Discovery 1.0;
//! Kubernetes, "ServiceAccount issuer discovery").

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use http::{HeaderValue, Response, StatusCode, header};
use orch_client::Body;
use serde_json::{Value, json};

use crate::respond;
use crate::state::Shared;

pub(crate) const CONFIGURATION: &str = "/.well-known/openid-configuration";
pub(crate) const KEYS: &str = "/openid/v1/jwks";
/// Bytes of one coordinate of a point of P-256.
const COORDINATE: usize = 32;

/// GET of the configuration; `address` is this server's.
pub(crate) fn configuration(shared: &Shared, address: &str) -> Option<Response<Body>> {
    let document = json!({
        "issuer": shared.authenticator.issuer(),
        "jwks_uri": format!("https://{address}{KEYS}"),
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    });
    Some(respond::json(StatusCode::OK, &document))
}

/// GET of the public keys.
pub(crate) fn keys(shared: &Shared) -> Option<Response<Body>> {
    let public = orch_pki::public_key_pem(&shared.options.service_account_key_pem).ok()?;
    let mut answer = respond::json(StatusCode::OK, &json!({ "keys": [key(&public)?] }));
    let kind = HeaderValue::from_static("application/jwk-set+json");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    Some(answer)
}

/// A public key of P-256 as a JSON Web Key (RFC 7518 §6.2.1): its DER ends with the point, uncompressed.
fn key(pem: &str) -> Option<Value> {
    let text: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    let der = STANDARD.decode(text.trim()).ok()?;
    let point = der.len().checked_sub(2 * COORDINATE + 1).map(|at| &der[at..])?;
    let (x, y) = point.strip_prefix(&[4])?.split_at(COORDINATE);
    Some(json!({
        "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig",
        "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_valid_by_the_published_key() {
        let folder = tempfile::tempdir().expect("a folder");
        let loopback = [std::net::Ipv4Addr::LOCALHOST.into()];
        let pki = orch_pki::ClusterPki::ensure(folder.path(), &loopback, &[]).expect("keys");
        let pem = pki.read("sa.key").expect("the key");
        let public = orch_pki::public_key_pem(&pem).expect("its public half");
        let jwk = key(&public).expect("a key");
        let encoding =
            jsonwebtoken::EncodingKey::from_ec_pem(pem.as_bytes()).expect("a signing key");
        let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
        let claims = json!({ "sub": "a", "exp": 4_000_000_000_u64 });
        let token = jsonwebtoken::encode(&header, &claims, &encoding).expect("a token");
        let text = |name: &str| jwk[name].as_str().unwrap_or_default().to_owned();
        let decoding = jsonwebtoken::DecodingKey::from_ec_components(&text("x"), &text("y"));
        let mut rules = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::ES256);
        rules.validate_aud = false;
        let read = jsonwebtoken::decode::<Value>(&token, &decoding.expect("a key"), &rules);
        assert_eq!(read.expect("valid").claims["sub"], "a");
        assert_eq!(key("nonsense"), None);
    }
}
