//! Several servers on one etcd: what they give out, whom they name, and where a client goes on.

use std::collections::BTreeSet;

use crate::support::{Cluster, Watch, eventually, get, merge, post};
use orch_client::Client;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

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

/// A way to a server that can stand still as a stopped process does: its kernel accepts and acknowledges, and nothing comes.
async fn way_to(url: &str, still: tokio::sync::watch::Receiver<bool>) -> String {
    let target = url.strip_prefix("https://").expect("a URL").to_owned();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let own = format!("https://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let (target, still) = (target.clone(), still.clone());
            tokio::spawn(async move {
                let far = tokio::net::TcpStream::connect(target).await.expect("the server");
                let ((from_near, to_near), (from_far, to_far)) =
                    (near.into_split(), far.into_split());
                tokio::join!(
                    carry(from_near, to_far, still.clone()),
                    carry(from_far, to_near, still)
                );
            });
        }
    });
    own
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut still: tokio::sync::watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if still.wait_for(|still| !still).await.is_err()
            || to.write_all(&buffer[..length]).await.is_err()
        {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_at_a_server_that_stands_still_ends_and_so_does_a_request() {
    let cluster = Cluster::start().await;
    let (b, c) = (cluster.peer(2, |_| {}).await, cluster.peer(3, |_| {}).await);
    let (stand_still, still) = tokio::sync::watch::channel(false);
    let way = way_to(&b.url, still).await;
    let client = cluster.client_at(vec![way.clone(), c.url.clone()]);
    let alone = cluster.client_at(vec![way]);
    let path = "/api/v1/namespaces/default/configmaps";
    let mut watch = Watch::open(&client, &format!("{path}?watch=true")).await;
    let mut waits = Watch::open(&alone, &format!("{path}?watch=true")).await;
    let map = |name: &str| json!({ "metadata": { "name": name } });
    assert_eq!(post(&c.client, path, &map("a")).await.0, 201);
    assert_eq!(watch.event().await.1, "a");
    assert_eq!(waits.event().await.1, "a");

    stand_still.send_replace(true);
    assert_eq!(post(&c.client, path, &map("b")).await.0, 201);
    // A read that was sent there goes on elsewhere, as the watch does when it is opened again.
    let begun = std::time::Instant::now();
    let b_map = format!("{path}/b");
    let (ended, read) = tokio::join!(watch.next(), get(&client, &b_map));
    assert_eq!((ended, read.0), (None, 200));
    let mut watch = Watch::open(&client, &format!("{path}?watch=true")).await;
    assert_eq!((watch.event().await.1, watch.event().await.1), ("a".to_owned(), "b".to_owned()));
    let took = begun.elapsed();
    assert!(
        took < std::time::Duration::from_secs(19),
        "{took:?}: less than half of a node's patience"
    );

    // Who knows no other server waits for this one.
    stand_still.send_replace(false);
    assert_eq!(waits.event().await.1, "b");
    b.stop().await;
    c.stop().await;
}
