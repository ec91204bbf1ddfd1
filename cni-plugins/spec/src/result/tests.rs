//! Results in every version, and readers against anything.

use proptest::prelude::*;

use super::*;
use crate::mutate;

fn full() -> AddResult {
    AddResult {
        interfaces: vec![
            Interface {
                name: "cni0".into(),
                mac: "02:00:00:00:00:01".into(),
                mtu: Some(1450),
                ..Interface::default()
            },
            Interface {
                name: "eth0".into(),
                sandbox: "/run/netns/a".into(),
                ..Interface::default()
            },
        ],
        ips: vec![IpConfig {
            interface: Some(1),
            gateway: Some("10.1.0.1".parse().expect("address")),
            ..IpConfig::new(parse_cidr("10.1.0.5/16").expect("CIDR"))
        }],
        routes: vec![Route {
            mtu: Some(1400),
            ..Route::new(parse_cidr("0.0.0.0/0").expect("CIDR"), None)
        }],
        dns: Dns { nameservers: vec!["10.96.0.10".into()], ..Dns::default() },
        extra: Map::new(),
    }
}

#[test]
fn each_version_has_its_own_form() {
    let v031 = full().to_value(Version::V0_3_1).expect("said");
    assert_eq!(
        v031,
        json!({
            "cniVersion": "0.3.1",
            "interfaces": [
                {"name": "cni0", "mac": "02:00:00:00:00:01"},
                {"name": "eth0", "sandbox": "/run/netns/a"},
            ],
            "ips": [{"version": "4", "interface": 1, "address": "10.1.0.5/16", "gateway": "10.1.0.1"}],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dns": {"nameservers": ["10.96.0.10"]},
        })
    );
    let v100 = full().to_value(Version::V1_0_0).expect("said");
    assert!(v100["ips"][0].get("version").is_none());
    assert!(v100["interfaces"][0].get("mtu").is_none());
    let v110 = full().to_value(Version::V1_1_0).expect("said");
    assert_eq!(v110["interfaces"][0]["mtu"], 1450);
    assert_eq!(v110["routes"][0]["mtu"], 1400);
    let v020 = full().to_value(Version::V0_2_0).expect("said");
    assert_eq!(
        v020,
        json!({
            "cniVersion": "0.2.0",
            "ip4": {"ip": "10.1.0.5/16", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0"}]},
            "dns": {"nameservers": ["10.96.0.10"]},
        })
    );
    let error = AddResult::default().to_value(Version::V0_1_0).expect_err("no address");
    assert_eq!(error.code, code::INCOMPATIBLE_VERSION);
}

#[test]
fn an_empty_result_is_only_its_version() {
    let value = AddResult::default().to_value(Version::V1_0_0).expect("said");
    assert_eq!(value, json!({"cniVersion": "1.0.0"}));
}

#[test]
fn foreign_keys_survive() {
    let value = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "theirs": 1}],
        "ips": [{"address": "10.0.0.1/8", "theirs": 2}],
        "routes": [{"dst": "10.0.0.0/8", "theirs": 3}],
        "theirs": {"a": [4]},
    });
    let result = AddResult::from_value(&value, Version::V1_0_0).expect("read");
    assert_eq!(result.to_value(Version::V1_0_0).expect("said"), value);
}

#[test]
fn an_index_may_be_missing_or_negative_and_lists_may_be_null() {
    let value = json!({
        "ips": [{"address": "10.0.0.1/8", "interface": -1, "version": "4"}, {"address": "fd00::1/64"}],
        "routes": null, "dns": null,
    });
    let result = AddResult::from_value(&value, Version::V0_4_0).expect("read");
    assert!(result.ips.iter().all(|ip| ip.interface.is_none()));
    let back = result.to_value(Version::V1_0_0).expect("said");
    assert!(back["ips"][0].get("version").is_none(), "1.0.0 has no `version`");
}

#[test]
fn wrong_values_are_named() {
    let read = |value: Value| AddResult::from_value(&value, Version::V1_0_0).expect_err("wrong");
    assert_eq!(read(json!([])).code, code::DECODE);
    let error = read(json!({"ips": [{"address": "10.0.0.1"}]}));
    assert!(error.msg.contains("10.0.0.1"), "{error}");
    assert_eq!(read(json!({"cniVersion": "8.0.0"})).code, code::INCOMPATIBLE_VERSION);
}

fn networks() -> impl Strategy<Value = IpNetwork> {
    prop_oneof![
        (any::<u32>(), 0u8..=32).prop_map(|(bits, len)| {
            IpNetwork::new(std::net::Ipv4Addr::from_bits(bits).into(), len).expect("length fits")
        }),
        (any::<u128>(), 0u8..=128).prop_map(|(bits, len)| {
            IpNetwork::new(std::net::Ipv6Addr::from_bits(bits).into(), len).expect("length fits")
        }),
    ]
}

proptest! {
    #[test]
    fn results_read_back_in_the_newest_version(
        nets in proptest::collection::vec((networks(), proptest::option::of(0usize..9)), 0..5),
        routes in proptest::collection::vec((networks(), any::<Option<u32>>(), any::<Option<u8>>()), 0..5),
        names in proptest::collection::vec(("[a-z]{1,8}", any::<Option<u32>>()), 0..4),
    ) {
        let result = AddResult {
            interfaces: names
                .into_iter()
                .map(|(name, mtu)| Interface { name, mtu, ..Interface::default() })
                .collect(),
            ips: nets
                .into_iter()
                .map(|(net, interface)| IpConfig { interface, gateway: Some(net.ip()), ..IpConfig::new(net) })
                .collect(),
            routes: routes
                .into_iter()
                .map(|(net, priority, scope)| Route { priority, scope, ..Route::new(net, None) })
                .collect(),
            ..AddResult::default()
        };
        let value = result.to_value(Version::V1_1_0).expect("said");
        prop_assert_eq!(AddResult::from_value(&value, Version::V1_1_0).expect("read"), result);
    }

    #[test]
    fn fuzz_a_prev_result_of_any_bytes_is_read_or_refused(text in ".{0,200}") {
        if let Ok(value) = serde_json::from_str::<Value>(&text) {
            let _ = AddResult::from_value(&value, Version::V1_0_0);
        }
    }

    #[test]
    fn fuzz_a_prev_result_of_odd_values_is_read_or_refused(
        key in "(interfaces|ips|routes|dns|ip4|ip6|cniVersion)",
        inner in "(address|interface|gateway|dst|gw|name|mtu|scope|ip|nameservers)",
        text in "[0-9a-f.:/+-]{0,20}",
        number in any::<i64>(),
        old in any::<bool>(),
    ) {
        let version = if old { Version::V0_2_0 } else { Version::V1_1_0 };
        for leaf in [json!(text), json!(number), Value::Null, json!([text]), json!({&inner: text})] {
            for value in [
                json!({&key: leaf}),
                json!({&key: [{&inner: leaf}]}),
                json!({&key: {&inner: leaf}}),
            ] {
                if let Ok(result) = AddResult::from_value(&value, version) {
                    let _ = result.to_value(version);
                }
            }
        }
    }

    #[test]
    fn fuzz_cidr_reads_back(text in "[0-9a-f.:/+]{0,40}") {
        if let Ok(net) = parse_cidr(&text) {
            prop_assert_eq!(parse_cidr(&net.to_string()), Ok(net));
        }
    }
}

proptest! {
    #[test]
    fn fuzz_the_corpus_of_results_is_read_or_refused(value in mutate::values("prev-result")) {
        for version in [Version::V0_2_0, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0] {
            let Ok(result) = AddResult::from_value(&value, version) else { continue };
            // What was read can be said again, and is then the same.
            if let Ok(said) = result.to_value(Version::V1_1_0) {
                prop_assert_eq!(AddResult::from_value(&said, Version::V1_1_0), Ok(result));
            }
        }
    }

    #[test]
    fn fuzz_the_corpus_of_valid_attachments_is_read_or_refused(value in mutate::values("stdin")) {
        if let Value::Object(conf) = value {
            let _ = crate::parse_valid_attachments(&conf);
        }
    }
}
