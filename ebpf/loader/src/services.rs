//! Services at connect time: the socket programs, and their maps.
//!
//! The programs are attached to the root of the machine's cgroup tree (v2), because on machines where containers live in
//! cgroups v1 every process is there. They touch sockets of the namespaces in `pod_namespaces` alone.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};

use aya::maps::hash_map::HashMap;
use aya::maps::{Map, MapData, MapError};
use aya::programs::links::{CgroupAttachMode, FdLink};
use aya::programs::{CgroupSockAddr, ProgramInfo};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use orch_ebpf_maps::{Backend, BackendKey, Frontend, FrontendKey, Member};

use crate::{Error, Pins};

const OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/services.o"));
const PROGRAMS: [&str; 8] = [
    "sock_connect4",
    "sock_connect6",
    "sock_peername4",
    "sock_peername6",
    "sock_sendmsg4",
    "sock_sendmsg6",
    "sock_recvmsg4",
    "sock_recvmsg6",
];
/// `asm-generic/socket.h`.
const SO_NETNS_COOKIE: libc::c_int = 71;
const POD_NAMESPACES: &str = "pod_namespaces";
const MAPS: [&str; 8] = [
    "frontends",
    "backends",
    "members",
    POD_NAMESPACES,
    "connected",
    "chosen",
    "answers",
    "clients",
];

/// Handles on the maps that the agent writes.
pub struct Services {
    frontends: HashMap<MapData, FrontendKey, Frontend>,
    backends: HashMap<MapData, BackendKey, Backend>,
    members: HashMap<MapData, Member, u32>,
    pod_namespaces: PodNamespaces,
}

type PodNamespaces = HashMap<MapData, u64, u32>;

/// Makes the programs of this build the pinned and attached ones. Maps that are pinned stay, with all that is in them, and
/// programs that are the same already. Those of a build with other maps, which nobody keeps right any more, go first.
///
/// # Errors
/// If the kernel refuses.
pub fn install_services(pins: &Pins, cgroup: &Path) -> Result<Services, Error> {
    pins.ensure()?;
    for former in pins.other_services() {
        remove(&former)?;
    }
    let mut loader = EbpfLoader::new();
    for name in MAPS {
        loader.map_pin_path(name, pins.map(name));
    }
    let mut object = loader.load(OBJECT).map_err(|error| Error::Load(Box::new(error)))?;
    for name in PROGRAMS {
        ensure_attached(&mut object, name, pins, cgroup)?;
    }
    Services::open(pins)
}

/// Detaches the programs and removes them and their maps; false if there were none. Connections that are there stay.
///
/// # Errors
/// If something cannot be removed.
pub fn uninstall_services(pins: &Pins) -> Result<bool, Error> {
    let mut folders = pins.other_services();
    folders.extend(Some(pins.folder().to_owned()).filter(|own| own.exists()));
    folders.iter().try_for_each(|folder| remove(folder))?;
    Ok(!folders.is_empty())
}

/// Removes a folder of pins, of whichever build.
fn remove(folder: &Path) -> Result<(), Error> {
    // The kernel lets go of a program a moment after its link: until then it has to leave everybody alone.
    if let Ok(mut pods) = pinned::<PodNamespaces>(&folder.join("maps"), POD_NAMESPACES) {
        set_keys(&mut pods, &BTreeSet::new())?;
    }
    let failed = |source| Error::File { what: "remove", path: folder.to_owned(), source };
    fs::remove_dir_all(folder).map_err(failed)
}

fn ensure_attached(object: &mut Ebpf, name: &str, pins: &Pins, cgroup: &Path) -> Result<(), Error> {
    let program: &mut CgroupSockAddr = object
        .program_mut(name)
        .ok_or_else(|| Error::Missing(format!("program {name}")))?
        .try_into()
        .map_err(Error::program("use", name))?;
    program.load().map_err(Error::program("load", name))?;
    let tag = program.info().map_err(Error::program("look at", name))?.tag();
    let (kept, link) = (pins.program(name), pins.links().join(name));
    let same = ProgramInfo::from_pin(&kept).is_ok_and(|pinned| pinned.tag() == tag);
    if same && link.exists() {
        return Ok(());
    }
    let file = File::open(cgroup).map_err(|source| Error::File {
        what: "open the cgroup",
        path: cgroup.to_owned(),
        source,
    })?;
    // A link never shuts others out, and takes no flag that says so (`cgroup_bpf_link_attach`).
    let id = program
        .attach(file.as_fd(), CgroupAttachMode::Single)
        .map_err(Error::program("attach", name))?;
    let new: FdLink = program
        .take_link(id)
        .map_err(Error::program("keep the link of", name))?
        .try_into()
        .map_err(Error::link(&link))?;
    // For a moment both are there: the second finds an address that is no Service's any more.
    replace(&link, |next| new.pin(next).map(drop))?;
    replace(&kept, |next| program.pin(next))
}

/// A pin cannot be written over, but renamed over.
fn replace(
    path: &Path,
    pin: impl FnOnce(&Path) -> Result<(), aya::pin::PinError>,
) -> Result<(), Error> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let next = path.with_file_name(format!("{name}-next"));
    let _ = fs::remove_file(&next);
    pin(&next).map_err(|source| Error::Pin { path: next.clone(), source: Box::new(source) })?;
    fs::rename(&next, path).map_err(|source| Error::File {
        what: "replace",
        path: path.to_owned(),
        source,
    })
}

impl Services {
    fn open(pins: &Pins) -> Result<Self, Error> {
        let maps = pins.folder().join("maps");
        Ok(Self {
            frontends: pinned(&maps, "frontends")?,
            backends: pinned(&maps, "backends")?,
            members: pinned(&maps, "members")?,
            pod_namespaces: pinned(&maps, POD_NAMESPACES)?,
        })
    }

    /// Everything that pods may connect to.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, Error> {
        self.frontends.iter().collect::<Result<_, _>>().map_err(Error::map("read", "frontends"))
    }

    /// All backends.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn backends(&self) -> Result<Vec<(BackendKey, Backend)>, Error> {
        self.backends.iter().collect::<Result<_, _>>().map_err(Error::map("read", "backends"))
    }

    /// Writes a frontend; its backends are there already.
    ///
    /// # Errors
    /// If the map is full.
    pub fn set_frontend(&mut self, key: FrontendKey, frontend: Frontend) -> Result<(), Error> {
        self.frontends.insert(key, frontend, 0).map_err(Error::map("write", "frontends"))
    }

    /// Removes a frontend; one that is not there is removed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_frontend(&mut self, key: FrontendKey) -> Result<(), Error> {
        gone(self.frontends.remove(&key)).map_err(Error::map("write", "frontends"))
    }

    /// Writes a backend.
    ///
    /// # Errors
    /// If the map is full.
    pub fn set_backend(&mut self, key: BackendKey, backend: Backend) -> Result<(), Error> {
        self.backends.insert(key, backend, 0).map_err(Error::map("write", "backends"))
    }

    /// Removes a backend; one that is not there is removed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_backend(&mut self, key: BackendKey) -> Result<(), Error> {
        gone(self.backends.remove(&key)).map_err(Error::map("write", "backends"))
    }

    /// Which frontend has which backends.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn members(&self) -> Result<Vec<Member>, Error> {
        self.members.keys().collect::<Result<_, _>>().map_err(Error::map("read", "members"))
    }

    /// Writes a member.
    ///
    /// # Errors
    /// If the map is full.
    pub fn set_member(&mut self, member: Member) -> Result<(), Error> {
        self.members.insert(member, 1_u32, 0).map_err(Error::map("write", "members"))
    }

    /// Removes a member; one that is not there is removed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_member(&mut self, member: Member) -> Result<(), Error> {
        gone(self.members.remove(&member)).map_err(Error::map("write", "members"))
    }

    /// Makes exactly these the namespaces of pods.
    ///
    /// # Errors
    /// If the map is full: those that did not fit stay with nftables.
    pub fn set_pod_namespaces(&mut self, cookies: &BTreeSet<u64>) -> Result<(), Error> {
        set_keys(&mut self.pod_namespaces, cookies)
    }
}

fn pinned<M: TryFrom<Map, Error = MapError>>(maps: &Path, name: &'static str) -> Result<M, Error> {
    MapData::from_pin(maps.join(name))
        .and_then(Map::from_map_data)
        .and_then(M::try_from)
        .map_err(Error::map("open", name))
}

fn set_keys(map: &mut PodNamespaces, keys: &BTreeSet<u64>) -> Result<(), Error> {
    let have: BTreeSet<u64> =
        map.keys().collect::<Result<_, _>>().map_err(Error::map("read", POD_NAMESPACES))?;
    for key in have.difference(keys) {
        gone(map.remove(key)).map_err(Error::map("write", POD_NAMESPACES))?;
    }
    for key in keys.difference(&have) {
        map.insert(key, 1_u32, 0).map_err(Error::map("write", POD_NAMESPACES))?;
    }
    Ok(())
}

fn gone(outcome: Result<(), MapError>) -> Result<(), MapError> {
    match outcome {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Root of the cgroup tree (v2), if there is one.
#[must_use]
pub fn cgroup_root() -> Option<PathBuf> {
    parse_mounts(&fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// `proc_pid_mountinfo(5)`: the mount point is the fifth word, the type follows the dash.
fn parse_mounts(text: &str) -> Option<PathBuf> {
    let line = text.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

/// Cookie of the calling thread's network namespace (Linux 5.14).
///
/// # Errors
/// If the kernel does not know it.
pub fn network_namespace_cookie() -> std::io::Result<u64> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).expect("eight");
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which lives through the call.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if outcome == 0 { Ok(cookie) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_tree_is_found_among_the_mounts() {
        let hybrid = "30 29 0:25 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw\n\
                      40 30 0:30 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_mounts(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(parse_mounts("30 29 0:25 / /sys/fs/cgroup rw - cgroup cgroup rw\n"), None);
    }
}
