//! IPv6: the same verdicts as IPv4, and what only IPv6 has: extension headers, neighbour discovery, link-local addresses.

use std::net::Ipv6Addr;

use orch_ebpf_loader::Hook;
use orch_ebpf_maps::{Direction, ISOLATED_EGRESS, ISOLATED_INGRESS, Reason, Rule, RuleKey};

use super::{
    ACK, CLASS, DROP, MAC, MARK_DEFERRED, NEXT, NODE6, OTHER6, POD6, SERVICE6, SYN, TCP, UDP, WIRE,
    World, allow, deny, in_world, web_for_other,
};

const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const OPTIONS: u8 = 60;
const STRANGER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, 8);
/// What follows from [`MAC`].
const OWN_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xff, 0xfe00, 5);
const OTHER_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xff, 0xfe00, 9);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// A packet: extension headers as kind and content without the first byte, then what they carry.
struct Packet {
    src: Ipv6Addr,
    dst: Ipv6Addr,
    hops: u8,
    extensions: Vec<(u8, Vec<u8>)>,
    protocol: u8,
    payload: Vec<u8>,
}

impl Packet {
    fn new(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, payload: Vec<u8>) -> Self {
        Self { src, dst, hops: 64, extensions: vec![], protocol, payload }
    }

    fn behind(mut self, kind: u8, content: &[u8]) -> Self {
        self.extensions.push((kind, content.to_vec()));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1];
        frame.extend(MAC);
        let kinds = self.extensions.iter().map(|(kind, _)| *kind).chain([self.protocol]);
        let mut next = kinds.clone().skip(1);
        let length: usize = self.extensions.iter().map(|(_, content)| content.len() + 1).sum();
        let length = u16::try_from(length + self.payload.len()).expect("small");
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([kinds.clone().next().expect("at least the protocol"), self.hops]);
        frame.extend(self.src.octets());
        frame.extend(self.dst.octets());
        for (_, content) in &self.extensions {
            frame.push(next.next().expect("one more than extensions"));
            frame.extend(content);
        }
        frame.extend(&self.payload);
        frame
    }
}

fn ports(sport: u16, dport: u16, flags: u8) -> Vec<u8> {
    let mut bytes = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
    bytes.extend([0; 8]);
    bytes.extend([0x50, flags]);
    bytes.extend([0; 6]);
    bytes
}

fn tcp(src: Ipv6Addr, sport: u16, dst: Ipv6Addr, dport: u16, flags: u8) -> Packet {
    Packet::new(src, dst, TCP, ports(sport, dport, flags))
}

fn udp(src: Ipv6Addr, sport: u16, dst: Ipv6Addr, dport: u16) -> Packet {
    Packet::new(src, dst, UDP, ports(sport, dport, 0))
}

fn icmp(src: Ipv6Addr, dst: Ipv6Addr, kind: u8, rest: &[u8]) -> Packet {
    let mut payload = vec![kind, 0, 0, 0];
    payload.extend(rest);
    Packet::new(src, dst, ICMPV6, payload)
}

/// Solicitation (135) or advertisement (136) with one MAC in its option.
fn neighbour(kind: u8, src: Ipv6Addr, dst: Ipv6Addr, target: Ipv6Addr, mac: &[u8; 6]) -> Packet {
    let mut rest = vec![0; 4];
    rest.extend(target.octets());
    rest.extend([if kind == 135 { 1 } else { 2 }, 1]);
    rest.extend(mac);
    Packet { hops: 255, ..icmp(src, dst, kind, &rest) }
}

impl World {
    fn sends6(&self, packet: &Packet) -> u32 {
        self.run(Hook::FromPod, &packet.bytes(), 0, 0, self.pod).0
    }

    fn gets6(&self, packet: &Packet) -> u32 {
        self.run(Hook::ToPod, &packet.bytes(), WIRE, 0, self.pod).0
    }

    fn is_closed(&mut self) {
        let none = [Direction::Ingress, Direction::Egress].map(|way| deny(RuleKey::any(0, way)));
        self.enforce(ISOLATED_INGRESS | ISOLATED_EGRESS, &none);
    }
}

#[test]
fn policies_apply_to_ipv6_as_to_ipv4() {
    in_world(|w| {
        let opens = |sport| tcp(OTHER6, sport, POD6, 80, SYN);
        assert_eq!(w.gets6(&opens(1)), DROP, "pending");
        assert_eq!(w.run(Hook::ToPod, &opens(1).bytes(), 0, 0, w.pod).0, NEXT, "born on the node");
        assert_eq!(w.sends6(&tcp(POD6, 80, NODE6, 1000, SYN | ACK)), NEXT, "answers the kubelet");
        w.enforce(0, &[]);
        assert_eq!((w.gets6(&opens(2)), w.sends6(&udp(POD6, 1, STRANGER6, 53))), (NEXT, NEXT));
        w.enforce(ISOLATED_INGRESS | ISOLATED_EGRESS, &web_for_other());
        assert_eq!(w.gets6(&opens(3)), NEXT);
        assert_eq!(w.sends6(&tcp(POD6, 80, OTHER6, 3, SYN | ACK)), NEXT, "answer");
        assert_eq!(w.sends6(&tcp(POD6, 80, OTHER6, 4, ACK)), DROP, "answer to nothing");
        assert_eq!(w.gets6(&tcp(OTHER6, 3, POD6, 81, SYN)), DROP, "another port");
        assert_eq!(w.gets6(&udp(OTHER6, 3, POD6, 80)), DROP, "another protocol");
        assert_eq!(w.gets6(&tcp(STRANGER6, 3, POD6, 80, SYN)), DROP, "another peer");
        w.is_closed();
        assert_eq!(w.sends6(&tcp(POD6, 80, OTHER6, 3, ACK)), DROP);
        assert_eq!(w.count(Direction::Egress, Reason::Revoked), 1);
    });
}

/// A mapped address is not IPv4's, and the first bytes of an IPv6 address are not either.
#[test]
fn no_address_of_one_family_is_taken_for_the_others() {
    in_world(|w| {
        let rules = [
            deny(RuleKey::any(0, Direction::Ingress)),
            allow(RuleKey::any(CLASS, Direction::Ingress)),
        ];
        w.enforce(ISOLATED_INGRESS, &rules);
        let [a, b, c, d] = super::OTHER.octets();
        for lookalike in [
            super::OTHER.to_ipv6_mapped(),
            Ipv6Addr::from([a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ] {
            assert_eq!(w.gets6(&tcp(lookalike, 1, POD6, 80, SYN)), DROP, "{lookalike}");
        }
        assert_eq!(w.gets6(&tcp(OTHER6, 1, POD6, 80, SYN)), NEXT);
    });
}

#[test]
fn ports_are_found_behind_extension_headers_and_nowhere_else() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        let to = |port| tcp(OTHER6, 5, POD6, port, SYN);
        let padding = [0, 1, 4, 0, 0, 0, 0];
        // A routing header that is at its end, 16 bytes of options, an authentication header of 12 bytes.
        let all = |port| {
            to(port)
                .behind(HOP_BY_HOP, &padding)
                .behind(OPTIONS, &[1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
                .behind(ROUTING, &[0, 2, 0, 0, 0, 0, 0])
                .behind(AUTHENTICATION, &[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1])
        };
        assert_eq!((w.gets6(&all(80)), w.gets6(&all(81))), (NEXT, DROP));
        let detour = to(80).behind(ROUTING, &[2, 0, 1, 0, 0, 0, 0]);
        assert_eq!(w.gets6(&detour), DROP, "goes on to somebody else");
        let many = (0..7).fold(to(80), |packet, _| packet.behind(OPTIONS, &padding));
        assert_eq!(w.gets6(&many), DROP, "too many to look behind");
        assert_eq!(w.count(Direction::Ingress, Reason::Extension), 2);
        let six = (0..6).fold(to(80), |packet, _| packet.behind(OPTIONS, &padding));
        assert_eq!(w.gets6(&six), NEXT);
        // Cut anywhere inside of its headers.
        let whole = all(80).bytes();
        for len in 14 + 40..whole.len() - 6 {
            assert_eq!(w.run(Hook::ToPod, &whole[..len], WIRE, 0, w.pod).0, DROP, "{len} bytes");
        }
    });
}

#[test]
fn fragments_follow_their_first_part_and_its_whole_chain_of_headers() {
    in_world(|w| {
        let ingress = Direction::Ingress;
        let dns = allow(RuleKey::ports(0, ingress, UDP, 53, 16));
        w.enforce(ISOLATED_INGRESS, &[deny(RuleKey::any(0, ingress)), dns]);
        let part = |packet: Packet, units: u16, more: bool, id: u8| {
            let [high, low] = (units << 3 | u16::from(more)).to_be_bytes();
            packet.behind(FRAGMENT, &[0, high, low, 0, 0, 0, id])
        };
        let first = |port, id| part(udp(OTHER6, 7, POD6, port), 0, true, id);
        let later = |id| part(Packet::new(OTHER6, POD6, UDP, vec![0xee; 24]), 3, false, id);
        assert_eq!(w.gets6(&later(1)), DROP, "nobody knows its ports");
        assert_eq!((w.gets6(&first(53, 1)), w.gets6(&later(1))), (NEXT, NEXT));
        assert_eq!((w.gets6(&first(54, 2)), w.gets6(&later(2))), (DROP, DROP));
        assert_eq!(w.gets6(&part(udp(OTHER6, 8, POD6, 53), 0, false, 3)), NEXT, "all of it");
        // The kind that a later part names for itself counts for nothing (RFC 8200, section 4.5).
        let liar = Packet { protocol: OPTIONS, ..later(1) };
        assert_eq!(w.gets6(&liar), NEXT);
        // The first part has to have all headers (RFC 7112).
        let short = part(Packet::new(OTHER6, POD6, UDP, vec![0; 2]), 0, true, 4);
        assert_eq!(w.gets6(&short), DROP);
        let twice = part(first(53, 5), 0, true, 5);
        assert_eq!(w.gets6(&twice), DROP);
    });
}

#[test]
fn neighbours_find_each_other_whatever_policies_say() {
    in_world(|w| {
        w.is_closed();
        let solicited = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 1);
        let asks = neighbour(135, POD6, solicited, NODE6, &MAC);
        let answers = neighbour(136, POD6, NODE6, POD6, &MAC);
        let of_link = neighbour(136, OWN_LINK_LOCAL, ALL_NODES, OWN_LINK_LOCAL, &MAC);
        let probes = Packet {
            hops: 255,
            // Of the kernel: without a MAC, with a nonce.
            ..icmp(Ipv6Addr::UNSPECIFIED, solicited, 135, &{
                let mut rest = vec![0; 4];
                rest.extend(POD6.octets());
                rest.extend([14, 1, 1, 2, 3, 4, 5, 6]);
                rest
            })
        };
        let router = Packet { hops: 255, ..icmp(OWN_LINK_LOCAL, ROUTERS, 133, &[0; 4]) };
        let report = Packet { hops: 1, ..icmp(OWN_LINK_LOCAL, ALL_NODES, 143, &[0; 4]) }
            .behind(HOP_BY_HOP, &[0, 5, 2, 0, 0, 1, 0]);
        for (what, packet) in [
            ("asks", asks),
            ("answers", answers),
            ("link-local", of_link),
            ("looks for a duplicate", probes),
            ("asks for routers", router),
            ("joins a group", report),
        ] {
            assert_eq!(w.sends6(&packet), NEXT, "{what}");
        }
        let stranger_asks = neighbour(135, OTHER_LINK_LOCAL, solicited, POD6, &[2, 0, 0, 0, 0, 9]);
        assert_eq!(w.gets6(&stranger_asks), NEXT);
        assert_eq!(w.gets6(&Packet { hops: 254, ..stranger_asks }), DROP, "came over a router");
        let advertisement =
            Packet { hops: 255, ..icmp(OTHER_LINK_LOCAL, ALL_NODES, 134, &[0; 12]) };
        assert_eq!(w.gets6(&advertisement), NEXT, "routers are");
        let query = Packet { hops: 1, ..icmp(OTHER_LINK_LOCAL, ALL_NODES, 130, &[0; 20]) };
        assert_eq!(w.gets6(&query), NEXT);
        assert_eq!(w.gets6(&Packet { src: OTHER6, ..query }), DROP, "routed");
        assert_eq!(w.count(Direction::Egress, Reason::Neighbour), 6);
    });
}

#[test]
fn what_a_pod_is_not_it_cannot_say_to_its_link() {
    in_world(|w| {
        w.enforce(0, &[]);
        let refused = [
            ("claims the gateway", neighbour(136, POD6, ALL_NODES, NODE6, &MAC)),
            (
                "another's link-local address",
                neighbour(136, POD6, ALL_NODES, OTHER_LINK_LOCAL, &MAC),
            ),
            ("another's MAC", neighbour(136, POD6, ALL_NODES, POD6, &[2, 0, 0, 0, 0, 9])),
            (
                "another's MAC in a question",
                neighbour(135, POD6, NODE6, NODE6, &[2, 0, 0, 0, 0, 9]),
            ),
            ("as another", neighbour(135, OTHER6, NODE6, NODE6, &MAC)),
            (
                "probes the gateway's address",
                neighbour(135, Ipv6Addr::UNSPECIFIED, ALL_NODES, NODE6, &MAC),
            ),
            ("is a router", Packet { hops: 255, ..icmp(OWN_LINK_LOCAL, ALL_NODES, 134, &[0; 12]) }),
            (
                "is a router behind options",
                Packet { hops: 255, ..icmp(OWN_LINK_LOCAL, ALL_NODES, 134, &[0; 12]) }
                    .behind(OPTIONS, &[0, 1, 4, 0, 0, 0, 0]),
            ),
            ("redirects", Packet { hops: 255, ..icmp(OWN_LINK_LOCAL, POD6, 137, &[0; 36]) }),
            (
                "queries groups",
                Packet { hops: 1, ..icmp(OWN_LINK_LOCAL, ALL_NODES, 130, &[0; 20]) },
            ),
            ("another's address", tcp(OTHER6, 1, STRANGER6, 1, SYN)),
            ("no address", tcp(Ipv6Addr::UNSPECIFIED, 1, STRANGER6, 1, SYN)),
            ("no address, to the node", tcp(Ipv6Addr::UNSPECIFIED, 1, NODE6, 1, SYN)),
            ("neighbours are no peers", tcp(OWN_LINK_LOCAL, 1, OTHER_LINK_LOCAL, 1, SYN)),
        ];
        let count = refused.len();
        for (what, packet) in refused {
            assert_eq!(w.sends6(&packet), DROP, "{what}");
        }
        assert_eq!(w.count(Direction::Egress, Reason::Spoof), count as u64);
        let cut = Packet { hops: 255, ..icmp(OWN_LINK_LOCAL, ALL_NODES, 134, &[0; 12]) }
            .behind(FRAGMENT, &[0, 0, 1, 0, 0, 0, 9]);
        assert_eq!(w.sends6(&cut), DROP, "in parts");
        assert_eq!(w.sends6(&tcp(OWN_LINK_LOCAL, 80, NODE6, 1, ACK)), NEXT, "to the node");
        assert_eq!(w.gets6(&tcp(OTHER6, 1, STRANGER6, 1, SYN)), DROP, "flooded, for another");
        assert_eq!(w.gets6(&udp(OTHER6, 1, ALL_NODES, 5353)), DROP, "other multicast");
    });
}

#[test]
fn errors_about_known_flows_pass_and_others_do_not() {
    in_world(|w| {
        w.is_closed();
        let opened = tcp(POD6, 3000, OTHER6, 80, SYN);
        let too_big = |quoted: &Packet| {
            let mut rest = vec![0, 0, 5, 0];
            rest.extend(&quoted.bytes()[14..14 + 40 + 8]);
            icmp(NODE6, POD6, 2, &rest)
        };
        assert_eq!(w.gets6(&too_big(&opened)), DROP, "no such flow");
        let egress = Direction::Egress;
        w.enforce(
            ISOLATED_INGRESS | ISOLATED_EGRESS,
            &[deny(RuleKey::any(0, Direction::Ingress)), allow(RuleKey::any(0, egress))],
        );
        assert_eq!(w.sends6(&opened), NEXT);
        assert_eq!(w.gets6(&too_big(&opened)), NEXT, "path MTU");
        assert_eq!(w.gets6(&too_big(&tcp(POD6, 3001, OTHER6, 80, ACK))), DROP);
        assert_eq!(w.count(Direction::Ingress, Reason::Related), 1);
        let echo = |src, dst, kind| icmp(src, dst, kind, &[0, 7, 0, 1]);
        assert_eq!(w.sends6(&echo(POD6, OTHER6, 128)), NEXT);
        assert_eq!(w.gets6(&echo(OTHER6, POD6, 129)), NEXT, "its answer");
        assert_eq!(w.gets6(&echo(OTHER6, POD6, 128)), DROP, "a question of its own");
    });
}

#[test]
fn an_ipv6_service_is_judged_by_its_translated_destination() {
    in_world(|w| {
        let rules: [(RuleKey, Rule); 2] = [
            deny(RuleKey::any(0, Direction::Egress)),
            allow(RuleKey::ports(CLASS, Direction::Egress, TCP, 8080, 16)),
        ];
        w.enforce(ISOLATED_EGRESS, &rules);
        let opens = tcp(POD6, 1000, SERVICE6, 80, SYN).bytes();
        let (verdict, mark) = w.run(Hook::FromPod, &opens, 0, 0, w.pod);
        assert_eq!((verdict, mark & MARK_DEFERRED), (NEXT, MARK_DEFERRED));
        let wire = |packet: Packet| w.run(Hook::ToWire, &packet.bytes(), w.pod, mark, WIRE).0;
        assert_eq!(wire(tcp(POD6, 1000, OTHER6, 8080, SYN)), NEXT);
        assert_eq!(wire(tcp(POD6, 1001, OTHER6, 8081, SYN)), DROP, "another port of the endpoint");
        assert_eq!(wire(tcp(NODE6, 50000, STRANGER6, 8080, SYN)), DROP, "masqueraded");
        assert_eq!(w.gets6(&tcp(SERVICE6, 80, POD6, 1000, SYN | ACK)), NEXT, "the answer");
    });
}
