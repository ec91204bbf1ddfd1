//! Deployments: ReplicaSets by revision of the pod template, moved step by step from the old to the new (apps/v1).

mod plan;
mod revision;
mod rolling;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use orch_api::{Selector, meta};
use orch_client::{DeleteParams, Patch};
use orch_reconcile::{Action, EventRecorder, Queue, Reconciler};
use serde_json::json;
use tracing::info;

use crate::context::{Context, name, namespace, reference, uid};
use crate::error::{Failure, Step as _, gone_is_fine, is_namespace_ending};

use plan::{Plan, Step};

pub(crate) struct Deployments {
    cx: Arc<Context>,
    events: EventRecorder,
}

impl Deployments {
    pub(crate) fn new(cx: Arc<Context>) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue = Arc::new(Queue::new());
        let changed = queue.clone();
        cx.deployments.on_change(move |change| {
            if let Some(deployment) = change.object() {
                changed.add(meta::key(&deployment.metadata));
            }
        });
        let (changed, deployments) = (queue.clone(), cx.deployments.clone());
        cx.replica_sets.on_change(move |change| {
            for set in [&change.old, &change.new].into_iter().flatten() {
                let ns = namespace(&set.metadata);
                match meta::controller_of(&set.metadata) {
                    Some(owner) if owner.kind == "Deployment" => {
                        changed.add(format!("{ns}/{}", owner.name));
                    }
                    Some(_) => {}
                    None => {
                        for deployment in deployments.list_in(ns) {
                            if selects(&deployment, set) {
                                changed.add(meta::key(&deployment.metadata));
                            }
                        }
                    }
                }
            }
        });
        // `Recreate` waits for the last old pod.
        let (changed, sets, deployments) =
            (queue.clone(), cx.replica_sets.clone(), cx.deployments.clone());
        cx.pods.on_change(move |change| {
            let Some(pod) = change.object() else { return };
            let ended = change.new.as_ref().is_none_or(|pod| orch_api::pod::is_terminal(pod));
            let Some((set, _)) = crate::replicaset::owner(&pod.metadata).filter(|_| ended) else {
                return;
            };
            let ns = namespace(&pod.metadata);
            let set = sets.get(ns, set);
            let owner = set.as_ref().and_then(|set| meta::controller_of(&set.metadata));
            let Some(owner) = owner.filter(|owner| owner.kind == "Deployment") else { return };
            if deployments.get(ns, &owner.name).is_some_and(|found| plan::is_recreate(&found)) {
                changed.add(format!("{ns}/{}", owner.name));
            }
        });
        let events = cx.recorder("deployment-controller");
        (Arc::new(Self { cx, events }), queue)
    }

    /// The ReplicaSets that are the Deployment's; takes those that nobody has, lets go those that fit no more.
    async fn claim(&self, deployment: &Deployment) -> Result<Vec<ReplicaSet>, Failure> {
        let ns = namespace(&deployment.metadata);
        let alive = deployment.metadata.deletion_timestamp.is_none();
        let mut claimed = Vec::new();
        for set in self.cx.replica_sets.owned_by(uid(&deployment.metadata)) {
            let owner = meta::controller_of(&set.metadata);
            if owner.is_none_or(|owner| owner.uid != uid(&deployment.metadata)) {
                continue;
            }
            if selects(deployment, &set) || !alive {
                claimed.push(ReplicaSet::clone(&set));
            } else {
                let owners = set.metadata.owner_references.iter().flatten();
                let owners: Vec<_> =
                    owners.filter(|owner| owner.uid != uid(&deployment.metadata)).collect();
                self.patch_owners(&set, &json!(owners)).await?;
            }
        }
        if !alive {
            return Ok(claimed);
        }
        for set in self.cx.replica_sets.orphans_in(ns) {
            if set.metadata.deletion_timestamp.is_some() || !selects(deployment, &set) {
                continue;
            }
            let live = self.cx.api::<Deployment>(ns).get_opt(name(&deployment.metadata)).await;
            let live = live.step(|| "look at the Deployment before it adopts".to_owned())?;
            if live.is_none_or(|live| live.metadata.uid != deployment.metadata.uid) {
                break;
            }
            let mut owners = set.metadata.owner_references.clone().unwrap_or_default();
            owners.push(meta::controller_reference(deployment));
            claimed.extend(self.patch_owners(&set, &json!(owners)).await?);
        }
        Ok(claimed)
    }

    async fn patch_owners(
        &self,
        set: &ReplicaSet,
        owners: &serde_json::Value,
    ) -> Result<Option<ReplicaSet>, Failure> {
        let patch = json!({ "metadata": { "uid": set.metadata.uid, "ownerReferences": owners,
                                          "resourceVersion": set.metadata.resource_version } });
        let api = self.cx.api::<ReplicaSet>(namespace(&set.metadata));
        match api.patch(name(&set.metadata), &Patch::Merge(patch)).await {
            Ok(patched) => Ok(Some(patched)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error).step(|| format!("adopt or release {}", name(&set.metadata))),
        }
    }

    /// Whether pods of other revisions than the newest still exist.
    fn old_pods(&self, sets: &[ReplicaSet], newest: Option<&str>) -> bool {
        let old = sets.iter().filter(|set| newest != Some(name(&set.metadata)));
        old.flat_map(|set| self.cx.pods.owned_by(uid(&set.metadata)))
            .any(|pod| !orch_api::pod::is_terminal(&pod))
    }

    /// Returns the Deployment's resource version if the step changed it.
    async fn carry_out(
        &self,
        deployment: &Deployment,
        step: Step,
    ) -> Result<Option<String>, Failure> {
        let ns = namespace(&deployment.metadata);
        let api = self.cx.api::<ReplicaSet>(ns);
        match step {
            Step::Create(set) => {
                let set_name = name(&set.metadata).to_owned();
                let replicas = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
                match api.create(&set).await {
                    Ok(_) => {
                        self.scaled(deployment, &set_name, 0, replicas);
                        Ok(None)
                    }
                    Err(error) if is_namespace_ending(&error) => Ok(None),
                    Err(error) if error.is_already_exists() => {
                        self.collision(deployment, &set).await.map(|()| None)
                    }
                    Err(error) => Err(error)
                        .step(|| format!("create ReplicaSet {set_name}"))
                        .map_err(Failure::retried),
                }
            }
            Step::Update { set, scaled_from } => {
                let set_name = name(&set.metadata);
                api.replace(set_name, &set)
                    .await
                    .step(|| format!("update ReplicaSet {set_name}"))?;
                let replicas = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
                if let Some(from) = scaled_from {
                    self.scaled(deployment, set_name, from, replicas);
                }
                Ok(None)
            }
            Step::Delete(set) => {
                let params = DeleteParams {
                    precondition_uid: set.metadata.uid.clone(),
                    precondition_resource_version: set.metadata.resource_version.clone(),
                    ..DeleteParams::default()
                };
                let outcome = gone_is_fine(api.delete(name(&set.metadata), &params)).await;
                outcome
                    .step(|| format!("delete old ReplicaSet {}", name(&set.metadata)))
                    .map(|()| None)
            }
            Step::SetRevision(revision) => {
                let patch =
                    json!({ "metadata": { "annotations": { (revision::REVISION): revision } } });
                let api = self.cx.api::<Deployment>(ns);
                let outcome = api.patch(name(&deployment.metadata), &Patch::Merge(patch)).await;
                let changed = outcome.step(|| "write the revision".to_owned())?;
                Ok(changed.metadata.resource_version)
            }
        }
    }

    fn scaled(&self, deployment: &Deployment, set: &str, from: i32, to: i32) {
        if from == to {
            return;
        }
        let direction = if to > from { "up" } else { "down" };
        let message = format!("Scaled {direction} replica set {set} from {from} to {to}");
        info!(deployment = meta::key(&deployment.metadata), set, from, to, "scaled");
        self.events.event(&reference(deployment), "Normal", "ScalingReplicaSet", &message);
    }

    /// The name is taken: by our own ReplicaSet that the cache does not show yet, or by another template with the same
    /// hash, which the next try avoids.
    async fn collision(&self, deployment: &Deployment, wanted: &ReplicaSet) -> Result<(), Failure> {
        let ns = namespace(&deployment.metadata);
        let set_name = name(&wanted.metadata);
        let live = self.cx.api::<ReplicaSet>(ns).get_opt(set_name).await;
        let Some(live) = live.step(|| format!("look at ReplicaSet {set_name}"))? else {
            return Ok(());
        };
        let ours = meta::controller_of(&live.metadata)
            .is_some_and(|owner| owner.uid == uid(&deployment.metadata));
        if ours && revision::has_template(&live, deployment) {
            return Ok(());
        }
        let mut changed = deployment.clone();
        let status = changed.status.get_or_insert_default();
        status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
        let api = self.cx.api::<Deployment>(ns);
        let outcome = api.replace_status(name(&deployment.metadata), &changed).await;
        outcome.map(drop).step(|| "count the hash collision".to_owned())
    }
}

impl Reconciler for Deployments {
    type Error = Failure;
    const NAME: &'static str = "deployment";

    async fn reconcile(&self, key: &str) -> Result<Action, Failure> {
        let (ns, deployment_name) = meta::split_key(key);
        let Some(deployment) = self.cx.deployments.get(ns, deployment_name) else {
            return Ok(Action::done());
        };
        let sets = self.claim(&deployment).await?;
        let newest = revision::newest(&deployment, &sets).map(|set| name(&set.metadata).to_owned());
        let old_pods = plan::is_recreate(&deployment) && self.old_pods(&sets, newest.as_deref());
        let now = Timestamp::now();
        let Plan { steps, status, check_after } = plan::plan(&deployment, sets, old_pods, now);
        let mut updated = Deployment::clone(&deployment);
        for step in steps {
            if let Some(version) = self.carry_out(&deployment, step).await? {
                updated.metadata.resource_version = Some(version);
            }
        }
        if deployment.status.as_ref() != Some(&status) {
            updated.status = Some(status);
            match self.cx.api::<Deployment>(ns).replace_status(deployment_name, &updated).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => return Ok(Action::done()),
                Err(error) => return Err(error).step(|| "write the status".to_owned()),
            }
        }
        Ok(check_after.map_or(Action::done(), Action::requeue))
    }
}

fn selects(deployment: &Deployment, set: &ReplicaSet) -> bool {
    let Some(spec) = &deployment.spec else { return false };
    let labels = set.metadata.labels.clone().unwrap_or_default();
    Selector::from_label_selector(&spec.selector).is_ok_and(|selector| selector.matches(&labels))
}
