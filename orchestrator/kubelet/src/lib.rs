//! The node agent's pod part: runs the pods of one node on a container engine, as the kubelet does.
//!
//! [`run`] starts it from [`Options`]. Inside, `source` follows the node's pods, `manager` gives each its
//! worker, and `pod` is one pod's life; `volume`, `image`, `probe` and `network` are what a worker uses.
//! `node` keeps the Node object true, `server` answers for logs, exec and attach. Addresses and packets are
//! the CNI plugins' and the network agent's business.

mod api;
mod context;
mod events;
mod exec;
mod image;
mod labels;
mod manager;
mod network;
mod node;
mod options;
mod pod;
mod probe;
mod references;
mod server;
mod source;
mod volume;

pub use options::Options;

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::context::Context;
use crate::network::CniNetwork;
use crate::node::machine::Machine;

/// Why the kubelet cannot run at all. Everything else is waited for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("listen on {address}; another agent may be running on this node")]
    Listen { address: std::net::SocketAddr, source: std::io::Error },
    #[error("serving certificate of the kubelet: {0}")]
    Certificate(String),
    #[error("make {}", path.display())]
    Folder { path: std::path::PathBuf, source: std::io::Error },
}

/// Runs the kubelet until `stop`. Pods are left running at the end.
///
/// # Errors
/// It cannot listen, or its certificates or folders are unusable.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), Error> {
    for path in [options.paths.pods_dir(), options.paths.netns_dir()] {
        std::fs::create_dir_all(&path).map_err(|source| Error::Folder { path, source })?;
    }
    let machine = Machine::read(&options);
    let network = Arc::new(CniNetwork::new(options.paths.clone()));
    let cx = Arc::new(Context::new(options, network, machine));
    let (pods_in, pods) = watch::channel(None);
    let server = server::Server::bind(cx.clone(), pods.clone()).await?;
    let mut parts = JoinSet::new();
    parts.spawn(server.run(stop.clone()));
    parts.spawn(source::run(cx.client(), cx.options.node_name.clone(), pods_in, stop.clone()));
    parts.spawn(until(stop.clone(), node::run(cx.clone())));
    parts.spawn(until(stop.clone(), node::heartbeat::run(cx.clone())));
    parts.spawn(manager::Manager::new(cx.clone(), pods, stop.clone()).run());
    let warm = cx.clone();
    parts.spawn(until(stop.clone(), async move {
        // Before the first pod needs it; if it fails now, the pod's start says so.
        if let Err(error) = pod::start::ensure_pause_image(&warm).await {
            warn!(%error, "sandbox image not there yet");
        }
    }));
    info!(node = cx.options.node_name, port = cx.options.listen_port, "kubelet runs");
    while let Some(ended) = parts.join_next().await {
        if let Err(error) = ended {
            // A panic: the rest of the process must not go on without this part.
            stop.cancel();
            std::panic::resume_unwind(error.into_panic());
        }
    }
    Ok(())
}

/// Work that may be dropped anywhere.
async fn until(stop: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

#[cfg(test)]
mod tests;
