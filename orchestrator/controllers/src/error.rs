//! Why a reconciliation did not finish.

use std::future::Future;

use orch_client::Error as ClientError;
use orch_reconcile::Transient;

/// A step that failed, in the words of the step.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub(crate) struct Failure {
    step: String,
    source: Box<ClientError>,
    retry: bool,
}

impl Failure {
    /// To be tried again whatever the error says: something else is going to change.
    pub(crate) fn retried(mut self) -> Self {
        self.retry = true;
        self
    }
}

impl Transient for Failure {
    fn is_transient(&self) -> bool {
        // What is not found was in a cache that is a moment behind.
        self.retry
            || self.source.is_transient()
            || self.source.is_not_found()
            || self.source.is_already_exists()
    }
}

/// Adds to an error which step it was.
pub(crate) trait Step<T> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> Step<T> for Result<T, ClientError> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|source| Failure { step: step(), source: Box::new(source), retry: false })
    }
}

/// Whether a creation was refused because the namespace is on its way out: nothing is wanted there any more.
pub(crate) fn is_namespace_ending(error: &ClientError) -> bool {
    matches!(error, ClientError::Api { details: Some(details), .. }
        if details["causes"][0]["reason"] == "NamespaceTerminating")
}

/// A missing thing is a thing already removed.
pub(crate) async fn gone_is_fine<T>(
    request: impl Future<Output = Result<T, ClientError>>,
) -> Result<(), ClientError> {
    match request.await {
        Err(error) if error.is_not_found() => Ok(()),
        other => other.map(drop),
    }
}
