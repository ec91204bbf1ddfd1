//! The addresses: asked of the IPAM plugin, and given back when ADD fails.

use cni_invoke::{Builtin, Delegate};
use cni_spec::{AddResult, Env, Error, code};
use serde_json::{Map, Value};

/// IPAM plugins that are part of our executable: called without a process, if the name on `CNI_PATH` is this file.
const BUILTINS: &[Builtin] = &[
    ("host-local", |env, stdin| cni_skel::call(&cni_ipam::HostLocal, env, stdin)),
    ("static", |env, stdin| cni_skel::call(&cni_ipam::Static, env, stdin)),
];

/// The IPAM plugin of a configuration; without one every verb is nothing, and the network pure layer 2.
pub(crate) struct Ipam<'a> {
    plugin: Option<&'a str>,
    delegate: Delegate<'a>,
    conf: &'a Map<String, Value>,
}

impl<'a> Ipam<'a> {
    /// The plugin of this call.
    pub(crate) fn new(plugin: Option<&'a str>, env: &'a Env, conf: &'a Map<String, Value>) -> Self {
        Self { plugin, delegate: Delegate::new(env, BUILTINS), conf }
    }

    /// Leases addresses, for an attachment that was not there until now: a lease in its name is what an ADD left that
    /// was killed, or a container that went without DEL, and is taken back first.
    pub(crate) fn add(&self) -> Result<Lease<'_>, Error> {
        let Some(plugin) = self.plugin else {
            return Ok(Lease { ipam: self, result: AddResult::default(), kept: true });
        };
        let result = match self.delegate.add(plugin, self.conf) {
            Err(error) if error.code == code::ALREADY_ATTACHED => {
                self.del()?;
                self.delegate.add(plugin, self.conf)?
            }
            added => added?,
        };
        let lease = Lease { ipam: self, result, kept: false };
        if lease.result.ips.is_empty() {
            return Err(Error::new(
                code::INVALID_CONFIG,
                format!("the IPAM plugin {plugin} gave no address"),
            ));
        }
        Ok(lease)
    }

    /// Releases them; none are released already.
    pub(crate) fn del(&self) -> Result<(), Error> {
        self.plugin.map_or(Ok(()), |plugin| self.delegate.del(plugin, self.conf))
    }

    /// Whether the lease is as ADD answered.
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.plugin.map_or(Ok(()), |plugin| self.delegate.check(plugin, self.conf))
    }

    /// Releases the leases of attachments that are gone.
    pub(crate) fn gc(&self) -> Result<(), Error> {
        self.plugin.map_or(Ok(()), |plugin| self.delegate.gc(plugin, self.conf))
    }

    /// Whether an address could be leased.
    pub(crate) fn status(&self) -> Result<(), Error> {
        self.plugin.map_or(Ok(()), |plugin| self.delegate.status(plugin, self.conf))
    }
}

/// Leased addresses; dropped without [`keep`](Self::keep) they are released.
pub(crate) struct Lease<'a> {
    ipam: &'a Ipam<'a>,
    result: AddResult,
    kept: bool,
}

impl Lease<'_> {
    /// What IPAM answered.
    pub(crate) fn result(&self) -> &AddResult {
        &self.result
    }

    /// ADD has succeeded.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = self.ipam.del()
        {
            eprintln!("bridge: undo a failed ADD: {error}");
        }
    }
}
