//! Versions of the specification.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value};

use crate::{Error, code};

/// A version of the CNI specification, from the oldest to the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// One address per family; what a configuration without `cniVersion` means.
    V0_1_0,
    /// As 0.1.0, with VERSION.
    V0_2_0,
    /// Interfaces and several addresses.
    V0_3_0,
    /// As 0.3.0, with a name repaired.
    V0_3_1,
    /// CHECK, and `prevResult` for DEL.
    V0_4_0,
    /// `ips[].version` is gone.
    V1_0_0,
    /// GC, STATUS, MTU in results.
    V1_1_0,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Self; 7] = [
        Self::V0_1_0,
        Self::V0_2_0,
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];
    /// The newest.
    pub const LATEST: Self = Self::V1_1_0;

    /// As written in `cniVersion`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// CHECK exists, and DEL gets `prevResult`.
    #[must_use]
    pub fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }

    /// GC and STATUS exist.
    #[must_use]
    pub fn has_gc_and_status(self) -> bool {
        self >= Self::V1_1_0
    }

    /// The version a configuration is written in; none means 0.1.0.
    ///
    /// # Errors
    /// Code 7 if `cniVersion` is not a string, code 1 if it is not a version known here.
    pub fn of_conf(conf: &Map<String, Value>) -> Result<Self, Error> {
        match conf.get("cniVersion") {
            None | Some(Value::Null) => Ok(Self::V0_1_0),
            Some(Value::String(text)) if text.is_empty() => Ok(Self::V0_1_0),
            Some(Value::String(text)) => text.parse(),
            Some(other) => Err(Error::new(
                code::INVALID_CONFIG,
                format!("\"cniVersion\" is {other} and has to be a string"),
            )),
        }
    }

    /// The newest version both sides know, for a list that names several (`cniVersions`).
    #[must_use]
    pub fn negotiate<'a>(offered: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        offered.into_iter().filter_map(|text| text.parse().ok()).max()
    }

    /// All versions as text, for messages and the answer to VERSION.
    #[must_use]
    pub fn supported() -> Vec<&'static str> {
        Self::ALL.iter().map(|version| version.as_str()).collect()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Version {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            Error::new(
                code::INCOMPATIBLE_VERSION,
                format!("\"cniVersion\" is \"{text}\", which is not supported"),
            )
            .with_details(format!("supported are {}", Self::supported().join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_reads_back_and_the_order_is_by_age() {
        for version in Version::ALL {
            assert_eq!(version.to_string().parse::<Version>().expect("known"), version);
        }
        assert!(Version::ALL.is_sorted());
        assert_eq!(
            "9.9.9".parse::<Version>().expect_err("unknown").code,
            code::INCOMPATIBLE_VERSION
        );
    }

    #[test]
    fn the_newest_common_version_wins() {
        assert_eq!(Version::negotiate(["0.4.0", "1.1.0", "2.0.0", "1.0.0"]), Some(Version::V1_1_0));
        assert_eq!(Version::negotiate(["2.0.0"]), None);
    }
}
