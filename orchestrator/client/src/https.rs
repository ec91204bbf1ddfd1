//! HTTPS to the API server: one of several servers, with a client certificate or a token.
//!
//! The next server is asked when one cannot be reached, and when one says that it cannot serve (503: it lost its etcd, or
//! ends); the one that answered is asked first from then on. A request is carried to another server only where that can do
//! no harm: it was never sent, the server says that it did nothing ([`NOT_DONE`]), or it only reads. A server that vanished
//! without a word is noticed by the kernel ([`SILENCE_LIMIT`]), which breaks its connections, watches among them; one that
//! stands still is noticed by its [`Pulse`].
//!
//! HTTP/1.1 with a pool: a watch has a connection of its own, so a slow one never holds up others, and the same
//! code can upgrade a connection for exec.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

use crate::pulse::{Beat, Pulse, STANDS_STILL, watched};
use crate::{Body, Error, Transport};

const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How long an answer may take to begin, upstream's limit for requests: a process that stands still keeps its connections.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// A peer that acknowledged nothing for this long is gone.
const SILENCE_LIMIT: Duration = Duration::from_secs(6);
/// A connection on which nothing happens is probed after the first number of seconds, and then every second one.
const PROBE_SECS: (u32, u32) = (3, 1);

/// What a server is asked that may stand still, and after how long once more where no answer came.
const HEALTH: &str = "/livez";
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// Header of a 503 by which a server says that it did nothing at all, so that another one may be asked the same.
pub const NOT_DONE: &str = "orch-not-done";
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
    servers: Arc<Mutex<Servers>>,
    pulse: Pulse,
    token: Option<String>,
    pool: legacy::Client<Connector, Full<Bytes>>,
    connector: Connector,
}

/// The servers that are known.
struct Servers {
    /// `host:port` of each.
    all: Vec<Arc<str>>,
    /// The one that answered last; the next request starts there.
    preferred: usize,
}

impl Servers {
    fn parse(urls: &[String]) -> Result<Vec<Arc<str>>, Error> {
        let all = urls
            .iter()
            .map(|url| {
                let authority = url
                    .strip_prefix("https://")
                    .ok_or_else(|| Error::Config(format!("server {url:?} is no https:// URL")))?;
                let authority = authority.trim_end_matches('/');
                Ok(if authority.rsplit(']').next().unwrap_or(authority).contains(':') {
                    authority.into()
                } else {
                    format!("{authority}:443").into()
                })
            })
            .collect::<Result<Vec<Arc<str>>, Error>>()?;
        if all.is_empty() {
            return Err(Error::Config("no server is named".to_owned()));
        }
        Ok(all)
    }

    /// From the preferred one on.
    fn in_order(&self) -> Vec<Arc<str>> {
        let (before, after) = self.all.split_at(self.preferred);
        after.iter().chain(before).cloned().collect()
    }

    fn prefer(&mut self, server: &Arc<str>) {
        if let Some(at) = self.all.iter().position(|known| known == server) {
            self.preferred = at;
        }
    }

    /// Another one first, if this one was.
    fn avoid(&mut self, server: &Arc<str>) {
        if self.all[self.preferred] == *server {
            self.preferred = (self.preferred + 1) % self.all.len();
        }
    }
}

impl Https {
    pub(crate) fn new(config: &ClientConfig) -> Result<Self, Error> {
        let all = Servers::parse(&config.servers)?;
        let connector = Connector { tls: tls(config)? };
        let pool = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .build(connector.clone());
        Ok(Self {
            servers: Arc::new(Mutex::new(Servers { all, preferred: 0 })),
            pulse: Pulse::default(),
            token: config.token.clone(),
            pool,
            connector,
        })
    }

    fn servers(&self) -> MutexGuard<'_, Servers> {
        lock(&self.servers)
    }

    /// What tells that a server stands still, for one who waits for it.
    fn beat(&self, server: &Arc<str>) -> Arc<Beat> {
        let (servers, pool, asked) = (self.servers.clone(), self.pool.clone(), server.clone());
        let ask = move || {
            if lock(&servers).all.len() < 2 {
                return None;
            }
            let uri: http::Uri = format!("https://{asked}{HEALTH}").parse().ok()?;
            let pool = pool.clone();
            Some(async move {
                loop {
                    let mut request = Request::new(Full::new(Bytes::new()));
                    *request.uri_mut() = uri.clone();
                    // Whatever it says, it moves; only that a connection broke or was not accepted is no answer.
                    if let Ok(response) = pool.request(request).await {
                        drop(response.into_body().collect().await);
                        return;
                    }
                    tokio::time::sleep(ASK_AGAIN).await;
                }
            })
        };
        let (servers, avoided) = (self.servers.clone(), server.clone());
        self.pulse.of(server, ask, move || lock(&servers).avoid(&avoided))
    }

    /// URLs of the servers that are known.
    pub(crate) fn known_servers(&self) -> Vec<String> {
        self.servers().all.iter().map(|server| format!("https://{server}")).collect()
    }

    /// Other servers from now on. The one that answered last stays the first to be asked, if it is among them.
    pub(crate) fn set_servers(&self, urls: &[String]) -> Result<(), Error> {
        let all = Servers::parse(urls)?;
        let mut servers = self.servers();
        let last = servers.all[servers.preferred].clone();
        *servers = Servers { all, preferred: 0 };
        servers.prefer(&last);
        Ok(())
    }

    fn prepare<B>(&self, request: &mut Request<B>, server: &str) -> Result<(), Error> {
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        let uri = format!("https://{server}{path}");
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
        let order = self.servers().in_order();
        for server in &order {
            let mut request = Request::new(Full::new(Bytes::new()));
            *request.method_mut() = method.clone();
            *request.uri_mut() =
                path.parse().map_err(|error| Error::Config(format!("path {path}: {error}")))?;
            *request.headers_mut() = headers.clone();
            self.prepare(&mut request, server)?;
            request.headers_mut().insert(
                header::HOST,
                server.parse().map_err(|_| Error::Config("server name".to_owned()))?,
            );
            // An upgrade is for HTTP/1.1, whose requests carry the path only.
            *request.uri_mut() =
                path.parse().map_err(|error| Error::Config(format!("path {path}: {error}")))?;
            let stream = match self.connector.connect(server).await {
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
            |error| Error::transport(unreachable(&order), error),
        ))
    }
}

fn lock(servers: &Mutex<Servers>) -> MutexGuard<'_, Servers> {
    servers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a request is for a stream that may be silent for long.
fn waits(request: &http::request::Parts) -> bool {
    let query = request.uri.query().unwrap_or_default();
    query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1" | "follow=true"))
}

/// A request to one server. A server that did not serve it, or not before the caller's patience ended, is not the first to
/// be asked the next time.
struct Asked<'a> {
    https: &'a Https,
    server: &'a Arc<str>,
    served: bool,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let mut servers = self.https.servers();
        if self.served { servers.prefer(self.server) } else { servers.avoid(self.server) }
    }
}

fn unreachable(servers: &[Arc<str>]) -> String {
    format!("the API server at {} cannot be reached", servers.join(", "))
}

#[async_trait]
impl Transport for Https {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        let (parts, bytes) = request.into_parts();
        let reads = matches!(parts.method, Method::GET | Method::HEAD);
        let order = self.servers().in_order();
        let mut last = None;
        for (left, server) in order.iter().enumerate().map(|(at, one)| (order.len() - 1 - at, one))
        {
            let mut request = Request::from_parts(parts.clone(), Full::new(bytes.clone()));
            self.prepare(&mut request, server)?;
            let mut asked = Asked { https: self, server, served: false };
            let beat = self.beat(server);
            let answer = tokio::select! {
                answer = self.pool.request(request) => answer,
                () = beat.ends() => {
                    // Only what reads may be asked elsewhere: it may go on, and do what it was told.
                    if reads && left > 0 {
                        continue;
                    }
                    return Err(Error::transport(STANDS_STILL, server.as_ref()));
                }
                () = tokio::time::sleep(ANSWER_LIMIT) => {
                    let limit = format!("no answer within {} s", ANSWER_LIMIT.as_secs());
                    return Err(Error::transport(limit, server.as_ref()));
                }
            };
            match answer {
                Ok(response) => {
                    asked.served = response.status() != StatusCode::SERVICE_UNAVAILABLE;
                    let harmless = reads || response.headers().contains_key(NOT_DONE);
                    if !asked.served && harmless && left > 0 {
                        continue;
                    }
                    return Ok(response.map(|body| {
                        let body = body.map_err(Into::into).boxed_unsync();
                        if waits(&parts) { watched(body, beat) } else { body }
                    }));
                }
                Err(error) if error.is_connect() => last = Some(error),
                Err(error) => {
                    if !(reads && left > 0) {
                        let context = "the connection to the API server broke";
                        return Err(Error::transport(context, error));
                    }
                    last = Some(error);
                }
            }
        }
        Err(last.map_or_else(
            || Error::Config("no server is named".to_owned()),
            |error| Error::transport(unreachable(&order), error),
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

/// Makes the kernel break a connection whose peer is gone: one that was cut off sends no word of it.
fn notice_silence(tcp: &TcpStream) -> std::io::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    setsockopt(tcp, sockopt::KeepAlive, &true)?;
    setsockopt(tcp, sockopt::TcpKeepIdle, &PROBE_SECS.0)?;
    setsockopt(tcp, sockopt::TcpKeepInterval, &PROBE_SECS.1)?;
    let limit = u32::try_from(SILENCE_LIMIT.as_millis()).unwrap_or(u32::MAX);
    setsockopt(tcp, sockopt::TcpUserTimeout, &limit)?;
    Ok(())
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
            notice_silence(&tcp)?;
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
