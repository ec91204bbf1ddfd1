//! HTTP/2, which Go's clients choose.

use std::sync::Arc;

use crate::support::Cluster;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_share_one_connection_and_head_has_no_body() {
    let cluster = Cluster::start().await;
    let mut roots = rustls::RootCertStore::empty();
    let ca = cluster.pki.read("ca.crt").expect("ca.crt");
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).expect("PEM")).expect("an authority");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(("127.0.0.1", cluster.port)).await.expect("a connection");
    let name = ServerName::try_from("127.0.0.1").expect("a name");
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await;
    let tls = tls.expect("TLS");
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls))
            .await
            .expect("HTTP/2");
    tokio::spawn(connection);
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..50 {
        let mut sender = sender.clone();
        let (method, expected) =
            if index % 2 == 0 { (Method::HEAD, "") } else { (Method::GET, "ok") };
        let url = format!("https://127.0.0.1:{}/livez", cluster.port);
        tasks.spawn(async move {
            let request = Request::builder()
                .method(method)
                .uri(url)
                .body(Empty::<Bytes>::new())
                .expect("a request");
            let response = sender.send_request(request).await.expect("an answer");
            assert_eq!(response.status(), 200);
            let body = response.into_body().collect().await.expect("a whole body").to_bytes();
            assert_eq!(body, expected);
        });
    }
    tasks.join_all().await;
}
