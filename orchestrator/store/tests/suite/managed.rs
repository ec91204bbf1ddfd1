//! The supervised etcd.

use std::time::Duration;

use crate::support::{Etcd, within};
use orch_store::managed::{self, Options};
use orch_store::{EtcdConfig, EtcdStore, Store};
use tokio_util::sync::CancellationToken;

const GRACE: Duration = Duration::from_secs(5);

async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(crate::support::LIMIT, wait).await.is_ok(), "not in time: {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_dies_is_started_again_with_its_data() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    store.create("/a", "1".into(), None).await.expect("create");
    let first = etcd.pid().expect("it runs");
    etcd.kill();
    until("a new process", || etcd.pid().is_some_and(|pid| pid != first)).await;
    assert!(store.get("/a").await.expect("get").0.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_outlives_its_supervisor_and_is_adopted_by_the_next() {
    let mut etcd = Etcd::start().await;
    let pid = etcd.pid().expect("it runs");
    etcd.cancel.cancel();
    within(etcd.supervisor.take().expect("supervisor").ended()).await;
    assert_eq!(etcd.pid(), Some(pid), "it goes on");

    etcd.cancel = CancellationToken::new();
    etcd.supervisor =
        Some(managed::spawn(etcd.options.clone(), etcd.cancel.clone()).await.expect("adopt"));
    assert_eq!(etcd.pid(), Some(pid), "the same one");
    etcd.kill();
    until("a new process", || etcd.pid().is_some_and(|new| new != pid)).await;
    etcd.store().await.revision().await.expect("it answers");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_ends_with_its_supervisor_if_told_so() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let options = Options {
        data_dir: dir.path().join("data"),
        log_file: dir.path().join("etcd.log"),
        client_urls: vec!["unix://client:0".to_owned()],
        tls: None,
        membership: None,
        keep_running_on_exit: false,
    };
    let cancel = CancellationToken::new();
    let supervisor = managed::spawn(options.clone(), cancel.clone()).await.expect("spawn");
    assert!(managed::pid(&options.data_dir).is_some());
    cancel.cancel();
    within(supervisor.ended()).await;
    assert_eq!(managed::pid(&options.data_dir), None);
    managed::stop(&options.data_dir, GRACE).expect("stop of a stopped one is fine");
}

#[test]
fn a_missing_program_names_the_package() {
    assert!(managed::Error::Missing.to_string().contains("etcd-server"));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_only_clients_with_a_certificate_get_in() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let pki = Pki::new();
    let path = |name: &str, pem: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, pem).expect("write PEM");
        path
    };
    let (server_cert, server_key) = pki.issue("etcd", rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|s| s.local_addr())
        .expect("free port")
        .port();
    let options = Options {
        data_dir: dir.path().join("data"),
        log_file: dir.path().join("etcd.log"),
        client_urls: vec![format!("https://127.0.0.1:{port}")],
        tls: Some(managed::Tls {
            cert: path("server.crt", &server_cert),
            key: path("server.key", &server_key),
            client_ca: path("ca.crt", &pki.ca_pem),
        }),
        membership: None,
        keep_running_on_exit: false,
    };
    let cancel = CancellationToken::new();
    let supervisor = managed::spawn(options.clone(), cancel.clone()).await.expect("spawn");

    let (cert, key) = pki.issue("client", rcgen::ExtendedKeyUsagePurpose::ClientAuth);
    let config = EtcdConfig {
        endpoints: options.client_urls.clone(),
        ca_pem: Some(pki.ca_pem.clone()),
        cert_pem: Some(cert),
        key_pem: Some(key),
    };
    let store = EtcdStore::connect(config.clone()).await.expect("connect");
    store.create("/a", "1".into(), None).await.expect("our certificate is good");
    let nobody = EtcdConfig { cert_pem: None, key_pem: None, ..config };
    let store = EtcdStore::connect(nobody).await.expect("connects lazily");
    within(store.healthy()).await.expect_err("without a certificate");
    cancel.cancel();
    within(supervisor.ended()).await;
}

struct Pki {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    ca_pem: String,
}

impl Pki {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().expect("key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_pem = params.self_signed(&key).expect("CA").pem();
        Self { issuer: rcgen::Issuer::new(params, key), ca_pem }
    }

    fn issue(&self, name: &str, purpose: rcgen::ExtendedKeyUsagePurpose) -> (String, String) {
        let key = rcgen::KeyPair::generate().expect("key");
        let mut params =
            rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("parameters");
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.extended_key_usages = vec![purpose];
        (params.signed_by(&key, &self.issuer).expect("certificate").pem(), key.serialize_pem())
    }
}
