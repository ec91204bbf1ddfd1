//! `/exec` and `/attach`: a command's streams over WebSocket channels.
//!
//! Each binary message begins with its channel: 0 stdin, 1 stdout, 2 stderr, 3 the final status, 4 terminal size,
//! and 255 closes another channel (v5). Back-pressure is that of the sockets: a message is read only when the bytes
//! of the one before are with the command.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use orch_cri::{Error, ExecSpec, Output};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tracing::debug;

use crate::context::Context;
use crate::server::Body;
use crate::server::websocket::{self, Protocol};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// Largest message taken from a client. kubectl sends 32 KiB, other clients some more.
const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Largest piece of output in one message.
const MAX_PIECE_BYTES: usize = 64 << 10;
/// Keeps proxies on the way from closing a silent session.
const PING_EVERY: Duration = Duration::from_secs(20);
/// How long the other side may take to answer our Close.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// What the streams belong to.
#[derive(Debug)]
pub(crate) enum Session {
    /// A new command in this container.
    Exec(String, ExecSpec),
    /// This container's own process; whether it has a terminal.
    Attach(String, ExecSpec, bool),
}

type Sink<S> = SplitSink<WebSocketStream<S>, Message>;
type Source<S> = SplitStream<WebSocketStream<S>>;

/// Answers with 101 and runs the session beside the connection.
pub(super) fn answer(
    cx: &Arc<Context>,
    mut request: Request<Incoming>,
    session: Session,
) -> Response<Body> {
    let (answer, protocol) = match websocket::accept(&request) {
        Ok(accepted) => accepted,
        Err(refused) => return refused,
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let cx = cx.clone();
    // The session lives as long as its connection: either end closing it ends the task.
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let config = WebSocketConfig::default()
                    .max_message_size(Some(MAX_MESSAGE_BYTES))
                    .max_frame_size(Some(MAX_MESSAGE_BYTES));
                let io = TokioIo::new(upgraded);
                let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
                run(&cx, socket, protocol, session).await;
            }
            Err(error) => debug!(%error, "upgrade for a remote command"),
        }
    });
    answer
}

/// Runs a session to its end.
pub(crate) async fn run<S: AsyncRead + AsyncWrite + Unpin>(
    cx: &Arc<Context>,
    socket: WebSocketStream<S>,
    protocol: Protocol,
    session: Session,
) {
    let (mut sink, mut messages) = socket.split();
    let Ok(outcome) = transfer(cx, &mut sink, &mut messages, protocol, session).await else {
        return;
    };
    let last = match protocol {
        Protocol::V5 | Protocol::V4 => Some(status(&outcome).to_string()),
        Protocol::V1 => match &outcome {
            Ok(0) => None,
            Ok(code) => Some(failure_text(*code)),
            Err(error) => Some(error.to_string()),
        },
    };
    if let Some(text) = last {
        let _ = sink.send(message(STATUS, text.as_bytes())).await;
    }
    // An empty Close (1005) makes kubectl report an error.
    let close = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    if sink.send(Message::Close(Some(close))).await.is_ok() {
        // Until the answer comes: closing earlier could throw away what the client has not read yet.
        let drained = async { while let Some(Ok(_)) = messages.next().await {} };
        let _ = tokio::time::timeout(CLOSE_LIMIT, drained).await;
    }
}

/// The connection is gone: there is nobody to tell.
struct Gone;

/// The command's exit code, or why there is none.
type Outcome = Result<i64, Error>;

async fn transfer<S: AsyncRead + AsyncWrite + Unpin>(
    cx: &Arc<Context>,
    sink: &mut Sink<S>,
    messages: &mut Source<S>,
    protocol: Protocol,
    session: Session,
) -> Result<Outcome, Gone> {
    let runtime = cx.runtime();
    let (opened, streams, tty, exec) = match &session {
        Session::Exec(container, spec) => {
            (runtime.exec(container, spec).await, spec.clone(), spec.tty, true)
        }
        Session::Attach(container, spec, tty) => {
            (runtime.attach(container, spec.stdin).await, spec.clone(), *tty, false)
        }
    };
    let orch_cri::Session { id, mut output, input } = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(Err(error)),
    };
    let mut incoming = std::pin::pin!(receive(
        cx,
        messages,
        streams.stdin.then_some(input),
        protocol,
        &id,
        tty,
        exec
    ));
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.reset();
    loop {
        tokio::select! {
            piece = output.next() => match piece {
                Some(Ok(piece)) => if send_output(sink, &streams, piece).await.is_err() {
                    return Err(Gone);
                },
                Some(Err(error)) => {
                    debug!(%error, "output of a remote command");
                    break;
                }
                None => break,
            },
            // The client went away, or said all it will say.
            () = &mut incoming => return Err(Gone),
            _ = pings.tick() => if sink.send(Message::Ping(Bytes::new())).await.is_err() {
                return Err(Gone);
            },
        }
    }
    if !exec {
        return Ok(Ok(0));
    }
    Ok(crate::exec::exit_code(runtime, &id).await)
}

async fn send_output<S: AsyncRead + AsyncWrite + Unpin>(
    sink: &mut Sink<S>,
    streams: &ExecSpec,
    piece: Output,
) -> Result<(), tokio_tungstenite::tungstenite::Error> {
    let (channel, wanted, bytes) = match piece {
        Output::Stdout(bytes) => (STDOUT, streams.stdout, bytes),
        Output::Stderr(bytes) => (STDERR, streams.stderr, bytes),
    };
    if !wanted {
        return Ok(());
    }
    for part in bytes.chunks(MAX_PIECE_BYTES) {
        sink.send(message(channel, part)).await?;
    }
    Ok(())
}

fn message(channel: u8, bytes: &[u8]) -> Message {
    let mut whole = BytesMut::with_capacity(bytes.len() + 1);
    whole.put_u8(channel);
    whole.put_slice(bytes);
    Message::Binary(whole.freeze())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

/// Carries stdin and terminal sizes to the command, until the connection ends.
async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    cx: &Arc<Context>,
    messages: &mut Source<S>,
    mut input: Option<std::pin::Pin<Box<dyn AsyncWrite + Send>>>,
    protocol: Protocol,
    id: &str,
    tty: bool,
    exec: bool,
) {
    while let Some(message) = messages.next().await {
        let bytes = match message {
            Ok(Message::Binary(bytes)) => bytes,
            Ok(Message::Text(text)) => Bytes::copy_from_slice(text.as_bytes()),
            Ok(Message::Close(_)) | Err(_) => return,
            Ok(_) => continue,
        };
        match (bytes.first().copied(), bytes.get(1..).unwrap_or_default()) {
            (Some(STDIN), data) => {
                if let Some(writer) = &mut input
                    && writer.write_all(data).await.is_err()
                {
                    // The command does not read any more; what it says still counts.
                    input = None;
                }
            }
            (Some(CLOSE), [STDIN, ..]) if protocol == Protocol::V5 => {
                if let Some(mut writer) = input.take() {
                    let _ = writer.shutdown().await;
                }
            }
            (Some(RESIZE), data) if tty => {
                if let Ok(Size { width, height }) = serde_json::from_slice(data) {
                    let resized = match exec {
                        true => cx.runtime().resize_exec(id, width, height).await,
                        false => cx.runtime().resize(id, width, height).await,
                    };
                    if let Err(error) = resized {
                        debug!(%error, "resize terminal");
                    }
                }
            }
            _ => {}
        }
    }
}

fn failure_text(code: i64) -> String {
    format!("command terminated with non-zero exit code: exit status {code}")
}

/// The Status that ends a session; `kubectl` takes its exit code from the cause `ExitCode`.
fn status(outcome: &Outcome) -> Value {
    match outcome {
        Ok(0) => json!({ "metadata": {}, "status": "Success" }),
        Ok(code) => json!({
            "metadata": {},
            "status": "Failure",
            "message": failure_text(*code),
            "reason": "NonZeroExitCode",
            "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
        }),
        Err(error) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("error executing command in container: {error}"),
            "reason": "InternalError",
            "code": 500,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_carries_the_exit_code() {
        assert_eq!(status(&Ok(0))["status"], "Success");
        let failed = status(&Ok(7));
        assert_eq!(failed["reason"], "NonZeroExitCode");
        assert_eq!(failed["details"]["causes"][0], json!({ "reason": "ExitCode", "message": "7" }));
    }
}
