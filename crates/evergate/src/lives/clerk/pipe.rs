//! The read end of the access-record pipe: whole lines, many at a time.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use evergate_core::record::LINE_BYTES_MAX;

/// Between two looks at a pipe that has something. The pipe is looked at by the clock and never waited for: a waiter
/// would be woken by every single record, which cost the workers a third of their time (measured).
const PAUSE_MIN: Duration = Duration::from_millis(25);
/// Between two looks at a pipe that has had nothing for a while.
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Most bytes taken at once; the pipe holds a MiB, so that a full one is emptied in one look.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes of one read.
const READ_BYTES: usize = 64 << 10;

/// The pipe, and the beginning of a line whose rest is still to come.
#[derive(Debug)]
pub(super) struct Pipe {
    fd: OwnedFd,
    bytes: Vec<u8>,
    is_ended: bool,
    pause: Duration,
}

impl Pipe {
    /// Takes the read end, which does not block.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd, bytes: Vec::new(), is_ended: false, pause: Duration::ZERO })
    }

    /// Whole lines, at least one; none when nobody can write any more. May be dropped at any await: what was read is
    /// kept.
    pub(super) async fn next(&mut self) -> Option<Vec<u8>> {
        while !self.is_ended {
            tokio::time::sleep(self.pause).await;
            self.is_ended = matches!(fill(&self.fd, &mut self.bytes), Filled::End);
            let lines = lines(&mut self.bytes);
            if !lines.is_empty() {
                // Under a load that fills the pipe within a pause there is none.
                self.pause = if lines.len() < BATCH_BYTES / 4 { PAUSE_MIN } else { Duration::ZERO };
                return Some(lines);
            }
            self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        }
        None
    }

    /// What is there at this moment, whole lines.
    pub(super) fn rest(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Filled::More = fill(&self.fd, &mut self.bytes) {
            all.extend(lines(&mut self.bytes));
        }
        all.extend(lines(&mut self.bytes));
        all
    }
}

/// Takes the whole lines out.
fn lines(bytes: &mut Vec<u8>) -> Vec<u8> {
    let Some(end) = memchr::memrchr(b'\n', bytes) else {
        // No writer makes a line as long: whatever this is, it does not grow without end.
        if bytes.len() > 2 * LINE_BYTES_MAX {
            bytes.clear();
        }
        return Vec::new();
    };
    let tail = bytes.split_off(end + 1);
    std::mem::replace(bytes, tail)
}

/// What a look at the pipe came to.
enum Filled {
    /// Everything was taken.
    Empty,
    /// There may be more.
    More,
    /// Nobody can write any more.
    End,
}

fn fill(fd: &OwnedFd, bytes: &mut Vec<u8>) -> Filled {
    let limit = bytes.len().saturating_add(BATCH_BYTES);
    while bytes.len() < limit {
        bytes.reserve(READ_BYTES);
        match rustix::io::read(fd, rustix::buffer::spare_capacity(bytes)) {
            Ok(0) => return Filled::End,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Filled::Empty,
            // A pipe that cannot be read will not be readable again.
            Err(_) => return Filled::End,
        }
    }
    Filled::More
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), future).await.unwrap() })
    }

    #[test]
    fn only_whole_lines_come_out() {
        block_on(async {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
            let mut pipe = Pipe::new(read).unwrap();
            rustix::io::write(&write, b"one\ntwo\nthr").unwrap();
            assert_eq!(pipe.next().await.unwrap(), b"one\ntwo\n");
            rustix::io::write(&write, b"ee\nfour\n").unwrap();
            assert_eq!(pipe.rest(), b"three\nfour\n");
            assert_eq!(pipe.rest(), b"");
            rustix::io::write(&write, b"last\n").unwrap();
            drop(write);
            assert_eq!(pipe.next().await.unwrap(), b"last\n");
            assert_eq!(pipe.next().await, None);
        });
    }

    #[test]
    fn records_of_a_pause_come_together() {
        block_on(async {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
            let mut pipe = Pipe::new(read).unwrap();
            rustix::io::write(&write, b"a\n").unwrap();
            assert_eq!(pipe.next().await.unwrap(), b"a\n");
            for _ in 0..3 {
                rustix::io::write(&write, b"b\n").unwrap();
                tokio::task::yield_now().await;
            }
            assert_eq!(pipe.next().await.unwrap(), b"b\nb\nb\n");
        });
    }

    #[test]
    fn a_line_without_end_does_not_grow() {
        block_on(async {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
            let mut pipe = Pipe::new(read).unwrap();
            rustix::io::write(&write, &[b'x'; 4096]).unwrap();
            rustix::io::write(&write, &[b'x'; 4096]).unwrap();
            rustix::io::write(&write, b"x").unwrap();
            assert_eq!(pipe.rest(), b"");
            rustix::io::write(&write, b"good\n").unwrap();
            assert_eq!(pipe.rest(), b"good\n");
        });
    }
}
