//! Traffic control as far as shaping needs it: a token bucket at a link's way out, and the redirection of what comes in
//! to another link's way out.
//!
//! What comes in cannot be queued, so a link that is to be shaped in that direction hands its packets to an
//! intermediate functional block (IFB), a link that only has a way out.

use std::collections::BTreeSet;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};

use crate::socket::{attribute, read_u32, text};
use crate::{Netlink, NetlinkError};

const HEADER_BYTES: usize = 20;
const INDEX_AT: usize = 4;
const PARENT_AT: usize = 12;
const ROOT: u32 = u32::MAX;

// `linux/rtnetlink.h`, `linux/pkt_sched.h`, `linux/pkt_cls.h`, `linux/tc_act/tc_mirred.h`.
const NESTED: u16 = 0x8000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TBF_PARAMETERS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
/// In `struct tc_tbf_qopt`: rate, peak rate, then limit, buffer and MTU.
const TBF_PARAMETERS_BYTES: usize = 36;
const TBF_RATE_AT: usize = 8;
const TBF_LIMIT_AT: usize = 24;
const LINK_LAYER_ETHERNET: u8 = 1;
const U32_SELECTOR: u16 = 5;
const U32_ACTION: u16 = 7;
const U32_TERMINAL: u8 = 1;
const ACTION_FIRST: u16 = 1;
const ACTION_KIND: u16 = 1;
const ACTION_OPTIONS: u16 = 2;
const MIRRED_PARAMETERS: u16 = 2;
const ACTION_STOLEN: i32 = 4;
const MIRRED_EGRESS_REDIRECT: i32 = 1;
const PROTOCOL_ALL: u16 = 3;
/// What a virtual link has by itself.
const UNSHAPED: &str = "noqueue";
/// Of our filter: behind those that others put first.
const FILTER_PRIORITY: u32 = 100;

/// A token bucket filter: lets `rate` bytes a second through, and `burst` bytes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    /// Bytes a second.
    pub rate: u64,
    /// Bytes at once.
    pub burst: u32,
    /// Bytes that wait; what goes beyond is dropped.
    pub limit: u32,
}

/// A token bucket as the kernel tells it: the burst comes back as a time, and is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenTokenBucket {
    /// Bytes a second.
    pub rate: u64,
    /// Bytes that wait.
    pub limit: u32,
}

impl Netlink {
    /// Puts a token bucket at a link's way out, instead of what is there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_token_bucket(&self, link: u32, bucket: &TokenBucket) -> Result<(), NetlinkError> {
        let mut parameters = [0; TBF_PARAMETERS_BYTES];
        parameters[1] = LINK_LAYER_ETHERNET;
        // Saturated where the 64 bit attribute says it all.
        let rate = u32::try_from(bucket.rate).unwrap_or(u32::MAX);
        parameters[TBF_RATE_AT..TBF_RATE_AT + 4].copy_from_slice(&rate.to_ne_bytes());
        parameters[TBF_LIMIT_AT..TBF_LIMIT_AT + 4].copy_from_slice(&bucket.limit.to_ne_bytes());
        let mut options = Vec::new();
        put(&mut options, TBF_PARAMETERS, &parameters);
        put(&mut options, TBF_BURST, &bucket.burst.to_ne_bytes());
        if bucket.rate > u64::from(u32::MAX) {
            put(&mut options, TBF_RATE64, &bucket.rate.to_ne_bytes());
        }
        let message =
            tc_message(link, TcHandle::ROOT, TcHandle { major: 1, minor: 0 }, "tbf", options);
        let request = || format!("put a token bucket on link {link}");
        self.change(
            NLM_F_CREATE | NLM_F_REPLACE,
            RouteNetlinkMessage::NewQueueDiscipline(message),
            request,
        )
    }

    /// The token bucket at a link's way out, or `None`.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn token_bucket(&self, link: u32) -> Result<Option<SeenTokenBucket>, NetlinkError> {
        let read = |payload: &[u8]| {
            let here = read_u32(payload, INDEX_AT) == Some(link)
                && read_u32(payload, PARENT_AT) == Some(ROOT);
            Ok(if here { parse_token_bucket(payload) } else { None })
        };
        let request = || format!("look for a token bucket on link {link}");
        let message = RouteNetlinkMessage::GetQueueDiscipline(index_message(link));
        Ok(self.dump(message, request, read)?.into_iter().next())
    }

    /// Links with a queue discipline or classifier that somebody put there; what the kernel gives a virtual link by itself
    /// is none.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn shaped_links(&self) -> Result<BTreeSet<u32>, NetlinkError> {
        let read = |payload: &[u8]| {
            let kind = payload.get(HEADER_BYTES..).and_then(|all| attribute(all, TCA_KIND));
            let is_made = kind.and_then(text).is_some_and(|kind| kind != UNSHAPED);
            Ok(read_u32(payload, INDEX_AT).filter(|_| is_made))
        };
        let message = RouteNetlinkMessage::GetQueueDiscipline(index_message(0));
        let all = self.dump(message, || "list queue disciplines".to_owned(), read)?;
        Ok(all.into_iter().collect())
    }

    /// Hands everything that comes in by `link` to the way out of `to`; what a filter with a lower number has taken
    /// before is not among it. Repeated, it replaces the destination.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn redirect_ingress(&self, link: u32, to: u32) -> Result<(), NetlinkError> {
        let request = || format!("redirect what comes in by link {link} to link {to}");
        // As classifier-action: others (eBPF programs) use the same hook of the link.
        let hook = TcHandle { major: 0xffff, minor: 0 };
        let message = tc_message(link, TcHandle::CLSACT, hook, "clsact", Vec::new());
        match self.change(
            NLM_F_CREATE | NLM_F_EXCL,
            RouteNetlinkMessage::NewQueueDiscipline(message),
            request,
        ) {
            Err(error) if error.is_exists() => {}
            made => made?,
        }
        let mut action = Vec::new();
        put(&mut action, ACTION_KIND, b"mirred\0");
        let mut parameters = Vec::new();
        // `struct tc_mirred`: index, capabilities, action, references, bindings, direction, destination.
        parameters.extend([0; 8]);
        parameters.extend(ACTION_STOLEN.to_ne_bytes());
        parameters.extend([0; 8]);
        parameters.extend(MIRRED_EGRESS_REDIRECT.to_ne_bytes());
        parameters.extend(to.to_ne_bytes());
        let mut inside = Vec::new();
        put(&mut inside, MIRRED_PARAMETERS, &parameters);
        put(&mut action, ACTION_OPTIONS | NESTED, &inside);
        let mut actions = Vec::new();
        put(&mut actions, ACTION_FIRST | NESTED, &action);

        // `struct tc_u32_sel` with one `struct tc_u32_key` that matches every packet.
        let mut selector = vec![0; 16];
        selector[0] = U32_TERMINAL;
        selector[2] = 1;
        selector.extend([0; 16]);
        let mut options = Vec::new();
        put(&mut options, U32_SELECTOR, &selector);
        put(&mut options, U32_ACTION | NESTED, &actions);
        let parent = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };
        // The first filter of the first table, so that it is replaced and not joined by a second one.
        let handle = TcHandle { major: 0x8000, minor: 0x0800 };
        let mut message = tc_message(link, parent, handle, "u32", options);
        message.header.info = FILTER_PRIORITY << 16 | u32::from(PROTOCOL_ALL.to_be());
        self.change(
            NLM_F_CREATE | NLM_F_REPLACE,
            RouteNetlinkMessage::NewTrafficFilter(message),
            request,
        )
    }

    /// Whether something that comes in by a link is filtered as [`redirect_ingress`](Self::redirect_ingress) does.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn has_redirect(&self, link: u32) -> Result<bool, NetlinkError> {
        let mut message = index_message(link);
        message.header.parent = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };
        let read = |payload: &[u8]| {
            let attributes = payload.get(HEADER_BYTES..).unwrap_or_default();
            let options = attribute(attributes, TCA_OPTIONS).unwrap_or_default();
            Ok(attribute(options, U32_ACTION).map(drop))
        };
        let request = || format!("list filters of link {link}");
        match self.dump(RouteNetlinkMessage::GetTrafficFilter(message), request, read) {
            Ok(found) => Ok(!found.is_empty()),
            Err(error) if error.is_not_found() || error.errno() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn index_message(link: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(link).unwrap_or(0);
    message
}

fn tc_message(
    link: u32,
    parent: TcHandle,
    handle: TcHandle,
    kind: &str,
    options: Vec<u8>,
) -> TcMessage {
    let mut message = index_message(link);
    message.header.parent = parent;
    message.header.handle = handle;
    message.attributes.push(TcAttribute::Kind(kind.to_owned()));
    if !options.is_empty() {
        let options = DefaultNla::new(TCA_OPTIONS | NESTED, options);
        message.attributes.push(TcAttribute::Other(options));
    }
    message
}

fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("parameters are short");
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

pub(crate) fn parse_token_bucket(payload: &[u8]) -> Option<SeenTokenBucket> {
    let attributes = payload.get(HEADER_BYTES..)?;
    if attribute(attributes, TCA_KIND).and_then(text).as_deref() != Some("tbf") {
        return None;
    }
    let options = attribute(attributes, TCA_OPTIONS)?;
    let parameters = attribute(options, TBF_PARAMETERS)?;
    let wide = attribute(options, TBF_RATE64)
        .and_then(|rate| rate.first_chunk())
        .map(|rate| u64::from_ne_bytes(*rate));
    let rate = wide.or_else(|| read_u32(parameters, TBF_RATE_AT).map(u64::from))?;
    Some(SeenTokenBucket { rate, limit: read_u32(parameters, TBF_LIMIT_AT)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_bucket_is_read_and_another_discipline_is_none() {
        let mut parameters = [0; TBF_PARAMETERS_BYTES];
        parameters[TBF_RATE_AT..TBF_RATE_AT + 4].copy_from_slice(&125_000_u32.to_ne_bytes());
        parameters[TBF_LIMIT_AT..TBF_LIMIT_AT + 4].copy_from_slice(&9000_u32.to_ne_bytes());
        let payload = |kind: &[u8], rate64: Option<u64>| {
            let mut options = Vec::new();
            put(&mut options, TBF_PARAMETERS, &parameters);
            if let Some(rate) = rate64 {
                put(&mut options, TBF_RATE64, &rate.to_ne_bytes());
            }
            let mut out = vec![0; HEADER_BYTES];
            put(&mut out, TCA_KIND, kind);
            put(&mut out, TCA_OPTIONS | NESTED, &options);
            out
        };
        let seen = |rate| Some(SeenTokenBucket { rate, limit: 9000 });
        assert_eq!(parse_token_bucket(&payload(b"tbf\0", None)), seen(125_000));
        assert_eq!(parse_token_bucket(&payload(b"tbf\0", Some(1 << 33))), seen(1 << 33));
        assert_eq!(parse_token_bucket(&payload(b"fq\0", None)), None);
        assert_eq!(parse_token_bucket(&[0; 8]), None);
    }
}
