//! What is in a namespace: every namespaced resource that the server says it has.

use std::collections::BTreeMap;

use http::Method;
use orch_client::{Client, Error};
use serde_json::{Value, json};

/// Condition types of a namespace that ends.
pub(super) const REMAINING: &str = "NamespaceContentRemaining";
const FINALIZERS: &str = "NamespaceFinalizersRemaining";

/// A resource whose objects can be listed and deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resource {
    /// Path before `/namespaces/`.
    base: String,
    pub(super) plural: String,
    /// With its group, as the status says it.
    qualified: String,
}

/// Objects that are still there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Left {
    resource: String,
    count: usize,
    finalizers: Vec<String>,
}

async fn get(client: &Client, path: &str) -> Result<Value, Error> {
    client.json(Method::GET, path, "application/json", None::<&Value>).await
}

/// Asks discovery. All or nothing: what is not known must not be taken for not there.
pub(super) async fn resources(client: &Client) -> Result<Vec<Resource>, Error> {
    let mut found = of_version("/api/v1", "", &get(client, "/api/v1").await?);
    let groups = get(client, "/apis").await?;
    for group in groups["groups"].as_array().into_iter().flatten() {
        let name = group["name"].as_str().unwrap_or_default();
        // Other versions are the same objects.
        let preferred = &group["preferredVersion"]["groupVersion"];
        let version = preferred.as_str().or(group["versions"][0]["groupVersion"].as_str());
        let Some(version) = version else { continue };
        let path = format!("/apis/{version}");
        found.extend(of_version(&path, name, &get(client, &path).await?));
    }
    Ok(found)
}

fn of_version(base: &str, group: &str, list: &Value) -> Vec<Resource> {
    let can = |resource: &Value, verb: &str| {
        resource["verbs"].as_array().is_some_and(|verbs| verbs.iter().any(|one| one == verb))
    };
    list["resources"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|resource| resource["namespaced"] == true)
        .filter(|resource| can(resource, "list") && can(resource, "delete"))
        .filter_map(|resource| resource["name"].as_str())
        .filter(|name| !name.contains('/'))
        .map(|name| Resource {
            base: base.to_owned(),
            plural: name.to_owned(),
            qualified: if group.is_empty() { name.to_owned() } else { format!("{name}.{group}") },
        })
        .collect()
}

/// Asks for the deletion of everything, and returns what is there nevertheless.
pub(super) async fn delete_all(
    client: &Client,
    resources: &[Resource],
    ns: &str,
) -> Result<Vec<Left>, Error> {
    let mut left = Vec::new();
    for resource in resources {
        let path = format!("{}/namespaces/{ns}/{}", resource.base, resource.plural);
        let items = items(get(client, &path).await?);
        if items.is_empty() {
            continue;
        }
        // What is on its way out already needs no second word.
        if items.iter().any(|item| !item["metadata"]["deletionTimestamp"].is_string()) {
            let options = json!({ "apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background" });
            let outcome: Result<Value, Error> =
                client.json(Method::DELETE, &path, "application/json", Some(&options)).await;
            match outcome {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        let items = self::items(get(client, &path).await?);
        if !items.is_empty() {
            left.push(Left {
                resource: resource.qualified.clone(),
                count: items.len(),
                finalizers: items.iter().flat_map(finalizers).collect(),
            });
        }
    }
    Ok(left)
}

fn items(mut list: Value) -> Vec<Value> {
    match list["items"].take() {
        Value::Array(items) => items,
        _ => Vec::new(),
    }
}

fn finalizers(item: &Value) -> Vec<String> {
    let list = item["metadata"]["finalizers"].as_array().into_iter().flatten();
    list.filter_map(|one| one.as_str().map(str::to_owned)).collect()
}

/// Both conditions with their messages; without one the condition does not hold.
pub(super) fn conditions(left: &[Left]) -> [(&'static str, Option<String>); 2] {
    let mut resources: Vec<String> = left
        .iter()
        .map(|left| format!("{} has {} resource instances", left.resource, left.count))
        .collect();
    resources.sort();
    let mut counts = BTreeMap::<&str, usize>::new();
    for finalizer in left.iter().flat_map(|left| &left.finalizers) {
        *counts.entry(finalizer).or_default() += 1;
    }
    let finalizers: Vec<String> = counts
        .iter()
        .map(|(name, count)| format!("{name} in {count} resource instances"))
        .collect();
    let say = |start: &str, list: Vec<String>| {
        (!list.is_empty()).then(|| format!("{start} remaining: {}", list.join(", ")))
    };
    [
        (REMAINING, say("Some resources are", resources)),
        (FINALIZERS, say("Some content in the namespace has finalizers", finalizers)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_namespaced_resources_are_content() {
        let all = ["create", "delete", "deletecollection", "get", "list"];
        let list = json!({ "resources": [
            { "name": "pods", "namespaced": true, "verbs": all },
            { "name": "pods/log", "namespaced": true, "verbs": ["get"] },
            { "name": "nodes", "namespaced": false, "verbs": all },
            { "name": "reviews", "namespaced": true, "verbs": ["create"] },
        ] });
        let names: Vec<_> =
            of_version("/apis/a/v1", "a", &list).into_iter().map(|found| found.qualified).collect();
        assert_eq!(names, ["pods.a"]);
    }

    #[test]
    fn the_status_says_what_remains_in_upstreams_words() {
        let left =
            [Left { resource: "pods".to_owned(), count: 2, finalizers: vec!["a/b".to_owned()] }];
        let [(_, resources), (_, finalizers)] = conditions(&left);
        assert_eq!(
            resources.as_deref(),
            Some("Some resources are remaining: pods has 2 resource instances")
        );
        assert_eq!(
            finalizers.as_deref(),
            Some(
                "Some content in the namespace has finalizers remaining: a/b in 1 resource instances"
            )
        );
    }
}
