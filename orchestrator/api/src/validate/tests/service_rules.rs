use serde_json::{Value, json};

use super::*;

#[test]
fn a_service_needs_good_ports() {
    let mut service = json!({ "metadata": { "name": "1web" }, "spec": { "ports": [{ "port": 0 }, { "port": 80 }] } });
    crate::defaults::apply("", "Service", &mut service);
    let found = texts(&create("", "Service", &service)).join("\n");
    for expected in [
        "metadata.name",
        "spec.ports[0].port: Invalid value: 0",
        "spec.ports[0].name: Required value",
    ] {
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn mistakes_in_services_by_table() {
    let service = |spec: Value| {
        with(
            json!({ "metadata": { "name": "web" }, "spec": { "ports": [{ "port": 80 }] } }),
            &json!({ "spec": spec }),
        )
    };
    for (spec, expected) in [
        (json!({}), ""),
        (json!({ "clusterIP": "None", "ports": null }), ""),
        (json!({ "type": "Magic" }), "spec.type: Unsupported value: \"Magic\""),
        (json!({ "ports": [] }), "spec.ports: Required value"),
        (
            json!({ "ports": [{ "name": "a", "port": 80 }, { "name": "a", "port": 81 }] }),
            "spec.ports[1].name: Duplicate value: \"a\"",
        ),
        (
            json!({ "ports": [{ "name": "a", "port": 80 }, { "name": "b", "port": 80 }] }),
            "spec.ports[1]: Duplicate value",
        ),
        (
            json!({ "ports": [{ "port": 80, "targetPort": "Bad_Name" }] }),
            "spec.ports[0].targetPort: Invalid value",
        ),
        (
            json!({ "ports": [{ "port": 80, "nodePort": 30000 }] }),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
        (json!({ "clusterIP": "10.0.0" }), "spec.clusterIPs[0]: Invalid value: \"10.0.0\""),
        (json!({ "type": "ExternalName" }), "spec.externalName: Required value"),
        (json!({ "type": "ExternalName", "externalName": "example.com." }), ""),
        (json!({ "sessionAffinity": "Always" }), "spec.sessionAffinity: Unsupported value"),
        (json!({ "selector": { "a": "b c" } }), "spec.selector: Invalid value: \"b c\""),
        (json!({ "externalIPs": ["127.0.0.1"] }), "spec.externalIPs[0]: Invalid value"),
    ] {
        let found = found("", "Service", service(spec.clone()));
        assert!(
            if expected.is_empty() { found.is_empty() } else { found.contains(expected) },
            "{spec}\n{found}"
        );
    }

    let ip = |ip: &str| service(json!({ "clusterIP": ip }));
    assert!(
        changed("", "Service", ip("10.96.0.7"), ip("10.96.0.8"))
            .contains("may not change once set")
    );
    assert_eq!(changed("", "Service", ip("10.96.0.7"), service(json!({}))), "");
    let node_port =
        |kind: &str| service(json!({ "type": kind, "ports": [{ "port": 80, "nodePort": 30080 }] }));
    assert_eq!(changed("", "Service", node_port("NodePort"), node_port("ClusterIP")), "");
}
