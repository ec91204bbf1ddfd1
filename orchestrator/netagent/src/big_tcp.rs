//! BIG TCP: IPv4 packets of pods are up to 512 KiB before they are cut into frames, where every way that they can take bears it.
//! Twice as much then goes through a node for the same work, as bridge, netfilter and routing see fewer of them.
//!
//! The size is one of a link, not of a route, and the sender's link counts. So it is one for all pods of a node:
//! - as long as one other node is reached in VXLAN it is 64 KiB. A VXLAN device takes more, and loses it;
//! - what one link on the way does not take the kernel cuts in software, which costs more than BIG TCP gains. So the least
//!   that a link takes is the size of all. What a physical link takes its driver says, and the agent sets it. Any other
//!   (a VLAN, a bond, the link of a node that is a container) has links behind it that nobody sees from here: it counts as
//!   whoever made it has set it, and stays so.
//!
//! It is IPv4's alone. In IPv6 such a packet has a header more, with its length, up to its last link; the kernel counts that
//! into each frame that it is to become, finds it longer than the MTU, and does not route it.
//!
//! Connections that live have the size that was right when they looked up their route; so after a change all look it up
//! again. Before a route into VXLAN is made, the sizes are back ([`BigTcp::before`]).
//!
//! The bridge grows first and shrinks last. So it says whether a run before this one has set other links, and a killed
//! agent leaves no size that is not taken back.

mod kernel;
mod task;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use cni_netlink::{Link, LinkKind, PacketSizes};
use ipnetwork::IpNetwork;

use crate::network::Switch;
use crate::overlay::{Path, Peers};

pub use kernel::BigTcpError;
pub(crate) use task::BigTcp;

/// Without BIG TCP.
pub const PLAIN: u32 = PacketSizes::PLAIN;
/// With it, at most.
pub const LARGEST: u32 = PacketSizes::LARGEST;

/// What the pod network's configuration and its routes say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    setting: Switch,
    /// Some node that is reached in VXLAN: its subnet, its address.
    vxlan: Option<(IpNetwork, IpAddr)>,
    /// Index of the underlay's link.
    underlay: u32,
}

impl Wanted {
    /// For a node with these peers on this underlay.
    #[must_use]
    pub fn new(setting: Switch, peers: &Peers, underlay: u32) -> Self {
        let in_vxlan = peers.values().find(|peer| matches!(peer.path, Path::Vxlan(_)));
        Self { setting, vxlan: in_vxlan.map(|peer| (peer.subnet, peer.public_ip)), underlay }
    }

    /// Whether it is 64 KiB whatever the links take.
    fn is_plain(&self) -> bool {
        !self.setting.is_wanted() || self.vxlan.is_some()
    }
}

/// Why packets are not larger.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// The configuration says so.
    #[error("set so")]
    Setting,
    /// A node is reached in VXLAN.
    #[error("VXLAN to {node} ({subnet})")]
    Vxlan {
        /// Its subnet.
        subnet: IpNetwork,
        /// Its address.
        node: IpAddr,
    },
    /// It is too old.
    #[error("needs Linux 6.3")]
    Kernel,
    /// A link on the way takes no more.
    #[error("{link} takes {bytes} bytes")]
    Link {
        /// Its name.
        link: String,
        /// What it takes.
        bytes: u32,
    },
}

/// The size of pods' packets, or why it is the plain one. `outside` are the links by which packets leave the node, `bridge`
/// is the pods'. Pure.
///
/// # Errors
/// The reason.
pub fn decide(
    wanted: &Wanted,
    links: &[Link],
    bridge: Option<u32>,
    outside: &BTreeSet<u32>,
) -> Result<u32, Why> {
    if !wanted.setting.is_wanted() {
        return Err(Why::Setting);
    }
    if let Some((subnet, node)) = wanted.vxlan {
        return Err(Why::Vxlan { subnet, node });
    }
    let mut size = LARGEST;
    for link in links {
        let bytes = if outside.contains(&link.index) {
            takes(link)
        } else if bridge.is_some() && link.master == bridge {
            link.sizes.limit
        } else {
            continue;
        };
        if link.sizes.gso == 0 {
            return Err(Why::Kernel);
        }
        if bytes <= PLAIN {
            return Err(Why::Link { link: link.name.clone(), bytes });
        }
        size = size.min(bytes);
    }
    Ok(size)
}

/// What a link out of the node takes.
fn takes(link: &Link) -> u32 {
    if is_set_by_us(link) { link.sizes.limit } else { link.sizes.gso }
}

fn is_set_by_us(link: &Link) -> bool {
    link.kind == LinkKind::Plain
}

/// Where on the way of packets a link is, from the one that grows first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The pods' bridge.
    Bridge,
    /// The way out of the node.
    Outside,
    /// A pod's link, on the node.
    Port,
    /// The same, in the network namespace at this path.
    Pod(PathBuf),
}

/// A link on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Where it is.
    pub place: Place,
    /// Index, in its namespace.
    pub index: u32,
    /// Its sizes now.
    pub sizes: PacketSizes,
    /// The pod has a limit of its own: its queue takes packets apart again.
    pub is_shaped: bool,
}

impl Seen {
    fn new(place: Place, link: &Link) -> Self {
        Self { place, index: link.index, sizes: link.sizes, is_shaped: false }
    }
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Which link.
    pub place: Place,
    /// Its index.
    pub index: u32,
    /// Its sizes from now on.
    pub bytes: u32,
}

/// Steps to this size: whoever sends grows last and shrinks first. Pure.
#[must_use]
pub fn plan(seen: &[Seen], size: u32) -> Vec<Step> {
    let has_been_large = seen.iter().any(|one| one.place == Place::Bridge && one.sizes.are_large());
    let wanted = |one: &Seen| if one.is_shaped { PLAIN } else { size };
    let step =
        |one: &&Seen| Step { place: one.place.clone(), index: one.index, bytes: wanted(one) };
    let shrinks = |one: &&Seen| {
        // What is larger out of the node and was so before is another's.
        let is_ours = one.place != Place::Outside || size <= PLAIN && has_been_large;
        is_ours && one.sizes.exceed(wanted(one))
    };
    // What is smaller than the plain size is another's as well.
    let grows =
        |one: &&Seen| wanted(one) > PLAIN && one.sizes.fall_short_of(wanted(one)) && !shrinks(one);
    let mut ordered: Vec<&Seen> = seen.iter().collect();
    ordered.sort_by(|one, other| one.place.cmp(&other.place));
    let smaller = ordered.iter().rev().copied().filter(shrinks).map(|one| step(&one));
    let larger = ordered.iter().copied().filter(grows).map(|one| step(&one));
    smaller.chain(larger).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mac::Mac;
    use crate::overlay::Peer;

    fn sizes(bytes: u32) -> PacketSizes {
        PacketSizes { gso: bytes, gro: bytes, limit: LARGEST }
    }

    fn peers(paths: &[Path]) -> Peers {
        let peers = (2..).zip(paths).map(|(third, path)| {
            let subnet = format!("10.244.{third}.0/24").parse().expect("CIDR");
            (subnet, Peer { subnet, public_ip: [192, 0, 2, third].into(), path: *path })
        });
        peers.collect()
    }

    const VXLAN: Path = Path::Vxlan(Mac([2, 0, 0, 0, 0, 3]));

    fn link(index: u32, name: &str, kind: LinkKind, sizes: PacketSizes) -> Link {
        Link { index, name: name.to_owned(), kind, sizes, ..Link::default() }
    }

    #[test]
    fn one_way_through_vxlan_is_enough_against_it() {
        let links = [link(2, "eth0", LinkKind::Plain, sizes(PLAIN))];
        let outside = BTreeSet::from([2]);
        let with = |setting, paths: &[Path]| {
            let wanted = Wanted::new(setting, &peers(paths), 2);
            decide(&wanted, &links, None, &outside).map_err(|why| why.to_string())
        };
        for setting in [Switch::Auto, Switch::On] {
            assert_eq!(with(setting, &[]), Ok(LARGEST));
            assert_eq!(with(setting, &[Path::Direct, Path::Direct]), Ok(LARGEST));
            assert_eq!(
                with(setting, &[Path::Direct, VXLAN]),
                Err("VXLAN to 192.0.2.3 (10.244.3.0/24)".to_owned())
            );
        }
        assert_eq!(with(Switch::Off, &[Path::Direct]), Err("set so".to_owned()));
    }

    #[test]
    fn the_least_that_a_link_takes_is_the_size_of_all() {
        let wanted = Wanted::new(Switch::Auto, &Peers::new(), 2);
        let outside = BTreeSet::from([2]);
        let with = |uplink: Link, port: PacketSizes| {
            let mut pod = link(7, "veth7", LinkKind::Veth, port);
            pod.master = Some(3);
            let aside = link(9, "tap0", LinkKind::Other("tun".to_owned()), sizes(1500));
            decide(&wanted, &[uplink, pod, aside], Some(3), &outside).map_err(|why| why.to_string())
        };
        let limited = |limit| PacketSizes { limit, ..sizes(PLAIN) };
        let plain = |sizes| link(2, "eth0", LinkKind::Plain, sizes);
        assert_eq!(with(plain(limited(LARGEST)), limited(LARGEST)), Ok(LARGEST));
        assert_eq!(with(plain(limited(196_608)), limited(LARGEST)), Ok(196_608), "its driver's");
        let refused = |link: &str| Err(format!("{link} takes 65536 bytes"));
        assert_eq!(with(plain(limited(PLAIN)), limited(LARGEST)), refused("eth0"));
        assert_eq!(with(plain(limited(LARGEST)), limited(PLAIN)), refused("veth7"));
        // Behind a veth there is who knows what: only what its maker has set counts.
        let veth = |sizes| link(2, "eth0", LinkKind::Veth, sizes);
        assert_eq!(with(veth(sizes(PLAIN)), limited(LARGEST)), refused("eth0"));
        assert_eq!(with(veth(sizes(131_072)), limited(LARGEST)), Ok(131_072));
        let old = PacketSizes { gso: 0, gro: 0, ..limited(LARGEST) };
        assert_eq!(with(plain(old), limited(LARGEST)), Err("needs Linux 6.3".to_owned()));
    }

    fn seen(bytes: u32) -> Vec<Seen> {
        let places = [
            Place::Pod("/run/netns/a".into()),
            Place::Port,
            Place::Outside,
            Place::Bridge,
            Place::Pod("/run/netns/b".into()),
        ];
        let link = |(index, place)| Seen { place, index, sizes: sizes(bytes), is_shaped: false };
        (1..).zip(places).map(link).collect()
    }

    fn indexes(steps: &[Step], bytes: u32) -> Vec<u32> {
        assert!(steps.iter().all(|step| step.bytes == bytes), "{steps:?}");
        steps.iter().map(|step| step.index).collect()
    }

    #[test]
    fn senders_grow_last_and_shrink_first_and_the_bridge_the_other_way_round() {
        let plain = seen(PLAIN);
        assert_eq!(indexes(&plan(&plain, LARGEST), LARGEST), [4, 3, 2, 1, 5]);
        assert_eq!(plan(&plain, PLAIN), [], "nothing to do");
        let large = seen(LARGEST);
        assert_eq!(plan(&large, LARGEST), [], "a second run changes nothing");
        assert_eq!(indexes(&plan(&large, PLAIN), PLAIN), [5, 1, 2, 3, 4]);
        assert_eq!(indexes(&plan(&large, 131_072), 131_072), [5, 1, 2, 4], "the way out bears it");
    }

    #[test]
    fn what_somebody_else_set_stays_or_is_put_right_by_what_it_does() {
        let mut changed = seen(LARGEST);
        changed[1].sizes.gro = PLAIN;
        assert_eq!(indexes(&plan(&changed, LARGEST), LARGEST), [2]);
        // The bridge has never been large, so the way out is not our work; a pod that sends more is cut short all the same.
        let mut foreign = seen(PLAIN);
        foreign[2].sizes = sizes(LARGEST);
        foreign[0].sizes.gso = 131_072;
        assert_eq!(indexes(&plan(&foreign, PLAIN), PLAIN), [1]);
        let mut small = seen(PLAIN);
        small[2].sizes.gso = 16_384;
        assert_eq!(plan(&small, PLAIN), [], "the driver takes no more");
    }

    #[test]
    fn a_pod_with_a_limit_of_its_own_sends_plain_packets() {
        let mut shaped = seen(PLAIN);
        shaped[0].is_shaped = true;
        assert_eq!(indexes(&plan(&shaped, LARGEST), LARGEST), [4, 3, 2, 5]);
        shaped[0].sizes = sizes(LARGEST);
        assert_eq!(
            plan(&shaped, LARGEST).first(),
            Some(&Step { place: shaped[0].place.clone(), index: 1, bytes: PLAIN })
        );
    }
}
