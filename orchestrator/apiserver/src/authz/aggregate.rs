//! ClusterRoles that are made of others (`aggregationRule`): their rules are written whenever the others change.
//!
//! Every server of a cluster does it: all come to the same rules, and who is second finds nothing to do.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::rbac::v1::ClusterRole;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use orch_api::Selector;
use orch_client::{Api, Client, Error};
use orch_store::cache::Cache;
use serde_json::{Value, json};
use tracing::warn;

use super::escalation::distinct;
use super::rbac::Rule;

/// Waits between two tries.
const RETRY: Duration = Duration::from_secs(1);

/// Follows the ClusterRoles for ever.
///
/// # Cancel safety
/// A write that is dropped is made by the next run.
pub(crate) async fn run(client: Client, cluster_roles: Arc<Cache>) {
    let mut changes = cluster_roles.changes();
    if !cluster_roles.ready().await {
        return;
    }
    loop {
        changes.borrow_and_update();
        let roles: Vec<Value> = cluster_roles
            .snapshot()
            .iter()
            .filter_map(|object| serde_json::from_slice(&object.bytes).ok())
            .collect();
        let mut failed = false;
        for role in plan(&roles) {
            if let Err(error) = write(&client, &role).await {
                failed = true;
                // A conflict is somebody else's change, of which we are about to hear.
                if !error.is_conflict() && !error.is_not_found() {
                    warn!(role = %role["metadata"]["name"], %error, "the rules of an aggregated role are not written yet");
                }
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if failed => {}
        }
    }
}

async fn write(client: &Client, role: &Value) -> Result<(), Error> {
    let typed: ClusterRole = serde_json::from_value(role.clone())
        .map_err(|source| Error::Decode { request: "an aggregated role".to_owned(), source })?;
    let name = role["metadata"]["name"].as_str().unwrap_or_default();
    Api::<ClusterRole>::all(client.clone()).replace(name, &typed).await.map(drop)
}

/// Pure: the roles whose rules differ from what they are made of, as they are to be.
fn plan(roles: &[Value]) -> Vec<Value> {
    roles.iter().filter_map(|role| aggregated(role, roles)).collect()
}

fn aggregated(role: &Value, roles: &[Value]) -> Option<Value> {
    let selectors: Vec<Selector> = role["aggregationRule"]["clusterRoleSelectors"]
        .as_array()?
        .iter()
        .filter_map(|selector| serde_json::from_value::<LabelSelector>(selector.clone()).ok())
        .filter_map(|selector| Selector::from_label_selector(&selector).ok())
        .collect();
    let name = &role["metadata"]["name"];
    let chosen = |other: &&Value| {
        let labels =
            serde_json::from_value(other["metadata"]["labels"].clone()).unwrap_or_default();
        other["metadata"]["name"] != *name && selectors.iter().any(|one| one.matches(&labels))
    };
    let parts = roles.iter().filter(chosen).flat_map(rules);
    let wanted = distinct(parts);
    if wanted == rules(role) {
        return None;
    }
    let mut role = role.clone();
    role["rules"] = json!(wanted);
    Some(role)
}

fn rules(role: &Value) -> Vec<Rule> {
    serde_json::from_value(role["rules"].clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_gets_the_rules_of_those_it_selects_once() {
        let part = |name: &str, to: &str, resource: &str| {
            json!({ "metadata": { "name": name, "labels": { to: "true" } },
                    "rules": [{ "verbs": ["get"], "apiGroups": [""], "resources": [resource] }] })
        };
        let whole = json!({ "metadata": { "name": "view", "labels": { "to-view": "true" } },
            "aggregationRule": { "clusterRoleSelectors": [{ "matchLabels": { "to-view": "true" } }] },
            "rules": [{ "verbs": ["*"], "apiGroups": ["old"], "resources": ["*"] }] });
        let mut roles = vec![
            part("a", "to-view", "pods"),
            part("b", "to-view", "pods"),
            part("c", "to-edit", "nodes"),
            part("d", "to-view", "services"),
            whole,
        ];
        let changed = plan(&roles);
        assert_eq!(changed.len(), 1);
        let resources: Vec<&Value> = changed[0]["rules"]
            .as_array()
            .expect("rules")
            .iter()
            .map(|rule| &rule["resources"][0])
            .collect();
        assert_eq!(resources, ["pods", "services"]);
        roles[4] = changed[0].clone();
        assert_eq!(plan(&roles), [Value::Null; 0], "a second run finds nothing to do");
    }
}
