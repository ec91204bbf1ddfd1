//! One plugin as a child process.

use std::fs::{self, Metadata};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use cni_spec::{Env, Error, code};
use serde_json::Value;

/// How long one plugin may take. The reference has no bound of its own; kubelets give a sandbox four minutes
/// in all, and a chain has a few plugins.
pub const PLUGIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of answer that are read. Results have a few hundred.
const ANSWER_MAX: u64 = 4 << 20;
/// Bytes of talk on stderr that are kept for an error message.
const TALK_MAX: u64 = 64 << 10;
/// A pipe holds this much before a writer has to wait for the reader, even for a user who has too many pipes
/// (`pipe(7)`, `pipe-user-pages-soft`).
const PIPE_BYTES: usize = 4 << 10;
/// A plugin that is being replaced at this moment cannot be executed (`ETXTBSY`): tried so often …
const BUSY_TRIES: u32 = 20;
/// … with this pause.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// The executable of a plugin in the first folder that has it.
///
/// # Errors
/// Code 7 if the name cannot be a plugin's, code 999 naming the folders if none has it.
pub fn find_plugin(plugin: &str, dirs: &[PathBuf]) -> Result<PathBuf, Error> {
    find_program(plugin, dirs).map(|(path, _)| path)
}

/// The same with what is known of the file.
pub(crate) fn find_program(plugin: &str, dirs: &[PathBuf]) -> Result<(PathBuf, Metadata), Error> {
    if plugin.is_empty() || matches!(plugin, "." | "..") || plugin.contains(['/', '\\', '\0']) {
        let msg = format!("\"type\" is {plugin:?}, which is not the name of a plugin");
        return Err(Error::new(code::INVALID_CONFIG, msg));
    }
    let executable = |path: PathBuf| {
        let meta = fs::metadata(&path).ok()?;
        (meta.is_file() && meta.permissions().mode() & 0o111 != 0).then_some((path, meta))
    };
    dirs.iter().map(|dir| dir.join(plugin)).find_map(executable).ok_or_else(|| {
        let places: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        let msg = format!("the CNI plugin \"{plugin}\" is not in {}", places.join(", "));
        Error::new(code::INTERNAL, msg).with_details("install it there, or name its folder")
    })
}

/// Where a child's stderr goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Talk {
    /// Kept for the error, and repeated on ours.
    Keep,
    /// Ours, directly: a delegate's talk is the plugin's.
    Inherit,
}

/// Runs a plugin and returns its document.
///
/// # Errors
/// The plugin's own error, or one about it.
pub(crate) fn run(
    program: &Path,
    env: &Env,
    stdin: &[u8],
    talk: Talk,
    timeout: Duration,
) -> Result<Option<Value>, Error> {
    let deadline = Instant::now() + timeout;
    let about = |what: &str, error: &io::Error| {
        Error::from_chain(code::IO, error).context(format!("{what} {}", program.display()))
    };
    let mut child = spawn(program, env, talk).map_err(|error| about("run", &error))?;
    feed(&mut child, stdin);
    let answer = reader(child.stdout.take().map(|out| out.take(ANSWER_MAX)));
    let said = reader(child.stderr.take().map(|out| out.take(TALK_MAX)));

    let finished = collect(&answer, deadline)
        .and_then(|output| wait(&mut child, deadline).map(|status| (output, status)));
    let Ok((output, status)) = finished else {
        // Only the plugin itself is ended. Its delegates lose their pipes and end on their own; their DEL, which
        // the runtime owes after a failed ADD, finds whatever they still did.
        let _ = child.kill();
        let _ = child.wait();
        return Err(Error::new(
            code::TRY_AGAIN,
            format!(
                "{} gave no answer within {} s and was ended",
                program.display(),
                timeout.as_secs()
            ),
        ));
    };
    // Nothing more can come but from a grandchild that holds the pipe: not worth waiting for.
    let said = collect(&said, Instant::now() + Duration::from_millis(200)).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    if !said.is_empty() {
        let _ = io::stderr().write_all(said.as_bytes());
    }
    interpret(program, status, &output, said.trim())
}

fn spawn(program: &Path, env: &Env, talk: Talk) -> io::Result<Child> {
    let mut command = Process::new(program);
    for (name, value) in env.variables() {
        if value.is_empty() {
            command.env_remove(name);
        } else {
            command.env(name, value);
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(if talk == Talk::Keep { Stdio::piped() } else { Stdio::inherit() });
    for _ in 1..BUSY_TRIES {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                thread::sleep(BUSY_PAUSE);
            }
            other => return other,
        }
    }
    command.spawn()
}

/// Writes the configuration. A plugin that ends without reading it has its reasons, which it will say.
fn feed(child: &mut Child, stdin: &[u8]) {
    let Some(mut pipe) = child.stdin.take() else { return };
    if stdin.len() <= PIPE_BYTES {
        let _ = pipe.write_all(stdin);
    } else {
        let stdin = stdin.to_vec();
        thread::spawn(move || pipe.write_all(&stdin));
    }
}

/// Reads a pipe to its end on a thread of its own. One message: what was read.
fn reader(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    if let Some(mut pipe) = pipe {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before a failure is as much as there is to know.
            let _ = pipe.read_to_end(&mut bytes);
            let _ = sender.send(bytes);
        });
    }
    receiver
}

struct TooLate;

fn collect(receiver: &mpsc::Receiver<Vec<u8>>, deadline: Instant) -> Result<Vec<u8>, TooLate> {
    match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(bytes) => Ok(bytes),
        Err(RecvTimeoutError::Disconnected) => Ok(Vec::new()),
        Err(RecvTimeoutError::Timeout) => Err(TooLate),
    }
}

/// Waits for the end of a child that has closed its stdout, so mostly for microseconds.
fn wait(child: &mut Child, deadline: Instant) -> Result<ExitStatus, TooLate> {
    let mut pause = Duration::from_micros(50);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(pause),
            _ => return Err(TooLate),
        }
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn interpret(
    program: &Path,
    status: ExitStatus,
    output: &[u8],
    said: &str,
) -> Result<Option<Value>, Error> {
    let text = output.trim_ascii();
    let document: Option<Value> = match text {
        [] => None,
        text => match serde_json::from_slice(text) {
            Ok(document) => Some(document),
            Err(error) => {
                let shown: String = String::from_utf8_lossy(text).chars().take(200).collect();
                let msg = format!("{} ({status}) answered {shown:?}: {error}", program.display());
                return Err(Error::new(code::DECODE, msg));
            }
        },
    };
    if status.success() {
        return Ok(document);
    }
    if let Some(error) = document.as_ref().and_then(Value::as_object).and_then(Error::from_value) {
        return Err(error);
    }
    let error = Error::new(code::INTERNAL, format!("{} failed: {status}", program.display()));
    Err(if said.is_empty() { error } else { error.with_details(said) })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt as _;

    /// Writes an executable shell script.
    pub(crate) fn script(dir: &Path, name: &str, body: &str) -> PathBuf {
        let path = dir.join(name);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o755)
            .open(&path)
            .expect("create script");
        write!(file, "#!/bin/sh\n{body}\n").expect("write script");
        path
    }

    fn ask(body: &str, stdin: &[u8], timeout: Duration) -> Result<Option<Value>, Error> {
        let dir = tempfile::tempdir().expect("temporary folder");
        let program = script(dir.path(), "p", body);
        let env = Env { command: "ADD".into(), ifname: "eth7".into(), ..Env::default() };
        run(&program, &env, stdin, Talk::Keep, timeout)
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_plugin_gets_variables_and_configuration_and_gives_a_document() {
        let body = r#"read line; echo "{\"line\":$line,\"ifname\":\"$CNI_IFNAME\",\"args\":\"${CNI_ARGS-unset}\"}""#;
        let answer = ask(body, b"[1]\n", LONG).expect("ran").expect("document");
        assert_eq!(answer, serde_json::json!({"line": [1], "ifname": "eth7", "args": "unset"}));
        assert_eq!(ask("exit 0", b"", LONG), Ok(None));
    }

    #[test]
    fn an_error_document_is_the_error_and_stderr_is_the_second_best() {
        let error = ask(r#"echo '{"code":11,"msg":"later"}'; exit 1"#, b"", LONG).expect_err("11");
        assert_eq!((error.code, error.msg.as_str()), (11, "later"));
        let error = ask("echo broken pipe wrench >&2; exit 3", b"", LONG).expect_err("failed");
        assert_eq!(error.details.as_deref(), Some("broken pipe wrench"));
        let error = ask("echo hello", b"", LONG).expect_err("not JSON");
        assert_eq!(error.code, code::DECODE);
    }

    #[test]
    fn a_plugin_that_does_not_answer_is_ended() {
        let started = Instant::now();
        let error = ask("exec sleep 30", b"", Duration::from_millis(100)).expect_err("too late");
        assert_eq!(error.code, code::TRY_AGAIN);
        let error =
            ask("exec >&-; exec sleep 30", b"", Duration::from_millis(100)).expect_err("too late");
        assert_eq!(error.code, code::TRY_AGAIN);
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_configuration_larger_than_a_pipe_arrives_or_is_left() {
        let stdin = vec![b'x'; 300_000];
        let answer = ask("wc -c", &stdin, LONG).expect("ran");
        assert_eq!(answer, Some(serde_json::json!(300_000)));
        assert_eq!(ask("exit 0", &stdin, LONG), Ok(None));
    }

    #[test]
    fn plugins_are_executable_files_with_a_plain_name() {
        let dir = tempfile::tempdir().expect("temporary folder");
        fs::write(dir.path().join("data"), "").expect("write");
        let dirs = [dir.path().join("absent"), dir.path().to_owned()];
        script(dir.path(), "good", "exit 0");
        assert_eq!(find_plugin("good", &dirs), Ok(dir.path().join("good")));
        assert_eq!(find_plugin("../good", &dirs).expect_err("path").code, code::INVALID_CONFIG);
        for name in ["data", "absent"] {
            assert!(find_plugin(name, &dirs).expect_err(name).msg.contains("absent"));
        }
    }
}
