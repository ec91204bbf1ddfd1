//! Real packets, followed: ICMP echoes with a mark in them, and packet sockets on every link that they should cross.
//!
//! The mark is random and is looked for anywhere in a frame, so an echo is known also inside VXLAN. Whether it is the
//! request or the reply stands in the ICMP header right before it.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cni_netlink::NetNs;

/// An echo is given up after this.
const PATIENCE: Duration = Duration::from_millis(700);
/// Frames may still be under way to a packet socket when the reply is there.
const SETTLE: Duration = Duration::from_millis(20);
/// Bytes of the mark.
const MARK_BYTES: usize = 16;
/// ICMP header before the mark.
const ICMP_HEADER_BYTES: usize = 8;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// The same in ICMPv6 (RFC 4443 §4).
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
/// IP headers without options.
const IPV4_HEADER_BYTES: u32 = 20;
const IPV6_HEADER_BYTES: u32 = 40;
/// Frames that a socket holds until they are looked at; a busy link must not push ours out.
const TAP_BUFFER_BYTES: libc::c_int = 16 << 20;

/// IP and ICMP headers around the payload of an echo.
pub(super) fn echo_overhead(target: IpAddr) -> u32 {
    let ip = if target.is_ipv4() { IPV4_HEADER_BYTES } else { IPV6_HEADER_BYTES };
    ip + ICMP_HEADER_BYTES as u32
}

/// A link to look at.
pub(super) struct Spot<'a> {
    /// Namespace that it is in.
    pub(super) netns: &'a NetNs,
    /// Its index.
    pub(super) link: u32,
}

/// What was seen at a spot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Requests.
    pub(super) requests: u32,
    /// Replies.
    pub(super) replies: u32,
}

/// An echo to send.
pub(super) struct Echo {
    /// Its source address; `None` leaves it to the kernel.
    pub(super) source: Option<IpAddr>,
    /// Its destination.
    pub(super) target: IpAddr,
    /// How many.
    pub(super) count: u32,
    /// Payload, the mark included.
    pub(super) payload_bytes: usize,
}

/// What became of it.
#[derive(Debug, Default)]
pub(super) struct Followed {
    /// Round trips of those that were answered.
    pub(super) round_trips: Vec<Duration>,
    /// What was seen, spot by spot.
    pub(super) seen: Vec<Seen>,
    /// Why it could not be sent, in the kernel's words.
    pub(super) refused: Option<io::Error>,
}

/// Sends echoes from `origin` and looks for them at the spots.
///
/// # Errors
/// A packet socket cannot be opened.
pub(super) fn follow(origin: &NetNs, echo: &Echo, spots: &[Spot<'_>]) -> anyhow::Result<Followed> {
    let mut mark = [0_u8; MARK_BYTES];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut mark)
        .context("read random bytes")?;
    let taps: Vec<OwnedFd> = spots
        .iter()
        .map(|spot| spot.netns.run(|| tap(spot.link)))
        .collect::<anyhow::Result<_>>()
        .context("open a packet socket")?;
    let mut followed = Followed { seen: vec![Seen::default(); spots.len()], ..Followed::default() };
    origin.run(|| -> anyhow::Result<()> {
        let socket = icmp_socket(echo).context("open an ICMP socket")?;
        for sequence in 0..echo.count {
            let sent = Instant::now();
            if let Err(error) = send(&socket, echo, sequence as u16, &mark) {
                followed.refused = Some(error);
                break;
            }
            while sent.elapsed() < PATIENCE {
                if received(&socket, &mark, sequence as u16)? {
                    followed.round_trips.push(sent.elapsed());
                    break;
                }
            }
        }
        Ok(())
    })?;
    std::thread::sleep(SETTLE);
    for (tap, seen) in taps.iter().zip(&mut followed.seen) {
        drain(tap, &mark, seen);
    }
    Ok(followed)
}

fn new_socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_option<T>(socket: &OwnedFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the value outlives the call, and its own size is passed.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A packet socket on one link of the thread's namespace.
fn tap(link: u32) -> anyhow::Result<OwnedFd> {
    // Without a protocol it hears nothing until it is bound to the one link.
    let socket = new_socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0)?;
    // Best effort: the smaller default loses frames on a busy link only.
    let _ = set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &TAP_BUFFER_BYTES);
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`, which is plain data.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = link.cast_signed();
    // SAFETY: the address outlives the call, and its own size is passed.
    let done = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(socket)
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer outlives the call and its length is passed.
    let length =
        unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

fn drain(tap: &OwnedFd, mark: &[u8], seen: &mut Seen) {
    let mut frame = vec![0; 65_536];
    while let Ok(length) = receive(tap, &mut frame) {
        match kind_of(&frame[..length], mark) {
            Some(ECHO_REQUEST | ECHO_REQUEST_V6) => seen.requests += 1,
            Some(ECHO_REPLY | ECHO_REPLY_V6) => seen.replies += 1,
            _ => {}
        }
    }
}

/// ICMP type of a frame that has our mark.
fn kind_of(frame: &[u8], mark: &[u8]) -> Option<u8> {
    let at = frame.windows(mark.len()).position(|window| window == mark)?;
    frame.get(at.checked_sub(ICMP_HEADER_BYTES)?).copied()
}

fn icmp_socket(echo: &Echo) -> io::Result<OwnedFd> {
    let (domain, protocol) = match echo.target {
        IpAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP),
        IpAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6),
    };
    let socket = new_socket(domain, libc::SOCK_RAW, protocol)?;
    let wait = libc::timeval { tv_sec: 0, tv_usec: 20_000 };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
    // Larger than the path is an answer too, instead of fragments.
    match echo.target {
        IpAddr::V4(_) => {
            set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_DO)?;
        }
        IpAddr::V6(_) => {
            let never = &libc::IPV6_PMTUDISC_DO;
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, never)?;
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, &1)?;
        }
    }
    if let Some(source) = echo.source {
        let (address, length) = socket_address(source);
        // SAFETY: the address outlives the call, and its own size is passed.
        let done = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(socket)
}

/// An address as the system's calls take it, and its length.
fn socket_address(ip: IpAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all-zero bytes are a valid `sockaddr_storage`, which is plain data.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let place = &raw mut storage;
    let length = match ip {
        IpAddr::V4(ip) => {
            // SAFETY: a `sockaddr_storage` has room for every kind of address, and is aligned for it.
            let address = unsafe { &mut *place.cast::<libc::sockaddr_in>() };
            address.sin_family = libc::AF_INET as u16;
            address.sin_addr.s_addr = ip.to_bits().to_be();
            size_of::<libc::sockaddr_in>()
        }
        IpAddr::V6(ip) => {
            // SAFETY: as above.
            let address = unsafe { &mut *place.cast::<libc::sockaddr_in6>() };
            address.sin6_family = libc::AF_INET6 as u16;
            address.sin6_addr.s6_addr = ip.octets();
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, length as libc::socklen_t)
}

fn send(socket: &OwnedFd, echo: &Echo, sequence: u16, mark: &[u8]) -> io::Result<()> {
    let kind = if echo.target.is_ipv4() { ECHO_REQUEST } else { ECHO_REQUEST_V6 };
    let packet = request(kind, sequence, mark, echo.payload_bytes);
    let (address, length) = socket_address(echo.target);
    // SAFETY: packet and address outlive the call, and their own sizes are passed.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const address).cast(),
            length,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An ICMP echo request (RFC 792), its checksum included. That of ICMPv6 covers the addresses, too; the kernel writes it.
fn request(kind: u8, sequence: u16, mark: &[u8], payload_bytes: usize) -> Vec<u8> {
    let mut packet = vec![kind, 0, 0, 0, mark[0], mark[1]];
    packet.extend(sequence.to_be_bytes());
    packet.extend(mark);
    packet.resize(ICMP_HEADER_BYTES + payload_bytes.max(mark.len()), 0);
    let sum = packet.chunks(2).fold(0_u32, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
    });
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Whether the reply came; waits a little.
fn received(socket: &OwnedFd, mark: &[u8], sequence: u16) -> io::Result<bool> {
    let mut packet = vec![0; 65_536];
    match receive(socket, &mut packet) {
        Ok(length) => {
            let packet = &packet[..length];
            let at = packet.windows(mark.len()).position(|window| window == mark);
            let number = at
                .and_then(|at| packet.get(at.checked_sub(2)?..at))
                .map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
            let reply = matches!(kind_of(packet, mark), Some(ECHO_REPLY | ECHO_REPLY_V6));
            Ok(reply && number == Some(sequence))
        }
        Err(error)
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
        {
            Ok(false)
        }
        // What the path reports back (unreachable, too large): the echo is lost, and the waiting goes on.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ECONNREFUSED | libc::EMSGSIZE)
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_is_known_inside_other_headers_and_its_checksum_is_right() {
        let mark = [7_u8; MARK_BYTES];
        let packet = request(ECHO_REQUEST, 3, &mark, 56);
        assert_eq!(packet.len(), ICMP_HEADER_BYTES + 56);
        let sum: u32 = packet.chunks(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "RFC 1071");

        let mut frame = vec![0xee; 50];
        frame.extend(&packet);
        assert_eq!(kind_of(&frame, &mark), Some(ECHO_REQUEST));
        assert_eq!(kind_of(&frame, &[8; MARK_BYTES]), None);
        assert_eq!(kind_of(&mark, &mark), None, "no header before it");
    }
}
