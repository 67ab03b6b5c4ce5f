//! Words for the operator on standard error, which must never hold the master up.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};

/// Lines that standard error did not take: nobody reads it, and its pipe is full (I12).
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// See [`reopen`].
static OWN: OnceLock<Option<File>> = OnceLock::new();

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
    let is_ready =
        || poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1);
    let is_said = match OWN.get_or_init(reopen) {
        Some(own) => (&*own).write_all(&bytes).is_ok(),
        None => is_ready() && (&stderr).write_all(&bytes).is_ok(),
    };
    if !is_said {
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Standard error once more where it is a pipe or a terminal, not blocking: between a look whether it takes a line and the write
/// a child, who has the same one, may take the last of its room. None where it is something else, or not ours to open.
fn reopen() -> Option<File> {
    let kind = FileType::from_raw_mode(fstat(std::io::stderr()).ok()?.st_mode);
    if !matches!(kind, FileType::Fifo | FileType::CharacterDevice) {
        return None;
    }
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Some(open("/proc/self/fd/2", flags, Mode::empty()).ok()?.into())
}

/// Lines dropped so far.
pub(crate) fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}
