//! `proxy` of pods, Services and nodes: a request goes on to what is behind them, and the answer comes back as it is
//! (Kubernetes, "Access Services Running on Clusters").
//!
//! The server need not be part of the pod network: what a pod answers is fetched by the agent of its node.

use std::net::IpAddr;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use orch_api::ApiError;
use orch_client::{Body, empty_body};
use rand::seq::IndexedRandom as _;
use serde_json::Value;
use tokio::net::TcpStream;

use super::{agent_address, unreachable};
use crate::read;
use crate::request::RequestInfo;
use crate::state::Shared;

/// Name of the subresource.
pub(crate) const NAME: &str = "proxy";
/// An agent's answer with this header is its own: the pod was not reached.
const UNREACHED: &str = "x-orch-unreached";
/// How long an endpoint outside the cluster may take to accept.
const CONNECT_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

/// Headers that are about one connection only (RFC 9110 §7.6.1), or about the client and this server.
const DROPPED: [&str; 12] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "authorization",
    "content-length",
];

/// `[SCHEME:]NAME[:PORT]`.
#[derive(Debug, PartialEq, Eq)]
struct Named<'a> {
    https: bool,
    name: &'a str,
    port: &'a str,
}

impl<'a> Named<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let (scheme, name, port) = match parts.as_slice() {
            [name] => ("", *name, ""),
            [name, port] => ("", *name, *port),
            [scheme, name, port] => (*scheme, *name, *port),
            _ => return None,
        };
        (matches!(scheme, "" | "http" | "https") && !name.is_empty()).then_some(Self {
            https: scheme == "https",
            name,
            port,
        })
    }
}

/// Where a request goes.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    /// To the agent of a node, for itself or for a pod: its address, the node, the start of the path.
    Agent { address: String, node: String, path: String },
    /// To an endpoint that is no pod.
    Direct { https: bool, ip: IpAddr, port: u16 },
}

/// Answers a request for `proxy`.
///
/// # Errors
/// There is nothing behind the name, or it does not answer.
pub(crate) async fn forward(
    shared: &Shared,
    info: &RequestInfo,
    parts: &Parts,
    body: &Bytes,
) -> Result<Response<Body>, ApiError> {
    let rest = rest(parts.uri.path(), if info.resource == "nodes" { 5 } else { 7 });
    let query = parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    if parts.headers.contains_key(header::UPGRADE) {
        return Err(ApiError::bad_request("a proxied connection cannot be upgraded"));
    }
    if rest.is_empty() && parts.method == http::Method::GET && info.resource != "nodes" {
        // Relative links of what answers lead to the right place only below a folder.
        let mut answer = Response::new(empty_body());
        *answer.status_mut() = StatusCode::MOVED_PERMANENTLY;
        let place = format!("{}/{query}", parts.uri.path());
        let place = HeaderValue::from_str(&place).map_err(ApiError::internal)?;
        answer.headers_mut().insert(header::LOCATION, place);
        return Ok(answer);
    }
    let rest = if rest.is_empty() { "/" } else { rest };
    let target = target(shared, info)?;
    let mut request = Request::new(body.clone());
    *request.method_mut() = parts.method.clone();
    *request.headers_mut() = kept(&parts.headers);
    let answer = match &target {
        Target::Agent { address, node, path } => {
            *request.uri_mut() =
                format!("{path}{rest}{query}").parse().map_err(ApiError::internal)?;
            let client = shared.agents.to(address)?;
            client.stream(request).await.map_err(|error| unreachable(node, &error))?
        }
        Target::Direct { https, ip, port } => {
            *request.uri_mut() = format!("{rest}{query}").parse().map_err(ApiError::internal)?;
            direct(request, *https, *ip, *port).await.map_err(|why| not_reached(&why))?
        }
    };
    let (head, body) = answer.into_parts();
    if head.headers.contains_key(UNREACHED) {
        let said = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        return Err(not_reached(&String::from_utf8_lossy(&said)));
    }
    let mut answer = Response::new(body);
    *answer.status_mut() = head.status;
    *answer.headers_mut() = kept(&head.headers);
    let full = parts.uri.path();
    let prefix = full.strip_suffix(rest).unwrap_or(full);
    relocate(answer.headers_mut(), prefix);
    Ok(answer)
}

fn not_reached(why: &str) -> ApiError {
    ApiError::service_unavailable(format!("error trying to reach service: {why}"))
}

/// What follows the first `count` parts of a path, as it was written.
fn rest(path: &str, count: usize) -> &str {
    let mut seen = 0;
    let mut inside = false;
    for (at, byte) in path.bytes().enumerate() {
        if byte == b'/' {
            if seen == count {
                return &path[at..];
            }
            inside = false;
        } else if !inside {
            inside = true;
            seen += 1;
        }
    }
    ""
}

fn kept(headers: &HeaderMap) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for (name, value) in headers {
        let text = name.as_str();
        if !DROPPED.contains(&text) && !text.starts_with("impersonate-") {
            kept.append(name.clone(), value.clone());
        }
    }
    kept
}

/// A redirection within what answers stays below the proxy's path.
fn relocate(headers: &mut HeaderMap, prefix: &str) {
    let place = headers.get(header::LOCATION).and_then(|place| place.to_str().ok());
    let inside = place.filter(|place| place.starts_with('/') && !place.starts_with("//"));
    if let Some(place) =
        inside.and_then(|place| HeaderValue::from_str(&format!("{prefix}{place}")).ok())
    {
        headers.insert(header::LOCATION, place);
    }
}

fn cached(shared: &Shared, plural: &str, namespace: &str, name: &str) -> Result<Value, ApiError> {
    let stored = shared.stored("", plural).ok_or_else(ApiError::no_such_path)?;
    let found = stored.cache.get(&stored.resource.key(namespace, name));
    read::parse(&found.ok_or_else(|| ApiError::not_found("", plural, name))?.bytes)
}

fn target(shared: &Shared, info: &RequestInfo) -> Result<Target, ApiError> {
    let named = Named::parse(&info.name).ok_or_else(|| {
        ApiError::bad_request(format!("invalid {} request {:?}", info.resource, info.name))
    })?;
    match info.resource.as_str() {
        "nodes" => {
            cached(shared, "nodes", "", named.name)?;
            let mut address = agent_address(shared, named.name)?;
            if !named.port.is_empty() {
                let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
                address = format!("{host}:{}", number(named.port)?);
            }
            Ok(Target::Agent { address, node: named.name.to_owned(), path: String::new() })
        }
        "pods" => {
            let pod = cached(shared, "pods", &info.namespace, named.name)?;
            let port = if named.port.is_empty() {
                default_port(&pod, named.https)
            } else {
                number(named.port)?
            };
            pod_target(shared, &pod, named.https, port)
        }
        _ => service_target(shared, &info.namespace, &named),
    }
}

fn number(text: &str) -> Result<u16, ApiError> {
    text.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
        ApiError::bad_request(format!("{text:?} is no port: a number from 1 to 65535 is one"))
    })
}

/// The first port that a container of the pod names.
fn default_port(pod: &Value, https: bool) -> u16 {
    let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
    let ports = containers.filter_map(|container| container["ports"][0]["containerPort"].as_u64());
    let first = ports.filter_map(|port| u16::try_from(port).ok()).next();
    first.unwrap_or(if https { 443 } else { 80 })
}

fn pod_target(shared: &Shared, pod: &Value, https: bool, port: u16) -> Result<Target, ApiError> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (namespace, name) = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
    let node = text(&pod["spec"]["nodeName"]);
    if node.is_empty() {
        let why = format!("pod {name} does not have a host assigned");
        return Err(ApiError::bad_request(why));
    }
    let scheme = if https { "https" } else { "http" };
    Ok(Target::Agent {
        address: agent_address(shared, &node)?,
        node,
        path: format!("/podProxy/{namespace}/{name}/{scheme}/{port}"),
    })
}

fn service_target(shared: &Shared, namespace: &str, named: &Named<'_>) -> Result<Target, ApiError> {
    let service = cached(shared, "services", namespace, named.name)?;
    let port = service_port(&service, named.port).ok_or_else(|| {
        let why = format!("no service port {:?} found for service {:?}", named.port, named.name);
        ApiError::service_unavailable(why)
    })?;
    let endpoints = cached(shared, "endpoints", namespace, named.name).unwrap_or_default();
    let all = ready(&endpoints, port);
    let Some((address, port)) = all.choose(&mut rand::rng()) else {
        let why = format!("no endpoints available for service {:?}", named.name);
        return Err(ApiError::service_unavailable(why));
    };
    let reference = &address["targetRef"];
    if reference["kind"] == "Pod"
        && let Some(name) = reference["name"].as_str()
    {
        let pod = cached(shared, "pods", namespace, name)?;
        return pod_target(shared, &pod, named.https, *port);
    }
    let ip = address["ip"].as_str().and_then(|ip| ip.parse::<IpAddr>().ok());
    // Neither this host's own services nor what only it can reach (upstream's IsProxyableIP).
    let ip = ip.filter(|ip| {
        let link_local = matches!(ip, IpAddr::V4(ip) if ip.is_link_local());
        !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast() && !link_local
    });
    let ip = ip.ok_or_else(|| ApiError::bad_request("address not allowed"))?;
    Ok(Target::Direct { https: named.https, ip, port: *port })
}

/// The Service's port of that name or number; the only one when none is named. Its name is the endpoints' too.
fn service_port<'a>(service: &'a Value, wanted: &str) -> Option<&'a str> {
    fn name(port: &Value) -> &str {
        port["name"].as_str().unwrap_or_default()
    }
    let ports = service["spec"]["ports"].as_array()?;
    if wanted.is_empty() {
        let unnamed = ports.iter().find(|port| name(port).is_empty());
        return match ports.as_slice() {
            [only] => Some(name(only)),
            _ => unnamed.map(name),
        };
    }
    let number = wanted.parse::<u64>().ok();
    let fits = |port: &&Value| {
        name(port) == wanted || (number.is_some() && port["port"].as_u64() == number)
    };
    ports.iter().find(fits).map(name)
}

/// Ready addresses with the number of the port of that name.
fn ready<'a>(endpoints: &'a Value, port: &str) -> Vec<(&'a Value, u16)> {
    let mut all = Vec::new();
    for subset in endpoints["subsets"].as_array().into_iter().flatten() {
        let mut ports = subset["ports"].as_array().into_iter().flatten();
        let found = ports.find(|found| found["name"].as_str().unwrap_or_default() == port);
        let number = found.and_then(|found| u16::try_from(found["port"].as_u64()?).ok());
        let Some(number) = number else { continue };
        all.extend(subset["addresses"].as_array().into_iter().flatten().map(|one| (one, number)));
    }
    all
}

async fn direct(
    mut request: Request<Bytes>,
    https: bool,
    ip: IpAddr,
    port: u16,
) -> Result<Response<Body>, String> {
    let place = std::net::SocketAddr::new(ip, port);
    let host = HeaderValue::from_str(&place.to_string()).map_err(|error| error.to_string())?;
    request.headers_mut().insert(header::HOST, host);
    let connecting = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(place));
    let stream = connecting.await.map_err(|_| format!("{place} does not answer"))?;
    let stream = stream.map_err(|error| format!("connect to {place}: {error}"))?;
    if https {
        let name = rustls::pki_types::ServerName::IpAddress(ip.into());
        let connector = tokio_rustls::TlsConnector::from(orch_client::unverified_tls());
        let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
        exchange(TokioIo::new(stream), request).await
    } else {
        exchange(TokioIo::new(stream), request).await
    }
}

async fn exchange<S>(io: TokioIo<S>, request: Request<Bytes>) -> Result<Response<Body>, String>
where
    TokioIo<S>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(io).await.map_err(|error| error.to_string())?;
    // Ends with the answer's body.
    tokio::spawn(connection);
    let answer = sender.send_request(request.map(Full::new)).await;
    let answer = answer.map_err(|error| error.to_string())?;
    Ok(answer.map(|body| body.map_err(Into::into).boxed_unsync()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_ports_and_the_rest_of_the_path_are_found() {
        assert_eq!(
            Named::parse("https:web:8443"),
            Some(Named { https: true, name: "web", port: "8443" })
        );
        assert_eq!(
            Named::parse("web:http"),
            Some(Named { https: false, name: "web", port: "http" })
        );
        assert_eq!(Named::parse("ftp:web:1"), None);
        assert_eq!(Named::parse("a:b:c:d"), None);
        let base = "/api/v1/namespaces/shop/pods/web/proxy";
        for after in ["", "/", "/a//b%2Fc", "/proxy/"] {
            assert_eq!(rest(&format!("{base}{after}"), 7), after);
        }
    }

    #[test]
    fn a_service_port_is_named_by_name_or_number_and_leads_to_ready_endpoints() {
        let service = json!({ "spec": { "ports": [{ "name": "web", "port": 80 }, { "name": "admin", "port": 81 }] } });
        assert_eq!(service_port(&service, "81"), Some("admin"));
        assert_eq!(service_port(&service, "web"), Some("web"));
        assert_eq!(service_port(&service, ""), None, "which one?");
        assert_eq!(service_port(&json!({ "spec": { "ports": [{ "port": 80 }] } }), ""), Some(""));
        let endpoints = json!({ "subsets": [{ "addresses": [{ "ip": "192.0.2.1" }],
            "notReadyAddresses": [{ "ip": "192.0.2.2" }],
            "ports": [{ "name": "web", "port": 8080 }, { "name": "admin", "port": 8081 }] }] });
        let found = ready(&endpoints, "admin");
        assert_eq!(found, [(&json!({ "ip": "192.0.2.1" }), 8081)]);
        assert_eq!(ready(&endpoints, "other"), []);
    }

    #[test]
    fn redirections_stay_below_the_proxy_and_credentials_stay_here() {
        let mut headers = HeaderMap::new();
        headers.insert("location", HeaderValue::from_static("/login"));
        headers.insert("authorization", HeaderValue::from_static("Bearer x"));
        headers.insert("x-own", HeaderValue::from_static("1"));
        let mut headers = kept(&headers);
        relocate(&mut headers, "/api/v1/namespaces/shop/pods/web/proxy");
        assert_eq!(headers["location"], "/api/v1/namespaces/shop/pods/web/proxy/login");
        assert!(headers.contains_key("x-own") && !headers.contains_key("authorization"));
    }
}
