//! Rules of Roles and their bindings (rbac.authorization.k8s.io/v1).

use serde_json::{Value, json};

use super::{items, label_selector};
use crate::names;
use crate::status::FieldError;

pub(super) const GROUP: &str = "rbac.authorization.k8s.io";

pub(super) fn rules(kind: &str, object: &Value, errors: &mut Vec<FieldError>) {
    match kind {
        "Role" | "ClusterRole" => {
            for (index, rule) in items(&object["rules"]) {
                policy_rule(rule, kind == "Role", &format!("rules[{index}]"), errors);
            }
            let aggregation = &object["aggregationRule"];
            if kind == "ClusterRole" && aggregation.is_object() {
                aggregation_rule(&aggregation["clusterRoleSelectors"], errors);
            }
        }
        "RoleBinding" => binding(object, &["ClusterRole", "Role"], true, errors),
        "ClusterRoleBinding" => binding(object, &["ClusterRole"], false, errors),
        _ => {}
    }
}

/// What a binding grants stays: who may change subjects must not come to other rights by it.
pub(super) fn update(new: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    if new["roleRef"] != old["roleRef"] {
        errors.push(FieldError::invalid("roleRef", &new["roleRef"], "cannot change roleRef"));
    }
}

fn aggregation_rule(selectors: &Value, errors: &mut Vec<FieldError>) {
    let field = "aggregationRule.clusterRoleSelectors";
    if selectors.as_array().is_none_or(Vec::is_empty) {
        let detail = "at least one clusterRoleSelector required if aggregationRule is non-nil";
        errors.push(FieldError::required(field, detail));
    }
    for (index, selector) in items(selectors) {
        label_selector(selector, &format!("{field}[{index}]"), errors);
    }
}

fn policy_rule(rule: &Value, namespaced: bool, field: &str, errors: &mut Vec<FieldError>) {
    let count = |key: &str| rule[key].as_array().map_or(0, Vec::len);
    if count("verbs") == 0 {
        let detail = "verbs must contain at least one value";
        errors.push(FieldError::required(format!("{field}.verbs"), detail));
    }
    if count("nonResourceURLs") > 0 {
        let urls = &rule["nonResourceURLs"];
        let mut wrong = |detail: &str| {
            errors.push(FieldError::invalid(format!("{field}.nonResourceURLs"), urls, detail));
        };
        if namespaced {
            wrong("namespaced rules cannot apply to non-resource URLs");
        }
        if count("apiGroups") + count("resources") + count("resourceNames") > 0 {
            wrong("rules cannot apply to both regular resources and non-resource URLs");
        }
        return;
    }
    for (key, what) in [("apiGroups", "api group"), ("resources", "resource")] {
        if count(key) == 0 {
            let detail = format!("resource rules must supply at least one {what}");
            errors.push(FieldError::required(format!("{field}.{key}"), detail));
        }
    }
}

fn binding(object: &Value, kinds: &[&str], namespaced: bool, errors: &mut Vec<FieldError>) {
    let role = &object["roleRef"];
    let group = json!(role["apiGroup"].as_str().unwrap_or_default());
    if group != GROUP {
        errors.push(FieldError::not_supported("roleRef.apiGroup", &group, &[GROUP]));
    }
    let kind = json!(role["kind"].as_str().unwrap_or_default());
    if !kinds.iter().any(|known| kind == *known) {
        errors.push(FieldError::not_supported("roleRef.kind", &kind, kinds));
    }
    let name = role["name"].as_str().unwrap_or_default();
    if name.is_empty() {
        errors.push(FieldError::required("roleRef.name", ""));
    } else if let Err(why) = names::is_path_segment(name) {
        errors.push(FieldError::invalid("roleRef.name", &role["name"], why));
    }
    for (index, who) in items(&object["subjects"]) {
        subject(who, namespaced, &format!("subjects[{index}]"), errors);
    }
}

fn subject(who: &Value, namespaced: bool, field: &str, errors: &mut Vec<FieldError>) {
    let text = |key: &str| who[key].as_str().unwrap_or_default();
    let (kind, name) = (text("kind"), text("name"));
    if name.is_empty() {
        errors.push(FieldError::required(format!("{field}.name"), ""));
    }
    let group = json!(text("apiGroup"));
    let wanted = match kind {
        "ServiceAccount" => "",
        "User" | "Group" => GROUP,
        _ => {
            let known = ["Group", "ServiceAccount", "User"];
            errors.push(FieldError::not_supported(format!("{field}.kind"), &json!(kind), &known));
            return;
        }
    };
    if group != wanted {
        errors.push(FieldError::not_supported(format!("{field}.apiGroup"), &group, &[wanted]));
    }
    if kind == "ServiceAccount" {
        if !name.is_empty()
            && let Err(why) = names::is_dns1123_subdomain(name)
        {
            errors.push(FieldError::invalid(format!("{field}.name"), &json!(name), why));
        }
        if !namespaced && text("namespace").is_empty() {
            errors.push(FieldError::required(format!("{field}.namespace"), ""));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate;

    fn found(kind: &str, mut object: Value) -> Vec<String> {
        object["metadata"] = json!({ "name": "system:a" });
        crate::defaults::apply(GROUP, kind, &mut object);
        validate::create(GROUP, kind, &object).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_upstream_takes_passes() {
        let role = json!({ "rules": [
            { "verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["a"] },
        ] });
        assert_eq!(found("Role", role), [""; 0]);
        let role = json!({ "rules": [{ "verbs": ["get"], "nonResourceURLs": ["/metrics"] }],
            "aggregationRule": { "clusterRoleSelectors": [{ "matchLabels": { "a": "b" } }] } });
        assert_eq!(found("ClusterRole", role), [""; 0]);
        // The API groups are defaults.
        let binding = json!({ "roleRef": { "kind": "ClusterRole", "name": "view" }, "subjects": [
            { "kind": "User", "name": "jane" }, { "kind": "Group", "name": "dev" },
            { "kind": "ServiceAccount", "name": "till" },
        ] });
        assert_eq!(found("RoleBinding", binding), [""; 0]);
    }

    #[test]
    fn mistakes_are_named_in_upstreams_words() {
        let role = json!({ "rules": [{ "nonResourceURLs": ["/x"], "resources": ["pods"] }, { "verbs": ["get"] }] });
        let expected = [
            "rules[0].verbs: Required value: verbs must contain at least one value",
            r#"rules[0].nonResourceURLs: Invalid value: ["/x"]: namespaced rules cannot apply to non-resource URLs"#,
            r#"rules[0].nonResourceURLs: Invalid value: ["/x"]: rules cannot apply to both regular resources and non-resource URLs"#,
            "rules[1].apiGroups: Required value: resource rules must supply at least one api group",
            "rules[1].resources: Required value: resource rules must supply at least one resource",
        ];
        assert_eq!(found("Role", role), expected);
        let role = json!({ "aggregationRule": {} });
        assert_eq!(found("ClusterRole", role).len(), 1, "an aggregation selects something");
        let binding = json!({ "roleRef": { "kind": "Role", "name": "a/b" }, "subjects": [
            { "kind": "ServiceAccount", "name": "A" }, { "kind": "Robot", "name": "r" }, { "kind": "User", "apiGroup": "x" },
        ] });
        let found = found("ClusterRoleBinding", binding).join("\n");
        for expected in [
            r#"roleRef.kind: Unsupported value: "Role": supported values: "ClusterRole""#,
            r#"roleRef.name: Invalid value: "a/b": may not contain '/'"#,
            r#"subjects[0].name: Invalid value: "A""#,
            "subjects[0].namespace: Required value",
            r#"subjects[1].kind: Unsupported value: "Robot": supported values: "Group", "ServiceAccount", "User""#,
            "subjects[2].name: Required value",
            r#"subjects[2].apiGroup: Unsupported value: "x": supported values: "rbac.authorization.k8s.io""#,
        ] {
            assert!(found.contains(expected), "{expected}\nis not in\n{found}");
        }
    }

    #[test]
    fn a_binding_keeps_its_role() {
        let old = json!({ "metadata": { "name": "b" }, "roleRef": { "apiGroup": GROUP, "kind": "Role", "name": "a" } });
        let mut new = old.clone();
        new["subjects"] = json!([{ "kind": "User", "apiGroup": GROUP, "name": "jane" }]);
        assert_eq!(validate::update(GROUP, "RoleBinding", &new, &old), []);
        new["roleRef"]["name"] = json!("b");
        let errors = validate::update(GROUP, "RoleBinding", &new, &old);
        assert!(errors[0].to_string().ends_with("cannot change roleRef"), "{errors:?}");
    }
}
