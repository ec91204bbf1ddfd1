//! Names that are worked out instead of kept: whoever knows an attachment finds its host interface, after a crash, a
//! reboot of the agent, or the end of the namespace.

use cni_spec::{AttachmentId, NetworkName, stable_hash};

const PREFIX: &str = "veth";
const GATEWAY_PREFIX: &str = "vgw";
/// Hexadecimal digits after the prefix; together the 15 bytes of an interface name.
const DIGITS: usize = 11;
/// Begins the alias of an attachment that is whole …
const WHOLE: &str = "cni:";
/// … and, in version 0.1, of one that ADD was killed at. Now that one has none, and is known by its group.
const HALF: &str = "cni-half:";

/// Name of the host's end of an attachment: `veth` and a hash of network, container and interface.
#[must_use]
pub fn host_veth_name(network: &NetworkName, attachment: &AttachmentId) -> String {
    link_name(
        PREFIX,
        &[network.as_str(), attachment.container_id.as_str(), attachment.ifname.as_str()],
    )
}

/// Whether a name has the form of [`host_veth_name`]'s.
pub(crate) fn is_host_veth(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|digits| {
        digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// Name of the port behind which the gateway of a VLAN stands.
pub(crate) fn gateway_port_name(bridge: &str, vlan: u16) -> String {
    link_name(GATEWAY_PREFIX, &[bridge, &vlan.to_string()])
}

fn link_name(prefix: &str, parts: &[&str]) -> String {
    // The lower bits of FNV are the better mixed ones.
    format!("{prefix}{:0DIGITS$x}", stable_hash(parts) & ((1 << (4 * DIGITS)) - 1))
}

/// Alias of the host's end, set when ADD is done: it says whose the interface is, and that it is whole.
#[must_use]
pub fn host_veth_alias(network: &NetworkName, attachment: &AttachmentId) -> String {
    alias(WHOLE, network, attachment)
}

fn alias(prefix: &str, network: &NetworkName, attachment: &AttachmentId) -> String {
    // Cut at the kernel's 255 bytes; names and IDs are ASCII. The longest possible ones do not fit together, and the
    // network, which GC asks for, stands first.
    let mut alias = format!("{prefix}{network}/{attachment}");
    alias.truncate(255);
    alias
}

/// Whether ADD of this interface was done.
pub(crate) fn is_whole(alias: &str) -> bool {
    alias.starts_with(WHOLE)
}

/// Whether an interface, whole or half, is one of this network's.
pub(crate) fn is_alias_of(alias: &str, network: &NetworkName) -> bool {
    let rest = alias.strip_prefix(WHOLE).or_else(|| alias.strip_prefix(HALF));
    rest.and_then(|rest| rest.split_once('/')).is_some_and(|(name, _)| name == network.as_str())
}

/// A short name for a text, for objects of nftables.
pub(crate) fn short(text: &str) -> String {
    format!("{:016x}", stable_hash(&[text]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(id: &str, ifname: &str) -> AttachmentId {
        AttachmentId {
            container_id: id.parse().expect("good"),
            ifname: ifname.parse().expect("good"),
        }
    }

    #[test]
    fn the_name_of_the_host_veth_never_changes() {
        let network = "net".parse().expect("good");
        // A changed value would orphan every interface of a node at the upgrade.
        assert_eq!(host_veth_name(&network, &attachment("c1", "eth0")), "veth3b17bf5d534");
        assert_ne!(
            host_veth_name(&network, &attachment("c1e", "th0")),
            host_veth_name(&network, &attachment("c1", "eth0"))
        );
    }

    #[test]
    fn an_alias_belongs_to_its_network_alone() {
        let network: NetworkName = "net".parse().expect("good");
        let alias = host_veth_alias(&network, &attachment("c1", "eth0"));
        assert_eq!(alias, "cni:net/c1/eth0");
        assert!(is_alias_of(&alias, &network) && is_whole(&alias));
        let half = "cni-half:net/c1/eth0";
        assert!(is_alias_of(half, &network) && !is_whole(half));
        assert!(
            !is_alias_of(&alias, &"ne".parse().expect("good")) && !is_alias_of("uplink", &network)
        );
        let long = host_veth_alias(
            &"n".repeat(200).parse().expect("good"),
            &attachment(&"c".repeat(200), "eth0"),
        );
        assert_eq!(long.len(), 255);
    }
}
