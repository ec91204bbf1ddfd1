//! Which subnet a node takes. Pure.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};
use rand::Rng;
use rand::seq::IteratorRandom as _;

use super::{Lease, Leases, SubnetKey};
use crate::mac::Mac;
use crate::network::{Ipv4Config, Ipv6Config, NetworkConfig};

/// Random subnets that are tried before all are looked at.
const GUESSES: u32 = 32;
/// IPv6 subnets that are looked at: more than there can be nodes.
const IPV6_LOOKS: usize = 1 << 16;

/// Who this node is, as leases tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Its address on the underlay.
    pub public_ip: Ipv4Addr,
    /// MAC of its VXLAN device.
    pub vtep_mac: Mac,
    /// Its IPv6 address on the underlay; without one it takes no part in an IPv6 network.
    pub public_ipv6: Option<Ipv6Addr>,
}

/// What to do about the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// This key is ours: keep it.
    Keep(Box<Lease>),
    /// Create the key of this free subnet.
    Take(SubnetKey),
    /// Put this key in the place of ours: one half changes, the other one stays.
    Move(Box<Lease>, SubnetKey),
    /// Every subnet has an owner.
    Full,
    /// The network is of IPv6 alone, and this node has no IPv6 address that others could send to.
    NoIpv6,
}

impl Identity {
    /// Whether a lease is this node's.
    ///
    /// The VTEP MAC is proof: it is unique by node. The address alone is not, since two hosts may have got the
    /// same one, or a host that died had ours before; it counts for a reservation (which names nothing else)
    /// and for the very subnet that this node held last.
    #[must_use]
    pub fn owns(&self, lease: &Lease, former: Option<SubnetKey>) -> bool {
        let Some(value) = &lease.value else { return false };
        if let Some(data) = value.vtep()
            && data.vtep_mac == self.vtep_mac
        {
            return true;
        }
        value.public_ip == self.public_ip
            && (value.backend_type.is_none()
                || former.is_some_and(|former| former.is_kin(&lease.key)))
    }
}

/// Chooses: a lease of our own, else the former subnet, else a random free one, so that nodes that start at the
/// same time seldom meet.
pub fn choose(
    config: &NetworkConfig,
    leases: &Leases,
    me: &Identity,
    former: Option<SubnetKey>,
    rng: &mut impl Rng,
) -> Choice {
    match (&config.v4, &config.v6) {
        (Some(v4), v6) => choose_ipv4(v4, v6.as_ref(), leases, me, former, rng),
        (None, Some(v6)) if me.public_ipv6.is_some() => choose_ipv6(v6, leases, me, former, rng),
        (None, _) => Choice::NoIpv6,
    }
}

/// In a network of IPv4, and perhaps of IPv6 as well.
fn choose_ipv4(
    config: &Ipv4Config,
    v6: Option<&Ipv6Config>,
    leases: &Leases,
    me: &Identity,
    former: Option<SubnetKey>,
    rng: &mut impl Rng,
) -> Choice {
    let allowed = |lease: &Lease| lease.key.v4.filter(|subnet| config.allows(*subnet));
    let own = leases
        .values()
        .filter(|lease| me.owns(lease, former))
        .filter_map(|lease| Some((lease, allowed(lease)?)))
        .max_by_key(|(lease, _)| {
            let was = former.is_some_and(|former| former.is_kin(&lease.key));
            (was, std::cmp::Reverse(lease.key))
        });
    let v6 = v6.filter(|_| me.public_ipv6.is_some()).map(|v6| Ipv6Pool::new(v6, leases));
    if let Some((lease, subnet)) = own {
        let right = match (lease.key.v6, &v6) {
            (None, None) => true,
            (Some(subnet), Some(pool)) => pool.config.allows(subnet),
            _ => false,
        };
        let v6 = v6.as_ref().map(|pool| pool.partner(config, subnet));
        // An IPv6 network without a free subnet is no reason to lose the IPv4 one.
        return match v6 {
            _ if right => Choice::Keep(Box::new(lease.clone())),
            Some(None) => Choice::Keep(Box::new(lease.clone())),
            v6 => {
                let key = SubnetKey { v4: lease.key.v4, v6: v6.flatten() };
                Choice::Move(Box::new(lease.clone()), key)
            }
        };
    }
    // Leases of another length (an older configuration) may cover part of a candidate.
    let taken: BTreeSet<Ipv4Network> = leases.keys().filter_map(|key| key.v4).collect();
    let odd: Vec<Ipv4Network> =
        taken.iter().copied().filter(|subnet| subnet.prefix() != config.subnet_len).collect();
    let free = |subnet: &Ipv4Network| {
        !taken.contains(subnet) && !odd.iter().any(|other| other.overlaps(*subnet))
    };
    let key = |v4: Ipv4Network| SubnetKey {
        v4: Some(v4),
        v6: v6.as_ref().and_then(|pool| pool.partner(config, v4)),
    };
    let former = former.and_then(|former| former.v4);
    if let Some(subnet) = former.filter(|subnet| config.allows(*subnet) && free(subnet)) {
        return Choice::Take(key(subnet));
    }
    // A wide network has many subnets, nearly all of them free: a few tries find one without a look at each.
    let size = 1_u32 << (32 - config.subnet_len);
    let last = (config.subnet_max.to_bits() - config.subnet_min.to_bits()) / size;
    let mut guess = || {
        let base = config.subnet_min.to_bits() + rng.random_range(0..=last) * size;
        Ipv4Network::new(Ipv4Addr::from_bits(base), config.subnet_len).ok().filter(free)
    };
    let guessed = (0..GUESSES).find_map(|_| guess());
    let chosen = guessed.or_else(|| config.subnets().filter(free).choose(rng));
    chosen.map_or(Choice::Full, |subnet| Choice::Take(key(subnet)))
}

/// In a network of IPv6 alone.
fn choose_ipv6(
    config: &Ipv6Config,
    leases: &Leases,
    me: &Identity,
    former: Option<SubnetKey>,
    rng: &mut impl Rng,
) -> Choice {
    let allowed = |lease: &Lease| lease.key.v6.filter(|subnet| config.allows(*subnet));
    let own = leases
        .values()
        .filter(|lease| me.owns(lease, former))
        .filter_map(|lease| Some((lease, allowed(lease)?)))
        .max_by_key(|(lease, _)| (lease.key.v4.is_none(), std::cmp::Reverse(lease.key)));
    let key = |subnet| SubnetKey { v4: None, v6: Some(subnet) };
    match own {
        Some((lease, _)) if lease.key.v4.is_none() => return Choice::Keep(Box::new(lease.clone())),
        // After dual stack.
        Some((lease, subnet)) => return Choice::Move(Box::new(lease.clone()), key(subnet)),
        None => {}
    }
    let pool = Ipv6Pool::new(config, leases);
    let former = former.and_then(|former| former.v6);
    if let Some(subnet) = former.filter(|subnet| config.allows(*subnet) && pool.is_free(*subnet)) {
        return Choice::Take(key(subnet));
    }
    let size = 1_u128 << (128 - config.subnet_len);
    let last = (config.subnet_max.to_bits() - config.subnet_min.to_bits()) / size;
    let mut guess = || {
        let base = config.subnet_min.to_bits() + rng.random_range(0..=last) * size;
        let subnet = Ipv6Network::new(Ipv6Addr::from_bits(base), config.subnet_len).ok();
        subnet.filter(|subnet| pool.is_free(*subnet))
    };
    let guessed = (0..GUESSES).find_map(|_| guess());
    // Nearly full: one of the first that are free.
    let chosen = guessed
        .or_else(|| config.subnets(IPV6_LOOKS).filter(|subnet| pool.is_free(*subnet)).choose(rng));
    chosen.map_or(Choice::Full, |subnet| Choice::Take(key(subnet)))
}

/// The IPv6 subnets. The n-th IPv4 subnet has the n-th IPv6 subnet as its partner, so that two nodes that cannot get
/// the same IPv4 subnet cannot get the same IPv6 one either: etcd compares only whole keys.
struct Ipv6Pool {
    config: Ipv6Config,
    taken: BTreeSet<Ipv6Network>,
}

impl Ipv6Pool {
    fn new(config: &Ipv6Config, leases: &Leases) -> Self {
        Self { config: *config, taken: leases.keys().filter_map(|key| key.v6).collect() }
    }

    fn is_free(&self, subnet: Ipv6Network) -> bool {
        !self.taken.iter().any(|other| other.overlaps(subnet))
    }

    /// The partner of an IPv4 subnet, unless somebody (a flanneld, which pairs at random) has it.
    fn partner(&self, config: &Ipv4Config, v4: Ipv4Network) -> Option<Ipv6Network> {
        let place = (v4.ip().to_bits() - config.subnet_min.to_bits()) >> (32 - config.subnet_len);
        let place = place as usize;
        let partner = self.config.subnets(place + 1).nth(place)?;
        self.is_free(partner).then_some(partner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::super::{LeaseValue, SubnetKey, VxlanData};
    use super::*;

    const ME: Identity = Identity {
        public_ip: Ipv4Addr::new(192, 0, 2, 1),
        vtep_mac: Mac([2, 0, 0, 0, 0, 1]),
        public_ipv6: None,
    };

    fn config(len: u8) -> NetworkConfig {
        NetworkConfig::new("10.244.0.0/16".parse().expect("CIDR"), len, 1, 8472).expect("valid")
    }

    fn net(text: &str) -> Ipv4Network {
        text.parse().expect("CIDR")
    }

    fn only(subnet: Ipv4Network) -> SubnetKey {
        SubnetKey { v4: Some(subnet), v6: None }
    }

    fn lease(subnet: Ipv4Network, last_octet: u8, mac: u8) -> (SubnetKey, Lease) {
        let data = VxlanData { vni: 1, vtep_mac: Mac([2, 0, 0, 0, 0, mac]) };
        let value = LeaseValue::vxlan(Ipv4Addr::new(192, 0, 2, last_octet), data);
        (
            only(subnet),
            Lease { key: only(subnet), value: Some(value), mod_revision: 1, etcd_lease: 7 },
        )
    }

    fn decide(leases: &Leases, former: Option<&str>) -> Choice {
        choose(
            &config(24),
            leases,
            &ME,
            former.map(|former| only(net(former))),
            &mut StdRng::seed_from_u64(1),
        )
    }

    #[test]
    fn an_own_lease_is_kept_even_after_a_change_of_address() {
        for octet in [1, 9] {
            let leases = Leases::from([lease(net("10.244.7.0/24"), octet, 1)]);
            assert!(
                matches!(decide(&leases, None), Choice::Keep(own) if own.key == only(net("10.244.7.0/24")))
            );
        }
    }

    #[test]
    fn a_lease_with_our_address_but_another_mac_is_only_ours_if_we_held_it() {
        let leases = Leases::from([lease(net("10.244.7.0/24"), 1, 99)]);
        assert!(
            matches!(decide(&leases, None), Choice::Take(key) if key != only(net("10.244.7.0/24")))
        );
        assert!(matches!(decide(&leases, Some("10.244.7.0/24")), Choice::Keep(_)));
    }

    #[test]
    fn a_reservation_for_our_address_is_ours_and_one_for_another_is_not_touched() {
        let (subnet, mut reservation) = lease(net("10.244.9.0/24"), 1, 0);
        reservation.etcd_lease = 0;
        reservation.value.as_mut().expect("set").backend_type = None;
        reservation.value.as_mut().expect("set").backend_data = None;
        let ours = Leases::from([(subnet, reservation.clone())]);
        assert!(matches!(decide(&ours, None), Choice::Keep(_)));
        reservation.value.as_mut().expect("set").public_ip = Ipv4Addr::new(192, 0, 2, 50);
        let others = Leases::from([(subnet, reservation)]);
        assert!(
            matches!(decide(&others, Some("10.244.9.0/24")), Choice::Take(other) if other != subnet)
        );
    }

    #[test]
    fn the_former_subnet_comes_back_if_nobody_took_it() {
        assert_eq!(
            decide(&Leases::new(), Some("10.244.42.0/24")),
            Choice::Take(only(net("10.244.42.0/24")))
        );
        assert!(
            matches!(decide(&Leases::new(), Some("10.99.0.0/24")), Choice::Take(key) if key.v4.is_some_and(|v4| v4.ip().octets()[1] == 244))
        );
    }

    #[test]
    fn the_ipv6_half_follows_the_configuration_and_the_ipv4_half_stays() {
        let json = br#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#;
        let dual = NetworkConfig::parse(json).expect("valid");
        let me = Identity { public_ipv6: Some("2001:db8::1".parse().expect("address")), ..ME };
        let choose = |config: &NetworkConfig, leases: &Leases, me: &Identity| {
            choose(config, leases, me, None, &mut StdRng::seed_from_u64(1))
        };
        let mut leases = Leases::from([lease(net("10.244.7.0/24"), 1, 1)]);
        let Choice::Move(_, key) = choose(&dual, &leases, &me) else { panic!("it moves") };
        assert_eq!(key.to_string(), "10.244.7.0-24&fd00:0:0:7::-64");
        // A node without an IPv6 address stays as it is, and so does one whose partner is taken.
        assert!(matches!(choose(&dual, &leases, &ME), Choice::Keep(_)));
        let (_, mut other) = lease(net("10.244.9.0/24"), 9, 9);
        other.key.v6 = key.v6;
        leases.insert(other.key, other);
        assert!(matches!(choose(&dual, &leases, &me), Choice::Keep(_)));
        let (_, mut own) = lease(net("10.244.7.0/24"), 1, 1);
        own.key = key;
        let leases = Leases::from([(key, own)]);
        assert!(matches!(choose(&dual, &leases, &me), Choice::Keep(_)));
        let Choice::Move(_, key) = choose(&config(24), &leases, &me) else { panic!("it moves") };
        assert_eq!(key.to_string(), "10.244.7.0-24");
    }

    #[test]
    fn where_there_is_ipv6_alone_the_ipv6_half_is_kept_and_the_other_one_goes() {
        let json = br#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/62","Backend":{"Type":"vxlan"}}"#;
        let alone = NetworkConfig::parse(json).expect("valid");
        let me = Identity { public_ipv6: Some("2001:db8::1".parse().expect("address")), ..ME };
        let choose = |leases: &Leases, me: &Identity, former: Option<&str>| {
            let former = former.map(|key| key.parse().expect(key));
            choose(&alone, leases, me, former, &mut StdRng::seed_from_u64(1))
        };
        assert_eq!(choose(&Leases::new(), &ME, None), Choice::NoIpv6);
        let key = |text: &str| -> SubnetKey { text.parse().expect(text) };
        let wanted = "0.0.0.0-0&fd00:0:0:2::-64";
        assert_eq!(choose(&Leases::new(), &me, Some(wanted)), Choice::Take(key(wanted)));
        // After dual stack, and again after that.
        let (_, mut own) = lease(net("10.244.7.0/24"), 1, 1);
        own.key = key("10.244.7.0-24&fd00:0:0:3::-64");
        let after = key("0.0.0.0-0&fd00:0:0:3::-64");
        let leases = Leases::from([(own.key, own.clone())]);
        assert_eq!(choose(&leases, &me, None), Choice::Move(Box::new(own.clone()), after));
        own.key = after;
        assert_eq!(
            choose(&Leases::from([(after, own.clone())]), &me, None),
            Choice::Keep(Box::new(own))
        );
        // Three subnets, two of others: the third, and then none.
        let mut others: Leases = [("10.244.1.0-24&fd00:0:0:1::-64", 8), (wanted, 9)]
            .into_iter()
            .map(|(text, number)| {
                let (_, other) = lease(net("10.244.9.0/24"), number, number);
                (key(text), Lease { key: key(text), ..other })
            })
            .collect();
        assert_eq!(choose(&others, &me, Some(wanted)), Choice::Take(after));
        let (_, last) = lease(net("10.244.9.0/24"), 10, 10);
        others.insert(after, Lease { key: after, ..last });
        assert_eq!(choose(&others, &me, None), Choice::Full);
    }

    #[test]
    fn a_full_network_says_so() {
        let config = config(18);
        let v4 = config.v4.expect("IPv4");
        let leases = v4.subnets().map(|subnet| lease(subnet, 50, 50)).collect();
        assert_eq!(
            choose(&config, &leases, &ME, None, &mut StdRng::seed_from_u64(1)),
            Choice::Full
        );
    }

    proptest! {
        #[test]
        fn a_taken_subnet_overlaps_no_lease(
            taken in prop::collection::vec((0_u32..65536, 18_u8..28), 0..40),
            seed in any::<u64>(),
        ) {
            let config = config(20);
            let leases: Leases = taken
                .into_iter()
                .map(|(offset, len)| {
                    let base = Ipv4Addr::from_bits(Ipv4Addr::new(10, 244, 0, 0).to_bits() + offset);
                    let subnet = Ipv4Network::new(base, len).expect("valid");
                    lease(Ipv4Network::new(subnet.network(), len).expect("valid"), 50, 50)
                })
                .collect();
            let v4 = config.v4.expect("IPv4");
            let taken: Vec<Ipv4Network> = leases.keys().filter_map(|key| key.v4).collect();
            match choose(&config, &leases, &ME, None, &mut StdRng::seed_from_u64(seed)) {
                Choice::Take(SubnetKey { v4: Some(subnet), .. }) => {
                    prop_assert!(v4.allows(subnet));
                    prop_assert!(!taken.iter().any(|other| other.overlaps(subnet)));
                }
                Choice::Full => {
                    prop_assert!(v4.subnets().all(|one| taken.iter().any(|other| other.overlaps(one))));
                }
                _ => prop_assert!(false, "none is ours, and there is IPv4"),
            }
        }
    }
}
