//! Notices a server that stands still: a process that was stopped, a machine that is paused for backup, a deadlock.
//!
//! Its kernel goes on to acknowledge what we send, so connections live and watches on them are silent for ever, which looks
//! like a cluster in which nothing happens. So as long as something waits for a server, it is asked for its pulse now and then;
//! when no answer comes, whatever waits for it is broken off, and goes on at another server.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tracing::warn;

use crate::Body;

/// Between two questions.
const EVERY: Duration = Duration::from_secs(4);
/// How long the answer may take. With the time between questions it stays far below what a node's Lease lives without renewal
/// (40 s), and above the pauses of a busy machine.
const LIMIT: Duration = Duration::from_secs(6);

/// Whether a server moves, shared by all who wait for it; asked as long as there are any.
pub(crate) struct Beat {
    stands_still: CancellationToken,
}

impl Beat {
    /// Waits until the server is found to stand still.
    ///
    /// # Cancel safety
    /// Yes.
    pub(crate) async fn ends(&self) {
        self.stands_still.cancelled().await;
    }
}

/// The servers that somebody waits for.
#[derive(Default)]
pub(crate) struct Pulse {
    beats: Mutex<HashMap<Arc<str>, Weak<Beat>>>,
}

impl Pulse {
    /// The beat of a server. The first one who waits starts the questions: `ask` returns once the server said anything at all,
    /// `stopped` is told when it does not; `None` says that there is no other server, so that nothing would be won.
    pub(crate) fn of<F>(
        &self,
        server: &Arc<str>,
        ask: impl Fn() -> Option<F> + Send + 'static,
        stopped: impl FnOnce() + Send + 'static,
    ) -> Arc<Beat>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut beats = self.beats.lock().unwrap_or_else(PoisonError::into_inner);
        let known = beats.get(server).and_then(Weak::upgrade);
        if let Some(beat) = known.filter(|beat| !beat.stands_still.is_cancelled()) {
            return beat;
        }
        let beat = Arc::new(Beat { stands_still: CancellationToken::new() });
        beats.retain(|_, beat| beat.strong_count() > 0);
        beats.insert(server.clone(), Arc::downgrade(&beat));
        tokio::spawn(watch_over(server.clone(), Arc::downgrade(&beat), ask, stopped));
        beat
    }
}

async fn watch_over<F: Future<Output = ()> + Send + 'static>(
    server: Arc<str>,
    beat: Weak<Beat>,
    ask: impl Fn() -> Option<F> + Send,
    stopped: impl FnOnce() + Send,
) {
    loop {
        tokio::time::sleep(EVERY).await;
        if beat.strong_count() == 0 {
            return;
        }
        let Some(answer) = ask() else { continue };
        if tokio::time::timeout(LIMIT, answer).await.is_err() {
            // Others are asked first from now on, also by those who come back in a moment.
            stopped();
            if let Some(beat) = beat.upgrade() {
                warn!(%server, "the API server stands still: going on at another one");
                beat.stands_still.cancel();
            }
            return;
        }
    }
}

/// A body that breaks off when its server stands still.
struct Watched {
    body: Body,
    /// Keeps the questions going.
    _beat: Arc<Beat>,
    ends: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// The body, which breaks off when its server stands still.
pub(crate) fn watched(body: Body, beat: Arc<Beat>) -> Body {
    let ends = Box::pin(beat.stands_still.clone().cancelled_owned());
    Watched { body, _beat: beat, ends }.boxed_unsync()
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Pending => self.ends.as_mut().poll(cx).map(|()| Some(Err(STANDS_STILL.into()))),
            ready => ready,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What those are told who waited.
pub(crate) const STANDS_STILL: &str = "the server stands still: it does not answer a health check";

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn silent() -> Body {
        let frames = futures::stream::pending::<Result<Frame<Bytes>, std::convert::Infallible>>();
        http_body_util::StreamBody::new(frames).map_err(|never| match never {}).boxed_unsync()
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_server_that_stands_still_is_told_and_the_next_one_asks_anew() {
        let (pulse, server) = (Pulse::default(), Arc::from("a:6443"));
        let told = Arc::new(AtomicUsize::new(0));
        let note = |told: &Arc<AtomicUsize>| {
            let told = told.clone();
            move || {
                told.fetch_add(1, Ordering::SeqCst);
            }
        };
        let beat = pulse.of(&server, || Some(std::future::pending::<()>()), note(&told));
        let mut body = watched(silent(), beat.clone());
        let error = tokio::time::timeout(EVERY + LIMIT * 2, body.frame()).await.expect("in time");
        let error = error.expect("a frame").expect_err("it breaks off");
        assert_eq!(error.to_string(), STANDS_STILL);
        assert_eq!(told.load(Ordering::SeqCst), 1);
        let next = pulse.of(&server, || Some(std::future::ready(())), note(&told));
        assert!(!Arc::ptr_eq(&beat, &next) && !next.stands_still.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_answers_or_is_the_only_one_is_waited_for() {
        let (pulse, asked) = (Pulse::default(), Arc::new(AtomicUsize::new(0)));
        let count = asked.clone();
        let ask = move || {
            count.fetch_add(1, Ordering::SeqCst);
            Some(std::future::ready(()))
        };
        let beat = pulse.of(&Arc::from("a:6443"), ask, || panic!("it answers"));
        let alone = || None::<std::future::Ready<()>>;
        let other = pulse.of(&Arc::from("b:6443"), alone, || panic!("it is the only one"));
        let (mut body, mut lonely) = (watched(silent(), beat.clone()), watched(silent(), other));
        let both = async { tokio::join!(body.frame(), lonely.frame()) };
        assert!(tokio::time::timeout(EVERY * 100, both).await.is_err(), "they go on");
        let before = asked.load(Ordering::SeqCst);
        assert!(before > 50, "{before}");
        drop((body, beat, lonely));
        tokio::time::sleep(EVERY * 10).await;
        assert!(asked.load(Ordering::SeqCst) <= before + 1, "nobody waits any more");
    }
}
