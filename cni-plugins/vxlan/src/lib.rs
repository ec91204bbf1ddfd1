//! The `vxlan` plugin: pods of this node on the cluster's VXLAN pod network.
//!
//! The network agent leases a subnet for the node and builds the overlay; what it says to CNI is the file
//! `subnet.env`, in flannel's form. This plugin turns that file into a configuration for `bridge` with
//! `host-local` and delegates to it: MTU of the overlay, addresses of the node's subnet, a route to the whole
//! pod network. It has no state in the kernel of its own.
//!
//! What it delegated is kept in a file per attachment, so that DEL says to the delegate what ADD said, whatever
//! has become of the lease since; without that file DEL does with what there is.
//!
//! Keys of the configuration are those of flannel's CNI plugin: `subnetFile`, `dataDir`, `delegate`, `ipam`;
//! `device` is ours. Start reading at [`Vxlan`]; `delegate_conf` is the pure middle.

mod conf;
mod delegate;
mod kept;
mod subnet;

pub use conf::Conf;
pub use subnet::{SubnetEnv, SubnetError};

use cni_invoke::{Builtin, Delegate};
use cni_netlink::Netlink;
use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, Error, code};

use crate::delegate::{Delegation, delegate_conf};
use crate::kept::Kept;

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Vxlan;

/// Called without a process, if the name on `CNI_PATH` is this executable.
const BUILTINS: &[Builtin] =
    &[("bridge", |env, stdin| cni_skel::call(&cni_bridge::Bridge, env, stdin))];

impl Plugin for Vxlan {
    type Conf = Conf;

    fn name(&self) -> &'static str {
        "vxlan"
    }

    fn about(&self) -> &'static str {
        "puts a container on the cluster's VXLAN pod network, by the node's subnet lease"
    }

    fn add(&self, req: AddRequest<Conf>) -> Result<AddResult, Error> {
        let subnet = SubnetEnv::read(&req.conf.subnet_file)?;
        let to = delegate_conf(&req.conf, &req.raw, Some(&subnet))?;
        let kept = Kept::new(&req.conf.data_dir, &req.name);
        // Kept before the delegate does anything: what a killed ADD began, DEL ends with the same words.
        let before = kept.read(&req.attachment());
        kept.write(&req.attachment(), &to)?;
        let conf = to.with_call(&req.raw);
        Delegate::new(&req.env, BUILTINS).add(&to.plugin, &conf).inspect_err(|_| {
            // The attachment is as it was before: gone, or alive by an earlier ADD, whose words stay.
            let restored = match &before {
                Some(before) => kept.write(&req.attachment(), before),
                None => kept.remove(&req.attachment()),
            };
            if let Err(error) = restored {
                eprintln!("vxlan: undo a failed ADD: {error}");
            }
        })
    }

    fn del(&self, req: DelRequest<Conf>) -> Result<(), Error> {
        let kept = Kept::new(&req.conf.data_dir, &req.name);
        let to = said_or_now(&kept, &req.conf, &req.raw, &req.attachment())?;
        Delegate::new(&req.env, BUILTINS).del(&to.plugin, &to.with_call(&req.raw))?;
        kept.remove(&req.attachment())
    }

    fn check(&self, req: CheckRequest<Conf>) -> Result<(), Error> {
        let kept = Kept::new(&req.conf.data_dir, &req.name);
        let to = said_or_now(&kept, &req.conf, &req.raw, &req.attachment())?;
        Delegate::new(&req.env, BUILTINS).check(&to.plugin, &to.with_call(&req.raw))
    }

    /// First DEL for what is kept of attachments that are gone, then the delegate's GC for what is not.
    fn gc(&self, req: GcRequest<Conf>) -> Result<(), Error> {
        let kept = Kept::new(&req.conf.data_dir, &req.name);
        let mut errors = Vec::new();
        for id in kept.all()? {
            if req.valid.contains(&id) {
                continue;
            }
            let mut env = req.env.clone();
            env.container_id = id.container_id.to_string();
            env.ifname = id.ifname.to_string();
            env.netns.clear();
            let gone = said_or_now(&kept, &req.conf, &req.raw, &id)
                .and_then(|to| {
                    Delegate::new(&env, BUILTINS).del(&to.plugin, &to.with_call(&req.raw))
                })
                .and_then(|()| kept.remove(&id));
            errors.extend(gone.err().map(|error| error.context(id)));
        }
        let subnet = SubnetEnv::read(&req.conf.subnet_file).ok();
        let collected = delegate_conf(&req.conf, &req.raw, subnet.as_ref()).and_then(|to| {
            Delegate::new(&req.env, BUILTINS).gc(&to.plugin, &to.with_call(&req.raw))
        });
        errors.extend(collected.err());
        Error::join(errors).map_or(Ok(()), Err)
    }

    /// 50 without a lease or a ready delegate, 51 if the overlay is broken: then running pods are cut off, too.
    fn status(&self, req: StatusRequest<Conf>) -> Result<(), Error> {
        let not_available = |error: Error| Error { code: code::NOT_AVAILABLE, ..error };
        let subnet =
            SubnetEnv::read(&req.conf.subnet_file).map_err(|error| not_available(error.into()))?;
        if let Some(device) = &req.conf.device {
            check_device(device.as_str())?;
        }
        let to = delegate_conf(&req.conf, &req.raw, Some(&subnet)).map_err(not_available)?;
        Delegate::new(&req.env, BUILTINS).status(&to.plugin, &to.with_call(&req.raw))
    }
}

/// What ADD said to the delegate; where that is lost, what it would say now. Without a lease the ranges are
/// missing, which matters to no delegate's DEL.
fn said_or_now(
    kept: &Kept,
    conf: &Conf,
    raw: &serde_json::Map<String, serde_json::Value>,
    id: &cni_spec::AttachmentId,
) -> Result<Delegation, Error> {
    if let Some(said) = kept.read(id) {
        return Ok(said);
    }
    let subnet = SubnetEnv::read(&conf.subnet_file).ok();
    delegate_conf(conf, raw, subnet.as_ref())
}

fn check_device(device: &str) -> Result<(), Error> {
    let cut_off = |msg: String| {
        Err(Error::new(code::LIMITED_CONNECTIVITY, msg)
            .with_details("the network agent makes it; see whether it runs, and its log"))
    };
    let link = Netlink::open().and_then(|netlink| netlink.link(device));
    match link {
        Err(error) => Err(Error::from_chain(code::NOT_AVAILABLE, &error)),
        Ok(None) => cut_off(format!("the VXLAN device {device} is missing")),
        Ok(Some(link)) if !link.up => cut_off(format!("the VXLAN device {device} is down")),
        Ok(Some(_)) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
