//! `orchctl doctor`: what is wrong with this host and its cluster, by severity, and what mends it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use orch_client::Client;
use orch_store::admin::Admin;
use serde_json::{Value, json};

use super::config::{self, Config};
use super::host::{Host, Part};
use super::preflight::{self, Finding, Level};
use super::{cert, etcd, init};
use crate::kube::wire;
use crate::output;

/// A write to etcd that takes longer makes leases fail under load (etcd's own advice is 10 ms at the 99th percentile).
const WRITE_SLOW: Duration = Duration::from_millis(100);
/// Share of etcd's quota from which on it is nearly full.
const QUOTA_BYTES: i64 = 4 << 30;
/// A node's clock may differ by so much before leases and certificates suffer.
const SKEW_SECS: i64 = 30;
const LIMIT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
#[command(
    after_help = "Example: orchctl doctor\nExit code 1 when there are errors. `orchctl net doctor` looks at the pod network."
)]
pub(crate) struct Flags {
    /// Prefix of every path, as given to init or join
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// Also show what is well
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    format: super::Format,
}

pub(crate) async fn run(flags: Flags, client: Option<Client>) -> anyhow::Result<u8> {
    let host = Host::new(&flags.root)?;
    let mut findings = Vec::new();
    let config = Config::read(&config::path(&host.paths))?;
    let mut client = client;
    if let Some(config) = &config {
        findings.extend(preflight::run(&host, config).await);
        findings.extend(daemons(&host, config));
        findings.extend(certificates(&host)?);
        if config.is_control_plane() {
            findings.extend(store(&host, config).await);
        }
        let own = host.paths.pki().join(if config.is_control_plane() {
            "admin.conf"
        } else {
            "kubelet.conf"
        });
        client = Client::from_kubeconfig(&own).ok().or(client);
    }
    match client {
        Some(client) => match tokio::time::timeout(LIMIT, cluster(&client)).await {
            Ok(found) => findings.extend(found),
            Err(_) => findings.push(silent(&format!("no answer within {} s", LIMIT.as_secs()))),
        },
        None if config.is_none() => {
            return Err(output::hinted(
                "run it on a host of a cluster (`orchctl init`, `orchctl join`), or name a cluster with --kubeconfig",
                "there is nothing to look at: this host is part of no cluster, and no kubeconfig was found",
            ));
        }
        None => {}
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    let bad = findings.iter().filter(|finding| finding.level == Level::Error).count();
    let odd = findings.iter().filter(|finding| finding.level == Level::Warning).count();
    flags.format.print(&json!(findings), || {
        for finding in findings.iter().filter(|one| flags.all || one.level != Level::Ok) {
            output::line(&init::show(finding))?;
        }
        output::line(&format!("{} checks: {bad} errors, {odd} warnings", findings.len()))
    })?;
    Ok(u8::from(bad > 0))
}

fn daemons(host: &Host, config: &Config) -> Vec<Finding> {
    let mut wanted = Vec::new();
    if config.is_control_plane() {
        wanted.push(Part::Server);
    }
    if config.node.agent {
        wanted.push(Part::Agent);
    }
    let mut findings: Vec<Finding> = wanted
        .into_iter()
        .map(|part| match host.pid(part, config) {
            Some(pid) => Finding::ok("daemon", format!("{} runs (PID {pid})", part.name())),
            None => Finding::error(
                "daemon",
                format!("the {} does not run{}", part.name(), host.log_tail(part, config)),
                format!(
                    "{} starts it",
                    if config.is_control_plane() {
                        "orchctl init".to_owned()
                    } else {
                        format!("systemctl start orch-{}, or orchctl join again,", part.name())
                    }
                ),
            ),
        })
        .collect();
    if config.is_control_plane() {
        findings.push(match orch_store::managed::pid(&host.paths.etcd_data()) {
            Some(pid) => Finding::ok("daemon", format!("etcd runs (PID {pid})")),
            None => Finding::error(
                "daemon",
                "etcd does not run",
                format!("the server starts it; see {}/etcd.log", host.paths.log().display()),
            ),
        });
    }
    findings
}

fn certificates(host: &Host) -> anyhow::Result<Vec<Finding>> {
    Ok(cert::all(host)?
        .iter()
        .map(|found| {
            let days = found.certificate.days_left();
            let detail = format!("{}: {days} days left", found.name);
            let remedy = if found.certificate.is_authority {
                "plan a new cluster authority: it signs everything else"
            } else {
                "orchctl cert renew"
            };
            if found.certificate.has_ended() {
                Finding::error("certificate", format!("{} has ended", found.name), remedy)
            } else if days < cert::SOON_DAYS {
                Finding::warning("certificate", detail, remedy)
            } else {
                Finding::ok("certificate", detail)
            }
        })
        .collect())
}

async fn store(host: &Host, config: &Config) -> Vec<Finding> {
    let asked = async {
        let etcd = etcd::credentials(host, vec![config.own_etcd()?])?;
        let seen = etcd::look(&etcd).await?;
        let slowest = Admin::connect(&etcd).await?.write_latency(10).await?;
        anyhow::Ok((seen, slowest))
    };
    let (seen, slowest) = match tokio::time::timeout(LIMIT, asked).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            return vec![Finding::error(
                "etcd",
                format!("{error:#}"),
                format!("see {}/etcd.log", host.paths.log().display()),
            )];
        }
        Err(_) => {
            return vec![Finding::error(
                "etcd",
                "it does not answer: most of its members are away",
                "start the other control planes; if they are gone for good: orchctl etcd snapshot restore",
            )];
        }
    };
    store_findings(&seen, slowest)
}

fn store_findings(seen: &[etcd::Seen], slowest: Duration) -> Vec<Finding> {
    let mut findings: Vec<Finding> = seen
        .iter()
        .map(|(member, status)| match status {
            Err(why) => Finding::error(
                "etcd",
                format!("member {}: {why}", member.name),
                format!(
                    "start its host; if it is gone for good: orchctl etcd remove {}",
                    member.name
                ),
            ),
            Ok(status) if !status.errors.is_empty() => Finding::error(
                "etcd",
                format!("member {}: {}", member.name, status.errors.join("; ")),
                "NOSPACE: orchctl etcd defrag; CORRUPT: restore a snapshot",
            ),
            Ok(status) if status.size_bytes > QUOTA_BYTES / 5 * 4 => Finding::warning(
                "etcd",
                format!("member {} uses {} MB of its 4 GB", member.name, status.size_bytes >> 20),
                "orchctl etcd defrag",
            ),
            Ok(_) => Finding::ok("etcd", format!("member {} is healthy", member.name)),
        })
        .collect();
    if seen.len() == 2 {
        findings.push(Finding::warning(
            "etcd",
            "two members: the loss of either stops the cluster",
            "join a third control plane",
        ));
    }
    let took = format!("a write takes up to {:.1} ms", slowest.as_secs_f64() * 1e3);
    findings.push(if slowest > WRITE_SLOW {
        Finding::warning("etcd disk", took, "put /var/lib/orch on a faster disk (SSD)")
    } else {
        Finding::ok("etcd disk", took)
    });
    findings
}

fn silent(why: &str) -> Finding {
    Finding::error(
        "API server",
        why,
        "is its host up, and the server running? `orchctl doctor` there tells more",
    )
}

async fn cluster(client: &Client) -> Vec<Finding> {
    if let Err(error) = client.get_text("/readyz").await {
        return vec![silent(&format!("{:#}", anyhow::Error::from(error)))];
    }
    let mut findings = vec![Finding::ok("API server", "ready")];
    let leases =
        wire::get(client, "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases")
            .await
            .unwrap_or(Value::Null);
    match wire::get(client, "/api/v1/nodes").await {
        Ok(nodes) => findings.extend(node_findings(&nodes, &leases, Timestamp::now())),
        Err(error) => findings.push(Finding::error("nodes", format!("{error:#}"), "")),
    }
    // Only administrators may see all pods.
    if let Ok(pods) = wire::get(client, "/api/v1/pods").await {
        findings.extend(pod_findings(&pods, Timestamp::now()));
    }
    findings
}

/// Pure: nodes that are not Ready, under pressure, silent, on another version, or with a subnet of another.
fn node_findings(nodes: &Value, leases: &Value, now: Timestamp) -> Vec<Finding> {
    let list: Vec<&Value> = nodes["items"].as_array().into_iter().flatten().collect();
    let mut findings = Vec::new();
    if list.is_empty() {
        findings.push(Finding::warning(
            "nodes",
            "there are none",
            "orchctl token create; orchctl join",
        ));
    }
    let mut subnets: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in &list {
        let name = node["metadata"]["name"].as_str().unwrap_or_default();
        let mut well = true;
        let conditions = node["status"]["conditions"].as_array();
        for condition in conditions.into_iter().flatten() {
            let kind = condition["type"].as_str().unwrap_or_default();
            let message = condition["message"].as_str().unwrap_or_default();
            match (kind, condition["status"].as_str()) {
                ("Ready", Some("True")) => {}
                ("Ready", _) => {
                    well = false;
                    findings.push(Finding::error(
                        "node",
                        format!("{name} is not Ready: {message}"),
                        format!("on {name}: orchctl doctor"),
                    ));
                }
                (_, Some("True")) if kind.ends_with("Pressure") => {
                    well = false;
                    findings.push(Finding::warning(
                        "node",
                        format!("{name}: {kind}: {message}"),
                        format!("orchctl drain {name}, or free memory and disk on it"),
                    ));
                }
                _ => {}
            }
        }
        let version = node["status"]["nodeInfo"]["kubeletVersion"].as_str().unwrap_or_default();
        if !version.is_empty() && version != orch_config::KUBERNETES_VERSION {
            well = false;
            findings.push(Finding::warning(
                "version",
                format!("{name} runs {version}, this is {}", orch_config::KUBERNETES_VERSION),
                format!("install the same packages on {name}"),
            ));
        }
        let renewed = leases["items"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|lease| lease["metadata"]["name"] == name)
            .and_then(|lease| lease["spec"]["renewTime"].as_str())
            .and_then(|time| time.parse::<Timestamp>().ok());
        if let Some(renewed) = renewed
            && renewed.as_second() > now.as_second() + SKEW_SECS
        {
            well = false;
            findings.push(Finding::warning(
                "clock",
                format!("the clock of {name} is {} s ahead", renewed.as_second() - now.as_second()),
                "run a time service (chrony) on all hosts",
            ));
        }
        if let Some(subnet) = node["spec"]["podCIDR"].as_str() {
            subnets.entry(subnet).or_default().push(name);
        }
        if well {
            findings.push(Finding::ok("node", format!("{name} is Ready")));
        }
    }
    for (subnet, owners) in subnets.iter().filter(|(_, owners)| owners.len() > 1) {
        findings.push(Finding::error(
            "subnets",
            format!("{subnet} belongs to {}", owners.join(" and ")),
            "orchctl net leases; restart the agent of the later one",
        ));
    }
    findings
}

/// Pure: pods that wait or fall over.
fn pod_findings(pods: &Value, now: Timestamp) -> Vec<Finding> {
    const PATIENCE_SECS: i64 = 60;
    let mut findings = Vec::new();
    for pod in pods["items"].as_array().into_iter().flatten() {
        let text = |key: &str| pod["metadata"][key].as_str().unwrap_or_default();
        let name = format!("{}/{}", text("namespace"), text("name"));
        let age = text("creationTimestamp")
            .parse::<Timestamp>()
            .map_or(0, |made| now.as_second() - made.as_second());
        let statuses = pod["status"]["containerStatuses"].as_array();
        let waiting = statuses
            .into_iter()
            .flatten()
            .filter_map(|status| status["state"]["waiting"]["reason"].as_str())
            .find(|reason| reason.ends_with("BackOff") || reason.starts_with("Err"));
        let look = format!("orchctl describe pod {} -n {}", text("name"), text("namespace"));
        if let Some(reason) = waiting {
            findings.push(Finding::warning("pod", format!("{name}: {reason}"), look));
        } else if pod["status"]["phase"] == "Pending" && age > PATIENCE_SECS {
            findings.push(Finding::warning("pod", format!("{name}: Pending for {age} s"), look));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("pods", "none waits or falls over"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:10:00Z".parse().expect("a time")
    }

    #[test]
    fn nodes_that_ail_are_named_with_a_remedy() {
        let node = |name: &str, ready: &str, subnet: &str| {
            json!({ "metadata": { "name": name }, "spec": { "podCIDR": subnet },
                    "status": { "conditions": [{ "type": "Ready", "status": ready, "message": "no engine" }],
                                "nodeInfo": { "kubeletVersion": orch_config::KUBERNETES_VERSION } } })
        };
        let nodes = json!({ "items": [node("a", "True", "10.244.0.0/24"), node("b", "False", "10.244.0.0/24")] });
        let leases = json!({ "items": [{ "metadata": { "name": "a" }, "spec": { "renewTime": "2026-01-01T00:15:00Z" } }] });
        let found = node_findings(&nodes, &leases, now());
        let errors: Vec<&str> = found
            .iter()
            .filter(|one| one.level == Level::Error)
            .map(|one| one.detail.as_str())
            .collect();
        assert_eq!(errors, ["b is not Ready: no engine", "10.244.0.0/24 belongs to a and b"]);
        assert!(found.iter().any(|one| one.detail == "the clock of a is 300 s ahead"));
        assert!(
            found.iter().filter(|one| one.level != Level::Ok).all(|one| !one.remedy.is_empty())
        );
    }

    #[test]
    fn pods_that_wait_are_told_once_they_waited_long() {
        let pod = |made: &str, reason: &str| {
            json!({ "items": [{ "metadata": { "name": "w", "namespace": "d", "creationTimestamp": made },
                "status": { "phase": "Pending", "containerStatuses": [{ "state": { "waiting": { "reason": reason } } }] } }] })
        };
        let details = |pods: &Value| pod_findings(pods, now())[0].detail.clone();
        assert_eq!(
            details(&pod("2026-01-01T00:09:50Z", "ContainerCreating")),
            "none waits or falls over"
        );
        assert_eq!(
            details(&pod("2026-01-01T00:00:00Z", "ContainerCreating")),
            "d/w: Pending for 600 s"
        );
        assert_eq!(
            details(&pod("2026-01-01T00:09:50Z", "CrashLoopBackOff")),
            "d/w: CrashLoopBackOff"
        );
    }

    #[test]
    fn a_slow_disk_and_two_members_are_told() {
        let member = |name: &str| orch_store::admin::Member {
            id: "1".to_owned(),
            name: name.to_owned(),
            peer_urls: Vec::new(),
            client_urls: Vec::new(),
            learner: false,
        };
        let seen = [(member("a"), Err("no answer".to_owned())), (member("b"), Err("x".to_owned()))];
        let found = store_findings(&seen, Duration::from_millis(250));
        assert_eq!(found[0].level, Level::Error);
        assert!(found[0].remedy.contains("orchctl etcd remove a"));
        assert!(found.iter().any(|one| one.check == "etcd disk" && one.level == Level::Warning));
        assert!(found.iter().any(|one| one.detail.starts_with("two members")));
    }
}
