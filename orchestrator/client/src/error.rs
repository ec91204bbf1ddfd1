//! What can go wrong between a client and the API server.

use serde_json::Value;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server answered with a `Status` (API conventions, "Response Status Kind").
    #[error("{message}")]
    Api { code: u16, reason: String, message: String, details: Option<Value> },
    /// No answer: connection, TLS, or a body that broke off.
    #[error("{context}")]
    Transport { context: String, source: Box<dyn std::error::Error + Send + Sync> },
    /// The answer is not what this kind looks like.
    #[error("read the server's answer to {request}")]
    Decode { request: String, source: serde_json::Error },
    /// A kubeconfig, certificate or request that cannot work.
    #[error("{0}")]
    Config(String),
}

impl Error {
    pub(crate) fn transport(
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Transport { context: context.into(), source: source.into() }
    }

    /// From the body of an answer with an error code.
    #[must_use]
    pub fn from_status(code: u16, body: &[u8]) -> Self {
        let status: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        let text = |key: &str| status[key].as_str().map(str::to_owned);
        let code =
            status["code"].as_u64().and_then(|code| u16::try_from(code).ok()).unwrap_or(code);
        Self::Api {
            code,
            reason: text("reason").unwrap_or_default(),
            message: text("message").unwrap_or_else(|| {
                let plain = String::from_utf8_lossy(body);
                let plain = plain.trim();
                if plain.is_empty() {
                    format!("the server answered {code}")
                } else {
                    format!("{plain} ({code})")
                }
            }),
            details: status.get("details").cloned(),
        }
    }

    fn code(&self) -> Option<u16> {
        match self {
            Self::Api { code, .. } => Some(*code),
            _ => None,
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Self::Api { reason, .. } => Some(reason),
            _ => None,
        }
    }

    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    #[must_use]
    pub fn is_already_exists(&self) -> bool {
        self.reason() == Some("AlreadyExists")
    }

    /// The object changed since it was read.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409) && !self.is_already_exists()
    }

    /// The resource version is too old: list again.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.code() == Some(410)
    }

    /// The same request may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Api { code, .. } => self.is_conflict() || *code == 429 || *code >= 500,
            Self::Transport { .. } => true,
            Self::Decode { .. } | Self::Config(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_understood_and_plain_text_is_kept() {
        let body = br#"{"kind":"Status","code":409,"reason":"AlreadyExists","message":"pods \"a\" already exists"}"#;
        let error = Error::from_status(409, body);
        assert!(error.is_already_exists() && !error.is_conflict() && !error.is_transient());
        assert_eq!(error.to_string(), "pods \"a\" already exists");
        let error = Error::from_status(502, b"bad gateway\n");
        assert!(error.is_transient());
        assert_eq!(error.to_string(), "bad gateway (502)");
    }
}
