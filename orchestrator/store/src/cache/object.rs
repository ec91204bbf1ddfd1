//! One object in the cache.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::resource_version::splice_resource_version;
use crate::store::Revision;

/// Reads what selectors look at from the stored bytes of an object.
pub type Index = Arc<dyn Fn(&[u8]) -> Result<Meta, String> + Send + Sync>;

/// What the cache knows of an object without parsing it again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Empty for cluster-scoped objects.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What label selectors look at.
    pub labels: BTreeMap<String, String>,
    /// What field selectors look at, `("spec.nodeName", "node-a")`.
    pub fields: Vec<(&'static str, String)>,
}

impl Meta {
    /// The value of a selectable field.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| *field == name).map(|(_, value)| value.as_str())
    }
}

/// One object at one revision.
#[derive(Debug)]
pub struct Object {
    /// The store's key.
    pub key: Arc<str>,
    /// Its resource version.
    pub revision: Revision,
    /// The JSON, with the resource version in it.
    pub bytes: Bytes,
    /// What selectors look at.
    pub meta: Arc<Meta>,
}

impl Object {
    pub(super) fn new(
        key: &str,
        value: &[u8],
        revision: Revision,
        index: &Index,
    ) -> Result<Self, String> {
        let meta = Arc::new(index(value)?);
        Ok(Self {
            key: key.into(),
            revision,
            bytes: splice_resource_version(value, revision),
            meta,
        })
    }

    /// The same object with another resource version: the last state of a deleted one carries the revision of the
    /// deletion.
    pub(super) fn at(&self, revision: Revision) -> Self {
        Self {
            key: self.key.clone(),
            revision,
            bytes: splice_resource_version(&self.bytes, revision),
            meta: self.meta.clone(),
        }
    }
}
