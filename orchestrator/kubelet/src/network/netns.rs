//! Holding a network namespace open: a bind mount outlives the process, so that DEL works after the sandbox died.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};

/// Binds the namespace of a process to a file, replacing what was bound there.
///
/// # Errors
/// The process is gone, or the mount is refused.
pub(crate) fn pin(pid: i32, target: &Path) -> io::Result<()> {
    unpin(target)?;
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(target, b"")?;
    let source = PathBuf::from(format!("/proc/{pid}/ns/net"));
    nix::mount::mount(Some(&source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(
        |error| {
            let _ = fs::remove_file(target);
            io::Error::from(error)
        },
    )
}

/// Lets it go; one that is not bound, or is gone, is fine.
///
/// # Errors
/// The file stays.
pub(crate) fn unpin(target: &Path) -> io::Result<()> {
    // Every bind on it: a pin that was repeated after a crash lies on top.
    while nix::mount::umount2(target, MntFlags::MNT_DETACH).is_ok() {}
    match fs::remove_file(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
