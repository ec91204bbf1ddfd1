//! The points that make a plugin conformant, asked of `bridge` with `host-local`, and of those that stand behind it: the
//! protocol, ADD, DEL and chains. CHECK, GC and STATUS are in `upkeep.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use tests_conformance::{Bed, Result, SUBNET, borrowed, ip, with_result};
use tests_netns::{Pod, address, connect};

use super::{Row, rows};

pub(crate) const ROWS: &[Row] = rows![
    p01_missing_variables_are_all_named,
    p01_empty_variables_are_missing,
    p01_optional_variables_may_be_absent,
    p01_a_call_without_command_talks_to_people_only,
    p02_container_ids_have_a_syntax,
    p02_interface_names_have_a_syntax,
    p02_network_names_have_a_syntax,
    p03_every_verb_knows_its_versions,
    p03_unknown_versions_are_refused,
    p03_an_absent_version_is_0_1_0,
    p03_version_lists_all_of_them,
    p04_results_are_those_of_the_version_asked_for,
    p04_results_of_the_first_versions_have_one_address_per_family,
    p05_stdout_has_one_document_or_nothing,
    p05_every_verb_says_one_document_or_nothing,
    p06_an_interface_that_exists_is_an_error_without_residue,
    p06_a_failure_at_any_step_leaves_nothing,
    p07_del_is_repeatable_and_may_come_first,
    p07_del_does_without_a_namespace,
    p07_del_does_without_prev_result,
    p07_del_after_a_reboot_frees_the_lease,
    p11_what_came_before_in_the_chain_survives,
    p11_unknown_fields_of_the_previous_result_survive,
    p11_unknown_fields_of_the_configuration_are_no_error,
    p12_thirty_adds_at_once_make_one_bridge_and_thirty_addresses,
    p12_adds_and_dels_at_once_lose_nothing,
];

/// A call with some variables left out.
fn without(t: &Bed, command: &str, missing: &[&str], conf: &Value) -> Result<(u64, String)> {
    let pod = t.pod()?;
    let mut variables = t.variables(command, &pod);
    variables.retain(|(name, _)| !missing.contains(name));
    t.raw("bridge", &borrowed(&variables), conf.to_string().as_bytes())?.failure()
}

fn p01_missing_variables_are_all_named(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let required: [(&str, &[&str]); 4] = [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"]),
        ("GC", &["CNI_PATH"]),
    ];
    for (command, names) in required {
        let each = names.iter().map(std::slice::from_ref);
        for missing in each.chain([names]) {
            let (code, msg) = without(t, command, missing, &conf)?;
            ensure!(code == 4, "{command} without {missing:?}: {code} {msg}");
            for name in missing {
                ensure!(msg.contains(name), "{command}: {msg} does not name {name}");
            }
        }
    }
    let reply = t.raw("bridge", &[("CNI_COMMAND", "FROB")], b"{}")?;
    ensure!(reply.failure()?.0 == 4, "{reply:?}");
    t.clean()
}

fn p01_empty_variables_are_missing(t: &Bed) -> Result {
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"] {
        let (code, msg) = with(t, name, "")?;
        ensure!(code == 4 && msg.contains(name), "{name}: {code} {msg}");
    }
    t.clean()
}

fn p01_optional_variables_may_be_absent(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let pod = t.pod()?;
    let stdin = conf.to_string();
    // Neither has CNI_ARGS, and DEL has no CNI_NETNS.
    let reply = t.raw("bridge", &borrowed(&t.variables("ADD", &pod)), stdin.as_bytes())?;
    ensure!(reply.ok, "{reply:?}");
    let mut variables = t.variables("DEL", &pod);
    variables.retain(|(name, _)| *name != "CNI_NETNS");
    let reply = t.raw("bridge", &borrowed(&variables), stdin.as_bytes())?;
    ensure!(reply.ok, "{reply:?}");
    let reply = t.raw("bridge", &[("CNI_COMMAND", "VERSION")], b"{\"cniVersion\":\"1.0.0\"}")?;
    ensure!(reply.ok, "{reply:?}");
    let leases = t.leases()?;
    ensure!(leases.is_empty(), "DEL without a namespace left {leases:?}");
    Ok(())
}

fn p01_a_call_without_command_talks_to_people_only(t: &Bed) -> Result {
    let reply = t.raw("bridge", &[], b"")?;
    ensure!(!reply.ok && !reply.stderr.is_empty(), "{reply:?}");
    Ok(())
}

/// ADD with one variable changed.
fn with(t: &Bed, name: &str, value: &str) -> Result<(u64, String)> {
    let pod = t.pod()?;
    let mut variables = t.variables("ADD", &pod);
    variables.retain(|(other, _)| *other != name);
    let mut variables = borrowed(&variables);
    variables.push((name, value));
    t.raw("bridge", &variables, t.conf(&[SUBNET]).to_string().as_bytes())?.failure()
}

fn p02_container_ids_have_a_syntax(t: &Bed) -> Result {
    for id in ["_a", ".a", "-a", "a/b", "a b", "a:b", "ä", "../a"] {
        let (code, msg) = with(t, "CNI_CONTAINERID", id)?;
        ensure!(code == 4, "{id:?}: {code} {msg}");
    }
    let pod = Pod { id: "A0_.-z".to_owned(), netns: tests_netns::new_netns()? };
    t.add(&pod, &t.conf(&[SUBNET])).map(drop)
}

fn p02_interface_names_have_a_syntax(t: &Bed) -> Result {
    for name in ["interface-is-16b", ".", "..", "a/b", "a:b", "a b", "a\tb"] {
        let (code, msg) = with(t, "CNI_IFNAME", name)?;
        ensure!(code == 4, "{name:?}: {code} {msg}");
    }
    t.clean()
}

fn p02_network_names_have_a_syntax(t: &Bed) -> Result {
    for name in [json!("_a"), json!("a/b"), json!("../a"), json!(""), json!("a b"), Value::Null] {
        let mut conf = t.conf(&[SUBNET]);
        conf["name"] = name.clone();
        let (code, msg) = t.refused(&conf)?;
        ensure!(code == 7, "{name}: {code} {msg}");
    }
    Ok(())
}

fn p03_every_verb_knows_its_versions(t: &Bed) -> Result {
    let all = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    for version in all {
        let mut conf = t.conf(&[SUBNET]);
        conf["cniVersion"] = json!(version);
        let pod = t.pod()?;
        let result = t.add(&pod, &conf).with_context(|| format!("ADD {version}"))?;
        let check = t.attachment("CHECK", &pod, &with_result(&conf, &result))?;
        let status = t.call("bridge", "STATUS", &[], &conf)?;
        let gc = t.gc(&[&pod], &conf)?;
        for (verb, answer, since) in
            [("CHECK", check, "0.4.0"), ("STATUS", status, "1.1.0"), ("GC", gc, "1.1.0")]
        {
            if version >= since {
                answer.success().with_context(|| format!("{verb} {version}"))?;
            } else {
                let (code, msg) = answer.failure().with_context(|| format!("{verb} {version}"))?;
                ensure!(code == 1, "{verb} {version}: {code} {msg}");
            }
        }
        t.del(&pod, &conf).with_context(|| format!("DEL {version}"))?;
    }
    t.clean()
}

fn p03_unknown_versions_are_refused(t: &Bed) -> Result {
    for version in ["9.9.9", "1.2.0", "1", "latest"] {
        let mut conf = t.conf(&[SUBNET]);
        conf["cniVersion"] = json!(version);
        let (code, msg) = t.refused(&conf)?;
        ensure!(code == 1 && msg.contains(version), "{version}: {code} {msg}");
    }
    Ok(())
}

fn p03_an_absent_version_is_0_1_0(t: &Bed) -> Result {
    let mut conf = t.conf(&[SUBNET]);
    conf.as_object_mut().context("object")?.shift_remove("cniVersion");
    let answer = t.attachment("ADD", &t.pod()?, &conf)?;
    if answer.ok {
        ensure!(answer.document["ip4"]["ip"].is_string(), "{}", answer.document);
    } else {
        ensure!(answer.failure()?.0 == 1, "an old version is spoken or refused");
    }
    Ok(())
}

fn p03_version_lists_all_of_them(t: &Bed) -> Result {
    let reply = t.raw("bridge", &[("CNI_COMMAND", "VERSION")], b"{\"cniVersion\":\"0.4.0\"}")?;
    let document = reply.document()?;
    let supported = document["supportedVersions"].as_array().context("supportedVersions")?;
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        ensure!(supported.contains(&json!(version)), "{version} is missing: {document}");
    }
    ensure!(document["cniVersion"] == "0.4.0", "the version of the input: {document}");
    Ok(())
}

fn p04_results_are_those_of_the_version_asked_for(t: &Bed) -> Result {
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let mut conf = t.conf(&[SUBNET, "fd88::/64"]);
        conf["cniVersion"] = json!(version);
        let result = t.add(&t.pod()?, &conf)?;
        ensure!(result["cniVersion"] == version, "{result}");
        let families: Vec<&Value> =
            result["ips"].as_array().context("ips")?.iter().map(|ip| &ip["version"]).collect();
        let want: [Value; 2] =
            if version < "1.0.0" { [json!("4"), json!("6")] } else { [Value::Null, Value::Null] };
        ensure!(families == want.iter().collect::<Vec<_>>(), "{result}");
        ensure!(result["interfaces"][0]["mtu"].is_u64() == (version == "1.1.0"), "{result}");
        ensure!(
            result["interfaces"][0].get("mtu").is_none() || version == "1.1.0",
            "a field of a later version: {result}"
        );
    }
    Ok(())
}

fn p04_results_of_the_first_versions_have_one_address_per_family(t: &Bed) -> Result {
    for version in ["0.1.0", "0.2.0"] {
        let mut conf = t.conf(&[SUBNET, "fd88::/64"]);
        conf["cniVersion"] = json!(version);
        let result = t.add(&t.pod()?, &conf)?;
        ensure!(result["cniVersion"] == version, "{result}");
        for (family, begins) in [("ip4", "10.88.0."), ("ip6", "fd88::")] {
            let ip = result[family]["ip"].as_str().context("no address")?;
            ensure!(ip.starts_with(begins), "{result}");
            ensure!(result[family]["gateway"].is_string(), "{result}");
            ensure!(result[family]["routes"].as_array().map(Vec::len) == Some(1), "{result}");
        }
        for later in ["ips", "interfaces", "routes"] {
            ensure!(result.get(later).is_none(), "{later} came later: {result}");
        }
    }
    Ok(())
}

fn p05_stdout_has_one_document_or_nothing(t: &Bed) -> Result {
    let pod = t.pod()?;
    let conf = t.conf(&[SUBNET]);
    let stdin = conf.to_string();
    let call = |command: &str, stdin: &str| {
        t.raw("bridge", &borrowed(&t.variables(command, &pod)), stdin.as_bytes())
    };
    let added = call("ADD", &stdin)?;
    ensure!(added.ok && added.document()?.is_object(), "{added:?}");
    let refused = call("ADD", &stdin)?;
    ensure!(refused.document()?["code"].is_u64(), "{refused:?}");
    ensure!(refused.document()?["cniVersion"] == conf["cniVersion"], "{refused:?}");
    let checked = call("CHECK", &with_result(&conf, &added.document()?).to_string())?;
    ensure!(checked.ok && checked.stdout.is_empty(), "{checked:?}");
    let deleted = call("DEL", &stdin)?;
    ensure!(deleted.ok && deleted.stdout.is_empty(), "{deleted:?}");
    let undecodable = call("ADD", "{\"cniVersion\": ")?;
    ensure!(undecodable.failure()?.0 == 6, "{undecodable:?}");
    Ok(())
}

fn p05_every_verb_says_one_document_or_nothing(t: &Bed) -> Result {
    let mut good = t.conf(&[SUBNET]);
    good["cniVersion"] = json!("1.1.0");
    good["cni.dev/valid-attachments"] = json!([]);
    let mut bad = good.clone();
    bad["bridge"] = json!("a-name-of-more-than-15");
    bad["ipam"]["ranges"] = json!([[{"subnet": "nonsense"}]]);
    for command in ["STATUS", "GC"] {
        let variables = t.variables(command, &t.pod()?);
        let reply = t.raw("bridge", &borrowed(&variables), good.to_string().as_bytes())?;
        ensure!(reply.ok && reply.stdout.is_empty(), "{command}: {reply:?}");
    }
    for command in ["ADD", "CHECK", "STATUS"] {
        let variables = t.variables(command, &t.pod()?);
        let reply = t.raw("bridge", &borrowed(&variables), bad.to_string().as_bytes())?;
        let (_, msg) = reply.failure().with_context(|| command.to_owned())?;
        ensure!(!msg.is_empty(), "{command} does not say what is wrong");
    }
    let reply = t.raw("bridge", &[("CNI_COMMAND", "VERSION")], b"{\"cniVersion\":\"1.1.0\"}")?;
    ensure!(reply.ok && reply.document()?.is_object(), "{reply:?}");
    Ok(())
}

fn p06_an_interface_that_exists_is_an_error_without_residue(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let pod = t.pod()?;
    let first = t.add(&pod, &conf)?;
    let other = Pod { id: "other".to_owned(), netns: pod.netns };
    t.attachment("ADD", &other, &conf)?.failure()?;
    let (veths, leases) = (t.veths()?.len(), t.leases()?.len());
    ensure!((veths, leases) == (1, 1), "{veths} veths and {leases} leases");
    connect(&t.host, &other.netns, address(&first, 0)?)?;
    Ok(())
}

/// Makes the n-th system call of a kind fail, for every n there is.
fn p06_a_failure_at_any_step_leaves_nothing(t: &Bed) -> Result {
    if Command::new("strace").arg("-V").output().is_err() {
        eprintln!("skipped: strace is not installed");
        return Ok(());
    }
    let conf = t.conf(&[SUBNET]);
    // The first one makes the bridge and the folders, which stay.
    let first = t.pod()?;
    t.add(&first, &conf)?;
    t.del(&first, &conf)?;
    let log = t.state.path().join("strace");
    let path = log.to_str().context("path")?;
    let stdin = conf.to_string();
    let mut failed = 0;
    for call in ["sendto", "sendmsg", "setns", "linkat", "link", "rename", "renameat", "flock"] {
        for at in 1..60 {
            let inject = format!("inject={call}:error=ENOBUFS:when={at}");
            let observer =
                ["strace", "-f", "-qq", "-e", &format!("trace={call}"), "-e", &inject, "-o", path];
            let pod = t.pod()?;
            let variables = t.variables("ADD", &pod);
            let reply =
                t.raw_under(&observer, "bridge", &borrowed(&variables), stdin.as_bytes())?;
            // strace counts by thread: an undo in another one may have failed as well, and then DEL is to finish it.
            let injected = fs::read_to_string(&log)?.matches("INJECTED").count();
            let step = format!("{call} {at}");
            if injected != 1 || reply.ok {
                t.del(&pod, &conf).with_context(|| step.clone())?;
            }
            if injected == 0 {
                break;
            }
            if !reply.ok {
                failed += 1;
                ensure!(pod.eth0()?.is_none(), "{step}: eth0 left");
            }
            t.clean().with_context(|| format!("{step}: {reply:?}"))?;
        }
    }
    ensure!(failed >= 5, "only {failed} steps failed");
    Ok(())
}

fn p07_del_is_repeatable_and_may_come_first(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let pod = t.pod()?;
    t.del(&pod, &conf).context("before ADD")?;
    let result = t.add(&pod, &conf)?;
    for time in ["first", "second"] {
        t.del(&pod, &with_result(&conf, &result)).context(time)?;
    }
    ensure!(pod.eth0()?.is_none(), "eth0 is left");
    t.clean()
}

fn p07_del_does_without_a_namespace(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"ipMasq": true}));
    for netns in ["", "/nowhere/netns"] {
        let pod = t.pod()?;
        t.add(&pod, &conf)?;
        let id = pod.id.clone();
        drop(pod);
        let variables =
            [("CNI_CONTAINERID", id.as_str()), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", netns)];
        t.call("bridge", "DEL", &variables, &conf)?
            .success()
            .with_context(|| format!("{netns:?}"))?;
        let leases = t.leases()?;
        ensure!(leases.is_empty(), "{netns:?}: {leases:?}");
        let rules = t.nft("list ruleset")?;
        ensure!(!rules.contains(&id), "rules of the pod are left: {rules}");
    }
    Ok(())
}

fn p07_del_does_without_prev_result(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let pod = t.pod()?;
    t.add(&pod, &conf)?;
    t.del(&pod, &conf)?;
    ensure!(pod.eth0()?.is_none(), "eth0 is left");
    t.clean()
}

fn p07_del_after_a_reboot_frees_the_lease(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let pod = t.pod()?;
    let result = t.add(&pod, &conf)?;
    // What a reboot takes: links, rules, namespaces. What it leaves: files.
    t.netlink.delete_link(t.port()?.index)?;
    t.netlink.delete_link(t.bridge()?.index)?;
    let id = pod.id.clone();
    drop(pod);
    let variables = [
        ("CNI_CONTAINERID", id.as_str()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/var/run/netns/gone"),
    ];
    t.call("bridge", "DEL", &variables, &with_result(&conf, &result))?.success()?;
    t.clean()
}

fn p11_what_came_before_in_the_chain_survives(t: &Bed) -> Result {
    let pod = t.pod()?;
    let mut conf = t.conf_with(json!({"type": "loopback"}));
    conf["prevResult"] = json!({
        "cniVersion": t.version,
        "interfaces": [{"name": "foreign0", "mac": "02:00:00:00:00:09", "sandbox": pod.path()}],
        "ips": [{"address": "192.0.2.9/24", "interface": 0}],
        "routes": [{"dst": "198.51.100.0/24"}],
        "dns": {"nameservers": ["192.0.2.53"]},
    });
    let variables = [
        ("CNI_CONTAINERID", pod.id.clone()),
        ("CNI_NETNS", pod.path()),
        ("CNI_IFNAME", "lo".to_owned()),
    ];
    let result = t.call("loopback", "ADD", &borrowed(&variables), &conf)?.success()?;
    for (list, key, value) in [
        ("interfaces", "name", "foreign0"),
        ("ips", "address", "192.0.2.9/24"),
        ("routes", "dst", "198.51.100.0/24"),
    ] {
        let there = result[list].as_array().into_iter().flatten().any(|one| one[key] == value);
        ensure!(there, "{list} lost {value}: {result}");
    }
    ensure!(result["dns"]["nameservers"] == json!(["192.0.2.53"]), "{result}");
    Ok(())
}

/// Each plugin that stands behind another one hands on what it does not know: a later one may.
fn p11_unknown_fields_of_the_previous_result_survive(t: &Bed) -> Result {
    let base = t.conf(&[SUBNET]);
    for plugin in ["loopback", "portmap", "bandwidth", "firewall", "tuning"] {
        if !t.plugins.join(plugin).exists() {
            eprintln!("skipped: there is no {plugin}");
            continue;
        }
        let pod = t.pod()?;
        let mut prev = t.add(&pod, &base)?;
        prev["example.org/one"] = json!({"a": [1]});
        prev["interfaces"][2]["example.org/two"] = json!("b");
        prev["ips"][0]["example.org/three"] = json!(7);
        let mut conf = json!({
            "cniVersion": base["cniVersion"], "name": "net", "type": plugin, "prevResult": prev,
        });
        if plugin == "tuning" {
            conf["dataDir"] = json!(t.state.path().join("tuning"));
        }
        let variables = t.variables("ADD", &pod);
        let mut variables = borrowed(&variables);
        if plugin == "loopback" {
            variables.retain(|(name, _)| *name != "CNI_IFNAME");
            variables.push(("CNI_IFNAME", "lo"));
        }
        let result = t.call(plugin, "ADD", &variables, &conf)?.success()?;
        ensure!(result["example.org/one"] == prev["example.org/one"], "{plugin}: {result}");
        ensure!(result["interfaces"][2]["example.org/two"] == "b", "{plugin}: {result}");
        ensure!(result["ips"][0]["example.org/three"] == 7, "{plugin}: {result}");
    }
    Ok(())
}

fn p11_unknown_fields_of_the_configuration_are_no_error(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"cni.dev/x": [1], "unknown": {"a": null}, "keyA": "b"}));
    t.add(&t.pod()?, &conf).map(drop)
}

/// Starts one call for each pod at once and returns the results of those that answered with one.
fn at_once(t: &Bed, calls: &[(&str, &Pod)], conf: &Value) -> Result<Vec<Value>> {
    let mut children = Vec::new();
    for (command, pod) in calls {
        children.push(t.start("bridge", &borrowed(&t.variables(command, pod)), conf)?);
    }
    let mut results = Vec::new();
    for child in children {
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("one of {} failed: {}", calls.len(), String::from_utf8_lossy(&output.stdout));
        }
        if !output.stdout.is_empty() {
            results.push(serde_json::from_slice(&output.stdout)?);
        }
    }
    Ok(results)
}

fn p12_thirty_adds_at_once_make_one_bridge_and_thirty_addresses(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"ipMasq": true}));
    let pods: Vec<Pod> = (0..30).map(|_| t.pod()).collect::<Result<_>>()?;
    let calls: Vec<(&str, &Pod)> = pods.iter().map(|pod| ("ADD", pod)).collect();
    let results = at_once(t, &calls, &conf)?;
    let ips: BTreeSet<_> =
        results.iter().map(|result| address(result, 0)).collect::<Result<_>>()?;
    ensure!(ips.len() == 30, "{} addresses", ips.len());
    let bridges = t.netlink.links()?.into_iter().filter(|link| link.name == "cni0").count();
    ensure!(bridges == 1 && t.veths()?.len() == 30, "{bridges} bridges, {:?}", t.veths()?.len());
    let macs: BTreeSet<String> =
        results.iter().map(|result| result["interfaces"][0]["mac"].to_string()).collect();
    ensure!(macs.len() == 1, "the bridge changed its MAC: {macs:?}");
    for (pod, result) in pods.iter().zip(&results) {
        connect(&t.host, &pod.netns, address(result, 0)?)?;
    }
    let calls: Vec<(&str, &Pod)> = pods.iter().map(|pod| ("DEL", pod)).collect();
    at_once(t, &calls, &conf)?;
    t.clean()
}

fn p12_adds_and_dels_at_once_lose_nothing(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"ipMasq": true, "macspoofchk": true}));
    let mut here: Vec<Pod> = Vec::new();
    for _ in 0..3 {
        let coming: Vec<Pod> = (0..8).map(|_| t.pod()).collect::<Result<_>>()?;
        let adds = coming.iter().map(|pod| ("ADD", pod));
        let calls: Vec<_> = adds.chain(here.iter().map(|pod| ("DEL", pod))).collect();
        let results = at_once(t, &calls, &conf)?;
        ensure!(t.leases()?.len() == 8 && t.veths()?.len() == 8, "{:?}", t.leases()?);
        for result in &results {
            ensure!(t.leases()?.contains(&address(result, 0)?), "lost {result}");
        }
        here = coming;
        let outside = ip("10.88.0.1")?;
        for pod in &here {
            connect(&pod.netns, &t.host, outside)?;
        }
    }
    let calls: Vec<(&str, &Pod)> = here.iter().map(|pod| ("DEL", pod)).collect();
    at_once(t, &calls, &conf)?;
    t.clean()
}
