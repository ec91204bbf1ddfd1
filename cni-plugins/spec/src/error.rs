//! What a plugin says when it fails.

use std::fmt;

use serde_json::{Map, Value, json};

use crate::Version;

/// Error codes of the specification (§2, "Error"), and the first one that is ours.
pub mod code {
    /// The configuration's version is not supported, or too old for the verb.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// A field is not supported; the message names key and value.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container does not exist; the runtime has nothing to clean up.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// Environment variables are missing or wrong; the message names them.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Reading or writing failed.
    pub const IO: u32 = 5;
    /// Something is not the JSON it should be.
    pub const DECODE: u32 = 6;
    /// The network configuration is wrong.
    pub const INVALID_CONFIG: u32 = 7;
    /// The network namespace is wrong (reference library only).
    pub const INVALID_NETNS: u32 = 8;
    /// A passing condition: the runtime should call again later.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: ADD could not be served now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// STATUS: as 50, and containers that run may have lost connectivity.
    pub const LIMITED_CONNECTIVITY: u32 = 51;
    /// Everything else, panics included.
    pub const INTERNAL: u32 = 999;
    /// Ours: no address is free (100 and above belong to the plugin).
    pub const NO_FREE_ADDRESS: u32 = 100;
    /// Ours: what CHECK found differs from the result of ADD.
    pub const CHECK_FAILED: u32 = 101;
    /// Ours: the attachment has what ADD was to give it; it is alive and keeps it.
    pub const ALREADY_ATTACHED: u32 = 102;
    /// Ours: another container has the port of the host.
    pub const HOST_PORT_TAKEN: u32 = 103;
}

/// Bytes of a message that are kept, from its beginning and from its end. Messages repeat the value that is wrong, which may
/// be as long as the configuration; runtimes write them into logs and events.
const MSG_HEAD: usize = 3000;
const MSG_TAIL: usize = 1000;

/// An error as the specification has it: a code for the runtime, a message for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// One of [`code`], or a plugin's own from 100.
    pub code: u32,
    /// One sentence: what could not be done, and why.
    pub msg: String,
    /// More for people; often numbers or what to do.
    pub details: Option<String>,
}

impl Error {
    /// An error with this code and message. A very long message loses its middle.
    #[must_use]
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        let mut msg = msg.into();
        if msg.len() > MSG_HEAD + MSG_TAIL {
            let whole = |at: &usize| msg.is_char_boundary(*at);
            let from = (0..=MSG_HEAD).rev().find(whole).unwrap_or(0);
            let to = (msg.len() - MSG_TAIL..msg.len()).find(whole).unwrap_or(msg.len());
            msg.replace_range(from..to, &format!(" … ({} bytes) … ", to - from));
        }
        Self { code, msg, details: None }
    }

    /// Code 999 with the whole chain of causes as one sentence.
    #[must_use]
    pub fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::from_chain(code::INTERNAL, error)
    }

    /// The given code with the whole chain of causes as one sentence: `lease address: read lease file …: …`.
    #[must_use]
    pub fn from_chain(code: u32, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut msg = error.to_string();
        let mut next = error.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            // Some libraries repeat their cause in their own text.
            if !msg.ends_with(&text) {
                msg.push_str(": ");
                msg.push_str(&text);
            }
            next = cause.source();
        }
        Self::new(code, msg)
    }

    /// With details for people.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = Some(details.into());
        self
    }

    /// With what was being done put before the message; the code stays.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.msg = format!("{doing}: {}", self.msg);
        self
    }

    /// Several failures of one teardown as one; the first one's code stays. `None` if there was none.
    #[must_use]
    pub fn join(errors: Vec<Self>) -> Option<Self> {
        let mut errors = errors.into_iter();
        let mut all = errors.next()?;
        for error in errors {
            all.msg.push_str("; ");
            all.msg.push_str(&error.msg);
            if let Some(more) = error.details {
                let details = all.details.get_or_insert_default();
                if !details.is_empty() {
                    details.push_str("; ");
                }
                details.push_str(&more);
            }
        }
        Some(all)
    }

    /// The error document for stdout.
    #[must_use]
    pub fn to_value(&self, version: Version) -> Value {
        let mut document = json!({
            "cniVersion": version.as_str(),
            "code": self.code,
            "msg": self.msg,
        });
        if let Some(details) = &self.details {
            document["details"] = json!(details);
        }
        document
    }

    /// Reads an error document; `None` if it is none.
    #[must_use]
    pub fn from_value(document: &Map<String, Value>) -> Option<Self> {
        let code = u32::try_from(document.get("code")?.as_u64()?).ok()?;
        let text =
            |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        Some(Self {
            code,
            msg: text("msg"),
            details: Some(text("details")).filter(|d| !d.is_empty()),
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        if let Some(details) = &self.details {
            write!(f, " ({details})")?;
        }
        if self.code == code::INTERNAL { Ok(()) } else { write!(f, " [CNI error {}]", self.code) }
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::from_chain(code::IO, &error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_reads_back() {
        let error = Error::new(code::TRY_AGAIN, "no lease").with_details("etcd is away");
        let document = error.to_value(Version::V1_0_0);
        assert_eq!(document["cniVersion"], "1.0.0");
        assert_eq!(Error::from_value(document.as_object().expect("object")), Some(error));
        assert_eq!(Error::from_value(&Map::new()), None);
    }

    #[test]
    fn a_very_long_message_keeps_both_ends() {
        let error =
            Error::new(code::DECODE, format!("\"key\" is {} and wrong", "ä".repeat(1 << 20)));
        assert!(error.msg.len() < MSG_HEAD + MSG_TAIL + 50, "{}", error.msg.len());
        assert!(error.msg.starts_with("\"key\" is ä") && error.msg.ends_with("ä and wrong"));
    }

    #[test]
    fn the_failures_of_a_teardown_come_together() {
        let joined = Error::join(vec![Error::new(5, "a"), Error::new(7, "b").with_details("c")]);
        assert_eq!(joined, Some(Error::new(5, "a; b").with_details("c")));
        assert_eq!(Error::join(Vec::new()), None);
    }
}
