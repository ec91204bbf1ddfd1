use serde_json::{Value, json};

use super::*;

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
fn containers_for_debugging_only_come_and_only_by_their_own_way() {
    let with = |list: Value| {
        let mut pod = json!({ "metadata": { "name": "a" }, "spec": {
            "containers": [{ "name": "a", "image": "web:v1" }], "ephemeralContainers": list } });
        crate::defaults::apply("", "Pod", &mut pod);
        pod
    };
    let one = json!({ "name": "d", "image": "busybox:1", "targetContainerName": "a" });
    let (none, first) = (with(json!([])), with(json!([one])));
    assert_eq!(ephemeral_containers(&first, &none), []);
    assert_eq!(ephemeral_containers(&first, &first), []);
    for (new, old, expected) in [
        (with(json!([])), &first, "may not be removed"),
        (with(json!([{ "name": "d", "image": "busybox:2" }])), &first, "may not be changed"),
        (with(json!([{ "name": "a", "image": "busybox:1" }])), &none, "Duplicate value"),
        (with(json!([{ "name": "e", "image": "" }])), &none, "image: Required value"),
        (
            with(json!([{ "name": "e", "image": "x:1", "targetContainerName": "b" }])),
            &none,
            "targetContainerName: Not found",
        ),
        (
            with(json!([{ "name": "e", "image": "x:1", "ports": [{ "containerPort": 1 }] }])),
            &none,
            "ports: Forbidden",
        ),
    ] {
        let found = texts(&ephemeral_containers(&new, old)).join("\n");
        assert!(found.contains(expected), "{expected}\nis not in\n{found}");
    }
    assert!(texts(&create("", "Pod", &first)).join("").contains("cannot be set on create"));
    assert!(texts(&update("", "Pod", &first, &none)).join("").contains("spec: Forbidden"));
}
