//! The roles as they are now, put together from the watch caches whenever those have changed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use orch_store::Revision;
use orch_store::cache::{Cache, Snapshot};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tracing::warn;

use super::rbac::{Binding, Policy, Role};

/// Gives out the newest [`Policy`].
pub(crate) struct Live {
    /// Of roles, ClusterRoles, bindings, ClusterRoleBindings.
    caches: [Arc<Cache>; 4],
    built: Mutex<Built>,
}

#[derive(Default)]
struct Built {
    /// The newest events of the caches that the policy was made from; `None` = of nothing.
    from: Option<[u64; 4]>,
    policy: Arc<Policy>,
    roles: Parsed<Role>,
    cluster_roles: Parsed<Role>,
    bindings: Parsed<Binding>,
    cluster_bindings: Parsed<Binding>,
}

impl Live {
    pub(crate) fn new(
        roles: &Arc<Cache>,
        cluster_roles: &Arc<Cache>,
        bindings: &Arc<Cache>,
        cluster_bindings: &Arc<Cache>,
    ) -> Self {
        let caches = [roles, cluster_roles, bindings, cluster_bindings].map(Arc::clone);
        Self { caches, built: Mutex::default() }
    }

    /// The policy, once all caches are filled; `None` when that takes longer than `limit`.
    pub(crate) async fn ready(&self, limit: Duration) -> Option<Arc<Policy>> {
        if !self.caches.iter().all(|cache| cache.is_ready()) {
            let all = futures::future::join_all(self.caches.iter().map(|cache| cache.ready()));
            let ready = tokio::time::timeout(limit, all).await.ok()?;
            if !ready.into_iter().all(|ready| ready) {
                return None;
            }
        }
        Some(self.policy())
    }

    fn policy(&self) -> Arc<Policy> {
        // Read before the objects are: then these are at least as new.
        let now = self.caches.each_ref().map(|cache| cache.newest_event());
        let mut built = self.built.lock();
        if built.from != Some(now) {
            let [roles, cluster_roles, bindings, cluster_bindings] =
                self.caches.each_ref().map(|cache| cache.snapshot());
            built.roles.renew(&roles);
            built.cluster_roles.renew(&cluster_roles);
            built.bindings.renew(&bindings);
            built.cluster_bindings.renew(&cluster_bindings);
            built.policy = Arc::new(built.put_together());
            built.from = Some(now);
        }
        built.policy.clone()
    }
}

impl Built {
    fn put_together(&self) -> Policy {
        let mut policy = Policy::default();
        for (namespace, name, role) in self.roles.all() {
            let of_namespace = policy.roles.entry(namespace.to_owned()).or_default();
            of_namespace.insert(name.to_owned(), role.clone());
        }
        for (_, name, role) in self.cluster_roles.all() {
            policy.cluster_roles.insert(name.to_owned(), role.clone());
        }
        for (namespace, _, binding) in self.bindings.all() {
            policy.bindings.entry(namespace.to_owned()).or_default().push(binding.clone());
        }
        policy.cluster_bindings =
            self.cluster_bindings.all().map(|(_, _, binding)| binding.clone()).collect();
        policy
    }
}

/// Objects of one cache, each parsed once per change.
struct Parsed<T>(BTreeMap<Arc<str>, One<T>>);

struct One<T> {
    revision: Revision,
    namespace: String,
    name: String,
    value: Arc<T>,
}

impl<T> Default for Parsed<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: DeserializeOwned> Parsed<T> {
    fn renew(&mut self, snapshot: &Snapshot) {
        let mut before = std::mem::take(&mut self.0);
        for object in snapshot.iter() {
            let known = before.remove(&object.key).filter(|one| one.revision == object.revision);
            let one = match known {
                Some(one) => one,
                None => match serde_json::from_slice(&object.bytes) {
                    Ok(value) => One {
                        revision: object.revision,
                        namespace: object.meta.namespace.clone(),
                        name: object.meta.name.clone(),
                        value: Arc::new(value),
                    },
                    // It gives no rights, which is the safe side.
                    Err(error) => {
                        warn!(key = %object.key, %error, "the stored object cannot be read, it gives no rights");
                        continue;
                    }
                },
            };
            self.0.insert(object.key.clone(), one);
        }
    }

    fn all(&self) -> impl Iterator<Item = (&str, &str, &Arc<T>)> {
        self.0.values().map(|one| (one.namespace.as_str(), one.name.as_str(), &one.value))
    }
}
