//! What all controllers share: the client and the caches.

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, ObjectReference, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orch_client::{Api, Client, Kind, ListParams};
use orch_reconcile::{EventRecorder, Informer, Informers};
use tokio_util::sync::CancellationToken;

use crate::Options;

/// The ConfigMap that every namespace has.
pub(crate) const ROOT_CA: &str = "kube-root-ca.crt";
/// Where nodes keep their Leases.
pub(crate) const NODE_LEASES: &str = "kube-node-lease";

pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) options: Options,
    pub(crate) informers: Informers,
    pub(crate) namespaces: Informer<Namespace>,
    pub(crate) accounts: Informer<ServiceAccount>,
    /// Only those named [`ROOT_CA`].
    pub(crate) root_cas: Informer<ConfigMap>,
    pub(crate) deployments: Informer<Deployment>,
    pub(crate) replica_sets: Informer<ReplicaSet>,
    pub(crate) pods: Informer<Pod>,
    pub(crate) services: Informer<Service>,
    pub(crate) slices: Informer<EndpointSlice>,
    pub(crate) endpoints: Informer<Endpoints>,
    pub(crate) nodes: Informer<Node>,
    /// Only those of nodes.
    pub(crate) node_leases: Informer<Lease>,
}

impl Context {
    pub(crate) fn new(client: Client, options: Options, cancel: &CancellationToken) -> Self {
        let informers = Informers::new(client.clone(), cancel.clone());
        let fields = |selector: String| ListParams {
            field_selector: Some(selector),
            ..ListParams::default()
        };
        Self {
            namespaces: informers.of(),
            accounts: informers.of(),
            root_cas: informers.selected(&fields(format!("metadata.name={ROOT_CA}"))),
            deployments: informers.of(),
            replica_sets: informers.of(),
            pods: informers.of(),
            services: informers.of(),
            slices: informers.of(),
            endpoints: informers.of(),
            nodes: informers.of(),
            node_leases: informers.selected(&fields(format!("metadata.namespace={NODE_LEASES}"))),
            client,
            options,
            informers,
        }
    }

    pub(crate) async fn synced(&self) {
        tokio::join!(
            self.namespaces.synced(),
            self.accounts.synced(),
            self.root_cas.synced(),
            self.deployments.synced(),
            self.replica_sets.synced(),
            self.pods.synced(),
            self.services.synced(),
            self.slices.synced(),
            self.endpoints.synced(),
            self.nodes.synced(),
            self.node_leases.synced(),
        );
    }

    /// The kind's objects in one namespace; of a kind without namespaces, all.
    pub(crate) fn api<K: Kind>(&self, namespace: &str) -> Api<K> {
        if namespace.is_empty() {
            Api::all(self.client.clone())
        } else {
            Api::namespaced(self.client.clone(), namespace)
        }
    }

    pub(crate) fn recorder(&self, component: &str) -> EventRecorder {
        EventRecorder::new(self.client.clone(), component, "")
    }
}

/// An object as the subject of an event.
pub(crate) fn reference<K: Kind>(object: &K) -> ObjectReference {
    let meta = object.metadata();
    ObjectReference {
        api_version: Some(K::API_VERSION.to_owned()),
        kind: Some(K::KIND.to_owned()),
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        field_path: None,
    }
}

pub(crate) fn name(meta: &ObjectMeta) -> &str {
    meta.name.as_deref().unwrap_or_default()
}

pub(crate) fn namespace(meta: &ObjectMeta) -> &str {
    meta.namespace.as_deref().unwrap_or_default()
}

pub(crate) fn uid(meta: &ObjectMeta) -> &str {
    meta.uid.as_deref().unwrap_or_default()
}
