//! The server's sockets.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, ResponseCode};
use hickory_proto::rr::RecordType;
use rand::seq::SliceRandom as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::answer::{Outcome, answer, encode, response_to};
use super::forward::Forwarder;
use super::zone::{Domain, Zone};
use crate::status::NetStatus;

/// Queries under way to the outside. More wait in the socket's buffer, and are lost when that is full: the clients ask
/// again.
const MAX_FORWARDS: usize = 512;
/// TCP clients at a time; the next ones wait in the backlog.
const MAX_TCP_CLIENTS: usize = 128;
/// A TCP client that says nothing for so long is closed.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Wait before the sockets are opened anew.
const RETRY: Duration = Duration::from_secs(1);

/// The node's DNS server.
pub struct Server {
    /// Where it answers.
    pub address: SocketAddr,
    /// What it is responsible for.
    pub domain: Domain,
    /// The names, once they are known.
    pub zone: watch::Receiver<Option<Arc<Zone>>>,
    /// For all other names.
    pub forwarder: Arc<Forwarder>,
    /// Told when the server answers.
    pub status: Arc<watch::Sender<NetStatus>>,
}

impl Server {
    /// Serves until cancelled. If a socket cannot be opened it says so once and goes on trying.
    pub async fn run(self, cancel: CancellationToken) {
        let server = Arc::new(self);
        let mut complained = false;
        loop {
            let error = tokio::select! {
                () = cancel.cancelled() => return,
                error = server.serve(&cancel) => error,
            };
            if !complained {
                warn!(address = %server.address, %error, "cluster DNS does not answer here yet; is another DNS server on this address? trying again");
                complained = true;
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = sleep(RETRY) => {}
            }
        }
    }

    async fn serve(self: &Arc<Self>, cancel: &CancellationToken) -> std::io::Error {
        let sockets = async {
            std::io::Result::Ok((
                Arc::new(UdpSocket::bind(self.address).await?),
                TcpListener::bind(self.address).await?,
            ))
        };
        let (udp, tcp) = match sockets.await {
            Ok(sockets) => sockets,
            Err(error) => return error,
        };
        info!(address = %self.address, domain = self.domain.name, "cluster DNS answers");
        // Each family has a server; one of them is named.
        self.status.send_if_modified(|status| {
            let first = status.dns.is_none() || self.address.is_ipv4();
            if first {
                status.dns = Some(self.address.ip().to_string());
            }
            first
        });
        // Dropped with this future, which ends the tasks.
        let stop = cancel.child_token();
        let _guard = stop.clone().drop_guard();
        tokio::select! {
            error = self.clone().serve_udp(udp, stop.clone()) => error,
            error = self.clone().serve_tcp(tcp, stop.clone()) => error,
        }
    }

    async fn serve_udp(
        self: Arc<Self>,
        socket: Arc<UdpSocket>,
        stop: CancellationToken,
    ) -> std::io::Error {
        let forwards = Arc::new(Semaphore::new(MAX_FORWARDS));
        let mut buffer = vec![0; usize::from(u16::MAX)];
        loop {
            let (length, client) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                // ICMP errors of earlier answers surface here; they say nothing about the socket.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => continue,
                Err(error) => return error,
            };
            let Ok(query) = Message::from_vec(&buffer[..length]) else {
                debug!(%client, "a datagram that is no query");
                continue;
            };
            if let Some(response) = self.answer_from_zone(&query) {
                send(&socket, client, &response, &query).await;
                continue;
            }
            let Ok(permit) = forwards.clone().acquire_owned().await else { continue };
            let (server, socket, stop) = (self.clone(), socket.clone(), stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    response = server.answer_from_outside(&query) => send(&socket, client, &response, &query).await,
                }
                drop(permit);
            });
        }
    }

    async fn serve_tcp(
        self: Arc<Self>,
        listener: TcpListener,
        stop: CancellationToken,
    ) -> std::io::Error {
        let clients = Arc::new(Semaphore::new(MAX_TCP_CLIENTS));
        loop {
            let Ok(permit) = clients.clone().acquire_owned().await else { continue };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => return error,
            };
            let (server, stop) = (self.clone(), stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    result = server.serve_client(stream) => {
                        if let Err(error) = result {
                            debug!(%error, "a TCP client went away");
                        }
                    }
                }
                drop(permit);
            });
        }
    }

    async fn serve_client(&self, mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            let Ok(length) = timeout(TCP_IDLE, stream.read_u16()).await else { return Ok(()) };
            let length = match length {
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            };
            let mut buffer = vec![0; usize::from(length)];
            let Ok(read) = timeout(TCP_IDLE, stream.read_exact(&mut buffer)).await else {
                return Ok(());
            };
            read?;
            let query = Message::from_vec(&buffer).map_err(std::io::Error::other)?;
            let response = match self.answer_from_zone(&query) {
                Some(response) => response,
                None => self.answer_from_outside(&query).await,
            };
            let bytes = encode(&response, &query, true)
                .ok_or_else(|| std::io::Error::other("an answer too long"))?;
            let length = u16::try_from(bytes.len()).map_err(std::io::Error::other)?;
            let mut framed = length.to_be_bytes().to_vec();
            framed.extend_from_slice(&bytes);
            stream.write_all(&framed).await?;
        }
    }

    /// The answer, if the zone alone gives it.
    fn answer_from_zone(&self, query: &Message) -> Option<Message> {
        let zone = self.zone.borrow().clone();
        match answer(query, &self.domain, zone.as_deref()) {
            Outcome::Done(mut response) => {
                // Clients take the first address; let each endpoint be it equally often.
                let address = |kind| matches!(kind, RecordType::A | RecordType::AAAA);
                if response.answers.iter().all(|record| address(record.record_type())) {
                    response.answers.shuffle(&mut rand::rng());
                }
                Some(response)
            }
            Outcome::Forward | Outcome::Chase(..) => None,
        }
    }

    /// The answer with the help of the resolvers outside.
    async fn answer_from_outside(&self, query: &Message) -> Message {
        let zone = self.zone.borrow().clone();
        let (mut response, name) = match answer(query, &self.domain, zone.as_deref()) {
            Outcome::Done(response) => return response,
            Outcome::Forward => {
                let name = query
                    .queries
                    .first()
                    .map(|question| question.name().clone())
                    .unwrap_or_default();
                (response_to(query), name)
            }
            Outcome::Chase(response, target) => (response, target),
        };
        let kind = query.queries.first().map_or(RecordType::A, |question| question.query_type());
        let dnssec = query.edns.as_ref().map(Edns::flags).is_some_and(|flags| flags.dnssec_ok);
        match self.forwarder.resolve(&name, kind, dnssec).await {
            Some(outside) => {
                response.metadata.response_code = outside.metadata.response_code;
                response.metadata.authentic_data = outside.metadata.authentic_data;
                response.add_answers(outside.answers);
                response.add_authorities(outside.authorities);
                response.add_additionals(outside.additionals);
            }
            None => response.metadata.response_code = ResponseCode::ServFail,
        }
        response
    }
}

async fn send(socket: &UdpSocket, client: SocketAddr, response: &Message, query: &Message) {
    let Some(bytes) = encode(response, query, false) else { return };
    if let Err(error) = socket.send_to(&bytes, client).await {
        debug!(%client, %error, "an answer could not be sent");
    }
}

/// Resolvers of a `resolv.conf`, except the node's own server.
#[must_use]
pub fn resolvers(resolv_conf: &str, own: &[IpAddr]) -> Vec<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok())
        .filter(|ip| !own.contains(ip))
        .map(|ip| SocketAddr::new(ip, 53))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_never_asks_itself() {
        let text = "# comment\nsearch x\nnameserver 192.0.2.53\nnameserver 10.96.0.10\n";
        assert_eq!(
            resolvers(text, &[[10, 96, 0, 10].into()]),
            ["192.0.2.53:53".parse().expect("address")]
        );
    }
}
