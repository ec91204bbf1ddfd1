//! The garbage collector: what lost all its owners is deleted (Kubernetes, "Garbage Collection").
//!
//! Who owns what is in the caches' index by owner UID, so there is no graph to keep. An owner counts as gone only when
//! the API server says so: a cache may be behind. Deletion of an owner works in three ways: in the background (the
//! owner first, then this loop), in the foreground (finalizer `foregroundDeletion`: dependents first) and orphaning
//! (finalizer `orphan`: dependents forget it).

mod kinds;
mod plan;

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use orch_client::DeleteParams;
use orch_reconcile::{Action, Queue, Reconciler};
use serde_json::json;
use tracing::info;

use crate::context::{name, namespace, uid};
use crate::error::{Failure, Step as _, gone_is_fine};

pub(crate) use kinds::{Kinds, kinds};
use plan::{FOREGROUND, ORPHAN, Owner, Step};

pub(crate) struct Collector {
    kinds: Kinds,
}

impl Collector {
    pub(crate) fn new(kinds: Kinds) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue = Arc::new(Queue::new());
        let (changed, all) = (queue.clone(), kinds.clone());
        kinds.on_change(move |kind, old, new| {
            if let Some(new) = new
                && plan::is_worth_a_look(new, |owner| all.has(owner, namespace(new)))
            {
                changed.add(kinds::key(kind, new));
            }
            if let (Some(old), Some(new)) = (old, new) {
                for owner in plan::unblocked(old, new) {
                    if let Some((kind, found)) = all.find(owner, namespace(new)) {
                        changed.add(kinds::key(kind, &found));
                    }
                }
            }
            let Some(old) = old.filter(|_| new.is_none()) else { return };
            // Its dependents may have to go, and an owner may have waited for it.
            for (kind, dependent) in all.owned_by(uid(old)) {
                changed.add(kinds::key(kind, &dependent));
            }
            for owner in old.owner_references.iter().flatten() {
                if let Some((kind, found)) = all.find(owner, namespace(old))
                    && plan::has_finalizer(&found, FOREGROUND)
                {
                    changed.add(kinds::key(kind, &found));
                }
            }
        });
        (Arc::new(Self { kinds }), queue)
    }

    pub(crate) async fn synced(&self) {
        self.kinds.synced().await;
    }

    /// What became of each owner, asking the server about those that the cache does not have.
    async fn owners(&self, meta: &ObjectMeta) -> Result<Vec<(OwnerReference, Owner)>, Failure> {
        let mut owners = Vec::new();
        for owner in meta.owner_references.iter().flatten() {
            let state = match self.kinds.find(owner, namespace(meta)) {
                Some((_, found)) => {
                    let waits = found.deletion_timestamp.is_some()
                        && plan::has_finalizer(&found, FOREGROUND);
                    if waits { Owner::WaitsForDependents } else { Owner::Present }
                }
                None => match self.kinds.live_uid(owner, namespace(meta)).await {
                    // A kind this server does not have: never taken for gone.
                    None => Owner::Present,
                    Some(Ok(Some(live))) if live == owner.uid => Owner::Present,
                    Some(Ok(_)) => Owner::Gone,
                    Some(Err(error)) => {
                        return Err(error).step(|| format!("look for owner {}", owner.name));
                    }
                },
            };
            owners.push((owner.clone(), state));
        }
        Ok(owners)
    }

    /// An object that goes after its dependents, or leaves them behind.
    async fn release(
        &self,
        kind: usize,
        meta: &ObjectMeta,
        finalizer: &str,
    ) -> Result<(), Failure> {
        let mut left: Vec<String> = meta.finalizers.clone().unwrap_or_default();
        left.retain(|one| one != finalizer);
        let patch = json!({ "metadata": { "uid": uid(meta), "finalizers": left,
                                          "resourceVersion": meta.resource_version } });
        gone_is_fine(self.kinds.patch(kind, meta, patch))
            .await
            .step(|| format!("let {} go", name(meta)))
    }

    async fn orphan(&self, kind: usize, meta: &ObjectMeta) -> Result<(), Failure> {
        for (of, dependent) in self.kinds.owned_by(uid(meta)) {
            self.drop_owners(of, &dependent, &[uid(meta)]).await?;
        }
        self.release(kind, meta, ORPHAN).await
    }

    async fn drop_owners(
        &self,
        kind: usize,
        meta: &ObjectMeta,
        gone: &[&str],
    ) -> Result<(), Failure> {
        let owners = meta.owner_references.iter().flatten();
        let owners: Vec<_> = owners.filter(|owner| !gone.contains(&owner.uid.as_str())).collect();
        let patch = json!({ "metadata": { "uid": uid(meta), "ownerReferences": owners,
                                          "resourceVersion": meta.resource_version } });
        gone_is_fine(self.kinds.patch(kind, meta, patch))
            .await
            .step(|| format!("take lost owners off {}", name(meta)))
    }
}

impl Reconciler for Collector {
    type Error = Failure;
    const NAME: &'static str = "garbage-collector";

    async fn reconcile(&self, key: &str) -> Result<Action, Failure> {
        let Some((kind, meta)) = self.kinds.get(key) else { return Ok(Action::done()) };
        if meta.deletion_timestamp.is_some() {
            if plan::has_finalizer(&meta, ORPHAN) {
                self.orphan(kind, &meta).await?;
            } else if plan::has_finalizer(&meta, FOREGROUND) {
                let dependents = self.kinds.owned_by(uid(&meta));
                let blocking =
                    dependents.iter().any(|(_, dependent)| plan::blocks(dependent, uid(&meta)));
                if !blocking {
                    self.release(kind, &meta, FOREGROUND).await?;
                }
                for (of, dependent) in dependents {
                    if dependent.deletion_timestamp.is_none() {
                        self.collect(of, &dependent).await?;
                    }
                }
            }
            return Ok(Action::done());
        }
        self.collect(kind, &meta).await?;
        Ok(Action::done())
    }
}

impl Collector {
    async fn collect(&self, kind: usize, meta: &ObjectMeta) -> Result<(), Failure> {
        let owners = self.owners(meta).await?;
        let dependents = self.kinds.owned_by(uid(meta));
        let mut version = meta.resource_version.clone();
        let step = plan::plan(meta, &owners, !dependents.is_empty());
        if step == Step::Delete("Foreground") && plan::may_be_a_circle(&dependents) {
            let patch = json!({ "metadata": { "uid": uid(meta), "resourceVersion": version,
                                              "ownerReferences": plan::unblocking(meta) } });
            gone_is_fine(self.kinds.patch(kind, meta, patch))
                .await
                .step(|| format!("break the circle of owners at {}", name(meta)))?;
            version = None;
        }
        match step {
            Step::Keep => Ok(()),
            Step::DropOwners(gone) => self.drop_owners(kind, meta, &gone).await,
            Step::Delete(propagation) => {
                let params = DeleteParams {
                    propagation: Some(propagation),
                    precondition_uid: meta.uid.clone(),
                    // Somebody may just have given it another owner.
                    precondition_resource_version: version,
                    ..DeleteParams::default()
                };
                let request = self.kinds.delete(kind, meta, &params);
                gone_is_fine(request).await.step(|| format!("delete {}", name(meta)))?;
                info!(
                    kind = self.kinds.kind(kind),
                    namespace = namespace(meta),
                    name = name(meta),
                    "its owners are gone: deleted"
                );
                Ok(())
            }
        }
    }
}
