//! YAML over the wire, for clients that read and write nothing else.

use http_body_util::BodyExt as _;
use orch_client::Client;
use serde_json::{Value, json};

use crate::support::{Cluster, eventually};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

/// Code, media type and body of an answer to a client that takes YAML only.
async fn ask(client: &Client, method: &str, path: &str, body: &str) -> (u16, String, String) {
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header("accept", "application/yaml")
        .header("content-type", "application/yaml")
        .body(bytes::Bytes::from(body.to_owned()))
        .expect("a request");
    let answer = client.stream(request).await.expect("an answer");
    let code = answer.status().as_u16();
    let media = answer.headers().get("content-type").and_then(|value| value.to_str().ok());
    let media = media.unwrap_or_default().to_owned();
    let body = answer.into_body().collect().await.expect("a body").to_bytes();
    (code, media, String::from_utf8(body.to_vec()).expect("text"))
}

#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_yaml_is_answered_in_yaml() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let map = "metadata:\n  name: a\ndata:\n  switch: \"yes\"\n  number: \"1e3\"\n  lines: |\n    one\n    two: three\n";
    eventually("there is the namespace", async || ask(client, "POST", MAPS, map).await.0 == 201)
        .await;
    let (code, media, text) = ask(client, "GET", &format!("{MAPS}/a"), "").await;
    assert_eq!((code, media.as_str()), (200, "application/yaml"), "{text}");
    // Readers of YAML 1.1 take a bare yes for a truth.
    assert!(text.contains("switch: \"yes\"") || text.contains("switch: 'yes'"), "{text}");
    let found: Value = serde_saphyr::from_str(&text).expect("YAML");
    assert_eq!(found["kind"], "ConfigMap");
    assert_eq!(
        found["data"],
        json!({ "switch": "yes", "number": "1e3", "lines": "one\ntwo: three\n" })
    );

    let (code, media, text) = ask(client, "GET", MAPS, "").await;
    assert_eq!((code, media.as_str()), (200, "application/yaml"));
    let list: Value = serde_saphyr::from_str(&text).expect("YAML");
    assert_eq!(list["items"][0]["data"], found["data"]);
    let (code, media, text) = ask(client, "GET", &format!("{MAPS}/b"), "").await;
    assert_eq!((code, media.as_str()), (404, "application/yaml"));
    assert!(text.contains("reason: NotFound"), "{text}");
    assert_eq!(ask(client, "GET", &format!("{MAPS}?watch=true"), "").await.0, 406);
}
