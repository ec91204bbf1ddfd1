//! Reads and sets the sizes of links, on the node and in its pods.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cni_netlink::{Link, LinkKind, NetNs, Netlink, NetlinkError, RouteFilter};
use orch_config::Paths;

use super::{Place, Seen, Step, is_set_by_us};
use crate::policy::cni;

/// Of the calling thread's network namespace.
const FORGET_ROUTES: &str = "/proc/sys/net/ipv4/route/flush";

/// Why sizes are not as they must be.
#[derive(Debug, thiserror::Error)]
pub enum BigTcpError {
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Which pods there are is not known.
    #[error("read which pods there are: {0}")]
    Pods(String),
    /// Connections that live keep the size that they have.
    #[error("write {FORGET_ROUTES}")]
    Routes(#[source] std::io::Error),
}

/// A pod's link, as the runtime remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attached {
    pub(super) netns: PathBuf,
    ifname: String,
}

/// The links of the node as far as packets of pods pass them.
#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) links: Vec<Link>,
    pub(super) bridge: Option<u32>,
}

impl Node {
    pub(super) fn observe(netlink: &Netlink) -> Result<Self, NetlinkError> {
        let links = netlink.links()?;
        let is_bridge = |link: &&Link| {
            link.name == orch_config::POD_BRIDGE && matches!(link.kind, LinkKind::Bridge { .. })
        };
        let bridge = links.iter().find(is_bridge).map(|link| link.index);
        Ok(Self { links, bridge })
    }

    fn ports(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().filter(|link| self.bridge.is_some() && link.master == self.bridge)
    }

    /// All but those inside of pods.
    pub(super) fn seen(&self, outside: &BTreeSet<u32>) -> Vec<Seen> {
        let bridge = self.links.iter().filter(|link| Some(link.index) == self.bridge);
        let out =
            self.links.iter().filter(|link| outside.contains(&link.index) && is_set_by_us(link));
        let bridge = bridge.map(|link| Seen::new(Place::Bridge, link));
        let out = out.map(|link| Seen::new(Place::Outside, link));
        bridge.chain(out).chain(self.ports().map(|link| Seen::new(Place::Port, link))).collect()
    }
}

/// The links by which packets of pods leave the node: the underlay's, and those of default routes.
pub(super) fn outside(netlink: &Netlink, underlay: u32) -> Result<BTreeSet<u32>, NetlinkError> {
    let routes = netlink.routes(&RouteFilter::default())?;
    let default = routes.iter().filter(|route| route.dst.prefix() == 0);
    Ok(default.filter_map(|route| route.link).chain([underlay]).collect())
}

/// Pods that the runtime has attached.
pub(super) fn attached(paths: &Paths) -> Result<Vec<Attached>, BigTcpError> {
    let cached = cni(paths).cached().map_err(|error| BigTcpError::Pods(error.to_string()))?;
    let one = |one: cni_invoke::CachedAttachment| Attached {
        netns: PathBuf::from(one.attachment.netns),
        ifname: one.id.ifname.to_string(),
    };
    Ok(cached.into_iter().map(one).collect())
}

/// A pod's end of its link; nothing for one that is gone, or hangs on another network.
pub(super) fn observe_pod(
    pod: &Attached,
    node: &Node,
    shaped: &BTreeSet<u32>,
) -> Result<Option<Seen>, NetlinkError> {
    let look = || Netlink::open_in(&NetNs::open(&pod.netns)?)?.link(&pod.ifname);
    let link = match look() {
        Ok(link) => link,
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error),
    };
    let of_bridge = |link: &Link| {
        link.kind == LinkKind::Veth && node.ports().any(|port| Some(port.index) == link.peer)
    };
    Ok(link.filter(of_bridge).map(|link| {
        let is_shaped = link.peer.is_some_and(|port| shaped.contains(&port));
        Seen { is_shaped, ..Seen::new(Place::Pod(pod.netns.clone()), &link) }
    }))
}

/// Sets the sizes of one link. One that went while we looked needs nothing.
pub(super) fn apply(netlink: &Netlink, step: &Step) -> Result<(), BigTcpError> {
    let outcome = match &step.place {
        Place::Bridge | Place::Outside | Place::Port => set(netlink, step),
        Place::Pod(netns) => set_in(netns, step),
    };
    match outcome {
        Err(BigTcpError::Netlink(error)) if error.is_not_found() => Ok(()),
        outcome => outcome,
    }
}

fn set_in(netns: &Path, step: &Step) -> Result<(), BigTcpError> {
    NetNs::open(netns)?.run(|| set(&Netlink::open()?, step))
}

fn set(netlink: &Netlink, step: &Step) -> Result<(), BigTcpError> {
    netlink.set_packet_sizes(step.index, step.bytes)?;
    // A port of a bridge sends nothing of its own.
    if step.place == Place::Port { Ok(()) } else { renew_routes() }
}

/// Lets every connection of the calling thread's namespace look up its route again, and with it the size that the link has
/// now. A sender that goes on with a larger one makes the kernel cut its packets in software.
fn renew_routes() -> Result<(), BigTcpError> {
    match std::fs::write(FORGET_ROUTES, "1") {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(BigTcpError::Routes(error))
        }
        _ => Ok(()),
    }
}
