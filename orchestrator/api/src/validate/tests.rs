mod pod_rules;
mod service_rules;
mod workload_rules;

use serde_json::{Value, json};

use super::*;

fn texts(errors: &[FieldError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

fn found(group: &str, kind: &str, mut object: Value) -> String {
    crate::defaults::apply(group, kind, &mut object);
    texts(&create(group, kind, &object)).join("\n")
}

fn changed(group: &str, kind: &str, mut old: Value, mut new: Value) -> String {
    crate::defaults::apply(group, kind, &mut old);
    crate::defaults::apply(group, kind, &mut new);
    texts(&update(group, kind, &new, &old)).join("\n")
}

/// Lays `over` on top of `base`; null removes, a list replaces.
fn with(mut base: Value, over: &Value) -> Value {
    json_patch_merge(&mut base, over);
    base
}

fn json_patch_merge(base: &mut Value, over: &Value) {
    let Value::Object(over) = over else {
        *base = over.clone();
        return;
    };
    if !base.is_object() {
        *base = json!({});
    }
    for (key, value) in over {
        json_patch_merge(&mut base[key], value);
    }
}

fn pod(spec: Value) -> Value {
    let base = json!({ "metadata": { "name": "a" }, "spec": { "containers": [{ "name": "a", "image": "web:v1" }] } });
    with(base, &json!({ "spec": spec }))
}

fn one_container(over: Value) -> Value {
    let container = with(json!({ "name": "a", "image": "web:v1" }), &over);
    pod(json!({ "containers": [container], "volumes": [{ "name": "data" }] }))
}

#[test]
fn mistakes_in_other_kinds_by_table() {
    let named = |over: Value| with(json!({ "metadata": { "name": "x" } }), &over);
    let slice = |kind: &str, address: &str| json!({ "addressType": kind, "endpoints": [{ "addresses": [address] }] });
    let policy = |ingress: Value| json!({ "spec": { "podSelector": {}, "ingress": [ingress] } });
    for (group, kind, over, expected) in [
        (
            "",
            "ConfigMap",
            json!({ "data": { "a/b": "" } }),
            "data[a/b]: Invalid value: \"a/b\": a valid config key",
        ),
        ("", "ConfigMap", json!({ "data": { "..a": "" } }), "must not start with '..'"),
        (
            "",
            "ConfigMap",
            json!({ "data": { "a": "" }, "binaryData": { "a": "" } }),
            "duplicate of key present in data[a]",
        ),
        (
            "",
            "ConfigMap",
            json!({ "data": { "a": "x".repeat(1024 * 1024 + 1) } }),
            "Too long: may not be more than 1048576 bytes",
        ),
        (
            "",
            "Secret",
            json!({ "data": { "a": "no base64!" } }),
            "data[a]: Invalid value: \"<base64>\": illegal base64 data",
        ),
        ("", "Secret", json!({ "data": { "a": "eA==" } }), ""),
        (
            "",
            "Secret",
            json!({ "type": "kubernetes.io/tls", "data": { "tls.crt": "" } }),
            "data[tls.key]: Required value",
        ),
        (
            "",
            "Node",
            json!({ "spec": { "taints": [{ "key": "a", "effect": "Never" }] } }),
            "spec.taints[0].effect: Unsupported value",
        ),
        (
            "",
            "Node",
            json!({ "spec": { "taints": [{ "key": "a", "effect": "NoSchedule" }, { "key": "a", "effect": "NoSchedule" }] } }),
            "taints must be unique by key and effect pair",
        ),
        (
            "coordination.k8s.io",
            "Lease",
            json!({ "spec": { "leaseDurationSeconds": 0 } }),
            "must be greater than 0",
        ),
        ("discovery.k8s.io", "EndpointSlice", slice("IPv4", "10.0.0.1"), ""),
        (
            "discovery.k8s.io",
            "EndpointSlice",
            slice("IPv4", "fd00::1"),
            "endpoints[0].addresses[0]: Invalid value: \"fd00::1\"",
        ),
        (
            "discovery.k8s.io",
            "EndpointSlice",
            slice("IPv4", "127.0.0.1"),
            "may not be in the loopback range",
        ),
        (
            "discovery.k8s.io",
            "EndpointSlice",
            json!({ "addressType": "" }),
            "addressType: Required value",
        ),
        (
            "",
            "Endpoints",
            json!({ "subsets": [{ "ports": [{ "port": 80 }] }] }),
            "must specify `addresses` or `notReadyAddresses`",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(json!({ "from": [{}] })),
            "spec.ingress[0].from[0]: Required value: must specify a peer",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(json!({ "from": [{ "ipBlock": { "cidr": "10.0.0.0/33" } }] })),
            "ipBlock.cidr: Invalid value",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(
                json!({ "from": [{ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"] } }] }),
            ),
            "must be a strict subset of `cidr`",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(
                json!({ "from": [{ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"] } }] }),
            ),
            "",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(json!({ "ports": [{ "port": 80, "endPort": 70 }] })),
            "must be greater than or equal to `port`",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(json!({ "ports": [{ "endPort": 70 }] })),
            "may not be specified when `port` is not specified",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(json!({ "ports": [{ "port": "web", "endPort": 70 }] })),
            "may not be specified when `port` is non-numeric",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(json!({ "ports": [{ "port": 80, "endPort": 70000 }] })),
            "spec.ingress[0].ports[0].endPort: Invalid value: 70000: must be between 1 and 65535",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(json!({ "ports": [{ "protocol": "ICMP" }] })),
            "spec.ingress[0].ports[0].protocol: Unsupported value: \"ICMP\"",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(json!({ "from": [{ "ipBlock": { "cidr": "10.0.0.0/+8" } }] })),
            "ipBlock.cidr: Invalid value",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(json!({ "from": [{ "ipBlock": { "cidr": "10.0.0.0/8" }, "podSelector": {} }] })),
            "may not specify both ipBlock and another peer",
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            policy(
                json!({ "from": [{ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"] } }] }),
            ),
            "must be a strict subset of `cidr`",
        ),
        (
            "",
            "Event",
            json!({ "metadata": { "namespace": "a" }, "involvedObject": { "namespace": "b" } }),
            "does not match event.namespace",
        ),
        (
            "",
            "Event",
            json!({ "metadata": { "namespace": "default" }, "involvedObject": { "kind": "Node" } }),
            "",
        ),
        (
            "",
            "ServiceAccount",
            json!({ "metadata": { "finalizers": ["a b"] } }),
            "metadata.finalizers[0]: Invalid value",
        ),
        (
            "",
            "ConfigMap",
            json!({ "metadata": { "annotations": { "a": "x".repeat(256 * 1024) } } }),
            "metadata.annotations: Too long: may not be more than 262144 bytes",
        ),
        (
            "",
            "ConfigMap",
            json!({ "metadata": { "ownerReferences": [{ "apiVersion": "v1", "kind": "Pod", "name": "p" }] } }),
            "metadata.ownerReferences[0].uid: Invalid value: \"\": must not be empty",
        ),
    ] {
        let found = found(group, kind, named(over));
        assert!(
            if expected.is_empty() { found.is_empty() } else { found.contains(expected) },
            "{kind}: {expected}\n{found}"
        );
    }
}

#[test]
fn an_object_that_is_being_deleted_gets_no_new_finalizers() {
    let map = |deleted: bool, finalizers: Value| {
        let mut map = json!({ "metadata": { "name": "a", "finalizers": finalizers } });
        if deleted {
            map["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        map
    };
    let change = |deleted: bool, old: Value, new: Value| {
        changed("", "ConfigMap", map(deleted, old), map(deleted, new))
    };
    let (one, two) = (json!(["x.io/a"]), json!(["x.io/a", "x.io/b"]));
    assert_eq!(change(false, one.clone(), two.clone()), "");
    assert_eq!(change(true, two.clone(), one.clone()), "");
    let refused = change(true, one, two);
    assert!(refused.contains("no new finalizers") && refused.contains("x.io/b"), "{refused}");
}

#[test]
fn immutable_things_stay() {
    let map = |value: &str, immutable: bool| json!({ "metadata": { "name": "x" }, "data": { "a": value }, "immutable": immutable });
    assert_eq!(changed("", "ConfigMap", map("1", false), map("2", true)), "");
    assert!(
        changed("", "ConfigMap", map("1", true), map("2", true))
            .contains("data: Forbidden: field is immutable when `immutable` is set")
    );
    assert!(
        changed("", "ConfigMap", map("1", true), map("1", false)).contains("immutable: Forbidden")
    );
    let secret = |kind: &str| json!({ "metadata": { "name": "x" }, "type": kind });
    assert!(
        changed("", "Secret", secret("a/b"), secret("a/c"))
            .contains("type: Invalid value: \"a/c\": field is immutable")
    );
    let node = |cidr: &str| json!({ "metadata": { "name": "x" }, "spec": { "podCIDRs": [cidr] } });
    assert!(
        changed("", "Node", node("10.1.0.0/24"), node("10.2.0.0/24"))
            .contains("may not change podCIDR")
    );
    assert_eq!(
        changed("", "Node", json!({ "metadata": { "name": "x" } }), node("10.2.0.0/24")),
        ""
    );
}

#[test]
fn no_shape_of_input_makes_validation_panic() {
    let shapes = [
        json!(null),
        json!(1),
        json!("x"),
        json!([]),
        json!([1, "a", null, {}]),
        json!({}),
        json!({ "a": [1] }),
    ];
    for (group, kind) in [
        ("", "Pod"),
        ("apps", "Deployment"),
        ("apps", "ReplicaSet"),
        ("", "Service"),
        ("", "ConfigMap"),
        ("", "Secret"),
        ("", "Node"),
        ("", "Event"),
        ("", "Endpoints"),
        ("discovery.k8s.io", "EndpointSlice"),
        ("coordination.k8s.io", "Lease"),
        ("networking.k8s.io", "NetworkPolicy"),
        ("policy.networking.k8s.io", "ClusterNetworkPolicy"),
        ("", "Namespace"),
    ] {
        for shape in &shapes {
            for object in [
                shape.clone(),
                json!({ "metadata": shape, "spec": shape, "data": shape, "subsets": shape, "endpoints": shape, "ports": shape }),
                json!({ "spec": { "containers": shape, "volumes": shape, "template": { "spec": shape }, "ports": shape,
                    "selector": shape, "strategy": shape, "affinity": shape, "ingress": shape, "taints": shape } }),
                pod(
                    json!({ "containers": [{ "env": shape, "ports": shape, "resources": shape, "livenessProbe": shape,
                    "volumeMounts": shape, "lifecycle": shape, "envFrom": shape }] }),
                ),
            ] {
                let mut object = object;
                crate::defaults::apply(group, kind, &mut object);
                let _ = create(group, kind, &object);
                let _ = update(group, kind, &object, shape);
            }
        }
    }
}

#[test]
fn priority_classes_have_upstreams_bounds() {
    let with = |name: &str, value: i64, more: Value| {
        let mut class = json!({ "metadata": { "name": name }, "value": value });
        json_patch_merge(&mut class, &more);
        found("scheduling.k8s.io", "PriorityClass", class)
    };
    assert_eq!(with("high", 1_000_000_000, json!({})), "");
    assert_eq!(with("low", -2_000_000_000, json!({ "preemptionPolicy": "Never" })), "");
    assert_eq!(with("system-node-critical", 2_000_001_000, json!({})), "");
    assert!(with("system-node-critical", 1, json!({})).contains("reserved for system use only"));
    let default = json!({ "globalDefault": true });
    assert!(with("system-node-critical", 2_000_001_000, default).contains("reserved"));
    assert!(with("high", 1_000_000_001, json!({})).contains("is 1000000000"));
    assert!(with("high", 1, json!({ "preemptionPolicy": "Ask" })).contains("preemptionPolicy"));

    let class = json!({ "metadata": { "name": "high" }, "value": 1 });
    let other = with_policy(&class, "Never");
    let changed = |old: &Value, new: &Value| {
        changed("scheduling.k8s.io", "PriorityClass", old.clone(), new.clone())
    };
    assert_eq!(changed(&class, &with_policy(&class, "PreemptLowerPriority")), "");
    assert!(changed(&class, &other).contains("field is immutable"));
    assert_eq!(
        changed(&class, &json!({ "metadata": { "name": "high" } })),
        "value: Forbidden: may not be changed in an update."
    );
}

fn with_policy(class: &Value, policy: &str) -> Value {
    with(class.clone(), &json!({ "preemptionPolicy": policy }))
}
