//! Maintenance of nodes: `cordon`, `uncordon`, `drain`, `taint`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use orch_client::Client;
use serde_json::{Value, json};

use crate::kube::wire;
use crate::{output, progress};

/// What marks a pod that stands in a manifest on its node: it cannot be evicted.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Between two tries of an eviction that a budget forbids.
const RETRY: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
#[command(after_help = "Example: orchctl cordon node-1")]
pub(crate) struct NodeFlag {
    node: String,
}

#[derive(clap::Args)]
#[command(after_help = "Example: orchctl drain node-1 --ignore-daemonsets --timeout 5m\n\
    `orchctl uncordon node-1` lets pods back.")]
pub(crate) struct DrainFlags {
    node: String,
    /// Leave pods of DaemonSets where they are, instead of refusing
    #[arg(long)]
    ignore_daemonsets: bool,
    /// Also end pods that nobody is going to start elsewhere
    #[arg(long)]
    force: bool,
    /// Also end pods with data in emptyDir volumes, which is lost
    #[arg(long)]
    delete_emptydir_data: bool,
    /// Seconds that each pod gets to end; without it, what the pod says
    #[arg(long, value_name = "SECONDS")]
    grace_period: Option<u32>,
    /// How long to wait for all of them
    #[arg(long, default_value = "5m", value_parser = duration)]
    timeout: Duration,
}

#[derive(clap::Args)]
#[command(
    after_help = "Example: orchctl taint node-1 dedicated=db:NoSchedule\n         orchctl taint node-1 dedicated-"
)]
pub(crate) struct TaintFlags {
    node: String,
    /// `KEY[=VALUE]:EFFECT` adds or changes, `KEY[:EFFECT]-` removes
    #[arg(required = true)]
    taints: Vec<String>,
}

fn duration(text: &str) -> Result<Duration, String> {
    crate::kube::parse_duration(text)
}

fn path(node: &str) -> String {
    format!("/api/v1/nodes/{}", wire::encode(node))
}

/// Sets `spec.unschedulable`.
pub(crate) async fn cordon(client: &Client, flags: &NodeFlag, on: bool) -> anyhow::Result<()> {
    let patch = json!({ "spec": { "unschedulable": on.then_some(true) } });
    wire::send(client, http::Method::PATCH, &path(&flags.node), wire::MERGE_PATCH, &patch).await?;
    eprintln!("node/{} {}", flags.node, if on { "cordoned" } else { "uncordoned" });
    Ok(())
}

/// What becomes of a pod when its node is drained.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Evict,
    Stay,
    Refuse(&'static str),
}

fn fate(pod: &Value, flags: &DrainFlags) -> Fate {
    let owner = pod["metadata"]["ownerReferences"]
        .as_array()
        .and_then(|owners| owners.iter().find(|owner| owner["controller"] == true));
    if pod["metadata"]["annotations"][MIRROR].is_string() {
        return Fate::Stay;
    }
    if matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")) {
        return Fate::Evict;
    }
    if owner.is_some_and(|owner| owner["kind"] == "DaemonSet") {
        return if flags.ignore_daemonsets {
            Fate::Stay
        } else {
            Fate::Refuse("it belongs to a DaemonSet (--ignore-daemonsets)")
        };
    }
    if owner.is_none() && !flags.force {
        return Fate::Refuse("nobody would start it elsewhere (--force)");
    }
    let volumes = pod["spec"]["volumes"].as_array();
    let has_data = volumes.into_iter().flatten().any(|volume| volume["emptyDir"].is_object());
    if has_data && !flags.delete_emptydir_data {
        return Fate::Refuse("it has data in an emptyDir (--delete-emptydir-data)");
    }
    Fate::Evict
}

fn named(pod: &Value) -> (String, String, String) {
    let text = |key: &str| pod["metadata"][key].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"), text("uid"))
}

/// Cordons the node and evicts its pods.
pub(crate) async fn drain(client: &Client, flags: &DrainFlags) -> anyhow::Result<()> {
    cordon(client, &NodeFlag { node: flags.node.clone() }, true).await?;
    let selector = wire::encode(&format!("spec.nodeName={}", flags.node));
    let list = wire::get(client, &format!("/api/v1/pods?fieldSelector={selector}")).await?;
    let pods: Vec<Value> = list["items"].as_array().cloned().unwrap_or_default();
    let mut refused = Vec::new();
    let mut leaving = Vec::new();
    for pod in &pods {
        match fate(pod, flags) {
            Fate::Stay => {}
            Fate::Evict => leaving.push(named(pod)),
            Fate::Refuse(why) => {
                let (namespace, name, _) = named(pod);
                refused.push(format!("{namespace}/{name}: {why}"));
            }
        }
    }
    if !refused.is_empty() {
        return Err(output::hinted(
            format!("the node stays cordoned; `orchctl uncordon {}` undoes that", flags.node),
            format!("some pods cannot be moved:\n  {}", refused.join("\n  ")),
        ));
    }
    let deadline = tokio::time::Instant::now() + flags.timeout;
    let total = leaving.len();
    let mut step = progress::Step::new(format!("drain {}", flags.node));
    for pod in &leaving {
        evict(client, pod, flags, deadline, &mut step).await?;
    }
    while let Some(left) = still_there(client, &leaving).await? {
        if tokio::time::Instant::now() > deadline {
            step.failed();
            bail!("still there after {} s: {left}", flags.timeout.as_secs());
        }
        step.waiting(&left);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    step.done(&format!("{total} pods moved"));
    Ok(())
}

async fn evict(
    client: &Client,
    (namespace, name, uid): &(String, String, String),
    flags: &DrainFlags,
    deadline: tokio::time::Instant,
    step: &mut progress::Step,
) -> anyhow::Result<()> {
    let mut options = json!({ "preconditions": { "uid": uid } });
    if let Some(seconds) = flags.grace_period {
        options["gracePeriodSeconds"] = json!(seconds);
    }
    let body = json!({ "apiVersion": "policy/v1", "kind": "Eviction",
                       "metadata": { "namespace": namespace, "name": name }, "deleteOptions": options });
    let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/eviction");
    loop {
        let error = match wire::send(client, http::Method::POST, &path, wire::JSON, &body).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        let code = match error.downcast_ref::<orch_client::Error>() {
            Some(orch_client::Error::Api { code, .. }) => *code,
            _ => 0,
        };
        match code {
            // Gone, or another one by now.
            404 | 409 => return Ok(()),
            429 if tokio::time::Instant::now() < deadline => {
                step.waiting(&format!("{namespace}/{name}: {error:#}"));
                tokio::time::sleep(RETRY).await;
            }
            _ => return Err(error).with_context(|| format!("evict {namespace}/{name}")),
        }
    }
}

/// The first of the pods that has not ended.
async fn still_there(
    client: &Client,
    pods: &[(String, String, String)],
) -> anyhow::Result<Option<String>> {
    for (namespace, name, uid) in pods {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
        if let Some(found) = wire::get_opt(client, &path).await?
            && found["metadata"]["uid"] == *uid
        {
            return Ok(Some(format!("{namespace}/{name}")));
        }
    }
    Ok(None)
}

#[derive(Debug, PartialEq, Eq)]
enum TaintChange {
    Put { key: String, value: String, effect: String },
    Remove { key: String, effect: Option<String> },
}

const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];

fn parse_taint(text: &str) -> anyhow::Result<TaintChange> {
    let wrong = || {
        output::usage(format!(
            "{text:?} is no taint: write KEY=VALUE:EFFECT or KEY- with an effect of {}",
            EFFECTS.join(", ")
        ))
    };
    let (body, removes) = match text.strip_suffix('-') {
        Some(body) => (body, true),
        None => (text, false),
    };
    let (body, effect) = match body.rsplit_once(':') {
        Some((body, effect)) => (body, Some(effect.to_owned())),
        None => (body, None),
    };
    if effect.as_deref().is_some_and(|effect| !EFFECTS.contains(&effect)) {
        return Err(wrong());
    }
    let (key, value) = body.split_once('=').unwrap_or((body, ""));
    if key.is_empty() {
        return Err(wrong());
    }
    match (removes, effect) {
        (true, effect) => Ok(TaintChange::Remove { key: key.to_owned(), effect }),
        (false, Some(effect)) => {
            Ok(TaintChange::Put { key: key.to_owned(), value: value.to_owned(), effect })
        }
        (false, None) => Err(wrong()),
    }
}

/// Pure: the taints after the changes.
fn changed(before: &[Value], changes: &[TaintChange]) -> Vec<Value> {
    let mut taints = before.to_vec();
    for change in changes {
        match change {
            TaintChange::Put { key, value, effect } => {
                taints.retain(|taint| taint["key"] != *key || taint["effect"] != *effect);
                let mut taint = json!({ "key": key, "effect": effect });
                if !value.is_empty() {
                    taint["value"] = json!(value);
                }
                taints.push(taint);
            }
            TaintChange::Remove { key, effect } => taints.retain(|taint| {
                taint["key"] != *key
                    || effect.as_ref().is_some_and(|effect| taint["effect"] != *effect)
            }),
        }
    }
    taints
}

/// Changes the taints of a node.
pub(crate) async fn taint(client: &Client, flags: &TaintFlags) -> anyhow::Result<()> {
    let changes: Vec<TaintChange> =
        flags.taints.iter().map(|text| parse_taint(text)).collect::<Result<_, _>>()?;
    let node = wire::get(client, &path(&flags.node)).await?;
    let before = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    let after = changed(&before, &changes);
    if after == before {
        eprintln!("node/{} has these taints already", flags.node);
        return Ok(());
    }
    // The version guards against a change by somebody else meanwhile.
    let patch = json!({ "metadata": { "resourceVersion": node["metadata"]["resourceVersion"] },
                        "spec": { "taints": if after.is_empty() { Value::Null } else { json!(after) } } });
    wire::send(client, http::Method::PATCH, &path(&flags.node), wire::MERGE_PATCH, &patch).await?;
    eprintln!("node/{} tainted", flags.node);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> DrainFlags {
        DrainFlags {
            node: "a".to_owned(),
            ignore_daemonsets: false,
            force: false,
            delete_emptydir_data: false,
            grace_period: None,
            timeout: Duration::from_secs(1),
        }
    }

    #[test]
    fn a_pod_is_moved_only_when_somebody_starts_it_elsewhere() {
        let owned = |kind: &str| json!({ "metadata": { "ownerReferences": [{ "kind": kind, "controller": true }] } });
        assert_eq!(fate(&owned("ReplicaSet"), &flags()), Fate::Evict);
        assert!(matches!(fate(&json!({ "metadata": {} }), &flags()), Fate::Refuse(_)));
        assert_eq!(
            fate(&json!({ "metadata": {}, "status": { "phase": "Succeeded" } }), &flags()),
            Fate::Evict
        );
        assert!(matches!(fate(&owned("DaemonSet"), &flags()), Fate::Refuse(_)));
        let lenient = DrainFlags { ignore_daemonsets: true, force: true, ..flags() };
        assert_eq!(fate(&owned("DaemonSet"), &lenient), Fate::Stay);
        assert_eq!(fate(&json!({ "metadata": {} }), &lenient), Fate::Evict);
        let mut data = owned("ReplicaSet");
        data["spec"]["volumes"] = json!([{ "name": "x", "emptyDir": {} }]);
        assert!(matches!(fate(&data, &lenient), Fate::Refuse(_)));
    }

    #[test]
    fn taints_are_put_changed_and_removed() {
        let put = parse_taint("a=b:NoSchedule").expect("a taint");
        let one = changed(&[], &[put]);
        assert_eq!(one, [json!({ "key": "a", "effect": "NoSchedule", "value": "b" })]);
        let other = changed(&one, &[parse_taint("a=c:NoSchedule").expect("a taint")]);
        assert_eq!((other.len(), &other[0]["value"]), (1, &json!("c")));
        let two = changed(&one, &[parse_taint("a:NoExecute").expect("a taint")]);
        assert_eq!(two.len(), 2);
        assert_eq!(changed(&two, &[parse_taint("a:NoExecute-").expect("removal")]), one);
        assert!(changed(&two, &[parse_taint("a-").expect("removal")]).is_empty());
        for wrong in ["", "a", "a=b", "=b:NoSchedule", "a=b:Never", "-"] {
            assert!(parse_taint(wrong).is_err(), "{wrong}");
        }
    }
}
