//! The sandbox's process: holds the pod's namespaces open and does as little as possible.
//!
//! As PID 1 of the sandbox it collects the processes that containers with a shared PID namespace leave behind,
//! and ends with 0 on SIGTERM or SIGINT (PID 1 has no default signal handling, so it has to be done by hand).
//! Built static, it is the only file of its image.

use std::process::ExitCode;

/// The signals this process waits for; all are blocked, so that none interrupts it elsewhere.
fn awaited_signals() -> libc::sigset_t {
    // SAFETY: `sigset_t` is plain data that `sigemptyset` sets up before anything reads it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
            libc::sigaddset(&mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    }
}

fn reap() {
    // SAFETY: no status is asked for, so the kernel writes nothing; -1 with WNOHANG never blocks.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

fn main() -> ExitCode {
    let signals = awaited_signals();
    loop {
        // A child may have ended before the signals were blocked.
        reap();
        // SAFETY: `signals` is set up above; no siginfo is asked for.
        match unsafe { libc::sigwaitinfo(&signals, std::ptr::null_mut()) } {
            libc::SIGTERM | libc::SIGINT => return ExitCode::SUCCESS,
            _ => {}
        }
    }
}
