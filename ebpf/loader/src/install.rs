//! Puts programs and maps into the kernel, or takes over those that are there.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use aya::maps::MapInfo;
use aya::programs::{ProgramInfo, SchedClassifier};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use nix::time::{ClockId, clock_getres};
use orch_ebpf_maps::Config;

use crate::attach::upgrade;
use crate::{Error, Hook, Maps, Pins, filters};

/// The compiled programs.
pub const OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/policy.o"));

/// Names of all maps.
pub(crate) const MAPS: [&str; 19] = [
    "endpoints",
    "endpoint_cache",
    "slots",
    "class_maps",
    "tables",
    "addresses",
    "flows",
    "fragments",
    "counters",
    "events",
    "event_budgets",
    "event_losses",
    "strays",
    "settings",
    "fast_hints",
    "fast_flows",
    "fast_flows6",
    "fast_tunnels",
    "fast_tunnels6",
];

/// For [`OBJECT`] on this kernel: the programs count time in its ticks.
pub(crate) fn loader() -> EbpfLoader<'static> {
    /// What most kernels have, if this one does not say.
    const USUAL: u32 = 250;
    static TICKS: LazyLock<u32> = LazyLock::new(|| {
        let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).map(Duration::from);
        let ticks = tick.map(|tick| (1.0 / tick.as_secs_f64()).round() as u32);
        ticks.ok().filter(|ticks| (24..=10_000).contains(ticks)).unwrap_or(USUAL)
    });
    let mut loader = EbpfLoader::new();
    loader.override_global("ticks_per_second", &*TICKS, true);
    loader
}

/// Makes programs and maps of this build the pinned ones. Maps that are pinned stay, with all that is in them. Where the
/// programs differ, every attached link changes over at once, without a packet in between.
///
/// # Errors
/// If the kernel refuses, or if pinned maps have another layout.
pub fn install(pins: &Pins) -> Result<Maps, Error> {
    pins.ensure()?;
    let mut loader = loader();
    for name in MAPS {
        loader.map_pin_path(name, pins.map(name));
    }
    check_layouts(pins)?;
    let mut object = loader.load(OBJECT).map_err(|error| Error::Load(Box::new(error)))?;
    for hook in Hook::ALL.into_iter().filter(|hook| !hook.is_fast_path() || pins.has_tcx()) {
        ensure_program(&mut object, hook, pins)?;
    }
    let mut maps = Maps::open(pins)?;
    // Before the first program of ours is on a way out.
    let settings = maps.settings()?;
    let has_former = u8::from(maps.have_former());
    if settings.has_former != has_former {
        maps.set_settings(Config { has_former, ..settings })?;
    }
    Ok(maps)
}

/// Removes programs and maps of builds with another layout, once every pod has ours; true if there were some.
///
/// Until then those stay on their links, behind ours, so that what the former policies deny does not pass before the new ones
/// are known. On the ways out, too: a packet is judged there by whichever comes first and knows its sender, and is then
/// marked as nobody's. A slot is by its link's index, so the two agree about them.
///
/// # Errors
/// If something cannot be removed.
pub fn retire_others(pins: &Pins) -> Result<bool, Error> {
    let others = pins.others();
    for path in &others {
        fs::remove_dir_all(path).map_err(|source| Error::File {
            what: "remove",
            path: path.clone(),
            source,
        })?;
    }
    Ok(!others.is_empty())
}

/// Takes programs from all links and removes programs and maps; false if there were none.
///
/// # Errors
/// If something cannot be removed; the rest was tried.
pub fn uninstall(pins: &Pins) -> Result<bool, Error> {
    let had_others = retire_others(pins)?;
    if !pins.folder().exists() {
        return Ok(had_others);
    }
    // Filters hold their program without a pin.
    if !pins.has_tcx() {
        filters::take_all();
    }
    let removed = fs::remove_dir_all(pins.folder());
    removed.map(|()| true).map_err(|source| Error::File {
        what: "remove",
        path: pins.folder().to_owned(),
        source,
    })
}

/// Pinned maps are opened without a look at what they are, so they are looked at here.
fn check_layouts(pins: &Pins) -> Result<(), Error> {
    let mut wanted: Option<Ebpf> = None;
    for name in MAPS {
        let path = pins.map(name);
        let Ok(have) = MapInfo::from_pin(&path) else { continue };
        // Maps of their own, which go when this is done.
        if wanted.is_none() {
            let fresh = loader().load(OBJECT).map_err(|error| Error::Load(Box::new(error)))?;
            wanted = Some(fresh);
        }
        let want = wanted
            .as_ref()
            .and_then(|object| object.map(name))
            .ok_or_else(|| Error::Missing(name.to_owned()))?;
        let want = info_of(want).map_err(Error::map("look at", "of the object"))?;
        let text = |info: &MapInfo| {
            format!(
                "{:?} {}→{} of {}",
                info.map_type().ok(),
                info.key_size(),
                info.value_size(),
                info.max_entries()
            )
        };
        let (have, want) = (text(&have), text(&want));
        if have != want {
            let name = name.to_owned();
            return Err(Error::Layout { name, have, want, path: pins.folder().to_owned() });
        }
    }
    Ok(())
}

fn info_of(map: &aya::maps::Map) -> Result<MapInfo, aya::maps::MapError> {
    use aya::maps::Map;
    let data = match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::ArrayOfMaps(data)
        | Map::PerCpuArray(data)
        | Map::RingBuf(data) => data,
        other => {
            return Err(aya::maps::MapError::InvalidName { name: format!("{other:?}") });
        }
    };
    data.info()
}

fn ensure_program(object: &mut Ebpf, hook: Hook, pins: &Pins) -> Result<(), Error> {
    let name = hook.program();
    let program: &mut SchedClassifier = object
        .program_mut(name)
        .ok_or_else(|| Error::Missing(format!("program {name}")))?
        .try_into()
        .map_err(Error::program("use", name))?;
    program.load().map_err(Error::program("load", name))?;
    let path = pins.program(name);
    let tag = program.info().map_err(Error::program("look at", name))?.tag();
    match ProgramInfo::from_pin(&path) {
        Ok(pinned) if pinned.tag() == tag => return Ok(()),
        Ok(_) => {
            // Links first: who is attached meanwhile by the old pin is found by the second look.
            upgrade(program, hook, pins)?;
            replace_pin(program, &path)?;
            upgrade(program, hook, pins)?;
        }
        Err(_) => {
            let _ = fs::remove_file(&path);
            pin(program, &path)?;
        }
    }
    Ok(())
}

fn pin(program: &mut SchedClassifier, path: &Path) -> Result<(), Error> {
    program.pin(path).map_err(|error| Error::Pin { path: path.to_owned(), source: Box::new(error) })
}

/// A pin cannot be written over, but renamed over.
fn replace_pin(program: &mut SchedClassifier, path: &Path) -> Result<(), Error> {
    let next = path.with_file_name(format!(
        "{}-next",
        path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    ));
    let _ = fs::remove_file(&next);
    pin(program, &next)?;
    fs::rename(&next, path).map_err(|source| Error::File {
        what: "replace",
        path: path.to_owned(),
        source,
    })
}
