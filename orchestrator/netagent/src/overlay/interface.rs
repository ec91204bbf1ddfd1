//! Which link carries the overlay: by name, regular expression or address as flannel's `--iface` and `--iface-regex`
//! choose it, else the one with the node's address, else that of the default route.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cni_netlink::{Link, Netlink, Route, RouteFilter};
use ipnetwork::IpNetwork;
use regex::Regex;

use super::kernel::OverlayError;

/// What the operator says about it. Nothing: the link with the node's address.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Names or addresses; the first that fits counts.
    pub names: Vec<String>,
    /// Regular expressions for names or addresses, asked after `names`.
    pub patterns: Vec<Regex>,
}

impl Choice {
    /// Whether the operator said something.
    #[must_use]
    pub fn is_given(&self) -> bool {
        !(self.names.is_empty() && self.patterns.is_empty())
    }
}

/// A link that could carry the overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MTU.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<IpNetwork>,
}

/// The link that carries the overlay's packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MTU.
    pub mtu: u32,
    /// Source of the overlay's packets.
    pub local: Ipv4Addr,
    /// The same for IPv6, if the link has a global address.
    pub local_ipv6: Option<Ipv6Addr>,
    /// Networks whose hosts are on this link.
    pub on_link: Vec<IpNetwork>,
}

impl Candidate {
    fn has(&self, ip: Ipv4Addr) -> bool {
        self.addresses.iter().any(|address| address.ip() == IpAddr::V4(ip))
    }

    fn ipv4(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.addresses.iter().filter_map(|address| match address {
            IpNetwork::V4(address) => Some(address.ip()),
            IpNetwork::V6(_) => None,
        })
    }

    /// `preferred` if the link has it, else its first address.
    fn underlay(&self, preferred: Ipv4Addr) -> Option<Underlay> {
        let first = self.ipv4().find(|ip| !ip.is_link_local());
        let local = if self.has(preferred) { preferred } else { first? };
        Some(Underlay {
            index: self.index,
            name: self.name.clone(),
            mtu: self.mtu,
            local,
            local_ipv6: self.addresses.iter().find_map(|address| match address {
                IpNetwork::V6(address) if !address.ip().is_unicast_link_local() => {
                    Some(address.ip())
                }
                _ => None,
            }),
            on_link: self
                .addresses
                .iter()
                .filter(|address| !matches!(address, IpNetwork::V6(v6) if v6.ip().is_unicast_link_local()))
                .copied()
                .collect(),
        })
    }
}

/// Chooses among the links; `default_link` is that of the default route. Pure.
///
/// # Errors
/// Says what was looked for.
pub fn choose(
    links: &[Candidate],
    default_link: Option<u32>,
    choice: &Choice,
    node_ip: Ipv4Addr,
) -> Result<Underlay, OverlayError> {
    let with = |ip: Ipv4Addr| links.iter().find(|link| link.has(ip));
    for name in &choice.names {
        let (found, preferred) = match name.parse::<Ipv4Addr>() {
            Ok(ip) => (with(ip), ip),
            Err(_) => (links.iter().find(|link| link.name == *name), node_ip),
        };
        if let Some(underlay) = found.and_then(|link| link.underlay(preferred)) {
            return Ok(underlay);
        }
    }
    for pattern in &choice.patterns {
        let by_name = links
            .iter()
            .filter(|link| pattern.is_match(&link.name))
            .find_map(|link| link.underlay(node_ip));
        let by_address = || {
            links.iter().find_map(|link| {
                let fits = |ip: &Ipv4Addr| pattern.is_match(&ip.to_string());
                let ip = link.ipv4().find(fits)?;
                link.underlay(ip)
            })
        };
        if let Some(underlay) = by_name.or_else(by_address) {
            return Ok(underlay);
        }
    }
    if choice.is_given() {
        let patterns = choice.patterns.iter().map(|pattern| format!("/{pattern}/"));
        let wanted: Vec<String> = choice.names.iter().cloned().chain(patterns).collect();
        return Err(OverlayError::NoSuchUnderlay(wanted.join(", ")));
    }
    let by_route = || links.iter().find(|link| Some(link.index) == default_link);
    with(node_ip)
        .or_else(by_route)
        .and_then(|link| link.underlay(node_ip))
        .ok_or(OverlayError::NoUnderlay(node_ip))
}

/// Finds the underlay in the kernel. `own_device` and what pods hang on are never it.
///
/// # Errors
/// If there is none, or the kernel cannot be asked.
pub fn find(
    netlink: &Netlink,
    choice: &Choice,
    node_ip: Ipv4Addr,
    own_device: &str,
) -> Result<Underlay, OverlayError> {
    let failed = |what| move |source| OverlayError::Observe { what, source };
    let mut links = Vec::new();
    let possible = |link: &Link| {
        link.master.is_none()
            && ![own_device, orch_config::POD_BRIDGE].contains(&link.name.as_str())
    };
    for link in netlink.links().map_err(failed("links"))?.into_iter().filter(possible) {
        let addresses = netlink.addresses(link.index).map_err(failed("addresses"))?;
        links.push(Candidate { index: link.index, name: link.name, mtu: link.mtu, addresses });
    }
    let found = choose(&links, None, choice, node_ip);
    if choice.is_given() || found.is_ok() {
        return found;
    }
    // Only now: it reads all routes.
    let routes = netlink.routes(&RouteFilter::default()).map_err(failed("routes"))?;
    let default = |route: &&Route| {
        route.dst.prefix() == 0 && matches!(route.dst.ip(), IpAddr::V4(_)) && route.link.is_some()
    };
    let best = routes.iter().filter(default).min_by_key(|route| route.metric.unwrap_or(0));
    choose(&links, best.and_then(|route| route.link), choice, node_ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links() -> Vec<Candidate> {
        let link = |index, name: &str, addresses: &[&str]| Candidate {
            index,
            name: name.to_owned(),
            mtu: 1500,
            addresses: addresses.iter().map(|text| text.parse().expect("CIDR")).collect(),
        };
        vec![
            link(1, "lo", &["127.0.0.1/8"]),
            link(2, "eth0", &["192.0.2.1/24"]),
            link(3, "eth1", &["198.51.100.1/24", "198.51.100.9/24"]),
            link(4, "wan0", &[]),
        ]
    }

    fn chosen(names: &[&str], patterns: &[&str], default: Option<u32>, node_ip: &str) -> String {
        let choice = Choice {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            patterns: patterns.iter().map(|text| Regex::new(text).expect("regex")).collect(),
        };
        match choose(&links(), default, &choice, node_ip.parse().expect("address")) {
            Ok(underlay) => format!("{} {}", underlay.name, underlay.local),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_node_address_decides_unless_the_operator_does() {
        assert_eq!(chosen(&[], &[], None, "192.0.2.1"), "eth0 192.0.2.1");
        assert_eq!(chosen(&["eth1"], &[], None, "192.0.2.1"), "eth1 198.51.100.1");
        assert_eq!(chosen(&["eth1"], &[], None, "198.51.100.9"), "eth1 198.51.100.9");
        assert_eq!(chosen(&["198.51.100.9"], &[], None, "192.0.2.1"), "eth1 198.51.100.9");
        assert_eq!(chosen(&["eno1", "eth1"], &[], None, "192.0.2.1"), "eth1 198.51.100.1");
        assert_eq!(chosen(&[], &["^eth1$"], None, "192.0.2.1"), "eth1 198.51.100.1");
        assert_eq!(chosen(&[], &[r"^198\.51\.100\.9$"], None, "192.0.2.1"), "eth1 198.51.100.9");
        assert_eq!(chosen(&["eno1"], &["^eth"], None, "192.0.2.1"), "eth0 192.0.2.1");
    }

    #[test]
    fn a_node_whose_address_is_on_no_link_uses_the_default_route() {
        assert_eq!(chosen(&[], &[], Some(3), "203.0.113.5"), "eth1 198.51.100.1");
        assert!(chosen(&[], &[], None, "203.0.113.5").starts_with("no link has the node address"));
        assert!(chosen(&["wan0"], &["^x"], Some(3), "192.0.2.1").contains("wan0, /^x/"));
    }
}
