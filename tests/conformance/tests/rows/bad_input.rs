//! Input that is wrong, and folders that are: the right code, a message that names key and value, nothing left.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::json;
use tests_conformance::{Bed, Result, SUBNET, borrowed, merge};

use super::{Row, rows};

pub(crate) const ROWS: &[Row] = rows![
    wrong_types_are_named,
    wrong_values_are_named,
    ten_megabytes_are_refused_at_once,
    what_is_no_json_object_is_refused,
    a_namespace_that_is_a_file_is_refused,
    a_namespace_that_is_missing_is_refused,
    the_hosts_own_namespace_is_refused,
    an_interface_name_of_16_bytes_is_refused,
    a_gateway_outside_of_the_subnet_is_refused,
    ranges_that_overlap_are_refused_with_both,
    a_prev_result_that_is_none_is_refused,
    an_ipam_plugin_that_is_missing_is_named,
    an_ipam_plugin_with_a_path_is_refused,
    a_read_only_data_folder_is_an_io_error,
    a_full_disk_leaves_nothing,
    unknown_cni_args_need_permission,
];

fn wrong_types_are_named(t: &Bed) -> Result {
    let wrong = [
        ("mtu", json!("big")),
        ("isGateway", json!("yes")),
        ("bridge", json!(7)),
        ("vlan", json!("abc")),
        ("vlanTrunk", json!("abc")),
        ("hairpinMode", json!(1)),
        ("ipam", json!("host-local")),
        ("dns", json!([1])),
    ];
    for (key, value) in wrong {
        let mut conf = t.conf(&[SUBNET]);
        conf[key] = value.clone();
        let (code, msg) = t.refused(&conf)?;
        ensure!(code == 6 || code == 7, "{key}: {code} {msg}");
        ensure!(msg.contains(key), "{key}: the message does not name it: {msg}");
        let said = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        let said = value.is_array() || msg.contains(&said);
        ensure!(said, "{key}: the message does not say {value}: {msg}");
    }
    Ok(())
}

fn wrong_values_are_named(t: &Bed) -> Result {
    let wrong = [
        (json!({"bridge": "a-name-of-more-than-15"}), "a-name-of-more-than-15"),
        (json!({"mtu": -5}), "-5"),
        (json!({"vlan": 5000}), "5000"),
        (json!({"runtimeConfig": {"mac": "zz:zz"}}), "zz:zz"),
        (json!({"ipam": {"ranges": [[{"subnet": "10.88.0.0/99"}]]}}), "10.88.0.0/99"),
        (json!({"ipam": {"ranges": [[{"subnet": "nonsense"}]]}}), "nonsense"),
        (json!({"ipam": {"routes": [{"dst": "1.2.3.4/77"}]}}), "1.2.3.4/77"),
        (
            json!({"ipam": {"ranges": [[{"subnet": SUBNET, "rangeStart": "10.88.1.1"}]]}}),
            "10.88.1.1",
        ),
        (json!({"ipam": {"ranges": [[{"subnet": SUBNET, "rangeEnd": "x"}]]}}), "x"),
    ];
    for (keys, value) in wrong {
        let mut conf = t.conf(&[SUBNET]);
        merge(&mut conf, keys.clone());
        let (code, msg) = t.refused(&conf).with_context(|| keys.to_string())?;
        ensure!([2, 6, 7].contains(&code), "{keys}: {code} {msg}");
        ensure!(msg.contains(value), "{keys}: the message does not have {value}: {msg}");
    }
    Ok(())
}

/// ADD with this on stdin.
fn add(t: &Bed, stdin: &[u8]) -> Result<(u64, String)> {
    let pod = t.pod()?;
    let failure = t.raw("bridge", &borrowed(&t.variables("ADD", &pod)), stdin)?.failure()?;
    t.clean()?;
    Ok(failure)
}

fn ten_megabytes_are_refused_at_once(t: &Bed) -> Result {
    let mut conf = t.conf(&[SUBNET]);
    conf["padding"] = json!("x".repeat(10 << 20));
    let text = conf.to_string();
    let begun = Instant::now();
    let (code, msg) = add(t, text.as_bytes())?;
    ensure!(code == 6 && msg.len() < 1000, "{code} {}", msg.len());
    // A hundredth of a second on a machine of its own; the bound is for one that is busy.
    ensure!(begun.elapsed() < Duration::from_secs(60), "took {:?}", begun.elapsed());
    Ok(())
}

fn what_is_no_json_object_is_refused(t: &Bed) -> Result {
    for text in ["", "[]", "null", "7", "{", "\"x\"", "\u{0}", "{}{}"] {
        let (code, msg) = add(t, text.as_bytes()).with_context(|| text.to_owned())?;
        ensure!(code == 6, "{text:?}: {code} {msg}");
    }
    Ok(())
}

/// ADD into this namespace.
fn into(t: &Bed, netns: &str) -> Result<(u64, String)> {
    let variables = [("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", netns)];
    let failure = t.call("bridge", "ADD", &variables, &t.conf(&[SUBNET]))?.failure()?;
    t.clean()?;
    Ok(failure)
}

fn a_namespace_that_is_a_file_is_refused(t: &Bed) -> Result {
    let file = t.state.path().join("file");
    std::fs::write(&file, "")?;
    let path = file.to_str().context("path")?;
    let (_, msg) = into(t, path)?;
    ensure!(msg.contains(path), "{msg}");
    Ok(())
}

fn a_namespace_that_is_missing_is_refused(t: &Bed) -> Result {
    let (_, msg) = into(t, "/nowhere/netns")?;
    ensure!(msg.contains("/nowhere/netns"), "{msg}");
    Ok(())
}

fn the_hosts_own_namespace_is_refused(t: &Bed) -> Result {
    let (code, msg) = into(t, "/proc/self/ns/net")?;
    ensure!(code == 8 || code == 4, "{code} {msg}");
    Ok(())
}

fn an_interface_name_of_16_bytes_is_refused(t: &Bed) -> Result {
    let pod = t.pod()?;
    let netns = pod.path();
    let name = "interface-is-16b";
    let variables = [("CNI_CONTAINERID", "a"), ("CNI_IFNAME", name), ("CNI_NETNS", &netns)];
    let (code, msg) = t.call("bridge", "ADD", &variables, &t.conf(&[SUBNET]))?.failure()?;
    ensure!(code == 4 && msg.contains(name), "{code} {msg}");
    t.clean()
}

fn a_gateway_outside_of_the_subnet_is_refused(t: &Bed) -> Result {
    let mut conf = t.conf(&[SUBNET]);
    conf["ipam"]["ranges"] = json!([[{"subnet": SUBNET, "gateway": "10.99.0.1"}]]);
    let (code, msg) = t.refused(&conf)?;
    ensure!(code == 7 && msg.contains("10.99.0.1"), "{code} {msg}");
    Ok(())
}

fn ranges_that_overlap_are_refused_with_both(t: &Bed) -> Result {
    let mut conf = t.conf(&[SUBNET, "10.88.0.128/25"]);
    let (code, msg) = t.refused(&conf)?;
    ensure!(code == 7 && msg.contains("overlap"), "{code} {msg}");
    ensure!(msg.contains("10.88.0.1") && msg.contains("10.88.0.129"), "{msg}");
    conf["runtimeConfig"] = json!({"ipRanges": [[{"subnet": SUBNET}]]});
    t.refused(&conf).map(drop)
}

fn a_prev_result_that_is_none_is_refused(t: &Bed) -> Result {
    for prev in [json!("x"), json!([]), json!({"cniVersion": "9.9.9"}), json!({"ips": 7})] {
        let mut conf = t.conf(&[SUBNET]);
        conf["prevResult"] = prev.clone();
        t.refused(&conf).with_context(|| prev.to_string())?;
        // DEL works with what it gets.
        t.del(&t.pod()?, &conf).with_context(|| prev.to_string())?;
    }
    Ok(())
}

fn an_ipam_plugin_that_is_missing_is_named(t: &Bed) -> Result {
    let (_, msg) = t.refused(&t.conf_with(json!({"ipam": {"type": "no-such-ipam"}})))?;
    ensure!(msg.contains("no-such-ipam"), "{msg}");
    Ok(())
}

fn an_ipam_plugin_with_a_path_is_refused(t: &Bed) -> Result {
    let (_, msg) = t.refused(&t.conf_with(json!({"ipam": {"type": "../bin/true"}})))?;
    ensure!(msg.contains("../bin/true"), "{msg}");
    Ok(())
}

/// ADD with the data folder on a file system of its own; returns the failure, if it is one, and what is on it after.
fn on_file_system(t: &Bed, options: &str) -> Result<(Option<(u64, String)>, String)> {
    let folder = t.state.path().join("leases");
    std::fs::create_dir_all(&folder)?;
    let folder = folder.to_str().context("path")?;
    let script = format!(
        "mount -t tmpfs -o {options} none {folder} && \"$0\"; s=$?; find {folder} -type f >&2; exit $s"
    );
    let pod = t.pod()?;
    let stdin = t.conf(&[SUBNET]).to_string();
    let variables = t.variables("ADD", &pod);
    let reply = t.raw_under(
        &["unshare", "-m", "sh", "-c", &script],
        "bridge",
        &borrowed(&variables),
        stdin.as_bytes(),
    )?;
    if reply.ok {
        return Ok((None, reply.stderr));
    }
    ensure!(pod.eth0()?.is_none() && t.veths()?.is_empty(), "{options}: a link is left");
    Ok((Some(reply.failure()?), reply.stderr))
}

fn a_read_only_data_folder_is_an_io_error(t: &Bed) -> Result {
    let (failure, _) = on_file_system(t, "ro")?;
    let (code, msg) = failure.context("ADD succeeded without a lease")?;
    ensure!(code == 5 && msg.contains("leases"), "{code} {msg}");
    Ok(())
}

fn a_full_disk_leaves_nothing(t: &Bed) -> Result {
    let mut failures = 0;
    // Room for a few pages and a few files: it ends at another step each time.
    let sizes = ["size=4k", "size=8k", "size=12k", "size=16k"].into_iter().map(str::to_owned);
    for options in sizes.chain((2..9).map(|files| format!("nr_inodes={files}"))) {
        let (failure, left) = on_file_system(t, &options)?;
        let Some((code, msg)) = failure else { break };
        failures += 1;
        ensure!(code == 5, "{options}: {code} {msg}");
        ensure!(!left.contains("/10.88.0."), "{options}: a lease is left: {left}");
    }
    ensure!(failures >= 2, "only {failures} failures");
    Ok(())
}

fn unknown_cni_args_need_permission(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let pod = t.pod()?;
    for args in ["FOO=bar", "nonsense", "=x"] {
        t.with_args("ADD", &pod, args, &conf)?.failure().with_context(|| args.to_owned())?;
        t.clean()?;
    }
    t.with_args("ADD", &pod, "IgnoreUnknown=true;FOO=bar", &conf)?.success().map(drop)
}
