//! What the sets hold, and the steps to what they should hold. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use cni_nftables::{COMMENT_MAX, Element, Target, Transaction};
use cni_spec::{AttachmentId, NetworkName, Owner};

/// Sets of addresses, from whose elements a pod is read back.
pub(crate) const PODS: [&str; 2] = ["pods4", "pods6"];
/// Bridges that are confined, and those within which containers may talk.
pub(crate) const BRIDGES: &str = "bridges";
pub(crate) const SAME: &str = "same";

/// Begins the comment of an element …
const OPEN: &str = "cni:";
/// … and of a container of a confined bridge: `cni-POLICY@BRIDGE:OWNER`.
const CONFINED: &str = "cni-";
/// Bytes that stand before an owner at most: prefix, policy, a bridge's name of 15 bytes.
const BEFORE_OWNER: usize = 4 + 11 + 1 + 15 + 1;
/// Bytes of a link's name in a key.
const NAME_BYTES: usize = 16;

/// Who may open connections to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Policy {
    /// Not the containers of other confined bridges.
    SameBridge,
    /// Not the containers of its own bridge, either.
    Isolated,
}

impl Policy {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SameBridge => "same-bridge",
            Self::Isolated => "isolated",
        }
    }
}

/// By what a container is confined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Confined {
    pub(crate) policy: Policy,
    pub(crate) bridge: String,
}

/// An address of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) ip: IpAddr,
    pub(crate) owner: Owner,
    pub(crate) confined: Option<Confined>,
}

/// Everything in the sets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Present {
    pub(crate) pods: Vec<Pod>,
    pub(crate) bridges: Bridges,
}

/// The sets of bridges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Bridges {
    pub(crate) confined: BTreeSet<String>,
    pub(crate) same: BTreeSet<String>,
}

/// What to change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) remove: Vec<Pod>,
    pub(crate) add: Vec<Pod>,
    before: Bridges,
    after: Bridges,
}

pub(crate) fn owner(network: &NetworkName, id: &AttachmentId) -> Owner {
    Owner::new(network, id, COMMENT_MAX - BEFORE_OWNER)
}

impl Pod {
    /// `None` if the element is not one that we have made.
    pub(crate) fn parse(element: &Element) -> Option<Self> {
        let ip = parse_ip(&element.key)?;
        if let Some(owner) = element.comment.strip_prefix(OPEN) {
            return Some(Self { ip, owner: Owner::of_comment(owner), confined: None });
        }
        // No link has a colon in its name.
        let (before, owner) = element.comment.strip_prefix(CONFINED)?.split_once(':')?;
        let (name, bridge) = before.split_once('@')?;
        let policies = [Policy::SameBridge, Policy::Isolated];
        let policy = policies.into_iter().find(|policy| policy.name() == name)?;
        let confined = Some(Confined { policy, bridge: bridge.to_owned() });
        Some(Self { ip, owner: Owner::of_comment(owner), confined })
    }

    fn element(&self) -> Element {
        let comment = match &self.confined {
            None => format!("{OPEN}{}", self.owner),
            Some(Confined { policy, bridge }) => {
                format!("{CONFINED}{}@{bridge}:{}", policy.name(), self.owner)
            }
        };
        Element { key: ip_bytes(self.ip), target: Target::None, comment }
    }

    fn set(&self) -> &'static str {
        if self.ip.is_ipv4() { PODS[0] } else { PODS[1] }
    }
}

impl Bridges {
    /// What the containers want. One that is isolated counts for its bridge.
    pub(crate) fn of<'a>(pods: impl Iterator<Item = &'a Pod>) -> Self {
        let mut isolated = BTreeSet::new();
        let mut bridges = Self::default();
        for Confined { policy, bridge } in pods.filter_map(|pod| pod.confined.as_ref()) {
            bridges.confined.insert(bridge.clone());
            match policy {
                Policy::SameBridge => bridges.same.insert(bridge.clone()),
                Policy::Isolated => isolated.insert(bridge.clone()),
            };
        }
        bridges.same.retain(|bridge| !isolated.contains(bridge));
        bridges
    }
}

fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn parse_ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// A link's name as a key.
fn name_bytes(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(NAME_BYTES, 0);
    bytes
}

/// The first name of a key.
pub(crate) fn parse_name(key: &[u8]) -> Option<String> {
    let name = key.get(..NAME_BYTES)?.split(|byte| *byte == 0).next()?;
    String::from_utf8(name.to_vec()).ok()
}

/// Steps of ADD. What is there of this attachment, or of an address that is this container's now, is what a killed ADD or a
/// container that went without DEL has left, and goes.
pub(crate) fn plan_add(present: &Present, want: &[Pod]) -> Plan {
    let is_stale = |pod: &Pod| want.iter().any(|one| one.owner == pod.owner || one.ip == pod.ip);
    plan(present, is_stale, want)
}

/// Steps of DEL and GC.
pub(crate) fn plan_remove(present: &Present, is_gone: impl Fn(&Pod) -> bool) -> Plan {
    plan(present, is_gone, &[])
}

fn plan(present: &Present, goes: impl Fn(&Pod) -> bool, add: &[Pod]) -> Plan {
    let (remove, stay): (Vec<Pod>, Vec<Pod>) = present.pods.iter().cloned().partition(goes);
    let after = Bridges::of(stay.iter().chain(add));
    Plan { remove, add: add.to_vec(), before: present.bridges.clone(), after }
}

impl Plan {
    /// As one transaction: first what goes, so that the same key may come again.
    pub(crate) fn write(&self, transaction: &mut Transaction) {
        for pod in &self.remove {
            transaction.delete(pod.set(), &ip_bytes(pod.ip));
        }
        for pod in &self.add {
            transaction.add(pod.set(), &pod.element());
        }
        let one: fn(&String) -> Vec<u8> = |name| name_bytes(name);
        let pair: fn(&String) -> Vec<u8> = |name| [name_bytes(name), name_bytes(name)].concat();
        for (set, before, after, key) in [
            (BRIDGES, &self.before.confined, &self.after.confined, one),
            (SAME, &self.before.same, &self.after.same, pair),
        ] {
            for name in before.difference(after) {
                transaction.delete(set, &key(name));
            }
            for name in after.difference(before) {
                let element =
                    Element { key: key(name), target: Target::None, comment: String::new() };
                transaction.add(set, &element);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(ip: &str, container: &str, confined: Option<(Policy, &str)>) -> Pod {
        let id = AttachmentId {
            container_id: container.parse().expect("good"),
            ifname: "eth0".parse().expect("good"),
        };
        let confined =
            confined.map(|(policy, bridge)| Confined { policy, bridge: bridge.to_owned() });
        let owner = owner(&"net".parse().expect("good"), &id);
        Pod { ip: ip.parse().expect("good"), owner, confined }
    }

    fn present(pods: &[Pod]) -> Present {
        Present { pods: pods.to_vec(), bridges: Bridges::of(pods.iter()) }
    }

    fn names(set: &BTreeSet<String>) -> Vec<&str> {
        set.iter().map(String::as_str).collect()
    }

    #[test]
    fn a_pod_reads_back_from_its_element_however_long_its_names_are() {
        let long = "c".repeat(200);
        for pod in [
            pod("10.1.0.2", "a", None),
            pod("fd00::2", "a", Some((Policy::SameBridge, "cni0"))),
            pod("10.1.0.2", &long, Some((Policy::Isolated, "fifteen-letters"))),
        ] {
            let element = pod.element();
            assert!(element.comment.len() <= COMMENT_MAX, "{}", element.comment);
            assert_eq!(Pod::parse(&element), Some(pod));
        }
        let mut foreign = pod("10.1.0.2", "a", None).element();
        for comment in ["mine", "cni-closed@cni0:net/a/eth0", "cni-isolated:net/a/eth0"] {
            foreign.comment = comment.to_owned();
            assert_eq!(Pod::parse(&foreign), None, "{comment}");
        }
        assert_eq!(parse_name(&name_bytes("cni0")), Some("cni0".to_owned()));
        assert_eq!(parse_name(b"short"), None);
    }

    #[test]
    fn what_has_the_address_or_is_the_attachments_is_replaced() {
        let seen = present(&[
            pod("10.1.0.2", "gone", None),
            pod("10.1.0.9", "b", None),
            pod("10.1.0.4", "c", None),
        ]);
        let want = [pod("10.1.0.2", "b", None)];
        let plan = plan_add(&seen, &want);
        assert_eq!(plan.remove, seen.pods[..2]);
        assert_eq!(plan.add, want);
    }

    #[test]
    fn a_bridge_is_confined_until_its_last_container_goes_and_isolation_counts() {
        let same = pod("10.1.0.2", "a", Some((Policy::SameBridge, "cni0")));
        let isolated = pod("10.1.0.3", "b", Some((Policy::Isolated, "cni0")));
        let plan = plan_add(&present(&[]), std::slice::from_ref(&same));
        assert_eq!(
            (names(&plan.after.confined), names(&plan.after.same)),
            (vec!["cni0"], vec!["cni0"])
        );
        let both = present(&[same.clone(), isolated.clone()]);
        assert_eq!(
            (names(&both.bridges.confined), names(&both.bridges.same)),
            (vec!["cni0"], vec![])
        );
        let plan = plan_remove(&both, |pod| pod.owner == isolated.owner);
        assert_eq!(names(&plan.after.same), ["cni0"]);
        let plan = plan_remove(&present(std::slice::from_ref(&same)), |_| true);
        assert_eq!(plan.after, Bridges::default());
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fuzz_an_element_of_any_bytes_is_read_or_skipped(
            key in prop::collection::vec(any::<u8>(), 0..40), comment in "(cni)?(:|-isolated@)?.{0,20}",
        ) {
            let name = parse_name(&key);
            prop_assert!(name.is_none_or(|name| name.len() <= NAME_BYTES));
            let element = Element { key, target: Target::None, comment };
            if let Some(pod) = Pod::parse(&element) {
                prop_assert_eq!(Pod::parse(&pod.element()), Some(pod));
            }
        }
    }
}
