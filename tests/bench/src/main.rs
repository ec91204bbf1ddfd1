//! The overlay's speed as ratios: loopback, the bridge of one node, VXLAN made by hand as flanneld makes it, and our
//! overlay, in alternating rounds of one run. The one by hand is there twice: how far the two are apart says how far a
//! ratio can be trusted. It is also there with conntrack, which masquerade and Services need and which costs more than all
//! else. Ours is there as it comes, with all rules and the fast path, and without each of them; and with BIG TCP, as it comes
//! where no node is reached in VXLAN.
//!
//! Absolute numbers follow the machine and what else it does; the ratios of one round hardly do, and their medians are
//! what counts. Needs root; makes namespaces of its own and touches nothing else.

mod idle;
mod load;
mod peers;
mod process;
mod world;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::load::Way;
use crate::world::{Node, Parts, Underlay, new_netns};

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
    /// Measure an idle agent alone, and print JSON: a process of its own does it
    #[arg(long, hide = true)]
    idle: bool,
}

/// A way that is measured.
const LOOPBACK: usize = 0;
const BRIDGE: usize = 1;
const BY_HAND: usize = 2;
const CONTROL: usize = 3;
const TRACKED: usize = 4;
const BARE: usize = 5;
const SLOW: usize = 6;
const SLOW_DIRECT: usize = 7;
const OURS: usize = 8;
const OURS_DIRECT: usize = 9;
const OURS_LARGE: usize = 10;
const BRIDGE_LARGE: usize = 11;
const WAYS: [&str; 12] = [
    "loopback",
    "bridge, same node",
    "VXLAN by hand (flannel's)",
    "the same, made once more",
    "the same, with conntrack",
    "ours, without its rules",
    "ours, fdb, fast path off",
    "ours, direct, fast path off",
    "ours, fdb",
    "ours, direct",
    "ours, direct, BIG TCP",
    "ours, same node, BIG TCP",
];
/// They are compared with each other, so each has its turn both early and late.
const OVERLAYS: [usize; 9] =
    [BY_HAND, CONTROL, TRACKED, BARE, SLOW, SLOW_DIRECT, OURS, OURS_DIRECT, OURS_LARGE];

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
const STREAMS_PER_CPU: [usize; 2] = [1, 3];
const PING_PONG: usize = 6;

/// What a way must reach of another one (issue 4).
struct Aim {
    way: usize,
    against: usize,
    /// Of times if it is the last kind's alone, else of rates; 2 % of a time are 2 % of a rate, the other way round.
    ratio: f64,
    of: Of,
}

/// The kinds that an aim is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    All,
    RoundTrips,
    StreamsPerCpu,
}

const AIMS: [Aim; 5] = [
    Aim { way: OURS, against: BY_HAND, ratio: 0.98, of: Of::All },
    Aim { way: OURS, against: BY_HAND, ratio: 0.88, of: Of::RoundTrips },
    Aim { way: OURS_DIRECT, against: LOOPBACK, ratio: 1.35, of: Of::RoundTrips },
    Aim { way: OURS_LARGE, against: OURS_DIRECT, ratio: 1.8, of: Of::StreamsPerCpu },
    Aim { way: BRIDGE_LARGE, against: BRIDGE, ratio: 1.8, of: Of::StreamsPerCpu },
];

impl Aim {
    fn measures(&self, kind: usize) -> bool {
        match self.of {
            Of::All => true,
            Of::RoundTrips => kind == PING_PONG,
            Of::StreamsPerCpu => STREAMS_PER_CPU.contains(&kind),
        }
    }

    fn verdict(&self, ratio: f64, kind: &Kind) -> String {
        let is_time_among_rates = self.of == Of::All && kind.smaller_is_better;
        let limit = if is_time_among_rates { 1.0 / self.ratio } else { self.ratio };
        let (sign, reached) =
            if kind.smaller_is_better { ("<=", ratio <= limit) } else { (">=", ratio >= limit) };
        let word = if reached { "reached" } else { "MISSED" };
        format!("{ratio:.2} x {}, aim {sign} {limit:.2}: {word}", WAYS[self.against])
    }
}

type Numbers = [f64; KINDS.len()];

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    if cli.idle {
        let idle = idle::found(MANY)?;
        return Ok(serde_json::to_writer(std::io::stdout(), &idle)?);
    }
    let started = Instant::now();
    let time = Duration::from_millis(cli.millis);
    let rounds = cli.rounds.max(1);
    let root = private_folder()?;
    // Each overlay has an underlay of its own, so that they share no port and no table.
    let (mut pairs, mut wires) = (Vec::new(), Vec::new());
    for way in OVERLAYS {
        let wire = Underlay::new()?;
        let node = |number| {
            Node::new(&wire, number, root.path().join(format!("{way}-{number}")))
                .with_context(|| WAYS[way])
        };
        let [one, other] = [node(1)?, node(2)?];
        let parts = Parts {
            rules: way != BARE,
            direct: [SLOW_DIRECT, OURS_DIRECT, OURS_LARGE].contains(&way),
            fast: [OURS, OURS_DIRECT, OURS_LARGE].contains(&way),
        };
        for (one, other) in [(&one, &other), (&other, &one)] {
            match way {
                BY_HAND | CONTROL => one.join_by_hand(other),
                TRACKED => one.join_by_hand(other).and_then(|()| one.track()),
                _ => one.join_by_agent(other, parts),
            }
            .with_context(|| WAYS[way])?;
        }
        if way == OURS_LARGE {
            [&one, &other].into_iter().try_for_each(|node| node.enlarge(&wire))?;
        }
        pairs.push([one, other]);
        wires.push(wire);
    }
    let alone = new_netns()?;
    let pod = |pair: usize, node: usize, pod: usize| &pairs[pair][node].pods[pod];
    let mut ways = vec![
        Way { from: &alone, to: &alone, address: IpAddr::V4(Ipv4Addr::LOCALHOST) },
        Way {
            from: &pod(0, 0, 0).netns,
            to: &pod(0, 0, 1).netns,
            address: IpAddr::V4(pod(0, 0, 1).ip),
        },
    ];
    ways.extend((0..OVERLAYS.len()).map(|pair| Way {
        from: &pod(pair, 0, 0).netns,
        to: &pod(pair, 1, 0).netns,
        address: IpAddr::V4(pod(pair, 1, 0).ip),
    }));
    let large = OURS_LARGE - BY_HAND;
    ways.push(Way {
        from: &pod(large, 0, 0).netns,
        to: &pod(large, 0, 1).netns,
        address: IpAddr::V4(pod(large, 0, 1).ip),
    });
    for (name, way) in WAYS.iter().zip(&ways) {
        way.check().with_context(|| format!("{name}: no connection"))?;
    }
    let mut all: Vec<[Numbers; WAYS.len()]> = Vec::new();
    for round in 0..rounds {
        let mut numbers = [Numbers::default(); WAYS.len()];
        for load in LOADS {
            // The overlays stand between each other's halves, and the order turns, so that what the machine does
            // besides meets all alike.
            for at in [LOOPBACK, BRIDGE, BRIDGE_LARGE] {
                measure(&ways[at], load, time, 1.0, &mut numbers[at]).with_context(|| WAYS[at])?;
            }
            let mut order = OVERLAYS;
            order.rotate_left(round % OVERLAYS.len());
            for at in order.into_iter().chain(order.into_iter().rev()) {
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
    report_peers(&mut out, rounds.clamp(4, 10))?;
    report_idle(&mut out)?;
    writeln!(out, "\ntook {:.0} s", started.elapsed().as_secs_f64())?;
    Ok(())
}

/// A folder for pinned programs, in a mount namespace of this process, so that nothing stays mounted.
fn private_folder() -> anyhow::Result<tempfile::TempDir> {
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace: is this root?")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("keep mounts private")?;
    tempfile::tempdir().context("make a folder for pinned programs")
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
            if at > BY_HAND {
                write!(out, "   {:.3} x by hand", against(BY_HAND))?;
            }
            for aim in AIMS.iter().filter(|aim| aim.way == at && aim.measures(kind_at)) {
                write!(out, " ({})", aim.verdict(against(aim.against), kind))?;
            }
            writeln!(out)?;
        }
    }
    Ok(())
}

fn report_peers(out: &mut impl std::io::Write, rounds: usize) -> anyhow::Result<()> {
    let mut took = Vec::new();
    for round in 0..rounds {
        took.push(peers::program(&Underlay::new()?, MANY, round % 2 == 1)?);
    }
    let millis = |pick: fn(&peers::Both) -> Duration| {
        median(took.iter().map(|one| pick(one).as_secs_f64() * 1e3))
    };
    let ratio = |agent: fn(&peers::Both) -> Duration, pipeline: fn(&peers::Both) -> Duration| {
        median(took.iter().map(|one| agent(one).as_secs_f64() / pipeline(one).as_secs_f64()))
    };
    let cpu = ratio(|one| one.agent.cpu, |one| one.pipeline.cpu);
    let word = if cpu <= 2.0 { "reached" } else { "MISSED" };
    writeln!(
        out,
        "\n{MANY} remote nodes [ms of this thread's CPU, of the wall clock; {rounds} rounds]"
    )?;
    writeln!(
        out,
        "  bare messages in one pipeline  {:>8.1} {:>8.1}",
        millis(|one| one.pipeline.cpu),
        millis(|one| one.pipeline.wall),
    )?;
    writeln!(
        out,
        "  read, then the agent's batches {:>8.1} {:>8.1}   {cpu:.2} x the pipeline (aim <= 2: {word}); by the wall clock {:.2} x",
        millis(|one| one.agent.cpu),
        millis(|one| one.agent.wall),
        ratio(|one| one.agent.wall, |one| one.pipeline.wall),
    )?;
    Ok(())
}

fn report_idle(out: &mut impl std::io::Write) -> anyhow::Result<()> {
    let idle = idle::measure()?;
    let word = |reached| if reached { "reached" } else { "MISSED" };
    writeln!(
        out,
        "  idle agent: memory [MiB]       {:>8.1}   {:.1} of it heaps and stacks (aim <= 25: {})",
        idle.resident_mib,
        idle.anonymous_mib,
        word(idle.resident_mib <= 25.0)
    )?;
    writeln!(
        out,
        "  idle agent: of a core [%]      {:>8.2}   (aim <= 0.5: {})",
        idle.cpu_percent,
        word(idle.cpu_percent <= 0.5)
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
