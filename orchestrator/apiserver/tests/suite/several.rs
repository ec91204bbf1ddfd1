//! Several servers on one etcd: what they give out, whom they name, and where a client goes on.

use std::collections::BTreeSet;

use crate::support::{Cluster, eventually, get, merge, post};
use orch_client::Client;
use serde_json::{Value, json};

const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices\
    ?labelSelector=kubernetes.io%2Fservice-name%3Dkubernetes";
const ENDPOINTS: &str = "/api/v1/namespaces/default/endpoints/kubernetes";
/// Services made in the test: the half of what its small ranges hold.
const COUNT: usize = 50;

fn narrow(options: &mut orch_apiserver::Options) {
    options.service_cidr = "10.96.0.0/25".parse().expect("a network");
    options.node_port_range = 30000..=30099;
}

async fn make(client: &Client, prefix: &str, count: usize) -> Vec<Value> {
    let making = (0..count).map(|number| {
        let service = json!({ "metadata": { "name": format!("{prefix}-{number}") },
                              "spec": { "type": "NodePort", "ports": [{ "port": 80 }] } });
        async move {
            let (code, made) = post(client, SERVICES, &service).await;
            assert_eq!(code, 201, "{made}");
            made
        }
    });
    futures::future::join_all(making).await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_two_servers_give_out_the_same_address_or_port() {
    let cluster = Cluster::start().await;
    let (b, c) = (cluster.peer(2, narrow).await, cluster.peer(3, narrow).await);
    let (first, second) =
        tokio::join!(make(&b.client, "b", COUNT / 2), make(&c.client, "c", COUNT / 2));
    let made: Vec<Value> = first.into_iter().chain(second).collect();
    let addresses: BTreeSet<_> =
        made.iter().filter_map(|service| service["spec"]["clusterIP"].as_str()).collect();
    let ports: BTreeSet<_> = made
        .iter()
        .filter_map(|service| service["spec"]["ports"][0]["nodePort"].as_u64())
        .collect();
    assert_eq!((addresses.len(), ports.len()), (COUNT, COUNT));

    // Of two that want one named address, one gets it: whichever servers they ask, whether new or changed.
    for round in 0..20 {
        let address = format!("10.96.0.{}", 4 + round % 4);
        let named = |name: &str| {
            json!({ "metadata": { "name": format!("{name}-{round}") },
                                         "spec": { "clusterIP": address, "ports": [{ "port": 80 }] } })
        };
        let (one, two) = (named("one"), named("two"));
        let ((one, _), (two, said)) =
            tokio::join!(post(&b.client, SERVICES, &one), post(&c.client, SERVICES, &two));
        assert!(matches!((one, two), (201, 422) | (422, 201)) || round >= 4, "{one} {two} {said}");
        if round >= 4 {
            assert_eq!((one, two), (422, 422), "taken before");
        }
    }
    let port = |number: u64| json!({ "spec": { "ports": [{ "port": 80, "nodePort": number }] } });
    let free = (30000..=30099).filter(|port| !ports.contains(port)).take(10);
    for (round, free) in free.enumerate() {
        let (one, two) = (format!("{SERVICES}/b-{round}"), format!("{SERVICES}/c-{round}"));
        let change = port(free);
        let ((one, _), (two, _)) =
            tokio::join!(merge(&b.client, &one, &change), merge(&c.client, &two, &change));
        assert!(matches!((one, two), (200, 422) | (422, 200)), "{one} {two}");
    }
    b.stop().await;
    c.stop().await;
}

/// The servers that the slices and the Endpoints of `default/kubernetes` name.
async fn named(client: &Client) -> (BTreeSet<String>, BTreeSet<String>) {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (_, slices) = get(client, SLICES).await;
    let (_, endpoints) = get(client, ENDPOINTS).await;
    (
        list(&slices["items"])
            .iter()
            .flat_map(|slice| list(&slice["endpoints"]))
            .map(|endpoint| text(&endpoint["addresses"][0]))
            .collect(),
        list(&endpoints["subsets"])
            .iter()
            .flat_map(|subset| list(&subset["addresses"]))
            .map(|address| text(&address["ip"]))
            .collect(),
    )
}

async fn eventually_named(client: &Client, numbers: &[u8]) {
    let wanted: BTreeSet<_> = numbers.iter().map(|number| format!("192.0.2.{number}")).collect();
    eventually(&format!("default/kubernetes names {wanted:?}"), async || {
        named(client).await == (wanted.clone(), wanted.clone())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubernetes_service_names_the_servers_that_live() {
    let mut cluster = Cluster::start().await;
    let client = &cluster.client();
    eventually_named(client, &[1]).await;
    let (b, c) = (cluster.peer(2, |_| {}).await, cluster.peer(3, |_| {}).await);
    eventually_named(client, &[1, 2, 3]).await;
    b.kill().await;
    eventually_named(client, &[1, 3]).await;
    let rest = cluster.client_at(vec![c.url.clone()]);
    cluster.stop_server().await;
    eventually_named(&rest, &[3]).await;
    // Whoever is the last one stays: agents that come back shall find where it was.
    c.stop().await;
    cluster.start_server().await;
    eventually_named(client, &[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_at_another_server() {
    let cluster = Cluster::start().await;
    let (b, c) = (cluster.peer(2, |_| {}).await, cluster.peer(3, |_| {}).await);
    let client = cluster.client_at(vec![b.url.clone(), c.url.clone()]);
    let path = "/api/v1/namespaces/default/configmaps";
    let map = |name: &str| json!({ "metadata": { "name": name } });
    assert_eq!(post(&client, path, &map("a")).await.0, 201);
    b.stop().await;
    // A read goes on by itself; a change at the latest when it is sent again.
    assert_eq!(get(&client, &format!("{path}/a")).await.0, 200);
    assert_eq!(post(&client, path, &map("b")).await.0, 201);
    // Servers that came later are asked too, by all clones.
    let d = cluster.peer(4, |_| {}).await;
    client.clone().set_servers(&[c.url.clone(), d.url.clone()]).expect("URLs");
    c.kill().await;
    assert_eq!(get(&client, &format!("{path}/b")).await.0, 200);
    assert_eq!(post(&client, path, &map("c")).await.0, 201);
    d.stop().await;
}
