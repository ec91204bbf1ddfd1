//! CHECK: what ADD answered, compared with what is there.

use cni_netlink::{Link, Netlink, parse_mac};
use cni_skel::CheckRequest;
use cni_spec::{AddResult, Error, Interface, code};
use ipnetwork::IpNetwork;

use crate::conf::{NetConf, Settings};
use crate::kernel::netlink_error;
use crate::name::host_veth_name;
use crate::pod::SeenPod;
use crate::{host, masquerade, open_container, plan, pod, spoof};

fn differs(msg: impl Into<String>) -> Error {
    Error::new(code::CHECK_FAILED, msg)
}

/// Names everything that differs at once.
pub(crate) fn check(req: &CheckRequest<NetConf>, settings: &Settings) -> Result<(), Error> {
    let mut failures = Vec::new();
    let sandbox = req.env.netns.as_str();
    let want =
        container_interface(&req.prev_result, req.ifname.as_str(), sandbox).ok_or_else(|| {
            differs(format!("\"prevResult\" has no interface {} in {sandbox}", req.ifname))
        })?;

    let netns = open_container(&req.netns)?;
    let mut tables: Vec<Option<u32>> =
        req.prev_result.routes.iter().map(|route| route.table).collect();
    tables.push(None);
    tables.sort_unstable();
    tables.dedup();
    match pod::observe(&netns, &req.ifname, &tables)? {
        Some(seen) => failures.extend(compare_pod(&seen, want, &req.prev_result, settings)),
        None => failures.push(differs(format!("the container has no interface {}", req.ifname))),
    }

    let netlink = Netlink::open().map_err(netlink_error)?;
    let bridge = netlink.link(settings.bridge.as_str()).map_err(netlink_error)?;
    let name = host_veth_name(&req.name, &req.attachment());
    let port = netlink.link(&name).map_err(netlink_error)?;
    let vlans = match &port {
        Some(port) if !settings.vlans.is_empty() => {
            netlink.vlans(port.index).map_err(netlink_error)?
        }
        _ => Vec::new(),
    };
    failures.extend(compare_port(bridge.as_ref(), port.as_ref(), &name, settings));
    for vlan in settings.vlans.iter().filter(|vlan| port.is_some() && !vlans.contains(vlan)) {
        failures.push(differs(format!("the port {name} is not in VLAN {}", vlan.id)));
    }

    if settings.gateway {
        let link = host::gateway_link(&netlink, settings)?;
        let seen = match &link {
            Some(link) => netlink.addresses(link.index).map_err(netlink_error)?,
            None => Vec::new(),
        };
        for gateway in plan::gateway_addresses(&req.prev_result.ips) {
            // Its prefix may be wider for a later network on the same bridge.
            if !seen.iter().any(|address| address.ip() == gateway.ip()) {
                failures.push(differs(format!(
                    "the bridge {} does not have the gateway {gateway}",
                    settings.bridge
                )));
            }
        }
    }
    if settings.masquerade {
        for subnet in masquerade::missing(&req.name, &plan::subnets(&req.prev_result.ips))? {
            failures.push(differs(format!("nothing masquerades {subnet}")));
        }
    }
    if settings.check_spoofing && !spoof::is_guarded(&name)? {
        failures.push(differs(format!("the port {name} is not checked for spoofed MACs")));
    }
    Error::join(failures).map_or(Ok(()), Err)
}

fn container_interface<'a>(
    result: &'a AddResult,
    ifname: &str,
    sandbox: &str,
) -> Option<&'a Interface> {
    result
        .interfaces
        .iter()
        .find(|interface| interface.name == ifname && interface.sandbox == sandbox)
}

/// Pure. What the pod has beyond the result may be a later plugin's.
pub(crate) fn compare_pod(
    seen: &SeenPod,
    want: &Interface,
    result: &AddResult,
    settings: &Settings,
) -> Vec<Error> {
    let mut failures = Vec::new();
    let name = &want.name;
    if !settings.keep_down && !seen.link.up {
        failures.push(differs(format!("the interface {name} is down")));
    }
    if parse_mac(&want.mac).is_some_and(|mac| mac != seen.link.mac) {
        failures.push(differs(format!("the interface {name} has another MAC than {}", want.mac)));
    }
    let ours =
        |index: Option<usize>| index.is_none_or(|index| result.interfaces.get(index) == Some(want));
    let missing = |address: &IpNetwork| !seen.addresses.contains(address);
    for ip in result.ips.iter().filter(|ip| ours(ip.interface) && missing(&ip.address)) {
        failures.push(differs(format!(
            "the interface {name} does not have the address {}",
            ip.address
        )));
    }
    for route in plan::missing_routes(&plan::pod_routes(result, seen.link.index), &seen.routes) {
        let via = route.via.map(|via| format!(" via {via}")).unwrap_or_default();
        failures.push(differs(format!("the route to {}{via} is missing", route.dst)));
    }
    failures
}

/// Pure.
pub(crate) fn compare_port(
    bridge: Option<&Link>,
    port: Option<&Link>,
    name: &str,
    settings: &Settings,
) -> Vec<Error> {
    let Some(bridge) = bridge else {
        return vec![differs(format!("the bridge {} is missing", settings.bridge))];
    };
    let Some(port) = port else {
        return vec![differs(format!("the host has no interface {name}"))];
    };
    let mut failures = Vec::new();
    if !bridge.up {
        failures.push(differs(format!("the bridge {} is down", settings.bridge)));
    }
    if port.master != Some(bridge.index) {
        failures.push(differs(format!("{name} is not a port of the bridge {}", settings.bridge)));
    }
    if !port.up {
        failures.push(differs(format!("the port {name} is down")));
    }
    if let Some(state) = &port.port {
        if settings.hairpin && !state.hairpin {
            failures.push(differs(format!("the port {name} is not in hairpin mode")));
        }
        if settings.isolated && !state.isolated {
            failures.push(differs(format!("the port {name} is not isolated")));
        }
    }
    failures
}
