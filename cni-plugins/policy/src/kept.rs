//! What ADD made, one file for each attachment: DEL works without the veth, and an agent that starts finds its endpoints.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cni_spec::{AttachmentId, Error, NetworkName, code};
use orch_ebpf_loader::Announcement;

/// The folder of one network.
pub(crate) struct Kept {
    folder: PathBuf,
}

impl Kept {
    pub(crate) fn new(state_dir: &Path, network: &NetworkName) -> Self {
        Self { folder: state_dir.join(network.to_string()) }
    }

    /// Neither of the two names can have a colon (CNI specification §2, names of interfaces).
    fn path(&self, id: &AttachmentId) -> PathBuf {
        self.folder.join(format!("{}:{}", id.container_id, id.ifname))
    }

    /// What is kept; `None` if nothing is, or nothing that can be read.
    pub(crate) fn read(&self, id: &AttachmentId) -> Option<Announcement> {
        serde_json::from_slice(&fs::read(self.path(id)).ok()?).ok()
    }

    pub(crate) fn write(&self, id: &AttachmentId, what: &Announcement) -> Result<(), Error> {
        let path = self.path(id);
        let draft = self.folder.join(format!(".{}", std::process::id()));
        let text = serde_json::to_vec(what).map_err(|error| Error::internal(&error))?;
        fs::create_dir_all(&self.folder)
            .and_then(|()| fs::write(&draft, text))
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(|error| failed("write", &path, &error))
    }

    pub(crate) fn remove(&self, id: &AttachmentId) -> Result<(), Error> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &path, &error))
            }
            _ => Ok(()),
        }
    }

    /// All attachments of the network.
    pub(crate) fn all(&self) -> Result<Vec<AttachmentId>, Error> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("list", &self.folder, &error)),
        };
        Ok(entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                let (container, ifname) = name.to_str()?.split_once(':')?;
                Some(AttachmentId {
                    container_id: container.parse().ok()?,
                    ifname: ifname.parse().ok()?,
                })
            })
            .collect())
    }
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Error {
    Error::from_chain(code::IO, error).context(format!("{what} {}", path.display()))
}
