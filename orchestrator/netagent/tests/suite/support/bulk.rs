//! As much as a connection takes, checked byte by byte, while something happens.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::netns::Netns;
use super::overlay::eventually;

/// Written at once: more than the largest packet.
const BURST_BYTES: usize = 2 << 20;
/// Between two of them, so that the machine has time for others.
const PAUSE: Duration = Duration::from_millis(20);
/// A connection that stands still for this long is dead.
const DEAD: Duration = Duration::from_secs(30);
/// Packets over which a mean is taken. In this time some are answers, of no size.
const MEAN_OVER: Duration = Duration::from_millis(300);
/// The bytes repeat after so many, a prime, so that none fits where another belongs.
const PERIOD: usize = 251;

/// One connection from one namespace to another.
pub struct Bulk {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    sending: JoinHandle<std::io::Result<()>>,
    receiving: JoinHandle<std::io::Result<Duration>>,
}

/// A burst from any place of the pattern on is a part of this.
fn pattern() -> Vec<u8> {
    (0..PERIOD).cycle().map(|number| number as u8).take(BURST_BYTES + PERIOD).collect()
}

impl Bulk {
    /// Starts it, to an address that the other namespace has.
    pub fn between(from: &Netns, to: &Netns, address: IpAddr) -> Self {
        let listener = to.within(move || TcpListener::bind((address, 0)).expect("bind"));
        let at: SocketAddr = listener.local_addr().expect("bound");
        let mut near = eventually("a connection", || {
            from.within(move || TcpStream::connect_timeout(&at, Duration::from_secs(1)).ok())
        });
        let (mut far, _) = listener.accept().expect("a connection");
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), received.clone());
        let sending = std::thread::spawn(move || {
            near.set_write_timeout(Some(DEAD))?;
            let (bytes, mut sent) = (pattern(), 0);
            while !stopped.load(Ordering::Relaxed) {
                let from = sent % PERIOD;
                near.write_all(&bytes[from..from + BURST_BYTES])?;
                sent += BURST_BYTES;
                std::thread::sleep(PAUSE);
            }
            Ok(())
        });
        let receiving = std::thread::spawn(move || {
            far.set_read_timeout(Some(DEAD))?;
            let (bytes, mut buffer, mut read) = (pattern(), vec![0; BURST_BYTES], 0);
            let (mut longest, mut last) = (Duration::ZERO, Instant::now());
            loop {
                let length = far.read(&mut buffer)?;
                if length == 0 {
                    return Ok(longest);
                }
                longest = longest.max(last.elapsed());
                last = Instant::now();
                let from = read % PERIOD;
                assert!(
                    buffer[..length] == bytes[from..from + length],
                    "another byte behind {read}"
                );
                read += length;
                counted.store(read as u64, Ordering::Relaxed);
            }
        });
        Self { stop, received, sending, receiving }
    }

    /// Waits until more has come.
    #[track_caller]
    pub fn goes_on(&self) {
        let before = self.received.load(Ordering::Relaxed);
        eventually("more bytes", || {
            (self.received.load(Ordering::Relaxed) > before + BURST_BYTES as u64).then_some(())
        });
    }

    /// Ends it; the longest time for which nothing came. All that came was what was sent.
    #[track_caller]
    pub fn longest_gap(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.sending.join().expect("the sender ends").expect("it could send");
        self.receiving.join().expect("the receiver ends well").expect("it could receive")
    }
}

/// Bytes in a packet that this link sends now, on average.
pub fn mean_packet(netns: &Netns, link: &'static str) -> u64 {
    let sent = || {
        netns.within(move || {
            let text = std::fs::read_to_string("/proc/thread-self/net/dev").expect("read");
            let line =
                text.lines().find_map(|line| line.trim().strip_prefix(link)?.strip_prefix(':'));
            let words: Vec<u64> = (line.expect("a link").split_whitespace())
                .map(|word| word.parse().expect("a number"))
                .collect();
            // Eight numbers of what was received, then bytes and packets sent.
            (words[8], words[9])
        })
    };
    let before = sent();
    std::thread::sleep(MEAN_OVER);
    let after = sent();
    (after.0 - before.0) / (after.1 - before.1).max(1)
}
