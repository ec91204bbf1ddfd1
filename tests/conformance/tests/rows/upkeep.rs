//! CHECK, GC and STATUS: points 8 to 10 of those that make a plugin conformant.

use std::fs;

use anyhow::{Context as _, ensure};
use cni_netlink::{AddressOptions, Netlink, Route};
use serde_json::{Value, json};
use tests_conformance::{Bed, Result, with_result};
use tests_netns::{Pod, address, connect, gateway};

use super::{Row, rows};

pub(crate) const ROWS: &[Row] = rows![
    p08_check_accepts_what_add_made,
    p08_check_needs_prev_result,
    p08_check_finds_link_gone,
    p08_check_finds_link_down,
    p08_check_finds_another_mac,
    p08_check_finds_address_gone,
    p08_check_finds_route_gone,
    p08_check_finds_port_off_the_bridge,
    p08_check_finds_masquerade_gone,
    p08_check_finds_port_mapping_gone,
    p08_check_bears_what_later_plugins_add,
    p09_gc_keeps_what_is_valid_and_removes_the_rest,
    p09_gc_is_repeatable_and_bears_unknown_ids,
    p09_gc_without_a_list_is_refused,
    p09_gc_goes_on_past_errors,
    p09_gc_frees_leases_of_namespaces_that_are_gone,
    p10_status_is_0_when_add_could_work,
    p10_status_is_50_when_the_pool_is_full,
    p10_status_is_50_when_the_ipam_plugin_is_missing,
    p10_status_is_51_when_the_overlay_is_broken,
];

/// An attachment, and CHECK of it.
struct Checked<'a> {
    t: &'a Bed,
    pod: Pod,
    conf: Value,
    result: Value,
}

impl<'a> Checked<'a> {
    fn new(t: &'a Bed) -> Result<Self> {
        let conf = t.conf_with(json!({"ipMasq": true}));
        let pod = t.pod()?;
        let result = t.add(&pod, &conf)?;
        let checked = Self { t, pod, conf, result };
        checked.good()?;
        Ok(checked)
    }

    fn answer(&self) -> Result<tests_netns::Answer> {
        self.t.attachment("CHECK", &self.pod, &with_result(&self.conf, &self.result))
    }

    fn good(&self) -> Result {
        self.answer()?.success().map(drop)
    }

    fn bad(&self) -> Result {
        self.answer()?.failure().map(drop)
    }

    fn inside(&self) -> Result<(Netlink, u32)> {
        let index = self.pod.eth0()?.context("eth0")?.index;
        Ok((Netlink::open_in(&self.pod.netns)?, index))
    }
}

fn p08_check_accepts_what_add_made(t: &Bed) -> Result {
    Checked::new(t).map(drop)
}

fn p08_check_needs_prev_result(t: &Bed) -> Result {
    let checked = Checked::new(t)?;
    t.attachment("CHECK", &checked.pod, &checked.conf)?.failure().map(drop)
}

fn p08_check_finds_link_gone(t: &Bed) -> Result {
    let checked = Checked::new(t)?;
    t.netlink.delete_link(t.port()?.index)?;
    checked.bad()
}

fn p08_check_finds_link_down(t: &Bed) -> Result {
    let checked = Checked::new(t)?;
    let (inside, eth0) = checked.inside()?;
    inside.set_down(eth0)?;
    checked.bad()
}

fn p08_check_finds_another_mac(t: &Bed) -> Result {
    let checked = Checked::new(t)?;
    let (inside, eth0) = checked.inside()?;
    inside.set_mac(eth0, [2, 0, 0, 0, 0, 0x77])?;
    checked.bad()
}

fn p08_check_finds_address_gone(t: &Bed) -> Result {
    let checked = Checked::new(t)?;
    let (inside, eth0) = checked.inside()?;
    let text = checked.result["ips"][0]["address"].as_str().context("address")?;
    inside.delete_address(eth0, text.parse()?)?;
    checked.bad()
}

fn p08_check_finds_route_gone(t: &Bed) -> Result {
    let checked = Checked::new(t)?;
    let (inside, eth0) = checked.inside()?;
    let via = Some(gateway(&checked.result)?);
    inside.delete_route(&Route { via, link: Some(eth0), ..Route::default() })?;
    checked.bad()
}

fn p08_check_finds_port_off_the_bridge(t: &Bed) -> Result {
    let checked = Checked::new(t)?;
    t.netlink.set_master(t.port()?.index, None)?;
    checked.bad()
}

fn p08_check_finds_masquerade_gone(t: &Bed) -> Result {
    let checked = Checked::new(t)?;
    t.nft("flush ruleset")?;
    checked.bad()
}

fn p08_check_finds_port_mapping_gone(t: &Bed) -> Result {
    let checked = Checked::new(t)?;
    let mut mapped = json!({
        "cniVersion": checked.conf["cniVersion"], "name": "net", "type": "portmap",
        "runtimeConfig": {"portMappings": [
            {"hostPort": 28_080, "containerPort": 80, "protocol": "tcp"},
        ]},
        "prevResult": checked.result,
    });
    mapped["prevResult"] = t.add(&checked.pod, &mapped)?;
    t.attachment("CHECK", &checked.pod, &mapped)?.success()?;
    t.nft("flush ruleset")?;
    t.attachment("CHECK", &checked.pod, &mapped)?.failure().map(drop)
}

fn p08_check_bears_what_later_plugins_add(t: &Bed) -> Result {
    let mut checked = Checked::new(t)?;
    let (inside, eth0) = checked.inside()?;
    inside.add_address(eth0, "192.0.2.7/32".parse()?, &AddressOptions::default())?;
    let added = json!({"name": "tun0", "sandbox": checked.pod.path()});
    checked.result["interfaces"].as_array_mut().context("interfaces")?.push(added);
    checked.good()
}

/// Configuration in the version that has GC and STATUS.
fn newest(t: &Bed, keys: Value) -> Value {
    let mut conf = t.conf_with(keys);
    conf["cniVersion"] = json!("1.1.0");
    conf
}

fn p09_gc_keeps_what_is_valid_and_removes_the_rest(t: &Bed) -> Result {
    let conf = newest(t, json!({"ipMasq": true, "macspoofchk": true}));
    let (keep, stale) = (t.pod()?, t.pod()?);
    let kept = t.add(&keep, &conf)?;
    t.add(&stale, &conf)?;
    let mut other = newest(t, json!({"name": "other", "forceAddress": true}));
    other["ipam"]["ranges"] = json!([[{"subnet": "10.89.0.0/24"}]]);
    let stranger = t.pod()?;
    let strange = t.add(&stranger, &other)?;
    t.gc(&[&keep], &conf)?.success()?;
    ensure!(t.leases()? == [address(&kept, 0)?], "{:?}", t.leases()?);
    ensure!(t.veths()?.len() == 2 && stale.eth0()?.is_none(), "{:?}", t.veths()?);
    connect(&t.host, &keep.netns, address(&kept, 0)?)?;
    connect(&t.host, &stranger.netns, address(&strange, 0)?)?;
    t.attachment("CHECK", &keep, &with_result(&conf, &kept))?.success()?;
    t.gc(&[], &conf)?.success()?;
    ensure!(t.leases()?.is_empty() && t.veths()?.len() == 1, "another network's is left alone");
    let rules = t.nft("list ruleset")?.to_lowercase();
    ensure!(!rules.contains("masquerade") && !rules.contains("ether saddr"), "left: {rules}");
    Ok(())
}

fn p09_gc_is_repeatable_and_bears_unknown_ids(t: &Bed) -> Result {
    let conf = newest(t, json!({}));
    let (pod, unknown) = (t.pod()?, t.pod()?);
    t.add(&pod, &conf)?;
    for _ in 0..2 {
        t.gc(&[&pod, &unknown], &conf)?.success()?;
        ensure!((t.veths()?.len(), t.leases()?.len()) == (1, 1), "{:?}", t.veths()?);
    }
    Ok(())
}

fn p09_gc_without_a_list_is_refused(t: &Bed) -> Result {
    let conf = newest(t, json!({}));
    t.add(&t.pod()?, &conf)?;
    // Absent is not empty: somebody forgot to say which ones live.
    let (code, msg) = t.call("bridge", "GC", &[], &conf)?.failure()?;
    ensure!(code == 7, "{code} {msg}");
    ensure!(t.leases()?.len() == 1, "it took the lease all the same");
    let mut old = conf;
    old["cni.dev/attachments"] = json!([]);
    t.call("bridge", "GC", &[], &old)?.success().context("the key's older name")?;
    ensure!(t.leases()?.is_empty(), "{:?}", t.leases()?);
    Ok(())
}

fn p09_gc_goes_on_past_errors(t: &Bed) -> Result {
    let conf = newest(t, json!({}));
    let pod = t.pod()?;
    t.add(&pod, &conf)?;
    let mut broken = conf.clone();
    broken["ipam"]["type"] = json!("no-such-ipam");
    let (_, msg) = t.gc(&[], &broken)?.failure()?;
    ensure!(msg.contains("no-such-ipam"), "{msg}");
    ensure!(t.veths()?.is_empty(), "the link is left");
    t.gc(&[], &conf)?.success()?;
    t.clean()
}

fn p09_gc_frees_leases_of_namespaces_that_are_gone(t: &Bed) -> Result {
    let conf = newest(t, json!({}));
    for _ in 0..3 {
        t.add(&t.pod()?, &conf)?;
    }
    t.gc(&[], &conf)?.success()?;
    let leases = t.leases()?;
    ensure!(leases.is_empty(), "{leases:?}");
    Ok(())
}

fn p10_status_is_0_when_add_could_work(t: &Bed) -> Result {
    let conf = newest(t, json!({"ipMasq": true}));
    let answer = t.call("bridge", "STATUS", &[], &conf)?.success()?;
    ensure!(answer.is_null(), "{answer}");
    t.add(&t.pod()?, &conf)?;
    t.call("bridge", "STATUS", &[], &conf)?.success().map(drop)
}

fn p10_status_is_50_when_the_pool_is_full(t: &Bed) -> Result {
    let mut conf = newest(t, json!({}));
    conf["ipam"]["ranges"] = json!([[{"subnet": "10.88.0.0/30"}]]);
    let pod = t.pod()?;
    t.add(&pod, &conf)?;
    let (code, msg) = t.call("bridge", "STATUS", &[], &conf)?.failure()?;
    ensure!(code == 50, "{code} {msg}");
    t.del(&pod, &conf)?;
    t.call("bridge", "STATUS", &[], &conf)?.success().map(drop)
}

fn p10_status_is_50_when_the_ipam_plugin_is_missing(t: &Bed) -> Result {
    let conf = newest(t, json!({"ipam": {"type": "no-such-ipam"}}));
    let (code, msg) = t.call("bridge", "STATUS", &[], &conf)?.failure()?;
    ensure!(code == 50 && msg.contains("no-such-ipam"), "{code} {msg}");
    Ok(())
}

fn p10_status_is_51_when_the_overlay_is_broken(t: &Bed) -> Result {
    if !t.plugins.join("vxlan").exists() {
        eprintln!("skipped: there is no plugin with an overlay");
        return Ok(());
    }
    let file = t.state.path().join("subnet.env");
    fs::write(
        &file,
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    )?;
    let conf = json!({
        "cniVersion": "1.1.0", "name": "net", "type": "vxlan", "device": "vxlan-orch",
        "subnetFile": file, "dataDir": t.state.path().join("vxlan"),
    });
    let (code, msg) = t.call("vxlan", "STATUS", &[], &conf)?.failure()?;
    ensure!(code == 51 && msg.contains("vxlan-orch"), "{code} {msg}");
    fs::remove_file(&file)?;
    let (code, msg) = t.call("vxlan", "STATUS", &[], &conf)?.failure()?;
    ensure!(code == 50, "without a lease: {code} {msg}");
    Ok(())
}
