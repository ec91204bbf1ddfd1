//! Ranges of addresses, and the order in which they are tried. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

/// What is wrong with a range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Fewer than two addresses besides network and broadcast address.
    #[error("\"subnet\" {0} is too small to give addresses from")]
    TooSmall(IpNetwork),
    /// An address of the subnet instead of the subnet's.
    #[error("\"subnet\" {0} has host bits set; its network address is {network}", network = .0.network())]
    HostBits(IpNetwork),
    /// An address that does not belong to the subnet.
    #[error("\"{key}\" {address} is outside of \"subnet\" {subnet}")]
    Outside {
        /// Which address.
        key: &'static str,
        /// Its value.
        address: IpAddr,
        /// The subnet.
        subnet: IpNetwork,
    },
    /// The end before the start.
    #[error("\"rangeEnd\" {end} is before \"rangeStart\" {start}")]
    Reversed {
        /// Where it should start.
        start: IpAddr,
        /// Where it should end.
        end: IpAddr,
    },
    /// A set of nothing.
    #[error("range set {0} is empty")]
    EmptySet(usize),
    /// IPv4 and IPv6 in one set, which gives one address.
    #[error("range set {0} mixes address families")]
    Mixed(usize),
    /// An address in two ranges.
    #[error("ranges {} and {} overlap", .0[0], .0[1])]
    Overlap(Box<[Range; 2]>),
}

/// Addresses from `start` to `end`, both included, of one subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    subnet: IpNetwork,
    start: u128,
    end: u128,
    gateway: IpAddr,
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

impl Range {
    /// Checks a range and fills in what is not said: the gateway is the first host address, the range goes from
    /// the first to the last host address (which for IPv4 is the one before the broadcast address).
    ///
    /// # Errors
    /// Names key and value.
    pub fn new(
        subnet: IpNetwork,
        start: Option<IpAddr>,
        end: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> Result<Self, RangeError> {
        let width = if subnet.is_ipv4() { 32 } else { 128 };
        if subnet.prefix() > width - 2 {
            return Err(RangeError::TooSmall(subnet));
        }
        if subnet.ip() != subnet.network() {
            return Err(RangeError::HostBits(subnet));
        }
        let inside = |key, address: Option<IpAddr>| match address {
            Some(address) if !subnet.contains(address) => {
                Err(RangeError::Outside { key, address, subnet })
            }
            address => Ok(address.map(bits)),
        };
        let first = bits(subnet.network()) + 1;
        // `broadcast` is the last address for IPv6 too, where it is an ordinary one.
        let last = bits(subnet.broadcast()) - u128::from(subnet.is_ipv4());
        let mut range = Self { subnet, start: first, end: last, gateway: subnet.network() };
        range.start = inside("rangeStart", start)?.unwrap_or(first);
        range.end = inside("rangeEnd", end)?.unwrap_or(last);
        range.gateway = range.address(inside("gateway", gateway)?.unwrap_or(first));
        if range.start > range.end {
            let (start, end) = (range.address(range.start), range.address(range.end));
            return Err(RangeError::Reversed { start, end });
        }
        Ok(range)
    }

    fn address(&self, bits: u128) -> IpAddr {
        match u32::try_from(bits) {
            Ok(bits) if self.subnet.is_ipv4() => Ipv4Addr::from_bits(bits).into(),
            _ => Ipv6Addr::from_bits(bits).into(),
        }
    }

    /// Whether an address is one of the range.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.subnet.is_ipv4()
            && (self.start..=self.end).contains(&bits(address))
    }

    /// Whether two ranges share an address.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.subnet.is_ipv4() == other.subnet.is_ipv4()
            && self.start <= other.end
            && other.start <= self.end
    }

    /// The subnet's gateway, which is never given away.
    #[must_use]
    pub fn gateway(&self) -> IpAddr {
        self.gateway
    }

    /// An address of the range with the prefix of the subnet.
    #[must_use]
    pub fn with_prefix(&self, address: IpAddr) -> IpNetwork {
        IpNetwork::new(address, self.subnet.prefix()).expect("the subnet has the same family")
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.address(self.start), self.address(self.end))
    }
}

/// Ranges of one family; an attachment gets one address of the set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<Range>,
}

impl RangeSet {
    /// Checks the set at `index` of a configuration.
    ///
    /// # Errors
    /// If it is empty, mixes families, or two of its ranges overlap.
    pub fn new(index: usize, ranges: Vec<Range>) -> Result<Self, RangeError> {
        let first = ranges.first().ok_or(RangeError::EmptySet(index))?;
        if ranges.iter().any(|range| range.subnet.is_ipv4() != first.subnet.is_ipv4()) {
            return Err(RangeError::Mixed(index));
        }
        for (at, range) in ranges.iter().enumerate() {
            if let Some(other) = ranges[at + 1..].iter().find(|other| range.overlaps(other)) {
                return Err(RangeError::Overlap(Box::new([range.clone(), other.clone()])));
            }
        }
        Ok(Self { ranges })
    }

    /// Whether the set's addresses are IPv4.
    #[must_use]
    pub fn is_ipv4(&self) -> bool {
        self.ranges[0].subnet.is_ipv4()
    }

    /// Refuses two sets that share an address.
    ///
    /// # Errors
    /// Names the ranges.
    pub fn check_apart(&self, other: &Self) -> Result<(), RangeError> {
        for range in &self.ranges {
            if let Some(other) = other.ranges.iter().find(|other| range.overlaps(other)) {
                return Err(RangeError::Overlap(Box::new([range.clone(), other.clone()])));
            }
        }
        Ok(())
    }

    /// The range an address belongs to.
    #[must_use]
    pub fn range_of(&self, address: IpAddr) -> Option<&Range> {
        self.ranges.iter().find(|range| range.contains(address))
    }

    fn is_gateway(&self, address: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.gateway == address)
    }

    /// How many addresses the set can give.
    #[must_use]
    pub fn capacity(&self) -> u128 {
        let sizes = self.ranges.iter().map(|range| (range.end - range.start).saturating_add(1));
        let all = sizes.fold(0u128, u128::saturating_add);
        let mut gateways: Vec<IpAddr> = self.ranges.iter().map(|range| range.gateway).collect();
        gateways.sort();
        gateways.dedup();
        let inside =
            gateways.into_iter().filter(|gateway| self.range_of(*gateway).is_some()).count();
        all.saturating_sub(inside as u128)
    }

    /// All addresses of the set but gateways, each once, beginning after the one that was given last: an address
    /// that was just freed is used again as late as possible.
    pub fn candidates(&self, last: Option<IpAddr>) -> impl Iterator<Item = (IpAddr, &Range)> {
        let full = |range: &Range| range.start..=range.end;
        let start = last.and_then(|last| {
            let at = self.ranges.iter().position(|range| range.contains(last))?;
            Some((at, bits(last)))
        });
        let mut parts: Vec<(&Range, std::ops::RangeInclusive<u128>)> = Vec::new();
        match start {
            None => parts.extend(self.ranges.iter().map(|range| (range, full(range)))),
            Some((at, last)) => {
                let (before, after) = (&self.ranges[..at], &self.ranges[at + 1..]);
                let range = &self.ranges[at];
                // `last` is in the range, so that at its end the first part is empty: `end + 1..=end`. For the
                // very last IPv6 address there is no such number, and no such part.
                if let Some(next) = last.checked_add(1) {
                    parts.push((range, next..=range.end));
                }
                parts.extend(after.iter().chain(before).map(|range| (range, full(range))));
                parts.push((range, range.start..=last));
            }
        }
        parts
            .into_iter()
            .flat_map(|(range, part)| part.map(move |bits| (range.address(bits), range)))
            .filter(|(address, _)| !self.is_gateway(*address))
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, range) in self.ranges.iter().enumerate() {
            write!(f, "{}{range}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNetwork {
        text.parse().expect("CIDR")
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("address")
    }

    #[test]
    fn what_is_not_said_has_the_references_defaults() {
        let v4 = Range::new(net("10.1.0.0/24"), None, None, None).expect("good");
        assert_eq!(v4.to_string(), "10.1.0.1-10.1.0.254");
        assert_eq!(v4.gateway(), ip("10.1.0.1"));
        let v6 = Range::new(net("fd00::/64"), None, None, None).expect("good");
        assert_eq!(v6.to_string(), "fd00::1-fd00::ffff:ffff:ffff:ffff");
        let some = Range::new(net("10.1.0.0/24"), Some(ip("10.1.0.9")), Some(ip("10.1.0.9")), None);
        assert_eq!(some.expect("good").to_string(), "10.1.0.9-10.1.0.9");
        Range::new(net("::/0"), None, None, None).expect("the whole of IPv6");
        Range::new(net("0.0.0.0/0"), None, None, None).expect("the whole of IPv4");
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        for text in ["10.1.0.0/31", "10.1.0.1/32", "fd00::/127", "fd00::/128"] {
            let error = Range::new(net(text), None, None, None).expect_err(text);
            assert!(matches!(error, RangeError::TooSmall(_)));
        }
        let error = Range::new(net("10.1.0.5/24"), None, None, None).expect_err("host bits");
        assert!(error.to_string().contains("10.1.0.0"), "{error}");
        let subnet = net("10.1.0.0/24");
        let far = Some(ip("10.2.0.1"));
        assert!(Range::new(subnet, far, None, None).is_err());
        assert!(Range::new(subnet, None, far, None).is_err());
        assert!(Range::new(subnet, None, None, far).is_err());
        assert!(Range::new(subnet, Some(ip("fd00::1")), None, None).is_err());
        let reversed = Range::new(subnet, Some(ip("10.1.0.9")), Some(ip("10.1.0.8")), None);
        assert!(matches!(reversed, Err(RangeError::Reversed { .. })));
        let v4 = Range::new(subnet, None, None, None).expect("good");
        let v6 = Range::new(net("fd00::/64"), None, None, None).expect("good");
        assert!(matches!(RangeSet::new(0, vec![v4.clone(), v6]), Err(RangeError::Mixed(0))));
        assert!(matches!(RangeSet::new(0, vec![v4.clone(), v4]), Err(RangeError::Overlap(_))));
        assert_eq!(RangeSet::new(2, Vec::new()), Err(RangeError::EmptySet(2)));
    }

    #[test]
    fn the_order_goes_round_from_the_last_one() {
        let range = |start, end| {
            Range::new(net("10.1.0.0/24"), Some(ip(start)), Some(ip(end)), None).expect("good")
        };
        let set =
            RangeSet::new(0, vec![range("10.1.0.1", "10.1.0.3"), range("10.1.0.8", "10.1.0.9")]);
        let set = set.expect("good");
        let order = |last: Option<&str>| -> Vec<String> {
            set.candidates(last.map(ip)).map(|(address, _)| address.to_string()).collect()
        };
        assert_eq!(order(None), ["10.1.0.2", "10.1.0.3", "10.1.0.8", "10.1.0.9"]);
        assert_eq!(order(Some("10.1.0.8")), ["10.1.0.9", "10.1.0.2", "10.1.0.3", "10.1.0.8"]);
        assert_eq!(order(Some("10.1.0.9")), ["10.1.0.2", "10.1.0.3", "10.1.0.8", "10.1.0.9"]);
        assert_eq!(order(Some("10.9.9.9")), order(None), "one of another configuration");
        assert_eq!(set.capacity(), 4);
    }

    proptest! {
        #[test]
        fn every_address_but_gateways_comes_exactly_once(
            prefix in 24u8..=30,
            cuts in proptest::collection::vec(0u32..256, 2..6),
            gateway in proptest::option::of(0u32..256),
            last in 0u32..256,
            v6 in any::<bool>(),
        ) {
            let at = |offset: u32| -> IpAddr {
                if v6 {
                    Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(offset)).into()
                } else {
                    Ipv4Addr::from_bits(0x0a01_0000 | offset).into()
                }
            };
            let subnet = IpNetwork::new(at(0), if v6 { prefix + 96 } else { prefix }).expect("fits");
            let mut cuts = cuts;
            cuts.sort_unstable();
            cuts.dedup();
            let ranges: Vec<Range> = cuts
                .chunks_exact(2)
                .filter_map(|pair| {
                    Range::new(subnet, Some(at(pair[0])), Some(at(pair[1])), gateway.map(at)).ok()
                })
                .collect();
            prop_assume!(!ranges.is_empty());
            let set = RangeSet::new(0, ranges).expect("sorted cuts do not overlap");
            let listed: Vec<IpAddr> = set.candidates(Some(at(last))).map(|(ip, _)| ip).collect();
            let distinct: BTreeSet<IpAddr> = listed.iter().copied().collect();
            prop_assert_eq!(listed.len(), distinct.len());
            prop_assert_eq!(listed.len() as u128, set.capacity());
            for (address, range) in set.candidates(None) {
                prop_assert!(range.contains(address) && range.gateway() != address);
                prop_assert!(distinct.contains(&address));
            }
            if set.range_of(at(last)).is_some() && distinct.contains(&at(last)) {
                prop_assert_eq!(listed.last(), Some(&at(last)), "the last one given comes last");
            }
        }
    }
}
