//! The commands that talk to the API server: enough of `kubectl` to live without it, and `status`.

mod apply;
mod describe;
mod exec;
mod get;
mod manifest;
mod resource;
mod rollout;
mod status;
pub(crate) mod wire;

use std::path::{Path, PathBuf};

use clap::Subcommand;
use orch_client::Client;

use crate::cluster::Format;
use crate::lab::Lab;
use crate::output;

pub(crate) use apply::apply_text;
pub(crate) use exec::{Remote, parse_duration};
pub(crate) use rollout::wait as wait_rollout;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Show objects
    #[command(
        after_help = "Example: orchctl get nodes,pods -A\n         orchctl get pod web-0 -o yaml"
    )]
    Get(get::Flags),
    /// Show one object with its conditions and events
    #[command(after_help = "Example: orchctl describe pod web-0")]
    Describe(describe::Flags),
    /// Create or change the objects of a manifest
    #[command(after_help = "Example: orchctl apply -f app.yaml")]
    Apply(apply::ApplyFlags),
    /// Create the objects of a manifest; an object that is there already is an error
    #[command(after_help = "Example: orchctl create -f app.yaml")]
    Create(apply::CreateFlags),
    /// Delete objects, by name or by manifest
    #[command(after_help = "Example: orchctl delete pod web-0")]
    Delete(apply::DeleteFlags),
    /// Print what a container of a pod wrote
    #[command(after_help = "Example: orchctl logs web-0 --follow")]
    Logs(exec::LogFlags),
    /// Run a command in a container
    #[command(after_help = "Example: orchctl exec web-0 -- ls /")]
    Exec(exec::Flags),
    /// Set the number of replicas
    #[command(after_help = "Example: orchctl scale deployment/web --replicas 3")]
    Scale(rollout::ScaleFlags),
    /// Wait until a deployment runs its newest version
    Rollout(rollout::RolloutFlags),
    /// Nodes, subnets, VTEPs and the health of the components on one screen
    #[command(after_help = "Example: orchctl status -o json")]
    Status {
        #[command(flatten)]
        format: Format,
    },
}

/// Where an object is.
#[derive(clap::Args, Clone)]
pub(crate) struct NamespaceFlag {
    /// Namespace
    #[arg(short, long, default_value = "default")]
    pub(crate) namespace: String,
}

/// The cluster's client, from the first kubeconfig there is.
///
/// # Errors
/// There is none, or it cannot be read.
pub(crate) fn connect(kubeconfig: Option<&Path>, lab_dir: &Path) -> anyhow::Result<Client> {
    let path = find_kubeconfig(kubeconfig, lab_dir)?;
    Client::from_kubeconfig(&path).map_err(|error| {
        output::hinted(
            "`orchctl lab kubeconfig` prints the path of the lab's kubeconfig",
            error.to_string(),
        )
    })
}

fn find_kubeconfig(named: Option<&Path>, lab_dir: &Path) -> anyhow::Result<PathBuf> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    if let Some(path) = std::env::var_os("KUBECONFIG").filter(|value| !value.is_empty()) {
        return Ok(PathBuf::from(path));
    }
    if let Some(lab) = Lab::open(lab_dir)?
        && lab.kubeconfig().exists()
    {
        return Ok(lab.kubeconfig());
    }
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".kube/config"));
    let own = crate::cluster::admin_kubeconfig();
    home.into_iter().chain([own]).find(|path| path.exists()).ok_or_else(|| {
        output::hinted(
            "make a cluster with `orchctl init`, start a lab with `make up`, or name a file with --kubeconfig or KUBECONFIG",
            "there is no cluster to talk to: no kubeconfig was found",
        )
    })
}

/// Runs one command; returns the exit code.
///
/// # Errors
/// What the API server or the command line is to blame for, in words for people.
pub(crate) async fn run(command: Command, client: Client, lab_dir: &Path) -> anyhow::Result<u8> {
    match command {
        Command::Get(flags) => get::run(&client, flags).await.map(|()| 0),
        Command::Describe(flags) => describe::run(&client, flags).await.map(|()| 0),
        Command::Apply(flags) => apply::apply(&client, flags).await.map(|()| 0),
        Command::Create(flags) => apply::create(&client, flags).await.map(|()| 0),
        Command::Delete(flags) => apply::delete(&client, flags).await.map(|()| 0),
        Command::Logs(flags) => exec::logs(&client, flags).await.map(|()| 0),
        Command::Exec(flags) => exec::run(&client, flags).await,
        Command::Scale(flags) => rollout::scale(&client, flags).await.map(|()| 0),
        Command::Rollout(flags) => rollout::run(&client, flags).await.map(|()| 0),
        Command::Status { format } => status::run(&client, lab_dir, format).await,
    }
}
