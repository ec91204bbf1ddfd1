//! MACs, and when the neighbours of a pod have to be told of one.
//!
//! A pod whose gateway is the bridge gets the MAC that follows from its address ([`mac_of`]). An address that is used again
//! then has the MAC that it had, so nobody's memory of it can be wrong and ADD has nothing to announce. That matters
//! because an announcement is a broadcast: the bridge copies it to each of its ports before the system call returns, with
//! the lock of all links held, some 2.5 µs for every pod that is there, for every pod that comes.
//!
//! It holds as long as all pods of a bridge are of that kind. Whether they are is kept in the bridge itself, so that it
//! is forgotten when what the pods remember is: a bridge that we make is in the group [`FOLLOWING`], and is taken out, for
//! good, before a pod comes to it that is of another kind, and when one goes that turns out to be: it had another MAC by
//! then, or was the reference plugin's. On all other bridges (somebody else's, the reference plugin's, a former version's)
//! every pod is announced, as the reference plugin does. Of another kind are pods
//!
//! * with a MAC that was asked for,
//! * with several addresses: only one of them gives the MAC, and the others may have been other pods',
//! * without a gateway on the bridge: such a network may reach out to machines and switches that remember more than this
//!   host does, and its addresses may be bound to the MAC that the interface had when it asked for them (`dhcp`).
//!
//! What nobody here can see: a pod that the reference plugin made *and* removed on a bridge of ours. For it the host is
//! asked, which mostly has talked to whoever had the address last (`host.rs`).
//!
//! Roads not taken. A child process that announces after ADD has answered makes ADD look flat, but the work for all pods
//! is still done for each one, and the link lock still held. A file that says which MAC an address had last is a write for
//! every ADD, and has to be forgotten at the right moments.

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;

use cni_netlink::MacBytes;
use cni_spec::stable_hash;

/// Group of a bridge on which the MAC of every pod has followed from its only address, ever since the bridge was made.
/// Below those of networks ([`link_group`](cni_spec::NetworkName::link_group)), above the numbers that people use.
pub(crate) const FOLLOWING: u32 = 0x0a58;
/// Begins the MAC of an IPv4 address, which is the rest. Old versions of the reference plugin did the same, and so do
/// other networks: whoever reads MACs in a capture can tell the pod.
const IPV4_PREFIX: [u8; 2] = [0x0a, 0x58];

/// The MAC that follows from an address. No two IPv4 addresses have the same, nor do, in effect, IPv6 addresses: 46 bits
/// are hashed.
pub(crate) fn mac_of(ip: IpAddr) -> MacBytes {
    match ip {
        IpAddr::V4(ip) => {
            let ([a, b], [c, d, e, f]) = (IPV4_PREFIX, ip.octets());
            [a, b, c, d, e, f]
        }
        IpAddr::V6(ip) => unicast(stable_hash(&[&ip.to_string()])),
    }
}

/// The MAC that follows from a pod's addresses: from the first IPv4 one, else from the first.
pub(crate) fn mac_of_pod(ips: &[IpAddr]) -> Option<MacBytes> {
    ips.iter().find(|ip| ip.is_ipv4()).or(ips.first()).copied().map(mac_of)
}

/// Whether a MAC follows from each of these addresses.
pub(crate) fn follows(mac: MacBytes, ips: &[IpAddr]) -> bool {
    ips.iter().all(|ip| mac_of(*ip) == mac)
}

/// MAC of a bridge: the same one whenever it is made again on this boot of this host, so that pods find their gateway
/// where they knew it. `host` keeps hosts, and namespaces that play hosts, apart.
pub(crate) fn bridge_mac(bridge: &str, host: &str) -> MacBytes {
    unicast(stable_hash(&[bridge, host]))
}

/// A MAC for one end of a pair.
pub(crate) fn random_mac() -> MacBytes {
    // A hasher's keys are the standard library's only source of randomness.
    unicast(RandomState::new().hash_one(()))
}

/// Locally administered, for one interface.
fn unicast(random: u64) -> MacBytes {
    let bytes = random.to_be_bytes();
    [(bytes[2] & 0xfc) | 2, bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().expect("an address")).collect()
    }

    #[test]
    fn the_mac_of_a_bridge_is_local_and_follows_what_it_stands_for() {
        let mac = bridge_mac("cni0", "boot");
        assert_eq!(mac[0] & 3, 2);
        assert_eq!(mac, bridge_mac("cni0", "boot"));
        assert_ne!(mac, bridge_mac("cni1", "boot"));
        assert_ne!(mac, bridge_mac("cni0", "other boot"));
        assert_ne!(random_mac(), random_mac());
    }

    /// A changed value would give addresses other MACs than they have in the memory of running pods, on bridges that say
    /// that this cannot be.
    #[test]
    fn the_mac_of_an_address_never_changes() {
        let mac = |text: &str| mac_of(text.parse().expect("an address"));
        assert_eq!(mac("10.244.1.5"), [0x0a, 0x58, 10, 244, 1, 5]);
        assert_eq!(mac("fd88::5"), [0xaa, 0xb4, 0x0c, 0xb9, 0x1d, 0x23]);
        assert_eq!(mac("fd88:0::5"), mac("fd88::5"), "however it is written");
        assert_eq!(mac("fd88::5")[0] & 3, 2);
    }

    #[test]
    fn ipv6_addresses_of_a_subnet_have_macs_of_their_own() {
        let macs: std::collections::BTreeSet<MacBytes> =
            (0..=u16::MAX).map(|n| mac_of(IpAddr::from([0xfd88, 0, 0, 0, 0, 0, 0, n]))).collect();
        assert_eq!(macs.len(), 1 << 16);
    }

    #[test]
    fn the_first_ipv4_address_gives_the_mac_and_only_one_address_follows() {
        let dual = ips(&["fd88::5", "10.1.0.5", "10.2.0.5"]);
        let mac = mac_of_pod(&dual).expect("there are addresses");
        assert_eq!(mac, [0x0a, 0x58, 10, 1, 0, 5]);
        assert!(!follows(mac, &dual) && follows(mac, &dual[1..2]));
        let v6 = ips(&["fd88::5"]);
        assert!(follows(mac_of_pod(&v6).expect("one"), &v6));
        assert_eq!(mac_of_pod(&[]), None);
    }
}
