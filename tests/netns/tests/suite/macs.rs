//! MACs of pods follow from their addresses (`cni_bridge`, `mac.rs`): neighbours are told of a new pod only where one of
//! them may know its address by another MAC, and then they are.

use std::fs;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::Context as _;
use cni_netlink::{AddressOptions, Bridge, MacBytes, Netlink, VethPair};
use serde_json::{Value, json};
use tests_netns::{Pod, Testbed, address, connect, connect_within};

type Result<T = ()> = anyhow::Result<T>;

const SUBNET: &str = "10.88.0.0/24";
/// The address that is used again.
const AGAIN: &str = "10.88.0.77";
/// Who knows an address by a MAC that nobody has any more tries that one for seconds.
const AT_ONCE: Duration = Duration::from_millis(500);

/// A pod whose memory shows what it was told, whether it cared or not.
fn listener(t: &Testbed, conf: &Value) -> Result<Pod> {
    let pod = t.pod()?;
    pod.netns
        .run(|| -> Result { Ok(fs::write("/proc/sys/net/ipv4/conf/all/arp_accept", "1")?) })?;
    t.add(&pod, conf)?;
    Ok(pod)
}

/// The MAC by which a pod knows an address.
fn known(pod: &Pod, ip: IpAddr) -> Result<Option<MacBytes>> {
    let eth0 = pod.eth0()?.context("eth0")?.index;
    Ok(Netlink::open_in(&pod.netns)?.neighbour(eth0, ip)?.map(|known| known.mac))
}

fn mac(pod: &Pod) -> Result<MacBytes> {
    Ok(pod.eth0()?.context("eth0")?.mac)
}

/// A configuration that asks for an address.
fn wanting(conf: &Value, ip: &str) -> Value {
    let mut conf = conf.clone();
    conf["runtimeConfig"]["ips"] = json!([ip]);
    conf
}

fn with_result(conf: &Value, result: &Value) -> Value {
    let mut conf = conf.clone();
    conf["prevResult"] = result.clone();
    conf
}

#[test]
fn a_pod_has_the_mac_of_its_address_and_nobody_is_told() -> Result {
    let t = Testbed::new()?;
    let conf = t.conf(&[SUBNET]);
    let listener = listener(&t, &conf)?;
    let pod = t.pod()?;
    for _ in 0..2 {
        let result = t.add(&pod, &wanting(&conf, AGAIN))?;
        assert_eq!(mac(&pod)?, [0x0a, 0x58, 10, 88, 0, 77]);
        assert_eq!(result["interfaces"][2]["mac"], "0a:58:0a:58:00:4d");
        assert_eq!(known(&listener, address(&result, 0)?)?, None, "told");
        t.attachment("CHECK", &pod, &with_result(&conf, &result))?.success()?;
        t.del(&pod, &with_result(&conf, &result))?;
    }

    // IPv6 alone: not readable, but as constant.
    let mut six = t.conf(&["fd88::/64"]);
    six["name"] = json!("six");
    six["bridge"] = json!("cni6");
    let mut macs = Vec::new();
    for ip in ["fd88::5", "fd88::6", "fd88::5"] {
        t.add(&pod, &wanting(&six, ip))?;
        macs.push(mac(&pod)?);
        t.del(&pod, &six)?;
    }
    assert!(macs[0] == macs[2] && macs[0] != macs[1], "{macs:x?}");
    Ok(())
}

#[test]
fn a_mac_that_was_asked_for_is_announced_and_so_is_who_comes_after() -> Result {
    let t = Testbed::new()?;
    let conf = t.conf(&[SUBNET]);
    let listener = listener(&t, &conf)?;
    let (asked, after) = (t.pod()?, t.pod()?);
    let mut wanted = wanting(&conf, AGAIN);
    wanted["runtimeConfig"]["mac"] = json!("02:00:00:00:00:09");
    let result = t.add(&asked, &wanted)?;
    let ip = address(&result, 0)?;
    assert_eq!(known(&listener, ip)?, Some([2, 0, 0, 0, 0, 9]), "not told");
    connect(&listener.netns, &asked.netns, ip)?;
    t.del(&asked, &conf)?;

    t.add(&after, &wanting(&conf, AGAIN))?;
    assert_eq!(known(&listener, ip)?, Some([0x0a, 0x58, 10, 88, 0, 77]), "not told");
    connect_within(&listener.netns, &after.netns, ip, AT_ONCE)?;
    Ok(())
}

#[test]
fn pods_of_another_kind_of_bridge_or_network_are_announced() -> Result {
    // Somebody else's bridge, as one that was there before this version is.
    let t = Testbed::new()?;
    let conf = t.conf(&[SUBNET]);
    t.netlink.create_bridge(&Bridge { name: "cni0".into(), up: true, ..Bridge::default() })?;
    let told = |t: &Testbed, conf: &Value| -> Result<(Pod, bool)> {
        let listener = listener(t, conf)?;
        let pod = t.pod()?;
        let ip = address(&t.add(&pod, conf)?, 0)?;
        Ok((pod, known(&listener, ip)?.is_some()))
    };
    let (pod, told_of) = told(&t, &conf)?;
    assert!(told_of);
    assert_eq!(mac(&pod)?[..2], [0x0a, 0x58], "the MAC of its address all the same");

    // A network whose gateway is elsewhere.
    let t = Testbed::new()?;
    let mut conf = t.conf(&[SUBNET]);
    conf["isDefaultGateway"] = json!(false);
    let (pod, told_of) = told(&t, &conf)?;
    assert!(told_of);
    assert_ne!(mac(&pod)?[..2], [0x0a, 0x58], "a MAC of its own");

    // Two addresses.
    let t = Testbed::new()?;
    let (_, told_of) = told(&t, &t.conf(&[SUBNET, "10.89.0.0/24"]))?;
    assert!(told_of);
    Ok(())
}

/// The second address of a pod says nothing about its MAC.
#[test]
fn an_ipv6_address_that_moves_to_a_pod_with_another_ipv4_address_is_reached_there_at_once() -> Result
{
    let t = Testbed::new()?;
    let conf = t.conf(&[SUBNET, "fd88::/64"]);
    let (peer, old, new) = (t.pod()?, t.pod()?, t.pod()?);
    t.add(&peer, &conf)?;
    let mut wanted = wanting(&conf, "fd88::77");
    wanted["runtimeConfig"]["ips"] = json!(["fd88::77", "10.88.0.77"]);
    let ip = address(&t.add(&old, &wanted)?, 1)?;
    connect(&peer.netns, &old.netns, ip)?;
    t.del(&old, &conf)?;
    wanted["runtimeConfig"]["ips"] = json!(["fd88::77", "10.88.0.78"]);
    t.add(&new, &wanted)?;
    for from in [&t.host, &peer.netns] {
        connect_within(from, &new.netns, ip, AT_ONCE)?;
    }
    Ok(())
}

#[test]
fn an_address_whose_last_pod_was_given_another_mac_by_tuning_is_reached_at_once() -> Result {
    let t = Testbed::new()?;
    let conf = t.conf(&[SUBNET]);
    let (peer, old, new) = (t.pod()?, t.pod()?, t.pod()?);
    t.add(&peer, &conf)?;
    let result = t.add(&old, &wanting(&conf, AGAIN))?;
    let ip = address(&result, 0)?;
    let tuning = json!({
        "cniVersion": conf["cniVersion"], "name": "net", "type": "tuning", "mac": "02:00:00:00:00:09",
        "dataDir": t.state.path().join("tuning"), "prevResult": result,
    });
    let result = t.add(&old, &tuning)?;
    connect(&peer.netns, &old.netns, ip)?;
    assert_eq!(known(&peer, ip)?, Some([2, 0, 0, 0, 0, 9]));
    // The container is gone, so nobody gives it its former MAC back.
    let id = old.id.clone();
    drop(old);
    let variables = [("CNI_CONTAINERID", id.as_str()), ("CNI_IFNAME", "eth0")];
    for conf in [&tuning, &conf] {
        let plugin = conf["type"].as_str().context("type")?;
        t.call(plugin, "DEL", &variables, &with_result(conf, &result))?.success()?;
    }
    t.add(&new, &wanting(&conf, AGAIN))?;
    connect_within(&peer.netns, &new.netns, ip, AT_ONCE)?;
    Ok(())
}

/// A pair of eth0 and another name than ours, with a MAC of its own: what the reference plugin makes.
fn of_another_plugin(t: &Testbed, pod: &Pod, name: &str) -> Result {
    let bridge = t.netlink.link("cni0")?.context("cni0")?.index;
    t.netlink.create_veth(&VethPair {
        name: name.to_owned(),
        peer_name: "eth0".to_owned(),
        peer_netns: Some(pod.netns.as_fd()),
        master: Some(bridge),
        peer_mac: Some([2, 0, 0, 0, 0, 0x10]),
        up: true,
        ..VethPair::default()
    })?;
    let inside = Netlink::open_in(&pod.netns)?;
    let eth0 = inside.link("eth0")?.context("eth0")?.index;
    inside.set_up(eth0)?;
    Ok(inside.add_address(eth0, format!("{AGAIN}/24").parse()?, &AddressOptions::default())?)
}

/// A node that was switched to the reference plugin for a while, with one of our pods there all the time.
#[test]
fn an_address_whose_last_pod_was_another_plugins_is_reached_at_once() -> Result {
    for removed_by_us in [true, false] {
        let t = Testbed::new()?;
        let conf = t.conf(&[SUBNET]);
        let (peer, old, new) = (t.pod()?, t.pod()?, t.pod()?);
        t.add(&peer, &conf)?;
        of_another_plugin(&t, &old, "veth1a2b3c4d")?;
        let ip: IpAddr = AGAIN.parse()?;
        connect(&peer.netns, &old.netns, ip)?;
        if removed_by_us {
            t.del(&old, &conf)?;
        } else {
            // The reference plugin leaves the host what it knows of the address.
            connect(&t.host, &old.netns, ip)?;
            let port = t.netlink.link("veth1a2b3c4d")?.context("port")?;
            t.netlink.delete_link(port.index)?;
        }
        t.add(&new, &wanting(&conf, AGAIN))?;
        for from in [&peer.netns, &t.host] {
            connect_within(from, &new.netns, ip, AT_ONCE)
                .with_context(|| format!("removed by us: {removed_by_us}"))?;
        }
    }
    Ok(())
}
