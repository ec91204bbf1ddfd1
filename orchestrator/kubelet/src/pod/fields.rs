//! The downward API: what a container may learn about its own pod (Kubernetes, "Downward API").

use std::collections::BTreeMap;
use std::net::IpAddr;

use orch_api::Quantity;
use orch_api::k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};

use crate::api;

/// What is known about where the pod runs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place {
    pub(crate) node_name: String,
    pub(crate) host_ips: Vec<IpAddr>,
    /// Empty until the sandbox has its network.
    pub(crate) pod_ips: Vec<IpAddr>,
    /// Stand in for limits that are not set.
    pub(crate) allocatable_cpu_milli: i64,
    pub(crate) allocatable_memory_bytes: i64,
}

/// Whether a field is only known once the pod has an address.
pub(crate) fn needs_address(path: &str) -> bool {
    matches!(path, "status.podIP" | "status.podIPs")
}

/// The value of a field path, if it is one that is offered.
pub(crate) fn field(pod: &Pod, place: &Place, path: &str) -> Option<String> {
    let meta = &pod.metadata;
    if let Some((map, key)) = path.strip_suffix("']").and_then(|path| path.split_once("['")) {
        let map = match map {
            "metadata.labels" => &meta.labels,
            "metadata.annotations" => &meta.annotations,
            _ => return None,
        };
        return Some(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    let join = |ips: &[IpAddr]| ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
    let first = |ips: &[IpAddr]| ips.first().map(IpAddr::to_string).unwrap_or_default();
    Some(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => lines(meta.labels.as_ref()),
        "metadata.annotations" => lines(meta.annotations.as_ref()),
        "spec.nodeName" => place.node_name.clone(),
        "spec.serviceAccountName" => {
            pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone()).unwrap_or_default()
        }
        "status.hostIP" => first(&place.host_ips),
        "status.hostIPs" => join(&place.host_ips),
        "status.podIP" => first(&place.pod_ips),
        "status.podIPs" => join(&place.pod_ips),
        _ => return None,
    })
}

/// `key="value"` lines, sorted, with the value quoted.
fn lines(map: Option<&BTreeMap<String, String>>) -> String {
    map.into_iter().flatten().map(|(key, value)| format!("{key}={value:?}\n")).collect()
}

/// A request or limit of a container, in units of the divisor, rounded up.
pub(crate) fn resource(
    pod: &Pod,
    container: &Container,
    place: &Place,
    selector: &ResourceFieldSelector,
) -> Result<String, String> {
    let container = match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => api::all_containers(pod)
            .find(|other| other.name == name)
            .ok_or_else(|| format!("container {name} not found"))?,
        None => container,
    };
    let (kind, name) = selector
        .resource
        .split_once('.')
        .ok_or_else(|| format!("unsupported container resource : {}", selector.resource))?;
    let resources = container.resources.clone().unwrap_or_default();
    let map = match kind {
        "limits" => resources.limits,
        "requests" => resources.requests,
        _ => return Err(format!("unsupported container resource : {}", selector.resource)),
    };
    let quantity =
        map.unwrap_or_default().get(name).and_then(|quantity| Quantity::parse(&quantity.0).ok());
    let quantity = quantity.unwrap_or_else(|| match (kind, name) {
        ("limits", "cpu") => Quantity::from_milli(place.allocatable_cpu_milli),
        ("limits", "memory") => Quantity::from_value(place.allocatable_memory_bytes),
        _ => Quantity::default(),
    });
    let divisor = selector
        .divisor
        .as_ref()
        .and_then(|divisor| Quantity::parse(&divisor.0).ok())
        .filter(|divisor| divisor.milli() > 0)
        .unwrap_or(Quantity::from_value(1));
    let value = if name == "cpu" {
        quantity.milli().div_euclid(divisor.milli())
            + i64::from(quantity.milli() % divisor.milli() != 0)
    } else {
        quantity.value().div_euclid(divisor.value())
            + i64::from(quantity.value() % divisor.value() != 0)
    };
    Ok(value.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "web", "labels": { "a": "1", "b": "x\"y" } },
            "spec": { "containers": [{ "name": "c", "resources": { "limits": { "cpu": "1500m", "memory": "1Gi" } } }] },
        }))
        .expect("a pod")
    }

    #[test]
    fn labels_come_whole_or_one_by_one() {
        let field = |path: &str| super::field(&pod(), &Place::default(), path);
        assert_eq!(field("metadata.labels['a']").as_deref(), Some("1"));
        assert_eq!(field("metadata.labels").as_deref(), Some("a=\"1\"\nb=\"x\\\"y\"\n"));
        assert_eq!(field("metadata.nonsense"), None);
    }

    #[test]
    fn resources_are_rounded_up_to_the_divisor() {
        let value = |resource: &str, divisor: &str| {
            let selector =
                serde_json::from_value(json!({ "resource": resource, "divisor": divisor }))
                    .expect("a selector");
            let place = Place { allocatable_cpu_milli: 2000, ..Place::default() };
            super::resource(&pod(), &api::spec(&pod()).containers[0], &place, &selector)
        };
        assert_eq!(value("limits.cpu", "1").as_deref(), Ok("2"));
        assert_eq!(value("limits.cpu", "1m").as_deref(), Ok("1500"));
        assert_eq!(value("limits.memory", "1Mi").as_deref(), Ok("1024"));
        assert_eq!(value("requests.cpu", "1").as_deref(), Ok("0"));
        assert!(value("nonsense", "1").is_err());
    }
}
