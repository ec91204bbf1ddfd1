//! New connections: opened and at once reset, so that nothing is left that would wait.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cni_netlink::NetNs;
use nix::sys::socket::{setsockopt, sockopt};

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(2);
const PORT: u16 = 8080;

/// Listens in a namespace and throws away what comes, while `work` runs. `work` gets what to connect to.
pub(crate) fn with_sink<T>(
    at: &NetNs,
    address: std::net::IpAddr,
    work: impl FnOnce(SocketAddr) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let at = at.run(|| -> anyhow::Result<_> { Ok(TcpListener::bind((address, PORT))?) })?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        at.set_nonblocking(true)?;
        let (at, stop) = (&at, &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // The client's reset ends it on both sides.
                if at.accept().is_err() {
                    std::thread::sleep(TICK);
                }
            }
        });
        let outcome = at.local_addr().context("listen").and_then(work);
        stop.store(true, Ordering::Relaxed);
        outcome
    })
}

/// Opens connections one after the other for a while: how long each took.
pub(crate) fn connects(
    from: &NetNs,
    to: impl Fn(usize) -> SocketAddr + Send + Sync,
    time: Duration,
) -> anyhow::Result<Vec<Duration>> {
    from.run(|| -> anyhow::Result<_> {
        let (started, mut times) = (Instant::now(), Vec::new());
        while started.elapsed() < time {
            let at = to(times.len());
            let begun = Instant::now();
            let stream = TcpStream::connect_timeout(&at, CONNECT_LIMIT)
                .with_context(|| format!("connect to {at}"))?;
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(&stream, sockopt::Linger, &linger)?;
            drop(stream);
            times.push(begun.elapsed());
        }
        Ok(times)
    })
}
