//! The way from the host's loopback to a container.
//!
//! A packet from 127.0.0.1 leaves by no other link than `lo`, unless the link has `route_localnet` set. It is set on the
//! one link that leads to the container, and only for a mapping that the loopback can use.

use std::fs;
use std::io;
use std::net::Ipv4Addr;

use cni_spec::{Error, code};

use crate::conf::Settings;
use crate::forward::Forward;

/// The routes of this namespace's main table.
const ROUTES: &str = "/proc/thread-self/net/route";

/// Sets the switch if one of the forwards needs it.
pub(crate) fn ensure(forwards: &[Forward], settings: &Settings) -> Result<(), Error> {
    if !settings.snat {
        return Ok(());
    }
    let needs = forwards.iter().find_map(|forward| match (forward.to, forward.host_ip) {
        (std::net::IpAddr::V4(to), None) => Some(to),
        (std::net::IpAddr::V4(to), Some(host)) if host.is_loopback() => Some(to),
        _ => None,
    });
    let Some(to) = needs else { return Ok(()) };
    let failed = |verb: &str, path: &str, error: &io::Error| {
        Error::from_chain(code::IO, error).context(format!("{verb} {path}"))
    };
    let routes = fs::read_to_string(ROUTES).map_err(|error| failed("read", ROUTES, &error))?;
    let Some(link) = link_to(&routes, to) else { return Ok(()) };
    let path = format!("/proc/sys/net/ipv4/conf/{link}/route_localnet");
    match fs::read(&path) {
        Ok(now) if now.starts_with(b"1") => Ok(()),
        // The link went; then so does the container.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => fs::write(&path, "1").map_err(|error| failed("write 1 to", &path, &error)),
    }
}

/// The link of the most specific route; the default route does not count, it leads away from this host.
fn link_to(routes: &str, to: Ipv4Addr) -> Option<&str> {
    let hex = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::from_be);
    let mut best: Option<(u32, &str)> = None;
    for line in routes.lines().skip(1) {
        let mut fields = line.split_ascii_whitespace();
        let (Some(link), Some(network)) = (fields.next(), fields.next().and_then(hex)) else {
            continue;
        };
        let Some(mask) = fields.nth(5).and_then(hex) else { continue };
        if mask != 0 && to.to_bits() & mask == network && best.is_none_or(|(found, _)| mask > found)
        {
            best = Some((mask, link));
        }
    }
    best.map(|(_, link)| link)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        wide\t0000580A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
        cni0\t0000580A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn the_most_specific_route_leads_to_the_container() {
        assert_eq!(link_to(TABLE, Ipv4Addr::new(10, 88, 0, 7)), Some("cni0"));
        assert_eq!(link_to(TABLE, Ipv4Addr::new(10, 88, 9, 7)), Some("wide"));
        assert_eq!(link_to(TABLE, Ipv4Addr::new(8, 8, 8, 8)), None);
        assert_eq!(link_to("nonsense\n\n x", Ipv4Addr::LOCALHOST), None);
    }
}
