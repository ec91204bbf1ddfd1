//! `tuning` behind `bridge`: the real executable, the real kernel.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use cni_netlink::{Link, mac_text};
use serde_json::{Value, json};
use tests_netns::{Pod, Testbed, address, connect};

type Result<T = ()> = anyhow::Result<T>;

const SUBNET: &str = "10.88.0.0/24";
const MAC: &str = "c2:11:22:33:44:55";

fn tune(t: &Testbed, prev: &Value, keys: Value) -> Value {
    let mut conf = json!({
        "cniVersion": "1.1.0", "name": "net", "type": "tuning", "prevResult": prev,
        "dataDir": t.state.path().join("tuning"),
    });
    for (key, value) in keys.as_object().into_iter().flatten() {
        conf[key] = value.clone();
    }
    conf
}

fn attached(t: &Testbed) -> Result<(Pod, Value, Link)> {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.conf(&[SUBNET]))?;
    let link = pod.eth0()?.context("eth0")?;
    Ok((pod, result, link))
}

fn backups(t: &Testbed) -> Vec<PathBuf> {
    let entries = fs::read_dir(t.state.path().join("tuning")).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

fn sysctl(pod: &Pod, path: &str) -> Result<String> {
    pod.netns.run(|| Ok(fs::read_to_string(format!("/proc/sys/net/{path}"))?.trim().to_owned()))
}

#[test]
fn everything_is_set_and_told_and_del_gives_it_back() -> Result {
    let t = Testbed::new()?;
    let (pod, result, before) = attached(&t)?;
    let host = sysctl(
        &Pod { id: String::new(), netns: cni_netlink::NetNs::current()? },
        "core/somaxconn",
    )?;
    let conf = tune(
        &t,
        &result,
        json!({
            "mac": MAC, "mtu": 1300, "promisc": true, "allmulti": true, "txQLen": 77,
            "sysctl": {"net.core.somaxconn": "499", "net.ipv4.conf.IFNAME.arp_filter": "1"},
        }),
    );
    let answer = t.add(&pod, &conf)?;
    let link = pod.eth0()?.context("eth0")?;
    assert_eq!((mac_text(link.mac).as_str(), link.mtu, link.queue_length), (MAC, 1300, 77));
    assert!(link.promiscuous && link.all_multicast && link.up);
    assert_eq!(sysctl(&pod, "core/somaxconn")?, "499");
    assert_eq!(sysctl(&pod, "ipv4/conf/eth0/arp_filter")?, "1");
    let now = sysctl(
        &Pod { id: String::new(), netns: cni_netlink::NetNs::current()? },
        "core/somaxconn",
    )?;
    assert_eq!(now, host, "the host keeps its own");

    let mut told = result.clone();
    told["interfaces"][2]["mac"] = json!(MAC);
    told["interfaces"][2]["mtu"] = json!(1300);
    assert_eq!(answer, told);
    // The host knew the former MAC, if it knew one.
    connect(&t.host, &pod.netns, address(&result, 0)?)?;

    t.attachment("CHECK", &pod, &conf)?.success()?;
    let mut other = conf.clone();
    other["mtu"] = json!(1301);
    other["sysctl"]["net.core.somaxconn"] = json!("498");
    let (code, msg) = t.attachment("CHECK", &pod, &other)?.failure()?;
    assert!(code == 101 && msg.contains("1300") && msg.contains("499"), "{code} {msg}");

    assert_eq!(backups(&t).len(), 1);
    t.del(&pod, &conf)?;
    let after = pod.eth0()?.context("eth0")?;
    assert_eq!(after, before);
    assert!(backups(&t).is_empty());
    t.del(&pod, &conf)?;
    Ok(())
}

#[test]
fn a_failed_add_puts_everything_back() -> Result {
    let t = Testbed::new()?;
    let (pod, result, before) = attached(&t)?;
    let somaxconn = sysctl(&pod, "core/somaxconn")?;
    for keys in [
        json!({"sysctl": {"net.core.somaxconn": "499", "net.no.such": "1"}}),
        json!({"sysctl": {"net.core.somaxconn": "499"}, "mtu": 60000, "promisc": true, "mac": "ff:ff:ff:ff:ff:fe"}),
        json!({"sysctl": {"net.core.somaxconn": "499", "kernel.panic": "1"}}),
    ] {
        let conf = tune(&t, &result, keys);
        t.attachment("ADD", &pod, &conf)?.failure()?;
        assert_eq!(sysctl(&pod, "core/somaxconn")?, somaxconn, "{conf}");
        assert_eq!(pod.eth0()?.context("eth0")?, before, "{conf}");
        assert!(backups(&t).is_empty(), "{conf}");
    }
    let alone = json!({"cniVersion": "1.1.0", "name": "net", "type": "tuning"});
    assert_eq!(t.attachment("ADD", &pod, &alone)?.failure()?.0, 7);
    assert_eq!(t.add(&pod, &tune(&t, &result, json!({})))?, result, "nothing asked, nothing done");
    assert!(backups(&t).is_empty());
    t.call("tuning", "STATUS", &[], &alone)?.success()?;
    Ok(())
}

#[test]
fn only_what_the_list_of_the_host_allows_is_set() -> Result {
    let t = Testbed::new()?;
    let (pod, result, _) = attached(&t)?;
    let allowed = |key: &str| -> Result<bool> {
        let conf = tune(&t, &result, json!({"sysctl": {key: "1"}}));
        let path = pod.path();
        let variables = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", pod.id.as_str()),
            ("CNI_NETNS", &path),
            ("CNI_IFNAME", "eth0"),
        ];
        // A list of its own below /etc, in a mount namespace.
        let script = "mount -t tmpfs none /etc && mkdir -p /etc/cni/tuning && \
                      echo '^net\\.ipv4\\.conf\\.IFNAME\\.' > /etc/cni/tuning/allowlist.conf && exec \"$0\"";
        let observer = ["unshare", "-m", "sh", "-c", script];
        let output = t.start_under(&observer, "tuning", &variables, &conf)?.wait_with_output()?;
        let answer: Value = serde_json::from_slice(&output.stdout)?;
        let msg = answer["msg"].as_str().unwrap_or_default();
        anyhow::ensure!(output.status.success() || msg.contains("allowlist.conf"), "{answer}");
        Ok(output.status.success())
    };
    assert!(allowed("net.ipv4.conf.IFNAME.arp_filter")?);
    assert!(!allowed("net.core.somaxconn")?);
    Ok(())
}

#[test]
fn del_and_gc_find_what_a_container_that_is_gone_has_left() -> Result {
    let t = Testbed::new()?;
    let mut pods = Vec::new();
    for network in ["net", "net", "net", "other"] {
        let (pod, result, _) = attached(&t)?;
        let mut conf = tune(&t, &result, json!({"mtu": 1300}));
        conf["name"] = json!(network);
        t.add(&pod, &conf)?;
        pods.push(pod);
    }
    let bare = tune(&t, &Value::Null, json!({}));
    let gone = pods.remove(0).id;
    let variables =
        [("CNI_CONTAINERID", gone.as_str()), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/nowhere")];
    for _ in 0..2 {
        t.call("tuning", "DEL", &variables, &bare)?.success()?;
        assert_eq!(backups(&t).len(), 3);
    }
    for _ in 0..2 {
        t.gc(&[&pods[0]], &bare)?.success()?;
        assert_eq!(backups(&t).len(), 2, "the valid one and the other network's");
    }
    Ok(())
}
