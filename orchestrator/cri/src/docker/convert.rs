//! Between the boundary's words and Docker's. Pure.

use std::path::Path;
use std::time::SystemTime;

use bollard::errors::Error as DockerError;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerStateStatusEnum, EventMessage,
    HealthConfig, HostConfig, HostConfigLogConfig, ImageInspect, ImageSummary,
    Mount as DockerMount, MountBindOptions, MountBindOptionsPropagationEnum, MountType,
};

use crate::{
    Container, ContainerSpec, Error, Event, Image, Mount, NetworkMode, Propagation, State,
};

/// Time over which the CPU quota counts (CFS default; Kubernetes uses it too).
const CPU_PERIOD_MICROS: i64 = 100_000;
/// Logs are files that can be read back, whatever the engine's own default is; they are rotated at the kubelet's
/// defaults (containerLogMaxSize, containerLogMaxFiles).
const LOG_DRIVER: &str = "json-file";
const LOG_MAX_SIZE: &str = "10m";
const LOG_MAX_FILES: &str = "5";

pub(super) fn error(socket: &Path, error: DockerError) -> Error {
    match error {
        DockerError::DockerResponseServerError { status_code, message } => match status_code {
            404 => Error::NotFound(message),
            409 => Error::Conflict(message),
            code => Error::Engine { code, message },
        },
        DockerError::DockerStreamError { error } => Error::Engine { code: 500, message: error },
        DockerError::JsonDataError { message, .. } => Error::Stream(message),
        DockerError::RequestTimeoutError => Error::Unavailable {
            socket: socket.display().to_string(),
            reason: "no answer in time".to_owned(),
        },
        other => {
            Error::Unavailable { socket: socket.display().to_string(), reason: other.to_string() }
        }
    }
}

pub(super) fn container(found: ContainerInspectResponse) -> Container {
    let config = found.config.unwrap_or_default();
    let state = found.state.unwrap_or_default();
    let running = state.running.unwrap_or(false);
    let status = match state.status {
        _ if running => State::Running,
        Some(ContainerStateStatusEnum::CREATED)
            if state.error.as_deref().unwrap_or("").is_empty() =>
        {
            State::Created
        }
        _ => State::Exited {
            code: state.exit_code.unwrap_or_default(),
            oom_killed: state.oom_killed.unwrap_or(false),
            error: state.error.unwrap_or_default(),
        },
    };
    Container {
        id: found.id.unwrap_or_default(),
        labels: config.labels.unwrap_or_default().into_iter().collect(),
        state: status,
        pid: state.pid.and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default(),
        created_nanos: found
            .created
            .and_then(|time| i64::try_from(time.unix_timestamp_nanos()).ok())
            .unwrap_or_default(),
        started_at: state.started_at.unwrap_or_default(),
        finished_at: state.finished_at.unwrap_or_default(),
        image_id: found.image.unwrap_or_default(),
        tty: config.tty.unwrap_or(false),
        stop_signal: config.stop_signal.unwrap_or_default(),
    }
}

pub(super) fn event(event: EventMessage) -> Option<Event> {
    let kind = super::event_kind(event.action.as_deref()?)?;
    let actor = event.actor?;
    Some(Event {
        container: actor.id?,
        kind,
        labels: actor.attributes.unwrap_or_default().into_iter().collect(),
    })
}

/// Seconds and nanoseconds, as the engine takes times in queries.
pub(super) fn unix_time(at: SystemTime) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:09}", since.as_secs(), since.subsec_nanos())
}

pub(super) fn image(found: ImageInspect) -> Image {
    let mut names = found.repo_tags.unwrap_or_default();
    names.extend(found.repo_digests.unwrap_or_default());
    Image {
        id: found.id.unwrap_or_default(),
        names,
        size_bytes: found.size.unwrap_or_default(),
        user: found.config.and_then(|config| config.user).unwrap_or_default(),
    }
}

pub(super) fn image_summary(found: ImageSummary) -> Option<Image> {
    let mut names = found.repo_tags;
    names.extend(found.repo_digests);
    // What lost its tag is listed as `<none>`.
    names.retain(|name| !name.contains("<none>"));
    (!names.is_empty()).then_some(Image {
        id: found.id,
        names,
        size_bytes: found.size,
        user: String::new(),
    })
}

/// Docker pulls all tags of a name that has none.
pub(super) fn with_tag(reference: &str) -> String {
    let last = reference.rsplit('/').next().unwrap_or(reference);
    if last.contains(':') || last.contains('@') {
        reference.to_owned()
    } else {
        format!("{reference}:latest")
    }
}

pub(super) fn create_body(spec: &ContainerSpec) -> ContainerCreateBody {
    ContainerCreateBody {
        hostname: spec.hostname.clone(),
        user: spec.user.clone(),
        attach_stdin: Some(false),
        attach_stdout: Some(false),
        attach_stderr: Some(false),
        tty: Some(spec.tty),
        open_stdin: Some(spec.stdin),
        stdin_once: Some(spec.stdin_once),
        env: Some(spec.env.clone()),
        entrypoint: some(&spec.entrypoint),
        cmd: some(&spec.args),
        // The kubelet probes; the image's own check would only cost.
        healthcheck: Some(HealthConfig {
            test: Some(vec!["NONE".to_owned()]),
            ..HealthConfig::default()
        }),
        image: Some(spec.image.clone()),
        working_dir: spec.working_dir.clone(),
        labels: Some(spec.labels.clone().into_iter().collect()),
        host_config: Some(host_config(spec)),
        ..ContainerCreateBody::default()
    }
}

fn host_config(spec: &ContainerSpec) -> HostConfig {
    let ipc_mode = match &spec.ipc_of {
        _ if spec.host_ipc => "host".to_owned(),
        Some(other) => format!("container:{other}"),
        None => "shareable".to_owned(),
    };
    let pid_mode = match &spec.pid_of {
        _ if spec.host_pid => Some("host".to_owned()),
        Some(other) => Some(format!("container:{other}")),
        None => None,
    };
    let mut security_opt = Vec::new();
    if !spec.default_seccomp && !spec.privileged {
        security_opt.push("seccomp=unconfined".to_owned());
    }
    if spec.no_new_privileges {
        security_opt.push("no-new-privileges".to_owned());
    }
    HostConfig {
        cpu_shares: spec.cpu_shares,
        cpu_period: spec.cpu_quota.map(|_| CPU_PERIOD_MICROS),
        cpu_quota: spec.cpu_quota,
        memory: spec.memory_bytes,
        // Equal to the memory limit: no swap on top.
        memory_swap: spec.memory_bytes,
        oom_score_adj: spec.oom_score_adj,
        log_config: Some(HostConfigLogConfig {
            typ: Some(LOG_DRIVER.to_owned()),
            config: Some(
                [("max-size", LOG_MAX_SIZE), ("max-file", LOG_MAX_FILES)]
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .into(),
            ),
        }),
        network_mode: Some(match &spec.network {
            NetworkMode::None => "none".to_owned(),
            NetworkMode::Host => "host".to_owned(),
            NetworkMode::Container(other) => format!("container:{other}"),
        }),
        ipc_mode: Some(ipc_mode),
        pid_mode,
        mounts: Some(spec.mounts.iter().map(mount).collect()),
        cap_add: some(&spec.cap_add),
        cap_drop: some(&spec.cap_drop),
        group_add: some(&spec.extra_groups),
        privileged: Some(spec.privileged),
        readonly_rootfs: Some(spec.read_only_root),
        security_opt: some(&security_opt),
        sysctls: (!spec.sysctls.is_empty()).then(|| spec.sysctls.clone().into_iter().collect()),
        shm_size: spec.shm_bytes,
        ..HostConfig::default()
    }
}

fn mount(mount: &Mount) -> DockerMount {
    DockerMount {
        target: Some(mount.target.clone()),
        source: Some(mount.source.clone()),
        typ: Some(MountType::BIND),
        read_only: Some(mount.read_only),
        bind_options: Some(MountBindOptions {
            propagation: Some(match mount.propagation {
                Propagation::Private => MountBindOptionsPropagationEnum::RPRIVATE,
                Propagation::HostToContainer => MountBindOptionsPropagationEnum::RSLAVE,
                Propagation::Bidirectional => MountBindOptionsPropagationEnum::RSHARED,
            }),
            ..MountBindOptions::default()
        }),
        ..DockerMount::default()
    }
}

fn some(list: &[String]) -> Option<Vec<String>> {
    (!list.is_empty()).then(|| list.to_vec())
}

/// A layer with one executable file, `/program`.
pub(super) fn program_layer(program: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(program.len() as u64);
    header.set_mode(0o755);
    header.set_entry_type(tar::EntryType::Regular);
    archive.append_data(&mut header, "program", program)?;
    archive.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_tag_means_latest() {
        assert_eq!(with_tag("shop/web"), "shop/web:latest");
        assert_eq!(with_tag("host:5000/web"), "host:5000/web:latest");
        assert_eq!(with_tag("web:v1"), "web:v1");
        assert_eq!(with_tag("web@sha256:ab"), "web@sha256:ab");
    }

    #[test]
    fn a_joining_container_gets_the_sandbox_namespaces() {
        let spec = ContainerSpec {
            network: NetworkMode::Container("s".to_owned()),
            ipc_of: Some("s".to_owned()),
            cpu_quota: Some(50_000),
            ..ContainerSpec::default()
        };
        let host = create_body(&spec).host_config.expect("a host configuration");
        assert_eq!(host.network_mode.as_deref(), Some("container:s"));
        assert_eq!(host.ipc_mode.as_deref(), Some("container:s"));
        assert_eq!((host.cpu_period, host.cpu_quota), (Some(100_000), Some(50_000)));
        assert_eq!(host.security_opt.as_deref(), Some(&["seccomp=unconfined".to_owned()][..]));
    }
}
