//! From what people type (`po`, `deploy/web`, kind and apiVersion of a manifest) to a path of the API, by the
//! server's aggregated discovery.

use anyhow::Context as _;
use orch_client::Client;
use serde_json::Value;

use super::wire;
use crate::output;

/// One resource that the server offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resource {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) plural: String,
    pub(crate) singular: String,
    pub(crate) kind: String,
    pub(crate) short_names: Vec<String>,
    pub(crate) categories: Vec<String>,
    pub(crate) namespaced: bool,
    pub(crate) verbs: Vec<String>,
}

impl Resource {
    /// Path of the collection; `None` as namespace: all namespaces.
    pub(crate) fn path(&self, namespace: Option<&str>) -> String {
        let root = if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        };
        match namespace {
            Some(namespace) if self.namespaced => {
                format!("{root}/namespaces/{namespace}/{}", self.plural)
            }
            _ => format!("{root}/{}", self.plural),
        }
    }

    /// Path of one object.
    pub(crate) fn object_path(&self, namespace: &str, name: &str) -> String {
        format!("{}/{name}", self.path(Some(namespace)))
    }

    /// `deployment.apps`, as `kubectl` names kinds in its messages.
    pub(crate) fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.singular.clone()
        } else {
            format!("{}.{}", self.singular, self.group)
        }
    }

    /// The error for an object that is not there.
    pub(crate) fn absent(&self, name: &str, namespace: &str) -> anyhow::Error {
        let (place, flag) = if self.namespaced {
            (format!("namespace {namespace:?}"), format!(" -n {namespace}"))
        } else {
            ("the cluster".to_owned(), String::new())
        };
        output::hinted(
            format!("list what is there with `orchctl get {}{flag}`", self.plural),
            format!("{} {name:?} is absent from {place}", self.singular),
        )
    }

    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }
}

/// All resources of a server.
pub(crate) struct Resources(Vec<Resource>);

impl Resources {
    /// Asks the server.
    pub(crate) async fn discover(client: &Client) -> anyhow::Result<Self> {
        let mut all = Vec::new();
        for root in ["/api", "/apis"] {
            let document = wire::get_as(
                client,
                root,
                "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            )
            .await
            .context("ask the API server what it offers")?;
            all.extend(parse(&document));
        }
        Ok(Self(all))
    }

    /// By what a person typed: plural, singular, short name or `plural.group`.
    pub(crate) fn find(&self, word: &str) -> anyhow::Result<&Resource> {
        let lower = word.to_ascii_lowercase();
        let (name, group) = lower
            .split_once('.')
            .map_or((lower.as_str(), None), |(name, group)| (name, Some(group)));
        self.0
            .iter()
            .find(|resource| {
                group.is_none_or(|group| resource.group == group)
                    && (resource.plural == name
                        || resource.singular == name
                        || resource.short_names.iter().any(|short| short == name))
            })
            .with_context(|| {
                let mut known: Vec<&str> =
                    self.0.iter().map(|resource| resource.plural.as_str()).collect();
                known.sort_unstable();
                known.dedup();
                format!("the server has no resource {word:?}; it has {}", known.join(", "))
            })
    }

    /// The resources a person means: a list with commas, `all` for the category.
    pub(crate) fn find_all(&self, words: &str) -> anyhow::Result<Vec<&Resource>> {
        let mut found = Vec::new();
        for word in words.split(',').filter(|word| !word.is_empty()) {
            let category: Vec<&Resource> = self
                .0
                .iter()
                .filter(|resource| resource.categories.iter().any(|name| name == word))
                .collect();
            if category.is_empty() {
                found.push(self.find(word)?);
            } else {
                found.extend(category);
            }
        }
        if found.is_empty() {
            return Err(output::usage("name a resource, for example `pods`"));
        }
        Ok(found)
    }

    /// By `apiVersion` and `kind` of a manifest.
    pub(crate) fn of_kind(&self, api_version: &str, kind: &str) -> anyhow::Result<&Resource> {
        self.0.iter().find(|resource| resource.kind == kind && resource.api_version() == api_version).with_context(
            || match self.0.iter().find(|resource| resource.kind.eq_ignore_ascii_case(kind)) {
                Some(near) => format!(
                    "the server has no kind {kind:?} in version {api_version:?}; it has {} in {}",
                    near.kind,
                    near.api_version()
                ),
                None => format!("the server has no kind {kind:?} (apiVersion {api_version:?})"),
            },
        )
    }
}

/// Reads an `APIGroupDiscoveryList`.
fn parse(document: &Value) -> Vec<Resource> {
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let list = |value: &Value, key: &str| -> Vec<String> {
        value[key]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    };
    let mut all = Vec::new();
    for group in document["items"].as_array().into_iter().flatten() {
        // The first version is the preferred one.
        let Some(version) = group["versions"].get(0) else { continue };
        for resource in version["resources"].as_array().into_iter().flatten() {
            all.push(Resource {
                group: text(&group["metadata"], "name"),
                version: text(version, "version"),
                plural: text(resource, "resource"),
                singular: text(resource, "singularResource"),
                kind: text(&resource["responseKind"], "kind"),
                short_names: list(resource, "shortNames"),
                categories: list(resource, "categories"),
                namespaced: resource["scope"] == "Namespaced",
                verbs: list(resource, "verbs"),
            });
        }
    }
    all
}

/// Splits `kind/name` or takes kind and name apart.
pub(crate) fn kind_and_name<'a>(
    first: &'a str,
    second: Option<&'a str>,
) -> anyhow::Result<(&'a str, &'a str)> {
    match (first.split_once('/'), second) {
        (Some((kind, name)), None) if !name.is_empty() => Ok((kind, name)),
        (None, Some(name)) => Ok((first, name)),
        _ => Err(output::usage(
            "name one object as KIND/NAME or KIND NAME, for example `deployment/web`",
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resources() -> Resources {
        Resources(parse(&json!({ "items": [
            { "metadata": {}, "versions": [{ "version": "v1", "resources": [
                { "resource": "pods", "singularResource": "pod", "shortNames": ["po"], "scope": "Namespaced",
                  "categories": ["all"], "responseKind": { "kind": "Pod" }, "verbs": ["get"] },
                { "resource": "nodes", "singularResource": "node", "scope": "Cluster", "responseKind": { "kind": "Node" } },
            ] }] },
            { "metadata": { "name": "apps" }, "versions": [{ "version": "v1", "resources": [
                { "resource": "deployments", "singularResource": "deployment", "shortNames": ["deploy"],
                  "categories": ["all"], "scope": "Namespaced", "responseKind": { "kind": "Deployment" } },
            ] }] },
        ] })))
    }

    #[test]
    fn short_names_groups_and_categories_are_understood() {
        let resources = resources();
        assert_eq!(resources.find("PO").expect("pods").plural, "pods");
        assert_eq!(
            resources.find("deployments.apps").expect("deployments").qualified(),
            "deployment.apps"
        );
        let all: Vec<&str> = resources
            .find_all("all")
            .expect("category")
            .iter()
            .map(|found| found.plural.as_str())
            .collect();
        assert_eq!(all, ["pods", "deployments"]);
    }

    #[test]
    fn an_unknown_kind_is_told_with_what_is_near() {
        let error =
            resources().of_kind("extensions/v1beta1", "Deployment").expect_err("old").to_string();
        assert_eq!(
            error,
            "the server has no kind \"Deployment\" in version \"extensions/v1beta1\"; it has Deployment in apps/v1"
        );
        assert!(
            resources()
                .find("widgets")
                .expect_err("unknown")
                .to_string()
                .contains("it has deployments, nodes, pods")
        );
    }

    #[test]
    fn an_absent_object_is_told_with_where_to_look() {
        let error = resources().find("po").expect("pods").absent("web-9", "shop");
        assert_eq!(
            output::describe(&error),
            "error: pod \"web-9\" is absent from namespace \"shop\"\nhint: list what is there with `orchctl get pods -n shop`"
        );
    }

    #[test]
    fn paths_follow_group_and_scope() {
        let resources = resources();
        let deployments = resources.find("deploy").expect("deployments");
        assert_eq!(
            deployments.object_path("shop", "web"),
            "/apis/apps/v1/namespaces/shop/deployments/web"
        );
        assert_eq!(resources.find("nodes").expect("nodes").path(Some("shop")), "/api/v1/nodes");
    }
}
