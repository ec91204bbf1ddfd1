//! The kubelet's HTTPS API: logs, exec, attach, port-forward and requests to pods, for the API server alone.
//!
//! [`tls`] authenticates the caller by certificate, this module authorises and routes, [`logs`], [`stream`] and
//! [`port_forward`] answer, the latter two over [`websocket`] or [`spdy`].

mod logs;
mod path;
mod pod_proxy;
mod port_forward;
mod spdy;
pub(crate) mod stream;
pub(crate) mod tls;
pub(crate) mod websocket;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use orch_api::k8s_openapi::api::core::v1::Pod;
use orch_cri::{Container, State};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::Error;
use crate::api;
use crate::context::Context;
use crate::labels;
use crate::server::path::Route;
use crate::server::tls::Caller;
use crate::source::Pods;

/// Body of an answer; logs stream.
pub(crate) type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// A client that does not finish its TLS handshake by then is dropped.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// After a failed accept (out of file descriptors) a tight loop would help nobody.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

pub(crate) struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    shared: Arc<Shared>,
}

struct Shared {
    cx: Arc<Context>,
    pods: watch::Receiver<Pods>,
}

impl Server {
    /// # Errors
    /// The port is taken or the certificates are unusable.
    pub(crate) async fn bind(cx: Arc<Context>, pods: watch::Receiver<Pods>) -> Result<Self, Error> {
        let options = &cx.options;
        let config = tls::server_config(
            &options.serving_cert_pem,
            &options.serving_key_pem,
            &options.client_ca_pem,
        )
        .map_err(Error::Certificate)?;
        let address = SocketAddr::new(options.node_ip, options.listen_port);
        let listener =
            TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
        let acceptor = TlsAcceptor::from(config);
        Ok(Self { listener, acceptor, shared: Arc::new(Shared { cx, pods }) })
    }

    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let (acceptor, shared) = (self.acceptor.clone(), self.shared.clone());
                        connections.spawn(serve(acceptor, stream, shared));
                    }
                    Err(error) => {
                        debug!(%error, "accept");
                        tokio::time::sleep(ACCEPT_RETRY).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }
}

async fn serve(acceptor: TlsAcceptor, stream: tokio::net::TcpStream, shared: Arc<Shared>) {
    // Interactive bytes must not wait for more.
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await
    else {
        return;
    };
    let caller = tls::caller(stream.get_ref().1.peer_certificates());
    let service = service_fn(move |request| {
        let (shared, caller) = (shared.clone(), caller.clone());
        async move { Ok::<_, Infallible>(answer(&shared, &caller, request).await) }
    });
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    if let Err(error) = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await
    {
        debug!(%error, "connection ended");
    }
}

async fn answer(shared: &Shared, caller: &Caller, request: Request<Incoming>) -> Response<Body> {
    match caller {
        Caller::Allowed => {}
        Caller::Unknown => return text(StatusCode::UNAUTHORIZED, "Unauthorized"),
        Caller::Forbidden(user) => {
            return text(
                StatusCode::FORBIDDEN,
                &format!("Forbidden (user={user}, resource=nodes, subresource=proxy)"),
            );
        }
    }
    if let Some(wanted) = pod_proxy::Wanted::parse(request.uri()) {
        return match find_target(shared, &wanted.pod).await {
            Ok(target) => pod_proxy::answer(request, &target, &wanted).await,
            Err((_, message)) => pod_proxy::unreached(&message),
        };
    }
    let route = match path::parse(request.uri().path(), request.uri().query().unwrap_or_default()) {
        Ok(route) => route,
        Err((code, message)) => return text(code, &message),
    };
    match route {
        Route::Healthz => text(StatusCode::OK, "ok"),
        Route::Metrics => metrics(shared).await,
        Route::Pods => pods(shared),
        Route::Logs(which, query) if request.method() == Method::GET => {
            match find(shared, &which, query.previous).await {
                Ok(container) => logs::answer(&shared.cx, &container, &query).await,
                Err((code, message)) => text(code, &message),
            }
        }
        Route::Exec(which, streams) => match find(shared, &which, false).await {
            Ok(container) if !container.is_running() => not_running(&which.container),
            Ok(container) => {
                stream::answer(&shared.cx, request, stream::Session::Exec(container.id, streams))
            }
            Err((code, message)) => text(code, &message),
        },
        Route::Attach(which, streams) => match find(shared, &which, false).await {
            Ok(container) if !container.is_running() => not_running(&which.container),
            Ok(container) => {
                let tty = container.tty;
                stream::answer(
                    &shared.cx,
                    request,
                    stream::Session::Attach(container.id, streams, tty),
                )
            }
            Err((code, message)) => text(code, &message),
        },
        Route::PortForward(which) => match find_target(shared, &which).await {
            Ok(target) => port_forward::answer(request, target),
            Err((code, message)) => text(code, &message),
        },
        Route::Logs(..) => text(StatusCode::METHOD_NOT_ALLOWED, "only GET"),
    }
}

fn not_running(name: &str) -> Response<Body> {
    text(StatusCode::BAD_REQUEST, &format!("container {name} is not running"))
}

type Refusal = (StatusCode, String);

fn find_pod(shared: &Shared, which: &path::WhichPod) -> Result<Arc<Pod>, Refusal> {
    let pod = shared.pods.borrow().as_ref().and_then(|pods| {
        pods.values()
            .find(|pod| {
                pod.metadata.namespace.as_deref() == Some(&which.namespace)
                    && pod.metadata.name.as_deref() == Some(&which.pod)
                    && which
                        .uid
                        .as_deref()
                        .is_none_or(|uid| pod.metadata.uid.as_deref() == Some(uid))
            })
            .cloned()
    });
    pod.ok_or_else(|| {
        let message = format!("pod \"{}/{}\" not found on this node", which.namespace, which.pod);
        (StatusCode::NOT_FOUND, message)
    })
}

/// The engine's containers with these labels, the newest first.
async fn newest(shared: &Shared, wanted: &[(&str, &str)]) -> Result<Vec<Container>, Refusal> {
    let mut found = shared.cx.runtime().list(wanted).await.map_err(|error| {
        let code = if error.is_unavailable() {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::INTERNAL_SERVER_ERROR
        };
        (code, error.to_string())
    })?;
    found.sort_by_key(|container| {
        std::cmp::Reverse((
            container.label(labels::ATTEMPT).parse::<u32>().unwrap_or_default(),
            container.created_nanos,
        ))
    });
    Ok(found)
}

/// Where the ports of a pod are.
async fn find_target(
    shared: &Shared,
    which: &path::WhichPod,
) -> Result<port_forward::Target, Refusal> {
    let pod = find_pod(shared, which)?;
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    let wanted = [(labels::POD_UID, uid.as_str()), (labels::CONTAINER, labels::SANDBOX)];
    let sandbox = newest(shared, &wanted).await?.into_iter().find(Container::is_running);
    let sandbox = sandbox
        .ok_or_else(|| (StatusCode::BAD_REQUEST, format!("pod {} is not running", which.pod)))?;
    let status = pod.status.as_ref();
    let pod_ips = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    let host_network = api::is_host_network(&pod);
    Ok(port_forward::Target {
        pod: format!("{}/{}", which.namespace, which.pod),
        netns: (!host_network).then(|| shared.cx.network.netns_path(&sandbox.id)),
        pod_ips: pod_ips.iter().filter_map(|ip| ip.ip.parse().ok()).collect(),
    })
}

/// The newest container of that name in the pod, or the one before it.
async fn find(shared: &Shared, which: &path::Which, previous: bool) -> Result<Container, Refusal> {
    let pod = find_pod(shared, &which.pod)?;
    if api::find_container(&pod, &which.container).is_none() {
        let message =
            format!("container {} is not valid for pod {}", which.container, which.pod.pod);
        return Err((StatusCode::BAD_REQUEST, message));
    }
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    let wanted = [(labels::POD_UID, uid.as_str()), (labels::CONTAINER, which.container.as_str())];
    let mut found = newest(shared, &wanted).await?;
    // What was created is not started yet, so it has no words and no process.
    found.retain(|container| container.state != State::Created);
    // A container that waits for its restart has its last words in `lastState` already.
    let waits = api::container_status(&pod, &which.container)
        .and_then(|status| status.state.as_ref())
        .is_some_and(|state| state.waiting.is_some());
    let newest_is_over = found.first().is_some_and(|newest| !newest.is_running());
    let at = usize::from(previous && !(waits && newest_is_over));
    match found.into_iter().nth(at) {
        Some(container) => Ok(container),
        None if previous => Err((
            StatusCode::BAD_REQUEST,
            format!(
                "previous terminated container \"{}\" in pod \"{}\" not found",
                which.container, which.pod.pod
            ),
        )),
        None => Err((
            StatusCode::BAD_REQUEST,
            format!(
                "container \"{}\" in pod \"{}\" is waiting to start: {}",
                which.container,
                which.pod.pod,
                waiting_reason(&pod, &which.container)
            ),
        )),
    }
}

fn waiting_reason(pod: &Pod, container: &str) -> String {
    let state = api::container_status(pod, container).and_then(|status| status.state.as_ref());
    let waiting = state.and_then(|state| state.waiting.as_ref());
    match waiting.and_then(|waiting| waiting.reason.clone()) {
        // The two phrasings tell whether the user has to do something.
        Some(reason) if reason == "ContainerCreating" || reason == "PodInitializing" => reason,
        Some(reason) => {
            format!(
                "{reason}: {}",
                waiting.and_then(|waiting| waiting.message.clone()).unwrap_or_default()
            )
        }
        None => "ContainerCreating".to_owned(),
    }
}

fn pods(shared: &Shared) -> Response<Body> {
    let items: Vec<_> =
        shared.pods.borrow().iter().flat_map(|pods| pods.values().cloned()).collect();
    let list = json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items });
    let mut answer = text(StatusCode::OK, &list.to_string());
    answer
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    answer
}

/// Names that people have dashboards for (kubelet's).
async fn metrics(shared: &Shared) -> Response<Body> {
    let found = shared.cx.runtime().list(&[]).await.unwrap_or_default();
    let count = |sandbox: bool, running: bool| {
        let fits = |container: &&Container| {
            (container.label(labels::CONTAINER) == labels::SANDBOX) == sandbox
                && container.is_running() == running
        };
        found.iter().filter(fits).count()
    };
    let pods = shared.pods.borrow().as_ref().map_or(0, |pods| pods.len());
    let body = format!(
        "# HELP kubelet_running_pods Pods whose sandbox runs.\n# TYPE kubelet_running_pods gauge\nkubelet_running_pods {}\n\
         # HELP kubelet_running_containers Containers by state, sandboxes left out.\n# TYPE kubelet_running_containers gauge\n\
         kubelet_running_containers{{container_state=\"running\"}} {}\nkubelet_running_containers{{container_state=\"exited\"}} {}\n\
         # HELP kubelet_desired_pods Pods the API server gives this node.\n# TYPE kubelet_desired_pods gauge\nkubelet_desired_pods {pods}\n",
        count(true, true),
        count(false, true),
        count(false, false),
    );
    let more = shared.cx.options.more_metrics.map(|render| render()).unwrap_or_default();
    text(StatusCode::OK, &(body + &more))
}

pub(crate) fn text(code: StatusCode, message: &str) -> Response<Body> {
    let body =
        Full::new(Bytes::from(message.to_owned())).map_err(|never| match never {}).boxed_unsync();
    let mut answer = Response::new(body);
    *answer.status_mut() = code;
    answer.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    answer
}
