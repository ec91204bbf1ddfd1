//! `host-local`: one row per option of the reference plugin, its files, and what its own tests ask.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tests_conformance::{Bed, Result, borrowed, foreign, ip, with_result};
use tests_netns::{Answer, Pod, address};

use super::{Row, rows};

/// Where Debian puts the reference plugins.
const REFERENCE: &str = "/usr/lib/cni";

pub(crate) const ROWS: &[Row] = rows![
    ranges_give_one_address_per_set,
    ranges_of_one_set_are_used_one_after_the_other,
    ranges_of_two_families_in_a_set_are_refused,
    ranges_that_overlap_are_refused,
    a_single_range_at_the_top_comes_first,
    results_of_0_2_0_have_one_address_per_family,
    routes_are_copied,
    resolv_conf_is_read,
    data_dir_is_used,
    data_dir_has_a_default,
    ip_ranges_of_the_runtime_come_first,
    requested_addresses_come_from_three_places,
    requested_addresses_may_be_of_several_sets,
    a_requested_address_in_use_is_refused,
    a_requested_address_out_of_range_is_refused,
    a_requested_gateway_is_refused,
    every_requested_address_has_to_be_usable,
    subnet_is_required,
    subnet_with_host_bits_is_refused,
    subnets_without_room_are_refused,
    gateway_is_the_first_host_address_and_never_given,
    gateway_may_be_another_one,
    range_start_and_end_bound_the_addresses,
    a_range_that_ends_before_it_starts_is_refused,
    broadcast_is_not_given,
    files_are_those_of_the_reference,
    addresses_are_given_in_turn,
    the_same_attachment_twice_is_an_error,
    calls_wait_for_the_lock_of_the_folder,
    a_second_interface_of_a_container_has_its_own_lease,
    del_frees_and_is_repeatable,
    del_of_an_unknown_container_succeeds,
    del_frees_a_lease_of_an_old_file_form,
    del_reads_files_with_white_space,
    an_empty_lease_file_is_reclaimed,
    a_full_range_names_range_and_count_and_del_makes_room,
    check_needs_the_lease,
    gc_frees_what_is_not_valid,
    status_is_50_when_full,
    nothing_is_said_on_stderr_at_first_use,
    leases_of_the_reference_and_ours_are_one,
];

/// `host-local` on its own.
fn conf(t: &Bed, ipam: Value) -> Value {
    let mut conf = json!({
        "cniVersion": t.version, "name": "net", "type": "host-local",
        "ipam": {"type": "host-local", "dataDir": t.state.path().join("leases")},
    });
    tests_conformance::merge(&mut conf["ipam"], ipam);
    conf
}

fn one(t: &Bed, subnet: &str) -> Value {
    conf(t, json!({"ranges": [[{"subnet": subnet}]]}))
}

/// An attachment without a namespace behind it: nobody looks there.
fn call(t: &Bed, command: &str, id: &str, ifname: &str, conf: &Value) -> Result<Answer> {
    let variables =
        [("CNI_CONTAINERID", id), ("CNI_NETNS", "/nowhere/netns"), ("CNI_IFNAME", ifname)];
    t.call("host-local", command, &variables, conf)
}

fn add(t: &Bed, id: &str, conf: &Value) -> Result<Value> {
    call(t, "ADD", id, "eth0", conf)?.success()
}

fn del(t: &Bed, id: &str, conf: &Value) -> Result {
    call(t, "DEL", id, "eth0", conf)?.success().map(drop)
}

fn refused(t: &Bed, conf: &Value) -> Result<(u64, String)> {
    let failure = call(t, "ADD", "refused", "eth0", conf)?.failure()?;
    let leases = t.leases()?;
    ensure!(leases.is_empty(), "left {leases:?} after {failure:?}");
    Ok(failure)
}

fn given(result: &Value) -> Vec<&str> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.filter_map(|ip| ip["address"].as_str()).collect()
}

fn ranges_give_one_address_per_set(t: &Bed) -> Result {
    let ranges = json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd01::/64"}]]);
    let result = add(t, "a", &conf(t, json!({"ranges": ranges})))?;
    ensure!(given(&result) == ["10.1.0.2/24", "fd01::2/64"], "{result}");
    ensure!(result["ips"][1]["gateway"] == "fd01::1", "{result}");
    ensure!(result.get("interfaces").is_none(), "IPAM has no interfaces: {result}");
    Ok(())
}

fn ranges_of_one_set_are_used_one_after_the_other(t: &Bed) -> Result {
    let set = json!([{"subnet": "10.1.0.0/30"}, {"subnet": "10.2.0.0/30"}]);
    let conf = conf(t, json!({"ranges": [set]}));
    let (a, b) = (add(t, "a", &conf)?, add(t, "b", &conf)?);
    ensure!(given(&a) == ["10.1.0.2/30"] && given(&b) == ["10.2.0.2/30"], "{a} {b}");
    Ok(())
}

fn ranges_of_two_families_in_a_set_are_refused(t: &Bed) -> Result {
    let set = json!([{"subnet": "10.1.0.0/24"}, {"subnet": "fd01::/64"}]);
    refused(t, &conf(t, json!({"ranges": [set]}))).map(drop)
}

fn ranges_that_overlap_are_refused(t: &Bed) -> Result {
    let (a, b) = (json!({"subnet": "10.1.0.0/16"}), json!({"subnet": "10.1.2.0/24"}));
    for ranges in [json!([[a, b]]), json!([[a], [b]])] {
        let (_, msg) = refused(t, &conf(t, json!({"ranges": ranges})))?;
        ensure!(msg.contains("overlap"), "{msg}");
    }
    Ok(())
}

fn a_single_range_at_the_top_comes_first(t: &Bed) -> Result {
    let ipam = json!({
        "subnet": "10.3.0.0/24", "rangeStart": "10.3.0.9", "gateway": "10.3.0.254",
        "ranges": [[{"subnet": "10.4.0.0/24"}]],
    });
    let result = add(t, "a", &conf(t, ipam))?;
    ensure!(given(&result) == ["10.3.0.9/24", "10.4.0.2/24"], "{result}");
    ensure!(result["ips"][0]["gateway"] == "10.3.0.254", "{result}");
    Ok(())
}

fn results_of_0_2_0_have_one_address_per_family(t: &Bed) -> Result {
    let two = json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "10.2.0.0/24"}]]);
    let mut conf = conf(t, json!({"ranges": two}));
    conf["cniVersion"] = json!("0.2.0");
    refused(t, &conf)?;
    conf["ipam"]["ranges"] = json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd01::/64"}]]);
    let result = add(t, "a", &conf)?;
    ensure!(
        result["ip4"]["ip"] == "10.1.0.2/24" && result["ip6"]["ip"] == "fd01::2/64",
        "{result}"
    );
    Ok(())
}

fn routes_are_copied(t: &Bed) -> Result {
    let routes = json!([{"dst": "0.0.0.0/0"}, {"dst": "192.0.2.0/24", "gw": "10.1.0.9"}]);
    let mut conf = one(t, "10.1.0.0/24");
    conf["ipam"]["routes"] = routes.clone();
    let result = add(t, "a", &conf)?;
    ensure!(result["routes"] == routes, "{result}");
    Ok(())
}

fn resolv_conf_is_read(t: &Bed) -> Result {
    let path = t.state.path().join("resolv.conf");
    let text =
        "# a comment\ndomain a.b\nsearch b c\nnameserver 192.0.2.53\noptions ndots:5 edns0\n";
    fs::write(&path, text)?;
    let mut conf = one(t, "10.1.0.0/24");
    conf["ipam"]["resolvConf"] = json!(path);
    let result = add(t, "a", &conf)?;
    let want = json!({
        "nameservers": ["192.0.2.53"], "domain": "a.b", "search": ["b", "c"],
        "options": ["ndots:5", "edns0"],
    });
    ensure!(result["dns"] == want, "{result}");
    Ok(())
}

fn data_dir_is_used(t: &Bed) -> Result {
    add(t, "a", &one(t, "10.1.0.0/24"))?;
    ensure!(t.lease_folder().join("10.1.0.2").is_file(), "no file in dataDir/<network>");
    Ok(())
}

fn data_dir_has_a_default(t: &Bed) -> Result {
    let mut conf = one(t, "10.1.0.0/24");
    conf["ipam"]["dataDir"] = Value::Null;
    let script =
        "mount -t tmpfs none /var/lib && \"$0\" && cat /var/lib/cni/networks/net/10.1.0.2 >&2";
    let variables = [
        ("CNI_COMMAND", "ADD".to_owned()),
        ("CNI_CONTAINERID", "a".to_owned()),
        ("CNI_NETNS", "/nowhere/netns".to_owned()),
        ("CNI_IFNAME", "eth0".to_owned()),
        ("CNI_PATH", t.plugins.display().to_string()),
    ];
    let stdin = conf.to_string();
    let observer = ["unshare", "-m", "sh", "-c", script];
    let reply = t.raw_under(&observer, "host-local", &borrowed(&variables), stdin.as_bytes())?;
    ensure!(reply.ok && reply.stderr.contains("eth0"), "{reply:?}");
    Ok(())
}

fn ip_ranges_of_the_runtime_come_first(t: &Bed) -> Result {
    let mut conf = one(t, "10.1.0.0/24");
    conf["runtimeConfig"] = json!({"ipRanges": [[{"subnet": "10.9.0.0/24"}]]});
    let result = add(t, "a", &conf)?;
    ensure!(given(&result) == ["10.9.0.2/24", "10.1.0.2/24"], "{result}");
    Ok(())
}

fn requested_addresses_come_from_three_places(t: &Bed) -> Result {
    let base = one(t, "10.1.0.0/24");
    let pod = Pod { id: "args".into(), netns: tests_netns::new_netns()? };
    let result = t.with_args("ADD", &pod, "IgnoreUnknown=1;IP=10.1.0.33", &base)?.success()?;
    ensure!(given(&result) == ["10.1.0.33/24"], "CNI_ARGS: {result}");
    let mut conf = base.clone();
    conf["args"] = json!({"cni": {"ips": ["10.1.0.44"]}});
    let result = add(t, "b", &conf)?;
    ensure!(given(&result) == ["10.1.0.44/24"], "args.cni.ips: {result}");
    let mut conf = base;
    conf["runtimeConfig"] = json!({"ips": ["10.1.0.55/24"]});
    let result = add(t, "c", &conf)?;
    ensure!(given(&result) == ["10.1.0.55/24"], "runtimeConfig.ips: {result}");
    Ok(())
}

fn requested_addresses_may_be_of_several_sets(t: &Bed) -> Result {
    let ranges = json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd01::/64"}]]);
    let mut conf = conf(t, json!({"ranges": ranges}));
    conf["args"] = json!({"cni": {"ips": ["fd01::77", "10.1.0.77"]}});
    let result = add(t, "a", &conf)?;
    ensure!(given(&result) == ["10.1.0.77/24", "fd01::77/64"], "{result}");
    Ok(())
}

fn every_requested_address_has_to_be_usable(t: &Bed) -> Result {
    // Both are in the one set, which gives one.
    let mut conf = one(t, "10.1.0.0/24");
    conf["runtimeConfig"] = json!({"ips": ["10.1.0.7", "10.1.0.8"]});
    refused(t, &conf)?;
    conf["runtimeConfig"] = json!({"ips": ["10.1.0.7", "192.0.2.1"]});
    let (_, msg) = refused(t, &conf)?;
    ensure!(msg.contains("192.0.2.1"), "{msg}");
    Ok(())
}

fn requesting(t: &Bed, ip: &str) -> Value {
    let mut conf = one(t, "10.1.0.0/24");
    conf["runtimeConfig"] = json!({"ips": [ip]});
    conf
}

fn a_requested_address_in_use_is_refused(t: &Bed) -> Result {
    let conf = requesting(t, "10.1.0.7");
    add(t, "a", &conf)?;
    let (_, msg) = call(t, "ADD", "b", "eth0", &conf)?.failure()?;
    ensure!(msg.contains("10.1.0.7"), "{msg}");
    ensure!(t.leases()?.len() == 1, "left a lease");
    Ok(())
}

fn a_requested_address_out_of_range_is_refused(t: &Bed) -> Result {
    for ip in ["192.0.2.1", "10.1.0.255", "10.1.1.1"] {
        let (_, msg) = refused(t, &requesting(t, ip))?;
        ensure!(msg.contains(ip), "{msg}");
    }
    Ok(())
}

fn a_requested_gateway_is_refused(t: &Bed) -> Result {
    let (_, msg) = refused(t, &requesting(t, "10.1.0.1"))?;
    ensure!(msg.contains("gateway") || msg.contains("10.1.0.1"), "{msg}");
    Ok(())
}

fn subnet_is_required(t: &Bed) -> Result {
    refused(t, &conf(t, json!({})))?;
    refused(t, &conf(t, json!({"ranges": [[{"rangeStart": "10.1.0.1"}]]})))?;
    refused(t, &conf(t, json!({"ranges": [[]]}))).map(drop)
}

fn subnet_with_host_bits_is_refused(t: &Bed) -> Result {
    let (_, msg) = refused(t, &one(t, "10.1.0.7/24"))?;
    ensure!(msg.contains("10.1.0."), "{msg}");
    Ok(())
}

fn subnets_without_room_are_refused(t: &Bed) -> Result {
    for subnet in ["10.1.0.0/31", "10.1.0.0/32", "fd01::/127", "fd01::/128"] {
        refused(t, &one(t, subnet)).with_context(|| subnet.to_owned())?;
    }
    Ok(())
}

fn gateway_is_the_first_host_address_and_never_given(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/30");
    let result = add(t, "a", &conf)?;
    ensure!(given(&result) == ["10.1.0.2/30"], "{result}");
    ensure!(result["ips"][0]["gateway"] == "10.1.0.1", "{result}");
    call(t, "ADD", "b", "eth0", &conf)?.failure().map(drop)
}

fn gateway_may_be_another_one(t: &Bed) -> Result {
    let range = json!({"subnet": "10.1.0.0/29", "gateway": "10.1.0.3"});
    let conf = conf(t, json!({"ranges": [[range]]}));
    let mut all = Vec::new();
    for id in ["a", "b", "c", "d", "e"] {
        let result = add(t, id, &conf)?;
        ensure!(result["ips"][0]["gateway"] == "10.1.0.3", "{result}");
        all.push(address(&result, 0)?);
    }
    ensure!(!all.contains(&ip("10.1.0.3")?) && all.contains(&ip("10.1.0.1")?), "{all:?}");
    Ok(())
}

fn range_start_and_end_bound_the_addresses(t: &Bed) -> Result {
    let range =
        json!({"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.10", "rangeEnd": "10.1.0.12"});
    let conf = conf(t, json!({"ranges": [[range]]}));
    let mut all = Vec::new();
    for id in ["a", "b", "c"] {
        all.push(address(&add(t, id, &conf)?, 0)?);
    }
    let want: Vec<IpAddr> = ["10.1.0.10", "10.1.0.11", "10.1.0.12"]
        .iter()
        .map(|text| ip(text))
        .collect::<Result<_>>()?;
    ensure!(all == want, "{all:?}");
    call(t, "ADD", "d", "eth0", &conf)?.failure().map(drop)
}

fn a_range_that_ends_before_it_starts_is_refused(t: &Bed) -> Result {
    let range = json!({"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.5"});
    let (_, msg) = refused(t, &conf(t, json!({"ranges": [[range]]})))?;
    ensure!(msg.contains("10.1.0.9") || msg.contains("10.1.0.5"), "{msg}");
    Ok(())
}

fn broadcast_is_not_given(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/29");
    for id in ["a", "b", "c", "d", "e"] {
        let ip = address(&add(t, id, &conf)?, 0)?;
        ensure!(ip != tests_conformance::ip("10.1.0.7")?, "gave the broadcast address");
    }
    call(t, "ADD", "f", "eth0", &conf)?.failure().map(drop)
}

fn files_are_those_of_the_reference(t: &Bed) -> Result {
    add(t, "a", &one(t, "10.1.0.0/24"))?;
    let folder = t.lease_folder();
    let text = fs::read_to_string(folder.join("10.1.0.2"))?;
    ensure!(text == "a\r\neth0", "{text:?}");
    let last = fs::read_to_string(folder.join("last_reserved_ip.0"))?;
    ensure!(last == "10.1.0.2", "{last:?}");
    ensure!(folder.join("lock").exists(), "no lock");
    Ok(())
}

fn addresses_are_given_in_turn(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/29");
    let mut all = Vec::new();
    for id in ["a", "b", "c", "d", "e", "f", "g"] {
        all.push(address(&add(t, id, &conf)?, 0)?.to_string());
        del(t, id, &conf)?;
    }
    let last: Vec<&str> = all.iter().filter_map(|ip| ip.rsplit('.').next()).collect();
    ensure!(last == ["2", "3", "4", "5", "6", "2", "3"], "{last:?}");
    Ok(())
}

fn the_same_attachment_twice_is_an_error(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/24");
    add(t, "a", &conf)?;
    call(t, "ADD", "a", "eth0", &conf)?.failure()?;
    ensure!(t.leases()?.len() == 1, "a second lease");
    Ok(())
}

fn calls_wait_for_the_lock_of_the_folder(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/24");
    add(t, "a", &conf)?;
    let lock = fs::File::options().write(true).open(t.lease_folder().join("lock"))?;
    lock.lock()?;
    let variables = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "b"),
        ("CNI_NETNS", "/nowhere/netns"),
        ("CNI_IFNAME", "eth0"),
    ];
    let mut child = t.start("host-local", &variables, &conf)?;
    // One that does not wait is done in a few milliseconds.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let early = child.try_wait()?;
    ensure!(early.is_none() && t.leases()?.len() == 1, "it did not wait: {early:?}");
    lock.unlock()?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success() && t.leases()?.len() == 2, "{output:?}");
    Ok(())
}

fn a_second_interface_of_a_container_has_its_own_lease(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/24");
    add(t, "a", &conf)?;
    call(t, "ADD", "a", "eth1", &conf)?.success()?;
    call(t, "DEL", "a", "eth1", &conf)?.success()?;
    ensure!(t.leases()? == [ip("10.1.0.2")?], "{:?}", t.leases()?);
    Ok(())
}

fn del_frees_and_is_repeatable(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/24");
    add(t, "a", &conf)?;
    for _ in 0..2 {
        del(t, "a", &conf)?;
    }
    ensure!(t.leases()?.is_empty(), "{:?}", t.leases()?);
    Ok(())
}

fn del_of_an_unknown_container_succeeds(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/24");
    del(t, "unknown", &conf)?;
    add(t, "a", &conf)?;
    del(t, "unknown", &conf)?;
    ensure!(t.leases()?.len() == 1, "freed another one's lease");
    Ok(())
}

/// Puts a lease there as somebody else might have written it.
fn plant(t: &Bed, ip: &str, text: &str) -> Result {
    fs::create_dir_all(t.lease_folder())?;
    Ok(fs::write(t.lease_folder().join(ip), text)?)
}

fn del_frees_a_lease_of_an_old_file_form(t: &Bed) -> Result {
    // Before interfaces were written, a lease was its container's.
    plant(t, "10.1.0.2", "a")?;
    del(t, "a", &one(t, "10.1.0.0/24"))?;
    ensure!(t.leases()?.is_empty(), "{:?}", t.leases()?);
    Ok(())
}

fn del_reads_files_with_white_space(t: &Bed) -> Result {
    plant(t, "10.1.0.2", " a \r\n eth0 \r\n")?;
    del(t, "a", &one(t, "10.1.0.0/24"))?;
    ensure!(t.leases()?.is_empty(), "{:?}", t.leases()?);
    Ok(())
}

fn an_empty_lease_file_is_reclaimed(t: &Bed) -> Result {
    // The reference makes the file before it writes it; killed in between, it leaves this.
    plant(t, "10.1.0.2", "")?;
    let result = add(t, "a", &one(t, "10.1.0.0/30"))?;
    ensure!(given(&result) == ["10.1.0.2/30"], "{result}");
    Ok(())
}

fn a_full_range_names_range_and_count_and_del_makes_room(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/29");
    for id in ["a", "b", "c", "d", "e"] {
        add(t, id, &conf)?;
    }
    let (code, msg) = call(t, "ADD", "f", "eth0", &conf)?.failure()?;
    del(t, "c", &conf)?;
    add(t, "f", &conf)?;
    ensure!(code >= 100 && msg.contains("10.1.0.1") && msg.contains('5'), "{code} {msg}");
    Ok(())
}

fn check_needs_the_lease(t: &Bed) -> Result {
    let conf = one(t, "10.1.0.0/24");
    let result = add(t, "a", &conf)?;
    call(t, "CHECK", "a", "eth0", &with_result(&conf, &result))?.success()?;
    fs::remove_file(t.lease_folder().join("10.1.0.2"))?;
    call(t, "CHECK", "a", "eth0", &with_result(&conf, &result))?.failure()?;
    // Somebody else's address is no better than none.
    plant(t, "10.1.0.2", "b\r\neth0")?;
    call(t, "CHECK", "a", "eth0", &with_result(&conf, &result))?.failure().map(drop)
}

fn gc_frees_what_is_not_valid(t: &Bed) -> Result {
    let mut conf = one(t, "10.1.0.0/24");
    conf["cniVersion"] = json!("1.1.0");
    for id in ["a", "b", "c"] {
        add(t, id, &conf)?;
    }
    plant(t, "10.1.0.9", "")?;
    conf["cni.dev/valid-attachments"] = json!([{"containerID": "b", "ifname": "eth0"}]);
    for _ in 0..2 {
        t.call("host-local", "GC", &[], &conf)?.success()?;
        ensure!(t.leases()? == [ip("10.1.0.3")?], "{:?}", t.leases()?);
    }
    Ok(())
}

fn status_is_50_when_full(t: &Bed) -> Result {
    let mut conf = one(t, "10.1.0.0/30");
    conf["cniVersion"] = json!("1.1.0");
    t.call("host-local", "STATUS", &[], &conf)?.success()?;
    add(t, "a", &conf)?;
    let (code, msg) = t.call("host-local", "STATUS", &[], &conf)?.failure()?;
    ensure!(code == 50, "{code} {msg}");
    Ok(())
}

fn nothing_is_said_on_stderr_at_first_use(t: &Bed) -> Result {
    let answer = call(t, "ADD", "a", "eth0", &one(t, "10.1.0.0/24"))?;
    ensure!(answer.ok && answer.stderr.is_empty(), "{answer:?}");
    Ok(())
}

/// A node may be switched to ours with containers running, and back.
fn leases_of_the_reference_and_ours_are_one(t: &Bed) -> Result {
    let reference = Path::new(REFERENCE).join("host-local");
    let usable = fs::metadata(&reference).is_ok_and(|meta| meta.permissions().mode() & 0o111 != 0);
    if foreign().is_some() || !usable {
        eprintln!("skipped: needs ours under test and the reference in {REFERENCE}");
        return Ok(());
    }
    let mut conf = one(t, "10.1.0.0/24");
    conf["cniVersion"] = json!("1.0.0");
    let stdin = conf.to_string();
    let reference = |command: &str, id: &str| {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", "/nowhere/netns"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", REFERENCE),
        ];
        t.raw_under(&["env"], &format!("{REFERENCE}/host-local"), &variables, stdin.as_bytes())
    };
    add(t, "ours", &conf)?;
    let theirs = reference("ADD", "theirs")?;
    ensure!(given(&theirs.document()?) == ["10.1.0.3/24"], "{theirs:?}");
    let third = add(t, "third", &conf)?;
    ensure!(given(&third) == ["10.1.0.4/24"], "{third}");
    ensure!(reference("DEL", "ours")?.ok, "their DEL of our lease");
    del(t, "theirs", &conf)?;
    ensure!(t.leases()? == [ip("10.1.0.4")?], "{:?}", t.leases()?);
    ensure!(reference("DEL", "third")?.ok && t.leases()?.is_empty(), "{:?}", t.leases()?);
    Ok(())
}
