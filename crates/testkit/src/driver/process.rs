//! Looking at and ending processes without ever hitting a stranger that got the same number.

use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::pid_of;

/// One child as the run file lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// `worker`, `clerk` ...
    pub kind: String,
    /// Process id.
    pub pid: i32,
    /// Its slot among its kind.
    pub slot: u64,
    /// Its row on the board.
    pub row: u64,
    /// Number of the child within the run.
    pub epoch: u64,
    /// Generation of its configuration.
    pub generation: u64,
}

/// A child with its start time, which together name one process for ever.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) pid: i32,
    start_ticks: u64,
}

impl Known {
    /// `None` when it is gone already.
    pub(super) fn of(child: &Child) -> Option<Self> {
        Some(Self { pid: child.pid, start_ticks: start_ticks(child.pid)? })
    }

    /// Whether this very process runs; a zombie does not.
    pub(super) fn is_alive(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks) && is_alive(self.pid)
    }

    /// SIGKILL, if it is still this very process.
    pub(super) fn kill(&self) {
        // The handle is taken before the look, so that it cannot mean a later process of that number.
        let Ok(handle) = pidfd_open(pid_of(self.pid), PidfdFlags::empty()) else { return };
        if self.is_alive() {
            let _ = pidfd_send_signal(&handle, Signal::KILL);
        }
    }
}

/// When a process was started, in clock ticks since boot (proc_pid_stat(5), field 22); `None` when there is none.
#[must_use]
pub fn start_ticks(pid: i32) -> Option<u64> {
    // Fields are counted from the state, which is the third.
    stat(pid)?.split(' ').nth(22 - 3)?.parse().ok()
}

/// The state letter of a process, such as `S` or `Z`; `None` when there is none.
#[must_use]
pub fn state_of(pid: i32) -> Option<char> {
    stat(pid)?.chars().next()
}

/// Whether a process runs; a zombie does not.
#[must_use]
pub fn is_alive(pid: i32) -> bool {
    state_of(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Sends a signal; that there is no such process any more is no mistake.
pub(super) fn kill(pid: i32, signal: Signal) {
    let _ = rustix::process::kill_process(pid_of(pid), signal);
}

/// What follows the name, which may hold spaces and brackets, in `/proc/PID/stat`.
fn stat(pid: i32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(") ").map(|(_, rest)| rest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let own = i32::try_from(std::process::id()).unwrap();
        let child = Child { kind: "worker".into(), pid: own, slot: 0, row: 0, epoch: 0, generation: 1 };
        let known = Known::of(&child).unwrap();
        assert!(known.is_alive());
        let another = Known { start_ticks: known.start_ticks + 1, ..known };
        assert!(!another.is_alive());
        // Would end this test if the start time were not looked at.
        another.kill();
    }
}
