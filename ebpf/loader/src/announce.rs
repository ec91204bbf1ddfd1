//! How the `policy` plugin and the agent talk: one JSON line each way over a Unix socket.
//!
//! The plugin keeps each [`Announcement`] as a file, too; an agent that starts reads those of a former life.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// An endpoint that the plugin has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Announcement {
    /// Host end of its veth.
    pub ifindex: u32,
    /// Of the endpoint row.
    pub uid: u32,
    /// Its IPv4 address; `0.0.0.0` if it has none.
    pub addr: Ipv4Addr,
    /// Its IPv6 address.
    #[serde(default)]
    pub addr6: Option<Ipv6Addr>,
    /// The pod, if the runtime named one.
    pub pod: Option<PodRef>,
}

impl Announcement {
    /// The endpoint's addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = (!self.addr.is_unspecified()).then_some(IpAddr::V4(self.addr));
        v4.into_iter().chain(self.addr6.map(IpAddr::V6))
    }
}

/// A pod of the API server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRef {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID, if the runtime named it.
    pub uid: Option<String>,
}

/// What the plugin says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "verb")]
pub enum Request {
    /// Say what applies to this endpoint; the answer comes when it is in force.
    Add(Announcement),
    /// It is gone.
    Del {
        /// Host end of its veth.
        ifindex: u32,
        /// Of the endpoint row.
        uid: u32,
    },
    /// Are you there?
    Status,
    /// What would the loaded programs do with the first packet of this connection?
    Explain(Connection),
}

/// A connection of a pod of the node, seen from the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Whether the other end opens it.
    pub incoming: bool,
    /// The other end.
    pub peer: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Destination port.
    pub port: u16,
    /// Whether the other end is the pod's node itself.
    pub from_node: bool,
}

/// What the programs did with the packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Whether it passed.
    pub passed: bool,
    /// Why, in the word of the programs.
    pub reason: String,
    /// The rule that decided, if one did.
    pub rule: Option<String>,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// Done; of the policies that are in force.
    Done {
        /// Grows with every compilation.
        revision: u64,
    },
    /// Not done, and why.
    Refused(String),
    /// What the programs did.
    Explained(Explanation),
}

/// Why there is no good answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens, or nobody answers in time.
    #[error("ask the network agent at {}", path.display())]
    Away {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The agent says no.
    #[error("the network agent: {0}")]
    Refused(String),
}

/// Asks the agent, and gives it `patience` for the answer.
///
/// # Errors
/// If there is none, or the agent refuses.
pub fn ask(socket: &Path, request: &Request, patience: Duration) -> Result<u64, AskError> {
    match talk(socket, request, patience)? {
        Answer::Done { revision } => Ok(revision),
        other => Err(unexpected(socket, other)),
    }
}

/// Has the agent run the programs.
///
/// # Errors
/// If there is no answer, or the agent refuses.
pub fn explain(
    socket: &Path,
    about: &Connection,
    patience: Duration,
) -> Result<Explanation, AskError> {
    match talk(socket, &Request::Explain(about.clone()), patience)? {
        Answer::Explained(said) => Ok(said),
        other => Err(unexpected(socket, other)),
    }
}

fn unexpected(socket: &Path, answer: Answer) -> AskError {
    match answer {
        Answer::Refused(why) => AskError::Refused(why),
        _ => AskError::Away {
            path: socket.to_owned(),
            source: io::Error::new(io::ErrorKind::InvalidData, "the answer to something else"),
        },
    }
}

fn talk(socket: &Path, request: &Request, patience: Duration) -> Result<Answer, AskError> {
    let away = |source| AskError::Away { path: socket.to_owned(), source };
    let line = (|| {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let mut text = serde_json::to_vec(request)?;
        text.push(b'\n');
        stream.write_all(&text)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    })()
    .map_err(away)?;
    serde_json::from_str(&line)
        .map_err(|error| away(io::Error::new(io::ErrorKind::InvalidData, error)))
}
