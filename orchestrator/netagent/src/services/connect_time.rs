//! Services at connect time: the maps of the socket programs follow the Services.
//!
//! What is in the maps is a part of what nftables does, never more: TCP to cluster IPs, without affinity, from pods. All
//! else, and whatever is not in the maps (yet), finds its backend by nftables as before. So an empty map, a full one or
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
use orch_ebpf_maps::{Backend, BackendKey, Frontend, FrontendKey};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::model::{Port, Protocol};
use crate::{Mode, chain};

/// How often new pods are looked for. Until then nftables serves them.
const POD_INTERVAL: Duration = Duration::from_secs(1);

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
}

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A backend under a number that no frontend names yet.
    SetBackend(BackendKey, Backend),
    /// From here on pods get the backends of this number.
    SetFrontend(FrontendKey, Frontend),
    /// Nftables serves it, or nobody.
    RemoveFrontend(FrontendKey),
    /// No frontend names its number any more.
    RemoveBackend(BackendKey),
}

/// The connections that the maps serve. Pure.
fn wanted(ports: &[Port]) -> BTreeMap<FrontendKey, Vec<Backend>> {
    let mut wanted = BTreeMap::new();
    // Affinity is a memory of clients, and nftables has it for all of them.
    let served = |port: &&Port| port.protocol == Protocol::Tcp && port.affinity.is_none();
    for port in ports.iter().filter(served) {
        for port in [false, true].into_iter().filter_map(|v6| port.in_family(v6)) {
            let pool = port.pool(port.internal_local);
            let backends: Vec<Backend> =
                pool.iter().map(|one| Backend::new(one.ip, one.port)).collect();
            if !backends.is_empty() {
                let keys = port.cluster_ips.iter().map(|ip| FrontendKey::tcp(*ip, port.port));
                wanted.extend(keys.map(|key| (key, backends.clone())));
            }
        }
    }
    wanted
}

/// From what the maps hold to what they should hold, in an order in which no reader sees a half. Pure.
#[must_use]
pub fn plan(have: &State, ports: &[Port]) -> Vec<Step> {
    let wanted = wanted(ports);
    let held = |frontend: &Frontend| -> Vec<Backend> {
        let from = BackendKey { service: frontend.service, slot: 0 };
        let to = BackendKey { service: frontend.service, slot: frontend.count };
        have.backends.range(from..to).map(|(_, backend)| *backend).collect()
    };
    let used = have.backends.keys().map(|key| key.service);
    let mut next = used.chain(have.frontends.values().map(|one| one.service)).max().unwrap_or(0);
    let mut kept = BTreeSet::new();
    let mut steps = Vec::new();
    for (key, backends) in &wanted {
        if let Some(frontend) = have.frontends.get(key)
            && held(frontend) == *backends
        {
            kept.insert(frontend.service);
            continue;
        }
        // Numbers wrap after four thousand million changes; those in use are the newest.
        next = next.wrapping_add(1);
        let service = next;
        let slots = (0..).zip(backends);
        steps.extend(
            slots.map(|(slot, backend)| Step::SetBackend(BackendKey { service, slot }, *backend)),
        );
        let count = u32::try_from(backends.len()).unwrap_or(u32::MAX);
        steps.push(Step::SetFrontend(*key, Frontend { service, count }));
    }
    let gone = have.frontends.keys().filter(|key| !wanted.contains_key(key));
    steps.extend(gone.map(|key| Step::RemoveFrontend(*key)));
    let unused = have.backends.keys().filter(|key| !kept.contains(&key.service));
    steps.extend(unused.map(|key| Step::RemoveBackend(*key)));
    steps
}

impl State {
    /// Reads what the maps hold.
    fn observe(maps: &Services) -> Result<Self, Error> {
        Ok(Self {
            frontends: maps.frontends()?.into_iter().collect(),
            backends: maps.backends()?.into_iter().collect(),
        })
    }

    fn apply(&mut self, maps: &mut Services, step: Step) -> Result<(), Error> {
        match step {
            Step::SetBackend(key, backend) => {
                maps.set_backend(key, backend)?;
                self.backends.insert(key, backend);
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
    /// If the kernel refuses one; what is not in the maps is served by nftables.
    pub fn apply(&mut self, ports: &[Port]) -> Result<usize, Error> {
        let mut state = match self.state.take() {
            Some(state) => state,
            None => State::observe(&self.maps)?,
        };
        let steps = plan(&state, ports);
        for step in &steps {
            state.apply(&mut self.maps, *step)?;
        }
        self.state = Some(state);
        Ok(steps.len())
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
            let ports = self.ports.borrow_and_update().clone().filter(|_| look_at_ports);
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
                }
                Err(why) => {
                    seen = None;
                    if complained.as_ref() != Some(&why) {
                        warn!(
                            why,
                            "services at connect time do not follow the cluster; packets are translated instead where they are missing"
                        );
                        complained = Some(why);
                    }
                }
            }
        }
    }

    /// The programs, if they are wanted and can be had.
    async fn start(&self) -> Option<ConnectTime> {
        let (mode, paths) = (self.mode, self.paths.clone());
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

/// Writes the ports, if there are new ones, and the pods, if the runtime has touched its memory since `before`.
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
    ports.map(|()| now)
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

    /// Carries the steps out, and checks after each that no frontend leads to a missing backend.
    fn apply(state: &mut State, ports: &[Port]) -> usize {
        let steps = plan(state, ports);
        for step in &steps {
            match *step {
                Step::SetBackend(key, backend) => {
                    assert!(state.backends.insert(key, backend).is_none(), "none is overwritten");
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
            }
            for frontend in state.frontends.values() {
                for slot in 0..frontend.count {
                    let key = BackendKey { service: frontend.service, slot };
                    assert!(state.backends.contains_key(&key), "{step:?}: {key:?}");
                }
            }
        }
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
        assert_eq!(few, 4, "one new backend, its frontend, two old backends");
        apply(&mut state, &[]);
        assert_eq!(state, State::default());
    }

    #[test]
    fn what_nftables_knows_better_stays_with_it() {
        let mut udp = port(4, &["10.244.1.2"]);
        udp.protocol = Protocol::Udp;
        let mut sticky = port(5, &["10.244.1.2"]);
        sticky.affinity = Some(Duration::from_secs(60));
        assert_eq!(plan(&State::default(), &[udp, sticky, port(6, &[])]), []);
    }
}
