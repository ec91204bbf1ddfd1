//! Bootstrap tokens: what they open, how often, and how long they are kept.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use orch_pki::{Identity, Request};
use serde_json::{Value, json};

use super::{Cluster, eventually};

const SECRETS: &str = "/api/v1/namespaces/kube-system/secrets";
const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";

fn secret(id: &str) -> String {
    format!("{SECRETS}/bootstrap-token-{id}")
}

impl Cluster {
    /// A token that ends `seconds` from now.
    fn token(&self, id: &str, annotations: Value, seconds: i64) {
        let ends = Timestamp::now() + SignedDuration::from_secs(seconds);
        let ends = ends.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        self.server.put(
            &secret(id),
            json!({ "type": "bootstrap.kubernetes.io/token",
                    "metadata": { "annotations": annotations },
                    "data": { "expiration": ByteString(ends.into_bytes()) } }),
        );
    }

    /// Asks with a token for the certificate of a node, with a key of its own.
    fn ask(&self, request: &str, token: &str, node: &str) {
        let identity = Identity::client(format!("system:node:{node}"), Some("system:nodes"));
        let made = Request::new(&identity).expect("a request");
        self.server.put(
            &format!("{REQUESTS}/{request}"),
            json!({ "spec": {
                "request": ByteString(made.request_pem.into_bytes()),
                "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
                "usages": ["digital signature", "client auth"],
                "username": format!("system:bootstrap:{token}"), "groups": ["system:bootstrappers"],
            } }),
        );
    }

    /// `issued`, or why not.
    async fn answer(&self, request: &str) -> String {
        let path = format!("{REQUESTS}/{request}");
        let answer = || {
            let status = self.server.get(&path)?["status"].clone();
            if status["certificate"].is_string() {
                return Some("issued".to_owned());
            }
            let conditions = status["conditions"].as_array()?.clone();
            let denied = conditions.iter().find(|one| one["type"] == "Denied")?;
            denied["message"].as_str().map(str::to_owned)
        };
        eventually(&format!("{request} is answered"), || answer().is_some()).await;
        answer().expect("an answer")
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_brings_many_hosts_and_takes_over_none() {
    let cluster = Cluster::start().await;
    cluster.token("aaaaaa", json!({}), 3600);
    for node in ["new-1", "new-2"] {
        cluster.ask(node, "aaaaaa", node);
        assert_eq!(cluster.answer(node).await, "issued");
    }
    cluster.ask("grab", "aaaaaa", "n1");
    assert!(cluster.answer("grab").await.contains("node n1 is alive"));

    // Not while it is away, either; but for a token that was made for it.
    cluster.server.put("/api/v1/nodes/old", json!({}));
    cluster.ask("grab-old", "aaaaaa", "old");
    let why = cluster.answer("grab-old").await;
    assert!(why.contains("`orchctl delete node old` frees the name"), "{why}");
    cluster.token("bbbbbb", json!({ "orch.dev/node": "old" }), 3600);
    cluster.ask("other", "bbbbbb", "new-3");
    assert!(cluster.answer("other").await.contains("good for node old only"));
    cluster.ask("back", "bbbbbb", "old");
    assert_eq!(cluster.answer("back").await, "issued");

    cluster.ask("late", "gggggg", "new-4");
    assert!(cluster.answer("late").await.contains("the token has ended"), "it was deleted since");
}

#[tokio::test(start_paused = true)]
async fn a_token_for_one_host_is_used_up_by_the_first() {
    let cluster = Cluster::start().await;
    cluster.token("cccccc", json!({ "orch.dev/single-use": "true" }), 86_400);
    // A refusal does not use it up.
    cluster.ask("grab", "cccccc", "n1");
    assert!(cluster.answer("grab").await.contains("is alive"));
    cluster.ask("first", "cccccc", "new-1");
    assert_eq!(cluster.answer("first").await, "issued");
    let used = cluster.server.get(&secret("cccccc")).expect("kept while the host fetches it");
    let first = cluster.server.get(&format!("{REQUESTS}/first")).expect("the request");
    assert_eq!(used["metadata"]["annotations"]["orch.dev/used-by"], first["metadata"]["uid"]);
    let ends: ByteString =
        serde_json::from_value(used["data"]["expiration"].clone()).expect("data");
    let ends: Timestamp = String::from_utf8(ends.0).expect("text").parse().expect("a time");
    assert!(ends <= Timestamp::now() + SignedDuration::from_secs(60), "{ends}");

    cluster.ask("second", "cccccc", "new-2");
    assert!(cluster.answer("second").await.contains("one has joined with it"));
}

#[tokio::test(start_paused = true)]
async fn tokens_that_have_ended_are_removed_with_what_was_handed_over() {
    let cluster = Cluster::start().await;
    cluster.token("dddddd", json!({}), 3600);
    cluster.token("eeeeee", json!({}), -1);
    cluster.server.put(&secret("ffffff"), json!({ "type": "bootstrap.kubernetes.io/token" }));
    let owner = cluster.server.get(&secret("dddddd")).expect("a token")["metadata"]["uid"].clone();
    let keys = format!("{SECRETS}/orch-certs-dddddd");
    cluster.server.put(
        &keys,
        json!({ "type": "orch.dev/certs", "metadata": { "ownerReferences": [
            { "apiVersion": "v1", "kind": "Secret", "name": "bootstrap-token-dddddd", "uid": owner } ] } }),
    );
    eventually("the one that has ended is gone", || {
        cluster.server.get(&secret("eeeeee")).is_none()
    })
    .await;
    assert!(cluster.server.get(&keys).is_some(), "its token is good still");
    cluster.token("dddddd", json!({}), -1);
    eventually("the next one is gone", || cluster.server.get(&secret("dddddd")).is_none()).await;
    eventually("and what it opened", || cluster.server.get(&keys).is_none()).await;
    assert!(cluster.server.get(&secret("ffffff")).is_some(), "one without end stays");
}
