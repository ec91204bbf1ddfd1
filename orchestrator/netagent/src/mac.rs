//! Ethernet addresses, and the one of this node's VTEP.
//!
//! Peers hold the MAC of our VXLAN device in their neighbour and forwarding tables, so it must be the same
//! after a restart, after a reboot and when the device is made again. It is derived from the node's name and
//! kept in a file from then on; the file wins, so that a later change of the derivation moves nobody.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::files::{FileError, write_atomic};

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The MAC of the IPv6 device beside the device of this MAC: another one, and always the same.
    #[must_use]
    pub fn partner(self) -> Self {
        let hash = Sha256::digest([b"orch vtep IPv6 ".as_slice(), &self.0].concat());
        let mut bytes: [u8; 6] = hash[..6].try_into().expect("a SHA-256 has 32 bytes");
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Self(bytes)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is no Ethernet address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no MAC address")]
pub struct BadMac(String);

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|part| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten())
            .collect();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| BadMac(text.to_owned()))
    }
}

impl TryFrom<String> for Mac {
    type Error = BadMac;

    fn try_from(text: String) -> Result<Self, BadMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// The VTEP MAC that belongs to a node's name: locally administered, unicast.
#[must_use]
pub fn derived(node_name: &str) -> Mac {
    let hash = Sha256::digest(format!("orch vtep {node_name}"));
    let mut bytes: [u8; 6] = hash[..6].try_into().expect("a SHA-256 has 32 bytes");
    bytes[0] = (bytes[0] & 0xfc) | 0x02;
    Mac(bytes)
}

/// The VTEP MAC of this node: from the file, else derived and written there.
///
/// # Errors
/// If the file exists but cannot be read, or cannot be written.
pub fn ensure(file: &Path, node_name: &str) -> Result<Mac, FileError> {
    match std::fs::read_to_string(file) {
        Ok(text) => {
            if let Ok(mac) = text.trim().parse() {
                return Ok(mac);
            }
            tracing::warn!(file = %file.display(), "holds no MAC address; writing it anew");
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(FileError::Read { path: file.to_owned(), source }),
    }
    let mac = derived(node_name);
    write_atomic(file, format!("{mac}\n").as_bytes())?;
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_derived_mac_is_stable_local_and_unicast() {
        let mac = derived("node-1");
        assert_eq!(mac, derived("node-1"));
        assert_ne!(mac, derived("node-2"));
        assert_eq!(mac.0[0] & 0x03, 0x02);
        assert_eq!(mac.to_string().parse(), Ok(mac));
    }

    #[test]
    fn the_file_wins_over_the_derivation() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("lib/vtep-mac");
        assert_eq!(ensure(&file, "node-1").expect("made"), derived("node-1"));
        assert_eq!(ensure(&file, "renamed").expect("read"), derived("node-1"));
    }
}
