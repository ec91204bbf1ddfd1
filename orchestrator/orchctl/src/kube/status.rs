//! `orchctl status`: nodes, subnets, VTEPs and the health of the components on one screen.
//!
//! Nodes and health are asked of the API server. What a network agent has programmed stands in a file on its host;
//! in a lab all hosts are here, elsewhere only the host that the command runs on.

use std::path::Path;
use std::time::Duration;

use orch_client::Client;
use orch_config::Paths;
use serde_json::{Value, json};

use super::{describe, wire};
use crate::cluster::Format;
use crate::lab::{self, Lab};
use crate::output;

/// An agent or server that takes longer is reported as not answering.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
const NODE_HEADINGS: [&str; 10] =
    ["NODE", "STATUS", "AGE", "ADDRESS", "SUBNET", "VTEP MAC", "PEERS", "SERVICES", "DNS", "PODS"];
const COMPONENT_HEADINGS: [&str; 3] = ["COMPONENT", "STATE", "DETAIL"];

/// Prints the screen; 1 as exit code when something is not well.
pub(crate) async fn run(client: &Client, lab_dir: &Path, format: Format) -> anyhow::Result<u8> {
    let nodes = wire::get(client, "/api/v1/nodes").await?;
    let nodes: Vec<&Value> = nodes["items"].as_array().into_iter().flatten().collect();
    let pods = wire::get(client, "/api/v1/pods").await?;
    let lab = Lab::open(lab_dir)?;
    let networks: Vec<Option<Value>> = nodes
        .iter()
        .map(|node| network_status(lab.as_ref(), node["metadata"]["name"].as_str()?))
        .collect();

    let mut troubles = Vec::new();
    let now = jiff::Timestamp::now();
    let node_rows: Vec<Vec<String>> = nodes
        .iter()
        .zip(&networks)
        .map(|(node, network)| node_row(node, network.as_ref(), &pods, now, &mut troubles))
        .collect();
    let mut rows = vec![api_server_row(client).await];
    rows.extend(lease_rows(client).await);
    if let Some(lab) = &lab {
        for host in lab::daemons(lab) {
            rows.push(vec![
                host.name,
                host.pid.map_or_else(|| "down".to_owned(), |pid| format!("running (PID {pid})")),
                lab::memory(host.pid),
            ]);
        }
    }
    for row in rows.iter().filter(|row| row[1] == "down" || row[1].starts_with("not ")) {
        troubles.push(format!("{}: {} {}", row[0], row[1], row[2]).trim_end().to_owned());
    }
    for network in networks.iter().flatten() {
        let name = network["node"].as_str().unwrap_or_default();
        let etcd = network["etcd"].as_str().unwrap_or_default();
        if !matches!(etcd, "" | "healthy" | "unknown") {
            troubles.push(format!("{name}: etcd: {etcd}"));
        }
        for problem in
            network["problems"].as_array().into_iter().flatten().filter_map(Value::as_str)
        {
            troubles.push(format!("{name}: {problem}"));
        }
    }
    troubles.extend(shared_subnets(&nodes));
    let data = json!({
        "nodes": records(&NODE_HEADINGS, &node_rows),
        "components": records(&COMPONENT_HEADINGS, &rows),
        "problems": troubles,
    });
    format.print(&data, || {
        output::line("NODES")?;
        output::table(&NODE_HEADINGS, node_rows)?;
        output::line("\nCOMPONENTS")?;
        output::table(&COMPONENT_HEADINGS, rows)?;
        if troubles.is_empty() {
            return output::line("\nall is well");
        }
        output::line("\nPROBLEMS")?;
        troubles.iter().try_for_each(|trouble| output::line(&format!("- {trouble}")))
    })?;
    Ok(u8::from(!troubles.is_empty()))
}

/// The rows of a table as objects; `VTEP MAC` becomes `vtepMac`.
fn records(headings: &[&str], rows: &[Vec<String>]) -> Value {
    let key = |heading: &str| {
        let mut words = heading.split(' ').map(str::to_lowercase);
        let first = words.next().unwrap_or_default();
        words.fold(first, |key, word| {
            let (initial, rest) = word.split_at(1);
            key + &initial.to_uppercase() + rest
        })
    };
    let record = |row: &Vec<String>| -> Value {
        headings.iter().zip(row).map(|(heading, cell)| (key(heading), json!(cell))).collect()
    };
    rows.iter().map(record).collect()
}

/// What the network agent of a node wrote about itself, where its file can be read from here.
fn network_status(lab: Option<&Lab>, node: &str) -> Option<Value> {
    let paths = match lab {
        Some(lab) => lab.paths(node),
        None => Paths::new("/"),
    };
    let status: Value = serde_json::from_slice(&std::fs::read(paths.net_status()).ok()?).ok()?;
    (status["node"] == node).then_some(status)
}

fn node_row(
    node: &Value,
    network: Option<&Value>,
    pods: &Value,
    now: jiff::Timestamp,
    troubles: &mut Vec<String>,
) -> Vec<String> {
    let name = node["metadata"]["name"].as_str().unwrap_or_default();
    let ready = node["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|found| found["type"] == "Ready");
    let state = match ready.map(|ready| ready["status"].as_str().unwrap_or_default()) {
        Some("True") => "Ready",
        Some("False") => "NotReady",
        _ => "Unknown",
    };
    if state != "Ready" {
        let why = ready
            .and_then(|ready| ready["message"].as_str())
            .unwrap_or("its agent has not reported yet");
        troubles.push(format!("{name} is {state}: {why}"));
    }
    let address = node["status"]["addresses"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|address| address["type"] == "InternalIP")
        .and_then(|address| address["address"].as_str())
        .unwrap_or("-");
    let or_dash =
        |value: Option<&str>| value.filter(|text| !text.is_empty()).unwrap_or("-").to_owned();
    let count = |value: &Value| value.as_array().map_or(0, Vec::len);
    let on_node = pods["items"].as_array().into_iter().flatten().filter(|pod| {
        pod["spec"]["nodeName"] == name
            && !matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
    });
    let services = network.map(|network| {
        let services = &network["services"];
        let stale = if services["inForce"] == Value::Bool(true) { "" } else { " (not in force)" };
        format!("{} ports, {} endpoints{stale}", services["ports"], services["endpoints"])
    });
    vec![
        name.to_owned(),
        if node["spec"]["unschedulable"] == Value::Bool(true) {
            format!("{state},cordoned")
        } else {
            state.to_owned()
        },
        describe::age(&node["metadata"]["creationTimestamp"], now),
        address.to_owned(),
        or_dash(node["spec"]["podCIDR"].as_str().or_else(|| network?["subnet"].as_str())),
        or_dash(network.and_then(|network| network["device"]["vtepMac"].as_str())),
        network.map_or_else(|| "-".to_owned(), |network| count(&network["peers"]).to_string()),
        services.unwrap_or_else(|| "-".to_owned()),
        or_dash(network.and_then(|network| network["dns"].as_str())),
        on_node.count().to_string(),
    ]
}

/// Two nodes never have one subnet; if they do, nothing else matters.
fn shared_subnets(nodes: &[&Value]) -> Vec<String> {
    let mut seen: std::collections::BTreeMap<&str, &str> = std::collections::BTreeMap::new();
    let mut troubles = Vec::new();
    for node in nodes {
        let (Some(name), Some(subnet)) =
            (node["metadata"]["name"].as_str(), node["spec"]["podCIDR"].as_str())
        else {
            continue;
        };
        if let Some(other) = seen.insert(subnet, name) {
            troubles.push(format!("{other} and {name} have the same subnet {subnet}"));
        }
    }
    troubles
}

async fn api_server_row(client: &Client) -> Vec<String> {
    let answer = tokio::time::timeout(ANSWER_LIMIT, client.get_text("/readyz?verbose")).await;
    let (state, detail) = match answer {
        Ok(Ok(_)) => ("ready".to_owned(), version(client).await),
        Ok(Err(error)) => {
            let failed: Vec<String> = error
                .to_string()
                .lines()
                .filter(|line| line.starts_with("[-]"))
                .map(|line| line.trim_start_matches("[-]").to_owned())
                .collect();
            (
                "not ready".to_owned(),
                if failed.is_empty() { error.to_string() } else { failed.join(", ") },
            )
        }
        Err(_) => ("not answering".to_owned(), format!("for {} s", ANSWER_LIMIT.as_secs())),
    };
    vec!["API server".to_owned(), state, detail]
}

async fn version(client: &Client) -> String {
    match wire::get(client, "/version").await {
        Ok(version) => version["gitVersion"].as_str().unwrap_or_default().to_owned(),
        Err(_) => String::new(),
    }
}

/// The parts that hold a leader lease.
async fn lease_rows(client: &Client) -> Vec<Vec<String>> {
    let Ok(leases) =
        wire::get(client, "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases").await
    else {
        return Vec::new();
    };
    let now = jiff::Timestamp::now();
    leases["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|lease| {
            let spec = &lease["spec"];
            let renewed =
                spec["renewTime"].as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok());
            let limit = spec["leaseDurationSeconds"].as_i64().unwrap_or(15);
            let fresh = renewed.is_some_and(|time| now.as_second() - time.as_second() <= limit);
            let holder = spec["holderIdentity"].as_str().unwrap_or_default();
            vec![
                lease["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
                if fresh { "leading" } else { "not renewing its lease" }.to_owned(),
                holder.to_owned(),
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_become_objects() {
        let row = vec!["02:aa".to_owned(), "3".to_owned()];
        assert_eq!(
            records(&["VTEP MAC", "PEERS"], &[row]),
            json!([{ "vtepMac": "02:aa", "peers": "3" }])
        );
    }

    #[test]
    fn a_row_joins_what_api_and_agent_know() {
        let node = json!({
            "metadata": { "name": "node-1", "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "podCIDR": "10.244.1.0/24" },
            "status": { "addresses": [{ "type": "InternalIP", "address": "172.30.0.11" }],
                        "conditions": [{ "type": "Ready", "status": "False", "message": "no subnet yet" }] },
        });
        let network = json!({
            "node": "node-1", "device": { "vtepMac": "02:aa:bb:cc:dd:01" }, "peers": [{}, {}], "dns": "10.96.0.10",
            "services": { "ports": 3, "endpoints": 5, "inForce": true },
        });
        let pods = json!({ "items": [{ "spec": { "nodeName": "node-1" }, "status": { "phase": "Running" } }] });
        let mut troubles = Vec::new();
        let now = "2026-01-01T00:05:00Z".parse().expect("a time");
        let row = node_row(&node, Some(&network), &pods, now, &mut troubles);
        assert_eq!(
            row,
            [
                "node-1",
                "NotReady",
                "5m",
                "172.30.0.11",
                "10.244.1.0/24",
                "02:aa:bb:cc:dd:01",
                "2",
                "3 ports, 5 endpoints",
                "10.96.0.10",
                "1"
            ]
        );
        assert_eq!(troubles, ["node-1 is NotReady: no subnet yet"]);
    }

    #[test]
    fn a_subnet_held_twice_is_a_problem() {
        let node = |name: &str| json!({ "metadata": { "name": name }, "spec": { "podCIDR": "10.244.1.0/24" } });
        let (a, b) = (node("a"), node("b"));
        assert_eq!(shared_subnets(&[&a, &b]), ["a and b have the same subnet 10.244.1.0/24"]);
    }
}
