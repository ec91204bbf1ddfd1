//! The store on etcd (API v3; works from etcd 3.4 on).
//!
//! Values are CAS-written by transactions on `mod_revision`; lists are read in pages of [`PAGE`] at one revision, so
//! that no single reply grows with the cluster; keys with a TTL share leases ([`lease`]). Our revisions are etcd's, counted
//! from the [`epoch`] on.

pub mod epoch;
mod lease;
mod watch;

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, Identity, KvClient,
    PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchClient,
};
use futures::stream::BoxStream;

use self::epoch::Epoch;
use crate::store::{Guard, KeyValue, Page, Revision, Store, StoreError, WatchBatch, prefix_end};

/// Keys in one range request. 500 pods are about 1.3 MB.
const PAGE: usize = 500;
/// Largest reply we take. One page of the largest values that etcd stores (1.5 MiB each) stays below it.
const MAX_MESSAGE: usize = 1 << 30;
/// How long etcd may take to answer; a slow disk at the start of a cluster needs seconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request is tried again while etcd is away: long enough for a restart of it.
const RETRY: Duration = Duration::from_secs(5);
/// Pause between two tries.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// A dead connection is noticed within the sum of both. etcd takes offence at pings more often than every 5 s.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How to reach etcd.
#[derive(Debug, Clone, Default)]
pub struct EtcdConfig {
    /// Client URLs of the members, `https://10.0.0.1:2379`.
    pub endpoints: Vec<String>,
    /// Authority that signed the members' certificates.
    pub ca_pem: Option<String>,
    /// Our client certificate.
    pub cert_pem: Option<String>,
    /// Its key.
    pub key_pem: Option<String>,
}

/// A store on an etcd cluster. Clones share the connection, which heals itself.
#[derive(Clone)]
pub struct EtcdStore {
    kv: KvClient,
    watch: WatchClient,
    leases: lease::Leases,
    epoch: Epoch,
}

impl EtcdStore {
    /// A store on the etcd at `config`. Connects on first use, so etcd may come up later.
    ///
    /// # Errors
    /// [`StoreError::Internal`] when an endpoint or the certificates cannot be used.
    pub async fn connect(config: EtcdConfig) -> Result<Self, StoreError> {
        let client = connect(&config, None).await.map_err(|error| match error {
            Error::GRpcStatus(_) => from_etcd(error),
            other => StoreError::Internal(format!(
                "connect to {}: {}",
                config.endpoints.join(","),
                chain(&other)
            )),
        })?;
        Ok(Self {
            kv: client.kv_client().max_decoding_message_size(MAX_MESSAGE),
            watch: client.watch_client().max_decoding_message_size(MAX_MESSAGE),
            leases: lease::Leases::new(client.lease_client()),
            epoch: Epoch::default(),
        })
    }

    /// The same store in the epoch that etcd says it is in. `restored` is the one that begins with the data it has, if that
    /// was just put back from a snapshot; safe to repeat.
    ///
    /// # Errors
    /// etcd is away.
    pub async fn enter_epoch(self, restored: Option<Revision>) -> Result<Self, StoreError> {
        let mut reply = self.range(epoch::KEY, GetOptions::new()).await?;
        let known = match reply.take_kvs().pop() {
            Some(kv) => Epoch::parse(kv.value())?,
            None => Epoch::default(),
        };
        let epoch = known.max(Epoch(restored.unwrap_or(0)));
        if epoch != known {
            retry(Harm::None, || {
                let mut kv = self.kv.clone();
                async move { kv.put(epoch::KEY, epoch.to_string(), None).await }
            })
            .await?;
        }
        Ok(Self { epoch, ..self })
    }

    /// The revision of a reply, as ours.
    fn revision_of(
        &self,
        header: Option<&etcd_client::ResponseHeader>,
    ) -> Result<Revision, StoreError> {
        let header =
            header.ok_or_else(|| StoreError::Internal("etcd's reply has no header".to_owned()))?;
        Ok(self.epoch.ours(header.revision()))
    }

    /// A key of a reply, with our revisions.
    fn key_value(&self, kv: etcd_client::KeyValue) -> Result<KeyValue, StoreError> {
        let create_revision = self.epoch.ours(kv.create_revision());
        let (mod_revision, lease) = (self.epoch.ours(kv.mod_revision()), kv.lease());
        let (key, value) = kv.into_key_value();
        let key = String::from_utf8(key)
            .map_err(|error| StoreError::Internal(format!("key in etcd: {error}")))?;
        Ok(KeyValue { key, value: Bytes::from(value), create_revision, mod_revision, lease })
    }

    async fn range(
        &self,
        key: &str,
        options: GetOptions,
    ) -> Result<etcd_client::GetResponse, StoreError> {
        retry(Harm::None, || {
            let (mut kv, options) = (self.kv.clone(), options.clone());
            async move { kv.get(key, Some(options)).await }
        })
        .await
    }

    /// Runs `change` if the key is at revision `expected` (0 = absent); otherwise returns what is there instead.
    async fn swap(
        &self,
        key: &str,
        expected: Revision,
        change: TxnOp,
    ) -> Result<Result<Revision, Option<KeyValue>>, StoreError> {
        self.swap_all(&[(key, expected)], vec![change]).await
    }

    /// Runs the changes if all keys are at their revisions (0 = absent); otherwise returns what the first one is.
    async fn swap_all(
        &self,
        keys: &[(&str, Revision)],
        changes: Vec<TxnOp>,
    ) -> Result<Result<Revision, Option<KeyValue>>, StoreError> {
        let compares: Vec<_> = keys
            .iter()
            .map(|(key, at)| {
                Compare::mod_revision(*key, CompareOp::Equal, self.epoch.compared(*at))
            })
            .collect();
        let first: Vec<_> = keys.iter().take(1).map(|(key, _)| TxnOp::get(*key, None)).collect();
        let txn = Txn::new().when(compares).and_then(changes).or_else(first);
        let reply = retry(Harm::Twice, || {
            let (mut kv, txn) = (self.kv.clone(), txn.clone());
            async move { kv.txn(txn).await }
        })
        .await?;
        if reply.succeeded() {
            return Ok(Ok(self.revision_of(reply.header())?));
        }
        let current = reply.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(mut found) => found.take_kvs().pop(),
            _ => None,
        });
        Ok(Err(current.map(|kv| self.key_value(kv)).transpose()?))
    }

    async fn put_op(
        &self,
        key: &str,
        value: Bytes,
        ttl: Option<Duration>,
    ) -> Result<TxnOp, StoreError> {
        let options = match ttl {
            Some(ttl) => Some(PutOptions::new().with_lease(self.leases.of(ttl).await?)),
            None => None,
        };
        Ok(TxnOp::put(key, value, options))
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<(Option<KeyValue>, Revision), StoreError> {
        let mut reply = self.range(key, GetOptions::new()).await?;
        let revision = self.revision_of(reply.header())?;
        Ok((reply.take_kvs().pop().map(|kv| self.key_value(kv)).transpose()?, revision))
    }

    async fn list(
        &self,
        prefix: &str,
        start: Option<&str>,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<Page, StoreError> {
        let end = prefix_end(prefix);
        let mut from = start.unwrap_or(prefix).to_owned();
        let mut at = at;
        // etcd takes 0 for "now".
        let asked = at.map(|at| self.epoch.etcds(at)).transpose()?;
        let mut items = Vec::new();
        let mut etcds_at = asked.unwrap_or(0);
        loop {
            let size = if limit == 0 { PAGE } else { PAGE.min(limit - items.len()) };
            let size = i64::try_from(size).expect("a page is small");
            let options =
                GetOptions::new().with_range(end.clone()).with_limit(size).with_revision(etcds_at);
            let mut reply = self.range(&from, options).await?;
            // The header tells the newest revision even if an older one was asked for; the list is true at that one.
            let revision = match at {
                Some(at) => at,
                None => self.revision_of(reply.header())?,
            };
            at = Some(revision);
            etcds_at = self.epoch.etcds(revision)?;
            let (more, count) = (reply.more(), reply.count());
            let page = reply.take_kvs();
            let remaining = count - i64::try_from(page.len()).expect("a page is small");
            items.reserve(page.len());
            for kv in page {
                items.push(self.key_value(kv)?);
            }
            let Some(last) = items.last().filter(|_| more && (limit == 0 || items.len() < limit))
            else {
                return Ok(Page {
                    items,
                    revision,
                    more,
                    remaining: if more { remaining } else { 0 },
                });
            };
            // The smallest key after the last one read.
            from = format!("{}\0", last.key);
        }
    }

    async fn create(
        &self,
        key: &str,
        value: Bytes,
        ttl: Option<Duration>,
    ) -> Result<Revision, StoreError> {
        let put = self.put_op(key, value, ttl).await?;
        self.swap(key, 0, put).await?.map_err(|_| StoreError::AlreadyExists)
    }

    async fn update(
        &self,
        key: &str,
        value: Bytes,
        expected: Revision,
        ttl: Option<Duration>,
    ) -> Result<Revision, StoreError> {
        if expected <= 0 {
            // etcd reads "at revision 0" as "absent": this would create the key.
            return Err(StoreError::Conflict { current: self.get(key).await?.0 });
        }
        let put = self.put_op(key, value, ttl).await?;
        self.swap(key, expected, put).await?.map_err(|current| StoreError::Conflict { current })
    }

    async fn write_guarded(
        &self,
        key: &str,
        value: Bytes,
        expected: Revision,
        guard: &Guard,
    ) -> Result<Revision, StoreError> {
        let changes =
            vec![TxnOp::put(key, value, None), TxnOp::put(guard.key.as_str(), Vec::new(), None)];
        let keys = [(key, expected), (guard.key.as_str(), guard.revision)];
        self.swap_all(&keys, changes).await?.map_err(|current| {
            match current.as_ref().map_or(0, |found| found.mod_revision) {
                found if found == expected => StoreError::Overtaken,
                _ if expected == 0 => StoreError::AlreadyExists,
                _ => StoreError::Conflict { current },
            }
        })
    }

    async fn delete(&self, key: &str, expected: Revision) -> Result<Revision, StoreError> {
        if expected <= 0 {
            return Err(StoreError::Conflict { current: self.get(key).await?.0 });
        }
        self.swap(key, expected, TxnOp::delete(key, None))
            .await?
            .map_err(|current| StoreError::Conflict { current })
    }

    async fn touch(&self, key: &str) -> Result<Revision, StoreError> {
        let reply = retry(Harm::None, || {
            let mut kv = self.kv.clone();
            async move { kv.put(key, Vec::new(), None).await }
        });
        self.revision_of(reply.await?.header())
    }

    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<WatchBatch, StoreError>>, StoreError> {
        watch::open(self.watch.clone(), prefix, from, self.epoch).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        // Any linearizable range tells the revision of the whole store; this one counts at most one key.
        let reply = self.range("/", GetOptions::new().with_count_only()).await?;
        self.revision_of(reply.header())
    }

    async fn compact(&self, at: Revision) -> Result<(), StoreError> {
        // What was before the epoch is gone.
        let Ok(at) = self.epoch.etcds(at) else { return Ok(()) };
        let mut kv = self.kv.clone();
        match call(kv.compact(at, None)).await {
            Ok(_) | Err(StoreError::Compacted { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn healthy(&self) -> Result<(), StoreError> {
        let mut kv = self.kv.clone();
        call(kv.get("/", Some(GetOptions::new().with_count_only()))).await.map(drop)
    }
}

/// What it does to send a request again that etcd may have carried out already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Harm {
    None,
    /// The second one finds what the first one wrote, and takes it for somebody else's.
    Twice,
}

/// Sends a request, and sends it again while etcd restarts, as long as that does no harm. A write is sent again only
/// if nobody listened, so that nobody can have read it.
async fn retry<T, F>(harm: Harm, request: impl Fn() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, Error>>,
{
    let give_up = tokio::time::Instant::now() + RETRY;
    loop {
        let mut refused = false;
        let answer = async { request().await.inspect_err(|error| refused = is_refused(error)) };
        match call(answer).await {
            Err(error)
                if error.is_transient()
                    && (harm == Harm::None || refused)
                    && tokio::time::Instant::now() < give_up =>
            {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            done => return done,
        }
    }
}

/// Whether the connection was refused.
fn is_refused(error: &Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = match error {
        Error::GRpcStatus(status) => Some(status),
        Error::TransportError(error) => Some(error),
        _ => None,
    };
    while let Some(error) = next {
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// One request with its deadline. (The client's own timeout would end watches too.)
async fn call<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(CALL_TIMEOUT, request).await {
        Ok(done) => done.map_err(from_etcd),
        Err(_) => Err(StoreError::Unavailable(format!(
            "etcd gave no answer within {} s",
            CALL_TIMEOUT.as_secs()
        ))),
    }
}

/// Sorts etcd's errors by what the caller can do. gRPC codes as numbers: the crate that names them is not ours.
/// A connection with our settings. Connects on first use.
pub(crate) async fn connect(config: &EtcdConfig, limit: Option<Duration>) -> Result<Client, Error> {
    let mut options = ConnectOptions::new()
        .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
        .with_connect_timeout(CONNECT_TIMEOUT);
    match limit {
        Some(limit) => options = options.with_timeout(limit),
        // A member that lost its quorum says so at once instead of serving a watch that stands still.
        None => options = options.with_require_leader(true),
    }
    if config.endpoints.iter().any(|url| url.starts_with("https://")) {
        let mut tls = TlsOptions::new();
        if let Some(ca) = &config.ca_pem {
            tls = tls.ca_certificate(Certificate::from_pem(ca));
        }
        if let (Some(cert), Some(key)) = (&config.cert_pem, &config.key_pem) {
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        options = options.with_tls(tls);
    }
    Client::connect(&config.endpoints, Some(options)).await
}

fn from_etcd(error: Error) -> StoreError {
    const DEADLINE_EXCEEDED: i32 = 4;
    const RESOURCE_EXHAUSTED: i32 = 8;
    const ABORTED: i32 = 10;
    const UNAVAILABLE: i32 = 14;
    let Error::GRpcStatus(status) = &error else {
        return match error {
            Error::TransportError(_) | Error::IoError(_) | Error::WatchError(_) => {
                StoreError::Unavailable(chain(&error))
            }
            _ => StoreError::Internal(chain(&error)),
        };
    };
    let message = status.message();
    if message.contains("required revision has been compacted") {
        return StoreError::Compacted { oldest: 0 };
    }
    if message.contains("required revision is a future revision") {
        return StoreError::Future;
    }
    // Above 1.5 MiB etcd says so, above 2 MiB its gRPC layer does.
    if message.contains("request is too large")
        || message.contains("received message larger than max")
    {
        return StoreError::TooLarge(message.to_owned());
    }
    // Only the message: a status' own text repeats code and causes as Rust prints them.
    let words = || with_causes(message.to_owned(), std::error::Error::source(status));
    match status.code() as i32 {
        DEADLINE_EXCEEDED | RESOURCE_EXHAUSTED | ABORTED | UNAVAILABLE => {
            StoreError::Unavailable(words())
        }
        // The transport reports a connection that broke in the middle of a call as Unknown or Cancelled or Internal,
        // with the cause behind it; etcd's own errors have none.
        _ if std::error::Error::source(status).is_some() => StoreError::Unavailable(words()),
        _ => StoreError::Internal(format!("etcd: {message}")),
    }
}

/// The error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    with_causes(error.to_string(), error.source())
}

fn with_causes(mut line: String, mut next: Option<&(dyn std::error::Error + 'static)>) -> String {
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !line.contains(&cause_text) {
            line = format!("{line}: {cause_text}");
        }
        next = cause.source();
    }
    line
}
