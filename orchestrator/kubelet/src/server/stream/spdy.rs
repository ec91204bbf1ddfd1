//! A remote command over SPDY streams, as kubectl up to 1.29 does it, and every kubectl behind a proxy that knows no
//! WebSockets.
//!
//! The client opens one stream for each of error, stdin, stdout, stderr and resize that it wants, and the header
//! `streamType` says which is which. The command starts when all are there; how it ended is written to the error
//! stream, in v4 as a Status in JSON.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use orch_cri::ExecSpec;
use tracing::debug;

use super::{Input, Session, Sink, Size, Source, plain_status, status, transfer};
use crate::context::Context;
use crate::server::Body;
use crate::server::spdy::{
    self, Connection, Gone, Stream, StreamReader, StreamWriter, choose_protocol,
};

/// Protocols, the best first.
const PROTOCOLS: [&str; 4] =
    ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];

/// How long the client may take to open its streams (kubelet's default).
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// Longest text of a terminal's size; more than that without one is nonsense.
const MAX_SIZE_BYTES: usize = 1024;

/// What later protocols have that earlier ones have not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Protocol {
    /// A resize stream (v3).
    resize: bool,
    /// The outcome as a Status in JSON (v4).
    status: bool,
}

impl Protocol {
    fn named(name: &str) -> Self {
        Self {
            resize: name.starts_with("v4") || name.starts_with("v3"),
            status: name.starts_with("v4"),
        }
    }
}

pub(super) fn answer(
    cx: &Arc<Context>,
    mut request: Request<Incoming>,
    session: Session,
) -> Response<Body> {
    let Some(name) = choose_protocol(request.headers(), &PROTOCOLS) else {
        return spdy::no_protocol(&PROTOCOLS);
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let cx = cx.clone();
    // The session lives as long as its connection: either end closing it ends the task.
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let (reader, writer) = tokio::io::split(TokioIo::new(upgraded));
                let connection = Connection::new(reader, writer);
                run(&cx, connection, Protocol::named(name), session).await;
            }
            Err(error) => debug!(%error, "upgrade for a remote command"),
        }
    });
    spdy::switching(name)
}

/// Runs a session to its end.
async fn run(cx: &Arc<Context>, mut connection: Connection, protocol: Protocol, session: Session) {
    let opened = Opened::collect(&mut connection, session.streams(), protocol);
    let Ok(Some(opened)) = tokio::time::timeout(OPEN_LIMIT, opened).await else {
        debug!("a client did not open the streams of its remote command");
        return;
    };
    connection.refuse_more();
    let Opened { error, stdin, stdout, stderr, resize } = opened;
    let Some(mut error) = error.map(|stream| stream.writer) else { return };
    let (stdin, stdin_back) = stdin.map(|stream| (stream.reader, stream.writer)).unzip();
    // Our side of the resize stream is never used, and dropping it would reset the stream.
    let (resize, resize_back) = resize.map(|stream| (stream.reader, stream.writer)).unzip();
    let mut sink = Outputs {
        stdout: stdout.map(|stream| stream.writer),
        stderr: stderr.map(|stream| stream.writer),
    };
    let mut source = Inputs { connection: &connection, stdin, resize, size: Vec::new() };
    let Ok(outcome) = transfer(cx, &mut sink, &mut source, &session).await else {
        return;
    };
    // The client waits for the end of each.
    for writer in [sink.stdout, sink.stderr, stdin_back, resize_back].into_iter().flatten() {
        writer.finish().await;
    }
    let last =
        if protocol.status { Some(status(&outcome).to_string()) } else { plain_status(&outcome) };
    if let Some(text) = last {
        let _ = error.send(text.as_bytes()).await;
    }
    error.finish().await;
    connection.close().await;
}

/// The streams by their type.
#[derive(Default)]
struct Opened {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

impl Opened {
    /// Waits until the client has opened all that it wants; `None` if it hung up before.
    async fn collect(
        connection: &mut Connection,
        wanted: &ExecSpec,
        protocol: Protocol,
    ) -> Option<Self> {
        let mut opened = Self::default();
        while !opened.is_complete(wanted, protocol) {
            let stream = connection.accept().await?;
            let place = match stream.headers.get("streamtype") {
                Some("error") => &mut opened.error,
                Some("stdin") => &mut opened.stdin,
                Some("stdout") => &mut opened.stdout,
                Some("stderr") => &mut opened.stderr,
                Some("resize") => &mut opened.resize,
                // Dropped, so reset.
                _ => continue,
            };
            *place = Some(stream);
        }
        Some(opened)
    }

    fn is_complete(&self, wanted: &ExecSpec, protocol: Protocol) -> bool {
        self.error.is_some()
            && (self.stdin.is_some() || !wanted.stdin)
            && (self.stdout.is_some() || !wanted.stdout)
            // A terminal has one output.
            && (self.stderr.is_some() || !wanted.stderr || wanted.tty)
            && (self.resize.is_some() || !wanted.tty || !protocol.resize)
    }
}

struct Outputs {
    stdout: Option<StreamWriter>,
    stderr: Option<StreamWriter>,
}

impl Outputs {
    /// A client may close one output and go on with the other.
    async fn send(writer: &mut Option<StreamWriter>, bytes: &[u8]) {
        if let Some(open) = writer
            && open.send(bytes).await == Err(Gone)
        {
            *writer = None;
        }
    }
}

impl Sink for Outputs {
    async fn stdout(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        Self::send(&mut self.stdout, bytes).await;
        Ok(())
    }

    async fn stderr(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        Self::send(&mut self.stderr, bytes).await;
        Ok(())
    }

    /// The connection pings by itself.
    async fn ping(&mut self) -> Result<(), Gone> {
        Ok(())
    }
}

struct Inputs<'a> {
    connection: &'a Connection,
    stdin: Option<StreamReader>,
    resize: Option<StreamReader>,
    /// The beginning of a terminal's size.
    size: Vec<u8>,
}

/// The next bytes of a stream that is there.
async fn read(reader: &mut Option<StreamReader>) -> Option<bytes::Bytes> {
    match reader {
        Some(reader) => reader.next().await,
        None => std::future::pending().await,
    }
}

impl Source for Inputs<'_> {
    async fn next(&mut self) -> Option<Input> {
        loop {
            tokio::select! {
                biased;
                piece = read(&mut self.stdin) => match piece {
                    Some(bytes) => return Some(Input::Stdin(bytes)),
                    None => {
                        self.stdin = None;
                        return Some(Input::StdinEnd);
                    }
                },
                piece = read(&mut self.resize) => match piece {
                    Some(bytes) => {
                        self.size.extend_from_slice(&bytes);
                        if let Some(size) = take_size(&mut self.size) {
                            return Some(Input::Resize(size));
                        }
                    }
                    None => self.resize = None,
                },
                () = self.connection.hung_up() => return None,
            }
        }
    }
}

/// The last complete size in a run of JSON objects, which are taken out.
fn take_size(text: &mut Vec<u8>) -> Option<Size> {
    let mut values = serde_json::Deserializer::from_slice(text).into_iter::<Size>();
    let mut last = None;
    let mut end = 0;
    while let Some(Ok(size)) = values.next() {
        last = Some(size);
        end = values.byte_offset();
    }
    text.drain(..end);
    if text.len() > MAX_SIZE_BYTES {
        text.clear();
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_found_however_they_are_cut() {
        let mut text = b"{\"Width\":80,\"Height\":24}\n{\"Width\":1".to_vec();
        assert_eq!(take_size(&mut text), Some(Size { width: 80, height: 24 }));
        assert_eq!(take_size(&mut text), None);
        text.extend_from_slice(b"00,\"Height\":30}\n");
        assert_eq!(take_size(&mut text), Some(Size { width: 100, height: 30 }));
        text.extend(vec![b'{'; 5000]);
        assert_eq!(take_size(&mut text), None);
        assert!(text.is_empty());
    }
}
