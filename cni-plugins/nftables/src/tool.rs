//! The `nft` executable.

use std::env;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use crate::table::{Family, Table};

/// Where programs are looked for when `PATH` is not set.
const DEFAULT_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Why the kernel does not hold the wanted table.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// No such program.
    #[error("the program `{0}` is missing: install the package nftables")]
    Missing(String),
    /// It could not be run.
    #[error("run `{program}`")]
    Run {
        /// Name of the program.
        program: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The transaction was refused; nothing has changed.
    #[error("nft refused the transaction: {message}")]
    Refused {
        /// What nft says, with the line it points at.
        message: String,
    },
}

impl NftError {
    /// Whether the state of the kernel may be other than we think: then write the table from nothing.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// Runs `nft` in the network namespace of the calling thread.
#[derive(Debug, Clone)]
pub struct Nft {
    program: String,
}

impl Default for Nft {
    fn default() -> Self {
        Self { program: "nft".to_owned() }
    }
}

impl Nft {
    /// Whether there is such a program.
    #[must_use]
    pub fn is_installed(&self) -> bool {
        let path = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
        env::split_paths(&path).any(|dir| dir.join(&self.program).is_file())
    }

    /// Applies a script as one transaction. An empty script is no call at all.
    ///
    /// # Errors
    /// [`NftError::Refused`] carries nft's own words; the ruleset is then as before.
    pub fn apply(&self, script: &str) -> Result<(), NftError> {
        if script.is_empty() {
            return Ok(());
        }
        self.run(&["-f", "-"], script).map(|_| ())
    }

    /// What the kernel holds of `table`, without counters and without what rules put into dynamic sets; `None`
    /// if the table is missing. Two equal answers mean that nobody changed it in between.
    ///
    /// # Errors
    /// If nft cannot be run.
    pub fn listing(&self, table: &Table) -> Result<Option<String>, NftError> {
        let family = table.family.to_string();
        match self.run(&["-s", "list", "table", &family, &table.name], "") {
            Ok(text) => Ok(Some(without_dynamic_elements(&text, table))),
            Err(NftError::Refused { message }) if message.contains("No such file or directory") => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Removes a table; a missing one is a removed one.
    ///
    /// # Errors
    /// If nft cannot be run or the kernel refuses.
    pub fn remove(&self, family: Family, name: &str) -> Result<(), NftError> {
        self.apply(&format!("add table {family} {name}\ndelete table {family} {name}\n"))
    }

    fn run(&self, args: &[&str], stdin: &str) -> Result<String, NftError> {
        let failed = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::NotFound => NftError::Missing(self.program.clone()),
            _ => NftError::Run { program: self.program.clone(), source },
        };
        let mut child = Command::new(&self.program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        // nft reads all of its input before it writes, so this cannot block on a full output pipe. An early
        // exit shows as a broken pipe here; its reason is on stderr.
        let mut input = child.stdin.take().expect("stdin is piped");
        let written = input.write_all(stdin.as_bytes());
        drop(input);
        let output = child.wait_with_output().map_err(failed)?;
        if let Some(signal) = output.status.signal() {
            let source = std::io::Error::other(format!("it was ended by signal {signal}"));
            return Err(failed(source));
        }
        if !output.status.success() {
            return Err(NftError::Refused {
                message: explain(&String::from_utf8_lossy(&output.stderr), stdin),
            });
        }
        written.map_err(failed)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// nft names a line of its input by number only when the input is a file; with our script at hand the message
/// can show it.
fn explain(stderr: &str, script: &str) -> String {
    let first =
        stderr.lines().find(|line| line.contains("Error")).unwrap_or("no reason given").trim();
    let number = first.split(':').nth(1).and_then(|number| number.parse::<usize>().ok());
    match number.and_then(|number| script.lines().nth(number.checked_sub(1)?)) {
        Some(line) => format!("{first} (in `{line}`)"),
        None => first.to_owned(),
    }
}

fn without_dynamic_elements(text: &str, table: &Table) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for line in text.lines() {
        if table.dynamic_sets().any(|name| line.trim() == format!("set {name} {{")) {
            inside = true;
        }
        if inside && line.trim() == "}" {
            inside = false;
        }
        if !inside {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}
