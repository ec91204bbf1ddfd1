//! What the API server says, as far as policy looks at it.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use orch_api::cluster_policy::ClusterNetworkPolicy;
use orch_reconcile::{Informer, Informers};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::world::Cluster;

/// The caches that policy is made from.
pub(crate) struct Caches {
    pods: Informer<Pod>,
    namespaces: Informer<Namespace>,
    policies: Informer<NetworkPolicy>,
    cluster_policies: Informer<ClusterNetworkPolicy>,
    nodes: Informer<Node>,
    services: Informer<Service>,
}

impl Caches {
    pub(crate) fn new(informers: &Informers) -> Self {
        Self {
            pods: informers.of(),
            namespaces: informers.of(),
            policies: informers.of(),
            cluster_policies: informers.of(),
            nodes: informers.of(),
            services: informers.of(),
        }
    }

    pub(super) fn are_synced(&self) -> bool {
        self.pods.is_synced()
            && self.namespaces.is_synced()
            && self.policies.is_synced()
            && self.cluster_policies.is_synced()
            && self.nodes.is_synced()
            && self.services.is_synced()
    }

    pub(super) fn list(&self) -> Cluster {
        Cluster {
            pods: self.pods.list(),
            namespaces: self.namespaces.list(),
            policies: self.policies.list(),
            cluster_policies: self.cluster_policies.list(),
            nodes: self.nodes.list(),
            services: self.services.list(),
        }
    }

    /// Notifies of the caches' news until they end.
    pub(super) fn notify(&self, look: &Arc<Notify>) -> Vec<JoinHandle<()>> {
        let receivers = [
            self.pods.changed(),
            self.namespaces.changed(),
            self.policies.changed(),
            self.cluster_policies.changed(),
            self.nodes.changed(),
            self.services.changed(),
        ];
        let follow = |mut receiver: watch::Receiver<u64>| {
            let look = look.clone();
            tokio::spawn(async move {
                while receiver.changed().await.is_ok() {
                    look.notify_one();
                }
            })
        };
        receivers.into_iter().map(follow).collect()
    }

    /// How many policies there are.
    pub(super) fn policies(&self) -> usize {
        self.policies.list().len() + self.cluster_policies.list().len()
    }
}
