//! One run of a program for one request: fed and read at once, within its limits.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_core::{Error, Fault};
use evergate_sys::Status;
use tokio::time::sleep_until;

use crate::ask::exited;
use crate::program::{Fed, Output, Program};

/// How long a run may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Until its first byte.
    pub(crate) first_output: Duration,
    /// Between two pieces; also how long it may read nothing of its input.
    pub(crate) idle: Duration,
    /// All of it.
    pub(crate) total: Duration,
    /// The request's own.
    pub(crate) deadline: Option<Instant>,
}

/// A program at work. Dropping it ends the program.
pub(crate) struct Run {
    program: Program,
    output: Option<Output>,
    feed: Option<Pin<Box<dyn Future<Output = io::Result<Fed>> + Send>>>,
    limits: Limits,
    started: Instant,
    /// The last sign of it.
    heard: Instant,
    has_begun: bool,
}

impl Run {
    pub(crate) fn new(mut program: Program, input: Option<Bytes>, limits: Limits) -> Self {
        let output = program.take_output();
        let pipe = program.take_input();
        let stall = limits.idle;
        let feed = pipe.zip(input).map(|(mut pipe, input)| {
            // The pipe is closed behind the last byte, which is how a program knows that it was the last.
            Box::pin(async move { pipe.feed(&input, stall).await }) as Pin<Box<_>>
        });
        let started = Instant::now();
        Self { program, output, feed: feed.map(|feed| feed as _), limits, started, heard: started, has_begun: false }
    }

    /// The next bytes; none at the end of its output. Cancel-safe.
    ///
    /// # Errors
    /// `AdapterTimeout` naming the limit, `DeadlineExceeded` for the request's own.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let until = self.patience();
        loop {
            let Some(output) = &mut self.output else { return Ok(None) };
            tokio::select! {
                biased;
                // All are cancel-safe: reading keeps nothing, the feed is kept in its box, a moment is a value.
                chunk = output.chunk() => {
                    let chunk = chunk.map_err(|error| lost("read from", &error))?;
                    (self.heard, self.has_begun) = (Instant::now(), true);
                    return Ok(chunk);
                }
                fed = fed(&mut self.feed) => {
                    self.feed = None;
                    match fed {
                        // One that has closed its input may answer all the same (G15).
                        Ok(Fed::All | Fed::Closed) => {}
                        Ok(Fed::Stalled) => return Err(too_slow("read nothing of its input for", self.limits.idle, "idle")),
                        Err(error) => return Err(lost("write to", &error)),
                    }
                }
                () = sleep_until(until.into()) => return Err(self.overdue()),
            }
        }
    }

    /// Waits for its end, which must be a good one.
    ///
    /// # Errors
    /// `AdapterExited` with the exact code or signal, or as [`Run::next`].
    pub(crate) async fn exit(&mut self) -> Result<(), Error> {
        let until = self.patience();
        let status = loop {
            tokio::select! {
                // All are cancel-safe, as in `next`; one that has said everything may still read.
                status = self.program.exited() => break status,
                _ = fed(&mut self.feed) => self.feed = None,
                () = sleep_until(until.into()) => return Err(self.overdue()),
            }
        };
        match status {
            Some(Status::Code(0)) => Ok(()),
            Some(status) => Err(exited(status)),
            None => Err(Error::new(Fault::Internal, "the program of this model was lost")),
        }
    }

    /// Ends it; what has come of it is why.
    pub(crate) fn over<T>(self, outcome: Result<T, Error>) -> Result<T, Error> {
        outcome.inspect_err(|error| self.program.blame(error))
    }

    /// Until when something has to happen.
    fn patience(&self) -> Instant {
        let silence =
            if self.has_begun { self.heard + self.limits.idle } else { self.started + self.limits.first_output };
        let total = self.started + self.limits.total;
        self.limits.deadline.into_iter().fold(silence.min(total), Instant::min)
    }

    /// Which limit that was.
    fn overdue(&self) -> Error {
        let until = self.patience();
        if self.limits.deadline == Some(until) {
            return Error::new(
                Fault::DeadlineExceeded,
                "the program of this model did not answer in the request's time",
            );
        }
        if until == self.started + self.limits.total {
            return too_slow("did not finish within", self.limits.total, "timeout");
        }
        if self.has_begun {
            return too_slow("was silent for longer than", self.limits.idle, "idle");
        }
        too_slow("wrote nothing within", self.limits.first_output, "first_output")
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // After a better reason it does not count, nor for one that has ended by itself.
        self.program.blame("nobody waited for its answer any more");
    }
}

/// Waits for the feed, for ever if there is none.
async fn fed(feed: &mut Option<Pin<Box<dyn Future<Output = io::Result<Fed>> + Send>>>) -> io::Result<Fed> {
    match feed {
        Some(feed) => feed.await,
        None => std::future::pending().await,
    }
}

fn too_slow(what: &str, limit: Duration, key: &str) -> Error {
    let message = format!("the program of this model {what} {} ms (process.{key})", limit.as_millis());
    Error::new(Fault::AdapterTimeout, message)
}

fn lost(what: &str, error: &io::Error) -> Error {
    Error::new(Fault::Internal, format!("cannot {what} the program of this model")).detail(error)
}
