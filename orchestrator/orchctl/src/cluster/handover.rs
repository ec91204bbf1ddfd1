//! Handing the authorities' keys to a further control plane: through the cluster, encrypted with a key that only the
//! join command carries (as kubeadm's `--upload-certs`).
//!
//! Each token that makes control planes has a Secret of its own with the keys, sealed for it alone, and a role with which
//! nobody but its bearer reads that. The token owns them: when it ends or is deleted, they go too, whatever other tokens
//! there are.

use std::io::Read as _;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use orch_api::bootstrap_token::{SINGLE_USE, USER_PREFIX, handover_name, secret_name};
use orch_client::Client;
use orch_pki::SHARED_FILES;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde_json::{Value, json};

use super::host::Host;
use super::token::SECRETS;
use crate::kube::wire;
use crate::output;

const ROLES: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system";
const RBAC: &str = "rbac.authorization.k8s.io";
/// By then every server knows what was handed over.
const SETTLED: Duration = Duration::from_secs(3);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(250);

fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(bytes)
}

fn cipher(key: &[u8]) -> anyhow::Result<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, key)
        .map(LessSafeKey::new)
        .map_err(|_| output::usage("--certificate-key has to be 64 hexadecimal digits"))
}

/// Nonce and cipher text; `name` is bound to it, so that files cannot be exchanged.
fn seal(key: &[u8], name: &str, text: &[u8]) -> anyhow::Result<Vec<u8>> {
    let nonce: [u8; NONCE_LEN] = random()?;
    let mut data = text.to_vec();
    cipher(key)?
        .seal_in_place_append_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(name.as_bytes()),
            &mut data,
        )
        .map_err(|_| anyhow::anyhow!("encrypt {name}"))?;
    Ok([nonce.as_slice(), &data].concat())
}

fn unseal(key: &[u8], name: &str, sealed: &[u8]) -> anyhow::Result<Vec<u8>> {
    let wrong = || {
        output::hinted(
            "take the whole command that `orchctl token create --control-plane` printed",
            format!("--certificate-key does not open {name}"),
        )
    };
    if sealed.len() < NONCE_LEN {
        return Err(wrong());
    }
    let (nonce, data) = sealed.split_at(NONCE_LEN);
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| wrong())?;
    let mut data = data.to_vec();
    let text = cipher(key)?
        .open_in_place(nonce, Aad::from(name.as_bytes()), &mut data)
        .map_err(|_| wrong())?;
    Ok(text.to_vec())
}

/// The files with the keys of this control plane, by name.
pub(super) fn read(host: &Host) -> anyhow::Result<Vec<(&'static str, Vec<u8>)>> {
    let file = |name: &'static str| {
        let path = host.paths.pki().join(name);
        let text = std::fs::read(&path).map_err(|error| {
            output::hinted(
                "run this on a control plane, as root",
                format!("read {}: {error}", path.display()),
            )
        })?;
        Ok((name, text))
    };
    SHARED_FILES.into_iter().map(file).collect()
}

/// Puts them into the cluster for the bearer of the token `id`, whose Secret has the UID `uid`; returns the key that opens
/// them.
pub(super) async fn upload(
    client: &Client,
    files: &[(&'static str, Vec<u8>)],
    id: &str,
    uid: &str,
) -> anyhow::Result<String> {
    let key: [u8; 32] = random()?;
    let mut data = json!({});
    for (name, text) in files {
        data[*name] =
            json!(base64::engine::general_purpose::STANDARD.encode(seal(&key, name, text)?));
    }
    for (path, object) in objects(id, uid, &data) {
        wire::send(client, http::Method::POST, &path, wire::JSON, &object)
            .await
            .context("hand over the authorities' keys")?;
    }
    Ok(key.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What is handed over, and the right to read it: where each object is created, and the object.
fn objects(id: &str, uid: &str, data: &Value) -> [(String, Value); 3] {
    let name = handover_name(id);
    let meta = json!({ "name": name, "namespace": "kube-system", "ownerReferences": [
        { "apiVersion": "v1", "kind": "Secret", "name": secret_name(id), "uid": uid },
    ] });
    [
        (
            SECRETS.to_owned(),
            json!({ "apiVersion": "v1", "kind": "Secret", "type": "orch.dev/certs", "metadata": meta, "data": data }),
        ),
        (
            format!("{ROLES}/roles"),
            json!({ "apiVersion": format!("{RBAC}/v1"), "kind": "Role", "metadata": meta, "rules": [
                { "verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": [name] } ] }),
        ),
        (
            format!("{ROLES}/rolebindings"),
            json!({ "apiVersion": format!("{RBAC}/v1"), "kind": "RoleBinding", "metadata": meta,
                    "roleRef": { "apiGroup": RBAC, "kind": "Role", "name": name },
                    "subjects": [{ "apiGroup": RBAC, "kind": "User", "name": format!("{USER_PREFIX}{id}") }] }),
        ),
    ]
}

/// The keys that [`upload`] put into the cluster for the token `id`: names and contents.
pub(super) async fn download(
    client: &Client,
    id: &str,
    key: &str,
) -> anyhow::Result<Vec<(&'static str, String)>> {
    let bytes: Option<Vec<u8>> = (0..key.len() / 2)
        .map(|at| u8::from_str_radix(key.get(2 * at..2 * at + 2)?, 16).ok())
        .collect();
    let key = bytes
        .filter(|bytes| bytes.len() == 32 && key.len() == 64)
        .ok_or_else(|| output::usage("--certificate-key has to be 64 hexadecimal digits"))?;
    let path = format!("{SECRETS}/{}", wire::encode(&handover_name(id)));
    let code = |error: &anyhow::Error| match error.downcast_ref::<orch_client::Error>() {
        Some(orch_client::Error::Api { code, .. }) => Some(*code),
        _ => None,
    };
    let deadline = tokio::time::Instant::now() + SETTLED;
    let found = loop {
        let found = wire::get_opt(client, &path).await;
        // Another server may not know the role yet.
        let refused = found.as_ref().is_err_and(|error| code(error) == Some(403));
        if !refused || tokio::time::Instant::now() > deadline {
            break found;
        }
        tokio::time::sleep(RETRY).await;
    };
    match found {
        Ok(Some(secret)) => opened(&secret, &key),
        Err(error) if code(&error) == Some(401) => Err(output::hinted(
            "tokens that make control planes end after two hours: `orchctl token create --control-plane` on a control plane \
             makes another",
            "the cluster does not know this token, or it has ended or was used up",
        )),
        // Without keys there is no role for them either: a token for workers.
        Err(error) if code(&error) == Some(403) => Err(not_handed_over()),
        Err(error) => Err(error),
        Ok(None) => Err(not_handed_over()),
    }
}

fn not_handed_over() -> anyhow::Error {
    output::hinted(
        "run `orchctl token create --control-plane` on a control plane and use what it prints",
        "no authorities' keys were handed over for this token",
    )
}

/// Uses the token `id` up, if it is good for one host. Of two hosts that come with it one succeeds: the cluster deletes
/// it once.
pub(super) async fn use_up(admin: &Client, id: &str) -> anyhow::Result<()> {
    let late = || {
        output::hinted(
            "`orchctl token create --control-plane` on a control plane makes another",
            "the token has ended, or was good for one host and another has joined with it",
        )
    };
    let path = format!("{SECRETS}/{}", wire::encode(&secret_name(id)));
    let Some(token) = wire::get_opt(admin, &path).await? else { return Err(late()) };
    if token["metadata"]["annotations"][SINGLE_USE] != "true" {
        return Ok(());
    }
    let options = json!({ "preconditions": { "uid": token["metadata"]["uid"] } });
    let deleted = wire::send(admin, http::Method::DELETE, &path, wire::JSON, &options).await;
    deleted.map(drop).map_err(|error| match error.downcast_ref::<orch_client::Error>() {
        Some(gone) if gone.is_not_found() || gone.is_conflict() => late(),
        _ => error,
    })
}

fn opened(secret: &Value, key: &[u8]) -> anyhow::Result<Vec<(&'static str, String)>> {
    SHARED_FILES
        .into_iter()
        .map(|name| {
            let sealed = secret["data"][name]
                .as_str()
                .and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok())
                .with_context(|| format!("{name} was not handed over"))?;
            let text = String::from_utf8(unseal(key, name, &sealed)?)
                .with_context(|| format!("{name} is no text"))?;
            Ok((name, text))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_key_opens_and_only_under_the_right_name() {
        let key: [u8; 32] = random().expect("random");
        let sealed = seal(&key, "ca.key", b"secret").expect("sealed");
        assert_eq!(unseal(&key, "ca.key", &sealed).expect("opened"), b"secret");
        assert!(unseal(&key, "sa.key", &sealed).is_err(), "another name");
        let mut other = key;
        other[0] ^= 1;
        assert!(unseal(&other, "ca.key", &sealed).is_err(), "another key");
        let mut changed = sealed.clone();
        changed[NONCE_LEN] ^= 1;
        assert!(unseal(&key, "ca.key", &changed).is_err(), "changed on the way");
        assert!(unseal(&key, "ca.key", &sealed[..5]).is_err());
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
    }
    #[test]
    fn each_token_opens_its_own_and_owns_it() {
        let objects = |id: &str| objects(id, "uid", &json!({}));
        for (path, object) in objects("abcdef") {
            assert!(path.starts_with('/'), "{path}");
            let meta = &object["metadata"];
            assert_eq!(meta["name"], "orch-certs-abcdef");
            assert_eq!(meta["ownerReferences"][0]["name"], "bootstrap-token-abcdef");
            assert_eq!(meta["ownerReferences"][0]["uid"], "uid");
        }
        let [_, (_, role), (_, binding)] = objects("abcdef");
        assert_eq!(role["rules"][0]["resourceNames"], json!(["orch-certs-abcdef"]));
        assert_eq!(binding["subjects"][0]["name"], "system:bootstrap:abcdef");
        assert_ne!(objects("abcdef"), objects("fedcba"));
    }
}
