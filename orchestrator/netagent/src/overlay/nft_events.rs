//! News of nftables: somebody removed our tables (`nft flush ruleset`, a restarted firewall service), or made the tables
//! of a firewall that drops what it does not know (Docker).
//!
//! Only removals of ours count: the agent itself never removes these in its normal work, so that it does not wake itself.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::closed;
use crate::services;

// `linux/netfilter/nfnetlink.h`, `linux/netfilter/nf_tables.h`.
const GROUP_NFTABLES: u32 = 7;
const SUBSYSTEM_NFTABLES: u16 = 10;
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const DELETE_CHAIN: u16 = 5;
const DELETE_RULE: u16 = 8;
const DELETE_SET: u16 = 11;
/// The table's name is the first attribute of all of these.
const ATTRIBUTE_TABLE: u16 = 1;
const NETLINK_HEADER: usize = 16;
const NETFILTER_HEADER: usize = 4;
/// The table of iptables' filter rules.
const IPTABLES_FILTER: &str = "filter";
/// Wait before a broken socket is opened again.
const RETRY: Duration = Duration::from_secs(5);

/// Who is told.
#[derive(Debug, Clone, Default)]
pub struct NftNews {
    /// The overlay's table, or that of a firewall of others.
    pub overlay: Arc<Notify>,
    /// The table of Services.
    pub services: Arc<Notify>,
}

/// Tells news until cancelled. Without it damage is still found, at the next look without a reason.
pub(crate) async fn follow(news: NftNews, cancel: CancellationToken) {
    let mut told = false;
    while !cancel.is_cancelled() {
        let ended = tokio::select! {
            () = cancel.cancelled() => return,
            ended = listen(&news) => ended,
        };
        if let Err(error) = ended
            && !std::mem::replace(&mut told, true)
        {
            warn!(%error, "changes of nftables are not heard; looking now and then instead");
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = sleep(RETRY) => {}
        }
    }
}

async fn listen(news: &NftNews) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    socket.add_membership(GROUP_NFTABLES)?;
    socket.set_non_blocking(true)?;
    // SAFETY: the socket owns its descriptor and keeps it for as long as it lives.
    let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
    let mut buffer = Vec::with_capacity(64 * 1024);
    loop {
        let mut ready = socket.readable().await?;
        buffer.clear();
        match ready.try_io(|socket| socket.get_ref().recv(&mut buffer, 0)) {
            Ok(Ok(_)) => tell(&buffer, news),
            // Some were lost: they may have been about us.
            Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                news.overlay.notify_one();
                news.services.notify_one();
            }
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

fn tell(datagram: &[u8], news: &NftNews) {
    let mut rest = datagram;
    while let Some((kind, table)) = next(&mut rest) {
        match (kind, table) {
            (DELETE_TABLE, services::TABLE) => news.services.notify_one(),
            (DELETE_TABLE | DELETE_CHAIN | DELETE_RULE | DELETE_SET, closed::TABLE)
            | (NEW_TABLE | NEW_CHAIN | DELETE_RULE, IPTABLES_FILTER) => news.overlay.notify_one(),
            _ => {}
        }
    }
}

/// The next message about nftables: what happened, and the name of the table.
fn next<'a>(rest: &mut &'a [u8]) -> Option<(u16, &'a str)> {
    loop {
        let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
        let message = rest.get(NETLINK_HEADER..length)?;
        *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        if kind >> 8 == SUBSYSTEM_NFTABLES {
            return Some((kind & 0xff, table(message).unwrap_or_default()));
        }
    }
}

fn table(message: &[u8]) -> Option<&str> {
    let attribute = message.get(NETFILTER_HEADER..)?;
    let length = usize::from(u16::from_ne_bytes(*attribute.first_chunk()?));
    let kind = u16::from_ne_bytes(*attribute.get(2..)?.first_chunk()?);
    let value = attribute.get(4..length).filter(|_| kind == ATTRIBUTE_TABLE)?;
    std::str::from_utf8(value.split(|byte| *byte == 0).next()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, table: &str) -> Vec<u8> {
        let value = [table.as_bytes(), b"\0"].concat();
        let attribute = 4 + value.len();
        let length = NETLINK_HEADER + NETFILTER_HEADER + attribute.next_multiple_of(4);
        let mut bytes = u32::try_from(length).expect("small").to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 14]);
        bytes.extend(u16::try_from(attribute).expect("small").to_ne_bytes());
        bytes.extend(ATTRIBUTE_TABLE.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(length, 0);
        bytes
    }

    #[test]
    fn messages_of_one_datagram_are_told_apart() {
        let nft = |kind| SUBSYSTEM_NFTABLES << 8 | kind;
        let datagram = [
            message(nft(DELETE_TABLE), "orch"),
            message(3, "not nftables"),
            message(nft(NEW_CHAIN), "filter"),
        ]
        .concat();
        let mut rest = datagram.as_slice();
        assert_eq!(next(&mut rest), Some((DELETE_TABLE, "orch")));
        assert_eq!(next(&mut rest), Some((NEW_CHAIN, "filter")));
        assert_eq!(next(&mut rest), None);
        assert_eq!(next(&mut &datagram[..10]), None);
    }
}
