//! `orchctl net doctor`: looks at every node, judges, and sends packets between the nodes.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use cni_netlink::NetNs;
use serde_json::json;

use super::checks::{self, Check, Finding};
use super::hosts::{Host, Hosts, need_root};
use super::leases::Leases;
use super::probe::{self, Echo, Spot, echo_overhead};
use super::view::{self, View};
use super::{Format, print_json, read_leases};
use crate::output;

/// Payload of a small echo.
const SMALL_BYTES: usize = 56;
/// One may be lost to chance.
const ECHOES: u32 = 2;

/// Prints what is wrong; 1 as exit code when anything is.
pub(super) async fn run(
    hosts: &Hosts,
    node: Option<&str>,
    format: Option<Format>,
) -> anyhow::Result<u8> {
    need_root("enters network namespaces and sends test packets")?;
    let all = hosts.all()?;
    let chosen = Hosts::chosen(&all, node)?;
    let leases = read_leases(hosts).await.map_err(|error| format!("{error:#}"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();

    let mut findings = Vec::new();
    let mut views = Vec::new();
    // Also those that were not asked for: packets have two ends.
    for host in &all {
        match view::observe(host) {
            Ok(view) => views.push((host, view)),
            Err(error) if chosen.iter().any(|one| one.name == host.name) => {
                findings.push(Finding {
                    node: host.name.clone(),
                    check: Check::Agent,
                    problem: format!("{error:#}"),
                    fix: checks::RESTART.to_owned(),
                })
            }
            Err(_) => {}
        }
    }
    let judged: Vec<View> = views.iter().map(|(_, view)| view.clone()).collect();
    findings.extend(checks::check(&judged, &leases, now));
    if let Ok(leases) = &leases {
        for (host, view) in &views {
            if chosen.iter().any(|one| one.name == host.name) {
                for ipv4 in [true, false] {
                    findings.extend(reach_others(host, view, &views, leases, &findings, ipv4)?);
                }
            }
        }
    }
    if node.is_some() {
        let asked = |name: &str| name == "etcd" || chosen.iter().any(|one| one.name == name);
        findings.retain(|finding| asked(&finding.node));
    }
    for finding in &mut findings {
        finding.fix = command(&all, finding);
    }
    print(&findings, format, chosen.len())?;
    Ok(u8::from(!findings.is_empty()))
}

/// The command as it has to be typed here.
fn command(all: &[Host], finding: &Finding) -> String {
    let Some(host) = all.iter().find(|host| host.name == finding.node) else {
        return finding.fix.clone();
    };
    match finding.fix.as_str() {
        "" => String::new(),
        checks::RESTART => host.restart.clone(),
        fix if host.prefix.is_empty() || fix.starts_with(checks::CONNTRACK_LIMIT) => fix.to_owned(),
        fix if fix.contains("&&") || fix.contains(';') => format!("{}sh -c '{fix}'", host.prefix),
        fix => format!("{}{fix}", host.prefix),
    }
}

fn print(findings: &[Finding], format: Option<Format>, nodes: usize) -> anyhow::Result<()> {
    if format == Some(Format::Json) {
        return print_json(&json!({ "findings": findings }));
    }
    if findings.is_empty() {
        let nodes = if nodes == 1 { "1 node".to_owned() } else { format!("{nodes} nodes") };
        return output::line(&format!("no findings ({nodes})"));
    }
    for finding in findings {
        let kind = serde_json::to_value(finding.check)?;
        output::line(&format!(
            "{}: {}: {}",
            finding.node,
            kind.as_str().unwrap_or_default(),
            finding.problem
        ))?;
        if !finding.fix.is_empty() {
            output::line(&format!("    mend it: {}", finding.fix))?;
        }
    }
    Ok(())
}

/// Sends echoes over the overlay from a node to each other one, small ones and the largest.
fn reach_others(
    host: &Host,
    view: &View,
    views: &[(&Host, View)],
    leases: &Leases,
    before: &[Finding],
    ipv4: bool,
) -> anyhow::Result<Vec<Finding>> {
    let explained = |node: &str| {
        before.iter().any(|finding| finding.node == node && finding.check.explains_silence())
            || views.iter().any(|(_, view)| view.node == node && view.is_conntrack_full())
    };
    if explained(&view.node) || explained("etcd") {
        return Ok(Vec::new());
    }
    let own = view.lease(leases);
    let (Some(source), Some(device), Some(underlay)) =
        (own.and_then(|own| own.subnet_of(ipv4)), view.device_of(ipv4), view.underlay())
    else {
        return Ok(Vec::new());
    };
    let here = host.open()?;
    let mut findings = Vec::new();
    for lease in &leases.leases {
        let (Some(target), Some(node)) = (lease.subnet_of(ipv4), lease.public_ip_of(ipv4)) else {
            continue;
        };
        if own.is_some_and(|own| own.key == lease.key)
            || !(lease.is_vxlan(leases.vni) || lease.is_host_gw())
        {
            continue;
        }
        let tunnel =
            view.route_to(target.network()).is_some_and(|route| route.link == Some(device.index));
        let there = views
            .iter()
            .find(|(_, view)| view.lease(leases).is_some_and(|theirs| theirs.key == lease.key));
        if there.is_some_and(|(_, view)| explained(&view.node)) {
            continue;
        }
        // A host of the lab that was taken down on purpose has no other end to look at; its lease lives on.
        let there_netns = there.map(|(host, _)| host.open()).transpose()?;
        let mut spots = Vec::new();
        if tunnel {
            spots.push(Spot { netns: &here, link: device.index });
        }
        spots.push(Spot { netns: &here, link: underlay.index });
        if let (Some((_, there)), Some(netns)) = (there, &there_netns)
            && let (Some(underlay), Some(device)) = (there.underlay(), there.device_of(ipv4))
        {
            spots.push(Spot { netns, link: underlay.index });
            if tunnel {
                spots.push(Spot { netns, link: device.index });
            }
        }
        let name = there.map_or_else(|| node.to_string(), |(host, _)| host.name.clone());
        let echo = Echo {
            source: Some(source.network()),
            target: target.network(),
            count: ECHOES,
            payload_bytes: SMALL_BYTES,
        };
        let small = probe::follow(&here, &echo, &spots)?;
        if small.round_trips.is_empty() {
            findings.push(if tunnel {
                silence(view, &name, leases.port, &small)
            } else {
                silence_without_tunnel(view, &name, &small)
            });
            continue;
        }
        let mtu = if tunnel { device.mtu } else { underlay.mtu };
        findings.extend(large(&here, view, &name, &echo, mtu)?);
    }
    Ok(findings)
}

/// Which part of the way does not let packets through.
fn silence(view: &View, peer: &str, port: u16, followed: &probe::Followed) -> Finding {
    let seen = |at: usize| followed.seen.get(at).copied().unwrap_or_default();
    let whole = followed.seen.len() == 4;
    let node = view.node.clone();
    let finding = |node: String, problem: String, fix: &str| Finding {
        node,
        check: Check::Unreachable,
        problem,
        fix: fix.to_owned(),
    };
    let allow = format!("nft list ruleset | grep -n {port}");
    if let Some(error) = &followed.refused {
        return finding(node, format!("the kernel does not send to {peer}: {error}"), "ip route");
    }
    if seen(0).requests == 0 {
        return finding(
            node,
            format!(
                "packets for {peer} do not reach the VXLAN device: a rule or route takes them away"
            ),
            "ip route && nft list ruleset",
        );
    }
    if seen(1).requests == 0 {
        return finding(
            node,
            format!("UDP {port} is blocked: VXLAN packets for {peer} do not leave this node"),
            &allow,
        );
    }
    if !whole {
        return finding(
            node,
            format!(
                "no answer from {peer} to VXLAN packets: UDP {port} is blocked on the way, or the node is down"
            ),
            "",
        );
    }
    if seen(2).requests == 0 {
        return finding(
            node,
            format!(
                "UDP {port} is blocked: VXLAN packets leave this node, but do not arrive at {peer}; a firewall between the nodes has to let UDP {port} pass"
            ),
            "",
        );
    }
    if seen(3).requests == 0 {
        return finding(
            peer.to_owned(),
            format!(
                "UDP {port} is blocked: VXLAN packets of {node} arrive, but do not reach the VXLAN device"
            ),
            &allow,
        );
    }
    if seen(3).replies == 0 {
        return finding(
            peer.to_owned(),
            format!(
                "packets of {node} come out of the VXLAN device, but the kernel does not answer them"
            ),
            "nft list ruleset",
        );
    }
    if seen(1).replies == 0 {
        return finding(
            peer.to_owned(),
            format!("UDP {port} is blocked: answers for {node} do not arrive there"),
            &allow,
        );
    }
    finding(
        node,
        format!(
            "UDP {port} is blocked: answers of {peer} arrive, but do not reach the VXLAN device"
        ),
        &allow,
    )
}

/// The same where packets travel as they are.
fn silence_without_tunnel(view: &View, peer: &str, followed: &probe::Followed) -> Finding {
    let seen = |at: usize| followed.seen.get(at).copied().unwrap_or_default();
    let problem = if let Some(error) = &followed.refused {
        format!("the kernel does not send to {peer}: {error}")
    } else if seen(0).requests == 0 {
        format!("packets for pods of {peer} do not leave this node")
    } else if followed.seen.len() == 2 && seen(1).requests == 0 {
        format!(
            "packets for pods of {peer} leave this node, but do not arrive: the network between the nodes drops what is not between their own addresses; use the backend vxlan"
        )
    } else {
        format!("packets for pods of {peer} are not answered")
    };
    Finding { node: view.node.clone(), check: Check::Unreachable, problem, fix: String::new() }
}

/// Whether packets of the full size pass.
fn large(
    here: &NetNs,
    view: &View,
    peer: &str,
    small: &Echo,
    mtu: u32,
) -> anyhow::Result<Option<Finding>> {
    let payload = mtu.saturating_sub(echo_overhead(small.target)) as usize;
    let echo = Echo { payload_bytes: payload, ..*small };
    let followed = probe::follow(here, &echo, &[])?;
    if !followed.round_trips.is_empty() {
        return Ok(None);
    }
    let why = followed.refused.map(|error| format!(" ({error})")).unwrap_or_default();
    let from: Option<IpAddr> = view.address_of(small.target.is_ipv4());
    Ok(Some(Finding {
        node: view.node.clone(),
        check: Check::Mtu,
        problem: format!(
            "small packets reach {peer}, but packets of {mtu} bytes do not{why}: the path from {} carries less than the MTU of its link says",
            from.map(|ip| ip.to_string()).unwrap_or_default()
        ),
        fix: String::new(),
    }))
}
