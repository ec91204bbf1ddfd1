//! Revisions that never go back, although etcd's do when a snapshot is restored.
//!
//! A client remembers resource versions. After a restore etcd counts on from the snapshot, so a version that a client
//! got before it would be taken for a future one: its watch would stand still, and later an update on it could hit another
//! state that happens to have the same number. So each restore begins an *epoch*, a number far above everything that was ever
//! given out, which is added to etcd's revisions. What a client remembers from before lies below it: a watch from there is
//! told that history is gone (410) and lists again, an update is a conflict.
//!
//! etcd 3.6 can do this itself (`etcdutl snapshot restore --bump-revision --mark-compacted`), older ones cannot. The epoch is
//! in etcd, so that all servers have the same. It is made of the time: two restores of one snapshot differ.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::store::{Revision, StoreError};

/// Where etcd holds the epoch. No resource has such a group.
pub(super) const KEY: &str = "/registry/.epoch";
/// File in etcd's data folder that tells the server of a restore.
const FILE: &str = "epoch";
/// Revisions that fit between two restores, for each second. etcd makes far fewer, and the sum stays exact in a `double`
/// (2⁵³), which JSON tools in other languages use, for thousands of years.
const PER_SECOND: u64 = 100_000;

/// What is added to etcd's revisions; 0 as long as nothing was ever restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Epoch(pub(super) Revision);

impl Epoch {
    pub(super) fn parse(value: &[u8]) -> Result<Self, StoreError> {
        let number = std::str::from_utf8(value).ok().and_then(|text| text.trim().parse().ok());
        match number {
            Some(number) if number >= 0 => Ok(Self(number)),
            _ => Err(StoreError::Internal(format!("{KEY} in etcd is no number"))),
        }
    }

    /// Our number of one of etcd's revisions.
    pub(super) fn ours(self, etcds: Revision) -> Revision {
        self.0 + etcds
    }

    /// etcd's number of one of ours.
    pub(super) fn etcds(self, ours: Revision) -> Result<Revision, StoreError> {
        match ours - self.0 {
            revision if revision > 0 || self.0 == 0 => Ok(revision),
            _ => Err(StoreError::Compacted { oldest: self.0 + 1 }),
        }
    }

    /// The same for a compare with a key's last change, where 0 means that there is no such key. One from before the epoch is
    /// equal to nothing.
    pub(super) fn compared(self, ours: Revision) -> Revision {
        const NEVER: Revision = -1;
        if ours == 0 { 0 } else { self.etcds(ours).unwrap_or(NEVER) }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Leaves word in a data folder that was made from a snapshot: an epoch begins.
///
/// # Errors
/// The file cannot be written.
pub fn begin(data_dir: &Path) -> std::io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    fs::write(path(data_dir), (now.as_secs() * PER_SECOND).to_string())
}

/// The epoch that [`begin`] left in a data folder.
///
/// # Errors
/// The file cannot be read or holds something else.
pub fn begun(data_dir: &Path) -> std::io::Result<Option<Revision>> {
    match fs::read_to_string(path(data_dir)) {
        Ok(text) => text.trim().parse().map(Some).map_err(std::io::Error::other),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Takes the word away, once etcd knows.
///
/// # Errors
/// The file cannot be removed.
pub fn entered(data_dir: &Path) -> std::io::Result<()> {
    match fs::remove_file(path(data_dir)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn path(data_dir: &Path) -> PathBuf {
    data_dir.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_before_the_epoch_is_gone_and_equal_to_nothing() {
        let epoch = Epoch(1000);
        assert_eq!(epoch.ours(7), 1007);
        assert_eq!(epoch.etcds(1007).expect("after it"), 7);
        for before in [1, 999, 1000] {
            let error = epoch.etcds(before).expect_err("before it");
            assert!(matches!(error, StoreError::Compacted { oldest: 1001 }), "{error}");
            assert_eq!(epoch.compared(before), -1, "0 would mean an absent key");
        }
        assert_eq!((epoch.compared(0), epoch.compared(1001)), (0, 1));
    }

    #[test]
    fn without_a_restore_revisions_are_etcds() {
        let epoch = Epoch::default();
        assert_eq!((epoch.ours(7), epoch.compared(7)), (7, 7));
        assert_eq!(epoch.etcds(0).expect("as ever"), 0);
        assert!(Epoch::parse(b"-1").is_err() && Epoch::parse(b"x").is_err());
        assert_eq!(Epoch::parse(b"42").expect("a number"), Epoch(42));
    }

    #[test]
    fn word_of_a_restore_is_left_until_etcd_knows() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(begun(folder.path()).expect("read"), None);
        begin(folder.path()).expect("write");
        let first = begun(folder.path()).expect("read").expect("an epoch");
        assert!(first > 1_700_000_000 * 100_000, "{first}");
        entered(folder.path()).expect("remove");
        entered(folder.path()).expect("twice is fine");
        assert_eq!(begun(folder.path()).expect("read"), None);
    }
}
