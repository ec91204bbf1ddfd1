//! When to look: when the API server, the plugin or the node's links have news, and now and then.
//!
//! A look is whole: endpoints are those that the plugin keeps on disk and in the maps, so a killed agent forgets nothing.
//! ADD is answered when the endpoint's row is in force, and refused when it cannot be in time; the pod stays closed then.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::{Ipv4Network, Ipv6Network};
use k8s_openapi::api::core::v1::Pod;
use orch_config::Paths;
use orch_policy::{Name, PodFacts};
use rtnetlink::MulticastGroup;
use tokio::net::UnixListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::caches::Caches;
use super::engine::Report;
use super::look::{Looked, State, look};
use super::socket::{self, Asked};
use super::start::{Ready, Start};
use super::waiting::{Waiting, answer, take};
use super::world::{Cluster, Local, name};
use super::{adopt, socket_path, strays};
use crate::lease::Network;
use crate::links;
use crate::status::{FastPathStatus, NetStatus};

/// Changes that come within this time are one.
const GATHER: Duration = Duration::from_millis(10);
/// A look without a reason: the net below all events.
const RESYNC: Duration = Duration::from_secs(10);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(2);
/// Requests on their way from the socket; each caller waits for its answer, so more do not come.
const REQUESTS: usize = 16;

/// Keeps the maps right.
pub(crate) struct Task {
    pub(crate) node_name: String,
    pub(crate) paths: Paths,
    pub(crate) caches: Caches,
    pub(crate) network: watch::Receiver<Option<Network>>,
    /// The pod network until etcd tells it.
    pub(crate) cluster: Ipv4Network,
    /// Its IPv6 side, once etcd has told of one.
    pub(crate) cluster6: Option<Ipv6Network>,
    pub(crate) vxlan_port: u16,
    pub(crate) service_cidr: Ipv4Network,
    /// The address of DNS is the node's own, also while nobody has put it there.
    pub(crate) dns_ips: Vec<IpAddr>,
    pub(crate) status: Arc<watch::Sender<NetStatus>>,
}

impl Task {
    /// Runs until cancelled. What is in the kernel stays in force.
    pub(crate) async fn run(mut self, start: Start, cancel: CancellationToken) {
        let Some(listener) = self.listen(&cancel).await else { return };
        let (sender, requests) = mpsc::channel(REQUESTS);
        let server = tokio::spawn(socket::serve(listener, sender, cancel.clone()));
        let look = Arc::new(Notify::new());
        let mut helpers = self.caches.notify(&look);
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        helpers.push(tokio::spawn(links::watch(groups, look.clone(), cancel.clone())));
        helpers.push(tokio::spawn(strays::follow(self.paths.clone(), cancel.clone())));
        let state = State { ready: start.ready, ..State::default() };
        self.follow(state, requests, look, &cancel).await;
        for helper in helpers {
            helper.abort();
        }
        if server.await.is_err() {
            warn!("the server of the policy socket panicked");
        }
    }

    async fn listen(&self, cancel: &CancellationToken) -> Option<UnixListener> {
        let path = socket_path(&self.paths);
        let mut told = false;
        loop {
            match socket::listen(&path) {
                Ok(listener) => return Some(listener),
                Err(error) => {
                    if !std::mem::replace(&mut told, true) {
                        error!(socket = %path.display(), %error, "new pods wait: the policy plugin cannot reach the agent");
                    }
                }
            }
            tokio::select! {
                () = cancel.cancelled() => return None,
                () = sleep(RETRY) => {}
            }
        }
    }

    async fn follow(
        &mut self,
        mut state: State,
        mut requests: mpsc::Receiver<Asked>,
        look: Arc<Notify>,
        cancel: &CancellationToken,
    ) {
        let mut tick = interval(RESYNC);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut waiting: Vec<Waiting> = Vec::new();
        let mut complained: Option<String> = None;
        let mut known = false;
        let mut adopting: Option<JoinHandle<Vec<String>>> = None;
        let mut adopt_now = true;
        let mut unpoliced: Vec<String> = Vec::new();
        while !cancel.is_cancelled() {
            let cluster = self.caches.are_synced().then(|| self.caches.list());
            let started = Instant::now();
            let (back, outcome) = match self.look(state, cluster.clone()).await {
                Some(done) => done,
                None => return,
            };
            state = back;
            // Between looks there is as much time as a look takes.
            let mut rested = Instant::now() + started.elapsed();
            match &outcome {
                Ok(looked) => {
                    if complained.take().is_some() {
                        info!("policies follow the cluster again");
                    }
                    for link in &looked.new_wires {
                        debug!(link, "what leaves the node here is judged");
                    }
                    if looked.report.is_some() && !std::mem::replace(&mut known, true) {
                        info!("pods and policies are known");
                    }
                }
                Err(why) => {
                    if complained.as_ref() != Some(why) {
                        error!(why, "policies do not follow the cluster; trying again");
                        complained = Some(why.clone());
                    }
                    rested = Instant::now() + RETRY;
                    look.notify_one();
                }
            }
            self.report_fast_path(outcome.as_ref().ok().map(|looked| &looked.fast_path));
            let report = outcome.as_ref().ok().and_then(|looked| looked.report.clone());
            waiting = answer(waiting, report.as_ref(), complained.as_deref());
            self.report(report.as_ref(), complained.as_deref(), &unpoliced);
            if let Some(done) = adopting.take_if(|task| task.is_finished()) {
                unpoliced = done.await.unwrap_or_else(|error| vec![error.to_string()]);
                self.report(report.as_ref(), complained.as_deref(), &unpoliced);
            }
            if adopt_now
                && adopting.is_none()
                && let (Some(cluster), Some(_)) = (&cluster, &report)
            {
                adopt_now = false;
                adopting = Some(self.adopt(cluster, look.clone()));
            }

            let first = waiting.iter().map(|one| one.until).min();
            let until = first.unwrap_or_else(|| Instant::now() + RESYNC);
            let gather = tokio::select! {
                () = cancel.cancelled() => return,
                asked = requests.recv() => match asked {
                    Some(asked) => {
                        waiting.extend(take(asked, &self.paths, known, complained.as_deref(), report.as_ref()));
                        false
                    }
                    None => return,
                },
                () = look.notified() => true,
                changed = self.network.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    true
                }
                () = sleep_until(until), if first.is_some() => false,
                _ = tick.tick() => {
                    adopt_now = true;
                    false
                }
            };
            if gather {
                // A request does not wait for what is being gathered.
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = sleep_until(rested.max(Instant::now() + GATHER)) => {}
                    asked = requests.recv() => match asked {
                        Some(asked) => waiting.extend(take(asked, &self.paths, known, complained.as_deref(), report.as_ref())),
                        None => return,
                    },
                }
            }
        }
    }

    /// One look, beside the async workers: writes of maps wait for the kernel.
    async fn look(
        &mut self,
        mut state: State,
        cluster: Option<Cluster>,
    ) -> Option<(State, Result<Looked, String>)> {
        if let Some(network) = &*self.network.borrow_and_update() {
            if let Some(v4) = network.config.v4 {
                self.cluster = v4.network;
            }
            self.cluster6 = network.config.v6.map(|v6| v6.network);
            self.vxlan_port = network.config.port;
        }
        let local = Local {
            node: self.node_name.clone(),
            addresses: self.dns_ips.clone(),
            endpoints: Vec::new(),
            pod_network: Some(self.cluster),
            pod_network6: self.cluster6,
            service_cidr: Some(self.service_cidr),
        };
        let (paths, port) = (self.paths.clone(), self.vxlan_port);
        let config = self.network.borrow().as_ref().map(|network| network.config.clone());
        // Not safe to drop half-way, so it is waited for; it takes milliseconds.
        let work = move || {
            let outcome = look(&mut state, &paths, cluster, local, port).map(|looked| {
                // Until etcd has told what is wanted, it stays as a former run left it.
                let State { ready, netlink, fast_path, .. } = &mut state;
                let (Some(config), Some(Ready { pins, engine }), Some(netlink)) =
                    (config, ready, netlink)
                else {
                    return looked;
                };
                let fast_path = fast_path.follow(pins, engine.maps(), netlink, &config);
                Looked { fast_path, ..looked }
            });
            (state, outcome)
        };
        tokio::task::spawn_blocking(work).await.ok()
    }

    /// Calls the plugin for pods that came without it; gives what stays open.
    fn adopt(&self, cluster: &Cluster, look: Arc<Notify>) -> JoinHandle<Vec<String>> {
        let here = |pod: &&Arc<Pod>| {
            let spec = pod.spec.as_ref();
            spec.and_then(|spec| spec.node_name.as_deref()) == Some(&self.node_name)
        };
        let wanted: BTreeSet<Name> = cluster
            .pods
            .iter()
            .filter(here)
            .filter(|pod| {
                let facts = PodFacts::from_api(pod);
                !facts.host_network && !facts.finished && !facts.leaving
            })
            .map(|pod| name(&pod.metadata))
            .collect();
        let paths = self.paths.clone();
        tokio::task::spawn_blocking(move || {
            let open = adopt::adopt_all(&paths, &wanted);
            look.notify_one();
            open
        })
    }

    fn report_fast_path(&self, now: Option<&FastPathStatus>) {
        let Some(now) = now else { return };
        self.status.send_if_modified(|status| {
            let changed = status.fast_path != *now;
            if changed && let Some(problem) = &now.problem {
                warn!(problem, "the fast path is not as it must be; packets go the whole way");
            }
            status.fast_path = now.clone();
            changed
        });
    }

    fn report(&self, report: Option<&Report>, complaint: Option<&str>, unpoliced: &[String]) {
        self.status.send_if_modified(|status| {
            let before = status.policy.clone();
            let policy = &mut status.policy;
            if let Some(report) = report {
                policy.endpoints = report.endpoints.len();
                policy.revision = report.revision;
                policy.policies = self.caches.policies();
                policy.enforced = true;
            }
            policy.problems = complaint.map(str::to_owned).into_iter().collect();
            policy.problems.extend(
                report
                    .iter()
                    .flat_map(|report| &report.locked)
                    .map(|text| format!("closed, its policies do not fit: {text}")),
            );
            policy.problems.extend(unpoliced.iter().cloned());
            status.policy != before
        });
    }
}
