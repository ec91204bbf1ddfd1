//! The container runtime boundary: what the node agent needs from a container engine, and nothing more.
//!
//! [`Runtime`] is the boundary. [`DockerRuntime`] speaks to a Docker Engine (API 1.41 and later, negotiated);
//! [`FakeRuntime`] keeps its containers in memory, for tests of whoever uses the trait. Which containers make a
//! pod, and when they start, is the kubelet's business. Start with [`Runtime`], then [`ContainerSpec`].

mod docker;
mod error;
mod fake;
mod model;

pub use docker::DockerRuntime;
pub use error::{Error, Result};
pub use fake::{Asked, FakeRuntime};
pub use model::{
    Container, ContainerSpec, Credentials, EngineInfo, Event, EventKind, ExecSpec, ExecState,
    Image, LogQuery, Mount, NetworkMode, Output, Propagation, Session, State,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

/// Label that says which node a container belongs to; several nodes may share one engine.
pub const NODE_LABEL: &str = "orch.node";

/// A container engine as seen by one node: it lists and reports only this node's containers.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// What the engine is. Also the test whether it answers.
    async fn info(&self) -> Result<EngineInfo>;

    /// The node's containers in any state that carry all the given labels.
    async fn list(&self, labels: &[(&str, &str)]) -> Result<Vec<Container>>;

    /// One container by its ID or name, whichever node it belongs to; an absent one is `None`.
    async fn inspect(&self, id: &str) -> Result<Option<Container>>;

    /// Creates a container without starting it and returns its ID. The node's label is added.
    async fn create(&self, spec: &ContainerSpec) -> Result<String>;

    /// Starts a created container; one that runs already is left alone.
    async fn start(&self, id: &str) -> Result<()>;

    /// Sends a signal, by name (`SIGTERM`) or number; a container that is gone or ended needs none.
    async fn kill(&self, id: &str, signal: &str) -> Result<()>;

    /// Removes a container, running or not; an absent one is already removed.
    async fn remove(&self, id: &str) -> Result<()>;

    /// Starts and ends of the node's containers from now on. A stream that ends was cut off: list again.
    async fn events(&self) -> Result<BoxStream<'static, Result<Event>>>;

    /// An image the engine has; an absent one is `None`.
    async fn image(&self, reference: &str) -> Result<Option<Image>>;

    /// All images that have a name.
    async fn images(&self) -> Result<Vec<Image>>;

    /// Pulls an image from its registry.
    async fn pull(&self, reference: &str, credentials: Option<&Credentials>) -> Result<()>;

    /// Makes an image of one static program, which becomes `/program` and the entry point.
    async fn import_program(&self, reference: &str, program: Bytes) -> Result<()>;

    /// What a container wrote. With `follow` the stream ends when the container does.
    async fn logs(&self, id: &str, query: &LogQuery) -> Result<BoxStream<'static, Result<Output>>>;

    /// Starts a command in a running container.
    async fn exec(&self, id: &str, spec: &ExecSpec) -> Result<Session>;

    /// State of a command started by [`Runtime::exec`].
    async fn exec_state(&self, session: &str) -> Result<ExecState>;

    /// Sets the terminal size of a command.
    async fn resize_exec(&self, session: &str, width: u16, height: u16) -> Result<()>;

    /// Connects to the streams of a running container's own process.
    async fn attach(&self, id: &str, stdin: bool) -> Result<Session>;

    /// Sets the size of a container's own terminal.
    async fn resize(&self, id: &str, width: u16, height: u16) -> Result<()>;
}
