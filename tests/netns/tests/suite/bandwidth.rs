//! `bandwidth` behind `bridge`: the real executable, the real kernel, and a stopwatch.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cni_netlink::{Link, LinkKind, NetNs};
use serde_json::{Value, json};
use tests_netns::{Pod, Testbed, address, gateway};

type Result<T = ()> = anyhow::Result<T>;

const SUBNET: &str = "10.88.0.0/24";
/// A megabyte a second, with bursts of 64 KB.
const RATE: u64 = 8_000_000;
const BURST: u64 = 8 * 64 * 1024;
const BYTES: usize = 600_000;
/// What [`BYTES`] take at [`RATE`], less a burst and some.
const SLOW: Duration = Duration::from_millis(400);
const FAST: Duration = Duration::from_millis(300);

fn shape(prev: &Value, bandwidth: Value) -> Value {
    json!({
        "cniVersion": "1.1.0", "name": "net", "type": "bandwidth",
        "runtimeConfig": {"bandwidth": bandwidth}, "prevResult": prev,
    })
}

fn ingress() -> Value {
    json!({"ingressRate": RATE, "ingressBurst": BURST})
}

fn egress() -> Value {
    json!({"egressRate": RATE, "egressBurst": BURST})
}

fn blocks(t: &Testbed) -> Result<Vec<Link>> {
    let mut links = t.netlink.links()?;
    links.retain(|link| link.kind == LinkKind::Other("ifb".to_owned()));
    Ok(links)
}

/// How long a transfer takes until the last byte is there.
fn transfer(from: &NetNs, to: &NetNs, address: IpAddr) -> Result<Duration> {
    let listener = to.run(|| -> Result<TcpListener> { Ok(TcpListener::bind((address, 0))?) })?;
    let server = listener.local_addr()?;
    let begun = Instant::now();
    let sender = thread::scope(|scope| -> Result {
        let sender = scope.spawn(|| {
            from.run(|| -> Result {
                let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(2))?;
                Ok(stream.write_all(&vec![7; BYTES])?)
            })
        });
        let mut stream = listener.accept()?.0;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut buffer = Vec::new();
        stream.read_to_end(&mut buffer)?;
        anyhow::ensure!(buffer.len() == BYTES, "{} bytes came", buffer.len());
        sender.join().expect("the sender does not panic")
    });
    sender?;
    Ok(begun.elapsed())
}

fn attached(t: &Testbed) -> Result<(Pod, Value)> {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.conf(&[SUBNET]))?;
    Ok((pod, result))
}

#[test]
fn ingress_is_slow_to_the_pod_and_fast_from_it() -> Result {
    let t = Testbed::new()?;
    let (pod, result) = attached(&t)?;
    let (ip, gateway) = (address(&result, 0)?, gateway(&result)?);
    assert!(transfer(&t.host, &pod.netns, ip)? < FAST);
    let conf = shape(&result, ingress());
    assert_eq!(t.add(&pod, &conf)?, result);
    assert!(transfer(&t.host, &pod.netns, ip)? > SLOW);
    assert!(transfer(&pod.netns, &t.host, gateway)? < FAST);
    assert!(blocks(&t)?.is_empty(), "only egress needs one");
    t.attachment("CHECK", &pod, &conf)?.success()?;
    Ok(())
}

#[test]
fn egress_is_slow_from_the_pod_and_fast_to_it() -> Result {
    let t = Testbed::new()?;
    let (pod, result) = attached(&t)?;
    let (ip, gateway) = (address(&result, 0)?, gateway(&result)?);
    let conf = shape(&result, egress());
    let with_block = t.add(&pod, &conf)?;
    let block = blocks(&t)?.pop().context("no block")?;
    assert_eq!(with_block["interfaces"][3]["name"], block.name);
    assert_eq!(block.mtu, 1450);
    assert!(transfer(&pod.netns, &t.host, gateway)? > SLOW);
    assert!(transfer(&t.host, &pod.netns, ip)? < FAST);
    t.attachment("CHECK", &pod, &shape(&with_block, egress()))?.success()?;
    t.del(&pod, &conf)?;
    assert!(blocks(&t)?.is_empty());
    Ok(())
}

#[test]
fn add_again_takes_the_new_values_and_check_sees_what_differs() -> Result {
    let t = Testbed::new()?;
    let (pod, result) = attached(&t)?;
    let both = json!({
        "ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE, "egressBurst": BURST,
    });
    let conf = shape(&result, both.clone());
    t.add(&pod, &conf)?;
    let mut faster = conf.clone();
    // The network's own values count before the runtime's.
    for key in ["ingressRate", "egressRate"] {
        faster[key] = json!(RATE * 100);
    }
    for key in ["ingressBurst", "egressBurst"] {
        faster[key] = json!(BURST * 10);
    }
    t.add(&pod, &faster)?;
    assert_eq!(blocks(&t)?.len(), 1);
    assert!(transfer(&pod.netns, &t.host, gateway(&result)?)? < FAST);
    t.attachment("CHECK", &pod, &faster)?.success()?;
    let (code, msg) = t.attachment("CHECK", &pod, &conf)?.failure()?;
    assert_eq!(code, 101);
    assert!(msg.matches("1000000 bytes/s").count() == 2, "{msg}");
    let block = blocks(&t)?.pop().context("no block")?;
    t.netlink.delete_link(block.index)?;
    let (_, msg) = t.attachment("CHECK", &pod, &faster)?.failure()?;
    assert!(msg.contains(&block.name), "{msg}");
    Ok(())
}

#[test]
fn del_and_gc_find_the_block_of_a_container_that_is_gone() -> Result {
    let t = Testbed::new()?;
    let bare = json!({"cniVersion": "1.1.0", "name": "net", "type": "bandwidth"});
    let mut pods = Vec::new();
    for _ in 0..3 {
        let (pod, result) = attached(&t)?;
        t.add(&pod, &shape(&result, egress()))?;
        pods.push(pod);
    }
    let mut foreign = shape(&t.add(&t.pod()?, &t.conf(&[SUBNET]))?, egress());
    foreign["name"] = json!("net2");
    t.add(&Pod { id: "foreign".to_owned(), netns: tests_netns::new_netns()? }, &foreign)?;
    let gone = pods.remove(0).id;
    let variables = [("CNI_CONTAINERID", gone.as_str()), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "")];
    for _ in 0..2 {
        t.call("bandwidth", "DEL", &variables, &bare)?.success()?;
    }
    assert_eq!(blocks(&t)?.len(), 3);
    t.gc(&[&pods[1]], &bare)?.success()?;
    assert_eq!(blocks(&t)?.len(), 2, "the valid one and the other network's");
    t.gc(&[], &bare)?.success()?;
    let left = blocks(&t)?;
    assert_eq!(left.len(), 1, "{left:?}");
    Ok(())
}

/// As the reference names it, without alias or group: it was there before we came.
#[test]
fn the_block_of_the_reference_is_checked_replaced_and_removed() -> Result {
    // `printf netpod0 | sha512sum`
    const NAME: &str = "bwp3f366ffe522c";
    let t = Testbed::new()?;
    let (pod, result) = attached(&t)?;
    assert_eq!(pod.id, "pod0");
    let conf = shape(&result, egress());
    let answer = t.add(&pod, &conf)?;
    assert_eq!(answer["interfaces"][3]["name"], NAME, "the reference's DEL finds it");
    t.del(&pod, &conf)?;
    let foreign = cni_netlink::IfbDevice { name: NAME.to_owned(), ..Default::default() };
    t.netlink.create_ifb(&foreign)?;
    t.add(&pod, &conf)?;
    t.attachment("CHECK", &pod, &conf)?.success()?;
    assert_eq!(blocks(&t)?.len(), 1);
    t.del(&pod, &conf)?;
    assert!(blocks(&t)?.is_empty());
    t.netlink.create_ifb(&foreign)?;
    t.del(&pod, &conf)?;
    assert!(blocks(&t)?.is_empty());
    Ok(())
}

/// For which the reference has one name.
#[test]
fn two_interfaces_of_a_container_have_a_block_each() -> Result {
    let t = Testbed::new()?;
    let pod = t.pod()?;
    let path = pod.path();
    let mut confs = Vec::new();
    for ifname in ["eth0", "eth1"] {
        let variables =
            [("CNI_CONTAINERID", &*pod.id), ("CNI_NETNS", &*path), ("CNI_IFNAME", ifname)];
        let result = t.call("bridge", "ADD", &variables, &t.conf(&[SUBNET]))?.success()?;
        let conf = shape(&result, egress());
        t.call("bandwidth", "ADD", &variables, &conf)?.success()?;
        confs.push((variables, conf));
    }
    assert_eq!(blocks(&t)?.len(), 2);
    for (variables, conf) in &confs {
        t.call("bandwidth", "CHECK", variables, conf)?.success()?;
    }
    let (variables, conf) = &confs[0];
    t.call("bandwidth", "DEL", variables, conf)?.success()?;
    assert_eq!(blocks(&t)?.len(), 1);
    let (variables, conf) = &confs[1];
    t.call("bandwidth", "CHECK", variables, conf)?.success()?;
    t.call("bandwidth", "DEL", variables, conf)?.success()?;
    assert!(blocks(&t)?.is_empty());
    Ok(())
}

#[test]
fn what_cannot_be_done_is_refused_and_nothing_is_left() -> Result {
    let t = Testbed::new()?;
    let (pod, result) = attached(&t)?;
    let wrong = shape(&result, json!({"egressRate": RATE}));
    let (code, msg) = t.attachment("ADD", &pod, &wrong)?.failure()?;
    assert_eq!(code, 7);
    assert!(msg.contains("egressBurst"), "{msg}");
    let alone = json!({"cniVersion": "1.1.0", "name": "net", "type": "bandwidth"});
    assert_eq!(t.attachment("ADD", &pod, &alone)?.failure()?.0, 7);
    let mut no_pair = shape(&result, egress());
    no_pair["prevResult"]["interfaces"][1]["name"] = json!("cni0");
    let (_, msg) = t.attachment("ADD", &pod, &no_pair)?.failure()?;
    assert!(msg.contains("veth"), "{msg}");
    assert_eq!(t.add(&pod, &shape(&result, Value::Null))?, result, "no limits, no change");
    assert!(blocks(&t)?.is_empty());
    t.call("bandwidth", "STATUS", &[], &alone)?.success()?;
    Ok(())
}
