//! The `bandwidth` plugin: limits the traffic of a container, in each direction.
//!
//! Drop-in for the reference plugin of the same name, chained behind one that makes a veth pair. What goes to the
//! container waits in a token bucket at the way out of the host's end. What comes from it is handed to an intermediate
//! functional block with a token bucket of its own, because a way in has no queue.
//!
//! The block is the only thing that outlives the pair. Its name follows from network, container and interface, and it is
//! made in the network's link group, so DEL needs neither namespace nor previous result, and GC finds what was left.

mod conf;

use std::collections::BTreeSet;
use std::process::ExitCode;

use cni_netlink::{IfbDevice, Link, LinkKind, NetNs, Netlink, NetlinkError, TokenBucket};
use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, AttachmentId, Error, Interface, NetworkName, code, stable_hash};

pub use crate::conf::{NetConf, Rates, RuntimeConfig};

/// Begins the name of every block, as in the reference.
const PREFIX: &str = "bwp";
/// Hexadecimal digits after it; together the 15 bytes of an interface name.
const DIGITS: usize = 12;
const IFB: &str = "ifb";

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bandwidth;

/// The plugin as a process.
#[must_use]
pub fn main() -> ExitCode {
    cni_skel::main(&Bandwidth)
}

impl Plugin for Bandwidth {
    type Conf = NetConf;

    fn name(&self) -> &'static str {
        "bandwidth"
    }

    fn about(&self) -> &'static str {
        "limits the traffic of a container"
    }

    fn add(&self, req: AddRequest<NetConf>) -> Result<AddResult, Error> {
        let limits = req.conf.limits()?;
        let mut result = req.prev_result.clone().ok_or_else(|| {
            Error::new(
                code::INVALID_CONFIG,
                "\"prevResult\" is missing: bandwidth has to stand behind another plugin of a list",
            )
        })?;
        if limits.is_empty() {
            return Ok(result);
        }
        let netlink = Netlink::open().map_err(failed)?;
        let veth = find_host_veth(&netlink, &result, &req.netns, req.ifname.as_str())?;
        if let Some(bucket) = &limits.ingress {
            netlink.set_token_bucket(veth.index, bucket).map_err(failed)?;
        }
        if let Some(bucket) = &limits.egress {
            let block = shape_egress(&netlink, &veth, bucket, &req.name, &req.attachment())?;
            result.interfaces.push(Interface {
                name: block.name,
                mac: block.mac.map(|byte| format!("{byte:02x}")).join(":"),
                mtu: Some(block.mtu),
                ..Interface::default()
            });
        }
        Ok(result)
    }

    fn del(&self, req: DelRequest<NetConf>) -> Result<(), Error> {
        let netlink = Netlink::open().map_err(failed)?;
        let name = block_name(&req.name, &req.attachment());
        match netlink.link(&name).map_err(failed)? {
            Some(link) if is_block(&link) => netlink.delete_link(link.index).map_err(failed),
            _ => Ok(()),
        }
    }

    fn check(&self, req: CheckRequest<NetConf>) -> Result<(), Error> {
        let limits = req.conf.limits()?;
        if limits.is_empty() {
            return Ok(());
        }
        let netlink = Netlink::open().map_err(failed)?;
        let veth = find_host_veth(&netlink, &req.prev_result, &req.netns, req.ifname.as_str())?;
        let mut failures = Vec::new();
        if let Some(bucket) = &limits.ingress {
            failures.extend(compare(&netlink, &veth, bucket)?);
        }
        if let Some(bucket) = &limits.egress {
            let name = block_name(&req.name, &req.attachment());
            match netlink.link(&name).map_err(failed)?.filter(|link| link.up) {
                Some(block) => failures.extend(compare(&netlink, &block, bucket)?),
                None => failures.push(differs(format!("the link {name} is missing or down"))),
            }
            if !netlink.has_redirect(veth.index).map_err(failed)? {
                let msg = format!("what comes in by {} is not redirected to {name}", veth.name);
                failures.push(differs(msg));
            }
        }
        Error::join(failures).map_or(Ok(()), Err)
    }

    fn gc(&self, req: GcRequest<NetConf>) -> Result<(), Error> {
        let netlink = Netlink::open().map_err(failed)?;
        let valid: BTreeSet<String> =
            req.valid.iter().map(|attachment| block_name(&req.name, attachment)).collect();
        let stale = netlink.links().map_err(failed)?.into_iter().filter(|link| {
            is_block(link) && link.group == req.name.link_group() && !valid.contains(&link.name)
        });
        let failures =
            stale.filter_map(|link| netlink.delete_link(link.index).err()).map(failed).collect();
        Error::join(failures).map_or(Ok(()), Err)
    }

    /// Nothing has to be there but the kernel.
    fn status(&self, req: StatusRequest<NetConf>) -> Result<(), Error> {
        req.conf.limits().map(drop)
    }
}

fn failed(error: NetlinkError) -> Error {
    let code = if error.is_transient() { code::TRY_AGAIN } else { code::INTERNAL };
    Error::from_chain(code, &error)
}

fn differs(msg: String) -> Error {
    Error::new(code::CHECK_FAILED, msg)
}

fn block_name(network: &NetworkName, id: &AttachmentId) -> String {
    let hash = stable_hash(&[network.as_str(), id.container_id.as_str(), id.ifname.as_str()]);
    // The lower bits of FNV are the better mixed ones.
    format!("{PREFIX}{:0DIGITS$x}", hash & ((1 << (4 * DIGITS)) - 1))
}

fn is_block(link: &Link) -> bool {
    link.name.starts_with(PREFIX) && link.kind == LinkKind::Other(IFB.to_owned())
}

/// The host's end of the container's pair. A result with one pair leaves no choice; else the container's end says which.
fn find_host_veth(
    netlink: &Netlink,
    result: &AddResult,
    netns: &std::path::Path,
    ifname: &str,
) -> Result<Link, Error> {
    let mut veths = Vec::new();
    for interface in result.interfaces.iter().filter(|interface| interface.sandbox.is_empty()) {
        let link = netlink.link(&interface.name).map_err(failed)?;
        veths.extend(link.filter(|link| link.kind == LinkKind::Veth));
    }
    if veths.len() > 1 {
        let inside = NetNs::open(netns)
            .and_then(|netns| Netlink::open_in(&netns))
            .and_then(|inside| inside.link(ifname))
            .map_err(failed)?;
        let peer = inside.and_then(|link| link.peer);
        veths.retain(|link| Some(link.index) == peer);
    }
    veths.into_iter().next().ok_or_else(|| {
        Error::new(
            code::INVALID_CONFIG,
            format!("\"prevResult\" has no veth interface of the host that leads to {ifname}"),
        )
    })
}

/// A block with a bucket, and everything that comes in by the pair redirected to it; or nothing at all.
fn shape_egress(
    netlink: &Netlink,
    veth: &Link,
    bucket: &TokenBucket,
    network: &NetworkName,
    id: &AttachmentId,
) -> Result<Link, Error> {
    let device = IfbDevice {
        name: block_name(network, id),
        mtu: Some(veth.mtu),
        group: Some(network.link_group()),
    };
    let block = match netlink.create_ifb(&device) {
        // What an earlier ADD of this attachment left goes on, with new values.
        Err(error) if error.is_exists() => {
            match netlink.link(&device.name).map_err(failed)?.filter(is_block) {
                Some(link) => netlink.set_up(link.index).map(|()| link),
                None => Err(error),
            }
        }
        made => made,
    };
    let block = block.map_err(|error| {
        let unsupported = error.is_unsupported();
        let error = failed(error);
        if unsupported { error.context("the kernel needs the module ifb") } else { error }
    })?;
    let shape = || -> Result<(), NetlinkError> {
        netlink.set_alias(block.index, &alias(network, id))?;
        netlink.set_token_bucket(block.index, bucket)?;
        netlink.redirect_ingress(veth.index, block.index)
    };
    match shape() {
        Ok(()) => Ok(block),
        Err(error) => {
            if let Err(left) = netlink.delete_link(block.index) {
                eprintln!("bandwidth: undo a failed ADD: {left}");
            }
            Err(failed(error))
        }
    }
}

/// For people who look at the host's links; at most the kernel's 255 bytes, and names are ASCII.
fn alias(network: &NetworkName, id: &AttachmentId) -> String {
    let mut alias = format!("cni:{network}/{id}");
    alias.truncate(255);
    alias
}

fn compare(netlink: &Netlink, link: &Link, want: &TokenBucket) -> Result<Option<Error>, Error> {
    let msg = match netlink.token_bucket(link.index).map_err(failed)? {
        Some(seen) if (seen.rate, seen.limit) == (want.rate, want.limit) => return Ok(None),
        Some(seen) => {
            format!("{} is limited to {} and not {} bytes/s", link.name, seen.rate, want.rate)
        }
        None => format!("{} is not limited", link.name),
    };
    Ok(Some(differs(msg)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_block_never_changes_and_fits() {
        let id = |container: &str| AttachmentId {
            container_id: container.parse().expect("good"),
            ifname: "eth0".parse().expect("good"),
        };
        let network: NetworkName = "net".parse().expect("good");
        let name = block_name(&network, &id("c1"));
        // A changed value would leave the blocks of a node behind at the upgrade.
        assert_eq!(name.len(), 15);
        assert!(name.ends_with("3b17bf5d534"), "as the pair's, {name}");
        assert_ne!(name, block_name(&network, &id("c2")));
    }
}
