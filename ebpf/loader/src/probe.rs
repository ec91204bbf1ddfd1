//! What the programs on a node would do with the first packet of a connection, found out by running them.
//!
//! The very programs that are pinned, but over flows, fragments, counters and events of their own: asking leaves no trace,
//! and no flow that is known answers for the tables. Endpoints, classes, rules and addresses are the node's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::Ebpf;
use aya::maps::{Map, RingBuf};
use aya::programs::{ProgramInfo, SchedClassifier, TestRun, TestRunOptions};
use orch_ebpf_maps::{Direction, Endpoint, Event, Reason};

use crate::install::{OBJECT, loader};
use crate::maps::{REASON_COUNT, event};
use crate::{Error, Hook, Maps, Pins};

/// The node's own maps; the others are the probe's.
const SHARED: [&str; 7] =
    ["endpoints", "endpoint_cache", "slots", "class_maps", "tables", "addresses", "settings"];
/// Entries of the probe's own: it asks a few questions.
const OWN_ENTRIES: u32 = 64;
/// A ring has whole pages.
const OWN_RING_BYTES: u32 = 64 << 10;
/// `TC_ACT_UNSPEC`: go on.
const NEXT: u32 = u32::MAX;
const SYN: u8 = 0x02;
const SOURCE_PORT: u16 = 61_234;

/// A connection that begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Whose programs: the link of the pod.
    pub ifindex: u32,
    /// Whether the pod sends or receives.
    pub direction: Direction,
    /// The other end.
    pub peer: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Destination port.
    pub port: u16,
    /// Whether what comes was sent by the node itself.
    pub born_here: bool,
}

/// What the programs did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ran {
    /// Whether the packet passed.
    pub passed: bool,
    /// Why.
    pub reason: Reason,
    /// The rule that decided, 0 if none.
    pub rule: u32,
}

/// The programs with state of their own.
pub struct Probe(Ebpf);

impl Probe {
    /// Loads them beside those that are pinned.
    ///
    /// # Errors
    /// If there are none, if they are those of another build, or if the kernel refuses.
    pub fn load(pins: &Pins) -> Result<Self, Error> {
        let mut loader = loader();
        for name in SHARED {
            // A map that is not there would be made.
            if !pins.map(name).exists() {
                return Err(Error::Missing(format!("map {name}")));
            }
            loader.map_pin_path(name, pins.map(name));
        }
        loader.map_max_entries("flows", OWN_ENTRIES);
        loader.map_max_entries("fragments", OWN_ENTRIES);
        // Not of the programs that are asked, but made with the object.
        for name in ["fast_flows", "fast_flows6", "fast_tunnels", "fast_tunnels6"] {
            loader.map_max_entries(name, OWN_ENTRIES);
        }
        loader.map_max_entries("events", OWN_RING_BYTES);
        let mut object = loader.load(OBJECT).map_err(|error| Error::Load(Box::new(error)))?;
        for hook in [Hook::FromPod, Hook::ToPod] {
            let name = hook.program();
            let program = program(&mut object, hook)?;
            program.load().map_err(Error::program("load", name))?;
            let own = program.info().map_err(Error::program("look at", name))?.tag();
            let pinned = ProgramInfo::from_pin(pins.program(name))
                .map_err(Error::program("look at", name))?
                .tag();
            // The tag is the kernel's hash of the instructions.
            if own != pinned {
                return Err(Error::Missing(format!("program {name} of this build")));
            }
        }
        Ok(Self(object))
    }

    /// Runs the program of the direction; `None` if the link has no endpoint.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn ask(&mut self, maps: &Maps, question: &Question) -> Result<Option<Ran>, Error> {
        let Some(endpoint) = maps.endpoint(question.ifindex)? else { return Ok(None) };
        let (hook, ingress) = match question.direction {
            Direction::Egress => (Hook::FromPod, 0),
            // Any link will do, as long as it came in by one.
            Direction::Ingress if !question.born_here => (Hook::ToPod, question.ifindex),
            Direction::Ingress => (Hook::ToPod, 0),
        };
        let before = self.counts(question.direction)?;
        let frame = frame(&endpoint, question);
        let context = context(question.ifindex, ingress);
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let name = hook.program();
        let run =
            program(&mut self.0, hook)?.test_run(options).map_err(Error::program("run", name))?;
        let after = self.counts(question.direction)?;
        let grown = |(_, before, after): &(Reason, u64, u64)| after > before;
        let reasons = Reason::ALL.iter().zip(before.iter().zip(&after));
        let reason = reasons
            .map(|(reason, (before, after))| (*reason, *before, *after))
            .find(grown)
            .map(|(reason, ..)| reason)
            .ok_or_else(|| Error::Missing("count of the packet".to_owned()))?;
        let rule = self.last_event()?.map_or(0, |event| event.rule);
        Ok(Some(Ran { passed: run.return_value == NEXT, reason, rule }))
    }

    fn counts(&self, direction: Direction) -> Result<Vec<u64>, Error> {
        let map = self.map("counters")?;
        let counters: aya::maps::PerCpuArray<_, u64> =
            map.try_into().map_err(Error::map("open", "counters"))?;
        Reason::ALL
            .iter()
            .map(|reason| {
                let index = direction as u32 * REASON_COUNT + *reason as u32;
                let values = counters.get(&index, 0).map_err(Error::map("read", "counters"))?;
                Ok(values.iter().sum())
            })
            .collect()
    }

    fn last_event(&mut self) -> Result<Option<Event>, Error> {
        let map = self.0.map_mut("events").ok_or_else(|| Error::Missing("events".to_owned()))?;
        let mut ring = RingBuf::try_from(map).map_err(Error::map("open", "events"))?;
        let mut last = None;
        while let Some(item) = ring.next() {
            last = event(&item).or(last);
        }
        Ok(last)
    }

    fn map(&self, name: &str) -> Result<&Map, Error> {
        self.0.map(name).ok_or_else(|| Error::Missing(name.to_owned()))
    }
}

fn program(object: &mut Ebpf, hook: Hook) -> Result<&mut SchedClassifier, Error> {
    let name = hook.program();
    object
        .program_mut(name)
        .ok_or_else(|| Error::Missing(format!("program {name}")))?
        .try_into()
        .map_err(Error::program("use", name))
}

/// `struct __sk_buff` as a test run reads it: the words of `ingress_ifindex` and `ifindex`, the rest zero.
fn context(ifindex: u32, ingress: u32) -> [u8; 192] {
    let mut bytes = [0; 192];
    bytes[36..40].copy_from_slice(&ingress.to_ne_bytes());
    bytes[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    bytes
}

/// The first packet: Ethernet, IP, and so much of a transport header as the programs read.
fn frame(endpoint: &Endpoint, question: &Question) -> Vec<u8> {
    let protocol = question.protocol;
    // The gateway's; nobody looks at it.
    let mut frame = vec![2, 0, 0, 0, 0, 1];
    frame.extend(endpoint.mac);
    let turn = |own, peer| match question.direction {
        Direction::Egress => [own, peer],
        Direction::Ingress => [peer, own],
    };
    match question.peer {
        IpAddr::V4(peer) => {
            frame.extend([0x08, 0x00, 0x45, 0, 0, 60, 0, 1, 0, 0, 64, protocol, 0, 0]);
            let own = Ipv4Addr::from_bits(u32::from_be(endpoint.addr));
            frame.extend(turn(IpAddr::V4(own), IpAddr::V4(peer)).iter().flat_map(octets));
        }
        IpAddr::V6(peer) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 40, protocol, 64]);
            let own = Ipv6Addr::from(endpoint.addr6);
            frame.extend(turn(IpAddr::V6(own), IpAddr::V6(peer)).iter().flat_map(octets));
        }
    }
    frame.extend(SOURCE_PORT.to_be_bytes());
    frame.extend(question.port.to_be_bytes());
    frame.extend([0; 8]);
    frame.extend([0x50, SYN]);
    frame.extend([0; 26]);
    frame
}

fn octets(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
