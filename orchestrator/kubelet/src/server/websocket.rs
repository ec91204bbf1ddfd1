//! The hand-over to a WebSocket: which sub-protocol, and the 101 answer (RFC 6455 §4.2.2).

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::server::{Body, text};

/// Framing of the channels (reference/orchestrator.md §1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// With half-close: `ff`, channel.
    V5,
    /// Ends with a Status on channel 3.
    V4,
    /// Plain text on channel 3, and only for failures.
    V1,
}

impl Protocol {
    const ALL: [(&'static str, Self); 4] = [
        ("v5.channel.k8s.io", Self::V5),
        ("v4.channel.k8s.io", Self::V4),
        ("v3.channel.k8s.io", Self::V1),
        ("channel.k8s.io", Self::V1),
    ];
}

/// The sub-protocols a client offers.
pub(super) fn offered(headers: &HeaderMap) -> Vec<&str> {
    headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .collect()
}

/// A sub-protocol's name for the answer, and what it means; the client may have named none.
pub(super) type Chosen<P> = (Option<&'static str>, P);

/// The best protocol of those offered for a remote command; a browser that offers none gets the oldest.
pub(super) fn choose(headers: &HeaderMap) -> Option<Chosen<Protocol>> {
    let offered = offered(headers);
    if offered.is_empty() {
        return Some((None, Protocol::V1));
    }
    Protocol::ALL
        .into_iter()
        .find(|(name, _)| offered.contains(name))
        .map(|(name, protocol)| (Some(name), protocol))
}

/// The answer to send, and the protocol to speak after it.
///
/// # Errors
/// The answer for a request that is no WebSocket of ours.
#[expect(clippy::result_large_err, reason = "the error is the answer itself, sent once")]
pub(super) fn accept<P>(
    request: &Request<Incoming>,
    choose: impl FnOnce(&HeaderMap) -> Option<Chosen<P>>,
) -> Result<(Response<Body>, P), Response<Body>> {
    let headers = request.headers();
    let has = |name: header::HeaderName, word: &str| {
        let values = headers.get_all(name);
        values
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(word)))
    };
    if !has(header::CONNECTION, "upgrade") || !has(header::UPGRADE, "websocket") {
        return Err(text(
            StatusCode::BAD_REQUEST,
            "Upgrade request required: a WebSocket or SPDY/3.1",
        ));
    }
    let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY) else {
        return Err(text(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is missing"));
    };
    let Some((name, protocol)) = choose(headers) else {
        return Err(text(
            StatusCode::FORBIDDEN,
            "unable to upgrade: none of the offered sub-protocols is supported",
        ));
    };
    let mut answer = text(StatusCode::SWITCHING_PROTOCOLS, "");
    let out = answer.headers_mut();
    out.clear();
    out.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    out.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(value) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        out.insert(header::SEC_WEBSOCKET_ACCEPT, value);
    }
    if let Some(name) = name {
        out.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    }
    Ok((answer, protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_offered_protocol_is_chosen() {
        let choose = |offer: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(offer));
            super::choose(&headers).map(|(_, protocol)| protocol)
        };
        assert_eq!(choose("v4.channel.k8s.io, v5.channel.k8s.io"), Some(Protocol::V5));
        assert_eq!(choose("v4.channel.k8s.io"), Some(Protocol::V4));
        assert_eq!(choose("something.else"), None);
        assert_eq!(super::choose(&HeaderMap::new()), Some((None, Protocol::V1)));
    }
}
