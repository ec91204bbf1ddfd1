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
//! Here is also what makes the way of these packets short: conntrack does not look at those between nodes (`notrack`).
//! Nobody translates them, and what VXLAN receives is no answer to what it sends: the ports differ. In a rule the match
//! that most packets fail stands first, addresses before the name of a link: the kernel compares those without a call.
//!
//! One table of ours, one set of addresses; a node that joins or leaves is one element.

use std::net::IpAddr;

use cni_nftables::{Chain, Family, Hook, Nft, NftError, Set, Table};
use ipnetwork::IpNetwork;

use super::Peers;
use crate::lease::{Identity, Network};

/// Name of the table.
pub const TABLE: &str = "orch-overlay";
/// Set of the nodes' addresses.
const NODES: &str = "nodes";
/// Before the rules of others, and before destination NAT: what is dropped here concerns nobody.
const BEFORE_FILTER: i32 = -10;
const BEFORE_CONNTRACK: i32 = -300;
const SOURCE_NAT: i32 = 100;

/// Everything that belongs into the IPv4 table, if there is IPv4. Pure.
#[must_use]
pub fn desired_table(network: &Network, me: &Identity, peers: &Peers) -> Option<Table> {
    Some(table(network, network.own.v4?.into(), me.public_ip.into(), peers))
}

/// Everything that belongs into the IPv6 table, if there is IPv6; also masquerade, which the table of Services has for
/// IPv4. Pure.
#[must_use]
pub fn desired_table_ipv6(network: &Network, me: &Identity, peers: &Peers) -> Option<Table> {
    let cluster = network.config.v6?.network;
    let mut table = table(network, network.own.v6?.into(), me.public_ipv6?.into(), peers);
    table.chain(
        "postrouting",
        Chain::base(
            "nat",
            Hook::Postrouting,
            SOURCE_NAT,
            [format!(
                "ip6 saddr {cluster} ip6 daddr != {cluster} ip6 daddr != ff00::/8 masquerade fully-random"
            )],
        ),
    );
    Some(table)
}

fn table(network: &Network, own: IpNetwork, public_ip: IpAddr, peers: &Peers) -> Table {
    let (port, bridge) = (network.config.port, orch_config::POD_BRIDGE);
    let (family, ip, kind) = match own {
        IpNetwork::V4(_) => (Family::Ip, "ip", "ipv4_addr"),
        IpNetwork::V6(_) => (Family::Ip6, "ip6", "ipv6_addr"),
    };
    let mut table = Table::new(family, TABLE);
    // Our own address is there for the rule about pods; we send nothing to ourselves.
    let peers = peers.values().map(|peer| peer.public_ip);
    let nodes = peers.filter(|peer| peer.is_ipv4() == public_ip.is_ipv4()).chain([public_ip]);
    table.set(NODES, Set::keys(kind, nodes.map(|ip| ip.to_string())));
    let rules = |rules: &[String]| rules.to_vec();
    table.chain(
        "input",
        Chain::base(
            "filter",
            Hook::Input,
            BEFORE_FILTER,
            rules(&[format!("udp dport {port} {ip} saddr != @{NODES} counter drop")]),
        ),
    );
    table.chain(
        "forward",
        Chain::base(
            "filter",
            Hook::Forward,
            BEFORE_FILTER,
            rules(&[format!(
                "udp dport {port} {ip} daddr @{NODES} iifname \"{bridge}\" counter drop"
            )]),
        ),
    );
    // Who sent it is asked once, at `input`.
    let untracked = format!("udp dport {port} notrack");
    let arriving = format!("{ip} daddr {public_ip} {untracked}");
    table.chain(
        "prerouting",
        Chain::base(
            "filter",
            Hook::Prerouting,
            BEFORE_CONNTRACK,
            rules(&[spoofed(bridge, own), arriving]),
        ),
    );
    table.chain(
        "output",
        Chain::base("filter", Hook::Output, BEFORE_CONNTRACK, rules(&[untracked])),
    );
    table
}

/// A pod that has no address yet asks for one, or looks whether it is free; link-local addresses do not leave the link.
fn spoofed(bridge: &str, own: IpNetwork) -> String {
    match own {
        IpNetwork::V4(own) => {
            format!("ip saddr != {own} ip saddr != 0.0.0.0 iifname \"{bridge}\" counter drop")
        }
        IpNetwork::V6(own) => format!(
            "ip6 saddr != {own} ip6 saddr != fe80::/10 ip6 saddr != :: iifname \"{bridge}\" counter drop"
        ),
    }
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

    /// Removes the table, if it was ever made.
    ///
    /// # Errors
    /// If nft refuses.
    pub(super) fn remove(&mut self) -> Result<(), NftError> {
        if let Some(applied) = self.applied.take() {
            self.nft.remove(applied.table.family, &applied.table.name)?;
        }
        Ok(())
    }

    /// Whether the kernel still holds what was applied, if anything was.
    fn is_intact(&self) -> Result<bool, NftError> {
        let Some(Applied { table, shape }) = &self.applied else { return Ok(true) };
        let Some(listing) = self.nft.listing(table)? else { return Ok(false) };
        let (seen, mut elements) = parse(&listing);
        elements.sort_unstable();
        let mut wanted: Vec<IpAddr> = match table.sets.get(NODES).map(|set| &set.kind) {
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
fn parse(listing: &str) -> (String, Vec<IpAddr>) {
    let mut shape = String::new();
    let mut elements = Vec::new();
    let mut rest = listing;
    while let Some((before, list)) = rest.split_once("elements = {") {
        shape.push_str(before);
        let (list, after) = list.split_once('}').unwrap_or((list, ""));
        elements.extend(list.split(',').filter_map(|ip| ip.trim().parse::<IpAddr>().ok()));
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
