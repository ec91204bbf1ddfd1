//! The `portmap` plugin: ports of the host lead to containers.
//!
//! Drop-in for the reference plugin of the same name, chained behind one that gives the container its address. What is
//! different:
//!
//! * The rules are made once per node (`rules.rs`); a container adds elements to maps, in one netlink message and
//!   without a process. The cost of a packet and of an ADD does not grow with the number of containers.
//! * A port that another container has is an error that names it, instead of a silent change of owner.
//! * Each element's comment says whose it is, so DEL needs neither namespace nor previous result, and there is a GC.
//! * The change is only made if nobody has changed the ruleset since it was planned, else it is planned anew: what runs
//!   in parallel, or is killed half-way, leaves either all of an attachment or nothing.
//! * UDP flows that conntrack remembers are forgotten at ADD and at DEL.
//!
//! Deciding is in `forward.rs` (pure), touching in `table.rs`. Start reading at [`Plugin::add`] below.

mod condition;
mod conf;
mod forward;
mod localnet;
mod rules;
mod table;

use std::collections::BTreeSet;
use std::process::ExitCode;

use cni_nftables::{Nft, NftError};
use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, Error, Owner, code};
use ipnetwork::IpNetwork;

use crate::conf::container_addresses;
use crate::forward::{Forward, desired, owner};
use crate::table::Tables;

pub use crate::conf::{NetConf, PortMapping, RuntimeConfig};

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Portmap;

/// The plugin as a process.
#[must_use]
pub fn main() -> ExitCode {
    cni_skel::main(&Portmap)
}

impl Plugin for Portmap {
    type Conf = NetConf;

    fn name(&self) -> &'static str {
        "portmap"
    }

    fn about(&self) -> &'static str {
        "forwards ports of the host to a container"
    }

    fn add(&self, req: AddRequest<NetConf>) -> Result<AddResult, Error> {
        let settings = req.conf.settings()?;
        let mappings = req.conf.mappings()?;
        let owner = owner(&req.name, &req.attachment());
        let result = req.prev_result.ok_or_else(|| {
            Error::new(
                code::INVALID_CONFIG,
                "\"prevResult\" is missing: portmap has to stand behind another plugin of a list",
            )
        })?;
        if mappings.is_empty() {
            return Ok(result);
        }
        let addresses = reached(container_addresses(&result)?, &mappings);
        if addresses.is_empty() {
            return Err(Error::new(
                code::INVALID_CONFIG,
                "\"prevResult\" has no address of the container that \"portMappings\" could lead to",
            ));
        }
        let want = desired(&mappings, &addresses, &settings, &owner);
        localnet::ensure(&want, &settings)?;
        Tables::open()?.add(&want, &addresses, &settings, &owner)?;
        Ok(result)
    }

    fn del(&self, req: DelRequest<NetConf>) -> Result<(), Error> {
        let owner = owner(&req.name, &req.attachment());
        Tables::open()?.remove(|forward| forward.owner == owner, false)
    }

    fn check(&self, req: CheckRequest<NetConf>) -> Result<(), Error> {
        let settings = req.conf.settings()?;
        let mappings = req.conf.mappings()?;
        if mappings.is_empty() {
            return Ok(());
        }
        let owner = owner(&req.name, &req.attachment());
        let addresses = reached(container_addresses(&req.prev_result)?, &mappings);
        let want = desired(&mappings, &addresses, &settings, &owner);
        let differences = Tables::open()?.differences(&want, &addresses, &settings)?;
        let failures =
            differences.into_iter().map(|msg| Error::new(code::CHECK_FAILED, msg)).collect();
        Error::join(failures).map_or(Ok(()), Err)
    }

    fn gc(&self, req: GcRequest<NetConf>) -> Result<(), Error> {
        let valid: BTreeSet<Owner> =
            req.valid.iter().map(|attachment| owner(&req.name, attachment)).collect();
        let is_gone =
            |forward: &Forward| forward.owner.is_of(&req.name) && !valid.contains(&forward.owner);
        Tables::open()?.remove(is_gone, true)
    }

    fn status(&self, req: StatusRequest<NetConf>) -> Result<(), Error> {
        req.conf.settings()?;
        Tables::open()?
            .probe()
            .map_err(|error| Error::from_chain(code::NOT_AVAILABLE, &error).context("nftables"))?;
        if Nft::default().is_installed() {
            return Ok(());
        }
        Err(Error::new(code::NOT_AVAILABLE, NftError::Missing("nft".to_owned()).to_string()))
    }
}

/// The container's addresses to which at least one mapping leads.
fn reached(mut addresses: Vec<IpNetwork>, mappings: &[conf::Mapping]) -> Vec<IpNetwork> {
    addresses.retain(|address| {
        mappings
            .iter()
            .any(|mapping| mapping.host_ip.is_none_or(|host| host.is_ipv4() == address.is_ipv4()))
    });
    addresses
}
