//! One rtnetlink socket: requests, answers, dumps.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NLMSG_OVERRUN, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::{NetNs, NetlinkError};

/// The kernel builds no larger datagram than 32 KiB; twice that is never too small.
const RECEIVE_BUFFER_BYTES: usize = 64 * 1024;
/// How often an interrupted dump is read again. One is read in well under a millisecond, so this many in a row mean
/// a storm of changes, and the caller had better come back later.
const DUMP_ATTEMPTS: u32 = 20;
const MESSAGE_HEADER_BYTES: usize = 16;
/// `NLMSGERR_ATTR_MSG`, text of the extended acknowledgement (`linux/netlink.h`).
const ERROR_ATTRIBUTE_MESSAGE: u16 = 1;

/// One rtnetlink socket. It talks to the namespace it was opened in, from whichever thread; it serves one request
/// at a time, so threads that work in parallel open one each.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: Cell<u32>,
}

/// One message of an answer.
pub(crate) struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Netlink {
    /// Opens a socket in the namespace of the calling thread.
    ///
    /// # Errors
    /// If the system has no socket to give.
    pub fn open() -> Result<Self, NetlinkError> {
        Self::open_protocol(NETLINK_ROUTE)
    }

    pub(crate) fn open_protocol(protocol: isize) -> Result<Self, NetlinkError> {
        let open = || -> io::Result<Socket> {
            let socket = Socket::new(protocol)?;
            socket.connect(&SocketAddr::new(0, 0))?;
            if protocol != NETLINK_ROUTE {
                return Ok(socket);
            }
            // Strict checking makes the kernel filter dumps, and refuse what it does not know instead of ignoring
            // it; the extended acknowledgement is its explanation; capped, it does not send the request back.
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            socket.set_netlink_get_strict_chk(true)?;
            Ok(socket)
        };
        match open() {
            Ok(socket) => Ok(Self { socket, sequence: Cell::new(0) }),
            Err(source) => Err(NetlinkError::Socket { request: "open".to_owned(), source }),
        }
    }

    /// Opens a socket in another namespace; the calling thread stays where it is.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or there is no socket.
    pub fn open_in(netns: &NetNs) -> Result<Self, NetlinkError> {
        netns.run(Self::open)
    }

    /// Sends a change and waits until the kernel has made it.
    pub(crate) fn change(
        &self,
        flags: u16,
        message: RouteNetlinkMessage,
        request: impl Fn() -> String,
    ) -> Result<(), NetlinkError> {
        self.get(flags, message, request, |_| Ok(()))
    }

    /// Asks for one object; `read` gets the payload of the answer.
    pub(crate) fn get(
        &self,
        flags: u16,
        message: impl NetlinkSerializable,
        request: impl Fn() -> String,
        mut read: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), NetlinkError> {
        self.exchange(NLM_F_ACK | flags, message, &request, &mut read).map(drop)
    }

    /// As [`get`](Self::get) without an acknowledgement: the answer is one message, or an error.
    pub(crate) fn ask(
        &self,
        message: impl NetlinkSerializable,
        request: impl Fn() -> String,
        mut read: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), NetlinkError> {
        self.exchange(0, message, &request, &mut read).map(drop)
    }

    /// Reads a table. `read` turns the payload of one answer into an entry; `None` leaves it out.
    pub(crate) fn dump<T>(
        &self,
        message: RouteNetlinkMessage,
        request: impl Fn() -> String,
        read: impl Fn(&[u8]) -> Result<Option<T>, String>,
    ) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut entries = Vec::new();
            let whole = self.exchange(NLM_F_DUMP, message.clone(), &request, &mut |payload| {
                entries.extend(read(payload)?);
                Ok(())
            })?;
            if whole {
                return Ok(entries);
            }
        }
        Err(NetlinkError::Interrupted { request: request(), attempts: DUMP_ATTEMPTS })
    }

    /// Returns whether the answer is whole, which is not so for a dump that changes interrupted.
    fn exchange(
        &self,
        flags: u16,
        message: impl NetlinkSerializable,
        request: &impl Fn() -> String,
        read: &mut impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<bool, NetlinkError> {
        let failed = |source| NetlinkError::Socket { request: request(), source };
        let malformed = |reason| NetlinkError::Malformed { request: request(), reason };
        let sequence = self.next_sequence();
        self.send(flags, sequence, message).map_err(failed)?;

        // What is neither acknowledged nor a table is one message.
        let single = flags & (NLM_F_ACK | NLM_F_DUMP) == 0;
        let mut whole = true;
        let mut wrong = None;
        let mut buffer = Vec::with_capacity(RECEIVE_BUFFER_BYTES);
        loop {
            self.receive(&mut buffer).map_err(failed)?;
            let mut rest = buffer.as_slice();
            while let Some(message) = next_message(&mut rest).map_err(malformed)? {
                if message.sequence != sequence {
                    // What an earlier request that failed half-way did not read.
                    continue;
                }
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        return match acknowledgement(&message) {
                            Some((errno, text)) => Err(NetlinkError::Kernel {
                                request: request(),
                                errno,
                                message: text,
                            }),
                            None => wrong.map_or(Ok(whole), |reason| Err(malformed(reason))),
                        };
                    }
                    NLMSG_OVERRUN => return Err(malformed("overrun".to_owned())),
                    // The answer is read to its end even then, so that the next request finds an empty socket.
                    _ => {
                        wrong = wrong.or(read(message.payload).err());
                        if single {
                            return wrong.map_or(Ok(whole), |reason| Err(malformed(reason)));
                        }
                    }
                }
            }
        }
    }

    pub(crate) fn next_sequence(&self) -> u32 {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        sequence
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn send(&self, flags: u16, sequence: u32, message: impl NetlinkSerializable) -> io::Result<()> {
        let mut bytes = Vec::new();
        append(&mut bytes, flags, sequence, message);
        retry_interrupted(|| self.socket.send(&bytes, 0)).map(drop)
    }

    /// Sends several changes in one datagram, whose messages `encode` appends, given the sequence number of the first.
    /// The kernel works them off before `send` returns, goes on past a refused one and answers each refusal; the last
    /// message asks for an answer in any case. Returns the refusals by their place.
    pub(crate) fn pipeline(
        &self,
        count: u32,
        request: &impl Fn() -> String,
        encode: impl FnOnce(&mut Vec<u8>, u32),
    ) -> Result<Vec<(u32, i32, Option<String>)>, NetlinkError> {
        let failed = |source| NetlinkError::Socket { request: request(), source };
        let first = self.sequence.get().wrapping_add(1);
        self.sequence.set(first.wrapping_add(count - 1));
        let mut buffer = Vec::with_capacity(RECEIVE_BUFFER_BYTES);
        encode(&mut buffer, first);
        retry_interrupted(|| self.socket.send(&buffer, 0)).map_err(failed)?;
        let mut refused = Vec::new();
        loop {
            self.receive(&mut buffer).map_err(failed)?;
            let mut rest = buffer.as_slice();
            let malformed = |reason| NetlinkError::Malformed { request: request(), reason };
            while let Some(message) = next_message(&mut rest).map_err(malformed)? {
                let place = message.sequence.wrapping_sub(first);
                if message.kind != NLMSG_ERROR || place >= count {
                    continue;
                }
                refused.extend(acknowledgement(&message).map(|(errno, text)| (place, errno, text)));
                if place == count - 1 {
                    return Ok(refused);
                }
            }
        }
    }

    fn receive(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.clear();
        let length = retry_interrupted(|| self.socket.recv(buffer, libc::MSG_TRUNC))?;
        if length > buffer.len() {
            return Err(io::Error::other(format!("an answer of {length} bytes did not fit")));
        }
        Ok(())
    }
}

/// Appends one message to a datagram.
pub(crate) fn append(
    datagram: &mut Vec<u8>,
    flags: u16,
    sequence: u32,
    message: impl NetlinkSerializable,
) {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let start = datagram.len();
    datagram.resize(start + message.buffer_len().next_multiple_of(4), 0);
    let end = start + message.buffer_len();
    message.serialize(&mut datagram[start..end]);
}

fn retry_interrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Takes the first message off a datagram.
pub(crate) fn next_message<'a>(rest: &mut &'a [u8]) -> Result<Option<Message<'a>>, String> {
    if rest.is_empty() {
        return Ok(None);
    }
    let (Some(length), Some(kind), Some(flags), Some(sequence)) =
        (read_u32(rest, 0), read_u16(rest, 4), read_u16(rest, 6), read_u32(rest, 8))
    else {
        return Err(format!("{} bytes are no message header", rest.len()));
    };
    let length = length as usize;
    let Some(payload) = rest.get(MESSAGE_HEADER_BYTES..length) else {
        return Err(format!("message of {length} bytes in {}", rest.len()));
    };
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Ok(Some(Message { kind, flags, sequence, payload }))
}

/// The error in the last message of an answer: number and text.
pub(crate) fn acknowledgement(message: &Message<'_>) -> Option<(i32, Option<String>)> {
    let code = message.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    if code == 0 {
        return None;
    }
    let after_code = message.payload.get(4..).unwrap_or_default();
    let attributes = if message.kind == NLMSG_DONE {
        after_code
    } else if message.flags & NLM_F_ACK_TLVS == 0 {
        &[]
    } else if message.flags & NLM_F_CAPPED != 0 {
        after_code.get(MESSAGE_HEADER_BYTES..).unwrap_or_default()
    } else {
        let request = read_u32(after_code, 0).unwrap_or(0) as usize;
        after_code.get(request.next_multiple_of(4)..).unwrap_or_default()
    };
    let text = attribute(attributes, ERROR_ATTRIBUTE_MESSAGE).and_then(text);
    Some((code.saturating_neg(), text))
}

/// Value of the first attribute of a kind. The values are picked out one by one, instead of decoding messages whole,
/// so that an attribute that is new in some kernel does not fail a dump.
pub(crate) fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    all_attributes(attributes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// All attributes, up to the first malformed one.
pub(crate) fn all_attributes(attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = attributes;
    NlasIterator::new(attributes).map_while(Result::ok).map(move |found| {
        // The iterator lends its values for one step only; the same bytes are taken from the input here.
        let value = rest.get(4..usize::from(found.length())).unwrap_or_default();
        rest = rest.get(usize::from(found.length()).next_multiple_of(4)..).unwrap_or_default();
        (found.kind(), value)
    })
}

pub(crate) fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|value| u16::from_ne_bytes(*value))
}

pub(crate) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|value| u32::from_ne_bytes(*value))
}

/// Text up to the zero byte.
pub(crate) fn text(bytes: &[u8]) -> Option<String> {
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8(bytes.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A refusal as the kernel sends it: code, header of the request, one text attribute.
    fn refusal(flags: u16, request_length: u32) -> Vec<u8> {
        let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
        payload.extend(request_length.to_ne_bytes());
        payload.extend([0; 12]);
        if flags & NLM_F_CAPPED == 0 {
            payload.resize(4 + request_length as usize, 0);
        }
        payload.extend(8_u16.to_ne_bytes());
        payload.extend(ERROR_ATTRIBUTE_MESSAGE.to_ne_bytes());
        payload.extend(b"why\0");
        payload
    }

    #[test]
    fn the_text_of_a_refusal_is_found_with_and_without_the_request_sent_back() {
        for (flags, request_length) in
            [(NLM_F_ACK_TLVS | NLM_F_CAPPED, 32), (NLM_F_ACK_TLVS, 32), (NLM_F_ACK_TLVS, 16)]
        {
            let payload = refusal(flags, request_length);
            let message = Message { kind: NLMSG_ERROR, flags, sequence: 1, payload: &payload };
            assert_eq!(acknowledgement(&message), Some((libc::EINVAL, Some("why".to_owned()))));
        }
    }

    #[test]
    fn a_datagram_falls_into_its_messages_and_a_torn_one_is_an_error() {
        let mut datagram = Vec::new();
        for (length, payload) in [(20_u32, &b"abcd"[..]), (17, b"e\0\0\0"), (16, b"")] {
            datagram.extend(length.to_ne_bytes());
            datagram.extend(3_u16.to_ne_bytes());
            datagram.extend([0; 2]);
            datagram.extend(7_u32.to_ne_bytes());
            datagram.extend([0; 4]);
            datagram.extend(payload);
        }
        let mut rest = datagram.as_slice();
        let mut payloads = Vec::new();
        while let Some(message) = next_message(&mut rest).expect("well formed") {
            assert_eq!((message.kind, message.sequence), (3, 7));
            payloads.push(message.payload);
        }
        assert_eq!(payloads, [&b"abcd"[..], b"e", b""]);
        assert!(next_message(&mut &datagram[..18]).is_err());
        assert!(next_message(&mut &datagram[..9]).is_err());
    }
}
