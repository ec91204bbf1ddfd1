//! What of a change an endpoint feels: whether what its tables say about any address is another thing than before.
//!
//! Numbers of classes and tables change more often than decisions do: a label of one pod may give its address another
//! class, and with it a new class map to all. Whoever decides as before need not judge its flows again.

use std::collections::{BTreeMap, BTreeSet};

use crate::compile::Peer;
use crate::prefix::{Prefix, PrefixMap};
use crate::table::{Class, Direction, Row, Table};

/// Pairs of classes, before and after, that some address has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moves(BTreeSet<(Class, Class)>);

impl Moves {
    /// From one output's peers to another's.
    #[must_use]
    pub fn between(old: &BTreeMap<Prefix, Peer>, new: &BTreeMap<Prefix, Peer>) -> Self {
        let (around_old, around_new) = (PrefixMap::of(old), PrefixMap::of(new));
        let class = |around: &PrefixMap<Peer>, prefix| {
            around.longest(prefix).map_or(Class::OUTSIDE, |peer| peer.class)
        };
        // Between known prefixes nothing changes, and around all of them is the outside.
        let known = old.keys().chain(new.keys());
        let moves = known.map(|prefix| (class(&around_old, *prefix), class(&around_new, *prefix)));
        Self(moves.chain([(Class::OUTSIDE, Class::OUTSIDE)]).collect())
    }

    /// Whether an endpoint that had the one table and gets the other one decides anything else than before.
    #[must_use]
    pub fn are_felt(&self, old: &Table, new: &Table) -> bool {
        let is_same_table = std::ptr::eq(old, new);
        let differs = |(before, after): &(Class, Class)| {
            Direction::BOTH.into_iter().any(|direction| {
                let without_class = |row: &Row| (row.ports, row.verdict);
                let before = old.effective(direction, *before).iter().map(without_class);
                !before.eq(new.effective(direction, *after).iter().map(without_class))
            })
        };
        self.0.iter().filter(|(before, after)| !is_same_table || before != after).any(differs)
    }
}
