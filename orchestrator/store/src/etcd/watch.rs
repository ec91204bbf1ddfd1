//! A watch on etcd as a stream of batches.
//!
//! What a reply proves is less than it seems. Its header holds the revision of the *server*, and in three cases etcd
//! sends it ahead of events that are still queued: in the reply to the creation, in the reply to a progress request
//! (before 3.4.25 and 3.5.8, etcd issue 15220), and with the events of a watch that catches up. So events prove
//! progress up to the last one of them only, progress requests are never made, and an empty reply counts only if it is
//! the notification that etcd sends on its own account: that one goes through the same queue as the events, and only
//! to watches that are in step.

use bytes::Bytes;
use etcd_client::{EventType, WatchClient, WatchOptions, WatchResponse, WatchStream};
use futures::stream::{BoxStream, StreamExt as _};

use super::epoch::Epoch;
use super::from_etcd;
use crate::store::{Revision, StoreError, StoreEvent, WatchBatch, prefix_end};

pub(super) async fn open(
    mut client: WatchClient,
    prefix: &str,
    from: Revision,
    epoch: Epoch,
) -> Result<BoxStream<'static, Result<WatchBatch, StoreError>>, StoreError> {
    let options = WatchOptions::new()
        .with_range(prefix_end(prefix))
        .with_start_revision(epoch.etcds(from)?)
        .with_progress_notify();
    let stream = super::call(client.watch(prefix, Some(options))).await?;
    Ok(futures::stream::unfold(Some(stream), move |stream| next(stream, epoch)).boxed())
}

type Item = Result<WatchBatch, StoreError>;

/// The next batch; after an error the stream is over.
async fn next(stream: Option<WatchStream>, epoch: Epoch) -> Option<(Item, Option<WatchStream>)> {
    let mut stream = stream?;
    loop {
        let reply = match stream.message().await {
            Ok(Some(reply)) => reply,
            Ok(None) => {
                return Some((
                    Err(StoreError::Unavailable("etcd ended the watch".to_owned())),
                    None,
                ));
            }
            Err(error) => return Some((Err(from_etcd(error)), None)),
        };
        match batch(&reply, epoch) {
            Ok(Some(batch)) => return Some((Ok(batch), Some(stream))),
            Ok(None) => {}
            Err(error) => return Some((Err(error), None)),
        }
    }
}

fn batch(reply: &WatchResponse, epoch: Epoch) -> Result<Option<WatchBatch>, StoreError> {
    if reply.compact_revision() != 0 {
        return Err(StoreError::Compacted { oldest: epoch.ours(reply.compact_revision()) });
    }
    if reply.canceled() {
        return Err(StoreError::Unavailable(format!(
            "etcd cancelled the watch: {}",
            reply.cancel_reason()
        )));
    }
    if reply.created() {
        return Ok(None);
    }
    let mut events = Vec::with_capacity(reply.events().len());
    for event in reply.events() {
        events.push(store_event(event, epoch)?);
    }
    // Replies to progress requests carry no watch id (-1).
    let progress =
        (reply.watch_id() >= 0).then(|| reply.header().map(|header| epoch.ours(header.revision())));
    let revision = match events.last() {
        Some(last) => Some(last.revision),
        None => progress.flatten(),
    };
    Ok(revision.map(|revision| WatchBatch { revision, events }))
}

fn store_event(event: &etcd_client::Event, epoch: Epoch) -> Result<StoreEvent, StoreError> {
    let kv =
        event.kv().ok_or_else(|| StoreError::Internal("etcd's event has no key".to_owned()))?;
    let key = kv
        .key_str()
        .map_err(|error| StoreError::Internal(format!("key in etcd: {error}")))?
        .to_owned();
    let value = match event.event_type() {
        EventType::Put => Some(Bytes::copy_from_slice(kv.value())),
        EventType::Delete => None,
    };
    let revision = epoch.ours(kv.mod_revision());
    Ok(StoreEvent {
        created: value.is_some() && kv.create_revision() == kv.mod_revision(),
        key,
        value,
        revision,
    })
}
