//! Pods that nobody will end: those of nodes that do not exist any more, and very many finished ones.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use orch_api::{meta, pod};
use orch_client::DeleteParams;
use orch_reconcile::{Action, Queue, Reconciler};
use tracing::info;

use crate::context::{Context, name, namespace};
use crate::error::{Failure, Step as _, gone_is_fine};

/// Finished pods that are kept for their logs and states (upstream's terminated-pod-gc-threshold).
const FINISHED_MOST: usize = 12_500;
/// The key that stands for finished pods; no node has this name.
const FINISHED: &str = "/finished";

/// Keyed by node name.
pub(crate) struct PodGc {
    cx: Arc<Context>,
}

impl PodGc {
    pub(crate) fn new(cx: Arc<Context>) -> (Arc<Self>, Arc<Queue<String>>) {
        let queue: Arc<Queue<String>> = Arc::new(Queue::new());
        let quarantine = cx.options.pod_gc_quarantine;
        let changed = queue.clone();
        cx.nodes.on_change(move |change| {
            if let (Some(old), None) = (&change.old, &change.new) {
                changed.add_after(name(&old.metadata).to_owned(), quarantine);
            }
        });
        let (changed, nodes) = (queue.clone(), cx.nodes.clone());
        cx.pods.on_change(move |change| {
            let Some(new) = &change.new else { return };
            let node = pod::node_name(new);
            if !node.is_empty() && nodes.get("", node).is_none() {
                changed.add_after(node.to_owned(), quarantine);
            }
            let was = change.old.as_ref().is_some_and(|old| pod::is_terminal(old));
            if pod::is_terminal(new) && !was {
                changed.add(FINISHED.to_owned());
            }
        });
        (Arc::new(Self { cx }), queue)
    }

    async fn delete(&self, pod: &Pod) -> Result<(), Failure> {
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            precondition_uid: pod.metadata.uid.clone(),
            ..DeleteParams::default()
        };
        let api = self.cx.api::<Pod>(namespace(&pod.metadata));
        gone_is_fine(api.delete(name(&pod.metadata), &params))
            .await
            .step(|| format!("delete pod {}", meta::key(&pod.metadata)))
    }
}

impl Reconciler for PodGc {
    type Error = Failure;
    const NAME: &'static str = "pod-gc";

    async fn reconcile(&self, key: &str) -> Result<Action, Failure> {
        if key == FINISHED {
            for pod in superfluous(self.cx.pods.list(), FINISHED_MOST) {
                self.delete(&pod).await?;
            }
            return Ok(Action::done());
        }
        if self.cx.nodes.get("", key).is_some() {
            return Ok(Action::done());
        }
        let of_node: Vec<_> =
            self.cx.pods.list().into_iter().filter(|one| pod::node_name(one) == key).collect();
        if of_node.is_empty() {
            return Ok(Action::done());
        }
        let live = self.cx.api::<Node>("").get_opt(key).await;
        if live.step(|| format!("look for node {key}"))?.is_some() {
            return Ok(Action::done());
        }
        for pod in of_node {
            self.delete(&pod).await?;
            info!(pod = meta::key(&pod.metadata), node = key, "its node is gone: deleted");
        }
        Ok(Action::done())
    }
}

/// The oldest finished pods beyond `most`.
fn superfluous(pods: Vec<Arc<Pod>>, most: usize) -> Vec<Arc<Pod>> {
    let finished =
        pods.into_iter().filter(|one| pod::is_terminal(one) && !pod::is_terminating(one));
    let mut finished: Vec<_> = finished.collect();
    let many = finished.len().saturating_sub(most);
    if many > 0 {
        finished.sort_by_key(|one| one.metadata.creation_timestamp.as_ref().map(|time| time.0));
    }
    finished.truncate(many);
    finished
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_oldest_finished_pods_go_first() {
        let pod = |name: &str, phase: &str, created: &str| -> Arc<Pod> {
            let pod = json!({ "metadata": { "name": name, "creationTimestamp": created },
                              "spec": { "containers": [] }, "status": { "phase": phase } });
            Arc::new(serde_json::from_value(pod).expect("a Pod"))
        };
        let pods = vec![
            pod("new", "Failed", "2026-01-03T00:00:00Z"),
            pod("running", "Running", "2026-01-01T00:00:00Z"),
            pod("old", "Succeeded", "2026-01-02T00:00:00Z"),
        ];
        let gone = superfluous(pods.clone(), 1);
        assert_eq!(gone.iter().map(|one| name(&one.metadata)).collect::<Vec<_>>(), ["old"]);
        assert!(superfluous(pods, 2).is_empty());
    }
}
