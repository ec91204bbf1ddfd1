//! Network namespaces.
//!
//! A namespace belongs to a thread, so work inside one gets a thread that ends with it: a shared worker that forgets
//! to go back would do its next task in the wrong place.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread::{self, Scope, ScopedJoinHandle};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, fstatfs, statfs};

use crate::NetlinkError;

/// Magic number of the file system that namespaces are files of (`linux/magic.h`).
const NSFS_MAGIC: libc::c_long = 0x6e73_6673;

/// A network namespace, held open: it stays alive as long as this does.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    path: PathBuf,
}

impl NetNs {
    /// Opens the namespace bound at `path`.
    ///
    /// # Errors
    /// [`NetlinkError::NotANetNs`] for any other file; both that and a missing file are
    /// [`is_not_found`](NetlinkError::is_not_found).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetlinkError> {
        let path = path.as_ref().to_owned();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(source) => return Err(NetlinkError::OpenNetNs { path, source }),
        };
        match fstatfs(&file) {
            Ok(stat) if stat.filesystem_type() == FsType(NSFS_MAGIC) => Ok(Self { file, path }),
            Ok(_) => Err(NetlinkError::NotANetNs { path }),
            Err(errno) => Err(NetlinkError::OpenNetNs { path, source: errno.into() }),
        }
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// If `/proc` is not there.
    pub fn current() -> Result<Self, NetlinkError> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// Whether a namespace (of any kind) is bound at `path`. That the file exists proves nothing: an empty one
    /// stays when a bind mount goes.
    #[must_use]
    pub fn is_nsfs(path: impl AsRef<Path>) -> bool {
        statfs(path.as_ref()).is_ok_and(|stat| stat.filesystem_type() == FsType(NSFS_MAGIC))
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether both are one and the same namespace.
    ///
    /// # Errors
    /// If one of them cannot be looked at.
    pub fn is_same(&self, other: &Self) -> io::Result<bool> {
        let (a, b) = (self.file.metadata()?, other.file.metadata()?);
        Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
    }

    /// Does `work` inside the namespace, on a thread of its own, and waits for it. Only the network is that of
    /// the namespace: mounts (so `/sys/class/net`) stay the caller's, `/proc/sys/net` and
    /// `/proc/thread-self/net` follow the thread.
    ///
    /// # Errors
    /// What `work` returns, or that the namespace cannot be entered.
    pub fn run<T, E>(&self, work: impl FnOnce() -> Result<T, E> + Send) -> Result<T, E>
    where
        T: Send,
        E: From<NetlinkError> + Send,
    {
        thread::scope(|scope| self.start(scope, work).finish())
    }

    /// As [`run`](Self::run), while the caller goes on with something else.
    pub fn start<'scope, 'env, T, E>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        work: impl FnOnce() -> Result<T, E> + Send + 'scope,
    ) -> Started<'scope, T, E>
    where
        T: Send + 'scope,
        E: From<NetlinkError> + Send + 'scope,
    {
        Started(scope.spawn(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| {
                E::from(NetlinkError::EnterNetNs { path: self.path.clone(), source: errno.into() })
            })?;
            work()
        }))
    }
}

/// Work that was begun inside a namespace. Its scope waits for it in any case.
#[derive(Debug)]
pub struct Started<'scope, T, E>(ScopedJoinHandle<'scope, Result<T, E>>);

impl<T, E> Started<'_, T, E> {
    /// Waits for it.
    ///
    /// # Errors
    /// What the work returns, or that the namespace cannot be entered.
    pub fn finish(self) -> Result<T, E> {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_file_and_a_missing_one_are_no_namespace() {
        assert!(!NetNs::is_nsfs("/proc/version"));
        assert!(!NetNs::is_nsfs("/nowhere"));
        assert!(NetNs::is_nsfs("/proc/self/ns/net"));
        assert!(NetNs::open("/proc/version").expect_err("no namespace").is_not_found());
        assert!(NetNs::open("/nowhere").expect_err("no file").is_not_found());
        let (a, b) = (NetNs::current().expect("ours"), NetNs::current().expect("ours"));
        assert!(a.is_same(&b).expect("metadata"));
    }
}
