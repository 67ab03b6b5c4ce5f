//! The only place that starts tasks: each has a kind, and a panic in it is counted, not lost.
//!
//! Holds INV-PANIC-1 (ARCHITECTURE.md).

use std::fmt::Write as _;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::{Context, Poll};

use evergate_board::{Board, TEXT_BYTES_MAX, monotonic_ns};
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

/// From now on every panic of this process leaves its place on the board, where it outlives the process: one in a
/// destructor, or outside of every boundary, is the last that it does.
pub fn note_panics(board: &Board, row: u32) {
    let (board, before) = (board.clone(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        // A panic that must not unwind is followed by another, of the library itself, which says so: the first has the place.
        let is_echo = panic.location().is_some_and(|place| place.file().ends_with("core/src/panicking.rs"));
        if let (Some(child), Some(place), false) = (board.child(row), panic.location(), is_echo) {
            let mut text = Place::default();
            // Cut off where it does not fit.
            let _ = write!(text, "{place}");
            child.set_panic(text.as_str(), monotonic_ns());
        }
        before(panic);
    }));
}

/// A text on the stack: a panic may have come from the allocator.
struct Place {
    bytes: [u8; TEXT_BYTES_MAX],
    length: usize,
}

impl Default for Place {
    fn default() -> Self {
        Self { bytes: [0; TEXT_BYTES_MAX], length: 0 }
    }
}

impl Place {
    fn as_str(&self) -> &str {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        std::str::from_utf8(bytes)
            .or_else(|error| std::str::from_utf8(bytes.get(..error.valid_up_to()).unwrap_or_default()))
            .unwrap_or_default()
    }
}

impl std::fmt::Write for Place {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.length).zip(text.bytes()) {
            *to = from;
            self.length += 1;
        }
        Ok(())
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
