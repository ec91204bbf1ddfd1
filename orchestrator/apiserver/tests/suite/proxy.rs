//! Logs and exec through the API server to a node's agent.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{Cluster, LIMIT, call, get, merge, post};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use orch_client::Body;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

const PODS: &str = "/api/v1/namespaces/default/pods";

/// An agent that streams the lines it is given as a log, and echoes what it gets on exec.
struct Agent {
    port: u16,
    lines: mpsc::Sender<&'static str>,
}

impl Agent {
    async fn start(cluster: &Cluster) -> Self {
        let loopback = [std::net::Ipv4Addr::LOCALHOST.into()];
        let credentials =
            cluster.pki.agent_credentials("n1", &loopback, &[cluster.url()]).expect("credentials");
        let chain = CertificateDer::pem_slice_iter(credentials.serving_certificate.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(credentials.serving_key.as_bytes()).expect("a key");
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(credentials.ca.as_bytes()) {
            roots.add(certificate.expect("a certificate")).expect("an authority");
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            provider.clone(),
        )
        .build()
        .expect("a verifier");
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .expect("a configuration");
        let tls = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (lines, receiver) = mpsc::channel(8);
        let receiver = Arc::new(tokio::sync::Mutex::new(Some(receiver)));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                let (tls, receiver) = (tls.clone(), receiver.clone());
                tokio::spawn(async move {
                    let stream = tls.accept(stream).await.expect("TLS with a client certificate");
                    let service = service_fn(move |request| answer(request, receiver.clone()));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                        .await;
                });
            }
        });
        Self { port, lines }
    }
}

type Lines = Arc<tokio::sync::Mutex<Option<mpsc::Receiver<&'static str>>>>;

async fn answer(request: Request<Incoming>, lines: Lines) -> Result<Response<Body>, Infallible> {
    let text = |code: StatusCode, text: String| {
        let mut response = Response::new(orch_client::full_body(text.into()));
        *response.status_mut() = code;
        response
    };
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    Ok(match path.as_str() {
        "/containerLogs/default/p/c" if query == "follow=true&tailLines=3" => {
            let lines = lines.lock().await.take().expect("asked once");
            let frames = ReceiverStream::new(lines)
                .map(|line| Ok::<_, Infallible>(Frame::data(Bytes::from_static(line.as_bytes()))));
            let body = StreamBody::new(frames).map_err(|never| match never {});
            Response::new(body.boxed_unsync())
        }
        "/containerLogs/default/p/c" => text(StatusCode::NOT_FOUND, "no such container".to_owned()),
        "/exec/default/p/c" if query == "command=cat&command=%2Fa%20b&stdin=true" => {
            let key = request.headers()["sec-websocket-key"].as_bytes().to_vec();
            let protocol = request.headers()["sec-websocket-protocol"].clone();
            tokio::spawn(async move {
                let upgraded = hyper::upgrade::on(request).await.expect("an upgrade");
                let (mut from, mut to) = tokio::io::split(TokioIo::new(upgraded));
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
            let mut response = text(StatusCode::SWITCHING_PROTOCOLS, String::new());
            let headers = response.headers_mut();
            headers.insert("connection", "Upgrade".parse().expect("a header"));
            headers.insert("upgrade", "websocket".parse().expect("a header"));
            headers.insert("sec-websocket-protocol", protocol);
            let accept = derive_accept_key(&key).parse().expect("a header");
            headers.insert("sec-websocket-accept", accept);
            response
        }
        "/podProxy/default/p/http/8080/a%2Fb" if query == "x=1" => {
            assert!(!request.headers().contains_key("authorization"));
            text(StatusCode::IM_A_TEAPOT, format!("{} tea", request.method()))
        }
        "/podProxy/default/p/http/9/" => {
            let mut response = text(StatusCode::SERVICE_UNAVAILABLE, "nobody listens".to_owned());
            response.headers_mut().insert("x-orch-unreached", "true".parse().expect("a header"));
            response
        }
        other => text(StatusCode::BAD_REQUEST, format!("unexpected {other}?{query}")),
    })
}

async fn pod_on_node(cluster: &Cluster, port: u16) -> orch_client::Client {
    let client = cluster.client();
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    post(&client, accounts, &json!({ "metadata": { "name": "default" } })).await;
    post(&client, "/api/v1/nodes", &json!({ "metadata": { "name": "n1" } })).await;
    let status = json!({ "status": { "addresses": [{ "type": "InternalIP", "address": "127.0.0.1" }],
                                     "daemonEndpoints": { "kubeletEndpoint": { "Port": port } } } });
    merge(&client, "/api/v1/nodes/n1/status", &status).await;
    let pod = json!({ "metadata": { "name": "p" }, "spec": { "nodeName": "n1", "containers": [
                      { "name": "c", "image": "x" }] } });
    assert_eq!(post(&client, PODS, &pod).await.0, 201);
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_streams_line_by_line() {
    let cluster = Cluster::start().await;
    let agent = Agent::start(&cluster).await;
    let client = pod_on_node(&cluster, agent.port).await;
    let path = format!("{PODS}/p/log?follow=true&tailLines=3");
    let request = Request::get(&path).body(Bytes::new()).expect("a request");
    let response = client.stream_ok(request).await.expect("an answer");
    assert_eq!(response.headers()["content-type"], "text/plain");
    let mut lines = Box::pin(orch_client::lines(response.into_body()));
    for text in ["one\n", "two\n"] {
        agent.lines.send(text).await.expect("the stream is open");
        // The next one is sent only after this one has come: nothing waits in between.
        let line = tokio::time::timeout(LIMIT, lines.next()).await.expect("in time");
        assert_eq!(line.expect("a line").expect("no error"), text.trim());
    }
    drop(agent);
    assert!(tokio::time::timeout(LIMIT, lines.next()).await.expect("in time").is_none());
    let (code, status) = get(&client, &format!("{PODS}/p/log")).await;
    assert_eq!((code, &status["reason"]), (404, &json!("NotFound")));
    assert_eq!(get(&client, &format!("{PODS}/p/log?container=other")).await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_joins_both_connections() {
    let cluster = Cluster::start().await;
    let agent = Agent::start(&cluster).await;
    let client = pod_on_node(&cluster, agent.port).await;
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", "v5.channel.k8s.io"),
    ] {
        headers.insert(name, value.parse().expect("a header"));
    }
    let path = format!("{PODS}/p/exec?command=cat&command=%2Fa%20b&stdin=true");
    let session = client.upgrade(Method::GET, &path, headers.clone()).await.expect("an upgrade");
    assert_eq!(session.headers["sec-websocket-protocol"], "v5.channel.k8s.io");
    // RFC 6455 §1.3: the answer to this very key.
    assert_eq!(session.headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| u8::try_from(n % 251).expect("small")).collect();
    let (mut from, mut to) = tokio::io::split(session.io);
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        to.write_all(&sent).await.expect("written");
        to.shutdown().await.expect("closed");
    });
    let mut back = Vec::new();
    tokio::time::timeout(LIMIT, from.read_to_end(&mut back)).await.expect("in time").expect("read");
    writer.await.expect("no panic");
    assert!(back == expected, "{} bytes came back", back.len());

    assert_eq!(get(&client, &path).await.0, 400, "without an upgrade");
    let path = format!("{PODS}/p/exec?stdin=true");
    assert!(client.upgrade(Method::GET, &path, headers).await.is_err(), "no command");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_on_to_pods_and_to_what_is_behind_services() {
    let cluster = Cluster::start().await;
    let agent = Agent::start(&cluster).await;
    let client = pod_on_node(&cluster, agent.port).await;
    let service = json!({ "metadata": { "name": "s" }, "spec": { "ports": [{ "name": "web", "port": 80 }] } });
    assert_eq!(post(&client, "/api/v1/namespaces/default/services", &service).await.0, 201);
    let endpoints = json!({ "metadata": { "name": "s" }, "subsets": [{
        "addresses": [{ "ip": "10.244.1.5", "targetRef": { "kind": "Pod", "name": "p" } }],
        "ports": [{ "name": "web", "port": 8080 }] }] });
    assert_eq!(post(&client, "/api/v1/namespaces/default/endpoints", &endpoints).await.0, 201);
    let services = "/api/v1/namespaces/default/services";
    let send = async |method: &str, path: &str| {
        let request = Request::builder().method(method).uri(path).body(Bytes::new());
        let answer = client.stream(request.expect("a request")).await.expect("an answer");
        let (head, body) = answer.into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        (head.status.as_u16(), head.headers, String::from_utf8_lossy(&body).into_owned())
    };
    for (method, path) in [
        ("GET", format!("{PODS}/p:8080/proxy/a%2Fb?x=1")),
        ("POST", format!("{PODS}/http:p:8080/proxy/a%2Fb?x=1")),
        ("GET", format!("{services}/s/proxy/a%2Fb?x=1")),
        ("PUT", format!("{services}/s:80/proxy/a%2Fb?x=1")),
        ("DELETE", format!("{services}/http:s:web/proxy/a%2Fb?x=1")),
    ] {
        let (code, _, said) = send(method, &path).await;
        assert_eq!((code, said), (418, format!("{method} tea")), "{path}");
    }
    let (code, headers, _) = send("GET", &format!("{PODS}/p:8080/proxy?x=1")).await;
    assert_eq!(code, 301);
    assert_eq!(headers["location"], format!("{PODS}/p:8080/proxy/?x=1"));
    for (path, code, expected) in [
        (format!("{PODS}/p:9/proxy/"), 503, "error trying to reach service: nobody listens"),
        (format!("{services}/s:other/proxy/"), 503, "no service port"),
        (format!("{services}/none/proxy/"), 404, "not found"),
        (format!("{PODS}/ftp:p:1/proxy/"), 400, "invalid pods request"),
    ] {
        let (found, status) = get(&client, &path).await;
        let message = status["message"].as_str().unwrap_or_default();
        assert!(found == code && message.contains(expected), "{path}: {found} {message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_away_is_named() {
    let cluster = Cluster::start().await;
    let port = TcpListener::bind("127.0.0.1:0")
        .await
        .and_then(|listener| listener.local_addr())
        .expect("a port")
        .port();
    let client = pod_on_node(&cluster, port).await;
    let path = format!("{PODS}/p/log");
    let asked = call(&client, "GET", &path, "application/json", "");
    let (code, status) =
        tokio::time::timeout(Duration::from_secs(20), asked).await.expect("an answer in time");
    assert_eq!(code, 503);
    let message = status["message"].as_str().expect("a message");
    assert!(message.contains("\"n1\""), "{message}");
}
