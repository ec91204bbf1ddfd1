//! Cells of role bindings.

use serde_json::{Value, json};

use super::items;

pub(super) fn binding(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let role = &object["roleRef"];
    let subjects = |kind: &str| -> Value {
        let named = items(&object["subjects"]).iter().filter(|subject| subject["kind"] == kind);
        let names: Vec<String> = named
            .map(|subject| match kind {
                "ServiceAccount" => {
                    format!("{}/{}", text(&subject["namespace"]), text(&subject["name"]))
                }
                _ => text(&subject["name"]),
            })
            .collect();
        json!(names.join(", "))
    };
    vec![
        name,
        json!(format!("{}/{}", text(&role["kind"]), text(&role["name"]))),
        age,
        subjects("User"),
        subjects("Group"),
        subjects("ServiceAccount"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_sorted_into_their_columns() {
        let object = json!({ "roleRef": { "kind": "ClusterRole", "name": "view" }, "subjects": [
            { "kind": "User", "name": "jane" }, { "kind": "User", "name": "joe" },
            { "kind": "ServiceAccount", "name": "till", "namespace": "shop" },
        ] });
        assert_eq!(
            binding(&object, json!("b"), json!("1m")),
            ["b", "ClusterRole/view", "1m", "jane, joe", "", "shop/till"]
        );
    }
}
