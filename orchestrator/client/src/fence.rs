//! A time after which a client may change nothing any more: for those who act only while they lead.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, Response};
use tokio::time::Instant;

use crate::{Body, Error, Transport};

/// Until when changes may be sent. Clones are the same fence.
///
/// A process that was stopped for a while and goes on does not know it at first. The time at which it may act no longer is
/// looked at before each change, so it need not learn first.
#[derive(Debug, Clone)]
pub struct Fence(Arc<Mutex<Instant>>);

impl Fence {
    /// A fence that is closed from `until` on.
    #[must_use]
    pub fn new(until: Instant) -> Self {
        Self(Arc::new(Mutex::new(until)))
    }

    /// Moves the time.
    pub fn set(&self, until: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    fn is_open(&self) -> bool {
        Instant::now() < *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A transport behind a fence. Reads pass: they do no harm.
pub(crate) struct Fenced {
    pub(crate) inner: Arc<dyn Transport>,
    pub(crate) fence: Fence,
}

#[async_trait]
impl Transport for Fenced {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, Error> {
        if request.method() != Method::GET && !self.fence.is_open() {
            return Err(Error::transport("nothing was sent", "this process leads no longer"));
        }
        self.inner.send(request).await
    }
}
