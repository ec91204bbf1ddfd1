//! The node around its pods: which addresses are its own, and the programs on its ways out.

use std::collections::BTreeSet;
use std::net::IpAddr;

use cni_netlink::{Link, LinkKind, Netlink, NetlinkError};
use orch_ebpf_loader::{Error, Hook, Pins, attach, is_attached};

/// What a look at the node found.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Indexes of all links.
    pub links: BTreeSet<u32>,
    /// Links by which packets leave the node, by name and index.
    pub wires: Vec<(String, u32)>,
    /// The node's addresses.
    pub addresses: Vec<IpAddr>,
}

/// Reads links and addresses.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn observe(netlink: &Netlink) -> Result<Seen, NetlinkError> {
    let links = netlink.links()?;
    let mut addresses = Vec::new();
    // Ports of bridges have no addresses of their own; there may be hundreds of them.
    for link in links.iter().filter(|link| link.master.is_none()) {
        addresses.extend(netlink.addresses(link.index)?.iter().map(|address| address.ip()));
    }
    addresses.sort_unstable();
    addresses.dedup();
    let wires =
        links.iter().filter(|link| is_wire(link)).map(|link| (link.name.clone(), link.index));
    Ok(Seen {
        wires: wires.collect(),
        links: links.iter().map(|link| link.index).collect(),
        addresses,
    })
}

/// Everything routed leaves by such a link. A port of a bridge or bond is reached through that one; the pods' bridge leads
/// to pods, where the programs of their links judge; an `ifb` of the `bandwidth` plugin has what has not been routed yet.
fn is_wire(link: &Link) -> bool {
    link.master.is_none()
        && link.name != "lo"
        && link.name != orch_config::POD_BRIDGE
        && !matches!(&link.kind, LinkKind::Other(kind) if kind == "ifb")
}

/// Puts the program on every way out that does not have it; names those that got it.
///
/// # Errors
/// The first refusal; others were tried.
pub fn ensure_wires(pins: &Pins, seen: &Seen) -> Result<Vec<String>, Error> {
    let mut new = Vec::new();
    let mut failed = None;
    for (name, index) in &seen.wires {
        let outcome = match is_attached(pins, name, *index, Hook::ToWire) {
            Ok(true) => Ok(()),
            _ => attach(pins, name, *index, Hook::ToWire).map(|()| new.push(name.clone())),
        };
        if let Err(error) = outcome
            && failed.is_none()
            // A link that went while we looked needs nothing.
            && nix::net::if_::if_nametoindex(name.as_str()).is_ok()
        {
            failed = Some(error);
        }
    }
    failed.map_or(Ok(new), Err)
}
