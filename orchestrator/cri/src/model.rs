//! The words of the boundary: containers, images, events and sessions, as plain data.

use std::collections::BTreeMap;
use std::pin::Pin;

use bytes::Bytes;
use futures::stream::BoxStream;
use tokio::io::AsyncWrite;

use crate::Result;

/// What the engine says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineInfo {
    /// As in a container ID's scheme: `docker`.
    pub name: String,
    pub version: String,
    /// Folder that images and containers live in.
    pub data_root: String,
    pub operating_system: String,
    /// Whether containers survive a restart of the engine.
    pub live_restore: bool,
}

/// Where a container stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Created,
    Running,
    Exited { code: i64, oom_killed: bool, error: String },
}

/// A container with what the kubelet reads from it. Times are RFC 3339 as the engine writes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    pub id: String,
    pub labels: BTreeMap<String, String>,
    pub state: State,
    /// 0 unless it runs.
    pub pid: i32,
    /// Unix time in nanoseconds: tells which of two containers is newer.
    pub created_nanos: i64,
    pub started_at: String,
    pub finished_at: String,
    pub image_id: String,
    pub tty: bool,
    /// Signal that asks it to end; empty for the default.
    pub stop_signal: String,
}

impl Container {
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.state == State::Running
    }

    /// A label, or the empty string.
    #[must_use]
    pub fn label(&self, key: &str) -> &str {
        self.labels.get(key).map_or("", String::as_str)
    }
}

/// Which network namespace a container lives in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// A new one with nothing but `lo`.
    #[default]
    None,
    Host,
    /// That of another container, by ID or name.
    Container(String),
}

/// How mounts move between the container and the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Propagation {
    #[default]
    Private,
    HostToContainer,
    Bidirectional,
}

/// A bind mount.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mount {
    pub source: String,
    pub target: String,
    pub read_only: bool,
    pub propagation: Propagation,
}

/// A whole wanted container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerSpec {
    pub name: String,
    pub image: String,
    pub labels: BTreeMap<String, String>,
    /// Replaces the image's entry point when not empty.
    pub entrypoint: Vec<String>,
    /// Replaces the image's command when not empty; an entry point given here clears it as well.
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: Option<String>,
    /// `uid[:gid]`; none is the image's.
    pub user: Option<String>,
    pub extra_groups: Vec<String>,
    /// Not allowed for containers that join another's network.
    pub hostname: Option<String>,
    pub network: NetworkMode,
    /// Container whose IPC namespace is joined; none makes one that others can join.
    pub ipc_of: Option<String>,
    pub host_ipc: bool,
    /// Container whose PID namespace is joined.
    pub pid_of: Option<String>,
    pub host_pid: bool,
    pub mounts: Vec<Mount>,
    pub tty: bool,
    pub stdin: bool,
    pub stdin_once: bool,
    pub privileged: bool,
    pub cap_add: Vec<String>,
    pub cap_drop: Vec<String>,
    pub read_only_root: bool,
    pub no_new_privileges: bool,
    /// The engine's own seccomp profile; otherwise none is in force, as Kubernetes has it by default.
    pub default_seccomp: bool,
    /// Relative CPU weight, 1024 per CPU.
    pub cpu_shares: Option<i64>,
    /// Microseconds of CPU per period of 100 ms.
    pub cpu_quota: Option<i64>,
    pub memory_bytes: Option<i64>,
    pub oom_score_adj: Option<i64>,
    pub sysctls: BTreeMap<String, String>,
    /// Size of `/dev/shm`; none is the engine's default.
    pub shm_bytes: Option<i64>,
}

/// An image in the engine's store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// `sha256:…` of its configuration.
    pub id: String,
    /// `name:tag` and `name@digest` forms.
    pub names: Vec<String>,
    pub size_bytes: i64,
    /// User of the image's configuration, may be empty.
    pub user: String,
}

/// User and password for a registry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    pub server: String,
    pub username: String,
    pub password: String,
}

/// What happened to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Started,
    Died,
    Removed,
}

/// A change of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub container: String,
    pub kind: EventKind,
    pub labels: BTreeMap<String, String>,
}

/// Which part of a log is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogQuery {
    pub follow: bool,
    pub timestamps: bool,
    /// Only the last lines.
    pub tail: Option<u64>,
    /// Only from this second on (Unix time).
    pub since: Option<i64>,
}

/// A piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    Stdout(Bytes),
    Stderr(Bytes),
}

impl Output {
    /// The bytes, whichever stream they came on.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        match self {
            Self::Stdout(bytes) | Self::Stderr(bytes) => bytes,
        }
    }
}

/// A command to run in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecSpec {
    pub command: Vec<String>,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// A running command, or an attachment to a container: its output ends when it does. Shutting the input down is
/// end of file for the command.
pub struct Session {
    pub id: String,
    pub output: BoxStream<'static, Result<Output>>,
    pub input: Pin<Box<dyn AsyncWrite + Send>>,
}

/// Where a command stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExecState {
    pub running: bool,
    pub exit_code: i64,
}
