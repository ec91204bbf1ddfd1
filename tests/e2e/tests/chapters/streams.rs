//! What streams: exec, cp and port-forward, with the newest kubectl and with the oldest one there is. Between them
//! they speak all protocols: WebSocket channels, SPDY/3.1, and SPDY/3.1 through a WebSocket.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use tests_e2e::testlab::TestLab;
use tests_e2e::{eventually, load, shell};

const SOON: Duration = Duration::from_secs(60);
/// Connections at once through one port-forward.
const PARALLEL: usize = 20;
/// The pod's file has the numbers up to that, one a line: 1.04 MB.
const LAST_NUMBER: u32 = 165_000;

pub(super) fn streams(lab: &TestLab) -> anyhow::Result<()> {
    lab.apply(include_str!("manifests/streams.yaml"))?;
    lab.ok(&["wait", "pod/streams", "--for=condition=Ready", "--timeout=60s"])?;
    for kubectl in lab.kubectls() {
        let name = kubectl.display().to_string();
        exec(lab, &kubectl).with_context(|| format!("exec with {name}"))?;
        copy(lab, &kubectl).with_context(|| format!("cp with {name}"))?;
        port_forward(lab, &kubectl).with_context(|| format!("port-forward with {name}"))?;
    }
    lab.ok(&["delete", "pod", "streams", "--timeout=30s"])?;
    Ok(())
}

fn exec(lab: &TestLab, kubectl: &Path) -> anyhow::Result<()> {
    let run = |args: &[&str], stdin: &[u8]| {
        shell::run(
            lab.kubectl(kubectl).args(["exec", "-i", "streams", "--"]).args(args),
            stdin,
            SOON,
        )
    };
    let ended = run(&["sh", "-c", "echo out; echo err >&2; exit 7"], b"")?;
    ensure!(ended.status.code() == Some(7), "exit code {:?}", ended.status.code());
    ensure!(ended.text() == "out\n" && ended.stderr.starts_with("err\n"), "{ended:?}");
    let sent: Vec<u8> =
        (0..5_u32 << 20).map(|at| u8::try_from(at * 31 % 251).unwrap_or_default()).collect();
    let got = run(&["cat"], &sent)?.ok()?;
    ensure!(got.stdout == sent, "sent {} bytes, got {} other ones", sent.len(), got.stdout.len());
    Ok(())
}

fn copy(lab: &TestLab, kubectl: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (sent, back) = (folder.path().join("sent"), folder.path().join("back"));
    std::fs::write(&sent, vec![b'c'; 3 << 20])?;
    let run = |from: &str, to: &str| {
        shell::run(lab.kubectl(kubectl).args(["cp", from, to]), b"", SOON)?.ok()
    };
    run(&sent.to_string_lossy(), "streams:/tmp/copied")?;
    run("streams:/tmp/copied", &back.to_string_lossy())?;
    ensure!(std::fs::read(&back)? == std::fs::read(&sent)?, "the copy is another one");
    Ok(())
}

/// The server in the pod listens on the pod's loopback address only.
fn port_forward(lab: &TestLab, kubectl: &Path) -> anyhow::Result<()> {
    let mut wanted = String::new();
    for number in 1..=LAST_NUMBER {
        writeln!(wanted, "{number}")?;
    }
    let forward = Forward::start(lab, kubectl, 8080)?;
    let get = || load::get(forward.address, "/numbers");
    ensure!(get()? == wanted, "one connection");
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..PARALLEL).map(|_| scope.spawn(get)).collect();
        for one in all {
            let got = one.join().map_err(|_| anyhow!("a client panicked"))??;
            ensure!(got == wanted, "one of {PARALLEL} connections: {} bytes", got.len());
        }
        anyhow::Ok(())
    })?;
    ensure!(get()? == wanted, "a connection after the others");
    let said = forward.stop()?;
    ensure!(!said.contains("error"), "{said}");

    // Nobody listens there.
    let forward = Forward::start(lab, kubectl, 1)?;
    ensure!(load::get(forward.address, "/").is_err(), "an answer from a closed port");
    let said = forward.stop()?;
    ensure!(said.contains("error forwarding port 1 to pod default/streams"), "{said}");
    Ok(())
}

/// A `kubectl port-forward` that runs.
struct Forward {
    kubectl: Child,
    address: SocketAddr,
}

impl Forward {
    /// Starts it and waits for the local port that it chose.
    fn start(lab: &TestLab, kubectl: &Path, port: u16) -> anyhow::Result<Self> {
        let mut child = lab
            .kubectl(kubectl)
            .args(["port-forward", "--address=127.0.0.1", "pod/streams", &format!(":{port}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start kubectl port-forward")?;
        let out = child.stdout.take().context("stdout")?;
        let mut forward = Self { kubectl: child, address: (Ipv4Addr::LOCALHOST, 0).into() };
        let (line_in, line) = mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(out).lines();
            let _ = line_in.send(lines.next());
            // To the end, so that kubectl does not wait for a reader.
            for _ in lines {}
        });
        let line = line.recv_timeout(SOON).context("no port within the limit")?;
        let line = match line {
            Some(line) => line?,
            None => return Err(anyhow!("kubectl ended: {}", forward.stop()?)),
        };
        let local = line
            .strip_prefix("Forwarding from 127.0.0.1:")
            .and_then(|rest| rest.split(' ').next())
            .with_context(|| format!("no port in {line:?}"))?;
        forward.address.set_port(local.parse().context("port")?);
        Ok(forward)
    }

    /// Ends it and returns what it said on standard error.
    fn stop(mut self) -> anyhow::Result<String> {
        let mut said = String::new();
        // What a connection ended with is said a moment after it.
        let _ = eventually("end of kubectl", Duration::from_secs(1), || {
            self.kubectl.try_wait()?.context("it runs")
        });
        self.kubectl.kill().context("kill kubectl")?;
        if let Some(mut err) = self.kubectl.stderr.take() {
            err.read_to_string(&mut said).context("read standard error")?;
        }
        Ok(said)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}
