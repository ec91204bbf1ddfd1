//! When to look: when the API server, the plugin or the node's links have news, and now and then.
//!
//! A look is whole: endpoints are those that the plugin keeps on disk and in the maps, so a killed agent forgets nothing.
//! ADD is answered when the endpoint's row is in force, and refused when it cannot be in time; the pod stays closed then.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cni_netlink::Netlink;
use futures::StreamExt as _;
use ipnetwork::{Ipv4Network, Ipv6Network};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use orch_api::cluster_policy::ClusterNetworkPolicy;
use orch_config::Paths;
use orch_ebpf_loader::{
    Announcement, Answer, Kept, Pins, Request, install, retire_others, sweep, uninstall,
};
use orch_ebpf_maps::state;
use orch_policy::{Name, PodFacts};
use orch_reconcile::{Informer, Informers};
use rtnetlink::MulticastGroup;
use tokio::net::UnixListener;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::engine::{Engine, Report};
use super::node::{self, Seen};
use super::socket::{self, Asked};
use super::world::{Cluster, Local, Reader, desired_addresses, name};
use super::{Mode, PLUGIN, adopt, explain, metrics, rules_file, socket_path, state_dir};
use crate::chain;
use crate::fast_path::FastPath;
use crate::files::ensure_content;
use crate::lease::Network;
use crate::status::{FastPathStatus, NetStatus, PolicyStatus};

/// Changes that come within this time are one.
const GATHER: Duration = Duration::from_millis(10);
/// A look without a reason: the net below all events.
const RESYNC: Duration = Duration::from_secs(10);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(2);
/// The plugin waits for 10 s; a reason is better than silence.
const ANSWER_WITHIN: Duration = Duration::from_secs(9);
/// Requests on their way from the socket; each caller waits for its answer, so more do not come.
const REQUESTS: usize = 16;

/// What the setting came to on this node.
pub(crate) struct Start {
    /// Whether pods get the plugin.
    pub(crate) enforced: bool,
    /// Programs and maps, if they could be put into the kernel.
    ready: Option<Ready>,
    status: PolicyStatus,
}

struct Ready {
    pins: Pins,
    engine: Engine,
}

impl Start {
    /// Puts programs and maps into the kernel, or takes them out.
    pub(crate) async fn new(mode: Mode, paths: &Paths) -> Self {
        let own = paths.clone();
        let made = tokio::task::spawn_blocking(move || Self::decide(mode, &own)).await;
        made.unwrap_or_else(|error| Self {
            // Closed rather than open by accident.
            enforced: mode != Mode::Off,
            ready: None,
            status: PolicyStatus {
                problems: vec![format!("the policy programs: {error}")],
                ..PolicyStatus::default()
            },
        })
    }

    fn decide(mode: Mode, paths: &Paths) -> Self {
        let pins = Pins::below(paths.root());
        let mut status = PolicyStatus { mode: mode.to_string(), ..PolicyStatus::default() };
        if mode == Mode::Off {
            match remove(&pins, paths) {
                Ok(true) => info!("NetworkPolicies are no longer enforced on this node"),
                Ok(false) => {}
                Err(why) => {
                    error!(why, "policy programs of an earlier run stay in force");
                    status.problems.push(why);
                }
            }
            return Self { enforced: false, ready: None, status };
        }
        // A node that enforced policies does not cease to because something is broken now.
        let was_enforced = pins.are_there();
        let ready = if paths.cni_bin_dir().join(PLUGIN).exists() {
            prepare(&pins)
        } else {
            Err(format!("the plugin \"{PLUGIN}\" is not in {}", paths.cni_bin_dir().display()))
        };
        match ready {
            Ok(ready) => {
                info!("NetworkPolicies are enforced on this node");
                Self { enforced: true, ready: Some(ready), status }
            }
            Err(why) if mode == Mode::Auto && !was_enforced => {
                warn!(why, "NetworkPolicies are not enforced on this node");
                status.problems.push(format!("NetworkPolicies are not enforced: {why}"));
                Self { enforced: false, ready: None, status }
            }
            Err(why) => {
                error!(why, "NetworkPolicies cannot be enforced; new pods wait");
                status.problems.push(format!("NetworkPolicies cannot be enforced: {why}"));
                Self { enforced: true, ready: None, status }
            }
        }
    }

    /// What people are told until the first look.
    pub(crate) fn status(&self) -> PolicyStatus {
        PolicyStatus { enforced: self.ready.is_some(), ..self.status.clone() }
    }
}

fn prepare(pins: &Pins) -> Result<Ready, String> {
    let made = install(pins).and_then(Engine::new).map_err(|error| chain(&error))?;
    metrics::tell(pins);
    Ok(Ready { pins: pins.clone(), engine: made })
}

/// Takes out what an earlier run put into the kernel; true if there was something.
fn remove(pins: &Pins, paths: &Paths) -> Result<bool, String> {
    let was_there = uninstall(pins).map_err(|error| chain(&error))?;
    for leftover in [state_dir(paths), socket_path(paths)] {
        let gone = if leftover.is_dir() {
            std::fs::remove_dir_all(&leftover)
        } else {
            std::fs::remove_file(&leftover)
        };
        match gone {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("remove {}: {error}", leftover.display()));
            }
            _ => {}
        }
    }
    Ok(was_there)
}

/// The caches that policy is made from.
pub(crate) struct Caches {
    pods: Informer<Pod>,
    namespaces: Informer<Namespace>,
    policies: Informer<NetworkPolicy>,
    cluster_policies: Informer<ClusterNetworkPolicy>,
    nodes: Informer<Node>,
    services: Informer<Service>,
}

impl Caches {
    pub(crate) fn new(informers: &Informers) -> Self {
        Self {
            pods: informers.of(),
            namespaces: informers.of(),
            policies: informers.of(),
            cluster_policies: informers.of(),
            nodes: informers.of(),
            services: informers.of(),
        }
    }

    fn are_synced(&self) -> bool {
        self.pods.is_synced()
            && self.namespaces.is_synced()
            && self.policies.is_synced()
            && self.cluster_policies.is_synced()
            && self.nodes.is_synced()
            && self.services.is_synced()
    }

    fn list(&self) -> Cluster {
        Cluster {
            pods: self.pods.list(),
            namespaces: self.namespaces.list(),
            policies: self.policies.list(),
            cluster_policies: self.cluster_policies.list(),
            nodes: self.nodes.list(),
            services: self.services.list(),
        }
    }

    /// Notifies of the caches' news until they end.
    fn notify(&self, look: &Arc<Notify>) -> Vec<JoinHandle<()>> {
        let receivers = [
            self.pods.changed(),
            self.namespaces.changed(),
            self.policies.changed(),
            self.cluster_policies.changed(),
            self.nodes.changed(),
            self.services.changed(),
        ];
        let follow = |mut receiver: watch::Receiver<u64>| {
            let look = look.clone();
            tokio::spawn(async move {
                while receiver.changed().await.is_ok() {
                    look.notify_one();
                }
            })
        };
        receivers.into_iter().map(follow).collect()
    }
}

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

/// What goes from look to look.
#[derive(Default)]
struct State {
    ready: Option<Ready>,
    netlink: Option<Netlink>,
    reader: Reader,
    fast_path: FastPath,
}

/// What a look came to.
#[derive(Default)]
struct Looked {
    /// `None` as long as the caches are not filled.
    report: Option<Report>,
    new_wires: Vec<String>,
    fast_path: FastPathStatus,
}

/// An ADD that waits.
struct Waiting {
    made: Announcement,
    answer: oneshot::Sender<Answer>,
    until: Instant,
}

impl Task {
    /// Runs until cancelled. What is in the kernel stays in force.
    pub(crate) async fn run(mut self, start: Start, cancel: CancellationToken) {
        let Some(listener) = self.listen(&cancel).await else { return };
        let (sender, requests) = mpsc::channel(REQUESTS);
        let server = tokio::spawn(socket::serve(listener, sender, cancel.clone()));
        let look = Arc::new(Notify::new());
        let mut helpers = self.caches.notify(&look);
        helpers.push(tokio::spawn(watch_links(look.clone(), cancel.clone())));
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
            let mut pause = GATHER.max(started.elapsed());
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
                    pause = RETRY;
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
                    () = sleep(pause) => {}
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
            let open = adopt_all(&paths, &wanted);
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
                policy.policies =
                    self.caches.policies.list().len() + self.caches.cluster_policies.list().len();
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

fn look(
    state: &mut State,
    paths: &Paths,
    cluster: Option<Cluster>,
    mut local: Local,
    vxlan_port: u16,
) -> Result<Looked, String> {
    if state.ready.is_none() {
        state.ready = Some(prepare(&Pins::below(paths.root()))?);
        info!("NetworkPolicies are enforced on this node");
    }
    let Some(Ready { pins, engine }) = &mut state.ready else {
        return Err("no programs".to_owned());
    };
    let netlink = match state.netlink.take() {
        Some(netlink) => netlink,
        None => Netlink::open().map_err(|error| chain(&error))?,
    };
    let seen = node::observe(&netlink).map_err(|error| chain(&error))?;
    // After a failure it is opened anew: it may hold the rest of an answer.
    state.netlink = Some(netlink);
    let new_wires = node::ensure_wires(pins, &seen).map_err(|error| chain(&error))?;
    local.addresses.extend(&seen.addresses);
    local.endpoints = endpoints(engine, pins, paths, &seen)?;
    let Some(cluster) = cluster else { return Ok(Looked { new_wires, ..Looked::default() }) };
    let changed = state.reader.read(&cluster, &local);
    let addresses = desired_addresses(state.reader.world(), &cluster, &local);
    engine.set_addresses(&addresses, vxlan_port).map_err(|error| chain(&error))?;
    let report =
        engine.look(&state.reader, changed, &local.endpoints).map_err(|error| chain(&error))?;
    if changed {
        tell_rules(engine, paths);
    }
    if report.written > 0 {
        debug!(revision = report.revision, rows = report.written, "policies are in force");
    }
    Ok(Looked { report: Some(report), new_wires, ..Looked::default() })
}

/// What the numbers in flow events mean, for `orchctl net flows`.
fn tell_rules(engine: &Engine, paths: &Paths) {
    let rules: BTreeMap<u32, String> =
        engine.compiled().rules.iter().map(|(id, rule)| (id.0, rule.to_string())).collect();
    let text = serde_json::to_vec(&rules).expect("plain data has a JSON form");
    if let Err(error) = ensure_content(&rules_file(paths), &text) {
        warn!(error = %chain(&error), "the names of policy rules are not told");
    }
}

/// The endpoints that are there, after those that are gone were removed. The maps are read before the files: the plugin
/// writes its file first.
fn endpoints(
    engine: &mut Engine,
    pins: &Pins,
    paths: &Paths,
    seen: &Seen,
) -> Result<Vec<Announcement>, String> {
    let text = |error: orch_ebpf_loader::Error| chain(&error);
    let rows = engine.maps().endpoints().map_err(text)?;
    let kept = Kept::everything(&state_dir(paths)).map_err(text)?;
    let announced: Vec<Announcement> = kept.iter().map(|(_, one)| one.clone()).collect();
    let gone = |ifindex: u32| !seen.links.contains(&ifindex) && !link_exists(ifindex);
    let swept = engine.sweep(&rows, &announced, gone).map_err(text)?;
    for (file, one) in &kept {
        if gone(one.ifindex) {
            Kept::forget(file).map_err(text)?;
        }
    }
    // Pins of a link that went after the plugin's DEL, too.
    sweep(pins, |ifindex| !gone(ifindex)).map_err(text)?;
    if swept > 0 {
        debug!(endpoints = swept, "endpoints of links that are gone were removed");
    }
    Ok(announced)
}

/// Asks the kernel again: a link may have been made since all were listed.
fn link_exists(ifindex: u32) -> bool {
    nix::net::if_::if_indextoname(ifindex).is_ok()
}

/// Takes a request: answers at once, or gives what has to wait for a look.
fn take(
    asked: Asked,
    paths: &Paths,
    known: bool,
    complaint: Option<&str>,
    report: Option<&Report>,
) -> Option<Waiting> {
    let answer = match asked.request {
        Request::Add(made) => {
            let until = Instant::now() + ANSWER_WITHIN;
            return Some(Waiting { made, answer: asked.answer, until });
        }
        Request::Explain(about) => {
            let paths = paths.clone();
            // Programs are loaded for it; nothing else waits for that, and whoever gave up needs no answer.
            tokio::task::spawn_blocking(move || {
                let said = explain::explain(&paths, &about);
                drop(asked.answer.send(said.map_or_else(Answer::Refused, Answer::Explained)));
            });
            return None;
        }
        // The maps are the plugin's work; the look that follows sees what is left.
        Request::Del { .. } => Answer::Done { revision: revision(report) },
        Request::Status => match (complaint, known) {
            (Some(why), _) => Answer::Refused(why.to_owned()),
            (None, false) => Answer::Refused(UNKNOWN.to_owned()),
            (None, true) => Answer::Done { revision: revision(report) },
        },
    };
    // One that gave up needs no answer.
    let _ = asked.answer.send(answer);
    None
}

const UNKNOWN: &str =
    "pods and policies are not known yet; see whether the node reaches the API server";

fn revision(report: Option<&Report>) -> u64 {
    report.map_or(0, |report| report.revision)
}

/// Answers what can be answered; gives the rest.
fn answer(waiting: Vec<Waiting>, report: Option<&Report>, complaint: Option<&str>) -> Vec<Waiting> {
    let mut rest = Vec::new();
    for one in waiting {
        let row = report.and_then(|report| report.endpoints.get(&one.made.ifindex));
        let row = row.filter(|row| row.uid == one.made.uid);
        let late = Instant::now() >= one.until;
        let said = match (row.map(|row| row.state), report) {
            (Some(state::READY), Some(report)) => Answer::Done { revision: report.revision },
            (Some(state::LOCKED), _) => {
                Answer::Refused("the pod's policies do not fit into the kernel's maps".to_owned())
            }
            (None, Some(_)) => Answer::Refused("the endpoint is gone".to_owned()),
            _ if !late => {
                rest.push(one);
                continue;
            }
            (Some(_), _) => Answer::Refused(format!(
                "the API server has not told of the pod {} yet",
                one.made
                    .pod
                    .as_ref()
                    .map_or_else(String::new, |pod| format!("{}/{}", pod.namespace, pod.name))
            )),
            (None, None) => Answer::Refused(complaint.unwrap_or(UNKNOWN).to_owned()),
        };
        let _ = one.answer.send(said);
    }
    rest
}

fn adopt_all(paths: &Paths, wanted: &BTreeSet<Name>) -> Vec<String> {
    let found = match adopt::find(paths, |pod| wanted.contains(pod)) {
        Ok(found) => found,
        Err(why) => return vec![format!("pods without policy are not looked for: {why}")],
    };
    let mut open = Vec::new();
    let mut adopted = BTreeSet::new();
    for (pod, attachment) in found {
        match adopt::adopt(paths, &attachment) {
            Ok(()) => drop(adopted.insert(pod)),
            Err(error) => {
                warn!(%pod, %error, "no policy applies to a pod that was started without the policy plugin");
                open.push(format!("no policy applies to pod {pod}: {error}"));
            }
        }
    }
    if !adopted.is_empty() {
        info!(pods = adopt::list(&adopted), "pods that were started without policy have it now");
    }
    if open.is_empty() {
        match retire_others(&Pins::below(paths.root())) {
            Ok(true) => info!("policy programs of an earlier version are gone"),
            Ok(false) => {}
            Err(error) => open.push(format!("policy programs of an earlier version stay: {error}")),
        }
    }
    open
}

/// Notifies when links or addresses change; a broken socket is a reason to look, and is opened again.
async fn watch_links(look: Arc<Notify>, cancel: CancellationToken) {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    while !cancel.is_cancelled() {
        match rtnetlink::new_multicast_connection(&groups) {
            Ok((connection, _handle, mut messages)) => {
                let mut connection = std::pin::pin!(connection);
                loop {
                    tokio::select! {
                        () = cancel.cancelled() => return,
                        () = &mut connection => break,
                        message = messages.next() => {
                            if message.is_none() {
                                break;
                            }
                            look.notify_one();
                        }
                    }
                }
                warn!("the kernel's news of links were cut off; looking now and then instead");
            }
            Err(error) => {
                warn!(%error, "the kernel's news of links are not heard; looking now and then instead");
            }
        }
        look.notify_one();
        tokio::select! {
            () = cancel.cancelled() => {}
            () = sleep(RETRY) => {}
        }
    }
}
