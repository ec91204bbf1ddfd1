//! Keeps the [`defaults`](super::defaults): makes what is missing and gives back what was taken away, at every start,
//! as upstream does. What somebody has added stays, and an object annotated with `autoupdate: "false"` is left alone.

use std::collections::HashMap;

use http::Method;
use orch_client::{Client, Error};
use serde_json::{Value, json};

use super::defaults::{AUTO_UPDATE, objects};
use super::escalation::uncovered;
use super::rbac::Rule;
use crate::resources::RBAC;

/// What to do about one object.
#[derive(Debug, PartialEq)]
enum Step {
    Create(Value),
    Replace(Value),
    /// The role of a binding cannot be changed.
    Recreate(Value),
}

/// Looks at all default objects and mends them.
///
/// # Errors
/// The server's store does not answer.
pub(crate) async fn run(client: &Client) -> Result<(), Error> {
    let mut found = HashMap::new();
    for kind in ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"] {
        let path = format!("/apis/{RBAC}/v1/{}", plural(kind));
        let mut list: Value = client.json(Method::GET, &path, "", None::<&Value>).await?;
        if let Some(items) = list["items"].as_array_mut() {
            found.extend(items.drain(..).map(|mut item| {
                // Items of a list do not say what they are.
                item["kind"] = json!(kind);
                item["apiVersion"] = json!(format!("{RBAC}/v1"));
                (key(&item), item)
            }));
        }
    }
    for wanted in objects() {
        let Some(step) = plan(&wanted, found.get(&key(&wanted))) else { continue };
        tracing::info!(object = key(&wanted), change = step.word(), "default role or binding");
        apply(client, step).await?;
    }
    Ok(())
}

impl Step {
    fn word(&self) -> &'static str {
        match self {
            Self::Create(_) => "made",
            Self::Replace(_) => "completed",
            Self::Recreate(_) => "made anew",
        }
    }
}

fn plural(kind: &str) -> String {
    format!("{}s", kind.to_lowercase())
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object["metadata"][key].as_str().unwrap_or_default()
}

fn key(object: &Value) -> String {
    let kind = object["kind"].as_str().unwrap_or_default();
    format!("{kind} {}/{}", text(object, "namespace"), text(object, "name"))
}

fn collection(object: &Value) -> String {
    let plural = plural(object["kind"].as_str().unwrap_or_default());
    match text(object, "namespace") {
        "" => format!("/apis/{RBAC}/v1/{plural}"),
        namespace => format!("/apis/{RBAC}/v1/namespaces/{namespace}/{plural}"),
    }
}

async fn apply(client: &Client, step: Step) -> Result<(), Error> {
    let send = async |method, path: &str, body: &Value| {
        client.json::<Value>(method, path, "application/json", Some(body)).await.map(drop)
    };
    match step {
        Step::Create(object) => match send(Method::POST, &collection(&object), &object).await {
            // Another server of the cluster was quicker.
            Err(error) if error.is_already_exists() => Ok(()),
            outcome => outcome,
        },
        Step::Replace(object) => {
            let path = format!("{}/{}", collection(&object), text(&object, "name"));
            send(Method::PUT, &path, &object).await
        }
        Step::Recreate(object) => {
            let path = format!("{}/{}", collection(&object), text(&object, "name"));
            match send(Method::DELETE, &path, &json!({})).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
            match send(Method::POST, &collection(&object), &object).await {
                Err(error) if error.is_already_exists() => Ok(()),
                outcome => outcome,
            }
        }
    }
}

/// Pure.
fn plan(wanted: &Value, found: Option<&Value>) -> Option<Step> {
    let Some(found) = found else { return Some(Step::Create(wanted.clone())) };
    if found["metadata"]["annotations"][AUTO_UPDATE] == "false" {
        return None;
    }
    if wanted["roleRef"] != found["roleRef"] {
        return Some(Step::Recreate(wanted.clone()));
    }
    let mut next = found.clone();
    for map in ["labels", "annotations"] {
        for (key, value) in wanted["metadata"][map].as_object().into_iter().flatten() {
            if next["metadata"][map].get(key).is_none() {
                next["metadata"][map][key] = value.clone();
            }
        }
    }
    if wanted["aggregationRule"].is_object() {
        if found["aggregationRule"].is_null() {
            next["aggregationRule"] = wanted["aggregationRule"].clone();
        }
    } else if wanted["rules"].is_array() {
        let rules = |object: &Value| -> Vec<Rule> {
            serde_json::from_value(object["rules"].clone()).unwrap_or_default()
        };
        let lacking = uncovered(&rules(found), &rules(wanted));
        append(&mut next, "rules", lacking.into_iter().map(|rule| json!(rule)));
    }
    let has =
        |subject: &&Value| !found["subjects"].as_array().is_some_and(|list| list.contains(subject));
    let lacking: Vec<Value> =
        wanted["subjects"].as_array().into_iter().flatten().filter(has).cloned().collect();
    append(&mut next, "subjects", lacking.into_iter());
    (next != *found).then_some(Step::Replace(next))
}

fn append(object: &mut Value, key: &str, items: impl Iterator<Item = Value>) {
    let mut items = items.peekable();
    // Looking at a field makes it, so it is looked at only when something comes in.
    if items.peek().is_none() {
        return;
    }
    let list = &mut object[key];
    if !list.is_array() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut() {
        list.extend(items);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_needs_nothing_and_what_is_missing_comes_back() {
        for wanted in objects() {
            assert_eq!(plan(&wanted, None), Some(Step::Create(wanted.clone())));
            assert_eq!(plan(&wanted, Some(&wanted)), None, "{}", key(&wanted));
        }
        let wanted = objects();
        let wanted =
            wanted.iter().find(|object| key(object) == "ClusterRole /system:kube-scheduler");
        let wanted = wanted.expect("the role");
        let mut found = wanted.clone();
        let rules = found["rules"].as_array_mut().expect("rules");
        let removed = rules.remove(2);
        let own =
            json!({ "verbs": ["get"], "apiGroups": ["example.com"], "resources": ["things"] });
        rules.push(own.clone());
        let Some(Step::Replace(next)) = plan(wanted, Some(&found)) else { panic!("a change") };
        let rules = next["rules"].as_array().expect("rules");
        assert!(rules.contains(&removed) && rules.contains(&own));
        found["metadata"]["annotations"][AUTO_UPDATE] = json!("false");
        assert_eq!(plan(wanted, Some(&found)), None, "its owner has taken it over");
    }

    #[test]
    fn a_binding_to_another_role_is_made_anew() {
        let all = objects();
        let wanted = all.iter().find(|object| object["kind"] == "ClusterRoleBinding").expect("one");
        let mut found = wanted.clone();
        found["subjects"] = json!([{ "kind": "User", "name": "own" }]);
        let Some(Step::Replace(next)) = plan(wanted, Some(&found)) else { panic!("a change") };
        assert_eq!(next["subjects"].as_array().map(Vec::len), Some(2));
        found["roleRef"]["name"] = json!("view");
        assert_eq!(plan(wanted, Some(&found)), Some(Step::Recreate(wanted.clone())));
    }
}
