//! Starting a pod: sandbox, network, containers.
//!
//! A sandbox takes the engine about twice as long to start as a container, so containers are created meanwhile and
//! only started once the network is there (reference/lab-baselines.md §3.1).

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use orch_api::k8s_openapi::api::core::v1::{Container, Pod};
use orch_cri::{ContainerSpec, Error, Image, NODE_LABEL};

use crate::api::{self, PodRef};
use crate::context::Context;
use crate::labels;
use crate::network::Place;
use crate::pod::container::{self, Parts, Sandbox};
use crate::pod::env::{self, References};
use crate::pod::network_state::Connected;
use crate::pod::plan::{Start, Waiting};
use crate::pod::{fields, hosts};
use crate::volume::Volumes;

/// Why a container is not there: for its waiting state, or because the engine is away.
#[derive(Debug)]
pub(crate) enum Failure {
    Engine(Error),
    Waiting(Waiting),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Engine(error)
    }
}

fn waiting(reason: &str, message: impl Into<String>) -> Failure {
    Failure::Waiting(Waiting { reason: reason.to_owned(), message: message.into() })
}

/// What containers of a pod are made from.
pub(crate) struct Materials {
    pub(crate) references: References,
    pub(crate) volumes: Volumes,
    pub(crate) services: Vec<(String, String)>,
    pub(crate) folder: PathBuf,
}

/// Files of the agent in the pod's folder.
pub(crate) fn hosts_path(folder: &Path) -> PathBuf {
    folder.join("etc-hosts")
}

pub(crate) fn resolv_path(folder: &Path) -> PathBuf {
    folder.join("resolv.conf")
}

pub(crate) fn termination_path(folder: &Path, container: &str, attempt: u32) -> PathBuf {
    folder.join("containers").join(format!("{container}.{attempt}.log"))
}

/// Writes the files that every container of the pod gets. The hosts file is written in place, as containers hold it
/// by a bind mount.
///
/// # Errors
/// The disk refuses.
pub(crate) fn write_files(
    cx: &Context,
    pod: &Pod,
    folder: &Path,
    ips: &[IpAddr],
) -> std::io::Result<()> {
    std::fs::create_dir_all(folder.join("containers"))?;
    let node_hosts = if api::is_host_network(pod) {
        std::fs::read_to_string("/etc/hosts").unwrap_or_default()
    } else {
        String::new()
    };
    std::fs::write(hosts_path(folder), hosts::hosts_file(pod, ips, &cx.dns, &node_hosts))?;
    let resolv = std::fs::read_to_string(&cx.options.resolv_conf).unwrap_or_default();
    std::fs::write(resolv_path(folder), hosts::resolv_conf(pod, ips, &cx.dns, &resolv))
}

/// Makes a sandbox, without starting it.
pub(crate) async fn create_sandbox(
    cx: &Context,
    pod: &Pod,
    attempt: u32,
) -> Result<Sandbox, Error> {
    let host_network = cx.host_network();
    let spec = container::sandbox_spec(pod, attempt, &cx.options.pause_image, &host_network);
    let id = match create(cx, &spec).await {
        Err(Error::NotFound(_)) => {
            ensure_pause_image(cx).await?;
            create(cx, &spec).await?
        }
        other => other?,
    };
    Ok(Sandbox { id, host_network })
}

/// Creates a container. What an agent that died between creating and starting it left under the same name is
/// replaced; anything else of that name belongs to somebody else and stays.
async fn create(cx: &Context, spec: &ContainerSpec) -> Result<String, Error> {
    let conflict = match cx.runtime().create(spec).await {
        Err(Error::Conflict(conflict)) => conflict,
        other => return other,
    };
    let Some(old) = cx.runtime().inspect(&spec.name).await? else {
        return cx.runtime().create(spec).await;
    };
    if old.is_running() || old.label(NODE_LABEL) != cx.options.node_name {
        return Err(Error::Conflict(conflict));
    }
    cx.runtime().remove(&old.id).await?;
    cx.runtime().create(spec).await
}

/// Brings the sandbox image into the engine if it is not there.
pub(crate) async fn ensure_pause_image(cx: &Context) -> Result<(), Error> {
    if cx.runtime().image(&cx.options.pause_image).await?.is_some() {
        return Ok(());
    }
    let path = &cx.options.pause_binary;
    let program = std::fs::read(path).map_err(|error| Error::Engine {
        code: 400,
        message: format!(
            "the sandbox image needs {}: {error}; `make build` makes it",
            path.display()
        ),
    })?;
    cx.runtime().import_program(&cx.options.pause_image, program.into()).await
}

/// Starts a sandbox and connects it. On failure the network is left as it was; the sandbox stays for the next look.
pub(crate) async fn start_sandbox(
    cx: &Context,
    pod: &Pod,
    sandbox: &Sandbox,
    folder: &Path,
) -> Result<Vec<IpAddr>, String> {
    cx.runtime().start(&sandbox.id).await.map_err(|error| format!("start sandbox: {error}"))?;
    let ips = if api::is_host_network(pod) {
        vec![cx.options.node_ip]
    } else {
        let found = cx.runtime().inspect(&sandbox.id).await.map_err(|error| error.to_string())?;
        let pid = found.filter(|found| found.is_running()).map(|found| found.pid);
        let pid = pid.ok_or("the sandbox ended right after its start; see whether the pause program is a static one")?;
        let netns = cx.network.pin(pid, &sandbox.id).await?;
        let place = Place::new(&PodRef::of(pod), &sandbox.id, netns).with_ports(pod);
        match cx.network.add(&place).await {
            Ok(ips) => ips,
            Err(error) => {
                if let Err(left) = cx.network.remove(&place).await {
                    tracing::warn!(pod = %place.pod, error = left, "network of a failed sandbox not released");
                }
                return Err(error);
            }
        }
    };
    let connected = Connected { sandbox: sandbox.id.clone(), ips: ips.clone() };
    connected
        .write(folder)
        .map_err(|error| format!("note the sandbox's address in {}: {error}", folder.display()))?;
    Ok(ips)
}

/// Disconnects and removes one sandbox, running or not. Safe to repeat.
///
/// # Errors
/// The text is for the log; it is tried again.
pub(crate) async fn remove_sandbox(cx: &Context, pod: &PodRef, id: &str) -> Result<(), String> {
    let place = Place::new(pod, id, cx.network.netns_path(id));
    cx.network.remove(&place).await?;
    cx.runtime().remove(id).await.map_err(|error| error.to_string())
}

/// Whether a container can only be created once the pod has its address.
pub(crate) fn needs_address(container: &Container) -> bool {
    let fields = container
        .env
        .iter()
        .flatten()
        .filter_map(|variable| variable.value_from.as_ref()?.field_ref.as_ref());
    fields.into_iter().any(|field| fields::needs_address(&field.field_path))
}

/// Creates a container.
pub(crate) async fn create_container(
    cx: &Arc<Context>,
    pod: &Pod,
    start: &Start,
    image: &Image,
    sandbox: &Sandbox,
    materials: &Materials,
    ips: &[IpAddr],
) -> Result<String, Failure> {
    let config = |message: String| waiting("CreateContainerConfigError", message);
    let wanted = api::find_container(pod, &start.name)
        .ok_or_else(|| config(format!("the pod has no container {}", start.name)))?;
    let env =
        env::environment(pod, &wanted, &cx.place(ips), &materials.references, &materials.services)
            .map_err(config)?;
    let log = termination_path(&materials.folder, &start.name, start.attempt);
    std::fs::write(&log, b"")
        .and_then(|()| make_writable(&log))
        .map_err(|error| config(error.to_string()))?;
    let parts = Parts {
        sandbox,
        attempt: start.attempt,
        env,
        volumes: &materials.volumes,
        hosts: &hosts_path(&materials.folder),
        resolv_conf: &resolv_path(&materials.folder),
        termination_log: &log,
        image_user: &image.user,
        node_memory_bytes: cx.machine.memory_bytes,
    };
    let mut spec = container::container_spec(pod, &wanted, parts).map_err(config)?;
    if let Some(target) = api::ephemeral_target(pod, &start.name)
        && !spec.host_pid
        && spec.pid_of.is_none()
    {
        let found = running(cx, pod, target).await?;
        spec.pid_of = Some(found.ok_or_else(|| {
            waiting("CreateContainerError", format!("container {target} does not run"))
        })?);
    }
    create(cx, &spec).await.map_err(|error| match error {
        error if error.is_unavailable() => Failure::Engine(error),
        error => waiting("CreateContainerError", error.to_string()),
    })
}

/// ID of the pod's running container of that name.
async fn running(cx: &Context, pod: &Pod, name: &str) -> Result<Option<String>, Failure> {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let found = cx.runtime().list(&[(labels::POD_UID, uid), (labels::CONTAINER, name)]).await?;
    Ok(found.into_iter().find(orch_cri::Container::is_running).map(|found| found.id))
}

/// Any user of the container may leave a message.
fn make_writable(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
}

/// Starts a created container.
pub(crate) async fn start_container(cx: &Context, id: &str) -> Result<(), Failure> {
    cx.runtime().start(id).await.map_err(|error| match error {
        error if error.is_unavailable() => Failure::Engine(error),
        error => {
            waiting("RunContainerError", format!("failed to start container \"{id}\": {error}"))
        }
    })
}
