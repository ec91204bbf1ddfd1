//! `bridge`: one row per option of the reference plugin, and what its own tests ask.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use cni_netlink::{AddressOptions, Bridge, Netlink, PortVlan, Route, RouteFilter, VethPair};
use serde_json::{Value, json};
use tests_conformance::{
    Bed, Result, SUBNET, addresses, default_routes, ip, merge, sysctl, with_result,
};
use tests_netns::{address, connect, connect_within, gateway};

use super::{Row, rows};

/// How long a connection may take that has to fail.
const SHORT: Duration = Duration::from_millis(400);

pub(crate) const ROWS: &[Row] = rows![
    bridge_is_made_up_and_without_router_advertisements,
    bridge_that_exists_is_used,
    bridge_has_a_default_name,
    bridge_that_is_another_kind_of_link_is_refused,
    is_gateway_puts_the_address_on_the_bridge_and_forwards,
    is_gateway_alone_gives_no_default_route,
    is_default_gateway_gives_a_default_route_per_family,
    is_default_gateway_keeps_the_default_route_of_ipam,
    routes_of_ipam_are_in_the_pod_with_all_their_fields,
    force_address_replaces_what_is_an_error_without_it,
    ip_masq_hides_pods_from_the_outside_alone,
    ip_masq_backend_nftables_is_known,
    ip_masq_backend_iptables_is_known,
    ip_masq_backend_of_another_name_is_refused,
    mtu_is_that_of_bridge_and_both_ends,
    mtu_is_the_kernels_where_none_is_said,
    mtu_is_in_results_of_1_1_0_only,
    hairpin_mode_is_that_of_the_port,
    hairpin_and_promiscuous_exclude_each_other,
    promisc_mode_is_that_of_the_bridge,
    vlan_is_the_ports_own_and_others_are_apart,
    vlan_values_are_bounded,
    vlan_trunk_lists_single_ones_and_ranges,
    vlan_trunk_bounds_come_together_and_in_order,
    preserve_default_vlan_false_takes_vlan_1_away,
    macspoofchk_drops_frames_with_another_mac,
    enabledad_false_skips_duplicate_address_detection,
    enabledad_true_keeps_it,
    enabledad_true_waits_for_it_and_finds_duplicates,
    ipv6_neighbours_find_a_pod_at_once,
    disable_container_interface_leaves_it_down,
    disable_container_interface_excludes_ipam,
    port_isolation_separates_pods_but_not_from_the_gateway,
    no_ipam_is_pure_layer_2,
    dns_of_the_configuration_is_in_the_result,
    dns_of_ipam_is_in_the_result_where_the_configuration_has_none,
    mac_comes_from_three_places_in_this_order,
    mac_of_the_bridge_is_stable,
    several_ranges_give_several_addresses,
    ipv6_alone_works,
    result_names_bridge_host_end_and_container_end,
    port_forwards_when_add_returns,
    forwarding_is_on_for_both_families,
    pod_announces_its_address_when_it_is_used_again,
    pod_after_one_with_a_mac_of_its_own_is_reached_at_once,
];

fn bridge_is_made_up_and_without_router_advertisements(t: &Bed) -> Result {
    t.add(&t.pod()?, &t.conf(&[SUBNET]))?;
    ensure!(t.bridge()?.up, "cni0 is down");
    ensure!(sysctl(&t.host, "ipv6/conf/cni0/accept_ra")? == "0", "accept_ra");
    Ok(())
}

fn bridge_that_exists_is_used(t: &Bed) -> Result {
    let made = Bridge { name: "cni0".into(), up: true, ..Bridge::default() };
    let made = t.netlink.create_bridge(&made)?;
    t.add(&t.pod()?, &t.conf(&[SUBNET]))?;
    ensure!(t.bridge()?.index == made.index, "another bridge");
    ensure!(t.port()?.master == Some(made.index), "not a port of it");
    Ok(())
}

fn bridge_has_a_default_name(t: &Bed) -> Result {
    t.add(&t.pod()?, &t.conf_with(json!({"bridge": null})))?;
    t.bridge().map(drop)
}

fn bridge_that_is_another_kind_of_link_is_refused(t: &Bed) -> Result {
    let pair = VethPair { name: "cni0".into(), peer_name: "other".into(), ..VethPair::default() };
    t.netlink.create_veth(&pair)?;
    let (_, msg) = t.refused(&t.conf(&[SUBNET]))?;
    ensure!(msg.contains("cni0"), "{msg}");
    Ok(())
}

fn is_gateway_puts_the_address_on_the_bridge_and_forwards(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"isDefaultGateway": false, "isGateway": true}));
    let pod = t.pod()?;
    let result = t.add(&pod, &conf)?;
    let seen = addresses(&t.netlink, &t.bridge()?)?;
    ensure!(seen.contains(&"10.88.0.1/24".to_owned()), "{seen:?}");
    ensure!(sysctl(&t.host, "ipv4/ip_forward")? == "1", "ip_forward");
    connect(&pod.netns, &t.host, gateway(&result)?)?;
    Ok(())
}

fn is_gateway_alone_gives_no_default_route(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"isDefaultGateway": false, "isGateway": true}));
    let pod = t.pod()?;
    t.add(&pod, &conf)?;
    let routes = default_routes(&pod.netns)?;
    ensure!(routes.is_empty(), "{routes:?}");
    Ok(())
}

fn is_default_gateway_gives_a_default_route_per_family(t: &Bed) -> Result {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.conf(&[SUBNET, "fd88::/64"]))?;
    let routes = default_routes(&pod.netns)?;
    let via: Vec<String> =
        routes.iter().filter_map(|route| route.via).map(|via| via.to_string()).collect();
    ensure!(via.contains(&"10.88.0.1".to_owned()), "{via:?}");
    ensure!(via.contains(&"fd88::1".to_owned()), "{via:?}");
    ensure!(result["routes"].as_array().map(Vec::len) == Some(2), "{result}");
    Ok(())
}

fn is_default_gateway_keeps_the_default_route_of_ipam(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"ipam": {"routes": [{"dst": "0.0.0.0/0", "gw": "10.88.0.9"}]}}));
    let pod = t.pod()?;
    t.add(&pod, &conf)?;
    let routes = default_routes(&pod.netns)?;
    ensure!(routes.len() == 1 && routes[0].via == Some(ip("10.88.0.9")?), "{routes:?}");
    Ok(())
}

fn routes_of_ipam_are_in_the_pod_with_all_their_fields(t: &Bed) -> Result {
    let routes = json!([
        {"dst": "192.0.2.0/24", "gw": "10.88.0.9", "mtu": 1300, "advmss": 1200, "priority": 77},
        {"dst": "198.51.100.0/24", "table": 100},
        {"dst": "203.0.113.0/24", "scope": 253},
    ]);
    let conf = t.conf_with(json!({"ipam": {"routes": routes}}));
    let pod = t.pod()?;
    let result = t.add(&pod, &conf)?;
    let inside = Netlink::open_in(&pod.netns)?;
    let all = |table| inside.routes(&RouteFilter { table, ..RouteFilter::default() });
    let to = |routes: &[Route], dst: &str| {
        routes.iter().find(|route| route.dst.to_string() == dst).cloned().context(dst.to_owned())
    };
    let (main, own) = (all(None)?, all(Some(100))?);
    let first = to(&main, "192.0.2.0/24")?;
    ensure!(first.via == Some(ip("10.88.0.9")?) && first.metric == Some(77), "{first:?}");
    ensure!((first.mtu, first.advmss) == (Some(1300), Some(1200)), "{first:?}");
    let second = to(&own, "198.51.100.0/24")?;
    ensure!(second.via == Some(gateway(&result)?), "by the gateway: {second:?}");
    let third = to(&main, "203.0.113.0/24")?;
    ensure!(third.via.is_none(), "a route of the link: {third:?}");
    ensure!(result["routes"][0]["mtu"] == 1300, "{result}");
    t.attachment("CHECK", &pod, &with_result(&conf, &result))?.success().map(drop)
}

fn force_address_replaces_what_is_an_error_without_it(t: &Bed) -> Result {
    let made = Bridge { name: "cni0".into(), up: true, ..Bridge::default() };
    let made = t.netlink.create_bridge(&made)?;
    t.netlink.add_address(made.index, "10.88.0.9/24".parse()?, &AddressOptions::default())?;
    let (_, msg) = t.refused(&t.conf(&[SUBNET]))?;
    ensure!(msg.contains("10.88.0.9"), "{msg}");
    t.add(&t.pod()?, &t.conf_with(json!({"forceAddress": true})))?;
    let seen = addresses(&t.netlink, &made)?;
    ensure!(seen.contains(&"10.88.0.1/24".to_owned()), "{seen:?}");
    ensure!(!seen.contains(&"10.88.0.9/24".to_owned()), "{seen:?}");
    Ok(())
}

fn ip_masq_hides_pods_from_the_outside_alone(t: &Bed) -> Result {
    let outside = t.outside("192.0.2.1/24", "192.0.2.2/24")?;
    let conf = t.conf_with(json!({"ipMasq": true}));
    let (a, b) = (t.pod()?, t.pod()?);
    let (ra, rb) = (t.add(&a, &conf)?, t.add(&b, &conf)?);
    let seen = connect(&a.netns, &outside, ip("192.0.2.2")?)?;
    ensure!(seen == ip("192.0.2.1")?, "outside sees {seen}");
    let seen = connect(&a.netns, &b.netns, address(&rb, 0)?)?;
    ensure!(seen == address(&ra, 0)?, "a pod sees {seen}");
    Ok(())
}

fn ip_masq_backend_nftables_is_known(t: &Bed) -> Result {
    masquerades_by(t, "nftables")
}

fn ip_masq_backend_iptables_is_known(t: &Bed) -> Result {
    masquerades_by(t, "iptables")
}

fn masquerades_by(t: &Bed, backend: &str) -> Result {
    let outside = t.outside("192.0.2.1/24", "192.0.2.2/24")?;
    let pod = t.pod()?;
    let conf = t.conf_with(json!({"ipMasq": true, "ipMasqBackend": backend}));
    t.add(&pod, &conf)?;
    let seen = connect(&pod.netns, &outside, ip("192.0.2.2")?)?;
    ensure!(seen == ip("192.0.2.1")?, "outside sees {seen}");
    t.del(&pod, &conf)
}

fn ip_masq_backend_of_another_name_is_refused(t: &Bed) -> Result {
    let (code, msg) = t.refused(&t.conf_with(json!({"ipMasq": true, "ipMasqBackend": "pf"})))?;
    ensure!((code == 2 || code == 7) && msg.contains("pf"), "{code} {msg}");
    Ok(())
}

fn mtu_is_that_of_bridge_and_both_ends(t: &Bed) -> Result {
    let pod = t.pod()?;
    t.add(&pod, &t.conf_with(json!({"mtu": 1400})))?;
    let seen = (t.bridge()?.mtu, t.port()?.mtu, pod.eth0()?.context("eth0")?.mtu);
    ensure!(seen == (1400, 1400, 1400), "{seen:?}");
    Ok(())
}

fn mtu_is_the_kernels_where_none_is_said(t: &Bed) -> Result {
    for mtu in [Value::Null, json!(0)] {
        let pod = t.pod()?;
        let mut conf = t.conf(&[SUBNET]);
        merge(&mut conf, json!({"mtu": mtu}));
        t.add(&pod, &conf)?;
        let seen = (t.port()?.mtu, pod.eth0()?.context("eth0")?.mtu);
        ensure!(seen == (1500, 1500), "mtu {mtu}: {seen:?}");
        t.del(&pod, &conf)?;
    }
    Ok(())
}

fn mtu_is_in_results_of_1_1_0_only(t: &Bed) -> Result {
    for (version, mtu) in [("1.0.0", Value::Null), ("1.1.0", json!(1400))] {
        let conf = t.conf_with(json!({"cniVersion": version, "mtu": 1400}));
        let result = t.add(&t.pod()?, &conf)?;
        ensure!(result["interfaces"][2]["mtu"] == mtu, "{result}");
    }
    Ok(())
}

fn hairpin_mode_is_that_of_the_port(t: &Bed) -> Result {
    let pod = t.pod()?;
    for on in [false, true] {
        let conf = t.conf_with(json!({"hairpinMode": on}));
        t.add(&pod, &conf)?;
        ensure!(t.port()?.port.context("port")?.hairpin == on, "hairpinMode {on}");
        t.del(&pod, &conf)?;
    }
    Ok(())
}

fn hairpin_and_promiscuous_exclude_each_other(t: &Bed) -> Result {
    let (_, msg) = t.refused(&t.conf_with(json!({"hairpinMode": true, "promiscMode": true})))?;
    ensure!(msg.to_lowercase().contains("hairpin"), "{msg}");
    Ok(())
}

fn promisc_mode_is_that_of_the_bridge(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"promiscMode": true}));
    t.add(&t.pod()?, &conf)?;
    ensure!(t.bridge()?.promiscuous, "cni0 is not promiscuous");
    Ok(())
}

/// Whether bridges of this kernel can filter VLANs.
fn has_vlans(t: &Bed) -> Result<bool> {
    let probe = Bridge { name: "probe".into(), vlan_filtering: true, ..Bridge::default() };
    match t.netlink.create_bridge(&probe) {
        Ok(probe) => Ok(t.netlink.delete_link(probe.index).map(|()| true)?),
        Err(error) if error.is_unsupported() => {
            eprintln!("skipped: bridges of this kernel do not filter VLANs");
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

fn vlan_is_the_ports_own_and_others_are_apart(t: &Bed) -> Result {
    if !has_vlans(t)? {
        let (code, msg) = t.refused(&t.conf_with(json!({"vlan": 100})))?;
        ensure!(code == 2 && msg.contains("vlan"), "{code} {msg}");
        return Ok(());
    }
    let pods = [t.pod()?, t.pod()?, t.pod()?];
    let mut ips = Vec::new();
    for (pod, vlan) in pods.iter().zip([100, 100, 200]) {
        let conf = t.conf_with(json!({"vlan": vlan, "isDefaultGateway": false}));
        ips.push(address(&t.add(pod, &conf)?, 0)?);
    }
    let own = |vlans: Vec<PortVlan>| vlans.contains(&PortVlan::access(100));
    ensure!(own(t.netlink.vlans(t.veths()?[0].index)?), "the port is not in VLAN 100");
    connect(&pods[0].netns, &pods[1].netns, ips[1])?;
    ensure!(connect_within(&pods[0].netns, &pods[2].netns, ips[2], SHORT).is_err(), "not apart");
    Ok(())
}

fn vlan_values_are_bounded(t: &Bed) -> Result {
    for vlan in [json!(4095), json!(-1), json!(70000)] {
        let (_, msg) = t.refused(&t.conf_with(json!({"vlan": vlan})))?;
        ensure!(msg.to_lowercase().contains("vlan") && msg.contains(&vlan.to_string()), "{msg}");
    }
    Ok(())
}

fn trunk(list: Value) -> Value {
    json!({"vlanTrunk": list, "isDefaultGateway": false, "ipam": null})
}

fn vlan_trunk_lists_single_ones_and_ranges(t: &Bed) -> Result {
    if !has_vlans(t)? {
        return Ok(());
    }
    let list = json!([{"id": 101}, {"minID": 200, "maxID": 210}]);
    t.add(&t.pod()?, &t.conf_with(trunk(list)))?;
    let vlans = t.netlink.vlans(t.port()?.index)?;
    for id in [101, 200, 205, 210] {
        ensure!(vlans.contains(&PortVlan::tagged(id)), "VLAN {id} is missing: {vlans:?}");
    }
    ensure!(!vlans.iter().any(|vlan| vlan.id == 211), "{vlans:?}");
    Ok(())
}

fn vlan_trunk_bounds_come_together_and_in_order(t: &Bed) -> Result {
    let wrong = [
        json!([{"minID": 10}]),
        json!([{"maxID": 10}]),
        json!([{"minID": 20, "maxID": 10}]),
        json!([{"id": 4095}]),
        json!([{"minID": 10, "maxID": 4095}]),
        json!([{}]),
    ];
    for list in wrong {
        t.refused(&t.conf_with(trunk(list.clone()))).with_context(|| list.to_string())?;
    }
    Ok(())
}

fn preserve_default_vlan_false_takes_vlan_1_away(t: &Bed) -> Result {
    if !has_vlans(t)? {
        return Ok(());
    }
    let pod = t.pod()?;
    // The reference's documentation and code have `true` as the default.
    for (preserve, there) in [(json!(false), false), (json!(true), true), (Value::Null, true)] {
        let mut conf = t.conf_with(json!({"vlan": 100, "isDefaultGateway": false}));
        merge(&mut conf, json!({"preserveDefaultVlan": preserve}));
        t.add(&pod, &conf)?;
        let vlans = t.netlink.vlans(t.port()?.index)?;
        ensure!(vlans.iter().any(|vlan| vlan.id == 1) == there, "{preserve}: {vlans:?}");
        t.del(&pod, &conf)?;
    }
    Ok(())
}

fn macspoofchk_drops_frames_with_another_mac(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"macspoofchk": true}));
    let (a, b) = (t.pod()?, t.pod()?);
    let (ra, _) = (t.add(&a, &conf)?, t.add(&b, &conf)?);
    connect(&b.netns, &a.netns, address(&ra, 0)?)?;
    let inside = Netlink::open_in(&b.netns)?;
    inside.set_mac(b.eth0()?.context("eth0")?.index, [2, 0, 0, 0, 0, 0x66])?;
    let spoofed = connect_within(&b.netns, &a.netns, address(&ra, 0)?, SHORT);
    ensure!(spoofed.is_err(), "a frame with another MAC was let in");
    for pod in [&a, &b] {
        t.del(pod, &conf)?;
    }
    let rules = t.nft("list ruleset")?;
    ensure!(!rules.contains("ether saddr"), "rules left: {rules}");
    Ok(())
}

fn enabledad_false_skips_duplicate_address_detection(t: &Bed) -> Result {
    let conf = t.conf(&["fd88::/64"]);
    let (a, b) = (t.pod()?, t.pod()?);
    t.add(&a, &conf)?;
    let result = t.add(&b, &conf)?;
    ensure!(sysctl(&b.netns, "ipv6/conf/eth0/accept_dad")? == "0", "accept_dad");
    connect_within(&a.netns, &b.netns, address(&result, 0)?, Duration::from_millis(900))?;
    Ok(())
}

fn enabledad_true_keeps_it(t: &Bed) -> Result {
    let pod = t.pod()?;
    let mut conf = t.conf(&["fd88::/64"]);
    conf["enabledad"] = json!(true);
    t.add(&pod, &conf)?;
    ensure!(sysctl(&pod.netns, "ipv6/conf/eth0/accept_dad")? != "0", "accept_dad");
    Ok(())
}

fn enabledad_true_waits_for_it_and_finds_duplicates(t: &Bed) -> Result {
    let mut conf = t.conf(&["fd88::/64"]);
    conf["enabledad"] = json!(true);
    let pod = t.pod()?;
    let result = t.add(&pod, &conf)?;
    let ip = address(&result, 0)?;
    // The kernel lets nobody use an address that is still looked into.
    pod.netns.run(|| -> Result {
        std::net::TcpListener::bind((ip, 80)).context("ADD returned too early")?;
        Ok(())
    })?;
    // Another network on this bridge, by mistake in the same subnet.
    let (mut other, twin) = (conf.clone(), t.pod()?);
    other["name"] = json!("other");
    other["args"] = json!({"cni": {"ips": [ip]}});
    let (_, msg) = t.attachment("ADD", &twin, &other)?.failure()?;
    ensure!(msg.contains("ddress"), "{msg}");
    ensure!(twin.eth0()?.is_none() && t.veths()?.len() == 1, "the twin is left");
    Ok(())
}

/// The kernel joins the group in which neighbours ask for an address some time after it has added the address.
fn ipv6_neighbours_find_a_pod_at_once(_: &Bed) -> Result {
    for round in 0..15 {
        // The first ones of a bridge, where the kernel has most to do.
        let t = Bed::new()?;
        let conf = t.conf(&[SUBNET, "fd88::/64"]);
        let (peer, pod) = (t.pod()?, t.pod()?);
        t.add(&peer, &conf)?;
        let ip = address(&t.add(&pod, &conf)?, 1)?;
        // A question that nobody hears is asked again after a second.
        connect_within(&peer.netns, &pod.netns, ip, Duration::from_millis(900))
            .with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn disable_container_interface_leaves_it_down(t: &Bed) -> Result {
    let pod = t.pod()?;
    let conf = t.conf_with(json!({
        "ipam": null, "isDefaultGateway": false, "disableContainerInterface": true
    }));
    t.add(&pod, &conf)?;
    ensure!(!pod.eth0()?.context("eth0")?.up, "eth0 is up");
    t.del(&pod, &conf)?;
    t.clean()
}

fn disable_container_interface_excludes_ipam(t: &Bed) -> Result {
    let (_, msg) = t.refused(&t.conf_with(json!({"disableContainerInterface": true})))?;
    ensure!(msg.to_lowercase().contains("ipam"), "{msg}");
    Ok(())
}

fn port_isolation_separates_pods_but_not_from_the_gateway(t: &Bed) -> Result {
    let conf = t.conf_with(json!({"portIsolation": true}));
    let (a, b) = (t.pod()?, t.pod()?);
    let (ra, rb) = (t.add(&a, &conf)?, t.add(&b, &conf)?);
    connect(&a.netns, &t.host, gateway(&ra)?)?;
    let between = connect_within(&a.netns, &b.netns, address(&rb, 0)?, SHORT);
    ensure!(between.is_err(), "isolated pods reach each other");
    Ok(())
}

fn no_ipam_is_pure_layer_2(t: &Bed) -> Result {
    let pod = t.pod()?;
    let conf = t.conf_with(json!({"ipam": null, "isDefaultGateway": false}));
    let result = t.add(&pod, &conf)?;
    ensure!(result["ips"].as_array().is_none_or(Vec::is_empty), "{result}");
    let inside = Netlink::open_in(&pod.netns)?;
    let eth0 = pod.eth0()?.context("eth0")?;
    let seen = inside.addresses(eth0.index)?;
    ensure!(eth0.up && !seen.iter().any(ipnetwork::IpNetwork::is_ipv4), "{seen:?}");
    t.del(&pod, &conf)?;
    t.clean()
}

fn dns_of_the_configuration_is_in_the_result(t: &Bed) -> Result {
    let dns =
        json!({"nameservers": ["192.0.2.53"], "domain": "a.b", "search": ["b"], "options": ["x"]});
    let result = t.add(&t.pod()?, &t.conf_with(json!({"dns": dns})))?;
    ensure!(result["dns"] == dns, "{result}");
    Ok(())
}

fn dns_of_ipam_is_in_the_result_where_the_configuration_has_none(t: &Bed) -> Result {
    let path = t.state.path().join("resolv.conf");
    std::fs::write(&path, "nameserver 192.0.2.53\n")?;
    let conf = t.conf_with(json!({"ipam": {"resolvConf": path}}));
    let result = t.add(&t.pod()?, &conf)?;
    ensure!(result["dns"]["nameservers"] == json!(["192.0.2.53"]), "{result}");
    let mut own = conf;
    own["dns"] = json!({"nameservers": ["192.0.2.54"]});
    let result = t.add(&t.pod()?, &own)?;
    ensure!(result["dns"]["nameservers"] == json!(["192.0.2.54"]), "{result}");
    Ok(())
}

fn mac_comes_from_three_places_in_this_order(t: &Bed) -> Result {
    let pod = t.pod()?;
    let mut conf = t.conf(&[SUBNET]);
    let mac = |conf: &Value| -> Result<Value> {
        let args = "IgnoreUnknown=1;MAC=02:00:00:00:00:01";
        let result = t.with_args("ADD", &pod, args, conf)?.success()?;
        t.del(&pod, conf)?;
        Ok(result["interfaces"][2]["mac"].clone())
    };
    ensure!(mac(&conf)? == "02:00:00:00:00:01", "CNI_ARGS");
    conf["args"] = json!({"cni": {"mac": "02:00:00:00:00:02"}});
    ensure!(mac(&conf)? == "02:00:00:00:00:02", "args.cni.mac");
    conf["runtimeConfig"] = json!({"mac": "02:00:00:00:00:03"});
    ensure!(mac(&conf)? == "02:00:00:00:00:03", "runtimeConfig.mac");
    Ok(())
}

fn mac_of_the_bridge_is_stable(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let first = t.pod()?;
    t.add(&first, &conf)?;
    let before = t.bridge()?.mac;
    // A kernel's bridge takes the lowest MAC of its ports unless it has one of its own.
    for _ in 0..4 {
        t.add(&t.pod()?, &conf)?;
    }
    t.del(&first, &conf)?;
    ensure!(t.bridge()?.mac == before, "the bridge changed its MAC");
    Ok(())
}

fn several_ranges_give_several_addresses(t: &Bed) -> Result {
    let pod = t.pod()?;
    let conf = t.conf(&[SUBNET, "10.89.0.0/24", "fd88::/64"]);
    let result = t.add(&pod, &conf)?;
    ensure!(result["ips"].as_array().map(Vec::len) == Some(3), "{result}");
    let seen = addresses(&Netlink::open_in(&pod.netns)?, &pod.eth0()?.context("eth0")?)?;
    for ip in result["ips"].as_array().into_iter().flatten() {
        ensure!(seen.iter().any(|seen| ip["address"] == seen.as_str()), "{ip} is not in {seen:?}");
    }
    t.del(&pod, &conf)?;
    t.clean()
}

fn ipv6_alone_works(t: &Bed) -> Result {
    let conf = t.conf(&["fd88::/64"]);
    let (a, b) = (t.pod()?, t.pod()?);
    t.add(&a, &conf)?;
    let result = t.add(&b, &conf)?;
    connect(&a.netns, &b.netns, address(&result, 0)?)?;
    connect(&a.netns, &t.host, gateway(&result)?)?;
    for pod in [&a, &b] {
        t.del(pod, &conf)?;
    }
    t.clean()
}

fn result_names_bridge_host_end_and_container_end(t: &Bed) -> Result {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.conf(&[SUBNET]))?;
    let list = result["interfaces"].as_array().context("interfaces")?;
    ensure!(list.len() == 3, "{result}");
    ensure!(list[0]["name"] == "cni0" && list[2]["name"] == "eth0", "{result}");
    ensure!(list[1]["name"] == t.port()?.name.as_str(), "{result}");
    ensure!(list[2]["sandbox"] == pod.path(), "{result}");
    for near in &list[..2] {
        ensure!(near["sandbox"].as_str().is_none_or(str::is_empty), "{near}");
    }
    ensure!(result["ips"][0]["interface"] == 2, "{result}");
    let mac = pod.eth0()?.context("eth0")?.mac.map(|byte| format!("{byte:02x}")).join(":");
    ensure!(list[2]["mac"] == mac.as_str(), "{result}, but it has {mac}");
    Ok(())
}

fn port_forwards_when_add_returns(t: &Bed) -> Result {
    t.add(&t.pod()?, &t.conf(&[SUBNET]))?;
    ensure!(t.port()?.port.context("port")?.forwarding, "it does not forward yet");
    Ok(())
}

fn forwarding_is_on_for_both_families(t: &Bed) -> Result {
    t.add(&t.pod()?, &t.conf(&[SUBNET, "fd88::/64"]))?;
    ensure!(sysctl(&t.host, "ipv4/ip_forward")? == "1", "IPv4");
    ensure!(sysctl(&t.host, "ipv6/conf/all/forwarding")? == "1", "IPv6");
    Ok(())
}

fn pod_announces_its_address_when_it_is_used_again(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let wanted = t.conf_with(json!({"args": {"cni": {"ips": ["10.88.0.77"]}}}));
    let (peer, old, new) = (t.pod()?, t.pod()?, t.pod()?);
    t.add(&peer, &conf)?;
    let result = t.add(&old, &wanted)?;
    let ip = address(&result, 0)?;
    connect(&peer.netns, &old.netns, ip)?;
    connect(&t.host, &old.netns, ip)?;
    t.del(&old, &with_result(&wanted, &result))?;
    t.add(&new, &wanted)?;
    for from in [&t.host, &peer.netns] {
        connect_within(from, &new.netns, ip, Duration::from_millis(500))?;
    }
    Ok(())
}

/// Neighbours who knew the address by a MAC that was asked for must not go on with it.
fn pod_after_one_with_a_mac_of_its_own_is_reached_at_once(t: &Bed) -> Result {
    let conf = t.conf(&[SUBNET]);
    let wanted = t.conf_with(json!({"args": {"cni": {"ips": ["10.88.0.77"]}}}));
    let (peer, old, new) = (t.pod()?, t.pod()?, t.pod()?);
    t.add(&peer, &conf)?;
    let mut with_mac = wanted.clone();
    with_mac["args"]["cni"]["mac"] = json!("02:00:00:00:00:09");
    let result = t.add(&old, &with_mac)?;
    let ip = address(&result, 0)?;
    connect(&peer.netns, &old.netns, ip)?;
    t.del(&old, &with_result(&with_mac, &result))?;
    t.add(&new, &wanted)?;
    connect_within(&peer.netns, &new.netns, ip, Duration::from_millis(500)).map(drop)
}
