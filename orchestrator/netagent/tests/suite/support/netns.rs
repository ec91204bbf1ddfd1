//! Network namespaces of a test: made by `ip`, entered by threads of their own, removed when dropped.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

static NEXT: AtomicU32 = AtomicU32::new(0);
/// Patience with one connection.
const LIMIT: Duration = Duration::from_secs(3);

/// Runs `ip` with words separated by blanks.
#[track_caller]
pub fn ip(words: &str) {
    run("ip", words);
}

/// Runs a program that must succeed.
#[track_caller]
pub fn run(program: &str, words: &str) -> String {
    let output = Command::new(program).args(words.split_whitespace()).output().expect(program);
    assert!(
        output.status.success(),
        "{program} {words}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A named network namespace with its loopback up.
pub struct Netns {
    pub name: String,
}

impl Netns {
    pub fn new(hint: &str) -> Self {
        let name =
            format!("t-{}-{}-{hint}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        Self { name }
    }

    /// Runs `ip` in it.
    #[track_caller]
    pub fn ip(&self, words: &str) -> String {
        run("ip", &format!("-n {} {words}", self.name))
    }

    /// Runs `bridge` in it.
    #[track_caller]
    pub fn bridge(&self, words: &str) -> String {
        run("bridge", &format!("-n {} {words}", self.name))
    }

    /// Runs `tc` in it.
    #[track_caller]
    pub fn tc(&self, words: &str) -> String {
        run("tc", &format!("-n {} {words}", self.name))
    }

    /// Starts a thread in it. `ip netns exec` would hide /sys; a bare setns does not.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let path = format!("/run/netns/{}", self.name);
        std::thread::spawn(move || {
            let file = std::fs::File::open(&path).expect("the namespace");
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            work()
        })
    }

    /// Does something in it.
    pub fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self.spawn(work).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// A TCP server that tells each client its own name and the address it sees.
    pub fn serve_tcp(&self, name: &str, port: u16) {
        self.serve(name, (Ipv4Addr::UNSPECIFIED, port).into());
    }

    /// The same over IPv6.
    pub fn serve_tcp6(&self, name: &str, port: u16) {
        self.serve(name, (Ipv6Addr::UNSPECIFIED, port).into());
    }

    fn serve(&self, name: &str, address: SocketAddr) {
        let name = name.to_owned();
        let (ready, started) = std::sync::mpsc::channel();
        self.spawn(move || {
            let listener = TcpListener::bind(address).expect("bind");
            ready.send(()).expect("the test waits");
            for mut stream in listener.incoming().flatten() {
                let peer = stream.peer_addr().expect("connected").ip();
                let _ = stream.write_all(format!("{name} {peer}").as_bytes());
            }
        });
        started.recv().expect("the server starts");
    }

    /// The same over UDP.
    pub fn serve_udp(&self, name: &str, port: u16) {
        self.serve_datagrams(name, (Ipv4Addr::UNSPECIFIED, port).into());
    }

    /// The same over IPv6.
    pub fn serve_udp6(&self, name: &str, port: u16) {
        self.serve_datagrams(name, (Ipv6Addr::UNSPECIFIED, port).into());
    }

    fn serve_datagrams(&self, name: &str, address: SocketAddr) {
        let name = name.to_owned();
        let (ready, started) = std::sync::mpsc::channel();
        self.spawn(move || {
            let socket = UdpSocket::bind(address).expect("bind");
            ready.send(()).expect("the test waits");
            let mut buffer = [0; 64];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(format!("{name} {}", peer.ip()).as_bytes(), peer);
            }
        });
        started.recv().expect("the server starts");
    }

    /// What a TCP server there says.
    pub fn ask(&self, address: &str) -> std::io::Result<String> {
        let address: SocketAddr = address.parse().expect("address");
        self.within(move || {
            let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
            stream.set_read_timeout(Some(LIMIT))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
    }

    /// What an HTTP server there says to `GET /`, with its headers.
    pub fn http(&self, address: &str) -> std::io::Result<String> {
        let address: SocketAddr = address.parse().expect("address");
        self.within(move || {
            let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
    }

    /// What a UDP server there says.
    pub fn ask_udp(&self, address: &str) -> std::io::Result<String> {
        let address: SocketAddr = address.parse().expect("address");
        self.within(move || {
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.set_read_timeout(Some(LIMIT))?;
            socket.connect(address)?;
            socket.send(b"?")?;
            let mut buffer = [0; 64];
            let length = socket.recv(&mut buffer)?;
            Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Threads that still serve in it keep it alive, nameless, until the test's process ends.
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}
