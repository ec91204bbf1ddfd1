//! An API server with an etcd of its own on loopback, until Ctrl-C: `cargo run -p orch-apiserver --example serve`.
//! For trying clients; prints nothing but the path of an administrator's kubeconfig, on stderr.

#[path = "../tests/suite/support/mod.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod support;

#[tokio::main]
async fn main() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).unwrap_or(16443);
    let mut cluster = support::Cluster::start_on(port).await;
    tracing::info!(kubeconfig = %cluster.kubeconfig().display(), "ready; Ctrl-C ends it");
    let _ = tokio::signal::ctrl_c().await;
    cluster.stop_server().await;
}
