//! The server: from a connection to a handler, and the way in for components of the same process.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use ipnetwork::{Ipv4Network, Ipv6Network};
use orch_api::ApiError;
use orch_client::{Body, Client, Error as ClientError, Transport, empty_body};
use orch_store::cache::Feed;
use orch_store::{Store, compaction};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::auth::{self, Authenticator, User};
use crate::authz::{self, Attributes, MASTERS, ResourceTarget};
use crate::bootstrap;
use crate::health;
use crate::kubernetes_endpoints;
use crate::proxy::{self, AgentClient};
use crate::request::{self, Query, RequestInfo, Verb};
use crate::resources;
use crate::state::{Shared, roles, start_caches};
use crate::strategy::Part;
use crate::write::Call;
use crate::{
    certificates, discovery, events, impersonate, oidc, read, respond, reviews, subresources, watch,
};

/// Upper bound of a request body, upstream's.
const BODY_LIMIT: usize = 3 * 1024 * 1024;
/// Bytes of a body that are read at most, only to be thrown away.
const DISCARD_LIMIT: usize = 8 * BODY_LIMIT;
/// How much history the store keeps for resuming watches and paged lists.
const HISTORY: Duration = Duration::from_secs(300);
/// How long open requests may go on after the stop.
const DRAIN: Duration = Duration::from_secs(5);
/// A TLS handshake that takes longer is given up.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

const CUSTOM_RESOURCES: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// What the server is made from.
pub struct Options {
    pub store: Arc<dyn Store>,
    pub listen: SocketAddr,
    /// Address under which pods and agents reach this server.
    pub advertise: IpAddr,
    pub tls_cert_pem: String,
    pub tls_key_pem: String,
    /// Signs the certificates of clients and agents.
    pub client_ca_pem: String,
    pub kubelet_client_cert_pem: String,
    pub kubelet_client_key_pem: String,
    /// EC P-256 key, PKCS#8 PEM; signs ServiceAccount tokens.
    pub service_account_key_pem: String,
    pub service_account_issuer: String,
    pub service_cidr: Ipv4Network,
    /// For Services that ask for IPv6.
    pub service_cidr_v6: Option<Ipv6Network>,
    pub node_port_range: RangeInclusive<u16>,
    pub dns_ip: Ipv4Addr,
    /// In `service_cidr_v6`.
    pub dns_ip_v6: Option<Ipv6Addr>,
}

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("listen on {address}; another process has the port, or the address is not this host's")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("TLS: {0}")]
    Tls(String),
    #[error("the server is stopping")]
    Stopping,
}

/// A started API server.
pub struct ApiServer {
    shared: Arc<Shared>,
    listener: TcpListener,
    tls: TlsAcceptor,
    background: JoinSet<()>,
}

impl ApiServer {
    /// Opens the port, starts the caches and makes the cluster's own objects. Requests are answered by [`serve`].
    ///
    /// # Errors
    /// The port is taken or a key is unusable.
    ///
    /// [`serve`]: ApiServer::serve
    pub async fn start(options: Options, stop: CancellationToken) -> Result<Self, Error> {
        let listener = TcpListener::bind(options.listen)
            .await
            .map_err(|source| Error::Listen { address: options.listen, source })?;
        let tls = acceptor(&options)?;
        let public = orch_pki::public_key_pem(&options.service_account_key_pem)
            .map_err(|error| Error::Tls(format!("the key for ServiceAccount tokens: {error}")))?;
        let authenticator = Authenticator::new(
            &options.service_account_issuer,
            &options.service_account_key_pem,
            &public,
        )
        .map_err(|error| Error::Tls(format!("the key for ServiceAccount tokens: {error}")))?;
        let agents = AgentClient::new(
            options.client_ca_pem.clone(),
            options.kubelet_client_cert_pem.clone(),
            options.kubelet_client_key_pem.clone(),
        );
        let store = options.store.clone();
        let feed = Feed::start(store.clone(), "/registry/", stop.clone());
        let stored = start_caches(&feed);
        let shared = Arc::new(Shared {
            store: store.clone(),
            feed,
            roles: roles(&stored),
            has_default_roles: tokio::sync::watch::Sender::new(false),
            stored,
            authenticator,
            agents,
            options,
            allocation: tokio::sync::Mutex::new(()),
            stop: stop.clone(),
        });
        let mut background = JoinSet::new();
        background.spawn(compaction::run(store, HISTORY, stop.clone()));
        let server = Self { shared, listener, tls, background };
        let wanted = bootstrap::Wanted {
            port: server.shared.options.listen.port(),
            kubernetes_ip: Ipv4Addr::from_bits(
                server.shared.options.service_cidr.network().to_bits() + 1,
            ),
            dns_ip: server.shared.options.dns_ip,
            dns_ip_v6: server.shared.options.dns_ip_v6,
        };
        let client = server.client("system:apiserver", &[MASTERS]);
        let (store, endpoint) = (server.shared.store.clone(), server.endpoint());
        if endpoint.is_none() {
            let address = server.shared.options.advertise;
            warn!(%address, "pods cannot reach this address: the Service \"kubernetes\" does not name this server");
        }
        let mut server = server;
        if let Some(cluster_roles) = server.shared.stored(resources::RBAC, "clusterroles") {
            let work = authz::aggregate(client.clone(), cluster_roles.cache.clone());
            let stop = stop.clone();
            server.background.spawn(async move {
                tokio::select! {
                    () = work => {}
                    () = stop.cancelled() => {}
                }
            });
        }
        let shared = server.shared.clone();
        server.background.spawn(async move {
            let has_roles = async || authz::has_default_roles(&shared).await;
            let work = async {
                bootstrap::run(&client, &wanted, has_roles).await;
                if let Some(endpoint) = endpoint {
                    kubernetes_endpoints::run(store, client.clone(), endpoint).await;
                }
            };
            stop.run_until_cancelled(work).await;
        });
        Ok(server)
    }

    /// This server among the endpoints of `default/kubernetes`; `None` when pods cannot reach its address.
    fn endpoint(&self) -> Option<kubernetes_endpoints::Server> {
        let Options { advertise: address, listen, .. } = self.shared.options;
        if address.is_loopback() || address.is_unspecified() {
            return None;
        }
        Some(kubernetes_endpoints::Server { address, port: listen.port() })
    }

    /// A client straight into this server, as a user in groups.
    #[must_use]
    pub fn client(&self, user: &str, groups: &[&str]) -> Client {
        Client::new(InProcess { shared: self.shared.clone(), user: User::new(user, groups) })
    }

    /// The address it listens on.
    ///
    /// # Errors
    /// The socket is closed.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers requests until it is told to stop.
    ///
    /// # Errors
    /// None today; connections that fail are logged.
    pub async fn serve(mut self, stop: CancellationToken) -> Result<(), Error> {
        info!(address = %self.shared.options.listen, "the API server listens");
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
                () = stop.cancelled() => break,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let _ = stream.set_nodelay(true);
                    let connection =
                        connection(self.shared.clone(), self.tls.clone(), stream, stop.clone());
                    connections.spawn(async move {
                        if let Err(error) = connection.await {
                            debug!(%peer, error, "a connection ended badly");
                        }
                    });
                }
                // Out of file descriptors, for example: others are being closed meanwhile.
                Err(error) => {
                    warn!(%error, "accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        if let Some(endpoint) = self.endpoint() {
            kubernetes_endpoints::leave(&*self.shared.store, endpoint).await;
        }
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            warn!("some requests did not end in time");
        }
        self.background.shutdown().await;
        self.shared.feed.ended().await;
        Ok(())
    }
}

fn acceptor(options: &Options) -> Result<TlsAcceptor, Error> {
    let broken = |what: &str, error: &dyn std::fmt::Display| Error::Tls(format!("{what}: {error}"));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(options.client_ca_pem.as_bytes()) {
        let certificate = certificate.map_err(|error| broken("client authority", &error))?;
        roots.add(certificate).map_err(|error| broken("client authority", &error))?;
    }
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        provider.clone(),
    )
    .allow_unauthenticated()
    .build()
    .map_err(|error| broken("client authority", &error))?;
    let chain = CertificateDer::pem_slice_iter(options.tls_cert_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| broken("server certificate", &error))?;
    let key = PrivateKeyDer::from_pem_slice(options.tls_key_pem.as_bytes())
        .map_err(|error| broken("server key", &error))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| broken("versions", &error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| broken("server certificate and key", &error))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn connection(
    shared: Arc<Shared>,
    tls: TlsAcceptor,
    stream: tokio::net::TcpStream,
    stop: CancellationToken,
) -> Result<(), String> {
    let stream = tokio::time::timeout(HANDSHAKE_LIMIT, tls.accept(stream))
        .await
        .map_err(|_| "the TLS handshake took too long".to_owned())?
        .map_err(|error| error.to_string())?;
    let certificate_user = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .and_then(|certificate| auth::user_of_certificate(certificate));
    let service = service_fn(move |request: Request<Incoming>| {
        let (shared, certificate_user) = (shared.clone(), certificate_user.clone());
        async move {
            Ok::<_, std::convert::Infallible>(from_wire(&shared, certificate_user, request).await)
        }
    });
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(60));
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(30))
        .max_concurrent_streams(1000);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        outcome = connection.as_mut() => outcome.map_err(|error| error.to_string()),
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await.map_err(|error| error.to_string())
        }
    }
}

/// A request from the network: authenticate, read the body, handle.
async fn from_wire(
    shared: &Arc<Shared>,
    certificate: Option<User>,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let user = match bearer(request.headers()) {
        Some(token) => match auth::user_of_bearer(shared, token) {
            Some(user) => user,
            None => return respond::error(&ApiError::unauthorized()),
        },
        None => certificate.unwrap_or_else(User::anonymous),
    };
    let user = match impersonate::acting_user(shared, user, request.headers()).await {
        Ok(user) => user,
        Err(error) => return respond::error(&error),
    };
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let (parts, body) = request.into_parts();
    let bytes = match read_body(body).await {
        Ok(bytes) => bytes,
        Err(error) => return respond::error(&error),
    };
    let accepts_gzip = parts
        .headers
        .get(header::ACCEPT_ENCODING)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.contains("gzip"));
    let yaml = respond::prefers_yaml(&parts.headers);
    let head = parts.method == Method::HEAD;
    let mut response = handle(shared, &user, Request::from_parts(parts, bytes), upgrade).await;
    if head {
        // HTTP/2 takes a body here for a broken protocol (RFC 9110 §9.3.2).
        *response.body_mut() = empty_body();
        return response;
    }
    let response = if yaml { respond::in_yaml(response).await } else { response };
    crate::compress::large(response, accepts_gzip).await
}

/// Reads a body. What is beyond the limit is thrown away, so that the client comes to read the answer; a client that
/// does not stop is cut off.
async fn read_body(mut body: Incoming) -> Result<Bytes, ApiError> {
    let mut kept = BytesMut::new();
    let mut size = 0;
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| ApiError::bad_request(format!("the body broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        size += data.len();
        if size <= BODY_LIMIT {
            kept.extend_from_slice(&data);
        } else if size > DISCARD_LIMIT {
            break;
        }
    }
    if size > BODY_LIMIT { Err(ApiError::too_large(BODY_LIMIT)) } else { Ok(kept.freeze()) }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("bearer ")).map(str::trim)
}

/// Answers one request of a known user.
pub(crate) async fn handle(
    shared: &Arc<Shared>,
    user: &User,
    request: Request<Bytes>,
    upgrade: Option<OnUpgrade>,
) -> Response<Body> {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if !reads && upgrade.is_none() && *shared.feed.lost().borrow() {
        let why = "etcd does not answer; nothing was done";
        let mut response = respond::error(&ApiError::service_unavailable(why));
        response.headers_mut().insert(orch_client::NOT_DONE, HeaderValue::from_static("true"));
        return response;
    }
    match route(shared, user, request, upgrade).await {
        Ok(response) => response,
        Err(error) => respond::error(&error),
    }
}

async fn route(
    shared: &Arc<Shared>,
    user: &User,
    request: Request<Bytes>,
    upgrade: Option<OnUpgrade>,
) -> Result<Response<Body>, ApiError> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let query = Query::parse(parts.uri.query());
    if let Some(info) = request::parse(&parts.method, path, &query) {
        permitted(shared, user, &info, &query).await?;
        if info.subresource.is_empty()
            && let Some(review) = resources::find_review(&info.group, &info.resource)
        {
            return if info.verb == Verb::Create {
                reviews::answer(shared, user, review, &info, (&parts.headers, &query, &body)).await
            } else {
                Err(ApiError::method_not_allowed())
            };
        }
        if info.subresource == proxy::http::NAME
            && info.group.is_empty()
            && matches!(info.resource.as_str(), "nodes" | "pods" | "services")
        {
            return proxy::http::forward(shared, &info, &parts, &body).await;
        }
        if (info.group.as_str(), info.resource.as_str()) == (events::GROUP, "events") {
            let new = events::request(&info, &parts.headers, &query, &body)?;
            let answer = resource(
                shared,
                user,
                &new.info,
                &parts.method,
                &new.headers,
                &new.query,
                &new.body,
                None,
            )
            .await?;
            return Ok(events::answer(answer, info.verb == Verb::Watch).await);
        }
        if (info.verb, info.group.as_str(), info.resource.as_str())
            == (Verb::Create, certificates::GROUP, certificates::PLURAL)
            && info.subresource.is_empty()
        {
            let (headers, body) = certificates::request(user, &parts.headers, &query, &body)?;
            return resource(shared, user, &info, &parts.method, &headers, &query, &body, upgrade)
                .await;
        }
        if path != CUSTOM_RESOURCES {
            let headers = &parts.headers;
            return resource(shared, user, &info, &parts.method, headers, &query, &body, upgrade)
                .await;
        }
    }
    let verb = match parts.method {
        Method::GET | Method::HEAD => "get".to_owned(),
        ref other => other.as_str().to_lowercase(),
    };
    authz::require(shared, user, &Attributes::path(&verb, path)).await?;
    if parts.method != Method::GET && parts.method != Method::HEAD {
        return Err(ApiError::method_not_allowed());
    }
    plain(shared, path, &query, &parts.headers).await.ok_or_else(ApiError::no_such_path)
}

/// Refuses what the user may not do with a resource.
async fn permitted(
    shared: &Shared,
    user: &User,
    info: &RequestInfo,
    query: &Query,
) -> Result<(), ApiError> {
    let selected = authz::selected_name(info, query).unwrap_or_default();
    let target = ResourceTarget {
        group: &info.group,
        resource: &info.resource,
        subresource: &info.subresource,
        namespace: &info.namespace,
        name: if info.name.is_empty() { &selected } else { &info.name },
        field_selector: query.get("fieldSelector").unwrap_or_default(),
    };
    authz::require(shared, user, &Attributes::resource(info.verb.as_str(), target)).await?;
    // A stream into a container is no reading, whatever the method of the handshake.
    let streams = matches!(info.subresource.as_str(), "attach" | "exec" | "portforward");
    if streams && info.resource == "pods" && info.verb == Verb::Get {
        authz::require(shared, user, &Attributes::resource("create", target)).await?;
    }
    Ok(())
}

/// Paths that name no resource.
async fn plain(
    shared: &Shared,
    path: &str,
    query: &Query,
    headers: &HeaderMap,
) -> Option<Response<Body>> {
    let trimmed = path.trim_end_matches('/');
    let address = format!("{}:{}", shared.options.advertise, shared.options.listen.port());
    match trimmed {
        "/api" | "/apis" => return Some(discovery::root(trimmed, headers, &address)),
        "/version" => return Some(discovery::version()),
        "/healthz" | "/livez" | "/readyz" => {
            return Some(health::check(shared, trimmed, query.has("verbose")).await);
        }
        check
            if ["/healthz/", "/livez/", "/readyz/"].iter().any(|base| check.starts_with(base)) =>
        {
            return health::one(shared, check).await;
        }
        oidc::CONFIGURATION => return oidc::configuration(shared, &address),
        oidc::KEYS => return oidc::keys(shared),
        "/metrics" => return Some(health::metrics(shared)),
        "" => {
            let paths = [
                oidc::CONFIGURATION,
                "/api",
                "/apis",
                "/healthz",
                "/livez",
                "/metrics",
                "/openapi/v2",
                "/openapi/v3",
                oidc::KEYS,
                "/readyz",
                "/version",
            ];
            return Some(respond::json(StatusCode::OK, &serde_json::json!({ "paths": paths })));
        }
        _ => {}
    }
    if trimmed == CUSTOM_RESOURCES {
        // kubectl looks here before it says that it knows no such kind; there are none.
        let list = serde_json::json!({ "kind": "CustomResourceDefinitionList", "apiVersion": "apiextensions.k8s.io/v1",
                                       "metadata": { "resourceVersion": shared.feed.revision().to_string() }, "items": [] });
        return Some(respond::json(StatusCode::OK, &list));
    }
    if trimmed == "/openapi/v2" {
        return Some(discovery::openapi_v2(headers));
    }
    if trimmed.starts_with("/openapi/v3") {
        return discovery::openapi_v3(trimmed, headers);
    }
    let parts: Vec<&str> = trimmed.split('/').filter(|part| !part.is_empty()).collect();
    match parts.as_slice() {
        ["api", version] => discovery::group_version("", version),
        ["apis", group] => discovery::one_group(group),
        ["apis", group, version] => discovery::group_version(group, version),
        _ => None,
    }
}

#[expect(clippy::too_many_arguments, reason = "a request and what was read from it")]
async fn resource(
    shared: &Arc<Shared>,
    user: &User,
    info: &RequestInfo,
    method: &Method,
    headers: &HeaderMap,
    query: &Query,
    body: &Bytes,
    upgrade: Option<OnUpgrade>,
) -> Result<Response<Body>, ApiError> {
    let resource = resources::find(&info.group, &info.version, &info.resource)
        .ok_or_else(ApiError::no_such_path)?;
    let stored =
        shared.stored(resource.group, resource.plural).ok_or_else(ApiError::no_such_path)?;
    let namespace = if resource.namespaced { info.namespace.as_str() } else { "" };
    let one =
        matches!(info.verb, Verb::Get | Verb::Create | Verb::Update | Verb::Patch | Verb::Delete);
    if resource.namespaced
        && namespace.is_empty()
        && one
        && !(info.verb == Verb::Get && info.name.is_empty())
    {
        return Err(ApiError::method_not_allowed());
    }
    let call = Call { shared, user, stored, namespace, name: &info.name, query, headers, body };
    if !info.subresource.is_empty() {
        return subresource(&call, info, method, upgrade).await;
    }
    match info.verb {
        Verb::Get => {
            read::get(shared, stored, namespace, &info.name, query, respond::negotiate(headers)?)
                .await
        }
        Verb::List => {
            read::list(shared, stored, namespace, query, respond::negotiate(headers)?).await
        }
        Verb::Watch => {
            let form = respond::negotiate_stream(headers)?;
            // A watch of one object is a watch of the collection with its name.
            if info.name.is_empty() {
                watch::watch(shared, stored, namespace, query, form).await
            } else {
                let narrowed = query.with("fieldSelector", &format!("metadata.name={}", info.name));
                watch::watch(shared, stored, namespace, &narrowed, form).await
            }
        }
        Verb::Create if info.name.is_empty() => call.create().await,
        Verb::Create => Err(ApiError::method_not_allowed()),
        Verb::Update if info.name.is_empty() => Err(ApiError::method_not_allowed()),
        Verb::Update => call.update(Part::Main).await,
        Verb::Patch if info.name.is_empty() => Err(ApiError::method_not_allowed()),
        Verb::Patch => call.patch(Part::Main).await,
        Verb::Delete => call.delete().await,
        Verb::DeleteCollection => call.delete_collection().await,
    }
}

async fn subresource(
    call: &Call<'_>,
    info: &RequestInfo,
    method: &Method,
    upgrade: Option<OnUpgrade>,
) -> Result<Response<Body>, ApiError> {
    let resource = call.stored.resource;
    match (info.subresource.as_str(), info.verb) {
        ("status", Verb::Get) if resource.status => {
            read::get(
                call.shared,
                call.stored,
                call.namespace,
                call.name,
                call.query,
                respond::negotiate(call.headers)?,
            )
            .await
        }
        ("status", Verb::Update) if resource.status => call.update(Part::Status).await,
        ("status", Verb::Patch) if resource.status => call.patch(Part::Status).await,
        ("scale", Verb::Get | Verb::Update | Verb::Patch) if resource.scale => {
            subresources::scale(call, method).await
        }
        (name, _) if !resource.subresources.iter().any(|sub| sub.name == name) => {
            Err(ApiError::no_such_path())
        }
        ("approval", Verb::Get) => {
            let form = respond::negotiate(call.headers)?;
            read::get(call.shared, call.stored, call.namespace, call.name, call.query, form).await
        }
        ("approval", Verb::Update) => call.update(Part::Status).await,
        ("approval", Verb::Patch) => call.patch(Part::Status).await,
        ("ephemeralcontainers", Verb::Get) => {
            let form = respond::negotiate(call.headers)?;
            read::get(call.shared, call.stored, call.namespace, call.name, call.query, form).await
        }
        ("ephemeralcontainers", Verb::Update) => call.update(Part::Ephemeral).await,
        ("ephemeralcontainers", Verb::Patch) => call.patch(Part::Ephemeral).await,
        ("binding", Verb::Create) => subresources::bind(call).await,
        ("eviction", Verb::Create) => subresources::evict(call).await,
        ("token", Verb::Create) => subresources::token(call).await,
        ("finalize", Verb::Update) => subresources::finalize(call).await,
        ("log", Verb::Get) => match proxy::unsupported(call.query) {
            Some(error) => Err(error),
            None => proxy::log(call).await,
        },
        ("exec" | "attach" | "portforward", Verb::Get | Verb::Create) => {
            proxy::stream(call, &info.subresource, method, upgrade, call.shared.stop.clone()).await
        }
        _ => Err(ApiError::method_not_allowed()),
    }
}

/// The way in for components of the same process: no TLS, no sockets, the user is given.
struct InProcess {
    shared: Arc<Shared>,
    user: User,
}

#[async_trait]
impl Transport for InProcess {
    async fn send(&self, mut request: Request<Bytes>) -> Result<Response<Body>, ClientError> {
        // As managers of fields they are known by their names: kube-controller-manager, kube-scheduler.
        let name = self.user.name.strip_prefix("system:").unwrap_or(&self.user.name);
        if let Ok(agent) = http::HeaderValue::from_str(name) {
            request.headers_mut().entry(header::USER_AGENT).or_insert(agent);
        }
        Ok(handle(&self.shared, &self.user, request, None).await)
    }
}
