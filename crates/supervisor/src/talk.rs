//! Words for the operator on standard error, which must never hold the master up.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Lines that standard error did not take: nobody reads it, and its pipe is full (I12).
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// A pipe that is ready for writing takes this many bytes without blocking (`PIPE_BUF`).
const BYTES_MAX: usize = 4096;

/// Says something, with our name before it.
pub(crate) fn say(text: &str) {
    print(&format!("evergate: {text}"));
}

/// Prints one line; drops and counts it when standard error does not take it at once.
pub(crate) fn print(line: &str) {
    let mut bytes = line.as_bytes().to_vec();
    bytes.truncate(BYTES_MAX - 1);
    bytes.push(b'\n');
    let stderr = std::io::stderr();
    let ready = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    if ready != Ok(1) || (&stderr).write_all(&bytes).is_err() {
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Lines dropped so far.
pub(crate) fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}
