//! The `tuning` plugin: switches of the kernel and of a container's interface.
//!
//! Drop-in for the reference plugin of the same name, chained behind one that makes the interface: `sysctl`, `mac`, `mtu`,
//! `promisc`, `allmulti`, `txQLen`. What the interface had before is kept in a file until DEL gives it back
//! (`backup.rs`), in the reference's form, so that either plugin can undo what the other did. What is different:
//!
//! * A failed ADD puts everything back, sysctls too.
//! * The file says of which network it is, so GC finds those of containers that went without DEL.
//! * CHECK does not mind what a later plugin added, and knows `IFNAME` in the name of a sysctl.

mod backup;
mod conf;
mod link;
mod sysctl;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;

use cni_netlink::{NetNs, NetlinkError, mac_text};
use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, Error, code};

use crate::backup::Backup;
use crate::link::Attributes;

pub use crate::conf::{Args, NetConf, Overrides, RuntimeConfig};

/// Keys of `CNI_ARGS` that may come without `IgnoreUnknown=1`: ours, and those of the IPAM plugins.
const KNOWN_ARGS: &[&str] = &["MAC", "IP", "GATEWAY"];

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tuning;

/// The plugin as a process.
#[must_use]
pub fn main() -> ExitCode {
    cni_skel::main(&Tuning)
}

impl Plugin for Tuning {
    type Conf = NetConf;

    fn name(&self) -> &'static str {
        "tuning"
    }

    fn about(&self) -> &'static str {
        "sets sysctls and attributes of a container's interface"
    }

    fn add(&self, req: AddRequest<NetConf>) -> Result<AddResult, Error> {
        req.args.only(KNOWN_ARGS)?;
        let settings = req.conf.settings(&req.args, req.ifname.as_str())?;
        sysctl::allow(&settings.sysctls)?;
        let mut result = req.prev_result.clone().ok_or_else(|| {
            Error::new(
                code::INVALID_CONFIG,
                "\"prevResult\" is missing: tuning has to stand behind another plugin of a list",
            )
        })?;
        let netns = open_container(&req.netns)?;
        let backup = Backup::new(&settings.data_dir, &req.attachment());
        inside(&netns, || {
            let before = match settings.link.is_empty() {
                true => Attributes::default(),
                false => backup.keep(&req.name, &link::read(&req.ifname, &settings.link)?)?,
            };
            let mut set = Vec::new();
            let done = sysctl::set(&settings.sysctls, &mut set)
                .and_then(|()| link::write(&req.ifname, &settings.link));
            done.inspect_err(|_| undo(&req, &before, &set, &backup))
        })?;
        for interface in &mut result.interfaces {
            if interface.name == req.ifname.as_str() && interface.sandbox == req.env.netns {
                if let Some(mac) = settings.link.mac {
                    interface.mac = mac_text(mac);
                }
                interface.mtu = settings.link.mtu.or(interface.mtu);
            }
        }
        Ok(result)
    }

    /// Best effort: the interface is about to go, so a refusal to restore it is told and stops nobody.
    fn del(&self, req: DelRequest<NetConf>) -> Result<(), Error> {
        let backup = Backup::new(req.conf.data_dir(), &req.attachment());
        let Some(before) = backup.read()? else { return Ok(()) };
        if let Some(netns) = req.netns.as_deref().and_then(|path| NetNs::open(path).ok())
            && let Err(error) = inside(&netns, || link::write(&req.ifname, &before))
        {
            eprintln!("tuning: restore {}: {error}", req.ifname);
        }
        backup.remove()
    }

    fn check(&self, req: CheckRequest<NetConf>) -> Result<(), Error> {
        let settings = req.conf.settings(&req.args, req.ifname.as_str())?;
        let netns = open_container(&req.netns)?;
        let mut differences = Vec::new();
        inside(&netns, || {
            differences.extend(sysctl::differences(&settings.sysctls)?);
            if !settings.link.is_empty() {
                let seen = link::read(&req.ifname, &settings.link)?;
                differences.extend(settings.link.differences(&seen, req.ifname.as_str()));
            }
            Ok(())
        })?;
        let failures = differences.into_iter().map(|msg| Error::new(code::CHECK_FAILED, msg));
        Error::join(failures.collect()).map_or(Ok(()), Err)
    }

    fn gc(&self, req: GcRequest<NetConf>) -> Result<(), Error> {
        let valid: BTreeSet<String> = req.valid.iter().map(backup::file_name).collect();
        backup::remove_stale(req.conf.data_dir(), &req.name, &valid)
    }

    /// Nothing has to be there but the kernel.
    fn status(&self, req: StatusRequest<NetConf>) -> Result<(), Error> {
        let settings = req.conf.settings(&cni_spec::CniArgs::default(), "eth0")?;
        sysctl::allow(&settings.sysctls)
    }
}

/// After a failed ADD: puts everything back as it was.
fn undo(req: &AddRequest<NetConf>, before: &Attributes, set: &[sysctl::Set], backup: &Backup) {
    let steps = [sysctl::restore(set), link::write(&req.ifname, before), backup.remove()];
    for error in steps.into_iter().filter_map(Result::err) {
        eprintln!("tuning: undo a failed ADD: {error}");
    }
}

fn open_container(path: &Path) -> Result<NetNs, Error> {
    NetNs::open(path).map_err(|error| {
        let code = if error.is_not_found() { code::UNKNOWN_CONTAINER } else { code::INVALID_NETNS };
        Error::from_chain(code, &error).context("CNI_NETNS")
    })
}

/// An error of work in the container's namespace.
struct Failure(Error);

impl From<NetlinkError> for Failure {
    fn from(error: NetlinkError) -> Self {
        Self(failed(error))
    }
}

/// Works in the container's namespace.
fn inside<T: Send>(
    netns: &NetNs,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Error> {
    netns.run(|| work().map_err(Failure)).map_err(|Failure(error)| error)
}

fn failed(error: NetlinkError) -> Error {
    let code = if error.is_transient() { code::TRY_AGAIN } else { code::INTERNAL };
    Error::from_chain(code, &error)
}
