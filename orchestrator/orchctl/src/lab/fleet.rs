//! The lab's hosts as the operator's commands see them: bring up, take down, kill, restart, partition.
//!
//! A host is a network namespace with a leg (`eth0`) in the underlay and the daemons started in it. Everything
//! is idempotent: `up` on a running lab finds everything there.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bollard::Docker;
use orch_api::k8s_openapi::api::core::v1::Node;
use orch_client::{Api, Client};
use orch_pki::ClusterPki;

use super::layout::{Lab, SERVER};
use super::process::Daemon;
use super::programs::Programs;
use super::{engine, net};
use crate::{image, progress};

/// Grace that a daemon gets before SIGKILL.
const STOP_GRACE: Duration = Duration::from_secs(15);
/// How long the API server may take to be ready: etcd's first start fsyncs a lot on slow disks.
const SERVER_LIMIT: Duration = Duration::from_secs(90);
const NODES_LIMIT: Duration = Duration::from_secs(120);
const CNI_PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "vxlan"];

/// The daemon of a host: `server` on the server, `agent` on a node.
pub fn daemon(lab: &Lab, host: &str) -> Daemon {
    let paths = lab.paths(host);
    Daemon::new(if host == SERVER { "server" } else { "agent" }, &paths.run(), &paths.log())
}

/// Starts the lab, or what of it does not run.
pub async fn up(lab: &Lab) -> anyhow::Result<Client> {
    preflight(lab)?;
    let programs = Programs::find()?;
    lab.save()?;
    let docker = engine::ensure(lab, &programs).await?;
    progress::step("sandbox image", async {
        engine::ensure_pause_image(&docker, &programs).await?;
        Ok(engine::pause_image())
    })
    .await?;
    progress::step("underlay network", async {
        net::ensure_underlay(lab)?;
        Ok(lab.config.underlay.to_string())
    })
    .await?;
    let pki = pki(lab)?;
    ensure_server(lab, &programs)?;
    let client = client(lab, &pki)?;
    wait_server(lab, &client).await?;
    for node in lab.node_names() {
        progress::step(&format!("start {node}"), async {
            ensure_node(lab, &programs, &pki, &docker, &node).await?;
            Ok(lab.address(&node)?.to_string())
        })
        .await?;
    }
    wait_nodes(lab, &client).await?;
    Ok(client)
}

fn preflight(lab: &Lab) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("a lab needs root: it makes network namespaces and starts a Docker engine; use sudo");
    }
    lab.config.check()?;
    if let Some(before) = Lab::open(&lab.dir)?
        && before.config.underlay != lab.config.underlay
    {
        bail!(
            "the lab in {} uses underlay {}, not {}; `orchctl lab down` first",
            lab.dir.display(),
            before.config.underlay,
            lab.config.underlay
        );
    }
    Ok(())
}

fn pki(lab: &Lab) -> anyhow::Result<ClusterPki> {
    let address = lab.address(SERVER)?;
    let service_cidr = orch_config::SERVICE_CIDR.parse().context("service CIDR")?;
    let addresses = [
        IpAddr::V4(address),
        IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        IpAddr::V4(orch_config::kubernetes_service_ip(service_cidr)),
    ];
    let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        .map(str::to_owned)
        .into_iter()
        .chain([format!("kubernetes.default.svc.{}", orch_config::CLUSTER_DOMAIN)])
        .collect::<Vec<_>>();
    let pki = ClusterPki::ensure(&lab.paths(SERVER).pki(), &addresses, &names)?;
    let admin = pki.ensure_admin_kubeconfig(&lab.api_url()?)?;
    std::fs::copy(&admin, lab.kubeconfig()).with_context(|| format!("write {}", lab.kubeconfig().display()))?;
    Ok(pki)
}

fn client(lab: &Lab, _pki: &ClusterPki) -> anyhow::Result<Client> {
    Client::from_kubeconfig(&lab.kubeconfig()).context("read the lab's kubeconfig")
}

fn ensure_server(lab: &Lab, programs: &Programs) -> anyhow::Result<()> {
    net::ensure_plain_host(lab, SERVER)?;
    let server = daemon(lab, SERVER);
    if server.pid().is_some() {
        return Ok(());
    }
    let mut args = vec![
        "server".to_owned(),
        "--root".to_owned(),
        lab.paths(SERVER).root().to_string_lossy().into_owned(),
        "--advertise-address".to_owned(),
        lab.address(SERVER)?.to_string(),
    ];
    if lab.config.fast {
        args.push("--fast-failover".to_owned());
    }
    server.start(&programs.orchestrator, &args, Some(&lab.netns(SERVER)))
}

async fn wait_server(lab: &Lab, client: &Client) -> anyhow::Result<()> {
    let server = daemon(lab, SERVER);
    progress::wait("control plane", SERVER_LIMIT, || async {
        if server.pid().is_none() {
            bail!("the server does not stay up{}", server.log_tail());
        }
        Ok(match tokio::time::timeout(Duration::from_secs(2), client.get_text("/readyz")).await {
            Ok(Ok(_)) => Ok(lab.api_url()?),
            Ok(Err(error)) => Err(format!("{}/readyz ({error})", lab.api_url()?)),
            Err(_) => Err(format!("{}/readyz", lab.api_url()?)),
        })
    })
    .await
}

async fn ensure_node(
    lab: &Lab,
    programs: &Programs,
    pki: &ClusterPki,
    docker: &Docker,
    node: &str,
) -> anyhow::Result<()> {
    let pid = engine::ensure_anchor(docker, lab, node).await?;
    net::ensure_anchored_host(lab, node, pid)?;
    let agent = daemon(lab, node);
    if agent.pid().is_some() {
        return Ok(());
    }
    let paths = lab.paths(node);
    if !paths.pki().join("kubelet.conf").exists() {
        let address = IpAddr::V4(lab.address(node)?);
        pki.agent_credentials(node, &[address], &lab.api_url()?)?.write(&paths.pki())?;
    }
    install_plugins(&programs.cni_plugins, &paths.cni_bin_dir())?;
    let mut args: Vec<String> = vec!["agent".to_owned()];
    for (flag, value) in [
        ("--root", paths.root().to_string_lossy().into_owned()),
        ("--node-name", node.to_owned()),
        ("--node-ip", lab.address(node)?.to_string()),
        ("--engine", lab.engine_socket().to_string_lossy().into_owned()),
        ("--etcd", lab.etcd_url()?),
        ("--pause-binary", programs.pause.to_string_lossy().into_owned()),
        ("--anchor-container", lab.anchor(node)),
    ] {
        args.extend([flag.to_owned(), value]);
    }
    if lab.config.fast {
        args.push("--fast-failover".to_owned());
    }
    agent.start(&programs.orchestrator, &args, Some(&lab.netns(node)))
}

/// Puts the plugins where the runtime looks for them: one file, one hard link per name.
fn install_plugins(multicall: &Path, folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let base = folder.join(".cni-plugins");
    std::fs::copy(multicall, &base).with_context(|| format!("copy {}", multicall.display()))?;
    for name in CNI_PLUGINS {
        let link = folder.join(name);
        let _ = std::fs::remove_file(&link);
        std::fs::hard_link(&base, &link).with_context(|| format!("link {}", link.display()))?;
    }
    std::fs::remove_file(&base).with_context(|| format!("remove {}", base.display()))
}

async fn wait_nodes(lab: &Lab, client: &Client) -> anyhow::Result<()> {
    let names = lab.node_names();
    let agents: Vec<Daemon> = names.iter().map(|name| daemon(lab, name)).collect();
    progress::wait("nodes Ready", NODES_LIMIT, || async {
        for agent in &agents {
            if agent.pid().is_none() {
                bail!("the agent of {} does not stay up{}", agent.pid_file.display(), agent.log_tail());
            }
        }
        let nodes = match Api::<Node>::all(client.clone()).list(&orch_client::ListParams::default()).await {
            Ok(list) => list.items,
            Err(error) => return Ok(Err(format!("the API server ({error})"))),
        };
        let missing: Vec<String> = names
            .iter()
            .filter_map(|name| {
                let node = nodes.iter().find(|node| node.metadata.name.as_deref() == Some(name));
                match node {
                    None => Some(format!("{name} (not registered)")),
                    Some(node) => not_ready_because(node).map(|why| format!("{name} ({why})")),
                }
            })
            .collect();
        Ok(if missing.is_empty() { Ok(names.join(", ")) } else { Err(missing.join(", ")) })
    })
    .await
}

/// Why a node is not Ready, in its own words; `None` when it is.
fn not_ready_because(node: &Node) -> Option<String> {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    match conditions.iter().find(|condition| condition.type_ == "Ready") {
        Some(condition) if condition.status == "True" => None,
        Some(condition) => Some(condition.message.clone().unwrap_or_else(|| "not Ready".to_owned())),
        None => Some("no status yet".to_owned()),
    }
}

/// Ends the lab and removes everything it made. Goes on past errors and reports them together.
pub async fn down(dir: &Path) -> anyhow::Result<()> {
    let Some(lab) = Lab::open(dir)? else {
        eprintln!("there is no lab in {}: nothing to do", dir.display());
        return Ok(());
    };
    let mut errors: Vec<String> = Vec::new();
    let mut note = |outcome: anyhow::Result<()>| {
        if let Err(error) = outcome {
            errors.push(format!("{error:#}"));
        }
    };
    let stop = progress::Step::new("stop agents and server");
    // Side by side: each may need its grace.
    let hosts: Vec<Daemon> = lab.host_names().iter().map(|host| daemon(&lab, host)).collect();
    let stopping: Vec<_> = hosts.into_iter().map(|daemon| std::thread::spawn(move || daemon.stop(STOP_GRACE))).collect();
    for thread in stopping {
        note(thread.join().unwrap_or_else(|_| bail!("a stopping thread panicked")));
    }
    note(stop_etcd(&lab));
    stop.done("");

    let clean = progress::Step::new("remove containers, engine and namespaces");
    let engine_daemon = engine::daemon(&lab);
    if engine_daemon.pid().is_some() {
        match image::connect(&lab.engine_socket()).await {
            Ok(docker) => note(engine::remove_all(&docker).await),
            Err(error) => note(Err(error)),
        }
    }
    note(engine_daemon.stop(STOP_GRACE));
    note(net::remove(&lab));
    note(engine::unmount_below(&lab.dir));
    note(std::fs::remove_dir_all(&lab.dir).with_context(|| format!("remove {}", lab.dir.display())));
    clean.done("");
    if errors.is_empty() { Ok(()) } else { bail!("the lab is not wholly gone: {}", errors.join("; ")) }
}

/// etcd outlives the server on purpose; the end of the lab is its end too.
fn stop_etcd(lab: &Lab) -> anyhow::Result<()> {
    orch_store::managed::stop(&lab.paths(SERVER).etcd_data(), STOP_GRACE).context("stop etcd")
}

/// A crash: of a whole node (agent, containers, namespace), or of the server, of etcd, of the engine.
pub async fn kill(lab: &Lab, host: &str) -> anyhow::Result<String> {
    match host {
        SERVER => daemon(lab, SERVER).crash().map(|()| "killed the server process; etcd and all nodes go on".to_owned()),
        "etcd" => {
            let pid = orch_store::managed::pid(&lab.paths(SERVER).etcd_data()).context("etcd does not run")?;
            let pid = i32::try_from(pid).context("PID")?;
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
                .context("kill etcd")?;
            Ok("killed etcd; the server starts it again".to_owned())
        }
        "engine" => engine::daemon(lab).crash().map(|()| {
            "killed the Docker engine; containers go on, `orchctl lab restart engine` starts it".to_owned()
        }),
        node => {
            lab.address(node)?;
            let agent = daemon(lab, node);
            if agent.pid().is_some() {
                agent.crash()?;
            }
            let docker = image::connect(&lab.engine_socket()).await?;
            let killed = engine::kill_containers(&docker, node).await?;
            engine::remove_anchor(&docker, lab, node).await?;
            net::remove_host(lab, node)?;
            Ok(format!("{node} is down: agent and {killed} containers killed, network namespace removed"))
        }
    }
}

/// A crash of one agent process only: its containers and its data plane go on.
pub fn kill_agent(lab: &Lab, node: &str) -> anyhow::Result<String> {
    lab.address(node)?;
    daemon(lab, node).crash()?;
    Ok(format!("killed the agent of {node}; its pods go on, `orchctl lab restart {node}` starts it"))
}

/// Starts a host's daemon again; a running one is stopped first.
pub async fn restart(lab: &Lab, host: &str) -> anyhow::Result<String> {
    let programs = Programs::find()?;
    let pki = pki(lab)?;
    match host {
        SERVER => {
            daemon(lab, SERVER).stop(STOP_GRACE)?;
            ensure_server(lab, &programs)?;
            wait_server(lab, &client(lab, &pki)?).await?;
            Ok("the server answers again".to_owned())
        }
        "engine" => {
            engine::daemon(lab).stop(STOP_GRACE)?;
            engine::ensure(lab, &programs).await?;
            Ok("the Docker engine answers again".to_owned())
        }
        node => {
            lab.address(node)?;
            daemon(lab, node).stop(STOP_GRACE)?;
            let docker = engine::ensure(lab, &programs).await?;
            net::ensure_underlay(lab)?;
            ensure_node(lab, &programs, &pki, &docker, node).await?;
            Ok(format!("{node} runs again"))
        }
    }
}

/// Every host's daemon, PID and log file.
pub fn daemons(lab: &Lab) -> Vec<(String, Option<i32>, PathBuf)> {
    let mut all: Vec<_> = lab
        .host_names()
        .into_iter()
        .map(|host| {
            let daemon = daemon(lab, &host);
            (host, daemon.pid(), daemon.log_file)
        })
        .collect();
    let engine = engine::daemon(lab);
    all.push(("engine".to_owned(), engine.pid(), engine.log_file));
    let etcd = orch_store::managed::pid(&lab.paths(SERVER).etcd_data()).and_then(|pid| i32::try_from(pid).ok());
    all.push(("etcd".to_owned(), etcd, lab.paths(SERVER).log().join("etcd.log")));
    all
}
