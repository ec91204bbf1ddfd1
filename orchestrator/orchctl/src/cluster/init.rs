//! `orchctl init`: makes this host the first control plane of a new cluster. Safe to repeat: what is there is kept, what
//! is missing is made, a daemon whose settings changed is restarted.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use orch_client::Client;
use orch_pki::{ClusterPki, ServerNames};
use serde_json::{Value, json};

use super::config::Config;
use super::host::{Host, Part};
use super::preflight::{self, Finding, Level};
use super::{HostFlags, config, token};
use crate::kube::wire;
use crate::{output, progress};

/// etcd's first start fsyncs a lot on slow disks.
const SERVER_LIMIT: Duration = Duration::from_secs(90);
const NODE_LIMIT: Duration = Duration::from_secs(90);
/// How often a change of the ConfigMap is tried: so many hosts may join at a time.
const CHANGE_TRIES: usize = 32;
/// How long the token of the printed join command is good for.
const TOKEN_TTL: Duration = Duration::from_secs(24 * 3600);
/// What the cluster tells hosts that joined.
pub(super) const CLUSTER: &str = "/api/v1/namespaces/kube-system/configmaps/orch-cluster";

#[derive(clap::Args)]
#[command(after_help = "Example: orchctl init --address 10.0.0.1\n\
    Prints the command with which further hosts join. `--dry-run` shows what would be done.")]
pub(crate) struct Flags {
    #[command(flatten)]
    pub(super) host: HostFlags,
    /// TCP port of the API
    #[arg(long)]
    port: Option<u16>,
    /// Further names and addresses for the server's certificate, such as a load balancer's
    #[arg(long = "cert-san", value_name = "NAME", value_delimiter = ',')]
    cert_sans: Vec<String>,
    /// Do not run pods on this host
    #[arg(long)]
    no_agent: bool,
    #[command(flatten)]
    format: super::Format,
}

pub(crate) async fn run(flags: Flags) -> anyhow::Result<()> {
    let host = Host::new(&flags.host.root)?;
    let mut config = flags.host.config(&host)?;
    if !config.is_control_plane() {
        return Err(output::hinted(
            "`orchctl reset` takes this host out of its cluster",
            "this host is a worker of a cluster already",
        ));
    }
    if let Some(port) = flags.port {
        config.control_plane.port = port;
    }
    if !flags.cert_sans.is_empty() {
        config.control_plane.cert_sans = flags.cert_sans;
    }
    if flags.no_agent {
        config.node.agent = false;
    }
    config.complete()?;
    check(&host, &config, &flags.host).await?;
    if flags.host.dry_run {
        return show_plan(&host, &config, plan(&host, &config));
    }
    let client = bring_up(&host, &config).await?;
    let wanted = token::Wanted {
        ttl: TOKEN_TTL,
        description: "made by orchctl init",
        ..token::Wanted::default()
    };
    let token = token::create(&client, &wanted).await?.token;
    let (server, pin) = token::pin(&client).await?;
    let command = token::join_command(&server, &token, &pin);
    let kubeconfig = host.paths.pki().join("admin.conf");
    eprintln!(
        "\nThe control plane is up. Use it:\n  export KUBECONFIG={}\nJoin further hosts (as root, within {} h):",
        kubeconfig.display(),
        TOKEN_TTL.as_secs() / 3600
    );
    flags.format.print(
        &json!({ "server": server, "token": token, "caHash": pin, "kubeconfig": kubeconfig, "command": command }),
        || output::line(&command),
    )
}

/// Looks at the host and refuses when something is missing that was not waived.
pub(super) async fn check(host: &Host, config: &Config, flags: &HostFlags) -> anyhow::Result<()> {
    let findings = preflight::run(host, config).await;
    let waived =
        |finding: &Finding| flags.ignore_preflight.iter().any(|name| name == finding.check);
    for finding in findings.iter().filter(|finding| finding.level != Level::Ok || flags.dry_run) {
        eprintln!("{}", show(finding));
    }
    let bad: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.level == Level::Error && !waived(finding))
        .map(|finding| finding.check)
        .collect();
    if bad.is_empty() {
        return Ok(());
    }
    Err(output::hinted(
        format!(
            "mend it as said above, or go on in spite of it with --ignore-preflight '{}'",
            bad.join(",")
        ),
        format!("this host is not ready: {}", bad.join(", ")),
    ))
}

/// One finding for people.
pub(super) fn show(finding: &Finding) -> String {
    let mark = match finding.level {
        Level::Ok => '✓',
        Level::Warning => '!',
        Level::Error => '✗',
    };
    let remedy = if finding.remedy.is_empty() {
        String::new()
    } else {
        format!("\n      → {}", finding.remedy)
    };
    format!("  {mark} {}: {}{remedy}", finding.check, finding.detail)
}

/// What is going to be done, and whether it is done already.
fn plan(host: &Host, config: &Config) -> Vec<(String, bool)> {
    let pki = host.paths.pki();
    let mut steps = vec![
        (
            format!("write {}", config::path(&host.paths).display()),
            Config::read(&config::path(&host.paths)).ok().flatten().as_ref() == Some(config),
        ),
        (
            format!("make authorities and certificates in {}", pki.display()),
            pki.join("ca.crt").exists(),
        ),
        (
            format!("start etcd and the server ({})", supervisor(host, config)),
            host.pid(Part::Server, config).is_some(),
        ),
        ("publish the cluster's authority (kube-public/cluster-info)".to_owned(), false),
    ];
    if config.node.agent {
        let plugins = host.paths.cni_bin_dir();
        steps.extend([
            (format!("put CNI plugins into {}", plugins.display()), plugins.join("vxlan").exists()),
            (
                format!("start the agent of node {}", config.node.name),
                host.pid(Part::Agent, config).is_some(),
            ),
        ]);
    }
    steps.push(("make a bootstrap token and print the join command".to_owned(), false));
    steps
}

pub(super) fn supervisor(host: &Host, config: &Config) -> &'static str {
    match host.uses_systemd(config) {
        Ok(true) => "as units of systemd",
        _ => "as detached processes",
    }
}

pub(super) fn show_plan(
    host: &Host,
    config: &Config,
    steps: Vec<(String, bool)>,
) -> anyhow::Result<()> {
    output::line(&format!("# Below {}, with these settings:", host.paths.root().display()))?;
    for line in config.to_yaml()?.lines() {
        output::line(&format!("#   {line}"))?;
    }
    for (step, done) in steps {
        output::line(&format!("{} {step}", if done { "[done]" } else { "[todo]" }))?;
    }
    Ok(())
}

/// The certificates of a control plane on this host.
pub(super) fn open_pki(host: &Host, config: &Config) -> anyhow::Result<ClusterPki> {
    let service_cidr = orch_config::SERVICE_CIDR.parse().context("a constant")?;
    let names = ServerNames::new(
        IpAddr::V4(config.address()?),
        IpAddr::V4(orch_config::kubernetes_service_ip(service_cidr)),
        orch_config::CLUSTER_DOMAIN,
        &config.control_plane.cert_sans,
    );
    Ok(ClusterPki::ensure(&host.paths.pki(), &names.addresses, &names.names)?)
}

async fn bring_up(host: &Host, config: &Config) -> anyhow::Result<Client> {
    let mut pki = None;
    progress::step("settings and certificates", async {
        host.record_before()?;
        config.write(&config::path(&host.paths))?;
        let made = open_pki(host, config)?;
        made.ensure_admin_kubeconfig(&config.own_url()?)?;
        pki = Some(made);
        Ok(host.paths.etc().display().to_string())
    })
    .await?;
    let Some(pki) = pki else { bail!("the certificates were not made") };
    ensure(host, config, Part::Server)?;
    let client = Client::from_kubeconfig(&host.paths.pki().join("admin.conf"))?;
    wait_server(host, config, &client).await?;
    publish(&client, config, &pki, &[config.own_url()?], &[config.own_etcd()?]).await?;
    if config.node.agent {
        start_agent(host, config, &pki, &[config.own_url()?]).await?;
        wait_node(host, config, &client).await?;
    }
    Ok(client)
}

/// Starts a daemon; one that runs with other settings is restarted.
pub(super) fn ensure(host: &Host, config: &Config, part: Part) -> anyhow::Result<()> {
    if let Some(pid) = host.pid(part, config) {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let found: Vec<String> = line
            .split(|byte| *byte == 0)
            .skip(1)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .filter(|word| !word.is_empty())
            .collect();
        if found == host.arguments(part, config)? {
            return Ok(());
        }
        eprintln!("  the settings of the {} changed: it is restarted", part.name());
        return host.restart(part, config);
    }
    host.start(part, config)
}

pub(super) async fn wait_server(
    host: &Host,
    config: &Config,
    client: &Client,
) -> anyhow::Result<()> {
    progress::wait("control plane", SERVER_LIMIT, || async {
        if host.pid(Part::Server, config).is_none() {
            bail!("the server does not stay up{}", host.log_tail(Part::Server, config));
        }
        Ok(match tokio::time::timeout(Duration::from_secs(2), client.get_text("/readyz")).await {
            Ok(Ok(_)) => Ok(config.own_url()?),
            Ok(Err(error)) => Err(format!("{:#}", anyhow::Error::from(error))),
            Err(_) => Err(format!("{}/readyz", config.own_url()?)),
        })
    })
    .await
}

/// Tells everybody who the cluster is, and its hosts where its parts are.
pub(super) async fn publish(
    client: &Client,
    config: &Config,
    pki: &ClusterPki,
    servers: &[String],
    etcd: &[String],
) -> anyhow::Result<()> {
    use base64::Engine as _;
    let ca = pki.ca();
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config",
        "clusters": [{ "name": "", "cluster": {
            "server": config.own_url()?,
            "certificate-authority-data": base64::engine::general_purpose::STANDARD.encode(ca.certificate_pem()),
        }}],
    });
    // The first one stays: its address is in join commands that were printed.
    if wire::get_opt(client, token::CLUSTER_INFO).await?.is_none() {
        put_config_map(
            client,
            token::CLUSTER_INFO,
            &json!({ "kubeconfig": format!("{kubeconfig:#}\n") }),
        )
        .await?;
    }
    change_cluster(client, |known| {
        for (list, own) in [(&mut known.servers, servers), (&mut known.etcd, etcd)] {
            let new: Vec<String> = own.iter().filter(|url| !list.contains(url)).cloned().collect();
            list.extend(new);
        }
        known.etcd_ca = pki.etcd_ca().certificate_pem().to_owned();
    })
    .await
}

/// Changes what the cluster tells its hosts. Hosts that join or leave at the same time do not undo each other's change.
pub(super) async fn change_cluster(
    client: &Client,
    change: impl Fn(&mut Known),
) -> anyhow::Result<()> {
    let (collection, name) = CLUSTER.rsplit_once('/').context("path of a ConfigMap")?;
    for _ in 0..CHANGE_TRIES {
        let found =
            wire::get_opt(client, CLUSTER).await.context("read kube-system/orch-cluster")?;
        let mut known = found.as_ref().map(Known::of).unwrap_or_default();
        change(&mut known);
        let mut object = json!({ "data": known.data() });
        let sent = match &found {
            Some(found) => {
                object["metadata"] =
                    json!({ "resourceVersion": found["metadata"]["resourceVersion"] });
                wire::send(client, http::Method::PATCH, CLUSTER, wire::MERGE_PATCH, &object).await
            }
            None => {
                object["apiVersion"] = json!("v1");
                object["kind"] = json!("ConfigMap");
                object["metadata"] = json!({ "name": name });
                wire::send(client, http::Method::POST, collection, wire::JSON, &object).await
            }
        };
        let error = match sent {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        let again = error
            .downcast_ref::<orch_client::Error>()
            .is_some_and(|error| error.is_conflict() || error.is_already_exists());
        if !again {
            return Err(error).with_context(|| format!("write the ConfigMap {name}"));
        }
    }
    bail!("other hosts change the ConfigMap {name} all the time: run this again")
}

/// What the cluster tells hosts that joined.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) servers: Vec<String>,
    pub(super) etcd: Vec<String>,
    pub(super) etcd_ca: String,
}

impl Known {
    fn of(config_map: &Value) -> Self {
        let text = |key: &str| config_map["data"][key].as_str().unwrap_or_default();
        let list = |key: &str| -> Vec<String> {
            text(key).split(',').filter(|url| !url.is_empty()).map(str::to_owned).collect()
        };
        Self {
            servers: list("servers"),
            etcd: list("etcd"),
            etcd_ca: text("etcd-ca.crt").to_owned(),
        }
    }

    fn data(&self) -> Value {
        json!({ "servers": self.servers.join(","), "etcd": self.etcd.join(","),
                "etcd-ca.crt": self.etcd_ca })
    }
}

pub(super) async fn read_cluster(client: &Client) -> anyhow::Result<Known> {
    let found = wire::get_opt(client, CLUSTER).await.context("read kube-system/orch-cluster")?;
    Ok(found.as_ref().map(Known::of).unwrap_or_default())
}

/// Creates or replaces the data of the ConfigMap at `path`.
pub(super) async fn put_config_map(
    client: &Client,
    path: &str,
    data: &Value,
) -> anyhow::Result<()> {
    let (collection, name) = path.rsplit_once('/').context("path of a ConfigMap")?;
    let outcome = if wire::get_opt(client, path).await?.is_some() {
        let patch = json!({ "data": data });
        wire::send(client, http::Method::PATCH, path, wire::MERGE_PATCH, &patch).await
    } else {
        let object = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name }, "data": data });
        wire::send(client, http::Method::POST, collection, wire::JSON, &object).await
    };
    outcome.map(drop).with_context(|| format!("write the ConfigMap {name}"))
}

/// The agent of a control plane: this host has the authorities, so it signs for itself.
pub(super) async fn start_agent(
    host: &Host,
    config: &Config,
    pki: &ClusterPki,
    servers: &[String],
) -> anyhow::Result<()> {
    progress::step(&format!("agent of {}", config.node.name), async {
        if !host.paths.pki().join("kubelet.conf").exists() {
            let address = IpAddr::V4(config.address()?);
            // Not all of them: the folder holds the server's own files of the same names.
            let made = pki.agent_credentials(&config.node.name, &[address], servers)?;
            made.write_beside_server(&host.paths.pki())?;
        }
        host.install_plugins()?;
        ensure(host, config, Part::Agent)?;
        Ok(config.address()?.to_string())
    })
    .await
}

/// Waits until the node says that it is Ready.
pub(super) async fn wait_node(host: &Host, config: &Config, client: &Client) -> anyhow::Result<()> {
    let path = format!("/api/v1/nodes/{}", config.node.name);
    progress::wait("node Ready", NODE_LIMIT, || async {
        if host.pid(Part::Agent, config).is_none() {
            bail!("the agent does not stay up{}", host.log_tail(Part::Agent, config));
        }
        let node = match wire::get_opt(client, &path).await {
            Ok(Some(node)) => node,
            Ok(None) => return Ok(Err(format!("{} to register", config.node.name))),
            Err(error) => return Ok(Err(format!("{error:#}"))),
        };
        let conditions = node["status"]["conditions"].as_array();
        let ready = conditions.into_iter().flatten().find(|one| one["type"] == "Ready");
        Ok(match ready {
            Some(ready) if ready["status"] == "True" => Ok(config.node.name.clone()),
            Some(ready) => Err(ready["message"].as_str().unwrap_or("its condition").to_owned()),
            None => Err("its first status".to_owned()),
        })
    })
    .await
}

/// `https://HOST:PORT` of what people type as server.
pub(super) fn server_url(text: &str) -> anyhow::Result<String> {
    let bare = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
    let has_port = bare.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    match bare {
        "" => Err(output::usage("name the server as HOST:PORT")),
        _ if bare.contains('/') => Err(output::usage(format!("{text} is no HOST:PORT"))),
        _ if has_port => Ok(format!("https://{bare}")),
        _ if bare.contains(':') => Err(output::usage(format!("{text} is no HOST:PORT"))),
        _ => Ok(format!("https://{bare}:{}", orch_config::API_SERVER_PORT)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_named_in_the_usual_ways() {
        for text in ["10.0.0.1", "10.0.0.1:6443", "https://10.0.0.1:6443/"] {
            assert_eq!(server_url(text).expect(text), "https://10.0.0.1:6443");
        }
        assert_eq!(server_url("api.example:443").expect("name"), "https://api.example:443");
        for text in ["", ":6443", "a:b", "a/b", "a:0"] {
            assert!(server_url(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_new_host_has_everything_to_do() {
        let root = tempfile::tempdir().expect("a folder");
        let host = Host::new(root.path()).expect("host");
        let mut config = Config::default();
        config.node.name = "a".to_owned();
        let steps = plan(&host, &config);
        assert!(steps.iter().all(|(_, done)| !done));
        assert!(steps.iter().any(|(step, _)| step.contains("as detached processes")));
    }
}
