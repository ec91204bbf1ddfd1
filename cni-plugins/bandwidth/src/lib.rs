//! The `bandwidth` plugin: limits the traffic of a container, in each direction.
//!
//! Drop-in for the reference plugin of the same name, chained behind one that makes a veth pair. What goes to the
//! container waits in a token bucket at the way out of the host's end. What comes from it is handed to an intermediate
//! functional block with a token bucket of its own, because a way in has no queue.
//!
//! The block is the only thing that outlives the pair. Its name follows from network and container, it is made in the
//! network's link group, and its alias says whose it is, so DEL needs neither namespace nor previous result, and GC finds
//! what was left (`block.rs`). The name is the one that the reference gives it: each plugin can check and remove what the
//! other has made.

mod block;
mod conf;

use std::process::ExitCode;

use cni_netlink::{IfbDevice, Link, LinkKind, NetNs, Netlink, NetlinkError, TokenBucket, mac_text};
use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, AttachmentId, Error, Interface, NetworkName, code};

pub use crate::conf::{NetConf, Rates, RuntimeConfig};

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
                mac: mac_text(block.mac),
                mtu: Some(block.mtu),
                ..Interface::default()
            });
        }
        Ok(result)
    }

    fn del(&self, req: DelRequest<NetConf>) -> Result<(), Error> {
        let netlink = Netlink::open().map_err(failed)?;
        let id = req.attachment();
        let mut failures = Vec::new();
        for name in block::names(&req.name, &id) {
            let link = netlink.link(&name).map_err(failed)?;
            if let Some(link) = link.filter(|link| block::is_of(link, &req.name, &id)) {
                failures.extend(netlink.delete_link(link.index).map_err(failed).err());
            }
        }
        Error::join(failures).map_or(Ok(()), Err)
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
            let id = req.attachment();
            match find_block(&netlink, &req.name, &id)?.filter(|link| link.up) {
                Some(block) => failures.extend(compare(&netlink, &block, bucket)?),
                None => {
                    let names = block::names(&req.name, &id).join(" or ");
                    failures.push(differs(format!("the link {names} is missing or down")));
                }
            }
            if !netlink.has_redirect(veth.index).map_err(failed)? {
                let msg = format!("what comes in by {} is not redirected", veth.name);
                failures.push(differs(msg));
            }
        }
        Error::join(failures).map_or(Ok(()), Err)
    }

    fn gc(&self, req: GcRequest<NetConf>) -> Result<(), Error> {
        let netlink = Netlink::open().map_err(failed)?;
        let links = netlink.links().map_err(failed)?.into_iter();
        let stale = links.filter(|link| block::is_stale(link, &req.name, &req.valid));
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

/// The block of an attachment, whoever made it.
fn find_block(
    netlink: &Netlink,
    network: &NetworkName,
    id: &AttachmentId,
) -> Result<Option<Link>, Error> {
    for name in block::names(network, id) {
        let link = netlink.link(&name).map_err(failed)?;
        if let Some(link) = link.filter(|link| block::is_of(link, network, id)) {
            return Ok(Some(link));
        }
    }
    Ok(None)
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
    let block = match find_block(netlink, network, id)? {
        // What an earlier ADD of this attachment left goes on, with new values.
        Some(link) => netlink.set_up(link.index).map(|()| link),
        None => {
            let [first, second] = block::names(network, id);
            let create = |name| {
                netlink.create_ifb(&IfbDevice {
                    name,
                    mtu: Some(veth.mtu),
                    group: Some(network.link_group()),
                })
            };
            match create(first) {
                // Another interface of the container has it.
                Err(error) if error.is_exists() => create(second),
                made => made,
            }
        }
    };
    let block = block.map_err(|error| {
        let unsupported = error.is_unsupported();
        let error = failed(error);
        if unsupported { error.context("the kernel needs the module ifb") } else { error }
    })?;
    let shape = || -> Result<(), NetlinkError> {
        netlink.set_alias(block.index, &block::alias(network, id))?;
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
