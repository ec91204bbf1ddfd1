//! A real API server over a real etcd, on loopback, with certificates of its own.
#![allow(unreachable_pub, reason = "for this test program alone")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use http_body_util::BodyExt as _;
use orch_apiserver::{ApiServer, Options};
use orch_client::{Client, ClientConfig};
use orch_pki::ClusterPki;
use orch_store::managed::{self, Managed};
use orch_store::{EtcdConfig, EtcdStore, Store as _};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(30);
const GRACE: Duration = Duration::from_secs(5);

/// etcd and a server; gone when dropped.
pub struct Cluster {
    /// Gone with all that is in it when dropped.
    _dir: TempDir,
    pub pki: ClusterPki,
    pub port: u16,
    etcd: managed::Options,
    etcd_cancel: CancellationToken,
    supervisor: Option<Managed>,
    server: Option<(CancellationToken, JoinHandle<()>)>,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("free port")
        .port()
}

impl Cluster {
    /// Starts both on free ports.
    pub async fn start() -> Self {
        Self::start_on(free_port()).await
    }

    /// Starts both, the server on a given port.
    pub async fn start_on(port: u16) -> Self {
        let dir = tempfile::tempdir().expect("temporary folder");
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let pki =
            ClusterPki::ensure(&dir.path().join("pki"), &[loopback], &["localhost".to_owned()])
                .expect("certificates");
        let etcd = managed::Options {
            data_dir: dir.path().join("etcd"),
            log_file: dir.path().join("log/etcd.log"),
            client_urls: vec![format!("http://127.0.0.1:{}", free_port())],
            tls: None,
            membership: None,
            keep_running_on_exit: true,
        };
        let etcd_cancel = CancellationToken::new();
        let supervisor =
            managed::spawn(etcd.clone(), etcd_cancel.clone()).await.expect("etcd starts");
        let mut cluster = Self {
            _dir: dir,
            pki,
            port,
            etcd,
            etcd_cancel,
            supervisor: Some(supervisor),
            server: None,
        };
        cluster.start_server().await;
        cluster.wait_ready().await;
        cluster
    }

    async fn options(&self) -> Options {
        let store = self.store().await;
        let read = |name: &str| self.pki.read(name).expect("a file of the PKI");
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Options {
            store: Arc::new(store),
            listen: SocketAddr::new(loopback, self.port),
            // Endpoints may not be on loopback; nobody connects to this one (RFC 5737).
            advertise: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            tls_cert_pem: read("apiserver.crt"),
            tls_key_pem: read("apiserver.key"),
            client_ca_pem: read("ca.crt"),
            kubelet_client_cert_pem: read("apiserver-kubelet-client.crt"),
            kubelet_client_key_pem: read("apiserver-kubelet-client.key"),
            service_account_key_pem: read("sa.key"),
            service_account_issuer: "https://kubernetes.default.svc.cluster.local".to_owned(),
            service_cidr: "10.96.0.0/12".parse().expect("a network"),
            service_cidr_v6: "fd00:10:96::/112".parse().ok(),
            node_port_range: 30000..=32767,
            dns_ip: Ipv4Addr::new(10, 96, 0, 10),
            dns_ip_v6: "fd00:10:96::a".parse().ok(),
        }
    }

    /// Starts the server again after [`stop_server`](Self::stop_server).
    pub async fn start_server(&mut self) {
        self.server = Some(serve(self.options().await).await);
    }

    /// A further server on the same etcd; `change` makes it differ. Others reach it at `192.0.2.number`.
    pub async fn peer(&self, number: u8, change: impl FnOnce(&mut Options)) -> Peer {
        let mut options = self.options().await;
        let port = free_port();
        options.listen.set_port(port);
        options.advertise = IpAddr::V4(Ipv4Addr::new(192, 0, 2, number));
        change(&mut options);
        let (stop, task) = serve(options).await;
        let url = format!("https://127.0.0.1:{port}");
        let client = self.client_at(vec![url.clone()]);
        eventually("the peer is ready", async || client.get_text("/readyz").await.is_ok()).await;
        Peer { url, client, stop, task }
    }

    /// A client over HTTPS at these servers, as the administrator.
    pub fn client_at(&self, servers: Vec<String>) -> Client {
        let client = Client::from_kubeconfig(&self.kubeconfig()).expect("a client");
        client.set_servers(&servers).expect("URLs");
        client
    }

    /// Stops the server as SIGTERM does.
    pub async fn stop_server(&mut self) {
        if let Some((stop, task)) = self.server.take() {
            stop.cancel();
            tokio::time::timeout(LIMIT, task).await.expect("the server ends").expect("no panic");
        }
    }

    pub async fn wait_ready(&self) {
        let client = self.client();
        eventually("the server is ready", async || client.get_text("/readyz").await.is_ok()).await;
        let path = "/api/v1/namespaces/default/endpoints/kubernetes";
        eventually("its own objects are there", async || client.get_text(path).await.is_ok()).await;
    }

    /// A client over HTTPS, as the administrator. Has a connection of its own.
    pub fn client(&self) -> Client {
        Client::from_kubeconfig(&self.kubeconfig()).expect("a client")
    }

    /// A client without certificate.
    pub fn client_with_token(&self, token: Option<&str>) -> Client {
        Client::https(&ClientConfig {
            servers: vec![self.url()],
            ca_pem: Some(self.pki.read("ca.crt").expect("ca.crt")),
            cert_pem: None,
            key_pem: None,
            token: token.map(str::to_owned),
        })
        .expect("a client")
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.pki.ensure_admin_kubeconfig(&self.url()).expect("kubeconfig")
    }

    /// Forgets all history of etcd.
    pub async fn compact(&self) {
        let store = self.store().await;
        let now = store.revision().await.expect("etcd answers");
        store.compact(now).await.expect("compaction");
    }

    pub async fn store(&self) -> EtcdStore {
        EtcdStore::connect(EtcdConfig {
            endpoints: self.etcd.client_urls.clone(),
            ..EtcdConfig::default()
        })
        .await
        .expect("store")
    }

    fn etcd_signal(&self, signal: nix::sys::signal::Signal) {
        let pid = managed::pid(&self.etcd.data_dir).expect("etcd runs");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a PID"));
        nix::sys::signal::kill(pid, signal).expect("signal etcd");
    }

    /// SIGKILL; the supervisor starts it again at once.
    pub fn kill_etcd(&self) {
        self.etcd_signal(nix::sys::signal::Signal::SIGKILL);
    }

    /// etcd hangs without ending, until thawed.
    pub fn freeze_etcd(&self) {
        self.etcd_signal(nix::sys::signal::Signal::SIGSTOP);
    }

    pub fn thaw_etcd(&self) {
        self.etcd_signal(nix::sys::signal::Signal::SIGCONT);
    }

    /// Ends etcd, and it stays away until [`start_etcd`](Self::start_etcd).
    pub async fn stop_etcd(&mut self) {
        self.etcd_cancel.cancel();
        if let Some(supervisor) = self.supervisor.take() {
            supervisor.ended().await;
        }
        managed::stop(&self.etcd.data_dir, GRACE).expect("stop etcd");
    }

    pub async fn start_etcd(&mut self) {
        self.etcd_cancel = CancellationToken::new();
        let supervisor = managed::spawn(self.etcd.clone(), self.etcd_cancel.clone()).await;
        self.supervisor = Some(supervisor.expect("etcd starts"));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some((stop, _)) = &self.server {
            stop.cancel();
        }
        self.etcd_cancel.cancel();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.etcd.log_file).unwrap_or_default();
            eprintln!("etcd's log:\n{log}");
        }
        managed::stop(&self.etcd.data_dir, GRACE).expect("stop etcd");
    }
}

async fn serve(options: Options) -> (CancellationToken, JoinHandle<()>) {
    let stop = CancellationToken::new();
    let server = ApiServer::start(options, stop.clone()).await.expect("the server starts");
    let token = stop.clone();
    let task = tokio::spawn(async move { server.serve(token).await.expect("the server serves") });
    (stop, task)
}

/// A further server.
pub struct Peer {
    pub url: String,
    pub client: Client,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Peer {
    /// Ends it as SIGTERM does.
    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(LIMIT, self.task).await.expect("the server ends").expect("no panic");
    }

    /// Ends it as SIGKILL does: it says goodbye to nobody.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// Waits until `check` holds.
pub async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let end = tokio::time::Instant::now() + LIMIT;
    while !check().await {
        assert!(tokio::time::Instant::now() < end, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The answer to a request: code and JSON.
pub async fn call(
    client: &Client,
    method: &str,
    path: &str,
    content_type: &str,
    body: impl Into<bytes::Bytes>,
) -> (u16, Value) {
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", content_type)
        .header("accept", "application/json")
        .body(body.into())
        .expect("a request");
    let response = client.stream(request).await.expect("an answer");
    let code = response.status().as_u16();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    (code, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

pub async fn get(client: &Client, path: &str) -> (u16, Value) {
    call(client, "GET", path, "application/json", "").await
}

pub async fn post(client: &Client, path: &str, body: &Value) -> (u16, Value) {
    call(client, "POST", path, "application/json", body.to_string()).await
}

pub async fn put(client: &Client, path: &str, body: &Value) -> (u16, Value) {
    call(client, "PUT", path, "application/json", body.to_string()).await
}

pub async fn merge(client: &Client, path: &str, body: &Value) -> (u16, Value) {
    call(client, "PATCH", path, "application/merge-patch+json", body.to_string()).await
}

pub async fn delete(client: &Client, path: &str, body: &Value) -> (u16, Value) {
    call(client, "DELETE", path, "application/json", body.to_string()).await
}

/// A watch: its lines as JSON.
pub struct Watch(std::pin::Pin<Box<dyn Stream<Item = Value> + Send>>);

impl Watch {
    pub async fn open(client: &Client, path: &str) -> Self {
        let request = http::Request::get(path).body(bytes::Bytes::new()).expect("a request");
        let response = client.stream_ok(request).await.expect("a watch");
        Self(Box::pin(orch_client::lines(response.into_body()).filter_map(async |line| {
            line.ok().map(|line| serde_json::from_slice(&line).expect("JSON"))
        })))
    }

    /// The next line; `None` when the watch has ended.
    pub async fn next(&mut self) -> Option<Value> {
        tokio::time::timeout(LIMIT, self.0.next()).await.expect("an event in time")
    }

    /// Type, name and resource version of the next event.
    pub async fn event(&mut self) -> (String, String, i64) {
        let line = self.next().await.expect("the watch goes on");
        let meta = &line["object"]["metadata"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let version = text(&meta["resourceVersion"]).parse().expect("a resource version");
        (text(&line["type"]), text(&meta["name"]), version)
    }
}

pub fn config_map(name: &str, data: &Value) -> Value {
    json!({ "metadata": { "name": name }, "data": data })
}

pub fn version(object: &Value) -> i64 {
    object["metadata"]["resourceVersion"]
        .as_str()
        .and_then(|version| version.parse().ok())
        .expect("a resource version")
}
