//! `orchestrator`: the daemon. `server` is the control plane (API server, scheduler, controllers, a managed
//! etcd), `agent` what runs on every node (kubelet, pod network, DNS).
//!
//! This crate only reads flags and puts the parts together; each part is a crate of its own.

mod agent;
mod members;
mod parts;
mod server;

use clap::Parser;

#[derive(Parser)]
#[command(name = "orchestrator", version, about = "orch: Kubernetes with the pod network first")]
enum Command {
    /// Run the control plane: API server, scheduler, controllers and, unless endpoints are given, etcd
    Server(server::Flags),
    /// Run the node agent: kubelet, pod network, Services, DNS
    Agent(agent::Flags),
}

#[cfg(test)]
#[path = "../../../docs/reference/render.rs"]
mod reference;

#[cfg(test)]
#[test]
fn the_reference_is_what_the_code_says() {
    let command = <Command as clap::CommandFactory>::command();
    reference::ensure("orchestrator.md", &reference::program(command));
}

fn main() -> std::process::ExitCode {
    let command = Command::parse();
    match run(command) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    orch_telemetry::init_tracing("info")?;
    // One provider for the whole process: rustls panics when it has to guess.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let stop = orch_telemetry::shutdown_token()?;
        match command {
            Command::Server(flags) => server::run(flags, stop).await,
            Command::Agent(flags) => agent::run(flags, stop).await,
        }
    })
}
