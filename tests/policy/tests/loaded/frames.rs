//! Random frames through the loaded program at a pod's way out, against a parser that shares nothing with it. `make fuzz`
//! runs many.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use orch_ebpf_loader::{ClassMap, RuleTable};
use orch_ebpf_maps::{
    Action, ClassKey, Direction as Way, Endpoint, ISOLATED_EGRESS, Rule, RuleKey, state,
};
use orch_policy::Direction;
use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use tests_policy::frames::{Sender, link_local};

use super::{Kernel, NEXT};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 7);
/// Reached at some ports, with everything, and not at all.
const SOME: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 7);
const ALL: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 8);
const NONE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 9);
/// The same in IPv6.
const POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 7);
const SOME6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, 7);
const ALL6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, 8);
const NONE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, 9);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// The kernel's map of fragments forgets the oldest; a pod starts anew before that.
const FRAMES_PER_POD: u32 = 2000;
/// The kernel runs nothing shorter than an IP header, which is that of IPv6 if the frame says so.
const SHORTEST: usize = 14 + 20;
const SHORTEST6: usize = 14 + 40;

fn may_reach(to: IpAddr, protocol: u8, port: u16) -> bool {
    let [some, all]: [[IpAddr; 2]; 2] = [[SOME.into(), SOME6.into()], [ALL.into(), ALL6.into()]];
    all.contains(&to)
        || (some.contains(&to) && matches!((protocol, port), (6, 80) | (17, 53) | (132, 9)))
}

/// A frame that is right, or nearly.
fn whole() -> impl Strategy<Value = Vec<u8>> {
    let kind =
        prop_oneof![8 => select(&[0x0800_u16][..]), 1 => select(&[0x0806, 0x8100, 0x88cc][..])];
    let protocol = prop_oneof![6 => select(&[1_u8, 6, 17, 132][..]), 1 => any::<u8>()];
    let position = prop_oneof![4 => select(&[0_u16, 0x4000][..]), 2 => select(&[0x2000_u16, 0x2001, 0x0003][..]), 1 => any::<u16>()];
    let from =
        prop_oneof![9 => select(&[POD][..]), 1 => select(&[SOME, Ipv4Addr::UNSPECIFIED][..])];
    let to = select(&[SOME, SOME, ALL, NONE][..]);
    let ports = (select(&[40_000_u16, 80, 8][..]), select(&[80_u16, 53, 9, 22, 8][..]));
    let icmp = select(&[8_u8, 0, 3, 11, 12, 5][..]);
    let header = (kind, protocol, position, from, to, 0_u16..4);
    (header, ports, icmp, 0_usize..4, any::<bool>()).prop_map(
        |((kind, protocol, position, from, to, id), (source, target), icmp, options, quotes)| {
            let mut frame = vec![2, 0, 0, 0, 0, 1];
            frame.extend(MAC);
            frame.extend(kind.to_be_bytes());
            if kind == 0x0806 {
                frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
                frame.extend(MAC);
                frame.extend(from.octets());
                frame.extend([0; 10]);
                return frame;
            }
            let mut ip = |from: Ipv4Addr, to: Ipv4Addr, position: u16, options: usize| {
                let words = u8::try_from(5 + options).expect("few");
                frame.extend([0x40 | words, 0, 0, 60]);
                frame.extend(id.to_be_bytes());
                frame.extend(position.to_be_bytes());
                frame.extend([64, protocol, 0, 0]);
                frame.extend(from.octets());
                frame.extend(to.octets());
                // Options that end at once.
                frame.resize(frame.len() + 4 * options, 0);
            };
            ip(from, to, position, options);
            if protocol == 1 {
                frame.extend([icmp, 0, 0, 0]);
                frame.extend(source.to_be_bytes());
                frame.extend([0, 0]);
                if quotes {
                    // The answer to something that the pod may have sent.
                    let quoted = select_protocol(id);
                    frame.extend([0x45, 0, 0, 60, 0, 1, 0, 0, 64, quoted, 0, 0]);
                    frame.extend(to.octets());
                    frame.extend(POD.octets());
                    frame.extend(target.to_be_bytes());
                    frame.extend(source.to_be_bytes());
                    frame.extend([0; 4]);
                }
            } else {
                frame.extend(source.to_be_bytes());
                frame.extend(target.to_be_bytes());
                frame.extend([0; 9]);
                frame.push(if quotes { 0x02 } else { 0x10 });
                frame.extend([0; 8]);
            }
            frame
        },
    )
}

fn select_protocol(id: u16) -> u8 {
    [6, 17, 132, 1][usize::from(id) % 4]
}

/// An extension header of a kind and what it says, in front of what comes next.
fn extension() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let fragment =
        (select(&[0_u16, 1, 1, 8, 9, 0x0100][..]), 0_u8..3).prop_map(|(position, id)| {
            let [high, low] = position.to_be_bytes();
            (44, vec![0, high, low, 0, 0, 0, id])
        });
    let other = (
        select(&[0_u8, 60, 60, 43, 51][..]),
        0_u8..3,
        prop_oneof![9 => Just(0_u8), 1 => any::<u8>()],
    )
        .prop_map(|(kind, length, left)| {
            let words = usize::from(length);
            let size = if kind == 51 { (words + 2) * 4 } else { (words + 1) * 8 };
            let mut body = vec![length, 0, if kind == 43 { left } else { 0 }];
            body.resize(size.max(8) - 1, 0);
            (kind, body)
        });
    prop_oneof![1 => fragment, 2 => other]
}

/// The same in IPv6, with what a pod says to its link.
fn whole6() -> impl Strategy<Value = Vec<u8>> {
    let own = link_local(MAC);
    let from = prop_oneof![
        9 => Just(POD6), 2 => Just(own), 1 => Just(Ipv6Addr::UNSPECIFIED), 1 => Just(SOME6)
    ];
    let to = select(&[SOME6, SOME6, ALL6, NONE6, ALL_NODES][..]);
    let extensions = prop_oneof![
        4 => Just(Vec::new()), 3 => vec(extension(), 1..4), 1 => vec(extension(), 5..9)
    ];
    let protocol = prop_oneof![6 => select(&[58_u8, 6, 17, 132][..]), 1 => select(&[1_u8, 59][..])];
    let hops = select(&[64_u8, 255, 255][..]);
    let ports = (select(&[40_000_u16, 80, 128][..]), select(&[80_u16, 53, 9, 22, 128][..]));
    let kind = select(
        &[128_u8, 129, 1, 2, 3, 4, 130, 131, 133, 134, 135, 135, 136, 136, 137, 143, 200][..],
    );
    let target = select(vec![POD6, own, SOME6]);
    let options = vec((select(&[1_u8, 2, 14][..]), 0_u8..3, any::<bool>()), 0..6);
    let link = (kind, target, options);
    ((from, to, extensions, protocol, hops), ports, link, 0_u16..4, any::<bool>()).prop_map(
        |((from, to, extensions, protocol, hops), (source, target_port), link, id, flag)| {
            let (kind, target, options) = link;
            let mut frame = vec![2, 0, 0, 0, 0, 1];
            frame.extend(MAC);
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 60]);
            let next = extensions.iter().map(|(kind, _)| *kind).chain([protocol]);
            let mut next = next.collect::<Vec<u8>>().into_iter();
            frame.push(next.next().expect("at least the protocol"));
            frame.push(hops);
            frame.extend(from.octets());
            frame.extend(to.octets());
            for (_, body) in &extensions {
                frame.push(next.next().expect("as many"));
                frame.extend(body);
            }
            if protocol != 58 {
                frame.extend(source.to_be_bytes());
                frame.extend(target_port.to_be_bytes());
                frame.extend([0; 9]);
                frame.push(if flag { 0x02 } else { 0x10 });
                frame.extend([0; 8]);
                return frame;
            }
            frame.extend([kind, 0, 0, 0]);
            if kind < 130 {
                frame.extend(source.to_be_bytes());
                frame.extend([0, 0]);
                if flag {
                    // The answer to something that the pod may have sent.
                    let quoted = [6, 17, 132, 58][usize::from(id) % 4];
                    frame.extend([0x60, 0, 0, 0, 0, 60, quoted, 64]);
                    frame.extend(to.octets());
                    frame.extend(POD6.octets());
                    frame.extend(target_port.to_be_bytes());
                    frame.extend(source.to_be_bytes());
                    frame.extend([0; 4]);
                }
                return frame;
            }
            frame.extend([0; 4]);
            if kind == 135 || kind == 136 {
                frame.extend(target.octets());
            }
            for (kind, length, is_own) in options {
                frame.extend([kind, length]);
                frame.extend(if is_own { MAC } else { [2, 9, 9, 9, 9, 9] });
                frame.resize(frame.len() + 8 * usize::from(length.saturating_sub(1)), 0);
            }
            frame
        },
    )
}

/// Some of them in a VLAN.
fn either() -> impl Strategy<Value = Vec<u8>> {
    let untagged = prop_oneof![whole(), whole6()];
    (untagged, 0..30_u8).prop_map(|(mut frame, tag)| {
        let tag: &[u8] = match tag {
            0 => &[0x81, 0x00, 0, 5],
            1 => &[0x88, 0xa8, 0, 5, 0x81, 0x00, 0, 6],
            _ => &[],
        };
        frame.splice(12..12, tag.iter().copied());
        frame
    })
}

/// Whole ones, broken ones, and noise.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let whole = either;
    let edits = vec((14_usize..100, any::<u8>()), 1..4);
    let edited = (whole(), edits).prop_map(|(mut frame, edits)| {
        for (place, value) in edits {
            if let Some(byte) = frame.get_mut(place) {
                *byte = value;
            }
        }
        frame
    });
    let cut = (whole(), 14_usize..130).prop_map(|(mut frame, length)| {
        frame.truncate(length);
        frame
    });
    let noise = (vec(any::<u8>(), 14..80), any::<bool>()).prop_map(|(mut frame, is_ipv6)| {
        frame[6..12].copy_from_slice(&MAC);
        if is_ipv6 {
            frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        }
        frame
    });
    prop_oneof![4 => whole(), 3 => edited, 3 => cut, 1 => noise]
}

/// The pod anew: nothing of what it sent is known any more.
fn plug(kernel: &mut Kernel) -> u32 {
    let link = kernel.links[0];
    let number = kernel.next();
    let classes = [
        (ClassKey::host(SOME), 16),
        (ClassKey::host(ALL), 17),
        (ClassKey::host(SOME6), 16),
        (ClassKey::host(ALL6), 17),
    ];
    let classes = ClassMap::build(classes.into_iter()).expect("built");
    let allow = Rule::new(1, Action::Allow);
    let rules = vec![
        (RuleKey::any(16, Way::Egress), Rule::new(2, Action::Deny)),
        (RuleKey::ports(16, Way::Egress, 6, 80, 16), allow),
        (RuleKey::ports(16, Way::Egress, 17, 53, 16), allow),
        (RuleKey::ports(16, Way::Egress, 132, 9, 16), allow),
        (RuleKey::any(17, Way::Egress), allow),
    ];
    let rules = RuleTable::build(rules.into_iter()).expect("built");
    let (class_map, table) = (1, 1);
    kernel.maps.put_class_map(class_map, &classes).expect("put");
    kernel.maps.put_table(table, &rules).expect("put");
    let row = Endpoint {
        uid: number,
        generation: number,
        class_map,
        table,
        addr: POD.to_bits().to_be(),
        addr6: POD6.octets(),
        mac: MAC,
        state: state::READY,
        flags: ISOLATED_EGRESS,
        ..Endpoint::default()
    };
    kernel.maps.insert_endpoint(link, row).expect("inserted");
    link
}

#[test]
fn fuzz_random_frames_are_read_as_by_the_oracle() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("ignored: needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        let mut kernel = Kernel::new();
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::default() });
        let strategy = frame();
        let mut counts = [0_u32; 2];
        // Runs are cheap.
        let total = runner.config().cases.saturating_mul(20);
        let mut link = plug(&mut kernel);
        let mut sender = Sender::new(MAC, POD, POD6, may_reach);
        for place in 1..=total {
            if place % FRAMES_PER_POD == 0 {
                link = plug(&mut kernel);
                sender = Sender::new(MAC, POD, POD6, may_reach);
            }
            // What came before counts, so a frame alone would say little: there is nothing to shrink.
            let tree = strategy.new_tree(&mut runner).expect("a frame");
            let frame = proptest::strategy::ValueTree::current(&tree);
            let is_ipv6 = frame.get(12..14) == Some(&[0x86, 0xdd]);
            if frame.len() < if is_ipv6 { SHORTEST6 } else { SHORTEST } {
                continue;
            }
            let passes = sender.passes(&frame);
            let verdict = kernel.run(Direction::Egress, link, &frame);
            assert_eq!(verdict == NEXT, passes, "frame {place}: {frame:02x?}");
            counts[usize::from(passes)] += 1;
        }
        eprintln!(
            "{} frames passed, {} were dropped, all as the oracle says",
            counts[1], counts[0]
        );
        assert!(
            counts.iter().all(|count| *count > total / 10),
            "frames that say nothing: {counts:?}"
        );
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}
