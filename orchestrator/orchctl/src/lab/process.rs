//! Daemons of the lab: started detached, found again through a file with PID and start time, ended by that PID.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A daemon that may or may not run.
#[derive(Debug, Clone)]
pub(crate) struct Daemon {
    pub(crate) name: String,
    pub(crate) pid_file: PathBuf,
    pub(crate) log_file: PathBuf,
}

impl Daemon {
    pub(crate) fn new(name: &str, run: &Path, log: &Path) -> Self {
        Self {
            name: name.to_owned(),
            pid_file: run.join(format!("{name}.pid")),
            log_file: log.join(format!("{name}.log")),
        }
    }

    /// PID of the running daemon. The start time in the file tells it from another process that got its PID.
    pub(crate) fn pid(&self) -> Option<i32> {
        let text = fs::read_to_string(&self.pid_file).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        let pid: i32 = pid.parse().ok()?;
        (start_ticks(pid)? == started.parse::<u64>().ok()?).then_some(pid)
    }

    /// Starts `program`, in the network namespace pinned at `netns` if one is given. Output goes to the log file.
    pub(crate) fn start(
        &self,
        program: &Path,
        args: &[String],
        netns: Option<&Path>,
    ) -> anyhow::Result<()> {
        for dir in [self.pid_file.parent(), self.log_file.parent()].into_iter().flatten() {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log_file)
            .with_context(|| format!("open {}", self.log_file.display()))?;
        let netns = netns
            .map(|path| {
                fs::File::open(path)
                    .with_context(|| format!("open network namespace {}", path.display()))
            })
            .transpose()?;
        let mut command = Command::new(program);
        command
            .args(args)
            .env("PATH", super::programs::search_path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // SAFETY: between fork and exec only async-signal-safe system calls (setsid, setns) are made, on a file
        // descriptor that the parent keeps open until `spawn` has returned.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                if let Some(file) = &netns {
                    // `setns`, not `ip netns exec`: that one hides cgroups and bpffs behind a new /sys.
                    if libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let pid = i32::try_from(child.id()).context("PID")?;
        let started = start_ticks(pid)
            .with_context(|| format!("{} ended at once{}", self.name, self.log_tail()))?;
        fs::write(&self.pid_file, format!("{pid} {started}\n"))
            .with_context(|| format!("write {}", self.pid_file.display()))
    }

    /// Ends the daemon: SIGTERM, and SIGKILL after `grace`. Nothing to do when it does not run.
    pub(crate) fn stop(&self, grace: Duration) -> anyhow::Result<()> {
        if let Some(pid) = self.pid() {
            send(pid, Signal::SIGTERM)?;
            if !self.wait_gone(grace) {
                send(pid, Signal::SIGKILL)?;
                if !self.wait_gone(Duration::from_secs(5)) {
                    bail!("{} (PID {pid}) does not end", self.name);
                }
            }
        }
        let _ = fs::remove_file(&self.pid_file);
        Ok(())
    }

    /// SIGKILL, as a crash would do it.
    pub(crate) fn crash(&self) -> anyhow::Result<()> {
        let Some(pid) = self.pid() else { bail!("{} does not run", self.name) };
        send(pid, Signal::SIGKILL)?;
        self.wait_gone(Duration::from_secs(5));
        Ok(())
    }

    fn wait_gone(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.pid().is_some() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }

    /// The last lines of the log, for error messages.
    pub(crate) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log_file).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(5).collect();
        let tail: Vec<&str> = lines.into_iter().rev().collect();
        format!("; {} ends with:\n{}", self.log_file.display(), tail.join("\n"))
    }
}

fn send(pid: i32, signal: Signal) -> anyhow::Result<()> {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("send {signal} to PID {pid}")),
    }
}

/// Start time of a living process in clock ticks since boot (proc(5), `stat` field 22). A zombie does not live:
/// some init processes reap late.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may itself hold blanks and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Runs a program in a network namespace in the foreground and returns its exit code.
pub(crate) fn run_in(netns: &Path, words: &[String]) -> anyhow::Result<i32> {
    let (program, args) = words.split_first().context("name a command after --")?;
    let file = fs::File::open(netns)
        .with_context(|| format!("open network namespace {}", netns.display()))?;
    setns(&file, CloneFlags::CLONE_NEWNET).context("enter network namespace")?;
    let status =
        Command::new(program).args(args).status().with_context(|| format!("run {program}"))?;
    Ok(status
        .code()
        .unwrap_or(128 + std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_found_again_and_a_recycled_pid_is_not() {
        let dir = std::env::temp_dir().join(format!("orch-lab-process-{}", std::process::id()));
        let daemon = Daemon::new("sleeper", &dir, &dir);
        daemon.start(Path::new("/bin/sleep"), &["60".to_owned()], None).expect("start");
        let pid = daemon.pid().expect("it runs");

        fs::write(dir.join("other.pid"), format!("{pid} 1\n")).expect("write");
        assert_eq!(Daemon::new("other", &dir, &dir).pid(), None, "the start time differs");

        daemon.stop(Duration::from_secs(5)).expect("stop");
        assert_eq!(daemon.pid(), None);
        daemon.stop(Duration::from_secs(5)).expect("stopping again is no error");
        fs::remove_dir_all(dir).expect("clean up");
    }
}
