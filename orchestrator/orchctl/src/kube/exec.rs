//! `orchctl logs` and `orchctl exec`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, HeaderValue, Method, Request, header};
use nix::sys::termios;
use orch_client::Client;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::{self, Message};

use super::resource::Resources;
use super::wire::{self, Query};
use crate::output;

/// Channels of a remote command: the first byte of every message (Kubernetes, `v5.channel.k8s.io`).
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// Followed by the channel that has ended; new in v5.
const CLOSE: u8 = 255;
/// Offered in this order; v4 has no way to end stdin.
const PROTOCOLS: &str = "v5.channel.k8s.io, v4.channel.k8s.io";
/// Bytes of stdin in one message; what kubectl sends.
const PIECE_BYTES: usize = 32 << 10;

#[derive(clap::Args)]
pub(crate) struct LogFlags {
    /// Pod, or KIND/NAME of something that has pods
    what: String,
    /// Container; needed where the pod has several
    #[arg(short, long)]
    container: Option<String>,
    /// Go on until the container ends
    #[arg(short, long)]
    follow: bool,
    /// The container before the last restart
    #[arg(short, long)]
    previous: bool,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    tail: Option<u64>,
    /// Only what is newer, for example 30s, 5m or 2h
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    since: Option<Duration>,
    /// Put the time before each line
    #[arg(long)]
    timestamps: bool,
    #[command(flatten)]
    namespace: super::NamespaceFlag,
}

#[derive(clap::Args)]
pub(crate) struct Flags {
    /// Pod, or KIND/NAME of something that has pods
    what: String,
    /// Container; needed where the pod has several
    #[arg(short, long)]
    container: Option<String>,
    /// Pass stdin on
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give the command a terminal
    #[arg(short = 't', long)]
    tty: bool,
    #[command(flatten)]
    namespace: super::NamespaceFlag,
    /// The command
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// `90s`, `5m`, `2h`, `1d`, or seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        other => return Err(format!("unknown unit {other:?}; use s, m, h or d")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .map(Duration::from_secs)
        .ok_or_else(|| format!("{text:?} is no time; write for example 30s or 5m"))
}

pub(crate) async fn logs(client: &Client, flags: LogFlags) -> anyhow::Result<()> {
    let namespace = &flags.namespace.namespace;
    let pod = find_pod(client, &flags.what, namespace).await?;
    let mut query = Query::default();
    if let Some(container) = &flags.container {
        query.add("container", container);
    }
    for (key, set) in
        [("follow", flags.follow), ("previous", flags.previous), ("timestamps", flags.timestamps)]
    {
        if set {
            query.add(key, "true");
        }
    }
    if let Some(lines) = flags.tail {
        query.add("tailLines", &lines.to_string());
    }
    if let Some(since) = flags.since {
        query.add("sinceSeconds", &since.as_secs().max(1).to_string());
    }
    let path = query.append_to(&format!("/api/v1/namespaces/{namespace}/pods/{pod}/log"));
    let request = Request::builder().uri(path).body(Bytes::new())?;
    let mut body = client
        .stream_ok(request)
        .await
        .map_err(|error| absent(error, &pod, namespace))?
        .into_body();
    let mut stdout = tokio::io::stdout();
    while let Some(frame) = http_body_util::BodyExt::frame(&mut body).await {
        let frame = frame.map_err(|error| anyhow::anyhow!("the log broke off: {error}"))?;
        if let Ok(data) = frame.into_data() {
            stdout.write_all(&data).await?;
            stdout.flush().await?;
        }
    }
    Ok(())
}

fn absent(error: orch_client::Error, pod: &str, namespace: &str) -> anyhow::Error {
    if error.is_not_found() {
        let hint = format!("list what is there with `orchctl get pods -n {namespace}`");
        return output::hinted(hint, format!("pod {pod:?} in namespace {namespace:?}: {error}"));
    }
    error.into()
}

pub(crate) async fn run(client: &Client, flags: Flags) -> anyhow::Result<u8> {
    let namespace = &flags.namespace.namespace;
    let pod = find_pod(client, &flags.what, namespace).await?;
    if flags.tty && !std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        return Err(output::usage(
            "-t needs a terminal on stdin; leave it out for pipes and files",
        ));
    }
    let command = Remote {
        namespace,
        pod: &pod,
        container: flags.container.as_deref(),
        command: &flags.command,
        tty: flags.tty,
    };
    let raw = if flags.tty { Some(RawTerminal::enter()?) } else { None };
    let stdin = flags.stdin.then(tokio::io::stdin);
    let code = command.run(client, stdin, &mut tokio::io::stdout(), &mut tokio::io::stderr()).await;
    drop(raw);
    code
}

/// A command in a container.
pub(crate) struct Remote<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) pod: &'a str,
    pub(crate) container: Option<&'a str>,
    pub(crate) command: &'a [String],
    pub(crate) tty: bool,
}

impl Remote<'_> {
    /// Runs the command and returns its exit code.
    ///
    /// # Errors
    /// The pod is absent, or the session broke before the command had ended.
    pub(crate) async fn run<I, O, E>(
        &self,
        client: &Client,
        stdin: Option<I>,
        stdout: &mut O,
        stderr: &mut E,
    ) -> anyhow::Result<u8>
    where
        I: AsyncRead + Unpin,
        O: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        let path = self.path(stdin.is_some());
        let key = generate_key();
        let mut headers = HeaderMap::new();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOCOLS));
        headers.insert(header::SEC_WEBSOCKET_KEY, key.parse()?);
        let upgraded = client
            .upgrade(Method::GET, &path, headers)
            .await
            .map_err(|error| absent(error, self.pod, self.namespace))?;
        let header = |name: header::HeaderName| {
            upgraded.headers.get(name).and_then(|value| value.to_str().ok())
        };
        if header(header::SEC_WEBSOCKET_ACCEPT) != Some(derive_accept_key(key.as_bytes()).as_str())
        {
            bail!("the server did not complete the WebSocket handshake");
        }
        let half_close = header(header::SEC_WEBSOCKET_PROTOCOL) == Some("v5.channel.k8s.io");
        let socket = WebSocketStream::from_raw_socket(upgraded.io, Role::Client, None).await;
        let (mut sink, mut messages) = socket.split();
        let mut feeding = std::pin::pin!(feed(&mut sink, stdin, self.tty, half_close));
        let mut fed = false;
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                outcome = &mut feeding, if !fed => {
                    fed = true;
                    // A command may end without reading all of stdin; its status is still to come.
                    let _: Result<(), tungstenite::Error> = outcome;
                    continue;
                }
            };
            let data = match message {
                Some(Ok(Message::Binary(data))) => data,
                Some(Ok(Message::Text(text))) => Bytes::from(text),
                Some(Ok(Message::Close(_))) | None => {
                    bail!("the session ended without the command's exit code")
                }
                Some(Ok(_)) => continue,
                Some(Err(error)) => return Err(error).context("the session broke"),
            };
            match data.split_first() {
                Some((&STDOUT, bytes)) => {
                    stdout.write_all(bytes).await?;
                    stdout.flush().await?;
                }
                Some((&STDERR, bytes)) => {
                    stderr.write_all(bytes).await?;
                    stderr.flush().await?;
                }
                Some((&STATUS, bytes)) => return exit_code(bytes),
                _ => {}
            }
        }
    }

    fn path(&self, stdin: bool) -> String {
        let mut query = Query::default();
        if let Some(container) = self.container {
            query.add("container", container);
        }
        for word in self.command {
            query.add("command", word);
        }
        query.add("stdin", if stdin { "true" } else { "false" });
        query.add("stdout", "true");
        // A terminal has one output only.
        query.add("stderr", if self.tty { "false" } else { "true" });
        query.add("tty", if self.tty { "true" } else { "false" });
        query.append_to(&format!("/api/v1/namespaces/{}/pods/{}/exec", self.namespace, self.pod))
    }
}

/// Sends stdin, its end and the terminal's size. Ends with an error only; a silent session just stays open.
async fn feed<S, I>(
    sink: &mut S,
    mut stdin: Option<I>,
    tty: bool,
    half_close: bool,
) -> Result<(), tungstenite::Error>
where
    S: futures::Sink<Message, Error = tungstenite::Error> + Unpin,
    I: AsyncRead + Unpin,
{
    use futures::SinkExt as _;
    let mut resized = if tty { signal(SignalKind::window_change()).ok() } else { None };
    if tty && let Some(size) = terminal_size() {
        sink.send(size).await?;
    }
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        tokio::select! {
            read = async { stdin.as_mut().expect("the branch is off without stdin").read(&mut buffer).await },
                if stdin.is_some() => match read {
                Ok(count) if count > 0 => sink.send(framed(STDIN, &buffer[..count])).await?,
                _ => {
                    stdin = None;
                    if half_close {
                        sink.send(Message::Binary(Bytes::from_static(&[CLOSE, STDIN]))).await?;
                    }
                }
            },
            Some(()) = async { resized.as_mut().expect("the branch is off without a terminal").recv().await },
                if resized.is_some() => {
                if let Some(size) = terminal_size() {
                    sink.send(size).await?;
                }
            }
            else => return std::future::pending().await,
        }
    }
}

fn framed(channel: u8, bytes: &[u8]) -> Message {
    let mut message = Vec::with_capacity(bytes.len() + 1);
    message.push(channel);
    message.extend_from_slice(bytes);
    Message::Binary(message.into())
}

fn terminal_size() -> Option<Message> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize` through the pointer, which is valid for the call.
    let got = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    let text = json!({ "Width": size.ws_col, "Height": size.ws_row }).to_string();
    (got == 0 && size.ws_col > 0).then(|| framed(RESIZE, text.as_bytes()))
}

/// Reads the `Status` that ends a session: 0, the command's own code, or why it could not run.
fn exit_code(bytes: &[u8]) -> anyhow::Result<u8> {
    let status: Value = serde_json::from_slice(bytes).context("read the session's status")?;
    if status["status"] == "Success" {
        return Ok(0);
    }
    if status["reason"] == "NonZeroExitCode" {
        let code = status["details"]["causes"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|cause| cause["reason"] == "ExitCode")
            .and_then(|cause| cause["message"].as_str()?.parse::<i64>().ok());
        if let Some(code) = code {
            return Ok(u8::try_from(code).unwrap_or(u8::MAX));
        }
    }
    bail!("{}", status["message"].as_str().unwrap_or("the command could not be run"))
}

/// The terminal passes every key on as long as this lives.
struct RawTerminal(termios::Termios);

impl RawTerminal {
    fn enter() -> anyhow::Result<Self> {
        let before =
            termios::tcgetattr(std::io::stdin()).context("read the terminal's settings")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(std::io::stdin(), termios::SetArg::TCSADRAIN, &raw)
            .context("set the terminal to raw")?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin(), termios::SetArg::TCSADRAIN, &self.0);
    }
}

/// The pod that is meant: by name, or the first one of a workload or Service.
async fn find_pod(client: &Client, what: &str, namespace: &str) -> anyhow::Result<String> {
    let Some((kind, name)) = what.split_once('/') else { return Ok(what.to_owned()) };
    if matches!(kind, "pod" | "pods" | "po") {
        return Ok(name.to_owned());
    }
    let resources = Resources::discover(client).await?;
    let resource = resources.find(kind)?;
    let object = wire::get(client, &resource.object_path(namespace, name)).await?;
    let selector = selector(&object["spec"]["selector"]).with_context(|| {
        format!("{}/{name} has no selector, so it has no pods of its own", resource.qualified())
    })?;
    let mut query = Query::default();
    query.add("labelSelector", &selector);
    let pods = wire::get(client, &query.append_to(&format!("/api/v1/namespaces/{namespace}/pods")))
        .await?;
    let mut pods: Vec<&Value> = pods["items"].as_array().into_iter().flatten().collect();
    pods.sort_by_key(|pod| pod["status"]["phase"] != "Running");
    let first = pods.first().and_then(|pod| pod["metadata"]["name"].as_str());
    first.map(str::to_owned).with_context(|| format!("{}/{name} has no pods", resource.qualified()))
}

/// Labels of a selector as text: `matchLabels` of workloads, the plain map of Services.
fn selector(spec: &Value) -> Option<String> {
    let labels = spec.get("matchLabels").unwrap_or(spec).as_object()?;
    let parts: Vec<String> = labels
        .iter()
        .filter_map(|(key, value)| Some(format!("{key}={}", value.as_str()?)))
        .collect();
    (!parts.is_empty()).then(|| parts.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_of_the_command_is_ours() {
        assert_eq!(exit_code(br#"{"status":"Success"}"#).expect("success"), 0);
        let failed = br#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
        assert_eq!(exit_code(failed).expect("a code"), 3);
        let error = exit_code(br#"{"status":"Failure","message":"no such file"}"#)
            .expect_err("no code")
            .to_string();
        assert_eq!(error, "no such file");
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("30"), Ok(Duration::from_secs(30)));
        assert!(parse_duration("5y").is_err_and(|why| why.contains("use s, m, h or d")));
        assert!(parse_duration("m").is_err());
    }

    #[test]
    fn workloads_and_services_select_their_pods() {
        assert_eq!(
            selector(&json!({ "matchLabels": { "app": "a", "b": "c" } })).as_deref(),
            Some("app=a,b=c")
        );
        assert_eq!(selector(&json!({ "app": "a" })).as_deref(), Some("app=a"));
        assert_eq!(selector(&Value::Null), None);
    }

    #[test]
    fn the_command_line_becomes_a_query() {
        let command = ["sh".to_owned(), "-c".to_owned(), "a b".to_owned()];
        let remote = Remote {
            namespace: "shop",
            pod: "web",
            container: None,
            command: &command,
            tty: false,
        };
        assert_eq!(
            remote.path(true),
            "/api/v1/namespaces/shop/pods/web/exec?command=sh&command=-c&command=a%20b&stdin=true&stdout=true&stderr=true&tty=false"
        );
    }

    /// Both ends of the channel protocol over a real WebSocket, in memory.
    #[tokio::test]
    async fn stdin_is_sent_in_pieces_and_its_end_is_told() {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let client = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
        let server = WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
        let (mut sink, _messages) = client.split();
        let input = vec![b'x'; PIECE_BYTES + 1];
        let sending = feed(&mut sink, Some(input.as_slice()), false, true);
        let receiving = async {
            let mut server = server;
            let mut bytes = 0;
            while let Some(Ok(message)) = server.next().await {
                let data = message.into_data();
                if data.as_ref() == [CLOSE, STDIN] {
                    break;
                }
                assert_eq!(data[0], STDIN);
                bytes += data.len() - 1;
            }
            bytes
        };
        tokio::select! {
            _ = sending => panic!("it stays open until the command ends"),
            bytes = receiving => assert_eq!(bytes, PIECE_BYTES + 1),
        }
    }
}
