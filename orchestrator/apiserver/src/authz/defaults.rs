//! The roles and bindings that every cluster has: upstream's where it has them, by the names people know, and `orch:…`
//! for what is ours.
//!
//! They name kinds of upstream that this server may not have yet, so that a user's rights are complete when it gets
//! them.

use orch_api::cluster_policy;
use serde_json::{Value, json};

use super::rbac::Rule;
use crate::auth::{ANONYMOUS, AUTHENTICATED, UNAUTHENTICATED};
use crate::certificates::BOOTSTRAPPERS;
use crate::oidc;
use crate::resources::RBAC;

/// Says whether [`super::reconcile()`] keeps an object (`"false"`: its owner has taken it over).
pub(super) const AUTO_UPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";

const READ: &[&str] = &["get", "list", "watch"];
const WRITE: &[&str] = &["create", "delete", "deletecollection", "patch", "update"];
const ALL: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
const CREATE: &[&str] = &["create"];
const EVENTS: &[&str] = &["create", "patch", "update"];

const APPS: &str = "apps";
const BATCH: &str = "batch";
const AUTOSCALING: &str = "autoscaling";
const POLICY: &str = "policy";
const NETWORKING: &str = "networking.k8s.io";
const DISCOVERY: &str = "discovery.k8s.io";
const COORDINATION: &str = "coordination.k8s.io";
const AUTHENTICATION: &str = "authentication.k8s.io";
const AUTHORIZATION: &str = "authorization.k8s.io";
const CERTIFICATES: &str = "certificates.k8s.io";

/// A user's own workloads and all around them, that editors write and viewers read.
const WORKLOADS: [(&str, &str); 7] = [
    (
        "",
        "pods replicationcontrollers replicationcontrollers/scale serviceaccounts services endpoints \
         persistentvolumeclaims configmaps",
    ),
    (
        APPS,
        "daemonsets deployments deployments/scale replicasets replicasets/scale statefulsets statefulsets/scale",
    ),
    (AUTOSCALING, "horizontalpodautoscalers"),
    (BATCH, "cronjobs jobs"),
    (POLICY, "poddisruptionbudgets"),
    (NETWORKING, "ingresses networkpolicies"),
    ("extensions", "ingresses networkpolicies"),
];

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

fn on(verbs: &[&str], group: &str, resources: &str) -> Rule {
    Rule {
        verbs: texts(verbs),
        api_groups: vec![group.to_owned()],
        resources: words(resources),
        ..Rule::default()
    }
}

fn named(verbs: &[&str], group: &str, resources: &str, names: &[&str]) -> Rule {
    Rule { resource_names: texts(names), ..on(verbs, group, resources) }
}

fn paths(urls: &str) -> Rule {
    Rule { verbs: texts(&["get"]), urls: words(urls), ..Rule::default() }
}

fn events() -> [Rule; 2] {
    [on(EVENTS, "", "events"), on(EVENTS, "events.k8s.io", "events")]
}

fn meta(name: &str, namespace: &str) -> Value {
    let mut meta = json!({
        "name": name,
        "labels": { "kubernetes.io/bootstrapping": "rbac-defaults" },
        "annotations": { AUTO_UPDATE: "true" },
    });
    if !namespace.is_empty() {
        meta["namespace"] = json!(namespace);
    }
    meta
}

fn cluster_role(name: &str, rules: impl IntoIterator<Item = Rule>) -> Value {
    let rules: Vec<Rule> = rules.into_iter().collect();
    json!({ "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRole", "metadata": meta(name, ""), "rules": rules })
}

/// A part of the role `to`.
fn part(to: &str, rules: Vec<Rule>) -> Value {
    labelled(cluster_role(&format!("system:aggregate-to-{to}"), rules), to)
}

fn labelled(mut role: Value, to: &str) -> Value {
    role["metadata"]["labels"][format!("{RBAC}/aggregate-to-{to}")] = json!("true");
    role
}

/// A role made of all that are labelled for it.
fn whole(name: &str) -> Value {
    let mut role = cluster_role(name, []);
    let label = format!("{RBAC}/aggregate-to-{name}");
    role["aggregationRule"] =
        json!({ "clusterRoleSelectors": [{ "matchLabels": { label: "true" } }] });
    role
}

fn group(name: &str) -> Value {
    json!({ "apiGroup": RBAC, "kind": "Group", "name": name })
}

fn user(name: &str) -> Value {
    json!({ "apiGroup": RBAC, "kind": "User", "name": name })
}

fn binding(name: &str, namespace: &str, (kind, role): (&str, &str), subjects: &[Value]) -> Value {
    let bound = if namespace.is_empty() { "ClusterRoleBinding" } else { "RoleBinding" };
    json!({
        "apiVersion": format!("{RBAC}/v1"), "kind": bound, "metadata": meta(name, namespace),
        "roleRef": { "apiGroup": RBAC, "kind": kind, "name": role }, "subjects": subjects,
    })
}

/// Binds a ClusterRole in the whole cluster by a binding of the same name.
fn bound(role: &str, subjects: &[Value]) -> Value {
    binding(role, "", ("ClusterRole", role), subjects)
}

/// A role of one namespace with its binding of the same name.
fn local(name: &str, namespace: &str, rule: Rule, subjects: &[Value]) -> [Value; 2] {
    let role = json!({ "apiVersion": format!("{RBAC}/v1"), "kind": "Role", "metadata": meta(name, namespace), "rules": [rule] });
    [role, binding(name, namespace, ("Role", name), subjects)]
}

/// All of them; roles before the bindings that name them.
pub(super) fn objects() -> Vec<Value> {
    let mut all = users_roles();
    all.extend(components_roles());
    all.extend([
        bound("cluster-admin", &[group(super::MASTERS)]),
        bound("system:discovery", &[group(AUTHENTICATED)]),
        bound("system:basic-user", &[group(AUTHENTICATED)]),
        bound("system:public-info-viewer", &[group(AUTHENTICATED), group(UNAUTHENTICATED)]),
        bound("system:monitoring", &[group("system:monitoring")]),
        bound("system:kube-controller-manager", &[user("system:kube-controller-manager")]),
        bound("system:kube-scheduler", &[user("system:kube-scheduler")]),
        bound("system:node-bootstrapper", &[group(BOOTSTRAPPERS)]),
        bound("orch:network-agent", &[group("system:nodes")]),
        // This server, as a client of the agents. Ours know it by its name; a kubelet asks.
        bound("system:kubelet-api-admin", &[user("kube-apiserver-kubelet-client")]),
        bound("system:service-account-issuer-discovery", &[group("system:serviceaccounts")]),
    ]);
    // How a host that has no credentials yet learns the cluster's authority (kubeadm's discovery).
    all.extend(local(
        "orch:cluster-info",
        "kube-public",
        named(&["get"], "", "configmaps", &["cluster-info"]),
        &[user(ANONYMOUS), group(AUTHENTICATED)],
    ));
    // Where the servers and etcd are, for hosts that join and for agents whose server dies.
    all.extend(local(
        "orch:cluster",
        "kube-system",
        named(&["get"], "", "configmaps", &["orch-cluster"]),
        &[group("system:nodes")],
    ));
    all
}

fn users_roles() -> Vec<Value> {
    let workloads =
        |verbs: &[&str]| WORKLOADS.map(|(group, resources)| on(verbs, group, resources));
    let mut edit = workloads(WRITE).to_vec();
    edit.extend([
        on(READ, "", "pods/attach pods/exec pods/portforward pods/proxy secrets services/proxy"),
        on(WRITE, "", "pods/attach pods/exec pods/portforward pods/proxy secrets services/proxy"),
        on(CREATE, "", "pods/eviction serviceaccounts/token"),
        on(&["impersonate"], "", "serviceaccounts"),
        on(ALL, COORDINATION, "leases"),
        on(EVENTS, "events.k8s.io", "events"),
    ]);
    let mut view = workloads(READ).to_vec();
    view.extend([
        on(
            READ,
            "",
            "bindings events limitranges namespaces namespaces/status persistentvolumeclaims/status pods/log \
             pods/status replicationcontrollers/status resourcequotas resourcequotas/status services/status",
        ),
        on(
            READ,
            APPS,
            "controllerrevisions daemonsets/status deployments/status replicasets/status statefulsets/status",
        ),
        on(READ, AUTOSCALING, "horizontalpodautoscalers/status"),
        on(READ, BATCH, "cronjobs/status jobs/status"),
        on(READ, POLICY, "poddisruptionbudgets/status"),
        on(READ, NETWORKING, "ingresses/status"),
        on(READ, DISCOVERY, "endpointslices"),
        on(READ, "events.k8s.io", "events"),
    ]);
    let admin = vec![
        on(CREATE, AUTHORIZATION, "localsubjectaccessreviews"),
        on(ALL, RBAC, "rolebindings roles"),
    ];
    vec![
        cluster_role("cluster-admin", [Rule::everything(), Rule::every_path()]),
        whole("admin"),
        labelled(whole("edit"), "admin"),
        labelled(whole("view"), "edit"),
        part("admin", admin),
        part("edit", edit),
        part("view", view),
        cluster_role(
            "system:discovery",
            [paths(
                "/livez /readyz /healthz /version /version/ /openapi /openapi/* /api /api/* /apis /apis/*",
            )],
        ),
        cluster_role(
            "system:basic-user",
            [
                on(CREATE, AUTHORIZATION, "selfsubjectaccessreviews selfsubjectrulesreviews"),
                on(CREATE, AUTHENTICATION, "selfsubjectreviews"),
            ],
        ),
        cluster_role(
            "system:public-info-viewer",
            [paths("/livez /readyz /healthz /version /version/")],
        ),
        cluster_role(
            "system:monitoring",
            [paths("/metrics /metrics/slis /livez /readyz /healthz /livez/* /readyz/* /healthz/*")],
        ),
        cluster_role(
            "system:service-account-issuer-discovery",
            [paths(&format!("{} {}", oidc::CONFIGURATION, oidc::KEYS))],
        ),
        cluster_role(
            "system:auth-delegator",
            [
                on(CREATE, AUTHENTICATION, "tokenreviews"),
                on(CREATE, AUTHORIZATION, "subjectaccessreviews"),
            ],
        ),
    ]
}

fn components_roles() -> Vec<Value> {
    let approver = |name: &str, signer: &str| {
        let rule = named(&["approve"], CERTIFICATES, "signers", &[signer]);
        cluster_role(&format!("system:certificates.k8s.io:{name}-approver"), [rule])
    };
    let controllers = [
        // The garbage collector and the end of a namespace concern every kind there is, and a controller that makes
        // objects of a new kind should not fail for want of a line here. No verb beyond these: it can neither bind
        // roles that it does not hold nor act as others.
        on(ALL, "*", "*"),
        on(&["approve", "sign"], CERTIFICATES, "signers"),
    ];
    let mut scheduler = vec![
        on(
            READ,
            "",
            "namespaces nodes persistentvolumeclaims persistentvolumes replicationcontrollers services",
        ),
        on(&["delete", "get", "list", "watch"], "", "pods"),
        on(CREATE, "", "bindings pods/binding"),
        on(&["patch", "update"], "", "pods/status"),
        on(READ, APPS, "replicasets statefulsets"),
        on(READ, POLICY, "poddisruptionbudgets"),
        on(CREATE, COORDINATION, "leases"),
        named(&["get", "patch", "update"], COORDINATION, "leases", &["kube-scheduler"]),
    ];
    scheduler.extend(events());
    let mut node = vec![
        on(READ, "", "configmaps nodes pods secrets services"),
        on(&["create", "patch", "update"], "", "nodes"),
        on(&["patch", "update"], "", "nodes/status pods/status"),
        on(&["delete"], "", "pods"),
        on(CREATE, "", "pods/eviction serviceaccounts/token"),
        on(&["create", "delete", "get", "patch", "update"], COORDINATION, "leases"),
        on(&["create", "get", "list", "watch"], CERTIFICATES, "certificatesigningrequests"),
        on(CREATE, AUTHENTICATION, "tokenreviews"),
        on(CREATE, AUTHORIZATION, "localsubjectaccessreviews subjectaccessreviews"),
    ];
    node.extend(events());
    vec![
        cluster_role("system:kube-controller-manager", controllers),
        cluster_role("system:kube-scheduler", scheduler),
        // As upstream's: bound to nobody, because nodes have this by the node authoriser and only for what is theirs.
        cluster_role("system:node", node),
        cluster_role(
            "system:node-bootstrapper",
            [on(&["create", "get", "list", "watch"], CERTIFICATES, "certificatesigningrequests")],
        ),
        cluster_role(
            "system:kubelet-api-admin",
            [
                on(READ, "", "nodes"),
                on(
                    &["*"],
                    "",
                    "nodes/configz nodes/healthz nodes/log nodes/metrics nodes/pods nodes/proxy nodes/stats",
                ),
            ],
        ),
        // What every node's share of the pod network is made from: Services with their endpoints, names, and policies,
        // which speak of all pods and nodes. The agent has one identity, so this is a right of the node.
        cluster_role(
            "orch:network-agent",
            [
                on(READ, "", "namespaces nodes pods services"),
                on(READ, DISCOVERY, "endpointslices"),
                on(READ, NETWORKING, "networkpolicies"),
                on(READ, cluster_policy::GROUP, "clusternetworkpolicies"),
            ],
        ),
        approver("kube-apiserver-client", "kubernetes.io/kube-apiserver-client"),
        approver("kube-apiserver-client-kubelet", "kubernetes.io/kube-apiserver-client-kubelet"),
        approver("kubelet-serving", "kubernetes.io/kubelet-serving"),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_defaults_are_valid_and_bindings_name_roles_that_are_there() {
        let all = objects();
        let mut roles = BTreeSet::new();
        for object in &all {
            let kind = object["kind"].as_str().expect("a kind");
            assert_eq!(orch_api::validate::create(RBAC, kind, object), [], "{object}");
            let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
            if kind.ends_with("Binding") {
                let role = &object["roleRef"];
                let namespace = if role["kind"] == "Role" { namespace } else { "" };
                let key = (namespace, role["name"].as_str().expect("a name"));
                assert!(roles.contains(&key), "{object}");
            } else {
                let name = object["metadata"]["name"].as_str().expect("a name");
                assert!(roles.insert((namespace, name)), "{name} is there twice");
            }
        }
    }

    #[test]
    fn viewers_see_no_secrets_and_no_roles() {
        let all = objects();
        let view =
            all.iter().find(|object| object["metadata"]["name"] == "system:aggregate-to-view");
        let text = view.expect("the role").to_string();
        assert!(
            text.contains("pods/log")
                && !text.contains("secrets")
                && !text.contains("rolebindings")
        );
    }
}
