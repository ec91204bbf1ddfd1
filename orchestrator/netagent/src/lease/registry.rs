//! The network's part of etcd: reads, compares, writes. No decision is made here.

use std::time::Duration;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions,
    Identity as TlsIdentity, PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchOptions,
    WatchStream,
};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Lease, LeaseValue, Leases, SubnetKey};
use crate::network::NetworkConfig;

/// Life of a lease without renewal, flannel's. A node that is away for less keeps its subnet.
pub(super) const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// One call to etcd; a leader election takes about a second.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Ping on an idle connection, so that a watch notices a peer that vanished without a word.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// How to reach etcd.
#[derive(Clone, Default)]
pub struct EtcdConfig {
    /// URLs, `http://` or `https://`.
    pub endpoints: Vec<String>,
    /// Certificate of the authority that signed the servers' certificates, as PEM.
    pub ca_pem: Option<String>,
    /// Client certificate, as PEM.
    pub cert_pem: Option<String>,
    /// Its key, as PEM.
    pub key_pem: Option<String>,
    /// Where it is by now, if somebody follows that: looked at for each new connection, instead of `endpoints`.
    pub members: Option<tokio::sync::watch::Receiver<Vec<String>>>,
}

impl EtcdConfig {
    fn current_endpoints(&self) -> Vec<String> {
        let members = self.members.as_ref().map(|members| members.borrow().clone());
        members.filter(|members| !members.is_empty()).unwrap_or_else(|| self.endpoints.clone())
    }
}

impl std::fmt::Debug for EtcdConfig {
    /// Says where, and never the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdConfig")
            .field("endpoints", &self.endpoints)
            .field("tls", &self.ca_pem.is_some())
            .finish_non_exhaustive()
    }
}

/// Why etcd gave no answer, or an unusable one.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No answer in time.
    #[error("{verb}: etcd at {endpoints} does not answer ({cause})")]
    Silent {
        /// What was to be done.
        verb: &'static str,
        /// Where.
        endpoints: String,
        /// What a plain connection says.
        cause: String,
    },
    /// etcd's own error.
    #[error("{verb}: etcd at {endpoints}: {}", words(source))]
    Call {
        /// What was to be done.
        verb: &'static str,
        /// Where.
        endpoints: String,
        /// etcd's words.
        source: etcd_client::Error,
    },
    /// The network configuration in etcd.
    #[error("{key} in etcd: {source}")]
    Config {
        /// The key.
        key: String,
        /// Revision of its last change.
        revision: i64,
        /// What is wrong with it.
        source: crate::network::ConfigError,
    },
    /// The watch ended; list again.
    #[error("the watch on the subnets ended: {0}")]
    WatchEnded(String),
}

/// What a watch reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// A lease was made or changed.
    Put(Box<Lease>),
    /// A lease is gone.
    Delete(SubnetKey),
    /// The configuration was written.
    Config(Vec<u8>),
}

/// The subnets at one moment.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// All leases.
    pub(super) leases: Leases,
    /// Revision of the configuration's last change; 0 if there is none.
    pub(super) config: i64,
    /// etcd's revision.
    pub(super) revision: i64,
}

/// The keys under one prefix.
#[derive(Clone)]
pub struct Registry {
    client: Client,
    endpoints: Vec<String>,
    prefix: String,
}

impl Registry {
    /// Prepares the connection; etcd itself is first met by the first call.
    ///
    /// # Errors
    /// On certificates and URLs that cannot work.
    pub async fn connect(options: &EtcdConfig, prefix: &str) -> Result<Self, RegistryError> {
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(CALL_LIMIT)
            .with_keep_alive(PING_INTERVAL, CALL_LIMIT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if options.ca_pem.is_some() || options.cert_pem.is_some() {
            let mut tls = TlsOptions::new();
            if let Some(ca) = &options.ca_pem {
                tls = tls.ca_certificate(Certificate::from_pem(ca));
            }
            if let (Some(cert), Some(key)) = (&options.cert_pem, &options.key_pem) {
                tls = tls.identity(TlsIdentity::from_pem(cert, key));
            }
            connect = connect.with_tls(tls);
        }
        let endpoints = options.current_endpoints();
        let client = Client::connect(&endpoints, Some(connect)).await.map_err(|source| {
            RegistryError::Call { verb: "connect", endpoints: endpoints.join(","), source }
        })?;
        let prefix = prefix.trim_end_matches('/').to_owned();
        Ok(Self { client, endpoints, prefix })
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        request: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, RegistryError> {
        match timeout(CALL_LIMIT, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) => {
                Err(RegistryError::Call { verb, endpoints: self.endpoints.join(","), source })
            }
            Err(_) => Err(RegistryError::Silent {
                verb,
                endpoints: self.endpoints.join(","),
                cause: self.probe().await,
            }),
        }
    }

    /// The balanced channel hides why it cannot connect; a plain connection tells.
    async fn probe(&self) -> String {
        for endpoint in &self.endpoints {
            let target = endpoint.split("://").last().unwrap_or(endpoint);
            match timeout(Duration::from_secs(1), TcpStream::connect(target)).await {
                Ok(Ok(_)) => return format!("{target} accepts connections, but no answer comes"),
                Ok(Err(error)) if self.endpoints.len() == 1 => return error.to_string(),
                _ => {}
            }
        }
        "no connection".to_owned()
    }

    fn config_key(&self) -> String {
        format!("{}/config", self.prefix)
    }

    fn folder(&self) -> String {
        format!("{}/", self.prefix)
    }

    fn subnets_prefix(&self) -> String {
        format!("{}/subnets/", self.prefix)
    }

    fn lease_key(&self, key: &SubnetKey) -> String {
        format!("{}{key}", self.subnets_prefix())
    }

    /// The network's configuration and the revision of its last change; `default` is written if there is none.
    ///
    /// # Errors
    /// If etcd is away or holds a configuration that this agent cannot follow.
    pub(super) async fn ensure_config(
        &self,
        default: &NetworkConfig,
    ) -> Result<(NetworkConfig, i64), RegistryError> {
        let key = self.config_key();
        let txn = Txn::new()
            .when([Compare::version(key.clone(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.clone(), default.to_json(), None)])
            .or_else([TxnOp::get(key.clone(), None)]);
        let answer =
            self.call("read the network configuration", self.client.kv_client().txn(txn)).await?;
        let written = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        let present = answer.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(get) => {
                get.kvs().first().map(|kv| (kv.value().to_vec(), kv.mod_revision()))
            }
            _ => None,
        });
        match present {
            Some((json, revision)) => match NetworkConfig::parse(&json) {
                Ok(config) => Ok((config, revision)),
                Err(source) => Err(RegistryError::Config { key, revision, source }),
            },
            None => Ok((default.clone(), written)),
        }
    }

    /// Writes the network's configuration; every agent follows it at once.
    ///
    /// # Errors
    /// If etcd is away.
    pub async fn put_config(&self, config: &NetworkConfig) -> Result<(), RegistryError> {
        let mut client = self.client.kv_client();
        let request = client.put(self.config_key(), config.to_json(), None);
        self.call("write the network configuration", request).await.map(drop)
    }

    /// All leases and the revision they are valid at.
    ///
    /// # Errors
    /// If etcd is away.
    pub async fn list(&self) -> Result<(Leases, i64), RegistryError> {
        let Snapshot { leases, revision, .. } = self.snapshot().await?;
        Ok((leases, revision))
    }

    /// Leases and configuration of one moment.
    pub(super) async fn snapshot(&self) -> Result<Snapshot, RegistryError> {
        let prefix = self.subnets_prefix();
        let all = GetOptions::new().with_prefix();
        let txn = Txn::new().and_then([
            TxnOp::get(self.config_key(), Some(GetOptions::new().with_keys_only())),
            TxnOp::get(prefix.clone(), Some(all)),
        ]);
        let answer = self.call("list the subnets", self.client.kv_client().txn(txn)).await?;
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        let mut snapshot = Snapshot { leases: Leases::new(), config: 0, revision };
        for response in answer.op_responses() {
            let TxnOpResponse::Get(get) = response else { continue };
            for kv in get.kvs() {
                if kv.key().starts_with(prefix.as_bytes()) {
                    let lease = decode(&prefix, kv).map(|lease| (lease.key, lease));
                    snapshot.leases.extend(lease);
                } else {
                    snapshot.config = kv.mod_revision();
                }
            }
        }
        Ok(snapshot)
    }

    /// Creates a lease if its key is free and the configuration still the one of revision `config`: no two nodes choose
    /// by different lengths, and so no subnet covers part of another. `None`: somebody was faster.
    ///
    /// # Errors
    /// If etcd is away.
    pub(super) async fn create(
        &self,
        key: &SubnetKey,
        value: &LeaseValue,
        config: i64,
    ) -> Result<Option<i64>, RegistryError> {
        let free = Compare::version(self.lease_key(key), CompareOp::Equal, 0);
        let same_config = Compare::mod_revision(self.config_key(), CompareOp::Equal, config);
        self.write(key, value, vec![free, same_config]).await
    }

    /// Puts another key in the place of ours, if nobody changed that and the other is free. `None`: somebody did.
    ///
    /// # Errors
    /// If etcd is away.
    pub(super) async fn move_key(
        &self,
        from: &Lease,
        to: &SubnetKey,
        value: &LeaseValue,
        config: i64,
    ) -> Result<Option<i64>, RegistryError> {
        let old = self.lease_key(&from.key);
        let conditions = vec![
            Compare::mod_revision(old.clone(), CompareOp::Equal, from.mod_revision),
            Compare::version(self.lease_key(to), CompareOp::Equal, 0),
            Compare::mod_revision(self.config_key(), CompareOp::Equal, config),
        ];
        self.write_and(to, value, conditions, Some(TxnOp::delete(old, None))).await
    }

    /// Removes a lease that nobody changed since it was read; false if somebody did.
    ///
    /// # Errors
    /// If etcd is away.
    pub(super) async fn remove(&self, lease: &Lease) -> Result<bool, RegistryError> {
        let key = self.lease_key(&lease.key);
        let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, lease.mod_revision);
        let txn = Txn::new().when([unchanged]).and_then([TxnOp::delete(key, None)]);
        let answer = self.call("remove a former subnet", self.client.kv_client().txn(txn)).await?;
        if answer.succeeded() && lease.etcd_lease != 0 {
            let _ = self
                .call(
                    "revoke a former etcd lease",
                    self.client.lease_client().revoke(lease.etcd_lease),
                )
                .await;
        }
        Ok(answer.succeeded())
    }

    /// Rewrites a lease that nobody changed since it was read, on a new etcd lease. `None`: somebody did.
    ///
    /// # Errors
    /// If etcd is away.
    pub(super) async fn rewrite(
        &self,
        lease: &Lease,
        value: &LeaseValue,
    ) -> Result<Option<i64>, RegistryError> {
        let key = self.lease_key(&lease.key);
        let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, lease.mod_revision);
        if lease.etcd_lease != 0 {
            return self.write(&lease.key, value, vec![unchanged]).await;
        }
        // A reservation has no TTL and stays one.
        let json = serde_json::to_vec(value).expect("plain data has a JSON form");
        let txn = Txn::new().when([unchanged]).and_then([TxnOp::put(key, json, None)]);
        let answer =
            self.call("take the reserved subnet", self.client.kv_client().txn(txn)).await?;
        Ok(answer.succeeded().then_some(0))
    }

    async fn write(
        &self,
        key: &SubnetKey,
        value: &LeaseValue,
        conditions: Vec<Compare>,
    ) -> Result<Option<i64>, RegistryError> {
        self.write_and(key, value, conditions, None).await
    }

    async fn write_and(
        &self,
        key: &SubnetKey,
        value: &LeaseValue,
        conditions: Vec<Compare>,
        also: Option<TxnOp>,
    ) -> Result<Option<i64>, RegistryError> {
        let ttl = i64::try_from(LEASE_TTL.as_secs()).expect("a day fits");
        let mut leases = self.client.lease_client();
        let id = self.call("get an etcd lease", leases.grant(ttl, None)).await?.id();
        let json = serde_json::to_vec(value).expect("plain data has a JSON form");
        let put = TxnOp::put(self.lease_key(key), json, Some(PutOptions::new().with_lease(id)));
        let txn =
            Txn::new().when(conditions).and_then(also.into_iter().chain([put]).collect::<Vec<_>>());
        let answer = self.call("acquire a subnet", self.client.kv_client().txn(txn)).await;
        if !answer.as_ref().is_ok_and(etcd_client::TxnResponse::succeeded) {
            // Unknown or lost: revoking removes at most a key that hangs on this very lease.
            let _ = self.call("revoke the unused etcd lease", leases.revoke(id)).await;
        } else {
            crate::metrics::lease_acquired(LEASE_TTL);
        }
        Ok(answer?.succeeded().then_some(id))
    }

    /// Renews an etcd lease; false if it has expired or was revoked.
    ///
    /// # Errors
    /// If etcd is away.
    pub(super) async fn keep_alive(&self, id: i64) -> Result<bool, RegistryError> {
        let mut leases = self.client.lease_client();
        let renewed = match self.call("renew the subnet lease", leases.keep_alive(id)).await {
            Ok(_) => Ok(true),
            Err(RegistryError::Call {
                source: etcd_client::Error::LeaseKeepAliveError(_), ..
            }) => Ok(false),
            Err(error) => Err(error),
        };
        crate::metrics::lease_renewed(matches!(renewed, Ok(true)).then_some(LEASE_TTL));
        renewed
    }

    /// Watches subnets and configuration from `revision` on.
    ///
    /// # Errors
    /// If etcd is away.
    pub(super) async fn watch(&self, revision: i64) -> Result<SubnetWatch, RegistryError> {
        let options = WatchOptions::new().with_prefix().with_start_revision(revision);
        let mut client = self.client.watch_client();
        let stream =
            self.call("watch the subnets", client.watch(self.folder(), Some(options))).await?;
        let (prefix, config) = (self.subnets_prefix(), self.config_key());
        Ok(SubnetWatch { stream, prefix, config })
    }
}

/// A running watch.
pub(super) struct SubnetWatch {
    stream: WatchStream,
    prefix: String,
    config: String,
}

impl SubnetWatch {
    /// The next changes, in order.
    ///
    /// # Errors
    /// When the watch is over, whatever the reason: compaction, disconnect, a lost leader.
    ///
    /// # Cancel safety
    /// Safe: dropped, it has taken nothing off the stream.
    pub(super) async fn next(&mut self) -> Result<Vec<Change>, RegistryError> {
        let message = self
            .stream
            .message()
            .await
            .map_err(|error| RegistryError::WatchEnded(words(&error)))?;
        let Some(message) = message else {
            return Err(RegistryError::WatchEnded("etcd closed it".to_owned()));
        };
        if message.compact_revision() != 0 {
            return Err(RegistryError::WatchEnded(format!(
                "compacted up to {}",
                message.compact_revision()
            )));
        }
        if message.canceled() {
            return Err(RegistryError::WatchEnded(message.cancel_reason().to_owned()));
        }
        let changes = message.events().iter().filter_map(|event| {
            let kv = event.kv()?;
            if !kv.key().starts_with(self.prefix.as_bytes()) {
                let written =
                    kv.key() == self.config.as_bytes() && event.event_type() == EventType::Put;
                return written.then(|| Change::Config(kv.value().to_vec()));
            }
            match event.event_type() {
                EventType::Put => {
                    decode(&self.prefix, kv).map(|lease| Change::Put(Box::new(lease)))
                }
                EventType::Delete => subnet_of(&self.prefix, kv.key()).map(Change::Delete),
            }
        });
        Ok(changes.collect())
    }
}

/// An error of the client for people: what etcd or the system says, without the layers in between.
fn words(error: &etcd_client::Error) -> String {
    let etcd_client::Error::GRpcStatus(status) = error else { return error.to_string() };
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
    let mut root = String::new();
    while let Some(error) = cause {
        root = error.to_string();
        cause = error.source();
    }
    match status.message() {
        "" => root,
        message if root.is_empty() || message.contains(&root) => message.to_owned(),
        message => format!("{message}: {root}"),
    }
}

fn subnet_of(prefix: &str, key: &[u8]) -> Option<SubnetKey> {
    let parsed = std::str::from_utf8(key).ok()?.strip_prefix(prefix)?.parse();
    parsed.inspect_err(|error| tracing::warn!(%error, "a key among the subnets is ignored")).ok()
}

fn decode(prefix: &str, kv: &etcd_client::KeyValue) -> Option<Lease> {
    let key = subnet_of(prefix, kv.key())?;
    let value = serde_json::from_slice(kv.value())
        .inspect_err(|error| tracing::warn!(subnet = %key, %error, "a lease cannot be read; its subnet counts as taken"))
        .ok();
    Some(Lease { key, value, mod_revision: kv.mod_revision(), etcd_lease: kv.lease() })
}
