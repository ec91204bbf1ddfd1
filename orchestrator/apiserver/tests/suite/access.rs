//! Who may do what, seen from outside: roles, nodes, reviews, acting as others.

use http_body_util::BodyExt as _;
use orch_client::{Client, ClientConfig};
use orch_pki::Identity;
use serde_json::{Value, json};

use crate::support::{Cluster, call, delete, eventually, get, merge, post, put};

const SHOP: &str = "/api/v1/namespaces/shop";
const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
const RBAC_SHOP: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces/shop";
const GROUP: &str = "rbac.authorization.k8s.io";

/// A client with a certificate of its own.
fn user(cluster: &Cluster, name: &str, group: Option<&str>) -> Client {
    let (certificate, key) =
        cluster.pki.ca().issue(&Identity::client(name, group)).expect("a certificate");
    Client::https(&ClientConfig {
        servers: vec![cluster.url()],
        ca_pem: Some(cluster.pki.read("ca.crt").expect("ca.crt")),
        cert_pem: Some(certificate),
        key_pem: Some(key),
        token: None,
    })
    .expect("a client")
}

fn message(status: &Value) -> &str {
    status["message"].as_str().unwrap_or_default()
}

fn role(name: &str, verbs: &[&str], resources: &[&str]) -> Value {
    json!({ "metadata": { "name": name }, "rules": [{ "verbs": verbs, "apiGroups": [""], "resources": resources }] })
}

fn binding(name: &str, kind: &str, role: &str, subject: Value) -> Value {
    json!({ "metadata": { "name": name }, "roleRef": { "apiGroup": GROUP, "kind": kind, "name": role },
            "subjects": [subject] })
}

fn named(kind: &str, name: &str) -> Value {
    json!({ "apiGroup": GROUP, "kind": kind, "name": name })
}

async fn made(client: &Client, path: &str, object: &Value) -> Value {
    let (code, made) = post(client, path, object).await;
    assert_eq!(code, 201, "{path}: {made}");
    made
}

async fn shop(admin: &Client) {
    made(admin, "/api/v1/namespaces", &json!({ "metadata": { "name": "shop" } })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_may_what_roles_give_and_gives_no_more() {
    let cluster = Cluster::start().await;
    let admin = &cluster.client();
    shop(admin).await;
    let jane = &user(&cluster, "jane", Some("dev"));
    let pods = &format!("{SHOP}/pods");
    let (code, status) = get(jane, pods).await;
    assert_eq!(code, 403);
    assert_eq!(
        message(&status),
        r#"pods is forbidden: User "jane" cannot list resource "pods" in API group "" in the namespace "shop""#
    );
    assert_eq!(
        (&status["reason"], &status["details"]["kind"]),
        (&json!("Forbidden"), &json!("pods"))
    );
    assert_eq!(get(jane, "/version").await.0, 200);
    let (code, status) = get(jane, "/metrics").await;
    assert_eq!(
        (code, message(&status)),
        (403, r#"forbidden: User "jane" cannot get path "/metrics""#)
    );

    made(
        admin,
        &format!("{RBAC_SHOP}/roles"),
        &role("reader", &["get", "list"], &["pods", "pods/log"]),
    )
    .await;
    let to_jane = binding("readers", "Role", "reader", named("User", "jane"));
    let bound = made(admin, &format!("{RBAC_SHOP}/rolebindings"), &to_jane).await;
    eventually("the binding counts", async || get(jane, pods).await.0 == 200).await;
    assert_eq!(get(jane, "/api/v1/namespaces/default/pods").await.0, 403);
    assert_eq!(get(jane, "/api/v1/pods").await.0, 403);
    assert_eq!(delete(jane, &format!("{pods}/x"), &json!({})).await.0, 403);

    // To apply what is not there is to create it.
    made(
        admin,
        &format!("{RBAC_SHOP}/roles"),
        &role("patcher", &["get", "patch"], &["configmaps"]),
    )
    .await;
    let patcher = binding("patchers", "Role", "patcher", named("User", "jane"));
    made(admin, &format!("{RBAC_SHOP}/rolebindings"), &patcher).await;
    let map = &format!("{SHOP}/configmaps/a?fieldManager=jane");
    let config = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"}}"#;
    let apply =
        async |who: &Client| call(who, "PATCH", map, "application/apply-patch+yaml", config).await;
    eventually("the refusal is about creating", async || {
        message(&apply(jane).await.1).contains("cannot create resource")
    })
    .await;
    assert_eq!(apply(admin).await.0, 201);
    assert_eq!(apply(jane).await.0, 200);

    // A binding keeps its role.
    let mut other = bound.clone();
    other["roleRef"]["name"] = json!("boss");
    let (code, status) = put(admin, &format!("{RBAC_SHOP}/rolebindings/readers"), &other).await;
    assert_eq!(code, 422);
    assert!(message(&status).ends_with("cannot change roleRef"), "{status}");

    // An administrator of the namespace gives what is hers, and not more.
    let to_dev = binding("admins", "ClusterRole", "admin", named("Group", "dev"));
    made(admin, &format!("{RBAC_SHOP}/rolebindings"), &to_dev).await;
    let roles = &format!("{RBAC_SHOP}/roles");
    let own = role("own", &["get", "delete"], &["pods", "secrets"]);
    eventually("the aggregated role counts", async || post(jane, roles, &own).await.0 == 201).await;
    let (code, status) =
        post(jane, roles, &role("more", &["get", "escalate"], &["nodes", "pods"])).await;
    assert_eq!(code, 403);
    assert_eq!(
        message(&status),
        "roles.rbac.authorization.k8s.io \"more\" is forbidden: user \"jane\" (groups=[\"dev\" \"system:authenticated\"]) is attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"nodes\"], Verbs:[\"get\" \"escalate\"]}\n{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"escalate\"]}"
    );
    let wider = json!({ "rules": [{ "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"] }] });
    assert_eq!(merge(jane, &format!("{roles}/own"), &wider).await.0, 403);
    assert_eq!(
        merge(jane, &format!("{roles}/own"), &json!({ "metadata": { "labels": { "a": "b" } } }))
            .await
            .0,
        200
    );
    let bindings = &format!("{RBAC_SHOP}/rolebindings");
    let grab = binding("grab", "ClusterRole", "cluster-admin", named("User", "jane"));
    assert_eq!(post(jane, bindings, &grab).await.0, 403);
    assert_eq!(
        post(jane, bindings, &binding("lost", "Role", "none", named("User", "jane"))).await.0,
        404
    );
    assert_eq!(
        post(jane, bindings, &binding("fine", "ClusterRole", "view", named("User", "joe"))).await.0,
        201
    );
    assert_eq!(
        post(jane, &format!("{RBAC}/clusterroles"), &role("c", &["get"], &["pods"])).await.0,
        403
    );

    // Whoever has the word `bind` for a role may give it.
    let binder = json!({ "metadata": { "name": "binder" }, "rules": [
        { "verbs": ["bind"], "apiGroups": [GROUP], "resources": ["clusterroles"], "resourceNames": ["cluster-admin"] },
    ] });
    made(admin, roles, &binder).await;
    made(admin, bindings, &binding("binders", "Role", "binder", named("User", "jane"))).await;
    eventually("the word counts", async || post(jane, bindings, &grab).await.0 == 201).await;

    delete(admin, &format!("{bindings}/grab"), &json!({})).await;
    for gone in ["admins", "binders", "readers"] {
        assert_eq!(delete(admin, &format!("{bindings}/{gone}"), &json!({})).await.0, 200);
    }
    eventually("what was taken away is gone", async || get(jane, pods).await.0 == 403).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn default_roles_are_there_and_come_back() {
    let mut cluster = Cluster::start().await;
    let admin = cluster.client();
    let (_, list) = get(&admin, &format!("{RBAC}/clusterroles")).await;
    let names: Vec<&str> = list["items"]
        .as_array()
        .expect("items")
        .iter()
        .filter_map(|role| role["metadata"]["name"].as_str())
        .collect();
    for name in [
        "admin",
        "cluster-admin",
        "edit",
        "system:basic-user",
        "system:discovery",
        "system:node",
        "view",
    ] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    let view = format!("{RBAC}/clusterroles/view");
    eventually("the parts of `view` are in it", async || {
        get(&admin, &view).await.1["rules"].to_string().contains("deployments/scale")
    })
    .await;
    let part = json!({ "metadata": { "name": "more", "labels": { "rbac.authorization.k8s.io/aggregate-to-view": "true" } },
        "rules": [{ "verbs": ["get"], "apiGroups": ["example.com"], "resources": ["things"] }] });
    made(&admin, &format!("{RBAC}/clusterroles"), &part).await;
    for (role, expected) in
        [("view", true), ("edit", true), ("admin", true), ("system:node", false)]
    {
        let path = format!("{RBAC}/clusterroles/{role}");
        eventually(&format!("{role} has the new part: {expected}"), async || {
            get(&admin, &path).await.1["rules"].to_string().contains("things") == expected
        })
        .await;
    }

    // What is taken away comes back at the next start, unless its owner says that it is his.
    let scheduler = format!("{RBAC}/clusterroles/system:kube-scheduler");
    let node = format!("{RBAC}/clusterroles/system:node");
    let none =
        json!({ "rules": [{ "verbs": ["get"], "apiGroups": ["mine"], "resources": ["x"] }] });
    assert_eq!(merge(&admin, &scheduler, &none).await.0, 200);
    let mut own = none.clone();
    own["metadata"] =
        json!({ "annotations": { "rbac.authorization.kubernetes.io/autoupdate": "false" } });
    assert_eq!(merge(&admin, &node, &own).await.0, 200);
    assert_eq!(
        delete(&admin, &format!("{RBAC}/clusterrolebindings/system:discovery"), &json!({})).await.0,
        200
    );
    cluster.stop_server().await;
    cluster.start_server().await;
    cluster.wait_ready().await;
    let rules = get(&admin, &scheduler).await.1["rules"].to_string();
    assert!(rules.contains("pods/binding") && rules.contains("mine"), "{rules}");
    let rules = get(&admin, &node).await.1["rules"].to_string();
    assert!(!rules.contains("pods/eviction"), "{rules}");
    assert_eq!(get(&admin, &format!("{RBAC}/clusterrolebindings/system:discovery")).await.0, 200);
}

/// Whether a review says yes, and why.
async fn may(client: &Client, path: &str, spec: Value) -> (bool, String) {
    let (code, review) = post(client, path, &json!({ "spec": spec })).await;
    assert_eq!(code, 201, "{review}");
    let reason = review["status"]["reason"].as_str().unwrap_or_default().to_owned();
    (review["status"]["allowed"] == true, reason)
}

#[tokio::test(flavor = "multi_thread")]
async fn reviews_tell_what_the_server_would_do() {
    let cluster = Cluster::start().await;
    let admin = &cluster.client();
    shop(admin).await;
    made(admin, &format!("{RBAC_SHOP}/roles"), &role("reader", &["get", "list"], &["pods"])).await;
    made(
        admin,
        &format!("{RBAC_SHOP}/rolebindings"),
        &binding("readers", "Role", "reader", named("Group", "dev")),
    )
    .await;
    let jane = &user(&cluster, "jane", Some("dev"));
    eventually("the binding counts", async || get(jane, &format!("{SHOP}/pods")).await.0 == 200)
        .await;

    let authorization = "/apis/authorization.k8s.io/v1";
    let own = &format!("{authorization}/selfsubjectaccessreviews");
    let pods = |verb: &str, namespace: &str| json!({ "resourceAttributes": { "verb": verb, "resource": "pods", "namespace": namespace } });
    let (yes, why) = may(jane, own, pods("list", "shop")).await;
    assert!(yes);
    assert_eq!(
        why,
        r#"RBAC: allowed by RoleBinding "readers/shop" of Role "reader" to Group "dev""#
    );
    assert!(!may(jane, own, pods("list", "default")).await.0);
    assert!(!may(jane, own, pods("*", "shop")).await.0);
    assert!(
        may(jane, own, json!({ "nonResourceAttributes": { "verb": "get", "path": "/version" } }))
            .await
            .0
    );
    assert!(
        may(
            admin,
            own,
            json!({ "resourceAttributes": { "verb": "*", "group": "*", "resource": "*" } })
        )
        .await
        .0
    );
    let (code, status) = post(jane, own, &json!({ "spec": {} })).await;
    assert_eq!((code, &status["reason"]), (422, &json!("Invalid")));

    // About others only for those who may ask.
    let others = &format!("{authorization}/subjectaccessreviews");
    let mut about_dev = pods("list", "shop");
    about_dev["groups"] = json!(["dev"]);
    assert_eq!(post(jane, others, &json!({ "spec": about_dev })).await.0, 403);
    assert!(may(admin, others, about_dev.clone()).await.0);
    let local = format!("{authorization}/namespaces/shop/localsubjectaccessreviews");
    assert!(may(admin, &local, about_dev.clone()).await.0);
    about_dev["resourceAttributes"]["namespace"] = json!("default");
    assert_eq!(post(admin, &local, &json!({ "spec": about_dev })).await.0, 422);

    let all = format!("{authorization}/selfsubjectrulesreviews");
    let (code, review) = post(jane, &all, &json!({ "spec": { "namespace": "shop" } })).await;
    assert_eq!((code, &review["status"]["incomplete"]), (201, &json!(false)));
    let reader = json!({ "verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"] });
    let rules = review["status"]["resourceRules"].as_array().expect("rules");
    assert!(rules.contains(&reader), "{review}");
    let (_, review) = post(jane, &all, &json!({ "spec": { "namespace": "default" } })).await;
    assert!(!review["status"]["resourceRules"].as_array().expect("rules").contains(&reader));

    let who = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let (_, review) = post(jane, who, &json!({})).await;
    assert_eq!(
        review["status"]["userInfo"],
        json!({ "username": "jane", "groups": ["dev", "system:authenticated"] })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_has_its_roles_and_its_token_its_audience() {
    let cluster = Cluster::start().await;
    let admin = &cluster.client();
    shop(admin).await;
    made(admin, &format!("{SHOP}/serviceaccounts"), &json!({ "metadata": { "name": "till" } }))
        .await;
    let token = async |spec: Value| {
        let path = format!("{SHOP}/serviceaccounts/till/token");
        let answer = made(admin, &path, &json!({ "spec": spec })).await;
        answer["status"]["token"].as_str().expect("a token").to_owned()
    };
    let mine = token(json!({})).await;
    let till = &cluster.client_with_token(Some(&mine));
    let (code, status) = get(till, &format!("{SHOP}/pods")).await;
    assert_eq!(code, 403);
    assert!(message(&status).contains("system:serviceaccount:shop:till"), "{status}");
    let view =
        binding("view", "ClusterRole", "view", json!({ "kind": "ServiceAccount", "name": "till" }));
    made(admin, &format!("{RBAC_SHOP}/rolebindings"), &view).await;
    eventually("the binding counts", async || get(till, &format!("{SHOP}/pods")).await.0 == 200)
        .await;
    assert_eq!(get(till, &format!("{SHOP}/secrets")).await.0, 403);

    // With what a program needs to check such tokens itself.
    for path in ["/.well-known/openid-configuration", "/openid/v1/jwks"] {
        assert_eq!(get(till, path).await.0, 200, "{path}");
        assert_eq!(get(&cluster.client_with_token(None), path).await.0, 403, "{path}");
    }

    // A token for somebody else opens nothing here, and a review says for whom it is.
    let theirs = token(json!({ "audiences": ["vault"] })).await;
    assert_eq!(get(&cluster.client_with_token(Some(&theirs)), "/version").await.0, 401);
    let review = async |token: &str, audiences: &[&str]| {
        let spec = json!({ "token": token, "audiences": audiences });
        let path = "/apis/authentication.k8s.io/v1/tokenreviews";
        post(admin, path, &json!({ "spec": spec })).await.1["status"].take()
    };
    let status = review(&theirs, &["vault", "x"]).await;
    assert_eq!((&status["authenticated"], &status["audiences"]), (&json!(true), &json!(["vault"])));
    assert_ne!(review(&theirs, &[]).await["authenticated"], true);
    assert_eq!(review(&mine, &[]).await["user"]["username"], "system:serviceaccount:shop:till");
    assert_ne!(review("a.b.c", &[]).await["authenticated"], true);
    let path = format!("{SHOP}/serviceaccounts/till/token");
    let elsewhere = json!({ "spec": { "boundObjectRef": { "apiVersion": "v1", "kind": "ConfigMap", "name": "s" } } });
    assert_eq!(post(admin, &path, &elsewhere).await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_token_of_what_is_gone_opens_nothing() {
    let cluster = Cluster::start().await;
    let admin = &cluster.client();
    shop(admin).await;
    let accounts = &format!("{SHOP}/serviceaccounts");
    let account = json!({ "metadata": { "name": "till" } });
    made(admin, accounts, &account).await;
    let pod = json!({ "metadata": { "name": "p" }, "spec": { "serviceAccountName": "till",
                      "automountServiceAccountToken": false, "containers": [{ "name": "c", "image": "x" }] } });
    let objects = [
        ("Pod", format!("{SHOP}/pods"), pod),
        ("Secret", format!("{SHOP}/secrets"), json!({ "metadata": { "name": "p" } })),
        ("Node", "/api/v1/nodes".to_owned(), json!({ "metadata": { "name": "p" } })),
    ];
    let token = async |spec: Value| {
        let answer = made(admin, &format!("{accounts}/till/token"), &json!({ "spec": spec })).await;
        answer["status"]["token"].as_str().expect("a token").to_owned()
    };
    // 201 as long as the server knows who asks.
    let code = async |token: &str| {
        let reviews = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
        post(&cluster.client_with_token(Some(token)), reviews, &json!({})).await.0
    };
    let now = json!({ "gracePeriodSeconds": 0 });
    for (kind, path, object) in &objects {
        let first = made(admin, path, object).await;
        let reference = json!({ "apiVersion": "v1", "kind": kind, "name": "p", "uid": first["metadata"]["uid"] });
        let bound = token(json!({ "boundObjectRef": reference })).await;
        eventually(&format!("a token for {kind} counts"), async || code(&bound).await == 201).await;
        assert_eq!(delete(admin, &format!("{path}/p"), &now).await.0, 200);
        let second = made(admin, path, object).await;
        assert_ne!(first["metadata"]["uid"], second["metadata"]["uid"]);
        eventually(&format!("it does not for another {kind}"), async || code(&bound).await == 401)
            .await;
        let again = json!({ "spec": { "boundObjectRef": reference } });
        assert_eq!(post(admin, &format!("{accounts}/till/token"), &again).await.0, 409, "{kind}");
        assert_eq!(delete(admin, &format!("{path}/p"), &now).await.0, 200);
    }
    let unbound = token(json!({})).await;
    eventually("a token for the account counts", async || code(&unbound).await == 201).await;
    assert_eq!(delete(admin, &format!("{accounts}/till"), &json!({})).await.0, 200);
    made(admin, accounts, &account).await;
    eventually("it does not for another account", async || code(&unbound).await == 401).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bootstrap_token_is_worth_nothing_once_it_is_deleted_or_has_ended() {
    let cluster = Cluster::start().await;
    let admin = &cluster.client();
    let secrets = "/api/v1/namespaces/kube-system/secrets";
    let token = |id: &str, ends: &str| {
        json!({ "metadata": { "name": format!("bootstrap-token-{id}") }, "type": "bootstrap.kubernetes.io/token",
                "stringData": { "token-id": id, "token-secret": "0123456789abcdef", "expiration": ends,
                                "usage-bootstrap-authentication": "true" } })
    };
    eventually("there is the namespace", async || {
        post(admin, secrets, &token("aaaaaa", "2100-01-01T00:00:00Z")).await.0 == 201
    })
    .await;
    made(admin, secrets, &token("bbbbbb", "2026-01-01T00:00:00Z")).await;
    let as_host = |id: &str| cluster.client_with_token(Some(&format!("{id}.0123456789abcdef")));
    let requests = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    eventually("the token counts", async || get(&as_host("aaaaaa"), requests).await.0 == 200).await;
    assert_eq!(get(&as_host("bbbbbb"), requests).await.0, 401, "it has ended");
    // No more than to ask: not even for what another token was given.
    for path in
        [format!("{secrets}/orch-certs-bbbbbb"), format!("{secrets}/bootstrap-token-aaaaaa")]
    {
        assert_eq!(get(&as_host("aaaaaa"), &path).await.0, 403, "{path}");
    }
    assert_eq!(
        delete(admin, &format!("{secrets}/bootstrap-token-aaaaaa"), &json!({})).await.0,
        200
    );
    eventually("it is worth nothing", async || get(&as_host("aaaaaa"), requests).await.0 == 401)
        .await;
}

/// The code and body of a GET with headers.
async fn get_as(client: &Client, path: &str, headers: &[(&str, &str)]) -> (u16, Value) {
    let mut request = http::Request::get(path).header("accept", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = client
        .stream(request.body(bytes::Bytes::new()).expect("a request"))
        .await
        .expect("an answer");
    let code = answer.status().as_u16();
    let body = answer.into_body().collect().await.expect("a body").to_bytes();
    (code, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

#[tokio::test(flavor = "multi_thread")]
async fn acting_as_others_needs_the_word_for_it() {
    let cluster = Cluster::start().await;
    let admin = &cluster.client();
    shop(admin).await;
    let (pods, as_joe) = (&format!("{SHOP}/pods"), [("Impersonate-User", "joe")]);
    let (code, status) = get_as(admin, pods, &as_joe).await;
    assert_eq!(code, 403);
    assert!(message(&status).contains(r#"User "joe" cannot list"#), "{status}");
    let as_boss = [("Impersonate-User", "joe"), ("Impersonate-Group", "system:masters")];
    assert_eq!(get_as(admin, pods, &as_boss).await.0, 200);
    assert_eq!(get_as(admin, pods, &[("Impersonate-Group", "dev")]).await.0, 400);

    let jane = &user(&cluster, "jane", None);
    let (code, status) = get_as(jane, pods, &as_joe).await;
    assert_eq!(code, 403);
    assert_eq!(
        message(&status),
        r#"users "joe" is forbidden: User "jane" cannot impersonate resource "users" in API group "" at the cluster scope"#
    );
    made(admin, &format!("{RBAC}/clusterroles"), &json!({ "metadata": { "name": "actors" }, "rules": [
        { "verbs": ["impersonate"], "apiGroups": [""], "resources": ["users"], "resourceNames": ["joe"] },
    ] }))
    .await;
    let to_jane = binding("actors", "ClusterRole", "actors", named("User", "jane"));
    made(admin, &format!("{RBAC}/clusterrolebindings"), &to_jane).await;
    eventually("she is joe, who may nothing", async || {
        message(&get_as(jane, pods, &as_joe).await.1).contains(r#"User "joe" cannot list"#)
    })
    .await;
    let (code, status) = get_as(jane, pods, &as_boss).await;
    assert_eq!(code, 403);
    assert!(message(&status).contains(r#"cannot impersonate resource "groups""#), "{status}");
    let (code, _) =
        get_as(jane, pods, &[("Impersonate-User", "system:serviceaccount:shop:till")]).await;
    assert_eq!(code, 403, "an account is another right than a user");
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_see_health_and_version_only() {
    let cluster = Cluster::start().await;
    let nobody = &cluster.client_with_token(None);
    for path in ["/healthz", "/livez", "/readyz", "/version"] {
        assert_eq!(get(nobody, path).await.0, 200, "{path}");
    }
    for path in ["/api", "/apis", "/openapi/v3", "/metrics", "/api/v1/nodes"] {
        let (code, status) = get(nobody, path).await;
        assert_eq!(code, 403, "{path}");
        assert!(message(&status).contains(r#"User "system:anonymous" cannot"#), "{status}");
    }
    let public = "/api/v1/namespaces/kube-public/configmaps/cluster-info";
    assert_eq!(get(nobody, public).await.0, 404, "it may be read, and nobody made it");
    assert_eq!(get(nobody, "/api/v1/namespaces/kube-public/configmaps/other").await.0, 403);
    assert_eq!(get(&cluster.client_with_token(Some("a.b.c")), "/version").await.0, 401);
}

/// A certificate of the cluster's own authority that ended long ago.
fn expired(cluster: &Cluster, user: &str, group: &str) -> (String, String) {
    use rcgen::{
        CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, date_time_ymd,
    };
    let (ca, key) = (cluster.pki.read("ca.crt"), cluster.pki.read("ca.key"));
    let ca_key = KeyPair::from_pem(&key.expect("ca.key")).expect("a key");
    let issuer = Issuer::from_ca_cert_pem(&ca.expect("ca.crt"), &ca_key).expect("an authority");
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, user);
    params.distinguished_name.push(DnType::OrganizationName, group);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    let key = KeyPair::generate().expect("a key");
    (params.signed_by(&key, &issuer).expect("a certificate").pem(), key.serialize_pem())
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_and_foreign_certificates_are_refused() {
    let cluster = Cluster::start().await;
    let masters = Identity::client("kubernetes-admin", Some("system:masters"));
    let with = |(certificate, key): (String, String)| {
        Client::https(&ClientConfig {
            servers: vec![cluster.url()],
            ca_pem: Some(cluster.pki.read("ca.crt").expect("ca.crt")),
            cert_pem: Some(certificate),
            key_pem: Some(key),
            token: None,
        })
        .expect("a client")
    };
    let good = with(cluster.pki.ca().issue(&masters).expect("a certificate"));
    assert!(good.get_text("/api/v1/nodes").await.is_ok());
    // An authority of the same name, and etcd's, which is ours and for other things.
    let impostor = orch_pki::Authority::create("orch-ca").expect("an authority");
    for credentials in [
        impostor.issue(&masters).expect("a certificate"),
        cluster.pki.etcd_ca().issue(&masters).expect("a certificate"),
        expired(&cluster, "kubernetes-admin", "system:masters"),
    ] {
        // Not even what strangers may see: the handshake fails.
        let error = with(credentials).get_text("/version").await.expect_err("refused");
        assert!(matches!(error, orch_client::Error::Transport { .. }), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_reads_and_writes_what_is_its_own() {
    let cluster = Cluster::start().await;
    let admin = &cluster.client();
    shop(admin).await;
    let (one, two) = (
        &user(&cluster, "system:node:n1", Some("system:nodes")),
        &user(&cluster, "system:node:n2", Some("system:nodes")),
    );
    let nodes = "/api/v1/nodes";
    let node = |name: &str| json!({ "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } } });
    assert_eq!(post(one, nodes, &node("n2")).await.0, 403);
    made(one, nodes, &node("n1")).await;
    made(two, nodes, &node("n2")).await;

    made(admin, &format!("{SHOP}/serviceaccounts"), &json!({ "metadata": { "name": "default" } }))
        .await;
    for (pod, secret, host) in [("p1", "s1", "n1"), ("p2", "s2", "n2")] {
        made(
            admin,
            &format!("{SHOP}/secrets"),
            &json!({ "metadata": { "name": secret }, "stringData": { "k": "v" } }),
        )
        .await;
        let spec = json!({ "containers": [{ "name": "c", "image": "x" }],
                           "volumes": [{ "name": "v", "secret": { "secretName": secret } }] });
        made(admin, &format!("{SHOP}/pods"), &json!({ "metadata": { "name": pod }, "spec": spec }))
            .await;
        let target = json!({ "target": { "kind": "Node", "name": host } });
        assert_eq!(post(admin, &format!("{SHOP}/pods/{pod}/binding"), &target).await.0, 201);
    }

    // Secrets, by the pods that refer to them. No waiting: a refusal is looked at twice.
    assert_eq!(get(one, &format!("{SHOP}/secrets/s1")).await.0, 200);
    let (code, status) = get(one, &format!("{SHOP}/secrets/s2")).await;
    assert_eq!(code, 403);
    assert_eq!(
        message(&status),
        r#"secrets "s2" is forbidden: User "system:node:n1" cannot get resource "secrets" in API group "" in the namespace "shop": no pod of node "n1" refers to it"#
    );
    for path in
        [format!("{SHOP}/secrets"), "/api/v1/secrets".to_owned(), format!("{SHOP}/configmaps")]
    {
        assert_eq!(get(one, &path).await.0, 403, "{path}");
    }

    // Pods: it says what its own do, and ends them.
    let phase = json!({ "status": { "phase": "Running" } });
    assert_eq!(merge(one, &format!("{SHOP}/pods/p1/status"), &phase).await.0, 200);
    assert_eq!(merge(one, &format!("{SHOP}/pods/p2/status"), &phase).await.0, 403);
    assert_eq!(merge(one, &format!("{SHOP}/pods/gone/status"), &phase).await.0, 404);
    assert_eq!(
        merge(one, &format!("{SHOP}/pods/p1"), &json!({ "metadata": { "labels": { "a": "b" } } }))
            .await
            .0,
        403
    );
    let now = json!({ "gracePeriodSeconds": 0 });
    assert_eq!(delete(one, &format!("{SHOP}/pods/p2"), &now).await.0, 403);
    assert_eq!(delete(one, &format!("{SHOP}/pods/gone"), &now).await.0, 404);
    assert_eq!(get(one, "/api/v1/pods?fieldSelector=spec.nodeName%3Dn1").await.0, 200);

    // Tokens, for its own pods.
    let token = |pod: &Value| {
        json!({ "spec": { "boundObjectRef": { "apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"],
                                              "uid": pod["metadata"]["uid"] } } })
    };
    let tokens = &format!("{SHOP}/serviceaccounts/default/token");
    let (_, p1) = get(admin, &format!("{SHOP}/pods/p1")).await;
    let (_, p2) = get(admin, &format!("{SHOP}/pods/p2")).await;
    assert_eq!(post(one, tokens, &token(&p1)).await.0, 201);
    let (code, status) = post(one, tokens, &token(&p2)).await;
    assert_eq!(code, 403);
    assert!(
        message(&status)
            .ends_with("node requested token bound to a pod scheduled on a different node"),
        "{status}"
    );
    assert_eq!(post(one, tokens, &json!({ "spec": {} })).await.0, 403);

    // Its Node and its Lease.
    let ready = json!({ "status": { "conditions": [{ "type": "Ready", "status": "True" }] } });
    assert_eq!(merge(one, &format!("{nodes}/n1/status"), &ready).await.0, 200);
    assert_eq!(merge(one, &format!("{nodes}/n2/status"), &ready).await.0, 403);
    let (code, status) = merge(
        one,
        &format!("{nodes}/n1"),
        &json!({ "spec": { "taints": [{ "key": "k", "effect": "NoExecute" }] } }),
    )
    .await;
    assert_eq!(
        (code, message(&status)),
        (403, r#"nodes "n1" is forbidden: node "n1" is not allowed to modify taints"#)
    );
    let role = json!({ "metadata": { "labels": { "node-role.kubernetes.io/control-plane": "" } } });
    assert_eq!(merge(one, &format!("{nodes}/n1"), &role).await.0, 403);
    assert_eq!(merge(one, &format!("{nodes}/n1/status"), &role).await.0, 403);
    assert_eq!(
        merge(one, &format!("{nodes}/n1"), &json!({ "metadata": { "labels": { "disk": "ssd" } } }))
            .await
            .0,
        200
    );
    assert_eq!(delete(one, &format!("{nodes}/n1"), &json!({})).await.0, 403);
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    let lease =
        |name: &str| json!({ "metadata": { "name": name }, "spec": { "holderIdentity": name } });
    assert_eq!(post(one, leases, &lease("n2")).await.0, 403);
    made(two, leases, &lease("n2")).await;
    assert_eq!(merge(one, &format!("{leases}/n2"), &lease("n1")).await.0, 403);
    assert_eq!(
        post(one, "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases", &lease("n1"))
            .await
            .0,
        403
    );

    // Where the cluster's servers are: nobody has made it here.
    assert_eq!(get(one, "/api/v1/namespaces/kube-system/configmaps/orch-cluster").await.0, 404);
    assert_eq!(get(one, "/api/v1/namespaces/kube-system/configmaps/other").await.0, 403);

    // What the pod network needs of all.
    for path in [
        "/api/v1/services",
        "/api/v1/namespaces",
        "/apis/discovery.k8s.io/v1/endpointslices",
        "/apis/networking.k8s.io/v1/networkpolicies",
        "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
    ] {
        assert_eq!(get(one, path).await.0, 200, "{path}");
    }
    assert_eq!(
        post(one, &format!("{SHOP}/configmaps"), &json!({ "metadata": { "name": "a" } })).await.0,
        403
    );
    // A certificate for another node's name needs more than this node's.
    let stranger = &user(&cluster, "system:node:n1", None);
    assert_eq!(get(stranger, &format!("{nodes}/n1")).await.0, 403, "the group makes the node");
}
