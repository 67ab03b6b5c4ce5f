//! Hands access records to the clerk: one line, one write to a pipe that never blocks and that outlives this process.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use evergate_core::record::Access;
use evergate_core::redact::Redactor;

/// The write end of the access pipe.
#[derive(Debug)]
pub struct AccessLog {
    pipe: OwnedFd,
    dropped: AtomicU64,
    redactor: Arc<Redactor>,
}

impl AccessLog {
    /// Writes to `pipe`, which is non-blocking; takes secrets out of what is not our own text.
    #[must_use]
    pub fn new(pipe: OwnedFd, redactor: Arc<Redactor>) -> Self {
        Self { pipe, dropped: AtomicU64::new(0), redactor }
    }

    /// Writes the record; `false` if the pipe is full or closed and the record is lost.
    ///
    /// A line is at most `PIPE_BUF` bytes, so it is written whole or not at all (pipe(7)).
    pub fn write(&self, record: &Access<'_>) -> bool {
        let mut line = String::with_capacity(1024);
        if record.detail.is_empty() {
            record.write_line(&mut line);
        } else {
            // The client's words have been looked at when they came: they are on the board, too.
            let detail = self.redactor.redact(record.detail);
            Access { detail: &detail, ..record.clone() }.write_line(&mut line);
        }
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&self.pipe, line.as_bytes())).is_ok();
        if !written {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        written
    }
}
