//! Services at connect time: the maps of the socket programs follow the Services.
//!
//! What is in the maps is a part of what nftables does, never more: TCP, and UDP without affinity, from pods to cluster IPs.
//! All else, and whatever is not in the maps (yet), finds its backend by nftables as before. So an empty map, a full one or
//! an agent that is away costs time, but no connection.
//!
//! [`plan`] is pure. Which pods there are is read from what the runtime remembers of their ADD.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cni_invoke::Cni;
use cni_netlink::{NetNs, NetlinkError};
use orch_config::Paths;
use orch_ebpf_loader::{
    Error, Pins, Services, cgroup_root, install_services, network_namespace_cookie,
    uninstall_services,
};
use orch_ebpf_maps::{Backend, BackendKey, Frontend, FrontendKey, Member};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::model::{Port, Protocol};
use crate::status::{ConnectTimeStatus, NetStatus};
use crate::{Mode, chain};

/// How often new pods are looked for. Until then nftables serves them, which has a memory of its own of clients; a container
/// takes longer to start.
const POD_INTERVAL: Duration = Duration::from_millis(100);
/// Longest tick of the clock of files.
const FILE_CLOCK: Duration = Duration::from_millis(20);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// The flag's words: packets are translated, connections where the kernel can, or connections.
const WORDS: [&str; 3] = ["nftables", "auto", "ebpf"];

/// Reads how pods reach Services.
///
/// # Errors
/// Names the words.
pub fn parse_mode(text: &str) -> Result<Mode, String> {
    Mode::parse(text, WORDS)
}

/// What the maps hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    frontends: BTreeMap<FrontendKey, Frontend>,
    backends: BTreeMap<BackendKey, Backend>,
    members: BTreeSet<Member>,
}

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A backend under a number that no frontend names yet.
    SetBackend(BackendKey, Backend),
    /// A frontend may lead to this backend.
    SetMember(Member),
    /// From here on pods get the backends of this number.
    SetFrontend(FrontendKey, Frontend),
    /// Nftables serves it, or nobody.
    RemoveFrontend(FrontendKey),
    /// No frontend names its number any more.
    RemoveBackend(BackendKey),
    /// The frontend may not lead there any more.
    RemoveMember(Member),
}

/// Where a frontend leads.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    backends: Vec<Backend>,
    affinity_secs: u32,
}

impl Target {
    fn members(&self, to: FrontendKey) -> impl Iterator<Item = Member> {
        self.backends.iter().map(move |backend| Member { to, backend: *backend })
    }
}

/// The connections that the maps serve. Pure.
fn wanted(ports: &[Port]) -> BTreeMap<FrontendKey, Target> {
    let mut wanted = BTreeMap::new();
    for port in ports {
        let key = match (port.protocol, port.affinity) {
            (Protocol::Tcp, _) => FrontendKey::tcp,
            (Protocol::Udp, None) => FrontendKey::udp,
            // A pod's connected sockets have their backend from nftables, which remembers the pod for all of them.
            (Protocol::Udp, Some(_)) | (Protocol::Sctp, _) => continue,
        };
        for port in [false, true].into_iter().filter_map(|v6| port.in_family(v6)) {
            let pool = port.pool(port.internal_local);
            let backends: Vec<Backend> =
                pool.iter().map(|one| Backend::new(one.ip, one.port)).collect();
            if backends.is_empty() {
                continue;
            }
            // A day at most, as the API has it; one that is shorter than a second is none.
            let affinity_secs = port.affinity.map_or(0, |limit| limit.as_secs());
            let affinity_secs = u32::try_from(affinity_secs).unwrap_or(u32::MAX);
            wanted.extend(port.cluster_ips.iter().map(|ip| {
                (key(*ip, port.port), Target { backends: backends.clone(), affinity_secs })
            }));
        }
    }
    wanted
}

/// From what the maps hold to what they should hold, in an order in which no reader sees a half. Pure.
#[must_use]
pub fn plan(have: &State, ports: &[Port]) -> Vec<Step> {
    let wanted = wanted(ports);
    let held = |frontend: &Frontend| -> Target {
        let from = BackendKey { service: frontend.service, slot: 0 };
        let to = BackendKey { service: frontend.service, slot: frontend.count };
        let backends = have.backends.range(from..to).map(|(_, backend)| *backend).collect();
        Target { backends, affinity_secs: frontend.affinity_secs }
    };
    let used = have.backends.keys().map(|key| key.service);
    let mut next = used.chain(have.frontends.values().map(|one| one.service)).max().unwrap_or(0);
    let named: BTreeSet<u32> = have.frontends.values().map(|one| one.service).collect();
    // What no frontend has come to name makes room first.
    let (former, orphans): (Vec<BackendKey>, Vec<BackendKey>) =
        have.backends.keys().partition(|key| named.contains(&key.service));
    let mut kept = BTreeSet::new();
    let mut steps: Vec<Step> = orphans.into_iter().map(Step::RemoveBackend).collect();
    for (key, target) in &wanted {
        if let Some(frontend) = have.frontends.get(key)
            && held(frontend) == *target
        {
            kept.insert(frontend.service);
            continue;
        }
        // Numbers wrap after four thousand million changes; those in use are the newest.
        next = next.wrapping_add(1);
        let (service, backends) = (next, &target.backends);
        let slots = (0..).zip(backends);
        steps.extend(
            slots.map(|(slot, backend)| Step::SetBackend(BackendKey { service, slot }, *backend)),
        );
        let new = target.members(*key).filter(|member| !have.members.contains(member));
        steps.extend(new.map(Step::SetMember));
        let count = u32::try_from(backends.len()).unwrap_or(u32::MAX);
        let affinity_secs = target.affinity_secs;
        steps.push(Step::SetFrontend(*key, Frontend { service, count, affinity_secs }));
    }
    let gone = have.frontends.keys().filter(|key| !wanted.contains_key(key));
    steps.extend(gone.map(|key| Step::RemoveFrontend(*key)));
    let unused = former.into_iter().filter(|key| !kept.contains(&key.service));
    steps.extend(unused.map(Step::RemoveBackend));
    let members = wanted.iter().flat_map(|(key, target)| target.members(*key)).collect();
    let former = have.members.difference(&members);
    steps.extend(former.map(|member| Step::RemoveMember(*member)));
    steps
}

/// Carries the steps of a plan out. Where a write is refused for want of room, its frontend is taken out instead, which may be
/// there with backends of before, and the others go on; returns the first such refusal.
///
/// # Errors
/// Something cannot be removed, so what the maps hold is not known.
fn carry_out<E>(
    steps: &[Step],
    mut write: impl FnMut(Step) -> Result<(), E>,
) -> Result<Option<E>, E> {
    // What a frontend needs comes right before it.
    let (mut lacks, mut refused) = (false, None);
    for step in steps {
        match *step {
            Step::SetBackend(..) | Step::SetMember(_) if lacks => {}
            Step::SetBackend(..) | Step::SetMember(_) => {
                if let Err(error) = write(*step) {
                    lacks = true;
                    refused.get_or_insert(error);
                }
            }
            Step::SetFrontend(key, _) => {
                let error = if lacks { None } else { write(*step).err() };
                if lacks || error.is_some() {
                    write(Step::RemoveFrontend(key))?;
                }
                lacks = false;
                refused = refused.or(error);
            }
            Step::RemoveFrontend(_) | Step::RemoveBackend(_) | Step::RemoveMember(_) => {
                write(*step)?;
            }
        }
    }
    Ok(refused)
}

impl State {
    /// Reads what the maps hold.
    fn observe(maps: &Services) -> Result<Self, Error> {
        Ok(Self {
            frontends: maps.frontends()?.into_iter().collect(),
            backends: maps.backends()?.into_iter().collect(),
            members: maps.members()?.into_iter().collect(),
        })
    }

    fn apply(&mut self, maps: &mut Services, step: Step) -> Result<(), Error> {
        match step {
            Step::SetBackend(key, backend) => {
                maps.set_backend(key, backend)?;
                self.backends.insert(key, backend);
            }
            Step::SetMember(member) => {
                maps.set_member(member)?;
                self.members.insert(member);
            }
            Step::SetFrontend(key, frontend) => {
                maps.set_frontend(key, frontend)?;
                self.frontends.insert(key, frontend);
            }
            Step::RemoveFrontend(key) => {
                maps.remove_frontend(key)?;
                self.frontends.remove(&key);
            }
            Step::RemoveBackend(key) => {
                maps.remove_backend(key)?;
                self.backends.remove(&key);
            }
            Step::RemoveMember(member) => {
                maps.remove_member(member)?;
                self.members.remove(&member);
            }
        }
        Ok(())
    }
}

/// The programs and their maps, and what we know of them.
pub struct ConnectTime {
    maps: Services,
    /// Nothing after a failure.
    state: Option<State>,
}

impl ConnectTime {
    /// Puts the programs into the kernel, or takes over those of an earlier run.
    ///
    /// # Errors
    /// Why this kernel or machine cannot.
    pub fn install(paths: &Paths) -> Result<Self, String> {
        network_namespace_cookie()
            .map_err(|error| format!("the kernel has no cookies of network namespaces: {error}"))?;
        let root = cgroup_root().ok_or("no cgroup tree (v2) is mounted")?;
        let maps = install_services(&Pins::services_below(paths.root()), &root)
            .map_err(|error| chain(&error))?;
        Ok(Self { maps, state: None })
    }

    /// Makes the maps hold these ports; says how many writes that took.
    ///
    /// # Errors
    /// The kernel's first refusal. A Service for which there is no room is served by nftables, the others are in force.
    pub fn apply(&mut self, ports: &[Port]) -> Result<usize, Error> {
        let mut state = match self.state.take() {
            Some(state) => state,
            None => State::observe(&self.maps)?,
        };
        let steps = plan(&state, ports);
        let refused = carry_out(&steps, |step| state.apply(&mut self.maps, step))?;
        self.state = Some(state);
        refused.map_or(Ok(steps.len()), Err)
    }

    /// Makes these the pods, by the paths of their network namespaces. One that is gone is no pod.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_pods(&mut self, netns: &[PathBuf]) -> Result<(), Error> {
        let cookies: BTreeSet<u64> = netns.iter().filter_map(|path| cookie(path).ok()).collect();
        self.maps.set_pod_namespaces(&cookies)
    }
}

fn cookie(netns: &Path) -> Result<u64, NetlinkError> {
    let netns = NetNs::open(netns)?;
    let read = netns.run(|| Ok::<_, NetlinkError>(network_namespace_cookie().ok()))?;
    read.ok_or_else(|| NetlinkError::NotANetNs { path: netns.path().to_owned() })
}

/// Takes the programs out of the kernel; true if there were some.
///
/// # Errors
/// If they cannot be removed.
pub fn uninstall(paths: &Paths) -> Result<bool, Error> {
    uninstall_services(&Pins::services_below(paths.root()))
}

/// Keeps the maps right.
pub(crate) struct Task {
    pub(crate) mode: Mode,
    pub(crate) paths: Paths,
    /// What nftables has in force.
    pub(crate) ports: watch::Receiver<Option<Arc<Vec<Port>>>>,
    pub(crate) status: Arc<watch::Sender<NetStatus>>,
}

impl Task {
    /// Runs until cancelled. Programs and maps stay in force.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let Some(mut connect_time) = self.start().await else { return cancel.cancelled().await };
        let mut check = interval(POD_INTERVAL);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seen: Option<SystemTime> = None;
        let mut complained = None;
        loop {
            let look_at_ports = tokio::select! {
                () = cancel.cancelled() => return,
                changed = self.ports.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    true
                }
                _ = check.tick() => complained.is_some(),
            };
            // What came meanwhile is not marked as seen: it is looked at in the next round.
            let ports = look_at_ports.then(|| self.ports.borrow_and_update().clone()).flatten();
            let (paths, before) = (self.paths.clone(), seen);
            let work = move || {
                let outcome = look(&mut connect_time, ports.as_deref(), &paths, before);
                (connect_time, outcome)
            };
            let (back, outcome) = match tokio::task::spawn_blocking(work).await {
                Ok(done) => done,
                Err(error) => {
                    error!(%error, "services at connect time panicked");
                    return;
                }
            };
            connect_time = back;
            match outcome {
                Ok(now) => {
                    seen = now;
                    complained = None;
                    report(&self.status, true, None);
                }
                Err(why) => {
                    seen = None;
                    if complained.as_ref() != Some(&why) {
                        warn!(
                            why,
                            "services at connect time do not follow the cluster; packets are translated instead where they are missing"
                        );
                        report(&self.status, false, Some(why.clone()));
                        complained = Some(why);
                    }
                    tokio::select! {
                        () = cancel.cancelled() => return,
                        () = sleep(RETRY) => {}
                    }
                }
            }
        }
    }

    /// The programs, if they are wanted and can be had.
    async fn start(&self) -> Option<ConnectTime> {
        let (mode, paths, status) = (self.mode, self.paths.clone(), self.status.clone());
        let started = tokio::task::spawn_blocking(move || match mode {
            Mode::Off => {
                match uninstall(&paths) {
                    Ok(true) => info!("services are no longer chosen at connect time"),
                    Ok(false) => {}
                    Err(error) => {
                        error!(error = chain(&error), "socket programs of an earlier run stay");
                    }
                }
                None
            }
            Mode::Auto | Mode::On => match ConnectTime::install(&paths) {
                Ok(installed) => {
                    info!("services are chosen at connect time");
                    Some(installed)
                }
                Err(why) if mode == Mode::Auto => {
                    info!(why, "services are chosen packet by packet");
                    None
                }
                Err(why) => {
                    error!(
                        why,
                        "services cannot be chosen at connect time; packets are translated instead"
                    );
                    report(&status, false, Some(why));
                    None
                }
            },
        });
        started.await.unwrap_or_else(|error| {
            error!(%error, "installing the socket programs panicked");
            None
        })
    }
}

fn report(status: &watch::Sender<NetStatus>, in_force: bool, problem: Option<String>) {
    let now = ConnectTimeStatus { in_force, problem };
    status.send_if_modified(|status| {
        let changed = status.connect_time != now;
        status.connect_time = now;
        changed
    });
}

/// Writes the ports, if there are new ones, and the pods, if the runtime has touched its memory since `before`. Says when that
/// was, once it is sure that these are all.
fn look(
    connect_time: &mut ConnectTime,
    ports: Option<&Vec<Port>>,
    paths: &Paths,
    before: Option<SystemTime>,
) -> Result<Option<SystemTime>, String> {
    let ports = ports.map_or(Ok(0), |ports| connect_time.apply(ports));
    let ports = ports.map(drop).map_err(|error| chain(&error));
    let memory = paths.cni_cache_dir().join("results");
    let now = std::fs::metadata(&memory).and_then(|meta| meta.modified()).ok();
    if now.is_none() || now != before {
        let cni = Cni {
            conf_dir: paths.cni_conf_dir(),
            bin_dirs: vec![paths.cni_bin_dir()],
            cache_dir: paths.cni_cache_dir(),
        };
        let cached = cni.cached().map_err(|error| error.to_string())?;
        let pods: Vec<PathBuf> =
            cached.into_iter().map(|one| PathBuf::from(one.attachment.netns)).collect();
        connect_time.set_pods(&pods).map_err(|error| chain(&error))?;
    }
    // A pod that came right after may have left the folder with the same time.
    let settled = |time: &SystemTime| time.elapsed().is_ok_and(|age| age > FILE_CLOCK);
    ports.map(|()| now.filter(settled))
}

#[cfg(test)]
mod tests {
    use super::super::model::Endpoint;
    use super::*;

    fn port(last: u8, endpoints: &[&str]) -> Port {
        Port {
            id: format!("default/web-{last}/tcp/80"),
            protocol: Protocol::Tcp,
            cluster_ips: vec![
                [10, 96, 3, last].into(),
                format!("fd00:10:96::{last}").parse().expect("address"),
            ],
            port: 80,
            node_port: None,
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            external_local: false,
            internal_local: false,
            affinity: None,
            endpoints: endpoints
                .iter()
                .map(|ip| Endpoint {
                    ip: ip.parse().expect("address"),
                    port: 8080,
                    local: true,
                    ready: true,
                    near: true,
                })
                .collect(),
        }
    }

    /// One write to a kernel that has room for so many backends; checks that no frontend leads to a missing one.
    fn write(state: &mut State, room: usize, step: Step) -> Result<(), &'static str> {
        match step {
            Step::SetBackend(..) if state.backends.len() == room => return Err("full"),
            Step::SetBackend(key, backend) => {
                assert!(state.backends.insert(key, backend).is_none(), "none is overwritten");
            }
            Step::SetMember(member) => {
                assert!(state.members.insert(member), "none is overwritten");
            }
            Step::SetFrontend(key, frontend) => {
                state.frontends.insert(key, frontend);
            }
            Step::RemoveFrontend(key) => {
                state.frontends.remove(&key);
            }
            Step::RemoveBackend(key) => {
                state.backends.remove(&key);
            }
            Step::RemoveMember(member) => {
                state.members.remove(&member);
            }
        }
        for (to, frontend) in &state.frontends {
            for slot in 0..frontend.count {
                let key = BackendKey { service: frontend.service, slot };
                let backend = state.backends.get(&key).copied();
                let backend = backend.unwrap_or_else(|| panic!("{step:?}: no {key:?}"));
                let member = Member { to: *to, backend };
                assert!(state.members.contains(&member), "{step:?}: no {member:?}");
            }
        }
        Ok(())
    }

    fn apply(state: &mut State, ports: &[Port]) -> usize {
        let steps = plan(state, ports);
        assert_eq!(carry_out(&steps, |step| write(state, usize::MAX, step)), Ok(None));
        assert_eq!(plan(state, ports), [], "a second look changes nothing");
        steps.len()
    }

    fn leads_to(state: &State, frontend: &str) -> Vec<String> {
        let address: std::net::SocketAddr = frontend.parse().expect("address");
        let key = FrontendKey::tcp(address.ip(), address.port());
        let Some(frontend) = state.frontends.get(&key) else { return Vec::new() };
        let of = |slot| BackendKey { service: frontend.service, slot };
        (0..frontend.count).map(|slot| state.backends[&of(slot)].address().to_string()).collect()
    }

    #[test]
    fn frontends_follow_their_backends_and_nothing_is_left_behind() {
        let mut state = State::default();
        let both = ["10.244.1.2", "10.244.1.3", "fd00:10:244::2"];
        apply(&mut state, &[port(4, &both), port(5, &["10.244.1.9"])]);
        assert_eq!(leads_to(&state, "10.96.3.4:80"), ["10.244.1.2:8080", "10.244.1.3:8080"]);
        assert_eq!(leads_to(&state, "[fd00:10:96::4]:80"), ["[fd00:10:244::2]:8080"]);
        let few = apply(&mut state, &[port(4, &both[1..]), port(5, &["10.244.1.9"])]);
        assert_eq!(leads_to(&state, "10.96.3.4:80"), ["10.244.1.3:8080"]);
        assert_eq!(few, 5, "one new backend, its frontend, two old backends, one former member");
        apply(&mut state, &[]);
        assert_eq!(state, State::default());
    }

    #[test]
    fn a_service_without_room_is_taken_out_and_the_others_go_on() {
        const ROOM: usize = 6;
        let few = ["10.244.1.2"];
        let many = ["10.244.1.3", "10.244.1.4", "10.244.1.5"];
        let look = |state: &mut State, ports: &[Port]| {
            let steps = plan(state, ports);
            carry_out(&steps, |step| write(state, ROOM, step))
        };
        let mut state = State::default();
        assert_eq!(look(&mut state, &[4, 5, 6].map(|last| port(last, &few))), Ok(None));
        let after = [port(4, &["10.244.1.9"]), port(5, &many), port(6, &few)];
        assert_eq!(look(&mut state, &after), Ok(Some("full")));
        assert_eq!(leads_to(&state, "10.96.3.4:80"), ["10.244.1.9:8080"]);
        assert_eq!(leads_to(&state, "10.96.3.5:80"), [""; 0], "not to a former endpoint");
        assert_eq!(leads_to(&state, "10.96.3.6:80"), ["10.244.1.2:8080"]);
        // What the first look gave back is enough.
        assert_eq!(look(&mut state, &after), Ok(None));
        assert_eq!(leads_to(&state, "10.96.3.5:80").len(), 3);
        assert_eq!(plan(&state, &after), []);
    }

    #[test]
    fn what_nftables_knows_better_stays_with_it() {
        let mut udp = port(4, &["10.244.1.2"]);
        udp.protocol = Protocol::Udp;
        udp.affinity = Some(Duration::from_secs(60));
        let mut sctp = port(5, &["10.244.1.2"]);
        sctp.protocol = Protocol::Sctp;
        assert_eq!(plan(&State::default(), &[udp, sctp, port(6, &[])]), []);
    }

    #[test]
    fn an_endpoint_stays_a_member_while_the_set_around_it_changes() {
        let both = ["10.244.1.2", "10.244.1.3"];
        let mut udp = port(4, &both);
        udp.protocol = Protocol::Udp;
        let mut sticky = port(5, &both);
        sticky.affinity = Some(Duration::from_secs(60));
        let mut state = State::default();
        apply(&mut state, &[udp.clone(), sticky.clone()]);
        assert_eq!(state.members.len(), 4);
        // Another time is another frontend; who may be kept is the same.
        sticky.affinity = Some(Duration::from_secs(61));
        let steps = plan(&state, &[udp.clone(), sticky.clone()]);
        let is_member = |step: &&Step| matches!(step, Step::SetMember(_) | Step::RemoveMember(_));
        assert_eq!(steps.iter().filter(is_member).count(), 0, "{steps:?}");
        udp.endpoints.pop();
        let steps = plan(&state, &[udp.clone(), sticky.clone()]);
        let changes: Vec<_> = steps.iter().filter(is_member).collect();
        let [Step::RemoveMember(gone)] = changes[..] else { panic!("{steps:?}") };
        assert_eq!(gone.backend.address().to_string(), "10.244.1.3:8080");
        apply(&mut state, &[udp, sticky]);
        apply(&mut state, &[]);
        assert_eq!(state, State::default());
    }
}
