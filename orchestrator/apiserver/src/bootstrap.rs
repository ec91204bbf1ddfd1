//! Objects that every cluster has: made at start, put right when they differ.

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use orch_api::{k8s_openapi, priority};
use orch_client::{Api, Client, Error};
use serde_json::{Value, json};

use crate::admission::SYSTEM_NAMESPACES;
use crate::authz;

/// Waits between two attempts.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(2));

/// What `kubectl describe` says of the cluster's DNS, whose endpoint is no pod.
const DNS_NOTE: (&str, &str) = (
    "kubernetes.io/description",
    "Every node answers at this address itself; there are no DNS pods.",
);

/// What the objects are made from.
pub(crate) struct Wanted {
    pub(crate) port: u16,
    pub(crate) kubernetes_ip: std::net::Ipv4Addr,
    pub(crate) dns_ip: std::net::Ipv4Addr,
    pub(crate) dns_ip_v6: Option<std::net::Ipv6Addr>,
}

/// Makes them, trying until it works; `has_roles` is called when the default roles are there.
pub(crate) async fn run(client: &Client, wanted: &Wanted, has_roles: impl AsyncFnOnce()) {
    until_done("the default namespaces and roles", || roles(client)).await;
    has_roles().await;
    until_done("the cluster's own Services", || services(client, wanted)).await;
}

async fn until_done<F: Future<Output = Result<(), Error>>>(what: &str, make: impl Fn() -> F) {
    let mut pause = RETRY.0;
    while let Err(error) = make().await {
        tracing::warn!(%error, retry_in = ?pause, "{what} cannot be made yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn roles(client: &Client) -> Result<(), Error> {
    for name in SYSTEM_NAMESPACES {
        create::<Namespace>(Api::all(client.clone()), &json!({ "metadata": { "name": name } }))
            .await?;
    }
    for (name, value, description) in priority::SYSTEM_CLASSES {
        create::<PriorityClass>(
            Api::all(client.clone()),
            &json!({ "metadata": { "name": name }, "value": value, "description": description }),
        )
        .await?;
    }
    authz::reconcile(client).await
}

async fn services(client: &Client, wanted: &Wanted) -> Result<(), Error> {
    create::<Service>(Api::namespaced(client.clone(), "default"), &json!({
        "metadata": { "name": "kubernetes", "labels": { "component": "apiserver", "provider": "kubernetes" } },
        "spec": { "type": "ClusterIP", "clusterIP": wanted.kubernetes_ip,
                  "ports": [{ "name": "https", "port": 443, "protocol": "TCP", "targetPort": wanted.port }] },
    }))
    .await?;
    let dns_ips: Vec<String> = [wanted.dns_ip.to_string()]
        .into_iter()
        .chain(wanted.dns_ip_v6.map(|ip| ip.to_string()))
        .collect();
    // Answered by the DNS of each node, at these very addresses: they are the endpoints too.
    create::<Service>(Api::namespaced(client.clone(), "kube-system"), &json!({
        "metadata": { "name": "kube-dns", "annotations": { (DNS_NOTE.0): DNS_NOTE.1 },
                      "labels": { "k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true",
                                  "kubernetes.io/name": "CoreDNS" } },
        "spec": { "type": "ClusterIP", "clusterIP": wanted.dns_ip, "clusterIPs": dns_ips,
                  "ipFamilyPolicy": "PreferDualStack",
                  "ports": [{ "name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53 },
                            { "name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53 }] },
    }))
    .await?;
    create::<k8s_openapi::api::core::v1::Endpoints>(Api::namespaced(client.clone(), "kube-system"), &json!({
        "metadata": { "name": "kube-dns", "labels": { "k8s-app": "kube-dns" }, "annotations": { (DNS_NOTE.0): DNS_NOTE.1 } },
        "subsets": [{ "addresses": dns_ips.iter().map(|ip| json!({ "ip": ip })).collect::<Vec<_>>(),
                      "ports": [{ "name": "dns", "port": 53, "protocol": "UDP" },
                                { "name": "dns-tcp", "port": 53, "protocol": "TCP" }] }],
    }))
    .await
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
