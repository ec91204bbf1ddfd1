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
use orch_api::taint::NOT_READY;
use orch_client::{Api, Client};
use orch_pki::ClusterPki;
use orch_store::EtcdConfig;
use orch_store::admin::Admin;

use super::layout::{Lab, SERVER};
use super::process::Daemon;
use super::programs::Programs;
use super::{engine, net};
use crate::cluster::{etcd, join};
use crate::{image, output, progress};

/// Grace that a daemon gets before SIGKILL.
const STOP_GRACE: Duration = Duration::from_secs(15);
/// How long the API server may take to be ready: etcd's first start fsyncs a lot on slow disks.
const SERVER_LIMIT: Duration = Duration::from_secs(90);
const NODES_LIMIT: Duration = Duration::from_secs(120);
pub(crate) const CNI_PLUGINS: [&str; 10] = [
    "bandwidth",
    "bridge",
    "firewall",
    "host-local",
    "loopback",
    "policy",
    "portmap",
    "static",
    "tuning",
    "vxlan",
];

/// The daemon of a host: `server` on the server, `agent` on a node.
pub(crate) fn daemon(lab: &Lab, host: &str) -> Daemon {
    let paths = lab.paths(host);
    Daemon::new(if lab.is_server(host) { "server" } else { "agent" }, &paths.run(), &paths.log())
}

/// Starts the lab, or what of it does not run.
pub(crate) async fn up(lab: &Lab) -> anyhow::Result<Client> {
    // What can be refused is refused before anything is made.
    let programs = Programs::find()?;
    net::check_underlay(lab)?;
    lab.save()?;
    start(lab, &programs).await.map_err(|error| match error.downcast_ref::<output::Hint>() {
        Some(_) => error,
        None => output::hinted(
            "`orchctl lab status` shows what runs and where the logs are; `orchctl lab down` removes the lab",
            format!("{error:#}"),
        ),
    })
}

async fn start(lab: &Lab, programs: &Programs) -> anyhow::Result<Client> {
    let docker = engine::ensure(lab, programs).await?;
    progress::step("sandbox image", async {
        engine::ensure_pause_image(&docker, programs).await?;
        Ok(engine::pause_image())
    })
    .await?;
    progress::step("underlay network", async {
        net::ensure_underlay(lab)?;
        Ok(lab.config.underlay.to_string())
    })
    .await?;
    let pki = pki(lab)?;
    // All of them before any is waited for: etcd serves when most of its members run.
    for server in lab.server_names() {
        ensure_server(lab, programs, &server, &peers(lab)?)?;
    }
    for server in lab.server_names() {
        wait_server(lab, &server).await?;
    }
    let client = client(lab)?;
    for node in lab.node_names() {
        progress::step(&format!("start {node}"), async {
            ensure_node(lab, programs, &pki, &docker, &node).await?;
            Ok(lab.address(&node)?.to_string())
        })
        .await?;
    }
    wait_nodes(lab, &client, &lab.node_names()).await?;
    Ok(client)
}

/// Authorities and certificates of all servers, and the administrator's kubeconfig; returns the first server's.
fn pki(lab: &Lab) -> anyhow::Result<ClusterPki> {
    let pki = pki_of(lab, SERVER)?;
    for server in lab.server_names().iter().skip(1) {
        let folder = lab.paths(server).pki();
        std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        for name in orch_pki::SHARED_FILES {
            let (from, to) = (pki.path(name), folder.join(name));
            // The mode is copied with the file.
            if !to.exists() {
                std::fs::copy(&from, &to).with_context(|| format!("write {}", to.display()))?;
            }
        }
        pki_of(lab, server)?;
    }
    let urls = lab.api_urls()?;
    let admin = pki.ensure_admin_kubeconfig(urls.first().context("a lab has a server")?)?;
    let kubeconfig = lab.kubeconfig();
    std::fs::copy(&admin, &kubeconfig)
        .with_context(|| format!("write {}", kubeconfig.display()))?;
    if lab.has_peers() {
        orch_client::write_servers(&kubeconfig, &urls)?;
    }
    Ok(pki)
}

fn pki_of(lab: &Lab, server: &str) -> anyhow::Result<ClusterPki> {
    let address = lab.address(server)?;
    let service_cidr = orch_config::SERVICE_CIDR.parse().context("service CIDR")?;
    let names = orch_pki::ServerNames::new(
        IpAddr::V4(address),
        IpAddr::V4(orch_config::kubernetes_service_ip(service_cidr)),
        orch_config::CLUSTER_DOMAIN,
        &[],
    );
    Ok(ClusterPki::ensure(&lab.paths(server).pki(), &names.addresses, &names.names)?)
}

/// A client with the administrator's credentials.
///
/// # Errors
/// The lab was never up.
pub(crate) fn client(lab: &Lab) -> anyhow::Result<Client> {
    Client::from_kubeconfig(&lab.kubeconfig()).context("read the lab's kubeconfig")
}

fn peer_url(lab: &Lab, server: &str) -> anyhow::Result<String> {
    lab.url(server, orch_config::ETCD_PEER_PORT)
}

/// How etcds start that start together; empty for one that stays alone.
fn peers(lab: &Lab) -> anyhow::Result<Vec<String>> {
    if !lab.has_peers() {
        return Ok(Vec::new());
    }
    let named = |peer: &String| Ok(format!("{peer}={}", peer_url(lab, peer)?));
    Ok(vec![
        "--etcd-peers".to_owned(),
        lab.server_names().iter().map(named).collect::<anyhow::Result<Vec<_>>>()?.join(","),
    ])
}

/// Starts a server that does not run. `peers` are its flags about other members of etcd; one that has its data ignores them.
fn ensure_server(
    lab: &Lab,
    programs: &Programs,
    name: &str,
    peers: &[String],
) -> anyhow::Result<()> {
    net::ensure_plain_host(lab, name)?;
    let server = daemon(lab, name);
    if server.pid().is_some() {
        return Ok(());
    }
    let mut args = vec![
        "server".to_owned(),
        "--root".to_owned(),
        lab.paths(name).root().to_string_lossy().into_owned(),
        "--advertise-address".to_owned(),
        lab.address(name)?.to_string(),
    ];
    if lab.has_peers() {
        args.extend(["--elect", "--etcd-member", name].map(str::to_owned));
        args.extend_from_slice(peers);
    }
    if lab.config.fast {
        args.push("--fast-failover".to_owned());
    }
    server.start(&programs.orchestrator, &args, Some(&lab.netns(name)))
}

async fn wait_server(lab: &Lab, name: &str) -> anyhow::Result<()> {
    let (server, client) = (&daemon(lab, name), &client(lab)?);
    let url = &lab.url(name, orch_config::API_SERVER_PORT)?;
    // This one, not one of the others.
    client.set_servers(std::slice::from_ref(url))?;
    let label =
        if lab.has_peers() { format!("control plane {name}") } else { "control plane".into() };
    progress::wait(&label, SERVER_LIMIT, || async move {
        if server.pid().is_none() {
            bail!("the server does not stay up{}", server.log_tail());
        }
        Ok(match tokio::time::timeout(Duration::from_secs(2), client.get_text("/readyz")).await {
            Ok(Ok(_)) => Ok(url.clone()),
            Ok(Err(error)) => Err(format!("{:#}", anyhow::Error::from(error))),
            Err(_) => Err(format!("{url}/readyz")),
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
        pki.agent_credentials(node, &[address], &lab.api_urls()?)?.write(&paths.pki())?;
    }
    install_plugins(&programs.cni_plugins, &paths.cni_bin_dir())?;
    let mut args: Vec<String> = vec!["agent".to_owned()];
    for (flag, value) in [
        ("--root", paths.root().to_string_lossy().into_owned()),
        ("--node-name", node.to_owned()),
        ("--node-ip", lab.address(node)?.to_string()),
        ("--engine", lab.engine_socket().to_string_lossy().into_owned()),
        ("--etcd", lab.etcd_urls()?.join(",")),
        ("--pause-binary", programs.pause.to_string_lossy().into_owned()),
        ("--anchor-container", lab.anchor(node)),
    ] {
        args.extend([flag.to_owned(), value]);
    }
    if let Some(policy) = lab.config.policy {
        args.extend(["--policy".to_owned(), policy.as_str().to_owned()]);
    }
    if let Some(services) = lab.config.services {
        args.extend(["--services".to_owned(), services.as_str().to_owned()]);
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

async fn wait_nodes(lab: &Lab, client: &Client, names: &[String]) -> anyhow::Result<()> {
    let agents: Vec<Daemon> = names.iter().map(|name| daemon(lab, name)).collect();
    progress::wait("nodes Ready", NODES_LIMIT, || async {
        for agent in &agents {
            if agent.pid().is_none() {
                bail!("an agent does not stay up{}", agent.log_tail());
            }
        }
        let nodes = match Api::<Node>::all(client.clone())
            .list(&orch_client::ListParams::default())
            .await
        {
            Ok(list) => list.items,
            Err(error) => return Ok(Err(format!("{:#}", anyhow::Error::from(error)))),
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

/// Why a node takes no pods yet, in its own words; `None` when it is Ready and does. The controller takes the taint away a moment
/// after the node has said that it is Ready: the first pods would all go to the node that is first.
fn not_ready_because(node: &Node) -> Option<String> {
    let conditions =
        node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    match conditions.iter().find(|condition| condition.type_ == "Ready") {
        Some(condition) if condition.status == "True" => {
            let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref());
            let tainted = taints.unwrap_or_default().iter().any(|one| one.key == NOT_READY);
            tainted.then(|| format!("Ready, but still tainted {NOT_READY}"))
        }
        Some(condition) => {
            Some(condition.message.clone().unwrap_or_else(|| "not Ready".to_owned()))
        }
        None => Some("no status yet".to_owned()),
    }
}

/// Ends the lab and removes everything it made. Goes on past errors and reports them together.
pub(crate) async fn down(dir: &Path) -> anyhow::Result<()> {
    let Some(lab) = Lab::open_to_remove(dir)? else {
        eprintln!("there is no lab in {}: nothing to do", dir.display());
        return Ok(());
    };
    let mut errors = Troubles::default();
    let stop = progress::Step::new("stop agents and server");
    // Side by side: each may need its grace.
    let hosts: Vec<Daemon> = lab.host_names().iter().map(|host| daemon(&lab, host)).collect();
    let stopping: Vec<_> = hosts
        .into_iter()
        .map(|daemon| std::thread::spawn(move || daemon.stop(STOP_GRACE)))
        .collect();
    for thread in stopping {
        errors.note(thread.join().unwrap_or_else(|_| bail!("a stopping thread panicked")));
    }
    for server in lab.server_names() {
        errors.note(stop_etcd(&lab, &server));
    }
    stop.done("");

    errors.note(remove_containers(&lab).await);
    let clean = progress::Step::new("remove engine, namespaces and files");
    errors.note(engine::daemon(&lab).stop(STOP_GRACE));
    errors.note(engine::containerd(&lab).stop(STOP_GRACE));
    errors.note(net::remove(&lab));
    errors.note(engine::unmount_below(&lab.dir));
    // The folder is the record of what is left: it goes last, and only when nothing is.
    if errors.0.is_empty() {
        errors.note(remove_folder(&lab.dir));
    }
    if errors.0.is_empty() {
        clean.done("");
        return Ok(());
    }
    clean.failed();
    Err(output::hinted(
        format!("the rest is recorded in {}; run `orchctl lab down` again", lab.dir.display()),
        format!("the lab is not wholly gone: {}", errors.0.join("; ")),
    ))
}

/// What went wrong on the way to the end.
#[derive(Default)]
struct Troubles(Vec<String>);

impl Troubles {
    fn note(&mut self, outcome: anyhow::Result<()>) {
        if let Err(error) = outcome {
            self.0.push(format!("{error:#}"));
        }
    }
}

/// Containers outlive their engine, so an engine that was killed is started once more to end them.
async fn remove_containers(lab: &Lab) -> anyhow::Result<()> {
    if !lab.dir.join("docker").exists() {
        return Ok(());
    }
    let docker = if engine::daemon(lab).pid().is_some() {
        image::connect(&lab.engine_socket()).await?
    } else {
        engine::ensure(lab, &Programs::find()?).await?
    };
    progress::step("remove containers", async {
        engine::remove_all(&docker).await?;
        Ok(String::new())
    })
    .await
}

/// etcd outlives the server on purpose; the end of the lab is its end too.
fn stop_etcd(lab: &Lab, server: &str) -> anyhow::Result<()> {
    orch_store::managed::stop(&lab.paths(server).etcd_data(), STOP_GRACE).context("stop etcd")
}

fn etcd_pid(lab: &Lab, server: &str) -> Option<i32> {
    let pid = orch_store::managed::pid(&lab.paths(server).etcd_data())?;
    i32::try_from(pid).ok()
}

/// SIGKILL.
fn kill_etcd(lab: &Lab, server: &str) -> anyhow::Result<()> {
    let pid = etcd_pid(lab, server).context("etcd does not run")?;
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).context("kill etcd")
}

/// A crash of one of several control planes: server, etcd and link end at once.
fn kill_server(lab: &Lab, server: &str) -> anyhow::Result<String> {
    let process = daemon(lab, server);
    if process.pid().is_none() && etcd_pid(lab, server).is_none() {
        bail!("{server} is down already; `orchctl lab restart {server}` starts it");
    }
    // First the cable, so that nothing says goodbye to the others.
    net::remove_host(lab, server)?;
    if process.pid().is_some() {
        process.crash()?;
    }
    if etcd_pid(lab, server).is_some() {
        kill_etcd(lab, server)?;
    }
    Ok(format!("{server} is down: server and etcd killed, network namespace removed"))
}

/// A crash: of a whole node (agent, containers, namespace), or of the server, of etcd, of the engine.
pub(crate) async fn kill(lab: &Lab, host: &str) -> anyhow::Result<String> {
    match host {
        server if lab.has_peers() && lab.is_server(server) => kill_server(lab, server),
        SERVER => daemon(lab, SERVER)
            .crash()
            .map(|()| "killed the server process; etcd and all nodes go on".to_owned()),
        "etcd" => {
            kill_etcd(lab, SERVER)?;
            Ok("killed etcd; the server starts it again".to_owned())
        }
        "engine" => engine::daemon(lab).crash().map(|()| {
            "killed the Docker engine; containers go on, `orchctl lab restart engine` starts it"
                .to_owned()
        }),
        node => {
            lab.address(node)?;
            let agent = daemon(lab, node);
            if agent.pid().is_none() && !cni_netlink::NetNs::is_nsfs(lab.netns(node)) {
                bail!("{node} is down already; `orchctl lab restart {node}` starts it");
            }
            if agent.pid().is_some() {
                agent.crash()?;
            }
            // First the cable, so that nothing says goodbye to the other nodes.
            net::remove_host(lab, node)?;
            let docker = image::connect(&lab.engine_socket()).await?;
            let killed = engine::kill_containers(&docker, node).await?;
            engine::remove_anchor(&docker, lab, node).await?;
            // What a reboot loses: mounts and /run.
            let paths = lab.paths(node);
            engine::unmount_below(paths.root())?;
            remove_folder(&paths.run())?;
            Ok(format!(
                "{node} is down: agent and {killed} containers killed, network namespace removed"
            ))
        }
    }
}

fn remove_folder(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A crash of one agent process only: its containers and its data plane go on.
pub(crate) fn kill_agent(lab: &Lab, node: &str) -> anyhow::Result<String> {
    lab.address(node)?;
    daemon(lab, node).crash()?;
    Ok(format!(
        "killed the agent of {node}; its pods go on, `orchctl lab restart {node}` starts it"
    ))
}

/// Starts a host's daemon again; a running one is stopped first.
pub(crate) async fn restart(lab: &Lab, host: &str) -> anyhow::Result<String> {
    let programs = Programs::find()?;
    let pki = pki(lab)?;
    match host {
        server if lab.is_server(server) => {
            daemon(lab, server).stop(STOP_GRACE)?;
            net::ensure_underlay(lab)?;
            ensure_server(lab, &programs, server, &peers(lab)?)?;
            wait_server(lab, server).await?;
            Ok(format!("{server} answers again"))
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
            // While the server is down the node cannot become Ready, and that is no failure of the restart.
            if lab.server_names().iter().any(|server| daemon(lab, server).pid().is_some()) {
                wait_nodes(lab, &client(lab)?, &[node.to_owned()]).await?;
            }
            Ok(format!("{node} runs again"))
        }
    }
}

/// Takes the state of all control planes away, puts the first one back from a snapshot, and lets the others join it anew.
pub(crate) async fn restore(lab: &Lab, file: &Path) -> anyhow::Result<()> {
    let programs = Programs::find()?;
    etcd::check_restorable(file)?;
    progress::step("kill the control plane", async {
        for server in lab.server_names() {
            if daemon(lab, &server).pid().is_some() {
                daemon(lab, &server).crash()?;
            }
            if etcd_pid(lab, &server).is_some() {
                kill_etcd(lab, &server)?;
            }
        }
        // A killed one holds its files until it is gone.
        for server in lab.server_names() {
            stop_etcd(lab, &server)?;
        }
        Ok(String::new())
    })
    .await?;
    let pki = pki(lab)?;
    let data = lab.paths(SERVER).etcd_data();
    progress::step("restore", async {
        for server in lab.server_names() {
            remove_folder(&lab.paths(&server).etcd_data())?;
        }
        etcd::put_back(file, &data, SERVER, &peer_url(lab, SERVER)?)?;
        Ok(format!("{SERVER} from {}", file.display()))
    })
    .await?;
    ensure_server(lab, &programs, SERVER, &peers(lab)?)?;
    wait_server(lab, SERVER).await?;
    let mut admin = Admin::connect(&EtcdConfig {
        endpoints: vec![lab.url(SERVER, orch_config::ETCD_CLIENT_PORT)?],
        ca_pem: Some(pki.read("etcd-ca.crt")?),
        cert_pem: Some(pki.read("etcd-client.crt")?),
        key_pem: Some(pki.read("etcd-client.key")?),
    })
    .await?;
    for server in lab.server_names().iter().skip(1) {
        let peer = peer_url(lab, server)?;
        let members = join::add_member(&mut admin, &peer, false).await?;
        let members = join::named(&members, server, &peer).join(",");
        let joining = ["--etcd-peers", &members, "--etcd-join"].map(str::to_owned);
        ensure_server(lab, &programs, server, &joining)?;
        let process = daemon(lab, server);
        join::promote(&mut admin, &peer, &lab.paths(server).log(), || {
            process.pid().is_none().then(|| process.log_tail())
        })
        .await?;
        wait_server(lab, server).await?;
    }
    Ok(())
}

/// A process of the lab.
pub(crate) struct Running {
    pub(crate) name: String,
    pub(crate) pid: Option<i32>,
    pub(crate) log: PathBuf,
}

/// All processes of the lab: the hosts' daemons, the engine and etcd.
pub(crate) fn daemons(lab: &Lab) -> Vec<Running> {
    let running = |name: &str, daemon: Daemon| Running {
        name: name.to_owned(),
        pid: daemon.pid(),
        log: daemon.log_file,
    };
    let mut all: Vec<Running> =
        lab.host_names().iter().map(|host| running(host, daemon(lab, host))).collect();
    for (at, server) in lab.server_names().iter().enumerate() {
        let name = if lab.has_peers() { format!("{server}/etcd") } else { "etcd".to_owned() };
        let log = lab.paths(server).log().join("etcd.log");
        // Behind its server.
        all.insert(2 * at + 1, Running { name, pid: etcd_pid(lab, server), log });
    }
    all.push(running("engine", engine::daemon(lab)));
    all.push(running("containerd", engine::containerd(lab)));
    all
}
