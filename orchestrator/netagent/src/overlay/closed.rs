//! The closed underlay: VXLAN has no authentication, so a packet counts only if its sender is a node, and only nodes
//! send any.
//!
//! - `input`: what comes to the VXLAN port is dropped unless its source is the VTEP of a lease. That also drops what a pod
//!   sends to its own node, or through the overlay to another one: its source is a pod.
//! - `forward`: a pod cannot send to the VXLAN port of any node. Without this rule masquerade would give the packet the
//!   node's address, which is a VTEP's.
//! - `prerouting`: a packet from the pods' bridge has a source out of this node's subnet. (Which pod may use which of its
//!   addresses is the business of the `policy` plugin.)
//!
//! One table of ours, one set of addresses; a node that joins or leaves is one element.

use std::net::Ipv4Addr;

use cni_nftables::{Chain, Family, Hook, Nft, NftError, Set, Table};
use ipnetwork::Ipv4Network;

use super::Peers;
use crate::lease::{Identity, Network};

/// Name of the table.
pub const TABLE: &str = "orch-overlay";
/// Set of the nodes' addresses.
const NODES: &str = "nodes";
/// Before the rules of others, and before destination NAT: what is dropped here concerns nobody.
const BEFORE_FILTER: i32 = -10;
const BEFORE_CONNTRACK: i32 = -300;

/// Everything that belongs into the table. Pure.
#[must_use]
pub fn desired_table(network: &Network, me: &Identity, peers: &Peers) -> Table {
    let (port, own, bridge) = (network.config.port, network.own, orch_config::POD_BRIDGE);
    let mut table = Table::new(Family::Ip, TABLE);
    // Our own address is there for the rule about pods; we send nothing to ourselves.
    let nodes = peers.values().map(|peer| peer.public_ip).chain([me.public_ip]);
    table.set(NODES, Set::keys("ipv4_addr", nodes.map(|ip| ip.to_string())));
    let rules = |rules: &[String]| rules.to_vec();
    table.chain(
        "input",
        Chain::base(
            "filter",
            Hook::Input,
            BEFORE_FILTER,
            rules(&[format!("udp dport {port} ip saddr != @{NODES} counter drop")]),
        ),
    );
    table.chain(
        "forward",
        Chain::base(
            "filter",
            Hook::Forward,
            BEFORE_FILTER,
            rules(&[format!(
                "iifname \"{bridge}\" udp dport {port} ip daddr @{NODES} counter drop"
            )]),
        ),
    );
    table.chain(
        "prerouting",
        Chain::base("filter", Hook::Prerouting, BEFORE_CONNTRACK, rules(&[spoofed(bridge, own)])),
    );
    table
}

/// A pod that asks for an address by DHCP has none yet.
fn spoofed(bridge: &str, own: Ipv4Network) -> String {
    format!(
        "iifname \"{bridge}\" ip saddr != {own} ip saddr != {} counter drop",
        Ipv4Addr::UNSPECIFIED
    )
}

/// The table in the kernel, and what we know of it.
#[derive(Debug, Default)]
pub(super) struct Closed {
    nft: Nft,
    applied: Option<Applied>,
}

#[derive(Debug)]
struct Applied {
    table: Table,
    /// What the kernel says of it, without the elements.
    shape: Option<String>,
}

impl Closed {
    /// Makes the kernel hold the table. With `verify` it is read back first, and written anew if somebody changed it;
    /// true if so.
    ///
    /// # Errors
    /// If nft refuses. What was in force before still is; the next call writes the whole table.
    pub(super) fn apply(&mut self, want: Table, verify: bool) -> Result<bool, NftError> {
        let damaged = verify && !self.is_intact()?;
        let before = self.applied.take().filter(|_| !damaged);
        let script = match &before {
            Some(before) => want.update_script(&before.table),
            None => want.replace_script(),
        };
        self.nft.apply(&script)?;
        let same_shape = before.as_ref().is_some_and(|before| {
            before.table.chains == want.chains && before.table.sets.len() == want.sets.len()
        });
        let shape = match before {
            Some(before) if same_shape => before.shape,
            _ => self.nft.listing(&want)?.map(|listing| parse(&listing).0),
        };
        self.applied = Some(Applied { table: want, shape });
        Ok(damaged)
    }

    /// Whether the kernel still holds what was applied, if anything was.
    fn is_intact(&self) -> Result<bool, NftError> {
        let Some(Applied { table, shape }) = &self.applied else { return Ok(true) };
        let Some(listing) = self.nft.listing(table)? else { return Ok(false) };
        let (seen, mut elements) = parse(&listing);
        elements.sort_unstable();
        let mut wanted: Vec<Ipv4Addr> = match table.sets.get(NODES).map(|set| &set.kind) {
            Some(cni_nftables::SetKind::Keys(keys)) => {
                keys.iter().filter_map(|key| key.parse().ok()).collect()
            }
            _ => Vec::new(),
        };
        wanted.sort_unstable();
        Ok(Some(seen) == *shape && elements == wanted)
    }
}

/// Takes a listing apart: the text without elements, and the elements.
fn parse(listing: &str) -> (String, Vec<Ipv4Addr>) {
    let mut shape = String::new();
    let mut elements = Vec::new();
    let mut rest = listing;
    while let Some((before, list)) = rest.split_once("elements = {") {
        shape.push_str(before);
        let (list, after) = list.split_once('}').unwrap_or((list, ""));
        elements.extend(list.split(',').filter_map(|ip| ip.trim().parse::<Ipv4Addr>().ok()));
        rest = after;
    }
    shape.push_str(rest);
    (shape.split_whitespace().collect::<Vec<_>>().join(" "), elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_its_shape_and_its_elements() {
        let text = "table ip t {\n\tset nodes {\n\t\ttype ipv4_addr\n\t\telements = { 192.0.2.1, 192.0.2.2,\n\t\t\t     192.0.2.3 }\n\t}\n}\n";
        let (shape, elements) = parse(text);
        assert_eq!(shape, "table ip t { set nodes { type ipv4_addr } }");
        assert_eq!(elements.len(), 3);
    }
}
