//! A client that asks a web server at a steady rate and remembers every request that failed.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use cni_netlink::NetNs;

/// A request that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(5);

/// One GET over a connection of its own; the body of a 200.
///
/// # Errors
/// No connection, no answer, another status.
pub fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT).context("connect")?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
        .context("send")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("receive")?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without end of headers")?;
    if !head.starts_with("HTTP/1.1 200") && !head.starts_with("HTTP/1.0 200") {
        bail!("answer {:?}", head.lines().next().unwrap_or_default());
    }
    Ok(body.to_owned())
}

/// What a client saw.
#[derive(Debug, Default)]
pub struct Report {
    pub asked: usize,
    /// When (since the start) and why.
    pub failures: Vec<(Duration, String)>,
    pub slowest: Duration,
}

impl Report {
    /// # Errors
    /// A request failed, or hardly any was made.
    pub fn clean(&self, at_least: usize) -> anyhow::Result<()> {
        if self.asked < at_least {
            bail!("only {} requests were made, not {at_least}", self.asked);
        }
        if !self.failures.is_empty() {
            let first: Vec<_> = self.failures.iter().take(5).collect();
            bail!("{} of {} requests failed: {first:?}", self.failures.len(), self.asked);
        }
        Ok(())
    }
}

/// A client under way.
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Report>>,
}

impl Load {
    /// Asks `address` `per_second` times a second from inside `netns` (`None`: from here).
    #[must_use]
    pub fn start(netns: Option<PathBuf>, address: SocketAddr, per_second: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || match netns {
            None => Ok(drive(address, per_second, &told)),
            Some(path) => NetNs::open(&path)
                .with_context(|| format!("open {}", path.display()))
                .and_then(|netns| netns.run(move || anyhow::Ok(drive(address, per_second, &told)))),
        });
        Self { stop, thread }
    }

    /// Ends the client.
    ///
    /// # Errors
    /// It broke off.
    pub fn stop(self) -> anyhow::Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the client panicked"))?
    }
}

/// Between two requests of a [`Conversation`].
const PAUSE: Duration = Duration::from_millis(50);

/// One connection on which a client asks and a server answers in turn, for as long as it is wanted.
pub struct Conversation {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Talk>>,
}

/// What was said on one connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Talk {
    pub answers: usize,
    /// The longest time between two answers.
    pub longest_gap: Duration,
}

impl Conversation {
    /// Connects from inside a network namespace.
    ///
    /// # Errors
    /// There is no such namespace, or nobody listens.
    pub fn start(netns: &Path, address: SocketAddr) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let connect =
            move || anyhow::Ok(TcpStream::connect_timeout(&address, LIMIT).context("connect")?);
        let stream = NetNs::open(netns)
            .with_context(|| format!("open {}", netns.display()))?
            .run(connect)?;
        let thread = std::thread::spawn(move || talk(stream, &told));
        Ok(Self { stop, thread })
    }

    /// Ends it.
    ///
    /// # Errors
    /// The connection broke, or an answer took too long.
    pub fn stop(self) -> anyhow::Result<Talk> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the client panicked"))?
    }
}

fn talk(mut stream: TcpStream, stop: &AtomicBool) -> anyhow::Result<Talk> {
    stream.set_read_timeout(Some(LIMIT))?;
    let (mut seen, mut last) = (Talk::default(), Instant::now());
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: app\r\n\r\n").context("send")?;
        // Answers are short, and the next one comes only when it is asked for.
        let length = stream.read(&mut [0; 16 << 10]).context("receive")?;
        if length == 0 {
            bail!("the connection was closed after {} answers", seen.answers);
        }
        seen.answers += 1;
        seen.longest_gap = seen.longest_gap.max(last.elapsed());
        last = Instant::now();
        std::thread::sleep(PAUSE);
    }
    Ok(seen)
}

fn drive(address: SocketAddr, per_second: u32, stop: &AtomicBool) -> Report {
    let started = Instant::now();
    let mut report = Report::default();
    // Each request has a thread of its own, so that a slow one does not lower the rate. The rate times the
    // limit bounds how many there are.
    std::thread::scope(|scope| {
        let mut under_way = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let due = started
                + Duration::from_secs(1) * u32::try_from(report.asked).unwrap_or(u32::MAX)
                    / per_second;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            report.asked += 1;
            under_way.push(scope.spawn(move || {
                let asked = Instant::now();
                let outcome = get(address, "/").map(drop).map_err(|error| format!("{error:#}"));
                (asked, asked.elapsed(), outcome)
            }));
        }
        for (asked, took, outcome) in under_way.into_iter().filter_map(|thread| thread.join().ok())
        {
            report.slowest = report.slowest.max(took);
            if let Err(why) = outcome {
                report.failures.push((asked - started, why));
            }
        }
    });
    report
}
