//! Short ways to nodes, pods and clusters for the tests of this crate.

use std::sync::Arc;

use orch_api::k8s_openapi::api::core::v1::{Node, Pod};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::decide::decide;
use crate::pod_info::PodInfo;

/// Lays `over` on top of `base`, object by object.
pub(crate) fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

/// A node of 4 CPUs, 8 GiB and 110 pods in zone `z-<first letter>`, changed by `over`.
pub(crate) fn node(name: &str, over: Value) -> Arc<Node> {
    let mut node = json!({
        "metadata": { "name": name, "labels": {
            "kubernetes.io/hostname": name, "topology.kubernetes.io/zone": format!("z-{}", &name[..1]),
        } },
        "status": { "allocatable": { "cpu": "4", "memory": "8Gi", "pods": "110", "ephemeral-storage": "10Gi" } },
    });
    merge(&mut node, over);
    Arc::new(serde_json::from_value(node).expect("a node"))
}

/// A pod of one container that requests nothing, with the name as UID, changed by `over`.
pub(crate) fn raw_pod(name: &str, over: Value) -> Arc<Pod> {
    let mut pod = json!({
        "metadata": { "name": name, "namespace": "default", "uid": name },
        "spec": { "schedulerName": "default-scheduler", "containers": [{ "name": "c", "image": "web:1" }] },
    });
    merge(&mut pod, over);
    Arc::new(serde_json::from_value(pod).expect("a pod"))
}

pub(crate) fn pod(name: &str, over: Value) -> Arc<PodInfo> {
    Arc::new(PodInfo::new(raw_pod(name, over)))
}

/// A spec whose only container requests this.
pub(crate) fn requesting(requests: Value) -> Value {
    json!({ "spec": { "containers": [{ "name": "c", "image": "web:1", "resources": { "requests": requests } }] } })
}

pub(crate) fn cluster(nodes: &[Arc<Node>], pods: &[(&str, Arc<PodInfo>)]) -> Cluster {
    let mut cluster = Cluster::default();
    for node in nodes {
        cluster.set_node(node.clone());
    }
    for (node, pod) in pods {
        cluster.set_pod(node, pod);
    }
    cluster
}

/// The chosen node, or the message.
pub(crate) fn place(cluster: &Cluster, pod: &PodInfo) -> Result<String, String> {
    decide(cluster, pod, &mut 0, &mut StdRng::seed_from_u64(1))
        .map(str::to_owned)
        .map_err(|why| why.to_string())
}
