//! Handing the authorities' keys to a further control plane: through the cluster, encrypted with a key that only the
//! join command carries (as kubeadm's `--upload-certs`).

use std::io::Read as _;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use jiff::Timestamp;
use orch_client::Client;
use orch_pki::SHARED_FILES;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde_json::{Value, json};

use super::host::Host;
use crate::kube::wire;
use crate::output;

const SECRETS: &str = "/api/v1/namespaces/kube-system/secrets";
/// The Secret; the bearer of a bootstrap token may read it, and can do nothing with it without the key.
const NAME: &str = "orch-certs";
/// How long it lies there.
const LIFETIME_SECS: i64 = 2 * 3600;

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
            "take the whole command that `orchctl token create --control-plane` printed last",
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

/// Puts the keys of this control plane into the cluster; returns the key that opens them.
pub(super) async fn upload(client: &Client, host: &Host) -> anyhow::Result<String> {
    let key: [u8; 32] = random()?;
    let mut data = json!({});
    for name in SHARED_FILES {
        let path = host.paths.pki().join(name);
        let text = std::fs::read(&path).map_err(|error| {
            output::hinted(
                "run this on a control plane, as root",
                format!("read {}: {error}", path.display()),
            )
        })?;
        data[name] =
            json!(base64::engine::general_purpose::STANDARD.encode(seal(&key, name, &text)?));
    }
    let until = Timestamp::now() + jiff::SignedDuration::from_secs(LIFETIME_SECS);
    let object = json!({ "apiVersion": "v1", "kind": "Secret", "type": "orch.dev/certs", "data": data,
                         "metadata": { "name": NAME, "namespace": "kube-system",
                                       "annotations": { "orch.dev/until": until.to_string() } } });
    let path = format!("{SECRETS}/{NAME}");
    if wire::get_opt(client, &path).await?.is_some() {
        wire::send(client, http::Method::DELETE, &path, wire::JSON, &json!({})).await?;
    }
    wire::send(client, http::Method::POST, SECRETS, wire::JSON, &object)
        .await
        .context("hand over the authorities' keys")?;
    Ok(key.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The keys that [`upload`] put into the cluster: names and contents.
pub(super) async fn download(client: &Client, key: &str) -> anyhow::Result<Vec<(String, String)>> {
    let bytes: Option<Vec<u8>> = (0..key.len() / 2)
        .map(|at| u8::from_str_radix(key.get(2 * at..2 * at + 2)?, 16).ok())
        .collect();
    let key = bytes
        .filter(|bytes| bytes.len() == 32 && key.len() == 64)
        .ok_or_else(|| output::usage("--certificate-key has to be 64 hexadecimal digits"))?;
    let Some(secret) = wire::get_opt(client, &format!("{SECRETS}/{NAME}")).await? else {
        return Err(output::hinted(
            "run `orchctl token create --control-plane` on a control plane and use what it prints",
            "the authorities' keys were not handed over",
        ));
    };
    opened(&secret, &key, Timestamp::now())
}

fn opened(secret: &Value, key: &[u8], now: Timestamp) -> anyhow::Result<Vec<(String, String)>> {
    let until = secret["metadata"]["annotations"]["orch.dev/until"].as_str().unwrap_or_default();
    if until.parse::<Timestamp>().is_ok_and(|until| until < now) {
        bail!("the handed-over keys are too old: run `orchctl token create --control-plane` again");
    }
    SHARED_FILES
        .iter()
        .map(|name| {
            let sealed = secret["data"][*name]
                .as_str()
                .and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok())
                .with_context(|| format!("{name} was not handed over"))?;
            let text = String::from_utf8(unseal(key, name, &sealed)?)
                .with_context(|| format!("{name} is no text"))?;
            Ok(((*name).to_owned(), text))
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
}
