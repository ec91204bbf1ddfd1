//! The type table: every resource this server has. Handlers are generic; what differs between kinds is data here
//! and a few hooks in [`crate::strategy`].

use orch_api::{cluster_policy, priority};
use serde_json::Value;

/// One resource.
#[derive(Debug)]
pub(crate) struct Resource {
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) singular: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) short_names: &'static [&'static str],
    pub(crate) categories: &'static [&'static str],
    pub(crate) namespaced: bool,
    /// Whether `status` is written through its own subresource only.
    pub(crate) status: bool,
    /// Whether `spec.replicas` is a `scale` subresource.
    pub(crate) scale: bool,
    /// Other subresources: name, kind with group and version, verbs.
    pub(crate) subresources: &'static [Subresource],
    /// Whether `metadata.generation` counts changes of the spec.
    pub(crate) generation: bool,
    /// Whether a deletion that is done is answered with the object that was, not with a `Status`.
    pub(crate) answers_deleted: bool,
    /// Fields that a field selector may name, besides `metadata.name` and `metadata.namespace`, as JSON pointers.
    pub(crate) fields: &'static [(&'static str, &'static str)],
}

/// A subresource.
#[derive(Debug)]
pub(crate) struct Subresource {
    pub(crate) name: &'static str,
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) verbs: &'static [&'static str],
}

/// Verbs of a stored resource.
pub(crate) const VERBS: [&str; 8] =
    ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

impl Resource {
    const fn new(
        group: &'static str,
        plural: &'static str,
        singular: &'static str,
        kind: &'static str,
    ) -> Self {
        Self {
            group,
            version: "v1",
            plural,
            singular,
            kind,
            short_names: &[],
            categories: &[],
            namespaced: true,
            status: false,
            scale: false,
            subresources: &[],
            generation: false,
            answers_deleted: false,
            fields: &[],
        }
    }

    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// Prefix of its keys in the store, with the slash that keeps `pods/` apart from `podsx/`.
    pub(crate) fn prefix(&self) -> String {
        format!(
            "/registry/{}/{}/",
            if self.group.is_empty() { "core" } else { self.group },
            self.plural
        )
    }

    pub(crate) fn key(&self, namespace: &str, name: &str) -> String {
        if self.namespaced {
            format!("{}{namespace}/{name}", self.prefix())
        } else {
            format!("{}{name}", self.prefix())
        }
    }

    /// Values of the selectable fields of an object.
    pub(crate) fn field_values(&self, object: &Value) -> Vec<(&'static str, String)> {
        self.fields
            .iter()
            .map(|(field, pointer)| {
                let value = match object.pointer(pointer) {
                    Some(Value::String(text)) => text.clone(),
                    Some(Value::Bool(flag)) => flag.to_string(),
                    Some(Value::Number(number)) => number.to_string(),
                    _ if matches!(*field, "spec.unschedulable" | "spec.hostNetwork") => {
                        "false".to_owned()
                    }
                    _ => String::new(),
                };
                (*field, value)
            })
            .collect()
    }

    /// Whether a field selector may name `field`.
    pub(crate) fn selectable(&self, field: &str) -> bool {
        field == "metadata.name"
            || (self.namespaced && field == "metadata.namespace")
            || self.fields.iter().any(|(known, _)| *known == field)
    }
}

const POD_FIELDS: &[(&str, &str)] = &[
    ("spec.nodeName", "/spec/nodeName"),
    ("spec.restartPolicy", "/spec/restartPolicy"),
    ("spec.schedulerName", "/spec/schedulerName"),
    ("spec.serviceAccountName", "/spec/serviceAccountName"),
    ("spec.hostNetwork", "/spec/hostNetwork"),
    ("status.phase", "/status/phase"),
    ("status.podIP", "/status/podIP"),
    ("status.podIPs", "/status/podIPs/0/ip"),
    ("status.nominatedNodeName", "/status/nominatedNodeName"),
];

const EVENT_FIELDS: &[(&str, &str)] = &[
    ("involvedObject.kind", "/involvedObject/kind"),
    ("involvedObject.namespace", "/involvedObject/namespace"),
    ("involvedObject.name", "/involvedObject/name"),
    ("involvedObject.uid", "/involvedObject/uid"),
    ("involvedObject.apiVersion", "/involvedObject/apiVersion"),
    ("involvedObject.resourceVersion", "/involvedObject/resourceVersion"),
    ("involvedObject.fieldPath", "/involvedObject/fieldPath"),
    ("reason", "/reason"),
    ("reportingComponent", "/reportingComponent"),
    ("source", "/source/component"),
    ("type", "/type"),
];

const CREATE: &[&str] = &["create"];
const GET: &[&str] = &["get"];
const STREAM: &[&str] = &["create", "get"];
const PROXY: &[&str] = &["create", "delete", "get", "patch", "update"];

const fn proxied(kind: &'static str) -> Subresource {
    Subresource { name: "proxy", group: "", version: "v1", kind, verbs: PROXY }
}

const POD_SUBRESOURCES: &[Subresource] = &[
    Subresource {
        name: "attach",
        group: "",
        version: "v1",
        kind: "PodAttachOptions",
        verbs: STREAM,
    },
    Subresource { name: "binding", group: "", version: "v1", kind: "Binding", verbs: CREATE },
    Subresource {
        name: "ephemeralcontainers",
        group: "",
        version: "v1",
        kind: "Pod",
        verbs: &["get", "patch", "update"],
    },
    Subresource {
        name: "eviction",
        group: "policy",
        version: "v1",
        kind: "Eviction",
        verbs: CREATE,
    },
    Subresource { name: "exec", group: "", version: "v1", kind: "PodExecOptions", verbs: STREAM },
    Subresource { name: "log", group: "", version: "v1", kind: "Pod", verbs: GET },
    Subresource {
        name: "portforward",
        group: "",
        version: "v1",
        kind: "PodPortForwardOptions",
        verbs: STREAM,
    },
    proxied("PodProxyOptions"),
];
const NODE_SUBRESOURCES: &[Subresource] = &[proxied("NodeProxyOptions")];
const SERVICE_SUBRESOURCES: &[Subresource] = &[proxied("ServiceProxyOptions")];

/// Plural of the classes that give pods their priority.
pub(crate) const PRIORITY_CLASSES: &str = "priorityclasses";

/// Group of roles and their bindings.
pub(crate) const RBAC: &str = "rbac.authorization.k8s.io";

const CSR_FIELDS: &[(&str, &str)] = &[("spec.signerName", "/spec/signerName")];

/// All stored resources.
pub(crate) static RESOURCES: &[Resource] = &[
    Resource { short_names: &["cm"], ..Resource::new("", "configmaps", "configmap", "ConfigMap") },
    Resource { short_names: &["ep"], ..Resource::new("", "endpoints", "endpoints", "Endpoints") },
    Resource {
        short_names: &["ev"],
        fields: EVENT_FIELDS,
        ..Resource::new("", "events", "event", "Event")
    },
    Resource {
        short_names: &["ns"],
        namespaced: false,
        status: true,
        subresources: &[Subresource {
            name: "finalize",
            group: "",
            version: "v1",
            kind: "Namespace",
            verbs: &["update"],
        }],
        fields: &[("status.phase", "/status/phase")],
        ..Resource::new("", "namespaces", "namespace", "Namespace")
    },
    Resource {
        short_names: &["no"],
        namespaced: false,
        status: true,
        subresources: NODE_SUBRESOURCES,
        fields: &[("spec.unschedulable", "/spec/unschedulable")],
        ..Resource::new("", "nodes", "node", "Node")
    },
    Resource {
        short_names: &["po"],
        categories: &["all"],
        status: true,
        subresources: POD_SUBRESOURCES,
        generation: true,
        answers_deleted: true,
        fields: POD_FIELDS,
        ..Resource::new("", "pods", "pod", "Pod")
    },
    Resource { fields: &[("type", "/type")], ..Resource::new("", "secrets", "secret", "Secret") },
    Resource {
        short_names: &["sa"],
        answers_deleted: true,
        subresources: &[Subresource {
            name: "token",
            group: "authentication.k8s.io",
            version: "v1",
            kind: "TokenRequest",
            verbs: CREATE,
        }],
        ..Resource::new("", "serviceaccounts", "serviceaccount", "ServiceAccount")
    },
    Resource {
        short_names: &["svc"],
        categories: &["all"],
        status: true,
        subresources: SERVICE_SUBRESOURCES,
        answers_deleted: true,
        fields: &[("spec.clusterIP", "/spec/clusterIP"), ("spec.type", "/spec/type")],
        ..Resource::new("", "services", "service", "Service")
    },
    Resource {
        short_names: &["deploy"],
        categories: &["all"],
        status: true,
        scale: true,
        generation: true,
        ..Resource::new("apps", "deployments", "deployment", "Deployment")
    },
    Resource {
        short_names: &["rs"],
        categories: &["all"],
        status: true,
        scale: true,
        generation: true,
        fields: &[("status.replicas", "/status/replicas")],
        ..Resource::new("apps", "replicasets", "replicaset", "ReplicaSet")
    },
    Resource {
        short_names: &["csr"],
        namespaced: false,
        status: true,
        subresources: &[Subresource {
            name: "approval",
            group: "certificates.k8s.io",
            version: "v1",
            kind: "CertificateSigningRequest",
            verbs: &["get", "patch", "update"],
        }],
        fields: CSR_FIELDS,
        ..Resource::new(
            "certificates.k8s.io",
            "certificatesigningrequests",
            "certificatesigningrequest",
            "CertificateSigningRequest",
        )
    },
    Resource { ..Resource::new("coordination.k8s.io", "leases", "lease", "Lease") },
    Resource {
        generation: true,
        ..Resource::new("discovery.k8s.io", "endpointslices", "endpointslice", "EndpointSlice")
    },
    Resource {
        short_names: &["netpol"],
        generation: true,
        ..Resource::new("networking.k8s.io", "networkpolicies", "networkpolicy", "NetworkPolicy")
    },
    Resource {
        short_names: &["cnp"],
        namespaced: false,
        status: true,
        generation: true,
        version: cluster_policy::VERSION,
        ..Resource::new(
            cluster_policy::GROUP,
            "clusternetworkpolicies",
            "clusternetworkpolicy",
            "ClusterNetworkPolicy",
        )
    },
    Resource {
        namespaced: false,
        ..Resource::new(RBAC, "clusterrolebindings", "clusterrolebinding", "ClusterRoleBinding")
    },
    Resource {
        namespaced: false,
        ..Resource::new(RBAC, "clusterroles", "clusterrole", "ClusterRole")
    },
    Resource { ..Resource::new(RBAC, "rolebindings", "rolebinding", "RoleBinding") },
    Resource { ..Resource::new(RBAC, "roles", "role", "Role") },
    Resource {
        short_names: &["pc"],
        namespaced: false,
        ..Resource::new(priority::GROUP, PRIORITY_CLASSES, "priorityclass", "PriorityClass")
    },
];

/// Resources that are other forms of stored ones.
///
/// No short name: `ev` is the stored form's, and kubectl warns of names that two resources have.
pub(crate) static VIEWS: &[Resource] =
    &[Resource { ..Resource::new(crate::events::GROUP, "events", "event", "Event") }];

/// All resources that are stored or views of stored ones.
pub(crate) fn offered() -> impl Iterator<Item = &'static Resource> {
    RESOURCES.iter().chain(VIEWS)
}

/// A resource that is answered, never stored.
#[derive(Debug)]
pub(crate) struct Review {
    pub(crate) group: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) singular: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) namespaced: bool,
}

pub(crate) static REVIEWS: &[Review] = &[
    Review {
        group: "authentication.k8s.io",
        plural: "selfsubjectreviews",
        singular: "selfsubjectreview",
        kind: "SelfSubjectReview",
        namespaced: false,
    },
    Review {
        group: "authentication.k8s.io",
        plural: "tokenreviews",
        singular: "tokenreview",
        kind: "TokenReview",
        namespaced: false,
    },
    Review {
        group: "authorization.k8s.io",
        plural: "localsubjectaccessreviews",
        singular: "localsubjectaccessreview",
        kind: "LocalSubjectAccessReview",
        namespaced: true,
    },
    Review {
        group: "authorization.k8s.io",
        plural: "selfsubjectaccessreviews",
        singular: "selfsubjectaccessreview",
        kind: "SelfSubjectAccessReview",
        namespaced: false,
    },
    Review {
        group: "authorization.k8s.io",
        plural: "selfsubjectrulesreviews",
        singular: "selfsubjectrulesreview",
        kind: "SelfSubjectRulesReview",
        namespaced: false,
    },
    Review {
        group: "authorization.k8s.io",
        plural: "subjectaccessreviews",
        singular: "subjectaccessreview",
        kind: "SubjectAccessReview",
        namespaced: false,
    },
];

/// A stored resource by group, version and plural.
pub(crate) fn find(group: &str, version: &str, plural: &str) -> Option<&'static Resource> {
    RESOURCES.iter().find(|resource| {
        resource.group == group && resource.version == version && resource.plural == plural
    })
}

pub(crate) fn find_review(group: &str, plural: &str) -> Option<&'static Review> {
    REVIEWS.iter().find(|review| review.group == group && review.plural == plural)
}

/// All named groups with their one version, in order.
pub(crate) fn groups() -> Vec<&'static str> {
    let mut groups: Vec<&str> = offered()
        .map(|resource| resource.group)
        .chain(REVIEWS.iter().map(|review| review.group))
        .filter(|group| !group.is_empty())
        .collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

/// The one version that a group has.
pub(crate) fn version(group: &str) -> &'static str {
    offered().find(|resource| resource.group == group).map_or("v1", |resource| resource.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_two_resources_never_mix() {
        for a in RESOURCES {
            for b in RESOURCES {
                assert!(
                    std::ptr::eq(a, b) || !a.prefix().starts_with(&b.prefix()),
                    "{} {}",
                    a.plural,
                    b.plural
                );
            }
        }
        let pods = find("", "v1", "pods").expect("pods");
        assert_eq!(pods.key("shop", "web"), "/registry/core/pods/shop/web");
        assert_eq!(find("", "v1", "nodes").expect("nodes").key("", "a"), "/registry/core/nodes/a");
    }

    #[test]
    fn only_known_fields_are_selectable() {
        let pods = find("", "v1", "pods").expect("pods");
        assert!(
            pods.selectable("spec.nodeName")
                && pods.selectable("metadata.namespace")
                && !pods.selectable("spec.x")
        );
        assert!(!find("", "v1", "nodes").expect("nodes").selectable("metadata.namespace"));
    }
}
