//! `/portForward`: connections to the ports of a pod, many of them over one SPDY connection.
//!
//! The SPDY connection is the upgraded one itself, or it runs through the binary messages of a WebSocket (kubectl
//! from 1.31 on). For each connection the client opens a pair of streams with the same `requestID`: *data*, and
//! *error* for a message when there is no connection. The sockets are made inside the pod's network namespace, so a
//! server that listens on its loopback address only is reached too.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cni_netlink::NetNs;
use futures::{SinkExt as _, StreamExt as _, future};
use http::{HeaderMap, Request, Response};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};
use tokio_util::io::{CopyToBytes, SinkWriter, StreamReader as MessageReader};
use tracing::debug;

use crate::server::spdy::{self, Connection, Stream, StreamReader, StreamWriter};
use crate::server::{Body, websocket};

/// Stream protocols of an upgrade to SPDY.
const PROTOCOLS: [&str; 1] = ["portforward.k8s.io"];
/// Sub-protocol of a WebSocket whose messages are pieces of a SPDY connection.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// Largest message of a tunnel. kubectl's have up to 32 KiB.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// How long a stream waits for the other one of its pair (kubelet's default).
const PAIR_LIMIT: Duration = Duration::from_secs(30);
/// How long a port may take to answer. It is on this node: a refusal is immediate, only a full queue takes time.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long the client may go on sending to a server that has said all it will say.
const LINGER: Duration = Duration::from_secs(10);
/// Most bytes read from the pod at once.
const PIECE_BYTES: usize = 32 << 10;

/// Whose ports.
#[derive(Debug)]
pub(super) struct Target {
    /// For messages: namespace and name.
    pub(super) pod: String,
    /// Where the pod's network namespace is held open; `None` for a pod in the node's.
    pub(super) netns: Option<PathBuf>,
    pub(super) pod_ips: Vec<IpAddr>,
}

/// Answers with 101 and forwards beside the connection.
pub(super) fn answer(mut request: Request<Incoming>, target: Target) -> Response<Body> {
    let (answer, tunnel) = if spdy::is_asked_for(request.headers()) {
        match spdy::choose_protocol(request.headers(), &PROTOCOLS) {
            Some(protocol) => (spdy::switching(protocol), false),
            None => return spdy::no_protocol(&PROTOCOLS),
        }
    } else {
        let offers_tunnel = |headers: &HeaderMap| {
            websocket::offered(headers).contains(&TUNNEL).then_some((Some(TUNNEL), ()))
        };
        match websocket::accept(&request, offers_tunnel) {
            Ok((answer, ())) => (answer, true),
            Err(refused) => return refused,
        }
    };
    let upgrade = hyper::upgrade::on(&mut request);
    // Lives as long as the connection: the client closing it ends the task.
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) if tunnel => run(connect_tunnel(upgraded).await, target).await,
            Ok(upgraded) => {
                let (reader, writer) = tokio::io::split(TokioIo::new(upgraded));
                run(Connection::new(reader, writer), target).await;
            }
            Err(error) => debug!(%error, "upgrade for a port-forward"),
        }
    });
    answer
}

/// SPDY through the binary messages of a WebSocket, which may be cut anywhere.
async fn connect_tunnel(upgraded: Upgraded) -> Connection {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    let io = TokioIo::new(upgraded);
    connection_over(WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await)
}

fn connection_over<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    socket: WebSocketStream<S>,
) -> Connection {
    let (sink, messages) = socket.split();
    let pieces = messages.filter_map(|message| {
        future::ready(match message {
            Ok(Message::Binary(bytes)) => Some(Ok(bytes)),
            Ok(_) => None,
            Err(WebSocketError::ConnectionClosed) => None,
            Err(error) => Some(Err(io::Error::other(error))),
        })
    });
    let sink = sink
        .with(|bytes: Bytes| future::ready(Ok::<_, WebSocketError>(Message::Binary(bytes))))
        .sink_map_err(io::Error::other);
    Connection::new(MessageReader::new(pieces), SinkWriter::new(CopyToBytes::new(sink)))
}

/// The stream of a pair that came first.
struct Half {
    stream: Stream,
    is_data: bool,
    since: Instant,
}

/// Takes stream pairs until the client hangs up.
async fn run(mut connection: Connection, target: Target) {
    let target = Arc::new(target);
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut forwards = JoinSet::new();
    let mut expiry = tokio::time::interval(PAIR_LIMIT);
    loop {
        let stream = tokio::select! {
            stream = connection.accept() => stream,
            Some(_) = forwards.join_next() => continue,
            _ = expiry.tick() => {
                halves.retain(|_, half| half.since.elapsed() < PAIR_LIMIT);
                continue;
            }
        };
        let Some(stream) = stream else { break };
        let is_data = match stream.headers.get("streamtype") {
            Some("data") => true,
            Some("error") => false,
            // Dropped, so reset.
            _ => continue,
        };
        let request = match stream.headers.get("requestid") {
            Some(id) => id.to_owned(),
            // Clients before requestID open the error stream and right after it the data stream.
            None => stream.id.saturating_sub(if is_data { 2 } else { 0 }).to_string(),
        };
        let other = match halves.remove(&request) {
            Some(other) if other.is_data != is_data => other.stream,
            // The first of its pair, or a second one of its type that takes the place of the first.
            _ => {
                halves.insert(request, Half { stream, is_data, since: Instant::now() });
                continue;
            }
        };
        let (data, error) = if is_data { (stream, other) } else { (other, stream) };
        forwards.spawn(forward(target.clone(), data, error));
    }
}

/// One connection, from its pair of streams to its end.
async fn forward(target: Arc<Target>, data: Stream, error: Stream) {
    let Stream { headers, reader, writer, .. } = data;
    // The client reads nothing but its end on the one, and sends nothing on the other.
    let Stream { writer: mut error, reader: _unread, .. } = error;
    let port = headers.get("port").unwrap_or_default();
    let connected = match port.parse() {
        Ok(0) | Err(_) => Err(format!("{port:?} is not a port")),
        Ok(port) => target.connect(port).await,
    };
    match connected {
        Ok(socket) => carry(socket, reader, writer, error).await,
        Err(reason) => {
            let text = format!("error forwarding port {port} to pod {}: {reason}", target.pod);
            let _ = error.send(text.as_bytes()).await;
            error.finish().await;
            writer.finish().await;
        }
    }
}

/// Carries bytes both ways; each side may end before the other.
async fn carry(
    socket: TcpStream,
    mut reader: StreamReader,
    mut writer: StreamWriter,
    error: StreamWriter,
) {
    let _ = socket.set_nodelay(true);
    let (mut from_pod, mut to_pod) = socket.into_split();
    let upload = async move {
        while let Some(bytes) = reader.next().await {
            if to_pod.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = to_pod.shutdown().await;
    };
    let download = async move {
        let mut piece = BytesMut::new();
        loop {
            piece.reserve(PIECE_BYTES);
            let read = tokio::select! {
                read = from_pod.read_buf(&mut piece) => read,
                () = writer.gone() => break,
            };
            match read {
                Ok(0) | Err(_) => break,
                Ok(_) if writer.send(&piece.split()).await.is_err() => break,
                Ok(_) => {}
            }
        }
        writer.finish().await;
        // The client waits for the end of both before it closes its own connection.
        error.finish().await;
    };
    let mut upload = std::pin::pin!(upload);
    let mut download = std::pin::pin!(download);
    tokio::select! {
        () = &mut upload => download.await,
        () = &mut download => {
            let _ = tokio::time::timeout(LINGER, upload).await;
        }
    }
}

impl Target {
    /// Connects to a port on the pod's loopback address, else on its own addresses.
    ///
    /// # Errors
    /// Why the first of them cannot be reached.
    pub(super) async fn connect(&self, port: u16) -> Result<TcpStream, String> {
        let mut first = None;
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        for ip in std::iter::once(loopback).chain(self.pod_ips.iter().copied()) {
            let connected = async {
                let socket = self.socket(ip).await?;
                tokio::time::timeout(CONNECT_LIMIT, socket.connect((ip, port).into()))
                    .await
                    .map_err(io::Error::from)?
            };
            match connected.await {
                Ok(socket) => return Ok(socket),
                Err(error) => {
                    first.get_or_insert_with(|| {
                        format!("connect to {ip}:{port} in the pod: {error}")
                    });
                }
            }
        }
        Err(first.unwrap_or_default())
    }

    /// A socket belongs to the namespace of the thread that makes it, whoever connects it.
    async fn socket(&self, ip: IpAddr) -> io::Result<TcpSocket> {
        let make = move || if ip.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let Some(path) = self.netns.clone() else { return make() };
        let made = tokio::task::spawn_blocking(move || -> anyhow::Result<TcpSocket> {
            NetNs::open(path)?.run(|| Ok(make()?))
        });
        made.await.map_err(io::Error::other)?.map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::server::spdy::tests::Client;

    /// A pod in this namespace, with a server that answers everything it gets with itself, then an exclamation mark.
    async fn pod() -> (u16, Target) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut all = Vec::new();
                    socket.read_to_end(&mut all).await.expect("read");
                    all.push(b'!');
                    socket.write_all(&all).await.expect("written");
                });
            }
        });
        (port, Target { pod: "shop/web".to_owned(), netns: None, pod_ips: Vec::new() })
    }

    #[tokio::test]
    async fn pairs_of_streams_are_connections_whichever_stream_comes_first() {
        let (port, target) = pod().await;
        let (mut client, connection) = Client::connect();
        let forwarding = tokio::spawn(run(connection, target));
        let port = port.to_string();
        let headers =
            |kind, request| [("streamType", kind), ("port", &*port), ("requestID", request)];
        client.open(1, headers("error", "0")).await;
        client.open(3, headers("data", "1")).await;
        client.open(5, headers("data", "0")).await;
        client.open(7, headers("error", "1")).await;
        client.data(3, true, b"one").await;
        client.data(5, true, b"zero").await;
        let [error, one, zero, other] = client.read_to_end([1, 3, 5, 7]).await;
        assert_eq!((one, zero), (b"one!".to_vec(), b"zero!".to_vec()));
        assert!(error.is_empty() && other.is_empty());
        drop(client);
        forwarding.await.expect("ended with the client");
    }

    #[tokio::test]
    async fn pairs_without_a_request_id_are_found_by_their_order() {
        let (port, target) = pod().await;
        let (mut client, connection) = Client::connect();
        tokio::spawn(run(connection, target));
        let port = port.to_string();
        client.open(1, [("streamType", "error"), ("port", &port)]).await;
        client.open(3, [("streamType", "data"), ("port", &port)]).await;
        client.data(3, true, b"x").await;
        assert_eq!(client.read_to_end([1, 3]).await, [b"".to_vec(), b"x!".to_vec()]);
    }

    #[tokio::test]
    async fn a_port_that_is_closed_is_named_on_the_error_stream() {
        let (mut client, connection) = Client::connect();
        let target = Target { pod: "shop/web".to_owned(), netns: None, pod_ips: Vec::new() };
        tokio::spawn(run(connection, target));
        for (id, port, words) in [(1, "1", "127.0.0.1:1 in the pod"), (5, "0", "not a port")] {
            client.open(id, [("streamType", "error"), ("port", port), ("requestID", port)]).await;
            client
                .open(id + 2, [("streamType", "data"), ("port", port), ("requestID", port)])
                .await;
            let [error, data] = client.read_to_end([id, id + 2]).await;
            let error = String::from_utf8_lossy(&error).into_owned();
            assert!(error.contains(words) && error.contains("shop/web"), "{error}");
            assert!(data.is_empty());
        }
    }

    #[tokio::test]
    async fn a_message_may_be_cut_anywhere_in_a_tunnel() {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let server = WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
        let mut client = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
        let mut connection = connection_over(server);
        for byte in *b"\x80\x03\x00\x06\0\0\0\x04\0\0\0\x09" {
            client.send(Message::Binary(vec![byte].into())).await.expect("sent");
        }
        let echo = client.next().await.expect("a message").expect("a message");
        assert_eq!(echo.into_data().as_ref(), b"\x80\x03\x00\x06\0\0\0\x04\0\0\0\x09");
        client.close(None).await.expect("closed");
        assert!(connection.accept().await.is_none());
    }
}
