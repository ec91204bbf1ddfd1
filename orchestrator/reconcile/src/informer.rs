//! Caches: all objects of one kind, kept up to date by one list and watch, however many parts read them.
//!
//! The watch goes on from the last resource version after a broken connection. Only when the server has forgotten it
//! (410) the kind is listed again, and the difference is told, so that deletions that happened meanwhile are seen.

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use orch_api::meta;
use orch_client::{Api, Client, Error, Kind, ListParams, WatchEvent};
use parking_lot::{Mutex, RwLock};
use rand::Rng as _;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::Backoff;

/// How long one watch lasts; a third more is left to chance, so that not all are renewed together.
const WATCH_SECS: u32 = 300;
/// A server that ended neither the watch in time nor the connection is taken for gone.
const WATCH_OVERTIME: Duration = Duration::from_secs(15);
/// A watch that lived shorter than this counts as failed: a server that ends watches at once must not be asked in a
/// tight loop.
const SHORT_WATCH: Duration = Duration::from_secs(1);
const FIRST_DELAY: Duration = Duration::from_millis(50);
/// An API server that comes back is used within this time.
const LONGEST_DELAY: Duration = Duration::from_secs(3);

/// What happened to one object. An object replaced by one of the same name is told as deletion, then addition.
#[derive(Debug)]
pub struct Change<K> {
    pub old: Option<Arc<K>>,
    pub new: Option<Arc<K>>,
}

impl<K> Clone for Change<K> {
    fn clone(&self) -> Self {
        Self { old: self.old.clone(), new: self.new.clone() }
    }
}

impl<K> Change<K> {
    /// The object after the change, or the last state of a deleted one.
    #[must_use]
    pub fn object(&self) -> Option<&Arc<K>> {
        self.new.as_ref().or(self.old.as_ref())
    }
}

/// Told every change in order; false ends it.
type Handler<K> = Box<dyn Fn(&Change<K>) -> bool + Send>;

struct Objects<K> {
    by_key: BTreeMap<String, Arc<K>>,
    /// Keys by the UID of each owner.
    by_owner: HashMap<String, BTreeSet<String>>,
    /// Keys of objects that no controller manages.
    orphans: BTreeSet<String>,
}

impl<K: Kind> Objects<K> {
    fn put(&mut self, key: &str, object: Arc<K>) -> Option<Arc<K>> {
        let old = self.remove(key);
        let meta = object.metadata();
        for owner in meta.owner_references.iter().flatten() {
            self.by_owner.entry(owner.uid.clone()).or_default().insert(key.to_owned());
        }
        if meta::controller_of(meta).is_none() {
            self.orphans.insert(key.to_owned());
        }
        self.by_key.insert(key.to_owned(), object);
        old
    }

    fn remove(&mut self, key: &str) -> Option<Arc<K>> {
        let old = self.by_key.remove(key)?;
        for owner in old.metadata().owner_references.iter().flatten() {
            if let Some(keys) = self.by_owner.get_mut(&owner.uid) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_owner.remove(&owner.uid);
                }
            }
        }
        self.orphans.remove(key);
        Some(old)
    }
}

struct Store<K> {
    objects: RwLock<Objects<K>>,
    /// Held while a change is applied and told, so that a new handler misses none and gets none twice.
    handlers: Mutex<Vec<Handler<K>>>,
    version: watch::Sender<u64>,
    synced: watch::Sender<bool>,
}

impl<K: Kind> Store<K> {
    fn new() -> Self {
        let objects =
            Objects { by_key: BTreeMap::new(), by_owner: HashMap::new(), orphans: BTreeSet::new() };
        Self {
            objects: RwLock::new(objects),
            handlers: Mutex::new(Vec::new()),
            version: watch::channel(0).0,
            synced: watch::channel(false).0,
        }
    }

    /// Makes `change` seen by readers, then by handlers.
    fn apply(&self, key: &str, new: Option<K>) {
        let mut handlers = self.handlers.lock();
        let new = new.map(Arc::new);
        let old = {
            let mut objects = self.objects.write();
            match &new {
                Some(object) => objects.put(key, object.clone()),
                None => objects.remove(key),
            }
        };
        let mut tell = |change: Change<K>| handlers.retain(|handler| handler(&change));
        match (old, new) {
            (None, None) => return,
            (Some(old), Some(new)) if old.metadata().uid != new.metadata().uid => {
                tell(Change { old: Some(old), new: None });
                tell(Change { old: None, new: Some(new) });
            }
            (old, new) => tell(Change { old, new }),
        }
        drop(handlers);
        self.version.send_modify(|version| *version += 1);
    }

    /// Makes the cache equal to a list, by the changes that lead there.
    fn replace(&self, items: Vec<K>) {
        let mut gone: BTreeSet<String> = self.objects.read().by_key.keys().cloned().collect();
        let mut changed = Vec::new();
        for item in items {
            let key = meta::key(item.metadata());
            gone.remove(&key);
            let same = self.objects.read().by_key.get(&key).is_some_and(|old| {
                let (old, new) = (old.metadata(), item.metadata());
                old.resource_version == new.resource_version && old.uid == new.uid
            });
            if !same {
                changed.push((key, item));
            }
        }
        for key in gone {
            self.apply(&key, None);
        }
        for (key, item) in changed {
            self.apply(&key, Some(item));
        }
        if !self.synced.send_replace(true) {
            self.version.send_modify(|version| *version += 1);
        }
    }
}

/// A cache of one kind. Cheap to clone; all clones are the same cache.
pub struct Informer<K> {
    store: Arc<Store<K>>,
}

impl<K> Clone for Informer<K> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone() }
    }
}

impl<K> fmt::Debug for Informer<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Informer")
            .field("objects", &self.store.objects.read().by_key.len())
            .finish()
    }
}

impl<K: Kind> Informer<K> {
    /// The object; the namespace is empty for a kind that has none.
    #[must_use]
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        let objects = self.store.objects.read();
        if namespace.is_empty() {
            return objects.by_key.get(name).cloned();
        }
        objects.by_key.get(&format!("{namespace}/{name}")).cloned()
    }

    /// The object by its [`meta::key`].
    #[must_use]
    pub fn get_key(&self, key: &str) -> Option<Arc<K>> {
        self.store.objects.read().by_key.get(key).cloned()
    }

    /// All objects, ordered by namespace and name.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<K>> {
        self.store.objects.read().by_key.values().cloned().collect()
    }

    /// All objects of a namespace, ordered by name.
    #[must_use]
    pub fn list_in(&self, namespace: &str) -> Vec<Arc<K>> {
        let prefix = format!("{namespace}/");
        let objects = self.store.objects.read();
        let from_there = objects.by_key.range(prefix.clone()..);
        from_there.take_while(|(key, _)| key.starts_with(&prefix)).map(|(_, o)| o.clone()).collect()
    }

    /// All objects that name an owner with this UID.
    #[must_use]
    pub fn owned_by(&self, uid: &str) -> Vec<Arc<K>> {
        let objects = self.store.objects.read();
        let keys = objects.by_owner.get(uid).into_iter().flatten();
        keys.filter_map(|key| objects.by_key.get(key).cloned()).collect()
    }

    /// All objects of a namespace that no controller manages.
    #[must_use]
    pub fn orphans_in(&self, namespace: &str) -> Vec<Arc<K>> {
        let prefix = format!("{namespace}/");
        let objects = self.store.objects.read();
        let keys =
            objects.orphans.range(prefix.clone()..).take_while(|key| key.starts_with(&prefix));
        keys.filter_map(|key| objects.by_key.get(key).cloned()).collect()
    }

    /// Waits until the first list is in the cache. It may never come: select with the token that ends the caller.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn synced(&self) {
        let mut synced = self.store.synced.subscribe();
        // The sender lives as long as the store that we hold.
        let _ = synced.wait_for(|synced| *synced).await;
    }

    #[must_use]
    pub fn is_synced(&self) -> bool {
        *self.store.synced.borrow()
    }

    /// Counts changes, for those who look at the whole cache when anything changed.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.store.version.subscribe()
    }

    /// All changes from now on, after one addition for each object that is there already. Ends with the cache.
    ///
    /// The channel has no bound: a watch that waits for one reader would make all others late, and the reader gets
    /// no more than the server sends.
    #[must_use]
    pub fn subscribe(&self) -> mpsc::UnboundedReceiver<Change<K>> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.add(Box::new(move |change| sender.send(change.clone()).is_ok()));
        receiver
    }

    /// Calls `handler` with every change, after one addition for each object that is there already. It runs within
    /// the cache's task: it only puts keys into a queue, and adds no handler to the same informer.
    pub fn on_change(&self, handler: impl Fn(&Change<K>) + Send + 'static) {
        self.add(Box::new(move |change| {
            handler(change);
            true
        }));
    }

    fn add(&self, handler: Handler<K>) {
        let mut handlers = self.store.handlers.lock();
        let present = self.list();
        if present.into_iter().all(|object| handler(&Change { old: None, new: Some(object) })) {
            handlers.push(handler);
        }
    }
}

#[derive(PartialEq, Eq, Hash)]
struct Which {
    kind: TypeId,
    label_selector: Option<String>,
    field_selector: Option<String>,
}

/// The caches of one process: one per kind and selector, started when first asked for.
#[derive(Clone)]
pub struct Informers {
    client: Client,
    cancel: CancellationToken,
    started: Arc<Mutex<HashMap<Which, Box<dyn Any + Send>>>>,
}

impl Informers {
    /// Caches that live until `cancel`.
    #[must_use]
    pub fn new(client: Client, cancel: CancellationToken) -> Self {
        Self { client, cancel, started: Arc::default() }
    }

    /// The cache of all objects of a kind. Starts it within the current runtime if nobody did before.
    #[must_use]
    pub fn of<K: Kind>(&self) -> Informer<K> {
        self.selected(&ListParams::default())
    }

    /// The cache of the objects that the selectors of `params` choose.
    #[must_use]
    pub fn selected<K: Kind>(&self, params: &ListParams) -> Informer<K> {
        let which = Which {
            kind: TypeId::of::<K>(),
            label_selector: params.label_selector.clone(),
            field_selector: params.field_selector.clone(),
        };
        let mut started = self.started.lock();
        if let Some(informer) =
            started.get(&which).and_then(|any| any.downcast_ref::<Informer<K>>())
        {
            return informer.clone();
        }
        let informer = Informer { store: Arc::new(Store::<K>::new()) };
        started.insert(which, Box::new(informer.clone()));
        let params = ListParams {
            label_selector: params.label_selector.clone(),
            field_selector: params.field_selector.clone(),
            ..ListParams::default()
        };
        let (api, store, cancel) =
            (Api::<K>::all(self.client.clone()), informer.store.clone(), self.cancel.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = follow(&api, &params, &store) => {}
            }
            // Subscribers learn that nothing more comes.
            store.handlers.lock().clear();
        });
        informer
    }
}

/// Lists and watches for ever.
async fn follow<K: Kind>(api: &Api<K>, params: &ListParams, store: &Store<K>) {
    let kind = K::URL_PATH_SEGMENT;
    let mut backoff = Backoff::new(FIRST_DELAY, LONGEST_DELAY);
    let mut complained = false;
    // Empty: the kind has to be listed.
    let mut version = String::new();
    loop {
        let started = Instant::now();
        match step(api, params, store, &mut version).await {
            Ok(()) => {
                if complained {
                    info!(kind, "watching again");
                    complained = false;
                }
                if started.elapsed() >= SHORT_WATCH {
                    backoff.reset();
                    continue;
                }
            }
            Err(error) if error.is_gone() => {
                debug!(kind, "the server has forgotten our version: list again");
                version.clear();
            }
            Err(error) => {
                // Something undecodable would come again and again; a list may skip it.
                if !error.is_transient() {
                    version.clear();
                }
                if started.elapsed() >= SHORT_WATCH {
                    backoff.reset();
                }
                if complained {
                    debug!(kind, error = &error as &dyn std::error::Error, "list and watch");
                } else {
                    warn!(
                        kind,
                        error = &error as &dyn std::error::Error,
                        "list and watch; trying again"
                    );
                    complained = true;
                }
            }
        }
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

/// One list if needed, and one watch until it ends.
async fn step<K: Kind>(
    api: &Api<K>,
    params: &ListParams,
    store: &Store<K>,
    version: &mut String,
) -> Result<(), Error> {
    if version.is_empty() {
        let list = api.list(params).await?;
        store.replace(list.items);
        *version = list.resource_version;
    }
    let seconds = WATCH_SECS + rand::rng().random_range(0..WATCH_SECS / 3);
    let deadline = Instant::now() + Duration::from_secs(seconds.into()) + WATCH_OVERTIME;
    let mut events = std::pin::pin!(api.watch(params, version, seconds).await?);
    loop {
        let Ok(event) = tokio::time::timeout_at(deadline, events.next()).await else {
            return Ok(());
        };
        match event {
            None => return Ok(()),
            Some(Err(error)) => return Err(error),
            Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                remember(version, &object);
                store.apply(&meta::key(object.metadata()), Some(object));
            }
            Some(Ok(WatchEvent::Deleted(object))) => {
                remember(version, &object);
                store.apply(&meta::key(object.metadata()), None);
            }
            Some(Ok(WatchEvent::Bookmark { resource_version, .. })) => *version = resource_version,
        }
    }
}

fn remember<K: Kind>(version: &mut String, object: &K) {
    if let Some(newer) = &object.metadata().resource_version {
        version.clone_from(newer);
    }
}
