//! Brings what the compiler says into the maps.
//!
//! Class maps and rule tables are built aside under new keys; an endpoint then changes over by one write of its row, so
//! each packet meets one whole policy. Maps that the rows no longer name are removed at the look after the next one: a
//! program may still be reading them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use orch_ebpf_loader::{Announcement, ClassMap, Error, Maps, RuleTable};
use orch_ebpf_maps::{
    Action, ClassKey, Config, Endpoint, ISOLATED_EGRESS, ISOLATED_INGRESS, LAYOUT_VERSION,
    MAX_RULE_ENTRIES, Rule, RuleKey, state,
};
use orch_policy::{Compiled, Direction, Name, Peer, Prefix, Row, Table, compile};
use tracing::warn;

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
    /// Pods whose policy does not fit into maps; they are closed.
    pub locked: Vec<String>,
}

/// The maps, and what was written to them.
pub struct Engine {
    maps: Maps,
    compiled: Compiled,
    revision: u64,
    next_key: u32,
    /// The published class map with its entries.
    classes: Option<(u32, Vec<(ClassKey, u32)>)>,
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
    pub fn new(maps: Maps) -> Result<Self, Error> {
        let rows = maps.endpoints()?;
        let (class_maps, tables) = maps.published();
        let next_key = class_maps.iter().chain(&tables).copied().max().unwrap_or(0) + 1;
        let revision = rows.iter().map(|(_, row)| row.revision).max().unwrap_or(0);
        let named = names(rows.iter().map(|(_, row)| row));
        Ok(Self {
            maps,
            compiled: Compiled::default(),
            revision,
            next_key,
            classes: None,
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
        let settings =
            Config { version: LAYOUT_VERSION, vxlan_port: vxlan_port.to_be(), pad: [0; 2] };
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
        let class_map = if wants.iter().any(|(_, want, _)| matches!(want, Want::Table(_))) {
            self.ensure_classes()?
        } else {
            0
        };
        let unfit = self.ensure_tables(wants.iter().filter_map(|(_, want, _)| match want {
            Want::Table(table) => Some(table),
            _ => None,
        }));
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
            now.generation = before.generation.wrapping_add(1);
            now.revision = self.revision;
            // One that went meanwhile needs nothing.
            match self.maps.update_endpoint(ifindex, now) {
                Ok(()) => {
                    report.endpoints.insert(ifindex, now);
                    report.written += 1;
                }
                Err(error) => {
                    if self.maps.endpoint(ifindex)?.is_some() {
                        return Err(error);
                    }
                    report.endpoints.remove(&ifindex);
                }
            }
        }
        self.retire(&report)?;
        report.revision = self.revision;
        Ok(report)
    }

    fn take_key(&mut self) -> u32 {
        let key = self.next_key;
        self.next_key += 1;
        key
    }

    fn ensure_classes(&mut self) -> Result<u32, Error> {
        let entries = classes(&self.compiled.peers);
        if let Some((key, present)) = &self.classes
            && *present == entries
        {
            return Ok(*key);
        }
        let built = ClassMap::build(entries.iter().copied())?;
        let key = self.take_key();
        self.maps.put_class_map(key, &built)?;
        self.classes = Some((key, entries));
        Ok(key)
    }

    /// Publishes those of the tables that are not yet, many at a time: each write waits for the kernel. Gives why some
    /// could not be.
    fn ensure_tables<'a>(
        &mut self,
        tables: impl Iterator<Item = &'a Arc<Table>>,
    ) -> HashMap<usize, String> {
        let mut seen = HashSet::new();
        let new: Vec<&Arc<Table>> = tables
            .filter(|table| !self.tables.contains_key(&place(table)) && seen.insert(place(table)))
            .collect();
        let mut unfit = HashMap::new();
        // A table that is not published yet holds a file descriptor.
        for part in new.chunks(TABLES_AT_ONCE) {
            let (mut kept, mut built) = (Vec::new(), Vec::new());
            for table in part {
                match build(table) {
                    Ok(map) => {
                        kept.push(*table);
                        built.push((self.take_key(), map));
                    }
                    Err(error) => drop(unfit.insert(place(table), crate::chain(&error))),
                }
            }
            let outcomes = self.maps.put_tables(&built);
            for ((table, (key, _)), outcome) in kept.iter().zip(&built).zip(outcomes) {
                match outcome {
                    Ok(()) => drop(self.tables.insert(place(table), ((*table).clone(), *key))),
                    Err(error) => drop(unfit.insert(place(table), crate::chain(&error))),
                }
            }
        }
        unfit
    }

    /// Removes inner maps that no row names now or named when the last look ended.
    fn retire(&mut self, report: &Report) -> Result<(), Error> {
        let now = names(report.endpoints.values());
        let current = self.classes.as_ref().map(|(key, _)| *key);
        let before = std::mem::replace(&mut self.named, now);
        let (class_maps, tables) = (&self.named.0, &self.named.1);
        let in_use = |key: &u32| tables.contains(key) || before.1.contains(key);
        self.maps.retain(
            |key| class_maps.contains(&key) || before.0.contains(&key) || Some(key) == current,
            |key| in_use(&key),
        )?;
        self.tables.retain(|_, (_, key)| in_use(key));
        Ok(())
    }
}

/// Equal tables share their allocation.
fn place(table: &Arc<Table>) -> usize {
    Arc::as_ptr(table).addr()
}

fn build(table: &Table) -> Result<RuleTable, Error> {
    let rules: Vec<(RuleKey, Rule)> = table.rows().iter().map(rule).collect();
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

/// The peers as a class map holds them.
fn classes(peers: &BTreeMap<Prefix, Peer>) -> Vec<(ClassKey, u32)> {
    peers
        .iter()
        .map(|(prefix, peer)| (ClassKey::new(prefix.addr(), prefix.prefix_len()), peer.class.0))
        .collect()
}

/// A row as the kernel has it.
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

/// In which directions policies select the endpoint.
fn isolation(table: &Table) -> u8 {
    let ingress = if table.speaks(Direction::Ingress) { ISOLATED_INGRESS } else { 0 };
    let egress = if table.speaks(Direction::Egress) { ISOLATED_EGRESS } else { 0 };
    ingress | egress
}
