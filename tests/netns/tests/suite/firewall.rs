//! `firewall` behind `bridge`: the real executable, the real kernel, on a host whose iptables forwards nothing.

use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use cni_netlink::NetNs;
use serde_json::{Value, json};
use tests_netns::{Pod, Testbed, address, connect, connect_within, gateway};

type Result<T = ()> = anyhow::Result<T>;

const OUTSIDE: [&str; 2] = ["192.0.2.2/24", "192.0.2.1/24"];
/// How long what is to be dropped is waited for.
const DROPPED: Duration = Duration::from_millis(300);

fn firewall(prev: &Value, keys: Value) -> Value {
    let mut conf =
        json!({"cniVersion": "1.1.0", "name": "net", "type": "firewall", "prevResult": prev});
    for (key, value) in keys.as_object().into_iter().flatten() {
        conf[key] = value.clone();
    }
    conf
}

/// A pod of a bridge, with a subnet of its own.
fn attached(t: &Testbed, bridge: &str, subnet: &str) -> Result<(Pod, Value)> {
    let pod = t.pod()?;
    let mut conf = t.conf(&[subnet]);
    conf["bridge"] = json!(bridge);
    conf["ipMasq"] = json!(true);
    conf["hairpinMode"] = json!(true);
    let result = t.add(&pod, &conf)?;
    Ok((pod, result))
}

/// As Docker leaves it: the table of iptables, and nothing passes.
fn drop_forwarded(t: &Testbed) -> Result {
    for family in ["ip", "ip6"] {
        t.nft(&format!("add table {family} filter"))?;
        t.nft(&format!(
            "add chain {family} filter FORWARD {{ type filter hook forward priority 0; policy drop; }}"
        ))?;
    }
    Ok(())
}

fn is_reached(from: &NetNs, pod: &NetNs, ip: IpAddr) -> bool {
    connect_within(from, pod, ip, DROPPED).is_ok()
}

#[test]
fn a_pod_gets_out_and_answers_come_back_where_iptables_drops() -> Result {
    let t = Testbed::new()?;
    let outside = t.outside(OUTSIDE[1], OUTSIDE[0])?;
    drop_forwarded(&t)?;
    let (pod, result) = attached(&t, "cni0", "10.88.0.0/24")?;
    let (ip, far) = (address(&result, 0)?, "192.0.2.2".parse()?);
    assert!(!is_reached(&pod.netns, &outside, far), "dropped without the plugin");
    let conf = firewall(&result, json!({"backend": "iptables"}));
    assert_eq!(t.add(&pod, &conf)?, result);
    connect(&pod.netns, &outside, far)?;
    t.attachment("CHECK", &pod, &conf)?.success()?;

    // A connection from outside is no answer; by a mapped port it is let in.
    let link = cni_netlink::Netlink::open_in(&outside)?;
    let index = link.link("outside")?.context("outside")?.index;
    let route = cni_netlink::Route {
        dst: "10.88.0.0/24".parse()?,
        link: Some(index),
        via: Some("192.0.2.1".parse()?),
        ..cni_netlink::Route::default()
    };
    link.add_route(&route)?;
    assert!(!is_reached(&outside, &pod.netns, ip), "a new connection is dropped");
    let ports = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80}]});
    let portmap = json!({
        "cniVersion": "1.1.0", "name": "net", "type": "portmap", "prevResult": result, "runtimeConfig": ports,
    });
    t.add(&pod, &portmap)?;
    let listener = pod.netns.run(|| -> Result<_> { Ok(std::net::TcpListener::bind((ip, 80))?) })?;
    outside.run(|| {
        let to = std::net::SocketAddr::from(([192, 0, 2, 1], 8080));
        std::net::TcpStream::connect_timeout(&to, Duration::from_secs(2))
            .context("mapped")
            .map(drop)
    })?;
    drop(listener);

    t.del(&pod, &conf)?;
    t.del(&pod, &conf)?;
    assert!(!is_reached(&pod.netns, &outside, far), "dropped after DEL");
    let (code, msg) = t.attachment("CHECK", &pod, &conf)?.failure()?;
    assert!(code == 101 && msg.contains(&ip.to_string()), "{code} {msg}");
    Ok(())
}

#[test]
fn the_way_through_iptables_is_made_once_found_missing_and_removed_with_the_last() -> Result {
    let t = Testbed::new()?;
    drop_forwarded(&t)?;
    let before = t.nft("list ruleset")?;
    let (pod, result) = attached(&t, "cni0", "10.88.0.0/24")?;
    let conf = firewall(&result, json!({}));
    t.add(&pod, &conf)?;
    let (second, second_result) = attached(&t, "cni0", "10.88.0.0/24")?;
    t.add(&second, &firewall(&second_result, json!({})))?;
    t.add(&pod, &conf)?;
    let forward = t.nft("list chain ip filter FORWARD")?;
    assert_eq!(forward.matches("jump CNI-PODS").count(), 1, "{forward}");
    if Command::new("iptables").arg("--version").output().is_ok() {
        let listed = t.host.run(|| -> Result<String> {
            let output = Command::new("iptables").arg("-S").output()?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })?;
        assert!(
            listed.contains("-A CNI-PODS -j CNI-ADMIN") || listed.contains("-j CNI-ADMIN"),
            "{listed}"
        );
        assert!(listed.contains("--mark 0x1000/0x1000"), "{listed}");
    }
    // Others flush what they think is theirs.
    t.nft("flush chain ip filter FORWARD")?;
    let (code, msg) = t.attachment("CHECK", &pod, &conf)?.failure()?;
    assert!(code == 101 && msg.contains("FORWARD"), "{code} {msg}");
    t.add(&second, &firewall(&second_result, json!({})))?;
    t.attachment("CHECK", &pod, &conf)?.success()?;

    let bare = firewall(&Value::Null, json!({}));
    t.gc(&[&pod], &bare)?.success()?;
    t.attachment("CHECK", &pod, &conf)?.success()?;
    for _ in 0..2 {
        t.gc(&[], &bare)?.success()?;
        let after: Vec<String> = t.nft("list ruleset")?.lines().map(str::to_owned).collect();
        assert!(
            !after.iter().any(|line| line.contains("cni_firewall") || line.contains("CNI-")),
            "{after:?}"
        );
    }
    assert!(t.nft("list ruleset")?.contains(before.trim()), "what was there stays");
    // What the administrator wrote stays.
    t.add(&pod, &firewall(&result, json!({"iptablesAdminChainName": "MINE"})))?;
    t.nft("add rule ip filter MINE counter")?;
    t.gc(&[], &bare)?.success()?;
    assert!(t.nft("list chain ip filter MINE")?.contains("counter"));
    Ok(())
}

#[test]
fn the_administrators_chain_is_asked_first() -> Result {
    let t = Testbed::new()?;
    let outside = t.outside(OUTSIDE[1], OUTSIDE[0])?;
    drop_forwarded(&t)?;
    let (pod, result) = attached(&t, "cni0", "10.88.0.0/24")?;
    t.add(&pod, &firewall(&result, json!({})))?;
    connect(&pod.netns, &outside, "192.0.2.2".parse()?)?;
    t.nft("add rule ip filter CNI-ADMIN ip daddr 192.0.2.2 drop")?;
    assert!(!is_reached(&pod.netns, &outside, "192.0.2.2".parse()?));
    Ok(())
}

#[test]
fn policies_keep_the_pods_of_other_bridges_or_all_away() -> Result {
    let t = Testbed::new()?;
    let mut pods = Vec::new();
    for (bridge, subnet, policy) in [
        ("br1", "10.88.1.0/24", "same-bridge"),
        ("br1", "10.88.1.0/24", "same-bridge"),
        ("br2", "10.88.2.0/24", "isolated"),
        ("br2", "10.88.2.0/24", "isolated"),
        ("br3", "10.88.3.0/24", "open"),
    ] {
        let (pod, result) = attached(&t, bridge, subnet)?;
        let conf = firewall(&result, json!({"ingressPolicy": policy}));
        t.add(&pod, &conf)?;
        t.attachment("CHECK", &pod, &conf)?.success()?;
        pods.push((pod, address(&result, 0)?, gateway(&result)?, conf));
    }
    let reaches =
        |from: usize, to: usize| is_reached(&pods[from].0.netns, &pods[to].0.netns, pods[to].1);
    assert!(reaches(0, 1), "same bridge");
    assert!(!reaches(0, 2) && !reaches(2, 0), "another confined bridge");
    assert!(!reaches(2, 3), "isolated");
    assert!(reaches(4, 0) && reaches(0, 4), "an open bridge");
    assert!(is_reached(&pods[2].0.netns, &t.host, pods[2].2), "the host");
    // The last container takes along what confines its bridge.
    for (pod, _, _, conf) in &pods[2..4] {
        t.del(pod, conf)?;
    }
    let sets = t.nft("list table inet cni_firewall")?;
    assert!(sets.contains("br1") && !sets.contains("br2"), "{sets}");
    assert!(is_reached(&pods[2].0.netns, &pods[0].0.netns, pods[0].1));
    Ok(())
}

#[test]
fn what_cannot_be_done_is_refused_and_nothing_is_left() -> Result {
    let t = Testbed::new()?;
    let (pod, result) = attached(&t, "cni0", "10.88.0.0/24")?;
    for (keys, code, word) in [
        (json!({"backend": "firewalld"}), 2, "firewalld"),
        (json!({"ingressPolicy": "closed"}), 2, "closed"),
        (json!({"iptablesAdminChainName": "x y"}), 7, "x y"),
    ] {
        let (seen, msg) = t.attachment("ADD", &pod, &firewall(&result, keys))?.failure()?;
        assert!(seen == code && msg.contains(word), "{seen} {msg}");
    }
    let mut no_bridge = firewall(&result, json!({"ingressPolicy": "isolated"}));
    no_bridge["prevResult"]["interfaces"][0]["name"] = json!("lo");
    assert_eq!(t.attachment("ADD", &pod, &no_bridge)?.failure()?.0, 7);
    assert_eq!(t.attachment("ADD", &pod, &firewall(&Value::Null, json!({})))?.failure()?.0, 7);
    assert!(!t.nft("list ruleset")?.contains("cni_firewall"));
    t.call("firewall", "STATUS", &[], &firewall(&Value::Null, json!({})))?.success()?;
    // Nothing of iptables is made where there is none.
    t.add(&pod, &firewall(&result, json!({})))?;
    ensure!(!t.nft("list ruleset")?.contains("table ip filter"), "a table of iptables was made");
    // A container that is gone is found without its namespace.
    let variables =
        [("CNI_CONTAINERID", pod.id.as_str()), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "")];
    t.call("firewall", "DEL", &variables, &firewall(&Value::Null, json!({})))?.success()?;
    let sets = t.nft("list table inet cni_firewall")?;
    ensure!(!sets.contains(&address(&result, 0)?.to_string()), "{sets}");
    Ok(())
}
