//! The server's side against a client that is made of the same frames.

use tokio::io::{DuplexStream, ReadHalf, WriteHalf};

use super::*;

/// A client whose bytes go through memory.
pub(crate) struct Client {
    encoder: Encoder,
    decoder: Decoder,
    buffer: BytesMut,
    reader: ReadHalf<DuplexStream>,
    writer: WriteHalf<DuplexStream>,
}

impl Client {
    /// A client and the connection it has.
    pub(crate) fn connect() -> (Self, Connection) {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let (reader, writer) = tokio::io::split(theirs);
        let connection = Connection::new(reader, writer);
        let (reader, writer) = tokio::io::split(ours);
        let client = Self {
            encoder: Encoder::new(),
            decoder: Decoder::new(),
            buffer: BytesMut::new(),
            reader,
            writer,
        };
        (client, connection)
    }

    async fn send(&mut self, frame: Frame) {
        let bytes = self.encoder.encode(&frame);
        self.writer.write_all(&bytes).await.expect("sent");
    }

    pub(crate) async fn open<const N: usize>(&mut self, id: u32, headers: [(&str, &str); N]) {
        self.send(Frame::SynStream { id, fin: false, headers: Headers::from(headers) }).await;
    }

    pub(crate) async fn data(&mut self, id: u32, fin: bool, bytes: &[u8]) {
        self.send(Frame::Data { id, fin, bytes: Bytes::copy_from_slice(bytes) }).await;
    }

    /// The next frame; `None` at the end of the connection.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next(&mut self.buffer).expect("a frame") {
                return Some(frame);
            }
            if self.reader.read_buf(&mut self.buffer).await.expect("read") == 0 {
                return None;
            }
        }
    }

    /// All that comes on the given streams until each has ended; no stream but these says anything.
    pub(crate) async fn read_to_end<const N: usize>(&mut self, ids: [u32; N]) -> [Vec<u8>; N] {
        let mut all = ids.map(|_| Vec::new());
        let mut open = ids.to_vec();
        while !open.is_empty() {
            match self.next().await.expect("the connection goes on") {
                Frame::Data { id, fin, bytes } => {
                    let at = ids.iter().position(|own| *own == id).expect("a known stream");
                    all[at].extend_from_slice(&bytes);
                    if fin {
                        open.retain(|own| *own != id);
                    }
                }
                Frame::SynReply { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        all
    }
}

#[tokio::test]
async fn a_stream_is_answered_and_carries_bytes_both_ways() {
    let (mut client, mut connection) = Client::connect();
    client.open(1, [("streamType", "data")]).await;
    let mut stream = connection.accept().await.expect("a stream");
    assert_eq!((stream.id, stream.headers.get("streamtype")), (1, Some("data")));
    let headers = Headers::default();
    assert_eq!(client.next().await, Some(Frame::SynReply { id: 1, fin: false, headers }));
    client.data(1, false, b"hel").await;
    client.data(1, true, b"lo").await;
    let mut got = Vec::new();
    while let Some(bytes) = stream.reader.next().await {
        got.extend_from_slice(&bytes);
    }
    assert_eq!(got, b"hello");
    stream.writer.send(b"world").await.expect("sent");
    stream.writer.finish().await;
    assert_eq!(client.read_to_end([1]).await, [b"world"]);
    client.send(Frame::Ping(7)).await;
    assert_eq!(client.next().await, Some(Frame::Ping(7)));
}

#[tokio::test]
async fn a_reset_ends_both_directions() {
    let (mut client, mut connection) = Client::connect();
    client.open(1, []).await;
    let mut stream = connection.accept().await.expect("a stream");
    client.send(Frame::Reset { id: 1, reason: 5 }).await;
    assert_eq!(stream.reader.next().await, None);
    stream.writer.gone().await;
    assert_eq!(stream.writer.send(b"x").await, Err(Gone));
    // The connection is as good as before, and what was dropped unfinished is reset.
    client.open(3, []).await;
    drop(connection.accept().await.expect("a stream"));
    client.next().await;
    client.next().await;
    assert_eq!(client.next().await, Some(Frame::Reset { id: 3, reason: 5 }));
}

#[tokio::test]
async fn streams_that_may_not_be_are_reset() {
    let (mut client, mut connection) = Client::connect();
    client.open(5, []).await;
    let _stream = connection.accept().await.expect("a stream");
    client.next().await;
    for (id, reason) in [(2, Reset::Protocol), (3, Reset::Protocol)] {
        client.open(id, []).await;
        let reason = reason as u32;
        assert_eq!(client.next().await, Some(Frame::Reset { id, reason }));
    }
    client.data(99, false, b"x").await;
    let reason = Reset::InvalidStream as u32;
    assert_eq!(client.next().await, Some(Frame::Reset { id: 99, reason }));
    connection.refuse_more();
    client.open(7, []).await;
    let reason = Reset::Refused as u32;
    assert_eq!(client.next().await, Some(Frame::Reset { id: 7, reason }));
}

#[tokio::test]
async fn what_is_not_read_is_held_only_up_to_a_limit() {
    let (mut client, mut connection) = Client::connect();
    client.open(1, []).await;
    let mut stream = connection.accept().await.expect("a stream");
    let piece = vec![1; 32 << 10];
    let mut sent = 0;
    let stuck = Duration::from_millis(300);
    while tokio::time::timeout(stuck, client.data(1, false, &piece)).await.is_ok() {
        sent += piece.len();
        assert!(sent < 2 * MAX_HELD_BYTES, "{sent} bytes were taken without a reader");
    }
    assert!(sent >= MAX_HELD_BYTES - (64 << 10), "{sent}");
    // Reading lets it go on.
    let mut got = 0;
    while got < sent {
        got += stream.reader.next().await.expect("bytes").len();
    }
}

#[tokio::test]
async fn a_stream_nobody_reads_does_not_keep_the_others_waiting() {
    let (mut client, mut connection) = Client::connect();
    client.open(1, []).await;
    client.open(3, []).await;
    let Stream { reader, writer: _kept, .. } = connection.accept().await.expect("a stream");
    drop(reader);
    let mut other = connection.accept().await.expect("a stream");
    for _ in 0..(2 * MAX_HELD_BYTES / (32 << 10)) {
        client.data(1, false, &[1; 32 << 10]).await;
    }
    client.data(3, false, b"through").await;
    assert_eq!(other.reader.next().await.as_deref(), Some(b"through".as_slice()));
}

#[tokio::test]
async fn the_end_of_the_connection_is_the_end_of_all() {
    let (client, mut connection) = Client::connect();
    let mut client = client;
    client.open(1, []).await;
    let mut stream = connection.accept().await.expect("a stream");
    drop(client);
    assert_eq!(stream.reader.next().await, None);
    stream.writer.gone().await;
    connection.hung_up().await;
    assert!(connection.accept().await.is_none());
}

#[tokio::test]
async fn a_client_that_speaks_something_else_is_sent_away() {
    let (mut client, mut connection) = Client::connect();
    client.writer.write_all(b"\x80\x02 not SPDY/3 at all").await.expect("sent");
    assert_eq!(client.next().await, Some(Frame::GoAway { last: 0 }));
    assert!(connection.accept().await.is_none());
}

#[tokio::test]
async fn close_waits_for_what_was_said() {
    let (mut client, mut connection) = Client::connect();
    client.open(1, []).await;
    let mut stream = connection.accept().await.expect("a stream");
    let close = async move {
        stream.writer.send(&vec![3; 500_000]).await.expect("sent");
        stream.writer.finish().await;
        connection.close().await;
    };
    let read = async {
        // Slower than the limit of a farewell.
        tokio::time::sleep(CLOSE_LIMIT + Duration::from_millis(200)).await;
        let all = client.read_to_end([1]).await;
        assert_eq!(all[0].len(), 500_000);
        assert_eq!(client.next().await, Some(Frame::GoAway { last: 0 }));
        drop(client);
    };
    tokio::join!(close, read);
}

#[test]
fn the_client_chooses_the_protocol() {
    const OURS: [&str; 2] = ["v4", "v3"];
    let choose = |offers: &[&'static str]| {
        let mut headers = HeaderMap::new();
        for offer in offers {
            headers.append(PROTOCOL, HeaderValue::from_static(offer));
        }
        choose_protocol(&headers, &OURS)
    };
    assert_eq!(choose(&["v5", "v4", "v3"]), Some("v4"));
    assert_eq!(choose(&["v3, v4"]), Some("v3"));
    assert_eq!(choose(&[]), Some("v3"));
    assert_eq!(choose(&["v9"]), None);
}
