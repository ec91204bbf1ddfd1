//! What can go wrong between us and the kernel, and the few files of `/proc/sys` that are set.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::net::Ipv6Addr;
use std::path::PathBuf;

use cni_netlink::NetlinkError;
use cni_spec::{Error, code};

/// Why the kernel does not hold what is wanted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// A netlink request failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A file of `/proc/sys` could not be written.
    #[error("write {} to {}", value, path.display())]
    Sysctl { path: PathBuf, value: String, source: io::Error },
    /// A link that was just there is gone.
    #[error("the link {0} vanished while it was set up")]
    Vanished(String),
    /// The bridge lets nothing through.
    #[error("the port {0} of the bridge does not forward")]
    Blocked(String),
    /// Somebody on the bridge has the address.
    #[error(
        "the address {0} is in use by somebody else on the bridge (duplicate address detection)"
    )]
    Duplicate(Ipv6Addr),
    /// Neighbours would not find the pod yet.
    #[error("the IPv6 addresses of {0} are not ready")]
    Unsettled(String),
}

impl From<KernelError> for Error {
    fn from(error: KernelError) -> Self {
        let code = match &error {
            KernelError::Netlink(cause) if cause.is_transient() => code::TRY_AGAIN,
            KernelError::Unsettled(_) => code::TRY_AGAIN,
            _ => code::INTERNAL,
        };
        Self::from_chain(code, &error)
    }
}

/// As a CNI error.
pub(crate) fn netlink_error(error: NetlinkError) -> Error {
    KernelError::from(error).into()
}

/// Sets a switch below `/proc/sys`, in the namespace of the calling thread, if it is not set already: some of them set
/// much in motion, and some hosts let nobody write. A file that is not there belongs to a protocol that this kernel does
/// not have.
pub(crate) fn set_sysctl(key: &str, value: &str) -> Result<(), KernelError> {
    let path = PathBuf::from("/proc/sys").join(key);
    match cni_skel::read_small(&path) {
        Ok(now) if now.trim_ascii() == value.as_bytes() => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => {}
    }
    write(path, value)
}

/// As [`set_sysctl`], for a switch of a link that was made just now: it is cheaper to set than to look at.
pub(crate) fn write_sysctl(key: &str, value: &str) -> Result<(), KernelError> {
    match write(PathBuf::from("/proc/sys").join(key), value) {
        Err(_) => set_sysctl(key, value),
        done => done,
    }
}

fn write(path: PathBuf, value: &str) -> Result<(), KernelError> {
    let mut options = OpenOptions::new();
    let written =
        options.write(true).open(&path).and_then(|mut file| file.write_all(value.as_bytes()));
    written.map_err(|source| KernelError::Sysctl { path, value: value.to_owned(), source })
}
