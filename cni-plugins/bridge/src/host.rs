//! The host's side: bridge, port, gateway.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use cni_netlink::{AddressOptions, Bridge, Link, MacBytes, Neighbour, Netlink, PortVlan, VethPair};
use cni_spec::{Error, IfName, code};
use ipnetwork::IpNetwork;

use crate::conf::{DEFAULT_VLAN, Settings};
use crate::kernel::{KernelError, netlink_error, set_sysctl};
use crate::mac::{FOLLOWING, bridge_mac};
use crate::name::gateway_port_name;
use crate::plan::{AddressStep, BridgeStep, WantBridge, plan_bridge, plan_gateways};

/// How often the bridge is looked at again when another plugin made it, or took it away, in between.
const BRIDGE_TRIES: u32 = 5;
/// How long a port may take to forward. The kernel lets it as soon as it sees that both ends are up, which takes
/// less than a millisecond, or up to a second when many links change at once.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(3);

/// The MAC is only worked out for a bridge that is to be made.
fn want_bridge(settings: &Settings, seen: Option<&Link>) -> WantBridge {
    let name = settings.bridge.as_str();
    let mac = || {
        // Identity of this boot and this namespace; without /proc there is none, and bridges of one name look alike.
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let netns = fs::metadata("/proc/thread-self/ns/net").map_or(0, |meta| meta.ino());
        bridge_mac(name, &format!("{boot}{netns}"))
    };
    let bridge = Bridge {
        name: name.to_owned(),
        mtu: settings.mtu,
        mac: seen.is_none().then(mac),
        group: Some(FOLLOWING),
        vlan_filtering: !settings.vlans.is_empty(),
        up: true,
    };
    WantBridge { bridge, promiscuous: settings.promiscuous }
}

/// Makes the bridge right and returns it.
pub(crate) fn ensure_bridge(netlink: &Netlink, settings: &Settings) -> Result<Link, Error> {
    let name = settings.bridge.as_str();
    for _ in 0..BRIDGE_TRIES {
        let seen = netlink.link(name).map_err(netlink_error)?;
        let want = want_bridge(settings, seen.as_ref());
        let steps = plan_bridge(seen.as_ref(), &want)?;
        match (seen, steps.as_slice()) {
            (Some(seen), []) => return Ok(seen),
            (seen, steps) => {
                match apply_bridge(netlink, seen.map(|seen| seen.index), name, steps) {
                    // Another ADD was first, or a bridge vanished under us: look again.
                    Err(KernelError::Netlink(error))
                        if error.is_exists() || error.is_not_found() => {}
                    Err(KernelError::Netlink(error))
                        if error.is_unsupported() && !settings.vlans.is_empty() =>
                    {
                        let msg =
                            "\"vlan\" and \"vlanTrunk\" need a kernel whose bridges filter VLANs";
                        return Err(Error::from_chain(code::UNSUPPORTED_FIELD, &error).context(msg));
                    }
                    done => done?,
                }
            }
        }
    }
    Err(KernelError::Vanished(name.to_owned()).into())
}

fn apply_bridge(
    netlink: &Netlink,
    seen: Option<u32>,
    name: &str,
    steps: &[BridgeStep],
) -> Result<(), KernelError> {
    let mut index = seen;
    for step in steps {
        if let BridgeStep::Create(bridge) = step {
            index = Some(netlink.create_bridge(bridge)?.index);
            // Addresses of the bridge are ours to give, not a neighbour router's.
            set_sysctl(&format!("net/ipv6/conf/{name}/accept_ra"), "0")?;
            continue;
        }
        let index = index.ok_or_else(|| KernelError::Vanished(name.to_owned()))?;
        match step {
            BridgeStep::Create(_) => {}
            BridgeStep::SetMtu(mtu) => netlink.set_mtu(index, *mtu)?,
            BridgeStep::SetPromiscuous => netlink.set_promiscuous(index, true)?,
            BridgeStep::SetVlanFiltering => netlink.set_vlan_filtering(index, true)?,
            BridgeStep::SetUp => netlink.set_up(index)?,
        }
    }
    Ok(())
}

/// Hairpin mode, isolation and VLANs of the pod's port.
pub(crate) fn set_up_port(
    netlink: &Netlink,
    port: &Link,
    settings: &Settings,
) -> Result<(), KernelError> {
    if settings.hairpin || settings.isolated {
        netlink.set_port(port.index, settings.hairpin, settings.isolated)?;
    }
    set_vlans(netlink, port.index, &settings.vlans, settings.drop_default_vlan)
}

fn set_vlans(
    netlink: &Netlink,
    port: u32,
    vlans: &[PortVlan],
    drop_default: bool,
) -> Result<(), KernelError> {
    for vlan in vlans {
        netlink.add_vlan(port, *vlan)?;
    }
    if drop_default {
        netlink.delete_vlan(port, DEFAULT_VLAN)?;
    }
    Ok(())
}

/// Gives the bridge the gateways' addresses and lets the host forward; returns the index of the link that has them.
pub(crate) fn ensure_gateways(
    netlink: &Netlink,
    bridge: &Link,
    settings: &Settings,
    gateways: &[IpNetwork],
) -> Result<u32, Error> {
    let link = match &settings.gateway_vlan {
        Some((vlan, name)) => ensure_vlan_gateway(netlink, bridge, settings, *vlan, name)?,
        None => bridge.index,
    };
    let seen = netlink.addresses(link).map_err(netlink_error)?;
    for step in plan_gateways(&bridge.name, &seen, gateways, settings.force_address)? {
        let result = match step {
            AddressStep::Delete(address) => netlink.delete_address(link, address),
            AddressStep::Add(address) => {
                let options = AddressOptions { nodad: true, ..AddressOptions::default() };
                netlink.add_address(link, address, &options)
            }
        };
        match result {
            // Another ADD was first.
            Err(error) if error.is_exists() => {}
            other => other.map_err(netlink_error)?,
        }
    }
    if gateways.iter().any(IpNetwork::is_ipv4) {
        set_sysctl("net/ipv4/ip_forward", "1")?;
    }
    if gateways.iter().any(IpNetwork::is_ipv6) {
        set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
    }
    Ok(link)
}

/// The gateway of a VLAN stands behind a port of the bridge, as a pod does: the bridge's own address would be outside
/// of the VLAN.
fn ensure_vlan_gateway(
    netlink: &Netlink,
    bridge: &Link,
    settings: &Settings,
    vlan: u16,
    name: &IfName,
) -> Result<u32, KernelError> {
    let port = gateway_port_name(&bridge.name, vlan);
    let made = netlink.create_veth(&VethPair {
        name: port.clone(),
        peer_name: name.to_string(),
        master: Some(bridge.index),
        mtu: settings.mtu,
        up: true,
        ..VethPair::default()
    });
    let port = match made {
        Err(error) if error.is_exists() => {
            netlink.link(&port)?.ok_or_else(|| KernelError::Vanished(port.clone()))?
        }
        other => other?,
    };
    set_vlans(netlink, port.index, &[PortVlan::access(vlan)], settings.drop_default_vlan)?;
    let gateway =
        netlink.link(name.as_str())?.ok_or_else(|| KernelError::Vanished(name.to_string()))?;
    if !gateway.up {
        netlink.set_up(gateway.index)?;
    }
    Ok(gateway.index)
}

/// The link that has the gateways' addresses, or `None` if it is gone.
pub(crate) fn gateway_link(
    netlink: &Netlink,
    settings: &Settings,
) -> Result<Option<Link>, KernelError> {
    let name =
        settings.gateway_vlan.as_ref().map_or(settings.bridge.as_str(), |(_, name)| name.as_str());
    Ok(netlink.link(name)?)
}

/// Whether a pod with this MAC has to be announced: somebody may know one of its addresses by another MAC. `following`
/// says that its MAC follows from its address; one that does not ends that for the whole bridge.
pub(crate) fn must_announce(
    netlink: &Netlink,
    bridge: &Link,
    following: bool,
    gateway: Option<u32>,
    mac: MacBytes,
    ips: &[IpAddr],
) -> Result<bool, KernelError> {
    // No bridge gets into the group later, so one that was not in it is not.
    if bridge.group != FOLLOWING {
        return Ok(true);
    }
    if !following {
        end_following(netlink, &bridge.name)?;
        return Ok(true);
    }
    // Asked again, now that the addresses are leased: a pod of another kind may have had one of them since.
    let now = netlink.link_at(bridge.index)?;
    Ok(now.is_none_or(|bridge| bridge.group != FOLLOWING)
        || gateway.is_some_and(|link| knows_otherwise(netlink, link, mac, ips)))
}

/// Whether the host knows one of these addresses by another MAC, from a pod that the reference plugin had here.
fn knows_otherwise(netlink: &Netlink, link: u32, mac: MacBytes, ips: &[IpAddr]) -> bool {
    ips.iter().any(|ip| match netlink.neighbour(link, *ip) {
        Ok(known) => known.is_some_and(|known| known.mac != mac),
        // A kernel that does not say.
        Err(_) => true,
    })
}

/// From now on not all MACs of this bridge's pods follow from their addresses.
pub(crate) fn end_following(netlink: &Netlink, bridge: &str) -> Result<(), KernelError> {
    match netlink.link(bridge)? {
        Some(link) if link.group == FOLLOWING => Ok(netlink.set_group(link.index, 0)?),
        _ => Ok(()),
    }
}

/// What the host may remember of addresses: the next pod with one of them may have another MAC.
pub(crate) fn neighbours(link: u32, ips: &[IpAddr]) -> Vec<Neighbour> {
    ips.iter().map(|ip| Neighbour { link, ip: *ip, mac: [0; 6], permanent: false }).collect()
}

/// Makes the host forget neighbours.
pub(crate) fn forget(netlink: &Netlink, neighbours: &[Neighbour]) -> Result<(), KernelError> {
    Ok(neighbours.iter().try_for_each(|neighbour| netlink.delete_neighbour(neighbour))?)
}

/// Waits until the bridge passes frames of a port. A pod that starts to talk before that loses its first packets.
pub(crate) fn wait_for_port(netlink: &Netlink, port: &Link) -> Result<(), KernelError> {
    let deadline = Instant::now() + FORWARD_TIMEOUT;
    let mut pause = Duration::from_micros(500);
    loop {
        let now =
            netlink.link_at(port.index)?.ok_or_else(|| KernelError::Vanished(port.name.clone()))?;
        if now.port.is_some_and(|port| port.forwarding) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(KernelError::Blocked(port.name.clone()));
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
