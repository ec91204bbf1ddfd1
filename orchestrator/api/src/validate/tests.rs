use serde_json::{Value, json};

use super::*;

fn texts(errors: &[FieldError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn a_good_pod_passes_and_common_mistakes_are_named() {
    let mut pod = json!({ "metadata": { "name": "a" }, "spec": { "containers": [{ "name": "a", "image": "web:v1" }] } });
    crate::defaults::apply("", "Pod", &mut pod);
    assert_eq!(create("", "Pod", &pod), []);

    let mut bad = json!({ "metadata": { "name": "A_b", "labels": { "x": "a b" } }, "spec": {
        "restartPolicy": "Sometimes",
        "containers": [
            { "name": "a", "image": "", "ports": [{ "containerPort": 70000 }],
              "resources": { "requests": { "cpu": "2" }, "limits": { "cpu": "1" } },
              "volumeMounts": [{ "name": "none", "mountPath": "/x" }] },
            { "name": "a", "image": "two words" },
        ],
    } });
    crate::defaults::apply("", "Pod", &mut bad);
    let found = texts(&create("", "Pod", &bad)).join("\n");
    for expected in [
        "metadata.name: Invalid value: \"A_b\"",
        "metadata.labels: Invalid value: \"a b\"",
        "spec.containers[0].image: Required value",
        "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
        "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        "spec.containers[0].volumeMounts[0].name: Not found: \"none\"",
        "spec.containers[1].name: Duplicate value: \"a\"",
        "spec.restartPolicy: Unsupported value: \"Sometimes\"",
    ] {
        assert!(found.contains(expected), "{expected}\nis not in\n{found}");
    }
}

#[test]
fn a_selector_must_match_its_template_and_stay() {
    let deployment = |label: &str| {
        let mut object = json!({ "metadata": { "name": "a" }, "spec": {
            "selector": { "matchLabels": { "app": "web" } },
            "template": { "metadata": { "labels": { "app": label } },
                          "spec": { "containers": [{ "name": "a", "image": "web:v1" }] } },
        } });
        crate::defaults::apply("apps", "Deployment", &mut object);
        object
    };
    assert_eq!(create("apps", "Deployment", &deployment("web")), []);
    let found = texts(&create("apps", "Deployment", &deployment("db")));
    assert!(found[0].contains("`selector` does not match template `labels`"), "{found:?}");
    let mut changed = deployment("web");
    changed["spec"]["selector"]["matchLabels"]["app"] = json!("other");
    let found = texts(&update("apps", "Deployment", &changed, &deployment("web")));
    assert!(found.iter().any(|text| text.contains("field is immutable")), "{found:?}");
}

#[test]
fn of_a_running_pod_only_few_fields_may_change() {
    let old = json!({ "metadata": { "name": "a" }, "spec": { "containers": [{ "name": "a", "image": "web:v1" }] } });
    let mut image = old.clone();
    image["spec"]["containers"][0]["image"] = json!("web:v2");
    assert_eq!(update("", "Pod", &image, &old), []);
    let mut command = old.clone();
    command["spec"]["containers"][0]["command"] = json!(["x"]);
    assert!(
        texts(&update("", "Pod", &command, &old))[0]
            .contains("pod updates may not change fields other than")
    );
}

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
fn mistakes_in_containers_by_table() {
    for (container, expected) in [
        (json!({ "image": "two words" }), "spec.containers[0].image: Invalid value: \"two words\""),
        (json!({ "image": "Web:v1" }), "the repository name must be lowercase"),
        (
            json!({ "ports": [{ "containerPort": 80, "name": "Http" }] }),
            "ports[0].name: Invalid value: \"Http\"",
        ),
        (
            json!({ "ports": [{ "containerPort": 80, "hostPort": 80 }, { "containerPort": 81, "hostPort": 80 }] }),
            "ports[1].hostPort: Duplicate value: \"TCP//80\"",
        ),
        (
            json!({ "env": [{ "name": "A=B" }] }),
            "env[0].name: Invalid value: \"A=B\": a valid environment variable name",
        ),
        (
            json!({ "env": [{ "name": "A", "valueFrom": {} }] }),
            "env[0].valueFrom: Invalid value: \"\": must specify one of",
        ),
        (
            json!({ "env": [{ "name": "A", "valueFrom": { "fieldRef": { "fieldPath": "spec.none" } } }] }),
            "env[0].valueFrom.fieldRef.fieldPath: Unsupported value: \"spec.none\"",
        ),
        (
            json!({ "env": [{ "name": "A", "valueFrom": { "secretKeyRef": { "name": "s" } } }] }),
            "env[0].valueFrom.secretKeyRef.key: Required value",
        ),
        (json!({ "envFrom": [{}] }), "envFrom[0]: Invalid value: \"\": must specify one of"),
        (
            json!({ "volumeMounts": [{ "name": "none", "mountPath": "/x" }] }),
            "volumeMounts[0].name: Not found: \"none\"",
        ),
        (
            json!({ "volumeMounts": [{ "name": "data", "mountPath": "/x" }, { "name": "data", "mountPath": "/x" }] }),
            "volumeMounts[1].mountPath: Invalid value: \"/x\": must be unique",
        ),
        (
            json!({ "volumeMounts": [{ "name": "data", "mountPath": "/x", "subPath": "../y" }] }),
            "volumeMounts[0].subPath: Invalid value: \"../y\": must not contain '..'",
        ),
        (
            json!({ "resources": { "limits": { "cpu": "lots" } } }),
            "resources.limits[cpu]: Invalid value: \"lots\": quantities must match",
        ),
        (
            json!({ "resources": { "limits": { "cpu": "-1" } } }),
            "resources.limits[cpu]: Invalid value: \"-1\": must be greater than or equal to 0",
        ),
        (
            json!({ "resources": { "limits": { "cpus": "1" } } }),
            "must be a standard resource for containers",
        ),
        (
            json!({ "resources": { "requests": { "a.b/gpu": "1" } } }),
            "resources.limits: Required value: Limit must be set",
        ),
        (json!({ "resources": { "limits": { "a.b/gpu": "1.5" } } }), "must be an integer"),
        (
            json!({ "livenessProbe": {} }),
            "livenessProbe: Required value: must specify a handler type",
        ),
        (
            json!({ "livenessProbe": { "exec": { "command": ["a"] }, "httpGet": { "port": 80 } } }),
            "livenessProbe.httpGet: Forbidden: may not specify more than 1 handler type",
        ),
        (
            json!({ "livenessProbe": { "httpGet": { "port": 80 }, "successThreshold": 2 } }),
            "successThreshold: Invalid value: 2: must be 1",
        ),
        (
            json!({ "readinessProbe": { "tcpSocket": { "port": 0 } } }),
            "readinessProbe.tcpSocket.port: Invalid value: 0",
        ),
        (
            json!({ "readinessProbe": { "exec": {} } }),
            "readinessProbe.exec.command: Required value",
        ),
        (
            json!({ "imagePullPolicy": "Sometimes" }),
            "imagePullPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"IfNotPresent\", \"Never\"",
        ),
        (
            json!({ "lifecycle": { "preStop": {} } }),
            "lifecycle.preStop: Required value: must specify a handler type",
        ),
    ] {
        let found = found("", "Pod", one_container(container.clone()));
        assert!(found.contains(expected), "{container}\nfound: {found}\nwanted: {expected}");
    }
}

#[test]
fn a_container_that_uses_everything_right_passes() {
    let container = json!({
        "ports": [{ "containerPort": 80, "name": "http" }, { "containerPort": 443, "name": "https", "hostPort": 443 }],
        "env": [
            { "name": "A", "value": "b" },
            { "name": "IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
            { "name": "L", "valueFrom": { "fieldRef": { "fieldPath": "metadata.labels['app']" } } },
            { "name": "K", "valueFrom": { "configMapKeyRef": { "name": "c", "key": "k", "optional": true } } },
            { "name": "M", "valueFrom": { "resourceFieldRef": { "resource": "limits.memory" } } },
        ],
        "envFrom": [{ "secretRef": { "name": "s" }, "prefix": "X_" }],
        "volumeMounts": [{ "name": "data", "mountPath": "/x", "subPath": "y/z" }],
        "resources": { "requests": { "cpu": "100m", "memory": 1000000 }, "limits": { "cpu": 1, "memory": "1Gi", "a.b/gpu": 1 } },
        "livenessProbe": { "httpGet": { "port": "http" } },
        "readinessProbe": { "grpc": { "port": 80 } },
        "startupProbe": { "exec": { "command": ["true"] } },
        "lifecycle": { "preStop": { "sleep": { "seconds": 1 } } },
    });
    assert_eq!(found("", "Pod", one_container(container)), "");
}

#[test]
fn mistakes_in_pod_specs_by_table() {
    let node_affinity = |expression: Value| {
        json!({ "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{ "matchExpressions": [expression] }] } } } })
    };
    for (spec, expected) in [
        (json!({ "containers": [] }), "spec.containers: Required value"),
        (
            json!({ "restartPolicy": "Sometimes" }),
            "spec.restartPolicy: Unsupported value: \"Sometimes\"",
        ),
        (json!({ "dnsPolicy": "None" }), "spec.dnsConfig: Required value"),
        (
            json!({ "activeDeadlineSeconds": 0 }),
            "spec.activeDeadlineSeconds: Invalid value: 0: must be between 1 and 2147483647",
        ),
        (
            json!({ "terminationGracePeriodSeconds": -1 }),
            "spec.terminationGracePeriodSeconds: Invalid value: -1",
        ),
        (json!({ "hostname": "a.b" }), "spec.hostname: Invalid value: \"a.b\""),
        (json!({ "nodeSelector": { "a b": "c" } }), "spec.nodeSelector: Invalid value: \"a b\""),
        (json!({ "tolerations": [{ "key": "" }] }), "spec.tolerations[0].operator: Invalid value"),
        (
            json!({ "tolerations": [{ "key": "k", "operator": "Exists", "value": "v" }] }),
            "value must be empty when `operator` is 'Exists'",
        ),
        (
            json!({ "tolerations": [{ "operator": "Exists", "tolerationSeconds": 3 }] }),
            "effect must be 'NoExecute' when `tolerationSeconds` is set",
        ),
        (
            json!({ "hostAliases": [{ "ip": "1.2.3" }] }),
            "spec.hostAliases[0].ip: Invalid value: \"1.2.3\"",
        ),
        (
            json!({ "securityContext": { "runAsUser": -1 } }),
            "spec.securityContext.runAsUser: Invalid value: -1",
        ),
        (
            json!({ "volumes": [{ "name": "v" }, { "name": "v" }] }),
            "spec.volumes[1].name: Duplicate value: \"v\"",
        ),
        (
            json!({ "volumes": [{ "name": "v", "emptyDir": {}, "hostPath": { "path": "/x" } }] }),
            "spec.volumes[0].hostPath: Forbidden: may not specify more than 1 volume type",
        ),
        (
            json!({ "volumes": [{ "name": "v", "configMap": {} }] }),
            "spec.volumes[0].configMap.name: Required value",
        ),
        (
            json!({ "volumes": [{ "name": "v", "hostPath": { "path": "/a/../b" } }] }),
            "must not contain '..'",
        ),
        (
            json!({ "volumes": [{ "name": "v", "secret": { "secretName": "s", "defaultMode": 1000 } }] }),
            "defaultMode: Invalid value: 1000",
        ),
        (
            json!({ "volumes": [{ "name": "v", "downwardAPI": { "items": [{ "path": "p" }] } }] }),
            "one of fieldRef and resourceFieldRef is required",
        ),
        (
            json!({ "volumes": [{ "name": "v", "projected": { "sources": [{ "serviceAccountToken": { "path": "t", "expirationSeconds": 5 } }] } }] }),
            "may not specify a duration less than 10 minutes",
        ),
        (
            node_affinity(json!({ "key": "a", "operator": "In" })),
            "matchExpressions[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'",
        ),
        (node_affinity(json!({ "key": "a", "operator": "Near" })), "not a valid selector operator"),
        (
            json!({ "affinity": { "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [{ "labelSelector": {} }] } } }),
            "requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey: Required value: can not be empty",
        ),
        (
            json!({ "topologySpreadConstraints": [{ "maxSkew": 0, "topologyKey": "k", "whenUnsatisfiable": "DoNotSchedule" }] }),
            "spec.topologySpreadConstraints[0].maxSkew: Invalid value: 0: must be greater than zero",
        ),
        (
            json!({ "initContainers": [{ "name": "i", "image": "a", "livenessProbe": { "tcpSocket": { "port": 1 } } }] }),
            "spec.initContainers[0].livenessProbe: Forbidden: may not be set for init containers without restartPolicy=Always",
        ),
        (
            json!({ "initContainers": [{ "name": "a", "image": "a" }] }),
            "spec.containers[0].name: Duplicate value: \"a\"",
        ),
    ] {
        let found = found("", "Pod", pod(spec.clone()));
        assert!(found.contains(expected), "{spec}\nfound: {found}\nwanted: {expected}");
    }
}

#[test]
fn changes_of_a_pod_by_table() {
    let forbidden = "pod updates may not change fields other than";
    for (old, new, expected) in [
        (json!({}), json!({ "tolerations": [{ "operator": "Exists" }] }), ""),
        (
            json!({ "tolerations": [{ "operator": "Exists" }] }),
            json!({ "tolerations": [] }),
            forbidden,
        ),
        (json!({}), json!({ "activeDeadlineSeconds": 5 }), ""),
        (
            json!({ "activeDeadlineSeconds": 5 }),
            json!({ "activeDeadlineSeconds": 6 }),
            "must be less than or equal to previous value",
        ),
        (json!({}), json!({ "terminationGracePeriodSeconds": 5 }), forbidden),
        (json!({}), json!({ "nodeName": "n" }), forbidden),
        (
            json!({}),
            json!({ "containers": [{ "name": "a", "image": "" }] }),
            "spec.containers[0].image: Required value",
        ),
        (
            json!({}),
            json!({ "containers": [{ "name": "a", "image": "a" }, { "name": "b", "image": "b" }] }),
            "may not add or remove containers",
        ),
        (json!({ "schedulingGates": [{ "name": "g" }] }), json!({ "schedulingGates": null }), ""),
        (json!({}), json!({ "schedulingGates": [{ "name": "g" }] }), "only deletion is allowed"),
        (
            json!({ "schedulingGates": [{ "name": "g" }] }),
            json!({ "schedulingGates": [{ "name": "g" }], "nodeSelector": { "a": "b" } }),
            "",
        ),
        (json!({}), json!({ "nodeSelector": { "a": "b" } }), forbidden),
    ] {
        let found = changed("", "Pod", pod(old.clone()), pod(new.clone()));
        assert!(
            if expected.is_empty() { found.is_empty() } else { found.contains(expected) },
            "{old} -> {new}\n{found}"
        );
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
fn mistakes_in_deployments_by_table() {
    let deployment = |spec: Value| {
        let base = json!({ "metadata": { "name": "x" }, "spec": {
            "selector": { "matchLabels": { "app": "web" } },
            "template": { "metadata": { "labels": { "app": "web" } }, "spec": { "containers": [{ "name": "a", "image": "a:1" }] } },
        } });
        with(base, &json!({ "spec": spec }))
    };
    let rolling = |unavailable: Value, surge: Value| json!({ "strategy": { "rollingUpdate": { "maxUnavailable": unavailable, "maxSurge": surge } } });
    for (spec, expected) in [
        (json!({}), ""),
        (
            json!({ "replicas": -1 }),
            "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
        ),
        (json!({ "selector": null }), "spec.selector: Required value"),
        (
            json!({ "selector": { "matchLabels": null } }),
            "empty selector is invalid for deployment",
        ),
        (
            json!({ "selector": { "matchExpressions": [{ "key": "a", "operator": "In" }] } }),
            "spec.selector.matchExpressions[0].values: Required value",
        ),
        (rolling(json!(0), json!("0%")), "may not be 0 when `maxSurge` is 0"),
        (rolling(json!("101%"), json!(1)), "must not be greater than 100%"),
        (rolling(json!("many"), json!(1)), "must be an integer or percentage"),
        (rolling(json!(-1), json!(1)), "must be greater than or equal to 0"),
        (
            json!({ "strategy": { "type": "Never" } }),
            "spec.strategy.type: Unsupported value: \"Never\"",
        ),
        (
            json!({ "strategy": { "type": "Recreate", "rollingUpdate": {} } }),
            "may not be specified when strategy `type` is 'Recreate'",
        ),
        (json!({ "minReadySeconds": 600 }), "must be greater than minReadySeconds"),
        (
            json!({ "template": { "spec": { "restartPolicy": "Never" } } }),
            "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
        ),
        (
            json!({ "template": { "spec": { "containers": null } } }),
            "spec.template.spec.containers: Required value",
        ),
    ] {
        let found = found("apps", "Deployment", deployment(spec.clone()));
        assert!(
            if expected.is_empty() { found.is_empty() } else { found.contains(expected) },
            "{spec}\n{found}"
        );
    }
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
