//! Pods as backends of a Service: addresses, ports and conditions. Pure.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use orch_api::pod;

use crate::context::name;

const ZONE: &str = "topology.kubernetes.io/zone";

/// A port of a Service at one pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) protocol: String,
    pub(super) port: i32,
    pub(super) app_protocol: Option<String>,
}

/// A pod that the Service selects and that has an address.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Backend {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) ports: Vec<Port>,
    /// The pod's own word.
    pub(super) serving: bool,
    pub(super) terminating: bool,
    /// Whether traffic should come.
    pub(super) ready: bool,
    pub(super) node: Option<String>,
    pub(super) zone: Option<String>,
    pub(super) hostname: Option<String>,
    pub(super) reference: ObjectReference,
}

fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return Vec::new() };
    let mut all: Vec<IpAddr> =
        status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
    if all.is_empty() {
        all.extend(status.pod_ip.as_deref().and_then(|ip| ip.parse::<IpAddr>().ok()));
    }
    all
}

/// Whether a change of the pod cannot change any endpoints: what the kubelet reports is mostly of no interest here.
pub(super) fn looks_same(old: &Pod, new: &Pod) -> bool {
    addresses(old) == addresses(new)
        && pod::is_ready(old) == pod::is_ready(new)
        && pod::is_terminal(old) == pod::is_terminal(new)
        && pod::is_terminating(old) == pod::is_terminating(new)
        && pod::node_name(old) == pod::node_name(new)
        && old.metadata.labels == new.metadata.labels
        && old.metadata.uid == new.metadata.uid
}

pub(super) fn backend(service: &Service, pod: &Pod, node: Option<&Node>) -> Option<Backend> {
    let addresses = addresses(pod);
    if addresses.is_empty() || pod::is_terminal(pod) {
        return None;
    }
    let spec = service.spec.as_ref()?;
    let publish = spec.publish_not_ready_addresses == Some(true);
    let (serving, terminating) = (pod::is_ready(pod), pod::is_terminating(pod));
    let pod_spec = pod.spec.as_ref();
    let hostname = pod_spec.and_then(|spec| {
        let ours = spec.subdomain.as_deref() == Some(name(&service.metadata));
        spec.hostname.clone().filter(|hostname| ours && !hostname.is_empty())
    });
    let node_name = pod::node_name(pod);
    Some(Backend {
        addresses,
        ports: spec.ports.iter().flatten().filter_map(|port| target(port, pod)).collect(),
        serving,
        terminating,
        ready: publish || (serving && !terminating),
        node: (!node_name.is_empty()).then(|| node_name.to_owned()),
        zone: node.and_then(|node| node.metadata.labels.as_ref()?.get(ZONE).cloned()),
        hostname,
        reference: ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        },
    })
}

/// The container port behind a Service port; none if the pod has no port of that name.
fn target(port: &ServicePort, pod: &Pod) -> Option<Port> {
    let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
    let number = match &port.target_port {
        None => port.port,
        Some(IntOrString::Int(0)) => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(text)) => named_port(pod, text, &protocol)?,
    };
    Some(Port {
        name: port.name.clone().unwrap_or_default(),
        protocol,
        port: number,
        app_protocol: port.app_protocol.clone(),
    })
}

fn named_port(pod: &Pod, wanted: &str, protocol: &str) -> Option<i32> {
    let spec = pod.spec.as_ref()?;
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|one| one.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .find(|port| {
            port.name.as_deref() == Some(wanted)
                && port.protocol.as_deref().unwrap_or("TCP") == protocol
        })
        .map(|port| port.container_port)
}
