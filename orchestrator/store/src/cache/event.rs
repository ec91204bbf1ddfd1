//! One change of one object, encoded once for all who watch.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use parking_lot::Mutex;

use super::object::Object;
use crate::store::Revision;

/// What happened to an object, as one watcher sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// It is new, or has come to match the watcher's selector.
    Added,
    /// It changed.
    Modified,
    /// It is gone, or does not match the watcher's selector any more.
    Deleted,
}

impl EventKind {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            EventKind::Added => "ADDED",
            EventKind::Modified => "MODIFIED",
            EventKind::Deleted => "DELETED",
        }
    }
}

/// One change of one object.
#[derive(Debug)]
pub struct Event {
    /// When it happened.
    pub revision: Revision,
    /// What happened.
    pub kind: EventKind,
    /// The object after it; of a deleted one the last state, with the revision of the deletion.
    pub object: Arc<Object>,
    /// The object before it; `None` when it is new.
    pub previous: Option<Arc<Object>>,
    encoded: [OnceLock<Bytes>; 3],
    /// The object before the change, with the revision of the change.
    left: OnceLock<Arc<Object>>,
    variants: Mutex<Vec<((&'static str, EventKind), Bytes)>>,
}

impl Event {
    pub(super) fn new(kind: EventKind, object: Arc<Object>, previous: Option<Arc<Object>>) -> Self {
        let revision = object.revision;
        Self {
            revision,
            kind,
            object,
            previous,
            encoded: [const { OnceLock::new() }; 3],
            left: OnceLock::new(),
            variants: Mutex::new(Vec::new()),
        }
    }

    /// What a watcher sees whose selector is `matches`; `None` = nothing. An object that comes to match is new to it,
    /// one that matches no more is gone.
    pub fn seen_by(&self, matches: impl Fn(&Object) -> bool) -> Option<EventKind> {
        let before = self.previous.as_deref().is_some_and(&matches);
        let now = self.kind != EventKind::Deleted && matches(&self.object);
        match (before, now) {
            (false, false) => None,
            (false, true) => Some(EventKind::Added),
            (true, true) => Some(EventKind::Modified),
            (true, false) => Some(EventKind::Deleted),
        }
    }

    /// The object to show to a watcher that sees the event as `kind`: one that is gone is shown as it last matched.
    pub fn object_as(&self, kind: EventKind) -> &Arc<Object> {
        match (&self.previous, kind) {
            (Some(previous), EventKind::Deleted) if self.kind != EventKind::Deleted => {
                self.left.get_or_init(|| Arc::new(previous.at(self.revision)))
            }
            _ => &self.object,
        }
    }

    /// The line of a JSON watch, `{"type":"ADDED","object":…}` and a newline. Made once, shared by all watchers.
    pub fn encoded(&self, kind: EventKind) -> Bytes {
        let make = || {
            let object = &self.object_as(kind).bytes;
            let parts: [&[u8]; 5] =
                [b"{\"type\":\"", kind.as_str().as_bytes(), b"\",\"object\":", object, b"}\n"];
            Bytes::from(parts.concat())
        };
        self.encoded[kind as usize].get_or_init(make).clone()
    }

    /// Another encoding (Table, PartialObjectMetadata), made once by the first watcher that wants it. `name` tells the
    /// encodings apart.
    pub fn variant(
        &self,
        name: &'static str,
        kind: EventKind,
        make: impl FnOnce(&Object) -> Bytes,
    ) -> Bytes {
        // Held while it is made: the others want the same bytes and would otherwise make them too.
        let mut variants = self.variants.lock();
        if let Some((_, bytes)) = variants.iter().find(|(id, _)| *id == (name, kind)) {
            return bytes.clone();
        }
        let bytes = make(self.object_as(kind));
        variants.push(((name, kind), bytes.clone()));
        bytes
    }
}
