//! The Node object: registration, status and heartbeat.
//!
//! [`machine`] reads what the node offers, [`status`] turns it into the object purely, [`heartbeat`] renews the
//! Lease. Registration goes on for as long as the API server is away, and anew when somebody deleted the Node.

pub(crate) mod heartbeat;
pub(crate) mod machine;
pub(crate) mod status;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use orch_api::k8s_openapi::api::core::v1::Node;
use orch_client::{Api, Error, Patch};
use orch_cri::{EngineInfo, Image};
use serde_json::{Value, json};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::context::Context;
use crate::node::status::Health;

/// Images that the status names (kubelet's nodeStatusMaxImages).
const MAX_IMAGES: usize = 50;

/// Keeps the Node object true, for ever.
///
/// # Cancel safety
/// A request that is dropped may or may not have reached the server; the next run looks again.
pub(crate) async fn run(cx: Arc<Context>) {
    let mut reported: Option<(Instant, bool)> = None;
    let mut engine = None;
    let mut failing = false;
    let mut check = tokio::time::interval(cx.options.status_check);
    check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Until the node is Ready for the first time, people wait for it.
    let mut eager = tokio::time::interval(EAGER);
    eager.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let ready = reported.is_some_and(|(_, ready)| ready);
        tokio::select! {
            _ = check.tick() => {}
            _ = eager.tick(), if !ready => {}
        }
        let overdue = reported.is_none_or(|(at, _)| at.elapsed() >= cx.options.status_report);
        match sync(&cx, &mut engine, overdue).await {
            Ok(written) => {
                failing = false;
                reported = written.map(|ready| (Instant::now(), ready)).or(reported);
            }
            // Once is enough for a person to act on; it is tried again twice a second.
            Err(error) if failing => debug!(%error, "node status not written"),
            Err(error) => {
                failing = true;
                warn!(%error, "node status not written");
            }
        }
    }
}

const EAGER: Duration = Duration::from_millis(500);
/// How long an engine may be away before the node says that it is not ready (kubelet's baseRuntimeSyncThreshold).
const ENGINE_PATIENCE: Duration = Duration::from_secs(30);
/// An engine that takes longer to say what it is counts as away.
const ENGINE_LIMIT: Duration = Duration::from_secs(10);

/// Looks, and writes what changed, or everything when it is `overdue`. Returns whether the node is Ready if something
/// was written.
async fn sync(
    cx: &Context,
    engine: &mut Option<Engine>,
    overdue: bool,
) -> Result<Option<bool>, Error> {
    let health = health(cx, engine).await;
    let nodes = Api::<Node>::all(cx.client());
    let name = &cx.options.node_name;
    let current = match nodes.get_opt(name).await? {
        Some(node) => node,
        None => {
            let node = status::node(&cx.options, &cx.machine, &health, None, Timestamp::now());
            match nodes.create(&node).await {
                Ok(node) => {
                    info!(node = name, "registered");
                    cx.events.node(
                        "Normal",
                        "RegisteredNode",
                        &format!("Node {name} registered by its agent"),
                    );
                    node
                }
                Err(error) if error.is_already_exists() => nodes.get(name).await?,
                Err(error) => return Err(error),
            }
        }
    };
    let wanted = status::node(&cx.options, &cx.machine, &health, Some(&current), Timestamp::now());
    let labels = missing_labels(&current, &wanted);
    if let Some(labels) = labels {
        nodes.patch(name, &Patch::Merge(json!({ "metadata": { "labels": labels } }))).await?;
    }
    if !overdue && status::is_same(&current, &wanted) {
        return Ok(None);
    }
    let ready = orch_api::node::is_ready(&wanted);
    if ready != orch_api::node::is_ready(&current) {
        let reason = if ready { "NodeReady" } else { "NodeNotReady" };
        cx.events.node("Normal", reason, &format!("Node {name} status is now: {reason}"));
    }
    nodes.patch_status(name, &Patch::Strategic(json!({ "status": wanted.status }))).await?;
    Ok(Some(ready))
}

fn missing_labels(current: &Node, wanted: &Node) -> Option<Value> {
    let have = current.metadata.labels.clone().unwrap_or_default();
    let missing: serde_json::Map<String, Value> = wanted
        .metadata
        .labels
        .iter()
        .flatten()
        .filter(|(key, value)| have.get(*key) != Some(*value))
        .map(|(key, value)| (key.clone(), Value::String(value.clone())))
        .collect();
    (!missing.is_empty()).then_some(Value::Object(missing))
}

/// What the engine last said of itself, and when.
struct Engine {
    at: Instant,
    said: (EngineInfo, Vec<Image>),
}

/// A look at the engine, or for [`ENGINE_PATIENCE`] after it went away the last one: containers mostly outlive a restart
/// of their engine, and a node that is not ready loses its pods.
fn believed(
    known: &mut Option<Engine>,
    look: Result<(EngineInfo, Vec<Image>), String>,
    now: Instant,
) -> Result<(EngineInfo, Vec<Image>), String> {
    match (look, known) {
        (Ok(said), known) => {
            *known = Some(Engine { at: now, said: said.clone() });
            Ok(said)
        }
        (Err(_), Some(last)) if now - last.at < ENGINE_PATIENCE => Ok(last.said.clone()),
        (Err(error), _) => Err(error),
    }
}

async fn health(cx: &Context, known: &mut Option<Engine>) -> Health {
    let look = async {
        let info = cx.runtime().info().await?;
        let mut images = cx.runtime().images().await.unwrap_or_default();
        images.sort_by_key(|image| std::cmp::Reverse(image.size_bytes));
        images.truncate(MAX_IMAGES);
        Ok((info, images))
    };
    let engine = match tokio::time::timeout(ENGINE_LIMIT, look).await {
        Ok(outcome) => outcome.map_err(|error: orch_cri::Error| error.to_string()),
        Err(_) => Err(format!(
            "the container engine gave no answer within {ENGINE_LIMIT:?}; look at its log"
        )),
    };
    let engine = believed(known, engine, Instant::now());
    let root = match &engine {
        Ok((info, _)) => info.data_root.clone(),
        Err(_) => String::new(),
    };
    Health {
        engine,
        network: cx.network.ready().await,
        pressure: machine::Pressure::read(&cx.options.paths.lib(), &root),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_stays_ready_while_its_engine_is_away_for_less_than_half_a_minute() {
        let info = EngineInfo { name: "docker".to_owned(), ..EngineInfo::default() };
        let away = || Err("it is away".to_owned());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut known = None;
        assert!(believed(&mut known, away(), at(0)).is_err(), "it was never there");
        assert!(believed(&mut known, Ok((info.clone(), Vec::new())), at(1)).is_ok());
        assert_eq!(believed(&mut known, away(), at(30)), Ok((info, Vec::new())));
        assert_eq!(believed(&mut known, away(), at(31)), Err("it is away".to_owned()));
    }
}
