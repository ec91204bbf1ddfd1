//! Programs on links.

use std::io;
use std::path::Path;
use std::time::Duration;
use std::{fs, thread};

use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{ProgramError, ProgramInfo, SchedClassifier, TcAttachType};
use aya::sys::SyscallError;
use aya::util::KernelVersion;
use nix::errno::Errno;

use crate::{Error, Pins, filters};

/// Where a program looks at packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Ingress of the host end of a pod's veth.
    FromPod,
    /// Egress of the host end of a pod's veth.
    ToPod,
    /// Egress of a link that leaves the node.
    ToWire,
    /// Ingress of the host end of a pod's veth and of links by which packets of pods come in, before [`Hook::FromPod`]:
    /// the short way for flows that are known.
    FastEnter,
    /// Egress of the same links, behind the others: flows become known.
    FastLeave,
}

/// Waits for the kernel to let go of a link: a grace period.
const ATTEMPTS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(5);

impl Hook {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::FromPod, Self::ToPod, Self::ToWire, Self::FastEnter, Self::FastLeave];
    /// Those that enforce policies.
    pub const POLICY: [Self; 3] = [Self::FromPod, Self::ToPod, Self::ToWire];
    /// Those of the fast path.
    pub const FAST_PATH: [Self; 2] = [Self::FastEnter, Self::FastLeave];

    /// Name of the program.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
            Self::ToWire => "to_wire",
            Self::FastEnter => "fast_enter",
            Self::FastLeave => "fast_leave",
        }
    }

    pub(crate) fn direction(self) -> TcAttachType {
        match self {
            Self::FromPod | Self::FastEnter => TcAttachType::Ingress,
            Self::ToPod | Self::ToWire | Self::FastLeave => TcAttachType::Egress,
        }
    }

    /// Policies come before everybody, so that nobody can end the chain before them. `fast_enter` spares them where it knows
    /// their answer, and what it does not know comes to them next; `fast_leave` sees what all others let pass.
    fn order(self) -> LinkOrder {
        if self == Self::FastLeave { LinkOrder::last() } else { LinkOrder::first() }
    }

    pub(crate) fn is_fast_path(self) -> bool {
        Self::FAST_PATH.contains(&self)
    }
}

/// Whether this kernel can have the programs of [`Hook::FAST_PATH`]: they need TCX links (Linux 6.6).
#[must_use]
pub fn supports_fast_path() -> bool {
    has_tcx()
}

/// Attaches the pinned program to a link of the current network namespace, and pins that. A link that has it keeps it.
///
/// # Errors
/// If the kernel refuses.
pub fn attach(pins: &Pins, ifname: &str, ifindex: u32, hook: Hook) -> Result<(), Error> {
    let name = hook.program();
    let mut program =
        SchedClassifier::from_pin(pins.program(name)).map_err(Error::program("open", name))?;
    let path = pins.link(ifindex, hook);
    if !pins.has_tcx() {
        return filters::attach(&mut program, ifname, ifindex, hook);
    }
    // What an earlier device of the same index left is severed, and goes.
    if path.exists() && change_over(&mut program, hook, &path)? {
        return Ok(());
    }
    let mut patience = ATTEMPTS;
    let id = loop {
        let order = TcAttachOptions::TcxOrder(hook.order());
        match program.attach_with_options(ifname, hook.direction(), order) {
            // A link whose pin was just removed is on the device until the kernel has got round to it.
            Err(error) if patience > 0 && is_taken(&error) => {
                patience -= 1;
                thread::sleep(PAUSE);
            }
            other => break other.map_err(Error::program("attach", name))?,
        }
    };
    let link: FdLink = program
        .take_link(id)
        .map_err(Error::program("keep the link of", name))?
        .try_into()
        .map_err(Error::link(&path))?;
    link.pin(&path)
        .map(drop)
        .map_err(|source| Error::Pin { path: path.clone(), source: Box::new(source) })
}

/// Makes a pinned link run `program`; false if its device is gone, and then the pin goes, too.
fn change_over(program: &mut SchedClassifier, hook: Hook, path: &Path) -> Result<bool, Error> {
    let name = hook.program();
    let pinned = PinnedLink::from_pin(path).map_err(Error::link(path))?;
    let link = FdLink::from(pinned).try_into().map_err(Error::link(path))?;
    match program.attach_to_link(link) {
        Ok(id) => {
            // The pin holds the link; our handle on it may go, without a detach.
            let link = program.take_link(id).map_err(Error::program("keep the link of", name))?;
            drop(FdLink::try_from(link).map_err(Error::link(path))?);
            Ok(true)
        }
        Err(error) if has_errno(&error, Errno::ENOLINK) => remove(path).map(|()| false),
        Err(error) => Err(Error::program("attach", name)(error)),
    }
}

fn is_taken(error: &ProgramError) -> bool {
    has_errno(error, Errno::EEXIST)
}

fn has_errno(error: &ProgramError, errno: Errno) -> bool {
    matches!(error, ProgramError::SyscallError(SyscallError { io_error, .. })
        if io_error.raw_os_error() == Some(errno as i32))
}

/// Since Linux 6.6. Should the version not be readable, the attempt will tell.
pub(crate) fn has_tcx() -> bool {
    KernelVersion::current().map_or(true, |version| version >= KernelVersion::new(6, 6, 0))
}

/// Whether the pinned program of the hook is on the link.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn is_attached(pins: &Pins, ifname: &str, ifindex: u32, hook: Hook) -> Result<bool, Error> {
    let name = hook.program();
    let pinned =
        ProgramInfo::from_pin(pins.program(name)).map_err(Error::program("look at", name))?;
    if !pins.has_tcx() {
        return filters::is_attached(ifindex, hook, pinned.id());
    }
    let path = pins.link(ifindex, hook);
    if !path.exists() {
        return Ok(false);
    }
    let (_, programs) = SchedClassifier::query_tcx(ifname, hook.direction())
        .map_err(Error::program("ask for", name))?;
    Ok(programs.iter().any(|program| program.id() == pinned.id()))
}

/// Takes the programs from a link. What is gone is gone.
///
/// # Errors
/// If a pin cannot be removed.
pub fn detach(pins: &Pins, ifindex: u32) -> Result<(), Error> {
    for hook in Hook::ALL {
        remove(&pins.link(ifindex, hook))?;
    }
    Ok(())
}

/// Takes one program from a link. What is gone is gone.
///
/// # Errors
/// If the pin cannot be removed.
pub fn detach_hook(pins: &Pins, ifindex: u32, hook: Hook) -> Result<(), Error> {
    remove(&pins.link(ifindex, hook))
}

/// Indexes of links that have a pin for the hook. Without a folder of pins there are none.
///
/// # Errors
/// If the folder cannot be read.
pub fn links_with(pins: &Pins, hook: Hook) -> Result<Vec<u32>, Error> {
    if !pins.links().exists() {
        return Ok(Vec::new());
    }
    let all = pinned_links(pins)?.into_iter();
    Ok(all.filter(|(_, _, name)| name == hook.program()).map(|(_, ifindex, _)| ifindex).collect())
}

/// Removes pins of links for which `is_wanted` says no. Indexes of links are those of the pins' names.
///
/// # Errors
/// If the folder cannot be read or a pin not removed.
pub fn sweep(pins: &Pins, is_wanted: impl Fn(u32) -> bool) -> Result<(), Error> {
    for (path, ifindex, _) in pinned_links(pins)? {
        if !is_wanted(ifindex) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Changes every link of the hook over to `program`.
pub(crate) fn upgrade(program: &mut SchedClassifier, hook: Hook, pins: &Pins) -> Result<(), Error> {
    let name = hook.program();
    if !pins.has_tcx() {
        return filters::upgrade(program, hook);
    }
    for (path, _, on) in pinned_links(pins)? {
        if on != name {
            continue;
        }
        change_over(program, hook, &path)?;
    }
    Ok(())
}

fn pinned_links(pins: &Pins) -> Result<Vec<(std::path::PathBuf, u32, String)>, Error> {
    let folder = pins.links();
    let failed = |source| Error::File { what: "list", path: folder.clone(), source };
    let mut links = Vec::new();
    for entry in fs::read_dir(&folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some((ifindex, hook)) = name.split_once('-')
            && let Ok(ifindex) = ifindex.parse()
        {
            links.push((path.clone(), ifindex, hook.to_owned()));
        }
    }
    Ok(links)
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::File { what: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
