//! The result cache: what each ADD answered, for the CHECK and DEL that follow. Format and names are those of
//! the reference's `libcni`, so that either runtime can take over a node from the other.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cni_spec::{AttachmentId, ConfList, NetworkName};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Attachment, InvokeError};

/// `kind` of the files.
const KIND: &str = "cniCacheV1";

/// A file of the cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    kind: String,
    container_id: String,
    /// The configuration list, in base64.
    #[serde(default)]
    config: String,
    if_name: String,
    network_name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    netns: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cni_args: Option<Vec<(String, String)>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    capability_args: Option<Map<String, Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    result: Option<Value>,
}

/// An attachment as the cache remembers it.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedAttachment {
    /// Its network.
    pub network: NetworkName,
    /// Container and interface.
    pub id: AttachmentId,
    /// How ADD was called.
    pub attachment: Attachment,
    /// What ADD answered, as JSON.
    pub result: Option<Value>,
}

/// The folder of one cache.
pub(crate) struct Cache<'a> {
    dir: &'a Path,
}

impl<'a> Cache<'a> {
    pub(crate) fn new(dir: &'a Path) -> Self {
        Self { dir }
    }

    fn results(&self) -> PathBuf {
        self.dir.join("results")
    }

    fn file(&self, network: &NetworkName, id: &AttachmentId) -> PathBuf {
        self.results().join(format!("{network}-{}-{}", id.container_id, id.ifname))
    }

    /// Held shared by calls about one attachment and exclusively by GC, which must not run beside them
    /// (CNI spec 1.1.0 §2, GC).
    pub(crate) fn lock(&self, exclusive: bool) -> Result<File, InvokeError> {
        let path = self.dir.join("runtime.lock");
        let failed = |error| InvokeError::Cache { path: path.clone(), error };
        fs::create_dir_all(self.dir).map_err(failed)?;
        let mut options = OpenOptions::new();
        let file = options.create(true).append(true).mode(0o600).open(&path).map_err(failed)?;
        if exclusive { file.lock() } else { file.lock_shared() }.map_err(failed)?;
        Ok(file)
    }

    /// Keeps a result. After a power loss the file is whole or not there: written aside, synced, renamed, and
    /// the folder synced (the reference writes in place, cni #1055).
    pub(crate) fn store(
        &self,
        list: &ConfList,
        id: &AttachmentId,
        attachment: &Attachment,
        result: Value,
    ) -> Result<(), InvokeError> {
        let entry = Entry {
            kind: KIND.to_owned(),
            container_id: id.container_id.to_string(),
            config: STANDARD.encode(list.to_value().to_string()),
            if_name: id.ifname.to_string(),
            network_name: list.name.to_string(),
            netns: attachment.netns.clone(),
            cni_args: Some(attachment.args.clone()).filter(|args| !args.is_empty()),
            capability_args: Some(attachment.capabilities.clone()).filter(|all| !all.is_empty()),
            result: Some(result),
        };
        let path = self.file(&list.name, id);
        let written = serde_json::to_vec(&entry)
            .map_err(io::Error::from)
            .and_then(|text| write_durable(&path, &text));
        written.map_err(|error| InvokeError::Cache { path, error })
    }

    /// What is remembered of an attachment. A file that cannot be understood counts as none: it must not stand
    /// in the way of DEL.
    pub(crate) fn find(
        &self,
        network: &NetworkName,
        id: &AttachmentId,
    ) -> Result<Option<CachedAttachment>, InvokeError> {
        let path = self.file(network, id);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| InvokeError::Read { path, error })?,
        };
        // The name joins three parts with `-`, which each of them may have too: what is inside decides.
        Ok(decode(&text).filter(|cached| cached.network == *network && cached.id == *id))
    }

    /// Forgets an attachment; one that is not there is forgotten.
    pub(crate) fn remove(
        &self,
        network: &NetworkName,
        id: &AttachmentId,
    ) -> Result<(), InvokeError> {
        let path = self.file(network, id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(InvokeError::Cache { path, error })
            }
            _ => Ok(()),
        }
    }

    /// Everything that is remembered.
    pub(crate) fn all(&self) -> Result<Vec<CachedAttachment>, InvokeError> {
        let dir = self.results();
        let failed = |error| InvokeError::Read { path: dir.clone(), error };
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed)?,
        };
        let mut all = Vec::new();
        for entry in entries {
            // A file may go while we look: then it is not remembered any more.
            let text = entry.map_err(failed).map(|entry| fs::read(entry.path()))?;
            all.extend(text.ok().and_then(|text| decode(&text)));
        }
        all.sort_by(|a, b| (&a.network, &a.id).cmp(&(&b.network, &b.id)));
        Ok(all)
    }
}

fn decode(text: &[u8]) -> Option<CachedAttachment> {
    let entry: Entry =
        serde_json::from_slice(text).ok().filter(|entry: &Entry| entry.kind == KIND)?;
    let id = AttachmentId {
        container_id: entry.container_id.parse().ok()?,
        ifname: entry.if_name.parse().ok()?,
    };
    let attachment = Attachment {
        container_id: entry.container_id,
        netns: entry.netns,
        ifname: entry.if_name,
        args: entry.cni_args.unwrap_or_default(),
        capabilities: entry.capability_args.unwrap_or_default(),
    };
    let network = entry.network_name.parse().ok()?;
    Some(CachedAttachment { network, id, attachment, result: entry.result })
}

fn write_durable(path: &Path, text: &[u8]) -> io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(dir)?;
    // A name of its own for each writer; readers skip it, since it is no entry until it is whole.
    let turn = NEXT.fetch_add(1, Ordering::Relaxed);
    let aside = dir.join(format!(".new-{}-{turn}", std::process::id()));
    let written = (|| {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        File::open(dir)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written
}

#[cfg(test)]
#[path = "../../corpus/mutate.rs"]
mod mutate;
#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use serde_json::json;

    use super::*;

    fn id(container: &str) -> AttachmentId {
        AttachmentId {
            container_id: container.parse().expect("ID"),
            ifname: "eth0".parse().expect("name"),
        }
    }

    fn attachment(container: &str) -> Attachment {
        Attachment {
            container_id: container.to_owned(),
            netns: "/run/netns/x".to_owned(),
            ifname: "eth0".to_owned(),
            args: vec![("A".to_owned(), "b".to_owned())],
            capabilities: Map::new(),
        }
    }

    fn list() -> ConfList {
        ConfList::parse(br#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"x"}]}"#)
            .expect("list")
    }

    #[test]
    fn a_result_is_kept_under_the_references_name_and_form() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::new(dir.path());
        cache.store(&list(), &id("c1"), &attachment("c1"), json!({"ips": []})).expect("stored");
        let path = dir.path().join("results/net-c1-eth0");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let value: Value = serde_json::from_slice(&fs::read(&path).expect("read")).expect("JSON");
        assert_eq!(value["kind"], "cniCacheV1");
        assert_eq!(value["containerId"], "c1");
        assert_eq!(value["cniArgs"], json!([["A", "b"]]));
        assert!(value.get("capabilityArgs").is_none());
        let found = cache.find(&list().name, &id("c1")).expect("read").expect("there");
        assert_eq!(found.attachment, attachment("c1"));
        assert_eq!(cache.all().expect("listed"), [found]);
        assert_eq!(fs::read_dir(dir.path().join("results")).expect("listed").count(), 1);
        cache.remove(&list().name, &id("c1")).expect("removed");
        cache.remove(&list().name, &id("c1")).expect("removed again");
        assert_eq!(cache.find(&list().name, &id("c1")).expect("read"), None);
    }

    #[test]
    fn an_empty_or_foreign_file_counts_as_none() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::new(dir.path());
        assert!(cache.all().expect("no folder yet").is_empty());
        fs::create_dir_all(dir.path().join("results")).expect("folder");
        fs::write(dir.path().join("results/net-c1-eth0"), "").expect("written");
        assert_eq!(cache.find(&list().name, &id("c1")).expect("read"), None);
        // Network `net-a` with container `b` and network `net` with container `a-b` share a file name.
        cache.store(&list(), &id("a-b"), &attachment("a-b"), json!({})).expect("stored");
        let other: NetworkName = "net-a".parse().expect("name");
        assert_eq!(cache.find(&other, &id("b")).expect("read"), None);
        assert_eq!(cache.all().expect("listed").len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn fuzz_a_cache_file_of_any_text_is_read_or_skipped(text in ".{0,200}") {
            let _ = decode(text.as_bytes());
        }

        #[test]
        fn fuzz_the_corpus_of_cache_files_is_read_or_skipped(text in super::mutate::bytes("cache")) {
            let _ = decode(&text);
        }
    }
}
