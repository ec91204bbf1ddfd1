//! What a table holds.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

/// Address family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// Both.
    Inet,
    /// Frames that a bridge passes.
    Bridge,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Inet => "inet",
            Self::Bridge => "bridge",
        })
    }
}

/// Where a base chain is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// To this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
    /// After routing.
    Postrouting,
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
        })
    }
}

/// What makes a chain a base chain. Its policy is always `accept`: what we do not know is not ours to drop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// `filter` or `nat`.
    pub kind: &'static str,
    /// The hook.
    pub hook: Hook,
    /// Priority; -100 is where destination NAT happens, 100 source NAT, 0 filtering.
    pub priority: i32,
}

/// An ordered list of rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// Set for a base chain.
    pub base: Option<Base>,
    /// The rules in nft's language, one each.
    pub rules: Vec<String>,
}

impl Chain {
    /// A chain that others jump to.
    pub fn regular(rules: impl IntoIterator<Item = String>) -> Self {
        Self { base: None, rules: rules.into_iter().collect() }
    }

    /// A chain at a hook.
    pub fn base(
        kind: &'static str,
        hook: Hook,
        priority: i32,
        rules: impl IntoIterator<Item = String>,
    ) -> Self {
        Self { base: Some(Base { kind, hook, priority }), rules: rules.into_iter().collect() }
    }
}

/// What a set holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetKind {
    /// Keys that we decide.
    Keys(BTreeSet<String>),
    /// Keys with values of this type (`verdict`, `ipv4_addr . inet_service`) that we decide.
    Map(String, BTreeMap<String, String>),
    /// Keys that rules add at packet time and that leave by themselves.
    Dynamic(Duration),
}

/// A set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Type of the key, e.g. `ipv4_addr . inet_proto . inet_service`.
    pub key: String,
    /// The content.
    pub kind: SetKind,
}

impl Set {
    /// A plain set.
    pub fn keys(key: &str, elements: impl IntoIterator<Item = String>) -> Self {
        Self { key: key.to_owned(), kind: SetKind::Keys(elements.into_iter().collect()) }
    }

    /// A map.
    pub fn map(
        key: &str,
        value: &str,
        elements: impl IntoIterator<Item = (String, String)>,
    ) -> Self {
        Self {
            key: key.to_owned(),
            kind: SetKind::Map(value.to_owned(), elements.into_iter().collect()),
        }
    }

    /// A set filled by rules.
    pub fn dynamic(key: &str, timeout: Duration) -> Self {
        Self { key: key.to_owned(), kind: SetKind::Dynamic(timeout) }
    }

    /// The elements as nft writes them.
    pub(crate) fn elements(&self) -> BTreeMap<&str, Option<&str>> {
        match &self.kind {
            SetKind::Keys(keys) => keys.iter().map(|key| (key.as_str(), None)).collect(),
            SetKind::Map(_, pairs) => {
                pairs.iter().map(|(key, value)| (key.as_str(), Some(value.as_str()))).collect()
            }
            SetKind::Dynamic(_) => BTreeMap::new(),
        }
    }
}

/// One table, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Family.
    pub family: Family,
    /// Name; everything in a table of this name is ours.
    pub name: String,
    /// Sets and maps by name.
    pub sets: BTreeMap<String, Set>,
    /// Chains by name.
    pub chains: BTreeMap<String, Chain>,
}

impl Table {
    /// An empty table.
    pub fn new(family: Family, name: &str) -> Self {
        Self { family, name: name.to_owned(), sets: BTreeMap::new(), chains: BTreeMap::new() }
    }

    /// Adds a chain.
    pub fn chain(&mut self, name: impl Into<String>, chain: Chain) {
        self.chains.insert(name.into(), chain);
    }

    /// Adds a set or map.
    pub fn set(&mut self, name: impl Into<String>, set: Set) {
        self.sets.insert(name.into(), set);
    }

    /// Names of the sets that rules fill.
    pub(crate) fn dynamic_sets(&self) -> impl Iterator<Item = &str> {
        self.sets
            .iter()
            .filter(|(_, set)| matches!(set.kind, SetKind::Dynamic(_)))
            .map(|(name, _)| name.as_str())
    }
}
