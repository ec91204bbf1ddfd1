//! etcd dies, hangs and comes back under a running server.

use std::time::Duration;

use crate::support::{Cluster, Watch, config_map, eventually, get, post};
use serde_json::json;
use tokio::time::{Instant, timeout};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
/// A request may take this long before it has to say that etcd does not answer.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_etcd_costs_no_change_and_no_watch() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    let mut watch = Watch::open(client, &format!("{MAPS}?watch=1")).await;
    post(client, MAPS, &config_map("before", &json!({}))).await;
    assert_eq!(watch.event().await.1, "before");
    cluster.kill_etcd();
    eventually("writes work again", async || {
        let (code, _) = post(client, MAPS, &config_map("after", &json!({}))).await;
        // 409: the write of a request that was answered with an error did happen.
        code == 201 || code == 409
    })
    .await;
    assert_eq!(watch.event().await.1, "after", "the watch goes on");
    let (code, list) = get(client, MAPS).await;
    assert_eq!((code, list["items"].as_array().map(Vec::len)), (200, Some(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_etcd_requests_fail_with_a_clear_word_and_nothing_hangs() {
    let mut cluster = Cluster::start().await;
    let client = &cluster.client();
    post(client, MAPS, &config_map("a", &json!({}))).await;
    let mut watch = Watch::open(client, &format!("{MAPS}?watch=1")).await;
    assert_eq!(watch.event().await.1, "a");
    cluster.stop_etcd().await;
    for (method, path) in [("GET", MAPS), ("GET", &*format!("{MAPS}/a")), ("POST", MAPS)] {
        let body = config_map("b", &json!({})).to_string();
        let started = Instant::now();
        let (code, status) =
            timeout(PATIENCE, crate::support::call(client, method, path, "application/json", body))
                .await
                .expect("an answer in time");
        assert_eq!(
            (code, &status["reason"]),
            (503, &json!("ServiceUnavailable")),
            "{method} {path}"
        );
        let message = status["message"].as_str().expect("a message");
        assert!(message.contains("etcd"), "{message} after {:?}", started.elapsed());
    }
    // What may be old is served on.
    assert_eq!(get(client, &format!("{MAPS}?resourceVersion=0")).await.0, 200);
    assert!(client.get_text("/readyz").await.is_err(), "not ready");
    assert_eq!(client.get_text("/livez").await.expect("alive"), "ok");
    // Nothing would come on a watch: the client may find a server that is better off.
    assert_eq!(watch.next().await, None, "the watch ends");
    let (code, status) = get(client, &format!("{MAPS}?watch=1")).await;
    assert_eq!((code, &status["reason"]), (503, &json!("ServiceUnavailable")));
    let (code, status) = post(client, MAPS, &config_map("c", &json!({}))).await;
    assert_eq!((code, &status["message"]), (503, &json!("etcd does not answer; nothing was done")));
    cluster.start_etcd().await;
    let client = &cluster.client();
    eventually("it works again", async || get(client, MAPS).await.0 == 200).await;
    eventually("watches work again", async || {
        let (_, list) = get(client, MAPS).await;
        let from = &list["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        let path = format!("{MAPS}?watch=1&timeoutSeconds=1&resourceVersion={from}");
        get(client, &path).await.0 == 200
    })
    .await;
    eventually("ready again", async || client.get_text("/readyz").await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_hangs_is_said_to_hang() {
    let cluster = Cluster::start().await;
    let client = &cluster.client();
    cluster.freeze_etcd();
    let frozen = timeout(PATIENCE, post(client, MAPS, &config_map("a", &json!({})))).await;
    cluster.thaw_etcd();
    let (code, status) = frozen.expect("an answer in time");
    assert_eq!(code, 503, "{status}");
    eventually("it works again", async || {
        matches!(post(client, MAPS, &config_map("b", &json!({}))).await.0, 201 | 409)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_starts_before_its_etcd_waits_for_it() {
    let mut cluster = Cluster::start().await;
    post(&cluster.client(), MAPS, &config_map("a", &json!({}))).await;
    cluster.stop_server().await;
    cluster.stop_etcd().await;
    cluster.start_server().await;
    let client = &cluster.client();
    assert!(client.get_text("/readyz").await.is_err(), "not ready");
    let answer = timeout(PATIENCE, get(client, MAPS)).await.expect("an answer in time");
    assert_eq!(answer.0, 503, "{}", answer.1);
    cluster.start_etcd().await;
    cluster.wait_ready().await;
    assert_eq!(get(&cluster.client(), &format!("{MAPS}/a")).await.0, 200);
}
