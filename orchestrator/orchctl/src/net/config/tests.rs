use orch_config::network::ConfigError;

use super::*;
use crate::net::leases::LeaseView;

fn config(json: &str) -> NetworkConfig {
    NetworkConfig::parse(json.as_bytes()).expect(json)
}

fn change(json: &str, change: &Change) -> Result<NetworkConfig, ConfigError> {
    NetworkConfig::parse(&edited(json.as_bytes(), change)?)
}

const PLAIN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

fn leases(subnets: &[&str]) -> Leases {
    let lease = |subnet: &&str| LeaseView { subnet: subnet.parse().ok(), ..LeaseView::default() };
    Leases { leases: subnets.iter().map(lease).collect(), ..Leases::default() }
}

#[test]
fn what_is_not_named_stays_and_so_do_keys_of_others() {
    let text = r#"{"network":"10.244.0.0/16","EnableNFTables":true,"backend":{"type":"vxlan","vni":7,"GBP":true}}"#;
    let mode = Change { mode: Some(ModeName::DirectRouting), ..Change::default() };
    let json = edited(text.as_bytes(), &mode).expect("valid");
    let value: Value = serde_json::from_slice(&json).expect("JSON");
    assert_eq!(value["EnableNFTables"], true);
    assert_eq!(value["Backend"]["GBP"], true);
    let after = NetworkConfig::parse(&json).expect("valid");
    assert_eq!((after.mode, after.vni), (Mode::DirectRouting, 7));
    let back = Change { mode: Some(ModeName::Vxlan), ..Change::default() };
    let back = change(&String::from_utf8_lossy(&json), &back).expect("valid");
    assert_eq!(back, config(text));
}

#[test]
fn the_fast_path_is_switched_and_its_effect_is_told() {
    let switch = |text: &str, to| {
        let wanted = Change { fast_path: Some(to), ..Change::default() };
        String::from_utf8(edited(text.as_bytes(), &wanted).expect("valid")).expect("text")
    };
    let (on, off) = (switch(PLAIN, SwitchName::On), switch(PLAIN, SwitchName::Off));
    let said = [PLAIN, &on, &off].map(|json| config(json).fast_path);
    assert_eq!(said, [Switch::Auto, Switch::On, Switch::Off]);
    assert_eq!(config(&switch(&on, SwitchName::Auto)), config(PLAIN));
    let told = effects(&config(PLAIN), &config(&off), &leases(&[]));
    assert!(told.len() == 1 && !told[0].breaks, "{told:?}");
    assert_eq!(effects(&config(PLAIN), &config(&on), &leases(&[])), [], "it was there before");
}

#[test]
fn big_tcp_is_switched_likewise_and_followed_when_the_agent_says_so() {
    let switch = |to| {
        let wanted = Change { big_tcp: Some(to), ..Change::default() };
        let json = edited(PLAIN.as_bytes(), &wanted).expect("valid");
        config(&String::from_utf8(json).expect("text"))
    };
    let (on, off) = (switch(SwitchName::On), switch(SwitchName::Off));
    assert_eq!([on.big_tcp, off.big_tcp], [Switch::On, Switch::Off]);
    assert_eq!(switch(SwitchName::Auto), config(PLAIN));
    let told = effects(&config(PLAIN), &off, &leases(&[]));
    assert!(told.len() == 1 && told[0].text.contains("64 KiB") && !told[0].breaks, "{told:?}");
    let mut status = following();
    assert!(follows(&status, &config(PLAIN)) && !follows(&status, &on), "an older agent");
    // That it cannot is a problem of its own.
    status.big_tcp.setting = "on".to_owned();
    assert!(follows(&status, &on) && !follows(&status, &off));
}

#[test]
fn another_network_takes_its_own_limits_and_what_does_not_fit_is_refused() {
    let text = r#"{"Network":"10.244.0.0/16","SubnetLen":26,"SubnetMin":"10.244.1.0","Backend":{"Type":"vxlan"}}"#;
    let network = Some(Family::Network("10.55.0.0/20".parse().expect("CIDR")));
    let after = change(text, &Change { network, ..Change::default() }).expect("valid");
    let v4 = after.v4.expect("IPv4");
    assert_eq!((v4.subnet_len, v4.subnet_min.to_string()), (24, "10.55.1.0".to_owned()));
    let wrong = Change { subnet_min: Some([10, 9, 0, 0].into()), ..Change::default() };
    assert!(change(text, &wrong).is_err());
    assert!(check_size(&after, 15).is_ok() && check_size(&after, 16).is_err());
}

#[test]
fn families_come_and_go() {
    let ipv6_network = Some(Family::Network("fd00::/48".parse().expect("CIDR")));
    let dual = edited(PLAIN.as_bytes(), &Change { ipv6_network, ..Change::default() });
    let dual = String::from_utf8(dual.expect("valid")).expect("text");
    assert!(config(&dual).v4.is_some() && config(&dual).v6.is_some());
    let alone =
        edited(dual.as_bytes(), &Change { network: Some(Family::None), ..Change::default() });
    let alone = String::from_utf8(alone.expect("valid")).expect("text");
    assert!(config(&alone).v4.is_none() && config(&alone).v6.is_some());
    let told = effects(&config(&dual), &config(&alone), &leases(&["10.244.3.0/24"]));
    assert!(told.len() == 1 && told[0].breaks, "{told:?}");
    let none = Change { ipv6_network: Some(Family::None), ..Change::default() };
    assert!(change(&alone, &none).is_err(), "no family is left");
    let network = Some(Family::Network("10.244.0.0/16".parse().expect("CIDR")));
    let back = Change { network, ipv6_network: Some(Family::None), ..Change::default() };
    assert_eq!(change(&alone, &back), Ok(config(PLAIN)));
}

#[test]
fn effects_tell_what_breaks() {
    let before = config(PLAIN);
    let held = leases(&["10.244.3.0/24", "10.244.9.0/24"]);
    let told = |json: &str| effects(&before, &config(json), &held);
    let mode = told(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#);
    assert!(mode.iter().all(|effect| !effect.breaks));
    assert!(mode.iter().any(|effect| effect.text.contains("larger by 50")), "{mode:?}");
    let smaller =
        told(r#"{"Network":"10.244.0.0/16","SubnetMax":"10.244.4.0","Backend":{"Type":"vxlan"}}"#);
    assert!(smaller[0].breaks && smaller[0].text.starts_with("1 of 2 nodes"), "{smaller:?}");
    let port = told(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Port":4789}}"#);
    assert!(port.len() == 1 && !port[0].breaks, "{port:?}");
    let dual = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#;
    assert!(told(dual).iter().any(|effect| effect.text.contains("smaller by 20")));
    assert!(effects(&config(dual), &before, &held).iter().any(|effect| effect.breaks));
    assert_eq!(told(PLAIN), []);
}

/// Of an agent that does what `PLAIN` says.
fn following() -> NetStatus {
    NetStatus {
        network: Some("10.244.0.0/16".to_owned()),
        subnet: Some("10.244.3.0/24".to_owned()),
        mode: Some("vxlan".to_owned()),
        device: Some(crate::net::status::Device { vni: 1, port: 8472, ..Default::default() }),
        ..NetStatus::default()
    }
}

#[test]
fn an_agent_follows_when_all_it_says_agrees() {
    let (config, right) = (config(PLAIN), following());
    assert!(follows(&right, &config));
    let mode = Some("host-gw".to_owned());
    assert!(!follows(&NetStatus { mode, ..right.clone() }, &config));
    let fast = NetworkConfig { fast_path: Switch::On, ..config.clone() };
    assert!(follows(&right, &fast), "a node without policies cannot have it");
    let policy = crate::net::status::Policy { enforced: true, ..Default::default() };
    let without = NetStatus { policy, ..right.clone() };
    assert!(!follows(&without, &fast));
    assert!(follows(&without, &config), "a node that cannot need not");
    let subnet = Some("10.99.3.0/24".to_owned());
    assert!(!follows(&NetStatus { subnet, ..right.clone() }, &config));
    assert!(!follows(&NetStatus { device: None, ..right }, &config));
}
