//! Frames of SPDY/3.1 as bytes (draft-mbelshe-httpbis-spdy-00 and the 3.1 draft, §2.2 and §2.6).
//!
//! The decoder takes bytes cut anywhere. Control frames are put together first and are short; the payload of a data
//! frame, up to 16 MiB, is handed on in the pieces it comes in, so that no more than one piece is ever held.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::headers::{Deflater, Headers, Inflater};

/// Every frame begins with that many bytes.
const HEAD_BYTES: usize = 8;
/// Longest control frame. Header blocks are the longest of them, and those of Kubernetes have 100 bytes.
pub(super) const MAX_CONTROL_BYTES: usize = 32 << 10;
/// Longest payload of a data frame sent.
pub(super) const MAX_DATA_BYTES: usize = 32 << 10;
/// Version in every control frame; 3.1 changed nothing in it.
const VERSION: u16 = 3;
const CONTROL: u32 = 1 << 31;
const FIN: u8 = 1;

/// Why a connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("SPDY version {0}, not 3")]
    Version(u16),
    #[error("control frame of {0} bytes")]
    TooLong(usize),
    #[error("control frame of type {0} is too short")]
    TooShort(u16),
    #[error("header block cannot be read")]
    Headers,
}

/// Reasons in RST_STREAM (§2.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reset {
    Protocol = 1,
    InvalidStream = 2,
    Refused = 3,
    Cancel = 5,
}

/// A frame, or a piece of a data frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    SynStream {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    SynReply {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    Headers {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    /// With `fin`, the last bytes of the sender's side.
    Data {
        id: u32,
        fin: bool,
        bytes: Bytes,
    },
    Reset {
        id: u32,
        reason: u32,
    },
    Ping(u32),
    GoAway {
        last: u32,
    },
    WindowUpdate {
        id: u32,
        delta: u32,
    },
    /// Identifier and value of each setting.
    Settings(Vec<(u32, u32)>),
    /// A type that is of no use here.
    Other(u16),
}

mod kind {
    pub(super) const SYN_STREAM: u16 = 1;
    pub(super) const SYN_REPLY: u16 = 2;
    pub(super) const RST_STREAM: u16 = 3;
    pub(super) const SETTINGS: u16 = 4;
    pub(super) const PING: u16 = 6;
    pub(super) const GOAWAY: u16 = 7;
    pub(super) const HEADERS: u16 = 8;
    pub(super) const WINDOW_UPDATE: u16 = 9;
}

/// The data frame whose payload is being read.
struct Open {
    id: u32,
    fin: bool,
    left: usize,
}

/// Bytes to frames.
pub(super) struct Decoder {
    inflater: Inflater,
    open: Option<Open>,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { inflater: Inflater::new(), open: None }
    }

    /// The next frame of `input`, which keeps what is not a frame yet. At most [`MAX_CONTROL_BYTES`] and a head have
    /// to be in it for a frame to come out.
    ///
    /// # Errors
    /// The other side does not speak SPDY/3; nothing after that can be read.
    pub(super) fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if let Some(open) = &mut self.open {
            if input.is_empty() {
                return Ok(None);
            }
            let bytes = input.split_to(open.left.min(input.len())).freeze();
            open.left -= bytes.len();
            let (id, last) = (open.id, open.left == 0);
            let fin = open.fin && last;
            if last {
                self.open = None;
            }
            return Ok(Some(Frame::Data { id, fin, bytes }));
        }
        let Some(head) = input.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
        let word = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let flags = head[4];
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let fin = flags & FIN != 0;
        if word & CONTROL == 0 {
            input.advance(HEAD_BYTES);
            if length == 0 {
                return Ok(Some(Frame::Data { id: word, fin, bytes: Bytes::new() }));
            }
            self.open = Some(Open { id: word, fin, left: length });
            return self.next(input);
        }
        let version = u16::from_be_bytes([head[0] & 0x7f, head[1]]);
        let kind = u16::from_be_bytes([head[2], head[3]]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if length > MAX_CONTROL_BYTES {
            return Err(FrameError::TooLong(length));
        }
        if input.len() < HEAD_BYTES + length {
            return Ok(None);
        }
        input.advance(HEAD_BYTES);
        let payload = input.split_to(length).freeze();
        self.control(kind, fin, payload).map(Some)
    }

    fn control(&mut self, kind: u16, fin: bool, mut rest: Bytes) -> Result<Frame, FrameError> {
        let needed = match kind {
            kind::SYN_STREAM => 10,
            kind::SYN_REPLY | kind::HEADERS | kind::SETTINGS | kind::PING => 4,
            kind::RST_STREAM | kind::GOAWAY | kind::WINDOW_UPDATE => 8,
            other => return Ok(Frame::Other(other)),
        };
        if rest.len() < needed {
            return Err(FrameError::TooShort(kind));
        }
        let number = rest.get_u32();
        let id = number & !CONTROL;
        Ok(match kind {
            kind::SYN_STREAM => {
                // The stream it belongs to, its priority and a slot that was never used.
                rest.advance(6);
                Frame::SynStream { id, fin, headers: self.inflater.headers(&rest)? }
            }
            kind::SYN_REPLY => Frame::SynReply { id, fin, headers: self.inflater.headers(&rest)? },
            kind::HEADERS => Frame::Headers { id, fin, headers: self.inflater.headers(&rest)? },
            kind::RST_STREAM => Frame::Reset { id, reason: rest.get_u32() },
            kind::PING => Frame::Ping(number),
            kind::GOAWAY => Frame::GoAway { last: id },
            kind::WINDOW_UPDATE => Frame::WindowUpdate { id, delta: rest.get_u32() & !CONTROL },
            _ => {
                let entry = |entry: &[u8]| {
                    let word = |at: usize| {
                        u32::from_be_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
                    };
                    // The upper byte of the identifier has flags.
                    (word(0) & 0x00ff_ffff, word(4))
                };
                Frame::Settings(rest.chunks_exact(8).map(entry).collect())
            }
        })
    }
}

/// Frames to bytes, in the order they are sent in.
pub(super) struct Encoder {
    deflater: Deflater,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self { deflater: Deflater::new() }
    }

    pub(super) fn encode(&mut self, frame: &Frame) -> Bytes {
        let word = |value: &u32| value.to_be_bytes().to_vec();
        match frame {
            Frame::Data { id, fin, bytes } => data(*id, *fin, bytes),
            Frame::SynStream { id, fin, headers } => {
                let mut payload = word(id);
                payload.extend([0; 6]);
                payload.extend(self.deflater.block(headers));
                control(kind::SYN_STREAM, *fin, &payload)
            }
            Frame::SynReply { id, fin, headers } => {
                let payload = [word(id), self.deflater.block(headers)].concat();
                control(kind::SYN_REPLY, *fin, &payload)
            }
            Frame::Headers { id, fin, headers } => {
                let payload = [word(id), self.deflater.block(headers)].concat();
                control(kind::HEADERS, *fin, &payload)
            }
            Frame::Reset { id, reason } => {
                control(kind::RST_STREAM, false, &[word(id), word(reason)].concat())
            }
            Frame::Ping(id) => control(kind::PING, false, &word(id)),
            Frame::GoAway { last } => goaway(*last),
            Frame::WindowUpdate { id, delta } => {
                control(kind::WINDOW_UPDATE, false, &[word(id), word(delta)].concat())
            }
            Frame::Settings(settings) => {
                let mut payload = word(&u32::try_from(settings.len()).unwrap_or(u32::MAX));
                payload.extend(
                    settings.iter().flat_map(|(id, value)| [word(id), word(value)].concat()),
                );
                control(kind::SETTINGS, false, &payload)
            }
            Frame::Other(kind) => control(*kind, false, &[]),
        }
    }
}

/// A data frame; it needs nothing that the connection remembers.
pub(super) fn data(id: u32, fin: bool, bytes: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD_BYTES + bytes.len());
    frame.put_u32(id & !CONTROL);
    put_length(&mut frame, fin, bytes.len());
    frame.put_slice(bytes);
    frame.freeze()
}

/// RST_STREAM, which needs nothing that the connection remembers.
pub(super) fn reset(id: u32, reason: Reset) -> Bytes {
    let payload = [id.to_be_bytes(), (reason as u32).to_be_bytes()].concat();
    control(kind::RST_STREAM, false, &payload)
}

/// GOAWAY after that stream of the other side, with status 0: all is well.
pub(super) fn goaway(last: u32) -> Bytes {
    control(kind::GOAWAY, false, &[last.to_be_bytes(), [0; 4]].concat())
}

fn control(kind: u16, fin: bool, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD_BYTES + payload.len());
    frame.put_u16(VERSION | 0x8000);
    frame.put_u16(kind);
    put_length(&mut frame, fin, payload.len());
    frame.put_slice(payload);
    frame.freeze()
}

fn put_length(frame: &mut BytesMut, fin: bool, length: usize) {
    debug_assert!(length < 1 << 24, "a frame's length has 24 bits");
    frame.put_u8(if fin { FIN } else { 0 });
    frame.put_uint(length as u64, 3);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers() -> impl Strategy<Value = Headers> {
        ("[a-z]{1,9}", "[ -~]{0,40}")
            .prop_map(|(name, value)| Headers::from([(name.as_str(), value.as_str()), ("b", "2")]))
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let id = 1..(1_u32 << 31);
        prop_oneof![
            (id.clone(), any::<bool>(), headers())
                .prop_map(|(id, fin, headers)| Frame::SynStream { id, fin, headers }),
            (id.clone(), any::<bool>(), headers()).prop_map(|(id, fin, headers)| Frame::SynReply {
                id,
                fin,
                headers
            }),
            (id.clone(), any::<bool>(), headers()).prop_map(|(id, fin, headers)| Frame::Headers {
                id,
                fin,
                headers
            }),
            (id.clone(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..500))
                .prop_map(|(id, fin, bytes)| Frame::Data { id, fin, bytes: bytes.into() }),
            (id.clone(), any::<u32>()).prop_map(|(id, reason)| Frame::Reset { id, reason }),
            any::<u32>().prop_map(Frame::Ping),
            id.clone().prop_map(|last| Frame::GoAway { last }),
            (id.clone(), id).prop_map(|(id, delta)| Frame::WindowUpdate { id, delta }),
            prop::collection::vec((0..1_u32 << 24, any::<u32>()), 0..4).prop_map(Frame::Settings),
        ]
    }

    /// Feeds bytes in pieces of the given lengths and puts the pieces of data frames together again.
    fn decode(bytes: &[u8], cuts: &[usize]) -> Result<Vec<Frame>, FrameError> {
        let (mut decoder, mut buffer, mut frames) = (Decoder::new(), BytesMut::new(), Vec::new());
        let mut rest = bytes;
        let mut cuts = cuts.iter().copied().cycle();
        let mut whole: Option<Vec<u8>> = None;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(cuts.next().unwrap_or(1).clamp(1, rest.len()));
            rest = after;
            buffer.extend_from_slice(piece);
            while let Some(frame) = decoder.next(&mut buffer)? {
                match frame {
                    Frame::Data { id, fin, bytes } => {
                        let all = whole.get_or_insert_default();
                        all.extend(bytes);
                        if decoder.open.is_none() {
                            let bytes = whole.take().unwrap_or_default().into();
                            frames.push(Frame::Data { id, fin, bytes });
                        }
                    }
                    other => frames.push(other),
                }
            }
            assert!(buffer.len() < HEAD_BYTES + MAX_CONTROL_BYTES + piece.len());
        }
        Ok(frames)
    }

    proptest! {
        #[test]
        fn frames_come_back_however_they_are_cut(
            sent in prop::collection::vec(frame(), 1..12),
            cuts in prop::collection::vec(1_usize..600, 1..8),
        ) {
            let mut encoder = Encoder::new();
            let bytes: Vec<u8> = sent.iter().flat_map(|frame| encoder.encode(frame)).collect();
            prop_assert_eq!(decode(&bytes, &cuts), Ok(sent));
        }

        #[test]
        fn no_bytes_make_it_panic_or_hoard(
            bytes in prop::collection::vec(any::<u8>(), 0..4000),
            cuts in prop::collection::vec(1_usize..600, 1..4),
        ) {
            let _ = decode(&bytes, &cuts);
        }

        #[test]
        fn frames_with_a_broken_byte_make_it_neither_panic_nor_hoard(
            sent in prop::collection::vec(frame(), 1..8),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cuts in prop::collection::vec(1_usize..600, 1..4),
        ) {
            let mut encoder = Encoder::new();
            let mut bytes: Vec<u8> = sent.iter().flat_map(|frame| encoder.encode(frame)).collect();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode(&bytes, &cuts);
        }
    }

    #[test]
    fn what_is_not_spdy_3_is_named() {
        assert_eq!(decode(b"\x80\x02\x00\x01\0\0\0\0", &[8]), Err(FrameError::Version(2)));
        assert_eq!(
            decode(b"\x80\x03\x00\x01\0\xff\0\0", &[8]),
            Err(FrameError::TooLong(0xff_0000))
        );
        assert_eq!(decode(b"\x80\x03\x00\x06\0\0\0\x01x", &[9]), Err(FrameError::TooShort(6)));
        assert_eq!(decode(b"\x80\x03\x00\x63\0\0\0\x01x", &[9]), Ok(vec![Frame::Other(0x63)]));
    }

    #[test]
    fn a_long_data_frame_is_handed_on_in_pieces() {
        let (mut decoder, mut buffer) = (Decoder::new(), BytesMut::new());
        buffer.extend_from_slice(b"\0\0\0\x05\x01\xff\xff\xff");
        assert_eq!(decoder.next(&mut buffer), Ok(None));
        let (mut seen, piece) = (0, vec![7; 40_000]);
        while seen < 0xff_ffff {
            let piece = &piece[..piece.len().min(0xff_ffff - seen)];
            buffer.extend_from_slice(piece);
            seen += piece.len();
            let got = decoder.next(&mut buffer);
            let bytes = Bytes::copy_from_slice(piece);
            assert_eq!(got, Ok(Some(Frame::Data { id: 5, fin: seen == 0xff_ffff, bytes })));
            assert!(buffer.is_empty());
        }
    }
}
