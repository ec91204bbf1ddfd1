//! `static`: the reference plugin's options, and what `bridge` makes of its answers.

use anyhow::ensure;
use serde_json::{Value, json};
use tests_conformance::{Bed, Result, merge, with_result};
use tests_netns::{Answer, Pod, connect};

use super::{Row, rows};

pub(crate) const ROWS: &[Row] = rows![
    addresses_gateways_routes_and_dns_are_given,
    cni_args_add_addresses_and_gateways,
    args_of_the_runtime_replace_the_addresses,
    an_address_without_prefix_is_refused,
    results_of_0_2_0_have_one_address_per_family,
    check_needs_the_addresses_in_the_result,
    del_gc_and_status_succeed_and_say_nothing,
    bridge_gives_the_pod_what_it_says,
];

fn conf(t: &Bed, keys: Value) -> Value {
    let mut conf = json!({
        "cniVersion": t.version, "name": "net", "type": "static",
        "ipam": {"type": "static", "addresses": [
            {"address": "10.88.0.5/24", "gateway": "10.88.0.1"},
            {"address": "fd88::5/64"},
        ]},
    });
    merge(&mut conf, keys);
    conf
}

fn call(t: &Bed, command: &str, args: &str, conf: &Value) -> Result<Answer> {
    let pod = Pod { id: "a".to_owned(), netns: tests_netns::new_netns()? };
    t.with_args(command, &pod, args, conf)
}

/// Addresses with their gateways.
fn given(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.map(|ip| match (ip["address"].as_str(), ip["gateway"].as_str()) {
        (Some(address), Some(gateway)) => format!("{address} {gateway}"),
        (address, _) => address.unwrap_or_default().to_owned(),
    })
    .collect()
}

fn addresses_gateways_routes_and_dns_are_given(t: &Bed) -> Result {
    let routes = json!([{"dst": "0.0.0.0/0"}, {"dst": "192.0.2.0/24", "gw": "10.88.0.9"}]);
    let dns = json!({"nameservers": ["192.0.2.53"], "domain": "a.b", "search": ["b"]});
    let keys = json!({"ipam": {"routes": routes, "dns": dns}});
    let result = call(t, "ADD", "", &conf(t, keys))?.success()?;
    ensure!(given(&result) == ["10.88.0.5/24 10.88.0.1", "fd88::5/64"], "{result}");
    ensure!(result["routes"] == routes && result["dns"] == dns, "{result}");
    ensure!(result.get("interfaces").is_none(), "IPAM has no interfaces: {result}");
    Ok(())
}

fn cni_args_add_addresses_and_gateways(t: &Bed) -> Result {
    // The configuration's own gateway stays.
    let args = "IP=10.89.0.5/24,fd89::5/64;GATEWAY=10.89.0.1,fd89::1,10.88.0.254";
    let result = call(t, "ADD", args, &conf(t, json!({})))?.success()?;
    let want =
        ["10.88.0.5/24 10.88.0.1", "fd88::5/64", "10.89.0.5/24 10.89.0.1", "fd89::5/64 fd89::1"];
    ensure!(given(&result) == want, "{result}");
    Ok(())
}

fn args_of_the_runtime_replace_the_addresses(t: &Bed) -> Result {
    let own = json!({"args": {"cni": {"ips": ["10.90.0.5/24"]}}});
    let result = call(t, "ADD", "", &conf(t, own.clone()))?.success()?;
    ensure!(given(&result) == ["10.90.0.5/24"], "args.cni.ips: {result}");
    let mut both = conf(t, own);
    both["runtimeConfig"] = json!({"ips": ["10.91.0.5/24", "fd91::5/64"]});
    let result = call(t, "ADD", "", &both)?.success()?;
    ensure!(given(&result) == ["10.91.0.5/24", "fd91::5/64"], "runtimeConfig.ips: {result}");
    Ok(())
}

fn an_address_without_prefix_is_refused(t: &Bed) -> Result {
    for (args, keys) in [
        ("IP=10.88.0.7", json!({})),
        ("", json!({"ipam": {"addresses": [{"address": "10.88.0.7"}]}})),
        ("", json!({"args": {"cni": {"ips": ["10.88.0.7"]}}})),
        ("", json!({"runtimeConfig": {"ips": ["10.88.0.7"]}})),
        ("GATEWAY=10.88.0.7x", json!({})),
    ] {
        let (_, msg) = call(t, "ADD", args, &conf(t, keys))?.failure()?;
        ensure!(msg.contains("10.88.0.7"), "{args}: {msg}");
    }
    Ok(())
}

fn results_of_0_2_0_have_one_address_per_family(t: &Bed) -> Result {
    let old = conf(t, json!({"cniVersion": "0.2.0"}));
    let result = call(t, "ADD", "", &old)?.success()?;
    let (four, six) = (&result["ip4"], &result["ip6"]);
    ensure!(four["ip"] == "10.88.0.5/24" && six["ip"] == "fd88::5/64", "{result}");
    call(t, "ADD", "IP=10.89.0.5/24", &old)?.failure().map(drop)
}

fn check_needs_the_addresses_in_the_result(t: &Bed) -> Result {
    let conf = conf(t, json!({}));
    let result = call(t, "ADD", "", &conf)?.success()?;
    call(t, "CHECK", "", &with_result(&conf, &result))?.success()?;
    // What other plugins added is theirs.
    let mut more = result.clone();
    more["ips"]
        .as_array_mut()
        .into_iter()
        .for_each(|ips| ips.push(json!({"address": "192.0.2.9/24"})));
    call(t, "CHECK", "", &with_result(&conf, &more))?.success()?;
    let mut other = result.clone();
    other["ips"][0]["address"] = json!("10.88.0.6/24");
    call(t, "CHECK", "", &with_result(&conf, &other))?.failure()?;
    let mut other = result;
    other["ips"][0]["gateway"] = json!("10.88.0.254");
    call(t, "CHECK", "", &with_result(&conf, &other))?.failure().map(drop)
}

fn del_gc_and_status_succeed_and_say_nothing(t: &Bed) -> Result {
    let mut conf = conf(t, json!({"cniVersion": "1.1.0"}));
    for _ in 0..2 {
        let answer = call(t, "DEL", "", &conf)?.success()?;
        ensure!(answer.is_null(), "{answer}");
    }
    conf["cni.dev/valid-attachments"] = json!([]);
    for command in ["GC", "STATUS"] {
        let answer = t.call("static", command, &[], &conf)?.success()?;
        ensure!(answer.is_null(), "{command}: {answer}");
    }
    Ok(())
}

fn bridge_gives_the_pod_what_it_says(t: &Bed) -> Result {
    let mut conf = conf(t, json!({"type": "bridge", "bridge": "cni0", "isDefaultGateway": true}));
    let (a, b) = (t.pod()?, t.pod()?);
    let result = t.add(&a, &conf)?;
    conf["runtimeConfig"] = json!({"ips": ["10.88.0.6/24"]});
    t.add(&b, &conf)?;
    connect(&a.netns, &t.host, "10.88.0.1".parse()?)?;
    connect(&a.netns, &b.netns, "10.88.0.6".parse()?)?;
    connect(&a.netns, &t.host, "fd88::1".parse()?)?;
    conf["runtimeConfig"] = Value::Null;
    t.attachment("CHECK", &a, &with_result(&conf, &result))?.success()?;
    for pod in [&a, &b] {
        t.del(pod, &conf)?;
    }
    t.clean()
}
