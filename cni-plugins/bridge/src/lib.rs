//! The `bridge` plugin: joins a pod to a bridge of the host with a veth pair.
//!
//! Drop-in for the reference plugin of the same name: same configuration, same result. What is different:
//!
//! * The host's end has a name that follows from network, container and interface ([`host_veth_name`]), is made in the
//!   network's link group, and gets an alias ([`host_veth_alias`]) as the very last step of ADD. So DEL and GC find
//!   everything without the pod's namespace, and what an ADD left that was killed half-way is known as such, and
//!   cleared away by the next one.
//! * A failed ADD leaves nothing: what was made goes again when its guard is dropped.
//! * The pod's MAC follows from its address, so that an address which is used again needs no announcement (`mac.rs`).
//! * Masquerade is a rule per subnet, not per pod (`masquerade.rs`), and `nftables` is the only way to it.
//! * GC removes the links of attachments that are gone, and with the last one the rules of the network.
//!
//! Deciding is in `plan.rs` (pure), touching in `host.rs` and `pod.rs`. Start reading at [`Plugin::add`] below.

mod check;
mod conf;
mod host;
mod kernel;
mod lease;
mod mac;
mod masquerade;
mod name;
mod plan;
mod pod;
mod settle;
mod spoof;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::ExitCode;
use std::thread;

use cni_netlink::{
    Change, Link, LinkKind, MacBytes, Neighbour, NetNs, Netlink, NetlinkError, Started, VethPair,
    mac_text,
};
use cni_nftables::{Flows, Nft};
use cni_skel::{AddRequest, CheckRequest, DelRequest, GcRequest, Plugin, StatusRequest};
use cni_spec::{AddResult, Error, Interface, IpConfig, code};

use crate::conf::Settings;
use crate::kernel::netlink_error;
use crate::lease::{Ipam, Lease};
use crate::pod::Pod;

pub use crate::conf::{Args, IpamConf, MacArg, NetConf, TrunkRange};
pub use crate::name::{host_veth_alias, host_veth_name};

/// Keys of `CNI_ARGS` that may come without `IgnoreUnknown=1`: ours, and those of the IPAM plugins.
const KNOWN_ARGS: &[&str] = &["MAC", "IP", "GATEWAY"];

/// The plugin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bridge;

/// The plugin as a process.
#[must_use]
pub fn main() -> ExitCode {
    cni_skel::main(&Bridge)
}

impl Plugin for Bridge {
    type Conf = NetConf;

    fn name(&self) -> &'static str {
        "bridge"
    }

    fn about(&self) -> &'static str {
        "joins a container to a bridge of the host with a veth pair"
    }

    fn add(&self, req: AddRequest<NetConf>) -> Result<AddResult, Error> {
        req.args.only(KNOWN_ARGS)?;
        let settings = req.conf.settings(&req.args)?;
        let netns = open_container(&req.netns)?;
        // The way into the pod is made while the host's side is worked on.
        thread::scope(|scope| attach(req, &settings, &netns, netns.start(scope, Netlink::open)))
    }

    fn del(&self, req: DelRequest<NetConf>) -> Result<(), Error> {
        let mut failures = Vec::new();
        let name = host_veth_name(&req.name, &req.attachment());
        // The link goes before the lease: an address that is free must not be on a pod any more.
        failures.extend(detach(&req, &name).err());
        if req.conf.macspoofchk {
            failures.extend(spoof::release(&[name]).err());
        }
        let plugin = Some(req.conf.ipam.plugin.as_str()).filter(|plugin| !plugin.is_empty());
        failures.extend(Ipam::new(plugin, &req.env, &req.raw).del().err());
        Error::join(failures).map_or(Ok(()), Err)
    }

    fn check(&self, req: CheckRequest<NetConf>) -> Result<(), Error> {
        let settings = req.conf.settings(&req.args)?;
        Ipam::new(settings.ipam.as_deref(), &req.env, &req.raw).check()?;
        check::check(&req, &settings)
    }

    fn gc(&self, req: GcRequest<NetConf>) -> Result<(), Error> {
        let mut failures = Vec::new();
        let mut stale = Vec::new();
        match stale_ports(&req) {
            Ok((netlink, links)) => {
                for link in links {
                    match netlink.delete_link(link.index) {
                        Ok(()) => stale.push(link.name),
                        Err(error) => failures.push(netlink_error(error)),
                    }
                }
            }
            Err(error) => failures.push(error),
        }
        if req.conf.macspoofchk {
            failures.extend(release_stale(&req, stale).err());
        }
        if req.conf.ip_masq && req.valid.is_empty() {
            failures.extend(masquerade::remove(&req.name).err());
        }
        let plugin = Some(req.conf.ipam.plugin.as_str()).filter(|plugin| !plugin.is_empty());
        failures.extend(Ipam::new(plugin, &req.env, &req.raw).gc().err());
        Error::join(failures).map_or(Ok(()), Err)
    }

    fn status(&self, req: StatusRequest<NetConf>) -> Result<(), Error> {
        let settings = req.conf.settings(&cni_spec::CniArgs::default())?;
        let unavailable = |msg: String| Error::new(code::NOT_AVAILABLE, msg);
        let netlink = Netlink::open().map_err(|error| unavailable(error.to_string()))?;
        let bridge = netlink
            .link(settings.bridge.as_str())
            .map_err(|error| unavailable(error.to_string()))?;
        if bridge.is_some_and(|link| !matches!(link.kind, LinkKind::Bridge { .. })) {
            return Err(unavailable(format!(
                "the link {} is there and is not a bridge",
                settings.bridge
            )));
        }
        if (settings.masquerade || settings.check_spoofing) && !Nft::default().is_installed() {
            return Err(unavailable(
                "the program `nft` is missing: install the package nftables".to_owned(),
            ));
        }
        Ipam::new(settings.ipam.as_deref(), &req.env, &req.raw).status()
    }
}

fn attach(
    req: AddRequest<NetConf>,
    settings: &Settings,
    netns: &NetNs,
    inside: Started<'_, Netlink, NetlinkError>,
) -> Result<AddResult, Error> {
    let ipam = Ipam::new(settings.ipam.as_deref(), &req.env, &req.raw);
    let netlink = Netlink::open().map_err(netlink_error)?;
    let macs = Macs::choose(settings);

    let bridge = host::ensure_bridge(&netlink, settings)?;
    let veth = HostVeth::create(&netlink, &bridge, settings, macs, netns, &req, &ipam)?;
    let made = Made { veth, lease: ipam.add()? };
    let given = plan::complete_lease(
        made.lease.result().clone(),
        settings.gateway,
        settings.default_gateway,
    )?;
    let ips = addresses(&given.ips);
    let pod_mac = plan::pod_mac(settings, &ips).unwrap_or(macs.pod);

    let port = made.veth.link.clone();
    host::set_up_port(&netlink, &port, settings)?;
    if settings.check_spoofing {
        spoof::guard(&req.name, &port.name, pod_mac)?;
    }
    // Before the pod is switched on: the kernel then has the links locked for a while.
    let gateway = set_up_gateway(&netlink, &bridge, settings, &given)?;
    if settings.masquerade {
        masquerade::ensure(&req.name, &plan::subnets(&given.ips))?;
    }
    // Before the pod has its addresses: whoever gets one of them next has to know.
    let following = settings.gateway && !ips.is_empty() && mac::follows(pod_mac, &ips);
    let announce = host::must_announce(&netlink, &bridge, following, gateway, pod_mac, &ips)?;
    let mut pod = Pod::new(inside.finish().map_err(netlink_error)?, &req.ifname, &port, macs.pod)?;
    if !settings.keep_down {
        pod = pod.set_up(netns, settings, &given, pod_mac)?;
        host::wait_for_port(&netlink, &port)?;
        pod.settle(netns, settings, &ips)?;
        if announce {
            pod.announce()?;
        }
    }

    // A pod that had the address before and went without DEL may still be in the host's memory.
    let forgotten = gateway.map_or(Vec::new(), |link| host::neighbours(link, &ips));
    made.keep(&forgotten, &host_veth_alias(&req.name, &req.attachment()))?;
    Ok(result(
        req.prev_result.unwrap_or_default(),
        settings,
        [&bridge, &port, &pod.link],
        &req.env.netns,
        given,
    ))
}

fn open_container(path: &Path) -> Result<NetNs, Error> {
    NetNs::open(path).map_err(|error| {
        let code = if error.is_not_found() { code::UNKNOWN_CONTAINER } else { code::INVALID_NETNS };
        Error::from_chain(code, &error).context("CNI_NETNS")
    })
}

/// The MACs that a pair is made with, so that udev has no time to choose others. The pod's end may get another one when
/// its address is known: in its namespace nobody chooses.
#[derive(Debug, Clone, Copy)]
struct Macs {
    host: MacBytes,
    pod: MacBytes,
}

impl Macs {
    fn choose(settings: &Settings) -> Self {
        Self { host: mac::random_mac(), pod: settings.mac.unwrap_or_else(mac::random_mac) }
    }
}

/// What a failed ADD has to undo. The link goes first: an address that is free must not be on a pod any more.
struct Made<'a> {
    veth: HostVeth<'a>,
    lease: Lease<'a>,
}

impl Made<'_> {
    /// ADD has succeeded; the host forgets these neighbours.
    fn keep(self, forgotten: &[Neighbour], alias: &str) -> Result<(), Error> {
        let Self { veth, lease } = self;
        veth.finish(forgotten, alias)?;
        lease.keep();
        Ok(())
    }
}

/// The host's end of the pair; with it goes the pod's. Dropped without [`finish`](Self::finish) it is removed.
struct HostVeth<'a> {
    netlink: &'a Netlink,
    link: Link,
    check_spoofing: bool,
    finished: bool,
}

impl<'a> HostVeth<'a> {
    /// Makes the pair. A half that an ADD of the same attachment left when it was killed is cleared away first, with
    /// its lease.
    fn create(
        netlink: &'a Netlink,
        bridge: &Link,
        settings: &Settings,
        macs: Macs,
        netns: &NetNs,
        req: &AddRequest<NetConf>,
        ipam: &Ipam<'_>,
    ) -> Result<Self, Error> {
        let name = host_veth_name(&req.name, &req.attachment());
        let create = || {
            netlink.create_veth(&VethPair {
                name: name.clone(),
                peer_name: req.ifname.to_string(),
                peer_netns: Some(netns.as_fd()),
                master: Some(bridge.index),
                mtu: settings.mtu,
                mac: Some(macs.host),
                peer_mac: Some(macs.pod),
                group: Some(req.name.link_group()),
                up: true,
            })
        };
        let taken = |what: String| Error::new(code::ALREADY_ATTACHED, what);
        let made = match create() {
            Err(error) if error.is_exists() => match netlink.link(&name).map_err(netlink_error)? {
                Some(link) if !link.alias.as_deref().is_some_and(name::is_whole) => {
                    netlink.delete_link(link.index).map_err(netlink_error)?;
                    ipam.del()?;
                    create()
                }
                Some(_) => {
                    return Err(taken(format!(
                        "{} is attached to network {} already",
                        req.attachment(),
                        req.name
                    )));
                }
                None => Err(error),
            },
            made => made,
        };
        let link = made.map_err(|error| match error.is_exists() {
            true => taken(format!("the container has an interface {} already", req.ifname)),
            // The pair may have been made, and only the look at it after that have failed.
            false => match remove_unmarked(netlink, &name) {
                Ok(()) => netlink_error(error),
                Err(undo) => netlink_error(error).with_details(format!("undo: {undo}")),
            },
        })?;
        Ok(Self { netlink, link, check_spoofing: settings.check_spoofing, finished: false })
    }

    /// Makes the host forget neighbours, and says, as the very last thing, whose the pair is and that it is whole.
    fn finish(mut self, forgotten: &[Neighbour], alias: &str) -> Result<(), Error> {
        let mut changes: Vec<Change> =
            forgotten.iter().cloned().map(Change::DeleteNeighbour).collect();
        changes.push(Change::SetAlias { link: self.link.index, alias: alias.to_owned() });
        match self.netlink.apply(&changes).map_err(netlink_error)?.pop() {
            Some(refused) => Err(netlink_error(refused.error)),
            None => {
                self.finished = true;
                Ok(())
            }
        }
    }
}

/// Removes a link that nobody has said to be an attachment's, if there is one.
fn remove_unmarked(netlink: &Netlink, name: &str) -> Result<(), cni_netlink::NetlinkError> {
    match netlink.link(name)? {
        Some(link) if link.alias.is_none() => netlink.delete_link(link.index),
        _ => Ok(()),
    }
}

impl Drop for HostVeth<'_> {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = self.netlink.delete_link(self.link.index) {
            eprintln!("bridge: undo a failed ADD: {error}");
        }
        if self.check_spoofing
            && let Err(error) = spoof::release(std::slice::from_ref(&self.link.name))
        {
            eprintln!("bridge: undo a failed ADD: {error}");
        }
    }
}

/// Returns the index of the link that has the gateways' addresses, if there are any.
fn set_up_gateway(
    netlink: &Netlink,
    bridge: &Link,
    settings: &Settings,
    given: &AddResult,
) -> Result<Option<u32>, Error> {
    if !settings.gateway || given.ips.is_empty() {
        return Ok(None);
    }
    let gateways = plan::gateway_addresses(&given.ips);
    host::ensure_gateways(netlink, bridge, settings, &gateways).map(Some)
}

fn addresses(ips: &[IpConfig]) -> Vec<IpAddr> {
    ips.iter().map(|ip| ip.address.ip()).collect()
}

/// Pure: what ADD answers, behind what the chain had made before.
fn result(
    prev: AddResult,
    settings: &Settings,
    links: [&Link; 3],
    sandbox: &str,
    given: AddResult,
) -> AddResult {
    let mut result = prev;
    let pod_index = result.interfaces.len() + 2;
    let sandboxes = ["", "", sandbox];
    result.interfaces.extend(links.into_iter().zip(sandboxes).map(|(link, sandbox)| Interface {
        name: link.name.clone(),
        mac: mac_text(link.mac),
        mtu: Some(link.mtu),
        sandbox: sandbox.to_owned(),
        ..Interface::default()
    }));
    result
        .ips
        .extend(given.ips.into_iter().map(|ip| IpConfig { interface: Some(pod_index), ..ip }));
    result.routes.extend(given.routes);
    for dns in [given.dns, settings.dns.clone()] {
        if !dns.is_empty() {
            result.dns = dns;
        }
    }
    for (key, value) in given.extra {
        result.extra.entry(key).or_insert(value);
    }
    result
}

/// Removes the pair, from whichever end there is, and what the host remembers of the pod.
fn detach(req: &DelRequest<NetConf>, name: &str) -> Result<(), Error> {
    let netlink = Netlink::open().map_err(netlink_error)?;
    let of_another_plugin = remove_pair(&netlink, req, name)?;
    if of_another_plugin || plan::had_another_mac(req.prev_result.as_ref(), &req.ifname) {
        host::end_following(&netlink, &req.conf.bridge)?;
    }
    let ips = req.prev_result.as_ref().map(|prev| addresses(&prev.ips)).unwrap_or_default();
    if ips.is_empty() {
        return Ok(());
    }
    forget_flows(&ips);
    let gateway = match req.conf.vlan {
        0 => req.conf.bridge.clone(),
        vlan => format!("{}.{vlan}", req.conf.bridge),
    };
    match netlink.link(&gateway).map_err(netlink_error)? {
        Some(link) => Ok(host::forget(&netlink, &host::neighbours(link.index, &ips))?),
        None => Ok(()),
    }
}

/// Returns whether the pair was made by another plugin, which we know by the name of its near end.
fn remove_pair(netlink: &Netlink, req: &DelRequest<NetConf>, name: &str) -> Result<bool, Error> {
    if let Some(link) = netlink.link(name).map_err(netlink_error)? {
        netlink.delete_link_unawaited(link.index).map_err(netlink_error)?;
        return Ok(false);
    }
    let Some(path) = &req.netns else { return Ok(false) };
    match NetNs::open(path) {
        Ok(netns) => Ok(pod::remove(&netns, &req.ifname)?),
        // The namespace is gone, and the pair with it.
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(netlink_error(error)),
    }
}

/// Makes conntrack forget the flows of a pod that is gone: the next one with its address would get what a busy client
/// still sends to it. A failure is no reason to keep the address.
fn forget_flows(ips: &[IpAddr]) {
    let flows: Vec<Flows> = ips.iter().copied().map(Flows::AnsweredBy).collect();
    if let Err(error) = cni_nftables::forget_flows(&flows) {
        eprintln!("bridge: make conntrack forget the flows of a pod: {error}");
    }
}

/// Ports of the bridge that belong to no valid attachment of this network. Their alias says whose they are, or, where
/// an ADD was killed before it could set one, the group they were made in. A half is among them, since no ADD works on
/// it: GC does not run beside one (CNI spec 1.1.0 §2, GC).
fn stale_ports(req: &GcRequest<NetConf>) -> Result<(Netlink, Vec<Link>), Error> {
    let netlink = Netlink::open().map_err(netlink_error)?;
    let valid: BTreeSet<String> =
        req.valid.iter().map(|attachment| host_veth_name(&req.name, attachment)).collect();
    let mut ports = match netlink.link(&req.conf.bridge).map_err(netlink_error)? {
        Some(bridge) => netlink.ports(bridge.index).map_err(netlink_error)?,
        None => Vec::new(),
    };
    ports.retain(|port| {
        let ours = match port.alias.as_deref() {
            Some(alias) => name::is_alias_of(alias, &req.name),
            None => port.group == req.name.link_group() && name::is_host_veth(&port.name),
        };
        ours && !valid.contains(&port.name)
    });
    Ok((netlink, ports))
}

/// Ends the spoof checks of ports that went just now, and of those that went before without it: a namespace that ends
/// takes its link along, but no rules.
fn release_stale(req: &GcRequest<NetConf>, gone: Vec<String>) -> Result<(), Error> {
    let mut stale = spoof::guarded(&req.name)?;
    for attachment in &req.valid {
        stale.remove(&host_veth_name(&req.name, attachment));
    }
    stale.extend(gone);
    spoof::release(&stale.into_iter().collect::<Vec<_>>())
}

#[cfg(test)]
mod tests;
