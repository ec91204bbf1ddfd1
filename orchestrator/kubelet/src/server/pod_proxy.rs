//! `/podProxy`: an HTTP request to a port of a pod, for the API server's `proxy` subresource. The path after the port
//! goes on as it was written.

use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio_rustls::TlsConnector;

use crate::server::path::WhichPod;
use crate::server::port_forward::Target;
use crate::server::{Body, text, tls};

/// Marks answers that are the agent's own.
const UNREACHED: &str = "x-orch-unreached";

/// What is asked of which pod.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) pod: WhichPod,
    https: bool,
    port: u16,
    /// Path and query for the pod.
    path: String,
}

impl Wanted {
    /// `/podProxy/NAMESPACE/POD/http|https/PORT/…`; nothing for another path.
    pub(super) fn parse(uri: &http::Uri) -> Option<Self> {
        let mut parts = uri.path().strip_prefix("/podProxy/")?.splitn(5, '/');
        let (namespace, pod) = (parts.next()?, parts.next()?);
        let https = match parts.next()? {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        let port = parts.next()?.parse().ok()?;
        let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        Some(Self {
            pod: WhichPod { namespace: namespace.to_owned(), pod: pod.to_owned(), uid: None },
            https,
            port,
            path: format!("/{}{query}", parts.next().unwrap_or_default()),
        })
    }
}

/// The answer for a pod that was not reached.
pub(super) fn unreached(why: &str) -> Response<Body> {
    let mut answer = text(StatusCode::SERVICE_UNAVAILABLE, why);
    answer.headers_mut().insert(UNREACHED, HeaderValue::from_static("true"));
    answer
}

pub(super) async fn answer(
    request: Request<Incoming>,
    target: &Target,
    wanted: &Wanted,
) -> Response<Body> {
    match exchange(request, target, wanted).await {
        Ok(answer) => answer,
        Err(why) => unreached(&why),
    }
}

async fn exchange(
    mut request: Request<Incoming>,
    target: &Target,
    wanted: &Wanted,
) -> Result<Response<Body>, String> {
    let stream = target.connect(wanted.port).await?;
    let host = target.pod_ips.first().map_or_else(|| "localhost".to_owned(), ToString::to_string);
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    *request.uri_mut() = wanted.path.parse().map_err(|_| "the path is no path".to_owned())?;
    let value = format!("{bracketed}:{}", wanted.port);
    let value = HeaderValue::from_str(&value).map_err(|error| error.to_string())?;
    request.headers_mut().insert(header::HOST, value);
    if wanted.https {
        let name = tls::server_name(&host)?;
        let connector = TlsConnector::from(orch_client::unverified_tls());
        let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
        send(TokioIo::new(stream), request).await
    } else {
        send(TokioIo::new(stream), request).await
    }
}

async fn send<S>(io: TokioIo<S>, request: Request<Incoming>) -> Result<Response<Body>, String>
where
    TokioIo<S>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(io).await.map_err(|error| error.to_string())?;
    // Ends with the answer's body.
    tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
    Ok(answer.map(|body| body.map_err(Into::into).boxed_unsync()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_path_stays_as_it_was_written() {
        let parse = |text: &str| Wanted::parse(&text.parse().expect("a URI"));
        let wanted = parse("/podProxy/shop/web/http/8080/a%2Fb//c?x=%20").expect("a request");
        assert_eq!((wanted.pod.namespace.as_str(), wanted.pod.pod.as_str()), ("shop", "web"));
        assert_eq!((wanted.https, wanted.port), (false, 8080));
        assert_eq!(wanted.path, "/a%2Fb//c?x=%20");
        assert_eq!(parse("/podProxy/shop/web/https/443/").expect("a request").path, "/");
        for other in ["/podProxy/shop/web/ftp/1/", "/podProxy/shop/web/http/x/", "/pods"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
