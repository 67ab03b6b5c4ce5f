//! The read end of the access-record pipe: whole lines, many at a time, looked at first and taken out once they are
//! written. What a clerk that dies had in its hands is still in the pipe.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use evergate_core::record::LINE_BYTES_MAX;
use rustix::buffer::spare_capacity;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice, tee};

/// Between two looks at a pipe that has something. The pipe is looked at by the clock and never waited for: a waiter
/// would be woken by every single record, which cost the workers a third of their time (measured).
const PAUSE_MIN: Duration = Duration::from_millis(25);
/// The same while little comes: a look costs the same for one line as for many.
const PAUSE_FEW: Duration = Duration::from_millis(100);
/// Between two looks at a pipe that has had nothing for a while.
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Most bytes of one look; the pipe holds a MiB, so that a full one is emptied by one.
pub(super) const BATCH_BYTES: usize = 1 << 20;

/// The pipe.
#[derive(Debug)]
pub(super) struct Pipe {
    fd: OwnedFd,
    /// A pipe of our own, for a copy of what is in the other; reading and writing end.
    copy: (OwnedFd, OwnedFd),
    /// Most bytes of one look: what both pipes hold.
    room: usize,
    /// Where bytes go that were looked at; none where there is no such file.
    nowhere: Option<OwnedFd>,
    is_ended: bool,
    pause: Duration,
}

impl Pipe {
    /// Takes the read end, which does not block.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        let copy = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Above the user's share of pipe memory the kernel refuses; then a look sees less.
        let _ = fcntl_setpipe_size(&copy.1, BATCH_BYTES);
        let room = fcntl_getpipe_size(&fd)?.min(fcntl_getpipe_size(&copy.1)?).min(BATCH_BYTES);
        let nowhere = open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        Ok(Self { fd, copy, room, nowhere, is_ended: false, pause: Duration::ZERO })
    }

    /// Whole lines, at least one, which stay in the pipe until they are [taken](Pipe::take); none when nobody can write
    /// any more. May be dropped at any await.
    pub(super) async fn next(&mut self) -> Option<Vec<u8>> {
        while !self.is_ended {
            tokio::time::sleep(self.pause).await;
            let lines = self.look();
            if !lines.is_empty() {
                self.pause = match lines.len() {
                    few if few < self.room / 8 => (self.pause * 2).clamp(PAUSE_MIN, PAUSE_FEW),
                    some if some < self.room / 4 => self.pause.min(PAUSE_FEW),
                    // Under a load that fills the pipe within a pause there is none.
                    _ => Duration::ZERO,
                };
                return Some(lines);
            }
            self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        }
        None
    }

    /// What is there at this moment, whole lines; they stay.
    pub(super) fn look(&mut self) -> Vec<u8> {
        let mut bytes = match tee(&self.fd, &self.copy.1, BATCH_BYTES, SpliceFlags::NONBLOCK) {
            Ok(0) => {
                self.is_ended = true;
                return Vec::new();
            }
            Ok(count) => read(&self.copy.0, count),
            Err(Errno::AGAIN | Errno::INTR) => return Vec::new(),
            // A pipe that cannot be read will not be readable again.
            Err(_) => {
                self.is_ended = true;
                return Vec::new();
            }
        };
        let end = memchr::memrchr(b'\n', &bytes).map_or(0, |at| at + 1);
        // No writer makes a line as long: whatever this is, it does not stay.
        if end == 0 && bytes.len() > 2 * LINE_BYTES_MAX {
            self.take(bytes.len());
        }
        bytes.truncate(end);
        bytes
    }

    /// Takes out what was looked at first.
    pub(super) fn take(&mut self, count: usize) {
        let mut left = count;
        while left > 0 {
            let Some(nowhere) = &self.nowhere else {
                // As many as that and no more: whatever else is there has not been looked at.
                match rustix::io::read(&self.fd, &mut *vec![0; left.min(64 << 10)]) {
                    Ok(0) => break,
                    Ok(gone) => left = left.saturating_sub(gone),
                    Err(Errno::INTR) => {}
                    Err(_) => break,
                }
                continue;
            };
            // Whole pages change hands; nothing is copied.
            match splice(&self.fd, None, nowhere, None, left, SpliceFlags::NONBLOCK) {
                Ok(0) => break,
                Ok(gone) => left = left.saturating_sub(gone),
                Err(Errno::INTR) => {}
                // What stays would come again and again.
                Err(_) => self.nowhere = None,
            }
        }
    }
}

/// Reads what is there, at most so many bytes.
fn read(fd: &OwnedFd, count: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count);
    while bytes.len() < count {
        match rustix::io::read(fd, spare_capacity(&mut bytes)) {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => break,
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), future).await.unwrap() })
    }

    fn pipe() -> (Pipe, OwnedFd) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (Pipe::new(read).unwrap(), write)
    }

    #[test]
    fn only_whole_lines_come_out_and_stay_until_they_are_taken() {
        block_on(async {
            let (mut pipe, write) = pipe();
            rustix::io::write(&write, b"one\ntwo\nthr").unwrap();
            assert_eq!(pipe.next().await.unwrap(), b"one\ntwo\n");
            assert_eq!(pipe.look(), b"one\ntwo\n");
            pipe.take(8);
            rustix::io::write(&write, b"ee\nfour\n").unwrap();
            assert_eq!(pipe.look(), b"three\nfour\n");
            pipe.take(11);
            assert_eq!(pipe.look(), b"");
            rustix::io::write(&write, b"last\n").unwrap();
            drop(write);
            assert_eq!(pipe.next().await.unwrap(), b"last\n");
            pipe.take(5);
            assert_eq!(pipe.next().await, None);
        });
    }

    /// What a reader had not taken, another one finds.
    #[test]
    fn what_was_looked_at_is_there_for_the_next_reader() {
        let (mut pipe, write) = pipe();
        for _ in 0..100 {
            rustix::io::write(&write, &[b"x".repeat(399), b"\n".to_vec()].concat()).unwrap();
        }
        assert_eq!(pipe.look().len(), 40_000);
        pipe.take(400);
        // It cannot be written to, as where the system refuses: what is taken is read then.
        pipe.nowhere = open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        pipe.take(800);
        assert!(pipe.nowhere.is_none());
        pipe.take(400);
        let mut next = Pipe::new(rustix::io::fcntl_dupfd_cloexec(&pipe.fd, 0).unwrap()).unwrap();
        drop(pipe);
        assert_eq!(next.look().len(), 38_400);
        next.take(38_400);
        assert_eq!(next.look(), b"");
    }

    #[test]
    fn records_of_a_pause_come_together() {
        block_on(async {
            let (mut pipe, write) = pipe();
            rustix::io::write(&write, b"a\n").unwrap();
            assert_eq!(pipe.next().await.unwrap(), b"a\n");
            pipe.take(2);
            for _ in 0..3 {
                rustix::io::write(&write, b"b\n").unwrap();
                tokio::task::yield_now().await;
            }
            assert_eq!(pipe.next().await.unwrap(), b"b\nb\nb\n");
        });
    }

    #[test]
    fn a_line_without_end_does_not_stay() {
        let (mut pipe, write) = pipe();
        rustix::io::write(&write, &[b'x'; 4096]).unwrap();
        rustix::io::write(&write, &[b'x'; 4096]).unwrap();
        rustix::io::write(&write, b"x").unwrap();
        assert_eq!(pipe.look(), b"");
        rustix::io::write(&write, b"good\n").unwrap();
        assert_eq!(pipe.look(), b"good\n");
    }
}
