//! The read end of the access-record pipe: whole lines, many at a time.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use evergate_core::record::LINE_BYTES_MAX;
use tokio::net::unix::pipe::Receiver;
use tokio::time::Instant;

/// Between two looks at a pipe that has something: a wake-up per record would cost more than the record.
const PAUSE: Duration = Duration::from_millis(50);
/// Most bytes taken at once; the pipe holds a MiB, so that a full one is emptied in one look.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes of one read.
const READ_BYTES: usize = 64 << 10;

/// The pipe, and the beginning of a line whose rest is still to come.
#[derive(Debug)]
pub(super) struct Pipe {
    pipe: Receiver,
    bytes: Vec<u8>,
    is_ended: bool,
    /// No look before this moment.
    quiet_until: Instant,
}

impl Pipe {
    /// Must be called in the runtime.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let pipe = Receiver::from_owned_fd(fd)?;
        Ok(Self { pipe, bytes: Vec::new(), is_ended: false, quiet_until: Instant::now() })
    }

    /// Whole lines, at least one; none when nobody can write any more. May be dropped at any await: what was read is
    /// kept.
    pub(super) async fn next(&mut self) -> Option<Vec<u8>> {
        while !self.is_ended {
            tokio::time::sleep_until(self.quiet_until).await;
            if self.pipe.readable().await.is_err() {
                break;
            }
            let before = self.bytes.len();
            self.is_ended = matches!(fill(|bytes| self.pipe.try_read_buf(bytes), &mut self.bytes), Filled::End);
            // Under a load that fills the pipe within a pause there is none.
            if self.bytes.len().saturating_sub(before) < BATCH_BYTES / 4 {
                self.quiet_until = Instant::now() + PAUSE;
            }
            let lines = lines(&mut self.bytes);
            if !lines.is_empty() {
                return Some(lines);
            }
        }
        None
    }

    /// What is there at this moment, whole lines.
    pub(super) fn rest(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        // Past the runtime, which believes a pipe to be empty until it has been told otherwise.
        let read = |bytes: &mut Vec<u8>| Ok(rustix::io::read(&self.pipe, rustix::buffer::spare_capacity(bytes))?);
        while let Filled::More = fill(read, &mut self.bytes) {
            let lines = lines(&mut self.bytes);
            all.extend(lines);
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

fn fill(read: impl Fn(&mut Vec<u8>) -> io::Result<usize>, bytes: &mut Vec<u8>) -> Filled {
    let limit = bytes.len().saturating_add(BATCH_BYTES);
    while bytes.len() < limit {
        bytes.reserve(READ_BYTES);
        match read(bytes) {
            Ok(0) => return Filled::End,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Filled::Empty,
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
