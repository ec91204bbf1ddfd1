//! A healthy node of two has no findings; each fault has its own.

use crate::net::status::NetStatus;
use cni_netlink::{FdbEntry, LinkKind, Neighbour, Route, Vxlan};

use super::*;
use crate::net::leases::{parse_config, parse_lease};

const NOW: u64 = 1_000_000;
const MAC_1: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MAC_2: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn link(index: u32, name: &str, kind: LinkKind, mtu: u32) -> Link {
    Link {
        index,
        name: name.to_owned(),
        kind,
        mac: MAC_1,
        mtu,
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

fn healthy() -> (View, Leases) {
    let vxlan = Vxlan {
        vni: 1,
        port: 8472,
        local: Some([192, 0, 2, 1].into()),
        underlay_index: Some(2),
        learning: false,
    };
    let base_2: IpAddr = [10, 244, 2, 0].into();
    let view = View {
        node: "n1".to_owned(),
        address: Some([192, 0, 2, 1].into()),
        agent: Some(1),
        status: Some(NetStatus {
            node: "n1".to_owned(),
            etcd: "healthy".to_owned(),
            changed_at: NOW,
            ..NetStatus::default()
        }),
        device_name: "vxlan-orch".to_owned(),
        env_mtu: Some(1450),
        env_subnet: "10.244.1.1/24".parse().ok(),
        links: vec![
            link(2, "eth0", LinkKind::Veth, 1500),
            link(3, "vxlan-orch", LinkKind::Vxlan(vxlan), 1450),
            link(4, "cni0", LinkKind::Bridge { vlan_filtering: false }, 1450),
        ],
        addresses: vec![
            (2, "192.0.2.1/24".parse().expect("CIDR")),
            (3, "10.244.1.0/32".parse().expect("CIDR")),
        ],
        routes: vec![Route {
            dst: "10.244.2.0/24".parse().expect("CIDR"),
            via: Some(base_2),
            link: Some(3),
            onlink: true,
            protocol: ROUTE_PROTOCOL,
            ..Route::default()
        }],
        neighbours: vec![Neighbour { link: 3, ip: base_2, mac: MAC_2, permanent: true }],
        fdb: vec![FdbEntry { link: 3, mac: MAC_2, dst: Some([192, 0, 2, 2].into()) }],
        sysctls: [
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "2"),
            ("ipv4/conf/eth0/rp_filter", "1"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into(),
        tx_checksum: Some(true),
        kernel: (6, 1),
        ..View::default()
    };
    let mut leases = parse_config(br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    for number in [1, 2] {
        let value = format!(
            r#"{{"PublicIP":"192.0.2.{number}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:0{number}"}}}}"#
        );
        let mut lease = parse_lease(&format!("10.244.{number}.0-24"), value.as_bytes());
        (lease.ttl_secs, lease.granted_secs) = (Some(86_300), Some(86_400));
        lease.mod_revision = i64::from(number);
        leases.leases.push(lease);
    }
    (view, leases)
}

/// Findings after a change, which must all be on the expected node and of the expected kinds.
fn after(change: impl FnOnce(&mut View, &mut Leases)) -> Vec<Finding> {
    let (mut view, mut leases) = healthy();
    change(&mut view, &mut leases);
    check(&[view], &Ok(leases), NOW)
}

#[track_caller]
fn one(check: Check, words: &str, fix: &str, change: impl FnOnce(&mut View, &mut Leases)) {
    let found = after(change);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].check, check, "{found:#?}");
    assert!(found[0].problem.contains(words), "{found:#?}");
    assert!(found[0].fix.contains(fix), "{found:#?}");
}

#[test]
fn a_healthy_node_has_no_findings() {
    assert_eq!(after(|_, _| {}), []);
}

#[test]
fn a_dead_agent_and_its_own_reports_are_told() {
    one(Check::Agent, "does not run", RESTART, |view, _| view.agent = None);
    one(Check::Lease, "does not reach etcd: refused", "", |view, _| {
        view.status.as_mut().expect("a status").etcd = "refused".to_owned();
    });
    one(Check::Clock, "from the future", "timedatectl", |view, _| {
        view.status.as_mut().expect("a status").changed_at = NOW + 3600;
    });
}

#[test]
fn leases_that_are_missing_late_or_doubled_are_told() {
    one(Check::Lease, "was not renewed for 60 min", RESTART, |_, leases| {
        leases.leases[0].ttl_secs = Some(86_400 - 3600);
    });
    one(Check::Lease, "new pods get addresses of 10.244.9.1/24", RESTART, |view, _| {
        view.env_subnet = "10.244.9.1/24".parse().ok();
    });
    one(Check::DuplicateSubnet, "overlap", "10.244.2.128-25", |_, leases| {
        let mut other = parse_lease("10.244.2.128-25", b"{}");
        other.mod_revision = 9;
        leases.leases.push(other);
    });
    let same_address = after(|_, leases| {
        let mut other = leases.leases[1].clone();
        other.key = "10.244.7.0-24".to_owned();
        other.subnet = "10.244.7.0/24".parse().ok();
        leases.leases.push(other);
    });
    assert!(same_address.iter().any(|found| found.problem.contains("have one address, 192.0.2.2")));
    let none = after(|_, leases| {
        leases.leases.remove(0);
    });
    assert!(none.iter().any(|found| found.problem.contains("no lease in etcd is for 192.0.2.1")));
    let (view, _) = healthy();
    let away = check(&[view], &Err("no answer".to_owned()), NOW);
    assert_eq!((away.len(), away[0].check), (1, Check::Lease));
}

#[test]
fn a_table_of_connections_that_is_nearly_full_is_told() {
    let usage = |flows, limit| Some(cni_nftables::Usage { flows, limit, dropped: 7 });
    one(Check::Conntrack, "950 of 1000", "nf_conntrack_max=2000", |view, _| {
        view.conntrack = usage(950, 1000);
    });
    for (flows, limit) in [(500, 1000), (500, 0)] {
        assert_eq!(after(|view, _| view.conntrack = usage(flows, limit)), []);
    }
}

#[test]
fn large_packets_and_a_way_through_vxlan_do_not_go_together() {
    let veth = |bytes| {
        let sizes = cni_netlink::PacketSizes { gso: bytes, ..Default::default() };
        Link { master: Some(4), sizes, ..link(7, "veth7", LinkKind::Veth, 1450) }
    };
    one(Check::Device, "veth7 of a pod takes packets larger", RESTART, |view, _| {
        view.links.push(veth(524_280));
    });
    assert_eq!(after(|view, _| view.links.push(veth(65_536))), []);
}

#[test]
fn a_device_that_is_missing_down_or_another_is_one_finding_with_what_hangs_on_it() {
    one(
        Check::Device,
        "is missing",
        "ip link add vxlan-orch address 02:00:00:00:00:01 type vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning && ip address add 10.244.1.0/32",
        |view, _| {
            view.links.remove(1);
        },
    );
    one(Check::Device, "is down", "ip link set vxlan-orch up", |view, _| {
        view.links[1].up = false;
        view.routes.clear();
        view.neighbours.clear();
    });
    one(Check::Device, "UDP port 4789, not 8472", "ip link delete vxlan-orch &&", |view, _| {
        if let LinkKind::Vxlan(vxlan) = &mut view.links[1].kind {
            vxlan.port = 4789;
        }
    });
    one(Check::Device, "VNI 7, not 1", "ip link delete", |view, _| {
        if let LinkKind::Vxlan(vxlan) = &mut view.links[1].kind {
            vxlan.vni = 7;
        }
    });
    one(
        Check::Device,
        "the other nodes send to 02:00:00:00:00:01",
        "address 02:00:00:00:00:01",
        |view, _| {
            view.links[1].mac = [2, 0, 0, 0, 0, 9];
        },
    );
    one(
        Check::Device,
        "lacks the address 10.244.1.0",
        "ip address add 10.244.1.0/32",
        |view, _| {
            view.addresses.pop();
        },
    );
    one(Check::Underlay, "eth0 is down", "ip link set eth0 up", |view, _| view.links[0].up = false);
}

#[test]
fn mtus_that_do_not_fit_are_told() {
    one(
        Check::Mtu,
        "leaves 1450: large packets are lost",
        "ip link set vxlan-orch mtu 1450",
        |view, _| {
            view.links[1].mtu = 1500;
        },
    );
    one(Check::Mtu, "cni0 have a larger MTU", "ip link set cni0 mtu 1450", |view, _| {
        view.links[2].mtu = 1500;
    });
    one(Check::Mtu, "new pods get MTU 1500", RESTART, |view, _| view.env_mtu = Some(1500));
    one(Check::ChecksumOffload, "is off", "ethtool -K vxlan-orch tx on", |view, _| {
        view.tx_checksum = Some(false);
    });
    one(
        Check::ChecksumOffload,
        "Linux 4.19 may send wrong",
        "tx-checksum-ip-generic off",
        |view, _| {
            view.kernel = (4, 19);
        },
    );
}

#[test]
fn routes_neighbours_and_forwarding_entries_are_compared_with_the_leases() {
    one(
        Check::Route,
        "the route to 10.244.2.0/24 (192.0.2.2) is missing",
        "ip route replace 10.244.2.0/24 via 10.244.2.0 dev vxlan-orch onlink",
        |view, _| {
            view.routes.clear();
        },
    );
    one(
        Check::Route,
        "a foreign route to 10.244.2.128/25 via 192.0.2.9 dev eth0",
        "ip route delete 10.244.2.128/25 via 192.0.2.9",
        |view, _| {
            view.routes.push(Route {
                dst: "10.244.2.128/25".parse().expect("CIDR"),
                via: Some([192, 0, 2, 9].into()),
                link: Some(2),
                ..Route::default()
            });
        },
    );
    // One that takes no packet is nobody's trouble.
    assert_eq!(
        after(|view, _| view.routes.push(Route {
            dst: "10.244.2.0/24".parse().expect("CIDR"),
            link: Some(2),
            metric: Some(500),
            ..Route::default()
        })),
        []
    );
    one(
        Check::Route,
        "the route to 10.244.8.0/24 belongs to no lease",
        "ip route delete 10.244.8.0/24",
        |view, _| {
            let mut left = view.routes[0].clone();
            left.dst = "10.244.8.0/24".parse().expect("CIDR");
            view.routes.push(left);
        },
    );
    one(
        Check::Neighbour,
        "is stale: it has 02:00:00:00:00:09",
        "ip neighbour replace 10.244.2.0 lladdr 02:00:00:00:00:02",
        |view, _| {
            view.neighbours[0].mac = [2, 0, 0, 0, 0, 9];
        },
    );
    one(
        Check::Neighbour,
        "10.244.2.0 (192.0.2.2) is missing",
        "ip neighbour replace",
        |view, _| {
            view.neighbours.clear();
        },
    );
    one(
        Check::Fdb,
        "is missing",
        "bridge fdb replace 02:00:00:00:00:02 dev vxlan-orch dst 192.0.2.2",
        |view, _| {
            view.fdb.clear();
        },
    );
    one(Check::Fdb, "is stale: it leads to 192.0.2.77", "bridge fdb delete", |view, _| {
        view.fdb.insert(0, FdbEntry { link: 3, mac: MAC_2, dst: Some([192, 0, 2, 77].into()) });
    });
    one(Check::Fdb, "belongs to no lease", "bridge fdb delete", |view, _| {
        view.fdb.push(FdbEntry { link: 3, mac: [2; 6], dst: Some([192, 0, 2, 77].into()) });
    });
}

#[test]
fn a_direct_route_needs_neither_neighbour_nor_forwarding_entry() {
    let direct = after(|view, _| {
        view.routes[0].via = Some([192, 0, 2, 2].into());
        view.routes[0].link = Some(2);
        view.fdb.clear();
        view.neighbours.clear();
    });
    assert_eq!(direct, []);
}

#[test]
fn modes_without_tunnel_are_healthy_too_and_a_node_without_ipv6_is_told() {
    let host_gw = after(|view, leases| {
        leases.backend = "host-gw".to_owned();
        for lease in &mut leases.leases {
            lease.backend = Some("host-gw".to_owned());
            lease.vtep_mac = None;
        }
        view.routes[0].via = Some([192, 0, 2, 2].into());
        view.routes[0].link = Some(2);
        view.fdb.clear();
        view.neighbours.clear();
        view.env_mtu = Some(1500);
        view.links[2].mtu = 1500;
    });
    assert_eq!(host_gw, []);
    one(Check::Underlay, "takes no part in it: eth0 had no IPv6", RESTART, |_, leases| {
        leases.network_v6 = "fc00::/48".parse().ok();
    });
    let other_address_outside = after(|view, leases| {
        leases.leases[0].public_ip = Some([203, 0, 113, 7].into());
        view.status.as_mut().expect("a status").subnet = Some("10.244.1.0/24".to_owned());
    });
    assert_eq!(other_address_outside, []);
}

#[test]
fn settings_and_rules_that_drop_are_told() {
    one(Check::IpForward, "does not forward", "net.ipv4.ip_forward=1", |view, _| {
        view.sysctls.insert("ipv4/ip_forward".to_owned(), "0".to_owned());
    });
    one(Check::RpFilter, "strict on eth0", "rp_filter=2", |view, _| {
        view.sysctls.insert("ipv4/conf/all/rp_filter".to_owned(), "0".to_owned());
    });
    one(
        Check::Firewall,
        "VXLAN packets are dropped by the policy `drop` of the chain inet f in",
        "nft insert rule inet f in udp dport 8472 accept",
        |view, _| {
            view.nft = r#"{"nftables":[{"chain":{"family":"inet","table":"f","name":"in","type":"filter","hook":"input","prio":0,"policy":"drop"}}]}"#.to_owned();
        },
    );
    one(Check::Unreadable, "rules", "", |view, _| view.unreadable.push("rules".to_owned()));
}

/// The healthy node in a dual-stack network.
fn dual_stack() -> (View, Leases) {
    let (mut view, before) = healthy();
    let mut leases = parse_config(
        br#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#,
    );
    leases.leases = before.leases;
    for (lease, number) in leases.leases.iter_mut().zip([1, 2]) {
        lease.subnet_v6 = format!("fd00:0:0:{number}::/64").parse().ok();
        lease.public_ip_v6 = format!("2001:db8::{number}").parse().ok();
        lease.vtep_mac_v6 = Some(format!("06:00:00:00:00:0{number}"));
    }
    let vxlan = Vxlan {
        vni: 1,
        port: 8472,
        local: "2001:db8::1".parse().ok(),
        underlay_index: Some(2),
        learning: false,
    };
    let mut device = link(5, "vxlan-orch-v6", LinkKind::Vxlan(vxlan), 1430);
    device.mac[0] = 6;
    view.links.push(device);
    view.links.retain(|link| link.name != "cni0");
    view.env_mtu = Some(1430);
    let base: IpAddr = "fd00:0:0:2::".parse().expect("address");
    view.routes.push(Route {
        dst: "fd00:0:0:2::/64".parse().expect("CIDR"),
        via: Some(base),
        link: Some(5),
        metric: Some(1024),
        protocol: ROUTE_PROTOCOL,
        ..Route::default()
    });
    let mac = [6, 0, 0, 0, 0, 2];
    view.neighbours.push(Neighbour { link: 5, ip: base, mac, permanent: true });
    view.fdb.push(FdbEntry { link: 5, mac, dst: "2001:db8::2".parse().ok() });
    (view, leases)
}

#[test]
fn ipv6_is_looked_at_like_ipv4() {
    let found = |change: &dyn Fn(&mut View)| {
        let (mut view, leases) = dual_stack();
        change(&mut view);
        check(&[view], &Ok(leases), NOW)
    };
    assert_eq!(found(&|_| {}), []);
    let one = |check: Check, words: &str, change: &dyn Fn(&mut View)| {
        let found = found(change);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].check == check && found[0].problem.contains(words), "{found:#?}");
    };
    one(Check::Route, "fd00:0:0:2::/64", &|view| view.routes.retain(|one| one.dst.is_ipv4()));
    one(Check::Neighbour, "fd00:0:0:2:: is stale", &|view| {
        view.neighbours.last_mut().expect("one").mac = MAC_1;
    });
    one(Check::Fdb, "2001:db8::2 is missing", &|view| {
        view.fdb.pop();
    });
    one(Check::Device, "vxlan-orch-v6 is missing", &|view| {
        view.links.retain(|link| link.index != 5);
    });
    one(Check::Device, "vxlan-orch-v6 is down", &|view| {
        view.links.last_mut().expect("one").up = false;
    });
    one(Check::Mtu, "vxlan-orch-v6 has MTU 1400", &|view| {
        view.links.last_mut().expect("one").mtu = 1400;
    });
    one(Check::IpForward, "does not forward IPv6", &|view| {
        view.sysctls.insert("ipv6/conf/all/forwarding".to_owned(), "0".to_owned());
    });
}
