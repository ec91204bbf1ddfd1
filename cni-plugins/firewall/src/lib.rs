//! The `firewall` plugin: containers may be reached through a host whose firewall forwards nothing.
//!
//! Drop-in for the reference plugin of the same name, chained behind one that gives the container its address. What a
//! container sends is accepted, and what is an answer to it or comes by a mapped port; `ingressPolicy` keeps the containers
//! of other bridges (`same-bridge`), or all (`isolated`), away from it. What is different:
//!
//! * The rules are made once per node (`rules.rs`); a container adds elements to sets, in one netlink message. The way
//!   through the FORWARD chain of iptables, where others drop, is one rule as well (`forward.rs`).
//! * Each element's comment says whose it is, so DEL needs neither namespace nor previous result, GC finds what was left,
//!   and what confines a bridge goes with its last container.
//! * `isolated` also holds between containers of one bridge without `br_netfilter`: their ports are isolated.
//!
//! Deciding is in `pods.rs` (pure), touching in `table.rs`. Start reading at [`Plugin::add`] below.

mod conf;
mod forward;
mod pods;
mod rules;
mod table;

use std::collections::BTreeSet;
use std::process::ExitCode;

use cni_netlink::{Link, LinkKind, Netlink, NetlinkError};
use cni_nftables::{Nft, NftError};
use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, Error, Owner, code};

use crate::conf::Settings;
use crate::pods::{Confined, Pod, Policy, owner};
use crate::table::Table;

pub use crate::conf::NetConf;

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Firewall;

/// The plugin as a process.
#[must_use]
pub fn main() -> ExitCode {
    cni_skel::main(&Firewall)
}

impl Plugin for Firewall {
    type Conf = NetConf;

    fn name(&self) -> &'static str {
        "firewall"
    }

    fn about(&self) -> &'static str {
        "lets a container's traffic through the host's firewall"
    }

    fn add(&self, req: AddRequest<NetConf>) -> Result<AddResult, Error> {
        let settings = req.conf.settings()?;
        let owner = owner(&req.name, &req.attachment());
        let result = req.prev_result.ok_or_else(|| {
            Error::new(
                code::INVALID_CONFIG,
                "\"prevResult\" is missing: firewall has to stand behind another plugin of a list",
            )
        })?;
        let links = Links::of(&result, settings.policy)?;
        let want = desired(&result, &settings, &links, &owner)?;
        links.isolate()?;
        let table = Table::open()?;
        table.add(&want)?;
        forward::ensure(table.netfilter(), &want, &settings.admin_chain)?;
        Ok(result)
    }

    fn del(&self, req: DelRequest<NetConf>) -> Result<(), Error> {
        let owner = owner(&req.name, &req.attachment());
        Table::open()?.remove(|pod| pod.owner == owner, false).map(drop)
    }

    fn check(&self, req: CheckRequest<NetConf>) -> Result<(), Error> {
        let settings = req.conf.settings()?;
        let links = Links::of(&req.prev_result, settings.policy)?;
        let owner = owner(&req.name, &req.attachment());
        let want = desired(&req.prev_result, &settings, &links, &owner)?;
        let table = Table::open()?;
        let mut differences = table.differences(&want)?;
        differences.extend(links.differences());
        differences.extend(forward::differences(table.netfilter(), &want, &settings.admin_chain)?);
        let failures = differences.into_iter().map(|msg| Error::new(code::CHECK_FAILED, msg));
        Error::join(failures.collect()).map_or(Ok(()), Err)
    }

    fn gc(&self, req: GcRequest<NetConf>) -> Result<(), Error> {
        let valid: BTreeSet<Owner> =
            req.valid.iter().map(|attachment| owner(&req.name, attachment)).collect();
        let table = Table::open()?;
        let is_gone = |pod: &Pod| pod.owner.is_of(&req.name) && !valid.contains(&pod.owner);
        if table.remove(is_gone, true)? {
            forward::remove(table.netfilter())?;
        }
        Ok(())
    }

    fn status(&self, req: StatusRequest<NetConf>) -> Result<(), Error> {
        req.conf.settings()?;
        Table::open()?
            .probe()
            .map_err(|error| Error::from_chain(code::NOT_AVAILABLE, &error).context("nftables"))?;
        if Nft::default().is_installed() {
            return Ok(());
        }
        Err(Error::new(code::NOT_AVAILABLE, NftError::Missing("nft".to_owned()).to_string()))
    }
}

/// The container's addresses, and by what they are confined.
fn desired(
    result: &AddResult,
    settings: &Settings,
    links: &Links,
    owner: &Owner,
) -> Result<Vec<Pod>, Error> {
    let confined = match settings.policy {
        Some(policy) => Some(Confined { policy, bridge: links.bridge(policy)?.to_owned() }),
        None => None,
    };
    let pods = result.container_addresses()?.into_iter().map(|address| Pod {
        ip: address.ip(),
        owner: owner.clone(),
        confined: confined.clone(),
    });
    Ok(pods.collect())
}

/// Links of the host that the result names, as far as the policy is about them.
struct Links {
    netlink: Option<Netlink>,
    found: Vec<Link>,
    isolated: bool,
}

impl Links {
    fn of(result: &AddResult, policy: Option<Policy>) -> Result<Self, Error> {
        let Some(policy) = policy else {
            return Ok(Self { netlink: None, found: Vec::new(), isolated: false });
        };
        let netlink = Netlink::open().map_err(failed)?;
        let mut found = Vec::new();
        for interface in result.interfaces.iter().filter(|one| one.sandbox.is_empty()) {
            found.extend(netlink.link(&interface.name).map_err(failed)?);
        }
        Ok(Self { netlink: Some(netlink), found, isolated: policy == Policy::Isolated })
    }

    fn bridge(&self, policy: Policy) -> Result<&str, Error> {
        let bridge = self.found.iter().find(|link| matches!(link.kind, LinkKind::Bridge { .. }));
        bridge.map(|link| link.name.as_str()).ok_or_else(|| {
            let msg = format!(
                "\"ingressPolicy\" is \"{}\", and \"prevResult\" has no bridge",
                policy.name()
            );
            Error::new(code::INVALID_CONFIG, msg)
        })
    }

    fn open_ports(&self) -> impl Iterator<Item = &Link> {
        let is_open = |link: &&Link| link.port.as_ref().is_some_and(|port| !port.isolated);
        self.found.iter().filter(|_| self.isolated).filter(is_open)
    }

    fn isolate(&self) -> Result<(), Error> {
        for link in self.open_ports() {
            let hairpin = link.port.as_ref().is_some_and(|port| port.hairpin);
            if let Some(netlink) = &self.netlink {
                netlink.set_port(link.index, hairpin, true).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn differences(&self) -> Vec<String> {
        self.open_ports().map(|link| format!("the port {} is not isolated", link.name)).collect()
    }
}

fn failed(error: NetlinkError) -> Error {
    let code = if error.is_transient() { code::TRY_AGAIN } else { code::INTERNAL };
    Error::from_chain(code, &error)
}
