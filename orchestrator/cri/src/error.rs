//! Why the engine did not do it.

/// An answer from the runtime boundary.
pub type Result<T> = std::result::Result<T, Error>;

/// What the engine, or the way to it, said no with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers on the engine's socket.
    #[error(
        "the container engine does not answer on {socket} ({reason}); start it, for example with `systemctl start docker`"
    )]
    Unavailable { socket: String, reason: String },
    /// The engine speaks only versions older than the floor.
    #[error(
        "the container engine speaks API {found}, and {floor} or later is needed: upgrade Docker to 20.10 or later"
    )]
    TooOld { found: String, floor: &'static str },
    /// The container, image or command is absent.
    #[error("{0}")]
    NotFound(String),
    /// A name is taken or the container is in a state that forbids the request.
    #[error("{0}")]
    Conflict(String),
    /// The engine refused or failed.
    #[error("{message}")]
    Engine { code: u16, message: String },
    /// A stream broke off.
    #[error("the engine's stream broke: {0}")]
    Stream(String),
}

impl Error {
    /// The thing asked for does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound(_))
    }

    /// The engine itself is away: nothing can be concluded about containers.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// The same call may succeed later without anybody doing something.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Conflict(_) | Self::Stream(_) => true,
            Self::Engine { code, .. } => *code >= 500,
            Self::NotFound(_) | Self::TooOld { .. } => false,
        }
    }
}
