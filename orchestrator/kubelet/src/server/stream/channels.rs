//! A remote command over WebSocket channels.
//!
//! Each binary message begins with its channel: 0 stdin, 1 stdout, 2 stderr, 3 the final status, 4 terminal size,
//! and 255 closes another channel (v5).

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tracing::debug;

use super::{Input, Session, Sink, Source, plain_status, status, transfer};
use crate::context::Context;
use crate::server::Body;
use crate::server::spdy::Gone;
use crate::server::websocket::{self, Protocol};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// Largest message taken from a client. kubectl sends 32 KiB, other clients some more.
const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// How long the other side may take to answer our Close.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

pub(super) fn answer(
    cx: &Arc<Context>,
    mut request: Request<Incoming>,
    session: Session,
) -> Response<Body> {
    let (answer, protocol) = match websocket::accept(&request, websocket::choose) {
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
pub(crate) async fn run<S: AsyncRead + AsyncWrite + Send + Unpin>(
    cx: &Arc<Context>,
    socket: WebSocketStream<S>,
    protocol: Protocol,
    session: Session,
) {
    let (sink, messages) = socket.split();
    let mut sink = Messages(sink);
    let mut source = Channels { messages, protocol };
    let Ok(outcome) = transfer(cx, &mut sink, &mut source, &session).await else {
        return;
    };
    let last = match protocol {
        Protocol::V5 | Protocol::V4 => Some(status(&outcome).to_string()),
        Protocol::V1 => plain_status(&outcome),
    };
    if let Some(text) = last {
        let _ = sink.send(STATUS, text.as_bytes()).await;
    }
    // An empty Close (1005) makes kubectl report an error.
    let close = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    if sink.0.send(Message::Close(Some(close))).await.is_ok() {
        // Until the answer comes: closing earlier could throw away what the client has not read yet.
        let drained = async { while let Some(Ok(_)) = source.messages.next().await {} };
        let _ = tokio::time::timeout(CLOSE_LIMIT, drained).await;
    }
}

struct Messages<S>(SplitSink<WebSocketStream<S>, Message>);

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Messages<S> {
    async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<(), Gone> {
        let mut whole = BytesMut::with_capacity(bytes.len() + 1);
        whole.put_u8(channel);
        whole.put_slice(bytes);
        self.0.send(Message::Binary(whole.freeze())).await.map_err(|_| Gone)
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Sink for Messages<S> {
    async fn stdout(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        self.send(STDOUT, bytes).await
    }

    async fn stderr(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        self.send(STDERR, bytes).await
    }

    async fn ping(&mut self) -> Result<(), Gone> {
        self.0.send(Message::Ping(Bytes::new())).await.map_err(|_| Gone)
    }
}

struct Channels<S> {
    messages: SplitStream<WebSocketStream<S>>,
    protocol: Protocol,
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Source for Channels<S> {
    async fn next(&mut self) -> Option<Input> {
        loop {
            let mut bytes = match self.messages.next().await? {
                Ok(Message::Binary(bytes)) => bytes,
                Ok(Message::Text(text)) => Bytes::copy_from_slice(text.as_bytes()),
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => continue,
            };
            if bytes.is_empty() {
                continue;
            }
            match (bytes.get_u8(), &bytes[..]) {
                (STDIN, _) => return Some(Input::Stdin(bytes)),
                (CLOSE, [STDIN, ..]) if self.protocol == Protocol::V5 => {
                    return Some(Input::StdinEnd);
                }
                (RESIZE, size) => {
                    if let Ok(size) = serde_json::from_slice(size) {
                        return Some(Input::Resize(size));
                    }
                }
                _ => {}
            }
        }
    }
}
