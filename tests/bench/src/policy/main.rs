//! What NetworkPolicies cost, as ratios: no policy, our programs with one and with many rules, an nftables set and a list
//! of nftables rules, in alternating rounds of one run. Without policy is there twice: how far the two are apart says how
//! far a ratio can be trusted. Beside it: how fast a change is in force, what the agent and its compiler need for a big
//! cluster, and what the way through a Service costs.
//!
//! Absolute numbers follow the machine and what else it does; the medians of the rounds' ratios are what counts. Needs
//! root; makes namespaces of its own and touches nothing else.

mod agent;
mod connect;
#[path = "../load.rs"]
mod load;
mod objects;
#[path = "../process.rs"]
mod process;
mod programs;
mod services;
mod world;

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;

use crate::agent::Found;
use crate::connect::{connects, with_sink};
use crate::world::{Judge, SERVER, Site};

const MANY: usize = 10_000;
const FEW_SERVICES: usize = 10;
const MANY_SERVICES: usize = 5000;

#[derive(Parser)]
#[command(about = "Measure what NetworkPolicies and Services cost")]
struct Cli {
    /// Rounds; medians count
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Milliseconds of each single measurement
    #[arg(long, default_value_t = 400)]
    millis: u64,
    /// Changes of each kind whose way into the kernel is timed
    #[arg(long, default_value_t = 100)]
    changes: usize,
    /// Measure the agent alone, and print JSON: a process of its own does it
    #[arg(long, hide = true)]
    agent: bool,
}

/// A way that is measured; its ratios are to one that has no policy, which is itself none of its ratios.
const OFF: usize = 0;
const CONTROL: usize = 1;
const RULES: usize = 4;
const WAYS: [(&str, Judge); 8] = [
    ("no policy", Judge::Nobody),
    ("the same, made once more", Judge::Nobody),
    ("ours, 1 rule", Judge::Programs(1)),
    ("ours, 10,000 rules", Judge::Programs(MANY)),
    ("a node's rules, no policy", Judge::Rules),
    ("ours, 10,000, as on a node", Judge::Fast(MANY)),
    ("nftables, set of 10,000", Judge::Set(MANY)),
    ("nftables, 10,000 rules", Judge::Linear(MANY)),
];

/// A number that is taken of each way.
struct Kind {
    name: &'static str,
    unit: &'static str,
    smaller_is_better: bool,
    /// What ours must reach of no policy (issue 5), if anything.
    aim: Option<f64>,
}

const KINDS: [Kind; 5] = [
    Kind { name: "TCP, 1 stream", unit: "Gbit/s", smaller_is_better: false, aim: Some(0.97) },
    Kind { name: "TCP, 1 stream", unit: "Gbit/CPU-s", smaller_is_better: false, aim: None },
    Kind { name: "UDP, 64 bytes", unit: "kpackets/CPU-s", smaller_is_better: false, aim: None },
    Kind { name: "TCP ping-pong", unit: "us", smaller_is_better: true, aim: Some(0.97) },
    Kind { name: "new connections", unit: "1/s", smaller_is_better: false, aim: Some(0.93) },
];

type Numbers = [f64; KINDS.len()];

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    world::leave_mounts()?;
    if cli.agent {
        // As the daemon does: its memory is what is asked for.
        orch_telemetry::share_heaps();
        let found = agent::measure(cli.changes.max(2))?;
        return Ok(serde_json::to_writer(std::io::stdout(), &found)?);
    }
    let started = Instant::now();
    let (rounds, time) = (cli.rounds.max(1), Duration::from_millis(cli.millis));
    let sites =
        WAYS.iter().map(|(_, judge)| Site::new(*judge)).collect::<anyhow::Result<Vec<Site>>>()?;
    let mut all: Vec<[Numbers; WAYS.len()]> = Vec::new();
    for round in 0..rounds {
        let mut numbers = [Numbers::default(); WAYS.len()];
        // Each has its turn both early and late, and the order turns, so that what the machine does besides meets all.
        let mut order: Vec<usize> = (0..WAYS.len()).collect();
        order.rotate_left(round % WAYS.len());
        for at in order.iter().chain(order.iter().rev()) {
            measure(&sites[*at], time / 2, &mut numbers[*at]).with_context(|| WAYS[*at].0)?;
        }
        all.push(numbers);
    }
    for (site, (name, _)) in sites.iter().zip(&WAYS) {
        site.check().context(*name)?;
    }
    let packets = sites.iter().map(Site::packets).collect::<anyhow::Result<Vec<_>>>()?;
    drop(sites);
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{rounds} alternating rounds of {} ms; medians, and medians of the rounds' ratios\n",
        cli.millis
    )?;
    report(&mut out, &all)?;
    report_packets(&mut out, &packets)?;
    report_services(&mut out, rounds, time)?;
    report_agent(&mut out, &agent_apart(cli.changes)?)?;
    writeln!(out, "\ntook {:.0} s", started.elapsed().as_secs_f64())?;
    Ok(())
}

/// Adds half of a measurement.
fn measure(site: &Site, time: Duration, numbers: &mut Numbers) -> anyhow::Result<()> {
    let way = site.way();
    way.check().context("no connection")?;
    let stream = way.tcp(1, time)?;
    let small = way.udp(time / 2)?;
    let round_trip = way.ping_pong(time / 2)?;
    let opened = with_sink(way.to, SERVER.into(), |at| connects(way.from, |_| at, time))?;
    // Of the median: one that had to wait for the processor says nothing of policies.
    let typical = median(opened.iter().map(Duration::as_secs_f64));
    let values = [
        stream.per_second,
        stream.per_cpu_second,
        small.per_cpu_second,
        round_trip.as_secs_f64() * 1e6,
        1.0 / typical,
    ];
    for (number, value) in numbers.iter_mut().zip(values) {
        *number += value / 2.0;
    }
    Ok(())
}

/// Of an even number, between the two in the middle.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    percentile(values, 0.5)
}

/// The value below which this share of all lies.
fn percentile(values: impl IntoIterator<Item = f64>, share: f64) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
    let place = share * last as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    values[low] + (values[high] - values[low]) * place.fract()
}

fn word(reached: bool) -> &'static str {
    if reached { "reached" } else { "MISSED" }
}

fn report(out: &mut impl std::io::Write, all: &[[Numbers; WAYS.len()]]) -> anyhow::Result<()> {
    for (kind_at, kind) in KINDS.iter().enumerate() {
        writeln!(out, "{} [{}]", kind.name, kind.unit)?;
        for (at, (name, judge)) in WAYS.iter().enumerate() {
            let value = median(all.iter().map(|round| round[at][kind_at]));
            let base = if matches!(judge, Judge::Fast(_)) { RULES } else { OFF };
            let ratio = median(all.iter().map(|round| round[at][kind_at] / round[base][kind_at]));
            write!(out, "  {name:<28}{value:>10.2}")?;
            if at != OFF {
                write!(out, "   {ratio:.3} x {}", WAYS[base].0)?;
            }
            match (kind.aim, judge) {
                (Some(aim), Judge::Programs(_) | Judge::Fast(_)) if kind.smaller_is_better => {
                    let most = 1.0 / aim;
                    write!(out, " (aim <= {most:.2}: {})", word(ratio <= most))?;
                }
                (Some(aim), Judge::Programs(_) | Judge::Fast(_)) => {
                    write!(out, " (aim >= {aim:.2}: {})", word(ratio >= aim))?;
                }
                _ if at == CONTROL => write!(out, " (1 if this could be measured exactly)")?,
                _ => {}
            }
            writeln!(out)?;
        }
    }
    Ok(())
}

/// Beside what the whole way costs.
fn report_packets(
    out: &mut impl std::io::Write,
    packets: &[Vec<(&'static str, f64)>],
) -> anyhow::Result<()> {
    writeln!(out, "a packet, by test runs of the programs [ns; the shortest of some]")?;
    for ((name, _), packets) in WAYS.iter().zip(packets).filter(|(_, packets)| !packets.is_empty())
    {
        write!(out, "  {name:<28}")?;
        for (packet, time) in packets {
            write!(out, "  {packet} {time:.0}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn report_services(
    out: &mut impl std::io::Write,
    rounds: usize,
    time: Duration,
) -> anyhow::Result<()> {
    writeln!(out, "connect through a Service, nftables [us; {rounds} rounds]")?;
    let sites = [services::Site::new(FEW_SERVICES)?, services::Site::new(MANY_SERVICES)?];
    let mut taken = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (site, taken) in sites.iter().zip(&mut taken) {
            taken.push(site.measure(time)?);
        }
    }
    let mut costs = Vec::new();
    for (count, taken) in [FEW_SERVICES, MANY_SERVICES].into_iter().zip(&taken) {
        let direct = median(taken.iter().map(|[direct, _]| *direct));
        let through = median(taken.iter().map(|[_, through]| *through));
        let cost = median(taken.iter().map(|[direct, through]| through - direct));
        costs.push(cost);
        writeln!(
            out,
            "  {count:>5} Services   direct {direct:>7.1}   through {through:>7.1}   {cost:>5.1} more (aim <= 5: {})",
            word(cost <= 5.0)
        )?;
    }
    let apart = costs[1] - costs[0];
    writeln!(out, "  flat: {apart:.1} us apart (aim <= 2: {})", word(apart.abs() <= 2.0))?;
    Ok(())
}

/// The agent is measured in a process of its own.
fn agent_apart(changes: usize) -> anyhow::Result<Found> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--agent", "--changes", &changes.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .context("start the process that measures the agent")?;
    ensure!(output.status.success(), "the process that measures the agent failed");
    serde_json::from_slice(&output.stdout).context("what the agent's process said")
}

fn report_agent(out: &mut impl std::io::Write, found: &Found) -> anyhow::Result<()> {
    writeln!(out, "1,000 pods (100 on the node), 500 policies")?;
    let compile = found.compile_millis;
    writeln!(
        out,
        "  compiled from nothing              {compile:>8.1} ms (aim <= 1000: {})",
        word(compile <= 1000.0)
    )?;
    writeln!(out, "  agent started until all in force   {:>8.1} ms", found.start_millis)?;
    let mib = found.agent_mib;
    writeln!(
        out,
        "  memory of the agent                {mib:>8.1} MiB (aim <= 60: {})",
        word(mib <= 60.0)
    )?;
    for (what, times) in [
        ("policy changed, in force after", &found.policy_edits),
        ("label of a pod, in force after", &found.label_changes),
        ("label of a peer, in force after", &found.peer_changes),
    ] {
        let at = |share| percentile(times.iter().copied(), share);
        let worst = at(0.99);
        writeln!(
            out,
            "  {what:<35}{:>8.1} ms   p99 {worst:.1} ms (aim <= 100: {})",
            at(0.5),
            word(worst <= 100.0)
        )?;
    }
    for (what, written) in
        [("a pod's own label", found.label_rows), ("a peer's label", found.peer_rows)]
    {
        writeln!(out, "  rows that {what:<18} wrote    {written:>8} of {}", agent::LOCAL)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_values() {
        assert!((median([4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < f64::EPSILON);
        assert!((percentile((1..=101).map(f64::from), 0.99) - 100.0).abs() < 1e-9);
        assert!(percentile([], 0.5).is_nan());
    }
}
