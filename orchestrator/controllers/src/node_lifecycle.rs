//! Nodes that fall silent: their conditions, taints, and the pods on them.
//!
//! A node lives as long as its Lease is renewed or its status reported. When both stop for the grace period, its
//! conditions become Unknown, its pods not ready (so no Service sends traffic there), and taints keep new pods away
//! and drive the others out when their tolerations end. Times are those at which *we* saw something change: the clocks
//! of nodes are not compared with ours.
//!
//! Upstream leaves pods of a lost node in the API until the node is back or its object deleted, for it cannot know
//! whether they still run. With [`crate::Options::force_delete_lost_pods`] they are removed, and replaced at once.

mod evict;
mod health;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use orch_api::{node, pod};
use orch_client::{DeleteParams, Patch};
use orch_reconcile::{Action, EventRecorder, Queue, Reconciler};
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::context::{Context, name, namespace, reference};
use crate::error::{Failure, Step as _, gone_is_fine};

/// A margin, so that a look at a deadline comes after it.
const MARGIN: Duration = Duration::from_millis(20);

/// The last sign of life of a node: what it was, and when we saw it.
#[derive(Debug, Clone)]
struct Seen {
    renewed: Option<Timestamp>,
    reported: Option<Timestamp>,
    at: Instant,
}

#[derive(Debug, Default)]
struct Heartbeats {
    by_node: Mutex<HashMap<String, Seen>>,
}

impl Heartbeats {
    fn note(&self, node: &str, change: impl FnOnce(&mut Seen) -> bool) {
        let mut by_node = self.by_node.lock();
        let now = Instant::now();
        let seen = by_node.entry(node.to_owned()).or_insert(Seen {
            renewed: None,
            reported: None,
            at: now,
        });
        if change(seen) {
            seen.at = now;
        }
    }

    fn lease(&self, lease: &Lease) {
        let renewed = lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref()).map(|t| t.0);
        self.note(name(&lease.metadata), |seen| {
            std::mem::replace(&mut seen.renewed, renewed) != renewed
        });
    }

    fn status(&self, node: &Node) {
        let ready = node::condition(node, "Ready");
        let reported = ready.and_then(|ready| ready.last_heartbeat_time.as_ref()).map(|t| t.0);
        self.note(name(&node.metadata), |seen| {
            std::mem::replace(&mut seen.reported, reported) != reported
        });
    }

    fn last(&self, node: &str) -> Option<Instant> {
        self.by_node.lock().get(node).map(|seen| seen.at)
    }

    fn forget(&self, node: &str) {
        self.by_node.lock().remove(node);
    }
}

pub(crate) struct Nodes {
    cx: Arc<Context>,
    heartbeats: Arc<Heartbeats>,
    events: EventRecorder,
}

impl Nodes {
    pub(crate) fn new(cx: Arc<Context>) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue: Arc<Queue<String>> = Arc::new(Queue::new());
        let heartbeats = Arc::new(Heartbeats::default());
        let (changed, seen, nodes) = (queue.clone(), heartbeats.clone(), cx.nodes.clone());
        cx.nodes.on_change(move |change| {
            let Some(node) = change.object() else { return };
            match &change.new {
                Some(new) => seen.status(new),
                None => seen.forget(name(&node.metadata)),
            }
            changed.add(name(&node.metadata).to_owned());
            // Whether pods of a lost node are evicted depends on how many others are lost.
            let ready = |node: &Option<Arc<Node>>| node.as_deref().map(node::is_ready);
            if ready(&change.old) != ready(&change.new) {
                for other in nodes.list().iter().filter(|other| !node::is_ready(other)) {
                    changed.add(name(&other.metadata).to_owned());
                }
            }
        });
        let (changed, seen, nodes) = (queue.clone(), heartbeats.clone(), cx.nodes.clone());
        cx.node_leases.on_change(move |change| {
            let Some(lease) = &change.new else { return };
            seen.lease(lease);
            // A renewal of a healthy node only moves its deadline, which is looked at when it comes.
            let node = nodes.get("", name(&lease.metadata));
            if node.is_some_and(|node| health::is_unknown(&node)) {
                changed.add(name(&lease.metadata).to_owned());
            }
        });
        let (changed, nodes) = (queue.clone(), cx.nodes.clone());
        cx.pods.on_change(move |change| {
            let Some(new) = &change.new else { return };
            let node = pod::node_name(new);
            if !node.is_empty() && nodes.get("", node).is_some_and(|node| evict::drives_out(&node))
            {
                changed.add(node.to_owned());
            }
        });
        let events = cx.recorder("node-controller");
        (Arc::new(Self { cx, heartbeats, events }), queue)
    }

    /// Writes conditions and taints; the node as it is then.
    async fn write(&self, node: &Node, silent: bool) -> Result<Node, Failure> {
        let api = self.cx.api::<Node>("");
        let node_name = name(&node.metadata);
        let now = Timestamp::now();
        let mut current = node.clone();
        if silent && let Some(status) = health::unknown_status(&current, now) {
            current.status = Some(status);
            current = api
                .replace_status(node_name, &current)
                .await
                .step(|| "write that the node is silent".to_owned())?;
            warn!(node = node_name, "the node stopped reporting");
            let message = format!("Node {node_name} status is now: NodeNotReady");
            self.events.event(&reference(node), "Normal", "NodeNotReady", &message);
        }
        if let Some(taints) = health::desired_taints(&current, now) {
            let patch = json!({ "metadata": { "resourceVersion": current.metadata.resource_version },
                                "spec": { "taints": taints } });
            current = api
                .patch(node_name, &Patch::Merge(patch))
                .await
                .step(|| "write the node's taints".to_owned())?;
            let keys: Vec<_> = taints.iter().map(|taint| taint.key.as_str()).collect();
            info!(node = node_name, taints = keys.join(","), "taints changed");
        }
        Ok(current)
    }

    /// Pods of a silent node are not ready, whatever they said last.
    async fn mark_not_ready(&self, pods: &[Arc<Pod>]) -> Result<(), Failure> {
        let outcomes = join_all(pods.iter().map(|pod| async move {
            let Some(status) = health::not_ready_status(pod, Timestamp::now()) else {
                return Ok(());
            };
            let changed = Pod { status: Some(status), ..Pod::clone(pod) };
            let api = self.cx.api::<Pod>(namespace(&pod.metadata));
            gone_is_fine(api.replace_status(name(&pod.metadata), &changed)).await
        }))
        .await;
        outcomes.into_iter().collect::<Result<(), _>>().step(|| "mark a pod not ready".to_owned())
    }

    async fn evict(&self, pod: &Pod, lost: bool) -> Result<(), Failure> {
        let force = lost && self.cx.options.force_delete_lost_pods;
        if pod::is_terminating(pod) && !force {
            return Ok(());
        }
        let api = self.cx.api::<Pod>(namespace(&pod.metadata));
        let params = DeleteParams {
            grace_period_seconds: force.then_some(0),
            precondition_uid: pod.metadata.uid.clone(),
            ..DeleteParams::default()
        };
        gone_is_fine(api.delete(name(&pod.metadata), &params))
            .await
            .step(|| format!("evict pod {}", name(&pod.metadata)))?;
        let (ns, pod_name) = (namespace(&pod.metadata), name(&pod.metadata));
        info!(pod = format!("{ns}/{pod_name}"), node = pod::node_name(pod), force, "evicted");
        let message = format!("Marking for deletion Pod {ns}/{pod_name}");
        self.events.event(&reference(pod), "Normal", "TaintManagerEviction", &message);
        Ok(())
    }
}

impl Reconciler for Nodes {
    type Error = Failure;
    const NAME: &'static str = "node-lifecycle";

    async fn reconcile(&self, key: &str) -> Result<Action, Failure> {
        let Some(node) = self.cx.nodes.get("", key) else { return Ok(Action::done()) };
        let options = &self.cx.options;
        // A node that was there before us has its whole time from our start on.
        let last = self.heartbeats.last(key).unwrap_or_else(Instant::now);
        let grace = if node::condition(&node, "Ready").is_some() {
            options.node_grace
        } else {
            options.node_startup_grace
        };
        let silent_for = last.elapsed();
        let silent = silent_for >= grace;
        let node = self.write(&node, silent).await?;
        let mut next = (!silent).then(|| grace - silent_for + MARGIN);
        if !evict::drives_out(&node) && !health::is_unknown(&node) {
            return Ok(next.map_or(Action::done(), Action::requeue));
        }
        let pods = self.cx.pods.list().into_iter();
        let pods: Vec<_> = pods.filter(|one| pod::node_name(one) == key).collect();
        let unknown = health::is_unknown(&node);
        if unknown {
            self.mark_not_ready(&pods).await?;
        }
        if evict::is_disrupted(&self.cx.nodes.list()) {
            // Rather our view of the nodes is broken than so many nodes: see `is_disrupted`. A node that comes back
            // wakes us.
            return Ok(next.map_or(Action::done(), Action::requeue));
        }
        let now = Timestamp::now();
        for pod in &pods {
            match evict::plan(&node, pod, options.eviction_after, now) {
                evict::Step::Stay => {}
                evict::Step::Evict => self.evict(pod, unknown).await?,
                evict::Step::Later(wait) => {
                    let wait = wait + MARGIN;
                    next = Some(next.map_or(wait, |next| next.min(wait)));
                }
            }
        }
        Ok(next.map_or(Action::done(), Action::requeue))
    }
}
