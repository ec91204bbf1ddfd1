//! Telling the neighbourhood that an address has a new MAC.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::{MacBytes, NetlinkError};

const ETHERNET_BROADCAST: MacBytes = [0xff; 6];
/// `ETH_P_ARP`.
const PROTOCOL_ARP: u16 = 0x0806;

/// Sends a gratuitous ARP request for an IPv4 address, from the namespace of the calling thread. Neighbours that
/// knew the address of a former pod would else send to a dead MAC for as long as they believe it.
///
/// # Errors
/// If the frame cannot be sent.
pub fn announce(link: u32, mac: MacBytes, ip: Ipv4Addr) -> Result<(), NetlinkError> {
    send(link, &gratuitous_arp(mac, ip)).map_err(|source| NetlinkError::Socket {
        request: format!("announce {ip} on link {link}"),
        source,
    })
}

/// RFC 826, RFC 5227 §3: sender and target are the same address.
fn gratuitous_arp(mac: MacBytes, ip: Ipv4Addr) -> [u8; 28] {
    let mut frame = [0; 28];
    frame[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]); // Ethernet, IPv4, their lengths, request
    frame[8..14].copy_from_slice(&mac);
    frame[14..18].copy_from_slice(&ip.octets());
    frame[24..28].copy_from_slice(&ip.octets());
    frame
}

fn send(link: u32, frame: &[u8]) -> io::Result<()> {
    // SAFETY: plain system call; the result is checked before it is used.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a file descriptor that was just made, and that nobody else knows.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut sll_addr = [0; 8];
    sll_addr[..6].copy_from_slice(&ETHERNET_BROADCAST);
    let target = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: PROTOCOL_ARP.to_be(),
        sll_ifindex: i32::try_from(link).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr,
    };
    // SAFETY: both pointers lead to live values of the lengths that are given with them.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const target).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sender_and_target_of_a_gratuitous_arp_are_one_address() {
        let frame = gratuitous_arp([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 1, 2, 3));
        assert_eq!(frame[8..18], [2, 0, 0, 0, 0, 1, 10, 1, 2, 3]);
        assert_eq!(frame[18..28], [0, 0, 0, 0, 0, 0, 10, 1, 2, 3]);
    }
}
