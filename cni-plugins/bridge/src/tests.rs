//! The pure parts of the handlers.

use cni_netlink::BridgePort;
use cni_spec::{CniArgs, Dns};
use ipnetwork::IpNetwork;

use super::*;
use crate::check::{compare_pod, compare_port};
use crate::pod::SeenPod;

fn settings(conf: &str) -> Settings {
    serde_json::from_str::<NetConf>(conf)
        .expect("JSON")
        .settings(&CniArgs::default())
        .expect("good")
}

fn net(text: &str) -> IpNetwork {
    text.parse().expect("a network")
}

fn link(name: &str, index: u32, kind: LinkKind) -> Link {
    Link {
        index,
        name: name.into(),
        kind,
        mac: [2, 0, 0, 0, 0, index as u8],
        mtu: 1450,
        up: true,
        carrier: true,
        promiscuous: false,
        all_multicast: false,
        queue_length: 1000,
        master: None,
        peer: None,
        alias: None,
        group: 0,
        port: None,
        ..Link::default()
    }
}

fn given() -> AddResult {
    let ip = IpConfig { gateway: "10.1.0.1".parse().ok(), ..IpConfig::new(net("10.1.0.5/24")) };
    let route = cni_spec::Route::new(net("0.0.0.0/0"), None);
    let dns = Dns { nameservers: vec!["10.96.0.10".into()], ..Dns::default() };
    AddResult { ips: vec![ip], routes: vec![route], dns, ..AddResult::default() }
}

fn attached(prev: AddResult, conf: &str) -> AddResult {
    let bridge = link("cni0", 1, LinkKind::Bridge { vlan_filtering: false });
    let (port, pod) = (link("veth00000000001", 2, LinkKind::Veth), link("eth0", 3, LinkKind::Veth));
    result(prev, &settings(conf), [&bridge, &port, &pod], "/run/netns/a", given())
}

#[test]
fn the_result_has_three_interfaces_and_addresses_of_the_last() {
    let result = attached(AddResult::default(), "{}");
    let names: Vec<_> = result.interfaces.iter().map(|interface| interface.name.as_str()).collect();
    assert_eq!(names, ["cni0", "veth00000000001", "eth0"]);
    let sandboxes: Vec<_> =
        result.interfaces.iter().map(|interface| interface.sandbox.as_str()).collect();
    assert_eq!(sandboxes, ["", "", "/run/netns/a"]);
    assert_eq!(
        (result.interfaces[2].mac.as_str(), result.interfaces[2].mtu),
        ("02:00:00:00:00:03", Some(1450))
    );
    assert_eq!(result.ips[0].interface, Some(2));
    assert_eq!(result.dns.nameservers, ["10.96.0.10"]);
    let own = attached(AddResult::default(), r#"{"dns":{"nameservers":["192.0.2.53"]}}"#);
    assert_eq!(own.dns.nameservers, ["192.0.2.53"], "the configuration's name servers win");
}

#[test]
fn what_the_chain_made_before_survives() {
    let before = AddResult {
        interfaces: vec![Interface { name: "net0".into(), ..Interface::default() }],
        ips: vec![IpConfig { interface: Some(0), ..IpConfig::new(net("192.0.2.5/24")) }],
        ..AddResult::default()
    };
    let result = attached(before, "{}");
    assert_eq!(result.interfaces[0].name, "net0");
    assert_eq!(result.ips.iter().map(|ip| ip.interface).collect::<Vec<_>>(), [Some(0), Some(3)]);
}

fn seen_pod() -> SeenPod {
    SeenPod {
        link: link("eth0", 3, LinkKind::Veth),
        addresses: vec![net("10.1.0.5/24"), net("fe80::1/64")],
        routes: plan::pod_routes(&given(), 3),
    }
}

fn pod_differs(change: impl FnOnce(&mut SeenPod)) -> Vec<String> {
    let result = attached(AddResult::default(), "{}");
    let mut seen = seen_pod();
    change(&mut seen);
    let failures = compare_pod(&seen, &result.interfaces[2], &result, &settings("{}"));
    failures.into_iter().map(|error| error.msg).collect()
}

#[test]
fn check_names_each_difference_of_the_pod() {
    assert_eq!(pod_differs(|_| {}), [""; 0]);
    assert_eq!(pod_differs(|seen| seen.link.up = false), ["the interface eth0 is down"]);
    assert_eq!(pod_differs(|seen| seen.link.mac = [9; 6]).len(), 1);
    assert_eq!(
        pod_differs(|seen| seen.addresses.clear()),
        ["the interface eth0 does not have the address 10.1.0.5/24"]
    );
    assert_eq!(
        pod_differs(|seen| seen.routes.clear()),
        ["the route to 0.0.0.0/0 via 10.1.0.1 is missing"]
    );
    let more = |seen: &mut SeenPod| seen.addresses.push(net("192.0.2.1/32"));
    assert_eq!(pod_differs(more), [""; 0], "a later plugin may add");
}

#[test]
fn check_names_each_difference_of_the_port() {
    let bridge = link("cni0", 1, LinkKind::Bridge { vlan_filtering: false });
    let state = BridgePort { forwarding: true, hairpin: true, isolated: false };
    let port = Link { master: Some(1), port: Some(state), ..link("veth0", 2, LinkKind::Veth) };
    let hairpin = settings(r#"{"hairpinMode":true}"#);
    let count = |bridge: Option<&Link>, port: Option<&Link>, settings: &Settings| {
        compare_port(bridge, port, "veth0", settings).len()
    };
    assert_eq!(count(Some(&bridge), Some(&port), &hairpin), 0);
    assert_eq!(count(None, Some(&port), &hairpin), 1);
    assert_eq!(count(Some(&bridge), None, &hairpin), 1);
    let elsewhere = Link { master: None, up: false, ..port.clone() };
    assert_eq!(count(Some(&bridge), Some(&elsewhere), &hairpin), 2);
    assert_eq!(count(Some(&bridge), Some(&port), &settings(r#"{"portIsolation":true}"#)), 1);
}

#[path = "../../corpus/mutate.rs"]
mod mutate;

proptest::proptest! {
    #[test]
    fn fuzz_the_corpus_of_configurations_is_taken_or_refused(
        value in mutate::values("stdin"),
        args in "(MAC=)?[0-9a-f:;=]{0,20}",
    ) {
        let args = CniArgs::parse(&args).unwrap_or_default();
        if let Ok(conf) = serde_json::from_value::<NetConf>(value)
            && let Ok(settings) = conf.settings(&args)
        {
            proptest::prop_assert!(settings.vlans.iter().all(|vlan| (1..=4094).contains(&vlan.id)));
        }
    }
}
