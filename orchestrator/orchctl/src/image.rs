//! `orchctl image`: images in the engines of the nodes, through Docker's API.
//!
//! There need be no registry: `build` sends a folder to the engine, `load` a file that `docker save` wrote.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use bollard::Docker;
use bollard::models::BuildInfo;
use bollard::query_parameters::{
    BuildImageOptionsBuilder, ImportImageOptionsBuilder, ListImagesOptionsBuilder,
};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use tokio_util::codec::{BytesCodec, FramedRead};

use crate::output;

/// Seconds until a call to the engine is given up; loading an image of gigabytes takes minutes.
const ENGINE_TIMEOUT_SECS: u64 = 600;

/// Connects to the engine at a unix socket.
///
/// # Errors
/// Nothing answers there.
pub(crate) async fn connect(socket: &Path) -> anyhow::Result<Docker> {
    let connected = async {
        Docker::connect_with_unix(
            &socket.to_string_lossy(),
            ENGINE_TIMEOUT_SECS,
            bollard::API_DEFAULT_VERSION,
        )?
        .negotiate_version()
        .await
    };
    connected.await.map_err(|error| {
        output::hinted(
            "in a lab `orchctl lab up` starts it, elsewhere start dockerd or name its socket with --engine",
            format!("no Docker engine answers at {}: {}", socket.display(), innermost(&error)),
        )
    })
}

/// The last cause: those before it only say that a connection was wanted.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Builds the image `tag` from a folder with a Dockerfile.
///
/// # Errors
/// The folder cannot be read or the engine refuses a step; the engine's words are passed on.
pub(crate) async fn build(docker: &Docker, folder: &Path, tag: &str) -> anyhow::Result<()> {
    if !folder.join("Dockerfile").is_file() {
        bail!("{} has no Dockerfile", folder.display());
    }
    let mut archive = tar::Builder::new(Vec::new());
    archive.follow_symlinks(false);
    archive.append_dir_all(".", folder).with_context(|| format!("read {}", folder.display()))?;
    build_from_tar(docker, archive.into_inner()?, tag).await
}

/// Builds the image `tag` that holds nothing but one static program, which is also its entry point.
///
/// # Errors
/// As [`build`].
pub(crate) async fn build_from_program(
    docker: &Docker,
    program: &Path,
    tag: &str,
) -> anyhow::Result<()> {
    let name = program.file_name().context("a program has a name")?.to_string_lossy().into_owned();
    let content = fs::read(program).with_context(|| format!("read {}", program.display()))?;
    let dockerfile = format!("FROM scratch\nCOPY {name} /{name}\nENTRYPOINT [\"/{name}\"]\n");
    let mut archive = tar::Builder::new(Vec::new());
    for (path, bytes, mode) in
        [("Dockerfile", dockerfile.as_bytes(), 0o644), (name.as_str(), content.as_slice(), 0o755)]
    {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        archive.append_data(&mut header, path, bytes)?;
    }
    build_from_tar(docker, archive.into_inner()?, tag).await
}

async fn build_from_tar(docker: &Docker, archive: Vec<u8>, tag: &str) -> anyhow::Result<()> {
    let options = BuildImageOptionsBuilder::default().t(tag).rm(true).forcerm(true).build();
    follow(docker.build_image(options, None, Some(bollard::body_full(archive.into()))))
        .await
        .with_context(|| format!("build image {tag}"))
        .map(|_| ())
}

/// Loads the images of a `docker save` file and returns what the engine says about them.
///
/// # Errors
/// The file cannot be read or is no image archive.
pub(crate) async fn load(docker: &Docker, file: &Path) -> anyhow::Result<Vec<String>> {
    let source =
        tokio::fs::File::open(file).await.with_context(|| format!("open {}", file.display()))?;
    let chunks =
        FramedRead::new(source, BytesCodec::new()).map_ok(|chunk| -> Bytes { chunk.freeze() });
    let lines = follow(docker.import_image_stream(
        ImportImageOptionsBuilder::default().build(),
        chunks,
        None,
    ))
    .await
    .with_context(|| format!("load {}", file.display()))?;
    if lines.is_empty() {
        bail!("{} holds no image; it must be a file that `docker save` wrote", file.display());
    }
    Ok(lines)
}

/// Reads the engine's progress to the end: its lines, or its error.
async fn follow(
    stream: impl Stream<Item = Result<BuildInfo, bollard::errors::Error>>,
) -> anyhow::Result<Vec<String>> {
    let mut stream = std::pin::pin!(stream);
    let mut lines = Vec::new();
    while let Some(info) = stream.next().await {
        let info = info?;
        if let Some(detail) = info.error_detail {
            bail!("{}", detail.message.unwrap_or_else(|| "the engine gave no reason".to_owned()));
        }
        lines.extend(
            info.stream.map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()),
        );
    }
    Ok(lines)
}

/// One image of an engine.
pub(crate) struct Image {
    pub(crate) tag: String,
    pub(crate) id: String,
    pub(crate) size_bytes: i64,
}

/// The tagged images of an engine, by tag.
///
/// # Errors
/// The engine does not answer.
pub(crate) async fn list(docker: &Docker) -> anyhow::Result<Vec<Image>> {
    let summaries = docker
        .list_images(Some(ListImagesOptionsBuilder::default().build()))
        .await
        .context("list images")?;
    let mut images: Vec<Image> = summaries
        .into_iter()
        .flat_map(|summary| {
            let (id, size_bytes) = (summary.id, summary.size);
            summary.repo_tags.into_iter().map(move |tag| Image { tag, id: id.clone(), size_bytes })
        })
        .filter(|image| image.tag != "<none>:<none>")
        .collect();
    images.sort_by(|a, b| a.tag.cmp(&b.tag));
    Ok(images)
}
