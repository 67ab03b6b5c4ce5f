//! Words for the operator on standard error, which must never hold an event loop up.

use std::io::{self, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A pipe that is ready for writing takes this many bytes without blocking (`PIPE_BUF`).
const BYTES_MAX: usize = 4096;

/// Prints one line, or nothing when standard error does not take it at once: nobody reads it, and its pipe is full (I12).
pub fn print(line: &str) {
    let end = (0..BYTES_MAX.min(line.len() + 1)).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
    let mut bytes = line.as_bytes().get(..end).unwrap_or_default().to_vec();
    bytes.push(b'\n');
    let stderr = io::stderr();
    let is_ready =
        poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1);
    if is_ready {
        // What it does not take nobody hears.
        let _ = (&stderr).write_all(&bytes);
    }
}
