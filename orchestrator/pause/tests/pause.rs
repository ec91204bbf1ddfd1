//! The sandbox's process as the engine treats it.

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Ends the process when the test fails.
struct Pause(Child);

impl Drop for Pause {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "did not happen: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signalled(signal: libc::c_int) -> ExitStatus {
    let program = env!("CARGO_BIN_EXE_orch-pause");
    let mut pause = Pause(Command::new(program).spawn().expect("it runs"));
    let pid = libc::pid_t::try_from(pause.0.id()).expect("a process ID");
    // proc(5): name and state. Only when it sleeps does it wait for its signals; earlier it would die of them.
    eventually("it waits", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.contains("(orch-pause) S").then_some(())
    });
    // SAFETY: the child is ours and not waited for yet, so the ID is its own.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    eventually("it ends", || pause.0.try_wait().expect("a child"))
}

#[test]
fn it_ends_in_good_order_when_asked() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        assert_eq!(signalled(signal).code(), Some(0), "signal {signal}");
    }
    assert_eq!(signalled(libc::SIGKILL).signal(), Some(libc::SIGKILL));
}
