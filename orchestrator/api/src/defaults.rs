//! Defaults that the API server writes into objects before they are stored.
//!
//! They are part of the API: a stored default decides what a pod template hashes to and whether `apply` sees a
//! change. Source: upstream's `pkg/apis/*/v1/defaults.go`, restated over JSON.

mod normal;

use serde_json::{Map, Value, json};

/// Sets the defaults of one object, and brings it into the form in which it is stored: without nulls, quantities
/// in their canonical form.
pub fn apply(group: &str, kind: &str, object: &mut Value) {
    normal::drop_nulls(object);
    match (group, kind) {
        ("", "Pod") => inside(object, "spec", |spec| {
            pod_spec(spec);
            pod_itself(spec);
        }),
        ("apps", "Deployment") => deployment(object),
        ("apps", "ReplicaSet") => replica_set(object),
        ("", "Service") => service(object),
        ("", "Secret") => set(object, "type", json!("Opaque")),
        ("", "Namespace") => namespace(object),
        ("", "Node") => node(object),
        ("", "Endpoints") => each(object, "subsets", |subset| {
            each(subset, "ports", |port| set(port, "protocol", json!("TCP")))
        }),
        ("discovery.k8s.io", "EndpointSlice") => each(object, "ports", |port| {
            set(port, "name", json!(""));
            set(port, "protocol", json!("TCP"));
        }),
        ("networking.k8s.io", "NetworkPolicy") => network_policy(object),
        (crate::priority::GROUP, "PriorityClass") => {
            set(object, "value", json!(0));
            set_text(object, "preemptionPolicy", crate::priority::PREEMPT);
        }
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => binding(object),
        _ => {}
    }
}

/// Sets a field that is absent or null.
fn set(object: &mut Value, key: &str, value: Value) {
    if let Value::Object(map) = object
        && map.get(key).is_none_or(Value::is_null)
    {
        map.insert(key.to_owned(), value);
    }
}

/// Sets a text that is absent or empty.
fn set_text(object: &mut Value, key: &str, value: &str) {
    if object[key].as_str().is_none_or(str::is_empty) && object.is_object() {
        object[key] = json!(value);
    }
}

fn each(object: &mut Value, key: &str, mut change: impl FnMut(&mut Value)) {
    if let Some(items) = object.get_mut(key).and_then(Value::as_array_mut) {
        // What is no object is for validation to name.
        items.iter_mut().filter(|item| item.is_object()).for_each(&mut change);
    }
}

fn inside(object: &mut Value, key: &str, change: impl FnOnce(&mut Value)) {
    if let Some(inner) = object.get_mut(key).filter(|inner| inner.is_object()) {
        change(inner);
    }
}

/// The defaults of a pod spec, in pods and in templates alike. What is set here is part of every template's hash.
fn pod_spec(spec: &mut Value) {
    set_text(spec, "restartPolicy", "Always");
    set(spec, "terminationGracePeriodSeconds", json!(30));
    set_text(spec, "dnsPolicy", "ClusterFirst");
    set(spec, "securityContext", json!({}));
    set_text(spec, "schedulerName", "default-scheduler");
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        each(spec, list, container);
    }
    // The deprecated alias and the field follow each other; the field decides.
    if let Some(account) = text(spec, "serviceAccountName").or_else(|| text(spec, "serviceAccount"))
    {
        spec["serviceAccountName"] = json!(account);
        spec["serviceAccount"] = json!(account);
    }
    each(spec, "volumes", volume);
    normal::pod_quantities(spec);
}

/// The defaults that only a pod gets, not the template it was made from.
fn pod_itself(spec: &mut Value) {
    set(spec, "enableServiceLinks", json!(true));
    let host_network = spec["hostNetwork"] == true;
    for list in ["initContainers", "containers"] {
        each(spec, list, |container| {
            inside(container, "resources", requests_from_limits);
            if host_network {
                each(container, "ports", |port| {
                    if port["hostPort"].as_i64().unwrap_or(0) == 0 {
                        port["hostPort"] = port["containerPort"].clone();
                    }
                });
            }
        });
    }
}

/// The API groups of role and subjects.
fn binding(object: &mut Value) {
    const GROUP: &str = "rbac.authorization.k8s.io";
    inside(object, "roleRef", |role| set_text(role, "apiGroup", GROUP));
    each(object, "subjects", |subject| {
        if matches!(subject["kind"].as_str(), Some("User" | "Group")) {
            set_text(subject, "apiGroup", GROUP);
        }
    });
}

fn text(object: &Value, key: &str) -> Option<String> {
    object[key].as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

fn container(container: &mut Value) {
    pull_policy(container, "image", "imagePullPolicy");
    set_text(container, "terminationMessagePath", "/dev/termination-log");
    set_text(container, "terminationMessagePolicy", "File");
    each(container, "ports", |port| set_text(port, "protocol", "TCP"));
    each(container, "env", |env| {
        inside(env, "valueFrom", |source| {
            inside(source, "fieldRef", |field| set_text(field, "apiVersion", "v1"))
        });
    });
    if !container["resources"].is_object() {
        container["resources"] = json!({});
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        inside(container, name, probe);
    }
    inside(container, "lifecycle", |lifecycle| {
        for hook in ["postStart", "preStop"] {
            inside(lifecycle, hook, |hook| inside(hook, "httpGet", http_get));
        }
    });
}

fn pull_policy(object: &mut Value, image: &str, policy: &str) {
    let latest = tag_is_latest(object[image].as_str().unwrap_or_default());
    set_text(object, policy, if latest { "Always" } else { "IfNotPresent" });
}

/// Whether an image has the tag `latest`, spelled or implied.
fn tag_is_latest(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let name = image.rsplit('/').next().unwrap_or(image);
    name.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

fn requests_from_limits(resources: &mut Value) {
    let Some(limits) = resources["limits"].as_object().cloned() else { return };
    if !resources["requests"].is_object() {
        resources["requests"] = Value::Object(Map::new());
    }
    for (name, limit) in limits {
        set(&mut resources["requests"], &name, limit);
    }
}

fn http_get(action: &mut Value) {
    set_text(action, "path", "/");
    set_text(action, "scheme", "HTTP");
}

fn probe(probe: &mut Value) {
    for (key, value) in [
        ("timeoutSeconds", 1),
        ("periodSeconds", 10),
        ("successThreshold", 1),
        ("failureThreshold", 3),
    ] {
        if probe[key].as_i64().unwrap_or(0) == 0 {
            probe[key] = json!(value);
        }
    }
    inside(probe, "httpGet", http_get);
    inside(probe, "grpc", |grpc| set(grpc, "service", json!("")));
}

/// Mode of files in configMap, secret, downwardAPI and projected volumes: 0644.
const FILE_MODE: i64 = 0o644;

fn volume(volume: &mut Value) {
    for source in ["configMap", "secret", "downwardAPI", "projected"] {
        inside(volume, source, |source| set(source, "defaultMode", json!(FILE_MODE)));
    }
    inside(volume, "downwardAPI", |source| each(source, "items", downward_item));
    inside(volume, "projected", |source| {
        each(source, "sources", |part| {
            inside(part, "serviceAccountToken", |token| {
                set(token, "expirationSeconds", json!(3600))
            });
            inside(part, "downwardAPI", |source| each(source, "items", downward_item));
        });
    });
    inside(volume, "hostPath", |source| set(source, "type", json!("")));
    inside(volume, "image", |source| pull_policy(source, "reference", "pullPolicy"));
    inside(volume, "ephemeral", |source| {
        inside(source, "volumeClaimTemplate", |template| {
            inside(template, "spec", |spec| set(spec, "volumeMode", json!("Filesystem")));
        });
    });
    let sources =
        volume.as_object().map_or(0, |map| map.keys().filter(|key| *key != "name").count());
    if sources == 0 {
        set(volume, "emptyDir", json!({}));
    }
}

fn downward_item(item: &mut Value) {
    inside(item, "fieldRef", |field| set_text(field, "apiVersion", "v1"));
}

fn template(spec: &mut Value) {
    inside(spec, "template", |template| {
        if !template["metadata"].is_object() {
            template["metadata"] = json!({});
        }
        inside(template, "spec", pod_spec);
    });
}

fn deployment(object: &mut Value) {
    inside(object, "spec", |spec| {
        set(spec, "replicas", json!(1));
        set(spec, "revisionHistoryLimit", json!(10));
        set(spec, "progressDeadlineSeconds", json!(600));
        set(spec, "strategy", json!({}));
        inside(spec, "strategy", |strategy| {
            set_text(strategy, "type", "RollingUpdate");
            if strategy["type"] == "RollingUpdate" {
                set(strategy, "rollingUpdate", json!({}));
                inside(strategy, "rollingUpdate", |rolling| {
                    set(rolling, "maxUnavailable", json!("25%"));
                    set(rolling, "maxSurge", json!("25%"));
                });
            }
        });
        template(spec);
    });
}

fn replica_set(object: &mut Value) {
    inside(object, "spec", |spec| {
        set(spec, "replicas", json!(1));
        template(spec);
    });
}

/// How long a client stays with its backend under `sessionAffinity: ClientIP`: three hours.
const CLIENT_IP_SECS: i64 = 3 * 60 * 60;

fn service(object: &mut Value) {
    inside(object, "spec", |spec| {
        set_text(spec, "sessionAffinity", "None");
        if spec["sessionAffinity"] == "ClientIP" {
            if spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].is_null() {
                spec["sessionAffinityConfig"] =
                    json!({ "clientIP": { "timeoutSeconds": CLIENT_IP_SECS } });
            }
        } else if let Some(map) = spec.as_object_mut() {
            map.shift_remove("sessionAffinityConfig");
        }
        set_text(spec, "type", "ClusterIP");
        each(spec, "ports", |port| {
            set_text(port, "protocol", "TCP");
            if port["targetPort"].is_null() || port["targetPort"] == 0 || port["targetPort"] == "" {
                port["targetPort"] = port["port"].clone();
            }
        });
        let kind = spec["type"].as_str().unwrap_or_default().to_owned();
        let external_ips = spec["externalIPs"].as_array().is_some_and(|ips| !ips.is_empty());
        if matches!(kind.as_str(), "NodePort" | "LoadBalancer")
            || (kind == "ClusterIP" && external_ips)
        {
            set_text(spec, "externalTrafficPolicy", "Cluster");
        }
        if matches!(kind.as_str(), "ClusterIP" | "NodePort" | "LoadBalancer") {
            set_text(spec, "internalTrafficPolicy", "Cluster");
        }
        if kind == "LoadBalancer" {
            set(spec, "allocateLoadBalancerNodePorts", json!(true));
        }
    });
}

fn namespace(object: &mut Value) {
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    if !name.is_empty() {
        if !object["metadata"]["labels"].is_object() {
            object["metadata"]["labels"] = json!({});
        }
        object["metadata"]["labels"]["kubernetes.io/metadata.name"] = json!(name);
    }
}

fn node(object: &mut Value) {
    inside(object, "status", |status| {
        inside(status, "capacity", normal::quantities);
        inside(status, "allocatable", normal::quantities);
        if status["allocatable"].is_null() && status["capacity"].is_object() {
            status["allocatable"] = status["capacity"].clone();
        }
    });
}

fn network_policy(object: &mut Value) {
    inside(object, "spec", |spec| {
        for list in ["ingress", "egress"] {
            each(spec, list, |rule| each(rule, "ports", |port| set_text(port, "protocol", "TCP")));
        }
        if spec["policyTypes"].as_array().is_none_or(Vec::is_empty) {
            let egress = spec["egress"].as_array().is_some_and(|rules| !rules.is_empty());
            spec["policyTypes"] =
                if egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_gets_upstreams_defaults() {
        let mut pod = json!({ "spec": {
            "containers": [{ "name": "a", "image": "web", "ports": [{ "containerPort": 80 }],
                "resources": { "limits": { "cpu": "1" } }, "readinessProbe": { "httpGet": { "port": 80 } } }],
            "volumes": [{ "name": "v" }, { "name": "c", "configMap": { "name": "x" } }],
        } });
        apply("", "Pod", &mut pod);
        let spec = &pod["spec"];
        assert_eq!(spec["restartPolicy"], "Always");
        assert_eq!(spec["terminationGracePeriodSeconds"], 30);
        let container = &spec["containers"][0];
        assert_eq!(container["imagePullPolicy"], "Always");
        assert_eq!(container["ports"][0]["protocol"], "TCP");
        assert_eq!(container["resources"]["requests"]["cpu"], "1");
        assert_eq!(
            container["readinessProbe"]["httpGet"],
            json!({ "port": 80, "path": "/", "scheme": "HTTP" })
        );
        assert_eq!(container["readinessProbe"]["failureThreshold"], 3);
        assert_eq!(spec["volumes"][0]["emptyDir"], json!({}));
        assert_eq!(spec["volumes"][1]["configMap"]["defaultMode"], 420);
    }

    #[test]
    fn a_template_does_not_get_what_only_a_pod_gets() {
        let spec = json!({ "hostNetwork": true, "serviceAccount": "bot", "containers": [{
            "image": "web:1", "ports": [{ "containerPort": 80 }], "resources": { "limits": { "cpu": "1" } } }] });
        let mut deployment = json!({ "spec": { "template": { "spec": spec } } });
        apply("apps", "Deployment", &mut deployment);
        let template = &deployment["spec"]["template"]["spec"];
        assert_eq!(template["containers"][0]["resources"], json!({ "limits": { "cpu": "1" } }));
        assert_eq!(template["containers"][0]["ports"][0]["hostPort"], Value::Null);
        assert_eq!(template["enableServiceLinks"], Value::Null);
        assert_eq!(template["serviceAccountName"], "bot");

        let mut pod = json!({ "spec": spec });
        apply("", "Pod", &mut pod);
        let spec = &pod["spec"];
        assert_eq!(spec["containers"][0]["resources"]["requests"], json!({ "cpu": "1" }));
        assert_eq!(spec["containers"][0]["ports"][0]["hostPort"], 80);
        assert_eq!(spec["enableServiceLinks"], true);
    }

    #[test]
    fn quantities_are_stored_in_their_canonical_form_and_nulls_not_at_all() {
        let mut pod = json!({ "metadata": { "creationTimestamp": null }, "spec": {
            "nodeSelector": null,
            "containers": [{ "image": "web:1",
                "resources": { "requests": { "cpu": 1, "memory": "1024Mi" }, "limits": { "cpu": 1.5, "memory": "what" } },
                "env": [{ "name": "A", "valueFrom": { "resourceFieldRef": { "resource": "limits.cpu" } } }] }],
            "volumes": [{ "name": "v", "emptyDir": { "sizeLimit": "0.5Gi" } }],
        } });
        apply("", "Pod", &mut pod);
        assert_eq!(pod["metadata"], json!({}));
        let spec = &pod["spec"];
        assert!(spec.get("nodeSelector").is_none());
        let container = &spec["containers"][0];
        assert_eq!(container["resources"]["requests"], json!({ "cpu": "1", "memory": "1Gi" }));
        assert_eq!(container["resources"]["limits"], json!({ "cpu": "1500m", "memory": "what" }));
        assert_eq!(container["env"][0]["valueFrom"]["resourceFieldRef"]["divisor"], "0");
        assert_eq!(spec["volumes"][0]["emptyDir"]["sizeLimit"], "512Mi");
    }

    #[test]
    fn objects_of_the_wrong_shape_are_left_for_validation() {
        for object in [
            json!(1),
            json!([]),
            json!({ "spec": 1 }),
            json!({ "spec": { "containers": [1, "a", []],
            "volumes": 3, "template": "x", "ports": ["x"], "strategy": 1, "ingress": [1] }, "metadata": 1 }),
        ] {
            for (group, kind) in [
                ("", "Pod"),
                ("apps", "Deployment"),
                ("apps", "ReplicaSet"),
                ("", "Service"),
                ("", "Secret"),
                ("", "Namespace"),
                ("", "Node"),
                ("", "Endpoints"),
                ("discovery.k8s.io", "EndpointSlice"),
                ("networking.k8s.io", "NetworkPolicy"),
            ] {
                apply(group, kind, &mut object.clone());
            }
        }
    }

    #[test]
    fn session_affinity_and_its_timeout_go_together() {
        let affinity = |spec: Value| {
            let mut service = json!({ "spec": spec });
            apply("", "Service", &mut service);
            service["spec"]["sessionAffinityConfig"].clone()
        };
        assert_eq!(
            affinity(json!({ "sessionAffinity": "ClientIP" }))["clientIP"]["timeoutSeconds"],
            10800
        );
        let config = json!({ "clientIP": { "timeoutSeconds": 5 } });
        assert_eq!(
            affinity(json!({ "sessionAffinity": "ClientIP", "sessionAffinityConfig": config })),
            config
        );
        assert_eq!(affinity(json!({ "sessionAffinityConfig": config })), Value::Null);
    }

    #[test]
    fn defaults_are_stable() {
        for (group, kind, mut object) in [
            (
                "apps",
                "Deployment",
                json!({ "spec": { "template": { "spec": { "containers": [{ "image": "a:1" }] } } } }),
            ),
            ("", "Service", json!({ "spec": { "type": "NodePort", "ports": [{ "port": 80 }] } })),
            ("", "Namespace", json!({ "metadata": { "name": "shop" } })),
            (
                "networking.k8s.io",
                "NetworkPolicy",
                json!({ "spec": { "podSelector": {}, "egress": [{}] } }),
            ),
        ] {
            apply(group, kind, &mut object);
            let once = object.clone();
            apply(group, kind, &mut object);
            assert_eq!(object, once, "{kind}");
        }
    }

    #[test]
    fn the_latest_tag_is_recognised() {
        for (image, latest) in [
            ("web", true),
            ("web:latest", true),
            ("host:5000/web", true),
            ("web:v1", false),
            ("web@sha256:0", false),
        ] {
            assert_eq!(tag_is_latest(image), latest, "{image}");
        }
    }
}
