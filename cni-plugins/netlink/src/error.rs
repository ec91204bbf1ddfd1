//! Why the kernel did not do it.

use std::io;
use std::path::PathBuf;

/// Why the kernel did not do it.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused the request.
    #[error("{request}: {}", words(*.errno, .message.as_deref()))]
    Kernel {
        /// What was asked, e.g. `create veth pair veth0`.
        request: String,
        /// The kernel's number.
        errno: i32,
        /// The kernel's extended acknowledgement, if it gave one.
        message: Option<String>,
    },
    /// The socket failed.
    #[error("{request}: netlink socket")]
    Socket {
        /// What was asked.
        request: String,
        /// The system's reason.
        source: io::Error,
    },
    /// Each of several dumps was changed by others while it was read.
    #[error("{request}: the kernel's tables changed during each of {attempts} reads")]
    Interrupted {
        /// What was asked.
        request: String,
        /// How often it was read.
        attempts: u32,
    },
    /// An answer made no sense.
    #[error("{request}: malformed answer of the kernel: {reason}")]
    Malformed {
        /// What was asked.
        request: String,
        /// What is wrong.
        reason: String,
    },
    /// The namespace cannot be opened.
    #[error("open network namespace {}", path.display())]
    OpenNetNs {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The path leads to something else, e.g. the empty file that stays behind where a namespace was bound.
    #[error("{} is not a network namespace", path.display())]
    NotANetNs {
        /// The path.
        path: PathBuf,
    },
    /// The namespace cannot be entered.
    #[error("enter network namespace {}", path.display())]
    EnterNetNs {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// `Network is unreachable: Nexthop has invalid gateway`
fn words(errno: i32, message: Option<&str>) -> String {
    // The text of a raw error ends in "(os error N)"; the number is kept, in fewer words.
    let text = io::Error::from_raw_os_error(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    match message {
        Some(message) => format!("{text} ({errno}): {message}"),
        None => format!("{text} ({errno})"),
    }
}

impl NetlinkError {
    /// The system's error number, if there is one behind this.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { errno, .. } => Some(*errno),
            Self::Socket { source, .. }
            | Self::OpenNetNs { source, .. }
            | Self::EnterNetNs { source, .. } => source.raw_os_error(),
            Self::Interrupted { .. } => Some(libc::EAGAIN),
            Self::Malformed { .. } | Self::NotANetNs { .. } => None,
        }
    }

    /// Whether the thing is there already.
    #[must_use]
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }

    /// Whether the thing, or what it belongs to, is missing: link, address, route, neighbour or namespace.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotANetNs { .. })
            || matches!(
                self.errno(),
                Some(libc::ENODEV | libc::ENXIO | libc::ENOENT | libc::ESRCH | libc::EADDRNOTAVAIL)
            )
    }

    /// Whether another socket or device holds the address or port, as another VXLAN device may.
    #[must_use]
    pub fn is_address_in_use(&self) -> bool {
        self.errno() == Some(libc::EADDRINUSE)
    }

    /// Whether this kernel cannot do it at all.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        matches!(self.errno(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT))
    }

    /// Whether the caller lacks the privilege.
    #[must_use]
    pub fn is_permission_denied(&self) -> bool {
        matches!(self.errno(), Some(libc::EPERM | libc::EACCES))
    }

    /// Whether the same request may succeed a moment later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self.errno(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_was_asked_and_what_the_kernel_said() {
        let error = NetlinkError::Kernel {
            request: "create route".into(),
            errno: libc::ENETUNREACH,
            message: Some("Nexthop has invalid gateway".into()),
        };
        assert_eq!(
            error.to_string(),
            "create route: Network is unreachable (101): Nexthop has invalid gateway"
        );
        assert!(!error.is_not_found());
    }
}
