//! Runs the streams of HTTP/2 connections, and ends those whose client opens no window.
//!
//! Such a client may read its connection and acknowledge every PING, so that the socket is never full: `stall` sees
//! nothing. The library then waits for the window and polls the answer's body no more, with all its limits. What tells
//! is that it holds pieces of the answer of which nothing goes.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use evergate_upstream::clock::{Clock, Sleep};

use super::shared::Shared;
use crate::context::Token;
use crate::http::unread::Unread;
use crate::tasks::Tasks;

tokio::task_local! {
    static TAKEN: Arc<Taken>;
}

/// What the library holds of a stream's answer: the body gives it pieces, and each says when its bytes have gone.
#[derive(Debug, Default)]
pub struct Taken {
    held: Mutex<Held>,
    token: OnceLock<Arc<Token>>,
    is_stalled: AtomicBool,
    /// What of the request's body nobody reads.
    unread: Mutex<Option<Box<Unread>>>,
}

#[derive(Debug, Default)]
struct Held {
    pieces: u32,
    /// When the first of them was taken, or bytes of one went.
    since: Option<Instant>,
    /// Who waits until there are none.
    waker: Option<Waker>,
}

impl Taken {
    /// That of the HTTP/2 stream whose task is being polled; `None` for HTTP/1.
    #[must_use]
    pub fn current() -> Option<Arc<Self>> {
        TAKEN.try_with(Arc::clone).ok()
    }

    /// The request can be cancelled, while its client opens no window too.
    pub fn set_token(&self, token: &Arc<Token>) {
        let _ = self.token.set(Arc::clone(token));
    }

    /// The library takes a piece.
    pub fn take(&self) {
        let mut held = self.lock();
        held.pieces += 1;
        held.since.get_or_insert_with(Instant::now);
    }

    /// Bytes of a piece have gone.
    pub fn go_on(&self) {
        self.lock().since = Some(Instant::now());
    }

    /// A piece has gone, or never will.
    pub fn give_back(&self) {
        let mut held = self.lock();
        held.pieces = held.pieces.saturating_sub(1);
        if held.pieces == 0 {
            held.since = None;
            let waker = held.waker.take();
            drop(held);
            waker.into_iter().for_each(Waker::wake);
        }
    }

    /// Waits until the library holds nothing.
    pub fn poll_gone(&self, cx: &Context<'_>) -> Poll<()> {
        let mut held = self.lock();
        if held.pieces == 0 {
            return Poll::Ready(());
        }
        held.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Has the rest of the request's body read before the answer ends.
    pub fn keep(&self, unread: Unread) {
        *self.unread.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(unread));
    }

    /// Waits until that is done.
    pub fn poll_unread(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(body) = unread.as_mut() {
            ready!(body.poll_end(cx));
            *unread = None;
        }
        Poll::Ready(())
    }

    fn since(&self) -> Option<Instant> {
        self.lock().since
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        // Whatever is done while it is locked cannot leave it half-changed.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// How long a client may open no window ...
    pub(super) limit: Duration,
    /// ... and of a request that was cancelled, as at the end of a worker's time: what it could still be told waits, too.
    pub(super) patience: Duration,
    /// Whether the socket is what it waits for.
    pub(super) shared: Arc<Shared>,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        let watched = Watched {
            future: Box::pin(future),
            taken: Arc::default(),
            streams: self.clone(),
            cancelled_at: None,
            timer: None,
        };
        drop(self.tasks.spawn("h2_stream", watched));
    }
}

struct Watched<F> {
    future: Pin<Box<F>>,
    taken: Arc<Taken>,
    streams: Streams,
    cancelled_at: Option<Instant>,
    timer: Option<Sleep>,
}

impl<F> Watched<F> {
    /// When the stream is to end, and whether that is its client's doing, if nothing more goes of what the library holds.
    fn due(&mut self, cx: &Context<'_>, since: Instant) -> (Instant, bool) {
        let Streams { limit, patience, shared, .. } = &self.streams;
        // A full socket has its own limit, and says nothing of the window.
        let stalled = since.max(shared.full_until().unwrap_or(since)) + *limit;
        if self.taken.token.get().is_some_and(|token| token.check(cx).is_some()) {
            let cancelled = *self.cancelled_at.get_or_insert_with(Instant::now) + *patience;
            return (stalled.min(cancelled), stalled <= cancelled);
        }
        (stalled, true)
    }
}

impl<F: Future<Output = ()>> Future for Watched<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let future = this.future.as_mut();
        if TAKEN.sync_scope(Arc::clone(&this.taken), || future.poll(cx)).is_ready() {
            return Poll::Ready(());
        }
        loop {
            let Some(since) = this.taken.since() else { return Poll::Pending };
            let (due, is_stall) = this.due(cx, since);
            let timer = match &mut this.timer {
                // A timer of an earlier piece is let run: it is set anew at most once in `limit`.
                Some(timer) if timer.deadline() <= due => timer,
                slot => slot.insert(this.streams.clock.sleep_until(due)),
            };
            std::task::ready!(Pin::new(timer).poll(cx));
            this.timer = None;
            if Instant::now() >= due {
                // Dropping the stream resets it; its body, which is dropped with it, sees why.
                this.taken.is_stalled.store(is_stall, Ordering::Relaxed);
                return Poll::Ready(());
            }
        }
    }
}
