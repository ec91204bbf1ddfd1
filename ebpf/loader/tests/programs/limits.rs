//! What happens at the limits: rows that are replaced while a program runs, and maps that are full.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, Map, MapData};
use orch_ebpf_loader::{Probe, Question};
use orch_ebpf_maps::{EndpointRow, MAX_CLASS_MAPS, MAX_ENDPOINTS, in_key};

use super::*;

/// How long rows are replaced below running programs.
const STORM: Duration = Duration::from_millis(1500);
const RUNS_AT_ONCE: u32 = 2000;
/// A second's budget of events goes into the ring several times.
const PATIENCE: Duration = Duration::from_secs(60);
/// More flows than the map takes, and than it forgets early because each CPU has a stock of its own.
const FLOOD: u32 = 100_000;

/// A flow of TCP as the agent tells of it.
fn flow_key(other: Ipv4Addr, port: u16, own_port: u16) -> FlowKey {
    let (family, remote) = in_key(other.into());
    FlowKey {
        uid: 77,
        remote,
        local_port: own_port.to_be(),
        remote_port: port.to_be(),
        protocol: TCP,
        family,
        ..FlowKey::default()
    }
}

/// The maps of rows as the kernel has them.
fn raw_rows(w: &World) -> (HashMap<MapData, u32, EndpointRow>, Array<MapData, EndpointRow>) {
    let open = |name: &str| {
        let map = MapData::from_pin(w.pins.folder().join("maps").join(name)).expect("pinned");
        Map::from_map_data(map).expect("a map")
    };
    let rows = open("endpoints").try_into().expect("a hash map");
    (rows, open("endpoint_cache").try_into().expect("an array"))
}

/// Of a policy before the one that is in force.
fn old_flow(w: &World, direction: Direction) -> Flow {
    Flow::opened(direction, w.generation - 1)
}

/// The frame as one of many flows.
fn from_port(mut frame: Frame, place: u32) -> Vec<u8> {
    let [_, high, low, last] = place.to_be_bytes();
    frame.sport = u16::from_be_bytes([low, last]);
    frame.src = Ipv4Addr::new(10, 244, 3, high);
    frame.bytes()
}

#[test]
fn a_row_that_is_replaced_shows_as_nobody_elses() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &[deny(RuleKey::any(0, Direction::Ingress))]);
        let closed = w.maps.endpoint(w.pod).expect("read").expect("there");
        // The kernel gives the memory of one replaced row to the next one that is written.
        let open = Endpoint { uid: 78, flags: 0, ..closed };
        let open = w.maps.insert_endpoint(WIRE, open).expect("inserted");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut maps = Maps::open(&w.pins).expect("pinned");
                let mut row = closed;
                while !stop.load(Ordering::Relaxed) {
                    row.generation = row.generation.wrapping_add(1);
                    maps.update_endpoint(w.pod, row).expect("written");
                    maps.update_endpoint(WIRE, open).expect("written");
                }
            });
            let path = w.pins.folder().join("programs").join(Hook::ToPod.program());
            let program = SchedClassifier::from_pin(path).expect("pinned");
            let frame = tcp(OTHER, 1000, POD, 80, SYN).bytes();
            let context = Context::new(w.pod, WIRE, 0);
            let start = Instant::now();
            while start.elapsed() < STORM {
                let options = TestRunOptions {
                    data_in: Some(&frame),
                    ctx_in: Some(context.bytes()),
                    repeat: RUNS_AT_ONCE,
                    ..TestRunOptions::default()
                };
                program.test_run(options).expect("run");
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(w.count(Direction::Ingress, Reason::NotIsolated), 0, "the other row is open");
        assert_eq!(w.count(Direction::Ingress, Reason::NoEndpoint), 0, "the row was always there");
        assert!(w.count(Direction::Ingress, Reason::Policy) >= u64::from(RUNS_AT_ONCE));
    });
}

#[test]
fn a_row_that_is_not_whole_counts_as_none() {
    in_world(|w| {
        w.enforce(0, &[]);
        let open = w.maps.endpoint(w.pod).expect("read").expect("there");
        let (mut rows, mut places) = raw_rows(w);
        let frame = tcp(OTHER, 1000, POD, 80, SYN);
        let whole = EndpointRow::new(w.pod, open);
        for (row, verdict) in [
            (whole, NEXT),
            // A word of another row, and another link's row.
            (
                EndpointRow {
                    endpoint: Endpoint { generation: open.generation + 1, ..open },
                    ..whole
                },
                DROP,
            ),
            (EndpointRow::new(WIRE, open), DROP),
        ] {
            rows.insert(w.pod, row, 0).expect("written");
            places.set(w.pod % MAX_ENDPOINTS, row, 0).expect("written");
            assert_eq!(w.gets(frame), verdict, "{row:?}");
            // What is in its place is only a copy.
            rows.insert(w.pod, whole, 0).expect("written");
            assert_eq!(w.gets(frame), NEXT, "{row:?} in its place");
        }
        assert_eq!(w.count(Direction::Ingress, Reason::NoEndpoint), 2);
    });
}

#[test]
fn links_that_share_a_place_are_judged_each_by_its_own_row() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &[deny(RuleKey::any(0, Direction::Ingress))]);
        let closed = w.maps.endpoint(w.pod).expect("read").expect("there");
        let there = w.pod + MAX_ENDPOINTS;
        let added = Command::new("ip")
            .args(["link", "add", "far0", "index", &there.to_string(), "type", "veth"])
            .status();
        assert!(added.expect("ip starts").success());
        let frame = |flags| tcp(STRANGER, 1000, POD, 80, flags).bytes();
        let gets = |w: &World, link| w.run(Hook::ToPod, &frame(SYN), WIRE, 0, link).0;
        let open = Endpoint { uid: 78, flags: 0, ..closed };
        let open = w.maps.insert_endpoint(there, open).expect("inserted");
        for _ in 0..2 {
            assert_eq!((gets(w, w.pod), gets(w, there)), (DROP, NEXT));
            w.maps.update_endpoint(w.pod, closed).expect("written");
            assert_eq!((gets(w, w.pod), gets(w, there)), (DROP, NEXT));
            w.maps.update_endpoint(there, open).expect("written");
        }
        assert_eq!(w.count(Direction::Ingress, Reason::NoEndpoint), 0);
        w.maps.remove_endpoint(there).expect("removed");
        assert_eq!((gets(w, w.pod), gets(w, there)), (DROP, DROP));
        assert_eq!(w.count(Direction::Ingress, Reason::NoEndpoint), 1, "a row that is gone");
    });
}

#[test]
fn places_that_a_killed_writer_left_empty_are_filled_again() {
    in_world(|w| {
        w.enforce(0, &[]);
        let open = w.maps.endpoint(w.pod).expect("read").expect("there");
        let (rows, mut places) = raw_rows(w);
        let place = w.pod % MAX_ENDPOINTS;
        let whole = EndpointRow::new(w.pod, open);
        assert_eq!(places.get(&place, 0).expect("read"), whole);
        places.set(place, EndpointRow::new(0, Endpoint::default()), 0).expect("emptied");
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, SYN)), NEXT, "searched for");
        w.maps.mend_endpoints().expect("mended");
        assert_eq!(places.get(&place, 0).expect("read"), whole);
        assert_eq!(rows.get(&w.pod, 0).expect("read"), whole);
    });
}

#[test]
fn an_endpoint_too_many_is_refused_and_its_link_is_closed() {
    in_world(|w| {
        let row = |uid| Endpoint { uid, state: state::READY, ..Endpoint::default() };
        // One is there already.
        for link in 0..MAX_ENDPOINTS - 1 {
            w.maps.insert_endpoint(100_000 + link, row(link)).expect("there is room");
        }
        w.maps.insert_endpoint(WIRE, row(1)).expect_err("full");
        let frame = tcp(POD, 1000, OTHER, 80, SYN).bytes();
        assert_eq!(w.run(Hook::FromPod, &frame, 0, 0, WIRE).0, DROP);
        assert_eq!(w.run(Hook::ToPod, &frame, w.pod, 0, WIRE).0, DROP);
        assert_eq!(w.count(Direction::Egress, Reason::NoEndpoint), 1);
        assert_eq!(w.count(Direction::Ingress, Reason::NoEndpoint), 1);
        // One that goes makes room.
        assert!(w.maps.remove_endpoint(100_000).expect("removed"));
        w.maps.insert_endpoint(WIRE, row(1)).expect("there is room again");
    });
}

#[test]
fn a_class_map_too_many_is_refused_and_what_is_in_force_stays() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        let none = ClassMap::build([].into_iter()).expect("built");
        w.maps.put_class_map(MAX_CLASS_MAPS - 1, &none).expect("put");
        w.maps.put_class_map(MAX_CLASS_MAPS, &none).expect_err("there is a limit");
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, SYN)), NEXT);
        assert_eq!(w.gets(tcp(STRANGER, 1000, POD, 80, SYN)), DROP);
    });
}

/// Several times as many flows as the programs keep at hand.
#[test]
fn flows_that_share_a_place_are_told_apart() {
    const FLOWS: u16 = 6000;
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS | ISOLATED_EGRESS, &web_for_other());
        let opened = || (1000..1000 + FLOWS).filter(|port| port % 2 == 0);
        for port in opened() {
            assert_eq!(w.gets(tcp(OTHER, port, POD, 80, SYN)), NEXT);
            assert_eq!(w.sends(tcp(POD, 80, OTHER, port, ACK)), NEXT, "an answer");
            assert_eq!(w.gets(tcp(OTHER, port, POD, 80, ACK)), NEXT, "it goes on");
        }
        for port in opened() {
            assert_eq!(w.sends(tcp(POD, 80, OTHER, port + 1, ACK)), DROP, "nobody opened it");
            assert_eq!(w.sends(tcp(POD, 80, STRANGER, port, ACK)), DROP, "nor that one");
            assert_eq!(w.sends(tcp(POD, 80, OTHER, port, ACK)), NEXT);
        }
        w.enforce(ISOLATED_INGRESS | ISOLATED_EGRESS, &[]);
        for port in opened() {
            assert_eq!(w.sends(tcp(POD, 80, OTHER, port, ACK)), DROP, "cut within the second");
        }
    });
}

/// The agent leaves the generation as it is where flows need not be judged again, and gives numbers of tables again.
#[test]
fn what_the_tables_said_is_repeated_for_the_same_row_and_question_alone() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS | ISOLATED_EGRESS, &web_for_other());
        for _ in 0..2 {
            assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, SYN)), NEXT);
            assert_eq!(w.gets(tcp(OTHER, 1000, POD, 81, SYN)), DROP, "another port");
            assert_eq!(w.gets(udp(OTHER, 1000, POD, 80)), DROP, "another protocol");
            assert_eq!(w.gets(tcp(STRANGER, 1000, POD, 80, SYN)), DROP, "another peer");
            assert_eq!(w.sends(tcp(POD, 1000, OTHER, 80, SYN)), DROP, "the other direction");
        }
        let row = w.maps.endpoint(w.pod).expect("read").expect("there");
        let table = RuleTable::build(std::iter::empty()).expect("built");
        w.maps.put_table(row.table, &table).expect("put");
        let next = Endpoint { revision: row.revision + 1, ..row };
        w.maps.update_endpoint(w.pod, next).expect("written");
        assert_eq!(w.gets(tcp(OTHER, 1001, POD, 80, SYN)), DROP, "the new table does not say so");
    });
}

#[test]
fn flows_that_were_forgotten_are_judged_again() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, SYN)), NEXT, "allowed to come");
        assert_eq!(
            w.sends(tcp(POD, 2000, STRANGER, 443, SYN)),
            NEXT,
            "nothing isolates its egress"
        );
        // Not asked for its answer yet: what is used stays longer.
        let path = w.pins.folder().join("programs").join(Hook::FromPod.program());
        let program = SchedClassifier::from_pin(path).expect("pinned");
        let context = Context::new(w.pod, 0, 0);
        for place in 0..FLOOD {
            let mut frame = from_port(tcp(POD, 0, STRANGER, 443, SYN), place);
            // Its own address, to as many others.
            let (source, target) = (POD.octets(), frame[26..30].to_vec());
            frame[26..30].copy_from_slice(&source);
            frame[30..34].copy_from_slice(&target);
            let options = TestRunOptions {
                data_in: Some(&frame),
                ctx_in: Some(context.bytes()),
                ..TestRunOptions::default()
            };
            assert_eq!(program.test_run(options).expect("run").return_value, NEXT, "never full");
        }
        let flows = w.maps.flows().expect("read").len();
        assert!(flows < FLOOD as usize, "{flows} flows: the oldest went");
        assert_eq!(w.count(Direction::Egress, Reason::FlowTableFull), 0);
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, ACK)), NEXT, "both sides may open it");
        assert_eq!(
            w.gets(tcp(STRANGER, 443, POD, 2000, ACK)),
            DROP,
            "nobody asked, as far as is known"
        );
        assert_eq!(w.sends(tcp(POD, 2000, STRANGER, 443, ACK)), DROP, "and who knows who did");
        assert_eq!(w.count(Direction::Ingress, Reason::Stray), 1);
        assert_eq!(w.count(Direction::Egress, Reason::Stray), 1);
        assert_eq!(w.maps.take_strays().expect("read"), [77], "the pod's sockets have to be asked");
        assert!(w.maps.take_strays().expect("read").is_empty(), "once");
        // What they say.
        w.maps
            .put_flow(flow_key(STRANGER, 443, 2000), old_flow(w, Direction::Egress))
            .expect("put");
        assert_eq!(w.sends(tcp(POD, 2000, STRANGER, 443, ACK)), NEXT, "known again");
        assert_eq!(w.gets(tcp(STRANGER, 443, POD, 2000, ACK)), NEXT, "the answer");
    });
}

/// The price of a full map is never that what policy cut goes on the other way round.
#[test]
fn a_connection_that_was_cut_and_forgotten_goes_on_in_neither_direction() {
    in_world(|w| {
        let none = [deny(RuleKey::any(0, Direction::Ingress))];
        // One that the peer opened, while that was allowed.
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, SYN)), NEXT);
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 1000, SYN | ACK)), NEXT);
        w.enforce(ISOLATED_INGRESS, &none);
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 1000, ACK)), DROP, "cut");
        w.forget_flows();
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 1000, ACK)), DROP, "the pod may open, not this");
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, ACK)), DROP);
        // One that the pod opened, the other way round.
        w.enforce(0, &[]);
        assert_eq!(w.sends(tcp(POD, 2000, OTHER, 443, SYN)), NEXT);
        assert_eq!(w.gets(tcp(OTHER, 443, POD, 2000, SYN | ACK)), NEXT);
        w.enforce(ISOLATED_EGRESS, &[deny(RuleKey::any(0, Direction::Egress))]);
        assert_eq!(w.gets(tcp(OTHER, 443, POD, 2000, ACK)), DROP, "cut");
        w.forget_flows();
        assert_eq!(w.gets(tcp(OTHER, 443, POD, 2000, ACK)), DROP, "others may come, not so");
        assert_eq!(w.sends(tcp(POD, 2000, OTHER, 443, ACK)), DROP);
        assert_eq!(w.maps.flows().expect("read"), [], "nothing was begun");
        // Forgotten while nothing forbids it, and cut later: whichever side opened it.
        w.enforce(0, &[]);
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 1000, ACK)), NEXT, "both sides may open it");
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, ACK)), NEXT);
        w.enforce(ISOLATED_INGRESS, &none);
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 1000, ACK)), DROP);
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, ACK)), DROP);
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, SYN)), DROP, "nor begins one");
    });
}

#[test]
fn a_flood_is_dropped_and_counted_whole_though_nobody_hears_of_it() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        let path = w.pins.folder().join("programs").join(Hook::ToPod.program());
        let program = SchedClassifier::from_pin(path).expect("pinned");
        let frame = tcp(STRANGER, 1000, POD, 80, SYN).bytes();
        let context = Context::new(w.pod, WIRE, 0);
        let flood = 50_000;
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(context.bytes()),
            repeat: flood,
            ..TestRunOptions::default()
        };
        assert_eq!(program.test_run(options).expect("run").return_value, DROP);
        assert_eq!(w.count(Direction::Ingress, Reason::Policy), u64::from(flood));
        let told = w.events().count();
        assert!(told > 0 && told < flood as usize, "{told} events");
        assert_eq!(w.lost(Loss::Budget), u64::from(flood) - told as u64, "the rest is counted");
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, SYN)), NEXT, "what is allowed passes");
    });
}

/// Drops until the ring is full, as when `orchctl net flows` is not running, which is so nearly always; how many.
fn fill_ring(w: &World) -> u64 {
    let path = w.pins.folder().join("programs").join(Hook::ToPod.program());
    let program = SchedClassifier::from_pin(path).expect("pinned");
    let frame = tcp(STRANGER, 1000, POD, 80, SYN).bytes();
    let context = Context::new(w.pod, WIRE, 0);
    let start = Instant::now();
    let mut sent = 0;
    // The budget is by the second, and the ring takes more than one second's.
    while w.lost(Loss::RingFull) == 0 {
        assert!(start.elapsed() < PATIENCE, "{sent} packets, and the ring takes all");
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(context.bytes()),
            repeat: RUNS_AT_ONCE,
            ..TestRunOptions::default()
        };
        assert_eq!(program.test_run(options).expect("run").return_value, DROP);
        sent += u64::from(RUNS_AT_ONCE);
        std::thread::sleep(Duration::from_millis(50));
    }
    sent
}

#[test]
fn events_that_find_the_ring_full_are_counted_and_verdicts_are_the_same() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        let sent = fill_ring(w);
        assert_eq!(w.count(Direction::Ingress, Reason::Policy), sent);
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, SYN)), NEXT, "what is allowed passes");
        assert_eq!(w.gets(tcp(STRANGER, 1001, POD, 80, SYN)), DROP);
        let lost = w.lost(Loss::RingFull);
        // A reader makes room.
        let told = w.events().count() as u64;
        assert_eq!(told + lost + w.lost(Loss::Budget), sent + 2, "told or counted");
        std::thread::sleep(Duration::from_millis(1100));
        assert_eq!(w.gets(tcp(STRANGER, 1002, POD, 80, SYN)), DROP);
        assert_eq!(w.events().count(), 1, "told again");
        assert_eq!(w.lost(Loss::RingFull), lost);
    });
}

#[test]
fn the_oldest_half_of_a_full_ring_makes_room_for_the_newest() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        let told = fill_ring(w) - w.lost(Loss::RingFull) - w.lost(Loss::Budget);
        let turn = w.events();
        assert!(Events::open(&w.pins).expect("pinned").is_none(), "one reader at a time");
        turn.forget_oldest_half();
        std::thread::sleep(Duration::from_millis(1100));
        assert_eq!(w.gets(tcp(STRANGER, 1002, POD, 80, SYN)), DROP);
        let left: Vec<Event> = w.events().collect();
        assert_eq!(left.last().map(|event| u16::from_be(event.sport)), Some(1002));
        assert!(
            (told / 2..told / 2 + 3).contains(&(left.len() as u64)),
            "{} of {told}",
            left.len()
        );
    });
}

#[test]
fn many_tables_are_published_and_removed_together() {
    in_world(|w| {
        let table = |key: u32| {
            let rules = [allow(RuleKey::any(key, Direction::Ingress))];
            (key, RuleTable::build(rules.into_iter()).expect("built"))
        };
        let tables: Vec<(u32, RuleTable)> = (1000..1100).map(table).collect();
        let none = ClassMap::build([].into_iter()).expect("built");
        let (class_map, outcomes) = w.maps.publish(Some((20, &none)), &tables);
        assert!(class_map.is_ok() && outcomes.iter().all(Result::is_ok));
        assert_eq!(w.maps.published().expect("read"), (vec![20], (1000..1100).collect()));
        let gone: Vec<u32> = (900..1090).collect();
        w.maps.withdraw(&[], &gone).expect("removed, or never there");
        assert_eq!(w.maps.published().expect("read"), (vec![20], (1090..1100).collect()));
        w.maps.withdraw(&[20], &[]).expect("removed");
        assert!(w.maps.published().expect("read").0.is_empty());
    });
}

#[test]
fn a_probe_says_what_the_programs_would_do_and_leaves_no_trace() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        let mut probe = Probe::load(&w.pins).expect("loaded");
        let mut ask = |peer: Ipv4Addr, port, direction, born_here| {
            let (ifindex, peer) = (w.pod, peer.into());
            let question = Question { ifindex, direction, peer, protocol: TCP, port, born_here };
            let ran = probe.ask(&w.maps, &question).expect("run").expect("an endpoint");
            (ran.passed, ran.reason, ran.rule)
        };
        let comes = Direction::Ingress;
        // Twice the same: the first leaves nothing that would answer the second.
        for _ in 0..2 {
            assert_eq!(ask(OTHER, 80, comes, false), (true, Reason::Allowed, 5));
        }
        assert_eq!(ask(OTHER, 81, comes, false), (false, Reason::Policy, 0));
        assert_eq!(ask(STRANGER, 80, comes, false), (false, Reason::Policy, 0));
        assert_eq!(ask(NODE, 81, comes, true), (true, Reason::Node, 0));
        assert_eq!(ask(STRANGER, 80, Direction::Egress, false), (true, Reason::NotIsolated, 0));
        assert_eq!(w.maps.flows().expect("read"), []);
        assert_eq!(w.maps.counters().expect("read"), []);
        assert_eq!(w.events().count(), 0);
        let absent = Question {
            ifindex: 4000,
            direction: comes,
            peer: OTHER.into(),
            protocol: TCP,
            port: 80,
            born_here: false,
        };
        assert_eq!(probe.ask(&w.maps, &absent).expect("asked"), None);
    });
}

#[test]
fn a_connection_that_was_open_before_goes_on_if_policy_would_let_it_begin() {
    in_world(|w| {
        let mut rules = web_for_other();
        rules.push(deny(RuleKey::any(0, Direction::Egress)));
        rules.push(deny(RuleKey::any(CLASS, Direction::Egress)));
        w.enforce(ISOLATED_INGRESS | ISOLATED_EGRESS, &rules);
        let answer = |to, port| tcp(POD, 80, to, port, ACK);
        assert_eq!(w.sends(answer(OTHER, 1000)), DROP, "an answer to nothing that is known");
        for from in [OTHER, STRANGER] {
            w.maps
                .put_flow(flow_key(from, 1000, 80), old_flow(w, Direction::Ingress))
                .expect("put");
        }
        assert_eq!(w.sends(answer(OTHER, 1000)), NEXT);
        assert_eq!(w.sends(answer(STRANGER, 1000)), DROP, "who may not come is not answered");
        assert_eq!(w.count(Direction::Egress, Reason::Revoked), 1);
    });
}
