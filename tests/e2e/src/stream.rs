//! A TCP stream and a UDP ping-pong between two network namespaces, and how long each stood still.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use cni_netlink::NetNs;

/// Time between two messages of a stream.
const PERIOD: Duration = Duration::from_millis(20);
/// A socket that hears nothing looks at the clock this often.
const TICK: Duration = Duration::from_millis(50);
/// A stream that stands still for this long is dead.
const DEAD: Duration = Duration::from_secs(60);

/// What the streams saw.
#[derive(Debug)]
pub struct Report {
    /// Longest time between two answers over the one TCP connection.
    pub tcp_gap: Duration,
    /// Longest time between two answers over UDP.
    pub udp_gap: Duration,
    /// Messages that came back over TCP.
    pub tcp_answers: usize,
    /// Messages that came back over UDP.
    pub udp_answers: usize,
}

/// Streams under way.
pub struct Streams {
    stop: Arc<AtomicBool>,
    servers: Vec<JoinHandle<anyhow::Result<()>>>,
    tcp: JoinHandle<anyhow::Result<(Duration, usize)>>,
    udp: JoinHandle<anyhow::Result<(Duration, usize)>>,
}

impl Streams {
    /// Starts both from the namespace at `from` to `address`, which the one at `to` has.
    ///
    /// # Errors
    /// They cannot connect.
    pub fn start(from: &Path, to: &Path, address: IpAddr) -> anyhow::Result<Self> {
        let (here, there) = (NetNs::open(from)?, NetNs::open(to)?);
        let listener =
            there.run(|| -> anyhow::Result<_> { Ok(TcpListener::bind((address, 0))?) })?;
        let echo = there.run(|| -> anyhow::Result<_> { Ok(UdpSocket::bind((address, 0))?) })?;
        let stop = Arc::new(AtomicBool::new(false));
        let (tcp_at, udp_at) = (listener.local_addr()?, echo.local_addr()?);
        // Sockets stay in the namespace that they were opened in, whichever thread uses them.
        let connect = |at: SocketAddr| -> anyhow::Result<_> {
            let stream = TcpStream::connect_timeout(&at, Duration::from_secs(5))?;
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            Ok((stream, socket))
        };
        let (stream, socket) = here.run(|| connect(tcp_at)).context("connect pod to pod")?;
        let (peer, _) = listener.accept().context("accept")?;
        let told = || stop.clone();
        let servers = vec![
            spawn(told(), move |stop| answer_tcp(peer, stop)),
            spawn(told(), move |stop| answer_udp(&echo, stop)),
        ];
        let tcp = spawn(told(), move |stop| ask_tcp(stream, stop));
        let udp = spawn(told(), move |stop| ask_udp(&socket, udp_at, stop));
        Ok(Self { stop, servers, tcp, udp })
    }

    /// Ends both.
    ///
    /// # Errors
    /// The TCP connection broke, or nothing came back at all.
    pub fn stop(self) -> anyhow::Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let joined = |thread: JoinHandle<anyhow::Result<(Duration, usize)>>| {
            thread.join().map_err(|_| anyhow!("a stream panicked"))?
        };
        let (tcp_gap, tcp_answers) = joined(self.tcp).context("TCP stream")?;
        let (udp_gap, udp_answers) = joined(self.udp).context("UDP ping-pong")?;
        for server in self.servers {
            server.join().map_err(|_| anyhow!("a server panicked"))?.context("server")?;
        }
        ensure!(tcp_answers > 0 && udp_answers > 0, "nothing came back");
        Ok(Report { tcp_gap, udp_gap, tcp_answers, udp_answers })
    }
}

fn spawn<T: Send + 'static>(
    stop: Arc<AtomicBool>,
    work: impl FnOnce(&AtomicBool) -> T + Send + 'static,
) -> JoinHandle<T> {
    std::thread::spawn(move || work(&stop))
}

fn is_wait(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn answer_tcp(mut peer: TcpStream, stop: &AtomicBool) -> anyhow::Result<()> {
    peer.set_read_timeout(Some(TICK))?;
    peer.set_nodelay(true)?;
    let mut buffer = [0; 64];
    while !stop.load(Ordering::Relaxed) {
        match peer.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => peer.write_all(&buffer[..length])?,
            Err(error) if is_wait(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn ask_tcp(mut stream: TcpStream, stop: &AtomicBool) -> anyhow::Result<(Duration, usize)> {
    stream.set_read_timeout(Some(TICK))?;
    stream.set_nodelay(true)?;
    let (mut gap, mut answers, mut last) = (Duration::ZERO, 0, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&[1])?;
        loop {
            match stream.read(&mut [0; 1]) {
                Ok(0) => bail!("the connection was closed"),
                Ok(_) => break,
                Err(error) if is_wait(&error) => {
                    ensure!(last.elapsed() < DEAD, "nothing came back for {DEAD:?}");
                    if stop.load(Ordering::Relaxed) {
                        return Ok((gap.max(last.elapsed()), answers));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        answers += 1;
        gap = gap.max(last.elapsed());
        last = Instant::now();
        std::thread::sleep(PERIOD);
    }
    Ok((gap, answers))
}

fn answer_udp(socket: &UdpSocket, stop: &AtomicBool) -> anyhow::Result<()> {
    socket.set_read_timeout(Some(TICK))?;
    let mut buffer = [0; 64];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // The way back may be broken just now.
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
    Ok(())
}

fn ask_udp(
    socket: &UdpSocket,
    to: SocketAddr,
    stop: &AtomicBool,
) -> anyhow::Result<(Duration, usize)> {
    socket.set_read_timeout(Some(PERIOD))?;
    let (mut gap, mut answers, mut last) = (Duration::ZERO, 0, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        let _ = socket.send_to(&[1], to);
        if socket.recv_from(&mut [0; 8]).is_ok() {
            answers += 1;
            gap = gap.max(last.elapsed());
            last = Instant::now();
            std::thread::sleep(PERIOD);
        }
    }
    Ok((gap.max(last.elapsed()), answers))
}
