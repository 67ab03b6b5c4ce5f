//! The only place that starts tasks: each has a kind, and a panic in it ends nothing else.
//!
//! Holds INV-PANIC-1 (ARCHITECTURE.md).

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::task::JoinHandle;

use crate::telemetry::talk;

/// Panics of one kept task within [`PANICS_TIME`] that end the process.
const PANICS_MAX: u32 = 5;
/// See [`PANICS_MAX`].
const PANICS_TIME: Duration = Duration::from_secs(60);
/// Before a kept task is started again; doubled with each panic within [`PANICS_TIME`].
const RESTART: Duration = Duration::from_millis(100);

/// Starts tasks for one process.
#[derive(Clone, Debug)]
pub struct Tasks {
    child: &'static str,
    failed: Arc<watch::Sender<Option<&'static str>>>,
}

impl Tasks {
    /// Tasks of a process of that kind, such as `worker`.
    #[must_use]
    pub fn new(child: &'static str) -> Self {
        Self { child, failed: Arc::new(watch::Sender::new(None)) }
    }

    /// Starts a task. It ends with the runtime, or when the handle is aborted; dropping the handle lets it run.
    pub fn spawn(&self, kind: &'static str, future: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        self.spawn_caught(kind, Caught::of(Box::pin(future)))
    }

    /// As `spawn`, for a future that may have been polled before.
    pub fn spawn_caught<F>(&self, _kind: &'static str, future: Caught<F>) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        #[allow(clippy::disallowed_methods, reason = "this is the one place that may")]
        tokio::spawn(async move {
            // A panic is counted and told by the hook, and what the task worked for has been dropped.
            let _ = future.await;
        })
    }

    /// Starts a task that the process cannot do without: when it panics, `start` makes it anew, after a pause. The fifth
    /// time within a minute is told to [`Tasks::failed`] (H2). It is over when it ends by itself.
    pub fn keep<F>(&self, kind: &'static str, start: impl Fn() -> F + Send + Sync + 'static) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (child, failed) = (self.child, Arc::clone(&self.failed));
        #[allow(clippy::disallowed_methods, reason = "this is the one place that may")]
        tokio::spawn(async move {
            let mut restarts = Restarts::default();
            while Caught::of(Box::pin(async { start().await })).await.is_err() {
                let (count, pause) = restarts.after_panic(Instant::now());
                if count >= PANICS_MAX {
                    failed.send_if_modified(|first| first.is_none() && first.replace(kind).is_none());
                }
                let ms = pause.as_millis();
                talk::print(&format!("evergate {child}: the task {kind} panicked, and starts again in {ms} ms"));
                tokio::time::sleep(pause).await;
            }
        })
    }

    /// Waits for the kind of a kept task that does nothing but panic: the process should be replaced. Cancel-safe.
    pub async fn failed(&self) -> &'static str {
        let mut failed = self.failed.subscribe();
        loop {
            if let Some(kind) = *failed.borrow_and_update() {
                return kind;
            }
            // The sender lives as long as `self`.
            let _ = failed.changed().await;
        }
    }
}

/// Runs work that would hold up the event loop on a thread of the pool, which is why it needs a permit of a bound on it. It
/// ends by itself, also when nobody waits for it any more.
///
/// # Errors
/// The work panicked; the hook has said where.
pub async fn aside<T: Send + 'static>(
    permit: OwnedSemaphorePermit,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Panicked> {
    #[allow(clippy::disallowed_methods, reason = "this is the one place that may")]
    let working = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    });
    working.await.map_err(|_| Panicked)
}

/// Tasks of this runtime that have not ended.
#[must_use]
pub fn alive() -> u32 {
    u32::try_from(tokio::runtime::Handle::current().metrics().num_alive_tasks()).unwrap_or(u32::MAX)
}

/// When a kept task panicked lately.
#[derive(Debug, Default)]
struct Restarts {
    panics: Vec<Instant>,
}

impl Restarts {
    /// How many panics there were lately, this one included, and the pause before the next start.
    fn after_panic(&mut self, now: Instant) -> (u32, Duration) {
        self.panics.retain(|then| now.saturating_duration_since(*then) < PANICS_TIME);
        self.panics.push(now);
        let count = u32::try_from(self.panics.len()).unwrap_or(u32::MAX);
        // No longer than after the fifth: while the process is on its way out it still needs the task.
        (count, RESTART * 2_u32.pow(count.min(PANICS_MAX) - 1))
    }
}

/// A future whose panic is an error, also one while it is dropped.
pub struct Caught<F: ?Sized>(Option<Pin<Box<F>>>);

/// The future panicked; the hook has said where.
#[derive(Debug)]
pub struct Panicked;

impl<F: ?Sized> Caught<F> {
    /// The future with a boundary around it.
    #[must_use]
    pub fn of(future: Pin<Box<F>>) -> Self {
        Self(Some(future))
    }

    /// Drops the work, if it is not over.
    pub fn clear(&mut self) {
        if let Some(future) = self.0.take() {
            caught(|| drop(future));
        }
    }
}

/// Runs what may panic and is nobody else's concern: counted and told by the hook, and then over.
pub fn caught(work: impl FnOnce()) -> bool {
    // Unwind safety: what the work was about is gone or never touched again.
    catch_unwind(AssertUnwindSafe(work)).is_ok()
}

impl<F: Future + ?Sized> Future for Caught<F> {
    type Output = Result<F::Output, Panicked>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(future) = &mut self.0 else { return Poll::Ready(Err(Panicked)) };
        // Unwind safety: after a panic the future is never polled again, only dropped.
        match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(_) => {
                self.clear();
                Poll::Ready(Err(Panicked))
            }
        }
    }
}

impl<F: ?Sized> Drop for Caught<F> {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_come_later_each_time_and_are_forgotten_after_a_minute() {
        let (mut restarts, start) = (Restarts::default(), Instant::now());
        let seen: Vec<_> = (0..7).map(|s| restarts.after_panic(start + Duration::from_secs(s))).collect();
        let ms: Vec<_> = seen.iter().map(|(count, pause)| (*count, pause.as_millis())).collect();
        assert_eq!(ms, [(1, 100), (2, 200), (3, 400), (4, 800), (5, 1600), (6, 1600), (7, 1600)]);
        // Those of the seconds 3 to 6, and this one.
        assert_eq!(restarts.after_panic(start + Duration::from_secs(62)).0, 5);
        assert_eq!(restarts.after_panic(start + Duration::from_secs(200)), (1, RESTART));
    }

    #[test]
    fn a_panic_while_a_future_is_dropped_is_caught_too() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("made for the test");
            }
        }
        let bomb = Bomb;
        drop(Caught::of(Box::pin(async move {
            let _bomb = bomb;
            std::future::pending::<()>().await;
        })));
    }
}
