//! Against the real kernel, in namespaces that vanish with the test. Needs root.

use std::collections::BTreeSet;
use std::error::Error;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::thread;

use cni_netlink::{
    AddressOptions, Bridge, Change, FdbEntry, LinkKind, Neighbour, NetNs, Netlink, NetlinkError,
    PortVlan, Route, RouteFilter, VethPair, VxlanDevice, nft_chain_exists,
};
use ipnetwork::IpNetwork;
use nix::sched::{CloneFlags, unshare};

type Result<T = ()> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A namespace of the test's own, made by a thread that ends at once: the open file keeps it.
fn new_netns() -> Result<NetNs> {
    thread::spawn(|| -> Result<NetNs> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(NetNs::current()?)
    })
    .join()
    .map_err(|_| "the thread that makes namespaces panicked")?
}

fn net(text: &str) -> IpNetwork {
    text.parse().expect("a network")
}

#[test]
fn a_pod_is_joined_to_a_bridge_by_a_handful_of_messages() -> Result {
    let (host, pod) = (new_netns()?, new_netns()?);
    let (host, inside) = (Netlink::open_in(&host)?, (Netlink::open_in(&pod)?, &pod));
    let mac = [2, 0, 0, 0, 0, 1];
    let bridge = host.create_bridge(&Bridge {
        name: "cni0".into(),
        mtu: Some(1450),
        mac: Some(mac),
        up: true,
        ..Bridge::default()
    })?;
    assert_eq!((bridge.mac, bridge.mtu, bridge.up), (mac, 1450, true));
    assert_eq!(bridge.kind, LinkKind::Bridge { vlan_filtering: false });

    let (inside, pod) = inside;
    let near = host.create_veth(&VethPair {
        name: "veth0".into(),
        peer_name: "eth0".into(),
        peer_netns: Some(pod.as_fd()),
        master: Some(bridge.index),
        mtu: Some(1450),
        peer_mac: Some([2, 0, 0, 0, 0, 2]),
        up: true,
        ..VethPair::default()
    })?;
    assert_eq!(
        (near.kind, near.master, near.up, near.carrier),
        (LinkKind::Veth, Some(bridge.index), true, false)
    );
    assert_eq!(near.mtu, 1450);
    host.set_alias(near.index, "cni:net/container/eth0")?;
    host.set_port(near.index, true, true)?;

    let far = inside.link("eth0")?.ok_or("the far end is missing")?;
    assert_eq!((far.mtu, far.mac, far.up), (1450, [2, 0, 0, 0, 0, 2], false));
    inside.set_up(far.index)?;
    inside.add_address(far.index, net("10.1.0.2/24"), &AddressOptions::default())?;
    inside.add_address(
        far.index,
        net("fd00::2/64"),
        &AddressOptions { nodad: true, ..AddressOptions::default() },
    )?;
    inside.add_route(&Route {
        via: Some("10.1.0.1".parse()?),
        link: Some(far.index),
        mtu: Some(1400),
        advmss: Some(1300),
        ..Route::default()
    })?;

    let addresses = inside.addresses(far.index)?;
    assert!(
        addresses.contains(&net("10.1.0.2/24")) && addresses.contains(&net("fd00::2/64")),
        "{addresses:?}"
    );
    let routes = inside.routes(&RouteFilter { link: Some(far.index), ..RouteFilter::default() })?;
    let default = routes.iter().find(|route| route.dst.prefix() == 0).ok_or("no default route")?;
    assert_eq!(
        (default.via, default.mtu, default.advmss),
        (Some("10.1.0.1".parse()?), Some(1400), Some(1300))
    );

    let port = host.link("veth0")?.ok_or("the near end is missing")?;
    assert_eq!(port.alias.as_deref(), Some("cni:net/container/eth0"));
    let state = port.port.ok_or("no port")?;
    assert!(state.hairpin && state.isolated);
    assert_eq!(host.ports(bridge.index)?.len(), 1);
    assert!(port.carrier, "both ends are up");

    host.delete_link(near.index)?;
    host.delete_link(near.index)?;
    assert!(inside.link("eth0")?.is_none(), "the far end goes with the near one");
    Ok(())
}

/// All that a pod's interface needs, in one datagram and in the kernel's order.
#[test]
fn an_interface_is_set_up_by_one_datagram() -> Result {
    let pod = new_netns()?;
    let inside = Netlink::open_in(&pod)?;
    let near = inside.create_veth(&VethPair {
        name: "eth0".into(),
        peer_name: "peer".into(),
        ..VethPair::default()
    })?;
    let link = near.index;
    let route = |dst: &str, via: &str| -> Result<Change> {
        let route =
            Route { dst: net(dst), via: Some(via.parse()?), link: Some(link), ..Route::default() };
        Ok(Change::AppendRoute(route))
    };
    let options = AddressOptions { nodad: true, ..AddressOptions::default() };
    let changes = [
        Change::AddAddress { link, address: net("10.1.0.2/24"), options: options.clone() },
        Change::AddAddress { link, address: net("fd00::2/64"), options: options.clone() },
        Change::SetUp { link },
        route("0.0.0.0/0", "10.1.0.1")?,
        route("::/0", "fd00::1")?,
        Change::SetArpNotify { link },
        Change::SetAlias { link, alias: "mine".into() },
    ];
    assert!(inside.apply(&changes)?.is_empty());
    let addresses = inside.addresses(link)?;
    assert!(addresses.contains(&net("10.1.0.2/24")) && addresses.contains(&net("fd00::2/64")));
    let seen = inside.link("eth0")?.ok_or("no eth0")?;
    assert!(seen.up && seen.alias.as_deref() == Some("mine"));
    let routes = inside.routes(&RouteFilter { link: Some(link), ..RouteFilter::default() })?;
    assert_eq!(routes.iter().filter(|route| route.dst.prefix() == 0).count(), 2);
    let notify = pod.run(|| -> std::result::Result<String, NetlinkError> {
        Ok(std::fs::read_to_string("/proc/sys/net/ipv4/conf/eth0/arp_notify").unwrap_or_default())
    })?;
    assert_eq!(notify.trim(), "1");

    let again = inside.apply(&changes)?;
    let places: Vec<usize> = again.iter().map(|refused| refused.index).collect();
    assert_eq!(places, [0, 1, 3, 4], "addresses and routes are there: {again:?}");
    assert!(again.iter().all(|refused| refused.error.is_exists()));
    Ok(())
}

#[test]
fn a_pair_whose_removal_is_not_waited_for_is_gone_all_the_same() -> Result {
    let (host, pod) = (new_netns()?, new_netns()?);
    let (host, inside) = (Netlink::open_in(&host)?, Netlink::open_in(&pod)?);
    let pair = VethPair {
        name: "veth0".into(),
        peer_name: "eth0".into(),
        peer_netns: Some(pod.as_fd()),
        up: true,
        ..VethPair::default()
    };
    for _ in 0..10 {
        let near = host.create_veth(&pair)?;
        host.delete_link_unawaited(near.index)?;
        assert!(host.link("veth0")?.is_none());
        assert!(inside.link("eth0")?.is_none(), "the far end goes with the near one");
    }
    host.delete_link_unawaited(9999)?;
    // Only what the kernel does not let go of is an error.
    let lo = host.link("lo")?.ok_or("no lo")?;
    assert!(host.delete_link_unawaited(lo.index).is_err());
    Ok(())
}

#[test]
fn vlans_of_a_port_are_set_and_listed() -> Result {
    let host = Netlink::open_in(&new_netns()?)?;
    let bridge = match host.create_bridge(&Bridge {
        name: "br".into(),
        vlan_filtering: true,
        ..Bridge::default()
    }) {
        // A kernel without CONFIG_BRIDGE_VLAN_FILTERING.
        Err(error) if error.is_unsupported() => return Ok(()),
        made => made?,
    };
    assert_eq!(bridge.kind, LinkKind::Bridge { vlan_filtering: true });
    let port = host.create_veth(&VethPair {
        name: "a".into(),
        peer_name: "b".into(),
        master: Some(bridge.index),
        ..VethPair::default()
    })?;
    host.add_vlan(port.index, PortVlan::access(100))?;
    host.add_vlan(port.index, PortVlan::tagged(200))?;
    host.delete_vlan(port.index, 1)?;
    host.delete_vlan(port.index, 1)?;
    assert_eq!(host.vlans(port.index)?, [PortVlan::access(100), PortVlan::tagged(200)]);
    Ok(())
}

#[test]
fn a_vxlan_peer_is_programmed_read_back_and_removed() -> Result {
    let host = Netlink::open_in(&new_netns()?)?;
    let underlay = host.create_veth(&VethPair {
        name: "eth0".into(),
        peer_name: "peer".into(),
        up: true,
        ..VethPair::default()
    })?;
    host.add_address(underlay.index, net("192.0.2.1/24"), &AddressOptions::default())?;
    let want = VxlanDevice {
        name: "flannel.1".into(),
        vni: 1,
        port: 8472,
        local: Some("192.0.2.1".parse()?),
        underlay_index: Some(underlay.index),
        mac: Some([2, 0, 0, 0, 0, 9]),
        mtu: Some(1450),
        learning: false,
    };
    let device = host.create_vxlan(&want)?;
    let LinkKind::Vxlan(seen) = &device.kind else { panic!("{device:?}") };
    assert_eq!((seen.vni, seen.port, seen.local), (want.vni, want.port, want.local));
    assert_eq!((seen.underlay_index, seen.learning), (want.underlay_index, false));
    assert_eq!((device.mac, device.mtu), ([2, 0, 0, 0, 0, 9], 1450));
    let taken = host
        .create_vxlan(&VxlanDevice { name: "other".into(), ..want })
        .expect_err("the VNI is taken");
    assert!(taken.is_exists(), "{taken}");

    host.set_up(device.index)?;
    host.add_address(device.index, net("10.244.1.0/32"), &AddressOptions::default())?;
    let mac = [2, 0, 0, 0, 0, 10];
    let forwarding = |node: &str| FdbEntry { link: device.index, mac, dst: node.parse().ok() };
    host.replace_fdb(&forwarding("192.0.2.2"))?;
    host.replace_fdb(&forwarding("192.0.2.3"))?;
    assert_eq!(host.fdb(device.index)?, [forwarding("192.0.2.3")]);
    let gateway: IpAddr = "10.244.2.0".parse()?;
    let neighbour = Neighbour { link: device.index, ip: gateway, mac, permanent: true };
    host.replace_neighbour(&neighbour)?;
    assert!(host.neighbours(device.index)?.contains(&neighbour));
    let route = Route {
        dst: net("10.244.2.0/24"),
        via: Some(gateway),
        link: Some(device.index),
        onlink: true,
        protocol: 77,
        ..Route::default()
    };
    host.replace_route(&route)?;
    host.replace_route(&route)?;
    let ours = RouteFilter { protocol: Some(77), ..RouteFilter::default() };
    let seen = host.routes(&ours)?;
    assert_eq!(seen, [Route { scope: Some(0), ..route.clone() }]);
    for _ in 0..2 {
        host.delete_route(&route)?;
        host.delete_neighbour(&neighbour)?;
        host.delete_fdb(&forwarding("192.0.2.3"))?;
    }
    assert!(host.routes(&ours)?.is_empty() && host.fdb(device.index)?.is_empty());
    assert!(!host.neighbours(device.index)?.contains(&neighbour));
    Ok(())
}

#[test]
fn ipv6_routes_are_replaced_and_listed_with_their_next_hop() -> Result {
    let host = Netlink::open_in(&new_netns()?)?;
    let link = host.create_veth(&VethPair {
        name: "a".into(),
        peer_name: "b".into(),
        up: true,
        ..VethPair::default()
    })?;
    let far = host.link("b")?.ok_or("no far end")?;
    host.set_up(far.index)?;
    host.add_address(
        link.index,
        net("fd00::1/64"),
        &AddressOptions { nodad: true, ..AddressOptions::default() },
    )?;
    let default = Route {
        dst: net("::/0"),
        via: Some(IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2))),
        link: Some(link.index),
        ..Route::default()
    };
    host.add_route(&default)?;
    let seen =
        host.routes(&RouteFilter { protocol: Some(default.protocol), ..RouteFilter::default() })?;
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!((seen[0].dst, seen[0].via, seen[0].link), (default.dst, default.via, default.link));
    host.delete_route(&default)?;
    assert!(
        host.routes(&RouteFilter { protocol: Some(default.protocol), ..RouteFilter::default() })?
            .is_empty()
    );
    Ok(())
}

#[test]
fn a_refusal_carries_the_kernels_own_words() -> Result {
    let host = Netlink::open_in(&new_netns()?)?;
    let link = host.create_bridge(&Bridge { name: "br".into(), up: true, ..Bridge::default() })?;
    let route =
        Route { via: Some("192.0.2.9".parse()?), link: Some(link.index), ..Route::default() };
    let refused = host.add_route(&route).expect_err("no such gateway");
    assert!(refused.to_string().contains("Nexthop has invalid gateway"), "{refused}");
    let taken =
        host.create_bridge(&Bridge { name: "br".into(), ..Bridge::default() }).expect_err("taken");
    assert!(taken.is_exists(), "{taken}");
    assert!(host.set_up(9999).expect_err("no such link").is_not_found());
    assert!(host.link("nothing")?.is_none() && host.link_at(9999)?.is_none());
    assert!(host.addresses(9999)?.is_empty() && host.fdb(9999)?.is_empty());
    // The socket is as good as new after a refusal.
    assert_eq!(
        host.links()?
            .iter()
            .map(|link| link.name.as_str())
            .filter(|name| ["lo", "br"].contains(name))
            .count(),
        2
    );
    Ok(())
}

#[test]
fn links_are_listed_whole_while_others_come_and_go() -> Result {
    let netns = new_netns()?;
    let host = Netlink::open_in(&netns)?;
    let mut stay = BTreeSet::from(["lo".to_owned()]);
    for number in 0..150 {
        let name = format!("stay{number}");
        host.create_bridge(&Bridge { name: name.clone(), ..Bridge::default() })?;
        stay.insert(name);
    }
    thread::scope(|scope| -> Result {
        let churn = scope.spawn(|| -> Result {
            let other = Netlink::open_in(&netns)?;
            for _ in 0..20 {
                let link =
                    other.create_bridge(&Bridge { name: "come".into(), ..Bridge::default() })?;
                other.delete_link(link.index)?;
            }
            Ok(())
        });
        let mut reads = 0;
        while !churn.is_finished() || reads < 5 {
            let seen: BTreeSet<String> = match host.links() {
                Ok(links) => links.into_iter().map(|link| link.name).collect(),
                Err(NetlinkError::Interrupted { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            assert!(
                stay.is_subset(&seen),
                "missing: {:?}",
                stay.difference(&seen).collect::<Vec<_>>()
            );
            reads += 1;
        }
        churn.join().map_err(|_| "the churn panicked")?
    })
}

#[test]
fn a_chain_of_nftables_is_found_and_missed() -> Result {
    new_netns()?.run(|| {
        assert!(!nft_chain_exists("orch_test", "c")?);
        let made = Command::new("nft")
            .arg("add table inet orch_test; add chain inet orch_test c")
            .status()?;
        assert!(made.success());
        assert!(nft_chain_exists("orch_test", "c")?);
        assert!(!nft_chain_exists("orch_test", "d")?);
        Ok(())
    })
}

#[test]
fn many_changes_go_in_few_datagrams_and_each_refusal_names_its_change() -> Result {
    let netns = new_netns()?;
    let netlink = Netlink::open_in(&netns)?;
    let device = netlink.create_vxlan(&VxlanDevice {
        name: "vx".into(),
        vni: 1,
        port: 8472,
        local: Some("192.0.2.1".parse()?),
        mac: Some([2, 0, 0, 0, 0, 1]),
        ..VxlanDevice::default()
    })?;
    netlink.set_up(device.index)?;
    // As an overlay's device has one; without it nothing is "on the link".
    netlink.add_address(device.index, net("10.99.0.1/32"), &AddressOptions::default())?;
    let mut changes = Vec::new();
    for number in 0..500_u16 {
        let [high, low] = number.to_be_bytes();
        let base = IpAddr::from([10, 100 + high, low, 0]);
        let mac = [2, 0, 0, 1, high, low];
        changes.push(Change::PutFdb(FdbEntry {
            link: device.index,
            mac,
            dst: Some(IpAddr::from([192, 0, 2, 7])),
        }));
        changes.push(Change::PutNeighbour(Neighbour {
            link: device.index,
            ip: base,
            mac,
            permanent: true,
        }));
        changes.push(Change::PutRoute(Route {
            dst: IpNetwork::new(base, 24)?,
            via: Some(base),
            // Every hundredth by a link that is not there.
            link: Some(if number % 100 == 7 { 9999 } else { device.index }),
            onlink: true,
            ..Route::default()
        }));
    }
    let refused = netlink.apply(&changes)?;
    let places: Vec<usize> = refused.iter().map(|refused| refused.index).collect();
    assert_eq!(places, [23, 323, 623, 923, 1223]);
    assert!(refused[0].error.to_string().starts_with("replace route to 10.100.7.0/24"));
    let filter = RouteFilter { link: Some(device.index), ..RouteFilter::default() };
    let routes = |netlink: &Netlink| -> Result<usize> {
        Ok(netlink.routes(&filter)?.iter().filter(|route| route.dst.is_ipv4()).count())
    };
    assert_eq!(routes(&netlink)?, 495);
    let neighbours = netlink.neighbours(device.index)?;
    assert_eq!(neighbours.iter().filter(|neighbour| neighbour.permanent).count(), 500);

    // What is gone already is no refusal, and the socket serves on.
    let removals: Vec<Change> = changes
        .into_iter()
        .filter_map(|change| match change {
            Change::PutRoute(mut route) => {
                route.link = Some(device.index);
                Some(Change::DeleteRoute(route))
            }
            Change::PutFdb(entry) => Some(Change::DeleteFdb(entry)),
            _ => None,
        })
        .collect();
    assert!(netlink.apply(&removals)?.is_empty());
    assert!(netlink.apply(&removals)?.is_empty());
    assert_eq!(routes(&netlink)?, 0);
    Ok(())
}
