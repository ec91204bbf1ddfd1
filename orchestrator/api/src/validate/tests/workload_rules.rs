use serde_json::{Value, json};

use super::*;

#[test]
fn a_selector_must_match_its_template_and_stay() {
    let deployment = |label: &str| {
        let mut object = json!({ "metadata": { "name": "a" }, "spec": {
            "selector": { "matchLabels": { "app": "web" } },
            "template": { "metadata": { "labels": { "app": label } },
                          "spec": { "containers": [{ "name": "a", "image": "web:v1" }] } },
        } });
        crate::defaults::apply("apps", "Deployment", &mut object);
        object
    };
    assert_eq!(create("apps", "Deployment", &deployment("web")), []);
    let found = texts(&create("apps", "Deployment", &deployment("db")));
    assert!(found[0].contains("`selector` does not match template `labels`"), "{found:?}");
    let mut changed = deployment("web");
    changed["spec"]["selector"]["matchLabels"]["app"] = json!("other");
    let found = texts(&update("apps", "Deployment", &changed, &deployment("web")));
    assert!(found.iter().any(|text| text.contains("field is immutable")), "{found:?}");
}

#[test]
fn mistakes_in_deployments_by_table() {
    let deployment = |spec: Value| {
        let base = json!({ "metadata": { "name": "x" }, "spec": {
            "selector": { "matchLabels": { "app": "web" } },
            "template": { "metadata": { "labels": { "app": "web" } }, "spec": { "containers": [{ "name": "a", "image": "a:1" }] } },
        } });
        with(base, &json!({ "spec": spec }))
    };
    let rolling = |unavailable: Value, surge: Value| json!({ "strategy": { "rollingUpdate": { "maxUnavailable": unavailable, "maxSurge": surge } } });
    for (spec, expected) in [
        (json!({}), ""),
        (
            json!({ "replicas": -1 }),
            "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
        ),
        (json!({ "selector": null }), "spec.selector: Required value"),
        (
            json!({ "selector": { "matchLabels": null } }),
            "empty selector is invalid for deployment",
        ),
        (
            json!({ "selector": { "matchExpressions": [{ "key": "a", "operator": "In" }] } }),
            "spec.selector.matchExpressions[0].values: Required value",
        ),
        (rolling(json!(0), json!("0%")), "may not be 0 when `maxSurge` is 0"),
        (rolling(json!("101%"), json!(1)), "must not be greater than 100%"),
        (rolling(json!("many"), json!(1)), "must be an integer or percentage"),
        (rolling(json!(-1), json!(1)), "must be greater than or equal to 0"),
        (
            json!({ "strategy": { "type": "Never" } }),
            "spec.strategy.type: Unsupported value: \"Never\"",
        ),
        (
            json!({ "strategy": { "type": "Recreate", "rollingUpdate": {} } }),
            "may not be specified when strategy `type` is 'Recreate'",
        ),
        (json!({ "minReadySeconds": 600 }), "must be greater than minReadySeconds"),
        (
            json!({ "template": { "spec": { "restartPolicy": "Never" } } }),
            "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
        ),
        (
            json!({ "template": { "spec": { "containers": null } } }),
            "spec.template.spec.containers: Required value",
        ),
    ] {
        let found = found("apps", "Deployment", deployment(spec.clone()));
        assert!(
            if expected.is_empty() { found.is_empty() } else { found.contains(expected) },
            "{spec}\n{found}"
        );
    }
}
