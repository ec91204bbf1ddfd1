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
mod reference;

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

    /// Commands that do something, print a file or a stream as it is, or write for people alone.
    const NO_DATA: &[&str] = &[
        "apply",
        "cert renew",
        "cni add",
        "cni check",
        "cni del",
        "cni gc",
        "completion",
        "config check",
        "config defaults",
        "cordon",
        "create",
        "delete",
        "describe",
        "drain",
        "etcd defrag",
        "etcd remove",
        "etcd snapshot restore",
        "etcd snapshot save",
        "exec",
        "image build",
        "image load",
        "join",
        "kubeconfig",
        "lab demo",
        "lab down",
        "lab exec",
        "lab heal",
        "lab kill",
        "lab kubeconfig",
        "lab partition",
        "lab restart",
        "lab restore",
        "lab up",
        "logs",
        "reset",
        "rollout status",
        "scale",
        "taint",
        "token delete",
        "uncordon",
    ];

    fn without_output(command: &clap::Command, path: &str, found: &mut Vec<String>) {
        for sub in command.get_subcommands() {
            let path = format!("{path} {}", sub.get_name()).trim().to_owned();
            let formats = sub.get_arguments().find(|arg| arg.get_long() == Some("output"));
            let json = formats.is_some_and(|arg| arg.get_short() == Some('o'));
            if sub.get_subcommands().next().is_none() && !json {
                found.push(path.clone());
            }
            without_output(sub, &path, found);
        }
    }

    #[test]
    fn every_command_that_prints_data_takes_o_json() {
        let mut found = Vec::new();
        without_output(&super::command(), "", &mut found);
        found.sort();
        assert_eq!(
            found, NO_DATA,
            "a command takes -o json, or is in the list of those without data"
        );
    }

    #[test]
    fn completions_of_three_shells_know_every_command() {
        use clap_complete::Shell;
        let all = super::command();
        let names: Vec<&str> = all.get_subcommands().map(clap::Command::get_name).collect();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut super::command(), "orchctl", &mut text);
            let text = String::from_utf8(text).expect("text");
            let missing: Vec<_> = names.iter().filter(|name| !text.contains(**name)).collect();
            assert!(missing.is_empty(), "{shell} does not know {missing:?}");
        }
    }

    #[test]
    fn wrong_usage_has_exit_code_2_and_help_has_0() {
        use clap::Parser as _;
        let code = |words: &[&str]| {
            let words = std::iter::once(&"orchctl").chain(words);
            super::Cli::try_parse_from(words).err().map(|error| error.exit_code())
        };
        assert_eq!(code(&["status", "--help"]), Some(0));
        assert_eq!(code(&["status"]), None);
        for words in [
            &["nonsense"][..],
            &["status", "--nonsense"],
            &["scale"],
            &["get", "pods", "-o", "xml"],
        ] {
            assert_eq!(code(words), Some(2), "{words:?}");
        }
    }

    #[test]
    fn every_command_shows_an_example() {
        let mut found = Vec::new();
        without_example(&super::command(), "", &mut found);
        assert!(found.is_empty(), "no example in the help of {found:?}");
    }
}
