//! The fast path: packets of known flows pass by bridge, netfilter and routing (`ebpf/progs/fast_path.bpf.c` says how).
//!
//! It is on where the kernel can, unless the setting of the whole network says otherwise (`FastPath` in the backend's
//! configuration). What a node needs for it:
//!
//! - the two programs on the host ends of the pods' links, and on the links by which other nodes' packets come in. A pod
//!   that is shaped (the `bandwidth` plugin) goes the whole way: its queue is on its link;
//! - for each family of the pod network one rule behind source translation that marks what is not translated, in a table of
//!   its own;
//! - conntrack, which sees a part of the packets only, does not call the others out of window. When the fast path goes,
//!   connections keep that, each for itself, and the setting is as before.
//!
//! Without the rules nothing is learned, and what was learned lasts a second. So they come last and go first, and a change
//! drops nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use cni_netlink::{Link, LinkKind, MacBytes, Netlink, NetlinkError};
use cni_nftables::{Chain, Family, Hook as NftHook, Nft, NftError, Table, bear_gaps};
use ipnetwork::IpNetwork;
use orch_ebpf_loader::{
    Error as LoaderError, Hook, Maps, Pins, attach, detach_hook, links_with, supports_fast_path,
};
use orch_ebpf_maps::MARK_PLAIN;
use tracing::info;

use crate::chain;
use crate::network::{NetworkConfig, Switch};
use crate::status::FastPathStatus;

/// Name of the tables.
pub const TABLE: &str = "orch-fast";
const CHAIN: &str = "postrouting";
/// A chain without rules in the table of family `inet`, there while the setting of conntrack is ours: it lives as long as the
/// network namespace, as the setting does.
const STRICT: &str = "conntrack-was-strict";
/// Behind source NAT (100): only then a connection's translation is decided.
const PRIORITY: i32 = 110;
/// Of `enum ip_conntrack_status` (`linux/netfilter/nf_conntrack_common.h`): confirmed, translated either way, changed
/// sequence numbers, dying.
const CONFIRMED: u32 = 1 << 3;
const TRANSLATED: u32 = 1 << 4 | 1 << 5;
const OTHERWISE_CHANGED: u32 = 1 << 6 | 1 << 9;
const LIBERAL: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";

/// Why the fast path is not as it must be.
#[derive(Debug, thiserror::Error)]
pub enum FastPathError {
    /// The kernel is too old.
    #[error("the fast path needs Linux 6.6 or newer; packets go the whole way")]
    Kernel,
    /// A program could not be put on a link, or taken from it.
    #[error(transparent)]
    Loader(#[from] LoaderError),
    /// The rule could not be written.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The kernel could not be asked.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The setting of conntrack could not be made.
    #[error("set {LIBERAL} to {value}")]
    Liberal {
        /// What it should be.
        value: &'static str,
        /// Why it is not.
        source: std::io::Error,
    },
    /// conntrack's connections could not be told.
    #[error("make conntrack bear gaps in the connections that took the fast path")]
    Connections(#[source] std::io::Error),
}

/// What must be in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The pod network, one for each of its families, if the fast path is on.
    pub clusters: BTreeSet<IpNetwork>,
    /// Links that have the programs, by index and name.
    pub links: BTreeMap<u32, String>,
}

/// What is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Links where packets find the short way.
    pub entering: BTreeSet<u32>,
    /// Links where flows become known.
    pub leaving: BTreeSet<u32>,
    /// Families that have a rule, and for which network, if this run wrote it.
    pub rules: BTreeMap<Family, Option<IpNetwork>>,
    /// Whether conntrack bears gaps.
    pub is_liberal: bool,
    /// Whether it does so for our sake.
    pub was_strict: bool,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// conntrack bears that it does not see all packets.
    BearGaps,
    /// It does so for the connections that there are, and no longer for all.
    MindGaps,
    /// A program onto a link.
    Attach(u32, String, Hook),
    /// A program off a link.
    Detach(u32, Hook),
    /// The rule, by which flows of this network become known.
    PutRule(IpNetwork),
    /// No rule of this family.
    RemoveRule(Family),
}

/// What this configuration wants on this node. `pods` are the host ends of links whose pods' policy is enforced; `shaped`
/// are links with a queue of their own. Pure.
#[must_use]
pub fn desired(
    config: &NetworkConfig,
    links: &[Link],
    pods: &BTreeSet<u32>,
    shaped: &BTreeSet<u32>,
) -> Wanted {
    if !config.fast_path.is_wanted() {
        return Wanted::default();
    }
    let v4 = config.v4.map(|v4| IpNetwork::V4(v4.network));
    let v6 = config.v6.map(|v6| IpNetwork::V6(v6.network));
    // Each family has a device, and its underlay.
    let outside = links.iter().flat_map(|link| match &link.kind {
        LinkKind::Vxlan(vxlan) if vxlan.vni == config.vni => {
            [Some(link.index), vxlan.underlay_index]
        }
        _ => [None; 2],
    });
    let outside: BTreeSet<u32> = outside.flatten().collect();
    let wanted = |link: &&Link| {
        let index = link.index;
        // The programs read frames; a link without MACs, such as WireGuard's, has none.
        outside.contains(&index) && link.mac != MacBytes::default()
            || pods.contains(&index) && !shaped.contains(&index)
    };
    let links = links.iter().filter(wanted).map(|link| (link.index, link.name.clone()));
    Wanted { clusters: v4.into_iter().chain(v6).collect(), links: links.collect() }
}

/// Steps from one to the other. Pure.
#[must_use]
pub fn plan(seen: &Seen, want: &Wanted) -> Vec<Step> {
    let mut steps = Vec::new();
    let there = [(Hook::FastEnter, &seen.entering), (Hook::FastLeave, &seen.leaving)];
    let is_wanted = |family| want.clusters.iter().any(|cluster| family_of(*cluster) == family);
    let surplus = seen.rules.keys().filter(|family| !is_wanted(**family));
    steps.extend(surplus.map(|family| Step::RemoveRule(*family)));
    if !want.clusters.is_empty() && !seen.is_liberal {
        steps.push(Step::BearGaps);
    }
    for (hook, there) in there {
        let missing = want.links.iter().filter(|(index, _)| !there.contains(index));
        steps.extend(missing.map(|(index, name)| Step::Attach(*index, name.clone(), hook)));
        let surplus = there.iter().filter(|index| !want.links.contains_key(index));
        steps.extend(surplus.map(|index| Step::Detach(*index, hook)));
    }
    let is_missing =
        |cluster: &&IpNetwork| seen.rules.get(&family_of(**cluster)) != Some(&Some(**cluster));
    steps.extend(want.clusters.iter().filter(is_missing).map(|cluster| Step::PutRule(*cluster)));
    if want.clusters.is_empty() && seen.was_strict {
        steps.push(Step::MindGaps);
    }
    steps
}

/// The family of a network's table.
fn family_of(network: IpNetwork) -> Family {
    if network.is_ipv4() { Family::Ip } else { Family::Ip6 }
}

/// The table with the rule. Pure.
#[must_use]
pub fn desired_table(cluster: IpNetwork) -> Table {
    let family = family_of(cluster);
    let mut table = Table::new(family, TABLE);
    let bits = CONFIRMED | TRANSLATED | OTHERWISE_CHANGED;
    let rule = format!(
        "{family} saddr {cluster} {family} daddr {cluster} ct status & {bits:#x} == {CONFIRMED:#x} meta mark set meta mark | {MARK_PLAIN:#x}"
    );
    table.chain(CHAIN, Chain::base("filter", NftHook::Postrouting, PRIORITY, [rule]));
    table
}

/// Reads the links of this node, and which of them are shaped.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn observe_links(netlink: &Netlink) -> Result<(Vec<Link>, BTreeSet<u32>), NetlinkError> {
    Ok((netlink.links()?, netlink.shaped_links()?))
}

/// What this run knows of the kernel.
#[derive(Debug, Default)]
pub struct FastPath {
    nft: Nft,
    /// Rules that it wrote.
    rules: BTreeMap<Family, IpNetwork>,
    /// It is off, and nothing of it is left.
    is_idle: bool,
}

impl FastPath {
    /// Makes the kernel hold what is wanted, in the namespace of the calling thread; says how many steps that took.
    ///
    /// # Errors
    /// The first step that failed; those that could be done without it are done. Packets go the whole way where it is
    /// not in force.
    pub fn ensure(&mut self, pins: &Pins, want: &Wanted) -> Result<usize, FastPathError> {
        let is_off = want.clusters.is_empty();
        if is_off && self.is_idle {
            return Ok(0);
        }
        if !is_off && !supports_fast_path() {
            return Err(FastPathError::Kernel);
        }
        self.is_idle = false;
        let steps = plan(&self.observe(pins)?, want);
        let mut failed = None;
        for step in &steps {
            if let Err(error) = self.apply(pins, step)
                && failed.is_none()
            {
                failed = Some(error);
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        self.is_idle = is_off;
        Ok(steps.len())
    }

    /// Makes the fast path as the network's configuration has it, for pods whose policies are in force.
    pub(crate) fn follow(
        &mut self,
        pins: &Pins,
        maps: &Maps,
        netlink: &Netlink,
        config: &NetworkConfig,
    ) -> FastPathStatus {
        let on = match config.fast_path {
            Switch::Auto => supports_fast_path(),
            Switch::On => true,
            Switch::Off => false,
        };
        let mut status = FastPathStatus { on, ..FastPathStatus::default() };
        let wanted = if on { wanted(maps, netlink, config) } else { Ok(Wanted::default()) };
        let outcome = wanted.and_then(|wanted| {
            status.links = wanted.links.len();
            self.ensure(pins, &wanted)
        });
        match outcome {
            Ok(0) => {}
            Ok(steps) => info!(on = status.on, links = status.links, steps, "fast path reconciled"),
            Err(error) => status.problem = Some(chain(&error)),
        }
        status
    }

    fn observe(&self, pins: &Pins) -> Result<Seen, FastPathError> {
        let links = |hook| Ok::<_, LoaderError>(links_with(pins, hook)?.into_iter().collect());
        let there = [
            (Family::Ip, cni_netlink::nft_ip_chain_exists(TABLE, CHAIN)?),
            (Family::Ip6, cni_netlink::nft_ip6_chain_exists(TABLE, CHAIN)?),
        ];
        let there = there.into_iter().filter(|(_, is_there)| *is_there);
        Ok(Seen {
            entering: links(Hook::FastEnter)?,
            leaving: links(Hook::FastLeave)?,
            rules: there.map(|(family, _)| (family, self.rules.get(&family).copied())).collect(),
            is_liberal: fs::read(LIBERAL).is_ok_and(|value| value.trim_ascii() == b"1"),
            was_strict: cni_netlink::nft_chain_exists(TABLE, STRICT)?,
        })
    }

    fn apply(&mut self, pins: &Pins, step: &Step) -> Result<(), FastPathError> {
        match step {
            Step::BearGaps => {
                // First, so that it is never ours without a sign.
                let mut sign = Table::new(Family::Inet, TABLE);
                sign.chain(STRICT, Chain::regular([]));
                self.nft.apply(&sign.replace_script())?;
                set_liberal("1")?;
            }
            Step::MindGaps => {
                bear_gaps().map_err(FastPathError::Connections)?;
                set_liberal("0")?;
                self.nft.remove(Family::Inet, TABLE)?;
            }
            Step::Attach(index, name, hook) => match attach(pins, name, *index, *hook) {
                // A link that went while we looked needs nothing.
                Err(_) if nix::net::if_::if_nametoindex(name.as_str()) != Ok(*index) => {}
                outcome => outcome?,
            },
            Step::Detach(index, hook) => detach_hook(pins, *index, *hook)?,
            Step::PutRule(cluster) => {
                self.nft.apply(&desired_table(*cluster).replace_script())?;
                self.rules.insert(family_of(*cluster), *cluster);
            }
            Step::RemoveRule(family) => {
                self.nft.remove(*family, TABLE)?;
                self.rules.remove(family);
            }
        }
        Ok(())
    }
}

fn set_liberal(value: &'static str) -> Result<(), FastPathError> {
    fs::write(LIBERAL, value).map_err(|source| FastPathError::Liberal { value, source })
}

fn wanted(maps: &Maps, netlink: &Netlink, config: &NetworkConfig) -> Result<Wanted, FastPathError> {
    let pods = maps.endpoints()?.into_iter().map(|(index, _)| index).collect();
    let (links, shaped) = observe_links(netlink)?;
    Ok(desired(config, &links, &pods, &shaped))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> IpNetwork {
        "10.244.0.0/16".parse().expect("CIDR")
    }

    fn cluster6() -> IpNetwork {
        "fd00:10:244::/48".parse().expect("CIDR")
    }

    fn wanted(links: &[u32]) -> Wanted {
        let links = links.iter().map(|index| (*index, format!("link{index}"))).collect();
        Wanted { clusters: [cluster()].into(), links }
    }

    #[test]
    fn an_underlay_without_frames_has_no_programs() {
        let network = "10.244.0.0/16".parse().expect("CIDR");
        let config = NetworkConfig::new(network, 24, 1, 8472).expect("valid");
        let vxlan = |underlay| cni_netlink::Vxlan {
            vni: 1,
            port: 8472,
            local: None,
            underlay_index: Some(underlay),
            learning: false,
        };
        let device = |underlay| Link {
            index: 9,
            name: "vxlan-orch".to_owned(),
            kind: LinkKind::Vxlan(vxlan(underlay)),
            mac: [2, 0, 0, 0, 0, 9],
            ..Link::default()
        };
        let ethernet =
            Link { index: 2, name: "eth0".to_owned(), mac: [2, 0, 0, 0, 0, 2], ..Link::default() };
        let wireguard = Link { index: 3, name: "wg0".to_owned(), ..Link::default() };
        let on = |underlay| {
            let links = [ethernet.clone(), wireguard.clone(), device(underlay)];
            let wanted = desired(&config, &links, &BTreeSet::new(), &BTreeSet::new());
            wanted.links.into_keys().collect::<Vec<_>>()
        };
        assert_eq!(on(2), [2, 9]);
        assert_eq!(on(3), [9]);
        let second = Link { index: 10, name: "vxlan-orch-v6".to_owned(), mac: [2; 6], ..device(2) };
        let links = [ethernet.clone(), device(2), second];
        let both = desired(&config, &links, &BTreeSet::new(), &BTreeSet::new());
        assert_eq!(both.links.into_keys().collect::<Vec<_>>(), [2, 9, 10], "one of each family");
        let off = NetworkConfig { fast_path: Switch::Off, ..config.clone() };
        assert_eq!(
            desired(&off, &[ethernet], &BTreeSet::new(), &BTreeSet::new()),
            Wanted::default()
        );
    }

    #[test]
    fn the_rule_comes_last_and_goes_first() {
        let up = plan(&Seen::default(), &wanted(&[3]));
        assert_eq!(up.first(), Some(&Step::BearGaps));
        assert_eq!(up.last(), Some(&Step::PutRule(cluster())));
        assert_eq!(up.len(), 4, "two programs on the link: {up:?}");
        let all = BTreeSet::from([3]);
        let there = Seen {
            entering: all.clone(),
            leaving: all,
            rules: [(Family::Ip, Some(cluster()))].into(),
            is_liberal: true,
            was_strict: true,
        };
        assert_eq!(plan(&there, &wanted(&[3])), [], "a second run changes nothing");
        let down = plan(&there, &Wanted::default());
        assert_eq!(
            down,
            [
                Step::RemoveRule(Family::Ip),
                Step::Detach(3, Hook::FastEnter),
                Step::Detach(3, Hook::FastLeave),
                Step::MindGaps
            ]
        );
        let not_ours = plan(&Seen { was_strict: false, ..there.clone() }, &Wanted::default());
        assert!(!not_ours.contains(&Step::MindGaps), "{not_ours:?}");
        let moved = plan(&there, &wanted(&[4]));
        assert!(moved.contains(&Step::Detach(3, Hook::FastLeave)), "{moved:?}");
        assert!(!moved.iter().any(|step| matches!(step, Step::PutRule(_))), "{moved:?}");
        // A rule that a former run left may be for another network.
        let unknown = Seen { rules: [(Family::Ip, None)].into(), ..there.clone() };
        assert_eq!(plan(&unknown, &wanted(&[3])), [Step::PutRule(cluster())]);
        // A second family comes, and the first one goes.
        let dual = Wanted { clusters: [cluster(), cluster6()].into(), ..wanted(&[3]) };
        assert_eq!(plan(&there, &dual), [Step::PutRule(cluster6())]);
        let alone = Wanted { clusters: [cluster6()].into(), ..wanted(&[3]) };
        assert_eq!(plan(&there, &alone), [Step::RemoveRule(Family::Ip), Step::PutRule(cluster6())]);
    }
}
