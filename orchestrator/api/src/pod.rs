//! Helpers over pods: phase, readiness, what they request.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodCondition, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as WireQuantity;

use crate::Quantity;

/// A vector of resources.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    pub ephemeral_bytes: i64,
    pub pods: i64,
    /// Everything else, by its name (`nvidia.com/gpu`, `hugepages-2Mi`).
    pub extended: BTreeMap<String, i64>,
}

impl Resources {
    #[must_use]
    pub fn from_map(map: &BTreeMap<String, WireQuantity>) -> Self {
        let mut all = Self::default();
        for (name, quantity) in map {
            let quantity = Quantity::parse(&quantity.0).unwrap_or_default();
            match name.as_str() {
                "cpu" => all.cpu_milli = quantity.milli(),
                "memory" => all.memory_bytes = quantity.value(),
                "ephemeral-storage" => all.ephemeral_bytes = quantity.value(),
                "pods" => all.pods = quantity.value(),
                other => {
                    all.extended.insert(other.to_owned(), quantity.value());
                }
            }
        }
        all
    }

    pub fn add(&mut self, other: &Self) {
        self.combine(other, i64::saturating_add);
    }

    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, i64::saturating_sub);
    }

    /// The larger of both, resource by resource.
    pub fn at_least(&mut self, other: &Self) {
        self.combine(other, i64::max);
    }

    fn combine(&mut self, other: &Self, with: impl Fn(i64, i64) -> i64) {
        self.cpu_milli = with(self.cpu_milli, other.cpu_milli);
        self.memory_bytes = with(self.memory_bytes, other.memory_bytes);
        self.ephemeral_bytes = with(self.ephemeral_bytes, other.ephemeral_bytes);
        self.pods = with(self.pods, other.pods);
        for (name, amount) in &other.extended {
            let mine = self.extended.entry(name.clone()).or_default();
            *mine = with(*mine, *amount);
        }
    }
}

fn container_requests(container: &Container) -> Resources {
    container
        .resources
        .as_ref()
        .and_then(|resources| resources.requests.as_ref())
        .map(Resources::from_map)
        .unwrap_or_default()
}

fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// What a pod requests: its containers and sidecars together, or the largest init step if that is more, plus
/// overhead (Kubernetes, "Init Containers", "Resource sharing within containers"). It takes one place (`pods`).
#[must_use]
pub fn requests(spec: &PodSpec) -> Resources {
    let mut running = Resources::default();
    let mut largest = Resources::default();
    for container in spec.init_containers.iter().flatten() {
        let mut step = running.clone();
        step.add(&container_requests(container));
        largest.at_least(&step);
        if is_sidecar(container) {
            running.add(&container_requests(container));
        }
    }
    for container in &spec.containers {
        running.add(&container_requests(container));
    }
    running.at_least(&largest);
    if let Some(overhead) = &spec.overhead {
        running.add(&Resources::from_map(overhead));
    }
    running.pods = 1;
    running
}

#[must_use]
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

/// A condition of the pod by type.
#[must_use]
pub fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == kind)
}

#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

/// All containers ended for good.
#[must_use]
pub fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Its deletion was asked for.
#[must_use]
pub fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

#[must_use]
pub fn node_name(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

/// `Guaranteed`, `Burstable` or `BestEffort` (Kubernetes, "Pod Quality of Service Classes").
#[must_use]
pub fn qos_class(spec: &PodSpec) -> &'static str {
    let (mut any, mut guaranteed) = (false, true);
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let resources = container.resources.clone().unwrap_or_default();
        let (requests, limits) =
            (resources.requests.unwrap_or_default(), resources.limits.unwrap_or_default());
        for name in ["cpu", "memory"] {
            let amount = |map: &BTreeMap<String, WireQuantity>| {
                map.get(name)
                    .and_then(|quantity| Quantity::parse(&quantity.0).ok())
                    .filter(|quantity| quantity.milli() > 0)
            };
            let (request, limit) = (amount(&requests), amount(&limits));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && (request.is_none() || request == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(value: Value) -> PodSpec {
        serde_json::from_value(value).expect("a pod spec")
    }

    #[test]
    fn the_largest_init_step_counts_when_it_is_more_than_the_containers() {
        let resources = |cpu: &str| json!({ "requests": { "cpu": cpu } });
        let spec = spec(json!({
            "initContainers": [
                { "name": "sidecar", "restartPolicy": "Always", "resources": resources("100m") },
                { "name": "init", "resources": resources("1") },
            ],
            "containers": [{ "name": "a", "resources": resources("300m") }, { "name": "b", "resources": resources("200m") }],
            "overhead": { "cpu": "10m" },
        }));
        let all = requests(&spec);
        assert_eq!((all.cpu_milli, all.pods), (1110, 1), "sidecar 100 + init 1000 + overhead 10");
    }

    #[test]
    fn quality_of_service_by_table() {
        for (resources, class) in [
            (json!({}), "BestEffort"),
            (json!({ "requests": { "cpu": "1" } }), "Burstable"),
            (json!({ "limits": { "cpu": "1", "memory": "1Gi" } }), "Guaranteed"),
            (
                json!({ "limits": { "cpu": "1", "memory": "1Gi" }, "requests": { "cpu": "500m" } }),
                "Burstable",
            ),
        ] {
            assert_eq!(
                qos_class(&spec(
                    json!({ "containers": [{ "name": "a", "resources": resources }] })
                )),
                class
            );
        }
    }
}
