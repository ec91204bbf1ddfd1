//! Events: short lines for the user about what happened to an object (core/v1 Event).
//!
//! Recording never waits and never fails: events go through a bounded channel to a task that writes them. The same
//! event again only counts up; many that differ in their words only are put together, as upstream does.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use jiff::Timestamp;
use orch_api::k8s_openapi::api::core::v1::{Event, ObjectReference};
use orch_client::{Api, Client, Error, Patch};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

/// Events waiting to be written. When the API server is away for longer than this lasts, new ones are dropped: they
/// are of use only while they are news.
const QUEUE_MOST: usize = 1000;
/// Events remembered for counting; the oldest is forgotten first and begins a new Event object then.
const REMEMBERED_MOST: usize = 4096;
/// Different messages of the same reason about the same object within [`SIMILAR_WITHIN`] that are written singly.
const SIMILAR_MOST: usize = 10;
const SIMILAR_WITHIN: Duration = Duration::from_secs(600);
/// A write that gets no answer is given up.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Subject {
    namespace: String,
    uid: String,
    name: String,
    kind: String,
    field_path: String,
    event_type: String,
    reason: String,
}

#[derive(Debug, Clone)]
struct News {
    regarding: ObjectReference,
    event_type: String,
    reason: String,
    message: String,
    at: Timestamp,
}

/// Records events of one component. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EventRecorder {
    sender: mpsc::Sender<News>,
}

impl EventRecorder {
    /// A recorder for `component` on `host`. Its task runs in the current runtime and ends with the last clone.
    #[must_use]
    pub fn new(client: Client, component: &str, host: &str) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_MOST);
        let writer = Writer {
            client,
            component: component.to_owned(),
            host: host.to_owned(),
            memory: Memory::default(),
        };
        tokio::spawn(writer.run(receiver));
        Self { sender }
    }

    /// Says that `reason` happened to `regarding`; `event_type` is `Normal` or `Warning`.
    pub fn event(
        &self,
        regarding: &ObjectReference,
        event_type: &str,
        reason: &str,
        message: &str,
    ) {
        let news = News {
            regarding: regarding.clone(),
            event_type: event_type.to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            at: Timestamp::now(),
        };
        if self.sender.try_send(news).is_err() {
            debug!(reason, message, "an event is dropped");
        }
    }
}

/// One Event object to create or to count up.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    name: String,
    count: i32,
}

#[derive(Debug, Default)]
struct Memory {
    known: HashMap<(Subject, String), Known>,
    order: VecDeque<(Subject, String)>,
    similar: HashMap<Subject, (Instant, HashSet<String>)>,
}

impl Memory {
    /// The message under which an event is written: its own, or one for all of many similar ones.
    fn message(&mut self, subject: &Subject, message: &str, now: Instant) -> (String, String) {
        if self.similar.len() > REMEMBERED_MOST {
            self.similar.retain(|_, (last, _)| now - *last < SIMILAR_WITHIN);
        }
        let (last, messages) =
            self.similar.entry(subject.clone()).or_insert_with(|| (now, HashSet::new()));
        if now - *last >= SIMILAR_WITHIN {
            messages.clear();
        }
        *last = now;
        if messages.contains(message) || messages.len() < SIMILAR_MOST {
            messages.insert(message.to_owned());
            return (message.to_owned(), message.to_owned());
        }
        (String::new(), format!("(combined from similar events): {message}"))
    }

    fn remember(&mut self, key: (Subject, String), known: Known) {
        if self.known.insert(key.clone(), known).is_none() {
            self.order.push_back(key);
            if self.order.len() > REMEMBERED_MOST
                && let Some(oldest) = self.order.pop_front()
            {
                self.known.remove(&oldest);
            }
        }
    }
}

struct Writer {
    client: Client,
    component: String,
    host: String,
    memory: Memory,
}

fn seconds(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

impl Writer {
    async fn run(mut self, mut receiver: mpsc::Receiver<News>) {
        while let Some(news) = receiver.recv().await {
            // An event that cannot be written is not worth holding up the next one.
            match tokio::time::timeout(WRITE_LIMIT, self.write(&news)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    debug!(
                        reason = news.reason,
                        error = &error as &dyn std::error::Error,
                        "write an event"
                    );
                }
                Err(_) => debug!(reason = news.reason, "write an event: no answer in time"),
            }
        }
    }

    async fn write(&mut self, news: &News) -> Result<(), Error> {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let regarding = &news.regarding;
        let subject = Subject {
            namespace: text(&regarding.namespace),
            uid: text(&regarding.uid),
            name: text(&regarding.name),
            kind: text(&regarding.kind),
            field_path: text(&regarding.field_path),
            event_type: news.event_type.clone(),
            reason: news.reason.clone(),
        };
        let (identity, message) = self.memory.message(&subject, &news.message, Instant::now());
        // Events about what has no namespace are found in `default`.
        let namespace =
            if subject.namespace.is_empty() { "default" } else { subject.namespace.as_str() };
        let api = Api::<Event>::namespaced(self.client.clone(), namespace);
        let key = (subject.clone(), identity);
        if let Some(known) = self.memory.known.get_mut(&key) {
            known.count += 1;
            let patch = json!({ "count": known.count, "lastTimestamp": seconds(news.at), "message": message });
            match api.patch(&known.name, &Patch::Merge(patch)).await {
                // Its time was over: begin again.
                Err(error) if error.is_not_found() => {}
                outcome => return outcome.map(drop),
            }
        }
        let unique = u64::try_from(news.at.as_nanosecond()).unwrap_or_default();
        // The same nanosecond on another host would be the same name.
        let name = format!("{}.{unique:x}{:04x}", subject.name, rand::random::<u16>());
        let event = json!({
            "metadata": { "name": name, "namespace": namespace },
            "involvedObject": regarding,
            "type": news.event_type,
            "reason": news.reason,
            "message": message,
            "source": { "component": self.component, "host": self.host },
            "reportingComponent": self.component,
            "reportingInstance": self.host,
            "firstTimestamp": seconds(news.at),
            "lastTimestamp": seconds(news.at),
            "count": 1,
        });
        let event: Event = serde_json::from_value(event)
            .map_err(|source| Error::Decode { request: format!("our own event {name}"), source })?;
        match api.create(&event).await {
            Ok(_) => {
                self.memory.remember(key, Known { name, count: 1 });
                Ok(())
            }
            Err(error) => {
                self.memory.known.remove(&key);
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_similar_messages_become_one() {
        let subject = Subject {
            namespace: "shop".to_owned(),
            uid: "u".to_owned(),
            name: "web".to_owned(),
            kind: "Pod".to_owned(),
            field_path: String::new(),
            event_type: "Warning".to_owned(),
            reason: "Failed".to_owned(),
        };
        let (mut memory, now) = (Memory::default(), Instant::now());
        for n in 0..SIMILAR_MOST {
            let message = format!("try {n}");
            assert_eq!(memory.message(&subject, &message, now).1, message);
        }
        let (identity, message) = memory.message(&subject, "try 10", now);
        assert_eq!(
            (identity.as_str(), message.as_str()),
            ("", "(combined from similar events): try 10")
        );
        assert_eq!(
            memory.message(&subject, "try 3", now).1,
            "try 3",
            "known words stay as they are"
        );
        let later = now + SIMILAR_WITHIN;
        assert_eq!(memory.message(&subject, "try 11", later).1, "try 11");
    }
}
