//! HTTPS to the API server: one of several servers, with a client certificate or a token.
//!
//! HTTP/1.1 with a pool: a watch has a connection of its own, so a slow one never holds up others, and the same
//! code can upgrade a connection for exec.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::{Body, Error, Transport};

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const AGENT: &str = concat!("orch/", env!("CARGO_PKG_VERSION"));

/// Where the API server is and who we are.
#[derive(Debug, Clone, Default)]
pub struct ClientConfig {
    /// `https://host:port`, in order of preference.
    pub servers: Vec<String>,
    pub ca_pem: Option<String>,
    pub cert_pem: Option<String>,
    pub key_pem: Option<String>,
    pub token: Option<String>,
}

/// A connection after `101 Switching Protocols`, with the answer's headers.
pub struct Upgraded {
    pub headers: HeaderMap,
    pub io: TokioIo<hyper::upgrade::Upgraded>,
}

pub(crate) struct Https {
    servers: Vec<Server>,
    /// The server that answered last; the next request starts there.
    preferred: AtomicUsize,
    token: Option<String>,
    pool: legacy::Client<Connector, Full<Bytes>>,
    connector: Connector,
}

struct Server {
    authority: String,
}

impl Https {
    pub(crate) fn new(config: &ClientConfig) -> Result<Self, Error> {
        let servers = config
            .servers
            .iter()
            .map(|server| {
                let authority = server.strip_prefix("https://").ok_or_else(|| {
                    Error::Config(format!("server {server:?} is no https:// URL"))
                })?;
                let authority = authority.trim_end_matches('/');
                let authority = if authority.rsplit(']').next().unwrap_or(authority).contains(':') {
                    authority.to_owned()
                } else {
                    format!("{authority}:443")
                };
                Ok(Server { authority })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        if servers.is_empty() {
            return Err(Error::Config("no server is named".to_owned()));
        }
        let connector = Connector { tls: tls(config)? };
        let pool = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .build(connector.clone());
        Ok(Self {
            servers,
            preferred: AtomicUsize::new(0),
            token: config.token.clone(),
            pool,
            connector,
        })
    }

    fn prepare<B>(&self, request: &mut Request<B>, server: &Server) -> Result<(), Error> {
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        let uri = format!("https://{}{path}", server.authority);
        *request.uri_mut() =
            uri.parse().map_err(|error| Error::Config(format!("URL {uri}: {error}")))?;
        // Whoever names no manager for what it writes is known by this.
        let agent = header::HeaderValue::from_static(AGENT);
        request.headers_mut().entry(header::USER_AGENT).or_insert(agent);
        if let Some(token) = &self.token {
            let value = format!("Bearer {token}").parse().map_err(|_| {
                Error::Config("the token has characters that no header can hold".to_owned())
            })?;
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        Ok(())
    }

    /// Upgrades a connection of its own (RFC 9110 §7.8). An answer other than 101 is an error.
    pub(crate) async fn upgrade(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
    ) -> Result<Upgraded, Error> {
        let mut last = None;
        for server in self.in_order() {
            let mut request = Request::new(Full::new(Bytes::new()));
            *request.method_mut() = method.clone();
            *request.uri_mut() =
                path.parse().map_err(|error| Error::Config(format!("path {path}: {error}")))?;
            *request.headers_mut() = headers.clone();
            self.prepare(&mut request, server)?;
            request.headers_mut().insert(
                header::HOST,
                server.authority.parse().map_err(|_| Error::Config("server name".to_owned()))?,
            );
            // An upgrade is for HTTP/1.1, whose requests carry the path only.
            *request.uri_mut() =
                path.parse().map_err(|error| Error::Config(format!("path {path}: {error}")))?;
            let stream = match self.connector.connect(&server.authority).await {
                Ok(stream) => stream,
                Err(error) => {
                    last = Some(error);
                    continue;
                }
            };
            let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
                .await
                .map_err(|error| Error::transport("speak HTTP", error))?;
            // Ends with the upgraded stream.
            tokio::spawn(connection.with_upgrades());
            let response = sender
                .send_request(request)
                .await
                .map_err(|error| Error::transport("send the request", error))?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let code = response.status().as_u16();
                let body = response
                    .into_body()
                    .collect()
                    .await
                    .map_err(|error| Error::transport("read the answer", error))?
                    .to_bytes();
                return Err(Error::from_status(code, &body));
            }
            let headers = response.headers().clone();
            let upgraded = hyper::upgrade::on(response)
                .await
                .map_err(|error| Error::transport("upgrade the connection", error))?;
            return Ok(Upgraded { headers, io: TokioIo::new(upgraded) });
        }
        Err(last.map_or_else(
            || Error::Config("no server is named".to_owned()),
            |error| Error::transport(self.unreachable(), error),
        ))
    }

    fn in_order(&self) -> impl Iterator<Item = &Server> {
        let first = self.preferred.load(Ordering::Relaxed);
        (0..self.servers.len())
            .map(move |offset| &self.servers[(first + offset) % self.servers.len()])
    }

    fn unreachable(&self) -> String {
        let names: Vec<&str> =
            self.servers.iter().map(|server| server.authority.as_str()).collect();
        format!("the API server at {} cannot be reached", names.join(", "))
    }
}

#[async_trait]
impl Transport for Https {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        let (parts, bytes) = request.into_parts();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut last = None;
        for offset in 0..self.servers.len() {
            let index = (first + offset) % self.servers.len();
            let mut request = Request::from_parts(parts.clone(), Full::new(bytes.clone()));
            self.prepare(&mut request, &self.servers[index])?;
            match self.pool.request(request).await {
                Ok(response) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()));
                }
                // Only a connection that was never made may be tried elsewhere: the request was not carried out.
                Err(error) if error.is_connect() => last = Some(error),
                Err(error) => {
                    return Err(Error::transport("the connection to the API server broke", error));
                }
            }
        }
        Err(last.map_or_else(
            || Error::Config("no server is named".to_owned()),
            |error| Error::transport(self.unreachable(), error),
        ))
    }
}

fn tls(config: &ClientConfig) -> Result<Arc<rustls::ClientConfig>, Error> {
    let broken = |what: &str, error: &dyn std::fmt::Display| {
        Error::Config(format!("{what} is no PEM: {error}"))
    };
    let mut roots = RootCertStore::empty();
    let ca = config
        .ca_pem
        .as_deref()
        .ok_or_else(|| Error::Config("no certificate authority is named".to_owned()))?;
    for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        let certificate =
            certificate.map_err(|error| broken("the certificate authority", &error))?;
        roots.add(certificate).map_err(|error| broken("the certificate authority", &error))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::Config(format!("TLS: {error}")))?
        .with_root_certificates(roots);
    let tls = match (&config.cert_pem, &config.key_pem) {
        (Some(certificate), Some(key)) => {
            let chain = CertificateDer::pem_slice_iter(certificate.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| broken("the client certificate", &error))?;
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
                .map_err(|error| broken("the client key", &error))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| Error::Config(format!("client certificate and key: {error}")))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(Arc::new(tls))
}

#[derive(Clone)]
struct Connector {
    tls: Arc<rustls::ClientConfig>,
}

impl Connector {
    async fn connect(&self, authority: &str) -> std::io::Result<Stream> {
        let work = async {
            let tcp = TcpStream::connect(authority).await?;
            tcp.set_nodelay(true)?;
            let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
            let host = host.trim_start_matches('[').trim_end_matches(']');
            let name = ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
            Ok(Stream(TokioIo::new(TlsConnector::from(self.tls.clone()).connect(name, tcp).await?)))
        };
        tokio::time::timeout(CONNECT_LIMIT, work).await.unwrap_or_else(|_| {
            Err(std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                format!("no answer within {} s", CONNECT_LIMIT.as_secs()),
            ))
        })
    }
}

impl tower::Service<http::Uri> for Connector {
    type Response = Stream;
    type Error = std::io::Error;
    type Future = futures::future::BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: http::Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let authority =
                uri.authority().map(|authority| authority.as_str().to_owned()).unwrap_or_default();
            connector.connect(&authority).await
        })
    }
}

/// A TLS connection, in hyper's terms.
struct Stream(TokioIo<TlsStream<TcpStream>>);

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
