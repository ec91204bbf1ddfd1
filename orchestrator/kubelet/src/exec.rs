//! The end of a command in a container.

use std::time::Duration;

use orch_cri::{Error, Runtime};

/// The engine may say "running" for a moment after the output has ended.
const POLL: Duration = Duration::from_millis(20);
const POLL_SLOW: Duration = Duration::from_millis(250);
/// Quick looks before the slow ones: a command may close its output and go on.
const QUICK_LOOKS: u32 = 50;

/// Waits until a command has ended and returns its exit code.
pub(crate) async fn exit_code(runtime: &dyn Runtime, session: &str) -> Result<i64, Error> {
    let mut looks = 0;
    loop {
        let state = runtime.exec_state(session).await?;
        if !state.running {
            return Ok(state.exit_code);
        }
        looks += 1;
        tokio::time::sleep(if looks < QUICK_LOOKS { POLL } else { POLL_SLOW }).await;
    }
}
