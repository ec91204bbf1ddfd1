//! A real etcd for a test.
#![allow(unreachable_pub, reason = "for this test program alone")]

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use orch_store::cache::{Cache, CacheConfig, EventKind, Feed, Index, Meta, WatchItem, Watcher};
use orch_store::managed::{self, Managed, Options};
use orch_store::{
    EtcdConfig, EtcdStore, Guard, KeyValue, Page, Revision, Store, StoreError, WatchBatch,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(20);
const GRACE: Duration = Duration::from_secs(5);

/// A supervised etcd on a folder and a port of its own; gone when dropped.
pub struct Etcd {
    pub options: Options,
    pub cancel: CancellationToken,
    pub supervisor: Option<Managed>,
    /// Goes with it.
    _dir: TempDir,
}

impl Etcd {
    pub async fn start() -> Etcd {
        let dir = tempfile::tempdir().expect("temporary folder");
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|socket| socket.local_addr())
            .expect("free port")
            .port();
        let options = Options {
            data_dir: dir.path().join("data"),
            log_file: dir.path().join("log/etcd.log"),
            client_urls: vec![format!("http://127.0.0.1:{port}")],
            tls: None,
            membership: None,
            keep_running_on_exit: true,
        };
        let cancel = CancellationToken::new();
        let supervisor =
            managed::spawn(options.clone(), cancel.clone()).await.expect("etcd starts");
        let etcd = Etcd { options, cancel, supervisor: Some(supervisor), _dir: dir };
        etcd.store().await.revision().await.expect("etcd answers");
        etcd
    }

    pub async fn store(&self) -> EtcdStore {
        let config =
            EtcdConfig { endpoints: self.options.client_urls.clone(), ..EtcdConfig::default() };
        EtcdStore::connect(config).await.expect("connect")
    }

    pub fn pid(&self) -> Option<u32> {
        managed::pid(&self.options.data_dir)
    }

    /// SIGKILL; the supervisor starts it again.
    pub fn kill(&self) {
        let pid = i32::try_from(self.pid().expect("etcd runs")).expect("PID");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
            .expect("kill etcd");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.cancel.cancel();
        let log = std::fs::read_to_string(&self.options.log_file).unwrap_or_default();
        if std::thread::panicking() {
            eprintln!("etcd's log:\n{log}");
        }
        managed::stop(&self.options.data_dir, GRACE).expect("stop etcd");
    }
}

/// A store whose watches can be cut, as by a broken network between us and etcd.
pub struct Cuttable {
    pub inner: EtcdStore,
    down: AtomicBool,
    current: parking_lot::Mutex<CancellationToken>,
}

impl Cuttable {
    pub fn new(inner: EtcdStore) -> Arc<Self> {
        Arc::new(Self {
            inner,
            down: AtomicBool::new(false),
            current: parking_lot::Mutex::default(),
        })
    }

    pub fn cut(&self) {
        self.down.store(true, Ordering::SeqCst);
        std::mem::take(&mut *self.current.lock()).cancel();
    }

    pub fn mend(&self) {
        self.down.store(false, Ordering::SeqCst);
    }
}

#[async_trait]
impl Store for Cuttable {
    async fn get(&self, key: &str) -> Result<(Option<KeyValue>, Revision), StoreError> {
        self.inner.get(key).await
    }

    async fn list(
        &self,
        prefix: &str,
        start: Option<&str>,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<Page, StoreError> {
        self.inner.list(prefix, start, limit, at).await
    }

    async fn create(
        &self,
        key: &str,
        value: Bytes,
        ttl: Option<Duration>,
    ) -> Result<Revision, StoreError> {
        self.inner.create(key, value, ttl).await
    }

    async fn update(
        &self,
        key: &str,
        value: Bytes,
        expected: Revision,
        ttl: Option<Duration>,
    ) -> Result<Revision, StoreError> {
        self.inner.update(key, value, expected, ttl).await
    }

    async fn write_guarded(
        &self,
        key: &str,
        value: Bytes,
        expected: Revision,
        guard: &Guard,
    ) -> Result<Revision, StoreError> {
        self.inner.write_guarded(key, value, expected, guard).await
    }

    async fn delete(&self, key: &str, expected: Revision) -> Result<Revision, StoreError> {
        self.inner.delete(key, expected).await
    }

    async fn touch(&self, key: &str) -> Result<Revision, StoreError> {
        self.inner.touch(key).await
    }

    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<WatchBatch, StoreError>>, StoreError> {
        let current = self.current.lock().clone();
        if self.down.load(Ordering::SeqCst) {
            return Err(StoreError::Unavailable("cut".to_owned()));
        }
        let stream = self.inner.watch(prefix, from).await?;
        let broken = async move {
            current.cancelled().await;
        };
        let end = futures::stream::iter([Err(StoreError::Unavailable("cut".to_owned()))]);
        Ok(stream.take_until(broken).chain(end).boxed())
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.inner.revision().await
    }

    async fn compact(&self, at: Revision) -> Result<(), StoreError> {
        self.inner.compact(at).await
    }

    async fn healthy(&self) -> Result<(), StoreError> {
        self.inner.healthy().await
    }
}

/// Reads `{"metadata":{"name","labels"}}`.
pub fn index() -> Index {
    Arc::new(|bytes: &[u8]| {
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let metadata = &value["metadata"];
        let labels = metadata["labels"].as_object().into_iter().flatten();
        let labels: BTreeMap<String, String> = labels
            .map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned()))
            .collect();
        let name = metadata["name"].as_str().ok_or("no name")?.to_owned();
        Ok(Meta { name, labels, ..Meta::default() })
    })
}

pub const PODS: &str = "/registry/core/pods/";

pub fn object(name: &str, label: &str) -> Bytes {
    format!(r#"{{"kind":"Pod","metadata":{{"name":"{name}","labels":{{"app":"{label}"}}}}}}"#)
        .into()
}

pub fn key(name: &str) -> String {
    format!("{PODS}default/{name}")
}

pub async fn create(store: &dyn Store, name: &str, label: &str) -> Revision {
    store.create(&key(name), object(name, label), None).await.expect("create")
}

pub async fn cache(feed: &Arc<Feed>, ring: usize) -> Arc<Cache> {
    let cache = Cache::start(feed, CacheConfig { ring, ..CacheConfig::new(PODS, index()) });
    assert!(within(cache.ready()).await);
    cache
}

pub async fn within<T>(wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, wait).await.expect("in time")
}

/// What an event said, short: kind, name, revision.
pub type Seen = (EventKind, String, Revision);

/// The events up to and including `last`.
pub async fn events_until(watcher: &mut Watcher, last: Revision) -> Vec<Seen> {
    let mut seen = Vec::new();
    loop {
        match within(watcher.next()).await.expect("the watch goes on") {
            WatchItem::Event(event) => {
                seen.push((event.kind, event.object.meta.name.clone(), event.revision));
                if event.revision >= last {
                    return seen;
                }
            }
            other => panic!("{other:?}"),
        }
    }
}
