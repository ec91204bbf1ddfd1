//! What may happen to an overlay while pods talk over it (issue 4): streams between two nodes go on within 5 s, the
//! kernel holds exactly what it must afterwards, and no subnet was ever held twice.
//!
//! What happens to leases alone (fifty nodes at once, a race for the last subnet) is in `lease.rs`; a frozen agent and a
//! real process are in the story of `tests/e2e`.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::history::{assert_no_subnet_was_held_twice, revision};
use crate::support::overlay::{Node, PREFIX, Pod, World, eventually};
use crate::support::stream::Streams;
use etcd_client::Client;

/// Issue 4: streams survive, or resume within this time.
const STREAM_GAP: Duration = Duration::from_secs(5);
/// Etcd is away for this long. `OUTAGE_SECONDS=120` tests what the issue names.
const OUTAGE: Duration = Duration::from_secs(8);

struct Cluster {
    world: World,
    nodes: [Node; 2],
    pods: [Pod; 2],
    /// The first revision whose history etcd still has.
    since: i64,
}

impl Cluster {
    fn new() -> Self {
        let world = World::new();
        let nodes = [world.node(1), world.node(2)];
        let pods = [nodes[0].pod(2), nodes[1].pod(2)];
        for (from, to) in [(0, 1), (1, 0)] {
            eventually("pod to pod", || pods[from].reaches(&pods[to]).then_some(()));
        }
        Self { world, nodes, pods, since: 1 }
    }

    /// What the kernel of both nodes holds of the overlay.
    fn kernel(&self) -> Vec<String> {
        sorted(self.nodes.iter().flat_map(kernel))
    }

    /// Does something while streams run, and waits until the kernel is as `after` says, given what it was before.
    #[track_caller]
    fn survives(
        &mut self,
        what: &str,
        harm: impl FnOnce(&mut Self),
        after: impl Fn(String) -> String,
    ) {
        let before = self.kernel();
        let ends = |index: usize| (&self.pods[index].netns, self.pods[index].ip.into());
        let streams = Streams::between([ends(0), ends(1)]);
        streams.go_on();
        harm(self);
        let wanted = sorted(before.into_iter().map(after));
        let start = Instant::now();
        let mut seen = Vec::new();
        while start.elapsed() < Duration::from_secs(30) && seen != wanted {
            seen = self.kernel();
        }
        let converged = start.elapsed();
        assert_eq!(seen, wanted, "{what}: the kernel does not hold what it must");
        streams.go_on();
        let (gap, which) = streams.longest_gap();
        eprintln!("{what}: right after {converged:.0?}; longest gap {gap:.0?} ({which})");
        assert!(gap < STREAM_GAP, "{what}: {which} stood still for {gap:?}");
        for node in &self.nodes {
            assert!(node.runs(), "{what}");
            eventually("no problem is left", || node.status().problems.is_empty().then_some(()));
        }
    }

    /// The same for what leaves no trace.
    #[track_caller]
    fn heals(&mut self, what: &str, harm: impl FnOnce(&mut Self)) {
        self.survives(what, harm, |before| before);
    }

    /// Breaks something on the first node.
    #[track_caller]
    fn heals_damage(&mut self, commands: &[String]) {
        let what = commands.join("; ");
        self.heals(&what, |cluster| {
            for command in commands {
                match command.split_once(' ') {
                    Some(("ip", words)) => drop(cluster.nodes[0].netns.ip(words)),
                    Some(("bridge", words)) => drop(cluster.nodes[0].netns.bridge(words)),
                    _ => panic!("{command}"),
                }
            }
        });
    }

    /// Asks etcd, from where it runs.
    fn etcd<T: Send + 'static, F: Future<Output = T>>(
        &self,
        ask: impl FnOnce(Client) -> F + Send + 'static,
    ) -> T {
        let url = self.world.etcd.url.clone();
        self.world.server.within(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime
                .expect("runtime")
                .block_on(async { ask(Client::connect([url], None).await.expect("connect")).await })
        })
    }

    fn assert_no_subnet_was_held_twice(&self) {
        let since = self.since;
        self.etcd(move |mut client| async move {
            assert_no_subnet_was_held_twice(&mut client, since).await;
        });
    }
}

/// What the kernel of a node holds of the overlay, line by line, without what changes when a device is made again.
fn kernel(node: &Node) -> Vec<String> {
    let ask = |program: &str, words: &str| {
        // A device may be away just now.
        let output = Command::new(program)
            .args(["-n", &node.netns.name])
            .args(words.split(' '))
            .output()
            .expect(program);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let link = ask("ip", "-d -o link show vxlan-orch");
    let index = link.split(':').next().unwrap_or_default();
    let parts = [
        ("link", link.replacen(index, "", 1)),
        ("address", ask("ip", "-4 -br address show dev vxlan-orch")),
        ("route", ask("ip", "route show proto 111")),
        ("neighbour", ask("ip", "neighbour show dev vxlan-orch nud permanent")),
        ("fdb", ask("bridge", "fdb show dev vxlan-orch")),
        // Each element of a set is a line.
        (
            "nft",
            node.nft("-s list table ip orch-overlay")
                .replace(", ", "\n")
                .replace("{ ", "{\n")
                .replace(" }", "\n}"),
        ),
    ];
    let name = &node.options.node_name;
    let lines = |(part, text): (&str, String)| {
        text.lines().map(|line| format!("{name} {part} {} ", line.trim())).collect::<Vec<_>>()
    };
    sorted(parts.into_iter().flat_map(lines))
}

fn sorted(lines: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut lines: Vec<String> = lines.into_iter().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn damage_in_the_kernel_is_mended_under_running_streams() {
    let mut cluster = Cluster::new();
    let far = cluster.nodes[1].subnet();
    let base = far.network();
    let lease = cluster.world.lease(&cluster.nodes[1].key());
    let mac = lease["BackendData"]["VtepMAC"].as_str().expect("a MAC").to_owned();
    let route = format!("ip route delete {far}");
    let neighbour = format!("ip neighbour delete {base} dev vxlan-orch");
    let forwarding = format!("bridge fdb delete {mac} dev vxlan-orch dst 192.0.2.2 self");
    let own = |command: &str| command.to_owned();
    for commands in [
        vec![route.clone()],
        vec![neighbour.clone()],
        vec![forwarding.clone()],
        vec![forwarding, neighbour, route],
        vec![format!("ip route replace {far} via 192.0.2.3 dev eth0 proto 111")],
        vec![format!(
            "ip neighbour replace {base} lladdr 02:00:00:00:00:99 dev vxlan-orch nud permanent"
        )],
        vec![format!("bridge fdb replace {mac} dev vxlan-orch dst 192.0.2.99 self permanent")],
        vec![own("ip address flush dev vxlan-orch")],
        vec![own("ip link set vxlan-orch mtu 1300")],
        vec![own("ip link set vxlan-orch down")],
        vec![own("ip link set vxlan-orch down"), own("ip link set vxlan-orch up")],
        vec![own("ip link set eth0 down"), own("ip link set eth0 up")],
        vec![own("ip link delete vxlan-orch")],
    ] {
        cluster.heals_damage(&commands);
    }
    cluster.heals("flush ruleset", |cluster| drop(cluster.nodes[0].nft("flush ruleset")));
    cluster.heals("the MTU of the underlay changes and changes back", |cluster| {
        for (underlay, overlay) in [(1400, 1350), (1500, 1450)] {
            cluster.nodes[0].netns.ip(&format!("link set eth0 mtu {underlay}"));
            eventually("the overlay follows", || {
                let link = cluster.nodes[0].netns.ip("link show vxlan-orch");
                (link.contains(&format!("mtu {overlay} ")) && cluster.nodes[0].env().mtu == overlay)
                    .then_some(())
            });
        }
    });
    cluster.assert_no_subnet_was_held_twice();
}

#[test]
fn streams_survive_what_happens_to_agents_and_etcd() {
    let mut cluster = Cluster::new();
    let far = cluster.nodes[1].subnet();
    cluster.heals("the agent is killed and comes back", |cluster| {
        cluster.nodes[0].kill();
        cluster.nodes[0].start();
    });
    cluster.heals("what went wrong while the agent was dead is mended", |cluster| {
        cluster.nodes[0].kill();
        let node = &cluster.nodes[0].netns;
        // A node that left meanwhile, and entries that are gone or wrong.
        node.ip("neighbour add 10.244.201.0 lladdr 02:00:00:00:00:77 dev vxlan-orch nud permanent");
        node.bridge("fdb add 02:00:00:00:00:77 dev vxlan-orch dst 192.0.2.77 self permanent");
        node.ip("route add 10.244.201.0/24 via 10.244.201.0 dev vxlan-orch onlink proto 111");
        node.ip(&format!("route delete {far}"));
        cluster.nodes[0].start();
    });
    cluster.heals("the lease ends while the agent is stopped", |cluster| {
        cluster.nodes[0].kill();
        let key = format!("{PREFIX}/subnets/{}", cluster.nodes[0].key());
        cluster.etcd(|mut client| async move {
            let answer = client.get(key, None).await.expect("get");
            let lease = answer.kvs().first().expect("a lease").lease();
            client.lease_revoke(lease).await.expect("revoke");
        });
        eventually("the other node forgets it", || {
            cluster.nodes[1].status().peers.is_empty().then_some(())
        });
        cluster.nodes[0].start();
    });
    cluster.assert_no_subnet_was_held_twice();

    cluster.heals("etcd is compacted while an agent cannot see it", |cluster| {
        // The agent's connection is cut, and no other one comes about for a while.
        let rule = "ip saddr 192.0.2.1 tcp dport 1-65535 reject with tcp reset";
        let server = cluster.world.server.name.clone();
        let nft = |words: &str| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &server, "nft"]).args(words.split(' '));
            assert!(command.status().expect("nft").success(), "{words}");
        };
        nft("add table ip stranger");
        nft("add chain ip stranger in { type filter hook input priority 0 ; }");
        nft(&format!("add rule ip stranger in {rule}"));
        eventually("the agent misses etcd", || {
            (cluster.nodes[0].status().etcd != "healthy").then_some(())
        });
        // A node comes, and goes; another one changes what nobody will ever be told of.
        cluster.since = cluster.etcd(|mut client| async move {
            let key = format!("{PREFIX}/subnets/10.244.222.0-24");
            let value = r#"{"PublicIP":"192.0.2.50","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:00:00:00:00:50"}}"#;
            client.put(key.clone(), value, None).await.expect("put");
            client.delete(key, None).await.expect("delete");
            let now = revision(&mut client).await;
            client.compact(now, None).await.expect("compact");
            now + 1
        });
        nft("delete table ip stranger");
        eventually("etcd is back", || {
            (cluster.nodes[0].status().etcd == "healthy").then_some(())
        });
    });

    let outage = std::env::var("OUTAGE_SECONDS").ok().and_then(|text| text.parse().ok());
    let outage = outage.map_or(OUTAGE, Duration::from_secs);
    cluster.heals(&format!("etcd is away for {outage:?}"), |cluster| {
        let start = Instant::now();
        cluster.world.etcd.stop();
        // Damage is mended from what is known.
        let damaged = cluster.kernel();
        cluster.nodes[0].netns.ip("link delete vxlan-orch");
        eventually("mended without etcd", || (cluster.kernel() == damaged).then_some(()));
        // An agent that starts meanwhile keeps what is there.
        cluster.nodes[1].kill();
        cluster.nodes[1].start();
        while start.elapsed() < outage {
            assert!(cluster.nodes.iter().all(Node::runs));
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(cluster.kernel(), damaged, "nothing changes without etcd");
        cluster.world.restart_etcd();
        for node in &cluster.nodes {
            eventually("etcd is back", || (node.status().etcd == "healthy").then_some(()));
        }
    });
    cluster.assert_no_subnet_was_held_twice();
    // And what etcd says from now on is heard.
    let third = cluster.world.node(4);
    let pod = third.pod(2);
    for (node, there) in cluster.nodes.iter().zip(&cluster.pods) {
        eventually("the new node is reached", || there.reaches(&pod).then_some(()));
        eventually("and told", || (node.status().peers.len() == 2).then_some(()));
    }
}

#[test]
fn a_node_that_returns_with_another_address_keeps_its_subnet_and_its_streams() {
    let mut cluster = Cluster::new();
    let subnet = cluster.nodes[0].subnet();
    cluster.survives(
        "the node returns with another address",
        |cluster| {
            let moving = &mut cluster.nodes[0];
            moving.kill();
            moving.netns.ip("address flush dev eth0");
            moving.netns.ip("address add 192.0.2.91/24 dev eth0");
            moving.options.node_ip = Ipv4Addr::new(192, 0, 2, 91);
            moving.start();
        },
        |before| before.replace("192.0.2.1 ", "192.0.2.91 "),
    );
    assert_eq!(cluster.nodes[0].subnet(), subnet);
    assert_eq!(cluster.world.lease(&cluster.nodes[0].key())["PublicIP"], "192.0.2.91");
    assert_eq!(cluster.world.subnet_keys().len(), 2);
    cluster.assert_no_subnet_was_held_twice();
}
