//! The pods of this node, as the API server has them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_client::{Api, Client, Error, ListParams, WatchEvent};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// How long one watch lasts; the server may end it earlier. Short, because a watch whose connection broke without a
/// word looks like one on which nothing happens.
const WATCH_SECS: u32 = 60;
/// A watch that is silent for this long beyond its end is broken.
const OVERTIME: Duration = Duration::from_secs(10);
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// All pods of the node by UID. None until the first list came: "no pods" must not be taken for "not known".
pub(crate) type Pods = Option<Arc<BTreeMap<String, Arc<Pod>>>>;

/// Keeps the map up to date until cancelled. What was known stays known while the API server is away.
pub(crate) async fn run(
    client: Client,
    node: String,
    out: watch::Sender<Pods>,
    stop: CancellationToken,
) {
    let api = Api::<Pod>::all(client);
    let params = ListParams {
        field_selector: Some(format!("spec.nodeName={node}")),
        ..ListParams::default()
    };
    let mut delay = FIRST_DELAY;
    while !stop.is_cancelled() {
        let outcome = tokio::select! {
            () = stop.cancelled() => return,
            outcome = follow(&api, &params, &out, &mut delay) => outcome,
        };
        match outcome {
            Ok(()) => debug!("list pods again"),
            Err(error) => warn!(%error, retry_in = ?delay, "pods not read"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(delay) => delay = (delay * 2).min(LONGEST_DELAY),
        }
    }
}

/// Lists, then watches for as long as the server has the history.
async fn follow(
    api: &Api<Pod>,
    params: &ListParams,
    out: &watch::Sender<Pods>,
    delay: &mut Duration,
) -> Result<(), Error> {
    let list = api.list(params).await?;
    let mut pods: BTreeMap<String, Arc<Pod>> = BTreeMap::new();
    for pod in list.items {
        pods.insert(uid(&pod), Arc::new(pod));
    }
    let mut version = list.resource_version;
    out.send_replace(Some(Arc::new(pods.clone())));
    *delay = FIRST_DELAY;
    loop {
        let mut events = match api.watch(params, &version, WATCH_SECS).await {
            Ok(events) => Box::pin(events),
            Err(error) if error.is_gone() => return Ok(()),
            Err(error) => return Err(error),
        };
        let before = version.clone();
        let limit = Instant::now() + Duration::from_secs(WATCH_SECS.into()) + OVERTIME;
        while let Ok(Some(event)) = tokio::time::timeout_at(limit, events.next()).await {
            match event {
                Ok(WatchEvent::Added(pod) | WatchEvent::Modified(pod)) => {
                    version = pod.metadata.resource_version.clone().unwrap_or(version);
                    pods.insert(uid(&pod), Arc::new(pod));
                }
                Ok(WatchEvent::Deleted(pod)) => {
                    version = pod.metadata.resource_version.clone().unwrap_or(version);
                    pods.remove(&uid(&pod));
                }
                Ok(WatchEvent::Bookmark { resource_version, .. }) => {
                    version = resource_version;
                    continue;
                }
                Err(error) if error.is_gone() => return Ok(()),
                Err(error) => return Err(error),
            }
            *delay = FIRST_DELAY;
            out.send_replace(Some(Arc::new(pods.clone())));
        }
        if version == before {
            // A server that ends watches at once must not be asked in a tight loop.
            tokio::time::sleep(*delay).await;
        }
    }
}

fn uid(pod: &Pod) -> String {
    pod.metadata.uid.clone().unwrap_or_default()
}
