//! Endpoints of `default/kubernetes`: the servers that live (upstream's lease reconciler, `pkg/controlplane/reconcilers`).
//!
//! Each server keeps a key in the store that goes away by itself, and makes the objects name exactly those who have one. So
//! a server that died is gone from them within [`LIFE`] and [`EVERY`], whoever is left writes that down, and agents learn of
//! servers that came later.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use k8s_openapi::api::core::v1::Endpoints;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use orch_api::k8s_openapi;
use orch_client::{Api, Client, ListParams, Patch};
use orch_store::{Store, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::{info, warn};

/// Keys of the living, upstream's prefix.
const LEASES: &str = "/registry/masterleases/";
/// A key lives for this long. A new leader of etcd gives all keys their whole life again, so its election costs nobody his.
/// Clients in pods may be sent to a dead server for the sum of both.
const LIFE: Duration = Duration::from_secs(6);
/// Between two renewals; three fit into a life.
const EVERY: Duration = Duration::from_secs(2);
/// How long the goodbye may take.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);
/// The Service, its Endpoints and its first slice.
const NAME: &str = "kubernetes";
/// Marks the slices of a Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// Where pods and agents reach a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Server {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
}

impl Server {
    fn key(&self) -> String {
        format!("{LEASES}{}", self.address)
    }
}

/// Why the objects are not as they should be.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("keep this server's key: {0}")]
    Store(#[from] StoreError),
    #[error("write the endpoints of default/kubernetes: {0}")]
    Write(#[from] orch_client::Error),
    #[error("encode: {0}")]
    Encode(#[from] serde_json::Error),
}

/// Keeps this server among the endpoints, and the dead out of them, until dropped.
pub(crate) async fn run(store: Arc<dyn Store>, client: Client, own: Server) {
    loop {
        if let Err(error) = reconcile(&*store, &client, own).await {
            warn!(%error, "the endpoints of default/kubernetes are not renewed");
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Takes this server out at its end; the others write the endpoints. The last one stays in them.
pub(crate) async fn leave(store: &dyn Store, own: Server) {
    let goodbye = async {
        if let (Some(found), _) = store.get(&own.key()).await? {
            store.delete(&found.key, found.mod_revision).await?;
        }
        Ok::<_, StoreError>(())
    };
    match tokio::time::timeout(LEAVE_LIMIT, goodbye).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => info!(%error, "the endpoints name this server a while longer"),
        Err(_) => info!("the endpoints name this server a while longer: etcd does not answer"),
    }
}

async fn reconcile(store: &dyn Store, client: &Client, own: Server) -> Result<(), Error> {
    renew(store, own).await?;
    let mut living = BTreeSet::from([own]);
    for found in store.list(LEASES, None, 0, None).await?.items {
        match serde_json::from_slice(&found.value) {
            Ok(server) => living.insert(server),
            // Another version's; its own server writes it anew.
            Err(error) => {
                warn!(key = found.key, %error, "not a server");
                continue;
            }
        };
    }
    write(client, &living).await
}

async fn renew(store: &dyn Store, own: Server) -> Result<(), Error> {
    let value = Bytes::from(serde_json::to_vec(&own)?);
    match store.get(&own.key()).await?.0 {
        Some(found) => store.update(&own.key(), value, found.mod_revision, Some(LIFE)).await?,
        None => store.create(&own.key(), value, Some(LIFE)).await?,
    };
    Ok(())
}

async fn write(client: &Client, living: &BTreeSet<Server>) -> Result<(), Error> {
    let api = Api::<Endpoints>::namespaced(client.clone(), "default");
    match api.get_opt(NAME).await? {
        Some(found) if endpoints_name(&found) == *living => {}
        Some(found) => {
            let patch = json!({ "metadata": { "resourceVersion": found.metadata.resource_version },
                                "subsets": subsets(living) });
            quicker(api.patch(NAME, &Patch::Merge(patch))).await?;
        }
        None => {
            let object = json!({
                "metadata": { "name": NAME, "labels": { "endpointslice.kubernetes.io/skip-mirror": "true" } },
                "subsets": subsets(living),
            });
            let object = serde_json::from_value(object)?;
            quicker(api.create(&object)).await?;
        }
    }
    let api = Api::<EndpointSlice>::namespaced(client.clone(), "default");
    let selector = format!("{SERVICE_LABEL}={NAME}");
    let params = ListParams { label_selector: Some(selector), ..ListParams::default() };
    let found = api.list(&params).await?.items;
    let wanted = slices(living);
    for (name, slice) in &wanted {
        let before = found.iter().find(|one| one.metadata.name.as_ref() == Some(name));
        match before {
            Some(before) if slice_names(before) == slice_names(slice) => {}
            Some(before) => {
                let patch = json!({ "metadata": { "resourceVersion": before.metadata.resource_version },
                                    "endpoints": slice.endpoints, "ports": slice.ports });
                quicker(api.patch(name, &Patch::Merge(patch))).await?;
            }
            None => quicker(api.create(slice)).await?,
        }
    }
    for name in found.iter().filter_map(|one| one.metadata.name.as_ref()) {
        if !wanted.contains_key(name) {
            match api.delete(name, &orch_client::DeleteParams::default()).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Another server wrote first: what it wrote is looked at the next time.
async fn quicker<T>(
    change: impl Future<Output = Result<T, orch_client::Error>>,
) -> Result<(), orch_client::Error> {
    match change.await {
        Err(error) if error.is_conflict() || error.is_already_exists() => Ok(()),
        outcome => outcome.map(drop),
    }
}

/// The servers by port.
fn by_port(living: &BTreeSet<Server>) -> BTreeMap<u16, Vec<IpAddr>> {
    let mut ports: BTreeMap<u16, Vec<IpAddr>> = BTreeMap::new();
    for server in living {
        ports.entry(server.port).or_default().push(server.address);
    }
    ports
}

fn subsets(living: &BTreeSet<Server>) -> Value {
    by_port(living)
        .into_iter()
        .map(|(port, addresses)| {
            let addresses: Vec<Value> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
            json!({ "addresses": addresses, "ports": [{ "name": "https", "port": port, "protocol": "TCP" }] })
        })
        .collect()
}

/// One slice per port and family, the first one with upstream's name.
fn slices(living: &BTreeSet<Server>) -> BTreeMap<String, EndpointSlice> {
    let mut slices = BTreeMap::new();
    for (port, addresses) in by_port(living) {
        for family in ["IPv4", "IPv6"] {
            let endpoints: Vec<Value> = addresses
                .iter()
                .filter(|ip| ip.is_ipv4() == (family == "IPv4"))
                .map(|ip| json!({ "addresses": [ip], "conditions": { "ready": true } }))
                .collect();
            if endpoints.is_empty() {
                continue;
            }
            let name = if slices.is_empty() {
                NAME.to_owned()
            } else {
                format!("{NAME}-{}-{port}", family.to_ascii_lowercase())
            };
            let slice = json!({
                "metadata": { "name": name, "labels": { SERVICE_LABEL: NAME } },
                "addressType": family, "endpoints": endpoints,
                "ports": [{ "name": "https", "port": port, "protocol": "TCP" }],
            });
            let slice = serde_json::from_value(slice).expect("the fields are those of the type");
            slices.insert(name, slice);
        }
    }
    slices
}

fn endpoints_name(object: &Endpoints) -> BTreeSet<Server> {
    let mut found = BTreeSet::new();
    for subset in object.subsets.iter().flatten() {
        for address in subset.addresses.iter().flatten() {
            for port in subset.ports.iter().flatten() {
                found.extend(server(&address.ip, port.port));
            }
        }
    }
    found
}

fn slice_names(object: &EndpointSlice) -> BTreeSet<Server> {
    let mut found = BTreeSet::new();
    for address in object.endpoints.iter().flatten().flat_map(|one| &one.addresses) {
        for port in object.ports.iter().flatten().filter_map(|port| port.port) {
            found.extend(server(address, port));
        }
    }
    found
}

fn server(address: &str, port: i32) -> Option<Server> {
    Some(Server { address: address.parse().ok()?, port: u16::try_from(port).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn living(servers: &[(&str, u16)]) -> BTreeSet<Server> {
        servers
            .iter()
            .map(|(ip, port)| Server { address: ip.parse().expect("an address"), port: *port })
            .collect()
    }

    #[test]
    fn objects_name_exactly_the_living() {
        for servers in [
            living(&[("10.0.0.1", 6443)]),
            living(&[("10.0.0.2", 6443), ("10.0.0.1", 6443)]),
            living(&[("10.0.0.2", 6443), ("10.0.0.1", 7443), ("fd00::1", 6443)]),
        ] {
            let endpoints: Endpoints =
                serde_json::from_value(json!({ "metadata": {}, "subsets": subsets(&servers) }))
                    .expect("Endpoints");
            assert_eq!(endpoints_name(&endpoints), servers);
            let slices = slices(&servers);
            assert!(slices.contains_key(NAME));
            assert_eq!(slices.values().flat_map(slice_names).collect::<BTreeSet<_>>(), servers);
        }
    }
}
