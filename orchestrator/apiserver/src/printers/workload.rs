//! Rows of pods, nodes, Deployments and ReplicaSets.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{age, items, selector, text_or};

pub(super) fn pod(object: &Value, name: Value, created: Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let statuses = items(&status["containerStatuses"]);
    let sidecars: Vec<&str> = items(&spec["initContainers"])
        .iter()
        .filter(|container| container["restartPolicy"] == "Always")
        .filter_map(|container| container["name"].as_str())
        .collect();
    let all_ready = statuses.iter().filter(|status| status["ready"] == true).count()
        + items(&status["initContainerStatuses"])
            .iter()
            .filter(|status| {
                status["ready"] == true
                    && sidecars.contains(&status["name"].as_str().unwrap_or_default())
            })
            .count();
    let total = items(&spec["containers"]).len() + sidecars.len();
    let restarts: i64 =
        statuses.iter().map(|status| status["restartCount"].as_i64().unwrap_or(0)).sum();
    let last_restart = statuses
        .iter()
        .filter_map(|status| status["lastState"]["terminated"]["finishedAt"].as_str())
        .max()
        .filter(|_| restarts > 0);
    let restarts = match last_restart {
        Some(time) => format!("{restarts} ({} ago)", age(&json!(time), now)),
        None => restarts.to_string(),
    };
    let gates = items(&spec["readinessGates"]);
    let gates = if gates.is_empty() {
        "<none>".to_owned()
    } else {
        let met = gates
            .iter()
            .filter(|gate| {
                items(&status["conditions"]).iter().any(|condition| {
                    condition["type"] == gate["conditionType"] && condition["status"] == "True"
                })
            })
            .count();
        format!("{met}/{}", gates.len())
    };
    vec![
        name,
        json!(format!("{all_ready}/{total}")),
        json!(pod_status(object)),
        json!(restarts),
        created,
        text_or(&status["podIP"], "<none>"),
        text_or(&spec["nodeName"], "<none>"),
        text_or(&status["nominatedNodeName"], "<none>"),
        json!(gates),
    ]
}

/// The STATUS column: the phase, or what hinders it.
fn pod_status(object: &Value) -> String {
    let (spec, status) = (&object["spec"], &object["status"]);
    let mut reason =
        status["reason"].as_str().or(status["phase"].as_str()).unwrap_or("Unknown").to_owned();
    let gated = items(&status["conditions"]).iter().any(|condition| {
        condition["type"] == "PodScheduled" && condition["reason"] == "SchedulingGated"
    });
    if gated {
        "SchedulingGated".clone_into(&mut reason);
    }
    let inits = items(&spec["initContainers"]);
    let mut initializing = false;
    for (index, init) in items(&status["initContainerStatuses"]).iter().enumerate() {
        let sidecar = inits
            .iter()
            .any(|spec| spec["name"] == init["name"] && spec["restartPolicy"] == "Always");
        let terminated = &init["state"]["terminated"];
        if terminated["exitCode"] == 0 || (sidecar && init["started"] == true) {
            continue;
        }
        reason = if terminated.is_object() {
            format!("Init:{}", ended(terminated))
        } else {
            match init["state"]["waiting"]["reason"].as_str() {
                Some(waiting) if waiting != "PodInitializing" => format!("Init:{waiting}"),
                _ => format!("Init:{index}/{}", inits.len()),
            }
        };
        initializing = true;
        break;
    }
    if !initializing {
        let mut running = false;
        for container in items(&status["containerStatuses"]).iter().rev() {
            let state = &container["state"];
            if let Some(waiting) =
                state["waiting"]["reason"].as_str().filter(|reason| !reason.is_empty())
            {
                waiting.clone_into(&mut reason);
            } else if state["terminated"].is_object() {
                reason = ended(&state["terminated"]);
            } else if container["ready"] == true && state["running"].is_object() {
                running = true;
            }
        }
        if reason == "Completed" && running {
            let ready = items(&status["conditions"])
                .iter()
                .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
            if ready { "Running" } else { "NotReady" }.clone_into(&mut reason);
        }
    }
    if object["metadata"]["deletionTimestamp"].is_string() {
        if status["reason"] == "NodeLost" { "Unknown" } else { "Terminating" }
            .clone_into(&mut reason);
    }
    reason
}

fn ended(terminated: &Value) -> String {
    match terminated["reason"].as_str().filter(|reason| !reason.is_empty()) {
        Some(reason) => reason.to_owned(),
        None => match terminated["signal"].as_i64().filter(|signal| *signal != 0) {
            Some(signal) => format!("Signal:{signal}"),
            None => format!("ExitCode:{}", terminated["exitCode"]),
        },
    }
}

pub(super) fn node(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let (status, info) = (&object["status"], &object["status"]["nodeInfo"]);
    let ready = items(&status["conditions"]).iter().find(|condition| condition["type"] == "Ready");
    let mut words = vec![match ready.and_then(|condition| condition["status"].as_str()) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }];
    if object["spec"]["unschedulable"] == true {
        words.push("SchedulingDisabled");
    }
    let roles: Vec<&str> = object["metadata"]["labels"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/"))
        .collect();
    let address = |kind: &str| {
        let found = items(&status["addresses"]).iter().find(|address| address["type"] == kind);
        text_or(&found.map_or(Value::Null, |address| address["address"].clone()), "<none>")
    };
    vec![
        name,
        json!(words.join(",")),
        json!(if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") }),
        age,
        text_or(&info["kubeletVersion"], ""),
        address("InternalIP"),
        address("ExternalIP"),
        text_or(&info["osImage"], "<unknown>"),
        text_or(&info["kernelVersion"], "<unknown>"),
        text_or(&info["containerRuntimeVersion"], "<unknown>"),
    ]
}

fn containers_and_images(object: &Value) -> (Value, Value) {
    let list = items(&object["spec"]["template"]["spec"]["containers"]);
    let join = |key: &str| {
        json!(list.iter().filter_map(|item| item[key].as_str()).collect::<Vec<_>>().join(","))
    };
    (join("name"), join("image"))
}

pub(super) fn deployment(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let status = &object["status"];
    let count = |key: &str| status[key].as_i64().unwrap_or(0);
    let (containers, images) = containers_and_images(object);
    vec![
        name,
        json!(format!(
            "{}/{}",
            count("readyReplicas"),
            object["spec"]["replicas"].as_i64().unwrap_or(0)
        )),
        json!(count("updatedReplicas")),
        json!(count("availableReplicas")),
        age,
        containers,
        images,
        json!(selector(&object["spec"]["selector"])),
    ]
}

pub(super) fn replica_set(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let status = &object["status"];
    let count = |key: &str| json!(status[key].as_i64().unwrap_or(0));
    let (containers, images) = containers_and_images(object);
    vec![
        name,
        json!(object["spec"]["replicas"].as_i64().unwrap_or(0)),
        count("replicas"),
        count("readyReplicas"),
        age,
        containers,
        images,
        json!(selector(&object["spec"]["selector"])),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_a_pod_is_what_hinders_it() {
        let pod = |status: Value| json!({ "spec": { "containers": [{ "name": "a" }] }, "status": status });
        for (status, expected) in [
            (json!({ "phase": "Pending" }), "Pending"),
            (
                json!({ "phase": "Running", "containerStatuses": [{ "ready": true, "state": { "running": {} } }] }),
                "Running",
            ),
            (
                json!({ "phase": "Running", "containerStatuses": [{ "state": { "waiting": { "reason": "CrashLoopBackOff" } } }] }),
                "CrashLoopBackOff",
            ),
            (
                json!({ "phase": "Failed", "containerStatuses": [{ "state": { "terminated": { "exitCode": 3 } } }] }),
                "ExitCode:3",
            ),
            (
                json!({ "phase": "Succeeded", "containerStatuses": [{ "state": { "terminated": { "reason": "Completed" } } }] }),
                "Completed",
            ),
            (json!({ "phase": "Failed", "reason": "Evicted" }), "Evicted"),
        ] {
            assert_eq!(pod_status(&pod(status.clone())), expected, "{status}");
        }
        let mut leaving = pod(json!({ "phase": "Running" }));
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert_eq!(pod_status(&leaving), "Terminating");
        let init = json!({ "spec": { "initContainers": [{ "name": "i" }, { "name": "j" }] }, "status": {
            "phase": "Pending", "initContainerStatuses": [{ "name": "i", "state": { "running": {} } }] } });
        assert_eq!(pod_status(&init), "Init:0/2");
    }
}
