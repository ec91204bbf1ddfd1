//! From what is there and what is wanted to steps. Pure.

use std::net::IpAddr;

use cni_netlink::{Bridge, Link, LinkKind, MacBytes, Route, parse_mac};
use cni_spec::{AddResult, Error, IfName, IpConfig, code};
use ipnetwork::IpNetwork;

use crate::conf::Settings;
use crate::mac;

/// One change of the bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BridgeStep {
    /// Make it.
    Create(Bridge),
    /// Set its MTU: in a change, not at creation, because only a bridge whose MTU was *changed* keeps it. Another one
    /// follows its ports, and goes back to 1500 with the last of them.
    SetMtu(u32),
    /// Let it take all frames.
    SetPromiscuous,
    /// Make it look at VLAN tags.
    SetVlanFiltering,
    /// Switch it on.
    SetUp,
}

/// The bridge as it has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WantBridge {
    pub(crate) bridge: Bridge,
    pub(crate) promiscuous: bool,
}

/// Steps that make the bridge right. What an existing bridge has beyond that is somebody else's and stays.
pub(crate) fn plan_bridge(
    seen: Option<&Link>,
    want: &WantBridge,
) -> Result<Vec<BridgeStep>, Error> {
    let mut steps = Vec::new();
    let bridge = &want.bridge;
    match seen {
        None => {
            steps.push(BridgeStep::Create(Bridge { mtu: None, ..bridge.clone() }));
            steps.extend(bridge.mtu.map(BridgeStep::SetMtu));
        }
        Some(seen) => {
            let LinkKind::Bridge { vlan_filtering } = seen.kind else {
                let msg = format!("the link {} is there and is not a bridge", bridge.name);
                return Err(Error::new(code::INVALID_CONFIG, msg));
            };
            steps.extend(bridge.mtu.filter(|mtu| *mtu != seen.mtu).map(BridgeStep::SetMtu));
            if bridge.vlan_filtering && !vlan_filtering {
                steps.push(BridgeStep::SetVlanFiltering);
            }
            if !seen.up {
                steps.push(BridgeStep::SetUp);
            }
        }
    }
    if want.promiscuous && !seen.is_some_and(|seen| seen.promiscuous) {
        steps.push(BridgeStep::SetPromiscuous);
    }
    Ok(steps)
}

/// One change of the bridge's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AddressStep {
    /// Remove one that stands in the way.
    Delete(IpNetwork),
    /// Add ours.
    Add(IpNetwork),
}

/// Steps that give the bridge the gateways' addresses. Addresses of other subnets stay: networks may share a bridge.
pub(crate) fn plan_gateways(
    bridge: &str,
    seen: &[IpNetwork],
    want: &[IpNetwork],
    force: bool,
) -> Result<Vec<AddressStep>, Error> {
    let mut steps = Vec::new();
    for gateway in want.iter().filter(|gateway| !seen.contains(gateway)) {
        for other in seen.iter().filter(|other| overlap(other, gateway) && !want.contains(other)) {
            if !force {
                return Err(Error::new(
                    code::INVALID_CONFIG,
                    format!(
                        "the bridge {bridge} has the address {other}, and the gateway is {gateway}"
                    ),
                )
                .with_details("\"forceAddress\": true replaces it"));
            }
            steps.push(AddressStep::Delete(*other));
        }
        if !steps.contains(&AddressStep::Add(*gateway)) {
            steps.push(AddressStep::Add(*gateway));
        }
    }
    Ok(steps)
}

fn overlap(a: &IpNetwork, b: &IpNetwork) -> bool {
    a.contains(b.ip()) || b.contains(a.ip())
}

/// What IPAM gave, made complete: gateways where the bridge is one, the default routes it stands for.
pub(crate) fn complete_lease(
    mut lease: AddResult,
    gateway: bool,
    default_gateway: bool,
) -> Result<AddResult, Error> {
    for ip in lease.ips.iter_mut().filter(|_| gateway) {
        if ip.gateway.is_none() {
            ip.gateway = Some(first_host(&ip.address)?);
        }
    }
    if default_gateway {
        for ip in &lease.ips {
            let default = everything(&ip.address);
            if !lease.routes.iter().any(|route| route.dst == default) {
                lease.routes.push(cni_spec::Route::new(default, ip.gateway));
            }
        }
    }
    Ok(lease)
}

fn first_host(address: &IpNetwork) -> Result<IpAddr, Error> {
    let host = match address.network() {
        IpAddr::V4(network) => network.to_bits().checked_add(1).map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(network) => network.to_bits().checked_add(1).map(|bits| IpAddr::V6(bits.into())),
    };
    host.filter(|host| address.contains(*host)).ok_or_else(|| {
        Error::new(
            code::INVALID_CONFIG,
            format!("the subnet of {address} has no room for a gateway"),
        )
    })
}

/// The default route's destination in the family of an address.
fn everything(address: &IpNetwork) -> IpNetwork {
    let nothing = match address {
        IpNetwork::V4(_) => IpAddr::from([0; 4]),
        IpNetwork::V6(_) => IpAddr::from([0; 16]),
    };
    IpNetwork::new(nothing, 0).expect("0 is a prefix length of both families")
}

/// The MAC that a pod has to have: that which was asked for, else, where the bridge is the gateway, the one that follows
/// from its address. `None` is any.
pub(crate) fn pod_mac(settings: &Settings, ips: &[IpAddr]) -> Option<MacBytes> {
    settings.mac.or_else(|| mac::mac_of_pod(ips).filter(|_| settings.gateway))
}

/// Whether a pod that goes had a MAC that does not follow from its addresses, as far as the result of its ADD tells. Later
/// plugins of the chain (`tuning`) may have set it.
pub(crate) fn had_another_mac(result: Option<&AddResult>, ifname: &IfName) -> bool {
    let Some(result) = result else { return false };
    let ours = |interface: &cni_spec::Interface| {
        interface.name == ifname.as_str() && !interface.sandbox.is_empty()
    };
    let Some(at) = result.interfaces.iter().position(ours) else { return false };
    let ips: Vec<IpAddr> = result
        .ips
        .iter()
        .filter(|ip| ip.interface.is_none_or(|index| index == at))
        .map(|ip| ip.address.ip())
        .collect();
    parse_mac(&result.interfaces[at].mac).is_some_and(|mac| !mac::follows(mac, &ips))
}

/// Addresses that the bridge has as gateway.
pub(crate) fn gateway_addresses(ips: &[IpConfig]) -> Vec<IpNetwork> {
    let mut gateways: Vec<IpNetwork> = Vec::new();
    for ip in ips {
        let address =
            ip.gateway.and_then(|gateway| IpNetwork::new(gateway, ip.address.prefix()).ok());
        gateways.extend(address.filter(|address| !gateways.contains(address)));
    }
    gateways
}

/// Subnets of the pod's addresses.
pub(crate) fn subnets(ips: &[IpConfig]) -> Vec<IpNetwork> {
    let mut subnets: Vec<IpNetwork> = Vec::new();
    for ip in ips {
        let subnet = IpNetwork::new(ip.address.network(), ip.address.prefix()).ok();
        subnets.extend(subnet.filter(|subnet| !subnets.contains(subnet)));
    }
    subnets
}

/// Routes of the pod, by its link. A route without gateway takes that of the first address of its family.
pub(crate) fn pod_routes(lease: &AddResult, link: u32) -> Vec<Route> {
    let gateway = |v4: bool| {
        lease.ips.iter().filter(|ip| ip.address.is_ipv4() == v4).find_map(|ip| ip.gateway)
    };
    lease
        .routes
        .iter()
        .map(|route| Route {
            dst: IpNetwork::new(route.dst.network(), route.dst.prefix()).unwrap_or(route.dst),
            // A route of scope "link" has no gateway by its nature.
            via: route.gw.or_else(|| {
                gateway(route.dst.is_ipv4()).filter(|_| route.scope != Some(SCOPE_LINK))
            }),
            link: Some(link),
            mtu: route.mtu,
            advmss: route.advmss,
            metric: route.priority,
            table: route.table,
            scope: route.scope,
            ..Route::default()
        })
        .collect()
}

/// `RT_SCOPE_LINK`.
const SCOPE_LINK: u8 = 253;

/// Routes of the result that the pod does not have. What the pod has beyond them may be a later plugin's.
pub(crate) fn missing_routes(want: &[Route], seen: &[Route]) -> Vec<Route> {
    let same = |want: &Route, seen: &Route| {
        want.dst == seen.dst
            && (want.via.is_none() || want.via == seen.via)
            && want.table == seen.table
            && want.metric.is_none_or(|metric| seen.metric == Some(metric))
    };
    want.iter().filter(|want| !seen.iter().any(|seen| same(want, seen))).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNetwork {
        text.parse().expect("a network")
    }

    fn want(mtu: Option<u32>) -> WantBridge {
        let bridge = Bridge {
            name: "cni0".into(),
            mtu,
            mac: Some([2, 0, 0, 0, 0, 1]),
            up: true,
            ..Bridge::default()
        };
        WantBridge { bridge, promiscuous: false }
    }

    fn seen() -> Link {
        Link {
            index: 7,
            name: "cni0".into(),
            kind: LinkKind::Bridge { vlan_filtering: false },
            mac: [2, 0, 0, 0, 0, 1],
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

    #[test]
    fn a_missing_bridge_is_made_and_a_right_one_left_alone() {
        let want = want(Some(1450));
        let steps = plan_bridge(None, &want).expect("possible");
        let bridge = Bridge { mtu: None, ..want.bridge.clone() };
        assert_eq!(steps, [BridgeStep::Create(bridge), BridgeStep::SetMtu(1450)]);
        assert_eq!(plan_bridge(Some(&seen()), &want).expect("possible"), []);
    }

    #[test]
    fn an_existing_bridge_gets_what_it_lacks_and_keeps_the_rest() {
        let mut wanted = want(Some(1400));
        wanted.bridge.vlan_filtering = true;
        wanted.promiscuous = true;
        let down = Link { up: false, mac: [2, 0, 0, 0, 0, 9], ..seen() };
        assert_eq!(
            plan_bridge(Some(&down), &wanted).expect("possible"),
            [
                BridgeStep::SetMtu(1400),
                BridgeStep::SetVlanFiltering,
                BridgeStep::SetUp,
                BridgeStep::SetPromiscuous
            ]
        );
        assert_eq!(
            plan_bridge(Some(&seen()), &want(None)).expect("possible"),
            [],
            "no MTU asked, none set"
        );
    }

    #[test]
    fn a_link_of_another_kind_is_not_taken_over() {
        let other = Link { kind: LinkKind::Plain, ..seen() };
        assert_eq!(
            plan_bridge(Some(&other), &want(None)).expect_err("refused").code,
            code::INVALID_CONFIG
        );
    }

    #[test]
    fn gateways_join_addresses_of_other_subnets_and_replace_their_own_only_by_force() {
        let plan = |seen: &[&str], want: &[&str], force| {
            let nets = |texts: &[&str]| texts.iter().map(|text| net(text)).collect::<Vec<_>>();
            plan_gateways("cni0", &nets(seen), &nets(want), force)
        };
        let add = |text: &str| AddressStep::Add(net(text));
        assert_eq!(
            plan(&[], &["10.1.0.1/24", "fd00::1/64"], false),
            Ok(vec![add("10.1.0.1/24"), add("fd00::1/64")])
        );
        assert_eq!(plan(&["10.1.0.1/24", "fe80::1/64"], &["10.1.0.1/24"], false), Ok(vec![]));
        assert_eq!(plan(&["10.2.0.1/24"], &["10.1.0.1/24"], false), Ok(vec![add("10.1.0.1/24")]));
        assert!(plan(&["10.1.0.9/24"], &["10.1.0.1/24"], false).is_err());
        assert_eq!(
            plan(&["10.1.0.9/24"], &["10.1.0.1/24"], true),
            Ok(vec![AddressStep::Delete(net("10.1.0.9/24")), add("10.1.0.1/24")])
        );
    }

    fn lease(ips: &[&str]) -> AddResult {
        AddResult {
            ips: ips.iter().map(|ip| IpConfig::new(net(ip))).collect(),
            ..AddResult::default()
        }
    }

    #[test]
    fn a_default_gateway_gives_one_default_route_per_family() {
        let done = complete_lease(lease(&["10.1.0.5/24", "fd00::5/64", "10.2.0.5/24"]), true, true)
            .expect("possible");
        let routes: Vec<(String, Option<String>)> = done
            .routes
            .iter()
            .map(|route| (route.dst.to_string(), route.gw.map(|gw| gw.to_string())))
            .collect();
        assert_eq!(
            routes,
            [
                ("0.0.0.0/0".into(), Some("10.1.0.1".into())),
                ("::/0".into(), Some("fd00::1".into()))
            ]
        );
        assert_eq!(
            gateway_addresses(&done.ips),
            [net("10.1.0.1/24"), net("fd00::1/64"), net("10.2.0.1/24")]
        );

        let mut own = lease(&["10.1.0.5/24"]);
        own.routes.push(cni_spec::Route::new(net("0.0.0.0/0"), "10.1.0.254".parse().ok()));
        let done = complete_lease(own.clone(), true, true).expect("possible");
        assert_eq!(done.routes, own.routes, "IPAM's own default route stays");
        assert!(complete_lease(lease(&["10.1.0.5/32"]), true, false).is_err());
        assert_eq!(
            complete_lease(lease(&["10.1.0.5/32"]), false, false).expect("no gateway asked").ips[0]
                .gateway,
            None
        );
    }

    #[test]
    fn the_result_of_add_tells_whether_the_mac_followed_from_the_address() {
        let eth0: IfName = "eth0".parse().expect("a name");
        let mut result = lease(&["10.1.0.5/24"]);
        let interface = |name: &str, mac: &str, sandbox: &str| cni_spec::Interface {
            name: name.into(),
            mac: mac.into(),
            sandbox: sandbox.into(),
            ..cni_spec::Interface::default()
        };
        result.interfaces = vec![
            interface("eth0", "02:00:00:00:00:01", ""),
            interface("eth0", "0a:58:0a:01:00:05", "/n"),
        ];
        result.ips[0].interface = Some(1);
        assert!(!had_another_mac(Some(&result), &eth0) && !had_another_mac(None, &eth0));
        // The address of another interface of the chain.
        result.ips.push(IpConfig { interface: Some(0), ..IpConfig::new(net("192.0.2.1/24")) });
        assert!(!had_another_mac(Some(&result), &eth0));
        result.ips[1].interface = Some(1);
        assert!(had_another_mac(Some(&result), &eth0), "a second address");
        result.ips.pop();
        result.interfaces[1].mac = "02:00:00:00:00:09".into();
        assert!(had_another_mac(Some(&result), &eth0), "set by tuning");
    }

    #[test]
    fn a_route_without_gateway_takes_that_of_its_family() {
        let mut lease =
            complete_lease(lease(&["10.1.0.5/24", "fd00::5/64"]), true, false).expect("possible");
        lease.routes = vec![
            cni_spec::Route { mtu: Some(1400), ..cni_spec::Route::new(net("10.0.0.0/8"), None) },
            cni_spec::Route::new(net("fd00::/16"), None),
            cni_spec::Route::new(net("192.0.2.0/24"), "10.1.0.9".parse().ok()),
            cni_spec::Route {
                scope: Some(SCOPE_LINK),
                ..cni_spec::Route::new(net("198.51.100.0/24"), None)
            },
        ];
        let routes = pod_routes(&lease, 3);
        let via: Vec<Option<String>> =
            routes.iter().map(|route| route.via.map(|via| via.to_string())).collect();
        assert_eq!(
            via,
            [Some("10.1.0.1".into()), Some("fd00::1".into()), Some("10.1.0.9".into()), None]
        );
        assert_eq!(routes[0].mtu, Some(1400));
        assert!(missing_routes(&routes, &routes).is_empty());
        assert_eq!(missing_routes(&routes, &routes[1..]), routes[..1]);
    }
}
