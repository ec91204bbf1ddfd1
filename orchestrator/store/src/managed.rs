//! A real etcd as a child process, for those who have none.
//!
//! The child outlives its parent: it sits in a process group of its own and writes its log to a file, so a crash, an upgrade
//! or `kill -9` of the server leaves it running, and the next server *adopts* it. An etcd is known by its command line
//! (program `etcd`, our `--data-dir`), found in `/proc`: unlike a pid file that cannot be stale, lost or too late.
//!
//! History is compacted by [`compaction`](crate::compaction), not by etcd: it is one rule for managed etcds and others.

mod process;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use process::{pid, stop};

/// Name of the program, looked up on the PATH.
const PROGRAM: &str = "etcd";
/// Size at which etcd refuses writes. Its default of 2 GiB is small for a cluster; it keeps all of it in memory maps.
const QUOTA_BYTES: u64 = 4 << 30;
/// Raft entries kept in memory. etcd's old default of 100 000 is 250 MB of pods; newer ones have this.
const SNAPSHOT_COUNT: u32 = 10_000;
/// Waits between two starts of an etcd that dies.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// One that ran for this long starts again without delay.
const SOUND: Duration = Duration::from_secs(60);
/// How long etcd may take to end when asked.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How often we look whether an adopted etcd, which is not our child, is alive. Its socket tells clients much sooner.
const LOOK: Duration = Duration::from_millis(500);

/// How to run etcd.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it keeps its data. Made if absent, for this user only.
    pub data_dir: PathBuf,
    /// Where its log goes.
    pub log_file: PathBuf,
    /// URLs that it serves clients on, `https://10.0.0.1:2379`.
    pub client_urls: Vec<String>,
    /// Certificates; with them, clients have to show one too. `None` is for plain HTTP on loopback, in tests.
    pub tls: Option<Tls>,
    /// Its place among several members; `None` for one that is alone for good, which nobody else can join.
    pub membership: Option<Membership>,
    /// Whether etcd goes on when we are cancelled.
    pub keep_running_on_exit: bool,
}

/// The place of a member in a cluster of several. etcd reads it at its first start only; later its data says.
#[derive(Debug, Clone)]
pub struct Membership {
    /// Its name.
    pub name: String,
    /// Where the other members reach it, `https://10.0.0.1:2380`. They show the certificates of [`Options::tls`].
    pub peer_url: String,
    /// Names and peer URLs of all members, this one among them.
    pub initial: Vec<(String, String)>,
    /// It joins members that run already, instead of starting with them.
    pub joining: bool,
}

/// Files for TLS.
#[derive(Debug, Clone)]
pub struct Tls {
    /// etcd's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authority that signs the clients' certificates.
    pub client_ca: PathBuf,
}

/// Why etcd cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not installed.
    #[error(
        "etcd is not on the PATH: install it (Debian and Ubuntu: `apt-get install etcd-server`)"
    )]
    Missing,
    /// It cannot be started.
    #[error("start etcd")]
    Start(#[source] io::Error),
    /// A folder cannot be made.
    #[error("create {}", path.display())]
    Folder {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The log file cannot be opened.
    #[error("open etcd's log {}", path.display())]
    Log {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It did not end when told to.
    #[error("end etcd, process {pid}")]
    Stop {
        /// Its process.
        pid: u32,
        /// Why.
        source: io::Error,
    },
}

/// A supervised etcd. Dropping it changes nothing: the supervisor runs until cancelled.
#[derive(Debug)]
pub struct Managed {
    supervisor: JoinHandle<()>,
}

impl Managed {
    /// Waits until the supervisor has ended, after its cancellation.
    pub async fn ended(self) {
        // A panic of the supervisor has been reported by the runtime.
        let _ = self.supervisor.await;
    }
}

/// Adopts the etcd that runs on the data folder, or starts one, and starts it again whenever it dies. Returns once it
/// runs; when it answers is for its clients to find out.
///
/// # Errors
/// When etcd cannot be started at all.
pub async fn spawn(mut options: Options, cancel: CancellationToken) -> Result<Managed, Error> {
    // etcd runs inside of its folder, and adoption compares the argument.
    options.data_dir = process::absolute(&options.data_dir);
    options.log_file = process::absolute(&options.log_file);
    if let Some(tls) = &mut options.tls {
        for path in [&mut tls.cert, &mut tls.key, &mut tls.client_ca] {
            *path = process::absolute(path);
        }
    }
    let first = launch(&options)?;
    let supervisor = tokio::spawn(supervise(options, first, cancel));
    Ok(Managed { supervisor })
}

/// A running etcd.
enum Etcd {
    Child(tokio::process::Child),
    Adopted(u32),
}

impl Etcd {
    /// Waits for its end, and tells how it ended.
    ///
    /// # Cancel safety
    /// Yes.
    async fn end(&mut self, data_dir: &Path) -> String {
        match self {
            Etcd::Child(child) => match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            },
            Etcd::Adopted(pid) => {
                while process::is_etcd(*pid, data_dir) {
                    tokio::time::sleep(LOOK).await;
                }
                "adopted process is gone".to_owned()
            }
        }
    }
}

async fn supervise(options: Options, first: Etcd, cancel: CancellationToken) {
    let mut etcd = first;
    let mut pause = BACKOFF.0;
    loop {
        let started = Instant::now();
        let how = tokio::select! {
            how = etcd.end(&options.data_dir) => how,
            () = cancel.cancelled() => break,
        };
        if started.elapsed() >= SOUND {
            pause = BACKOFF.0;
        }
        let last_words = last_words(&options.log_file);
        error!(how, last_words, log = %options.log_file.display(), retry_in = ?pause, "etcd has ended");
        etcd = loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = cancel.cancelled() => return,
            }
            pause = (pause * 2).min(BACKOFF.1);
            match launch(&options) {
                Ok(etcd) => break etcd,
                Err(error) => {
                    error!(%error, cause = ?std::error::Error::source(&error), "etcd cannot be started")
                }
            }
        };
    }
    if options.keep_running_on_exit {
        return;
    }
    let data_dir = options.data_dir.clone();
    match tokio::task::spawn_blocking(move || stop(&data_dir, STOP_GRACE)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(%error, "etcd goes on"),
        Err(error) => warn!(%error, "etcd may go on"),
    }
    if let Etcd::Child(mut child) = etcd {
        // Reaped, whatever the status.
        let _ = child.wait().await;
    }
}

fn launch(options: &Options) -> Result<Etcd, Error> {
    if let Some(pid) = pid(&options.data_dir) {
        info!(pid, "the etcd on this data folder still runs, it is adopted");
        return Ok(Etcd::Adopted(pid));
    }
    let private = |path: &Path| {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| Error::Folder { path: path.to_owned(), source })
    };
    private(&options.data_dir)?;
    if let Some(folder) = options.log_file.parent() {
        private(folder)?;
    }
    let log = open_log(&options.log_file)?;
    let also =
        log.try_clone().map_err(|source| Error::Log { path: options.log_file.clone(), source })?;
    let child = Command::new(PROGRAM)
        .args(arguments(options))
        // The peer socket is a relative name: an absolute one may be too long for a socket (108 bytes).
        .current_dir(&options.data_dir)
        // etcd takes every ETCD_* variable for a flag.
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| !name.to_string_lossy().starts_with("ETCD_")))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(also)
        // Out of reach of signals meant for us, such as the terminal's Ctrl-C.
        .process_group(0)
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Missing,
            _ => Error::Start(error),
        })?;
    info!(pid = child.id(), log = %options.log_file.display(), "etcd started");
    Ok(Etcd::Child(child))
}

/// What etcd wrote last: the `error` of its last line, or the line.
fn last_words(log_file: &Path) -> String {
    let text = std::fs::read(log_file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().last().unwrap_or_default();
    let entry: Option<serde_json::Value> = serde_json::from_str(line).ok();
    let error = entry.as_ref().and_then(|entry| entry["error"].as_str().or(entry["msg"].as_str()));
    error.unwrap_or(line).to_owned()
}

fn open_log(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| Error::Log { path: path.to_owned(), source })
}

/// The command line. For a cluster of one the peer address is never used, but etcd wants one; a socket in its own
/// folder is one that nobody else can reach.
fn arguments(options: &Options) -> Vec<String> {
    const NAME: &str = "orch";
    const PEER: &str = "unix://peer:0";
    let urls = options.client_urls.join(",");
    let (name, peer, initial) = match &options.membership {
        Some(member) => {
            let initial: Vec<String> =
                member.initial.iter().map(|(name, url)| format!("{name}={url}")).collect();
            (member.name.as_str(), member.peer_url.as_str(), initial.join(","))
        }
        None => (NAME, PEER, format!("{NAME}={PEER}")),
    };
    let mut arguments = vec![
        format!("--name={name}"),
        process::data_dir_argument(&options.data_dir),
        format!("--listen-client-urls={urls}"),
        format!("--advertise-client-urls={urls}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster={initial}"),
        format!("--quota-backend-bytes={QUOTA_BYTES}"),
        format!("--snapshot-count={SNAPSHOT_COUNT}"),
        // Nobody uses it, and it would call etcd with the server's certificate, which is none for clients.
        "--enable-grpc-gateway=false".to_owned(),
        "--logger=zap".to_owned(),
        "--log-level=warn".to_owned(),
    ];
    if let Some(tls) = &options.tls {
        arguments.extend([
            format!("--cert-file={}", tls.cert.display()),
            format!("--key-file={}", tls.key.display()),
            format!("--trusted-ca-file={}", tls.client_ca.display()),
            "--client-cert-auth".to_owned(),
        ]);
    }
    if let Some(member) = &options.membership {
        if member.joining {
            arguments.push("--initial-cluster-state=existing".to_owned());
        }
        // A member that lost its disk must not come back as one that remembers.
        arguments.push("--strict-reconfig-check".to_owned());
        if let Some(tls) = &options.tls {
            arguments.extend([
                format!("--peer-cert-file={}", tls.cert.display()),
                format!("--peer-key-file={}", tls.key.display()),
                format!("--peer-trusted-ca-file={}", tls.client_ca.display()),
                "--peer-client-cert-auth".to_owned(),
            ]);
        }
    }
    arguments
}
