//! Ends the connection of an upstream that does not read its request.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::clock::Clock;
use crate::standstill::Standstill;

/// What of a socket's bytes its peer has not acknowledged; `None` if that cannot be told.
pub type Unsent = fn(BorrowedFd<'_>) -> Option<u32>;

/// How long a write may stand still.
#[derive(Clone, Debug)]
pub(crate) struct Patience {
    pub(crate) clock: Clock,
    /// `timeouts.write`.
    pub(crate) limit: Duration,
    pub(crate) unsent: Unsent,
}

/// Watches the writing half of one connection.
#[derive(Debug)]
pub(crate) struct Stall {
    patience: Patience,
    standstill: Standstill,
}

/// The error of a connection whose upstream reads nothing.
#[derive(Debug)]
pub(crate) struct Stalled;

impl fmt::Display for Stalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the upstream reads nothing")
    }
}

impl std::error::Error for Stalled {}

impl Stalled {
    /// Whether this is what ended a connection.
    pub(crate) fn is_cause(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

impl Stall {
    pub(crate) fn new(patience: Patience) -> Self {
        Self { patience, standstill: Standstill::default() }
    }

    /// Passes on how a write went; one that stands still for too long fails.
    pub(crate) fn watch<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        socket: BorrowedFd<'_>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.standstill.reset();
            return written;
        }
        let Patience { clock, limit, unsent } = &self.patience;
        let stalled = self.standstill.poll(cx, clock, *limit, || unsent(socket).unwrap_or(0));
        stalled.map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, Stalled)))
    }
}
