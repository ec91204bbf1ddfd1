//! What the plugin made, one file for each attachment: DEL works without the veth, and an agent that starts finds its
//! endpoints.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Announcement, Error};

/// The files of one network.
#[derive(Debug, Clone)]
pub struct Kept {
    folder: PathBuf,
}

impl Kept {
    /// The files of a network below the plugins' state folder.
    #[must_use]
    pub fn of(state_dir: &Path, network: &str) -> Self {
        Self { folder: state_dir.join(network) }
    }

    /// Neither of the two names can have a colon (CNI specification §2, names of interfaces).
    fn path(&self, container: &str, ifname: &str) -> PathBuf {
        self.folder.join(format!("{container}:{ifname}"))
    }

    /// What is kept; `None` if nothing is, or nothing that can be read.
    #[must_use]
    pub fn read(&self, container: &str, ifname: &str) -> Option<Announcement> {
        read(&self.path(container, ifname))
    }

    /// Keeps it, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, container: &str, ifname: &str, what: &Announcement) -> Result<(), Error> {
        let path = self.path(container, ifname);
        let draft = self.folder.join(format!(".{}", std::process::id()));
        let failed = |source| Error::File { what: "write", path: path.clone(), source };
        let text = serde_json::to_vec(what).map_err(|error| failed(error.into()))?;
        fs::create_dir_all(&self.folder)
            .and_then(|()| fs::write(&draft, text))
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(failed)
    }

    /// Forgets it; one that is not there is forgotten.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(&self, container: &str, ifname: &str) -> Result<(), Error> {
        remove(&self.path(container, ifname))
    }

    /// Containers and interfaces of all that is kept.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn all(&self) -> Result<Vec<(String, String)>, Error> {
        Ok(entries(&self.folder)?
            .iter()
            .filter_map(|path| {
                let (container, ifname) = path.file_name()?.to_str()?.split_once(':')?;
                Some((container.to_owned(), ifname.to_owned()))
            })
            .collect())
    }

    /// Everything that is kept of all networks, with its file.
    ///
    /// # Errors
    /// If a folder cannot be read.
    pub fn everything(state_dir: &Path) -> Result<Vec<(PathBuf, Announcement)>, Error> {
        let mut all = Vec::new();
        for folder in entries(state_dir)?.iter().filter(|path| path.is_dir()) {
            let files = entries(folder)?;
            all.extend(files.into_iter().filter_map(|path| {
                let whole = path.file_name()?.to_str()?.contains(':');
                let kept = whole.then(|| read(&path)).flatten()?;
                Some((path, kept))
            }));
        }
        Ok(all)
    }

    /// Removes a file of [`Kept::everything`].
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn forget(file: &Path) -> Result<(), Error> {
        remove(file)
    }
}

fn read(path: &Path) -> Option<Announcement> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::File { what: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// What is in a folder; a missing one is empty.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::File { what: "list", path: folder.to_owned(), source };
    match fs::read_dir(folder) {
        Ok(entries) => {
            entries.map(|entry| entry.map(|entry| entry.path()).map_err(failed)).collect()
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn what_is_written_is_found_until_it_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let kept = Kept::of(folder.path(), "orch");
        assert!(kept.all().expect("an absent folder is empty").is_empty());
        let made =
            Announcement { ifindex: 7, uid: 9, addr: Ipv4Addr::LOCALHOST, addr6: None, pod: None };
        kept.write("c1", "eth0", &made).expect("written");
        assert_eq!(kept.read("c1", "eth0"), Some(made.clone()));
        assert_eq!(kept.all().expect("listed"), [("c1".to_owned(), "eth0".to_owned())]);
        let all = Kept::everything(folder.path()).expect("listed");
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].1, made);
        Kept::forget(&all[0].0).expect("removed");
        kept.remove("c1", "eth0").expect("it is gone already");
        assert_eq!(kept.read("c1", "eth0"), None);
    }
}
