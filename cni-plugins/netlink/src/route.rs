//! Routes.

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::{IpNetwork, Ipv4Network};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::address::{family_of, parse_ip};
use crate::socket::{attribute, read_u32};
use crate::{Netlink, NetlinkError};

const HEADER_BYTES: usize = 12;
/// Flags are the last field of the header.
const FLAGS_AT: usize = 8;
const TABLE_MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;
/// `RTPROT_STATIC`: made by an administrator or a program that asks for no number of its own.
const PROTOCOL_STATIC: u8 = 4;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
/// Metrics inside `RTA_METRICS` (`linux/rtnetlink.h`).
const METRIC_MTU: u16 = 2;
const METRIC_ADVMSS: u16 = 8;

/// A unicast route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination; prefix length 0 is the default route.
    pub dst: IpNetwork,
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Index of the link.
    pub link: Option<u32>,
    /// The next hop is on the link although no address says so.
    pub onlink: bool,
    /// Who made it (`rtm_protocol`).
    pub protocol: u8,
    /// Table; `None` is the main one.
    pub table: Option<u32>,
    /// Metric; the kernel's default is 0 for IPv4, 1024 for IPv6.
    pub metric: Option<u32>,
    /// Scope; `None` is "link" for an IPv4 route without next hop, "global" else.
    pub scope: Option<u8>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Largest packet.
    pub mtu: Option<u32>,
    /// Largest TCP segment to advertise.
    pub advmss: Option<u32>,
}

impl Default for Route {
    /// The IPv4 default route without next hop, of protocol "static".
    fn default() -> Self {
        let everywhere = Ipv4Network::new(Ipv4Addr::UNSPECIFIED, 0).expect("0 is a prefix length");
        Self {
            dst: IpNetwork::V4(everywhere),
            via: None,
            link: None,
            onlink: false,
            protocol: PROTOCOL_STATIC,
            table: None,
            metric: None,
            scope: None,
            source: None,
            mtu: None,
            advmss: None,
        }
    }
}

/// Which routes are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteFilter {
    /// Only those of this protocol.
    pub protocol: Option<u8>,
    /// Only those that leave by this link.
    pub link: Option<u32>,
    /// Table; `None` is the main one.
    pub table: Option<u32>,
}

impl Netlink {
    /// Unicast routes of both families.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn routes(&self, filter: &RouteFilter) -> Result<Vec<Route>, NetlinkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.kind = RouteType::Unicast;
            message.header.protocol = RouteProtocol::from(filter.protocol.unwrap_or(0));
            message.attributes.extend(filter.link.map(RouteAttribute::Oif));
            let read = |payload: &[u8]| {
                Ok(parse_route(payload, u8::from(family)).filter(|route| matches(filter, route)))
            };
            match self.dump(
                RouteNetlinkMessage::GetRoute(message),
                || "list routes".to_owned(),
                read,
            ) {
                Ok(found) => routes.extend(found),
                // A young namespace has no table yet, a kernel without IPv6 no such family, and what left by a link
                // left with it.
                Err(error) if error.is_not_found() || error.is_unsupported() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(routes)
    }

    /// Adds a route.
    ///
    /// # Errors
    /// [`NetlinkError::is_exists`] if there is one to the same destination.
    pub fn add_route(&self, route: &Route) -> Result<(), NetlinkError> {
        self.put_route(NLM_F_EXCL, "add", route)
    }

    /// Adds a route beside others to the same destination.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn append_route(&self, route: &Route) -> Result<(), NetlinkError> {
        self.put_route(NLM_F_APPEND, "append", route)
    }

    /// Puts a route in the place of the one to the same destination with the same metric, or adds it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn replace_route(&self, route: &Route) -> Result<(), NetlinkError> {
        self.put_route(NLM_F_REPLACE, "replace", route)
    }

    fn put_route(&self, flags: u16, verb: &str, route: &Route) -> Result<(), NetlinkError> {
        self.change(NLM_F_CREATE | flags, put_message(route), || describe(verb, route))
    }

    /// Removes the route with this destination, protocol, table and, where given, next hop, link and metric; one
    /// that is missing is removed already.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_route(&self, route: &Route) -> Result<(), NetlinkError> {
        match self.change(0, delete_message(route), || describe("remove", route)) {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }
}

/// The message that puts a route; flags say how.
pub(crate) fn put_message(route: &Route) -> RouteNetlinkMessage {
    let mut message = message(route);
    let scope = route.scope.unwrap_or(match (route.dst, route.via) {
        (IpNetwork::V4(_), None) => SCOPE_LINK,
        _ => SCOPE_UNIVERSE,
    });
    message.header.scope = RouteScope::from(scope);
    if route.onlink {
        message.header.flags |= RouteFlags::Onlink;
    }
    message
        .attributes
        .extend(route.source.map(|source| RouteAttribute::PrefSource(RouteAddress::from(source))));
    let metrics: Vec<RouteMetric> =
        [route.mtu.map(RouteMetric::Mtu), route.advmss.map(RouteMetric::Advmss)]
            .into_iter()
            .flatten()
            .collect();
    if !metrics.is_empty() {
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    RouteNetlinkMessage::NewRoute(message)
}

/// The message that removes a route.
pub(crate) fn delete_message(route: &Route) -> RouteNetlinkMessage {
    let mut message = message(route);
    message.header.scope = RouteScope::NoWhere;
    RouteNetlinkMessage::DelRoute(message)
}

fn matches(filter: &RouteFilter, route: &Route) -> bool {
    filter.protocol.is_none_or(|protocol| protocol == route.protocol)
        && filter.link.is_none_or(|link| route.link == Some(link))
        && route.table.unwrap_or(TABLE_MAIN) == filter.table.unwrap_or(TABLE_MAIN)
}

pub(crate) fn describe(verb: &str, route: &Route) -> String {
    let mut text = format!("{verb} route to {}", route.dst);
    if let Some(via) = route.via {
        text.push_str(&format!(" via {via}"));
    }
    if let Some(link) = route.link {
        text.push_str(&format!(" by link {link}"));
    }
    text
}

/// What both adding and removing say.
fn message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(route.dst.ip());
    message.header.destination_prefix_length = route.dst.prefix();
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.kind = RouteType::Unicast;
    let table = route.table.unwrap_or(TABLE_MAIN);
    match u8::try_from(table) {
        Ok(table) => message.header.table = table,
        Err(_) => message.attributes.push(RouteAttribute::Table(table)),
    }
    if route.dst.prefix() > 0 {
        message
            .attributes
            .push(RouteAttribute::Destination(RouteAddress::from(route.dst.network())));
    }
    message
        .attributes
        .extend(route.via.map(|via| RouteAttribute::Gateway(RouteAddress::from(via))));
    message.attributes.extend(route.link.map(RouteAttribute::Oif));
    message.attributes.extend(route.metric.map(RouteAttribute::Priority));
    message
}

pub(crate) fn parse_route(payload: &[u8], family: u8) -> Option<Route> {
    let [found, prefix, _, _, table, protocol, scope, kind, ..] =
        *payload.first_chunk::<HEADER_BYTES>()?;
    if found != family || kind != libc::RTN_UNICAST {
        return None;
    }
    let flags = read_u32(payload, FLAGS_AT)?;
    let attributes = &payload[HEADER_BYTES..];
    let ip = |kind: u16| attribute(attributes, kind).and_then(parse_ip);
    let number = |kind: u16| attribute(attributes, kind).and_then(|value| read_u32(value, 0));
    let everywhere = || match i32::from(family) {
        libc::AF_INET => IpAddr::from([0; 4]),
        _ => IpAddr::from([0; 16]),
    };
    let metrics = attribute(attributes, libc::RTA_METRICS).unwrap_or_default();
    let metric_value = |kind: u16| attribute(metrics, kind).and_then(|value| read_u32(value, 0));
    let table = number(libc::RTA_TABLE).unwrap_or(u32::from(table));
    let dst = ip(libc::RTA_DST).unwrap_or_else(everywhere);
    Some(Route {
        dst: IpNetwork::new(dst, prefix)
            .ok()
            .filter(|_| dst.is_ipv4() == everywhere().is_ipv4())?,
        via: ip(libc::RTA_GATEWAY),
        link: number(libc::RTA_OIF),
        onlink: flags & RouteFlags::Onlink.bits() != 0,
        protocol,
        table: (table != TABLE_MAIN).then_some(table),
        metric: number(libc::RTA_PRIORITY),
        scope: Some(scope),
        source: ip(libc::RTA_PREFSRC),
        mtu: metric_value(METRIC_MTU),
        advmss: metric_value(METRIC_ADVMSS),
    })
}
