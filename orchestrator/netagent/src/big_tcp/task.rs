//! When to look: when the overlay's routes change, when links or pods come, and now and then.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cni_netlink::Netlink;
use orch_config::Paths;
use parking_lot::Mutex;
use rtnetlink::MulticastGroup;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::kernel::{self, Attached, BigTcpError, Node};
use super::{PLAIN, Wanted, Why, decide, plan};
use crate::chain;
use crate::network::Switch;
use crate::status::{BigTcpStatus, NetStatus};

/// How often new pods are looked for; until then they send plain packets.
const POD_INTERVAL: Duration = Duration::from_secs(1);
/// A look at everything without a reason.
const RESYNC: Duration = Duration::from_secs(30);
/// Events that come together are one reason to look.
const GATHER: Duration = Duration::from_millis(100);

/// The sizes of a node's links. The overlay tells what is wanted, and the task keeps it so.
pub(crate) struct BigTcp {
    paths: Paths,
    status: Arc<watch::Sender<NetStatus>>,
    /// Held while sizes are set: what the overlay takes back, the task does not set again.
    state: Mutex<State>,
    look: Arc<Notify>,
}

#[derive(Default)]
struct State {
    wanted: Option<Wanted>,
    /// What the links were made to have, without a failure.
    size: Option<u32>,
    /// Links by which packets leave the node.
    outside: BTreeSet<u32>,
    /// When the runtime changed its memory of pods, and which pods it had then.
    memory: Option<SystemTime>,
    attached: Vec<Attached>,
    /// Pods that have been seen to, and whether they are on our bridge.
    done: BTreeMap<PathBuf, bool>,
}

impl State {
    /// Nothing of it is left in the kernel, and nothing is to be put there.
    fn is_idle(&self) -> bool {
        let is_plain = self.wanted.as_ref().is_none_or(Wanted::is_plain);
        is_plain && (self.wanted.is_none() || self.size == Some(PLAIN))
    }

    /// Takes up what is wanted from now on; whether it is something else.
    fn want(&mut self, wanted: &Wanted) -> bool {
        let is_news = self.wanted.as_ref() != Some(wanted);
        if is_news {
            self.wanted = Some(wanted.clone());
            self.outside.clear();
        }
        is_news
    }

    fn is_off(&self) -> bool {
        self.wanted.as_ref().is_some_and(|wanted| !wanted.setting.is_wanted())
    }
}

impl BigTcp {
    pub(crate) fn new(paths: Paths, status: Arc<watch::Sender<NetStatus>>) -> Self {
        Self { paths, status, state: Mutex::default(), look: Arc::default() }
    }

    /// The overlay is about to make these routes: sizes that one of them does not bear are taken back now.
    pub(crate) fn before(&self, wanted: &Wanted) {
        if !wanted.is_plain() {
            return;
        }
        let mut state = self.state.lock();
        let is_news = state.want(wanted);
        if is_news || !state.is_idle() {
            // Who was large is known from a former run only by a look at all of them.
            let whole = !state.is_idle();
            self.make(&mut state, whole);
        }
    }

    /// These routes are made.
    pub(crate) fn after(&self, wanted: &Wanted) {
        if self.state.lock().want(wanted) {
            self.look.notify_one();
        }
    }

    /// Keeps the sizes right until cancelled. They stay as they are when the agent ends: its routes do, too.
    pub(crate) async fn follow(self: Arc<Self>, cancel: CancellationToken) {
        let links = crate::links::watch([MulticastGroup::Link], self.look.clone(), cancel.clone());
        let links = tokio::spawn(links);
        let mut tick = interval(POD_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut resync = Instant::now();
        loop {
            let heard = tokio::select! {
                () = cancel.cancelled() => break,
                () = self.look.notified() => {
                    sleep(GATHER).await;
                    true
                }
                _ = tick.tick() => false,
            };
            let whole = resync.elapsed() >= RESYNC;
            if whole {
                resync = Instant::now();
            }
            let this = self.clone();
            // Not safe to drop half-way, so it is waited for; it takes milliseconds.
            if let Err(error) = tokio::task::spawn_blocking(move || this.look(heard, whole)).await {
                error!(%error, "the task of BIG TCP panicked");
                break;
            }
        }
        links.abort();
    }

    fn look(&self, heard: bool, whole: bool) {
        let mut state = self.state.lock();
        if state.is_idle() && (!whole || state.is_off()) {
            return;
        }
        let has_failed = state.size.is_none();
        if heard || whole || has_failed || self.memory() != state.memory {
            self.make(&mut state, whole);
        }
    }

    /// Makes the kernel's links have what is wanted, and says so in the status.
    fn make(&self, state: &mut State, whole: bool) {
        let Some(wanted) = state.wanted.clone() else { return };
        let (decision, outcome) = match self.reconcile(state, &wanted, whole) {
            Ok((decision, steps)) => (Some(decision), Ok(steps)),
            Err(error) => (None, Err(error)),
        };
        let size = decision.as_ref().map(|one| one.as_ref().copied().unwrap_or(PLAIN));
        let why = decision.as_ref().and_then(|one| one.as_ref().err());
        let mut problem = why
            .filter(|_| wanted.setting == Switch::On)
            .map(|why| format!("BIG TCP is not on: {why}"));
        match outcome {
            Ok(0) => {}
            Ok(steps) => info!(size, steps, "sizes of pods' packets reconciled"),
            Err(error) => problem = Some(format!("sizes of packets: {}", chain(&error))),
        }
        let now = BigTcpStatus {
            setting: wanted.setting.name().to_owned(),
            on: size.is_some_and(|size| size > PLAIN),
            size: size.unwrap_or_default(),
            pods: state.done.values().filter(|is_ours| **is_ours).count(),
            why: why.map(Why::to_string),
            problem,
        };
        self.status.send_if_modified(|status| {
            let changed = status.big_tcp != now;
            if let Some(problem) = now.problem.as_ref().filter(|_| changed) {
                warn!(problem, "packets of pods have not the size that they must have");
            }
            status.big_tcp = now;
            changed
        });
    }

    fn reconcile(
        &self,
        state: &mut State,
        wanted: &Wanted,
        whole: bool,
    ) -> Result<(Result<u32, Why>, usize), BigTcpError> {
        let netlink = Netlink::open()?;
        let node = Node::observe(&netlink)?;
        if whole || state.outside.is_empty() {
            state.outside = kernel::outside(&netlink, wanted.underlay)?;
        }
        let decision = decide(wanted, &node.links, node.bridge, &state.outside);
        let size = decision.as_ref().copied().unwrap_or(PLAIN);
        let is_new = state.size.take() != Some(size);
        if is_new || whole {
            state.done.clear();
        }
        self.remember_pods(state, is_new || whole)?;
        // A pod that is about to send more has no queue of its own. One that sends plain packets may have one.
        let shaped = if size > PLAIN { netlink.shaped_links()? } else { BTreeSet::new() };
        let mut seen = node.seen(&state.outside);
        let mut met = BTreeMap::new();
        // What fails for one pod is tried for the others all the same.
        let mut failed = None;
        for pod in state.attached.iter().filter(|pod| !state.done.contains_key(&pod.netns)) {
            match kernel::observe_pod(pod, &node, &shaped) {
                Ok(one) => {
                    met.insert(pod.netns.clone(), one.is_some());
                    seen.extend(one);
                }
                Err(error) => failed = failed.or(Some(error.into())),
            }
        }
        let steps = plan(&seen, size);
        for step in &steps {
            if let Err(error) = kernel::apply(&netlink, step) {
                failed = failed.or(Some(error));
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        state.done.append(&mut met);
        state.size = Some(size);
        Ok((decision, steps.len()))
    }

    /// When the runtime changed its memory of pods.
    fn memory(&self) -> Option<SystemTime> {
        let folder = self.paths.cni_cache_dir().join("results");
        std::fs::metadata(folder).and_then(|meta| meta.modified()).ok()
    }

    /// Reads which pods there are, if the runtime has changed its memory of them.
    fn remember_pods(&self, state: &mut State, anyway: bool) -> Result<(), BigTcpError> {
        let now = self.memory();
        if anyway || now != state.memory {
            state.attached = kernel::attached(&self.paths)?;
            state.memory = now;
            let there: BTreeSet<_> = state.attached.iter().map(|pod| pod.netns.clone()).collect();
            state.done.retain(|netns, _| there.contains(netns));
        }
        Ok(())
    }
}
