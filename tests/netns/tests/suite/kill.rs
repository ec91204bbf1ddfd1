//! A chain of `bridge`, `portmap`, `bandwidth`, `firewall` and `tuning` that is killed at every one of its system calls that change something:
//! what it leaves is found by GC, by DEL and by the next ADD.

use std::fs;
use std::process::Command;

use anyhow::Context as _;
use cni_netlink::LinkKind;
use serde_json::{Value, json};
use tests_netns::{Pod, Testbed};

type Result<T = ()> = anyhow::Result<T>;

/// All that could leave something in the kernel or on the disk.
const CALLS: [&str; 9] = [
    "sendto",
    "sendmsg",
    "openat",
    "write",
    "link,linkat",
    "rename,renameat",
    "unlink",
    "mkdir",
    "setns",
];

fn chain(t: &Testbed) -> [Value; 5] {
    let mut bridge = t.conf(&["10.88.0.0/16", "fd88::/64"]);
    bridge["ipMasq"] = json!(true);
    bridge["hairpinMode"] = json!(true);
    let plugin = |name: &str, runtime: Value| json!({"cniVersion": "1.1.0", "name": "net", "type": name, "runtimeConfig": runtime});
    let ports = json!([
        {"hostPort": 8080, "containerPort": 80},
        {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
    ]);
    let rates = json!({
        "ingressRate": 80_000_000, "ingressBurst": 800_000,
        "egressRate": 80_000_000, "egressBurst": 800_000,
    });
    let mut firewall = plugin("firewall", Value::Null);
    firewall["ingressPolicy"] = json!("isolated");
    let mut tuning = plugin("tuning", Value::Null);
    tuning["mtu"] = json!(1300);
    tuning["sysctl"] = json!({"net.core.somaxconn": "499"});
    tuning["dataDir"] = json!(t.state.path().join("tuning"));
    [
        bridge,
        plugin("portmap", json!({"portMappings": ports})),
        plugin("bandwidth", json!({"bandwidth": rates})),
        firewall,
        tuning,
    ]
}

/// ADD of one plugin under the knife; says whether it was killed, and its answer otherwise.
fn add_killed(
    t: &Testbed,
    pod: &Pod,
    conf: &Value,
    call: &str,
    when: u32,
) -> Result<Option<Value>> {
    let inject = format!("inject={call}:signal=KILL:when={when}");
    let trace = format!("trace={call}");
    let path = pod.path();
    let variables = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", pod.id.as_str()),
        ("CNI_NETNS", &path),
        ("CNI_IFNAME", "eth0"),
    ];
    let observer = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
    let plugin = conf["type"].as_str().context("type")?;
    let output = t.start_under(&observer, plugin, &variables, conf)?.wait_with_output()?;
    if output.status.success() {
        return Ok(Some(serde_json::from_slice(&output.stdout)?));
    }
    // Or it answered an error: the knife also meets the program `nft`, which it runs once per subnet.
    Ok(None)
}

fn left(t: &Testbed) -> Result<Vec<String>> {
    let links = t.netlink.links()?.into_iter();
    let mut left: Vec<String> = links
        .filter(|link| link.kind == LinkKind::Veth || link.kind == LinkKind::Other("ifb".into()))
        .map(|link| link.name)
        .collect();
    left.extend(t.leases()?.iter().map(ToString::to_string));
    for entry in fs::read_dir(t.state.path().join("tuning")).into_iter().flatten() {
        left.push(entry?.path().display().to_string());
    }
    let rules = t.nft("list ruleset")?;
    let elements = rules.lines().filter(|line| {
        line.contains("comment \"cni")
            || line.contains("jump from_10")
            || line.contains("elements = { \"cni0\"")
    });
    left.extend(elements.map(ToOwned::to_owned));
    Ok(left)
}

#[test]
fn what_a_kill_at_any_system_call_leaves_is_found_again() -> Result {
    if Command::new("strace").arg("-V").output().is_err() {
        eprintln!("skipped: strace is not installed");
        return Ok(());
    }
    let t = Testbed::new()?;
    let confs = chain(&t);
    let mut kills = 0;
    for victim in 0..confs.len() {
        for call in CALLS {
            for when in 1.. {
                let pod = t.pod()?;
                let mut prev = Value::Null;
                let mut finished = false;
                for (index, conf) in confs.iter().enumerate().take(victim + 1) {
                    let mut conf = conf.clone();
                    conf["prevResult"] = prev.clone();
                    if index < victim {
                        prev = t.add(&pod, &conf)?;
                    } else {
                        finished = add_killed(&t, &pod, &conf, call, when)?.is_some();
                    }
                }
                let place = format!("{} killed at {call} {when}", confs[victim]["type"]);
                kills += u32::from(!finished);
                match when % 3 {
                    // The runtime lost it: GC has to find it without its name.
                    0 => {
                        for conf in &confs {
                            t.gc(&[], conf)?.success().with_context(|| place.clone())?;
                        }
                    }
                    // The runtime calls again with the same name, and then ends it.
                    1 if !finished => {
                        let mut prev = prev.clone();
                        for conf in confs.iter().skip(victim) {
                            let mut conf = conf.clone();
                            conf["prevResult"] = prev;
                            let again = t.attachment("ADD", &pod, &conf)?;
                            if conf["type"] == "bridge" && !again.ok {
                                // Killed after its last step: it is attached.
                                assert_eq!(again.failure()?.0, 102, "{place}");
                                prev = Value::Null;
                                break;
                            }
                            prev = again.success().with_context(|| place.clone())?;
                        }
                        for conf in confs.iter().rev() {
                            t.del(&pod, conf).with_context(|| place.clone())?;
                        }
                        drop(prev);
                    }
                    _ => {
                        for conf in confs.iter().rev() {
                            t.del(&pod, conf).with_context(|| place.clone())?;
                        }
                    }
                }
                let left = left(&t)?;
                assert!(left.is_empty(), "{place}: {left:?}");
                if finished {
                    break;
                }
            }
        }
    }
    assert!(kills > 50, "{kills} kills");
    // With the last attachment of a network its rules go, too.
    for conf in &confs {
        t.gc(&[], conf)?.success()?;
    }
    assert_eq!(t.nft("list ruleset")?, "");
    Ok(())
}
