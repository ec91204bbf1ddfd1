//! Brings what the compiler says into the maps.
//!
//! Class maps and rule tables are built aside under keys that no row names; an endpoint then changes over by one write of its
//! row, so each packet meets one whole policy. The row's generation grows only where the new maps decide anything else than
//! the old ones, so flows of the others are not judged again. Maps that the rows no longer name are removed at the look after
//! the next one: a program may still be reading them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use orch_ebpf_loader::{Announcement, ClassMap, Error, Maps, RuleTable};
use orch_ebpf_maps::{
    ClassKey, Config, Endpoint, MAX_CLASS_MAPS, MAX_RULE_ENTRIES, MAX_TABLES, state,
};
use orch_policy::{Compiled, Moves, Name, Peer, Prefix, Table, compile};
use tracing::warn;

use super::keys::Keys;
use super::rows::{classes, isolation, rules};
use super::world::Reader;

/// Tables that are built before they are published together.
const TABLES_AT_ONCE: usize = 64;

/// What is to apply to an endpoint.
#[derive(Debug, Clone)]
enum Want {
    /// Its pod is not (or no longer) known, or has ended: closed but for the node.
    Closed,
    /// No policy selects it.
    Open,
    /// What policies say.
    Table(Arc<Table>),
}

/// What a look found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Grows with every change of a row.
    pub revision: u64,
    /// Rows as they are now, by link.
    pub endpoints: BTreeMap<u32, Endpoint>,
    /// Rows that were written.
    pub written: usize,
    /// Those of them whose pods' flows are judged again.
    pub judged_again: usize,
    /// Pods whose policy does not fit into maps; they are closed.
    pub locked: Vec<String>,
}

/// The maps, and what was written to them.
pub struct Engine {
    maps: Maps,
    compiled: Compiled,
    revision: u64,
    /// Numbers that class maps and tables have.
    class_keys: Keys,
    table_keys: Keys,
    /// The published class map.
    classes: Option<u32>,
    /// What this and earlier class maps that rows name were made from.
    peers: HashMap<u32, BTreeMap<Prefix, Peer>>,
    /// Published tables by the address of their allocation, which equal tables share and which is held here.
    tables: HashMap<usize, (Arc<Table>, u32)>,
    /// Keys that rows named when the last look ended: class maps and tables.
    named: (BTreeSet<u32>, BTreeSet<u32>),
}

impl Engine {
    /// Takes over the maps with all that is in them.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn new(mut maps: Maps) -> Result<Self, Error> {
        let rows = maps.endpoints()?;
        maps.mend_endpoints()?;
        let (class_maps, tables) = maps.published()?;
        let revision = rows.iter().map(|(_, row)| row.revision).max().unwrap_or(0);
        let named = names(rows.iter().map(|(_, row)| row));
        let class_keys = Keys::new(MAX_CLASS_MAPS, class_maps.iter().chain(&named.0).copied());
        let table_keys = Keys::new(MAX_TABLES, tables.iter().chain(&named.1).copied());
        Ok(Self {
            maps,
            compiled: Compiled::default(),
            revision,
            class_keys,
            table_keys,
            classes: None,
            peers: HashMap::new(),
            tables: HashMap::new(),
            named,
        })
    }

    /// The maps.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// What is in force.
    #[must_use]
    pub fn compiled(&self) -> &Compiled {
        &self.compiled
    }

    /// Says to the programs what addresses are, and which port the overlay has.
    ///
    /// # Errors
    /// If a map is full.
    pub fn set_addresses(
        &mut self,
        want: &BTreeMap<ClassKey, u32>,
        vxlan_port: u16,
    ) -> Result<(), Error> {
        let have: BTreeMap<ClassKey, u32> = self.maps.addresses()?.into_iter().collect();
        for (key, flags) in want.iter().filter(|(key, flags)| have.get(key) != Some(*flags)) {
            self.maps.put_address(*key, *flags)?;
        }
        for key in have.keys().filter(|key| !want.contains_key(key)) {
            self.maps.remove_address(*key)?;
        }
        let settings = Config::new(vxlan_port, self.maps.have_former());
        if self.maps.settings()? != settings {
            self.maps.set_settings(settings)?;
        }
        Ok(())
    }

    /// Removes those of `rows` whose link is gone or that nobody has announced; gives their number. The rows have to be
    /// read before the announcements are.
    ///
    /// # Errors
    /// If the maps refuse.
    pub fn sweep(
        &mut self,
        rows: &[(u32, Endpoint)],
        announced: &[Announcement],
        is_gone: impl Fn(u32) -> bool,
    ) -> Result<usize, Error> {
        let mut count = 0;
        for (ifindex, row) in rows {
            let known = announced.iter().any(|one| (one.ifindex, one.uid) == (*ifindex, row.uid));
            if !known || is_gone(*ifindex) {
                self.maps.remove_endpoint(*ifindex)?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// Brings the world into force; compiles it if it has changed.
    ///
    /// # Errors
    /// If the maps refuse. Rows that were not written stay as they were; the next call goes on.
    pub fn look(
        &mut self,
        reader: &Reader,
        changed: bool,
        announced: &[Announcement],
    ) -> Result<Report, Error> {
        if changed {
            self.compiled = compile(reader.world(), &self.compiled);
        }
        let rows: BTreeMap<u32, Endpoint> = self.maps.endpoints()?.into_iter().collect();
        let wants = desired(&self.compiled, reader, announced, &rows);
        let tables: Vec<&Arc<Table>> = wants
            .iter()
            .filter_map(|(_, want, _)| match want {
                Want::Table(table) => Some(table),
                _ => None,
            })
            .collect();
        let (class_map, unfit) = if tables.is_empty() {
            (0, HashMap::new())
        } else {
            match self.ensure_maps(&tables) {
                Ok(made) => made,
                // Agents that were killed again and again may have left class maps; the next one would not fit either.
                Err(_) => {
                    self.retire(&rows)?;
                    self.ensure_maps(&tables)?
                }
            }
        };
        let mut changes = Changes {
            peers: &self.peers,
            tables: self.tables.values().map(|(table, key)| (*key, table.clone())).collect(),
            moves: HashMap::new(),
            known: HashMap::new(),
        };
        let mut report = Report { endpoints: rows, ..Report::default() };
        for (ifindex, want, pod) in wants {
            let Some(before) = report.endpoints.get(&ifindex).copied() else { continue };
            let mut now =
                Endpoint { state: state::READY, flags: 0, table: 0, class_map: 0, ..before };
            match want {
                Want::Closed => now.state = state::PENDING,
                Want::Open => {}
                Want::Table(table) => match self.tables.get(&place(&table)) {
                    Some((_, key)) => {
                        now.flags = isolation(&table);
                        now.table = *key;
                        now.class_map = class_map;
                    }
                    None => {
                        let why = unfit.get(&place(&table)).cloned().unwrap_or_default();
                        warn!(pod, why, "the pod's policies do not fit into maps; it is closed");
                        report.locked.push(format!("{pod}: {why}"));
                        now.state = state::LOCKED;
                    }
                },
            }
            if now == before {
                continue;
            }
            self.revision += 1;
            let is_felt = changes.are_felt(&before, &now);
            if is_felt {
                now.generation = before.generation.wrapping_add(1);
            }
            now.revision = self.revision;
            // One that went meanwhile needs nothing.
            match self.maps.update_endpoint(ifindex, now) {
                Ok(()) => {
                    report.endpoints.insert(ifindex, now);
                    report.written += 1;
                    report.judged_again += usize::from(is_felt);
                }
                Err(error) => {
                    if self.maps.endpoint(ifindex)?.is_some() {
                        return Err(error);
                    }
                    report.endpoints.remove(&ifindex);
                }
            }
        }
        self.retire(&report.endpoints)?;
        report.revision = self.revision;
        Ok(report)
    }

    /// The class map of what was compiled, if it is not published yet.
    fn next_classes(&mut self) -> Result<Option<(u32, ClassMap)>, Error> {
        let peers = self.classes.and_then(|key| self.peers.get(&key));
        if peers == Some(&self.compiled.peers) {
            return Ok(None);
        }
        let built = ClassMap::build(classes(&self.compiled.peers).into_iter())?;
        let key = self.class_keys.take().ok_or_else(|| no_room("class maps", MAX_CLASS_MAPS))?;
        Ok(Some((key, built)))
    }

    /// Publishes the class map and those of the tables that are not yet, many at a time: each write waits for the kernel.
    /// Gives the key of the class map, and why some tables could not be published.
    fn ensure_maps(
        &mut self,
        tables: &[&Arc<Table>],
    ) -> Result<(u32, HashMap<usize, String>), Error> {
        let mut class_map = self.next_classes()?;
        let mut seen = HashSet::new();
        let is_new = |table: &&Arc<Table>| {
            !self.tables.contains_key(&place(table)) && seen.insert(place(table))
        };
        let new: Vec<&Arc<Table>> = tables.iter().copied().filter(is_new).collect();
        let mut unfit = HashMap::new();
        // A table that is not published yet holds a file descriptor.
        let mut parts = new.chunks(TABLES_AT_ONCE);
        let mut part = parts.next().unwrap_or_default();
        while class_map.is_some() || !part.is_empty() {
            let (mut kept, mut built) = (Vec::new(), Vec::new());
            for table in part {
                let made = build(table).and_then(|map| {
                    let key = self.table_keys.take();
                    Ok((key.ok_or_else(|| no_room("rule tables", MAX_TABLES))?, map))
                });
                match made {
                    Ok(made) => {
                        kept.push(*table);
                        built.push(made);
                    }
                    Err(error) => drop(unfit.insert(place(table), crate::chain(&error))),
                }
            }
            let classes = class_map.take();
            let (outcome, outcomes) =
                self.maps.publish(classes.as_ref().map(|(key, map)| (*key, map)), &built);
            for ((table, (key, _)), outcome) in kept.iter().zip(&built).zip(outcomes) {
                match outcome {
                    Ok(()) => drop(self.tables.insert(place(table), ((*table).clone(), *key))),
                    Err(error) => drop(unfit.insert(place(table), crate::chain(&error))),
                }
            }
            outcome?;
            if let Some((key, _)) = classes {
                self.classes = Some(key);
                self.peers.insert(key, self.compiled.peers.clone());
            }
            part = parts.next().unwrap_or_default();
        }
        Ok((self.classes.unwrap_or_default(), unfit))
    }

    /// Removes inner maps that no row names now or named when the last look ended.
    fn retire(&mut self, rows: &BTreeMap<u32, Endpoint>) -> Result<(), Error> {
        let now = names(rows.values());
        let before = std::mem::replace(&mut self.named, now);
        let wanted_classes: BTreeSet<u32> =
            self.named.0.union(&before.0).copied().chain(self.classes).collect();
        let wanted_tables: BTreeSet<u32> = self.named.1.union(&before.1).copied().collect();
        let class_maps: Vec<u32> =
            self.class_keys.used().difference(&wanted_classes).copied().collect();
        let tables: Vec<u32> = self.table_keys.used().difference(&wanted_tables).copied().collect();
        // Not known any more before they are gone: nothing is to name them from now on.
        self.tables.retain(|_, (_, key)| wanted_tables.contains(key));
        self.peers.retain(|key, _| wanted_classes.contains(key));
        self.maps.withdraw(&class_maps, &tables)?;
        self.class_keys.free(&class_maps);
        self.table_keys.free(&tables);
        Ok(())
    }
}

/// What rows that are written mean for the flows of their pods. Many rows change alike.
struct Changes<'a> {
    /// What published maps were made from, by their key.
    peers: &'a HashMap<u32, BTreeMap<Prefix, Peer>>,
    tables: HashMap<u32, Arc<Table>>,
    /// By keys of class maps, before and after.
    moves: HashMap<(u32, u32), Moves>,
    /// By keys of class maps and tables.
    known: HashMap<[u32; 4], bool>,
}

impl Changes<'_> {
    /// Whether anything is decided otherwise than before.
    fn are_felt(&mut self, before: &Endpoint, now: &Endpoint) -> bool {
        if (before.state, before.flags) != (now.state, now.flags) {
            return true;
        }
        let maps = [before.class_map, now.class_map, before.table, now.table];
        if let Some(known) = self.known.get(&maps) {
            return *known;
        }
        // Of maps of an earlier life nothing is known.
        let peers = (self.peers.get(&before.class_map), self.peers.get(&now.class_map));
        let tables = (self.tables.get(&before.table), self.tables.get(&now.table));
        let felt = match (peers, tables) {
            ((Some(old), Some(new)), (Some(before_table), Some(now_table))) => self
                .moves
                .entry((before.class_map, now.class_map))
                .or_insert_with(|| Moves::between(old, new))
                .are_felt(before_table, now_table),
            _ => true,
        };
        self.known.insert(maps, felt);
        felt
    }
}

/// Equal tables share their allocation.
fn place(table: &Arc<Table>) -> usize {
    Arc::as_ptr(table).addr()
}

/// 0 is no map's number.
fn no_room(what: &'static str, numbers: u32) -> Error {
    let most = numbers - 1;
    Error::TooBig { what, count: numbers as usize, most }
}

fn build(table: &Table) -> Result<RuleTable, Error> {
    let rules = rules(table);
    if rules.len() > MAX_RULE_ENTRIES as usize {
        return Err(Error::TooBig { what: "rules", count: rules.len(), most: MAX_RULE_ENTRIES });
    }
    RuleTable::build(rules.into_iter())
}

/// What is to apply to each endpoint that is announced and has a row, with its name for people.
fn desired(
    compiled: &Compiled,
    reader: &Reader,
    announced: &[Announcement],
    rows: &BTreeMap<u32, Endpoint>,
) -> Vec<(u32, Want, String)> {
    announced
        .iter()
        .filter(|one| rows.get(&one.ifindex).is_some_and(|row| row.uid == one.uid))
        .map(|one| {
            // A container that is no pod of the API is selected by no policy.
            let Some(pod) = &one.pod else {
                let text: Vec<String> = one.addresses().map(|addr| addr.to_string()).collect();
                return (one.ifindex, Want::Open, text.join(" "));
            };
            let name = Name::new(&pod.namespace, &pod.name);
            let text = name.to_string();
            let want = match compiled.endpoints.get(&name) {
                Some(table) if reader.knows(pod) => {
                    if isolation(table) == 0 {
                        Want::Open
                    } else {
                        Want::Table(table.clone())
                    }
                }
                _ => Want::Closed,
            };
            (one.ifindex, want, text)
        })
        .collect()
}

/// Class maps and tables that rows name.
fn names<'a>(rows: impl Iterator<Item = &'a Endpoint>) -> (BTreeSet<u32>, BTreeSet<u32>) {
    rows.map(|row| (row.class_map, row.table)).unzip()
}
