//! What was delegated, one file per attachment: `<dataDir>/.vxlan/<network>/<containerID>@<ifname>`. Networks
//! have their folders of leases beside `.vxlan`; none can be called so, since names begin with a letter or digit.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use cni_spec::{AttachmentId, Error, NetworkName, code};
use serde_json::Value;

use crate::delegate::Delegation;

/// The files of one network.
pub(crate) struct Kept {
    dir: PathBuf,
}

fn failed(verb: &str, path: &Path, error: &io::Error) -> Error {
    Error::from_chain(code::IO, error).context(format!("{verb} {}", path.display()))
}

impl Kept {
    pub(crate) fn new(data_dir: &Path, network: &NetworkName) -> Self {
        Self { dir: data_dir.join(".vxlan").join(network.as_str()) }
    }

    fn file(&self, id: &AttachmentId) -> PathBuf {
        self.dir.join(format!("{}@{}", id.container_id, id.ifname))
    }

    /// Where it is written first. A runtime makes one call about an attachment at a time, so this name is ours.
    fn aside(&self, id: &AttachmentId) -> PathBuf {
        self.dir.join(format!(".{}@{}", id.container_id, id.ifname))
    }

    /// What is kept of an attachment. A file that is empty or broken (a power loss) counts as none.
    pub(crate) fn read(&self, id: &AttachmentId) -> Option<Delegation> {
        Delegation::from_kept(&fs::read(self.file(id)).ok()?)
    }

    /// Written aside and renamed: a reader finds it whole or not at all. Not synced: after a power loss there is
    /// no pod left, and DEL does without.
    pub(crate) fn write(&self, id: &AttachmentId, to: &Delegation) -> Result<(), Error> {
        fs::create_dir_all(&self.dir).map_err(|error| failed("make folder", &self.dir, &error))?;
        let path = self.file(id);
        let aside = self.aside(id);
        let text = Value::Object(to.conf.clone()).to_string();
        let mut options = OpenOptions::new();
        let written = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&aside)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&aside, &path));
        written.map_err(|error| {
            let _ = fs::remove_file(&aside);
            failed("write", &path, &error)
        })
    }

    /// Safe to repeat.
    pub(crate) fn remove(&self, id: &AttachmentId) -> Result<(), Error> {
        // The one written aside is there if the writer was killed.
        for path in [self.aside(id), self.file(id)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path, &error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Attachments of which something is kept.
    pub(crate) fn all(&self) -> Result<Vec<AttachmentId>, Error> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| failed("list folder", &self.dir, &error))?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let name = entry.map_err(|error| failed("list folder", &self.dir, &error))?.file_name();
            all.extend(name.to_str().and_then(parse_name));
        }
        all.sort();
        all.dedup();
        Ok(all)
    }
}

fn parse_name(name: &str) -> Option<AttachmentId> {
    let (container, ifname) = name.strip_prefix('.').unwrap_or(name).split_once('@')?;
    Some(AttachmentId { container_id: container.parse().ok()?, ifname: ifname.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_killed_writer_left_is_listed_and_goes_with_the_attachment() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let kept = Kept::new(dir.path(), &"net".parse().expect("good"));
        let id = AttachmentId {
            container_id: "c1".parse().expect("good"),
            ifname: "eth0".parse().expect("good"),
        };
        let conf = json!({"type": "bridge"}).as_object().expect("object").clone();
        kept.write(&id, &Delegation { plugin: "bridge".to_owned(), conf }).expect("written");
        fs::rename(kept.file(&id), kept.aside(&id)).expect("as if killed before the rename");
        assert_eq!(kept.read(&id), None);
        assert_eq!(kept.all().expect("listed"), std::slice::from_ref(&id));
        kept.remove(&id).expect("removed");
        assert!(kept.all().expect("listed").is_empty());
    }
}
