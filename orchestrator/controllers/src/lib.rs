//! The control loops of a cluster, one module each: what users declare becomes what runs.
//!
//! Each module has one reconciler that looks at one object and what belongs to it; what it decides is a pure function
//! beside it. All read from one set of caches ([`context`]) and are woken by changes, never by a clock, except for
//! what only time tells (a node that went silent, a rollout that is late).
//!
//! A Deployment becomes ReplicaSets ([`deployment`]), a ReplicaSet becomes pods ([`replicaset`]), ready pods become
//! endpoints of Services ([`endpointslice`]), nodes get their certificates ([`certificates`]) for tokens that end
//! ([`bootstrap_token`]), pods leave dead nodes ([`node_lifecycle`], [`pod_gc`]), and what lost its owner is removed
//! ([`gc`], [`namespace`]).

mod bootstrap_token;
mod certificates;
mod context;
mod deployment;
mod endpointslice;
mod error;
mod expectations;
mod gc;
mod namespace;
mod node_lifecycle;
mod options;
mod pod_gc;
mod replicaset;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use orch_client::Client;
use orch_reconcile::{Election, Queue, Reconciler, lead};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use crate::certificates::Signers;
pub use crate::options::Options;

use crate::context::Context;

/// Name of the Lease that picks the process whose controllers work.
const LEASE: &str = "kube-controller-manager";

/// Why the controllers ended before they were told to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A loop panicked or ended.
    #[error("the {0} loop ended on its own")]
    Ended(String),
}

/// Runs all controllers until cancelled.
///
/// # Errors
/// A loop ended although nobody asked it to.
pub async fn run(client: Client, options: Options, cancel: CancellationToken) -> Result<(), Error> {
    let Some(identity) = options.leader_identity.clone() else {
        return work(client, options, cancel).await;
    };
    while !cancel.is_cancelled() {
        let election = Election::new("kube-system", LEASE, &identity);
        let election = if options.fast_election { election.fast() } else { election };
        let outcome = lead(client.clone(), election, cancel.clone(), |client, leading| {
            work(client, options.clone(), leading)
        });
        if let Some(outcome) = outcome.await {
            return outcome;
        }
    }
    Ok(())
}

async fn work(client: Client, options: Options, cancel: CancellationToken) -> Result<(), Error> {
    // Caches end with the loops, also when one of them ended on its own.
    let cancel = cancel.child_token();
    let _stop = cancel.clone().drop_guard();
    let cx = Arc::new(Context::new(client, options, &cancel));
    let kinds = gc::kinds(&cx);
    let mut loops = Loops { tasks: JoinSet::new(), cancel: cancel.clone() };
    // Queues fill while the caches do; nothing is done before all are full, so that an empty cache is never taken
    // for a cluster in which everything was deleted.
    let (namespaces, q1) = namespace::Namespaces::new(cx.clone(), &kinds);
    let (deployments, q2) = deployment::Deployments::new(cx.clone());
    let (replica_sets, q3) = replicaset::ReplicaSets::new(cx.clone());
    let (slices, q4) = endpointslice::EndpointSlices::new(cx.clone());
    let (nodes, q5) = node_lifecycle::Nodes::new(cx.clone());
    let (pod_gc, q6) = pod_gc::PodGc::new(cx.clone());
    let (collector, q7) = gc::Collector::new(kinds);
    let (tokens, q8) = bootstrap_token::Tokens::new(cx.clone());
    let signer = cx
        .options
        .signers
        .clone()
        .map(|signers| certificates::Certificates::new(cx.clone(), signers));
    let signer_synced = async {
        if let Some((signer, _)) = &signer {
            signer.synced().await;
        }
    };
    tokio::select! {
        () = async {
            cx.synced().await;
            collector.synced().await;
            tokens.synced().await;
            signer_synced.await;
        } => {}
        () = cancel.cancelled() => return Ok(()),
    }
    info!("the controllers' caches are filled");
    loops.spawn(namespaces, q1, 10);
    loops.spawn(deployments, q2, 5);
    loops.spawn(replica_sets, q3, 5);
    loops.spawn(slices, q4, 5);
    let (pauses, stop) = (nodes.clone(), cancel.clone());
    loops.tasks.spawn(async move {
        tokio::select! {
            () = pauses.listen_for_pauses() => {}
            () = stop.cancelled() => {}
        }
        "pulse"
    });
    loops.spawn(nodes, q5, 4);
    loops.spawn(pod_gc, q6, 1);
    loops.spawn(collector, q7, 20);
    loops.spawn(tokens, q8, 1);
    if let Some((signer, queue)) = signer {
        loops.spawn(signer, queue, 1);
    }
    let first = loops.tasks.join_next().await;
    if cancel.is_cancelled() {
        while loops.tasks.join_next().await.is_some() {}
        return Ok(());
    }
    let name = match first {
        Some(Ok(name)) => name.to_owned(),
        Some(Err(error)) => error.to_string(),
        None => "last".to_owned(),
    };
    cancel.cancel();
    while loops.tasks.join_next().await.is_some() {}
    Err(Error::Ended(name))
}

struct Loops {
    tasks: JoinSet<&'static str>,
    cancel: CancellationToken,
}

impl Loops {
    fn spawn<R: Reconciler>(
        &mut self,
        reconciler: Arc<R>,
        queue: Arc<Queue<String>>,
        workers: usize,
    ) {
        let cancel = self.cancel.clone();
        self.tasks.spawn(async move {
            orch_reconcile::run(reconciler, queue, workers, cancel).await;
            R::NAME
        });
    }
}
