//! ServiceAccount tokens for projected volumes, by TokenRequest, renewed at 80 % of their life.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use orch_api::k8s_openapi::api::core::v1::{Pod, ServiceAccount, ServiceAccountTokenProjection};
use orch_client::{Api, Client};
use serde_json::{Value, json};

use crate::api;

/// Life of a token unless the pod says otherwise.
const DEFAULT_SECONDS: i64 = 3600;

struct Held {
    token: String,
    renew_at: Timestamp,
}

/// The tokens of one pod, by audience and life.
#[derive(Default)]
pub(crate) struct Tokens {
    held: BTreeMap<(String, i64), Held>,
}

fn key(source: &ServiceAccountTokenProjection) -> (String, i64) {
    (
        source.audience.clone().unwrap_or_default(),
        source.expiration_seconds.unwrap_or(DEFAULT_SECONDS),
    )
}

fn wanted(pod: &Pod) -> impl Iterator<Item = &ServiceAccountTokenProjection> {
    pod.spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten())
        .flat_map(|volume| {
            volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten())
        })
        .filter_map(|source| source.service_account_token.as_ref())
}

impl Tokens {
    /// # Errors
    /// There is none, because the last request failed.
    pub(crate) fn get(&self, source: &ServiceAccountTokenProjection) -> Result<String, String> {
        self.held
            .get(&key(source))
            .map(|held| held.token.clone())
            .ok_or_else(|| "no token for the ServiceAccount yet".to_owned())
    }

    /// Gets the tokens that are missing or due. A token that cannot be renewed is kept.
    ///
    /// # Errors
    /// A missing token cannot be had; the text is for an event.
    pub(crate) async fn ensure(&mut self, client: &Client, pod: &Pod) -> Result<(), String> {
        let mut due: Vec<(String, i64)> = wanted(pod).map(key).collect();
        due.retain(|key| self.held.get(key).is_none_or(|held| held.renew_at <= Timestamp::now()));
        due.dedup();
        for key in due {
            match request(client, pod, &key).await {
                Ok(held) => {
                    self.held.insert(key, held);
                }
                Err(error) if self.held.contains_key(&key) => {
                    tracing::warn!(error, "token not renewed yet")
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

async fn request(
    client: &Client,
    pod: &Pod,
    (audience, seconds): &(String, i64),
) -> Result<Held, String> {
    let spec = api::spec(pod);
    let account = spec.service_account_name.unwrap_or_else(|| "default".to_owned());
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let audiences: Vec<&str> =
        Some(audience.as_str()).filter(|audience| !audience.is_empty()).into_iter().collect();
    let body = json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {
            "audiences": audiences,
            "expirationSeconds": seconds,
            "boundObjectRef": {
                "apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid,
            },
        },
    });
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
    let answer: Value =
        accounts.create_subresource(&account, "token", &body).await.map_err(|error| {
            format!("failed to fetch token for ServiceAccount {namespace}/{account}: {error}")
        })?;
    let token = answer["status"]["token"].as_str().unwrap_or_default().to_owned();
    if token.is_empty() {
        return Err(format!(
            "the API server answered without a token for ServiceAccount {namespace}/{account}"
        ));
    }
    let now = Timestamp::now();
    let expires = answer["status"]["expirationTimestamp"]
        .as_str()
        .and_then(|text| text.parse::<Timestamp>().ok());
    let life = expires.map_or(*seconds, |expires| expires.as_second() - now.as_second());
    Ok(Held { token, renew_at: now + SignedDuration::from_secs((life * 8 / 10).max(1)) })
}
