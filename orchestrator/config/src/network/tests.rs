use super::*;

fn parse(json: &str) -> Result<NetworkConfig, ConfigError> {
    NetworkConfig::parse(json.as_bytes())
}

#[test]
fn flannels_defaults_fill_what_is_not_said() {
    let config = parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#).expect("valid");
    let v4 = config.v4.expect("IPv4");
    assert_eq!(v4.subnet_len, 24);
    assert_eq!(v4.subnet_min, Ipv4Addr::new(10, 5, 1, 0));
    assert_eq!(v4.subnet_max, Ipv4Addr::new(10, 5, 255, 0));
    assert_eq!((config.vni, config.port), (1, 8472));
    let small = parse(r#"{"Network":"10.5.0.0/24","Backend":{"Type":"vxlan","VNI":7,"Port":0}}"#)
        .expect("valid");
    let v4 = small.v4.expect("IPv4");
    assert_eq!((v4.subnet_len, small.vni, small.port), (26, 7, 8472));
    assert_eq!(v4.subnets().count(), 3, "the first of the four is skipped");
}

#[test]
fn an_absent_backend_is_refused_with_the_way_out() {
    let error = parse(r#"{"Network":"10.5.0.0/16"}"#).expect_err("udp");
    assert!(error.to_string().contains(r#"set {"Type":"vxlan"}"#), "{error}");
}

#[test]
fn the_backend_says_the_mode_and_keys_may_be_of_any_case() {
    let mode = |backend: &str| {
        parse(&format!(r#"{{"network":"10.5.0.0/16","Backend":{backend}}}"#)).map(|c| c.mode)
    };
    assert_eq!(mode(r#"{"Type":"vxlan"}"#), Ok(Mode::Vxlan));
    assert_eq!(mode(r#"{"type":"vxlan","directRouting":true}"#), Ok(Mode::DirectRouting));
    assert_eq!(mode(r#"{"Type":"host-gw"}"#), Ok(Mode::HostGw));
    assert!(mode(r#"{"Type":"wireguard"}"#).is_err());
}

#[test]
fn limits_must_be_bases_of_subnets_in_the_network() {
    for bad in [
        r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.7","Backend":{"Type":"vxlan"}}"#,
        r#"{"Network":"10.5.0.0/16","SubnetMax":"10.6.0.0","Backend":{"Type":"vxlan"}}"#,
        r#"{"Network":"10.5.0.0/16","SubnetLen":17,"Backend":{"Type":"vxlan"}}"#,
        r#"{"Network":"10.5.0.0/29","Backend":{"Type":"vxlan"}}"#,
        r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.8.0","Backend":{"Type":"vxlan"}}"#,
    ] {
        assert!(matches!(parse(bad), Err(ConfigError::Field { .. })), "{bad}");
    }
}

#[test]
fn what_we_write_reads_back_equal() {
    let config =
        NetworkConfig::new("10.244.0.0/16".parse().expect("CIDR"), 24, 1, 8472).expect("valid");
    for mode in [Mode::Vxlan, Mode::DirectRouting, Mode::HostGw] {
        for fast_path in [Switch::Auto, Switch::On, Switch::Off] {
            for big_tcp in [Switch::Auto, Switch::On, Switch::Off] {
                let config = NetworkConfig { mode, fast_path, big_tcp, ..config.clone() };
                assert_eq!(NetworkConfig::parse(&config.to_json()), Ok(config));
            }
        }
    }
    let dual = parse(r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#).expect("valid");
    let v6 = dual.v6.expect("dual stack");
    assert_eq!((v6.subnet_len, v6.subnet_min.to_string()), (64, "fd00:5:0:1::".to_owned()));
    assert_eq!(v6.subnet_max.to_string(), "fd00:5:0:ffff::");
    assert!(v6.subnets(3).all(|subnet| v6.allows(subnet)));
    assert_eq!(NetworkConfig::parse(&dual.to_json()), Ok(dual));
    let alone = parse(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#).expect("valid");
    assert_eq!((alone.v4, alone.v6), (None, Some(v6)));
    assert_eq!(NetworkConfig::parse(&alone.to_json()), Ok(alone));
    let none = parse(r#"{"EnableIPv4":false,"Backend":{"Type":"vxlan"}}"#);
    assert!(none.expect_err("no family").to_string().contains("EnableIPv6"));
}
