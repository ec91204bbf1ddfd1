//! One try of a probe or a life-cycle hook: HTTP, TCP or a command.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use orch_api::k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler, Probe};
use orch_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use orch_cri::{ExecSpec, Runtime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::context::Context;
use crate::server::tls;

/// As much of an answer or output as a message quotes (kubelet reads 10 KiB).
const MAX_QUOTE: usize = 10 * 1024;

/// Whom a try is about.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) container: Container,
    pub(crate) container_id: String,
    /// The pod's address.
    pub(crate) ip: Option<IpAddr>,
}

/// Why a try did not pass. The text is for an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Miss {
    /// The container said no, or nothing.
    Failed(String),
    /// It could not be asked, because the engine is away: that says nothing about the container.
    Unasked(String),
}

impl From<String> for Miss {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

impl Miss {
    fn into_text(self) -> String {
        match self {
            Self::Failed(why) | Self::Unasked(why) => why,
        }
    }
}

/// Tries a probe once.
pub(crate) async fn check(cx: &Arc<Context>, target: &Target, probe: &Probe) -> Result<(), Miss> {
    if let Some(exec) = &probe.exec {
        return command(cx.runtime(), target, exec.command.clone().unwrap_or_default()).await;
    }
    if let Some(get) = &probe.http_get {
        return Ok(http_get(target, get, "kube-probe/1.36").await?);
    }
    if let Some(tcp) = &probe.tcp_socket {
        let port = port(&target.container, &tcp.port)?;
        let host = host(target, tcp.host.as_deref())?;
        connect(&host, port).await?;
        return Ok(());
    }
    if let Some(grpc) = &probe.grpc {
        let host = host(target, None)?;
        let port = u16::try_from(grpc.port).map_err(|_| format!("{} is no port", grpc.port))?;
        let service = grpc.service.as_deref().unwrap_or_default();
        return Ok(grpc_health(&host, port, service).await?);
    }
    Err(Miss::Failed("the probe names nothing to do".to_owned()))
}

/// Runs a life-cycle hook.
pub(crate) async fn hook(
    cx: &Arc<Context>,
    target: &Target,
    hook: &LifecycleHandler,
) -> Result<(), String> {
    if let Some(exec) = &hook.exec {
        let words = exec.command.clone().unwrap_or_default();
        return command(cx.runtime(), target, words).await.map_err(Miss::into_text);
    }
    if let Some(get) = &hook.http_get {
        return http_get(target, get, "kube-lifecycle/1.36").await;
    }
    if let Some(sleep) = &hook.sleep {
        tokio::time::sleep(std::time::Duration::from_secs(
            u64::try_from(sleep.seconds).unwrap_or(0),
        ))
        .await;
        return Ok(());
    }
    if let Some(tcp) = &hook.tcp_socket {
        let port = port(&target.container, &tcp.port)?;
        return connect(&host(target, tcp.host.as_deref())?, port).await.map(drop);
    }
    Ok(())
}

async fn command(runtime: &dyn Runtime, target: &Target, command: Vec<String>) -> Result<(), Miss> {
    let unasked = |error: orch_cri::Error| Miss::Unasked(error.to_string());
    let spec = ExecSpec { command, stdout: true, stderr: true, ..ExecSpec::default() };
    let mut session = runtime.exec(&target.container_id, &spec).await.map_err(unasked)?;
    let mut said = Vec::new();
    while let Some(piece) = session.output.next().await {
        let piece = piece.map_err(unasked)?.into_bytes();
        let room = MAX_QUOTE.saturating_sub(said.len());
        said.extend_from_slice(&piece[..piece.len().min(room)]);
    }
    let code = crate::exec::exit_code(runtime, &session.id).await.map_err(unasked)?;
    if code == 0 {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    let said = said.trim();
    if said.is_empty() {
        Err(Miss::Failed(format!("the command ended with {code}")))
    } else {
        Err(Miss::Failed(said.to_owned()))
    }
}

fn port(container: &Container, wanted: &IntOrString) -> Result<u16, String> {
    let number = match wanted {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => match name.parse() {
            Ok(number) => number,
            Err(_) => container
                .ports
                .iter()
                .flatten()
                .find(|port| port.name.as_deref() == Some(name))
                .map(|port| port.container_port)
                .ok_or_else(|| format!("couldn't find port: {name}"))?,
        },
    };
    u16::try_from(number)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| format!("{number} is no port"))
}

fn host(target: &Target, given: Option<&str>) -> Result<String, String> {
    match given.filter(|host| !host.is_empty()) {
        Some(host) => Ok(host.to_owned()),
        None => target
            .ip
            .map(|ip| ip.to_string())
            .ok_or_else(|| "the pod has no address yet".to_owned()),
    }
}

async fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| format!("dial tcp {host}:{port}: {error}"))?;
    // A probe's socket must not linger; many would fill the table of ports.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn http_get(target: &Target, get: &HTTPGetAction, agent: &str) -> Result<(), String> {
    let port = port(&target.container, &get.port)?;
    let host = host(target, get.host.as_deref())?;
    let path = get.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let mut request = http::Request::get(&path);
    let headers = get.http_headers.iter().flatten();
    let mut named = (false, false);
    for header in headers {
        named.0 |= header.name.eq_ignore_ascii_case("host");
        named.1 |= header.name.eq_ignore_ascii_case("user-agent");
        request = request.header(&header.name, &header.value);
    }
    if !named.0 {
        request = request.header(http::header::HOST, format!("{bracketed}:{port}"));
    }
    if !named.1 {
        request = request.header(http::header::USER_AGENT, agent);
    }
    let request = request
        .header(http::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let stream = connect(&host, port).await?;
    let https = get.scheme.as_deref().unwrap_or("HTTP").eq_ignore_ascii_case("HTTPS");
    let scheme = if https { "https" } else { "http" };
    let failed = |error: &dyn std::fmt::Display| {
        format!("Get \"{scheme}://{bracketed}:{port}{path}\": {error}")
    };
    let answer = if https {
        let name = tls::server_name(&host)?;
        let connector = TlsConnector::from(orch_client::unverified_tls());
        let stream = connector.connect(name, stream).await.map_err(|error| failed(&error))?;
        exchange(TokioIo::new(stream), request).await
    } else {
        exchange(TokioIo::new(stream), request).await
    };
    let status = answer.map_err(|error| failed(&error))?;
    // Redirects count as success: following them could leave the pod.
    if (200..400).contains(&status) {
        Ok(())
    } else {
        Err(format!("HTTP probe failed with statuscode: {status}"))
    }
}

async fn exchange<S>(
    io: TokioIo<S>,
    request: http::Request<Empty<Bytes>>,
) -> Result<u16, hyper::Error>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    // Ends with the answer: the connection is asked to close.
    let driver = tokio::spawn(connection);
    let answer = sender.send_request(request).await;
    let status = answer.map(|answer| answer.status().as_u16());
    driver.abort();
    status
}

/// gRPC health checking protocol: `grpc.health.v1.Health/Check` over plain HTTP/2.
async fn grpc_health(host: &str, port: u16, service: &str) -> Result<(), String> {
    let stream = connect(host, port).await?;
    let text = |error: hyper::Error| format!("gRPC health check on {host}:{port}: {error}");
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor, TokioIo::new(stream))
            .await
            .map_err(text)?;
    let driver = tokio::spawn(connection);
    // HealthCheckRequest { string service = 1 }, behind gRPC's prefix: not compressed, length.
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(0x0a);
        message.push(
            u8::try_from(service.len()).map_err(|_| "the service name is too long".to_owned())?,
        );
        message.extend_from_slice(service.as_bytes());
    }
    let mut body = vec![0];
    body.extend_from_slice(&u32::try_from(message.len()).unwrap_or_default().to_be_bytes());
    body.extend_from_slice(&message);
    let request = http::Request::post(format!("http://{host}:{port}/grpc.health.v1.Health/Check"))
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .header(http::header::TE, "trailers")
        .body(http_body_util::Full::new(Bytes::from(body)))
        .map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await.map_err(text)?;
    let code = answer.headers().get("grpc-status").cloned();
    let body = answer.into_body().collect().await.map_err(text)?;
    driver.abort();
    let code =
        code.or_else(|| body.trailers().and_then(|trailers| trailers.get("grpc-status").cloned()));
    let code = code.and_then(|code| code.to_str().ok().map(str::to_owned)).unwrap_or_default();
    if code != "0" {
        return Err(format!("gRPC health check failed with status {code}"));
    }
    // HealthCheckResponse { ServingStatus status = 1 }; SERVING is 1.
    match body.to_bytes().get(5..) {
        Some([0x08, 1, ..]) => Ok(()),
        _ => Err("service unhealthy: it does not say SERVING".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use orch_api::k8s_openapi::api::core::v1::ContainerPort;

    use super::*;

    #[test]
    fn ports_by_number_and_by_name() {
        let http = ContainerPort {
            name: Some("http".to_owned()),
            container_port: 80,
            ..ContainerPort::default()
        };
        let container = Container { ports: Some(vec![http]), ..Container::default() };
        assert_eq!(port(&container, &IntOrString::String("http".to_owned())), Ok(80));
        assert_eq!(port(&container, &IntOrString::Int(8080)), Ok(8080));
        assert_eq!(port(&container, &IntOrString::String("9".to_owned())), Ok(9));
        assert!(port(&container, &IntOrString::String("no".to_owned())).is_err());
        assert!(port(&container, &IntOrString::Int(0)).is_err());
    }
}
