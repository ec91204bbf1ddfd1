//! Why a packet passed or was dropped: the twin of `ebpf/progs/include/reasons.h`.

/// A direction as NetworkPolicy says it: seen from the pod.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// To the pod.
    Ingress = 0,
    /// From the pod.
    Egress = 1,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal, $drop:literal;)+) => {
        /// Why a packet passed or was dropped: index of the counters, and what people are told.
        #[repr(u8)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name = $number,)+
        }

        impl Reason {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The name, as in `reasons.h` and in metrics.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// Whether the packet is gone.
            #[must_use]
            pub fn is_drop(self) -> bool {
                match self { $(Self::$name => $drop,)+ }
            }

            /// From its number.
            #[must_use]
            pub fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// A flow that is known and still allowed.
    Established = 0, "established", false;
    /// A new flow that a rule allows.
    Allowed = 1, "allowed", false;
    /// No policy applies to the pod in this direction.
    NotIsolated = 2, "not-isolated", false;
    /// The pod's own node.
    Node = 3, "node", false;
    /// A Service's address: judged once it is translated.
    Deferred = 4, "deferred", false;
    /// An ICMP error about a flow that is known.
    Related = 5, "related", false;
    /// Neighbour discovery and multicast membership, without which there is no IPv6 on a link.
    Neighbour = 6, "neighbour", false;
    /// ARP for or from the pod.
    Arp = 7, "arp", false;
    /// A pod that reaches itself through its Service.
    Hairpin = 8, "hairpin", false;
    /// No rule allows it.
    Policy = 16, "policy", true;
    /// A known flow that policy no longer allows.
    Revoked = 17, "revoked", true;
    /// Nobody has said yet what applies to the pod.
    Pending = 18, "pending", true;
    /// The pod's policy does not fit into maps.
    Locked = 19, "locked", true;
    /// The link is no endpoint's.
    NoEndpoint = 20, "no-endpoint", true;
    /// Another address or MAC than the pod's.
    Spoof = 21, "spoof", true;
    /// For another pod: bridges flood.
    NotMine = 22, "not-mine", true;
    /// Neither IP nor ARP for the pod.
    OtherProtocol = 23, "other-protocol", true;
    /// The headers are malformed.
    Malformed = 24, "malformed", true;
    /// A fragment whose first part was not seen.
    FragmentMiss = 25, "fragment-miss", true;
    /// The flow table took no more.
    FlowTableFull = 26, "flow-table-full", true;
    /// A pod that speaks VXLAN to a node.
    Encapsulation = 27, "encapsulation", true;
    /// The endpoint's table or class map is missing.
    NoTable = 28, "no-table", true;
    /// IPv6 extension headers that hide what is behind them: too many, or another destination.
    Extension = 29, "extension", true;
    /// From the middle of a TCP connection that is not known, and policy does not allow either side to open it.
    Stray = 30, "stray", true;
}

/// Why an event was not told: index in `event_losses`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Loss {
    /// There were too many within a second.
    Budget = 0,
    /// Nobody reads them, or not fast enough.
    RingFull = 1,
}

impl Loss {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Budget, Self::RingFull];

    /// The name, as in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Budget => "budget",
            Self::RingFull => "ring-full",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_reasons_are_the_same() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_number(*reason as u8), Some(*reason));
        }
        assert_eq!(Reason::from_number(255), None);
    }
}
