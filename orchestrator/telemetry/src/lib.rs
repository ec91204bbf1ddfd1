//! What the daemons share for being operated: tracing to stderr, signals, and the memory they use.
//!
//! Start with [`init_tracing`] and [`shutdown_token`].

mod memory;

pub use memory::{release_memory, share_heaps};

use std::io::IsTerminal as _;

use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Sends spans and events to stderr. The filter comes from `ORCH_LOG` (`info`, `orch_netagent=debug`, …);
/// `default` is used when the variable is absent.
///
/// # Errors
/// The filter does not parse, or tracing was set up before.
pub fn init_tracing(default: &str) -> anyhow::Result<()> {
    let filter = match std::env::var("ORCH_LOG") {
        Ok(text) => EnvFilter::try_new(&text).map_err(|error| {
            anyhow::anyhow!("ORCH_LOG=\"{text}\" is no log filter ({error}); try ORCH_LOG=info")
        })?,
        Err(_) => EnvFilter::try_new(default)?,
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init()
        .map_err(|error| anyhow::anyhow!("set up tracing: {error}"))
}

/// A token that is cancelled by SIGTERM or SIGINT. A second signal ends the process at once.
///
/// # Errors
/// The signal handlers cannot be installed.
pub fn shutdown_token() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let token = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let on_signal = token.clone();
    // Owned by the process: it ends with it.
    tokio::spawn(async move {
        let mut seen = 0;
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            seen += 1;
            if seen > 1 {
                tracing::warn!("second signal: leaving without clean-up");
                std::process::exit(130);
            }
            tracing::info!("signal received: stopping");
            on_signal.cancel();
        }
    });
    Ok(token)
}

/// Resident set size of a process in bytes, from `/proc/PID/statm`; `None` when it is gone.
#[must_use]
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_process_has_a_resident_set() {
        assert!(super::resident_bytes(std::process::id()).is_some_and(|bytes| bytes > 100_000));
        assert_eq!(super::resident_bytes(u32::MAX), None);
    }
}
