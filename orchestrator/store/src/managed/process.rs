//! Finding and ending the etcd of a data folder.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Error, PROGRAM};

/// How often we look whether a process that was told to end has done so.
const LOOK: Duration = Duration::from_millis(20);

/// The etcd that runs on a data folder, whoever started it.
pub fn pid(data_dir: &Path) -> Option<u32> {
    let data_dir = absolute(data_dir);
    std::fs::read_dir("/proc")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .find(|pid| is_etcd(*pid, &data_dir))
}

/// Ends the etcd on a data folder: SIGTERM, and SIGKILL after `grace`. Fine if there is none.
///
/// # Errors
/// [`Error::Stop`] when it cannot be signalled.
pub fn stop(data_dir: &Path, grace: Duration) -> Result<(), Error> {
    let data_dir = absolute(data_dir);
    let Some(pid) = pid(&data_dir) else { return Ok(()) };
    for (signal, patience) in [(Signal::SIGTERM, grace), (Signal::SIGKILL, grace)] {
        send(pid, signal)?;
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if !is_etcd(pid, &data_dir) {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
    }
    Err(Error::Stop { pid, source: io::ErrorKind::TimedOut.into() })
}

fn send(pid: u32, signal: Signal) -> Result<(), Error> {
    let raw =
        i32::try_from(pid).map_err(|error| Error::Stop { pid, source: io::Error::other(error) })?;
    match kill(Pid::from_raw(raw), signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(errno) => Err(Error::Stop { pid, source: errno.into() }),
    }
}

/// Whether this process is the etcd on `data_dir` (absolute). A dead one that nobody reaped has no command line.
pub(super) fn is_etcd(pid: u32, data_dir: &Path) -> bool {
    let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let mut arguments = line.split(|byte| *byte == 0);
    let program = arguments.next().unwrap_or_default();
    let ours = data_dir_argument(data_dir);
    Path::new(OsStr::from_bytes(program)).file_name() == Some(OsStr::new(PROGRAM))
        && arguments.any(|argument| argument == ours.as_bytes())
}

pub(super) fn data_dir_argument(data_dir: &Path) -> String {
    format!("--data-dir={}", data_dir.display())
}

/// The path from the root on, links and all: the folder need not exist.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
