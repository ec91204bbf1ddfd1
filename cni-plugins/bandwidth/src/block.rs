//! Which block is whose. Pure.
//!
//! The reference names a block after network and container, without the interface, so a second interface of a container in
//! the same network gets no block there. Here it gets one of another name; the alias tells the two apart. A block without
//! alias was made by the reference, or by an ADD that was killed right after: it is whoever's asks for its name.

use cni_netlink::{Link, LinkKind};
use cni_spec::{AttachmentId, NetworkName, stable_hash};
use sha2::{Digest as _, Sha512};

/// Begins the name of every block.
const PREFIX: &str = "bwp";
/// Hexadecimal digits after it; together the 15 bytes of an interface name.
const DIGITS: usize = 12;
const IFB: &str = "ifb";
const ALIAS: &str = "cni:";
/// What the kernel takes for an alias.
const ALIAS_MAX: usize = 255;

/// The names that the block of an attachment may have: the reference's, and the one where that is taken.
pub(crate) fn names(network: &NetworkName, id: &AttachmentId) -> [String; 2] {
    let digest = Sha512::digest(format!("{network}{}", id.container_id));
    let bytes = digest.iter().take(DIGITS / 2);
    let digits: String = bytes.map(|byte| format!("{byte:02x}")).collect();
    let hash = stable_hash(&[network.as_str(), id.container_id.as_str(), id.ifname.as_str()]);
    // The lower bits of FNV are the better mixed ones.
    let second = hash & ((1 << (4 * DIGITS)) - 1);
    [format!("{PREFIX}{digits}"), format!("{PREFIX}{second:0DIGITS$x}")]
}

/// Says whose a block is. Names are ASCII.
pub(crate) fn alias(network: &NetworkName, id: &AttachmentId) -> String {
    let mut alias = format!("{ALIAS}{network}/{id}");
    alias.truncate(ALIAS_MAX);
    alias
}

fn is_block(link: &Link) -> bool {
    link.name.starts_with(PREFIX) && link.kind == LinkKind::Other(IFB.to_owned())
}

/// Whether a link with one of the attachment's names is its block.
pub(crate) fn is_of(link: &Link, network: &NetworkName, id: &AttachmentId) -> bool {
    is_block(link) && link.alias.as_ref().is_none_or(|text| *text == alias(network, id))
}

/// Whether a link is a block of this network and of none of these attachments.
pub(crate) fn is_stale(link: &Link, network: &NetworkName, valid: &[AttachmentId]) -> bool {
    is_block(link)
        && link.group == network.link_group()
        && !valid
            .iter()
            .any(|id| names(network, id).contains(&link.name) && is_of(link, network, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(container: &str, ifname: &str) -> AttachmentId {
        AttachmentId {
            container_id: container.parse().expect("good"),
            ifname: ifname.parse().expect("good"),
        }
    }

    fn block(name: &str, network: &NetworkName, alias: Option<String>) -> Link {
        Link {
            name: name.to_owned(),
            kind: LinkKind::Other(IFB.to_owned()),
            alias,
            group: network.link_group(),
            ..Link::default()
        }
    }

    #[test]
    fn the_first_name_is_the_references_and_the_second_that_of_former_versions() {
        let network: NetworkName = "net".parse().expect("good");
        // `printf netc1 | sha512sum`; a changed value would leave the blocks of a node behind at the upgrade.
        assert_eq!(names(&network, &id("c1", "eth0")), ["bwp623e1c388032", "bwp33b17bf5d534"]);
        let (eth0, eth1) = (names(&network, &id("c1", "eth0")), names(&network, &id("c1", "eth1")));
        assert!(eth0[0] == eth1[0] && eth0[1] != eth1[1]);
        assert!(names(&network, &id(&"c".repeat(90), "eth0")).iter().all(|name| name.len() == 15));
    }

    #[test]
    fn a_block_is_the_attachments_that_its_alias_names_or_anybodys() {
        let (net, other): (NetworkName, NetworkName) =
            ("net".parse().expect("good"), "other".parse().expect("good"));
        let (eth0, eth1) = (id("c1", "eth0"), id("c1", "eth1"));
        let [name, _] = names(&net, &eth0);
        let ours = block(&name, &net, Some(alias(&net, &eth0)));
        assert!(is_of(&ours, &net, &eth0) && !is_of(&ours, &net, &eth1));
        assert!(is_of(&block(&name, &net, None), &net, &eth1));
        assert!(!is_stale(&ours, &net, std::slice::from_ref(&eth0)));
        assert!(is_stale(&ours, &net, &[eth1]) && is_stale(&ours, &net, &[]));
        assert!(!is_stale(&ours, &other, &[]));
        let foreign = Link { group: 0, ..block(&name, &net, None) };
        assert!(!is_stale(&foreign, &net, &[]), "of no known network");
    }
}
