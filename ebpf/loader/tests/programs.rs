//! Frames in, verdicts out: the loaded programs, by test runs in the kernel. Needs root; shows as ignored without.

#[path = "programs/filters.rs"]
mod filters;
#[path = "programs/limits.rs"]
mod limits;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::Command;

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use nix::sched::{CloneFlags, unshare};
use orch_ebpf_loader::{
    ClassMap, Events, Hook, Maps, Pins, RuleTable, attach, detach, install, is_attached,
    retire_others, sweep,
};
use orch_ebpf_maps::{
    ADDRESS_NODE, ADDRESS_REMOTE_NODE, ADDRESS_SERVICE, Action, ClassKey, Config, Direction,
    Endpoint, Event, Flow, FlowKey, ISOLATED_EGRESS, ISOLATED_INGRESS, Loss, Reason, Rule, RuleKey,
    state,
};

#[path = "programs/ipv6.rs"]
mod ipv6;

const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 5);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 7);
const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 8);
const NODE: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 50);
/// The same in IPv6.
const POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 5);
const OTHER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, 7);
const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 1);
const SERVICE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x50);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];
const CLASS: u32 = 16;
/// A link of the test's namespace that is no pod's.
const WIRE: u32 = 3;
const MARK_DEFERRED: u32 = 0x100;

/// What a test run reads and writes of `struct __sk_buff`, up to `ifindex`; the rest is zero.
#[repr(C)]
#[derive(Clone, Copy)]
struct Context {
    words: [u32; 48],
}

impl Context {
    fn new(ifindex: u32, ingress_ifindex: u32, mark: u32) -> Self {
        let mut words = [0; 48];
        words[2] = mark;
        words[9] = ingress_ifindex;
        words[10] = ifindex;
        Self { words }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `repr(C)` of integers, read for its whole size while it is borrowed.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and every bit pattern is a value.
        unsafe {
            std::slice::from_raw_parts_mut(std::ptr::from_mut(self).cast(), size_of::<Self>())
        }
    }
}

/// A namespace of its own with links, and a BPF file system of its own.
struct World {
    root: PathBuf,
    pins: Pins,
    maps: Maps,
    pod: u32,
    generation: u32,
}

/// One IPv4 packet.
#[derive(Clone, Copy)]
struct Frame {
    from_mac: [u8; 6],
    src: Ipv4Addr,
    dst: Ipv4Addr,
    protocol: u8,
    sport: u16,
    dport: u16,
    flags: u8,
    id: u16,
    fragment: u16,
}

fn tcp(src: Ipv4Addr, sport: u16, dst: Ipv4Addr, dport: u16, flags: u8) -> Frame {
    Frame { from_mac: MAC, src, dst, protocol: TCP, sport, dport, flags, id: 1, fragment: 0 }
}

fn udp(src: Ipv4Addr, sport: u16, dst: Ipv4Addr, dport: u16) -> Frame {
    Frame { protocol: UDP, ..tcp(src, sport, dst, dport, 0) }
}

impl Frame {
    fn bytes(self) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1];
        frame.extend(self.from_mac);
        frame.extend([0x08, 0x00, 0x45, 0, 0, 60]);
        frame.extend(self.id.to_be_bytes());
        frame.extend(self.fragment.to_be_bytes());
        frame.extend([64, self.protocol, 0, 0]);
        frame.extend(self.src.octets());
        frame.extend(self.dst.octets());
        frame.extend(self.sport.to_be_bytes());
        frame.extend(self.dport.to_be_bytes());
        frame.extend([0; 8]);
        frame.extend([0x50, self.flags]);
        frame.extend([0; 26]);
        frame
    }
}

impl World {
    /// `None`, with a word why, where the kernel may not be asked.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("ignored: needs root");
            return None;
        }
        // This thread's namespaces only; a test has its thread for itself.
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces of its own");
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .expect("private mounts");
        // The other end gets the first index.
        let made = Command::new("ip")
            .args(["link", "add", "wire0", "type", "veth", "peer", "name", "pod0"])
            .status();
        assert!(made.expect("ip starts").success());
        assert_eq!(nix::net::if_::if_nametoindex("wire0"), Ok(WIRE));
        let root = tempfile::tempdir().expect("a folder").keep();
        let pins = Pins::below(&root);
        let mut maps = install(&pins).expect("installed");
        maps.set_settings(Config::new(8472, false)).expect("set");
        maps.put_address(ClassKey::host(NODE), ADDRESS_NODE).expect("put");
        maps.put_address(ClassKey::new(Ipv4Addr::new(10, 96, 0, 0), 12), ADDRESS_SERVICE)
            .expect("put");
        maps.put_address(ClassKey::host(Ipv4Addr::new(172, 31, 0, 2)), ADDRESS_REMOTE_NODE)
            .expect("put");
        maps.put_address(ClassKey::host(NODE6), ADDRESS_NODE).expect("put");
        maps.put_address(ClassKey::host(SERVICE6), ADDRESS_SERVICE).expect("put");
        let pod = nix::net::if_::if_nametoindex("pod0").expect("made");
        let endpoint = Endpoint {
            uid: 77,
            generation: 1,
            addr: POD.to_bits().to_be(),
            addr6: POD6.octets(),
            mac: MAC,
            state: state::PENDING,
            ..Endpoint::default()
        };
        maps.insert_endpoint(pod, endpoint).expect("inserted");
        Some(Self { root, pins, maps, pod, generation: 1 })
    }

    /// Puts rules into force: OTHER has [`CLASS`] in both families, all else none.
    fn enforce(&mut self, flags: u8, rules: &[(RuleKey, Rule)]) {
        self.generation += 1;
        let key = self.generation;
        let other = [(ClassKey::host(OTHER), CLASS), (ClassKey::host(OTHER6), CLASS)];
        let classes = ClassMap::build(other.into_iter()).expect("built");
        self.maps.put_class_map(key, &classes).expect("put");
        let table = RuleTable::build(rules.iter().copied()).expect("built");
        self.maps.put_table(key, &table).expect("put");
        let before = self.maps.endpoint(self.pod).expect("read").expect("there");
        let endpoint = Endpoint {
            state: state::READY,
            flags,
            generation: key,
            class_map: key,
            table: key,
            ..before
        };
        self.maps.update_endpoint(self.pod, endpoint).expect("written");
    }

    fn run(&self, hook: Hook, frame: &[u8], ingress: u32, mark: u32, ifindex: u32) -> (u32, u32) {
        let path = self.pins.folder().join("programs").join(hook.program());
        let program = SchedClassifier::from_pin(path).expect("pinned");
        let context = Context::new(ifindex, ingress, mark);
        let mut after = context;
        let mut out = vec![0; 256];
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(context.bytes()),
                ctx_out: Some(after.bytes_mut()),
                ..TestRunOptions::default()
            })
            .expect("run");
        (result.return_value, after.words[2])
    }

    fn sends(&self, frame: Frame) -> u32 {
        self.run(Hook::FromPod, &frame.bytes(), 0, 0, self.pod).0
    }

    fn gets(&self, frame: Frame) -> u32 {
        self.run(Hook::ToPod, &frame.bytes(), WIRE, 0, self.pod).0
    }

    /// A turn at what the programs tell.
    fn events(&self) -> Events {
        Events::open(&self.pins).expect("pinned").expect("nobody else reads")
    }

    fn lost(&self, cause: Loss) -> u64 {
        let all = self.maps.event_losses().expect("read");
        all.iter().find(|(loss, _)| *loss == cause).map_or(0, |(_, events)| *events)
    }

    /// As if so many others had come that there is no room for those that are known.
    fn forget_flows(&mut self) {
        let path = self.pins.folder().join("maps/flows");
        let flows = aya::maps::MapData::from_pin(path)
            .and_then(aya::maps::Map::from_map_data)
            .and_then(aya::maps::HashMap::<_, FlowKey, Flow>::try_from);
        let mut flows = flows.expect("pinned");
        for (key, _) in self.maps.flows().expect("read") {
            flows.remove(&key).expect("removed");
        }
    }

    fn count(&self, direction: Direction, reason: Reason) -> u64 {
        let all = self.maps.counters().expect("read");
        all.iter().find(|(d, r, _)| (*d, *r) == (direction, reason)).map_or(0, |(_, _, n)| *n)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.root.join("sys/fs/bpf"));
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn allow(key: RuleKey) -> (RuleKey, Rule) {
    (key, Rule::new(5, Action::Allow))
}

fn deny(key: RuleKey) -> (RuleKey, Rule) {
    (key, Rule::new(0, Action::Deny))
}

/// OTHER may come to TCP 80, nobody else anywhere.
fn web_for_other() -> Vec<(RuleKey, Rule)> {
    vec![
        deny(RuleKey::any(0, Direction::Ingress)),
        deny(RuleKey::any(CLASS, Direction::Ingress)),
        allow(RuleKey::ports(CLASS, Direction::Ingress, TCP, 80, 16)),
    ]
}

/// Each test in a thread of its own, because a namespace belongs to a thread.
fn in_world(test: impl FnOnce(&mut World) + Send + 'static) {
    let thread = std::thread::spawn(|| {
        if let Some(mut world) = World::new() {
            test(&mut world);
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_pending_pod_reaches_and_is_reached_by_its_node_alone() {
    in_world(|w| {
        assert_eq!(w.sends(tcp(POD, 1000, OTHER, 80, SYN)), DROP);
        assert_eq!(w.sends(udp(POD, 1000, SERVICE, 80)), DROP);
        assert_eq!(w.gets(tcp(OTHER, 1000, POD, 80, SYN)), DROP);
        assert_eq!(w.count(Direction::Egress, Reason::Pending), 2);
        assert_eq!(w.sends(tcp(POD, 80, NODE, 1000, SYN | ACK)), NEXT, "answers the kubelet");
        let probe = tcp(NODE, 1000, POD, 80, SYN).bytes();
        assert_eq!(w.run(Hook::ToPod, &probe, 0, 0, w.pod).0, NEXT, "born on the node");
        assert_eq!(w.run(Hook::ToPod, &probe, WIRE, 0, w.pod).0, DROP, "only has its address");
    });
}

#[test]
fn a_pod_without_policies_is_open_and_one_with_policies_is_not() {
    in_world(|w| {
        w.enforce(0, &[]);
        assert_eq!(w.gets(tcp(STRANGER, 1000, POD, 81, SYN)), NEXT);
        assert_eq!(w.sends(udp(POD, 1000, STRANGER, 53)), NEXT);
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        assert_eq!(w.gets(tcp(OTHER, 1001, POD, 80, SYN)), NEXT);
        assert_eq!(w.gets(tcp(OTHER, 1001, POD, 81, SYN)), DROP, "another port");
        assert_eq!(w.gets(udp(OTHER, 1001, POD, 80)), DROP, "another protocol");
        assert_eq!(w.gets(tcp(STRANGER, 1001, POD, 80, SYN)), DROP, "another peer");
        assert_eq!(w.sends(udp(POD, 1001, STRANGER, 53)), NEXT, "egress is not isolated");
        assert_eq!(w.gets(udp(STRANGER, 53, POD, 1001)), NEXT, "its answer");
        assert_eq!(w.gets(udp(STRANGER, 53, POD, 1002)), DROP, "no answer to anything");
    });
}

#[test]
fn answers_pass_and_a_connection_ends_when_policy_does_not_allow_it_any_more() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS | ISOLATED_EGRESS, &web_for_other());
        assert_eq!(w.gets(tcp(OTHER, 2000, POD, 80, SYN)), NEXT);
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 2000, SYN | ACK)), NEXT, "answer");
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 2001, ACK)), DROP, "answer to nothing");
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 2000, SYN)), DROP, "opens one of its own");
        w.enforce(ISOLATED_INGRESS | ISOLATED_EGRESS, &web_for_other());
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 2000, ACK)), NEXT, "still allowed");
        w.enforce(ISOLATED_INGRESS | ISOLATED_EGRESS, &[deny(RuleKey::any(0, Direction::Ingress))]);
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 2000, ACK)), DROP, "revoked, seen by the answer");
        assert_eq!(w.gets(tcp(OTHER, 2000, POD, 80, ACK)), DROP);
        assert_eq!(w.count(Direction::Egress, Reason::Revoked), 1);
    });
}

/// Where only ingress is isolated, the pod may open connections: what it sends on one that was cut opens none.
#[test]
fn a_connection_that_was_cut_is_not_begun_anew_by_what_the_pod_sends_again() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        assert_eq!(w.gets(tcp(OTHER, 2000, POD, 80, SYN)), NEXT);
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 2000, SYN | ACK)), NEXT, "answer");
        w.enforce(ISOLATED_INGRESS, &[deny(RuleKey::any(0, Direction::Ingress))]);
        assert_eq!(w.gets(tcp(OTHER, 2000, POD, 80, ACK)), DROP, "cut");
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 2000, ACK)), DROP, "sent again by the pod");
        assert_eq!(w.gets(tcp(OTHER, 2000, POD, 80, ACK)), DROP, "still cut");
        assert_eq!(w.sends(tcp(POD, 2001, OTHER, 80, SYN)), NEXT, "one of its own");
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        assert_eq!(w.gets(tcp(OTHER, 2000, POD, 80, ACK)), NEXT, "allowed again: it goes on");
    });
}

#[test]
fn a_flow_that_both_sides_opened_is_judged_for_each_of_them() {
    in_world(|w| {
        let rules = |ingress: bool, egress: bool| {
            let rule = |allowed, key| if allowed { allow(key) } else { deny(key) };
            vec![
                rule(ingress, RuleKey::any(CLASS, Direction::Ingress)),
                rule(egress, RuleKey::any(CLASS, Direction::Egress)),
            ]
        };
        let (out, back) = (tcp(POD, 80, OTHER, 2000, ACK), tcp(OTHER, 2000, POD, 80, ACK));
        let both = ISOLATED_INGRESS | ISOLATED_EGRESS;
        w.enforce(both, &rules(true, true));
        assert_eq!(w.gets(tcp(OTHER, 2000, POD, 80, SYN)), NEXT);
        assert_eq!(w.sends(tcp(POD, 80, OTHER, 2000, SYN)), NEXT);
        assert_eq!(w.maps.flows().expect("read").len(), 1, "one row for both");
        assert_eq!((w.sends(out), w.gets(back)), (NEXT, NEXT));
        // Each is first of all an answer to what the other side opened.
        w.enforce(both, &rules(true, false));
        assert_eq!((w.sends(out), w.gets(back)), (NEXT, DROP));
        w.enforce(both, &rules(false, true));
        assert_eq!((w.sends(out), w.gets(back)), (DROP, NEXT));
        // A cut flow of datagrams is not begun anew by what the pod still sends, until it was silent for a while.
        w.enforce(both, &rules(true, true));
        assert_eq!(w.gets(udp(OTHER, 53, POD, 53)), NEXT);
        assert_eq!(w.sends(udp(POD, 53, OTHER, 53)), NEXT, "an answer");
        w.enforce(both, &rules(false, true));
        for _ in 0..2 {
            assert_eq!(w.sends(udp(POD, 53, OTHER, 53)), DROP, "revoked");
            assert_eq!(w.gets(udp(OTHER, 53, POD, 53)), DROP, "revoked");
        }
        assert_eq!(w.sends(udp(POD, 54, OTHER, 53)), NEXT, "one of its own");
        w.enforce(both, &rules(true, true));
        assert_eq!(w.gets(udp(OTHER, 53, POD, 53)), NEXT, "allowed again: it goes on");
        w.enforce(both, &rules(false, true));
        for (key, mut flow) in w.maps.flows().expect("read") {
            flow.legs.iter_mut().for_each(|leg| leg.last = 0);
            w.maps.put_flow(key, flow).expect("written");
        }
        assert_eq!(w.sends(udp(POD, 53, OTHER, 53)), DROP, "revoked");
        assert_eq!(w.sends(udp(POD, 53, OTHER, 53)), NEXT, "begun anew by the pod");
        assert_eq!(w.gets(udp(OTHER, 53, POD, 53)), NEXT, "an answer");
    });
}

#[test]
fn ranges_and_the_classes_own_rules_decide_by_the_longest_match() {
    in_world(|w| {
        let egress = Direction::Egress;
        w.enforce(
            ISOLATED_EGRESS,
            &[
                deny(RuleKey::any(0, egress)),
                allow(RuleKey::protocol(0, egress, UDP)),
                deny(RuleKey::any(CLASS, egress)),
                allow(RuleKey::ports(CLASS, egress, TCP, 0x2000, 3)),
                deny(RuleKey::ports(CLASS, egress, TCP, 0x2010, 16)),
            ],
        );
        assert_eq!(w.sends(udp(POD, 1, STRANGER, 9)), NEXT);
        assert_eq!(
            w.sends(udp(POD, 1, OTHER, 9)),
            DROP,
            "its class does not take the others' rules"
        );
        assert_eq!(w.sends(tcp(POD, 1, OTHER, 0x2000, SYN)), NEXT);
        assert_eq!(w.sends(tcp(POD, 1, OTHER, 0x3fff, SYN)), NEXT);
        assert_eq!(w.sends(tcp(POD, 1, OTHER, 0x4000, SYN)), DROP);
        assert_eq!(w.sends(tcp(POD, 1, OTHER, 0x2010, SYN)), DROP);
    });
}

#[test]
fn what_goes_to_a_service_is_judged_by_its_translated_destination() {
    in_world(|w| {
        let rules = [
            deny(RuleKey::any(0, Direction::Egress)),
            deny(RuleKey::any(CLASS, Direction::Egress)),
            allow(RuleKey::ports(CLASS, Direction::Egress, TCP, 8080, 16)),
        ];
        w.enforce(ISOLATED_EGRESS, &rules);
        let (verdict, mark) =
            w.run(Hook::FromPod, &tcp(POD, 1000, SERVICE, 80, SYN).bytes(), 0, 0, w.pod);
        assert_eq!(verdict, NEXT);
        assert_ne!(mark & MARK_DEFERRED, 0, "somebody has to judge yet");
        let wire = |frame: Frame| w.run(Hook::ToWire, &frame.bytes(), w.pod, mark, WIRE);
        assert_eq!(wire(tcp(POD, 1000, OTHER, 8080, SYN)), (NEXT, 0), "allowed, and said once");
        assert_eq!(wire(tcp(POD, 1001, OTHER, 8081, SYN)).0, DROP, "another port of the endpoint");
        assert_eq!(
            wire(tcp(NODE, 50000, STRANGER, 8080, SYN)).0,
            DROP,
            "masqueraded makes no difference"
        );
        assert_eq!(
            w.gets(tcp(SERVICE, 80, POD, 1000, SYN | ACK)),
            NEXT,
            "the answer, translated back"
        );
        let host = tcp(NODE, 1, STRANGER, 1, SYN).bytes();
        assert_eq!(w.run(Hook::ToWire, &host, 0, mark, WIRE).0, NEXT, "the node's own");
        // Policy changes: the next packet after translation feels it.
        w.enforce(ISOLATED_EGRESS, &[deny(RuleKey::any(0, Direction::Egress))]);
        assert_eq!(
            w.run(Hook::FromPod, &tcp(POD, 1000, SERVICE, 80, ACK).bytes(), 0, 0, w.pod).0,
            NEXT
        );
        assert_eq!(
            w.run(Hook::ToWire, &tcp(POD, 1000, OTHER, 8080, ACK).bytes(), w.pod, mark, WIRE).0,
            DROP
        );
    });
}

#[test]
fn another_pod_of_the_node_behind_a_service_is_judged_for_both_ends() {
    in_world(|w| {
        let server = nix::net::if_::if_nametoindex("wire0").expect("made");
        let there = Endpoint {
            uid: 78,
            addr: OTHER.to_bits().to_be(),
            mac: [2, 0, 0, 0, 0, 7],
            state: state::READY,
            ..Endpoint::default()
        };
        w.maps.insert_endpoint(server, there).expect("inserted");
        let none = [deny(RuleKey::any(0, Direction::Egress))];
        w.enforce(ISOLATED_EGRESS, &none);
        let mark = w.run(Hook::FromPod, &tcp(POD, 1, SERVICE, 80, SYN).bytes(), 0, 0, w.pod).1;
        let arrives = tcp(POD, 1, OTHER, 8080, SYN).bytes();
        assert_eq!(
            w.run(Hook::ToPod, &arrives, w.pod, mark, server).0,
            DROP,
            "egress of the client"
        );
        w.enforce(0, &none);
        assert_eq!(w.run(Hook::ToPod, &arrives, w.pod, mark, server).0, NEXT);
        let itself = tcp(NODE, 1, POD, 8080, SYN).bytes();
        w.enforce(ISOLATED_EGRESS | ISOLATED_INGRESS, &none);
        assert_eq!(w.run(Hook::ToPod, &itself, WIRE, mark, w.pod).0, NEXT, "a pod reaches itself");
    });
}

#[test]
fn what_a_pod_is_not_it_cannot_say() {
    in_world(|w| {
        w.enforce(0, &[]);
        assert_eq!(w.sends(tcp(OTHER, 1, STRANGER, 1, SYN)), DROP, "another's address");
        let mac = Frame { from_mac: [2, 0, 0, 0, 0, 9], ..tcp(POD, 1, STRANGER, 1, SYN) };
        assert_eq!(w.sends(mac), DROP, "another's MAC");
        assert_eq!(w.sends(udp(POD, 1, Ipv4Addr::new(172, 31, 0, 2), 8472)), DROP, "VXLAN");
        assert_eq!(w.sends(udp(POD, 1, STRANGER, 8472)), NEXT, "to no node: just a port");
        assert_eq!(w.gets(tcp(OTHER, 1, STRANGER, 1, SYN)), DROP, "flooded, for another");
        let mut arp = vec![0xff; 6];
        arp.extend(MAC);
        arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        arp.extend(MAC);
        arp.extend(POD.octets());
        arp.extend([0; 6]);
        arp.extend(NODE.octets());
        arp.extend([0; 18]);
        assert_eq!(w.run(Hook::FromPod, &arp, 0, 0, w.pod).0, NEXT);
        arp[28..32].copy_from_slice(&NODE.octets());
        assert_eq!(w.run(Hook::FromPod, &arp, 0, 0, w.pod).0, DROP, "claims the gateway's address");
        assert_eq!(w.count(Direction::Egress, Reason::Spoof), 3);
        assert_eq!(w.run(Hook::FromPod, &arp, 0, 0, WIRE).0, DROP, "a link that nobody knows");
    });
}

#[test]
fn fragments_follow_their_first_part() {
    in_world(|w| {
        w.enforce(
            ISOLATED_INGRESS,
            &[
                deny(RuleKey::any(0, Direction::Ingress)),
                allow(RuleKey::ports(0, Direction::Ingress, UDP, 53, 16)),
            ],
        );
        let first = Frame { fragment: 0x2000, id: 9, ..udp(OTHER, 7, POD, 53) };
        let later = Frame { fragment: 0x0008, sport: 0xdead, dport: 0xbeef, ..first };
        assert_eq!(w.gets(later), DROP, "nobody knows its ports");
        assert_eq!(w.gets(first), NEXT);
        assert_eq!(w.gets(later), NEXT);
        let denied = Frame { id: 10, dport: 54, ..first };
        assert_eq!(w.gets(denied), DROP);
        assert_eq!(w.gets(Frame { id: 10, ..later }), DROP, "and so is its rest");
    });
}

#[test]
fn frames_cut_anywhere_never_pass_unparsed() {
    in_world(|w| {
        w.enforce(ISOLATED_INGRESS, &[allow(RuleKey::any(0, Direction::Ingress))]);
        let frame = tcp(OTHER, 1, POD, 80, SYN).bytes();
        // The kernel runs nothing shorter than an IP header.
        for len in 14 + 20..14 + 20 + 14 {
            assert_eq!(w.run(Hook::ToPod, &frame[..len], WIRE, 0, w.pod).0, DROP, "{len} bytes");
        }
        assert_eq!(w.gets(tcp(OTHER, 1, POD, 80, SYN)), NEXT);
    });
}

#[test]
fn programs_are_attached_once_and_survive_a_second_installation() {
    in_world(|w| {
        let on = |w: &World, hook| is_attached(&w.pins, "pod0", w.pod, hook).expect("asked");
        assert!(!on(w, Hook::FromPod));
        for hook in [Hook::FromPod, Hook::ToPod] {
            attach(&w.pins, "pod0", w.pod, hook).expect("attached");
            attach(&w.pins, "pod0", w.pod, hook).expect("attached again");
            assert!(on(w, hook));
        }
        let (_, programs) =
            SchedClassifier::query_tcx("pod0", aya::programs::TcAttachType::Ingress)
                .expect("asked");
        assert_eq!(programs.len(), 1, "one, not two");
        w.enforce(ISOLATED_INGRESS, &web_for_other());
        install(&w.pins).expect("installed again");
        assert!(on(w, Hook::FromPod) && on(w, Hook::ToPod));
        assert_eq!(w.gets(tcp(OTHER, 1, POD, 80, SYN)), NEXT, "maps stay");
        detach(&w.pins, w.pod).expect("detached");
        assert!(!on(w, Hook::FromPod));
        attach(&w.pins, "pod0", w.pod, Hook::FromPod).expect("attached right after");
        let gone = Command::new("ip").args(["link", "del", "pod0"]).status();
        assert!(gone.expect("ip starts").success());
        install(&w.pins).expect("installed over a link that is gone");
        sweep(&w.pins, |_| false).expect("swept");
    });
}

#[test]
fn what_a_build_with_another_layout_left_goes_once_it_is_not_needed() {
    in_world(|w| {
        let old = w.pins.folder().with_file_name("v0");
        std::fs::create_dir_all(old.join("links")).expect("made");
        let pin = |name: &str| {
            let path = w.pins.folder().join("programs/to_wire");
            let mut program = SchedClassifier::from_pin(path).expect("pinned");
            program.pin(old.join("links").join(name)).expect("pinned");
        };
        pin("7-to_wire");
        pin("7-from_pod");
        install(&w.pins).expect("installed beside it");
        assert!(old.join("links/7-to_wire").exists() && old.join("links/7-from_pod").exists());
        // What a pod sent that is not ours yet is judged by the program behind.
        let sent = tcp(POD, 1000, OTHER, 80, SYN).bytes();
        let mark = 999 << 16 | MARK_DEFERRED;
        assert_eq!(w.run(Hook::ToWire, &sent, w.pod, mark, WIRE), (NEXT, mark));
        assert!(retire_others(&w.pins).expect("retired"));
        install(&w.pins).expect("the agent starts again");
        assert_eq!(w.run(Hook::ToWire, &sent, w.pod, mark, WIRE).0, DROP, "nobody is behind");
        assert!(!old.exists() && w.pins.folder().exists());
        assert!(!retire_others(&w.pins).expect("nothing is left"));
    });
}

#[test]
fn a_map_of_another_layout_is_refused() {
    in_world(|w| {
        let path = w.pins.folder().join("maps/settings");
        std::fs::remove_file(&path).expect("removed");
        let other: aya::maps::Array<aya::maps::MapData, u64> =
            aya::maps::Array::create(7, 0).expect("made");
        other.pin(&path).expect("pinned");
        let error = install(&w.pins).err().expect("refused").to_string();
        assert!(error.contains("settings"), "{error}");
    });
}
