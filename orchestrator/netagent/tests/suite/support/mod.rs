//! What the integration tests share: a real etcd on a temporary folder.
#![allow(unreachable_pub, reason = "for this test program alone")]

pub mod api;
pub mod bulk;
pub mod history;
pub mod netns;
pub mod overlay;
pub mod stream;
pub mod two_nodes;

use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

const PEER: &str = "unix://peer:0";

/// A real etcd; killed when dropped. It lives in the network namespace of the thread that starts it.
pub struct Etcd {
    child: Option<Child>,
    folder: TempDir,
    pub url: String,
    flags: Vec<String>,
}

impl Etcd {
    pub fn start() -> Self {
        Self::start_at(Ipv4Addr::LOCALHOST)
    }

    pub fn start_at(ip: Ipv4Addr) -> Self {
        // A port that is free now may be taken by another test before etcd has it.
        for _ in 0..5 {
            let socket = std::net::TcpListener::bind((ip, 0)).expect("a free port");
            let port = socket.local_addr().expect("bound").port();
            drop(socket);
            let mut etcd = Self::none();
            etcd.url = format!("http://{ip}:{port}");
            etcd.resume();
            if etcd.serves() {
                return etcd;
            }
        }
        panic!("etcd does not serve");
    }

    /// Until it serves. One that is killed in the middle of its first start may never serve again.
    fn serves(&mut self) -> bool {
        let address = self.url.trim_start_matches("http://");
        let healthy = || -> std::io::Result<bool> {
            let mut stream = std::net::TcpStream::connect(address)?;
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text.contains("\"true\""))
        };
        let start = Instant::now();
        while !healthy().unwrap_or(false) {
            let child = self.child.as_mut().expect("started");
            let ended = child.try_wait().expect("a child").is_some();
            if ended || start.elapsed() > Duration::from_secs(10) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// With the certificates of a cluster's PKI folder, as the server runs it.
    pub fn start_tls(pki: &Path) -> Self {
        let mut etcd = Self::start();
        etcd.stop();
        etcd.url = etcd.url.replace("http:", "https:");
        let file = |name: &str| pki.join(name).display().to_string();
        etcd.flags = vec![
            format!("--cert-file={}", file("etcd-server.crt")),
            format!("--key-file={}", file("etcd-server.key")),
            format!("--trusted-ca-file={}", file("etcd-ca.crt")),
            "--client-cert-auth".to_owned(),
        ];
        etcd.resume();
        etcd
    }

    /// A place for one.
    pub fn none() -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        Self { child: None, folder, url: String::new(), flags: Vec::new() }
    }

    pub fn resume(&mut self) {
        let child = Command::new("etcd")
            .args(["--data-dir".as_ref(), self.folder.path().as_os_str()])
            .args(["--listen-client-urls", &self.url, "--advertise-client-urls", &self.url])
            // A socket in its folder: no port to be taken by somebody else.
            .current_dir(self.folder.path())
            .args(["--listen-peer-urls", PEER, "--initial-advertise-peer-urls", PEER])
            .args(["--initial-cluster", &format!("default={PEER}"), "--unsafe-no-fsync"])
            .args(&self.flags)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program etcd is installed");
        self.child = Some(child);
    }

    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill etcd");
            child.wait().expect("etcd ends");
        }
    }

    /// A client, once etcd answers.
    pub async fn client(&self) -> etcd_client::Client {
        let client = etcd_client::Client::connect([&self.url], None).await.expect("connect");
        eventually("etcd answers", Duration::from_secs(20), || async {
            client.clone().get("x", None).await.ok()
        })
        .await;
        client
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Asks again until there is an answer.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> F,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
