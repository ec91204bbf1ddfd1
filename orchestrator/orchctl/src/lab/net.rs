//! Namespaces and links of the lab: an underlay bridge in a namespace of its own, one leg per host, and one for
//! the machine itself so that `kubectl` and `curl NODE:PORT` work from the shell.
//!
//! The bridge stands in its own namespace because in the machine's a Docker or firewall rule set would see the
//! nodes' frames (`bridge-nf-call-iptables`).

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use cni_netlink::{AddressOptions, Bridge, NetNs, Netlink, PacketSizes, Route, VethPair};
use ipnetwork::{IpNetwork, Ipv4Network};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::layout::Lab;
use crate::output;

pub(super) const UNDERLAY: &str = "underlay";
const UNDERLAY_BRIDGE: &str = "br0";
/// Name of the leg inside a host.
const UPLINK: &str = "eth0";
/// Ethernet's usual MTU, so that the overlay's is 1450 as on real hosts.
const UNDERLAY_MTU: u32 = 1500;

/// Whether the underlay's addresses are free on this machine, or the lab's own.
pub(crate) fn check_underlay(lab: &Lab) -> anyhow::Result<()> {
    let host = Netlink::open()?;
    for link in host.links()?.into_iter().filter(|link| link.name != lab.host_link()) {
        for taken in host.addresses(link.index)? {
            if let IpNetwork::V4(taken) = taken
                && taken.prefix() > 0
                && taken.overlaps(lab.config.underlay)
            {
                return Err(output::hinted(
                    "choose another network with --underlay",
                    format!(
                        "the underlay {} overlaps {taken} on {}",
                        lab.config.underlay, link.name
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Makes the underlay namespace with its bridge and the machine's own leg.
pub(crate) fn ensure_underlay(lab: &Lab) -> anyhow::Result<()> {
    let netns = ensure_netns(lab, UNDERLAY)?;
    netns
        .run(|| -> anyhow::Result<()> {
            let netlink = Netlink::open()?;
            set_up(&netlink, "lo")?;
            if netlink.link(UNDERLAY_BRIDGE)?.is_none() {
                netlink.create_bridge(&Bridge {
                    name: UNDERLAY_BRIDGE.to_owned(),
                    mtu: Some(UNDERLAY_MTU),
                    ..Bridge::default()
                })?;
            }
            set_up(&netlink, UNDERLAY_BRIDGE)?;
            take_large_packets(&netlink, UNDERLAY_BRIDGE)?;
            // Absent where br_netfilter is not loaded: then bridged frames meet no rules anyway.
            let _ = fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
            Ok(())
        })
        .context("set up the underlay")?;
    let address = network(lab.address("host")?, lab.config.underlay)?;
    let own = NetNs::current()?;
    attach(lab, &netns, &own, "host", &lab.host_link(), address, None)
}

/// A host whose namespace is made here: the server.
pub(crate) fn ensure_plain_host(lab: &Lab, host: &str) -> anyhow::Result<()> {
    let netns = ensure_netns(lab, host)?;
    ensure_leg(lab, host, &netns)
}

/// A host whose namespace is that of its anchor container.
pub(crate) fn ensure_anchored_host(lab: &Lab, node: &str, anchor_pid: i64) -> anyhow::Result<()> {
    let source = format!("/proc/{anchor_pid}/ns/net");
    let target = lab.netns(node);
    let same = |a: &Path, b: &Path| -> Option<bool> {
        use std::os::unix::fs::MetadataExt as _;
        let (a, b) = (a.metadata().ok()?, b.metadata().ok()?);
        Some(a.ino() == b.ino() && a.dev() == b.dev())
    };
    if same(Path::new(&source), &target) != Some(true) {
        unpin(&target)?;
        pin(Path::new(&source), &target)?;
    }
    let netns = NetNs::open(&target)?;
    ensure_leg(lab, node, &netns)
}

fn ensure_leg(lab: &Lab, host: &str, netns: &NetNs) -> anyhow::Result<()> {
    let underlay = NetNs::open(lab.netns(UNDERLAY))?;
    let address = network(lab.address(host)?, lab.config.underlay)?;
    attach(lab, &underlay, netns, host, UPLINK, address, Some(lab.address("host")?))
}

/// Joins `netns` to the underlay bridge with a veth pair: `link` there, `v-<host>` on the bridge.
fn attach(
    lab: &Lab,
    underlay: &NetNs,
    netns: &NetNs,
    host: &str,
    link: &str,
    address: Ipv4Network,
    gateway: Option<Ipv4Addr>,
) -> anyhow::Result<()> {
    let there = Netlink::open_in(netns)?;
    if there.link(link)?.is_none() {
        let here = Netlink::open_in(underlay)?;
        let port = port_name(host);
        if let Some(stale) = here.link(&port)? {
            here.delete_link(stale.index)?;
        }
        let bridge =
            here.link(UNDERLAY_BRIDGE)?.ok_or_else(|| anyhow!("the underlay has no bridge"))?;
        here.create_veth(&VethPair {
            name: port.clone(),
            peer_name: link.to_owned(),
            peer_netns: Some(netns.as_fd()),
            master: Some(bridge.index),
            mtu: Some(UNDERLAY_MTU),
            ..VethPair::default()
        })
        .with_context(|| format!("join {host} to the underlay"))?;
        set_up(&here, &port)?;
        take_large_packets(&here, &port)?;
        take_large_packets(&there, link)?;
    }
    set_up(&there, "lo")?;
    let index = set_up(&there, link)?;
    if !there.addresses(index)?.contains(&IpNetwork::V4(address)) {
        there.add_address(index, IpNetwork::V4(address), &AddressOptions::default())?;
    }
    if let Some(gateway) = gateway {
        there
            .replace_route(&Route {
                dst: "0.0.0.0/0".parse().context("default route")?,
                via: Some(IpAddr::V4(gateway)),
                link: Some(index),
                ..Route::default()
            })
            .with_context(|| format!("default route of {host} in {}", lab.dir.display()))?;
    }
    Ok(())
}

/// Nodes that reach each other directly then have BIG TCP. A kernel before 6.3 knows no such sizes.
fn take_large_packets(netlink: &Netlink, name: &str) -> anyhow::Result<()> {
    let link = netlink.link(name)?.with_context(|| format!("there is no link {name}"))?;
    if link.sizes.limit < PacketSizes::LARGEST || !link.sizes.fall_short_of(PacketSizes::LARGEST) {
        return Ok(());
    }
    netlink
        .set_packet_sizes(link.index, PacketSizes::LARGEST)
        .with_context(|| format!("set packet sizes of {name}"))
}

/// Cuts a host off from the underlay, or joins it again.
pub(crate) fn set_partitioned(lab: &Lab, host: &str, partitioned: bool) -> anyhow::Result<()> {
    lab.address(host)?;
    let underlay = Netlink::open_in(&NetNs::open(lab.netns(UNDERLAY))?)?;
    let port = underlay.link(&port_name(host))?.with_context(|| format!("{host} is down"))?;
    if partitioned {
        underlay.set_down(port.index)?
    } else {
        underlay.set_up(port.index)?
    }
    Ok(())
}

/// Removes a host's namespace and its leg.
pub(crate) fn remove_host(lab: &Lab, host: &str) -> anyhow::Result<()> {
    unpin(&lab.netns(host))?;
    let underlay = Netlink::open_in(&NetNs::open(lab.netns(UNDERLAY))?)?;
    if let Some(port) = underlay.link(&port_name(host))? {
        underlay.delete_link(port.index)?;
    }
    Ok(())
}

/// Removes all namespaces and links of the lab, whatever hosts they belong to.
pub(crate) fn remove(lab: &Lab) -> anyhow::Result<()> {
    let folder = lab.run().join("netns");
    let pinned = match fs::read_dir(&folder) {
        Ok(entries) => entries
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("read {}", folder.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("read {}", folder.display())),
    };
    for entry in pinned {
        unpin(&entry.path())?;
    }
    let host = Netlink::open()?;
    if let Some(link) = host.link(&lab.host_link())? {
        host.delete_link(link.index)?;
    }
    Ok(())
}

fn port_name(host: &str) -> String {
    format!("v-{host}")
}

fn network(address: Ipv4Addr, underlay: Ipv4Network) -> anyhow::Result<Ipv4Network> {
    Ipv4Network::new(address, underlay.prefix()).context("underlay address")
}

fn set_up(netlink: &Netlink, name: &str) -> anyhow::Result<u32> {
    let link = netlink.link(name)?.with_context(|| format!("there is no link {name}"))?;
    if !link.up {
        netlink.set_up(link.index)?;
    }
    Ok(link.index)
}

/// The namespace pinned under the lab's folder; a new one is made by a thread that moves into it.
fn ensure_netns(lab: &Lab, name: &str) -> anyhow::Result<NetNs> {
    let target = lab.netns(name);
    if !NetNs::is_nsfs(&target) {
        unpin(&target)?;
        let pinned = target.clone();
        std::thread::spawn(move || -> anyhow::Result<()> {
            unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
            pin(Path::new("/proc/thread-self/ns/net"), &pinned)
        })
        .join()
        .map_err(|_| anyhow!("the thread that makes namespaces panicked"))??;
    }
    NetNs::open(&target).with_context(|| format!("open {}", target.display()))
}

fn pin(source: &Path, target: &Path) -> anyhow::Result<()> {
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    fs::File::create(target).with_context(|| format!("create {}", target.display()))?;
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("pin {} at {}", source.display(), target.display()))
}

fn unpin(target: &Path) -> anyhow::Result<()> {
    while NetNs::is_nsfs(target) {
        umount2(target, MntFlags::MNT_DETACH)
            .with_context(|| format!("unpin {}", target.display()))?;
    }
    match fs::remove_file(target) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", target.display()))
        }
        _ => Ok(()),
    }
}
