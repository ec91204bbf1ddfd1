//! An engine in memory, for tests. It keeps state as a real one does: names are unique, only created containers
//! start, a container that joins another's network needs that one to run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use parking_lot::Mutex;
use tokio::sync::broadcast;

use crate::{
    Container, ContainerSpec, Credentials, EngineInfo, Error, Event, EventKind, ExecSpec,
    ExecState, Image, LogQuery, NetworkMode, Output, Result, Runtime, Session, State,
};

/// Events kept for a slow reader; tests make far fewer.
const EVENT_BACKLOG: usize = 1024;

struct Entry {
    spec: ContainerSpec,
    container: Container,
}

#[derive(Default)]
struct Inner {
    next_id: u64,
    clock: u64,
    down: bool,
    containers: BTreeMap<String, Entry>,
    images: BTreeSet<String>,
    registry: BTreeSet<String>,
    exec_exit_code: i64,
    pulls: Vec<String>,
    asked: Asked,
}

/// How often the engine was asked, answered or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Asked {
    /// For its containers.
    pub lists: usize,
    /// To run a command.
    pub execs: usize,
}

/// The stateful fake. Clones share one engine.
#[derive(Clone)]
pub struct FakeRuntime {
    inner: Arc<Mutex<Inner>>,
    events: broadcast::Sender<Event>,
}

impl Default for FakeRuntime {
    fn default() -> Self {
        Self { inner: Arc::default(), events: broadcast::channel(EVENT_BACKLOG).0 }
    }
}

impl FakeRuntime {
    /// An engine that has these images.
    #[must_use]
    pub fn with_images(images: &[&str]) -> Self {
        let fake = Self::default();
        fake.inner.lock().images = images.iter().map(|&image| image.to_owned()).collect();
        fake
    }

    /// Puts an image into the registry that [`Runtime::pull`] pulls from.
    pub fn publish(&self, image: &str) {
        self.inner.lock().registry.insert(image.to_owned());
    }

    /// Stops or starts answering.
    pub fn set_down(&self, down: bool) {
        self.inner.lock().down = down;
    }

    /// Exit code of all commands from now on.
    pub fn set_exec_exit_code(&self, code: i64) {
        self.inner.lock().exec_exit_code = code;
    }

    /// Ends a running container from inside.
    pub fn exit(&self, id: &str, code: i64) {
        let event = self.end(id, code);
        self.tell(event);
    }

    /// References pulled so far.
    #[must_use]
    pub fn pulls(&self) -> Vec<String> {
        self.inner.lock().pulls.clone()
    }

    /// How often it was asked so far.
    #[must_use]
    pub fn asked(&self) -> Asked {
        self.inner.lock().asked
    }

    /// What a container was created from.
    #[must_use]
    pub fn spec(&self, id: &str) -> Option<ContainerSpec> {
        self.inner.lock().containers.get(id).map(|entry| entry.spec.clone())
    }

    fn end(&self, id: &str, code: i64) -> Option<Event> {
        let mut inner = self.inner.lock();
        let time = inner.tick();
        let container = &mut inner.containers.get_mut(id)?.container;
        if !container.is_running() {
            return None;
        }
        container.state = State::Exited { code, oom_killed: false, error: String::new() };
        container.pid = 0;
        container.finished_at = time;
        Some(Event {
            container: id.to_owned(),
            kind: EventKind::Died,
            labels: container.labels.clone(),
        })
    }

    fn tell(&self, event: Option<Event>) {
        if let Some(event) = event {
            // Nobody listening is fine.
            let _ = self.events.send(event);
        }
    }
}

impl Inner {
    fn up(&self) -> Result<()> {
        if self.down {
            return Err(Error::Unavailable {
                socket: "fake".to_owned(),
                reason: "it is down".to_owned(),
            });
        }
        Ok(())
    }

    fn next_nanos(&mut self) -> i64 {
        self.clock += 1;
        i64::try_from(self.clock).unwrap_or(i64::MAX).saturating_mul(1_000_000_000)
    }

    /// A new moment, as Docker would write it.
    fn tick(&mut self) -> String {
        self.clock += 1;
        format!(
            "2026-01-01T{:02}:{:02}:{:02}Z",
            self.clock / 3600,
            self.clock / 60 % 60,
            self.clock % 60
        )
    }
}

#[async_trait]
impl Runtime for FakeRuntime {
    async fn info(&self) -> Result<EngineInfo> {
        self.inner.lock().up()?;
        Ok(EngineInfo {
            name: "fake".to_owned(),
            version: "1.0".to_owned(),
            ..EngineInfo::default()
        })
    }

    async fn list(&self, labels: &[(&str, &str)]) -> Result<Vec<Container>> {
        let mut inner = self.inner.lock();
        inner.asked.lists += 1;
        inner.up()?;
        let fits = |container: &&Container| {
            labels.iter().all(|(key, value)| container.label(key) == *value)
        };
        Ok(inner.containers.values().map(|entry| &entry.container).filter(fits).cloned().collect())
    }

    async fn inspect(&self, id: &str) -> Result<Option<Container>> {
        let inner = self.inner.lock();
        inner.up()?;
        let by_name = || inner.containers.values().find(|entry| entry.spec.name == id);
        let found = inner.containers.get(id).or_else(by_name);
        Ok(found.map(|entry| entry.container.clone()))
    }

    async fn create(&self, spec: &ContainerSpec) -> Result<String> {
        let mut inner = self.inner.lock();
        inner.up()?;
        if !inner.images.contains(&spec.image) {
            return Err(Error::NotFound(format!("No such image: {}", spec.image)));
        }
        if inner.containers.values().any(|entry| entry.spec.name == spec.name) {
            return Err(Error::Conflict(format!(
                "The container name \"{}\" is already in use",
                spec.name
            )));
        }
        inner.next_id += 1;
        let id = format!("{:012x}", inner.next_id);
        let container = Container {
            id: id.clone(),
            labels: spec.labels.clone(),
            state: State::Created,
            pid: 0,
            created_nanos: inner.next_nanos(),
            started_at: String::new(),
            finished_at: String::new(),
            image_id: format!("sha256:{}", spec.image),
            tty: spec.tty,
            stop_signal: String::new(),
        };
        inner.containers.insert(id.clone(), Entry { spec: spec.clone(), container });
        Ok(id)
    }

    async fn start(&self, id: &str) -> Result<()> {
        let event = {
            let mut inner = self.inner.lock();
            inner.up()?;
            let entry = inner
                .containers
                .get(id)
                .ok_or_else(|| Error::NotFound(format!("No such container: {id}")))?;
            if let NetworkMode::Container(other) = &entry.spec.network
                && !inner.containers.get(other).is_some_and(|entry| entry.container.is_running())
            {
                return Err(Error::Conflict(
                    "cannot join network of a non running container".to_owned(),
                ));
            }
            let time = inner.tick();
            let pid = i32::try_from(inner.clock).unwrap_or(1);
            let Some(Entry { container, .. }) = inner.containers.get_mut(id) else {
                return Err(Error::NotFound(format!("No such container: {id}")));
            };
            if container.is_running() {
                return Ok(());
            }
            container.state = State::Running;
            container.pid = pid;
            container.started_at = time;
            Event {
                container: id.to_owned(),
                kind: EventKind::Started,
                labels: container.labels.clone(),
            }
        };
        self.tell(Some(event));
        Ok(())
    }

    async fn kill(&self, id: &str, signal: &str) -> Result<()> {
        self.inner.lock().up()?;
        let code = if signal == "SIGKILL" { 137 } else { 0 };
        let event = self.end(id, code);
        self.tell(event);
        Ok(())
    }

    async fn remove(&self, id: &str) -> Result<()> {
        self.inner.lock().up()?;
        let event = self.end(id, 137);
        self.tell(event);
        let removed = self.inner.lock().containers.remove(id);
        self.tell(removed.map(|entry| Event {
            container: id.to_owned(),
            kind: EventKind::Removed,
            labels: entry.container.labels,
        }));
        Ok(())
    }

    async fn events(&self) -> Result<BoxStream<'static, Result<Event>>> {
        self.inner.lock().up()?;
        let receiver = self.events.subscribe();
        Ok(stream::unfold(receiver, |mut receiver| async move {
            let event = receiver.recv().await.ok()?;
            Some((Ok(event), receiver))
        })
        .boxed())
    }

    async fn image(&self, reference: &str) -> Result<Option<Image>> {
        let inner = self.inner.lock();
        inner.up()?;
        Ok(inner.images.get(reference).map(|name| Image {
            id: format!("sha256:{name}"),
            names: vec![name.clone()],
            ..Image::default()
        }))
    }

    async fn images(&self) -> Result<Vec<Image>> {
        let inner = self.inner.lock();
        inner.up()?;
        let image = |name: &String| Image {
            id: format!("sha256:{name}"),
            names: vec![name.clone()],
            ..Image::default()
        };
        Ok(inner.images.iter().map(image).collect())
    }

    async fn pull(&self, reference: &str, _credentials: Option<&Credentials>) -> Result<()> {
        let mut inner = self.inner.lock();
        inner.up()?;
        inner.pulls.push(reference.to_owned());
        if !inner.registry.contains(reference) {
            return Err(Error::NotFound(format!("pull access denied for {reference}")));
        }
        inner.images.insert(reference.to_owned());
        Ok(())
    }

    async fn import_program(&self, reference: &str, _program: Bytes) -> Result<()> {
        let mut inner = self.inner.lock();
        inner.up()?;
        inner.images.insert(reference.to_owned());
        Ok(())
    }

    async fn logs(
        &self,
        id: &str,
        _query: &LogQuery,
    ) -> Result<BoxStream<'static, Result<Output>>> {
        let inner = self.inner.lock();
        inner.up()?;
        if !inner.containers.contains_key(id) {
            return Err(Error::NotFound(format!("No such container: {id}")));
        }
        Ok(stream::once(async { Ok(Output::Stdout(Bytes::from_static(b"hello\n"))) }).boxed())
    }

    async fn exec(&self, id: &str, spec: &ExecSpec) -> Result<Session> {
        let mut inner = self.inner.lock();
        inner.asked.execs += 1;
        inner.up()?;
        if !inner.containers.get(id).is_some_and(|entry| entry.container.is_running()) {
            return Err(Error::Conflict(format!("Container {id} is not running")));
        }
        let said = Bytes::from(spec.command.join(" "));
        Ok(Session {
            id: format!("exec-{id}"),
            output: stream::once(async move { Ok(Output::Stdout(said)) }).boxed(),
            input: Box::pin(tokio::io::sink()),
        })
    }

    async fn exec_state(&self, _session: &str) -> Result<ExecState> {
        let inner = self.inner.lock();
        inner.up()?;
        Ok(ExecState { running: false, exit_code: inner.exec_exit_code })
    }

    async fn resize_exec(&self, _session: &str, _width: u16, _height: u16) -> Result<()> {
        self.inner.lock().up()
    }

    async fn attach(&self, id: &str, _stdin: bool) -> Result<Session> {
        self.exec(id, &ExecSpec::default()).await
    }

    async fn resize(&self, _id: &str, _width: u16, _height: u16) -> Result<()> {
        self.inner.lock().up()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_unique_and_joining_needs_a_running_sandbox() {
        let fake = FakeRuntime::with_images(&["pause"]);
        let spec = ContainerSpec {
            name: "sandbox".to_owned(),
            image: "pause".to_owned(),
            ..ContainerSpec::default()
        };
        let sandbox = fake.create(&spec).await.expect("created");
        assert!(matches!(fake.create(&spec).await, Err(Error::Conflict(_))));
        let joiner = ContainerSpec {
            name: "app".to_owned(),
            network: NetworkMode::Container(sandbox.clone()),
            ..spec.clone()
        };
        let joiner = fake.create(&joiner).await.expect("created");
        assert!(fake.start(&joiner).await.is_err());
        fake.start(&sandbox).await.expect("started");
        fake.start(&joiner).await.expect("started");
    }
}
