//! `orchctl etcd`: the store of the cluster from an operator's side.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as Process;

use anyhow::{Context as _, bail};
use orch_client::Client;
use orch_store::EtcdConfig;
use orch_store::admin::{self, Admin, Member, Status};
use serde_json::{Value, json};

use super::config::{self, Config};
use super::host::{self, Host, Part};
use super::init;
use crate::{output, progress};

/// Where snapshots go that name no file.
const FOLDER: &str = "snapshots";
/// Beginning of their names; only such are ever removed by `--keep`.
const PREFIX: &str = "etcd-";

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// How every member is; exit code 1 when one does not answer
    #[command(after_help = "Example: orchctl etcd status")]
    Status {
        #[command(flatten)]
        at: At,
        #[command(flatten)]
        format: super::Format,
    },
    /// The members of the cluster
    #[command(after_help = "Example: orchctl etcd members -o json")]
    Members {
        #[command(flatten)]
        at: At,
        #[command(flatten)]
        format: super::Format,
    },
    /// Remove a member whose host is gone for good
    #[command(after_help = "Example: orchctl etcd remove control-3")]
    Remove {
        /// Name or id of the member
        member: String,
        #[command(flatten)]
        at: At,
    },
    /// Give the space of deleted data back to the file system, one member after the other
    #[command(after_help = "Example: orchctl etcd defrag")]
    Defrag {
        #[command(flatten)]
        at: At,
    },
    /// Backups
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
}

#[derive(clap::Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Write all data into a file
    #[command(after_help = "Example: orchctl etcd snapshot save --keep 7")]
    Save {
        /// Without it a new one in /var/lib/orch/snapshots, named by the time
        file: Option<PathBuf>,
        /// Afterwards keep only so many of the newest in that folder
        #[arg(long, value_name = "COUNT", conflicts_with = "file")]
        keep: Option<usize>,
        #[command(flatten)]
        at: At,
    },
    /// Check that a file is a whole snapshot
    #[command(after_help = "Example: orchctl etcd snapshot verify etcd.db")]
    Verify {
        file: PathBuf,
        #[command(flatten)]
        format: super::Format,
    },
    /// Make this host the only member, with the data of a snapshot; the data before is kept beside it
    #[command(after_help = "Example: orchctl etcd snapshot restore /backup/etcd.db --yes\n\
        Further control planes have to `orchctl reset` and join again. Pods go on running meanwhile.")]
    Restore {
        file: PathBuf,
        /// Prefix of every path, as given to init
        #[arg(long, default_value = "/", value_name = "DIR")]
        root: PathBuf,
        /// The cluster goes back to the state of the snapshot
        #[arg(long)]
        yes: bool,
    },
}

/// Which etcd.
#[derive(clap::Args)]
pub(crate) struct At {
    /// Prefix of every path, as given to init; its certificates are used
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// Client URLs; without them this host's own etcd
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    endpoints: Vec<String>,
}

impl At {
    fn config(&self) -> anyhow::Result<EtcdConfig> {
        let host = Host::new(&self.root)?;
        let endpoints = if self.endpoints.is_empty() {
            let config = Config::read(&config::path(&host.paths))?.ok_or_else(|| {
                output::hinted(
                    "run this on a control plane, or name --root and --endpoints",
                    "this host has no etcd of a cluster",
                )
            })?;
            vec![config.own_etcd()?]
        } else {
            self.endpoints.clone()
        };
        credentials(&host, endpoints)
    }
}

/// The control plane's own credentials at etcd.
pub(crate) fn credentials(host: &Host, endpoints: Vec<String>) -> anyhow::Result<EtcdConfig> {
    let pki = host.paths.pki();
    let read = |name: &str| {
        fs::read_to_string(pki.join(name)).map_err(|error| {
            output::hinted(
                "run this on a control plane, as root",
                format!("read {}: {error}", pki.join(name).display()),
            )
        })
    };
    Ok(EtcdConfig {
        endpoints,
        ca_pem: Some(read("etcd-ca.crt")?),
        cert_pem: Some(read("etcd-client.crt")?),
        key_pem: Some(read("etcd-client.key")?),
    })
}

/// One member and how it is, or why that is unknown.
pub(super) type Seen = (Member, Result<Status, String>);

/// Asks every member.
pub(super) async fn look(config: &EtcdConfig) -> anyhow::Result<Vec<Seen>> {
    let members = Admin::connect(config).await?.members().await?;
    let mut seen = Vec::new();
    for member in members {
        let status = match member.client_urls.first() {
            None => Err("it has not started yet".to_owned()),
            Some(url) => {
                let one = EtcdConfig { endpoints: vec![url.clone()], ..config.clone() };
                let ask = async { Admin::connect(&one).await?.status().await };
                match tokio::time::timeout(std::time::Duration::from_secs(5), ask).await {
                    Ok(Ok(status)) => Ok(status),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(_) => Err("no answer".to_owned()),
                }
            }
        };
        seen.push((member, status));
    }
    Ok(seen)
}

pub(crate) async fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Status { at, format } => status(&at.config()?, format).await,
        Command::Members { at, format } => {
            let members = Admin::connect(&at.config()?).await?.members().await?;
            format.print(&serde_json::to_value(&members)?, || {
                output::table(
                    &["ID", "NAME", "PEERS", "CLIENTS", "VOTES"],
                    members.iter().map(|member| {
                        vec![
                            member.id.clone(),
                            member.name.clone(),
                            member.peer_urls.join(","),
                            member.client_urls.join(","),
                            if member.learner { "no (learner)" } else { "yes" }.to_owned(),
                        ]
                    }),
                )
            })?;
            Ok(0)
        }
        Command::Remove { member, at } => {
            let mut admin = Admin::connect(&at.config()?).await?;
            let members = admin.members().await?;
            let found = members
                .iter()
                .find(|one| one.name == member || one.id == member)
                .with_context(|| format!("etcd has no member {member:?}"))?;
            if members.len() == 1 {
                bail!("{member} is the last member: `orchctl reset` ends the cluster");
            }
            admin.remove(found).await?;
            eprintln!("removed {}", found.name);
            Ok(0)
        }
        Command::Defrag { at } => {
            let config = at.config()?;
            let mut seen = look(&config).await?;
            // The leader last: until then nobody has to be elected twice.
            seen.sort_by_key(|(_, status)| status.as_ref().is_ok_and(|status| status.leader));
            for (member, status) in seen {
                let before = status.map_err(|why| anyhow::anyhow!("{}: {why}", member.name))?;
                let one = EtcdConfig { endpoints: member.client_urls.clone(), ..config.clone() };
                let mut admin = Admin::connect(&one).await?;
                admin.defragment().await.with_context(|| member.name.clone())?;
                let after = admin.status().await?;
                eprintln!(
                    "{}: {} → {}",
                    member.name,
                    bytes(before.size_bytes),
                    bytes(after.size_bytes)
                );
            }
            Ok(0)
        }
        Command::Snapshot(command) => snapshot(command).await.map(|()| 0),
    }
}

fn bytes(count: i64) -> String {
    format!("{:.1} MB", count as f64 / 1e6)
}

async fn status(config: &EtcdConfig, format: super::Format) -> anyhow::Result<u8> {
    let seen = look(config).await?;
    let data: Vec<Value> = seen
        .iter()
        .map(|(member, status)| match status {
            Ok(status) => json!({ "member": member, "status": status }),
            Err(why) => json!({ "member": member, "error": why }),
        })
        .collect();
    format.print(&json!(data), || {
        output::table(
            &["MEMBER", "STATE", "VERSION", "SIZE", "IN USE", "APPLIED", "PROBLEMS"],
            seen.iter().map(|(member, status)| match status {
                Ok(status) => {
                    let state = match (status.leader, member.learner) {
                        (true, _) => "leader",
                        (false, true) => "learner",
                        (false, false) => "follower",
                    };
                    vec![
                        member.name.clone(),
                        state.to_owned(),
                        status.version.clone(),
                        bytes(status.size_bytes),
                        bytes(status.used_bytes),
                        status.applied.to_string(),
                        status.errors.join("; "),
                    ]
                }
                Err(why) => {
                    let dash = || "-".to_owned();
                    vec![
                        member.name.clone(),
                        "down".to_owned(),
                        dash(),
                        dash(),
                        dash(),
                        dash(),
                        why.clone(),
                    ]
                }
            }),
        )
    })?;
    Ok(u8::from(seen.iter().any(|(_, status)| status.is_err())))
}

async fn snapshot(command: SnapshotCommand) -> anyhow::Result<()> {
    match command {
        SnapshotCommand::Save { file, keep, at } => {
            let folder = Host::new(&at.root)?.paths.lib().join(FOLDER);
            let path = match file {
                Some(path) => path,
                None => {
                    fs::create_dir_all(&folder)
                        .with_context(|| format!("create {}", folder.display()))?;
                    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
                    folder.join(format!("{PREFIX}{now}.db"))
                }
            };
            let begun = std::time::Instant::now();
            let size = Admin::connect(&at.config()?).await?.snapshot(&path).await?;
            eprintln!(
                "{} in {:.1} s, checksum verified; it holds every secret of the cluster: keep it safe, and beside it a copy of {}",
                bytes(i64::try_from(size).unwrap_or(i64::MAX)),
                begun.elapsed().as_secs_f64(),
                Host::new(&at.root)?.paths.pki().display()
            );
            if let Some(keep) = keep {
                for old in superfluous(&folder, keep)? {
                    fs::remove_file(&old).with_context(|| format!("remove {}", old.display()))?;
                    eprintln!("removed {}", old.display());
                }
            }
            output::line(&path.display().to_string())
        }
        SnapshotCommand::Verify { file, format } => {
            let size = admin::verify(&file)?;
            let mut data = json!({ "file": file, "bytes": size });
            if let Some(inside) = inside(&file) {
                data["revision"] = inside["revision"].clone();
                data["keys"] = inside["totalKey"].clone();
            }
            format.print(&data, || {
                let more = match (&data["revision"], &data["keys"]) {
                    (Value::Null, _) => String::new(),
                    (revision, keys) => format!(", revision {revision}, {keys} keys"),
                };
                output::line(&format!("{} is whole: {size} bytes{more}", file.display()))
            })
        }
        SnapshotCommand::Restore { file, root, yes } => restore(&file, &root, yes).await,
    }
}

/// What etcd's own tool says about a snapshot, where it is installed.
fn inside(file: &Path) -> Option<Value> {
    let out = Process::new(tool()?)
        .args(["snapshot", "status", "-w", "json"])
        .arg(file)
        .env("ETCDCTL_API", "3")
        .output()
        .ok()?;
    serde_json::from_slice(&out.stdout).ok()
}

/// `etcdutl` from etcd 3.5 on, `etcdctl` before.
fn tool() -> Option<&'static str> {
    ["etcdutl", "etcdctl"].into_iter().find(|name| host::on_path(name))
}

/// Snapshots beyond the newest `keep`; names sort by time.
fn superfluous(folder: &Path, keep: usize) -> anyhow::Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("read {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(PREFIX) && name.ends_with(".db")
        })
        .collect();
    all.sort();
    all.truncate(all.len().saturating_sub(keep.max(1)));
    Ok(all)
}

async fn restore(file: &Path, root: &Path, yes: bool) -> anyhow::Result<()> {
    let host = Host::new(root)?;
    let path = config::path(&host.paths);
    let mut config = Config::read(&path)?.filter(Config::is_control_plane).ok_or_else(|| {
        output::hinted(
            "`orchctl init` makes a control plane; copy /etc/orch from the old one first, so that the authorities are the same",
            "this host is no control plane",
        )
    })?;
    check_restorable(file)?;
    if !yes {
        return Err(output::usage(
            "this puts the cluster back to the state of the snapshot, and other control planes out of it: say so with --yes",
        ));
    }
    let data = host.paths.etcd_data();
    let peer = format!("https://{}:{}", config.address()?, orch_config::ETCD_PEER_PORT);
    progress::step("stop the server and etcd", async {
        host.stop(Part::Server, &config)?;
        host.stop_etcd()?;
        Ok(String::new())
    })
    .await?;
    progress::step("restore", async {
        Ok(match put_back(file, &data, &config.node.name, &peer)? {
            Some(old) => format!("the data before is in {}", old.display()),
            None => String::new(),
        })
    })
    .await?;
    // Its peers are gone from etcd's point of view.
    config.control_plane.etcd_members.clear();
    config.control_plane.etcd_joins = false;
    config.cluster.servers.clear();
    config.cluster.etcd.clear();
    config.write(&path)?;
    let pki = init::open_pki(&host, &config)?;
    init::ensure(&host, &config, Part::Server)?;
    let admin_conf = pki.ensure_admin_kubeconfig(&config.own_url()?)?;
    // The others are out of it: whatever they still answer is not this cluster.
    orch_client::write_servers(&admin_conf, &[config.own_url()?])?;
    let client = Client::from_kubeconfig(&admin_conf)?;
    init::wait_server(&host, &config, &client).await?;
    // What the snapshot says of other control planes is no longer true.
    let (own_url, own_etcd) = (config.own_url()?, config.own_etcd()?);
    init::change_cluster(&client, |known| {
        known.servers = vec![own_url.clone()];
        known.etcd = vec![own_etcd.clone()];
        known.etcd_ca = pki.etcd_ca().certificate_pem().to_owned();
    })
    .await?;
    eprintln!("restored; further control planes: `orchctl reset`, then join again");
    Ok(())
}

/// What a restore needs, before anything is stopped for it.
pub(crate) fn check_restorable(file: &Path) -> anyhow::Result<()> {
    admin::verify(file)?;
    restore_tool().map(drop)
}

fn restore_tool() -> anyhow::Result<&'static str> {
    tool().ok_or_else(|| {
        output::hinted("apt-get install etcd-client", "neither etcdutl nor etcdctl is installed")
    })
}

/// Makes the data folder of an etcd that does not run from a snapshot: the only member of a new cluster. Returns where the
/// data before is kept.
pub(crate) fn put_back(
    file: &Path,
    data: &Path,
    name: &str,
    peer: &str,
) -> anyhow::Result<Option<PathBuf>> {
    let tool = restore_tool()?;
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
    let fresh = data.with_extension("restored");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).with_context(|| format!("remove {}", fresh.display()))?;
    }
    let out = Process::new(tool)
        .args(["snapshot", "restore"])
        .arg(file)
        .arg(format!("--data-dir={}", fresh.display()))
        .arg(format!("--name={name}"))
        .arg(format!("--initial-cluster={name}={peer}"))
        .arg(format!("--initial-advertise-peer-urls={peer}"))
        // Another cluster than the one before: members of that one which still run must not take it for theirs.
        .arg(format!("--initial-cluster-token=orch-{now}"))
        .env("ETCDCTL_API", "3")
        .output()
        .with_context(|| format!("run {tool}"))?;
    if !out.status.success() {
        bail!("{tool}: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    orch_store::epoch::begin(&fresh).with_context(|| format!("write to {}", fresh.display()))?;
    let old = data.with_extension(format!("before-{now}"));
    let had_data = data.exists();
    if had_data {
        fs::rename(data, &old).with_context(|| format!("rename {}", data.display()))?;
    }
    fs::rename(&fresh, data).with_context(|| format!("rename {}", fresh.display()))?;
    Ok(had_data.then_some(old))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_oldest_snapshots_of_ours_are_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["etcd-1.db", "etcd-2.db", "etcd-3.db", "notes.txt", "mine.db"] {
            fs::write(folder.path().join(name), "").expect("write");
        }
        let names = |keep| -> Vec<String> {
            superfluous(folder.path(), keep)
                .expect("read")
                .iter()
                .map(|path| path.file_name().expect("a name").to_string_lossy().into_owned())
                .collect()
        };
        assert_eq!(names(2), ["etcd-1.db"]);
        assert!(names(5).is_empty());
        assert_eq!(names(0), ["etcd-1.db", "etcd-2.db"], "one is always kept");
    }
}
