//! Removing a link without waiting for the kernel to tidy up.
//!
//! `RTM_DELLINK` has two halves. In the first, which takes well under a millisecond and holds the lock of all links, both
//! ends of a veth pair are switched off, taken out of their bridge and out of their namespaces: nobody finds them any
//! more, nothing passes, their names are free. Then the kernel lets go of the lock and waits, in the same system call,
//! until nobody can be reading what it is about to free (`netdev_run_todo` calls `rcu_barrier`): 10 to 30 milliseconds,
//! and nine tenths of what a DEL takes. There is no request that leaves that half to the kernel's own workers.
//!
//! So a child process makes the system call, and its parent only waits for the first half. Before that the child closes
//! all files but the socket: a runtime waits until nobody has the plugin's stdout. Whoever ends first, the kernel
//! finishes what it has begun. The child outlives its parent by those milliseconds and is then left to the host's init,
//! as the shims of containers are. Where init takes no notice of those who end, DEL waits for the kernel instead: so at most
//! [`LEFT_MAX`] stay.

use std::fs;
use std::os::fd::RawFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid};

use crate::socket::append;
use crate::{Netlink, NetlinkError};

/// How long the child may take to have its request begun. It takes a fraction of a millisecond; on a host where it takes
/// longer than this, waiting for the whole removal is the better way.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Pauses between two looks. A look waits for the lock of all links, and so for the first half once that has begun.
const FIRST_PAUSE: Duration = Duration::from_micros(100);
const LAST_PAUSE: Duration = Duration::from_millis(5);
/// Parent of those who have lost theirs.
const INIT: Pid = Pid::from_raw(1);
/// Its children, the latest last.
const CHILDREN_OF_INIT: &str = "/proc/1/task/1/children";
/// Children in a row that have ended without init's notice: so many may be an init that looks after them now and then.
const LEFT_MAX: usize = 64;

impl Netlink {
    /// As [`delete_link`](Self::delete_link), but returns as soon as the link and its peer are gone for everybody. For
    /// processes that end soon after: the child that waits for the rest is nobody's to wait for.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_link_unawaited(&self, index: u32) -> Result<(), NetlinkError> {
        // A container whose only program calls plugins has no init that would take in the child.
        if getppid() == INIT || init_leaves_them() {
            return self.delete_link(index);
        }
        let mut request = Vec::new();
        let mut message = LinkMessage::default();
        message.header.index = index;
        append(&mut request, 0, self.next_sequence(), RouteNetlinkMessage::DelLink(message));
        let Some(child) = send_by_child(self.raw_fd(), &request) else {
            return self.delete_link(index);
        };
        let deadline = Instant::now() + BEGIN_TIMEOUT;
        let mut pause = FIRST_PAUSE;
        loop {
            // Looked at before the link is: a child that had ended by then has done what it could.
            let ended = !matches!(
                waitpid(child, Some(WaitPidFlag::WNOHANG)),
                Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::EINTR)
            );
            if self.link_at(index)?.is_none() {
                return Ok(());
            }
            if ended || Instant::now() >= deadline {
                // It was refused, or never came to it: this request says why.
                return self.delete_link(index);
            }
            sleep(pause);
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }
}

/// Whether init lets those who end stay. A kernel that does not list children says no.
fn init_leaves_them() -> bool {
    let Ok(children) = fs::read_to_string(CHILDREN_OF_INIT) else { return false };
    let Some(pid) = children.split_ascii_whitespace().nth_back(LEFT_MAX - 1) else { return false };
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| has_ended(&stat))
}

/// Pure. The state stands behind the name, which may have any letters, brackets too.
fn has_ended(stat: &str) -> bool {
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// Starts a child that has nothing open but `socket`, sends `request` and ends. `None` if there can be no child.
fn send_by_child(socket: RawFd, request: &[u8]) -> Option<Pid> {
    // SAFETY: what the child does between fork and end are system calls on numbers and on bytes that exist already: no
    // memory is allocated, no lock taken, whatever other threads were at in the parent.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => Some(child),
        Ok(ForkResult::Child) => {
            let socket_number = socket.unsigned_abs();
            // SAFETY: the child uses none of these files; `request` outlives the call, since this process does not
            // return; `_exit` runs none of the parent's clean-up.
            unsafe {
                let below =
                    socket_number.checked_sub(1).map_or(0, |last| libc::close_range(0, last, 0));
                let above = libc::close_range(socket_number + 1, libc::c_uint::MAX, 0);
                // With the runtime's pipe still open it would keep the runtime waiting: then better not at all.
                if below == 0 && above == 0 {
                    libc::send(socket, request.as_ptr().cast(), request.len(), 0);
                }
                libc::_exit(0)
            }
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_nobody_has_waited_for_has_ended() {
        assert!(has_ended("5736 (bridge) Z 1 5736 5736 0 -1"));
        assert!(has_ended("7 (a) Z) Z 1 7"));
        assert!(!has_ended("7 (a) Z) S 1 7"));
        assert!(!has_ended("5736 (bridge) D 1 5736") && !has_ended("nonsense"));
    }
}
