//! What all handlers share.

use std::collections::BTreeMap;
use std::sync::Arc;

use orch_store::Store;
use orch_store::cache::{Cache, CacheConfig, Feed, Index, Meta};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::auth::Authenticator;
use crate::authz;
use crate::proxy::AgentClient;
use crate::resources::{RBAC, RESOURCES, Resource};
use crate::server::Options;

/// One resource with its cache.
pub(crate) struct Stored {
    pub(crate) resource: &'static Resource,
    pub(crate) cache: Arc<Cache>,
    pub(crate) index: Index,
}

/// The server's state.
pub(crate) struct Shared {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) feed: Arc<Feed>,
    pub(crate) stored: BTreeMap<(&'static str, &'static str), Stored>,
    pub(crate) authenticator: Authenticator,
    pub(crate) roles: authz::Live,
    /// Whether the roles that every cluster has are there.
    pub(crate) has_default_roles: watch::Sender<bool>,
    pub(crate) agents: AgentClient,
    pub(crate) options: Options,
    /// ClusterIPs and node ports are looked for under this lock.
    pub(crate) allocation: tokio::sync::Mutex<()>,
    pub(crate) stop: CancellationToken,
}

impl Shared {
    /// A resource by group and plural.
    pub(crate) fn stored(&self, group: &str, plural: &str) -> Option<&Stored> {
        self.stored
            .iter()
            .find(|((known_group, known), _)| *known_group == group && *known == plural)
            .map(|(_, stored)| stored)
    }
}

/// Starts the caches of all resources.
pub(crate) fn start_caches(feed: &Arc<Feed>) -> BTreeMap<(&'static str, &'static str), Stored> {
    RESOURCES
        .iter()
        .map(|resource| {
            let index: Index = Arc::new(move |bytes: &[u8]| index(resource, bytes));
            let cache = Cache::start(feed, CacheConfig::new(resource.prefix(), index.clone()));
            ((resource.group, resource.plural), Stored { resource, cache, index })
        })
        .collect()
}

/// The roles as these caches have them.
///
/// # Panics
/// Never: the table has the four kinds.
pub(crate) fn roles(stored: &BTreeMap<(&'static str, &'static str), Stored>) -> authz::Live {
    let cache = |plural: &'static str| match stored.get(&(RBAC, plural)) {
        Some(stored) => &stored.cache,
        None => unreachable!("{plural} are in the type table"),
    };
    authz::Live::new(
        cache("roles"),
        cache("clusterroles"),
        cache("rolebindings"),
        cache("clusterrolebindings"),
    )
}

#[derive(Deserialize)]
struct Head {
    metadata: HeadMeta,
}

#[derive(Deserialize)]
struct HeadMeta {
    name: String,
    #[serde(default)]
    namespace: Option<String>,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
}

fn index(resource: &Resource, bytes: &[u8]) -> Result<Meta, String> {
    let head: Head = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    // Most resources have no selectable fields; those are not parsed a second time.
    let fields = if resource.fields.is_empty() {
        Vec::new()
    } else {
        let object: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        resource.field_values(&object)
    };
    Ok(Meta {
        namespace: head.metadata.namespace.unwrap_or_default(),
        name: head.metadata.name,
        labels: head.metadata.labels.unwrap_or_default(),
        fields,
    })
}
