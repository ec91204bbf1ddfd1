//! `orchctl reset`: takes this host out of its cluster and leaves it as it was before `init` or `join`.

use std::fs;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use cni_netlink::{Link, LinkKind, Netlink, PacketSizes};

use super::config::{self, Config};
use super::host::{Host, Part};
use super::leave;
use crate::lab::engine;
use crate::{image, output, progress};

const CONFLIST: &str = "10-orch.conflist";
const BPF: &str = "sys/fs/bpf";

#[derive(clap::Args)]
#[command(after_help = "Example: orchctl reset --yes\n\
    On a control plane this removes its member from etcd; on the last one, the cluster with all its objects.")]
pub(crate) struct Flags {
    /// Prefix of every path, as given to init or join
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// How long to wait for the other control planes to let this one go
    #[arg(long, default_value = "60s", value_parser = crate::kube::parse_duration)]
    timeout: Duration,
    /// Go on although the other control planes cannot be told: they count this host's vote in etcd until
    /// `orchctl etcd remove` there
    #[arg(long)]
    force: bool,
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

pub(crate) async fn run(flags: Flags) -> anyhow::Result<()> {
    let host = Host::new(&flags.root)?;
    let Some(config) = Config::read(&config::path(&host.paths))? else {
        eprintln!("there is no orch below {}: nothing to do", host.paths.root().display());
        return Ok(());
    };
    confirm(&config, flags.yes)?;
    let mut troubles = Troubles::default();

    leave::run(&host, &config, flags.timeout, flags.force).await?;
    let stop = progress::Step::new("stop daemons");
    for part in [Part::Agent, Part::Server] {
        troubles.note(host.stop(part, &config));
    }
    troubles.note(host.stop_etcd());
    stop.done("");
    if config.node.agent {
        let clean = progress::Step::new("remove pods and the pod network");
        troubles.note(remove_containers(&config).await);
        for folder in [host.paths.run(), host.paths.lib()] {
            troubles.note(engine::unmount_below(&folder));
        }
        troubles.note(remove_network());
        troubles.note(remove_tables());
        troubles.note(remove_accepts());
        troubles.note(remove_programs(&host));
        clean.done("");
    }
    // The folders are the record of what is left: they go last, and only when nothing is.
    if troubles.0.is_empty() {
        troubles.note(remove_files(&host));
    }
    if troubles.0.is_empty() {
        eprintln!("this host is as it was before");
        return Ok(());
    }
    Err(output::hinted(
        "mend that and run `orchctl reset` again: it goes on where it ended",
        format!("something is left: {}", troubles.0.join("; ")),
    ))
}

fn confirm(config: &Config, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    let what = if config.is_control_plane() {
        "its pods, its member of etcd and, on the last control plane, the whole cluster"
    } else {
        "its pods"
    };
    if !std::io::stdin().is_terminal() {
        return Err(output::usage(format!("this removes {what}: say so with --yes")));
    }
    eprint!("This removes {} with {what}. Go on? [y/N] ", config.node.name);
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("read the answer")?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(output::usage("not confirmed"))
    }
}

/// Removes the pinned programs; below a root of its own also the file system that was mounted for them.
fn remove_programs(host: &Host) -> anyhow::Result<()> {
    let mount = host.paths.root().join(BPF);
    let ours = mount.join("orch");
    if ours.exists() {
        fs::remove_dir_all(&ours).context("remove the pinned programs")?;
    }
    if !host.is_whole_machine() && mount.exists() {
        engine::unmount(&mount)?;
        // `sys` and what leads to it; what somebody else uses stays.
        for folder in mount.ancestors().take_while(|folder| *folder != host.paths.root()) {
            let _ = fs::remove_dir(folder);
        }
    }
    Ok(())
}

async fn remove_containers(config: &Config) -> anyhow::Result<()> {
    // An engine that is gone has no containers.
    let Ok(docker) = image::connect(&config.engine.socket).await else { return Ok(()) };
    engine::remove_containers_of(&docker, &config.node.name).await?;
    engine::remove_pause_image(&docker).await
}

/// Overlay, bridge and the address of the DNS.
fn remove_network() -> anyhow::Result<()> {
    let netlink = Netlink::open()?;
    for name in [orch_config::VXLAN_DEVICE, orch_config::POD_BRIDGE] {
        if let Some(link) = netlink.link(name)? {
            if link.sizes.are_large() {
                make_packets_plain(&netlink)?;
            }
            netlink.delete_link(link.index).with_context(|| format!("delete the link {name}"))?;
        }
    }
    if let Some(lo) = netlink.link("lo")? {
        let v6 = orch_config::SERVICE_CIDR_V6.parse().context("a constant")?;
        let dns_ips: [std::net::IpAddr; 2] =
            [orch_config::DNS_IP.into(), orch_config::dns_ip_v6(v6).into()];
        for address in netlink.addresses(lo.index)? {
            if dns_ips.contains(&address.ip()) {
                netlink.delete_address(lo.index, address)?;
            }
        }
    }
    Ok(())
}

/// Takes back what the agent let the machine's own links take; the pods' bridge is the first link that it lets.
fn make_packets_plain(netlink: &Netlink) -> anyhow::Result<()> {
    let physical = |link: &Link| link.kind == LinkKind::Plain && link.name != "lo";
    for link in netlink.links()?.iter().filter(|link| physical(link) && link.sizes.are_large()) {
        netlink
            .set_packet_sizes(link.index, PacketSizes::PLAIN)
            .with_context(|| format!("set packet sizes of {}", link.name))?;
    }
    Ok(())
}

/// All tables of ours: `orch` and `orch-…`, of whatever family.
fn remove_tables() -> anyhow::Result<()> {
    let nft = |args: &[&str]| -> anyhow::Result<String> {
        let out = Command::new("nft")
            .args(args)
            .env("PATH", crate::lab::programs::search_path())
            .output()
            .context("run nft")?;
        if !out.status.success() {
            anyhow::bail!(
                "nft {}: {}",
                args.join(" "),
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    };
    for line in nft(&["list", "tables"])?.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["table", family, name] = words[..]
            && is_ours(name)
        {
            nft(&["delete", "table", family, name])?;
        }
    }
    Ok(())
}

/// The rules that let the pod network through the firewalls of others, of the new and of the old iptables.
fn remove_accepts() -> anyhow::Result<()> {
    // Asked first: the tools make the tables that they look into.
    if cni_netlink::nft_ip_chain_exists("filter", "FORWARD")? {
        remove_accepts_with("iptables-nft")?;
    }
    let legacy = fs::read_to_string("/proc/self/net/ip_tables_names").unwrap_or_default();
    if legacy.lines().any(|table| table == "filter") {
        remove_accepts_with("iptables-legacy")?;
    }
    Ok(())
}

fn remove_accepts_with(program: &str) -> anyhow::Result<()> {
    let run = |name: &str, args: &[&str], input: &str| -> anyhow::Result<String> {
        let mut child = Command::new(name)
            .args(args)
            .env("PATH", crate::lab::programs::search_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {name}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).with_context(|| format!("write to {name}"))?;
        }
        let out = child.wait_with_output().with_context(|| format!("run {name}"))?;
        if !out.status.success() {
            anyhow::bail!("{name}: {}", String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let steps = deletions(&run(program, &["-w", "5", "-S"], "")?);
    if !steps.is_empty() {
        run(&format!("{program}-restore"), &["-w", "5", "--noflush"], &steps)?;
    }
    Ok(())
}

/// What `iptables-restore` needs to remove our rules from those that `iptables -S` prints; empty when there are none.
fn deletions(rules: &str) -> String {
    let comment = format!("\"{}\"", orch_config::FIREWALL_COMMENT);
    let ours: Vec<String> = rules
        .lines()
        .filter(|rule| rule.contains(&comment))
        .filter_map(|rule| Some(format!("-D {}\n", rule.trim().strip_prefix("-A ")?)))
        .collect();
    if ours.is_empty() { String::new() } else { format!("*filter\n{}COMMIT\n", ours.concat()) }
}

fn is_ours(table: &str) -> bool {
    table == "orch" || table.starts_with("orch-") || table.starts_with("orch_")
}

fn remove_files(host: &Host) -> anyhow::Result<()> {
    let installed = host.installed();
    for (key, value) in &installed.sysctls {
        let path = Path::new("/proc/sys").join(key);
        if fs::read_to_string(&path).is_ok_and(|now| now.trim() != value) {
            fs::write(&path, value).with_context(|| format!("set {} back", path.display()))?;
        }
    }
    let conflist = host.paths.cni_conf_dir().join(CONFLIST);
    let mut units = false;
    for file in installed.files.iter().chain([&conflist]) {
        units |= file.extension().is_some_and(|extension| extension == "service");
        remove(fs::remove_file(file), file)?;
    }
    if units {
        let _ = Command::new("systemctl").arg("daemon-reload").status();
    }
    let cache = host.paths.cni_cache_dir();
    let folders = [
        host.paths.cni_data_dir().join("orch"),
        cache.join("results"),
        host.paths.run(),
        host.paths.log(),
        host.paths.etc(),
        host.paths.lib(),
    ];
    for folder in &folders {
        // Results of other networks are not ours.
        if folder.ends_with("results") && !installed.folders.contains(&cache) {
            continue;
        }
        remove(fs::remove_dir_all(folder), folder)?;
    }
    if installed.folders.contains(&cache) {
        remove(fs::remove_dir_all(&cache), &cache)?;
    }
    // Deepest first; what somebody else uses meanwhile stays.
    for folder in installed.folders.iter().rev() {
        let _ = fs::remove_dir(folder);
    }
    Ok(())
}

/// A missing thing is a thing already removed.
fn remove(outcome: std::io::Result<()>, path: &Path) -> anyhow::Result<()> {
    match outcome {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tables_of_ours_are_taken_away() {
        assert!(is_ours("orch") && is_ours("orch-portmap") && is_ours("orch_policy"));
        assert!(!is_ours("orchard") && !is_ours("filter") && !is_ours("cni_orch"));
    }

    #[test]
    fn rules_in_the_firewalls_of_others_are_taken_away_by_their_comment() {
        let theirs = "-P FORWARD DROP\n-N DOCKER-USER\n-A DOCKER-USER -j RETURN\n";
        assert_eq!(deletions(theirs), "");
        let ours =
            "DOCKER-USER -s 10.244.0.0/16 -m comment --comment \"orch pod network\" -j ACCEPT";
        assert_eq!(
            deletions(&format!("{theirs}-A {ours}\n")),
            format!("*filter\n-D {ours}\nCOMMIT\n")
        );
    }

    #[test]
    fn a_folder_that_was_there_before_stays() {
        let root = tempfile::tempdir().expect("a folder");
        let host = Host::new(root.path()).expect("host");
        fs::create_dir_all(host.paths.cni_conf_dir()).expect("there before");
        host.record_before().expect("recorded");
        Config::default().write(&config::path(&host.paths)).expect("written");
        fs::create_dir_all(host.paths.cni_bin_dir()).expect("made");
        let plugin = host.paths.cni_bin_dir().join("vxlan");
        fs::write(&plugin, "").expect("made");
        host.record(|installed| {
            installed.files.insert(plugin.clone());
        })
        .expect("recorded");
        fs::create_dir_all(host.paths.cni_data_dir().join("orch")).expect("made");
        remove_files(&host).expect("removed");
        let left: Vec<_> = walk(root.path());
        assert_eq!(left, ["etc", "etc/cni", "etc/cni/net.d"], "and nothing else");
    }

    fn walk(root: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut queue = vec![root.to_owned()];
        while let Some(folder) = queue.pop() {
            for entry in fs::read_dir(&folder).expect("a folder").flatten() {
                let path = entry.path();
                let shown = path.strip_prefix(root).expect("below").display().to_string();
                found.push(shown);
                if path.is_dir() {
                    queue.push(path);
                }
            }
        }
        found.sort();
        found
    }
}
