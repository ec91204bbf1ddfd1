//! When to look: at the start, when leases change, when the kernel has news, and now and then.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use cni_netlink::Netlink;
use orch_config::Paths;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::events::{self, Interest};
use super::kernel::{self, OverlayError, Underlay};
use super::{Device, Peers, desired_peers};
use crate::chain;
use crate::files::{CONFLIST, FileError, SubnetEnv, conflist, ensure_content};
use crate::lease::{Identity, Network};
use crate::status::{DeviceStatus, NetStatus, PeerStatus};
use crate::sysctl;

/// A look without a reason: the net below all events.
const RESYNC: Duration = Duration::from_secs(30);
/// Events that come together are one reason to look.
const GATHER: Duration = Duration::from_millis(20);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// What the overlay is made from.
#[derive(Clone)]
pub(crate) struct Overlay {
    pub(crate) device_name: String,
    pub(crate) node_ip: Ipv4Addr,
    pub(crate) underlay: Option<String>,
    pub(crate) identity: Identity,
    pub(crate) paths: Paths,
}

/// What was done in one look.
struct Done {
    underlay: Underlay,
    device: u32,
    peers: Peers,
    steps: usize,
    sysctls: sysctl::Report,
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
        let stands = Netlink::open()
            .and_then(|netlink| netlink.link(&self.device_name))
            .is_ok_and(|link| link.is_some());
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
        let mut complained = None;
        let mut told_bridge = false;
        while !cancel.is_cancelled() {
            let current = network.borrow_and_update().clone();
            let mut pause = GATHER;
            if let Some(current) = current {
                let overlay = self.clone();
                let result = tokio::task::spawn_blocking(move || {
                    overlay.look(&current).map(|done| (done, current))
                });
                match result.await {
                    Ok(Ok((done, current))) => {
                        if complained.take().is_some() {
                            info!("the overlay is right again");
                        }
                        *interest.lock() = Interest {
                            device: Some(done.device),
                            underlay: Some(done.underlay.index),
                            names: vec![self.device_name.clone(), done.underlay.name.clone()],
                        };
                        if done.sysctls.bridge_netfilter_missing
                            && !std::mem::replace(&mut told_bridge, true)
                        {
                            warn!(
                                "br_netfilter is not loaded: a pod cannot reach a Service whose endpoint is on its own node; load it with `modprobe br_netfilter`"
                            );
                        }
                        self.report(&done, &current, &status);
                    }
                    Ok(Err(error)) => {
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
                    Err(_) => break,
                }
            }
            tokio::select! {
                () = cancel.cancelled() => break,
                () = sleep(pause) => {}
            }
            tokio::select! {
                () = cancel.cancelled() => break,
                changed = network.changed() => if changed.is_err() { break },
                () = look.notified() => {}
                _ = resync.tick() => {}
            }
        }
        if watcher.await.is_err() {
            warn!("the watcher of kernel events panicked");
        }
    }

    /// One look: observe, plan, apply.
    fn look(&self, network: &Network) -> Result<Done, Error> {
        let netlink = Netlink::open().map_err(Error::Socket)?;
        let underlay = kernel::find_underlay(&netlink, self.node_ip, self.underlay.as_deref())?;
        let device = Device {
            name: self.device_name.clone(),
            vni: network.config.vni,
            port: network.config.port,
            local: self.node_ip,
            underlay: underlay.index,
            mac: self.identity.vtep_mac,
            mtu: underlay.overlay_mtu(),
            address: network.own.network(),
        };
        let peers = desired_peers(network, &self.identity);
        let (index, steps) = kernel::reconcile(&netlink, &device, &peers)?;
        let sysctls = sysctl::ensure(&[&self.device_name, &underlay.name]);
        let env =
            SubnetEnv { network: network.config.network, subnet: network.own, mtu: device.mtu };
        // Only now may pods start: the way out of this node is there.
        ensure_content(&self.paths.subnet_env(), env.render().as_bytes())?;
        let list = conflist(&self.paths, &self.device_name);
        ensure_content(&self.paths.cni_conf_dir().join(CONFLIST), &list)?;
        Ok(Done { underlay, device: index, peers, steps, sysctls })
    }

    fn report(&self, done: &Done, network: &Network, status: &watch::Sender<NetStatus>) {
        if done.steps > 0 {
            info!(
                device = self.device_name,
                underlay = done.underlay.name,
                mtu = done.underlay.overlay_mtu(),
                peers = done.peers.len(),
                steps = done.steps,
                "overlay reconciled"
            );
        } else {
            debug!(peers = done.peers.len(), "the overlay is as it must be");
        }
        for setting in &done.sysctls.changed {
            info!(
                key = setting.key,
                value = setting.value,
                why = setting.why,
                "kernel setting made"
            );
        }
        let problems: Vec<String> = done.sysctls.errors.iter().map(ToString::to_string).collect();
        for problem in
            problems.iter().filter(|problem| !status.borrow().problems.contains(*problem))
        {
            error!("{problem}");
        }
        status.send_if_modified(|status| {
            let before = status.clone();
            status.network = Some(network.config.network.to_string());
            status.subnet = Some(network.own.to_string());
            status.device = Some(DeviceStatus {
                name: self.device_name.clone(),
                vtep_mac: self.identity.vtep_mac.to_string(),
                mtu: done.underlay.overlay_mtu(),
                vni: network.config.vni,
                port: network.config.port,
            });
            let peers = done.peers.values().map(|peer| PeerStatus {
                subnet: peer.subnet.to_string(),
                public_ip: peer.public_ip.to_string(),
                vtep_mac: peer.vtep_mac.to_string(),
            });
            status.peers = peers.collect();
            status.problems = problems;
            *status != before
        });
    }
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
