//! PriorityClasses: which there are, and what pods get of them.

use serde_json::{Value, json};

use crate::support::{Cluster, delete, eventually, get, merge, post};

const CLASSES: &str = "/apis/scheduling.k8s.io/v1/priorityclasses";
const PODS: &str = "/api/v1/namespaces/default/pods";

fn message(status: &Value) -> &str {
    status["message"].as_str().unwrap_or_default()
}

fn class(name: &str, value: i64) -> Value {
    json!({ "metadata": { "name": name }, "value": value })
}

fn pod(name: &str, spec: &Value) -> Value {
    let mut pod = json!({ "metadata": { "name": name },
                          "spec": { "automountServiceAccountToken": false, "containers": [{ "name": "c", "image": "x" }] } });
    for (key, value) in spec.as_object().expect("fields") {
        pod["spec"][key] = value.clone();
    }
    pod
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_get_the_priority_of_their_class() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    for (name, value) in
        [("system-cluster-critical", 2_000_000_000_i64), ("system-node-critical", 2_000_001_000)]
    {
        let path = format!("{CLASSES}/{name}");
        eventually(&format!("{name} is there"), async || get(client, &path).await.0 == 200).await;
        let (_, found) = get(client, &path).await;
        assert_eq!(
            (&found["value"], &found["preemptionPolicy"]),
            (&json!(value), &json!("PreemptLowerPriority"))
        );
    }
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    post(client, accounts, &json!({ "metadata": { "name": "default" } })).await;

    let mut high = class("high", 1000);
    high["preemptionPolicy"] = json!("Never");
    assert_eq!(post(client, CLASSES, &high).await.0, 201);
    // No waiting: the pod's class is looked up in the store where the cache is behind.
    let (code, made) = post(client, PODS, &pod("a", &json!({ "priorityClassName": "high" }))).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(
        (&made["spec"]["priority"], &made["spec"]["preemptionPolicy"]),
        (&json!(1000), &json!("Never"))
    );
    let (code, status) =
        post(client, PODS, &pod("b", &json!({ "priorityClassName": "nope" }))).await;
    assert_eq!(
        (code, message(&status)),
        (403, "pods \"b\" is forbidden: no PriorityClass with name nope was found")
    );
    let own = json!({ "priorityClassName": "high", "priority": 1 });
    let (code, status) = post(client, PODS, &pod("b", &own)).await;
    assert!(code == 403 && message(&status).contains("computed 1000"), "{status}");
    let (_, made) = post(client, PODS, &pod("b", &json!({}))).await;
    assert_eq!(made["spec"]["priority"], 0);
    assert!(made["spec"].get("priorityClassName").is_none(), "{made}");

    // One class may be for all others.
    let mut usual = class("usual", 7);
    usual["globalDefault"] = json!(true);
    assert_eq!(post(client, CLASSES, &usual).await.0, 201);
    eventually("pods without a class have the default's", async || {
        let (_, made) = post(client, &format!("{PODS}?dryRun=All"), &pod("c", &json!({}))).await;
        (&made["spec"]["priority"], &made["spec"]["priorityClassName"])
            == (&json!(7), &json!("usual"))
    })
    .await;
    let second = json!({ "globalDefault": true });
    let (code, status) = merge(client, &format!("{CLASSES}/high"), &second).await;
    assert!(
        code == 403
            && message(&status).ends_with(
                "PriorityClass usual is already marked as default. Only one default can exist"
            ),
        "{status}"
    );
    assert_eq!(
        merge(client, &format!("{CLASSES}/usual"), &json!({ "description": "x" })).await.0,
        200
    );

    // A class keeps its number; pods keep theirs when it is gone.
    let (code, status) = merge(client, &format!("{CLASSES}/high"), &json!({ "value": 2000 })).await;
    assert!(
        code == 422
            && message(&status).ends_with("value: Forbidden: may not be changed in an update."),
        "{status}"
    );
    assert_eq!(delete(client, &format!("{CLASSES}/high"), &json!({})).await.0, 200);
    assert_eq!(get(client, &format!("{PODS}/a")).await.1["spec"]["priority"], 1000);
    for (name, value, why) in [
        ("system-mine", 5, "are reserved for system use only"),
        ("huge", 1_000_000_001, "maximum allowed value of a user defined priority is 1000000000"),
    ] {
        let (code, status) = post(client, CLASSES, &class(name, value)).await;
        assert!(code == 422 && message(&status).ends_with(why), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_shows_priority_classes() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    eventually("there is a class", async || {
        post(client, CLASSES, &class("high", 1000)).await.0 == 201
    })
    .await;
    let request = http::Request::get(format!("{CLASSES}?fieldSelector=metadata.name%3Dhigh"))
        .header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
        .body(bytes::Bytes::new());
    let answer = client.stream(request.expect("a request")).await.expect("an answer");
    let body =
        http_body_util::BodyExt::collect(answer.into_body()).await.expect("a body").to_bytes();
    let table: Value = serde_json::from_slice(&body).expect("JSON");
    let columns: Vec<&str> = table["columnDefinitions"]
        .as_array()
        .expect("columns")
        .iter()
        .filter_map(|one| one["name"].as_str())
        .collect();
    assert_eq!(columns, ["Name", "Value", "Global-Default", "Age", "PreemptionPolicy"]);
    let cells = &table["rows"][0]["cells"];
    assert_eq!(
        (&cells[0], &cells[1], &cells[2], &cells[4]),
        (&json!("high"), &json!(1000), &json!(false), &json!("PreemptLowerPriority"))
    );
}
