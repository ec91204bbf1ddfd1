//! Random frames through the loaded program at a pod's way out, against a parser that shares nothing with it. `make fuzz`
//! runs many.

use std::net::Ipv4Addr;

use orch_ebpf_loader::{ClassMap, RuleTable};
use orch_ebpf_maps::{
    Action, ClassKey, Direction as Way, Endpoint, ISOLATED_EGRESS, Rule, RuleKey, state,
};
use orch_policy::Direction;
use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use tests_policy::frames::Sender;

use super::{Kernel, NEXT};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 7);
/// Reached at some ports, with everything, and not at all.
const SOME: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 7);
const ALL: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 8);
const NONE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 9);
/// The kernel's map of fragments forgets the oldest; a pod starts anew before that.
const FRAMES_PER_POD: u32 = 2000;
/// The kernel runs nothing shorter than an IP header.
const SHORTEST: usize = 14 + 20;

fn may_reach(to: Ipv4Addr, protocol: u8, port: u16) -> bool {
    to == ALL || (to == SOME && matches!((protocol, port), (6, 80) | (17, 53) | (132, 9)))
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

/// Whole ones, broken ones, and noise.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let edits = vec((14_usize..60, any::<u8>()), 1..4);
    let edited = (whole(), edits).prop_map(|(mut frame, edits)| {
        for (place, value) in edits {
            if let Some(byte) = frame.get_mut(place) {
                *byte = value;
            }
        }
        frame
    });
    let cut = (whole(), 14_usize..70).prop_map(|(mut frame, length)| {
        frame.truncate(length);
        frame
    });
    let noise = vec(any::<u8>(), 14..80).prop_map(|mut frame| {
        frame[6..12].copy_from_slice(&MAC);
        frame
    });
    prop_oneof![4 => whole(), 3 => edited, 3 => cut, 1 => noise]
}

/// The pod anew: nothing of what it sent is known any more.
fn plug(kernel: &mut Kernel) -> u32 {
    let link = kernel.links[0];
    let number = kernel.next();
    let classes = [(ClassKey::host(SOME), 16), (ClassKey::host(ALL), 17)];
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
    kernel.maps.put_class_map(number, &classes).expect("put");
    kernel.maps.put_table(number, &rules).expect("put");
    let row = Endpoint {
        uid: number,
        generation: number,
        class_map: number,
        table: number,
        addr: POD.to_bits().to_be(),
        mac: MAC,
        state: state::READY,
        flags: ISOLATED_EGRESS,
        ..Endpoint::default()
    };
    kernel.maps.insert_endpoint(link, row).expect("inserted");
    kernel.maps.retain(|key| key == number, |key| key == number).expect("swept");
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
        let mut sender = Sender::new(MAC, POD, may_reach);
        for place in 1..=total {
            if place % FRAMES_PER_POD == 0 {
                link = plug(&mut kernel);
                sender = Sender::new(MAC, POD, may_reach);
            }
            // What came before counts, so a frame alone would say little: there is nothing to shrink.
            let tree = strategy.new_tree(&mut runner).expect("a frame");
            let frame = proptest::strategy::ValueTree::current(&tree);
            if frame.len() < SHORTEST {
                continue;
            }
            let Some(passes) = sender.passes(&frame) else { continue };
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
