//! What the programs take for one packet, by test runs in the kernel: nearly free of noise, so a few nanoseconds show.

use std::net::Ipv4Addr;

use anyhow::{Context as _, ensure};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use cni_netlink::{MacBytes, NetNs};
use orch_ebpf_loader::{Hook, Pins};

/// Runs of one measurement, and measurements of which the shortest counts.
const RUNS: u32 = 300_000;
const TIMES: usize = 7;
/// `TC_ACT_UNSPEC`: go on.
const NEXT: u32 = u32::MAX;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const CLIENT_PORT: u16 = 40_000;
const SERVER_PORT: u16 = 8080;

/// A pod at one end.
#[derive(Clone, Copy)]
pub(crate) struct End {
    pub(crate) link: u32,
    pub(crate) mac: MacBytes,
    pub(crate) ip: Ipv4Addr,
}

/// Names and nanoseconds of the packets of a connection.
pub(crate) fn packets(
    pins: &Pins,
    node: &NetNs,
    client: End,
    server: End,
) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let program = |hook: Hook| SchedClassifier::from_pin(pins.program(hook.program()));
    let (from_pod, to_pod) = (program(Hook::FromPod)?, program(Hook::ToPod)?);
    let there = |flags| frame((client, CLIENT_PORT), (server, SERVER_PORT), flags);
    let back = frame((server, SERVER_PORT), (client, CLIENT_PORT), ACK);
    // What is received came in by the other one's link.
    let cases = [
        ("first, sent", &from_pod, there(SYN), client.link, 0),
        ("first, received", &to_pod, there(SYN), server.link, client.link),
        ("known, sent", &from_pod, there(ACK), client.link, 0),
        ("known, received", &to_pod, there(ACK), server.link, client.link),
        ("answer, sent", &from_pod, back.clone(), server.link, 0),
        ("answer, received", &to_pod, back, client.link, server.link),
    ];
    // A test run looks for its link in the namespace of who asks.
    node.run(|| {
        let mut shortest = [f64::INFINITY; 6];
        for _ in 0..TIMES {
            for ((name, program, frame, link, ingress), shortest) in cases.iter().zip(&mut shortest)
            {
                let context = context(*link, *ingress);
                let options = TestRunOptions {
                    data_in: Some(frame),
                    ctx_in: Some(&context),
                    repeat: RUNS,
                    ..TestRunOptions::default()
                };
                let run = program.test_run(options).context(*name)?;
                ensure!(run.return_value == NEXT, "dropped: {name}");
                *shortest = shortest.min(run.duration.as_secs_f64() * 1e9);
            }
        }
        Ok(cases.iter().zip(shortest).map(|(case, time)| (case.0, time)).collect())
    })
}

/// `struct __sk_buff` as a test run reads it: the words of `ingress_ifindex` and `ifindex`, the rest zero.
fn context(link: u32, ingress: u32) -> [u8; 192] {
    let mut bytes = [0; 192];
    bytes[36..40].copy_from_slice(&ingress.to_ne_bytes());
    bytes[40..44].copy_from_slice(&link.to_ne_bytes());
    bytes
}

fn frame((from, sport): (End, u16), (to, dport): (End, u16), flags: u8) -> Vec<u8> {
    let mut frame = [to.mac, from.mac].concat();
    frame.extend([0x08, 0x00, 0x45, 0, 0, 60, 0, 1, 0, 0, 64, 6, 0, 0]);
    frame.extend(from.ip.octets());
    frame.extend(to.ip.octets());
    frame.extend(sport.to_be_bytes());
    frame.extend(dport.to_be_bytes());
    frame.extend([0; 8]);
    frame.extend([0x50, flags]);
    frame.extend([0; 26]);
    frame
}
