//! Configurations in, pools out.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::mutate;

fn parse_with(conf: Value, args: &str, version: Version) -> Result<Pool, Error> {
    let conf: Conf = serde_json::from_value(conf).expect("of the right types");
    Pool::parse(&conf, &CniArgs::parse(args).expect("arguments"), version)
}

fn parse(conf: Value) -> Result<Pool, Error> {
    parse_with(conf, "", Version::V1_0_0)
}

fn shown(pool: &Pool) -> Vec<String> {
    pool.sets.iter().map(ToString::to_string).collect()
}

#[test]
fn runtime_ranges_come_before_the_single_one_and_the_list() {
    let pool = parse(json!({
        "ipam": {
            "subnet": "10.2.0.0/24", "rangeStart": "10.2.0.9",
            "ranges": [[{"subnet": "10.3.0.0/24"}, {"subnet": "10.4.0.0/24"}], [{"subnet": "fd00::/64"}]],
        },
        "runtimeConfig": {"ipRanges": [[{"subnet": "10.1.0.0/30"}]]},
    }))
    .expect("good");
    assert_eq!(
        shown(&pool),
        [
            "10.1.0.1-10.1.0.2",
            "10.2.0.9-10.2.0.254",
            "10.3.0.1-10.3.0.254, 10.4.0.1-10.4.0.254",
            "fd00::1-fd00::ffff:ffff:ffff:ffff",
        ]
    );
}

#[test]
fn addresses_are_requested_in_three_places() {
    let pool = parse_with(
        json!({
            "ipam": {"subnet": "10.2.0.0/16"},
            "args": {"cni": {"ips": ["10.2.0.2/16"]}},
            "runtimeConfig": {"ips": ["10.2.0.3", "10.2.0.1"]},
        }),
        "IgnoreUnknown=1;IP=10.2.0.1;K8S_POD_NAME=a",
        Version::V1_0_0,
    )
    .expect("good");
    let expected: Vec<IpAddr> =
        ["10.2.0.1", "10.2.0.2", "10.2.0.3"].iter().map(|ip| ip.parse().expect("IP")).collect();
    assert_eq!(pool.requested, expected);
}

#[test]
fn wrong_values_are_named_with_their_key() {
    for (ipam, words) in [
        (json!({}), vec!["ranges"]),
        (json!({"ranges": []}), vec!["ranges"]),
        (json!({"ranges": [[]]}), vec!["empty"]),
        (json!({"ranges": [[{}]]}), vec!["subnet"]),
        (json!({"subnet": "10.0.0.0"}), vec!["subnet", "10.0.0.0"]),
        (json!({"subnet": "10.0.0.0/24", "gateway": "x"}), vec!["gateway", "x"]),
        (json!({"subnet": "10.0.0.0/24", "gateway": "10.1.0.1"}), vec!["gateway", "10.1.0.1"]),
        (json!({"subnet": "10.0.0.0/24", "rangeEnd": "10.1.0.1"}), vec!["rangeEnd", "10.1.0.1"]),
        (
            json!({"subnet": "10.0.0.0/24", "ranges": [[{"subnet": "10.0.0.128/25"}]]}),
            vec!["overlap", "10.0.0.129-10.0.0.254"],
        ),
    ] {
        let error = parse(json!({"ipam": ipam})).expect_err("wrong");
        assert_eq!(error.code, code::INVALID_CONFIG);
        for word in words {
            assert!(error.msg.contains(word), "{ipam}: {error}");
        }
    }
    assert!(parse(json!({})).expect_err("no ipam").msg.contains("ipam"));
    let ips = json!({"ipam": {"subnet": "10.0.0.0/24"}, "runtimeConfig": {"ips": ["ten"]}});
    assert!(parse(ips).expect_err("not an address").msg.contains("runtimeConfig.ips"));
}

#[test]
fn old_versions_have_one_address_per_family() {
    let sets = |more: Value| json!({"ipam": {"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": more}]]}});
    parse_with(sets(json!("fd00::/64")), "", Version::V0_2_0).expect("one each");
    parse_with(sets(json!("10.2.0.0/24")), "", Version::V0_2_0).expect_err("two of IPv4");
    parse_with(sets(json!("10.2.0.0/24")), "", Version::V0_3_0).expect("from 0.3.0 on");
}

#[test]
fn resolv_conf_is_read() {
    let text = "# a comment\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n; another\ndomain example.com\n\
                search a.example b.example\noptions ndots:5 edns0\nunknown x\n";
    let dns = parse_resolv_conf(text);
    assert_eq!(dns.nameservers, ["192.0.2.1", "192.0.2.2"]);
    assert_eq!(dns.domain, "example.com");
    assert_eq!(dns.search, ["a.example", "b.example"]);
    assert_eq!(dns.options, ["ndots:5", "edns0"]);
    let absent = json!({"ipam": {"subnet": "10.0.0.0/24", "resolvConf": "/nowhere/resolv.conf"}});
    let error = parse(absent).expect("good").dns().expect_err("absent");
    assert!(error.msg.contains("/nowhere/resolv.conf"), "{error}");
}

proptest! {
    #[test]
    fn fuzz_a_range_of_any_text_is_taken_or_refused(
        subnet in "[0-9a-f.:/]{0,20}",
        start in "[0-9a-f.:]{0,16}",
        end in "[0-9a-f.:]{0,16}",
        ip in "[0-9a-f.:/]{0,16}",
    ) {
        let conf = json!({
            "ipam": {"subnet": subnet, "rangeStart": start, "rangeEnd": end},
            "args": {"cni": {"ips": [ip]}},
        });
        if let Ok(pool) = parse(conf) {
            for set in &pool.sets {
                prop_assert!(set.candidates(None).take(4).all(|(ip, _)| set.range_of(ip).is_some()));
            }
        }
    }

    #[test]
    fn fuzz_resolv_conf_of_any_text_is_read(text in "(?s).{0,200}") {
        let _ = parse_resolv_conf(&text);
    }
}

proptest! {
    #[test]
    fn fuzz_the_corpus_of_configurations_is_taken_or_refused(value in mutate::values("stdin")) {
        let Ok(conf) = serde_json::from_value::<Conf>(value) else { return Ok(()) };
        if let Ok(pool) = Pool::parse(&conf, &CniArgs::default(), Version::V1_1_0) {
            for set in &pool.sets {
                prop_assert!(set.candidates(None).take(4).all(|(ip, _)| set.range_of(ip).is_some()));
            }
        }
    }
}
