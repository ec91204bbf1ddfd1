//! All kinds alike: metadata from a cache, deletion and patches, whatever the kind.
//!
//! Kinds that no other controller reads are cached by their metadata alone ([`Only`]): ConfigMaps and Secrets can be
//! large, and nobody here looks inside.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::sync::Arc;

use futures::future::{BoxFuture, join_all};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::{Metadata, Resource};
use orch_api::cluster_policy::ClusterNetworkPolicy;
use orch_api::meta;
use orch_client::{Api, Client, DeleteParams, Error, Kind, Patch};
use orch_reconcile::Informer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::context::{Context, name, namespace};

/// An object of kind `K`, of which only the metadata is kept.
pub(crate) struct Only<K> {
    metadata: ObjectMeta,
    kind: PhantomData<fn() -> K>,
}

impl<K> Clone for Only<K> {
    fn clone(&self) -> Self {
        Self { metadata: self.metadata.clone(), kind: PhantomData }
    }
}

impl<K> std::fmt::Debug for Only<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Only").field("metadata", &self.metadata).finish()
    }
}

impl<K: Resource> Resource for Only<K> {
    const API_VERSION: &'static str = K::API_VERSION;
    const GROUP: &'static str = K::GROUP;
    const KIND: &'static str = K::KIND;
    const VERSION: &'static str = K::VERSION;
    const URL_PATH_SEGMENT: &'static str = K::URL_PATH_SEGMENT;
    type Scope = K::Scope;
}

impl<K: Resource> Metadata for Only<K> {
    type Ty = ObjectMeta;

    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[derive(Serialize, Deserialize)]
struct Wire<'a> {
    metadata: Cow<'a, ObjectMeta>,
}

impl<K> Serialize for Only<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Wire { metadata: Cow::Borrowed(&self.metadata) }.serialize(serializer)
    }
}

impl<'de, K> Deserialize<'de> for Only<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        Ok(Self { metadata: wire.metadata.into_owned(), kind: PhantomData })
    }
}

/// What the collector needs of a kind.
trait Collected: Send + Sync {
    fn kind(&self) -> &'static str;
    fn group(&self) -> &'static str;
    fn namespaced(&self) -> bool;
    fn get(&self, key: &str) -> Option<ObjectMeta>;
    fn owned_by(&self, uid: &str) -> Vec<ObjectMeta>;
    fn on_change(&self, handler: Handler);
    fn synced(&self) -> BoxFuture<'_, ()>;
    fn live_uid<'a>(
        &'a self,
        ns: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<String>, Error>>;
    fn delete<'a>(
        &'a self,
        meta: &'a ObjectMeta,
        params: &'a DeleteParams,
    ) -> BoxFuture<'a, Result<(), Error>>;
    fn patch<'a>(&'a self, meta: &'a ObjectMeta, patch: Value) -> BoxFuture<'a, Result<(), Error>>;
}

type Handler = Box<dyn Fn(Option<&ObjectMeta>, Option<&ObjectMeta>) + Send>;

struct Cached<K> {
    client: Client,
    informer: Informer<K>,
    namespaced: bool,
}

impl<K: Kind> Cached<K> {
    fn api(&self, ns: &str) -> Api<K> {
        if ns.is_empty() {
            Api::all(self.client.clone())
        } else {
            Api::namespaced(self.client.clone(), ns)
        }
    }
}

impl<K: Kind> Collected for Cached<K> {
    fn kind(&self) -> &'static str {
        K::KIND
    }

    fn group(&self) -> &'static str {
        K::GROUP
    }

    fn namespaced(&self) -> bool {
        self.namespaced
    }

    fn get(&self, key: &str) -> Option<ObjectMeta> {
        self.informer.get_key(key).map(|found| found.metadata().clone())
    }

    fn owned_by(&self, uid: &str) -> Vec<ObjectMeta> {
        self.informer.owned_by(uid).iter().map(|found| found.metadata().clone()).collect()
    }

    fn on_change(&self, handler: Handler) {
        self.informer.on_change(move |change| {
            let meta = |object: &Option<Arc<K>>| object.clone();
            let (old, new) = (meta(&change.old), meta(&change.new));
            handler(old.as_ref().map(|one| one.metadata()), new.as_ref().map(|one| one.metadata()));
        });
    }

    fn synced(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.informer.synced())
    }

    fn live_uid<'a>(
        &'a self,
        ns: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<String>, Error>> {
        Box::pin(async move {
            let live = self.api(ns).get_opt(name).await?;
            Ok(live.and_then(|live| live.metadata().uid.clone()))
        })
    }

    fn delete<'a>(
        &'a self,
        meta: &'a ObjectMeta,
        params: &'a DeleteParams,
    ) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move { self.api(namespace(meta)).delete(name(meta), params).await })
    }

    fn patch<'a>(&'a self, meta: &'a ObjectMeta, patch: Value) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            self.api(namespace(meta)).patch(name(meta), &Patch::Merge(patch)).await.map(drop)
        })
    }
}

/// All kinds that own or are owned.
#[derive(Clone)]
pub(crate) struct Kinds {
    all: Arc<Vec<Box<dyn Collected>>>,
}

/// Every kind that the API server stores, except Events: they own nothing and nothing owns them.
pub(crate) fn kinds(cx: &Context) -> Kinds {
    let client = || cx.client.clone();
    macro_rules! cached {
        ($informer:expr, $namespaced:expr) => {
            Box::new(Cached { client: client(), informer: $informer, namespaced: $namespaced })
                as Box<dyn Collected>
        };
    }
    let all = vec![
        cached!(cx.namespaces.clone(), false),
        cached!(cx.nodes.clone(), false),
        cached!(cx.accounts.clone(), true),
        cached!(cx.deployments.clone(), true),
        cached!(cx.replica_sets.clone(), true),
        cached!(cx.pods.clone(), true),
        cached!(cx.services.clone(), true),
        cached!(cx.slices.clone(), true),
        cached!(cx.endpoints.clone(), true),
        cached!(cx.informers.of::<Only<ConfigMap>>(), true),
        cached!(cx.informers.of::<Only<Secret>>(), true),
        cached!(cx.informers.of::<Only<Lease>>(), true),
        cached!(cx.informers.of::<Only<NetworkPolicy>>(), true),
        cached!(cx.informers.of::<Only<ClusterNetworkPolicy>>(), false),
        cached!(cx.informers.of::<Only<Role>>(), true),
        cached!(cx.informers.of::<Only<RoleBinding>>(), true),
        cached!(cx.informers.of::<Only<ClusterRole>>(), false),
        cached!(cx.informers.of::<Only<ClusterRoleBinding>>(), false),
        cached!(cx.informers.of::<Only<PriorityClass>>(), false),
    ];
    Kinds { all: Arc::new(all) }
}

/// Key of an object of any kind: the kind's number, then its own key.
pub(super) fn key(kind: usize, object: &ObjectMeta) -> String {
    format!("{kind}:{}", meta::key(object))
}

impl Kinds {
    pub(super) fn get(&self, key: &str) -> Option<(usize, ObjectMeta)> {
        let (kind, key) = key.split_once(':')?;
        let kind = kind.parse::<usize>().ok()?;
        Some((kind, self.all.get(kind)?.get(key)?))
    }

    pub(super) fn kind(&self, kind: usize) -> &'static str {
        self.all.get(kind).map_or("", |kind| kind.kind())
    }

    fn of(&self, owner: &OwnerReference) -> Option<usize> {
        let group = owner.api_version.rsplit_once('/').map_or("", |(group, _)| group);
        self.all.iter().position(|kind| kind.kind() == owner.kind && kind.group() == group)
    }

    /// The owner as the cache has it. Dependents live in the namespace of their owner, or their owner has none.
    pub(super) fn find(&self, owner: &OwnerReference, ns: &str) -> Option<(usize, ObjectMeta)> {
        let at = self.of(owner)?;
        let kind = &self.all[at];
        let found = if kind.namespaced() {
            kind.get(&format!("{ns}/{}", owner.name))
        } else {
            kind.get(&owner.name)
        };
        found.filter(|found| found.uid.as_deref() == Some(&owner.uid)).map(|found| (at, found))
    }

    pub(super) fn has(&self, owner: &OwnerReference, ns: &str) -> bool {
        self.find(owner, ns).is_some_and(|(_, found)| found.deletion_timestamp.is_none())
    }

    /// The UID of the object that has the owner's name now. None for a kind that is not known, or an owner in a
    /// namespace of something that has none: no answer can be given then.
    pub(super) async fn live_uid(
        &self,
        owner: &OwnerReference,
        ns: &str,
    ) -> Option<Result<Option<String>, Error>> {
        let kind = &self.all[self.of(owner)?];
        let ns = if kind.namespaced() { ns } else { "" };
        if kind.namespaced() && ns.is_empty() {
            return None;
        }
        Some(kind.live_uid(ns, &owner.name).await)
    }

    pub(super) fn owned_by(&self, uid: &str) -> Vec<(usize, ObjectMeta)> {
        let all = self.all.iter().enumerate();
        all.flat_map(|(at, kind)| kind.owned_by(uid).into_iter().map(move |found| (at, found)))
            .collect()
    }

    pub(super) fn on_change(
        &self,
        handler: impl Fn(usize, Option<&ObjectMeta>, Option<&ObjectMeta>) + Send + Sync + 'static,
    ) {
        let handler = Arc::new(handler);
        for (at, kind) in self.all.iter().enumerate() {
            let handler = handler.clone();
            kind.on_change(Box::new(move |old, new| handler(at, old, new)));
        }
    }

    /// Calls `handler` for everything that is deleted.
    pub(crate) fn on_deletion(&self, handler: impl Fn(&ObjectMeta) + Send + Sync + 'static) {
        self.on_change(move |_, old, new| {
            if let (Some(old), None) = (old, new) {
                handler(old);
            }
        });
    }

    pub(super) async fn synced(&self) {
        join_all(self.all.iter().map(|kind| kind.synced())).await;
    }

    pub(super) async fn delete(
        &self,
        kind: usize,
        meta: &ObjectMeta,
        params: &DeleteParams,
    ) -> Result<(), Error> {
        self.all[kind].delete(meta, params).await
    }

    pub(super) async fn patch(
        &self,
        kind: usize,
        meta: &ObjectMeta,
        patch: Value,
    ) -> Result<(), Error> {
        self.all[kind].patch(meta, patch).await
    }
}
