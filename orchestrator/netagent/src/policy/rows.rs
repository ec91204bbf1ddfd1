//! What the compiler says, as the kernel's maps hold it.

use std::collections::BTreeMap;

use orch_ebpf_maps::{Action, ClassKey, ISOLATED_EGRESS, ISOLATED_INGRESS, Rule, RuleKey};
use orch_policy::{Direction, Peer, Prefix, Row, Table};

/// The entries of a class map.
#[must_use]
pub fn classes(peers: &BTreeMap<Prefix, Peer>) -> Vec<(ClassKey, u32)> {
    peers
        .iter()
        .map(|(prefix, peer)| (ClassKey::new(prefix.addr(), prefix.prefix_len()), peer.class.0))
        .collect()
}

/// The entries of a rule table.
#[must_use]
pub fn rules(table: &Table) -> Vec<(RuleKey, Rule)> {
    table.rows().iter().map(rule).collect()
}

fn rule(row: &Row) -> (RuleKey, Rule) {
    let direction = match row.direction {
        Direction::Ingress => orch_ebpf_maps::Direction::Ingress,
        Direction::Egress => orch_ebpf_maps::Direction::Egress,
    };
    let class = row.class.0;
    let key = match row.ports.protocol {
        None => RuleKey::any(class, direction),
        Some(protocol) => {
            RuleKey::ports(class, direction, protocol.number(), row.ports.port, row.ports.bits)
        }
    };
    let action = if row.verdict.allow { Action::Allow } else { Action::Deny };
    (key, Rule::new(row.verdict.rule.0, action))
}

/// In which directions policies select the endpoint: the flags of its row.
#[must_use]
pub fn isolation(table: &Table) -> u8 {
    let ingress = if table.speaks(Direction::Ingress) { ISOLATED_INGRESS } else { 0 };
    let egress = if table.speaks(Direction::Egress) { ISOLATED_EGRESS } else { 0 };
    ingress | egress
}
