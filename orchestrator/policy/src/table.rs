//! Decision tables: what the kernel's policy map of one endpoint holds, and how it is read.

use std::fmt;

use crate::world::Protocol;

/// A set of addresses that no policy of this node tells apart. Numbers are the node's own and are not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Class(pub u32);

impl Class {
    /// Addresses that have no entry of their own, and the class whose rows serve every class without rows.
    pub const OUTSIDE: Self = Self(0);
    /// While a plan runs: addresses that are about to lose their entry.
    pub const LEAVING: Self = Self(1);
    /// The first number that is given out.
    pub const FIRST: Self = Self(16);
}

/// A rule's number in tables and flow events; [`crate::Compiled::rules`] names it. Not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RuleId(pub u32);

impl RuleId {
    /// No policy selects the endpoint in this direction.
    pub const NO_POLICY: Self = Self(0);
}

/// Seen from the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// Which packets of one class and direction a row speaks about. The longest match decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    /// `None`: every protocol, also those without ports.
    pub protocol: Option<Protocol>,
    /// Destination port; bits behind `bits` are zero.
    pub port: u16,
    /// How many bits of the port count: 0 to 16; 0 without protocol.
    pub bits: u8,
}

impl Ports {
    /// Every packet.
    pub const ANY: Self = Self { protocol: None, port: 0, bits: 0 };

    fn matches(self, protocol: u8, port: u16) -> bool {
        let mask = u16::MAX.checked_shl(16 - u32::from(self.bits)).unwrap_or(0);
        self.protocol.is_none_or(|own| own.number() == protocol) && port & mask == self.port
    }
}

/// What a row says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Verdict {
    pub allow: bool,
    pub rule: RuleId,
}

/// One row: key and value of one entry of the endpoint's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Row {
    pub class: Class,
    pub direction: Direction,
    pub ports: Ports,
    pub verdict: Verdict,
}

/// The rows of one class and direction without the class: equal for all classes that are treated alike.
pub(crate) type Rows = [(Ports, Verdict)];

/// All rows of an endpoint. Per direction, a class has either rows for every packet or none at all; without rows it is
/// treated as [`Class::OUTSIDE`], which always has rows.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Table {
    /// Sorted.
    rows: Vec<Row>,
}

impl Table {
    /// The rows in any order.
    #[must_use]
    pub fn new(mut rows: Vec<Row>) -> Self {
        rows.sort_unstable();
        rows.shrink_to_fit();
        Self { rows }
    }

    /// Sorted by class, direction and ports.
    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The decision about one packet, as the kernel makes it: rows of the class or else of the outside; the longest
    /// match wins. `None` only for a table that no compiler made.
    #[must_use]
    pub fn decide(
        &self,
        direction: Direction,
        class: Class,
        protocol: u8,
        port: u16,
    ) -> Option<Verdict> {
        self.effective(direction, class)
            .iter()
            .filter(|row| row.ports.matches(protocol, port))
            .max_by_key(|row| (row.ports.protocol.is_some(), row.ports.bits))
            .map(|row| row.verdict)
    }

    /// Whether any policy has something to say in a direction.
    #[must_use]
    pub fn speaks(&self, direction: Direction) -> bool {
        let mut rows = self.rows.iter().filter(|row| row.direction == direction);
        rows.any(|row| row.verdict.rule != RuleId::NO_POLICY)
    }

    /// Rows that decide about a class: its own or those of the outside.
    pub(crate) fn effective(&self, direction: Direction, class: Class) -> &[Row] {
        match self.own(direction, class) {
            [] => self.own(direction, Class::OUTSIDE),
            own => own,
        }
    }

    fn own(&self, direction: Direction, class: Class) -> &[Row] {
        let key = (class, direction);
        let start = self.rows.partition_point(|row| (row.class, row.direction) < key);
        let count = self.rows[start..].partition_point(|row| (row.class, row.direction) == key);
        &self.rows[start..start + count]
    }
}

/// Whether rows say the same, the class aside.
pub(crate) fn same_rows(left: &[Row], right: &Rows) -> bool {
    left.len() == right.len()
        && left.iter().zip(right).all(|(row, right)| (row.ports, row.verdict) == *right)
}

/// Cuts `first..=last` into the fewest aligned blocks.
pub(crate) fn port_prefixes(first: u16, last: u16) -> Vec<(u16, u8)> {
    let (mut at, end) = (u32::from(first), u32::from(last) + 1);
    let mut all = Vec::new();
    while at < end {
        let aligned = at.trailing_zeros().min(16);
        let fits = (end - at).ilog2();
        let zeros = aligned.min(fits);
        all.push((u16::try_from(at).expect("below the end, which is 65536"), 16 - zeros as u8));
        at += 1 << zeros;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_become_few_prefixes() {
        assert_eq!(port_prefixes(0, u16::MAX), [(0, 0)]);
        assert_eq!(port_prefixes(80, 80), [(80, 16)]);
        assert_eq!(port_prefixes(80, 81), [(80, 15)]);
        assert_eq!(port_prefixes(81, 82), [(81, 16), (82, 16)]);
        assert_eq!(port_prefixes(1024, u16::MAX).len(), 6);
        assert_eq!(port_prefixes(1, 65534).len(), 30, "the worst range");
        assert_eq!(port_prefixes(u16::MAX, u16::MAX), [(u16::MAX, 16)]);
    }

    #[test]
    fn prefixes_cover_exactly_the_range() {
        for (first, last) in
            [(0, 0), (1, 7), (5, 1000), (1023, 1025), (30000, 32767), (65535, 65535)]
        {
            let rows = port_prefixes(first, last);
            for port in 0..=u16::MAX {
                let hits = rows
                    .iter()
                    .filter(|(start, bits)| {
                        Ports { protocol: None, port: *start, bits: *bits }.matches(6, port)
                    })
                    .count();
                assert_eq!(
                    hits,
                    usize::from((first..=last).contains(&port)),
                    "{first}-{last}: {port}"
                );
            }
        }
    }
}
