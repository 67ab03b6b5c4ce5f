//! Runs the streams of HTTP/2 connections, and ends those whose client opens no window.
//!
//! Such a client may read its connection and acknowledge every PING, so that the socket is never full: `stall` sees
//! nothing. The library then waits for the window and polls the answer's body no more, with all its limits. What tells
//! is that it has taken a piece and not come back for the next.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use evergate_upstream::clock::{Clock, Sleep};

use crate::tasks::Tasks;

tokio::task_local! {
    static TAKEN: Arc<Taken>;
}

/// What a stream's task knows of its answer's body.
#[derive(Debug, Default)]
pub struct Taken {
    since: Mutex<Option<Instant>>,
    is_stalled: AtomicBool,
}

impl Taken {
    /// That of the HTTP/2 stream whose task is being polled; `None` for HTTP/1.
    #[must_use]
    pub fn current() -> Option<Arc<Self>> {
        TAKEN.try_with(Arc::clone).ok()
    }

    /// The library asks for the next piece.
    pub fn ask(&self) {
        self.set(None);
    }

    /// The library has got a piece, and asks again when there is room for more.
    pub fn take(&self) {
        self.set(Some(Instant::now()));
    }

    fn set(&self, since: Option<Instant>) {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    fn since(&self) -> Option<Instant> {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the stream was ended because its client opens no window.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.is_stalled.load(Ordering::Relaxed)
    }
}

/// Starts a connection's streams.
#[derive(Clone, Debug)]
pub(super) struct Streams {
    pub(super) tasks: Tasks,
    /// Times that.
    pub(super) clock: Clock,
    /// How long a client may open no window.
    pub(super) limit: Duration,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        let watched = Watched {
            future: Box::pin(future),
            taken: Arc::default(),
            clock: self.clock.clone(),
            timer: None,
            limit: self.limit,
        };
        drop(self.tasks.spawn("h2_stream", watched));
    }
}

struct Watched<F> {
    future: Pin<Box<F>>,
    taken: Arc<Taken>,
    clock: Clock,
    timer: Option<Sleep>,
    limit: Duration,
}

impl<F: Future<Output = ()>> Future for Watched<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let future = this.future.as_mut();
        if TAKEN.sync_scope(Arc::clone(&this.taken), || future.poll(cx)).is_ready() {
            return Poll::Ready(());
        }
        loop {
            let Some(since) = this.taken.since() else { return Poll::Pending };
            let due = since + this.limit;
            let timer = this.timer.get_or_insert_with(|| this.clock.sleep_until(due));
            // A timer of an earlier piece is let run: it is set anew at most once in `limit`.
            ready!(Pin::new(timer).poll(cx));
            if Instant::now() >= due {
                // Dropping the stream resets it; its body, which is dropped with it, sees why.
                this.taken.is_stalled.store(true, Ordering::Relaxed);
                return Poll::Ready(());
            }
            this.timer = None;
        }
    }
}
