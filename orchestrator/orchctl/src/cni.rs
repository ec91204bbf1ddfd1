//! `orchctl cni`: calls CNI plugins by hand, as a container runtime does.
//!
//! What the reference's `cnitool` does, with the same variables (`NETCONFPATH`, `CNI_PATH`, `CNI_ARGS`), and what it
//! lacks: GC that knows its valid attachments, STATUS of all networks, and a list of what is attached. It works in the
//! network namespace it is called in and shares the result cache with other runtimes, so it shows and ends theirs, too.

use std::path::PathBuf;

use anyhow::Context as _;
use cni_invoke::{Attachment, CachedAttachment, Cni, InvokeError};
use cni_netlink::NetNs;
use cni_spec::code::ALREADY_ATTACHED;
use cni_spec::{AddResult, AttachmentId, CniArgs, ConfList, IfName, NetworkName, stable_hash};
use serde_json::{Map, Value, json};

use crate::cluster::Format;
use crate::output;

/// Where `ip netns` binds namespaces.
const NETNS_DIR: &str = "/run/netns";

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Attach a network namespace to a network and print the result
    #[command(after_help = "Example: orchctl cni add mynet /run/netns/blue")]
    Add {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        places: Places,
    },
    /// Detach it; also one that is gone
    #[command(after_help = "Example: orchctl cni del mynet /run/netns/blue")]
    Del {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        places: Places,
    },
    /// See whether everything is as ADD made it
    #[command(after_help = "Example: orchctl cni check mynet /run/netns/blue")]
    Check {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        places: Places,
    },
    /// Remove what belongs to no valid attachment
    #[command(after_help = "Example: orchctl cni gc mynet --live")]
    Gc {
        /// Name of the network
        network: NetworkName,
        #[command(flatten)]
        valid: Valid,
        #[command(flatten)]
        places: Places,
    },
    /// Say whether networks could serve an ADD now; exit code 1 if one of them could not
    #[command(after_help = "Example: orchctl cni status mynet")]
    Status {
        /// Name of the network; all without one
        network: Option<NetworkName>,
        #[command(flatten)]
        format: Format,
        #[command(flatten)]
        places: Places,
    },
    /// List the networks, or what is attached to them
    #[command(after_help = "Example: orchctl cni list --attachments")]
    List {
        /// The attachments of the result cache
        #[arg(short, long)]
        attachments: bool,
        #[command(flatten)]
        format: Format,
        #[command(flatten)]
        places: Places,
    },
}

#[derive(clap::Args)]
pub(crate) struct Places {
    /// Folder of network configurations
    #[arg(long, value_name = "DIR", env = "NETCONFPATH", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// Folders of plugins, joined by `:`
    #[arg(long, value_name = "DIRS", env = "CNI_PATH", default_value = "/opt/cni/bin")]
    bin_dirs: String,
    /// Folder of the result cache
    #[arg(long, value_name = "DIR", default_value = "/var/lib/cni")]
    cache_dir: PathBuf,
}

impl Places {
    fn cni(self) -> Cni {
        let bin_dirs = self.bin_dirs.split(':').filter(|dir| !dir.is_empty());
        Cni {
            conf_dir: self.conf_dir,
            bin_dirs: bin_dirs.map(PathBuf::from).collect(),
            cache_dir: self.cache_dir,
        }
    }
}

#[derive(clap::Args)]
pub(crate) struct Target {
    /// Name of the network
    network: NetworkName,
    /// Path of the network namespace, or its name in /run/netns
    netns: String,
    /// Container ID; without one it follows from the namespace
    #[arg(long, value_name = "ID")]
    container_id: Option<String>,
    /// Interface in the container
    #[arg(long, value_name = "NAME", default_value = "eth0", env = "CNI_IFNAME")]
    ifname: String,
    /// CNI_ARGS: `KEY=VALUE` joined by `;`
    #[arg(long, value_name = "ARGS", default_value = "", env = "CNI_ARGS")]
    args: String,
    /// Value of a capability, such as `portMappings=[{"hostPort":8080,"containerPort":80}]`; may be repeated
    #[arg(long = "capability", value_name = "NAME=JSON")]
    capabilities: Vec<String>,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Valid {
    /// A valid attachment, `CONTAINER` (its `eth0`) or `CONTAINER/INTERFACE`; may be repeated
    #[arg(long = "valid", value_name = "ATTACHMENT")]
    named: Vec<String>,
    /// Valid is what the result cache has, as long as its network namespace is there
    #[arg(long)]
    live: bool,
    /// Nothing is valid
    #[arg(long)]
    none: bool,
}

/// Runs a command; the exit code is its answer.
///
/// # Errors
/// Says which plugin failed and why.
pub(crate) async fn run(command: Command) -> anyhow::Result<u8> {
    // Plugins are child processes of synchronous code.
    tokio::task::spawn_blocking(move || run_blocking(command)).await.context("run the plugins")?
}

fn run_blocking(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Add { target, places } => {
            let cni = places.cni();
            let list = cni.load_named(&target.network)?;
            let attachment = target.attachment()?;
            match cni.add(&list, &attachment) {
                Ok(result) => print(&result.to_value(list.version)?)?,
                Err(error) => {
                    // CNI spec §3: after a failed ADD the runtime owes DEL. But what is attached already stays.
                    if error.cni_error().map(|error| error.code) != Some(ALREADY_ATTACHED)
                        && let Err(left) = cni.del(&list, &attachment)
                    {
                        eprintln!("warning: DEL after the failed ADD: {left}");
                    }
                    return Err(explain(error));
                }
            }
        }
        Command::Del { target, places } => {
            let cni = places.cni();
            let list = cni.load_named(&target.network)?;
            let mut attachment = target.attachment()?;
            if !NetNs::is_nsfs(&attachment.netns) {
                attachment.netns.clear();
            }
            cni.del(&list, &attachment).map_err(explain)?;
        }
        Command::Check { target, places } => {
            let cni = places.cni();
            let list = cni.load_named(&target.network)?;
            cni.check(&list, &target.attachment()?).map_err(explain)?;
        }
        Command::Gc { network, valid, places } => {
            let cni = places.cni();
            let list = cni.load_named(&network)?;
            let valid = valid.attachments(&cni.cached()?, &network)?;
            cni.gc(&list, &valid).map_err(explain)?;
        }
        Command::Status { network, format, places } => {
            return status(&places.cni(), network.as_ref(), format);
        }
        Command::List { attachments: true, format, places } => attached(&places.cni(), format)?,
        Command::List { attachments: false, format, places } => networks(&places.cni(), format)?,
    }
    Ok(0)
}

fn explain(error: InvokeError) -> anyhow::Error {
    anyhow::Error::new(error)
}

fn print(value: &Value) -> anyhow::Result<()> {
    output::line(&serde_json::to_string_pretty(value)?)
}

impl Target {
    fn attachment(&self) -> anyhow::Result<Attachment> {
        let netns = netns_path(&self.netns);
        let container_id = match &self.container_id {
            Some(id) => id.clone(),
            None => format!("orchctl-{:016x}", stable_hash(&[&netns])),
        };
        let args = CniArgs::parse(&self.args)
            .map_err(|error| output::usage(error.to_string()))?
            .pairs()
            .to_vec();
        let mut capabilities = Map::new();
        for text in &self.capabilities {
            let (name, value) = text
                .split_once('=')
                .ok_or_else(|| output::usage(format!("--capability {text}: not NAME=JSON")))?;
            let value = serde_json::from_str(value)
                .map_err(|error| output::usage(format!("--capability {name}: {error}")))?;
            capabilities.insert(name.to_owned(), value);
        }
        Ok(Attachment { container_id, netns, ifname: self.ifname.clone(), args, capabilities })
    }
}

/// A name of `ip netns` is no path.
fn netns_path(text: &str) -> String {
    if text.contains('/') || text.is_empty() {
        text.to_owned()
    } else {
        format!("{NETNS_DIR}/{text}")
    }
}

impl Valid {
    fn attachments(
        &self,
        cached: &[CachedAttachment],
        network: &NetworkName,
    ) -> anyhow::Result<Vec<AttachmentId>> {
        if self.live {
            let live = cached.iter().filter(|one| one.network == *network && is_live(one));
            return Ok(live.map(|one| one.id.clone()).collect());
        }
        self.named.iter().map(|text| parse_attachment(text)).collect()
    }
}

fn parse_attachment(text: &str) -> anyhow::Result<AttachmentId> {
    let (container, ifname) = text.split_once('/').unwrap_or((text, "eth0"));
    let wrong = |error: cni_spec::NameError| output::usage(format!("--valid {text}: {error}"));
    Ok(AttachmentId {
        container_id: container.parse().map_err(wrong)?,
        ifname: IfName::new(ifname).map_err(wrong)?,
    })
}

fn is_live(cached: &CachedAttachment) -> bool {
    NetNs::is_nsfs(&cached.attachment.netns)
}

fn lists(cni: &Cni) -> anyhow::Result<Vec<ConfList>> {
    let (lists, problems) = cni.load_all()?;
    for problem in problems {
        eprintln!("warning: {problem}");
    }
    Ok(lists)
}

fn status(cni: &Cni, network: Option<&NetworkName>, format: Format) -> anyhow::Result<u8> {
    let lists = match network {
        Some(name) => vec![cni.load_named(name)?],
        None => lists(cni)?,
    };
    if lists.is_empty() {
        let dir = cni.conf_dir.display();
        return Err(output::hinted(
            "examples/cni has some",
            format!("no network configuration in {dir}"),
        ));
    }
    let mut exit = 0;
    let (mut rows, mut data) = (Vec::new(), Vec::new());
    for list in &lists {
        // Lists older than STATUS are asked whether their plugins are there at all.
        let ready = cni.validate(list).and_then(|()| cni.status(list));
        let (state, why) = match &ready {
            Ok(()) => ("ready".to_owned(), String::new()),
            Err(error) => {
                exit = 1;
                let code = error
                    .cni_error()
                    .map_or_else(String::new, |error| format!(" ({})", error.code));
                (format!("not ready{code}"), error.to_string())
            }
        };
        data.push(
            json!({ "name": list.name, "cniVersion": list.version.as_str(), "ready": ready.is_ok(),
                          "reason": why }),
        );
        rows.push(vec![list.name.to_string(), list.version.to_string(), state, why]);
    }
    format
        .print(&data.into(), || output::table(&["NETWORK", "VERSION", "STATUS", "REASON"], rows))?;
    Ok(exit)
}

fn attached(cni: &Cni, format: Format) -> anyhow::Result<()> {
    let cached = cni.cached()?;
    format.print(&cached.iter().map(attachment_value).collect(), || {
        let rows = cached.iter().map(|one| {
            vec![
                one.network.to_string(),
                one.id.container_id.to_string(),
                one.id.ifname.to_string(),
                addresses(one).join(","),
                if is_live(one) { "live" } else { "gone" }.to_owned(),
            ]
        });
        output::table(&["NETWORK", "CONTAINER", "INTERFACE", "ADDRESSES", "NETNS"], rows)
    })
}

fn networks(cni: &Cni, format: Format) -> anyhow::Result<()> {
    let lists = lists(cni)?;
    let plugins = |list: &ConfList| -> Vec<String> {
        list.plugins.iter().map(|plugin| plugin.plugin.clone()).collect()
    };
    let cached = cni.cached()?;
    let attached = |list: &ConfList| cached.iter().filter(|one| one.network == list.name).count();
    let data = lists.iter().map(|list| {
        json!({ "name": list.name, "cniVersion": list.version.as_str(), "plugins": plugins(list),
                "attached": attached(list) })
    });
    format.print(&data.collect(), || {
        let rows = lists.iter().map(|list| {
            vec![
                list.name.to_string(),
                list.version.to_string(),
                plugins(list).join(","),
                attached(list).to_string(),
            ]
        });
        output::table(&["NETWORK", "VERSION", "PLUGINS", "ATTACHED"], rows)
    })
}

fn addresses(cached: &CachedAttachment) -> Vec<String> {
    // The result is in the version it was answered in, which it names.
    let Some(Value::Object(raw)) = &cached.result else { return Vec::new() };
    let Ok(version) = cni_spec::Version::of_conf(raw) else { return Vec::new() };
    let result = AddResult::from_value(&Value::Object(raw.clone()), version);
    let ips = result.map(|result| result.ips).unwrap_or_default();
    ips.iter().map(|ip| ip.address.to_string()).collect()
}

fn attachment_value(cached: &CachedAttachment) -> Value {
    json!({
        "network": cached.network,
        "containerID": cached.id.container_id,
        "ifname": cached.id.ifname,
        "netns": cached.attachment.netns,
        "live": is_live(cached),
        "addresses": addresses(cached),
        "capabilities": cached.attachment.capabilities,
        "result": cached.result,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(capability: &str) -> Target {
        Target {
            network: "net".parse().expect("good"),
            netns: "blue".to_owned(),
            container_id: None,
            ifname: "eth0".to_owned(),
            args: "IgnoreUnknown=1;A=b".to_owned(),
            capabilities: vec![capability.to_owned()],
        }
    }

    #[test]
    fn a_name_of_ip_netns_becomes_its_path_and_the_container_id_follows_from_it() {
        assert_eq!(netns_path("blue"), "/run/netns/blue");
        assert_eq!(netns_path("/proc/7/ns/net"), "/proc/7/ns/net");
        let first = target(r#"portMappings=[{"hostPort":1}]"#).attachment().expect("good");
        assert_eq!(first.netns, "/run/netns/blue");
        let again = target("mac=\"02:00:00:00:00:01\"").attachment().expect("good");
        assert_eq!(first.container_id, again.container_id);
        cni_spec::ContainerId::new(first.container_id).expect("a container ID");
        assert_eq!(first.capabilities["portMappings"][0]["hostPort"], 1);
        assert_eq!(first.args.len(), 2);
    }

    #[test]
    fn wrong_words_are_wrong_usage() {
        for capability in ["portMappings", "portMappings={"] {
            let error = target(capability).attachment().expect_err(capability);
            assert_eq!(output::exit_code(&error), 2);
        }
        assert_eq!(output::exit_code(&parse_attachment("a b").expect_err("a space")), 2);
        let id = parse_attachment("c1/net0").expect("good");
        assert_eq!(id.to_string(), "c1/net0");
        assert_eq!(parse_attachment("c1").expect("good").ifname.as_str(), "eth0");
    }
}
