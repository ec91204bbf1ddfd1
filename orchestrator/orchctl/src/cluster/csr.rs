//! Certificates from the cluster, through its API for certificate signing requests.

use std::time::Duration;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use orch_client::Client;
use orch_pki::{Identity, Request};
use serde_json::{Value, json};

use crate::kube::wire;
use crate::output;

const PATH: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
/// How long the cluster may take to sign: a control plane that just started elects first.
const LIMIT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(200);

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signer {
    NodeClient,
    NodeServing,
    EtcdClient,
}

impl Signer {
    fn name(self) -> &'static str {
        match self {
            Self::NodeClient => "kubernetes.io/kube-apiserver-client-kubelet",
            Self::NodeServing => "kubernetes.io/kubelet-serving",
            Self::EtcdClient => "orch.dev/etcd-client",
        }
    }

    fn short(self) -> &'static str {
        match self {
            Self::NodeClient => "client",
            Self::NodeServing => "serving",
            Self::EtcdClient => "etcd",
        }
    }
}

/// Asks for a certificate for `identity` and waits for it: certificate and key, PEM.
///
/// # Errors
/// The cluster refuses, or does not answer in time.
pub(super) async fn obtain(
    client: &Client,
    signer: Signer,
    node: &str,
    identity: &Identity,
) -> anyhow::Result<(String, String)> {
    let what = format!("{} certificate of {node}", signer.short());
    let request = Request::new(identity)?;
    let usage = if signer == Signer::NodeServing { "server auth" } else { "client auth" };
    let object = json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "metadata": { "generateName": format!("{node}-{}-", signer.short()) },
        "spec": {
            "request": base64::engine::general_purpose::STANDARD.encode(&request.request_pem),
            "signerName": signer.name(),
            "usages": ["digital signature", "key encipherment", usage],
        },
    });
    let made = wire::send(client, http::Method::POST, PATH, wire::JSON, &object)
        .await
        .map_err(|error| {
            let unauthorized = error
                .downcast_ref::<orch_client::Error>()
                .is_some_and(|error| matches!(error, orch_client::Error::Api { code: 401, .. }));
            if unauthorized {
                return output::hinted(
                    "tokens end after a day: make one with `orchctl token create` on a control plane",
                    "the cluster does not know this token, or it has expired",
                );
            }
            error
        })
        .with_context(|| format!("ask for the {what}"))?;
    let name = made["metadata"]["name"].as_str().context("the request has no name")?;
    let path = format!("{PATH}/{}", wire::encode(name));
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        let found =
            wire::get(client, &path).await.with_context(|| format!("wait for the {what}"))?;
        if let Some(certificate) = issued(&found)? {
            return Ok((certificate, request.key_pem));
        }
        if let Some(why) = refused(&found) {
            bail!("the cluster refuses the {what}: {why}");
        }
        if tokio::time::Instant::now() > deadline {
            return Err(output::hinted(
                "the controllers of the cluster sign: is a control plane leading? `orchctl status` on it tells",
                format!("the {what} was not signed within {} s", LIMIT.as_secs()),
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn issued(found: &Value) -> anyhow::Result<Option<String>> {
    let Some(text) = found["status"]["certificate"].as_str().filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .context("the certificate is no base64")?;
    Ok(Some(String::from_utf8(bytes).context("the certificate is no PEM")?))
}

fn refused(found: &Value) -> Option<String> {
    let conditions = found["status"]["conditions"].as_array()?;
    let bad = conditions.iter().find(|one| one["type"] == "Denied" || one["type"] == "Failed")?;
    Some(bad["message"].as_str().unwrap_or("no reason is given").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_of_the_cluster_is_read() {
        assert!(issued(&json!({ "status": {} })).expect("none").is_none());
        let done = json!({ "status": { "certificate": "UEVN" } });
        assert_eq!(issued(&done).expect("one").as_deref(), Some("PEM"));
        let denied = json!({ "status": { "conditions": [{ "type": "Denied", "message": "no" }] } });
        assert_eq!(refused(&denied).as_deref(), Some("no"));
        assert!(
            refused(&json!({ "status": { "conditions": [{ "type": "Approved" }] } })).is_none()
        );
    }
}
