//! One question to nftables.
//!
//! Rules are written with the `nft` tool, which costs a process. A caller that only wants to know whether its chain
//! is still there, once per pod, asks the kernel itself.

use netlink_packet_core::NetlinkSerializable;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::{Netlink, NetlinkError};

// `linux/netfilter/nfnetlink.h`, `linux/netfilter/nf_tables.h`.
const SUBSYSTEM_NFTABLES: u16 = 10;
const MESSAGE_GET_CHAIN: u16 = 4;
const FAMILY_INET: u8 = 1;
const FAMILY_IPV4: u8 = 2;
const FAMILY_IPV6: u8 = 10;
const ATTRIBUTE_CHAIN_TABLE: u16 = 1;
const ATTRIBUTE_CHAIN_NAME: u16 = 3;

struct Message(Vec<u8>);

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        SUBSYSTEM_NFTABLES << 8 | MESSAGE_GET_CHAIN
    }

    fn buffer_len(&self) -> usize {
        self.0.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0);
    }
}

/// Whether nftables has this chain in this table of family `inet`, in the namespace of the calling thread.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn nft_chain_exists(table: &str, chain: &str) -> Result<bool, NetlinkError> {
    exists(FAMILY_INET, "inet", table, chain)
}

/// The same for a table of family `ip`, as those of iptables are.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn nft_ip_chain_exists(table: &str, chain: &str) -> Result<bool, NetlinkError> {
    exists(FAMILY_IPV4, "ip", table, chain)
}

/// The same for a table of family `ip6`.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn nft_ip6_chain_exists(table: &str, chain: &str) -> Result<bool, NetlinkError> {
    exists(FAMILY_IPV6, "ip6", table, chain)
}

fn exists(family: u8, name: &str, table: &str, chain: &str) -> Result<bool, NetlinkError> {
    let mut payload = vec![family, 0, 0, 0];
    put_text(&mut payload, ATTRIBUTE_CHAIN_TABLE, table);
    put_text(&mut payload, ATTRIBUTE_CHAIN_NAME, chain);
    let request = || format!("look for nftables chain {name} {table} {chain}");
    let netlink = Netlink::open_protocol(NETLINK_NETFILTER)?;
    match netlink.ask(Message(payload), request, |_| Ok(())) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn put_text(payload: &mut Vec<u8>, kind: u16, text: &str) {
    // Names of tables and chains are bounded far below this by the kernel, which refuses what is cut here.
    let text = &text.as_bytes()[..text.len().min(255)];
    let length = (4 + text.len() + 1) as u16;
    payload.extend(length.to_ne_bytes());
    payload.extend(kind.to_ne_bytes());
    payload.extend(text);
    payload.push(0);
    payload.resize(payload.len().next_multiple_of(4), 0);
}
