//! Subnet leases against a real etcd.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use crate::support::{Etcd, eventually, history};
use ipnetwork::Ipv4Network;
use orch_netagent::files::{SubnetEnv, write_atomic};
use orch_netagent::lease::{
    EtcdConfig, EtcdHealth, Identity, Keeper, Network, Registry, SubnetKey, list,
};
use orch_netagent::mac::derived;
use orch_netagent::network::NetworkConfig;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PREFIX: &str = "/coreos.com/network";
const LIMIT: Duration = Duration::from_secs(20);

struct Node {
    network: watch::Receiver<Option<Network>>,
    health: watch::Receiver<EtcdHealth>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Node {
    /// A lease keeper; `folder` is the node's disk.
    fn start(number: u8, url: &str, network: &str, folder: &TempDir) -> Self {
        let etcd = EtcdConfig { endpoints: vec![url.to_owned()], ..EtcdConfig::default() };
        Self::start_with(number, etcd, network, folder)
    }

    fn start_with(number: u8, etcd: EtcdConfig, network: &str, folder: &TempDir) -> Self {
        let (network_sender, network_receiver) = watch::channel(None);
        let (health_sender, health) = watch::channel(EtcdHealth::Unknown);
        let network: Ipv4Network = network.parse().expect("CIDR");
        let keeper = Keeper {
            etcd,
            prefix: PREFIX.to_owned(),
            default_config: NetworkConfig::new(network, 24.max(network.prefix() + 2), 1, 8472)
                .expect("valid"),
            identity: Identity {
                public_ip: Ipv4Addr::new(192, 0, 2, number),
                vtep_mac: derived(&format!("node-{number}")),
                public_ipv6: None,
            },
            subnet_env: folder.path().join("subnet.env"),
            network: network_sender,
            health: health_sender,
        };
        let cancel = CancellationToken::new();
        let task = tokio::spawn(keeper.run(cancel.clone()));
        Self { network: network_receiver, health, cancel, task }
    }

    async fn subnet(&self) -> Ipv4Network {
        let mut network = self.network.clone();
        let known = tokio::time::timeout(LIMIT, network.wait_for(Option::is_some))
            .await
            .expect("a subnet in time");
        let known = known.expect("the keeper runs");
        known.as_ref().expect("known").own.v4.expect("IPv4")
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.expect("the keeper ends");
    }
}

/// The file of a node that has this subnet.
fn env(subnet: Ipv4Network) -> SubnetEnv {
    let network = "10.244.0.0/16".parse().expect("CIDR");
    SubnetEnv { ipv4: Some((network, subnet)), ipv6: None, mtu: 1450 }
}

/// The key of a lease of this subnet alone.
fn only(subnet: Ipv4Network) -> SubnetKey {
    SubnetKey { v4: Some(subnet), v6: None }
}

fn folders(count: usize) -> Vec<TempDir> {
    (0..count).map(|_| tempfile::tempdir().expect("temporary folder")).collect()
}

#[tokio::test]
async fn eight_nodes_that_start_at_once_hold_eight_subnets_and_know_each_other() {
    let etcd = Etcd::start();
    let folders = folders(8);
    // Only 15 subnets are free: some of the eight are bound to choose the same one.
    let nodes: Vec<Node> = (1..=8)
        .zip(&folders)
        .map(|(number, folder)| Node::start(number, &etcd.url, "10.244.0.0/20", folder))
        .collect();
    let mut subnets = BTreeSet::new();
    for node in &nodes {
        subnets.insert(node.subnet().await);
    }
    assert_eq!(subnets.len(), 8, "{subnets:?}");
    for node in &nodes {
        eventually("every node knows all eight leases", LIMIT, || async {
            let network = node.network.borrow();
            (network.as_ref()?.leases.len() == 8).then_some(())
        })
        .await;
    }
    let mut client = etcd.client().await;
    let config = client.get(format!("{PREFIX}/config"), None).await.expect("get");
    assert!(config.kvs()[0].value_str().expect("text").contains(r#""Network":"10.244.0.0/20""#));
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test]
async fn an_agent_whose_etcd_is_gone_for_good_finds_the_members_that_came_later() {
    let etcd = Etcd::start();
    // Nobody listens on the discard port.
    let gone = "http://127.0.0.1:9".to_owned();
    let (members, known) = watch::channel(vec![gone.clone()]);
    let config =
        EtcdConfig { endpoints: vec![gone], members: Some(known), ..EtcdConfig::default() };
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut node = Node::start_with(1, config, "10.244.0.0/16", &folder);
    let away = node.health.wait_for(|health| matches!(health, EtcdHealth::Away(_)));
    tokio::time::timeout(LIMIT, away).await.expect("in time").expect("the keeper runs");
    members.send_replace(vec![etcd.url.clone()]);
    node.subnet().await;
    node.stop().await;
}

#[tokio::test]
async fn a_restart_gets_the_same_subnet_on_the_same_etcd_lease() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().expect("temporary folder");
    let node = Node::start(1, &etcd.url, "10.244.0.0/16", &folder);
    let subnet = node.subnet().await;
    let options = EtcdConfig { endpoints: vec![etcd.url.clone()], ..EtcdConfig::default() };
    let registry = Registry::connect(&options, PREFIX).await.expect("connect");
    let (before, _) = registry.list().await.expect("list");
    node.stop().await;
    // Nothing on disk: the key alone says whose it is.
    let node = Node::start(1, &etcd.url, "10.244.0.0/16", &folder);
    assert_eq!(node.subnet().await, subnet);
    let (after, _) = registry.list().await.expect("list");
    assert_eq!(before, after, "a restart writes nothing, so peers see no event");
    assert_ne!(after[&only(subnet)].etcd_lease, 0);
    node.stop().await;
}

#[tokio::test]
async fn the_former_subnet_is_taken_again_after_the_lease_was_lost() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().expect("temporary folder");
    let former: Ipv4Network = "10.244.77.0/24".parse().expect("CIDR");
    let env = env(former);
    write_atomic(&folder.path().join("subnet.env"), env.render().as_bytes()).expect("written");
    let node = Node::start(1, &etcd.url, "10.244.0.0/16", &folder);
    assert_eq!(node.subnet().await, former);

    let mut client = etcd.client().await;
    let key = format!("{PREFIX}/subnets/10.244.77.0-24");
    client.delete(key.clone(), None).await.expect("delete");
    eventually("the key is back", LIMIT, || {
        let (mut client, key) = (client.clone(), key.clone());
        async move { (client.get(key, None).await.expect("get").count() == 1).then_some(()) }
    })
    .await;
    assert_eq!(node.subnet().await, former);
    node.stop().await;
}

#[tokio::test]
async fn a_subnet_that_somebody_else_took_is_given_up_and_its_file_with_it() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().expect("temporary folder");
    let node = Node::start(1, &etcd.url, "10.244.0.0/16", &folder);
    let subnet = node.subnet().await;
    let file = folder.path().join("subnet.env");
    let env = env(subnet);
    write_atomic(&file, env.render().as_bytes()).expect("written");

    let value = r#"{"PublicIP":"192.0.2.99","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}"#;
    let key = format!("{PREFIX}/subnets/{}-24", subnet.ip());
    etcd.client().await.put(key, value, None).await.expect("put");
    let mut network = node.network.clone();
    let moved = network
        .wait_for(|network| network.as_ref().is_some_and(|network| network.own != only(subnet)));
    let other = tokio::time::timeout(LIMIT, moved)
        .await
        .expect("in time")
        .expect("the keeper runs")
        .clone();
    assert_eq!(
        other.expect("known").leases[&only(subnet)]
            .value
            .as_ref()
            .expect("readable")
            .public_ip
            .octets()[3],
        99
    );
    assert!(!file.exists(), "no pod may get an address of the lost subnet");
    node.stop().await;
}

#[tokio::test]
async fn a_reservation_is_honoured_and_stays_without_a_time_to_live() {
    let etcd = Etcd::start();
    let mut client = etcd.client().await;
    for (subnet, ip) in [("10.244.5.0-24", "192.0.2.1"), ("10.244.6.0-24", "192.0.2.2")] {
        let value = format!(r#"{{"PublicIP":"{ip}"}}"#);
        client.put(format!("{PREFIX}/subnets/{subnet}"), value, None).await.expect("put");
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let node = Node::start(2, &etcd.url, "10.244.0.0/16", &folder);
    assert_eq!(node.subnet().await.to_string(), "10.244.6.0/24");
    let kept = client.get(format!("{PREFIX}/subnets/10.244.6.0-24"), None).await.expect("get");
    assert_eq!(kept.kvs()[0].lease(), 0);
    assert!(kept.kvs()[0].value_str().expect("text").contains("VtepMAC"));
    node.stop().await;
}

#[tokio::test]
async fn an_outage_changes_nothing_and_a_compaction_under_the_watch_loses_nothing() {
    let mut etcd = Etcd::start();
    let folders = folders(2);
    let first = Node::start(1, &etcd.url, "10.244.0.0/16", &folders[0]);
    let subnet = first.subnet().await;
    etcd.stop();
    let mut health = first.health.clone();
    let away = health.wait_for(|health| matches!(health, EtcdHealth::Away(_)));
    tokio::time::timeout(LIMIT, away).await.expect("the outage is seen").expect("the keeper runs");
    assert_eq!(first.network.borrow().as_ref().map(|network| network.own), Some(only(subnet)));

    etcd.resume();
    let second = Node::start(2, &etcd.url, "10.244.0.0/16", &folders[1]);
    let other = second.subnet().await;
    let mut client = etcd.client().await;
    let revision = client.get("x", None).await.expect("get").header().expect("header").revision();
    client.compact(revision, None).await.expect("compact");
    eventually("the first node learns of the second", LIMIT, || async {
        first.network.borrow().as_ref()?.leases.contains_key(&only(other)).then_some(())
    })
    .await;
    assert_eq!(first.subnet().await, subnet);
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn a_node_that_starts_before_etcd_waits_and_says_so() {
    let mut etcd = Etcd::start();
    etcd.stop();
    let folder = tempfile::tempdir().expect("temporary folder");
    let node = Node::start(1, &etcd.url, "10.244.0.0/16", &folder);
    let mut health = node.health.clone();
    let away = health.wait_for(|health| matches!(health, EtcdHealth::Away(_)));
    let told = tokio::time::timeout(LIMIT, away)
        .await
        .expect("it says so")
        .expect("the keeper runs")
        .clone();
    let EtcdHealth::Away(why) = told else { unreachable!("waited for") };
    assert_eq!(
        why.replace(&etcd.url, "URL"),
        "read the network configuration: etcd at URL: tcp connect error: Connection refused (os error 111)"
    );
    etcd.resume();
    node.subnet().await;
    node.stop().await;
}

#[tokio::test]
async fn etcd_over_tls_takes_the_agents_certificate_and_no_other() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let addresses = [Ipv4Addr::LOCALHOST.into()];
    let pki = orch_pki::ClusterPki::ensure(folder.path(), &addresses, &[]).expect("certificates");
    let etcd = Etcd::start_tls(folder.path());
    let agent = pki
        .agent_credentials("node-1", &addresses, &["https://127.0.0.1:6443".to_owned()])
        .expect("credentials");
    let mut config = EtcdConfig {
        endpoints: vec![etcd.url.clone()],
        ca_pem: Some(agent.etcd_ca.clone()),
        cert_pem: Some(agent.etcd_certificate.clone()),
        key_pem: Some(agent.etcd_key.clone()),
        members: None,
    };
    let node = Node::start_with(1, config.clone(), "10.244.0.0/16", &folder);
    let subnet = node.subnet().await;
    assert!(list(&config, PREFIX).await.expect("list").contains_key(&only(subnet)));
    node.stop().await;

    // A certificate of the API's authority opens nothing here.
    config.cert_pem = Some(agent.serving_certificate);
    config.key_pem = Some(agent.serving_key);
    list(&config, PREFIX).await.expect_err("refused");
    assert!(!format!("{config:?}").contains("PRIVATE"), "a key is never printed");
}

#[tokio::test]
async fn the_last_free_subnet_goes_to_one_of_two_nodes() {
    let etcd = Etcd::start();
    // A /26 of /28s has four, and the first is skipped.
    let folders = folders(4);
    let nodes: Vec<Node> = (1..=4)
        .zip(&folders)
        .map(|(number, folder)| Node::start(number, &etcd.url, "10.244.0.0/26", folder))
        .collect();
    eventually("three have one", LIMIT, || async {
        let holding: Vec<Ipv4Network> = nodes
            .iter()
            .filter_map(|node| node.network.borrow().as_ref().and_then(|network| network.own.v4))
            .collect();
        let distinct: BTreeSet<_> = holding.iter().collect();
        assert_eq!(distinct.len(), holding.len(), "one subnet twice: {holding:?}");
        (holding.len() == 3).then_some(())
    })
    .await;
    for node in nodes {
        node.stop().await;
    }
}

async fn assert_no_subnet_was_held_twice(etcd: &Etcd) {
    history::assert_no_subnet_was_held_twice(&mut etcd.client().await, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_nodes_join_at_once_and_no_subnet_is_ever_held_twice() {
    let etcd = Etcd::start();
    let folders = folders(50);
    // 63 subnets for 50 nodes: many of them choose the same one.
    let nodes: Vec<Node> = (1..=50)
        .zip(&folders)
        .map(|(number, folder)| Node::start(number, &etcd.url, "10.244.0.0/18", folder))
        .collect();
    for node in &nodes {
        eventually("every node knows all leases", LIMIT, || async {
            let network = node.network.borrow();
            (network.as_ref()?.leases.len() == 50).then_some(())
        })
        .await;
    }
    // The network shrinks to 15 subnets, and grows again: those without one wait, and get one.
    let mut client = etcd.client().await;
    let key = format!("{PREFIX}/config");
    let small = r#"{"Network":"10.244.0.0/20","Backend":{"Type":"vxlan"}}"#;
    let wide = r#"{"Network":"10.0.0.0/8","SubnetLen":25,"Backend":{"Type":"host-gw"}}"#;
    client.put(key.clone(), small, None).await.expect("put");
    eventually("fifteen hold all there is", LIMIT, || async {
        let (leases, _) = list_all(&etcd).await;
        let small: Ipv4Network = "10.244.0.0/20".parse().expect("CIDR");
        (leases.iter().filter(|one| small.contains(one.ip())).count() == 15).then_some(())
    })
    .await;
    client.put(key, wide, None).await.expect("put");
    for node in &nodes {
        eventually("every node has one again", LIMIT, || async {
            let network = node.network.borrow();
            let network = network.as_ref()?;
            (network.own.v4.is_some_and(|own| own.prefix() == 25) && network.leases.len() == 50)
                .then_some(())
        })
        .await;
    }
    assert!(nodes.iter().all(|node| !node.task.is_finished()));
    assert_no_subnet_was_held_twice(&etcd).await;
    for node in nodes {
        node.stop().await;
    }
}

async fn list_all(etcd: &Etcd) -> (Vec<Ipv4Network>, i64) {
    let options = EtcdConfig { endpoints: vec![etcd.url.clone()], ..EtcdConfig::default() };
    let registry = Registry::connect(&options, PREFIX).await.expect("connect");
    let (leases, revision) = registry.list().await.expect("list");
    (leases.into_keys().filter_map(|key| key.v4).collect(), revision)
}

#[tokio::test]
async fn a_lease_that_expired_while_the_agent_was_stopped_is_acquired_again_as_it_was() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().expect("temporary folder");
    let node = Node::start(1, &etcd.url, "10.244.0.0/16", &folder);
    let subnet = node.subnet().await;
    let env = env(subnet);
    write_atomic(&folder.path().join("subnet.env"), env.render().as_bytes()).expect("written");
    node.stop().await;
    let options = EtcdConfig { endpoints: vec![etcd.url.clone()], ..EtcdConfig::default() };
    let registry = Registry::connect(&options, PREFIX).await.expect("connect");
    let lease = registry.list().await.expect("list").0[&only(subnet)].etcd_lease;
    let client = etcd.client().await;
    // As after 24 hours.
    client.lease_client().revoke(lease).await.expect("revoke");
    assert!(list_all(&etcd).await.0.is_empty());
    let node = Node::start(1, &etcd.url, "10.244.0.0/16", &folder);
    assert_eq!(node.subnet().await, subnet);

    // And while it runs: the key goes with the lease, and comes back with another one.
    let lease = registry.list().await.expect("list").0[&only(subnet)].etcd_lease;
    client.lease_client().revoke(lease).await.expect("revoke");
    eventually("the key is back", LIMIT, || async {
        (list_all(&etcd).await.0 == [subnet]).then_some(())
    })
    .await;
    assert_no_subnet_was_held_twice(&etcd).await;
    node.stop().await;
}

#[tokio::test]
async fn two_nodes_race_for_the_last_free_subnet_whenever_it_becomes_free() {
    let etcd = Etcd::start();
    let folders = folders(2);
    // Three subnets, two of them reserved for others.
    let mut client = etcd.client().await;
    for subnet in ["10.244.0.16-28", "10.244.0.32-28"] {
        let value = r#"{"PublicIP":"192.0.2.200"}"#;
        client.put(format!("{PREFIX}/subnets/{subnet}"), value, None).await.expect("put");
    }
    let nodes: Vec<Node> = (1..=2)
        .zip(&folders)
        .map(|(number, folder)| Node::start(number, &etcd.url, "10.244.0.0/26", folder))
        .collect();
    for _ in 0..5 {
        eventually("one of them holds it", LIMIT, || async {
            (list_all(&etcd).await.0.len() == 3).then_some(())
        })
        .await;
        client.delete(format!("{PREFIX}/subnets/10.244.0.48-28"), None).await.expect("delete");
    }
    assert!(nodes.iter().all(|node| !node.task.is_finished()));
    assert_no_subnet_was_held_twice(&etcd).await;
    for node in nodes {
        node.stop().await;
    }
}
