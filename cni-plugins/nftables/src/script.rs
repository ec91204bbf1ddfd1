//! From table to script: pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::table::{Set, SetKind, Table};

/// Elements per command. One command for a whole map of 10,000 elements is legal, but an error message of nft
/// repeats the line it is about.
const ELEMENTS_PER_COMMAND: usize = 200;

impl Table {
    fn id(&self) -> String {
        format!("{} {}", self.family, self.name)
    }

    /// A script that removes the table of this name, if there is one, and writes this one.
    #[must_use]
    pub fn replace_script(&self) -> String {
        let id = self.id();
        // `delete` fails on a missing table, `add` does nothing on a present one.
        let mut out = format!("add table {id}\ndelete table {id}\nadd table {id}\n");
        out.push_str(&Self::new(self.family, &self.name).changes(self));
        out
    }

    /// A script that turns `applied` into this table; empty if they are equal.
    ///
    /// A changed hook or key type cannot be changed in place: then the script replaces the table.
    #[must_use]
    pub fn update_script(&self, applied: &Table) -> String {
        let same_shape = (applied.family, &applied.name) == (self.family, &self.name)
            && self.chains.iter().all(|(name, chain)| {
                applied.chains.get(name).is_none_or(|before| before.base == chain.base)
            })
            && self.sets.iter().all(|(name, set)| {
                applied.sets.get(name).is_none_or(|before| declaration(before) == declaration(set))
            });
        if same_shape { applied.changes(self) } else { self.replace_script() }
    }

    /// Commands from `self` to `want`, in an order in which every name is declared before it is used and
    /// unused before it is deleted.
    fn changes(&self, want: &Table) -> String {
        let id = want.id();
        let mut out = String::new();
        for (name, set) in &want.sets {
            if !self.sets.contains_key(name) {
                let keyword = keyword(set);
                line(&mut out, format_args!("add {keyword} {id} {name} {}", declaration(set)));
            }
        }
        for (name, chain) in &want.chains {
            if !self.chains.contains_key(name) {
                match &chain.base {
                    Some(base) => line(
                        &mut out,
                        format_args!(
                            "add chain {id} {name} {{ type {} hook {} priority {}; policy accept; }}",
                            base.kind, base.hook, base.priority
                        ),
                    ),
                    None => line(&mut out, format_args!("add chain {id} {name}")),
                }
            }
        }
        for (name, chain) in &want.chains {
            let before = self.chains.get(name);
            if before.is_some_and(|before| before.rules == chain.rules) {
                continue;
            }
            if before.is_some() {
                line(&mut out, format_args!("flush chain {id} {name}"));
            }
            for rule in &chain.rules {
                line(&mut out, format_args!("add rule {id} {name} {rule}"));
            }
        }
        let nothing = BTreeMap::new();
        for (name, set) in &want.sets {
            let before = self.sets.get(name).map_or_else(|| nothing.clone(), Set::elements);
            element_changes(&mut out, &id, name, &before, &set.elements());
        }
        let stale = |name: &&String| !want.chains.contains_key(*name);
        for (name, set) in &self.sets {
            // Verdicts in a map that goes away hold on to their chains.
            if !want.sets.contains_key(name) && !matches!(set.kind, SetKind::Dynamic(_)) {
                line(&mut out, format_args!("flush {} {id} {name}", keyword(set)));
            }
        }
        for name in self.chains.keys().filter(stale) {
            line(&mut out, format_args!("flush chain {id} {name}"));
        }
        for name in self.chains.keys().filter(stale) {
            line(&mut out, format_args!("delete chain {id} {name}"));
        }
        for (name, set) in &self.sets {
            if !want.sets.contains_key(name) {
                line(&mut out, format_args!("delete {} {id} {name}", keyword(set)));
            }
        }
        out
    }
}

fn element_changes(
    out: &mut String,
    id: &str,
    set: &str,
    before: &BTreeMap<&str, Option<&str>>,
    want: &BTreeMap<&str, Option<&str>>,
) {
    let gone: Vec<String> = before
        .iter()
        .filter(|(key, value)| want.get(*key) != Some(value))
        .map(|(key, _)| (*key).to_owned())
        .collect();
    let new: Vec<String> = want
        .iter()
        .filter(|(key, value)| before.get(*key) != Some(value))
        .map(|(key, value)| match value {
            Some(value) => format!("{key} : {value}"),
            None => (*key).to_owned(),
        })
        .collect();
    for (verb, elements) in [("delete", gone), ("add", new)] {
        for part in elements.chunks(ELEMENTS_PER_COMMAND) {
            line(out, format_args!("{verb} element {id} {set} {{ {} }}", part.join(", ")));
        }
    }
}

fn keyword(set: &Set) -> &'static str {
    if matches!(set.kind, SetKind::Map(..)) { "map" } else { "set" }
}

fn declaration(set: &Set) -> String {
    match &set.kind {
        SetKind::Keys(_) => format!("{{ type {}; }}", set.key),
        SetKind::Map(value, _) => format!("{{ type {} : {value}; }}", set.key),
        SetKind::Dynamic(timeout) => {
            format!(
                "{{ type {}; size 65536; flags dynamic,timeout; timeout {}s; }}",
                set.key,
                timeout.as_secs().max(1)
            )
        }
    }
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "{text}").expect("writing to a string cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Chain, Family, Hook};

    fn table(endpoints: &[&str]) -> Table {
        let mut table = Table::new(Family::Ip, "t");
        let vmap = endpoints
            .iter()
            .map(|name| (format!("10.96.0.{}", name.len()), format!("goto {name}")));
        table.set("services", Set::map("ipv4_addr", "verdict", vmap));
        table.chain(
            "pre",
            Chain::base("nat", Hook::Prerouting, -100, ["ip daddr vmap @services".to_owned()]),
        );
        for name in endpoints {
            table.chain(*name, Chain::regular(["accept".to_owned()]));
        }
        table
    }

    #[test]
    fn an_equal_table_is_an_empty_script() {
        assert_eq!(table(&["a", "bb"]).update_script(&table(&["a", "bb"])), "");
    }

    #[test]
    fn a_chain_is_declared_before_a_verdict_names_it_and_deleted_after() {
        let script = table(&["bb"]).update_script(&table(&["a"]));
        let lines: Vec<&str> = script.lines().collect();
        assert_eq!(
            lines,
            [
                "add chain ip t bb",
                "add rule ip t bb accept",
                "delete element ip t services { 10.96.0.1 }",
                "add element ip t services { 10.96.0.2 : goto bb }",
                "flush chain ip t a",
                "delete chain ip t a",
            ]
        );
    }

    #[test]
    fn a_changed_hook_replaces_the_table() {
        let mut moved = table(&[]);
        moved.chain("pre", Chain::base("nat", Hook::Output, -100, []));
        assert!(
            moved.update_script(&table(&[])).starts_with("add table ip t\ndelete table ip t\n")
        );
    }
}
