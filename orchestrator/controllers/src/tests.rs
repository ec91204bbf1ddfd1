//! All controllers together, against a server in memory and nodes that do what they are told.

mod tokens;

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use orch_client::{Api, DeleteParams, Kind};
use serde_json::{Value, json};
use tests_fake_api::FakeServer;
use tokio_util::sync::CancellationToken;

use crate::Options;

const PODS: &str = "/api/v1/namespaces/shop/pods";
const DEPLOYMENT: &str = "/apis/apps/v1/namespaces/shop/deployments/web";
const SETS: &str = "/apis/apps/v1/namespaces/shop/replicasets";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices";

struct Cluster {
    server: FakeServer,
    _stop: tokio_util::sync::DropGuard,
}

impl Cluster {
    /// Controllers, and two nodes whose pods run as soon as they are there.
    async fn start() -> Self {
        let server = FakeServer::new();
        let cancel = CancellationToken::new();
        let cluster = Self { server: server.clone(), _stop: cancel.clone().drop_guard() };
        for node in ["n1", "n2"] {
            cluster.beat(node);
            server.put(
                &node_path(node),
                json!({ "metadata": { "name": node },
                "status": { "conditions": [{ "type": "Ready", "status": "True" }] } }),
            );
        }
        let authority = || Arc::new(orch_pki::Authority::create("ca").expect("an authority"));
        let options = Options {
            cluster_ca: "CERTIFICATE".to_owned(),
            signers: Some(crate::Signers { cluster: authority(), etcd: authority() }),
            // Counted by the wall clock, which does not stand still here.
            eviction_after: Some(Duration::from_millis(100)),
            ..Options::fast()
        };
        tokio::spawn(crate::run(server.client(), options, cancel.clone()));
        tokio::spawn(nodes(server.clone(), cancel));
        cluster.create::<Namespace>("", json!({ "metadata": { "name": "shop" } })).await;
        cluster
    }

    async fn create<K: Kind>(&self, ns: &str, object: Value) {
        let client = self.server.client();
        let api = if ns.is_empty() { Api::all(client) } else { Api::<K>::namespaced(client, ns) };
        let object = serde_json::from_value(object).expect("an object of its kind");
        api.create(&object).await.expect("created");
    }

    async fn deploy(&self, replicas: i32) {
        self.create::<Deployment>("shop", json!({
            "metadata": { "name": "web" },
            "spec": { "replicas": replicas, "progressDeadlineSeconds": 600, "revisionHistoryLimit": 10,
                      "selector": { "matchLabels": { "app": "web" } },
                      "template": { "metadata": { "labels": { "app": "web" } },
                                    "spec": { "containers": [{ "name": "a", "image": "one" }] } } },
        }))
        .await;
    }

    async fn rolled_out(&self, replicas: i64) {
        eventually("the deployment is rolled out", || {
            let Some(found) = self.server.get(DEPLOYMENT) else { return false };
            let status = &found["status"];
            status["observedGeneration"] == found["metadata"]["generation"]
                && ["replicas", "updatedReplicas", "availableReplicas"]
                    .iter()
                    .all(|field| status[*field].as_i64().unwrap_or(0) == replicas)
        })
        .await;
    }

    fn beat(&self, node: &str) {
        beat(&self.server, node);
    }

    fn pods(&self) -> Vec<Value> {
        self.server.list(PODS)
    }

    fn writes(&self) -> usize {
        // What nodes do to the server does not come as requests.
        self.server.requests().iter().filter(|(method, _)| *method != Method::GET).count()
    }

    fn ready_endpoints(&self) -> usize {
        let slices = self.server.list(SLICES);
        let endpoints = slices
            .iter()
            .flat_map(|slice| slice["endpoints"].as_array().cloned().unwrap_or_default());
        endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true).count()
    }
}

fn node_path(name: &str) -> String {
    format!("/api/v1/nodes/{name}")
}

fn beat(server: &FakeServer, node: &str) {
    let path = format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{node}");
    let at = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string();
    server.put(&path, json!({ "spec": { "holderIdentity": node, "renewTime": at } }));
}

/// Scheduler and kubelets: pods are spread, become ready, and end when they are told to. A node with the label `dead`
/// does nothing.
async fn nodes(server: FakeServer, cancel: CancellationToken) {
    let mut turn = 0;
    let mut ticks = 0_u32;
    while !cancel.is_cancelled() {
        let alive: Vec<String> = server
            .list("/api/v1/nodes")
            .iter()
            .filter(|node| node["metadata"]["labels"]["dead"].is_null())
            .filter_map(|node| node["metadata"]["name"].as_str().map(str::to_owned))
            .collect();
        ticks += 1;
        if ticks.is_multiple_of(100) {
            for node in &alive {
                beat(&server, node);
            }
        }
        let pods = if alive.is_empty() { Vec::new() } else { server.list("/api/v1/pods") };
        for pod in pods {
            let text = |pointer: &str| {
                pod.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
            };
            let path = format!(
                "/api/v1/namespaces/{}/pods/{}",
                text("/metadata/namespace"),
                text("/metadata/name")
            );
            let node = text("/spec/nodeName");
            if node.is_empty() {
                turn += 1;
                let node = alive[turn % alive.len()].clone();
                server.change(&path, |pod| {
                    pod["spec"]["nodeName"] = json!(node);
                    pod["status"] = json!({ "phase": "Running", "podIP": format!("10.244.0.{turn}"),
                        "conditions": [{ "type": "Ready", "status": "True" }] });
                });
            } else if !pod["metadata"]["deletionTimestamp"].is_null() && alive.contains(&node) {
                server.remove(&path);
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..20_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

fn names(objects: &[Value]) -> Vec<String> {
    objects.iter().filter_map(|one| one["metadata"]["name"].as_str().map(str::to_owned)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_deployment_becomes_running_pods_and_then_nothing_more_is_written() {
    let cluster = Cluster::start().await;
    cluster.deploy(3).await;
    cluster.rolled_out(3).await;
    assert_eq!(cluster.pods().len(), 3);
    let condition = |kind: &str| {
        let found = cluster.server.get(DEPLOYMENT).unwrap_or_default();
        let all = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|one| one["type"] == kind).map(|one| one["reason"].clone())
    };
    eventually("the conditions say so", || {
        condition("Available") == Some(json!("MinimumReplicasAvailable"))
            && condition("Progressing") == Some(json!("NewReplicaSetAvailable"))
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let writes = cluster.writes();
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(cluster.writes(), writes, "two quiet minutes");
}

#[tokio::test(start_paused = true)]
async fn a_namespace_begins_with_an_account_and_the_certificate_and_gets_them_back() {
    let cluster = Cluster::start().await;
    let account = "/api/v1/namespaces/shop/serviceaccounts/default";
    let certificate = "/api/v1/namespaces/shop/configmaps/kube-root-ca.crt";
    let there = || {
        cluster.server.get(account).is_some()
            && cluster
                .server
                .get(certificate)
                .is_some_and(|map| map["data"]["ca.crt"] == "CERTIFICATE")
    };
    eventually("both are there", there).await;
    cluster.server.remove(account);
    cluster.server.change(certificate, |map| map["data"]["ca.crt"] = json!("forged"));
    eventually("both are back", there).await;
}

#[tokio::test(start_paused = true)]
async fn a_rolling_update_never_has_too_few_pods() {
    let cluster = Cluster::start().await;
    cluster.deploy(4).await;
    cluster.rolled_out(4).await;
    cluster.server.change(DEPLOYMENT, |web| {
        web["spec"]["template"]["spec"]["containers"][0]["image"] = json!("two");
        web["metadata"]["generation"] = json!(2);
    });
    let mut least = usize::MAX;
    eventually("all pods are new", || {
        let pods = cluster.pods();
        let alive = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let alive: Vec<_> = alive.collect();
        least = least.min(alive.iter().filter(|pod| pod["status"]["phase"] == "Running").count());
        alive.len() == 4 && alive.iter().all(|pod| pod["spec"]["containers"][0]["image"] == "two")
    })
    .await;
    assert!(least >= 3, "{least} pods ran");
    cluster.rolled_out(4).await;
    assert_eq!(cluster.server.list(SETS).len(), 2, "the old ReplicaSet is kept for a rollback");
}

#[tokio::test(start_paused = true)]
async fn a_deleted_pod_is_replaced_and_scaling_follows() {
    let cluster = Cluster::start().await;
    cluster.deploy(2).await;
    cluster.rolled_out(2).await;
    let first = names(&cluster.pods())[0].clone();
    let api = Api::<Pod>::namespaced(cluster.server.client(), "shop");
    api.delete(&first, &DeleteParams::default()).await.expect("deleted");
    eventually("another one runs", || {
        let pods = names(&cluster.pods());
        pods.len() == 2 && !pods.contains(&first)
    })
    .await;
    cluster.server.change(DEPLOYMENT, |web| {
        web["spec"]["replicas"] = json!(7);
        web["metadata"]["generation"] = json!(2);
    });
    cluster.rolled_out(7).await;
    cluster.server.change(DEPLOYMENT, |web| {
        web["spec"]["replicas"] = json!(0);
        web["metadata"]["generation"] = json!(3);
    });
    eventually("none is left", || cluster.pods().is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_relabelled_pod_is_let_go_and_a_matching_one_taken() {
    let cluster = Cluster::start().await;
    cluster.deploy(2).await;
    cluster.rolled_out(2).await;
    let path = format!("{PODS}/{}", names(&cluster.pods())[0]);
    let owners = || cluster.server.get(&path).map(|pod| pod["metadata"]["ownerReferences"].clone());
    cluster.server.change(&path, |pod| pod["metadata"]["labels"]["app"] = json!("debug"));
    eventually("it has no owner and a replacement", || {
        owners().is_some_and(|owners| owners.as_array().is_none_or(Vec::is_empty))
            && cluster.pods().len() == 3
    })
    .await;
    cluster.server.change(&path, |pod| pod["metadata"]["labels"]["app"] = json!("web"));
    eventually("two are left, one of them taken back or replaced", || cluster.pods().len() == 2)
        .await;
    cluster.rolled_out(2).await;
}

#[tokio::test(start_paused = true)]
async fn deleting_a_deployment_deletes_all_below_it() {
    let cluster = Cluster::start().await;
    cluster.deploy(3).await;
    cluster.rolled_out(3).await;
    let api = Api::<Deployment>::namespaced(cluster.server.client(), "shop");
    api.delete("web", &DeleteParams::default()).await.expect("deleted");
    eventually("all are gone", || {
        cluster.server.list(SETS).is_empty() && cluster.pods().is_empty()
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_foreground_deletion_ends_with_the_owner() {
    let cluster = Cluster::start().await;
    cluster.deploy(3).await;
    cluster.rolled_out(3).await;
    let api = Api::<Deployment>::namespaced(cluster.server.client(), "shop");
    let params = DeleteParams { propagation: Some("Foreground"), ..DeleteParams::default() };
    api.delete("web", &params).await.expect("accepted");
    eventually("the deployment is gone", || cluster.server.get(DEPLOYMENT).is_none()).await;
    assert!(cluster.server.list(SETS).is_empty() && cluster.pods().is_empty(), "they went first");
}

#[tokio::test(start_paused = true)]
async fn objects_that_own_each_other_in_a_circle_can_be_deleted_in_the_foreground() {
    let cluster = Cluster::start().await;
    let path = |n: usize| format!("/api/v1/namespaces/shop/configmaps/c{n}");
    for n in 0..3 {
        cluster.server.put(&path(n), json!({ "metadata": { "name": format!("c{n}") } }));
    }
    let uid = |n: usize| cluster.server.get(&path(n)).expect("there")["metadata"]["uid"].clone();
    for n in 0..3 {
        let owner = (n + 2) % 3;
        let reference = json!([{ "apiVersion": "v1", "kind": "ConfigMap", "name": format!("c{owner}"),
                                 "uid": uid(owner), "blockOwnerDeletion": true, "controller": true }]);
        cluster.server.change(&path(n), |map| map["metadata"]["ownerReferences"] = reference);
    }
    let api =
        Api::<k8s_openapi::api::core::v1::ConfigMap>::namespaced(cluster.server.client(), "shop");
    let params = DeleteParams { propagation: Some("Foreground"), ..DeleteParams::default() };
    api.delete("c0", &params).await.expect("accepted");
    eventually("all are gone", || (0..3).all(|n| cluster.server.get(&path(n)).is_none())).await;
}

#[tokio::test(start_paused = true)]
async fn an_orphaning_deletion_leaves_the_pods_alone() {
    let cluster = Cluster::start().await;
    cluster.deploy(2).await;
    cluster.rolled_out(2).await;
    let before = names(&cluster.pods());
    let api = Api::<Deployment>::namespaced(cluster.server.client(), "shop");
    let params = DeleteParams { propagation: Some("Orphan"), ..DeleteParams::default() };
    api.delete("web", &params).await.expect("accepted");
    eventually("the deployment is gone", || cluster.server.get(DEPLOYMENT).is_none()).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let sets = cluster.server.list(SETS);
    assert_eq!(sets.len(), 1);
    assert!(sets[0]["metadata"]["ownerReferences"].as_array().is_none_or(Vec::is_empty));
    assert_eq!(names(&cluster.pods()), before);
    // The same Deployment again takes them over.
    cluster.deploy(2).await;
    cluster.rolled_out(2).await;
    assert_eq!(names(&cluster.pods()), before);
}

#[tokio::test(start_paused = true)]
async fn a_deleted_namespace_goes_with_all_that_is_in_it() {
    let cluster = Cluster::start().await;
    cluster.deploy(3).await;
    cluster.rolled_out(3).await;
    cluster.server.put("/api/v1/namespaces/shop/secrets/s", json!({}));
    let held = "/api/v1/namespaces/shop/configmaps/held";
    cluster.server.put(held, json!({ "metadata": { "finalizers": ["example.com/hold"] } }));
    let api = Api::<Namespace>::all(cluster.server.client());
    api.delete("shop", &DeleteParams::default()).await.expect("accepted");
    eventually("the status says what holds it", || {
        let found = cluster.server.get("/api/v1/namespaces/shop").unwrap_or_default();
        found["status"]["conditions"]
            .to_string()
            .contains("example.com/hold in 1 resource instances")
    })
    .await;
    assert!(cluster.pods().is_empty());
    cluster.server.remove(held);
    eventually("the namespace is gone", || cluster.server.get("/api/v1/namespaces/shop").is_none())
        .await;
    for path in
        [SETS, SLICES, "/api/v1/namespaces/shop/secrets", "/api/v1/namespaces/shop/serviceaccounts"]
    {
        assert_eq!(cluster.server.list(path).len(), 0, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn pods_of_a_lost_node_run_elsewhere_and_get_no_traffic() {
    let cluster = Cluster::start().await;
    cluster.create::<Service>("shop", json!({
        "metadata": { "name": "web" },
        "spec": { "selector": { "app": "web" }, "clusterIP": "10.96.0.9", "ports": [{ "port": 80 }] },
    }))
    .await;
    cluster.deploy(4).await;
    cluster.rolled_out(4).await;
    eventually("four endpoints", || cluster.ready_endpoints() == 4).await;
    let lost =
        |pods: Vec<Value>| pods.into_iter().filter(|pod| pod["spec"]["nodeName"] == "n2").count();
    assert_eq!(lost(cluster.pods()), 2);
    let started = tokio::time::Instant::now();
    cluster
        .server
        .change(&node_path("n2"), |node| node["metadata"]["labels"] = json!({ "dead": "yes" }));
    eventually("no pod is on the lost node", || lost(cluster.pods()) == 0).await;
    cluster.rolled_out(4).await;
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    let node = cluster.server.get(&node_path("n2")).unwrap_or_default();
    assert!(node["spec"]["taints"].to_string().contains("node.kubernetes.io/unreachable"));
    eventually("four endpoints again", || cluster.ready_endpoints() == 4).await;
    // It comes back: ready by its own word, and the taints go.
    cluster.server.change(&node_path("n2"), |node| {
        node["metadata"]["labels"] = json!({});
        node["status"]["conditions"] = json!([{ "type": "Ready", "status": "True" }]);
    });
    cluster.beat("n2");
    eventually("the taints are gone", || {
        let node = cluster.server.get(&node_path("n2")).unwrap_or_default();
        node["spec"]["taints"].as_array().is_none_or(Vec::is_empty)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn when_the_store_stood_still_no_node_is_lost_and_no_pod_moves() {
    let cluster = Cluster::start().await;
    cluster.deploy(4).await;
    cluster.rolled_out(4).await;
    let before = names(&cluster.pods());
    let all = |dead: Value| {
        for node in ["n1", "n2"] {
            cluster
                .server
                .change(&node_path(node), |node| node["metadata"]["labels"] = dead.clone());
        }
    };
    // Nodes cannot renew, we cannot read: for longer than a node's grace period.
    all(json!({ "dead": "yes" }));
    cluster.server.fail_next(usize::MAX);
    tokio::time::sleep(Duration::from_secs(20)).await;
    cluster.server.fail_next(0);
    tokio::time::sleep(Duration::from_secs(2)).await;
    all(json!({}));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(names(&cluster.pods()), before);
    let seen = cluster.server.requests();
    let wrote = |path: &str| {
        seen.iter().any(|(method, asked)| *method != Method::GET && asked.starts_with(path))
    };
    assert!(!wrote("/api/v1/nodes/"), "no node was taken for lost");
}

#[tokio::test(start_paused = true)]
async fn when_no_node_is_alive_pods_stay_until_one_is_back_and_the_others_had_their_time() {
    let cluster = Cluster::start().await;
    cluster.deploy(4).await;
    cluster.rolled_out(4).await;
    let before = names(&cluster.pods());
    let set = |node: &str, labels: Value| {
        cluster.server.change(&node_path(node), |node| node["metadata"]["labels"] = labels);
    };
    for node in ["n1", "n2"] {
        set(node, json!({ "dead": "yes" }));
    }
    let unknown = |node: &str| {
        let node = cluster.server.get(&node_path(node)).unwrap_or_default();
        node["status"]["conditions"][0]["status"] == "Unknown"
    };
    eventually("both are lost", || unknown("n1") && unknown("n2")).await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(names(&cluster.pods()), before);
    let back = |name: &str| {
        set(name, json!({}));
        cluster.server.change(&node_path(name), |node| {
            node["status"]["conditions"] = json!([{ "type": "Ready", "status": "True" }]);
        });
        cluster.beat(name);
    };
    back("n1");
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(names(&cluster.pods()), before, "the other one may be about to follow");
    eventually("it did not, so its pods move", || {
        let pods = cluster.pods();
        pods.len() == 4 && pods.iter().all(|pod| pod["spec"]["nodeName"] == "n1")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn pods_of_a_deleted_node_are_removed() {
    let cluster = Cluster::start().await;
    cluster.deploy(4).await;
    cluster.rolled_out(4).await;
    cluster.server.remove(&node_path("n2"));
    eventually("all run on the other node", || {
        let pods = cluster.pods();
        pods.len() == 4 && pods.iter().all(|pod| pod["spec"]["nodeName"] == "n1")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn endpoints_follow_pods_and_go_with_their_service() {
    let cluster = Cluster::start().await;
    cluster.deploy(2).await;
    cluster.rolled_out(2).await;
    cluster.create::<Service>("shop", json!({
        "metadata": { "name": "web" },
        "spec": { "selector": { "app": "web" }, "clusterIP": "10.96.0.9", "ports": [{ "port": 80, "targetPort": 8080 }] },
    }))
    .await;
    eventually("two endpoints", || cluster.ready_endpoints() == 2).await;
    let endpoints = "/api/v1/namespaces/shop/endpoints/web";
    eventually("the Endpoints object", || cluster.server.get(endpoints).is_some()).await;
    let path = format!("{PODS}/{}", names(&cluster.pods())[0]);
    cluster.server.change(&path, |pod| pod["status"]["conditions"][0]["status"] = json!("False"));
    eventually("one is left", || cluster.ready_endpoints() == 1).await;
    let api = Api::<Service>::namespaced(cluster.server.client(), "shop");
    api.delete("web", &DeleteParams::default()).await.expect("deleted");
    eventually("nothing is left of it", || {
        cluster.server.list(SLICES).is_empty() && cluster.server.get(endpoints).is_none()
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn endpoints_written_by_hand_become_slices_and_take_them_along() {
    let cluster = Cluster::start().await;
    cluster.create::<Service>("shop", json!({
        "metadata": { "name": "db" }, "spec": { "clusterIP": "10.96.0.9", "ports": [{ "port": 5432 }] },
    }))
    .await;
    let endpoints = "/api/v1/namespaces/shop/endpoints/db";
    let subsets = |ip: &str| json!([{ "addresses": [{ "ip": ip }], "ports": [{ "port": 5432, "protocol": "TCP" }] }]);
    cluster.server.put(endpoints, json!({ "subsets": subsets("192.0.2.7") }));
    let address = || {
        let slices = cluster.server.list(SLICES);
        slices.first().map(|slice| slice["endpoints"][0]["addresses"][0].clone())
    };
    eventually("a slice", || address() == Some(json!("192.0.2.7"))).await;
    cluster.server.change(endpoints, |endpoints| endpoints["subsets"] = subsets("192.0.2.8"));
    eventually("it follows", || address() == Some(json!("192.0.2.8"))).await;
    cluster.server.remove(endpoints);
    eventually("it goes", || address().is_none()).await;
}
