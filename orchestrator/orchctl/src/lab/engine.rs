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
    CreateContainerOptionsBuilder, KillContainerOptions, ListContainersOptionsBuilder,
    RemoveContainerOptionsBuilder,
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
pub(crate) fn pause_image() -> String {
    format!("orch/pause:{}", orch_config::VERSION)
}

pub(crate) fn daemon(lab: &Lab) -> Daemon {
    Daemon::new("dockerd", &lab.run(), &lab.dir.join("log"))
}

/// containerd of the lab, started by us: dockerd would otherwise take the machine's where one runs, and share its
/// containers; and one that dockerd starts dies with it.
pub(crate) fn containerd(lab: &Lab) -> Daemon {
    Daemon::new("containerd", &lab.run(), &lab.dir.join("log"))
}

/// Both daemons' settings, complete, so that nothing comes from the machine's configuration files.
fn write_settings(lab: &Lab) -> anyhow::Result<(String, String)> {
    let path = |name: &str| lab.dir.join(name).to_string_lossy().into_owned();
    let (containerd, docker) = (path("run/containerd.toml"), path("run/docker.json"));
    // `cri` is for kubelets of another kind; `opt` makes folders under /opt.
    let text = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
         [grpc]\naddress = {:?}\n[debug]\nlevel = \"warn\"\n",
        path("containerd"),
        path("run/containerd"),
        lab.containerd_socket().to_string_lossy(),
    );
    for (file, text) in [(&containerd, text.as_str()), (&docker, "{}\n")] {
        std::fs::create_dir_all(lab.run())
            .with_context(|| format!("create {}", lab.run().display()))?;
        std::fs::write(file, text).with_context(|| format!("write {file}"))?;
    }
    Ok((containerd, docker))
}

/// Starts the engine unless it runs, and waits until it answers.
pub(crate) async fn ensure(lab: &Lab, programs: &Programs) -> anyhow::Result<Docker> {
    let (engine, containerd) = (daemon(lab), containerd(lab));
    let socket = lab.engine_socket();
    let (containerd_settings, docker_settings) = write_settings(lab)?;
    if containerd.pid().is_none() {
        containerd.start(
            &programs.containerd,
            &["--config".to_owned(), containerd_settings],
            None,
        )?;
    }
    if engine.pid().is_none() {
        let path = |name: &str| lab.dir.join(name).to_string_lossy().into_owned();
        // A crash leaves it, and the PID in it may by now be somebody else's.
        let _ = std::fs::remove_file(lab.dir.join("run/dockerd.own.pid"));
        let args = [
            "--config-file".to_owned(),
            docker_settings,
            "--containerd".to_owned(),
            lab.containerd_socket().to_string_lossy().into_owned(),
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
            "--log-level=warn".to_owned(),
            "--log-opt".to_owned(),
            "max-size=10m".to_owned(),
            "--log-opt".to_owned(),
            "max-file=3".to_owned(),
        ];
        // dockerd gives up when containerd's socket is not there yet.
        progress::wait("containerd", START_LIMIT, || async {
            if containerd.pid().is_none() {
                bail!("containerd does not stay up{}", containerd.log_tail());
            }
            let answer = tokio::net::UnixStream::connect(lab.containerd_socket()).await;
            Ok(answer
                .map(|_| String::new())
                .map_err(|_| lab.containerd_socket().display().to_string()))
        })
        .await?;
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
pub(crate) async fn ensure_pause_image(docker: &Docker, programs: &Programs) -> anyhow::Result<()> {
    let tag = pause_image();
    if docker.inspect_image(&tag).await.is_ok() {
        return Ok(());
    }
    image::build_from_program(docker, &programs.pause, &tag).await
}

/// The running anchor of a node; made or replaced as needed. Returns its PID.
pub(crate) async fn ensure_anchor(docker: &Docker, lab: &Lab, node: &str) -> anyhow::Result<i64> {
    let name = lab.anchor(node);
    if let Some(pid) = running_pid(docker, &name).await {
        return Ok(pid);
    }
    remove_container(docker, &name).await?;
    let options = CreateContainerOptionsBuilder::default().name(&name).build();
    let body = ContainerCreateBody {
        image: Some(pause_image()),
        hostname: Some(node.to_owned()),
        labels: Some(HashMap::from([(ANCHOR_LABEL.to_owned(), node.to_owned())])),
        host_config: Some(HostConfig {
            network_mode: Some("none".to_owned()),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    };
    docker
        .create_container(Some(options), body)
        .await
        .with_context(|| format!("create anchor {name}"))?;
    docker.start_container(&name, None).await.with_context(|| format!("start anchor {name}"))?;
    running_pid(docker, &name).await.with_context(|| format!("anchor {name} does not stay up"))
}

async fn running_pid(docker: &Docker, name: &str) -> Option<i64> {
    let state = docker.inspect_container(name, None).await.ok()?.state?;
    (state.running == Some(true)).then_some(state.pid?).filter(|pid| *pid > 0)
}

/// Removes one container, running or not, if it is there.
pub(crate) async fn remove_container(docker: &Docker, name: &str) -> anyhow::Result<()> {
    let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    match docker.remove_container(name, Some(options)).await {
        Ok(()) => Ok(()),
        Err(bollard::errors::Error::DockerResponseServerError {
            status_code: 404 | 409, ..
        }) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove container {name}")),
    }
}

/// Removes the anchor of a node, and with it the node's network namespace.
pub(crate) async fn remove_anchor(docker: &Docker, lab: &Lab, node: &str) -> anyhow::Result<()> {
    remove_container(docker, &lab.anchor(node)).await
}

/// Kills (SIGKILL) every running container of a node, as a power cut would do it.
pub(crate) async fn kill_containers(docker: &Docker, node: &str) -> anyhow::Result<usize> {
    let names = containers(docker, Some(&format!("{NODE_LABEL}={node}")), false).await?;
    futures::future::join_all(names.iter().map(|id| {
        docker.kill_container(id, Some(KillContainerOptions { signal: "SIGKILL".to_owned() }))
    }))
    .await;
    Ok(names.len())
}

/// Removes every container of the lab's engine; it has no others.
pub(crate) async fn remove_all(docker: &Docker) -> anyhow::Result<()> {
    let ids = containers(docker, None, true).await?;
    for outcome in
        futures::future::join_all(ids.iter().map(|id| remove_container(docker, id))).await
    {
        outcome?;
    }
    Ok(())
}

/// Ends the containers of one node; others that the engine runs stay.
pub(crate) async fn remove_containers_of(docker: &Docker, node: &str) -> anyhow::Result<()> {
    for id in containers(docker, Some(&format!("{NODE_LABEL}={node}")), true).await? {
        remove_container(docker, &id).await?;
    }
    Ok(())
}

/// Removes the sandbox image. One that other nodes use stays.
pub(crate) async fn remove_pause_image(docker: &Docker) -> anyhow::Result<()> {
    let tag = pause_image();
    let options: Option<bollard::query_parameters::RemoveImageOptions> = None;
    match docker.remove_image(&tag, options, None).await {
        Ok(_) => Ok(()),
        Err(bollard::errors::Error::DockerResponseServerError {
            status_code: 404 | 409, ..
        }) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove the image {tag}")),
    }
}

async fn containers(
    docker: &Docker,
    label: Option<&str>,
    all: bool,
) -> anyhow::Result<Vec<String>> {
    let filters: HashMap<String, Vec<String>> =
        label.map(|label| ("label".to_owned(), vec![label.to_owned()])).into_iter().collect();
    let options = ListContainersOptionsBuilder::default().all(all).filters(&filters).build();
    let found = docker.list_containers(Some(options)).await.context("list containers")?;
    Ok(found.into_iter().filter_map(|container| container.id).collect())
}

/// Unmounts what is mounted below a folder, innermost first.
pub(crate) fn unmount_below(folder: &Path) -> anyhow::Result<()> {
    unmount_where(|point| point.starts_with(folder) && point != folder)
}

/// Unmounts what is mounted at a folder, if anything is.
pub(crate) fn unmount(folder: &Path) -> anyhow::Result<()> {
    unmount_where(|point| point == folder)
}

fn unmount_where(wanted: impl Fn(&Path) -> bool) -> anyhow::Result<()> {
    let table =
        std::fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    // proc(5): the fifth field is the mount point, with blanks as \040.
    let mut points: Vec<String> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| point.replace("\\040", " "))
        .filter(|point| wanted(Path::new(point)))
        .collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.len()));
    for point in points {
        nix::mount::umount2(point.as_str(), nix::mount::MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {point}"))?;
    }
    Ok(())
}
