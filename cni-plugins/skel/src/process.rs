//! The process around a call: stdin, stdout, exit code.

use std::any::Any;
use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use cni_spec::{Env, Error, Version, code};
use serde_json::Value;

use crate::Plugin;
use crate::call::{answer_version, call};

/// Bytes of configuration that are read. A GC call names every attachment of a node in about 120 bytes, so this
/// is room for tens of thousands; beyond it somebody is sending us something else.
const STDIN_MAX: u64 = 8 << 20;

/// Runs a plugin as the specification wants it run and returns the exit code.
#[must_use]
pub fn main<P: Plugin>(plugin: &P) -> ExitCode {
    one_arena();
    // Nothing but the one document may reach stdout: from here on, whoever writes there (a library, a child
    // process, a forgotten print) writes to stderr.
    let mut stdout = match claim_stdout() {
        Ok(stdout) => stdout,
        Err(error) => {
            eprintln!("{}: take hold of stdout: {error}", plugin.name());
            return ExitCode::FAILURE;
        }
    };
    let env = Env::read(|name| std::env::var(name).ok());
    if env.command.is_empty() {
        eprintln!(
            "{}: {}\nA CNI plugin, called by container runtimes through CNI_* variables and a configuration on stdin. \
             CNI versions: {}.",
            plugin.name(),
            plugin.about(),
            Version::supported().join(", ")
        );
    }
    let (document, exit) = run(plugin, &env, io::stdin());
    if let Some(document) = document {
        let mut text = document.to_string();
        text.push('\n');
        if let Err(error) = stdout.write_all(text.as_bytes()) {
            eprintln!("{}: write the answer: {error}", plugin.name());
            return ExitCode::FAILURE;
        }
    }
    exit
}

/// Keeps the C library from setting up memory of its own for each thread: the ones that enter namespaces live for less
/// than a millisecond, one at a time.
fn one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number, and there is only one thread so far.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1);
    }
}

/// A file that is the former stdout; file descriptor 1 is stderr afterwards.
fn claim_stdout() -> io::Result<File> {
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    nix::unistd::dup2_stdout(io::stderr())?;
    Ok(stdout)
}

fn run<P: Plugin>(plugin: &P, env: &Env, stdin: io::Stdin) -> (Option<Value>, ExitCode) {
    let input = if env.command.is_empty() || stdin.is_terminal() {
        Ok(Vec::new())
    } else {
        read_limited(stdin.lock())
    };
    let answer = input.and_then(|input| {
        answer(plugin, env, &input).map_err(|error| (error, answer_version(&input)))
    });
    match answer {
        Ok(document) => (document, ExitCode::SUCCESS),
        Err((error, version)) => (Some(error.to_value(version)), ExitCode::FAILURE),
    }
}

fn read_limited(source: impl io::Read) -> Result<Vec<u8>, (Error, Version)> {
    let mut input = Vec::new();
    let read = source.take(STDIN_MAX + 1).read_to_end(&mut input);
    let error = match read {
        Err(error) => Error::from_chain(code::IO, &error).context("read stdin"),
        Ok(_) if input.len() as u64 > STDIN_MAX => Error::new(
            code::DECODE,
            format!("the network configuration on stdin has more than {STDIN_MAX} bytes"),
        ),
        Ok(_) => return Ok(input),
    };
    Err((error, Version::LATEST))
}

/// As [`call`], with a panic as an error of code 999.
fn answer<P: Plugin>(plugin: &P, env: &Env, input: &[u8]) -> Result<Option<Value>, Error> {
    // The plugin is dropped with the process, so nobody sees a state broken half-way.
    panic::catch_unwind(AssertUnwindSafe(|| call(plugin, env, input)))
        .unwrap_or_else(|payload| Err(panic_error(plugin.name(), payload.as_ref())))
}

fn panic_error(name: &str, payload: &(dyn Any + Send)) -> Error {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Error::new(code::INTERNAL, format!("{name} panicked: {text}"))
        .with_details("this is a bug of the plugin; stderr has the place")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::tests::{Echo, conf, env};

    #[test]
    fn a_panic_becomes_an_error_of_code_999() {
        let input = conf("1.0.0", r#","panic":true"#);
        let error = answer(&Echo, &env("ADD"), input.as_bytes()).expect_err("panicked");
        assert_eq!(error.code, code::INTERNAL);
        assert!(error.msg.contains("as asked"), "{error}");
    }

    #[test]
    fn a_configuration_without_end_is_refused() {
        let (error, _) = read_limited(io::repeat(b' ')).expect_err("too long");
        assert_eq!(error.code, code::DECODE);
        assert_eq!(read_limited(&b"{}"[..]).map_err(|(error, _)| error), Ok(b"{}".to_vec()));
    }

    #[test]
    fn the_answer_is_in_the_version_of_the_question() {
        assert_eq!(answer_version(br#"{"cniVersion":"0.4.0"}"#), Version::V0_4_0);
        assert_eq!(answer_version(br#"{"cniVersion":"9.0.0"}"#), Version::LATEST);
        assert_eq!(answer_version(b"{}"), Version::V0_1_0);
        assert_eq!(answer_version(b"nonsense"), Version::LATEST);
    }
}
