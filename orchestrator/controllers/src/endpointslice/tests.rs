use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

use super::plan::{Backend, backend};
use super::slices::Step;
use super::*;

fn service(spec: Value) -> Service {
    let mut value = json!({
        "metadata": { "name": "web", "namespace": "shop", "uid": "s", "labels": { "team": "a" } },
        "spec": { "clusterIP": "10.96.0.7", "selector": { "app": "web" }, "ipFamilies": ["IPv4"],
                  "ports": [{ "name": "http", "port": 80, "targetPort": "http", "protocol": "TCP" }] },
    });
    for (key, entry) in spec.as_object().into_iter().flatten() {
        value["spec"][key] = entry.clone();
    }
    serde_json::from_value(value).expect("a Service")
}

fn pod(number: usize, ready: bool, port: u16, terminating: bool) -> Pod {
    let mut value = json!({
        "metadata": { "name": format!("p{number}"), "namespace": "shop", "uid": format!("u{number}"), "labels": { "app": "web" } },
        "spec": { "nodeName": "n", "containers": [{ "name": "a", "ports": [{ "name": "http", "containerPort": port }] }] },
        "status": { "phase": "Running", "podIP": format!("10.244.{}.{}", number / 250, number % 250 + 1),
                    "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }] },
    });
    if terminating {
        value["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    }
    serde_json::from_value(value).expect("a Pod")
}

fn backends(service: &Service, pods: &[Pod]) -> Vec<Backend> {
    pods.iter().filter_map(|pod| backend(service, pod, None)).collect()
}

/// Carries steps out, and checks that a second look has nothing to do.
fn apply(service: &Service, pods: &[Pod], slices: &mut Vec<Arc<EndpointSlice>>) -> usize {
    let backends = backends(service, pods);
    let steps = slices::plan(service, &backends, slices);
    let count = steps.len();
    for step in steps {
        match step {
            Step::Create(slice) => slices.push(Arc::new(slice)),
            Step::Update(slice) => {
                slices.retain(|old| old.metadata.name != slice.metadata.name);
                slices.push(Arc::new(slice));
            }
            Step::Delete(slice) => slices.retain(|old| old.metadata.name != slice.metadata.name),
        }
    }
    assert_eq!(slices::plan(service, &backends, slices), [], "a second look changes nothing");
    count
}

fn addresses(slices: &[Arc<EndpointSlice>]) -> usize {
    slices.iter().flat_map(|slice| slice.endpoints.iter().flatten()).count()
}

#[test]
fn conditions_by_table() {
    let publish = json!({ "publishNotReadyAddresses": true });
    for (spec, ready, terminating, expected) in [
        (json!({}), true, false, (true, true, false)),
        (json!({}), false, false, (false, false, false)),
        (json!({}), true, true, (false, true, true)),
        (publish.clone(), false, false, (true, false, false)),
        (publish, true, true, (true, true, true)),
    ] {
        let service = service(spec);
        let found = backend(&service, &pod(1, ready, 8080, terminating), None).expect("a backend");
        assert_eq!((found.ready, found.serving, found.terminating), expected);
    }
}

#[test]
fn a_service_without_pods_has_one_empty_slice() {
    let (service, mut slices) = (service(json!({})), Vec::new());
    apply(&service, &[], &mut slices);
    assert_eq!((slices.len(), addresses(&slices)), (1, 0));
    let labels = slices[0].metadata.labels.clone().unwrap_or_default();
    assert_eq!(labels.get(SERVICE_NAME).map(String::as_str), Some("web"));
    assert_eq!(labels.get(MANAGED_BY).map(String::as_str), Some(MANAGER));
    assert_eq!(labels.get("team").map(String::as_str), Some("a"));
    apply(&service, &[pod(1, true, 8080, false)], &mut slices);
    assert_eq!((slices.len(), addresses(&slices)), (1, 1));
}

#[test]
fn named_ports_are_those_of_each_pod() {
    let (service, mut slices) = (service(json!({})), Vec::new());
    apply(&service, &[pod(1, true, 8080, false), pod(2, true, 9090, false)], &mut slices);
    let mut ports: Vec<_> = slices
        .iter()
        .flat_map(|slice| slice.ports.iter().flatten().filter_map(|port| port.port))
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, [8080, 9090]);
}

#[test]
fn a_slice_takes_a_hundred_and_one_change_touches_one_slice() {
    let (service, mut slices) = (service(json!({})), Vec::new());
    let mut pods: Vec<Pod> = (0..250).map(|n| pod(n, true, 8080, false)).collect();
    assert_eq!(apply(&service, &pods, &mut slices), 3);
    assert!(
        slices.iter().all(|slice| slice.endpoints.as_ref().is_some_and(|all| all.len() <= 100))
    );
    pods[17] = pod(17, false, 8080, false);
    assert_eq!(apply(&service, &pods, &mut slices), 1);
    pods.remove(17);
    assert_eq!(apply(&service, &pods, &mut slices), 1);
    pods.push(pod(300, true, 8080, false));
    assert_eq!(apply(&service, &pods, &mut slices), 1);
    assert_eq!(addresses(&slices), 250);
    apply(&service, &[], &mut slices);
    assert_eq!((slices.len(), addresses(&slices)), (1, 0));
}

#[test]
fn the_endpoints_object_sorts_by_readiness_and_leaves_out_what_ends() {
    let service = service(json!({}));
    let pods = [pod(1, true, 8080, false), pod(2, false, 8080, false), pod(3, true, 8080, true)];
    let wanted = endpoints::desired(&service, &backends(&service, &pods), None);
    let subset = &wanted.subsets.as_ref().expect("subsets")[0];
    let ips = |list: &Option<Vec<k8s_openapi::api::core::v1::EndpointAddress>>| {
        list.iter().flatten().map(|address| address.ip.clone()).collect::<Vec<_>>()
    };
    assert_eq!(ips(&subset.addresses), ["10.244.0.2"]);
    assert_eq!(ips(&subset.not_ready_addresses), ["10.244.0.3"]);
    assert_eq!(subset.ports.as_ref().map(|ports| ports[0].port), Some(8080));
    assert!(endpoints::is_same(
        &wanted,
        &endpoints::desired(&service, &backends(&service, &pods), Some(&wanted))
    ));
}

#[test]
fn a_headless_service_gives_hostnames_and_needs_no_ports() {
    let service = service(json!({ "clusterIP": "None", "ports": null }));
    let mut value = serde_json::to_value(pod(1, true, 8080, false)).expect("JSON");
    value["spec"]["hostname"] = json!("db-0");
    value["spec"]["subdomain"] = json!("web");
    let pods = [serde_json::from_value(value).expect("a Pod")];
    let mut slices = Vec::new();
    apply(&service, &pods, &mut slices);
    let endpoint = &slices[0].endpoints.as_ref().expect("endpoints")[0];
    assert_eq!(endpoint.hostname.as_deref(), Some("db-0"));
    let wanted = endpoints::desired(&service, &backends(&service, &pods), None);
    assert_eq!(wanted.subsets.map(|subsets| subsets[0].ports.is_none()), Some(true));
}

#[test]
fn traffic_distribution_becomes_hints_of_ready_endpoints() {
    let node: Node = serde_json::from_value(json!({
        "metadata": { "name": "n", "labels": { "topology.kubernetes.io/zone": "a" } },
    }))
    .expect("a Node");
    let pods = [pod(1, true, 8080, false), pod(2, false, 8080, false)];
    for (wish, expected) in [
        (json!(null), json!(null)),
        (json!("PreferClose"), json!({ "forZones": [{ "name": "a" }] })),
        (json!("PreferSameZone"), json!({ "forZones": [{ "name": "a" }] })),
        (
            json!("PreferSameNode"),
            json!({ "forNodes": [{ "name": "n" }], "forZones": [{ "name": "a" }] }),
        ),
    ] {
        let service = service(json!({ "trafficDistribution": wish }));
        let backends: Vec<Backend> =
            pods.iter().filter_map(|pod| backend(&service, pod, Some(&node))).collect();
        let steps = slices::plan(&service, &backends, &[]);
        let [Step::Create(slice)] = steps.as_slice() else { panic!("{steps:?}") };
        let seen: Vec<Value> = slice
            .endpoints
            .iter()
            .flatten()
            .map(|one| serde_json::to_value(&one.hints).expect("JSON"))
            .collect();
        assert_eq!(seen, [expected, json!(null)], "{wish}: none for who is not ready");
    }
}
