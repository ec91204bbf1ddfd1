//! Objects that every cluster has: made at start, put right when they differ.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Service};
use orch_api::k8s_openapi;
use orch_client::{Api, Client, Error, Patch};
use serde_json::{Value, json};

use crate::admission::SYSTEM_NAMESPACES;

/// Waits between two attempts.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// What `kubectl describe` says of the cluster's DNS, whose endpoint is no pod.
const DNS_NOTE: (&str, &str) = (
    "kubernetes.io/description",
    "Every node answers at this address itself; there are no DNS pods.",
);

/// What the objects are made from.
pub(crate) struct Wanted {
    pub(crate) advertise: IpAddr,
    pub(crate) port: u16,
    pub(crate) kubernetes_ip: std::net::Ipv4Addr,
    pub(crate) dns_ip: std::net::Ipv4Addr,
}

/// Makes them, trying until it works.
pub(crate) async fn run(client: Client, wanted: Wanted) {
    let mut pause = RETRY.0;
    while let Err(error) = all(&client, &wanted).await {
        tracing::warn!(%error, retry_in = ?pause, "the cluster's own objects cannot be made yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn all(client: &Client, wanted: &Wanted) -> Result<(), Error> {
    for name in SYSTEM_NAMESPACES {
        create::<Namespace>(Api::all(client.clone()), &json!({ "metadata": { "name": name } }))
            .await?;
    }
    create::<Service>(Api::namespaced(client.clone(), "default"), &json!({
        "metadata": { "name": "kubernetes", "labels": { "component": "apiserver", "provider": "kubernetes" } },
        "spec": { "type": "ClusterIP", "clusterIP": wanted.kubernetes_ip,
                  "ports": [{ "name": "https", "port": 443, "protocol": "TCP", "targetPort": wanted.port }] },
    }))
    .await?;
    // Answered by the DNS of each node, at this very address: it is the endpoint too.
    create::<Service>(Api::namespaced(client.clone(), "kube-system"), &json!({
        "metadata": { "name": "kube-dns", "annotations": { (DNS_NOTE.0): DNS_NOTE.1 },
                      "labels": { "k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true",
                                  "kubernetes.io/name": "CoreDNS" } },
        "spec": { "type": "ClusterIP", "clusterIP": wanted.dns_ip,
                  "ports": [{ "name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53 },
                            { "name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53 }] },
    }))
    .await?;
    create::<k8s_openapi::api::core::v1::Endpoints>(Api::namespaced(client.clone(), "kube-system"), &json!({
        "metadata": { "name": "kube-dns", "labels": { "k8s-app": "kube-dns" }, "annotations": { (DNS_NOTE.0): DNS_NOTE.1 } },
        "subsets": [{ "addresses": [{ "ip": wanted.dns_ip }],
                      "ports": [{ "name": "dns", "port": 53, "protocol": "UDP" },
                                { "name": "dns-tcp", "port": 53, "protocol": "TCP" }] }],
    }))
    .await?;
    if wanted.advertise.is_loopback() || wanted.advertise.is_unspecified() {
        tracing::warn!(address = %wanted.advertise, "pods cannot reach this address: the Service \"kubernetes\" stays without endpoints");
        return Ok(());
    }
    endpoints(client, wanted).await
}

async fn create<K: orch_client::Kind>(api: Api<K>, object: &Value) -> Result<(), Error> {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    if api.get_opt(name).await?.is_some() {
        return Ok(());
    }
    let typed: K = serde_json::from_value(object.clone()).map_err(|source| Error::Decode {
        request: format!("the built-in object {name}"),
        source,
    })?;
    match api.create(&typed).await {
        Err(error) if error.is_already_exists() => Ok(()),
        other => other.map(|_| ()),
    }
}

/// The endpoints of `default/kubernetes`: this server.
async fn endpoints(client: &Client, wanted: &Wanted) -> Result<(), Error> {
    use k8s_openapi::api::core::v1::Endpoints;
    use k8s_openapi::api::discovery::v1::EndpointSlice;
    let subsets = json!([{ "addresses": [{ "ip": wanted.advertise }],
                           "ports": [{ "name": "https", "port": wanted.port, "protocol": "TCP" }] }]);
    let api = Api::<Endpoints>::namespaced(client.clone(), "default");
    create(api.clone(), &json!({ "metadata": { "name": "kubernetes", "labels": { "endpointslice.kubernetes.io/skip-mirror": "true" } },
                                 "subsets": subsets })).await?;
    api.patch("kubernetes", &Patch::Merge(json!({ "subsets": subsets }))).await?;
    let family = if wanted.advertise.is_ipv4() { "IPv4" } else { "IPv6" };
    let slice = json!({
        "metadata": { "name": "kubernetes", "labels": { "kubernetes.io/service-name": "kubernetes" } },
        "addressType": family,
        "endpoints": [{ "addresses": [wanted.advertise], "conditions": { "ready": true } }],
        "ports": [{ "name": "https", "port": wanted.port, "protocol": "TCP" }],
    });
    let api = Api::<EndpointSlice>::namespaced(client.clone(), "default");
    create(api.clone(), &slice).await?;
    api.patch(
        "kubernetes",
        &Patch::Merge(json!({ "endpoints": slice["endpoints"], "ports": slice["ports"] })),
    )
    .await?;
    Ok(())
}
