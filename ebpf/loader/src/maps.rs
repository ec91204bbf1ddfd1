//! The maps, by what is done with them.

use std::fs::File;
use std::net::IpAddr;
use std::panic::resume_unwind;
use std::thread;

use aya::maps::hash_map::HashMap;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashOfMaps, Map, MapData, MapError, PerCpuArray, RingBuf};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use orch_ebpf_maps::{
    Address, AddressData, ClassKey, Config, Direction, Endpoint, EndpointRow, Event, Flow, FlowKey,
    Loss, MAX_CLASS_MAPS, MAX_TABLES, Reason, Rule, RuleKey,
};

use crate::rows::Rows;
use crate::{Error, Pins};

/// `BPF_NOEXIST`: insert only.
const NO_EXIST: u64 = 1;
/// `BPF_F_NO_PREALLOC`, which LPM tries need.
const NO_PREALLOC: u32 = 1;
/// Reasons per direction in `counters`.
pub(crate) const REASON_COUNT: u32 = 32;
/// Slots that marks can carry.
const SLOTS: u32 = 65535;
/// Writers of an outer map at one time. Each waits until no program runs any more that may have seen the old map; those
/// that wait together wait for the same ones.
const WRITERS: usize = 32;

/// Bytes that an event takes in the ring: the kernel puts 8 in front, and rounds up to 8.
const EVENT_IN_RING: usize = size_of::<Event>().next_multiple_of(8) + 8;

type ClassMaps = HashOfMaps<MapData, u32, LpmTrie<MapData, AddressData, u32>>;
type Tables = HashOfMaps<MapData, u32, LpmTrie<MapData, RuleData, Rule>>;
const CLASS_MAPS: &str = "class_maps";
const TABLES: &str = "tables";

/// A rule key as the kernel's trie has it behind the prefix length.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RuleData {
    peer_class: u32,
    direction: u8,
    protocol: u8,
    port: u16,
}

// SAFETY: `repr(C)`, integers only, no padding: 4 + 1 + 1 + 2 bytes, aligned to 4.
unsafe impl aya::Pod for RuleData {}

/// A class map that nobody uses yet, or one that is in use.
#[derive(Debug)]
pub struct ClassMap(LpmTrie<MapData, AddressData, u32>);

impl ClassMap {
    /// A new one with these entries.
    ///
    /// # Errors
    /// If the kernel has no memory for it.
    pub fn build(entries: impl ExactSizeIterator<Item = (ClassKey, u32)>) -> Result<Self, Error> {
        let size = u32::try_from(entries.len()).unwrap_or(u32::MAX).max(1);
        let mut map = LpmTrie::create(size, NO_PREALLOC).map_err(Error::map("make", "class"))?;
        for (key, class) in entries {
            map.insert(&Key::new(key.prefix_len, key.data), class, 0)
                .map_err(Error::map("fill", "class"))?;
        }
        Ok(Self(map))
    }
}

/// A rule table that nobody uses yet.
#[derive(Debug)]
pub struct RuleTable(LpmTrie<MapData, RuleData, Rule>);

impl RuleTable {
    /// A new one with these rules.
    ///
    /// # Errors
    /// If the kernel has no memory for it.
    pub fn build(rules: impl ExactSizeIterator<Item = (RuleKey, Rule)>) -> Result<Self, Error> {
        let size = u32::try_from(rules.len()).unwrap_or(u32::MAX).max(1);
        let mut map = LpmTrie::create(size, NO_PREALLOC).map_err(Error::map("make", "rule"))?;
        for (key, rule) in rules {
            let RuleKey { prefix_len, peer_class, direction, protocol, port } = key;
            let data = RuleData { peer_class, direction, protocol, port };
            map.insert(&Key::new(prefix_len, data), rule, 0).map_err(Error::map("fill", "rule"))?;
        }
        Ok(Self(map))
    }
}

/// Handles on all maps.
pub struct Maps {
    pins: Pins,
    endpoints: Rows,
    slots: HashMap<MapData, u32, u32>,
    class_maps: ClassMaps,
    tables: Tables,
    addresses: LpmTrie<MapData, AddressData, Address>,
    flows: HashMap<MapData, FlowKey, Flow>,
    counters: PerCpuArray<MapData, u64>,
    event_losses: PerCpuArray<MapData, u64>,
    strays: HashMap<MapData, u32, u32>,
    settings: Array<MapData, Config>,
}

impl Maps {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// If one is missing, or is of another type.
    pub fn open(pins: &Pins) -> Result<Self, Error> {
        Ok(Self {
            pins: pins.clone(),
            endpoints: Rows::open(pins)?,
            slots: open(pins, "slots")?,
            class_maps: open_outer(pins, CLASS_MAPS)?,
            tables: open_outer(pins, TABLES)?,
            addresses: open(pins, "addresses")?,
            flows: open(pins, "flows")?,
            counters: open(pins, "counters")?,
            event_losses: open(pins, "event_losses")?,
            strays: open(pins, "strays")?,
            settings: open(pins, "settings")?,
        })
    }

    /// The endpoint behind a link.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn endpoint(&self, ifindex: u32) -> Result<Option<Endpoint>, Error> {
        Ok(self.endpoints.get(ifindex)?.map(|row| row.endpoint))
    }

    /// All endpoints by their link.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn endpoints(&self) -> Result<Vec<(u32, Endpoint)>, Error> {
        self.endpoints.all()
    }

    /// Endpoints that programs have to search for, because somebody was killed while writing them, are found at once again.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn mend_endpoints(&mut self) -> Result<(), Error> {
        self.endpoints.mend()
    }

    /// Makes an endpoint with a slot of its own, or replaces the one that had the link's index before.
    ///
    /// # Errors
    /// If the map is full.
    pub fn insert_endpoint(
        &mut self,
        ifindex: u32,
        mut endpoint: Endpoint,
    ) -> Result<Endpoint, Error> {
        self.remove_endpoint(ifindex)?;
        endpoint.slot = self.take_slot(ifindex)?;
        let row = EndpointRow::new(ifindex, endpoint);
        if let Err(error) = self.endpoints.put(row, 0) {
            let _ = self.slots.remove(&endpoint.slot);
            return Err(error);
        }
        Ok(endpoint)
    }

    fn take_slot(&mut self, ifindex: u32) -> Result<u32, Error> {
        let mut last = MapError::KeyNotFound;
        for step in 0..SLOTS {
            let slot = (ifindex.wrapping_add(step)) % SLOTS + 1;
            match self.slots.insert(slot, ifindex, NO_EXIST) {
                Ok(()) => return Ok(slot),
                Err(MapError::SyscallError(error))
                    if error.io_error.kind() == std::io::ErrorKind::AlreadyExists =>
                {
                    last = MapError::SyscallError(error);
                }
                Err(error) => return Err(Error::map("fill", "slots")(error)),
            }
        }
        Err(Error::map("fill", "slots")(last))
    }

    /// Replaces what applies to an endpoint that is there: one write, so packets see the old or the new.
    ///
    /// # Errors
    /// If it is not there any more.
    pub fn update_endpoint(&mut self, ifindex: u32, endpoint: Endpoint) -> Result<(), Error> {
        /// `BPF_EXIST`: replace only.
        const EXIST: u64 = 2;
        self.endpoints.put(EndpointRow::new(ifindex, endpoint), EXIST)
    }

    /// Removes an endpoint; false if it was not there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_endpoint(&mut self, ifindex: u32) -> Result<bool, Error> {
        let Some(endpoint) = self.endpoint(ifindex)? else { return Ok(false) };
        self.endpoints.remove(ifindex)?;
        gone(self.slots.remove(&endpoint.slot)).map_err(Error::map("empty", "slots"))?;
        Ok(true)
    }

    /// Publishes a class map under a key, which is a number below [`MAX_CLASS_MAPS`].
    ///
    /// # Errors
    /// If it is not.
    pub fn put_class_map(&mut self, key: u32, map: &ClassMap) -> Result<(), Error> {
        let inner = &map.0;
        self.class_maps.insert(key, inner, 0).map_err(Error::map("fill", CLASS_MAPS))
    }

    /// Publishes a rule table under a key, which is a number below [`MAX_TABLES`].
    ///
    /// # Errors
    /// If it is not.
    pub fn put_table(&mut self, key: u32, table: &RuleTable) -> Result<(), Error> {
        let inner = &table.0;
        self.tables.insert(key, inner, 0).map_err(Error::map("fill", TABLES))
    }

    /// Publishes a class map, if there is one, and many rule tables in about the time of one; what came of each.
    pub fn publish(
        &mut self,
        class_map: Option<(u32, &ClassMap)>,
        tables: &[(u32, RuleTable)],
    ) -> (Result<(), Error>, Vec<Result<(), Error>>) {
        let pins = &self.pins;
        thread::scope(|scope| {
            let class_map = class_map.map(|(key, inner)| {
                scope.spawn(move || {
                    let mut map: ClassMaps = open_outer(pins, CLASS_MAPS)?;
                    map.insert(key, &inner.0, 0).map_err(Error::map("fill", CLASS_MAPS))
                })
            });
            let tables = at_once(tables, |(key, table)| {
                let mut map: Tables = open_outer(pins, TABLES)?;
                map.insert(*key, &table.0, 0).map_err(Error::map("fill", TABLES))
            });
            let class_map = class_map
                .map_or(Ok(()), |started| started.join().unwrap_or_else(|e| resume_unwind(e)));
            (class_map, tables)
        })
    }

    /// Takes back class maps and rule tables; those that are not there are gone. Their keys may be used again when this is
    /// done: no program runs any more that was begun before.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn withdraw(&mut self, class_maps: &[u32], tables: &[u32]) -> Result<(), Error> {
        let pins = &self.pins;
        thread::scope(|scope| {
            let removed = scope.spawn(move || {
                at_once(class_maps, |key| {
                    let mut map: ClassMaps = open_outer(pins, CLASS_MAPS)?;
                    gone(map.remove(key)).map_err(Error::map("empty", CLASS_MAPS))
                })
            });
            let tables = at_once(tables, |key| {
                let mut map: Tables = open_outer(pins, TABLES)?;
                gone(map.remove(key)).map_err(Error::map("empty", TABLES))
            });
            let class_maps = removed.join().unwrap_or_else(|e| resume_unwind(e));
            class_maps.into_iter().chain(tables).collect()
        })
    }

    /// Keys of published class maps and rule tables. The kernel is asked for each that there may be.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn published(&self) -> Result<(Vec<u32>, Vec<u32>), Error> {
        let class_maps = keys(MAX_CLASS_MAPS, |key| self.class_maps.get(&key, 0));
        let tables = keys(MAX_TABLES, |key| self.tables.get(&key, 0));
        Ok((
            class_maps.map_err(Error::map("read", CLASS_MAPS))?,
            tables.map_err(Error::map("read", TABLES))?,
        ))
    }

    /// Says what an address is to this node.
    ///
    /// # Errors
    /// If the map is full.
    pub fn put_address(&mut self, key: ClassKey, flags: u32) -> Result<(), Error> {
        self.addresses
            .insert(&Key::new(key.prefix_len, key.data), Address { flags }, 0)
            .map_err(Error::map("fill", "addresses"))
    }

    /// What addresses are to this node.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn addresses(&self) -> Result<Vec<(ClassKey, u32)>, Error> {
        self.addresses
            .iter()
            .map(|entry| {
                entry.map(|(key, address)| {
                    let (prefix_len, data) = (key.prefix_len(), key.data());
                    (ClassKey { prefix_len, data }, address.flags)
                })
            })
            .collect::<Result<_, _>>()
            .map_err(Error::map("read", "addresses"))
    }

    /// Forgets an address.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_address(&mut self, key: ClassKey) -> Result<(), Error> {
        gone(self.addresses.remove(&Key::new(key.prefix_len, key.data)))
            .map_err(Error::map("empty", "addresses"))
    }

    /// All flows that are remembered.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn flows(&self) -> Result<Vec<(FlowKey, Flow)>, Error> {
        self.flows.iter().collect::<Result<_, _>>().map_err(Error::map("read", "flows"))
    }

    /// What is known of a flow.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn flow(&self, key: &FlowKey) -> Result<Option<Flow>, Error> {
        found(self.flows.get(key, 0)).map_err(Error::map("read", "flows"))
    }

    /// Says that a flow is known, as if the programs had seen it begin.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn put_flow(&mut self, key: FlowKey, flow: Flow) -> Result<(), Error> {
        self.flows.insert(key, flow, 0).map_err(Error::map("fill", "flows"))
    }

    /// Packets by direction and reason since the maps were made, those that are not 0.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn counters(&self) -> Result<Vec<(Direction, Reason, u64)>, Error> {
        let mut counts = Vec::new();
        for direction in [Direction::Ingress, Direction::Egress] {
            for reason in Reason::ALL {
                let index = direction as u32 * REASON_COUNT + *reason as u32;
                let values =
                    self.counters.get(&index, 0).map_err(Error::map("read", "counters"))?;
                let packets = values.iter().sum();
                if packets > 0 {
                    counts.push((direction, *reason, packets));
                }
            }
        }
        Ok(counts)
    }

    /// Events that nobody heard of since the maps were made.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn event_losses(&self) -> Result<Vec<(Loss, u64)>, Error> {
        Loss::ALL
            .into_iter()
            .map(|loss| {
                let values = self.event_losses.get(&(loss as u32), 0);
                let values = values.map_err(Error::map("read", "event_losses"))?;
                Ok((loss, values.iter().sum()))
            })
            .collect()
    }

    /// Endpoints, by their `uid`, that got or sent packets from the middle of connections that are not known; they are
    /// told once.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn take_strays(&mut self) -> Result<Vec<u32>, Error> {
        const NAME: &str = "strays";
        let uids = self.strays.keys().collect::<Result<Vec<u32>, _>>();
        let uids = uids.map_err(Error::map("read", NAME))?;
        for uid in &uids {
            gone(self.strays.remove(uid)).map_err(Error::map("empty", NAME))?;
        }
        Ok(uids)
    }

    /// The settings.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn settings(&self) -> Result<Config, Error> {
        self.settings.get(&0, 0).map_err(Error::map("read", "settings"))
    }

    /// Whether programs and maps of a build with another layout are there, too.
    #[must_use]
    pub fn have_former(&self) -> bool {
        !self.pins.others().is_empty()
    }

    /// Writes the settings.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_settings(&mut self, config: Config) -> Result<(), Error> {
        self.settings.set(0, config, 0).map_err(Error::map("write", "settings"))
    }

    /// The class of an address, as an endpoint's class map has it.
    ///
    /// # Errors
    /// If the class map is gone.
    pub fn class_of(&self, class_map: u32, addr: impl Into<IpAddr>) -> Result<Option<u32>, Error> {
        let map = self.class_maps.get(&class_map, 0).map_err(Error::map("read", CLASS_MAPS))?;
        let key = ClassKey::host(addr);
        found(map.get(&Key::new(key.prefix_len, key.data), 0)).map_err(Error::map("read", "class"))
    }
}

/// A turn at what the programs tell: flows that were opened or dropped. Readers share the events: who takes one takes it
/// from all others. A turn should be short.
pub struct Events {
    ring: RingBuf<MapData>,
    /// So many events fill the ring.
    most: usize,
    /// Each reader has an idea of its own of how far all have come, so two at a time would read what is not there any more.
    _turn: Flock<File>,
}

impl Events {
    /// Takes a turn at the pinned ring; `None` while somebody else has one.
    ///
    /// # Errors
    /// If the ring is not there.
    pub fn open(pins: &Pins) -> Result<Option<Self>, Error> {
        let failed = |source| Error::File { what: "lock", path: pins.folder().to_owned(), source };
        let folder = File::open(pins.folder()).map_err(failed)?;
        let turn = match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(turn) => turn,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(failed(errno.into())),
        };
        let failed = Error::map("open", "events");
        let data = MapData::from_pin(pins.map("events"));
        let ring = data.and_then(|data| {
            let bytes = data.info()?.max_entries() as usize;
            Ok((RingBuf::try_from(Map::from_map_data(data)?)?, bytes / EVENT_IN_RING))
        });
        let (ring, most) = ring.map_err(failed)?;
        Ok(Some(Self { ring, most, _turn: turn }))
    }

    /// Makes room in a ring that is full: programs cannot take back what they told, so the newest would be missing.
    pub fn forget_oldest_half(self) {
        let half = self.most / 2;
        self.take(half).for_each(drop);
    }
}

impl Iterator for Events {
    type Item = Event;

    /// The next event that is there already.
    fn next(&mut self) -> Option<Event> {
        event(&self.ring.next()?)
    }
}

/// An item of a ring; `None` if it is none of an event's size.
pub(crate) fn event(item: &[u8]) -> Option<Event> {
    // SAFETY: the programs write whole events, and every bit pattern is one; the read does not ask for alignment.
    (item.len() >= size_of::<Event>())
        .then(|| unsafe { item.as_ptr().cast::<Event>().read_unaligned() })
}

pub(crate) fn open<M: TryFrom<Map, Error = MapError>>(
    pins: &Pins,
    name: &'static str,
) -> Result<M, Error> {
    MapData::from_pin(pins.map(name))
        .and_then(Map::from_map_data)
        .and_then(M::try_from)
        .map_err(Error::map("open", name))
}

/// An array of maps. aya's handle on such takes nothing out; the kernel's calls are those of a hash of maps.
fn open_outer<M: TryFrom<Map, Error = MapError>>(
    pins: &Pins,
    name: &'static str,
) -> Result<M, Error> {
    MapData::from_pin(pins.map(name))
        .map(Map::HashOfMaps)
        .and_then(M::try_from)
        .map_err(Error::map("open", name))
}

/// Those of the numbers below `end` that stand for an inner map.
fn keys<T>(end: u32, get: impl Fn(u32) -> Result<T, MapError>) -> Result<Vec<u32>, MapError> {
    let mut keys = Vec::new();
    for key in 0..end {
        if found(get(key))?.is_some() {
            keys.push(key);
        }
    }
    Ok(keys)
}

/// Does the same to many things, some at a time; the results in their order.
fn at_once<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let mut results = Vec::with_capacity(all.len());
    for part in all.chunks(WRITERS) {
        thread::scope(|scope| {
            let started: Vec<_> = part.iter().map(|one| scope.spawn(|| work(one))).collect();
            let joined =
                started.into_iter().map(|one| one.join().unwrap_or_else(|e| resume_unwind(e)));
            results.extend(joined);
        });
    }
    results
}

pub(crate) fn found<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        other => other,
    }
}
