//! Roles and bindings: pure evaluation (Kubernetes, "Using RBAC Authorization").

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Attributes, By, Decision, ResourceTarget, Target};
use crate::auth::User;

/// What a role allows: some verbs, on some resources or some paths. `*` is any.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Rule {
    pub(crate) verbs: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) api_groups: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) resources: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) resource_names: Vec<String>,
    #[serde(rename = "nonResourceURLs", skip_serializing_if = "Vec::is_empty")]
    pub(crate) urls: Vec<String>,
}

/// A Role or ClusterRole.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Role {
    pub(crate) rules: Vec<Rule>,
}

/// A RoleBinding or ClusterRoleBinding.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Binding {
    metadata: Names,
    pub(crate) subjects: Vec<Subject>,
    pub(crate) role_ref: RoleRef,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
struct Names {
    name: String,
    /// Empty for a ClusterRoleBinding.
    namespace: String,
}

/// Which role a binding gives.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RoleRef {
    pub(crate) kind: String,
    pub(crate) name: String,
}

/// To whom.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Subject {
    kind: String,
    name: String,
    namespace: String,
}

/// All roles and bindings at one moment.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    /// By namespace and name.
    pub(super) roles: HashMap<String, HashMap<String, Arc<Role>>>,
    pub(super) cluster_roles: HashMap<String, Arc<Role>>,
    pub(super) cluster_bindings: Vec<Arc<Binding>>,
    /// By namespace.
    pub(super) bindings: HashMap<String, Vec<Arc<Binding>>>,
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|one| one == "*" || one == wanted)
}

/// Whether a pattern of `nonResourceURLs` covers a path, or a narrower pattern. A `*` stands at the end only.
pub(super) fn url_covers(pattern: &str, path: &str) -> bool {
    pattern == path
        || pattern
            .strip_suffix('*')
            .is_some_and(|prefix| path.starts_with(prefix.trim_end_matches('*')))
}

/// Whether an entry of `resources` covers `pods` or `pods/log`.
pub(super) fn resource_covers(entry: &str, resource: &str) -> bool {
    entry == "*"
        || entry == resource
        || matches!((entry.strip_prefix("*/"), resource.split_once('/')), (Some(any), Some((_, sub))) if any == sub)
}

impl Rule {
    pub(crate) fn everything() -> Self {
        let any = || vec!["*".to_owned()];
        Self { verbs: any(), api_groups: any(), resources: any(), ..Self::default() }
    }

    pub(crate) fn every_path() -> Self {
        let any = || vec!["*".to_owned()];
        Self { verbs: any(), urls: any(), ..Self::default() }
    }

    pub(super) fn allows(&self, asked: &Attributes<'_>) -> bool {
        has(&self.verbs, asked.verb)
            && match asked.target {
                Target::Path(path) => self.urls.iter().any(|url| url_covers(url, path)),
                Target::Resource(target) => self.is_about(&target),
            }
    }

    fn is_about(&self, target: &ResourceTarget<'_>) -> bool {
        if !has(&self.api_groups, target.group) {
            return false;
        }
        let named = |entry: &String| match target.subresource {
            "" => entry == "*" || entry == target.resource,
            _ => resource_covers(entry, &target.path()),
        };
        self.resources.iter().any(named)
            && (self.resource_names.is_empty()
                || self.resource_names.iter().any(|name| name == target.name))
    }
}

impl Subject {
    fn is(&self, user: &User, namespace: &str) -> bool {
        match self.kind.as_str() {
            "User" => self.name == user.name,
            "Group" => user.is_in(&self.name),
            "ServiceAccount" => {
                // A RoleBinding means its own namespace when it names none.
                let namespace =
                    if self.namespace.is_empty() { namespace } else { self.namespace.as_str() };
                !namespace.is_empty()
                    && user
                        .name
                        .strip_prefix("system:serviceaccount:")
                        .and_then(|rest| rest.split_once(':'))
                        .is_some_and(|found| found == (namespace, self.name.as_str()))
            }
            _ => false,
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind.as_str() {
            "ServiceAccount" => write!(f, "ServiceAccount \"{}/{}\"", self.name, self.namespace),
            kind => write!(f, "{kind} {:?}", self.name),
        }
    }
}

impl Binding {
    pub(crate) fn name(&self) -> &str {
        &self.metadata.name
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.metadata.namespace
    }

    /// Which of the subjects the user is.
    fn subject(&self, user: &User) -> Option<usize> {
        self.subjects.iter().position(|subject| subject.is(user, self.namespace()))
    }
}

impl Policy {
    /// The rules of a role that a binding in `namespace` (empty = of the cluster) names.
    ///
    /// # Errors
    /// There is none of that name; the text says so.
    pub(crate) fn role(&self, role: &RoleRef, namespace: &str) -> Result<&Arc<Role>, String> {
        let (found, plural) = match role.kind.as_str() {
            "Role" => (self.roles.get(namespace).and_then(|roles| roles.get(&role.name)), "role"),
            _ => (self.cluster_roles.get(&role.name), "clusterrole"),
        };
        found.ok_or_else(|| format!("{plural}.rbac.authorization.k8s.io {:?} not found", role.name))
    }

    /// The bindings that count for the user in a namespace, each with its subject and its role.
    fn of_user<'a>(
        &'a self,
        user: &User,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a Arc<Binding>, usize, Result<&'a Arc<Role>, String>)> {
        let local = self.bindings.get(namespace).filter(|_| !namespace.is_empty());
        self.cluster_bindings.iter().chain(local.into_iter().flatten()).filter_map(|binding| {
            let subject = binding.subject(user)?;
            Some((binding, subject, self.role(&binding.role_ref, binding.namespace())))
        })
    }

    /// Whether a role gives the user what is asked for.
    pub(crate) fn decide(&self, user: &User, asked: &Attributes<'_>) -> Decision {
        let namespace = match asked.target {
            Target::Resource(target) => target.namespace,
            Target::Path(_) => "",
        };
        let mut missing = Vec::new();
        for (binding, subject, role) in self.of_user(user, namespace) {
            match role {
                Ok(role) if role.rules.iter().any(|rule| rule.allows(asked)) => {
                    return Decision::Allowed(By::Binding(binding.clone(), subject));
                }
                Ok(_) => {}
                Err(error) => missing.push(error),
            }
        }
        Decision::Refused(match missing.as_slice() {
            [] => String::new(),
            [one] => format!("RBAC: {one}"),
            many => format!("RBAC: [{}]", many.join(", ")),
        })
    }

    /// All rules of the user in a namespace, and what is wrong with the bindings.
    pub(crate) fn rules_of(&self, user: &User, namespace: &str) -> (Vec<&Rule>, Vec<String>) {
        let (mut rules, mut errors) = (Vec::new(), Vec::new());
        for (_, _, role) in self.of_user(user, namespace) {
            match role {
                Ok(role) => rules.extend(&role.rules),
                Err(error) => errors.push(error),
            }
        }
        (rules, errors)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    pub(in crate::authz) fn rule(value: Value) -> Rule {
        serde_json::from_value(value).expect("a rule")
    }

    fn binding(value: Value) -> Arc<Binding> {
        Arc::new(serde_json::from_value(value).expect("a binding"))
    }

    fn policy() -> Policy {
        let role = |rules: Value| {
            let role: Role = serde_json::from_value(json!({ "rules": rules })).expect("a role");
            Arc::new(role)
        };
        let reader = role(json!([
            { "verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods", "pods/log"] },
            { "verbs": ["get"], "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["open"] },
            { "verbs": ["*"], "apiGroups": ["apps"], "resources": ["*/scale"] },
        ]));
        let monitor =
            role(json!([{ "verbs": ["get"], "nonResourceURLs": ["/metrics", "/logs/*"] }]));
        Policy {
            roles: [("shop".to_owned(), [("reader".to_owned(), reader.clone())].into())].into(),
            cluster_roles: [("reader".to_owned(), reader), ("monitor".to_owned(), monitor)].into(),
            cluster_bindings: vec![binding(json!({ "metadata": { "name": "monitors" },
                "roleRef": { "kind": "ClusterRole", "name": "monitor" },
                "subjects": [{ "kind": "Group", "name": "ops" }, { "kind": "User", "name": "mia" }] }))],
            bindings: [("shop".to_owned(), vec![
                binding(json!({ "metadata": { "name": "readers", "namespace": "shop" },
                    "roleRef": { "kind": "Role", "name": "reader" },
                    "subjects": [{ "kind": "User", "name": "jane" }, { "kind": "ServiceAccount", "name": "till" }] })),
                binding(json!({ "metadata": { "name": "lost", "namespace": "shop" },
                    "roleRef": { "kind": "ClusterRole", "name": "gone" }, "subjects": [{ "kind": "User", "name": "jane" }] })),
            ]),
            ("bank".to_owned(), vec![
                binding(json!({ "metadata": { "name": "guests", "namespace": "bank" },
                    "roleRef": { "kind": "ClusterRole", "name": "reader" },
                    "subjects": [{ "kind": "ServiceAccount", "name": "till", "namespace": "shop" }] })),
            ])].into(),
        }
    }

    #[test]
    fn rights_by_table() {
        let policy = policy();
        let jane = User::new("jane", &[]);
        let mia = User::new("mia", &[]);
        let ops = User::new("otto", &["ops"]);
        let till = User::new("system:serviceaccount:shop:till", &["system:serviceaccounts"]);
        let other = User::new("system:serviceaccount:bank:till", &["system:serviceaccounts"]);
        let asked = |verb: &'static str, what: &'static str, namespace: &'static str| {
            let (path, name) = what.split_once(':').unwrap_or((what, ""));
            let (group, path) =
                path.split_once('.').map_or(("", path), |(path, group)| (group, path));
            let (resource, subresource) = path.split_once('/').unwrap_or((path, ""));
            let target = ResourceTarget {
                group,
                resource,
                subresource,
                namespace,
                name,
                field_selector: "",
            };
            Attributes::resource(verb, target)
        };
        for (user, verb, what, namespace, expected) in [
            (&jane, "list", "pods", "shop", true),
            (&jane, "get", "pods:web", "shop", true),
            (&jane, "get", "pods/log:web", "shop", true),
            (&jane, "get", "pods/exec:web", "shop", false),
            (&jane, "delete", "pods:web", "shop", false),
            (&jane, "list", "pods", "bank", false),
            (&jane, "list", "pods", "", false),
            (&jane, "get", "configmaps:open", "shop", true),
            (&jane, "get", "configmaps:closed", "shop", false),
            (&jane, "list", "configmaps", "shop", false),
            (&jane, "patch", "deployments/scale.apps:web", "shop", true),
            (&jane, "patch", "deployments.apps:web", "shop", false),
            (&mia, "list", "pods", "shop", false),
            (&till, "list", "pods", "shop", true),
            (&till, "list", "pods", "bank", true),
            (&other, "list", "pods", "shop", false),
            (&other, "list", "pods", "bank", false),
        ] {
            let decision = policy.decide(user, &asked(verb, what, namespace));
            assert_eq!(decision.is_allowed(), expected, "{} {verb} {what} {namespace}", user.name);
        }
        for (user, path, expected) in [
            (&ops, "/metrics", true),
            (&mia, "/logs/a/b", true),
            (&mia, "/logs", false),
            (&mia, "/metrics/x", false),
            (&jane, "/metrics", false),
        ] {
            let decision = policy.decide(user, &Attributes::path("get", path));
            assert_eq!(decision.is_allowed(), expected, "{} {path}", user.name);
        }
    }

    #[test]
    fn the_reason_names_the_binding_or_the_role_that_is_missing() {
        let (policy, jane) = (policy(), User::new("jane", &[]));
        let pods =
            ResourceTarget { resource: "pods", namespace: "shop", ..ResourceTarget::default() };
        assert_eq!(
            policy.decide(&jane, &Attributes::resource("list", pods)).reason(),
            r#"RBAC: allowed by RoleBinding "readers/shop" of Role "reader" to User "jane""#
        );
        assert_eq!(
            policy.decide(&jane, &Attributes::resource("delete", pods)).reason(),
            r#"RBAC: clusterrole.rbac.authorization.k8s.io "gone" not found"#
        );
        let (rules, errors) = policy.rules_of(&jane, "shop");
        assert_eq!((rules.len(), errors.len()), (3, 1));
    }
}
