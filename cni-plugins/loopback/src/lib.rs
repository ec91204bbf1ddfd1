//! The `loopback` plugin: switches `lo` of the container on at ADD and off at DEL.
//!
//! Drop-in for the reference plugin of the same name. The interface is `lo` whatever `CNI_IFNAME` says. Chained
//! behind another plugin it hands on what that one made; alone it answers with `lo` and its addresses.

use std::process::ExitCode;

use cni_netlink::{Link, NetNs, Netlink, NetlinkError};
use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, Error, Interface, IpConfig, code};
use ipnetwork::IpNetwork;
use serde::Deserialize;

const LO: &str = "lo";

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Loopback;

/// It has no options.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Conf {}

/// The plugin as a process.
#[must_use]
pub fn main() -> ExitCode {
    cni_skel::main(&Loopback)
}

impl Plugin for Loopback {
    type Conf = Conf;

    fn name(&self) -> &'static str {
        "loopback"
    }

    fn about(&self) -> &'static str {
        "switches the loopback interface of a container on"
    }

    fn add(&self, req: AddRequest<Conf>) -> Result<AddResult, Error> {
        let netlink = open(&NetNs::open(&req.netns).map_err(no_container)?)?;
        let lo = find_lo(&netlink)?;
        if !lo.up {
            netlink.set_up(lo.index).map_err(|error| Error::internal(&error))?;
        }
        if let Some(result) = req.prev_result {
            return Ok(result);
        }
        let addresses = netlink.addresses(lo.index).map_err(|error| Error::internal(&error))?;
        Ok(result(&req.netns.to_string_lossy(), &addresses))
    }

    fn del(&self, req: DelRequest<Conf>) -> Result<(), Error> {
        let Some(path) = req.netns else { return Ok(()) };
        let netns = match NetNs::open(path) {
            Ok(netns) => netns,
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(Error::internal(&error)),
        };
        let netlink = open(&netns)?;
        let lo = find_lo(&netlink)?;
        if lo.up {
            netlink.set_down(lo.index).map_err(|error| Error::internal(&error))
        } else {
            Ok(())
        }
    }

    fn check(&self, req: CheckRequest<Conf>) -> Result<(), Error> {
        let netlink = open(&NetNs::open(&req.netns).map_err(no_container)?)?;
        if find_lo(&netlink)?.up {
            return Ok(());
        }
        Err(Error::new(code::CHECK_FAILED, format!("lo is down in {}", req.netns.display())))
    }

    /// Nothing of this plugin outlives a container's namespace.
    fn gc(&self, _: GcRequest<Conf>) -> Result<(), Error> {
        Ok(())
    }

    /// Nothing has to be there but the kernel.
    fn status(&self, _: StatusRequest<Conf>) -> Result<(), Error> {
        Ok(())
    }
}

fn no_container(error: NetlinkError) -> Error {
    let code = if error.is_not_found() { code::UNKNOWN_CONTAINER } else { code::INVALID_NETNS };
    Error::from_chain(code, &error).context("CNI_NETNS")
}

fn open(netns: &NetNs) -> Result<Netlink, Error> {
    Netlink::open_in(netns).map_err(|error| Error::internal(&error))
}

fn find_lo(netlink: &Netlink) -> Result<Link, Error> {
    let lo = netlink.link(LO).map_err(|error| Error::internal(&error))?;
    lo.ok_or_else(|| Error::new(code::INTERNAL, "the namespace has no lo"))
}

/// Pure: what ADD answers when it stands alone. Other addresses on `lo` are not this plugin's.
fn result(sandbox: &str, addresses: &[IpNetwork]) -> AddResult {
    let lo = Interface {
        name: LO.to_owned(),
        mac: "00:00:00:00:00:00".to_owned(),
        sandbox: sandbox.to_owned(),
        ..Interface::default()
    };
    let loopback = addresses.iter().filter(|address| address.ip().is_loopback());
    let ips = loopback
        .map(|address| IpConfig { interface: Some(0), ..IpConfig::new(*address) })
        .collect();
    AddResult { interfaces: vec![lo], ips, ..AddResult::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_names_lo_and_its_loopback_addresses_only() {
        let net = |text: &str| text.parse::<IpNetwork>().expect("a network");
        let result =
            result("/run/netns/a", &[net("127.0.0.1/8"), net("10.96.0.10/32"), net("::1/128")]);
        assert_eq!(result.interfaces[0].sandbox, "/run/netns/a");
        assert_eq!(
            result.ips.iter().map(|ip| ip.address).collect::<Vec<_>>(),
            [net("127.0.0.1/8"), net("::1/128")]
        );
        assert!(result.ips.iter().all(|ip| ip.interface == Some(0)));
    }
}
