//! What an interface had before: one file an attachment, with the name and the keys of the reference's.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use cni_netlink::{mac_text, parse_mac};
use cni_spec::{AttachmentId, Error, NetworkName, code};
use serde_json::{Map, Value, json};

use crate::link::Attributes;

const SUFFIX: &str = ".json";
/// Begins the name of a file that is not whole yet.
const UNFINISHED: char = '.';

/// The file of an attachment.
#[derive(Debug)]
pub(crate) struct Backup {
    path: PathBuf,
}

/// Names of containers and interfaces have no slash.
pub(crate) fn file_name(id: &AttachmentId) -> String {
    format!("{}_{}{SUFFIX}", id.container_id, id.ifname)
}

fn failed(verb: &str, path: &Path, error: &io::Error) -> Error {
    Error::from_chain(code::IO, error).context(format!("{verb} {}", path.display()))
}

/// `None` if it is not there; an error of the disk otherwise.
fn read_text(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match cni_skel::read_small(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path, &error)),
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove", path, &error))
        }
        _ => Ok(()),
    }
}

impl Backup {
    pub(crate) fn new(folder: &Path, id: &AttachmentId) -> Self {
        Self { path: folder.join(file_name(id)) }
    }

    /// Writes what the interface has now; what an ADD of this attachment wrote that was killed is older, and counts.
    pub(crate) fn keep(
        &self,
        network: &NetworkName,
        now: &Attributes,
    ) -> Result<Attributes, Error> {
        let before = self.read()?.unwrap_or_default().or(now);
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|error| failed("make", folder, &error))?;
        let unfinished = self.unfinished();
        let written = (|| {
            let mut options = OpenOptions::new();
            let mut file =
                options.write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
            file.write_all(encode(network, &before).to_string().as_bytes())?;
            fs::rename(&unfinished, &self.path)
        })();
        written.map_err(|error| failed("write", &unfinished, &error))?;
        Ok(before)
    }

    /// `None` if there is no file; one that nobody can read has nothing in it.
    pub(crate) fn read(&self) -> Result<Option<Attributes>, Error> {
        Ok(read_text(&self.path)?.map(|text| decode(&text)))
    }

    /// Removes the file, and a half of it that an ADD has left.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        remove(&self.path).and(remove(&self.unfinished()))
    }

    fn unfinished(&self) -> PathBuf {
        let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        self.path.with_file_name(format!("{UNFINISHED}{name}"))
    }
}

/// Removes the network's files that are of no valid attachment.
pub(crate) fn remove_stale(
    folder: &Path,
    network: &NetworkName,
    valid: &BTreeSet<String>,
) -> Result<(), Error> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|error| failed("list", folder, &error))?,
    };
    let mut failures = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| failed("list", folder, &error))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if name.ends_with(SUFFIX) && !valid.contains(name.trim_start_matches(UNFINISHED)) {
            match read_text(&path) {
                // What is torn is nobody's: no ADD is at it while GC is.
                Ok(Some(text)) if is_of(&text, network) || name.starts_with(UNFINISHED) => {
                    failures.extend(remove(&path).err());
                }
                Ok(_) => {}
                Err(error) => failures.push(error),
            }
        }
    }
    Error::join(failures).map_or(Ok(()), Err)
}

/// Whether the file says that it is the network's; the reference's say nothing.
fn is_of(text: &[u8], network: &NetworkName) -> bool {
    object(text).get("network").and_then(Value::as_str) == Some(network.as_str())
}

fn object(text: &[u8]) -> Map<String, Value> {
    serde_json::from_slice(text).unwrap_or_default()
}

fn encode(network: &NetworkName, before: &Attributes) -> Value {
    let mut object = json!({ "network": network.as_str() });
    let values = [
        ("mac", before.mac.map(|mac| json!(mac_text(mac)))),
        ("mtu", before.mtu.map(Value::from)),
        ("promisc", before.promiscuous.map(Value::from)),
        ("allmulti", before.all_multicast.map(Value::from)),
        ("txQLen", before.queue_length.map(Value::from)),
    ];
    for (key, value) in values {
        if let Some(value) = value {
            object[key] = value;
        }
    }
    object
}

fn decode(text: &[u8]) -> Attributes {
    let object = object(text);
    let number =
        |key| object.get(key).and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
    let switch = |key| object.get(key).and_then(Value::as_bool);
    Attributes {
        mac: object.get("mac").and_then(Value::as_str).and_then(parse_mac),
        mtu: number("mtu").filter(|mtu| *mtu != 0),
        promiscuous: switch("promisc"),
        all_multicast: switch("allmulti"),
        queue_length: number("txQLen"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(container: &str) -> AttachmentId {
        AttachmentId {
            container_id: container.parse().expect("good"),
            ifname: "eth0".parse().expect("good"),
        }
    }

    #[test]
    fn the_oldest_values_count_and_the_file_goes() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let backup = Backup::new(&folder.path().join("a/b"), &id("c1"));
        let network = "net".parse().expect("good");
        assert_eq!(backup.read().expect("read"), None);
        let first =
            Attributes { mtu: Some(1500), promiscuous: Some(false), ..Attributes::default() };
        assert_eq!(backup.keep(&network, &first).expect("written"), first);
        let mac = Some([2, 0, 0, 0, 0, 1]);
        let later =
            Attributes { mtu: Some(1400), mac, queue_length: Some(0), ..Attributes::default() };
        let both = Attributes { mac, queue_length: Some(0), ..first };
        assert_eq!(backup.keep(&network, &later).expect("written"), both);
        assert_eq!(backup.read().expect("read"), Some(both));
        backup.remove().expect("removed");
        backup.remove().expect("removed already");
        assert_eq!(backup.read().expect("read"), None);
    }

    #[test]
    fn the_references_file_is_read_and_gc_leaves_it() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let theirs = Backup::new(folder.path(), &id("theirs"));
        let text = "{\n \"mac\": \"c2:11:22:33:44:55\",\n \"promisc\": false,\n \"mtu\": 1454\n}";
        fs::write(&theirs.path, text).expect("written");
        let read = theirs.read().expect("read").expect("there");
        assert_eq!((read.mtu, read.promiscuous), (Some(1454), Some(false)));
        assert_eq!(read.mac, parse_mac("c2:11:22:33:44:55"));

        let (net, other) = ("net".parse().expect("good"), "other".parse().expect("good"));
        let some = Attributes { mtu: Some(1500), ..Attributes::default() };
        for (network, container) in [(&net, "gone"), (&net, "lives"), (&other, "foreign")] {
            Backup::new(folder.path(), &id(container)).keep(network, &some).expect("written");
        }
        fs::write(folder.path().join("torn_eth0.json"), "{\"mac").expect("written");
        let valid = BTreeSet::from([file_name(&id("lives"))]);
        for _ in 0..2 {
            remove_stale(folder.path(), &net, &valid).expect("removed");
            let left = ["gone", "lives", "foreign", "theirs"]
                .map(|container| Backup::new(folder.path(), &id(container)).path.exists());
            assert_eq!(left, [false, true, true, true]);
        }
        remove_stale(&folder.path().join("missing"), &net, &valid).expect("nothing to remove");
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fuzz_a_backup_of_any_text_is_read(text in prop::collection::vec(any::<u8>(), 0..100)) {
            let read = decode(&text);
            let network = "net".parse().expect("good");
            let again = encode(&network, &read).to_string();
            prop_assert_eq!(decode(again.as_bytes()), read);
            prop_assert!(is_of(again.as_bytes(), &network));
        }
    }
}
