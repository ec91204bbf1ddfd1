//! The tutorial's web server: answers `Container Hostname: <hostname>` on port 8080.
//!
//! Made for an empty image: one static binary that is also its own tool box, because an image without a base
//! has no shell, no `cat` and no `wget`:
//!
//! | call | does |
//! | --- | --- |
//! | `nodeinfo` | serves; SIGTERM: goes on serving for [`LAME_DUCK`], then leaves |
//! | `nodeinfo fetch URL [COUNT]` | prints what an `http://` URL answers |
//! | `nodeinfo resolve NAME` | prints the addresses of a name |
//! | `nodeinfo cat` | copies stdin to stdout |
//! | `nodeinfo exit CODE` | leaves with that code |
//!
//! Paths: `/` the host name, `/bytes/N` N bytes (at most [`MAX_BYTES`]), `/healthz` `ok`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, ToSocketAddrs as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const PORT: u16 = 8080;
/// How long the server goes on after SIGTERM: load balancers need a moment to see that the pod is leaving.
const LAME_DUCK: Duration = Duration::from_secs(2);
/// A connection without a request is closed after this time.
const IDLE: Duration = Duration::from_secs(60);
/// Upper bound of `/bytes/N`.
const MAX_BYTES: usize = 1 << 30;

static TERMINATED: AtomicBool = AtomicBool::new(false);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        [] | ["serve"] => serve(),
        ["fetch", url] => fetch(url, 1),
        ["fetch", url, count] => {
            count.parse().map_err(std::io::Error::other).and_then(|count| fetch(url, count))
        }
        ["resolve", name] => resolve(name),
        ["cat"] => {
            std::io::copy(&mut std::io::stdin().lock(), &mut std::io::stdout().lock()).map(|_| ())
        }
        ["exit", code] => std::process::exit(code.parse().unwrap_or(2)),
        _ => {
            eprintln!(
                "usage: nodeinfo [serve | fetch URL [COUNT] | resolve NAME | cat | exit CODE]"
            );
            std::process::exit(2);
        }
    };
    if let Err(error) = outcome {
        eprintln!("nodeinfo: {error}");
        std::process::exit(1);
    }
}

fn serve() -> std::io::Result<()> {
    // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
    unsafe {
        libc::signal(
            libc::SIGTERM,
            on_terminate as extern "C" fn(libc::c_int) as libc::sighandler_t,
        );
        libc::signal(
            libc::SIGINT,
            on_terminate as extern "C" fn(libc::c_int) as libc::sighandler_t,
        );
    }
    std::thread::spawn(|| {
        while !TERMINATED.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(LAME_DUCK);
        std::process::exit(0);
    });
    let listener =
        TcpListener::bind(("::", PORT)).or_else(|_| TcpListener::bind(("0.0.0.0", PORT)))?;
    eprintln!("nodeinfo: serving on port {PORT} as {}", hostname());
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                std::thread::spawn(move || {
                    // A peer that goes away in the middle is not our failure.
                    let _ = answer_all(stream);
                });
            }
            Err(error) => eprintln!("nodeinfo: accept: {error}"),
        }
    }
    Ok(())
}

extern "C" fn on_terminate(_signal: libc::c_int) {
    TERMINATED.store(true, Ordering::Relaxed);
}

/// Answers every request of one connection (HTTP/1.1, RFC 9112 §9.3).
fn answer_all(stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_nodelay(true)?;
    let mut requests = BufReader::new(stream.try_clone()?);
    let mut replies = stream;
    loop {
        let mut line = String::new();
        if requests.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split_whitespace().nth(1).unwrap_or("/").to_owned();
        let mut keep = line.trim_end().ends_with("HTTP/1.1") && !TERMINATED.load(Ordering::Relaxed);
        loop {
            let mut header = String::new();
            if requests.read_line(&mut header)? == 0 {
                return Ok(());
            }
            if header.trim_end().is_empty() {
                break;
            }
            keep &= !header.trim_end().eq_ignore_ascii_case("connection: close");
        }
        let (status, body) = body(&path);
        let connection = if keep { "keep-alive" } else { "close" };
        write!(
            replies,
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n",
            body.len()
        )?;
        replies.write_all(&body)?;
        if !keep {
            return Ok(());
        }
    }
}

fn body(path: &str) -> (&'static str, Vec<u8>) {
    match path {
        "/" => ("200 OK", format!("Container Hostname: {}\n", hostname()).into_bytes()),
        "/healthz" => ("200 OK", b"ok\n".to_vec()),
        _ => match path.strip_prefix("/bytes/").and_then(|count| count.parse::<usize>().ok()) {
            Some(count) if count <= MAX_BYTES => ("200 OK", vec![b'x'; count]),
            _ => ("404 Not Found", b"not found\n".to_vec()),
        },
    }
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}

fn fetch(url: &str, count: u32) -> std::io::Result<()> {
    let rest = url
        .strip_prefix("http://")
        .ok_or_else(|| std::io::Error::other(format!("{url} is no http:// URL")))?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let target =
        if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
    for _ in 0..count {
        let address = target
            .to_socket_addrs()?
            .next()
            .ok_or_else(|| std::io::Error::other(format!("{target} has no address")))?;
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")?;
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply)?;
        let split = reply
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .ok_or_else(|| std::io::Error::other("the answer is no HTTP"))?;
        std::io::stdout().write_all(&reply[split + 4..])?;
    }
    Ok(())
}

fn resolve(name: &str) -> std::io::Result<()> {
    for address in (name, 0).to_socket_addrs()? {
        println!("{}", address.ip());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the server answers to bytes of one connection.
    fn answers(request: &str) -> String {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("bind");
        let address = listener.local_addr().expect("address");
        let server = std::thread::spawn(move || answer_all(listener.accept().expect("accept").0));
        let mut client = TcpStream::connect(address).expect("connect");
        client.write_all(request.as_bytes()).expect("send");
        client.shutdown(std::net::Shutdown::Write).expect("end");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("read");
        server.join().expect("no panic").expect("no error");
        answer
    }

    #[test]
    fn requests_of_one_connection_are_answered_in_turn() {
        let answer = answers(
            "GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n",
        );
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 2, "{answer}");
        assert!(answer.contains(&format!("Container Hostname: {}", hostname())), "{answer}");
        assert!(answer.ends_with("Connection: close\r\n\r\nok\n"), "{answer}");
    }

    #[test]
    fn bytes_are_as_many_as_asked_for_and_not_too_many() {
        assert_eq!(body("/bytes/1000").1.len(), 1000);
        assert_eq!(body("/bytes/99999999999").0, "404 Not Found");
        assert_eq!(body("/other").0, "404 Not Found");
    }
}
