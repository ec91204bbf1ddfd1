//! Leader election by a Lease (coordination.k8s.io/v1): of several processes one works, the others wait.
//!
//! Clocks of different hosts are never compared: a Lease has ended when *we* saw it unchanged for as long as its
//! holder said. A leader that could not renew in time stops before another one can begin: its time runs from before the
//! renewal was sent, everybody else's from after it was seen. And because a process may stand still when that time ends
//! (SIGSTOP, a host without CPU to spare), its client is behind a [`Fence`]: what it sends when it wakes up is refused,
//! whether it knows already or not.
//!
//! What is left: a change that was on its way when the process stopped; and a virtual machine whose clock stood still with
//! it (paused or moved by its hypervisor, suspended to memory), which finds the fence open until its next look at the
//! Lease, [`Election::retry_period`] later. Changes are compare-and-swap and deletions name the UID, so either can only be a
//! new object or the end of one that it still knew, and every reconciler lives with those.
//!
//! The road not taken: each change of a leader could be a transaction that also compares a key of its term in etcd. No
//! clock is trusted then, but every write of the store would have to carry that condition through the API, and whoever
//! takes over would have to write the term together with the Lease; for a window of two seconds in which nothing is lost.

use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use orch_api::k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use orch_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use orch_client::{Api, Client, Error, Fence};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Until a leader looks again after somebody else wrote its Lease.
const RACED_PAUSE: Duration = Duration::from_millis(100);

/// Who wants to lead what.
#[derive(Debug, Clone)]
pub struct Election {
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Differs between all candidates, also between two starts of one process.
    pub identity: String,
    /// Others wait this long after the last renewal.
    pub lease_duration: Duration,
    /// A leader that did not renew for this long stops; shorter than `lease_duration`.
    pub renew_deadline: Duration,
    /// Between two tries.
    pub retry_period: Duration,
}

impl Election {
    /// Upstream's times: 15 s, 10 s, 2 s.
    #[must_use]
    pub fn new(namespace: &str, name: &str, identity: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            identity: identity.to_owned(),
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }

    /// Short times, for a cluster in which failures are acted upon in seconds.
    #[must_use]
    pub fn fast(self) -> Self {
        Self {
            lease_duration: Duration::from_secs(6),
            renew_deadline: Duration::from_secs(4),
            retry_period: Duration::from_secs(1),
            ..self
        }
    }
}

/// What was last seen of the Lease, and since when it looks so.
#[derive(Debug, Clone)]
struct Seen {
    version: Option<String>,
    since: Instant,
}

/// What a candidate does about the Lease it sees.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Create,
    /// Write it: ours to renew (false), or free to take (true).
    Write {
        takes_over: bool,
    },
    Wait,
}

fn plan(lease: Option<&Lease>, election: &Election, unchanged: Duration) -> Step {
    let Some(lease) = lease else { return Step::Create };
    let spec = lease.spec.as_ref();
    let holder = spec.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
    if holder == election.identity {
        return Step::Write { takes_over: false };
    }
    let promised = spec.and_then(|spec| spec.lease_duration_seconds).unwrap_or(0);
    let promised = Duration::from_secs(u64::try_from(promised).unwrap_or(0));
    if holder.is_empty() || unchanged >= promised {
        return Step::Write { takes_over: true };
    }
    Step::Wait
}

fn written(lease: Option<Lease>, election: &Election, takes_over: bool, now: Timestamp) -> Lease {
    let mut lease = lease.unwrap_or_else(|| Lease {
        metadata: ObjectMeta {
            name: Some(election.name.clone()),
            namespace: Some(election.namespace.clone()),
            ..ObjectMeta::default()
        },
        spec: None,
    });
    let before = lease.spec.take().unwrap_or_default();
    let transitions = before.lease_transitions.unwrap_or(0) + i32::from(takes_over);
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(election.identity.clone()),
        lease_duration_seconds: i32::try_from(election.lease_duration.as_secs()).ok(),
        acquire_time: if takes_over { Some(MicroTime(now)) } else { before.acquire_time },
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(transitions),
        ..before
    });
    lease
}

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tried {
    /// The Lease is ours.
    Held,
    /// It is another one's.
    Others,
    /// It changed while we tried: whose it is shows the next look.
    Raced,
}

struct Candidate {
    api: Api<Lease>,
    election: Election,
    seen: Option<Seen>,
}

impl Candidate {
    async fn try_once(&mut self) -> Result<Tried, Error> {
        let lease = self.api.get_opt(&self.election.name).await?;
        let now = Instant::now();
        let version = lease.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
        let since = match &self.seen {
            Some(seen) if seen.version == version => seen.since,
            _ => now,
        };
        self.seen = Some(Seen { version, since });
        let outcome = match plan(lease.as_ref(), &self.election, now - since) {
            Step::Wait => return Ok(Tried::Others),
            Step::Create => {
                self.api.create(&written(None, &self.election, true, Timestamp::now())).await
            }
            Step::Write { takes_over } => {
                let lease = written(lease, &self.election, takes_over, Timestamp::now());
                self.api.replace(&self.election.name, &lease).await
            }
        };
        match outcome {
            Ok(_) => Ok(Tried::Held),
            Err(error) if error.is_conflict() || error.is_already_exists() => Ok(Tried::Raced),
            Err(error) => Err(error),
        }
    }

    /// Gives the Lease back, so that the next leader need not wait.
    async fn release(&self) {
        let Ok(Some(mut lease)) = self.api.get_opt(&self.election.name).await else { return };
        let Some(spec) = lease.spec.as_mut() else { return };
        if spec.holder_identity.as_deref() != Some(self.election.identity.as_str()) {
            return;
        }
        spec.holder_identity = None;
        spec.lease_duration_seconds = Some(1);
        if let Err(error) = self.api.replace(&self.election.name, &lease).await {
            debug!(lease = self.election.name, %error, "the lease is not given back");
        }
    }
}

/// Waits until this candidate leads, then runs `work` until it ends, the Lease is lost, or `cancel`.
///
/// `work` gets a token that is cancelled in the last two cases, and has to end soon then; and the client through which it
/// has to make its changes, which sends none once the Lease is lost. Returns `None` if the candidate never led, or lost the
/// Lease while it worked.
pub async fn lead<F, T>(
    client: Client,
    election: Election,
    cancel: CancellationToken,
    work: impl FnOnce(Client, CancellationToken) -> F,
) -> Option<T>
where
    F: Future<Output = T>,
{
    let api = Api::namespaced(client.clone(), &election.namespace);
    let mut candidate = Candidate { api, election, seen: None };
    let (lease, retry) = (candidate.election.name.clone(), candidate.election.retry_period);
    let mut renewed = loop {
        let sent = Instant::now();
        let tried = tokio::select! {
            () = cancel.cancelled() => return None,
            tried = tokio::time::timeout(candidate.election.renew_deadline, candidate.try_once()) => tried,
        };
        match tried {
            Ok(Ok(Tried::Held)) => break sent,
            Ok(Ok(Tried::Others | Tried::Raced)) => {}
            Ok(Err(error)) => debug!(lease, %error, "the lease is not taken yet"),
            Err(_) => debug!(lease, "the lease is not taken yet: no answer in time"),
        }
        tokio::select! {
            () = cancel.cancelled() => return None,
            () = tokio::time::sleep(retry) => {}
        }
    };
    info!(lease, identity = candidate.election.identity, "leading");
    let leading = cancel.child_token();
    let limit = candidate.election.renew_deadline;
    let fence = Fence::new(renewed + limit);
    let mut work = std::pin::pin!(work(client.behind(fence.clone()), leading.clone()));
    let mut pause = retry;
    let lost = loop {
        let until = renewed + limit;
        let renewal = async {
            tokio::time::sleep(std::mem::replace(&mut pause, retry)).await;
            let sent = Instant::now();
            candidate.try_once().await.map(|tried| (tried, sent))
        };
        tokio::select! {
            outcome = &mut work => {
                candidate.release().await;
                return Some(outcome);
            }
            renewal = tokio::time::timeout_at(until, renewal) => match renewal {
                Ok(Ok((Tried::Held, sent))) => {
                    renewed = sent;
                    fence.set(sent + limit);
                }
                Ok(Ok((Tried::Others, _))) => break true,
                Ok(Ok((Tried::Raced, _))) => pause = RACED_PAUSE,
                Ok(Err(error)) => debug!(lease, %error, "the lease is not renewed"),
                Err(_) => break true,
            },
            () = cancel.cancelled() => break false,
        }
    };
    if lost {
        fence.set(Instant::now());
    }
    leading.cancel();
    if lost {
        warn!(lease, "the lease is lost");
        work.await;
        return None;
    }
    let outcome = work.await;
    candidate.release().await;
    Some(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str) -> Lease {
        let mut election = Election::new("kube-system", "scheduler", holder);
        election.lease_duration = Duration::from_secs(15);
        written(None, &election, true, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn a_lease_is_taken_only_when_free_or_unchanged_for_its_whole_time() {
        let me = Election::new("kube-system", "scheduler", "me");
        assert_eq!(plan(None, &me, Duration::ZERO), Step::Create);
        assert_eq!(
            plan(Some(&held_by("me")), &me, Duration::ZERO),
            Step::Write { takes_over: false }
        );
        assert_eq!(plan(Some(&held_by("")), &me, Duration::ZERO), Step::Write { takes_over: true });
        assert_eq!(plan(Some(&held_by("you")), &me, Duration::from_secs(14)), Step::Wait);
        assert_eq!(
            plan(Some(&held_by("you")), &me, Duration::from_secs(15)),
            Step::Write { takes_over: true }
        );
    }
}
