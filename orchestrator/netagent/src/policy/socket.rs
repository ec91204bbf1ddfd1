//! The socket on which the plugin says what it has made: one line in, one line out.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use orch_ebpf_loader::{Answer, Request};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// A request has less than 300 bytes.
const LINE_MAX: u64 = 16 << 10;
/// The plugin says what it wants at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// Plugins that may wait for an answer at one time; the next ones wait to be heard, which the plugin's own patience ends.
const CALLERS: usize = 256;

/// A question with the way back.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) request: Request,
    pub(crate) answer: oneshot::Sender<Answer>,
}

/// Listens at `path`. One that a former run left is replaced.
///
/// # Errors
/// If the socket cannot be made.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    // Whoever may write here could say that a pod is another one.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Takes callers until cancelled. Those that wait for an answer then get none, and their plugin tries again.
pub(crate) async fn serve(
    listener: UnixListener,
    asked: mpsc::Sender<Asked>,
    cancel: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(CALLERS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    debug!(%error, "a caller of the policy socket was lost");
                    continue;
                }
            },
        };
        let (asked, cancel) = (asked.clone(), cancel.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                outcome = talk(stream, asked) => if let Err(error) = outcome {
                    debug!(%error, "a caller of the policy socket went away");
                },
            }
            drop(place);
        });
    }
}

async fn talk(stream: UnixStream, asked: mpsc::Sender<Asked>) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader).take(LINE_MAX);
    timeout(PATIENCE, reader.read_line(&mut line)).await??;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => {
            let (answer, answered) = oneshot::channel();
            let gone = || io::Error::other("the agent ends");
            asked.send(Asked { request, answer }).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())?
        }
        Err(error) => Answer::Refused(format!("not a request: {error}")),
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    writer.write_all(&text).await
}

#[cfg(test)]
mod tests {
    use orch_ebpf_loader::{AskError, ask};

    use super::*;

    #[tokio::test]
    async fn questions_come_in_and_answers_go_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("run/policy.sock");
        let cancel = CancellationToken::new();
        let (sender, mut receiver) = mpsc::channel(1);
        let listener = listen(&path).expect("listens");
        let server = tokio::spawn(serve(listener, sender, cancel.clone()));
        let agent = tokio::spawn(async move {
            for revision in 1..=2 {
                let asked: Asked = receiver.recv().await.expect("asked");
                assert_eq!(asked.request, Request::Status);
                let answer = match revision {
                    1 => Answer::Done { revision },
                    _ => Answer::Refused("not now".to_owned()),
                };
                asked.answer.send(answer).expect("somebody waits");
            }
        });
        let call = |path: &Path| {
            let path = path.to_owned();
            tokio::task::spawn_blocking(move || ask(&path, &Request::Status, PATIENCE))
        };
        assert_eq!(call(&path).await.expect("joined").expect("done"), 1);
        let refused = call(&path).await.expect("joined").expect_err("refused");
        assert!(matches!(&refused, AskError::Refused(why) if why == "not now"), "{refused}");
        agent.await.expect("no panic");
        cancel.cancel();
        server.await.expect("ends");
        // A socket file without a listener is no obstacle for the next run.
        assert!(path.exists());
        drop(listen(&path).expect("listens again"));
    }

    #[tokio::test]
    async fn nonsense_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("policy.sock");
        let (sender, _receiver) = mpsc::channel(1);
        let cancel = CancellationToken::new();
        let server = tokio::spawn(serve(listen(&path).expect("listens"), sender, cancel.clone()));
        let mut stream = UnixStream::connect(&path).await.expect("connected");
        stream.write_all(b"open sesame\n").await.expect("written");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("answered");
        assert!(text.starts_with(r#"{"refused":"not a request"#), "{text}");
        cancel.cancel();
        server.await.expect("ends");
    }
}
