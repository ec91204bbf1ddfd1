//! `orchctl describe`: one object for people, with its conditions and events.
//!
//! The usual questions of a kind (where does the pod run, why does its container wait) come first; what is left of
//! spec and status follows as YAML, so that nothing is hidden.

use std::fmt::Write as _;

use orch_client::Client;
use serde_json::{Map, Value};

use super::resource::{self, Resource, Resources};
use super::wire::{self, Query};
use crate::output;

#[derive(clap::Args)]
pub(crate) struct Flags {
    /// KIND/NAME, or KIND followed by a name
    what: String,
    name: Option<String>,
    #[command(flatten)]
    namespace: super::NamespaceFlag,
}

pub(crate) async fn run(client: &Client, flags: Flags) -> anyhow::Result<()> {
    let (kind, name) = resource::kind_and_name(&flags.what, flags.name.as_deref())?;
    let resources = Resources::discover(client).await?;
    let resource = resources.find(kind)?;
    let namespace = &flags.namespace.namespace;
    let Some(object) = wire::get_opt(client, &resource.object_path(namespace, name)).await? else {
        return Err(resource.absent(name, namespace));
    };
    let mut query = Query::default();
    query.add("fieldSelector", &format!("involvedObject.uid={}", text(&object["metadata"]["uid"])));
    // Events of objects without a namespace are in `default`.
    let place = object["metadata"]["namespace"].as_str().unwrap_or("default");
    let mut events =
        wire::get(client, &query.append_to(&format!("/api/v1/namespaces/{place}/events"))).await?;
    if resource.kind == "Node" {
        // An agent may report on its Node under the name, without knowing the UID.
        let mut query = Query::default();
        query.add("fieldSelector", &format!("involvedObject.kind=Node,involvedObject.uid={name}"));
        let more = wire::get(client, &query.append_to("/api/v1/namespaces/default/events")).await?;
        if let (Some(all), Some(more)) = (events["items"].as_array_mut(), more["items"].as_array())
        {
            all.extend(more.iter().cloned());
        }
    }
    output::line(render(resource, object, &events["items"], jiff::Timestamp::now()).trim_end())
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Time since `then` in the two largest units, as kubectl prints ages.
pub(crate) fn age(then: &Value, now: jiff::Timestamp) -> String {
    let Some(then) = then.as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok()) else {
        return "<unknown>".to_owned();
    };
    let seconds = (now.as_second() - then.as_second()).max(0);
    match (seconds / 86400, seconds / 3600, seconds / 60) {
        (days, _, _) if days >= 2 => format!("{days}d"),
        (_, hours, _) if hours >= 3 => format!("{hours}h"),
        (_, _, minutes) if minutes >= 3 => format!("{minutes}m"),
        _ => format!("{seconds}s"),
    }
}

fn render(resource: &Resource, mut object: Value, events: &Value, now: jiff::Timestamp) -> String {
    let mut out = String::new();
    let metadata = object["metadata"].take();
    let mut line = |key: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(out, "{:<18}{value}", format!("{key}:"));
        }
    };
    line("Name", text(&metadata["name"]));
    line("Kind", format!("{} ({})", resource.kind, resource.api_version()));
    line("Namespace", text(&metadata["namespace"]));
    line(
        "Created",
        format!(
            "{} ({} ago)",
            text(&metadata["creationTimestamp"]),
            age(&metadata["creationTimestamp"], now)
        ),
    );
    if !metadata["deletionTimestamp"].is_null() {
        line("Terminating", format!("since {}", text(&metadata["deletionTimestamp"])));
    }
    line("Labels", pairs(&metadata["labels"]));
    line("Annotations", pairs(&metadata["annotations"]));
    let owners = metadata["ownerReferences"].as_array().into_iter().flatten();
    let owners: Vec<String> =
        owners.map(|owner| format!("{}/{}", text(&owner["kind"]), text(&owner["name"]))).collect();
    line("Controlled By", owners.join(", "));
    for (key, value) in summary(&resource.kind, &object) {
        line(key, value);
    }
    let conditions =
        object["status"].as_object_mut().and_then(|status| status.remove("conditions"));
    if resource.kind == "Pod" {
        out.push_str(&containers(&object));
    }
    if let Some(fields) = object.as_object_mut() {
        fields.remove("apiVersion");
        fields.remove("kind");
        fields.remove("metadata");
        if resource.kind == "Pod" {
            // Said above, and better.
            fields.remove("status");
        }
        fields.retain(|_, value| !is_empty(value));
        if resource.kind == "Secret" {
            for field in ["data", "stringData"] {
                if let Some(data) = fields.get_mut(field).and_then(Value::as_object_mut) {
                    hide(data);
                }
            }
        }
        if !fields.is_empty()
            && let Ok(yaml) = super::manifest::to_yaml(&Value::Object(fields.clone()))
        {
            out.push_str(yaml.trim_end());
            out.push('\n');
        }
    }
    table(
        &mut out,
        "Conditions",
        &["TYPE", "STATUS", "SINCE", "REASON", "MESSAGE"],
        conditions.as_ref(),
        |condition| {
            let since = &condition["lastTransitionTime"];
            vec![
                text(&condition["type"]),
                text(&condition["status"]),
                age(since, now),
                text(&condition["reason"]),
                text(&condition["message"]),
            ]
        },
    );
    let mut sorted: Vec<Value> = events.as_array().cloned().unwrap_or_default();
    sorted.sort_by_key(|event| text(last_seen(event)));
    table(
        &mut out,
        "Events",
        &["LAST SEEN", "TYPE", "REASON", "COUNT", "FROM", "MESSAGE"],
        Some(&Value::Array(sorted)),
        |event| {
            let from = event["source"]["component"].as_str().filter(|name| !name.is_empty());
            let count =
                event["count"].as_i64().or_else(|| event["series"]["count"].as_i64()).unwrap_or(1);
            vec![
                age(last_seen(event), now),
                text(&event["type"]),
                text(&event["reason"]),
                count.to_string(),
                from.map_or_else(|| text(&event["reportingComponent"]), str::to_owned),
                text(&event["message"]),
            ]
        },
    );
    out
}

fn last_seen(event: &Value) -> &Value {
    [&event["series"]["lastObservedTime"], &event["lastTimestamp"], &event["eventTime"]]
        .into_iter()
        .find(|time| time.is_string())
        .unwrap_or(&event["metadata"]["creationTimestamp"])
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Sizes instead of secrets.
fn hide(data: &mut Map<String, Value>) {
    for value in data.values_mut() {
        let length = value.as_str().map_or(0, |text| text.trim_end_matches('=').len() * 3 / 4);
        *value = Value::String(format!("{length} bytes"));
    }
}

fn pairs(map: &Value) -> String {
    let all = map.as_object().into_iter().flatten();
    let all: Vec<String> = all
        .filter(|(key, _)| *key != "kubectl.kubernetes.io/last-applied-configuration")
        .map(|(key, value)| format!("{key}={}", text(value)))
        .collect();
    all.join("\n                  ")
}

/// What people ask first about a kind.
fn summary(kind: &str, object: &Value) -> Vec<(&'static str, String)> {
    let (spec, status) = (&object["spec"], &object["status"]);
    match kind {
        "Pod" => vec![
            ("Node", format!("{} ({})", text(&spec["nodeName"]), text(&status["hostIP"]))),
            ("Status", text(&status["phase"])),
            (
                "Reason",
                [text(&status["reason"]), text(&status["message"])].join(" ").trim().to_owned(),
            ),
            ("IP", text(&status["podIP"])),
        ],
        "Node" => vec![
            ("Addresses", list(&status["addresses"], |item| text(&item["address"]))),
            ("Pod CIDR", text(&spec["podCIDR"])),
            (
                "Taints",
                list(&spec["taints"], |item| {
                    format!("{}:{}", text(&item["key"]), text(&item["effect"]))
                }),
            ),
        ],
        "Service" => vec![
            ("Type", text(&spec["type"])),
            ("ClusterIP", text(&spec["clusterIP"])),
            (
                "Ports",
                list(&spec["ports"], |port| {
                    let node_port =
                        port["nodePort"].as_i64().map(|number| format!(", node port {number}"));
                    format!(
                        "{}/{} -> {}{}",
                        text(&port["port"]),
                        text(&port["protocol"]),
                        text(&port["targetPort"]),
                        node_port.unwrap_or_default()
                    )
                }),
            ),
        ],
        "Deployment" | "ReplicaSet" => {
            let number = |value: &Value| value.as_i64().unwrap_or(0);
            vec![(
                "Replicas",
                format!(
                    "{} wanted, {} there, {} ready, {} available",
                    number(&spec["replicas"]),
                    number(&status["replicas"]),
                    number(&status["readyReplicas"]),
                    number(&status["availableReplicas"])
                ),
            )]
        }
        _ => Vec::new(),
    }
}

fn list(items: &Value, show: impl Fn(&Value) -> String) -> String {
    items.as_array().into_iter().flatten().map(show).collect::<Vec<_>>().join(", ")
}

fn containers(pod: &Value) -> String {
    let rows: Vec<Vec<String>> = ["initContainerStatuses", "containerStatuses"]
        .iter()
        .flat_map(|field| pod["status"][*field].as_array().into_iter().flatten())
        .map(|status| {
            vec![
                text(&status["name"]),
                text(&status["image"]),
                state(&status["state"]),
                text(&status["ready"]),
                text(&status["restartCount"]),
                state(&status["lastState"]),
            ]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let table =
        output::render(&["CONTAINER", "IMAGE", "STATE", "READY", "RESTARTS", "LAST STATE"], rows);
    format!("{table}\n")
}

/// `Running since …`, `Waiting: ImagePullBackOff (…)`, `Terminated: Error (exit code 1)`.
fn state(state: &Value) -> String {
    let Some((name, detail)) = state.as_object().and_then(|state| state.iter().next()) else {
        return String::new();
    };
    match name.as_str() {
        "running" => format!("Running since {}", text(&detail["startedAt"])),
        "waiting" => {
            with_message(format!("Waiting: {}", text(&detail["reason"])), &detail["message"])
        }
        _ => with_message(
            format!(
                "Terminated: {} (exit code {})",
                text(&detail["reason"]),
                text(&detail["exitCode"])
            ),
            &detail["message"],
        ),
    }
}

fn with_message(head: String, message: &Value) -> String {
    match message.as_str().filter(|message| !message.is_empty()) {
        Some(message) => format!("{head} ({})", message.trim_end()),
        None => head,
    }
}

fn table(
    out: &mut String,
    title: &str,
    headings: &[&str],
    items: Option<&Value>,
    row: impl Fn(&Value) -> Vec<String>,
) {
    let rows: Vec<Vec<String>> =
        items.and_then(Value::as_array).into_iter().flatten().map(row).collect();
    if rows.is_empty() {
        let _ = writeln!(out, "{title}: none");
        return;
    }
    let _ = writeln!(out, "{title}:");
    for line in output::render(headings, rows).lines() {
        let _ = writeln!(out, "  {line}");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resource(kind: &str) -> Resource {
        Resource {
            group: String::new(),
            version: "v1".to_owned(),
            plural: format!("{}s", kind.to_lowercase()),
            singular: kind.to_lowercase(),
            kind: kind.to_owned(),
            short_names: Vec::new(),
            categories: Vec::new(),
            namespaced: true,
            verbs: Vec::new(),
        }
    }

    fn now() -> jiff::Timestamp {
        "2026-01-01T00:10:00Z".parse().expect("a time")
    }

    #[test]
    fn a_waiting_pod_says_why_and_events_are_in_order() {
        let pod = json!({
            "metadata": { "name": "web", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "nodeName": "node-1" },
            "status": {
                "phase": "Pending", "hostIP": "10.0.0.1",
                "containerStatuses": [{ "name": "web", "image": "web:v1", "ready": false, "restartCount": 0,
                    "state": { "waiting": { "reason": "ErrImagePull", "message": "no such image" } } }],
            },
        });
        let events = json!([
            { "lastTimestamp": "2026-01-01T00:09:59Z", "type": "Warning", "reason": "Failed", "message": "second" },
            { "lastTimestamp": "2026-01-01T00:00:01Z", "type": "Normal", "reason": "Scheduled", "message": "first" },
        ]);
        let text = render(&resource("Pod"), pod, &events, now());
        assert!(text.contains("Created:          2026-01-01T00:00:00Z (10m ago)"), "{text}");
        assert!(text.contains("Waiting: ErrImagePull (no such image)"), "{text}");
        assert!(text.find("first").expect("shown") < text.find("second").expect("shown"), "{text}");
    }

    #[test]
    fn secrets_stay_secret() {
        let secret = json!({ "metadata": { "name": "s" }, "data": { "password": "aHVudGVyMg==" } });
        let text = render(&resource("Secret"), secret, &json!([]), now());
        assert!(text.contains("password: 7 bytes"), "{text}");
        assert!(!text.contains("aHVudGVyMg"), "{text}");
    }
}
