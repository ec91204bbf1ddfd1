//! Datagrams in one direction, many of them, and how many arrived: whether something is lost, or passes that should not.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use cni_netlink::NetNs;
use nix::sys::socket::{setsockopt, sockopt};

/// So many at once, and a pause: a receiver on a busy machine follows.
const BURST: u32 = 5;
const PAUSE: Duration = Duration::from_millis(1);
/// The receiver may be kept from running for a while.
const BUFFER_BYTES: usize = 16 << 20;
/// After the last datagram was sent, the others are on their way for less than this.
const QUIET: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(20);

/// What became of the datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    pub sent: u64,
    pub arrived: u64,
}

/// A flood under way.
pub struct Flood {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<anyhow::Result<u64>>,
    sent_all: Arc<AtomicBool>,
    receiver: JoinHandle<u64>,
}

impl Flood {
    /// Starts it from the namespace at `from` to `address`, which the one at `to` has.
    ///
    /// # Errors
    /// There are no such namespaces, or they have no such address.
    pub fn start(from: &Path, to: &Path, address: IpAddr) -> anyhow::Result<Self> {
        let (here, there) = (NetNs::open(from)?, NetNs::open(to)?);
        let target: UdpSocket =
            there.run(|| -> anyhow::Result<_> { Ok(UdpSocket::bind((address, 0))?) })?;
        setsockopt(&target, sockopt::RcvBufForce, &BUFFER_BYTES).context("a large buffer")?;
        target.set_read_timeout(Some(TICK))?;
        let at = target.local_addr()?;
        let source = here.run(|| -> anyhow::Result<_> { Ok(UdpSocket::bind(("0.0.0.0", 0))?) })?;
        let [stop, sent_all] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let (stopped, quiet) = (stop.clone(), sent_all.clone());
        Ok(Self {
            sender: std::thread::spawn(move || send(&source, at, &stopped)),
            receiver: std::thread::spawn(move || receive(&target, &quiet)),
            stop,
            sent_all,
        })
    }

    /// Ends it.
    ///
    /// # Errors
    /// A datagram could not be sent.
    pub fn stop(self) -> anyhow::Result<Count> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().map_err(|_| anyhow!("the sender panicked"));
        self.sent_all.store(true, Ordering::Relaxed);
        let arrived = self.receiver.join().map_err(|_| anyhow!("the receiver panicked"))?;
        Ok(Count { sent: sent??, arrived })
    }
}

fn send(socket: &UdpSocket, to: SocketAddr, stop: &AtomicBool) -> anyhow::Result<u64> {
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BURST {
            socket.send_to(b"flood", to).context("send")?;
            sent += 1;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(sent)
}

fn receive(socket: &UdpSocket, sent_all: &AtomicBool) -> u64 {
    let (mut arrived, mut last) = (0, Instant::now());
    let mut buffer = [0; 16];
    while !sent_all.load(Ordering::Relaxed) || last.elapsed() < QUIET {
        if socket.recv(&mut buffer).is_ok() {
            (arrived, last) = (arrived + 1, Instant::now());
        }
    }
    arrived
}
