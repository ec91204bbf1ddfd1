//! Names of containers, interfaces and networks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, code};

/// Bytes of an interface name: `IFNAMSIZ` of the kernel less the closing zero.
const IFNAME_MAX: usize = 15;

/// Bytes of a container ID or network name. Both become parts of file names, whose limit is 255; the result
/// cache joins network, container ID and interface in one.
const NAME_MAX: usize = 200;

/// Why a name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("{what} is empty")]
    Empty {
        /// Which name.
        what: &'static str,
    },
    /// Longer than its bound.
    #[error("{what} \"{text}\" has {} bytes, at most {max} are allowed", text.len())]
    TooLong {
        /// Which name.
        what: &'static str,
        /// As given, cut.
        text: String,
        /// The bound.
        max: usize,
    },
    /// A character that does not belong there.
    #[error("{what} {text:?} {rule}")]
    BadChar {
        /// Which name.
        what: &'static str,
        /// As given.
        text: String,
        /// The rule it breaks.
        rule: &'static str,
    },
}

fn check_name(what: &'static str, text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty { what });
    }
    if text.len() > NAME_MAX {
        return Err(NameError::TooLong { what, text: cut(text), max: NAME_MAX });
    }
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) || !text.chars().all(good) {
        let rule = "has to begin with a letter or digit and to go on with letters, digits, `_`, `.` or `-`";
        return Err(NameError::BadChar { what, text: text.to_owned(), rule });
    }
    Ok(())
}

fn check_ifname(text: &str) -> Result<(), NameError> {
    let what = "interface name";
    if text.is_empty() {
        return Err(NameError::Empty { what });
    }
    if text.len() > IFNAME_MAX {
        return Err(NameError::TooLong { what, text: cut(text), max: IFNAME_MAX });
    }
    if matches!(text, "." | "..") {
        return Err(NameError::BadChar {
            what,
            text: text.to_owned(),
            rule: "is the name of a folder",
        });
    }
    // The kernel's rule (`dev_valid_name`); control characters are ours, they break logs and files.
    if text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
        let rule = "has `/`, `:`, white space or a control character";
        return Err(NameError::BadChar { what, text: text.to_owned(), rule });
    }
    Ok(())
}

/// Names go into messages: a megabyte of one helps nobody.
fn cut(text: &str) -> String {
    text.chars().take(64).collect()
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(String);

        impl $type {
            /// Checks a name.
            ///
            /// # Errors
            /// Says which rule it breaks.
            pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
                let text = text.into();
                let check: fn(&str) -> Result<(), NameError> = $check;
                check(&text)?;
                Ok(Self(text))
            }

            /// The name.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// A container's name as the runtime gives it. Safe as a part of a file name.
    ContainerId,
    |text| check_name("container ID", text)
);
name!(
    /// A network's name. Safe as a file name.
    NetworkName,
    |text| check_name("network name", text)
);
name!(
    /// A name the kernel takes for an interface.
    IfName,
    check_ifname
);

/// FNV-1a, 64 bit, over parts that are kept apart: `("a", "bc")` and `("ab", "c")` differ. Names of things in the kernel
/// are made of it, so the value stays the same in every build and release.
#[must_use]
pub fn stable_hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl NetworkName {
    /// Number of the group that links of this network are put into. A link has it from the moment it is made, so it
    /// tells whose the link is even if its maker was killed right after.
    #[must_use]
    pub fn link_group(&self) -> u32 {
        // Far away from the small numbers that people use, and positive for tools that take it for signed.
        stable_hash(&[self.as_str()]) as u32 & 0x3fff_ffff | 0x4000_0000
    }
}

impl NameError {
    /// As a CNI error about the environment: an absent container ID is code 3, everything else code 4.
    #[must_use]
    pub fn into_env_error(self, variable: &str) -> Error {
        let code = match self {
            Self::Empty { what: "container ID" } => code::UNKNOWN_CONTAINER,
            _ => code::INVALID_ENVIRONMENT,
        };
        Error::new(code, format!("{variable}: {self}"))
    }
}

/// An attachment: one container on one network under one interface name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentId {
    /// The container.
    #[serde(rename = "containerID")]
    pub container_id: ContainerId,
    /// Its interface.
    pub ifname: IfName,
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_ids_and_network_names_follow_the_pattern() {
        for good in ["a", "0", "a-b_c.d", "9f86d081884c7d65"] {
            ContainerId::new(good).expect(good);
            NetworkName::new(good).expect(good);
        }
        for bad in ["", ".", "..", "-a", "_a", ".a", "a/b", "a b", "a\n", "ä", "a:b"] {
            ContainerId::new(bad).expect_err(bad);
            NetworkName::new(bad).expect_err(bad);
        }
        ContainerId::new("a".repeat(NAME_MAX)).expect("longest");
        ContainerId::new("a".repeat(NAME_MAX + 1)).expect_err("too long");
    }

    #[test]
    fn interface_names_are_those_the_kernel_takes() {
        for good in ["eth0", "a.b", "...", "exactly15chars-"] {
            IfName::new(good).expect(good);
        }
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "a\tb", "sixteen-chars---"] {
            IfName::new(bad).expect_err(bad);
        }
    }

    #[test]
    fn the_group_of_a_network_never_changes() {
        let group = |name: &str| NetworkName::new(name).expect("good").link_group();
        // A changed value would hide the links of a node from GC at the upgrade.
        assert_eq!(group("net"), 0x6032_fe85);
        assert_ne!(group("net"), group("net2"));
        assert!((0x4000_0000..0x8000_0000).contains(&group("a")));
    }

    #[test]
    fn an_empty_container_id_is_an_unknown_container() {
        let error =
            |text: &str| ContainerId::new(text).expect_err("bad").into_env_error("CNI_CONTAINERID");
        assert_eq!(error("").code, code::UNKNOWN_CONTAINER);
        assert_eq!(error("/").code, code::INVALID_ENVIRONMENT);
    }
}
