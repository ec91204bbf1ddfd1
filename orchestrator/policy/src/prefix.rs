//! Address prefixes and longest match, as the kernel's LPM trie does it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses that share their first bits; host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    addr: IpAddr,
    len: u8,
}

impl Prefix {
    /// The prefix of `len` bits that `addr` lies in; `None` when the family has fewer bits.
    #[must_use]
    pub fn new(addr: IpAddr, len: u8) -> Option<Self> {
        (len <= width(addr)).then(|| Self { addr: masked(addr, len), len })
    }

    /// One address.
    #[must_use]
    pub fn host(addr: IpAddr) -> Self {
        Self { addr, len: width(addr) }
    }

    /// `10.0.0.0/8`; bits behind the length are dropped, as the API does.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (addr, len) = text.split_once('/')?;
        if !len.bytes().all(|digit| digit.is_ascii_digit()) {
            return None;
        }
        Self::new(addr.parse().ok()?, len.parse().ok()?)
    }

    /// Its first address.
    #[must_use]
    pub fn addr(self) -> IpAddr {
        self.addr
    }

    /// Number of bits that count.
    #[must_use]
    pub fn prefix_len(self) -> u8 {
        self.len
    }

    /// Whether all of `other` lies in it.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.addr.is_ipv4() == other.addr.is_ipv4()
            && self.len <= other.len
            && masked(other.addr, self.len) == self.addr
    }

    /// The prefix of `len` bits around it; `len` is at most its own.
    fn widened(self, len: u8) -> Self {
        Self { addr: masked(self.addr, len), len }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

fn width(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

fn masked(addr: IpAddr, len: u8) -> IpAddr {
    match addr {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from(u32::from(ip) & mask))
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from(u128::from(ip) & mask))
        }
    }
}

/// Values by prefix, with longest match.
#[derive(Debug)]
pub(crate) struct PrefixMap<V> {
    values: HashMap<Prefix, V>,
    /// Lengths in use, longest first: IPv4, IPv6.
    lengths: [Vec<u8>; 2],
}

impl<V> Default for PrefixMap<V> {
    fn default() -> Self {
        Self { values: HashMap::new(), lengths: [Vec::new(), Vec::new()] }
    }
}

impl<V> PrefixMap<V> {
    pub(crate) fn entry(&mut self, prefix: Prefix) -> &mut V
    where
        V: Default,
    {
        let lengths = &mut self.lengths[usize::from(prefix.addr.is_ipv6())];
        if let Err(place) = lengths.binary_search_by(|len| prefix.len.cmp(len)) {
            lengths.insert(place, prefix.len);
        }
        self.values.entry(prefix).or_default()
    }

    /// Values of all prefixes around `prefix`, itself included, longest first.
    pub(crate) fn around(&self, prefix: Prefix) -> impl Iterator<Item = (Prefix, &V)> {
        self.lengths[usize::from(prefix.addr.is_ipv6())]
            .iter()
            .skip_while(move |len| **len > prefix.len)
            .filter_map(move |len| {
                let wide = prefix.widened(*len);
                self.values.get(&wide).map(|value| (wide, value))
            })
    }

    pub(crate) fn contains(&self, prefix: Prefix) -> bool {
        self.values.contains_key(&prefix)
    }

    /// All, a prefix before those inside it.
    pub(crate) fn sorted(&self) -> Vec<(Prefix, &V)> {
        let mut all: Vec<_> = self.values.iter().map(|(prefix, value)| (*prefix, value)).collect();
        all.sort_unstable_by_key(|(prefix, _)| *prefix);
        all
    }

    /// The value of the longest prefix around `prefix`.
    pub(crate) fn longest(&self, prefix: Prefix) -> Option<&V> {
        self.around(prefix).next().map(|(_, value)| value)
    }
}

impl<V: Default + Clone> PrefixMap<V> {
    pub(crate) fn of(map: &BTreeMap<Prefix, V>) -> Self {
        let mut all = Self::default();
        for (prefix, value) in map {
            *all.entry(*prefix) = value.clone();
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        Prefix::parse(text).expect("a prefix")
    }

    #[test]
    fn host_bits_are_dropped_and_families_never_mix() {
        assert_eq!(prefix("10.1.2.3/8"), prefix("10.0.0.0/8"));
        assert_eq!(prefix("0.0.0.0/0").to_string(), "0.0.0.0/0");
        assert!(!prefix("0.0.0.0/0").contains(prefix("::/0")));
        assert!(!prefix("::/0").contains(prefix("10.0.0.0/8")));
        assert!(prefix("fd00::/8").contains(prefix("fd12::1/128")));
        for bad in ["10.0.0.0", "10.0.0.0/33", "::/129", "10.0.0/8", "10.0.0.0/+8", "/8", "a/8"] {
            assert_eq!(Prefix::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_longest_match_wins() {
        let mut map = PrefixMap::default();
        for (value, text) in
            ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32"].iter().enumerate()
        {
            *map.entry(prefix(text)) = value;
        }
        let find = |text| map.longest(prefix(text)).copied();
        assert_eq!(find("10.1.2.3/32"), Some(3));
        assert_eq!(find("10.1.2.4/32"), Some(2));
        assert_eq!(find("10.0.0.0/9"), Some(1));
        assert_eq!(find("11.0.0.0/32"), Some(0));
        assert_eq!(find("::1/128"), None);
        assert_eq!(map.around(prefix("10.1.2.3/32")).count(), 4);
    }
}
