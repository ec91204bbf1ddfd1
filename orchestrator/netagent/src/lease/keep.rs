//! The task that holds this node's lease and follows everybody's.
//!
//! One loop: list, choose, acquire, watch. Whatever goes wrong — a lost race, a deleted key, an expired lease, a
//! compaction, an outage — leads back to the list. While etcd is away the last known network stays in force.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use rand::Rng as _;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::registry::{Change, Snapshot};
use super::{
    Choice, EtcdConfig, Identity, Lease, LeaseValue, Leases, Registry, RegistryError, SubnetKey,
    VxlanData, choose,
};
use crate::files::SubnetEnv;
use crate::network::NetworkConfig;

/// Renewal. A fraction of the TTL so small that a lease outlives any outage of etcd shorter than a day.
const RENEW_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// Waits between attempts while etcd is away.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Longest wait for a change when every subnet is taken.
const FULL_WAIT: Duration = Duration::from_secs(10);
/// Those who wait for a free subnet try within this time of a change.
const FULL_SPREAD: Duration = Duration::from_millis(500);

/// What the lease keeper knows of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Its configuration.
    pub config: NetworkConfig,
    /// This node's subnets.
    pub own: SubnetKey,
    /// Everybody's leases, ours among them.
    pub leases: Leases,
    /// Why the configuration in etcd is not the one that is followed.
    pub config_problem: Option<String>,
}

/// Whether etcd answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EtcdHealth {
    /// Nothing was tried yet.
    Unknown,
    /// The watch runs.
    Healthy,
    /// The last attempt's error.
    Away(String),
}

/// The lease keeper.
pub struct Keeper {
    /// Where etcd is.
    pub etcd: EtcdConfig,
    /// Where in etcd.
    pub prefix: String,
    /// Written if there is no configuration yet.
    pub default_config: NetworkConfig,
    /// This node.
    pub identity: Identity,
    /// Tells the former subnet, and is taken away while the subnet is not ours.
    pub subnet_env: PathBuf,
    /// Where the network is published.
    pub network: watch::Sender<Option<Network>>,
    /// Where etcd's health is published.
    pub health: watch::Sender<EtcdHealth>,
}

/// The configuration that is followed.
struct Followed {
    config: NetworkConfig,
    /// Revision of what etcd holds, whether it can be used or not.
    revision: i64,
    problem: Option<String>,
}

/// What became of an acquisition.
enum Acquired {
    Lease(Box<Lease>),
    /// All subnets are taken, at this revision.
    Full(i64),
    /// Read it again first.
    ConfigChanged,
}

impl Keeper {
    /// Holds the lease until cancelled. The key is left in etcd: the node comes back to it.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let ended = tokio::select! {
                () = cancel.cancelled() => return,
                ended = self.session(&mut backoff) => ended,
            };
            self.report(&ended);
            backoff = (backoff * 2).min(BACKOFF_MAX);
            let wait = backoff.mul_f64(rand::rng().random_range(0.5..1.0));
            tokio::select! {
                () = cancel.cancelled() => return,
                () = sleep(wait) => {}
            }
        }
    }

    fn report(&self, problem: &RegistryError) {
        let text = problem.to_string();
        let known = matches!(&*self.health.borrow(), EtcdHealth::Away(_));
        if matches!(problem, RegistryError::WatchEnded(_)) && !known {
            debug!(reason = text, "watching the subnets anew");
            return;
        }
        // Once per outage is for people; the rest is for those who look closely.
        if known {
            debug!(reason = text, "still waiting for etcd");
        } else if self.network.borrow().is_some() {
            warn!(
                reason = text,
                "etcd is away; the pod network keeps forwarding as it is, and we keep trying"
            );
        } else {
            warn!(
                reason = text,
                "waiting for etcd to get this node's subnet; pods cannot start before that"
            );
        }
        self.health.send_replace(EtcdHealth::Away(text));
    }

    /// One connection's life; returns why it ended.
    async fn session(&mut self, backoff: &mut Duration) -> RegistryError {
        match self.hold(backoff).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    /// Holds the lease for as long as etcd answers.
    async fn hold(&mut self, backoff: &mut Duration) -> Result<Infallible, RegistryError> {
        let registry = Registry::connect(&self.etcd, &self.prefix).await?;
        loop {
            let followed = self.config(&registry).await?;
            let own = match self.acquire(&registry, &followed).await? {
                Acquired::Lease(own) => own,
                Acquired::Full(revision) => {
                    wait_for_change(&registry, revision).await?;
                    continue;
                }
                Acquired::ConfigChanged => continue,
            };
            let Snapshot { leases, config, revision } = registry.snapshot().await?;
            *backoff = BACKOFF_MIN;
            if matches!(&*self.health.borrow(), EtcdHealth::Away(_)) {
                info!("etcd answers, and this node has its subnet");
            }
            self.health.send_replace(EtcdHealth::Healthy);
            if !self.still_ours(&leases, &own.key) || config != followed.revision {
                continue;
            }
            self.leave_former_subnets(&registry, &leases, own.key).await?;
            self.publish(Network {
                config: followed.config.clone(),
                own: own.key,
                leases,
                config_problem: followed.problem.clone(),
            });
            self.follow(&registry, &own, revision).await?;
        }
    }

    /// The configuration to follow: what etcd holds or, where that cannot be used, the last one that could.
    async fn config(&self, registry: &Registry) -> Result<Followed, RegistryError> {
        let last = self.network.borrow().as_ref().map(|network| network.config.clone());
        // A configuration that somebody removed is put back as it was: the network still is what it was.
        let default = last.as_ref().unwrap_or(&self.default_config);
        match registry.ensure_config(default).await {
            Ok((config, revision)) => Ok(Followed { config, revision, problem: None }),
            Err(error @ RegistryError::Config { revision, .. }) => {
                let Some(config) = last else { return Err(error) };
                let problem = format!("{error}; the last good configuration stays in force");
                error!("{problem}");
                Ok(Followed { config, revision, problem: Some(problem) })
            }
            Err(error) => Err(error),
        }
    }

    fn value(&self, config: &NetworkConfig, key: &SubnetKey) -> LeaseValue {
        let data = |vtep_mac| VxlanData { vni: config.vni, vtep_mac };
        let value = LeaseValue::node(
            config.mode.backend(),
            self.identity.public_ip,
            data(self.identity.vtep_mac),
        );
        match (key.v6, self.identity.public_ipv6) {
            (Some(_), Some(ip)) => value.with_ipv6(ip, data(self.identity.vtep_mac.partner())),
            _ => value,
        }
    }

    /// Removes what this node held under an older configuration, so that others can have it. A reservation stays.
    async fn leave_former_subnets(
        &self,
        registry: &Registry,
        leases: &Leases,
        own: SubnetKey,
    ) -> Result<(), RegistryError> {
        for lease in leases.values().filter(|lease| lease.key != own && lease.etcd_lease != 0) {
            let Some(value) = &lease.value else { continue };
            // The MAC alone is not enough: another node may wrongly have our name, and with it our MAC.
            let ours = value.public_ip == self.identity.public_ip
                && value.vtep().is_some_and(|data| data.vtep_mac == self.identity.vtep_mac);
            if ours && registry.remove(lease).await? {
                info!(subnet = %lease.key, "a former subnet of this node was given back");
            }
        }
        Ok(())
    }

    /// The subnet this node held last: in this life, else in a former one.
    fn former(&self) -> Option<SubnetKey> {
        let in_this_life = self.network.borrow().as_ref().map(|network| network.own);
        in_this_life.or_else(|| SubnetEnv::observe(&self.subnet_env).map(|env| env.key()))
    }

    /// Gets the lease.
    async fn acquire(
        &self,
        registry: &Registry,
        followed: &Followed,
    ) -> Result<Acquired, RegistryError> {
        let config = &followed.config;
        loop {
            let Snapshot { leases, config: config_revision, revision } =
                registry.snapshot().await?;
            if config_revision != followed.revision {
                return Ok(Acquired::ConfigChanged);
            }
            let former = self.former();
            let choice = choose(config, &leases, &self.identity, former, &mut rand::rng());
            let (key, value, taken) = match choice {
                Choice::Keep(lease)
                    if lease.value.as_ref() == Some(&self.value(config, &lease.key)) =>
                {
                    if lease.etcd_lease == 0 || registry.keep_alive(lease.etcd_lease).await? {
                        return Ok(Acquired::Lease(lease));
                    }
                    // The lease went away between list and renewal, and the key with it.
                    continue;
                }
                Choice::Keep(lease) => {
                    let value = self.value(config, &lease.key);
                    let taken = registry.rewrite(&lease, &value).await?;
                    (lease.key, value, taken)
                }
                Choice::Move(lease, key) => {
                    let value = self.value(config, &key);
                    let taken = registry.move_key(&lease, &key, &value, config_revision).await?;
                    (key, value, taken)
                }
                Choice::Take(key) => {
                    let value = self.value(config, &key);
                    let taken = registry.create(&key, &value, config_revision).await?;
                    (key, value, taken)
                }
                Choice::NoIpv6 => {
                    self.without_subnet(
                        "the network is of IPv6 alone, and the link that carries the overlay has no IPv6 address: add one, and start the agent again".to_owned(),
                        former,
                    );
                    return Ok(Acquired::Full(revision));
                }
                Choice::Full => {
                    let held = leases.len();
                    self.without_subnet(
                        format!(
                            "every node subnet is taken ({held} leases): remove dead nodes' keys under {}/subnets/ or widen the network",
                            self.prefix
                        ),
                        former,
                    );
                    return Ok(Acquired::Full(revision));
                }
            };
            match taken {
                Some(etcd_lease) => {
                    info!(subnet = %key, former = ?former.map(|former| former.to_string()), "subnet acquired");
                    if former.is_some_and(|former| !former.is_kin(&key)) {
                        self.fence(former);
                    }
                    return Ok(Acquired::Lease(Box::new(Lease {
                        key,
                        value: Some(value),
                        mod_revision: 0,
                        etcd_lease,
                    })));
                }
                None => debug!(subnet = %key, "another node was faster; choosing again"),
            }
        }
    }

    /// Follows the watch until something asks for a new list.
    async fn follow(
        &self,
        registry: &Registry,
        own: &Lease,
        revision: i64,
    ) -> Result<(), RegistryError> {
        let mut watch = registry.watch(revision + 1).await?;
        let mut renew = interval_at(Instant::now() + RENEW_INTERVAL, RENEW_INTERVAL);
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changes = watch.next() => {
                    let mut changes = changes?;
                    if let Some(json) = take_config(&mut changes)
                        && self.is_another_config(&json)
                    {
                        info!("the network configuration was changed; following it");
                        return Ok(());
                    }
                    self.network.send_if_modified(|network| {
                        network.as_mut().is_some_and(|network| apply(&mut network.leases, changes))
                    });
                    let ours = self.network.borrow().as_ref().is_some_and(|network| {
                        self.still_ours(&network.leases, &own.key)
                    });
                    if !ours {
                        warn!(subnet = %own.key, "our subnet's key was deleted or overwritten; acquiring again");
                        return Ok(());
                    }
                }
                _ = renew.tick() => {
                    if own.etcd_lease != 0 && !registry.keep_alive(own.etcd_lease).await? {
                        warn!(subnet = %own.key, "the etcd lease of our subnet is gone; acquiring again");
                        return Ok(());
                    }
                }
            }
        }
    }

    fn still_ours(&self, leases: &Leases, own: &SubnetKey) -> bool {
        leases
            .get(own)
            .and_then(|lease| lease.value.as_ref()?.vtep())
            .is_some_and(|data| data.vtep_mac == self.identity.vtep_mac)
    }

    fn is_another_config(&self, json: &[u8]) -> bool {
        let network = self.network.borrow();
        let followed = network.as_ref().filter(|network| network.config_problem.is_none());
        followed.map(|network| &network.config) != NetworkConfig::parse(json).ok().as_ref()
    }

    fn publish(&self, network: Network) {
        for lease in network.leases.values() {
            let same_mac = lease.value.as_ref().and_then(LeaseValue::vtep).is_some_and(|data| {
                data.vtep_mac == self.identity.vtep_mac && lease.key != network.own
            });
            if same_mac {
                error!(
                    subnet = %lease.key,
                    mac = %self.identity.vtep_mac,
                    "another lease names our VTEP MAC: two nodes of one name, or a stale key; the kernel drops its packets as a loop"
                );
            }
        }
        self.network.send_if_modified(|current| {
            let changed = current.as_ref() != Some(&network);
            *current = Some(network);
            changed
        });
    }

    /// There is none for this node; it waits for a change.
    fn without_subnet(&self, why: String, former: Option<SubnetKey>) {
        error!("{why}");
        // Whatever this node held is not in etcd any more.
        if former.is_some() && self.subnet_env.exists() {
            self.fence(former);
        }
        self.health.send_replace(EtcdHealth::Away(why));
    }

    /// The former subnet belongs to somebody else: no pod may get an address of it any more.
    fn fence(&self, former: Option<SubnetKey>) {
        error!(
            former = ?former.map(|former| former.to_string()),
            "the former subnet is not this node's any more; pods that still hold addresses of it lose their connections"
        );
        if let Err(problem) = std::fs::remove_file(&self.subnet_env)
            && problem.kind() != std::io::ErrorKind::NotFound
        {
            warn!(error = %problem, file = %self.subnet_env.display(), "cannot take the stale subnet file away");
        }
    }
}

/// Waits until a subnet or the configuration changes, with a look now and then for what a watch may miss. Those who wait
/// together do not come back together.
async fn wait_for_change(registry: &Registry, revision: i64) -> Result<(), RegistryError> {
    let mut watch = registry.watch(revision + 1).await?;
    let mut told = false;
    while !told {
        match timeout(FULL_WAIT, watch.next()).await {
            Ok(changes) => told = !changes?.is_empty(),
            Err(_) => told = true,
        }
    }
    let spread = FULL_SPREAD.mul_f64(rand::rng().random_range(0.0..1.0));
    sleep(spread).await;
    Ok(())
}

/// Applies watch events; true if anything is different afterwards.
fn apply(leases: &mut Leases, changes: Vec<Change>) -> bool {
    let mut changed = false;
    for change in changes {
        changed |= match change {
            Change::Put(lease) => {
                let same = |before: &Lease| before.value == lease.value;
                let differs = !leases.get(&lease.key).is_some_and(same);
                leases.insert(lease.key, *lease);
                differs
            }
            Change::Delete(key) => leases.remove(&key).is_some(),
            Change::Config(_) => false,
        };
    }
    changed
}

/// The last configuration among the changes.
fn take_config(changes: &mut Vec<Change>) -> Option<Vec<u8>> {
    let mut last = None;
    changes.retain_mut(|change| match change {
        Change::Config(json) => {
            last = Some(std::mem::take(json));
            false
        }
        _ => true,
    });
    last
}
