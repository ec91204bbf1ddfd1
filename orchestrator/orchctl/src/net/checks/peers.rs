//! What a node holds of each other one: route, neighbour and forwarding entry, in one family.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cni_netlink::Route;
use ipnetwork::IpNetwork;

use super::{Check, Node, ROUTE_PROTOCOL, mac_text};
use crate::net::leases::{LeaseView, Leases};

/// Protocol number of routes that the kernel makes itself.
const PROTOCOL_KERNEL: u8 = 2;

impl Node<'_> {
    pub(super) fn peers(&mut self, leases: &Leases, own: Option<&LeaseView>, ipv4: bool) {
        let view = self.view;
        let Some(device) = view.device_of(ipv4) else { return };
        let (name, index) = (device.name.clone(), device.index);
        // A lease without owner, or of a node that speaks something else, is nobody to send to.
        let others: Vec<&LeaseView> = leases
            .leases
            .iter()
            .filter(|lease| own.is_none_or(|own| own.key != lease.key))
            .filter(|lease| lease.is_vxlan(leases.vni) || lease.is_host_gw())
            .filter(|lease| lease.public_ip != view.address)
            .collect();
        let mut bases = BTreeSet::new();
        let mut macs: BTreeMap<&str, IpAddr> = BTreeMap::new();
        let mut subnets: BTreeSet<IpNetwork> = BTreeSet::new();
        for lease in &others {
            let (Some(subnet), Some(node)) = (lease.subnet_of(ipv4), lease.public_ip_of(ipv4))
            else {
                continue;
            };
            subnets.insert(subnet);
            bases.insert(subnet.network());
            let mac = lease.vtep_mac_of(ipv4);
            macs.extend(mac.map(|mac| (mac, node)));
            let tunnel = !lease.is_host_gw() && leases.backend != "host-gw";
            self.peer_routes(subnet, node, tunnel.then_some((name.as_str(), index)));
            if let Some(mac) = mac
                && tunnel
                && !self.is_direct(subnet, node)
            {
                self.peer_entries(subnet, node, mac, &name);
            }
        }
        let of_device = |link: u32, ip: IpAddr| link == index && ip.is_ipv4() == ipv4;
        for neighbour in view.neighbours.iter().filter(|neighbour| neighbour.permanent) {
            let ip = neighbour.ip;
            if of_device(neighbour.link, ip) && !bases.contains(&ip) {
                self.found(
                    Check::Neighbour,
                    format!("the neighbour entry {ip} on {name} belongs to no lease"),
                    format!("ip neighbour delete {ip} dev {name}"),
                );
            }
        }
        for entry in &view.fdb {
            let mac = mac_text(&entry.mac);
            if let Some(dst) = entry.dst
                && of_device(entry.link, dst)
                && !macs.contains_key(mac.as_str())
            {
                self.found(
                    Check::Fdb,
                    format!("the forwarding entry {mac} → {dst} on {name} belongs to no lease"),
                    format!("bridge fdb delete {mac} dev {name} dst {dst} self"),
                );
            }
        }
        let ours = |route: &&Route| route.protocol == ROUTE_PROTOCOL && route.dst.is_ipv4() == ipv4;
        for route in view.routes.iter().filter(ours) {
            let dst = route.dst;
            if !subnets.contains(&dst) {
                self.found(
                    Check::Route,
                    format!("the route to {dst} belongs to no lease"),
                    format!("ip route delete {dst} proto {ROUTE_PROTOCOL}"),
                );
            }
        }
    }

    /// Whether packets to a node go without VXLAN, as `host-gw` and `DirectRouting` have it.
    fn is_direct(&self, subnet: IpNetwork, node: IpAddr) -> bool {
        let direct = |route: &Route| {
            route.dst == subnet && route.protocol == ROUTE_PROTOCOL && route.via == Some(node)
        };
        self.view.routes.iter().any(direct)
    }

    /// `device` is what the route may lead to; without it, only the node itself.
    fn peer_routes(&mut self, subnet: IpNetwork, node: IpAddr, device: Option<(&str, u32)>) {
        let view = self.view;
        let base = subnet.network();
        let index = device.map(|(_, index)| index);
        let right = |route: &Route| {
            route.dst == subnet
                && ((index.is_some() && route.link == index && route.via == Some(base))
                    || route.via == Some(node))
        };
        let put = match device {
            Some((device, _)) => format!(
                "ip route replace {subnet} via {base} dev {device} onlink proto {ROUTE_PROTOCOL}"
            ),
            None => format!("ip route replace {subnet} via {node} proto {ROUTE_PROTOCOL}"),
        };
        if !view.routes.iter().any(right) {
            self.found(
                Check::Route,
                format!("the route to {subnet} ({node}) is missing: packets for its pods are lost"),
                put,
            );
        }
        for route in &view.routes {
            let dst = route.dst;
            let inside = subnet.contains(dst.network()) && dst.prefix() >= subnet.prefix();
            let kernels = route.protocol == PROTOCOL_KERNEL && route.link == index;
            if !inside || right(route) || kernels {
                continue;
            }
            // The same destination with a larger metric takes no packet.
            let shadowed = dst == subnet
                && view.route_to(base).is_some_and(|taken| right(taken) && taken.dst == route.dst);
            if shadowed {
                continue;
            }
            let via = route.via.map(|via| format!(" via {via}")).unwrap_or_default();
            let link = view.name_of(route.link).to_owned();
            self.found(
                Check::Route,
                format!(
                    "a foreign route to {dst}{via} dev {link} takes packets for {node}'s pods away"
                ),
                format!("ip route delete {dst}{via} dev {link}"),
            );
        }
    }

    fn peer_entries(&mut self, subnet: IpNetwork, node: IpAddr, mac: &str, device: &str) {
        let view = self.view;
        let base = subnet.network();
        let put = format!("ip neighbour replace {base} lladdr {mac} dev {device} nud permanent");
        let neighbour = view.neighbours.iter().find(|neighbour| neighbour.ip == base);
        match neighbour {
            None => self.found(
                Check::Neighbour,
                format!("the neighbour entry {base} ({node}) is missing"),
                put,
            ),
            Some(seen) if mac_text(&seen.mac) != mac => self.found(
                Check::Neighbour,
                format!(
                    "the neighbour entry {base} is stale: it has {}, but {node} has {mac}",
                    mac_text(&seen.mac)
                ),
                put,
            ),
            Some(_) => {}
        }
        let entries: Vec<IpAddr> = view
            .fdb
            .iter()
            .filter(|entry| mac_text(&entry.mac) == mac)
            .filter_map(|entry| entry.dst)
            .collect();
        if entries.is_empty() {
            self.found(
                Check::Fdb,
                format!("the forwarding entry {mac} → {node} is missing"),
                format!("bridge fdb replace {mac} dev {device} dst {node} self permanent"),
            );
        }
        for stale in entries.iter().filter(|dst| **dst != node) {
            self.found(
                Check::Fdb,
                format!("the forwarding entry of {mac} is stale: it leads to {stale}, but the node is at {node}"),
                format!(
                    "bridge fdb delete {mac} dev {device} dst {stale} self; bridge fdb replace {mac} dev {device} dst {node} self permanent"
                ),
            );
        }
    }
}
