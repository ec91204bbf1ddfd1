//! The scheduler without its wires: changes in, attempts out. One owner, no clock, no I/O.

use std::sync::Arc;

use orch_api::k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use orch_api::{Selector, meta, pod};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::decide::{Diagnosis, decide};
use crate::filter::Plugin;
use crate::hints;
use crate::pod_info::PodInfo;
use crate::queue::Queue;

/// What came of one pod's turn.
#[derive(Debug)]
pub enum Attempt {
    /// The pod counts on this node already; bind it, then tell [`State::bind_failed`] if that fails.
    Bind { pod: Arc<PodInfo>, node: String },
    /// It fits nowhere and waits for a change.
    Unschedulable { pod: Arc<PodInfo>, why: Diagnosis },
}

/// Cluster, queue, and the rules between them.
#[derive(Debug)]
pub struct State {
    cluster: Cluster,
    queue: Queue,
    scheduler_name: String,
    start: usize,
    dice: StdRng,
}

impl State {
    /// `seed` is for the dice that break ties.
    #[must_use]
    pub fn new(scheduler_name: &str, seed: u64) -> Self {
        Self {
            cluster: Cluster::default(),
            queue: Queue::default(),
            scheduler_name: scheduler_name.to_owned(),
            start: 0,
            dice: StdRng::seed_from_u64(seed),
        }
    }

    /// What is known of the cluster.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The waiting pods.
    #[must_use]
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// A pod was created, changed, or deleted (`new` is absent).
    pub fn pod_changed(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
        let uid = |pod: &Arc<Pod>| pod.metadata.uid.clone().unwrap_or_default();
        // A pod deleted and created again under its name between two looks is two pods.
        if let (Some(before), Some(after)) = (old, new)
            && uid(before) != uid(after)
        {
            self.pod_changed(old, None);
            self.pod_changed(None, new);
            return;
        }
        match new.or(old) {
            None => {}
            Some(gone) if new.is_none() || pod::is_terminal(gone) => {
                let uid = uid(gone);
                self.queue.remove(&uid);
                self.leave_node(&uid);
            }
            Some(pod) if !pod::node_name(pod).is_empty() => self.pod_bound(pod),
            Some(pod) => self.pod_waiting(pod),
        }
    }

    fn pod_bound(&mut self, pod: &Arc<Pod>) {
        let node = pod::node_name(pod).to_owned();
        let info = Arc::new(PodInfo::new(pod.clone()));
        self.queue.remove(&info.uid);
        let before = self.cluster.pod(&info.uid).map(|(node, pod)| (node.to_owned(), pod.clone()));
        self.cluster.set_pod(&node, &info);
        let terminating = pod::is_terminating(pod);
        if let Some((before_node, before)) = before {
            let was_terminating = pod::is_terminating(&before.pod);
            if before_node == node && terminating == was_terminating && before.schedules_like(&info)
            {
                return;
            }
            self.wake_after_removal(&before_node, &before);
        }
        let cluster = &self.cluster;
        self.queue.wake(|pod, rejected_by| hints::pod_added(cluster, &info, pod, rejected_by));
    }

    fn pod_waiting(&mut self, pod: &Arc<Pod>) {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let name = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.scheduler_name.as_deref())
            .unwrap_or("default-scheduler");
        if pod::is_terminating(pod) || name != self.scheduler_name {
            self.queue.remove(uid);
            if !self.cluster.is_assumed(uid) {
                self.leave_node(uid);
            }
            return;
        }
        self.queue.set(Arc::new(PodInfo::new(pod.clone())));
    }

    fn leave_node(&mut self, uid: &str) {
        let Some((node, pod)) =
            self.cluster.pod(uid).map(|(node, pod)| (node.to_owned(), pod.clone()))
        else {
            return;
        };
        self.cluster.remove_pod(uid);
        self.wake_after_removal(&node, &pod);
    }

    fn wake_after_removal(&mut self, node: &str, gone: &PodInfo) {
        let (cluster, node) = (&self.cluster, self.cluster.node(node));
        self.queue
            .wake(|pod, rejected_by| hints::pod_removed(cluster, node, gone, pod, rejected_by));
    }

    /// A node came, changed, or went.
    pub fn node_changed(&mut self, old: Option<&Arc<Node>>, new: Option<&Arc<Node>>) {
        let Some(node) = new else {
            if let Some(old) = old {
                self.cluster.remove_node(&meta::key(&old.metadata));
                self.queue.wake(|_, rejected_by| hints::node_removed(rejected_by));
            }
            return;
        };
        let name = meta::key(&node.metadata);
        let placement = |node: &crate::NodeInfo| {
            (node.labels.clone(), node.taints.clone(), node.unschedulable, node.allocatable.clone())
        };
        let before = self.cluster.node(&name).map(placement);
        self.cluster.set_node(node.clone());
        let Some(info) = self.cluster.node(&name) else { return };
        let after = placement(info);
        if before.as_ref() == Some(&after) {
            return; // A heartbeat.
        }
        let relabelled = before.is_none_or(|before| (before.0, before.1) != (after.0, after.1));
        self.queue.wake(|pod, rejected_by| hints::node_changed(info, relabelled, pod, rejected_by));
    }

    /// A namespace came, changed, or went.
    pub fn namespace_changed(
        &mut self,
        old: Option<&Arc<Namespace>>,
        new: Option<&Arc<Namespace>>,
    ) {
        let Some(namespace) = new.or(old) else { return };
        let labels = new.map(|namespace| namespace.metadata.labels.clone().unwrap_or_default());
        self.cluster.set_namespace(namespace.metadata.name.as_deref().unwrap_or_default(), labels);
        self.queue.wake(|_, rejected_by| rejected_by.contains(Plugin::InterPodAffinity));
    }

    /// A Service came, changed, or went. Services only make pods spread; they wake none.
    pub fn service_changed(&mut self, old: Option<&Arc<Service>>, new: Option<&Arc<Service>>) {
        let Some(service) = new.or(old) else { return };
        let selector = new
            .and_then(|service| service.spec.as_ref()?.selector.as_ref())
            .filter(|labels| !labels.is_empty())
            .map(Selector::from_labels);
        let meta = &service.metadata;
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        self.cluster.set_service(&part(&meta.namespace), &part(&meta.name), selector);
    }

    /// Gives the next pod its turn, if one is due.
    pub fn attempt(&mut self, now: Instant) -> Option<Attempt> {
        let pod = self.queue.pop(now)?;
        let decision =
            decide(&self.cluster, &pod, &mut self.start, &mut self.dice).map(str::to_owned);
        Some(match decision {
            Ok(node) => {
                self.cluster.assume(&node, &pod);
                // It may be what another pod waits for, now and not only once the API server has confirmed.
                let cluster = &self.cluster;
                self.queue
                    .wake(|other, rejected_by| hints::pod_added(cluster, &pod, other, rejected_by));
                Attempt::Bind { pod, node }
            }
            Err(why) => {
                self.queue.unschedulable(&pod.uid, why.rejected_by, now);
                Attempt::Unschedulable { pod, why }
            }
        })
    }

    /// The binding was refused or got lost: the pod gives its place back and is tried again later.
    pub fn bind_failed(&mut self, pod: &PodInfo, now: Instant) {
        if self.cluster.is_assumed(&pod.uid) {
            self.leave_node(&pod.uid);
        }
        self.queue.retry(&pod.uid, now);
    }
}

#[cfg(test)]
mod tests;
