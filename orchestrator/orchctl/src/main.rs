//! `orchctl`: runs the cluster from the command line.
//!
//! A command's file parses and prints; the work is in functions that tests can call. Data goes to stdout, talk
//! to stderr; exit code 0 done, 1 failed, 2 wrong usage.

mod cluster;
mod cni;
mod image;
mod kube;
mod lab;
mod net;
mod output;
mod progress;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "orchctl",
    version,
    about = "Run an orch cluster: a Kubernetes API with a VXLAN pod network"
)]
struct Cli {
    /// Credentials of the cluster; without it KUBECONFIG, then the lab's, then ~/.kube/config
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Folder of the lab
    #[arg(long, global = true, value_name = "DIR", env = "ORCH_LAB", default_value = lab::DEFAULT_DIR)]
    lab_dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Many nodes on this one machine
    #[command(subcommand)]
    Lab(lab::Command),
    /// Images in the engines of the nodes
    #[command(subcommand)]
    Image(ImageCommand),
    /// The pod network explained: leases, peers, what is wrong, the way of a packet
    #[command(subcommand)]
    Net(net::Command),
    #[command(flatten)]
    Cluster(cluster::Command),
    /// CNI plugins called by hand, as a container runtime does
    #[command(subcommand)]
    Cni(cni::Command),
    #[command(flatten)]
    Kube(kube::Command),
}

#[derive(Subcommand)]
enum ImageCommand {
    /// Build an image from a folder with a Dockerfile
    #[command(after_help = "Example: orchctl image build ./app --tag app:v1")]
    Build {
        folder: PathBuf,
        /// Name and tag of the image
        #[arg(short, long)]
        tag: String,
        #[command(flatten)]
        engine: EngineFlag,
    },
    /// Load images from a file that `docker save` wrote
    #[command(after_help = "Example: orchctl image load app.tar")]
    Load {
        file: PathBuf,
        #[command(flatten)]
        engine: EngineFlag,
    },
    /// List the images
    #[command(after_help = "Example: orchctl image ls -o json")]
    Ls {
        #[command(flatten)]
        format: cluster::Format,
        #[command(flatten)]
        engine: EngineFlag,
    },
}

#[derive(clap::Args)]
struct EngineFlag {
    /// Unix socket of the engine; without it the lab's, then /var/run/docker.sock
    #[arg(long, value_name = "SOCKET")]
    engine: Option<PathBuf>,
}

/// The definition of the command line, for completions.
fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

fn main() -> ExitCode {
    // Rust ignores SIGPIPE; a reader that closes early (`| head`) is a normal end for a command line.
    // SAFETY: called before any other thread exists, with the default action.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    let cli = Cli::parse();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime =
        match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                eprintln!("error: start the runtime: {error}");
                return ExitCode::FAILURE;
            }
        };
    let outcome = runtime.block_on(run(cli));
    // A blocked read of stdin must not keep the process.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{}", output::describe(&error));
            ExitCode::from(output::exit_code(&error))
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<u8> {
    match cli.command {
        Command::Lab(command) => lab::run(command, &cli.lab_dir).await,
        Command::Image(command) => run_image(command, &cli.lab_dir).await.map(|()| 0),
        Command::Net(command) => {
            let connect = || kube::connect(cli.kubeconfig.as_deref(), &cli.lab_dir);
            net::run(command, &cli.lab_dir, connect).await
        }
        Command::Cluster(command) => {
            let connect = || kube::connect(cli.kubeconfig.as_deref(), &cli.lab_dir);
            cluster::run(command, connect).await
        }
        Command::Cni(command) => cni::run(command).await,
        Command::Kube(command) => {
            let client = kube::connect(cli.kubeconfig.as_deref(), &cli.lab_dir)?;
            kube::run(command, client, &cli.lab_dir).await
        }
    }
}

async fn run_image(command: ImageCommand, lab_dir: &std::path::Path) -> anyhow::Result<()> {
    let socket = |flag: EngineFlag| -> anyhow::Result<PathBuf> {
        Ok(match (flag.engine, lab::Lab::open(lab_dir)?) {
            (Some(socket), _) => socket,
            (None, Some(lab)) => lab.engine_socket(),
            (None, None) => PathBuf::from("/var/run/docker.sock"),
        })
    };
    match command {
        ImageCommand::Build { folder, tag, engine } => {
            image::build(&image::connect(&socket(engine)?).await?, &folder, &tag).await?;
            output::line(&format!("built {tag}"))
        }
        ImageCommand::Load { file, engine } => {
            for line in image::load(&image::connect(&socket(engine)?).await?, &file).await? {
                output::line(&line)?;
            }
            Ok(())
        }
        ImageCommand::Ls { format, engine } => {
            let images = image::list(&image::connect(&socket(engine)?).await?).await?;
            let data = images.iter().map(|image| {
                serde_json::json!({ "image": image.tag, "id": image.id, "sizeBytes": image.size_bytes })
            });
            format.print(&data.collect(), || {
                let rows = images.iter().map(|image| {
                    vec![
                        image.tag.clone(),
                        image.id.trim_start_matches("sha256:").chars().take(12).collect(),
                        format!("{:.1} MB", image.size_bytes as f64 / 1e6),
                    ]
                });
                output::table(&["IMAGE", "ID", "SIZE"], rows)
            })
        }
    }
}

#[cfg(test)]
mod tests {
    fn without_example(command: &clap::Command, path: &str, found: &mut Vec<String>) {
        let path = format!("{path} {}", command.get_name());
        let commands: Vec<_> = command.get_subcommands().collect();
        let example = |command: &clap::Command| {
            command.get_after_help().is_some_and(|help| help.to_string().starts_with("Example: "))
        };
        if commands.is_empty() && !example(command) {
            found.push(path.clone());
        }
        for command in commands {
            without_example(command, &path, found);
        }
    }

    #[test]
    fn every_command_shows_an_example() {
        let mut found = Vec::new();
        without_example(&super::command(), "", &mut found);
        assert!(found.is_empty(), "no example in the help of {found:?}");
    }
}
