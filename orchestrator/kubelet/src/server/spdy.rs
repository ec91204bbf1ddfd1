//! SPDY/3.1, the server's side, as far as Kubernetes' streams need it: the other side opens streams, both sides send
//! on them, and each is closed by either side for itself.
//!
//! There is no flow control by windows: the client's library (spdystream) neither sends WINDOW_UPDATE nor looks at
//! one. What a connection may hold for its streams is bounded instead, and reading stops when it is full, which the
//! sender feels through TCP. Start with [`Connection::new`]; [`frame`] has the bytes, [`headers`] the compression.

mod frame;
mod headers;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::debug;

pub(crate) use self::headers::Headers;

use self::frame::{Decoder, Encoder, Frame, MAX_DATA_BYTES, Reset};
use crate::server::{Body, text};

/// Bytes that a connection holds for streams which are not read yet. 4 MiB keep a fast sender busy; one stream that
/// is not read at all holds up the others after that, as with the reference implementation.
const MAX_HELD_BYTES: usize = 4 << 20;
/// What a piece costs beside its bytes, so that many tiny ones do not add up.
const PIECE_COST_BYTES: usize = 256;
/// Streams open at once; a forwarded connection has two.
const MAX_STREAMS: usize = 4096;
/// Frames waiting to be sent, of at most 32 KiB; senders wait when it is full.
const MAX_OUTGOING: usize = 32;
/// Streams that were opened and are not taken over yet; reading stops when it is full.
const MAX_OPENED: usize = 32;
/// Room for each read. A data frame's payload is handed on in pieces of this size.
const READ_BYTES: usize = 32 << 10;
/// Keeps proxies on the way from closing a silent connection, and finds out when the other side is gone.
const PING_EVERY: Duration = Duration::from_secs(20);
/// How long the other side may take to hang up after it was told that all is over.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// Name of the upgrade (`Upgrade: SPDY/3.1`).
pub(super) const UPGRADE: &str = "SPDY/3.1";
const PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");

/// Whether a request asks for an upgrade to SPDY.
pub(super) fn is_asked_for(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(header::UPGRADE).iter();
    values.any(|value| value.as_bytes().eq_ignore_ascii_case(UPGRADE.as_bytes()))
}

/// The first of the client's stream protocols that is among ours. A client that names none speaks the oldest, which
/// is our last.
pub(super) fn choose_protocol(
    headers: &HeaderMap,
    ours: &'static [&'static str],
) -> Option<&'static str> {
    let offered: Vec<&str> = headers
        .get_all(PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    if offered.is_empty() {
        return ours.last().copied();
    }
    offered.iter().find_map(|offered| ours.iter().copied().find(|name| name == offered))
}

/// The 101 answer of an upgrade.
pub(super) fn switching(protocol: &'static str) -> Response<Body> {
    let mut answer = text(StatusCode::SWITCHING_PROTOCOLS, "");
    let headers = answer.headers_mut();
    headers.clear();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(UPGRADE));
    headers.insert(PROTOCOL, HeaderValue::from_static(protocol));
    answer
}

/// The answer to a client none of whose stream protocols is ours.
pub(super) fn no_protocol(ours: &[&str]) -> Response<Body> {
    let message =
        format!("unable to upgrade: no stream protocol in common; ours are {}", ours.join(", "));
    text(StatusCode::FORBIDDEN, &message)
}

/// The connection or the stream is over: there is nobody to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

/// A connection. Dropping it ends it at once; [`close`](Self::close) says goodbye first.
pub(crate) struct Connection {
    opened: mpsc::Receiver<Stream>,
    outgoing: mpsc::Sender<Bytes>,
    /// Cancelled when the other side has hung up or the connection broke.
    over: CancellationToken,
    _tasks: JoinSet<()>,
}

/// A stream that the other side opened.
pub(crate) struct Stream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    pub(crate) reader: StreamReader,
    pub(crate) writer: StreamWriter,
}

/// What the other side sends on a stream.
pub(crate) struct StreamReader(mpsc::UnboundedReceiver<Piece>);

/// Our side of a stream. Dropped before [`finish`](Self::finish), it resets the stream.
pub(crate) struct StreamWriter {
    id: u32,
    outgoing: mpsc::Sender<Bytes>,
    /// Cancelled when the other side resets the stream or hangs up.
    over: CancellationToken,
    /// Our side has sent all that it will, which the reading task wants to know.
    done: Arc<AtomicBool>,
}

struct Piece {
    bytes: Bytes,
    /// Its share of [`MAX_HELD_BYTES`], given back when the piece is taken.
    _held: OwnedSemaphorePermit,
}

impl Connection {
    /// Starts to read and write.
    pub(crate) fn new(
        reader: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Self {
        let (outgoing, frames) = mpsc::channel(MAX_OUTGOING);
        let (opened_in, opened) = mpsc::channel(MAX_OPENED);
        let over = CancellationToken::new();
        let incoming = Incoming {
            streams: HashMap::new(),
            last: 0,
            leaving: false,
            encoder: Encoder::new(),
            outgoing: outgoing.clone(),
            opened: opened_in,
            held: Arc::new(Semaphore::new(MAX_HELD_BYTES)),
            over: over.clone(),
        };
        let mut tasks = JoinSet::new();
        let ended = over.clone().drop_guard();
        tasks.spawn(async move {
            incoming.run(reader).await;
            drop(ended);
        });
        let ended = over.clone().drop_guard();
        tasks.spawn(async move {
            write(writer, frames).await;
            drop(ended);
        });
        Self { opened, outgoing, over, _tasks: tasks }
    }

    /// The next stream the other side opens; `None` when it has hung up.
    ///
    /// # Cancel safety
    /// No stream is lost when the future is dropped.
    pub(crate) async fn accept(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Streams opened from now on are refused.
    pub(crate) fn refuse_more(&mut self) {
        self.opened.close();
    }

    /// Ends when the other side has hung up.
    pub(crate) async fn hung_up(&self) {
        self.over.cancelled().await;
    }

    /// Tells the other side that all is said, and waits a moment for it to hang up: closing earlier could throw away
    /// what it has not read yet.
    pub(crate) async fn close(mut self) {
        self.refuse_more();
        // All that was said is written first, however slowly the other side reads.
        match self.outgoing.reserve_many(MAX_OUTGOING).await {
            Ok(mut room) => {
                if let Some(room) = room.next() {
                    room.send(frame::goaway(0));
                }
            }
            Err(_) => return,
        }
        let _ = tokio::time::timeout(CLOSE_LIMIT, self.over.cancelled()).await;
    }
}

impl StreamReader {
    /// The next bytes; `None` when the other side has finished, reset the stream or hung up.
    ///
    /// # Cancel safety
    /// No bytes are lost when the future is dropped.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.0.recv().await.map(|piece| piece.bytes)
    }
}

impl StreamWriter {
    /// Sends bytes.
    ///
    /// # Errors
    /// The other side does not want them any more.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        for part in bytes.chunks(MAX_DATA_BYTES) {
            self.frame(frame::data(self.id, false, part)).await?;
        }
        Ok(())
    }

    /// Ends our side of the stream.
    pub(crate) async fn finish(mut self) {
        let _ = self.frame(frame::data(self.id, true, &[])).await;
        self.done.store(true, Ordering::Release);
    }

    /// Ends when the other side has reset the stream or hung up.
    pub(crate) async fn gone(&self) {
        self.over.cancelled().await;
    }

    async fn frame(&mut self, frame: Bytes) -> Result<(), Gone> {
        tokio::select! {
            biased;
            () = self.over.cancelled() => Err(Gone),
            sent = self.outgoing.send(frame) => sent.map_err(|_| Gone),
        }
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.done.swap(true, Ordering::AcqRel) && !self.over.is_cancelled() {
            // With a full queue the other side learns it from the end of the connection.
            let _ = self.outgoing.try_send(frame::reset(self.id, Reset::Cancel));
        }
    }
}

/// Sends frames until nobody has any more.
async fn write(mut writer: impl AsyncWrite + Unpin, mut frames: mpsc::Receiver<Bytes>) {
    let mut encoder = Encoder::new();
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.reset();
    // The server's pings have even numbers.
    let mut ping = 0_u32;
    loop {
        let next = tokio::select! {
            next = frames.recv() => next,
            _ = pings.tick() => {
                ping = ping.wrapping_add(2);
                Some(encoder.encode(&Frame::Ping(ping)))
            }
        };
        let Some(mut frame) = next else { break };
        let sent = async {
            loop {
                writer.write_all(&frame).await?;
                match frames.try_recv() {
                    Ok(more) => frame = more,
                    Err(_) => return writer.flush().await,
                }
            }
        };
        if let Err(error) = sent.await {
            debug!(%error, "write SPDY frames");
            return;
        }
    }
    let _ = writer.shutdown().await;
}

/// A stream as the reading task sees it.
struct Entry {
    /// Gone once the other side has finished.
    pieces: Option<mpsc::UnboundedSender<Piece>>,
    over: CancellationToken,
    done: Arc<AtomicBool>,
}

/// The reading task: it alone opens streams and answers frames, so its replies keep their order.
struct Incoming {
    streams: HashMap<u32, Entry>,
    /// Highest stream the other side has opened.
    last: u32,
    /// The other side opens no more.
    leaving: bool,
    encoder: Encoder,
    outgoing: mpsc::Sender<Bytes>,
    opened: mpsc::Sender<Stream>,
    held: Arc<Semaphore>,
    over: CancellationToken,
}

impl Incoming {
    async fn run(mut self, mut reader: impl AsyncRead + Unpin) {
        let (mut decoder, mut buffer) = (Decoder::new(), BytesMut::new());
        loop {
            buffer.reserve(READ_BYTES);
            match reader.read_buf(&mut buffer).await {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    debug!(%error, "read SPDY frames");
                    return;
                }
            }
            loop {
                match decoder.next(&mut buffer) {
                    Ok(Some(frame)) => match self.handle(frame).await {
                        Ok(()) => {}
                        Err(Gone) => return,
                    },
                    Ok(None) => break,
                    Err(error) => {
                        debug!(%error, "the other side does not speak SPDY/3.1");
                        let _ = self.outgoing.send(frame::goaway(self.last)).await;
                        return;
                    }
                }
            }
        }
    }

    async fn handle(&mut self, frame: Frame) -> Result<(), Gone> {
        match frame {
            Frame::SynStream { id, fin, headers } => self.open(id, fin, headers).await,
            Frame::Data { id, fin, bytes } => self.data(id, fin, bytes).await,
            // Trailing headers are not used by anyone; they may end the stream.
            Frame::Headers { id, fin, .. } => self.data(id, fin, Bytes::new()).await,
            Frame::Reset { id, .. } => {
                if let Some(entry) = self.streams.remove(&id) {
                    entry.over.cancel();
                }
                Ok(())
            }
            // Odd ones are the client's and want an echo, even ones are echoes of ours.
            Frame::Ping(id) if id % 2 == 1 => self.send(&Frame::Ping(id)).await,
            Frame::GoAway { .. } => {
                self.leaving = true;
                Ok(())
            }
            Frame::Ping(_)
            | Frame::SynReply { .. }
            | Frame::WindowUpdate { .. }
            | Frame::Settings(_)
            | Frame::Other(_) => Ok(()),
        }
    }

    async fn send(&mut self, frame: &Frame) -> Result<(), Gone> {
        let frame = self.encoder.encode(frame);
        self.outgoing.send(frame).await.map_err(|_| Gone)
    }

    async fn reset(&self, id: u32, reason: Reset) -> Result<(), Gone> {
        self.outgoing.send(frame::reset(id, reason)).await.map_err(|_| Gone)
    }

    async fn open(&mut self, id: u32, fin: bool, headers: Headers) -> Result<(), Gone> {
        if id.is_multiple_of(2) || id <= self.last {
            return self.reset(id, Reset::Protocol).await;
        }
        self.last = id;
        let finished = |entry: &Entry| entry.pieces.is_none() && entry.done.load(Ordering::Acquire);
        self.streams.retain(|_, entry| !finished(entry));
        if self.leaving || self.streams.len() >= MAX_STREAMS || self.opened.is_closed() {
            return self.reset(id, Reset::Refused).await;
        }
        let (pieces, reader) = mpsc::unbounded_channel();
        let over = self.over.child_token();
        let done = Arc::new(AtomicBool::new(false));
        let writer = StreamWriter {
            id,
            outgoing: self.outgoing.clone(),
            over: over.clone(),
            done: done.clone(),
        };
        self.streams.insert(id, Entry { pieces: (!fin).then_some(pieces), over, done });
        // Before anybody can send on it: the client drops data of a stream that has no reply yet.
        self.send(&Frame::SynReply { id, fin: false, headers: Headers::default() }).await?;
        let stream = Stream { id, headers, reader: StreamReader(reader), writer };
        // Nobody takes it: dropped, it resets itself.
        let _ = self.opened.send(stream).await;
        Ok(())
    }

    async fn data(&mut self, id: u32, fin: bool, bytes: Bytes) -> Result<(), Gone> {
        let Some(entry) = self.streams.get_mut(&id) else {
            // What was under way when the stream ended is nobody's fault.
            return if id > self.last {
                self.reset(id, Reset::InvalidStream).await
            } else {
                Ok(())
            };
        };
        if let Some(pieces) = &entry.pieces
            && !bytes.is_empty()
            && !pieces.is_closed()
        {
            let cost = u32::try_from(bytes.len() + PIECE_COST_BYTES).unwrap_or(u32::MAX);
            let held = self.held.clone();
            tokio::select! {
                held = held.acquire_many_owned(cost) => {
                    let _ = pieces.send(Piece { bytes, _held: held.map_err(|_| Gone)? });
                }
                // The reader went away: its bytes are worth no wait.
                () = pieces.closed() => {}
            }
        }
        if fin {
            entry.pieces = None;
        }
        Ok(())
    }
}
