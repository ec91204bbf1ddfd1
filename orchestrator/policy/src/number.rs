//! Class numbers across outputs.
//!
//! Maps change one after the other: an address may be looked up by its old class in a new table. So a number keeps its
//! meaning as far as anyone can see it: a group takes an old number only if every address of that class is in the group
//! now, or if the tables say the same about it as before. All other groups get fresh numbers, and [`crate::plan`] can
//! order the writes so that each packet meets either the old or the new policy.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::compile::{Compiled, Decisions, Groups};
use crate::prefix::PrefixMap;
use crate::table::{Class, Direction, Table, same_rows};

/// How much of an old class a group has: entries that were the class's and still are entries, then parts of entries.
type Weight = (usize, usize);
/// Where the addresses of an old class are now, by group.
type Votes = BTreeMap<usize, Weight>;

/// The class of each group and the next free number. `pairs` are the old tables beside the new decisions of endpoints.
pub(crate) fn number<'a>(
    groups: &Groups,
    pairs: impl Iterator<Item = (&'a Arc<Table>, &'a [Decisions; 2])>,
    previous: &Compiled,
) -> (Vec<Class>, Class) {
    // Endpoints share tables and decisions: each pair is compared once.
    let distinct: HashMap<_, (&Table, &[Decisions; 2])> = pairs
        .map(|(table, decisions)| {
            ((Arc::as_ptr(table), std::ptr::from_ref(decisions)), (table.as_ref(), decisions))
        })
        .collect();

    let says_the_same = |class: Class, group: usize| {
        distinct.values().all(|(table, decisions)| {
            Direction::BOTH.into_iter().zip(decisions.iter()).all(|(direction, decisions)| {
                same_rows(table.effective(direction, class), decisions.of(group))
            })
        })
    };
    let mut claims: Vec<(Weight, Class, usize)> = Vec::new();
    for (class, votes) in votes(groups, previous) {
        let is_whole = votes.len() == 1;
        let mut votes: Vec<(usize, Weight)> = votes.into_iter().collect();
        votes.sort_unstable_by_key(|(group, weight)| (Reverse(*weight), *group));
        let found = votes
            .into_iter()
            .find(|(group, _)| *group != 0 && (is_whole || says_the_same(class, *group)));
        claims.extend(found.map(|(group, weight)| (weight, class, group)));
    }
    // The number of most addresses wins, then the lowest.
    claims.sort_unstable_by_key(|(weight, class, _)| (Reverse(*weight), *class));
    let mut classes: Vec<Option<Class>> = vec![None; groups.kinds.len()];
    classes[0] = Some(Class::OUTSIDE);
    for (_, class, group) in claims {
        classes[group].get_or_insert(class);
    }
    let mut next = previous.next_class.max(Class::FIRST);
    let classes = classes
        .into_iter()
        .map(|class| {
            class.unwrap_or_else(|| {
                let fresh = next;
                next = Class(next.0 + 1);
                fresh
            })
        })
        .collect();
    (classes, next)
}

/// Every region of addresses between known prefixes, old and new, votes with its new group for its old class.
fn votes(groups: &Groups, previous: &Compiled) -> BTreeMap<Class, Votes> {
    let old = PrefixMap::of(&previous.peers);
    let new = &groups.prefixes;
    let gone = previous.peers.keys().filter(|prefix| !new.contains(**prefix)).copied();
    let mut votes: BTreeMap<Class, Votes> = BTreeMap::new();
    for prefix in new.sorted().into_iter().map(|(prefix, _)| prefix).chain(gone) {
        let class = old.longest(prefix).map_or(Class::OUTSIDE, |peer| peer.class);
        let group = new.longest(prefix).copied().unwrap_or_default();
        if class != Class::OUTSIDE {
            let weight = votes.entry(class).or_default().entry(group).or_default();
            let stays = previous.peers.contains_key(&prefix) && new.contains(prefix);
            *(if stays { &mut weight.0 } else { &mut weight.1 }) += 1;
        }
    }
    votes
}
