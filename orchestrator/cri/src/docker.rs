//! The Docker Engine behind [`Runtime`].

mod convert;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bollard::container::LogOutput;
use bollard::exec::{CreateExecOptions, ResizeExecOptions, StartExecOptions, StartExecResults};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder,
    EventsOptionsBuilder, KillContainerOptionsBuilder, ListContainersOptionsBuilder,
    ListImagesOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder,
    ResizeContainerTTYOptionsBuilder,
};
use bollard::{ClientVersion, Docker};
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use tokio::sync::Mutex;

use crate::{
    Container, ContainerSpec, Credentials, EngineInfo, Error, Event, EventKind, ExecSpec,
    ExecState, Image, LogQuery, NODE_LABEL, Output, Result, Runtime, Session,
};

/// Oldest Engine API that has all we use (Docker 20.10).
const API_FLOOR: ClientVersion = ClientVersion { major_version: 1, minor_version: 41 };
const API_FLOOR_TEXT: &str = "1.41";
/// How long the engine may take to begin an answer. A container start under load takes seconds.
const ANSWER_SECS: u64 = 120;
/// Containers inspected at once: enough to hide the latency, few enough to leave the engine room.
const PARALLEL_INSPECTS: usize = 8;
/// Pieces of exec output; Docker frames them in up to 32 KiB.
const EXEC_BUFFER_BYTES: usize = 64 * 1024;

/// One node's view of a Docker Engine.
pub struct DockerRuntime {
    socket: PathBuf,
    node: String,
    /// The connection after version negotiation. Taken out when the engine went away, because it may come back as
    /// another version.
    docker: Mutex<Option<Docker>>,
}

impl DockerRuntime {
    /// The engine on a Unix socket; it is first spoken to when it is first needed.
    #[must_use]
    pub fn new(socket: &Path, node: &str) -> Self {
        Self { socket: socket.to_owned(), node: node.to_owned(), docker: Mutex::new(None) }
    }

    async fn docker(&self) -> Result<Docker> {
        let mut slot = self.docker.lock().await;
        if let Some(docker) = slot.as_ref() {
            return Ok(docker.clone());
        }
        let path = self.socket.to_string_lossy();
        let docker = Docker::connect_with_unix(&path, ANSWER_SECS, bollard::API_DEFAULT_VERSION)
            .map_err(|error| self.unavailable(&error))?;
        let docker = docker.negotiate_version().await.map_err(|error| self.unavailable(&error))?;
        let version = docker.client_version();
        if version < API_FLOOR {
            let found = format!("{}.{}", version.major_version, version.minor_version);
            return Err(Error::TooOld { found, floor: API_FLOOR_TEXT });
        }
        *slot = Some(docker.clone());
        Ok(docker)
    }

    fn unavailable(&self, error: &bollard::errors::Error) -> Error {
        // The innermost cause is the kernel's word; what is around it names layers of the HTTP client.
        let mut cause: &dyn std::error::Error = error;
        while let Some(inner) = cause.source() {
            cause = inner;
        }
        Error::Unavailable { socket: self.socket.display().to_string(), reason: cause.to_string() }
    }

    /// Turns the client's error into the boundary's; a lost connection is negotiated anew next time.
    async fn failed(&self, error: bollard::errors::Error) -> Error {
        let error = convert::error(&self.socket, error);
        if error.is_unavailable() {
            *self.docker.lock().await = None;
        }
        error
    }

    fn node_filter(&self) -> String {
        format!("{NODE_LABEL}={}", self.node)
    }

    /// # Errors
    /// The engine does not take the image.
    async fn load_image(
        &self,
        docker: &Docker,
        reference: &str,
        layer: Vec<u8>,
        changes: Vec<String>,
    ) -> Result<()> {
        let (repo, tag) = reference.rsplit_once(':').unwrap_or((reference, "latest"));
        let options = CreateImageOptionsBuilder::default()
            .from_src("-")
            .repo(repo)
            .tag(tag)
            .changes(changes)
            .build();
        let body = bollard::body_full(Bytes::from(layer));
        let outcome: std::result::Result<Vec<_>, _> =
            docker.create_image(Some(options), Some(body), None).try_collect().await;
        match outcome {
            Ok(_) => Ok(()),
            Err(error) => Err(self.failed(error).await),
        }
    }
}

#[async_trait]
impl Runtime for DockerRuntime {
    async fn info(&self) -> Result<EngineInfo> {
        let docker = self.docker().await?;
        match docker.info().await {
            Ok(info) => Ok(EngineInfo {
                name: "docker".to_owned(),
                version: info.server_version.unwrap_or_default(),
                data_root: info.docker_root_dir.unwrap_or_default(),
                operating_system: info.operating_system.unwrap_or_default(),
                live_restore: info.live_restore_enabled.unwrap_or(false),
            }),
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn list(&self, labels: &[(&str, &str)]) -> Result<Vec<Container>> {
        let docker = self.docker().await?;
        let mut wanted = vec![self.node_filter()];
        wanted.extend(labels.iter().map(|(key, value)| format!("{key}={value}")));
        let filters = HashMap::from([("label", wanted)]);
        let filters: HashMap<String, Vec<String>> =
            filters.into_iter().map(|(key, all)| (key.to_owned(), all)).collect();
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let summaries = match docker.list_containers(Some(options)).await {
            Ok(summaries) => summaries,
            Err(error) => return Err(self.failed(error).await),
        };
        // The summary lacks exit codes and times; a container that vanishes in between is left out.
        let ids = summaries.into_iter().filter_map(|summary| summary.id);
        futures::stream::iter(ids)
            .map(|id| async move { self.inspect(&id).await })
            .buffered(PARALLEL_INSPECTS)
            .filter_map(|found| async move { found.transpose() })
            .try_collect()
            .await
    }

    async fn inspect(&self, id: &str) -> Result<Option<Container>> {
        let docker = self.docker().await?;
        match docker.inspect_container(id, None).await {
            Ok(found) => Ok(Some(convert::container(found))),
            Err(error) => match self.failed(error).await {
                Error::NotFound(_) => Ok(None),
                error => Err(error),
            },
        }
    }

    async fn create(&self, spec: &ContainerSpec) -> Result<String> {
        let docker = self.docker().await?;
        let mut body = convert::create_body(spec);
        body.labels.get_or_insert_default().insert(NODE_LABEL.to_owned(), self.node.clone());
        let options = CreateContainerOptionsBuilder::default().name(&spec.name).build();
        match docker.create_container(Some(options), body).await {
            Ok(created) => Ok(created.id),
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn start(&self, id: &str) -> Result<()> {
        let docker = self.docker().await?;
        match docker.start_container(id, None).await {
            Ok(())
            | Err(bollard::errors::Error::DockerResponseServerError { status_code: 304, .. }) => {
                Ok(())
            }
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn kill(&self, id: &str, signal: &str) -> Result<()> {
        let docker = self.docker().await?;
        let options = KillContainerOptionsBuilder::default().signal(signal).build();
        match docker.kill_container(id, Some(options)).await {
            Ok(()) => Ok(()),
            // 409: it does not run.
            Err(error) => match self.failed(error).await {
                Error::NotFound(_) | Error::Conflict(_) => Ok(()),
                error => Err(error),
            },
        }
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let docker = self.docker().await?;
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        match docker.remove_container(id, Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) => match self.failed(error).await {
                Error::NotFound(_) => Ok(()),
                // Somebody else's removal is under way.
                Error::Conflict(message) if message.contains("already in progress") => Ok(()),
                error => Err(error),
            },
        }
    }

    async fn events(&self) -> Result<BoxStream<'static, Result<Event>>> {
        let docker = self.docker().await?;
        let filters: HashMap<String, Vec<String>> = HashMap::from([
            ("type".to_owned(), vec!["container".to_owned()]),
            ("event".to_owned(), ["start", "die", "destroy"].map(str::to_owned).to_vec()),
            ("label".to_owned(), vec![self.node_filter()]),
        ]);
        // The request goes out when the stream is first polled; what happens until then is wanted too.
        let since = convert::unix_time(std::time::SystemTime::now());
        let options = EventsOptionsBuilder::default().since(&since).filters(&filters).build();
        let stream = docker.events(Some(options));
        Ok(stream
            .filter_map(|event| async move {
                match event {
                    Ok(event) => convert::event(event).map(Ok),
                    Err(error) => Some(Err(Error::Stream(error.to_string()))),
                }
            })
            .boxed())
    }

    async fn image(&self, reference: &str) -> Result<Option<Image>> {
        let docker = self.docker().await?;
        match docker.inspect_image(reference).await {
            Ok(image) => Ok(Some(convert::image(image))),
            Err(error) => match self.failed(error).await {
                Error::NotFound(_) => Ok(None),
                error => Err(error),
            },
        }
    }

    async fn images(&self) -> Result<Vec<Image>> {
        let docker = self.docker().await?;
        match docker
            .list_images(Some(ListImagesOptionsBuilder::default().digests(true).build()))
            .await
        {
            Ok(images) => Ok(images.into_iter().filter_map(convert::image_summary).collect()),
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn pull(&self, reference: &str, credentials: Option<&Credentials>) -> Result<()> {
        let docker = self.docker().await?;
        let options =
            CreateImageOptionsBuilder::default().from_image(&convert::with_tag(reference)).build();
        let credentials = credentials.map(|known| bollard::auth::DockerCredentials {
            username: Some(known.username.clone()),
            password: Some(known.password.clone()),
            serveraddress: Some(known.server.clone()),
            ..Default::default()
        });
        let mut progress = docker.create_image(Some(options), None, credentials).boxed();
        while let Some(step) = progress.next().await {
            if let Err(error) = step {
                return Err(self.failed(error).await);
            }
        }
        Ok(())
    }

    async fn import_program(&self, reference: &str, program: Bytes) -> Result<()> {
        let docker = self.docker().await?;
        let layer =
            convert::program_layer(&program).map_err(|error| Error::Stream(error.to_string()))?;
        self.load_image(&docker, reference, layer, vec!["ENTRYPOINT [\"/program\"]".to_owned()])
            .await
    }

    async fn logs(&self, id: &str, query: &LogQuery) -> Result<BoxStream<'static, Result<Output>>> {
        let docker = self.docker().await?;
        let mut options = LogsOptionsBuilder::default()
            .stdout(true)
            .stderr(true)
            .follow(query.follow)
            .timestamps(query.timestamps)
            .tail(&query.tail.map_or_else(|| "all".to_owned(), |lines| lines.to_string()));
        if let Some(since) = query.since {
            options = options.since(i32::try_from(since).unwrap_or(i32::MAX));
        }
        Ok(outputs(docker.logs(id, Some(options.build()))))
    }

    async fn exec(&self, id: &str, spec: &ExecSpec) -> Result<Session> {
        let docker = self.docker().await?;
        let options = CreateExecOptions {
            attach_stdin: Some(spec.stdin),
            attach_stdout: Some(spec.stdout),
            attach_stderr: Some(spec.stderr && !spec.tty),
            tty: Some(spec.tty),
            cmd: Some(spec.command.clone()),
            ..CreateExecOptions::default()
        };
        let session = match docker.create_exec(id, options).await {
            Ok(created) => created.id,
            Err(error) => return Err(self.failed(error).await),
        };
        let options = StartExecOptions {
            detach: false,
            tty: spec.tty,
            output_capacity: Some(EXEC_BUFFER_BYTES),
        };
        match docker.start_exec(&session, Some(options)).await {
            Ok(StartExecResults::Attached { output, input }) => {
                Ok(Session { id: session, output: outputs(output), input })
            }
            Ok(StartExecResults::Detached) => {
                Err(Error::Stream("the engine detached the command".to_owned()))
            }
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn exec_state(&self, session: &str) -> Result<ExecState> {
        let docker = self.docker().await?;
        match docker.inspect_exec(session).await {
            Ok(found) => Ok(ExecState {
                running: found.running.unwrap_or(false),
                exit_code: found.exit_code.unwrap_or_default(),
            }),
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn resize_exec(&self, session: &str, width: u16, height: u16) -> Result<()> {
        let docker = self.docker().await?;
        match docker.resize_exec(session, ResizeExecOptions { height, width }).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn attach(&self, id: &str, stdin: bool) -> Result<Session> {
        let docker = self.docker().await?;
        let options = AttachContainerOptionsBuilder::default()
            .stream(true)
            .stdout(true)
            .stderr(true)
            .stdin(stdin)
            .build();
        match docker.attach_container(id, Some(options)).await {
            Ok(attached) => Ok(Session {
                id: id.to_owned(),
                output: outputs(attached.output),
                input: attached.input,
            }),
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn resize(&self, id: &str, width: u16, height: u16) -> Result<()> {
        let docker = self.docker().await?;
        let options =
            ResizeContainerTTYOptionsBuilder::default().w(width.into()).h(height.into()).build();
        match docker.resize_container_tty(id, options).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.failed(error).await),
        }
    }
}

fn outputs<S>(stream: S) -> BoxStream<'static, Result<Output>>
where
    S: futures::Stream<Item = std::result::Result<LogOutput, bollard::errors::Error>>
        + Send
        + 'static,
{
    stream
        .map(|piece| match piece {
            Ok(LogOutput::StdErr { message }) => Ok(Output::Stderr(message)),
            Ok(other) => Ok(Output::Stdout(other.into_bytes())),
            Err(error) => Err(Error::Stream(error.to_string())),
        })
        .boxed()
}

/// What an event of Docker means to us; others are not asked for.
fn event_kind(action: &str) -> Option<EventKind> {
    match action {
        "start" => Some(EventKind::Started),
        "die" => Some(EventKind::Died),
        "destroy" => Some(EventKind::Removed),
        _ => None,
    }
}
