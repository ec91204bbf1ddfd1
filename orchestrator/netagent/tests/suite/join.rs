//! A node that joins is reached from all others soon after its key is in etcd.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::support::netns::Netns;
use crate::support::overlay::{Node, PREFIX, World, eventually};
use ipnetwork::Ipv4Network;

/// Issue 4: the median of many joins.
const MEDIAN: Duration = Duration::from_millis(300);
const OTHERS: u8 = 6;
const JOINS: u8 = 9;
const ECHO_PORT: u16 = 7;

/// New subnets, and when their key was in etcd: a watch of our own tells.
fn follow_keys(world: &World) -> Receiver<(Instant, Ipv4Network)> {
    let (sender, receiver) = channel();
    let (ready, started) = channel();
    let url = world.etcd.url.clone();
    world.server.spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("runtime").block_on(async {
            let mut client = etcd_client::Client::connect([url], None).await.expect("connect");
            let options = etcd_client::WatchOptions::new().with_prefix();
            let folder = format!("{PREFIX}/subnets/");
            let mut watch = client.watch(folder.clone(), Some(options)).await.expect("watch");
            ready.send(()).expect("the test waits");
            // It ends with etcd, that is, with the test.
            while let Ok(Some(message)) = watch.message().await {
                let at = Instant::now();
                for event in message.events() {
                    let key = event.kv().and_then(|kv| kv.key_str().ok()).unwrap_or_default();
                    let subnet = key.trim_start_matches(&folder).replace('-', "/");
                    let _ = sender.send((at, subnet.parse().expect("a subnet")));
                }
            }
        });
    });
    started.recv().expect("the watch runs");
    receiver
}

/// Answers on every address of a node.
fn echo(netns: &Netns) {
    let socket = netns.within(|| UdpSocket::bind(("0.0.0.0", ECHO_PORT)).expect("bind"));
    std::thread::spawn(move || {
        let mut byte = [0];
        while let Ok((_, from)) = socket.recv_from(&mut byte) {
            let _ = socket.send_to(&byte, from);
        }
    });
}

/// When the first answer from there came.
fn first_answer(from: &Netns, to: Ipv4Addr) -> std::thread::JoinHandle<Instant> {
    let socket = from.within(|| UdpSocket::bind("0.0.0.0:0").expect("bind"));
    std::thread::spawn(move || {
        socket.set_read_timeout(Some(Duration::from_millis(5))).expect("set");
        eventually("an answer", || {
            socket.send_to(&[1], (to, ECHO_PORT)).ok()?;
            socket.recv(&mut [0]).ok()
        });
        Instant::now()
    })
}

#[test]
fn a_node_that_joins_is_reached_from_all_others_within_300_ms_of_its_key() {
    let world = World::new();
    let others: Vec<Node> = (0..OTHERS).map(|number| world.node(100 + number)).collect();
    for node in &others {
        eventually("the others know each other", || {
            (node.status().peers.len() == others.len() - 1).then_some(())
        });
    }
    let keys = follow_keys(&world);
    let mut times = Vec::new();
    for number in 0..JOINS {
        let host = world.host(200 + number);
        echo(&host);
        let node = world.node_in(host, 200 + number, |_| {});
        let (written, subnet) = keys.recv().expect("a key");
        let answers: Vec<_> =
            others.iter().map(|other| first_answer(&other.netns, subnet.network())).collect();
        let last = answers.into_iter().map(|one| one.join().expect("an answer")).max();
        times.push(last.expect("others") - written);
        assert_eq!(node.subnet(), subnet);
    }
    times.sort_unstable();
    let median = times[times.len() / 2];
    eprintln!("{JOINS} joins to {OTHERS} nodes: {times:?}");
    assert!(median <= MEDIAN, "{times:?}");
}
