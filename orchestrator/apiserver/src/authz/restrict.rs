//! What a node may not write into the objects it may write (Kubernetes, "NodeRestriction").

use serde_json::Value;

use super::node::LEASES;
use crate::resources::Resource;

/// Labels in Kubernetes' own namespaces that agents set.
const OWN_LABELS: [&str; 10] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];
/// Namespaces of labels that agents may use as they like.
const OWN_PREFIXES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

/// # Errors
/// Why the node may not make this object.
pub(super) fn create(node: &str, resource: &Resource, object: &Value) -> Result<(), String> {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    match (resource.group, resource.plural) {
        ("", "nodes") => {
            if name != node {
                return Err(format!("node {node:?} is not allowed to create node {name:?}"));
            }
            labels(node, &Value::Null, &object["metadata"]["labels"])
        }
        ("coordination.k8s.io", "leases")
            if name != node || object["metadata"]["namespace"] != LEASES =>
        {
            Err("can only access node lease with the same name as the requesting node".to_owned())
        }
        _ => Ok(()),
    }
}

/// # Errors
/// Why the node may not change this object in this way.
pub(super) fn update(
    node: &str,
    resource: &Resource,
    old: &Value,
    new: &Value,
) -> Result<(), String> {
    if (resource.group, resource.plural) != ("", "nodes") {
        return Ok(());
    }
    for (field, pointer) in
        [("taints", "/spec/taints"), ("ownerReferences", "/metadata/ownerReferences")]
    {
        if old.pointer(pointer) != new.pointer(pointer) {
            return Err(format!("node {node:?} is not allowed to modify {field}"));
        }
    }
    labels(node, &old["metadata"]["labels"], &new["metadata"]["labels"])
}

fn labels(node: &str, old: &Value, new: &Value) -> Result<(), String> {
    let keys = |labels: &Value| -> Vec<String> {
        labels.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect()
    };
    let mut changed = keys(old);
    changed.extend(keys(new));
    changed.retain(|key| old[key.as_str()] != new[key.as_str()] && !is_free(key));
    changed.sort_unstable();
    changed.dedup();
    if changed.is_empty() {
        return Ok(());
    }
    Err(format!("node {node:?} is not allowed to modify labels: {}", changed.join(", ")))
}

/// Whether a label steers nothing that people decide with.
fn is_free(key: &str) -> bool {
    let Some((namespace, _)) = key.split_once('/') else { return true };
    let within = |domain: &str| {
        namespace == domain
            || namespace.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'))
    };
    if within("node-restriction.kubernetes.io") {
        return false;
    }
    !(within("kubernetes.io") || within("k8s.io"))
        || OWN_LABELS.contains(&key)
        || OWN_PREFIXES.iter().any(|prefix| within(prefix))
}

/// # Errors
/// Why a node may not have this token: tokens are for its own pods.
pub(crate) fn token(node: &str, pod: Option<&Value>, named_uid: bool) -> Result<(), &'static str> {
    match pod {
        None => Err("node requested token not bound to a pod"),
        Some(_) if !named_uid => Err("node requested token with a pod binding without a uid"),
        Some(pod) if pod["spec"]["nodeName"] != node => {
            Err("node requested token bound to a pod scheduled on a different node")
        }
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resources::find;

    #[test]
    fn a_node_makes_itself_and_its_lease_only() {
        let nodes = find("", "v1", "nodes").expect("nodes");
        let leases = find("coordination.k8s.io", "v1", "leases").expect("leases");
        let named = |name: &str| json!({ "metadata": { "name": name, "namespace": LEASES } });
        assert_eq!(create("a", nodes, &named("a")), Ok(()));
        assert!(create("a", nodes, &named("b")).is_err());
        assert_eq!(create("a", leases, &named("a")), Ok(()));
        assert!(create("a", leases, &named("b")).is_err());
        let elsewhere = json!({ "metadata": { "name": "a", "namespace": "kube-system" } });
        assert!(create("a", leases, &elsewhere).is_err());
        let secure = json!({ "metadata": { "name": "a", "labels": { "node-restriction.kubernetes.io/pci": "true" } } });
        assert_eq!(
            create("a", nodes, &secure).expect_err("refused"),
            r#"node "a" is not allowed to modify labels: node-restriction.kubernetes.io/pci"#
        );
    }

    #[test]
    fn a_node_leaves_taints_and_labels_that_steer_alone() {
        let nodes = find("", "v1", "nodes").expect("nodes");
        let old = json!({ "metadata": { "labels": { "node-role.kubernetes.io/worker": "", "disk": "ssd" } },
                          "spec": { "taints": [{ "key": "k", "effect": "NoSchedule" }] } });
        let with = |pointer: &str, value: Value| {
            let mut new = old.clone();
            if let Some(place) = new.pointer_mut(pointer) {
                *place = value;
            }
            update("a", nodes, &old, &new)
        };
        assert_eq!(with("/metadata/labels/disk", json!("hdd")), Ok(()));
        assert!(with("/spec/taints", json!([])).expect_err("refused").ends_with("taints"));
        assert!(
            with("/metadata/labels", json!({ "disk": "ssd" })).is_err(),
            "a role was taken away"
        );
        for (label, free) in [
            ("disk", true),
            ("example.com/x", true),
            ("kubernetes.io/hostname", true),
            ("node.kubernetes.io/instance-type", true),
            ("x.kubelet.kubernetes.io/y", true),
            ("node-role.kubernetes.io/control-plane", false),
            ("kubernetes.io/x", false),
            ("a.k8s.io/x", false),
            ("a.node-restriction.kubernetes.io/x", false),
            ("notkubernetes.io/x", true),
        ] {
            assert_eq!(is_free(label), free, "{label}");
        }
    }

    #[test]
    fn a_nodes_tokens_are_for_its_own_pods() {
        let pod = json!({ "spec": { "nodeName": "a" } });
        assert_eq!(token("a", Some(&pod), true), Ok(()));
        assert!(token("a", Some(&pod), false).is_err());
        assert!(token("b", Some(&pod), true).is_err());
        assert!(token("a", None, true).is_err());
    }
}
