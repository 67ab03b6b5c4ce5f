//! What a child is doing that does not beat, as seen from outside: it cannot be asked.

use evergate_board::{Board, monotonic_ns};
use evergate_sys::Pid;

use crate::children::Running;

/// One line for the operator. Reads two small files of procfs, which wait for nobody.
pub(crate) fn diagnose(board: &Board, running: &Running, name: &str) -> String {
    let pid = running.pid.as_raw_nonzero().get();
    let now = monotonic_ns();
    let ms_since = |then: u64| now.saturating_sub(then) / 1_000_000;
    let mut text = format!("{name} (pid {pid}) does not beat");
    if let Some(row) = board.child(running.birth.row) {
        text.push_str(&format!(": last beat {} ms ago", ms_since(row.beat_ns())));
        let inflight: Vec<_> = board.inflight(running.birth.row).collect();
        text.push_str(&format!(", {} in flight", inflight.len()));
        let at_work = inflight.iter().find(|request| row.running() > 0 && u64::from(request.seq) == row.running());
        if let Some(request) = at_work {
            let (id, route) = (request.request_id(board.run_id()), board.label_text(request.route));
            text.push_str(&format!(", at work on {id} {route} of {} ms", ms_since(request.started_ns)));
        }
    }
    text.push_str(&format!(", state {}", state(pid)));
    let place = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
    // A lone 0 is the kernel's word for running, or for no permission to tell.
    if !place.is_empty() && place != "0" {
        text.push_str(&format!(" in {place}"));
    }
    text
}

/// The kernel's word for what a process does, proc_pid_stat(5).
pub(crate) fn state(pid: i32) -> &'static str {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    match stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()) {
        Some('R') => "running",
        Some('S') => "sleeping",
        Some('D') => "waiting for a disk or a lock in the kernel",
        Some('T' | 't') => "stopped by a signal or a debugger",
        Some('Z' | 'X') => "dead",
        _ => "unknown",
    }
}

/// How long a process's main thread has waited for a processor since its start, nanoseconds; 0 when nobody can tell
/// (schedstat of proc(5): time on a processor, time in a run queue, turns).
pub(crate) fn starved(pid: Pid) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/schedstat", pid.as_raw_nonzero())).unwrap_or_default();
    text.split(' ').nth(1).and_then(|waited| waited.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_described() {
        assert_eq!(state(i32::MAX), "unknown");
        let own = i32::try_from(std::process::id()).unwrap();
        // The main thread waits for this one, or runs.
        assert!(["running", "sleeping"].contains(&state(own)));
    }
}
