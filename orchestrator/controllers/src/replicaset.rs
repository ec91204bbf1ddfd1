//! ReplicaSets: as many pods of a template as `replicas` says (apps/v1).

mod adopt;
mod plan;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orch_api::{Selector, meta};
use orch_client::DeleteParams;
use orch_reconcile::{Action, Change, EventRecorder, Queue, Reconciler};
use tracing::debug;

use crate::context::{Context, name, namespace, reference, uid};
use crate::error::{Failure, Step as _, gone_is_fine, is_namespace_ending};
use crate::expectations::Expectations;

pub(crate) use plan::{available_at, is_active};

/// Pods created or deleted for one ReplicaSet in one go (upstream's BurstReplicas).
const BURST: usize = 500;

pub(crate) struct ReplicaSets {
    cx: Arc<Context>,
    expectations: Arc<Expectations>,
    events: EventRecorder,
}

impl ReplicaSets {
    pub(crate) fn new(cx: Arc<Context>) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue = Arc::new(Queue::new());
        let expectations = Arc::new(Expectations::default());
        let (changed, sets) = (queue.clone(), expectations.clone());
        cx.replica_sets.on_change(move |change| {
            if let (Some(old), None) = (&change.old, &change.new) {
                sets.forget(uid(&old.metadata));
            }
            if let Some(set) = change.object() {
                changed.add(meta::key(&set.metadata));
            }
        });
        let (changed, seen, sets) = (queue.clone(), expectations.clone(), cx.replica_sets.clone());
        cx.pods.on_change(move |change| {
            observe(change, &seen);
            for pod in [&change.old, &change.new].into_iter().flatten() {
                match owner(&pod.metadata) {
                    Some((name, _)) => {
                        changed.add(format!("{}/{name}", namespace(&pod.metadata)));
                    }
                    // Somebody may want it.
                    None if meta::controller_of(&pod.metadata).is_none() => {
                        for set in sets.list_in(namespace(&pod.metadata)) {
                            if selects(&set, pod) {
                                changed.add(meta::key(&set.metadata));
                            }
                        }
                    }
                    None => {}
                }
            }
        });
        let events = cx.recorder("replicaset-controller");
        (Arc::new(Self { cx, expectations, events }), queue)
    }

    /// Creates or deletes pods until their number is right.
    async fn manage(&self, set: &ReplicaSet, pods: &[Arc<Pod>]) -> Result<(), Failure> {
        let owner = uid(&set.metadata);
        let related = self.related(set, pods);
        match plan::plan(set, pods, &related, Timestamp::now()) {
            plan::Step::Nothing => Ok(()),
            plan::Step::Create(count) => self.create(set, owner, count.min(BURST)).await,
            plan::Step::Delete(mut pods) => {
                pods.truncate(BURST);
                self.delete(set, owner, &pods).await
            }
        }
    }

    /// Active pods of all ReplicaSets of the same Deployment: where many of them share a node, one is spared first.
    fn related(&self, set: &ReplicaSet, pods: &[Arc<Pod>]) -> Vec<Arc<Pod>> {
        let Some(owner) = meta::controller_of(&set.metadata) else { return pods.to_vec() };
        let siblings = self.cx.replica_sets.owned_by(&owner.uid);
        let pods = siblings.iter().flat_map(|set| self.cx.pods.owned_by(uid(&set.metadata)));
        pods.filter(|pod| is_active(pod)).collect()
    }

    /// Creates in batches of 1, 2, 4 …: when all fail alike, few requests learn it.
    async fn create(&self, set: &ReplicaSet, owner: &str, count: usize) -> Result<(), Failure> {
        let pod = plan::desired_pod(set);
        let api = self.cx.api::<Pod>(namespace(&set.metadata));
        let (mut left, mut batch) = (count, 1);
        while left > 0 {
            let size = batch.min(left);
            self.expectations.expect_creations(owner, size);
            let outcomes = join_all((0..size).map(|_| api.create(&pod))).await;
            let mut failed = None;
            for outcome in outcomes {
                match outcome {
                    Ok(pod) => {
                        let message = format!("Created pod: {}", name(&pod.metadata));
                        self.events.event(&reference(set), "Normal", "SuccessfulCreate", &message);
                    }
                    Err(error) => {
                        self.expectations.created(owner);
                        failed = Some(error);
                    }
                }
            }
            if let Some(error) = failed {
                if is_namespace_ending(&error) {
                    return Ok(());
                }
                let message = format!("Error creating: {error}");
                self.events.event(&reference(set), "Warning", "FailedCreate", &message);
                // A quota, a missing ServiceAccount: what refused today may agree tomorrow.
                return Err(error).step(|| "create a pod".to_owned()).map_err(Failure::retried);
            }
            left -= size;
            batch *= 2;
        }
        Ok(())
    }

    async fn delete(
        &self,
        set: &ReplicaSet,
        owner: &str,
        pods: &[Arc<Pod>],
    ) -> Result<(), Failure> {
        let api = self.cx.api::<Pod>(namespace(&set.metadata));
        for pod in pods {
            self.expectations.expect_deletion(owner, uid(&pod.metadata));
        }
        let outcomes = join_all(pods.iter().map(|pod| {
            let api = &api;
            async move {
                let params = DeleteParams {
                    precondition_uid: pod.metadata.uid.clone(),
                    ..DeleteParams::default()
                };
                gone_is_fine(api.delete(name(&pod.metadata), &params)).await
            }
        }))
        .await;
        let mut failed = None;
        for (pod, outcome) in pods.iter().zip(outcomes) {
            match outcome {
                Ok(()) => {
                    let message = format!("Deleted pod: {}", name(&pod.metadata));
                    self.events.event(&reference(set), "Normal", "SuccessfulDelete", &message);
                }
                Err(error) => {
                    self.expectations.deleted(owner, uid(&pod.metadata));
                    let message = format!("Error deleting: {error}");
                    self.events.event(&reference(set), "Warning", "FailedDelete", &message);
                    failed = Some(error);
                }
            }
        }
        failed.map_or(Ok(()), Err).step(|| "delete a pod".to_owned())
    }
}

impl Reconciler for ReplicaSets {
    type Error = Failure;
    const NAME: &'static str = "replicaset";

    async fn reconcile(&self, key: &str) -> Result<Action, Failure> {
        let (ns, set_name) = meta::split_key(key);
        let Some(set) = self.cx.replica_sets.get(ns, set_name) else { return Ok(Action::done()) };
        let owner = uid(&set.metadata);
        // Asked before the pods are read: what is met now is in what is read then.
        let met = self.expectations.are_met(owner);
        let pods = adopt::claim(&self.cx, &set).await?;
        let (active, rest): (Vec<_>, Vec<_>) = pods.into_iter().partition(|pod| is_active(pod));
        let managed = if met && set.metadata.deletion_timestamp.is_none() {
            self.manage(&set, &active).await
        } else {
            Ok(())
        };
        let now = Timestamp::now();
        let terminating = rest.iter().filter(|pod| orch_api::pod::is_terminating(pod)).count();
        let failure = managed.as_ref().err().map(|failure| {
            std::error::Error::source(failure).map_or_else(String::new, ToString::to_string)
        });
        let status = plan::desired_status(&set, &active, terminating, failure.as_deref(), now);
        if set.status.as_ref() != Some(&status) {
            let updated = ReplicaSet { status: Some(status), ..ReplicaSet::clone(&set) };
            match self.cx.api::<ReplicaSet>(ns).replace_status(set_name, &updated).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => return Ok(Action::done()),
                Err(error) if error.is_conflict() => {
                    // The change we lost against wakes us.
                    debug!(replicaset = key, "the status is written later");
                }
                Err(error) => return Err(error).step(|| "write the status".to_owned()),
            }
        }
        managed?;
        let next = active.iter().filter_map(|pod| available_at(pod, plan::min_ready(&set)));
        let wait = next.filter(|at| *at > now).min().map(|at| at.duration_since(now));
        Ok(wait.map_or(Action::done(), |wait| {
            Action::requeue(wait.unsigned_abs() + Duration::from_millis(10))
        }))
    }
}

/// Name and UID of the ReplicaSet that manages an object.
pub(crate) fn owner(meta: &ObjectMeta) -> Option<(&str, &str)> {
    let owner = meta::controller_of(meta)?;
    let ours = owner.kind == "ReplicaSet" && owner.api_version.starts_with("apps/");
    ours.then_some((owner.name.as_str(), owner.uid.as_str()))
}

fn selects(set: &ReplicaSet, pod: &Pod) -> bool {
    let Some(spec) = &set.spec else { return false };
    let labels = pod.metadata.labels.clone().unwrap_or_default();
    Selector::from_label_selector(&spec.selector).is_ok_and(|selector| selector.matches(&labels))
}

fn observe(change: &Change<Pod>, expectations: &Expectations) {
    let Some(pod) = change.object() else { return };
    let Some((_, owner)) = owner(&pod.metadata) else { return };
    match (&change.old, &change.new) {
        (None, Some(_)) => expectations.created(owner),
        (_, None) => expectations.deleted(owner, uid(&pod.metadata)),
        _ => {}
    }
    // One that is ending counts as gone.
    if pod.metadata.deletion_timestamp.is_some() {
        expectations.deleted(owner, uid(&pod.metadata));
    }
}
