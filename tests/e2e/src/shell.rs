//! Running a program with a deadline and reading all that it says.

use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// What a program did.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
    call: String,
}

impl Output {
    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The output of a program that had to succeed.
    ///
    /// # Errors
    /// It failed; both outputs are in the error.
    pub fn ok(self) -> anyhow::Result<Self> {
        if !self.status.success() {
            bail!(
                "`{}` ended with {}\nstdout: {}\nstderr: {}",
                self.call,
                self.status,
                self.text(),
                self.stderr
            );
        }
        Ok(self)
    }

    /// What a program said that had to fail: both outputs.
    ///
    /// # Errors
    /// It succeeded.
    pub fn failed(self) -> anyhow::Result<String> {
        if self.status.success() {
            bail!("`{}` succeeded and should not have\nstdout: {}", self.call, self.text());
        }
        Ok(format!("{}{}", self.text(), self.stderr))
    }
}

/// Runs `command` with `stdin`, for at most `limit`; then it is killed, which is an error.
///
/// # Errors
/// It cannot be started or does not end.
pub fn run(command: &mut Command, stdin: &[u8], limit: Duration) -> anyhow::Result<Output> {
    let call = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{call}`"))?;
    let mut input = child.stdin.take().context("stdin")?;
    let mut out = child.stdout.take().context("stdout")?;
    let mut err = child.stderr.take().context("stderr")?;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A program that does not read its input is no error of the test.
            let _ = input.write_all(stdin);
        });
        let stdout = scope.spawn(move || {
            let mut bytes = Vec::new();
            out.read_to_end(&mut bytes).map(|_| bytes)
        });
        let stderr = scope.spawn(move || {
            let mut bytes = Vec::new();
            err.read_to_end(&mut bytes).map(|_| bytes)
        });
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = child.try_wait().with_context(|| format!("wait for `{call}`"))? {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().with_context(|| format!("kill `{call}`"))?;
                child.wait().with_context(|| format!("wait for `{call}`"))?;
                bail!("`{call}` did not end within {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let joined = |thread: std::thread::ScopedJoinHandle<'_, std::io::Result<Vec<u8>>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?.context("read output")
        };
        let (stdout, stderr) = (joined(stdout)?, joined(stderr)?);
        Ok(Output { status, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned(), call })
    })
}
