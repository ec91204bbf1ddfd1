//! The Node object from what was seen. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use orch_api::Quantity;
use orch_api::k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints,
    NodeStatus, NodeSystemInfo,
};
use orch_api::k8s_openapi::apimachinery::pkg::api::resource::Quantity as WireQuantity;
use orch_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orch_cri::{EngineInfo, Image};

use crate::node::machine::{Machine, Pressure};
use crate::{Options, api};

/// What a look at the node gave; errors say what is missing and what helps.
#[derive(Debug, Clone)]
pub(crate) struct Health {
    pub(crate) engine: Result<(EngineInfo, Vec<Image>), String>,
    pub(crate) network: Result<(), String>,
    pub(crate) pressure: Pressure,
}

/// The whole object. Transition times of unchanged conditions are taken from the current one.
pub(crate) fn node(
    options: &Options,
    machine: &Machine,
    health: &Health,
    current: Option<&Node>,
    now: Timestamp,
) -> Node {
    let mut labels: BTreeMap<String, String> = [
        ("kubernetes.io/hostname", options.node_name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture()),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    labels.extend(options.node_labels.clone());
    Node {
        metadata: ObjectMeta {
            name: Some(options.node_name.clone()),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        spec: None,
        status: Some(status(options, machine, health, current, now)),
    }
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn status(
    options: &Options,
    machine: &Machine,
    health: &Health,
    current: Option<&Node>,
    now: Timestamp,
) -> NodeStatus {
    let old = current.and_then(|node| node.status.clone()).unwrap_or_default();
    let mut capacity: BTreeMap<String, WireQuantity> = [
        ("cpu", Quantity::from_milli(machine.cpu_milli)),
        ("memory", Quantity::from_value(machine.memory_bytes).binary()),
        ("ephemeral-storage", Quantity::from_value(machine.disk_bytes).binary()),
        ("pods", Quantity::from_value(i64::from(options.max_pods))),
    ]
    .map(|(key, quantity)| (key.to_owned(), WireQuantity(quantity.to_string())))
    .into();
    // Resources that others say the node has (extended ones have a domain).
    let foreign = old.capacity.iter().flatten().filter(|(key, _)| key.contains('/'));
    capacity.extend(foreign.map(|(key, quantity)| (key.clone(), quantity.clone())));
    let (version, images) = match &health.engine {
        Ok((engine, images)) => {
            (Some(format!("{}://{}", engine.name, engine.version)), Some(images))
        }
        // What was known stays: the engine is only away.
        Err(_) => (old.node_info.as_ref().map(|info| info.container_runtime_version.clone()), None),
    };
    let images = match images {
        Some(images) => Some(
            images
                .iter()
                .map(|image| ContainerImage {
                    names: Some(image.names.clone()),
                    size_bytes: Some(image.size_bytes),
                })
                .collect(),
        ),
        None => old.images.clone(),
    };
    let address = |kind: &str, address: String| NodeAddress { type_: kind.to_owned(), address };
    NodeStatus {
        addresses: Some(vec![
            address("InternalIP", options.node_ip.to_string()),
            address("Hostname", options.node_name.clone()),
        ]),
        allocatable: Some(capacity.clone()),
        capacity: Some(capacity),
        conditions: Some(conditions(health, &old, now)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(options.listen_port) }),
        }),
        images,
        node_info: Some(NodeSystemInfo {
            architecture: architecture().to_owned(),
            boot_id: machine.boot_id.clone(),
            container_runtime_version: version.unwrap_or_else(|| "docker://".to_owned()),
            kernel_version: machine.kernel.clone(),
            kube_proxy_version: String::new(),
            kubelet_version: orch_config::KUBERNETES_VERSION.to_owned(),
            machine_id: machine.machine_id.clone(),
            operating_system: "linux".to_owned(),
            os_image: machine.os_image.clone(),
            swap: None,
            system_uuid: machine.system_uuid.clone(),
        }),
        ..NodeStatus::default()
    }
}

fn conditions(health: &Health, old: &NodeStatus, now: Timestamp) -> Vec<NodeCondition> {
    let ready = match (&health.engine, &health.network) {
        (Ok(_), Ok(())) => (true, "KubeletReady", "kubelet is posting ready status".to_owned()),
        (engine, network) => {
            let missing: Vec<&str> = [engine.as_ref().err(), network.as_ref().err()]
                .into_iter()
                .flatten()
                .map(String::as_str)
                .collect();
            (false, "KubeletNotReady", missing.join("; "))
        }
    };
    let pressure = |short: bool, yes: &'static str, no: &'static str, what: &str| {
        let state = if short { "insufficient" } else { "sufficient" };
        (short, if short { yes } else { no }, format!("kubelet has {state} {what} available"))
    };
    let all = [
        (
            "MemoryPressure",
            pressure(
                health.pressure.memory,
                "KubeletHasInsufficientMemory",
                "KubeletHasSufficientMemory",
                "memory",
            ),
        ),
        (
            "DiskPressure",
            pressure(
                health.pressure.disk,
                "KubeletHasDiskPressure",
                "KubeletHasNoDiskPressure",
                "disk space",
            ),
        ),
        (
            "PIDPressure",
            pressure(
                health.pressure.pids,
                "KubeletHasInsufficientPID",
                "KubeletHasSufficientPID",
                "PID",
            ),
        ),
        ("Ready", ready),
    ];
    all.into_iter()
        .map(|(kind, (holds, reason, message))| {
            let status = if holds { "True" } else { "False" };
            let before = old.conditions.iter().flatten().find(|condition| condition.type_ == kind);
            let unchanged = before.filter(|condition| condition.status == status);
            NodeCondition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason: Some(reason.to_owned()),
                message: Some(message),
                last_heartbeat_time: Some(api::time(now)),
                last_transition_time: unchanged
                    .and_then(|condition| condition.last_transition_time.clone())
                    .or_else(|| Some(api::time(now))),
            }
        })
        .collect()
}

/// Whether two Nodes differ in nothing that has to be told, heartbeat times left out.
pub(crate) fn is_same(current: &Node, wanted: &Node) -> bool {
    let essence = |node: &Node| {
        let status = node.status.clone().unwrap_or_default();
        let mut conditions: Vec<_> = status
            .conditions
            .unwrap_or_default()
            .into_iter()
            .filter(|condition| {
                matches!(
                    condition.type_.as_str(),
                    "Ready" | "MemoryPressure" | "DiskPressure" | "PIDPressure"
                )
            })
            .map(|condition| {
                (condition.type_, condition.status, condition.reason, condition.message)
            })
            .collect();
        conditions.sort();
        (
            conditions,
            status.addresses,
            status.capacity,
            status.allocatable,
            status.node_info,
            status.daemon_endpoints,
            status.images,
        )
    };
    essence(current) == essence(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> Health {
        let engine = EngineInfo {
            name: "docker".to_owned(),
            version: "20.10.24".to_owned(),
            ..EngineInfo::default()
        };
        Health { engine: Ok((engine, Vec::new())), network: Ok(()), pressure: Pressure::default() }
    }

    fn build(health: &Health, current: Option<&Node>, second: i64) -> Node {
        let options = Options { node_name: "node-1".to_owned(), ..Options::default() };
        let machine = Machine { cpu_milli: 2000, memory_bytes: 4 << 30, ..Machine::default() };
        node(&options, &machine, health, current, Timestamp::from_second(second).expect("a time"))
    }

    fn ready(node: &Node) -> &NodeCondition {
        orch_api::node::condition(node, "Ready").expect("a Ready condition")
    }

    #[test]
    fn a_healthy_node_is_ready_and_says_what_it_has() {
        let node = build(&health(), None, 10);
        assert!(orch_api::node::is_ready(&node));
        let all = orch_api::node::allocatable(&node);
        assert_eq!((all.cpu_milli, all.memory_bytes, all.pods), (2000, 4 << 30, 110));
        let info = node.status.as_ref().and_then(|status| status.node_info.as_ref()).expect("info");
        assert_eq!(info.container_runtime_version, "docker://20.10.24");
        assert_eq!(node.metadata.labels.expect("labels")["kubernetes.io/hostname"], "node-1");
    }

    #[test]
    fn what_is_missing_is_in_the_message_and_the_engine_stays_known() {
        let healthy = build(&health(), None, 10);
        let broken = Health {
            engine: Err("the engine is away; start it".to_owned()),
            network: Err("no subnet".to_owned()),
            ..health()
        };
        let node = build(&broken, Some(&healthy), 20);
        assert_eq!(ready(&node).status, "False");
        assert_eq!(
            ready(&node).message.as_deref(),
            Some("the engine is away; start it; no subnet")
        );
        assert!(!is_same(&healthy, &node));
        let info = node.status.as_ref().and_then(|status| status.node_info.as_ref()).expect("info");
        assert_eq!(info.container_runtime_version, "docker://20.10.24");
    }

    #[test]
    fn resources_that_others_announce_can_be_used_and_stay() {
        let mut first = build(&health(), None, 10);
        let status = first.status.get_or_insert_default();
        let fake = ("example.com/fake".to_owned(), WireQuantity("5".to_owned()));
        status.capacity.get_or_insert_default().extend([fake]);
        let second = build(&health(), Some(&first), 20);
        let allocatable = second.status.as_ref().and_then(|status| status.allocatable.clone());
        assert_eq!(allocatable.expect("some")["example.com/fake"].0, "5");
        assert!(is_same(&second, &build(&health(), Some(&second), 30)));
    }

    #[test]
    fn a_second_look_is_the_same_and_keeps_the_transition_time() {
        let first = build(&health(), None, 10);
        let second = build(&health(), Some(&first), 20);
        assert!(is_same(&first, &second));
        assert_eq!(ready(&first).last_transition_time, ready(&second).last_transition_time);
        assert_ne!(ready(&first).last_heartbeat_time, ready(&second).last_heartbeat_time);
    }
}
