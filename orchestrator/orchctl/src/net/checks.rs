//! What is wrong with the overlay, from what the nodes show and what etcd says. Pure.
//!
//! [`check`] goes through the nodes one by one and then compares the leases with each other; what a node holds of each
//! other one is looked at in `peers`. A finding says what is
//! wrong, on which node, and which command mends it. What follows from something else that was found is left out: a
//! device that is missing has no routes either.

mod peers;

use std::net::{IpAddr, Ipv4Addr};

use cni_netlink::{Link, MacBytes};
use ipnetwork::IpNetwork;
use serde::Serialize;

use super::firewall::{self, Subject};
use super::leases::{LeaseView, Leases};
use super::view::View;

/// Protocol number that the agent marks its routes with.
const ROUTE_PROTOCOL: u8 = 0x6f;
/// Bytes VXLAN takes from the underlay MTU when the outer header is IPv4 (RFC 7348 §5).
const VXLAN_OVERHEAD_IPV4: u32 = 50;
/// The same when the outer header is IPv6.
const VXLAN_OVERHEAD_IPV6: u32 = 70;
/// First kernel whose VXLAN devices compute inner checksums right whatever the hardware (ea64d8d6c675).
const CHECKSUM_FIXED_IN: (u32, u32) = (5, 7);
/// Agents renew every five minutes; one that is silent for this long does not renew.
const RENEWAL_LATE_SECS: i64 = 20 * 60;
/// Clocks may differ by this much.
const CLOCK_SLACK_SECS: u64 = 60;
/// A table of which so many hundredths are in use is soon full.
const CONNTRACK_FULL_PERCENT: u64 = 90;

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// On which node; `etcd` for what concerns all.
    pub(super) node: String,
    /// Kind, for programs.
    pub(super) check: Check,
    /// What is wrong.
    pub(super) problem: String,
    /// Command that mends it, to be run on the node; empty where it takes a person to decide.
    pub(super) fix: String,
}

/// Kind of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Check {
    /// The agent does not run, or says that something is wrong.
    Agent,
    /// The subnet lease is missing, doubled, not renewed, or etcd is away.
    Lease,
    /// Two leases claim the same.
    DuplicateSubnet,
    /// A clock is wrong.
    Clock,
    /// The link below the overlay.
    Underlay,
    /// The VXLAN device.
    Device,
    /// MTUs that do not fit together.
    Mtu,
    /// Checksums that are computed too early, or wrongly.
    ChecksumOffload,
    /// A route to a node's subnet is missing, or another one takes its place.
    Route,
    /// A neighbour entry is missing, wrong, or left over.
    Neighbour,
    /// A forwarding entry is missing, wrong, or left over.
    Fdb,
    /// The kernel does not forward.
    IpForward,
    /// The kernel drops what comes by another link than the way back.
    RpFilter,
    /// A rule drops overlay or pod traffic.
    Firewall,
    /// The kernel cannot remember more connections.
    Conntrack,
    /// Packets do not arrive.
    Unreachable,
    /// Something could not be looked at.
    Unreadable,
}

impl Check {
    /// Whether this alone explains that no packet arrives over the overlay.
    pub(super) fn explains_silence(self) -> bool {
        matches!(
            self,
            Self::Lease
                | Self::DuplicateSubnet
                | Self::Underlay
                | Self::Device
                | Self::Route
                | Self::Neighbour
                | Self::Fdb
        )
    }
}

/// A MAC as people write it.
pub(super) fn mac_text(mac: &MacBytes) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Everything that is wrong. `leases` is why etcd could not be read, if it could not.
pub(super) fn check(
    views: &[View],
    leases: &Result<Leases, String>,
    now_secs: u64,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    match leases {
        Ok(leases) => check_leases(leases, &mut findings),
        Err(why) => findings.push(Finding {
            node: "etcd".to_owned(),
            check: Check::Lease,
            problem: format!("etcd cannot be read: {why}"),
            fix: String::new(),
        }),
    }
    for view in views {
        let mut node = Node { view, leases: leases.as_ref().ok(), findings: &mut findings };
        node.check(now_secs);
    }
    findings
}

/// Compares the leases with each other.
fn check_leases(leases: &Leases, findings: &mut Vec<Finding>) {
    let mut found = |problem: String, lease: &LeaseView| {
        findings.push(Finding {
            node: "etcd".to_owned(),
            check: Check::DuplicateSubnet,
            problem,
            fix: format!(
                "etcdctl del '{}/subnets/{}'",
                orch_config::ETCD_NETWORK_PREFIX,
                lease.key
            ),
        });
    };
    for (at, lease) in leases.leases.iter().enumerate() {
        if lease.subnet.is_none() && lease.subnet_v6.is_none() {
            found(format!("the key {:?} names no subnet", lease.key), lease);
            continue;
        }
        if let (Some(subnet), Some(network)) = (lease.subnet, leases.network)
            && !(network.contains(subnet.network()) && network.contains(subnet.broadcast()))
        {
            found(format!("the subnet {subnet} is outside the pod network {network}"), lease);
        }
        for other in &leases.leases[..at] {
            // The younger of the two is the one that should not be there.
            let younger = if other.mod_revision > lease.mod_revision { other } else { lease };
            let both = format!("the leases {} and {}", other.key, lease.key);
            if let (Some(a), Some(b)) = (lease.subnet, other.subnet)
                && a.overlaps(b)
            {
                found(format!("{both} overlap: packets for one node go to the other"), younger);
            }
            if let (Some(a), Some(b)) = (lease.subnet_v6, other.subnet_v6)
                && (a.contains(b.network()) || b.contains(a.network()))
            {
                found(format!("{both} overlap: packets for one node go to the other"), younger);
            }
            if lease.public_ip.is_some()
                && lease.public_ip == other.public_ip
                && lease.public_ip != Some(Ipv4Addr::UNSPECIFIED)
                && lease.backend.is_some()
                && other.backend.is_some()
            {
                let ip = lease.public_ip.map(|ip| ip.to_string()).unwrap_or_default();
                found(format!("{both} have one address, {ip}"), younger);
            } else if lease.vtep_mac.is_some() && lease.vtep_mac == other.vtep_mac {
                let mac = lease.vtep_mac.as_deref().unwrap_or_default();
                found(
                    format!(
                        "{both} have one VTEP MAC, {mac}: the kernel drops the packets as a loop"
                    ),
                    younger,
                );
            }
        }
    }
}

/// One node under the eyes of the doctor.
struct Node<'a> {
    view: &'a View,
    leases: Option<&'a Leases>,
    findings: &'a mut Vec<Finding>,
}

impl Node<'_> {
    fn found(&mut self, check: Check, problem: impl Into<String>, fix: impl Into<String>) {
        self.findings.push(Finding {
            node: self.view.node.clone(),
            check,
            problem: problem.into(),
            fix: fix.into(),
        });
    }

    fn check(&mut self, now_secs: u64) {
        self.agent(now_secs);
        for what in self.view.unreadable.clone() {
            self.found(Check::Unreadable, what, "");
        }
        let own = self.own_lease();
        let usable = self.underlay() && self.device(own.as_ref());
        let dual_stack = own.as_ref().is_some_and(|own| own.subnet_v6.is_some());
        self.mtus(dual_stack);
        if usable && let Some(leases) = self.leases {
            self.peers(leases, own.as_ref(), true);
        }
        let without_ipv6 = self.leases.is_some_and(|leases| leases.network_v6.is_some())
            && own.is_some()
            && !dual_stack;
        if without_ipv6 {
            let link = self.view.underlay().map_or("its link", |link| link.name.as_str());
            self.found(
                Check::Underlay,
                format!("the network has IPv6, but this node takes no part in it: {link} had no IPv6 address when the agent started"),
                RESTART,
            );
        }
        if let Some(leases) = self.leases.filter(|_| usable && dual_stack)
            && self.device_v6(leases, own.as_ref())
        {
            self.peers(leases, own.as_ref(), false);
        }
        self.sysctls(dual_stack);
        self.firewall();
        self.conntrack();
        self.packet_sizes();
    }

    fn agent(&mut self, now_secs: u64) {
        let view = self.view;
        if view.agent.is_none() {
            self.found(
                Check::Agent,
                "the agent does not run: the node neither renews its lease nor follows the other nodes",
                RESTART,
            );
        }
        let Some(status) = &view.status else {
            if view.agent.is_some() {
                self.found(Check::Agent, "the agent runs, but has written no status", RESTART);
            }
            return;
        };
        if status.changed_at > now_secs + CLOCK_SLACK_SECS {
            let ahead = status.changed_at - now_secs;
            self.found(
                Check::Clock,
                format!("its status is {ahead} s from the future: the clock was set back, or is wrong here"),
                "timedatectl set-ntp true",
            );
        }
        if view.agent.is_some() {
            if !matches!(status.etcd.as_str(), "" | "healthy" | "unknown") {
                self.found(
                    Check::Lease,
                    format!("the agent does not reach etcd: {}", status.etcd),
                    "",
                );
            }
            for problem in status.problems.iter().chain(&status.big_tcp.problem) {
                self.found(Check::Agent, format!("the agent reports: {problem}"), "");
            }
        }
    }

    fn own_lease(&mut self) -> Option<LeaseView> {
        let (view, leases) = (self.view, self.leases?);
        let address = view.address?;
        let Some(own) = view.lease(leases) else {
            self.found(
                Check::Lease,
                format!("no lease in etcd is for {address}: the other nodes do not know this one"),
                RESTART,
            );
            return None;
        };
        if let (Some(ttl), Some(granted)) = (own.ttl_secs, own.granted_secs)
            && granted - ttl > RENEWAL_LATE_SECS
        {
            let minutes = (granted - ttl) / 60;
            self.found(
                Check::Lease,
                format!(
                    "the lease {} was not renewed for {minutes} min and ends in {} min",
                    own.key,
                    ttl / 60
                ),
                RESTART,
            );
        }
        if let (Some(file), Some(subnet)) = (view.env_subnet, own.subnet)
            && file.network() != subnet.network()
        {
            self.found(
                Check::Lease,
                format!("new pods get addresses of {file}, but the lease is for {subnet}"),
                RESTART,
            );
        }
        Some(own.clone())
    }

    fn underlay(&mut self) -> bool {
        let Some(address) = self.view.address else {
            self.found(Check::Underlay, "the node's address on the underlay is not known", RESTART);
            return false;
        };
        let Some(link) = self.view.underlay() else {
            self.found(
                Check::Underlay,
                format!("no link has the node's address {address}"),
                format!("ip address add {address}/24 dev eth0"),
            );
            return false;
        };
        if !link.up || !link.carrier {
            let name = link.name.clone();
            let what = if link.up { "has no carrier" } else { "is down" };
            let fix = if link.up { String::new() } else { format!("ip link set {name} up") };
            self.found(Check::Underlay, format!("the underlay link {name} {what}"), fix);
            return false;
        }
        true
    }

    /// Whether there is any use in looking at what hangs on the device.
    fn device(&mut self, own: Option<&LeaseView>) -> bool {
        let view = self.view;
        let name = &view.device_name;
        let status = view.status.as_ref().and_then(|status| status.device.as_ref());
        let vni = self.leases.map(|leases| leases.vni).or(status.map(|device| device.vni));
        let port = self.leases.map(|leases| leases.port).or(status.map(|device| device.port));
        let (vni, port) =
            (vni.unwrap_or(orch_config::VXLAN_VNI), port.unwrap_or(orch_config::VXLAN_PORT));
        let mac = own
            .and_then(|own| own.vtep_mac.clone())
            .or_else(|| status.map(|device| device.vtep_mac.clone()));
        let address = view.address.map(|ip| ip.to_string()).unwrap_or_default();
        let underlay = view.underlay().map(|link| link.name.clone()).unwrap_or_default();
        let base = own.and_then(|own| own.subnet).map(|subnet| subnet.network());
        // As the agent would make it; a running agent then adds what is missing.
        let make = format!(
            "ip link add {name} {}type vxlan id {vni} dstport {port} local {address} dev {underlay} nolearning{} && ip link set {name} up",
            mac.as_ref().map(|mac| format!("address {mac} ")).unwrap_or_default(),
            base.map(|base| format!(" && ip address add {base}/32 dev {name}")).unwrap_or_default(),
        );
        let Some(device) = view.device() else {
            self.found(Check::Device, format!("the VXLAN device {name} is missing"), make);
            return false;
        };
        let anew = format!("ip link delete {name} && {make}");
        let Some(vxlan) = view.vxlan() else {
            self.found(Check::Device, format!("{name} is no VXLAN device"), anew);
            return false;
        };
        let mut wrong = Vec::new();
        if vxlan.vni != vni {
            wrong.push(format!("VNI {}, not {vni}", vxlan.vni));
        }
        if vxlan.port != port {
            wrong.push(format!("UDP port {}, not {port}", vxlan.port));
        }
        if vxlan.local != view.address.map(IpAddr::V4) {
            let local = vxlan.local.map_or_else(|| "none".to_owned(), |ip| ip.to_string());
            wrong.push(format!("local address {local}, not {address}"));
        }
        if vxlan.learning {
            wrong.push("learning on: a forged packet can redirect traffic".to_owned());
        }
        if !wrong.is_empty() {
            self.found(Check::Device, format!("{name} has {}", wrong.join(", ")), anew);
            return false;
        }
        let seen = mac_text(&device.mac);
        if let Some(mac) = mac.filter(|mac| *mac != seen) {
            self.found(
                Check::Device,
                format!("{name} has the MAC {seen}, but the other nodes send to {mac}"),
                format!("ip link set {name} address {mac}"),
            );
        }
        let offloads = view.kernel >= CHECKSUM_FIXED_IN;
        if view.tx_checksum == Some(false) && offloads {
            self.found(
                Check::ChecksumOffload,
                format!("TX checksum offload of {name} is off, which also turns segmentation offload off: about a third of the throughput is left"),
                format!("ethtool -K {name} tx on"),
            );
        } else if view.tx_checksum == Some(true) && !offloads {
            let (major, minor) = view.kernel;
            self.found(
                Check::ChecksumOffload,
                format!("Linux {major}.{minor} may send wrong checksums inside VXLAN (fixed in 5.7); connections then stall for a minute"),
                format!("ethtool -K {name} tx-checksum-ip-generic off"),
            );
        }
        if !device.up {
            self.found(
                Check::Device,
                format!("{name} is down; the kernel has dropped its routes and neighbours"),
                format!("ip link set {name} up"),
            );
            return false;
        }
        if let Some(base) = base {
            let has = |(link, found): &(u32, IpNetwork)| {
                *link == device.index && found.ip() == IpAddr::V4(base)
            };
            if !view.addresses.iter().any(has) {
                self.found(
                    Check::Device,
                    format!("{name} lacks the address {base}: nodes that talk to this one's pods get no answer"),
                    format!("ip address add {base}/32 dev {name}"),
                );
            }
        }
        true
    }

    /// The same of the IPv6 device, which is like the other one but for its addresses.
    fn device_v6(&mut self, leases: &Leases, own: Option<&LeaseView>) -> bool {
        let view = self.view;
        let (vni, port) = (leases.vni, leases.port);
        let Some((address, base)) =
            own.and_then(|own| Some((own.public_ip_v6?, own.subnet_v6?.network())))
        else {
            return false;
        };
        let name = view.device_name_of(false);
        let underlay = view.underlay().map(|link| link.name.clone()).unwrap_or_default();
        let mac = own.and_then(|own| own.vtep_mac_of(false));
        let make = format!(
            "ip link add {name} {}type vxlan id {vni} dstport {port} local {address} dev {underlay} nolearning && ip address add {base}/128 dev {name} nodad && ip link set {name} up",
            mac.map(|mac| format!("address {mac} ")).unwrap_or_default(),
        );
        let Some((device, vxlan)) = view.device_of(false).zip(view.vxlan_of(false)) else {
            self.found(Check::Device, format!("the IPv6 VXLAN device {name} is missing"), make);
            return false;
        };
        let right = vxlan.vni == vni
            && vxlan.port == port
            && vxlan.local == Some(IpAddr::V6(address))
            && mac.is_none_or(|mac| mac == mac_text(&device.mac));
        if !right {
            self.found(
                Check::Device,
                format!("{name} has not the VNI {vni}, UDP port {port}, local address {address} and MAC that the other nodes send to"),
                format!("ip link delete {name} && {make}"),
            );
            return false;
        }
        if !device.up {
            self.found(
                Check::Device,
                format!("{name} is down; the kernel has dropped its routes and neighbours"),
                format!("ip link set {name} up"),
            );
            return false;
        }
        true
    }

    fn mtus(&mut self, dual_stack: bool) {
        let view = self.view;
        let (Some(underlay), Some(device)) = (view.underlay(), view.device()) else { return };
        let host_gw = self.leases.is_some_and(|leases| leases.backend == "host-gw");
        let room = underlay.mtu.saturating_sub(VXLAN_OVERHEAD_IPV4);
        let room_v6 = underlay.mtu.saturating_sub(VXLAN_OVERHEAD_IPV6);
        // In dual stack a device may be as small as the one of the other family.
        if device.mtu != room && !(dual_stack && device.mtu == room_v6) {
            let what = if device.mtu > room {
                "large packets are lost"
            } else {
                "packets are smaller than need be"
            };
            self.found(
                Check::Mtu,
                format!(
                    "{} has MTU {}, but {} on {} leaves {room}: {what}",
                    device.name, device.mtu, underlay.mtu, underlay.name
                ),
                format!("ip link set {} mtu {room}", device.name),
            );
        }
        let device_v6 = view.device_of(false).filter(|device| dual_stack && device.mtu != room_v6);
        if let Some(device) = device_v6 {
            self.found(
                Check::Mtu,
                format!(
                    "{} has MTU {}, but {} on {} leaves {room_v6}",
                    device.name, device.mtu, underlay.mtu, underlay.name
                ),
                format!("ip link set {} mtu {room_v6}", device.name),
            );
        }
        // What pods may send.
        let room = match (host_gw, dual_stack) {
            (true, _) => underlay.mtu,
            (false, true) => room_v6,
            (false, false) => room,
        };
        if let Some(mtu) = view.env_mtu.filter(|mtu| *mtu != room) {
            self.found(
                Check::Mtu,
                format!("new pods get MTU {mtu} (subnet.env), but the overlay carries {room}"),
                RESTART,
            );
        }
        let Some(bridge) = view.bridge() else { return };
        let ports = view.links.iter().filter(|link| link.master == Some(bridge.index));
        let large: Vec<&Link> =
            std::iter::once(bridge).chain(ports).filter(|link| link.mtu > room).collect();
        if !large.is_empty() {
            let names: Vec<_> = large.iter().map(|link| link.name.as_str()).collect();
            let fix: Vec<_> =
                names.iter().map(|name| format!("ip link set {name} mtu {room}")).collect();
            self.found(
                Check::Mtu,
                format!("{} have a larger MTU than the overlay's {room}; their pods must be made anew as well", names.join(", ")),
                fix.join(" && "),
            );
        }
    }

    fn sysctls(&mut self, dual_stack: bool) {
        let view = self.view;
        let value = |key: &str| view.sysctls.get(key).map(String::as_str);
        if value("ipv4/ip_forward") == Some("0") {
            self.found(
                Check::IpForward,
                "the kernel does not forward: pods reach nothing outside their bridge",
                "sysctl -w net.ipv4.ip_forward=1",
            );
        }
        if dual_stack && value("ipv6/conf/all/forwarding") == Some("0") {
            self.found(
                Check::IpForward,
                "the kernel does not forward IPv6: IPv6 of pods ends at their bridge",
                "sysctl -w net.ipv6.conf.all.forwarding=1",
            );
        }
        let underlay = view.underlay().map(|link| link.name.clone());
        let mut links: Vec<String> =
            vec![view.device_name.clone(), orch_config::POD_BRIDGE.to_owned()];
        for link in &links {
            if value("ipv4/ip_forward") != Some("0")
                && value(&format!("ipv4/conf/{link}/forwarding")) == Some("0")
            {
                self.found(
                    Check::IpForward,
                    format!("the kernel does not forward what comes from {link}"),
                    format!("sysctl -w net/ipv4/conf/{link}/forwarding=1"),
                );
            }
        }
        links.extend(underlay);
        // The kernel takes the larger of both: strict is 1, loose is 2.
        let all = value("ipv4/conf/all/rp_filter").unwrap_or("0").to_owned();
        let strict: Vec<String> = links
            .iter()
            .filter(|link| {
                let own = value(&format!("ipv4/conf/{link}/rp_filter"));
                own.is_some_and(|own| own.max(all.as_str()) == "1")
            })
            .cloned()
            .collect();
        if !strict.is_empty() {
            self.found(
                Check::RpFilter,
                format!(
                    "rp_filter is strict on {}: what a node sends to a remote pod gets no answer",
                    strict.join(", ")
                ),
                "sysctl -w net.ipv4.conf.all.rp_filter=2",
            );
        }
    }

    fn firewall(&mut self) {
        let view = self.view;
        let subject = Subject {
            port: self.leases.map_or(orch_config::VXLAN_PORT, |leases| leases.port),
            network: self.leases.and_then(|leases| leases.network),
            links: vec![view.device_name.clone(), orch_config::POD_BRIDGE.to_owned()],
        };
        for drop in firewall::drops(&view.nft, &view.iptables, &subject) {
            self.found(
                Check::Firewall,
                format!(
                    "{} are dropped by the {}",
                    drop.what,
                    drop.place.trim_start_matches("the ")
                ),
                drop.fix,
            );
        }
    }

    fn packet_sizes(&mut self) {
        let view = self.view;
        let (Some(device), Some(bridge)) = (view.device(), view.bridge()) else { return };
        let is_way =
            |route: &cni_netlink::Route| route.link == Some(device.index) && route.via.is_some();
        let is_large = |link: &&Link| link.master == Some(bridge.index) && link.sizes.are_large();
        let large = view.links.iter().find(is_large);
        if let Some(link) = large.filter(|_| view.routes.iter().any(is_way)) {
            self.found(
                Check::Device,
                format!(
                    "{} of a pod takes packets larger than 64 KiB, which {} loses",
                    link.name, device.name
                ),
                RESTART,
            );
        }
    }

    fn conntrack(&mut self) {
        let usage = self.view.conntrack.filter(|usage| usage.is_taken(CONNTRACK_FULL_PERCENT));
        let Some(cni_nftables::Usage { flows, limit, dropped }) = usage else { return };
        self.found(
            Check::Conntrack,
            format!(
                "{flows} of {limit} connections are tracked: known ones go on, but each new one through this node is dropped once the table is full ({dropped} packets so far)"
            ),
            format!("{CONNTRACK_LIMIT}{}", limit * 2),
        );
    }
}

/// Begins a fix that is run as it is on every kind of host: the setting is one for all namespaces of a kernel, and only its
/// first one may change it.
pub(super) const CONNTRACK_LIMIT: &str = "sysctl -w net.netfilter.nf_conntrack_max=";

/// Stands for "start the agent again" in [`Finding::fix`]; how that is done differs from host to host.
pub(super) const RESTART: &str = "\u{1}restart";

#[cfg(test)]
mod tests;
