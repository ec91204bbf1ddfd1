//! The `host-local` IPAM plugin: addresses from ranges, leased by files on this host. And `static`, which gives what the
//! configuration names (`fixed.rs`).
//!
//! Configuration and files are those of the reference plugin of the same name, so a node can switch between the
//! two in either direction with containers running. Beyond the reference: GC, STATUS, a CHECK that compares
//! addresses, lease files that are whole from the instant they exist, and a cost of ADD and DEL that does not
//! grow with the number of leases (`store`).
//!
//! Start reading at [`HostLocal`]; [`RangeSet::candidates`] is the order in which addresses are tried.

mod allocate;
mod conf;
mod fixed;
mod range;
mod store;

pub use allocate::AllocError;
pub use conf::Conf;
pub use fixed::{Static, StaticConf};
pub use range::{Range, RangeError, RangeSet};
pub use store::{Owner, Store, StoreError};

use std::net::IpAddr;

use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, Error, IpConfig, code};

use crate::conf::Pool;

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostLocal;

impl Plugin for HostLocal {
    type Conf = Conf;

    fn name(&self) -> &'static str {
        "host-local"
    }

    fn about(&self) -> &'static str {
        "leases addresses from ranges, kept in files on this host"
    }

    /// One address of each range set, or none at all.
    fn add(&self, req: AddRequest<Conf>) -> Result<AddResult, Error> {
        let pool = Pool::parse(&req.conf, &req.args, req.version)?;
        let dns = pool.dns()?;
        let store = Store::create(&req.conf.folder(&req.name)?).map_err(AllocError::from)?;
        let leases = allocate::lease_all(&store, &pool.sets, &pool.requested, &req.attachment())?;
        let ips = leases
            .into_iter()
            .map(|(address, gateway)| IpConfig { gateway: Some(gateway), ..IpConfig::new(address) })
            .collect();
        Ok(AddResult { ips, routes: pool.routes, dns, ..AddResult::default() })
    }

    /// Needs nothing of the configuration but the folder: a container is let go under any configuration.
    fn del(&self, req: DelRequest<Conf>) -> Result<(), Error> {
        let store = Store::open(&req.conf.folder(&req.name)?).map_err(AllocError::from)?;
        let released = store.map_or(Ok(()), |store| store.release_of(&req.attachment()));
        Ok(released.map_err(AllocError::from)?)
    }

    /// Every address of the previous result that is ours to give is leased to this attachment.
    fn check(&self, req: CheckRequest<Conf>) -> Result<(), Error> {
        let pool = Pool::parse(&req.conf, &req.args, req.version)?;
        let attachment = req.attachment();
        let wrong = |msg: String| Err(Error::new(code::CHECK_FAILED, msg));
        let store = Store::open(&req.conf.folder(&req.name)?).map_err(AllocError::from)?;
        let leases = store.map_or(Ok(Vec::new()), |store| store.leases_of(&attachment));
        let leases = leases.map_err(AllocError::from)?;
        if leases.is_empty() {
            return wrong(format!("{attachment} has no lease"));
        }
        // Other plugins of the chain may have added addresses of their own.
        let ours = |ip: &IpAddr| pool.sets.iter().any(|set| set.range_of(*ip).is_some());
        let listed = req.prev_result.ips.iter().map(|ip| ip.address.ip()).filter(ours);
        match listed.into_iter().find(|ip| !leases.contains(ip)) {
            Some(ip) => wrong(format!("{ip} of \"prevResult\" is not leased to {attachment}")),
            None => Ok(()),
        }
    }

    /// Frees every lease whose owner is not among the valid attachments.
    fn gc(&self, req: GcRequest<Conf>) -> Result<(), Error> {
        let store = Store::open(&req.conf.folder(&req.name)?).map_err(AllocError::from)?;
        let Some(store) = store else { return Ok(()) };
        let mut errors = Vec::new();
        for (ip, owner) in store.all().map_err(AllocError::from)? {
            if !owner.is_among(&req.valid)
                && let Err(error) = store.release(ip)
            {
                errors.push(Error::from(AllocError::from(error)));
            }
        }
        Error::join(errors).map_or(Ok(()), Err)
    }

    /// Whether each range set has a free address.
    fn status(&self, req: StatusRequest<Conf>) -> Result<(), Error> {
        let not_available = |error: Error| Error { code: code::NOT_AVAILABLE, ..error };
        let pool = Pool::parse(&req.conf, &cni_spec::CniArgs::default(), req.version)?;
        let store = Store::create(&req.conf.folder(&req.name)?)
            .map_err(|error| not_available(AllocError::from(error).into()))?;
        for (index, set) in pool.sets.iter().enumerate() {
            allocate::find_free(&store, index, set).map_err(|error| not_available(error.into()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "../../corpus/mutate.rs"]
mod mutate;
#[cfg(test)]
mod tests;
