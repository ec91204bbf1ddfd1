//! `orchctl net trace`: a packet from one pod to another, and every link that it crosses.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Context as _, bail};
use cni_netlink::{NetNs, Netlink, Route, RouteFilter};
use orch_client::Client;
use serde::Serialize;
use serde_json::Value;

use super::checks::mac_text;
use super::hosts::{Host, Hosts, need_root};
use super::probe::{self, Echo, Seen, Spot};
use super::view::{self, View};
use super::{Format, print_json};
use crate::kube::wire;
use crate::output;

/// Echoes to send; one may be lost to chance.
const ECHOES: u32 = 3;
/// Payload of an echo.
const PAYLOAD_BYTES: usize = 56;

/// A pod and where it is.
struct Pod {
    name: String,
    ip: IpAddr,
    host: Host,
    node: NetNs,
    netns: NetNs,
    /// Its interface: index, name, and index of the other end.
    link: u32,
    link_name: String,
    mtu: u32,
    peer: Option<u32>,
    /// Route that it takes to the other pod.
    route: String,
}

/// One link on the way.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Hop {
    /// Node, or pod.
    place: String,
    link: String,
    /// What is known of it: MTU, route, entries.
    facts: String,
    /// Test packets seen here; `None` where packets pass without being seen.
    seen: Option<Count>,
    /// Packets received by the link while the test ran, whoever's they were.
    rx_packets: u64,
    tx_packets: u64,
    /// Dropped or broken ones in the same time.
    drops: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Count {
    requests: u32,
    replies: u32,
}

/// A trace.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    from: String,
    to: String,
    sent: u32,
    answered: usize,
    /// Median round trip.
    round_trip_us: Option<u64>,
    hops: Vec<Hop>,
    /// Where the packet was lost; `None` if it came back.
    lost: Option<String>,
}

/// Prints the trace; 1 as exit code when no packet came back.
pub(super) async fn run(
    hosts: &Hosts,
    client: &Client,
    from: &str,
    to: &str,
    namespace: &str,
    ipv6: bool,
    format: Option<Format>,
) -> anyhow::Result<u8> {
    need_root("enters network namespaces and follows packets with packet sockets")?;
    let all = hosts.all()?;
    let (there, here) = (find(client, to, namespace).await?, find(client, from, namespace).await?);
    let (from_ip, to_ip) = family(&here.ips, &there.ips, ipv6).ok_or_else(|| {
        let what = if ipv6 { "IPv6 addresses" } else { "addresses of one family" };
        output::hinted(
            "`orchctl get pod NAME -o yaml` shows them as podIPs",
            format!(
                "pods {from} and {to} do not both have {what}: {:?} and {:?}",
                here.ips, there.ips
            ),
        )
    })?;
    let sender = open(&all, from, &here.node, from_ip, to_ip)?;
    let receiver = open(&all, to, &there.node, to_ip, from_ip)?;
    let trace = follow(&sender, &receiver)?;
    if format == Some(Format::Json) {
        print_json(&trace)?;
    } else {
        print(&trace)?;
    }
    Ok(u8::from(trace.lost.is_some()))
}

/// What the API server says of a pod.
struct Known {
    node: String,
    ips: Vec<IpAddr>,
}

/// An address of each of both, of one family: IPv4 before IPv6, unless that is asked for. Pure.
fn family(from: &[IpAddr], to: &[IpAddr], ipv6: bool) -> Option<(IpAddr, IpAddr)> {
    let pair = |ipv4: bool| {
        let of_family = |ips: &[IpAddr]| ips.iter().copied().find(|ip| ip.is_ipv4() == ipv4);
        of_family(from).zip(of_family(to))
    };
    if ipv6 { pair(false) } else { pair(true).or_else(|| pair(false)) }
}

async fn find(client: &Client, name: &str, namespace: &str) -> anyhow::Result<Known> {
    let (namespace, name) = name.split_once('/').unwrap_or((namespace, name));
    let path =
        format!("/api/v1/namespaces/{}/pods/{}", wire::encode(namespace), wire::encode(name));
    let Some(pod): Option<Value> = wire::get_opt(client, &path).await? else {
        return Err(output::hinted(
            format!("list what is there with `orchctl get pods -n {namespace}`"),
            format!("pod {name:?} is absent from namespace {namespace:?}"),
        ));
    };
    if pod["spec"]["hostNetwork"] == Value::Bool(true) {
        bail!(
            "pod {name} uses its node's network: there is no way through the pod network to follow"
        );
    }
    let status = &pod["status"];
    let all = status["podIPs"].as_array().into_iter().flatten().map(|one| &one["ip"]);
    let ips: Vec<IpAddr> =
        all.filter_map(|ip| ip.as_str()).filter_map(|ip| ip.parse().ok()).collect();
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
    if ips.is_empty() {
        return Err(output::hinted(
            format!("`orchctl describe pod {name} -n {namespace}` says what it waits for"),
            format!("pod {name} has no address yet"),
        ));
    }
    Ok(Known { node, ips })
}

/// Finds the pod's namespace on its node: the one that has the pod's address.
fn open(
    all: &[Host],
    name: &str,
    node_name: &str,
    ip: IpAddr,
    other: IpAddr,
) -> anyhow::Result<Pod> {
    let host = all.iter().find(|host| host.name == node_name).with_context(|| {
        format!("pod {name} is on {node_name}, which cannot be looked into from here")
    })?;
    let node = host.open()?;
    let folder = host.paths.netns_dir();
    let entries =
        std::fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    for entry in entries.flatten().filter(|entry| NetNs::is_nsfs(entry.path())) {
        let netns = NetNs::open(entry.path())?;
        let netlink = Netlink::open_in(&netns)?;
        for link in netlink.links()? {
            let addresses = netlink.addresses(link.index)?;
            if !addresses.iter().any(|address| address.ip() == ip) {
                continue;
            }
            let routes = netlink.routes(&RouteFilter::default())?;
            let view = View { routes, links: netlink.links()?, ..View::default() };
            return Ok(Pod {
                name: name.to_owned(),
                ip,
                host: host.clone(),
                node,
                link: link.index,
                link_name: link.name.clone(),
                mtu: link.mtu,
                peer: link.peer,
                route: view
                    .route_to(other)
                    .map_or_else(|| "no route".to_owned(), |route| route_text(&view, route)),
                netns,
            });
        }
    }
    bail!(
        "no network namespace on {node_name} has the address {ip} of pod {name}: its sandbox is gone"
    )
}

fn route_text(view: &View, route: &Route) -> String {
    let mut text = match route.dst.prefix() {
        0 => "default".to_owned(),
        _ => route.dst.to_string(),
    };
    if let Some(via) = route.via {
        let _ = write!(text, " via {via}");
    }
    let _ = write!(text, " dev {}", view.name_of(route.link));
    text
}

/// A hop before the test.
struct Plan<'a> {
    place: String,
    link: String,
    facts: String,
    netns: &'a NetNs,
    /// Set where packets can be seen.
    index: Option<u32>,
}

fn follow(sender: &Pod, receiver: &Pod) -> anyhow::Result<Trace> {
    let here = view::observe(&sender.host)?;
    let there = view::observe(&receiver.host)?;
    let across = here.node != there.node;
    let ipv4 = receiver.ip.is_ipv4();
    let mut plan = vec![pod_hop(sender)];
    plan.push(veth_hop(&here, sender, &sender.node));
    if across {
        plan.push(bridge_hop(&here, &sender.node, receiver.ip, true));
        let route = here.route_to(receiver.ip);
        let tunnel = route.is_some_and(|route| {
            here.device_of(ipv4).is_some_and(|device| route.link == Some(device.index))
        });
        if tunnel {
            plan.push(sending_hop(&here, &sender.node, receiver.ip));
        }
        plan.push(underlay_hop(&here, &sender.node, ipv4, there.address_of(ipv4)));
        plan.push(underlay_hop(&there, &receiver.node, ipv4, here.address_of(ipv4)));
        if tunnel {
            plan.push(arriving_hop(&there, &receiver.node, ipv4));
        }
        plan.push(bridge_hop(&there, &receiver.node, receiver.ip, true));
    } else {
        // The bridge forwards between its ports; its own device sees nothing of that.
        plan.push(bridge_hop(&here, &sender.node, receiver.ip, false));
    }
    plan.push(veth_hop(&there, receiver, &receiver.node));
    plan.push(pod_hop(receiver));

    let counted: Vec<usize> =
        plan.iter().enumerate().filter(|(_, hop)| hop.index.is_some()).map(|(at, _)| at).collect();
    let spots: Vec<Spot<'_>> = counted
        .iter()
        .filter_map(|at| {
            let hop = &plan[*at];
            Some(Spot { netns: hop.netns, link: hop.index? })
        })
        .collect();
    let before = counters(&plan)?;
    let echo = Echo {
        source: Some(sender.ip),
        target: receiver.ip,
        count: ECHOES,
        payload_bytes: PAYLOAD_BYTES,
    };
    let followed = probe::follow(&sender.netns, &echo, &spots)?;
    let after = counters(&plan)?;

    let mut seen: BTreeMap<usize, Seen> = counted.into_iter().zip(followed.seen).collect();
    let hops: Vec<Hop> = plan
        .into_iter()
        .enumerate()
        .map(|(at, hop)| {
            let [rx, tx, drops] =
                [0, 1, 2].map(|which| after[at][which].saturating_sub(before[at][which]));
            Hop {
                place: hop.place,
                link: hop.link,
                facts: hop.facts,
                seen: seen
                    .remove(&at)
                    .map(|seen| Count { requests: seen.requests, replies: seen.replies }),
                rx_packets: rx,
                tx_packets: tx,
                drops,
            }
        })
        .collect();
    let mut times = followed.round_trips.clone();
    times.sort_unstable();
    let lost = match (&followed.refused, times.is_empty()) {
        (Some(error), _) => {
            Some(format!("the kernel of {} does not send it: {error}", sender.name))
        }
        (None, true) => Some(lost(&hops)),
        (None, false) => None,
    };
    Ok(Trace {
        from: format!("{} ({})", sender.name, sender.ip),
        to: format!("{} ({})", receiver.name, receiver.ip),
        sent: ECHOES,
        answered: times.len(),
        round_trip_us: times
            .get(times.len() / 2)
            .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
        hops,
        lost,
    })
}

/// Where a packet that did not come back was seen last. Pure.
fn lost(hops: &[Hop]) -> String {
    let name = |hop: &Hop| format!("{} of {}", hop.link, hop.place);
    let visible: Vec<(&Hop, Count)> =
        hops.iter().filter_map(|hop| Some((hop, hop.seen?))).collect();
    let mut last: Option<&Hop> = None;
    for (hop, seen) in &visible {
        if seen.requests == 0 {
            return match last {
                None => format!("the request never left {}", name(hop)),
                Some(last) => format!(
                    "the request was lost between {} and {}; `orchctl net doctor` looks for the reason",
                    name(last),
                    name(hop)
                ),
            };
        }
        last = Some(hop);
    }
    let mut last: Option<&Hop> = None;
    for (hop, seen) in visible.iter().rev() {
        if seen.replies == 0 {
            return match last {
                None => format!(
                    "the request arrived, but {} did not answer: a rule in the pod, or its process, drops it",
                    hop.place
                ),
                Some(last) => format!(
                    "the reply was lost between {} and {}; `orchctl net doctor` looks for the reason",
                    name(last),
                    name(hop)
                ),
            };
        }
        last = Some(hop);
    }
    "the reply came back to the sender's link, but too late, or the pod drops it".to_owned()
}

fn pod_hop(pod: &Pod) -> Plan<'_> {
    Plan {
        place: format!("pod {}", pod.name),
        link: pod.link_name.clone(),
        facts: format!("address {}, MTU {}, route {}", pod.ip, pod.mtu, pod.route),
        netns: &pod.netns,
        index: Some(pod.link),
    }
}

fn veth_hop<'a>(view: &View, pod: &Pod, netns: &'a NetNs) -> Plan<'a> {
    let link = pod.peer.and_then(|peer| view.links.iter().find(|link| link.index == peer));
    let facts = match link {
        Some(link) => format!(
            "MTU {}, {}, port of {}",
            link.mtu,
            if link.up && link.carrier { "up" } else { "DOWN" },
            view.name_of(link.master)
        ),
        None => "the node's end of the pod's link is missing".to_owned(),
    };
    Plan {
        place: view.node.clone(),
        link: link.map_or_else(|| "?".to_owned(), |link| link.name.clone()),
        facts,
        netns,
        index: link.map(|link| link.index),
    }
}

fn bridge_hop<'a>(view: &View, netns: &'a NetNs, to: IpAddr, routed: bool) -> Plan<'a> {
    let bridge = view.bridge();
    let facts = match (bridge, view.route_to(to)) {
        (None, _) => "the bridge is missing".to_owned(),
        (Some(bridge), _) if !routed => {
            format!("MTU {}, forwards between its ports", bridge.mtu)
        }
        (Some(bridge), Some(route)) => {
            format!("MTU {}, route {}", bridge.mtu, route_text(view, route))
        }
        (Some(bridge), None) => format!("MTU {}, NO ROUTE to {to}", bridge.mtu),
    };
    Plan {
        place: view.node.clone(),
        link: orch_config::POD_BRIDGE.to_owned(),
        facts,
        netns,
        index: bridge.filter(|_| routed).map(|bridge| bridge.index),
    }
}

fn sending_hop<'a>(view: &View, netns: &'a NetNs, to: IpAddr) -> Plan<'a> {
    let gateway = view.route_to(to).and_then(|route| route.via);
    let neighbour =
        gateway.and_then(|ip| view.neighbours.iter().find(|neighbour| neighbour.ip == ip));
    let mac = neighbour.map(|neighbour| neighbour.mac);
    let entry = mac.and_then(|mac| view.fdb.iter().find(|entry| entry.mac == mac));
    let gateway = gateway.map_or_else(|| "?".to_owned(), |ip| ip.to_string());
    let facts = format!(
        "neighbour {gateway} is {}, FDB → VTEP {}",
        mac.map_or_else(|| "MISSING".to_owned(), |mac| mac_text(&mac)),
        entry
            .and_then(|entry| entry.dst)
            .map_or_else(|| "MISSING".to_owned(), |dst| dst.to_string()),
    );
    Plan {
        place: view.node.clone(),
        link: view.device_name_of(to.is_ipv4()),
        facts,
        netns,
        index: view.device_of(to.is_ipv4()).map(|device| device.index),
    }
}

fn arriving_hop<'a>(view: &View, netns: &'a NetNs, ipv4: bool) -> Plan<'a> {
    let facts = match (view.device_of(ipv4), view.vxlan_of(ipv4)) {
        (Some(device), Some(vxlan)) => format!(
            "VNI {}, UDP {}, MAC {}, {}",
            vxlan.vni,
            vxlan.port,
            mac_text(&device.mac),
            if device.up { "up" } else { "DOWN" }
        ),
        _ => "the VXLAN device is missing".to_owned(),
    };
    Plan {
        place: view.node.clone(),
        link: view.device_name_of(ipv4),
        facts,
        netns,
        index: view.device_of(ipv4).map(|device| device.index),
    }
}

fn underlay_hop<'a>(view: &View, netns: &'a NetNs, ipv4: bool, other: Option<IpAddr>) -> Plan<'a> {
    let link = view.underlay();
    let route = other.and_then(|ip| view.route_to(ip));
    let address = view.address_of(ipv4).map(|ip| ip.to_string()).unwrap_or_default();
    let facts = format!(
        "address {address}, MTU {}, route {}",
        link.map_or(0, |link| link.mtu),
        route.map_or_else(|| "MISSING".to_owned(), |route| route_text(view, route))
    );
    Plan {
        place: view.node.clone(),
        link: link.map_or_else(|| "?".to_owned(), |link| link.name.clone()),
        facts,
        netns,
        index: link.map(|link| link.index),
    }
}

/// Received, sent and dropped packets of each hop's link.
fn counters(plan: &[Plan<'_>]) -> anyhow::Result<Vec<[u64; 3]>> {
    plan.iter()
        .map(|hop| {
            let text = hop.netns.run(|| -> anyhow::Result<String> {
                Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?)
            })?;
            Ok(parse_counters(&text, &hop.link))
        })
        .collect()
}

/// One line of `/proc/net/dev`; zeros for a link that is missing.
fn parse_counters(text: &str, link: &str) -> [u64; 3] {
    let line = text.lines().find_map(|line| {
        let (name, rest) = line.split_once(':')?;
        (name.trim() == link).then_some(rest)
    });
    let numbers: Vec<u64> =
        line.unwrap_or_default().split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
    let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
    // bytes packets errs drop fifo frame compressed multicast | bytes packets errs drop …
    [at(1), at(9), at(2) + at(3) + at(10) + at(11)]
}

fn print(trace: &Trace) -> anyhow::Result<()> {
    output::line(&format!("{} → {}", trace.from, trace.to))?;
    let rows = trace.hops.iter().enumerate().map(|(at, hop)| {
        let count = |pick: fn(&Count) -> u32| {
            hop.seen.as_ref().map_or_else(|| "-".to_owned(), |seen| pick(seen).to_string())
        };
        vec![
            (at + 1).to_string(),
            hop.place.clone(),
            hop.link.clone(),
            count(|seen| seen.requests),
            count(|seen| seen.replies),
            format!("+{}", hop.rx_packets),
            format!("+{}", hop.tx_packets),
            format!("+{}", hop.drops),
            hop.facts.clone(),
        ]
    });
    output::table(
        &["HOP", "WHERE", "LINK", "REQUESTS", "REPLIES", "RX", "TX", "DROPS", "FACTS"],
        rows,
    )?;
    let time = trace
        .round_trip_us
        .map(|us| format!(", round trip {:.3} ms", us as f64 / 1000.0))
        .unwrap_or_default();
    output::line(&format!("{} echoes sent, {} answered{time}", trace.sent, trace.answered))?;
    match &trace.lost {
        Some(lost) => output::line(&format!("LOST: {lost}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(place: &str, seen: Option<(u32, u32)>) -> Hop {
        Hop {
            place: place.to_owned(),
            link: "l".to_owned(),
            facts: String::new(),
            seen: seen.map(|(requests, replies)| Count { requests, replies }),
            rx_packets: 0,
            tx_packets: 0,
            drops: 0,
        }
    }

    #[test]
    fn both_ends_have_addresses_of_one_family() {
        let ips = |text: &str| -> Vec<IpAddr> {
            text.split_whitespace().map(|ip| ip.parse().expect(ip)).collect()
        };
        let dual = ips("10.244.1.2 fd00::2");
        let pair = |from: &str, to: &str| {
            Some((from.parse().expect("address"), to.parse().expect("address")))
        };
        assert_eq!(
            family(&dual, &ips("fd00::3 10.244.2.3"), false),
            pair("10.244.1.2", "10.244.2.3")
        );
        assert_eq!(family(&dual, &ips("10.244.2.3 fd00::3"), true), pair("fd00::2", "fd00::3"));
        assert_eq!(family(&dual, &ips("fd00::3"), false), pair("fd00::2", "fd00::3"));
        assert_eq!(family(&dual, &ips("10.244.2.3"), true), None);
        assert_eq!(family(&dual, &[], false), None);
    }

    #[test]
    fn the_place_of_the_loss_is_between_the_last_sight_and_the_next_link() {
        let hops = [hop("a", Some((3, 0))), hop("b", None), hop("c", Some((0, 0)))];
        assert!(lost(&hops).starts_with("the request was lost between l of a and l of c"));
        let hops = [hop("a", Some((3, 0))), hop("b", Some((3, 3))), hop("c", Some((3, 3)))];
        assert!(lost(&hops).starts_with("the reply was lost between l of b and l of a"));
        let hops = [hop("a", Some((3, 0))), hop("b", Some((3, 0)))];
        assert!(lost(&hops).contains("b did not answer"));
    }

    #[test]
    fn counters_are_read_from_proc() {
        let text = "Inter-|   Receive\n face |bytes\n  eth0: 100 7 1 2 0 0 0 0 200 9 0 3 0 0 0 0\n";
        assert_eq!(parse_counters(text, "eth0"), [7, 9, 6]);
        assert_eq!(parse_counters(text, "eth1"), [0, 0, 0]);
    }
}
