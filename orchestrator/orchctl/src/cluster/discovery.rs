//! The first word with a cluster: a server that nobody vouches for yet is asked for the cluster's authority, which has to
//! have the public key that the join command names (kubeadm's "token-based discovery with CA pinning").
//!
//! The connection is encrypted but not verified, so nothing secret goes over it and nothing it says is believed but what
//! the pin proves. The client proper has no switch that turns verification off.

use std::time::Duration;

use anyhow::{Context as _, bail};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::token;
use crate::output;

const LIMIT: Duration = Duration::from_secs(10);
/// The answer is a ConfigMap of about 2 KB.
const ANSWER_LIMIT: u64 = 1 << 20;

/// The cluster's authority in PEM, proven by `pin`, and the URL under which the cluster wants to be reached.
///
/// # Errors
/// Nothing answers, or somebody else does.
pub(super) async fn authority(server: &str, pin: &str) -> anyhow::Result<(String, String)> {
    let answer = tokio::time::timeout(LIMIT, ask(server))
        .await
        .map_err(|_| anyhow::anyhow!("no answer within {} s", LIMIT.as_secs()))
        .and_then(|answer| answer)
        .map_err(|error| {
            output::hinted(
                format!(
                    "is the control plane up, and TCP {} open? `nc -vz {}` tells",
                    server.rsplit(':').next().unwrap_or_default(),
                    server.replace(':', " ")
                ),
                format!("the API server at {server} does not answer: {error:#}"),
            )
        })?;
    let info: serde_json::Value = serde_json::from_slice(&answer)
        .with_context(|| format!("{server} does not answer like an API server"))?;
    let (url, ca) = token::read_cluster_info(&info)?;
    let found = orch_pki::Certificate::parse(&ca).context("the cluster's authority")?.pin();
    if found != pin {
        return Err(output::hinted(
            "take the join command from `orchctl token create` on a control plane of this cluster; if it was that one, \
             somebody between you and the cluster answers in its place",
            format!("the authority of {server} has the key {found}, not {pin}"),
        ));
    }
    Ok((ca, url))
}

async fn ask(server: &str) -> anyhow::Result<Vec<u8>> {
    let host = server.rsplit_once(':').context("name it as HOST:PORT")?.0;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned()).context("not a host's name")?;
    let stream = TcpStream::connect(server).await?;
    let connector = tokio_rustls::TlsConnector::from(orch_client::unverified_tls());
    let mut stream = connector.connect(name, stream).await?;
    // HTTP/1.0: the answer ends with the connection.
    let request = format!(
        "GET {} HTTP/1.0\r\nHost: {server}\r\nAccept: application/json\r\n\r\n",
        token::CLUSTER_INFO
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    match (&mut stream).take(ANSWER_LIMIT).read_to_end(&mut answer).await {
        Ok(_) => {}
        // Closed without TLS's own good-bye: the length is checked by the parser of the body.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {}
        Err(error) => return Err(error.into()),
    }
    body(&answer)
}

/// The body of an HTTP/1 answer with status 200.
fn body(answer: &[u8]) -> anyhow::Result<Vec<u8>> {
    let end = answer
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .context("the answer is no HTTP")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    if status != "200" {
        bail!("it answers {}", head.lines().next().unwrap_or_default());
    }
    Ok(answer[end + 4..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_good_answer_has_a_body() {
        assert_eq!(body(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\n{}").expect("good"), b"{}");
        assert!(body(b"HTTP/1.1 401 Unauthorized\r\n\r\n{}").is_err());
        assert!(body(b"SSH-2.0-x\r\n").is_err());
        assert!(body(b"").is_err());
    }
}
