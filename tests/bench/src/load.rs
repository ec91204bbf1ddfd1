//! Load between two namespaces: streams, small packets, ping-pong. What it costs is the CPU time of this process, which
//! on virtual links does the kernel's work on both sides as well.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use cni_netlink::NetNs;
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use crate::process::cpu_time;

/// One write of a stream.
const CHUNK_BYTES: usize = 128 * 1024;
/// A packet of the small kind.
const SMALL_BYTES: usize = 64;
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// A receiver looks this often whether it is over.
const TICK: Duration = Duration::from_millis(20);

/// A way from one namespace to another.
pub(crate) struct Way<'a> {
    pub(crate) from: &'a NetNs,
    pub(crate) to: &'a NetNs,
    /// Address of the far end.
    pub(crate) address: IpAddr,
}

/// What a load achieved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rate {
    /// Units a second: Gbit, or thousands of packets.
    pub(crate) per_second: f64,
    /// The same for each second of CPU.
    pub(crate) per_cpu_second: f64,
}

impl Way<'_> {
    fn listen(&self) -> anyhow::Result<TcpListener> {
        self.to.run(|| Ok(TcpListener::bind((self.address, 0))?))
    }

    /// Both ends of a connection. A socket stays in the namespace that it was opened in.
    fn connect(&self, listener: &TcpListener) -> anyhow::Result<(TcpStream, TcpStream)> {
        let at = listener.local_addr()?;
        let near = self.from.run(|| -> anyhow::Result<_> {
            TcpStream::connect_timeout(&at, CONNECT_LIMIT).context("connect")
        })?;
        let (far, _) = listener.accept().context("accept")?;
        Ok((near, far))
    }

    /// Whether packets pass at all.
    ///
    /// # Errors
    /// They do not.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let listener = self.listen()?;
        self.connect(&listener).map(drop)
    }

    /// TCP in one direction.
    ///
    /// # Errors
    /// A connection breaks.
    pub(crate) fn tcp(&self, streams: usize, time: Duration) -> anyhow::Result<Rate> {
        let listener = self.listen()?;
        let pairs =
            (0..streams).map(|_| self.connect(&listener)).collect::<anyhow::Result<Vec<_>>>()?;
        let stop = AtomicBool::new(false);
        let (cpu, started) = (cpu_time(), Instant::now());
        let bytes = std::thread::scope(|scope| -> anyhow::Result<u64> {
            let mut receivers = Vec::new();
            for (mut near, mut far) in pairs {
                let stop = &stop;
                scope.spawn(move || {
                    let chunk = vec![0; CHUNK_BYTES];
                    while !stop.load(Ordering::Relaxed) && near.write_all(&chunk).is_ok() {}
                });
                receivers.push(scope.spawn(move || {
                    let (mut chunk, mut total) = (vec![0; CHUNK_BYTES], 0_u64);
                    while let Ok(length @ 1..) = far.read(&mut chunk) {
                        total += length as u64;
                    }
                    total
                }));
            }
            std::thread::sleep(time);
            stop.store(true, Ordering::Relaxed);
            receivers.into_iter().try_fold(0, |sum, receiver| {
                Ok(sum + receiver.join().map_err(|_| anyhow!("a receiver panicked"))?)
            })
        })?;
        Ok(rate(bytes as f64 * 8.0 / 1e9, started.elapsed(), cpu_time() - cpu))
    }

    /// UDP packets of 64 bytes as fast as they go; those that arrive count, in thousands.
    ///
    /// # Errors
    /// The sockets cannot be opened.
    pub(crate) fn udp(&self, time: Duration) -> anyhow::Result<Rate> {
        let far =
            self.to.run(|| -> anyhow::Result<_> { Ok(UdpSocket::bind((self.address, 0))?) })?;
        let at = far.local_addr()?;
        let near = self.near_socket(at)?;
        far.set_read_timeout(Some(TICK))?;
        let stop = AtomicBool::new(false);
        let (cpu, started) = (cpu_time(), Instant::now());
        let packets = std::thread::scope(|scope| -> anyhow::Result<u64> {
            scope.spawn(|| {
                let packet = [0; SMALL_BYTES];
                while !stop.load(Ordering::Relaxed) {
                    // A full queue is no end.
                    let _ = near.send(&packet);
                }
            });
            let receiver = scope.spawn(|| {
                let (mut packet, mut total) = ([0; SMALL_BYTES], 0_u64);
                loop {
                    match far.recv(&mut packet) {
                        Ok(_) => total += 1,
                        Err(_) if stop.load(Ordering::Relaxed) => return total,
                        Err(_) => {}
                    }
                }
            });
            std::thread::sleep(time);
            stop.store(true, Ordering::Relaxed);
            receiver.join().map_err(|_| anyhow!("the receiver panicked"))
        })?;
        Ok(rate(packets as f64 / 1e3, started.elapsed(), cpu_time() - cpu))
    }

    fn near_socket(&self, at: SocketAddr) -> anyhow::Result<UdpSocket> {
        self.from.run(|| -> anyhow::Result<_> {
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            socket.connect(at)?;
            Ok(socket)
        })
    }

    /// Median round trip of one byte over TCP. Both ends are on one CPU: to wake one that sleeps takes a virtual machine
    /// longer than all the rest, and whether that is needed is the scheduler's mood.
    ///
    /// # Errors
    /// The connection breaks.
    pub(crate) fn ping_pong(&self, time: Duration) -> anyhow::Result<Duration> {
        let listener = self.listen()?;
        let (mut near, mut far) = self.connect(&listener)?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let cpu = sched_getcpu()?;
        let mut times = std::thread::scope(|scope| -> anyhow::Result<_> {
            let echo = scope.spawn(move || -> anyhow::Result<()> {
                stay_on(cpu)?;
                let mut byte = [0];
                while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
                Ok(())
            });
            let asker = scope.spawn(move || -> anyhow::Result<_> {
                stay_on(cpu)?;
                let (started, mut byte, mut times) = (Instant::now(), [0], Vec::new());
                while started.elapsed() < time {
                    let sent = Instant::now();
                    near.write_all(&[1])?;
                    near.read_exact(&mut byte)?;
                    times.push(sent.elapsed());
                }
                Ok(times)
            });
            let times = asker.join().map_err(|_| anyhow!("one who asks panicked"))??;
            echo.join().map_err(|_| anyhow!("one who answers panicked"))??;
            Ok(times)
        })?;
        times.sort_unstable();
        times.get(times.len() / 2).copied().context("no round trip")
    }
}

/// Keeps this thread on a CPU.
fn stay_on(cpu: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

fn rate(units: f64, wall: Duration, cpu: Duration) -> Rate {
    Rate {
        per_second: units / wall.as_secs_f64(),
        per_cpu_second: units / cpu.as_secs_f64().max(f64::MIN_POSITIVE),
    }
}
