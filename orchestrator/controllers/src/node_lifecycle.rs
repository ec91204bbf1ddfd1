//! Nodes that fall silent: their conditions, taints, and the pods on them.
//!
//! A node lives as long as its Lease is renewed or its status reported. When both stop for the grace period, its
//! conditions become Unknown, its pods not ready (so no Service sends traffic there), and taints keep new pods away
//! and drive the others out when their tolerations end. Times are those at which *we* saw something change: the clocks
//! of nodes are not compared with ours.
//!
//! Time in which this process saw nothing at all (it was stopped, or the store was) does not count against a node
//! ([`pulse`]), and when all nodes are lost at once, nothing is evicted until the first is back and the others had
//! their time to follow it ([`evict::Zone`]).
//!
//! Upstream leaves pods of a lost node in the API until the node is back or its object deleted, for it cannot know
//! whether they still run. With [`crate::Options::force_delete_lost_pods`] they are removed, and replaced at once.

mod evict;
mod health;
mod pulse;
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
use health::Driving;

/// A margin, so that a look at a deadline comes after it.
const MARGIN: Duration = Duration::from_millis(20);

/// The last sign of life of a node: what it was, and when we saw it.
#[derive(Debug, Clone)]
struct Seen {
    renewed: Option<Timestamp>,
    reported: Option<Timestamp>,
    at: Instant,
}

#[derive(Debug)]
struct Heartbeats {
    by_node: Mutex<HashMap<String, Seen>>,
    /// When the store last answered us.
    pulse: Mutex<Instant>,
}

impl Heartbeats {
    fn new() -> Self {
        Self { by_node: Mutex::default(), pulse: Mutex::new(Instant::now()) }
    }

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

    /// The store has answered. Time in which it did not, and nothing could be heard of any node, is given back.
    fn pulse(&self) {
        let now = Instant::now();
        let mut last = self.pulse.lock();
        if let Some(lost) = pulse::pause(now - *last) {
            warn!(?lost, "nothing was seen for a while; that does not count against the nodes");
            for seen in self.by_node.lock().values_mut() {
                seen.at = (seen.at + lost).min(now);
            }
        }
        *last = now;
    }

    /// Whether the silence of a node would mean anything: we could have heard it.
    fn can_hear(&self) -> bool {
        pulse::pause(self.pulse.lock().elapsed()).is_none()
    }
}

pub(crate) struct Nodes {
    cx: Arc<Context>,
    heartbeats: Arc<Heartbeats>,
    events: EventRecorder,
    disruption: Mutex<Disruption>,
}

/// What is remembered of the time when no node was alive.
#[derive(Debug, Default)]
struct Disruption {
    full: bool,
    /// Until then no node begins to lose its pods: all had to have their time to come back.
    calm_until: Option<Instant>,
}

impl Disruption {
    /// What may be done to lost nodes now, and when that may be another thing.
    fn see(
        &mut self,
        zone: evict::Zone,
        now: Instant,
        grace: Duration,
    ) -> (Driving, Option<Duration>) {
        if zone == evict::Zone::Full {
            if !std::mem::replace(&mut self.full, true) {
                warn!("no node is alive: nothing is evicted until one is");
            }
            return (Driving::Stop, None);
        }
        if std::mem::replace(&mut self.full, false) {
            info!(?grace, "a node is alive again; the others have this long to follow it");
            self.calm_until = Some(now + grace);
        }
        match self.calm_until.map(|until| until.saturating_duration_since(now)) {
            Some(left) if !left.is_zero() => (Driving::Continue, Some(left)),
            _ if zone == evict::Zone::Partial => (Driving::Continue, None),
            _ => (Driving::Begin, None),
        }
    }
}

impl Nodes {
    pub(crate) fn new(cx: Arc<Context>) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue: Arc<Queue<String>> = Arc::new(Queue::new());
        let heartbeats = Arc::new(Heartbeats::new());
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
        let disruption = Mutex::default();
        (Arc::new(Self { cx, heartbeats, events, disruption }), queue)
    }

    /// Looks after pauses of this process and of the store, until dropped.
    pub(crate) async fn listen_for_pauses(self: Arc<Self>) {
        pulse::run(&self.cx, || self.heartbeats.pulse()).await;
    }

    /// How long a node may be silent.
    fn grace(&self, node: &Node) -> Duration {
        let options = &self.cx.options;
        if node::condition(node, "Ready").is_some() {
            options.node_grace
        } else {
            options.node_startup_grace
        }
    }

    /// Writes conditions and taints; the node as it is then, and when the taints may have to be others without a change of
    /// the node.
    async fn write(&self, node: &Node, silent: bool) -> Result<(Node, Option<Duration>), Failure> {
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
        // The change above is not in the cache yet.
        let mut all = self.cx.nodes.list();
        if let Some(own) = all.iter_mut().find(|own| name(&own.metadata) == node_name) {
            *own = Arc::new(current.clone());
        }
        let grace = self.cx.options.node_grace;
        let zone = evict::zone(&all, |other| {
            let last = self.heartbeats.last(name(&other.metadata));
            last.is_some_and(|last| last.elapsed() >= self.grace(other))
        });
        let (driving, other_in) = self.disruption.lock().see(zone, Instant::now(), grace);
        if let Some(taints) = health::desired_taints(&current, driving, now) {
            let patch = json!({ "metadata": { "resourceVersion": current.metadata.resource_version },
                                "spec": { "taints": taints } });
            current = api
                .patch(node_name, &Patch::Merge(patch))
                .await
                .step(|| "write the node's taints".to_owned())?;
            let keys: Vec<_> = taints.iter().map(|taint| taint.key.as_str()).collect();
            info!(node = node_name, taints = keys.join(","), "taints changed");
        }
        Ok((current, other_in))
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
        let grace = self.grace(&node);
        let silent_for = last.elapsed();
        let silent = silent_for >= grace;
        if silent && !self.heartbeats.can_hear() {
            return Ok(Action::requeue(pulse::PERIOD));
        }
        let (node, other_in) = self.write(&node, silent).await?;
        let mut next = (!silent).then(|| grace - silent_for + MARGIN);
        if let Some(wait) = other_in.filter(|_| !node::is_ready(&node)) {
            next = Some(next.map_or(wait + MARGIN, |next| next.min(wait + MARGIN)));
        }
        if !evict::drives_out(&node) && !health::is_unknown(&node) {
            return Ok(next.map_or(Action::done(), Action::requeue));
        }
        let pods = self.cx.pods.list().into_iter();
        let pods: Vec<_> = pods.filter(|one| pod::node_name(one) == key).collect();
        let unknown = health::is_unknown(&node);
        if unknown {
            self.mark_not_ready(&pods).await?;
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
