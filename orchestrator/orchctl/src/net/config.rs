//! `orchctl net config`: the network's settings in etcd, which every agent follows at once.
//!
//! A change is checked as the agents check it, and what it does to running pods is said before it is made; what moves
//! pods' addresses wants `--yes`. It is written with a compare, so that two people do not overwrite each other, and waited
//! for: each agent that can be looked into from here says whether it follows.

mod edit;

use std::net::Ipv4Addr;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use etcd_client::{Client, Compare, CompareOp, Txn, TxnOp};
use ipnetwork::{Ipv4Network, Ipv6Network};
use orch_config::network::{Ipv4Config, Mode, NetworkConfig, Switch};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use self::edit::edited;
use super::hosts::Hosts;
use super::leases::{self, CALL_LIMIT, Leases};
use super::status::NetStatus;
use super::{Flags, Format, print_json, statuses};
use crate::output;

/// Between two looks at whether the agents follow; they write their status about five times a second.
const LOOK: Duration = Duration::from_millis(200);

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// The settings, and which node follows them
    #[command(after_help = "Example: orchctl net config get -o json")]
    Get(Flags),
    /// Change settings; every agent follows at once, and running connections go on where the effect does not say
    /// otherwise
    #[command(after_help = "Example: orchctl net config set --mode host-gw --dry-run")]
    Set(Set),
}

#[derive(clap::Args)]
pub(crate) struct Set {
    #[command(flatten)]
    change: Change,
    /// Say what the change would do, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Do it also if running pods lose their addresses
    #[arg(long)]
    yes: bool,
    /// Wait this long for the nodes to follow; 0 does not wait
    #[arg(long, value_name = "SECONDS", default_value_t = 15)]
    wait: u64,
    #[command(flatten)]
    flags: Flags,
}

/// What is to be different; what is not named stays.
#[derive(clap::Args, Debug, Clone, Default)]
#[group(required = true, multiple = true)]
struct Change {
    /// How packets get to other nodes
    #[arg(long, value_enum)]
    mode: Option<ModeName>,
    /// The short way through a node for packets of known flows (eBPF; Linux 6.6, nodes that enforce NetworkPolicies)
    #[arg(long, value_enum)]
    fast_path: Option<SwitchName>,
    /// IPv4 packets of pods larger than 64 KiB before they are cut into frames (Linux 6.3), where no other node is reached
    /// in VXLAN
    #[arg(long, value_enum)]
    big_tcp: Option<SwitchName>,
    /// Network that the nodes' subnets are cut from; `none` leaves IPv6 alone
    #[arg(long, value_name = "CIDR|none", value_parser = parse_family::<Ipv4Network>)]
    network: Option<Family<Ipv4Network>>,
    /// Prefix length of a node's subnet
    #[arg(long, value_name = "BITS")]
    subnet_len: Option<u8>,
    /// First subnet that nodes may have
    #[arg(long, value_name = "ADDRESS")]
    subnet_min: Option<Ipv4Addr>,
    /// Last subnet that nodes may have
    #[arg(long, value_name = "ADDRESS")]
    subnet_max: Option<Ipv4Addr>,
    /// VXLAN network identifier
    #[arg(long)]
    vni: Option<u32>,
    /// UDP port of VXLAN
    #[arg(long)]
    port: Option<u16>,
    /// IPv6 network; `none` ends dual stack
    #[arg(long, value_name = "CIDR|none", value_parser = parse_family::<Ipv6Network>)]
    ipv6_network: Option<Family<Ipv6Network>>,
    /// Prefix length of a node's IPv6 subnet
    #[arg(long, value_name = "BITS")]
    ipv6_subnet_len: Option<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ModeName {
    /// In VXLAN, always
    Vxlan,
    /// As they are to nodes on the same link, in VXLAN to others
    DirectRouting,
    /// As they are; all nodes share a link, and pods get the whole MTU
    HostGw,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SwitchName {
    /// Where a node can; so it is in a new network
    Auto,
    /// On every node; one that cannot says so
    On,
    /// Nowhere
    Off,
}

impl From<SwitchName> for Switch {
    fn from(name: SwitchName) -> Self {
        match name {
            SwitchName::Auto => Self::Auto,
            SwitchName::On => Self::On,
            SwitchName::Off => Self::Off,
        }
    }
}

impl From<ModeName> for Mode {
    fn from(name: ModeName) -> Self {
        match name {
            ModeName::Vxlan => Self::Vxlan,
            ModeName::DirectRouting => Self::DirectRouting,
            ModeName::HostGw => Self::HostGw,
        }
    }
}

/// A network of one family, or that there is to be none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family<N> {
    None,
    Network(N),
}

fn parse_family<N: FromStr>(text: &str) -> Result<Family<N>, String> {
    match text {
        "none" => Ok(Family::None),
        text => text.parse().map(Family::Network).map_err(|_| {
            "expected a CIDR of the family, such as 10.244.0.0/16 or fd00:10:244::/48, or none"
                .to_owned()
        }),
    }
}

/// What a change means for those who live in the network.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Effect {
    text: String,
    /// Running pods lose their addresses.
    breaks: bool,
}

/// The settings as etcd holds them.
struct Stored {
    json: Vec<u8>,
    revision: i64,
}

/// Runs one command; returns the exit code.
///
/// # Errors
/// etcd is away, the settings cannot be used, or somebody else changed them meanwhile.
pub(super) async fn run(command: Command, lab_dir: &Path) -> anyhow::Result<u8> {
    match command {
        Command::Get(flags) => {
            let hosts = Hosts::find(lab_dir, flags.etcd.clone())?;
            get(&Etcd::open(&hosts).await?, &hosts, flags.output).await
        }
        Command::Set(set) => {
            let hosts = Hosts::find(lab_dir, set.flags.etcd.clone())?;
            change(&Etcd::open(&hosts).await?, &hosts, &set).await
        }
    }
}

/// The network's part of etcd.
struct Etcd {
    client: Client,
    urls: Vec<String>,
    pki: std::path::PathBuf,
}

impl Etcd {
    async fn open(hosts: &Hosts) -> anyhow::Result<Self> {
        let (urls, pki) = hosts.etcd()?;
        Ok(Self { client: leases::connect(&urls, &pki).await?, urls, pki })
    }

    fn key() -> String {
        format!("{}/config", orch_config::ETCD_NETWORK_PREFIX)
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        call: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> anyhow::Result<T> {
        let urls = self.urls.join(",");
        let answer = timeout(CALL_LIMIT, call).await;
        answer.with_context(|| format!("{verb}: etcd at {urls} does not answer"))?.context(verb)
    }

    async fn read(&self) -> anyhow::Result<Stored> {
        let answer =
            self.call("read the settings", self.client.kv_client().get(Self::key(), None)).await?;
        match answer.kvs().first() {
            Some(kv) => Ok(Stored { json: kv.value().to_vec(), revision: kv.mod_revision() }),
            None => Err(output::hinted(
                "the first agent that starts writes them; start one",
                format!("etcd has no {}: there are no settings yet", Self::key()),
            )),
        }
    }

    /// # Errors
    /// Somebody changed it since it was read.
    async fn write(&self, before: &Stored, json: Vec<u8>) -> anyhow::Result<()> {
        let key = Self::key();
        let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, before.revision);
        let txn = Txn::new().when([unchanged]).and_then([TxnOp::put(key, json, None)]);
        let answer = self.call("write the settings", self.client.kv_client().txn(txn)).await?;
        if answer.succeeded() {
            return Ok(());
        }
        Err(output::hinted(
            "look at them with `orchctl net config get`, and set yours again",
            "somebody else changed the settings at the same time; nothing was written",
        ))
    }

    async fn leases(&self) -> anyhow::Result<Leases> {
        leases::read(&self.urls, &self.pki, orch_config::ETCD_NETWORK_PREFIX).await
    }
}

async fn get(etcd: &Etcd, hosts: &Hosts, format: Option<Format>) -> anyhow::Result<u8> {
    let stored = etcd.read().await?;
    let config = NetworkConfig::parse(&stored.json).map_err(|error| {
        output::hinted(
            "the agents stay with the last settings that they could use; set right ones with `orchctl net config set`",
            format!("{error}; etcd holds: {}", String::from_utf8_lossy(&stored.json)),
        )
    })?;
    let held = etcd.leases().await?.leases.len();
    // Away from nodes and lab the settings are worth a look, too.
    let hosts = hosts.all().unwrap_or_default();
    let all = statuses(&hosts);
    let follow =
        |status: &Option<NetStatus>| status.as_ref().is_some_and(|one| follows(one, &config));
    let well = all.iter().all(|(_, status)| follow(status));
    if format == Some(Format::Json) {
        let json: Value = serde_json::from_slice(&stored.json)?;
        let nodes: Vec<_> = all
            .iter()
            .map(|(host, status)| json!({"name": host.name, "follows": follow(status)}))
            .collect();
        print_json(&json!({
            "mode": config.mode.name(),
            "revision": stored.revision,
            "config": json,
            "nodes": nodes,
        }))?;
        return Ok(u8::from(!well));
    }
    for line in describe(&config, held) {
        output::line(&line)?;
    }
    if !all.is_empty() {
        output::line("")?;
        output::table(&["NODE", "FOLLOWS", "MODE", "SUBNET", "POD MTU"], rows(&all, &config))?;
    }
    Ok(u8::from(!well))
}

fn rows(
    all: &[(&super::Host, Option<NetStatus>)],
    config: &NetworkConfig,
) -> impl Iterator<Item = Vec<String>> {
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    all.iter().map(move |(host, status)| {
        let status = status.as_ref();
        let follows = status.is_some_and(|status| follows(status, config));
        vec![
            host.name.clone(),
            if follows { "yes" } else { "no" }.to_owned(),
            dash(status.and_then(|status| status.mode.clone())),
            dash(status.and_then(|status| {
                let both = [status.subnet.clone(), status.subnet_v6.clone()];
                both.into_iter().flatten().reduce(|v4, v6| format!("{v4}, {v6}"))
            })),
            dash(status.and_then(|status| status.device.as_ref()).map(|one| one.mtu.to_string())),
        ]
    })
}

async fn change(etcd: &Etcd, hosts: &Hosts, set: &Set) -> anyhow::Result<u8> {
    let stored = etcd.read().await?;
    let json = edited(&stored.json, &set.change)?;
    let after = NetworkConfig::parse(&json).map_err(|error| output::usage(error.to_string()))?;
    let leases = etcd.leases().await?;
    check_size(&after, leases.leases.len())?;
    // What cannot be read has no effect that a change could end.
    let before = NetworkConfig::parse(&stored.json).ok();
    if before.as_ref() == Some(&after) {
        output::line("the settings are so already")?;
        return Ok(0);
    }
    let effects = before.map(|before| effects(&before, &after, &leases)).unwrap_or_default();
    let json_wanted = set.flags.output == Some(Format::Json);
    if !json_wanted {
        for line in describe(&after, leases.leases.len()) {
            output::line(&line)?;
        }
        for effect in &effects {
            output::line(&format!("- {}", effect.text))?;
        }
    }
    if set.dry_run {
        if json_wanted {
            print_set(&after, &effects, None)?;
        }
        return Ok(0);
    }
    if let Some(effect) = effects.iter().find(|effect| effect.breaks && !set.yes) {
        return Err(output::hinted(
            "say --yes if that is meant",
            format!("nothing was changed, because {}", effect.text),
        ));
    }
    etcd.write(&stored, json).await?;
    let late = if set.wait == 0 { None } else { Some(wait(hosts, &after, set.wait).await) };
    if json_wanted {
        print_set(&after, &effects, late.as_deref())?;
    }
    match late {
        None => Ok(0),
        Some(late) if late.is_empty() => {
            if !json_wanted {
                let seen = hosts.all().is_ok_and(|hosts| !hosts.is_empty());
                output::line(if seen {
                    "all nodes that can be looked into from here follow"
                } else {
                    "written; whether the nodes follow cannot be seen from here, where none is"
                })?;
            }
            Ok(0)
        }
        Some(late) => {
            for line in &late {
                eprintln!("{line}");
            }
            eprintln!("hint: `orchctl net doctor` says what is wrong and how to mend it");
            Ok(1)
        }
    }
}

fn print_set(
    after: &NetworkConfig,
    effects: &[Effect],
    late: Option<&[String]>,
) -> anyhow::Result<()> {
    let config: Value = serde_json::from_slice(&after.to_json())?;
    let effects: Vec<_> = effects
        .iter()
        .map(|effect| json!({"text": effect.text, "breaksRunningPods": effect.breaks}))
        .collect();
    print_json(
        &json!({"mode": after.mode.name(), "config": config, "effects": effects, "late": late}),
    )
}

/// Until all agents in sight follow; else those that do not, and what they say.
async fn wait(hosts: &Hosts, config: &NetworkConfig, secs: u64) -> Vec<String> {
    let until = Instant::now() + Duration::from_secs(secs);
    loop {
        let hosts = hosts.all().unwrap_or_default();
        let late: Vec<String> = statuses(&hosts)
            .into_iter()
            .filter(|(host, status)| {
                host.agent.is_some() && !status.as_ref().is_some_and(|one| follows(one, config))
            })
            .map(|(host, status)| {
                let problems = status.map(|status| status.problems.join("; ")).unwrap_or_default();
                format!("{} does not follow within {secs} s: {problems}", host.name)
            })
            .collect();
        if late.is_empty() || Instant::now() >= until {
            return late;
        }
        sleep(LOOK).await;
    }
}

/// Whether an agent does what the settings say. Pure.
fn follows(status: &NetStatus, config: &NetworkConfig) -> bool {
    fn allowed<N: FromStr>(text: Option<&String>, allows: impl Fn(N) -> bool) -> bool {
        text.and_then(|text| text.parse().ok()).is_some_and(allows)
    }
    let v4 = match config.v4 {
        Some(v4) => {
            status.network == Some(v4.network.to_string())
                && allowed(status.subnet.as_ref(), |subnet| v4.allows(subnet))
        }
        None => status.subnet.is_none() && status.subnet_v6.is_some(),
    };
    // A node without IPv6 below follows a dual-stack network as well as it can.
    let v6 = match config.v6 {
        Some(v6) => {
            status.subnet_v6.is_none()
                || allowed(status.subnet_v6.as_ref(), |subnet| v6.allows(subnet))
        }
        None => status.subnet_v6.is_none(),
    };
    v4 && v6
        && status.mode.as_deref() == Some(config.mode.name())
        // A node that does not enforce policies cannot have it, and says so elsewhere.
        && (config.fast_path == Switch::Auto
            || status.fast_path.on == config.fast_path.is_wanted()
            || !status.policy.enforced)
        // Whether it can have it is another matter.
        && (config.big_tcp == Switch::Auto || status.big_tcp.setting == config.big_tcp.name())
        && status
            .device
            .as_ref()
            .is_some_and(|device| (device.vni, device.port) == (config.vni, config.port))
}

/// The settings in words.
fn describe(config: &NetworkConfig, held: usize) -> Vec<String> {
    let fast = match config.fast_path {
        Switch::Auto => ", with the fast path where a node can",
        Switch::On => ", with the fast path",
        Switch::Off => ", without the fast path",
    };
    let big = match config.big_tcp {
        Switch::Auto => "",
        Switch::On => ", with BIG TCP",
        Switch::Off => ", without BIG TCP",
    };
    let mut lines = vec![format!("mode      {}{fast}{big}", config.mode.name())];
    lines.extend(config.v4.map(|v4| {
        format!(
            "IPv4      {}; nodes have a /{} from {} to {} ({} subnets, {held} leased)",
            v4.network,
            v4.subnet_len,
            v4.subnet_min,
            v4.subnet_max,
            count(&v4)
        )
    }));
    lines.extend(
        config.v6.map(|v6| format!("IPv6      {}; nodes have a /{}", v6.network, v6.subnet_len)),
    );
    lines.push(format!("VXLAN     VNI {}, UDP port {}", config.vni, config.port));
    lines
}

/// How many nodes can have a subnet.
fn count(v4: &Ipv4Config) -> u64 {
    let span = v4.subnet_max.to_bits() - v4.subnet_min.to_bits();
    u64::from(span >> (32 - v4.subnet_len)) + 1
}

fn check_size(after: &NetworkConfig, held: usize) -> anyhow::Result<()> {
    let few = after.v4.map(|v4| count(&v4)).filter(|count| *count < held as u64);
    match few {
        None => Ok(()),
        Some(count) => Err(output::usage(format!(
            "{held} nodes hold a subnet, and there would be only {count}; widen --network or --subnet-max, or lengthen --subnet-len"
        ))),
    }
}

/// What the change does to those who live in the network. Pure.
fn effects(before: &NetworkConfig, after: &NetworkConfig, leases: &Leases) -> Vec<Effect> {
    let mut effects = Vec::new();
    let mut tell = |breaks: bool, text: String| effects.push(Effect { text, breaks });
    if before.mode != after.mode {
        tell(false, mode_effect(before.mode, after.mode).to_owned());
    }
    match (before.fast_path.is_wanted(), after.fast_path.is_wanted()) {
        (false, true) => tell(
            false,
            "packets of known flows pass by bridge, netfilter and routing of a node; rules of others see one packet a second of each flow; running connections go on"
                .to_owned(),
        ),
        (true, false) => {
            tell(false, "all packets go the whole way again; running connections go on".to_owned());
        }
        _ => {}
    }
    match (before.big_tcp.is_wanted(), after.big_tcp.is_wanted()) {
        (false, true) => tell(
            false,
            "pods send IPv4 packets of up to 512 KiB where no other node is reached in VXLAN and the underlay's link takes them; running connections go on"
                .to_owned(),
        ),
        (true, false) => {
            tell(false, "pods send packets of up to 64 KiB; running connections go on".to_owned());
        }
        _ => {}
    }
    let loses = leases
        .leases
        .iter()
        .filter(|lease| {
            let lost = |subnet| after.v4.is_some_and(|v4| !v4.allows(subnet));
            lease.subnet.is_some_and(lost)
        })
        .count();
    if loses > 0 {
        tell(
            true,
            format!(
                "{loses} of {} nodes get another subnet: pods that run there lose their addresses, and must be made again",
                leases.leases.len()
            ),
        );
    }
    if (before.vni, before.port) != (after.vni, after.port) {
        tell(
            false,
            "between nodes packets are lost until both ends have the new VNI and port: about a second"
                .to_owned(),
        );
    }
    let overhead = |config: &NetworkConfig| {
        // From an underlay that takes anything, what is left is what is taken.
        u32::MAX - config.mode.pod_mtu(u32::MAX, config.v6.is_some())
    };
    let (was, will) = (overhead(before), overhead(after));
    if will < was {
        tell(
            false,
            format!("new pods have an MTU larger by {}; running ones keep theirs", was - will),
        );
    } else if will > was {
        tell(
            false,
            format!(
                "new pods have an MTU smaller by {}; running ones keep theirs, and send too large packets first, until path MTU discovery tells them; make them again when it suits",
                will - was
            ),
        );
    }
    if before.v4.is_some() && after.v4.is_none() {
        tell(true, "IPv4 of running pods ends: no node routes it any more".to_owned());
    }
    match (before.v6, after.v6) {
        (None, Some(_)) => tell(
            false,
            "new pods have an IPv6 address, too, on nodes whose underlay has IPv6; running ones stay as they are"
                .to_owned(),
        ),
        (Some(_), None) => {
            tell(true, "IPv6 of running pods ends: no node routes it any more".to_owned());
        }
        (Some(before), Some(after)) if before != after => {
            tell(true, "nodes get other IPv6 subnets: IPv6 of running pods ends".to_owned());
        }
        _ => {}
    }
    effects
}

fn mode_effect(before: Mode, after: Mode) -> &'static str {
    match (before, after) {
        (_, Mode::Vxlan) => {
            "packets between nodes go in VXLAN; running connections go on, as what a node receives does not depend on its mode"
        }
        (_, Mode::DirectRouting) => {
            "packets to nodes on the same link go as they are, to others in VXLAN; running connections go on"
        }
        (_, Mode::HostGw) => {
            "packets between nodes go as they are; running connections go on where nodes share a link, and the agents of others say whom they cannot reach"
        }
    }
}

#[cfg(test)]
mod tests;
