//! From query to answer. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr as _;

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use super::zone::{Backend, Domain, PortRecord, Records, Zone};

/// TTL of our records, CoreDNS's: endpoints come and go.
const TTL: u32 = 5;
/// Version of the specification that `dns-version` names.
const SPECIFICATION: &str = "1.1.0";
/// Largest UDP payload that we announce and send: what passes every path without fragments (DNS flag day 2020).
pub const MAX_UDP_PAYLOAD: u16 = 1232;
/// Largest UDP payload for a client without EDNS (RFC 1035 §4.2.1).
const MIN_UDP_PAYLOAD: u16 = 512;
/// Aliases followed inside the zone before we suspect a circle.
const MAX_ALIASES: usize = 8;

/// What to do with a query.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// This is the answer.
    Done(Message),
    /// Not our name: ask outside.
    Forward,
    /// The answer so far is an alias for a name outside; its records belong behind it.
    Chase(Message, Name),
}

/// Answers `query`; without a zone (nothing is known yet) names of the cluster fail instead of being denied.
#[must_use]
pub fn answer(query: &Message, domain: &Domain, zone: Option<&Zone>) -> Outcome {
    let mut response = response_to(query);
    if query.metadata.op_code != OpCode::Query {
        return done(response, ResponseCode::NotImp);
    }
    if query.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
        return done(response, ResponseCode::BADVERS);
    }
    let [question] = query.queries.as_slice() else { return done(response, ResponseCode::FormErr) };
    if !matches!(question.query_class(), DNSClass::IN | DNSClass::ANY) {
        return done(response, ResponseCode::Refused);
    }
    let Ok(apex) = Name::from_str(&format!("{}.", domain.name)) else {
        return done(response, ResponseCode::ServFail);
    };
    let mut name = question.name().clone();
    if let Some(outcome) = reverse(&name, question.query_type(), domain, zone, &response, &apex) {
        return outcome;
    }
    if !apex.zone_of(&name) {
        return Outcome::Forward;
    }
    let Some(zone) = zone else { return done(response, ResponseCode::ServFail) };
    response.metadata.authoritative = true;
    for _ in 0..MAX_ALIASES {
        match lookup(&name, question.query_type(), domain, zone, &apex) {
            Found::Nothing if response.answers.is_empty() => {
                response.add_authority(soa(&apex));
                return done(response, ResponseCode::NXDomain);
            }
            Found::Nothing => return done(response, ResponseCode::NXDomain),
            Found::Records { answers, additionals } => {
                if answers.is_empty() {
                    response.add_authority(soa(&apex));
                }
                response.add_answers(answers);
                response.add_additionals(additionals);
                return done(response, ResponseCode::NoError);
            }
            Found::Alias(target) => {
                response.add_answer(Record::from_rdata(
                    name.clone(),
                    TTL,
                    RData::CNAME(CNAME(target.clone())),
                ));
                if question.query_type() == RecordType::CNAME {
                    return done(response, ResponseCode::NoError);
                }
                if !apex.zone_of(&target) {
                    return Outcome::Chase(response, target);
                }
                name = target;
            }
        }
    }
    done(response, ResponseCode::ServFail)
}

/// An empty answer that belongs to `query`.
#[must_use]
pub fn response_to(query: &Message) -> Message {
    let mut response =
        Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
    response.metadata = Metadata::response_from_request(&query.metadata);
    response.metadata.recursion_available = true;
    response.add_queries(query.queries.iter().cloned());
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP_PAYLOAD).set_version(0);
        response.set_edns(edns);
    }
    response
}

/// The bytes of an answer, at most as long as the client takes; what does not fit goes, and TC says so.
#[must_use]
pub fn encode(response: &Message, query: &Message, over_tcp: bool) -> Option<Vec<u8>> {
    let bytes = response.to_vec().ok()?;
    let announced = query.edns.as_ref().map_or(MIN_UDP_PAYLOAD, Edns::max_payload);
    let limit = if over_tcp { u16::MAX } else { announced.clamp(MIN_UDP_PAYLOAD, MAX_UDP_PAYLOAD) };
    if bytes.len() <= usize::from(limit) { Some(bytes) } else { response.truncate().to_vec().ok() }
}

fn done(mut response: Message, code: ResponseCode) -> Outcome {
    response.metadata.response_code = code;
    if let Some(edns) = &mut response.edns {
        edns.set_rcode_high(code.high());
    }
    Outcome::Done(response)
}

enum Found {
    /// The name does not exist.
    Nothing,
    /// It exists; there may be no record of the type.
    Records { answers: Vec<Record>, additionals: Vec<Record> },
    /// It is another name.
    Alias(Name),
}

fn records(answers: Vec<Record>) -> Found {
    Found::Records { answers, additionals: Vec::new() }
}

fn lookup(name: &Name, kind: RecordType, domain: &Domain, zone: &Zone, apex: &Name) -> Found {
    let lower = name.to_lowercase();
    let below = usize::from(name.num_labels() - apex.num_labels());
    let Ok(labels) =
        lower.iter().take(below).map(std::str::from_utf8).collect::<Result<Vec<&str>, _>>()
    else {
        return Found::Nothing;
    };
    let wants = |one: RecordType| kind == one || kind == RecordType::ANY;
    let one = |wanted: RecordType, data: RData| {
        let answer = wants(wanted).then(|| Record::from_rdata(name.clone(), TTL, data));
        records(answer.into_iter().collect())
    };
    let existing = |exists: bool| if exists { records(Vec::new()) } else { Found::Nothing };
    match labels.as_slice() {
        [] => {
            let mut answers = Vec::new();
            if wants(RecordType::SOA) {
                answers.push(soa(apex));
            }
            if wants(RecordType::NS) {
                answers
                    .extend(name_server(apex).map(|server| {
                        Record::from_rdata(name.clone(), TTL, RData::NS(NS(server)))
                    }));
            }
            records(answers)
        }
        ["dns-version"] => {
            one(RecordType::TXT, RData::TXT(TXT::new(vec![SPECIFICATION.to_owned()])))
        }
        ["ns", "dns"] => records(addresses(name, &wants, &mut domain.dns_ips.iter().copied())),
        ["svc" | "pod" | "dns"] => records(Vec::new()),
        [namespace, "svc" | "pod"] => existing(zone.namespaces.contains(*namespace)),
        [address, namespace, "pod"] => match pod_address(address) {
            Some(ip) if zone.namespaces.contains(*namespace) => {
                records(addresses(name, &wants, &mut [ip].into_iter()))
            }
            _ => Found::Nothing,
        },
        [rest @ .., service, namespace, "svc"] => {
            match zone.services.get(&((*namespace).to_owned(), (*service).to_owned())) {
                Some(found) => in_service(
                    name,
                    rest,
                    found,
                    &wants,
                    &name.trim_to(usize::from(apex.num_labels()) + 3),
                ),
                None => Found::Nothing,
            }
        }
        _ => Found::Nothing,
    }
}

/// The address that a pod's name is made of: dots or colons became dashes.
fn pod_address(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_| label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)).ok()
}

/// A and AAAA records, as far as they are wanted.
fn addresses(
    name: &Name,
    wants: &dyn Fn(RecordType) -> bool,
    ips: &mut dyn Iterator<Item = IpAddr>,
) -> Vec<Record> {
    ips.map(data)
        .filter(|data| wants(data.record_type()))
        .map(|data| Record::from_rdata(name.clone(), TTL, data))
        .collect()
}

fn data(ip: IpAddr) -> RData {
    match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    }
}

/// Names at and below one Service; `base` is the Service's own.
fn in_service(
    name: &Name,
    labels: &[&str],
    found: &Records,
    wants: &dyn Fn(RecordType) -> bool,
    base: &Name,
) -> Found {
    let at = |ips: &mut dyn Iterator<Item = IpAddr>| records(addresses(name, wants, ips));
    match (labels, found) {
        ([], Records::External(target)) => {
            match Name::from_str(&format!("{}.", target.trim_end_matches('.'))) {
                Ok(target) => Found::Alias(target),
                Err(_) => records(Vec::new()),
            }
        }
        (_, Records::External(_)) => Found::Nothing,
        ([], Records::Cluster(ips, _)) => at(&mut ips.iter().copied()),
        // Specification 2.4.1: no ready endpoint, no name.
        ([], Records::Headless(backends)) if backends.is_empty() => Found::Nothing,
        ([], Records::Headless(backends)) => at(&mut backends.iter().map(|backend| backend.ip)),
        ([protocol], _) if protocol.starts_with('_') => {
            let any = all_ports(found).any(|(port, _)| format!("_{}", port.protocol) == *protocol);
            if any { records(Vec::new()) } else { Found::Nothing }
        }
        ([hostname], Records::Headless(backends)) => {
            let mut ips = backends
                .iter()
                .filter(|backend| backend.hostname == *hostname)
                .map(|backend| backend.ip);
            let found: Vec<IpAddr> = ips.by_ref().collect();
            if found.is_empty() { Found::Nothing } else { at(&mut found.into_iter()) }
        }
        ([port_name, protocol], _) => {
            let matching: Vec<_> = all_ports(found)
                .filter(|(port, _)| {
                    format!("_{}", port.name) == *port_name
                        && format!("_{}", port.protocol) == *protocol
                })
                .collect();
            if matching.is_empty() {
                return Found::Nothing;
            }
            if !wants(RecordType::SRV) {
                return records(Vec::new());
            }
            services(name, &matching, found, base)
        }
        _ => Found::Nothing,
    }
}

/// Every named port, with its endpoint if the Service is headless.
fn all_ports(found: &Records) -> Box<dyn Iterator<Item = (&PortRecord, Option<&Backend>)> + '_> {
    match found {
        Records::Cluster(_, ports) => Box::new(ports.iter().map(|port| (port, None))),
        Records::Headless(backends) => Box::new(
            backends
                .iter()
                .flat_map(|backend| backend.ports.iter().map(move |port| (port, Some(backend)))),
        ),
        Records::External(_) => Box::new(std::iter::empty()),
    }
}

/// SRV records with the addresses of their targets.
fn services(
    name: &Name,
    matching: &[(&PortRecord, Option<&Backend>)],
    found: &Records,
    base: &Name,
) -> Found {
    let mut answers = Vec::new();
    let mut additionals = Vec::new();
    for (port, backend) in matching {
        let (target, ips) = match (backend, found) {
            (Some(backend), _) => match base.prepend_label(backend.hostname.as_str()) {
                Ok(target) => (target, vec![backend.ip]),
                Err(_) => continue,
            },
            (None, Records::Cluster(ips, _)) => (base.clone(), ips.clone()),
            (None, _) => continue,
        };
        additionals
            .extend(ips.into_iter().map(|ip| Record::from_rdata(target.clone(), TTL, data(ip))));
        let weight = u16::try_from(100 / matching.len().max(1)).unwrap_or(1).max(1);
        answers.push(Record::from_rdata(
            name.clone(),
            TTL,
            RData::SRV(SRV::new(0, weight, port.port, target)),
        ));
    }
    Found::Records { answers, additionals }
}

/// PTR queries for addresses that the zone knows, or that nobody else can know.
fn reverse(
    name: &Name,
    kind: RecordType,
    domain: &Domain,
    zone: Option<&Zone>,
    response: &Message,
    apex: &Name,
) -> Option<Outcome> {
    let ip = match name.parse_arpa_name().ok()? {
        network if network.prefix_len() == network.max_prefix_len() => network.addr(),
        _ => return None,
    };
    let mut response = response.clone();
    let names = zone.and_then(|zone| zone.reverse.get(&ip));
    let ours = domain.networks.iter().any(|network| network.contains(ip));
    match names {
        Some(names) => {
            response.metadata.authoritative = true;
            if matches!(kind, RecordType::PTR | RecordType::ANY) {
                response.add_answers(names.iter().filter_map(|target| {
                    let target = Name::from_str(&format!("{target}.{}.", domain.name)).ok()?;
                    Some(Record::from_rdata(name.clone(), TTL, RData::PTR(PTR(target))))
                }));
            }
            Some(done(response, ResponseCode::NoError))
        }
        None if ours && zone.is_some() => {
            response.metadata.authoritative = true;
            response.add_authority(soa(apex));
            Some(done(response, ResponseCode::NXDomain))
        }
        None if ours => Some(done(response, ResponseCode::ServFail)),
        None => None,
    }
}

fn name_server(apex: &Name) -> Option<Name> {
    apex.prepend_label("dns").ok()?.prepend_label("ns").ok()
}

/// Says for how long a denial may be kept (RFC 2308): as long as an answer.
fn soa(apex: &Name) -> Record {
    let server = name_server(apex).unwrap_or_else(|| apex.clone());
    let contact = apex.prepend_label("hostmaster").unwrap_or_else(|_| apex.clone());
    Record::from_rdata(
        apex.clone(),
        TTL,
        RData::SOA(SOA::new(server, contact, 1, 7200, 1800, 86400, TTL)),
    )
}

#[cfg(test)]
mod tests;
