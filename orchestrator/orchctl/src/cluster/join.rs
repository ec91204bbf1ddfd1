//! `orchctl join`: makes this host a worker, or a further control plane, of a cluster.
//!
//! The cluster is known by the pin of its authority, the host by a bootstrap token; everything else is signed by the
//! cluster, and no key leaves the host that made it.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use orch_client::{Client, ClientConfig};
use orch_pki::{AgentCredentials, ETCD_NETWORK_USER, Identity, SHARED_FILES, Usage};
use orch_store::EtcdConfig;
use orch_store::admin::{Admin, Member};

use super::config::{Config, Role};
use super::csr::{self, Signer};
use super::host::{Host, Part};
use super::init::{self, Known};
use super::{HostFlags, config, discovery, handover};
use crate::{output, progress};

/// How long etcd may take to be ready for a new member: others may be joining.
const ADD_LIMIT: Duration = Duration::from_secs(120);
/// How long a new member of etcd may take to catch up.
const PROMOTE_LIMIT: Duration = Duration::from_secs(120);
/// One try. etcd forgets a change of its members when its leader changes at the same moment, and would never answer.
const TRY_LIMIT: Duration = Duration::from_secs(5);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(500);

#[derive(clap::Args)]
#[command(
    after_help = "Example: orchctl join 10.0.0.1:6443 --token abcdef.0123456789abcdef --ca-hash sha256:…\n\
    `orchctl token create` on a control plane prints the whole command."
)]
pub(crate) struct Flags {
    /// API server of the cluster, HOST:PORT
    server: String,
    /// Bootstrap token
    #[arg(long, env = "ORCH_TOKEN", hide_env_values = true)]
    token: String,
    /// Hash of the public key of the cluster's authority, sha256:HEX
    #[arg(long, value_name = "HASH")]
    ca_hash: String,
    /// Become a further control plane, with a member of etcd
    #[arg(long, requires = "certificate_key")]
    control_plane: bool,
    /// Opens the authorities' keys that `token create --control-plane` handed over
    #[arg(long, value_name = "HEX", env = "ORCH_CERTIFICATE_KEY", hide_env_values = true)]
    certificate_key: Option<String>,
    /// Do not run pods on this host (control planes only)
    #[arg(long, requires = "control_plane")]
    no_agent: bool,
    #[command(flatten)]
    host: HostFlags,
}

pub(crate) async fn run(flags: Flags) -> anyhow::Result<()> {
    let host = Host::new(&flags.host.root)?;
    let url = init::server_url(&flags.server)?;
    if !flags.ca_hash.starts_with("sha256:") || flags.ca_hash.len() != 7 + 64 {
        return Err(output::usage("--ca-hash has to be sha256: and 64 hexadecimal digits"));
    }
    let role = if flags.control_plane { Role::ControlPlane } else { Role::Worker };
    let before = Config::read(&config::path(&host.paths))?;
    if before.is_some_and(|before| before.role != role) {
        return Err(output::hinted(
            "`orchctl reset` takes this host out of its cluster",
            "this host is part of a cluster already, in another role",
        ));
    }
    let mut config = flags.host.config(&host)?;
    config.role = role;
    config.node.agent = !flags.no_agent;
    config.complete()?;
    init::check(&host, &config, &flags.host).await?;
    if flags.host.dry_run {
        return init::show_plan(&host, &config, plan(&host, &config));
    }
    let authority = |text: &str| text.trim_start_matches("https://").to_owned();
    let mut found = None;
    progress::step("find the cluster", async {
        found = Some(discovery::authority(&authority(&url), &flags.ca_hash).await?);
        Ok(url.clone())
    })
    .await?;
    let Some((ca, _)) = found else { bail!("the cluster was not found") };
    let newcomer = Client::https(&ClientConfig {
        servers: vec![url.clone()],
        ca_pem: Some(ca.clone()),
        token: Some(flags.token.clone()),
        ..ClientConfig::default()
    })?;
    host.record_before()?;
    match &flags.certificate_key {
        Some(key) if flags.control_plane => {
            let id = flags.token.split('.').next().unwrap_or_default();
            control_plane(&host, config, &newcomer, &url, (id, key)).await
        }
        _ => worker(&host, config, &newcomer, &url, &ca).await,
    }
}

fn plan(host: &Host, config: &Config) -> Vec<(String, bool)> {
    let pki = host.paths.pki();
    let has = |name: &str| pki.join(name).exists();
    let mut steps =
        vec![("check that the cluster's authority has the pinned key".to_owned(), false)];
    if config.is_control_plane() {
        steps.extend([
            ("fetch the authorities' keys and make certificates".to_owned(), has("ca.key")),
            (
                "add this host to etcd, as a learner first".to_owned(),
                config.control_plane.etcd_joins,
            ),
            (
                format!("start etcd and the server ({})", init::supervisor(host, config)),
                host.pid(Part::Server, config).is_some(),
            ),
        ]);
    } else {
        steps.push((
            format!("get certificates for node {} signed by the cluster", config.node.name),
            has("kubelet.conf"),
        ));
    }
    steps.push((format!("write {}", config::path(&host.paths).display()), false));
    if config.node.agent {
        steps.push((
            format!("start the agent of node {}", config.node.name),
            host.pid(Part::Agent, config).is_some(),
        ));
    }
    steps
}

async fn worker(
    host: &Host,
    mut config: Config,
    newcomer: &Client,
    url: &str,
    ca: &str,
) -> anyhow::Result<()> {
    let conf = host.paths.pki().join("kubelet.conf");
    if conf.exists() {
        eprintln!("  this host has its certificates already: they are kept");
        let client = Client::from_kubeconfig(&conf)?;
        let known = init::read_cluster(&client).await?;
        take(&mut config, &known, url);
    } else {
        progress::step("certificates", async {
            let known = certificates(host, &config, newcomer, url, ca).await?;
            take(&mut config, &known, url);
            Ok("signed by the cluster".to_owned())
        })
        .await?;
    }
    config.write(&config::path(&host.paths))?;
    host.install_plugins()?;
    init::ensure(host, &config, Part::Agent)?;
    let client = Client::from_kubeconfig(&conf)?;
    init::wait_node(host, &config, &client).await?;
    eprintln!("\nThis host is a node of the cluster. On a control plane: orchctl get nodes");
    Ok(())
}

/// Keeps where the cluster's parts are.
fn take(config: &mut Config, known: &Known, url: &str) {
    config.cluster.servers.clone_from(&known.servers);
    if config.cluster.servers.is_empty() {
        config.cluster.servers.push(url.to_owned());
    }
    config.cluster.etcd.clone_from(&known.etcd);
}

/// All that an agent needs, signed by the cluster.
async fn certificates(
    host: &Host,
    config: &Config,
    newcomer: &Client,
    url: &str,
    ca: &str,
) -> anyhow::Result<Known> {
    let node = config.node.name.as_str();
    let user = format!("system:node:{node}");
    let (certificate, key) = csr::obtain(
        newcomer,
        Signer::NodeClient,
        node,
        &Identity::client(&user, Some("system:nodes")),
    )
    .await?;
    let client = Client::https(&ClientConfig {
        servers: vec![url.to_owned()],
        ca_pem: Some(ca.to_owned()),
        cert_pem: Some(certificate.clone()),
        key_pem: Some(key.clone()),
        ..ClientConfig::default()
    })?;
    let known = init::read_cluster(&client).await?;
    if known.etcd.is_empty() || known.etcd_ca.is_empty() {
        bail!(
            "the cluster does not say where its etcd is: run `orchctl init` on its control plane again"
        );
    }
    let serving = Identity {
        user: user.clone(),
        group: Some("system:nodes".to_owned()),
        dns_names: vec![node.to_owned()],
        addresses: vec![IpAddr::V4(config.address()?)],
        usage: Usage::Server,
    };
    let (serving_certificate, serving_key) =
        csr::obtain(&client, Signer::NodeServing, node, &serving).await?;
    let (etcd_certificate, etcd_key) =
        csr::obtain(&client, Signer::EtcdClient, node, &Identity::client(ETCD_NETWORK_USER, None))
            .await?;
    let servers =
        if known.servers.is_empty() { vec![url.to_owned()] } else { known.servers.clone() };
    AgentCredentials {
        kubeconfig: orch_pki::kubeconfig(&servers, &user, ca, &certificate, &key),
        ca: ca.to_owned(),
        serving_certificate,
        serving_key,
        etcd_ca: known.etcd_ca.clone(),
        etcd_certificate,
        etcd_key,
    }
    .write(&host.paths.pki())?;
    Ok(known)
}

async fn control_plane(
    host: &Host,
    mut config: Config,
    newcomer: &Client,
    url: &str,
    (token, key): (&str, &str),
) -> anyhow::Result<()> {
    let pki_dir = host.paths.pki();
    // All of them: whatever is missing would be made anew, and differ from the cluster's.
    let fetch = !SHARED_FILES.iter().all(|name| pki_dir.join(name).exists());
    if fetch {
        progress::step("authorities", async {
            for (name, text) in handover::download(newcomer, token, key).await? {
                let mode = if name.ends_with(".key") { 0o600 } else { 0o644 };
                super::host::write_file(&pki_dir.join(name), &text, mode)?;
            }
            Ok("handed over by the cluster".to_owned())
        })
        .await?;
    }
    let pki = init::open_pki(host, &config)?;
    // A client at the server that is up, until the own one is.
    let (certificate, admin_key) =
        pki.ca().issue(&Identity::client("kubernetes-admin", Some("system:masters")))?;
    let other = Client::https(&ClientConfig {
        servers: vec![url.to_owned()],
        ca_pem: Some(pki.ca().certificate_pem().to_owned()),
        cert_pem: Some(certificate),
        key_pem: Some(admin_key),
        ..ClientConfig::default()
    })?;
    if fetch && let Err(error) = handover::use_up(&other, token).await {
        // Not this host's to keep.
        for name in SHARED_FILES {
            let _ = std::fs::remove_file(pki_dir.join(name));
        }
        return Err(error);
    }
    let known = init::read_cluster(&other).await?;
    let etcd = EtcdConfig {
        endpoints: known
            .etcd
            .iter()
            .filter(|url| config.own_etcd().ok().as_ref() != Some(url))
            .cloned()
            .collect(),
        ca_pem: Some(pki.read("etcd-ca.crt")?),
        cert_pem: Some(pki.read("etcd-client.crt")?),
        key_pem: Some(pki.read("etcd-client.key")?),
    };
    if etcd.endpoints.is_empty() {
        bail!("the cluster names no etcd that this one could join");
    }
    let peer = format!("https://{}:{}", config.address()?, orch_config::ETCD_PEER_PORT);
    let mut admin = Admin::connect(&etcd).await?;
    if !host.paths.etcd_data().exists() || config.control_plane.etcd_members.is_empty() {
        let has_data = host.paths.etcd_data().exists();
        let members = add_member(&mut admin, &peer, has_data).await?;
        config.control_plane.etcd_joins = true;
        config.control_plane.etcd_members = named(&members, &config.node.name, &peer);
    }
    let mut servers = vec![config.own_url()?];
    servers.extend(
        known.servers.iter().filter(|url| **url != servers[0]).cloned().collect::<Vec<_>>(),
    );
    take(&mut config, &known, url);
    config.cluster.servers.clone_from(&servers);
    let own_etcd = config.own_etcd()?;
    if !config.cluster.etcd.contains(&own_etcd) {
        config.cluster.etcd.insert(0, own_etcd.clone());
    }
    config.write(&config::path(&host.paths))?;
    let admin_conf = pki.ensure_admin_kubeconfig(&config.own_url()?)?;
    orch_client::write_servers(&admin_conf, &servers)?;
    init::ensure(host, &config, Part::Server)?;
    promote(&mut admin, &peer, &host.paths.log(), || {
        let runs = host.pid(Part::Server, &config).is_some();
        (!runs).then(|| host.log_tail(Part::Server, &config))
    })
    .await?;
    let client = Client::from_kubeconfig(&admin_conf)?;
    // Its own server, not one of the others.
    client.set_servers(&[config.own_url()?])?;
    init::wait_server(host, &config, &client).await?;
    init::publish(&client, &config, &pki, &servers, &[own_etcd]).await?;
    if config.node.agent {
        init::start_agent(host, &config, &pki, &servers).await?;
        init::wait_node(host, &config, &client).await?;
    }
    eprintln!(
        "\nThis host is a control plane of the cluster. Use it:\n  export KUBECONFIG={}",
        admin_conf.display()
    );
    Ok(())
}

/// Adds this host to etcd's members as soon as etcd is ready for it. A member that this host once was, and whose data it
/// has no more, is removed first: it must not come back as one that remembers.
pub(crate) async fn add_member(
    admin: &mut Admin,
    peer: &str,
    has_data: bool,
) -> anyhow::Result<Vec<Member>> {
    let mut step = progress::Step::new("member of etcd");
    let deadline = tokio::time::Instant::now() + ADD_LIMIT;
    loop {
        let added = async {
            let members = admin.members().await?;
            let own = members.iter().find(|member| member.peer_urls.iter().any(|url| url == peer));
            if let Some(own) = own.filter(|own| !has_data && !own.name.is_empty()) {
                admin.remove(own).await?;
            }
            admin.add_learner(peer).await
        };
        let (error, waits_for) = match tokio::time::timeout(TRY_LIMIT, added).await {
            Ok(Ok(members)) => {
                step.done("added as a learner");
                return Ok(members);
            }
            Ok(Err(error)) => (error.to_string(), error.waits_for()),
            Err(_) => ("add this host".to_owned(), Some("etcd to answer")),
        };
        match waits_for {
            Some(what) if tokio::time::Instant::now() < deadline => step.waiting(what),
            Some(what) => {
                step.failed();
                return Err(output::hinted(
                    "`orchctl etcd status` on a control plane shows which member is down; `orchctl etcd remove` takes out one \
                     whose host is gone for good",
                    format!("{error}: waited {} s for {what}", ADD_LIMIT.as_secs()),
                ));
            }
            None => {
                step.failed();
                bail!("{error}");
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Names and peer URLs of all members, as etcd wants to hear them.
pub(crate) fn named(members: &[Member], own: &str, own_peer: &str) -> Vec<String> {
    let line = |member: &Member| {
        let url = member.peer_urls.first()?;
        // A member that has not started has no name yet: that is this one.
        let name = if url == own_peer { own } else { &member.name };
        Some(format!("{name}={url}"))
    };
    members.iter().filter_map(line).collect()
}

/// Waits until the own etcd has caught up, and gives it its vote. `down` says why the server that runs it does not, if so.
pub(crate) async fn promote(
    admin: &mut Admin,
    peer: &str,
    log: &Path,
    down: impl Fn() -> Option<String>,
) -> anyhow::Result<()> {
    let mut step = progress::Step::new("etcd");
    let deadline = tokio::time::Instant::now() + PROMOTE_LIMIT;
    loop {
        let tried = match admin.members().await {
            Ok(members) => {
                let Some(own) =
                    members.iter().find(|member| member.peer_urls.iter().any(|url| url == peer))
                else {
                    step.failed();
                    bail!(
                        "this host was removed from etcd's members: run `orchctl reset` and join again"
                    );
                };
                if !own.learner {
                    step.done(&format!("{} members", members.len()));
                    return Ok(());
                }
                tokio::time::timeout(TRY_LIMIT, admin.promote(own)).await
            }
            Err(error) => Ok(Err(error)),
        };
        let why = match tried {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.waits_for().map_or_else(|| error.to_string(), str::to_owned),
            Err(_) => "etcd to answer".to_owned(),
        };
        if let Some(last_words) = down() {
            step.failed();
            bail!("the server does not stay up{last_words}");
        }
        if tokio::time::Instant::now() > deadline {
            step.failed();
            bail!("this host's etcd did not catch up: {why}; see {}/etcd.log", log.display());
        }
        step.waiting(&why);
        tokio::time::sleep(RETRY).await;
    }
}
