//! When to look: at the start, when leases change, when the kernel has news, and now and then.
//!
//! A look is whole (read the kernel, compare, mend) unless only leases changed since the last one: then what was applied
//! is known, and only the difference to it is written.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use cni_netlink::Netlink;
use cni_nftables::NftError;
use ipnetwork::{IpNetwork, Ipv4Network};
use orch_config::Paths;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::closed::{self, Closed};
use super::events::{self, Interest};
use super::forward::{self, ForwardError};
use super::interface::{self, Choice, Underlay};
use super::kernel::{self, OverlayError};
use super::plan::{SeenPeers, WantedPeers, conflicts, plan_peers};
use super::{Device, Path, Peer, Peers, desired_peers};
use crate::big_tcp::{BigTcp, Wanted};
use crate::chain;
use crate::files::{CONFLIST, FileError, SubnetEnv, conflist, ensure_content};
use crate::lease::{Identity, Network, SubnetKey};
use crate::network::{Mode, NetworkConfig, Switch};
use crate::status::{DeviceStatus, NetStatus, PeerStatus};
use crate::sysctl;

/// A look without a reason: the net below all events.
const RESYNC: Duration = Duration::from_secs(30);
/// Events that come together are one reason to look.
const GATHER: Duration = Duration::from_millis(20);
/// Longest name of a link (`IFNAMSIZ` less the zero byte).
const LINK_NAME_BYTES: usize = 15;
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// What the overlay is made from.
#[derive(Clone)]
pub(crate) struct Overlay {
    pub(crate) device_name: String,
    pub(crate) node_ip: Ipv4Addr,
    pub(crate) interface: Choice,
    pub(crate) service_cidr: Ipv4Network,
    pub(crate) identity: Identity,
    pub(crate) paths: Paths,
    /// Whether pods get the plugin that enforces NetworkPolicies.
    pub(crate) policy: bool,
    /// Told of routes into VXLAN before they are there.
    pub(crate) big_tcp: Arc<BigTcp>,
}

/// What is known between looks.
#[derive(Default)]
struct State {
    netlink: Option<Netlink>,
    closed: [Closed; 2],
    /// What the last look left in the kernel; nothing after a failure.
    applied: Option<Applied>,
}

struct Applied {
    /// Own subnet and configuration, on which all but the peers depends.
    config: NetworkConfig,
    own: SubnetKey,
    underlay: Underlay,
    devices: Vec<FamilyDevice>,
    /// What the last whole look found wrong.
    problems: Vec<String>,
}

/// A device of ours, and what the kernel holds behind it.
#[derive(Debug, Clone)]
struct FamilyDevice {
    ipv4: bool,
    index: u32,
    peers: Arc<WantedPeers>,
}

/// What was done in one look.
struct Done {
    underlay: Underlay,
    devices: Vec<FamilyDevice>,
    peers: Peers,
    steps: usize,
    sysctls: sysctl::Report,
    /// Somebody removed our table of nftables.
    firewall_mended: bool,
    /// Rules that were added to the firewall of others.
    forward_rules: usize,
    /// What a whole look found wrong.
    problems: Vec<String>,
    /// What is wrong with the leases or the configuration.
    lease_problems: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error("open a netlink socket")]
    Socket(#[source] cni_netlink::NetlinkError),
    #[error(transparent)]
    File(#[from] FileError),
}

impl Overlay {
    /// Takes the CNI configuration of a former boot away: it says that pods may start, but the overlay is gone. Where
    /// the overlay still stands, only this agent was away, and nobody has to wait.
    pub(crate) fn withdraw_stale_configuration(&self) {
        let names = [self.device_name.clone(), self.device_name_ipv6()];
        let stands = Netlink::open().is_ok_and(|netlink| {
            names.iter().any(|name| netlink.link(name).is_ok_and(|link| link.is_some()))
        });
        if stands {
            return;
        }
        let file = self.paths.cni_conf_dir().join(CONFLIST);
        match std::fs::remove_file(&file) {
            Ok(()) => info!(file = %file.display(), "pods wait until the overlay is up again"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                warn!(file = %file.display(), %error, "the CNI configuration of a former boot stays")
            }
        }
    }

    /// Keeps the overlay right until cancelled. It stays as it is when the agent ends.
    pub(crate) async fn run(
        self,
        mut network: watch::Receiver<Option<Network>>,
        status: Arc<watch::Sender<NetStatus>>,
        firewall: Arc<Notify>,
        cancel: CancellationToken,
    ) {
        let interest = Arc::new(Mutex::new(Interest {
            names: vec![self.device_name.clone()],
            ..Interest::default()
        }));
        let look = Arc::new(Notify::new());
        let watcher = tokio::spawn(watch_kernel(interest.clone(), look.clone(), cancel.clone()));
        let mut resync = interval(RESYNC);
        resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut state = State::default();
        let mut complained = None;
        let mut told_bridge = false;
        let mut whole = true;
        while !cancel.is_cancelled() {
            let current = network.borrow_and_update().clone();
            let mut pause = GATHER;
            if let Some(current) = current {
                let overlay = self.clone();
                let shared = interest.clone();
                let work = move || {
                    let started = std::time::Instant::now();
                    let result = overlay.look(&mut state, &current, whole, &shared);
                    let steps = result.as_ref().ok().map(|done| done.steps);
                    crate::metrics::reconciled(started.elapsed(), steps);
                    if result.is_err() {
                        state.applied = None;
                    }
                    (state, result, current)
                };
                // Not safe to drop half-way, so it is waited for; it takes milliseconds.
                let Ok((back, result, current)) = tokio::task::spawn_blocking(work).await else {
                    break;
                };
                state = back;
                match result {
                    Ok(done) => {
                        if complained.take().is_some() {
                            info!("the overlay is right again");
                        }
                        if done.sysctls.bridge_netfilter_missing
                            && !std::mem::replace(&mut told_bridge, true)
                        {
                            warn!(
                                "br_netfilter is not loaded: a pod cannot reach a Service whose endpoint is on its own node; load it with `modprobe br_netfilter`"
                            );
                        }
                        self.report(&done, &current, &status);
                    }
                    Err(error) => {
                        pause = RETRY;
                        let text = chain(&error);
                        if complained.as_ref() != Some(&text) {
                            error!(error = text, "the overlay is not as it must be; trying again");
                            status.send_if_modified(|status| {
                                let problems = vec![text.clone()];
                                let changed = status.problems != problems;
                                status.problems = problems;
                                changed
                            });
                            complained = Some(text);
                        }
                        look.notify_one();
                    }
                }
            }
            tokio::select! {
                () = cancel.cancelled() => break,
                () = sleep(pause) => {}
            }
            whole = tokio::select! {
                () = cancel.cancelled() => break,
                changed = network.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    false
                }
                () = look.notified() => true,
                () = firewall.notified() => true,
                _ = resync.tick() => true,
            };
        }
        if watcher.await.is_err() {
            warn!("the watcher of kernel events panicked");
        }
    }

    /// One look.
    fn look(
        &self,
        state: &mut State,
        network: &Network,
        whole: bool,
        interest: &Mutex<Interest>,
    ) -> Result<Done, Error> {
        let netlink = match state.netlink.take() {
            Some(netlink) => netlink,
            None => Netlink::open().map_err(Error::Socket)?,
        };
        let same = |applied: &Applied| {
            !whole && applied.config == network.config && applied.own == network.own
        };
        let done = match state.applied.take().filter(same) {
            Some(applied) => {
                self.follow_leases(&netlink, &mut state.closed, applied, network, interest)
            }
            None => self.look_at_all(&netlink, &mut state.closed, network, interest),
        }?;
        // After a failure it is opened anew: it may hold the rest of an answer.
        state.netlink = Some(netlink);
        state.applied = Some(Applied {
            config: network.config.clone(),
            own: network.own,
            underlay: done.underlay.clone(),
            devices: done.devices.clone(),
            problems: done.problems.clone(),
        });
        Ok(done)
    }

    /// Reads everything, and mends what is not as it must be.
    fn look_at_all(
        &self,
        netlink: &Netlink,
        closed: &mut [Closed; 2],
        network: &Network,
        interest: &Mutex<Interest>,
    ) -> Result<Done, Error> {
        let mut problems = Vec::new();
        let underlay = interface::find(netlink, &self.interface, self.node_ip, &self.device_name)?;
        let (peers, lease_problems) = self.desired(network, &underlay);
        let packets = Wanted::new(network.config.big_tcp, &peers, underlay.index);
        self.big_tcp.before(&packets);
        // Closed before it is open.
        let firewall_mended = self.close(closed, network, &peers, true).unwrap_or_else(|error| {
            problems.push(format!("the VXLAN port is open to everybody: {}", chain(&error)));
            false
        });
        let mut names = vec![self.device_name.clone(), underlay.name.clone()];
        let mut devices = Vec::new();
        let mut steps = 0;
        for device in self.devices(network, &underlay) {
            let (index, count) = kernel::ensure_device(netlink, &device)?;
            steps += count;
            let ipv4 = device.local.is_ipv4();
            let peers = WantedPeers::new(&of_family(&peers, ipv4), index, underlay.index);
            devices.push(FamilyDevice { ipv4, index, peers: Arc::new(peers) });
            names.push(device.name);
        }
        for (own, name) in [
            (network.own.v4.is_some(), self.device_name.clone()),
            (network.own.v6.is_some(), self.device_name_ipv6()),
        ] {
            if !own {
                steps += kernel::remove_device(netlink, &name)?;
            }
        }
        // From now on the kernel's news are compared with this.
        *interest.lock() =
            Interest { devices: heard(&devices), underlay: Some(underlay.index), names };
        for device in &devices {
            let mut seen = kernel::observe_peers(netlink, device.index)?;
            if devices.len() > 1 {
                // One that is alone sees what a former overlay of the other family left, too.
                seen.keep_family(device.ipv4);
            }
            let changes = plan_peers(&seen, &device.peers);
            kernel::apply_peers(netlink, device.index, &changes)?;
            steps += changes.len();
            problems.extend(conflicts(&seen, &device.peers));
        }
        self.big_tcp.after(&packets);
        let has_ipv6 = devices.iter().any(|device| !device.ipv4);
        if network.own.v6.is_some() && !has_ipv6 {
            problems.push(format!(
                "the link {} has no IPv6 address: IPv6 of pods does not leave the node",
                underlay.name
            ));
        }
        let sysctls = sysctl::ensure(
            &[&self.device_name, &underlay.name],
            has_ipv6.then_some(underlay.name.as_str()),
        );
        problems.extend(sysctls.errors.iter().map(ToString::to_string));
        let forward_rules = network.config.v4.map_or(Ok(0), |v4| forward::ensure(v4.network));
        let forward_rules = forward_rules.unwrap_or_else(|error| {
            problems.push(forward_problem(&error));
            0
        });
        let env = SubnetEnv {
            ipv4: network.config.v4.map(|v4| v4.network).zip(network.own.v4),
            ipv6: network.config.v6.map(|v6| v6.network).zip(network.own.v6),
            mtu: self.pod_mtu(network, &underlay),
        };
        // Only now may pods start: the way out of this node is there.
        ensure_content(&self.paths.subnet_env(), env.render().as_bytes())?;
        let list = conflist(&self.paths, &self.device_name, self.policy);
        ensure_content(&self.paths.cni_conf_dir().join(CONFLIST), &list)?;
        Ok(Done {
            underlay,
            devices,
            peers,
            steps,
            sysctls,
            firewall_mended,
            forward_rules,
            problems,
            lease_problems,
        })
    }

    /// Writes what differs from what was applied before, without a question to the kernel.
    fn follow_leases(
        &self,
        netlink: &Netlink,
        closed: &mut [Closed; 2],
        applied: Applied,
        network: &Network,
        interest: &Mutex<Interest>,
    ) -> Result<Done, Error> {
        let Applied { underlay, devices: before, mut problems, .. } = applied;
        let (peers, lease_problems) = self.desired(network, &underlay);
        let packets = Wanted::new(network.config.big_tcp, &peers, underlay.index);
        self.big_tcp.before(&packets);
        if let Err(error) = self.close(closed, network, &peers, false) {
            problems = vec![format!("the VXLAN port does not follow the nodes: {}", chain(&error))];
        }
        let mut devices = Vec::new();
        let mut changes = Vec::new();
        for before in before {
            let same_family = of_family(&peers, before.ipv4);
            let want = WantedPeers::new(&same_family, before.index, underlay.index);
            changes.push(plan_peers(&SeenPeers::from(&*before.peers), &want));
            devices.push(FamilyDevice { peers: Arc::new(want), ..before });
        }
        interest.lock().devices = heard(&devices);
        for (device, changes) in devices.iter().zip(&changes) {
            kernel::apply_peers(netlink, device.index, changes)?;
        }
        self.big_tcp.after(&packets);
        Ok(Done {
            underlay,
            devices,
            peers,
            steps: changes.iter().map(Vec::len).sum(),
            sysctls: sysctl::Report::default(),
            firewall_mended: false,
            forward_rules: 0,
            problems,
            lease_problems,
        })
    }

    /// Closes the underlay in both families; true if somebody had opened it.
    fn close(
        &self,
        closed: &mut [Closed; 2],
        network: &Network,
        peers: &Peers,
        verify: bool,
    ) -> Result<bool, NftError> {
        let [v4, v6] = closed;
        let mut mended = false;
        match closed::desired_table(network, &self.identity, peers) {
            Some(table) => mended |= v4.apply(table, verify)?,
            None => v4.remove()?,
        }
        match closed::desired_table_ipv6(network, &self.identity, peers) {
            Some(table) => mended |= v6.apply(table, verify)?,
            None => v6.remove()?,
        }
        Ok(mended)
    }

    fn desired(&self, network: &Network, underlay: &Underlay) -> (Peers, Vec<String>) {
        let (peers, mut problems) = desired_peers(network, &self.identity, &underlay.on_link);
        problems.extend(network.config_problem.clone());
        if network.config.fast_path == Switch::On && !self.policy {
            problems.push(
                "the fast path is not on: it needs a node that enforces NetworkPolicies; start its agent with --policy auto".to_owned(),
            );
        }
        let pods = network.config.v4.map(|v4| v4.network);
        if let Some(pods) = pods.filter(|pods| pods.overlaps(self.service_cidr)) {
            problems.push(format!(
                "the pod network {pods} overlaps the Services' network {}: addresses in both are refused; choose another Network",
                self.service_cidr
            ));
        }
        (peers, problems)
    }

    /// One device for each family, IPv4 first.
    fn devices(&self, network: &Network, underlay: &Underlay) -> Vec<Device> {
        let device = |name, local, mac, mtu, address| Device {
            name,
            vni: network.config.vni,
            port: network.config.port,
            local,
            underlay: underlay.index,
            mac,
            // The device stands in every mode, with what its header leaves.
            mtu: Mode::Vxlan.pod_mtu(underlay.mtu, mtu),
            address,
        };
        let v4 = network.own.v4.map(|own| {
            device(
                self.device_name.clone(),
                IpAddr::V4(underlay.local),
                self.identity.vtep_mac,
                false,
                IpAddr::V4(own.network()),
            )
        });
        let v6 = network.own.v6.zip(underlay.local_ipv6).map(|(own, local)| {
            device(
                self.device_name_ipv6(),
                IpAddr::V6(local),
                self.identity.vtep_mac.partner(),
                true,
                IpAddr::V6(own.network()),
            )
        });
        v4.into_iter().chain(v6).collect()
    }

    fn device_name_ipv6(&self) -> String {
        let name: String = self.device_name.chars().take(LINK_NAME_BYTES - 3).collect();
        format!("{name}-v6")
    }

    fn pod_mtu(&self, network: &Network, underlay: &Underlay) -> u32 {
        network.config.mode.pod_mtu(underlay.mtu, network.own.v6.is_some())
    }

    fn report(&self, done: &Done, network: &Network, status: &watch::Sender<NetStatus>) {
        let mtu = self.pod_mtu(network, &done.underlay);
        if done.steps > 0 {
            info!(
                device = self.device_name,
                underlay = done.underlay.name,
                mode = ?network.config.mode,
                mtu,
                peers = done.peers.len(),
                steps = done.steps,
                "overlay reconciled"
            );
        } else {
            debug!(peers = done.peers.len(), "the overlay is as it must be");
        }
        if done.firewall_mended {
            warn!(
                table = closed::TABLE,
                "somebody changed our nftables table; it was written anew"
            );
        }
        if done.forward_rules > 0 {
            info!(
                rules = done.forward_rules,
                "a firewall of iptables drops what it does not know; the pod network's packets are accepted there"
            );
        }
        for setting in &done.sysctls.changed {
            info!(
                key = setting.key,
                value = setting.value,
                why = setting.why,
                "kernel setting made"
            );
        }
        let problems: Vec<String> =
            done.problems.iter().chain(&done.lease_problems).cloned().collect();
        for problem in
            problems.iter().filter(|problem| !status.borrow().problems.contains(*problem))
        {
            error!("{problem}");
        }
        status.send_if_modified(|status| {
            let before = status.clone();
            let (config, own) = (&network.config, network.own);
            status.network = config.v4.map(|v4| v4.network.to_string());
            status.subnet = own.v4.map(|subnet| subnet.to_string());
            status.network_v6 = config.v6.map(|v6| v6.network.to_string());
            status.subnet_v6 = own.v6.map(|subnet| subnet.to_string());
            status.mode = Some(network.config.mode.name().to_owned());
            status.device = Some(DeviceStatus {
                name: self.device_name.clone(),
                vtep_mac: self.identity.vtep_mac.to_string(),
                mtu,
                vni: network.config.vni,
                port: network.config.port,
            });
            let peers = done.peers.values().map(|peer| PeerStatus {
                subnet: peer.subnet.to_string(),
                public_ip: peer.public_ip.to_string(),
                vtep_mac: match peer.path {
                    Path::Vxlan(mac) => mac.to_string(),
                    // No VTEP is used: the node is reached directly.
                    Path::Direct => String::new(),
                },
            });
            status.peers = peers.collect();
            status.problems = problems;
            *status != before
        });
    }
}

/// As the watcher of kernel events wants it.
fn heard(devices: &[FamilyDevice]) -> Vec<(u32, Arc<WantedPeers>)> {
    devices.iter().map(|device| (device.index, device.peers.clone())).collect()
}

/// The peers of one family.
fn of_family(peers: &Peers, ipv4: bool) -> Peers {
    let same = |(subnet, _): &(&IpNetwork, &Peer)| subnet.is_ipv4() == ipv4;
    peers.iter().filter(same).map(|(subnet, peer)| (*subnet, *peer)).collect()
}

fn forward_problem(error: &ForwardError) -> String {
    format!("a firewall of iptables may drop the pod network's packets: {}", chain(error))
}

/// Keeps a netlink connection open; a broken one is a reason to look, and is opened again.
async fn watch_kernel(
    interest: Arc<Mutex<Interest>>,
    look: Arc<Notify>,
    cancel: CancellationToken,
) {
    while !cancel.is_cancelled() {
        if let Err(error) = events::watch(interest.clone(), look.clone(), cancel.clone()).await {
            warn!(%error, "the kernel's events are not heard; looking now and then instead");
            look.notify_one();
            tokio::select! {
                () = cancel.cancelled() => {}
                () = sleep(RETRY) => {}
            }
        }
    }
}
