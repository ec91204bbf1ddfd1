//! Masquerade: packets from pods to the outside get the host's address.
//!
//! One rule per *subnet*, not per pod. The reference plugin's rule per address makes every ADD run a program and every
//! packet walk a list; here the first pod of a subnet pays for a run of `nft`, and every other one for a question to
//! the kernel. The rules of a network are one table, which GC removes with the last attachment.

use cni_netlink::nft_chain_exists;
use cni_nftables::{Family, Nft};
use cni_spec::{Error, NetworkName, code};
use ipnetwork::IpNetwork;

use crate::name::short;

/// Where source NAT happens.
const PRIORITY_SOURCE_NAT: i32 = 100;

fn table(network: &NetworkName) -> String {
    format!("cni_masq_{}", short(network.as_str()))
}

fn chain(subnet: &IpNetwork) -> String {
    format!("subnet_{}", short(&subnet.to_string()))
}

/// Masquerades what leaves these subnets, if that is not so already.
pub(crate) fn ensure(network: &NetworkName, subnets: &[IpNetwork]) -> Result<(), Error> {
    let missing = missing(network, subnets)?;
    Nft::default()
        .apply(&script(network, &missing))
        .map_err(|error| Error::from_chain(code::INTERNAL, &error).context("masquerade"))
}

/// Subnets that are not masqueraded.
pub(crate) fn missing(
    network: &NetworkName,
    subnets: &[IpNetwork],
) -> Result<Vec<IpNetwork>, Error> {
    let mut missing = Vec::new();
    for subnet in subnets {
        if !nft_chain_exists(&table(network), &chain(subnet))
            .map_err(|error| Error::internal(&error))?
        {
            missing.push(*subnet);
        }
    }
    Ok(missing)
}

/// Removes all rules of a network; none are removed already.
pub(crate) fn remove(network: &NetworkName) -> Result<(), Error> {
    Nft::default()
        .remove(Family::Inet, &table(network))
        .map_err(|error| Error::from_chain(code::INTERNAL, &error).context("remove masquerade"))
}

/// One transaction, the same result however often and beside whom it runs.
fn script(network: &NetworkName, subnets: &[IpNetwork]) -> String {
    let table = format!("inet {}", table(network));
    let mut script = String::new();
    for subnet in subnets {
        let chain = format!("{table} {}", chain(subnet));
        let (family, multicast) =
            if subnet.is_ipv4() { ("ip", "224.0.0.0/4") } else { ("ip6", "ff00::/8") };
        // Random source ports: two pods that talk to one place at once else race for the same port, and one of them
        // loses its first packet.
        script.push_str(&format!(
            "add table {table}\n\
             add chain {chain} {{ type nat hook postrouting priority {PRIORITY_SOURCE_NAT}; policy accept; }}\n\
             flush chain {chain}\n\
             add rule {chain} {family} saddr {subnet} {family} daddr != {{ {subnet}, {multicast} }} \
             masquerade fully-random comment \"network {network}\"\n"
        ));
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_get_a_rule_each_and_nothing_to_do_is_no_script() {
        let network = "net".parse().expect("good");
        let subnets = ["10.1.0.0/24".parse().expect("good"), "fd00::/64".parse().expect("good")];
        let script = script(&network, &subnets);
        assert!(
            script.contains(
                "ip saddr 10.1.0.0/24 ip daddr != { 10.1.0.0/24, 224.0.0.0/4 } masquerade"
            )
        );
        assert!(
            script.contains("ip6 saddr fd00::/64 ip6 daddr != { fd00::/64, ff00::/8 } masquerade")
        );
        assert_eq!(super::script(&network, &[]), "");
    }
}
