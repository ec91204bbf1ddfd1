//! Streams between two pods while something happens, and how long each of them stood still.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::netns::Netns;
use super::overlay::eventually;

/// Time between two messages.
const PERIOD: Duration = Duration::from_millis(5);
/// A ping without an answer is sent again after this time.
const PING_WAIT: Duration = Duration::from_millis(20);
/// A stream that stands still for this long is dead.
const DEAD: Duration = Duration::from_secs(30);

/// A TCP connection and pings, in each direction.
pub struct Streams {
    stop: Arc<AtomicBool>,
    asking: Vec<Asking>,
}

struct Asking {
    name: String,
    answers: Arc<AtomicU32>,
    thread: JoinHandle<std::io::Result<Duration>>,
}

impl Streams {
    /// Starts them between two namespaces and the addresses that these have.
    pub fn between(pods: [(&Netns, IpAddr); 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut asking = Vec::new();
        for [from, to] in [[pods[0], pods[1]], [pods[1], pods[0]]] {
            let start = |kind: &str, ask: fn(Ends, &Told) -> std::io::Result<Duration>| {
                let ends = Ends::open(from.0, to.0, to.1, kind == "TCP");
                let told = Told { stop: stop.clone(), answers: Arc::default() };
                let (name, answers) = (format!("{kind} from {}", from.1), told.answers.clone());
                Asking { name, answers, thread: std::thread::spawn(move || ask(ends, &told)) }
            };
            asking.push(start("TCP", ask_tcp));
            asking.push(start("ping", ask_udp));
        }
        Self { stop, asking }
    }

    /// Waits until each of them got answers that were asked for from now on.
    #[track_caller]
    pub fn go_on(&self) {
        for one in &self.asking {
            let before = one.answers.load(Ordering::Relaxed);
            eventually(&format!("{} goes on", one.name), || {
                (one.answers.load(Ordering::Relaxed) > before + 2).then_some(())
            });
        }
    }

    /// Ends them. The longest time that one of them was without an answer, and which one.
    #[track_caller]
    pub fn longest_gap(self) -> (Duration, String) {
        self.stop.store(true, Ordering::Relaxed);
        let gap = |one: Asking| {
            let gap = one.thread.join().expect("the thread ends");
            (gap.unwrap_or_else(|error| panic!("{}: {error}", one.name)), one.name)
        };
        self.asking.into_iter().map(gap).max().expect("there are streams")
    }
}

struct Told {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU32>,
}

impl Told {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn answered(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
    }
}

/// Both ends of a stream. A socket stays in the namespace that it was opened in.
enum Ends {
    Tcp(TcpStream),
    Udp(UdpSocket, UdpSocket),
}

impl Ends {
    fn open(from: &Netns, to: &Netns, address: IpAddr, tcp: bool) -> Self {
        let any = |other: SocketAddr| {
            SocketAddr::new(if other.is_ipv4() { [0; 4].into() } else { [0; 16].into() }, 0)
        };
        if !tcp {
            let far = to.within(move || UdpSocket::bind((address, 0)).expect("bind"));
            let at = far.local_addr().expect("bound");
            let near = from.within(move || UdpSocket::bind(any(at)).expect("bind"));
            near.connect(at).or_else(|_| near.connect(at)).expect("a route");
            return Self::Udp(near, far);
        }
        let listener = to.within(move || TcpListener::bind((address, 0)).expect("bind"));
        let at = listener.local_addr().expect("bound");
        let near = eventually("a connection", || {
            from.within(move || TcpStream::connect_timeout(&at, Duration::from_secs(1)).ok())
        });
        // It ends with the connection.
        std::thread::spawn(move || {
            let (mut far, _) = listener.accept().expect("a connection");
            let mut byte = [0];
            while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
        });
        Self::Tcp(near)
    }
}

fn ask_tcp(ends: Ends, told: &Told) -> std::io::Result<Duration> {
    let Ends::Tcp(mut stream) = ends else { unreachable!("made for it") };
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEAD))?;
    let mut longest = Duration::ZERO;
    while !told.is_over() {
        let asked = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        told.answered();
        longest = longest.max(asked.elapsed());
        std::thread::sleep(PERIOD);
    }
    Ok(longest)
}

fn ask_udp(ends: Ends, told: &Told) -> std::io::Result<Duration> {
    let Ends::Udp(near, far) = ends else { unreachable!("made for it") };
    near.set_read_timeout(Some(PING_WAIT))?;
    far.set_read_timeout(Some(PING_WAIT))?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut byte = [0];
            while !told.is_over() {
                if let Ok((_, from)) = far.recv_from(&mut byte) {
                    // The way back may be broken just now.
                    let _ = far.send_to(&byte, from);
                }
            }
        });
        let (mut longest, mut last) = (Duration::ZERO, Instant::now());
        while !told.is_over() {
            // Without a route it is refused at once.
            let heard = near.send(&[1]).and_then(|_| near.recv(&mut [0]));
            match heard {
                Ok(_) => {
                    told.answered();
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) if last.elapsed() > DEAD => {
                    return Err(std::io::Error::other("no answer"));
                }
                Err(_) => {}
            }
            std::thread::sleep(PERIOD);
        }
        Ok(longest.max(last.elapsed()))
    })
}
