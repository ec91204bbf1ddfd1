//! From one output to the next, in an order that no packet can see through.
//!
//! Tables are swapped one by one, addresses change their class one by one, and packets meet whatever is there. Executed
//! step by step, a plan lets every endpoint decide about every packet as the old output or as the new one does, at each
//! moment: what both deny is never let through, what both allow is never lost. (Two endpoints of one connection still
//! change one after the other.)

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::compile::{Compiled, Peer};
use crate::prefix::{Prefix, PrefixMap};
use crate::table::{Class, Direction, Row, Table};
use crate::world::Name;

/// One table for all endpoints that shall have it: built once, then one pointer for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    pub table: Arc<Table>,
    pub endpoints: Vec<Name>,
}

/// Writes, to be done in the order of the fields, and `set` in its own order. Within other fields the order is free.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Tables that know new classes already and old ones still.
    pub before: Vec<Publish>,
    /// Addresses that get another class. Longer prefixes come first: a block must not speak for addresses inside it that
    /// are about to get an entry of their own.
    pub set: Vec<(Prefix, Peer)>,
    /// The new tables of endpoints for which `before` was not the last word.
    pub tables: Vec<Publish>,
    /// Entries that are no longer needed.
    pub unset: BTreeSet<Prefix>,
    /// Endpoints that are no more; their tables go.
    pub gone: Vec<Name>,
}

impl Plan {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The plan from `old` to `new`; `new` was compiled with `old` as its previous output.
    #[must_use]
    pub fn new(old: &Compiled, new: &Compiled) -> Self {
        let unset: BTreeSet<Prefix> =
            old.peers.keys().filter(|prefix| !new.peers.contains_key(prefix)).copied().collect();
        let (mut set, outside_moves) = changed_peers(old, new, &unset);
        set.sort_by_key(|(prefix, _)| Reverse(prefix.prefix_len()));
        let used = |compiled: &Compiled| -> BTreeSet<Class> {
            compiled.peers.values().map(|peer| peer.class).collect()
        };
        let bridge = Bridge { old: used(old), new: used(new), outside_moves };

        let mut before = Publishes::default();
        let mut tables = Publishes::default();
        // Endpoints with equal tables before and after share the table between, too.
        let mut between: HashMap<(*const Table, *const Table), Arc<Table>> = HashMap::new();
        for (name, table) in &new.endpoints {
            let Some(last) = old.endpoints.get(name) else {
                // Closed until it has its first table.
                tables.add(table, name);
                continue;
            };
            if last == table {
                continue;
            }
            let between = between
                .entry((Arc::as_ptr(last), Arc::as_ptr(table)))
                .or_insert_with(|| bridge.table(last, table));
            if **between == **table {
                before.add(table, name);
                continue;
            }
            if *between != *last {
                before.add(between, name);
            }
            tables.add(table, name);
        }
        let gone = old.endpoints.keys().filter(|name| !new.endpoints.contains_key(*name));
        Self {
            before: before.done(),
            set,
            tables: tables.done(),
            unset,
            gone: gone.cloned().collect(),
        }
    }
}

#[derive(Default)]
struct Publishes(HashMap<Arc<Table>, Vec<Name>>);

impl Publishes {
    fn add(&mut self, table: &Arc<Table>, endpoint: &Name) {
        self.0.entry(Arc::clone(table)).or_default().push(endpoint.clone());
    }

    fn done(self) -> Vec<Publish> {
        let publish = |(table, endpoints)| Publish { table, endpoints };
        let mut all: Vec<Publish> = self.0.into_iter().map(publish).collect();
        all.sort_unstable_by(|left, right| left.endpoints.cmp(&right.endpoints));
        all
    }
}

/// Entries to write, those to be removed included (they first say what their surrounding will), and whether addresses
/// move out of the outside or into it.
fn changed_peers(
    old: &Compiled,
    new: &Compiled,
    unset: &BTreeSet<Prefix>,
) -> (Vec<(Prefix, Peer)>, bool) {
    let (around_old, around_new) = (PrefixMap::of(&old.peers), PrefixMap::of(&new.peers));
    let mut outside_moves = false;
    let mut set = Vec::new();
    for (prefix, peer) in &new.peers {
        let known = old.peers.get(prefix);
        if known == Some(peer) {
            continue;
        }
        let class = around_old.longest(*prefix).map_or(Class::OUTSIDE, |peer| peer.class);
        outside_moves |= class == Class::OUTSIDE;
        set.push((*prefix, *peer));
    }
    for prefix in unset {
        let class = old.peers[prefix].class;
        let mut peer = around_new.longest(*prefix).copied().unwrap_or_default();
        if peer.class != class {
            if peer.class == Class::OUTSIDE {
                outside_moves = true;
                peer.class = Class::LEAVING;
            }
            set.push((*prefix, peer));
        }
    }
    (set, outside_moves)
}

struct Bridge {
    /// Classes in use before and after.
    old: BTreeSet<Class>,
    new: BTreeSet<Class>,
    outside_moves: bool,
}

impl Bridge {
    /// A table that decides as `last` for numbers that only the old output uses, and as `next` for all others. The
    /// outside stays as it was while addresses move between it and classes.
    fn table(&self, last: &Arc<Table>, next: &Arc<Table>) -> Arc<Table> {
        let mut rows: Vec<Row> = Vec::new();
        for direction in Direction::BOTH {
            let outside_of = if self.outside_moves { last } else { next };
            let outside = outside_of.effective(direction, Class::OUTSIDE);
            rows.extend(outside);
            let mut add = |class: Class, part: &[Row]| {
                let alike = |(one, other): (&Row, &Row)| {
                    (one.ports, one.verdict) == (other.ports, other.verdict)
                };
                if part.len() != outside.len() || !part.iter().zip(outside).all(alike) {
                    rows.extend(part.iter().map(|row| Row { class, ..*row }));
                }
            };
            for class in self.old.union(&self.new).filter(|class| **class != Class::OUTSIDE) {
                let source = if self.new.contains(class) { next } else { last };
                add(*class, source.effective(direction, *class));
            }
            if self.outside_moves {
                add(Class::LEAVING, next.effective(direction, Class::OUTSIDE));
            }
        }
        let table = Arc::new(Table::new(rows));
        if table == *next {
            Arc::clone(next)
        } else if table == *last {
            Arc::clone(last)
        } else {
            table
        }
    }
}
