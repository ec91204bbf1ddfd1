//! As much of a CRI client as a kubelet needs to have one pod: gRPC is one HTTP/2 request per call, and its messages are
//! protocol buffers of a handful of fields (`runtime.v1`, `k8s.io/cri-api`). Debian has no `crictl`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tests_conformance::Result;
use tokio::net::UnixStream;
use tokio::runtime::Builder;

/// gRPC puts a flag and a length before each message.
const PREFIX_BYTES: usize = 5;

/// A message that is being written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// A text, by the number of its field.
    pub(crate) fn text(self, field: u32, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    /// A message inside.
    pub(crate) fn message(self, field: u32, message: &Self) -> Self {
        self.bytes(field, &message.0)
    }

    /// A number; 0 is what a field is without one.
    pub(crate) fn number(mut self, field: u32, number: u32) -> Self {
        self.varint(field << 3);
        self.varint(number);
        self
    }

    fn bytes(mut self, field: u32, bytes: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.0.extend(bytes);
        self
    }

    fn varint(&mut self, mut number: u32) {
        while number >= 0x80 {
            self.0.push((number & 0x7f) as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }
}

/// The first value of a field that has a length: a text, or a message.
fn field(mut message: &[u8], wanted: u64) -> Option<&[u8]> {
    while !message.is_empty() {
        let key = take_varint(&mut message)?;
        let value = match key & 7 {
            0 => {
                take_varint(&mut message)?;
                continue;
            }
            2 => {
                let length = usize::try_from(take_varint(&mut message)?).ok()?;
                let (value, rest) = message.split_at_checked(length)?;
                message = rest;
                value
            }
            _ => return None,
        };
        if key >> 3 == wanted {
            return Some(value);
        }
    }
    None
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The text at the end of a path of fields.
pub(crate) fn text_at(message: &[u8], path: &[u64]) -> Result<String> {
    let mut at = message;
    for number in path {
        at = field(at, *number).with_context(|| format!("the answer has no field {path:?}"))?;
    }
    Ok(String::from_utf8(at.to_vec())?)
}

/// A runtime behind a socket.
pub(crate) struct Cri {
    socket: PathBuf,
}

impl Cri {
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Calls a method of the runtime service.
    pub(crate) fn call(&self, method: &str, request: Message) -> Result<Vec<u8>> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.send(method, request)).with_context(|| method.to_owned())
    }

    async fn send(&self, method: &str, message: Message) -> Result<Vec<u8>> {
        let stream = UnixStream::connect(&self.socket).await.context("connect to the runtime")?;
        let (mut sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let mut body = vec![0];
        body.extend(u32::try_from(message.0.len())?.to_be_bytes());
        body.extend(message.0);
        let request = Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        let headers = response.headers().clone();
        let collected = response.into_body().collect().await?;
        let trailers = collected.trailers().cloned().unwrap_or_default();
        connection.abort();
        let said = |name: &str| {
            let value = trailers.get(name).or_else(|| headers.get(name))?;
            Some(value.to_str().unwrap_or_default().to_owned())
        };
        match said("grpc-status").as_deref() {
            Some("0") => {}
            status => bail!("status {status:?}: {}", said("grpc-message").unwrap_or_default()),
        }
        let answer = collected.to_bytes();
        ensure!(answer.len() >= PREFIX_BYTES, "an answer of {} bytes", answer.len());
        Ok(answer[PREFIX_BYTES..].to_vec())
    }
}
