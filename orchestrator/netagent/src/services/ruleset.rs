//! The tables `ip orch` and `ip6 orch`: Services, and masquerade of the IPv4 pod network. Pure.
//!
//! A packet's way: `services` (from prerouting and output) looks it up by (address, protocol, port), and by (protocol,
//! port) if the address is the node's own. The verdict is the Service's chain, which picks an endpoint at random and
//! rewrites the destination; conntrack does the same to the rest of the flow. `postrouting` masquerades what must come
//! back through this node. What still has a cluster IP or another address of a Service after that has no endpoint and is
//! rejected.
//!
//! Chains have no names that are words of nft's language (`masquerade`, `reject`): its parser refuses those.
//!
//! Both maps are hashes, so the cost does not depend on the number of Services.

use std::fmt::Write as _;
use std::net::IpAddr;

use cni_nftables::{Chain, Family, Hook, Set, Table};
use ipnetwork::IpNetwork;

use super::model::{Endpoint, Port};

/// Name of our tables: one in each family.
pub const TABLE: &str = "orch";
/// Packet mark "masquerade this". The bit is the one kube-proxy uses, which flannel's rules know.
const MASQUERADE_MARK: u32 = 0x4000;
/// Source ports of masqueraded flows: clear of the VXLAN port (8472), which a peer's firewall may treat specially, and
/// of what services listen on.
const MASQUERADE_PORTS: &str = "10240-65535";

/// Networks that the rules of one family name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Networks {
    /// The whole pod network.
    pub cluster: IpNetwork,
    /// Where cluster IPs come from.
    pub service: IpNetwork,
    /// The address that the node's DNS server answers on.
    pub dns_ip: IpAddr,
}

/// The words of one family.
struct Words {
    family: Family,
    ip: &'static str,
    address: &'static str,
    icmp: &'static str,
    multicast: &'static str,
}

impl Words {
    fn of(network: IpNetwork) -> Self {
        match network {
            IpNetwork::V4(_) => Self {
                family: Family::Ip,
                ip: "ip",
                address: "ipv4_addr",
                icmp: "icmp",
                multicast: "224.0.0.0/4",
            },
            IpNetwork::V6(_) => Self {
                family: Family::Ip6,
                ip: "ip6",
                address: "ipv6_addr",
                icmp: "icmpv6",
                multicast: "ff00::/8",
            },
        }
    }
}

/// Everything that belongs into the table of the networks' family.
#[must_use]
pub fn desired_table(ports: &[Port], networks: &Networks) -> Table {
    let words = Words::of(networks.cluster);
    let v6 = networks.cluster.is_ipv6();
    let mut table = Table::new(words.family, TABLE);
    let mut maps = Maps::default();
    let mut hairpin = Vec::new();
    for port in ports.iter().filter_map(|port| port.in_family(v6)) {
        add_port(&mut table, &mut maps, &port, networks, &words);
        // Also those on other nodes: a slice written by hand need not say where its endpoints are.
        hairpin.extend(port.endpoints.iter().map(|endpoint| format!("{0} . {0}", endpoint.ip)));
    }
    let by_address = format!("{} . inet_proto . inet_service", words.address);
    let by_port = "inet_proto . inet_service";
    table.set("services", Set::map(&by_address, "verdict", maps.services));
    table.set("dead-addresses", Set::map(&by_address, "verdict", maps.dead_addresses));
    table.set("nodeports", Set::map(by_port, "verdict", maps.node_ports));
    table.set("dead-nodeports", Set::map(by_port, "verdict", maps.dead_node_ports));
    table.set("hairpin", Set::keys(&format!("{0} . {0}", words.address), hairpin));
    fixed_chains(&mut table, networks, &words);
    table
}

/// Keys and verdicts of the maps.
#[derive(Default)]
struct Maps {
    services: Vec<(String, String)>,
    /// External addresses that nothing serves. (Those of the Services' network are refused as a whole.)
    dead_addresses: Vec<(String, String)>,
    node_ports: Vec<(String, String)>,
    dead_node_ports: Vec<(String, String)>,
}

fn add_port(table: &mut Table, maps: &mut Maps, port: &Port, networks: &Networks, words: &Words) {
    let key = |ip: &IpAddr| format!("{ip} . {} . {}", port.protocol, port.port);
    let internal = port.pool(port.internal_local);
    if !internal.is_empty() {
        let chain = format!("svc-{}", port.id);
        maps.services.extend(port.cluster_ips.iter().map(|ip| (key(ip), format!("goto {chain}"))));
        balance(table, chain, port, &internal, networks, words);
    }
    let outside = port.external_ips.iter().chain(&port.balancer_ips);
    if port.node_port.is_none() && outside.clone().next().is_none() {
        return;
    }
    let refuse = "goto refuse".to_owned();
    if !external_chain(table, port, networks, words) {
        maps.dead_addresses.extend(outside.map(|ip| (key(ip), refuse.clone())));
        let dead = port.node_port.map(|number| (format!("{} . {number}", port.protocol), refuse));
        maps.dead_node_ports.extend(dead);
        return;
    }
    let verdict = format!("goto ext-{}", port.id);
    maps.services.extend(port.external_ips.iter().map(|ip| (key(ip), verdict.clone())));
    let balancer = balancer_chain(table, port, words).unwrap_or_else(|| verdict.clone());
    // An address may be in both lists.
    let only_balancer = port.balancer_ips.iter().filter(|ip| !port.external_ips.contains(ip));
    maps.services.extend(only_balancer.map(|ip| (key(ip), balancer.clone())));
    let alive = port.node_port.map(|number| (format!("{} . {number}", port.protocol), verdict));
    maps.node_ports.extend(alive);
}

/// The chain of the load balancer's addresses, if not everybody may come: its verdict.
///
/// If ranges are given, and none is of this family, nobody of this family is meant.
fn balancer_chain(table: &mut Table, port: &Port, words: &Words) -> Option<String> {
    if port.source_ranges.is_empty() || port.balancer_ips.is_empty() {
        return None;
    }
    let v6 = words.family == Family::Ip6;
    let ranges = port.source_ranges.iter().filter(|range| range.is_ipv6() == v6);
    let mut rules: Vec<String> =
        ranges.map(|range| format!("{} saddr {range} goto ext-{}", words.ip, port.id)).collect();
    rules.push("counter drop".to_owned());
    let chain = format!("lb-{}", port.id);
    table.chain(chain.clone(), Chain::regular(rules));
    Some(format!("goto {chain}"))
}

/// The chains that do not depend on any Service.
fn fixed_chains(table: &mut Table, networks: &Networks, words: &Words) {
    let Networks { cluster, service, dns_ip } = networks;
    let Words { ip, icmp, multicast, .. } = words;
    let v6 = words.family == Family::Ip6;
    let rules = |rules: &[&str]| rules.iter().map(|rule| (*rule).to_owned()).collect::<Vec<_>>();
    if !v6 {
        table.chain(
            "martians",
            // `route_localnet`, which NodePorts at 127.0.0.1 need, would let neighbours reach loopback (CVE-2020-8558).
            // IPv6 has nothing like it: there NodePorts do not answer at ::1.
            Chain::base(
                "filter",
                Hook::Prerouting,
                -300,
                rules(&[
                    "ip daddr 127.0.0.0/8 iifname != \"lo\" counter drop",
                    "ip saddr 127.0.0.0/8 iifname != \"lo\" counter drop",
                ]),
            ),
        );
    }
    table
        .chain("prerouting", Chain::base("nat", Hook::Prerouting, -100, rules(&["jump services"])));
    table.chain("output", Chain::base("nat", Hook::Output, -100, rules(&["jump services"])));
    let not_loopback = if v6 { "ip6 daddr != ::1 " } else { "" };
    table.chain(
        "services",
        Chain::regular([
            format!("{ip} daddr . meta l4proto . th dport vmap @services"),
            format!("{not_loopback}fib daddr type local meta l4proto . th dport vmap @nodeports"),
        ]),
    );
    let mut masquerade = vec![
        format!("meta mark & {MASQUERADE_MARK:#x} != 0 goto source-nat"),
        // A pod that reaches itself through its Service: it would answer itself directly otherwise.
        format!("ct status dnat {ip} saddr . {ip} daddr @hairpin goto source-nat"),
    ];
    // For IPv6 the overlay's own table does it.
    if !v6 {
        masquerade.push(format!(
            "{ip} saddr {cluster} {ip} daddr != {cluster} {ip} daddr != {multicast} goto source-nat"
        ));
    }
    table.chain("postrouting", Chain::base("nat", Hook::Postrouting, 100, masquerade));
    table.chain(
        "source-nat",
        Chain::regular([
            format!("meta mark set meta mark & {:#x}", !MASQUERADE_MARK),
            format!("meta l4proto {{ tcp, udp }} masquerade to :{MASQUERADE_PORTS} fully-random"),
            "masquerade".to_owned(),
        ]),
    );
    table.chain(
        "mark-masquerade",
        Chain::regular([format!("meta mark set meta mark | {MASQUERADE_MARK:#x}")]),
    );
    let no_endpoint = [
        format!("{ip} daddr {service} goto refuse"),
        format!("{ip} daddr . meta l4proto . th dport vmap @dead-addresses"),
    ];
    // Translation leaves packets alone that fit no window of their connection: the other end would see an address that
    // it never talked to, and reset the connection (kubernetes #74839).
    let invalid = |side: &str| format!("{ip} {side} {cluster} ct state invalid counter drop");
    // Nearly all packets, and none of those that the rules below are for.
    let mut forward = vec!["ct state established accept".to_owned()];
    forward.extend([invalid("saddr"), invalid("daddr")]);
    forward.extend(no_endpoint.clone());
    table.chain("forward", Chain::base("filter", Hook::Forward, 0, forward));
    // While the agent starts again nobody listens there. Told so, resolvers give up at once; not told, they ask again.
    let silence = format!("{ip} saddr {dns_ip} {icmp} type destination-unreachable counter drop");
    let mut output = vec![silence, format!("{ip} daddr {dns_ip} accept")];
    output.extend(no_endpoint.clone());
    table.chain("output-filter", Chain::base("filter", Hook::Output, 0, output));
    let [_, dead_address] = no_endpoint;
    table.chain(
        "input",
        Chain::base(
            "filter",
            Hook::Input,
            0,
            [
                "ct state new fib daddr type local meta l4proto . th dport vmap @dead-nodeports"
                    .to_owned(),
                // An external address may be the node's own.
                format!("ct state new {dead_address}"),
            ],
        ),
    );
    table.chain(
        "refuse",
        Chain::regular([
            "meta l4proto tcp counter reject with tcp reset".to_owned(),
            format!("counter reject with {icmp} type port-unreachable"),
        ]),
    );
}

/// The chain of traffic that comes to a node port or an external address; false if nothing can serve it.
fn external_chain(table: &mut Table, port: &Port, networks: &Networks, words: &Words) -> bool {
    let everywhere = port.pool(false);
    if everywhere.is_empty() {
        return false;
    }
    let ip = words.ip;
    let cluster_wide = if port.internal_local {
        let chain = format!("all-{}", port.id);
        balance(table, chain.clone(), port, &everywhere, networks, words);
        chain
    } else {
        format!("svc-{}", port.id)
    };
    let rules = if port.external_local {
        // Pods and the node itself are inside: for them the policy does not apply.
        let mut rules = vec![
            format!("{ip} saddr {} goto {cluster_wide}", networks.cluster),
            "fib saddr type local jump mark-masquerade".to_owned(),
            format!("fib saddr type local goto {cluster_wide}"),
        ];
        let local = port.pool(true);
        if local.is_empty() {
            rules.push("counter drop".to_owned());
        } else {
            rules.extend(spread(table, port, &local, "loc", words));
        }
        rules
    } else {
        vec!["jump mark-masquerade".to_owned(), format!("goto {cluster_wide}")]
    };
    table.chain(format!("ext-{}", port.id), Chain::regular(rules));
    true
}

/// A chain that spreads flows over `pool`.
fn balance(
    table: &mut Table,
    chain: String,
    port: &Port,
    pool: &[Endpoint],
    networks: &Networks,
    words: &Words,
) {
    // A node's own address is no pod's: an answer to it would take the underlay, past the translation.
    let mut rules =
        vec![format!("{} saddr != {} jump mark-masquerade", words.ip, networks.cluster)];
    rules.extend(spread(table, port, pool, chain.split('-').next().unwrap_or("svc"), words));
    table.chain(chain, Chain::regular(rules));
}

/// The rules that choose an endpoint. With affinity each endpoint has a set of the clients that it served.
fn spread(
    table: &mut Table,
    port: &Port,
    pool: &[Endpoint],
    prefix: &str,
    words: &Words,
) -> Vec<String> {
    let Some(timeout) = port.affinity else { return vec![translate(port, pool)] };
    let ip = words.ip;
    let mut rules = Vec::new();
    let mut verdicts = String::new();
    for (slot, endpoint) in pool.iter().enumerate() {
        // Names have no colons.
        let address = endpoint.ip.to_string().replace(':', ".");
        let name = format!("{}/{address}/{}", port.id, endpoint.port);
        let (set, chain) = (format!("clients-{name}"), format!("{prefix}-ep-{name}"));
        table.set(set.clone(), Set::dynamic(words.address, timeout));
        rules.push(format!("{ip} saddr @{set} goto {chain}"));
        table.chain(
            chain.clone(),
            Chain::regular([
                format!("update @{set} {{ {ip} saddr }}"),
                translate(port, std::slice::from_ref(endpoint)),
            ]),
        );
        write!(verdicts, "{}{slot} : goto {chain}", if slot == 0 { "" } else { ", " })
            .expect("writing to a string cannot fail");
    }
    rules.push(format!("numgen random mod {} vmap {{ {verdicts} }}", pool.len()));
    rules
}

fn translate(port: &Port, pool: &[Endpoint]) -> String {
    let protocol = port.protocol;
    if let [only] = pool {
        let to = std::net::SocketAddr::new(only.ip, only.port);
        return format!("meta l4proto {protocol} dnat to {to}");
    }
    let slots: Vec<String> = pool
        .iter()
        .enumerate()
        .map(|(slot, endpoint)| format!("{slot} : {} . {}", endpoint.ip, endpoint.port))
        .collect();
    format!(
        "meta l4proto {protocol} dnat to numgen random mod {} map {{ {} }}",
        pool.len(),
        slots.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use cni_nftables::SetKind;

    use super::super::model::Protocol;
    use super::*;

    fn networks() -> Networks {
        Networks {
            cluster: "10.244.0.0/16".parse().expect("CIDR"),
            service: "10.96.0.0/12".parse().expect("CIDR"),
            dns_ip: Ipv4Addr::new(10, 96, 0, 10).into(),
        }
    }

    fn port(endpoints: &[(u8, bool, bool)]) -> Port {
        Port {
            id: "default/web/tcp/80".to_owned(),
            protocol: Protocol::Tcp,
            cluster_ips: vec![Ipv4Addr::new(10, 96, 3, 4).into()],
            port: 80,
            node_port: Some(30080),
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            external_local: false,
            internal_local: false,
            affinity: None,
            endpoints: endpoints
                .iter()
                .map(|(last, local, ready)| Endpoint {
                    ip: Ipv4Addr::new(10, 244, 1, *last).into(),
                    port: 8080,
                    local: *local,
                    ready: *ready,
                    near: true,
                })
                .collect(),
        }
    }

    fn verdicts<'a>(table: &'a Table, map: &str) -> Vec<(&'a str, &'a str)> {
        let SetKind::Map(_, elements) = &table.sets[map].kind else { panic!("{map} is a map") };
        elements.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }

    #[test]
    fn a_service_is_found_by_its_cluster_ip_and_node_port() {
        let table = desired_table(&[port(&[(2, true, true), (3, false, true)])], &networks());
        assert_eq!(
            verdicts(&table, "services"),
            [("10.96.3.4 . tcp . 80", "goto svc-default/web/tcp/80")]
        );
        assert_eq!(verdicts(&table, "nodeports"), [("tcp . 30080", "goto ext-default/web/tcp/80")]);
        assert_eq!(
            table.chains["svc-default/web/tcp/80"].rules,
            [
                "ip saddr != 10.244.0.0/16 jump mark-masquerade",
                "meta l4proto tcp dnat to numgen random mod 2 map { 0 : 10.244.1.2 . 8080, 1 : 10.244.1.3 . 8080 }",
            ]
        );
        let SetKind::Keys(hairpin) = &table.sets["hairpin"].kind else {
            panic!("hairpin is a set")
        };
        assert_eq!(
            hairpin.iter().collect::<Vec<_>>(),
            ["10.244.1.2 . 10.244.1.2", "10.244.1.3 . 10.244.1.3"]
        );
    }

    #[test]
    fn without_endpoints_the_cluster_ip_has_no_chain_and_the_node_port_is_rejected() {
        let table = desired_table(&[port(&[])], &networks());
        assert_eq!(verdicts(&table, "services"), []);
        assert_eq!(verdicts(&table, "dead-nodeports"), [("tcp . 30080", "goto refuse")]);
        assert!(
            table.chains["forward"].rules.contains(&"ip daddr 10.96.0.0/12 goto refuse".to_owned())
        );
    }

    #[test]
    fn external_local_keeps_the_client_address_and_uses_local_endpoints() {
        let mut port = port(&[(2, true, true), (3, false, true)]);
        port.external_local = true;
        let table = desired_table(&[port.clone()], &networks());
        let rules = &table.chains["ext-default/web/tcp/80"].rules;
        assert_eq!(
            rules.last().map(String::as_str),
            Some("meta l4proto tcp dnat to 10.244.1.2:8080")
        );
        port.endpoints.remove(0);
        let table = desired_table(&[port], &networks());
        let rules = &table.chains["ext-default/web/tcp/80"].rules;
        assert_eq!(rules.last().map(String::as_str), Some("counter drop"));
    }

    #[test]
    fn affinity_remembers_clients_by_endpoint() {
        let mut port = port(&[(2, true, true), (3, false, true)]);
        port.affinity = Some(Duration::from_secs(60));
        let table = desired_table(&[port], &networks());
        let rules = &table.chains["svc-default/web/tcp/80"].rules;
        assert_eq!(
            rules[1],
            "ip saddr @clients-default/web/tcp/80/10.244.1.2/8080 goto svc-ep-default/web/tcp/80/10.244.1.2/8080"
        );
        assert!(rules[3].starts_with("numgen random mod 2 vmap { 0 : goto svc-ep-default/web"));
    }
}
