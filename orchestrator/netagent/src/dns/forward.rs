//! Names outside the cluster: ask the node's own resolvers, and remember for a moment.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::answer::MAX_UDP_PAYLOAD;

/// Patience with one resolver. A stub resolver gives up after 5 s, so that two can be asked in time.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);
/// Longest memory of an answer, CoreDNS's `cache 30`.
const MAX_CACHE_TTL: u32 = 30;
/// Memory of a denial that does not say how long it holds.
const DEFAULT_NEGATIVE_TTL: u32 = 5;
/// Answers remembered. When full, everything is forgotten: cheap, and rare at this size.
const CACHE_SIZE: usize = 4096;

type Key = (Name, RecordType, bool);

/// Asks resolvers outside.
#[derive(Debug)]
pub struct Forwarder {
    upstream: Vec<SocketAddr>,
    cache: Mutex<HashMap<Key, (Message, Instant, u32)>>,
}

impl Forwarder {
    /// Asks `upstream` in order, the next one when one fails.
    #[must_use]
    pub fn new(upstream: Vec<SocketAddr>) -> Self {
        Self { upstream, cache: Mutex::new(HashMap::new()) }
    }

    /// What the outside knows; `None` if nobody answers.
    pub async fn resolve(&self, name: &Name, kind: RecordType, dnssec: bool) -> Option<Message> {
        let key = (name.to_lowercase(), kind, dnssec);
        if let Some(known) = self.remembered(&key) {
            return Some(known);
        }
        let mut last = None;
        for server in &self.upstream {
            match timeout(ATTEMPT_LIMIT, ask(*server, name, kind, dnssec)).await {
                Ok(Ok(answer)) => {
                    let code = answer.metadata.response_code;
                    if matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
                        self.remember(key, &answer);
                        return Some(answer);
                    }
                    last = Some(answer);
                }
                Ok(Err(error)) => debug!(%server, %name, %error, "a resolver failed"),
                Err(_) => debug!(%server, %name, "a resolver does not answer"),
            }
        }
        last
    }

    fn remembered(&self, key: &Key) -> Option<Message> {
        let mut cache = self.cache.lock();
        let (answer, since, ttl) = cache.get(key)?;
        let age = u32::try_from(since.elapsed().as_secs()).unwrap_or(u32::MAX);
        if age >= *ttl {
            cache.remove(key);
            return None;
        }
        let mut answer = answer.clone();
        for record in
            answer.answers.iter_mut().chain(&mut answer.authorities).chain(&mut answer.additionals)
        {
            record.ttl = record.ttl.saturating_sub(age);
        }
        Some(answer)
    }

    fn remember(&self, key: Key, answer: &Message) {
        let shortest = answer.answers.iter().map(|record| record.ttl).min();
        let ttl = shortest.unwrap_or_else(|| {
            let soa = answer.authorities.iter().find_map(|record| match &record.data {
                RData::SOA(soa) => Some(soa.minimum.min(record.ttl)),
                _ => None,
            });
            soa.unwrap_or(DEFAULT_NEGATIVE_TTL)
        });
        let mut cache = self.cache.lock();
        if cache.len() >= CACHE_SIZE {
            cache.clear();
        }
        cache.insert(key, (answer.clone(), Instant::now(), ttl.min(MAX_CACHE_TTL)));
    }
}

async fn ask(
    server: SocketAddr,
    name: &Name,
    kind: RecordType,
    dnssec: bool,
) -> std::io::Result<Message> {
    let mut query = Message::query();
    query.metadata.id = rand::random();
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name.clone(), kind));
    let mut edns = Edns::new();
    edns.set_max_payload(MAX_UDP_PAYLOAD).set_version(0).set_dnssec_ok(dnssec);
    query.set_edns(edns);
    let bytes = query.to_vec().map_err(std::io::Error::other)?;
    // A socket of its own for each query: a random source port is half of the protection against forged answers.
    let local: SocketAddr = if server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(server).await?;
    socket.send(&bytes).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let answer = loop {
        let length = socket.recv(&mut buffer).await?;
        match Message::from_vec(&buffer[..length]) {
            Ok(answer) if belongs(&answer, &query) => break answer,
            _ => debug!(%server, "a datagram that answers nothing"),
        }
    };
    if answer.metadata.truncation { over_tcp(server, &query, &bytes).await } else { Ok(answer) }
}

async fn over_tcp(server: SocketAddr, query: &Message, bytes: &[u8]) -> std::io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(std::io::Error::other)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(bytes);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    let answer = Message::from_vec(&answer).map_err(std::io::Error::other)?;
    if belongs(&answer, query) {
        Ok(answer)
    } else {
        Err(std::io::Error::other("an answer to another question"))
    }
}

fn belongs(answer: &Message, query: &Message) -> bool {
    answer.metadata.id == query.metadata.id && answer.queries == query.queries
}
