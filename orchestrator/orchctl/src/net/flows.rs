//! `orchctl net flows`: connections that pods open, and packets that policy drops, as the programs tell them.
//!
//! Each node's programs have a ring of events, which is read by whoever looks: two that look at one node share them. The
//! agent forgets the oldest when it is full. A node tells at most some thousands in a second; totals are in its metrics.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::ValueEnum;
use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_client::{Api, Client, ListParams};
use orch_ebpf_loader::{Announcement, Events, Kept, Pins};
use orch_ebpf_maps::{Direction, Event, Reason, from_key};
use orch_policy::PodFacts;
use serde::Serialize;

use super::Format;
use super::hosts::{Host, Hosts, need_root};
use crate::output;

/// Between two looks at the rings; they hold many seconds' events.
const PAUSE: Duration = Duration::from_millis(100);
/// Names of pods are asked for again at most this often.
const REFRESH: Duration = Duration::from_secs(1);

/// Which events to show.
#[derive(clap::Args, Clone)]
pub(crate) struct Filter {
    /// Go on until interrupted; without it, what the nodes still hold
    #[arg(short, long)]
    follow: bool,
    /// Only of this pod, at either end: `NAMESPACE/NAME`, or a name of any namespace
    #[arg(long)]
    pod: Option<String>,
    /// Only dropped or only passed ones
    #[arg(long, value_enum)]
    verdict: Option<Verdict>,
    /// Format: one JSON object a line
    #[arg(short, long, value_enum)]
    output: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Passed,
    Dropped,
}

/// One event for people and programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Flow {
    node: String,
    /// Seconds of the node's clock since it was started.
    at_secs: u64,
    /// The pod whose policies decided.
    pod: String,
    direction: &'static str,
    from: String,
    to: String,
    protocol: String,
    verdict: Verdict,
    reason: &'static str,
    /// The policy's rule that decided, if one did.
    rule: Option<String>,
}

impl Flow {
    fn line(&self) -> String {
        let verdict = match self.verdict {
            Verdict::Passed => "passed",
            Verdict::Dropped => "dropped",
        };
        let rule = self.rule.as_ref().map_or_else(String::new, |rule| format!(", {rule}"));
        let Self { node, direction, from, to, protocol, reason, .. } = self;
        format!(
            "{node}  {direction:<7}  {verdict:<7}  {protocol:<5}  {from} -> {to}  ({reason}{rule})"
        )
    }

    fn concerns(&self, filter: &Filter) -> bool {
        let is_pod = |wanted: &String| {
            let end = |text: &str| {
                let name = text.split(' ').next().unwrap_or_default();
                name == wanted || name.rsplit_once('/').is_some_and(|(_, name)| name == wanted)
            };
            end(&self.pod) || end(&self.from) || end(&self.to)
        };
        filter.verdict.is_none_or(|verdict| verdict == self.verdict)
            && filter.pod.as_ref().is_none_or(is_pod)
    }
}

/// A node whose programs tell.
struct Source {
    host: Host,
    pins: Pins,
    /// Its endpoints by their UID, and texts of its rules by their number.
    endpoints: HashMap<u32, Announcement>,
    rules: BTreeMap<u32, String>,
    read: Instant,
}

impl Source {
    fn open(host: &Host) -> anyhow::Result<Option<Self>> {
        let pins = Pins::below(host.paths.root());
        if !pins.are_there() {
            return Ok(None);
        }
        let mut source = Self {
            host: host.clone(),
            pins,
            endpoints: HashMap::new(),
            rules: BTreeMap::new(),
            read: Instant::now(),
        };
        source.refresh();
        Ok(Some(source))
    }

    /// What the node's files say; endpoints that are gone stay known, for what is still told of them.
    fn refresh(&mut self) {
        let folder = self.host.paths.run().join("policy");
        let kept = Kept::everything(&folder).unwrap_or_default();
        self.endpoints.extend(kept.into_iter().map(|(_, one)| (one.uid, one)));
        let text = std::fs::read(folder.join("rules.json")).unwrap_or_default();
        if let Ok(rules) = serde_json::from_slice(&text) {
            self.rules = rules;
        }
        self.read = Instant::now();
    }

    fn flow(&mut self, event: &Event, names: &HashMap<IpAddr, String>) -> Option<Flow> {
        let reason = Reason::from_number(event.reason)?;
        let known = self.endpoints.contains_key(&event.uid)
            && (event.rule == 0 || self.rules.contains_key(&event.rule));
        if !known && self.read.elapsed() > REFRESH {
            self.refresh();
        }
        let pod = self.endpoints.get(&event.uid).and_then(|one| one.pod.as_ref());
        let ingress = event.direction == Direction::Ingress as u8;
        let own = pod.map(|pod| format!("{}/{}", pod.namespace, pod.name));
        let end = |addr: [u8; 16], port: u16, is_own: bool| {
            let ip = from_key(event.family, addr);
            let name = if is_own { own.as_ref() } else { names.get(&ip) };
            let place = match u16::from_be(port) {
                0 => ip.to_string(),
                port => SocketAddr::new(ip, port).to_string(),
            };
            name.map_or_else(|| place.clone(), |name| format!("{name} ({place})"))
        };
        Some(Flow {
            node: self.host.name.clone(),
            at_secs: event.time_ns / 1_000_000_000,
            direction: if ingress { "ingress" } else { "egress" },
            from: end(event.saddr, event.sport, !ingress),
            to: end(event.daddr, event.dport, ingress),
            protocol: protocol(event.protocol),
            verdict: if reason.is_drop() { Verdict::Dropped } else { Verdict::Passed },
            reason: reason.name(),
            rule: (event.rule != 0).then(|| match self.rules.get(&event.rule) {
                Some(rule) => rule.clone(),
                None => format!("rule {} of an earlier state", event.rule),
            }),
            pod: own.unwrap_or_else(|| format!("endpoint {}", event.uid)),
        })
    }
}

fn protocol(number: u8) -> String {
    match number {
        1 => "ICMP".to_owned(),
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        58 => "ICMPv6".to_owned(),
        132 => "SCTP".to_owned(),
        other => other.to_string(),
    }
}

/// Prints flows; ends when the nodes have no more, or with the reader of stdout.
pub(super) async fn run(hosts: &Hosts, client: &Client, filter: &Filter) -> anyhow::Result<()> {
    need_root("reads the maps of the policy programs")?;
    let mut sources = Vec::new();
    for host in hosts.all()? {
        sources.extend(Source::open(&host)?);
    }
    if sources.is_empty() {
        bail!(
            "no node that can be looked into from here enforces policies; see `orchctl net status`"
        );
    }
    let mut names = pod_names(client).await;
    let mut asked = Instant::now();
    loop {
        if asked.elapsed() > REFRESH {
            names = pod_names(client).await;
            asked = Instant::now();
        }
        let mut some = false;
        for source in &mut sources {
            let Some(turn) = Events::open(&source.pins)? else {
                // Somebody else looks at this moment.
                some = true;
                continue;
            };
            let events: Vec<Event> = turn.collect();
            some |= !events.is_empty();
            for event in events {
                let Some(flow) = source.flow(&event, &names) else { continue };
                if !flow.concerns(filter) {
                    continue;
                }
                match filter.output {
                    Some(Format::Json) => output::line(&serde_json::to_string(&flow)?)?,
                    None => output::line(&flow.line())?,
                }
            }
        }
        if !some && !filter.follow {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Pods by address. Without an API server flows have addresses only.
async fn pod_names(client: &Client) -> HashMap<IpAddr, String> {
    let pods = Api::<Pod>::all(client.clone()).list(&ListParams::default()).await;
    let pods = pods.map(|list| list.items).unwrap_or_default();
    pods.iter()
        .map(|pod| (pod, PodFacts::from_api(pod)))
        .filter(|(_, facts)| !facts.finished && !facts.host_network)
        .flat_map(|(pod, facts)| {
            let text = |part: &Option<String>| part.clone().unwrap_or_default();
            let name = format!("{}/{}", text(&pod.metadata.namespace), text(&pod.metadata.name));
            facts.ips.into_iter().map(move |ip| (ip, name.clone()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow() -> Flow {
        Flow {
            node: "node-1".to_owned(),
            at_secs: 7,
            pod: "shop/web".to_owned(),
            direction: "ingress",
            from: "shop/front (10.244.2.2:40000)".to_owned(),
            to: "shop/web (10.244.1.2:80)".to_owned(),
            protocol: protocol(6),
            verdict: Verdict::Dropped,
            reason: "policy",
            rule: Some("policy shop/deny isolates it".to_owned()),
        }
    }

    #[test]
    fn a_flow_is_one_line() {
        assert_eq!(
            flow().line(),
            "node-1  ingress  dropped  TCP    shop/front (10.244.2.2:40000) -> shop/web (10.244.1.2:80)  \
             (policy, policy shop/deny isolates it)"
        );
    }

    #[test]
    fn flows_are_chosen_by_pod_and_verdict() {
        let filter = |pod: Option<&str>, verdict| Filter {
            follow: false,
            pod: pod.map(str::to_owned),
            verdict,
            output: None,
        };
        for pod in ["front", "shop/front", "web", "shop/web"] {
            assert!(flow().concerns(&filter(Some(pod), Some(Verdict::Dropped))), "{pod}");
        }
        assert!(!flow().concerns(&filter(Some("other/web"), None)));
        assert!(!flow().concerns(&filter(None, Some(Verdict::Passed))));
    }
}
