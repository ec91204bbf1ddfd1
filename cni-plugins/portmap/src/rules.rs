//! The rules, which are made once per node (and once more per subnet of containers). Pure.
//!
//! A packet to a port of the host meets two maps of its family: `at4` with the host's addresses that mappings name, then,
//! if the destination is the host's own, `any4`. What is found is the new destination. Whether the connection also has to
//! get the host's address is decided at the same place by the twins `snat_at4` and `snat_any4`, and carried to the last
//! hook by a bit of the packet mark; there `pods4` leads to the chain of the container's subnet, which masquerades what
//! comes from that subnet or from the loopback, or to the one that masquerades everything.
//!
//! The loopback needs `route_localnet`, and that would let others reach it through the bridge; `martian` drops what comes
//! from any link and goes to 127.0.0.0/8.

use cni_spec::stable_hash;
use ipnetwork::IpNetwork;

use crate::conf::RuleOptions;

/// Begins the name of every table of ours.
pub(crate) const TABLE_PREFIX: &str = "cni_portmap";
/// Chain of the containers for which everything is masqueraded.
pub(crate) const CHAIN_ALL: &str = "from_anywhere";
/// Before connection tracking.
const PRIORITY_RAW: i32 = -300;
const PRIORITY_DNAT: i32 = -100;
const PRIORITY_SNAT: i32 = 100;

/// How many rules each chain has, without those of subnets; CHECK asks.
pub(crate) const RULE_COUNTS: &[(&str, usize)] = &[
    ("hostports4", 5),
    ("hostports6", 5),
    ("prerouting", 2),
    ("output", 2),
    ("postrouting", 2),
    ("martian", 1),
    (CHAIN_ALL, 1),
];

/// Name of the table. Networks with the same options share one; the usual ones have the plain name.
pub(crate) fn table_name(options: &RuleOptions) -> String {
    let usual = RuleOptions {
        masquerade_bit: 13,
        conditions_v4: String::new(),
        conditions_v6: String::new(),
    };
    if *options == usual {
        return TABLE_PREFIX.to_owned();
    }
    let bit = options.masquerade_bit.to_string();
    let parts = [bit.as_str(), &options.conditions_v4, &options.conditions_v6];
    format!("{TABLE_PREFIX}_{:016x}", stable_hash(&parts))
}

/// Name of the chain of a subnet: its address, in the letters that nft takes in names.
pub(crate) fn subnet_chain(address: &IpNetwork) -> String {
    let subnet = format!("{}/{}", address.network(), address.prefix());
    format!("from_{}", subnet.replace(':', "_"))
}

/// Writes everything that is not an element, for containers of these subnets. One transaction, the same result however
/// often and beside whom it runs; elements and the chains of other subnets stay.
pub(crate) fn script(table: &str, options: &RuleOptions, subnets: &[IpNetwork]) -> String {
    let mark = 1_u32 << options.masquerade_bit;
    let mut out = format!("add table inet {table}\n");
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    for (digit, address) in [("4", "ipv4_addr"), ("6", "ipv6_addr")] {
        let any = "inet_proto . inet_service";
        let at = format!("{address} . {any}");
        let to = format!("{address} . inet_service");
        line(format!("add map inet {table} any{digit} {{ type {any} : {to}; }}"));
        line(format!("add map inet {table} at{digit} {{ type {at} : {to}; }}"));
        line(format!("add set inet {table} snat_any{digit} {{ type {any}; }}"));
        line(format!("add set inet {table} snat_at{digit} {{ type {at}; }}"));
        line(format!("add map inet {table} pods{digit} {{ type {address} : verdict; }}"));
    }
    let base = |kind: &str, hook: &str, priority: i32| {
        format!(" {{ type {kind} hook {hook} priority {priority}; policy accept; }}")
    };
    let mut chain = |name: &str, base: String, rules: &[String]| {
        line(format!("add chain inet {table} {name}{base}"));
        line(format!("flush chain inet {table} {name}"));
        for rule in rules {
            line(format!("add rule inet {table} {name} {rule}"));
        }
    };
    for (digit, ip) in [("4", "ip"), ("6", "ip6")] {
        let set_mark = format!("meta mark set meta mark or {mark:#x}");
        let (any, at) =
            ("meta l4proto . th dport", format!("{ip} daddr . meta l4proto . th dport"));
        chain(
            &format!("hostports{digit}"),
            String::new(),
            &[
                format!("{at} @snat_at{digit} {set_mark}"),
                format!("dnat {ip} to {at} map @at{digit}"),
                "fib daddr type != local return".to_owned(),
                format!("{any} @snat_any{digit} {set_mark}"),
                format!("dnat {ip} to {any} map @any{digit}"),
            ],
        );
    }
    let jumps = [("4", &options.conditions_v4), ("6", &options.conditions_v6)].map(
        |(digit, conditions)| {
            let space = if conditions.is_empty() { "" } else { " " };
            format!("meta nfproto ipv{digit} {conditions}{space}jump hostports{digit}")
        },
    );
    chain("prerouting", base("nat", "prerouting", PRIORITY_DNAT), &jumps);
    chain("output", base("nat", "output", PRIORITY_DNAT), &jumps);
    chain(CHAIN_ALL, String::new(), &["masquerade fully-random".to_owned()]);
    chain(
        "postrouting",
        base("nat", "postrouting", PRIORITY_SNAT),
        &[("4", "ip"), ("6", "ip6")].map(|(digit, ip)| {
            format!(
                "meta mark and {mark:#x} == {mark:#x} ct status dnat {ip} daddr vmap @pods{digit}"
            )
        }),
    );
    chain(
        "martian",
        base("filter", "prerouting", PRIORITY_RAW),
        &["iifname != \"lo\" ip daddr 127.0.0.0/8 drop".to_owned()],
    );
    for subnet in subnets {
        let network = format!("{}/{}", subnet.network(), subnet.prefix());
        let rules = if subnet.is_ipv4() {
            vec![format!("ip saddr {{ 127.0.0.0/8, {network} }} masquerade fully-random")]
        } else {
            vec![format!("ip6 saddr {network} masquerade fully-random")]
        };
        chain(&subnet_chain(subnet), String::new(), &rules);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(conditions: &str) -> RuleOptions {
        RuleOptions {
            masquerade_bit: 13,
            conditions_v4: conditions.to_owned(),
            conditions_v6: String::new(),
        }
    }

    #[test]
    fn other_options_have_another_table() {
        assert_eq!(table_name(&options("")), "cni_portmap");
        let other = table_name(&options("ip saddr 10.0.0.0/8"));
        assert!(other.starts_with("cni_portmap_"), "{other}");
        assert_ne!(other, table_name(&options("ip saddr 10.0.0.0/9")));
    }

    #[test]
    fn the_script_has_as_many_rules_as_check_expects_and_a_chain_per_subnet() {
        let subnets = ["10.1.0.7/24".parse().expect("good"), "fd00::5/64".parse().expect("good")];
        let script = script("t", &options("ip saddr 10.0.0.0/8"), &subnets);
        for (chain, count) in RULE_COUNTS {
            let prefix = format!("add rule inet t {chain} ");
            let found = script.lines().filter(|line| line.starts_with(&prefix)).count();
            assert_eq!(found, *count, "{chain}");
        }
        assert!(script.contains("meta nfproto ipv4 ip saddr 10.0.0.0/8 jump hostports4\n"));
        assert!(script.contains("add chain inet t from_10.1.0.0/24\n"), "{script}");
        assert!(script.contains("add chain inet t from_fd00__/64\n"), "{script}");
    }
}
