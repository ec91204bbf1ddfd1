//! The lab's Docker engine and the anchor containers whose network namespaces are the nodes'.
//!
//! The lab has an engine of its own (own socket, data and containerd), so that it neither sees nor changes the
//! machine's; live-restore keeps pods running while it is restarted.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bollard::Docker;
use bollard::models::{ContainerCreateBody, HostConfig};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, KillContainerOptions, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
};

use super::layout::Lab;
use super::process::Daemon;
use super::programs::Programs;
use crate::{image, progress};

/// Label of an anchor container.
const ANCHOR_LABEL: &str = "orch.lab-anchor";
/// Label that the agent puts on every container of its node.
const NODE_LABEL: &str = "orch.node";
/// How long the engine may take to answer its first call.
const START_LIMIT: Duration = Duration::from_secs(60);

/// The tag under which the sandbox image is known, here and to the agents.
pub fn pause_image() -> String {
    format!("orch/pause:{}", orch_config::VERSION)
}

pub fn daemon(lab: &Lab) -> Daemon {
    Daemon::new("dockerd", &lab.run(), &lab.dir.join("log"))
}

/// Starts the engine unless it runs, and waits until it answers.
pub async fn ensure(lab: &Lab, programs: &Programs) -> anyhow::Result<Docker> {
    let engine = daemon(lab);
    let socket = lab.engine_socket();
    if engine.pid().is_none() {
        let path = |name: &str| lab.dir.join(name).to_string_lossy().into_owned();
        // A crash leaves these files; PIDs in them may by now be somebody else's.
        for stale in ["run/docker-exec/containerd/containerd.pid", "run/dockerd.own.pid"] {
            let _ = std::fs::remove_file(lab.dir.join(stale));
        }
        let args = [
            "--data-root".to_owned(),
            path("docker"),
            "--exec-root".to_owned(),
            path("run/docker-exec"),
            "--pidfile".to_owned(),
            path("run/dockerd.own.pid"),
            "--host".to_owned(),
            format!("unix://{}", socket.display()),
            "--live-restore".to_owned(),
            // The pod network is ours: Docker makes no bridge, no rules and no masquerading.
            "--bridge=none".to_owned(),
            "--iptables=false".to_owned(),
            "--ip6tables=false".to_owned(),
            "--ip-forward=false".to_owned(),
            "--ip-masq=false".to_owned(),
            "--log-opt".to_owned(),
            "max-size=10m".to_owned(),
            "--log-opt".to_owned(),
            "max-file=3".to_owned(),
        ];
        engine.start(&programs.dockerd, &args, None)?;
    }
    progress::wait("Docker engine", START_LIMIT, || async {
        if engine.pid().is_none() {
            bail!("the Docker engine does not stay up{}", engine.log_tail());
        }
        let answer = async { image::connect(&socket).await?.ping().await.context("ping") }.await;
        Ok(match answer {
            Ok(_) => Ok(String::new()),
            Err(_) => Err(format!("{}", socket.display())),
        })
    })
    .await?;
    image::connect(&socket).await
}

/// Brings the sandbox image into the engine.
pub async fn ensure_pause_image(docker: &Docker, programs: &Programs) -> anyhow::Result<()> {
    let tag = pause_image();
    if docker.inspect_image(&tag).await.is_ok() {
        return Ok(());
    }
    image::build_from_program(docker, &programs.pause, &tag).await
}

/// The running anchor of a node; made or replaced as needed. Returns its PID.
pub async fn ensure_anchor(docker: &Docker, lab: &Lab, node: &str) -> anyhow::Result<i64> {
    let name = lab.anchor(node);
    if let Some(pid) = running_pid(docker, &name).await {
        return Ok(pid);
    }
    remove(docker, &name).await?;
    let options = CreateContainerOptionsBuilder::default().name(&name).build();
    let body = ContainerCreateBody {
        image: Some(pause_image()),
        hostname: Some(node.to_owned()),
        labels: Some(HashMap::from([(ANCHOR_LABEL.to_owned(), node.to_owned())])),
        host_config: Some(HostConfig { network_mode: Some("none".to_owned()), ..HostConfig::default() }),
        ..ContainerCreateBody::default()
    };
    docker.create_container(Some(options), body).await.with_context(|| format!("create anchor {name}"))?;
    docker.start_container(&name, None).await.with_context(|| format!("start anchor {name}"))?;
    running_pid(docker, &name).await.with_context(|| format!("anchor {name} does not stay up"))
}

async fn running_pid(docker: &Docker, name: &str) -> Option<i64> {
    let state = docker.inspect_container(name, None).await.ok()?.state?;
    (state.running == Some(true)).then_some(state.pid?).filter(|pid| *pid > 0)
}

async fn remove(docker: &Docker, name: &str) -> anyhow::Result<()> {
    let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    match docker.remove_container(name, Some(options)).await {
        Ok(()) => Ok(()),
        Err(bollard::errors::Error::DockerResponseServerError { status_code: 404 | 409, .. }) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove container {name}")),
    }
}

/// Removes the anchor of a node, and with it the node's network namespace.
pub async fn remove_anchor(docker: &Docker, lab: &Lab, node: &str) -> anyhow::Result<()> {
    remove(docker, &lab.anchor(node)).await
}

/// Kills (SIGKILL) every running container of a node, as a power cut would do it.
pub async fn kill_containers(docker: &Docker, node: &str) -> anyhow::Result<usize> {
    let names = containers(docker, &format!("{NODE_LABEL}={node}"), false).await?;
    futures::future::join_all(
        names.iter().map(|id| docker.kill_container(id, Some(KillContainerOptions { signal: "SIGKILL".to_owned() }))),
    )
    .await;
    Ok(names.len())
}

/// Removes every container of the lab: pods and anchors.
pub async fn remove_all(docker: &Docker) -> anyhow::Result<()> {
    for label in [NODE_LABEL, ANCHOR_LABEL] {
        let ids = containers(docker, label, true).await?;
        for outcome in futures::future::join_all(ids.iter().map(|id| remove(docker, id))).await {
            outcome?;
        }
    }
    Ok(())
}

async fn containers(docker: &Docker, label: &str, all: bool) -> anyhow::Result<Vec<String>> {
    let filters = HashMap::from([("label".to_owned(), vec![label.to_owned()])]);
    let options = ListContainersOptionsBuilder::default().all(all).filters(&filters).build();
    let found = docker.list_containers(Some(options)).await.context("list containers")?;
    Ok(found.into_iter().filter_map(|container| container.id).collect())
}

/// Unmounts what is mounted below a folder, innermost first.
pub fn unmount_below(folder: &Path) -> anyhow::Result<()> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    // proc(5): the fifth field is the mount point, with blanks as \040.
    let mut points: Vec<String> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| point.replace("\\040", " "))
        .filter(|point| Path::new(point).starts_with(folder) && Path::new(point) != folder)
        .collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.len()));
    for point in points {
        nix::mount::umount2(point.as_str(), nix::mount::MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {point}"))?;
    }
    Ok(())
}
