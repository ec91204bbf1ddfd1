//! Columns and cells of server-side tables: what `kubectl get` shows.

mod rbac;
mod workload;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::resources::PRIORITY_CLASSES;

/// One column.
#[derive(Debug)]
pub(crate) struct Column {
    pub(crate) name: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) format: &'static str,
    /// 0 is always shown, more only with `-o wide`.
    pub(crate) priority: u8,
}

const NAME: Column = Column { name: "Name", kind: "string", format: "name", priority: 0 };
const AGE: Column = text("Age");

const fn text(name: &'static str) -> Column {
    Column { name, kind: "string", format: "", priority: 0 }
}

const fn number(name: &'static str) -> Column {
    Column { name, kind: "integer", format: "", priority: 0 }
}

const fn date(name: &'static str) -> Column {
    Column { name, kind: "date", format: "", priority: 0 }
}

const fn wide(name: &'static str) -> Column {
    Column { name, kind: "string", format: "", priority: 1 }
}

/// The columns of a resource.
pub(crate) fn columns(plural: &str) -> &'static [Column] {
    match plural {
        "pods" => {
            const {
                &[
                    NAME,
                    text("Ready"),
                    text("Status"),
                    text("Restarts"),
                    AGE,
                    wide("IP"),
                    wide("Node"),
                    wide("Nominated Node"),
                    wide("Readiness Gates"),
                ]
            }
        }
        "nodes" => {
            const {
                &[
                    NAME,
                    text("Status"),
                    text("Roles"),
                    AGE,
                    text("Version"),
                    wide("Internal-IP"),
                    wide("External-IP"),
                    wide("OS-Image"),
                    wide("Kernel-Version"),
                    wide("Container-Runtime"),
                ]
            }
        }
        "deployments" => {
            const {
                &[
                    NAME,
                    text("Ready"),
                    number("Up-to-date"),
                    number("Available"),
                    AGE,
                    wide("Containers"),
                    wide("Images"),
                    wide("Selector"),
                ]
            }
        }
        "replicasets" => {
            const {
                &[
                    NAME,
                    number("Desired"),
                    number("Current"),
                    number("Ready"),
                    AGE,
                    wide("Containers"),
                    wide("Images"),
                    wide("Selector"),
                ]
            }
        }
        "services" => {
            const {
                &[
                    NAME,
                    text("Type"),
                    text("Cluster-IP"),
                    text("External-IP"),
                    text("Port(s)"),
                    AGE,
                    wide("Selector"),
                ]
            }
        }
        "endpoints" => const { &[NAME, text("Endpoints"), AGE] },
        "endpointslices" => {
            const { &[NAME, text("AddressType"), text("Ports"), text("Endpoints"), AGE] }
        }
        "events" => {
            const {
                &[
                    text("Last Seen"),
                    text("Type"),
                    text("Reason"),
                    text("Object"),
                    wide("Subobject"),
                    wide("Source"),
                    text("Message"),
                    wide("First Seen"),
                    wide("Count"),
                    Column { name: "Name", kind: "string", format: "name", priority: 1 },
                ]
            }
        }
        "namespaces" => const { &[NAME, text("Status"), AGE] },
        "configmaps" => const { &[NAME, number("Data"), AGE] },
        "secrets" => const { &[NAME, text("Type"), number("Data"), AGE] },
        "serviceaccounts" => const { &[NAME, number("Secrets"), AGE] },
        "leases" => const { &[NAME, text("Holder"), AGE] },
        "networkpolicies" => const { &[NAME, text("Pod-Selector"), AGE] },
        "clusternetworkpolicies" => const { &[NAME, text("Tier"), text("Priority"), AGE] },
        PRIORITY_CLASSES => {
            const {
                &[
                    NAME,
                    number("Value"),
                    Column { name: "Global-Default", kind: "boolean", format: "", priority: 0 },
                    AGE,
                    text("PreemptionPolicy"),
                ]
            }
        }
        "roles" | "clusterroles" => const { &[NAME, date("Created At")] },
        "rolebindings" | "clusterrolebindings" => {
            const { &[NAME, text("Role"), AGE, wide("Users"), wide("Groups"), wide("ServiceAccounts")] }
        }
        "certificatesigningrequests" => {
            const { &[NAME, AGE, text("SignerName"), text("Requestor"), text("Condition")] }
        }
        _ => const { &[NAME, AGE] },
    }
}

/// The cells of an object, one per column.
pub(crate) fn cells(plural: &str, object: &Value, now: Timestamp) -> Vec<Value> {
    let name = object["metadata"]["name"].clone();
    let age = json!(age(&object["metadata"]["creationTimestamp"], now));
    match plural {
        "pods" => workload::pod(object, name, age, now),
        "nodes" => workload::node(object, name, age),
        "deployments" => workload::deployment(object, name, age),
        "replicasets" => workload::replica_set(object, name, age),
        "services" => service(object, name, age),
        "endpoints" => vec![name, json!(endpoints(object)), age],
        "endpointslices" => endpoint_slice(object, name, age),
        "events" => event(object, name, now),
        "namespaces" => vec![name, object["status"]["phase"].clone(), age],
        "configmaps" => {
            vec![name, json!(entries(&object["data"]) + entries(&object["binaryData"])), age]
        }
        "secrets" => vec![name, object["type"].clone(), json!(entries(&object["data"])), age],
        "serviceaccounts" => vec![name, json!(items(&object["secrets"]).len()), age],
        "leases" => vec![name, text_or(&object["spec"]["holderIdentity"], ""), age],
        "certificatesigningrequests" => {
            let spec = &object["spec"];
            vec![
                name,
                age,
                spec["signerName"].clone(),
                text_or(&spec["username"], "<none>"),
                json!(crate::certificates::condition(object)),
            ]
        }
        "networkpolicies" => vec![name, json!(selector(&object["spec"]["podSelector"])), age],
        "clusternetworkpolicies" => {
            let spec = &object["spec"];
            vec![name, spec["tier"].clone(), json!(spec["priority"].to_string()), age]
        }
        PRIORITY_CLASSES => {
            let default = object["globalDefault"] == true;
            vec![
                name,
                object["value"].clone(),
                json!(default),
                age,
                object["preemptionPolicy"].clone(),
            ]
        }
        "roles" | "clusterroles" => {
            vec![name, text_or(&object["metadata"]["creationTimestamp"], "<unknown>")]
        }
        "rolebindings" | "clusterrolebindings" => rbac::binding(object, name, age),
        _ => vec![name, age],
    }
}

fn entries(value: &Value) -> usize {
    value.as_object().map_or(0, serde_json::Map::len)
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text_or(value: &Value, other: &str) -> Value {
    json!(value.as_str().filter(|text| !text.is_empty()).unwrap_or(other))
}

/// `5m`, `3h20m`, `2d`: kubectl's human duration.
pub(crate) fn age(since: &Value, now: Timestamp) -> String {
    let Some(since) = since.as_str().and_then(|text| text.parse::<Timestamp>().ok()) else {
        return "<unknown>".to_owned();
    };
    duration(now.as_second() - since.as_second())
}

fn duration(seconds: i64) -> String {
    let two = |big: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{small_unit}") }
    };
    match seconds {
        i64::MIN..0 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..600 => two(seconds / 60, "m", seconds % 60, "s"),
        600..10_800 => format!("{}m", seconds / 60),
        10_800..28_800 => two(seconds / 3600, "h", seconds / 60 % 60, "m"),
        28_800..172_800 => format!("{}h", seconds / 3600),
        172_800..691_200 => two(seconds / 86_400, "d", seconds / 3600 % 24, "h"),
        691_200..63_072_000 => format!("{}d", seconds / 86_400),
        _ => two(seconds / 31_536_000, "y", seconds / 86_400 % 365, "d"),
    }
}

fn labels(value: &Value) -> String {
    let pairs: Vec<String> = value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    if pairs.is_empty() { "<none>".to_owned() } else { pairs.join(",") }
}

fn selector(value: &Value) -> String {
    serde_json::from_value(value.clone())
        .ok()
        .and_then(|parsed| orch_api::Selector::from_label_selector(&parsed).ok())
        .filter(|parsed| !parsed.is_everything())
        .map_or_else(|| "<none>".to_owned(), |parsed| parsed.to_string())
}

fn service(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let spec = &object["spec"];
    let ports: Vec<String> = items(&spec["ports"])
        .iter()
        .map(|port| {
            let protocol = port["protocol"].as_str().unwrap_or("TCP");
            match port["nodePort"].as_i64().filter(|port| *port > 0) {
                Some(node_port) => format!("{}:{node_port}/{protocol}", port["port"]),
                None => format!("{}/{protocol}", port["port"]),
            }
        })
        .collect();
    let ports = if ports.is_empty() { "<none>".to_owned() } else { ports.join(",") };
    let external: Vec<&str> =
        items(&spec["externalIPs"]).iter().filter_map(Value::as_str).collect();
    let external = match spec["type"].as_str() {
        Some("ExternalName") => spec["externalName"].as_str().unwrap_or_default().to_owned(),
        Some("LoadBalancer") if external.is_empty() => "<pending>".to_owned(),
        _ if external.is_empty() => "<none>".to_owned(),
        _ => external.join(","),
    };
    vec![
        name,
        spec["type"].clone(),
        text_or(&spec["clusterIP"], "<none>"),
        json!(external),
        json!(ports),
        age,
        json!(labels(&spec["selector"])),
    ]
}

/// At most three addresses, and how many more there are.
fn shorten(all: &[String]) -> String {
    match all.len() {
        0 => "<none>".to_owned(),
        1..=3 => all.join(","),
        more => format!("{} + {} more...", all[..3].join(","), more - 3),
    }
}

fn endpoints(object: &Value) -> String {
    let mut all = Vec::new();
    for subset in items(&object["subsets"]) {
        for port in items(&subset["ports"]) {
            for address in items(&subset["addresses"]) {
                all.push(format!(
                    "{}:{}",
                    address["ip"].as_str().unwrap_or_default(),
                    port["port"]
                ));
            }
        }
    }
    shorten(&all)
}

fn endpoint_slice(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let ports: Vec<String> =
        items(&object["ports"]).iter().map(|port| port["port"].to_string()).collect();
    let addresses: Vec<String> = items(&object["endpoints"])
        .iter()
        .flat_map(|endpoint| items(&endpoint["addresses"]))
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    let ports = if ports.is_empty() { "<unset>".to_owned() } else { shorten(&ports) };
    let addresses = if addresses.is_empty() { "<unset>".to_owned() } else { shorten(&addresses) };
    vec![name, object["addressType"].clone(), json!(ports), json!(addresses), age]
}

fn event(object: &Value, name: Value, now: Timestamp) -> Vec<Value> {
    let target = &object["involvedObject"];
    let first =
        [&object["firstTimestamp"], &object["eventTime"], &object["metadata"]["creationTimestamp"]];
    let first = first.into_iter().find(|time| time.is_string()).unwrap_or(&Value::Null);
    let series = &object["series"];
    let last = if series.is_object() {
        &series["lastObservedTime"]
    } else if object["lastTimestamp"].is_string() {
        &object["lastTimestamp"]
    } else {
        first
    };
    let count = if series.is_object() { &series["count"] } else { &object["count"] };
    let count = count.as_i64().filter(|count| *count > 0).unwrap_or(1);
    let kind = target["kind"].as_str().unwrap_or_default().to_lowercase();
    let pair = |one: &Value, other: &Value| -> Vec<String> {
        let texts = [one, other].into_iter().filter_map(Value::as_str);
        texts.filter(|text| !text.is_empty()).map(str::to_owned).collect()
    };
    let mut source = pair(&object["source"]["component"], &object["source"]["host"]);
    if source.is_empty() {
        source = pair(&object["reportingComponent"], &object["reportingInstance"]);
    }
    vec![
        json!(age(last, now)),
        object["type"].clone(),
        object["reason"].clone(),
        json!(format!("{kind}/{}", target["name"].as_str().unwrap_or_default())),
        text_or(&target["fieldPath"], ""),
        json!(source.join(", ")),
        json!(object["message"].as_str().unwrap_or_default().trim()),
        json!(age(first, now)),
        json!(count.to_string()),
        name,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_resource_has_as_many_cells_as_columns() {
        for resource in crate::resources::RESOURCES {
            let object = json!({ "metadata": { "name": "a" } });
            let cells = cells(resource.plural, &object, Timestamp::now());
            assert_eq!(cells.len(), columns(resource.plural).len(), "{}", resource.plural);
        }
    }

    #[test]
    fn ages_are_kubectls() {
        for (seconds, expected) in [
            (-5, "0s"),
            (5, "5s"),
            (119, "119s"),
            (120, "2m"),
            (150, "2m30s"),
            (3599, "59m"),
            (10_800, "3h"),
            (12_000, "3h20m"),
            (100_000, "27h"),
            (180_000, "2d2h"),
            (864_000, "10d"),
            (70_000_000, "2y80d"),
        ] {
            assert_eq!(duration(seconds), expected, "{seconds}");
        }
    }

    #[test]
    fn a_node_port_service_shows_both_ports() {
        let object = json!({ "metadata": { "name": "web" }, "spec": { "type": "NodePort", "clusterIP": "10.96.0.5",
            "ports": [{ "port": 80, "nodePort": 30080, "protocol": "TCP" }] } });
        let row = cells("services", &object, Timestamp::now());
        assert_eq!(
            &row[1..5],
            &[json!("NodePort"), json!("10.96.0.5"), json!("<none>"), json!("80:30080/TCP")]
        );
    }
}
