//! Answers load balancers that ask whether this node can serve a Service (`healthCheckNodePort`).
//!
//! One listener per Service with `externalTrafficPolicy: Local`. It answers 200 while a ready endpoint is on this node,
//! else 503, with the words of kube-proxy: load balancers of others read them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::model::HealthCheck;

/// Patience with one client: a request is one line and a few headers.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);
/// Longest request that is read.
const REQUEST_BYTES: usize = 4096;
/// Clients of one port at a time; the next ones wait in the backlog.
const CLIENTS: usize = 16;
/// Wait before a port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(5);

type Checks = BTreeMap<u16, HealthCheck>;

/// Keeps a listener for each port until cancelled.
pub(crate) async fn serve(mut checks: watch::Receiver<Checks>, cancel: CancellationToken) {
    let mut listeners: BTreeMap<u16, CancellationToken> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let wanted: Vec<u16> = checks.borrow_and_update().keys().copied().collect();
        listeners.retain(|port, stop| {
            let keep = wanted.contains(port);
            if !keep {
                stop.cancel();
            }
            keep
        });
        for port in wanted {
            listeners.entry(port).or_insert_with(|| {
                let stop = cancel.child_token();
                tasks.spawn(listen(port, checks.clone(), stop.clone()));
                stop
            });
        }
        tokio::select! {
            () = cancel.cancelled() => break,
            changed = checks.changed() => if changed.is_err() { break },
            Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
        }
    }
    while tasks.join_next().await.is_some() {}
}

async fn listen(port: u16, checks: watch::Receiver<Checks>, stop: CancellationToken) {
    let mut told = false;
    loop {
        let error = match bind(port).await {
            Ok(listener) => tokio::select! {
                () = stop.cancelled() => return,
                error = accept(&listener, port, &checks) => error,
            },
            Err(error) => error,
        };
        if !std::mem::replace(&mut told, true) {
            warn!(port, %error, "health checks of a Service are not answered; trying again");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(RETRY) => {}
        }
    }
}

/// Both families where there are both.
async fn bind(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await,
    }
}

async fn accept(
    listener: &TcpListener,
    port: u16,
    checks: &watch::Receiver<Checks>,
) -> std::io::Error {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if clients.len() < CLIENTS => match accepted {
                Ok((stream, _)) => {
                    let check = checks.borrow().get(&port).cloned();
                    clients.spawn(timeout(CLIENT_LIMIT, answer(stream, check)));
                }
                Err(error) => return error,
            },
            Some(done) = clients.join_next(), if !clients.is_empty() => {
                if let Ok(Ok(Err(error))) = done {
                    debug!(port, %error, "a client of a health check went away");
                }
            }
        }
    }
}

async fn answer(mut stream: TcpStream, check: Option<HealthCheck>) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut buffer = [0; 512];
    while !request.windows(4).any(|four| four == b"\r\n\r\n") && request.len() < REQUEST_BYTES {
        match stream.read(&mut buffer).await? {
            0 => break,
            length => request.extend_from_slice(&buffer[..length]),
        }
    }
    let Some(check) = check else { return Ok(()) };
    stream.write_all(response(&check).as_bytes()).await?;
    stream.shutdown().await
}

/// The whole answer. Pure.
fn response(check: &HealthCheck) -> String {
    let status = if check.local > 0 { "200 OK" } else { "503 Service Unavailable" };
    let body = serde_json::json!({
        "service": {"namespace": check.namespace, "name": check.name},
        "localEndpoints": check.local,
        "serviceProxyHealthy": true,
    })
    .to_string();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        check.local,
        body.len()
    )
}
