//! Objects over HTTPS: create, read, change, delete, and what is refused.

use crate::support::{Cluster, call, config_map, delete, get, merge, post, put, version};
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
const SERVICES: &str = "/api/v1/namespaces/default/services";
const PODS: &str = "/api/v1/namespaces/default/pods";

fn deployment(name: &str) -> Value {
    json!({ "metadata": { "name": name }, "spec": { "selector": { "matchLabels": { "app": name } },
        "template": { "metadata": { "labels": { "app": name } }, "spec": { "containers": [
            { "name": "a", "image": "x:1", "env": [{ "name": "K", "value": "1" }, { "name": "L", "value": "2" }] },
            { "name": "b", "image": "y:1" }] } } } })
}

fn causes(status: &Value) -> Vec<&str> {
    status["details"]["causes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|cause| cause["field"].as_str())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_lives_by_the_rules() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let one = &format!("{MAPS}/a");
    let (code, made) = post(client, MAPS, &config_map("a", &json!({ "k": "1" }))).await;
    assert_eq!((code, &made["kind"]), (201, &json!("ConfigMap")));
    let (code, again) = post(client, MAPS, &config_map("a", &json!({}))).await;
    assert_eq!((code, &again["reason"]), (409, &json!("AlreadyExists")));

    let mut changed = made.clone();
    changed["data"]["k"] = json!("2");
    let (code, second) = put(client, one, &changed).await;
    assert!(code == 200 && version(&second) > version(&made));
    let (code, stale) = put(client, one, &changed).await;
    assert_eq!((code, &stale["reason"]), (409, &json!("Conflict")));
    let (_, same) = merge(client, one, &json!({ "data": { "k": "2" } })).await;
    assert_eq!(version(&same), version(&second), "a change of nothing writes nothing");

    let (code, dry) = delete(client, one, &json!({ "dryRun": ["All"] })).await;
    assert_eq!((code, &dry["status"]), (200, &json!("Success")));
    assert_eq!(get(client, one).await.0, 200, "a dry run deletes nothing");
    let wrong = json!({ "preconditions": { "uid": "another" } });
    assert_eq!(delete(client, one, &wrong).await.0, 409);
    assert_eq!(delete(client, one, &json!({})).await.0, 200);
    let (code, gone) = get(client, one).await;
    assert_eq!((code, &gone["reason"]), (404, &json!("NotFound")));
    assert_eq!(gone["message"], "configmaps \"a\" not found");

    let (_, generated) = post(client, MAPS, &json!({ "metadata": { "generateName": "g-" } })).await;
    assert!(generated["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("g-")));
    let (code, dry) =
        post(client, &format!("{MAPS}?dryRun=All"), &config_map("b", &json!({}))).await;
    assert!(code == 201 && dry["metadata"].get("resourceVersion").is_none());
    assert_eq!(get(client, &format!("{MAPS}/b")).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_once_and_whole() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let bad = json!({ "metadata": { "name": "Bad" }, "spec": { "restartPolicy": "Sometimes", "containers": [
        { "name": "a", "image": "two words" }, { "name": "a", "image": "x" }] } });
    post(
        client,
        "/api/v1/namespaces/default/serviceaccounts",
        &json!({ "metadata": { "name": "default" } }),
    )
    .await;
    let (code, status) = post(client, PODS, &bad).await;
    assert_eq!((code, &status["reason"]), (422, &json!("Invalid")));
    assert_eq!(
        causes(&status),
        [
            "metadata.name",
            "spec.containers[0].image",
            "spec.containers[1].name",
            "spec.restartPolicy"
        ]
    );
    let strict = format!("{MAPS}?fieldValidation=Strict");
    let (code, status) = call(
        client,
        "POST",
        &strict,
        "application/json",
        "{\"metadata\":{\"name\":\"a\",\"name\":\"b\"},\"dat\":{}}",
    )
    .await;
    assert_eq!(code, 400);
    let message = status["message"].as_str().expect("a message");
    assert!(message.contains("unknown field \"dat\""), "{message}");
    assert!(message.contains("duplicate field \"metadata.name\""), "{message}");
    for (content_type, body, expected) in [
        ("application/json", "{", 400),
        ("application/json", "[]", 400),
        ("application/json", "{\"kind\":\"Pod\"}", 400),
        ("application/json", "{\"data\":{\"a\":1}}", 400),
        ("application/yaml", "a: b: c", 400),
        ("application/vnd.kubernetes.protobuf", "rubbish", 400),
        ("text/plain", "x", 415),
    ] {
        let (code, status) = call(client, "POST", MAPS, content_type, body).await;
        assert_eq!((code, &status["kind"]), (expected, &json!("Status")), "{content_type} {body}");
    }
    let (code, status) =
        post(client, "/api/v1/namespaces/nowhere/configmaps", &config_map("a", &json!({}))).await;
    assert_eq!((code, &status["message"]), (404, &json!("namespaces \"nowhere\" not found")));
    for path in ["/api/v1/widgets", "/apis/none/v1/x", "/api/v2/pods", "/nothing"] {
        assert_eq!(get(client, path).await.0, 404, "{path}");
    }
    assert_eq!(put(client, MAPS, &json!({})).await.0, 405);
    let (code, _) = get(client, &format!("{PODS}?fieldSelector=spec.color%3Dred")).await;
    assert_eq!(code, 400);
    let big = json!({ "metadata": { "name": "big" }, "data": { "k": "x".repeat(4 << 20) } });
    assert_eq!(post(client, MAPS, &big).await.0, 413);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_kinds_of_patches_change_one_object() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let (_, made) = post(client, DEPLOYMENTS, &deployment("web")).await;
    assert_eq!(made["spec"]["strategy"]["rollingUpdate"]["maxSurge"], "25%", "defaults are stored");
    assert_eq!(made["metadata"]["generation"], 1);
    let one = &format!("{DEPLOYMENTS}/web");
    let strategic = json!({ "spec": { "template": { "spec": { "containers": [
        { "name": "a", "env": [{ "name": "K", "$patch": "delete" }] }, { "name": "b", "$patch": "delete" }] } } } });
    let (code, patched) =
        call(client, "PATCH", one, "application/strategic-merge-patch+json", strategic.to_string())
            .await;
    assert_eq!(code, 200);
    let containers = patched["spec"]["template"]["spec"]["containers"].as_array().expect("a list");
    assert_eq!(containers.len(), 1);
    assert_eq!(containers[0]["env"], json!([{ "name": "L", "value": "2" }]));
    assert_eq!(patched["metadata"]["generation"], 2);
    let operations = json!([{ "op": "test", "path": "/spec/replicas", "value": 1 },
                            { "op": "replace", "path": "/spec/replicas", "value": 3 }]);
    let kind = "application/json-patch+json";
    let (code, patched) = call(client, "PATCH", one, kind, operations.to_string()).await;
    assert_eq!((code, &patched["spec"]["replicas"]), (200, &json!(3)));
    let (code, status) = call(client, "PATCH", one, kind, operations.to_string()).await;
    assert_eq!(
        (code, &status["reason"]),
        (422, &json!("Invalid")),
        "the test does not hold any more"
    );

    // The status is its own part: neither write reaches the other's.
    let (_, status) = merge(
        client,
        &format!("{one}/status"),
        &json!({ "spec": { "replicas": 9 }, "status": { "replicas": 3 } }),
    )
    .await;
    assert_eq!(
        (&status["spec"]["replicas"], &status["status"]["replicas"]),
        (&json!(3), &json!(3))
    );
    let (_, main) = merge(client, one, &json!({ "status": { "replicas": 8 } })).await;
    assert_eq!(main["status"]["replicas"], 3);

    let (code, scale) =
        merge(client, &format!("{one}/scale"), &json!({ "spec": { "replicas": 0 } })).await;
    assert_eq!(
        (code, &scale["kind"], &scale["spec"]["replicas"]),
        (200, &json!("Scale"), &json!(0))
    );
    assert_eq!(scale["status"]["selector"], "app=web");
    let (_, dry) =
        merge(client, &format!("{one}/scale?dryRun=All"), &json!({ "spec": { "replicas": 7 } }))
            .await;
    assert_eq!(dry["spec"]["replicas"], 7);
    assert_eq!(get(client, one).await.1["spec"]["replicas"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_services_never_share_an_address_or_a_port() {
    let cluster = Cluster::start().await;
    let client = cluster.client();
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..40 {
        let client = client.clone();
        tasks.spawn(async move {
            let service = json!({ "metadata": { "name": format!("s{index}") }, "spec": { "type": "NodePort",
                                  "ports": [{ "port": 80 }] } });
            post(&client, SERVICES, &service).await
        });
    }
    let (mut addresses, mut ports) =
        (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    while let Some(done) = tasks.join_next().await {
        let (code, service) = done.expect("no panic");
        assert_eq!(code, 201, "{service}");
        addresses.insert(service["spec"]["clusterIP"].to_string());
        ports.insert(service["spec"]["ports"][0]["nodePort"].to_string());
    }
    assert_eq!((addresses.len(), ports.len()), (40, 40));
    let taken = get(&client, &format!("{SERVICES}/s0")).await.1["spec"]["clusterIP"].clone();
    let service = json!({ "metadata": { "name": "greedy" }, "spec": { "clusterIP": taken, "ports": [{ "port": 80 }] } });
    let (code, status) = post(&client, SERVICES, &service).await;
    assert_eq!((code, causes(&status)), (422, vec!["spec.clusterIPs"]));
    // A deleted Service gives its address back.
    assert_eq!(delete(&client, &format!("{SERVICES}/s0"), &json!({})).await.0, 200);
    assert_eq!(post(&client, SERVICES, &service).await.0, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_patches_lose_nothing() {
    let cluster = Cluster::start().await;
    let client = cluster.client();
    post(&client, MAPS, &config_map("shared", &json!({}))).await;
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..20 {
        let client = client.clone();
        tasks.spawn(async move {
            let patch = json!({ "data": { format!("k{index}"): "v" } });
            // Five tries of the server are few among twenty writers; a client comes again on a conflict.
            while merge(&client, &format!("{MAPS}/shared"), &patch).await.0 == 409 {}
        });
    }
    tasks.join_all().await;
    let (_, map) = get(&client, &format!("{MAPS}/shared")).await;
    assert_eq!(map["data"].as_object().map(serde_json::Map::len), Some(20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_given_what_it_needs_bound_once_and_ended_in_grace() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let pod = json!({ "metadata": { "name": "p" }, "spec": { "containers": [{ "name": "c", "image": "x" }] } });
    let (code, status) = post(client, PODS, &pod).await;
    assert_eq!(code, 403, "no ServiceAccount yet: {status}");
    post(
        client,
        "/api/v1/namespaces/default/serviceaccounts",
        &json!({ "metadata": { "name": "default" } }),
    )
    .await;
    let (code, made) = post(client, PODS, &pod).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["spec"]["serviceAccountName"], "default");
    assert_eq!(made["spec"]["tolerations"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        (&made["status"]["phase"], &made["status"]["qosClass"]),
        (&json!("Pending"), &json!("BestEffort"))
    );

    let one = format!("{PODS}/p");
    let labels = json!({ "metadata": { "labels": { "a": "b" } } });
    let (code, labelled) = merge(client, &one, &labels).await;
    assert_eq!(code, 200, "{labelled}");
    assert_eq!(labelled["metadata"]["generation"], 1, "the spec is the same");
    let image = json!({ "spec": { "containers": [{ "name": "c", "image": "x:2" }] } });
    let kind = "application/strategic-merge-patch+json";
    let (code, changed) = call(client, "PATCH", &one, kind, image.to_string()).await;
    assert_eq!((code, &changed["spec"]["containers"][0]["image"]), (200, &json!("x:2")));
    let (code, status) =
        merge(client, &one, &json!({ "spec": { "restartPolicy": "Never" } })).await;
    assert_eq!((code, causes(&status)), (422, vec!["spec"]));

    let binding = json!({ "target": { "kind": "Node", "name": "n1" } });
    let bind = format!("{PODS}/p/binding");
    assert_eq!(post(client, &bind, &binding).await.0, 201);
    assert_eq!(post(client, &bind, &binding).await.0, 409);
    let (_, bound) = get(client, &format!("{PODS}?fieldSelector=spec.nodeName%3Dn1")).await;
    assert_eq!(bound["items"].as_array().map(Vec::len), Some(1));

    let token = format!("{}/serviceaccounts/default/token", "/api/v1/namespaces/default");
    let request = json!({ "spec": { "boundObjectRef": { "kind": "Pod", "apiVersion": "v1", "name": "p",
                                                        "uid": made["metadata"]["uid"] } } });
    let (code, answer) = post(client, &token, &request).await;
    assert_eq!(code, 201, "{answer}");
    let text = answer["status"]["token"].as_str().expect("a token");
    let as_pod = cluster.client_with_token(Some(text));
    let reviews = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let (code, who) = post(&as_pod, reviews, &json!({})).await;
    assert_eq!(code, 201, "{who}");
    assert_eq!(who["status"]["userInfo"]["username"], "system:serviceaccount:default:default");
    assert_eq!(get(&as_pod, PODS).await.0, 403);

    let (code, ending) = delete(client, &format!("{PODS}/p"), &json!({})).await;
    assert_eq!((code, &ending["metadata"]["deletionGracePeriodSeconds"]), (200, &json!(30)));
    assert_eq!(get(client, &format!("{PODS}/p")).await.0, 200, "the agent ends it");
    assert_eq!(post(&as_pod, reviews, &json!({})).await.0, 201, "until it is gone");
    delete(client, &format!("{PODS}/p"), &json!({ "gracePeriodSeconds": 0 })).await;
    assert_eq!(get(client, &format!("{PODS}/p")).await.0, 404);
    crate::support::eventually("its token is void", async || {
        post(&as_pod, reviews, &json!({})).await.0 == 401
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_anything_keeps_what_was_stored() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let path = |kind: &str| format!("/api/v1/namespaces/default/{kind}");
    let accounts = path("serviceaccounts");
    post(client, &accounts, &json!({ "metadata": { "name": "default" } })).await;
    let pod = json!({ "metadata": { "name": "x" }, "spec": { "containers": [{ "name": "c", "image": "x" }] } });
    let service = json!({ "metadata": { "name": "x" }, "spec": { "type": "NodePort", "ports": [{ "port": 80 }] } });
    let policy = json!({ "metadata": { "name": "x" }, "spec": { "podSelector": {} } });
    let guard = json!({ "metadata": { "name": "x" }, "spec": { "tier": "Admin", "priority": 0,
        "subject": { "namespaces": {} }, "ingress": [{ "action": "Pass", "from": [{ "namespaces": {} }] }] } });
    let lease = json!({ "metadata": { "name": "x" }, "spec": { "holderIdentity": "a" } });
    let slice = json!({ "metadata": { "name": "x" }, "addressType": "IPv4", "endpoints": [{ "addresses": ["10.0.0.1"] }] });
    let mut replica_set = deployment("x");
    replica_set["spec"]["replicas"] = json!(2);
    for (path, object) in [
        (path("pods"), pod),
        (path("services"), service),
        (path("configmaps"), config_map("x", &json!({ "a": "b" }))),
        (path("secrets"), json!({ "metadata": { "name": "x" }, "stringData": { "a": "b" } })),
        (
            path("endpoints"),
            json!({ "metadata": { "name": "x" }, "subsets": [{ "addresses": [{ "ip": "10.0.0.1" }] }] }),
        ),
        ("/api/v1/nodes".to_owned(), json!({ "metadata": { "name": "x" } })),
        ("/api/v1/namespaces".to_owned(), json!({ "metadata": { "name": "x" } })),
        (DEPLOYMENTS.to_owned(), deployment("x")),
        ("/apis/apps/v1/namespaces/default/replicasets".to_owned(), replica_set),
        ("/apis/networking.k8s.io/v1/namespaces/default/networkpolicies".to_owned(), policy),
        ("/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies".to_owned(), guard),
        ("/apis/coordination.k8s.io/v1/namespaces/default/leases".to_owned(), lease),
        ("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices".to_owned(), slice),
    ] {
        let (code, made) = post(client, &path, &object).await;
        assert_eq!(code, 201, "{path} {made}");
        let one = format!("{path}/x");
        let (code, same) = put(client, &one, &made).await;
        assert_eq!((code, version(&same)), (200, version(&made)), "{path}: the same is no change");
        let (code, noted) =
            merge(client, &one, &json!({ "metadata": { "annotations": { "l": "1" } } })).await;
        assert_eq!(code, 200, "{path} {noted}");
        let mut expected = made.clone();
        expected["metadata"]["annotations"] = json!({ "l": "1" });
        expected["metadata"]["resourceVersion"] = noted["metadata"]["resourceVersion"].clone();
        assert_eq!(noted, expected, "{path}");
        let (code, table) = table(client, &one).await;
        assert_eq!((code, &table["kind"]), (200, &json!("Table")), "{path}");
        assert_eq!(delete(client, &one, &json!({})).await.0, 200, "{path}");
    }
}

async fn table(client: &orch_client::Client, path: &str) -> (u16, Value) {
    let request = http::Request::get(path)
        .header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
        .body(bytes::Bytes::new())
        .expect("a request");
    let response = client.stream(request).await.expect("an answer");
    let code = response.status().as_u16();
    let body = http_body_util::BodyExt::collect(response.into_body()).await.expect("a body");
    (code, serde_json::from_slice(&body.to_bytes()).expect("JSON"))
}

#[tokio::test(flavor = "multi_thread")]
async fn applied_fields_have_owners() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let one = format!("{DEPLOYMENTS}/web");
    let apply = async |manager: &str, force: bool, object: &Value| {
        let path = format!("{one}?fieldManager={manager}&force={force}");
        call(client, "PATCH", &path, "application/apply-patch+yaml", object.to_string()).await
    };
    let mut config = deployment("web");
    config["apiVersion"] = json!("apps/v1");
    config["kind"] = json!("Deployment");
    assert_eq!(apply("one", false, &config).await.0, 201);
    let (code, first) = apply("one", false, &config).await;
    assert_eq!(code, 200);
    let (_, second) = apply("one", false, &config).await;
    assert_eq!(version(&first), version(&second), "the same once more is no change");
    merge(client, &format!("{one}?fieldManager=hand"), &json!({ "spec": { "replicas": 4 } })).await;
    config["spec"]["replicas"] = json!(2);
    let (code, status) = apply("one", false, &config).await;
    assert_eq!((code, causes(&status)), (409, vec![".spec.replicas"]));
    let (code, forced) = apply("one", true, &config).await;
    assert_eq!((code, &forced["spec"]["replicas"]), (200, &json!(2)));
    // A container that is left out goes.
    config["spec"]["template"]["spec"]["containers"].as_array_mut().expect("a list").pop();
    let (_, pruned) = apply("one", false, &config).await;
    assert_eq!(pruned["spec"]["template"]["spec"]["containers"].as_array().map(Vec::len), Some(1));
    assert_eq!(call(client, "PATCH", &one, "application/apply-patch+yaml", "{}").await.0, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn finalizers_and_namespaces_keep_what_is_not_cleaned_up() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let mut kept = config_map("kept", &json!({}));
    kept["metadata"]["finalizers"] = json!(["example.com/keep"]);
    post(client, MAPS, &kept).await;
    let one = &format!("{MAPS}/kept");
    let (_, ending) = delete(client, one, &json!({})).await;
    assert!(ending["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(get(client, one).await.0, 200);
    assert_eq!(merge(client, one, &json!({ "metadata": { "finalizers": null } })).await.0, 200);
    assert_eq!(get(client, one).await.0, 404);

    post(client, "/api/v1/namespaces", &json!({ "metadata": { "name": "shop" } })).await;
    let (_, ending) = delete(client, "/api/v1/namespaces/shop", &json!({})).await;
    assert_eq!(ending["status"]["phase"], "Terminating");
    let (code, status) =
        post(client, "/api/v1/namespaces/shop/configmaps", &config_map("late", &json!({}))).await;
    assert_eq!(
        (code, &status["details"]["causes"][0]["reason"]),
        (403, &json!("NamespaceTerminating"))
    );
    let (code, _) = put(
        client,
        "/api/v1/namespaces/shop/finalize",
        &json!({ "metadata": { "name": "shop" }, "spec": {} }),
    )
    .await;
    assert_eq!(code, 200);
    assert_eq!(get(client, "/api/v1/namespaces/shop").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_takes_containers_for_debugging_and_its_deletion_is_answered_with_it() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let account = json!({ "metadata": { "name": "default" } });
    post(client, "/api/v1/namespaces/default/serviceaccounts", &account).await;
    let pod = json!({ "metadata": { "name": "p" }, "spec": { "containers": [{ "name": "a", "image": "x:1" }] } });
    let (code, made) = post(client, PODS, &pod).await;
    assert_eq!((code, &made["spec"]["priority"]), (201, &json!(0)));
    let path = format!("{PODS}/p/ephemeralcontainers");
    let patch = json!({ "spec": { "ephemeralContainers": [
        { "name": "debug", "image": "busybox:1", "targetContainerName": "a" }] } });
    let strategic = "application/strategic-merge-patch+json";
    let (code, changed) = call(client, "PATCH", &path, strategic, patch.to_string()).await;
    assert_eq!((code, &changed["metadata"]["generation"]), (200, &json!(2)));
    let debug = &changed["spec"]["ephemeralContainers"][0];
    assert_eq!(
        (&debug["name"], &debug["imagePullPolicy"]),
        (&json!("debug"), &json!("IfNotPresent"))
    );
    assert_eq!(get(client, &path).await.1["spec"]["ephemeralContainers"][0]["name"], "debug");
    let mut less = changed.clone();
    less["spec"]["ephemeralContainers"] = json!([]);
    assert_eq!(put(client, &path, &less).await.0, 422, "they stay");
    let (code, gone) = delete(client, &format!("{PODS}/p"), &json!({})).await;
    assert_eq!((code, &gone["kind"], &gone["metadata"]["name"]), (200, &json!("Pod"), &json!("p")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_issuer_of_tokens_and_single_checks_are_published() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let (_, issuer) = get(client, "/.well-known/openid-configuration").await;
    assert_eq!(issuer["issuer"], "https://kubernetes.default.svc.cluster.local");
    assert!(issuer["jwks_uri"].as_str().is_some_and(|uri| uri.ends_with("/openid/v1/jwks")));
    assert_eq!(get(client, "/openid/v1/jwks").await.1["keys"][0]["kty"], "EC");
    assert_eq!(client.get_text("/livez/ping").await.expect("an answer"), "ok");
    assert_eq!(client.get_text("/readyz/etcd").await.expect("an answer"), "ok");
    assert_eq!(get(client, "/readyz/nonsense").await.0, 404);

    // A token for somebody else opens nothing here, and is one for whoever it names.
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    post(client, accounts, &json!({ "metadata": { "name": "bot" } })).await;
    let request = json!({ "spec": { "audiences": ["vault"], "expirationSeconds": 600 } });
    let (_, made) = post(client, &format!("{accounts}/bot/token"), &request).await;
    let review = async |audiences: Value| {
        let spec = json!({ "spec": { "token": made["status"]["token"], "audiences": audiences } });
        let path = "/apis/authentication.k8s.io/v1/tokenreviews";
        post(client, path, &spec).await.1["status"]["authenticated"].clone()
    };
    // Tokens are looked up in the cache, which follows.
    crate::support::eventually("it is vault's", async || review(json!(["vault"])).await == true)
        .await;
    // As upstream, the answer leaves a `false` out.
    assert_ne!(review(json!([])).await, true, "it is not the API server's");
}
