//! What the output decides about one packet, and why: the maps read as the kernel reads them.

use std::net::IpAddr;

use crate::compile::{Compiled, Peer, RuleRef};
use crate::prefix::Prefix;
use crate::table::{Direction, RuleId};
use crate::world::Name;

/// A decision with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement<'a> {
    pub allow: bool,
    /// What the other end is.
    pub peer: Peer,
    pub rule: RuleId,
    /// `None`: no policy selects the endpoint in this direction.
    pub decided_by: Option<&'a RuleRef>,
}

impl Compiled {
    /// What an address is: the longest entry around it.
    #[must_use]
    pub fn peer(&self, addr: IpAddr) -> Peer {
        let longest = Prefix::host(addr).prefix_len();
        let around = (0..=longest).rev().filter_map(|len| Prefix::new(addr, len));
        around.into_iter().find_map(|prefix| self.peers.get(&prefix)).copied().unwrap_or_default()
    }

    /// The verdict of policy at one end of a connection: `peer` is the other end, `port` the destination port. The
    /// exemption of the own node is the data plane's, and not part of it. `None`: not an endpoint of this node.
    #[must_use]
    pub fn judge(
        &self,
        endpoint: &Name,
        direction: Direction,
        peer: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Option<Judgement<'_>> {
        let peer = self.peer(peer);
        let verdict =
            self.endpoints.get(endpoint)?.decide(direction, peer.class, protocol, port)?;
        let decided_by = self.rules.get(&verdict.rule);
        Some(Judgement { allow: verdict.allow, peer, rule: verdict.rule, decided_by })
    }
}
