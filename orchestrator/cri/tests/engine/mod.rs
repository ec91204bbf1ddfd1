//! A Docker Engine for tests: the one `ORCH_TEST_ENGINE` names, or a private one that lives as long as somebody holds
//! it, and the program of the tests' image. Its data, its socket and its containerd are in a folder of their own, so the machine's engine is not touched.

use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;

/// How long the engine may take to listen, and to end.
const LIMIT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);

static SHARED: Mutex<Weak<Engine>> = Mutex::new(Weak::new());

/// Ends the private engine when dropped.
pub(crate) struct Engine {
    socket: PathBuf,
    private: Option<(Child, tempfile::TempDir)>,
}

impl Engine {
    /// The engine that all tests of this process share, or none, with the reason on stderr.
    ///
    /// # Panics
    /// There is everything to start one, and it does not start.
    pub(crate) fn get() -> Option<Arc<Self>> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = shared.upgrade() {
            return Some(engine);
        }
        let engine = match std::env::var_os("ORCH_TEST_ENGINE") {
            Some(socket) => Self { socket: socket.into(), private: None },
            None => match program() {
                Ok(program) => Self::start(&program),
                Err(why) => {
                    // Past the test's capture: a skipped test must be seen.
                    let _ = writeln!(
                        std::io::stderr(),
                        "ignored: {why}; or name an engine's socket with ORCH_TEST_ENGINE"
                    );
                    return None;
                }
            },
        };
        let engine = Arc::new(engine);
        *shared = Arc::downgrade(&engine);
        Some(engine)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    fn start(program: &Path) -> Self {
        let folder = tempfile::Builder::new().prefix("orch-engine-").tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let log = std::fs::File::create(path("log")).expect("a log");
        let socket = path("docker.sock");
        let child = Command::new(program)
            .arg("--data-root")
            .arg(path("data"))
            .arg("--exec-root")
            .arg(path("exec"))
            .arg("--pidfile")
            .arg(path("pid"))
            .arg("--host")
            .arg(format!("unix://{}", socket.display()))
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false"])
            .args(["--ip-forward=false", "--ip-masq=false"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log)
            .spawn()
            .expect("dockerd runs");
        let mut engine = Self { socket, private: Some((child, folder)) };
        let begun = Instant::now();
        while UnixStream::connect(&engine.socket).is_err() {
            let (child, folder) = engine.private.as_mut().expect("just started");
            let ended = child.try_wait().expect("a child");
            if ended.is_some() || begun.elapsed() > LIMIT {
                let log = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
                panic!("dockerd does not come up ({ended:?}):\n{log}");
            }
            std::thread::sleep(LOOK);
        }
        engine
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let Some((mut child, folder)) = self.private.take() else { return };
        // SIGTERM, so that it ends its containerd and unmounts what it mounted.
        let pid = child.id().to_string();
        let asked = Command::new("kill").args(["-TERM", &pid]).status();
        let begun = Instant::now();
        while asked.is_ok() && matches!(child.try_wait(), Ok(None)) && begun.elapsed() < LIMIT {
            std::thread::sleep(LOOK);
        }
        let _ = child.kill();
        let _ = child.wait();
        if let Err(error) = folder.close() {
            let _ = writeln!(std::io::stderr(), "the engine's folder is left: {error}");
        }
    }
}

fn program() -> Result<PathBuf, &'static str> {
    if std::fs::metadata("/proc/self").map_or(1, |own| own.uid()) != 0 {
        return Err("a private Docker engine needs root");
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|folder| folder.join("dockerd"))
        .find(|program| program.is_file())
        .ok_or("dockerd is not installed")
}

/// The one program of the tests' image, built static: sandbox and app at once.
pub(crate) fn tool() -> Bytes {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("tool");
    // This module is part of the tests of two crates that are neighbours.
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cri/tests/tool/program.rs");
    let built = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned()))
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-o"])
        .arg(&program)
        .arg(&source)
        .status()
        .expect("rustc runs");
    assert!(built.success());
    std::fs::read(program).expect("a program").into()
}
