//! What an ended container left to say: its termination message file, or the end of its log.

use std::fs;
use std::io::Read as _;
use std::path::Path;

use futures::StreamExt as _;
use orch_api::k8s_openapi::api::core::v1::Container;
use orch_cri::{LogQuery, Runtime, State};

use crate::pod::observe::Instance;
use crate::pod::start::termination_path;

/// Longest message from the file.
const MAX_FILE_BYTES: u64 = 4096;
/// Longest message from the log, in bytes and lines.
const MAX_LOG_BYTES: usize = 2048;
const MAX_LOG_LINES: u64 = 80;

pub(crate) async fn read(
    runtime: &dyn Runtime,
    folder: &Path,
    container: &Container,
    instance: &Instance,
) -> String {
    let mut text = String::new();
    if let Ok(file) = fs::File::open(termination_path(folder, &container.name, instance.attempt)) {
        let mut bytes = Vec::new();
        if file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).is_ok() {
            text = String::from_utf8_lossy(&bytes).into_owned();
        }
    }
    let failed = !matches!(instance.container.state, State::Exited { code: 0, .. });
    let fallback = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    if !text.is_empty() || !failed || !fallback {
        return text;
    }
    let query = LogQuery { tail: Some(MAX_LOG_LINES), ..LogQuery::default() };
    let Ok(mut log) = runtime.logs(instance.id(), &query).await else { return text };
    let mut bytes = Vec::new();
    while let Some(Ok(piece)) = log.next().await {
        bytes.extend_from_slice(&piece.into_bytes());
    }
    let from = bytes.len().saturating_sub(MAX_LOG_BYTES);
    String::from_utf8_lossy(&bytes[from..]).into_owned()
}
