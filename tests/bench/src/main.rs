//! The overlay's speed as ratios: loopback, the bridge of one node, VXLAN made by hand as flanneld makes it, and our
//! overlay, in alternating rounds of one run.
//!
//! Absolute numbers follow the machine and what else it does; the ratios of one round hardly do, and their medians are
//! what counts. Needs root; makes namespaces of its own and touches nothing else.

mod load;
mod peers;
mod world;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;

use crate::load::Way;
use crate::world::{Node, Underlay, new_netns};

/// Remote nodes for the measurement of programming.
const MANY: u16 = 1000;

#[derive(Parser)]
#[command(about = "Measure the overlay against loopback and a VXLAN made by hand")]
struct Cli {
    /// Rounds; medians count
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Milliseconds of each single measurement
    #[arg(long, default_value_t = 400)]
    millis: u64,
}

/// A way that is measured.
const LOOPBACK: usize = 0;
const BRIDGE: usize = 1;
const BY_HAND: usize = 2;
const OURS: usize = 3;
const WAYS: [&str; 4] = ["loopback", "bridge, same node", "VXLAN by hand (flannel's)", "ours, fdb"];

/// What a way is loaded with.
#[derive(Debug, Clone, Copy)]
enum Load {
    /// TCP streams.
    Streams(usize),
    /// Small packets.
    Small,
    /// One byte there and back.
    PingPong,
}

const LOADS: [Load; 4] = [Load::Streams(1), Load::Streams(4), Load::Small, Load::PingPong];

/// A number that is taken of each way.
struct Kind {
    name: &'static str,
    unit: &'static str,
    /// For times.
    smaller_is_better: bool,
}

const KINDS: [Kind; 7] = [
    Kind { name: "TCP, 1 stream", unit: "Gbit/s", smaller_is_better: false },
    Kind { name: "TCP, 1 stream", unit: "Gbit/CPU-s", smaller_is_better: false },
    Kind { name: "TCP, 4 streams", unit: "Gbit/s", smaller_is_better: false },
    Kind { name: "TCP, 4 streams", unit: "Gbit/CPU-s", smaller_is_better: false },
    Kind { name: "UDP, 64 bytes", unit: "kpackets/s", smaller_is_better: false },
    Kind { name: "UDP, 64 bytes", unit: "kpackets/CPU-s", smaller_is_better: false },
    Kind { name: "TCP ping-pong", unit: "us", smaller_is_better: true },
];
/// What ours must reach of the one by hand (issue 4).
const AIM: f64 = 0.98;

type Numbers = [f64; KINDS.len()];

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let started = Instant::now();
    let time = Duration::from_millis(cli.millis);
    let rounds = cli.rounds.max(1);
    // Each overlay has an underlay of its own, so that the two share no port and no table.
    let (wire_1, wire_2) = (Underlay::new()?, Underlay::new()?);
    let by_hand = [Node::new(&wire_1, 1)?, Node::new(&wire_1, 2)?];
    let ours = [Node::new(&wire_2, 1)?, Node::new(&wire_2, 2)?];
    by_hand[0].join_by_hand(&by_hand[1])?;
    by_hand[1].join_by_hand(&by_hand[0])?;
    ours[0].join_by_agent(&ours[1])?;
    ours[1].join_by_agent(&ours[0])?;
    let alone = new_netns()?;
    let ways = [
        Way { from: &alone, to: &alone, address: IpAddr::V4(Ipv4Addr::LOCALHOST) },
        Way {
            from: &ours[0].pods[0].netns,
            to: &ours[0].pods[1].netns,
            address: IpAddr::V4(ours[0].pods[1].ip),
        },
        Way {
            from: &by_hand[0].pods[0].netns,
            to: &by_hand[1].pods[0].netns,
            address: IpAddr::V4(by_hand[1].pods[0].ip),
        },
        Way {
            from: &ours[0].pods[0].netns,
            to: &ours[1].pods[0].netns,
            address: IpAddr::V4(ours[1].pods[0].ip),
        },
    ];
    for (name, way) in WAYS.iter().zip(&ways) {
        way.check().with_context(|| format!("{name}: no connection"))?;
    }
    let mut all: Vec<[Numbers; WAYS.len()]> = Vec::new();
    for round in 0..rounds {
        let mut numbers = [Numbers::default(); WAYS.len()];
        for load in LOADS {
            // The two overlays stand between each other's halves, and the order turns, so that what the machine does
            // besides meets both alike.
            let (first, second) = if round % 2 == 0 { (BY_HAND, OURS) } else { (OURS, BY_HAND) };
            for at in [LOOPBACK, BRIDGE] {
                measure(&ways[at], load, time, 1.0, &mut numbers[at]).with_context(|| WAYS[at])?;
            }
            for at in [first, second, second, first] {
                measure(&ways[at], load, time / 2, 0.5, &mut numbers[at])
                    .with_context(|| WAYS[at])?;
            }
        }
        all.push(numbers);
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{rounds} alternating rounds of {} ms; medians, and medians of the rounds' ratios\n",
        cli.millis
    )?;
    report(&mut out, &all)?;
    report_peers(&mut out, rounds.min(7))?;
    writeln!(out, "\ntook {:.0} s", started.elapsed().as_secs_f64())?;
    Ok(())
}

/// Adds what one load achieves on one way to its numbers, by its share of the whole measurement.
fn measure(
    way: &Way<'_>,
    load: Load,
    time: Duration,
    share: f64,
    numbers: &mut Numbers,
) -> anyhow::Result<()> {
    let (first, values) = match load {
        Load::Streams(count) => {
            let rate = way.tcp(count, time)?;
            (if count == 1 { 0 } else { 2 }, vec![rate.per_second, rate.per_cpu_second])
        }
        Load::Small => {
            let rate = way.udp(time)?;
            (4, vec![rate.per_second, rate.per_cpu_second])
        }
        Load::PingPong => (6, vec![way.ping_pong(time)?.as_secs_f64() * 1e6]),
    };
    for (number, value) in numbers[first..].iter_mut().zip(values) {
        *number += value * share;
    }
    Ok(())
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => (values[count / 2 - 1] + values[count / 2]) / 2.0,
    }
}

fn report(out: &mut impl std::io::Write, all: &[[Numbers; WAYS.len()]]) -> anyhow::Result<()> {
    for (kind_at, kind) in KINDS.iter().enumerate() {
        writeln!(out, "{} [{}]", kind.name, kind.unit)?;
        for (at, name) in WAYS.iter().enumerate() {
            let value = median(all.iter().map(|round| round[at][kind_at]));
            let against = |other: usize| {
                median(all.iter().map(|round| round[at][kind_at] / round[other][kind_at]))
            };
            write!(out, "  {name:<28}{value:>9.2}   {:>5.2} x loopback", against(LOOPBACK))?;
            if at == OURS {
                let ratio = against(BY_HAND);
                // 2 % of a time are 2 % of a rate, the other way round.
                let reached =
                    if kind.smaller_is_better { ratio <= 1.0 / AIM } else { ratio >= AIM };
                let aim = if kind.smaller_is_better {
                    format!("aim <= {:.2}", 1.0 / AIM)
                } else {
                    format!("aim >= {AIM}")
                };
                let word = if reached { "reached" } else { "MISSED" };
                write!(out, "   {ratio:.3} x by hand ({aim}: {word})")?;
            }
            writeln!(out)?;
        }
    }
    Ok(())
}

fn report_peers(out: &mut impl std::io::Write, rounds: usize) -> anyhow::Result<()> {
    let mut took = Vec::new();
    for _ in 0..rounds {
        let underlay = Underlay::new()?;
        took.push(peers::program(&underlay, 1, MANY)?);
    }
    let millis = |pick: fn(&peers::Took) -> Duration| {
        median(took.iter().map(|one| pick(one).as_secs_f64() * 1e3))
    };
    let ratio = median(took.iter().map(|one| one.agent.as_secs_f64() / one.pipeline.as_secs_f64()));
    let word = if ratio <= 2.0 { "reached" } else { "MISSED" };
    writeln!(
        out,
        "\n{MANY} remote nodes [ms, {rounds} rounds]\n  bare messages in one pipeline  {:>8.1}\n  read, then the agent's batches {:>8.1}   {ratio:.2} x the pipeline (aim <= 2: {word})",
        millis(|one| one.pipeline),
        millis(|one| one.agent),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert!((median([4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < f64::EPSILON);
        assert!((median([9.0, 1.0, 3.0]) - 3.0).abs() < f64::EPSILON);
    }
}
