//! Real container runtimes that run containers on our conflist: podman with its CNI backend, and containerd by `ctr` and
//! by its CRI plugin, as a kubelet calls it.
//!
//! Each works in a host of its own (a namespace) with private folders, so that neither sees what else is on the machine.
//! A runtime that is not installed is ignored, and says so; `make test-runtimes` installs both.

mod cri;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use cni_netlink::NetNs;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::{Value, json};
use tests_conformance::{Bed, Result, ip};

use crate::cri::{Cri, Message, text_at};

/// What each runtime is called by, and the test.
type Story = (&'static str, &'static [&'static str], fn(&Bed) -> Result);

const STORIES: &[Story] = &[
    ("podman_runs_containers_on_our_conflist", &["podman", "runc", "busybox"], podman),
    ("containerd_runs_containers_on_our_conflist", &["containerd", "ctr", "runc", "busybox"], ctr),
    (
        "containerd_runs_pods_by_cri_on_our_conflist",
        &["containerd", "ctr", "runc", "busybox"],
        pods,
    ),
];
/// The network that both are given.
const NETWORK: &str = "orch-runtimes";
const TEXT: &str = "hello from the container";
/// The machine outside and this one as it sees it.
const OUTSIDE: [&str; 2] = ["192.0.2.2/24", "192.0.2.1/24"];
const HOST_PORT: u16 = 18080;
/// A value that no kernel has by itself.
const SOMAXCONN: &str = "4099";
/// How long a container may take until it serves, or is gone.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One at a time: two cores, and both are heavy.
    arguments.test_threads = Some(1);
    let trials = STORIES.iter().map(|(name, programs, story)| {
        let missing = programs.iter().find(|program| !has(program));
        let trial = Trial::test(*name, move || {
            let bed = Bed::new().map_err(|error| Failed::from(format!("{error:#}")))?;
            story(&bed).map_err(|error| Failed::from(format!("{error:#}")))
        });
        match missing {
            Some(program) => {
                let why = format!("{program} is not installed, `make test-runtimes` does it");
                trial.with_kind(why).with_ignored_flag(true)
            }
            None => trial,
        }
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|folder| folder.join(program).is_file())
}

/// Runs a program in a namespace and returns what it writes.
fn run(netns: &NetNs, command: &mut Command) -> Result<String> {
    netns.run(|| {
        let output = command.output().with_context(|| format!("run {command:?}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ensure!(
            output.status.success(),
            "{command:?}: {} {}",
            text(&output.stdout),
            text(&output.stderr)
        );
        Ok(text(&output.stdout))
    })
}

/// The file system of a container: busybox and a page to serve.
fn root_folder(t: &Bed) -> Result<PathBuf> {
    let root = t.state.path().join("root");
    for folder in ["bin", "proc", "sys", "dev", "tmp", "etc", "www"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let program =
        ["/usr/bin/busybox", "/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    fs::copy(program.context("busybox")?, root.join("bin/busybox"))?;
    for name in ["sh", "httpd", "ping", "sleep", "wget", "ip", "cat"] {
        symlink("busybox", root.join("bin").join(name))?;
    }
    fs::write(root.join("www/index.html"), TEXT)?;
    Ok(root)
}

fn has_portmap(t: &Bed) -> bool {
    t.plugins.join("portmap").exists()
}

/// Our conflist, as an engineer would write it.
fn conflist(t: &Bed) -> Value {
    let mut plugins = vec![json!({
        "type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "ipMasq": true,
        "hairpinMode": true,
        "ipam": {
            "type": "host-local", "ranges": [[{"subnet": "10.77.0.0/24"}]],
            "dataDir": t.state.path().join("leases"),
        },
    })];
    if has_portmap(t) {
        plugins.push(json!({"type": "portmap", "capabilities": {"portMappings": true}}));
    }
    // As in podman's own list.
    if t.plugins.join("firewall").exists() {
        plugins.push(json!({"type": "firewall"}));
        plugins.push(json!({
            "type": "tuning", "sysctl": {"net.core.somaxconn": SOMAXCONN},
            "dataDir": t.state.path().join("tuning"),
        }));
    }
    json!({"cniVersion": "1.0.0", "name": NETWORK, "plugins": plugins})
}

fn leases(t: &Bed) -> Result<Vec<String>> {
    let folder = t.state.path().join("leases").join(NETWORK);
    let mut leases = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        leases.extend(name.parse::<IpAddr>().is_ok().then_some(name));
    }
    Ok(leases)
}

/// Makes iptables forward nothing, as Docker does: what gets through is `firewall`'s doing.
fn close(t: &Bed) -> Result {
    if t.plugins.join("firewall").exists() {
        t.nft("add table ip filter")?;
        t.nft("add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")?;
    }
    Ok(())
}

/// Asks for the page until it comes.
fn fetch(from: &NetNs, to: IpAddr, port: u16) -> Result<String> {
    let end = Instant::now() + PATIENCE;
    loop {
        let answer = from.run(|| -> Result<String> {
            let to = SocketAddr::new(to, port);
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        });
        match answer {
            Ok(text) if text.contains(TEXT) => return Ok(text),
            Ok(text) if Instant::now() > end => bail!("{to}:{port} answers {text:?}"),
            Err(error) if Instant::now() > end => {
                return Err(error.context(format!("fetch {to}:{port}")));
            }
            _ => sleep(Duration::from_millis(100)),
        }
    }
}

/// Nothing of the containers is on the host any more.
fn gone(t: &Bed) -> Result {
    let end = Instant::now() + PATIENCE;
    loop {
        let (veths, leases) = (t.veths()?, leases(t)?);
        if veths.is_empty() && leases.is_empty() {
            break;
        }
        ensure!(Instant::now() < end, "left: {leases:?} {veths:?}");
        sleep(Duration::from_millis(100));
    }
    let rules = t.nft("list ruleset")?;
    ensure!(!rules.contains(&HOST_PORT.to_string()), "the port is still mapped: {rules}");
    ensure!(!rules.contains("comment \"cni:"), "elements of a container are left: {rules}");
    let kept = fs::read_dir(t.state.path().join("tuning")).map_or(0, Iterator::count);
    ensure!(kept == 0, "tuning has kept {kept} files");
    Ok(())
}

/// podman with folders of its own.
struct Podman<'a> {
    t: &'a Bed,
    folder: PathBuf,
}

impl<'a> Podman<'a> {
    fn new(t: &'a Bed) -> Result<Self> {
        let folder = t.state.path().join("podman");
        fs::create_dir_all(folder.join("net.d"))?;
        fs::write(folder.join("net.d/10-orch.conflist"), conflist(t).to_string())?;
        let containers = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\n\
             [network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [\"{plugins}\"]\n\
             network_config_dir = \"{folder}/net.d\"\ndefault_network = \"{NETWORK}\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nruntime = \"runc\"\n\
             lock_type = \"file\"\ntmp_dir = \"{folder}/tmp\"\n",
            plugins = t.plugins.display(),
            folder = folder.display(),
        );
        fs::write(folder.join("containers.conf"), containers)?;
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{folder}/graph\"\nrunroot = \"{folder}/run\"\n",
            folder = folder.display(),
        );
        fs::write(folder.join("storage.conf"), storage)?;
        Ok(Self { t, folder })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command
            .args(arguments)
            .env("CONTAINERS_CONF", self.folder.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.folder.join("storage.conf"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        run(&self.t.host, &mut self.command(arguments))
    }

    fn address(&self, name: &str) -> Result<IpAddr> {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        ip(&self.run(&["inspect", "-f", format, name])?)
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        // After a failure: containers and their namespaces would stay.
        let _ = self.run(&["rm", "-f", "-a", "-t", "0"]);
    }
}

fn podman(t: &Bed) -> Result {
    let outside = t.outside(OUTSIDE[1], OUTSIDE[0])?;
    close(t)?;
    let podman = Podman::new(t)?;
    let tar = t.state.path().join("image.tar");
    let (root, tar) = (root_folder(t)?, tar.to_str().context("path")?);
    run(
        &t.host,
        Command::new("tar").args(["-C", root.to_str().context("path")?, "-cf", tar, "."]),
    )?;
    podman.run(&["import", tar, "localhost/box:1"])?;

    let published = format!("{HOST_PORT}:80");
    let mut arguments = vec!["run", "-d", "--name", "server", "--network", NETWORK];
    if has_portmap(t) {
        arguments.extend(["-p", &published]);
    }
    arguments.extend(["localhost/box:1", "/bin/httpd", "-f", "-p", "80", "-h", "/www"]);
    podman.run(&arguments)?;
    let server = podman.address("server")?;
    ensure!(leases(t)? == [server.to_string()], "{server} is not what is leased: {:?}", leases(t)?);
    fetch(&t.host, server, 80).context("from the host")?;

    let wanted = "10.77.0.99";
    podman.run(&[
        "run",
        "-d",
        "--name",
        "client",
        "--network",
        NETWORK,
        "--ip",
        wanted,
        "localhost/box:1",
        "/bin/sleep",
        "600",
    ])?;
    ensure!(podman.address("client")? == ip(wanted)?, "--ip");
    podman.run(&["exec", "client", "/bin/ping", "-c", "1", "-W", "2", &server.to_string()])?;
    let page = podman.run(&[
        "exec",
        "client",
        "/bin/wget",
        "-q",
        "-O",
        "-",
        &format!("http://{server}/"),
    ])?;
    ensure!(page == TEXT, "{page}");
    podman
        .run(&["exec", "client", "/bin/ping", "-c", "1", "-W", "2", "192.0.2.2"])
        .context("masqueraded")?;

    if t.plugins.join("tuning").exists() {
        let tuned = podman.run(&["exec", "client", "/bin/cat", "/proc/sys/net/core/somaxconn"])?;
        ensure!(tuned == SOMAXCONN, "net.core.somaxconn is {tuned}");
    }
    if has_portmap(t) {
        fetch(&outside, ip("192.0.2.1")?, HOST_PORT).context("the mapped port, from outside")?;
        fetch(&t.host, ip("192.0.2.1")?, HOST_PORT).context("the mapped port, from the host")?;
    } else {
        eprintln!("skipped: the port mapping, since there is no plugin portmap");
    }
    for name in ["client", "server"] {
        podman.run(&["rm", "-f", "-t", "0", name])?;
    }
    gone(t)
}

/// containerd with folders of its own.
struct Containerd {
    daemon: Child,
    socket: PathBuf,
}

impl Containerd {
    /// `plugins` is the part of its configuration that tests differ in.
    fn start(t: &Bed, plugins: &str) -> Result<Self> {
        let folder = t.state.path().join("containerd");
        fs::create_dir_all(&folder)?;
        let socket = folder.join("socket");
        let config = format!(
            "version = 2\nroot = \"{folder}/root\"\nstate = \"{folder}/state\"\n{plugins}\n\
             [grpc]\naddress = \"{socket}\"\n",
            folder = folder.display(),
            socket = socket.display(),
        );
        fs::write(folder.join("config.toml"), config)?;
        let log = fs::File::create(folder.join("log"))?;
        let mut command = Command::new("containerd");
        command.arg("-c").arg(folder.join("config.toml"));
        command.stdout(log.try_clone()?).stderr(log).stdin(Stdio::null());
        // It calls plugins in the namespace it is in.
        let daemon = t.host.run(|| command.spawn().context("run containerd"))?;
        let daemon = Self { daemon, socket };
        let end = Instant::now() + PATIENCE;
        while run(&t.host, daemon.ctr().arg("version")).is_err() {
            let log = || fs::read_to_string(folder.join("log")).unwrap_or_default();
            ensure!(Instant::now() < end, "containerd does not answer: {}", log());
            sleep(Duration::from_millis(100));
        }
        Ok(daemon)
    }

    fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket).stdin(Stdio::null());
        command
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // SIGTERM, so that it takes its mounts along.
        let pid = nix::unistd::Pid::from_raw(self.daemon.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.daemon.wait();
    }
}

/// `ctr` knows fixed folders only, so it gets a mount namespace where they are ours. A container of its own exits by
/// itself, since `ctr` calls DEL only for one that it has waited for.
fn ctr(t: &Bed) -> Result {
    let root = root_folder(t)?;
    let root = root.to_str().context("path")?;
    let containerd = Containerd::start(t, "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]")?;
    let conf = t.state.path().join("10-orch.conflist");
    // A mount needs a folder below it; ours goes again.
    let made = fs::create_dir("/etc/cni").is_ok();
    fs::write(&conf, conflist(t).to_string())?;
    let script = format!(
        "mount -t tmpfs none /etc/cni && mkdir /etc/cni/net.d && \
         cp {conf} /etc/cni/net.d/ && mount -t tmpfs none /opt && mkdir /opt/cni && \
         ln -s {plugins} /opt/cni/bin && exec ctr --address {socket} run --rm --cni --rootfs {root} \
         server /bin/sh -c 'httpd -p 80 -h /www; while [ ! -e /tmp/stop ]; do sleep 0.2; done'",
        conf = conf.display(),
        plugins = t.plugins.display(),
        socket = containerd.socket.display(),
    );
    let log = t.state.path().join("ctr.log");
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script]).stdin(Stdio::null());
    command.stdout(fs::File::create(&log)?).stderr(fs::File::options().append(true).open(&log)?);
    let mut running = t.host.run(|| command.spawn().context("run ctr"))?;

    let said = || fs::read_to_string(&log).unwrap_or_default();
    let used = || -> Result {
        let end = Instant::now() + PATIENCE;
        let address = loop {
            if let Some(address) = leases(t).unwrap_or_default().first() {
                break ip(address)?;
            }
            ensure!(Instant::now() < end, "no lease: {}", said());
            sleep(Duration::from_millis(100));
        };
        fetch(&t.host, address, 80).map(drop)?;
        let exec =
            ["task", "exec", "--exec-id", "ping", "server", "/bin/ping", "-c", "1", "10.77.0.1"];
        run(&t.host, containerd.ctr().args(exec)).map(drop)
    };
    let used = used();
    fs::write(Path::new(root).join("tmp/stop"), "")?;
    let ended = running.wait()?;
    if made {
        fs::remove_dir("/etc/cni")?;
    }
    used.with_context(said)?;
    ensure!(ended.success(), "ctr: {}", said());
    gone(t)
}

/// The image that pods and containers are made from, as `docker save` writes one: a layer, and what is said about it.
fn image(t: &Bed, name: &str) -> Result<PathBuf> {
    let folder = t.state.path().join("image");
    fs::create_dir_all(&folder)?;
    let (root, layer) = (root_folder(t)?, folder.join("layer.tar"));
    run(&t.host, Command::new("tar").arg("-C").arg(root).arg("-cf").arg(&layer).arg("."))?;
    let digest = run(&t.host, Command::new("sha256sum").arg(&layer))?;
    let digest = digest.split(' ').next().context("a digest")?;
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Entrypoint": ["/bin/sleep", "600"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    fs::write(folder.join("config.json"), config.to_string())?;
    fs::write(folder.join("manifest.json"), manifest.to_string())?;
    let archive = t.state.path().join("image.tar");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&folder).arg("-cf").arg(&archive).arg("manifest.json");
    run(&t.host, tar.args(["config.json", "layer.tar"]))?;
    Ok(archive)
}

/// A pod with a host port and a limit, by the calls of a kubelet: sandbox, container, address from the sandbox' status,
/// removal.
fn pods(t: &Bed) -> Result {
    const IMAGE: &str = "localhost/box:1";
    let outside = t.outside(OUTSIDE[1], OUTSIDE[0])?;
    close(t)?;
    let net_d = t.state.path().join("net.d");
    fs::create_dir_all(&net_d)?;
    let mut list = conflist(t);
    let limits = t.plugins.join("bandwidth").exists();
    if limits {
        let bandwidth = json!({"type": "bandwidth", "capabilities": {"bandwidth": true}});
        list["plugins"].as_array_mut().context("plugins")?.push(bandwidth);
    }
    fs::write(net_d.join("10-orch.conflist"), list.to_string())?;
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    let containerd = Containerd::start(
        t,
        &format!(
            // No privilege is taken for granted: neither a lower OOM score nor overlayfs on the temporary folder.
            "[{cri}]\nsandbox_image = \"{IMAGE}\"\nrestrict_oom_score_adj = true\n\
             netns_mounts_under_state_dir = true\n\
             [{cri}.cni]\nbin_dir = \"{plugins}\"\nconf_dir = \"{net_d}\"\n\
             [{cri}.containerd]\nsnapshotter = \"native\"\n\
             [{cri}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"",
            plugins = t.plugins.display(),
            net_d = net_d.display(),
        ),
    )?;
    let archive = image(t, IMAGE)?;
    let mut import = containerd.ctr();
    import.args(["-n", "k8s.io", "images", "import", "--no-unpack"]).arg(archive);
    run(&t.host, &mut import)?;

    let client = Cri::new(&containerd.socket);
    let metadata = Message::default().text(1, "web-0").text(2, "uid-0").text(3, "default");
    let mapping = Message::default().number(2, 80).number(3, u32::from(HOST_PORT));
    let limit = Message::default().text(1, "kubernetes.io/ingress-bandwidth").text(2, "8M");
    let config = Message::default().message(1, &metadata).text(2, "web-0").message(5, &mapping);
    let config = config.message(7, &limit);
    let end = Instant::now() + PATIENCE;
    let sandbox = loop {
        // The image and the network become known to it a moment after they are there.
        match client.call("RunPodSandbox", Message::default().message(1, &config)) {
            Err(_) if Instant::now() < end => sleep(Duration::from_millis(200)),
            answer => break text_at(&answer?, &[1])?,
        }
    };
    let used = || -> Result {
        let status = client.call("PodSandboxStatus", Message::default().text(1, &sandbox))?;
        let address = text_at(&status, &[1, 5, 1])?;
        ensure!(leases(t)? == [address.clone()], "{address} is not leased: {:?}", leases(t)?);
        let mut container = Message::default()
            .message(1, &Message::default().text(1, "server"))
            .message(2, &Message::default().text(1, IMAGE));
        for word in ["/bin/httpd", "-f", "-p", "80", "-h", "/www"] {
            container = container.text(3, word);
        }
        let create = Message::default().text(1, &sandbox).message(2, &container);
        let made = client.call("CreateContainer", create.message(3, &config))?;
        client.call("StartContainer", Message::default().text(1, &text_at(&made, &[1])?))?;
        fetch(&t.host, ip(&address)?, 80).context("from the host")?;
        if has_portmap(t) {
            fetch(&outside, ip("192.0.2.1")?, HOST_PORT).context("the mapped port")?;
        }
        if limits {
            let bucket = t.netlink.token_bucket(t.port()?.index)?.context("no token bucket")?;
            ensure!(bucket.rate == 1_000_000, "limited to {} bytes/s", bucket.rate);
        }
        Ok(())
    };
    let used = used();
    for method in ["StopPodSandbox", "RemovePodSandbox"] {
        client.call(method, Message::default().text(1, &sandbox))?;
    }
    used.with_context(|| {
        fs::read_to_string(t.state.path().join("containerd/log")).unwrap_or_default()
    })?;
    gone(t)
}
