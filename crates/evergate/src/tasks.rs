//! The only place that starts tasks: each has a kind, and a panic in it is counted, not lost.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::{Context, Poll};

use evergate_board::Board;
use tokio::task::JoinHandle;

use crate::telemetry::names;

/// Starts tasks for one process.
#[derive(Clone, Debug)]
pub struct Tasks {
    board: Board,
    row: u32,
}

impl Tasks {
    /// Tasks of the process that owns `row`.
    #[must_use]
    pub fn new(board: Board, row: u32) -> Self {
        Self { board, row }
    }

    /// Starts a task. It ends with the runtime, or when the handle is aborted; dropping the handle lets it run.
    pub fn spawn(&self, kind: &'static str, future: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        self.spawn_caught(kind, Caught(Box::pin(future)))
    }

    /// As `spawn`, for a future that may have been polled before.
    pub fn spawn_caught<F>(&self, kind: &'static str, future: Caught<F>) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (board, row) = (self.board.clone(), self.row);
        #[allow(clippy::disallowed_methods, reason = "this is the one place that may")]
        tokio::spawn(async move {
            if future.await.is_err() {
                count_panic(&board, row);
                eprintln!("evergate: a task of kind {kind} panicked");
            }
        })
    }
}

/// Counts a caught panic on the board.
pub fn count_panic(board: &Board, row: u32) {
    if let Some(series) = board.series(row) {
        series.add(names::key(names::PANICS, 0, 0, 0), 1);
    }
}

/// A future whose panic is an error.
pub struct Caught<F: ?Sized>(pub Pin<Box<F>>);

/// The future panicked; the hook has said where.
#[derive(Debug)]
pub struct Panicked;

impl<F: Future + ?Sized> Future for Caught<F> {
    type Output = Result<F::Output, Panicked>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // Unwind safety: after a panic the future is never polled again, only dropped.
        match std::panic::catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(_) => Poll::Ready(Err(Panicked)),
        }
    }
}
