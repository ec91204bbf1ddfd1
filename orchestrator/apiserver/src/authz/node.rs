//! The node authoriser: what an agent may do because of the pods that are bound to its node (Kubernetes, "Using Node
//! Authorization").
//!
//! Pure over a snapshot of the pods. There is no graph to keep: a pod that refers to a Secret has its name in its
//! JSON, between quotes, so only pods of the node that have it are parsed.

use orch_store::cache::Snapshot;
use serde_json::Value;

use super::{Attributes, ResourceTarget, Target, required};

/// Namespace of the nodes' Leases.
pub(super) const LEASES: &str = "kube-node-lease";

/// What the node authoriser says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Opinion {
    Allowed,
    /// It does not allow it; why, where it is about objects that belong to nodes.
    None(String),
    /// It does not allow it, because none of the pods says that the object is the node's.
    Unrelated(String),
    /// It is about a pod that is not there.
    NoSuchPod,
}

impl Opinion {
    /// Whether more pods might change it.
    pub(super) fn depends_on_pods(&self) -> bool {
        matches!(self, Self::Unrelated(_) | Self::NoSuchPod)
    }
}

/// What is asked about pods.
pub(super) trait Pods {
    /// The node of a pod; `None` = there is no such pod.
    fn node_of(&self, namespace: &str, name: &str) -> Option<String>;
    /// Whether a pod of the node refers to an object of its namespace.
    fn refer(&self, node: &str, namespace: &str, kind: Referred, name: &str) -> bool;
}

/// Kinds of objects that pods refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Referred {
    ConfigMap,
    Secret,
    ServiceAccount,
}

/// Rights that are the same for all nodes: group, resource with subresource, verbs.
const SAME_FOR_ALL: &[(&str, &str, &[&str])] = &[
    ("", "services", &["get", "list", "watch"]),
    ("", "events", &["create", "update", "patch"]),
    ("events.k8s.io", "events", &["create", "update", "patch"]),
    ("certificates.k8s.io", "certificatesigningrequests", &["create", "get", "list", "watch"]),
    ("authentication.k8s.io", "tokenreviews", &["create"]),
    ("authorization.k8s.io", "subjectaccessreviews", &["create"]),
    ("authorization.k8s.io", "localsubjectaccessreviews", &["create"]),
];

/// What the agent of `node` may do.
pub(super) fn opinion(node: &str, asked: &Attributes<'_>, pods: &impl Pods) -> Opinion {
    let Target::Resource(target) = asked.target else { return Opinion::None(String::new()) };
    let verb = asked.verb;
    match (target.group, target.resource) {
        ("", "secrets") => referred(node, verb, &target, pods, Referred::Secret),
        ("", "configmaps") => referred(node, verb, &target, pods, Referred::ConfigMap),
        ("", "serviceaccounts") => token(node, verb, &target, pods),
        ("", "pods") => pod(node, verb, &target, pods),
        ("", "nodes") => own_node(node, verb, &target),
        ("coordination.k8s.io", "leases") => lease(node, verb, &target),
        (group, _) => {
            let path = target.path();
            let same = SAME_FOR_ALL.iter().any(|(known, resource, verbs)| {
                *known == group && *resource == path && verbs.contains(&verb)
            });
            if same { Opinion::Allowed } else { Opinion::None(String::new()) }
        }
    }
}

fn none(why: impl Into<String>) -> Opinion {
    Opinion::None(why.into())
}

fn related(node: &str, is: bool) -> Opinion {
    if is {
        return Opinion::Allowed;
    }
    Opinion::Unrelated(format!("no pod of node {node:?} refers to it"))
}

fn referred(
    node: &str,
    verb: &str,
    target: &ResourceTarget<'_>,
    pods: &impl Pods,
    kind: Referred,
) -> Opinion {
    if !matches!(verb, "get" | "list" | "watch") || !target.subresource.is_empty() {
        return none("nodes can only read resources of this type");
    }
    if target.name.is_empty() || target.namespace.is_empty() {
        return none("nodes can only read single objects of this type");
    }
    related(node, pods.refer(node, target.namespace, kind, target.name))
}

fn token(node: &str, verb: &str, target: &ResourceTarget<'_>, pods: &impl Pods) -> Opinion {
    if (verb, target.subresource) != ("create", "token") || target.name.is_empty() {
        return none("nodes can only create tokens for individual service accounts");
    }
    related(node, pods.refer(node, target.namespace, Referred::ServiceAccount, target.name))
}

fn pod(node: &str, verb: &str, target: &ResourceTarget<'_>, pods: &impl Pods) -> Opinion {
    let own = || match pods.node_of(target.namespace, target.name) {
        Some(bound) if bound == node => Opinion::Allowed,
        Some(_) => Opinion::Unrelated(format!("the pod is not bound to node {node:?}")),
        None => Opinion::NoSuchPod,
    };
    match (target.subresource, verb) {
        ("", "list" | "watch") if target.name.is_empty() => {
            if required(target.field_selector, "spec.nodeName").as_deref() == Some(node) {
                Opinion::Allowed
            } else {
                none("can only list/watch pods with spec.nodeName field selector")
            }
        }
        ("", "get" | "list" | "watch" | "delete")
        | ("status", "get" | "update" | "patch")
        | ("eviction", "create") => own(),
        _ => none("nodes cannot do this to pods"),
    }
}

fn own_node(node: &str, verb: &str, target: &ResourceTarget<'_>) -> Opinion {
    match (target.subresource, verb) {
        // The name is in the object only; it is looked at when that is read.
        ("", "create") if target.name.is_empty() => Opinion::Allowed,
        ("", "get" | "list" | "watch" | "update" | "patch")
        | ("status", "get" | "update" | "patch") => {
            if target.name == node {
                Opinion::Allowed
            } else if target.name.is_empty() {
                none(format!("node {node:?} cannot read all nodes, only its own Node object"))
            } else {
                none(format!(
                    "node {node:?} cannot {verb} {:?}, only its own Node object",
                    target.name
                ))
            }
        }
        _ => none(String::new()),
    }
}

fn lease(node: &str, verb: &str, target: &ResourceTarget<'_>) -> Opinion {
    if !matches!(verb, "get" | "create" | "update" | "patch" | "delete") {
        return none("can only get, create, update, patch, or delete a node lease");
    }
    if target.namespace != LEASES {
        return none(format!("can only access leases in the {LEASES:?} system namespace"));
    }
    // The name of a new one is in the object only.
    if verb != "create" && target.name != node {
        return none("can only access node lease with the same name as the requesting node");
    }
    Opinion::Allowed
}

/// Whether a pod refers to an object, in any of the ways the API has.
pub(super) fn refers(pod: &Value, kind: Referred, name: &str) -> bool {
    let spec = &pod["spec"];
    let list = |list: &Value| list.as_array().cloned().unwrap_or_default();
    if kind == Referred::ServiceAccount {
        return spec["serviceAccountName"] == name;
    }
    let (reference, from, volume, volume_name) = match kind {
        Referred::Secret => ("secretKeyRef", "secretRef", "secret", "secretName"),
        _ => ("configMapKeyRef", "configMapRef", "configMap", "name"),
    };
    let of_containers = ["initContainers", "containers", "ephemeralContainers"]
        .iter()
        .flat_map(|containers| list(&spec[*containers]))
        .any(|container| {
            list(&container["envFrom"]).iter().any(|source| source[from]["name"] == name)
                || list(&container["env"])
                    .iter()
                    .any(|variable| variable["valueFrom"][reference]["name"] == name)
        });
    let of_volumes = list(&spec["volumes"]).iter().any(|source| {
        source[volume][volume_name] == name
            || list(&source["projected"]["sources"])
                .iter()
                .any(|source| source[volume]["name"] == name)
    });
    let of_image = kind == Referred::Secret
        && list(&spec["imagePullSecrets"]).iter().any(|secret| secret["name"] == name);
    of_containers || of_volumes || of_image
}

impl Pods for Snapshot {
    fn node_of(&self, namespace: &str, name: &str) -> Option<String> {
        let pods = crate::resources::find("", "v1", "pods")?;
        let pod = self.get(&pods.key(namespace, name))?;
        Some(pod.meta.field("spec.nodeName").unwrap_or_default().to_owned())
    }

    fn refer(&self, node: &str, namespace: &str, kind: Referred, name: &str) -> bool {
        let Some(pods) = crate::resources::find("", "v1", "pods") else { return false };
        let quoted = format!("\"{name}\"");
        self.range(&pods.key(namespace, ""), None).any(|pod| {
            pod.meta.field("spec.nodeName") == Some(node)
                && std::str::from_utf8(&pod.bytes).is_ok_and(|text| text.contains(&quoted))
                && serde_json::from_slice(&pod.bytes).is_ok_and(|pod| refers(&pod, kind, name))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    struct Listed(Vec<Value>);

    impl Pods for Listed {
        fn node_of(&self, namespace: &str, name: &str) -> Option<String> {
            let found = self.0.iter().find(|pod| {
                pod["metadata"]["namespace"] == namespace && pod["metadata"]["name"] == name
            })?;
            Some(found["spec"]["nodeName"].as_str().unwrap_or_default().to_owned())
        }

        fn refer(&self, node: &str, namespace: &str, kind: Referred, name: &str) -> bool {
            self.0.iter().any(|pod| {
                pod["metadata"]["namespace"] == namespace
                    && pod["spec"]["nodeName"] == node
                    && refers(pod, kind, name)
            })
        }
    }

    fn pods() -> Listed {
        let pod = |name: &str, spec: Value| json!({ "metadata": { "namespace": "shop", "name": name }, "spec": spec });
        Listed(vec![
            pod(
                "mine",
                json!({ "nodeName": "a", "serviceAccountName": "till",
                "volumes": [{ "name": "v", "secret": { "secretName": "key" } }] }),
            ),
            pod(
                "theirs",
                json!({ "nodeName": "b", "serviceAccountName": "boss",
                "volumes": [{ "name": "v", "secret": { "secretName": "vault" } }] }),
            ),
            pod(
                "waiting",
                json!({ "volumes": [{ "name": "v", "configMap": { "name": "late" } }] }),
            ),
        ])
    }

    #[test]
    fn rights_of_a_node_by_table() {
        let pods = pods();
        for (verb, what, namespace, selector, expected) in [
            ("get", "secrets:key", "shop", "", true),
            ("watch", "secrets:key", "shop", "", true),
            ("update", "secrets:key", "shop", "", false),
            ("get", "secrets:vault", "shop", "", false),
            ("get", "secrets:key", "bank", "", false),
            ("list", "secrets", "shop", "", false),
            ("get", "configmaps:late", "shop", "", false),
            ("create", "serviceaccounts/token:till", "shop", "", true),
            ("create", "serviceaccounts/token:boss", "shop", "", false),
            ("get", "serviceaccounts:till", "shop", "", false),
            ("get", "pods:mine", "shop", "", true),
            ("delete", "pods:mine", "shop", "", true),
            ("patch", "pods/status:mine", "shop", "", true),
            ("create", "pods/eviction:mine", "shop", "", true),
            ("patch", "pods:mine", "shop", "", false),
            ("get", "pods/exec:mine", "shop", "", false),
            ("create", "pods", "shop", "", false),
            ("delete", "pods:theirs", "shop", "", false),
            ("patch", "pods/status:theirs", "shop", "", false),
            ("patch", "pods/status:waiting", "shop", "", false),
            ("list", "pods", "", "spec.nodeName=a", true),
            ("watch", "pods", "", "spec.nodeName=a,status.phase!=Failed", true),
            ("list", "pods", "", "spec.nodeName=b", false),
            ("list", "pods", "", "spec.nodeName!=b", false),
            ("list", "pods", "", "", false),
            ("create", "nodes", "", "", true),
            ("get", "nodes:a", "", "", true),
            ("patch", "nodes/status:a", "", "", true),
            ("patch", "nodes/status:b", "", "", false),
            ("delete", "nodes:a", "", "", false),
            ("list", "nodes", "", "", false),
            ("create", "leases.coordination.k8s.io", LEASES, "", true),
            ("update", "leases.coordination.k8s.io:a", LEASES, "", true),
            ("update", "leases.coordination.k8s.io:b", LEASES, "", false),
            ("update", "leases.coordination.k8s.io:a", "kube-system", "", false),
            ("create", "events", "shop", "", true),
            ("create", "certificatesigningrequests.certificates.k8s.io", "", "", true),
            ("update", "certificatesigningrequests/approval.certificates.k8s.io:x", "", "", false),
            ("list", "services", "", "", true),
            ("create", "services", "shop", "", false),
            ("list", "deployments.apps", "", "", false),
        ] {
            let (path, name) = what.split_once(':').unwrap_or((what, ""));
            let (path, group) = path.split_once('.').unwrap_or((path, ""));
            let (resource, subresource) = path.split_once('/').unwrap_or((path, ""));
            let target = ResourceTarget {
                group,
                resource,
                subresource,
                namespace,
                name,
                field_selector: selector,
            };
            let opinion = opinion("a", &Attributes::resource(verb, target), &pods);
            assert_eq!(
                opinion == Opinion::Allowed,
                expected,
                "{verb} {what} {namespace} {selector}: {opinion:?}"
            );
        }
    }

    #[test]
    fn a_pod_that_is_gone_is_neither_own_nor_foreign() {
        let target = ResourceTarget {
            resource: "pods",
            subresource: "status",
            namespace: "shop",
            name: "gone",
            ..ResourceTarget::default()
        };
        let opinion = opinion("a", &Attributes::resource("patch", target), &pods());
        assert_eq!(opinion, Opinion::NoSuchPod);
        assert!(opinion.depends_on_pods());
    }

    #[test]
    fn every_way_to_refer_counts() {
        let pod = json!({ "spec": {
            "imagePullSecrets": [{ "name": "s1" }],
            "initContainers": [{ "env": [{ "name": "A", "valueFrom": { "secretKeyRef": { "name": "s2", "key": "k" } } }] }],
            "containers": [{ "envFrom": [{ "secretRef": { "name": "s3" } }, { "configMapRef": { "name": "c1" } }],
                             "env": [{ "name": "A", "valueFrom": { "configMapKeyRef": { "name": "c2", "key": "k" } } }] }],
            "volumes": [{ "secret": { "secretName": "s4" } }, { "configMap": { "name": "c3" } },
                        { "projected": { "sources": [{ "secret": { "name": "s5" } }, { "configMap": { "name": "c4" } }] } }],
        } });
        for (kind, prefix, count) in [(Referred::Secret, "s", 5), (Referred::ConfigMap, "c", 4)] {
            for number in 1..=count {
                assert!(refers(&pod, kind, &format!("{prefix}{number}")), "{prefix}{number}");
            }
        }
        assert!(!refers(&pod, Referred::Secret, "c1") && !refers(&pod, Referred::ConfigMap, "s1"));
    }
}
