//! `orchctl cert`: when the certificates of this host end, and new ones; `orchctl kubeconfig`.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use orch_client::Client;
use orch_pki::{Authority, Certificate, ETCD_NETWORK_USER, Identity, KUBELET_CLIENT_USER, Usage};
use serde_json::{Value, json};

use super::config::{self, Config};
use super::csr::{self, Signer};
use super::host::{self, Host, Part};
use super::init;
use crate::output;

/// Fewer days left than this is worth a warning.
pub(super) const SOON_DAYS: i64 = 30;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// All certificates of this host and when they end; exit code 1 when one has ended
    #[command(after_help = "Example: orchctl cert list -o json")]
    List {
        /// Prefix of every path, as given to init or join
        #[arg(long, default_value = "/", value_name = "DIR")]
        root: PathBuf,
        #[command(flatten)]
        format: super::Format,
    },
    /// Make new certificates with the same names, and restart what uses them; authorities stay
    #[command(after_help = "Example: orchctl cert renew")]
    Renew {
        /// Prefix of every path, as given to init or join
        #[arg(long, default_value = "/", value_name = "DIR")]
        root: PathBuf,
    },
}

#[derive(clap::Args)]
#[command(after_help = "Example: orchctl kubeconfig > ~/.kube/config\n\
             orchctl kubeconfig --user ann --group developers > ann.conf")]
pub(crate) struct KubeconfigFlags {
    /// Prefix of every path, as given to init
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// Make one for this user, valid for a year, instead of printing the administrator's
    #[arg(long)]
    user: Option<String>,
    /// Group of that user
    #[arg(long, requires = "user")]
    group: Option<String>,
}

/// One certificate of this host.
pub(super) struct Found {
    pub(super) name: String,
    pub(super) certificate: Certificate,
}

/// All certificates below the PKI folder, also those inside kubeconfig files.
pub(super) fn all(host: &Host) -> anyhow::Result<Vec<Found>> {
    let folder = host.paths.pki();
    let mut found = Vec::new();
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(error).with_context(|| format!("read {}", folder.display())),
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pem = if name.ends_with(".crt") {
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?
        } else if name.ends_with(".conf") {
            match inside(&fs::read_to_string(&path)?) {
                Some(pem) => pem,
                None => continue,
            }
        } else {
            continue;
        };
        let certificate = Certificate::parse(&pem).with_context(|| path.display().to_string())?;
        found.push(Found { name, certificate });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The client certificate of a kubeconfig.
fn inside(kubeconfig: &str) -> Option<String> {
    use base64::Engine as _;
    let config: Value = serde_saphyr::from_str(kubeconfig).ok()?;
    let text = config["users"][0]["user"]["client-certificate-data"].as_str()?;
    String::from_utf8(base64::engine::general_purpose::STANDARD.decode(text).ok()?).ok()
}

pub(crate) async fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::List { root, format } => {
            let found = all(&Host::new(&root)?)?;
            if found.is_empty() {
                bail!("this host has no certificates: `orchctl init` or `orchctl join` make them");
            }
            let rows: Vec<Value> = found.iter().map(row).collect();
            format.print(&json!(rows), || {
                output::table(
                    &["FILE", "NAME", "GROUP", "ISSUER", "DAYS LEFT", "ENDS"],
                    rows.iter().map(|row| {
                        let text = |key: &str| match &row[key] {
                            Value::String(text) => text.clone(),
                            other => other.to_string(),
                        };
                        ["file", "name", "group", "issuer", "daysLeft", "ends"].map(text).into()
                    }),
                )
            })?;
            Ok(u8::from(found.iter().any(|found| found.certificate.has_ended())))
        }
        Command::Renew { root } => {
            let host = Host::new(&root)?;
            let config = Config::read(&config::path(&host.paths))?
                .context("this host is part of no cluster")?;
            if config.is_control_plane() {
                renew_control_plane(&host, &config).await?;
            } else {
                renew_worker(&host, &config).await?;
            }
            Ok(0)
        }
    }
}

fn row(found: &Found) -> Value {
    let certificate = &found.certificate;
    let ends = jiff::Timestamp::from_second(certificate.not_after.unix_timestamp())
        .map(|time| time.to_string())
        .unwrap_or_default();
    json!({ "file": found.name, "name": certificate.user, "group": certificate.groups.join(","),
            "issuer": certificate.issuer, "daysLeft": certificate.days_left(), "ends": ends })
}

/// With the authorities at hand: the files are removed and made anew, with the names that the settings say.
async fn renew_control_plane(host: &Host, config: &Config) -> anyhow::Result<()> {
    let pki = host.paths.pki();
    for found in all(host)?.iter().filter(|found| !found.certificate.is_authority) {
        let path = pki.join(&found.name);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        eprintln!("  new: {}", found.name);
    }
    let made = init::open_pki(host, config)?;
    made.ensure_admin_kubeconfig(&config.own_url()?)?;
    host.stop_etcd()?;
    host.restart(Part::Server, config)?;
    let client = Client::from_kubeconfig(&pki.join("admin.conf"))?;
    init::wait_server(host, config, &client).await?;
    if config.node.agent {
        host.stop(Part::Agent, config)?;
        let servers = if config.cluster.servers.is_empty() {
            vec![config.own_url()?]
        } else {
            config.cluster.servers.clone()
        };
        init::start_agent(host, config, &made, &servers).await?;
        init::wait_node(host, config, &client).await?;
    }
    Ok(())
}

/// Without them: the cluster signs, for who shows the old certificate.
async fn renew_worker(host: &Host, config: &Config) -> anyhow::Result<()> {
    let pki = host.paths.pki();
    let node = config.node.name.as_str();
    let user = format!("system:node:{node}");
    let client = Client::from_kubeconfig(&pki.join("kubelet.conf"))?;
    let identity = Identity::client(&user, Some("system:nodes"));
    let (certificate, key) = csr::obtain(&client, Signer::NodeClient, node, &identity).await?;
    let serving = Identity {
        user: user.clone(),
        group: Some("system:nodes".to_owned()),
        dns_names: vec![node.to_owned()],
        addresses: vec![IpAddr::V4(config.address()?)],
        usage: Usage::Server,
    };
    let (serving_certificate, serving_key) =
        csr::obtain(&client, Signer::NodeServing, node, &serving).await?;
    let etcd = Identity::client(ETCD_NETWORK_USER, None);
    let (etcd_certificate, etcd_key) =
        csr::obtain(&client, Signer::EtcdClient, node, &etcd).await?;
    let ca = fs::read_to_string(pki.join("ca.crt")).context("read ca.crt")?;
    let kubeconfig = orch_pki::kubeconfig(&config.cluster.servers, &user, &ca, &certificate, &key);
    for (name, text, mode) in [
        ("kubelet.conf", &kubeconfig, 0o600),
        ("kubelet.key", &serving_key, 0o600),
        ("etcd-client.key", &etcd_key, 0o600),
        ("kubelet.crt", &serving_certificate, 0o644),
        ("etcd-client.crt", &etcd_certificate, 0o644),
    ] {
        host::write_file(&pki.join(name), text, mode)?;
        eprintln!("  new: {name}");
    }
    host.restart(Part::Agent, config)?;
    init::wait_node(host, config, &Client::from_kubeconfig(&pki.join("kubelet.conf"))?).await
}

/// Prints a kubeconfig.
pub(crate) fn kubeconfig(flags: &KubeconfigFlags) -> anyhow::Result<()> {
    let host = Host::new(&flags.root)?;
    let pki = host.paths.pki();
    let absent = |name: &str| {
        output::hinted(
            "run this on a control plane, as root; in a lab, `orchctl lab kubeconfig` prints the path of its kubeconfig",
            format!("{} is not there", pki.join(name).display()),
        )
    };
    let Some(user) = &flags.user else {
        let text = fs::read_to_string(pki.join("admin.conf")).map_err(|_| absent("admin.conf"))?;
        return output::line(text.trim_end());
    };
    if flags.group.as_deref() == Some("system:masters")
        || user.starts_with("system:")
        || user == KUBELET_CLIENT_USER
    {
        return Err(output::usage(format!(
            "{KUBELET_CLIENT_USER} and names that begin with system: are the cluster's own; for an administrator, copy \
             admin.conf"
        )));
    }
    if !pki.join("ca.key").exists() {
        return Err(absent("ca.key"));
    }
    let config =
        Config::read(&config::path(&host.paths))?.context("this host is part of no cluster")?;
    let authority = Authority::load_or_create(&pki, "ca", "orch-ca")?;
    let (certificate, key) = authority.issue(&Identity::client(user, flags.group.as_deref()))?;
    let servers = if config.cluster.servers.is_empty() {
        vec![config.own_url()?]
    } else {
        config.cluster.servers.clone()
    };
    let text =
        orch_pki::kubeconfig(&servers, user, authority.certificate_pem(), &certificate, &key);
    output::line(text.trim_end())
}
