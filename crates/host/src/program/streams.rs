//! The pipes to and from a program. Ours are non-blocking; the program's ends are as any program expects them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};

use super::tail::{Lines, Tail};
use super::{Pid, State};
use crate::report::{Report, Stream};

/// After a program's exit somebody else may hold its output open; how long more is waited for (G9).
pub(crate) const LINGER: Duration = Duration::from_millis(500);
/// Read at once: a pipe's usual size.
const READ_BYTES: usize = 64 << 10;

/// A program's standard input.
#[derive(Debug)]
pub struct Input(pipe::Sender);

/// What became of what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fed {
    /// The kernel has it.
    All,
    /// The program has closed its input (G15). That is its right; what it answers counts.
    Closed,
    /// The program has not read for too long (G14).
    Stalled,
}

impl Input {
    /// Writes all of it, as fast as the program reads; to be done beside reading its output. `stall` is how long the program
    /// may read nothing. Not cancel-safe: how much was written is lost.
    ///
    /// # Errors
    /// What write(2) says, but for a closed pipe.
    pub async fn feed(&mut self, mut bytes: &[u8], stall: Duration) -> io::Result<Fed> {
        while !bytes.is_empty() {
            match self.0.try_write(bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let Ok(ready) = timeout(stall, self.0.writable()).await else { return Ok(Fed::Stalled) };
                    ready?;
                }
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Fed::Closed),
                Err(error) => return Err(error),
            }
        }
        Ok(Fed::All)
    }
}

/// A program's standard output. Nothing is read ahead: while nobody asks, the program waits at a full pipe (G13).
#[derive(Debug)]
pub struct Output {
    pipe: pipe::Receiver,
    state: watch::Receiver<State>,
    is_over: bool,
    _open: Open,
}

impl Output {
    /// The next bytes; none at the end, which is when every holder has closed it, or half a second after the program's exit
    /// when what was written until then is read (G9). Cancel-safe.
    ///
    /// # Errors
    /// What read(2) says.
    pub async fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        if self.is_over {
            return Ok(None);
        }
        loop {
            let mut bytes = BytesMut::with_capacity(READ_BYTES);
            match self.pipe.try_read_buf(&mut bytes) {
                Ok(0) => break,
                // What was asked for is mostly more than what came; the rest of the memory goes back.
                Ok(_) => return Ok(Some(Bytes::copy_from_slice(&bytes))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            tokio::select! {
                // Both are cancel-safe: readiness is kept, and a state is looked at anew.
                ready = self.pipe.readable() => ready?,
                () = lingered(&mut self.state, |state| state.exited.map(|(_, at)| at)) => break,
            }
        }
        self.is_over = true;
        Ok(None)
    }
}

/// Waits until something has been over for [`LINGER`]: the program's first process, or all of them.
async fn lingered(state: &mut watch::Receiver<State>, over: impl Fn(&State) -> Option<Instant>) {
    let since = match state.wait_for(|state| over(state).is_some()).await {
        Ok(state) => over(&state),
        // Its life is over.
        Err(_) => None,
    };
    sleep_until((since.unwrap_or_else(Instant::now) + LINGER).into()).await;
}

/// Whoever still reads from a program, counted for its life.
#[derive(Debug)]
pub(crate) struct Open(watch::Sender<usize>);

impl Open {
    pub(crate) fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// A pipe to a child's input: its end, and ours.
pub(crate) fn input() -> io::Result<(OwnedFd, Input)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    set_nonblocking(&write)?;
    Ok((read, Input(pipe::Sender::from_owned_fd(write)?)))
}

/// A pipe from a child: its end, and ours.
pub(crate) fn output() -> io::Result<(OwnedFd, pipe::Receiver)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    set_nonblocking(&read)?;
    Ok((write, pipe::Receiver::from_owned_fd(read)?))
}

pub(crate) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    // The flag belongs to the open file: each end of a pipe is one of its own.
    Ok(fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?)
}

pub(crate) fn reader(pipe: pipe::Receiver, state: watch::Receiver<State>, open: Open) -> Output {
    Output { pipe, state, is_over: false, _open: open }
}

/// A stream that is a log.
pub(crate) struct Log {
    pub(crate) program: Pid,
    pub(crate) stream: Stream,
    pub(crate) pipe: pipe::Receiver,
    pub(crate) state: watch::Receiver<State>,
    pub(crate) open: [Open; 2],
    /// Where the last of it is kept.
    pub(crate) tail: Option<Arc<Mutex<Tail>>>,
    pub(crate) report: Arc<dyn Report>,
}

impl Log {
    /// Reads all of it, always: a program must never wait for its log (G12).
    pub(crate) async fn drain(self) {
        let Self { program, stream, pipe, mut state, open: _open, tail, report } = self;
        let mut lines = Lines::new(program, stream, Instant::now());
        let mut bytes = vec![0; READ_BYTES];
        loop {
            match pipe.try_read(&mut bytes) {
                Ok(0) => break,
                Ok(count) => {
                    let read = bytes.get(..count).unwrap_or_default();
                    if let Some(tail) = &tail {
                        tail.lock().unwrap_or_else(PoisonError::into_inner).push(read);
                    }
                    lines.push(read, Instant::now(), &*report);
                    // A flood must not keep the others from their turn: `try_read` alone never gives it up.
                    tokio::task::yield_now().await;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Nothing that a pipe's reader could do about it.
                Err(_) => break,
            }
            tokio::select! {
                // Both are cancel-safe: readiness is kept, and a state is looked at anew.
                ready = pipe.readable() => if ready.is_err() { break },
                // What the rest of its group says within its grace is told too.
                () = lingered(&mut state, |state| state.swept) => break,
            }
        }
        lines.finish(&*report);
    }
}
