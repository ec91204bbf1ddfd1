//! The rules, which are made once per node. Pure.
//!
//! An `accept` here would not help a packet that the FORWARD chain of iptables drops, since each chain of a hook has its
//! say. So `mark_pods` marks what may pass, one rule there accepts what is marked (`forward.rs`), and `unmark_pods` takes the mark
//! off again. `confine` drops what may not pass, before all that.

/// Name of the table, of family `inet`.
pub(crate) const TABLE: &str = "cni_firewall";
/// The bit of the packet mark; iptables' users have 13 (portmap), 14 and 15 (Kubernetes).
pub(crate) const MARK: u32 = 1 << 12;
/// Around that of iptables' FORWARD, 0.
const PRIORITY_CONFINE: i32 = -10;
const PRIORITY_MARK: i32 = -1;
const PRIORITY_UNMARK: i32 = 10;

/// How many rules each chain has; CHECK asks.
pub(crate) const RULE_COUNTS: &[(&str, usize)] =
    &[("confine", 2), ("mark_pods", 6), ("unmark_pods", 1)];

/// Writes everything that is not an element. One transaction, the same result however often and beside whom it runs.
pub(crate) fn script() -> String {
    let set = format!("meta mark set meta mark or {MARK:#x}");
    let mut mark = Vec::new();
    for (digit, ip) in [("4", "ip"), ("6", "ip6")] {
        let to = format!("{ip} daddr @pods{digit}");
        mark.push(format!("{ip} saddr @pods{digit} {set}"));
        mark.push(format!("{to} ct state established,related {set}"));
        mark.push(format!("{to} ct status dnat {set}"));
    }
    let confine = ["iifname . oifname @same accept", "iifname @bridges oifname @bridges drop"]
        .map(str::to_owned);
    let unmark =
        [format!("meta mark and {MARK:#x} == {MARK:#x} meta mark set meta mark and {:#x}", !MARK)];
    let mut out = format!(
        "add table inet {TABLE}\n\
         add set inet {TABLE} pods4 {{ type ipv4_addr; }}\n\
         add set inet {TABLE} pods6 {{ type ipv6_addr; }}\n\
         add set inet {TABLE} bridges {{ type ifname; }}\n\
         add set inet {TABLE} same {{ type ifname . ifname; }}\n"
    );
    let chains: [(&str, i32, &[String]); 3] = [
        ("confine", PRIORITY_CONFINE, &confine),
        ("mark_pods", PRIORITY_MARK, &mark),
        ("unmark_pods", PRIORITY_UNMARK, &unmark),
    ];
    for (name, priority, rules) in chains {
        out.push_str(&format!(
            "add chain inet {TABLE} {name} {{ type filter hook forward priority {priority}; policy accept; }}\n\
             flush chain inet {TABLE} {name}\n"
        ));
        for rule in rules {
            out.push_str(&format!("add rule inet {TABLE} {name} {rule}\n"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_has_as_many_rules_as_check_expects() {
        let script = script();
        for (chain, count) in RULE_COUNTS {
            let prefix = format!("add rule inet {TABLE} {chain} ");
            let found = script.lines().filter(|line| line.starts_with(&prefix)).count();
            assert_eq!(found, *count, "{chain}");
        }
    }
}
