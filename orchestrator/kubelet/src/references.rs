//! Objects of the API that a pod refers to: ConfigMaps, Secrets, and the Services it sees as variables.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use orch_api::k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service};
use orch_client::{Api, Client, Error, Kind, ListParams};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::api;
use crate::pod::env::References;

/// How long a list of Services serves the starts that follow.
const SERVICES_FRESH: Duration = Duration::from_secs(2);

/// Names of what a pod refers to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Names {
    config_maps: BTreeSet<String>,
    secrets: BTreeSet<String>,
}

fn names(pod: &Pod) -> Names {
    let mut names = Names::default();
    for container in api::all_containers(pod).cloned().chain(api::ephemeral_containers(pod)) {
        for source in container.env_from.iter().flatten() {
            names
                .config_maps
                .extend(source.config_map_ref.iter().map(|wanted| wanted.name.clone()));
            names.secrets.extend(source.secret_ref.iter().map(|wanted| wanted.name.clone()));
        }
        for source in
            container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref())
        {
            names
                .config_maps
                .extend(source.config_map_key_ref.iter().map(|wanted| wanted.name.clone()));
            names.secrets.extend(source.secret_key_ref.iter().map(|wanted| wanted.name.clone()));
        }
    }
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        names.config_maps.extend(volume.config_map.iter().map(|source| source.name.clone()));
        names.secrets.extend(volume.secret.iter().filter_map(|source| source.secret_name.clone()));
        for source in
            volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten())
        {
            names.config_maps.extend(source.config_map.iter().map(|source| source.name.clone()));
            names.secrets.extend(source.secret.iter().map(|source| source.name.clone()));
        }
    }
    names
}

/// Reads all of them. What does not exist is left out: whether that matters is for the reader to say.
///
/// # Errors
/// The API server does not answer, or refuses.
pub(crate) async fn fetch(client: &Client, pod: &Pod) -> Result<References, Error> {
    let names = names(pod);
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let (config_maps, secrets) = tokio::try_join!(
        all::<ConfigMap>(client, namespace, names.config_maps),
        all::<Secret>(client, namespace, names.secrets)
    )?;
    Ok(References { config_maps, secrets })
}

async fn all<K: Kind>(
    client: &Client,
    namespace: &str,
    names: BTreeSet<String>,
) -> Result<BTreeMap<String, K>, Error> {
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let found = futures::future::try_join_all(names.into_iter().map(|name| {
        let api = api.clone();
        async move { api.get_opt(&name).await.map(|found| found.map(|object| (name, object))) }
    }));
    Ok(found.await?.into_iter().flatten().collect())
}

/// Services by namespace, kept for a moment so that many pods starting together ask once.
pub(crate) struct Services {
    client: Client,
    kept: Mutex<BTreeMap<String, (Instant, Vec<Service>)>>,
}

impl Services {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, kept: Mutex::default() }
    }

    /// The namespace's Services and `default/kubernetes`. While the API server is away, the last list serves.
    ///
    /// # Errors
    /// The API server does not answer, or refuses, and there is no earlier list.
    pub(crate) async fn visible(&self, namespace: &str) -> Result<Vec<Service>, Error> {
        let known = self.kept.lock().get(namespace).cloned();
        if let Some((at, known)) = &known
            && at.elapsed() < SERVICES_FRESH
        {
            return Ok(known.clone());
        }
        match (self.read(namespace).await, known) {
            (Ok(all), _) => {
                self.kept.lock().insert(namespace.to_owned(), (Instant::now(), all.clone()));
                Ok(all)
            }
            (Err(error), Some((_, known))) => {
                tracing::warn!(namespace, %error, "the last copy of Services is used");
                Ok(known)
            }
            (Err(error), None) => Err(error),
        }
    }

    async fn read(&self, namespace: &str) -> Result<Vec<Service>, Error> {
        let api = Api::<Service>::namespaced(self.client.clone(), namespace);
        let params = ListParams { resource_version: Some("0".to_owned()), ..ListParams::default() };
        let mut all = api.list(&params).await?.items;
        if namespace != "default" {
            let api = Api::<Service>::namespaced(self.client.clone(), "default");
            all.extend(api.get_opt("kubernetes").await?);
        }
        for service in &mut all {
            // Items of lists carry no namespace in some servers' answers.
            service.metadata.namespace.get_or_insert_with(|| namespace.to_owned());
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_way_to_refer_is_seen() {
        let pod: Pod = serde_json::from_value(json!({ "spec": {
            "containers": [{ "name": "c",
                "envFrom": [{ "configMapRef": { "name": "c1" } }, { "secretRef": { "name": "s1" } }],
                "env": [{ "name": "A", "valueFrom": { "configMapKeyRef": { "name": "c2", "key": "k" } } }],
            }],
            "volumes": [
                { "name": "v1", "configMap": { "name": "c3" } },
                { "name": "v2", "secret": { "secretName": "s2" } },
                { "name": "v3", "projected": { "sources": [{ "configMap": { "name": "c4" } }] } },
            ],
        } }))
        .expect("a pod");
        let found = names(&pod);
        assert_eq!(found.config_maps.into_iter().collect::<Vec<_>>(), ["c1", "c2", "c3", "c4"]);
        assert_eq!(found.secrets.into_iter().collect::<Vec<_>>(), ["s1", "s2"]);
    }
}
