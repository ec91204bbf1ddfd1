//! `/exec` and `/attach`: a command's streams, carried over WebSocket [`channels`] or over [`spdy`] streams.
//!
//! This module runs the command and does not know how its bytes travel: a [`Source`] gives what the client sends, a
//! [`Sink`] takes what the command says. Back-pressure is that of the sockets: the next bytes are read only when
//! those before are with the command.

mod channels;
mod spdy;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use hyper::body::Incoming;
use orch_cri::{Error, ExecSpec, Output};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tracing::debug;

use crate::context::Context;
use crate::server::Body;
use crate::server::spdy::Gone;

#[cfg(test)]
pub(crate) use self::channels::run;

/// Largest piece of output in one message.
const MAX_PIECE_BYTES: usize = 64 << 10;
/// Keeps proxies on the way from closing a silent session.
const PING_EVERY: Duration = Duration::from_secs(20);

/// What the streams belong to.
#[derive(Debug)]
pub(crate) enum Session {
    /// A new command in this container.
    Exec(String, ExecSpec),
    /// This container's own process; whether it has a terminal.
    Attach(String, ExecSpec, bool),
}

impl Session {
    /// Which streams the client asks for.
    fn streams(&self) -> &ExecSpec {
        match self {
            Self::Exec(_, streams) | Self::Attach(_, streams, _) => streams,
        }
    }
}

/// What a client sends.
#[derive(Debug, PartialEq, Eq)]
enum Input {
    Stdin(Bytes),
    /// No more of it.
    StdinEnd,
    Resize(Size),
}

/// A terminal's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

/// Where a client's input comes from.
trait Source: Send {
    /// The next input; `None` when the client has gone.
    fn next(&mut self) -> impl Future<Output = Option<Input>> + Send;
}

/// Where a command's output goes to.
trait Sink: Send {
    fn stdout(&mut self, bytes: &[u8]) -> impl Future<Output = Result<(), Gone>> + Send;
    fn stderr(&mut self, bytes: &[u8]) -> impl Future<Output = Result<(), Gone>> + Send;
    /// Shows that we are still there.
    fn ping(&mut self) -> impl Future<Output = Result<(), Gone>> + Send;
}

/// Answers with 101 and runs the session beside the connection.
pub(super) fn answer(
    cx: &Arc<Context>,
    request: Request<Incoming>,
    session: Session,
) -> Response<Body> {
    if crate::server::spdy::is_asked_for(request.headers()) {
        spdy::answer(cx, request, session)
    } else {
        channels::answer(cx, request, session)
    }
}

/// The command's exit code, or why there is none.
type Outcome = Result<i64, Error>;

/// Runs a session until the command ends or the client goes.
async fn transfer(
    cx: &Arc<Context>,
    sink: &mut impl Sink,
    source: &mut impl Source,
    session: &Session,
) -> Result<Outcome, Gone> {
    let runtime = cx.runtime();
    let streams = session.streams();
    let (opened, tty, exec) = match session {
        Session::Exec(container, spec) => (runtime.exec(container, spec).await, spec.tty, true),
        Session::Attach(container, spec, tty) => {
            (runtime.attach(container, spec.stdin).await, *tty, false)
        }
    };
    let orch_cri::Session { id, mut output, input } = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(Err(error)),
    };
    let mut incoming =
        std::pin::pin!(receive(cx, source, streams.stdin.then_some(input), &id, tty, exec));
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.reset();
    loop {
        tokio::select! {
            piece = output.next() => match piece {
                Some(Ok(piece)) => send_output(sink, streams, piece).await?,
                Some(Err(error)) => {
                    debug!(%error, "output of a remote command");
                    break;
                }
                None => break,
            },
            // The client went away, or said all it will say.
            () = &mut incoming => return Err(Gone),
            _ = pings.tick() => sink.ping().await?,
        }
    }
    if !exec {
        return Ok(Ok(0));
    }
    Ok(crate::exec::exit_code(runtime, &id).await)
}

async fn send_output(sink: &mut impl Sink, streams: &ExecSpec, piece: Output) -> Result<(), Gone> {
    match piece {
        Output::Stdout(bytes) if streams.stdout => {
            for part in bytes.chunks(MAX_PIECE_BYTES) {
                sink.stdout(part).await?;
            }
        }
        Output::Stderr(bytes) if streams.stderr => {
            for part in bytes.chunks(MAX_PIECE_BYTES) {
                sink.stderr(part).await?;
            }
        }
        Output::Stdout(_) | Output::Stderr(_) => {}
    }
    Ok(())
}

/// Carries stdin and terminal sizes to the command, until the client goes.
async fn receive(
    cx: &Arc<Context>,
    source: &mut impl Source,
    mut input: Option<Pin<Box<dyn AsyncWrite + Send>>>,
    id: &str,
    tty: bool,
    exec: bool,
) {
    while let Some(next) = source.next().await {
        match next {
            Input::Stdin(bytes) => {
                if let Some(writer) = &mut input
                    && writer.write_all(&bytes).await.is_err()
                {
                    // The command does not read any more; what it says still counts.
                    input = None;
                }
            }
            Input::StdinEnd => {
                if let Some(mut writer) = input.take() {
                    let _ = writer.shutdown().await;
                }
            }
            Input::Resize(Size { width, height }) if tty => {
                let resized = match exec {
                    true => cx.runtime().resize_exec(id, width, height).await,
                    false => cx.runtime().resize(id, width, height).await,
                };
                if let Err(error) = resized {
                    debug!(%error, "resize terminal");
                }
            }
            Input::Resize(_) => {}
        }
    }
}

fn failure_text(code: i64) -> String {
    format!("command terminated with non-zero exit code: exit status {code}")
}

/// How protocols before v4 end: without a word, or with the reason of a failure.
fn plain_status(outcome: &Outcome) -> Option<String> {
    match outcome {
        Ok(0) => None,
        Ok(code) => Some(failure_text(*code)),
        Err(error) => Some(error.to_string()),
    }
}

/// The Status that ends a session; `kubectl` takes its exit code from the cause `ExitCode`.
fn status(outcome: &Outcome) -> Value {
    match outcome {
        Ok(0) => json!({ "metadata": {}, "status": "Success" }),
        Ok(code) => json!({
            "metadata": {},
            "status": "Failure",
            "message": failure_text(*code),
            "reason": "NonZeroExitCode",
            "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
        }),
        Err(error) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("error executing command in container: {error}"),
            "reason": "InternalError",
            "code": 500,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_carries_the_exit_code() {
        assert_eq!(status(&Ok(0))["status"], "Success");
        let failed = status(&Ok(7));
        assert_eq!(failed["reason"], "NonZeroExitCode");
        assert_eq!(failed["details"]["causes"][0], json!({ "reason": "ExitCode", "message": "7" }));
    }
}
