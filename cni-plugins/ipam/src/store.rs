//! Leases as files, in the reference's form: a file per address, named after it, that holds container ID, CR LF
//! and interface name; `last_reserved_ip.N` for range set N; `lock`, held by `flock` during every operation.
//!
//! What that form lacks is a way from an attachment to its addresses other than reading every file. Beside it,
//! in the folder [`INDEX`], this plugin keeps one file per attachment that lists them. The reference neither
//! reads nor writes the index, so it is only trusted if nobody else has touched the leases since: making and
//! removing a file sets the time of its folder, and after each operation `.stamp` in the index records that
//! time. If the two differ (the reference was here, or we were killed half-way), the index is made anew.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use cni_skel::{read_small, read_small_file};
use cni_spec::AttachmentId;

/// File of the index that says which leases it is about.
const STAMP: &str = ".stamp";
/// Folder of the index. The reference walks into it and finds nothing that concerns it.
const INDEX: &str = ".by-attachment";
/// Bytes of a lease file that are read: container ID and interface have less.
const LEASE_MAX: u64 = 4096;

/// Why leases could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{verb} {}", path.display())]
pub struct StoreError {
    /// What was being done.
    pub verb: &'static str,
    /// To which file or folder.
    pub path: PathBuf,
    /// The system's reason.
    pub source: io::Error,
}

/// Turns an error of the system into one that names its file.
fn at<'a>(verb: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + use<'a> {
    move |source| StoreError { verb, path: path.to_owned(), source }
}

/// Whom a lease belongs to, as its file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A container's interface.
    Attachment(String, String),
    /// A container, in files of old versions of the reference.
    Container(String),
    /// The file is empty: the reference was killed between making and writing it.
    Nobody,
}

impl Owner {
    fn parse(text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text);
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        match (lines.next(), lines.next()) {
            (Some(container), Some(ifname)) => Self::Attachment(container.into(), ifname.into()),
            (Some(container), None) => Self::Container(container.into()),
            _ => Self::Nobody,
        }
    }

    /// Whether the lease is one of this attachment.
    #[must_use]
    pub fn is(&self, id: &AttachmentId) -> bool {
        match self {
            Self::Attachment(container, ifname) => {
                container == id.container_id.as_str() && ifname == id.ifname.as_str()
            }
            Self::Container(container) => container == id.container_id.as_str(),
            Self::Nobody => false,
        }
    }

    /// Whether the lease belongs to one of these attachments.
    #[must_use]
    pub fn is_among(&self, valid: &[AttachmentId]) -> bool {
        valid.iter().any(|id| self.is(id))
    }

    /// Name of the owner's file in the index. `@` cannot be part of a container ID.
    fn index_name(&self) -> Option<String> {
        let plain = |text: &str| !text.contains(['/', '\0']) && !text.starts_with('.');
        match self {
            Self::Attachment(container, ifname) if plain(container) && plain(ifname) => {
                Some(format!("{container}@{ifname}"))
            }
            Self::Container(container) if plain(container) => Some(format!("{container}@")),
            _ => None,
        }
    }
}

fn owner_of(id: &AttachmentId) -> Owner {
    Owner::Attachment(id.container_id.to_string(), id.ifname.to_string())
}

/// A file of a few bytes that is read once and written in place. Writing it anew, as `fs::write` does, makes a file system
/// give back the block and find another one: a quarter of a millisecond on ext4.
#[derive(Debug)]
struct Slot {
    file: File,
    path: PathBuf,
    /// What it has.
    text: Vec<u8>,
}

impl Slot {
    /// Opens the file, making it where needed.
    fn open(path: PathBuf) -> Result<Self, StoreError> {
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.map_err(at("open", &path))?;
        let text = read_small_file(&mut file).map_err(at("read", &path))?;
        Ok(Self { file, path, text })
    }

    /// Killed half-way, it leaves the end of what was longer before. Neither of the files of this kind minds: a stamp
    /// that fits nothing has the index made anew, and a last address only says where the search begins.
    fn put(&mut self, text: &str) -> Result<(), StoreError> {
        let written = self.file.write_all_at(text.as_bytes(), 0).and_then(|()| {
            match text.len() < self.text.len() {
                true => self.file.set_len(text.len() as u64),
                false => Ok(()),
            }
        });
        written.map_err(at("write", &self.path))?;
        self.text = text.into();
        Ok(())
    }
}

/// The leases of one network, locked while this lives.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    index: PathBuf,
    stamp: RefCell<Slot>,
    _lock: File,
}

impl Store {
    /// Locks the folder, making it first where needed.
    ///
    /// # Errors
    /// Names the file or folder.
    pub fn create(dir: &Path) -> Result<Self, StoreError> {
        match Self::locked(dir) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        fs::create_dir_all(dir).map_err(at("make folder", dir))?;
        Self::locked(dir)
    }

    /// Locks the folder if there is one; without it there are no leases.
    ///
    /// # Errors
    /// Names the file or folder.
    pub fn open(dir: &Path) -> Result<Option<Self>, StoreError> {
        match fs::metadata(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at("look at folder", dir)(error)),
            Ok(_) => Self::locked(dir).map(Some),
        }
    }

    fn locked(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("lock");
        let mut options = OpenOptions::new();
        let lock = options.create(true).append(true).mode(0o600).open(&path);
        let lock = lock.map_err(at("open lock", &path))?;
        // Waits without a bound: the kernel frees the lock of a process that ends, however it ends.
        lock.lock().map_err(at("lock", &path))?;
        let index = dir.join(INDEX);
        let path = index.join(STAMP);
        let stamp = match Slot::open(path.clone()) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&index).map_err(at("make folder", &index))?;
                Slot::open(path)?
            }
            other => other?,
        };
        let store = Self { dir: dir.to_owned(), index, stamp: RefCell::new(stamp), _lock: lock };
        // Under the lock nobody is at work on a draft: one that is there is that of an ADD that was killed.
        let draft = store.draft_file();
        remove(&draft).map_err(at("remove", &draft))?;
        if store.folder_time()?.as_bytes() != store.stamp.borrow().text {
            store.reindex()?;
        }
        Ok(store)
    }

    fn draft_file(&self) -> PathBuf {
        self.index.join(".new")
    }

    fn folder_time(&self) -> Result<String, StoreError> {
        let meta = fs::metadata(&self.dir).map_err(at("look at folder", &self.dir))?;
        Ok(format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()))
    }

    /// Declares the index to be that of the leases as they are now.
    fn seal(&self) -> Result<(), StoreError> {
        self.stamp.borrow_mut().put(&self.folder_time()?)
    }

    fn lease_file(&self, ip: IpAddr) -> PathBuf {
        self.dir.join(ip.to_string())
    }

    /// Addresses that have a file.
    pub(crate) fn taken(&self) -> Result<HashSet<IpAddr>, StoreError> {
        let entries = fs::read_dir(&self.dir).map_err(at("list folder", &self.dir))?;
        let mut taken = HashSet::new();
        for entry in entries {
            let name = entry.map_err(at("list folder", &self.dir))?.file_name();
            taken.extend(name.to_str().and_then(|name| name.parse::<IpAddr>().ok()));
        }
        Ok(taken)
    }

    /// Whether an address has a file.
    pub(crate) fn is_taken(&self, ip: IpAddr) -> Result<bool, StoreError> {
        let path = self.lease_file(ip);
        fs::exists(&path).map_err(at("look at lease", &path))
    }

    /// Who has an address; `None` if nobody.
    ///
    /// # Errors
    /// Names the file.
    pub fn owner(&self, ip: IpAddr) -> Result<Option<Owner>, StoreError> {
        let path = self.lease_file(ip);
        match read_limited(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at("read lease", &path)(error)),
            Ok(text) => Ok(Some(Owner::parse(&text))),
        }
    }

    /// Every lease with its owner, by reading every file.
    ///
    /// # Errors
    /// Names the file or folder.
    pub fn all(&self) -> Result<Vec<(IpAddr, Owner)>, StoreError> {
        let mut ips: Vec<IpAddr> = self.taken()?.into_iter().collect();
        ips.sort();
        let mut all = Vec::with_capacity(ips.len());
        for ip in ips {
            all.extend(self.owner(ip)?.map(|owner| (ip, owner)));
        }
        Ok(all)
    }

    /// Addresses leased to an attachment.
    ///
    /// # Errors
    /// Names the file.
    pub fn leases_of(&self, id: &AttachmentId) -> Result<Vec<IpAddr>, StoreError> {
        let listed = self.indexed(&owner_of(id))?;
        if !listed.is_empty() {
            return Ok(listed);
        }
        self.indexed(&Owner::Container(id.container_id.to_string()))
    }

    fn indexed(&self, owner: &Owner) -> Result<Vec<IpAddr>, StoreError> {
        let Some(name) = owner.index_name() else { return Ok(Vec::new()) };
        let path = self.index.join(name);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(at("read index", &path))?,
        };
        let mut ips = Vec::new();
        for ip in text.lines().filter_map(|line| line.parse().ok()) {
            // The lease file has the last word.
            if self.owner(ip)?.as_ref() == Some(owner) {
                ips.push(ip);
            }
        }
        Ok(ips)
    }

    /// A lease for this attachment, ready to be put under an address.
    pub(crate) fn draft(&self, id: &AttachmentId) -> Result<Draft<'_>, StoreError> {
        let path = self.draft_file();
        let text = format!("{}\r\n{}", id.container_id, id.ifname);
        let mut options = OpenOptions::new();
        let written = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(at("write", &path))?;
        Ok(Draft { store: self, path, owner: owner_of(id) })
    }

    /// Frees an address; a free one stays free.
    ///
    /// # Errors
    /// Names the file.
    pub fn release(&self, ip: IpAddr) -> Result<(), StoreError> {
        let owner = self.owner(ip)?;
        let path = self.lease_file(ip);
        remove(&path).map_err(at("remove lease", &path))?;
        if let Some(name) = owner.as_ref().and_then(Owner::index_name) {
            let path = self.index.join(name);
            let rest: String = fs::read_to_string(&path)
                .unwrap_or_default()
                .lines()
                .filter(|line| line.parse() != Ok(ip))
                .map(|line| format!("{line}\n"))
                .collect();
            let left = if rest.is_empty() { remove(&path) } else { fs::write(&path, rest) };
            left.map_err(at("write index", &path))?;
        }
        self.seal()
    }

    /// Frees every address of an attachment; safe to repeat.
    ///
    /// # Errors
    /// Names the file.
    pub fn release_of(&self, id: &AttachmentId) -> Result<(), StoreError> {
        let mut ips = self.leases_of(id)?;
        if ips.is_empty() {
            // Called again, or the index missed something that the reference did within one tick of the folder's
            // clock. The second must not leak, so the first pays for a look at every file.
            let all = self.all()?;
            let exact = |owner: &Owner| *owner == owner_of(id);
            ips.extend(all.iter().filter(|(_, owner)| exact(owner)).map(|(ip, _)| *ip));
            if ips.is_empty() {
                ips.extend(all.iter().filter(|(_, owner)| owner.is(id)).map(|(ip, _)| *ip));
            }
        }
        ips.into_iter().try_for_each(|ip| self.release(ip))
    }

    /// Frees addresses whose file is empty. Under the lock nobody is about to fill one.
    pub(crate) fn release_nobodys(&self) -> Result<usize, StoreError> {
        let all = self.all()?;
        let nobodys = all.into_iter().filter(|(_, owner)| *owner == Owner::Nobody);
        let mut freed = 0;
        for (ip, _) in nobodys {
            self.release(ip)?;
            freed += 1;
        }
        Ok(freed)
    }

    fn last_file(&self, set: usize) -> PathBuf {
        self.dir.join(format!("last_reserved_ip.{set}"))
    }

    /// The address that was given last from a range set. What cannot be read is not known: it only decides where
    /// the search begins.
    #[must_use]
    pub fn last_reserved(&self, set: usize) -> Option<IpAddr> {
        std::str::from_utf8(&read_small(&self.last_file(set)).ok()?).ok()?.trim().parse().ok()
    }

    fn set_last_reserved(&self, set: usize, ip: IpAddr) -> Result<(), StoreError> {
        Slot::open(self.last_file(set))?.put(&ip.to_string())
    }

    /// Makes the index from the leases.
    fn reindex(&self) -> Result<(), StoreError> {
        let mut files: BTreeMap<String, String> = BTreeMap::new();
        for (ip, owner) in self.all()? {
            if let Some(name) = owner.index_name() {
                files.entry(name).or_default().push_str(&format!("{ip}\n"));
            }
        }
        let entries = fs::read_dir(&self.index).map_err(at("list folder", &self.index))?;
        for entry in entries {
            let entry = entry.map_err(at("list folder", &self.index))?;
            let known = |name: &str| name == STAMP || files.contains_key(name);
            if !entry.file_name().to_str().is_some_and(known) {
                remove(&entry.path()).map_err(at("remove", &entry.path()))?;
            }
        }
        for (name, text) in files {
            let path = self.index.join(name);
            // Names longer than a file name may be come from foreign lease files; such owners have no index, and
            // their release looks at every file.
            match fs::write(&path, text) {
                Err(error) if error.kind() == io::ErrorKind::InvalidFilename => {}
                other => other.map_err(at("write index", &path))?,
            }
        }
        self.seal()
    }
}

/// A whole lease file without an address yet. Linking it under the address's name makes the lease in one step
/// that fails if there is one: no instant exists in which the file is there and empty.
pub(crate) struct Draft<'a> {
    store: &'a Store,
    path: PathBuf,
    owner: Owner,
}

impl Draft<'_> {
    /// Leases an address of a range set; `false` if somebody has it.
    pub(crate) fn claim(&self, set: usize, ip: IpAddr) -> Result<bool, StoreError> {
        let path = self.store.lease_file(ip);
        match fs::hard_link(&self.path, &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
            other => other.map_err(at("make lease", &path))?,
        }
        let kept = self.index(ip).and_then(|()| self.store.set_last_reserved(set, ip));
        if let Err(error) = kept.and_then(|()| self.store.seal()) {
            // A full disk, most likely: nothing is left of the lease. The index notices by the folder's time.
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(true)
    }

    fn index(&self, ip: IpAddr) -> Result<(), StoreError> {
        let Some(name) = self.owner.index_name() else { return Ok(()) };
        let path = self.store.index.join(name);
        let mut options = OpenOptions::new();
        let written = options
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{ip}\n").as_bytes()));
        written.map_err(at("write index", &path))
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        // One that stays is removed by whoever has the lock next.
        let _ = fs::remove_file(&self.path);
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn read_limited(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut text = Vec::new();
    File::open(path)?.take(LEASE_MAX).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests;
